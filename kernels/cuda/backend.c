/*
 * The CUDA backend: a GPU and one stream for each device that is open. Kernels see it through
 * kernels/cuda/cuda_backend.h alone.
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
#include <strings.h>

#include "kernels/cuda/bandwidth.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/nvml.h"
#include "kernels/hopper/kernels.h"
#include "kernels/portable/kernels.h"

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
	unsigned long long found; /* not finite */
};

/* Memory that somebody keeps with the device. */
struct slot {
	struct slot *next;
	void (*release)(void *memory);
	max_align_t memory[];
};

/* What device->state points to, of both handles of a GPU. */
struct cuda_state {
	int index;
	bool is_hopper; /* runs sm_90a code */
	struct cudaDeviceProp properties;
	cudaStream_t stream; /* that work is submitted to: own_stream, or a caller's */
	cudaStream_t own_stream;
	cudaEvent_t start, stop, staged[N_STAGING];
	char *staging[N_STAGING];     /* pinned */
	struct shared_memory *shared; /* pinned */
	int ticket;                   /* value of shared->gate that lets the last held work run */
	void *flush_buffer;
	size_t flush_bytes;
	struct clock_start *clock_starts; /* of each multiprocessor, on the device */
	struct nvml *nvml;
	struct nvml_reading reading; /* while the last timed work ran */
	struct kernel *kernels;
	const struct kernel *const *more; /* as open() was given them */
	struct slot *slots;               /* the newest first */
	struct device reference;
};

static struct cuda_state *state_of(const struct device *device)
{
	return device->state;
}

enum status cuda_status(cudaError_t error, const char *operation, const char *file, int line)
{
	if (error == cudaSuccess)
		return STATUS_OK;
	cudaGetLastError();
	return status_set(error == cudaErrorMemoryAllocation ? STATUS_OOM : STATUS_CUDA,
	                  "cuda: %s at %s:%d: %s", operation, file, line,
	                  cudaGetErrorString(error));
}

enum status cuda_activate(const struct device *device)
{
	CUDA_TRY(cudaSetDevice(state_of(device)->index));
	return STATUS_OK;
}

/* At the start of every function of the backend that may fail. */
#define ACTIVATE(device)                                                                           \
	do {                                                                                       \
		enum status activate_ = cuda_activate(device);                                     \
		if (activate_ != STATUS_OK)                                                        \
			return activate_;                                                          \
	} while (0)

cudaStream_t cuda_stream(const struct device *device)
{
	return state_of(device)->stream;
}

int cuda_sm_count(const struct device *device)
{
	return state_of(device)->properties.multiProcessorCount;
}

bool cuda_is_hopper(const struct device *device)
{
	return state_of(device)->is_hopper;
}

size_t cuda_shared_limit(const struct device *device)
{
	return state_of(device)->properties.sharedMemPerBlockOptin;
}

void *cuda_slot(const struct device *device, size_t bytes, void (*release)(void *memory))
{
	struct cuda_state *state = state_of(device);

	for (struct slot *slot = state->slots; slot; slot = slot->next)
		if (slot->release == release)
			return slot->memory;
	struct slot *slot = calloc(1, sizeof *slot + bytes);
	if (!slot)
		return NULL;
	slot->next = state->slots;
	slot->release = release;
	state->slots = slot;
	return slot->memory;
}

static void release_slots(struct cuda_state *state)
{
	while (state->slots) {
		struct slot *slot = state->slots;

		state->slots = slot->next;
		slot->release(slot->memory);
		free(slot);
	}
}

/* sm_90a code has no PTX beside it, which is all that the driver takes under this variable. */
static bool takes_machine_code(void)
{
	const char *forced = getenv("CUDA_FORCE_PTX_JIT");

	return !forced || strcmp(forced, "0") == 0;
}

/* One line for each way in which a machine can lack what is needed; *count: its GPUs. */
static enum status check_machine(int *count)
{
	int driver = 0, runtime = 0;
	cudaError_t error;

