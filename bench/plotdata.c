/* Rows of results files as gnuplot reads them: what one picture shows, series by series. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/about.h"
#include "bench/harness/results.h"
#include "bench/harness/streams.h"

static const char usage[] =
        "usage: plotdata PASS X Y PUBLISHED.csv RESULTS.csv...\n"
        "\n"
        "Prints gnuplot definitions for one picture of a pass: title, labels (a list of\n"
        "quoted words) and a datablock $data with a block of `x y` lines per label; the\n"
        "same as published_labels and $published for published rows of the same shape.\n"
        "\n"
        "  PASS  prefill, train, generation or throughput\n"
        "  X     seq_len, chunk (at the T that has most chunk lengths) or model\n"
        "  Y     latency_ms, flops, bytes or tokens_per_s\n"
        "\n"
        "Of rows that differ in width, tokens or device only the most numerous kind is\n"
        "shown; how many are not is said on standard error. Labels tell apart what would\n"
        "share a point. Exit code 3, and nothing printed, where there is nothing to show.\n";

enum { LABEL = 512, NOTHING = 3 };

enum axis_x { X_SEQ_LEN, X_CHUNK, X_MODEL };
enum axis_y { Y_LATENCY, Y_FLOPS, Y_BYTES, Y_TOKENS };

static const char *const x_names[] = {"seq_len", "chunk", "model", NULL};
static const char *const y_names[] = {"latency_ms", "flops", "bytes", "tokens_per_s", NULL};

/* What is to be shown. */
struct picture {
	enum axis_x x;
	enum axis_y y;
	const struct result *example; /* rows that belong with it are shown */
	int64_t seq_len;              /* of X_CHUNK */
	bool windows;                 /* they differ, so that labels must tell */
	int n_models;                 /* of X_MODEL: the names, 1, 2, ... on the axis */
	const char **models;          /* with room for all rows */
};

/* A list without repetitions, with room for all rows. */
struct labels {
	int count;
	char (*label)[LABEL];
};

/* Text inside a gnuplot string, where quotes and backquotes (a command!) have a meaning. */
static void print_safely(const char *text)
{
	for (; *text; text++)
		putchar(strchr("\"'`\\\n\r", *text) ? ' ' : *text);
}

/* Number i of a list of quoted words. */
static void print_word(int i, const char *word)
{
	printf(i ? " '" : "'");
	print_safely(word);
	printf("'");
}

static int find_name(const char *const *names, const char *name)
{
	for (int i = 0; names[i]; i++)
		if (strcmp(names[i], name) == 0)
			return i;
	return -1;
}

/* The number to draw; NAN: none. Work is known even of a case that could not run. */
static double y_of(const struct picture *picture, const struct result *r)
{
	if (picture->y == Y_FLOPS || picture->y == Y_BYTES)
		return picture->y == Y_FLOPS ? r->flops : r->bytes;
	if (!result_ok(r))
		return NAN;
	return picture->y == Y_LATENCY ? r->latency_ms : r->tokens_per_s;
}

static int model_index(const struct picture *picture, const struct result *r)
{
	for (int i = 0; i < picture->n_models; i++)
		if (strcmp(picture->models[i], r->model) == 0)
			return i;
	return -1;
}

/* Where on the x axis; NAN where chunks do not matter to the series. */
static double x_of(const struct picture *picture, const struct result *r)
{
	if (picture->x == X_SEQ_LEN)
		return (double)r->seq_len;
	if (picture->x == X_MODEL)
		return 1 + model_index(picture, r);
	return r->chunk > 0 ? (double)r->chunk : NAN;
}

static bool shown(const struct picture *picture, const struct result *r)
{
	return !result_is_ratio(r) && result_same_table(r, picture->example) &&
	       !isnan(y_of(picture, r)) && y_of(picture, r) > 0 &&
	       (picture->x != X_CHUNK || r->seq_len == picture->seq_len);
}

/* Removes " X=1" from a label, where X is `option`. */
static void drop_option(char label[LABEL], char option)
{
	const char text[] = {' ', option, '=', '\0'};
	char *found = strstr(label, text);

	if (!found)
		return;
	char *rest = found + 1 + strcspn(found + 1, " ");
	memmove(found, rest, strlen(rest) + 1);
}

/* The series as the picture has it: without the chunk if that is the x axis. */
static void name_of(const struct picture *picture, const struct result *r, char label[LABEL])
{
	snprintf(label, LABEL, "%s", r->series);
	if (picture->x == X_CHUNK)
		drop_option(label, 'L');
	if (!picture->windows)
		drop_option(label, 'W');
}

