/*
 * The linear recurrence for sm_90a in one pass over memory: h_t = a_t h_{t-1} + u_t.
 *
 * Time is cut into tiles of 16 rows a warp, channels into slabs of 64; a block of all warps of a
 * multiprocessor works on one tile while the next is loaded.
 *   consumer  (19 warps, with an output gate 16) keeps what it needs of its rows in registers, two
 *             channels a lane: it reduces them to (product of decays, state from zero), learns the
 *             state they start with, and runs over the registers again with that state
 *   linker    (a warp) draws tiles by ticket, earlier rows first, loads them with the copy engine,
 *             publishes a tile's reduction, and its final state as soon as it is known
 *
 * Tiles of one slab and sequence form a chain (decoupled look-back, Merrill and Garland 2016). The
 * linker looks back, from the moment it has drawn the tile, to the nearest final state and folds
 * the reductions in between forward, in the order of time: that is the arithmetic of a serial
 * chain, whoever does it, so the result does not depend on timing.
 *
 * Shared memory: two stages of gate, x and z; the warps' stretches, twice; the carry; barriers.
 * sigmoid(a) = 1 - w with w = 1 / (1 + e^a): gates close to one keep all digits of 1 - g.
 *
 * Limit: memory. 0.813 ms at D = 2048, 262144 tokens, T = 4096 (1.98 GHz), 93% of a copy's
 * bandwidth. docs/kernels/recurrence.md.
 */
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/hopper/kernels.h"
#include "kernels/hopper/launch.cuh"
#include "kernels/hopper/ptx.cuh"
#include "kernels/hopper/ring.cuh"
#include "kernels/hopper/tensor_map.h"
#include "kernels/kernels.h"

using namespace hopper;

namespace
{

constexpr int ROWS = 16, SLAB = 64, ROW_BYTES = SLAB * 2;
constexpr int STAGES = 2;
constexpr int WINDOW = 2; /* tiles looked at in one step back */

/* A chain link: {decay, state} of a tile from zero, or {INCLUSIVE, its final state}. Memory is
 * set to NOTHING before, a NaN that no arithmetic produces. */
constexpr uint32_t NOTHING = 0xFFFFFFFFu;
constexpr float INCLUSIVE = -1.0f;

struct parameters {
	CUtensorMap gate, x, z;
	int seq_len, d_model, slabs, chains;
	int64_t tiles; /* of all chains */
	const float *gate_bias, *h0;
	float *h_final;
	struct view h, out;
	uint64_t *links; /* [tiles per chain, chains, SLAB] */
	int *ticket;
};

/* With an output gate a tile has fewer rows, so that two of them fit. */
template <bool Z> struct shared_layout {
	static constexpr int WARPS = Z ? 16 : 19;
	static constexpr int TILE = WARPS * ROWS;
	static constexpr int BOX = TILE <= 256 ? TILE : TILE / 2; /* rows of one copy */
	static constexpr int TENSOR = TILE * ROW_BYTES;
	static constexpr int STAGE = (Z ? 3 : 2) * TENSOR;        /* gate, x, z */
	static constexpr int PARTS = STAGES * STAGE;              /* [2][WARPS][32] stretches */
	static constexpr int CARRY = PARTS + 2 * WARPS * 32 * 16; /* [32] two states */
	static constexpr int FULL = CARRY + 32 * 8;               /* a barrier per stage */
	static constexpr int EMPTY = FULL + STAGES * 8;           /* likewise */
	static constexpr int REDUCED = EMPTY + STAGES * 8;        /* a barrier */
	static constexpr int LINKED = REDUCED + 8;                /* a barrier */
	static constexpr int WORK = LINKED + 8;                   /* the tile of each stage */
	static constexpr int BYTES = WORK + STAGES * 4 + 1024;    /* the base is moved to 1024 */
};

/* What a tile is. */
struct place {
	int b, channel, position, chain; /* channel: the lane's first */
};

__device__ __forceinline__ place place_of(const parameters &p, int tile, int lane)
{
	place at;

	at.position = tile / p.chains;
	at.chain = tile - at.position * p.chains;
	at.b = at.chain / p.slabs;
	at.channel = (at.chain - at.b * p.slabs) * SLAB + 2 * lane;
	return at;
}

__device__ __forceinline__ uint32_t load_pair(uint32_t shared)
{
	uint32_t pair;

	asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(shared));
	return pair;
}

/* h = one step of the recurrence; `gate` is 1 - g, or the decay. */
template <enum gate_form FORM> __device__ __forceinline__ void step(float &h, float gate, float x)
{
	h = FORM == GATE_SIGMOID ? fmaf(gate, x - h, h) : fmaf(gate, h, x);
}

