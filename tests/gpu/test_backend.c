/* The CUDA backend itself: memory, transfers, and a stopwatch that can be trusted. */
#include "tests/gpu/gpu.h"

#include "kernels/cuda/device.h"
#include "kernels/data.h"

TEST(test_info)
{
	struct device_info info;

	require_ok(device_info(device, &info));
	print_message("%s; driver %s; %s; %zu of %zu bytes free; %d multiprocessors\n", info.name,
	              info.driver, info.runtime, info.memory_free, info.memory_total,
	              cuda_sm_count(device));
	assert_true(info.name[0] && info.driver[0] && info.runtime[0]);
	assert_true(info.memory_free > 0 && info.memory_free <= info.memory_total);
}

/* Directions that the device adds to strided keys are those that the host adds. */
TEST(test_directions)
{
	enum { B = 2, T = 70, H = 3, D = 96, GAP = 8, COUNT = B * T * H * (D + GAP) };
	const struct directions d = directions_of_heads(DATA_PEAKED, true, 3, T, D);
	struct strided rows = {.dtype = DTYPE_F32,
	                       .size = {B, T, H, D},
	                       .stride = {T * H * (D + GAP), H * (D + GAP), D + GAP, 1}};
	scoped float *here = new_memory(COUNT * sizeof *here);
	scoped float *there = new_memory(COUNT * sizeof *there);
	void *memory;

	for (int i = 0; i < COUNT; i++)
		here[i] = (float)(i % 7);
	require_ok(device_allocate(device, COUNT * sizeof *here, &memory));
	require_ok(device_upload(device, memory, here, COUNT * sizeof *here));
	rows.data = memory;
	require_ok(device->backend->add_directions(device, &rows, &d));
	require_ok(device_download(device, there, memory, COUNT * sizeof *here));
	rows.data = here;
	add_directions_on_host(&rows, &d);
	for (int i = 0; i < COUNT; i++)
		assert_true(fabsf(here[i] - there[i]) < 1e-4f * (1 + fabsf(here[i])));
	device_release(device, memory);
}

/* Sizes around those of the staging buffers, every byte compared. */
TEST(test_transfers)
{
	static const size_t sizes[] = {1, 4, 4097, 8 << 20, (8 << 20) + 1, (24 << 20) + 13};

	for (size_t i = 0; i < COUNT_OF(sizes); i++) {
		const size_t bytes = sizes[i];
		scoped unsigned char *there = new_memory(bytes), *back = new_memory(bytes);
		void *memory;

		for (size_t j = 0; j < bytes; j++)
			there[j] = (unsigned char)(j * 31 + j / 251 + i);
		memset(back, 0, bytes);
		require_ok(device_allocate(device, bytes, &memory));
		assert_true((uintptr_t)memory % 256 == 0);
		require_ok(device_upload(device, memory, there, bytes));
		require_ok(device_download(device, back, memory, bytes));
		assert_memory_equal(there, back, bytes);
		require_ok(device_fill(device, memory, 0xa5, bytes));
		require_ok(device_download(device, back, memory, bytes));
		for (size_t j = 0; j < bytes; j++)
			assert_true(back[j] == 0xa5);
		device_release(device, memory);
	}
}

TEST(test_out_of_memory)
{
	void *memory = &memory;

	assert_int_equal(device_allocate(device, (size_t)1 << 50, &memory), STATUS_OOM);
	assert_null(memory);
	assert_non_null(strstr(status_message(), "bytes wanted"));
	require_ok(device_allocate(device, 1 << 20, &memory));
	device_release(device, memory);
}

/* Kernels of known duration, one and many, are timed to a few per cent, whatever the host does. */
TEST(test_stopwatch)
{
	static const struct {
		int launches;
		uint64_t ns;
	} work[] = {{1, 2000000}, {1, 200000}, {20, 50000}};

	for (size_t i = 0; i < COUNT_OF(work); i++) {
		const double expected = 1e-6 * (double)work[i].ns * work[i].launches;
		double best = INFINITY;

		for (int sample = 0; sample < 5; sample++) {
			double ms;

			require_ok(device_stopwatch_start(device));
			for (int j = 0; j < work[i].launches; j++)
				assert_int_equal(submit_spin(device, work[i].ns), 0);
			require_ok(device_stopwatch_stop(device, &ms));
			best = fmin(best, ms);
		}
		print_message("%d x %.3f ms: %.4f ms\n", work[i].launches,
		              1e-6 * (double)work[i].ns, best);
		/* A launch takes a few microseconds of its own. */
		assert_true(best > 0.99 * expected);
		assert_true(best < 1.02 * expected + 0.005 * work[i].launches);
	}
}

/* Gaps between the host's launches do not enter: as many empty kernels take a few us each. */
TEST(test_stopwatch_hides_launches)
{
	enum { LAUNCHES = 200 };
	double best = INFINITY;

	for (int sample = 0; sample < 5; sample++) {
		double ms;

		require_ok(device_stopwatch_start(device));
		for (int j = 0; j < LAUNCHES; j++)
			assert_int_equal(submit_spin(device, 0), 0);
		require_ok(device_stopwatch_stop(device, &ms));
		best = fmin(best, ms);
	}
	print_message("an empty kernel: %.2f us\n", 1e3 * best / LAUNCHES);
	assert_true(best < 0.004 * LAUNCHES);
}

/* Work that waits for the device inside a timed region does not deadlock. */
TEST(test_stopwatch_survives_waiting)
{
	double ms;

	require_ok(device_stopwatch_start(device));
	assert_int_equal(submit_spin(device, 1000000), 0);
	require_ok(device_synchronize(device));
	require_ok(device_stopwatch_stop(device, &ms));
	assert_true(ms >= 0.99);
}

