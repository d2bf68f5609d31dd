/* Command line options: one table gives parsing, presets and --help. */
#ifndef BENCH_HARNESS_OPTIONS_H
#define BENCH_HARNESS_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "bench/harness/driver.h"
#include "kernels/status.h"

enum { MAX_VALUES = 64, MAX_WORDS = 64, MAX_WORD = 256, MAX_PATH = 512 };

struct values {
	int count;
	int64_t value[MAX_VALUES];
};

struct words {
	int count;
	char word[MAX_WORDS][MAX_WORD];
};

/* All options, whichever program uses them. Sizes as in docs/models.md: T, D, H, L, W, G. */
struct options {
	char backend[MAX_WORD]; /* "": the first that works */
	char device[MAX_WORD];  /* "": the backend's first */
	char preset[MAX_WORD];
	struct words pass;    /* layers/pass.h */
	struct words pattern; /* lists of arguments, a(b=1|2), written out */
	struct words position, provider, rival, model, format, data;
	struct values seq_len, chunk, window, groups, heads, kv_heads, d_model;
	int64_t tokens, batch; /* of prefill and training; of generation (0: the largest) */
	int64_t prompt, generate;
	int64_t layers, vocab, ffn; /* 0: the model's */
	int64_t memory;             /* MiB to use at most; 0: all that is free */
	int64_t threads;            /* 0: as OpenMP finds them */
	int64_t samples;            /* 0: until they are precise */
	double min_time, max_time;  /* seconds */
	double precision;           /* of the median, a fraction of it; 0: any */
	double case_seconds;        /* 0: no limit */
	int64_t rows, seed;         /* of verification */
	bool warm, deterministic, nvtx, list, dry_run, resume, truncate; /* flags */
	bool breakdown, apart;
	bool help, version;
	char out[MAX_PATH], run_id[MAX_WORD];
	char plan_for[MAX_WORD]; /* bench/harness/plan_device.h; "": the device that is here */
	char duty[MAX_WORD];     /* burst or sustained */
	char baseline[MAX_WORD]; /* the pattern that ratios compare with; "": attention */
	uint64_t set;            /* which options have a value: one bit per line of the table */
	uint64_t given;          /* those that the command line gave */
};

/*
 * Parses the command line into *options; nothing the user left out has a value
 * yet. STATUS_INVALID with one line naming the option and what is allowed.
 */
enum status options_parse(struct options *options, const struct driver *driver, int argc,
                          char **argv);

/* Whether the command line gave an option, `name` without dashes. */
bool options_given(const struct options *options, const char *name);

/*
 * Fills in what the user left out: the driver's defaults, then those of the
 * preset (options->preset, or `preset` if there is none), then the built-in ones.
 */
enum status options_complete(struct options *options, const struct driver *driver,
                             const char *preset);

/* A list of numbers and ranges, "512,1024" or "512..8192*2" or "512..2048+512", each within
 * [minimum, maximum]. `name` is the option's, for messages. */
enum status values_parse(struct values *values, const char *name, const char *text, int64_t minimum,
                         int64_t maximum);

/* The text of --help, with the defaults of a preset; "": those of every one. */
void options_print_help(FILE *file, const struct driver *driver, const char *preset);
/* The presets, with all that they set. */
void options_print_presets(FILE *file, const struct driver *driver);

#endif
