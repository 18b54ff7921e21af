"""Scripted demonstrations in LIBERO, written in LIBERO's own HDF5 layout.

Each attempt runs the expert of `expert.py` in a fresh episode; successes are kept, and only they are drawn:
what both cameras saw before every action. A finished demonstration is a file of its own until all are there,
so a run that is killed goes on where it stopped, and one that has enough does nothing. Results do not depend
on the number of workers.

    python -m simulator record                                       # the demo's, 4 minutes on two cores
    python -m simulator record --demos-per-task 1 --init-states 0 --size 64 --out data/try
    python -m simulator record --score-only --suite libero_spatial --task-ids 0-9 --noise 0

Layout: LIBERO's demonstration files (arXiv 2306.03310), but `obs[t]` is what a policy sees *before*
`actions[t]` (the public files hold the observation after it): `data.attrs["pairing"]` says so. Pictures are
stored upside down, as there.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import h5py
import numpy as np

import files
from files import Refused, check_numbers, number_from_environment, parse_json, parse_numbers, type_in
from simulator import env as sim
from simulator.expert import Expert, check_solvable
from simulator.goal import way
from simulator.pool import light_start, quiet_worker

PAIRING = "observation_before_action"
CAMERA_NAMES = {"agentview_rgb": "observation.images.image", "eye_in_hand_rgb": "observation.images.image2"}
NOISE_SHARE = np.array([1, 1, 1, 0.1, 0.1, 0.1])
TYPICAL_STEPS = 160  # of a demonstration, for the estimate of disk space
# What a file says of how it was recorded, beside task and seed.
ABOUT = ("suite", "displace", "either", "noise", "size", "draw", "texture_colorspace", "reset")
OFTEN = ("out", "suite", "task_ids", "demos_per_task", "init_states", "displace", "either", "workers")
MODEL_BYTES = 400_000  # of a demonstration's XML and states


@dataclass(frozen=True)
class DemoConfig:
    """Record demonstrations of a suite's tasks, by default the demo's, or score the expert."""

    out: Path = Path("data/demo")
    """Folder of the <task>_demo.hdf5 files."""
    suite: str = "libero_object"
    """libero_spatial, libero_object or libero_goal (its pick-and-place tasks 1, 2, 4, 6, 8, 9)."""
    task_ids: str = "1"
    """Tasks: numbers and ranges, as in 0,3,5-7."""
    demos_per_task: int = number_from_environment("DEMOS", 60)
    """Successful demonstrations wanted of each task."""
    init_states: str = "0-9"
    """Init states in turn: attempt a starts from number a mod n of these n, with displacement a // n. The
    others are left for rollouts."""
    displace: float = 0.06
    """Largest shift of the picked objects in x and in y, metres: a policy that does not see must fail."""
    either: str = ""
    """Objects of which either solves the task: cream_cheese,milk, or milk alone besides the task's own.
    Attempts come in pairs from one start, of which one goes each way."""
    noise: float = 0.15
    """Standard deviation of the noise on the executed translation; a tenth of it on the rotation (a unit is
    5 cm, but 0.5 rad). Labels stay clean."""
    size: int = 128
    """Side of the square pictures, pixels."""
    draw: Literal["exact", "no-reflections", "fast"] = "fast"
    """exact: pictures as published checkpoints expect them; others: for policies trained on these alone."""
    texture_colorspace: Literal["as_installed", "linear"] = "as_installed"
    """linear: textures as MuJoCo 3.3.2 draws them, under any version (`python -m simulator verify`)."""
    reset: Literal["hard", "soft"] = "soft"
    """soft keeps the compiled model between episodes."""
    seed: int = sim.SEED
    """Seed of fixture poses, displacement and noise."""
    workers: int = os.cpu_count() or 1
    """Processes, each with one simulator (1.9 GB)."""
    score_only: bool = False
    """Run the expert without drawing or writing and print its success."""
    attempts_per_task: int | None = None
    """Episodes of each task with --score-only; default: one per init state, with --either two."""

    limits: ClassVar = {
        **dict.fromkeys(("demos_per_task", "attempts_per_task"), (1, 10**6)),
        **{"workers": (1, 1000), "noise": (0, 1), "seed": (0, 2**32 - 1)},
    }

    def __post_init__(self) -> None:
        check_numbers(self)
        self.sim_config()  # checks suite, displacement, size, draw, reset
        if not self.task_ids or not self.init_states:
            raise Refused("--task-ids and --init-states need numbers: write them like 0,3,5-7")
        for task_id in parse_numbers(self.task_ids, "--task-ids"):
            sim.check_task(self.suite, task_id)
            check_solvable(self.suite, task_id)
        parse_numbers(self.init_states, "--init-states", sim.NUM_INIT_STATES)

    def sim_config(self) -> sim.SimConfig:
        """Return the simulator's part."""
        names = ("suite", "size", "draw", "reset", "displace", "either", "seed", "texture_colorspace")
        return sim.SimConfig(**{name: getattr(self, name) for name in names})

    def settings(self, task_id: int) -> dict[str, Any]:
        """Return what decides a task's demonstrations: files of other settings are never mixed."""
        chosen = {name: getattr(self, name) for name in (*ABOUT, "seed")}
        return {**chosen, "task_id": task_id, "init_states": parse_numbers(self.init_states, "--init-states")}


