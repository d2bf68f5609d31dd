/* What the attention of other libraries cannot do. */
#ifndef BASELINES_PLAIN_ATTENTION_H
#define BASELINES_PLAIN_ATTENTION_H

#include "kernels/kernels.h"

/* NULL, or what they have no kernel for. */
static inline const char *check_plain_attention(const struct attention_args *a)
{
	if (a->mask == MASK_CHUNK || a->own_score || a->gate.data || a->out_ungated.data)
		return "no chunk mask, own token or gate";
	if (!is_known_mask(a->mask)) /* the dilated one, too */
		return "an unknown mask";
	return a->q_heads != a->n_heads ? "no shared queries" : NULL;
}

#endif
