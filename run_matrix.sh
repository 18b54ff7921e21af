#!/usr/bin/env bash
# The main job: demonstrations, arms trained on one sample budget, rollouts under memory modes, a report with intervals.
#
#   ./run_matrix.sh demo               # the whole experiment, small, on a laptop-class CPU
#   ./run_matrix.sh smoke              # the same path with tiny numbers: a minute, says nothing about success
#   ./run_matrix.sh site               # the study's first part: where memory enters, and whether prediction matters
#   ./run_matrix.sh bank               # its second: several futures of a task that two objects solve; either: less of it
#   ./run_matrix.sh transfer           # its third: does the sign hold on tasks of other suites?
#   ./run_matrix.sh full               # every arm, 3 seeds, the published checkpoint and data, four suites: for GPUs
#   ./run_matrix.sh PRESET --dry-run   # commands, budgets and time left, without installing or running anything
#   ./run_matrix.sh PRESET --prepare | --list | --cell NAME-OR-NUMBER | --report      # a piece at a time, for a scheduler
#
# A cell is one arm, budget and seed: trained, then rolled out, by matrix.py. What is done is skipped, what was interrupted
# goes on: call it again after a kill. A cell that fails is named and does not stop the others.
# From the environment, lists separated by spaces:
#   TOTAL_SAMPLES SEEDS ARMS   what is trained; a table a budget; ARMS="E2 F2:4": F2 with the first four seeds alone
#   EVAL_AT KEEP               checkpoints on the way that are rolled out; where finished cells' records are kept
#   SUITES TASKS EPISODES      what is rolled out: suites (SUITE will do too), tasks as in 0,3,5-7, starts: "40 20": 20 in other modes, earlier
#   DATA OFFLINE INIT WORLD_STRIDE   data (all but demo, smoke: as given), data to measure losses on alone; initial policy
#   DEMOS DISPLACE NOISE EITHER   how demonstrations are recorded
#   GPUS JOBS OUT FEATURES     a cell on each of GPUS="0 1", or JOBS at once; run folders; the frozen tower's tokens
#   DATA_FLAGS TRAIN_FLAGS EVAL_FLAGS   more flags, as a shell would split them: both of train.py, and of eval.py
set -aeuo pipefail # -a: matrix.py finds all that follows in its environment
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" || : && exit ;; esac # also into | head
cd "$(dirname "${BASH_SOURCE[0]}")"
# ---- arms: name | flags of train.py | memory modes rolled out, the arm's own first | arms that it is compared with
ARM_TABLE='
E2   | LATE pred                              | pred off zero shuffle | E0 E1s E2n E2c E2h E1
E0   | --fusion none                          | off                   | E0b
E1   | LATE zero                              | zero                  | E0
E0b  | --fusion none --blind                  | off                   |
E1s  | LATE shuffle                           | shuffle off           |
E1r  | LATE random                            | random off            |
E2n  | LATE pred --lambda-world 0             | pred                  |
E2c  | LATE current                           | current off zero      |
E2h  | LATE history                           | history off zero      |
E2d  | LATE pred --detach-memory              | pred                  | E1
E2m  | LATE pred --memory-dropout 0.2         | pred                  | E2
B4dup      | BANK repeat                      | pred                  |
'
for how in 'dropout --prophet-dropout 0.1' noise ensemble mixture; do ARM_TABLE+="B4${how%% *} | BANK $how | BANKED"$'\n'; done
for loss in single mean min rwta; do ARM_TABLE+="B4$loss | BANK ensemble --world-loss $loss | BANKED"$'\n'; done
for site in F2:suffix_in 'F3a:prefix_tokens --prefix-block prefix' 'F3as:prefix_tokens --prefix-block state' F3b:prefix_cross; do
    arm=${site%%:*} flags="--fusion ${site#*:} --memory" # each with its own controls: noise, no world loss, present, past, zeros
    ARM_TABLE+="$arm | $flags pred | pred | E0 E2 ${arm}r ${arm}n ${arm}c ${arm}h ${arm}z
