#!/usr/bin/env bash
# The main job: demonstrations, arms trained on one sample budget, rollouts under memory modes, a report with intervals.
#
#   ./run_matrix.sh demo               # the whole experiment, small, on a laptop-class CPU: 45 minutes on 2 cores
#   ./run_matrix.sh smoke              # the same path with tiny numbers: 4 minutes, says nothing about success
#   ./run_matrix.sh fusion             # the demo's policy at three times its budget: where memory enters
#   ./run_matrix.sh bank               # the same with four hypotheses: what tells them apart, and which loss
#   ./run_matrix.sh full               # every arm, 3 seeds, the published checkpoint and data, four suites: for GPUs
#   ./run_matrix.sh PRESET --dry-run   # commands, budgets and estimated time, without running anything
#   ./run_matrix.sh PRESET --prepare | --list | --cell NAME-OR-NUMBER | --report      # a piece at a time, for a scheduler
#
# A cell is one arm, budget and seed: trained, then rolled out. What is done is skipped and what was interrupted goes on:
# call it again after a kill. A cell that fails does not stop the others; it is named at the end, with exit code 1.
#
# From the environment, lists separated by spaces:
#   TOTAL_SAMPLES SEEDS ARMS   what is trained; each budget gets a table. EVAL_AT="16000 32000": checkpoints at these
#                              samples are rolled out besides the last
#   SUITES TASKS EPISODES      what is rolled out: suites (SUITE will do too), tasks as in 0,3,5-7, starts a task
#   DATA INIT WORLD_STRIDE     data and initial policy; fusion and bank train on a DATA that is given as it is
#   DEMOS DISPLACE NOISE       how demonstrations are recorded
#   GPUS JOBS OUT FEATURES     a cell on each of GPUS="0 1 2 3", without it JOBS at once on the CPU; run folders; the frozen
#                              tower's tokens (FEATURES= does without)
#   DATA_FLAGS TRAIN_FLAGS EVAL_FLAGS   more flags: of caches and train.py alike, of train.py, of eval.py
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
F2z  | --fusion suffix_in --memory zero                                   | zero
F3az | --fusion prefix_tokens --prefix-block prefix --memory zero         | zero
F3bz | --fusion prefix_cross --memory zero                                | zero
B4dropout  | BANK --hypothesis-method dropout --prophet-dropout 0.1 --world-loss softmin | pred off zero best1 mean1 dup
B4noise    | BANK --hypothesis-method noise --world-loss softmin          | pred off zero best1 mean1 dup
B4ensemble | BANK --hypothesis-method ensemble --world-loss softmin       | pred off zero best1 mean1 dup
B4mixture  | BANK --hypothesis-method mixture --world-loss softmin        | pred off zero best1 mean1 dup
B4single   | BANK --hypothesis-method ensemble --world-loss single        | pred off zero best1 mean1 dup
B4mean     | BANK --hypothesis-method ensemble --world-loss mean          | pred off zero best1 mean1 dup
B4min      | BANK --hypothesis-method ensemble --world-loss min           | pred off zero best1 mean1 dup
B4rwta     | BANK --hypothesis-method ensemble --world-loss rwta          | pred off zero best1 mean1 dup
'
ARM_TABLE=${ARM_TABLE//BANK/--fusion late --memory pred --num-hypotheses 4}
all_arms=$(awk -F'|' 'NF == 3 {print $1}' <<<"$ARM_TABLE" | xargs)
fusion_arms='E0 E0b E1 E2 F2 F3a F3b'
bank_arms='E0 E2 B4dropout B4noise B4ensemble B4mixture B4single B4mean B4min B4rwta'

# ---- presets
die() { echo "run_matrix.sh: $*" >&2; exit 2; }
preset=${1:-demo} action=${2:-} only=${3:-}
case $action in
'' | --dry-run | --list | --prepare | --report) ;;
--cell) [ -n "$only" ] || die "--cell needs a name or number: '$0 $preset --list' prints them, a line each" ;;
*) die "'$action' is unknown: choose --dry-run, --list, --prepare, --cell NAME or --report, or nothing for all" ;;
esac
dry=; [ "$action" != --dry-run ] || dry=1
: "${SUITES:=${SUITE:-}}"
save_every='' eval_flags='' more_modes='' features='' recorded=1 tiny_flags='--log-every 80'
case $preset in
demo)
    : "${DEMOS:=60}" "${EPISODES:=40}" "${TOTAL_SAMPLES:=64000}" "${DATA:=data/demo}"
    save_every=16000
    ;;
