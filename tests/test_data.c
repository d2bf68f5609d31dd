/*
 * What the kinds of data are like: sinks draw every query, peaked scores have heavy tails and
 * maxima that grow late from either end; of single operations, and of layers behind their norm,
 * projection and rotation.
 */
#include "tests/stacks.h"

#include "kernels/check.h"
#include "kernels/data.h"
#include "kernels/problem.h"

enum { SEQ_LEN = 2048, D = 64, N_QUERIES = 64 };

/* Queries and keys of one head, [SEQ_LEN, D] both. */
struct pair {
	void *memory;
	const float *q, *k;
};

static struct pair draw(enum data data)
{
	static const struct operation_form causal = {"attention_forward", .mask = MASK_CAUSAL};
	const struct problem_form form = {.variant = &causal,
	                                  .sizes = {.batch = 1,
	                                            .seq_len = SEQ_LEN,
	                                            .n_heads = 1,
	                                            .groups = 1,
	                                            .kv_heads = 1,
	                                            .d_head = D},
	                                  .seed = 7,
	                                  .data = data};
	struct device *device;
	struct problem problem;
	struct pair pair;

	assert_int_equal(cpu_backend.open("", NULL, &device), STATUS_OK);
	problem_plan(&problem, device, OP_ATTENTION, &form, NULL);
	assert_int_equal(device_allocate(device, problem.bytes, &pair.memory), STATUS_OK);
	problem_plan(&problem, device, OP_ATTENTION, &form, pair.memory);
	assert_int_equal(problem_fill(&problem, false), STATUS_OK);
	pair.q = problem.args.attention.q.data;
	pair.k = problem.args.attention.k.data;
	device_close(device);
	return pair;
}

static float score(const struct pair *pair, int query, int key)
{
	float sum = 0;

	for (int i = 0; i < D; i++)
		sum += pair->q[query * D + i] * pair->k[key * D + i];
	return sum / sqrtf(D);
}

/* The share of its weight that a query gives to keys first ... last-1. */
static double weight(const struct pair *pair, int query, int first, int last)
{
	double part = 0, all = 0;

	for (int key = 0; key <= query; key++) {
		const double power = exp((double)score(pair, query, key));

		all += power;
		part += key >= first && key < last ? power : 0;
	}
	return part / all;
}

static int query_number(int i)
{
	return SEQ_LEN - 1 - i * (SEQ_LEN / 2 / N_QUERIES);
}

static double mean_weight_of_first_tokens(enum data data)
{
	struct pair pair = draw(data);
	double sum = 0;

	for (int i = 0; i < N_QUERIES; i++)
		sum += weight(&pair, query_number(i), 0, SINK_TOKENS);
	free(pair.memory);
	return sum / N_QUERIES;
}

TEST(sinks_draw_every_query)
{
	assert_true(mean_weight_of_first_tokens(DATA_SINKS) > 0.7);
	assert_true(mean_weight_of_first_tokens(DATA_NORMAL) < 0.02);
	assert_true(mean_weight_of_first_tokens(DATA_SMALL) < 0.02);
}

/* The mean over queries of the weight of the heaviest key. */
static double mean_heaviest(enum data data)
{
	struct pair pair = draw(data);
	double sum = 0;

	for (int i = 0; i < N_QUERIES; i++) {
		double heaviest = 0;

		for (int key = 0; key <= query_number(i); key += SEQ_LEN / 8)
			heaviest = fmax(heaviest,
			                weight(&pair, query_number(i), key, key + SEQ_LEN / 8));
		sum += heaviest;
	}
	free(pair.memory);
	return sum / N_QUERIES;
}

TEST(peaked_scores_have_few_heavy_keys)
{
	/* The heaviest of eight parts of the keys has nearly all, normally an eighth and a bit. */
	assert_true(mean_heaviest(DATA_PEAKED) > 0.7);
	assert_true(mean_heaviest(DATA_NORMAL) < 0.3);
}

/* How far a softmax that walks along the keys of a query, from the first or the last one, has to
 * raise the maximum that it had after its first 128. */
static float growth(const struct pair *pair, int query, bool from_last)
{
	float first = -INFINITY, top = -INFINITY;

	for (int i = 0; i <= query; i++) {
		const float s = score(pair, query, from_last ? query - i : i);

		top = fmaxf(top, s);
		first = i < 128 ? top : first;
	}
	return top - first;
}

