/* Quantiles, intervals, rooflines, and the names of result folders. */
#include "tests/test.h"

#include "bench/harness/ceilings.h"
#include "bench/harness/environment.h"
#include "bench/harness/statistics.h"

TEST(summarizes_samples)
{
	const double samples[] = {5, 1, 4, 2, 3, 6};
	struct summary s = summarize(samples, 6);
	double one = 7;

	assert_int_equal(s.count, 6);
	assert_true(s.minimum == 1);
	assert_true(s.p20 == 2);
	assert_true(s.median == 3.5);
	assert_true(s.p80 == 5);
	s = summarize(&one, 1);
	assert_true(s.minimum == 7 && s.p20 == 7 && s.median == 7 && s.p80 == 7);
}

static double normal_noise(void)
{
	double sum = -6;

	for (int i = 0; i < 12; i++)
		sum += (double)rand() / RAND_MAX;
	return sum;
}

/* How often the interval of the median covers the truth. */
static double coverage(double (*draw)(int i), double truth, int count)
{
	double samples[MAX_SAMPLES];
	int covered = 0;
	enum { TRIALS = 2000 };

	srand(1);
	for (int trial = 0; trial < TRIALS; trial++) {
		for (int i = 0; i < count; i++)
			samples[i] = draw(i);
		const struct summary s = summarize(samples, count);

		covered += s.interval.low <= truth && truth <= s.interval.high;
	}
	return (double)covered / TRIALS;
}

static double draw_normal(int i)
{
	return 100 + 5 * normal_noise();
}

/* Most samples on one of two levels of the clock, twelve percent apart. */
static double draw_levels(int i)
{
	return (rand() % 10 < 6 ? 100 : 112) + 0.3 * normal_noise();
}

/* Noise that lasts: each sample has nine tenths of the one before. */
static double draw_drift(int i)
{
	static double at;

	at = i == 0 ? normal_noise() : 0.9 * at + sqrt(1 - 0.81) * normal_noise();
	return 100 + 5 * at;
}

TEST(bounds_the_median)
{
	double few[] = {3, 1, 2}, many[100];

	assert_true(summarize(few, 3).interval.low == 1 && summarize(few, 3).interval.high == 3);
	for (int i = 0; i < 100; i++)
		many[i] = i * 37 % 100;
	/* The binomial ranks of a hundred: the 40th and the 61st. */
	assert_true(summarize(many, 100).interval.low >= 38);
	assert_true(summarize(many, 100).interval.low <= 40);
	assert_true(coverage(draw_normal, 100, 10) > 0.94);
	assert_true(coverage(draw_normal, 100, 100) > 0.94);
	assert_true(coverage(draw_normal, 100, 100) < 0.99);
	assert_true(coverage(draw_levels, 100.29, 200) > 0.9);
	/* Without a thought for what neighbours have in common it would be 0.36. */
	assert_true(coverage(draw_drift, 100, 200) > 0.85);
}

/* Two blocks under one clock, which jumps: what they share cancels out of their ratio. */
TEST(bounds_a_ratio)
{
	double a[60], b[60];
	int covered = 0;

	srand(1);
	for (int trial = 0; trial < 300; trial++) {
		for (int i = 0; i < 60; i++) {
			const double clock = i / 15 % 2 ? 1 : 1.12;

			a[i] = 30 * clock * (1 + 0.01 * normal_noise());
			b[i] = 10 * clock * (1 + 0.01 * normal_noise());
		}
		const struct ratio r = ratio_bootstrap(a, b, 60);

		covered += r.interval.low <= 3 && 3 <= r.interval.high;
		assert_int_equal(r.rounds, 60);
		assert_true(fabs(r.ratio - 3) < 0.03);
		assert_true(relative_half_width(r.interval, r.ratio) < 0.01);
		assert_true(relative_half_width(summarize(a, 60).interval, 30) > 0.04);
	}
	assert_true(covered > 300 * 0.9);
}

TEST(sums_rooflines_of_operations)
{
	const struct ceilings ceilings = {
	        .copy_gb_per_s = 10, .read_gb_per_s = 20, .gemm_tflops = 0.5};
	struct kernel_plan plan = {.n_operations = 3};

	/* 4 ms of FLOPs; 2 ms of reading, writes being under a tenth; 3 times 1 ms of copying. */
	plan.operations[0].cost = (struct cost){2e9, 1e6, 1e6};
	plan.operations[0].count = 1;
	plan.operations[1].cost = (struct cost){1e6, 38e6, 2e6};
	plan.operations[1].count = 1;
	plan.operations[2].cost = (struct cost){0, 5e6, 5e6};
	plan.operations[2].count = 3;
	assert_true(fabs(ceilings_roofline_ms(&ceilings, &plan) - 9) < 1e-12);
}

TEST(names_folders_after_devices)
{
	static const char *const names[][3] = {
	        {"cuda", "NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"},
	        {"cpu", "AMD EPYC", "cpu-amd-epyc"},
	        {"cpu", "Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu-intel-r-xeon-r-cpu-2.20ghz"},
	        {"cpu", "../../etc", "cpu-..-..-etc"},
	};
	char folder[64], small[8];

	for (size_t i = 0; i < COUNT_OF(names); i++) {
		device_folder_name(folder, sizeof folder, names[i][0], names[i][1]);
		assert_string_equal(folder, names[i][2]);
	}
	device_folder_name(small, sizeof small, "cpu", "AMD EPYC");
	assert_string_equal(small, "cpu-amd");
}