/* Whether it is the same work whatever provider does it. */
static bool is_work(const struct picture *picture)
{
	return picture->y == Y_FLOPS || picture->y == Y_BYTES;
}

/* The line a row belongs to: its name, what tells it apart, and what provider was asked for. */
static void label_of(const struct picture *picture, const struct result *r, char label[LABEL])
{
	char provider[LABEL];

	result_provider(r, provider, sizeof provider);
	name_of(picture, r, label);
	size_t length = strlen(label);
	snprintf(label + length, LABEL - length, "%s", r->detail);
	length = strlen(label);
	if (*provider && !is_work(picture))
		snprintf(label + length, LABEL - length, " [%s]", provider);
}

/* As relates: what is drawn with one name. */
static bool same_name(const void *self, const struct result *a, const struct result *b)
{
	const struct picture *picture = self;
	char of_a[LABEL], of_b[LABEL];

	name_of(picture, a, of_a);
	name_of(picture, b, of_b);
	return shown(picture, a) && shown(picture, b) && strcmp(of_a, of_b) == 0;
}

/* As relates: drawn at one x, not by providers that their labels tell apart. */
static bool same_place(const void *self, const struct result *a, const struct result *b)
{
	const struct picture *picture = self;
	const double x = x_of(picture, a);

	if (x != x_of(picture, b) && !(isnan(x) && isnan(x_of(picture, b))))
		return false;
	return is_work(picture) ? y_of(picture, a) != y_of(picture, b)
	                        : strcmp(a->requested, b->requested) == 0;
}

/* Adds a label once. */
static void add_label(struct labels *labels, const char *label)
{
	for (int i = 0; i < labels->count; i++)
		if (strcmp(labels->label[i], label) == 0)
			return;
	snprintf(labels->label[labels->count++], LABEL, "%s", label);
}

static enum status make_labels(struct labels *labels, const struct results *results)
{
	labels->count = 0;
	labels->label = calloc((size_t)results->count + 1, sizeof *labels->label);
	return labels->label ? STATUS_OK : status_set(STATUS_OOM, "no memory for the labels");
}

static void collect_labels(const struct picture *picture, const struct results *results,
                           struct labels *labels)
{
	labels->count = 0;
	for (int i = 0; i < results->count; i++) {
		char label[LABEL];

		if (!shown(picture, &results->row[i]))
			continue;
		label_of(picture, &results->row[i], label);
		add_label(labels, label);
	}
}

/* The most numerous kind of rows of a pass; NULL if there is none. */
static const struct result *find_example(const struct results *results, enum pass pass)
{
	const struct result *best = NULL;
	int most = 0;

	for (int i = 0; i < results->count; i++) {
		int count = 0;

		if (results->row[i].kind != pass || result_is_ratio(&results->row[i]))
			continue;
		for (int j = 0; j < results->count; j++)
			count += result_same_table(&results->row[i], &results->row[j]);
		if (count > most) {
			most = count;
			best = &results->row[i];
		}
	}
	return best;
}

/* The T with most chunk lengths, of equals that with most series, then the longest; 0 if no T has
 * two chunk lengths. */
static enum status find_seq_len(struct picture *picture, const struct results *results,
                                int64_t *found)
{
	struct labels chunks, lines = {0};
	int most_chunks = 1, most_lines = 0;
	enum status status = make_labels(&chunks, results);

	*found = 0;
	if (status == STATUS_OK)
		status = make_labels(&lines, results);
	for (int i = 0; status == STATUS_OK && i < results->count; i++) {
		picture->seq_len = results->row[i].seq_len;
		chunks.count = 0;
		for (int j = 0; j < results->count; j++)
			if (shown(picture, &results->row[j]) && results->row[j].chunk > 0)
				add_label(&chunks, results->row[j].series);
		collect_labels(picture, results, &lines);
		if (chunks.count < 2 || chunks.count < most_chunks ||
		    (chunks.count == most_chunks && lines.count < most_lines) ||
		    (chunks.count == most_chunks && lines.count == most_lines &&
		     picture->seq_len < *found))
			continue;
		most_chunks = chunks.count;
		most_lines = lines.count;
		*found = picture->seq_len;
	}
	free(chunks.label);
	free(lines.label);
	return status;
}

