/*
 * cuBLASLt's functions under their own names, each of which calls that of the library, opened when
 * the first is called. So a build with CUDA runs on a machine without it, and on a GPU without
 * cuBLASLt products are slow (kernels/cuda/gemm.c).
 */
#define _GNU_SOURCE
#include <cublasLt.h>
#include <dlfcn.h>
#include <pthread.h>

/* Those that return a status: name, parameters, arguments. */
/* clang-format off */
#define FUNCTIONS(X)                                                                               \
	X(cublasLtCreate, (cublasLtHandle_t *handle), (handle))                                    \
	X(cublasLtDestroy, (cublasLtHandle_t handle), (handle))                                    \
	X(cublasLtMatmulDescCreate,                                                                \
	  (cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale),         \
	  (desc, compute, scale))                                                                  \
	X(cublasLtMatmulDescDestroy, (cublasLtMatmulDesc_t desc), (desc))                          \
	X(cublasLtMatmulDescSetAttribute,                                                          \
	  (cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,                    \
	   const void *value, size_t size),                                                        \
	  (desc, attribute, value, size))                                                          \
	X(cublasLtMatrixLayoutCreate,                                                              \
	  (cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t columns,     \
	   int64_t leading),                                                                       \
	  (layout, type, rows, columns, leading))                                                  \
	X(cublasLtMatrixLayoutDestroy, (cublasLtMatrixLayout_t layout), (layout))                  \
	X(cublasLtMatrixLayoutSetAttribute,                                                        \
	  (cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute,               \
	   const void *value, size_t size),                                                        \
	  (layout, attribute, value, size))                                                        \
	X(cublasLtMatmulPreferenceCreate, (cublasLtMatmulPreference_t *preference), (preference))  \
	X(cublasLtMatmulPreferenceDestroy, (cublasLtMatmulPreference_t preference), (preference))  \
	X(cublasLtMatmulPreferenceSetAttribute,                                                    \
	  (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,  \
	   const void *value, size_t size),                                                        \
	  (preference, attribute, value, size))                                                    \
	X(cublasLtMatmulAlgoGetHeuristic,                                                          \
	  (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,           \
	   cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,           \
	   cublasLtMatmulPreference_t preference, int most,                                        \
	   cublasLtMatmulHeuristicResult_t *results, int *count),                                  \
	  (handle, desc, a, b, c, d, preference, most, results, count))                            \
	X(cublasLtMatmul,                                                                          \
	  (cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *a,   \
	   cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,        \
	   const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,              \
	   cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algorithm,                 \
	   void *workspace, size_t bytes, cudaStream_t stream),                                    \
	  (handle, desc, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,          \
	   algorithm, workspace, bytes, stream))
/* clang-format on */

/* The library's own. */
static struct {
#define X(name, parameters, arguments) __typeof__(name) *name;
	FUNCTIONS(X)
#undef X
	__typeof__(cublasLtGetVersion) *version;
	__typeof__(cublasLtGetStatusString) *status_string;
} library;

#define TEXT_OF(number)      #number
#define LIBRARY_NAME(number) "libcublasLt.so." TEXT_OF(number)

/* A pointer to a function is copied as bytes: C has no conversion from one to an object. */
#define LOOK_UP(object, name, place)                                                               \
	do {                                                                                       \
		void *found = dlsym(object, #name);                                                \
                                                                                                   \
		__builtin_memcpy(&(place), &found, sizeof found);                                  \
	} while (0)

static void open_library(void)
{
	void *object = dlopen(LIBRARY_NAME(CUBLAS_VER_MAJOR), RTLD_NOW | RTLD_LOCAL);

	if (!object)
		return;
#define X(name, parameters, arguments) LOOK_UP(object, name, library.name);
	FUNCTIONS(X)
#undef X
	LOOK_UP(object, cublasLtGetVersion, library.version);
	LOOK_UP(object, cublasLtGetStatusString, library.status_string);
}

static void require_library(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, open_library);
}

#define X(name, parameters, arguments)                                                             \
	cublasStatus_t name parameters                                                             \
	{                                                                                          \
		require_library();                                                                 \
		return library.name ? library.name arguments : CUBLAS_STATUS_NOT_INITIALIZED;      \
	}
FUNCTIONS(X)
#undef X

size_t cublasLtGetVersion(void)
{
	require_library();
	return library.version ? library.version() : 0;
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
	require_library();
	return library.status_string ? library.status_string(status)
	                             : LIBRARY_NAME(CUBLAS_VER_MAJOR) " is not here";
}
