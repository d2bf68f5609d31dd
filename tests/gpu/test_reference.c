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

/* Gives tensor `i` the values that it has on the host in both places. */
static double *share(int i)
{
	require(cuda_backend.upload(arrays.device[i], arrays.host[i],
	                            (size_t)arrays.length[i] * sizeof *arrays.host[i]));
	return arrays.host[i];
}

static void run_dense_backward(int64_t variant)
{
	int64_t n = 37 + variant, d_in = 40, d_out = 72;
	double *weight = array(0, d_out * d_in), *dy = array(1, n * d_out);
	double *dx = array(2, n * d_in), *rotated = array(3, n * d_out);
	double *wide = array(4, n * (d_in + 24));

	if (!arrays.on_device) {
		reference_linear_backward(n, d_in, d_out, NULL, weight, dy, dx, NULL);
		reference_rotate_backward(1, n, 3, 24, 2, 1 + variant, dy, rotated);
		reference_set_columns(n, d_in + 24, 8, d_in, dx, wide);
		return;
	}
	cuda_reference.linear_input_gradient(n, d_in, d_out, dy, weight, dx);
	cuda_reference.rotate_backward(1, n, 3, 24, 2, 1 + variant, dy, rotated);
	cuda_reference.set_columns(n, d_in + 24, 8, d_in, dx, wide);
}

/* What a forward leaves, from the host for both places: tensors i and i + 1. */
static struct reference_attention_left leave(const struct reference_attention *a, int i)
{
	int64_t t = a->seq_len, h = a->n_heads, count = t * h * a->d_head;
	double *out = array(i, count), *lse = array(i + 1, h * t);

	if (arrays.on_device)
		return (struct reference_attention_left){out, lse};
	double *gated = malloc((size_t)count * sizeof *gated);
	double *by_row = malloc((size_t)(h * t) * sizeof *by_row);
	assert_true(gated && by_row);
	require(reference_attention_forward(a, 0, NULL, gated, out, by_row));
	for (int64_t row = 0; row < t * h; row++)
		lse[row % h * t + row / h] = by_row[row];
	free(gated);
	free(by_row);
	share(i);
	share(i + 1);
	return (struct reference_attention_left){out, lse};
}

static void run_attention_backward(int64_t variant)
{
	enum mask mask = (enum mask)(variant % 4);
	bool chunks = mask == MASK_CHUNK;
	int64_t t = variant < 4 ? 77 : 51, d = variant % 2 ? 64 : 128, h = 4, rows[77];
	int64_t kv = chunks ? (t + 4) / 5 : t, groups = chunks ? 2 : h;
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
	        .own_score = chunks ? array(9, t * h) : NULL,
	        .own_value = chunks ? array(10, t * h * d) : NULL,
	        .gate = chunks ? array(11, t * h * d) : NULL,
	};
	const struct reference_attention_left left = leave(&a, 3);
	const double *dout = array(5, t * h * d);
	const struct reference_attention_grads grads = {
	        .dq = array(6, t * groups * d),
	        .dk = array(7, kv * h * d),
	        .dv = array(8, kv * h * d),
	        .dgate = chunks ? array(12, t * h * d) : NULL,
	        .down_score = chunks ? array(13, t * h) : NULL,
	        .down_value = chunks ? array(14, t * h * d) : NULL,
	};

	for (int64_t i = 0; i < t; i++)
		rows[i] = i;
	if (arrays.on_device)
		require(cuda_reference.attention_backward_rows(&a, &left, dout, t, rows, kv, rows,
		                                               &grads));
	else
		require(reference_attention_backward(&a, dout, &grads));
}

static void run_rat_scan_backward(int64_t variant)
{
	static const int64_t chunks[] = {1, 5, 16, 93};
	int64_t b = 2, t = 93, h = 4, g = 2, d = variant % 2 ? 64 : 128;
	int64_t chunk = chunks[variant], c = b * ((t + chunk - 1) / chunk), n = b * t;
	const struct reference_rat_scan s = {
	        .batch = b,
	        .seq_len = t,
	        .n_heads = h,
	        .groups = g,
	        .d_head = d,
	        .chunk = chunk,
	        .rope = variant != 2,
	        .scale = 0.1,
	        .v = array(0, n * h * d),
	        .gate = array(1, n * h * d),
	        .q = array(2, n * g * d),
	        .k = array(3, n * g * d),
	        .gate_bias = array(4, h * d),
	};
	struct reference_rat_scan_grads grads = {
	        .dv_scan = array(5, n * h * d),
	        .down_score = array(6, n * h),
	        .dq_out = array(7, n * g * d),
	        .dk_chunk = array(8, c * h * d),
	        .dv_chunk = array(9, c * h * d),
	        .dv = array(10, n * h * d),
	        .dgate = array(11, n * h * d),
	        .dq = array(12, n * g * d),
	        .dk = array(13, n * g * d),
	};
	double *dgate_bias = malloc((size_t)(h * d) * sizeof *dgate_bias);

	assert_non_null(dgate_bias);
	grads.dgate_bias = dgate_bias;
	if (arrays.on_device)
		require(cuda_reference.rat_scan_backward(&s, &grads));
	else
		require(reference_rat_scan_backward(&s, &grads));
	free(dgate_bias);
}

