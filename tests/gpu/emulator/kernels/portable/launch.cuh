/* kernels/portable/launch.cuh on a processor: a kernel runs before launch() returns. */
#ifndef KERNELS_PORTABLE_LAUNCH_CUH
#define KERNELS_PORTABLE_LAUNCH_CUH

#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/emulator/emulator.h"

template <typename... Parameters, typename... Arguments>
static enum status launch(struct device *, const char *, void (*kernel)(Parameters...), dim3 grid,
                          int threads, size_t shared, Arguments... arguments)
{
	emulate(grid, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
	return STATUS_OK;
}

#endif
