/* The C interface for other programs: what is installed compiles and runs, and refuses in words. */
#include "tests/programs.h"

#include "layers/blocks.h"

#ifdef __SANITIZE_ADDRESS__
static const char sanitizers[] = "-fsanitize=address,undefined";
#else
static const char sanitizers[] = "";
#endif

static struct blocks_device *device;

static int open_device(void **state)
{
	return blocks_device_open("cpu", NULL, &device) == BLOCKS_OK ? 0 : -1;
}

static int close_device(void **state)
{
	blocks_device_close(device);
	return 0;
}

FIXTURE(open_device, close_device, NULL)

static void require_blocks(enum blocks_status status)
{
	if (status != BLOCKS_OK)
		fail_msg("%d: %s", (int)status, blocks_message());
}

/* Installs this build in a new folder, whose name it returns. */
static const char *installed(void)
{
	static char folder[] = "/tmp/test_library_XXXXXX";
	static bool done;
	int code;

	if (!done) {
		assert_non_null(mkdtemp(folder));
		const char *said =
		        shell(&code, "scripts/install.sh %s '' %s", programs_folder(), folder);
		if (code != 0)
			fail_msg("%s", said);
	}
	done = true;
	return folder;
}

TEST(example_compiles_and_runs)
{
	const char *folder = installed();
	int code;
	const char *said = shell(
	        &code,
	        "cd %s\n"
	        "sed -n '/^```c$/,/^```$/p' \"$OLDPWD/docs/library.md\" | grep -v '^```' >a.c\n"
	        "flags=$(sed -n 's/^Cflags: //p; s/^Libs: //p' lib/pkgconfig/blocks.pc | "
	        "sed 's|${includedir}|include|; s|${libdir}|lib|')\n"
	        "cc -std=c11 -Wall -Wextra -Werror %s -o a a.c $flags && LD_LIBRARY_PATH=lib ./a",
	        folder, sanitizers);

	if (code != 0)
		fail_msg("%s", said);
	assert_non_null(strstr(said, blocks_version()));
	assert_non_null(strstr(said, "rat(chunk=16,"));
}

/* Nothing but the interface, and all of it. */
TEST(symbols_are_those_of_the_header)
{
	int code;
	const char *said = shell(
	        &code,
	        "cd %s\n"
	        "nm -D --defined-only lib/libblocks.so | sed -n 's/.* T \\(.*\\)@@BLOCKS_.*/\\1/p' "
	        "| sort >shown\n"
	        "grep -v '^ \\*' include/blocks.h | grep -o 'blocks_[a-z_]*(' | tr -d '(' | sort "
	        "-u >said\n"
	        "diff said shown && test $(wc -l <shown) -gt 20\n"
	        "nm -D --defined-only lib/libblocks.so | grep ' T ' | grep -v ' T blocks_' && exit "
	        "1\n"
	        "readelf -d lib/libblocks.so | grep -q 'soname: .libblocks.so.0'",
	        installed());

	if (code != 0)
		fail_msg("%s", said);
	shell(NULL, "rm -rf %s", installed());
}

static void refuse_operation(const char *text, const char *why)
{
	struct blocks_operation *operation;

	assert_int_not_equal(blocks_operation_open(device, text, &operation), BLOCKS_OK);
	assert_null(operation);
	if (!strstr(blocks_message(), why))
		fail_msg("%s: '%s' does not say '%s'", text, blocks_message(), why);
}

TEST(operations_are_refused_in_words)
{
	refuse_operation("attend", "no operation 'attend'");
	refuse_operation("attention(batch=2", "')'");
	refuse_operation("attention(batch)", "'batch' has no value");
	refuse_operation("attention(batch=0)", "batch=0");
	refuse_operation("attention(batch=x)", "batch=x");
	refuse_operation("attention(scale=inf)", "scale=inf");
	refuse_operation("attention(colour=3)", "no 'colour'");
	refuse_operation("attention(mask=round)", "allowed: causal, window");
	refuse_operation("attention(n_heads=4,kv_heads=3)", "divide");
	refuse_operation("rat_scan(chunk=0)", "chunk=0");
	refuse_operation("attention(batch=1000000,seq_len=100000000,n_heads=100000)", "memory");
}

enum { T = 5, D = 3 };

