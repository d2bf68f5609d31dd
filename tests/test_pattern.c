/* Patterns of layers: what is read, what it is called in full, and what is refused in one line. */
#include "tests/test.h"

#include "layers/pattern.h"
#include "layers/stack.h"

/* A stack of D = 128 with nothing but its pattern, on no device. */
static enum status configure(struct stack *stack, const char *pattern)
{
	const struct stack_options options = {.pattern = pattern,
	                                      .d_model = 128,
	                                      .n_heads = -1,
	                                      .chunk = -1,
	                                      .window = -1,
	                                      .groups = -1,
	                                      .rope = -1};

	return stack_configure(stack, NULL, &options);
}

TEST(spells_patterns_out)
{
	static const char *const pairs[][2] = {
	        {"rat", "rat(chunk=16,groups=2,heads=2,position=rope)"},
	        {"rat:5,swa:0", "rat(chunk=5,groups=2,heads=2,position=rope),"
	                        "swa(window=0,heads=2,position=rope)"},
	        {"rat(position=none,groups=1)", "rat(chunk=16,groups=1,heads=2,position=none)"},
	        {"swa", "swa(window=1024,heads=2,position=rope)"},
	        {"attention:4", "attention(heads=4,position=rope)"},
	        {"attention(heads=4,kv_heads=2)", "attention(heads=4,kv_heads=2,position=rope)"},
	        {"attention(kv_heads=2)", "attention(heads=2,position=rope)"},
	        {"swa(kv_heads=1)", "swa(window=1024,heads=2,kv_heads=1,position=rope)"},
	        {"gla,gla:64", "gla(heads=4),gla(chunk=64,heads=4)"},
	        {"gla(chunk=0,heads=0)", "gla(heads=4)"},
	        {"mamba2", "mamba2(heads=4)"},
	        {"jamba", "mamba,mamba,mamba,mamba,attention(heads=2,position=rope),"
	                  "mamba,mamba,mamba"},
	        {"swa:0,jamba", "swa(window=0,heads=2,position=rope),mamba,mamba,mamba,mamba,"
	                        "attention(heads=2,position=rope),mamba,mamba,mamba"},
	        {"retention", "retnet(heads=2,position=rope)"},
	        {"recurrence,hgrn", "recurrence,hgrn"},
	        {"griffin", "hawk(heads=2),hawk(heads=2),"
	                    "griffin_attention(window=1024,heads=2,position=rope)"},
	        {"rat:5,griffin", "rat(chunk=5,groups=2,heads=2,position=rope),hawk(heads=2),"
	                          "hawk(heads=2),"
	                          "griffin_attention(window=1024,heads=2,position=rope)"},
	};
	scoped struct stack *stack = calloc(1, sizeof *stack);
	char text[256], again[256];

	assert_non_null(stack);
	for (size_t i = 0; i < COUNT_OF(pairs); i++) {
		require_ok(configure(stack, pairs[i][0]));
		stack_pattern(stack, text, sizeof text);
		assert_string_equal(text, pairs[i][1]);
		require_ok(configure(stack, text));
		stack_pattern(stack, again, sizeof again);
		assert_string_equal(again, text);
	}
}

TEST(refuses_what_it_cannot_read)
{
	static const char *const mistakes[][2] = {
	        {"", "no layer ''"},
	        {"rat,", "no layer ''"},
	        {"rat,typo(a=1)", "no layer 'typo' (allowed: attention, swa"},
	        {"rat(typo=1)", "rat has no argument 'typo' (allowed: chunk, groups"},
	        {"hgrn(heads=1)", "hgrn has no argument 'heads' (allowed: none)"},
	        {"hgrn:1", "hgrn takes no number"},
	        {"mamba:1", "mamba takes no number"},
	        {"jamba(heads=1)", "expected a comma at '(heads=1)'"},
	        {"jamba,jamba,jamba,jamba,rat", "more than 32 layers"},
	        {"rat()", "no argument ''"},
	        {"rat(chunk)", "chunk has no value"},
	        {"rat(chunk=1,chunk=1)", "given twice"},
	        {"rat(chunk=)", "a whole number"},
	        {"rat(chunk=x)", "chunk='x'"},
	        {"rat(chunk=-1)", "chunk='-1'"},
	        {"rat:99999999999999999999", "allowed: 1 to"},
	        {"rat(chunk=0)", "rat: chunk=0 (allowed: 1 to"},
	        {"rat(position=alibi)", "allowed: none, rope"},
	        {"rat(chunk=1", "')' is missing"},
	        {"rat(chunk=1)x", "comma at 'x'"},
	        {"rat:1:2", "comma"},
	        {"attention(heads=3)", "attention: heads=3 (allowed: a divisor of D = 128)"},
	        {"attention(heads=128)", "position=none"},
	        {"gla(heads=128)", "gla: heads=128"},
	        {"attention(kv_heads=3)", "attention: kv_heads=3 (allowed: a divisor of 2 heads)"},
	        {"swa(kv_heads=4)", "swa: kv_heads=4 (allowed: a divisor of 2 heads)"},
	        {"rat(kv_heads=1)", "rat has no argument 'kv_heads'"},
	        {"rat(groups=3)", "rat: groups=3 (allowed: a divisor of 2 heads)"},
	};
	scoped struct stack *stack = calloc(1, sizeof *stack);

	assert_non_null(stack);
	for (size_t i = 0; i < COUNT_OF(mistakes); i++) {
		assert_int_equal(configure(stack, mistakes[i][0]), STATUS_INVALID);
		expect_message(mistakes[i][0], mistakes[i][1]);
	}
}
