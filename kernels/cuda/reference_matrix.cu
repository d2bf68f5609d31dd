/* fp64 recurrences of matrices on the device, token by token. */
#include "kernels/cuda/reference.cuh"

using namespace reference;

/*
 * A block has COLUMNS columns of the state of one head of one sequence. Each column belongs to
 * LANES neighbouring threads, which deal its rows among them: row r * LANES + lane is state[r] of
 * lane `lane`.
 */
constexpr int LANES = 16, COLUMNS = THREADS / LANES, LANE_ROWS = MAX_STATE_ROWS / LANES;
constexpr int STAGED = 8; /* tokens in shared memory at a time */

extern __shared__ double dynamic[];

/* The sum over a column's lanes. */
static __device__ double lane_sum(double x)
{
	for (int lane = LANES / 2; lane > 0; lane /= 2)
		x += __shfl_xor_sync(0xffffffffu, x, lane);
	return x;
}

/* The sum of the two columns of a warp. */
static __device__ double pair_sum(double x)
{
	return x + __shfl_xor_sync(0xffffffffu, x, LANES);
}

/* One token in shared memory. */
struct token {
	double *k, *q, *decay;  /* [d_k] */
	double *v, *d_o, *beta; /* [COLUMNS], [COLUMNS], one */

	__device__ token(int64_t d_k, int64_t i)
	{
		k = dynamic + i * size(d_k);
		q = k + d_k;
		decay = q + d_k;
		v = decay + d_k;
		d_o = v + COLUMNS;
		beta = d_o + COLUMNS;
	}
	static __host__ __device__ int64_t size(int64_t d_k)
	{
		return 3 * d_k + 2 * COLUMNS + 1;
	}
};

/* A thread's place. */
struct place {
	int64_t b, h, column, first_column;
	int lane, n_rows, most_rows; /* of the state that are its own; most_rows: of lane 0 */
	bool has_column;

	__device__ explicit place(const struct matrix_recurrence_args &m)
	{
		const int64_t blocks = quotient_up(m.d_v, COLUMNS);

		first_column = blockIdx.x % blocks * COLUMNS;
		h = blockIdx.x / blocks % m.n_heads;
		b = blockIdx.x / blocks / m.n_heads;
		column = first_column + threadIdx.x / LANES;
		lane = threadIdx.x % LANES;
		n_rows = (int)quotient_up(m.d_k - lane, LANES);
		most_rows = (int)quotient_up(m.d_k, LANES);
		has_column = column < m.d_v;
	}
	/* Of a state's own row r in [B, H, d_k, d_v]. */
	__device__ int64_t state_index(const struct matrix_recurrence_args &m, int r) const
	{
		return ((b * m.n_heads + h) * m.d_k + r * LANES + lane) * m.d_v + column;
	}
};

/* Tokens first .. first+count-1 to shared memory; dout.data NULL: there are no gradients. */
static __device__ void stage(const struct matrix_recurrence_args &m, const struct view &dout,
                             const struct place &p, int64_t first, int count)
{
	const int d_k = (int)m.d_k;

	__syncthreads();
	for (int n = threadIdx.x; n < count * d_k; n += THREADS) {
		const int i = n % d_k;
		const int64_t t = first + n / d_k;
		const struct token x(d_k, n / d_k);

		x.k[i] = at(&m.k, p.b, t, p.h)[i];
		x.q[i] = at(&m.q, p.b, t, p.h)[i];
		x.decay[i] = decay_of(&m, p.b, t, p.h, i);
	}
	for (int n = threadIdx.x; n < count * COLUMNS; n += THREADS) {
		const int64_t t = first + n / COLUMNS, column = p.first_column + n % COLUMNS;
		const struct token x(d_k, n / COLUMNS);
		const bool inside = column < m.d_v;

		x.v[n % COLUMNS] = inside ? at(&m.v, p.b, t, p.h)[column] : 0;
		x.d_o[n % COLUMNS] = inside && dout.data ? at(&dout, p.b, t, p.h)[column] : 0;
	}
	for (int n = threadIdx.x; n < count; n += THREADS)
		*token(d_k, n).beta = m.rule == RULE_DELTA ? *at(&m.beta, p.b, first + n, p.h) : 1;
	__syncthreads();
}

