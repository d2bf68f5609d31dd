/* The one list of temporal-mixing layers. Each is one file here; adding one is one line below. */
#include <string.h>

#include "layers/layer.h"

/* clang-format off */
#define LAYERS(entry) \
	entry(attention) \
	entry(swa) \
	entry(recurrence) \
	entry(gla) \
	entry(rat) \
	entry(ratplus) \
	entry(linear_attention) \
	entry(retnet) \
	entry(mamba) \
	entry(mamba2) \
	entry(hgrn) \
	entry(hgrn2) \
	entry(delta_net) \
	entry(gated_delta_net) \
	entry(kda) \
	entry(rwkv6) \
	entry(hawk) \
	entry(griffin_attention)
/* clang-format on */

#define DECLARE(name) extern const struct layer_class name##_layer;
#define ADDRESS(name) &name##_layer,

LAYERS(DECLARE)

const struct layer_class *const layer_classes[] = {LAYERS(ADDRESS) NULL};

const char *const position_words[] = {"none", "rope", NULL};

const struct layer_class *layer_class_find(const char *name)
{
	if (strcmp(name, "retention") == 0) /* RetNet's layer, by the name of its mechanism */
		name = "retnet";
	for (int i = 0; layer_classes[i]; i++)
		if (strcmp(layer_classes[i]->name, name) == 0)
			return layer_classes[i];
	return NULL;
}
