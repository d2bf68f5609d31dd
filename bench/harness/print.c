#include "bench/harness/print.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "bench/harness/json.h"
#include "bench/harness/plan_device.h"

static size_t append(char *text, size_t size, size_t length, const char *label, int64_t value)
{
	if (value == NO_VALUE || length >= size)
		return length;
	return length +
	       (size_t)snprintf(text + length, size - length, " %s=%" PRId64, label, value);
}

void describe_case(const struct bench_case *c, char *text, size_t size)
{
	char names[96];

	pattern_names(c->pattern, ',', names, sizeof names);
	/* The name of a block, and of a model's, says what its layers are. */
	bool single = c->model[0] || strcmp(names, c->block) == 0;
	size_t length = (size_t)snprintf(text, size, "%s%s%s%s%s %s", c->block, single ? "" : " ",
	                                 single ? "" : names, c->model[0] ? " " : "", c->model,
	                                 pass_name(c->pass));

	length = append(text, size, length, "T", c->seq_len);
	length = append(text, size, length, "B", c->batch);
	length = append(text, size, length, "D", c->d_model);
	length = append(text, size, length, "H", c->n_heads);
	length = append(text, size, length, "KV",
	                c->kv_heads == c->n_heads ? NO_VALUE : c->kv_heads);
	length = append(text, size, length, "L", c->chunk);
	length = append(text, size, length, "W", c->window);
	length = append(text, size, length, "G", c->groups);
	if (strcmp(c->position, "none") == 0 && length < size)
		length += (size_t)snprintf(text + length, size - length, " no positions");
	if (c->data != DATA_NORMAL && length < size)
		snprintf(text + length, size - length, " %s", data_name(c->data));
}

/* The operations that mix tokens; the others are projections, norms and elementwise work. */
static bool mixes_tokens(int operation)
{
	static const enum operation mixing[] = {OP_ATTENTION,
	                                        OP_ATTENTION_BACKWARD,
	                                        OP_ATTENTION_STEP,
	                                        OP_RAT_SCAN,
	                                        OP_RAT_SCAN_BACKWARD,
	                                        OP_RAT_STEP,
	                                        OP_RECURRENCE,
	                                        OP_RECURRENCE_BACKWARD,
	                                        OP_RECURRENCE_STEP,
	                                        OP_RATPLUS_STEP,
	                                        OP_MATRIX_RECURRENCE,
	                                        OP_MATRIX_RECURRENCE_BACKWARD,
	                                        OP_MATRIX_RECURRENCE_STEP};

	for (size_t i = 0; i < sizeof mixing / sizeof mixing[0]; i++)
		if ((int)mixing[i] == operation)
			return true;
	return false;
}

/* Whether an operation before this one, which mixes tokens too, ran with the same provider. */
static bool named_before(const struct context *ctx, int operation)
{
	for (int i = 0; i < operation; i++)
		if (ctx->ran[i] && mixes_tokens(i) && strcmp(ctx->ran[i], ctx->ran[operation]) == 0)
			return true;
	return false;
}

void describe_providers(const struct context *ctx, char *mixing, size_t mixing_size, char *all,
                        size_t all_size)
{
	size_t mixing_length = 0, all_length = 0;

	mixing[0] = all[0] = '\0';
	for (int i = 0; i < OP_COUNT; i++) {
		if (!ctx->ran[i])
			continue;
		if (all_length < all_size)
			all_length +=
			        (size_t)snprintf(all + all_length, all_size - all_length, "%s%s=%s",
			                         all_length ? " " : "",
			                         operation_name((enum operation)i), ctx->ran[i]);
		if (mixes_tokens(i) && !named_before(ctx, i) && mixing_length < mixing_size)
			mixing_length += (size_t)snprintf(mixing + mixing_length,
			                                  mixing_size - mixing_length, "%s%s",
			                                  mixing_length ? "+" : "", ctx->ran[i]);
	}
}

void print_header(FILE *file, const char *format)
{
	if (strcmp(format, "csv") == 0)
		record_print_header(file);
	if (strcmp(format, "table") == 0)
		fprintf(file, "%-22s %-10s %7s %6s %5s %5s %12s %12s %6s %9s  %s\n", "block",
		        "pass", "T", "B", "L", "W", "latency", "tokens/s", "roof", "rel_err",
		        "status");
	fflush(file);
}

/* A size right-aligned in a column, or blanks. */
static void print_size(FILE *file, int width, int64_t value)
{
	if (value == NO_VALUE)
		fprintf(file, " %*s", width, "");
	else
		fprintf(file, " %*" PRId64, width, value);
}

/* The name of a row: its block, and what else it consists of. */
static void name_of(const struct record *r, char *name, size_t size)
{
	char names[96];

	pattern_names(r->pattern, ',', names, sizeof names);
	const char *more = r->model[0] ? r->model : strcmp(names, r->block) ? names : "";
	const bool usual = !r->data[0] || strcmp(r->data, data_name(DATA_NORMAL)) == 0;
	const int length = snprintf(name, size, "%s%s%s%s%s", r->block, more[0] ? " " : "", more,
	                            usual ? "" : " ", usual ? "" : r->data);

	if (r->kv_heads >= 0 && r->kv_heads != r->n_heads)
		snprintf(name + length, size - (size_t)length, " KV=%" PRId64, r->kv_heads);
}

