"""A live view of runs in a terminal: how far, how fast, losses, gates, checkpoints, rollouts so far.

One run is drawn in full, several (or a folder of runs) in a line each. The view is redrawn in place; where
the output is no terminal, or with --once, it is printed once.

    python -m report watch runs/demo/E2-n64000-s0     # one run, every 5 seconds, until Ctrl-C
    python -m report watch runs/demo                  # all of them
    python -m report watch runs/demo --once | tee view.txt

Reads config.json, metrics.jsonl and episodes*.jsonl, only what they have gained since the last look, and
where `last` points; needs neither torch nor a simulator. A log line has no time of its own: speed is what
training logged, and a run is `stalled` where its log has not grown for 10 times the usual interval. A run
whose process was killed looks the same; after 100 times and 10 minutes the view asks whether it was.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from files import Refused, parse_json, type_in
from report.reading import find_runs, made_plain, read_config
from report.stats import wilson

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 20  # log lines that say how fast it goes now
STALLED, KILLED = 10, 100  # usual intervals without a new line
AT_LEAST, KILLED_AT_LEAST = 10.0, 600.0  # seconds: intervals of tiny runs are too short to judge by
LEAST = {"done": 45, "loss": 52, "left": 60, "samples/s": 70, "checkpoint": 80}  # columns of the terminal


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


# --------------------------------------------------------------------------------------------------
# files that grow


class Tail:
    """Reads what a JSONL file has gained since the last look; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forget()

    def forget(self) -> None:
        self.at, self.seen = 0, b""  # seen: the end of what was read, to know it again

    def read(self) -> tuple[list[bytes], bool]:
        """Return the new lines, and whether they begin anew, as where a resumed run has cut its log."""
        if not self.path.is_file():
            anew = self.at > 0
            self.forget()
            return [], anew
        with self.path.open("rb") as file:
            file.seek(self.at - len(self.seen))
            anew = file.read(len(self.seen)) != self.seen
            if anew:
                self.forget()
                file.seek(0)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.at += len(whole)
        self.seen = (self.seen + whole)[-200:]
        return [line for line in whole.splitlines() if line.strip()], anew

    @property
    def age(self) -> float:
        """Seconds since the file last changed; infinite where there is none."""
        return age_of(self.path)


def objects(lines: list[bytes]) -> Iterator[dict | None]:
    """Yield each line's object; None where it is none, as where two writers met."""
    for line in lines:
        try:
            yield made_plain(parse_json(line))
        except ValueError:
            yield None


