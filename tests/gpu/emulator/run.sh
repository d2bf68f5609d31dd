#!/bin/sh
# Tests the portable CUDA kernels on a processor: every operation against the
# fp64 reference, then the golden tensors. Needs the headers of the CUDA
# toolkit and the project built without CUDA, but neither a GPU nor a driver:
#
#   make tests programs && tests/gpu/emulator/run.sh [BUILD_DIRECTORY]
set -eu

build=${1:-build}
toolkit=${CUDA_HOME:-/usr/local/cuda}/include
here=tests/gpu/emulator
out=$build/emulated
if [ ! -f "$toolkit/cuda_bf16.h" ] || [ "$(uname -m)" != x86_64 ]; then
	echo "skipped: emulation needs the CUDA toolkit's headers and an x86-64 processor"
	exit 0
fi
mkdir -p "$out"
cpp="-I$here -I. -isystem $toolkit -O2 -g -march=native -Wall -Wextra -Werror"
# Shared memory is one array of bytes that every kernel sees as its own types.
cxx="g++ -std=c++17 $cpp -fno-strict-aliasing -Wno-unknown-pragmas -Wno-unused-function \
	-Wno-unused-parameter -Wno-missing-field-initializers"
cc="gcc -std=c11 $cpp -DWITH_CUDA -fopenmp"
$cxx -c "$here/emulator.cpp" -o "$out/emulator.o"
for file in kernels/portable/*.cu; do
	$cxx -x c++ -c "$file" -o "$out/$(basename "$file" .cu).o"
done
for file in "$here/backend.c" kernels/backend.c kernels/cuda/kernels.c; do
	$cc -c "$file" -o "$out/$(echo "$file" | tr / _).o"
done
link()
{
	program=$1
	shift
	# What the list of kernels names and emulation lacks stays unresolved and unused.
	g++ -no-pie -fopenmp -Wl,--unresolved-symbols=ignore-all -o "$out/$program" "$@" \
		"$out"/*.o "$build/libblocks.a" -lopenblas -lcmocka -lcjson -lm
}
link test_operations "$build/tests/test_operations.o" "$build"/tests/operations_*.o \
	"$build/tests/support.o"
link golden "$build"/bench/golden*.o "$build/bench/safetensors.o"
"$out/test_operations" cuda
"$out/golden" --backend cuda tests/golden/*.safetensors
