"""The main job: what it would run, what it refuses, and the whole path once, at the smallest numbers."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def matrix(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"VENV": sys.prefix} | environment
    return subprocess.run([ROOT / "run_matrix.sh", *arguments], capture_output=True, text=True, env=env)


def commands(done: subprocess.CompletedProcess, program: str) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if program in line]


def test_a_dry_run_lists_every_cell_and_runs_nothing(tmp_path):
    out = tmp_path / "runs"
    done = matrix(
        "demo", "--dry-run", SEEDS="0 1", TOTAL_SAMPLES="16 32", OUT=str(out), DATA=str(tmp_path / "data")
    )
    trained = commands(done, "train.py")
    assert len(trained) == 4 * 2 * 2
    assert sum("--fusion late --memory zero" in line for line in trained) == 4
    assert not list(tmp_path.iterdir())


def test_the_demos_arms_train_with_the_flags_that_its_recorded_results_had():
    [line] = commands(matrix("demo", "--dry-run", ARMS="E2"), "train.py")
    assert line.split("--seed 0 ")[1] == (
        "--init tiny --freeze none --batch-size 16 --flow-draws 4 --lr 1e-3 --world-stride 4 --threads 1 "
        "--state-std-floor 0.01 --action-std-floor 0.05 --log-every 80 --save-every 16000 "
        "--fusion late --memory pred"
    )  # fmt: skip


def test_checkpoints_on_the_way_are_rolled_out_where_training_saves_them():
    done = matrix("demo", "--dry-run", ARMS="E0", TOTAL_SAMPLES="320 640", EVAL_AT="192 320")
    assert all("--save-every 64" in line for line in commands(done, "train.py"))
    rolled_out = [line.split("runs/demo/E0-n")[1].split()[0] for line in commands(done, "eval.py")]
    assert rolled_out == [
        "320-s0", "320-s0/step_000012", "640-s0", "640-s0/step_000012", "640-s0/step_000020",
    ]  # fmt: skip


def test_times_come_from_earlier_runs_where_there_are_any(tmp_path):
    def minutes() -> list[float]:
        settings = {"ARMS": "E0 E1", "OUT": str(tmp_path), "TOTAL_SAMPLES": "6400", "JOBS": "9999"}
        done = matrix("demo", "--dry-run", INIT="some/checkpoint", **settings)
        lines = commands(done, "min left")
        assert ["assumed" in line for line in lines] == [assumed, assumed], lines
        return [float(line.split()[0]) for line in lines]

    assumed = True
    assert minutes() == [pytest.approx((6400 / 200 + 40 * 30) / 60, abs=0.06)] * 2
    run = tmp_path / "E0-n6400-s0"
    (run / "last").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"arm": "E0", "init": "some/checkpoint"}, indent=2))
    (run / "last" / "state.json").write_text(json.dumps({"samples": 3200, "step": 200}, indent=2))
    (run / "metrics.jsonl").write_text("".join(f'{{"samples_per_second": {r}}}\n' for r in (1, 20, 1000)))
    (run / "episodes.jsonl").write_text('{"seconds": 6.0, "physics_seconds": 1.0}\n' * 10)
    assumed = False
    assert minutes() == [
        pytest.approx((3200 / 20 + 30 * 6) / 60, abs=0.06),
        pytest.approx((6400 / 20 + 40 * 6) / 60, abs=0.06),
    ]


@pytest.mark.parametrize(
    ("preset", "arms"),
    [
        ("fusion", "E0 E0b E1 E2 F2 F3a F3b"),
        ("bank", "E0 E2 B4dropout B4noise B4ensemble B4mixture B4single B4mean B4min B4rwta"),
    ],
)
def test_presets_train_their_arms_and_roll_out_controls(preset, arms):
    done = matrix(preset, "--dry-run")
    trained = commands(done, "train.py")
    assert [line.split("--arm ")[1].split()[0] for line in trained] == arms.split()
    banks = [line for line in trained if "--arm B4" in line]
    assert all("--num-hypotheses 4" in line and "--world-loss" in line for line in banks)
    for line in commands(done, "eval.py"):
        modes = line.split("--memory ")[1].split(" --")[0]
        bank = " best1 mean1 dup" if "/B4" in line else ""
        assert modes in ("off", "zero", f"pred off zero{bank} random signflip"), line


def test_every_arm_is_one_that_train_takes():
    """The table's flags, read by train.py's own command line."""
    import tyro

    from train import TrainConfig

    done = matrix("full", "--dry-run", SEEDS="0")
    trained = commands(done, "train.py")
    assert len(trained) == 22 and sum("--features" in line for line in trained) == 21  # E0b sees no picture
    for line in trained:
        flags = line.split("train.py ")[1].split()
        config = tyro.cli(TrainConfig, args=flags)
        assert config.world_stride == 4 and config.batch_size == 64 and config.freeze == "expert"
    assert all("--suite libero_spatial libero_object" in line for line in commands(done, "eval.py"))


def test_data_that_are_given_are_not_recorded_and_need_suites():
    done = matrix("fusion", "--dry-run", DATA="some/where", SUITES="goal 10", TASKS="1,3-4", ARMS="E0")
    assert not commands(done, "simulator record")
    [line] = commands(done, "eval.py")
    assert "--suite libero_goal libero_10 --task-ids 1 3 4" in line
    done = matrix("fusion", "--dry-run", DATA="some/where")
    assert done.returncode == 2 and "say what to roll out" in done.stderr


def test_demonstrations_of_several_suites_go_into_one_folder():
    done = matrix("demo", "--dry-run", SUITES="object libero_goal", ARMS="E0", DATA="some/where")
    recorded = commands(done, "simulator record")
    assert [line.split("--suite ")[1].split()[0] for line in recorded] == ["libero_object", "libero_goal"]
    assert all(line.endswith("--out some/where") for line in recorded)


def test_a_cell_is_asked_for_by_name_or_number(tmp_path):
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


FAKE = """#!/bin/sh
case "$*" in *.py* | *-m*) echo "$HIP_VISIBLE_DEVICES $1"; sleep 0.2; esac
while [ $# -gt 1 ]; do [ "$1" != --out ] || out=$2; program=${program:-$1}; shift; done
case $program in
train.py)
    mkdir -p "$out/last"; touch "$out/episodes.jsonl"
    echo "{\\"samples\\": ${SAMPLES:-96}}" >"$out/last/state.json"
    ;;