/* Reading a buffer that fits the cache is slower after the cache was flushed. */
TEST(test_flush)
{
	enum { SAMPLES = 5 };
	const size_t bytes = 16 << 20;
	double hot = INFINITY, cold = INFINITY, ms;
	void *memory;

	require_ok(device_allocate(device, bytes, &memory));
	require_ok(device_fill(device, memory, 1, bytes));
	for (int sample = 0; sample < 2 * SAMPLES; sample++) {
		if (sample >= SAMPLES)
			require_ok(device_flush_cache(device));
		require_ok(device_stopwatch_start(device));
		assert_int_equal(submit_read(device, memory, bytes), 0);
		require_ok(device_stopwatch_stop(device, &ms));
		if (sample >= SAMPLES)
			cold = fmin(cold, ms);
		else
			hot = fmin(hot, ms);
	}
	device_release(device, memory);
	print_message("16 MiB: %.1f us hot, %.1f us cold\n", 1e3 * hot, 1e3 * cold);
	assert_true(cold > hot);
}

/* Every second head of a bf16 tensor, and of its tokens some: the host's answer. */
TEST(test_gather)
{
	enum {
		BATCH = 2,
		TOKENS = 50,
		HEADS = 6,
		WIDTH = 8,
		COUNT = BATCH * TOKENS * HEADS * WIDTH
	};
	static const int64_t tokens[] = {0, 7, 8, 31, 49};
	enum { LISTED = COUNT_OF(tokens), GATHERED = BATCH * LISTED * 3 * WIDTH };
	float host[COUNT];
	uint16_t elements[COUNT];
	double expected[GATHERED], found[GATHERED];
	struct gather gather = {.dtype = DTYPE_BF16,
	                        .from = elements,
	                        .size = {BATCH, LISTED, 3, WIDTH},
	                        .stride = {TOKENS * HEADS * WIDTH, HEADS * WIDTH, 2 * WIDTH, 1},
	                        .list = tokens,
	                        .listed = 1};
	void *from, *to;

	for (int i = 0; i < COUNT; i++)
		host[i] = (float)(i % 251) - 100;
	require_ok(device_allocate(device, sizeof elements, &from));
	require_ok(device_allocate(device, sizeof found, &to));
	require_ok(device_upload_floats(device, DTYPE_BF16, from, host, COUNT));
	require_ok(device_download(device, elements, from, sizeof elements));
	gather_on_host(&gather, expected);
	gather.from = from;
	require_ok(device_gather(device, &gather, to));
	require_ok(device_download(device, found, to, sizeof found));
	assert_memory_equal(found, expected, sizeof found);
	device_release(device, from);
	device_release(device, to);
}

TEST(test_add)
{
	enum { COUNT = 100001 };
	static float host[COUNT], found[COUNT];
	void *from, *to;

	for (int i = 0; i < COUNT; i++)
		host[i] = (float)i;
	require_ok(device_allocate(device, sizeof host, &from));
	require_ok(device_allocate(device, sizeof host, &to));
	require_ok(device_upload(device, from, host, sizeof host));
	require_ok(device_upload(device, to, host, sizeof host));
	require_ok(device->backend->add(device, COUNT, from, to));
	require_ok(device_download(device, found, to, sizeof host));
	for (int i = 0; i < COUNT; i++)
		assert_true(found[i] == 2 * host[i]);
	device_release(device, from);
	device_release(device, to);
}

/* The same GPU, or another, opened beside the first: each keeps its own. */
TEST(test_two_devices)
{
	struct device *second = NULL;
	char a[16] = "the first's", b[16] = "the second's", back[16];
	void *first_memory, *second_memory;

	if (cuda_backend.open("1", NULL, &second) != STATUS_OK)
		require_ok(cuda_backend.open("0", NULL, &second));
	assert_ptr_not_equal(cuda_stream(device), cuda_stream(second));
	require_ok(device_allocate(device, sizeof a, &first_memory));
	require_ok(device_allocate(second, sizeof b, &second_memory));
	require_ok(device_upload(device, first_memory, a, sizeof a));
	require_ok(device_upload(second, second_memory, b, sizeof b));
	require_ok(device_download(device, back, first_memory, sizeof back));
	assert_string_equal(back, a);
	require_ok(device_download(second, back, second_memory, sizeof back));
	assert_string_equal(back, b);
	device_release(second, second_memory);
	device_close(second);
	require_ok(device_download(device, back, first_memory, sizeof back));
	assert_string_equal(back, a);
	device_release(device, first_memory);
}

/* One line for what is no GPU. */
TEST(test_unknown_device)
{
	static const char *const names[] = {"99", "-1", "first", "GPU-0123", "0000:ff:1f.0"};
	struct device *none;

	for (size_t i = 0; i < COUNT_OF(names); i++) {
		assert_int_equal(cuda_backend.open(names[i], NULL, &none), STATUS_INVALID);
		assert_null(none);
		assert_non_null(strstr(status_message(), names[i]));
		assert_null(strchr(status_message(), '\n'));
	}
}

TEST(test_bandwidth_and_clock)
{
	struct conditions now;
	double copy, read;

	require_ok(device->backend->bandwidth(device, &copy, &read));
	device_conditions(device, &now);
	print_message("copy %.0f GB/s, read %.0f GB/s, SM clock %.0f MHz%s\n", copy, read,
	              now.clock_mhz, now.throttle > 0 ? ", throttled" : "");
	assert_true(copy > 10 && read > 10 && read < 20000);
	assert_true(now.clock_mhz > 100 && now.clock_mhz < 5000);
}
