"""The two lines that are typed first, as typed, in a fresh copy of the code: record, train and roll out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = (
    *sorted(path.name for path in ROOT.glob("*.py")),
    *("smolvla", "readers", "latents", "simulator", "training", "rollouts", "report"),
)
TINY = {"DEMOS": "2", "TOTAL_SAMPLES": "48", "EPISODES": "1"}


@pytest.fixture
def copy(tmp_path):
    for name in CODE:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    return tmp_path


def type_in(folder: Path, *line: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | TINY
    return subprocess.run([sys.executable, *line], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_on_a_fresh_clone_an_evaluation_says_which_command_makes_a_run(copy):
    done = type_in(copy, "eval.py")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: no run under runs/: train one with `python train.py --fusion prefix_cross`, or name a "
        "checkpoint folder\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--init tinny",
            "--init tinny is no preset (tiny, base, libero), no folder and no hub id (owner/name)",
        ),
        ("--init runs/mine/last", "runs/mine/last"),
        ("--vlm nowhere", "no folder 'nowhere': give a checkpoint folder, or a hub id"),
        ("--freeze expert", "--init tiny --freeze expert: all but the expert stays random"),
    ],
)
def test_a_mistake_is_said_before_minutes_are_spent_on_recording(copy, flags, said):
    done = type_in(copy, "train.py", *flags.split())
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (copy / "data").exists()


@pytest.mark.slow
def test_the_two_lines_that_are_typed_first_record_train_and_roll_out(copy):
    done = type_in(copy, "-m", "torch.distributed.run", "train.py", "--fusion", "prefix_cross")
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert "data/demo is not there: recording the demo's demonstrations first" in said
    assert "done: runs/prefix_cross-pred-n48-s0/last" in said
    assert any("budget 48 samples at a peak rate of 0.001" in line for line in said)
    [whole] = (copy / "data/demo").glob("*.hdf5")
    whole.unlink()
    whole.with_suffix(".parts").mkdir()  # as Ctrl-C leaves it
    blind = type_in(copy, "train.py", "--blind")  # newer, and has no site
    assert blind.returncode == 0, blind.stderr[-3000:]
    assert "data/demo is not finished: going on with the demo's demonstrations first" in blind.stdout
    done = type_in(copy, "eval.py", "--memory", "zero")
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[:2] for row in table] == [
        ["suite", "memory"],
        ["libero_object", "pred"],
        ["libero_object", "zero"],
    ]
    assert all(row[2] in ("0/1", "1/1") and row[-2] == "to" for row in table[1:])
    again = type_in(copy, "eval.py", "--memory", "zero")
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]
    assert len((copy / "runs/prefix_cross-pred-n48-s0/episodes.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_under_torchrun_too_what_is_wrong_is_said_last(copy):
    done = type_in(copy, "-m", "torch.distributed.run", "train.py", "--data", "nowhere")
    assert done.returncode == 1
    said = [line.strip() for line in done.stderr.splitlines() if line.strip(" =")]
    assert said[-1].startswith("traceback : error: no such data folder or file: nowhere")
