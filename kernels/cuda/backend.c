/*
 * The CUDA backend: one device, one stream. Kernels never see it but through
 * kernels/cuda/cuda_backend.h.
 */
#define _GNU_SOURCE
#include "kernels/cuda/cuda_backend.h"

#include <cblas.h>
#include <cublasLt.h>
#include <inttypes.h>
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "baselines/cudnn/sdpa.h"
#include "baselines/flash3/library.h"
#include "kernels/cuda/bandwidth.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/nvml.h"
#include "kernels/cuda/reference.h"

enum {
	N_STAGING = 2,
	STAGING_BYTES = 8 << 20,
	HOLD_LIMIT_NS = 20 * 1000 * 1000,
	CLOCK_NS = 50 * 1000
};

/* Memory that host and device share: to keep time, and for an answer. */
struct shared_memory {
	int gate;
	struct clock_sample clock;
	unsigned long long found;
};

static struct {
	bool is_open;
	bool is_hopper; /* runs sm_90a code */
	struct cudaDeviceProp properties;
	cudaStream_t stream;
	cudaEvent_t start, stop, staged[N_STAGING];
	char *staging[N_STAGING];     /* pinned */
	struct shared_memory *shared; /* pinned */
	int ticket;                   /* value of shared->gate that lets the last held work run */
	void *flush_buffer;
	size_t flush_bytes;
	bool throttled; /* in any sample since the last info() */
} device;

enum status cuda_status(cudaError_t error, const char *operation, const char *file, int line)
{
	if (error == cudaSuccess)
		return STATUS_OK;
	cudaGetLastError();
	return status_set(error == cudaErrorMemoryAllocation ? STATUS_OOM : STATUS_CUDA,
	                  "cuda: %s at %s:%d: %s", operation, file, line,
	                  cudaGetErrorString(error));
}

cudaStream_t cuda_stream(void)
{
	return device.stream;
}

int cuda_sm_count(void)
{
	return device.is_open ? device.properties.multiProcessorCount : 1;
}

bool cuda_is_hopper(void)
{
	return device.is_open && device.is_hopper;
}

size_t cuda_shared_limit(void)
{
	return device.is_open ? device.properties.sharedMemPerBlockOptin : 0;
}

/* sm_90a code has no PTX beside it, which is all that the driver takes under this variable. */
static bool takes_machine_code(void)
{
	const char *forced = getenv("CUDA_FORCE_PTX_JIT");

	return !forced || strcmp(forced, "0") == 0;
}

/* One line for each way in which a machine can lack what is needed. */
static enum status check_device(int index)
{
	int driver = 0, runtime = 0, count = 0;
	cudaError_t error;

	cudaRuntimeGetVersion(&runtime);
	if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
		return status_set(STATUS_CUDA, "cuda: no NVIDIA driver on this machine");
	error = cudaGetDeviceCount(&count);
	cudaGetLastError();
	if (error == cudaErrorInsufficientDriver)
		return status_set(
		        STATUS_CUDA, "cuda: the driver supports CUDA %d.%d, this build needs %d.%d",
		        driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
	if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0))
		return status_set(STATUS_CUDA, "cuda: no GPU on this machine");
	CUDA_TRY(error);
	if (index < 0 || index >= count)
		return status_set(STATUS_INVALID, "cuda: no GPU %d, this machine has %d", index,
		                  count);
	CUDA_TRY(cudaGetDeviceProperties(&device.properties, index));
	if (device.properties.major < 8)
		return status_set(STATUS_CUDA,
		                  "cuda: %s has compute capability %d.%d; 8.0 or newer is needed",
		                  device.properties.name, device.properties.major,
		                  device.properties.minor);
	return STATUS_OK;
}

static enum status create_resources(void)
{
	CUDA_TRY(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking));
	CUDA_TRY(cudaEventCreate(&device.start));
	CUDA_TRY(cudaEventCreate(&device.stop));
	for (int i = 0; i < N_STAGING; i++) {
		void *memory;

		CUDA_TRY(cudaMallocHost(&memory, STAGING_BYTES));
		device.staging[i] = memory;
		CUDA_TRY(cudaEventCreateWithFlags(&device.staged[i], cudaEventDisableTiming));
		CUDA_TRY(cudaEventRecord(device.staged[i], device.stream));
	}
	void *pinned;
	CUDA_TRY(cudaMallocHost(&pinned, sizeof *device.shared));
	device.shared = memset(pinned, 0, sizeof *device.shared);
	device.flush_bytes = 3 * (size_t)device.properties.l2CacheSize;
	CUDA_TRY(cudaMalloc(&device.flush_buffer, device.flush_bytes));
	CUDA_TRY(cudaMemsetAsync(device.flush_buffer, 0, device.flush_bytes, device.stream));
	return STATUS_OK;
}