TEST(peaked_maxima_grow_late_either_way)
{
	struct pair pair = draw(DATA_PEAKED), normal = draw(DATA_NORMAL);

	for (int way = 0; way < 2; way++) {
		float sum = 0, sum_normal = 0;

		for (int i = 0; i < N_QUERIES; i++) {
			sum += growth(&pair, query_number(i), way == 1);
			sum_normal += growth(&normal, query_number(i), way == 1);
		}
		assert_true(sum > 5 * N_QUERIES);
		assert_true(sum_normal < 2 * N_QUERIES);
	}
	free(pair.memory);
	free(normal.memory);
}

TEST(names)
{
	for (int data = 0; data < DATA_COUNT; data++)
		assert_int_equal(data_find(data_name((enum data)data)), data);
	assert_int_equal(data_find("random"), DATA_COUNT);
}

/* ---- stacks ---- */

/* A pass of one layer on the CPU, D = 128 in two heads, whose scores have not been magnified. */
static struct fixture *shaped(const char *pattern, enum data data, enum pass pass)
{
	struct stack_options options = small_options(pattern);

	options.data = data;
	options.d_model = 128;
	options.n_heads = 2;
	options.rope = 1;
	struct fixture *f = fixture_open(cpu, &options, shape_of(pass, 1, SEQ_LEN), 3);
	require_ok(stack_initialize(&f->stack, 3));
	if (pass == PASS_GENERATION)
		require_ok(stack_fill_state(&f->stack, SEQ_LEN - 1, 4));
	fixture_run(f);
	return f;
}

/* The arguments of the run's operation of this kind, which reads what is still there. */
static union any_args arguments_of(struct fixture *f, enum operation operation)
{
	scoped struct kernel_plan *plan = new_memory(sizeof *plan);
	struct context planning = f->ctx;
	struct call_list list = {0};
	union any_args args = {0};

	memset(plan, 0, sizeof *plan);
	planning.plan = plan;
	planning.list = &list;
	require_ok(stack_run(&f->stack, &planning));
	for (int i = 0; i < list.count; i++)
		if (list.calls[i].operation == operation)
			args = list.calls[i].args;
	free(list.calls);
	return args;
}

static const float *row_of(const struct view *view, int64_t t, int64_t h)
{
	return (const float *)view->data + t * view->token + h * view->head;
}

/* The score of a query with each key, all in head `h`. */
static void scores_of(const struct view *q, int64_t query, const struct view *k, int64_t h,
                      int64_t d, int64_t count, double *scores)
{
	for (int64_t key = 0; key < count; key++) {
		scores[key] = 0;
		for (int64_t i = 0; i < d; i++)
			scores[key] += (double)(row_of(q, query, h)[i] * row_of(k, key, h)[i]);
		scores[key] /= sqrt((double)d);
	}
}

/* The mean over a layer's late queries of the weight of the first tokens. */
static double first_weight_of_layer(const char *pattern, enum data data)
{
	scoped_fixture struct fixture *f = shaped(pattern, data, PASS_PREFILL);
	const struct attention_args a = arguments_of(f, OP_ATTENTION).attention;
	scoped double *scores = new_memory(SEQ_LEN * sizeof *scores);
	double sum = 0;

	for (int i = 0; i < N_QUERIES; i++) {
		double all = 0, part = 0;

		scores_of(&a.q, query_number(i), &a.k, i % 2, a.d_head, query_number(i) + 1,
		          scores);
		for (int key = 0; key <= query_number(i); key++)
			all += exp(scores[key]);
		for (int key = 0; key < SINK_TOKENS; key++)
			part += exp(scores[key]);
		sum += part / all;
	}
	return sum / N_QUERIES;
}

TEST(test_sinks_of_a_layer_survive_norm_and_rotation)
{
	assert_true(first_weight_of_layer("attention", DATA_SINKS) > 0.5);
	assert_true(first_weight_of_layer("attention", DATA_NORMAL) < 0.02);
}

