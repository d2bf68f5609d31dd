/* Rows of results files as gnuplot reads them: what one picture shows, series by series. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/about.h"
#include "bench/harness/results.h"

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
        "shown. Exit code 3, and nothing printed, where there is nothing to show.\n";

enum { MAX_LABELS = 64, LABEL = 160, NOTHING = 3 };

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
	const char *models[MAX_LABELS];
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
	return result_same_table(r, picture->example) && !isnan(y_of(picture, r)) &&
	       y_of(picture, r) > 0 && (picture->x != X_CHUNK || r->seq_len == picture->seq_len);
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

/* The line a row belongs to: its series, without the chunk if that is the x axis, and what
 * provider was asked for. */
static void label_of(const struct picture *picture, const struct result *r, char label[LABEL])
{
	const char *equals = strrchr(r->requested, '=');
	const char *provider = equals ? equals + 1 : r->requested;

	snprintf(label, LABEL, "%s", r->series);
	if (picture->x == X_CHUNK)
		drop_option(label, 'L');
	if (!picture->windows)
		drop_option(label, 'W');
	size_t length = strlen(label);
	/* The work to be done is the same for all. */
	if (*provider && picture->y != Y_FLOPS && picture->y != Y_BYTES)
		snprintf(label + length, LABEL - length, " [%s]", provider);
}

/* Adds a label once; false if it was there. */
static bool add_label(char labels[MAX_LABELS][LABEL], int *count, const char *label)
{
	for (int i = 0; i < *count; i++)
		if (strcmp(labels[i], label) == 0)
			return false;
	if (*count < MAX_LABELS)
		snprintf(labels[(*count)++], LABEL, "%s", label);
	return true;
}

static int collect_labels(const struct picture *picture, const struct results *results,
                          char labels[MAX_LABELS][LABEL])
{
	int count = 0;

	for (int i = 0; i < results->count; i++) {
		char label[LABEL];

		if (!shown(picture, &results->row[i]))
			continue;
		label_of(picture, &results->row[i], label);
		add_label(labels, &count, label);
	}
	return count;
}

/* The most numerous kind of rows of a pass; NULL if there is none. */
static const struct result *find_example(const struct results *results, enum pass pass)
{
	const struct result *best = NULL;
	int most = 0;

	for (int i = 0; i < results->count; i++) {
		int count = 0;

		if (results->row[i].kind != pass)
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
static int64_t find_seq_len(struct picture *picture, const struct results *results)
{
	int most_chunks = 1, most_labels = 0;
	int64_t best = 0;

	for (int i = 0; i < results->count; i++) {
		char series[MAX_LABELS][LABEL], labels[MAX_LABELS][LABEL];
		int chunks = 0;

		picture->seq_len = results->row[i].seq_len;
		for (int j = 0; j < results->count; j++)
			if (shown(picture, &results->row[j]) && results->row[j].chunk > 0)
				add_label(series, &chunks, results->row[j].series);
		int count = collect_labels(picture, results, labels);
		if (chunks < 2 || chunks < most_chunks ||
		    (chunks == most_chunks && count < most_labels) ||
		    (chunks == most_chunks && count == most_labels && picture->seq_len < best))
			continue;
		most_chunks = chunks;
		most_labels = count;
		best = picture->seq_len;
	}
	return best;
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
static void collect_models(struct picture *picture, const struct results *results)
{
	int64_t widths[MAX_LABELS];

	for (int i = 0; i < results->count; i++) {
		const struct result *r = &results->row[i];
		int at = picture->n_models;

		if (!shown(picture, r) || model_index(picture, r) >= 0 || at == MAX_LABELS)
			continue;
		for (; at > 0 && widths[at - 1] > r->d_model; at--) {
			widths[at] = widths[at - 1];
			picture->models[at] = picture->models[at - 1];
		}
		widths[at] = r->d_model;
		picture->models[at] = r->model;
		picture->n_models++;
	}
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
		printf("%.9g %.9g\n", points[i].x, points[i].y);
	printf("\n\n");
}

static enum status print_series(const struct picture *picture, const struct results *results,
                                const char *prefix, const char *block)
{
	char labels[MAX_LABELS][LABEL];
	int count = collect_labels(picture, results, labels);
	double range[2] = {INFINITY, -INFINITY};
	struct point *points = malloc(2 * ((size_t)results->count + 1) * sizeof *points);

	if (!points)
		return status_set(STATUS_OOM, "no memory for the points");
	for (int i = 0; i < results->count; i++) {
		if (!shown(picture, &results->row[i]))
			continue;
		range[0] = fmin(range[0], x_of(picture, &results->row[i]));
		range[1] = fmax(range[1], x_of(picture, &results->row[i]));
	}
	printf("%slabels = \"", prefix);
	for (int i = 0; i < count; i++)
		print_word(i, labels[i]);
	printf("\"\n%s << EOD\n", block);
	for (int i = 0; i < count; i++)
		print_block(picture, results, labels[i], range, points);
	printf("EOD\n");
	free(points);
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
		for (int j = 0; j < results->count && !known; j++)
			known = shown(picture, &results->row[j]) &&
			        strcmp(results->row[j].series, r.series) == 0 &&
			        (r.n_heads == results->row[j].n_heads ||
			         results->row[j].n_heads < 0 || picture->x == X_MODEL);
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

static enum status print_picture(struct picture *picture, const struct results *results,
                                 struct results *published)
{
	if (picture->x == X_MODEL)
		collect_models(picture, results);
	print_title(picture);
	enum status status = print_series(picture, results, "", "$data");
	adopt(published, picture, results);
	if (status == STATUS_OK)
		status = print_series(picture, published, "published_", "$published");
	return status;
}

int main(int argc, char **argv)
{
	struct results results = {0}, published = {0};
	struct picture picture = {0};
	char labels[MAX_LABELS][LABEL];
	int x = argc > 2 ? find_name(x_names, argv[2]) : -1;
	int y = argc > 3 ? find_name(y_names, argv[3]) : -1;
	enum status status;

	if (about_asked(argc, argv, "plotdata"))
		return 0;
	if (argc < 6 || x < 0 || y < 0) {
		fputs(usage, argc == 2 && strcmp(argv[1], "--help") == 0 ? stdout : stderr);
		return argc == 2 && strcmp(argv[1], "--help") == 0 ? 0 : 2;
	}
	status = results_add(&published, argv[4]);
	for (int i = 5; status == STATUS_OK && i < argc; i++)
		status = results_add(&results, argv[i]);
	picture.x = (enum axis_x)x;
	picture.y = (enum axis_y)y;
	picture.example = find_example(&results, pass_find(argv[1]));
	if (picture.example)
		picture.windows = windows_differ(&picture, &results);
	if (picture.example && picture.x == X_CHUNK)
		picture.seq_len = find_seq_len(&picture, &results);
	bool nothing = !picture.example || collect_labels(&picture, &results, labels) == 0;
	if (status == STATUS_OK && !nothing)
		status = print_picture(&picture, &results, &published);
	if (status != STATUS_OK)
		fprintf(stderr, "plotdata: %s\n", status_message());
	results_release(&results);
	results_release(&published);
	return status != STATUS_OK ? 2 : nothing ? NOTHING : 0;
}
