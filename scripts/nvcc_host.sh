#!/bin/sh
# What nvcc has to be told about its host compiler:
#
#   scripts/nvcc_host.sh NVCC
#
# nvcc takes gcc as it finds it and refuses one that is newer than it knows. Prints nothing where it
# accepts that; otherwise -ccbin and an installed g++-N that it accepts; without any,
# -allow-unsupported-compiler, and says so. NVCC_CCBIN in the environment is the user's own choice.
set -eu

[ -z "${NVCC_CCBIN:-}" ] || exit 0
folder=$(dirname "$(realpath -- "$1")")/..
check=
for file in "$folder"/include/crt/host_config.h "$folder"/targets/*/include/crt/host_config.h; do
	[ ! -r "$file" ] || check=$file
done
[ -n "$check" ] || exit 0

# Whether the toolkit's own check passes.
accepted() {
	"$1" -E -x c++ -D__NVCC__ -D__CUDACC__ "$check" >/dev/null 2>&1
}

# Without any, nvcc's own message says it best.
command -v gcc >/dev/null || exit 0
! accepted gcc || exit 0
for version in 20 19 18 17 16 15 14 13 12 11 10 9; do
	if command -v "g++-$version" >/dev/null && accepted "g++-$version"; then
		echo "-ccbin g++-$version"
		exit 0
	fi
done
echo "nvcc does not know $(gcc --version | head -n 1), and no older g++-N is installed: it is used" \
	"all the same (-allow-unsupported-compiler)" >&2
echo "-allow-unsupported-compiler"
