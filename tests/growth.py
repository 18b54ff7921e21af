"""Does memory grow? A training of 600 steps and an evaluation of 60 episodes, looked at as they go on.

    python tests/growth.py          # some minutes; prints what they and their simulators have resident

Shapes, data and episodes are as small as in tests/kills.py: what grows with each step is seen all the better.
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


def resident(process: int) -> int:
    """Resident memory of a process, MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 // 10**6


def children(process: int) -> list[int]:
    """Processes that it started and that live."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def watch(name: str, line: list[str], lines: Path, total: int) -> None:
    """Print what a program holds each time that it has written another sixth of its lines."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *line], cwd=ROOT, stdout=said, stderr=said)
        for look in range(1, LOOKS + 1):
            wanted = look * total // LOOKS - (look == LOOKS)  # the last one before it ends
            while count(lines) < wanted and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is None:
                others = [resident(child) for child in children(process.pid)]
                print(f"{name} {wanted:3d}: {resident(process.pid)} MB; its processes {others}", flush=True)
        assert process.wait() == 0, (said.seek(0), said.read())[1]


def count(lines: Path) -> int:
    return lines.read_bytes().count(b"\n") if lines.is_file() else 0


def main() -> None:
    """Watch both."""
    with tempfile.TemporaryDirectory(prefix="growth_") as folder:
        home = Path(folder)
        rolls = kills.programs(home)["eval"].command(home / "rolls")
        rolls += ["--episodes-per-task", "30", "--num-envs", "1"]  # under two modes
        steps = soak.command(home / "data", home / "steps", 600)[1:]
        steps += ["--save-every", "800", "--keep-every", "0"]
        watch("step", steps, home / "steps" / "metrics.jsonl", 600)
        watch("episode", rolls, home / "rolls" / "episodes.jsonl", 60)


if __name__ == "__main__":
    main()
