#!/usr/bin/env bash
# Measures two programs in turns, pair by pair of processes, until build/compare can say of every
# case whether it became faster, slower or stayed the same.
#
#   bench/compare.sh BUILD [options of the measuring program]
#
# In the environment, as `make compare NAME=value` sets them:
#
#   BASE      a commit, branch or tag; or a folder of built programs
#   NEW       likewise; empty: the working tree as it is
#   PATTERNS  stacks to measure, separated by blanks; each process takes them in another order
#   PROGRAM   command lines to measure instead, separated by semicolons, such as
#             "throughput --model 1.3B; kernel_latency": words that the shell would split, no quotes
#   PAIRS     least and most pairs of processes, as in 6..40
#   MINUTES   no pair begins later than this
#   VERDICT   options of build/compare, such as "--allow-unclear --margin 2"
#
# Commits are built in worktrees below BUILD/comparison, which are removed at the end. The rows stay
# there, in base.csv and new.csv. Exit code: that of build/compare; 2 as well if something cannot
# be built or run, 1 if only the new program dies.
set -uo pipefail
export LC_ALL=C

build=$1
shift
BASE=${BASE:-}
NEW=${NEW:-}
PATTERNS=${PATTERNS:-attention swa recurrence gla rat ratplus rat,swa linear_attention retnet mamba mamba2 hgrn hgrn2 delta_net gated_delta_net kda rwkv6 hawk griffin_attention}
PROGRAM=${PROGRAM:-}
PAIRS=${PAIRS:-6..40}
MINUTES=${MINUTES:-15}
VERDICT=${VERDICT:-}
scratch=
code=2
declare -A folder # of the programs of a side
declare -A extra  # options that a side needs

say() { printf 'compare: %s\n' "$*" >&2; }

fail()
{
	say "$@"
	exit "$code"
}

# Worktrees and what was built in them; also when interrupted.
clean()
{
	[ "$scratch" ] || return
	for tree in "$scratch"/base "$scratch"/new; do
		[ ! -e "$tree" ] || git worktree remove --force "$tree" >/dev/null 2>&1
	done
	rm -rf -- "$scratch"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

for option in "$@"; do
	case $option in
	--out | --out=* | --truncate | --resume | --run-id | --run-id=* | --list | --help | --dry-run)
		fail "$option: not here; rows go to $build/comparison" ;;
	esac
done
case $PAIRS in
*[!0-9.]* | *...* | ..* | *..) fail "PAIRS=$PAIRS: least and most, as in 6..40" ;;
esac
least=${PAIRS%%..*}
most=${PAIRS##*..}
[ "$least" -ge 1 ] && [ "$most" -ge "$least" ] || fail "PAIRS=$PAIRS: least and most, as in 6..40"
case $MINUTES in
'' | *[!0-9]*) fail "MINUTES=$MINUTES: not a whole number" ;;
esac
[ "$BASE" ] || fail 'make compare BASE=<commit> [NEW=<commit>] [ARGS="--preset tiny"]; bench/compare.sh tells more'

# The programs that command lines begin with; "hybrid" for patterns.
programs()
{
	if [ ! "$PROGRAM" ]; then
		echo hybrid
		return
	fi
	local line
	while read -r -d ';' line || [ "$line" ]; do
		set -- $line
		[ $# -eq 0 ] || basename -- "$1"
	done <<<"$PROGRAM" | sort -u
}

# build_tree FOLDER TITLE: makes the programs of a source tree.
build_tree()
{
	local targets=() program
	for program in $(programs); do
		targets+=("build/$program")
	done
	say "building $2"
	if ! make --no-print-directory -C "$1" BUILD=build -j"$(nproc)" "${targets[@]}" >"$scratch/log" 2>&1; then
		tail -n 15 "$scratch/log" >&2
		fail "$2 cannot be built"
	fi
}

# prepare SIDE WHAT: sets the side's folder of programs and its title.
prepare()
{
	local side=$1 what=$2 commit
	if [ ! "$what" ]; then
		folder[$side]=$build
	elif [ -d "$what" ] && ! git rev-parse --verify -q "$what^{commit}" >/dev/null; then
		folder[$side]=$what
	else
		commit=$(git rev-parse --verify -q "$what^{commit}" 2>/dev/null) ||
			fail "'$what' is neither a commit of this repository nor a folder of programs"
		git worktree add --detach "$scratch/$side" "$commit" >"$scratch/log" 2>&1 ||
			fail "no worktree of '$what': $(tail -n 1 "$scratch/log")"
		build_tree "$scratch/$side" "$what"
		folder[$side]=$scratch/$side/build
	fi
}

mkdir -p "$build/comparison" || exit 2
scratch=$(mktemp -d "$(cd "$build/comparison" && pwd)/tree.XXXXXX") || exit 2
prepare base "$BASE"
prepare new "$NEW"

# On a CPU: sizes of a few milliseconds, of which a time slice holds some samples whole; half of the
# processors, since the others are somebody else's; warm caches, since what processes differ in is
# mostly where their memory lies; and the least sample of a process, since others only ever add.
options=("$@")
statistic=median
probe=$(programs | head -n 1) # all of them have the same backends and options
case $("${folder[new]}/$probe" --list 2>/dev/null) in
*'backend now: cuda'*) cpu= ;;
*) cpu=yes statistic=min ;;
esac
if [ $# -eq 0 ] && [ ! "$PROGRAM" ]; then
	if [ "$cpu" ]; then
		options=(--preset tiny --tokens 256 --seq-len 128 --batch 64 --samples 31 --warm
			--threads $((($(nproc) + 1) / 2)))
	else
		options=(--preset paper --tokens 65536 --seq-len 4096 --batch 64 --samples 15)
	fi
	options+=(--rows 64 --case-seconds 0)
fi
VERDICT="--of $statistic $VERDICT"

# What is measured must not depend on what else is: a program that can alternate blocks is told not
# to, since another may not know how.
for side in base new; do
	case $("${folder[$side]}/$probe" --help 2>/dev/null) in
	*' --apart '*) extra[$side]=--apart ;;
	*) extra[$side]= ;;
	esac
