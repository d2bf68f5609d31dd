#include "tests/programs.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

pid_t program_start(int (*program)(int argc, char **argv), int argc, char **argv)
{
	const pid_t child = fork();

	if (child != 0)
		return child;
	const int nowhere = open("/dev/null", O_WRONLY);
	dup2(nowhere, STDOUT_FILENO);
	dup2(nowhere, STDERR_FILENO);
	_exit(program(argc, argv));
}

int program_finish(pid_t child)
{
	int status;

	assert_int_equal(waitpid(child, &status, 0), child);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int split_words(char *line, char **argv, int argc, int most)
{
	for (char *word = strtok(line, " "); word && argc < most; word = strtok(NULL, " "))
		argv[argc++] = word;
	return argc;
}

void read_rows(struct csv *csv, const char *path, int rows)
{
	require_ok(csv_read(path, csv));
	assert_int_equal(csv->n_rows, rows);
}