/* Whether windows differ among the series: their names then have two different " W=". */
static bool windows_differ(const struct picture *picture, const struct results *results)
{
	const char *first = NULL;

	for (int i = 0; i < results->count; i++) {
		const char *window = strstr(results->row[i].series, " W=");
		size_t length = window ? 1 + strcspn(window + 1, " ") : 0;

		if (!window || !result_same_table(&results->row[i], picture->example))
			continue;
		if (first && strncmp(first, window, length) != 0)
			return true;
		first = first ? first : window;
	}
	return false;
}

/* Models by growing width. */
static enum status collect_models(struct picture *picture, const struct results *results)
{
	int64_t *widths = calloc((size_t)results->count + 1, sizeof *widths);

	picture->models = calloc((size_t)results->count + 1, sizeof *picture->models);
	for (int i = 0; widths && picture->models && i < results->count; i++) {
		const struct result *r = &results->row[i];
		int at = picture->n_models;

		if (!shown(picture, r) || model_index(picture, r) >= 0)
			continue;
		for (; at > 0 && widths[at - 1] > r->d_model; at--) {
			widths[at] = widths[at - 1];
			picture->models[at] = picture->models[at - 1];
		}
		widths[at] = r->d_model;
		picture->models[at] = r->model;
		picture->n_models++;
	}
	const bool done = widths && picture->models;
	free(widths);
	return done ? STATUS_OK : status_set(STATUS_OOM, "no memory for the models");
}

struct point {
	double x, y;
};

static int compare_points(const void *left, const void *right)
{
	const struct point *a = left, *b = right;

	return (a->x > b->x) - (a->x < b->x);
}

/* One block: the points of a label by growing x. A level line where the axis does not matter. */
static void print_block(const struct picture *picture, const struct results *results,
                        const char *label, const double range[2], struct point *points)
{
	int count = 0;

	for (int i = 0; i < results->count; i++) {
		const struct result *r = &results->row[i];
		char own[LABEL];

		if (!shown(picture, r))
			continue;
		label_of(picture, r, own);
		if (strcmp(own, label) != 0)
			continue;
		double x = x_of(picture, r), y = y_of(picture, r);
		points[count++] = (struct point){isnan(x) ? range[0] : x, y};
		if (isnan(x))
			points[count++] = (struct point){range[1], y};
	}
	qsort(points, (size_t)count, sizeof *points, compare_points);
	for (int i = 0; i < count; i++)
		if (i == 0 || points[i].x != points[i - 1].x || points[i].y != points[i - 1].y)
			printf("%.9g %.9g\n", points[i].x, points[i].y);
	printf("\n\n");
}

static enum status print_series(const struct picture *picture, const struct results *results,
                                const char *prefix, const char *block)
{
	double range[2] = {INFINITY, -INFINITY};
	struct labels labels;

	TRY(make_labels(&labels, results));
	struct point *points = malloc(2 * ((size_t)results->count + 1) * sizeof *points);
	if (!points) {
		free(labels.label);
		return status_set(STATUS_OOM, "no memory for the points");
	}
	collect_labels(picture, results, &labels);
	for (int i = 0; i < results->count; i++) {
		if (!shown(picture, &results->row[i]))
			continue;
		range[0] = fmin(range[0], x_of(picture, &results->row[i]));
		range[1] = fmax(range[1], x_of(picture, &results->row[i]));
	}
	printf("%slabels = \"", prefix);
	for (int i = 0; i < labels.count; i++)
		print_word(i, labels.label[i]);
	printf("\"\n%s << EOD\n", block);
	for (int i = 0; i < labels.count; i++)
		print_block(picture, results, labels.label[i], range, points);
	printf("EOD\n");
	free(points);
	free(labels.label);
	return STATUS_OK;
}

/* Rows of another source that have our device's shapes, made to belong with ours. */
static void adopt(struct results *published, const struct picture *picture,
                  const struct results *results)
{
	const struct result *ours = picture->example;
	int count = 0;

	for (int i = 0; i < published->count; i++) {
		struct result r = published->row[i];
		bool known = false;

		r.device = ours->device;
		r.dtype = ours->dtype;
		r.warm = ours->warm;
		r.threads = ours->threads;
		r.duty = ours->duty;
		r.data = ours->data;
		for (int j = 0; j < results->count && !known; j++) {
			const struct result *like = &results->row[j];

			known = shown(picture, like) && strcmp(like->series, r.series) == 0 &&
			        (r.n_heads == like->n_heads || like->n_heads < 0 ||
			         picture->x == X_MODEL);
			if (known)
				snprintf(r.detail, sizeof r.detail, "%s", like->detail);
		}
		if (known && shown(picture, &r) &&
		    (picture->x != X_MODEL || model_index(picture, &r) >= 0))
			published->row[count++] = r;
	}
	published->count = count;
}

