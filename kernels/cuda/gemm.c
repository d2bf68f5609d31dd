#define _GNU_SOURCE
#include "kernels/cuda/gemm.h"

#include <cublasLt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"

/*
 * Tuning runs each candidate on at most this many FLOPs of rows: a longer
 * product of the same columns repeats the same waves of tiles.
 */
#define TUNING_FLOPS 4e11

enum { MAX_CANDIDATES = 16, TUNING_SAMPLES = 5 };

/* What distinguishes one tuned product from another. */
struct shape {
	int64_t rows, columns, inner, a_leading, b_leading, out_leading, batch, a_stride, b_stride,
	        out_stride;
	int a_transposed, b_transposed, out_type, has_addend;
	uint32_t a_alignment, b_alignment, out_alignment, addend_alignment; /* bytes */
};

struct tuned {
	struct shape shape;
	cublasLtMatmulAlgo_t algorithm;
};

/* What a device keeps. */
struct blas {
	struct device *device;
	cublasLtHandle_t handle;
	bool missing; /* it does not start on this device */
	cudaEvent_t start, stop;
	struct tuned *tuned;
	int n_tuned;
};

/* cuBLASLt's description of a product; column-major, so a and b change places. */
struct description {
	cublasLtMatmulDesc_t operation;
	cublasLtMatrixLayout_t left, right, out;
};

#define BLAS_TRY(call)                                                                             \
	do {                                                                                       \
		cublasStatus_t blas_try_ = call;                                                   \
		if (blas_try_ != CUBLAS_STATUS_SUCCESS)                                            \
			return status_set(STATUS_CUDA, "cuda: %s at %s:%d: %s", #call, __FILE__,   \
			                  __LINE__, cublasLtGetStatusString(blas_try_));           \
	} while (0)

/* The largest power of two up to 256 that divides the address. */
static uint32_t alignment_of(const void *memory)
{
	const uintptr_t bits = (uintptr_t)memory | 256u;

	return (uint32_t)(bits & -bits);
}

static struct shape shape_of(const struct gemm *g)
{
	struct shape shape;

	memset(&shape, 0, sizeof shape);
	shape.rows = g->rows;
	shape.columns = g->columns;
	shape.inner = g->inner;
	shape.a_leading = g->a_leading;
	shape.b_leading = g->b_leading;
	shape.out_leading = g->out_leading;
	shape.batch = g->batch;
	shape.a_stride = g->a_stride;
	shape.b_stride = g->b_stride;
	shape.out_stride = g->out_stride;
	shape.a_transposed = g->a_transposed;
	shape.b_transposed = g->b_transposed;
	shape.out_type = g->out_type;
	shape.has_addend = g->addend != NULL;
	shape.a_alignment = alignment_of(g->a);
	shape.b_alignment = alignment_of(g->b);
	shape.out_alignment = alignment_of(g->out);
	shape.addend_alignment = alignment_of(g->addend ? g->addend : g->out);
	return shape;
}

