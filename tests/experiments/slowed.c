/*
 * Makes build/hybrid slower by a known fraction: the program is linked with --wrap=stack_run, so
 * that every timed launch comes here. After the block has run, the processor works on until
 * SLOWDOWN_PERCENT of that run's own time has passed again. A CPU runs a stack before it returns,
 * so the stopwatch covers both.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <time.h>

#include "layers/stack.h"

enum status __real_stack_run(struct stack *stack, struct context *ctx);
enum status __wrap_stack_run(struct stack *stack, struct context *ctx);

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

enum status __wrap_stack_run(struct stack *stack, struct context *ctx)
{
	static double fraction = -1;

	if (fraction < 0) {
		const char *percent = getenv("SLOWDOWN_PERCENT");

		fraction = percent ? strtod(percent, NULL) / 100 : 0;
	}
	const double begin = seconds();
	const enum status status = __real_stack_run(stack, ctx);
	const double end = begin + (1 + fraction) * (seconds() - begin);

	while (fraction > 0 && seconds() < end)
		;
	return status;
}
