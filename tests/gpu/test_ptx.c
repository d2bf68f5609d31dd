/*
 * The wrappers of kernels/hopper/ptx.cuh, each with the fact about it that is
 * easiest to get wrong. Numbers are small integers, so that sums are exact and
 * every comparison is for equality.
 */
#include "tests/test.h"

#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/ptx.h"

static struct device *device;

/* -3 ... 3, without a pattern that a transposition would keep. */
static int small(uint32_t i)
{
	return (int)((i * 2654435761u >> 16) % 7) - 3;
}

static uint16_t bf16_bits(float x)
{
	uint32_t bits;

	memcpy(&bits, &x, sizeof bits);
	return (uint16_t)(bits >> 16);
}

static void fill_small(uint16_t *x, uint32_t count, uint32_t seed)
{
	for (uint32_t i = 0; i < count; i++)
		x[i] = bf16_bits((float)small(i + 1000 * seed));
}

/* Where a 128-byte swizzle puts byte `offset` of a tile with rows of 128 bytes. */
static int swizzled(int offset)
{
	return offset ^ (offset >> 3 & 0x70);
}

/*
 * Which element a register holds, that 16 further along K are 32 bytes in a
 * K-major operand but 2048 in an MN-major one, that the next 64 are another
 * panel; and that a product which does not accumulate ignores what was there.
 */
static void check_product(int n, bool registers, bool accumulate)
{
	static uint16_t a[PTX_M * PTX_K], b[128 * PTX_K];
	static float d[PTX_M * 128];

	fill_small(a, PTX_M * PTX_K, 1);
	fill_small(b, (uint32_t)n * PTX_K, 2);
	for (int i = 0; i < PTX_M * n; i++)
		d[i] = accumulate ? (float)small((uint32_t)i + 77) : NAN;
	require_ok(ptx_product(device, n, registers, accumulate, a, b, d));
	for (int row = 0; row < PTX_M; row++)
		for (int column = 0; column < n; column++) {
			const int at = row * n + column;
			int sum = accumulate ? small((uint32_t)at + 77) : 0;

			for (int k = 0; k < PTX_K; k++) {
				const int j = registers ? k * n + column : column * PTX_K + k;

				sum += small((uint32_t)(row * PTX_K + k) + 1000) *
				       small((uint32_t)j + 2000);
			}
			if (d[at] != (float)sum)
				fail_msg(
				        "n %d, registers %d, accumulate %d: (%d, %d) is %g, not %d",
				        n, registers, accumulate, row, column, d[at], sum);
		}
}

TEST(test_products)
{
	for (int i = 0; i < 8; i++)
		check_product(i & 1 ? 128 : 64, i & 2, i & 4);
}

/*
 * What lies outside the tensor arrives as zeros, which the barrier counts, and is not stored.
 * A load may begin in front of the tensor; a store that does is an illegal instruction.
 */
static void check_box(int column, int token, int h, int b)
{
	enum { BATCH = 2, TOKENS = 70, HEADS = 3, D = 128, COUNT = BATCH * TOKENS * HEADS * D };
	static uint16_t from[COUNT], to[COUNT], box[PTX_BOX * 64];

	for (int i = 0; i < COUNT; i++) {
		from[i] = (uint16_t)(i * 40503 + 1);
		to[i] = 0xabcd;
	}
	require_ok(
	        ptx_copy_box(device, BATCH, TOKENS, HEADS, D, column, token, h, b, from, box, to));
	for (int row = 0; row < PTX_BOX; row++)
		for (int c = 0; c < 64; c++) {
			const bool inside = token + row >= 0 && token + row < TOKENS &&
			                    column + c >= 0 && column + c < D;
			const int at = ((b * TOKENS + token + row) * HEADS + h) * D + column + c;
			const uint16_t expected = inside ? from[at] : 0;

			assert_int_equal(box[swizzled(row * 128 + c * 2) / 2], expected);
			if (inside && token >= 0) {
				assert_int_equal(to[at], expected);
				to[at] = 0xabcd;
			}
		}
	for (int i = 0; i < COUNT; i++)
		assert_int_equal(to[i], 0xabcd);
}

TEST(test_tensor_copies)
{
	check_box(0, 0, 0, 0);
	check_box(64, 0, 2, 1);
	check_box(0, 40, 1, 0);
	check_box(64, 69, 2, 1);
	check_box(0, -10, 1, 1);
	check_box(96, 20, 0, 0);
	check_box(0, 70, 0, 0);
}

