/*
 * Gradients of the selective scan (the equations are in kernels/kernels.h). A task takes a sequence
 * and a block of channels backwards, chunk by chunk: the states of a chunk are computed again from
 * the border before it and stay in cache while lambda runs from its end to its start. dB and dC sum
 * over channels: each task writes its share, and the shares are added in the order of the blocks.
 */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/selective_scan.h"
#include "kernels/cpu/shares.h"

/* A block of N rows of SCAN_CHANNELS. */
static int64_t block_count(const struct selective_scan_args *f)
{
	return f->state * SCAN_CHANNELS;
}

/* Of a thread: states before each token of a chunk and after the last, and their decays. */
struct scratch {
	float *rate, *carry, *h, *decay;
};

static int64_t scratch_count(const struct selective_scan_args *f)
{
	return (2 + 2 * SCAN_CHUNK + 1) * block_count(f);
}

static struct scratch scratch_of(const struct selective_scan_args *f, float *memory)
{
	const int64_t block = block_count(f);

	return (struct scratch){memory, memory + block, memory + 2 * block,
	                        memory + (3 + SCAN_CHUNK) * block};
}

/* What tasks leave to be added up. */
struct sums {
	double *dlog_rate, *dskip; /* [B, channels, N], [B, channels] */
	float *dbc;                /* [blocks, B, T, 2, N]: dB and dC */
	float *threads;            /* scratch */
};

static int64_t count_doubles(const struct selective_scan_args *f)
{
	return f->batch * f->channels * (f->state + 1);
}

static int64_t count_shares(const struct selective_scan_args *f)
{
	return scan_blocks(f) * f->batch * f->seq_len * 2 * f->state;
}

static struct sums sums_of(const struct selective_scan_args *f, void *workspace)
{
	double *doubles = workspace;
	float *floats = (float *)(doubles + count_doubles(f));

	return (struct sums){.dlog_rate = doubles,
	                     .dskip = doubles + f->batch * f->channels * f->state,
	                     .dbc = floats,
	                     .threads = floats + count_shares(f)};
}

size_t cpu_selective_scan_backward_workspace(const struct device *device, const void *args)
{
	const struct selective_scan_backward_args *a = args;
	const struct selective_scan_args *f = &a->forward;

	return sizeof(double) * (size_t)count_doubles(f) +
	       sizeof(float) * (size_t)(count_shares(f) + omp_get_max_threads() * scratch_count(f));
}

/* A sequence, and `count` channels from `first` on. */
struct part {
	const struct selective_scan_backward_args *a;
	int64_t b, first, count;
	struct scratch scratch;
	double *dlog_rate, *dskip;
	float *dbc; /* of the sequence's first token */
};

/* The states and decays of the n tokens from `start` on. */
static void recompute_chunk(const struct part *p, int64_t start, int64_t n)
{
	const struct selective_scan_args *f = &p->a->forward;
	const int64_t block = block_count(f);
	const float *border = scan_border(f, p->b, start / SCAN_CHUNK) + p->first;

	for (int64_t m = 0; m < f->state; m++)
		memcpy(p->scratch.h + m * SCAN_CHANNELS, border + m * f->channels,
		       sizeof *border * (size_t)p->count);
	for (int64_t j = 0; j < n; j++) {
		const float *u = view_at(&f->u, p->b, start + j, 0) + p->first;
		const float *dt = view_at(&f->dt, p->b, start + j, 0) + p->first;
		const float *in = view_at(&f->b, p->b, start + j, 0);

		for (int64_t m = 0; m < f->state; m++) {
			const float *rate = p->scratch.rate + m * SCAN_CHANNELS;
			const float *before = p->scratch.h + j * block + m * SCAN_CHANNELS;
			float *decay = p->scratch.decay + j * block + m * SCAN_CHANNELS;
			float *after = p->scratch.h + (j + 1) * block + m * SCAN_CHANNELS;

#pragma omp simd
			for (int64_t i = 0; i < p->count; i++) {
				decay[i] = exp_f32(rate[i] * dt[i]);
				after[i] = decay[i] * before[i] + dt[i] * u[i] * in[m];
			}
		}
	}
}

/* dy = dout silu(z), dz = dout y silu'(z); `after` are the states after token t. */
static void output_backward(const struct part *p, int64_t t, const float *after, float *dy)
{
	const struct selective_scan_backward_args *a = p->a;
	const struct selective_scan_args *f = &a->forward;
	const float *dout = view_at(&a->dout, p->b, t, 0) + p->first;
	const float *u = view_at(&f->u, p->b, t, 0) + p->first;
	const float *c = view_at(&f->c, p->b, t, 0), *z, *skip = f->skip ? f->skip + p->first : 0;
	float y[SCAN_CHANNELS], *dz;

	memcpy(dy, dout, sizeof *dy * (size_t)p->count);
	if (!f->z.data)
		return;
	z = view_at(&f->z, p->b, t, 0) + p->first;
	dz = view_at(&a->dz, p->b, t, 0) + p->first;
	for (int64_t i = 0; i < p->count; i++)
		y[i] = skip ? skip[i] * u[i] : 0.0f;
	for (int64_t m = 0; m < f->state; m++) {
#pragma omp simd
		for (int64_t i = 0; i < p->count; i++)
			y[i] += c[m] * after[m * SCAN_CHANNELS + i];
	}
#pragma omp simd
	for (int64_t i = 0; i < p->count; i++) {
		const float s = sigmoid_f32(z[i]);

		dy[i] = dout[i] * z[i] * s;
		dz[i] = dout[i] * y[i] * s * (1.0f + z[i] * (1.0f - s));
	}
}

