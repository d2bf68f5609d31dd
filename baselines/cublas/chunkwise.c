/*
 * Linear attention chunk by chunk, as plain batched products by cuBLASLt with
 * elementwise kernels between them: how it is written where nothing is fused.
 *
 * With D_t the sum of log decays from the first token of its chunk to t, and S
 * the state before the chunk:
 *   what a chunk adds to the state  sum_j (exp(D_last - D_j) k_j)^T v_j    product 1
 *   the states before all chunks    a scan over them                       kernel
 *   out_i  =  (exp(D_i) q_i) S                                             product 2
 *           + sum over j <= i of (q_i . k_j) exp(D_i - D_j) v_j            products 3, 4
 * Scores, states and scaled q and k all go through memory. One head at a time, all its sequences
 * and chunks in one batch; a last chunk that is shorter makes a batch of its own.
 */
#define _GNU_SOURCE
#include "baselines/cublas/chunkwise.h"

#include "baselines/cublas/kernels.h"
#include "baselines/cublas/product.h"
#include "kernels/hopper/tensor_map.h"

enum { DEFAULT_CHUNK = 128, LARGEST_CHUNK = 256, ALIGNMENT = 256 };

static int64_t chunk_of(const struct matrix_recurrence_args *a)
{
	const int64_t chunk = a->chunk > 0 ? a->chunk : DEFAULT_CHUNK;

	return chunk < a->seq_len ? chunk : a->seq_len;
}

const char *cublas_matrix_recurrence_unsupported(const struct device *device, const void *args)
{
	const struct matrix_recurrence_args *a = args;

	(void)device;
	if (a->rule != RULE_PLAIN || a->decay == DECAY_DIAGONAL || !is_known_decay(a->decay))
		return "only the plain rule, and no decay of its own for each channel";
	if (chunk_of(a) > LARGEST_CHUNK)
		return "chunk must be at most 256";
	if (a->d_k % 8 || a->d_v % 8)
		return "head widths must be multiples of 8";
	if (!tensor_map_supports(&a->q) || !tensor_map_supports(&a->k) ||
	    !tensor_map_supports(&a->v) || !tensor_map_supports(&a->out))
		return "views must be 16-byte aligned";
	return NULL;
}

/* Elements from one row of scores to the next: a multiple of 8, for products by tensor cores. */
static int64_t score_stride(int64_t rows)
{
	return (rows + 7) / 8 * 8;
}

/* The workspace: states and decays of all heads, scaled q and k and scores of one. */
struct space {
	char *gemm, *states, *q, *k, *scores;
	float *decay; /* NULL: no decay */
	size_t bytes;
};

static char *take(struct space *s, char *base, size_t bytes)
{
	char *taken = base ? base + s->bytes : NULL;

	s->bytes += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	return taken;
}

static struct space lay_out(const struct matrix_recurrence_args *a, char *base)
{
	const int64_t chunk = chunk_of(a), chunks = (a->seq_len + chunk - 1) / chunk;
	const size_t tokens = (size_t)(a->batch * a->seq_len);
	const size_t all_chunks = (size_t)(a->batch * chunks);
	const bool decays = a->decay != DECAY_NONE;
	struct space s = {0};

	s.gemm = take(&s, base, GEMM_WORKSPACE);
	s.states = take(&s, base, all_chunks * (size_t)(a->n_heads * a->d_k * a->d_v) * 2);
	s.scores = take(&s, base, all_chunks * (size_t)(chunk * score_stride(chunk)) * 2);
	if (decays) {
		s.decay = (float *)(void *)take(&s, base,
		                                tokens * (size_t)a->n_heads * sizeof(float));
		s.q = take(&s, base, tokens * (size_t)a->d_k * 2);
		s.k = take(&s, base, tokens * (size_t)a->d_k * 2);
	}
	return s;
}

size_t cublas_matrix_recurrence_workspace(const struct device *device, const void *args)
{
	(void)device;
	return lay_out(args, NULL).bytes;
}

