#include "kernels/check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/noise.h"
#include "kernels/reference/reference.h"
#include "kernels/reference/common.h"

enum {
	MAX_GROUPS = 6,
	MOST_PARTS = 8,         /* of an output that is not a sum */
	FEWEST_ROWS = 16,       /* of a part */
	SLICE = 64,             /* channels, or columns of a product, that are looked at together */
	ROW_BLOCK = 4096,       /* rows of a sum that are computed together, */
	TOKEN_BLOCK = 65536,    /* and tokens of sequences */
	KEPT_DOUBLES = 32 << 20 /* of states before a run; two parts in any case */
};

/* What the reference may cost on the host, where nothing else can compute. */
static const double HOST_FLOPS = 4e9, DEVICE_FLOPS = 4e11;
/* Elements of all operands of a problem that is computed again as a whole. */
static const double HOST_ELEMENTS = 1 << 22, DEVICE_ELEMENTS = 1 << 24;

void check_raise(double *worst, double error)
{
	if (!(error <= *worst))
		*worst = isnan(error) ? (double)INFINITY : error;
}

/* ---- what to look at ---- */

void check_pick(int64_t total, int64_t n, uint64_t seed, int64_t *picked)
{
	for (int64_t i = 0; i < n; i++) {
		const int64_t from = i * total / n, to = (i + 1) * total / n;

		picked[i] =
		        from + (int64_t)(noise_bits(seed, 0, (uint64_t)i) % (uint64_t)(to - from));
	}
	if (n > 1) {
		picked[0] = 0;
		picked[n - 1] = total - 1;
	}
}