esac
"""


def pretend(folder: Path) -> dict[str, str]:
    """An environment whose `python` says what it sees and leaves what training leaves; for run_matrix.sh."""
    fake = folder / "venv" / "bin"
    fake.mkdir(parents=True)
    for name in ("python", "torchrun"):
        (fake / name).write_text(FAKE)
        (fake / name).chmod(0o755)
    setup = subprocess.run(
        ["sh", "-c", "cat pyproject.toml setup.sh | cksum"], cwd=ROOT, capture_output=True, text=True
    )
    (folder / "venv" / ".stamp").write_text(setup.stdout)
    return {"OUT": str(folder / "runs"), "DATA": str(folder / "data"), "VENV": str(folder / "venv")}


def test_each_cell_gets_a_device_of_its_own(tmp_path):
    places = pretend(tmp_path)
    done = matrix("smoke", GPUS="4 6", ARMS="E0 E1 E2", **places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4,6 -m" in done.stdout
    seen = [(tmp_path / "runs" / f"{arm}-n96-s0.log").read_text() for arm in ("E0", "E1")]
    assert "4 train.py" in seen[0] and "6 train.py" in seen[1]
    begun = re.findall(r"begin: (\w+)-n96-s0 on device (\d)", done.stdout)
    assert [arm for arm, _ in begun] == ["E0", "E1", "E2"] and {device for _, device in begun} == {"4", "6"}


def test_a_training_that_was_stopped_is_not_rolled_out_and_goes_on_at_the_next_call(tmp_path):
    places = pretend(tmp_path)
    stopped = matrix(
        "smoke", "--cell", "E0-n96-s0", SAMPLES="48", **places
    )  # SIGTERM: it saves, and ends well
    assert stopped.returncode == 1 and "stopped before its end" in stopped.stdout
    assert "eval.py" not in stopped.stdout.split("stopped before")[0]
    done = matrix("smoke", "--cell", "E0-n96-s0", **places)
    assert done.returncode == 0 and "eval.py" in done.stdout and "done before" not in done.stdout
    again = matrix("smoke", "--cell", "E0-n96-s0", **places)
    assert again.returncode == 0 and again.stdout.count("done before") == 2


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["everything"], {}, "preset 'everything' is unknown"),
        (["smoke", "--dry-run"], {"ARMS": "E0 E9"}, "arm 'E9' is not in the table"),
        (["smoke", "--now"], {}, "'--now' is unknown"),
        (["smoke", "--cell"], {}, "--cell needs a name or number"),
        (["smoke", "--cell", "5"], {}, "cell '5' is not in the list"),
        (["smoke", "--dry-run"], {"EVAL_AT": "32 40"}, "EVAL_AT '40' is no multiple of the batch size, 16"),
    ],
)
def test_what_is_unknown_is_named_before_anything_runs(arguments, environment, words):
    done = matrix(*arguments, **environment)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_smoke_run_ends_with_a_table_and_a_second_call_only_looks(tmp_path):
    out = tmp_path / "runs"
    places = {"OUT": str(out), "DATA": str(tmp_path / "data"), "EVAL_AT": "32"}
    broken = out / "E2c-n96-s0"  # holds another run: this cell fails, the others don't
    broken.mkdir(parents=True)
    (broken / "config.json").write_text('{"seed": 9}')
    first = matrix("smoke", ARMS="E2c E2 E0 E1 E0b", **places)
    assert first.returncode == 1 and "failed: E2c-n96-s0 (" in first.stderr, (
        first.stdout[-2000:] + first.stderr
    )
    assert "holds another run" in (out / "E2c-n96-s0.log").read_text()
    report = (out / "report" / "table.md").read_text()
    for arm, modes in {"E0": ["off"], "E0b": ["off"], "E1": ["zero"], "E2": ["pred", "off", "zero"]}.items():
        assert f"{arm} " in report
        lines = [json.loads(x) for x in (out / f"{arm}-n96-s0/episodes.jsonl").read_text().splitlines()]
        found = [(line["checkpoint"], line["memory"]) for line in lines]
        assert found == [(step, mode) for step in ("step_000006", "step_000002") for mode in modes]
        assert all(line["crash"] is None and not line["seen_in_training"] for line in lines)
    episodes = {p: p.read_bytes() for p in out.glob("*/episodes.jsonl")}
    started = time.perf_counter()
    again = matrix("smoke", **places)
    assert again.returncode == 0, again.stderr
    assert time.perf_counter() - started < 120
    assert all("done before: python eval.py" in log.read_text() for log in out.glob("E[01]*.log"))
    assert {p: p.read_bytes() for p in episodes} == episodes
