/* kernels/portable/ptx.cuh on a processor: the same functions, the same layouts of fragments. */
#ifndef KERNELS_PORTABLE_PTX_CUH
#define KERNELS_PORTABLE_PTX_CUH

#include "tests/gpu/emulator/emulator.h"

inline void copy16_async(void *shared, const void *global, bool valid)
{
	emulated_copy(shared, global, valid);
}

inline void copy_commit()
{
	emulated_copy_commit();
}

template <int N> void copy_wait()
{
	emulated_copy_wait(N);
}

inline void emulated_load_matrices(uint32_t (&r)[4], const void *row, bool transposed)
{
	unsigned char(*exchange)[EXCHANGE_BYTES] = emulated_exchange();
	const int lane = emulated_lane();

	if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
		emulator_fail("a misaligned row of a matrix");
	memcpy(exchange[lane], &row, sizeof row);
	emulated_warp_barrier();
	for (int matrix = 0; matrix < 4; matrix++) {
		r[matrix] = 0;
		for (int half = 0; half < 2; half++) {
			const int i = transposed ? 2 * (lane % 4) + half : lane / 4;
			const int j = transposed ? lane / 4 : 2 * (lane % 4) + half;
			const uint16_t *from;

			memcpy(&from, exchange[8 * matrix + i], sizeof from);
			r[matrix] |= (uint32_t)from[j] << (16 * half);
		}
	}
	emulated_warp_barrier();
}

inline void load_matrices(uint32_t (&r)[4], const void *row)
{
	emulated_load_matrices(r, row, false);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void *row)
{
	emulated_load_matrices(r, row, true);
}

/* Element `half` of a lane's register, as the lanes have exchanged them. */
inline float emulated_element(unsigned char (*exchange)[EXCHANGE_BYTES], int lane, int index,
                              int half)
{
	uint32_t pair;

	memcpy(&pair, exchange[lane] + sizeof pair * (size_t)index, sizeof pair);
	return __uint_as_float(half ? pair & 0xffff0000u : pair << 16);
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
	unsigned char(*exchange)[EXCHANGE_BYTES] = emulated_exchange();
	const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
	const int lane = emulated_lane();

	memcpy(exchange[lane], mine, sizeof mine);
	emulated_warp_barrier();
	for (int i = 0; i < 4; i++) {
		const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;

		for (int k = 0; k < 16; k++)
			d[i] += emulated_element(exchange, row % 8 * 4 + k % 8 / 2,
			                         row / 8 + 2 * (k / 8), k % 2) *
			        emulated_element(exchange, column * 4 + k % 8 / 2, 4 + k / 8,
			                         k % 2);
	}
	emulated_warp_barrier();
}

template <typename T> T held(T x)
{
	return x;
}

inline uint32_t emulated_bf16(float x)
{
	uint32_t bits;

	memcpy(&bits, &x, sizeof bits);
	return isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t multiply_pairs(uint32_t a, uint32_t b)
{
	return emulated_bf16(__uint_as_float(a << 16) * __uint_as_float(b << 16)) |
	       emulated_bf16(__uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u))
	               << 16;
}

inline float exp2_fast(float x)
{
	return x < -126.0f ? 0.0f : exp2f(x);
}

inline float log2_fast(float x)
{
	return log2f(x);
}

inline float reciprocal_fast(float x)
{
	return 1.0f / x;
}

inline float rsqrt_fast(float x)
{
	return 1.0f / sqrtf(fabsf(x) < 1.1754944e-38f ? 0.0f : x);
}

inline float min_or_nan(float a, float b)
{
	return isnan(a) || a < b ? a : b;
}

inline uint64_t load_relaxed(const uint64_t *from)
{
	return *from;
}

inline void store_relaxed(uint64_t *to, uint64_t value)
{
	*to = value;
}

inline uint32_t take_ticket(uint32_t *ticket)
{
	return (*ticket)++;
}

#endif
