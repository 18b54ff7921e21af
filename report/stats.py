"""The report's statistics: intervals, exact paired tests, what they can detect, and contrasts between arms.

Two arms are compared on the same (suite, task, init state) pairs, within one training seed; a pair with a
crash is left out. Over seeds, only pairs that every seed has are pooled, so that each seed weighs the same.

Which contrasts are tested is the table below, fixed before any result is seen. Those that the runs can answer
are one family, and Holm's correction runs over it. The family is small on purpose, since each contrast that
finds nothing makes all others harder to show: with 40 of them the first to be shown needs p < 0.00125. So two
sites are compared through `late` and not with one another, two banks through the single future, and of each
arm's interventions only `off` is tested, but for E2 and for one bank, in which hypotheses are told apart.
Everything else stands in the success table, with intervals and without a verdict.

    python -c "import stats; print(stats.wilson(15, 20), stats.newcombe(12, 6, 1, 1))"
    pytest tests/report/test_stats.py

Sources: Wilson 1927; McNemar 1947, in its exact form; Holm 1979; for the interval of a paired difference
Newcombe 1998 (Statistics in Medicine 17:2635), method 10; for resampling seeds and init states, which cross,
Owen 2007 (Annals of Applied Statistics 1:386), the pigeonhole bootstrap.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binom, binomtest

SITES = ("F2", "F3a", "F3as", "F3b")
BANKS = ("B4dropout", "B4noise", "B4ensemble", "B4mixture", "B4single", "B4mean", "B4min", "B4rwta")
CONTRASTS = (
    ("E0", "E0b"),  # does success need eyes at all?
    ("E2", "E1"),  # does memory help: above the same fusion fed zeros,
    ("E2", "E0"),  # and above no memory
    ("E1", "E0"),  # what capacity alone does
    ("E2", "E2c"),  # is it the prediction, or merely a second encoder's view of now,
    ("E2", "E2h"),  # or of the past
    ("E2d", "E1"),  # does prediction help that no action loss has shaped
    # Where should memory enter? E1's capacity sits at `late` and is no control of another site,
    *((site, other) for site in SITES for other in ("E0", "E2")),
    *((site, f"{site}z") for site in ("F2", "F3a", "F3b")),  # which has one: the same site fed zeros
    *((bank, "E2") for bank in BANKS),  # do several futures help more than one
)
# Within a memory arm: its own mode against these rollout modes. They show what a policy depends on.
INTERVENTIONS = {"E2": ("off", "zero"), "B4ensemble": ("off", "best1", "mean1", "dup")}
INTERVENTION = ("off",)  # of any other memory arm
ALPHA, POWER = 0.05, 0.80
BOOTSTRAP_DRAWS = 10_000


def wilson(k: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the proportion k/n; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(k, n).proportion_ci(1 - ALPHA, method="wilson")
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided McNemar p: a binomial test of the discordant pairs against 1/2."""
    discordant = only_a + only_b
    return float(binomtest(only_a, discordant).pvalue) if discordant else 1.0


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


def mcnemar_power(n: int, difference: float, discordance: float, alpha: float = ALPHA) -> float:
    """Return the probability that exact McNemar finds p <= alpha in n pairs.

    A pair disagrees with probability `discordance`, in favour of A `difference` more often than of B. The
    number that do is Binomial(n, discordance); its tails below 1e-12 are left out.
    """
    if discordance == 0:
        return 0.0
    m = np.arange(binom.ppf(1e-12, n, discordance), binom.isf(1e-12, n, discordance) + 1)
    # the largest number of losses among m discordant pairs that is still significant; -1 where none is
    critical = binom.ppf(alpha / 2, m, 0.5)
    critical -= 2 * binom.cdf(critical, m, 0.5) > alpha
    wins = (discordance + difference) / (2 * discordance)  # probability that a discordant pair favours A
    rejects = binom.cdf(critical, m, wins) + binom.sf(m - critical - 1, m, wins)
    return float((binom.pmf(m, n, discordance) * rejects).sum())


