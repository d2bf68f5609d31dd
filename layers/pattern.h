/*
 * Patterns of layers, as --pattern has them: items separated by commas, each the name of a layer
 * with its arguments, "rat(chunk=16,groups=2),swa(window=1024)", or with the value of its first
 * argument alone, "rat:16"; or the name of a pattern, "jamba", "griffin". What an item does not say
 * has the default of the layer's class.
 */
#ifndef LAYERS_PATTERN_H
#define LAYERS_PATTERN_H

#include "layers/layer.h"

enum { MAX_ITEMS = 32, MAX_ARGUMENTS = 8 };

struct pattern_item {
	const struct layer_class *class;
	bool given[MAX_ARGUMENTS]; /* as class->arguments */
	int64_t value[MAX_ARGUMENTS];
};

struct pattern {
	int count;
	struct pattern_item item[MAX_ITEMS];
};

/* STATUS_INVALID with one line that says what is wrong and what is allowed. */
enum status pattern_parse(struct pattern *pattern, const char *text);

/* Index of the argument called `name` among the class's, or -1. */
int argument_find(const struct layer_class *class, const char *name);
/* Where a layer has its value. */
int64_t *argument_of(struct layer_config *config, const struct layer_argument *argument);
/* STATUS_INVALID unless the value is one that the argument allows. */
enum status argument_check(const struct layer_class *class, const struct layer_argument *argument,
                           int64_t value);

/* Appends "rat(chunk=16,groups=2,heads=16,position=rope)" to a text that has room for `size`;
 * automatic values are left out. */
void pattern_append(char *text, size_t size, const struct layer_config *config);

#endif
