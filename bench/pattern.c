#include "bench/pattern.h"

#include <stddef.h>
#include <string.h>

#include "layers/layer.h"

static bool has_word(const char *list, const char *word)
{
	size_t length = strlen(word);

	for (; list; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
		if (strcspn(list, ",") == length && strncmp(list, word, length) == 0)
			return true;
	return false;
}

/* The class of the pattern's item that begins at `item`, or NULL. */
static const struct layer_class *item_class(const char *item)
{
	size_t length = strcspn(item, ",:");

	for (int i = 0; layer_classes[i]; i++)
		if (strlen(layer_classes[i]->name) == length &&
		    strncmp(layer_classes[i]->name, item, length) == 0)
			return layer_classes[i];
	return NULL;
}

bool pattern_tunes(const char *pattern, const char *option)
{
	for (const char *item = pattern; item;
	     item = strchr(item, ',') ? strchr(item, ',') + 1 : NULL) {
		const struct layer_class *class = item_class(item);
		const char *tunables = class ? class->tunables : "";

		if (item[strcspn(item, ",:")] == ':') {
			tunables = strchr(tunables, ',');
			tunables = tunables ? tunables + 1 : "";
		}
		if (has_word(tunables, option))
			return true;
	}
	return false;
}