static double largest_score_of_layer(enum data data)
{
	scoped_fixture struct fixture *f = shaped("attention", data, PASS_PREFILL);
	const struct attention_args a = arguments_of(f, OP_ATTENTION).attention;
	scoped double *scores = new_memory(SEQ_LEN * sizeof *scores);
	double sum = 0;

	for (int i = 0; i < N_QUERIES; i++) {
		double top = -INFINITY;

		scores_of(&a.q, query_number(i), &a.k, i % 2, a.d_head, query_number(i) + 1,
		          scores);
		for (int key = 0; key <= query_number(i); key++)
			top = fmax(top, scores[key]);
		sum += top;
	}
	return sum / N_QUERIES;
}

TEST(test_peaked_scores_of_a_layer)
{
	assert_true(largest_score_of_layer(DATA_PEAKED) > 12);
	assert_true(largest_score_of_layer(DATA_NORMAL) < 5);
}

TEST(test_caches_have_sinks_too)
{
	scoped_fixture struct fixture *f = shaped("attention", DATA_SINKS, PASS_GENERATION);
	const struct attention_step_args a = arguments_of(f, OP_ATTENTION_STEP).attention_step;
	scoped double *scores = new_memory(SEQ_LEN * sizeof *scores);
	double sinks = 0, others = 0;

	/* The query is rotated to its position by the step itself. */
	scores_of(&a.q, 0, &a.k_cache, 0, a.d_head, SEQ_LEN, scores);
	for (int key = 0; key < SEQ_LEN; key++)
		*(key < SINK_TOKENS ? &sinks : &others) += scores[key];
	assert_true(sinks / SINK_TOKENS > 5);
	assert_true(fabs(others / (SEQ_LEN - SINK_TOKENS)) < 1);
}

TEST(test_zeros_and_small)
{
	scoped_fixture struct fixture *zeros = shaped("rat:16", DATA_ZEROS, PASS_PREFILL);
	scoped_fixture struct fixture *small = shaped("rat:16", DATA_SMALL, PASS_PREFILL);
	scoped float *y = read_floats(zeros, zeros->stack.y, 0, SEQ_LEN * 128);
	scoped float *x = read_floats(small, small->stack.x, 0, SEQ_LEN * 128);
	double squares = 0;

	for (int i = 0; i < SEQ_LEN * 128; i++) {
		assert_true(y[i] == 0);
		squares += (double)(x[i] * x[i]);
	}
	assert_true(fabs(sqrt(squares / (SEQ_LEN * 128)) - 0.02) < 0.001);
}

/* Gradients of small inputs are small: one that is wrong must not pass for cancellation. */
TEST(test_wrong_gradients_are_seen_whatever_the_data)
{
	static const struct operation_form causal = {"attention_forward", .mask = MASK_CAUSAL};
	enum { T = 128, COUNT = T * D, WORKSPACE = 1 << 24 };
	const struct check_options options = {.rows = 1024, .seed = 1};

	for (int data = 0; data < DATA_ZEROS; data++) {
		const struct problem_form form = {.variant = &causal,
		                                  .sizes = {1, T, 1, 1, 1, .d_head = D},
		                                  .seed = 5,
		                                  .data = (enum data)data};
		struct context ctx = {.device = cpu, .workspace_bytes = WORKSPACE};
		struct problem p;

		problem_plan(&p, cpu, OP_ATTENTION_BACKWARD, &form, NULL);
		scoped void *memory = new_memory(p.bytes), *workspace = new_memory(WORKSPACE);
		problem_plan(&p, cpu, OP_ATTENTION_BACKWARD, &form, memory);
		require_ok(problem_fill(&p, false));
		ctx.workspace = workspace;
		require_ok(kernel_run(&ctx, OP_ATTENTION_BACKWARD, &p.args));
		const struct attention_backward_args *a = &p.args.attention_backward;
		float *const gradients[] = {NULL, a->dq.data, a->dk.data, a->dv.data};

		for (size_t wrong = 0; wrong < COUNT_OF(gradients); wrong++) {
			struct check_result result = {0};

			for (int i = 0; wrong && i < COUNT; i++)
				gradients[wrong][i] *= 1.5f;
			require_ok(check_operation(cpu, OP_ATTENTION_BACKWARD, &p.args, &options,
			                           &result));
			assert_true(wrong ? result.share > 1 : result.share <= 1);
			for (int i = 0; wrong && i < COUNT; i++)
				gradients[wrong][i] /= 1.5f;
		}
	}
}