@dataclass(frozen=True)
class Job:
    """One attempt for a worker; `part` None: only score it."""

    config: DemoConfig
    task_id: int
    attempt: int
    part: Path | None

    @property
    def start(self) -> tuple[int, int]:
        """Init state and number of its displacement."""
        ids = parse_numbers(self.config.init_states, "--init-states")
        number = self.attempt // 2 if self.config.either else self.attempt
        return ids[number % len(ids)], number // len(ids)


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended."""

    attempt: int
    success: bool
    steps: int
    seconds: float


# ---------------------------------------------------------------- one attempt, in a worker process

_kept: dict[tuple, sim.LiberoEnv] = {}  # a worker's one environment, kept between attempts


def run_attempt(job: Job) -> Outcome:
    """Try one episode; write its part file if it succeeded. Raises OSError when the disk is full."""
    started = time.perf_counter()
    env = _environment(job)
    recorder, success = try_episode(env, job)
    if success and job.part is not None:
        write_part(job.part, recorder.arrays(), recorder.attributes(), job, file_attributes(env, job.config))
    return Outcome(job.attempt, success, recorder.steps, time.perf_counter() - started)


def try_episode(env: sim.LiberoEnv, job: Job) -> tuple["Recorder", bool]:
    """Run the expert in an episode; return what was noted, and whether it solved the task."""
    env.reset(*job.start)
    recorder = Recorder(env, job)
    goals = [env.goal[way(job.config.seed, job.attempt)]] if job.config.either else env.goal
    return recorder, Expert(env, recorder.execute).solve(goals)


def _environment(job: Job) -> sim.LiberoEnv:
    key = (job.config.sim_config(), job.task_id, job.part is not None)
    if key not in _kept:
        for env in _kept.values():
            env.close()
        _kept.clear()
        _kept[key] = sim.LiberoEnv(job.config.sim_config(), job.task_id, render=job.part is not None)
    return _kept[key]


class Recorder:
    """Executes the expert's actions, with noise if asked, and notes what a policy sees before each."""

    def __init__(self, env: sim.LiberoEnv, job: Job) -> None:
        self.env, self.job, self.steps = env, job, 0
        self.rows: dict[str, list[np.ndarray]] = {}
        self.views: list[list[np.ndarray]] = []  # drawn once the attempt has succeeded
        suite = sim.SUITES.index(job.config.suite)
        self.generator = np.random.default_rng([job.config.seed, suite, job.task_id, job.attempt])

    def execute(self, action: np.ndarray) -> bool:
        """Perform an action (7,); return whether the task is solved."""
        label = np.clip(action, -1, 1)
        if self.job.part is not None:
            self._note(label)
        executed = label.copy()
        if self.job.config.noise:
            noise = self.generator.normal(0, self.job.config.noise, 6) * NOISE_SHARE
            executed[:6] = np.clip(label[:6] + noise, -1, 1)
        self.steps += 1
        return self.env.step(executed)[1]

    def _note(self, label: np.ndarray) -> None:
        obs = self.env.obs
        gripper, position = obs["robot0_gripper_qpos"], obs["robot0_eef_pos"]
        orientation = sim.axis_angle(obs["robot0_eef_quat"]).astype(np.float64)
        row = {
            "actions": label,
            "states": self.env.sim_state(),
            "robot_states": np.concatenate([gripper, position, obs["robot0_eef_quat"]]),
            "obs/ee_pos": position,
            "obs/ee_ori": orientation,
            "obs/ee_states": np.concatenate([position, orientation]),
            "obs/gripper_states": gripper,
            "obs/joint_states": obs["robot0_joint_pos"],
        }
        self.views.append(self.env.view())
        for name, value in row.items():
            self.rows.setdefault(name, []).append(np.array(value))

    def arrays(self) -> dict[str, np.ndarray]:
        """Draw the demonstration and return its datasets, each (T, ...)."""
        last = np.eye(self.steps, dtype=np.uint8)[-1]
        arrays = {name: np.stack(rows) for name, rows in self.rows.items()}
        for name, camera in CAMERA_NAMES.items():  # LIBERO stores what OpenGL reads: upside down
            arrays[f"obs/{name}"] = np.stack([self.env.draw(camera, view)[::-1, ::-1] for view in self.views])
        return arrays | {"rewards": last, "dones": last}

    def attributes(self) -> dict[str, Any]:
        """Return the demonstration's attributes."""
        init_state, displacement = self.job.start
        return {
            "num_samples": self.steps,
            "model_file": self.env.model_xml(),
            "init_state": self.env.start,
            "init_state_id": init_state,
            "displace_draw": displacement,
            "attempt": self.job.attempt,
            "taken": self.env.taken or "",
        }


