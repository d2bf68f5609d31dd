/* The output stage of the layers that gate before they normalize (Mamba-2), or do not gate. */
#include <omp.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "kernels/cpu/shares.h"
#include "kernels/cpu/vector_math.h"

/* u [H*d] of token n, before the norm: the skip connection, then the gate. */
static void gated(const struct gate_norm_args *a, int64_t n, float *u)
{
	int64_t d = a->d_head, width = a->n_heads * d;
	const float *gate = (const float *)a->gate;

	memcpy(u, (const float *)a->x + n * width, sizeof *u * (size_t)width);
	for (int64_t h = 0; a->skip && h < a->n_heads; h++) {
		const float *skip = (const float *)a->skip + n * a->skip_stride + h * d;

#pragma omp simd
		for (int64_t i = 0; i < d; i++)
			u[h * d + i] += a->skip_weight[h] * skip[i];
	}
	if (gate)
#pragma omp simd
		for (int64_t i = 0; i < width; i++)
			u[i] *= silu_f32(gate[n * a->gate_stride + i]);
}

enum status cpu_gate_norm(struct device *device, const void *args, void *workspace)
{
	const struct gate_norm_args *a = args;
	int64_t width = a->n_heads * a->d_head, group = width / a->groups;

#pragma omp parallel for schedule(static)
	for (int64_t n = 0; n < a->n_tokens; n++) {
		float *out = (float *)a->out + n * width;

		gated(a, n, out);
		for (int64_t g = 0; g < a->groups; g++) {
			float *u = out + g * group;
			float rstd = 1.0f / sqrtf(dot_f32(group, u, u) / (float)group + a->eps);

			if (a->rstd)
				a->rstd[n * a->groups + g] = rstd;
#pragma omp simd
			for (int64_t i = 0; i < group; i++)
				u[i] *= rstd * a->weight[i];
		}
	}
	return STATUS_OK;
}

/* A thread's shares of dweight and dskip_weight, and a row of u and of its gradient. */
struct scratch {
	double *dweight, *dskip_weight;
	float *u, *du;
};

static size_t scratch_doubles(const struct gate_norm_args *f)
{
	int64_t width = f->n_heads * f->d_head;

	return (size_t)(width / f->groups + f->n_heads + width);
}

static struct scratch scratch_of(const struct gate_norm_args *f, void *workspace, int thread)
{
	double *memory = (double *)workspace + scratch_doubles(f) * (size_t)thread;
	int64_t width = f->n_heads * f->d_head, group = width / f->groups;
	float *rows = (float *)(memory + group + f->n_heads);

	return (struct scratch){memory, memory + group, rows, rows + width};
}

size_t cpu_gate_norm_backward_workspace(const struct device *device, const void *args)
{
	const struct gate_norm_backward_args *a = args;

	return scratch_doubles(&a->forward) * sizeof(double) * (size_t)omp_get_max_threads();
}

/* s->du from dout through the norm; s->u is that of token n. */
static void norm_backward(const struct gate_norm_backward_args *a, int64_t n,
                          const struct scratch *s)
{
	const struct gate_norm_args *f = &a->forward;
	int64_t width = f->n_heads * f->d_head, group = width / f->groups;

	for (int64_t g = 0; g < f->groups; g++) {
		const float *u = s->u + g * group;
		const float *dout = (const float *)a->dout + n * width + g * group;
		float *du = s->du + g * group;
		float rstd = f->rstd[n * f->groups + g], projection = 0;

#pragma omp simd reduction(+ : projection)
		for (int64_t i = 0; i < group; i++) {
			du[i] = dout[i] * f->weight[i];
			projection += du[i] * u[i] * rstd;
			s->dweight[i] += dout[i] * u[i] * rstd;
		}
		projection /= (float)group;
#pragma omp simd
		for (int64_t i = 0; i < group; i++)
			du[i] = rstd * (du[i] - u[i] * rstd * projection);
	}
}

/* With w = x + skip_weight skip and u = w silu(gate): dgate = du w silu'(gate); s->du becomes dw.
 */
static void gate_backward(const struct gate_norm_backward_args *a, int64_t n,
                          const struct scratch *s)
{
	struct gate_norm_args ungated = a->forward;
	int64_t width = ungated.n_heads * ungated.d_head, row = n * ungated.gate_stride;
	const float *gate = (const float *)a->forward.gate;
	float *dgate = a->dgate;

	if (!gate)
		return;
	ungated.gate = NULL;
	gated(&ungated, n, s->u);
#pragma omp simd
	for (int64_t i = 0; i < width; i++) {
		float g = gate[row + i], sigma = sigmoid_f32(g);

		dgate[row + i] = s->du[i] * s->u[i] * sigma * (1.0f + g * (1.0f - sigma));
		s->du[i] *= g * sigma;
	}
}

static void skip_backward(const struct gate_norm_backward_args *a, int64_t n,
                          const struct scratch *s)
{
	const struct gate_norm_args *f = &a->forward;
	int64_t d = f->d_head;

	for (int64_t h = 0; f->skip && h < f->n_heads; h++) {
		const float *skip = (const float *)f->skip + n * f->skip_stride + h * d;
		const float *du = s->du + h * d;
		float *dskip = (float *)a->dskip + (n * f->n_heads + h) * d, sum = 0;

#pragma omp simd reduction(+ : sum)
		for (int64_t i = 0; i < d; i++) {
			dskip[i] = f->skip_weight[h] * du[i];
			sum += du[i] * skip[i];
		}
		s->dskip_weight[h] += sum;
	}
}

/* dx of token n. */
static void add_residual(const struct gate_norm_backward_args *a, int64_t n,
                         const struct scratch *s)
{
	int64_t width = a->forward.n_heads * a->forward.d_head;
	const float *dresidual = a->dresidual;
	float *dx = (float *)a->dx + n * width;

	if (!dresidual)
		memcpy(dx, s->du, sizeof *dx * (size_t)width);
	else
#pragma omp simd
		for (int64_t i = 0; i < width; i++)
			dx[i] = s->du[i] + dresidual[n * width + i];
}

enum status cpu_gate_norm_backward(struct device *device, const void *args, void *workspace)
{
	const struct gate_norm_backward_args *a = args;
	const struct gate_norm_args *f = &a->forward;
	int64_t width = f->n_heads * f->d_head, group = width / f->groups;
	int64_t share = (int64_t)scratch_doubles(f);
	int n_threads = omp_get_max_threads();

	memset(workspace, 0, cpu_gate_norm_backward_workspace(device, args));
#pragma omp parallel for schedule(static) num_threads(n_threads)
	for (int64_t n = 0; n < f->n_tokens; n++) {
		struct scratch s = scratch_of(f, workspace, omp_get_thread_num());

		gated(f, n, s.u);
		norm_backward(a, n, &s);
		gate_backward(a, n, &s);
		skip_backward(a, n, &s);
		add_residual(a, n, &s);
	}
	add_shares(workspace, n_threads, share, group, a->dweight);
	if (f->skip)
		add_shares((double *)workspace + group, n_threads, share, f->n_heads,
		           a->dskip_weight);
	return STATUS_OK;
}
