#!/bin/sh
# The CUDA kernels under compute-sanitizer: a share of the cases of every operation, or of one.
#
#   scripts/sanitize.sh [TOOL [SHARE [OPERATION [PROVIDER]]]]
#   scripts/sanitize.sh memcheck 0.1
#   scripts/sanitize.sh racecheck 0.05 'rat_scan*' portable
#   scripts/sanitize.sh memcheck 1 'attention*'
#
# Without arguments the first, then the portable kernels of every operation that mixes tokens under
# racecheck (2025.3), which fails within a cuBLASLt that it checks. And it does not follow an
# mbarrier that one thread arrives at for its warp, or a bulk copy that completes one: it reports
# the kernels of kernels/hopper that synchronize so, and what it says of them has to be read with
# that in mind. They are launched thousands of times and compared bit by bit as well
# (tests/gpu/test_repeat).
# Needs: make CUDA=1 tests
set -eu

build=${BUILD:-build}
if ! command -v compute-sanitizer >/dev/null 2>&1; then
	echo "compute-sanitizer is not installed or not in PATH" >&2
	exit 1
fi
if [ ! -x "$build/tests/test_operations" ]; then
	echo "$build/tests/test_operations is missing: make CUDA=1 tests" >&2
	exit 1
fi
if [ $# -eq 0 ]; then
	"$0" memcheck 0.1
	for operation in 'attention*' 'rat*' 'recurrence*' 'matrix*' 'rotate*' 'short_conv*'; do
		"$0" racecheck 0.05 "$operation" portable
	done
	exit 0
fi
# The libraries' kernels are theirs to check.
compute-sanitizer --tool "$1" --error-exitcode 1 \
	--kernel-name-exclude 'regex=(cudnn|nvjet|cutlass|cublas|sm90_xmma|sm80_xmma|gemm)' \
	"$build/tests/test_operations" cuda "${2:-0.1}" "${3:-*}" ${4:+"$4"}
