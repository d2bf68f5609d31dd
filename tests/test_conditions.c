/*
 * Clocks, throttling and noise belong to the variant and to the sample that had them. The
 * management library and the stopwatch are fakes, so what is right is known.
 */
#include "tests/test.h"

#include <dlfcn.h>
#include <unistd.h>

#include "bench/harness/measure.h"
#include "bench/harness/noise.h"
#include "kernels/cuda/nvml.h"

/* A backend whose work takes the time, and runs under the conditions, that a script says. */
static struct {
	int running;                                       /* the variant that was launched last */
	int launches[MAX_VARIANTS];                        /* of each */
	double (*ms)(int variant, int launch);             /* NULL: one millisecond */
	unsigned long long (*reasons)(int variant, int n); /* of NVML; NULL: none */
	struct nvml *nvml;
	struct nvml_reading reading;
	int *nvml_status;
	unsigned long long *nvml_reasons;
	unsigned *nvml_milliwatts;
} fake;

static enum status fake_start(struct device *device)
{
	return STATUS_OK;
}

static enum status fake_stop(struct device *device, double *ms)
{
	const int v = fake.running, n = fake.launches[v]++;

	*ms = fake.ms ? fake.ms(v, n) : 1;
	*fake.nvml_reasons = fake.reasons ? fake.reasons(v, n) : 0;
	*fake.nvml_milliwatts = 300000 + 100000 * (unsigned)v;
	nvml_read(fake.nvml, &fake.reading);
	return STATUS_OK;
}

static void fake_conditions(struct device *device, struct conditions *now)
{
	*now = conditions_unknown();
	now->throttle = fake.reading.throttle;
	now->power_w = fake.reading.power_w;
	now->clock_mhz = fake.running == 0 ? 1410 : 1980;
}

static enum status nothing(struct device *device)
{
	return STATUS_OK;
}

static enum status launch(void *self, struct context *ctx, const struct bench_case *c)
{
	fake.running = (int)c->seq_len;
	return STATUS_OK;
}

static enum status acquire(void *self, struct context *ctx, const struct bench_case *c,
                           uint64_t seed)
{
	return STATUS_OK;
}

static enum status rewind_nothing(void *self, struct context *ctx, const struct bench_case *c,
                                  bool to_verify, double *prefill_ms)
{
	return STATUS_OK;
}

static enum status verify(void *self, struct context *ctx, const struct bench_case *c, int64_t rows,
                          uint64_t seed, struct accuracy *found)
{
	*found = (struct accuracy){0, 0};
	return STATUS_OK;
}

static void release(void *self)
{
}

static const struct subject subject = {
        .acquire = acquire,
        .warm_up = launch,
        .rewind = rewind_nothing,
        .launch = launch,
        .verify = verify,
        .release = release,
};

static struct device *device;
static struct backend fake_backend;
static struct group group;
static struct bench_case cases[3];

/* A group of n cases that take what the script says, the first being the baseline. */
static void measure(int n, const struct measurement_rule *rule)
{
	memset(fake.launches, 0, sizeof fake.launches);
	group = (struct group){.subject = &subject, .n_members = n, .n_variants = n};
	for (int i = 0; i < n; i++) {
		cases[i] = case_empty();
		cases[i].pass = PASS_PREFILL;
		cases[i].seq_len = i;
		group.members[i].c = &cases[i];
		group.variants[i] = (struct variant){
		        .member = i,
		        .ctx = {.device = device},
		        .plan = {.memory_bytes = 1, .flops = 1, .roofline_ms = 0.1}};
	}
	measure_group(&group, rule);
}

static const struct measurement_rule ten = {.samples = 10, .precision = 0.01};

static struct record row_of(int variant)
{
	static char reasons[3][64];
	struct record r = record_empty();

	record_conditions(&group.variants[variant], &r, reasons[variant]);
	return r;
}

static unsigned long long first_is_capped(int variant, int n)
{
	return variant == 0 ? 0x4 : 0x1; /* a software power cap; idle, which is no reason */
}

/* The samples of one alternate with those of the other: each has its own clock and reasons. */
TEST(tells_variants_apart)
{
	fake.reasons = first_is_capped;
	measure(2, &ten);
	struct record first = row_of(0), second = row_of(1);

	assert_int_equal(group.variants[0].n_samples, 10);
	assert_true(first.throttled == 1 && second.throttled == 0);
	assert_string_equal(first.throttle_reasons, "power");
	assert_string_equal(second.throttle_reasons, "");
	assert_true(first.sm_clock_mhz == 1410 && second.sm_clock_mhz == 1980);
	assert_true(first.power_w == 300 && second.power_w == 400);
}

static unsigned long long sometimes_hot(int variant, int n)
{
	return n % 4 == 0 ? 0x40 | 0x80 : 0;
}

TEST(counts_the_share_that_is_throttled)
{
	fake.reasons = sometimes_hot;
	measure(1, &(struct measurement_rule){.samples = 12});
	assert_true(fabs(row_of(0).throttled - 0.25) < 1e-12);
	assert_string_equal(row_of(0).throttle_reasons, "heat+hardware");
}

TEST(knows_what_it_does_not_know)
{
	*fake.nvml_status = 3; /* not supported */
	measure(1, &ten);
	struct record r = row_of(0);

	assert_true(isnan(r.throttled));
	assert_true(isnan(r.power_w));
	assert_string_equal(r.throttle_reasons, "unknown");
	struct nvml_reading reading;
	nvml_read(NULL, &reading);
	assert_true(reading.throttle == THROTTLE_UNKNOWN && isnan(reading.power_w));
}

