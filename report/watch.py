"""A live view of runs in a terminal: how far, how fast, losses, gates, checkpoints, rollouts so far.

One run is drawn in full, several (or a folder of runs) in a line each. The view is redrawn in place; where
the output is no terminal, or with --once, it is printed once.

    python -m report watch runs/demo/E2-n40000-s0     # one run, every 5 seconds, until Ctrl-C
    python -m report watch runs/demo                  # all of them
    python -m report watch runs/demo --once | tee view.txt

Reads run folders as the report does, those that changed. A log line has no time of its own: a run is stalled
where its log has not grown for 10 times the usual interval; after 100 times and 10 minutes, `killed?`.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from files import NUMBER, Refused, told, type_in
from report.reading import Aside, RunFolder, find_runs, fitting, load_run, read_config
from report.stats import Tally, arm_modes, in_mode, tally, wilson

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 20  # log lines that say how fast it goes now
QUIET = {"killed?": (100, 600.0), "stalled": (10, 10.0)}  # usual intervals without a line, least seconds
LEAST = {"done": 45, "loss": 52, "left": 60, "samples/s": 70, "checkpoint": 80}  # columns of the terminal
PLAIN = {"markup": False, "emoji": False, "highlight": False}  # what stands in files is text, never an order
LOGGED = {  # label -> the numbers of the log under it, and how they are written
    "held-out": (r"val_loss_(.*)", ".4f"),
    "gates": (r"world_gate_?(.*)", "+.4f"),
    "world": (r"world_(loss|cos)", ".4f"),
    "gradients": (r"grad_norm_?(.*)", ".3g"),
    "bad steps": (r"bad_steps()", ",.0f"),
    "mfu": (r"mfu()", ".1%"),
}


@dataclass(frozen=True)
class Config:
    """A live view of runs being trained and rolled out."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders that hold run folders."""

    every: float = 5.0
    """Seconds between two looks."""

    once: bool = False
    """Print one view and exit, as where the output is no terminal."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run folder is named; name one, or a folder that holds some: runs/demo")
        if not 0.1 <= self.every < math.inf:
            raise ValueError(f"--every {self.every} must be 0.1 seconds or more")


@dataclass(frozen=True)
class Watched(RunFolder):
    """A run folder as it was read last; its lines are not kept."""

    samples: float
    share: float  # of the budget
    rate: float  # samples a second over the last lines; not a number where there are none
    average: float
    left: float  # seconds
    usual: float  # seconds between two lines
    curves: dict[str, np.ndarray]  # losses, a number a line
    newest: dict[str, float]  # the last number under each name
    tallies: dict[str, Tally]  # of each memory mode, the run's own first
    broken: int

    @property
    def title(self) -> str:
        bank = self.config.get("num_hypotheses") or 1
        own = [self.own] + [f"{bank} hypotheses"] * (bank > 1) if self.fusion else []
        return f"arm {self.arm}: {', '.join([self.site, *own])}, seed {self.seed}"

    @property
    def state(self) -> str:
        """One of starting, running, stalled, killed? and finished."""
        if self.share == 1:
            return "finished"
        if math.isnan(self.usual):
            return "starting"
        quiet = time.time() - changed(self.folder / "metrics.jsonl")
        found = (name for name, (times, least) in QUIET.items() if quiet > max(times * self.usual, least))
        return next(found, "running")


def changed(path: Path) -> float:
    """Return when a file last changed; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def numbers(rows: list[dict], name: str) -> np.ndarray:
    """Return what lines say under a name; not a number where that is none."""
    found = (row.get(name) for row in rows)
    return np.array([x if isinstance(x, NUMBER) and abs(x) < 1e300 else math.nan for x in found], float)


