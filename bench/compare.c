/*
 * Two programs by the rows that their processes wrote, case by case: same, faster, slower or
 * unclear. `make compare` measures such rows; two files that lie about are compared as far as two
 * files can be.
 */
#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/harness/about.h"
#include "bench/harness/sides.h"
#include "bench/harness/streams.h"
#include "bench/harness/verdict.h"

static const char usage[] =
        "usage: compare [OPTIONS] BASE.csv NEW.csv\n"
        "       compare [OPTIONS] --base FILE... --new FILE...\n"
        "\n"
        "Every case of both sides: the ratio new / base of its median latencies (of whole\n"
        "models: of the time per token), an interval that holds the true ratio in 95% of\n"
        "comparisons, and a verdict:\n"
        "\n"
        "  slower   the whole interval lies above 1.01 (--margin)\n"
        "  faster   the whole interval lies below 1 / 1.01\n"
        "  same     the whole interval lies between 1 / 1.03 and 1.03 (--same)\n"
        "  unclear  none of these\n"
        "  failed   a case of the new side failed that had succeeded\n"
        "\n"
        "The unit is the process: each run (run_id) counts as one number per case, its\n"
        "median (--of), because processes differ by more than the samples of one. The first\n"
        "run of either side makes a pair with the first of the other, and so on. From 6 pairs\n"
        "on whose runs took turns the interval is that of the signed-rank test. From fewer,\n"
        "and from runs that did not take turns, it is an assumption: that the runs of one\n"
        "program deviate by 12% (--deviation), or by as much as the samples of one scatter.\n"
        "`make compare BASE=<commit>` measures enough pairs.\n"
        "\n"
        "  --base FILE...         files of the one side, of one run or several each\n"
        "  --new FILE...          files of the other\n"
        "  --allow-different LIST compare although device (or backend), build (processor,\n"
        "                         sanitizers, compiler, threads) or clock (medians more than\n"
        "                         3% apart) differ; a comma separated list\n"
        "  --of median|p20|min    the number of a run [median]; min and p20 are for a CPU that\n"
        "                         others use too: what they take only ever adds to a sample\n"
        "  --cycles               compare clock cycles (latency times clock) where all rows of\n"
        "                         a case have a clock\n"
        "  --allow-unclear        exit code 0 although a verdict is unclear\n"
        "  --margin PERCENT       least change that is called one [1]\n"
        "  --same PERCENT         largest change that is called none [3]\n"
        "  --deviation PERCENT    of the runs of one program, where it is assumed [12]\n"
        "  --width PERCENT        half the interval at which a case needs no more pairs [2]\n"
        "  --wide                 print the block and the pass of cases that need more pairs, a\n"
        "                         line each, and nothing else\n"
        "  --help                 this text\n"
        "\n"
        "Exit code 0: no case became slower, failed or is unclear; 1: one did; 2: the options\n"
        "or files are wrong, the sides cannot be compared or have no case in common.\n";

/* What is said of a case that has no interval, besides the verdicts. */
enum outcome {
	OUTCOME_FAILED = VERDICT_COUNT, /* of the new side, and succeeded before */
	OUTCOME_SAME_RUN,               /* the same rows on both sides */
	OUTCOME_NONE,                   /* nothing to compare; the text says why */
	OUTCOME_COUNT
};

struct comparison {
	struct sides sides;
	struct verdict_rule rule;
	struct allowed allowed;
	size_t statistic; /* where in a row the number of its run is */
	bool cycles, allow_unclear, list_wide;
	bool alternated;
	int tally[OUTCOME_COUNT]; /* by enum verdict or enum outcome */
	int n_timed;              /* with --cycles: cases without a clock */
	int n_both;               /* cases that both sides have rows of */
};

/* A case as it turned out. */
struct finding {
	struct ratio ratio;
	double base, new; /* middle of the runs: milliseconds, cycles or tokens per second */
	int outcome;
	char text[160]; /* beside the outcome; alone where that is OUTCOME_NONE */
};

enum { NAME_SIZE = 384 };

/* Appends to text[size], after a blank unless it is empty. */
static void append_word(char *text, size_t size, const char *format, ...)
        __attribute__((format(printf, 3, 4)));

