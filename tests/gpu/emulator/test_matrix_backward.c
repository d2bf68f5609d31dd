/*
 * Gradients of the matrix recurrence where kernels of chunks go wrong: lengths about a chunk's,
 * widths that are not whole pieces, decays of which some channels forget at once and others
 * never do, keys that heads share, states before the first token, and tensors of more
 * than 2^31 elements. Against the fp64 reference.
 */
#include "tests/test.h"

#include <sys/mman.h>

#include "kernels/cuda/cuda_backend.h"

/* What the decays are like. */
enum decays {
	MILD,
	EXTREME, /* channels of -20, of -100, of none, and mild ones */
	SUDDEN,  /* a token of -100 now and then */
	NOTHING, /* a token that leaves nothing now and then */
	NEAR,    /* to either side of what is taken for mild, then all just so */
	NO_DECAY
};

struct form {
	int64_t batch, seq_len, n_heads, d_k, d_v;
	enum decay decay;
	enum decays how;
	bool shared; /* keys and queries, by all heads */
	bool with_h0;
	int64_t pad;    /* elements between the rows of a token's heads */
	bool is_sparse; /* tokens 2^26 elements apart */
};

/* A tensor of the kernel, bf16, and of the reference, fp64 and dense. */
struct tensor {
	int64_t heads, width;
	struct view narrow, wide;
	size_t bytes;
};

static const double TOLERANCE = 0.02;
static uint64_t state = 88172645463325252u;

/* In -1 .. 1. */
static double any_number(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (double)(int64_t)state / 9.3e18;
}