smoke)
    : "${DEMOS:=2}" "${EPISODES:=1}" "${TOTAL_SAMPLES:=96}" "${DATA:=data/smoke}"
    tiny_flags='--log-every 2' eval_flags='--max-steps 24'
    ;;
fusion | bank)
    [ -z "${DATA:-}" ] || recorded=
    arms=${preset}_arms
    : "${DEMOS:=60}" "${EPISODES:=40}" "${TOTAL_SAMPLES:=192000}" "${ARMS:=${!arms}}" "${DATA:=data/demo}"
    save_every=48000 more_modes='random signflip'
    ;;
full)
    : "${EPISODES:=10}" "${TOTAL_SAMPLES:=100000}" "${SEEDS:=0 1 2}" "${ARMS:=$all_arms}"
    : "${DATA:=HuggingFaceVLA/libero}" "${INIT:=HuggingFaceVLA/smolvla_libero}"
    : "${SUITES:=libero_spatial libero_object libero_goal libero_10}"
    recorded='' more_modes='random signflip'
    ;;
*) die "preset '$preset' is unknown: choose demo, smoke, fusion, bank or full" ;;
esac
: "${ARMS:=E2 E0 E1 E0b}" "${SEEDS:=0}" "${EVAL_AT:=}" "${INIT:=tiny}" "${WORLD_STRIDE:=4}" "${OUT:=runs/$preset}"
: "${DATA_FLAGS:=}" "${TRAIN_FLAGS:=}" "${EVAL_FLAGS:=}"
if [ -n "$recorded" ]; then
    # A small object, displaced by up to 6 cm, on noisy paths: where a policy that does not see must fail.
    : "${SUITES:=libero_object}" "${TASKS:=1}" "${DISPLACE:=0.06}" "${NOISE:=0.15}"
    demo_inits=0-9  # demonstrations start from these init states, rollouts from the others
else
    [ -n "$SUITES" ] || die "DATA=$DATA is given: say what to roll out as well, as in SUITES='libero_object libero_goal'"
    : "${TASKS:=0-9}"
fi
SUITES=$(for suite in $SUITES; do echo "libero_${suite#libero_}"; done | xargs)

