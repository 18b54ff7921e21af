"""What an evaluation writes: one JSON line an episode, and which episodes are there already.

The first rank appends to episodes.jsonl, each other to a file of its own beside it, so that no two write to
one file on whatever disk nodes share. When an evaluation begins and ends, the first rank takes the others'
lines in: what a kill left behind is never lost, and never run again. An evaluation under another protocol
than a suite's first has a file of its own, episodes.HASH.jsonl: a stray one stands in nobody's way.

    tail -n 1 runs/demo/E2-n40000-s0/episodes.jsonl
    pytest tests/rollouts/test_episodes.py
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from files import Refused, json_lines, replace_text
from report.stats import wilson
from rollouts.plan import Plan
from rollouts.rollout import Episode
from simulator.pool import Observation

EPISODE = {
    **dict.fromkeys(("checkpoint", "memory", "suite"), str),
    **{"task_id": int, "init_state": int, "protocol": dict, "success": bool | None, "crash": str | None},
    "weights?": str,
}


def file_of(out: Path, plans: Sequence[Plan]) -> Path:
    """Name an evaluation's file: episodes.jsonl, or one that its protocol names, where that holds another."""
    first, protocols = out / "episodes.jsonl", {}
    for line in read_all(first).values():
        protocols.setdefault(line["suite"], set()).add(as_text(line["protocol"], line.get("seed")))
    wanted = {plan.sim.suite: as_text(plan.record(), plan.sim.seed) for plan in plans}
    if all(protocol in protocols.get(suite, {protocol}) for suite, protocol in wanted.items()):
        return first
    return out / f"episodes.{hashlib.sha256(as_text(wanted).encode()).hexdigest()[:8]}.jsonl"


def as_text(*what: object) -> str:
    return json.dumps(what, sort_keys=True)


def own_file(path: Path, rank: int) -> Path:
    """Name the file that a rank appends to: `path` itself for the first, episodes.rank3.jsonl for another."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def parts(path: Path) -> list[Path]:
    """Name the files of other ranks that lie beside `path`."""
    return sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))


def read_lines(path: Path) -> list[dict]:
    """Read a file's episodes; none where there is none. A last line that a kill cut off is left out.

    Raises Refused, naming file and line, for anything else that is no episode.
    """
    lines = []
    for number, line, why in json_lines(path, EPISODE):
        if why:
            raise Refused(f"{path}:{number} is no episode ({why}): mend or remove the line")
        lines.append(line)
    return lines


def gather(path: Path, retry_crashes: bool = False) -> None:
    """Take other ranks' lines into `path`, drop half a line that a kill left, and keep each episode once.

    The file is replaced in one step, and only then the others' are removed: a kill loses nothing. With
    `retry_crashes` episodes that crashed are dropped, so that they run again.
    """
    lines: dict[str, dict] = {}
    for file in (path, *parts(path)):
        for line in read_lines(file):
            if not (retry_crashes and line["crash"]):
                lines.setdefault(key_of(line), line)
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    if text != (path.read_text() if path.is_file() else ""):
        replace_text(path, text)
    for file in parts(path):
        file.unlink()


def read_all(path: Path) -> dict[str, dict]:
    """Read the episodes that are there, by key, those of other ranks too."""
    lines = [line for file in (path, *parts(path)) for line in read_lines(file)]
    return {key_of(line): line for line in lines}


def key_of(line: dict) -> str:
    """What tells one episode from another: the weights by their fingerprint, else by their name."""
    whose = line.get("weights") or line["checkpoint"]
    return json.dumps(
        [whose, *(line[k] for k in ("memory", "task_id", "init_state", "protocol"))], sort_keys=True
    )


def result(plan: Plan, shared: dict, episode: Episode, last: Observation | None, crash: str | None) -> dict:
    """One episode's line; shared holds what all lines of a mode have in common."""
    return {
        "suite": plan.sim.suite,
        "task_id": episode.task,
        "task": episode.prompt,
        "init_state": episode.init_state,
        "seen_in_training": (episode.task, episode.init_state) in plan.seen,
        "success": None if last is None else last.success,
        "taken": None if last is None else last.taken,  # of an ambiguous task's two objects
        "crash": crash,
        "steps": episode.steps,
        "decisions": episode.decisions,
        "final_state": None if last is None else [round(float(x), 6) for x in last.state],
        "seed": plan.sim.seed,
        "prompt": episode.prompt,
        "seconds": round(time.perf_counter() - episode.started, 3),
        "physics_seconds": round(episode.physics, 3),
        "drawing_seconds": round(episode.drawing, 3),
        "policy_seconds": round(episode.policy, 3),
        "render_fingerprint": episode.fingerprint,
        "scenes": plan.scenes,
        **shared,
    }


def summary(lines: Iterable[dict]) -> str:
    """Lay out the successes of each suite and memory mode, with Wilson's 95 %; crashes count neither way."""
    found: dict[tuple[str, str], list[bool]] = {}
    for line in lines:
        found.setdefault((line["suite"], line["memory"]), []).extend(
            [] if line["crash"] else [line["success"]]
        )
    out = [f"{'suite':16s} {'memory':10s} {'success':>9s} {'':>5s}  95 %"]
    for (suite, mode), results in found.items():
        wins, count = sum(results), len(results)
        low, high = wilson(wins, count)
        rate = f"{wins / count:5.0%}  {low:.0%} to {high:.0%}" if count else "    -"
        out.append(f"{suite:16s} {mode:10s} {f'{wins}/{count}':>9s} {rate}")
    return "\n".join(out)