	cudaRuntimeGetVersion(&runtime);
	if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
		return status_set(STATUS_CUDA, "cuda: no NVIDIA driver on this machine");
	error = cudaGetDeviceCount(count);
	cudaGetLastError();
	if (error == cudaErrorInsufficientDriver)
		return status_set(
		        STATUS_CUDA, "cuda: the driver supports CUDA %d.%d, this build needs %d.%d",
		        driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
	if (error == cudaErrorNoDevice || (error == cudaSuccess && *count == 0))
		return status_set(STATUS_CUDA, "cuda: no GPU on this machine");
	CUDA_TRY(error);
	return STATUS_OK;
}

/* 32 digits in groups of 8, 4, 4, 4, 12. */
static void format_uuid(char text[48], const cudaUUID_t *uuid)
{
	int length = 0;

	for (int i = 0; i < 16; i++) {
		const bool dash = i == 4 || i == 6 || i == 8 || i == 10;

		length += snprintf(text + length, 48 - (size_t)length, "%s%02x", dash ? "-" : "",
		                   (unsigned char)uuid->bytes[i]);
	}
}

/* "GPU-..." or, of a part of one, "MIG-...". As in CUDA_VISIBLE_DEVICES the beginning will do, if
 * only one has it. */
static enum status find_uuid(const char *which, int count, int *index)
{
	struct cudaDeviceProp properties;
	const char *digits = which + strlen("GPU-");
	char uuid[48];
	int n_found = 0;

	for (int i = 0; i < count; i++) {
		CUDA_TRY(cudaGetDeviceProperties(&properties, i));
		format_uuid(uuid, &properties.uuid);
		if (strncasecmp(uuid, digits, strlen(digits)) != 0)
			continue;
		*index = i;
		n_found++;
	}
	if (n_found == 1)
		return STATUS_OK;
	return status_set(STATUS_INVALID, "cuda: %s GPU has the UUID %s",
	                  n_found ? "more than one" : "no", which);
}

/* The index of the GPU that the user means. */
static enum status find_gpu(const char *which, int count, int *index)
{
	char *end;

	*index = 0;
	if (!which || !*which)
		return STATUS_OK;
	const long number = strtol(which, &end, 10);
	if (*end == '\0' && (number < 0 || number >= count))
		return status_set(STATUS_INVALID, "cuda: no GPU %s, this machine has %d", which,
		                  count);
	if (*end == '\0') {
		*index = (int)number;
		return STATUS_OK;
	}
	if (strncasecmp(which, "GPU-", 4) == 0 || strncasecmp(which, "MIG-", 4) == 0)
		return find_uuid(which, count, index);
	if (cudaDeviceGetByPCIBusId(index, which) == cudaSuccess)
		return STATUS_OK;
	cudaGetLastError();
	return status_set(STATUS_INVALID,
	                  "cuda: no GPU '%s': want an index, a UUID (GPU-...) or a PCI bus id",
	                  which);
}

/* The driver compiles the code for other GPUs than Hopper's, and only what toolkits no newer than
 * itself have made. */
static enum status refuse_code(const struct cudaDeviceProp *properties)
{
	int driver = 0, runtime = 0;

	cudaDriverGetVersion(&driver);
	cudaRuntimeGetVersion(&runtime);
	if (driver < runtime)
		return status_set(STATUS_CUDA,
		                  "cuda: the driver supports CUDA %d.%d, which is too old to "
		                  "compile this build's code of CUDA %d.%d for %s: update it, or "
		                  "build with an older toolkit",
		                  driver / 1000, driver % 1000 / 10, runtime / 1000,
		                  runtime % 1000 / 10, properties->name);
	return status_set(STATUS_CUDA,
	                  "cuda: this build has no code for %s (compute capability %d.%d)",
	                  properties->name, properties->major, properties->minor);
}

/* Whether this build has code for the GPU. */
static enum status check_gpu(const struct cudaDeviceProp *properties)
{
	if (properties->major < 8)
		return status_set(STATUS_CUDA,
		                  "cuda: %s has compute capability %d.%d; 8.0 or newer is needed",
		                  properties->name, properties->major, properties->minor);
	const cudaError_t error = code_is_present();
	if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
	    error == cudaErrorUnsupportedPtxVersion) {
		cudaGetLastError();
		return refuse_code(properties);
	}
	CUDA_TRY(error);
	return STATUS_OK;
}

