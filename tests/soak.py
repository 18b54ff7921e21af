"""kill -9 at random moments, the same command again, until the run is done: then bits are compared.

Kills are aimed at what a run does (start, a step, a save, the moment between a checkpoint's last byte and its
rename, that between the rename and the link) and fall a random moment later. Before it dies the process is
stopped, so that what it was about to do can be read off its folder.

    python tests/soak.py --kills 60                # some minutes; exit code 1 where anything differs
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_data import write_task  # noqa: E402

from smolvla.folders import MANIFEST, checkpoints, damage, number  # noqa: E402

BATCH = 8
FLAGS = f"""
    --freeze none --log-every 1 --threads 1 --lr 1e-3 --fusion late --future 3 --world-dim 16
    --world-resolution 8 --ema 0.9 --batch-size {BATCH} --save-every {BATCH} --keep-every {10 * BATCH}
""".split()
AIMS = ("start", "step", "save", "rename", "rename", "link", "prune")
LATER = {"start": 4.0, "step": 0.3, "save": 0.05}  # seconds after a moment, at most
PATIENCE = 120.0  # seconds that a moment is waited for


@dataclass(frozen=True)
class SoakConfig:
    """Kill a training run again and again, and compare."""

    kills: int = 60
    """Kills at least."""

    steps: int = 240
    """Optimiser steps of the run, a checkpoint after each."""

    seed: int = 0
    """Seed of the moments."""

    out: Path | None = None
    """Where the runs go; default: a temporary folder."""


def command(data: Path, out: Path, steps: int) -> list[str]:
    flags = ["--data", data, "--out", out, "--total-samples", steps * BATCH, *FLAGS]
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags)]


def launch(line: list[str], **more: bool) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, **streams, **more)


def finish(process: subprocess.Popen) -> None:
    """Wait for a run's end; AssertionError with the last it said where it failed."""
    text = process.communicate()[0]
    assert process.returncode == 0, text[-2000:]


def newest(out: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return next((number(folder) for folder in checkpoints(out)), 0)


def pointed(out: Path) -> int:
    """The step that `last` points at."""
    link = out / "last"
    return number(Path(os.readlink(link))) if link.is_symlink() else 0


def moments(aim: str, out: Path, later: int) -> Callable[[], bool]:
    """Say how to tell that a process has come to a moment, `later` steps from now at the earliest."""
    goal = newest(out) + later

    def there(step: int, ending: str = "") -> bool:
        return os.path.exists(out / f"step_{step:06d}{ending}")

    reached = {
        "start": lambda: True,
        "step": lambda: there(goal + 1),
        "save": lambda: there(goal + 1, ".part"),
        "rename": lambda: there(goal + 1, f".part/{MANIFEST}"),
        "link": lambda: there(goal + 1),
        "prune": lambda: there(goal - 1, ".gone.part"),  # once goal + 1 is there, goal - 1 goes
    }[aim]
    return lambda: reached() or there(goal + 3)  # missed


def state_of(out: Path, begun: int) -> str:
    """Read off a stopped run's folder what it was doing."""
    parts = [p for p in out.glob("step_*.part") if p.is_dir()]
    if any(p.name.endswith(".gone.part") for p in parts):
        return "removing an old checkpoint"
    if parts:
        return "between write and rename" if (parts[0] / MANIFEST).is_file() else "during a save"
    if newest(out) != pointed(out):
        return "between rename and link"
    return "start" if newest(out) == begun else "in a step"


def kill_once(line: list[str], out: Path, rng: np.random.Generator) -> str:
    """Start the run, kill it at a random moment; give what it was doing, or "finished"."""
    aim, begun = str(rng.choice(AIMS)), newest(out)
    reached = moments(aim, out, int(rng.integers(0, 4)))
    delay = rng.uniform(0, LATER.get(aim, 0.0))
    process, deadline = launch(line), time.monotonic() + PATIENCE
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        pass  # some moments last for microseconds
    time.sleep(delay)
    if process.poll() is not None:
        finish(process)
        return "finished"
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    found = state_of(out, begun)
    process.kill()
    process.communicate()
    return found


def check_last(out: Path) -> None:
    """What `last` points at must be whole at any moment: an evaluation may be reading it."""
    if (out / "last").is_symlink():
        assert (reason := damage(out / "last")) is None, reason


def kills(line: list[str], out: Path, count: int, seed: int) -> Iterator[str]:
    """Kill a run `count` times, then let it end; gives what each kill hit."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        found = kill_once(line, out, rng)
        check_last(out)
        if found == "finished":
            return
        yield found
    finish(launch(line))


def everything(run: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds: the average, the weights, the optimiser's state."""
    tensors = {}
    for name in ("model", "world", "raw"):
        found = load_file(run / "last" / f"{name}.safetensors")
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    for key, state in torch.load(run / "last" / "optimizer.pt", weights_only=True)["state"].items():
        tensors |= {f"optimizer.{key}.{name}": value for name, value in state.items()}
    return tensors


def lines(run: Path) -> list[dict]:
    """What a run logged, without what differs from one moment to the next."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in found]


def differences(a: Path, b: Path) -> list[str]:
    """Name what differs between two runs that should be one."""
    one, other = everything(a), everything(b)
    found = [name for name in sorted(one.keys() | other.keys()) if not same(one.get(name), other.get(name))]
    found += ["metrics.jsonl"] if lines(a) != lines(b) else []
    names = [sorted(p.name for p in run.iterdir()) for run in (a, b)]
    return found + (["files"] if names[0] != names[1] else [])


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def main(config: SoakConfig) -> None:
    """Run once straight and once killed; print what was hit and what differs."""
    home = config.out or Path(tempfile.mkdtemp(prefix="soak_"))
    write_task(home / "data" / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    straight, out, hit = home / "straight", home / "killed", Counter()
    start = time.time()
    finish(launch(command(home / "data", straight, config.steps)))
    print(f"straight: {config.steps} steps in {time.time() - start:.0f} s", flush=True)
    line = command(home / "data", out, config.steps)
    for i, found in enumerate(kills(line, out, config.kills, config.seed)):
        hit[found] += 1
        spent = f"[{time.time() - start:5.0f} s]"
        print(f"{spent} kill {i + 1:3d} {found}; `last` is step {pointed(out)}", flush=True)
    for found, count in hit.most_common():
        print(f"{count:4d} x {found}")
    wrong, compared = differences(straight, out), len(everything(straight))
    print(f"{hit.total()} kills; {compared} tensors and {len(lines(out))} log lines compared, to the bit")
    if wrong:
        sys.exit(f"error: the runs differ in {', '.join(wrong)}")
    if hit.total() < config.kills:
        sys.exit(f"error: the run ended after {hit.total()} kills; give it more --steps")
    print("the killed run is the straight run")


if __name__ == "__main__":
    main(tyro.cli(SoakConfig))
