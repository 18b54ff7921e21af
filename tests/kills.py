"""kill -9 of evaluations, recordings and caches at random moments, the same command again: all is compared.

    python tests/kills.py                   # 45 kills; exit code 1 where anything differs
    python tests/kills.py --only record --kills 30

Each program runs straight once, which says how long it takes, and then from nothing with its whole session
killed some moments after its start, again and again: mostly before it would be done, so that it goes on many
times. Training has tests/soak.py, which aims.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import soak  # noqa: E402
from test_data import write_task  # noqa: E402

MOMENT = ("seconds", "_seconds")  # endings of what differs from one moment to the next


@dataclass(frozen=True)
class KillConfig:
    """Kill programs again and again, and compare what they leave."""

    kills: int = 15
    """Kills of each program at least."""

    only: Literal["eval", "record", "cache"] | None = None
    """The program to kill; default: all three."""

    seed: int = 0
    """Seed of the moments."""


class Program(NamedTuple):
    """What is killed: its command that writes to a folder, and what it leaves there, to be compared."""

    command: Callable[[Path], list[str]]
    leaves: Callable[[Path], dict]


def launch(line: list[str]) -> subprocess.Popen:
    """Start a program in a session of its own, to be killed whole."""
    return soak.launch([sys.executable, *line], start_new_session=True)


def killed(line: list[str], seconds: float) -> bool:
    """Run for so long, then kill the whole session; False where it ended before."""
    process, end = launch(line), time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if process.poll() is not None:
        soak.finish(process)
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def episodes(out: Path) -> dict:
    """The lines of all episodes, each once, by what they are."""
    found = {}
    for line in map(json.loads, (out / "episodes.jsonl").read_text().splitlines()):
        key = line["memory"], line["suite"], line["task_id"], line["init_state"]
        assert key not in found, f"{key} is there twice"
        found[key] = {name: value for name, value in line.items() if not name.endswith(MOMENT)}
    return found


def arrays(out: Path) -> dict:
    """Every array and attribute of every demonstration."""
    found = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found[name] = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            found[name]["bytes"] = hashlib.sha256(item[()].tobytes()).hexdigest()

    for path in sorted(out.glob("*.hdf5")):
        with h5py.File(path) as file:
            file.visititems(note)
    return found


def contents(out: Path) -> dict:
    """The bytes of every file that is no lock."""
    paths = [p for p in out.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def programs(home: Path) -> dict[str, Program]:
    """Make what the programs need: data, and a trained arm."""
    write_task(home / "data" / "soup_demo.hdf5", lengths=(60, 90, 75), size=64)
    data, run = str(home / "data"), str(home / "run")
    memory = ["--fusion", "late", "--future", "3", "--threads", "1", "--freeze", "none"]
    soak.finish(launch(["train.py", "--data", data, "--out", run, "--total-samples", "32", *memory]))
    object_1 = ["--suite", "libero_object", "--task-ids", "1"]
    rolls = [
        "--size",
        "64",
        "--memory",
        "pred",
        "off",
        "--episodes-per-task",
        "4",
        "--max-steps",
        "24",
        "--num-envs",
        "2",
    ]
    rolls += [*object_1, "--accept", "action", "statistics", "instruction"]
    records = ["--demos-per-task", "4", "--init-states", "0-3", "--size", "32", "--draw", "fast"]
    records += ["--reset", "soft", "--workers", "2"]
    cache = lambda out: ["train.py", "--prepare", "--data", data, "--cache", str(out), *memory]  # noqa: E731
    record = ["-m", "simulator", "record", *object_1, *records]
    return {
        "eval": Program(lambda out: ["eval.py", run, *rolls, "--out", str(out)], episodes),
        "record": Program(lambda out: [*record, "--out", str(out)], arrays),
        "cache": Program(cache, contents),
    }


def kill_often(name: str, program: Program, home: Path, count: int, rng: np.random.Generator) -> list[str]:
    """Compare a straight run with ones that were killed; return what differs."""
    start = time.monotonic()
    soak.finish(launch(program.command(home / name)))
    took, want = time.monotonic() - start, program.leaves(home / name)
    done, runs, wrong = 0, 0, []
    while done < count:
        out, runs = home / f"{name}_{runs}", runs + 1
        while done < count and killed(program.command(out), rng.uniform(0.3, 1.0) * took):
            done += 1
        soak.finish(launch(program.command(out)))
        got = program.leaves(out)
        wrong += [f"{name}: {key}" for key in sorted(map(str, want.keys() ^ got.keys()))]
        wrong += [f"{name}: {key}" for key in want.keys() & got.keys() if want[key] != got[key]]
        half = [path.name for path in out.rglob("*partial*")]
        wrong += [f"{name}: {leftover} is left over" for leftover in half]
    print(f"{name}: {done} kills in {runs} runs of {took:.0f} s, {len(want)} things compared", flush=True)
    return wrong


def main(config: KillConfig) -> None:
    """Kill, compare, and say what differs."""
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        rng, wrong = np.random.default_rng(config.seed), []
        for name, program in programs(Path(folder)).items():
            if config.only in (None, name):
                wrong += kill_often(name, program, Path(folder), config.kills, rng)
    if wrong:
        sys.exit("error: " + "; ".join(wrong[:20]))
    print("what was killed and went on is what ran straight")


if __name__ == "__main__":
    main(tyro.cli(KillConfig, description=__doc__))