static enum status create_resources(struct cuda_state *state)
{
	CUDA_TRY(cudaStreamCreateWithFlags(&state->own_stream, cudaStreamNonBlocking));
	state->stream = state->own_stream;
	CUDA_TRY(cudaEventCreate(&state->start));
	CUDA_TRY(cudaEventCreate(&state->stop));
	for (int i = 0; i < N_STAGING; i++) {
		void *memory;

		CUDA_TRY(cudaMallocHost(&memory, STAGING_BYTES));
		state->staging[i] = memory;
		CUDA_TRY(cudaEventCreateWithFlags(&state->staged[i], cudaEventDisableTiming));
		CUDA_TRY(cudaEventRecord(state->staged[i], state->stream));
	}
	void *pinned;
	CUDA_TRY(cudaMallocHost(&pinned, sizeof *state->shared));
	state->shared = memset(pinned, 0, sizeof *state->shared);
	CUDA_TRY(clock_starts_take(state->properties.multiProcessorCount, &state->clock_starts));
	state->flush_bytes = 3 * (size_t)state->properties.l2CacheSize;
	CUDA_TRY(cudaMalloc(&state->flush_buffer, state->flush_bytes));
	CUDA_TRY(cudaMemsetAsync(state->flush_buffer, 0, state->flush_bytes, state->stream));
	return STATUS_OK;
}

/* The kernels for this GPU, those for any, then other people's. */
static enum status join_lists(struct cuda_state *state)
{
	static const struct kernel *const portable[] = {portable_kernels, NULL};
	struct kernel *own = kernels_joined(hopper_kernels, portable);

	if (own)
		state->kernels = kernels_joined(own, state->more);
	free(own);
	return state->kernels ? STATUS_OK
	                      : status_set(STATUS_OOM, "no memory for the list of kernels");
}

static void cuda_close(struct device *device)
{
	struct cuda_state *state = state_of(device);

	cudaSetDevice(state->index);
	if (state->own_stream)
		cudaStreamSynchronize(state->stream);
	release_slots(state);
	nvml_close(state->nvml);
	cudaFree(state->flush_buffer);
	cudaFree(state->clock_starts);
	cudaFreeHost(state->shared);
	for (int i = 0; i < N_STAGING; i++) {
		cudaFreeHost(state->staging[i]);
		if (state->staged[i])
			cudaEventDestroy(state->staged[i]);
	}
	if (state->start)
		cudaEventDestroy(state->start);
	if (state->stop)
		cudaEventDestroy(state->stop);
	if (state->own_stream)
		cudaStreamDestroy(state->own_stream);
	cudaGetLastError();
	free(state->kernels);
	free(state);
	free(device);
}

/* Two handles of one GPU, the second its reference's. */
static enum status make_handles(struct device **opened)
{
	struct device *device = calloc(1, sizeof *device);
	struct cuda_state *state = calloc(1, sizeof *state);

	if (!device || !state) {
		free(device);
		free(state);
		return status_set(STATUS_OOM, "no memory for a device");
	}
	*device = (struct device){.backend = &cuda_backend,
	                          .activation = DTYPE_BF16,
	                          .wide = DTYPE_F32,
	                          .state = state,
	                          .reference = &state->reference};
	state->reference = (struct device){.backend = &cuda_backend,
	                                   .activation = DTYPE_F64,
	                                   .wide = DTYPE_F64,
	                                   .kernels = cuda_reference_kernels,
	                                   .state = state};
	*opened = device;
	return STATUS_OK;
}

static enum status open_gpu(struct device *device, const char *which)
{
	struct cuda_state *state = state_of(device);
	char pci_bus_id[32];
	int count = 0;