static int compare_integers(const void *a, const void *b)
{
	const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

/*
 * About `n` of 0 .. total-1, ascending: spread at random, and both sides of powers of two and of
 * the first multiples of `step`, where tiles, segments and chunks end. To be freed; NULL: no
 * memory.
 */
static int64_t *pick_rows(int64_t total, int64_t n, int64_t step, uint64_t seed, int64_t *count)
{
	const int64_t limit = smaller(n, total);
	int64_t *rows = malloc((size_t)(limit + 256) * sizeof *rows), found = limit, distinct = 0;

	*count = 0;
	if (!rows)
		return NULL;
	check_pick(total, limit, seed, rows);
	for (int64_t edge = 1; limit < total && edge < total; edge *= 2) {
		rows[found++] = edge - 1;
		rows[found++] = edge;
		if (step > 0 && edge <= 8 && edge * step < total) {
			rows[found++] = edge * step - 1;
			rows[found++] = edge * step;
		}
	}
	qsort(rows, (size_t)found, sizeof *rows, compare_integers);
	for (int64_t i = 0; i < found; i++)
		if (i == 0 || rows[i] != rows[i - 1])
			rows[distinct++] = rows[i];
	*count = distinct;
	return rows;
}

/* A part of a problem: along each axis `count` indices from `first` on, `step` apart, or all. */
struct part {
	bool cut[N_AXES];
	int64_t first[N_AXES], count[N_AXES], step[N_AXES];
	int64_t rows_from; /* of the list of rows, where that is cut */
};

/* Outputs that are looked at together: they can be cut alike. */
struct group {
	unsigned apart;       /* axes that are cut */
	bool sums, sums_rows; /* over sequences; over rows */
	int n_outputs;
	int outputs[MAX_OPERANDS];
	int64_t n_rows, *rows;  /* AXIS_ROW, where it is cut into a list */
	struct row_list tokens; /* rows of AXIS_TOKEN to compare; count 0: all */
	struct row_list keys;   /* rows of AXIS_KEY to compare */
	int n_parts, blocks;    /* of a sum: parts that add up to one thing to compare */
	struct part *parts;
	double **kept; /* [n_parts][MAX_OPERANDS] what check_begin() kept of operands */
};

struct check {
	struct device *device;
	/* Parts lie in the memory of `place` and are computed by a kernel of `reference`: the
	 * device's, or `host` for both if that has none. */
	struct device *place, *reference, host;
	const struct kernel *kernel;
	enum operation operation;
	union any_args args;
	struct check_options options;
	struct operand_list list;
	int64_t extent[N_AXES]; /* of the whole problem; 0: it has no such axis */
	int n_groups;
	struct group groups[MAX_GROUPS];
};

static bool has_axis(const struct operand *o, enum axis axis)
{
	for (int i = 0; i < OPERAND_DIMS; i++)
		if (o->axis[i] == axis)
			return true;
	return false;
}

static bool on_host(const struct check *c)
{
	return strcmp(c->place->backend->name, "cpu") == 0;
}

/* Elements of the operands that are there. */
static double all_elements(const struct operand_list *list)
{
	double sum = 0;

	for (int i = 0; i < list->count; i++)
		if (operand_data(&list->operand[i]))
			sum += (double)operand_count(&list->operand[i]);
	return sum;
}

static double flops_of(const struct check *c)
{
	return operation_describes(c->operation)->flops(&c->args) + all_elements(&c->list);
}

static bool is_small(const struct check *c)
{
	const bool host = on_host(c);

	return all_elements(&c->list) <= (host ? HOST_ELEMENTS : DEVICE_ELEMENTS) &&
	       flops_of(c) <= (host ? HOST_FLOPS : DEVICE_FLOPS);
}

static bool is_judged(const struct check *c, int i)
{
	const struct operand *o = &c->list.operand[i];

	return operand_is_written(o) && operand_data(o) && !(c->options.ignored >> i & 1);
}

/* Sorts the outputs into groups that are cut alike; all are one where nothing is cut. */
static void make_groups(struct check *c, bool whole)
{
	const unsigned apart = c->list.apart, groups = ALONG(AXIS_GROUP) | ALONG(AXIS_KV_HEAD);

	for (int i = 0; i < c->list.count; i++) {
		const struct operand *o = &c->list.operand[i];
		struct group g = {0};
		int j = 0;

		if (!is_judged(c, i))
			continue;
		if (!whole) {
			g.sums = apart & ALONG(AXIS_SEQUENCE) && !has_axis(o, AXIS_SEQUENCE);
			g.sums_rows = apart & ALONG(AXIS_ROW) && !has_axis(o, AXIS_ROW);
			/* Rows that are looked at are looked at as a whole. */
			if (!(apart & ALONG(AXIS_ROW)) || g.sums_rows)
				g.apart = o->apart & ~ALONG(AXIS_SEQUENCE);
			/* Heads and what they belong to are cut together. */
			if (g.apart & groups)
				g.apart = (g.apart & ~groups) | ALONG(AXIS_HEAD);
		}
		while (j < c->n_groups &&
		       (c->groups[j].apart != g.apart || c->groups[j].sums != g.sums ||
		        c->groups[j].sums_rows != g.sums_rows))
			j++;
		if (j == c->n_groups && c->n_groups < MAX_GROUPS)
			c->groups[c->n_groups++] = g;
		j = j < MAX_GROUPS ? j : MAX_GROUPS - 1;
		c->groups[j].outputs[c->groups[j].n_outputs++] = i;
	}
}

/* Sets of heads that outputs are sums over: those of a group or, where there are fewer, of a key
 * head; else every head is one. */
static int64_t head_sets(const struct check *c)
{
	const int64_t *n = c->extent;
	int64_t sets = n[AXIS_HEAD];

	for (enum axis a = AXIS_GROUP; a <= AXIS_KV_HEAD && c->list.sums_groups; a++)
		sets = n[a] > 0 ? smaller(n[a], sets) : sets;
	return sets;
}

/* Slices along the cut axes other than SEQUENCE and ROW: how many there are. */
static int64_t slices_of(const struct check *c, const struct group *g)
{
	int64_t slices = 1;

	if (g->apart & ALONG(AXIS_HEAD))
		slices *= head_sets(c);
	for (enum axis a = AXIS_CHANNEL; a <= AXIS_OUT; a++)
		if (g->apart & ALONG(a))
			slices *= (c->extent[a] + SLICE - 1) / SLICE;
	return slices;
}

static void cut(struct part *p, enum axis axis, int64_t first, int64_t count, int64_t step)
{
	p->cut[axis] = true;
	p->first[axis] = first;
	p->count[axis] = count;
	p->step[axis] = step;
}

/* Set number `set` of heads, its group or groups and its key heads. */
static void cut_head_set(const struct check *c, int64_t set, struct part *p)
{
	const int64_t heads = c->extent[AXIS_HEAD], groups = c->extent[AXIS_GROUP];
	const int64_t kv_heads = c->extent[AXIS_KV_HEAD], sets = head_sets(c), n = heads / sets;
	const bool side_by_side = sets == kv_heads;
	const int64_t first = side_by_side ? set * n : set, step = side_by_side ? 1 : sets;

	cut(p, AXIS_HEAD, first, n, step);
	if (groups == heads)
		cut(p, AXIS_GROUP, first, n, step);
	else if (groups > 0)
		cut(p, AXIS_GROUP, first % groups, 1, 1);
	if (kv_heads == heads)
		cut(p, AXIS_KV_HEAD, first, n, step);
	else if (kv_heads > 0)
		cut(p, AXIS_KV_HEAD, first / (heads / kv_heads), 1, 1);
}

/* Slice number `slice` of slices_of(). */
static void cut_slice(const struct check *c, const struct group *g, int64_t slice, struct part *p)
{
	if (g->apart & ALONG(AXIS_HEAD)) {
		cut_head_set(c, slice % head_sets(c), p);
		slice /= head_sets(c);
	}
	for (enum axis a = AXIS_CHANNEL; a <= AXIS_OUT; a++) {
		const int64_t n = (c->extent[a] + SLICE - 1) / SLICE, i = n > 0 ? slice % n : 0;

		if (!(g->apart & ALONG(a)))
			continue;
		cut(p, a, i * SLICE, smaller(SLICE, c->extent[a] - i * SLICE), 1);
		slice /= n;
	}
}

/* States of one part, in elements. */
static double state_elements(const struct check *c, const struct group *g)
{
	double sum = 0;

	for (int i = 0; i < c->list.count; i++)
		if (c->list.operand[i].role == ROLE_STATE)
			sum += (double)operand_count(&c->list.operand[i]);
	return sum / (double)(slices_of(c, g) * larger(c->extent[AXIS_SEQUENCE], 1));
}

/* Rows and keys of a part to compare, and for pairs of tokens to compute. */
static enum status pick_tokens(struct check *c, struct group *g, int64_t n_parts)
{
	const struct attention_args *a = &c->args.attention;
	const bool pairs = c->operation == OP_ATTENTION || c->operation == OP_ATTENTION_BACKWARD;
	const int64_t tokens = c->extent[AXIS_TOKEN];
	int64_t n = larger(c->options.rows / larger(n_parts, 1), FEWEST_ROWS), count, keys = 0;

	if (pairs) {
		const double each = 4.0 * (double)a->d_head * (double)a->kv_len * (double)n_parts *
		                    (c->operation == OP_ATTENTION ? 1 : 5);
		const double most = (on_host(c) ? HOST_FLOPS : DEVICE_FLOPS) / each;

		n = larger(smaller(n, most < 1e9 ? (int64_t)most : n), FEWEST_ROWS);
	}
	if (tokens <= n)
		return STATUS_OK;
	int64_t *rows = pick_rows(tokens, n, pairs && a->mask == MASK_CHUNK ? a->chunk : 0,
	                          c->options.seed, &count);
	int64_t *key_rows = rows && pairs ? malloc((size_t)count * sizeof *key_rows) : NULL;

	g->tokens = (struct row_list){count, rows};
	if (!rows || (pairs && !key_rows))
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; pairs && i < count; i++) {
		const int64_t key = attention_key_of_row(a, rows[i]);

		if (key >= 0 && (keys == 0 || key_rows[keys - 1] != key))
			key_rows[keys++] = key;
	}
	g->keys = (struct row_list){keys, key_rows};
	return STATUS_OK;
}

