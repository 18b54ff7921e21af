"""What an evaluation writes: one JSON line an episode, and which episodes are there already.

tail -n 1 runs/demo/E2-n64000-s0/episodes.jsonl
pytest tests/test_eval.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from pool import Observation
from rollout import Episode, Plan


def read_done(path: Path) -> set[str]:
    """Keys of the episodes that a file holds; a last line cut off by a kill is removed from it."""
    if not path.is_file():
        return set()
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines))
    try:
        return {key_of(json.loads(line)) for line in lines}
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} holds a line that is no episode ({error}): mend or remove it") from error


def key_of(line: dict) -> str:
    """What tells one episode of a run from another."""
    return json.dumps(
        [line[k] for k in ("checkpoint", "memory", "task_id", "init_state", "protocol")], sort_keys=True
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
        **shared,
    }
