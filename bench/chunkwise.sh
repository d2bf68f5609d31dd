#!/bin/sh
# Measures linear attention in chunks against attention, then draws the picture.
#
#   bench/chunkwise.sh BUILD [options of build/chunkwise]
set -eu

build=$1
shift
out=$("$build/chunkwise" --list "$@" | sed -n 's/^output: //p')
first=--truncate
measures=yes
for option in "$@"; do
	case $option in
	--resume) first= ;;
	--dry-run | --list | --help | --version) measures= ;;
	esac
done
code=0
"$build/chunkwise" $first "$@" || code=$?
[ "$code" -lt 2 ] || exit "$code"
if [ "$measures" ]; then
	plots/draw.sh "$out" || echo "plots/draw.sh could not draw $out" >&2
fi
exit "$code"
