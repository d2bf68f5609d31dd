#include "kernels/problem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/noise.h"

enum {
	ALIGNMENT = 256,
	GUARD = 64,            /* elements before and after a tensor of a test */
	POISON = 0xff,         /* NaN in every floating-point type, -1 in int32 */
	POOL_COUNT = 1 << 22,  /* random numbers that are made once */
	PIECE_COUNT = 1 << 18, /* the pieces of them that larger tensors are put together from */
	STREAM_DICE = 1 << 20
};

uint64_t dice_bits(struct dice *dice)
{
	return noise_bits(dice->seed, STREAM_DICE, dice->next++);
}

int64_t dice_integer(struct dice *dice, int64_t low, int64_t high)
{
	return low + (int64_t)(dice_bits(dice) % (uint64_t)(high - low + 1));
}

/* An address that no tensor has, as aligned as a real one: never dereferenced. */
static void *made_up_address(void)
{
	return (void *)((uintptr_t)1 << 30);
}

/* ---- which operands, and where ---- */

static bool is_wanted(const struct problem *p, const struct operand *o, struct dice *dice)
{
	if (!o->optional)
		return true;
	return p->form.any ? dice_bits(dice) & 1 : o->usual;
}

/* Decides one operand after the other, since which there are depends on those before. */
static void choose_operands(struct problem *p, struct dice *dice)
{
	operation_describe(p->operation, &p->args, &p->list);
	for (int i = 0; i < p->list.count; i++) {
		struct operand *o = &p->list.operand[i];

		operand_set(o, is_wanted(p, o, dice) ? made_up_address() : NULL);
		operation_describe(p->operation, &p->args, &p->list);
	}
}

/* Nothing, or a few elements. */
static int64_t any_pad(const struct problem *p, struct dice *dice)
{
	const int64_t pad = dice_integer(dice, 0, 4);

	return p->form.narrow ? 8 * (pad / 2) : pad;
}

/* Whether an operand before number i has its rows as far apart as that one: they share a stride. */
static bool row_is_chosen(const struct problem *p, int i)
{
	for (int j = 0; j < i; j++)
		if (p->list.operand[j].row == p->list.operand[i].row &&
		    operand_data(&p->list.operand[j]))
			return true;
	return false;
}

/* Caches and the chunks of RAT, which layers store as [B, H, slots, d]. */
static bool is_cache(const struct operand *o)
{
	return o->view && o->axis[1] == AXIS_KEY && o->role != ROLE_INPUT;
}

/* Strides of a test: [B][T][H] or, now and then, [B][H][T], with gaps; rows some way apart; now and
 * then heads that share q and k. Of caches half are stored as layers do it. */
static void any_strides(const struct problem *p, int i, struct dice *dice,
                        int64_t stride[OPERAND_DIMS])
{
	const struct operand *o = &p->list.operand[i];
	const int64_t *n = o->size;

	if (o->row) {
		const int64_t row = row_is_chosen(p, i) ? *o->row : n[3] + any_pad(p, dice);

		stride[2] = row;
		stride[1] = n[2] * row;
		stride[0] = n[1] * n[2] * row;
	}
	if (!o->view)
		return;
	const bool stored = is_cache(o) && noise_bits(p->form.seed, STREAM_DICE, 998) & 1;
	const int64_t inner = n[3] + (stored ? 0 : any_pad(p, dice));
	if (stored || dice_integer(dice, 0, 3) == 0) {
		stride[1] = inner;
		stride[2] = n[1] * inner + any_pad(p, dice);
		stride[0] = n[2] * stride[2] + any_pad(p, dice);
	} else {
		stride[2] = inner;
		stride[1] = n[2] * inner + any_pad(p, dice);
		stride[0] = n[1] * stride[1] + any_pad(p, dice);
	}
	if (o->may_share && noise_bits(p->form.seed, STREAM_DICE, 999) & 1)
		stride[2] = 0;
}

static void dense_strides(const struct operand *o, int64_t stride[OPERAND_DIMS])
{
	const int64_t *n = o->size;

	stride[3] = 1;
	stride[2] = n[3];
	stride[1] = n[2] * n[3];
	stride[0] = n[1] * n[2] * n[3];
	if (is_cache(o)) {
		stride[1] = n[3];
		stride[2] = n[1] * n[3];
	}
}

/* Index of the input whose place output i takes, or -1. */
static int any_alias(struct problem *p, int i, struct dice *dice)
{
	const struct operand *o = &p->list.operand[i];
	const struct operand *input = o->alias ? operand_find(&p->list, o->alias) : NULL;

	if (!p->form.any || !input || !operand_data(input) || input->from_forward ||
	    memcmp(o->size, input->size, sizeof o->size) != 0 || dice_bits(dice) & 1)
		return -1;
	return (int)(input - p->list.operand);
}

