/*
 * Rings of stages in shared memory, each stage with a full and an empty mbarrier: where a warp is
 * in one, and its arrivals. A consumer waits for the parity of its position, a producer for the
 * other one.
 */
#ifndef KERNELS_HOPPER_RING_CUH
#define KERNELS_HOPPER_RING_CUH

#include "kernels/hopper/ptx.cuh"

namespace hopper
{

/* Position in a ring; a full trip flips the parity. */
struct ring_position {
	int slot = 0;
	uint32_t parity = 0;

	__device__ __forceinline__ void advance(int slots)
	{
		if (++slot == slots) {
			slot = 0;
			parity ^= 1;
		}
	}
};

template <int n> struct slot_ring : ring_position {
	__device__ __forceinline__ void advance()
	{
		ring_position::advance(n);
	}
};

/* The same as a count of turns of n (a power of two) slots, from which one can look back. */
template <int n> struct turn_ring {
	uint32_t turn = 0;

	__device__ void advance()
	{
		turn++;
	}

	__device__ uint32_t slot(uint32_t back = 0) const
	{
		return (turn - back) % n;
	}

	__device__ uint32_t parity(uint32_t back = 0) const
	{
		return (turn - back) / n % 2;
	}
};

/* Of either kind. */
__device__ __forceinline__ uint32_t slot_of(const ring_position &at)
{
	return at.slot;
}

__device__ __forceinline__ uint32_t parity_of(const ring_position &at)
{
	return at.parity;
}

template <int n> __device__ __forceinline__ uint32_t slot_of(const turn_ring<n> &at)
{
	return at.slot();
}

template <int n> __device__ __forceinline__ uint32_t parity_of(const turn_ring<n> &at)
{
	return at.parity();
}

/* One arrival of a warp, which vouches for the reads and ordinary writes of all its lanes. */
__device__ __forceinline__ void warp_arrive(uint32_t barrier)
{
	__syncwarp();
	if (threadIdx.x % 32 == 0)
		barrier_arrive(barrier);
}

/*
 * The same after reads whose place a bulk copy will take: `loaded` combines a register of each. The
 * arrival may otherwise be issued while they are under way, and the copy belongs to another proxy,
 * for which the arrival orders nothing. So the address depends on what was read; %ctaid.z is 0,
 * which the compiler does not know.
 */
__device__ __forceinline__ void warp_arrive_read(uint32_t barrier, uint32_t loaded)
{
	uint32_t zero;

	asm("mov.u32 %0, %%ctaid.z;" : "=r"(zero));
	warp_arrive(barrier + (loaded & zero));
}

/* The same after writes that wgmma or a bulk store will read. */
__device__ __forceinline__ void warp_publish(uint32_t barrier)
{
	fence_async_proxy();
	warp_arrive(barrier);
}

} // namespace hopper

#endif
