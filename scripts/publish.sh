#!/bin/sh
# Copies a run of a clean commit into results/DEVICE/ and redraws its pictures there.
#
#   scripts/publish.sh runs/DEVICE[/NAME] | FILE.csv
#
# Of a folder the files are published that the targets of make write, each being one run; of another
# file its name has to be given. Nothing is copied unless all may be:
# build/publish --help says which. A file of samples (latency.samples.csv) goes with its rows.
set -eu
export LC_ALL=C.UTF-8

fail() {
	echo "publish: $*" >&2
	exit 1
}

[ -n "${1:-}" ] || { echo "usage: make publish RUN=runs/DEVICE[/NAME]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
publish=$(realpath -m -- "${BUILD:-build}")/publish
run=${1%/}
set --
if [ -d "$run" ]; then
	for name in latency generation family kernels chunkwise table2 peers; do
		[ ! -f "$run/$name.csv" ] || set -- "$@" "$run/$name.csv"
	done
	[ $# -gt 0 ] || fail "$run has no files of rows"
elif [ -f "$run" ]; then
	set -- "$run"
else
	fail "$run is no file and no folder"
fi

told=$("$publish" "$@") || exit 1
device=$(printf '%s\n' "$told" | cut -d ' ' -f 1 | sort -u)
[ "$(printf '%s\n' "$device" | wc -l)" -eq 1 ] || fail "$run has rows of several devices"
for commit in $(printf '%s\n' "$told" | cut -d ' ' -f 2 | sort -u); do
	git -C "$root" cat-file -e "$commit^{commit}" 2>/dev/null ||
		fail "this repository does not know the commit $commit"
done

# Pictures first: without them nothing is published.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for file; do
	"$root/plots/draw.sh" "$file" "$work" >/dev/null || fail "no pictures of $file"
done

folder=$root/results/$device
mkdir -p "$folder"
# replace FROM TO: TO is never half a file.
replace() {
	cp -- "$1" "$2.new"
	mv -- "$2.new" "$2"
	echo "results/$device/$(basename -- "$2")"
}

# The pictures of an earlier run of the file, which this one may not have.
remove_pictures() {
	case $1 in
	latency) rm -f "$folder"/latency_*.png "$folder"/chunk_*.png "$folder"/work_*.png ;;
	table2) rm -f "$folder/throughput.png" ;;
	chunkwise) rm -f "$folder/chunkwise.png" ;;
	*) rm -f "$folder/$1"_*.png ;;
	esac
}

for file; do
	name=$(basename -- "$file" .csv)
	samples=${file%.csv}.samples.csv
	replace "$file" "$folder/$name.csv"
	if [ -f "$samples" ]; then
		replace "$samples" "$folder/$name.samples.csv"
	else
		rm -f "$folder/$name.samples.csv"
	fi
	remove_pictures "$name"
done
for picture in "$work"/*.png; do
	[ ! -f "$picture" ] || replace "$picture" "$folder/$(basename -- "$picture")"
done
