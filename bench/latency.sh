#!/bin/sh
# Measures every block as one run (one file, one run_id), then draws the plots.
#
#   bench/latency.sh BUILD FILE [options of the programs]
#
# Rows go to FILE in the device's folder of results/, unless --out says where.
#
# On a GPU attention is measured by several providers, their samples alternating: the fastest of
# ours, cuDNN, FlashAttention-3 where it is built, and the portable kernels; --provider picks
# others.
#
# BLOCKS in the environment names other programs (make bench-family); CHUNKS names chunk lengths
# that gla's prefill takes besides its own.
#
# With --resume an interrupted run goes on where it was.
set -eu

build=$1
file=$2
shift 2
RUN_ID=${RUN_ID:-$(date -u +%Y-%m-%dT%H:%M:%SZ)-$$}
export RUN_ID

for option in "$@"; do
	case $option in
	--help | --version) exec "$build/attention" "$option" ;;
	esac
done

# The programs say where rows go, and complain about options, before anything is measured.
list=$("$build/attention" --list "$@") || exit $?
out=$(printf '%s\n' "$list" | sed -n 's/^output: //p')
case $out in
results/*/latency.csv) out=${out%latency.csv}$file ;;
esac
first=--truncate
measures=yes
chunks=${CHUNKS:-}
rivals=
if printf '%s\n' "$list" | grep -q '^backend now: cuda'; then
	rivals=yes
fi
flash3=
if [ -e "${FLASH3_LIBRARY:-$build/libflash3.so}" ]; then
	flash3='--provider attention=flash3,attention_step=flash3'
fi
before=
for option in "$@"; do
	case $before$option in
	--pass*prefill*) ;;
	--pass?*) chunks= ;;
	esac
	before=
	case $option in
	--pass) before=--pass= ;;
	--resume) first= ;;
	--breakdown | --dry-run | --list | --help) measures= ;;
	--provider | --provider=*) rivals= ;;
	--chunk | --chunk=*) chunks= ;;
	esac
done

failed=0
for program in ${BLOCKS:-attention recurrence gla rat hybrid}; do
	code=0
	if [ "$rivals" ] && [ "$program" = attention ]; then
		"$build/$program" $first "$@" --out "$out" --provider '' \
			--provider attention=cudnn,attention_step=cudnn,attention_backward=cudnn $flash3 \
			--provider portable ||
			code=$?
	else
		"$build/$program" $first "$@" --out "$out" || code=$?
	fi
	first=
	if [ "$chunks" ] && [ "$program" = gla ] && [ "$code" -lt 2 ]; then
		"$build/gla" "$@" --out "$out" --pass prefill --chunk "$chunks" || code=$?
	fi
	# 1: a case failed, and its row says how; 2: the options are wrong.
	[ "$code" -lt 2 ] || exit "$code"
	[ "$code" -eq 0 ] || failed=1
done
if [ "$measures" ]; then
	plots/draw.sh "$out" || echo "plots/draw.sh could not draw $out" >&2
fi
exit "$failed"
