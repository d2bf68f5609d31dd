/* Plans for GPUs that are not here. tests/gpu/test_plan.c holds them against the CUDA backend's. */
#include "tests/programs.h"

#include "bench/block.h"
#include "bench/generate.h"
#include "bench/harness/bench.h"
#include "bench/harness/ceilings.h"
#include "bench/harness/plan_device.h"
#include "bench/harness/print.h"
#include "bench/stack_case.h"

static const char *const words[] = {"h200", "h100", "a100", "rtx4090"};

static struct device *opened(const char *word)
{
	struct options options = {.dry_run = true};
	struct device *device;

	snprintf(options.plan_for, sizeof options.plan_for, "%s", word);
	require_ok(plan_device_open(&options, &device));
	assert_string_equal(options.backend, "cuda");
	return device;
}

/* Plans a block of D = 2048. */
static void plan(struct device *device, const char *pattern, const struct layer_shape *shape,
                 struct memory_plan *memory, struct kernel_plan *work)
{
	static struct stack stack;
	const struct context ctx = {.device = device};
	const struct stack_options options = {.pattern = pattern,
	                                      .d_model = 2048,
	                                      .train_len = 4096,
	                                      .n_heads = -1,
	                                      .kv_heads = -1,
	                                      .chunk = -1,
	                                      .window = -1,
	                                      .groups = -1,
	                                      .rope = -1,
	                                      .prenorm = true,
	                                      .residual = true,
	                                      .norm_eps = 1e-6f};

	require_ok(stack_configure(&stack, device, &options));
	require_ok(stack_plan(&stack, &ctx, shape, memory, work));
}

TEST(opens_every_gpu_of_the_option)
{
	double rate = INFINITY;

	for (size_t i = 0; i < COUNT_OF(words); i++) {
		struct device *device = opened(words[i]);
		struct device_info info;
		void *memory;

		require_ok(device_info(device, &info));
		assert_int_equal(device->activation, DTYPE_BF16);
		assert_true(info.memory_free < info.memory_total);
		assert_true(info.memory_free > (size_t)20 << 30);
		/* From the fastest to the slowest. */
		assert_true(device->ceilings.read_gb_per_s < rate);
		rate = device->ceilings.read_gb_per_s;
		assert_true(device->ceilings.copy_gb_per_s < rate);
		assert_true(device->ceilings.gemm_tflops > 100);
		assert_int_equal(device_allocate(device, 1, &memory), STATUS_UNSUPPORTED);
		device_close(device);
	}
}

/* FLOPs and bytes as an H200 had them, and a time at the rates of the table. */
TEST(plans_what_a_gpu_would)
{
	static const struct {
		const char *pattern;
		enum pass pass;
		int64_t seq_len;
		double flops, bytes;
	} cases[] = {
	        {"attention", PASS_PREFILL, 4096, 1.320112e13, 1.936092e10},
	        {"attention", PASS_TRAIN, 262144, 1.011568e15, 4.097208e10},
	        {"attention", PASS_GENERATION, 4096, 3.436498e10, 1.72386e10},
	        {"rat:16", PASS_PREFILL, 4096, 9.62878e12, 1.61764e10},
	        {"rat:16", PASS_TRAIN, 4096, 2.902593e13, 4.160125e10},
	        {"rat:64", PASS_GENERATION, 4096, 1.853568e10, 3.47095e8},
	        {"gla", PASS_GENERATION, 4096, 1.832124e10, 2.212641e9},
	};
	struct device *device = opened("h200");

	for (size_t i = 0; i < COUNT_OF(cases); i++) {
		const int64_t t = cases[i].seq_len;
		const bool step = cases[i].pass == PASS_GENERATION;
		const struct layer_shape shape = {cases[i].pass, step ? 512 : 262144 / t,
		                                  step ? 1 : t, t, 0};
		static struct kernel_plan work;
		struct memory_plan memory;

		plan(device, cases[i].pattern, &shape, &memory, &work);
		const double bytes = work.total.bytes_read + work.total.bytes_written;

		assert_float_equal(work.total.flops / cases[i].flops, 1, 1e-6);
		assert_float_equal(bytes / cases[i].bytes, 1, 1e-6);
		const double ms = ceilings_roofline_ms(&device->ceilings, &work);

		assert_true(ms >= 1e-6 * bytes / device->ceilings.read_gb_per_s);
		assert_true(ms >= 1e-9 * work.total.flops / device->ceilings.gemm_tflops);
		/* A product's workspace, and what the block holds: at least x and y. */
		assert_true(memory.workspace >= 64 << 20);
		assert_true(memory.total > memory.workspace + (step ? 0 : (size_t)2 << 30));
	}
	device_close(device);
}

TEST(every_operation_has_a_plan)
{
	struct device *device = opened("a100");

	for (int op = 0; op < OP_COUNT; op++) {
		bool found = false;

		for (const struct kernel *k = device->kernels; k->run; k++)
			found = found || (int)k->operation == op;
		if (!found)
			fail_msg("%s", operation_name((enum operation)op));
	}
	device_close(device);
}

