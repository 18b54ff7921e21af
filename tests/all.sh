#!/usr/bin/env bash
# Runs every check: setup, lint, format, and all tests (simulator and multi-process ones too).
#
#     bash tests/all.sh
#
# All of them run even if one fails; the exit status says whether all passed. The fast tests alone: pytest
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source setup.sh || exit 1

failed=()
ruff check . || failed+=("ruff check")
ruff format --check . || failed+=("ruff format")
# Two at a time, a file's tests in one process, since they share what they make; one thread each. In the folders' order:
# by their number of tests, files with few and long ones would come last, on one core.
OMP_NUM_THREADS=1 python -m pytest -m '' -n 2 --dist loadfile --no-loadscope-reorder --durations=15 || failed+=("pytest")

if [ ${#failed[@]} -gt 0 ]; then
    echo "tests/all.sh: failed: $(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi
