#include "bench/harness/plan_device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

/*
 * What a GPU has: memory as CUDA reports it, bandwidth and dense bf16 products (with fp32 sums) as
 * its data sheet promises.
 */
struct gpu {
	const char *word, *name; /* of --plan-for; as the driver calls it */
	double memory_mib, gb_per_s, tflops;
	int n_sm;
	bool hopper; /* runs the sm_90a kernels */
};

static const struct gpu gpus[] = {
        /* NVIDIA H200 Tensor Core GPU data sheet, SXM: 4.8 TB/s, 1,979 TFLOP/s with sparsity. */
        {"h200", "NVIDIA H200", 143156, 4800, 989.4, 132, true},
        /* NVIDIA H100 Tensor Core GPU data sheet, SXM5 80 GB: 3.35 TB/s, the same processor. */
        {"h100", "NVIDIA H100 80GB HBM3", 81009, 3350, 989.4, 132, true},
        /* NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB: 2,039 GB/s, 312 TFLOP/s. */
        {"a100", "NVIDIA A100-SXM4-80GB", 81050, 2039, 312, 108, false},
        /* NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: 1,008 GB/s, 165.2 TFLOP/s. */
        {"rtx4090", "NVIDIA GeForce RTX 4090", 24217, 1008, 165.2, 128, false},
};

enum { N_GPUS = sizeof gpus / sizeof gpus[0] };

/* What an H200 reached of its data sheet, and the others are taken to reach of theirs: copying
 * 4280 GB/s, reading 4600 GB/s, products 790 TFLOP/s. */
static const double copy_share = 4280.0 / 4800, read_share = 4600.0 / 4800,
                    product_share = 790 / 989.4;

/* The context, and the buffer that flushes the cache. */
static const double taken_mib = 512;

/* Medians of roofline_pct in results/h200, over lengths and blocks. */
double plan_device_share(enum pass pass)
{
	static const double shares[PASS_COUNT] = {[PASS_PREFILL] = 0.82,
	                                          [PASS_TRAIN] = 0.76,
	                                          [PASS_GENERATION] = 0.95,
	                                          [PASS_THROUGHPUT] = 0.92};

	return shares[pass] > 0 ? shares[pass] : NAN;
}

static const struct gpu *gpu_of(const struct device *device)
{
	return device->state;
}

static const struct gpu *gpu_find(const char *word)
{
	for (int i = 0; i < N_GPUS; i++)
		if (strcmp(gpus[i].word, word) == 0)
			return &gpus[i];
	return NULL;
}

static struct ceilings ceilings_of(const struct gpu *gpu)
{
	return (struct ceilings){copy_share * gpu->gb_per_s, read_share * gpu->gb_per_s,
	                         product_share * gpu->tflops};
}

void plan_device_estimate(struct ceilings *ceilings, const char *device_name)
{
	for (int i = 0; i < N_GPUS && ceilings->gemm_tflops == 0; i++)
		if (strcmp(gpus[i].name, device_name) == 0)
			*ceilings = ceilings_of(&gpus[i]);
}

/* ---- workspaces, as the kernels for these GPUs ask for them ---- */

static size_t up(int64_t bytes)
{
	return ((size_t)bytes + 255) / 256 * 256;
}

static int64_t divide_up(int64_t a, int64_t b)
{
	return (a + b - 1) / b;
}

/* cuBLASLt's. Up to eight tokens Hopper has kernels that want none. */
static size_t product_workspace(const struct device *device, const void *args)
{
	return 64 << 20;
}

static size_t small_product_workspace(const struct device *device, int64_t n_tokens)
{
	return gpu_of(device)->hopper && n_tokens <= 8 ? 0 : product_workspace(device, NULL);
}

static size_t norm_linear_workspace(const struct device *device, const void *args)
{
	const struct norm_linear_args *a = args;

	return small_product_workspace(device, a->n_tokens);
}

static size_t linear_residual_workspace(const struct device *device, const void *args)
{
	const struct linear_residual_args *a = args;

	return small_product_workspace(device, a->n_tokens);
}