static void append_word(char *text, size_t size, const char *format, ...)
{
	size_t length = strlen(text);
	va_list list;

	if (length > 0 && length + 1 < size) {
		text[length++] = ' ';
		text[length] = '\0';
	}
	va_start(list, format);
	vsnprintf(text + length, size - length, format, list);
	va_end(list);
}

/* "rat L=16 prefill D=2048 T=4096 B=64" */
static void name_case(const struct result *r, char name[NAME_SIZE])
{
	name[0] = '\0';
	append_word(name, NAME_SIZE, "%s", r->series);
	if (r->model[0])
		append_word(name, NAME_SIZE, "%s", r->model);
	if (r->requested[0])
		append_word(name, NAME_SIZE, "[%s]", r->requested);
	append_word(name, NAME_SIZE, "%s", pass_name(r->kind));
	if (r->d_model >= 0)
		append_word(name, NAME_SIZE, "D=%lld", (long long)r->d_model);
	append_word(name, NAME_SIZE, "T=%lld", (long long)r->seq_len);
	if (!passes[r->kind].models && r->batch >= 0)
		append_word(name, NAME_SIZE, "B=%lld", (long long)r->batch);
}

static bool same_name(const void *self, const struct result *a, const struct result *b)
{
	char one[NAME_SIZE], other[NAME_SIZE];

	name_case(a, one);
	name_case(b, other);
	return strcmp(one, other) == 0;
}

/* Names every case; those that would be called the same are told apart. */
static enum status name_cases(const struct sides *sides, char (*name)[NAME_SIZE])
{
	struct results cases = {.count = sides->n_cases};

	cases.row = malloc(((size_t)cases.count + 1) * sizeof *cases.row);
	if (!cases.row)
		return status_set(STATUS_OOM, "no memory for %d cases", cases.count);
	for (int i = 0; i < cases.count; i++)
		cases.row[i] = *sides->example[i];
	enum status status = results_tell_apart(&cases, same_name, same_name, NULL);

	for (int i = 0; i < cases.count; i++) {
		name_case(&cases.row[i], name[i]);
		const size_t length = strlen(name[i]);

		snprintf(name[i] + length, NAME_SIZE - length, "%s", cases.row[i].detail);
	}
	free(cases.row);
	return status;
}

/* What may be the number of a run. */
static const struct {
	const char *name;
	size_t offset;
} statistics[] = {
        {"median", offsetof(struct result, latency_ms)},
        {"p20", offsetof(struct result, latency_p20_ms)},
        {"min", offsetof(struct result, latency_min_ms)},
};

/* What a process measured of a case, in milliseconds or cycles; NAN: it did not. */
static double value_of(const struct comparison *c, const struct result *r, bool cycles)
{
	if (!r || !result_ok(r))
		return NAN;
	double ms = passes[r->kind].models ? 1e3 / r->tokens_per_s
	                                   : *(const double *)((const char *)r + c->statistic);

	return ms > 0 && isfinite(ms) ? ms * (cycles ? 1e3 * r->sm_clock_mhz : 1) : NAN;
}

/* Which file a row of a side is from. */
static const char *path_of(const struct side *side, const struct result *r)
{
	return side->path[r - side->results.row];
}

static bool same_number(double a, double b)
{
	return a == b || (isnan(a) && isnan(b));
}

/* Whether two rows are one: of a run, or of a file that does not name its runs. */
static bool same_row(const struct sides *sides, const struct result *base, const struct result *new)
{
	return strcmp(base->run_id, new->run_id) == 0 &&
	       strcmp(base->time_utc, new->time_utc) == 0 &&
	       same_number(base->latency_ms, new->latency_ms) &&
	       same_number(base->tokens_per_s, new->tokens_per_s) &&
	       (base->run_id[0] ||
	        strcmp(path_of(&sides->base, base), path_of(&sides->new, new)) == 0);
}

/* How far the samples of a row scatter: their standard deviation if they were normal; 0: unknown.
 */
static double scatter_of(const struct result *r)
{
	return fmax(0, log(r->latency_p80_ms / r->latency_p20_ms) / 1.683);
}

