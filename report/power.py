"""What a number of episodes and seeds can detect, and how many an effect would need.

The test is the report's: a t test of the per-seed paired differences of two arms, 3 seeds or more. Its model:
seed s differs by d + N(0, tau^2), and n pairs measure that with variance (psi - d^2) / n, psi the share of
pairs that disagree. So T is noncentral t with S - 1 degrees of freedom, noncentrality
d / sqrt((tau^2 + (psi - d^2) / n) / S). Seeds share their starts, so what starts differ by does not part
seeds: the plan errs on the safe side.

    python -m report power                                # a plan, before any run
    python -m report power --episodes 500 --seeds 3 --base 0.8 --discordance 0.15 --seed-sd 0.03
    python -m report power runs/demo --effect 10 20       # from runs: what they could show
    pytest tests/report/test_power.py
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import chi2, norm, t

from files import Refused, told, type_in
from report.reading import load_runs
from report.stats import ALPHA, LEAST_SEEDS, Contrast, Run, all_contrasts

MOST_EPISODES, MOST_SEEDS = 1_000_000, 1_000  # a search ends here
PLAN = {"episodes": 500, "seeds": 3, "base": 0.8, "tasks": 10}  # where flags say nothing else
SEED_SD = 0.03


OFTEN = ("runs", "episodes", "seeds", "tasks", "base", "effect")


@dataclass(frozen=True)
class Config:
    """What a number of episodes and seeds can detect: planned by flags, or seen in RUNS."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders, or folders that hold some, to read discordance and spread of seeds from. None: a plan."""

    episodes: int | None = None
    """Plan: episodes of an arm and seed, all tasks together [500]."""

    seeds: int | None = None
    """Plan: training seeds of an arm [3]."""

    tasks: int | None = None
    """Plan: tasks that the episodes are spread over [10]."""

    base: float | None = None
    """Plan: share of successes of the weaker arm [0.8]."""

    discordance: float | None = None
    """Plan: share of pairs that disagree, one arm succeeding and the other failing; default: as if the arms'
    outcomes were independent, 2 base (1 - base)."""

    seed_sd: float | None = None
    """Deviation of the difference over training seeds, beyond what episodes explain: 3 points are 0.03.
    Default: as seen in RUNS with 2 seeds or more, 0.03 in a plan."""

    effect: tuple[float, ...] = (5, 10, 20)
    """Differences, in points of success, to say what they need."""

    alpha: float = ALPHA
    """Level of the two-sided test."""

    power: float = 0.8
    """Probability that the test is to have of finding the difference."""

    contrasts: int = 1
    """Contrasts that Holm's correction runs over: in the worst case it divides alpha by their number."""

    def __post_init__(self) -> None:
        for flag in ("episodes", "seeds", "tasks", "base", "discordance"):
            if self.runs and getattr(self, flag) is not None:
                raise ValueError(
                    f"--{flag} {getattr(self, flag)} is for a plan: RUNS bring their own; leave one out"
                )
        for flag in ("episodes", "seeds", "tasks", "contrasts"):
            if (value := getattr(self, flag)) is not None and value < 1:
                raise ValueError(f"--{flag} {value} must be at least 1")
        for flag in ("base", "alpha", "power"):
            if (value := getattr(self, flag)) is not None and not 0 < value < 1:
                raise ValueError(f"--{flag} {value} must lie between 0 and 1")
        if self.seed_sd is not None and not 0 <= self.seed_sd < 1:
            raise ValueError(f"--seed-sd {self.seed_sd} must be a share of 1: 3 points are 0.03")
        if self.alpha >= self.power:
            raise ValueError(
                f"--power {self.power} must be above --alpha {self.alpha}: chance alone reaches that"
            )
        for effect in self.effect:
            if not 0 < effect <= 100:
                raise ValueError(f"--effect {effect} must be above 0 and at most 100 points")
        most = 2 * min(self.plan("base"), 1 - self.plan("base"))
        if self.discordance is not None and not 0 < self.discordance <= most + 1e-12:
            raise ValueError(
                f"--discordance {self.discordance} must be above 0 and, where both arms succeed in about "
                f"{self.plan('base'):.0%} (--base), at most {most:.2f}"
            )

    def plan(self, flag: str) -> int | float:
        """Return a flag of the plan, or its default."""
        value = getattr(self, flag)
        return PLAN[flag] if value is None else value

    @property
    def level(self) -> float:
        """The level of one contrast in the worst case of Holm's correction."""
        return self.alpha / self.contrasts


# --------------------------------------------------------------------------------------------------
# power, and what it takes


