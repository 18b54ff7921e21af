"""The main job: what it would run, what it refuses, and the whole path once, at the smallest numbers."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

import matrix as program
from files import Refused
from report import reading, stats
from train import TrainConfig

ROOT = Path(__file__).parent.parent
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PYTHON = Path(sys.executable).parent  # where `python` is this one


EPISODE = {
    **{"suite": "libero_object", "task_id": 1, "memory": "pred", "checkpoint": "step_000006", "crash": None},
    **{"steps": 100, "samples": 96, "protocol": {"draw": "fast", "control_hz": 20}},
}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def settings(folder: Path, preset: str, **environment: str) -> dict[str, str]:
    """What run_matrix.sh hands to matrix.py: its own last line, with a `python` that says what it sees."""
    witness = folder / "witness"
    witness.write_text('#!/bin/sh\n[ "$1" = -c ] || exec env -0\n')
    witness.chmod(0o755)
    env = os.environ | {"PYTHON": str(witness)} | environment
    found = subprocess.run(
        [ROOT / "run_matrix.sh", preset, "--list"], capture_output=True, text=True, env=env
    )
    assert found.returncode == 0, found.stderr
    return dict(line.split("=", 1) for line in found.stdout.split("\0") if line)


@pytest.fixture
def matrix(tmp_path_factory, capfd, monkeypatch):
    """Call matrix.py in this process, with what run_matrix.sh makes of an environment."""

    def call(preset: str, *arguments: str, **environment: str) -> Done:
        env = settings(folder, preset, **environment)
        capfd.readouterr()
        code = program.main([preset, *arguments], env)
        return Done(code, *capfd.readouterr())

    folder = tmp_path_factory.mktemp("settings")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", f"{PYTHON}:{os.environ['PATH']}")
    handlers = {number: signal.getsignal(number) for number in STOPS}
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"VENV": sys.prefix} | environment
    return subprocess.run([ROOT / "run_matrix.sh", *arguments], capture_output=True, text=True, env=env)


def commands(done: Done, program: str) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if program in line]


def trainings(done: Done) -> list[str]:
    return [line for line in commands(done, "train.py") if "--prepare" not in line]


def test_a_dry_run_lists_every_cell_and_runs_nothing(matrix, tmp_path):
    out = tmp_path / "runs"
    done = matrix(
        "demo", "--dry-run", SEEDS="0 1", TOTAL_SAMPLES="16 32", OUT=str(out), DATA=str(tmp_path / "data")
    )
    trained = trainings(done)
    assert len(trained) == 5 * 2 * 2
    assert sum("--fusion late --memory zero" in line for line in trained) == 4
    assert not list(tmp_path.iterdir())


def test_the_demos_arms_train_with_the_flags_that_its_recorded_results_had(matrix):
    [line] = trainings(matrix("demo", "--dry-run", ARMS="E2"))
    flags = line.split("--seed 0 ")[1]
    start = "--init tiny --world-stride 4 --threads 1 --log-every 80 --save-every 10000"
    assert flags == f"{start} --fusion late --memory pred"
    config = tyro.cli(TrainConfig, args=flags.split())
    recorded = {
        "freeze": "none", "batch_size": 16, "flow_draws": 4, "lr": 1e-3, "world_stride": 4,
        "state_std_floor": 0.01, "action_std_floor": 0.05,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in recorded} == recorded


def test_checkpoints_on_the_way_are_rolled_out_where_training_saves_them(matrix):
    done = matrix("demo", "--dry-run", ARMS="E0", TOTAL_SAMPLES="320 640", EVAL_AT="192 320")
    assert all("--save-every 64" in line for line in trainings(done))
    rolled_out = [line.split("runs/demo/E0-n")[1].split()[0] for line in commands(done, "eval.py")]
    assert rolled_out == [
        "320-s0", "320-s0/step_000012", "640-s0", "640-s0/step_000012", "640-s0/step_000020",
    ]  # fmt: skip


def test_modes_that_are_not_an_arms_own_may_have_fewer_starts(matrix):
    """Each start that is rolled out under another mode is one of the own mode's, so that they pair."""
    done = matrix("demo", "--dry-run", ARMS="E1s", TOTAL_SAMPLES="640", EVAL_AT="320", EPISODES="40 20")
    asked = [line.split("E1s-n640-s0")[1].split(" --num-envs")[0] for line in commands(done, "eval.py")]
    assert asked == [
        " --memory shuffle --episodes-per-task 40",
        " --memory off --episodes-per-task 20",
        "/step_000020 --memory shuffle --episodes-per-task 20",
    ]


