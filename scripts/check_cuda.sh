#!/usr/bin/env bash
# Compiles every CUDA file for sm_90a and reads what the assembler says: a warning of
# class C75xx (it has serialized wgmma) fails, and so do spills in kernels/hopper,
# whose kernels promise none. Ends with the line "N passed, N failed".
set -u

cd "$(dirname "$0")/.." || exit 1
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
if [ ! -x "$nvcc" ]; then
	echo "nvcc is missing; skipped"
	exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0
failed=0

# Names of the kernels that spill, from the assembler's report.
spilling()
{
	awk '/Function properties for/ { name = $NF }
		/bytes spill/ && !/ 0 bytes spill stores, 0 bytes spill loads/ { print name }' "$1"
}

# Why a file's log is not to be accepted; nothing if it is.
complaint()
{
	local file=$1 log=$2 code=$3
	if [ "$code" -ne 0 ]; then
		tail -n 20 "$log"
	else
		grep -E '\(?C75[0-9][0-9]\)?' "$log"
		[[ $file != kernels/hopper/* ]] || spilling "$log" | sed 's/^/spills: /'
	fi
}

for file in $(git ls-files '*.cu'); do
	log=$work/log
	"$nvcc" -std=c++17 -O3 -I. -DWITH_CUDA -gencode arch=compute_90a,code=sm_90a \
		-Xptxas -v -cubin -o "$work/out.cubin" "$file" >"$log" 2>&1
	reason=$(complaint "$file" "$log" $?)
	if [ -z "$reason" ]; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
		printf '%s\n%s\n' "$file" "$reason"
	fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