# ---- devices
read -ra devices <<<"${GPUS:-}"
cores=$(env -u OMP_NUM_THREADS nproc)  # nproc answers with OMP_NUM_THREADS where it is set
[ ${#devices[@]} -eq 0 ] || : "${JOBS:=${#devices[@]}}"
[ "$INIT" != tiny ] || : "${JOBS:=$cores}"
: "${JOBS:=1}"
share=$((cores / JOBS > 0 ? cores / JOBS : 1))  # of the cores, for each cell

# ---- flags
if [ "$INIT" = tiny ]; then
    # The tiny policy trains whole (nothing is frozen), in small batches: at one budget of samples E0 solved 33 of 40
    # starts with batches of 16, 26 with 32 and 25 with 64. Statistics are floored where demonstrations hardly move.
    train_flags="--init tiny --freeze none --batch-size 16 --flow-draws 4 --lr 1e-3 --world-stride $WORLD_STRIDE --threads 1"
    train_flags+=" --state-std-floor 0.01 --action-std-floor 0.05 $tiny_flags"
    batch=16 envs=1 guess_rate=100 guess_each=8 guess_for='a CPU core'
else
    # A checkpoint: batch size and learning rate are train.py's, all but the expert is frozen, and its tower's tokens are
    # computed once. Neither threads nor environments change what comes out, but for last bits.
    train_flags="--init $INIT --dtype bfloat16 --world-stride $WORLD_STRIDE --threads $share"
    eval_flags+=" --threads $share"
    features=${FEATURES-data/features_${DATA//\//_}_${INIT//\//_}}
    batch=64 envs=$share guess_rate=200 guess_each=30 guess_for='a GPU, unmeasured'
fi
if [ -n "$EVAL_AT" ]; then  # the largest step that meets them all
    save_every=0
    for at in $EVAL_AT; do
        [[ $at =~ ^[1-9][0-9]*$ ]] && ((at % batch == 0)) || die "EVAL_AT '$at' is no multiple of the batch size, $batch"
        while ((at)); do ((rest = save_every % at, save_every = at, at = rest)); done  # their greatest common divisor
    done
fi
[ -z "$save_every" ] || train_flags+=" --save-every $save_every"
if [ -z "$recorded" ] || [ "${SUITES// /}" != "$SUITES" ]; then eval_flags+=" --suite $SUITES"; fi

# ---- helpers
started=$SECONDS
say() { printf '[%3d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }
run() { say "$*"; [ -n "$dry" ] || "$@"; }
arm_field() { awk -F' *[|]' -v arm="$1" -v field="$2" '$1 == arm {print $field}' <<<"$ARM_TABLE"; }
modes() { local own; own=$(arm_field "$1" 3); case $own in ' pred'*) own+=" $more_modes" ;; esac; echo $own; }
task_ids() { for part in ${TASKS//,/ }; do seq "${part%-*}" "${part#*-}"; done | xargs; }
[ -n "$recorded" ] || eval_flags+=" --task-ids $(task_ids)"
early() { for at in $EVAL_AT; do [ "$at" -ge "$budget" ] || echo "$at"; done; }
parts() { arm=${1%%-n*} budget=${1##*-n} seed=${1##*-s} budget=${budget%-s*}; }

spent() { grep -qsE "\"samples\": $budget\b" "$folder/last/state.json"; }  # a training that got SIGTERM ends well before
rolled() { [ -e "$folder/episodes.jsonl" ]; }
once() {  # TEST COMMAND...: run it, unless the run's list says that this very line ended well, and TEST that it is done
    local test=$1; shift
    if "$test" && grep -qxFs -- "$*" "$folder/finished.txt"; then say "done before: $*"; return 0; fi
    run "$@" || return 1
    [ -z "$dry" ] || return 0
    "$test" || { say "stopped before its end; the same command goes on: $*"; return 1; }
    echo "$*" >>"$folder/finished.txt"
}
lock() {  # PATH [--nonblock]: held until this shell and what it starts end
    [ -z "$dry" ] && command -v flock >/dev/null || return 0
    mkdir -p "$(dirname "$1")" && exec 9>"$1.lock" && flock ${2:-} 9
}
see() { [ -z "$1" ] || export HIP_VISIBLE_DEVICES="$1" CUDA_VISIBLE_DEVICES="$1"; }  # ROCm's name and CUDA's

# Flags are meant to be split into words; a body in ( ) keeps to itself what it sets.
# shellcheck disable=SC2046,SC2086
prepare() (  # what cells share: data and caches; where all is there, it only looks
    launch=python
    if [ -n "$recorded" ]; then  # several suites share the folder: their files are named after their tasks
        lock "$DATA" || return
        for suite in $SUITES; do
            run python -m simulator record --suite "$suite" --task-ids "$TASKS" --demos-per-task "$DEMOS" \
                --init-states "$demo_inits" --displace "$DISPLACE" --noise "$NOISE" --size 128 --draw fast --reset soft \
                --workers "$JOBS" --out "$DATA" || return 1
        done
    fi
    see "$(IFS=,; echo "${devices[*]}")"
    [ ${#devices[@]} -lt 2 ] || launch="torchrun --standalone --nproc-per-node ${#devices[@]}"
    run python train.py --prepare --data "$DATA" --fusion late $DATA_FLAGS || return 1
    [ -z "$features" ] ||
        run $launch train.py --prepare --data "$DATA" --init "$INIT" --dtype bfloat16 --features "$features" $DATA_FLAGS
)

# shellcheck disable=SC2046,SC2086
cell() (  # NAME DEVICE: train, then roll out; code 75 where another process is at it
    parts "$1"; see "$2"
    folder=$OUT/$1 tokens=()
    lock "$folder" --nonblock || { say "another process is at $1"; return 75; }
    case $(arm_field "$arm" 2) in
    *--blind*) ;;  # its mean picture needs the pictures
    *) [ -z "$features" ] || tokens=(--features "$features") ;;
    esac
    once spent python train.py --arm "$arm" --data "$DATA" --out "$folder" --total-samples "$budget" \
        --seed "$seed" $train_flags "${tokens[@]}" $(arm_field "$arm" 2) $DATA_FLAGS $TRAIN_FLAGS || return 1
    for at in last $(early); do
        checkpoint=$folder
        if [ "$at" != last ]; then
            checkpoint=$(grep -lsE "\"samples\": $at\b" "$folder"/step_*/state.json | xargs -r dirname)
            [ -z "$dry" ] || checkpoint=$folder/step_$(printf %06d $((at / batch)))
            [ -n "$checkpoint" ] || { say "$folder has no checkpoint of $at samples: choose another OUT"; return 1; }
        fi
        once rolled python eval.py "$checkpoint" --memory $(modes "$arm") --episodes-per-task "$EPISODES" \
            --num-envs "$envs" $eval_flags $EVAL_FLAGS || return 1
    done
)

# ---- estimates
measured() {  # GUESS KEY ARM FILE...: the median of KEY in files of runs from this INIT, this arm's if there are any
    local guess=$1 key=$2 arm=$3 all found file value; shift 3
    all=$(for file; do ! grep -qsF "\"init\": \"$INIT\"" "${file%/*}/config.json" || echo "$file"; done)
    for found in "$(grep "/$arm-n" <<<"$all")" "$all"; do
        value=$(xargs -r -d '\n' grep -hos "\"$key\": [0-9.e+-]*" <<<"$found" | cut -d' ' -f2 | sort -g |
            awk '{x[NR] = $1} END {if (NR) printf "%.1f", x[int((NR + 1) / 2)]}')
        [ -z "$value" ] || { echo "$value (measured)"; return; }
    done
    echo "$guess (assumed for $guess_for)"
}
estimate() (  # NAME: minutes left, by what was measured on earlier runs, or by what is assumed
    parts "$1"; folder=$OUT/$1
    wanted=$((EPISODES * $(modes "$arm" | wc -w) * $(task_ids | wc -w) * $(wc -w <<<"$SUITES") * (1 + $(early | wc -w))))
    there=$(cat "$folder/episodes.jsonl" 2>/dev/null | wc -l)
    samples=$(grep -hos '"samples": [0-9]*' "$folder/last/state.json" | cut -d' ' -f2) samples=${samples:-0}
    rate=$(measured "$guess_rate" samples_per_second "$arm" "$OUT"/*/metrics.jsonl runs/*/*/metrics.jsonl)
    each=$(measured "$guess_each" seconds "$arm" "$OUT"/*/episodes.jsonl)  # of OUT alone: step limits differ elsewhere
    awk '{printf "%8.1f min left: ", ($1 / $2 + ($3 > 0) * $3 * $4 / $5) / 60}' \
        <<<"$((budget - samples)) ${rate%% *} $((wanted - there)) ${each%% *} $envs"
    echo "$1 has $samples of $budget samples, $there of $wanted episodes; $rate samples/s, $each s an episode"
)

# ---- the job
for arm in $ARMS; do [ -n "$(arm_field "$arm" 1)" ] || die "arm '$arm' is not in the table"; done
cells=()
for budget in $TOTAL_SAMPLES; do for seed in $SEEDS; do for arm in $ARMS; do cells+=("$arm-n$budget-s$seed"); done; done; done
case $action in
--list) printf '%s\n' "${cells[@]}"; exit 0 ;;
--cell)
    mapfile -t cells < <(printf '%s\n' "${cells[@]}" | awk -v only="$only" 'only == $0 || only == NR "" {print}')
    [ ${#cells[@]} -eq 1 ] || die "cell '$only' is not in the list: '$0 $preset --list' prints it"
    ;;
--dry-run)
    prepare
    for name in "${cells[@]}"; do cell "$name" "${devices[0]:-}"; done
    run python -m report "$OUT"
    for name in "${cells[@]}"; do estimate "$name"; done | awk -v jobs="$JOBS" '{print; minutes += $1} END {
        hours = minutes / 60
        printf "%d cells, %.1f h of work, %d at a time: %.1f h", NR, hours, jobs, hours / (jobs < NR ? jobs : NR)
        print ", without data and caches"}'
    exit 0
    ;;
esac
source setup.sh && mkdir -p "$OUT" || exit 1
[ "$action" != --report ] || { run python -m report "$OUT"; exit; }

failed=() free=()
declare -A name_of=() device_of=()  # of a process
fell() { local children; children=$(pgrep -P "$1"); kill "$1"; for child in $children; do fell "$child"; done; }
stop() {
    for pid in "${!name_of[@]}"; do fell "$pid"; done 2>/dev/null
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
reap() {  # wait for one process, note how it ended, and free its device
    local pid
    wait -n -p pid "${!name_of[@]}"
    case $? in
    0) say "done: ${name_of[$pid]}" ;;
    75) say "skipped, another process is at it: ${name_of[$pid]}" ;;
    *) say "FAILED: ${name_of[$pid]}"; failed+=("${name_of[$pid]}") ;;
    esac
    free+=("${device_of[$pid]}")
    unset "name_of[$pid]" "device_of[$pid]"
}
hush() { fell "$teller"; wait "$teller"; } 2>/dev/null  # the shell would report both

if [ "$action" != --cell ]; then
    prepare & name_of[$!]='data and caches' device_of[$!]=
    reap
    [ -z "$action" ] && [ ${#failed[@]} -eq 0 ] || exit ${#failed[@]}
    tell & teller=$!; trap hush EXIT
fi
free=()  # JOBS places, on the devices in turn
while [ ${#free[@]} -lt "$JOBS" ]; do free+=("${devices[${#devices[@]} ? ${#free[@]} % ${#devices[@]} : 0]:-}"); done
for name in "${cells[@]}"; do
    [ ${#free[@]} -gt 0 ] || reap
    device=${free[0]} free=("${free[@]:1}")
    if [ "$action" = --cell ]; then cell "$name" "$device" & else
        say "begin: $name${device:+ on device $device}, log in $OUT/$name.log"
        cell "$name" "$device" >>"$OUT/$name.log" 2>&1 &
    fi
    name_of[$!]=$name device_of[$!]=$device
done
while [ ${#name_of[@]} -gt 0 ]; do reap; done

[ "$action" = --cell ] || run python -m report "$OUT" || failed+=(report)
[ "$action" = --cell ] || hint=" (see the logs in $OUT)"
[ ${#failed[@]} -eq 0 ] || { echo "run_matrix.sh: failed: ${failed[*]}${hint:-}" >&2; exit 1; }
[ "$action" = --cell ] || say "report: $OUT/report/report.html"
