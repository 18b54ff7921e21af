"""The main job: what it would run, what it refuses, and the whole path once, at the smallest numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def matrix(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"VENV": sys.prefix} | environment
    return subprocess.run([ROOT / "run_matrix.sh", *arguments], capture_output=True, text=True, env=env)


def test_a_dry_run_lists_every_cell_and_runs_nothing(tmp_path):
    out = tmp_path / "runs"
    done = matrix(
        "demo", "--dry-run", SEEDS="0 1", TOTAL_SAMPLES="10 20", OUT=str(out), DATA=str(tmp_path / "data")
    )
    assert done.returncode == 0, done.stderr
    trained = [line for line in done.stdout.splitlines() if "train.py" in line]
    assert len(trained) == 4 * 2 * 2
    assert sum("--fusion late --memory zero" in line for line in trained) == 4
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["everything"], {}, "preset 'everything' is unknown"),
        (["smoke", "--dry-run"], {"ARMS": "E0 E9"}, "arm 'E9' is not in the table"),
        (["smoke", "--now"], {}, "'--now' is unknown"),
    ],
)
def test_what_is_unknown_is_named_before_anything_runs(arguments, environment, words):
    done = matrix(*arguments, **environment)
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_smoke_run_ends_with_a_table_and_a_second_call_only_looks(tmp_path):
    places = {"OUT": str(tmp_path / "runs"), "DATA": str(tmp_path / "data")}
    first = matrix("smoke", **places)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    report = (tmp_path / "runs" / "report" / "table.md").read_text()
    for arm, modes in {"E0": ["off"], "E0b": ["off"], "E1": ["zero"], "E2": ["pred", "off", "zero"]}.items():
        assert f"{arm} " in report
        [run] = (path for path in (tmp_path / "runs").glob(f"{arm}-n*") if path.is_dir())
        lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
        assert [line["memory"] for line in lines] == modes
        assert all(line["crash"] is None and not line["seen_in_training"] for line in lines)
    episodes = {p: p.read_bytes() for p in (tmp_path / "runs").glob("*/episodes.jsonl")}
    started = time.perf_counter()
    assert matrix("smoke", **places).returncode == 0
    assert time.perf_counter() - started < 120
    assert {p: p.read_bytes() for p in episodes} == episodes