static enum status layout_create(cublasLtMatrixLayout_t *layout, cudaDataType type, int64_t rows,
                                 int64_t columns, int64_t leading, int64_t batch, int64_t stride)
{
	const int32_t count = (int32_t)batch;

	BLAS_TRY(cublasLtMatrixLayoutCreate(layout, type, (uint64_t)rows, (uint64_t)columns,
	                                    leading));
	if (batch == 1)
		return STATUS_OK;
	BLAS_TRY(cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
	                                          &count, sizeof count));
	BLAS_TRY(cublasLtMatrixLayoutSetAttribute(
	        *layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
	return STATUS_OK;
}

/* A row-major matrix is the column-major transpose of itself: rows and columns are swapped. */
static enum status describe_layouts(const struct gemm *g, struct description *d)
{
	const cudaDataType out_type = g->out_type == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
	enum status status = layout_create(
	        &d->left, CUDA_R_16BF, g->b_transposed ? g->inner : g->columns,
	        g->b_transposed ? g->columns : g->inner, g->b_leading, g->batch, g->b_stride);

	if (status == STATUS_OK)
		status = layout_create(&d->right, CUDA_R_16BF, g->a_transposed ? g->rows : g->inner,
		                       g->a_transposed ? g->inner : g->rows, g->a_leading, g->batch,
		                       g->a_stride);
	if (status == STATUS_OK)
		status = layout_create(&d->out, out_type, g->columns, g->rows, g->out_leading,
		                       g->batch, g->out_stride);
	return status;
}

static enum status describe(const struct gemm *g, struct description *d)
{
	const cublasOperation_t left = g->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
	const cublasOperation_t right = g->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;

	BLAS_TRY(cublasLtMatmulDescCreate(&d->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
	BLAS_TRY(cublasLtMatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_TRANSA, &left,
	                                        sizeof left));
	BLAS_TRY(cublasLtMatmulDescSetAttribute(d->operation, CUBLASLT_MATMUL_DESC_TRANSB, &right,
	                                        sizeof right));
	return describe_layouts(g, d);
}

static void description_destroy(struct description *d)
{
	if (d->operation)
		cublasLtMatmulDescDestroy(d->operation);
	if (d->left)
		cublasLtMatrixLayoutDestroy(d->left);
	if (d->right)
		cublasLtMatrixLayoutDestroy(d->right);
	if (d->out)
		cublasLtMatrixLayoutDestroy(d->out);
}

static enum status multiply(const struct blas *blas, const struct gemm *g,
                            const struct description *d, const cublasLtMatmulAlgo_t *algorithm,
                            void *workspace)
{
	const float beta = g->addend ? 1.0f : 0.0f;

	BLAS_TRY(cublasLtMatmul(blas->handle, d->operation, &g->scale, g->b, d->left, g->a,
	                        d->right, &beta, g->addend ? g->addend : g->out, d->out, g->out,
	                        d->out, algorithm, workspace, GEMM_WORKSPACE,
	                        cuda_stream(blas->device)));
	return STATUS_OK;
}

/*
 * cuBLASLt 13.0 suggests splitting a sum of an odd number of terms in two, and then loses one
 * (algorithm 66, split-K 2: 3329 terms). Sums that do not divide evenly are not split.
 */
static uint32_t allowed_reductions(const struct shape *shape)
{
	return shape->inner % 16 ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_MASK;
}

static enum status prefer(cublasLtMatmulPreference_t preference, const struct shape *shape)
{
	const size_t workspace = GEMM_WORKSPACE;
	const struct {
		cublasLtMatmulPreferenceAttributes_t attribute;
		uint32_t value;
	} preferences[] = {
	        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, shape->b_alignment},
	        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, shape->a_alignment},
	        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, shape->addend_alignment},
	        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, shape->out_alignment},
	        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, allowed_reductions(shape)},
	};

	BLAS_TRY(cublasLtMatmulPreferenceSetAttribute(preference,
	                                              CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
	                                              &workspace, sizeof workspace));
	for (size_t i = 0; i < sizeof preferences / sizeof preferences[0]; i++)
		BLAS_TRY(cublasLtMatmulPreferenceSetAttribute(preference, preferences[i].attribute,
		                                              &preferences[i].value,
		                                              sizeof preferences[i].value));
	return STATUS_OK;
}

static enum status suggest(const struct blas *blas, const struct shape *shape,
                           const struct description *d, cublasLtMatmulHeuristicResult_t *candidates,
                           int *count)
{
	cublasLtMatmulPreference_t preference;
	cublasStatus_t error = CUBLAS_STATUS_SUCCESS;

	BLAS_TRY(cublasLtMatmulPreferenceCreate(&preference));
	enum status status = prefer(preference, shape);
	if (status == STATUS_OK)
		error = cublasLtMatmulAlgoGetHeuristic(blas->handle, d->operation, d->left,
		                                       d->right, d->out, d->out, preference,
		                                       MAX_CANDIDATES, candidates, count);
	cublasLtMatmulPreferenceDestroy(preference);
	if (status == STATUS_OK && (error != CUBLAS_STATUS_SUCCESS || *count == 0))
		return status_set(STATUS_UNSUPPORTED, "cuBLASLt has no algorithm: %s",
		                  cublasLtGetStatusString(error));
	return status;
}