	enum status status = check_machine(&count);
	if (status == STATUS_OK)
		status = find_gpu(which, count, &state->index);
	if (status != STATUS_OK)
		return status;
	ACTIVATE(device);
	CUDA_TRY(cudaGetDeviceProperties(&state->properties, state->index));
	status = check_gpu(&state->properties);
	if (status == STATUS_OK)
		status = create_resources(state);
	if (status == STATUS_OK)
		status = join_lists(state);
	if (status != STATUS_OK)
		return status;
	device->kernels = state->kernels;
	device->others =
	        state->kernels + kernels_count(hopper_kernels) + kernels_count(portable_kernels);
	if (cudaDeviceGetPCIBusId(pci_bus_id, sizeof pci_bus_id, state->index) == cudaSuccess)
		state->nvml = nvml_open(pci_bus_id);
	state->is_hopper = state->properties.major == 9 && state->properties.minor == 0 &&
	                   takes_machine_code();
	return STATUS_OK;
}

static enum status cuda_open(const char *which, const struct kernel *const *more,
                             struct device **opened)
{
	struct device *device = NULL;
	enum status status = make_handles(&device);

	*opened = NULL;
	if (status != STATUS_OK)
		return status;
	state_of(device)->more = more;
	status = open_gpu(device, which);
	if (status != STATUS_OK) {
		cuda_close(device);
		return status;
	}
	/* Verification calls BLAS from OpenMP's threads, on whose cores its own would get in the
	 * way. */
	openblas_set_num_threads(1);
	*opened = device;
	return STATUS_OK;
}

/* The versions of all libraries that a row may have used. */
static enum status describe_runtime(const struct device *device, char *text, size_t size)
{
	const struct kernel *const *more = state_of(device)->more;
	const size_t blas = cublasLtGetVersion();
	int runtime = 0;

	CUDA_TRY(cudaRuntimeGetVersion(&runtime));
	snprintf(text, size, "CUDA %d.%d; cuBLASLt %zu.%zu.%zu", runtime / 1000,
	         runtime % 1000 / 10, blas / 10000, blas / 100 % 100, blas % 100);
	for (int i = 0; more && more[i]; i++) {
		const struct kernel *end = more[i];

		while (end->run)
			end++;
		const char *library = end->unsupported ? end->unsupported(device, NULL) : NULL;
		const size_t length = strlen(text);

		if (library)
			snprintf(text + length, size - length, "; %s", library);
	}
	return STATUS_OK;
}

static enum status cuda_info(struct device *device, struct device_info *info)
{
	struct cuda_state *state = state_of(device);
	int driver = 0;

	*info = (struct device_info){0};
	ACTIVATE(device);
	snprintf(info->name, sizeof info->name, "%.*s", (int)sizeof info->name - 1,
	         state->properties.name);
	nvml_driver_version(state->nvml, info->driver, sizeof info->driver);
	CUDA_TRY(cudaDriverGetVersion(&driver));
	if (info->driver[0] == '\0')
		snprintf(info->driver, sizeof info->driver, "CUDA %d.%d", driver / 1000,
		         driver % 1000 / 10);
	CUDA_TRY(cudaMemGetInfo(&info->memory_free, &info->memory_total));
	return describe_runtime(device, info->runtime, sizeof info->runtime);
}

static enum status cuda_allocate(struct device *device, size_t bytes, void **memory)
{
	size_t available = 0, total = 0;

	ACTIVATE(device);
	const cudaError_t error = cudaMalloc(memory, bytes);
	if (error != cudaErrorMemoryAllocation)
		return cuda_status(error, "cudaMalloc", __FILE__, __LINE__);
	cudaGetLastError();
	*memory = NULL;
	cudaMemGetInfo(&available, &total);
	return status_set(STATUS_OOM, "cuda: %zu bytes wanted, %zu of %zu free", bytes, available,
	                  total);
}

static void cuda_release(struct device *device, void *memory)
{
	cudaSetDevice(state_of(device)->index);
	cudaFree(memory);
}

