"""What an evaluation rolls out: the checkpoint, the protocol, the starts, and where results go.

What the command line leaves open comes from what the training run recorded of its data, so that a policy
meets the pictures and objects that it was trained on; a checkpoint from elsewhere gets LIBERO as published.

    python eval.py runs/demo/E2-n64000-s0 --check     # the protocol, compared with checkpoint and data
    pytest tests/test_plan.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arm import Arm
from files import read_json, write_json
from simulator.env import NUM_INIT_STATES, NUM_TASKS, SUITES, SimConfig, check_task, parse_ids
from smolvla.checkpoint import find_folder

if TYPE_CHECKING:
    from eval import EvalConfig


# ---- checkpoint and results ---------------------------------------------------------------------------


def newest_run(root: Path) -> Path:
    """Find the run folder under `root` whose checkpoint was written last."""
    links = sorted(root.glob("**/last"), key=lambda p: p.stat().st_mtime)
    if not links:
        raise ValueError(
            f"no run under {root}/: train one with `python train.py`, or name a checkpoint folder"
        )
    return links[-1].parent


@dataclass(frozen=True)
class Target:
    """The checkpoint that is rolled out, and where its results go."""

    folder: Path  # the checkpoint's
    out: Path  # the run folder, or one made for a checkpoint without
    name: str  # what results call the checkpoint
    run: dict  # what its training run recorded of itself; empty for a checkpoint without


def find_target(config: EvalConfig) -> Target:
    """Find a run's last checkpoint, a run's named one, a bare checkpoint folder, or a hub id's files.

    Raises ValueError where there is none.
    """
    given = config.checkpoint or str(newest_run(Path("runs")))
    path = Path(given)
    title = path.name if path.is_dir() else given.partition("@")[0].replace("/", "-")
    if path.is_dir() and not (path / "model.safetensors").is_file():
        path = path / "last"
        if not path.is_dir():
            raise ValueError(
                f"{given} is neither a run folder (with `last`) nor a checkpoint folder "
                "(with model.safetensors)"
            )
    folder = find_folder(str(path), config.revision).resolve()
    record = folder.parent / "config.json"
    if record.is_file() and "arm" in (run := read_json(record)):
        return Target(folder, config.out or folder.parent, folder.name, run)
    return Target(folder, config.out or Path("runs/eval", title), folder.name, {})


def open_out(target: Target, arm: Arm) -> None:
    """Make a folder of its own for results, where it is asked for or the checkpoint is of no run of ours.

    Its config.json says of what, so that a report can read it. Raises ValueError where it holds another's.
    """
    if target.run and target.out.resolve() == target.folder.parent:
        return
    record = target.run or {
        "arm": target.out.name, "seed": 0, "total_samples": None,
        "fusion": list(arm.config.sites) or ["none"], "memory": arm.config.memory,
        "blind": arm.config.blind, "data_fingerprint": None,
        "params_total": sum(p.numel() for p in arm.parameters()), "params_trainable": None,
    }  # fmt: skip
    source, path = str(target.folder.parent if target.run else target.folder), target.out / "config.json"
    there = read_json(path).get("results_of", "a training run") if path.is_file() else source
    if there != source:
        raise ValueError(f"{target.out} holds results of {there}, not of {source}: choose another --out")
    target.out.mkdir(parents=True, exist_ok=True)
    write_json(path, record | {"results_of": source})


# ---- protocol and starts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The protocol and the starts of an evaluation."""

    sim: SimConfig
    starts: list[tuple[int, int]]  # (task id, init state)
    seen: set[tuple[int, int]]  # those that a demonstration of the training data started from
    n_action_steps: int
    policy_batch: int
    dtype: str = "float32"

    def record(self) -> dict:
        """The protocol, as it is stored with every result."""
        return self.sim.record() | {
            "n_action_steps": self.n_action_steps, "policy_batch": self.policy_batch, "dtype": self.dtype,
        }  # fmt: skip


def make_plans(config: EvalConfig, run: dict, arm: Arm) -> list[Plan]:
    """Fill what the command line leaves open from the run's training data, a plan a suite.

    Raises ValueError where neither says a suite, or there are not enough init states.
    """
    data = [d for d in run.get("data_provenance") or [] if d.get("suite")]
    suites = config.suites or tuple(dict.fromkeys(d["suite"] for d in data))
    if not suites:
        raise ValueError(
            "--suite is needed: the checkpoint does not say what it was trained on; choose from "
            + ", ".join(s.removeprefix("libero_") for s in SUITES)
        )
    return [
        make_plan(config, suite, {d["task_id"]: d for d in data if d["suite"] == suite}, arm)
        for suite in suites
    ]


def make_plan(config: EvalConfig, suite: str, mine: dict[int, dict], arm: Arm) -> Plan:
    """Plan one suite; mine: task -> what the training data record of it."""
    first = next(iter(mine.values()), {})
    chosen = {}
    for name in ("displace", "draw", "texture_colorspace", "reset", "size"):
        asked = getattr(config, name)
        value = first.get(name) if asked is None else asked
        if value is not None:
            chosen[name] = value
    sim = SimConfig(suite=suite, seed=config.seed, max_steps=config.step_limit(suite), **chosen)
    starts, seen = [], set()
    for task in config.task_ids or sorted(mine) or range(NUM_TASKS[suite]):
        check_task(suite, task)
        used = set(mine.get(task, {}).get("init_state_ids", ()))
        starts += [(task, i) for i in chosen_starts(config, task, used)]
        seen |= {(task, i) for i in used}
    steps = config.n_action_steps or arm.policy.config.n_action_steps
    return Plan(sim, starts, seen, steps, config.policy_batch, config.dtype)


def chosen_starts(config: EvalConfig, task: int, used: set[int]) -> list[int]:
    """The init states of a task, of which demonstrations `used` some; ValueError where there are too few."""
    if config.init_states is not None:
        ids = parse_ids(config.init_states, "--init-states", NUM_INIT_STATES)
    else:
        ids = [i for i in range(NUM_INIT_STATES) if i not in used]
    if len(ids) < (config.episodes_per_task or 1):
        raise ValueError(
            f"--episodes-per-task {config.episodes_per_task}: task {task} has only {len(ids)} left "
            f"({len(used)} are the demonstrations'); ask for fewer, or name --init-states"
        )
    return ids[: config.episodes_per_task]
