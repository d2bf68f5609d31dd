#!/usr/bin/env bash
# Compiles every CUDA file for sm_90a and reads what the assembler says: a warning of
# class C75xx (it has serialized wgmma) fails, and so does a broken promise of kernels/hopper
# (scripts/sass.sh). What only compiles within a checkout of FlashAttention-3 is left out.
# Ends with the line "N passed, N failed".
set -u

cd "$(dirname "$0")/.." || exit 1
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
if [ ! -x "$nvcc" ]; then
	echo "nvcc is missing; skipped"
	exit 0
fi
NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} $(scripts/nvcc_host.sh "$nvcc" 2>/dev/null)"
export NVCC_APPEND_FLAGS
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0
failed=0

# Compiles a file; says what is wrong with it, if anything.
complaint()
{
	"$nvcc" -std=c++17 -O3 -I. -DWITH_CUDA -gencode arch=compute_90a,code=sm_90a \
		-Xptxas -v -cubin -o "$work/out.cubin" "$1" >"$work/log" 2>&1 ||
		{ tail -n 20 "$work/log"; return 1; }
	! grep -E '\(?C75[0-9][0-9]\)?' "$work/log"
}

for file in $(git ls-files '*.cu' ':!baselines/flash3/shim'); do
	case $file in
	kernels/hopper/*) scripts/sass.sh "$file" ;;
	*) complaint "$file" ;;
	esac >"$work/said" 2>&1 && passed=$((passed + 1)) || {
		failed=$((failed + 1))
		echo "$file"
	}
	cat "$work/said"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
