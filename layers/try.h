/* The first step of a function that fails is its end, and its status the function's. */
#ifndef LAYERS_TRY_H
#define LAYERS_TRY_H

#include "kernels/status.h"

#define TRY(step)                                                                                  \
	do {                                                                                       \
		const enum status try_status = (step);                                             \
		if (try_status != STATUS_OK)                                                       \
			return try_status;                                                         \
	} while (0)

#endif
