#!/bin/sh
# Builds the fuzz targets and runs each for a while.
#
#   tests/fuzz/run.sh FOLDER SECONDS
#
# Starts from tests/fuzz/corpus; what it finds goes to FOLDER. Ends with the line
# "N passed, N failed". Without clang's fuzzer library it says so and passes.
set -u

folder=$1
seconds=$2
root=$(dirname "$0")
flags="-std=c11 -g -O1 -I. -fno-omit-frame-pointer
	-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
passed=0
failed=0

mkdir -p "$folder"
# shellcheck disable=SC2086 # flags are words
if ! printf 'int LLVMFuzzerTestOneInput(const char *b, unsigned long n);
	int LLVMFuzzerTestOneInput(const char *b, unsigned long n) { return b && n > 9; }' |
	clang -x c - $flags -o "$folder/probe" 2>/dev/null; then
	echo "fuzz: clang with its fuzzer library is missing; skipped"
	exit 0
fi

# What each target is linked with.
sources_of() {
	case $1 in
	safetensors) echo bench/safetensors.c kernels/status.c -lcjson ;;
	csv) echo bench/harness/csv.c kernels/status.c ;;
	options) echo bench/harness/options.c layers/pattern.c kernels/status.c ;;
	esac
}

for target in safetensors csv options; do
	log=$folder/$target.log
	corpus=$folder/corpus-$target
	mkdir -p "$corpus"
	# shellcheck disable=SC2046,SC2086 # flags and sources are words
	if clang $flags "$root/fuzz_$target.c" $(sources_of "$target") -lm \
		-o "$folder/fuzz_$target" >"$log" 2>&1 &&
		"$folder/fuzz_$target" -max_total_time="$seconds" -max_len=4096 -timeout=10 \
			-rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="$folder/" \
			"$corpus" "$root/corpus/$target" >>"$log" 2>&1; then
		passed=$((passed + 1))
		runs=$(sed -n 's/^stat::number_of_executed_units: //p' "$log")
		echo "fuzz_$target: $runs inputs in $seconds s"
	else
		failed=$((failed + 1))
		echo "fuzz_$target: failed"
		tail -n 40 "$log"
	fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
