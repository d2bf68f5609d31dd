#include "bench/harness/about.h"

#include <string.h>

#include "version.h" /* written by make */

#ifdef __clang__
static const char compiler[] = __VERSION__;
#else
static const char compiler[] = "gcc " __VERSION__;
#endif

#ifdef WITH_CUDA
static const char cuda[] = "with CUDA";
#else
static const char cuda[] = "without CUDA";
#endif

void about_print(FILE *file, const char *program)
{
	fprintf(file, "%s %s\ncommit %s%s\n%s, %s\n", program, VERSION, GIT_SHA,
	        GIT_DIRTY ? ", with changes that are not committed" : "", compiler, cuda);
}

bool about_asked(int argc, char **argv, const char *program)
{
	const bool asked = argc == 2 && strcmp(argv[1], "--version") == 0;

	if (asked)
		about_print(stdout, program);
	return asked;
}