static void cuda_close(void)
{
	if (device.stream)
		cudaStreamSynchronize(device.stream);
	sdpa_close();
	gemm_close();
	nvml_close();
	cudaFree(device.flush_buffer);
	cudaFreeHost(device.shared);
	for (int i = 0; i < N_STAGING; i++) {
		cudaFreeHost(device.staging[i]);
		if (device.staged[i])
			cudaEventDestroy(device.staged[i]);
	}
	if (device.start)
		cudaEventDestroy(device.start);
	if (device.stop)
		cudaEventDestroy(device.stop);
	if (device.stream)
		cudaStreamDestroy(device.stream);
	cudaGetLastError();
	memset(&device, 0, sizeof device);
}

static enum status cuda_open(int index)
{
	char pci_bus_id[32];
	cudaError_t error;
	enum status status = check_device(index);

	if (status != STATUS_OK)
		return status;
	CUDA_TRY(cudaSetDevice(index));
	error = device_code_present();
	if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
	    error == cudaErrorUnsupportedPtxVersion) {
		cudaGetLastError();
		return status_set(STATUS_CUDA,
		                  "cuda: this build has no code for %s (compute capability %d.%d)",
		                  device.properties.name, device.properties.major,
		                  device.properties.minor);
	}
	CUDA_TRY(error);
	status = create_resources();
	if (status != STATUS_OK) {
		cuda_close();
		return status;
	}
	if (cudaDeviceGetPCIBusId(pci_bus_id, sizeof pci_bus_id, index) == cudaSuccess)
		nvml_open(pci_bus_id);
	device.is_hopper = device.properties.major == 9 && device.properties.minor == 0 &&
	                   takes_machine_code();
	/* Verification calls BLAS from OpenMP's threads, on whose cores its own would get in the
	 * way. */
	openblas_set_num_threads(1);
	device.is_open = true;
	return STATUS_OK;
}

/* The versions of all libraries that a row may have used. */
static enum status describe_runtime(char *text, size_t size)
{
	const size_t blas = cublasLtGetVersion(), cudnn = cudnn_library_version();
	int runtime = 0;
	const char *why;
	const struct flash3_library *flash3 = flash3_library_get(&why);

	CUDA_TRY(cudaRuntimeGetVersion(&runtime));
	int length = snprintf(text, size, "CUDA %d.%d; cuBLASLt %zu.%zu.%zu", runtime / 1000,
	                      runtime % 1000 / 10, blas / 10000, blas / 100 % 100, blas % 100);
	if (cudnn > 0 && length > 0 && (size_t)length < size)
		length += snprintf(text + length, size - (size_t)length, "; cuDNN %zu.%zu.%zu",
		                   cudnn / 10000, cudnn / 100 % 100, cudnn % 100);
	if (flash3 && length > 0 && (size_t)length < size)
		snprintf(text + length, size - (size_t)length, "; FlashAttention-3 %s",
		         flash3->version());
	return STATUS_OK;
}

static enum status cuda_info(struct device_info *info)
{
	const struct clock_sample *clock = &device.shared->clock;
	int driver = 0;

	*info = (struct device_info){0};
	snprintf(info->name, sizeof info->name, "%.*s", (int)sizeof info->name - 1,
	         device.properties.name);
	nvml_driver_version(info->driver, sizeof info->driver);
	CUDA_TRY(cudaDriverGetVersion(&driver));
	if (info->driver[0] == '\0')
		snprintf(info->driver, sizeof info->driver, "CUDA %d.%d", driver / 1000,
		         driver % 1000 / 10);
	CUDA_TRY(cudaMemGetInfo(&info->memory_free, &info->memory_total));
	if (clock->nanoseconds)
		info->sm_clock_mhz = 1e3 * (double)clock->cycles / (double)clock->nanoseconds;
	info->throttled = device.throttled;
	device.throttled = false;
	return describe_runtime(info->runtime, sizeof info->runtime);
}

static enum status cuda_allocate(size_t bytes, void **memory)
{
	const cudaError_t error = cudaMalloc(memory, bytes);
	size_t available = 0, total = 0;

	if (error != cudaErrorMemoryAllocation)
		return cuda_status(error, "cudaMalloc", __FILE__, __LINE__);
	cudaGetLastError();
	*memory = NULL;
	cudaMemGetInfo(&available, &total);
	return status_set(STATUS_OOM, "cuda: %zu bytes wanted, %zu of %zu free", bytes, available,
	                  total);
}

static void cuda_release(void *memory)
{
	cudaFree(memory);
}

static size_t piece(size_t done, size_t bytes)
{
	return bytes - done < STAGING_BYTES ? bytes - done : (size_t)STAGING_BYTES;
}

static enum status cuda_upload(void *to, const void *host, size_t bytes)
{
	int slot = 0;

