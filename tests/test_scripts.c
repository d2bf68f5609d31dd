/* The scripts and targets around the programs: sweeps of several programs, what make writes down
 * about a build, and machines that lack something. */
#include "tests/programs.h"

#include <sys/stat.h>
#include <unistd.h>

static char folder[] = "/tmp/test_scripts_XXXXXX";

/* A sweep of two programs; seconds. */
static const char *sweep(int expected, const char *options)
{
	int code;
	const char *output =
	        shell(&code,
	              "BLOCKS='attention rat' bench/latency.sh %s latency.csv --backend cpu "
	              "--preset tiny --pass prefill --seq-len 64 --max-time 0.001 %s",
	              programs_folder(), options);

	if (code != expected)
		fail_msg("'%s': exit code %d:\n%s", options, code, output);
	return output;
}

/* How many latencies of a block a file has. */
static int rows_of(const char *name, const char *block)
{
	scoped_csv struct csv csv;
	char path[96];
	int rows = 0;

	snprintf(path, sizeof path, "%s/%s", folder, name);
	require_ok(csv_read(path, &csv));
	for (int row = 0; row < csv.n_rows; row++)
		rows += strcmp(csv_text(&csv, row, "block"), block) == 0 &&
		        !csv_text(&csv, row, "baseline")[0];
	return rows;
}

TEST(a_sweep_starts_its_file_once)
{
	static const char *const ways[] = {"", "--truncate", "--trunc"};
	char options[160];

	for (size_t i = 0; i < COUNT_OF(ways); i++) {
		snprintf(options, sizeof options, "%s --out %s/rows.csv", ways[i], folder);
		sweep(0, options);
		assert_int_equal(rows_of("rows.csv", "attention"), 2);
		assert_int_equal(rows_of("rows.csv", "rat"), 2);
	}
	snprintf(options, sizeof options, "--resume --out %s/rows.csv", folder);
	assert_non_null(strstr(sweep(0, options), "nothing left to do"));
	assert_int_equal(rows_of("rows.csv", "rat"), 2);
}

TEST(a_sweep_leaves_foreign_files_alone)
{
	char options[160];
	int code;

	shell(NULL, "cp README.md '%s/README.md'", folder);
	snprintf(options, sizeof options, "--out %s/README.md", folder);
	assert_non_null(strstr(sweep(2, options), "no results file"));
	shell(&code, "cmp README.md '%s/README.md'", folder);
	assert_int_equal(code, 0);
}

TEST(a_sweep_explains_itself)
{
	assert_non_null(strstr(sweep(0, "--help"), "--seq-len"));
	assert_non_null(strstr(sweep(2, "--resume --truncate"), "give one"));
	assert_non_null(strstr(sweep(2, "--seq-len 0"), "--seq-len"));
}

/* The rivals of the baseline are not here either. */
TEST(a_sweep_can_be_planned_for_a_gpu_that_is_not_here)
{
	const char *output = sweep(0, "--backend cuda --plan-for h200 --dry-run");

	assert_non_null(strstr(output, "rat,swa prefill T=64"));
}

/* Measuring does not need gnuplot, and pictures of files with blanks in their names do not mind. */
TEST(pictures_are_not_needed_to_measure)
{
	char options[160];
	int code;

	snprintf(options, sizeof options, "--out '%s/a b.csv'", folder);
	assert_non_null(strstr(sweep(0, options), "a b_latency_prefill.png"));
	shell(&code, "cd / && BUILD=%s \"$OLDPWD/plots/draw.sh\" '%s/a b.csv' '%s/p q'",
	      programs_folder(), folder, folder);
	assert_int_equal(code, 0);
	shell(&code,
	      "test -s '%s/p q/a b_latency_prefill.png' -a -s '%s/p q/a b_latency_prefill.svg'",
	      folder, folder);
	assert_int_equal(code, 0);
	/* A PATH with everything but gnuplot, and nobody who could install it. */
	shell(NULL,
	      "mkdir -p %s/bin && for i in $(ls /usr/bin /bin); do ln -sf \"$(command -v $i)\" "
	      "%s/bin/; done; rm -f %s/bin/gnuplot %s/bin/apt-get",
	      folder, folder, folder, folder);
	const char *output = shell(&code, "PATH=%s/bin scripts/bootstrap.sh run", folder);
	assert_int_equal(code, 0);
	assert_non_null(strstr(output, "gnuplot-nox"));
	shell(&code, "PATH=%s/bin scripts/bootstrap.sh plots", folder);
	assert_int_equal(code, 1);
	output = shell(&code, "PATH=%s/bin plots/draw.sh '%s/a b.csv'", folder, folder);
	assert_int_equal(code, 1);
	assert_non_null(strstr(output, "gnuplot is missing"));
}

