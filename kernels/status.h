/*
 * Error handling for the whole project: a function that can fail returns an
 * enum status and leaves one message; only main() exits.
 */
#ifndef KERNELS_STATUS_H
#define KERNELS_STATUS_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The distinct outcomes a case can have; they stay distinct in the CSV. */
enum status {
	STATUS_OK,
	STATUS_NOISY,       /* measured, but not to the precision asked for */
	STATUS_OOM,         /* would need more memory than there is; the message says how much */
	STATUS_UNSUPPORTED, /* a combination that makes no sense or has no kernel */
	STATUS_SKIPPED,     /* predicted to exceed the time allowed for a case */
	STATUS_MISMATCH,    /* ran, but disagrees with the reference */
	STATUS_INVALID,     /* an argument is wrong */
	STATUS_CUDA,        /* the device or its driver reported an error */
	STATUS_IO,          /* a file could not be read or written */
	STATUS_COUNT
};

/* The name written to the CSV: "ok", "oom", "unsupported", ... */
const char *status_name(enum status status);

/* Whether a case with this status has been timed and verified. */
static inline bool status_measured(enum status status)
{
	return status == STATUS_OK || status == STATUS_NOISY;
}

/* Records a printf-style message for status_message() and returns `status`. */
enum status status_set(enum status status, const char *format, ...)
        __attribute__((format(printf, 2, 3)));

/* The message left by the last status_set() of this thread; "" if none. */
const char *status_message(void);

/* The first step of a function that fails is its end, and its status the function's. */
#define TRY(step)                                                                                  \
	do {                                                                                       \
		const enum status try_status = (step);                                             \
		if (try_status != STATUS_OK)                                                       \
			return try_status;                                                         \
	} while (0)

#ifdef __cplusplus
}
#endif

#endif
