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
	MOST_PARTS = 8,      /* of an output that is not a sum */
	FEWEST_ROWS = 16,    /* of a part */
	SLICE = 64,          /* channels, or columns of a product, that are looked at together */
	PART = 1 << 23,      /* elements of a part of a sequence that can be cut, about */
	ROW_BLOCK = 4096,    /* rows of a sum that are computed together at least, */
	TOKEN_BLOCK = 65536, /* and tokens of sequences */
	KEPT_DOUBLES = 32 << 20, /* of states before a run; two parts in any case */
	TOKENS_IN_TURN = 1 << 19 /* that the reference takes one by one, likewise */
};

/* What the reference may cost on the host, where nothing else can compute. */
static const double HOST_FLOPS = 4e9, DEVICE_FLOPS = 2e11;
/* Elements of all operands of a problem that is computed again as a whole, or of rows that are
 * computed together. */
static const double HOST_ELEMENTS = 1 << 22, DEVICE_ELEMENTS = 1 << 24;

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
	bool ends;            /* what a sequence leaves behind */
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
	double rounding;        /* by which inputs of a probe are off */
	bool rounds_scores;     /* the kernel that is checked */
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
			g.ends = c->list.token_step > 0 && !g.sums && !has_axis(o, AXIS_TOKEN) &&
			         !has_axis(o, AXIS_KEY);
			/* Rows that are looked at are looked at as a whole. */
			if (!(apart & ALONG(AXIS_ROW)) || g.sums_rows)
				g.apart = o->apart & ~ALONG(AXIS_SEQUENCE);
			/* Heads and what they belong to are cut together. */
			if (g.apart & groups)
				g.apart = (g.apart & ~groups) | ALONG(AXIS_HEAD);
		}
		while (j < c->n_groups &&
		       (c->groups[j].apart != g.apart || c->groups[j].sums != g.sums ||
		        c->groups[j].sums_rows != g.sums_rows || c->groups[j].ends != g.ends))
			j++;
		if (j == c->n_groups && c->n_groups < MAX_GROUPS)
			c->groups[c->n_groups++] = g;
		j = j < MAX_GROUPS ? j : MAX_GROUPS - 1;
		c->groups[j].outputs[c->groups[j].n_outputs++] = i;
	}
}

/* Sets of heads that outputs are sums over: those of a group or, where there are fewer, of a key
 * head; else every head is one. */
static int64_t head_sets(const struct check *c, const struct group *g)
{
	const int64_t *n = c->extent;
	int64_t sets = n[AXIS_HEAD];
	bool sums = false;

	for (int i = 0; i < g->n_outputs; i++) {
		const struct operand *o = &c->list.operand[g->outputs[i]];

		sums = sums || has_axis(o, AXIS_GROUP) || has_axis(o, AXIS_KV_HEAD);
	}
	for (enum axis a = AXIS_GROUP; a <= AXIS_KV_HEAD && sums && c->list.sums_groups; a++)
		sets = n[a] > 0 ? smaller(n[a], sets) : sets;
	return sets;
}

/* Slices along the cut axes other than SEQUENCE and ROW: how many there are. */
static int64_t slices_of(const struct check *c, const struct group *g)
{
	int64_t slices = 1;

	if (g->apart & ALONG(AXIS_HEAD))
		slices *= head_sets(c, g);
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
static void cut_head_set(const struct check *c, int64_t set, int64_t sets, struct part *p)
{
	const int64_t heads = c->extent[AXIS_HEAD], groups = c->extent[AXIS_GROUP];
	const int64_t kv_heads = c->extent[AXIS_KV_HEAD], n = heads / sets;
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
		const int64_t sets = head_sets(c, g);

		cut_head_set(c, slice % sets, sets, p);
		slice /= sets;
	}
	for (enum axis a = AXIS_CHANNEL; a <= AXIS_OUT; a++) {
		const int64_t n = (c->extent[a] + SLICE - 1) / SLICE, i = n > 0 ? slice % n : 0;

		if (!(g->apart & ALONG(a)))
			continue;
		cut(p, a, i * SLICE, smaller(SLICE, c->extent[a] - i * SLICE), 1);
		slice /= n;
	}
}

