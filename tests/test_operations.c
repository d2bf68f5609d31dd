/*
 * Every operation of every provider on a device against the fp64 reference, over random shapes,
 * strides, options and numbers of threads, all made from the operation's description; and a few
 * times with a NaN among the inputs, which must not be lost. Nothing but outputs may change, in
 * the tensors and around them. And every form at lengths and numbers of heads where kernels end
 * a tile, a warp or a grid. A baseline that has to be built and is not is left out.
 *
 * test_operations [BACKEND [FACTOR [OPERATION [PROVIDER]]]]: the backend
 * (default: $BACKEND, or cpu); how many times as many cases to run, below 1 for a
 * tool that makes each slow, and then a provider may be left without a case that
 * it supports, and no edge is tried; from 2 on all edges are; only the operations of that name,
 * which may have a * in it; and only that provider.
 */
#include "tests/test.h"

#include <omp.h>

#include "baselines/baselines.h"
#include "kernels/check.h"
#include "kernels/problem.h"

enum { CASES = 100, NAN_CASES = 20, MAX_THREADS = 4, GUARD_BYTES = 4096, POISON = 0xff };

/* One test of the program: an operation on a device. */
struct subject {
	enum operation operation;
	struct device *device;
	double factor;
	const char *provider; /* or NULL: all */
	/* Of the case under way. */
	struct context ctx;
	struct problem problem;
	char label[256];
	struct check_result worst; /* of all cases so far */
};

static void require(const struct subject *s, enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s, %s: %s: %s", operation_name(s->operation), s->label,
		         status_name(status), status_message());
}

/* ---- sizes ---- */

static int64_t any_of(struct dice *dice, const int64_t *choices, int count)
{
	return choices[dice_integer(dice, 0, count - 1)];
}

/* One token, a few, many, or about where tiles end. */
static int64_t any_length(struct dice *dice, int64_t longest)
{
	static const int64_t edges[] = {1, 17, 63, 65, 127, 128, 129, 191, 193, 255, 256, 257};

	switch (dice_integer(dice, 0, 7)) {
	case 0:
		return 1;
	case 1:
		return dice_integer(dice, 1, 9);
	case 2:
	case 3:
		return any_of(dice, edges, COUNT_OF(edges));
	default:
		return dice_integer(dice, 1, longest);
	}
}

static int64_t any_width(struct dice *dice, bool narrow, int64_t widest)
{
	return narrow ? 8 * dice_integer(dice, 1, widest / 8) : dice_integer(dice, 1, widest);
}

static int64_t any_head(struct dice *dice, bool narrow)
{
	static const int64_t any[] = {2, 4, 6, 8, 10, 16, 24, 32, 40, 64, 128};

	if (narrow)
		return dice_bits(dice) & 1 ? 64 : 128;
	return any_of(dice, any, COUNT_OF(any));
}

static int64_t any_divisor(struct dice *dice, int64_t n)
{
	int64_t divisor;

	do
		divisor = dice_integer(dice, 1, n);
	while (n % divisor != 0);
	return divisor;
}

/* Now and then one long sequence of few channels, as kernels cut it. */
static struct sizes any_sizes(struct dice *dice, bool narrow)
{
	static const int64_t states[] = {8, 40, 64, 72, 128, 136, 256},
	                     chunks[] = {16, 32, 64, 128, 256};
	const bool is_long = dice_integer(dice, 0, 19) == 0;
	struct sizes s = {.any = true, .bits = dice_bits(dice)};

