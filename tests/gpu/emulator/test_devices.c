/* Two emulated GPUs at once: each runs its own kernels, and its reference says the same. */
#include "tests/test.h"

#include "kernels/cuda/cuda_backend.h"

enum { BATCH = 2, TOKENS = 3, HEADS = 2, WIDTH = 32, COUNT = BATCH * TOKENS * HEADS * WIDTH };

static struct view view_of(void *data)
{
	return (struct view){data, TOKENS * HEADS * WIDTH, HEADS * WIDTH, WIDTH};
}

/* COUNT numbers of the device's activation type; -1: zeros. */
static void *new_tensor(struct device *device, int seed)
{
	double values[COUNT];
	void *memory;

	for (int i = 0; i < COUNT; i++)
		values[i] = seed < 0 ? 0 : (i * 37 + seed * 11) % 64 - 32;
	require_ok(device_allocate(device, COUNT * sizeof(double), &memory));
	require_ok(device_upload_doubles(device, device->activation, memory, values, COUNT));
	return memory;
}

/* The gradients of q after a rotation, and so of k, which shares its memory with what it is made
 * from. */
static void rotate_back(struct device *device, int seed, bool rope, double *dq, double *dk)
{
	struct context ctx = {.device = device};
	const struct view q = view_of(new_tensor(device, seed)),
	                  k = view_of(new_tensor(device, seed + 1)),
	                  out = view_of(new_tensor(device, -1));
	const struct rotate_backward_args args = {.batch = BATCH,
	                                          .seq_len = TOKENS,
	                                          .n_heads = HEADS,
	                                          .kv_heads = HEADS,
	                                          .d_head = WIDTH,
	                                          .rope = rope,
	                                          .dq_out = q,
	                                          .dk_out = k,
	                                          .dq = out,
	                                          .dk = k};

	require_ok(run_rotate_backward(&ctx, &args));
	require_ok(device_download_doubles(device, device->activation, dq, out.data, COUNT));
	require_ok(device_download_doubles(device, device->activation, dk, k.data, COUNT));
	device_release(device, q.data);
	device_release(device, k.data);
	device_release(device, out.data);
}

static void check(struct device *device, int seed, bool rope)
{
	double dq[COUNT], dk[COUNT], expected_dq[COUNT], expected_dk[COUNT];

	rotate_back(device, seed, rope, dq, dk);
	rotate_back(device->reference, seed, rope, expected_dq, expected_dk);
	for (int i = 0; i < COUNT; i++) {
		assert_true(fabs(dq[i] - expected_dq[i]) < (rope ? 0.2 : 1e-9));
		assert_true(fabs(dk[i] - expected_dk[i]) < (rope ? 0.2 : 1e-9));
	}
}

TEST(test_two_devices)
{
	struct device *first, *second;

	require_ok(cuda_backend.open("", NULL, &first));
	require_ok(cuda_backend.open("1", NULL, &second));
	for (int rope = 0; rope < 2; rope++) {
		check(first, 1, rope);
		check(second, 2, rope);
	}
	device_close(first);
	check(second, 3, true);
	device_close(second);
}

/* Elements of some tokens of the first head. */
TEST(test_gather)
{
	static const int64_t tokens[] = {0, 2};
	struct device *device;
	double all[COUNT], found[BATCH * 2 * WIDTH];

	require_ok(cuda_backend.open(NULL, NULL, &device));
	void *from = new_tensor(device, 5);
	const struct gather gather = {.dtype = device->activation,
	                              .from = from,
	                              .size = {BATCH, 2, 1, WIDTH},
	                              .stride = {TOKENS * HEADS * WIDTH, HEADS * WIDTH, WIDTH, 1},
	                              .list = tokens,
	                              .listed = 1};

	require_ok(device_gather(device, &gather, found));
	require_ok(device_download_doubles(device, device->activation, all, from, COUNT));
	for (int b = 0; b < BATCH; b++)
		for (int t = 0; t < 2; t++)
			for (int i = 0; i < WIDTH; i++)
				assert_true(found[(b * 2 + t) * WIDTH + i] ==
				            all[(b * TOKENS + tokens[t]) * HEADS * WIDTH + i]);
	device_release(device, from);
	device_close(device);
}