TEST(test_bulk_load)
{
	static uint8_t from[4096], to[4096];

	for (int i = 0; i < 4096; i++)
		from[i] = (uint8_t)(i * 31 + i / 256);
	for (int count = 16; count <= 4096; count *= 4) {
		memset(to, 0, sizeof to);
		require_ok(ptx_bulk_load(device, count, from, to));
		assert_memory_equal(to, from, (size_t)count);
	}
}

/* A ring of two slots: both sides change the parity they wait for every second turn. */
TEST(test_ring)
{
	enum { COUNT = 1001 };
	static int received[COUNT];

	require_ok(ptx_ring(device, COUNT, received));
	for (int i = 0; i < COUNT; i++)
		assert_int_equal(received[i], i);
}

/* The count of a named barrier is of those that arrive and those that wait together. */
TEST(test_named_barriers)
{
	enum { ROUNDS = 100 };
	int seen[64] = {0};

	require_ok(ptx_named_barriers(device, ROUNDS, seen));
	for (int i = 0; i < 64; i++)
		assert_int_equal(seen[i], ROUNDS * i);
}

/*
 * Lane 8i + r gives the address of row r of matrix i; but elements 2c, 2c+1 of
 * that row are in register i of lane 4r + c.
 */
TEST(test_matrices)
{
	uint32_t registers[32 * 4], loaded[32 * 4] = {0};
	uint16_t stored[256] = {0};

	for (uint32_t i = 0; i < 32 * 4; i++)
		registers[i] = (2 * i + 1) << 16 | 2 * i;
	require_ok(ptx_matrices(device, registers, stored, loaded));
	for (int i = 0; i < 4; i++)
		for (int r = 0; r < 8; r++)
			for (int e = 0; e < 8; e++)
				assert_int_equal(stored[(8 * i + r) * 8 + e],
				                 2 * (4 * (4 * r + e / 2) + i) + e % 2);
	assert_memory_equal(loaded, registers, sizeof registers);
}

/* Its accumulator is a piece of a wgmma's, and ldmatrix without a transposition gives both sides.
 */
TEST(test_warp_product)
{
	uint16_t a[256], b[256];
	float d[256];

	fill_small(a, 256, 3);
	fill_small(b, 256, 4);
	for (uint32_t i = 0; i < 256; i++)
		d[i] = (float)small(i);
	require_ok(ptx_warp_product(device, a, b, d));
	for (uint32_t row = 0; row < 16; row++)
		for (uint32_t column = 0; column < 16; column++) {
			int sum = small(row * 16 + column);

			for (uint32_t k = 0; k < 16; k++)
				sum += small(row * 16 + k + 3000) * small(column * 16 + k + 4000);
			assert_true(d[row * 16 + column] == (float)sum);
		}
}

/* Registers that one warpgroup gave up serve the others, and keep what they hold. */
TEST(test_registers)
{
	uint32_t x[200], y[256] = {0};

	for (uint32_t i = 0; i < 200; i++)
		x[i] = i * i + 3;
	require_ok(ptx_registers(device, x, y));
	for (uint32_t thread = 0; thread < 256; thread++) {
		uint32_t value[200], sum = 0;

		for (uint32_t i = 0; i < 200; i++)
			value[i] = x[i] + thread + 128;
		for (int round = 0; round < 3; round++)
			for (int i = 0; i < 200; i++)
				value[i] = value[i] * 2654435761u + value[(i + 77) % 200];
		for (int i = 0; i < 200; i++)
			sum = sum * 31 + value[i];
		assert_int_equal(y[thread], sum);
	}
}

/* The first of a pair is the low half; powers of -inf are 0, and so are reciprocals of inf. */
TEST(test_arithmetic)
{
	const float x[2] = {-INFINITY, 4};
	float y[6] = {0};
	uint32_t pair = 0;

	require_ok(ptx_arithmetic(device, x, &pair, y));
	assert_int_equal(pair, (uint32_t)bf16_bits(4) << 16 | bf16_bits(-INFINITY));
	assert_true(y[0] == x[0] && y[1] == x[1]);
	assert_true(y[2] == 0 && y[3] == 16);
	assert_true(y[4] == 0 && y[5] == 0.25f);
}

/* The one test of a device that has none of these instructions. */
TEST(test_absent)
{
	assert_false(cuda_is_hopper(device));
	print_message("needs compute capability 9.0\n");
}

int main(void)
{
	if (cuda_backend.open(NULL, NULL, &device) != STATUS_OK) {
		fprintf(stderr, "%s\n", status_message());
		return 1;
	}
	if (cuda_is_hopper(device))
		cmocka_set_skip_filter("test_absent");
	else
		cmocka_set_test_filter("test_absent");
	const int failed = tests_run();
	device_close(device);
	return failed;
}
