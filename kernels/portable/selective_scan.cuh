/* What the forward and the backward pass of the selective scan share. */
#ifndef KERNELS_PORTABLE_SELECTIVE_SCAN_CUH
#define KERNELS_PORTABLE_SELECTIVE_SCAN_CUH

#include "kernels/portable/device.cuh"

namespace
{

constexpr int SCAN_STATE = 16;

/* How time is cut where channels alone do not fill the device: segments of whole chunks, each of
 * which is first run from zero. */
struct scan_segments {
	int64_t length, count;
	float *ends;  /* [count, B, N, channels]: what a segment makes of zero; then, of each its
	                 start */
	float *steps; /* [count, B, channels]: sums of dt, of which the decay of a segment is made
	               */
};

/* The rate of a state times -log2(e): the decay is 2 to the power of this times dt. */
static __device__ __forceinline__ float scan_rate(const struct selective_scan_args &a,
                                                  int64_t channel, int n)
{
	return -LOG2E * __expf(a.log_rate[channel * SCAN_STATE + n]);
}

static __device__ __forceinline__ float scan_silu(float x)
{
	return x * sigmoid(x);
}

/* Element (b, n, channel) of [B, N, channels]. */
static __device__ __forceinline__ int64_t scan_index(const struct selective_scan_args &a, int64_t b,
                                                     int n, int64_t channel)
{
	return (b * SCAN_STATE + n) * a.channels + channel;
}

/* The border before token t. */
static __device__ __forceinline__ float *scan_border(const struct selective_scan_args &a, int64_t b,
                                                     int64_t t, int n, int64_t channel)
{
	const int64_t per_sequence = (a.seq_len + SCAN_CHUNK - 1) / SCAN_CHUNK;

	return a.borders + scan_index(a, b * per_sequence + t / SCAN_CHUNK, n, channel);
}

/* Segments that `blocks` blocks are cut into, of which a multiprocessor should have `per_sm`; one
 * if fewer than `least` would come of it. */
static inline struct scan_segments cut_scan(const struct device *device,
                                            const struct selective_scan_args *a, int64_t blocks,
                                            int64_t per_sm, int64_t least, void *workspace)
{
	const int64_t chunks = divide_up(a->seq_len, SCAN_CHUNK);
	const int64_t wanted = per_sm * cuda_sm_count(device) / blocks;
	const int64_t most = divide_up(chunks, 4), n = wanted < most ? wanted : most;
	struct scan_segments s;

	s.length = divide_up(chunks, n < least ? 1 : n) * SCAN_CHUNK;
	s.count = divide_up(a->seq_len, s.length);
	s.ends = static_cast<float *>(workspace);
	s.steps = s.ends + s.count * a->batch * SCAN_STATE * a->channels;
	return s;
}

static inline size_t scan_segment_bytes(const struct selective_scan_args *a,
                                        const struct scan_segments *s)
{
	return s->count == 1 ? 0
	                     : (size_t)(s->count * a->batch * (SCAN_STATE + 1) * a->channels) *
	                               sizeof(float);
}

} // namespace

#endif
