/*
 * Gradients of the matrix-state recurrence: the driver. A task is one head of
 * one sequence. A first sweep keeps the state at every INTERVAL tokens; the
 * reverse sweep computes the states inside an interval again and goes back
 * through it span by span (matrix_gradient.h), whatever the chunk of the forward.
 */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/matrix_gradient.h"
#include "kernels/cpu/matrix_state.h"
#include "kernels/cpu/shares.h"

enum { INTERVAL = 64 }; /* a whole number of spans of either length */

/* A thread's memory; a state is d_k * d_v floats. */
struct scratch {
	float *kept;   /* the state before every interval */
	float *states; /* before every span of an interval, and after the last */
	float *dstate;
	float *span; /* for the span's own use */
};

static const struct matrix_gradient *gradient_of(const struct matrix_recurrence_args *f)
{
	return f->rule == RULE_DELTA ? &matrix_gradient_delta : &matrix_gradient_blocks;
}

/* Tokens taken together. Longer blocks would gain nothing: the states between them are at hand. */
static int64_t span_length(const struct matrix_recurrence_args *f)
{
	return f->rule == RULE_DELTA ? 1 : SUB_CHUNK;
}

static int64_t state_size(const struct matrix_recurrence_args *f)
{
	return f->d_k * f->d_v;
}

static struct scratch lay_out(const struct matrix_recurrence_args *f, struct scratch_arena *arena)
{
	int64_t intervals = (f->seq_len + INTERVAL - 1) / INTERVAL;

	return (struct scratch){
	        .kept = scratch_take(arena, intervals * state_size(f)),
	        .states = scratch_take(arena, (INTERVAL / span_length(f) + 1) * state_size(f)),
	        .dstate = scratch_take(arena, state_size(f)),
	        .span = scratch_take(arena, (int64_t)gradient_of(f)->scratch(f)),
	};
}

/* The threads' scratch, then dbonus of every sequence in double, [B, H, d_k]. */
size_t cpu_matrix_recurrence_backward_workspace(const struct device *device, const void *args)
{
	const struct matrix_recurrence_args *f =
	        &((const struct matrix_recurrence_backward_args *)args)->forward;
	struct scratch_arena arena = {0};
	size_t bonus = f->rule == RULE_BONUS ? (size_t)(f->batch * f->n_heads * f->d_k) : 0;

	lay_out(f, &arena);
	return sizeof(float) * arena.used * (size_t)omp_get_max_threads() + sizeof(double) * bonus;
}

/* The `index`-th span of the tokens first .. end. */
static struct matrix_span span_at(const struct matrix_recurrence_args *f, int64_t b, int64_t h,
                                  int64_t first, int64_t end, int64_t index)
{
	int64_t length = span_length(f), t = first + index * length;

	return (struct matrix_span){b, h, t, end - t < length ? end - t : length};
}

/* Tokens first .. end, one interval, whose first state is s->states. */
static void interval_backward(const struct matrix_recurrence_backward_args *a, int64_t b, int64_t h,
                              int64_t first, int64_t end, const struct scratch *s, double *dbonus)
{
	const struct matrix_recurrence_args *f = &a->forward;
	const struct matrix_gradient *gradient = gradient_of(f);
	int64_t size = state_size(f), spans = (end - first + span_length(f) - 1) / span_length(f);

	for (int64_t i = 0; i < spans; i++) {
		struct matrix_span span = span_at(f, b, h, first, end, i);
		float *after = s->states + (i + 1) * size;

		memcpy(after, after - size, sizeof *after * (size_t)size);
		gradient->advance(f, &span, s->span, after);
	}
	for (int64_t i = spans - 1; i >= 0; i--) {
		struct matrix_span span = span_at(f, b, h, first, end, i);
		const float *before = s->states + i * size;

		gradient->backward(a, &span, s->span, before, before + size, s->dstate, dbonus);
	}
}

/* The state before every interval. */
static void keep_states(const struct matrix_recurrence_args *f, int64_t b, int64_t h,
                        const struct scratch *s)
{
	int64_t size = state_size(f);
	float *state = s->kept;

	matrix_state_load(f, b, h, 0, f->d_v, state);
	for (int64_t t = 0; t + INTERVAL < f->seq_len; t += INTERVAL, state += size) {
		memcpy(state + size, state, sizeof *state * (size_t)size);
		for (int64_t i = 0; i < INTERVAL / span_length(f); i++) {
			struct matrix_span span = span_at(f, b, h, t, t + INTERVAL, i);

			gradient_of(f)->advance(f, &span, s->span, state + size);
		}
	}
}

static void head_backward(const struct matrix_recurrence_backward_args *a, int64_t b, int64_t h,
                          const struct scratch *s, double *dbonus)
{
	const struct matrix_recurrence_args *f = &a->forward;
	int64_t size = state_size(f);
	size_t bytes = sizeof(float) * (size_t)size;

	keep_states(f, b, h, s);
	memset(s->dstate, 0, bytes);
	for (int64_t i = (f->seq_len - 1) / INTERVAL; i >= 0; i--) {
		int64_t first = i * INTERVAL;
		int64_t end = first + INTERVAL < f->seq_len ? first + INTERVAL : f->seq_len;

		memcpy(s->states, s->kept + i * size, bytes);
		interval_backward(a, b, h, first, end, s, dbonus);
	}
	if (a->dh0)
		memcpy(a->dh0 + (b * f->n_heads + h) * size, s->dstate, bytes);
}

enum status cpu_matrix_recurrence_backward(struct device *device, const void *args, void *workspace)
{
	const struct matrix_recurrence_backward_args *a = args;
	const struct matrix_recurrence_args *f = &a->forward;
	int n_threads = omp_get_max_threads();
	struct scratch_arena size = {0};

	lay_out(f, &size);
	double *dbonus = (double *)((float *)workspace + size.used * (size_t)n_threads);
	if (f->rule == RULE_BONUS)
		memset(dbonus, 0, sizeof *dbonus * (size_t)(f->batch * f->n_heads * f->d_k));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t head = 0; head < f->batch * f->n_heads; head++) {
		struct scratch_arena arena = {.memory = (float *)workspace +
		                                        size.used * (size_t)omp_get_thread_num()};
		struct scratch s = lay_out(f, &arena);

		head_backward(a, head / f->n_heads, head % f->n_heads, &s,
		              dbonus + (f->rule == RULE_BONUS ? head * f->d_k : 0));
	}
	if (f->rule == RULE_BONUS)
		add_shares(dbonus, f->batch, f->n_heads * f->d_k, f->n_heads * f->d_k, a->dbonus);
	return STATUS_OK;
}
