/*
 * Every backward of the fp64 reference against central differences of its forward: this is what
 * makes the reference fit to judge the kernels. Small random problems of every form, from the
 * descriptions of the operations: what the forward gives is Y, the loss is the sum of Y times the
 * backward's inputs dY, and its change along random directions of X is what dX says it is.
 */
#include "tests/stacks.h"

#include <omp.h>

#include "kernels/noise.h"
#include "kernels/operation.h"

static const double step = 3e-4, allowed = 1e-7;

enum { CASES = 24, DIRECTIONS = 4, MAX_TENSORS_OF_CASE = 2 * MAX_OPERANDS };

/* One operation's arguments. */
struct call {
	enum operation operation;
	union any_args args;
	struct operand_list list;
};

/* A backward, its forward, and their memory. */
struct problem {
	struct call forward, backward;
	uint64_t seed, drawn;
	int n_tensors;
	void *tensors[MAX_TENSORS_OF_CASE];
};

static int64_t choose(struct problem *p, int64_t lo, int64_t hi)
{
	return lo + (int64_t)(noise_bits(p->seed, 0, p->drawn++) % (uint64_t)(hi - lo + 1));
}

static struct sizes choose_sizes(struct problem *p)
{
	const int64_t heads = choose(p, 1, 2) * 2, groups = choose(p, 0, 2),
	              kv_heads = choose(p, 0, 2);

	return (struct sizes){
	        .batch = choose(p, 1, 2),
	        .seq_len = choose(p, 1, 13),
	        .n_heads = heads,
	        .groups = groups == 0 ? heads : groups,
	        .kv_heads = kv_heads == 0 ? heads : kv_heads,
	        .d_head = 2 * choose(p, 2, 3),
	        .d_k = choose(p, 1, 4),
	        .d_v = choose(p, 1, 5),
	        .width = choose(p, 1, 5),
	        .d_in = choose(p, 3, 6),
	        .d_out = choose(p, 1, 5),
	        .rank = choose(p, 1, 4),
	        .chunk = choose(p, 1, 6),
	        .window = choose(p, 0, 15),
	        .vocab = choose(p, 2, 7),
	        .any = true,
	        /* Without 4: keys that a ring has lost have no gradient. */
	        .bits = (uint64_t)choose(p, 0, 63) & ~(uint64_t)4,
	};
}

/* ---- data ---- */

/* The first of an operand's names. */
static const char *name_of(const struct operand *operand)
{
	static char name[32];

	snprintf(name, sizeof name, "%.*s", (int)strcspn(operand->name, "|"), operand->name);
	return name;
}

/* What is called `prefix` and the operand's name. */
static struct operand *find(struct operand_list *list, const char *prefix,
                            const struct operand *operand)
{
	char name[40];

	snprintf(name, sizeof name, "%s%s", prefix, name_of(operand));
	return operand_find(list, name);
}

static void poison(const struct operand *operand)
{
	double *values = operand_data(operand);

	for (int64_t i = 0; values && i < operand_count(operand); i++)
		values[i] = NAN;
}

static void draw_integers(struct problem *p, const struct operand *operand)
{
	int32_t *values = operand_data(operand);

	for (int64_t i = 0; i < operand_count(operand); i++)
		values[i] = (int32_t)choose(p, 0, (int64_t)operand->scale - 1);
}

/* Normal numbers are of size 1 whatever the operand's scale: differences are sharpest there. */
static void draw(struct problem *p, const struct operand *operand)
{
	const int64_t count = operand_count(operand), width = operand->size[OPERAND_DIMS - 1];
	double *values = operand_data(operand);
	scoped float *noise = new_memory((size_t)count * sizeof *noise + 1);

	if (operand->draw == DRAW_UNIFORM)
		noise_uniform(p->seed, ++p->drawn, 0, count, 0, operand->scale, noise);
	else
		noise_normal(p->seed, ++p->drawn, 0, count, 1, noise);
	for (int64_t i = 0; i < count; i++)
		values[i] = operand->draw == DRAW_LOG_DECAY ? -fabsf(noise[i]) - 0.01f : noise[i];
	for (int64_t i = 0; i < count && operand->draw == DRAW_UNIT; i += width) {
		double square = 0;

		for (int64_t j = i; j < i + width; j++)
			square += values[j] * values[j];
		for (int64_t j = i; j < i + width; j++)
			values[j] /= sqrt(square);
	}
}

