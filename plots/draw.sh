#!/bin/sh
# Draws every picture that a results file has rows for.
#
#   plots/draw.sh RESULTS.csv [FOLDER]
#
# Whole models are taken from table2.csv beside it, linear attention in chunks from chunkwise.csv.
# Pictures go to FOLDER (plots/out), as PNG and SVG.
set -eu
# gnuplot cannot draw letters beyond ASCII in the locale of an empty environment.
export LC_ALL=C.UTF-8

[ $# -ge 1 ] || { echo "usage: plots/draw.sh RESULTS.csv [FOLDER]" >&2; exit 2; }
results=$1
folder=${2:-plots/out}
table2=$(dirname "$results")/table2.csv
chunkwise=$(dirname "$results")/chunkwise.csv
[ -r "$chunkwise" ] || chunkwise=$results
plotdata=${BUILD:-build}/plotdata

[ -r "$results" ] || { echo "plots/draw.sh: $results cannot be read" >&2; exit 1; }
[ -x "$plotdata" ] || ${MAKE:-make} -s "$plotdata"
command -v gnuplot >/dev/null || { echo "plots/draw.sh: gnuplot is missing" >&2; exit 1; }
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# select NAME PASS X Y PUBLISHED RESULTS: the data of a picture; false if there are none.
select_data() {
	code=0
	name=$1
	shift
	"$plotdata" "$@" >"$work/$name.gp" || code=$?
	[ "$code" -le 1 ] || [ "$code" -eq 3 ] || exit "$code"
	[ "$code" -eq 0 ]
}

# picture SCRIPT FILE DEFINITIONS: both formats.
picture() {
	for format in png svg; do
		gnuplot -e "format='$format'; output='$folder/$2.$format'; $3" "plots/$1.gp"
	done
	echo "$folder/$2.png"
}

title_of() {
	case $1 in
	prefill) echo "Prefill" ;;
	train) echo "Training" ;;
	generation) echo "Generation" ;;
	esac
}

paper=results/paper
for pass in prefill train generation; do
	title=$(title_of "$pass")
	if select_data lines "$pass" seq_len latency_ms $paper/latency.csv "$results"; then
		picture lines "latency_$pass" "data='$work/lines.gp'; name='$title latency'; \
			x='sequence length T'; y='ms'"
	fi
	if select_data chunk "$pass" chunk latency_ms $paper/latency.csv "$results"; then
		picture lines "chunk_$pass" "data='$work/chunk.gp'; name='$title latency'; \
			x='chunk length L'; y='ms'"
	fi
	if select_data flops "$pass" seq_len flops $paper/latency.csv "$results" &&
		select_data bytes "$pass" seq_len bytes $paper/latency.csv "$results"; then
		picture work "work_$pass" "data='$work/flops.gp'; more='$work/bytes.gp'; \
			name='$title work'"
	fi
done
if select_data chunkwise kernel seq_len latency_ms $paper/latency.csv "$chunkwise"; then
	picture chunkwise chunkwise "data='$work/chunkwise.gp'; name='Linear attention in chunks'"
fi
if [ -r "$table2" ] &&
	select_data models throughput model tokens_per_s $paper/table2.csv "$table2"; then
	picture throughput throughput "data='$work/models.gp'; name='Throughput of whole models'"
fi