/* Chunks whose products are one batch: `count` of `rows` tokens from token `first` of sequence b
 * on. They lie one behind the other, or at the same place of every sequence. */
struct part {
	int64_t b, first, rows, count;
	bool across;
};

/* The chunks of a part, of a view's rows. */
static struct matrices chunks_of(const struct part *part, const struct view *view)
{
	char *first = (char *)view->data + (part->b * view->batch + part->first * view->token) * 2;

	return (struct matrices){first, view->token,
	                         part->across ? view->batch : part->rows * view->token, false};
}

/* The states [B, C, d_k, d_v] of a head as a view of chunks: token c/chunk of a sequence. */
static struct view states_of(const struct matrix_recurrence_args *a, const struct space *s,
                             int64_t head)
{
	const int64_t chunk = chunk_of(a), chunks = (a->seq_len + chunk - 1) / chunk;
	const int64_t size = a->d_k * a->d_v;

	return (struct view){s->states + head * a->batch * chunks * size * 2, chunks * size, size,
	                     0};
}

/* The states before the chunks of a part. */
static struct matrices before(const struct matrix_recurrence_args *a, const struct part *part,
                              const struct view *states)
{
	const int64_t chunk = part->first / chunk_of(a);
	char *first = (char *)states->data + (part->b * states->batch + chunk * states->token) * 2;

	return (struct matrices){first, a->d_v, part->across ? states->batch : states->token,
	                         false};
}

static struct matrices scores_of(const struct part *part, void *scores)
{
	const int64_t stride = score_stride(part->rows);

	return (struct matrices){scores, stride, part->rows * stride, false};
}

static struct view head_of(const struct view *view, int64_t head)
{
	return (struct view){(char *)view->data + head * view->head * 2, view->batch, view->token,
	                     0};
}

static struct view dense(void *data, int64_t seq_len, int64_t width)
{
	return (struct view){data, seq_len * width, width, 0};
}

/* Product 1. */
static enum status add_up(struct device *device, const struct matrix_recurrence_args *a,
                          const struct part *part, const struct view *k, const struct view *v,
                          const struct view *states, void *workspace)
{
	const struct gemm g =
	        product(part->count, a->d_k, part->rows, a->d_v, 1, transpose(chunks_of(part, k)),
	                chunks_of(part, v), before(a, part, states));

	return gemm_run(device, &g, workspace);
}

/* Product 2. */
static enum status read_states(struct device *device, const struct matrix_recurrence_args *a,
                               const struct part *part, const struct view *q,
                               const struct view *states, const struct view *out, void *workspace)
{
	const struct gemm g =
	        product(part->count, part->rows, a->d_k, a->d_v, a->scale, chunks_of(part, q),
	                before(a, part, states), chunks_of(part, out));

	return gemm_run(device, &g, workspace);
}

/* Product 3. */
static enum status score(struct device *device, const struct matrix_recurrence_args *a,
                         const struct part *part, const struct view *q, const struct view *k,
                         void *scores, void *workspace)
{
	const struct gemm g =
	        product(part->count, part->rows, a->d_k, part->rows, a->scale, chunks_of(part, q),
	                transpose(chunks_of(part, k)), scores_of(part, scores));

	return gemm_run(device, &g, workspace);
}

/* Product 4, added to what product 2 has written. */
static enum status add_values(struct device *device, const struct part *part, int64_t d_v,
                              void *scores, const struct view *v, const struct view *out,
                              void *workspace)
{
	struct gemm g = product(part->count, part->rows, part->rows, d_v, 1,
	                        scores_of(part, scores), chunks_of(part, v), chunks_of(part, out));

	g.addend = g.out;
	return gemm_run(device, &g, workspace);
}

/* Whether the sequences of a view lie one behind the other. */
static bool contiguous(const struct matrix_recurrence_args *a, const struct view *view)
{
	return a->batch == 1 || view->batch == a->seq_len * view->token;
}

typedef enum status part_function(struct device *device, const struct matrix_recurrence_args *a,
                                  const struct space *s, int64_t head, const struct part *part);