/* Whether rows of tokens can be computed apart from those before. */
static bool is_of_pairs(const struct check *c)
{
	return c->operation == OP_ATTENTION || c->operation == OP_ATTENTION_BACKWARD;
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
	const bool pairs = is_of_pairs(c);
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

/* Tokens of a part of a sequence; all, or more, where it is not cut. */
static int64_t span_of(const struct check *c, const struct group *g)
{
	const int64_t step = c->list.token_step, tokens = larger(c->extent[AXIS_TOKEN], 1);
	const double sequences = (double)(larger(c->extent[AXIS_SEQUENCE], 1) * slices_of(c, g));
	const double of_token = all_elements(&c->list) / (sequences * (double)tokens);

	if (step == 0)
		return tokens;
	return larger(c->options.parts ? 1 : (int64_t)(PART / of_token / (double)step), 1) * step;
}

/* Range number `range` of n_ranges of a sequence; the last ends where the sequence does. */
static void cut_tokens(const struct check *c, int64_t span, int64_t range, int64_t n_ranges,
                       struct part *p)
{
	const int64_t step = c->list.token_step, tokens = c->extent[AXIS_TOKEN];
	const int64_t last = divide_up(tokens, step) * step - span;
	const int64_t first = range == n_ranges - 1 ? last : range * span;
	const int64_t count = smaller(span, tokens - first);

	cut(p, AXIS_TOKEN, first, count, 1);
	cut(p, AXIS_KEY, first / step, divide_up(count, step), 1);
}

/* How many of the `different` parts there are a group that is no sum looks at. */
static int64_t sampled_parts(const struct check *c, const struct group *g, int64_t different)
{
	const int64_t tokens = larger(smaller(c->extent[AXIS_TOKEN], span_of(c, g)), 1);
	const int64_t in_turn = is_of_pairs(c) ? MOST_PARTS : larger(TOKENS_IN_TURN / tokens, 2);
	const int64_t n = smaller(different, smaller(in_turn, MOST_PARTS));
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
	const int64_t slices = slices_of(c, g), span = span_of(c, g);
	const int64_t n_ranges = divide_up(larger(c->extent[AXIS_TOKEN], 1), span);
	const int64_t different = n_sequences * slices * (g->ends ? 1 : n_ranges);
	const int64_t n = sampled_parts(c, g, different);
	int64_t picked[MOST_PARTS];
	enum status status = take_parts(g, n);

	if (status != STATUS_OK)
		return status;
	check_pick(different, n, c->options.seed, picked);
	for (int64_t i = 0; i < n; i++) {
		const int64_t range = g->ends ? n_ranges - 1 : picked[i] / n_sequences / slices;

		if (by_sequence)
			cut(&g->parts[i], AXIS_SEQUENCE, picked[i] % n_sequences, 1, 1);
		cut_slice(c, g, picked[i] / n_sequences % slices, &g->parts[i]);
		if (n_ranges > 1)
			cut_tokens(c, span, range, n_ranges, &g->parts[i]);
	}
	return n_ranges > 1 ? STATUS_OK : pick_tokens(c, g, n);
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

/* Rows of a sum that are computed together. */
static int64_t row_block(const struct check *c, const struct group *g)
{
	int64_t width = 1;

	for (int i = 0; i < c->list.count; i++) {
		const struct operand *o = &c->list.operand[i];
		int64_t w = has_axis(o, AXIS_ROW) ? 1 : 0;

		for (int d = 0; d < OPERAND_DIMS; d++)
			if (o->axis[d] != AXIS_ROW)
				w *= o->axis[d] != AXIS_INNER && g->apart & ALONG(o->axis[d])
				             ? smaller(o->size[d], SLICE)
				             : o->size[d];
		width += w;
	}
	const double most = on_host(c) ? HOST_ELEMENTS : DEVICE_ELEMENTS;

	return larger((int64_t)(most / (double)width), ROW_BLOCK);
}

/* Two slices, of each all sequences or rows, block by block: they add up. */
static enum status make_sums(struct check *c, struct group *g)
{
	const enum axis axis = g->sums ? AXIS_SEQUENCE : AXIS_ROW;
	const int64_t total = c->extent[axis], tokens = larger(c->extent[AXIS_TOKEN], 1);
	const int64_t block = g->sums ? larger(TOKEN_BLOCK / tokens, 1) : row_block(c, g);
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

/* By how much an input is off in a probe, relative to itself. Of what is added to an output
 * nothing is rounded; weights need not be off where what they are multiplied with is. */
static double jitter_of(const struct check *c, int i)
{
	const struct operand *o = &c->list.operand[i];

	if (!operand_is_read(o) || o->element == ELEMENT_INT32 ||
	    (o->role == ROLE_PARAMETER && o->element == ELEMENT_ACTIVATION))
		return 0;
	for (int j = 0; j < c->list.count; j++)
		if (c->list.operand[j].base && operand_is(o, c->list.operand[j].base))
			return 0;
	if (o->exponent)
		return c->rounds_scores ? c->rounding : ROUNDING_FP32;
	return o->element == ELEMENT_FP32 && !o->factor ? ROUNDING_FP32 : c->rounding;
}

/* What was kept, off as in a probe. */
static enum status upload_kept(const struct check *c, const double *kept,
                               const struct gather *gather, void *to)
{
	const int64_t count = gather_count(gather);
	double *values = malloc((size_t)count * sizeof *values + 1);

	if (!values)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; i < count; i++)
		values[i] = gather_jittered(gather, i, kept[i]);
	enum status status = device_upload(c->place, to, values, gather_bytes(gather));
	free(values);
	return status;
}

/* Fills operand i of a part: what is read with what is there, or was before the run, in a probe
 * off by random roundings; what is written with NaN. */
static enum status fill_operand(const struct check *c, const struct group *g, int part, int probe,
                                int i, struct subproblem *s)
{
	const struct operand *o = &c->list.operand[i];
	const bool integer = o->element == ELEMENT_INT32;
	const double *kept = g->kept[part * MAX_OPERANDS + i];
	struct gather gather = gather_part(c, g, &g->parts[part], o);
	const size_t bytes = gather_bytes(&gather);
	enum status status = device_allocate(c->place, bytes + 1, &s->memory[i]);

	if (status != STATUS_OK)
		return status;
	operand_set(&s->list.operand[i], s->memory[i]);
	if (kept && integer) {
		const int32_t position = (int32_t)*kept;

		return device_upload(c->place, s->memory[i], &position, sizeof position);
	}
	if (probe > 0) {
		gather.jitter = jitter_of(c, i);
		gather.row_jitter =
		        o->by_element && c->rounding > ROUNDING_FP32 ? 0 : gather.jitter;
		gather.absolute = o->decay ? ROUNDING_DECAY : 0;
		gather.seed = noise_bits(c->options.seed, (uint64_t)probe,
		                         (uint64_t)(part * MAX_OPERANDS + i));
	}
	if (kept)
		return upload_kept(c, kept, &gather, s->memory[i]);
	if (operand_is_read(o) && (o->role != ROLE_STATE || integer))
		return c->place == c->device ? device_gather(c->device, &gather, s->memory[i])
		                             : gather_to_host(c->device, &gather, s->memory[i]);
	return device_fill(c->place, s->memory[i], 0xff, bytes);
}

/* `probe` 0: as it is. */
static enum status compute_part(const struct check *c, const struct group *g, int part, int probe,
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
			status = fill_operand(c, g, part, probe, i, s);
	/* What follows from another operand's place. */
	operation_describe(c->operation, &s->args, &s->list);
	reference.rows = g->tokens.rows ? &g->tokens : NULL;
	reference.first_token = p->cut[AXIS_TOKEN] ? p->first[AXIS_TOKEN] : 0;
	reference.decay_jitter = probe > 0 ? ROUNDING_DECAY : 0;
	reference.decay_seed = noise_bits(c->options.seed, (uint64_t)probe, (uint64_t)part);
	if (status == STATUS_OK)
		status = c->kernel->run(&reference, &s->args, NULL);
	return status;
}

/* An output of a part as the reference has it, of a sum all of it, else the rows to compare. */
static enum status fetch_computed(const struct check *c, const struct group *g,
                                  const struct subproblem *s, int i, double **values)
{
	const struct operand *o = &c->list.operand[i], *computed = &s->list.operand[i];
	struct gather from = {.dtype = o->element == ELEMENT_INT32 ? DTYPE_I32 : DTYPE_F64,
	                      .listed = -1,
	                      .from = operand_data(computed)};

	memcpy(from.size, computed->size, sizeof from.size);
	memcpy(from.stride, computed->stride, sizeof from.stride);
	if (o->role != ROLE_STATE && g->blocks == 1)
		keep_rows(g, o, &from);
	return fetch(c->place, &from, values);
}

/* Elements of that. */
static int64_t output_count(const struct check *c, const struct group *g, int part, int i)
{
	const struct operand *o = &c->list.operand[i];
	struct gather there = gather_part(c, g, &g->parts[part], o);

	if (o->role != ROLE_STATE && g->blocks == 1)
		keep_rows(g, o, &there);
	return gather_count(&there);
}

static void free_outputs(double *outputs[MAX_OPERANDS])
{
	for (int i = 0; i < MAX_OPERANDS; i++) {
		free(outputs[i]);
		outputs[i] = NULL;
	}
}

/* The outputs of the part at `first`, or the sums of `blocks` parts from there on. */
static enum status compute_outputs(const struct check *c, const struct group *g, int first,
                                   int probe, double *outputs[MAX_OPERANDS])
{
	enum status status = STATUS_OK;

	for (int part = first; part < first + g->blocks && status == STATUS_OK; part++) {
		struct subproblem s;

		status = compute_part(c, g, part, probe, &s);
		for (int j = 0; j < g->n_outputs && status == STATUS_OK; j++) {
			const int i = g->outputs[j];
			double *more = NULL;

			status = fetch_computed(c, g, &s, i, part == first ? &outputs[i] : &more);
			for (int64_t k = 0; more && k < operand_count(&s.list.operand[i]); k++)
				outputs[i][k] += more[k];
			free(more);
		}
		subproblem_free(c, &s);
	}
	return status;
}

/* ---- comparisons ---- */

static void condemn(const struct judged *j, struct check_result *result)
{
	result->rel_err = INFINITY;
	judge_raise(result, INFINITY, j->name, "an element");
}

static int64_t judged_count(const struct judged *j)
{
	return j->size[0] * j->size[1] * j->size[2] * j->size[3];
}

/* Tokens and positions are right or wrong. */
static void compare_integers_of(const struct judged *j, struct check_result *result)
{
	for (int64_t i = 0; i < judged_count(j); i++)
		if (j->expected[i] != j->actual[i])
			condemn(j, result);
}

/* Every NaN of the reference must be there. */
static void compare_nans(const struct judged *j, struct check_result *result)
{
	for (int64_t i = 0; i < judged_count(j); i++)
		if (isnan(j->expected[i]) && !isnan(j->actual[i]))
			condemn(j, result);
}

/*
 * Of a state only what the reference has changed is compared; the rest must be as it was, to the
 * bit: it may be a slot that nobody has ever filled. Without `before` the reference began with NaN.
 * Rows that are left alone become equal.
 */
static void settle_unchanged(struct judged *j, const double *before, struct check_result *result)
{
	for (int64_t i = 0; i < judged_count(j); i++) {
		const bool left_alone =
		        before ? memcmp(&before[i], &j->expected[i], sizeof *before) == 0
		               : isnan(j->expected[i]);

		if (!left_alone)
			continue;
		if (before &&
		    !(j->actual[i] == before[i] || (isnan(j->actual[i]) && isnan(before[i]))))
			condemn(j, result);
		j->actual[i] = j->expected[i] = 0;
		for (int r = 0; r < j->n_responses; r++)
			j->response[r][i] = 0;
	}
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
                               const struct operand *o, double **values)
{
	const double *kept = g->kept[part * MAX_OPERANDS + (o - c->list.operand)];
	struct gather from = gather_part(c, g, &g->parts[part], o);

	if (!kept) {
		keep_rows(g, o, &from);
		return fetch(c->device, &from, values);
	}
	*values = malloc((size_t)gather_count(&from) * sizeof **values + 1);
	if (!*values)
		return status_set(STATUS_OOM, "no memory to verify with");
	memcpy(*values, kept, (size_t)gather_count(&from) * sizeof **values);
	return STATUS_OK;
}

/* What the fp32 of kernels may lose of an element: more of a long sum, which tensor cores truncate
 * after every few terms. */
static double lost_in_sums(const struct check *c, const struct operand *o)
{
	const int64_t *extent = c->extent;
	const int64_t tokens = larger(larger(extent[AXIS_TOKEN], extent[AXIS_KEY]), 1);
	const int64_t terms = o->role == ROLE_GRADIENT ? tokens * larger(extent[AXIS_SEQUENCE], 1) *
	                                                         larger(extent[AXIS_ROW], 1)
	                      : o->exact ? 1
	                                 : tokens;

	const double lost = fmax((double)terms * LOST_PER_TERM, ROUNDING_FP32);

	return o->role == ROLE_GRADIENT ? lost : fmin(lost, MOST_LOST);
}

/* The operand of the logarithms of decays, or NULL. */
static const struct operand *log_decay_of(const struct check *c)
{
	for (int i = 0; i < c->list.count; i++)
		if (c->list.operand[i].decay && operand_is_read(&c->list.operand[i]))
			return &c->list.operand[i];
	return NULL;
}

/* alike [heads of the part]: what each channel's mean decay asks for, of the channel that asks for
 * most. */
static enum status alike_of_data(const struct check *c, const struct group *g, int part,
                                 const struct operand *decay, double *alike)
{
	struct gather there = gather_part(c, g, &g->parts[part], decay);
	double *values = NULL;
	enum status status = fetch_input(c, g, part, decay, &values);

	if (!g->kept[part * MAX_OPERANDS + (decay - c->list.operand)])
		keep_rows(g, decay, &there);
	const int64_t n = there.size[0] * there.size[1], heads = there.size[2], w = there.size[3];
	for (int64_t i = 0; i < heads * w && status == STATUS_OK; i++) {
		double sum = 0;

		for (int64_t j = 0; j < n; j++)
			sum += fabs(values[j * heads * w + i]);
		alike[i / w] = fmax(alike[i / w], judge_alike(sum / (double)n));
	}
	free(values);
	return status;
}

/* judged.alike of an output, in new memory, where a state in bf16 decays. */
static enum status find_alike(const struct check *c, const struct group *g, int part,
                              const struct operand *o, struct judged *j)
{
	const struct operand *decay = log_decay_of(c);
	const struct part *p = &g->parts[part];
	const bool cut = p->cut[AXIS_HEAD];
	const int64_t heads = cut ? p->count[AXIS_HEAD] : c->extent[AXIS_HEAD];
	enum status status = STATUS_OK;

	if (!j->carries || heads == 0 || (!decay && !c->list.log_decay_of_head))
		return STATUS_OK;
	j->alike = calloc((size_t)heads, sizeof *j->alike);
	if (!j->alike)
		return status_set(STATUS_OOM, "no memory to verify with");
	for (int64_t i = 0; i < heads && !decay; i++)
		j->alike[i] = judge_alike(c->list.log_decay_of_head(
		        *c->list.first_head +
		        (cut ? p->first[AXIS_HEAD] + i * p->step[AXIS_HEAD] : i)));
	if (decay)
		status = alike_of_data(c, g, part, decay, j->alike);
	j->heads = -1;
	for (int d = 0; d < OPERAND_DIMS; d++)
		if (o->axis[d] == AXIS_HEAD && j->size[d] == heads)
			j->heads = d;
	for (int64_t i = 1; i < heads && j->heads < 0; i++)
		j->alike[0] = fmax(j->alike[0], j->alike[i]);
	/* Of all but a state queries are a factor as well, or gradients, rounded like keys. */
	for (int64_t i = 0; i < heads && has_axis(o, AXIS_TOKEN); i++)
		j->alike[i] *= 2;
	return status;
}

/* The dimension of an output along which faults begin: its tokens, rows or keys; else the first. */
static int position_of(const struct operand *o)
{
	static const enum axis axes[] = {AXIS_TOKEN, AXIS_ROW, AXIS_KEY};
	int first = 0;

	for (size_t a = 0; a < sizeof axes / sizeof *axes; a++)
		for (int d = 0; d < OPERAND_DIMS; d++)
			if (o->axis[d] == axes[a] && o->size[d] > 1)
				return d;
	while (first < OPERAND_DIMS - 1 && o->size[first] == 1)
		first++;
	return first;
}

/* What the outputs of a part, or of a sum, are as the reference has them: as its inputs are, and in
 * probes. */
struct computed {
	int n_probes;
	double *outputs[1 + MAX_RESPONSES][MAX_OPERANDS];
};

/* Output i against what is there. Takes x->outputs apart: a probe's becomes the response. */
static enum status compare_output(const struct check *c, const struct group *g, int part, int i,
                                  const struct computed *x, struct check_result *result)
{
	const struct operand *o = &c->list.operand[i], *base = named(c, o->base);
	struct gather actual = gather_part(c, g, &g->parts[part], o);
	struct judged j = {.name = o->name,
	                   .position = position_of(o),
	                   .dtype = operand_dtype(o, c->device),
	                   .scale = o->exact ? ROUNDING_FP32 / c->rounding : 1,
	                   .lost = lost_in_sums(c, o),
	                   .summed = o->summed,
	                   .carries = !o->exact && c->device->activation == DTYPE_BF16 &&
	                              c->extent[AXIS_TOKEN] > 0,
	                   .n_responses = x->n_probes};
	enum status status;

	if (o->role != ROLE_STATE && g->blocks == 1)
		keep_rows(g, o, &actual);
	memcpy(j.size, actual.size, sizeof j.size);
	status = fetch(c->device, &actual, &j.actual);
	const int64_t count = judged_count(&j);
	j.expected = malloc((size_t)count * sizeof *j.expected + 1);
	if (status == STATUS_OK && !j.expected)
		status = status_set(STATUS_OOM, "no memory to verify with");
	if (status == STATUS_OK && base)
		status = fetch_input(c, g, part, base, &j.base);
	if (status == STATUS_OK)
		status = find_alike(c, g, part, o, &j);
	if (status == STATUS_OK) {
		memcpy(j.expected, x->outputs[0][i], (size_t)count * sizeof *j.expected);
		for (int r = 0; r < j.n_responses; r++)
			j.response[r] = x->outputs[1 + r][i];
		if (o->role == ROLE_STATE)
			settle_unchanged(&j, g->kept[part * MAX_OPERANDS + i], result);
		if (c->options.with_nan)
			compare_nans(&j, result);
		else if (o->element == ELEMENT_INT32)
			compare_integers_of(&j, result);
		else
			status = judge(&j, result);
	}
	free(j.actual);
	free(j.expected);
	free(j.base);
	free(j.alike);
	return status;
}

/* One more probe: how the outputs answer to it. */
static enum status probe(const struct check *c, const struct group *g, int first,
                         struct computed *x)
{
	double **answer = x->outputs[1 + x->n_probes];
	enum status status = compute_outputs(c, g, first, 1 + x->n_probes, answer);

	if (status != STATUS_OK)
		return status;
	x->n_probes++;
	for (int j = 0; j < g->n_outputs; j++) {
		const int i = g->outputs[j];
		const int64_t count = output_count(c, g, first, i);

		for (int64_t k = 0; k < count; k++)
			answer[i][k] -= x->outputs[0][i][k];
	}
	return STATUS_OK;
}

static enum status compare_outputs(const struct check *c, const struct group *g, int first,
                                   const struct computed *x, struct check_result *result)
{
	enum status status = STATUS_OK;

	for (int j = 0; j < g->n_outputs && status == STATUS_OK; j++)
		status = compare_output(c, g, first + g->blocks - 1, g->outputs[j], x, result);
	return status;
}

/*
 * A part, or parts that add up. One probe says what is allowed; where that is not enough, which may
 * be by chance, others are asked as well.
 */
static enum status check_parts(const struct check *c, const struct group *g, int first,
                               struct check_result *result)
{
	struct computed x = {0};
	struct check_result found = {0};
	enum status status = compute_outputs(c, g, first, 0, x.outputs[0]);

	if (status == STATUS_OK && !c->options.with_nan)
		status = probe(c, g, first, &x);
	if (status == STATUS_OK)
		status = compare_outputs(c, g, first, &x, &found);
	if (status == STATUS_OK && found.share > 1 && isfinite(found.share)) {
		while (x.n_probes < MAX_RESPONSES && status == STATUS_OK)
			status = probe(c, g, first, &x);
		found = (struct check_result){0};
		if (status == STATUS_OK)
			status = compare_outputs(c, g, first, &x, &found);
	}
	for (int i = 0; i <= MAX_RESPONSES; i++)
		free_outputs(x.outputs[i]);
	check_raise(&result->rel_err, found.rel_err);
	judge_raise(result, found.share, found.name, found.test);
	return status;
}

static enum status check_group(const struct check *c, const struct group *g,
                               struct check_result *result)
{
	enum status status = STATUS_OK;

	for (int part = 0; part < g->n_parts && status == STATUS_OK; part += g->blocks)
		status = check_parts(c, g, part, result);
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
		result->rel_err = INFINITY;
		judge_raise(result, INFINITY, o->name, "an element");
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

/* What kernels may round what they make of their inputs to. */
static double rounding_inside(const struct check *c)
{
	for (int i = 0; i < c->list.count && c->device->activation == DTYPE_BF16; i++)
		if (operand_is_written(&c->list.operand[i]) && !c->list.operand[i].exact)
			return ROUNDING_BF16;
	return ROUNDING_FP32;
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
	if (!c->kernel)
		return status_set(STATUS_UNSUPPORTED, "%s: not even the reference knows it",
		                  operation_name(operation));
	c->rounding = rounding_inside(c);
	c->rounds_scores = options->kernel && options->kernel->rounds_scores;
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