/* bootstrap.sh asks the compiler that make calls. */
TEST(bootstrap_asks_the_compiler_of_make)
{
	int code;

	shell(NULL,
	      "printf '#!/bin/sh\\necho asked >&2\\nexit 1\\n' > %s/strange; chmod +x %s/strange",
	      folder, folder);
	shell(&code, "PATH=%s/bin CC=%s/strange scripts/bootstrap.sh run", folder, folder);
	assert_int_equal(code, 1);
	shell(&code, "PATH=%s/bin CC='gcc -O1' scripts/bootstrap.sh run", folder);
	assert_int_equal(code, 0);
}

/* A copy of the Makefile in a tree with a source or two; what it writes down. */
static const char *version(const char *where, const char *options)
{
	return shell(NULL,
	             "cd %s/%s && MAKEFLAGS= make -s CUDA=0 MARCH=any SAN= BUILD=build %s "
	             "build/version.h && cat build/version.h",
	             folder, where, options);
}

static void expect_version(const char *where, const char *options, const char *text)
{
	const char *output = version(where, options);

	if (!strstr(output, text))
		fail_msg("'%s' is missing from:\n%s", text, output);
}

TEST(make_writes_down_what_is_built)
{
	char first[1024];

	shell(NULL,
	      "mkdir -p %s/tree/bench %s/tree/kernels %s/tree/layers %s/tree/baselines && cp "
	      "Makefile "
	      "%s/tree && cd %s/tree && echo build/ > .gitignore && echo int i\\; > bench/a.c",
	      folder, folder, folder, folder, folder, folder);
	/* Of no repository. */
	expect_version("tree", "", "GIT_SHA \"unknown\"");
	expect_version("tree", "", "GIT_DIRTY 1");
	expect_version("tree", "", "BUILD_ID \"any dirty:");
	/* Inside somebody else's. */
	shell(NULL,
	      "cd %s && git init -q . && echo tree > .gitignore && git add .gitignore && git -c "
	      "user.name=a -c user.email=b commit -q -m outer",
	      folder);
	expect_version("tree", "", "GIT_SHA \"unknown\"");
	expect_version("tree", "", "GIT_DIRTY 1");
	/* In its own. */
	shell(NULL,
	      "cd %s/tree && git init -q . && git add . && git -c user.name=a -c user.email=b "
	      "commit -q -m inner",
	      folder);
	expect_version("tree", "", "GIT_DIRTY 0\n#define BUILD_ID \"any\"\n");
	expect_version("tree", "SAN=address,undefined", "BUILD_ID \"any address,undefined\"\n");
	expect_version("tree", "OPTIMIZE=-O0", "BUILD_ID \"any flags:");
	/* Rows and pictures are no changes; sources are, and each change is another build. */
	shell(NULL, "cd %s/tree && mkdir -p results runs && touch results/a runs/b", folder);
	expect_version("tree", "", "GIT_DIRTY 0");
	shell(NULL, "cd %s/tree && echo int j\\; > bench/b.c", folder);
	snprintf(first, sizeof first, "%s", version("tree", ""));
	assert_non_null(strstr(first, "GIT_DIRTY 1\n#define BUILD_ID \"any dirty:"));
	assert_string_equal(version("tree", ""), first);
	shell(NULL, "cd %s/tree && echo int k\\; > bench/b.c", folder);
	assert_string_not_equal(version("tree", ""), first);
	shell(NULL, "cd %s/tree && echo int j\\; > bench/b.c", folder);
	assert_string_equal(version("tree", ""), first);
}

/* The GPU of WSL2, and a GPU without a compiler for it. */
TEST(make_finds_gpus)
{
	assert_non_null(
	        strstr(shell(NULL, "env -u CUDA MAKEFLAGS= make help GPU=/dev/dxg NVCC=/bin/true"),
	               "(now 1)"));
	assert_non_null(strstr(
	        shell(NULL, "env -u CUDA MAKEFLAGS= MAKELEVEL= make help GPU=/dev/dxg NVCC="),
	        "no nvcc"));
	assert_null(strstr(shell(NULL, "env -u CUDA MAKEFLAGS= MAKELEVEL= make help GPU= NVCC="),
	                   "no nvcc"));
}

/* A toolkit that knows compilers up to 12, and what is in PATH. */
static const char *host_flags(const char *compilers)
{
	return shell(NULL,
	             "real=$(command -v gcc); rm -rf %s/cxx; mkdir %s/cxx; for i in %s; do printf "
	             "'#!/bin/sh\nexec %%s -U__GNUC__ -D__GNUC__=%%s \"$@\"\n' \"$real\" ${i#*:} "
	             "> %s/cxx/${i%%:*}; chmod +x %s/cxx/${i%%:*}; done; "
	             "PATH=%s/cxx:/bin:/usr/bin NVCC_CCBIN= scripts/nvcc_host.sh "
	             "%s/toolkit/bin/nvcc",
	             folder, folder, compilers, folder, folder, folder, folder);
}