static void place(struct problem *p, struct operand *operand)
{
	void *memory = malloc((size_t)operand_count(operand) * sizeof(double) + 1);

	assert_true(memory && p->n_tensors < MAX_TENSORS_OF_CASE);
	p->tensors[p->n_tensors++] = memory;
	operand_set(operand, memory);
	if (operand->element == ELEMENT_INT32)
		draw_integers(p, operand);
	else if (operand_is_read(operand))
		draw(p, operand);
	else
		poison(operand);
}

/* Gives a call its operands: those of the same name in `others` (NULL: none), else new ones, and
 * some of the optional inputs. What is there decides what comes after it in the list. */
static void fill(struct problem *p, struct call *call, struct operand_list *others)
{
	for (int i = 0; i == 0 || i < call->list.count; i++) {
		operation_describe(call->operation, &call->args, &call->list);
		struct operand *o = &call->list.operand[i];
		struct operand *other = others ? operand_find(others, name_of(o)) : NULL;

		if (other)
			operand_set(o, operand_data(other));
		else if (!o->optional || (others && o->role == ROLE_OUTPUT) || choose(p, 0, 1))
			place(p, o);
	}
}

/* ---- the check ---- */

static void run(const struct call *call)
{
	struct context ctx = {.device = cpu->reference};

	require_ok(kernel_run(&ctx, call->operation, &call->args));
}

static double dot(int64_t count, const double *a, const double *b)
{
	double sum = 0;

	for (int64_t i = 0; i < count; i++)
		sum += a[i] * b[i];
	return sum;
}

/* Runs the forward. A gradient may have several rows for each of the output's: readers, whose
 * gradients add up. */
static double loss(struct problem *p)
{
	double sum = 0;

	run(&p->forward);
	for (int i = 0; i < p->forward.list.count; i++) {
		const struct operand *y = &p->forward.list.operand[i];
		const struct operand *dy = find(&p->backward.list, "d", y);

		if (!dy || dy->role != ROLE_INPUT || !operand_data(dy))
			continue;
		const int64_t width = y->size[3], rows = operand_count(y) / width;
		const int64_t readers = operand_count(dy) / operand_count(y);
		const double *values = operand_data(y), *gradient = operand_data(dy);

		for (int64_t r = 0; r < rows * readers; r++)
			sum += dot(width, values + r / readers * width, gradient + r * width);
	}
	return sum;
}

/* The loss where x is x + distance * direction. */
static double loss_at(struct problem *p, const struct operand *x, const double *direction,
                      double distance)
{
	double *values = operand_data(x);
	const size_t bytes = (size_t)operand_count(x) * sizeof *values;
	double *kept = new_memory(bytes + 1);

	memcpy(kept, values, bytes);
	for (int64_t i = 0; i < operand_count(x); i++)
		values[i] += distance * direction[i];
	const double result = loss(p);
	memcpy(values, kept, bytes);
	free(kept);
	return result;
}

/* Central differences of fourth order. */
static double slope(struct problem *p, const struct operand *x, const double *direction)
{
	return (8 * (loss_at(p, x, direction, step) - loss_at(p, x, direction, -step)) -
	        (loss_at(p, x, direction, 2 * step) - loss_at(p, x, direction, -2 * step))) /
	       (12 * step);
}

/* A direction of length 1. */
static void draw_direction(struct problem *p, int64_t count, float *noise, double *direction)
{
	noise_normal(p->seed, ++p->drawn, 0, count, 1, noise);
	for (int64_t i = 0; i < count; i++)
		direction[i] = noise[i];
	const double length = sqrt(dot(count, direction, direction));
	for (int64_t i = 0; i < count; i++)
		direction[i] /= length;
}

