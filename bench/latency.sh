#!/bin/sh
# Measures blocks as one run (one file, one run_id), then draws the plots.
#
#   bench/latency.sh BUILD FILE [options of the programs]
#
# Rows go to FILE in the device's folder of runs/, unless --out says where. They replace those of an
# earlier run there, or with --resume an interrupted run goes on where it was.
#
# The blocks of a process alternate, so that their ratios hold under one clock: first attention and
# the single blocks, then the stacks of two, whose baseline is attention with a window. On a GPU
# attention is measured with the kernels of cuDNN and, where it is built, FlashAttention-3 besides;
# --provider measures all blocks with others instead.
#
# On a GPU all of it is meant to take less than ten minutes. Gradients of the linear-attention family
# are bench-family's: here its blocks are trained on a CPU alone. Training and the stacks are measured
# at three of the seven lengths, --seq-len asks for others; and samples are taken for twice as long as
# by the programs themselves, for a card that is short of power needs more of them.
#
# PATTERNS and STACKS in the environment name other patterns (make bench-family); CHUNKS names chunk
# lengths that gla's prefill takes besides its own.
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
list=$("$build/hybrid" --list "$@") || exit $?
out=$(printf '%s\n' "$list" | sed -n 's/^output: //p')
first=--truncate
measures=yes
chunks=${CHUNKS:-}
# Key heads as they are deployed: fewer than there are query heads.
grouped='attention(kv_heads=1)'
rivals=
longer=
if printf '%s\n' "$list" | grep -q '^backend now: cuda'; then
	rivals=yes
	longer='--max-time 1'
	grouped='attention(kv_heads=8)/attention(kv_heads=2)'
fi
patterns=${PATTERNS-attention/$grouped/swa/recurrence/gla/rat(chunk=16|64)}
trained=$patterns
lengths=
if [ "$rivals" ] && [ -z "${PATTERNS+set}" ]; then
	trained='attention/attention(kv_heads=2)/swa/recurrence/rat'
	lengths=4096,32768,131072
fi
passes=
stacks=${STACKS-attention,swa/rat,swa}
named=
before=
for option; do
	shift
	case $before$option in
	--pass*prefill*) ;;
	--pass?*) chunks= ;;
	esac
	case $before$option in
	--pass=?*) passes=given ;;
	esac
	before=
	# Options may be shortened. The first program alone starts the file anew.
	case $option in
	--pass) before=--pass= ;;
	--tr*) continue ;;
	--re*) first= ;;
	--hel*) exec "$build/hybrid" --help ;;
	--br* | --dr* | --l*) measures= ;;
	--prov*) rivals= ;;
	--ch*) chunks= ;;
	--s*q* | --pre*) lengths= ;;
	--pat*) patterns= stacks= chunks= trained= ;;
	--o*) named=yes ;;
	esac
	set -- "$@" "$option"
done
[ "$named" ] || out=$(dirname "$out")/$file

failed=0
# measure OPTIONS...: rows are added; 1: a case failed, and its row says how; 2: the options are
# wrong.
measure() {
	code=0
	"$build/hybrid" $first $longer "$@" --out "$out" || code=$?
	first=
	[ "$code" -lt 2 ] || exit "$code"
	[ "$code" -eq 0 ] || failed=1
}

# with_rivals OPTIONS...: the baseline by others' kernels, too.
with_rivals() {
	if [ "$rivals" ]; then
		set -- "$@" --rival attention=cudnn,attention_step=cudnn,attention_backward=cudnn
		if [ -e "${FLASH3_LIBRARY:-$build/libflash3.so}" ]; then
			set -- "$@" --rival attention=flash3,attention_step=flash3
		fi
	fi
	measure "$@"
}

if [ -z "$patterns$stacks" ]; then
	with_rivals "$@"
fi
if [ "$patterns" != "$trained" ] && [ -z "$passes" ]; then
	with_rivals "$@" --pattern "$patterns" --pass prefill,generation
	with_rivals "$@" --pattern "$trained" --pass train ${lengths:+--seq-len "$lengths"}
elif [ "$patterns" ]; then
	with_rivals "$@" --pattern "$patterns"
fi
[ -z "$stacks" ] || measure "$@" --pattern "$stacks" --baseline attention,swa \
	${lengths:+--seq-len "$lengths"}
[ -z "$chunks" ] || measure "$@" --pattern "gla(chunk=$chunks)" --pass prefill
if [ "$measures" ] && [ -f "$out" ]; then
	BUILD=$(realpath -- "$build") "$(dirname "$0")/../plots/draw.sh" "$out" ||
		echo "plots/draw.sh could not draw $out" >&2
fi
exit "$failed"
