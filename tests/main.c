/* main() of the test programs that have none of their own: all tests, or those of a name, which may
 * have a * in it. */
#include "tests/test.h"

int main(int argc, char **argv)
{
	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	return tests_run();
}
