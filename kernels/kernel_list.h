/*
 * The list of a provider's kernels is a macro with a line for each, PROVIDER_KERNELS(X):
 *
 *	X(OPERATION, "provider", function, checked, workspace)
 *
 * of a kernel that function() runs. `checked`: function_unsupported() says which arguments it
 * does not take; `rounding`: likewise, and what goes into exponentials it keeps in the type of
 * activations; `any`: it takes all. `workspace`: function_workspace() says how much it wants;
 * `none`: it wants none. These macros make the rest of such a line.
 */
#ifndef KERNELS_KERNEL_LIST_H
#define KERNELS_KERNEL_LIST_H

#include "kernels/kernels.h"

#ifdef __cplusplus
#define KERNEL_LINKAGE extern "C"
#else
#define KERNEL_LINKAGE extern
#endif

/* In the provider's header: the functions, and the list that is made of them. */
#define KERNEL_LIST_DECLARATION(name, KERNELS)                                                     \
	KERNELS(KERNEL_PROTOTYPES) KERNEL_LINKAGE const struct kernel name[]
#define KERNEL_PROTOTYPES(operation, provider, function, check, space)                             \
	KERNEL_LINKAGE enum status function(struct device *device, const void *args,               \
	                                    void *workspace);                                      \
	KERNEL_PROTOTYPE_##check(function) KERNEL_PROTOTYPE_##space(function)
#define KERNEL_PROTOTYPE_checked(function)                                                         \
	KERNEL_LINKAGE const char *function##_unsupported(const struct device *device,             \
	                                                  const void *args);
#define KERNEL_PROTOTYPE_rounding(function) KERNEL_PROTOTYPE_checked(function)
#define KERNEL_PROTOTYPE_any(function)
#define KERNEL_PROTOTYPE_workspace(function)                                                       \
	KERNEL_LINKAGE size_t function##_workspace(const struct device *device, const void *args);
#define KERNEL_PROTOTYPE_none(function)

/* The list; `...` is the entry that ends it, whose run is NULL. KERNEL_RUNS(function): what is
 * called to run a kernel. */
#define KERNEL_LIST(name, KERNELS, ...)                                                            \
	const struct kernel name[] = {KERNELS(KERNEL_ENTRY) __VA_ARGS__}
#define KERNEL_ENTRY(operation, provider, function, check, space)                                  \
	{OP_##operation,                                                                           \
	 provider,                                                                                 \
	 KERNEL_ENTRY_##check(function),                                                           \
	 KERNEL_ENTRY_##space(function),                                                           \
	 KERNEL_RUNS(function),                                                                    \
	 KERNEL_ROUNDS_##check},
#define KERNEL_ENTRY_checked(function)   function##_unsupported
#define KERNEL_ENTRY_rounding(function)  function##_unsupported
#define KERNEL_ENTRY_any(function)       NULL
#define KERNEL_ENTRY_workspace(function) function##_workspace
#define KERNEL_ENTRY_none(function)      NULL
#define KERNEL_ROUNDS_checked            false
#define KERNEL_ROUNDS_rounding           true
#define KERNEL_ROUNDS_any                false

#endif
