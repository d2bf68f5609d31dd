#include "tests/gpu/ptx.h"

#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/tensor_map.h"

using namespace hopper;

namespace
{

/* An array of the host and its copy on the device. */
template <typename T> struct mirror {
	struct device *device;
	T *data = NULL;
	size_t bytes;
	enum status status;

	mirror(struct device *on, size_t count, const T *host)
	    : device(on), bytes(count * sizeof(T))
	{
		status = device_allocate(device, bytes, reinterpret_cast<void **>(&data));
		if (status == STATUS_OK)
			status = device_upload(device, data, host, bytes);
	}

	~mirror()
	{
		if (data)
			device_release(device, data);
	}

	enum status download(T *host) const
	{
		return device_download(device, host, data, bytes);
	}
};

/* After a launch: how it went. */
enum status finished(struct device *device)
{
	CUDA_TRY(cudaGetLastError());
	return device_synchronize(device);
}

/* The dynamic shared memory of a block, where a swizzled tile may begin. */
__device__ uint32_t aligned_shared()
{
	extern __shared__ char unaligned[];

	return (shared_address(unaligned) + 1023) & ~1023u;
}

__device__ void shared_store_half(uint32_t shared, uint16_t value)
{
	asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(value) : "memory");
}

__device__ uint16_t shared_load_half(uint32_t shared)
{
	uint16_t value;

	asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(shared) : "memory");
	return value;
}

/* x [rows, columns] as swizzled panels of 64 columns. */
__device__ void fill_panels(uint32_t tile, const uint16_t *x, int rows, int columns)
{
	for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
		const int row = i / columns, column = i % columns;
		const int panel = column / 64 * rows * 128;

		shared_store_half(tile + panel + swizzle_128(row * 128 + column % 64 * 2), x[i]);
	}
}

template <int N, bool REGISTERS>
__global__ void __launch_bounds__(128, 1)
        product(bool accumulate, const uint16_t *a, const uint16_t *b, float *d)
{
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
	const int row = 16 * warp + lane / 4, column = 2 * (lane & 3);
	const uint32_t a_tile = aligned_shared(), b_tile = a_tile + PTX_M * PTX_K * 2;
	const uint64_t a_operand = matrix_descriptor(a_tile, 16);
	const uint64_t b_operand = matrix_descriptor(b_tile, REGISTERS ? PTX_K * 128 : 16);
	const uint32_t *a_pairs = reinterpret_cast<const uint32_t *>(a);
	uint32_t fragment[PTX_K / 4];
	float sum[N / 2];

	fill_panels(a_tile, a, PTX_M, PTX_K);
	if (REGISTERS)
		fill_panels(b_tile, b, PTX_K, N);
	else
		fill_panels(b_tile, b, N, PTX_K);
	for (int i = 0; i < PTX_K / 4; i++) {
		const int r = row + 8 * (i & 1), c = 8 * (i >> 1) + column;

		fragment[i] = a_pairs[(r * PTX_K + c) / 2];
	}
	for (int i = 0; i < N / 2; i++)
		sum[i] = d[(row + 8 * ((i >> 1) & 1)) * N + 8 * (i >> 2) + column + (i & 1)];
	fence_async_proxy();
	__syncthreads();
	pin(sum);
	pin(fragment);
	wgmma_fence();
#pragma unroll
	for (int step = 0; step < PTX_K / 16; step++) {
		const bool add = accumulate || step > 0;
		const int within = step % 4 * 32, panel = step / 4;

		if (REGISTERS)
			wgmma_rs(sum, &fragment[4 * step], b_operand + step * 2048 / 16, add);
		else
			wgmma_ss(sum, a_operand + (panel * PTX_M * 128 + within) / 16,
			         b_operand + (panel * N * 128 + within) / 16, add);
	}
	wgmma_commit();
	wgmma_wait<0>();
	pin(sum);
	for (int i = 0; i < N / 2; i++)
		d[(row + 8 * ((i >> 1) & 1)) * N + 8 * (i >> 2) + column + (i & 1)] = sum[i];
}

struct box_maps {
	CUtensorMap from, to;
};

