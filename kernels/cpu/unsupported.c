/* What the CPU's kernels do not take: options that nobody has taught them. */
#include "kernels/cpu/kernels_cpu.h"

static const char *check_matrix(enum decay decay, enum rule rule)
{
	return !is_known_decay(decay) ? "an unknown decay"
	       : !is_known_rule(rule) ? "an unknown rule"
	                              : NULL;
}

static const char *check_gate(enum gate_form form)
{
	return is_known_gate(form) ? NULL : "an unknown form of gate";
}

static const char *check_mask(enum mask mask)
{
	return is_mask(mask) ? NULL : "an unknown mask";
}

static const char *check_low_rank(enum low_rank form)
{
	return is_known_low_rank(form) ? NULL : "an unknown gate of low rank";
}

static const char *check_output(enum curve curve, enum norm norm)
{
	return !is_known_curve(curve) ? "an unknown curve"
	       : !is_known_norm(norm) ? "an unknown norm"
	                              : NULL;
}

static const char *check_shift(enum shift form)
{
	return is_known_shift(form) ? NULL : "an unknown form of shift";
}

static const char *check_activation(enum curve curve)
{
	return is_known_activation(curve) ? NULL : "an unknown curve";
}

#define UNSUPPORTED(op, check)                                                                     \
	const char *cpu_##op##_unsupported(const struct device *device, const void *args)          \
	{                                                                                          \
		const struct op##_args *a = args;                                                  \
                                                                                                   \
		return check;                                                                      \
	}

UNSUPPORTED(attention, check_mask(a->mask))
UNSUPPORTED(attention_backward, check_mask(a->forward.mask))
UNSUPPORTED(recurrence, check_gate(a->form))
UNSUPPORTED(recurrence_backward, check_gate(a->forward.form))
UNSUPPORTED(recurrence_step, check_gate(a->form))
UNSUPPORTED(matrix_recurrence, check_matrix(a->decay, a->rule))
UNSUPPORTED(matrix_recurrence_backward, check_matrix(a->forward.decay, a->forward.rule))
UNSUPPORTED(matrix_recurrence_step, check_matrix(a->decay, a->rule))
UNSUPPORTED(decay_gate, check_low_rank(a->form))
UNSUPPORTED(decay_gate_backward, check_low_rank(a->forward.form))
UNSUPPORTED(norm_gate, check_output(a->curve, a->norm))
UNSUPPORTED(norm_gate_backward, check_output(a->forward.curve, a->forward.norm))
UNSUPPORTED(token_shift, check_shift(a->form))
UNSUPPORTED(token_shift_backward, check_shift(a->forward.form))
UNSUPPORTED(token_shift_step, check_shift(a->form))
UNSUPPORTED(short_conv, check_activation(a->curve))
UNSUPPORTED(short_conv_backward, check_activation(a->forward.curve))
UNSUPPORTED(short_conv_step, check_activation(a->curve))
