#!/bin/sh
# The tests and the linter. MAMMOGRAM_DIR and CBIS_CASE_DIR name folders of real data; tests that need them skip without.
set -eu
cd "$(dirname "$0")"
extra=requirements-test.txt
. ./setup.sh
ruff check .
ruff format --check .
python -m pytest -q "$@"