static void check_gradient(struct problem *p, const struct operand *x, const struct operand *dx)
{
	const struct operand *base = dx->base ? operand_find(&p->backward.list, dx->base) : NULL;
	const int64_t count = operand_count(x);
	const double *gradient = operand_data(dx), *added = base ? operand_data(base) : NULL;
	double *direction = new_memory((size_t)count * sizeof *direction), difference = 0,
	       length = 0;
	scoped float *noise = new_memory((size_t)count * sizeof *noise);

	assert_int_equal(operand_count(dx), count);
	for (int i = 0; i < DIRECTIONS; i++) {
		draw_direction(p, count, noise, direction);
		double expected = slope(p, x, direction);

		expected += added ? dot(count, direction, added) : 0;
		difference += pow(dot(count, gradient, direction) - expected, 2);
		length += expected * expected;
	}
	/* One that vanishes (a softmax over a single key) is all rounding. */
	double error = sqrt(difference) / fmax(sqrt(length), 1e-2);
	if (!(error <= allowed))
		fail_msg("%s, case %llu: %s is %.3g off central differences",
		         operation_name(p->backward.operation), (unsigned long long)p->seed,
		         name_of(dx), error);
	free(direction);
}

/* Checks every gradient of a problem; returns how many. */
static int check_gradients(struct problem *p)
{
	int checked = 0;

	loss(p);
	for (int i = 0; i < p->backward.list.count; i++)
		if (p->backward.list.operand[i].role == ROLE_UNREAD)
			poison(&p->backward.list.operand[i]);
	run(&p->backward);
	for (int i = 0; i < p->forward.list.count; i++) {
		const struct operand *x = &p->forward.list.operand[i];
		const struct operand *dx = find(&p->backward.list, "d", x);

		if (!dx || (dx->role != ROLE_OUTPUT && dx->role != ROLE_GRADIENT) ||
		    !operand_data(dx) || !operand_data(x))
			continue;
		check_gradient(p, x, dx);
		checked++;
	}
	return checked;
}

/* The forward of a backward, or NO_OPERATION. */
static int forward_of(int operation)
{
	const char *name = operation_name((enum operation)operation);
	const char *suffix = strstr(name, "_backward");

	for (int i = 0; suffix && i < OP_COUNT; i++) {
		const char *forward = operation_name((enum operation)i);

		if (strlen(forward) == (size_t)(suffix - name) &&
		    strncmp(name, forward, strlen(forward)) == 0)
			return i;
	}
	return NO_OPERATION;
}

static void random_case(int operation, const struct operation_form *variant, uint64_t seed)
{
	const struct description *d = operation_describes((enum operation)operation);
	scoped struct problem *p = calloc(1, sizeof *p);

	assert_non_null(p);
	p->seed = seed;
	p->backward.operation = (enum operation)operation;
	p->forward.operation = (enum operation)forward_of(operation);
	const struct sizes sizes = choose_sizes(p);
	d->size(&p->backward.args, &sizes, variant);
	fill(p, &p->backward, NULL);
	if (d->forward != NO_OPERATION) {
		p->forward.args = p->backward.args;
		operation_describe(p->forward.operation, &p->forward.args, &p->forward.list);
	} else {
		operation_describes(p->forward.operation)->size(&p->forward.args, &sizes, variant);
		fill(p, &p->forward, &p->backward.list);
	}
	assert_true(check_gradients(p) > 0);
	while (p->n_tensors > 0)
		free(p->tensors[--p->n_tensors]);
}

static void random_cases(int operation, const struct operation_form *variant)
{
	for (uint64_t seed = 0; seed < CASES; seed++)
		random_case(operation, variant, seed);
}

