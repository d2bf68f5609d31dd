#include "kernels/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_message[512];

const char *status_name(enum status status)
{
	static const char *const names[STATUS_COUNT] = {
	        [STATUS_OK] = "ok",           [STATUS_NOISY] = "noisy",
	        [STATUS_OOM] = "oom",         [STATUS_UNSUPPORTED] = "unsupported",
	        [STATUS_SKIPPED] = "skipped", [STATUS_MISMATCH] = "mismatch",
	        [STATUS_INVALID] = "invalid", [STATUS_CUDA] = "cuda",
	        [STATUS_IO] = "io",
	};

	return status < STATUS_COUNT ? names[status] : "unknown";
}

enum status status_set(enum status status, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(last_message, sizeof last_message, format, args);
	va_end(args);
	return status;
}

const char *status_message(void)
{
	return last_message;
}
