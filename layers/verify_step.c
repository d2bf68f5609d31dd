/* Verification of one generated token: the states before it, kept, and what it made of them. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/reference/reference.h"
#include "layers/mixing.h"
#include "layers/verify.h"

/* Floats of states to keep where that leaves a choice, and the sequences to keep at least and at
 * most. */
enum { SNAPSHOT_FLOATS = 16 << 20, LEAST_SEQUENCES = 2, MOST_SEQUENCES = 64 };

/* States of some sequences: layer by layer, state by state, sequence by sequence. */
struct stack_snapshot {
	int32_t position;
	int64_t n_sequences;
	int64_t *sequences;
	float *states;
};

/* Elements of one sequence's state. */
static int64_t state_count(const struct stack *stack, const struct tensor_spec *spec)
{
	return tensor_count(spec) / stack->shape.batch;
}

/* Elements of one sequence's states in the layers that verification looks at, before layer `end`.
 */
static int64_t states_before(const struct stack *stack, int end)
{
	struct tensor_spec specs[MAX_TENSORS];
	int64_t count = 0;

	for (int i = 0; i < end; i++) {
		const struct layer_config *config = &stack->layers[i];

		if (!verify_layer(stack, i))
			continue;
		for (int j = config->class->state(config, &stack->shape, specs) - 1; j >= 0; j--)
			count += state_count(stack, &specs[j]);
	}
	return count;
}

static enum status snapshot_layer(const struct stack *stack, int layer,
                                  struct stack_snapshot *snapshot)
{
	const struct layer_config *config = &stack->layers[layer];
	struct tensor_spec specs[MAX_TENSORS];
	int n = config->class->state(config, &stack->shape, specs);
	float *to = snapshot->states + states_before(stack, layer) * snapshot->n_sequences;
	enum status status = STATUS_OK;

	for (int j = 0; j < n; j++) {
		enum dtype dtype = tensor_dtype(&specs[j], stack->backend);
		size_t count = (size_t)state_count(stack, &specs[j]);
		const char *from = stack->memory[layer].state[j];

		for (int64_t s = 0; s < snapshot->n_sequences && status == STATUS_OK; s++) {
			size_t first = count * (size_t)snapshot->sequences[s];

			status = backend_download_floats(stack->backend, dtype, to,
			                                 from + first * dtype_size(dtype), count);
			to += count;
		}
	}
	return status;
}

/* One piece of memory: the struct, the list of sequences, the states. */
static struct stack_snapshot *snapshot_take(int64_t n_sequences, int64_t states)
{
	size_t n = (size_t)n_sequences, list = n * sizeof(int64_t);
	struct stack_snapshot *snapshot =
	        malloc(sizeof *snapshot + list + n * (size_t)states * sizeof(float));

	if (snapshot) {
		snapshot->n_sequences = n_sequences;
		snapshot->sequences = (int64_t *)(snapshot + 1);
		snapshot->states = (void *)(snapshot->sequences + n);
	}
	return snapshot;
}

enum status stack_snapshot_state(struct stack *stack, uint64_t seed)
{
	int64_t states = states_before(stack, stack->n_layers), batch = stack->shape.batch;
	int64_t n = states ? SNAPSHOT_FLOATS / states : MOST_SEQUENCES;
	enum status status;

	n = n < LEAST_SEQUENCES ? LEAST_SEQUENCES : n > MOST_SEQUENCES ? MOST_SEQUENCES : n;
	n = n < batch ? n : batch;
	free(stack->snapshot);
	stack->snapshot = snapshot_take(n, states);
	if (!stack->snapshot)
		return status_set(STATUS_OOM, "no memory for a copy of %lld sequences' states",
		                  (long long)n);
	verify_pick(batch, n, seed, stack->snapshot->sequences);
	status = stack->backend->download(&stack->snapshot->position, stack->position,
	                                  sizeof stack->snapshot->position);
	for (int i = 0; i < stack->n_layers && status == STATUS_OK; i++)
		if (verify_layer(stack, i))
			status = snapshot_layer(stack, i, stack->snapshot);
	return status;
}

/* One sequence's step in fp64: the layer's input and output, and its states. */
struct step {
	struct tensor_spec specs[MAX_TENSORS];
	int n_states;
	double *memory;
	double *x, *x_norm, *proj, *mix, *branch, *actual;
	double *before[MAX_TENSORS], *after[MAX_TENSORS]; /* after: as the reference has it */
	double *now;                                      /* as the backend has one of them */
};

static double *take(double **next, int64_t count)
{
	double *taken = *next;

	*next += count;
	return taken;
}

static enum status step_take(struct step *step, const struct subject *subject)
{
	const struct stack *stack = subject->stack;
	int64_t d = subject->d_model, p = subject->d_proj, m = subject->d_mix, states = 0;
	int64_t largest = 0, wider = m > d ? m : d;

	step->n_states = subject->config->class->state(subject->config, &stack->shape, step->specs);
	for (int j = 0; j < step->n_states; j++) {
		int64_t count = state_count(stack, &step->specs[j]);

		states += count;
		largest = count > largest ? count : largest;
	}
	enum status status =
	        reference_take(3 * d + p + m + wider + 2 * states + largest, &step->memory);
	if (status != STATUS_OK)
		return status;
	double *next = step->memory;
	step->x = take(&next, d);
	step->x_norm = take(&next, d);
	step->proj = take(&next, p);
	step->mix = take(&next, m);
	step->branch = take(&next, d);
	step->actual = take(&next, wider);
	for (int j = 0; j < step->n_states; j++) {
		step->before[j] = take(&next, state_count(stack, &step->specs[j]));
		step->after[j] = take(&next, state_count(stack, &step->specs[j]));
	}
	step->now = take(&next, largest);
	return STATUS_OK;
}

