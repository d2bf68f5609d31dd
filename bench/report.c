/* Results files as the published tables, ours beside the paper's: Markdown, HTML or for a terminal.
 */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/about.h"
#include "bench/harness/results.h"
#include "bench/harness/streams.h"

static const char usage[] =
        "usage: report [--format markdown|html|terminal] [--published FILE]... RESULTS.csv...\n"
        "\n"
        "Tabulates latencies of blocks against sequence length, throughput of whole\n"
        "models, and how many times faster than attention each is. Published numbers of\n"
        "the same shapes stand in parentheses.\n"
        "\n"
        "  --format     markdown (default), html (headings and tables, to go into a page; "
        "scripts/report.sh\n"
        "               makes one) or terminal\n"
        "  --published  rows to show in parentheses, instead of results/paper/latency.csv\n"
        "               and results/paper/table2.csv of the program's checkout\n";

/* MANY_LINES: as columns they would be too wide to read. */
enum { CELL = 448, MANY_LINES = 16 };

enum format { FORMAT_MARKDOWN, FORMAT_HTML, FORMAT_TERMINAL, N_FORMATS };

static const char *const format_names[N_FORMATS] = {"markdown", "html", "terminal"};

/* A table of a pass: one line per series (and --provider), one point per T or model. */
struct table {
	const struct result *example; /* any of its rows; the others belong with it */
	const struct results *results, *published;
	int n_lines, n_points;
	const struct result **line;  /* an example of each */
	const struct result **point; /* likewise */
};

/* Text to print, [n_rows][n_columns][CELL]; the first row and column are titles. */
struct grid {
	int n_rows, n_columns;
	char (*cell)[CELL];
};

static bool is_throughput(const struct table *table)
{
	return passes[table->example->kind].models;
}

/* Whole models have few lines, and the paper prints them as rows. */
static bool lines_are_rows(const struct table *table)
{
	return is_throughput(table) || table->n_lines > MANY_LINES;
}

/* As relates. Providers of a series are lines apart, but share its details. */
static bool same_series(const void *self, const struct result *a, const struct result *b)
{
	return strcmp(a->series, b->series) == 0 && result_same_table(a, b);
}

static bool same_line(const struct result *a, const struct result *b)
{
	return strcmp(a->series, b->series) == 0 && strcmp(a->requested, b->requested) == 0 &&
	       strcmp(a->detail, b->detail) == 0;
}

static bool same_point(const struct result *a, const struct result *b)
{
	return a->seq_len == b->seq_len && strcmp(a->model, b->model) == 0;
}

/* As relates. */
static bool same_provider_and_point(const void *self, const struct result *a,
                                    const struct result *b)
{
	return strcmp(a->requested, b->requested) == 0 && same_point(a, b);
}

static void add_line(struct table *table, const struct result *result)
{
	for (int i = 0; i < table->n_lines; i++)
		if (same_line(table->line[i], result))
			return;
	table->line[table->n_lines++] = result;
}

/* Points are kept by growing T, then width: models come in the order of their size. */
static void add_point(struct table *table, const struct result *result)
{
	int i = table->n_points;

	for (int j = 0; j < table->n_points; j++)
		if (same_point(table->point[j], result))
			return;
	for (; i > 0; i--) {
		const struct result *before = table->point[i - 1];

		if (before->seq_len < result->seq_len ||
		    (before->seq_len == result->seq_len && before->d_model <= result->d_model))
			break;
		table->point[i] = before;
	}
	table->point[i] = result;
	table->n_points++;
}

static const struct result *find(const struct table *table, const struct result *line,
                                 const struct result *point)
{
	for (int i = 0; i < table->results->count; i++) {
		const struct result *r = &table->results->row[i];

		if (result_same_table(r, table->example) && same_line(r, line) &&
		    same_point(r, point))
			return r;
	}
	return NULL;
}

/* The published row of the same series and shape, or NULL. */
static const struct result *find_published(const struct results *published,
                                           const struct result *ours)
{
	for (int i = 0; ours && !result_is_ratio(ours) && i < published->count; i++) {
		const struct result *r = &published->row[i];
		bool model = passes[r->kind].models;

		if (strcmp(r->series, ours->series) == 0 && r->kind == ours->kind &&
		    strcmp(r->model, ours->model) == 0 && r->d_model == ours->d_model &&
		    r->prompt == ours->prompt && r->generate == ours->generate &&
		    (model || (r->seq_len == ours->seq_len && r->batch == ours->batch &&
		               (r->n_heads == ours->n_heads || ours->n_heads < 0))))
			return r;
	}
	return NULL;
}