def age_of(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return math.inf


@dataclass
class Log:
    """What is kept of metrics.jsonl: the losses of each line, and the newest lines as they are."""

    samples: float = 0.0
    seconds: float = 0.0
    curves: dict[str, array] = field(default_factory=lambda: {"loss": array("d"), "action_loss": array("d")})
    recent: deque = field(default_factory=lambda: deque(maxlen=RECENT))  # (samples, seconds) of a line
    newest: dict[str, float] = field(default_factory=dict)  # the last number under each name
    broken: int = 0

    def add(self, row: dict | None) -> None:
        """Take in a line: of training, or of a measurement on held-out episodes, which has no loss."""
        row = {name: x for name, x in (row or {}).items() if isinstance(x, int | float)}
        if not math.isfinite(row.get("samples", math.nan)):
            self.broken += 1
            return
        self.newest |= row
        if "loss" in row:
            for name, curve in self.curves.items():
                curve.append(row.get(name, math.nan))
            if row.get("samples_per_second", 0) > 0:
                taken = row["samples"] - self.samples
                self.recent.append((taken, taken / row["samples_per_second"]))
                self.seconds += self.recent[-1][1]
            self.samples = row["samples"]

    @property
    def rate(self) -> float | None:
        """Samples a second over the last lines."""
        taken, seconds = map(sum, zip(*self.recent, strict=True)) if self.recent else (0, 0)
        return taken / seconds if seconds else None

    @property
    def average(self) -> float | None:
        return self.samples / self.seconds if self.seconds else None

    @property
    def interval(self) -> float | None:
        """The usual seconds between two lines."""
        return statistics.median(seconds for _, seconds in self.recent) if self.recent else None


class Rollouts:
    """Successes by checkpoint and memory mode; an episode counts once, a crash neither way."""

    def __init__(self) -> None:
        self.seen: set[tuple] = set()
        self.counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
        self.broken = 0

    def add(self, row: dict | None, has_memory: bool) -> None:
        """Take in an episode; an arm without fusion has nothing to intervene on."""
        try:
            checkpoint, mode, success = str(row["checkpoint"]), str(row["memory"]), row["success"]
            where = row["suite"], row["task_id"], row["init_state"]
        except (KeyError, TypeError):
            self.broken += 1
            return
        mode = mode if has_memory else "off"
        key = str((checkpoint, mode, where, row.get("seed")))
        if key in self.seen:
            return
        self.seen.add(key)
        count = self.counts[checkpoint][mode]
        if row.get("crash") is not None:
            count[2] += 1
        else:
            count[0] += success is True
            count[1] += 1

    @property
    def newest(self) -> tuple[str, dict[str, list[int]]]:
        """The newest checkpoint rolled out, and mode -> [successes, episodes, crashes]; "" for none."""
        name = max(self.counts, key=lambda c: [int(d) for d in re.findall(r"\d+", c)], default="")
        return name, dict(self.counts[name]) if name else {}


class Watched:
    """One run folder, and what has been read of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.metrics, self.log = Tail(folder / "metrics.jsonl"), Log()
        self.episodes: dict[Path, Tail] = {}
        self.rollouts = Rollouts()

    def look(self) -> None:
        """Read what is new."""
        self.config = read_config(self.folder / "config.json")
        lines, anew = self.metrics.read()
        if anew:
            self.log = Log()
        for row in objects(lines):
            self.log.add(row)
        for path in sorted(self.folder.glob("episodes*.jsonl")):
            self.episodes.setdefault(path, Tail(path))
        read = [tail.read() for tail in self.episodes.values()]
        if any(anew for _, anew in read):
            self.rollouts = Rollouts()
            for tail in self.episodes.values():
                tail.forget()
            read = [tail.read() for tail in self.episodes.values()]
        for lines, _ in read:
            for row in objects(lines):
                self.rollouts.add(row, bool(self.sites))

    @property
    def sites(self) -> list[str]:
        sites = self.config.get("fusion") or []
        return [s for s in ([sites] if isinstance(sites, str) else sites) if s != "none"]

    @property
    def own(self) -> str:
        """The memory mode it was trained with."""
        return self.config.get("memory", "pred") if self.sites else "off"

    @property
    def budget(self) -> int:
        return self.config.get("total_samples", 0)

    @property
    def share(self) -> float:
        return min(1.0, self.log.samples / self.budget) if self.budget else 0.0

    @property
    def seconds_left(self) -> float | None:
        rate = self.log.rate
        return (self.budget - self.log.samples) / rate if rate else None

    @property
    def state(self) -> str:
        """One of starting, running, stalled, killed? and finished."""
        if self.budget and self.log.samples >= self.budget:
            return "finished"
        usual = self.log.interval
        if usual is None:
            return "starting"
        if self.metrics.age > max(KILLED * usual, KILLED_AT_LEAST):
            return "killed?"
        return "stalled" if self.metrics.age > max(STALLED * usual, AT_LEAST) else "running"


# --------------------------------------------------------------------------------------------------
# what is drawn


def duration(seconds: float | None) -> str:
    """Return seconds in the unit that a person would use."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size and size > 60 else 0}f} {unit}"
    return f"{seconds:.0f} s"


def spark(values: array, width: int) -> str:
    """Return the means of `width` parts as blocks, as logarithms where all are positive; × is not finite."""
    if not len(values) or width < 1:
        return ""
    x = np.array(values)
    starts = np.arange(min(width, len(x))) * len(x) // min(width, len(x))
    means = np.add.reduceat(x, starts) / np.diff([*starts, len(x)])
    finite = np.isfinite(means)
    if not finite.any():
        return "×" * len(means)
    scaled = np.log(means, where=finite, out=means.copy()) if (means[finite] > 0).all() else means
    low, high = scaled[finite].min(), scaled[finite].max()
    levels = (scaled - low) / ((high - low) or 1.0) * (len(BLOCKS) - 1)
    return "".join(BLOCKS[round(y)] if math.isfinite(y) else "×" for y in levels)


def last_tenth(values: array) -> float:
    return float(np.mean(values[-max(1, len(values) // 10) :]))


class Curve:
    """A loss over the run, as wide as there is room."""

    def __init__(self, values: array) -> None:
        self.values = values

    def __rich_console__(self, console: Console, options: object) -> Iterator[Text]:
        first, last = f"{self.values[0]:.3g} ", f" {self.values[-1]:.3g}"
        yield Text(first + spark(self.values, options.max_width - len(first + last)) + last)


def listed(items: list[str]) -> RenderableType:
    """Return items side by side, over as many lines as it takes."""
    return Columns(map(Text, items), padding=(0, 3, 0, 0))


def progress(run: Watched) -> Iterator[tuple[str, RenderableType]]:
    log, since = run.log, duration(run.metrics.age)
    told = {
        "starting": f"no log line yet, for {duration(age_of(run.folder / 'config.json'))}",
        "running": f"last line {since} ago",
        "finished": f"{since} ago",
    }.get(run.state, f"no new line for {since}, usual: {duration(log.interval)}")
    speed = [f"{log.samples:,.0f} of {run.budget:,}"]
    if log.rate:
        speed += [f"{log.rate:,.1f} a second now, {log.average:,.1f} on average"]
        speed += [f"{duration(run.seconds_left)} left"] * (run.state != "finished")
    yield f"{run.share:.1%}", ProgressBar(1.0, run.share)
    yield "samples", listed(speed)
    yield "state", Text(f"{run.state}: {told}")
    for name, values in log.curves.items():
        if len(values):
            yield (
                name.replace("_", " "),
                listed([f"{values[-1]:.4f}", f"last tenth {last_tenth(values):.4f}"]),
            )
            yield "", Curve(values)


def held_out(newest: dict[str, float]) -> list[str]:
    """Return the held-out loss of each memory mode, and its difference to `off`."""
    losses = {k.removeprefix("val_loss_"): v for k, v in newest.items() if k.startswith("val_loss_")}
    off = losses.get("off")
    return [
        f"{mode} {loss:.4f}" + (f" ({loss - off:+.4f})" if off is not None and mode != "off" else "")
        for mode, loss in losses.items()
    ]


def values_of(newest: dict[str, float]) -> list[tuple[str, list[str]]]:
    """Return what else the newest lines say: gates, the prophet, gradients, speed."""

    def starting(prefix: str, form: str) -> list[str]:
        found = {k.removeprefix(prefix).strip("_"): v for k, v in newest.items() if k.startswith(prefix)}
        return [f"{name} {value:{form}}".strip() for name, value in found.items()]

    single = {"bad_steps": "{:,.0f}", "mfu": "{:.1%}"}
    world = {name: newest.get(f"world_{name}") for name in ("loss", "cos")}
    return [
        ("held-out", held_out(newest)),
        ("gates", starting("world_gate", "+.4f")),
        ("world", [f"{name} {value:.4f}" for name, value in world.items() if value is not None]),
        ("gradients", starting("grad_norm", ".3g")),
        *((k.replace("_", " "), [form.format(newest[k])]) for k, form in single.items() if k in newest),
    ]


def checkpoint(run: Watched) -> list[str]:
    last = run.folder / "last"
    if not (last / "state.json").is_file():
        return []
    samples = read_config(last / "state.json").get("samples", 0)
    return [last.resolve().name, f"{samples:,} samples", f"{duration(age_of(last / 'state.json'))} ago"]


def rolled_out(run: Watched) -> list[RenderableType]:
    """Return a table of memory modes, the run's own first: successes, and Wilson's interval."""
    name, modes = run.rollouts.newest
    if not modes:
        return []
    order = {run.own: 0, "off": 1, "zero": 2}
    newest = min(tail.age for tail in run.episodes.values())
    table = Table.grid(padding=(0, 3, 0, 0))
    for mode in sorted(modes, key=lambda m: (order.get(m, 3), m)):
        k, n, crashes = modes[mode]
        low, high = wilson(k, n)
        share, interval = f"{k / n:.0%}" if n else "-", f"{100 * low:.0f} to {100 * high:.0f} %"
        table.add_row(*map(Text, (mode, f"{k}/{n}", share, interval, f"{crashes} crashed" * bool(crashes))))
    title = f"rollouts of {name}, with Wilson's 95 %; the last one {duration(newest)} ago"
    return [Text(""), Text(title), table]


def detail(run: Watched) -> RenderableType:
    """Return one run in full."""
    bank = run.config.get("num_hypotheses", 1)
    what = [" + ".join(run.sites) or "no memory", *([run.own] if run.sites else [])]
    what += [f"{bank} hypotheses"] * (bool(run.sites) and bank > 1)
    what += ["blind"] * bool(run.config.get("blind")) + [f"seed {run.config.get('seed', '-')}"]
    grid, broken = Table.grid(padding=(0, 3, 0, 0)), run.log.broken + run.rollouts.broken
    for label, shown in progress(run):
        grid.add_row(Text(label), shown)
    note = [f"{broken} broken lines are left out"] if broken else []
    for label, items in [*values_of(run.log.newest), ("checkpoint", checkpoint(run)), ("note", note)]:
        if items:
            grid.add_row(Text(label), listed(items))
    title = Text(f"{run.name}   arm {run.config['arm']}: {', '.join(what)}")
    return Group(title, grid, *rolled_out(run))


def overview(runs: list[Watched], width: int) -> RenderableType:
    """Return a table, a run a line; columns that have no room are left out."""
    table, rows = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False), []
    for run in runs:
        k, n, _ = run.rollouts.newest[1].get(run.own, (0, 0, 0))
        loss = run.log.curves["loss"]
        rows.append(
            {
                "run": run.name,
                "state": run.state,
                "done": f"{run.share:.0%}",
                "samples/s": f"{run.log.rate:,.1f}" if run.log.rate else "-",
                "left": "-" if run.state == "finished" else duration(run.seconds_left),
                "loss": f"{last_tenth(loss):.4f}" if len(loss) else "-",
                "checkpoint": (checkpoint(run) or ["-"])[0],
                "solved": f"{k}/{n}" if n else "-",
            }
        )
    shown = [name for name in rows[0] if width >= LEAST.get(name, 0)]
    for name in shown:
        how = {"overflow": "ellipsis"} if name == "run" else {"min_width": min(width // 3, len(name))}
        table.add_column(name, no_wrap=True, justify="left" if name in ("run", "state") else "right", **how)
    for row in rows:
        table.add_row(*(Text(row[name]) for name in shown))
    done = sum(run.state == "finished" for run in runs)
    foot = f"{done} of {len(runs)} finished; loss: mean of the last tenth; solved: under the run's own mode"
    return Group(table, Text(""), Text(foot))


def view(runs: list[Watched], width: int) -> RenderableType:
    """Return what is drawn: one run in full, or a line each."""
    return detail(runs[0]) if len(runs) == 1 else overview(runs, width)


# --------------------------------------------------------------------------------------------------
# the program


def look(paths: tuple[Path, ...], known: dict[Path, Watched]) -> list[Watched]:
    """Look at all runs, new ones too, which are added to `known`."""
    found = find_runs(paths)
    short = [folder.name for _, folder in found]
    for name, folder in found:
        unique = short.count(folder.name) == 1
        known.setdefault(folder, Watched(name, folder)).name = folder.name if unique else name
    runs = [known[folder] for _, folder in found]
    for run in runs:
        run.look()
    return runs


def main(args: list[str] | None = None) -> None:
    """Show the runs once, or again and again until Ctrl-C where the output is a terminal."""
    config = type_in(Config, __doc__, ("runs", "every", "once"), "python -m report watch", args)
    known: dict[Path, Watched] = {}
    console = Console(highlight=False)
    try:
        shown = view(look(config.runs, known), console.width)
        if config.once or not console.is_terminal:
            console.print(shown)
            return
        with Live(shown, console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(config.every)
                try:
                    shown = view(look(config.runs, known), console.width)
                    live.update(shown, refresh=True)
                except Refused as error:  # a config.json that is being written, say: the next look may do
                    live.update(Group(Text(f"error: {error}"), shown), refresh=True)
    except Refused as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print(shown)