/* How many of `n_sequences` sequences and `slices` slices a group that is no sum looks at. */
static int64_t sampled_parts(const struct check *c, const struct group *g, int64_t n_sequences,
                             int64_t slices)
{
	const int64_t n = smaller(n_sequences * slices, MOST_PARTS);
	const double states = state_elements(c, g);

	if (states * (double)n <= KEPT_DOUBLES)
		return n;
	return larger(smaller(n, (int64_t)(KEPT_DOUBLES / states)), smaller(n, 2));
}

static enum status take_parts(struct group *g, int64_t n_parts)
{
	g->n_parts = (int)n_parts;
	g->parts = calloc((size_t)n_parts, sizeof *g->parts);
	g->kept = calloc((size_t)(n_parts * MAX_OPERANDS), sizeof *g->kept);
	return g->parts && g->kept ? STATUS_OK : status_set(STATUS_OOM, "no memory to verify with");
}

/* Sampled sequences and slices, each a part. */
static enum status make_samples(struct check *c, struct group *g)
{
	const bool by_sequence = c->list.apart & ALONG(AXIS_SEQUENCE);
	const int64_t n_sequences = by_sequence ? c->extent[AXIS_SEQUENCE] : 1;
	const int64_t slices = slices_of(c, g), n = sampled_parts(c, g, n_sequences, slices);
	int64_t picked[MOST_PARTS];
	enum status status = take_parts(g, n);

	if (status != STATUS_OK)
		return status;
	check_pick(n_sequences * slices, n, c->options.seed, picked);
	for (int64_t i = 0; i < n; i++) {
		if (by_sequence)
			cut(&g->parts[i], AXIS_SEQUENCE, picked[i] % n_sequences, 1, 1);
		cut_slice(c, g, picked[i] / n_sequences, &g->parts[i]);
	}
	return pick_tokens(c, g, n);
}