/* How a side fared with a case over all its runs. */
struct record_of_side {
	int rows, ok;
	const struct result *any, *failed; /* NULL: none */
};

static struct record_of_side look_at(const struct side *side, int index)
{
	struct record_of_side record = {0};

	for (int run = 0; run < side->n_runs; run++) {
		const struct result *r = side_cell(side, index, run);

		if (!r)
			continue;
		record.rows++;
		record.any = r;
		record.ok += result_ok(r);
		if (!result_ok(r))
			record.failed = r;
	}
	return record;
}

/* Whether every row of a case that was measured has a clock. */
static bool has_clocks(const struct sides *sides, int index)
{
	const struct side *both[] = {&sides->base, &sides->new};

	for (int i = 0; i < 2; i++)
		for (int run = 0; run < both[i]->n_runs; run++) {
			const struct result *r = side_cell(both[i], index, run);

			if (r && result_ok(r) && !(r->sm_clock_mhz > 0))
				return false;
		}
	return true;
}

static int compare_doubles(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *values, int count)
{
	qsort(values, (size_t)count, sizeof *values, compare_doubles);
	return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

/* Judges a case by its pairs; work[] has room for three numbers a pair. */
static void judge_pairs(struct comparison *c, int index, double *work, struct finding *finding)
{
	const bool cycles = c->cycles && has_clocks(&c->sides, index);
	const int n_pairs = sides_pairs(&c->sides);
	struct verdict_rule rule = c->rule;
	double *logs = work, *base = work + n_pairs, *new = work + 2 * n_pairs;
	int count = 0, n_same = 0;

	for (int run = 0; run < n_pairs; run++) {
		const struct result *before = side_cell(&c->sides.base, index, run);
		const struct result *after = side_cell(&c->sides.new, index, run);

		base[count] = value_of(c, before, cycles);
		new[count] = value_of(c, after, cycles);
		if (isnan(base[count]) || isnan(new[count]))
			continue;
		logs[count] = log(new[count] / base[count]);
		/* Where samples scatter more than runs are assumed to, the machine was busy. */
		rule.deviation = fmax(rule.deviation, fmax(scatter_of(before), scatter_of(after)));
		n_same += same_row(&c->sides, before, after);
		count++;
	}
	if (count == 0)
		return;
	c->n_timed += c->cycles && !cycles;
	finding->ratio = ratio_of_pairs(logs, count, c->alternated, &rule);
	finding->base = median(base, count);
	finding->new = median(new, count);
	finding->outcome = n_same == count ? (int)OUTCOME_SAME_RUN
	                                   : (int)verdict_of(&finding->ratio, &c->rule);
}

static void note_failures(const char *side, const struct record_of_side *record, char *text,
                          size_t size)
{
	if (record->failed)
		append_word(text, size, "%s: %d of %d %s", side, record->rows - record->ok,
		            record->rows, record->failed->status);
}

static struct finding judge(struct comparison *c, int index, double *work)
{
	const struct record_of_side base = look_at(&c->sides.base, index);
	const struct record_of_side new = look_at(&c->sides.new, index);
	struct finding finding = {.ratio = {0, NAN, NAN, NAN, false},
	                          .base = NAN,
	                          .new = NAN,
	                          .outcome = OUTCOME_NONE};
	const size_t size = sizeof finding.text;

	if (!base.any || !new.any) {
		append_word(finding.text, size, "only in %s: %s", base.any ? "base" : "new",
		            (base.any ? base.any : new.any)->status);
		return finding;
	}
	c->n_both++;
	judge_pairs(c, index, work, &finding);
	note_failures("base", &base, finding.text, size);
	note_failures("new", &new, finding.text, size);
	if (!base.failed && new.failed)
		finding.outcome = OUTCOME_FAILED;
	else if (finding.outcome == OUTCOME_NONE && !finding.text[0])
		append_word(finding.text, size, "no pair has both");
	if (base.any->provider[0] && new.any->provider[0] &&
	    strcmp(base.any->provider, new.any->provider) != 0)
		append_word(finding.text, size, "by %.40s, was %.40s", new.any->provider,
		            base.any->provider);
	return finding;
}

static const char *outcome_name(int outcome)
{
	static const char *const names[] = {"failed", "same run", ""};

	return outcome < VERDICT_COUNT ? verdict_name((enum verdict)outcome)
	                               : names[outcome - VERDICT_COUNT];
}

static void print_number(double value, bool whole)
{
	if (isnan(value))
		printf(" %10s", "-");
	else
		printf(whole ? " %10.0f" : " %10.4g", value);
}

static void print_finding(const struct comparison *c, const struct finding *finding, int index)
{
	const bool models = passes[c->sides.example[index]->kind].models;
	const struct ratio *ratio = &finding->ratio;
	char interval[32] = "";

	/* Of whole models people know tokens per second; the ratio is of times all the same. */
	print_number(models ? 1e3 / finding->base : finding->base, models);
	print_number(models ? 1e3 / finding->new : finding->new, models);
	if (ratio->pairs > 0) {
		snprintf(interval, sizeof interval, "%.3f - %.3f", ratio->low, ratio->high);
		printf(" %7.3f  %-15s %5d  ", ratio->value, interval, ratio->pairs);
	} else {
		printf(" %7s  %-15s %5s  ", "-", "", "-");
	}
	printf("%s%s%s\n", outcome_name(finding->outcome),
	       *outcome_name(finding->outcome) && finding->text[0] ? "  " : "", finding->text);
}

/* One side in a line: which commit, how many runs, when and where. */
static void print_side(const struct side *side)
{
	const struct result *first = side->results.count ? &side->results.row[0] : NULL;
	bool several = false;

	if (!first) {
		printf("%-4s  no rows\n", side->name);
		return;
	}
	for (int i = 1; i < side->results.count; i++)
		several = several || strcmp(first->git_sha, side->results.row[i].git_sha) != 0;
	printf("%-4s  %s%.*s%s, %d run%s from %s on, %s%s%s\n", side->name,
	       several ? "several commits, first " : "", first->git_sha[0] ? 12 : 32,
	       first->git_sha[0] ? first->git_sha : "an unknown commit",
	       first->git_dirty > 0 ? " with changes" : "", side->n_runs,
	       side->n_runs == 1 ? "" : "s", first->time_utc[0] ? first->time_utc : "unknown time",
	       first->device, first->driver[0] ? ", driver " : "", first->driver);
}

/* What was left out or assumed. */
static void print_notes(const struct comparison *c, bool assumed)
{
	const struct side *both[] = {&c->sides.base, &c->sides.new};
	const int pairs = sides_pairs(&c->sides);

	for (int i = 0; i < 2; i++) {
		const struct side *side = both[i];

		if (side->n_runs > pairs)
			printf("%s: %d runs without a partner are not used\n", side->name,
			       side->n_runs - pairs);
		if (side->n_repeated)
			printf("%s: of %d cases that a run has twice the last counts\n", side->name,
			       side->n_repeated);
		if (side->n_ratios)
			printf("%s: %d rows of ratios between blocks are not compared\n",
			       side->name, side->n_ratios);
		if (side->n_noisy)
			printf("%s: %d rows are noisy by their own account\n", side->name,
			       side->n_noisy);
	}
	if (c->n_timed)
		printf("%d cases have no clock: their times are compared, not cycles\n",
		       c->n_timed);
	if (!assumed)
		return;
	printf("The intervals are an assumption, that runs of one program deviate by %g%%, or as "
	       "much as samples do: ",
	       100 * c->rule.deviation);
	if (c->alternated)
		printf("of the %d pairs of runs that it takes, %d are here.\n", MIN_PAIRS, pairs);
	else
		printf("the runs did not take turns.\n");
	puts("make compare BASE=<commit> measures enough pairs, taking turns.");
}

static void print_tally(const struct comparison *c)
{
	for (int i = 0; i < OUTCOME_COUNT; i++)
		if (i < OUTCOME_SAME_RUN || c->tally[i] > 0)
			printf("%s%d %s", i ? ", " : "", c->tally[i],
			       i == OUTCOME_NONE ? "not compared" : outcome_name(i));
	putchar('\n');
}

static void print_head(const struct comparison *c, int width)
{
	print_side(&c->sides.base);
	print_side(&c->sides.new);
	printf("%-*s %10s %10s %7s  %-15s %5s  verdict\n", width, "case",
	       c->cycles ? "base cyc" : "base ms", c->cycles ? "new cyc" : "new ms", "new/base",
	       "95% interval", "pairs");
}

/* Judges all cases and prints them. */
static enum status print_all(struct comparison *c, double *work, char (*name)[NAME_SIZE])
{
	int width = 4;
	bool assumed = false;

	TRY(name_cases(&c->sides, name));
	for (int i = 0; i < c->sides.n_cases; i++)
		width = (int)strlen(name[i]) > width ? (int)strlen(name[i]) : width;
	print_head(c, width);
	for (int i = 0; i < c->sides.n_cases; i++) {
		const struct finding finding = judge(c, i, work);

		c->tally[finding.outcome]++;
		assumed = assumed || (finding.outcome < VERDICT_COUNT && finding.ratio.assumed);
		printf("%-*s", width, name[i]);
		print_finding(c, &finding, i);
	}
	print_tally(c);
	print_notes(c, assumed);
	return STATUS_OK;
}

/* Lists the cases that need more pairs: layers, as in "rat-swa", and pass. */
static void print_wide(struct comparison *c, double *work)
{
	for (int i = 0; i < c->sides.n_cases; i++) {
		const struct finding finding = judge(c, i, work);
		const struct result *r = c->sides.example[i];

		if (finding.outcome < VERDICT_COUNT && !ratio_is_narrow(&finding.ratio, &c->rule))
			printf("%.*s %s\n", (int)strcspn(r->series, " "), r->series,
			       pass_name(r->kind));
	}
}

static enum status compare(struct comparison *c)
{
	const size_t n_cases = (size_t)c->sides.n_cases;
	double *work = malloc((3 * (size_t)sides_pairs(&c->sides) + 1) * sizeof *work);
	char(*name)[NAME_SIZE] = calloc(n_cases + 1, sizeof *name);
	enum status status = STATUS_OK;

	c->alternated = sides_alternated(&c->sides);
	if (!work || !name)
		status = status_set(STATUS_OOM, "no memory for %zu cases", n_cases);
	else if (c->list_wide)
		print_wide(c, work);
	else
		status = print_all(c, work, name);
	free(work);
	free(name);
	return status;
}

static enum status parse_percent(const char *name, const char *text, double *fraction)
{
	char *end;

	*fraction = strtod(text, &end) / 100;
	if (end == text || *end || !isfinite(*fraction) || *fraction <= 0)
		return status_set(STATUS_INVALID, "--%s: '%s' is not a number above 0", name, text);
	return STATUS_OK;
}

static enum status parse_allowed(const char *text, struct allowed *allowed)
{
	while (true) {
		const size_t length = strcspn(text, ",");

		if (length == 6 && strncmp(text, "device", length) == 0)
			allowed->device = true;
		else if (length == 5 && strncmp(text, "build", length) == 0)
			allowed->build = true;
		else if (length == 5 && strncmp(text, "clock", length) == 0)
			allowed->clock = true;
		else
			return status_set(STATUS_INVALID,
			                  "--allow-different: '%.*s' is not one of device, build, "
			                  "clock",
			                  (int)length, text);
		if (!text[length])
			return STATUS_OK;
		text += length + 1;
	}
}

static enum status parse_statistic(const char *text, size_t *offset)
{
	for (size_t i = 0; i < sizeof statistics / sizeof *statistics; i++)
		if (strcmp(statistics[i].name, text) == 0) {
			*offset = statistics[i].offset;
			return STATUS_OK;
		}
	return status_set(STATUS_INVALID, "--of: '%s' is not one of median, p20, min", text);
}

enum {
	FILE_NAME = 1,
	BASE = 256,
	NEW,
	ALLOW,
	OF,
	CYCLES,
	UNCLEAR,
	WIDE,
	HELP,
	MARGIN,
	SAME,
	DEVIATION,
	WIDTH
};

static const struct option options[] = {
        {"base", required_argument, NULL, BASE},
        {"new", required_argument, NULL, NEW},
        {"allow-different", required_argument, NULL, ALLOW},
        {"of", required_argument, NULL, OF},
        {"cycles", no_argument, NULL, CYCLES},
        {"allow-unclear", no_argument, NULL, UNCLEAR},
        {"wide", no_argument, NULL, WIDE},
        {"help", no_argument, NULL, HELP},
        {"margin", required_argument, NULL, MARGIN},
        {"same", required_argument, NULL, SAME},
        {"deviation", required_argument, NULL, DEVIATION},
        {"width", required_argument, NULL, WIDTH},
        {0},
};

static enum status set_option(struct comparison *c, int code, const char *value)
{
	switch (code) {
	case ALLOW:
		return parse_allowed(value, &c->allowed);
	case OF:
		return parse_statistic(value, &c->statistic);
	case CYCLES:
		c->cycles = c->allowed.clock = true;
		break;
	case UNCLEAR:
		c->allow_unclear = true;
		break;
	case WIDE:
		c->list_wide = true;
		break;
	case MARGIN:
		return parse_percent("margin", value, &c->rule.margin);
	case SAME:
		return parse_percent("same", value, &c->rule.same);
	case DEVIATION:
		return parse_percent("deviation", value, &c->rule.deviation);
	case WIDTH:
		return parse_percent("width", value, &c->rule.width);
	default:
		break;
	}
	return STATUS_OK;
}

/* The options and, of either side, the files. *help: nothing else is wanted. */
static enum status parse(struct comparison *c, int argc, char **argv, bool *help)
{
	struct side *named = NULL; /* the side that --base or --new began */
	int n_plain = 0, code;

	opterr = 0;
	/* '-': files are handed over in their place among the options. */
	while (!*help && (code = getopt_long(argc, argv, "-:", options, NULL)) != -1) {
		if (code == '?' || code == ':')
			return status_set(STATUS_INVALID, "%s: %s; see --help", argv[optind - 1],
			                  code == ':' ? "needs a value" : "no such option");
		if (code == BASE || code == NEW)
			named = code == BASE ? &c->sides.base : &c->sides.new;
		if (code == BASE || code == NEW || code == FILE_NAME) {
			n_plain += named == NULL;
			TRY(side_add(named          ? named
			             : n_plain == 1 ? &c->sides.base
			                            : &c->sides.new,
			             optarg));
		}
		*help = code == HELP;
		TRY(set_option(c, code, optarg));
	}
	if (!*help && ((n_plain != 0 && n_plain != 2) || c->sides.base.results.n_files == 0 ||
	               c->sides.new.results.n_files == 0))
		return status_set(STATUS_INVALID, "wants two files, or --base FILE... and "
		                                  "--new FILE...; see --help");
	return STATUS_OK;
}

static int exit_code(const struct comparison *c)
{
	if (c->list_wide)
		return 0;
	if (c->n_both == 0) {
		fputs("compare: the two sides have no case in common\n", stderr);
		return 2;
	}
	return c->tally[VERDICT_SLOWER] || c->tally[OUTCOME_FAILED] ||
	       (c->tally[VERDICT_UNCLEAR] && !c->allow_unclear);
}

int main(int argc, char **argv)
{
	struct comparison c = {.rule = usual_rule, .statistic = statistics[0].offset};
	bool help = false;

	streams_open();
	if (about_asked(argc, argv, "compare"))
		return 0;
	c.sides.base.name = "base";
	c.sides.new.name = "new";
	enum status status = parse(&c, argc, argv, &help);

	if (status == STATUS_OK && help) {
		fputs(usage, stdout);
		return stdout_finish() == STATUS_OK ? 0 : 2;
	}
	if (status == STATUS_OK)
		status = sides_check(&c.sides, &c.allowed);
	if (status == STATUS_OK)
		status = sides_match(&c.sides);
	if (status == STATUS_OK)
		status = compare(&c);
	if (status != STATUS_OK)
		fprintf(stderr, "compare: %s\n", status_message());
	int code = status == STATUS_OK ? exit_code(&c) : 2;

	/* A table that could not be written says nothing. */
	if (stdout_finish() != STATUS_OK) {
		fprintf(stderr, "compare: %s\n", status_message());
		code = 2;
	}
	sides_release(&c.sides);
	return code;
}