/* Two neighboring channels of a link, relaxed: each 8 bytes are whole. */
struct link_pair {
	uint64_t channel[2];
};

__device__ __forceinline__ link_pair load_link(const uint64_t *link)
{
	link_pair l;

	asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
	             : "=l"(l.channel[0]), "=l"(l.channel[1])
	             : "l"(link)
	             : "memory");
	return l;
}

__device__ __forceinline__ uint64_t pack_link(float decay, float state)
{
	return static_cast<uint64_t>(__float_as_uint(state)) << 32 | __float_as_uint(decay);
}

__device__ __forceinline__ void store_link(uint64_t *link, uint64_t first, uint64_t second)
{
	asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(link), "l"(first),
	             "l"(second)
	             : "memory");
}

__device__ __forceinline__ float link_decay(uint64_t link)
{
	return __uint_as_float(static_cast<uint32_t>(link));
}

__device__ __forceinline__ float link_state(uint64_t link)
{
	return __uint_as_float(static_cast<uint32_t>(link >> 32));
}

/* The state after a window of links, nearest tile first; false if it is not known yet. */
__device__ __forceinline__ bool fold(float &h, const link_pair (&links)[WINDOW], int channel)
{
	int depth = 0; /* of the nearest final state, from 1 */
	bool open = true;

#pragma unroll
	for (int j = 0; j < WINDOW; j++) {
		const uint64_t link = links[j].channel[channel];

		if (open && link_decay(link) == INCLUSIVE)
			depth = j + 1;
		open = open && depth == 0 && static_cast<uint32_t>(link) != NOTHING;
	}
	if (depth == 0)
		return false;
#pragma unroll
	for (int j = WINDOW - 1; j >= 0; j--) {
		const uint64_t link = links[j].channel[channel];

		if (j == depth - 1)
			h = link_state(link);
		else if (j < depth)
			h = fmaf(link_decay(link), h, link_state(link));
	}
	return true;
}

/* A stretch of rows of two channels: the product of its decays, and its state from zero. */
struct stretch {
	float decay[2], state[2];
};

__device__ __forceinline__ stretch load_stretch(uint32_t shared)
{
	stretch s;

	asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
	             : "=f"(s.decay[0]), "=f"(s.state[0]), "=f"(s.decay[1]), "=f"(s.state[1])
	             : "r"(shared));
	return s;
}

__device__ __forceinline__ void store_stretch(uint32_t shared, const stretch &s)
{
	shared_store4(shared, s.decay[0], s.state[0], s.decay[1], s.state[1]);
}

/* Joins the stretches of a tile's warps; each is replaced by that of all rows before it. */
template <int WARPS> __device__ __forceinline__ stretch join(uint32_t parts, int lane)
{
	constexpr int GROUP = 4; /* loads in flight */
	stretch tile = {{1.0f, 1.0f}, {}};

#pragma unroll
	for (int first = 0; first < WARPS; first += GROUP) {
		stretch next[GROUP];

#pragma unroll
		for (int w = 0; w < GROUP && first + w < WARPS; w++)
			next[w] = load_stretch(parts + ((first + w) * 32 + lane) * 16);
#pragma unroll
		for (int w = 0; w < GROUP && first + w < WARPS; w++) {
			store_stretch(parts + ((first + w) * 32 + lane) * 16, tile);
#pragma unroll
			for (int i = 0; i < 2; i++) {
				tile.state[i] =
				        fmaf(next[w].decay[i], tile.state[i], next[w].state[i]);
				tile.decay[i] *= next[w].decay[i];
			}
		}
	}
	return tile;
}