/* A thread's part of a state, or of its gradient. */
struct state {
	double row[LANE_ROWS];
};

/* The place's part of a [B, H, d_k, d_v], or zero. */
static __device__ void load_state(const struct matrix_recurrence_args &m, const struct place &p,
                                  const double *from, struct state &s)
{
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		s.row[r] = from && p.has_column && r < p.n_rows ? from[p.state_index(m, r)] : 0;
}

static __device__ void store_state(const struct matrix_recurrence_args &m, const struct place &p,
                                   const struct state &s, double *to)
{
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		if (to && p.has_column && r < p.n_rows)
			to[p.state_index(m, r)] = s.row[r];
}

/* s = A_t s. */
static __device__ void decay_state(const struct place &p, const struct token &x, struct state &s)
{
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		if (r < p.n_rows)
			s.row[r] *= x.decay[r * LANES + p.lane];
}

/* A column of s += scale * x^T y, y the column's element. */
static __device__ void add_outer(const struct place &p, const double *x, double y, struct state &s)
{
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		if (r < p.n_rows)
			s.row[r] += x[r * LANES + p.lane] * y;
}

/* The column's element of x s. */
static __device__ double row_times_state(const struct place &p, const double *x,
                                         const struct state &s)
{
	double sum = 0;

#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		if (r < p.n_rows)
			sum += x[r * LANES + p.lane] * s.row[r];
	return lane_sum(sum);
}

/* The column's element of what is written at key k: v, or beta (v - k S) with the decayed S;
 * *error = v - k S. */
static __device__ double written_value(const struct matrix_recurrence_args &m,
                                       const struct place &p, const struct token &x,
                                       const struct state &decayed, double *error)
{
	*error = x.v[threadIdx.x / LANES];
	if (m.rule == RULE_DELTA)
		*error -= row_times_state(p, x.k, decayed);
	return *x.beta * *error;
}

/* From the state before a token to the one after it. */
static __device__ void advance(const struct matrix_recurrence_args &m, const struct place &p,
                               const struct token &x, struct state &s)
{
	double error;

	decay_state(p, x, s);
	add_outer(p, x.k, written_value(m, p, x, s, &error), s);
}

/* sum_i q_i u_i k_i of RWKV-6's bonus. */
static __device__ double bonus_weight(const struct matrix_recurrence_args &m, const struct place &p,
                                      const struct token &x)
{
	double sum = 0;

	for (int64_t i = p.lane; i < m.d_k; i += LANES)
		sum += x.q[i] * doubles(m.bonus)[p.h * m.d_k + i] * x.k[i];
	return lane_sum(sum);
}

/* ---- forward ---- */

static __global__ void __launch_bounds__(THREADS) matrix_kernel(struct matrix_recurrence_args m)
{
	const struct place p(m);
	struct state s;

	load_state(m, p, doubles(m.h0), s);
	for (int64_t t = 0; t < m.seq_len; t++) {
		const struct token x(m.d_k, t % STAGED);
		double out = 0;

		if (t % STAGED == 0)
			stage(m, {}, p, t, (int)smaller(STAGED, m.seq_len - t));
		if (m.rule == RULE_BONUS)
			out = row_times_state(p, x.q, s) +
			      bonus_weight(m, p, x) * x.v[threadIdx.x / LANES];
		advance(m, p, x, s);
		if (m.rule != RULE_BONUS)
			out = row_times_state(p, x.q, s);
		if (p.lane == 0 && p.has_column)
			at(&m.out, p.b, t, p.h)[p.column] = m.scale * out;
	}
	store_state(m, p, s, doubles(m.final_state));
}

