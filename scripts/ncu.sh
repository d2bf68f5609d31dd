#!/bin/sh
# Nsight Compute on one operation of one block:
#
#   scripts/ncu.sh OPERATION [options of build/hybrid]
#   scripts/ncu.sh attention --pattern rat:16 --pass prefill --seq-len 4096
#
# Profiles the kernels inside the operation's NVTX ranges, once per kernel, and
# prints the details; NCU_ARGS adds options, such as NCU_ARGS="-o report".
set -eu

build=${BUILD:-build}
if [ $# -lt 1 ]; then
	sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
	exit 2
fi
if ! command -v ncu >/dev/null 2>&1; then
	echo "ncu (Nsight Compute) is not installed or not in PATH" >&2
	exit 1
fi
if [ ! -x "$build/hybrid" ]; then
	echo "$build/hybrid is missing: make CUDA=1 programs" >&2
	exit 1
fi
operation=$1
shift
# Clocks are left as they are: locking them needs rights, and other figures are taken unlocked.
# shellcheck disable=SC2086
exec ncu --clock-control none --nvtx --nvtx-include "$operation/" --set basic \
	--section SpeedOfLight --section MemoryWorkloadAnalysis --launch-count 8 \
	${NCU_ARGS:-} "$build/hybrid" --backend cuda --breakdown "$@"
