"""Runs the cells of run_matrix.sh: what is done is skipped, what was interrupted goes on, failures are named.

A cell is one arm, budget and seed: a run folder that train.py fills and eval.py rolls out. The folder says
how far it is, and `finished.txt` in it which commands ended well. Cells share data and caches, which are
prepared first, and nothing else: each may be called again, by a person or a scheduler, and of two processes
at one cell the second leaves it. Arms, presets and budgets come from the environment, where run_matrix.sh
puts them. Python is all that is needed here, so that --dry-run and --list work on a fresh clone.

    ./run_matrix.sh smoke --dry-run     # commands and time left
    ./run_matrix.sh smoke               # prepares, trains, rolls out, reports
    pytest tests/test_matrix.py
"""

from __future__ import annotations

import gzip
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TextIO

from files import Busy, Refused, let_readers_go, locked, parse_json, plain, replace_text, sign
from smolvla.config import PRETRAINED, RECIPES

WHOLE, TASK = "[1-9][0-9]{0,14}", "[0-9]{1,4}(-[0-9]{1,4})?"
NUMBERS = {  # variable: what each of its words must look like, an example; a list where that has several
    "TOTAL_SAMPLES": (WHOLE, "'40000 120000'"),
    "EVAL_AT": (WHOLE, "'10000 20000'"),
    "SEEDS": ("[0-9]{1,9}", "'0 1 2'"),
    "TASKS": (f"{TASK}(,{TASK})*", "'0 3 5-7'"),
    "EPISODES": (WHOLE, "'40 20'"),
    **dict.fromkeys(("DEMOS", "JOBS", "WORLD_STRIDE"), (WHOLE, "4")),
    **dict.fromkeys(("DISPLACE", "NOISE"), (r"[0-9]{0,9}\.?[0-9]{1,9}", "0.06")),
}
LATENTS = ("encoder", "camera", "dim", "resolution", "clip", "model", "revision")  # --world-...
ACTIONS = ("", "--dry-run", "--list", "--prepare", "--cell", "--report")
GRACE = 60  # seconds that commands have to save what they have, once they are asked to stop
UNSEEN = "10"  # demonstrations a task for losses on frames that no cell is trained on
KEPT = 300  # log lines of a finished cell that are kept
LOOK = 60  # seconds between two looks at a cell that runs
STARTED = time.monotonic()


class Failed(Exception):
    """A command did not come to its end."""


# ---- what is asked for ---------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A line of the table."""

    name: str
    flags: list[str]  # of train.py
    modes: list[str]  # memory modes that are rolled out, its own first
    controls: list[str]  # arms that reports compare it with


class Cell(NamedTuple):
    """One arm, trained on one budget of samples from one seed."""

    arm: Arm
    budget: int
    seed: int
    early: list[int]  # samples of checkpoints that are rolled out besides the last

    @property
    def name(self) -> str:
        return f"{self.arm.name}-n{self.budget}-s{self.seed}"


def read_arms(table: str, more_modes: list[str]) -> dict[str, Arm]:
    """Read the table's lines, and add modes to arms whose own is pred; Refused where one cannot be."""
    arms = {}
    for line in filter(str.strip, table.splitlines()):
        fields = [shlex.split(field) for field in line.split("|")]
        if len(fields) != 4 or len(fields[0]) != 1 or not fields[2]:
            raise Refused(f"the table's line {line!r} is not: name | flags | memory modes | compared with")
        [name], flags, modes, controls = fields
        modes = [*dict.fromkeys(modes + (more_modes if modes[0] == "pred" else []))]
        arms[name] = Arm(name, flags, modes, controls)
    for arm in arms.values():
        for control in set(arm.controls) - set(arms):
            raise Refused(f"arm {control!r}, which {arm.name} is compared with, is not in the table")
    return arms