/* The warp that draws tiles, loads them, and links each to the chain. */
template <bool Z> struct linker {
	using layout = shared_layout<Z>;

	const parameters &p;
	uint32_t shared;
	int lane, next; /* lane 0: the next ticket */

	__device__ void draw()
	{
		if (lane == 0)
			next = atomicAdd(p.ticket, 1);
	}

	/* Fills stage i % STAGES with the next tile, or says that there is none. */
	__device__ __forceinline__ void load(int i)
	{
		const int s = i % STAGES;
		const uint32_t full = shared + layout::FULL + s * 8;

		if (lane == 0) {
			const place at = place_of(p, next, 0);

			shared_store(shared + layout::WORK + s * 4, next < p.tiles ? next : -1);
			if (next < p.tiles)
				copy(at, shared + s * layout::STAGE, full);
			else
				barrier_arrive(full);
			next = atomicAdd(p.ticket, 1);
		}
		__syncwarp();
	}

	__device__ __forceinline__ void copy(const place &at, uint32_t stage, uint32_t full)
	{
		barrier_arrive_expect(full, layout::STAGE);
#pragma unroll
		for (int row = 0; row < layout::TILE; row += layout::BOX) {
			const int t = at.position * layout::TILE + row;
			const uint32_t to = stage + row * ROW_BYTES;

			tensor_load(to, &p.gate, full, at.channel, t, 0, at.b);
			tensor_load(to + layout::TENSOR, &p.x, full, at.channel, t, 0, at.b);
			if (Z)
				tensor_load(to + 2 * layout::TENSOR, &p.z, full, at.channel, t, 0,
				            at.b);
		}
	}

	__device__ __forceinline__ uint64_t *link_of(const place &at, int position) const
	{
		return p.links + (static_cast<int64_t>(position) * p.chains + at.chain) * SLAB +
		       2 * lane;
	}

	/* One look at the tiles before: the state before the tile, if they tell it. */
	__device__ __forceinline__ bool look_back(const place &at, float (&h)[2]) const
	{
		link_pair links[WINDOW];

#pragma unroll
		for (int j = 0; j < WINDOW; j++)
			links[j] = load_link(link_of(at, max(at.position - 1 - j, 0)));
		const bool known = fold(h[0], links, 0) && fold(h[1], links, 1);

		return __all_sync(0xFFFFFFFFu, known);
	}

	/* The tile's stretch once its warps have reduced their rows; its stage may then be filled.
	 */
	__device__ __forceinline__ stretch reduced(int i)
	{
		barrier_wait(shared + layout::REDUCED, i & 1);
		return join<layout::WARPS>(shared + layout::PARTS + i % 2 * layout::WARPS * 32 * 16,
		                           lane);
	}

	__device__ __forceinline__ void link(const place &at, int i)
	{
		uint64_t *mine = link_of(at, at.position);
		stretch tile;
		float h[2] = {};
		bool known = at.position == 0, is_reduced = false;

		if (known && p.h0 && at.channel < p.d_model) {
			h[0] = p.h0[at.b * p.d_model + at.channel];
			h[1] = p.h0[at.b * p.d_model + at.channel + 1];
		}
		while (!known) {
			if (!is_reduced &&
			    __any_sync(0xFFFFFFFFu,
			               barrier_test(shared + layout::REDUCED, i & 1))) {
				tile = reduced(i);
				store_link(mine, pack_link(tile.decay[0], tile.state[0]),
				           pack_link(tile.decay[1], tile.state[1]));
				if (!Z)
					load(i + STAGES);
				is_reduced = true;
			}
			known = look_back(at, h);
		}
		if (!is_reduced)
			tile = reduced(i);
		store_link(mine, pack_link(INCLUSIVE, fmaf(tile.decay[0], h[0], tile.state[0])),
		           pack_link(INCLUSIVE, fmaf(tile.decay[1], h[1], tile.state[1])));
		shared_store2(shared + layout::CARRY + lane * 8, h[0], h[1]);
		warp_arrive(shared + layout::LINKED);
		if (!Z && !is_reduced)
			load(i + STAGES);
	}

	__device__ void run()
	{
		draw();
		for (int i = 0; i < STAGES; i++)
			load(i);
		for (int i = 0;; i++) {
			const int tile = shared_load(shared + layout::WORK + i % STAGES * 4);

			if (tile < 0)
				return;
			if (Z && i > 0) {
				barrier_wait(shared + layout::EMPTY + (i - 1) % STAGES * 8,
				             (i - 1) / STAGES & 1);
				load(i - 1 + STAGES);
			}
			link(place_of(p, tile, lane), i);
		}
	}
};

__device__ __forceinline__ uint32_t *row_pointer(const struct view &v, const place &at, int t)
{
	return reinterpret_cast<uint32_t *>(static_cast<__nv_bfloat16 *>(v.data) + at.b * v.batch +
	                                    t * v.token + at.channel);
}

