"""Five hacks, each a small patch to a copy of the code, train and roll out: what README promises a hacker.

`tests/forks/*.patch` are what one would write: a site without attention behind each of the expert's layers, a
memory mode, a hypothesis method with a posterior, a world encoder, and an arm with the new site, mode and
encoder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORKS = ROOT / "tests" / "forks"
MOST = {"site": 30, "mode": 8, "method": 30, "encoder": 15, "arm": 1}  # lines, as README says
LEFT = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".*_cache", ".hypothesis")
TINY = ("--total-samples", "16", "--batch-size", "8", "--future", "3", "--threads", "1")
HACKS = {  # what is patched: flags that use it, and a key that its log then has
    "site": (("--fusion", "film"), "film/ctx_norm"),
    "mode": (("--fusion", "late", "--memory", "reversed"), "late/attn_pmax"),
    "method": (
        ("--fusion", "late", "--num-hypotheses", "2", "--hypothesis-method", "posterior"),
        "world_cos_best",
    ),
    "encoder": (("--fusion", "late", "--world-encoder", "grid"), "norm_memory"),
}


@pytest.fixture(scope="module")
def fork(tmp_path_factory) -> Path:
    """A copy of the code with all five patches."""
    copy = tmp_path_factory.mktemp("fork") / "copy"
    shutil.copytree(ROOT, copy, ignore=LEFT)
    for name in MOST:
        run(copy, "git", "apply", FORKS / f"{name}.patch")
    return copy


def run(folder: Path, *command: str | Path, **more: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"} | more
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_patch_is_as_small_as_promised_and_touches_one_file():
    assert {path.stem for path in FORKS.iterdir()} == set(MOST)
    for name, most in MOST.items():
        text = (FORKS / f"{name}.patch").read_text().splitlines()
        assert sum(line.startswith("+++") for line in text) == 1
        assert 0 < sum(line.startswith("+") for line in text) - 1 <= most, name


@pytest.mark.slow
def test_the_patches_still_fit_the_code(fork):
    run(fork, sys.executable, "-m", "ruff", "check", "fusion.py", "prophet.py", "latents/encoders.py")
    said = run(fork, sys.executable, "train.py", "--help").stdout
    assert all(name in said for name in ("film", "reversed", "posterior", "grid"))
    assert "F4-n96-s0" in run(fork, "./run_matrix.sh", "smoke", "--list", ARMS="F4").stdout


@pytest.mark.slow
def test_the_new_arm_goes_the_whole_way_of_the_job(fork):
    done = run(fork, "./run_matrix.sh", "smoke", ARMS="F4 E0")
    cell = fork / "runs" / "smoke" / "F4-n96-s0"
    assert json.loads((cell / "config.json").read_text())["compared_with"] == ["E0", "E2"]
    assert {line["memory"] for line in lines(cell / "episodes.jsonl")} >= {"reversed", "off", "zero"}
    assert len(list((fork / "data" / "smoke").glob("world_*"))) == 1  # E2 is not among the cells
    assert "F4" in done.stdout and "world_gate_film" in (cell / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", HACKS)
def test_each_hack_trains_and_rolls_out(fork, name):
    flags, key = HACKS[name]
    if not (fork / "data" / "smoke").exists():
        run(fork, "./run_matrix.sh", "smoke", "--prepare")
    out = fork / "runs" / name
    train = (sys.executable, "train.py", "--data", "data/smoke", "--out", out, *TINY, *flags)
    run(fork, *train, "--prepare")  # what the latents of a network need; others' are made on the way
    run(fork, *train)
    assert key in lines(out / "metrics.jsonl")[-1]
    run(fork, sys.executable, "eval.py", out, "--episodes-per-task", "1", "--max-steps", "10")
    [line] = lines(out / "episodes.jsonl")
    assert not line["crash"] and line["steps"] == 10


@pytest.mark.slow
def test_the_projects_own_tests_look_at_what_is_new(fork):
    """Closed it changes no bit, cached is joint, no future reaches the policy: from the tables, unasked."""
    wanted = "film and not opens_the_gate or posterior and not prefix and not suffix"
    tests = ("tests/test_sites.py", "tests/test_bank.py", "tests/training/test_diagnostics.py")
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", *tests, "-k", wanted)
    assert int(run(fork, *pytest, OMP_NUM_THREADS="1").stdout.splitlines()[-1].split()[0]) > 20