static size_t piece(size_t done, size_t bytes)
{
	return bytes - done < STAGING_BYTES ? bytes - done : (size_t)STAGING_BYTES;
}

static enum status cuda_upload(struct device *device, void *to, const void *host, size_t bytes)
{
	struct cuda_state *state = state_of(device);
	int slot = 0;

	ACTIVATE(device);
	for (size_t done = 0; done < bytes; done += STAGING_BYTES, slot ^= 1) {
		const size_t count = piece(done, bytes);

		CUDA_TRY(cudaEventSynchronize(state->staged[slot]));
		memcpy(state->staging[slot], (const char *)host + done, count);
		CUDA_TRY(cudaMemcpyAsync((char *)to + done, state->staging[slot], count,
		                         cudaMemcpyHostToDevice, state->stream));
		CUDA_TRY(cudaEventRecord(state->staged[slot], state->stream));
	}
	return STATUS_OK;
}

static enum status stage_download(struct cuda_state *state, int slot, const void *from,
                                  size_t count)
{
	CUDA_TRY(cudaMemcpyAsync(state->staging[slot], from, count, cudaMemcpyDeviceToHost,
	                         state->stream));
	CUDA_TRY(cudaEventRecord(state->staged[slot], state->stream));
	return STATUS_OK;
}

/* The device fills one staging buffer while the host empties the other. */
static enum status cuda_download(struct device *device, void *host, const void *from, size_t bytes)
{
	struct cuda_state *state = state_of(device);
	int slot = 0;

	ACTIVATE(device);
	if (bytes > 0) {
		enum status status = stage_download(state, 0, from, piece(0, bytes));
		if (status != STATUS_OK)
			return status;
	}
	for (size_t done = 0; done < bytes; done += STAGING_BYTES, slot ^= 1) {
		const size_t next = done + STAGING_BYTES;

		if (next < bytes) {
			enum status status = stage_download(
			        state, slot ^ 1, (const char *)from + next, piece(next, bytes));
			if (status != STATUS_OK)
				return status;
		}
		CUDA_TRY(cudaEventSynchronize(state->staged[slot]));
		memcpy((char *)host + done, state->staging[slot], piece(done, bytes));
	}
	return STATUS_OK;
}

static enum status cuda_fill(struct device *device, void *memory, int byte, size_t bytes)
{
	ACTIVATE(device);
	CUDA_TRY(cudaMemsetAsync(memory, byte, bytes, cuda_stream(device)));
	return STATUS_OK;
}

static enum status cuda_synchronize(struct device *device)
{
	ACTIVATE(device);
	CUDA_TRY(cudaStreamSynchronize(cuda_stream(device)));
	CUDA_TRY(cudaGetLastError());
	return STATUS_OK;
}

static enum status cuda_use_stream(struct device *device, void *stream)
{
	state_of(device)->stream = stream;
	return STATUS_OK;
}

/*
 * The stream is held while the work is being submitted, so that the events
 * enclose the device's work and not the host's pauses between launches.
 */
static enum status cuda_stopwatch_start(struct device *device)
{
	struct cuda_state *state = state_of(device);

	ACTIVATE(device);
	state->ticket++;
	CUDA_TRY(submit_hold(device, &state->shared->gate, state->ticket, HOLD_LIMIT_NS));
	CUDA_TRY(submit_clock_start(device, state->clock_starts));
	CUDA_TRY(cudaEventRecord(state->start, state->stream));
	return STATUS_OK;
}

static enum status cuda_stopwatch_stop(struct device *device, double *milliseconds)
{
	struct cuda_state *state = state_of(device);
	float elapsed = 0.0f;

	ACTIVATE(device);
	CUDA_TRY(cudaEventRecord(state->stop, state->stream));
	CUDA_TRY(submit_clock_stop(device, state->clock_starts, CLOCK_NS, &state->shared->clock));
	__atomic_store_n(&state->shared->gate, state->ticket, __ATOMIC_RELEASE);
	nvml_read(state->nvml, &state->reading);
	CUDA_TRY(cudaStreamSynchronize(state->stream));
	CUDA_TRY(cudaGetLastError());
	CUDA_TRY(cudaEventElapsedTime(&elapsed, state->start, state->stop));
	*milliseconds = elapsed;
	return STATUS_OK;
}