/* Rows of all tokens, in one part. */
static enum status make_rows(struct check *c, struct group *g)
{
	enum status status = take_parts(g, 1);

	g->rows = pick_rows(c->extent[AXIS_ROW], c->options.rows, 0, c->options.seed, &g->n_rows);
	if (!g->rows)
		return status_set(STATUS_OOM, "no memory to verify with");
	if (status == STATUS_OK)
		cut(&g->parts[0], AXIS_ROW, 0, g->n_rows, 1);
	return status;
}

/* Two slices, of each all sequences or rows, block by block: they add up. */
static enum status make_sums(struct check *c, struct group *g)
{
	const enum axis axis = g->sums ? AXIS_SEQUENCE : AXIS_ROW;
	const int64_t total = c->extent[axis], tokens = larger(c->extent[AXIS_TOKEN], 1);
	const int64_t block = g->sums ? larger(TOKEN_BLOCK / tokens, 1) : ROW_BLOCK;
	const int64_t slices = slices_of(c, g), n = smaller(slices, g->sums ? 2 : 1);
	int64_t picked[2];

	g->blocks = (int)((total + block - 1) / block);
	enum status status = take_parts(g, n * g->blocks);
	if (status != STATUS_OK)
		return status;
	check_pick(slices, n, c->options.seed, picked);
	for (int64_t i = 0; i < n * g->blocks; i++) {
		const int64_t first = i % g->blocks * block;

		cut(&g->parts[i], axis, first, smaller(block, total - first), 1);
		cut_slice(c, g, picked[i / g->blocks], &g->parts[i]);
	}
	return STATUS_OK;
}

static enum status make_parts(struct check *c, struct group *g, bool whole)
{
	g->blocks = 1;
	if (whole)
		return take_parts(g, 1);
	if (g->sums || g->sums_rows)
		return make_sums(c, g);
	return c->list.apart & ALONG(AXIS_ROW) ? make_rows(c, g) : make_samples(c, g);
}

/* ---- a part, computed again ---- */

/* Where a part of an operand lies in the whole tensor. */
static struct gather gather_part(const struct check *c, const struct group *g, const struct part *p,
                                 const struct operand *o)
{
	const enum dtype dtype = operand_dtype(o, c->device);
	struct gather gather = {.dtype = dtype, .listed = -1};
	int64_t offset = 0;

	for (int i = 0; i < OPERAND_DIMS; i++) {
		const enum axis a = o->axis[i];

		gather.size[i] = o->size[i];
		gather.stride[i] = o->stride[i];
		if (a == AXIS_INNER || !p->cut[a])
			continue;
		gather.size[i] = p->count[a];
		if (a == AXIS_ROW && g->rows) {
			gather.list = g->rows;
			gather.listed = i;
			continue;
		}
		offset += p->first[a] * o->stride[i];
		gather.stride[i] *= p->step[a];
	}
	gather.from = (const char *)operand_data(o) + (size_t)offset * dtype_size(dtype);
	return gather;
}

static int64_t gather_count(const struct gather *g)
{
	return g->size[0] * g->size[1] * g->size[2] * g->size[3];
}

/* Keeps the rows of AXIS_TOKEN or AXIS_KEY that are compared. */
static void keep_rows(const struct group *g, const struct operand *o, struct gather *gather)
{
	for (int i = 0; i < OPERAND_DIMS; i++) {
		const struct row_list *list = o->axis[i] == AXIS_TOKEN ? &g->tokens
		                              : o->axis[i] == AXIS_KEY ? &g->keys
		                                                       : NULL;

		if (!list || !list->rows || gather->list)
			continue;
		gather->list = list->rows;
		gather->listed = i;
		gather->size[i] = list->count;
	}
}

static size_t gather_bytes(const struct gather *g)
{
	return (size_t)gather_count(g) * (g->dtype == DTYPE_I32 ? sizeof(int32_t) : sizeof(double));
}

/* Gathers into memory of the host. */
static enum status gather_to_host(struct device *device, const struct gather *gather, void *to)
{
	const size_t bytes = gather_bytes(gather);
	void *dense = NULL;
	enum status status = device_allocate(device, bytes + 1, &dense);
	if (status == STATUS_OK)
		status = device_gather(device, gather, dense);
	if (status == STATUS_OK)
		status = device_download(device, to, dense, bytes);
	device_release(device, dense);
	return status;
}

/* Elements of a tensor to the host, as doubles. */
static enum status fetch(struct device *device, const struct gather *gather, double **host)
{
	const int64_t count = gather_count(gather);

