/*
 * Rotary position embedding. The angle position * theta_i is reduced to a
 * fraction of a turn in two floats, because position * theta in one float is
 * wrong by hundredths of a radian at the positions of a million tokens.
 */
#ifndef KERNELS_PORTABLE_ROPE_CUH
#define KERNELS_PORTABLE_ROPE_CUH

#include <math.h>

#include "kernels/portable/device.cuh"

enum { MAX_ROPE_WIDTH = 256 };

/* theta_i / (2 pi) of a head of width d as the sum of two floats, i = 0 .. d/2-1. */
struct rope_table {
	float high[MAX_ROPE_WIDTH / 2], low[MAX_ROPE_WIDTH / 2];
};

static inline struct rope_table rope_table_make(int64_t d_head)
{
	struct rope_table table;

	for (int i = 0; i < MAX_ROPE_WIDTH / 2; i++) {
		const double turns = pow(10000.0, -2.0 * i / (double)d_head) / 6.283185307179586;

		table.high[i] = (float)turns;
		table.low[i] = (float)(turns - (double)table.high[i]);
	}
	return table;
}

/* The tables of all widths that are multiples of 16. */
struct rope_tables {
	struct rope_table of[MAX_ROPE_WIDTH / 16];
};

static inline struct rope_tables rope_tables_make()
{
	struct rope_tables tables;

	for (int i = 0; i < MAX_ROPE_WIDTH / 16; i++)
		tables.of[i] = rope_table_make(16 * (i + 1));
	return tables;
}

/* The table of a width, computed once. */
static inline const struct rope_table &rope_table_of(int64_t d_head)
{
	static const struct rope_tables tables = rope_tables_make();

	return tables.of[d_head / 16 - 1];
}

/* cos and sin of position * theta_i. */
static __device__ __forceinline__ void
rope_angle(float &cosine, float &sine, const struct rope_table &table, int i, int64_t position)
{
	const float p = (float)position;
	const float turns = p * table.high[i];
	const float rest = fmaf(p, table.high[i], -turns) + p * table.low[i];

	sincospif(2.0f * (turns - rintf(turns) + rest), &sine, &cosine);
}

/* The same for i = first .. first + 7. */
static __device__ __forceinline__ void rope_angles(float (&cosine)[8], float (&sine)[8],
                                                   const struct rope_table &table, int first,
                                                   int64_t position)
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		rope_angle(cosine[i], sine[i], table, first + i, position);
}

/*
 * Eight elements of a head spread over neighbouring lanes, `lane` of them, of which the first
 * `lanes`, a power of two, hold what turns: rotates this lane's x, whose partners are half of these
 * lanes away.
 */
static __device__ __forceinline__ void rope_lanes(float (&x)[8], const struct rope_table &table,
                                                  int lane, int lanes, int64_t position)
{
	float cosine[8], sine[8];

	rope_angles(cosine, sine, table, 8 * (lane % (lanes / 2)), position);
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float partner = __shfl_xor_sync(0xffffffffu, x[i], lanes / 2);

		if (lane < lanes)
			x[i] = x[i] * cosine[i] + (lane < lanes / 2 ? -partner : partner) * sine[i];
	}
}

/* Eight pairs, turned by their angles. */
static __device__ __forceinline__ void turn8(float (&low)[8], float (&high)[8],
                                             const float (&cosine)[8], const float (&sine)[8])
{
#pragma unroll
	for (int i = 0; i < 8; i++) {
		const float x = low[i];

		low[i] = x * cosine[i] - high[i] * sine[i];
		high[i] = high[i] * cosine[i] + x * sine[i];
	}
}

/* A tensor to be rotated, or copied if not `rope`; see rotate_tensor(). */
struct rotation {
	int64_t batch, n_tokens, n_heads, d_head;
	int64_t width;  /* columns of a head that turn, its first */
	int64_t first;  /* tokens before it are left out */
	int64_t slots;  /* token t goes to token t % slots of `to` */
	int64_t period; /* token t has position t / period */
	bool rope;
	bool inverse; /* by the opposite angle */
	struct view from, to;
};

/* Of all tokens, each at its own position. */
static inline struct rotation rotation_of(int64_t batch, int64_t n_tokens, int64_t n_heads,
                                          int64_t d_head, bool rope)
{
	return {batch, n_tokens, n_heads, d_head, d_head, 0, n_tokens, 1, rope, false, {}, {}};
}

/* Columns of a head that turn. */
static inline int64_t turned_width(int64_t rope_width, int64_t d_head)
{
	return rope_width > 0 ? rope_width : d_head;
}

/* Submits one rotation; `to` may be `from`, or nothing, which then is all that is done. */
enum status rotate_tensor(struct device *device, const char *operation, struct rotation rotation,
                          const struct view &from, const struct view &to);

/* The queries of RAT's scan, whose positions are chunks. */
static inline enum status rotate_queries(struct device *device, const struct rat_scan_args *a)
{
	struct rotation r = rotation_of(a->batch, a->seq_len, a->groups, a->d_head, a->rope);

	r.period = a->chunk;
	return rotate_tensor(device, "rat_scan", r, a->q, a->q_out);
}

#endif
