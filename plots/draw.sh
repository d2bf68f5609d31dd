#!/bin/sh
# Draws every picture that a results file has rows for.
#
#   plots/draw.sh RESULTS.csv [FOLDER]
#   plots/draw.sh RUN [FOLDER]            a folder of such files
#
# A picture shows rows of that file alone, beside published numbers of the same shapes. Pictures go to
# FOLDER (plots/out of the checkout), as PNG and SVG. Those of files other than latency.csv,
# table2.csv and chunkwise.csv have the file's name in front.
set -eu
# gnuplot cannot draw letters beyond ASCII in the locale of an empty environment.
export LC_ALL=C.UTF-8

[ $# -ge 1 ] || { echo "usage: plots/draw.sh RESULTS.csv|RUN [FOLDER]" >&2; exit 2; }
[ -r "$1" ] || { echo "plots/draw.sh: $1 cannot be read" >&2; exit 1; }
if [ -d "$1" ]; then
	for file in "${1%/}"/*.csv; do
		case $file in
		*.samples.csv | *.old-*.csv | */\*.csv) continue ;;
		esac
		"$0" "$file" ${2:+"$2"}
	done
	exit
fi
root=$(cd "$(dirname "$0")/.." && pwd)
results=$(realpath -- "$1")
folder=${2:-$root/plots/out}
command -v gnuplot >/dev/null ||
	{ echo "plots/draw.sh: no pictures: gnuplot is missing (Debian: gnuplot-nox)" >&2; exit 1; }
mkdir -p -- "$folder"
folder=$(realpath -- "$folder")
shown=${2:-plots/out}
# The scripts of gnuplot load each other by their place in the checkout.
cd "$root"
plotdata=$(realpath -m -- "${BUILD:-build}/plotdata")
[ -x "$plotdata" ] || ${MAKE:-make} -s "${BUILD:-build}/plotdata"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
paper=results/paper
prefix=$(basename -- "$results" .csv)_
case $prefix in
latency_ | table2_ | chunkwise_) prefix= ;;
esac

# The column of run_id is the second of every schema.
runs=$(sed 1d "$results" | cut -d , -f 2 | sort -u | wc -l)
if [ "$runs" -gt 1 ]; then
	echo "plots/draw.sh: $1 has rows of $runs runs; of each case the last counts" >&2
else
	echo "$1: run $(sed -n 2p "$results" | cut -d , -f 2)"
fi

# select NAME PASS X Y PUBLISHED: the data of a picture; false if there are none.
select_data() {
	code=0
	name=$1
	shift
	"$plotdata" "$@" "$results" >"$work/$name.gp" || code=$?
	[ "$code" -eq 0 ] || [ "$code" -eq 3 ] || exit "$code"
	[ "$code" -eq 0 ]
}

# picture SCRIPT FILE DEFINITIONS: both formats.
picture() {
	for format in png svg; do
		gnuplot -e "format='$format'; output='$work/picture'; $3" "plots/$1.gp"
		mv -- "$work/picture" "$folder/$prefix$2.$format"
	done
	echo "$shown/$prefix$2.png"
}

title_of() {
	case $1 in
	prefill) echo "Prefill" ;;
	train) echo "Training" ;;
	generation) echo "Generation" ;;
	esac
}

for pass in prefill train generation; do
	title=$(title_of "$pass")
	if select_data lines "$pass" seq_len latency_ms $paper/latency.csv; then
		picture lines "latency_$pass" "data='$work/lines.gp'; name='$title latency'; \
			x='sequence length T'; y='ms'"
	fi
	if select_data chunk "$pass" chunk latency_ms $paper/latency.csv 2>/dev/null; then
		picture lines "chunk_$pass" "data='$work/chunk.gp'; name='$title latency'; \
			x='chunk length L'; y='ms'"
	fi
	if select_data flops "$pass" seq_len flops $paper/latency.csv 2>/dev/null &&
		select_data bytes "$pass" seq_len bytes $paper/latency.csv 2>/dev/null; then
		picture work "work_$pass" "data='$work/flops.gp'; more='$work/bytes.gp'; \
			name='$title work'"
	fi
done
# Only the rows of that program belong into its picture.
if grep -q ',chunkwise,' "$results" &&
	select_data chunkwise kernel seq_len latency_ms $paper/latency.csv; then
	picture chunkwise chunkwise "data='$work/chunkwise.gp'; name='Linear attention in chunks'"
fi
if select_data models throughput model tokens_per_s $paper/table2.csv; then
	picture throughput throughput "data='$work/models.gp'; name='Throughput of whole models'"
fi