TEST(operands_are_listed_and_missed_by_name)
{
	struct blocks_operation *o;
	struct blocks_operand operand = {.size = sizeof operand};
	float x[T * D] = {0}, out[T * D];
	const int64_t gaps[BLOCKS_DIMS] = {0, 2, 0, 2};
	int count = 0;

	require_blocks(
	        blocks_operation_open(device, "recurrence(seq_len=5,width=3,form=log_decay)", &o));
	while (blocks_operation_operand(o, count, &operand) == BLOCKS_OK)
		count++;
	assert_true(count >= 5);
	require_blocks(blocks_operation_operand(o, 0, &operand));
	assert_string_equal(operand.name, "x");
	assert_int_equal(operand.role, BLOCKS_INPUT);
	assert_int_equal(operand.dtype, BLOCKS_F32);
	assert_int_equal(operand.shape[1], T);
	assert_int_equal(operand.shape[3], D);
	require_blocks(blocks_operation_bind(o, "x", x, NULL));
	require_blocks(blocks_operation_bind(o, "out", out, NULL));
	assert_int_equal(blocks_operation_run(o), BLOCKS_INVALID);
	expect_message("run", "'gate' is missing");
	require_blocks(blocks_operation_bind(o, "gate", x, NULL));
	require_blocks(blocks_operation_run(o));
	require_blocks(blocks_operation_bind(o, "x", x, gaps));
	assert_int_equal(blocks_operation_run(o), BLOCKS_INVALID);
	expect_message("run", "contiguous");
	require_blocks(blocks_operation_bind(o, "x", x, NULL));
	require_blocks(blocks_operation_bind(o, "colour", x, NULL));
	assert_int_equal(blocks_operation_run(o), BLOCKS_INVALID);
	expect_message("run", "'colour'");
	blocks_operation_close(o);
}

/* Every operation can be opened, and lists operands that have names and shapes. */
TEST(every_operation_opens)
{
	int n = 0;

	for (; blocks_operation_name(n); n++) {
		struct blocks_operation *o;
		struct blocks_operand operand = {.size = sizeof operand};
		int count = 0;

		require_blocks(blocks_operation_open(device, blocks_operation_name(n), &o));
		for (; blocks_operation_operand(o, count, &operand) == BLOCKS_OK; count++)
			for (int d = 0; d < BLOCKS_DIMS; d++)
				assert_true(operand.name[0] && operand.shape[d] > 0);
		assert_true(count >= 2);
		assert_int_equal(blocks_operation_run(o), BLOCKS_INVALID);
		blocks_operation_close(o);
	}
	assert_true(n > 40);
}

TEST(layers_refuse_what_they_were_not_opened_for)
{
	struct blocks_layer_options options = {.size = sizeof options,
	                                       .pass = BLOCKS_TRAIN,
	                                       .d_model = 32,
	                                       .batch = 1,
	                                       .seq_len = 4};
	struct blocks_parameter parameter = {.size = sizeof parameter};
	struct blocks_layer *layer;
	float x[4 * 32] = {0}, y[4 * 32];

	assert_int_equal(blocks_layer_open(device, "brick", &options, &layer), BLOCKS_INVALID);
	expect_message("brick", "no layer 'brick'");
	require_blocks(blocks_layer_open(device, "attention", &options, &layer));
	assert_int_equal(blocks_layer_step(layer, 0, x, y), BLOCKS_INVALID);
	assert_int_equal(blocks_layer_set(layer, "q", x, 1), BLOCKS_INVALID);
	expect_message("q", "no parameter is called 'q'");
	require_blocks(blocks_layer_parameter(layer, 0, &parameter));
	assert_int_equal(blocks_layer_set(layer, parameter.name, x, 1), BLOCKS_INVALID);
	blocks_layer_close(layer);
}

/* However large, and nothing can be done with it. */
TEST(descriptions_take_no_memory)
{
	const struct blocks_layer_options options = {
	        .size = sizeof options, .pass = BLOCKS_DESCRIPTION, .d_model = 1 << 20};
	struct blocks_parameter parameter = {.size = sizeof parameter};
	struct blocks_layer *layer;
	float x[1] = {0};

	require_blocks(blocks_layer_open(device, "attention", &options, &layer));
	require_blocks(blocks_layer_parameter(layer, 1, &parameter));
	assert_string_equal(parameter.name, "in_proj.weight");
	assert_int_equal(parameter.shape[1], 1 << 20);
	assert_int_equal(blocks_layer_forward(layer, x, x), BLOCKS_INVALID);
	expect_message("forward", "a description has no forward");
	assert_int_equal(blocks_layer_get(layer, "in_proj.weight", x, 1), BLOCKS_INVALID);
	assert_int_equal(blocks_layer_clear(layer), BLOCKS_INVALID);
	blocks_layer_close(layer);
}

/* A caller that knows fewer members gets those alone. */
TEST(structs_may_grow)
{
	struct blocks_operand operand = {.size = offsetof(struct blocks_operand, shape),
	                                 .optional = 77};
	struct blocks_operation *o;

	require_blocks(blocks_operation_open(device, "gelu(width=3)", &o));
	require_blocks(blocks_operation_operand(o, 0, &operand));
	assert_string_equal(operand.name, "x");
	assert_int_equal(operand.shape[3], 0);
	assert_int_equal(operand.optional, 77);
	blocks_operation_close(o);
}

TEST(streams_are_of_cuda)
{
	const char *last = NULL;

	assert_int_equal(blocks_device_set_stream(device, NULL), BLOCKS_UNSUPPORTED);
	assert_int_equal(blocks_device_set_provider(device, "nobody"), BLOCKS_INVALID);
	for (int i = 0; blocks_backend(i); i++)
		last = blocks_backend(i);
	assert_string_equal(last, "reference");
}
