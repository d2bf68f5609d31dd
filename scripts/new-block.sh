#!/usr/bin/env bash
# Begins a block: a layer of the linear-attention family under a new name.
#
#   scripts/new-block.sh NAME ["what it is, in a line"]
#
# Writes layers/NAME.c, which compiles and runs as it is, and enters NAME where blocks are listed:
# the registry, the programs of the Makefile, the patterns of make compare. Then
# `make build/NAME && build/NAME`, and the tests of layers take it, too.
set -eu

cd "$(dirname "$0")/.."
name=${1:-} summary=${2:-"a block of the linear-attention family"}
if [[ ! $name =~ ^[a-z][a-z0-9_]*$ || $# -gt 2 ]]; then
	sed -n '4s/^# *//p' "$0" >&2
	echo "NAME has small letters, digits and underscores, and begins with a letter" >&2
	exit 2
fi
file=layers/$name.c
if [ -e "$file" ] || [ -e "bench/$name.c" ] || grep -qE "entry\($name\)" layers/registry.c; then
	echo "$name is taken" >&2
	exit 1
fi
if [[ $summary == *[\"\\]* || $summary == *'*/'* ]]; then
	echo "the summary becomes a string in C: no quotes, no backslashes" >&2
	exit 2
fi

cat >"$file" <<END
/*
 * ${name^}: $summary. S_t = S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(d), then a per-head norm.
 * InProj's columns are q, k, v (D each). The choices below are those of
 * layers/linear_family.h; state here the equations and the paper that they are from.
 */
#include "layers/linear_family.h"

static const struct family_member $name = {
        .decay = DECAY_NONE,
        .input = INPUT_AS_IS,
        .output = OUTPUT_NORM,
        .key_part = 1,
        .value_factor = 1,
        .golden = {{"q_proj.weight", COLUMN_Q},
                   {"k_proj.weight", COLUMN_K},
                   {"v_proj.weight", COLUMN_V}},
};

const struct layer_class ${name}_layer = {.name = "$name",
                                        .summary = "$summary",
                                        .arguments = FAMILY_ARGUMENTS,
                                        .family = &$name,
                                        FAMILY_FUNCTIONS};
END
if command -v clang-format >/dev/null 2>&1; then
	clang-format -i "$file"
fi

# The last entry of the registry gets a successor.
last=$(grep -nE '^	entry\(' layers/registry.c | tail -n 1 | cut -d: -f1)
sed -i "${last}s/\$/ \\\\\\n\\tentry($name)/" layers/registry.c
sed -i -E "s/^(FAMILY := .*)\$/\1 $name/" Makefile
sed -i -E "s/^(PATTERNS=\\$\{PATTERNS:-.*)\}\$/\1 $name}/" bench/compare.sh

cat <<END
$file, and $name in layers/registry.c, Makefile and bench/compare.sh
next: make build/$name && build/$name --preset tiny
      make build/tests/test_layers && build/tests/test_layers
then the choices in $file, tests/golden/layer_$name.safetensors from somebody else's code,
and a paragraph in docs/models.md (docs/adding-a-block.md)
END