static void print_ratio_row(FILE *file, const struct record *r)
{
	char name[160], baseline[96];

	name_of(r, name, sizeof name);
	pattern_names(r->baseline, ',', baseline, sizeof baseline);
	fprintf(file, "%-22s %-10s", name, r->pass);
	print_size(file, 7, r->seq_len);
	print_size(file, 6, r->batch);
	print_size(file, 5, r->chunk);
	print_size(file, 5, r->window);
	fprintf(file, "  %.3gx as fast as %s (%.3g to %.3g)  %s%s%s\n", r->ratio, baseline,
	        r->ratio_low, r->ratio_high, r->status, r->requested[0] ? " " : "", r->requested);
}

static void print_table_row(FILE *file, const struct record *r)
{
	char name[160];

	if (r->baseline[0]) {
		print_ratio_row(file, r);
		return;
	}
	name_of(r, name, sizeof name);
	fprintf(file, "%-22s %-10s", name, r->pass);
	print_size(file, 7, r->seq_len);
	print_size(file, 6, r->batch);
	print_size(file, 5, r->chunk);
	print_size(file, 5, r->window);
	if (isnan(r->latency_ms))
		fprintf(file, " %12s %12s %6s", "", "", "");
	else
		fprintf(file, " %9.4g ms %12.4g %5.0f%%", r->latency_ms, r->tokens_per_s,
		        r->roofline_pct);
	if (isnan(r->rel_err))
		fprintf(file, " %9s", "");
	else
		fprintf(file, " %9.1e", r->rel_err);
	const bool ok = strcmp(r->status, status_name(STATUS_OK)) == 0;

	fprintf(file, "  %s%s%s%s%s\n", r->status, r->requested[0] ? " " : "", r->requested,
	        ok || !r->message[0] ? "" : ": ", ok ? "" : r->message);
}

void print_row(FILE *file, const struct record *record, const char *format)
{
	if (strcmp(format, "csv") == 0)
		record_print(file, record);
	if (strcmp(format, "jsonl") == 0)
		json_print_record(file, record);
	if (strcmp(format, "table") == 0)
		print_table_row(file, record);
	fflush(file);
}

/* The least time of a plan, and what blocks need on a GPU. */
static void print_time(FILE *file, const struct bench_case *c, double roofline_ms)
{
	const double ms = roofline_ms / plan_device_share(c->pass);

	if (!isfinite(roofline_ms) || roofline_ms <= 0)
		return;
	fprintf(file, "  least %9.4g ms", roofline_ms);
	if (isfinite(ms))
		fprintf(file, "  about %9.4g ms %9.4g tokens/s", ms, 1e3 * (double)c->tokens / ms);
}

void print_plan(FILE *file, const char *label, const struct bench_case *c,
                const struct planned *plan, size_t memory_free)
{
	if (plan->status != STATUS_OK) {
		fprintf(file, "%-52s %s: %s\n", label, status_name(plan->status), plan->message);
		return;
	}
	fprintf(file, "%-52s memory %10.1f MiB  %10.4g GFLOP  read %9.4g MB  written %9.4g MB",
	        label, (double)plan->memory_bytes / (1 << 20), 1e-9 * plan->flops,
	        1e-6 * plan->bytes_read, 1e-6 * plan->bytes_written);
	print_time(file, c, plan->roofline_ms);
	fprintf(file, "%s\n", plan->memory_bytes > memory_free ? "  oom" : "");
}

void print_list(FILE *file, const struct driver *driver, const struct options *options,
                const struct environment *environment, const struct device *device)
{
	fprintf(file, "program: %s: %s\n", driver->program, driver->summary);
	fprintf(file, "output: %s\n", options->out);
	fprintf(file, "device: %s, %.1f GiB free, %s\n", environment->device.name,
	        (double)environment->device.memory_free / (1 << 30), environment->device.runtime);
	fprintf(file, "passes: %s\n", driver->passes);
	if (driver->patterns)
		fprintf(file, "patterns: %s\n", driver->patterns);
	options_print_presets(file, driver);
	fprintf(file, "preset now: %s\nbackend now: %s\n", options->preset, options->backend);
	for (int i = 0; backends[i]; i++)
		fprintf(file, "backend %s (%s)\n", backends[i]->name,
		        dtype_name(backends[i]->activation));
	fprintf(file, "kernels of %s:\n", device->backend->name);
	for (const struct kernel *k = device->kernels; k->run; k++)
		if (kernel_is_first(device->kernels, k))
			fprintf(file, "  %s=%s\n", operation_name(k->operation), k->provider);
	if (driver->print_help)
		driver->print_help(file);
}