@dataclass(frozen=True)
class Design:
    """Two arms: discordance psi, deviation tau of the difference over seeds (None: unknown); the test."""

    discordance: float
    seed_sd: float | None
    alpha: float
    power: float

    def psi(self, d: float) -> float:
        """The share of discordant pairs: as told, but never less than the difference that they make."""
        return max(self.discordance, d)

    def over(self, d: float, episodes: int, seeds: int) -> float:
        """Return the power of the two-sided t test of the seeds' differences; 0 where there is none."""
        if self.seed_sd is None or seeds < LEAST_SEEDS:
            return 0.0
        variance = self.seed_sd**2 + (self.psi(d) - d * d) / episodes
        if variance < 1e-15:
            return 1.0
        return t_power(d / math.sqrt(variance / seeds), seeds - 1, self.alpha)

    def detects(self, episodes: int, seeds: int) -> float | None:
        """Return the smallest difference that is found."""
        if self.over(1.0, episodes, seeds) < self.power:
            return None
        low, high = 0.0, 1.0
        for _ in range(20):  # power rises with the difference
            middle = (low + high) / 2
            low, high = (low, middle) if self.over(middle, episodes, seeds) >= self.power else (middle, high)
        return high

    def episodes_needed(self, d: float, seeds: int) -> int | None:
        """Return the episodes of a seed at which the power for difference d is reached."""
        return first(lambda n: self.over(d, n, seeds) >= self.power, 1, MOST_EPISODES)

    def seeds_needed(self, d: float, episodes: int) -> int | None:
        """Return the seeds at which the power for difference d is reached."""
        return first(lambda s: self.over(d, episodes, s) >= self.power, LEAST_SEEDS, MOST_SEEDS)


def t_power(noncentrality: float, freedom: int, alpha: float) -> float:
    """Return the probability that |T| of a noncentral t lies beyond the two-sided critical value.

    Averages the normal's tails over T's denominator: scipy's nct has NaN where T is large, scipy 1.17.
    """
    reach = t.isf(alpha / 2, freedom) * denominators(freedom)
    return float((norm.sf(reach - noncentrality) + norm.cdf(-reach - noncentrality)).mean())


@cache
def denominators(freedom: int) -> np.ndarray:
    """Return T's denominator sqrt(chi2 / freedom) at the middles of 2,000 equally likely ranges."""
    return np.sqrt(chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom) / freedom)


