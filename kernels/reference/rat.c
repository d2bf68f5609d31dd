/* fp64 RAT: the recurrence inside a chunk, its gradients, and one generated token. */
#include "kernels/reference/shared.h"

#include <omp.h>

static double smooth(double g, double state, double x)
{
	return g * state + (1 - g) * x;
}

static int64_t n_chunks(const struct rat_scan_args *a)
{
	return (a->seq_len + a->chunk - 1) / a->chunk;
}

/* The token after the last one of a chunk. */
static int64_t end_of(const struct rat_scan_args *a, int64_t chunk)
{
	return smaller((chunk + 1) * a->chunk, a->seq_len);
}

static double gate_of(const struct device *device, const struct rat_scan_args *a, int64_t b,
                      int64_t t, int64_t h, int64_t i)
{
	return sigmoid(at(&a->gate, b, t, h)[i] + wide(a->gate_bias)[h * a->d_head + i]) +
	       decay_jitter(device, ((b * a->seq_len + t) * a->n_heads + h) * a->d_head + i);
}

/* kt and vt [d] of a head move on to token t. */
static void advance(const struct device *device, const struct rat_scan_args *a, int64_t b,
                    int64_t t, int64_t h, double *kt, double *vt)
{
	const double *k = at(&a->k, b, t, h % a->groups), *v = at(&a->v, b, t, h);

	for (int64_t i = 0; i < a->d_head; i++) {
		bool first = t % a->chunk == 0;
		double g = gate_of(device, a, b, t, h, i);

		kt[i] = smooth(g, first ? 0 : kt[i], k[i]);
		vt[i] = smooth(g, first ? 0 : vt[i], v[i]);
	}
}

/* One chunk of one head; state: kt and vt, [2, d]. */
static void scan_chunk(const struct device *device, const struct rat_scan_args *a, int64_t b,
                       int64_t h, int64_t c, double *state)
{
	int64_t d = a->d_head, end = end_of(a, c);
	double *kt = state, *vt = state + d;
	size_t bytes = sizeof(double) * (size_t)d;

	for (int64_t t = c * a->chunk; t < end; t++) {
		advance(device, a, b, t, h, kt, vt);
		memcpy(at(&a->v_scan, b, t, h), vt, bytes);
		wide_out(a->own_score)[(b * a->seq_len + t) * a->n_heads + h] =
		        a->scale * dot(d, at(&a->q, b, t, h % a->groups), kt);
	}
	memcpy(at(&a->k_chunk, b, c, h), kt, bytes);
	memcpy(at(&a->v_chunk, b, c, h), vt, bytes);
	if (a->k_state && end == a->seq_len)
		memcpy(wide_out(a->k_state) + (b * a->n_heads + h) * d, kt, bytes);
	if (a->v_state && end == a->seq_len)
		memcpy(wide_out(a->v_state) + (b * a->n_heads + h) * d, vt, bytes);
}

enum status reference_rat_scan(struct device *device, const void *args, void *workspace)
{
	const struct rat_scan_args *a = args;
	const struct rotation queries = {a->batch, a->groups, a->d_head, a->rope, 1, 0};
	const struct rotation keys = {a->batch, a->n_heads, a->d_head, a->rope, 1, 0};
	const int64_t first = device->first_token / a->chunk;
	double *state = take_doubles(2 * a->d_head * omp_get_max_threads());

	if (!state)
		return STATUS_OOM;
#pragma omp parallel for collapse(3)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t c = 0; c < n_chunks(a); c++)
			for (int64_t h = 0; h < a->n_heads; h++)
				scan_chunk(device, a, b, h, c,
				           state + 2 * a->d_head * omp_get_thread_num());
#pragma omp parallel for
	for (int64_t t = 0; t < a->seq_len; t++)
		rotate_token(&queries, first + t / a->chunk, &a->q, t, &a->q_out, t);
	for (int64_t c = 0; c < n_chunks(a); c++)
		rotate_token(&keys, first + c, &a->k_chunk, c, &a->k_chunk, c);
	free(state);
	return STATUS_OK;
}

/* Gradients of kt and vt of one head, [d] each, flowing in from the token after. */
struct flow {
	double *dk, *dv;
};

/*
 * Token t of one head: what its own score and vt's users give to the states kt and vt joins the
 * flow, which passes h_t = g h_{t-1} + (1-g) x_t for h in (kt, vt). Adds to dq and dk. In front of
 * kt and vt are the states of the token before.
 */