def file_attributes(env: sim.LiberoEnv, config: DemoConfig) -> dict[str, Any]:
    """Return the attributes of a file's `data` group, LIBERO's and ours."""
    problem, domain = env.env.problem_name, env.env.domain_name
    path = f"libero/bddl_files/{env.task.problem_folder}/{env.task.bddl_file}"
    info = {"problem_name": problem, "domain_name": domain, "language_instruction": env.language}
    sides = {"camera_heights": config.size, "camera_widths": config.size}
    cameras = {"camera_names": list(sim.CAMERAS.values()), **sides}
    robot = {"robots": ["Panda"], "controller": "OSC_POSE", "control_freq": sim.CONTROL_HZ}
    env_args = {"type": 1, "env_name": problem, "problem_name": problem, "bddl_file": path}
    return {
        "env_name": problem,
        "problem_info": json.dumps(info),
        "macros_image_convention": "opengl",
        "bddl_file_name": path,
        "bddl_file_content": env.bddl,
        "env_args": json.dumps({**env_args, "env_kwargs": {**robot, **cameras}}),
        "pairing": PAIRING,
        "language": env.language,
        **{name: getattr(config, name) for name in ABOUT},
        "task_id": env.task_id,
        "env_seed": config.seed,
        "versions": json.dumps(sim.versions()),
    }


# ---------------------------------------------------------------- files