/* The measured number; NAN if there is none. */
static double value_of(const struct result *result)
{
	if (!result || !result_ok(result))
		return NAN;
	if (result_is_ratio(result))
		return result->ratio;
	return passes[result->kind].models ? result->tokens_per_s : result->latency_ms;
}

/* Three significant digits; whole tokens per second. */
static void format_value(double value, char *text, size_t size)
{
	int decimals = value >= 99.95 ? 0 : value >= 9.995 ? 1 : value >= 0.9995 ? 2 : 3;

	snprintf(text, size, "%.*f", decimals, value);
}

static void format_result(const struct result *result, char *text, size_t size)
{
	double value = value_of(result);

	if (isnan(value))
		snprintf(text, size, "%s", result ? result->status : "");
	else
		format_value(value, text, size);
}

static void latency_cell(const struct table *table, const struct result *line,
                         const struct result *point, char *text)
{
	const struct result *ours = find(table, line, point);
	const struct result *theirs = find_published(table->published, ours);
	char our_text[CELL / 3], their_text[CELL / 3];

	format_result(ours, our_text, sizeof our_text);
	/* As published: no digit more. */
	if (theirs && result_ok(theirs))
		snprintf(their_text, sizeof their_text, " (%g)", value_of(theirs));
	else
		snprintf(their_text, sizeof their_text, theirs ? " (%s)" : "%s",
		         theirs ? theirs->status : "");
	snprintf(text, CELL, "%s%s", our_text, their_text);
}

/* A ratio with its interval. */
static void ratio_cell(const struct table *table, const struct result *line,
                       const struct result *point, char *text)
{
	const struct result *r = find(table, line, point);

	if (r && result_ok(r) && !isnan(r->ratio))
		snprintf(text, CELL, "%.3f [%.3f, %.3f]", r->ratio, r->ratio_low, r->ratio_high);
	else
		snprintf(text, CELL, "%s", r ? r->status : "");
}

static bool is_attention(const struct result *line)
{
	return strcmp(line->series, "attention") == 0;
}

/* The row of attention at a point to compare a line with: of those with as many heads, if there
 * are any, and of several providers' the fastest. */
static const struct result *find_attention(const struct table *table, const struct result *line,
                                           const struct result *point)
{
	const struct result *best = NULL;

	for (int i = 0; i < table->n_lines; i++) {
		const struct result *r =
		        is_attention(table->line[i]) ? find(table, table->line[i], point) : NULL;
		double value = value_of(r);

		if (isnan(value))
			continue;
		const bool alike = r->n_heads == line->n_heads;
		const bool best_alike = best && best->n_heads == line->n_heads;
		const bool faster = best && (is_throughput(table) ? value > value_of(best)
		                                                  : value < value_of(best));

		if (!best || (alike && !best_alike) || (alike == best_alike && faster))
			best = r;
	}
	return best;
}

static double times_faster(const struct table *table, const struct result *result,
                           const struct result *attention)
{
	double ratio = value_of(attention) / value_of(result);

	return is_throughput(table) ? 1 / ratio : ratio;
}

static void speedup_cell(const struct table *table, const struct result *line,
                         const struct result *point, char *text)
{
	const struct result *ours = find(table, line, point);
	const struct result *attention = find_attention(table, line, point);
	double our_ratio = times_faster(table, ours, attention);
	double their_ratio = times_faster(table, find_published(table->published, ours),
	                                  find_published(table->published, attention));
	char our_text[CELL / 3], their_text[CELL / 3] = "";

	text[0] = '\0';
	if (isnan(our_ratio))
		return;
	if (!isnan(their_ratio))
		snprintf(their_text, sizeof their_text, " (%.*f)", their_ratio < 9.95, their_ratio);
	format_value(our_ratio, our_text, sizeof our_text);
	snprintf(text, CELL, "%s%s", our_text, their_text);
}

static void line_title(const struct result *line, char *text)
{
	char provider[CELL];

	result_provider(line, provider, sizeof provider);
	snprintf(text, CELL, provider[0] ? "%s%s [%s]" : "%s%s", line->series, line->detail,
	         provider);
}