def smallest_detectable(
    n: int, discordance: float | None = None, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """Return the smallest difference of proportions that exact McNemar detects with n pairs.

    Detects: p <= alpha with probability `power`. `discordance` is the probability that a pair disagrees;
    None is the most favourable case, where all disagreements point one way (discordance = difference).
    None is returned where no difference is detectable.
    """

    def reached(d: float) -> bool:
        return mcnemar_power(n, d, d if discordance is None else discordance, alpha) >= power

    low, high = 0.0, 1.0 if discordance is None else discordance
    if not reached(high):
        return None
    for _ in range(20):  # power rises with the difference
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def bootstrap(differences: list[np.ndarray]) -> tuple[float, float]:
    """Return the 95 % interval of a mean difference: resamples seeds, then init states within task.

    `differences` has an array (S, n) a task: of S seeds, the same in each, on n init states, -1, 0 or 1. An
    init state that is drawn is drawn for all seeds, since it is the same one, hard or easy for all of them;
    drawn for each seed anew, what init states differ by would look S times smaller than it is.
    The interval is long where seeds hardly differ (it held the truth in 99 % of simulations) and short where
    they differ many times more than by chance: 70 % with 2 seeds, 78 % with 3, 85 % with 5, 90 % with 10.
    """
    rng = np.random.default_rng(0)
    seeds, pairs = len(differences[0]), sum(task.shape[1] for task in differences)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=BOOTSTRAP_DRAWS)  # (draws, S)
    total = np.zeros(BOOTSTRAP_DRAWS)
    for task in differences:
        # init states that are alike in every seed are interchangeable: how many are drawn is multinomial
        patterns, counts = np.unique(task, axis=1, return_counts=True)  # (S, n) -> (S, kinds)
        drawn = rng.multinomial(task.shape[1], counts / task.shape[1], size=BOOTSTRAP_DRAWS)  # (draws, kinds)
        total += ((weights @ patterns) * drawn).sum(1)
    low, high = np.quantile(total / (seeds * pairs), (ALPHA / 2, 1 - ALPHA / 2))
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
    def shown(self) -> bool:
        """Whether A and B differ: by Holm's p and, over seeds, which p pools, by the bootstrap as well."""
        low, high = self.interval
        apart = self.seed != "all" or low > 0 or high < 0
        return self.p_holm is not None and self.p_holm < ALPHA and apart

    @property
    def verdict(self) -> str:
        found = ("higher" if self.difference > 0 else "lower") if self.shown else "not shown"
        numbers = f"{100 * self.difference:+.0f} points, Holm p {format_p(self.p_holm)}"
        return f"{self.a} against {self.b}: {numbers}, {found}"


def named_contrasts(panel: list[Run]) -> list[tuple[str, str, str, str]]:
    """Return (arm A, mode A, arm B, mode B) of each contrast that these runs could answer."""
    arms = {run.arm: run for run in panel}
    named = [(a, arms[a].own, b, arms[b].own) for a, b in CONTRASTS if a in arms and b in arms]
    for arm, run in sorted(arms.items()):
        if run.fusion:
            others = INTERVENTIONS.get(arm, INTERVENTION)
            named += [(arm, run.own, arm, mode) for mode in others if mode != run.own]
    return named


def outcomes(panel: list[Run], arm: str, mode: str) -> dict[int, dict[tuple, bool]]:
    """Return seed -> (suite, task, init state) -> success, without crashes."""
    return {
        run.seed: {pair_key(e): e["success"] for e in in_mode([run], mode) if not e.get("crash")}
        for run in panel
        if run.arm == arm
    }


def compare(panel: list[Run], arm_a: str, mode_a: str, arm_b: str, mode_b: str) -> list[Contrast]:
    """Return the paired comparison of each seed that both sides have, then, for several seeds, of all.

    The last row pools the pairs that all these seeds have; it is absent where there are none.
    """
    side_a, side_b = outcomes(panel, arm_a, mode_a), outcomes(panel, arm_b, mode_b)
    labels = (f"{arm_a} {mode_a}", f"{arm_a} {mode_b}") if arm_a == arm_b else (arm_a, arm_b)
    pairs = {}  # seed -> (suite, task, init state) -> success of A, of B
    for seed in sorted(side_a.keys() & side_b.keys()):
        a, b = side_a[seed], side_b[seed]
        if both := a.keys() & b.keys():
            pairs[seed] = {key: (a[key], b[key]) for key in both}
    rows = []
    for seed, cells in pairs.items():
        counts = count_cells(cells.values())
        rows.append(Contrast(*labels, str(seed), counts, newcombe(*counts), mcnemar(*counts[1:3])))
    common = sorted(set.intersection(*map(set, pairs.values()))) if len(pairs) > 1 else []
    if common:
        counts = count_cells(cells[key] for cells in pairs.values() for key in common)
        tasks = [[key for key in common if key[:2] == task] for task in sorted({key[:2] for key in common})]
        differences = [
            np.array([[int(cells[key][0]) - int(cells[key][1]) for key in keys] for cells in pairs.values()])
            for keys in tasks
        ]
        rows.append(Contrast(*labels, "all", counts, bootstrap(differences), mcnemar(*counts[1:3])))
    return rows


def count_cells(cells: Iterable[tuple[bool, bool]]) -> tuple[int, int, int, int]:
    """Count pairs of outcomes: both succeed, only A, only B, neither."""
    count = Counter(cells)
    return count[True, True], count[True, False], count[False, True], count[False, False]


def all_contrasts(panel: list[Run]) -> list[Contrast]:
    """Return the rows of every named contrast; the last row of each carries the Holm-corrected p.

    Seeds that share no pair have no row in common, and none of theirs stands for the contrast.
    """
    groups = [rows for named in named_contrasts(panel) if (rows := compare(panel, *named))]
    family = [rows for rows in groups if len(rows) == 1 or rows[-1].seed == "all"]
    corrected = holm([rows[-1].p for rows in family])
    for rows, p in zip(family, corrected, strict=True):
        rows[-1] = replace(rows[-1], p_holm=p)
    return [row for rows in groups for row in rows]