/* dq in fp32, two numbers a row, and the gated gradient. */
static size_t attention_backward_workspace(const struct device *device, const void *args)
{
	const struct attention_args *f = &((const struct attention_backward_args *)args)->forward;
	const int64_t pairs = f->batch * f->n_heads, padded = divide_up(f->seq_len, 128) * 128;
	const size_t gated = f->gate.data ? up(pairs * f->seq_len * f->d_head * 2) : 0;

	if (!gpu_of(device)->hopper || (f->d_head != 64 && f->d_head != 128) ||
	    f->mask == MASK_DILATED)
		return up(pairs * f->seq_len * 4) + gated;
	return 256 + up(f->batch * f->q_heads * padded * f->d_head * 4) +
	       2 * up(pairs * padded * 4) + gated;
}

/* Parts of a step's caches, each with a row of partial sums: eight times as many as there are
 * multiprocessors, or one for each head. */
static size_t decode_workspace(const struct device *device, int64_t heads, int64_t d_head)
{
	const int64_t parts = 8 * (int64_t)gpu_of(device)->n_sm + heads;

	return (size_t)(parts * (d_head + 4)) * sizeof(float);
}

static size_t attention_step_workspace(const struct device *device, const void *args)
{
	const struct attention_step_args *a = args;

	return decode_workspace(device, a->batch * a->n_heads, a->d_head);
}

static size_t rat_step_workspace(const struct device *device, const void *args)
{
	const struct rat_step_args *a = args;

	return decode_workspace(device, a->batch * a->n_heads, a->d_head);
}

static size_t ratplus_step_workspace(const struct device *device, const void *args)
{
	const struct ratplus_step_args *a = args;

	return decode_workspace(device, a->batch * a->n_heads, a->d_head);
}

/* Chunks of more than 16 tokens are walked in stretches, whose ends are kept. */
static size_t rat_scan_backward_workspace(const struct device *device, const void *args)
{
	const struct rat_scan_args *f = &((const struct rat_scan_backward_args *)args)->forward;
	const int64_t chunk = f->chunk < f->seq_len ? f->chunk : f->seq_len;
	const int64_t items = f->batch * divide_up(f->seq_len, f->chunk);
	const int64_t wanted = divide_up(2 * (int64_t)gpu_of(device)->n_sm, f->groups);
	const int64_t blocks = items < wanted ? items : wanted, stretches = divide_up(chunk, 16);
	const int64_t pairs = stretches > 1 ? items * stretches : 0;

	return (size_t)((blocks + 2 * pairs) * f->n_heads * f->d_head) * sizeof(float);
}

/* Links between tiles of a sequence. */
static size_t recurrence_workspace(const struct device *device, const void *args)
{
	const struct recurrence_args *a = args;

	return (size_t)(divide_up(a->seq_len, 128) * a->batch * divide_up(a->d_model, 64) * 64) * 8;
}

static size_t recurrence_backward_workspace(const struct device *device, const void *args)
{
	const struct recurrence_args *f = &((const struct recurrence_backward_args *)args)->forward;
	const int64_t tiles = divide_up(f->seq_len, 128) * f->batch;

	return (size_t)(tiles * divide_up(f->d_model, 64) * 64) * 8 +
	       (size_t)(tiles * f->d_model) * 4 + 16;
}

/* The states before chunks. On Hopper what diagonal decays have made of q and k, unless heads are
 * narrow and enough to be busy without; decays that channels share stay on the chip, but for the
 * ends of segments where heads are few. */
static size_t matrix_recurrence_workspace(const struct device *device, const void *args)
{
	const struct matrix_recurrence_args *a = args;
	const int64_t heads = a->batch * a->n_heads, length = a->chunk ? a->chunk : 64;
	const int64_t records = divide_up(a->seq_len, 64), n_sm = gpu_of(device)->n_sm;
	const int64_t rows = heads * divide_up(a->seq_len, length) * a->d_k;
	const bool busy = 2 * heads > n_sm;

	if (!gpu_of(device)->hopper || a->d_k > 256 || a->d_v > 512)
		return (size_t)(divide_up(rows, 64) * 64) * 4 + (size_t)(rows * a->d_v) * 2;
	if (a->decay != DECAY_DIAGONAL)
		return busy || records < 16 ? 256 : (size_t)(8 * n_sm * (a->d_k * 128 + 1)) * 4;
	if (busy && a->d_k <= 128 && a->d_v <= 128)
		return 0;
	return (size_t)(heads * records * (a->d_k * 260 + 8192));
}