static void token_backward(const struct device *device, const struct rat_scan_backward_args *a,
                           int64_t b, int64_t t, int64_t h, const double *kt, const double *vt,
                           const struct flow *flow)
{
	const struct rat_scan_args *f = &a->forward;
	const double score = wide(a->down_score)[(b * f->seq_len + t) * f->n_heads + h];
	const double ds = f->scale * score;
	int64_t d = f->d_head, group = h % f->groups;
	bool first = t % f->chunk == 0;

	for (int64_t i = 0; i < d; i++) {
		double g = gate_of(device, f, b, t, h, i);
		double k_before = first ? 0 : kt[i - d], v_before = first ? 0 : vt[i - d];
		double dkt = flow->dk[i] + ds * at(&f->q, b, t, group)[i];
		double dvt = flow->dv[i] + at(&a->dv_scan, b, t, h)[i];

		at(&a->dq, b, t, group)[i] += ds * kt[i];
		at(&a->dgate, b, t, h)[i] = g * (1 - g) *
		                            (dkt * (k_before - at(&f->k, b, t, group)[i]) +
		                             dvt * (v_before - at(&f->v, b, t, h)[i]));
		at(&a->dk, b, t, group)[i] += (1 - g) * dkt;
		at(&a->dv, b, t, h)[i] = (1 - g) * dvt;
		flow->dk[i] = g * dkt;
		flow->dv[i] = g * dvt;
	}
}

/* One chunk of one head, to whose end dk_final (rotated back) and dv_chunk flow; scratch: kt and vt
 * of every token of it and the flow, [2, tokens + 1, d]. */
static void chunk_backward(const struct device *device, const struct rat_scan_backward_args *a,
                           int64_t b, int64_t h, int64_t c, const struct view *dk_final,
                           double *scratch)
{
	const struct rat_scan_args *f = &a->forward;
	int64_t d = f->d_head, first = c * f->chunk, end = end_of(f, c);
	double *kt = scratch, *vt = kt + (end - first) * d;
	const struct flow flow = {vt + (end - first) * d, vt + (end - first + 1) * d};
	size_t bytes = sizeof(double) * (size_t)d;

	for (int64_t t = first; t < end; t++, kt += d, vt += d) {
		if (t > first) {
			memcpy(kt, kt - d, bytes);
			memcpy(vt, vt - d, bytes);
		}
		advance(device, f, b, t, h, kt, vt);
	}
	memcpy(flow.dk, at(dk_final, b, c, h), bytes);
	memcpy(flow.dv, at(&a->dv_chunk, b, c, h), bytes);
	for (int64_t t = end - 1; t >= first; t--)
		token_backward(device, a, b, t, h, kt -= d, vt -= d, &flow);
}

/* dq from the rotated queries, dk_final [B, C, H, d] from the rotated ends of chunks; dk zero. */
static void rotate_back(const struct device *device, const struct rat_scan_backward_args *a,
                        const struct view *dk_final)
{
	const struct rat_scan_args *f = &a->forward;
	const int64_t first = device->first_token / f->chunk;
	const struct rotation queries = {f->batch, f->groups, f->d_head, f->rope, -1, 0};
	const struct rotation keys = {f->batch, f->n_heads, f->d_head, f->rope, -1, 0};

#pragma omp parallel for
	for (int64_t t = 0; t < f->seq_len; t++) {
		rotate_token(&queries, first + t / f->chunk, &a->dq_out, t, &a->dq, t);
		for (int64_t i = 0; i < f->batch * f->groups; i++)
			zero(f->d_head, at(&a->dk, i / f->groups, t, i % f->groups));
	}
	for (int64_t c = 0; c < n_chunks(f); c++)
		rotate_token(&keys, first + c, &a->dk_chunk, c, dk_final, c);
}

/* Heads of a group run one after another: they share dq and dk. */
enum status reference_rat_scan_backward(struct device *device, const void *args, void *workspace)
{
	const struct rat_scan_backward_args *a = args;
	const struct rat_scan_args *f = &a->forward;
	int64_t d = f->d_head, per_thread = 2 * (smaller(f->chunk, f->seq_len) + 1) * d;
	int64_t n_final = f->batch * n_chunks(f) * f->n_heads * d;
	double *memory = take_doubles(n_final + per_thread * omp_get_max_threads());
	double *dgate_bias = wide_out(a->dgate_bias);
	const struct view dk_final = contiguous(memory, n_chunks(f), f->n_heads, d);

