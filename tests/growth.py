"""Does memory grow? A training of 600 steps and an evaluation of 60 episodes, looked at as they go on.

    python tests/growth.py          # some minutes; prints resident memory, of simulators too

Shapes, data and episodes are as small as in tests/kills.py: what grows with each step or episode is seen
all the better.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kills  # noqa: E402
import soak  # noqa: E402

LOOKS = 6


def resident(process: int) -> float:
    """Resident memory of a process, MB."""
    words = Path(f"/proc/{process}/statm").read_text().split()
    return int(words[1]) * 4096 / 1e6


def children(process: int) -> list[int]:
    """Processes that it started and that live."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def watch(name: str, process: subprocess.Popen, lines: Path, total: int) -> None:
    """Print what a program holds each time that it has written another sixth of its lines."""
    for look in range(1, LOOKS + 1):
        wanted = look * total // LOOKS - (look == LOOKS)  # the last one before it ends
        while count(lines) < wanted and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None:
            others = [round(resident(child)) for child in children(process.pid)]
            print(f"{name} {wanted:4d}: {resident(process.pid):6.0f} MB, its processes {others}", flush=True)
    soak.finish(process)


def count(lines: Path) -> int:
    return lines.read_bytes().count(b"\n") if lines.is_file() else 0


def main() -> None:
    """Watch both."""
    with tempfile.TemporaryDirectory(prefix="growth_") as folder:
        home = Path(folder)
        rolls = kills.programs(home)["eval"].command(home / "rolls")
        steps = [
            *soak.command(home / "data", home / "steps", 600)[1:],
            "--save-every",
            "800",
            "--keep-every",
            "0",
        ]
        watch("step", kills.launch(steps), home / "steps" / "metrics.jsonl", 600)
        more = ["--episodes-per-task", "30", "--num-envs", "1"]  # under two modes
        watch("episode", kills.launch([*rolls, *more]), home / "rolls" / "episodes.jsonl", 60)


if __name__ == "__main__":
    main()
