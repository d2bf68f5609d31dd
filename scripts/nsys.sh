#!/bin/sh
# Nsight Systems on one block, from the first timed operation on:
#
#   scripts/nsys.sh OPERATION [options of build/hybrid]
#   scripts/nsys.sh norm_linear --pattern rat:16 --pass prefill --seq-len 4096
#
# Captures from OPERATION's first NVTX range on and prints kernels and ranges
# by time. NSYS_OUT names the report (default: profile).
set -eu

build=${BUILD:-build}
report=${NSYS_OUT:-profile}
if [ $# -lt 1 ]; then
	sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
	exit 2
fi
if ! command -v nsys >/dev/null 2>&1; then
	echo "nsys (Nsight Systems) is not installed or not in PATH" >&2
	exit 1
fi
if [ ! -x "$build/hybrid" ]; then
	echo "$build/hybrid is missing: make CUDA=1 programs" >&2
	exit 1
fi
operation=$1
shift
# Ranges are pushed by name, not as registered strings.
NSYS_NVTX_PROFILER_REGISTER_ONLY=0 nsys profile --force-overwrite true --output "$report" \
	--trace cuda,nvtx --capture-range nvtx --nvtx-capture "$operation" \
	--capture-range-end stop-shutdown "$build/hybrid" --backend cuda --breakdown "$@"
nsys stats --report cuda_gpu_kern_sum,nvtx_sum "$report.nsys-rep"