	*host = malloc((size_t)count * sizeof **host + 1);
	if (!*host)
		return status_set(STATUS_OOM, "no memory to verify with");
	enum status status = gather_to_host(device, gather, *host);
	/* From the last on: each takes the place of two. */
	for (int64_t i = count - 1; gather->dtype == DTYPE_I32 && status == STATUS_OK && i >= 0;
	     i--)
		(*host)[i] = ((const int32_t *)(const void *)*host)[i];
	return status;
}

/* Whether the run may overwrite an operand that the reference reads. A position moves on. */
static bool is_kept(const struct check *c, const struct operand *o)
{
	const bool read = o->role == ROLE_INPUT || o->role == ROLE_PARAMETER;

	if (!operand_data(o))
		return false;
	if (o->element == ELEMENT_INT32)
		return operand_is_position(o);
	return o->role == ROLE_STATE || (c->options.in_place && read);
}

/* The small problem: its arguments and operands, dense and fp64, in memory of `place`. */
struct subproblem {
	union any_args args;
	struct operand_list list;
	void *memory[MAX_OPERANDS];
};

static void subproblem_free(const struct check *c, struct subproblem *s)
{
	for (int i = 0; i < s->list.count; i++)
		if (s->memory[i])
			device_release(c->place, s->memory[i]);
}

/* Fills operand i of a part: what is read with what is there, or was before the run; what is
 * written with NaN. */
static enum status fill_operand(const struct check *c, const struct group *g, int part, int i,
                                struct subproblem *s)
{
	const struct operand *o = &c->list.operand[i];
	const bool integer = o->element == ELEMENT_INT32;
	const double *kept = g->kept[part * MAX_OPERANDS + i];
	const struct gather gather = gather_part(c, g, &g->parts[part], o);
	const size_t bytes = gather_bytes(&gather);
	enum status status = device_allocate(c->place, bytes + 1, &s->memory[i]);

	if (status != STATUS_OK)
		return status;
	operand_set(&s->list.operand[i], s->memory[i]);
	if (kept && integer) {
		const int32_t position = (int32_t)*kept;

		return device_upload(c->place, s->memory[i], &position, sizeof position);
	}
	if (kept)
		return device_upload(c->place, s->memory[i], kept, bytes);
	if (operand_is_read(o) && (o->role != ROLE_STATE || integer))
		return c->place == c->device ? device_gather(c->device, &gather, s->memory[i])
		                             : gather_to_host(c->device, &gather, s->memory[i]);
	return device_fill(c->place, s->memory[i], 0xff, bytes);
}

static enum status compute_part(const struct check *c, const struct group *g, int part,
                                struct subproblem *s)
{
	const struct part *p = &g->parts[part];
	struct device reference = *c->reference;
	enum status status = STATUS_OK;

	*s = (struct subproblem){.args = c->args};
	operation_describe(c->operation, &s->args, &s->list);
	if (s->list.first_head && p->cut[AXIS_HEAD])
		*s->list.first_head += p->first[AXIS_HEAD];
	for (enum axis a = 0; a < N_AXES; a++)
		if (p->cut[a] && s->list.extent[a])
			*s->list.extent[a] = p->count[a];
	operation_describe(c->operation, &s->args, &s->list);
	for (int i = 0; i < s->list.count && status == STATUS_OK; i++)
		if (operand_data(&c->list.operand[i]))
			status = fill_operand(c, g, part, i, s);
	/* What follows from another operand's place. */
	operation_describe(c->operation, &s->args, &s->list);
	reference.rows = g->tokens.rows ? &g->tokens : NULL;
	if (status == STATUS_OK)
		status = c->kernel->run(&reference, &s->args, NULL);
	return status;
}

/* ---- comparisons ---- */

static double length_of(int64_t width, const double *row)
{
	double sum = 0;

	for (int64_t i = 0; i < width; i++)
		sum += row[i] * row[i];
	return sqrt(sum);
}

static double distance(int64_t width, const double *a, const double *b)
{
	double sum = 0;

	for (int64_t i = 0; i < width; i++)
		sum += (a[i] - b[i]) * (a[i] - b[i]);
	return sqrt(sum);
}

static double relative(double error, double length)
{
	if (!isfinite(error) || !isfinite(length))
		return INFINITY;
	return error == 0 ? 0 : error / length;
}

/* Rows [n, width] of an output as it is, as it should be, and what was added to both, or NULL. */
struct rows {
	const char *name;
	int64_t n, width;
	double *actual, *expected, *base;
	double unit;  /* half a unit in the last place of the output's type */
	double least; /* root mean square of elements that count as nothing but cancellation */
};

/* Takes the base out of both; *slack [n]: what rounding the sums may have cost. */
static void take_base_out(struct rows *x, double *slack)
{
	for (int64_t i = 0; i < x->n; i++) {
		double *a = x->actual + i * x->width, *e = x->expected + i * x->width;

		slack[i] = x->unit * length_of(x->width, a);
		for (int64_t j = 0; j < x->width; j++) {
			a[j] -= x->base[i * x->width + j];
			e[j] -= x->base[i * x->width + j];
		}
	}
}