static int64_t matrix_blocks(const struct matrix_recurrence_args *m)
{
	return m->batch * m->n_heads * quotient_up(m->d_v, COLUMNS);
}

static size_t staged_bytes(const struct matrix_recurrence_args *m)
{
	return (size_t)(STAGED * token::size(m->d_k)) * sizeof(double);
}

REFERENCE(matrix_recurrence)
{
	const struct matrix_recurrence_args *m =
	        static_cast<const struct matrix_recurrence_args *>(args);

	return launch(device, matrix_kernel, matrix_blocks(m), staged_bytes(m), *m);
}

/* ---- backward ---- */

/*
 * States are kept before every segment of `length` tokens, and recomputed in a segment when the
 * pass from the last token to the first comes to it.
 */
struct matrix_backward {
	struct matrix_recurrence_backward_args a;
	int64_t length;
	double *kept; /* of each block: before every segment, then before every token of one */
};

static __host__ __device__ int64_t n_segments(const struct matrix_backward &w)
{
	return quotient_up(w.a.forward.seq_len, w.length);
}

/* States that a thread keeps, of lane_rows(m) rows each. */
static __host__ __device__ int64_t n_kept(const struct matrix_backward &w)
{
	return n_segments(w) + w.length;
}

static __host__ __device__ int64_t lane_rows(const struct matrix_recurrence_args &m)
{
	return quotient_up(m.d_k, LANES);
}

/* The kept state i of this thread; its rows are THREADS apart. */
static __device__ double *kept_state(const struct matrix_backward &w, int64_t i)
{
	return w.kept + (blockIdx.x * n_kept(w) + i) * lane_rows(w.a.forward) * THREADS +
	       threadIdx.x;
}

static __device__ void keep(const struct place &p, const struct state &s, double *to)
{
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		if (r < p.n_rows)
			to[r * THREADS] = s.row[r];
}

static __device__ void recall(const struct place &p, const double *from, struct state &s)
{
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++)
		s.row[r] = r < p.n_rows ? from[r * THREADS] : 0;
}

static __device__ void keep_segments(const struct matrix_backward &w, const struct place &p)
{
	const struct matrix_recurrence_args &m = w.a.forward;
	struct state s;

	load_state(m, p, doubles(m.h0), s);
	for (int64_t t = 0; t < m.seq_len; t++) {
		if (t % STAGED == 0)
			stage(m, {}, p, t, (int)smaller(STAGED, m.seq_len - t));
		if (t % w.length == 0)
			keep(p, s, kept_state(w, t / w.length));
		advance(m, p, token(m.d_k, t % STAGED), s);
	}
}

/* The states before the tokens first .. end-1 of a segment. */
static __device__ void recompute_segment(const struct matrix_backward &w, const struct place &p,
                                         int64_t first, int64_t end)
{
	const struct matrix_recurrence_args &m = w.a.forward;
	struct state s;

	recall(p, kept_state(w, first / w.length), s);
	for (int64_t t = first; t < end; t++) {
		const int i = (int)((t - first) % STAGED);

		if (i == 0)
			stage(m, {}, p, t, (int)smaller(STAGED, end - t));
		keep(p, s, kept_state(w, n_segments(w) + t - first));
		advance(m, p, token(m.d_k, i), s);
	}
}

/* Adds the sum of a warp's two columns' x, lane 0 for all of a column's lanes. */
static __device__ void add_scalar(double x, double *to)
{
	x = pair_sum(x);
	if (threadIdx.x % 32 == 0)
		atomicAdd(to, x);
}

/* The same of every lane, for its row r. */
static __device__ void add_row(const struct place &p, int r, double x, double *to)
{
	if (r >= p.most_rows)
		return;
	x = pair_sum(x);
	if (threadIdx.x % 32 < LANES && r < p.n_rows)
		atomicAdd(to + r * LANES + p.lane, x);
}

