/*
 * What the kinds of data are like: sinks draw every query, peaked scores have heavy tails and
 * maxima that grow late from either end.
 */
#include "tests/test.h"

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
	const struct problem_form form = {
	        .variant = &causal,
	        .sizes = {.batch = 1, .seq_len = SEQ_LEN, .n_heads = 1, .groups = 1, .d_head = D},
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
