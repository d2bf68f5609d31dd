#define _GNU_SOURCE
#include "baselines/cudnn/graph.h"

#include <stdio.h>
#include <string.h>

enum { ALIGNMENT = 16, FIRST_VIRTUAL_ID = 1000, MAX_CONFIGS = 16 };

void graph_begin(struct graph *graph, const struct cudnn_library *cudnn)
{
	*graph = (struct graph){.cudnn = cudnn, .next_id = FIRST_VIRTUAL_ID};
}

void graph_end(struct graph *graph)
{
	while (graph->n_descriptors > 0)
		graph->cudnn->destroy_descriptor(graph->descriptors[--graph->n_descriptors]);
}

/* Remembers the first error, with cuDNN's own explanation. */
static void check(struct graph *graph, int error)
{
	if (error == 0 || graph->error != 0)
		return;
	graph->error = error;
	graph->cudnn->last_error(graph->message, sizeof graph->message);
	graph->message[strcspn(graph->message, "\n")] = '\0';
}

static void *create(struct graph *graph, int type)
{
	void *descriptor = NULL;

	if (graph->error == 0 && graph->n_descriptors == GRAPH_MAX_DESCRIPTORS)
		graph->error = -1;
	if (graph->error != 0)
		return NULL;
	check(graph, graph->cudnn->create_descriptor(type, &descriptor));
	if (graph->error == 0)
		graph->descriptors[graph->n_descriptors++] = descriptor;
	return descriptor;
}

static void set(struct graph *graph, void *descriptor, int name, int type, int64_t count,
                const void *values)
{
	if (graph->error == 0)
		check(graph, graph->cudnn->set_attribute(descriptor, name, type, count, values));
}

static void set_descriptor(struct graph *graph, void *descriptor, int name, void *value)
{
	set(graph, descriptor, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
}

static void set_data_type(struct graph *graph, void *descriptor, int name, int type)
{
	set(graph, descriptor, name, CUDNN_TYPE_DATA_TYPE, 1, &type);
}

static void finalize(struct graph *graph, void *descriptor)
{
	if (graph->error == 0)
		check(graph, graph->cudnn->finalize(descriptor));
}

/* Closes an operation of the graph. */
static void add_operation(struct graph *graph, void *operation)
{
	finalize(graph, operation);
	if (graph->error == 0 && graph->n_operations == GRAPH_MAX_OPERATIONS)
		graph->error = -1;
	if (graph->error == 0)
		graph->operations[graph->n_operations++] = operation;
}

enum place { IN_MEMORY, BY_VALUE, VIRTUAL };

static struct graph_tensor make_tensor(struct graph *graph, enum cudnn_data type,
                                       const int64_t dims[4], const int64_t strides[4], int64_t id,
                                       enum place place)
{
	const int64_t alignment = ALIGNMENT;
	const bool yes = true;
	struct graph_tensor tensor = {.descriptor = create(graph, CUDNN_BACKEND_TENSOR)};
	void *d = tensor.descriptor;

	memcpy(tensor.dims, dims, sizeof tensor.dims);
	set_data_type(graph, d, CUDNN_ATTR_TENSOR_DATA_TYPE, (int)type);
	set(graph, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims);
	set(graph, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides);
	set(graph, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id);
	set(graph, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
	if (place == VIRTUAL)
		set(graph, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes);
	if (place == BY_VALUE)
		set(graph, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes);
	finalize(graph, d);
	return tensor;
}

struct graph_tensor graph_tensor(struct graph *graph, enum cudnn_data type, const int64_t dims[4],
                                 const int64_t strides[4], int64_t id)
{
	return make_tensor(graph, type, dims, strides, id, IN_MEMORY);
}

struct graph_tensor graph_scalar(struct graph *graph, enum cudnn_data type, int64_t id)
{
	const int64_t ones[4] = {1, 1, 1, 1};

	return make_tensor(graph, type, ones, ones, id, BY_VALUE);
}

struct graph_tensor graph_virtual(struct graph *graph, enum cudnn_data type, const int64_t dims[4])
{
	const int64_t strides[4] = {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1};

	return make_tensor(graph, type, dims, strides, graph->next_id++, VIRTUAL);
}

void graph_matmul(struct graph *graph, const struct graph_tensor *a, const struct graph_tensor *b,
                  const struct graph_tensor *c, const struct graph_tensor *m,
                  const struct graph_tensor *n, const struct graph_tensor *k)
{
	void *matmul = create(graph, CUDNN_BACKEND_MATMUL);
	void *operation = create(graph, CUDNN_BACKEND_OPERATION_MATMUL);

	set_data_type(graph, matmul, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT);
	finalize(graph, matmul);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a->descriptor);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b->descriptor);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c->descriptor);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_DESC, matmul);
	if (m)
		set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_M_OVERRIDE,
		               m->descriptor);
	if (n)
		set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_N_OVERRIDE,
		               n->descriptor);
	if (k)
		set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_MATMUL_K_OVERRIDE,
		               k->descriptor);
	add_operation(graph, operation);
}

