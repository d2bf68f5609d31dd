/*
 * cuDNN graphs from C: tensors, the operations between them, and a plan that
 * runs them all as one kernel. A graph remembers its first error and ignores
 * what follows, so that only graph_plan() needs to be checked. All tensors
 * have four dimensions.
 */
#ifndef BASELINES_CUDNN_GRAPH_H
#define BASELINES_CUDNN_GRAPH_H

#include <stdbool.h>

#include "baselines/cudnn/library.h"
#include "kernels/status.h"

enum { GRAPH_MAX_DESCRIPTORS = 192, GRAPH_MAX_OPERATIONS = 48, GRAPH_MAX_INPUTS = 20 };

struct graph {
	const struct cudnn_library *cudnn;
	void *descriptors[GRAPH_MAX_DESCRIPTORS]; /* everything made, to be destroyed */
	int n_descriptors;
	void *operations[GRAPH_MAX_OPERATIONS];
	int n_operations;
	int64_t next_id; /* of virtual tensors */
	int error;       /* cuDNN's; 0: none */
	char message[256];
};

struct graph_tensor {
	void *descriptor;
	int64_t dims[4];
};

/* A graph that can be run: the pointers of its tensors are given by their ids. */
struct graph_plan {
	const struct cudnn_library *cudnn;
	void *plan;
	size_t workspace; /* bytes */
};

void graph_begin(struct graph *graph, const struct cudnn_library *cudnn);
/* Destroys all that was made for the graph; plans outlive it. */
void graph_end(struct graph *graph);

/* A tensor in device memory, 16-byte aligned; id > 0 and below 1000. */
struct graph_tensor graph_tensor(struct graph *graph, enum cudnn_data type, const int64_t dims[4],
                                 const int64_t strides[4], int64_t id);
/* A single number in host memory when the plan is run. */
struct graph_tensor graph_scalar(struct graph *graph, enum cudnn_data type, int64_t id);

/* c = a b, batched over the first two dimensions; m, n, k: lengths per sequence, or NULL. */
void graph_matmul(struct graph *graph, const struct graph_tensor *a, const struct graph_tensor *b,
                  const struct graph_tensor *c, const struct graph_tensor *m,
                  const struct graph_tensor *n, const struct graph_tensor *k);
/* The same into a new fp32 tensor that is never stored, with the batches and heads of a. */
struct graph_tensor graph_product(struct graph *graph, const struct graph_tensor *a,
                                  const struct graph_tensor *b, const struct graph_tensor *m,
                                  const struct graph_tensor *n);

/* A dense tensor that is never stored. */
struct graph_tensor graph_virtual(struct graph *graph, enum cudnn_data type, const int64_t dims[4]);

/* y = mode(x, b, t), element by element; b and t may be NULL. `axis` is GEN_INDEX's. */
void graph_pointwise_into(struct graph *graph, enum cudnn_pointwise mode, enum cudnn_data compute,
                          int64_t axis, const struct graph_tensor *x, const struct graph_tensor *b,
                          const struct graph_tensor *t, const struct graph_tensor *y);
/* The same into a new tensor of x's shape that is never stored. */
struct graph_tensor graph_pointwise(struct graph *graph, enum cudnn_pointwise mode,
                                    enum cudnn_data compute, enum cudnn_data type, int64_t axis,
                                    const struct graph_tensor *x, const struct graph_tensor *b,
                                    const struct graph_tensor *t);

/* The reduction of x along those dimensions of which y has fewer: each of y's is made of several
 * that lie side by side. */
void graph_reduce_into(struct graph *graph, enum cudnn_reduction operator,
                       const struct graph_tensor * x, const struct graph_tensor *y);
/* The reduction of x's last dimension, fp32, never stored. */
struct graph_tensor graph_reduce(struct graph *graph, enum cudnn_reduction operator,
                                 const struct graph_tensor * x);

/* The same elements in other dimensions and strides: a new tensor that is never stored. */
struct graph_tensor graph_reshape(struct graph *graph, enum cudnn_data type,
                                  const struct graph_tensor *x, const int64_t dims[4],
                                  const int64_t strides[4]);

/* Plans the graph by the first of cuDNN's suggestions that works; STATUS_UNSUPPORTED if none does.
 */
enum status graph_plan(struct graph *graph, struct graph_plan *plan);

/* Submits a plan; `count` tensors have these ids and pointers. */
enum status graph_run(const struct graph_plan *plan, int count, const int64_t *ids,
                      void *const *pointers, void *workspace);

void graph_plan_destroy(struct graph_plan *plan);

#endif
