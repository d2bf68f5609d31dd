/*
 * An option that is new must not run with the mathematics of another: every kernel of every
 * provider, and the reference, refuses what it does not know. Which options there are the
 * descriptions say.
 *
 * test_unknown [BACKEND] (default: $BACKEND, or cpu)
 */
#include "tests/test.h"

#include "baselines/baselines.h"
#include "kernels/operation.h"

static const char *backend_name = "cpu";

/* Options beyond the last of each enum: the next one, unless a form has it, and nonsense. */
static const unsigned unknown[] = {4, 5, 77, 0xffffffff};

/* Arguments of a form, with pointers that are never read. */
static void make_args(enum operation operation, const struct operation_form *form,
                      union any_args *args, struct operand_list *list)
{
	static const struct operation_form plain = {0};
	const struct sizes sizes = {.batch = 2,
	                            .seq_len = 128,
	                            .n_heads = 2,
	                            .groups = 2,
	                            .d_head = 64,
	                            .d_k = 64,
	                            .d_v = 64,
	                            .width = 128,
	                            .d_in = 128,
	                            .d_out = 128,
	                            .rank = 16,
	                            .chunk = 64,
	                            .window = 16,
	                            .vocab = 64};

	memset(args, 0, sizeof *args);
	operation_describes(operation)->size(args, &sizes, form->name ? form : &plain);
	operation_describe(operation, args, list);
	for (int i = 0; i < list->count; i++)
		if (!list->operand[i].optional || list->operand[i].usual)
			operand_set(&list->operand[i], (void *)((uintptr_t)1 << 30));
	operation_describe(operation, args, list);
}

/* Whether a form of the operation has this value for option o. */
static bool is_used(enum operation operation, int o, unsigned value)
{
	for (const struct operation_form *form = operation_forms(operation); form->name; form++) {
		union any_args args;
		struct operand_list list;

		make_args(operation, form, &args, &list);
		if (o < list.n_options && *list.options[o] == value)
			return true;
	}
	return false;
}

static int refused(const struct device *device, const struct kernel *kernel)
{
	const struct operation_form *form = operation_forms(kernel->operation);
	int n = 0;

	do {
		for (int o = 0; o < 2; o++)
			for (size_t i = 0; i < COUNT_OF(unknown); i++) {
				union any_args args;
				struct operand_list list;

				make_args(kernel->operation, form, &args, &list);
				if (o >= list.n_options ||
				    is_used(kernel->operation, o, unknown[i]))
					continue;
				*list.options[o] = unknown[i];
				if (!kernel->unsupported || !kernel->unsupported(device, &args))
					fail_msg("%s from %s takes %u for option %d",
					         operation_name(kernel->operation),
					         kernel->provider, unknown[i], o);
				n++;
			}
	} while (form->name && (++form)->name);
	return n;
}

TEST(test_unknown_options_are_refused)
{
	struct device *device;
	int n = 0;

	require_ok(backend_find(backend_name)->open("", baseline_kernels, &device));
	for (const struct kernel *k = device->kernels; k->run; k++)
		n += refused(device, k);
	for (const struct kernel *k = device->reference->kernels; k->run; k++)
		n += refused(device->reference, k);
	assert_true(n > 100);
	device_close(device);
}

int main(int argc, char **argv)
{
	backend_name = argc > 1 ? argv[1] : getenv("BACKEND") ? getenv("BACKEND") : backend_name;
	return tests_run();
}