	s.batch = is_long ? 1 : dice_integer(dice, 1, 3);
	s.seq_len = is_long ? dice_integer(dice, 500, 4200) : any_length(dice, 200);
	s.n_heads = is_long ? 1 : dice_integer(dice, 1, 4);
	s.groups = any_divisor(dice, s.n_heads);
	s.d_head = is_long ? 64 : any_head(dice, narrow);
	s.d_k = narrow ? any_head(dice, narrow) : any_width(dice, narrow, is_long ? 20 : 70);
	s.d_v = narrow ? any_head(dice, narrow) : any_width(dice, narrow, is_long ? 20 : 140);
	if (narrow && dice_integer(dice, 0, 3) == 0) {
		s.d_k = any_of(dice, states, 7);
		s.d_v = any_of(dice, states, 7);
	}
	s.width = any_width(dice, narrow, is_long ? 40 : 300);
	s.d_in = any_width(dice, narrow, is_long ? 40 : 150);
	s.d_out = any_width(dice, narrow, is_long ? 40 : 150);
	s.rank = narrow ? 8 * dice_integer(dice, 1, 18) : dice_integer(dice, 1, 20);
	s.chunk = dice_integer(dice, 1, dice_bits(dice) & 1 ? 20 : 2 * s.seq_len);
	if (dice_bits(dice) & 1)
		s.chunk = narrow ? any_of(dice, chunks, 5) : s.chunk;
	s.window = dice_integer(dice, 0, dice_bits(dice) & 1 ? 20 : 2 * s.seq_len);
	s.vocab = dice_integer(dice, 2, 300);
	s.kv_heads = any_divisor(dice, s.n_heads);
	return s;
}

/* Sequences, tokens and heads that are an edge of something. The last is more blocks than a grid
 * has in its second dimension, which takes an emulator too long. */
static const struct {
	int64_t batch, seq_len, n_heads;
} edges[] = {{1, 1, 1},   {2, 17, 1},   {1, 63, 2},   {1, 65, 2},
             {1, 704, 1}, {1, 4097, 1}, {257, 2, 256}};

static int count_variants(enum operation operation)
{
	const struct operation_form *variants = operation_forms(operation);
	int count = 0;

	while (variants[count].name)
		count++;
	return count;
}

/* Cases of edges: each of every form. The CPU's kernels have none at thousands of tokens. */
static int count_edges(const struct subject *s)
{
	const bool narrow = s->device->activation == DTYPE_BF16;
	const int variants = count_variants(s->operation);
	const int left_out = (s->factor < 2) + !narrow;

	return s->factor < 1 ? 0 : (COUNT_OF(edges) - left_out) * (variants > 0 ? variants : 1);
}

/* One form after the other. */
static const struct operation_form *variant_of(enum operation operation, uint64_t number)
{
	const int count = count_variants(operation);

	return count == 0 ? NULL : &operation_forms(operation)[number % (uint64_t)count];
}

static struct sizes sizes_of_edge(struct dice *dice, bool narrow, int number)
{
	struct sizes s = any_sizes(dice, narrow);

	s.batch = edges[number].batch;
	s.seq_len = edges[number].seq_len;
	s.n_heads = edges[number].n_heads;
	s.groups = any_divisor(dice, s.n_heads);
	s.kv_heads = any_divisor(dice, s.n_heads);
	s.d_head = 64;
	s.d_k = s.d_v = narrow ? 64 : 16;
	s.width = s.d_in = s.d_out = 64;
	return s;
}

/* ---- a case ---- */

/* Now and then scores as trained models have them. */
static enum data any_data(struct dice *dice)
{
	const int64_t any = dice_integer(dice, 0, 7);

	return any == 0 ? DATA_SINKS : any == 1 ? DATA_PEAKED : DATA_NORMAL;
}