static void point_title(const struct table *table, const struct result *point, char *text)
{
	if (is_throughput(table))
		snprintf(text, CELL, "%s", point->model);
	else
		snprintf(text, CELL, "%lld", (long long)point->seq_len);
}

typedef void fill_cell(const struct table *table, const struct result *line,
                       const struct result *point, char *text);

/* The cell of line number `line` and point number `point`, where 0 are titles. */
static char *cell_at(const struct table *table, const struct grid *grid, int line, int point)
{
	int row = lines_are_rows(table) ? line : point;
	int column = lines_are_rows(table) ? point : line;

	return grid->cell[row * grid->n_columns + column];
}

/* Lines of attention are left out of a comparison with it. */
static enum status make_grid(const struct table *table, fill_cell *fill, bool with_attention,
                             struct grid *grid)
{
	int n_lines = 1, line = 0;

	for (int i = 0; i < table->n_lines; i++)
		n_lines += with_attention || !is_attention(table->line[i]);
	grid->n_rows = lines_are_rows(table) ? n_lines : table->n_points + 1;
	grid->n_columns = lines_are_rows(table) ? table->n_points + 1 : n_lines;
	grid->cell = calloc((size_t)(grid->n_rows * grid->n_columns), sizeof *grid->cell);
	if (!grid->cell)
		return status_set(STATUS_OOM, "no memory for a table");
	snprintf(grid->cell[0], CELL, "%s", is_throughput(table) ? "model" : "T");
	for (int p = 0; p < table->n_points; p++)
		point_title(table, table->point[p], cell_at(table, grid, 0, p + 1));
	for (int i = 0; i < table->n_lines; i++) {
		if (!with_attention && is_attention(table->line[i]))
			continue;
		line_title(table->line[i], cell_at(table, grid, ++line, 0));
		for (int p = 0; p < table->n_points; p++)
			fill(table, table->line[i], table->point[p],
			     cell_at(table, grid, line, p + 1));
	}
	return STATUS_OK;
}

/* printf, of HTML without what would be markup. */
__attribute__((format(printf, 2, 3))) static void print_text(enum format format,
                                                             const char *pattern, ...)
{
	char text[2 * CELL];
	va_list arguments;

	va_start(arguments, pattern);
	vsnprintf(text, sizeof text, pattern, arguments);
	va_end(arguments);
	for (const char *c = text; *c; c++) {
		if (format == FORMAT_HTML && (*c == '<' || *c == '>' || *c == '&'))
			printf("&#%d;", *c);
		else
			putchar(*c);
	}
}

/* The first row and the first column are titles. */
static void print_html(const struct grid *grid)
{
	printf("<div class=\"table\"><table>\n");
	for (int row = 0; row < grid->n_rows; row++) {
		printf("%s<tr>", row == 0 ? "<thead>" : row == 1 ? "<tbody>" : "");
		for (int column = 0; column < grid->n_columns; column++) {
			const char *open = row == 0      ? "<th scope=\"col\">"
			                   : column == 0 ? "<th scope=\"row\">"
			                                 : "<td>";

			printf("%s", open);
			print_text(FORMAT_HTML, "%s", grid->cell[row * grid->n_columns + column]);
			printf("%s", row == 0 || column == 0 ? "</th>" : "</td>");
		}
		printf("</tr>%s\n", row == 0                  ? "</thead>"
		                    : row == grid->n_rows - 1 ? "</tbody>"
		                                              : "");
	}
	printf("</table></div>\n");
}

/* The rows with columns aligned; Markdown's bars and rule, or a terminal's blanks. */
static void print_aligned(const struct grid *grid, enum format format)
{
	const char *bar = format == FORMAT_MARKDOWN ? "| " : "";
	const char *gap = format == FORMAT_MARKDOWN ? " | " : "  ";

	for (int row = 0; row < grid->n_rows; row++) {
		for (int column = 0; column < grid->n_columns; column++) {
			int width = 4;

			for (int i = 0; i < grid->n_rows; i++) {
				int length = (int)strlen(grid->cell[i * grid->n_columns + column]);

				width = length > width ? length : width;
			}
			printf("%s%*s", column ? gap : bar, width,
			       grid->cell[row * grid->n_columns + column]);
		}
		printf("%s\n", format == FORMAT_MARKDOWN ? " |" : "");
		if (row > 0 || format != FORMAT_MARKDOWN)
			continue;
		for (int column = 0; column < grid->n_columns; column++)
			printf("%s---:", column ? " | " : "| ");
		printf(" |\n");
	}
}