class Job:
    """What the environment asks for; Refused names the variable, its value and what it can be."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env, self.data, self.init, self.out = env, env["DATA"], env["INIT"], Path(env["OUT"])
        for name, (pattern, example) in NUMBERS.items():
            words = env.get(name, "").split()
            fit = all(re.fullmatch(pattern, word) for word in words)
            if not fit or (len(words) > 1 and " " not in example):
                raise Refused(f"{name} {env[name]!r} cannot be: give numbers, as in {name}={example}")
        self.recorded, tiny = bool(env["RECORDED"]), self.init == "tiny"
        self.offline = env.get("OFFLINE", "")  # demonstrations that no cell is trained on
        self.suites = [f"libero_{suite.removeprefix('libero_')}" for suite in env["SUITES"].split()]
        if not self.suites:
            example = "SUITES='libero_object libero_goal'"
            raise Refused(f"DATA={self.data} is given: say what to roll out as well, as in {example}")
        ends = [part.partition("-")[::2] for part in env["TASKS"].replace(",", " ").split()]
        self.tasks = [str(task) for a, b in ends for task in range(int(a), int(b or a) + 1)]

        self.devices = env.get("GPUS", "").split()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.jobs = int(env.get("JOBS") or len(self.devices) or (cores if tiny else 1))
        share = max(1, cores // self.jobs)  # of the cores, for each cell
        self.threads = threads = [] if tiny else ["--threads", str(share)]
        self.envs = 1 if tiny else share
        features = "data/features_" + f"{self.data}_{self.init}".replace("/", "_")
        self.features = "" if tiny else env.get("FEATURES", features)

        self.train_flags = ["--init", self.init, *self.flags("POLICY_FLAGS"), *threads]
        self.more_train_flags = self.flags("DATA_FLAGS") + self.flags("TRAIN_FLAGS")
        pairs = pairwise(self.train_flags + self.more_train_flags)
        sizes = [int(size) for flag, size in pairs if flag == "--batch-size" and size.isdecimal()]
        self.batch = [RECIPES.get(self.init, PRETRAINED)["batch_size"], *sizes][-1]
        early = [int(at) for at in env.get("EVAL_AT", "").split()]
        for at in early:
            if at % self.batch:
                raise Refused(f"EVAL_AT '{at}' is no multiple of the batch size, {self.batch}")
        self.cells = self.read_cells(early)
        every = math.gcd(*early) or env["SAVE_EVERY"]  # the largest step that meets them all
        self.train_flags += ["--save-every", str(every)] if every else []

        starts = [*map(int, env["EPISODES"].split())]  # a task, under an arm's own mode; in all else
        if len(starts) > 2:
            raise Refused(f"EPISODES '{env['EPISODES']}' cannot be: give one number, or two")
        self.starts = starts[0], starts[-1]
        self.eval_flags = ["--num-envs", str(self.envs)]
        self.eval_flags += [*self.flags("PRESET_EVAL_FLAGS"), *threads]
        self.eval_flags += ["--suite", *self.suites] if not self.recorded or len(self.suites) > 1 else []
        self.eval_flags += ["--task-ids", ",".join(self.tasks)] if not self.recorded else []
        self.eval_flags += self.flags("EVAL_FLAGS")
        # Where finished cells' records are kept, and found by whoever goes on with the study.
        self.keep = Path(env["KEEP"]) if env.get("KEEP") else None
        self.report = ["python", "-m", "report", str(self.keep or self.out)]
        self.report += ["--out", str(self.out / "report")] if self.keep else []

    def flags(self, name: str) -> list[str]:
        """Split a variable into flags as a shell does, quotes and all."""
        try:
            return shlex.split(self.env.get(name, ""))
        except ValueError as error:  # a quote without its partner
            raise Refused(f"{name} {self.env[name]!r} cannot be split into flags: {error}") from error

    def read_cells(self, early: list[int]) -> list[Cell]:
        env = self.env
        table = read_arms(env["ARM_TABLE"], env["MORE_MODES"].split())
        words = [word.partition(":") for word in (table if env["ARMS"] == "all" else env["ARMS"].split())]
        names = {name: count for name, _, count in words}  # how many seeds, where not all
        for name, count in names.items():
            if name not in table:
                raise Refused(f"arm {name!r} is not in the table: choose among {' '.join(table)}, or all")
            if count and not re.fullmatch(WHOLE, count):
                raise Refused(f"ARMS '{name}:{count}' cannot be: give a number of seeds, as in ARMS={name}:4")
        budgets, seeds = (dict.fromkeys(map(int, env[name].split())) for name in ("TOTAL_SAMPLES", "SEEDS"))
        return [
            Cell(table[name], budget, seed, [at for at in early if at < budget])
            for budget in budgets
            for i, seed in enumerate(seeds)
            for name, count in names.items()
            if i < int(count or len(seeds))
        ]


def choose(job: Job, action: str, only: str) -> list[Cell]:
    """Return the cells that the command line asks for; Refused where it asks for what there is not."""
    if action not in ACTIONS or (only and action != "--cell"):
        choices = "--dry-run, --list, --prepare, --cell NAME or --report, or nothing for all"
        raise Refused(f"{f'{action} {only}'.strip()!r} is unknown: choose {choices}")
    lists = f"'./run_matrix.sh {job.env['preset']} --list' prints"
    if action == "--cell" and not only:
        raise Refused(f"--cell needs a name or number: {lists} them, a line each")
    found = [cell for number, cell in enumerate(job.cells, 1) if only in ("", cell.name, str(number))]
    if not found:
        raise Refused(f"cell {only!r} is not in the list: {lists} it")
    return found


# ---- commands ------------------------------------------------------------------------------------------


def recordings(job: Job) -> list[list[str]]:
    """Return the commands that record demonstrations, a suite each, into one folder; none for given data."""
    env, record = job.env, ["python", "-m", "simulator", "record"]
    flags = ["--task-ids", ",".join(env["TASKS"].split())]
    flags += ["--displace", env.get("DISPLACE", ""), "--noise", env.get("NOISE", ""), "--size", "128"]
    flags += ["--either", env["EITHER"]] if env.get("EITHER") else []
    flags += ["--draw", "fast", "--reset", "soft", "--workers", str(job.jobs)]
    sets = [(job.data, "0-9", env.get("DEMOS", ""))]  # rollouts start from the other states
    sets += [(job.offline, "10-19", UNSEEN)] if job.offline else []
    return [
        [*record, "--suite", suite, *flags, "--init-states", states, "--demos-per-task", demos, "--out", out]
        for out, states, demos in sets
        for suite in (job.suites if job.recorded else ())
    ]


def training(job: Job, cell: Cell, *where: str) -> list[str]:
    """Return the flags of train.py that train a cell."""
    blind = "--blind" in cell.arm.flags  # its mean picture needs the pictures
    tokens = ["--features", job.features] if job.features and not blind else []
    flags = ["--data", job.data, *where, "--total-samples", str(cell.budget), "--seed", str(cell.seed)]
    return [*flags, *job.train_flags, *tokens, *cell.arm.flags, *job.more_train_flags]


def preparations(job: Job) -> list[list[str]]:
    """Return the commands that make all cells' caches, one for each kind of world latents that arms with
    memory name: that of an arm with eyes, if any has. Without memory there is one kind."""
    cells = [cell for cell in job.cells if cell.arm.modes[0] != "off"] or job.cells
    kinds: dict[tuple[str, ...], Cell] = {}
    for cell in sorted(cells, key=lambda cell: "--blind" in cell.arm.flags):
        kinds.setdefault(world_flags(cell.arm.flags), cell)
    devices = len(set(job.devices))
    launch = ["torchrun", "--standalone", "--nproc-per-node", str(devices)] if devices > 1 else ["python"]
    return [[*launch, "train.py", "--prepare", *training(job, cell)] for cell in kinds.values()]


def world_flags(flags: list[str]) -> tuple[str, ...]:
    """Pick the flags, and their values, that say what world latents are made of."""
    starts = [i for i, flag in enumerate(flags) if flag.startswith("--")] + [len(flags)]
    parts = sorted(flags[a:b] for a, b in pairwise(starts))
    return tuple(word for part in parts if part[0].removeprefix("--world-") in LATENTS for word in part)


def rollouts(job: Job, cell: Cell) -> list[tuple[int, list[str], int]]:
    """Say what is rolled out: samples of the checkpoint, memory modes, starts a task."""
    own, more, (first, others) = cell.arm.modes[:1], cell.arm.modes[1:], job.starts
    last = [(own, first), (more, others)] if more and first != others else [(own + more, first)]
    return [(cell.budget, *what) for what in last] + [(at, own, others) for at in cell.early]


def steps(job: Job, cell: Cell, dry: bool = False) -> Iterator[tuple[list[str], Callable[[], bool]]]:
    """Yield a cell's commands, each with what tells whether it is done; Refused for a missing checkpoint.

    dry: nothing is looked at; checkpoints have the names that training gives them.
    """
    folder = job.out / cell.name
    compared = ["--compared-with", *cell.arm.controls] if cell.arm.controls else []
    train = ["python", "train.py", "--arm", cell.arm.name, *compared]
    train += training(job, cell, "--out", str(folder))
    yield train, lambda: parse(text(folder / "last" / "state.json")).get("samples") == cell.budget
    for at, modes, starts in rollouts(job, cell):
        roll_out = ["python", "eval.py", str(checkpoint(job, cell, at, dry)), "--memory", *modes]
        roll_out += ["--episodes-per-task", str(starts), *job.eval_flags]
        yield roll_out, (folder / "episodes.jsonl").exists
    for at in (cell.budget, *cell.early) if job.offline else ():
        measure = ["python", "eval.py", str(checkpoint(job, cell, at, dry)), "--offline", job.offline]
        yield [*measure, *job.threads], (folder / "offline.jsonl").exists


def checkpoint(job: Job, cell: Cell, at: int, dry: bool) -> Path:
    """Find a cell's checkpoint of so many samples: the run folder itself for the last."""
    folder = job.out / cell.name
    if at == cell.budget:
        return folder
    if dry:
        return folder / f"step_{at // job.batch:06d}"
    states = sorted(folder.glob("step_*/state.json"))
    found = [state.parent for state in states if parse(text(state)).get("samples") == at]
    if not found:
        raise Refused(f"{folder} has no checkpoint of {at} samples: choose another OUT")
    return found[0]


