/*
 * What FlashAttention-3's Python package does between a call and its kernels
 * (mha_fwd and mha_bwd in hopper/flash_api.cpp), without PyTorch. The kernels themselves
 * are its own files, hopper/instantiations/flash_*_hdim*_bf16*_sm90.cu,
 * compiled as they are and linked to this one.
 *
 * Defaults are those of its Python functions: a forward is never split
 * (flash_attn_func), a decode by num_splits_heuristic (flash_attn_with_kvcache). Heads that read
 * the same keys are packed into one tile of queries where should_pack_gqa says so, and when split.
 * Decoding attends to the filled part of a cache as to a tensor, which spares it
 * the kernel that reads lengths from memory.
 */
#include "baselines/flash3/shim/shim.h"

#include "flash.h"
#include "flash_fwd_combine_launch_template.h"
#include "heuristics.h"
#include "tile_size.h"

#ifndef FLASH3_VERSION
#define FLASH3_VERSION "unknown"
#endif

enum { MAX_SPLITS = 128 };

static size_t round_up(size_t bytes)
{
	return (bytes + 255) / 256 * 256;
}

/* The workspace's parts, as offsets. */
struct parts {
	size_t lse, out_split, lse_split, end; /* a semaphore is at 0 */
};

static int64_t rows_of(const struct flash3_problem *p)
{
	return (int64_t)p->batch * p->n_heads * p->seq_len;
}

static struct parts parts_of(const struct flash3_problem *p, int n_splits)
{
	const size_t rows = (size_t)rows_of(p);
	const size_t split_rows = n_splits > 1 ? (size_t)n_splits * rows : 0;
	struct parts parts;

	parts.lse = 256;
	parts.out_split = parts.lse + round_up(rows * sizeof(float));
	parts.lse_split = parts.out_split + round_up(split_rows * p->d_head * sizeof(float));
	parts.end = parts.lse_split + round_up(split_rows * sizeof(float));
	return parts;
}

/* A window that leaves out nothing is none, and a single query that sees all keys is not causal. */
static void set_mask(Flash_fwd_params *f, const struct flash3_problem *p)
{
	const int left = p->causal && p->window < p->kv_len - 1 ? p->window : -1;
	const bool bounded = p->causal && !(p->seq_len == 1 && left < 0);

	f->is_causal = bounded && left < 0;
	f->is_local = left >= 0;
	f->window_size_left = left < 0 ? p->kv_len - 1 : left;
	f->window_size_right = bounded ? 0 : p->seq_len - 1;
}

/* Of one query that sees all keys. */
static int splits_of(const Flash_fwd_params &f)
{
	const int tile = std::get<1>(tile_size_fwd_sm90(f.d, f.dv, false, false));

	return num_splits_heuristic(f.b * f.h_k, f.num_sm, (f.seqlen_k + tile - 1) / tile, 1,
	                            f.seqlen_k * (f.d + f.dv) * 2, false, MAX_SPLITS);
}

static bool packs(const Flash_fwd_params &f)
{
	const int tile = std::get<0>(tile_size_fwd_sm90(f.d, f.dv, f.is_causal, f.is_local));

	return should_pack_gqa(false, f.seqlen_q, f.h / f.h_k, tile);
}

/* What these kernels read of the parameters. */
static Flash_fwd_params params_of(const struct flash3_problem *p)
{
	Flash_fwd_params f = {};

	f.q_ptr = p->q.data;
	f.k_ptr = p->k.data;
	f.v_ptr = p->v.data;
	f.o_ptr = p->out.data;
	f.q_batch_stride = p->q.batch;
	f.k_batch_stride = p->k.batch;
	f.v_batch_stride = p->v.batch;
	f.o_batch_stride = p->out.batch;
	f.q_row_stride = p->q.token;
	f.k_row_stride = p->k.token;
	f.v_row_stride = p->v.token;
	f.o_row_stride = p->out.token;
	f.q_head_stride = p->q.head;
	f.k_head_stride = p->k.head;
	f.v_head_stride = p->v.head;
	f.o_head_stride = p->out.head;
	f.v_dim_stride = 1;
	f.b = p->batch;
	f.h = p->n_heads;
	f.h_k = p->kv_heads;
	f.seqlen_q = p->seq_len;
	f.seqlen_k = p->kv_len;
	f.total_q = p->batch * p->seq_len;
	f.d = f.dv = p->d_head;
	f.scale_softmax = p->scale;
	f.arch = 90;
	f.num_sm = p->n_sm;
	set_mask(&f, p);
	f.num_splits = p->may_split ? splits_of(f) : 1;
	f.pack_gqa = f.num_splits > 1 || packs(f);
	return f;
}

