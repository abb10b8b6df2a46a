#!/bin/sh
# The tests and the linter. MAMMOGRAM_DIR, CBIS_CASE_DIR and DETECTOR_DIR name folders of real data; tests that need them skip without.
set -eu
cd "$(dirname "$0")"
extra=requirements-test.txt
. ./setup.sh
ruff check .
ruff format --check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a thread for each of the processes that share the tests
python -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