def test_each_checkpoint_of_a_study_has_losses_on_frames_that_nothing_was_trained_on(matrix):
    done = matrix("transfer", "--dry-run", ARMS="E2", SEEDS="0", TOTAL_SAMPLES="640", EVAL_AT="320")
    measured = [line for line in commands(done, "eval.py") if "--offline" in line]
    assert [line.split("runs/transfer/E2-n640-s0")[1] for line in measured] == [
        " --offline data/transfer_unseen", "/step_000020 --offline data/transfer_unseen",
    ]  # fmt: skip
    recorded = commands(done, "simulator record")
    states = [line.split("--init-states ")[1].split()[0] for line in recorded]
    assert states == ["0-9", "0-9", "10-19", "10-19"] and "data/transfer_unseen" in recorded[-1]
    given = matrix("site", "--dry-run", ARMS="E2", DATA="data/mine", SUITES="goal")
    assert not any("--offline" in line for line in commands(given, "eval.py"))


def test_times_come_from_earlier_runs_and_none_is_made_up(matrix, tmp_path):
    settings = {"ARMS": "E0 E1", "OUT": str(tmp_path), "TOTAL_SAMPLES": "6400", "JOBS": "9999"}

    def look() -> Done:
        return matrix("demo", "--dry-run", INIT="some/checkpoint", **settings)

    assert len(commands(look(), "time left not measured yet: E")) == 2
    assert "2 of 2 cells left, 2 at a time, 2 of them not measured yet, without" in look().stdout
    assert not commands(look(), "min left")
    run = tmp_path / "E0-n6400-s0"
    (run / "last").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"arm": "E0", "init": "some/checkpoint"}, indent=2))
    (run / "last" / "state.json").write_text(json.dumps({"samples": 3200, "step": 200}, indent=2))
    (run / "metrics.jsonl").write_text("".join(f'{{"samples_per_second": {r}}}\n' for r in (1, 20, 1000)))
    (run / "episodes.jsonl").write_text('{"seconds": 6.0, "physics_seconds": 1.0}\n' * 10)
    assert [float(line.split()[0]) for line in commands(look(), "min left")] == [
        pytest.approx((3200 / 20 + 30 * 6) / 60, abs=0.06),
        pytest.approx((6400 / 20 + 40 * 6) / 60, abs=0.06),
    ]
    assert "2 of 2 cells left, 2 at a time: 0.25 h of work, 0.12 h, without" in look().stdout
    for damage in ('{"samples": "many"}', "[" * 100_000, "\x00", "null"):  # names what it knows
        (run / "last" / "state.json").write_text(damage)
        (run / "metrics.jsonl").write_text(damage)
        assert len(commands(look(), "time left not measured yet: E")) == 2


@pytest.mark.parametrize(
    ("preset", "arms"),
    [
        ("site", "E0 E1s E2 E2n E2c E2h E2m F2 F2n F3a F3an F3as F3asn F3b F3bn E0b"),
        ("bank", "E0 E2 E2n B4dropout B4noise B4ensemble B4mixture B4single B4dup"),
        ("transfer", "E0 E2 E2n"),
        ("either", "E0 E2 E2n B4ensemble B4mixture B4dup"),
    ],
)
def test_presets_train_their_arms_and_roll_out_controls(matrix, preset, arms):
    done = matrix(preset, "--dry-run", SEEDS="0", EVAL_AT="", EPISODES="40")
    trained = trainings(done)
    assert [line.split("--arm ")[1].split()[0] for line in trained] == arms.split()
    banks = [line for line in trained if "--arm B4" in line]
    assert all("--num-hypotheses 4" in line for line in banks)
    assert all("--dtype bfloat16" in line for line in trained)  # wherever a cell is trained
    for line in filter(lambda line: "--memory" in line, commands(done, "eval.py")):
        modes = line.split("--memory ")[1].split(" --")[0]
        bank = " best1 mean1 dup" if "/B4" in line and "/B4dup" not in line else ""
        assert modes in (
            "off",
            "zero",
            "shuffle off",
            "current off zero",
            "history off zero",
            f"pred{bank} off zero shuffle stale gate:0.5 gate:1.5",
        ), line
    recorded = commands(done, "simulator record")
    assert all(("--either cream_cheese,milk" in line) == (preset in ("bank", "either")) for line in recorded)