static void print_title(const struct picture *picture)
{
	const struct result *r = picture->example;
	bool generation = passes[r->kind].step;

	printf("device = \"");
	print_safely(r->device);
	printf(", ");
	print_safely(r->dtype);
	printf("\"\n");
	if (picture->x == X_MODEL) {
		printf("shape = \"%lld tokens after a prompt of %lld\"\nmodels = \"",
		       (long long)r->generate, (long long)r->prompt);
		for (int i = 0; i < picture->n_models; i++)
			print_word(i, picture->models[i]);
		printf("\"\n");
		return;
	}
	printf("shape = \"D = %lld, %lld %s", (long long)r->d_model,
	       (long long)(generation ? r->batch : r->batch * r->seq_len),
	       generation ? "sequences" : "tokens");
	if (picture->x == X_CHUNK)
		printf(", T = %lld", (long long)picture->seq_len);
	printf("\"\n");
}

/* Rows of the pass that belong into other pictures are not lost in silence. */
static void say_what_is_missing(const struct picture *picture, const struct results *results)
{
	int n_missing = 0;

	for (int i = 0; i < results->count; i++) {
		const struct result *r = &results->row[i];

		n_missing += r->kind == picture->example->kind && !result_is_ratio(r) &&
		             result_ok(r) && !result_same_table(r, picture->example);
	}
	if (n_missing > 0)
		fprintf(stderr,
		        "plotdata: %s: %d rows of other shapes or conditions are not shown\n",
		        passes[picture->example->kind].title, n_missing);
}

static enum status print_picture(struct picture *picture, const struct results *results,
                                 struct results *published)
{
	print_title(picture);
	TRY(print_series(picture, results, "", "$data"));
	adopt(published, picture, results);
	TRY(print_series(picture, published, "published_", "$published"));
	say_what_is_missing(picture, results);
	return STATUS_OK;
}

/* Chooses the rows to show and names them. */
static enum status choose_rows(struct picture *picture, struct results *results, enum pass pass)
{
	picture->example = find_example(results, pass);
	if (!picture->example)
		return STATUS_OK;
	picture->windows = windows_differ(picture, results);
	if (picture->x == X_MODEL)
		TRY(collect_models(picture, results));
	if (picture->x == X_CHUNK) {
		int64_t found;

		TRY(find_seq_len(picture, results, &found));
		picture->seq_len = found;
	}
	return results_tell_apart(results, same_name, same_place, picture);
}

static bool any_shown(const struct picture *picture, const struct results *results)
{
	for (int i = 0; picture->example && i < results->count; i++)
		if (shown(picture, &results->row[i]))
			return true;
	return false;
}

/* What the command line asks for. *nothing: the files have nothing of the kind. */
static enum status plot(char **argv, int argc, struct picture *picture, struct results *results,
                        struct results *published, bool *nothing)
{
	TRY(results_add(published, argv[4]));
	for (int i = 5; i < argc; i++)
		TRY(results_add(results, argv[i]));
	TRY(choose_rows(picture, results, pass_find(argv[1])));
	*nothing = !any_shown(picture, results);
	if (!*nothing)
		TRY(print_picture(picture, results, published));
	return stdout_finish();
}

int main(int argc, char **argv)
{
	struct results results = {0}, published = {0};
	const int x = argc > 2 ? find_name(x_names, argv[2]) : -1;
	const int y = argc > 3 ? find_name(y_names, argv[3]) : -1;
	const bool help = argc == 2 && strcmp(argv[1], "--help") == 0;
	bool nothing = false;

	streams_open();
	if (about_asked(argc, argv, "plotdata"))
		return 0;
	if (argc < 6 || x < 0 || y < 0) {
		fputs(usage, help ? stdout : stderr);
		return help && stdout_finish() == STATUS_OK ? 0 : 2;
	}
	struct picture picture = {.x = (enum axis_x)x, .y = (enum axis_y)y};
	const enum status status = plot(argv, argc, &picture, &results, &published, &nothing);
	if (status != STATUS_OK)
		fprintf(stderr, "plotdata: %s\n", status_message());
	free(picture.models);
	results_release(&results);
	results_release(&published);
	return status != STATUS_OK ? 2 : nothing ? NOTHING : 0;
}