struct graph_tensor graph_product(struct graph *graph, const struct graph_tensor *a,
                                  const struct graph_tensor *b, const struct graph_tensor *m,
                                  const struct graph_tensor *n)
{
	const int64_t dims[4] = {a->dims[0], a->dims[1], a->dims[2], b->dims[3]};
	struct graph_tensor c = graph_virtual(graph, CUDNN_DATA_FLOAT, dims);

	graph_matmul(graph, a, b, &c, m, n, NULL);
	return c;
}

void graph_pointwise_into(struct graph *graph, enum cudnn_pointwise mode, enum cudnn_data compute,
                          int64_t axis, const struct graph_tensor *x, const struct graph_tensor *b,
                          const struct graph_tensor *t, const struct graph_tensor *y)
{
	void *pointwise = create(graph, CUDNN_BACKEND_POINTWISE);
	void *operation = create(graph, CUDNN_BACKEND_OPERATION_POINTWISE);
	const int mode_value = (int)mode;

	set(graph, pointwise, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode_value);
	set_data_type(graph, pointwise, CUDNN_ATTR_POINTWISE_MATH_PREC, (int)compute);
	if (mode == CUDNN_POINTWISE_GEN_INDEX)
		set(graph, pointwise, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
	finalize(graph, pointwise);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, pointwise);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x->descriptor);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y->descriptor);
	if (b)
		set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_BDESC,
		               b->descriptor);
	if (t)
		set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_POINTWISE_TDESC,
		               t->descriptor);
	add_operation(graph, operation);
}

struct graph_tensor graph_pointwise(struct graph *graph, enum cudnn_pointwise mode,
                                    enum cudnn_data compute, enum cudnn_data type, int64_t axis,
                                    const struct graph_tensor *x, const struct graph_tensor *b,
                                    const struct graph_tensor *t)
{
	struct graph_tensor y = graph_virtual(graph, type, x->dims);

	graph_pointwise_into(graph, mode, compute, axis, x, b, t, &y);
	return y;
}

void graph_reduce_into(struct graph *graph, enum cudnn_reduction operator,
                       const struct graph_tensor * x, const struct graph_tensor *y)
{
	void *reduction = create(graph, CUDNN_BACKEND_REDUCTION);
	void *operation = create(graph, CUDNN_BACKEND_OPERATION_REDUCTION);
	const int operator_value = (int)operator;

	set(graph, reduction, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR, 1,
	    &operator_value);
	set_data_type(graph, reduction, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT);
	finalize(graph, reduction);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_REDUCTION_DESC, reduction);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x->descriptor);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y->descriptor);
	add_operation(graph, operation);
}

struct graph_tensor graph_reduce(struct graph *graph, enum cudnn_reduction operator,
                                 const struct graph_tensor * x)
{
	const int64_t dims[4] = {x->dims[0], x->dims[1], x->dims[2], 1};
	struct graph_tensor y = graph_virtual(graph, CUDNN_DATA_FLOAT, dims);

	graph_reduce_into(graph, operator, x, &y);
	return y;
}

struct graph_tensor graph_reshape(struct graph *graph, enum cudnn_data type,
                                  const struct graph_tensor *x, const int64_t dims[4],
                                  const int64_t strides[4])
{
	struct graph_tensor y = make_tensor(graph, type, dims, strides, graph->next_id++, VIRTUAL);
	void *operation = create(graph, CUDNN_BACKEND_OPERATION_RESHAPE);

	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x->descriptor);
	set_descriptor(graph, operation, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y.descriptor);
	add_operation(graph, operation);
	return y;
}

