/* The version that a build says it is of. */
#include "tests/test.h"

#include <unistd.h>

#include "bench/harness/about.h"

static char folder[] = "/tmp/test_about_XXXXXX";

static int set_up(void **state)
{
	return mkdtemp(folder) ? 0 : -1;
}

/* Runs a command of the shell with $folder set; fails unless it succeeds. */
static void shell(const char *command)
{
	setenv("folder", folder, 1);
	if (system(command) != 0)
		fail_msg("%s", command);
}

static int tear_down(void **state)
{
	shell("rm -rf \"$folder\"");
	return 0;
}

FIXTURE(set_up, tear_down, NULL)

TEST(says_what_it_is)
{
	char *text = NULL, version[32] = "", first[64];
	size_t length;
	FILE *file = open_memstream(&text, &length), *stated = fopen("VERSION", "r");

	assert_non_null(stated);
	assert_non_null(fgets(version, sizeof version, stated));
	fclose(stated);
	about_print(file, "rat");
	fclose(file);
	snprintf(first, sizeof first, "rat %s", version);
	assert_int_equal(strncmp(text, first, strlen(first)), 0);
	assert_non_null(strstr(text, "\ncommit "));
	assert_non_null(strstr(text, "CUDA\n"));
	free(text);
}

/* What was unpacked inside somebody else's repository is not of its commit. */
TEST(takes_no_other_repository_for_its_own)
{
	shell("unset MAKEFLAGS MAKELEVEL\n"
	      "commit='git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x'\n"
	      "mkdir \"$folder/inside\" && cp Makefile VERSION \"$folder/inside\" &&\n"
	      "cd \"$folder\" && git init -q && $commit && cd inside &&\n"
	      "make -s CUDA=0 BUILD=b b/version.h &&\n"
	      "grep -q 'GIT_SHA \"unknown\"' b/version.h && grep -q 'DIRTY 1' b/version.h");
	shell("unset MAKEFLAGS MAKELEVEL\n"
	      "commit='git -c user.name=a -c user.email=a@b commit -q -m x'\n"
	      "cd \"$folder/inside\" && git init -q && echo b > .gitignore &&\n"
	      "git add .gitignore Makefile VERSION && $commit && make -s CUDA=0 BUILD=b "
	      "b/version.h &&\n"
	      "grep -q \"$(git rev-parse HEAD)\" b/version.h && grep -q 'DIRTY 0' b/version.h");
}
