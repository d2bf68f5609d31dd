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

const char *programs_folder(void)
{
	static char folder[4096];
	const ssize_t length = readlink("/proc/self/exe", folder, sizeof folder - 1);

	folder[length > 0 ? length : 0] = '\0';
	for (int i = 0; i < 2; i++)
		*strrchr(folder, '/') = '\0';
	return folder;
}

const char *shell(int *code, const char *format, ...)
{
	static char output[1 << 16];
	char line[2048], command[2304];
	va_list list;

	va_start(list, format);
	vsnprintf(line, sizeof line, format, list);
	va_end(list);
	snprintf(command, sizeof command, "{ %s\n} 2>&1", line);
	FILE *pipe = popen(command, "r");
	assert_non_null(pipe);
	output[fread(output, 1, sizeof output - 1, pipe)] = '\0';
	const int status = pclose(pipe);
	if (code)
		*code = WEXITSTATUS(status);
	return output;
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
