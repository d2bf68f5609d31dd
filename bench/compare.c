/* Two results files, case by case: which is faster, and whether the samples tell them apart. */
#include <stdio.h>
#include <string.h>

#include "bench/harness/about.h"
#include "bench/harness/results.h"

static const char usage[] =
        "usage: compare OLD.csv NEW.csv\n"
        "\n"
        "Every case of both files: the medians, their ratio, and a verdict. A row keeps the\n"
        "quantiles of its samples, so the verdict is about those: `faster` or `slower` when\n"
        "the middle three fifths of the samples (20th to 80th percentile) lie wholly apart,\n"
        "`overlap` when they do not and nothing can be said. Exit code 1 if a case became\n"
        "slower or failed that had succeeded.\n";

/* Fewer samples have no quantiles to speak of. */
enum { MIN_SAMPLES = 5 };

struct tally {
	int faster, slower, overlap, other;
};

static const struct result *find_case(const struct results *results, const struct result *wanted)
{
	for (int i = 0; i < results->count; i++)
		if (result_same_case(&results->row[i], wanted))
			return &results->row[i];
	return NULL;
}

static void print_case(const struct result *r)
{
	char name[160];

	snprintf(name, sizeof name, "%s%s%s%s%s%s", r->series, r->model[0] ? " " : "", r->model,
	         r->requested[0] ? " [" : "", r->requested, r->requested[0] ? "]" : "");
	printf("%-28s %-10s D=%-5lld T=%-7lld", name, pass_name(r->kind), (long long)r->d_model,
	       (long long)r->seq_len);
}

/* Whole models have one sample, a throughput: a number to look at, not a verdict. */
static void compare_throughput(const struct result *before, const struct result *after,
                               struct tally *tally)
{
	printf("%10.0f %10.0f %7.3f  one sample each (tokens/s)\n", before->tokens_per_s,
	       after->tokens_per_s, after->tokens_per_s / before->tokens_per_s);
	tally->other++;
}

static void compare_latency(const struct result *before, const struct result *after,
                            struct tally *tally)
{
	const char *verdict = "overlap";
	int *count = &tally->overlap;

	if (before->samples < MIN_SAMPLES || after->samples < MIN_SAMPLES) {
		verdict = "too few samples";
		count = &tally->other;
	} else if (after->latency_p80_ms < before->latency_p20_ms) {
		verdict = "faster";
		count = &tally->faster;
	} else if (after->latency_p20_ms > before->latency_p80_ms) {
		verdict = "slower";
		count = &tally->slower;
	}
	++*count;
	printf("%10.4g %10.4g %7.3f  %s\n", before->latency_ms, after->latency_ms,
	       after->latency_ms / before->latency_ms, verdict);
}

/* `after` may be NULL: only the old file has the case. */
static void compare_case(const struct result *before, const struct result *after,
                         struct tally *tally)
{
	print_case(before);
	if (after && result_ok(before) && result_ok(after)) {
		if (passes[before->kind].models)
			compare_throughput(before, after, tally);
		else
			compare_latency(before, after, tally);
		return;
	}
	printf("%10s %10s %7s  %s\n", before->status, after ? after->status : "-", "",
	       !after                                       ? "only in the first file"
	       : strcmp(before->status, after->status) == 0 ? "the same"
	                                                    : "another outcome");
	if (after && result_ok(before))
		tally->slower++;
	else
		tally->other++;
}

static void compare(const struct results *before, const struct results *after, struct tally *tally)
{
	printf("%-56s%10s %10s %7s  %s\n", "", "old ms", "new ms", "new/old", "verdict");
	for (int i = 0; i < before->count; i++)
		compare_case(&before->row[i], find_case(after, &before->row[i]), tally);
	for (int i = 0; i < after->count; i++) {
		if (find_case(before, &after->row[i]))
			continue;
		print_case(&after->row[i]);
		printf("%10s %10s %7s  only in the second file\n", "-", after->row[i].status, "");
		tally->other++;
	}
	printf("%d faster, %d slower, %d overlap, %d without a verdict\n", tally->faster,
	       tally->slower, tally->overlap, tally->other);
	if (before->count > 0 && after->count > 0 &&
	    strcmp(before->row[0].device, after->row[0].device) != 0)
		printf("The devices differ: %s, %s\n", before->row[0].device, after->row[0].device);
}

int main(int argc, char **argv)
{
	struct results before = {0}, after = {0};
	struct tally tally = {0};
	int code = 2;

	if (about_asked(argc, argv, "compare"))
		return 0;
	if (argc == 2 && strcmp(argv[1], "--help") == 0) {
		fputs(usage, stdout);
		return 0;
	}
	if (argc != 3)
		fputs("compare: wants two files; see --help\n", stderr);
	else if (results_add(&before, argv[1]) != STATUS_OK ||
	         results_add(&after, argv[2]) != STATUS_OK)
		fprintf(stderr, "compare: %s\n", status_message());
	else {
		compare(&before, &after, &tally);
		code = tally.slower > 0;
	}
	results_release(&before);
	results_release(&after);
	return code;
}
