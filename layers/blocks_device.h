/* What the parts of libblocks share (layers/blocks.h). */
#ifndef LAYERS_BLOCKS_DEVICE_H
#define LAYERS_BLOCKS_DEVICE_H

#include "kernels/kernels.h"
#include "layers/blocks.h"

struct blocks_device {
	struct device *device; /* that works: the opened one, or its reference */
	struct device *opened;
	struct provider_choice choice;
	void *workspace; /* of operations, which run one after another */
	size_t workspace_bytes;
};

enum blocks_status blocks_status_of(enum status status);

/* The end of a public function. */
#define TRY_BLOCKS(step)                                                                           \
	do {                                                                                       \
		const enum status try_status = (step);                                             \
		if (try_status != STATUS_OK)                                                       \
			return blocks_status_of(try_status);                                       \
	} while (0)

/* Copies the `bytes` of a struct that begin with a size to one that its caller gave, as far as that
 * goes. */
void blocks_fill(void *to, const void *from, size_t bytes);

#endif