/* Of chunks of 64 tokens the scores, the inverses, what decays make of q and k, the states and
 * their gradients, and what is written. */
static size_t delta_backward_workspace(const struct matrix_recurrence_args *f)
{
	const bool bonus = f->rule == RULE_BONUS;
	const int64_t records = f->batch * f->n_heads * divide_up(f->seq_len, 64);
	const int64_t keys = f->d_k <= 64 ? 64 : 128, values = divide_up(f->d_v, 64) * 64;
	const int64_t floats = 192 + keys + (bonus ? f->d_k : 0);
	const int64_t decayed = f->decay == DECAY_DIAGONAL ? (bonus ? 2 : 3) * 64 * keys : 0;
	const int64_t triangles = (bonus ? 1 : 2) * 64 * 64, written = bonus ? 0 : 64 * values;

	return (size_t)(records * (4 * floats + 2 * (decayed + triangles + written)) +
	                4 * records * keys * values);
}

/* States and their gradients between chunks of 64; where heads are few, the ends of segments of
 * time. */
static size_t matrix_recurrence_backward_workspace(const struct device *device, const void *args)
{
	const struct matrix_recurrence_args *f =
	        &((const struct matrix_recurrence_backward_args *)args)->forward;
	const int64_t panel = f->d_k <= 64 ? 64 : 128, rows = divide_up(f->d_k, panel) * panel;
	const int64_t columns = divide_up(f->d_v, 32) * 32, heads = f->batch * f->n_heads;
	const int64_t chunks = divide_up(f->seq_len, 64), n_sm = gpu_of(device)->n_sm;
	const int64_t blocks = heads * (rows / panel) * divide_up(columns, 128);
	const int64_t wanted = blocks >= n_sm ? 1 : 2 * n_sm / blocks;
	const int64_t shortest = chunks < 2 ? chunks : 2, even = divide_up(chunks, wanted);
	const int64_t segments = divide_up(chunks, even > shortest ? even : shortest);

	if (f->rule != RULE_PLAIN)
		return delta_backward_workspace(f);
	return (size_t)(heads * chunks * rows * columns) * 4 +
	       (segments > 1 ? (size_t)(segments * heads * rows * (columns + 1)) * 4 : 0);
}

static size_t embedding_backward_workspace(const struct device *device, const void *args)
{
	const struct embedding_backward_args *a = args;

	return (size_t)(2 * a->vocab + 1 + 2 * a->n_tokens) * sizeof(uint32_t);
}

/* ---- the device ---- */

static enum status never_run(struct device *device, const void *args, void *workspace)
{
	return status_set(STATUS_UNSUPPORTED, "%s is planned for and not here",
	                  gpu_of(device)->name);
}

#define PLANNED(operation, provider, workspace)                                                    \
	{                                                                                          \
		OP_##operation, provider, NULL, workspace, never_run, false                        \
	}

/* Those whose workspaces count; after them one of every operation. */
static const struct kernel large[] = {
        PLANNED(NORM_LINEAR, "cublaslt", norm_linear_workspace),
        PLANNED(NORM_LINEAR_BACKWARD, "cublaslt", product_workspace),
        PLANNED(LINEAR_RESIDUAL, "cublaslt", linear_residual_workspace),
        PLANNED(LINEAR_RESIDUAL_BACKWARD, "cublaslt", product_workspace),
        PLANNED(DECAY_GATE_BACKWARD, "portable", product_workspace),
        PLANNED(ATTENTION_BACKWARD, "portable", attention_backward_workspace),
        PLANNED(ATTENTION_STEP, "portable", attention_step_workspace),
        PLANNED(RAT_STEP, "portable", rat_step_workspace),
        PLANNED(RATPLUS_STEP, "portable", ratplus_step_workspace),
        PLANNED(RAT_SCAN_BACKWARD, "portable", rat_scan_backward_workspace),
        PLANNED(RECURRENCE, "portable", recurrence_workspace),
        PLANNED(RECURRENCE_BACKWARD, "portable", recurrence_backward_workspace),
        PLANNED(MATRIX_RECURRENCE, "portable", matrix_recurrence_workspace),
        PLANNED(MATRIX_RECURRENCE_BACKWARD, "portable", matrix_recurrence_backward_workspace),
        PLANNED(EMBEDDING_BACKWARD, "portable", embedding_backward_workspace),
        {.run = NULL},
};