/* Token t, number j of its chunk; carry becomes its decay times its lambda. */
static void token_backward(const struct part *p, int64_t t, int64_t j)
{
	const struct selective_scan_backward_args *a = p->a;
	const struct selective_scan_args *f = &a->forward;
	const int64_t block = block_count(f), count = p->count;
	const float *u = view_at(&f->u, p->b, t, 0) + p->first;
	const float *dt = view_at(&f->dt, p->b, t, 0) + p->first;
	const float *b = view_at(&f->b, p->b, t, 0), *c = view_at(&f->c, p->b, t, 0);
	float *du = view_at(&a->du, p->b, t, 0) + p->first;
	float *ddt = view_at(&a->ddt, p->b, t, 0) + p->first;
	float *dbc = p->dbc + t * 2 * f->state;
	float dy[SCAN_CHANNELS], lambda_b[SCAN_CHANNELS] = {0}, kept[SCAN_CHANNELS] = {0};

	output_backward(p, t, p->scratch.h + (j + 1) * block, dy);
	for (int64_t m = 0; m < f->state; m++) {
		const int64_t row = m * SCAN_CHANNELS;
		const float *rate = p->scratch.rate + row,
		            *decay = p->scratch.decay + j * block + row;
		const float *before = p->scratch.h + j * block + row, *after = before + block;
		float *carry = p->scratch.carry + row, db = 0, dc = 0;
		double *dlog_rate = p->dlog_rate + m;

#pragma omp simd reduction(+ : db, dc)
		for (int64_t i = 0; i < count; i++) {
			const float lambda = c[m] * dy[i] + carry[i];
			const float through = rate[i] * lambda * decay[i] * before[i];

			carry[i] = decay[i] * lambda;
			lambda_b[i] += lambda * b[m];
			kept[i] += through;
			dlog_rate[i * f->state] += dt[i] * through;
			db += lambda * dt[i] * u[i];
			dc += dy[i] * after[i];
		}
		dbc[m] = db;
		dbc[f->state + m] = dc;
	}
	for (int64_t i = 0; i < count; i++) {
		du[i] = dt[i] * lambda_b[i] + (f->skip ? f->skip[p->first + i] * dy[i] : 0.0f);
		ddt[i] = u[i] * lambda_b[i] + kept[i];
		p->dskip[i] += dy[i] * u[i];
	}
}

static void run_part(const struct part *p)
{
	const struct selective_scan_args *f = &p->a->forward;
	const int64_t chunks = (f->seq_len + SCAN_CHUNK - 1) / SCAN_CHUNK;

	scan_rates(f, p->first, p->count, p->scratch.rate);
	memset(p->scratch.carry, 0, sizeof(float) * (size_t)block_count(f));
	memset(p->dlog_rate, 0, sizeof(double) * (size_t)(p->count * f->state));
	memset(p->dskip, 0, sizeof(double) * (size_t)p->count);
	for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
		const int64_t start = chunk * SCAN_CHUNK, left = f->seq_len - start;
		const int64_t n = left < SCAN_CHUNK ? left : SCAN_CHUNK;

		recompute_chunk(p, start, n);
		for (int64_t j = n - 1; j >= 0; j--)
			token_backward(p, start + j, j);
	}
	for (int64_t m = 0; p->a->dh0 && m < f->state; m++)
		memcpy(p->a->dh0 + (p->b * f->state + m) * f->channels + p->first,
		       p->scratch.carry + m * SCAN_CHANNELS, sizeof(float) * (size_t)p->count);
}

/* dB and dC of one token, summed over the blocks of channels. */
static void add_token(const struct selective_scan_backward_args *a, int64_t b, int64_t t,
                      const float *dbc)
{
	const struct selective_scan_args *f = &a->forward;
	const int64_t row = 2 * f->state, stride = f->batch * f->seq_len * row;
	const float *from = dbc + (b * f->seq_len + t) * row;
	float *db = view_at(&a->db, b, t, 0), *dc = view_at(&a->dc, b, t, 0);

	for (int64_t m = 0; m < row; m++) {
		double sum = 0;

		for (int64_t block = 0; block < scan_blocks(f); block++)
			sum += from[block * stride + m];
		if (m < f->state)
			db[m] = (float)sum;
		else
			dc[m - f->state] = (float)sum;
	}
}

enum status cpu_selective_scan_backward(struct device *device, const void *args, void *workspace)
{
	const struct selective_scan_backward_args *a = args;
	const struct selective_scan_args *f = &a->forward;
	const struct sums s = sums_of(f, workspace);
	const int64_t blocks = scan_blocks(f), tokens = f->batch * f->seq_len;

#pragma omp parallel for schedule(static)
	for (int64_t task = 0; task < f->batch * blocks; task++) {
		const int64_t b = task / blocks, first = task % blocks * SCAN_CHANNELS;
		const int64_t row = b * f->channels + first;
		const struct part part = {
		        .a = a,
		        .b = b,
		        .first = first,
		        .count = scan_block_size(f, first),
		        .scratch =
		                scratch_of(f, s.threads + omp_get_thread_num() * scratch_count(f)),
		        .dlog_rate = s.dlog_rate + row * f->state,
		        .dskip = s.dskip + row,
		        .dbc = s.dbc + (task % blocks * tokens + b * f->seq_len) * 2 * f->state,
		};

		run_part(&part);
	}
#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < tokens; n++)
		add_token(a, n / f->seq_len, n % f->seq_len, s.dbc);
	add_shares(s.dlog_rate, f->batch, f->channels * f->state, f->channels * f->state,
	           a->dlog_rate);
	if (f->skip)
		add_shares(s.dskip, f->batch, f->channels, f->channels, a->dskip);
	return STATUS_OK;
}