done

# Patterns that both programs know; the others are said.
both=()
if [ ! "$PROGRAM" ]; then
	for pattern in $PATTERNS; do
		known=yes
		for side in base new; do
			"${folder[$side]}/hybrid" --pattern "$pattern" "${options[@]}" --dry-run \
				>"$scratch/log" 2>&1 && continue
			say "$pattern is left out, $side refuses it: $(tail -n 1 "$scratch/log")"
			known=
		done
		[ ! "$known" ] || both+=("$pattern")
	done
	[ ${#both[@]} -gt 0 ] || fail 'nothing is left to measure'
fi

# measure SIDE LINE...: one process of a side; its rows go to the side's file.
# shellcheck disable=SC2086 # words
measure()
{
	local side=$1 program=$2 result=0
	shift 2
	"${folder[$side]}/$(basename -- "$program")" "$@" "${options[@]}" "${passes[@]}" ${extra[$side]} --format none \
		--run-id "$side-$run-$pair" --out "$build/comparison/$side.csv" \
		>"$scratch/log" 2>&1 || result=$?
	# 1: a case failed, and its row says how.
	[ "$result" -gt 1 ] || return 0
	tail -n 3 "$scratch/log" >&2
	[ "$side" = base ] || [ "$result" -le 128 ] || code=1
	fail "$side: $program ended with code $result"
}

# The patterns that have a case in $wide, in random order; all of them where that names none.
next_patterns()
{
	local pattern layers found=()
	for pattern in "${both[@]}"; do
		layers=$(sed 's/([^)]*)//g; s/:[0-9]*//g; s/,/-/g' <<<"$pattern")
		! grep -q "^$layers " <<<"$wide" || found+=("$pattern")
	done
	[ ${#found[@]} -gt 0 ] || found=("${both[@]}")
	printf '%s\n' "${found[@]}" | shuf | paste -sd/
}

# A process of either side for each line, in random order. What is decided is not measured again.
measure_pair()
{
	local side line lines=()
	if [ "$PROGRAM" ]; then
		mapfile -t lines < <(tr ';' '\n' <<<"$PROGRAM" | grep '[^[:space:]]')
	else
		lines=("hybrid --pattern $(next_patterns)")
	fi
	passes=()
	[ "$PROGRAM" ] || [ ! "$wide" ] ||
		passes=(--pass "$(cut -d' ' -f2 <<<"$wide" | sort -u | paste -sd,)")
	for side in $(shuf -e base new); do
		for line in "${lines[@]}"; do
			# shellcheck disable=SC2086 # words
			measure "$side" $line
		done
	done
}

rm -f -- "$build"/comparison/{base,new}.*
files=(--base "$build/comparison/base.csv" --new "$build/comparison/new.csv")
run=$(date -u +%Y-%m-%dT%H:%M:%SZ)-$$
end=$((SECONDS + 60 * MINUTES))
wide=
for ((pair = 1; pair <= most; pair++)); do
	measure_pair
	[ "$pair" -ge "$least" ] || continue
	# Intervals that are narrow enough end it, whatever they say: an end as soon as a
	# difference is found would find one in nothing.
	# shellcheck disable=SC2086
	wide=$("$build/compare" $VERDICT --allow-different clock --wide "${files[@]}") || exit 2
	[ ! -t 2 ] || printf '\r%d pairs, %d cases need more ' "$pair" "$(grep -c . <<<"$wide")" >&2
	[ "$wide" ] && [ "$SECONDS" -lt "$end" ] || break
done
[ ! -t 2 ] || printf '\r%40s\r' '' >&2
# shellcheck disable=SC2086
"$build/compare" $VERDICT "${files[@]}"
code=$?
exit "$code"