#define SMALL(constant, name) PLANNED(constant, "portable", NULL),

static const struct kernel small[] = {OPERATIONS(SMALL){.run = NULL}};

/* Named by --provider and --rival; nothing is known of their workspaces. */
static const struct kernel rivals[] = {
        PLANNED(ATTENTION, "cudnn", NULL),       PLANNED(ATTENTION_BACKWARD, "cudnn", NULL),
        PLANNED(ATTENTION_STEP, "cudnn", NULL),  PLANNED(ATTENTION, "flash3", NULL),
        PLANNED(ATTENTION_STEP, "flash3", NULL), {.run = NULL},
};

static enum status plan_info(struct device *device, struct device_info *info)
{
	const struct gpu *gpu = gpu_of(device);

	*info = (struct device_info){
	        .runtime = "planned",
	        .memory_total = (size_t)(gpu->memory_mib * (1 << 20)),
	        .memory_free = (size_t)((gpu->memory_mib - taken_mib) * (1 << 20)),
	};
	snprintf(info->name, sizeof info->name, "%s", gpu->name);
	return STATUS_OK;
}

static enum status plan_allocate(struct device *device, size_t bytes, void **memory)
{
	*memory = NULL;
	return never_run(device, NULL, NULL);
}

static void plan_close(struct device *device)
{
	free((struct kernel *)device->kernels);
	free(device);
}

/* By the name of the backend that it plans for; what is not here does nothing. */
static const struct backend plan_backend = {
        .name = "cuda",
        .activation = DTYPE_BF16,
        .close = plan_close,
        .info = plan_info,
        .allocate = plan_allocate,
};

bool plan_device_wanted(const struct options *options, enum status opened)
{
	if (options->plan_for[0])
		return true;
	return options->dry_run && strcmp(options->backend, plan_backend.name) == 0 &&
	       (opened == STATUS_CUDA || !backend_find(options->backend));
}

static enum status check_options(const struct options *options)
{
	if (!options->dry_run && !options->list)
		return status_set(STATUS_INVALID,
		                  "--plan-for: %s is planned for, not run on; add --dry-run",
		                  options->plan_for);
	if (options->backend[0] && strcmp(options->backend, plan_backend.name) != 0)
		return status_set(STATUS_INVALID, "--plan-for: %s is of backend cuda, not %s",
		                  options->plan_for, options->backend);
	return STATUS_OK;
}

enum status plan_device_open(struct options *options, struct device **opened)
{
	static const struct kernel *const more[] = {small, rivals, NULL};
	const struct gpu *gpu = gpu_find(options->plan_for[0] ? options->plan_for : gpus[0].word);

	TRY(check_options(options));
	struct device *device = calloc(1, sizeof *device);
	struct kernel *kernels = kernels_joined(large, more);

	if (!device || !kernels) {
		free(device);
		free(kernels);
		return status_set(STATUS_OOM, "no memory for a device");
	}
	*device = (struct device){.backend = &plan_backend,
	                          .activation = plan_backend.activation,
	                          .wide = DTYPE_F32,
	                          .kernels = kernels,
	                          .state = (void *)gpu,
	                          .ceilings = ceilings_of(gpu)};
	snprintf(options->backend, sizeof options->backend, "%s", plan_backend.name);
	*opened = device;
	return STATUS_OK;
}

void plan_device_print(FILE *file, const struct device *device)
{
	const struct ceilings *c = &device->ceilings;

	if (device->backend != &plan_backend)
		return;
	fprintf(file,
	        "planned for %s, which need not be here: %.0f MiB, copying %.0f GB/s, reading %.0f "
	        "GB/s, products %.0f TFLOP/s; workspaces are estimates, and whether a kernel takes "
	        "a case is not asked\n",
	        gpu_of(device)->name, gpu_of(device)->memory_mib, c->copy_gb_per_s,
	        c->read_gb_per_s, c->gemm_tflops);
}
