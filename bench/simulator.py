"""How fast LIBERO runs when only what a policy looks at is drawn: `python -m bench sim`.

A decision falls due every few steps and looks at both cameras. LIBERO's own environment, which lerobot's loop
runs, draws both after every step; `simulator/env.py` when asked. Cases take turns, each in fresh processes,
and execute the same actions from the same start; the fastest of several windows counts. Then CPU time, which
a busy machine changes less, of a control step, an episode without its policy, and demonstrations, beside
robosuite's own step with all its observables, drawn at once. At last eval.py rolls a checkpoint out, from
start to end, and its lines say where the time went.

    python -m bench sim --size tiny --num-envs 1 --picture-size 64    # a minute
    python -m bench sim                                               # spatial task 0, 10 minutes on 2 cores
    python -m bench sim --suite libero_object --draw no-reflections --only process
    python -m bench sim --suite libero_object --task-id 1 --draw fast --picture-size 128 --only CPU
    python -m bench sim --checkpoint runs/demo/E0-s0/last --only evaluation --max-steps 280
"""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from files import Refused, check_numbers
from rollouts.conform import ITEMS
from simulator.env import (
    CAMERAS,
    RENDER_SIZE,
    SEED,
    LiberoEnv,
    SimConfig,
    check_task,
    load_init_states,
    state_vector,
    versions,
)
from simulator.expert import SOLVABLE
from simulator.pool import EnvPool, in_fresh_process
from simulator.record import DemoConfig, Job, try_episode
from simulator.render import free_egl_device, setup_gl

ROOT = Path(__file__).resolve().parents[1]
FOREVER = 10**6  # steps: no measured episode ends by its limit
PARTS = ("physics", "drawing", "policy")
CPU = "CPU beside robosuite's own step"
ATTEMPTS = range(5, 8)  # the expert's: number 6 of the demo's fails, as 11 of its 71 do


@dataclass(frozen=True)
class SimOptions:
    """What `sim` simulates."""

    suite: str = "libero_spatial"
    """LIBERO suite that `sim` runs."""

    task_id: int = 0
    """Its task."""

    draw: Literal["exact", "no-reflections", "fast"] = "exact"
    """How `sim` draws; LIBERO's own environment always draws exactly."""

    picture_size: int = RENDER_SIZE
    """Side of the pictures that `sim` draws, pixels."""

    decide_every: int = 10
    """Steps between two decisions, each of which looks at both cameras."""

    num_envs: tuple[int, ...] = (1, 2)
    """Numbers of processes that `sim` is measured with; the evaluation runs with the last."""

    episodes: int | None = None
    """Episodes of the evaluation; default: 20, or 2 with --size tiny."""

    max_steps: int = 100
    """Steps after which an episode of the evaluation ends."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_task(self.suite, self.task_id)
        self.config()  # checks draw and size
        for flag in ("decide_every", "max_steps"):
            if getattr(self, flag) < 1:
                raise Refused(f"--{flag.replace('_', '-')} {getattr(self, flag)} must be at least 1")
        if min(self.num_envs, default=0) < 1:
            raise Refused(f"--num-envs {self.num_envs} must name numbers of at least 1")
        if self.episodes is not None and not 1 <= self.episodes <= 50:
            raise Refused(f"--episodes {self.episodes} must lie in 1..50, the init states of a task")

    def config(self) -> SimConfig:
        """Return the simulator's part."""
        return SimConfig(self.suite, self.picture_size, self.draw, max_steps=FOREVER)


@dataclass(frozen=True)
class Case:
    """One way to run the environment."""

    name: str
    options: SimOptions
    num_envs: int = 1
    when: Literal["libero", "always", "decisions"] = "decisions"
    repeats: int = 3  # windows
    blocks: int = 2  # decisions of each environment in a window


