/*
 * Plans for a GPU of the table against those of the CUDA backend, whose handle here is of such a
 * GPU too: nothing is run, and no GPU needed. FLOPs and bytes are the same; memory differs by what
 * kernels' workspaces were estimated at.
 */
#include "kernels/cuda/backend.c"

#include "tests/test.h"

#include "bench/harness/plan_device.h"
#include "layers/stack.h"

/* An H200 that is not here, with our own kernels. */
static struct cuda_state state_of_gpu;
static struct device real;
static struct device *planned;

static int open_devices(void **state)
{
	static const struct kernel *const portable[] = {portable_kernels, NULL};
	struct options options = {.dry_run = true, .plan_for = "h200"};

	state_of_gpu.properties.multiProcessorCount = 132;
	state_of_gpu.properties.sharedMemPerBlockOptin = 227 << 10;
	state_of_gpu.properties.sharedMemPerMultiprocessor = 228 << 10;
	state_of_gpu.properties.major = 9;
	state_of_gpu.is_hopper = true;
	real = (struct device){.backend = &cuda_backend,
	                       .activation = DTYPE_BF16,
	                       .wide = DTYPE_F32,
	                       .state = &state_of_gpu,
	                       .kernels = kernels_joined(hopper_kernels, portable)};
	return real.kernels && plan_device_open(&options, &planned) == STATUS_OK ? 0 : -1;
}

static int close_devices(void **state)
{
	free((struct kernel *)real.kernels);
	device_close(planned);
	return 0;
}

FIXTURE(open_devices, close_devices, NULL)

static enum status plan(struct device *device, const struct stack_options *options,
                        const struct layer_shape *shape, struct memory_plan *memory,
                        struct kernel_plan *work)
{
	static struct stack stack;
	const struct context ctx = {.device = device};

	TRY(stack_configure(&stack, device, options));
	return stack_plan(&stack, &ctx, shape, memory, work);
}

/* `most`: how far the memory may be off, of the real one. Cases that no kernel takes are nobody's.
 */
static void expect_same_plan(const struct stack_options *options, const struct layer_shape *shape,
                             double most)
{
	static struct kernel_plan work, estimated_work;
	struct memory_plan memory, estimated;

	if (plan(&real, options, shape, &memory, &work) == STATUS_UNSUPPORTED)
		return;
	require_ok(plan(&real, options, shape, &memory, &work));
	require_ok(plan(planned, options, shape, &estimated, &estimated_work));
	assert_true(work.total.flops == estimated_work.total.flops);
	assert_true(work.total.bytes_read == estimated_work.total.bytes_read);
	assert_true(work.total.bytes_written == estimated_work.total.bytes_written);
	assert_int_equal(memory.total - memory.workspace, estimated.total - estimated.workspace);
	const double off = fabs((double)estimated.total - (double)memory.total);

	if (off > most * (double)memory.total && off > 16 << 20)
		fail_msg("%s %s B=%lld T=%lld: %zu bytes, not %zu", options->pattern,
		         pass_name(shape->pass), (long long)shape->batch, (long long)shape->seq_len,
		         estimated.total, memory.total);
}

static struct stack_options options_of(const char *pattern, int64_t d_model, int64_t seq_len)
{
	return (struct stack_options){
	        .pattern = pattern,
	        .d_model = d_model,
	        .train_len = seq_len,
	        .n_heads = -1,
	        .kv_heads = -1,
	        .chunk = -1,
	        .window = -1,
	        .groups = -1,
	        .rope = -1,
	        .prenorm = true,
	        .residual = true,
	        .norm_eps = 1e-6f,
	};
}

static const char *const patterns[] = {"rat:64", "rat:256", "rat,swa", "attention,gla"};

static const char *pattern_at(int i)
{
	int n = 0;

	while (layer_classes[n])
		n++;
	if (i < n)
		return layer_classes[i]->name;
	return i < n + (int)COUNT_OF(patterns) ? patterns[i - n] : NULL;
}

TEST(plans_blocks_as_the_gpu_does)
{
	static const int64_t sizes[][3] = {
	        /* D, tokens, T */
	        {2048, 262144, 4096},  {2048, 262144, 262144}, {2048, 262144, 65536},
	        {2048, 8192, 1024},    {4096, 65536, 8192},    {512, 4096, 2048},
	        {1024, 262144, 16384},
	};

	for (int p = 0; pattern_at(p); p++)
		for (size_t i = 0; i < COUNT_OF(sizes); i++) {
			const int64_t t = sizes[i][2], batch = sizes[i][1] / t;
			const struct stack_options options =
			        options_of(pattern_at(p), sizes[i][0], t);
			const struct layer_shape prefill = {PASS_PREFILL, batch, t, 0, 0};
			const struct layer_shape train = {PASS_TRAIN, batch, t, 0, 0};

			expect_same_plan(&options, &prefill, 0.05);
			expect_same_plan(&options, &train, 0.05);
			for (int64_t b = 1; b <= 512; b *= 8) {
				const struct layer_shape step = {PASS_GENERATION, b, 1, t, 0};

				expect_same_plan(&options, &step, 0.05);
			}
		}
}

TEST(plans_models_as_the_gpu_does)
{
	static const int64_t sizes[][2] = {{2048, 24}, {4096, 32}, {5120, 40}};

	for (int p = 0; pattern_at(p); p++)
		for (size_t i = 0; i < COUNT_OF(sizes); i++) {
			struct stack_options options = options_of(pattern_at(p), sizes[i][0], 4096);
			const struct layer_shape shape = {PASS_THROUGHPUT, 64, 3072, 4096, 8};

			options.n_layers = sizes[i][1];
			options.ffn = true;
			options.vocab = 32000;
			expect_same_plan(&options, &shape, 0.002);
		}
}
