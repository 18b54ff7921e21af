"""Turns run folders into success tables, paired comparisons and figures, an interval beside every number.

Two arms are compared on the same (suite, task, init state) pairs, within one training seed. Another sample
budget gets a table of its own; another protocol or other data are refused. A simulator crash is neither a
success nor a failure: it is counted beside them.

    python report.py runs/demo                               # -> runs/demo/report/report.md and figures
    python report.py runs/a runs/b/E2_s0 --out /tmp/report   # any run folders, or folders that hold some

Reads config.json, metrics.jsonl and episodes.jsonl of each run folder; needs neither torch nor a simulator.
Sources: Wilson 1927; McNemar 1947, in its exact form; Holm 1979; for the interval of a paired difference
Newcombe 1998 (Statistics in Medicine 17:2635), method 10.
"""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy.stats import binom

# Named beforehand; Holm's correction runs over these and each memory arm's own mode against off and zero.
CONTRASTS = (("E0", "E0b"), ("E2", "E1"), ("E2", "E0"), ("E1", "E0"))
ALPHA, POWER, Z = 0.05, 0.80, 1.959963984540054
BOOTSTRAP_DRAWS = 10_000
# Okabe and Ito's palette without its yellow: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders that hold run folders."""
    out: Path | None = None
    """Folder for report.md and the figures; default: `report` inside the first folder of `runs`."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(
                "no run folder is named; name one, or a folder that holds some, such as runs/demo"
            )


class Refusal(ValueError):
    """What a person can put right, in one line."""


# --------------------------------------------------------------------------------------------------
# statistics


def wilson(k: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the proportion k/n; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided McNemar p: a binomial test of the discordant pairs against 1/2."""
    return min(1.0, 2 * float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """Return Newcombe's 95 % interval (1998, method 10) of the paired difference p_A - p_B."""
    n = both + only_a + only_b + neither
    a, b = both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = wilson(a, n), wilson(b, n)
    p_a, p_b = a / n, b / n
    # phi, the correlation of the two outcomes, corrected for continuity where it is positive
    q = both * neither - only_a * only_b
    q = max(q - n / 2, 0) if q > 0 else q
    margins = a * (n - a) * b * (n - b)
    phi = q / math.sqrt(margins) if margins else 0.0

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))

    difference = p_a - p_b
    low, high = difference - reach(p_a - low_a, high_b - p_b), difference + reach(high_a - p_a, p_b - low_b)
    return max(low, -1.0), min(high, 1.0)


def holm(ps: list[float]) -> list[float]:
    """Return Holm's step-down corrected p values, in the order given."""
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = worst
    return corrected


