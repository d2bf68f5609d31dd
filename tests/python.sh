#!/bin/sh
# Runs the tests of the Python package and of baselines/torch on the library of a build, where there
# are numpy and pytest. Those of baselines/torch are skipped without PyTorch.
#
#   tests/python.sh BUILD
python=${PYTHON:-python3}
export OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE=1
BLOCKS_LIBRARY=$(realpath "$1")/libblocks.so.0
export BLOCKS_LIBRARY

if ! "$python" -c 'import numpy, pytest' 2>/dev/null; then
	echo "tests of python/ are skipped: $python has no numpy or no pytest"
	exit 0
fi
exec "$python" -m pytest -q -p no:cacheprovider python/tests baselines/torch/tests