	for (size_t done = 0; done < bytes; done += STAGING_BYTES, slot ^= 1) {
		const size_t count = piece(done, bytes);

		CUDA_TRY(cudaEventSynchronize(device.staged[slot]));
		memcpy(device.staging[slot], (const char *)host + done, count);
		CUDA_TRY(cudaMemcpyAsync((char *)to + done, device.staging[slot], count,
		                         cudaMemcpyHostToDevice, device.stream));
		CUDA_TRY(cudaEventRecord(device.staged[slot], device.stream));
	}
	return STATUS_OK;
}

static enum status stage_download(int slot, const void *from, size_t count)
{
	CUDA_TRY(cudaMemcpyAsync(device.staging[slot], from, count, cudaMemcpyDeviceToHost,
	                         device.stream));
	CUDA_TRY(cudaEventRecord(device.staged[slot], device.stream));
	return STATUS_OK;
}

/* The device fills one staging buffer while the host empties the other. */
static enum status cuda_download(void *host, const void *from, size_t bytes)
{
	int slot = 0;

	if (bytes > 0) {
		enum status status = stage_download(0, from, piece(0, bytes));
		if (status != STATUS_OK)
			return status;
	}
	for (size_t done = 0; done < bytes; done += STAGING_BYTES, slot ^= 1) {
		const size_t next = done + STAGING_BYTES;

		if (next < bytes) {
			enum status status = stage_download(slot ^ 1, (const char *)from + next,
			                                    piece(next, bytes));
			if (status != STATUS_OK)
				return status;
		}
		CUDA_TRY(cudaEventSynchronize(device.staged[slot]));
		memcpy((char *)host + done, device.staging[slot], piece(done, bytes));
	}
	return STATUS_OK;
}

static enum status cuda_fill(void *memory, int byte, size_t bytes)
{
	CUDA_TRY(cudaMemsetAsync(memory, byte, bytes, device.stream));
	return STATUS_OK;
}

static enum status cuda_synchronize(void)
{
	CUDA_TRY(cudaStreamSynchronize(device.stream));
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

/*
 * The stream is held while the work is being submitted, so that the events
 * enclose the device's work and not the host's pauses between launches.
 */
static enum status cuda_stopwatch_start(void)
{
	device.ticket++;
	CUDA_TRY(device_hold(device.stream, &device.shared->gate, device.ticket, HOLD_LIMIT_NS));
	CUDA_TRY(cudaEventRecord(device.start, device.stream));
	return STATUS_OK;
}

static enum status cuda_stopwatch_stop(double *milliseconds)
{
	float elapsed = 0.0f;

	CUDA_TRY(cudaEventRecord(device.stop, device.stream));
	CUDA_TRY(device_clock(device.stream, CLOCK_NS, &device.shared->clock));
	__atomic_store_n(&device.shared->gate, device.ticket, __ATOMIC_RELEASE);
	device.throttled |= nvml_throttled();
	CUDA_TRY(cudaStreamSynchronize(device.stream));
	CUDA_TRY(cudaGetLastError());
	CUDA_TRY(cudaEventElapsedTime(&elapsed, device.start, device.stop));
	*milliseconds = elapsed;
	return STATUS_OK;
}

static enum status cuda_flush_cache(void)
{
	CUDA_TRY(device_read(device.stream, device.flush_buffer, device.flush_bytes));
	return STATUS_OK;
}

static enum status cuda_normal_floats(enum dtype dtype, void *memory, int64_t count, float scale,
                                      uint64_t seed, uint64_t stream)
{
	CUDA_TRY(device_normal(device.stream, memory, dtype == DTYPE_BF16, count, scale, seed,
	                       stream));
	return STATUS_OK;
}

/* Counts in pinned memory, which the device can reach. */
static enum status cuda_count_nonfinite(enum dtype dtype, const void *memory, int64_t count,
                                        int64_t *n)
{
	device.shared->found = 0;
	CUDA_TRY(device_count_nonfinite(device.stream, memory, dtype == DTYPE_BF16, count,
	                                &device.shared->found));
	CUDA_TRY(cudaStreamSynchronize(device.stream));
	*n = (int64_t)device.shared->found;
	return STATUS_OK;
}

static void cuda_range_push(const char *name)
{
	nvtxRangePushA(name);
}

static void cuda_range_pop(void)
{
	nvtxRangePop();
}

const struct backend cuda_backend = {
        .name = "cuda",
        .activation = DTYPE_BF16,
        .open = cuda_open,
        .close = cuda_close,
        .info = cuda_info,
        .allocate = cuda_allocate,
        .release = cuda_release,
        .upload = cuda_upload,
        .download = cuda_download,
        .fill = cuda_fill,
        .synchronize = cuda_synchronize,
        .stopwatch_start = cuda_stopwatch_start,
        .stopwatch_stop = cuda_stopwatch_stop,
        .flush_cache = cuda_flush_cache,
        .bandwidth = bandwidth_measure,
        .normal_floats = cuda_normal_floats,
        .count_nonfinite = cuda_count_nonfinite,
        .reference = &cuda_reference,
        .range_push = cuda_range_push,
        .range_pop = cuda_range_pop,
        .kernels = cuda_kernels,
};