def test_secondary_arms_are_trained_with_the_first_seeds_alone(matrix):
    names = commands(matrix("site", "--list"), "-n")
    seeds = {arm: [n.split("-s")[1] for n in names if n.startswith(f"{arm}-n")] for arm in ("E2", "F3asn")}
    assert seeds == {"E2": list("01234567"), "F3asn": list("0123")}
    done = matrix("site", "--list", ARMS="E2 F2:all")
    assert done.returncode == 2 and "ARMS 'F2:all' cannot be: give a number of seeds" in done.stderr


def test_a_kept_cell_counts_as_done_and_is_small(matrix, tmp_path):
    where = {"OUT": str(tmp_path / "runs"), "KEEP": str(tmp_path / "kept"), "DATA": str(tmp_path / "data")}
    where |= {"ARMS": "E2 E0", "EVAL_AT": "32"}
    name, run, kept = "E2-n96-s0", tmp_path / "runs" / "E2-n96-s0", tmp_path / "kept" / "E2-n96-s0"
    job = program.Job(settings(tmp_path, "smoke", **where))
    [cell] = [cell for cell in job.cells if cell.name == name]
    run.mkdir(parents=True)
    logs = [{"samples": 16 * i, "loss": 1 / (1 + i)} for i in range(1, 4001)]
    logs[1999:1999] = [{"samples": 32000, "val_loss_off": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs))
    lines = [EPISODE | {"init_state": i, "success": i % 2 == 0} for i in range(280)]
    (run / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps({"arm": "E2", "seed": 0, "total_samples": 96}))
    (run / "env.json").write_text("{}")
    ran = [program.shlex.join(command) for command, _ in program.steps(job, cell, dry=True)]
    (run / "finished.txt").write_text("\n".join(ran[:1]))
    program.keep(run, kept)
    assert not program.is_kept(job, cell)  # a command is missing
    (run / "finished.txt").write_text("\n".join(ran))
    program.keep(run, kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    program.keep(run, kept)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert sum(map(len, before.values())) < 150_000
    shutil.rmtree(run)
    done = matrix("smoke", "--dry-run", **where)
    assert f"done before: {name}, in {where['KEEP']}" in done.stdout and "1 of 2 cells left" in done.stdout
    assert f"done before: {name}" in matrix("smoke", "--cell", name, **where).stdout and not run.exists()
    [found], aside = reading.load_runs((tmp_path / "kept",))
    assert not aside and len(found.episodes) == 280 and found.episodes[1]["success"] is False
    assert len(found.metrics) <= 302 and found.metrics[-1]["samples"] == 64000
    assert [row["samples"] for row in found.metrics if "val_loss_off" in row] == [32000]


def test_every_arm_is_one_that_train_takes(matrix, tmp_path):
    """The table's flags, read by train.py's own command line."""

    done = matrix("full", "--dry-run", SEEDS="0")
    table = program.read_arms(settings(tmp_path, "full")["ARM_TABLE"], [])
    trained = trainings(done)
    assert len(trained) == 44 and sum("--features" in line for line in trained) == 43  # E0b sees no picture
    for line in trained:
        flags = line.split("train.py ")[1].split()
        config = tyro.cli(TrainConfig, args=flags)
        assert config.world_stride == 4 and config.batch_size == 64 and config.freeze == "expert"
        assert config.compared_with == tuple(table[config.arm].controls)
    assert all("--suite libero_spatial libero_object" in line for line in commands(done, "eval.py"))


def test_one_variable_chooses_the_world_encoder_for_caches_and_training_alike(matrix):
    encoder = "--world-encoder vjepa2 --world-clip 4"
    done = matrix("full", "--dry-run", SEEDS="0", ARMS="E0 E2", DATA_FLAGS=encoder)
    lines = commands(done, "train.py")
    assert sum("--prepare" in line for line in lines) == 1 and all(encoder in line for line in lines)
    assert all("--lr-world 1e-3" in line and "--total-samples 3200000" in line for line in trainings(done))


def test_data_that_are_given_are_not_recorded_and_need_suites(matrix):
    done = matrix(
        "site",
        "--dry-run",
        DATA="some/where",
        SUITES="goal 10",
        TASKS="1,3-4",
        ARMS="E0",
        SEEDS="0",
        EVAL_AT="",
    )
    assert not commands(done, "simulator record")
    [line] = commands(done, "eval.py")
    assert "--suite libero_goal libero_10 --task-ids 1,3,4" in line
    done = matrix("site", "--dry-run", DATA="some/where")
    assert done.returncode == 2 and "say what to roll out" in done.stderr


def test_demonstrations_of_several_suites_go_into_one_folder(matrix):
    done = matrix("demo", "--dry-run", SUITES="object libero_goal", ARMS="E0", DATA="some/where")
    recorded = commands(done, "simulator record")
    assert [line.split("--suite ")[1].split()[0] for line in recorded] == ["libero_object", "libero_goal"]
    assert all(line.endswith("--out some/where") for line in recorded)


@pytest.mark.slow
def test_a_cell_is_asked_for_by_name_or_number(matrix, tmp_path):
    where = {"OUT": str(tmp_path), "DATA": str(tmp_path / "none"), "ARMS": "E2 E0", "SEEDS": "0 1"}
    names = commands(matrix("smoke", "--list", **where), "-n")
    assert names == ["E2-n96-s0", "E0-n96-s0", "E2-n96-s1", "E0-n96-s1"]
    for asked in (names[1], "2"):
        with (tmp_path / "E0-n96-s0.lock").open("w") as lock:  # another process is at it
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = matrix("smoke", "--cell", asked, **where)
        assert done.returncode == 0 and "skipped" in done.stdout and "train.py" not in done.stdout
    done = matrix("smoke", "--cell", "2", **where)
    assert done.returncode == 1 and done.stderr.endswith("failed: E0-n96-s0\n")
    assert "no such data folder" in done.stderr  # it prepares nothing


# A `python` that says what it sees and leaves what training leaves, at once or when it is told to stop.
FAKE = """#!/bin/sh
echo "$HIP_VISIBLE_DEVICES $1 in $#"
while [ $# -gt 1 ]; do
    case $1 in --out) out=$2 ;; --arm) arm=$2 ;; esac
    program=${program:-$1}; shift
done
[ "$program" = train.py ] || exit 0
[ "$arm" != "${BROKEN:-none}" ] || { echo "error: \033[31mno weights"; exit 1; }
save() {
    mkdir -p "$out/last"; touch "$out/episodes.jsonl"
    echo "{\\"samples\\": $1}" >"$out/last/state.json"
}
trap 'save 48; exit 0' TERM
if [ -n "$SLOW" ] && [ -n "$arm" ]; then
    mkdir -p "$out"; echo ready >"$SLOW"
    for i in 1 2 3 4 5 6 7 8 9; do sleep 0.1; echo "{\\"samples\\": ${i}0}" >>"$out/metrics.jsonl"; done
fi
sleep 0.2
save ${SAMPLES:-96}
"""


def pretend(folder: Path) -> dict[str, str]:
    """An environment with such a `python`, and places for what it leaves."""
    fake = folder / "bin"
    fake.mkdir(parents=True)
    for name in ("python", "torchrun"):
        (fake / name).write_text(FAKE)
        (fake / name).chmod(0o755)
    places = {name: str(folder / name.lower()) for name in ("OUT", "DATA")}
    return places | {"PATH": f"{fake}:{os.environ['PATH']}"}


def test_each_cell_gets_a_device_of_its_own(matrix, tmp_path):
    done = matrix("smoke", GPUS="4 6", ARMS="E0 E1 E2", **pretend(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n -m in" in done.stdout and "\n4,6 --standalone in" in done.stdout  # demonstrations; caches
    assert "torchrun --standalone --nproc-per-node 2 train.py --prepare" in done.stdout
    seen = [(tmp_path / "out" / f"{arm}-n96-s0.log").read_text() for arm in ("E0", "E1")]
    assert "4 train.py" in seen[0] and "6 train.py" in seen[1]
    begun = re.findall(r"begin: (\w+)-n96-s0 on device (\d)", done.stdout)
    assert sorted(arm for arm, _ in begun) == ["E0", "E1", "E2"]
    assert {device for _, device in begun} == {"4", "6"}


def test_a_training_that_was_stopped_is_not_rolled_out_and_goes_on_at_the_next_call(matrix, tmp_path):
    places = pretend(tmp_path)
    stopped = matrix("smoke", "--cell", "E0-n96-s0", SAMPLES="48", **places)  # SIGTERM: it ends well
    assert stopped.returncode == 1 and "stopped before its end" in stopped.stdout
    assert "eval.py" not in stopped.stdout.split("stopped before")[0]
    done = matrix("smoke", "--cell", "E0-n96-s0", **places)
    assert done.returncode == 0 and "eval.py" in done.stdout and "done before" not in done.stdout
    again = matrix("smoke", "--cell", "E0-n96-s0", **places)
    assert again.returncode == 0 and again.stdout.count("done before") == 2


def test_a_cell_that_fails_is_named_with_its_reason_and_stops_no_other(matrix, tmp_path):
    done = matrix("smoke", ARMS="E0 E1 E2", JOBS="1", BROKEN="E0", **pretend(tmp_path))
    assert done.returncode == 1
    assert "FAILED: E0-n96-s0: exit code 1: error: [31mno weights\n" in done.stdout
    assert "done: E1-n96-s0; " in done.stdout and "done: E2-n96-s0; " in done.stdout
    assert done.stderr.endswith(f"failed: E0-n96-s0 (see the logs in {tmp_path}/out)\n")


def test_paths_with_spaces_stay_whole_in_every_variable(matrix, tmp_path):
    places = pretend(tmp_path / "a b")
    more = {"INIT": "c d", "FEATURES": str(tmp_path / "e f"), "TRAIN_FLAGS": "--vlm 'g h'", "EVAL_AT": "64"}
    more |= {"DATA_FLAGS": "--cache 'i j'", "EVAL_FLAGS": "--stats-of 'k l'", "ARMS": "E0"}
    early = tmp_path / "a b" / "out" / "E0-n96-s0" / "step_1"
    early.mkdir(parents=True)
    (early / "state.json").write_text('{"samples": 64}')
    done = matrix("smoke", **places, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "a b" / "out" / "E0-n96-s0.log").read_text()
    for words in ("--init 'c d'", "--vlm 'g h'", "--cache 'i j'", f"--features '{tmp_path}/e f'"):
        assert words in log and words in done.stdout  # of training, and before it
    assert log.count("--stats-of 'k l'") == 2 and f"eval.py '{early}'" in log
    count = len(re.findall(r"'[^']*'|\S+", re.search(r"\] python (train.py.*)", log)[1]))
    assert f"train.py in {count}\n" in log


def begin(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start matrix.py as run_matrix.sh does, in a session of its own, and wait until its training works."""
    env = settings(folder, "smoke", SLOW=str(folder / "slow"), **environment)
    started = subprocess.Popen(
        [sys.executable, ROOT / "matrix.py", "smoke", *arguments],
        env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    while not (folder / "slow").exists() and time.monotonic() < end and started.poll() is None:
        time.sleep(0.01)
    assert (folder / "slow").exists(), started.communicate()
    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_saves_says_how_to_go_on_and_goes_on(matrix, tmp_path, number):
    places = pretend(tmp_path)
    started = begin(tmp_path, ARMS="E0", **places)
    started.send_signal(number)
    stdout, stderr = started.communicate(timeout=30)
    assert started.returncode == 128 + number and stderr.count("\n") == 1
    assert f"stopped by {number.name}; the same command goes on from here; 1 of 1 cells left" in stderr
    state = tmp_path / "out" / "E0-n96-s0" / "last" / "state.json"
    assert json.loads(state.read_text()) == {"samples": 48} and "eval.py" not in stdout
    done = matrix("smoke", ARMS="E0", **places)
    assert done.returncode == 0 and json.loads(state.read_text()) == {"samples": 96}


@pytest.mark.slow
def test_a_cell_stays_locked_by_the_training_that_outlives_a_kill_and_says_whose_it_is(matrix, tmp_path):
    places = pretend(tmp_path)
    started = begin(tmp_path, "--cell", "E0-n96-s0", **places)
    time.sleep(0.2)  # its name is in the lock
    started.kill()
    started.wait()
    second = matrix("smoke", "--cell", "E0-n96-s0", **places)
    assert second.returncode == 0
    holder = re.search(r"skipped: E0-n96-s0: process (\d+) on .+: python train.py .* is at it", second.stdout)
    assert holder, second.stdout
    while Path(f"/proc/{holder[1]}").exists():
        time.sleep(0.02)
    assert "done: E0-n96-s0" in matrix("smoke", "--cell", "E0-n96-s0", **places).stdout


def test_who_waits_for_data_says_for_whom(matrix, tmp_path):
    places = pretend(tmp_path)
    with program.lock(Path(places["DATA"])) as held:
        program.sign(held, 4711, "somebody")
        env = settings(tmp_path, "smoke", **places)
        waiting = subprocess.Popen(
            [sys.executable, ROOT / "matrix.py", "smoke", "--prepare"], env=env, cwd=ROOT, text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        line = waiting.stdout.readline()
        assert f"waiting for {places['DATA']}: process 4711 on " in line and "somebody is at it" in line
    assert waiting.wait(timeout=30) == 0 and "train.py --prepare" in waiting.stdout.read()


def test_progress_is_a_line_where_a_tenth_more_is_done(matrix, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "LOOK", 0.03)
    monkeypatch.chdir(tmp_path)  # where nothing was measured
    done = matrix("smoke", ARMS="E0", SLOW=str(tmp_path / "slow"), **pretend(tmp_path))
    told = re.findall(
        "not measured yet: E0-n96-s0 has ([0-9]+) of 96 samples, 0 of 1 episodes\n", done.stdout
    )
    told = [int(samples) for samples in told]
    assert 3 <= len(told) <= 11 and told == sorted(set(told)), done.stdout  # looked at some 30 times


def test_a_dry_run_and_a_list_need_no_package(tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    for action, times in (("--list", 1), ("--dry-run", 3)):  # two commands and how far
        done = script("full", action, PYTHON=str(bare), VENV=str(tmp_path / "none"))
        assert done.returncode == 0 and done.stdout.count("E2h-n3200000-s2") == times, done.stderr
    assert not (tmp_path / "none").exists()


def test_each_kind_of_world_latents_is_prepared_once_by_an_arm_with_memory_and_eyes(tmp_path):
    arm = "{} | --fusion {} {} | {} |"
    lines = [arm.format("E0", "none", "", "off"), arm.format("E0b", "none", "--blind", "off")]
    lines += [
        arm.format("E2", "late", "--world-loss min", "pred"),
        arm.format("E3", "late", "--tau 1", "pred"),
    ]
    grid = "--world-camera a b --world-encoder grid --tau 1"
    lines += [arm.format("E4", "late", f"{grid} --blind", "pred"), arm.format("E5", "late", grid, "pred")]
    env = settings(tmp_path, "smoke") | {"ARM_TABLE": "\n".join(lines)}
    for arms, wanted in (
        ("all", ["--world-loss min", grid]),
        ("E0b E0", [""]),
        ("E0 E4", [f"{grid} --blind"]),
    ):
        found = [" ".join(command) for command in program.preparations(program.Job(env | {"ARMS": arms}))]
        assert len(found) == len(wanted)
        assert all(flags in one and "--prepare" in one for flags, one in zip(wanted, found))


def test_help_is_the_scripts_own_first_lines_and_the_script_stays_short():
    done = script("--help")
    assert done.returncode == 0 and done.stdout.startswith("The main job: demonstrations, arms trained on")
    assert "./run_matrix.sh smoke " in done.stdout and "EVAL_FLAGS" in done.stdout.splitlines()[-1]
    assert len((ROOT / "run_matrix.sh").read_text().splitlines()) <= 90


def test_the_table_compares_what_the_report_names_beforehand(tmp_path):
    table = program.read_arms(settings(tmp_path, "full")["ARM_TABLE"], [])
    pairs = {(arm.name, control) for arm in table.values() for control in arm.controls}
    named = {(arm, other) for arm, others in stats.NAMED.items() for other in others}
    assert {pair for pair in named if table.keys() >= {*pair}} <= pairs


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("E2 | --fusion late | pred", "is not: name | flags | memory modes | compared with"),
        ("E2 E3 | --fusion late | pred |", "is not: name |"),
        ("E2 | --fusion late | pred | E9", "arm 'E9', which E2 is compared with, is not in the table"),
    ],
)
def test_a_line_of_the_table_that_cannot_be_is_named(line, words):
    with pytest.raises(Refused, match=re.escape(words)):
        program.read_arms(line, [])


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["everything"], {}, "preset 'everything' is unknown"),
        (["smoke", "--dry-run"], {"ARMS": "E0 E9"}, "arm 'E9' is not in the table"),
        (["smoke", "--now"], {}, "'--now' is unknown"),
        (["smoke", "--cell"], {}, "--cell needs a name or number"),
        (["smoke", "--cell", "6"], {}, "cell '6' is not in the list"),
        (["smoke", "--list", "x"], {}, "'--list x' is unknown"),
        (["smoke", "--dry-run"], {"EVAL_AT": "32 40"}, "EVAL_AT '40' is no multiple of the batch size, 16"),
        (["smoke"], {"EVAL_FLAGS": "--a 'b"}, 'EVAL_FLAGS "--a \'b" cannot be split into flags'),
        (
            ["smoke", "--report"],
            {"JOBS": "a[$(id)]"},
            "JOBS 'a[$(id)]' cannot be: give numbers, as in JOBS=4",
        ),
        (["smoke"], {"SEEDS": "0 -1"}, "SEEDS '0 -1' cannot be"),
        (["smoke"], {"EPISODES": "3 2 1"}, "EPISODES '3 2 1' cannot be: give one number"),
        (["smoke"], {"TOTAL_SAMPLES": "64\x1b[31m"}, "TOTAL_SAMPLES '64\\x1b[31m' cannot be"),
        (["smoke"], {"TASKS": "1-"}, "TASKS '1-' cannot be"),
        *((["smoke"], {name: "much"}, f"{name} 'much' cannot be") for name in program.NUMBERS),
    ],
)
def test_what_is_unknown_is_named_before_anything_runs(arguments, environment, words):
    done = script(*arguments, VENV="/dev/null/none", **environment)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_smoke_run_ends_with_a_table_and_a_second_call_only_looks(tmp_path):
    out = tmp_path / "runs"
    places = {"OUT": str(out), "DATA": str(tmp_path / "data"), "EVAL_AT": "32"}
    broken = out / "E2c-n96-s0"  # holds another run: this cell fails, the others don't
    broken.mkdir(parents=True)
    (broken / "config.json").write_text('{"seed": 9}')
    first = script("smoke", ARMS="E2c E2 E0 E1 E0b", **places)
    assert first.returncode == 1 and "failed: E2c-n96-s0 (" in first.stderr, (
        first.stdout[-2000:] + first.stderr
    )
    assert re.search("FAILED: E2c-n96-s0: exit code 1: error: .* holds another run: ", first.stdout)
    assert "; 1 of 5 cells left, 1 at a time: 0.0" in first.stdout
    assert "holds another run" in (out / "E2c-n96-s0.log").read_text()
    report = (out / "report" / "table.md").read_text()
    rolled_out = {"E0": ["off"], "E0b": ["off"], "E1": ["zero"]}
    for arm, modes in (rolled_out | {"E2": ["pred", "off", "zero", "shuffle", "stale"]}).items():
        assert f"{arm} " in report
        lines = [json.loads(x) for x in (out / f"{arm}-n96-s0/episodes.jsonl").read_text().splitlines()]
        found = [(line["checkpoint"], line["memory"]) for line in lines]
        early = [("step_000002", modes[0])]  # under its own mode alone
        assert found == [("step_000006", mode) for mode in modes] + early
        assert all(line["crash"] is None and not line["seen_in_training"] for line in lines)
    stray = [PYTHON / "python", "eval.py", out / "E1-n96-s0", "--max-steps", "5", "--episodes-per-task", "1"]
    assert "another protocol" in subprocess.run(stray, cwd=ROOT, capture_output=True, text=True).stdout
    episodes = {p: p.read_bytes() for p in out.glob("*/episodes.jsonl")}
    started = time.perf_counter()
    again = script("smoke", ARMS="E2 E0 E1 E0b", **places)
    assert again.returncode == 0, again.stderr
    assert time.perf_counter() - started < 120
    assert all("done before: python eval.py" in log.read_text() for log in out.glob("E[01]*.log"))
    assert {p: p.read_bytes() for p in episodes} == episodes