__global__ void copy_box(const __grid_constant__ box_maps maps, int column, int token, int h, int b,
                         uint16_t *box)
{
	const uint32_t tile = aligned_shared(), barrier = tile + PTX_BOX * 128;

	/* Nothing of the box may be left from before. */
	for (int i = threadIdx.x; i < PTX_BOX * 64; i += blockDim.x)
		shared_store_half(tile + 2 * i, 0xffff);
	if (threadIdx.x == 0) {
		barrier_init(barrier, 1);
		barrier_init_fence();
	}
	fence_async_proxy();
	__syncthreads();
	if (threadIdx.x == 0) {
		tensor_map_prefetch(&maps.from);
		barrier_arrive_expect(barrier, PTX_BOX * 128);
		tensor_load(tile, &maps.from, barrier, column, token, h, b);
	}
	barrier_wait(barrier, 0);
	for (int i = threadIdx.x; i < PTX_BOX * 64; i += blockDim.x)
		box[i] = shared_load_half(tile + 2 * i);
	if (threadIdx.x == 0 && token >= 0) {
		tensor_store(&maps.to, tile, column, token, h, b);
		store_commit();
		store_wait_read();
	}
}

__global__ void bulk(int count, const uint8_t *from, uint8_t *to)
{
	const uint32_t tile = aligned_shared(), barrier = tile + ((count + 15) & ~15);

	if (threadIdx.x == 0) {
		barrier_init(barrier, 1);
		barrier_init_fence();
		barrier_arrive_expect(barrier, count);
		bulk_load(tile, from, count, barrier);
	}
	__syncthreads();
	barrier_wait(barrier, 0);
	for (int i = 2 * threadIdx.x; i < count; i += 2 * blockDim.x)
		*reinterpret_cast<uint16_t *>(to + i) = shared_load_half(tile + i);
}

/* Warp 0 produces and does not wait for the first two slots: parity 1 of a new barrier passes. */
__global__ void ring(int count, int *received)
{
	const uint32_t slots = aligned_shared(), full = slots + 8, empty = full + 16;

	if (threadIdx.x == 0) {
		for (int i = 0; i < 2; i++) {
			barrier_init(full + 8 * i, 1);
			barrier_init(empty + 8 * i, 1);
		}
		barrier_init_fence();
	}
	__syncthreads();
	if (threadIdx.x % 32 != 0)
		return;
	for (int i = 0; i < count; i++) {
		const uint32_t slot = i % 2, parity = i / 2 % 2;

		if (threadIdx.x == 0) {
			barrier_wait(empty + 8 * slot, parity ^ 1);
			shared_store(slots + 4 * slot, i);
			barrier_arrive(full + 8 * slot);
		} else {
			barrier_wait(full + 8 * slot, parity);
			received[i] = shared_load(slots + 4 * slot);
			barrier_arrive(empty + 8 * slot);
		}
	}
}

/* Barrier 1 counts the 64 threads that arrive and the 32 that wait; barrier 2 the way back. */
__global__ void named_barriers(int rounds, int *seen)
{
	const uint32_t values = aligned_shared();
	const int lane = threadIdx.x % 32;

	for (int round = 1; round <= rounds; round++) {
		if (threadIdx.x < 64) {
			shared_store(values + 4 * threadIdx.x, round * threadIdx.x);
			named_barrier_arrive(1, 96);
			named_barrier_sync(2, 96);
		} else {
			named_barrier_sync(1, 96);
			seen[lane] = shared_load(values + 4 * lane);
			seen[32 + lane] = shared_load(values + 4 * (32 + lane));
			named_barrier_arrive(2, 96);
		}
	}
}

__global__ void matrices(const uint32_t *registers, uint16_t *stored, uint32_t *loaded)
{
	const uint32_t tile = aligned_shared(), row = tile + threadIdx.x * 16;
	const uint32_t *r = registers + 4 * threadIdx.x;
	uint32_t *back = loaded + 4 * threadIdx.x;

	store_matrix_x4(row, r[0], r[1], r[2], r[3]);
	__syncwarp();
	for (int i = threadIdx.x; i < 256; i += 32)
		stored[i] = shared_load_half(tile + 2 * i);
	load_matrix_x4(row, back[0], back[1], back[2], back[3]);
}