	if (!memory)
		return STATUS_OOM;
	double *scratch = memory + n_final;
	rotate_back(device, a, &dk_final);
#pragma omp parallel for collapse(3)
	for (int64_t b = 0; b < f->batch; b++)
		for (int64_t c = 0; c < n_chunks(f); c++)
			for (int64_t g = 0; g < f->groups; g++)
				for (int64_t h = g; h < f->n_heads; h += f->groups)
					chunk_backward(device, a, b, h, c, &dk_final,
					               scratch + per_thread * omp_get_thread_num());
	zero(f->n_heads * d, dgate_bias);
#pragma omp parallel for reduction(+ : dgate_bias[:f->n_heads * d])
	for (int64_t n = 0; n < f->batch * f->seq_len; n++)
		for (int64_t h = 0; h < f->n_heads; h++)
			add_scaled(d, 1, at(&a->dgate, n / f->seq_len, n % f->seq_len, h),
			           dgate_bias + h * d);
	free(memory);
	return STATUS_OK;
}

/* The running pair of one head moves on and attends to the chunks before; q is rotated, w
 * [position / chunk] scratch. */
static void step_head(const struct rat_step_args *a, int64_t b, int64_t h, const double *q,
                      double *w)
{
	int64_t d = a->d_head, chunks = *a->position / a->chunk;
	bool first = *a->position % a->chunk == 0;
	const double *k = at(&a->k, b, 0, h % a->groups), *v = at(&a->v, b, 0, h);
	double *kt = wide_out(a->k_state) + (b * a->n_heads + h) * d, own_p;
	double *vt = wide_out(a->v_state) + (b * a->n_heads + h) * d, *out = at(&a->out, b, 0, h);

	for (int64_t i = 0; i < d; i++) {
		double g = sigmoid(at(&a->gate, b, 0, h)[i] + wide(a->gate_bias)[h * d + i]);

		kt[i] = smooth(g, first ? 0 : kt[i], k[i]);
		vt[i] = smooth(g, first ? 0 : vt[i], v[i]);
	}
	const double own_score = a->scale * dot(d, at(&a->q, b, 0, h % a->groups), kt);
	for (int64_t c = 0; c < chunks; c++)
		w[c] = dot(d, q, at(&a->k_chunk, b, c, h));
	softmax(a->scale, w, 0, chunks, &own_score, &own_p);
	zero(d, out);
	add_scaled(d, own_p, vt, out);
	for (int64_t c = 0; c < chunks; c++)
		add_scaled(d, w[c], at(&a->v_chunk, b, c, h), out);
	for (int64_t i = 0; i < d; i++)
		out[i] *= sigmoid(at(&a->z, b, 0, h)[i]);
}

/* The running pair of every head to its chunk's slot. */
static void store_chunk(const struct rat_step_args *a, int64_t chunk)
{
	const struct rotation turn = {a->batch, a->n_heads, a->d_head, a->rope, 1, 0};
	const struct rotation copy = {a->batch, a->n_heads, a->d_head, false, 1, 0};
	const struct view k = contiguous(wide_out(a->k_state), 1, a->n_heads, a->d_head);
	const struct view v = contiguous(wide_out(a->v_state), 1, a->n_heads, a->d_head);

	rotate_token(&turn, chunk, &k, 0, &a->k_chunk, chunk);
	rotate_token(&copy, chunk, &v, 0, &a->v_chunk, chunk);
}

enum status reference_rat_step(struct device *device, const void *args, void *workspace)
{
	const struct rat_step_args *a = args;
	int64_t position = *a->position, chunk = position / a->chunk;
	int64_t n_q = a->batch * a->groups * a->d_head;
	double *q = take_doubles(n_q + chunk * omp_get_max_threads());
	const struct rotation turn = {a->batch, a->groups, a->d_head, a->rope, 1, 0};
	const struct view rotated = contiguous(q, 1, a->groups, a->d_head);

	if (!q)
		return STATUS_OOM;
	rotate_token(&turn, chunk, &a->q, 0, &rotated, 0);
#pragma omp parallel for collapse(2)
	for (int64_t b = 0; b < a->batch; b++)
		for (int64_t h = 0; h < a->n_heads; h++)
			step_head(a, b, h, at(&rotated, b, 0, h % a->groups),
			          q + n_q + chunk * omp_get_thread_num());
	if (position % a->chunk == a->chunk - 1)
		store_chunk(a, chunk);
	free(q);
	return STATUS_OK;
}

/* ---- RAT+ ---- */

/* The running pair of one head moves on, and goes to the cache's slots of this token, its key
 * rotated. */
