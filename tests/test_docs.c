/* What README and docs/ say can be typed and opened: links lead to files, programs know the
 * options, the Makefile has the targets. */
#include "tests/programs.h"

#include <ctype.h>
#include <glob.h>
#include <unistd.h>

static char *read_text(const char *path)
{
	FILE *file = fopen(path, "r");
	char *text = calloc(1, 1 << 18);

	if (!file || !text)
		fail_msg("cannot read %s", path);
	else
		text[fread(text, 1, (1 << 18) - 1, file)] = '\0';
	if (file)
		fclose(file);
	return text;
}

static void for_every_page(void (*look)(const char *path, char *text))
{
	glob_t pages = {0};

	assert_int_equal(glob("README.md", 0, NULL, &pages), 0);
	assert_int_equal(glob("docs/*.md", GLOB_APPEND, NULL, &pages), 0);
	assert_int_equal(glob("docs/kernels/*.md", GLOB_APPEND, NULL, &pages), 0);
	for (size_t i = 0; i < pages.gl_pathc; i++) {
		char *text = read_text(pages.gl_pathv[i]);

		look(pages.gl_pathv[i], text);
		free(text);
	}
	globfree(&pages);
}

/* Whether a page has the heading of "#some-words": as GitHub makes such a name of it. */
static bool has_heading(const char *path, const char *name)
{
	char *text = read_text(path);
	bool found = false;

	for (char *line = text; line && !found; line = strchr(line, '\n')) {
		char made[256];
		size_t n = 0;

		line += *line == '\n';
		if (*line != '#')
			continue;
		for (const char *c = line + strspn(line, "# "); *c && *c != '\n'; c++)
			if (n < sizeof made - 1 &&
			    (isalnum(*c) || *c == ' ' || *c == '-' || *c == '_'))
				made[n++] = *c == ' ' ? '-' : (char)tolower(*c);
		made[n] = '\0';
		found = strcmp(made, name) == 0;
	}
	free(text);
	return found;
}

static void look_at_links(const char *path, char *text)
{
	const char *slash = strrchr(path, '/');

	for (char *at = text; (at = strstr(at, "](")); at++) {
		const size_t length = strcspn(at + 2, ")\n");
		char link[512], target[1024];

		snprintf(link, sizeof link, "%.*s", (int)length, at + 2);
		if (strncmp(link, "http", 4) == 0)
			continue;
		char *heading = strchr(link, '#');
		if (heading)
			*heading++ = '\0';
		snprintf(target, sizeof target, "%.*s%s",
		         slash && link[0] ? (int)(slash - path) + 1 : 0, path,
		         link[0] ? link : path);
		if (access(target, F_OK) != 0)
			fail_msg("%s links to %s, which is not there", path, target);
		if (heading && !has_heading(target, heading))
			fail_msg("%s links to #%s of %s, which has no such heading", path, heading,
			         target);
	}
}

TEST(links_lead_somewhere)
{
	for_every_page(look_at_links);
}

static bool begins(const char *line, const char *word)
{
	return strncmp(line, word, strlen(word)) == 0;
}

/* Programs that know --list. */
static const char *const drivers[] = {"hybrid", "attention",      "recurrence", "rat",
                                      "gla",    "kernel_latency", "throughput"};

static void try_command(const char *path, const char *line)
{
	const char *arguments = line + strlen("build/");
	const size_t length = strcspn(arguments, " ");
	int code;

	/* Of providers that only a GPU has, and of a device that is not planned but asked for. */
	if (strstr(line, "cudnn"))
		return;
	for (size_t i = 0; i < COUNT_OF(drivers); i++) {
		if (strlen(drivers[i]) != length || strncmp(arguments, drivers[i], length) != 0)
			continue;
		const char *output = shell(&code, "%s/%.*s --list", programs_folder(),
		                           (int)strcspn(arguments, "#"), arguments);
		if (code != 0)
			fail_msg("%s: '%s' does not run:\n%s", path, line, output);
	}
}

static void try_target(const char *path, const char *line)
{
	const char *target = line + strlen("make ");
	const size_t length = strcspn(target, " \n");
	char *makefile = read_text("Makefile"), wanted[64];

	snprintf(wanted, sizeof wanted, "\n%.*s:", (int)length, target);
	if (!strchr(wanted, '=') && !strstr(makefile, wanted))
		fail_msg("%s: the Makefile has no target of '%s'", path, line);
	free(makefile);
}

static void look_at_commands(const char *path, char *text)
{
	bool fenced = false;

	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		if (begins(line, "```"))
			fenced = !fenced && begins(line, "```sh");
		else if (fenced && begins(line, "build/"))
			try_command(path, line);
		else if (fenced && begins(line, "make "))
			try_target(path, line);
	}
}

TEST(commands_can_be_typed)
{
	for_every_page(look_at_commands);
}

int main(void)
{
	return tests_run();
}
