#!/usr/bin/env bash
# How often `make compare` is right: verdicts on a program against itself, and against itself with
# a slowdown that is known.
#
#   tests/experiments/compare_rates.sh [BUILD [SLOWDOWN:TIMES...]]
#
# SLOWDOWN is in percent, 0 is the program against itself; TIMES such comparisons are made, each of
# all cases of `make compare`. They come in random order, so that what else the machine does meets
# all alike. Rows are kept in BUILD/experiments/rates; those there are counted too, and with TIMES 0
# nothing else is. Options of the programs may be given in ARGS, of build/compare in VERDICT.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/../.."

build=${1:-build}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- 0:8 2:3 5:5 10:4 20:3
rates=$build/experiments/rates
make --no-print-directory BUILD="$build" "$build/experiments/hybrid" "$build/compare" >&2
mkdir -p "$rates"

# A folder with the program that is slower by so many percent.
program()
{
	local folder=$build/experiments/slower-by-$1
	mkdir -p "$folder"
	printf '#!/bin/sh\nSLOWDOWN_PERCENT=%s exec "%s" "$@"\n' "$1" \
		"$PWD/$build/experiments/hybrid" >"$folder/hybrid"
	chmod +x "$folder/hybrid"
	echo "$folder"
}

# Verdicts of all comparisons of one slowdown in $rates: a line "ratio verdict pairs" each.
verdicts()
{
	local base
	for base in "$rates/$1"-*-base.csv; do
		[ -e "$base" ] || continue
		# shellcheck disable=SC2086
		"$build/compare" --of min ${VERDICT:-} --base "$base" --new "${base%base.csv}new.csv" ||
			true
	done | awk '$NF ~ /^(same|faster|slower|unclear)$/ { print $(NF - 5), $NF, $(NF - 1) }'
}

for entry in "$@"; do
	for ((i = 0; i < ${entry#*:}; i++)); do echo "${entry%:*}"; done
done | shuf >"$rates/order"
while read -r slowdown <&3; do
	name=$rates/$slowdown-$(date -u +%Y%m%d%H%M%S)
	code=0
	# shellcheck disable=SC2086
	BASE=$(program 0) NEW=$(program "$slowdown") bench/compare.sh "$build" ${ARGS:-} \
		>"$name.txt" </dev/null || code=$?
	[ "$code" -lt 2 ] || exit "$code"
	mv "$build/comparison/base.csv" "$name-base.csv"
	mv "$build/comparison/new.csv" "$name-new.csv"
done 3<"$rates/order"

echo 'slowdown  verdicts   slower     same  unclear   faster  median ratio  largest wrong  pairs'
for slowdown in $(find "$rates" -name '*-base.csv' -printf '%f\n' | cut -d- -f1 | sort -nu); do
	verdicts "$slowdown" | sort -g | awk -v slowdown="$slowdown" '
		{ count[$2]++; ratio[NR] = $1; pairs += $3 }
		# Wrong: a difference where none is, or in the wrong direction.
		$2 == "faster" || (slowdown == 0 && $2 == "slower") {
			apart = $1 < 1 ? 1 / $1 : $1
			wrong = apart > wrong ? apart : wrong
		}
		function share(verdict) { return sprintf("%7.1f%%", 100 * count[verdict] / NR) }
		END {
			printf "%7s%%  %8d %s %s %s %s  %12.3f  %13s  %5.1f\n", slowdown, NR,
				share("slower"), share("same"), share("unclear"), share("faster"),
				ratio[int((NR + 1) / 2)], wrong ? sprintf("%.3f", wrong) : "none",
				pairs / NR
		}'
done