TEST(estimates_devices_it_knows_by_name)
{
	struct ceilings ceilings = {0};

	plan_device_estimate(&ceilings, "AMD EPYC");
	assert_true(ceilings.gemm_tflops == 0);
	plan_device_estimate(&ceilings, "NVIDIA H200");
	assert_float_equal(ceilings.copy_gb_per_s, 4280, 1e-9);
	assert_float_equal(ceilings.read_gb_per_s, 4600, 1e-9);
	assert_float_equal(ceilings.gemm_tflops, 790, 1e-9);
	/* What was measured stays. */
	ceilings.gemm_tflops = 700;
	plan_device_estimate(&ceilings, "NVIDIA H200");
	assert_true(ceilings.gemm_tflops == 700);
}

static bool wanted(const char *backend, bool dry_run, const char *plan_for, enum status status)
{
	struct options options = {.dry_run = dry_run};

	snprintf(options.backend, sizeof options.backend, "%s", backend);
	snprintf(options.plan_for, sizeof options.plan_for, "%s", plan_for);
	return plan_device_wanted(&options, status);
}

TEST(replaces_only_a_gpu_that_is_not_here)
{
	assert_true(wanted("", true, "h100", STATUS_OK));
	assert_true(wanted("cuda", true, "", STATUS_CUDA));
	assert_int_equal(wanted("cuda", true, "", STATUS_OK), !backend_find("cuda"));
	assert_false(wanted("cuda", false, "", STATUS_CUDA));
	assert_false(wanted("cpu", true, "", STATUS_OK));
	assert_false(wanted("tpu", true, "", STATUS_INVALID));
	/* A mistake in --device is one, unless there is no CUDA in this build. */
	assert_int_equal(wanted("cuda", true, "", STATUS_INVALID), !backend_find("cuda"));
}

/* A line of --dry-run; to be freed. */
static char *line_of(enum pass pass, double roofline_ms, size_t memory)
{
	const struct planned planned = {.memory_bytes = memory,
	                                .flops = 1e12,
	                                .bytes_read = 1e9,
	                                .roofline_ms = roofline_ms};
	struct bench_case c = case_empty();
	char *text = NULL;
	size_t length;
	FILE *file = open_memstream(&text, &length);

	c.pass = pass;
	c.tokens = 8200;
	print_plan(file, "label", &c, &planned, 1 << 30);
	fclose(file);
	return text;
}

TEST(prints_the_time_to_expect)
{
	scoped char *prefill = line_of(PASS_PREFILL, 8.2, 1 << 20);
	scoped char *kernel = line_of(PASS_KERNEL, 8.2, 1 << 20);
	scoped char *unknown = line_of(PASS_PREFILL, INFINITY, (size_t)2 << 30);

	assert_non_null(
	        strstr(prefill, "least       8.2 ms  about        10 ms   8.2e+05 tokens/s"));
	assert_non_null(strstr(kernel, "least       8.2 ms\n"));
	assert_null(strstr(unknown, "least"));
	assert_non_null(strstr(unknown, "  oom\n"));
}

static int rat_main(int argc, char **argv)
{
	static const struct driver driver = {.program = "rat",
	                                     .summary = "for the tests",
	                                     .layers = "rat",
	                                     .defaults = {{"pattern", "rat"}}};

	return block_main(&driver, argc, argv);
}

static int throughput_main(int argc, char **argv)
{
	static const struct driver driver = {
	        .program = "throughput",
	        .summary = "for the tests",
	        .file = "table2.csv",
	        .passes = "throughput",
	        .axes = "pattern,model,layers,vocab,ffn,prompt,generate,memory," ARGUMENT_AXES,
	        .defaults = {{"batch", "0"}, {"pattern", "rat/attention"}},
	        .finds_batch = true,
	};
	static const struct model models[] = {{"1.3B", 24, 2048, 32000}, {"tiny", 4, 256, 4096}};

	return generate_main(&driver, models, 2, argc, argv);
}

static int run(int (*program)(int, char **), const char *line)
{
	char copy[256], *argv[32] = {(char *)"test"};

	snprintf(copy, sizeof copy, "%s", line);
	return program_finish(program_start(program, split_words(copy, argv, 1, 32), argv));
}

TEST(plans_whole_programs)
{
	assert_int_equal(run(rat_main, "--backend cuda --dry-run"), 0);
	assert_int_equal(run(rat_main, "--plan-for rtx4090 --dry-run --pass train"), 0);
	assert_int_equal(run(rat_main, "--plan-for a100 --list"), 0);
	assert_int_equal(run(throughput_main, "--backend cuda --dry-run"), 0);
	assert_int_equal(run(throughput_main, "--plan-for a100 --dry-run --memory 40000"), 0);
	/* Nothing else can be done with what is not here. */
	assert_int_equal(run(rat_main, "--plan-for h200"), 2);
	assert_int_equal(run(rat_main, "--plan-for h200 --breakdown"), 2);
	assert_int_equal(run(rat_main, "--plan-for h200 --dry-run --backend cpu"), 2);
	assert_int_equal(run(rat_main, "--plan-for h20 --dry-run"), 2);
	assert_int_equal(run(rat_main, "--backend tpu --dry-run"), 2);
}