# ---- what is there, and what is left -------------------------------------------------------------------


def text(path: Path) -> str:
    """Read a file; nothing where it is missing."""
    return path.read_text(errors="replace") if path.is_file() else ""


def parse(line: str) -> dict:
    """Read a JSON object; empty where there is none, as in a line that is being written."""
    try:
        return parse_json(line)
    except ValueError:
        return {}


@lru_cache(512)
def values(log: Path, key: str, changed: tuple[int, int]) -> list[float]:
    """Read a key's numbers from a log; changed, its size and time, tells when to read again."""
    found = [parse(line).get(key) for line in text(log).splitlines()]
    return [value for value in found if isinstance(value, float | int) and 0 < value < math.inf]


def numbers(logs: Iterable[Path], key: str) -> list[float]:
    """Gather a key's numbers from logs."""
    stats = [(log, log.stat()) for log in logs]
    return [value for log, stat in stats for value in values(log, key, (stat.st_size, stat.st_mtime_ns))]


def measured(job: Job, arm: Arm, key: str, logs: Iterable[Path]) -> float | None:
    """Return the median over runs from the same initial policy, this arm's if there are any; None: no run."""
    logs = {log.resolve() for log in logs if parse(text(log.parent / "config.json")).get("init") == job.init}
    own = {log for log in logs if log.parent.name.startswith(f"{arm.name}-n")}
    found = numbers(own, key) or numbers(logs, key)
    return statistics.median_low(found) if found else None


