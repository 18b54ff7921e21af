#!/usr/bin/env bash
# The main job: demonstrations, arms trained on one sample budget, rollouts under memory modes, a report with intervals.
#
#   ./run_matrix.sh demo               # the whole experiment, small, on a laptop-class CPU: 45 minutes on 2 cores
#   ./run_matrix.sh smoke              # the same path with tiny numbers: 4 minutes, says nothing about success
#   ./run_matrix.sh fusion             # the demo's policy at three times its budget: where memory enters
#   ./run_matrix.sh bank               # the same with four hypotheses: what tells them apart, and which loss
#   ./run_matrix.sh full               # every arm, 3 seeds, the published checkpoint and data, four suites: for GPUs
#   ./run_matrix.sh PRESET --dry-run   # commands, budgets and time left, without installing or running anything
#   ./run_matrix.sh PRESET --prepare | --list | --cell NAME-OR-NUMBER | --report      # a piece at a time, for a scheduler
#
# A cell is one arm, budget and seed: trained, then rolled out; matrix.py runs them. What is done is skipped, what was
# interrupted goes on: call it again after a kill. A cell that fails is named at the end and does not stop the others.
#
# From the environment, lists separated by spaces:
#   TOTAL_SAMPLES SEEDS ARMS   what is trained; each budget gets a table. EVAL_AT="16000 32000": checkpoints at these
#                              samples are rolled out besides the last
#   SUITES TASKS EPISODES      what is rolled out: suites (SUITE will do too), tasks as in 0,3,5-7, starts a task
#   DATA INIT WORLD_STRIDE     data and initial policy; fusion and bank train on a DATA that is given as it is
#   DEMOS DISPLACE NOISE       how demonstrations are recorded
#   GPUS JOBS OUT FEATURES     a cell on each of GPUS="0 1 2 3", without it JOBS at once on the CPU; run folders; the
#                              frozen tower's tokens (FEATURES= does without)
#   DATA_FLAGS TRAIN_FLAGS EVAL_FLAGS   more flags, as a shell would split them: both of train.py, and of eval.py
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
set -a # matrix.py finds all that follows in its environment

# ---- arms: name | flags of train.py | memory modes rolled out, the arm's own first | arms that it is compared with
ARM_TABLE='
E2   | --fusion late --memory pred                                 | pred off zero    | E0 E1 E2c E2h
E0   | --fusion none                                               | off              | E0b
E1   | --fusion late --memory zero                                 | zero             | E0
E0b  | --fusion none --blind                                       | off              |
E2c  | --fusion late --memory current                              | current off zero |
E2h  | --fusion late --memory history                              | history off zero |
E2d  | --fusion late --memory pred --detach-memory                 | pred off zero    | E1
F2   | --fusion suffix_in --memory pred                            | pred off zero    | E0 E2 F2z
F3a  | --fusion prefix_tokens --prefix-block prefix --memory pred  | pred off zero    | E0 E2 F3az
F3as | --fusion prefix_tokens --prefix-block state --memory pred   | pred off zero    | E0 E2
F3b  | --fusion prefix_cross --memory pred                         | pred off zero    | E0 E2 F3bz
F2z  | --fusion suffix_in --memory zero                            | zero             |
F3az | --fusion prefix_tokens --prefix-block prefix --memory zero  | zero             |
F3bz | --fusion prefix_cross --memory zero                         | zero             |
B4dropout  | BANK dropout --prophet-dropout 0.1 --world-loss softmin | pred off zero best1 mean1 dup | E2
B4noise    | BANK noise --world-loss softmin                         | pred off zero best1 mean1 dup | E2
B4ensemble | BANK ensemble --world-loss softmin                      | pred off zero best1 mean1 dup | E2
B4mixture  | BANK mixture --world-loss softmin                       | pred off zero best1 mean1 dup | E2
B4single   | BANK ensemble --world-loss single                       | pred off zero best1 mean1 dup | E2
B4mean     | BANK ensemble --world-loss mean                         | pred off zero best1 mean1 dup | E2
B4min      | BANK ensemble --world-loss min                          | pred off zero best1 mean1 dup | E2
B4rwta     | BANK ensemble --world-loss rwta                         | pred off zero best1 mean1 dup | E2
'
ARM_TABLE=${ARM_TABLE//BANK/--fusion late --memory pred --num-hypotheses 4 --hypothesis-method}

# ---- presets: what the environment leaves open
preset=${1:-demo}
: "${SUITES:=${SUITE:-}}"
RECORDED=yes SAVE_EVERY='' MORE_MODES='' LOG_EVERY=80 PRESET_EVAL_FLAGS='' # MORE_MODES: of arms whose own mode is pred
case $preset in
demo) : "${TOTAL_SAMPLES:=64000}" "${EPISODES:=40}" "${DATA:=data/demo}" && SAVE_EVERY=16000 ;;
smoke)
    : "${TOTAL_SAMPLES:=96}" "${EPISODES:=1}" "${DATA:=data/smoke}" "${DEMOS:=2}"
    LOG_EVERY=2 PRESET_EVAL_FLAGS='--max-steps 24' ;;
fusion | bank)
    [ -z "${DATA:-}" ] || RECORDED=''
    [ $preset = bank ] || : "${ARMS:=E0 E0b E1 E2 F2 F3a F3b}"
    : "${ARMS:=E0 E2 B4dropout B4noise B4ensemble B4mixture B4single B4mean B4min B4rwta}"
    : "${TOTAL_SAMPLES:=192000}" "${EPISODES:=40}" "${DATA:=data/demo}" && SAVE_EVERY=48000 MORE_MODES='random signflip' ;;
full)
    : "${TOTAL_SAMPLES:=100000}" "${EPISODES:=10}" "${SEEDS:=0 1 2}" "${ARMS:=all}" "${DATA:=HuggingFaceVLA/libero}"
    : "${INIT:=HuggingFaceVLA/smolvla_libero}" "${SUITES:=libero_spatial libero_object libero_goal libero_10}"
    RECORDED='' MORE_MODES='random signflip' ;;
*) echo "run_matrix.sh: preset '$preset' is unknown: choose demo, smoke, fusion, bank or full" >&2 && exit 2 ;;
esac
# Recorded: a small object, displaced by up to 6 cm, on noisy paths, where a policy that does not see must fail.
[ -z "$RECORDED" ] || : "${SUITES:=libero_object}" "${TASKS:=1}" "${DEMOS:=60}" "${DISPLACE:=0.06}" "${NOISE:=0.15}"
: "${ARMS:=E2 E0 E1 E0b}" "${SEEDS:=0}" "${TASKS:=0-9}" "${INIT:=tiny}" "${WORLD_STRIDE:=4}" "${OUT:=runs/$preset}"
POLICY_FLAGS="--world-stride $WORLD_STRIDE --dtype bfloat16" # beside the recipe of INIT (smolvla/config.py)
[ "$INIT" != tiny ] || POLICY_FLAGS="--world-stride $WORLD_STRIDE --threads 1 --log-every $LOG_EVERY"

# ---- run: --dry-run and --list need no more than Python; all else the environment, once what is asked for is known
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "run_matrix.sh: $python is not Python 3.11 or later; name another: PYTHON=python3.12 $0 $preset" >&2 && exit 2; }
case ${2:-} in --dry-run | --list) ;; *) "$python" matrix.py "$preset" "${@:2}" --check && source setup.sh || exit ;; esac
exec "$python" matrix.py "$preset" "${@:2}"