def plan(options: SimOptions, repeats: int, blocks: int) -> list[Case]:
    """Lay out the cases: LIBERO's own loop, then both ways of drawing with each number of processes."""
    one = {"options": options, "repeats": repeats, "blocks": blocks}
    cases = [Case("LIBERO's own environment, 1 process", when="libero", **one)]
    for n in dict.fromkeys(options.num_envs):
        processes = f"{n} process{'es' * (n > 1)}"
        cases.append(Case(f"drawn at every step, {processes}", num_envs=n, when="always", **one))
        cases.append(Case(f"drawn at decisions, {processes}", num_envs=n, **one))
    return cases


def actions_of(options: SimOptions, block: int) -> np.ndarray:
    """Make the actions (n, 7) between two decisions, the same in every case."""
    return np.random.default_rng(block).uniform(-0.5, 0.5, (options.decide_every, 7))


# ---- steps a second -----------------------------------------------------------------------------------


def measure(case: Case) -> float:
    """Run a case in fresh processes; return the steps a second of the fastest window."""
    if case.when == "libero":
        return in_fresh_process(run_libero, case)
    options, steps = case.options, range(1, case.options.decide_every + 1)
    seen = steps if case.when == "always" else [options.decide_every]
    frames = [(k, camera) for k in seen for camera in CAMERAS]
    with EnvPool(case.num_envs, options.config()) as pool:
        for i in range(case.num_envs):
            pool.reset(i, options.task_id, init_state=i)
        waiting = case.num_envs
        while waiting:
            waiting -= len(pool.ready())
        run = functools.partial(run_window, pool, options, frames)
        run(0, 1)
        return max(run(1 + w * case.blocks, case.blocks) for w in range(case.repeats))


def run_window(
    pool: EnvPool, options: SimOptions, frames: list[tuple[int, str]], first: int, blocks: int
) -> float:
    """Let every environment execute some blocks, none waiting for another; return steps a second."""
    begun, left = time.perf_counter(), dict.fromkeys(range(pool.num_envs), blocks)
    for i in left:
        pool.run(i, actions_of(options, first), frames)
    steps = 0
    while any(left.values()):
        for i, observation in pool.ready():
            if observation.done:
                raise Refused(f"{options.suite} task {options.task_id} was solved by chance: take another")
            left[i], steps = left[i] - 1, steps + options.decide_every
            if left[i]:
                pool.run(i, actions_of(options, first + blocks - left[i]), frames)
    return steps / (time.perf_counter() - begun)


def run_libero(case: Case) -> float:
    """Step LIBERO's own environment, which draws both cameras after each step, as lerobot's loop has it."""
    setup_gl()
    free_egl_device()
    logging.disable(logging.WARNING)  # of a process of its own
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    options = case.options
    suite = benchmark.get_benchmark_dict()[options.suite]()
    task = suite.get_task(options.task_id)
    bddl = Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    sides = {"camera_heights": options.picture_size, "camera_widths": options.picture_size}
    env = OffScreenRenderEnv(bddl_file_name=str(bddl), **sides)
    env.seed(SEED)
    env.reset()
    env.set_init_state(load_init_states(suite, options.task_id)[0])

    def window(first: int, blocks: int) -> float:
        begun = time.perf_counter()
        for block in range(first, first + blocks):
            for action in actions_of(options, block):
                env.step(action)
        return blocks * options.decide_every / (time.perf_counter() - begun)

    window(0, 1)
    best = max(window(1 + w * case.blocks, case.blocks) for w in range(case.repeats))
    env.close()
    return best


# ---- CPU time -----------------------------------------------------------------------------------------


class PlainEnv(LiberoEnv):
    """robosuite's own step, with all its observables; pictures are drawn as soon as they are noted."""

    def _observe_what_is_read(self) -> None:
        super()._observe_what_is_read()
        for name in self.raw.observation_names:
            self.raw.modify_observable(name, "enabled", True)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        success = self.env.step(np.asarray(action, dtype=np.float64))[2]
        self.steps += 1
        return state_vector(self.obs), bool(success)

    def view(self) -> dict[str, np.ndarray]:
        return {camera: self.draw(camera) for camera in CAMERAS}

    def draw(self, camera_key: str, view: dict[str, np.ndarray] | None = None) -> np.ndarray:
        return view[camera_key] if view else super().draw(camera_key, super().view())