/* Milliseconds of one cold run, or a negative number if the algorithm cannot do it. */
static float time_once(const struct blas *blas, const struct gemm *g, const struct description *d,
                       const cublasLtMatmulAlgo_t *algorithm, void *workspace)
{
	float milliseconds = -1.0f;

	if (device_flush_cache(blas->device) != STATUS_OK ||
	    cudaEventRecord(blas->start, cuda_stream(blas->device)) != cudaSuccess ||
	    multiply(blas, g, d, algorithm, workspace) != STATUS_OK ||
	    cudaEventRecord(blas->stop, cuda_stream(blas->device)) != cudaSuccess ||
	    cudaEventSynchronize(blas->stop) != cudaSuccess ||
	    cudaEventElapsedTime(&milliseconds, blas->start, blas->stop) != cudaSuccess) {
		cudaGetLastError();
		return -1.0f;
	}
	return milliseconds;
}

/* The candidate with the shortest best time; the first, as suggested, if none could be timed. */
static int fastest(const struct blas *blas, const struct gemm *g, const struct description *d,
                   const cublasLtMatmulHeuristicResult_t *candidates, int count, void *workspace)
{
	float best = 0.0f;
	int choice = 0;
	bool found = false;

	for (int i = 0; i < count; i++) {
		float time = time_once(blas, g, d, &candidates[i].algo, workspace);

		for (int sample = 0; sample < TUNING_SAMPLES && time >= 0.0f; sample++) {
			const float again = time_once(blas, g, d, &candidates[i].algo, workspace);
			if (sample == 0 || again < time)
				time = again;
		}
		if (time >= 0.0f && (!found || time < best)) {
			best = time;
			choice = i;
			found = true;
		}
	}
	return choice;
}

/* The same product with few enough rows to be timed quickly; where a is transposed the tokens are
 * the inner dimension, of which enough remain that whoever splits it shows what that costs. */
static struct gemm tuning_sized(const struct gemm *g)
{
	struct gemm small = *g;
	const double flops_per_row = 2.0 * (double)g->columns * (double)g->inner * (double)g->batch;
	const double flops_per_inner =
	        2.0 * (double)g->columns * (double)g->rows * (double)g->batch;
	const int64_t inner = (int64_t)(2 * TUNING_FLOPS / flops_per_inner) / 1024 * 1024;
	const int64_t most = (int64_t)(TUNING_FLOPS / flops_per_row) / 1024 * 1024;

	if (most >= 1024 && small.rows > most && !g->a_transposed)
		small.rows = most;
	if (inner >= 1024 && small.inner > inner && g->a_transposed)
		small.inner = inner;
	return small;
}

/* Bytes from the first element of a batch of stored matrices to the last. */
static size_t extent(int64_t rows, int64_t columns, int64_t leading, int64_t batch, int64_t stride,
                     size_t element)
{
	return (size_t)((batch - 1) * stride + (rows - 1) * leading + columns) * element;
}

/* Gives *g random matrices of its own; *memory is to be freed. */
static enum status substitute_random(const struct blas *blas, struct gemm *g, void **memory)
{
	const size_t a =
	        extent(g->a_transposed ? g->inner : g->rows, g->a_transposed ? g->rows : g->inner,
	               g->a_leading, g->batch, g->a_stride, 2);
	const size_t b = extent(g->b_transposed ? g->columns : g->inner,
	                        g->b_transposed ? g->inner : g->columns, g->b_leading, g->batch,
	                        g->b_stride, 2);
	const size_t out = extent(g->rows, g->columns, g->out_leading, g->batch, g->out_stride,
	                          dtype_size(g->out_type));
	const size_t a_end = (a + 255) / 256 * 256, b_end = a_end + (b + 255) / 256 * 256;

	CUDA_TRY(cudaMalloc(memory, b_end + out));
	g->a = *memory;
	g->b = (char *)*memory + a_end;
	g->out = (char *)*memory + b_end;
	g->addend = g->addend ? g->out : NULL;
	CUDA_TRY(submit_random(blas->device, *memory, b_end / 2, 1));
	CUDA_TRY(cudaMemsetAsync(g->out, 0, out, cuda_stream(blas->device)));
	return STATUS_OK;
}

