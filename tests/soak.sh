#!/usr/bin/env bash
# Kills a training run at random moments, 50 times and more, and compares what it ends with to a run never killed.
#
#     bash tests/soak.sh                      # 60 kills: some 6 minutes on 2 cores
#     bash tests/soak.sh --kills 200 --seed 1
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source setup.sh
exec python tests/soak.py "$@"