${arm}r | $flags random | random off |
${arm}n | $flags pred --lambda-world 0 | pred |
${arm}z | $flags zero | zero |
${arm}c | $flags current | current off zero |
${arm}h | $flags history | history off zero |
"
done && unset arm flags how loss site
ARM_TABLE=${ARM_TABLE//LATE/--fusion late --memory} ARM_TABLE=${ARM_TABLE//BANKED/pred best1 mean1 dup | B4dup E2}
ARM_TABLE=${ARM_TABLE//BANK/--fusion late --memory pred --num-hypotheses 4 --hypothesis-method}
# ---- presets: what the environment leaves open
preset=${1:-demo} && : "${SUITES:=${SUITE:-}}"
RECORDED=yes SAVE_EVERY='' LOG_EVERY=80 PRESET_TRAIN_FLAGS='' PRESET_EVAL_FLAGS=''
MORE_MODES='off zero shuffle stale' # of arms whose own mode is pred, besides what the table says
case $preset in
demo) : "${TOTAL_SAMPLES:=40000}" "${EPISODES:=40}" "${DATA:=data/demo}" && SAVE_EVERY=10000 MORE_MODES='off zero' ;;
smoke) : "${TOTAL_SAMPLES:=96}" "${EPISODES:=1}" "${DATA:=data/smoke}" "${DEMOS:=2}" && LOG_EVERY=2 PRESET_EVAL_FLAGS='--max-steps 24' ;;
site | bank | transfer | either)
    [ -z "${DATA:-}" ] || RECORDED=''
    case $preset in
    site) : "${SEEDS:=0 1 2 3 4 5 6 7}" "${EVAL_AT=10000 20000}" "${DATA:=data/site}" \
        "${ARMS:=E0 E1s E2 E2n E2c:4 E2h:4 E2m:2 F2:4 F2n:4 F3a:4 F3an:4 F3as:4 F3asn:4 F3b:4 F3bn:4 E0b:2}" ;;
    bank) : "${SEEDS:=0 1 2 3}" "${ARMS:=E0 E2 E2n B4dropout B4noise B4ensemble B4mixture B4single B4dup}" ;;
    transfer) : "${SEEDS:=0 1 2 3}" "${ARMS:=E0 E2 E2n}" "${SUITES:=spatial goal}" "${DATA:=data/transfer}" ;;
    either) : "${ARMS:=E0 E2 E2n B4ensemble B4mixture B4dup}" "${KEEP=}" ;;
    esac
    [ -n "${DATA:-}" ] || : "${EITHER:=cream_cheese,milk}" "${DATA:=data/either}"
    : "${DISPLACE:=0.095}" "${TOTAL_SAMPLES:=40000}" "${EPISODES:=40 8}" "${KEEP=results/data/$preset}" "${OFFLINE=${RECORDED:+${DATA}_unseen}}"
    SAVE_EVERY=10000 MORE_MODES+=' gate:0.5 gate:1.5' PRESET_TRAIN_FLAGS='--dtype bfloat16' ;; # on every machine
full)
    : "${TOTAL_SAMPLES:=3200000}" "${EPISODES:=10}" "${SEEDS:=0 1 2}" "${ARMS:=all}" "${DATA:=HuggingFaceVLA/libero}"
    : "${INIT:=HuggingFaceVLA/smolvla_libero}" "${SUITES:=libero_spatial libero_object libero_goal libero_10}"
    RECORDED='' MORE_MODES+=' random signflip' PRESET_TRAIN_FLAGS='--lr-world 1e-3' ;; # else a gate reaches .08 at most
*) echo "run_matrix.sh: preset '$preset' is unknown: choose demo, smoke, site, bank, transfer, either or full" >&2 && exit 2 ;;
esac
[ -z "$RECORDED" ] || : "${SUITES:=libero_object}" "${TASKS:=1}" "${DEMOS:=60}" "${DISPLACE:=0.06}" "${NOISE:=0.15}"
: "${ARMS:=E2 E0 E2n E1 E0b}" "${SEEDS:=0}" "${TASKS:=0-9}" "${INIT:=tiny}" "${WORLD_STRIDE:=4}" "${OUT:=runs/$preset}"
POLICY_FLAGS="--world-stride $WORLD_STRIDE --dtype bfloat16 $PRESET_TRAIN_FLAGS" # beside the recipe of INIT (smolvla/config.py)
[ "$INIT" != tiny ] || POLICY_FLAGS="--world-stride $WORLD_STRIDE --threads 1 --log-every $LOG_EVERY $PRESET_TRAIN_FLAGS"

# ---- run: --dry-run and --list need no more than Python; all else the environment, once what is asked for is known
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "run_matrix.sh: $python is not Python 3.11 or later; name another: PYTHON=python3.12 $0 $preset" >&2 && exit 2; }
case ${2:-} in --dry-run | --list) ;; *) "$python" matrix.py "$preset" "${@:2}" --check && source setup.sh || exit ;; esac
exec "$python" matrix.py "$preset" "${@:2}"
