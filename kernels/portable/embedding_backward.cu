/*
 * The embedding's gradient: a row of the table is the sum of dy over the
 * tokens that read it. Tokens are first sorted by row, in their order within
 * it, so that every run adds alike: counted, placed with a cursor per row in
 * whatever order they come, and then each row's list ranked.
 */
#include "kernels/portable/device.cuh"
#include "kernels/portable/kernels.h"

namespace
{

constexpr int THREADS = 256, SCAN_THREADS = 1024;

struct lists {
	uint32_t *first;          /* [vocab + 1]: where each row's list starts */
	uint32_t *cursor;         /* [vocab] */
	uint32_t *placed, *order; /* [n_tokens]: token indices by row; in order, too */
};

static __global__ void __launch_bounds__(THREADS)
        clear_kernel(const __grid_constant__ struct lists l, int64_t vocab)
{
	const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;

	if (i < vocab)
		l.cursor[i] = 0;
}

static __global__ void __launch_bounds__(THREADS)
        count_kernel(const __grid_constant__ struct lists l, const int32_t *tokens,
                     int64_t n_tokens)
{
	const int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;

	if (n < n_tokens)
		take_ticket(l.cursor + tokens[n]);
}

/* first = the running sum of the counts, which become the cursors; one block. */
static __global__ void __launch_bounds__(SCAN_THREADS)
        scan_kernel(const __grid_constant__ struct lists l, int64_t vocab)
{
	uint32_t *sums = reinterpret_cast<uint32_t *>(shared_memory);
	const int64_t share = divide_up(vocab, SCAN_THREADS);
	const int64_t begin = min(threadIdx.x * share, vocab), end = min(begin + share, vocab);
	uint32_t sum = 0;

	for (int64_t i = begin; i < end; i++)
		sum += l.cursor[i];
	sums[threadIdx.x] = sum;
	__syncthreads();
	sum = 0;
	for (int i = 0; i < (int)threadIdx.x; i++)
		sum += sums[i];
	for (int64_t i = begin; i < end; i++) {
		const uint32_t count = l.cursor[i];

		l.first[i] = l.cursor[i] = sum;
		sum += count;
	}
	if (end == vocab)
		l.first[vocab] = sum;
}

static __global__ void __launch_bounds__(THREADS)
        place_kernel(const __grid_constant__ struct lists l, const int32_t *tokens,
                     int64_t n_tokens)
{
	const int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x;

	if (n < n_tokens)
		l.placed[take_ticket(l.cursor + tokens[n])] = (uint32_t)n;
}

/* A block per row: ranks its list, then sums dy over it, a thread per column. */
static __global__ void __launch_bounds__(THREADS)
        sum_kernel(const __grid_constant__ struct lists l, const bf16 *dy, float *dtable, int64_t d)
{
	const uint32_t first = l.first[blockIdx.x], end = l.first[blockIdx.x + 1];

	for (uint32_t i = first + threadIdx.x; i < end; i += THREADS) {
		const uint32_t mine = l.placed[i];
		uint32_t rank = first;

		for (uint32_t j = first; j < end; j++)
			rank += l.placed[j] < mine;
		l.order[rank] = mine;
	}
	__syncthreads();
	for (int64_t column = 8 * (int64_t)threadIdx.x; column < d; column += 8 * THREADS) {
		float sum[8] = {};

		for (uint32_t i = first; i < end; i++) {
			float x[8];

			load8(x, dy + l.order[i] * d + column);
#pragma unroll
			for (int j = 0; j < 8; j++)
				sum[j] += x[j];
		}
		store8f(dtable + blockIdx.x * d + column, sum);
	}
}

} // namespace

extern "C" const char *portable_embedding_backward_unsupported(const struct device *,
                                                               const void *args)
{
	const auto *a = static_cast<const struct embedding_backward_args *>(args);

	if (a->vocab > INT32_MAX || a->n_tokens > INT32_MAX)
		return "more than 2^31 tokens or rows";
	return check_widths(a->d_model);
}

extern "C" size_t portable_embedding_backward_workspace(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct embedding_backward_args *>(args);

	return (size_t)(2 * a->vocab + 1 + 2 * a->n_tokens) * sizeof(uint32_t);
}

extern "C" enum status portable_embedding_backward(struct device *device, const void *args,
                                                   void *workspace)
{
	const auto *a = static_cast<const struct embedding_backward_args *>(args);
	const dim3 rows((unsigned)divide_up(a->vocab, THREADS));
	const dim3 tokens((unsigned)divide_up(a->n_tokens, THREADS));
	struct lists l;

	l.first = static_cast<uint32_t *>(workspace);
	l.cursor = l.first + a->vocab + 1;
	l.placed = l.cursor + a->vocab;
	l.order = l.placed + a->n_tokens;
	enum status status =
	        launch(device, "embedding_backward", clear_kernel, rows, THREADS, 0, l, a->vocab);
	if (status == STATUS_OK)
		status = launch(device, "embedding_backward", count_kernel, tokens, THREADS, 0, l,
		                a->tokens, a->n_tokens);
	if (status == STATUS_OK)
		status = launch(device, "embedding_backward", scan_kernel, dim3(1), SCAN_THREADS,
		                SCAN_THREADS * sizeof(uint32_t), l, a->vocab);
	if (status == STATUS_OK)
		status = launch(device, "embedding_backward", place_kernel, tokens, THREADS, 0, l,
		                a->tokens, a->n_tokens);
	if (status == STATUS_OK)
		status = launch(device, "embedding_backward", sum_kernel, dim3((unsigned)a->vocab),
		                THREADS, 0, l, static_cast<const bf16 *>(a->dy), a->dtable,
		                a->d_model);
	return status;
}