TEST(nvcc_gets_a_compiler_that_it_knows)
{
	shell(NULL,
	      "mkdir -p %s/toolkit/bin %s/toolkit/include/crt && touch %s/toolkit/bin/nvcc && "
	      "printf "
	      "'#if __GNUC__ > 40\\n#error\\n#endif\\n' > %s/toolkit/include/crt/host_config.h",
	      folder, folder, folder, folder);
	assert_string_equal(host_flags("gcc:40"), "");
	assert_string_equal(host_flags("gcc:41 g++-20:41 g++-19:40"), "-ccbin g++-19\n");
	assert_non_null(
	        strstr(host_flags("gcc:41 g++-20:41 g++-19:41 g++-18:41 g++-17:41 g++-16:41 "
	                          "g++-15:41 g++-14:41 g++-13:41 g++-12:41 g++-11:41 g++-10:41 "
	                          "g++-9:41"),
	               "\n-allow-unsupported-compiler\n"));
}

/* What it needs is in it: pictures are data, and nothing is asked of a network. */
TEST(a_report_is_one_page)
{
	int code;

	shell(NULL, "mkdir -p '%s/a run'", folder);
	shell(&code, "BUILD=%s scripts/report.sh '%s/a run'", programs_folder(), folder);
	assert_int_equal(code, 1);
	shell(NULL,
	      "BLOCKS='attention rat' bench/latency.sh %s latency.csv --backend cpu --preset tiny "
	      "--pass prefill --max-time 0.001 --out '%s/a run/latency.csv'",
	      programs_folder(), folder);
	const char *output =
	        shell(&code, "BUILD=%s scripts/report.sh '%s/a run'", programs_folder(), folder);

	assert_int_equal(code, 0);
	assert_non_null(strstr(output, "a run/report.html"));
	assert_int_equal(
	        atoi(shell(NULL, "grep -c '<img[^>]*data:image/svg' '%s/a run/report.html'",
	                   folder)) > 0,
	        system("command -v gnuplot >/dev/null") == 0);
	assert_string_equal(
	        shell(NULL,
	              "grep -ciE 'https?:|<script|<link|url\\(' '%s/a run/report.html' || true",
	              folder),
	        "0\n");
	assert_string_equal(shell(NULL, "grep -c '</html>' '%s/a run/report.html'", folder), "1\n");
	shell(&code, "scripts/report.sh");
	assert_int_equal(code, 2);
}

/* The exit code of scripts/new-block.sh in a copy of what it changes. */
static int new_block(const char *arguments)
{
	int code;

	shell(&code,
	      "mkdir -p %s/block/scripts %s/block/layers %s/block/bench && cd %s/block && "
	      "root=$OLDPWD && cp -n $root/scripts/new-block.sh scripts && "
	      "cp -n $root/.clang-format $root/Makefile . && cp -n $root/layers/*.[ch] layers && "
	      "cp -n $root/bench/compare.sh bench && scripts/new-block.sh %s",
	      folder, folder, folder, folder, arguments);
	return code;
}

static int lines_with(const char *pattern, const char *file)
{
	return atoi(shell(NULL, "grep -cE '%s' %s/block/%s || true", pattern, folder, file));
}

TEST(a_new_block_is_entered_where_blocks_are_listed)
{
	assert_int_equal(new_block("my_net2 'a first try'"), 0);
	assert_int_equal(lines_with("entry.my_net2.$", "layers/registry.c"), 1);
	assert_int_equal(lines_with("^FAMILY := .* my_net2$", "Makefile"), 1);
	assert_int_equal(lines_with("^PATTERNS=.* my_net2}$", "bench/compare.sh"), 1);
	assert_int_equal(lines_with("summary = \"a first try\"", "layers/my_net2.c"), 1);
	shell(NULL,
	      "cd %s/block && gcc -std=c11 -Wall -Wextra -Werror -fsyntax-only -I. -I$OLDPWD "
	      "layers/my_net2.c layers/registry.c",
	      folder);
	assert_int_equal(new_block("my_net2"), 1);
	assert_int_equal(new_block("rat"), 1);
	assert_int_equal(new_block(""), 2);
	assert_int_equal(new_block("2nets"), 2);
	assert_int_equal(new_block("net 'a \"first\" try'"), 2);
	assert_int_equal(lines_with("entry", "layers/registry.c"),
	                 atoi(shell(NULL, "grep -cE 'entry' layers/registry.c")) + 1);
}

static int set_up(void **state)
{
	return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void **state)
{
	shell(NULL, "rm -rf %s plots/out/'a b_'*", folder);
	return 0;
}

FIXTURE(set_up, tear_down, NULL)