/* cuDNN's suggestions for the graph, best first, into configs; returns how many. */
static int suggest(struct graph *graph, void **configs)
{
	void *whole = create(graph, CUDNN_BACKEND_OPERATIONGRAPH);
	void *heuristic = create(graph, CUDNN_BACKEND_ENGINEHEUR);
	const int mode = CUDNN_HEUR_MODE_A;
	int64_t count = 0;

	set(graph, whole, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
	    graph->n_operations, graph->operations);
	set(graph, whole, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1,
	    &graph->cudnn->handle);
	finalize(graph, whole);
	set_descriptor(graph, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, whole);
	set(graph, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
	finalize(graph, heuristic);
	for (int i = 0; i < MAX_CONFIGS; i++)
		configs[i] = create(graph, CUDNN_BACKEND_ENGINECFG);
	if (graph->error == 0)
		check(graph, graph->cudnn->get_attribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS,
		                                         CUDNN_TYPE_BACKEND_DESCRIPTOR, MAX_CONFIGS,
		                                         &count, configs));
	return graph->error != 0 ? 0 : count < MAX_CONFIGS ? (int)count : MAX_CONFIGS;
}

/* The plan of one suggestion; false if cuDNN cannot carry it out. */
static bool plan_config(const struct cudnn_library *cudnn, void *config, struct graph_plan *plan)
{
	int64_t bytes = 0, count = 0;
	void *d = NULL;

	if (cudnn->create_descriptor(CUDNN_BACKEND_EXECUTION_PLAN, &d) != 0)
		return false;
	if (cudnn->set_attribute(d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1,
	                         &cudnn->handle) == 0 &&
	    cudnn->set_attribute(d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
	                         CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config) == 0 &&
	    cudnn->finalize(d) == 0 &&
	    cudnn->get_attribute(d, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1,
	                         &count, &bytes) == 0) {
		*plan = (struct graph_plan){cudnn, d, (size_t)bytes};
		return true;
	}
	cudnn->destroy_descriptor(d);
	return false;
}

enum status graph_plan(struct graph *graph, struct graph_plan *plan)
{
	void *configs[MAX_CONFIGS] = {0};
	const int count = suggest(graph, configs);

	*plan = (struct graph_plan){0};
	for (int i = 0; i < count; i++)
		if (plan_config(graph->cudnn, configs[i], plan))
			return STATUS_OK;
	if (graph->error == 0) {
		graph->cudnn->last_error(graph->message, sizeof graph->message);
		graph->message[strcspn(graph->message, "\n")] = '\0';
	}
	return status_set(STATUS_UNSUPPORTED, "cuDNN has no kernel for this graph: %s",
	                  graph->message);
}

enum status graph_run(const struct graph_plan *plan, int count, const int64_t *ids,
                      void *const *pointers, void *workspace)
{
	const struct cudnn_library *cudnn = plan->cudnn;
	void *pack = NULL;
	int error = cudnn->create_descriptor(CUDNN_BACKEND_VARIANT_PACK, &pack);

	if (error == 0)
		error = cudnn->set_attribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
		                             CUDNN_TYPE_INT64, count, ids);
	if (error == 0)
		error = cudnn->set_attribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
		                             CUDNN_TYPE_VOID_PTR, count, pointers);
	if (error == 0)
		error = cudnn->set_attribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
		                             CUDNN_TYPE_VOID_PTR, 1, &workspace);
	if (error == 0)
		error = cudnn->finalize(pack);
	if (error == 0)
		error = cudnn->execute(cudnn->handle, plan->plan, pack);
	if (pack)
		cudnn->destroy_descriptor(pack);
	return error == 0 ? STATUS_OK
	                  : status_set(STATUS_CUDA, "cuDNN: %s", cudnn->error_string(error));
}

void graph_plan_destroy(struct graph_plan *plan)
{
	if (plan->plan)
		plan->cudnn->destroy_descriptor(plan->plan);
	*plan = (struct graph_plan){0};
}