static enum status print_table(const struct table *table, fill_cell *fill, bool with_attention,
                               enum format format)
{
	struct grid grid;

	TRY(make_grid(table, fill, with_attention, &grid));
	if (format == FORMAT_HTML)
		print_html(&grid);
	else
		print_aligned(&grid, format);
	free(grid.cell);
	return STATUS_OK;
}

/* Under what conditions, where they are not the usual ones. */
static void print_conditions(const struct result *r, enum format format)
{
	if (strcmp(r->backend, "cpu") == 0 && r->threads > 0)
		print_text(format, ", %lld threads", (long long)r->threads);
	if (r->warm > 0)
		print_text(format, ", warm caches");
	if (r->duty[0])
		print_text(format, ", %s", r->duty);
	if (r->data[0])
		print_text(format, ", %s data", r->data);
}

static void print_title(const struct result *r, const char *what, enum format format)
{
	static const char *const before[N_FORMATS] = {"### ", "<h3>", ""},
	                         *const between[N_FORMATS] = {"\n\n", "</h3>\n<p>", "\n\n"},
	                         *const after[N_FORMATS] = {"\n\n", "</p>\n", "\n\n"};
	const struct pass_info *pass = &passes[r->kind];

	printf("%s", before[format]);
	print_text(format, "%s: %s%s", pass->title, what, r->baseline);
	printf("%s", between[format]);
	print_text(format, "%s, %s", r->device, r->dtype);
	print_conditions(r, format);
	if (pass->models)
		print_text(format, ", %lld tokens generated after %lld.", (long long)r->generate,
		           (long long)r->prompt);
	else
		print_text(format, ", D = %lld, %lld %s.", (long long)r->d_model,
		           (long long)(pass->step ? r->batch : r->batch * r->seq_len),
		           pass->step ? "sequences" : "tokens");
	printf("%s", after[format]);
}

static void blank_line(enum format format)
{
	if (format != FORMAT_HTML)
		printf("\n");
}

/* What was measured, and how many times faster than attention that is. */
static enum status print_measured(const struct table *table, enum format format)
{
	bool has_attention = false, has_others = false;

	print_title(table->example, is_throughput(table) ? "tokens/s" : "ms", format);
	TRY(print_table(table, latency_cell, true, format));
	blank_line(format);
	for (int i = 0; i < table->n_lines; i++) {
		has_attention |= is_attention(table->line[i]);
		has_others |= !is_attention(table->line[i]);
	}
	if (!has_attention || !has_others)
		return STATUS_OK;
	print_title(table->example, "times faster than attention", format);
	TRY(print_table(table, speedup_cell, false, format));
	blank_line(format);
	return STATUS_OK;
}

/* Ratios that were measured as such. */
static enum status print_ratios(const struct table *table, enum format format)
{
	print_title(table->example, "times faster than ", format);
	TRY(print_table(table, ratio_cell, true, format));
	blank_line(format);
	return STATUS_OK;
}

/* The tables of all rows that belong with `example`. */
static enum status report_table(const struct results *results, const struct results *published,
                                const struct result *example, enum format format)
{
	const struct result **room = calloc(2 * (size_t)results->count, sizeof(void *));
	struct table table = {.example = example, .results = results, .published = published};

	if (!room)
		return status_set(STATUS_OOM, "no memory for a table");
	table.line = room;
	table.point = room + results->count;
	for (int i = 0; i < results->count; i++)
		if (result_same_table(&results->row[i], example)) {
			add_line(&table, &results->row[i]);
			add_point(&table, &results->row[i]);
		}
	enum status status = result_is_ratio(example) ? print_ratios(&table, format)
	                                              : print_measured(&table, format);

	free(room);
	return status;
}

/* A line of the list at the end. */
#define print_note(format, ...)                                                                    \
	do {                                                                                       \
		printf("%s", (format) == FORMAT_HTML ? "<li>" : "- ");                             \
		print_text(format, __VA_ARGS__);                                                   \
		printf("%s\n", (format) == FORMAT_HTML ? "</li>" : "");                            \
	} while (0)