/* The states of sequence number s of the snapshot, into before and after. */
static void load_states(const struct subject *subject, int64_t s, struct step *step)
{
	const struct stack *stack = subject->stack;
	const struct stack_snapshot *snapshot = stack->snapshot;
	const float *states =
	        snapshot->states + states_before(stack, subject->layer) * snapshot->n_sequences;

	for (int j = 0; j < step->n_states; j++) {
		int64_t count = state_count(stack, &step->specs[j]);

#pragma omp parallel for simd
		for (int64_t i = 0; i < count; i++)
			step->before[j][i] = states[s * count + i];
		mixing_copy(count, step->before[j], step->after[j]);
		states += count * snapshot->n_sequences;
	}
}

static bool same(int64_t width, const double *a, const double *b)
{
	return memcmp(a, b, (size_t)width * sizeof *a) == 0;
}

/*
 * The worst row of a state after the step. What the reference left alone must be
 * as it was, to the bit: it may be a slot that nobody has ever filled. A
 * recurrent state counts as one row, since a single row of it can be all
 * cancellation; a cache is compared slot by slot.
 */
static double state_error(const struct tensor_spec *spec, int64_t count, const double *before,
                          const double *after, const double *now)
{
	int64_t width = spec->storage == STORAGE_FP32 ? count : spec->dims[spec->n_dims - 1];
	double worst = 0;

	if (count == 0)
		return 0;
#pragma omp parallel for reduction(max : worst)
	for (int64_t i = 0; i < count; i += width) {
		if (same(width, before + i, after + i) && same(width, before + i, now + i))
			continue;
		worst = fmax(worst, verify_row_error(width, now + i, after + i, 0));
	}
	return worst;
}

static enum status verify_states(const struct subject *subject, int64_t sequence,
                                 const struct step *step, double *worst)
{
	const struct stack *stack = subject->stack;
	enum status status = STATUS_OK;

	for (int j = 0; j < step->n_states && status == STATUS_OK; j++) {
		int64_t count = state_count(stack, &step->specs[j]);

		status = verify_download(
		        stack->backend, tensor_dtype(&step->specs[j], stack->backend),
		        stack->memory[subject->layer].state[j], sequence * count, count, step->now);
		if (status == STATUS_OK)
			*worst = fmax(*worst, state_error(&step->specs[j], count, step->before[j],
			                                  step->after[j], step->now));
	}
	return status;
}

/* Row `sequence` of a tensor [B, width]. */
static enum status download_row(const struct subject *subject, const void *tensor, int64_t width,
                                int64_t sequence, double *row)
{
	const struct backend *backend = subject->stack->backend;

	return verify_download(backend, backend->activation, tensor, sequence * width, width, row);
}

/* Mix and y of one sequence: what was computed, and what should have been. */
static enum status verify_outputs(const struct subject *subject, int64_t sequence,
                                  const struct step *step, double *worst)
{
	const struct stack *stack = subject->stack;
	int64_t d = subject->d_model, m = subject->d_mix;
	enum status status = download_row(subject, stack->memory[subject->layer].saved[SAVED_MIX],
	                                  m, sequence, step->actual);

	if (status != STATUS_OK)
		return status;
	*worst = fmax(*worst, verify_worst_row(1, m, step->actual, step->mix));
	reference_linear(1, m, d, step->mix, subject->param[PARAM_OUT_PROJ], step->branch);
	status = download_row(subject, stack->layer_x[subject->layer + 1], d, sequence,
	                      step->actual);
	if (status == STATUS_OK)
		*worst = fmax(*worst, verify_worst_sum(1, d, step->actual,
		                                       subject->config->residual ? step->x : NULL,
		                                       step->branch, stack->backend->activation));
	return status;
}

/* Sequence number s of the snapshot. */
static enum status verify_sequence(const struct subject *subject, int64_t s, struct step *step,
                                   double *worst)
{
	const struct stack *stack = subject->stack;
	const struct layer_config *config = subject->config;
	int64_t sequence = stack->snapshot->sequences[s];
	enum status status = download_row(subject, stack->layer_x[subject->layer], subject->d_model,
	                                  sequence, step->x);

	if (status != STATUS_OK)
		return status;
	load_states(subject, s, step);
	verify_project(subject, 1, step->x, step->x_norm, step->proj);
	status = config->class->reference_step(
	        config, &stack->shape, (const double *const *)subject->param, 1,
	        stack->snapshot->position, step->proj, step->after, step->mix);
	if (status == STATUS_OK)
		status = verify_outputs(subject, sequence, step, worst);
	if (status == STATUS_OK)
		status = verify_states(subject, sequence, step, worst);
	return status;
}

enum status verify_step(const struct subject *subject, double *worst)
{
	const struct stack_snapshot *snapshot = subject->stack->snapshot;
	struct step step;

	if (!snapshot)
		return status_set(STATUS_INVALID, "no snapshot was taken before the step");
	enum status status = step_take(&step, subject);
	if (status != STATUS_OK)
		return status;
	status = verify_outputs_finite(subject, subject->stack->shape.batch, worst);
	for (int64_t s = 0; s < snapshot->n_sequences && status == STATUS_OK; s++)
		status = verify_sequence(subject, s, &step, worst);
	free(step.memory);
	return status;
}
