/*
 * The queue by which the producer of a block of a persistent kernel, which draws the tickets, tells
 * the other warps what to work on. (Which unit a ticket stands for is each kernel's own.)
 */
#ifndef KERNELS_HOPPER_SCHEDULE_CUH
#define KERNELS_HOPPER_SCHEDULE_CUH

#include "kernels/hopper/ring.cuh"

namespace hopper
{

constexpr int SCHEDULE_SLOTS = 4;

/*
 * The units of a block, from its producer to whole warps. UNIT has BYTES, store(shared),
 * load(shared), and is_work(), false of the one that ends the queue. The barriers are the full ones
 * and, after them, the empty ones.
 */
template <typename UNIT, typename RING, int BARRIERS, int UNITS> struct unit_queue {
	uint32_t shared;
	RING at;

	__device__ uint32_t full() const
	{
		return shared + BARRIERS + slot_of(at) * 8;
	}

	__device__ uint32_t empty() const
	{
		return full() + SCHEDULE_SLOTS * 8;
	}

	__device__ uint32_t slot() const
	{
		return shared + UNITS + slot_of(at) * UNIT::BYTES;
	}

	__device__ void put(const UNIT &u)
	{
		barrier_wait(empty(), parity_of(at) ^ 1);
		u.store(slot());
		barrier_arrive(full());
		at.advance();
	}

	/* By whole warps; false after the last one. */
	__device__ bool get(UNIT &u)
	{
		barrier_wait(full(), parity_of(at));
		u.load(slot());
		warp_arrive(empty());
		at.advance();
		return u.is_work();
	}
};

} // namespace hopper

#endif
