#!/bin/sh
# Writes one page about a run: its tables and pictures, in a file that asks for no other.
#
#   scripts/report.sh RUN [PAGE]     RUN: a folder of results files, such as results/h200;
#                                    PAGE: RUN/report.html
#
# BUILD names the folder of the programs (build). Without gnuplot there are tables alone.
set -eu
export LC_ALL=C.UTF-8

run=${1:-}
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ ! -d "$run" ]; then
	echo "usage: scripts/report.sh RUN [PAGE]" >&2
	exit 2
fi
run=${run%/} page=${2:-${run%/}/report.html} build=${BUILD:-build}
root=$(cd "$(dirname "$0")/.." && pwd)
if [ ! -x "$build/report" ]; then
	echo "$build/report is missing: make programs" >&2
	exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

known="latency table2 family chunkwise generation kernels peers"

# The files of the run, in this order, then all others.
list()
{
	for name in $known; do
		[ ! -f "$run/$name.csv" ] || echo "$run/$name.csv"
	done
	for file in "$run"/*.csv; do
		name=${file##*/}
		case " $known $name" in
		*" ${name%.csv} "* | *.samples.csv | *.old-*.csv | *" *.csv") ;;
		*) echo "$file" ;;
		esac
	done
}

title_of()
{
	case $1 in
	latency) echo 'Blocks' ;;
	table2) echo 'Whole models' ;;
	family) echo 'The linear-attention family' ;;
	chunkwise) echo 'Chunk lengths' ;;
	generation) echo 'Generation' ;;
	kernels) echo 'Single operations' ;;
	peers) echo 'Rivals in one process' ;;
	*) echo "$1" | sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g' ;;
	esac
}

picture()
{
	printf '<figure><img alt="%s" src="data:image/svg+xml;base64,' "$2"
	base64 <"$1" | tr -d '\n'
	printf '"><figcaption>%s</figcaption></figure>\n' "$2"
}

# What draw.sh calls a picture, in words.
caption_of()
{
	case $1 in
	*latency_prefill) echo 'Prefill: milliseconds against tokens of a sequence' ;;
	*latency_train) echo 'Training step: milliseconds against tokens of a sequence' ;;
	*latency_generation) echo 'Generation of one token: milliseconds against position' ;;
	*work_prefill) echo 'Prefill: FLOPs and bytes against tokens of a sequence' ;;
	*work_train) echo 'Training step: FLOPs and bytes against tokens of a sequence' ;;
	*work_generation) echo 'Generation: FLOPs and bytes against position' ;;
	*chunk_prefill) echo 'Prefill: milliseconds against the chunk length' ;;
	*chunk_train) echo 'Training step: milliseconds against the chunk length' ;;
	*chunk_generation) echo 'Generation: milliseconds against the chunk length' ;;
	*throughput) echo 'Whole models: tokens a second' ;;
	*chunkwise) echo 'Forms of linear attention against the chunk length' ;;
	*) echo "$1" ;;
	esac
}

section()
{
	file=$1
	name=$(basename "$file" .csv)
	if ! "$build/report" --format html "$file" >"$work/tables"; then
		echo "$file has no tables" >&2
		return
	fi
	rm -rf "$work/pictures"
	mkdir "$work/pictures"
	"$root/plots/draw.sh" "$file" "$work/pictures" >"$work/draw.log" 2>&1 || cat "$work/draw.log" >&2
	printf '<section>\n<h2>%s</h2>\n' "$(title_of "$name")"
	echo '<div class="figures">'
	for kind in latency throughput chunkwise work chunk; do
		for pass in _prefill _train _generation ''; do
			for svg in "$work/pictures/$kind$pass.svg" "$work/pictures/${name}_$kind$pass.svg"; do
				[ ! -f "$svg" ] || picture "$svg" "$(caption_of "$(basename "$svg" .svg)")"
			done
		done
	done
	echo '</div>'
	cat "$work/tables"
	printf '</section>\n'
}

list >"$work/files"
if [ ! -s "$work/files" ]; then
	echo "$run has no results files" >&2
	exit 1
fi
{
	cat <<END
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Measured: $(basename "$run" | sed 's/&/\&amp;/g; s/</\&lt;/g')</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --rule: #d0d0d0; --shade: #f4f4f2; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e6e6e6; --paper: #161616; --rule: #444; --shade: #202020; } }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; font: 1rem/1.5 system-ui, sans-serif;
	color: var(--ink); background: var(--paper); }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--rule); }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); }
figure { margin: 1rem 0; overflow-x: auto; }
figure img { width: 100%; min-width: 34rem; background: #fff; border-radius: 4px; }
figcaption { font-size: 0.9rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap;
	border-bottom: 1px solid var(--rule); }
tbody th { position: sticky; left: 0; background: var(--paper); }
thead th { background: var(--shade); }
@media print { body { max-width: none; font-size: 9pt; } .table, figure { overflow: visible; }
	figure img { min-width: 0; }
	table { font-size: 7pt; } th, td { white-space: normal; padding: 0.1rem 0.3rem; }
	figure, tr { break-inside: avoid; } }
</style>
</head>
<body>
<h1>What was measured</h1>
<p>Medians in milliseconds unless a heading says otherwise; ratios are paired, with their 95% intervals where a table has them. Every row has been compared
with an fp64 computation of the same numbers. docs/measuring.md and docs/rows.md of the repository say how.</p>
END
	while read -r file; do
		section "$file"
	done <"$work/files"
	printf '</body>\n</html>\n'
} >"$work/page"
cat "$work/page" >"$page"
echo "$page"