__global__ void warp_product(const uint16_t *a, const uint16_t *b, float *d)
{
	const uint32_t a_tile = aligned_shared(), b_tile = a_tile + 512;
	const int lane = threadIdx.x, row = lane / 4, column = 2 * (lane & 3);
	const int key = (lane >> 4) * 8 + (lane & 7), piece = lane >> 3 & 1;
	uint32_t fragment[4], keys[4];
	float sum[2][4];

	for (int i = lane; i < 256; i += 32) {
		shared_store_half(a_tile + 2 * i, a[i]);
		shared_store_half(b_tile + 2 * i, b[i]);
	}
	for (int i = 0; i < 8; i++)
		sum[i >> 2][i & 3] =
		        d[(row + 8 * (i >> 1 & 1)) * 16 + 8 * (i >> 2) + column + (i & 1)];
	__syncwarp();
	load_matrix_x4(a_tile + (lane & 15) * 32 + (lane >> 4) * 16, fragment[0], fragment[1],
	               fragment[2], fragment[3]);
	load_matrix_x4(b_tile + key * 32 + piece * 16, keys[0], keys[1], keys[2], keys[3]);
	mma_16816(sum[0], fragment[0], fragment[1], fragment[2], fragment[3], keys[0], keys[1]);
	mma_16816(sum[1], fragment[0], fragment[1], fragment[2], fragment[3], keys[2], keys[3]);
	for (int i = 0; i < 8; i++)
		d[(row + 8 * (i >> 1 & 1)) * 16 + 8 * (i >> 2) + column + (i & 1)] =
		        sum[i >> 2][i & 3];
}

/* The second and third warpgroup keep 200 numbers each, more than an equal share of registers. */
__global__ void __launch_bounds__(384, 1) many_registers(const uint32_t *x, uint32_t *y)
{
	if (threadIdx.x < 128) {
		registers_decrease<40>();
		return;
	}
	registers_increase<232>();
	uint32_t value[200];

#pragma unroll
	for (int i = 0; i < 200; i++)
		value[i] = x[i] + threadIdx.x;
#pragma unroll 1
	for (int round = 0; round < 3; round++) {
#pragma unroll
		for (int i = 0; i < 200; i++)
			value[i] = value[i] * 2654435761u + value[(i + 77) % 200];
	}
	uint32_t sum = 0;

#pragma unroll
	for (int i = 0; i < 200; i++)
		sum = sum * 31 + value[i];
	y[threadIdx.x - 128] = sum;
}

__global__ void arithmetic(const float *x, uint32_t *pair, float *y)
{
	*pair = pack_bf16(x[0], x[1]);
	y[0] = low_bf16(*pair);
	y[1] = high_bf16(*pair);
	y[2] = exp2_approx(x[0]);
	y[3] = exp2_approx(x[1]);
	y[4] = reciprocal_approx(x[0]);
	y[5] = reciprocal_approx(x[1]);
}