static size_t aligned(size_t bytes)
{
	return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static void place_operand(struct problem *p, int i, struct dice *dice)
{
	struct operand *o = &p->list.operand[i];
	struct region *r = &p->region[i];
	const size_t size = dtype_size(operand_dtype(o, p->device));

	*r = (struct region){.alias = any_alias(p, i, dice)};
	dense_strides(o, r->stride);
	if (p->form.any)
		any_strides(p, i, dice, r->stride);
	if (r->alias >= 0) {
		memcpy(r->stride, p->region[r->alias].stride, sizeof r->stride);
	} else {
		memcpy(o->stride, r->stride, sizeof o->stride);
		r->offset = p->bytes;
		r->first = p->form.any ? GUARD * size : 0;
		r->bytes = (size_t)operand_span(o) * size + 2 * r->first;
		p->bytes += aligned(r->bytes);
	}
	const struct region *own = r->alias >= 0 ? &p->region[r->alias] : r;
	operand_set_strided(o, p->memory + own->offset + own->first, r->stride);
}

void problem_plan(struct problem *p, struct device *device, enum operation operation,
                  const struct problem_form *form, void *memory)
{
	static const struct operation_form plain = {0};
	struct dice dice = {form->seed, 0};

	*p = (struct problem){.device = device,
	                      .operation = operation,
	                      .form = *form,
	                      .memory = memory ? memory : made_up_address()};
	operation_describes(operation)->size(&p->args, &form->sizes,
	                                     form->variant ? form->variant : &plain);
	choose_operands(p, &dice);
	for (int i = 0; i < p->list.count; i++)
		if (operand_data(&p->list.operand[i]))
			place_operand(p, i, &dice);
	/* What follows from another operand's place. */
	operation_describe(operation, &p->args, &p->list);
	p->hard = form->any && dice_integer(&dice, 0, 3) == 0;
}

/* ---- data ---- */

/* What the operand's normal numbers are multiplied with. Weights are no inputs. */
static float scale_of(const struct problem *p, const struct operand *o)
{
	const bool given = o->role != ROLE_PARAMETER || p->form.data == DATA_ZEROS;
	const float scale = o->draw == DRAW_SCORES && p->hard ? 40 * o->scale : o->scale;

	return given ? scale * data_scale(p->form.data) : scale;
}

/* Whether it is drawn from a normal distribution, whole rows being scaled or not. */
static bool is_normal(const struct operand *o)
{
	return o->draw == DRAW_NORMAL || o->draw == DRAW_SCORES;
}

static float log_decay(float x)
{
	const float logsigmoid = x < 0 ? x - log1pf(expf(x)) : -log1pf(expf(-x));

	return logsigmoid / 16;
}

/* Some that hardly decay, some that wipe the state out. */
static float hard_log_decay(float x)
{
	return x > 1 ? -20 : x > 0 ? 0 : fmaxf(-20, -3 * fabsf(x));
}

/* `count` values of an operand's distribution. */
static void draw(const struct problem *p, const struct operand *o, uint64_t stream, int64_t count,
                 float *values)
{
	const int64_t width = o->size[OPERAND_DIMS - 1];
	const uint64_t seed = p->form.seed;

	if (o->draw == DRAW_UNIFORM)
		noise_uniform(seed, stream, 0, count, 0, o->scale, values);
	else
		noise_normal(seed, stream, 0, count, is_normal(o) ? scale_of(p, o) : o->scale,
		             values);
	for (int64_t i = 0; i < count && o->draw == DRAW_LOG_DECAY; i++)
		values[i] = p->hard ? hard_log_decay(values[i]) : log_decay(values[i]);
	for (int64_t row = 0; o->draw == DRAW_UNIT && row < count / width; row++) {
		float sum = 0;

		for (int64_t i = 0; i < width; i++)
			sum += values[row * width + i] * values[row * width + i];
		for (int64_t i = 0; i < width; i++)
			values[row * width + i] /= sqrtf(sum);
	}
}

static enum status fill_integers(const struct problem *p, const struct operand *o, uint64_t stream)
{
	const int64_t count = operand_count(o), limit = (int64_t)o->scale;
	int32_t *values = malloc((size_t)count * sizeof *values + 1);

	if (!values)
		return status_set(STATUS_OOM, "no memory for random numbers");
	/* A single one is a position: the last. */
	for (int64_t i = 0; i < count; i++)
		values[i] = count == 1 ? (int32_t)(limit - 1)
		                       : (int32_t)(noise_bits(p->form.seed, stream, (uint64_t)i) %
		                                   (uint64_t)limit);
	enum status status =
	        device_upload(p->device, operand_data(o), values, (size_t)count * sizeof *values);
	free(values);
	return status;
}

/* A dense tensor from pieces of the pool, which is all of a small one. */
static enum status fill_dense(const struct problem *p, const struct operand *o, uint64_t stream,
                              const float *pool)
{
	const enum dtype dtype = operand_dtype(o, p->device);
	const int64_t count = operand_count(o);
	enum status status = STATUS_OK;

	if (count <= POOL_COUNT)
		return device_upload_floats(p->device, dtype, operand_data(o), pool, (size_t)count);
	for (int64_t i = 0; i < count && status == STATUS_OK; i += PIECE_COUNT) {
		const int64_t n = count - i < PIECE_COUNT ? count - i : PIECE_COUNT;
		/* Rows of 512 and less remain whole. */
		const uint64_t place = noise_bits(p->form.seed, stream, (uint64_t)i) %
		                       (uint64_t)(POOL_COUNT - PIECE_COUNT) / 512 * 512;

		status = device_upload_floats(
		        p->device, dtype, (char *)operand_data(o) + (size_t)i * dtype_size(dtype),
		        pool + place, (size_t)n);
	}
	return status;
}

/* A tensor with gaps, which keep their poison; small. */
static enum status fill_strided(const struct problem *p, const struct operand *o,
                                const float *values)
{
	const enum dtype dtype = operand_dtype(o, p->device);
	const int64_t *n = o->size, *s = o->stride, span = operand_span(o);
	float *host = malloc((size_t)span * sizeof *host + 1);
	int64_t index = 0;

	if (!host)
		return status_set(STATUS_OOM, "no memory for random numbers");
	memset(host, POISON, (size_t)span * sizeof *host);
	for (int64_t a = 0; a < n[0]; a++)
		for (int64_t b = 0; b < n[1]; b++)
			for (int64_t c = 0; c < n[2]; c++)
				for (int64_t d = 0; d < n[3]; d++)
					host[a * s[0] + b * s[1] + c * s[2] + d * s[3]] =
					        values[index++ % POOL_COUNT];
	enum status status =
	        device_upload_floats(p->device, dtype, operand_data(o), host, (size_t)span);
	free(host);
	return status;
}

static bool is_dense(const struct operand *o)
{
	return operand_span(o) == operand_count(o);
}

/* Queries and keys of a problem have one seed, whatever their streams. */
static enum status add_directions(const struct problem *p, const struct operand *o)
{
	const bool is_keys = o->side == SIDE_KEYS;
	const struct directions directions = directions_of_heads(
	        p->form.data, is_keys, p->form.seed, o->size[1], o->size[OPERAND_DIMS - 1]);
	struct strided rows = {.dtype = operand_dtype(o, p->device), .data = operand_data(o)};

	memcpy(rows.size, o->size, sizeof rows.size);
	memcpy(rows.stride, o->stride, sizeof rows.stride);
	return p->device->backend->add_directions(p->device, &rows, &directions);
}

static enum status fill_operand(const struct problem *p, int i, bool nan, float *pool)
{
	const struct operand *o = &p->list.operand[i];
	const struct backend *backend = p->device->backend;
	const int64_t count = operand_count(o);
	const uint64_t stream = (uint64_t)i;

	if (o->element == ELEMENT_INT32)
		return fill_integers(p, o, stream);
	if (!p->form.any && is_normal(o) && p->form.data == DATA_ZEROS)
		return device_fill(p->device, operand_data(o), 0,
		                   (size_t)count * dtype_size(operand_dtype(o, p->device)));
	if (!p->form.any && is_normal(o) && is_dense(o) && backend->normal_floats)
		return backend->normal_floats(p->device, operand_dtype(o, p->device),
		                              operand_data(o), count, scale_of(p, o), p->form.seed,
		                              stream);
	draw(p, o, stream, count < POOL_COUNT ? count : POOL_COUNT, pool);
	if (nan)
		pool[noise_bits(p->form.seed, stream, 7) % (uint64_t)count] = NAN;
	return p->form.any ? fill_strided(p, o, pool) : fill_dense(p, o, stream, pool);
}

/* Runs the forward of a backward, whose arguments are the first of its own. */
static enum status run_forward(const struct problem *p)
{
	struct context ctx = {.device = p->device};
	const enum operation forward = (enum operation)operation_describes(p->operation)->forward;
	struct kernel_plan plan = {0};

	ctx.plan = &plan;
	enum status status = kernel_run(&ctx, forward, &p->args);
	if (status != STATUS_OK)
		return status;
	ctx.plan = NULL;
	ctx.workspace_bytes = plan.workspace_bytes;
	status = device_allocate(p->device, plan.workspace_bytes + 1, &ctx.workspace);
	if (status == STATUS_OK)
		status = kernel_run(&ctx, forward, &p->args);
	if (status == STATUS_OK)
		status = device_synchronize(p->device);
	device_release(p->device, ctx.workspace);
	return status;
}

enum status problem_fill(struct problem *p, bool nan)
{
	int64_t largest = 0;
	int chosen = -1, n_inputs = 0;
	enum status status = STATUS_OK;

	for (int i = 0; i < p->list.count; i++)
		if (operand_count(&p->list.operand[i]) > largest)
			largest = operand_count(&p->list.operand[i]);
	if (largest > POOL_COUNT)
		largest = POOL_COUNT;
	float *pool = malloc((size_t)largest * sizeof *pool + 1);
	if (!pool)
		return status_set(STATUS_OOM, "no memory for random numbers");
	for (int i = 0; i < p->list.count; i++) {
		const struct operand *o = &p->list.operand[i];

		if (nan && operand_data(o) && o->role == ROLE_INPUT && !o->from_forward &&
		    o->element != ELEMENT_INT32 &&
		    noise_bits(p->form.seed, STREAM_DICE, (uint64_t)(1000 + i)) %
		                    (uint64_t)++n_inputs ==
		            0)
			chosen = i;
	}
	for (int i = 0; i < p->list.count && status == STATUS_OK; i++) {
		const struct operand *o = &p->list.operand[i];

		if (p->form.any && p->region[i].bytes > 0)
			status = device_fill(p->device, p->memory + p->region[i].offset, POISON,
			                     p->region[i].bytes);
		if (status == STATUS_OK && operand_data(o) && operand_is_read(o) &&
		    !o->from_forward) {
			status = fill_operand(p, i, i == chosen, pool);
			if (status == STATUS_OK && o->side != SIDE_NONE &&
			    data_has_directions(p->form.data))
				status = add_directions(p, o);
		}
	}
	free(pool);
	if (status == STATUS_OK && operation_describes(p->operation)->forward != NO_OPERATION)
		status = run_forward(p);
	return status;
}

enum status problem_poison(struct problem *p)
{
	enum status status = STATUS_OK;

	for (int i = 0; i < p->list.count && status == STATUS_OK; i++) {
		const struct operand *o = &p->list.operand[i];
		const bool written = o->role == ROLE_OUTPUT || o->role == ROLE_GRADIENT ||
		                     o->role == ROLE_SCRATCH;

		if (written && operand_data(o) && p->region[i].bytes > 0)
			status = device_fill(p->device, p->memory + p->region[i].offset, POISON,
			                     p->region[i].bytes);
	}
	return status;
}

/* ---- guards ---- */

enum status problem_guard(struct problem *p)
{
	enum status status = STATUS_OK;

	for (int i = 0; i < p->list.count && status == STATUS_OK; i++) {
		struct region *r = &p->region[i];

		if (r->bytes == 0)
			continue;
		r->before = malloc(r->bytes);
		status = r->before ? device_download(p->device, r->before, p->memory + r->offset,
		                                     r->bytes)
		                   : status_set(STATUS_OOM, "no memory for guards");
	}
	return status;
}

/* Copies over what an operation may have written from `now` to what must be there. */
static void allow(const struct problem *p, int i, struct region *r, const unsigned char *now)
{
	const struct operand *o = &p->list.operand[i];
	const size_t size = dtype_size(operand_dtype(o, p->device));
	const int64_t *n = o->size, *s = p->region[i].stride;

	for (int64_t a = 0; a < n[0]; a++)
		for (int64_t b = 0; b < n[1]; b++)
			for (int64_t c = 0; c < n[2]; c++)
				for (int64_t d = 0; d < n[3]; d++) {
					const size_t at =
					        r->first +
					        (size_t)(a * s[0] + b * s[1] + c * s[2] + d) * size;

					memcpy(r->before + at, now + at, size);
				}
}

enum status problem_guarded(struct problem *p, const char **operand)
{
	enum status status = STATUS_OK;

	*operand = NULL;
	for (int i = 0; i < p->list.count && status == STATUS_OK; i++) {
		struct region *r = &p->region[i];
		unsigned char *now = r->bytes > 0 ? malloc(r->bytes) : NULL;

		if (r->bytes == 0)
			continue;
		status = now ? device_download(p->device, now, p->memory + r->offset, r->bytes)
		             : status_set(STATUS_OOM, "no memory for guards");
		for (int j = 0; j < p->list.count && status == STATUS_OK; j++) {
			const struct operand *o = &p->list.operand[j];
			const bool here = j == i || p->region[j].alias == i;

			if (here && operand_data(o) &&
			    (operand_is_written(o) || o->role == ROLE_SCRATCH))
				allow(p, j, r, now);
		}
		if (status == STATUS_OK && memcmp(r->before, now, r->bytes) != 0)
			*operand = p->list.operand[i].name;
		free(now);
	}
	return status;
}

void problem_free(struct problem *p)
{
	for (int i = 0; i < p->list.count; i++) {
		free(p->region[i].before);
		p->region[i].before = NULL;
	}
}