/*
 * A row's error is held against its own length, or a part of the rows' root mean square where that
 * is more: a row that is nothing but cancellation must not count. Narrow rows cancel more easily.
 */
static void compare_rows(const struct rows *x, const double *slack, bool tolerant,
                         struct check_result *result)
{
	const double total = length_of(x->n * x->width, x->expected);
	const double part = fmin(1, fmax(tolerant ? 0.1 : 0.01, 4.0 / (double)x->width));
	const double least = x->least * sqrt((double)x->width);
	const double floor = fmax(part * total / sqrt((double)larger(x->n, 1)), least);
	double worst = 0, squares = 0;

	for (int64_t i = 0; i < x->n; i++) {
		const double *e = x->expected + i * x->width;
		double error = distance(x->width, x->actual + i * x->width, e);

		if (isfinite(error) && slack)
			error = fmax(error - slack[i], 0);
		check_raise(&worst, relative(error, fmax(length_of(x->width, e), floor)));
		squares += error * error;
	}
	const double overall = relative(sqrt(squares), fmax(total, least * sqrt((double)x->n)));
	if (!(worst <= result->worst_row))
		result->name = x->name;
	check_raise(&result->worst_row, worst);
	check_raise(&result->overall, overall);
}

/* Tokens and positions are right or wrong. */
static void compare_integers_of(const struct rows *x, struct check_result *result)
{
	for (int64_t i = 0; i < x->n * x->width; i++)
		if (x->expected[i] != x->actual[i]) {
			result->worst_row = result->overall = INFINITY;
			result->name = x->name;
		}
}

/* Every NaN of the reference must be there. */
static void compare_nans(const struct rows *x, struct check_result *result)
{
	for (int64_t i = 0; i < x->n * x->width; i++)
		if (isnan(x->expected[i]) && !isnan(x->actual[i])) {
			result->worst_row = result->overall = INFINITY;
			result->name = x->name;
			return;
		}
}

/*
 * Of a state only what the reference has changed is compared; the rest must be as it was, to the
 * bit: it may be a slot that nobody has ever filled. Without `before` the reference began with NaN.
 * Rows that are left alone become equal.
 */
static void settle_unchanged(struct rows *x, const double *before, struct check_result *result)
{
	for (int64_t i = 0; i < x->n * x->width; i++) {
		const bool left_alone =
		        before ? memcmp(&before[i], &x->expected[i], sizeof *before) == 0
		               : isnan(x->expected[i]);

		if (!left_alone)
			continue;
		if (before &&
		    !(x->actual[i] == before[i] || (isnan(x->actual[i]) && isnan(before[i])))) {
			result->worst_row = result->overall = INFINITY;
			result->name = x->name;
		}
		x->actual[i] = x->expected[i] = 0;
	}
}

static enum status compare(const struct check *c, const struct operand *o, struct rows *x,
                           const double *before, struct check_result *result)
{
	double *slack = NULL;

	if (o->role == ROLE_STATE)
		settle_unchanged(x, before, result);
	if (c->options.with_nan) {
		compare_nans(x, result);
		return STATUS_OK;
	}
	if (o->element == ELEMENT_INT32) {
		compare_integers_of(x, result);
		return STATUS_OK;
	}
	if (x->base) {
		slack = malloc((size_t)x->n * sizeof *slack + 1);
		if (!slack)
			return status_set(STATUS_OOM, "no memory to verify with");
		take_base_out(x, slack);
	}
	compare_rows(x, slack, c->options.tolerant, result);
	free(slack);
	return STATUS_OK;
}

/* The operand of this name, or NULL. */
static const struct operand *named(const struct check *c, const char *name)
{
	for (int i = 0; name && i < c->list.count; i++)
		if (operand_is(&c->list.operand[i], name) && operand_data(&c->list.operand[i]))
			return &c->list.operand[i];
	return NULL;
}

/* The rows that are compared of an input, as it was before the run if that may have changed it. */
static enum status fetch_input(const struct check *c, const struct group *g, int part,
                               const struct operand *o, double **values, int64_t *count)
{
	const double *kept = g->kept[part * MAX_OPERANDS + (o - c->list.operand)];
	struct gather from = gather_part(c, g, &g->parts[part], o);

	if (!kept)
		keep_rows(g, o, &from);
	*count = gather_count(&from);
	if (!kept)
		return fetch(c->device, &from, values);
	*values = malloc((size_t)*count * sizeof **values + 1);
	if (!*values)
		return status_set(STATUS_OOM, "no memory to verify with");
	memcpy(*values, kept, (size_t)*count * sizeof **values);
	return STATUS_OK;
}