static double steady(int variant, int n)
{
	return 1 + 0.001 * (n * 7 % 5);
}

static double drifting(int variant, int n)
{
	return 1 + 0.004 * n;
}

static double ragged(int variant, int n)
{
	return 1 + 0.1 * (n * 7 % 5);
}

static double slower_when_hot(int variant, int n)
{
	return n % 4 == 0 ? 1.1 : 1;
}

TEST(says_why_a_row_is_noisy)
{
	const struct measurement_rule rule = {.samples = 40, .precision = 0.02};

	fake.ms = steady;
	measure(1, &rule);
	assert_int_equal(group.variants[0].status, STATUS_OK);
	fake.ms = ragged;
	measure(1, &rule);
	assert_int_equal(group.variants[0].status, STATUS_NOISY);
	assert_non_null(strstr(group.variants[0].message, "the median is known to"));
	fake.ms = drifting;
	measure(1, &rule);
	assert_int_equal(group.variants[0].status, STATUS_NOISY);
	assert_non_null(strstr(group.variants[0].message, "last third"));
	fake.ms = slower_when_hot;
	fake.reasons = sometimes_hot;
	measure(1, &rule);
	assert_int_equal(group.variants[0].status, STATUS_NOISY);
	assert_non_null(strstr(group.variants[0].message, "held down are +10.0%"));
	/* Nobody asked. */
	measure(1, &(struct measurement_rule){.samples = 40});
	assert_int_equal(group.variants[0].status, STATUS_OK);
}

static double second_long(int variant, int n)
{
	return variant == 1 ? 1500 : 20;
}

TEST(takes_the_least_number_whatever_the_time)
{
	const struct measurement_rule rule = {.max_time = 0};

	measure(1, &rule);
	assert_int_equal(group.variants[0].n_samples, SHORT_FLOOR);
	fake.ms = second_long;
	measure(2, &rule);
	/* What takes seconds leaves the rest to themselves. */
	assert_int_equal(group.variants[0].n_samples, SHORT_FLOOR);
	assert_int_equal(group.variants[1].n_samples, LONG_FLOOR);
	group = (struct group){0};
}

static double thousand_apart(int variant, int n)
{
	return variant == 0 ? 0.03 : 30;
}

/* The longest is not launched until the shortest has been sampled for long. */
TEST(waits_for_the_shortest_a_hundred_rounds)
{
	fake.ms = thousand_apart;
	measure(2, &(struct measurement_rule){.min_time = 0.05, .max_time = 60, .precision = 0.01});
	assert_int_equal(group.variants[0].n_samples, MANY_SAMPLES);
	assert_int_equal(group.variants[1].n_samples, MANY_SAMPLES);
}

TEST(goes_on_until_it_is_precise)
{
	const struct measurement_rule coarse = {.max_time = 60, .precision = 0.2};
	const struct measurement_rule fine = {.max_time = 60, .precision = 0.06};

	fake.ms = ragged;
	measure(1, &coarse);
	assert_int_equal(group.variants[0].n_samples, SHORT_FLOOR);
	measure(1, &fine);
	assert_true(group.variants[0].n_samples > 2 * SHORT_FLOOR);
	assert_int_equal(group.variants[0].status, STATUS_OK);
}

/* Every round has every variant once; over many rounds each comes first about as often. */
TEST(alternates_in_random_order)
{
	int first[3] = {0};
	double a[MAX_SAMPLES], b[MAX_SAMPLES];

	measure(3, &(struct measurement_rule){.samples = 301, .seed = 7});
	for (int i = 0; i < 3; i++) {
		const struct variant *v = &group.variants[i];

		assert_int_equal(v->n_samples, 301);
		for (int n = 0; n < 301; n++) {
			assert_int_equal(v->samples[n].round, n);
			first[i] += n > 0 && v->samples[n].position == 0;
		}
	}
	assert_int_equal(first[0] + first[1] + first[2], 300);
	for (int i = 0; i < 3; i++)
		assert_in_range(first[i], 75, 125);
	/* The launch that was verified is no part of a round. */
	assert_int_equal(paired_samples(&group.variants[0], &group.variants[1], a, b), 300);
}

static int set_up(void **state)
{
	char library[512];
	const char *slash;
	ssize_t length = readlink("/proc/self/exe", library, sizeof library - 32);

	if (length < 0)
		return -1;
	library[length] = '\0';
	slash = strrchr(library, '/');
	snprintf(library + (slash - library), 32, "/libfake_nvml.so");
	setenv("NVML_LIBRARY", library, 1);
	void *opened = dlopen(library, RTLD_NOW);
	if (!opened)
		return -1;
	fake.nvml_status = dlsym(opened, "fake_nvml_status");
	fake.nvml_reasons = dlsym(opened, "fake_nvml_reasons");
	fake.nvml_milliwatts = dlsym(opened, "fake_nvml_milliwatts");
	fake.nvml = nvml_open("0000:00:00.0");
	require_ok(cpu_backend.open(NULL, NULL, &device));
	fake_backend = cpu_backend;
	fake_backend.stopwatch_start = fake_start;
	fake_backend.stopwatch_stop = fake_stop;
	fake_backend.conditions = fake_conditions;
	fake_backend.flush_cache = nothing;
	device->backend = &fake_backend;
	return fake.nvml ? 0 : -1;
}

static int each(void **state)
{
	fake.ms = NULL;
	fake.reasons = NULL;
	*fake.nvml_status = 0;
	return 0;
}

static int tear_down(void **state)
{
	nvml_close(fake.nvml);
	device->backend = &cpu_backend;
	device_close(device);
	return 0;
}

FIXTURE(set_up, tear_down, each)
