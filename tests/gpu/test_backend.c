/* The CUDA backend itself: memory, transfers, and a stopwatch that can be trusted. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"

static const struct backend *const cuda = &cuda_backend;

static void require(enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s: %s", status_name(status), status_message());
}

static int open_device(void **state)
{
	(void)state;
	if (cuda->open(0) == STATUS_OK)
		return 0;
	fprintf(stderr, "%s\n", status_message());
	return -1;
}

static int close_device(void **state)
{
	(void)state;
	cuda->close();
	return 0;
}

static void test_info(void **state)
{
	struct device_info info;

	(void)state;
	require(cuda->info(&info));
	print_message("%s; driver %s; %s; %zu of %zu bytes free; %d multiprocessors\n", info.name,
	              info.driver, info.runtime, info.memory_free, info.memory_total,
	              cuda_sm_count());
	assert_true(info.name[0] && info.driver[0] && info.runtime[0]);
	assert_true(info.memory_free > 0 && info.memory_free <= info.memory_total);
}

/* Sizes around those of the staging buffers, every byte compared. */
static void test_transfers(void **state)
{
	static const size_t sizes[] = {1, 4, 4097, 8 << 20, (8 << 20) + 1, (24 << 20) + 13};

	(void)state;
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
		const size_t bytes = sizes[i];
		unsigned char *there = malloc(bytes), *back = malloc(bytes);
		void *memory;

		assert_true(there && back);
		for (size_t j = 0; j < bytes; j++)
			there[j] = (unsigned char)(j * 31 + j / 251 + i);
		memset(back, 0, bytes);
		require(cuda->allocate(bytes, &memory));
		assert_true((uintptr_t)memory % 256 == 0);
		require(cuda->upload(memory, there, bytes));
		require(cuda->download(back, memory, bytes));
		assert_memory_equal(there, back, bytes);
		require(cuda->fill(memory, 0xa5, bytes));
		require(cuda->download(back, memory, bytes));
		for (size_t j = 0; j < bytes; j++)
			assert_true(back[j] == 0xa5);
		cuda->release(memory);
		free(there);
		free(back);
	}
}

static void test_out_of_memory(void **state)
{
	void *memory = &memory;

	(void)state;
	assert_int_equal(cuda->allocate((size_t)1 << 50, &memory), STATUS_OOM);
	assert_null(memory);
	assert_non_null(strstr(status_message(), "bytes wanted"));
	require(cuda->allocate(1 << 20, &memory));
	cuda->release(memory);
}

/* Kernels of known duration, one and many, are timed to a few per cent, whatever the host does. */
static void test_stopwatch(void **state)
{
	static const struct {
		int launches;
		uint64_t ns;
	} work[] = {{1, 2000000}, {1, 200000}, {20, 50000}};

	(void)state;
	for (size_t i = 0; i < sizeof work / sizeof *work; i++) {
		const double expected = 1e-6 * (double)work[i].ns * work[i].launches;
		double best = INFINITY;

		for (int sample = 0; sample < 5; sample++) {
			double ms;

			require(cuda->stopwatch_start());
			for (int j = 0; j < work[i].launches; j++)
				assert_int_equal(device_spin(cuda_stream(), work[i].ns), 0);
			require(cuda->stopwatch_stop(&ms));
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
static void test_stopwatch_hides_launches(void **state)
{
	enum { LAUNCHES = 200 };
	double best = INFINITY;

	(void)state;
	for (int sample = 0; sample < 5; sample++) {
		double ms;

		require(cuda->stopwatch_start());
		for (int j = 0; j < LAUNCHES; j++)
			assert_int_equal(device_spin(cuda_stream(), 0), 0);
		require(cuda->stopwatch_stop(&ms));
		best = fmin(best, ms);
	}
	print_message("an empty kernel: %.2f us\n", 1e3 * best / LAUNCHES);
	assert_true(best < 0.004 * LAUNCHES);
}

/* Work that waits for the device inside a timed region does not deadlock. */
static void test_stopwatch_survives_waiting(void **state)
{
	double ms;

	(void)state;
	require(cuda->stopwatch_start());
	assert_int_equal(device_spin(cuda_stream(), 1000000), 0);
	require(cuda->synchronize());
	require(cuda->stopwatch_stop(&ms));
	assert_true(ms >= 0.99);
}

/* Reading a buffer that fits the cache is slower after the cache was flushed. */
static void test_flush(void **state)
{
	enum { SAMPLES = 5 };
	const size_t bytes = 16 << 20;
	double hot = INFINITY, cold = INFINITY, ms;
	void *memory;

	(void)state;
	require(cuda->allocate(bytes, &memory));
	require(cuda->fill(memory, 1, bytes));
	for (int sample = 0; sample < 2 * SAMPLES; sample++) {
		if (sample >= SAMPLES)
			require(cuda->flush_cache());
		require(cuda->stopwatch_start());
		assert_int_equal(device_read(cuda_stream(), memory, bytes), 0);
		require(cuda->stopwatch_stop(&ms));
		if (sample >= SAMPLES)
			cold = fmin(cold, ms);
		else
			hot = fmin(hot, ms);
	}
	cuda->release(memory);
	print_message("16 MiB: %.1f us hot, %.1f us cold\n", 1e3 * hot, 1e3 * cold);
	assert_true(cold > hot);
}

static void test_bandwidth_and_clock(void **state)
{
	struct device_info info;
	double copy, read;

	(void)state;
	require(cuda->bandwidth(&copy, &read));
	require(cuda->info(&info));
	print_message("copy %.0f GB/s, read %.0f GB/s, SM clock %.0f MHz%s\n", copy, read,
	              info.sm_clock_mhz, info.throttled ? ", throttled" : "");
	assert_true(copy > 10 && read > 10 && read < 20000);
	assert_true(info.sm_clock_mhz > 100 && info.sm_clock_mhz < 5000);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_info),
	        cmocka_unit_test(test_transfers),
	        cmocka_unit_test(test_out_of_memory),
	        cmocka_unit_test(test_stopwatch),
	        cmocka_unit_test(test_stopwatch_hides_launches),
	        cmocka_unit_test(test_stopwatch_survives_waiting),
	        cmocka_unit_test(test_flush),
	        cmocka_unit_test(test_bandwidth_and_clock),
	};

	return cmocka_run_group_tests_name("cuda backend", tests, open_device, close_device);
}