/* terms times the root mean squares of the inputs whose product an output is held against. */
static enum status find_least(const struct check *c, const struct group *g, int part,
                              const struct operand *o, double *least)
{
	for (const char *name = o->against; name; name = strchr(name, '*')) {
		char one[32];
		double *values = NULL;
		int64_t count = 0;

		name += *name == '*';
		snprintf(one, sizeof one, "%.*s", (int)strcspn(name, "*"), name);
		const struct operand *against = named(c, one);

		if (!against)
			return STATUS_OK;
		TRY(fetch_input(c, g, part, against, &values, &count));
		*least = name == o->against ? o->terms : *least;
		*least *= count > 0 ? length_of(count, values) / sqrt((double)count) : 0;
		free(values);
	}
	return STATUS_OK;
}

/* Output i of a part that was computed, or of the sum of all, against what is there. */
static enum status compare_output(const struct check *c, const struct group *g, int part, int i,
                                  const struct subproblem *s, double *sum,
                                  struct check_result *result)
{
	const struct operand *o = &c->list.operand[i], *base = named(c, o->base);
	const struct operand *computed = &s->list.operand[i];
	struct gather actual = gather_part(c, g, &g->parts[part], o);
	struct gather expected = {.dtype = o->element == ELEMENT_INT32 ? DTYPE_I32 : DTYPE_F64,
	                          .listed = -1,
	                          .from = operand_data(computed)};
	struct rows x = {.name = o->name,
	                 .unit = operand_dtype(o, c->device) == DTYPE_BF16 ? 0x1p-9 : 0x1p-24};
	double *before = NULL;
	int64_t count;
	enum status status;

	memcpy(expected.size, computed->size, sizeof expected.size);
	memcpy(expected.stride, computed->stride, sizeof expected.stride);
	if (o->role != ROLE_STATE && !sum) {
		keep_rows(g, o, &actual);
		keep_rows(g, o, &expected);
	}
	x.width = expected.size[OPERAND_DIMS - 1];
	x.n = gather_count(&expected) / larger(x.width, 1);
	status = fetch(c->device, &actual, &x.actual);
	if (status == STATUS_OK && !sum)
		status = fetch(c->place, &expected, &x.expected);
	if (status == STATUS_OK && base)
		status = fetch_input(c, g, part, base, &x.base, &count);
	if (status == STATUS_OK)
		status = find_least(c, g, part, o, &x.least);
	if (status == STATUS_OK && o->role == ROLE_STATE)
		before = g->kept[part * MAX_OPERANDS + i];
	x.expected = sum ? sum : x.expected;
	if (status == STATUS_OK)
		status = compare(c, o, &x, before, result);
	free(x.actual);
	free(x.base);
	if (!sum)
		free(x.expected);
	return status;
}

/* Adds output i of a part to the sum of all, which it begins if there is none. */
static enum status add_to_sum(const struct check *c, const struct subproblem *s, int i,
                              double **sum)
{
	const struct operand *o = &s->list.operand[i];
	const size_t count = (size_t)operand_count(o);
	double *more = malloc(count * sizeof *more + 1);
	enum status status =
	        more ? device_download(c->place, more, operand_data(o), count * sizeof *more)
	             : status_set(STATUS_OOM, "no memory to verify with");

	if (status == STATUS_OK && *sum)
		for (size_t j = 0; j < count; j++)
			(*sum)[j] += more[j];
	if (status != STATUS_OK || *sum)
		free(more);
	else
		*sum = more;
	return status;
}

static enum status check_group(const struct check *c, const struct group *g,
                               struct check_result *result)
{
	double *sums[MAX_OPERANDS] = {0};
	enum status status = STATUS_OK;

	for (int part = 0; part < g->n_parts && status == STATUS_OK; part++) {
		struct subproblem s;
		const bool last = (part + 1) % g->blocks == 0;

		status = compute_part(c, g, part, &s);
		for (int j = 0; j < g->n_outputs && status == STATUS_OK; j++) {
			const int i = g->outputs[j];

			if (g->blocks > 1)
				status = add_to_sum(c, &s, i, &sums[i]);
			if (status == STATUS_OK && last)
				status = compare_output(c, g, part, i, &s, sums[i], result);
			if (last) {
				free(sums[i]);
				sums[i] = NULL;
			}
		}
		subproblem_free(c, &s);
	}
	for (int i = 0; i < MAX_OPERANDS; i++)
		free(sums[i]);
	return status;
}

/* ---- NaN and Inf, anywhere ---- */