def read(name: str, folder: Path) -> Watched:
    """Read a run folder."""
    aside: list[Aside] = []
    run = fitting([load_run(name, folder, aside)], aside)[0]
    lines = [row for row, x in zip(run.metrics, numbers(run.metrics, "samples"), strict=True) if x >= 0]
    trained = [row for row in lines if "loss" in row]  # the others are measurements on held-out episodes
    timed = [row for row, x in zip(trained, numbers(trained, "samples_per_second"), strict=True) if x > 0]
    taken = np.diff(numbers(timed, "samples"), prepend=0)
    seconds = taken / numbers(timed, "samples_per_second")
    over = lambda last: taken[-last:].sum() / seconds[-last:].sum() if timed else math.nan  # noqa: E731
    rate, average = over(RECENT), over(len(timed))
    last = {key: x for row in lines for key, x in row.items()}
    samples, budget = trained[-1]["samples"] if trained else 0.0, run.config["total_samples"] or 0
    kept = {"metrics": (), "episodes": (), "earlier": (), "budget": budget}
    return Watched(
        **vars(run) | kept,
        samples=samples, share=min(1.0, samples / budget) if budget else 0.0,
        rate=rate, average=average, left=(budget - samples) / rate,
        usual=float(np.median(seconds[-RECENT:])) if timed else math.nan,
        curves={key: numbers(trained, key) for key in ("loss", "action_loss") if trained},
        newest={key: numbers([last], key)[0] for key in last},
        tallies={mode: tally(in_mode([run], mode)) for mode in arm_modes([run])},
        broken=sum(len(some.lines) for some in aside) + len(run.metrics) - len(lines),
    )  # fmt: skip


def look(paths: tuple[Path, ...], known: dict[Path, tuple[list, Watched]]) -> list[Watched]:
    """Look at all runs, new ones too; those that changed are read anew, into `known`."""
    runs = []
    for name, folder in find_runs(paths):
        now = [changed(path) for path in (folder / "config.json", *sorted(folder.glob("*.jsonl*")))]
        if folder not in known or known[folder][0] != now:
            known[folder] = now, read(name, folder)
        runs.append(known[folder][1])
    return runs


def duration(seconds: float) -> str:
    """Return seconds in the unit that a person would use."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size and size > 60 else 0}f} {unit}"
    return "-" if math.isnan(seconds) else f"{seconds:.0f} s"


def since(path: Path) -> str:
    return duration(max(0.0, time.time() - changed(path)))


def spark(values: np.ndarray, width: int) -> str:
    """Return the means of `width` parts as blocks, as logarithms where all are positive; × is not finite."""
    parts = min(width, len(values))
    means = np.array([part.mean() for part in np.array_split(values, parts)] if parts > 0 else [])
    finite = means[np.isfinite(means)]
    if (finite > 0).all():
        means, finite = np.log(means), np.log(finite)
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
    levels = (means - low) / ((high - low) or 1) * (len(BLOCKS) - 1)
    return "".join(BLOCKS[round(y)] if math.isfinite(y) else "×" for y in levels)


def last_tenth(values: np.ndarray) -> float:
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def checkpoint(run: Watched) -> list[str]:
    last = run.folder / "last" / "state.json"
    if not last.is_file():
        return []
    samples = read_config(last).get("samples", 0)
    return [last.parent.resolve().name, f"{samples:,} samples", f"{since(last)} ago"]


def facts(run: Watched, width: int) -> Iterator[tuple[str, list[str]]]:
    """Yield what is known of a run, each with its label."""
    said = f"last line {since(run.folder / 'metrics.jsonl')} ago, usual: {duration(run.usual)}"
    if run.state == "starting":
        said = f"no log line yet, for {since(run.folder / 'config.json')}"
    speed = [f"{run.rate:,.1f} a second now, {run.average:,.1f} on average"]
    speed += [f"{duration(run.left)} left"] * (run.share < 1)
    yield "samples", [f"{run.samples:,.0f} of {run.budget:,}", *(speed if run.rate > 0 else [])]
    yield "state", [f"{run.state}: {said}"]
    for name, values in run.curves.items():
        yield name.replace("_", " "), [f"{values[-1]:.4f}", f"last tenth {last_tenth(values):.4f}"]
        yield "", [f"{values[0]:.3g} {spark(values, width - 30)} {values[-1]:.3g}"]
    for label, (pattern, form) in LOGGED.items():
        found = {name[1]: x for key, x in run.newest.items() if (name := re.fullmatch(pattern, key))}
        off = {
            name: f" ({x - found['off']:+.4f})" for name, x in found.items() if "off" in found.keys() - {name}
        }
        yield label, [f"{name} {x:{form}}{off.get(name, '')}".strip() for name, x in found.items()]
    yield "checkpoint", checkpoint(run)
    yield "note", [f"{run.broken} broken lines are left out"] * bool(run.broken)


def detail(run: Watched, width: int) -> RenderableType:
    """Return one run in full, its own memory mode first; with Wilson's interval beside successes."""
    grid, table = (Table.grid(padding=(0, 3, 0, 0)) for _ in range(2))
    grid.add_row(f"{run.share:.1%}", ProgressBar(1.0, run.share))
    for label, shown in facts(run, width):
        if shown:
            grid.add_row(label, "   ".join(shown))
    for mode, found in run.tallies.items():
        low, high = (f"{100 * x:.0f}" for x in wilson(found.k, found.n))
        share, crashed = f"{found.rate:.0%}" if found.n else "-", [f"{found.crashes} crashed"]
        told = [f"{found.k}/{found.n}", share, f"{low} to {high} %"]
        table.add_row(mode, *told, *(crashed if found.crashes else []))
    last = max(run.folder.glob("episodes*.jsonl*"), key=changed, default=run.folder)
    head = f"\nrollouts of {run.checkpoint}, with Wilson's 95 %; the last one {since(last)} ago"
    return Group(f"{run.name}   {run.title}", grid, *([head, table] if run.tallies else []))


