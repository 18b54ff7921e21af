#!/usr/bin/env bash
# The main job: demonstrations, arms trained on one sample budget, rollouts under memory modes, a report with intervals.
#
#   ./run_matrix.sh demo             # the whole experiment, small, on a laptop-class CPU: 45 minutes on 2 cores
#   ./run_matrix.sh smoke            # the same path with tiny numbers: 4 minutes, says nothing about success
#   ./run_matrix.sh demo --dry-run   # the commands, without running them
#
# Every stage is skipped where its result is there and goes on where it was interrupted: call it again after a kill.
# A cell (one arm, seed and budget) that fails does not stop the others; it is named at the end, with exit code 1.
# From the environment: TOTAL_SAMPLES SEEDS ARMS SUITE TASKS DEMOS EPISODES DISPLACE NOISE DATA OUT JOBS (cells at once).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1

# ---- arms: name | flags of train.py | memory modes rolled out, the arm's own first
ARM_TABLE='
E2   | --fusion late --memory pred                                        | pred off zero
E0   | --fusion none                                                      | off
E1   | --fusion late --memory zero                                        | zero
E0b  | --fusion none --blind                                              | off
E2c  | --fusion late --memory current                                     | current off zero
E2h  | --fusion late --memory history                                     | history off zero
E2d  | --fusion late --memory pred --detach-memory                        | pred off zero
F2   | --fusion suffix_in --memory pred                                   | pred off zero
F3a  | --fusion prefix_tokens --prefix-block prefix --memory pred         | pred off zero
F3as | --fusion prefix_tokens --prefix-block state --memory pred          | pred off zero
F3b  | --fusion prefix_cross --memory pred                                | pred off zero
'

# ---- presets
preset=${1:-demo}
case ${2:-} in
'') dry= ;;
--dry-run) dry=1 ;;
*) echo "run_matrix.sh: '$2' is unknown: the only option is --dry-run" >&2; exit 2 ;;
esac
# The tiny policy trains whole (nothing is frozen), in small batches: at one budget of samples E0 solved 33 of 40
# starts with batches of 16, 26 with 32 and 25 with 64. Statistics are floored where demonstrations hardly move.
train_flags='--init tiny --freeze none --batch-size 16 --flow-draws 4 --lr 1e-3 --world-stride 4 --threads 1'
train_flags+=' --state-std-floor 0.01 --action-std-floor 0.05'
case $preset in
demo)
    : "${DEMOS:=60}" "${EPISODES:=40}" "${TOTAL_SAMPLES:=64000}"
    train_flags+=' --save-every 16000 --log-every 80'
    eval_flags=''
    ;;
smoke)
    : "${DEMOS:=2}" "${EPISODES:=1}" "${TOTAL_SAMPLES:=96}"
    train_flags+=' --log-every 2'
    eval_flags='--max-steps 24'
    ;;
*)
    echo "run_matrix.sh: preset '$preset' is unknown: choose demo or smoke" >&2
    exit 2
    ;;
esac
# A small object, displaced by up to 6 cm, on noisy paths: where a policy that does not see must fail.
: "${SUITE:=libero_object}" "${TASKS:=1}" "${DISPLACE:=0.06}" "${NOISE:=0.15}"
: "${SEEDS:=0}" "${ARMS:=E2 E0 E1 E0b}"
: "${DATA:=data/$preset}" "${OUT:=runs/$preset}" "${JOBS:=$(nproc)}"
demo_inits=0-9     # demonstrations start from these init states, rollouts from the others

# ---- helpers
started=$SECONDS
say() { printf '[%3d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
run() { say "$*"; [ -n "$dry" ] || "$@"; }
arm_field() { awk -F'|' -v arm="$1" -v field="$2" '{name = $1; gsub(/ /, "", name); if (name == arm) print $field}' <<<"$ARM_TABLE"; }

cell() {  # one arm at one budget and seed: train, then roll out; its output goes to a log beside the run
    local arm=$1 budget=$2 seed=$3 folder=$OUT/$1-n$2-s$3
    # The table's flags are meant to be split into words.
    # shellcheck disable=SC2046,SC2086
    run python train.py --arm "$arm" --data "$DATA" --out "$folder" --total-samples "$budget" --seed "$seed" \
        $train_flags $(arm_field "$arm" 2) &&
        run python eval.py "$folder" --memory $(arm_field "$arm" 3) --episodes-per-task "$EPISODES" --num-envs 1 $eval_flags
}

# ---- the job
for arm in $ARMS; do
    [ -n "$(arm_field "$arm" 1)" ] || { echo "run_matrix.sh: arm '$arm' is not in the table" >&2; exit 2; }
done
[ -n "$dry" ] || { source setup.sh && mkdir -p "$OUT"; } || exit 1
run python demos.py --suite "$SUITE" --task-ids "$TASKS" --demos-per-task "$DEMOS" --init-states "$demo_inits" \
    --displace "$DISPLACE" --noise "$NOISE" --size 128 --draw fast --reset soft --workers "$JOBS" --out "$DATA" || exit 1
run python world.py cache "$DATA" || exit 1

failed=()
declare -A name_of=()  # process -> cell
stop() {
    for pid in "${!name_of[@]}"; do pkill -P "$pid"; kill "$pid"; done 2>/dev/null
    echo "run_matrix.sh: interrupted; the same command goes on from here" >&2
    exit 130
}
trap stop INT TERM
tell() {  # once a minute, the last line of each log that moved
    while sleep 60; do
        find "$OUT" -maxdepth 1 -name '*.log' -newermt '-60 seconds' | sort | while read -r log; do
            say "$(basename "$log" .log): $(tail -n 1 "$log" | cut -c1-150)"
        done
    done
}
reap() {  # wait for one cell and note how it ended
    local pid code
    wait -n -p pid "${!name_of[@]}"; code=$?
    if [ $code -eq 0 ]; then say "done: ${name_of[$pid]}"; else say "FAILED: ${name_of[$pid]}"; failed+=("${name_of[$pid]}"); fi
    unset "name_of[$pid]"
}
hush() { kill "$teller"; pkill -P "$teller"; wait "$teller"; } 2>/dev/null  # the shell would report both
if [ -z "$dry" ]; then tell & teller=$!; trap hush EXIT; fi
for budget in $TOTAL_SAMPLES; do
    for seed in $SEEDS; do
        for arm in $ARMS; do
            if [ -n "$dry" ]; then cell "$arm" "$budget" "$seed"; continue; fi
            [ ${#name_of[@]} -lt "$JOBS" ] || reap
            name=$arm-n$budget-s$seed
            say "begin: $name, log in $OUT/$name.log"
            cell "$arm" "$budget" "$seed" >>"$OUT/$name.log" 2>&1 &
            name_of[$!]=$name
        done
    done
done
while [ ${#name_of[@]} -gt 0 ]; do reap; done

run python report.py "$OUT" || failed+=(report)
if [ ${#failed[@]} -gt 0 ]; then
    echo "run_matrix.sh: failed: ${failed[*]} (see the logs in $OUT)" >&2
    exit 1
fi
say "report: $OUT/report/report.html"