static void set_workspace(Flash_fwd_params *f, const struct flash3_problem *p, void *workspace)
{
	const struct parts parts = parts_of(p, f->num_splits);
	char *memory = static_cast<char *>(workspace);
	const int64_t rows = rows_of(p);

	f->softmax_lse_ptr = memory + parts.lse;
	if (f->num_splits == 1) {
		f->tile_count_semaphore =
		        f->is_causal || f->is_local ? static_cast<int *>(workspace) : nullptr;
		return;
	}
	f->oaccum_ptr = memory + parts.out_split;
	f->oaccum_row_stride = p->d_head;
	f->oaccum_head_stride = (int64_t)p->seq_len * p->d_head;
	f->oaccum_batch_stride = p->n_heads * f->oaccum_head_stride;
	f->oaccum_split_stride = rows * p->d_head;
	f->softmax_lseaccum_ptr = memory + parts.lse_split;
	f->lseaccum_head_stride = p->seq_len;
	f->lseaccum_batch_stride = (int64_t)p->n_heads * p->seq_len;
	f->lseaccum_split_stride = rows;
}

/* A split forward always packs the heads that read the same keys. */
template <int D> static void run(Flash_fwd_params &f, cudaStream_t stream)
{
	using bf16 = cutlass::bfloat16_t;

	if (f.num_splits == 1 && f.pack_gqa)
		return run_mha_fwd_<90, bf16, D, D, false, false, false, true>(f, stream);
	if (f.num_splits == 1)
		return run_mha_fwd_<90, bf16, D, D, false, false, false, false>(f, stream);
	run_mha_fwd_<90, bf16, D, D, true, false, false, true>(f, stream);
	run_mha_fwd_combine_<bf16, float, D>(f, stream, true);
}

extern "C" size_t flash3_workspace(const struct flash3_problem *p)
{
	const bool few = (int64_t)p->batch * p->kv_heads <= p->n_sm;

	return parts_of(p, p->may_split && few ? MAX_SPLITS : 1).end;
}

extern "C" cudaError_t flash3_forward(const struct flash3_problem *p, void *workspace,
                                      cudaStream_t stream)
{
	Flash_fwd_params f = params_of(p);

	set_workspace(&f, p, workspace);
	if (f.tile_count_semaphore) {
		const cudaError_t error =
		        cudaMemsetAsync(f.tile_count_semaphore, 0, sizeof(int), stream);
		if (error != cudaSuccess)
			return error;
	}
	if (p->d_head == 64)
		run<64>(f, stream);
	else
		run<128>(f, stream);
	return cudaGetLastError();
}

/* ---- gradients ---- */

static int round_to(int n, int tile)
{
	return (n + tile - 1) / tile * tile;
}

/* Queries and keys in whole tiles, as many as its kernels take, and the workspace's parts, as
 * offsets: those of dk and dv are sums of heads that share keys. */
struct backward_parts {
	int queries, keys;
	size_t delta, lse, dq, dk, dv, turns, dk_turns, dv_turns, end;
};

static struct backward_parts backward_parts_of(const struct flash3_gradients *g)
{
	const struct flash3_problem *p = &g->forward;
	const bool shares = p->n_heads != p->kv_heads;
	const size_t heads = (size_t)p->batch * p->n_heads, kv = (size_t)p->batch * p->kv_heads;
	struct backward_parts x;
	size_t end = 0;
	const auto take = [&](size_t bytes) {
		const size_t at = end;

		end += round_up(bytes);
		return at;
	};