static void cuda_conditions(struct device *device, struct conditions *conditions)
{
	const struct cuda_state *state = state_of(device);
	const struct clock_sample *clock = &state->shared->clock;

	*conditions = conditions_unknown();
	if (clock->nanoseconds)
		conditions->clock_mhz = 1e3 * (double)clock->cycles / (double)clock->nanoseconds;
	conditions->throttle = state->reading.throttle;
	conditions->power_w = state->reading.power_w;
}

static enum status cuda_flush_cache(struct device *device)
{
	const struct cuda_state *state = state_of(device);

	ACTIVATE(device);
	CUDA_TRY(submit_read(device, state->flush_buffer, state->flush_bytes));
	return STATUS_OK;
}

static enum status cuda_bandwidth(struct device *device, double *copy_gb_per_s,
                                  double *read_gb_per_s)
{
	ACTIVATE(device);
	return bandwidth_measure(device, copy_gb_per_s, read_gb_per_s);
}

static enum status cuda_normal_floats(struct device *device, enum dtype dtype, void *memory,
                                      int64_t count, float scale, uint64_t seed, uint64_t stream)
{
	ACTIVATE(device);
	CUDA_TRY(submit_normal(device, memory, dtype, count, scale, seed, stream));
	return STATUS_OK;
}

static enum status cuda_add_directions(struct device *device, const struct strided *rows,
                                       const struct directions *directions)
{
	ACTIVATE(device);
	CUDA_TRY(submit_add_directions(device, rows, directions));
	return STATUS_OK;
}

/* Counts in pinned memory, which the device can reach. */
static enum status cuda_count_nonfinite(struct device *device, const struct gather *region,
                                        int64_t *n)
{
	struct cuda_state *state = state_of(device);

	ACTIVATE(device);
	state->shared->found = 0;
	CUDA_TRY(submit_count_nonfinite(device, region, &state->shared->found));
	CUDA_TRY(cudaStreamSynchronize(state->stream));
	*n = (int64_t)state->shared->found;
	return STATUS_OK;
}

static enum status cuda_gather(struct device *device, const struct gather *gather, void *to)
{
	const size_t bytes =
	        gather->list ? (size_t)gather->size[gather->listed] * sizeof *gather->list : 0;
	enum status status = STATUS_OK;
	void *list = NULL;

	if (bytes > 0)
		status = cuda_allocate(device, bytes, &list);
	if (status == STATUS_OK)
		status = cuda_upload(device, list, gather->list, bytes);
	if (status == STATUS_OK)
		status = cuda_status(submit_gather(device, gather, list, to), "gather", __FILE__,
		                     __LINE__);
	/* This waits for the device. */
	cuda_release(device, list);
	return status;
}

static enum status cuda_add(struct device *device, int64_t count, const void *from, void *to)
{
	ACTIVATE(device);
	CUDA_TRY(submit_add(device, count, from, to));
	return STATUS_OK;
}

static void cuda_range_push(struct device *device, const char *name)
{
	(void)device;
	nvtxRangePushA(name);
}

static void cuda_range_pop(struct device *device)
{
	(void)device;
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
        .use_stream = cuda_use_stream,
        .stopwatch_start = cuda_stopwatch_start,
        .stopwatch_stop = cuda_stopwatch_stop,
        .conditions = cuda_conditions,
        .flush_cache = cuda_flush_cache,
        .bandwidth = cuda_bandwidth,
        .normal_floats = cuda_normal_floats,
        .count_nonfinite = cuda_count_nonfinite,
        .gather = cuda_gather,
        .add = cuda_add,
        .add_directions = cuda_add_directions,
        .range_push = cuda_range_push,
        .range_pop = cuda_range_pop,
};
