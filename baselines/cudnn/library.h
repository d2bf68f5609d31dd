/*
 * cuDNN, found and opened at run time: no header or library of it is needed to
 * build, and a machine without it runs everything else. The numbers below are
 * part of cuDNN 9's binary interface (cudnn_graph.h).
 */
#ifndef BASELINES_CUDNN_LIBRARY_H
#define BASELINES_CUDNN_LIBRARY_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/device.h"

enum cudnn_type {
	CUDNN_TYPE_HANDLE = 0,
	CUDNN_TYPE_DATA_TYPE = 1,
	CUDNN_TYPE_BOOLEAN = 2,
	CUDNN_TYPE_INT64 = 3,
	CUDNN_TYPE_VOID_PTR = 6,
	CUDNN_TYPE_HEUR_MODE = 8,
	CUDNN_TYPE_POINTWISE_MODE = 14,
	CUDNN_TYPE_BACKEND_DESCRIPTOR = 15,
	CUDNN_TYPE_REDUCTION_OPERATOR = 18
};

enum cudnn_data {
	CUDNN_DATA_FLOAT = 0,
	CUDNN_DATA_INT32 = 4,
	CUDNN_DATA_BFLOAT16 = 9,
	CUDNN_DATA_BOOLEAN = 11
};

enum cudnn_pointwise {
	CUDNN_POINTWISE_ADD = 0,
	CUDNN_POINTWISE_MUL = 1,
	CUDNN_POINTWISE_DIV = 6,
	CUDNN_POINTWISE_SUB = 9,
	CUDNN_POINTWISE_EXP = 13,
	CUDNN_POINTWISE_LOG = 15,
	CUDNN_POINTWISE_IDENTITY = 21,
	CUDNN_POINTWISE_CMP_GT = 302,
	CUDNN_POINTWISE_CMP_GE = 303,
	CUDNN_POINTWISE_CMP_LT = 304,
	CUDNN_POINTWISE_LOGICAL_AND = 400,
	CUDNN_POINTWISE_GEN_INDEX = 501,
	CUDNN_POINTWISE_BINARY_SELECT = 601
};

enum cudnn_reduction { CUDNN_REDUCE_ADD = 0, CUDNN_REDUCE_MAX = 3 };

enum { CUDNN_HEUR_MODE_A = 3 };

enum cudnn_descriptor_type {
	CUDNN_BACKEND_POINTWISE = 0,
	CUDNN_BACKEND_ENGINECFG = 3,
	CUDNN_BACKEND_ENGINEHEUR = 4,
	CUDNN_BACKEND_EXECUTION_PLAN = 5,
	CUDNN_BACKEND_OPERATION_POINTWISE = 13,
	CUDNN_BACKEND_OPERATIONGRAPH = 15,
	CUDNN_BACKEND_VARIANT_PACK = 16,
	CUDNN_BACKEND_TENSOR = 17,
	CUDNN_BACKEND_MATMUL = 18,
	CUDNN_BACKEND_OPERATION_MATMUL = 19,
	CUDNN_BACKEND_REDUCTION = 21,
	CUDNN_BACKEND_OPERATION_REDUCTION = 22,
	CUDNN_BACKEND_OPERATION_RESHAPE = 31
};