def standing(job: Job, cell: Cell, live: bool = False) -> tuple[float | None, tuple[int, int], str]:
    """Look how far a cell is, at its last checkpoint or, live, at its log; and how fast such cells were.

    Returns minutes left, None where that was not measured yet, tenths of samples and episodes, and a line.
    """
    if is_kept(job, cell):
        return 0.0, (10, 10), f"done before: {cell.name}, in {job.keep}"
    folder = job.out / cell.name
    found = [parse(text(folder / "last" / "state.json")).get("samples")]
    found += numbers(folder.glob("metrics.jsonl"), "samples")[-1:] if live else []
    samples = min(cell.budget, max([0, *(n for n in found if isinstance(n, int))]))
    places = len(job.tasks) * len(job.suites)
    wanted = places * sum(len(modes) * starts for _, modes, starts in rollouts(job, cell))
    lines = sum(text(path).count("\n") for path in folder.glob("episodes*.jsonl"))
    episodes = min(wanted, lines)  # what else was rolled out by hand is there, too

    logs = [*job.out.glob("*/metrics.jsonl"), *Path("runs").glob("*/*/metrics.jsonl")]
    rate = measured(job, cell.arm, "samples_per_second", logs)
    # Of OUT alone, since step limits differ elsewhere.
    each = measured(job, cell.arm, "seconds", job.out.glob("*/episodes.jsonl"))
    train, roll_out = cell.budget - samples, wanted - episodes
    minutes, left = None, "time left not measured yet"
    if (rate or not train) and (each or not roll_out):
        minutes = (train / (rate or 1) + roll_out * (each or 0) / job.envs) / 60
        left = f"{minutes:8.1f} min left"
    line = f"{left}: {cell.name} has {samples:,} of {cell.budget:,} samples"
    line += f", {episodes:,} of {wanted:,} episodes"
    line += f"; {rate:.1f} samples/s measured" if rate else ""
    line += f"; {each:.1f} s an episode measured" if each else ""
    return minutes, (10 * samples // cell.budget, 10 * episodes // wanted), line


def all_left(job: Job, live: bool = False) -> str:
    """Say how long all cells take, JOBS at a time."""
    minutes = [left for cell in job.cells if (left := standing(job, cell, live)[0]) != 0]
    at_once, unknown = max(1, min(job.jobs, len(minutes))), minutes.count(None)
    hours = sum(left or 0 for left in minutes) / 60
    words = f"{len(minutes)} of {len(job.cells)} cells left, {at_once} at a time"
    words += f", {unknown} of them not measured yet" if unknown else ""
    return words + (f": {hours:.2f} h of work, {hours / at_once:.2f} h" if hours else "")


def is_kept(job: Job, cell: Cell) -> bool:
    """Whether the records of a cell are there, with each of its commands carried out."""
    kept = job.keep and text(job.keep / cell.name / "finished.txt").splitlines()
    return bool(kept) and all(shlex.join(command) in kept for command, _ in steps(job, cell, dry=True))


def keep(folder: Path, target: Path) -> None:
    """Copy what a report reads of a finished cell, log lines thinned, lines packed; finished.txt last."""
    target.mkdir(parents=True, exist_ok=True)
    episodes = sorted(path.stem for path in folder.glob("episodes*.jsonl"))
    for name in ("metrics", "offline", *episodes):
        lines = text(folder / f"{name}.jsonl").splitlines(keepends=True)
        if name == "metrics":  # measurements on held-out episodes have no loss
            logs = [line for line in lines if "loss" in parse(line)]
            thin = {*logs[:: -(-len(logs) // KEPT) or 1], *logs[-1:]}
            lines = [line for line in lines if line in thin or "loss" not in parse(line)]
        if lines:
            packed = gzip.compress("".join(lines).encode(), mtime=0)
            replace_text(target / f"{name}.jsonl.gz", packed)
    for name in ("config.json", "env.json", "finished.txt"):
        replace_text(target / name, text(folder / name))


# ---- processes -----------------------------------------------------------------------------------------


def say(line: str, log: TextIO | None = None) -> None:
    """Print a line with the time since the start, to the console or to a cell's log."""
    minutes, seconds = divmod(int(time.monotonic() - STARTED), 60)
    print(f"[{minutes:3d}:{seconds:02d}] {line}", file=log or sys.stdout, flush=True)


class Crew:
    """The commands that run now. Ctrl-C and SIGTERM ask them to save and end; a second time kills them."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env, self.guard, self.stopping = dict(env), threading.Lock(), False
        self.processes: set[subprocess.Popen] = set()
        self.signals: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, lambda number, _: self.signals.append(number))

    def run(
        self,
        command: list[str],
        device: str,
        held: TextIO | None = None,
        log: TextIO | None = None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """Run a command to its end, calling `tell` now and then; Failed says how one that fails ended.

        It has a session of its own, so that Ctrl-C is ours to hand on. held: a lock that it holds as well, so
        that it stays taken where this program alone is killed.
        """
        say(shlex.join(command), log)
        env = dict.fromkeys(("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES") if device else (), device)
        more = {"env": self.env | env, "stdin": subprocess.DEVNULL, "start_new_session": True}
        more |= {"stdout": log, "stderr": subprocess.STDOUT} if log else {}
        more |= {"pass_fds": [held.fileno()]} if held else {}
        with self.guard:
            if self.stopping:
                raise Failed("stopped")
            process = subprocess.Popen(command, **more)
            self.processes.add(process)
        if held:
            sign(held, process.pid, shlex.join(command))
        while process.poll() is None:
            try:
                process.wait(LOOK)
            except subprocess.TimeoutExpired:
                tell()
        self.processes.discard(process)
        if code := process.returncode:
            lines = text(Path(log.name)).strip().splitlines() if log else []
            ended = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
            raise Failed(f"{ended}: {plain(lines[-1] if lines else shlex.join(command))[:300]}")

    def stop(self) -> None:
        """Ask all commands to end, wait for what they save, then kill what is left of them."""
        with self.guard:
            self.stopping, processes = True, list(self.processes)
        say(f"stopping: {len(processes)} commands save what they have; once more to kill them")
        for process in processes:
            process.terminate()
        end = time.monotonic() + GRACE
        while any(p.poll() is None for p in processes) and len(self.signals) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        for process in processes:
            with suppress(OSError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)  # their workers, too


@contextmanager
def lock(path: Path, waits: Crew | None = None) -> Iterator[TextIO]:
    """Hold PATH.lock; where it is held, wait while the crew works, or raise Busy, and say who holds it."""
    going = (lambda: not waits.stopping) if waits else (lambda: False)
    with locked(Path(f"{path}.lock"), "run_matrix.sh", going, say) as file:
        yield file


def carry_out(todo: dict[str, Callable[[str], None]], places: list[str], crew: Crew) -> list[str]:
    """Run each piece of work on the first place that is free, tell what fails, and return its names."""
    waiting, free, running, failed = list(todo), list(places), {}, []
    with ThreadPoolExecutor(len(places)) as pool:
        while (waiting or running) and not crew.signals:
            while waiting and free:
                name, place = waiting.pop(0), free.pop(0)
                running[pool.submit(todo[name], place)] = name, place
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                name, place = running.pop(future)
                free.append(place)
                try:
                    future.result()
                except Busy as error:
                    say(f"skipped: {name}: {error}")
                except (Failed, Refused, OSError) as error:
                    say(f"FAILED: {name}: {error}")
                    failed.append(name)
        if crew.signals and not crew.stopping:
            crew.stop()
    return failed


# ---- the job -------------------------------------------------------------------------------------------


def prepare(job: Job, crew: Crew, device: str) -> None:
    """Make what cells share: data and caches. Where all is there, the programs only look."""
    with lock(Path(job.data), crew) if job.recorded else nullcontext() as held:
        for command in recordings(job):
            crew.run(command, "", held)
        for command in preparations(job):
            crew.run(command, device, held)


def run_cell(job: Job, cell: Cell, crew: Crew, alone: bool, device: str) -> None:
    """Train and roll out, on the console where it runs alone; Busy or Failed where that cannot be."""
    folder, told = job.out / cell.name, None

    def tell() -> None:  # where a tenth more is done
        nonlocal told
        _, tenths, line = standing(job, cell, live=True)
        if tenths != told and not alone:
            say(line.strip())
        told = tenths

    with lock(folder) as held, nullcontext() if alone else open(f"{folder}.log", "a") as log:
        where = (f" on device {device}" if device else "") + ("" if alone else f", log in {folder}.log")
        say(f"begin: {cell.name}{where}")
        for command, is_done in steps(job, cell):
            line, finished = shlex.join(command), folder / "finished.txt"
            if is_done() and line in text(finished).splitlines():
                say(f"done before: {line}", log)
                continue
            crew.run(command, device, held, log, tell)
            if not is_done():  # a training that SIGTERM stops ends well, too
                raise Failed(f"stopped before its end; the same command goes on: {line}")
            with finished.open("a") as file:
                file.write(line + "\n")
        if job.keep:
            keep(folder, job.keep / cell.name)
    say(f"done: {cell.name}" + ("" if alone else f"; {all_left(job, live=True)}"))


def dry_run(job: Job) -> None:
    """Print all commands and the time that they take."""
    cells = [command for cell in job.cells for command, _ in steps(job, cell, dry=True)]
    for command in (*recordings(job), *preparations(job), *cells, job.report):
        say(shlex.join(command))
    for cell in job.cells:
        print(standing(job, cell)[-1])
    print(f"{all_left(job)}, without data and caches")


def work(job: Job, action: str, cells: list[Cell], crew: Crew) -> list[str]:
    """Prepare, run cells, report: all or the piece that is asked for. Return the names of what failed."""
    failed, devices = [], job.devices or [""]
    if action in ("", "--prepare"):
        todo = {"data and caches": partial(prepare, job, crew)}
        if failed := carry_out(todo, [",".join(dict.fromkeys(devices))], crew):
            return failed
    if action in ("", "--cell"):
        for cell in (kept := [cell for cell in cells if is_kept(job, cell)]):
            say(f"done before: {cell.name}, in {job.keep}")
        cells = [cell for cell in cells if cell not in kept]
        todo = {cell.name: partial(run_cell, job, cell, crew, action == "--cell") for cell in cells}
        places = [devices[i % len(devices)] for i in range(max(1, min(job.jobs, len(cells))))]
        failed = carry_out(todo, places, crew)
    if action in ("", "--report"):
        failed += carry_out({"report": partial(crew.run, job.report)}, [""], crew)
    return failed


def main(arguments: list[str], env: Mapping[str, str]) -> int:
    """Do what run_matrix.sh is called for, or with --check see whether it can be; return the exit code."""
    let_readers_go()
    words = [word for word in arguments[1:] if word != "--check"]
    action, only = "".join(words[:1]), " ".join(words[1:])
    try:
        job = Job(env)
        cells = choose(job, action, only)
    except Refused as error:
        print(f"run_matrix.sh: {error}", file=sys.stderr)
        return 2
    if "--check" in arguments:
        return 0
    if action in ("--list", "--dry-run"):
        print("\n".join(cell.name for cell in cells)) if action == "--list" else dry_run(job)
        return 0
    crew = Crew(env)
    failed = work(job, action, cells, crew)
    if crew.signals:
        stopped = f"stopped by {signal.Signals(crew.signals[0]).name}; the same command goes on from here"
        print(f"run_matrix.sh: {stopped}; {all_left(job)}", file=sys.stderr)
        return 128 + crew.signals[0]
    if failed:
        logs = f" (see the logs in {job.out})" if action == "" else ""
        print(f"run_matrix.sh: failed: {' '.join(failed)}{logs}", file=sys.stderr)
        return 1
    if action == "":
        say(f"report: {job.out / 'report' / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
