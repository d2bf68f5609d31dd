#!/usr/bin/env bash
# scripts/sass.sh [FILE...]: what the assembler made of each sm_90a kernel. FILE is a .cu, which
# is compiled, or an object that exists; default: every .cu of kernels/hopper.
#
# Fails on a warning of class C75xx (wgmma was serialized), on a kernel that spills, and on a
# kernel without the matrix instructions that its file promises. A file says by comments:
#   wgmma in: NAME, NAME     those kernels have GMMA instructions (without the comment: some
#                            kernel of a file that calls wgmma_... has)
#   may spill: NAME, NAME    those kernels may; no other may
# Shared memory is what is declared: what a launch adds is not known here.
set -u

cd "$(dirname "$0")/.." || exit 1
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cuobjdump=$(command -v cuobjdump || echo "$(dirname "$nvcc")/cuobjdump")
demangle=$(command -v cu++filt || command -v c++filt || echo cat)
NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} $(scripts/nvcc_host.sh "$nvcc" 2>/dev/null)"
export NVCC_APPEND_FLAGS
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

complain()
{
	printf '%s\n' "$@"
	failed=1
}

# The names in a comment `TAG: NAME, NAME` of a source file, as a pattern for egrep.
names_after()
{
	sed -n "s/^.*$1: *\([a-z0-9_, ]*\).*/\1/p" "$2" | tr -d ' ' | tr ',' '|' | paste -sd '|' -
}

# Assembly -> "MANGLED_NAME GMMA TMA MUFU LOCAL" for each kernel.
count_instructions()
{
	awk '/Function : / { name = $3; kernels[name] }
		/[HQI]GMMA/ { gmma[name]++ }
		/UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED/ { tma[name]++ }
		/MUFU/ { mufu[name]++ }
		/ (LDL|STL)[. ]/ { locals[name]++ }
		END { for (name in kernels)
			print name, gmma[name] + 0, tma[name] + 0, mufu[name] + 0, locals[name] + 0 }'
}

# "MANGLED_NAME REGISTERS SHARED" for each kernel.
read_resources()
{
	awk '/^ Function / { name = $2; sub(/:$/, "", name) }
		/REG:/ { match($0, /REG:[0-9]+/); registers = substr($0, RSTART + 4, RLENGTH - 4)
			match($0, /SHARED:[0-9]+/)
			print name, registers, substr($0, RSTART + 7, RLENGTH - 7) }'
}

# What ptxas -v said -> "MANGLED_NAME BYTES" spilled, for each kernel.
read_spills()
{
	awk '/Function properties for/ { name = $NF }
		/bytes spill stores/ { print name, $5 + $9 }'
}

plain_name()
{
	"$demangle" <<<"$1" | sed 's/(anonymous namespace):://g; s/^void //; s/(.*//'
}

check_spill()
{
	local name=$1 spill=$2 allowed
	allowed=$([ -z "$source" ] || names_after 'may spill' "$source")
	if [ "$spill" -gt 0 ] && ! grep -qE "^(${allowed:-none of them})\b" <<<"$name"; then
		complain "  $name spills"
	fi
}

# The table of one object, a line for each kernel. An object without its assembler's report has
# no spills, if it never touches local memory.
tabulate()
{
	local wgmma total=0 name gmma tma mufu locals regs shared spill
	wgmma=$([ -z "$source" ] || names_after 'wgmma in' "$source")
	"$cuobjdump" -sass "$object" | count_instructions | sort >"$work/counts"
	"$cuobjdump" -res-usage "$object" 2>&1 | read_resources | sort >"$work/resources"
	[ -n "$source" ] || awk '{ print $1, $5 }' "$work/counts" >"$work/spills"
	while read -r name gmma tma mufu locals regs shared spill; do
		name=$(plain_name "$name")
		printf '%-52s %5s %6s %7s %6s %6s %6s %6s\n' "$name" "$regs" "$spill" "$shared" \
			"$gmma" "$tma" "$mufu" "$locals"
		total=$((total + gmma))
		check_spill "$name" "$spill"
		if [ -n "$wgmma" ] && [ "$gmma" -eq 0 ] && grep -qE "^($wgmma)\b" <<<"$name"; then
			complain "  $name has no wgmma"
		fi
	done < <(join "$work/counts" "$work/resources" | join - "$work/spills")
	if [ -n "$source" ] && [ "$total" -eq 0 ] && grep -q 'wgmma_[a-z]*(' "$source"; then
		complain "  $source: no kernel has wgmma"
	fi
}

if [ ! -x "$nvcc" ]; then
	echo "nvcc is missing; skipped"
	exit 0
fi
if [ $# -eq 0 ]; then
	set -- kernels/hopper/*.cu
fi
if [ -x "$cuobjdump" ]; then
	printf '%-52s %5s %6s %7s %6s %6s %6s %6s\n' kernel regs spill shared gmma tma mufu local
else
	echo "cuobjdump is missing; only what the assembler says is checked"
fi
for file in "$@"; do
	object=$file source=
	if [[ $file == *.cu ]]; then
		object=$work/out.cubin source=$file
		if ! "$nvcc" -std=c++17 -O3 -I. -DWITH_CUDA -gencode arch=compute_90a,code=sm_90a \
			-Xptxas -v -cubin -o "$object" "$file" >"$work/log" 2>&1; then
			complain "$file: $(tail -n 20 "$work/log")"
			continue
		fi
		warnings=$(grep -E 'C75[0-9][0-9]' "$work/log") && complain "$warnings"
		read_spills <"$work/log" | sort >"$work/spills"
	fi
	if [ -x "$cuobjdump" ]; then
		tabulate
	elif [ -n "$source" ]; then
		while read -r name spill; do
			check_spill "$(plain_name "$name")" "$spill"
		done <"$work/spills"
	fi
done
exit "$failed"
