/* The fp64 reference on the device gives what it gives on the host, function by function. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/reference.h"
#include "layers/noise.h"

enum { MAX_ARRAYS = 24 };

static const double tolerance = 1e-11;

/* A case's random tensors, on the host and on the device. */
static struct {
	int64_t length[MAX_ARRAYS];
	double *host[MAX_ARRAYS], *device[MAX_ARRAYS];
	bool on_device;
} arrays;

static void require(enum status status)
{
	if (status != STATUS_OK)
		fail_msg("%s: %s", status_name(status), status_message());
}

/* Tensor number `i`, made of `length` random numbers at its first use; the numbers have no gaps. */
static double *array(int i, int64_t length)
{
	if (!arrays.host[i]) {
		float *noise = malloc((size_t)length * sizeof *noise);
		double *values = malloc((size_t)length * sizeof *values);

		assert_true(noise && values);
		noise_normal(3, (uint64_t)i, 0, length, 1.0f, noise);
		for (int64_t j = 0; j < length; j++)
			values[j] = noise[j];
		require(cuda_reference.take(length, &arrays.device[i]));
		require(cuda_backend.upload(arrays.device[i], values,
		                            (size_t)length * sizeof *values));
		arrays.host[i] = values;
		arrays.length[i] = length;
		free(noise);
	}
	return arrays.on_device ? arrays.device[i] : arrays.host[i];
}

static double *negative(int i, int64_t length)
{
	bool fresh = !arrays.host[i];
	double *values = array(i, length);

	for (int64_t j = 0; fresh && j < length; j++)
		values[j] = -fabs(values[j]);
	if (fresh)
		require(cuda_backend.upload(arrays.device[i], values,
		                            (size_t)length * sizeof *values));
	return values;
}

/* Runs a case in both places and compares every tensor. */
static void compare(const char *name, void (*run)(int64_t variant), int64_t variant)
{
	memset(&arrays, 0, sizeof arrays);
	run(variant);
	arrays.on_device = true;
	reference_use(&cuda_reference);
	run(variant);
	for (int i = 0; i < MAX_ARRAYS && arrays.host[i]; i++) {
		double *back = malloc((size_t)arrays.length[i] * sizeof *back);
		double largest = 0;

		assert_non_null(back);
		require(cuda_reference.store(arrays.length[i], arrays.device[i], back));
		for (int64_t j = 0; j < arrays.length[i]; j++)
			largest = fmax(largest, fabs(arrays.host[i][j]));
		for (int64_t j = 0; j < arrays.length[i]; j++)
			if (!(fabs(back[j] - arrays.host[i][j]) <= tolerance * largest))
				fail_msg("%s, variant %d, tensor %d, element %lld: %g, not %g",
				         name, (int)variant, i, (long long)j, back[j],
				         arrays.host[i][j]);
		free(back);
	}
	reference_use(NULL);
	for (int i = 0; i < MAX_ARRAYS; i++) {
		cuda_reference.release(arrays.device[i]);
		free(arrays.host[i]);
	}
}

static void run_dense(int64_t variant)
{
	int64_t n = 37 + variant, d_in = 40, d_out = 72, wide = n * d_out;

	reference_linear(n, d_in, d_out, array(0, n * d_in), array(1, d_out * d_in),
	                 array(2, wide));
	reference_rms_norm(n, d_out, 1e-6, array(2, wide), array(3, d_out), array(4, wide), NULL);
	reference_round(variant ? DTYPE_BF16 : DTYPE_F32, n * d_out, array(4, wide));
	reference_get_columns(n, d_out, 8, 16, array(4, wide), array(5, n * 16));
	const int64_t rows[] = {0, 5, n - 1};
	reference_get_rows(d_out, 3, rows, array(4, wide), array(6, 3 * d_out));
	reference_decay_gate(n, 16, 24, 16, array(5, n * 16), array(7, 24 * 16), array(8, 24),
	                     array(9, n * 24));
	reference_norm_gate(n, 3, 24, 1e-5, array(4, wide), array(10, 24), array(2, wide),
	                    array(11, wide), NULL);
	reference_rotate(1, n, 3, 24, 2, 1 + variant, array(11, wide), array(12, wide));
	reference_rotate(1, n, 3, 24, 0, 1, array(12, wide), array(12, wide));
}

