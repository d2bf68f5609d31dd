/* The fp64 reference's kernels: one of each operation. */
#include "kernels/reference/reference.h"

/* An option that the reference does not know, or NULL. */
static const char *unknown_option(enum operation operation, const void *args)
{
	const union any_args *a = args;
	bool known = true;

	if (operation == OP_ATTENTION || operation == OP_ATTENTION_BACKWARD)
		known = is_mask(a->attention.mask);
	else if (operation == OP_RECURRENCE || operation == OP_RECURRENCE_BACKWARD)
		known = is_known_gate(a->recurrence.form);
	else if (operation == OP_RECURRENCE_STEP)
		known = is_known_gate(a->recurrence_step.form);
	else if (operation == OP_MATRIX_RECURRENCE || operation == OP_MATRIX_RECURRENCE_BACKWARD)
		known = is_known_decay(a->matrix_recurrence.decay) &&
		        is_known_rule(a->matrix_recurrence.rule);
	else if (operation == OP_MATRIX_RECURRENCE_STEP)
		known = is_known_decay(a->matrix_recurrence_step.decay) &&
		        is_known_rule(a->matrix_recurrence_step.rule);
	else if (operation == OP_DECAY_GATE || operation == OP_DECAY_GATE_BACKWARD)
		known = is_known_low_rank(a->decay_gate.form);
	else if (operation == OP_NORM_GATE || operation == OP_NORM_GATE_BACKWARD)
		known = is_known_curve(a->norm_gate.curve) && is_known_norm(a->norm_gate.norm);
	else if (operation == OP_TOKEN_SHIFT || operation == OP_TOKEN_SHIFT_BACKWARD)
		known = is_known_shift(a->token_shift.form);
	else if (operation == OP_TOKEN_SHIFT_STEP)
		known = is_known_shift(a->token_shift_step.form);
	else if (operation == OP_SHORT_CONV || operation == OP_SHORT_CONV_BACKWARD)
		known = is_known_activation(a->short_conv.curve);
	else if (operation == OP_SHORT_CONV_STEP)
		known = is_known_activation(a->short_conv_step.curve);
	return known ? NULL : "an unknown option";
}

#define X(constant, name)                                                                          \
	static const char *name##_unsupported(const struct device *device, const void *args)       \
	{                                                                                          \
		return unknown_option(OP_##constant, args);                                        \
	}
OPERATIONS(X)
#undef X

#define X(constant, name)                                                                          \
	{OP_##constant, "reference", name##_unsupported, NULL, reference_##name, false},

const struct kernel reference_kernels[] = {OPERATIONS(X){.run = NULL}};