	const int tile = p->d_head == 64 ? 128 : p->causal ? 64 : 80;

	x.queries = round_to(p->seq_len, tile);
	x.keys = round_to(p->kv_len, 128);
	const size_t dk_bytes = shares ? kv * x.keys * p->d_head * sizeof(float) : 0;
	const size_t dk_turns = shares && g->deterministic ? kv * (x.keys / 128) * sizeof(int) : 0;

	x.delta = take(heads * x.queries * sizeof(float));
	x.lse = take(heads * x.queries * sizeof(float));
	x.dq = take(heads * x.queries * p->d_head * sizeof(float));
	x.turns = take(heads * (x.queries / tile) * sizeof(int));
	x.dk = take(dk_bytes);
	x.dv = take(dk_bytes);
	x.dk_turns = take(dk_turns);
	x.dv_turns = take(dk_turns);
	x.end = end;
	return x;
}

extern "C" size_t flash3_backward_workspace(const struct flash3_gradients *g)
{
	return backward_parts_of(g).end;
}

static Flash_bwd_params backward_params_of(const struct flash3_gradients *g,
                                           const struct backward_parts &x, char *memory)
{
	Flash_bwd_params f = {};

	static_cast<Flash_fwd_params &>(f) = params_of(&g->forward);
	f.seqlen_q_rounded = x.queries;
	f.seqlen_k_rounded = x.keys;
	f.d_rounded = f.dv_rounded = g->forward.d_head;
	f.total_k = g->forward.batch * g->forward.kv_len;
	f.is_bf16 = true;
	f.softmax_lse_ptr = const_cast<float *>(g->lse);
	f.do_ptr = g->dout.data;
	f.do_batch_stride = g->dout.batch;
	f.do_row_stride = g->dout.token;
	f.do_head_stride = g->dout.head;
	f.dq_ptr = g->dq.data;
	f.dq_batch_stride = g->dq.batch;
	f.dq_row_stride = g->dq.token;
	f.dq_head_stride = g->dq.head;
	f.dk_ptr = g->dk.data;
	f.dk_batch_stride = g->dk.batch;
	f.dk_row_stride = g->dk.token;
	f.dk_head_stride = g->dk.head;
	f.dv_ptr = g->dv.data;
	f.dv_batch_stride = g->dv.batch;
	f.dv_row_stride = g->dv.token;
	f.dv_head_stride = g->dv.head;
	f.dsoftmax_sum = memory + x.delta;
	f.softmax_lse_log2_ptr = memory + x.lse;
	f.dq_accum_ptr = memory + x.dq;
	f.dk_accum_ptr = memory + x.dk;
	f.dv_accum_ptr = memory + x.dv;
	f.dq_semaphore = reinterpret_cast<int *>(memory + x.turns);
	f.dk_semaphore = reinterpret_cast<int *>(memory + x.dk_turns);
	f.dv_semaphore = reinterpret_cast<int *>(memory + x.dv_turns);
	f.deterministic = g->deterministic;
	return f;
}

/* Its own kernels clear the sums of dq. */
extern "C" cudaError_t flash3_backward(const struct flash3_gradients *g, void *workspace,
                                       cudaStream_t stream)
{
	const struct backward_parts x = backward_parts_of(g);
	Flash_bwd_params f = backward_params_of(g, x, static_cast<char *>(workspace));

	if (x.end > x.dk) {
		const cudaError_t error = cudaMemsetAsync(static_cast<char *>(workspace) + x.dk, 0,
		                                          x.end - x.dk, stream);
		if (error != cudaSuccess)
			return error;
	}
	if (g->forward.d_head == 64)
		run_mha_bwd_<90, cutlass::bfloat16_t, 64, false>(f, stream);
	else
		run_mha_bwd_<90, cutlass::bfloat16_t, 128, false>(f, stream);
	return cudaGetLastError();
}

extern "C" const char *flash3_version(void)
{
	return FLASH3_VERSION;
}

extern "C" size_t flash3_problem_size(void)
{
	return sizeof(struct flash3_gradients);
}