/* Adds to dq of token t; s is the state that its output reads. */
static __device__ void add_dq(const struct matrix_backward &w, const struct place &p,
                              const struct token &x, int64_t t, const struct state &s)
{
	const struct matrix_recurrence_args &m = w.a.forward;
	const double d_o = x.d_o[threadIdx.x / LANES], v = x.v[threadIdx.x / LANES];

#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++) {
		const int i = r * LANES + p.lane;
		double dq = s.row[r] * d_o;

		if (m.rule == RULE_BONUS && r < p.n_rows)
			dq += doubles(m.bonus)[p.h * m.d_k + i] * x.k[i] * v * d_o;
		add_row(p, r, m.scale * dq, at(&w.a.dq, p.b, t, p.h));
	}
}

/* Adds to dk, dlog_decay and dbeta of token t; ds is the gradient of the state after it and becomes
 * that of the one before it. Returns dv. */
static __device__ double add_written(const struct matrix_backward &w, const struct place &p,
                                     const struct token &x, int64_t t, const struct state &decayed,
                                     double value, double error, struct state &ds)
{
	const struct matrix_recurrence_args &m = w.a.forward;
	const double d_o = x.d_o[threadIdx.x / LANES], v = x.v[threadIdx.x / LANES];
	const double dvalue = row_times_state(p, x.k, ds), derror = *x.beta * dvalue;
	double dlog = 0;

	if (m.rule == RULE_DELTA)
		add_scalar(dvalue * error, at(&w.a.dbeta, p.b, t, p.h));
#pragma unroll
	for (int r = 0; r < LANE_ROWS; r++) {
		const int i = r * LANES + p.lane;
		double dk = ds.row[r] * value;

		if (m.rule == RULE_BONUS && r < p.n_rows)
			dk += m.scale * doubles(m.bonus)[p.h * m.d_k + i] * x.q[i] * v * d_o;
		if (m.rule == RULE_DELTA && r < p.n_rows) {
			dk -= derror * decayed.row[r];
			ds.row[r] -= x.k[i] * derror;
		}
		add_row(p, r, dk, at(&w.a.dk, p.b, t, p.h));
		if (m.decay == DECAY_DIAGONAL)
			add_row(p, r, ds.row[r] * decayed.row[r], at(&w.a.dlog_decay, p.b, t, p.h));
		dlog += ds.row[r] * decayed.row[r];
	}
	if (m.decay == DECAY_SCALAR)
		add_scalar(lane_sum(dlog), at(&w.a.dlog_decay, p.b, t, p.h));
	decay_state(p, x, ds);
	return derror;
}

/* Back through token t, before which the state was s. */
static __device__ void backward_token(const struct matrix_backward &w, const struct place &p,
                                      const struct token &x, int64_t t, struct state &s,
                                      struct state &ds)
{
	const struct matrix_recurrence_args &m = w.a.forward;
	const double read = m.scale * x.d_o[threadIdx.x / LANES];
	const bool bonus = m.rule == RULE_BONUS;
	double error;

	if (bonus)
		add_dq(w, p, x, t, s);
	decay_state(p, x, s);
	const double value = written_value(m, p, x, s, &error);
	if (!bonus) {
		struct state after = s;

		add_outer(p, x.k, value, after);
		add_dq(w, p, x, t, after);
		add_outer(p, x.q, read, ds);
	}
	double dv = add_written(w, p, x, t, s, value, error, ds);
	if (bonus) {
		dv += bonus_weight(m, p, x) * read;
		add_outer(p, x.q, read, ds);
	}
	if (p.lane == 0 && p.has_column)
		at(&w.a.dv, p.b, t, p.h)[p.column] = dv;
}

