/* What the programs that measure stacks of layers share: what their options mean, and what their
 * rows say of a stack. */
#ifndef BENCH_STACK_CASE_H
#define BENCH_STACK_CASE_H

#include "bench/harness/case.h"
#include "bench/harness/driver.h"
#include "layers/stack.h"

/* The options that set arguments of layers: of every such program's axes. */
#define ARGUMENT_AXES "chunk,window,groups,heads,kv-heads,position"

/* STATUS_INVALID for patterns that the program does not measure, or an option that two layers
 * of a pattern would understand differently. Says which options mean nothing to any pattern. */
enum status stack_case_check(const struct driver *driver, const struct options *options);

/* The stack of a case that has been configured. */
struct stack_options stack_case_options(const struct bench_case *c);
/* The same before: the options' arguments go to the layers that do not say them. */
struct stack_options stack_case_given(const struct bench_case *c);

/* Fills in the columns of a stack, whose sequences have c->seq_len tokens. possible: it could be
 * configured. */
void stack_case_describe(const struct stack *stack, bool possible, struct bench_case *c);

/* Every layer with its arguments, for --help and --list. */
void stack_case_help(FILE *file);

#endif
