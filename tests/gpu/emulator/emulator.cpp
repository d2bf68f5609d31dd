#include "tests/gpu/emulator/emulator.h"

#include <cstdio>
#include <deque>
#include <vector>

#ifndef __x86_64__
#error "switching fibers is written for x86-64"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
alignas(1024) unsigned char shared_memory[256 << 10];

/* Saves the running fiber's registers and stack in *from, continues the fiber saved in `to`. */
extern "C" void emulator_switch(void **from, void *to);
asm(".text\n"
    ".globl emulator_switch\n"
    "emulator_switch:\n"
    "	pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
    "	movq %rsp, (%rdi)\n"
    "	movq %rsi, %rsp\n"
    "	popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
    "	ret\n");

namespace
{

enum { STACK_BYTES = 256 << 10, SAVED_REGISTERS = 6, MAX_WARPS = 32, PATIENCE = 3 };

struct copy {
	void *to;
	const void *from;
	bool valid;
};

struct fiber {
	void *stack_pointer;
	bool done;
	unsigned index;
	std::vector<copy> open;               /* copies of the group being collected */
	std::deque<std::vector<copy>> closed; /* groups under way, oldest first */
};

struct barrier {
	int arrived, generation;
};

std::vector<fiber> fibers;
std::vector<char *> stacks;
fiber *current;
void *scheduler;
barrier block_barrier, warp_barrier[MAX_WARPS];
int n_alive, n_alive_in_warp[MAX_WARPS];
unsigned char exchange[MAX_WARPS][EMULATED_WARP][EXCHANGE_BYTES];
const std::function<void()> *kernel;
uint32_t random_state = 12345;

uint32_t random_number()
{
	random_state = random_state * 1664525u + 1013904223u;
	return random_state >> 8;
}

int warp_of(const fiber *f)
{
	return (int)(f->index / EMULATED_WARP);
}

void yield()
{
	fiber *self = current;

	emulator_switch(&self->stack_pointer, scheduler);
	threadIdx.x = self->index;
}

void wait_at(barrier *b, int count)
{
	const int generation = b->generation;

	if (++b->arrived == count) {
		b->arrived = 0;
		b->generation++;
		return;
	}
	while (b->generation == generation)
		yield();
}

/* A thread's whole life. Those that wait for all others may be waiting for this one to end. */
void live()
{
	(*kernel)();
	if (!current->open.empty())
		emulator_fail("a thread ended with copies that were not committed");
	for (const auto &group : current->closed)
		if (!group.empty())
			emulator_fail("a thread ended with copies that nobody waited for");
	current->done = true;
	n_alive--;
	n_alive_in_warp[warp_of(current)]--;
	if (block_barrier.arrived > 0 && block_barrier.arrived == n_alive) {
		block_barrier.arrived = 0;
		block_barrier.generation++;
	}
	yield();
	emulator_fail("a thread ran on after its end");
}

/* A stack that "returns" into live(), with zeros for the registers that a switch restores. */
void prepare(fiber *f, unsigned index, char *stack)
{
	void **top = reinterpret_cast<void **>(stack + STACK_BYTES - 64);

	*f = fiber();
	f->index = index;
	*--top = nullptr;
	*--top = reinterpret_cast<void *>(live);
	for (int i = 0; i < SAVED_REGISTERS; i++)
		*--top = nullptr;
	f->stack_pointer = top;
}

int barriers_passed()
{
	int sum = block_barrier.generation;

	for (const barrier &b : warp_barrier)
		sum += b.generation;
	return sum;
}

/* Continues every living fiber once, from a random one on, upwards or downwards. */
void run_all_once()
{
	const unsigned n = (unsigned)fibers.size(), first = random_number() % n;
	const bool upwards = random_number() & 1;

	for (unsigned i = 0; i < n; i++) {
		current = &fibers[(upwards ? first + i : first + n - i) % n];
		threadIdx.x = current->index;
		if (!current->done)
			emulator_switch(&scheduler, current->stack_pointer);
	}
}

void run_block(int threads)
{
	int idle = 0;

	memset(shared_memory, 0xff, sizeof shared_memory);
	block_barrier = {0, 0};
	memset(warp_barrier, 0, sizeof warp_barrier);
	memset(n_alive_in_warp, 0, sizeof n_alive_in_warp);
	fibers.resize((size_t)threads);
	for (int i = 0; i < threads; i++) {
		prepare(&fibers[i], (unsigned)i, stacks[i]);
		n_alive_in_warp[i / EMULATED_WARP]++;
	}
	n_alive = threads;
	while (n_alive > 0) {
		const int alive = n_alive, passed = barriers_passed();

		run_all_once();
		idle = n_alive == alive && barriers_passed() == passed ? idle + 1 : 0;
		if (idle > PATIENCE)
			emulator_fail("deadlock: not all threads reach a barrier");
	}
}

void perform(const std::vector<copy> &group)
{
	for (const copy &c : group) {
		if (c.valid)
			memcpy(c.to, c.from, 16);
		else
			memset(c.to, 0, 16);
	}
}

} // namespace

void emulator_fail(const char *what)
{
	fprintf(stderr, "emulated kernel: %s (block %u %u %u, thread %u)\n", what, blockIdx.x,
	        blockIdx.y, blockIdx.z, threadIdx.x);
	abort();
}

void emulate(dim3 grid, int threads, size_t shared, const std::function<void()> &body)
{
	if (shared > 227 << 10 || threads > 1024 || threads % EMULATED_WARP != 0)
		emulator_fail("more threads or shared memory than an H200 has");
	if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
		emulator_fail("an impossible grid");
	while ((int)stacks.size() < threads)
		stacks.push_back(static_cast<char *>(aligned_alloc(64, STACK_BYTES)));
	kernel = &body;
	gridDim = grid;
	blockDim = dim3((unsigned)threads);
	threadIdx = make_uint3(0, 0, 0);
	for (unsigned z = 0; z < grid.z; z++)
		for (unsigned y = 0; y < grid.y; y++)
			for (unsigned x = 0; x < grid.x; x++) {
				blockIdx = make_uint3(x, y, z);
				run_block(threads);
			}
}

int emulated_lane()
{
	return (int)(current->index % EMULATED_WARP);
}

unsigned char (*emulated_exchange())[EXCHANGE_BYTES]
{
	return exchange[warp_of(current)];
}

void emulated_warp_barrier()
{
	const int warp = warp_of(current);

	if (n_alive_in_warp[warp] != EMULATED_WARP)
		emulator_fail("a warp operation after some of its lanes have ended");
	wait_at(&warp_barrier[warp], EMULATED_WARP);
}

void emulated_block_barrier()
{
	wait_at(&block_barrier, n_alive);
}

void emulated_copy(void *shared, const void *global, bool valid)
{
	if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
	    (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
		emulator_fail("a misaligned asynchronous copy");
	memset(shared, 0xff, 16);
	current->open.push_back({shared, global, valid});
}

void emulated_copy_commit()
{
	current->closed.push_back(std::move(current->open));
	current->open.clear();
}

void emulated_copy_wait(int n_pending)
{
	while ((int)current->closed.size() > n_pending) {
		perform(current->closed.front());
		current->closed.pop_front();
	}
}