static void run_attention(int64_t variant)
{
	enum mask mask = (enum mask)(variant % 4);
	int64_t t = variant < 8 ? 77 : 130, d = variant % 2 ? 64 : 128, h = 4;
	int64_t kv = mask == MASK_CHUNK ? (t + 4) / 5 : t, groups = mask == MASK_CHUNK ? 2 : h;
	const int64_t rows[] = {0, 1, 2, 31, 32, 33, 40, 45, 60, 62, t - 1};
	const struct reference_attention a = {
	        .batch = 1,
	        .n_heads = h,
	        .q_heads = groups,
	        .d_head = d,
	        .seq_len = t,
	        .kv_len = kv,
	        .mask = mask,
	        .window = 20,
	        .chunk = 5,
	        .scale = 1 / sqrt((double)d),
	        .q = array(0, t * groups * d),
	        .k = array(1, kv * h * d),
	        .v = array(2, kv * h * d),
	        .own_score = mask == MASK_CHUNK ? array(3, t * h) : NULL,
	        .own_value = mask == MASK_CHUNK ? array(4, t * h * d) : NULL,
	        .gate = mask == MASK_CHUNK ? array(5, t * h * d) : NULL,
	};

	require(reference_attention_forward(
	        &a, 11, rows, array(mask == MASK_CHUNK ? 6 : 3, 11 * h * d), NULL, NULL));
}

static void run_rat_scan(int64_t variant)
{
	static const int64_t chunks[] = {1, 5, 16, 93};
	int64_t b = 2, t = 93, h = 4, g = 2, d = variant % 2 ? 64 : 128;
	int64_t chunk = chunks[variant], c = b * ((t + chunk - 1) / chunk);
	const struct reference_rat_scan s = {
	        .batch = b,
	        .seq_len = t,
	        .n_heads = h,
	        .groups = g,
	        .d_head = d,
	        .chunk = chunk,
	        .rope = variant != 2,
	        .scale = 0.1,
	        .v = array(0, b * t * h * d),
	        .gate = array(1, b * t * h * d),
	        .q = array(2, b * t * g * d),
	        .k = array(3, b * t * g * d),
	        .gate_bias = array(4, h * d),
	};
	const struct reference_rat_scan_out out = {
	        .v_scan = array(5, b * t * h * d),
	        .own_score = array(6, b * t * h),
	        .q_out = array(7, b * t * g * d),
	        .k_chunk = array(8, c * h * d),
	        .v_chunk = array(9, c * h * d),
	};

	require(reference_rat_scan_forward(&s, &out));
}

static void run_recurrence(int64_t variant)
{
	int64_t b = 2, t = 123, d = 70;
	const struct reference_recurrence r = {
	        .batch = b,
	        .seq_len = t,
	        .d_model = d,
	        .form = variant % 2 ? GATE_SIGMOID : GATE_LOG_DECAY,
	        .x = array(0, b * t * d),
	        .gate = negative(1, b * t * d),
	        .z = variant > 1 ? array(2, b * t * d) : NULL,
	        .h0 = variant > 1 ? array(3, b * d) : NULL,
	        .gate_bias = variant == 3 ? array(4, d) : NULL,
	};

	reference_recurrence_forward(&r, array(variant > 1 ? 4 + (variant == 3) : 2, b * t * d),
	                             NULL, NULL);
}