static void advance_pair(const struct ratplus_step_args *a, int64_t b, int64_t h)
{
	const int64_t d = a->d_head, row = (b * a->n_heads + h) * d;
	double *kt = wide_out(a->k_state) + row, *vt = wide_out(a->v_state) + row;
	const bool first = *a->position == 0;

	for (int64_t i = 0; i < d; i++) {
		const double g = sigmoid(at(&a->gate, b, 0, h)[i]);

		kt[i] = smooth(g, first ? 0 : kt[i], at(&a->k, b, 0, h)[i]);
		vt[i] = smooth(g, first ? 0 : vt[i], at(&a->v, b, 0, h)[i]);
	}
}

static bool is_kept_token(const struct ratplus_step_args *a, int64_t t)
{
	return t < a->initial || (a->dilation > 0 && (t + 1) % a->dilation == 0);
}

static void store_pair(const struct ratplus_step_args *a, const struct view *k_cache,
                       const struct view *v_cache, int64_t slot)
{
	const struct rotation turn = {a->batch, a->n_heads, a->d_head, a->rope, 1, 0};
	const struct rotation copy = {a->batch, a->n_heads, a->d_head, false, 1, 0};
	const struct view k = contiguous(wide_out(a->k_state), 1, a->n_heads, a->d_head);
	const struct view v = contiguous(wide_out(a->v_state), 1, a->n_heads, a->d_head);

	rotate_token(&turn, *a->position, &k, 0, k_cache, slot);
	rotate_token(&copy, *a->position, &v, 0, v_cache, slot);
}

/* Where a visible token's key and value are. */
struct pair_place {
	const double *k, *v;
};

/* The tokens that this one sees, itself among them; [n_kept + window + 1] places. Returns how many.
 */
static int64_t visible_pairs(const struct ratplus_step_args *a, int64_t b, int64_t h,
                             struct pair_place *places)
{
	int64_t n = 0, kept = 0;

	for (int64_t t = 0; t <= *a->position; t++) {
		const int64_t slot = t % a->recent_slots;

		if (*a->position - t <= a->window)
			places[n++] = (struct pair_place){at(&a->k_recent, b, slot, h),
			                                  at(&a->v_recent, b, slot, h)};
		else if (is_kept_token(a, t))
			places[n++] = (struct pair_place){at(&a->k_kept, b, kept, h),
			                                  at(&a->v_kept, b, kept, h)};
		kept += is_kept_token(a, t);
	}
	return n;
}

static void attend_to_pairs(const struct ratplus_step_args *a, int64_t b, int64_t h,
                            const double *q, int64_t n, const struct pair_place *places, double *w)
{
	double none, *out = at(&a->out, b, 0, h);

	for (int64_t i = 0; i < n; i++)
		w[i] = dot(a->d_head, q, places[i].k);
	softmax(a->scale, w, 0, n, NULL, &none);
	zero(a->d_head, out);
	for (int64_t i = 0; i < n; i++)
		add_scaled(a->d_head, w[i], places[i].v, out);
	for (int64_t i = 0; i < a->d_head; i++)
		out[i] *= sigmoid(at(&a->z, b, 0, h)[i]);
}

enum status reference_ratplus_step(struct device *device, const void *args, void *workspace)
{
	const struct ratplus_step_args *a = args;
	const int64_t position = *a->position, n_q = a->batch * a->n_heads * a->d_head;
	double *q = take_doubles(n_q + position + 1);
	struct pair_place *places = malloc((size_t)(position + 1) * sizeof *places);
	const struct rotation turn = {a->batch, a->n_heads, a->d_head, a->rope, 1, 0};
	int64_t kept = 0;

	for (int64_t t = 0; t < position; t++)
		kept += is_kept_token(a, t);
	if (q && places) {
		const struct view rotated = contiguous(q, 1, a->n_heads, a->d_head);

		for (int64_t i = 0; i < a->batch * a->n_heads; i++)
			advance_pair(a, i / a->n_heads, i % a->n_heads);
		store_pair(a, &a->k_recent, &a->v_recent, position % a->recent_slots);
		if (is_kept_token(a, position))
			store_pair(a, &a->k_kept, &a->v_kept, kept);
		rotate_token(&turn, position, &a->q, 0, &rotated, 0);
		for (int64_t i = 0; i < a->batch * a->n_heads; i++) {
			const int64_t b = i / a->n_heads, h = i % a->n_heads;
			const int64_t n = visible_pairs(a, b, h, places);

			attend_to_pairs(a, b, h, at(&rotated, b, 0, h), n, places, q + n_q);
		}
	}
	const enum status status =
	        q && places ? STATUS_OK
	                    : status_set(STATUS_OOM, "no memory for a reference's step");
	free(q);
	free(places);
	return status;
}