/* `edge`: a case of count_edges(); negative: any sizes. */
static void make_problem(struct subject *s, uint64_t seed, int edge)
{
	struct dice dice = {seed, 1u << 20};
	const bool narrow = s->device->activation == DTYPE_BF16;
	const int variants = count_variants(s->operation);
	const struct sizes sizes =
	        edge < 0 ? any_sizes(&dice, narrow)
	                 : sizes_of_edge(&dice, narrow, edge / (variants > 0 ? variants : 1));
	struct problem_form form = {
	        .variant = variant_of(s->operation, edge < 0 ? seed : (uint64_t)edge),
	        .sizes = sizes,
	        .seed = seed,
	        .data = any_data(&dice),
	        .any = true,
	        .narrow = narrow};
	const struct sizes *z = &form.sizes;

	omp_set_num_threads((int)dice_integer(&dice, 1, MAX_THREADS));
	problem_plan(&s->problem, s->device, s->operation, &form, NULL);
	snprintf(s->label, sizeof s->label,
	         "%s, seed %llu: B %ld, T %ld, H %ld (%ld, %ld), d %ld, %ld x %ld, width %ld, %ld "
	         "to "
	         "%ld, chunk %ld, window %ld %s%s",
	         form.variant ? form.variant->name : "", (unsigned long long)seed, (long)z->batch,
	         (long)z->seq_len, (long)z->n_heads, (long)z->groups, (long)z->kv_heads,
	         (long)z->d_head, (long)z->d_k, (long)z->d_v, (long)z->width, (long)z->d_in,
	         (long)z->d_out, (long)z->chunk, (long)z->window,
	         data_has_directions(form.data) ? data_name(form.data) : "",
	         s->problem.hard ? ", hard" : "");
}

/* Runs with exactly the workspace that is asked for, poisoned and guarded. */
static void run_problem(struct subject *s, const struct kernel *kernel)
{
	const size_t bytes = kernel->workspace ? kernel->workspace(s->device, &s->problem.args) : 0;
	unsigned char guard[GUARD_BYTES];
	void *workspace;

	require(s, device_allocate(s->device, bytes + GUARD_BYTES, &workspace));
	require(s, device_fill(s->device, workspace, POISON, bytes + GUARD_BYTES));
	s->ctx.workspace = workspace;
	s->ctx.workspace_bytes = bytes;
	require(s, kernel_run(&s->ctx, s->operation, &s->problem.args));
	require(s, device_synchronize(s->device));
	require(s, device_download(s->device, guard, (char *)workspace + bytes, GUARD_BYTES));
	device_release(s->device, workspace);
	for (int i = 0; i < GUARD_BYTES; i++)
		if (guard[i] != POISON)
			fail_msg("%s, %s: wrote %d bytes past its workspace of %zu",
			         operation_name(s->operation), s->label, i + 1, bytes);
}

static void expect_right(struct subject *s, const struct check_result *result, const char *how)
{
	if (!(result->share <= 1))
		fail_msg("%s, %s%s: %s is %.3g times as far off as is allowed in %s, its worst row "
		         "by %.3g",
		         operation_name(s->operation), s->label, how, result->name, result->share,
		         result->test, result->rel_err);
	if (result->share > s->worst.share)
		s->worst = *result;
}

/* Whether a check after the run sees the inputs that the run saw. */
static bool keeps_inputs(const struct problem *p)
{
	for (int i = 0; i < p->list.count; i++)
		if (p->list.operand[i].role == ROLE_STATE || p->region[i].alias >= 0)
			return false;
	return true;
}

static void check_case(struct subject *s, const struct kernel *kernel, bool nan)
{
	struct check_options options = {.seed = s->problem.form.seed,
	                                .everything = true,
	                                .in_place = true,
	                                .with_nan = nan,
	                                .kernel = kernel};
	struct check_result result = {0}, of_parts = {0};
	const char *touched;
	struct check *check;

	require(s, problem_poison(&s->problem));
	require(s, problem_guard(&s->problem));
	require(s, check_begin(&check, s->device, s->operation, &s->problem.args, &options));
	run_problem(s, kernel);
	require(s, problem_guarded(&s->problem, &touched));
	if (touched)
		fail_msg("%s, %s: touched memory in or around %s that it must not write",
		         operation_name(s->operation), s->label, touched);
	require(s, check_end(check, &result));
	check_free(check);
	if (nan) {
		if (result.share > 0)
			fail_msg("%s, %s: %s swallows a NaN", operation_name(s->operation),
			         s->label, result.name);
		return;
	}
	expect_right(s, &result, "");
	if (!keeps_inputs(&s->problem))
		return;
	/* The same from parts of the problem, as large ones are checked. */
	options = (struct check_options){
	        .rows = 24, .seed = s->problem.form.seed, .parts = true, .kernel = kernel};
	require(s, check_operation(s->device, s->operation, &s->problem.args, &options, &of_parts));
	expect_right(s, &of_parts, " in parts");
}

