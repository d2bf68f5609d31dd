#include "tests/rounded.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/kernels_cpu.h"
#include "tests/test.h"

static struct device *host;
static enum operation broken;
static rounded_fault *fault;

void rounded_break(enum operation operation, rounded_fault *how)
{
	broken = operation;
	fault = how;
}

enum status rounded_run(struct device *cpu, const struct kernel *kernel, const void *args)
{
	void *workspace = aligned_alloc(
	        64, ((kernel->workspace ? kernel->workspace(cpu, args) : 0) + 127) / 64 * 64);

	assert_non_null(workspace);
	const enum status status = kernel->run(cpu, args, workspace);
	free(workspace);
	return status;
}

/* A row of any operand's elements as floats or integers, and back. */
static void move_rows(struct device *device, const struct operand *o, float *dense, bool back)
{
	const enum dtype dtype = operand_dtype(o, device);
	const int64_t *n = o->size, *s = o->stride;

	for (int64_t row = 0; row < n[0] * n[1] * n[2]; row++) {
		const int64_t at =
		        row / (n[1] * n[2]) * s[0] + row / n[2] % n[1] * s[1] + row % n[2] * s[2];
		char *there = (char *)operand_data(o) + (size_t)at * dtype_size(dtype);
		float *here = dense + row * n[3];

		if (dtype == DTYPE_I32)
			memcpy(back ? (void *)there : here, back ? (void *)here : there,
			       (size_t)n[3] * sizeof *here);
		else if (back)
			require_ok(device_upload_floats(device, dtype, there, here, (size_t)n[3]));
		else
			require_ok(
			        device_download_floats(device, dtype, here, there, (size_t)n[3]));
	}
}

static const struct kernel *kernel_for(enum operation operation)
{
	const struct kernel *k = cpu_kernels;

	while (k->operation != operation)
		k++;
	return k;
}

static enum status run_rounded(struct device *device, enum operation operation, const void *args)
{
	const struct kernel *kernel = kernel_for(operation);
	union any_args given, dense;
	struct operand_list there, here;
	float *memory[MAX_OPERANDS] = {0};
	enum status status;

	memcpy(&given, args, operation_describes(operation)->args_size);
	dense = given;
	operation_describe(operation, &given, &there);
	operation_describe(operation, &dense, &here);
	for (int i = 0; i < there.count; i++) {
		if (!operand_data(&there.operand[i]))
			continue;
		memory[i] = new_memory((size_t)operand_count(&there.operand[i]) * sizeof(float));
		if (operand_is_read(&there.operand[i]))
			move_rows(device, &there.operand[i], memory[i], false);
		operand_set(&here.operand[i], memory[i]);
	}
	operation_describe(operation, &dense, &here);
	status = fault && operation == broken ? fault(host, kernel, &dense, &here)
	                                      : rounded_run(host, kernel, &dense);
	for (int i = 0; i < there.count; i++) {
		if (operand_data(&there.operand[i]) && operand_is_written(&there.operand[i]))
			move_rows(device, &there.operand[i], memory[i], true);
		free(memory[i]);
	}
	return status;
}

#define X(constant, name)                                                                          \
	static enum status rounded_##name(struct device *device, const void *args,                 \
	                                  void *workspace)                                         \
	{                                                                                          \
		return run_rounded(device, OP_##constant, args);                                   \
	}
OPERATIONS(X)
#undef X

static const struct kernel rounded_kernels[] = {
#define X(constant, name) {OP_##constant, "rounded", NULL, NULL, rounded_##name, false},
        OPERATIONS(X)
#undef X
                {0}};

struct device rounded_device(struct device *cpu, enum dtype activation)
{
	struct device device = *cpu;

	host = cpu;
	device.activation = activation;
	device.kernels = rounded_kernels;
	return device;
}
