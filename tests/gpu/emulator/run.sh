#!/bin/sh
# Tests the portable CUDA kernels on a processor: every operation against the
# fp64 reference, several devices at once, the edges of the matrix recurrence's gradients, then the
# golden tensors. Needs the headers of the CUDA
# toolkit and the project built without CUDA, but neither a GPU nor a driver (FACTOR and OPERATION in
# the environment are test_operations':
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
cpp="-I$here -I. -isystem $toolkit -O2 -g -march=native -Wall -Wextra -Wno-unused-parameter -Werror"
# Shared memory is one array of bytes that every kernel sees as its own types.
cxx="g++ -std=c++17 $cpp -fno-strict-aliasing -Wno-unknown-pragmas -Wno-unused-function \
	-Wno-missing-field-initializers"
cc="gcc -std=c11 $cpp -DWITH_CUDA -fopenmp"
$cxx -c "$here/emulator.cpp" -o "$out/emulator.o"
for file in kernels/portable/*.cu; do
	$cxx -x c++ -c "$file" -o "$out/$(basename "$file" .cu).o"
done
for file in "$here/backend.c" kernels/device.c kernels/portable/kernels.c; do
	$cc -c "$file" -o "$out/$(echo "$file" | tr / _).o"
done
for test in test_devices test_matrix_backward; do
	$cc -o "$build/emulated_$test.o" -c "$here/$test.c"
done
link()
{
	program=$1
	shift
	g++ -fopenmp -o "$out/$program" "$@" "$out"/*.o "$build/libtests.a" "$build/libblocks.a" -lopenblas -lcmocka -lcjson -lm
}
link test_operations "$build/tests/test_operations.o"
link test_unknown "$build/tests/test_unknown.o"
link test_judgement "$build/tests/test_judgement.o"
link test_devices "$build/emulated_test_devices.o"
link test_matrix_backward "$build/emulated_test_matrix_backward.o"
link golden "$build"/bench/golden*.o "$build/bench/safetensors.o"
"$out/test_devices"
"$out/test_matrix_backward"
"$out/test_unknown" cuda
"$out/test_judgement" "${SEEDS:-1}" cuda test_blocks
"$out/test_operations" cuda "${FACTOR:-1}" "${OPERATION:-*}"
"$out/golden" --backend cuda --allow-unsupported tests/golden/*.safetensors