def first(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return a number where `holds` turns true, by doubling, then bisection; None if `high` is not enough.

    The number returned holds and the one before does not.
    """
    if holds(low):
        return low
    step = low
    while step < high and not holds(step):
        low, step = step, min(2 * step, high)
    if not holds(step):
        return None
    while step - low > 1:
        middle = (low + step) // 2
        low, step = (low, middle) if holds(middle) else (middle, step)
    return step


# --------------------------------------------------------------------------------------------------
# what runs have shown so far


def seed_sd(contrast: Contrast) -> float | None:
    """Return the deviation of the difference over seeds beyond what episodes explain; None for one seed."""
    if len(contrast.seeds) == 1:
        return None
    chance = contrast.paired.var(axis=1) / contrast.n  # variance of each seed's difference
    return math.sqrt(max(0.0, float(contrast.differences.var(ddof=1) - chance.mean())))


# --------------------------------------------------------------------------------------------------
# text


def table(header: tuple[str, ...], rows: list[tuple[str, ...]], left: int = 0) -> str:
    """Return columns two spaces apart, the first `left` flush left; a header may have several lines."""
    lines = [name.split("\n") for name in header]
    depth = max(map(len, lines))
    heads = [tuple(row) for row in zip(*([""] * (depth - len(x)) + x for x in lines), strict=True)]
    widths = [max(len(row[i]) for row in [*heads, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([*map(line, heads), "  ".join("-" * w for w in widths), *map(line, rows)])


def points(x: float | None, sign: str = "") -> str:
    return "-" if x is None else f"{100 * x:{sign}.1f}"


def many(n: int | None, tasks: int = 0) -> str:
    """Return a number of episodes or seeds; with `tasks`, how many that is a task beside it."""
    if n is None:
        return "-"
    return f"{n:,} ({math.ceil(n / tasks):,})" if tasks else f"{n:,}"


def settings(config: Config) -> str:
    among = f" / {config.contrasts} contrasts = {config.level:.2g}" if config.contrasts > 1 else ""
    return f"alpha {config.alpha:g}{among}, power {config.power:.0%}"


NOTES = f"""\
A two-sided t test of the seeds' differences, {LEAST_SEEDS} seeds or more. Assumed: pairs are independent, as
many disagree as said or seen (or as the difference itself needs), and seeds differ normally. In
brackets: episodes a task, which has 50 init states in LIBERO. -: not to be found, or not known."""


def needs(design: Design, effect: float, episodes: int, seeds: int, tasks: int) -> tuple[str, str]:
    """Return the cells of what one effect needs: episodes of each of these seeds, or seeds of so many."""
    each = many(design.episodes_needed(effect, seeds), tasks)
    return each, many(design.seeds_needed(effect, episodes))


def plan_text(config: Config) -> str:
    """Return the plan: what a grid of episodes and seeds detects, and what each effect needs."""
    base, tasks = config.plan("base"), config.plan("tasks")
    episodes, seeds = config.plan("episodes"), max(config.plan("seeds"), LEAST_SEEDS)
    discordance = 2 * base * (1 - base) if config.discordance is None else config.discordance
    seed_sd = SEED_SD if config.seed_sd is None else config.seed_sd
    design = Design(discordance, seed_sd, config.level, config.power)

    def possible(d: float | None) -> str:
        return points(d if d is not None and d <= 1 - base else None)

    columns = sorted({3, 4, 5, 7, 10, seeds})
    sizes = sorted({max(1, round(episodes * share)) for share in (0.25, 0.5, 1, 2, 4)})
    grid = [(many(n, tasks), *(possible(design.detects(n, s)) for s in columns)) for n in sizes]
    wanted = []
    for effect in config.effect:
        cells = needs(design, effect / 100, episodes, seeds, tasks)
        wanted.append((f"{effect:g}", *(cells if effect / 100 <= 1 - base + 1e-12 else "--")))
    parts = [
        f"Two arms on the same episodes, the weaker at {base:.0%}; {discordance:.0%} of pairs disagree; over",
        f"seeds the difference deviates by {points(seed_sd)} points; {settings(config)}.\n",
        "The smallest difference that is found, in points:\n",
        table(("episodes\na seed", *(f"{s}\nseeds" for s in columns)), grid) + "\n",
        "What a difference needs:\n",
        table(needs_header(seeds, f"{episodes:,}"), wanted) + "\n",
        NOTES,
    ]
    return "\n".join(parts)


def panel_text(config: Config, panel: list[Run]) -> str:
    """Return, for the runs of one budget, what their contrasts can detect and what each effect needs."""
    found = [contrast for contrast in all_contrasts(panel) if not contrast.within]
    if not found:
        return "No two arms that are compared share pairs."
    most, able, wanted = max(LEAST_SEEDS, *(len(c.seeds) for c in found)), [], []
    tasks = len({(e["suite"], e["task_id"]) for run in panel for e in run.episodes})
    for c in found:
        seeds, disagree = len(c.seeds), float(abs(c.paired).mean())
        tau = seed_sd(c) if config.seed_sd is None else config.seed_sd
        design = Design(disagree, tau, config.level, config.power)
        name, seen = f"{c.a} - {c.b}", float(c.differences.std(ddof=1)) if seeds > 1 else None
        row = (name, str(seeds), many(c.n, tasks), points(c.difference, "+"), points(disagree))
        able.append((*row, points(seen), points(tau), points(design.detects(c.n, seeds))))
        for i, effect in enumerate(config.effect):
            cells = needs(design, effect / 100, c.n, most, tasks)
            wanted.append(("" if i else name, f"{effect:g}", *cells))
    header = ("contrast", "seeds", "pairs\na seed", "differ-\nence", "disagree,\n%")
    header += ("deviation\nof seeds", "beyond\nepisodes", "found over\nthese seeds")
    needed = table(("contrast", *needs_header(most, "as many")), wanted, left=1)
    parts = ["What these runs can find, in points:\n", table(header, able, left=1) + "\n"]
    parts += ["What a difference needs:\n", needed + "\n", NOTES, spread_say(config, found)]
    if config.contrasts == 1 and len(found) > 1:
        worst = f"--contrasts {len(found)}"
        parts.append(f"Holm's correction runs over up to {len(found)} of these; its worst case: {worst}.")
    return "\n".join(parts)


def needs_header(seeds: int, episodes: str) -> tuple[str, ...]:
    return "points", f"episodes of\neach of {seeds} seeds", f"seeds of\n{episodes} episodes"


def spread_say(config: Config, found: list[Contrast]) -> str:
    """Return how well the spread over seeds is known."""
    seeds = max(len(c.seeds) for c in found)
    if config.seed_sd is not None:
        return f"Beyond episodes: --seed-sd {config.seed_sd:g}, not what is seen."
    if seeds == 1:
        return "One seed an arm says nothing of the spread over seeds: --seed-sd 0.03 assumes one."
    low, high = (math.sqrt((seeds - 1) / chi2.ppf(q, seeds - 1)) for q in (0.975, 0.025))
    return f"A deviation seen in {seeds} seeds is known to a factor between {low:.1f} and {high:.1f} (95 %)."


def main(args: list[str] | None = None) -> None:
    """Print the plan, or what the named runs can detect, a section a sample budget."""
    config = type_in(Config, __doc__, OFTEN, "python -m report power", args)
    if not config.runs:
        print(plan_text(config))
        return
    with told():
        runs, aside = load_runs(config.runs)
        evaluated = [run for run in runs if run.episodes]
        if not evaluated:
            raise Refused(
                "no episodes in these runs; run eval.py on a checkpoint, or leave RUNS out for a plan"
            )
    print("".join(f"{each}\n" for each in aside), end="", file=sys.stderr)
    for budget in sorted({run.budget for run in evaluated}, key=lambda b: (b is None, b or 0)):
        panel = [run for run in evaluated if run.budget == budget]
        title = "Checkpoints from elsewhere" if budget is None else f"{budget:,} training samples"
        print(f"{title}; {settings(config)}\n\n{panel_text(config, panel)}\n")