static enum status check_finite(const struct check *c, const struct operand *o,
                                struct check_result *result)
{
	struct gather all = {
	        .dtype = operand_dtype(o, c->device), .from = operand_data(o), .listed = -1};
	int64_t n = 0;

	memcpy(all.size, o->size, sizeof all.size);
	memcpy(all.stride, o->stride, sizeof all.stride);
	enum status status = c->device->backend->count_nonfinite(c->device, &all, &n);

	if (n > 0) {
		result->worst_row = result->overall = INFINITY;
		result->name = o->name;
	}
	return status;
}

/* ---- from the outside ---- */

/* The operation's kernel on that device, or NULL. */
static const struct kernel *kernel_of(struct device *reference, enum operation operation,
                                      const void *args)
{
	for (const struct kernel *k = reference ? reference->kernels : NULL; k && k->run; k++)
		if (k->operation == operation &&
		    !(k->unsupported && k->unsupported(reference, args)))
			return k;
	return NULL;
}

/* Chooses where parts are computed. */
static void find_reference(struct check *c)
{
	c->place = c->device;
	c->reference = c->device->reference;
	c->kernel = kernel_of(c->reference, c->operation, &c->args);
	if (c->kernel)
		return;
	c->host = (struct device){.backend = &cpu_backend,
	                          .activation = DTYPE_F64,
	                          .wide = DTYPE_F64,
	                          .kernels = reference_kernels};
	c->place = c->reference = &c->host;
	c->kernel = kernel_of(c->reference, c->operation, &c->args);
}

static enum status keep_operands(const struct check *c, struct group *g)
{
	enum status status = STATUS_OK;

	for (int part = 0; part < g->n_parts; part++)
		for (int i = 0; i < c->list.count && status == STATUS_OK; i++) {
			const struct operand *o = &c->list.operand[i];

			if (!is_kept(c, o))
				continue;
			const struct gather gather = gather_part(c, g, &g->parts[part], o);
			status = fetch(c->device, &gather, &g->kept[part * MAX_OPERANDS + i]);
		}
	return status;
}

enum status check_begin(struct check **check, struct device *device, enum operation operation,
                        const void *args, const struct check_options *options)
{
	struct check *c = calloc(1, sizeof *c);
	enum status status = STATUS_OK;

	*check = c;
	if (!c)
		return status_set(STATUS_OOM, "no memory to verify with");
	c->device = device;
	c->operation = operation;
	c->options = *options;
	memcpy(&c->args, args, operation_describes(operation)->args_size);
	operation_describe(operation, &c->args, &c->list);
	for (enum axis a = 0; a < N_AXES; a++)
		c->extent[a] = c->list.extent[a] ? *c->list.extent[a] : 0;
	for (int i = 0; i < c->list.count; i++)
		for (int j = 0; j < OPERAND_DIMS; j++)
			if (c->list.operand[i].axis[j] == AXIS_TOKEN)
				c->extent[AXIS_TOKEN] = c->list.operand[i].size[j];
	find_reference(c);
	const bool whole = options->everything || (is_small(c) && !options->parts);
	make_groups(c, whole);
	for (int i = 0; i < c->n_groups && status == STATUS_OK; i++) {
		status = make_parts(c, &c->groups[i], whole);
		if (status == STATUS_OK)
			status = keep_operands(c, &c->groups[i]);
	}
	return status;
}

enum status check_end(struct check *c, struct check_result *result)
{
	enum status status = STATUS_OK;

	for (int i = 0; i < c->list.count && status == STATUS_OK && !c->options.with_nan; i++) {
		const struct operand *o = &c->list.operand[i];

		if (is_judged(c, i) && o->role != ROLE_STATE && o->element != ELEMENT_INT32)
			status = check_finite(c, o, result);
	}
	for (int i = 0; i < c->n_groups && status == STATUS_OK; i++)
		status = check_group(c, &c->groups[i], result);
	return status;
}

void check_free(struct check *c)
{
	if (!c)
		return;
	for (int i = 0; i < c->n_groups; i++) {
		struct group *g = &c->groups[i];

		for (int j = 0; g->kept && j < g->n_parts * MAX_OPERANDS; j++)
			free(g->kept[j]);
		free(g->kept);
		free(g->parts);
		free(g->rows);
		free((void *)g->tokens.rows);
		free((void *)g->keys.rows);
	}
	free(c);
}

enum status check_operation(struct device *device, enum operation operation, const void *args,
                            const struct check_options *options, struct check_result *result)
{
	struct check *check;
	enum status status = check_begin(&check, device, operation, args, options);

	if (status == STATUS_OK)
		status = check_end(check, result);
	check_free(check);
	return status;
}