static void run_matrix(int64_t variant)
{
	enum decay decay = (enum decay)(variant % 4);
	int64_t b = 2, t = 50, h = 3, d_k = variant < 4 ? 40 : 256, d_v = variant < 4 ? 72 : 24;
	const struct reference_matrix m = {
	        .batch = b,
	        .seq_len = t,
	        .n_heads = h,
	        .d_k = d_k,
	        .d_v = d_v,
	        .decay = decay,
	        .rule = RULE_PLAIN,
	        .scale = 0.2,
	        .q = array(0, b * t * h * d_k),
	        .k = array(1, b * t * h * d_k),
	        .v = array(2, b * t * h * d_v),
	        .h0 = variant % 2 ? array(3, b * h * d_k * d_v) : NULL,
	        .log_decay = decay == DECAY_SCALAR     ? negative(3, b * t * h)
	                     : decay == DECAY_DIAGONAL ? negative(4, b * t * h * d_k)
	                                               : NULL,
	};
	int next = 3 + (variant % 2) + (decay == DECAY_SCALAR || decay == DECAY_DIAGONAL);

	require(reference_matrix_forward(&m, array(next, b * t * h * d_v), NULL));
}

static void run_family(int64_t variant)
{
	int64_t b = 2, t = 21, h = 3, d = 16, n = b * t, width = h * d;
	const struct reference_conv c = {
	        .batch = b,
	        .seq_len = t,
	        .channels = d,
	        .n_readers = variant ? h : 1,
	        .x = array(0, n * d),
	        .weight = array(1, d * CONV_WIDTH),
	        .bias = array(2, d),
	};
	const struct reference_gate_norm g = {
	        .n = n,
	        .n_heads = h,
	        .d_head = d,
	        .groups = variant ? 1 : h,
	        .eps = 1e-5,
	        .x = array(3, n * width),
	        .skip = variant ? array(4, n * width) : NULL,
	        .skip_weight = variant ? array(5, h) : NULL,
	        .gate = variant ? array(6, n * width) : NULL,
	        .weight = array(variant ? 7 : 4, variant ? width : d),
	};
	int next = variant ? 8 : 5;
	const int64_t lengths[] = {
	        c.n_readers * n * d, n * width, n * h,     h,         h,        n * h,
	        n * width,           width,     n * width, n * width, n * width};

	/* An array is made at its first use, in the order of the numbers. */
	for (int i = 0; i < (variant ? 11 : 10); i++)
		array(next + i, lengths[i]);
	reference_short_conv(&c, array(next, 0), NULL);
	require(reference_gate_norm(&g, array(next + 1, 0), NULL));
	reference_time_step(n, h, d, array(next + 2, 0), array(next + 3, 0), array(next + 4, 0),
	                    array(3, 0), array(next + 5, 0), array(next + 6, 0));
	reference_forget_gate(n, width, array(3, 0), array(next + 7, 0), array(next + 6, 0),
	                      array(next + 8, 0), variant ? array(next + 10, 0) : NULL,
	                      array(next + 9, 0));
}

static void compare_all(const char *name, void (*run)(int64_t variant), int64_t variants)
{
	for (int64_t i = 0; i < variants; i++)
		compare(name, run, i);
}

static void test_dense(void **state)
{
	(void)state;
	compare_all("dense", run_dense, 2);
}

static void test_attention(void **state)
{
	(void)state;
	compare_all("attention", run_attention, 12);
}

static void test_rat_scan(void **state)
{
	(void)state;
	compare_all("rat_scan", run_rat_scan, 4);
}

static void test_recurrence(void **state)
{
	(void)state;
	compare_all("recurrence", run_recurrence, 4);
}

static void test_matrix(void **state)
{
	(void)state;
	compare_all("matrix", run_matrix, 8);
}

static void test_family(void **state)
{
	(void)state;
	compare_all("family", run_family, 2);
}

static int open_device(void **state)
{
	(void)state;
	if (cuda_backend.open(0) == STATUS_OK)
		return 0;
	fprintf(stderr, "%s\n", status_message());
	return -1;
}

static int close_device(void **state)
{
	(void)state;
	cuda_backend.close();
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
	        cmocka_unit_test(test_dense),    cmocka_unit_test(test_attention),
	        cmocka_unit_test(test_rat_scan), cmocka_unit_test(test_recurrence),
	        cmocka_unit_test(test_matrix),   cmocka_unit_test(test_family),
	};

	return cmocka_run_group_tests(tests, open_device, close_device);
}