/* All whole chunks at once if they lie evenly, else sequence by sequence; then what is left of
 * every sequence. */
static enum status each_part(struct device *device, const struct matrix_recurrence_args *a,
                             const struct space *s, int64_t head, part_function *run)
{
	const int64_t chunk = chunk_of(a), whole = a->seq_len / chunk, rest = a->seq_len % chunk;
	const bool even = rest == 0 && contiguous(a, &a->q) && contiguous(a, &a->k) &&
	                  contiguous(a, &a->v) && contiguous(a, &a->out);
	const int64_t calls = even ? 1 : a->batch;
	enum status status = STATUS_OK;

	for (int64_t b = 0; b < calls && status == STATUS_OK; b++) {
		const struct part part = {b, 0, chunk, even ? a->batch * whole : whole, false};

		status = run(device, a, s, head, &part);
	}
	if (rest > 0 && status == STATUS_OK) {
		const struct part part = {0, whole * chunk, rest, a->batch, true};

		status = run(device, a, s, head, &part);
	}
	return status;
}

static const float *decay_of(const struct matrix_recurrence_args *a, const struct space *s,
                             int64_t head)
{
	return s->decay ? s->decay + head * a->batch * a->seq_len : NULL;
}

/* What the chunks of a part add to the state. */
static enum status add_up_part(struct device *device, const struct matrix_recurrence_args *a,
                               const struct space *s, int64_t head, const struct part *part)
{
	const struct view k = s->decay ? dense(s->k, a->seq_len, a->d_k) : head_of(&a->k, head),
	                  v = head_of(&a->v, head), states = states_of(a, s, head);

	return add_up(device, a, part, &k, &v, &states, s->gemm);
}

/* The outputs of a part, from the states before its chunks. */
static enum status attend_part(struct device *device, const struct matrix_recurrence_args *a,
                               const struct space *s, int64_t head, const struct part *part)
{
	const struct view q = head_of(&a->q, head), k = head_of(&a->k, head),
	                  v = head_of(&a->v, head), out = head_of(&a->out, head),
	                  states = states_of(a, s, head);
	const struct view scaled = s->decay ? dense(s->q, a->seq_len, a->d_k) : q;
	const float *decay = decay_of(a, s, head);
	enum status status = read_states(device, a, part, &scaled, &states, &out, s->gemm);

	if (status == STATUS_OK)
		status = score(device, a, part, &q, &k, s->scores, s->gemm);
	if (status == STATUS_OK)
		status = chunkwise_mask(device, part->count, part->rows, score_stride(part->rows),
		                        decay ? decay + part->b * a->seq_len + part->first : NULL,
		                        part->across ? a->seq_len : part->rows, s->scores);
	if (status == STATUS_OK)
		status = add_values(device, part, a->d_v, s->scores, &v, &out, s->gemm);
	return status;
}

enum status cublas_matrix_recurrence(struct device *device, const void *args, void *workspace)
{
	const struct matrix_recurrence_args *a = args;
	const struct space s = lay_out(a, workspace);
	const int64_t chunk = chunk_of(a);
	enum status status = STATUS_OK;

	if (s.decay)
		status = chunkwise_sum_decays(device, a, chunk, s.decay);
	for (int64_t h = 0; h < a->n_heads && status == STATUS_OK; h++) {
		if (s.decay)
			status = chunkwise_scale(device, a, &a->k, h, a->d_k, chunk, true,
			                         decay_of(a, &s, h), s.k);
		if (status == STATUS_OK)
			status = each_part(device, a, &s, h, add_up_part);
	}
	if (status == STATUS_OK)
		status = chunkwise_scan(device, a, chunk, s.decay, s.states);
	for (int64_t h = 0; h < a->n_heads && status == STATUS_OK; h++) {
		if (s.decay)
			status = chunkwise_scale(device, a, &a->q, h, a->d_k, chunk, false,
			                         decay_of(a, &s, h), s.q);
		if (status == STATUS_OK)
			status = each_part(device, a, &s, h, attend_part);
	}
	return status;
}