enum cudnn_attribute {
	CUDNN_ATTR_POINTWISE_MODE = 0,
	CUDNN_ATTR_POINTWISE_MATH_PREC = 1,
	CUDNN_ATTR_POINTWISE_AXIS = 9,
	CUDNN_ATTR_ENGINEHEUR_MODE = 200,
	CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH = 201,
	CUDNN_ATTR_ENGINEHEUR_RESULTS = 202,
	CUDNN_ATTR_EXECUTION_PLAN_HANDLE = 400,
	CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG = 401,
	CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE = 402,
	CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR = 750,
	CUDNN_ATTR_OPERATION_POINTWISE_XDESC = 751,
	CUDNN_ATTR_OPERATION_POINTWISE_BDESC = 752,
	CUDNN_ATTR_OPERATION_POINTWISE_YDESC = 753,
	CUDNN_ATTR_OPERATION_POINTWISE_TDESC = 758,
	CUDNN_ATTR_OPERATIONGRAPH_HANDLE = 800,
	CUDNN_ATTR_OPERATIONGRAPH_OPS = 801,
	CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT = 900,
	CUDNN_ATTR_TENSOR_DATA_TYPE = 901,
	CUDNN_ATTR_TENSOR_DIMENSIONS = 902,
	CUDNN_ATTR_TENSOR_STRIDES = 903,
	CUDNN_ATTR_TENSOR_UNIQUE_ID = 906,
	CUDNN_ATTR_TENSOR_IS_VIRTUAL = 907,
	CUDNN_ATTR_TENSOR_IS_BY_VALUE = 908,
	CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS = 1000,
	CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS = 1001,
	CUDNN_ATTR_VARIANT_PACK_WORKSPACE = 1003,
	CUDNN_ATTR_MATMUL_COMP_TYPE = 1500,
	CUDNN_ATTR_OPERATION_MATMUL_ADESC = 1520,
	CUDNN_ATTR_OPERATION_MATMUL_BDESC = 1521,
	CUDNN_ATTR_OPERATION_MATMUL_CDESC = 1522,
	CUDNN_ATTR_OPERATION_MATMUL_DESC = 1523,
	CUDNN_ATTR_OPERATION_MATMUL_M_OVERRIDE = 1525,
	CUDNN_ATTR_OPERATION_MATMUL_N_OVERRIDE = 1526,
	CUDNN_ATTR_OPERATION_MATMUL_K_OVERRIDE = 1527,
	CUDNN_ATTR_REDUCTION_OPERATOR = 1600,
	CUDNN_ATTR_REDUCTION_COMP_TYPE = 1601,
	CUDNN_ATTR_OPERATION_REDUCTION_XDESC = 1610,
	CUDNN_ATTR_OPERATION_REDUCTION_YDESC = 1611,
	CUDNN_ATTR_OPERATION_REDUCTION_DESC = 1612,
	CUDNN_ATTR_OPERATION_RESHAPE_XDESC = 2200,
	CUDNN_ATTR_OPERATION_RESHAPE_YDESC = 2201
};

/* The functions used of it; each returns 0 for success unless it returns something else. */
struct cudnn_library {
	size_t version; /* 91900 is 9.19.0 */
	void *handle;   /* of a device, on its stream */
	int (*create)(void **handle);
	int (*destroy)(void *handle);
	int (*set_stream)(void *handle, cudaStream_t stream);
	const char *(*error_string)(int error);
	void (*last_error)(char *message, size_t size);
	int (*create_descriptor)(int type, void **descriptor);
	int (*destroy_descriptor)(void *descriptor);
	int (*finalize)(void *descriptor);
	int (*set_attribute)(void *descriptor, int name, int type, int64_t count,
	                     const void *values);
	int (*get_attribute)(void *descriptor, int name, int type, int64_t wanted, int64_t *count,
	                     void *values);
	int (*execute)(void *handle, void *plan, void *pack);
};

/*
 * The newest cuDNN 9 of this machine, opened at a device's first call: of the
 * system's, and of the packages of every python3 in PATH; or the file that the
 * environment variable CUDNN_LIBRARY names. NULL if there is none, and *why
 * says so in a few words (static memory).
 */
const struct cudnn_library *cudnn_library_get(const struct device *device, const char **why);

/* Its version, 0 if there is none. Opens the library, but makes no handle. */
size_t cudnn_library_version(const struct device *device);

/* "cuDNN 9.19.0", or NULL if there is none; `args` is not read. */
const char *cudnn_library_name(const struct device *device, const void *args);

#endif