/* The 32 rows of a warp, two channels a lane. */
template <enum gate_form FORM, bool Z> struct rows {
	float gate[ROWS][2]; /* 1 - g, or the decay */
	uint32_t x[ROWS];

	/* Where in a row of 128 bytes a lane's channels are: pieces are xor-ed with the row. */
	static __device__ __forceinline__ uint32_t at(uint32_t tensor, int r, int lane)
	{
		return tensor + r * ROW_BYTES + ((lane / 4 ^ r % 8) * 16 + lane % 4 * 4);
	}

	__device__ __forceinline__ stretch reduce(uint32_t gates, uint32_t xs,
	                                          const float (&bias)[2], int lane)
	{
		stretch s = {{1.0f, 1.0f}, {}};

#pragma unroll
		for (int r = 0; r < ROWS; r++) {
			const uint32_t packed = load_pair(at(gates, r, lane));

			x[r] = load_pair(at(xs, r, lane));
			gate[r][0] = fmaf(low_bf16(packed), LOG2E, bias[0]);
			gate[r][1] = fmaf(high_bf16(packed), LOG2E, bias[1]);
#pragma unroll
			for (int i = 0; i < 2; i++) {
				gate[r][i] = FORM == GATE_SIGMOID ? one_minus_sigmoid2(gate[r][i])
				                                  : exp2_approx(gate[r][i]);
				s.decay[i] = FORM == GATE_SIGMOID
				                     ? fmaf(-gate[r][i], s.decay[i], s.decay[i])
				                     : gate[r][i] * s.decay[i];
			}
			step<FORM>(s.state[0], gate[r][0], low_bf16(x[r]));
			step<FORM>(s.state[1], gate[r][1], high_bf16(x[r]));
		}
		return s;
	}

	/* Rows from `first` of the sequence on, those before seq_len; h becomes the last state. */
	__device__ __forceinline__ void emit(const parameters &p, const place &at, int first,
	                                     uint32_t zs, float (&h)[2], int lane) const
	{
		const int count = at.channel < p.d_model ? p.seq_len - first : 0;
		uint32_t *out = row_pointer(p.out, at, first), *state = row_pointer(p.h, at, first);

#pragma unroll
		for (int r = 0; r < ROWS; r++) {
			float result[2];

			if (r < count) {
				step<FORM>(h[0], gate[r][0], low_bf16(x[r]));
				step<FORM>(h[1], gate[r][1], high_bf16(x[r]));
			}
			result[0] = h[0];
			result[1] = h[1];
			if (Z) {
				const uint32_t z = load_pair(rows::at(zs, r, lane));

				result[0] *= one_minus_sigmoid2(-LOG2E * low_bf16(z));
				result[1] *= one_minus_sigmoid2(-LOG2E * high_bf16(z));
			}
			if (r < count) {
				if (p.h.data)
					*state = pack_bf16(h[0], h[1]);
				*out = pack_bf16(result[0], result[1]);
			}
			out += p.out.token / 2;
			state += p.h.token / 2;
		}
	}
};

template <enum gate_form FORM, bool Z>
__device__ __forceinline__ void consume(const parameters &p, uint32_t shared, int warp, int lane)
{
	using layout = shared_layout<Z>;
	const uint32_t carry = shared + layout::CARRY + lane * 8;

	for (int i = 0;; i++) {
		const int s = i % STAGES;
		const uint32_t gates = shared + s * layout::STAGE + warp * ROWS * ROW_BYTES;
		const uint32_t parts = shared + layout::PARTS + i % 2 * layout::WARPS * 32 * 16;
		rows<FORM, Z> mine;
		float bias[2] = {}, h[2];

		barrier_wait(shared + layout::FULL + s * 8, i / STAGES & 1);
		const int tile = shared_load(shared + layout::WORK + s * 4);
		if (tile < 0)
			return;
		const place at = place_of(p, tile, lane);
		const int first = at.position * layout::TILE + warp * ROWS;
		if (p.gate_bias && at.channel < p.d_model) {
			bias[0] = LOG2E * p.gate_bias[at.channel];
			bias[1] = LOG2E * p.gate_bias[at.channel + 1];
		}
		store_stretch(parts + (warp * 32 + lane) * 16,
		              mine.reduce(gates, gates + layout::TENSOR, bias, lane));
		warp_arrive(shared + layout::REDUCED);
		barrier_wait(shared + layout::LINKED, i & 1);
		asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
		             : "=f"(h[0]), "=f"(h[1])
		             : "r"(carry));
		const stretch before = load_stretch(parts + (warp * 32 + lane) * 16);
		h[0] = fmaf(before.decay[0], h[0], before.state[0]);
		h[1] = fmaf(before.decay[1], h[1], before.state[1]);
		mine.emit(p, at, first, gates + 2 * layout::TENSOR, h, lane);
		if (Z) {
			warp_arrive(shared + layout::EMPTY + s * 8);
		}
		if (p.h_final && at.channel < p.d_model && first < p.seq_len &&
		    first + ROWS >= p.seq_len) {
			p.h_final[at.b * p.d_model + at.channel] = h[0];
			p.h_final[at.b * p.d_model + at.channel + 1] = h[1];
		}
	}
}