def smallest_detectable(n: int, discordance: float | None = None) -> float | None:
    """Return the smallest difference of proportions that exact McNemar detects with n pairs.

    Detects: p <= ALPHA with probability POWER. `discordance` is the probability that a pair disagrees;
    None is the most favourable case, where all disagreements point one way (discordance = difference).
    None is returned where no difference is detectable.
    """
    m = np.arange(n + 1)
    # the largest number of losses among m discordant pairs that is still significant; -1 where none is
    critical = binom.ppf(ALPHA / 2, m, 0.5).astype(int)
    critical -= 2 * binom.cdf(critical, m, 0.5) > ALPHA

    def power(d: float) -> float:
        psi = d if discordance is None else discordance
        wins = (psi + d) / (2 * psi)  # probability that a discordant pair favours the better arm
        rejects = binom.cdf(critical, m, wins) + binom.sf(m - critical - 1, m, wins)
        return float((binom.pmf(m, n, psi) * rejects).sum())

    low, high = 0.0, 1.0 if discordance is None else discordance
    if high == 0 or power(high) < POWER:
        return None
    for _ in range(20):  # power rises with the difference
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def bootstrap(by_seed: dict[int, dict[tuple, list[int]]]) -> tuple[float, float]:
    """Return the 95 % interval of a mean difference: resamples seeds, then init states within task.

    `by_seed` maps seed -> task -> differences of the pairs, each -1, 0 or 1. How many of each a resample of
    one task has is multinomial, so no list is ever resampled.
    """
    rng = np.random.default_rng(0)
    seeds = list(by_seed.values())
    drawn = rng.integers(len(seeds), size=(BOOTSTRAP_DRAWS, len(seeds)))
    total, pairs = np.zeros(BOOTSTRAP_DRAWS), np.zeros(BOOTSTRAP_DRAWS)
    for slot in drawn.T:
        for i, tasks in enumerate(seeds):
            here = slot == i
            for values in tasks.values():
                shares = [values.count(v) / len(values) for v in (-1, 0, 1)]
                counts = rng.multinomial(len(values), shares, size=int(here.sum()))
                total[here] += counts[:, 2] - counts[:, 0]
                pairs[here] += len(values)
    low, high = np.quantile(total / pairs, (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------
# run folders


@dataclass(frozen=True)
class Run:
    name: str
    arm: str
    seed: int
    budget: int
    fusion: tuple[str, ...]
    memory: str
    blind: bool
    fingerprint: str
    params: tuple[int | None, int | None]
    episodes: tuple[dict, ...]
    metrics: tuple[dict, ...]
    notes: tuple[str, ...]

    @property
    def own(self) -> str:
        """The memory mode it was trained with."""
        return self.memory if self.fusion else "off"

    @property
    def site(self) -> str:
        return (" + ".join(self.fusion) or "no memory") + (", blind" if self.blind else "")

    @property
    def what(self) -> str:
        return f"{self.site}, trained with {self.memory}" if self.fusion else self.site


def find_runs(paths: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """Return (name, folder) of each run folder in or below `paths`: one whose config.json names an arm."""
    found: dict[Path, str] = {}

    def look(folder: Path, name: str, depth: int) -> None:
        config = folder / "config.json"
        if config.is_file() and "arm" in read_config(config):
            found.setdefault(folder.resolve(), name)
        elif depth < 3:
            for child in sorted(p for p in folder.iterdir() if p.is_dir()):
                look(child, f"{name}/{child.name}" if depth else child.name, depth + 1)

    for path in paths:
        if not path.is_dir():
            raise Refusal(f"{path} is not a folder; name run folders or a folder that holds some")
        look(path, path.resolve().name, 0)
    if not found:
        seen = ", ".join(map(str, paths))
        raise Refusal(f"no run folder (a config.json that names an arm) in {seen}; make one with train.py")
    return [(name, folder) for folder, name in found.items()]


def read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise Refusal(f"{path}:{error.lineno}: not JSON ({error.msg}); train this run again") from None
    return config if isinstance(config, dict) else {}


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a JSONL file; a last line that was cut off is left out with a warning."""
    lines = path.read_text().split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            at = f"{path}:{number}"
            if any(rest.strip() for rest in lines[number:]):
                raise Refusal(
                    f"{at}: malformed line ({error}); delete it and run that program again"
                ) from None
            print(f"report.py: {at}: the last line is cut off and left out", file=sys.stderr)
            continue
        row["_at"] = f"{path}:{number}"
        rows.append(row)
    return rows


def check_episode(row: dict) -> None:
    needed = ("suite", "task_id", "init_state", "success", "steps", "memory", "checkpoint", "protocol")
    if missing := [key for key in needed if key not in row]:
        raise Refusal(
            f"{row['_at']}: an episode without {', '.join(missing)}; evaluate again with this eval.py"
        )
    if not isinstance(row["success"], bool) and not row.get("crash"):
        raise Refusal(
            f"{row['_at']}: success is {row['success']!r} without a crash; delete it, evaluate again"
        )


def read_episodes(path: Path, has_memory: bool) -> tuple[list[dict], list[str]]:
    """Return the episodes of the newest checkpoint, the first of each key, and notes on what was left out."""
    rows = read_lines(path)
    for row in rows:
        check_episode(row)
        if not has_memory:
            row["memory"] = "off"  # an arm without fusion has nothing to intervene on
    newest = max(
        (r["checkpoint"] for r in rows), key=lambda c: [int(d) for d in re.findall(r"\d+", c)], default=""
    )
    first: dict[str, dict] = {}
    current = [row for row in rows if row["checkpoint"] == newest]
    for row in current:
        key = json.dumps([*pair_key(row), row["memory"], protocol_of(row)], sort_keys=True)
        first.setdefault(key, row)
    notes = []
    if twice := len(current) - len(first):
        notes.append(f"{twice} recorded twice, the first counts")
    if older := len(rows) - len(current):
        notes.append(f"{older} of earlier checkpoints left out")
    return list(first.values()), notes


def pair_key(episode: dict) -> tuple[str, int, int]:
    return episode["suite"], episode["task_id"], episode["init_state"]


def protocol_of(episode: dict) -> dict:
    """Return the protocol record, flat, with the evaluation seed, which decides where the fixtures stand."""
    flat = {"eval_seed": episode.get("seed")}
    for key, value in episode["protocol"].items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def trained_samples(config: dict, checkpoint: Path) -> int:
    """Return the samples behind a checkpoint: fewer than the budget where it was saved half-way."""
    state = checkpoint / "state.json"
    return (
        read_config(state).get("samples", config["total_samples"])
        if state.is_file()
        else config["total_samples"]
    )


def load_run(name: str, folder: Path) -> Run:
    """Read one run folder; one without episodes.jsonl has no episodes."""
    config = read_config(folder / "config.json")
    for key in ("seed", "total_samples"):
        if key not in config:
            raise Refusal(f"{folder}/config.json has no {key}; train this run again with this train.py")
    sites = config.get("fusion") or []
    fusion = tuple(s for s in ([sites] if isinstance(sites, str) else sites) if s != "none")
    episodes, notes = read_episodes(folder / "episodes.jsonl", bool(fusion))
    return Run(
        name=name,
        arm=config["arm"],
        seed=config["seed"],
        budget=trained_samples(config, folder / (episodes[0]["checkpoint"] if episodes else "last")),
        fusion=fusion,
        memory=config.get("memory") or "off",
        blind=bool(config.get("blind")),
        fingerprint=json.dumps(config.get("data_fingerprint"), sort_keys=True),
        params=(config.get("params_total"), config.get("params_trainable")),
        episodes=tuple(episodes),
        metrics=tuple(read_lines(folder / "metrics.jsonl")),
        notes=tuple(notes),
    )


def check_comparable(runs: list[Run]) -> None:
    """Raise Refusal unless runs share data and protocol and an arm is one thing, once a seed and budget."""
    arms: dict[str, Run] = {}
    seen: dict[tuple, str] = {}
    protocols: dict[str, tuple[str, dict]] = {}

    def same(what: str, a: object, name_a: str, b: object, name_b: str) -> None:
        if a != b:
            raise Refusal(
                f"{what}: {a!r} in {name_a}, {b!r} in {name_b}; make them alike, or report them apart"
            )

    for run in runs:
        first, twin = runs[0], arms.setdefault(run.arm, run)
        same("data fingerprints differ", first.fingerprint, first.name, run.fingerprint, run.name)
        same(f"arm {run.arm} means two things", twin.what, twin.name, run.what, run.name)
        same(f"arm {run.arm} has two sizes", twin.params, twin.name, run.params, run.name)
        other = seen.setdefault((run.arm, run.seed, run.budget), run.name)
        if other != run.name:
            twice = f"arm {run.arm}, seed {run.seed}, {run.budget} samples"
            raise Refusal(f"{twice} is there twice: {other} and {run.name}; report one of them")
        for episode in run.episodes:  # step limits belong to a suite, so protocols are compared within one
            suite, record = episode["suite"], protocol_of(episode)
            name, expected = protocols.setdefault(suite, (run.name, record))
            for key in sorted({*record, *expected}):
                same(
                    f"protocols of {suite} differ in {key}",
                    expected.get(key),
                    name,
                    record.get(key),
                    run.name,
                )


# --------------------------------------------------------------------------------------------------
# success, and paired comparisons


def by_arm(panel: list[Run]) -> dict[str, list[Run]]:
    """Return arm -> its evaluated runs, by seed."""
    arms: dict[str, list[Run]] = {}
    for run in sorted(panel, key=lambda r: (r.arm, r.seed)):
        if run.episodes:
            arms.setdefault(run.arm, []).append(run)
    return arms


def arm_modes(runs: list[Run]) -> list[str]:
    """Return an arm's rollout modes: its own first, then off and zero, then the rest by name."""
    order = {"off": 1, "zero": 2, runs[0].own: 0}
    return sorted({e["memory"] for run in runs for e in run.episodes}, key=lambda m: (order.get(m, 3), m))


def in_mode(runs: list[Run], mode: str) -> list[dict]:
    return [e for run in runs for e in run.episodes if e["memory"] == mode]


@dataclass(frozen=True)
class Tally:
    k: int
    n: int
    crashes: int
    steps: float | None

    @property
    def rate(self) -> float:
        return self.k / self.n if self.n else math.nan


def tally(episodes: list[dict]) -> Tally:
    """Count successes among the episodes that ran to an end, and crashes beside them."""
    ran = [e for e in episodes if not e.get("crash")]
    steps = [e["steps"] for e in ran if e["success"]]
    return Tally(len(steps), len(ran), len(episodes) - len(ran), sum(steps) / len(steps) if steps else None)


@dataclass(frozen=True)
class Contrast:
    a: str
    b: str
    seed: str  # a seed, or "all"
    counts: tuple[int, int, int, int]  # both, only A, only B, neither
    interval: tuple[float, float]
    p: float
    p_holm: float | None = None  # only on the row that stands for the contrast

    @property
    def n(self) -> int:
        return sum(self.counts)

    @property
    def difference(self) -> float:
        return (self.counts[1] - self.counts[2]) / self.n

    @property
    def verdict(self) -> str:
        shown = self.p_holm is not None and self.p_holm < ALPHA
        found = ("higher" if self.difference > 0 else "lower") if shown else "not shown"
        numbers = f"{100 * self.difference:+.0f} points, Holm p {format_p(self.p_holm)}"
        return f"{self.a} against {self.b}: {numbers}, {found}"


def named_contrasts(panel: list[Run]) -> list[tuple[str, str, str, str]]:
    """Return (arm A, mode A, arm B, mode B) of each contrast that these runs could answer."""
    arms = {run.arm: run for run in panel}
    named = [(a, arms[a].own, b, arms[b].own) for a, b in CONTRASTS if a in arms and b in arms]
    for arm, run in sorted(arms.items()):
        if run.fusion:
            named += [(arm, run.own, arm, mode) for mode in ("off", "zero") if mode != run.own]
    return named


def outcomes(panel: list[Run], arm: str, mode: str) -> dict[int, dict[tuple, bool]]:
    """Return seed -> (suite, task, init state) -> success, without crashes."""
    return {
        run.seed: {pair_key(e): e["success"] for e in in_mode([run], mode) if not e.get("crash")}
        for run in panel
        if run.arm == arm
    }


def compare(panel: list[Run], arm_a: str, mode_a: str, arm_b: str, mode_b: str) -> list[Contrast]:
    """Return the paired comparison of each seed that both sides have, then, for several seeds, of all."""
    side_a, side_b = outcomes(panel, arm_a, mode_a), outcomes(panel, arm_b, mode_b)
    label_a, label_b = (f"{arm_a} {mode_a}", f"{arm_a} {mode_b}") if arm_a == arm_b else (arm_a, arm_b)
    rows, differences = [], {}
    for seed in sorted(side_a.keys() & side_b.keys()):
        a, b = side_a[seed], side_b[seed]
        common = sorted(a.keys() & b.keys())
        cells = Counter((a[key], b[key]) for key in common)
        counts = cells[True, True], cells[True, False], cells[False, True], cells[False, False]
        if common:
            p = mcnemar(counts[1], counts[2])
            rows.append(Contrast(label_a, label_b, str(seed), counts, newcombe(*counts), p))
            tasks = differences.setdefault(seed, defaultdict(list))
            for key in common:
                tasks[key[:2]].append(int(a[key]) - int(b[key]))
    if len(rows) > 1:
        counts = tuple(map(sum, zip(*(row.counts for row in rows), strict=True)))
        p = mcnemar(counts[1], counts[2])
        rows.append(Contrast(label_a, label_b, "all", counts, bootstrap(differences), p))
    return rows


def all_contrasts(panel: list[Run]) -> list[Contrast]:
    """Return the rows of every named contrast; the last row of each carries the Holm-corrected p."""
    groups = [rows for named in named_contrasts(panel) if (rows := compare(panel, *named))]
    corrected = holm([rows[-1].p for rows in groups])
    for rows, p in zip(groups, corrected, strict=True):
        rows[-1] = replace(rows[-1], p_holm=p)
    return [row for rows in groups for row in rows]


# --------------------------------------------------------------------------------------------------
# tables and text


def format_p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def points(x: float | None) -> str:
    return "-" if x is None or math.isnan(x) else f"{100 * x:.0f}"


def markdown(header: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a markdown table whose columns line up in a terminal too."""
    cells = [tuple(str(c) for c in row) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def success_table(panel: list[Run]) -> str:
    header = ("arm", "what it is", "memory at rollout", "success", "%", "95 % (Wilson)", "% per seed")
    rows = []
    for arm, runs in by_arm(panel).items():
        size = ["-" if p is None else f"{p:,}" for p in runs[0].params]
        for mode in arm_modes(runs):
            t = tally(in_mode(runs, mode))
            low, high = wilson(t.k, t.n)
            seeds = " ".join(points(tally(in_mode([run], mode)).rate) for run in runs)
            name = f"{mode} (own)" if mode == runs[0].own else mode
            interval = f"{points(low)} to {points(high)}"
            row = (arm, runs[0].what, name, f"{t.k}/{t.n}", points(t.rate), interval, seeds)
            rows.append((*row, "-" if t.steps is None else f"{t.steps:.0f}", t.crashes, *size))
    return markdown((*header, "steps to success", "crashes", "parameters", "of these trained"), rows)


def task_table(panel: list[Run]) -> str:
    """Return success per suite and per task, each arm under its own mode."""
    arms = by_arm(panel)
    tasks = {(e["suite"], e["task_id"]): str(e.get("task", "")) for run in panel for e in run.episodes}
    suites = sorted({suite for suite, _ in tasks})
    rows = []
    for suite in suites:
        whole = [None] if len(suites) > 1 else []
        for task in whole + sorted(task for s, task in tasks if s == suite):
            cells = []
            for runs in arms.values():
                own = [e for e in in_mode(runs, runs[0].own) if e["suite"] == suite]
                t = tally([e for e in own if task in (None, e["task_id"])])
                low, high = wilson(t.k, t.n)
                cells.append(f"{t.k}/{t.n} ({points(low)} to {points(high)})" if t.n else "-")
            rows.append((suite, "all tasks" if task is None else f"{task} {tasks[suite, task]}", *cells))
    return markdown(("suite", "task", *arms), rows)


def contrast_table(contrasts: list[Contrast]) -> str:
    header = ("A", "B", "seed", "pairs", "both", "only A", "only B", "neither", "A - B in points (95 %)", "p")
    rows = []
    for c in contrasts:
        low, high = (f"{100 * x:+.0f}" for x in c.interval)
        difference = f"{100 * c.difference:+.0f} ({low} to {high})"
        best = smallest_detectable(c.n)
        here = smallest_detectable(c.n, (c.counts[1] + c.counts[2]) / c.n)
        row = (c.a, c.b, c.seed, c.n, *c.counts, difference, format_p(c.p), format_p(c.p_holm))
        rows.append((*row, points(best), points(here)))
    return markdown((*header, "Holm p", "detects at best", "detects here"), rows)


CONTRAST_NOTES = f"""\
Pairs share suite, task, init state and training seed; pairs with a crash are left out. p: exact McNemar,
two-sided. Interval: Newcombe 1998, method 10, for paired proportions; in rows `all` a bootstrap of
{BOOTSTRAP_DRAWS:,} draws that resamples seeds, then init states within task. Holm's correction runs over the
contrasts of this table. Detects: the smallest true difference, in points, that exact McNemar at alpha {ALPHA}
finds with {POWER:.0%} power in this many pairs, the discordant ones being Binomial(pairs, discordance). At
best: all disagreements point one way. Here: as many pairs disagree as in this row (-: none can be found)."""


def seeds_say(arms: dict[str, list[Run]]) -> str:
    if max(len(runs) for runs in arms.values()) == 1:
        return (
            "One training seed an arm: the intervals cover the choice of episodes only. Nothing here speaks "
            "about the variation between training seeds, which may be as large as any difference above."
        )
    counted = ", ".join(f"{arm} {len(runs)}" for arm, runs in arms.items())
    return (
        f"Training seeds: {counted}. Wilson intervals and p pool the episodes of these seeds and speak about "
        "these alone; the bootstrap in rows `all` speaks about new ones, roughly where they are fewer than 5."
    )


def memory_helps_say(arms: dict[str, list[Run]], found: dict[tuple[str, str], Contrast]) -> str:
    needed = [found.get(("E2", other)) for other in ("E1", "E0")]
    if None in needed:
        verdict = "cannot be told, a comparison is missing"
    elif all(c.p_holm < ALPHA and c.difference > 0 for c in needed):
        verdict = "shown here"
    else:
        verdict = "not shown here"
    details = "".join(f"; {c.verdict}" for c in needed if c)
    return (
        "That memory helps takes E2 above both E1 (the same fusion, fed zeros) and E0 (no memory): "
        f"{verdict}{details}."
    )


def what_it_says(panel: list[Run], contrasts: list[Contrast]) -> str:
    """Return what follows from these runs and what does not, as a list."""
    arms = by_arm(panel)
    found = {(c.a, c.b): c for c in contrasts if c.p_holm is not None}
    says = [seeds_say(arms)]
    for arm in arms:
        if inside := [c.verdict for (a, b), c in found.items() if a.startswith(f"{arm} ")]:
            says.append(
                f"{'; '.join(inside)}. A difference here shows only that the policy of {arm} depends on "
                "its memory, not that memory helps."
            )
    if any(runs[0].fusion for runs in arms.values()):
        says.append(memory_helps_say(arms, found))
    if blind := found.get(("E0", "E0b")):
        says.append(
            f"{blind.verdict}. E0b sees no picture: success that it reaches too says nothing about seeing."
        )
    elif "E0" in arms:
        says.append("Without E0b, which is blind, nobody knows how much of this success needs eyes.")
    if contrasts:
        says.append("`not shown` is not `no difference`: see what each row can detect.")
    if crashes := tally([e for run in panel for e in run.episodes]).crashes:
        says.append(
            f"{crashes} episodes crashed and count neither way; crashes that favour an arm would bias this."
        )
    return "\n".join(f"- {line}" for line in says)


def reproduction(runs: list[Run]) -> str:
    """Return what a repetition needs: runs, seeds, init states, protocol records."""
    header = ("run folder", "arm", "seed", "samples", "checkpoint", "memory", "episodes", "notes")
    rows = []
    for run in sorted(runs, key=lambda r: (r.budget, r.arm, r.seed)):
        checkpoint = run.episodes[0]["checkpoint"] if run.episodes else "not evaluated"
        row = (run.name, run.arm, run.seed, f"{run.budget:,}", checkpoint, " ".join(arm_modes([run])))
        rows.append((*row, len(run.episodes), "; ".join(run.notes)))
    parts = [markdown(header, rows), f"Data fingerprint: {runs[0].fingerprint}"]
    episodes = [e for run in runs for e in run.episodes]
    for suite in sorted({e["suite"] for e in episodes}):
        here = [e for e in episodes if e["suite"] == suite]
        states = defaultdict(set)
        for e in here:
            states[e["task_id"]].add(e["init_state"])
        used = "; ".join(f"task {task}: {ranges(states[task])}" for task in sorted(states))
        record = json.dumps(protocol_of(here[0]), indent=2, sort_keys=True)
        parts += [f"{suite}, init states: {used}. Protocol:", f"```json\n{record}\n```"]
        if colours := here[0].get("render_fingerprint"):
            first = f"task {here[0]['task_id']}, init state {here[0]['init_state']}"
            parts.append(f"Mean colours of the first pictures, {first}: {json.dumps(colours)}")
    return "\n\n".join(parts)


def ranges(numbers: set[int]) -> str:
    """Return sorted numbers with runs shortened: {0, 1, 2, 5} -> "0-2, 5"."""
    parts: list[list[int]] = []
    for x in sorted(numbers):
        if parts and x == parts[-1][-1] + 1:
            parts[-1].append(x)
        else:
            parts.append([x])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


# --------------------------------------------------------------------------------------------------
# figures


def tidy(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


def save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def success_figure(panel: list[Run], palette: dict, path: Path) -> Path:
    """Draw success with Wilson intervals, one row an arm and memory mode, one small dot a seed."""
    arms = by_arm(panel)
    rows = [(arm, mode, runs) for arm, runs in arms.items() for mode in arm_modes(runs)]
    figure, axis = plt.subplots(figsize=(7.5, 1.3 + 0.38 * len(rows)))
    for y, (arm, mode, runs) in enumerate(rows):
        colour, own = palette[arm][0], mode == runs[0].own
        t = tally(in_mode(runs, mode))
        low, high = wilson(t.k, t.n)
        axis.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2.4 if own else 1.2)
        face = colour if own else "white"
        axis.plot(100 * t.rate, y, "o", color=colour, markersize=8, markerfacecolor=face, zorder=3)
        if len(runs) > 1:
            rates = [100 * tally(in_mode([run], mode)).rate for run in runs]
            axis.plot(rates, [y + 0.27] * len(rates), "d", color="0.35", markersize=3.5, zorder=3)
        axis.text(102, y, f"{t.k}/{t.n}", va="center", fontsize=9, color="0.3")
        if y and arm != rows[y - 1][0]:
            axis.axhline(y - 0.5, color="0.85", linewidth=0.8)
    labels = [f"{arm} ({runs[0].site})   {mode}" for arm, mode, runs in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(-2, 100)
    axis.set_xlabel("success (%) with 95 % Wilson interval")
    seeds = "small diamonds: seeds" if any(len(runs) > 1 for runs in arms.values()) else "one seed an arm"
    title = f"{panel[0].budget:,} training samples; filled: own memory mode, open: intervention; {seeds}"
    axis.set_title(title, fontsize=9.5, loc="left")
    tidy(axis)
    axis.grid(axis="y", visible=False)
    return save(figure, path)


def series(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (samples, values) of one logged value; where a resumed run logged twice, the later counts."""
    logged = {
        m["samples"]: m[key] for m in run.metrics if "samples" in m and isinstance(m.get(key), int | float)
    }
    samples = np.array(sorted(logged), float)
    return samples, np.array([logged[s] for s in sorted(logged)], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return a centred running mean over a twentieth of the values, shorter at the ends."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw_lines(axis: plt.Axes, lines: list[tuple], title: str, ylabel: str) -> None:
    """Draw each (label, colour, style, samples, values), naming a label once."""
    named = set()
    for label, colour, style, samples, values in lines:
        shown = None if label in named else label
        axis.plot(samples, values, style, color=colour, linewidth=1.6, label=shown)
        named.add(label)
    axis.set_title(title, fontsize=9.5, loc="left")
    axis.set_ylabel(ylabel)
    axis.set_xlabel("training samples")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    tidy(axis)


def curves_figure(panel: list[Run], palette: dict, path: Path) -> Path | None:
    """Draw loss and action loss over samples, a running mean a run with the logged values faintly behind."""
    titles = {"loss": "with the world loss, where an arm has one", "action_loss": "comparable between arms"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        lines = []
        for run in panel:
            samples, values = series(run, key)
            if len(samples):
                axis.plot(samples, values, color=palette[run.arm][0], alpha=0.2, linewidth=0.7)
                lines.append((run.arm, *palette[run.arm], samples, smooth(values)))
        draw_lines(axis, lines, title, key.replace("_", " "))
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = axes[0].get_legend_handles_labels()
    if not handles:
        plt.close(figure)
        return None
    figure.legend(handles, labels, title="arm", frameon=False, loc="outside right center")
    return save(figure, path)


def gates_figure(panel: list[Run], palette: dict, path: Path) -> Path | None:
    """Draw tanh(gate) over samples, one line a run and fusion site."""
    keys = sorted({key for run in panel for m in run.metrics for key in m if key.startswith("world_gate")})
    lines = [
        (f"{run.arm} {key}", palette[run.arm][0], STYLES[i % len(STYLES)], *series(run, key))
        for run in panel
        for i, key in enumerate(keys)
    ]
    lines = [line for line in lines if len(line[3])]
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axis.axhline(0, color="0.5", linewidth=0.8)
    draw_lines(axis, lines, "strength of the memory branch: 0 is closed, 1 or -1 fully open", "tanh(gate)")
    figure.legend(frameon=False, loc="outside right center")
    return save(figure, path)


# --------------------------------------------------------------------------------------------------
# the report


def panel_section(panel: list[Run], palette: dict, out: Path) -> tuple[str, str, list[Path]]:
    """Return one budget's section, what of it goes to the terminal, and its figures."""
    budget, contrasts = panel[0].budget, all_contrasts(panel)
    drawn = [
        success_figure(panel, palette, out / f"success_{budget}.png"),
        curves_figure(panel, palette, out / f"curves_{budget}.png"),
        gates_figure(panel, palette, out / f"gates_{budget}.png"),
    ]
    figures = [path for path in drawn if path]
    title, success = f"{budget:,} training samples", success_table(panel)
    pairs = contrast_table(contrasts) if contrasts else "No two arms or modes share pairs."
    parts = [f"## {title}", "### Success", success, "By task, each arm under its own memory mode:"]
    parts += [task_table(panel), "### Paired comparisons", pairs, *([CONTRAST_NOTES] if contrasts else [])]
    parts += ["### What this table can say", what_it_says(panel, contrasts), "### Figures"]
    parts += [f"![{path.stem}]({path.name})" for path in figures]
    return "\n\n".join(parts), f"{title}\n\n{success}\n\n{pairs}\n", figures


def write_report(runs: list[Run], out: Path) -> str:
    """Write report.md and its figures, a section a sample budget, and return what goes to the terminal."""
    check_comparable(runs)
    evaluated = [run for run in runs if run.episodes]
    if not evaluated:
        names = ", ".join(run.name for run in runs)
        raise Refusal(f"no episodes in episodes.jsonl of {names}; run eval.py on a checkpoint first")
    out.mkdir(parents=True, exist_ok=True)
    arms = sorted({run.arm for run in runs})
    palette = {arm: (COLOURS[i % 7], STYLES[i // 7 % 4]) for i, arm in enumerate(arms)}
    parts, printed, figures = ["# Report"], [], 0
    for budget in sorted({run.budget for run in evaluated}):
        panel = sorted((run for run in runs if run.budget == budget), key=lambda r: (r.arm, r.seed))
        section, tables, drawn = panel_section(panel, palette, out)
        parts.append(section)
        printed.append(tables)
        figures += len(drawn)
    if missing := [run.name for run in runs if not run.episodes]:
        parts.append(f"Not evaluated: {', '.join(missing)}.")
        printed.append(parts[-1])
    parts += ["## Reproduction", reproduction(runs)]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return "\n".join([*printed, f"wrote {path} and {figures} figures"])


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    try:
        runs = [load_run(name, folder) for name, folder in find_runs(config.runs)]
        print(write_report(runs, config.out or config.runs[0] / "report"))
    except Refusal as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