/* False if the provider does not support the case. */
static bool run_case(struct subject *s, uint64_t seed, int edge, bool nan)
{
	void *memory;

	make_problem(s, seed, edge);
	const struct kernel *kernel = kernel_select(&s->ctx, s->operation, &s->problem.args);
	if (!kernel)
		return false;
	require(s, device_allocate(s->device, s->problem.bytes + 1, &memory));
	const struct problem_form form = s->problem.form;
	problem_plan(&s->problem, s->device, s->operation, &form, memory);
	kernel = kernel_select(&s->ctx, s->operation, &s->problem.args);
	const enum status status = kernel ? problem_fill(&s->problem, nan) : STATUS_UNSUPPORTED;
	if (status == STATUS_OK)
		check_case(s, kernel, nan);
	else if (status != STATUS_UNSUPPORTED)
		require(s, status);
	problem_free(&s->problem);
	device_release(s->device, memory);
	return status == STATUS_OK;
}

static void test_provider(struct subject *s, const char *provider)
{
	struct provider_choice *choice = &s->ctx.choice;
	const int n_cases = (int)(CASES * s->factor),
	          n_any = n_cases + (int)(NAN_CASES * s->factor), n_all = n_any + count_edges(s);
	int n_run = 0;

	s->ctx.device = s->device;
	choice->count = 1;
	choice->choice[0].operation = s->operation;
	snprintf(choice->choice[0].provider, sizeof choice->choice[0].provider, "%s", provider);
	s->worst = (struct check_result){.name = "", .test = "anything"};
	for (int i = 0; i < n_all; i++)
		n_run += run_case(s, (uint64_t)s->operation << 32 | (uint64_t)i,
		                  i < n_any ? -1 : i - n_any, i >= n_cases && i < n_any);
	print_message("%-26s %-9s %3d of %3d cases supported, %4.2f of the bound in %s of %s\n",
	              operation_name(s->operation), provider, n_run, n_all, s->worst.share,
	              s->worst.test, s->worst.name);
	if (n_run == 0 && strstr(status_message(), "not built"))
		print_message("%s\n", status_message());
	else if (n_run == 0 && s->factor >= 1)
		fail_msg("%s from %s supports none of the cases", operation_name(s->operation),
		         provider);
}

static void test_operation(void **state)
{
	struct subject *s = *state;
	const struct kernel *kernels = s->device->kernels;

	for (const struct kernel *k = kernels; k->run; k++)
		if (k->operation == s->operation && kernel_is_first(kernels, k) &&
		    (!s->provider || strcmp(s->provider, k->provider) == 0))
			test_provider(s, k->provider);
}

int main(int argc, char **argv)
{
	static struct subject subjects[OP_COUNT];
	struct CMUnitTest tests[OP_COUNT];
	const char *name = argc > 1 ? argv[1] : getenv("BACKEND");
	const struct backend *backend = backend_find(name ? name : "cpu");
	struct device *device;

	if (argc > 3)
		cmocka_set_test_filter(argv[3]);
	if (!backend || backend->open("", baseline_kernels, &device) != STATUS_OK) {
		fprintf(stderr, "%s\n",
		        backend ? status_message() : "no such backend in this build");
		return 1;
	}
	for (int i = 0; i < OP_COUNT; i++) {
		subjects[i] = (struct subject){.operation = (enum operation)i,
		                               .device = device,
		                               .factor = argc > 2 ? atof(argv[2]) : 1,
		                               .provider = argc > 4 ? argv[4] : NULL};
		tests[i] = (struct CMUnitTest){operation_name((enum operation)i), test_operation,
		                               NULL, NULL, &subjects[i]};
	}
	const int failed = _cmocka_run_group_tests("operations", tests, OP_COUNT, NULL, NULL);
	device_close(device);
	return failed;
}
