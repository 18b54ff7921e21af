"""The report's statistics: intervals, exact paired tests, what they can detect, and contrasts between arms.

Two arms are compared on the same (suite, task, init state) pairs, within one training seed; a pair with a
crash is left out. Which contrasts are tested is fixed below, before any result is seen, and Holm's correction
runs over them all.

    python -c "import stats; print(stats.wilson(15, 20), stats.newcombe(12, 6, 1, 1))"
    pytest tests/test_stats.py

Sources: Wilson 1927; McNemar 1947, in its exact form; Holm 1979; for the interval of a paired difference
Newcombe 1998 (Statistics in Medicine 17:2635), method 10.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binom

# Named beforehand; Holm's correction runs over these and each memory arm's own mode against off and zero.
CONTRASTS = (("E0", "E0b"), ("E2", "E1"), ("E2", "E0"), ("E1", "E0"))
ALPHA, POWER, Z = 0.05, 0.80, 1.959963984540054
BOOTSTRAP_DRAWS = 10_000


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
# runs and their episodes


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


def pair_key(episode: dict) -> tuple[str, int, int]:
    return episode["suite"], episode["task_id"], episode["init_state"]


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


# --------------------------------------------------------------------------------------------------
# paired comparisons


def format_p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


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
