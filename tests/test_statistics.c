/* Quantiles, the stopping rule, rooflines, and the names of result folders. */
#include "tests/test.h"

#include "bench/harness/ceilings.h"
#include "bench/harness/environment.h"
#include "bench/harness/statistics.h"

TEST(summarizes_samples)
{
	double samples[] = {5, 1, 4, 2, 3, 6};
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

/* Samples taken until the rule is content, with normal noise of relative size `noise`, and as
 * much time between them as in them. */
static int samples_taken(const struct stopping_rule *rule, double ms, double noise)
{
	static double samples[MAX_SAMPLES];
	double elapsed = 0;
	int count = 0;

	srand(1);
	do {
		double normal = -6;

		for (int i = 0; i < 12; i++)
			normal += (double)rand() / RAND_MAX;
		samples[count++] = ms * (1 + noise * normal);
		elapsed += 2e-3 * ms;
	} while (!samples_suffice(rule, samples, count, elapsed));
	return count;
}

TEST(stops_when_the_noise_has_settled)
{
	const struct stopping_rule rule = {.min_time = 0, .max_time = 10, .noise = 0.005};
	const struct stopping_rule longer = {.min_time = 0.5, .max_time = 10, .noise = 0.005};
	const struct stopping_rule capped = {.min_time = 0, .max_time = 0.03, .noise = 0.005};
	const struct stopping_rule exact = {.samples = 5, .max_time = 0.001};

	assert_int_equal(samples_taken(&rule, 1, 0), MIN_NOISE_SAMPLES);
	/* The error of the median is 1.25 sigma / sqrt(n): 156 samples for 5%. */
	assert_in_range(samples_taken(&rule, 1, 0.05), 60, 400);
	assert_in_range(samples_taken(&longer, 1, 0), 499, 501);
	assert_int_equal(samples_taken(&capped, 1, 0.5), 15);
	assert_int_equal(samples_taken(&capped, 1000, 0.5), MIN_SAMPLES);
	assert_int_equal(samples_taken(&exact, 1000, 0.5), 5);
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
