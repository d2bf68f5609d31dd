/* The list of CPU kernels: one implementation of every operation. */
#include "kernels/cpu/kernels_cpu.h"

#define KERNEL_RUNS(function) function
KERNEL_LIST(cpu_kernels, CPU_KERNELS, {0});
