#!/bin/sh
# Measures linear attention in chunks against attention, then draws the picture.
#
#   bench/chunkwise.sh BUILD [options of build/chunkwise]
set -eu

build=$1
shift
list=$("$build/chunkwise" --list "$@") || exit $?
out=$(printf '%s\n' "$list" | sed -n 's/^output: //p')
first=--truncate
measures=yes
for option in "$@"; do
	case $option in
	--re*) first= ;;
	--br* | --dr* | --hel* | --l*) measures= ;;
	esac
done
code=0
"$build/chunkwise" $first "$@" || code=$?
[ "$code" -lt 2 ] || exit "$code"
if [ "$measures" ] && [ -f "$out" ]; then
	BUILD=$(realpath -- "$build") "$(dirname "$0")/../plots/draw.sh" "$out" ||
		echo "plots/draw.sh could not draw $out" >&2
fi
exit "$code"