static uint16_t narrowed(double x)
{
	const float value = (float)x;
	uint32_t bits;

	memcpy(&bits, &value, sizeof bits);
	return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double widened(uint16_t x)
{
	const uint32_t bits = (uint32_t)x << 16;
	float value;

	memcpy(&value, &bits, sizeof value);
	return (double)value;
}

static struct tensor new_tensor(const struct form *f, int64_t width, bool shared)
{
	const int64_t heads = shared ? 1 : f->n_heads, row = width + f->pad;
	const int64_t token = f->is_sparse ? (int64_t)1 << 26 : heads * row;
	struct tensor t = {.heads = heads, .width = width};

	t.bytes = (size_t)(f->batch * f->seq_len * token + 64) * sizeof(uint16_t);
	void *memory = mmap(NULL, t.bytes, PROT_READ | PROT_WRITE,
	                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	assert_true(memory != MAP_FAILED);
	t.narrow = (struct view){memory, f->seq_len * token, token, shared ? 0 : row};
	t.wide = (struct view){
	        new_memory((size_t)(f->batch * f->seq_len * heads * width) * sizeof(double)),
	        f->seq_len * heads * width, heads * width, shared ? 0 : width};
	return t;
}

static void free_tensor(struct tensor *t)
{
	munmap(t->narrow.data, t->bytes);
	free(t->wide.data);
}

static uint16_t *narrow_at(const struct tensor *x, int64_t b, int64_t t, int64_t h, int64_t i)
{
	return (uint16_t *)x->narrow.data + b * x->narrow.batch + t * x->narrow.token +
	       h * x->narrow.head + i;
}

static double *wide_at(const struct tensor *x, int64_t b, int64_t t, int64_t h, int64_t i)
{
	return (double *)x->wide.data + b * x->wide.batch + t * x->wide.token + h * x->wide.head +
	       i;
}

static double any_decay(enum decays how, int64_t t, int64_t channel)
{
	const double mild = -0.1 * fabs(any_number());

	switch (how) {
	case EXTREME:
		return channel % 4 == 0   ? -20
		       : channel % 4 == 1 ? -100
		       : channel % 4 == 2 ? 0
		                          : mild;
	case SUDDEN:
		return t % 37 == 5 ? -100 : mild;
	case NOTHING:
		return t % 7 == 5 ? -INFINITY : mild;
	case NEAR:
		return channel % 2 || t / 64 % 2 ? -2.58 : -2.61;
	case NO_DECAY:
		return 0;
	default:
		return mild;
	}
}

/* Numbers, or decays. */
static struct tensor fill_tensor(const struct form *f, int64_t width, bool shared, bool decays)
{
	struct tensor x = new_tensor(f, width, shared);

	for (int64_t b = 0; b < f->batch; b++)
		for (int64_t t = 0; t < f->seq_len; t++)
			for (int64_t h = 0; h < x.heads; h++)
				for (int64_t i = 0; i < width; i++) {
					const double value =
					        decays ? any_decay(f->how, t, width == 1 ? h : i)
					               : any_number();
					uint16_t *to = narrow_at(&x, b, t, h, i);

					*to = narrowed(value);
					*wide_at(&x, b, t, h, i) = widened(*to);
				}
	return x;
}

static void expect_close(const char *form, const char *name, double error, double norm)
{
	const double relative = sqrt(error / (norm > 0 ? norm : 1));

	if (!(relative <= TOLERANCE))
		fail_msg("%s: %s differs by %.3g", form, name, relative);
}

/* All of a gradient, and each channel by itself where channels differ in their decays. */
static void compare(const char *form, const char *name, const struct form *f,
                    const struct tensor *x, bool each)
{
	double error = 0, norm = 0;

	for (int64_t i = 0; i < x->width; i++) {
		double channel_error = 0, channel_norm = 0;

		for (int64_t b = 0; b < f->batch; b++)
			for (int64_t t = 0; t < f->seq_len; t++)
				for (int64_t h = 0; h < x->heads; h++) {
					const double expected = *wide_at(x, b, t, h, i);
					const double d =
					        widened(*narrow_at(x, b, t, h, i)) - expected;

					channel_error += d * d;
					channel_norm += expected * expected;
				}
		if (each)
			expect_close(form, name, channel_error, channel_norm);
		error += channel_error;
		norm += channel_norm;
	}
	expect_close(form, name, error, norm);
}

static struct matrix_recurrence_args args_of(const struct form *f)
{
	return (struct matrix_recurrence_args){.batch = f->batch,
	                                       .seq_len = f->seq_len,
	                                       .n_heads = f->n_heads,
	                                       .d_k = f->d_k,
	                                       .d_v = f->d_v,
	                                       .decay = f->decay,
	                                       .rule = RULE_PLAIN,
	                                       .scale = 0.25f};
}

static void run(struct device *device, const struct matrix_recurrence_backward_args *args)
{
	struct context ctx = {.device = device};
	const struct kernel *kernel = kernel_select(&ctx, OP_MATRIX_RECURRENCE_BACKWARD, args);

	assert_non_null(kernel);
	ctx.workspace_bytes = kernel->workspace ? kernel->workspace(device, args) : 0;
	scoped void *memory = new_memory(ctx.workspace_bytes + 256);
	memset(memory, 0xff, ctx.workspace_bytes + 256);
	ctx.workspace = (void *)(((uintptr_t)memory + 255) / 256 * 256);
	require_ok(run_matrix_recurrence_backward(&ctx, args));
}

static void check(struct device *device, const struct form *f)
{
	const bool by_data = f->decay == DECAY_SCALAR || f->decay == DECAY_DIAGONAL;
	const int64_t decay_width = f->decay == DECAY_DIAGONAL ? f->d_k : 1;
	const int64_t states = f->batch * f->n_heads * f->d_k * f->d_v;
	struct tensor q = fill_tensor(f, f->d_k, f->shared, false),
	              k = fill_tensor(f, f->d_k, f->shared, false),
	              v = fill_tensor(f, f->d_v, false, false),
	              dout = fill_tensor(f, f->d_v, false, false),
	              decays = fill_tensor(f, decay_width, false, true),
	              dq = new_tensor(f, f->d_k, false), dk = new_tensor(f, f->d_k, false),
	              dv = new_tensor(f, f->d_v, false), dlog = new_tensor(f, decay_width, false);
	struct tensor *all[] = {&q, &k, &v, &dout, &decays, &dq, &dk, &dv, &dlog};
	scoped float *h0 = new_memory((size_t)states * sizeof *h0),
	             *dh0 = new_memory((size_t)states * sizeof *dh0);
	scoped double *wide_h0 = new_memory((size_t)states * sizeof *wide_h0),
	              *wide_dh0 = new_memory((size_t)states * sizeof *wide_dh0);
	struct matrix_recurrence_backward_args a = {.forward = args_of(f),
	                                            .dout = dout.narrow,
	                                            .dq = dq.narrow,
	                                            .dk = dk.narrow,
	                                            .dv = dv.narrow};
	char form[160];

	snprintf(form, sizeof form, "B %ld, T %ld, H %ld, %ld x %ld, %s decay %d%s%s, pad %ld",
	         (long)f->batch, (long)f->seq_len, (long)f->n_heads, (long)f->d_k, (long)f->d_v,
	         decay_name(f->decay), f->how, f->shared ? ", shared" : "",
	         f->with_h0 ? ", h0" : "", (long)f->pad);
	for (int64_t i = 0; i < states; i++) {
		h0[i] = (float)any_number();
		wide_h0[i] = (double)h0[i];
	}
	a.forward.q = q.narrow;
	a.forward.k = k.narrow;
	a.forward.v = v.narrow;
	if (by_data) {
		a.forward.log_decay = decays.narrow;
		a.dlog_decay = dlog.narrow;
	}
	if (f->with_h0) {
		a.forward.h0 = h0;
		a.dh0 = dh0;
	}
	run(device, &a);
	a.forward.q = q.wide;
	a.forward.k = k.wide;
	a.forward.v = v.wide;
	a.dout = dout.wide;
	a.dq = dq.wide;
	a.dk = dk.wide;
	a.dv = dv.wide;
	if (by_data) {
		a.forward.log_decay = decays.wide;
		a.dlog_decay = dlog.wide;
	}
	if (f->with_h0) {
		a.forward.h0 = (const float *)(const void *)wide_h0;
		a.dh0 = (float *)(void *)wide_dh0;
	}
	run(device->reference, &a);
	const bool each = f->decay == DECAY_DIAGONAL && f->seq_len > 16;
	compare(form, "dq", f, &dq, each);
	compare(form, "dk", f, &dk, each);
	compare(form, "dv", f, &dv, false);
	if (by_data)
		compare(form, "dlog_decay", f, &dlog, false);
	double error = 0, norm = 0;
	for (int64_t i = 0; f->with_h0 && i < states; i++) {
		error += ((double)dh0[i] - wide_dh0[i]) * ((double)dh0[i] - wide_dh0[i]);
		norm += wide_dh0[i] * wide_dh0[i];
	}
	expect_close(form, "dh0", error, norm);
	for (size_t i = 0; i < COUNT_OF(all); i++)
		free_tensor(all[i]);
}

static void check_all(const struct form *forms, size_t count)
{
	struct device *device;

	require_ok(cuda_backend.open("", NULL, &device));
	for (size_t i = 0; i < count; i++)
		check(device, &forms[i]);
	device_close(device);
}

TEST(test_lengths)
{
	static const int64_t lengths[] = {1, 2, 16, 17, 63, 64, 65, 129};
	struct form forms[4 * COUNT_OF(lengths)];
	size_t count = 0;

	for (size_t i = 0; i < COUNT_OF(lengths); i++)
		for (int decay = DECAY_NONE; decay <= DECAY_DIAGONAL; decay++)
			forms[count++] = (struct form){.batch = 1,
			                               .seq_len = lengths[i],
			                               .n_heads = 2,
			                               .d_k = 16,
			                               .d_v = 8,
			                               .decay = (enum decay)decay,
			                               .with_h0 = i % 2};
	check_all(forms, count);
}

/* One head, so that time is cut into segments. */
TEST(test_long_sequences)
{
	static const struct form forms[] = {
	        {1, 4097, 1, 16, 16, DECAY_DIAGONAL, MILD, .with_h0 = true},
	        {1, 4097, 1, 16, 16, DECAY_SCALAR, MILD, .with_h0 = true},
	        {1, 1030, 1, 8, 72, DECAY_CONSTANT, MILD, .pad = 0},
	        {1, 1030, 1, 72, 8, DECAY_NONE, MILD, .with_h0 = true},
	        {1, 1030, 1, 24, 40, DECAY_DIAGONAL, SUDDEN, .with_h0 = true}};

	check_all(forms, COUNT_OF(forms));
}

TEST(test_widths)
{
	static const struct form forms[] = {
	        {1, 70, 1, 256, 512, DECAY_DIAGONAL, MILD, .with_h0 = true},
	        {1, 70, 1, 256, 136, DECAY_SCALAR, MILD, .with_h0 = true},
	        {1, 130, 1, 200, 64, DECAY_DIAGONAL, EXTREME, .pad = 0},
	        {1, 70, 2, 300, 24, DECAY_CONSTANT, MILD, .pad = 0},
	        {2, 70, 2, 7, 3, DECAY_DIAGONAL, MILD, .with_h0 = true},
	        {2, 70, 2, 65, 33, DECAY_SCALAR, MILD, .with_h0 = true, .pad = 3},
	        {2, 70, 3, 1, 1, DECAY_NONE, MILD, .pad = 0},
	        {2, 70, 2, 129, 10, DECAY_DIAGONAL, EXTREME, .pad = 1},
	        {2, 70, 2, 64, 128, DECAY_DIAGONAL, MILD, .pad = 8},
	        {1, 70, 3, 128, 64, DECAY_SCALAR, MILD, .shared = true},
	        {2, 70, 3, 20, 12, DECAY_SCALAR, MILD, .shared = true}};

	check_all(forms, COUNT_OF(forms));
}

TEST(test_decays)
{
	static const struct form forms[] = {
	        {1, 200, 1, 32, 32, DECAY_DIAGONAL, EXTREME, .with_h0 = true},
	        {1, 200, 1, 128, 32, DECAY_DIAGONAL, EXTREME, .pad = 0},
	        {1, 200, 1, 32, 32, DECAY_DIAGONAL, SUDDEN, .with_h0 = true},
	        {1, 200, 1, 32, 32, DECAY_DIAGONAL, NEAR, .with_h0 = true},
	        {1, 200, 1, 32, 32, DECAY_DIAGONAL, NO_DECAY, .with_h0 = true},
	        {1, 200, 4, 32, 32, DECAY_SCALAR, EXTREME, .with_h0 = true},
	        {1, 200, 2, 32, 32, DECAY_SCALAR, SUDDEN, .pad = 0},
	        {1, 200, 2, 32, 32, DECAY_SCALAR, NOTHING, .pad = 0},
	        {1, 200, 2, 32, 32, DECAY_DIAGONAL, NOTHING, .pad = 0},
	        {1, 200, 2, 32, 32, DECAY_SCALAR, NO_DECAY, .pad = 0}};

	check_all(forms, COUNT_OF(forms));
}

TEST(test_more_than_32_bits)
{
	static const struct form forms[] = {
	        {1, 70, 2, 16, 16, DECAY_DIAGONAL, MILD, .is_sparse = true},
	        {2, 70, 2, 16, 16, DECAY_SCALAR, MILD, .shared = true, .is_sparse = true}};

	check_all(forms, COUNT_OF(forms));
}