template <int N, bool REGISTERS>
enum status run_product(struct device *device, bool accumulate, const uint16_t *a,
                        const uint16_t *b, float *d)
{
	const int bytes = (PTX_M + N) * PTX_K * 2 + 1024;
	mirror<uint16_t> a_copy(device, PTX_M * PTX_K, a), b_copy(device, N * PTX_K, b);
	mirror<float> d_copy(device, PTX_M * N, d);

	TRY(a_copy.status);
	TRY(b_copy.status);
	TRY(d_copy.status);
	CUDA_TRY(cudaFuncSetAttribute(product<N, REGISTERS>,
	                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
	product<N, REGISTERS><<<1, 128, bytes, cuda_stream(device)>>>(accumulate, a_copy.data,
	                                                              b_copy.data, d_copy.data);
	TRY(finished(device));
	return d_copy.download(d);
}

} // namespace

enum status ptx_product(struct device *device, int n, bool registers, bool accumulate,
                        const uint16_t *a, const uint16_t *b, float *d)
{
	if (n == 64)
		return registers ? run_product<64, true>(device, accumulate, a, b, d)
		                 : run_product<64, false>(device, accumulate, a, b, d);
	return registers ? run_product<128, true>(device, accumulate, a, b, d)
	                 : run_product<128, false>(device, accumulate, a, b, d);
}

enum status ptx_copy_box(struct device *device, int64_t batch, int64_t tokens, int64_t heads,
                         int64_t d, int column, int token, int h, int b, const uint16_t *from,
                         uint16_t *box, uint16_t *to)
{
	const size_t count = static_cast<size_t>(batch * tokens * heads * d);
	mirror<uint16_t> from_copy(device, count, from), to_copy(device, count, to),
	        box_copy(device, PTX_BOX * 64, box);
	struct view view = {from_copy.data, tokens * heads * d, heads * d, d};
	box_maps maps;

	TRY(from_copy.status);
	TRY(to_copy.status);
	TRY(box_copy.status);
	TRY(tensor_map_encode(&maps.from, &view, batch, tokens, heads, d, PTX_BOX));
	view.data = to_copy.data;
	TRY(tensor_map_encode(&maps.to, &view, batch, tokens, heads, d, PTX_BOX));
	copy_box<<<1, 128, PTX_BOX * 128 + 1024 + 8, cuda_stream(device)>>>(maps, column, token, h,
	                                                                    b, box_copy.data);
	TRY(finished(device));
	TRY(box_copy.download(box));
	return to_copy.download(to);
}

enum status ptx_bulk_load(struct device *device, int count, const uint8_t *from, uint8_t *to)
{
	mirror<uint8_t> from_copy(device, count, from), to_copy(device, count, to);

	TRY(from_copy.status);
	TRY(to_copy.status);
	bulk<<<1, 64, count + 1024 + 24, cuda_stream(device)>>>(count, from_copy.data,
	                                                        to_copy.data);
	TRY(finished(device));
	return to_copy.download(to);
}

enum status ptx_ring(struct device *device, int count, int *received)
{
	mirror<int> copy(device, count, received);

	TRY(copy.status);
	ring<<<1, 64, 1024 + 64, cuda_stream(device)>>>(count, copy.data);
	TRY(finished(device));
	return copy.download(received);
}

enum status ptx_named_barriers(struct device *device, int rounds, int *seen)
{
	mirror<int> copy(device, 64, seen);

	TRY(copy.status);
	named_barriers<<<1, 96, 1024 + 256, cuda_stream(device)>>>(rounds, copy.data);
	TRY(finished(device));
	return copy.download(seen);
}

enum status ptx_matrices(struct device *device, const uint32_t *registers, uint16_t *stored,
                         uint32_t *loaded)
{
	mirror<uint32_t> from(device, 128, registers), back(device, 128, loaded);
	mirror<uint16_t> tile(device, 256, stored);

	TRY(from.status);
	TRY(back.status);
	TRY(tile.status);
	matrices<<<1, 32, 1024 + 512, cuda_stream(device)>>>(from.data, tile.data, back.data);
	TRY(finished(device));
	TRY(tile.download(stored));
	return back.download(loaded);
}

enum status ptx_warp_product(struct device *device, const uint16_t *a, const uint16_t *b, float *d)
{
	mirror<uint16_t> a_copy(device, 256, a), b_copy(device, 256, b);
	mirror<float> d_copy(device, 256, d);

	TRY(a_copy.status);
	TRY(b_copy.status);
	TRY(d_copy.status);
	warp_product<<<1, 32, 1024 + 1024, cuda_stream(device)>>>(a_copy.data, b_copy.data,
	                                                          d_copy.data);
	TRY(finished(device));
	return d_copy.download(d);
}

enum status ptx_registers(struct device *device, const uint32_t *x, uint32_t *y)
{
	mirror<uint32_t> from(device, 200, x), to(device, 256, y);

	TRY(from.status);
	TRY(to.status);
	many_registers<<<1, 384, 0, cuda_stream(device)>>>(from.data, to.data);
	TRY(finished(device));
	return to.download(y);
}

enum status ptx_arithmetic(struct device *device, const float *x, uint32_t *pair, float *y)
{
	mirror<float> from(device, 2, x), to(device, 6, y);
	mirror<uint32_t> packed(device, 1, pair);

	TRY(from.status);
	TRY(to.status);
	TRY(packed.status);
	arithmetic<<<1, 1, 0, cuda_stream(device)>>>(from.data, packed.data, to.data);
	TRY(finished(device));
	TRY(packed.download(pair));
	return to.download(y);
}