/* Where the rows come from, and what to think of them. */
static void print_origin(const struct results *results, enum format format)
{
	int n_throttled = 0;

	for (int i = 0; i < results->count; i++) {
		const struct result *r = &results->row[i];
		bool known = false;

		n_throttled += r->throttled > 0;
		for (int j = 0; j < i && !known; j++)
			known = strcmp(results->row[j].git_sha, r->git_sha) == 0 &&
			        strcmp(results->row[j].device, r->device) == 0;
		if (!known && r->git_sha[0])
			print_note(format, "%s: commit %.12s%s, %.10s, driver %s", r->device,
			           r->git_sha, r->git_dirty > 0 ? " with changes" : "", r->time_utc,
			           r->driver);
	}
	if (n_throttled > 0)
		print_note(format, "%d rows were measured while the clock was throttled.",
		           n_throttled);
}

static bool any_published(const struct results *results, const struct results *published)
{
	for (int i = 0; i < results->count; i++)
		if (find_published(published, &results->row[i]))
			return true;
	return false;
}

static enum status report(struct results *results, const struct results *published,
                          enum format format)
{
	enum status status =
	        results_tell_apart(results, same_series, same_provider_and_point, NULL);

	for (int i = 0; status == STATUS_OK && i < results->count; i++) {
		bool first = true;

		for (int j = 0; j < i && first; j++)
			first = !result_same_table(&results->row[j], &results->row[i]);
		if (first)
			status = report_table(results, published, &results->row[i], format);
	}
	printf("%s", format == FORMAT_HTML ? "<ul>\n" : "");
	if (any_published(results, published))
		print_note(format, "In parentheses, where the shapes are the same: %s.",
		           published->row[0].device);
	print_origin(results, format);
	printf("%s", format == FORMAT_HTML ? "</ul>\n" : "");
	return status;
}

static int fail(const char *argument, const char *message)
{
	fprintf(stderr, "report: %s%s%s\n", argument, *argument ? ": " : "", message);
	return 2;
}

/* The published numbers lie in the checkout that the program was built in. Somewhere else there are
 * none, and the report is without them. */
static enum status add_paper(struct results *published)
{
	static const char *const names[] = {"latency.csv", "table2.csv"};
	char path[4096];

	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
		if (!find_paper(path, sizeof path, names[i])) {
			fputs("report: results/paper/ is not found, so no published numbers; "
			      "--published names a file\n",
			      stderr);
			return STATUS_OK;
		}
		TRY(results_add(published, path));
	}
	return STATUS_OK;
}

/* Reads the command line and all files it names; 0 or the exit code. */
static int read_arguments(int argc, char **argv, enum format *format, struct results *results,
                          struct results *published)
{
	enum status status = STATUS_OK;

	for (int i = 1; status == STATUS_OK && i < argc; i++) {
		const char *value = i + 1 < argc ? argv[i + 1] : "";

		if (strncmp(argv[i], "--", 2) != 0) {
			status = results_add(results, argv[i]);
		} else if (strcmp(argv[i], "--published") == 0) {
			status = results_add(published, value);
			i++;
		} else if (strcmp(argv[i], "--format") == 0) {
			int name = 0;

			while (name < N_FORMATS && strcmp(value, format_names[name]) != 0)
				name++;
			if (name == N_FORMATS)
				return fail(argv[i], "markdown, html and terminal are allowed");
			*format = (enum format)name;
			i++;
		} else {
			return fail(argv[i], "no such option; see --help");
		}
	}
	if (status == STATUS_OK && results->n_files == 0)
		return fail("RESULTS.csv", "none is given; see --help");
	if (status == STATUS_OK && published->n_files == 0)
		status = add_paper(published);
	return status == STATUS_OK ? 0 : fail("", status_message());
}

int main(int argc, char **argv)
{
	struct results results = {0}, published = {0};
	enum format format = FORMAT_MARKDOWN;

	streams_open();
	if (about_asked(argc, argv, "report"))
		return 0;
	const bool help = argc == 2 && strcmp(argv[1], "--help") == 0;
	int code = help ? 0 : read_arguments(argc, argv, &format, &results, &published);
	if (help)
		fputs(usage, stdout);
	else if (code == 0 && report(&results, &published, format) != STATUS_OK)
		code = fail("", status_message());
	if (code == 0 && stdout_finish() != STATUS_OK)
		code = fail("", status_message());
	results_release(&results);
	results_release(&published);
	return code;
}