def write_part(
    path: Path, arrays: dict[str, np.ndarray], attributes: dict[str, Any], job: Job, about: dict[str, Any]
) -> None:
    """Write one demonstration under a temporary name, then rename it.

    Raises OSError when the disk is full.
    """
    settings = job.config.settings(job.task_id)
    with _replaced(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["settings"] = json.dumps(settings)
        file.attrs["about"] = json.dumps(about)
        demo = file.create_group("demo")
        demo.attrs.update(attributes)
        for name, array in arrays.items():
            picture = array.ndim == 4
            packed = {"compression": "gzip", "compression_opts": 1, "chunks": (1, *array.shape[1:])}
            demo.create_dataset(name, data=array, **(packed if picture else {}))


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary name that becomes `path` on success and vanishes on failure."""
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # HDF5 reports a full disk as either, its number in the text
        if getattr(error, "errno", None) == errno.ENOSPC or "errno = 28" in str(error):
            raise OSError(errno.ENOSPC, f"no space left on the disk of {path.parent}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Stored:
    """What a task's folder holds already: successful attempts, attempts made, steps of each success."""

    successes: set[int]
    tried: set[int]
    steps: dict[int, int]


def open_checked(path: Path, settings: dict[str, Any]) -> h5py.File:
    """Open demonstrations for reading. Raises Refused if their settings differ, OSError if broken."""
    file = h5py.File(path, "r")
    try:
        check_settings(_stored(file, "settings"), settings, path)
    except (ValueError, KeyError, OSError):
        file.close()
        raise
    return file


def _stored(file: h5py.HLObject, name: str) -> dict[str, Any]:
    """Read JSON that a recording has as an attribute; OSError where it is broken."""
    try:
        return parse_json(file.attrs[name])
    except (ValueError, TypeError) as error:
        raise OSError(f"its {name} are broken: {error}") from error


def check_settings(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raise Refused naming the first setting in which a file differs from this run."""
    stored = {"texture_colorspace": "as_installed", "either": ""} | stored  # from before one could choose
    for name, value in wanted.items():
        if stored.get(name) != value:
            flag = "--" + name.replace("_", "-")
            seen = f"{flag} {_compact(stored.get(name))}, this run asks for {_compact(value)}"
            raise Refused(f"{path} was recorded with {seen}: keep that setting or choose another --out")


def _compact(value: Any) -> str:
    if isinstance(value, list) and len(value) > 1 and value == list(range(value[0], value[-1] + 1)):
        return f"{value[0]}-{value[-1]}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def read_final(path: Path, settings: dict[str, Any]) -> Stored:
    """Return what a finished file holds. Raises Refused for other settings or a broken file."""
    if not path.exists():
        return Stored(set(), set(), {})
    try:
        with open_checked(path, settings) as file:
            steps = {
                int(demo.attrs["attempt"]): int(demo.attrs["num_samples"]) for demo in file["data"].values()
            }
            return Stored(set(steps), set(range(int(file["data"].attrs["attempts"]))), steps)
    except (OSError, KeyError) as error:
        raise Refused(f"{path} is broken ({error}): delete it and run again") from error


def read_parts(folder: Path, settings: dict[str, Any]) -> Stored:
    """Return what unfinished work holds; broken parts are deleted, to be recorded again."""
    steps: dict[int, int] = {}
    for path in sorted(folder.glob("attempt_*.hdf5")):
        try:
            with open_checked(path, settings) as file:
                demo = file["demo"]
                for name in ("actions", "obs/agentview_rgb", "obs/eye_in_hand_rgb"):
                    demo[name][-1]  # a truncated file fails here
                steps[int(demo.attrs["attempt"])] = int(demo.attrs["num_samples"])
        except (OSError, KeyError) as error:
            print(f"{path.name} is broken ({str(error)[:60]}): it is recorded again", flush=True)
            path.unlink()
    failed = {line["attempt"] for line in _log_lines(folder, settings) if not line["success"]}
    return Stored(set(steps), set(steps) | failed, steps)


def _log_lines(folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the attempts of this folder's log; its first line holds the settings, torn ones are left out."""
    path = folder / "attempts.jsonl"
    for number, line, why in files.json_lines(path):
        if number == 1 and not why:
            check_settings(line, settings, folder)
        elif not files.misfit(line, {"attempt": int, "success": bool}):
            yield line


def log_attempt(folder: Path, settings: dict[str, Any], outcome: Outcome) -> None:
    """Append an attempt to the folder's log."""
    path = folder / "attempts.jsonl"
    line = {"attempt": outcome.attempt, "success": outcome.success, "steps": outcome.steps}
    text = "" if path.exists() else json.dumps(settings) + "\n"
    with path.open("a") as log:
        log.write(text + json.dumps({**line, "seconds": round(outcome.seconds, 2)}) + "\n")


def assemble(path: Path, folder: Path, attempts: list[int], settings: dict[str, Any]) -> None:
    """Merge a finished file, if there is one, and the parts into a new finished file; remove the parts.

    attempts: the successful ones to keep, ascending. All attempts up to the last of them have been made.
    """
    with contextlib.ExitStack() as opened:
        sources = {}
        if path.exists():
            data = opened.enter_context(open_checked(path, settings))["data"]
            sources |= {int(demo.attrs["attempt"]): demo for demo in data.values()}
            about = dict(data.attrs)
        for attempt in attempts:
            if attempt not in sources:
                part = opened.enter_context(open_checked(part_path(folder, attempt), settings))
                sources[attempt], about = part["demo"], _stored(part, "about")
        temporary = opened.enter_context(_replaced(path))
        with h5py.File(temporary, "w") as file:
            file.attrs["settings"] = json.dumps(settings)
            target = file.create_group("data")
            target.attrs.update(about)
            for number, attempt in enumerate(attempts):
                source = sources[attempt]
                source.file.copy(source, target, name=f"demo_{number}")  # compressed bytes as they are
            total = sum(int(sources[a].attrs["num_samples"]) for a in attempts)
            target.attrs.update(num_demos=len(attempts), total=total, attempts=attempts[-1] + 1)
    shutil.rmtree(folder)


def part_path(folder: Path, attempt: int) -> Path:
    """Return the file of one attempt."""
    return folder / f"attempt_{attempt:05d}.hdf5"


def check_space(folder: Path, missing: int, size: int) -> None:
    """Raise Refused if the disk can't hold the missing demonstrations, twice while they are merged."""
    parts = [path.stat().st_size for path in folder.glob("attempt_*.hdf5")]
    upper = TYPICAL_STEPS * 2 * 3 * size**2 + MODEL_BYTES
    each = sum(parts) / len(parts) if parts else upper
    need, free = 2 * missing * each + sum(parts), shutil.disk_usage(folder).free
    if need > free:
        have = f"{free / 1e9:.2f} GB are free in {folder.parent}, about {need / 1e9:.2f} GB are needed"
        raise Refused(
            f"the disk is too full: {have}: free some, choose another --out or lower --demos-per-task"
        )


# ---------------------------------------------------------------- scheduling


def next_attempt(successes: set[int], tried: set[int], running: set[int], wanted: int) -> int | None:
    """Return the attempt to start next, or None if the running ones may do.

    An attempt is started only while fewer than `wanted` below it succeeded or may yet: the kept
    demonstrations are then the first `wanted` successes, whatever the number of workers or interruptions.
    """
    attempt = 0
    while attempt in tried or attempt in running:
        attempt += 1
    return attempt if sum(a < attempt for a in successes | running) < wanted else None


def _work(
    pool: ProcessPoolExecutor, jobs: Iterable[Job | None], running: dict[Future, Job], workers: int
) -> Iterator[Outcome]:
    """Yield outcomes as they come, keeping up to `workers` jobs running; a None of `jobs` waits for one."""
    source = iter(jobs)
    while True:
        job = next(source, None) if len(running) < workers else None
        if job is not None:
            with light_start():
                running[pool.submit(run_attempt, job)] = job
        elif running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                yield future.result()
        else:
            return


def record_task(config: DemoConfig, pool: ProcessPoolExecutor, task_id: int, name: str) -> str:
    """Record one task's missing demonstrations; return its summary line.

    Raises Refused if the expert fails.
    """
    path, folder = config.out / f"{name}_demo.hdf5", config.out / f"{name}_demo.parts"
    settings, wanted = config.settings(task_id), config.demos_per_task
    final = read_final(path, settings)
    if len(final.successes) >= wanted:
        return _summary(task_id, final, len(final.tried), 0.0, path) + "  (nothing to do)"
    folder.mkdir(parents=True, exist_ok=True)
    parts = read_parts(folder, settings)
    stored = Stored(final.successes | parts.successes, final.tried | parts.tried, final.steps | parts.steps)
    check_space(folder, wanted - len(stored.successes), config.size)
    limit, running, started, fresh = 2 * wanted + 10, {}, time.perf_counter(), 0

    def jobs() -> Iterator[Job | None]:
        while True:
            attempts = {job.attempt for job in running.values()}
            attempt = next_attempt(stored.successes, stored.tried, attempts, wanted)
            possible = attempt is not None and attempt < limit
            yield Job(config, task_id, attempt, part_path(folder, attempt)) if possible else None

    for outcome in _work(pool, jobs(), running, config.workers):
        log_attempt(folder, settings, outcome)
        stored.tried.add(outcome.attempt)
        if outcome.success:
            stored.successes.add(outcome.attempt)
            stored.steps[outcome.attempt] = outcome.steps
            fresh += 1
        pace = (time.perf_counter() - started) / max(fresh, 1)
        _progress(task_id, stored, outcome, wanted, pace)
    if len(stored.successes) < wanted:
        got = f"{len(stored.successes)} of {wanted} demonstrations after {len(stored.tried)} attempts"
        raise Refused(f"{config.suite} task {task_id}: {got}: lower --noise, --displace or --demos-per-task")
    kept = sorted(stored.successes)[:wanted]
    assemble(path, folder, kept, settings)
    done = Stored(set(kept), set(range(kept[-1] + 1)), {a: stored.steps[a] for a in kept})
    return _summary(task_id, done, len(done.tried), (time.perf_counter() - started) / max(fresh, 1), path)


def _progress(task_id: int, stored: Stored, outcome: Outcome, wanted: int, pace: float) -> None:
    done, tried = len(stored.successes), len(stored.tried)
    result = "ok  " if outcome.success else "fail"
    print(
        f"task {task_id:2d}  {done:4d}/{wanted}  attempt {outcome.attempt:4d} {result}"
        f"  {outcome.steps:4d} steps {outcome.seconds:5.1f} s  success {done}/{tried}"
        f"  {pace:5.2f} s/demo  {max(wanted - done, 0) * pace / 60:5.1f} min left",
        flush=True,
    )


def _summary(task_id: int, stored: Stored, tried: int, pace: float, path: Path) -> str:
    mean = np.mean(list(stored.steps.values()))
    speed = f"{pace:.2f} s/demo, " if pace else ""
    count = len(stored.steps)
    made = f"{count} demonstrations, success {count}/{tried}"
    return f"task {task_id}: {made}, {speed}{mean:.0f} steps mean, {path}"


def score_task(config: DemoConfig, pool: ProcessPoolExecutor, task_id: int) -> tuple[int, int]:
    """Run the expert without drawing; print the task's line and return (successes, attempts)."""
    ways = 2 if config.either else 1
    count = config.attempts_per_task or ways * len(parse_numbers(config.init_states, "--init-states"))
    jobs = [Job(config, task_id, attempt, None) for attempt in range(count)]
    outcomes = sorted(_work(pool, jobs, {}, config.workers), key=lambda outcome: outcome.attempt)
    solved = sum(outcome.success for outcome in outcomes)
    lost = [jobs[outcome.attempt].start for outcome in outcomes if not outcome.success]
    steps = np.mean([outcome.steps for outcome in outcomes])
    seconds = np.mean([outcome.seconds for outcome in outcomes])
    missed = "".join(f"  failed: init state {state} draw {draw}" for state, draw in lost)
    score = f"{config.suite} task {task_id}: {solved}/{len(outcomes)}"
    line = f"{score}  {steps:.0f} steps  {seconds:.1f} s an episode"
    print(line + missed, flush=True)
    return solved, len(outcomes)


def _start_worker() -> None:
    quiet_worker()
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed: an orphan would wait for work for ever


def run(config: DemoConfig) -> None:
    """Record or score all tasks. Raises Refused or OSError with one line for the user."""
    context = multiprocessing.get_context("spawn")
    tasks = parse_numbers(config.task_ids, "--task-ids")
    names = sim.task_names(config.suite)
    for task_id in tasks if config.either else ():
        sim.check_either(config.suite, task_id, config.either)
    if not config.score_only:
        config.out.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(config.workers, mp_context=context, initializer=_start_worker)
    try:
        if config.score_only:
            scores = np.array([score_task(config, pool, task_id) for task_id in tasks])
            print(f"{config.suite}: {scores[:, 0].sum()}/{scores[:, 1].sum()}", flush=True)
        else:
            print("\n".join([record_task(config, pool, task_id, names[task_id]) for task_id in tasks]))
    finally:
        pool.shutdown(cancel_futures=True)


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    config = type_in(DemoConfig, __doc__, OFTEN, "python -m simulator record", args)
    try:
        with files.told(), files.naming(config.out):
            run(config)
    except BrokenProcessPool:
        sys.exit("error: a worker process died (killed, maybe out of memory): lower --workers and run again")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command again to go on")
