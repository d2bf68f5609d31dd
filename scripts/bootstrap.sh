#!/usr/bin/env bash
# Makes sure that the tools and libraries of one purpose are installed.
#
#   scripts/bootstrap.sh run     what building and measuring need; plotting, too, if it can be had
#   scripts/bootstrap.sh plots   and plotting
#   scripts/bootstrap.sh test    and the tests
#   scripts/bootstrap.sh check   and the fuzz targets, formatter and linters
#
# Silent when nothing is missing. Otherwise installs it where it may (root on a
# Debian-like system), or says in one line what is missing and exits with 1.
#
# CC in the environment names the compiler (gcc), as for make.
set -u

compiler=${CC:-gcc}

usage()
{
	echo "usage: ${0##*/} run|plots|test|check" >&2
	exit 2
}

has_program()
{
	command -v "$1" >/dev/null 2>&1
}

# shellcheck disable=SC2086 # CC may have arguments
# Whether the C compiler finds header $1 and, unless it is empty, library $2.
has_library()
{
	printf '#include <stdarg.h>\n#include <stddef.h>\n#include <setjmp.h>\n#include <stdint.h>
		#include <%s>\nint main(void) { return 0; }\n' "$1" |
		$compiler -x c - ${2:+-l"$2"} -o /dev/null >/dev/null 2>&1
}

# shellcheck disable=SC2086 # as above
has_openmp()
{
	echo 'int main(void) { return 0; }' | $compiler -x c - -fopenmp -o /dev/null >/dev/null 2>&1
}

has_fonts()
{
	find /usr/share/fonts /usr/local/share/fonts "${HOME:-/}/.fonts" \
		\( -name '*.ttf' -o -name '*.otf' \) -print -quit 2>/dev/null | grep -q .
}

has_fuzzer()
{
	printf '%s\n' '#include <stddef.h>' '#include <stdint.h>' \
		'int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);' \
		'int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)' \
		'{ (void)data; (void)size; return 0; }' |
		clang -x c - -fsanitize=fuzzer,address -o /dev/null >/dev/null 2>&1
}

# need PACKAGES COMMAND...: notes the packages unless the command succeeds.
missing=()
need()
{
	local packages=$1
	shift
	# shellcheck disable=SC2206 # one word per package
	"$@" || missing+=($packages)
}

compiler_package()
{
	case ${compiler%% *} in
	gcc | cc) echo build-essential ;;
	*) echo "${compiler%% *}" ;;
	esac
}

# Leaves in `needed` how many of the missing ones are needed, the rest being only wished for; empty:
# all.
find_missing()
{
	missing=()
	# Its first word is the program; what is not in a package of that name is the user's to find.
	has_program "${compiler%% *}" || missing+=("$(compiler_package)")
	has_program make || missing+=(make)
	[[ $compiler != *clang* ]] || need libomp-dev has_openmp
	# Without a compiler the libraries cannot be looked for: ask for them all.
	need libopenblas-dev has_library cblas.h openblas
	needed=${#missing[@]}
	need gnuplot-nox has_program gnuplot
	need fonts-dejavu-core has_fonts
	[ "$1" = run ] && return
	needed=
	[ "$1" = plots ] && return
	need libcmocka-dev has_library cmocka.h cmocka
	need libcjson-dev has_library cjson/cJSON.h cjson
	[ "$1" = test ] && return
	need "clang libclang-rt-dev" has_fuzzer
	need clang-format has_program clang-format
	need clang-tidy has_program clang-tidy
	need cppcheck has_program cppcheck
}

install_missing()
{
	export DEBIAN_FRONTEND=noninteractive
	echo "installing: ${missing[*]}" >&2
	local log
	log=$(mktemp)
	if ! { apt-get -q update && apt-get -qy install --no-install-recommends "${missing[@]}"; } \
		>"$log" 2>&1 </dev/null; then
		tail -n 5 "$log" >&2
	fi
	rm -f "$log"
}

[ $# -eq 1 ] || usage
case $1 in
run | plots | test | check) ;;
*) usage ;;
esac

find_missing "$1"
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ] && has_program apt-get; then
	install_missing
	find_missing "$1"
fi
if [ "${needed:-1}" -eq 0 ] && [ ${#missing[@]} -gt 0 ]; then
	echo "pictures need: ${missing[*]} (Debian package names); measuring goes on without" >&2
elif [ ${#missing[@]} -gt 0 ]; then
	echo "missing: ${missing[*]} (Debian package names; install them and try again)" >&2
	exit 1
fi