static void run_recurrence_backward(int64_t variant)
{
	int64_t b = 2, t = 123, d = 70, n = b * t * d;
	const struct reference_recurrence r = {
	        .batch = b,
	        .seq_len = t,
	        .d_model = d,
	        .form = variant % 2 ? GATE_SIGMOID : GATE_LOG_DECAY,
	        .x = array(0, n),
	        .gate = negative(1, n),
	        .z = variant > 1 ? array(5, n) : NULL,
	        .h0 = variant > 1 ? array(6, b * d) : NULL,
	        .gate_bias = variant == 3 ? array(8, d) : NULL,
	};
	const double *dout = array(2, n);
	double *dgate_bias = malloc((size_t)d * sizeof *dgate_bias);
	struct reference_recurrence_grads grads = {
	        .dx = array(3, n),
	        .dgate = array(4, n),
	        .dz = variant > 1 ? array(7, n) : NULL,
	        .dgate_bias = dgate_bias,
	};

	assert_non_null(dgate_bias);
	if (arrays.on_device)
		require(cuda_reference.recurrence_backward(&r, dout, &grads));
	else
		require(reference_recurrence_backward(&r, dout, &grads));
	free(dgate_bias);
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

static void test_gradients(void **state)
{
	(void)state;
	compare_all("dense backward", run_dense_backward, 2);
	compare_all("attention backward", run_attention_backward, 8);
	compare_all("rat_scan backward", run_rat_scan_backward, 4);
	compare_all("recurrence backward", run_recurrence_backward, 4);
}

/* A tensor of random floats on the device, and the same as doubles. */
static float *upload_floats(uint64_t stream, int64_t count, double *values)
{
	float *noise = malloc((size_t)count * sizeof *noise);
	void *tensor;

	assert_non_null(noise);
	noise_normal(4, stream, 0, count, 1.0f, noise);
	require(cuda_backend.allocate((size_t)count * sizeof *noise, &tensor));
	require(cuda_backend.upload(tensor, noise, (size_t)count * sizeof *noise));
	for (int64_t i = 0; i < count; i++)
		values[i] = noise[i];
	free(noise);
	return tensor;
}

/* The gradients of parameters, from tensors as a run leaves them. */
static void test_parameters(void **state)
{
	enum { N = 700, IN = 70, OUT = 50, PICKED = 11 };
	static double x[N * IN], x_norm[N * IN], dy[N * OUT], weight[OUT * IN], ones[IN];
	static double dweight[OUT * IN], dx_norm[N * IN], dnorm[IN], sums[OUT];
	static double rows[PICKED * IN], columns[PICKED], column_sums[OUT];
	struct reference_gradient_of of = {DTYPE_F32, N, IN, OUT, NULL, NULL, NULL};
	float *tensors[4];
	double *device_weight;
	int64_t picked[PICKED];

	(void)state;
	of.x = tensors[0] = upload_floats(0, N * IN, x);
	of.x_norm = tensors[1] = upload_floats(1, N * IN, x_norm);
	of.dy = tensors[2] = upload_floats(2, N * OUT, dy);
	tensors[3] = upload_floats(3, OUT * IN, weight);
	require(cuda_reference.take(OUT * IN, &device_weight));
	require(cuda_reference.load(DTYPE_F32, tensors[3], OUT * IN, device_weight));
	for (int i = 0; i < PICKED; i++)
		picked[i] = 4 * i + 3;
	for (int i = 0; i < IN; i++)
		ones[i] = 1;
	reference_linear_backward(N, IN, OUT, x_norm, weight, dy, dx_norm, dweight);
	reference_rms_norm_backward(N, IN, 1e-6, x, ones, dx_norm, NULL, dnorm);
	for (int i = 0; i < N * OUT; i++)
		sums[i % OUT] += dy[i];
	require(cuda_reference.weight_gradient_rows(&of, PICKED, picked, rows));
	require(cuda_reference.norm_gradient_columns(&of, 1e-6, device_weight, PICKED, picked,
	                                             columns));
	require(cuda_reference.column_sums(DTYPE_F32, of.dy, N, OUT, OUT, column_sums));
	for (int i = 0; i < PICKED; i++) {
		for (int j = 0; j < IN; j++)
			assert_true(fabs(rows[i * IN + j] - dweight[picked[i] * IN + j]) < 1e-9);
		assert_true(fabs(columns[i] - dnorm[picked[i]]) < 1e-9);
	}
	for (int i = 0; i < OUT; i++)
		assert_true(fabs(column_sums[i] - sums[i]) < 1e-9);
	cuda_reference.release(device_weight);
	for (int i = 0; i < 4; i++)
		cuda_backend.release(tensors[i]);
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
	        cmocka_unit_test(test_dense),     cmocka_unit_test(test_attention),
	        cmocka_unit_test(test_rat_scan),  cmocka_unit_test(test_recurrence),
	        cmocka_unit_test(test_matrix),    cmocka_unit_test(test_family),
	        cmocka_unit_test(test_gradients), cmocka_unit_test(test_parameters),
	};

	return cmocka_run_group_tests(tests, open_device, close_device);
}
