/*
 * A token of the delta rules backwards. With S- = A S_{t-1}, r = v - k S-,
 * S_t = S- + k^T beta r and o = scale q S_t, and L the gradient of S_t:
 *   L += q^T do;  dq = S_t do;  de = k L;  dbeta = de.r;  dv = beta de;  du = -dv
 *   dk = L (beta r) + S- du;  L- = L + k^T du;  dlog_decay = rowsum(L- S-);  dS = A L-
 * where do has the scale.
 */
#include "kernels/cpu/matrix_gradient.h"
#include "kernels/cpu/matrix_state.h"

#include <string.h>

struct scratch {
	float *decay;    /* [d_k] */
	float *dlog;     /* [d_k] */
	float *dout;     /* [d_v]: scaled */
	float *residual; /* [d_v]: r */
	float *change;   /* [d_v]: beta r */
	float *dvalue;   /* [d_v]: de, then dv */
};

static struct scratch lay_out(const struct matrix_recurrence_args *a, struct scratch_arena *arena)
{
	return (struct scratch){
	        .decay = scratch_take(arena, a->d_k),
	        .dlog = scratch_take(arena, a->d_k),
	        .dout = scratch_take(arena, a->d_v),
	        .residual = scratch_take(arena, a->d_v),
	        .change = scratch_take(arena, a->d_v),
	        .dvalue = scratch_take(arena, a->d_v),
	};
}

static size_t delta_scratch(const struct matrix_recurrence_args *a)
{
	struct scratch_arena arena = {0};

	lay_out(a, &arena);
	return arena.used;
}

static void delta_advance(const struct matrix_recurrence_args *a, const struct matrix_span *span,
                          float *memory, float *state)
{
	struct scratch s = lay_out(a, &(struct scratch_arena){.memory = memory});
	float *k = view_at(&a->k, span->b, span->t, span->h);
	struct matrix_token token = {.q = k,
	                             .k = k,
	                             .v = view_at(&a->v, span->b, span->t, span->h),
	                             .decay = s.decay,
	                             .beta = *view_at(&a->beta, span->b, span->t, span->h)};

	matrix_state_decay(a->decay, &a->log_decay, span->b, span->t, span->h, a->d_k, s.decay,
	                   NULL);
	matrix_state_advance(RULE_DELTA, a->d_k, a->d_v, 1.0f, &token, state, a->d_v, NULL);
}

/* residual = v - k S-. */
static void residual_of(int64_t d_k, int64_t d_v, const float *v, const float *k,
                        const float *decay, const float *before, float *residual)
{
	memcpy(residual, v, sizeof *residual * (size_t)d_v);
	for (int64_t i = 0; i < d_k; i++) {
		float weight = k[i] * decay[i];
		const float *row = before + i * d_v;

#pragma omp simd
		for (int64_t j = 0; j < d_v; j++)
			residual[j] -= weight * row[j];
	}
}

/* L += q^T do, dq = S_t do, dvalue = k L. */
static void output_backward(const struct matrix_recurrence_args *a, const float *q, const float *k,
                            const float *after, const struct scratch *s, float *dstate, float *dq)
{
	memset(s->dvalue, 0, sizeof(float) * (size_t)a->d_v);
	for (int64_t i = 0; i < a->d_k; i++) {
		const float *state = after + i * a->d_v;
		float *gradient = dstate + i * a->d_v, q_i = q[i], k_i = k[i], sum = 0;

#pragma omp simd reduction(+ : sum)
		for (int64_t j = 0; j < a->d_v; j++) {
			gradient[j] += q_i * s->dout[j];
			sum += state[j] * s->dout[j];
			s->dvalue[j] += k_i * gradient[j];
		}
		dq[i] = sum;
	}
}

/* dk, dlog and the gradient of S_{t-1}; dvalue holds dv = -du. */
static void update_backward(const struct matrix_recurrence_args *a, const float *k,
                            const float *before, const struct scratch *s, float *dstate, float *dk)
{
	for (int64_t i = 0; i < a->d_k; i++) {
		const float *state = before + i * a->d_v;
		float *gradient = dstate + i * a->d_v, decay = s->decay[i], k_i = k[i];
		float dk_sum = 0, dlog_sum = 0;

#pragma omp simd reduction(+ : dk_sum, dlog_sum)
		for (int64_t j = 0; j < a->d_v; j++) {
			float decayed = decay * state[j];
			float inner = gradient[j] - k_i * s->dvalue[j];

			dk_sum += gradient[j] * s->change[j] - decayed * s->dvalue[j];
			dlog_sum += inner * decayed;
			gradient[j] = decay * inner;
		}
		dk[i] = dk_sum;
		s->dlog[i] = dlog_sum;
	}
}

/* dlog_decay of the token, from dlog by channel. */
static void write_dlog_decay(const struct matrix_recurrence_backward_args *a,
                             const struct matrix_span *span, const float *dlog)
{
	int64_t d = a->forward.d_k;
	float sum = 0;

	if (a->forward.decay == DECAY_DIAGONAL)
		memcpy(view_at(&a->dlog_decay, span->b, span->t, span->h), dlog,
		       sizeof *dlog * (size_t)d);
	if (a->forward.decay != DECAY_SCALAR)
		return;
	for (int64_t i = 0; i < d; i++)
		sum += dlog[i];
	*view_at(&a->dlog_decay, span->b, span->t, span->h) = sum;
}

static void delta_backward(const struct matrix_recurrence_backward_args *a,
                           const struct matrix_span *span, float *memory, const float *before,
                           const float *after, float *dstate, double *dbonus)
{
	const struct matrix_recurrence_args *f = &a->forward;
	struct scratch s = lay_out(f, &(struct scratch_arena){.memory = memory});
	int64_t b = span->b, t = span->t, h = span->h;
	const float *k = view_at(&f->k, b, t, h), *dout = view_at(&a->dout, b, t, h);
	float *dv = view_at(&a->dv, b, t, h), beta = *view_at(&f->beta, b, t, h), dbeta = 0;

	for (int64_t j = 0; j < f->d_v; j++)
		s.dout[j] = f->scale * dout[j];
	matrix_state_decay(f->decay, &f->log_decay, b, t, h, f->d_k, s.decay, NULL);
	residual_of(f->d_k, f->d_v, view_at(&f->v, b, t, h), k, s.decay, before, s.residual);
	output_backward(f, view_at(&f->q, b, t, h), k, after, &s, dstate, view_at(&a->dq, b, t, h));
	for (int64_t j = 0; j < f->d_v; j++) {
		dbeta += s.dvalue[j] * s.residual[j];
		s.change[j] = beta * s.residual[j];
		s.dvalue[j] *= beta;
		dv[j] = s.dvalue[j];
	}
	*view_at(&a->dbeta, b, t, h) = dbeta;
	update_backward(f, k, before, &s, dstate, view_at(&a->dk, b, t, h));
	write_dlog_decay(a, span, s.dlog);
}

const struct matrix_gradient matrix_gradient_delta = {delta_scratch, delta_advance, delta_backward};