def cpu_seconds(case: tuple[type[LiberoEnv], SimOptions, range]) -> dict[str, float]:
    """Return the CPU seconds of a control step, of 100 drawn at decisions with their reset, of recording."""
    make, options, attempts = case
    config = DemoConfig(
        suite=options.suite, task_ids=str(options.task_id), size=options.picture_size, draw=options.draw
    )
    env, spent = make(config.sim_config(), options.task_id), {}
    env.reset(0)  # the first one compiles

    def steps(block: int) -> None:
        for action in actions_of(options, block):
            env.step(action)

    def episode() -> None:
        env.reset(1)
        for block in range(100 // options.decide_every):
            for camera in CAMERAS:
                env.draw(camera)
            steps(block)

    def demonstrations() -> None:
        for number in attempts:
            recorder, success = try_episode(env, Job(config, options.task_id, number, Path("not written")))
            if success:
                recorder.arrays()

    spent["control step"] = min(cpu_time(steps, block) for block in range(10)) / options.decide_every
    spent["episode of 100 steps"] = min(cpu_time(episode) for _ in range(3))
    if options.task_id in SOLVABLE.get(options.suite, ()):
        spent[f"demonstrations, {len(attempts)} tried"] = cpu_time(demonstrations)
    return spent


def cpu_time(function: Callable, *arguments: object) -> float:
    """Return the seconds for which this process, all its threads together, computed."""
    begun = time.process_time()
    function(*arguments)
    return time.process_time() - begun


def compare_cpu(options: SimOptions, attempts: range, rounds: int) -> list[dict]:
    """Measure both ways in turns, each in fresh processes; the least of all rounds counts."""
    ways = [(make, options, attempts) for make in (PlainEnv, LiberoEnv)]
    found = [[in_fresh_process(cpu_seconds, way) for way in ways] for _ in range(rounds)]
    rows = []
    for what in found[0][0]:
        plain, ours = (min(both[way][what] for both in found) for way in (0, 1))
        row = {"case": what, "cpu_seconds": ours, "plain_cpu_seconds": plain}
        rows.append(row | {"times_less_cpu": plain / ours})
    return rows


# ---- an evaluation ------------------------------------------------------------------------------------


def evaluate(options: SimOptions, checkpoint: Path, episodes: int) -> dict:
    """Roll a checkpoint out with eval.py; return how long it took and where the time went."""
    with tempfile.TemporaryDirectory() as temporary:
        flags = {
            "suite": options.suite, "task-ids": options.task_id, "draw": options.draw,
            "size": options.picture_size, "n-action-steps": options.decide_every,
            "max-steps": options.max_steps, "num-envs": options.num_envs[-1],
            "episodes-per-task": episodes, "init-states": f"0-{episodes - 1}", "out": temporary,
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "eval.py"), str(checkpoint)]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command += ["--accept", *ITEMS]  # what success would mean is not asked here
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds = time.perf_counter() - begun
        if done.returncode:
            raise Refused(f"eval.py failed: {(done.stderr.strip() or 'it said nothing').splitlines()[-1]}")
        lines = [json.loads(line) for line in Path(temporary, "episodes.jsonl").read_text().splitlines()]
    found = {"case": name_of(episodes), "num_envs": options.num_envs[-1], "seconds": seconds}
    return found | shares(lines)


def name_of(episodes: int) -> str:
    """Name an evaluation, for --only and the table."""
    return f"evaluation of {episodes} episode{'s' * (episodes > 1)}"


def shares(lines: list[dict]) -> dict:
    """Add up an evaluation's episodes: seconds by part, and their shares of what the episodes took.

    Physics holds resets and building; what is left is starting processes and waiting for one another.
    """
    crashes = sum(line["crash"] is not None for line in lines)
    took = sum(line["seconds"] for line in lines)
    parts = {part: sum(line[f"{part}_seconds"] for line in lines) for part in PARTS}
    parts["waiting"] = max(0.0, took - sum(parts.values()))
    out = {"episodes": len(lines), "crashes": crashes, "steps": sum(line["steps"] for line in lines)}
    out |= {"decisions": sum(line["decisions"] for line in lines), "episode_seconds": took}
    out |= {f"{part}_seconds": value for part, value in parts.items()}
    return out | {f"{part}_share": value / took for part, value in parts.items()}