template <enum gate_form FORM, bool Z>
__global__ void __launch_bounds__((shared_layout<Z>::WARPS + 1) * 32, 1)
        recurrence_kernel(const __grid_constant__ parameters p)
{
	using layout = shared_layout<Z>;
	extern __shared__ unsigned char memory[];
	const uint32_t shared = (shared_address(memory) + 1023) / 1024 * 1024;
	const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

	if (threadIdx.x == 0) {
		for (int s = 0; s < STAGES; s++) {
			barrier_init(shared + layout::FULL + s * 8, 1);
			barrier_init(shared + layout::EMPTY + s * 8, layout::WARPS);
		}
		barrier_init(shared + layout::REDUCED, layout::WARPS);
		barrier_init(shared + layout::LINKED, 1);
		barrier_init_fence();
	}
	__syncthreads();
	if (warp < layout::WARPS)
		consume<FORM, Z>(p, shared, warp, lane);
	else
		linker<Z>{p, shared, lane, 0}.run();
}

int64_t divide_up(int64_t a, int64_t b)
{
	return (a + b - 1) / b;
}

/* Links of all tiles; the ticket comes after them. */
int64_t link_bytes(const struct recurrence_args *a)
{
	const int64_t tile = a->z.data ? shared_layout<true>::TILE : shared_layout<false>::TILE;

	return divide_up(a->seq_len, tile) * a->batch * divide_up(a->d_model, SLAB) * SLAB * 8;
}

/* A map of [B, T, D]; the stride of its one head is never used, but must be a valid one. */
enum status encode(CUtensorMap *map, struct view v, const struct recurrence_args &a, int rows)
{
	v.head = v.token;
	return tensor_map_encode(map, &v, a.batch, a.seq_len, 1, a.d_model, rows);
}

template <enum gate_form FORM, bool Z>
enum status launch(struct device *device, const struct recurrence_args *a, void *workspace)
{
	using layout = shared_layout<Z>;
	const int64_t bytes = link_bytes(a);
	parameters p = {};
	enum status status = encode(&p.gate, a->gate, *a, layout::BOX);

	if (status == STATUS_OK)
		status = encode(&p.x, a->x, *a, layout::BOX);
	if (status == STATUS_OK && Z)
		status = encode(&p.z, a->z, *a, layout::BOX);
	if (status != STATUS_OK)
		return status;
	p.seq_len = static_cast<int>(a->seq_len);
	p.d_model = static_cast<int>(a->d_model);
	p.slabs = static_cast<int>(divide_up(a->d_model, SLAB));
	p.chains = static_cast<int>(a->batch) * p.slabs;
	p.tiles = divide_up(a->seq_len, layout::TILE) * p.chains;
	p.gate_bias = a->gate_bias;
	p.h0 = a->h0;
	p.h_final = a->h_final;
	p.h = a->h;
	p.out = a->out;
	p.links = static_cast<uint64_t *>(workspace);
	p.ticket = reinterpret_cast<int *>(static_cast<char *>(workspace) + bytes);
	CUDA_TRY(cudaMemsetAsync(p.links, 0xFF, bytes, cuda_stream(device)));
	CUDA_TRY(cudaMemsetAsync(p.ticket, 0, sizeof *p.ticket, cuda_stream(device)));
	return submit(device, recurrence_kernel<FORM, Z>, turns(device, p.tiles),
	              (layout::WARPS + 1) * 32, layout::BYTES, p);
}

enum status launch(struct device *device, const struct recurrence_args *a, void *workspace)
{
	if (a->form == GATE_SIGMOID)
		return a->z.data ? launch<GATE_SIGMOID, true>(device, a, workspace)
		                 : launch<GATE_SIGMOID, false>(device, a, workspace);
	return a->z.data ? launch<GATE_LOG_DECAY, true>(device, a, workspace)
	                 : launch<GATE_LOG_DECAY, false>(device, a, workspace);
}

} // namespace

extern "C" const char *hopper_recurrence_unsupported(const struct device *device, const void *args)
{
	const auto *a = static_cast<const struct recurrence_args *>(args);

	if (!is_known_gate(a->form))
		return "an unknown form of gate";
	if (a->d_model % 8)
		return "width must be a multiple of 8";
	return check_views(device, &a->gate, &a->x, &a->z, &a->h, &a->out);
}

extern "C" size_t hopper_recurrence_workspace(const struct device *, const void *args)
{
	const auto *a = static_cast<const struct recurrence_args *>(args);

	return static_cast<size_t>(link_bytes(a)) + sizeof(int);
}

extern "C" enum status hopper_recurrence(struct device *device, const void *args, void *workspace)
{
	return launch(device, static_cast<const struct recurrence_args *>(args), workspace);
}