/* Index of the best candidate for g; 0, cuBLASLt's own choice, if there is no memory to find out.
 */
static int tune(const struct blas *blas, const struct gemm *g,
                const cublasLtMatmulHeuristicResult_t *candidates, int count, void *workspace)
{
	struct gemm trial = tuning_sized(g);
	struct description description = {0};
	void *memory = NULL;
	int choice = 0;

	if (count > 1 && substitute_random(blas, &trial, &memory) == STATUS_OK &&
	    describe(&trial, &description) == STATUS_OK)
		choice = fastest(blas, &trial, &description, candidates, count, workspace);
	description_destroy(&description);
	cudaFree(memory);
	return choice;
}

static enum status find_algorithm(struct blas *blas, const struct gemm *g,
                                  const struct description *d, void *workspace,
                                  cublasLtMatmulAlgo_t *algorithm)
{
	const struct shape shape = shape_of(g);
	cublasLtMatmulHeuristicResult_t candidates[MAX_CANDIDATES];
	int count = 0;

	for (int i = 0; i < blas->n_tuned; i++) {
		if (memcmp(&blas->tuned[i].shape, &shape, sizeof shape) == 0) {
			*algorithm = blas->tuned[i].algorithm;
			return STATUS_OK;
		}
	}
	enum status status = suggest(blas, &shape, d, candidates, &count);
	if (status != STATUS_OK)
		return status;
	struct tuned *grown =
	        realloc(blas->tuned, (size_t)(blas->n_tuned + 1) * sizeof *blas->tuned);
	if (!grown)
		return status_set(STATUS_OOM, "no memory for a tuned matrix product");
	blas->tuned = grown;
	*algorithm = candidates[tune(blas, g, candidates, count, workspace)].algo;
	blas->tuned[blas->n_tuned].shape = shape;
	blas->tuned[blas->n_tuned++].algorithm = *algorithm;
	return STATUS_OK;
}

static void blas_release(void *memory)
{
	struct blas *blas = memory;

	if (blas->handle)
		cublasLtDestroy(blas->handle);
	if (blas->start)
		cudaEventDestroy(blas->start);
	if (blas->stop)
		cudaEventDestroy(blas->stop);
	free(blas->tuned);
}

/* What the device keeps, with the library started. */
static enum status blas_of(struct device *device, struct blas **kept)
{
	struct blas *blas = *kept = cuda_slot(device, sizeof *blas, blas_release);

	if (!blas)
		return status_set(STATUS_OOM, "no memory for cuBLASLt");
	/* A handle may be a copy that lives for one call. */
	blas->device = device;
	if (blas->handle || blas->missing)
		return STATUS_OK;
	CUDA_TRY(cudaEventCreate(&blas->start));
	CUDA_TRY(cudaEventCreate(&blas->stop));
	cublasStatus_t error = cublasLtCreate(&blas->handle);
	if (error != CUBLAS_STATUS_SUCCESS && error != CUBLAS_STATUS_ALLOC_FAILED) {
		fprintf(stderr,
		        "cuda: cuBLASLt does not start (%s); matrix products will be slow\n",
		        cublasLtGetStatusString(error));
		cudaGetLastError();
		blas->handle = NULL;
		blas->missing = true;
		return STATUS_OK;
	}
	BLAS_TRY(error);
	return STATUS_OK;
}

enum status gemm_run(struct device *device, const struct gemm *gemm, void *workspace)
{
	struct description description = {0};
	cublasLtMatmulAlgo_t algorithm;
	struct blas *blas;

	enum status status = blas_of(device, &blas);
	if (status == STATUS_OK && blas->missing)
		return plain_gemm(device, gemm);
	if (status == STATUS_OK)
		status = describe(gemm, &description);
	if (status == STATUS_OK)
		status = find_algorithm(blas, gemm, &description, workspace, &algorithm);
	if (status == STATUS_OK)
		status = multiply(blas, gemm, &description, &algorithm, workspace);
	description_destroy(&description);
	return status;
}