static __global__ void __launch_bounds__(THREADS) matrix_backward_kernel(struct matrix_backward w)
{
	const struct matrix_recurrence_args &m = w.a.forward;
	const struct place p(m);
	struct state s, ds;

	load_state(m, p, NULL, ds);
	keep_segments(w, p);
	for (int64_t segment = n_segments(w) - 1; segment >= 0; segment--) {
		const int64_t first = segment * w.length;
		const int64_t count = smaller(w.length, m.seq_len - first);

		recompute_segment(w, p, first, first + count);
		for (int64_t i = count - 1; i >= 0; i--) {
			const int64_t staged = i / STAGED * STAGED;

			if (i == count - 1 || i % STAGED == STAGED - 1)
				stage(m, w.a.dout, p, first + staged, (int)(i - staged) + 1);
			recall(p, kept_state(w, n_segments(w) + i), s);
			backward_token(w, p, token(m.d_k, i % STAGED), first + i, s, ds);
		}
	}
	store_state(m, p, ds, doubles(w.a.dh0));
}

/* Adds to the gradient of a head's bonus, a thread per token and head. */
static __global__ void __launch_bounds__(THREADS)
        bonus_kernel(struct matrix_recurrence_backward_args a)
{
	const struct matrix_recurrence_args &m = a.forward;
	const int64_t row = (int64_t)blockIdx.x * THREADS + threadIdx.x, h = row % m.n_heads;
	const int64_t b = row / m.n_heads / m.seq_len, t = row / m.n_heads % m.seq_len;
	double sum = 0;

	if (b >= m.batch)
		return;
	for (int64_t j = 0; j < m.d_v; j++)
		sum += at(&m.v, b, t, h)[j] * at(&a.dout, b, t, h)[j];
	for (int64_t i = 0; i < m.d_k; i++)
		atomicAdd(doubles(a.dbonus) + h * m.d_k + i,
		          m.scale * at(&m.q, b, t, h)[i] * at(&m.k, b, t, h)[i] * sum);
}

/* Zeroes what blocks add to: a thread per token and head. */
static __global__ void __launch_bounds__(THREADS)
        zero_kernel(struct matrix_recurrence_backward_args a)
{
	const struct matrix_recurrence_args &m = a.forward;
	const int64_t row = (int64_t)blockIdx.x * THREADS + threadIdx.x, h = row % m.n_heads;
	const int64_t b = row / m.n_heads / m.seq_len, t = row / m.n_heads % m.seq_len;

	if (b >= m.batch)
		return;
	for (int64_t i = 0; i < m.d_k; i++) {
		at(&a.dq, b, t, h)[i] = at(&a.dk, b, t, h)[i] = 0;
		if (m.decay == DECAY_DIAGONAL || (m.decay == DECAY_SCALAR && i == 0))
			at(&a.dlog_decay, b, t, h)[i] = 0;
	}
	if (m.rule == RULE_DELTA)
		*at(&a.dbeta, b, t, h) = 0;
}

REFERENCE(matrix_recurrence_backward)
{
	const struct matrix_recurrence_backward_args *a =
	        static_cast<const struct matrix_recurrence_backward_args *>(args);
	const struct matrix_recurrence_args *m = &a->forward;
	const int64_t rows = m->batch * m->seq_len * m->n_heads;
	struct matrix_backward w = {*a, (int64_t)ceil(sqrt((double)m->seq_len)), NULL};
	const scratch kept(device, matrix_blocks(m) * n_kept(w) * lane_rows(*m) * THREADS);

	TRY(kept.status);
	w.kept = kept.data();
	TRY(launch(device, zero_kernel, quotient_up(rows, THREADS), 0, *a));
	TRY(launch(device, matrix_backward_kernel, matrix_blocks(m), staged_bytes(m), w));
	if (m->rule != RULE_BONUS)
		return STATUS_OK;
	TRY(device_fill(device, a->dbonus, 0, (size_t)(m->n_heads * m->d_k) * sizeof(double)));
	return launch(device, bonus_kernel, quotient_up(rows, THREADS), 0, *a);
}