# ---- lines and table ----------------------------------------------------------------------------------


def compare(cases: list[Case], rates: list[float]) -> list[dict]:
    """Put each case's steps a second beside drawing always, with as many processes, and beside LIBERO's."""
    always = {case.num_envs: r for case, r in zip(cases, rates, strict=True) if case.when == "always"}
    libero = next((r for case, r in zip(cases, rates, strict=True) if case.when == "libero"), None)
    rows = []
    for case, rate in zip(cases, rates, strict=True):
        row = {"case": case.name, "num_envs": case.num_envs, "steps_per_second": rate}
        if case.num_envs in always:
            row["times_faster_than_always"] = rate / always[case.num_envs]
        if libero is not None:
            row["times_faster_than_libero"] = rate / libero
        rows.append(row)
    return rows


def lines(
    options: SimOptions,
    size: str,
    checkpoint: Path | None,
    write: Callable[[Path, str], None],
    turns: tuple[int, int],
    only: str,
) -> Iterator[dict]:
    """Measure case after case; gives each one's JSON line.

    write makes a random checkpoint of a preset; turns are (windows of a turn, turns). Raises Refused
    where `only` names no case.
    """
    episodes = options.episodes or (2 if size == "tiny" else 20)
    repeats, rounds = turns
    cases = plan(options, repeats, 1 if size == "tiny" else 2)
    names = [*(case.name for case in cases), CPU, name_of(episodes)]
    if not any(only in name for name in names):
        raise Refused(f"--only {only!r} is in no case's name: these are {'; '.join(names)}")
    setup_gl()
    common = {"what": "sim", "suite": options.suite, "task_id": options.task_id, "draw": options.draw}
    common |= {"picture_size": options.picture_size, "decide_every": options.decide_every}
    common |= {"versions": versions()}
    cases = [case for case in cases if only in case.name]
    found = [[measure(case) for case in cases] for _ in range(rounds)]
    for row in compare(cases, [max(of) for of in zip(*found, strict=True)]):
        yield common | row
    if only in CPU:
        yield from (
            common | row for row in compare_cpu(options, ATTEMPTS[: 1 if size == "tiny" else None], rounds)
        )
    if only in names[-1]:
        with tempfile.TemporaryDirectory() as temporary:
            if checkpoint is None:
                checkpoint = Path(temporary) / "random"
                write(checkpoint, "tiny")
            yield common | {"max_steps": options.max_steps} | evaluate(options, checkpoint, episodes)


def table(rows: list[dict]) -> str:
    """Lay cases out, then the evaluation's parts."""
    head = f"{'case':38s} {'steps/s':>8s} {'beside always':>14s} {'beside LIBERO':>14s}"
    out = [head] * any("steps_per_second" in row for row in rows)
    for row in rows:
        if "steps_per_second" in row:
            ratios = (row.get(f"times_faster_than_{name}") for name in ("always", "libero"))
            cells = " ".join(f"{'' if x is None else f'{x:.2f} x':>14s}" for x in ratios)
            out.append(f"{row['case']:38s} {row['steps_per_second']:8.1f} {cells}")
            continue
        if "times_less_cpu" in row:
            ours, plain = 1000 * row["cpu_seconds"], 1000 * row["plain_cpu_seconds"]
            out.append(
                f"{row['case']:38s} {ours:8.1f} ms of CPU, by robosuite's own step {plain:.1f}: "
                f"{row['times_less_cpu']:.2f} x"
            )
            continue
        each = row["seconds"] / row["episodes"]
        out.append(
            f"{row['case']}, {row['num_envs']} at once: {row['seconds']:.0f} s, {each:.1f} s an episode, "
            f"{row['steps']} steps, {row['decisions']} decisions, {row['crashes']} crashes"
        )
        for part in (*PARTS, "waiting"):
            out.append(f"  {part:8s} {row[f'{part}_seconds']:8.1f} s {row[f'{part}_share']:6.1%}")
    return "\n".join(out)
