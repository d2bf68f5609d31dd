/* What the two halves of the device's reference share. */
#ifndef KERNELS_CUDA_REFERENCE_CUH
#define KERNELS_CUDA_REFERENCE_CUH

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/reference.h"

namespace reference
{

constexpr int THREADS = 256, GRID = 8192, MAX_HEAD = 256;

/* for (i = ...) over `count` elements, by all threads of the grid. */
#define FOR_ALL(i, count)                                                                          \
	for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (count);              \
	     i += (int64_t)gridDim.x * blockDim.x)

static __device__ __forceinline__ double sigmoid64(double x)
{
	return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x));
}

static __device__ __forceinline__ double warp_sum(double x)
{
	for (int lane = 16; lane > 0; lane /= 2)
		x += __shfl_xor_sync(0xffffffffu, x, lane);
	return x;
}

/* Keeps the first error of functions that return none; report() hands it out. */
void note(enum status status);
void note_launch(const char *function);
enum status report();

/* Device memory for `count` doubles. */
enum status take(int64_t count, double **memory);
void release(double *memory);

/* A list of rows on the device; NULL, and an error noted, if there is no memory. To be freed by
 * cudaFree(). */
int64_t *upload_rows(int64_t n_rows, const int64_t *rows);

/* The backward half; see struct reference_device. */
void linear_input_gradient(int64_t n, int64_t d_in, int64_t d_out, const double *dy,
                           const double *weight, double *dx);
void set_columns(int64_t n_rows, int64_t width, int64_t first, int64_t count, const double *from,
                 double *to);
enum status attention_backward_rows(const struct reference_attention *a,
                                    const struct reference_attention_left *left, const double *dout,
                                    int64_t n_queries, const int64_t *queries, int64_t n_keys,
                                    const int64_t *keys,
                                    const struct reference_attention_grads *grads);
enum status rat_scan_backward(const struct reference_rat_scan *s,
                              const struct reference_rat_scan_grads *grads);
enum status recurrence_backward(const struct reference_recurrence *r, const double *dout,
                                const struct reference_recurrence_grads *grads);
enum status weight_gradient_rows(const struct reference_gradient_of *of, int64_t n_rows,
                                 const int64_t *rows, double *host);
enum status norm_gradient_columns(const struct reference_gradient_of *of, double eps,
                                  const double *weight, int64_t n_columns, const int64_t *columns,
                                  double *host);
enum status column_sums(enum dtype dtype, const void *tensor, int64_t n, int64_t stride,
                        int64_t count, double *host);

} // namespace reference

#endif