def overview(runs: list[Watched], width: int) -> RenderableType:
    """Return a table, a run a line; columns that have no room are left out."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    rows = [
        {
            "run": run.name,
            "state": run.state,
            "done": f"{run.share:.0%}",
            "samples/s": f"{run.rate:,.1f}" if run.rate > 0 else "-",
            "left": "-" if run.state == "finished" else duration(run.left),
            "loss": f"{last_tenth(run.curves['loss']):.4f}" if run.curves else "-",
            "checkpoint": (checkpoint(run) or ["-"])[0],
            "solved": f"{own.k}/{own.n}" if (own := run.tallies.get(run.own)) else "-",
        }
        for run in runs
    ]
    shown = [name for name in rows[0] if width >= LEAST.get(name, 0)]
    for name in shown:
        side, long = "left" if name in ("run", "state") else "right", name == "run"  # cut where room is short
        table.add_column(name, no_wrap=not long, overflow="ellipsis", justify=side)
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    done = sum(run.state == "finished" for run in runs)
    foot = f"{done} of {len(runs)} finished; loss: mean of the last tenth; solved: under the run's own mode"
    return Group(table, f"\n{foot}")


def main(args: list[str] | None = None) -> None:
    """Show the runs once, or again and again until Ctrl-C where the output is a terminal."""
    config = type_in(Config, __doc__, ("runs", "every", "once"), "python -m report watch", args)
    console, known = Console(**PLAIN), {}

    def view() -> RenderableType:
        runs = look(config.runs, known)
        return detail(runs[0], console.width) if len(runs) == 1 else overview(runs, console.width)

    with told():
        shown = view()
    if config.once or not console.is_terminal:
        console.print(shown)
        return
    try:
        with Live(shown, console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(config.every)
                try:
                    shown = view()
                    live.update(shown, refresh=True)
                except Refused as error:  # a config.json that is being written, say: the next look may do
                    live.update(Group(Text(f"error: {error}"), shown), refresh=True)
    except KeyboardInterrupt:
        console.print(shown)
