/*
 * The keys of MASK_DILATED in two lists, each in the order of tokens: those that all later queries
 * see, which are the first `initial` tokens and the last of every `dilation`; and the others, seen
 * from within the window alone. In numbers of either list a query sees an interval whose ends never
 * decrease from one query to the next, as of the other masks, so that kernels walk the lists one
 * after the other and touch no key that nobody sees. Tokens are counted in 32 bits, whose divisions
 * are fast everywhere.
 */
#ifndef KERNELS_KEY_LISTS_H
#define KERNELS_KEY_LISTS_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define KEY_LIST_FUNCTION static inline __host__ __device__
#else
#define KEY_LIST_FUNCTION static inline
#endif

enum key_list { KEYS_KEPT, KEYS_RECENT, N_KEY_LISTS };

/* How many of tokens 0 .. end-1 are on the list. */
KEY_LIST_FUNCTION int64_t keys_before(enum key_list list, int64_t dilation, int64_t initial,
                                      int64_t end)
{
	int64_t kept = end < initial ? end : initial;

	if (dilation > 0 && end > initial)
		kept += (uint32_t)end / (uint32_t)dilation - (uint32_t)initial / (uint32_t)dilation;
	return list == KEYS_KEPT ? kept : end - kept;
}

/* The token of number `index` of the list. There must be one: with a dilation of 1 the second list
 * is empty, with one of 0 the first ends with the initial tokens. */
KEY_LIST_FUNCTION int64_t key_token(enum key_list list, int64_t dilation, int64_t initial,
                                    int64_t index)
{
	const uint32_t step = (uint32_t)dilation;

	if (dilation < 1)
		return list == KEYS_KEPT ? index : initial + index;
	const int64_t skipped = (uint32_t)initial / step; /* of every `dilation`, and initial too */
	if (list == KEYS_KEPT)
		return index < initial ? index : (skipped + index - initial + 1) * dilation - 1;
	const int64_t others = initial - skipped + index; /* that are the last of none */
	return others + (step > 1 ? (uint32_t)others / (step - 1) : 0);
}

/* Whether token t is on the first list. */
KEY_LIST_FUNCTION bool is_kept(int64_t dilation, int64_t initial, int64_t t)
{
	return t < initial || (dilation > 0 && ((uint32_t)t + 1) % (uint32_t)dilation == 0);
}

#endif