TEST(test_gradients)
{
	int n_backwards = 0;

	for (int i = 0; i < OP_COUNT; i++) {
		const struct operation_form *v = operation_forms((enum operation)i);

		if (forward_of(i) == NO_OPERATION)
			continue;
		n_backwards++;
		/* One without variants has the end of the list for its only form. */
		do
			random_cases(i, v);
		while (v->name && (++v)->name);
	}
	assert_true(n_backwards >= 15);
}

/* Decays and rules that no layer and no other library combines, too. */
TEST(test_matrix_recurrences)
{
	for (int decay = DECAY_NONE; decay <= DECAY_DIAGONAL; decay++)
		for (int rule = RULE_PLAIN; rule <= RULE_DELTA; rule++) {
			const struct operation_form variant = {.decay = (enum decay)decay,
			                                       .rule = (enum rule)rule};

			random_cases(OP_MATRIX_RECURRENCE_BACKWARD, &variant);
		}
}

/* The gradient takes the place of the logits; tokens without a target have none. */
TEST(test_cross_entropy)
{
	enum { N = 9, V = 6 };
	int32_t targets[N] = {3, -1, 3, 5, 1, -1, 3, 2, 0};
	float noise[N * V];
	double logits[N * V], gradient[N * V], losses[N], loss_of[2];
	struct context ctx = {.device = cpu->reference};
	struct cross_entropy_args args = {.n_tokens = N,
	                                  .vocab = V,
	                                  .logits = gradient,
	                                  .want_gradient = true,
	                                  .targets = targets,
	                                  .loss = (float *)(void *)loss_of,
	                                  .losses = (float *)(void *)losses};

	noise_normal(23, 0, 0, N * V, 1, noise);
	for (int i = 0; i < N * V; i++)
		gradient[i] = logits[i] = noise[i];
	require_ok(run_cross_entropy(&ctx, &args));
	args.want_gradient = false;
	args.logits = logits;
	for (int i = 0; i < N * V; i++) {
		const double value = logits[i];

		for (int j = 0; j < 2; j++) {
			logits[i] = value + (j ? -step : step);
			args.loss = (float *)(void *)&loss_of[j];
			require_ok(run_cross_entropy(&ctx, &args));
		}
		logits[i] = value;
		assert_true(fabs((loss_of[0] - loss_of[1]) / (2 * step) - gradient[i]) < 1e-8);
	}
}

/* A rotation is orthogonal: rotating back undoes it, and the length stays. */
TEST(test_rotation_inverts)
{
	enum { B = 2, T = 9, H = 3, D = 8, N = B * T * H * D };
	float noise[N];
	double x[N], y[N], back[N], moved = 0;
	struct context ctx = {.device = cpu->reference};
	const struct view from = {x, T * H * D, H * D, D}, to = {y, T * H * D, H * D, D};
	const struct view again = {back, T * H * D, H * D, D};
	const struct rotate_args rotate = {.batch = B,
	                                   .seq_len = T,
	                                   .n_heads = H,
	                                   .kv_heads = H,
	                                   .d_head = D,
	                                   .rope = true,
	                                   .kv_slots = T,
	                                   .q = from,
	                                   .k = from,
	                                   .q_out = to,
	                                   .k_out = to};
	const struct rotate_backward_args unrotate = {B, T, H, H, D, true, 0, to, to, again, again};

	noise_normal(24, 0, 0, N, 1, noise);
	for (int i = 0; i < N; i++)
		x[i] = noise[i];
	require_ok(run_rotate(&ctx, &rotate));
	require_ok(run_rotate_backward(&ctx, &unrotate));
	for (int i = 0; i < N; i++) {
		assert_true(fabs(back[i] - x[i]) < 1e-13);
		moved += (y[i] - x[i]) * (y[i] - x[i]);
	}
	assert_true(moved > 0.01 * dot(N, x, x));
	assert_true(fabs(dot(N, y, y) / dot(N, x, x) - 1) < 1e-12);
}

int main(void)
{
	/* The cases are tiny: waking a second thread would cost more than it does. */
	omp_set_num_threads(1);
	return tests_run();
}
