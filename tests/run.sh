#!/bin/sh
# Runs cmocka programs one after another, shows the output of those that fail,
# and ends with the line "N passed, N failed".
# Threads that wait leave the processor to those that work: there may be more of them than cores.
export OMP_WAIT_POLICY=passive

passed=0
failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Sum of the numbers that cmocka prints after a tag, over all groups of a program.
count() {
	sed -n "s/^\[  $1  *\] \([0-9][0-9]*\) test.*/\1/p" "$log" |
		awk '{ n += $1 } END { print n + 0 }'
}

for program in "$@"; do
	timeout 900 "$program" >"$log" 2>&1
	code=$?
	good=$(count PASSED)
	bad=$(count FAILED)
	# A program that died, or that ran nothing, has failed whatever it printed.
	if [ "$bad" -eq 0 ] && { [ "$code" -ne 0 ] || [ "$good" -eq 0 ]; }; then
		bad=1
	fi
	printf '%-36s %4d passed %4d failed\n' "$program" "$good" "$bad"
	if [ "$bad" -ne 0 ]; then
		grep -v '^\[ RUN      \]\|^\[       OK \]' "$log"
		echo "$program: exit code $code"
	fi
	passed=$((passed + good))
	failed=$((failed + bad))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
