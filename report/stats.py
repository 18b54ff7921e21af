"""The report's statistics: intervals, tests over seeds and within a checkpoint, the contrasts tested.

Seeds are the unit, of two arms and of an arm's two memory modes: the estimate is the mean of per-seed paired
differences, p and interval are those of a t test over seeds. Fewer than 3 seeds, or seeds that do not differ
at all, give no verdict on arms; two modes of fewer are tested in each checkpoint, by exact McNemar. Episodes
pair by (suite, task, init state) within a seed; a pair with a crash, or that a seed lacks, is left out.

Contrasts are named before any result is seen, in families that Holm corrects each by itself: `primary` (what
the study asks), `checks` (whether the manipulations did anything) and `signals`. To the named ones come those
that a run's config.json names as `compared_with`. Everything else has an interval and no verdict.

    python -c "from report import stats; print(stats.wilson(15, 20), stats.newcombe(12, 6, 1, 1))"
    pytest tests/report/test_stats.py

Sources: Wilson 1927; McNemar 1947, in its exact form; Holm 1979; for the interval of a paired difference
Newcombe 1998 (Statistics in Medicine 17:2635), method 10; for equivalence Schuirmann 1987 (TOST).
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, ttest_1samp

SITES = ("F2", "F3a", "F3as", "F3b")
ALIKE = "B4dup"  # one hypothesis repeated; the record of a run says so, of earlier ones its arm's name
BANKS = ("B4dropout", "B4noise", "B4ensemble", "B4mixture", "B4single", "B4mean", "B4min", "B4rwta")
CONTROLS = ("r", "n", "c", "h")  # the same site: trained on noise, lambda 0, the present latent, past latents
NAMED = {
    "E0": ("E0b",),  # a check: the second is blind
    "E2": ("E0", "E1s", "E2n", "E2c", "E2h"),
    **{site: ("E0", *(site + control for control in CONTROLS)) for site in SITES},
    **dict.fromkeys(BANKS, (ALIKE, "E2")),
}
MODES = {"checks": ("off", "shuffle", "stale"), "signals": ("zero", "random")}  # beside an arm's own
FAMILIES = ("primary", *MODES)
ALPHA, LEAST_SEEDS = 0.05, 3


def wilson(k: int, n: int, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Return Wilson's interval of the proportion k/n; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    low, high = binomtest(k, n).proportion_ci(level, method="wilson")
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided McNemar p: a binomial test of the discordant pairs against 1/2."""
    discordant = only_a + only_b
    return float(binomtest(only_a, discordant).pvalue) if discordant else 1.0


def newcombe(
    both: int, only_a: int, only_b: int, neither: int, level: float = 1 - ALPHA
) -> tuple[float, float]:
    """Return Newcombe's interval (1998, method 10) of the paired difference p_A - p_B."""
    n = both + only_a + only_b + neither
    a, b = both + only_a, both + only_b
    (low_a, high_a), (low_b, high_b) = wilson(a, n, level), wilson(b, n, level)
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


class Test(NamedTuple):
    """p, its 95 % interval, and the bound beyond which the data exclude differences at 95 % (TOST)."""

    p: np.ndarray
    interval: tuple[np.ndarray, np.ndarray]
    excluded: np.ndarray


def over_seeds(differences: np.ndarray) -> Test:
    """Test differences (..., S) of S seeds by a t test; NaN where there are fewer than 3 or all are alike."""
    differences = np.asarray(differences, float)
    flat = np.ptp(differences, axis=-1) == 0
    if differences.shape[-1] < LEAST_SEEDS:
        flat = np.ones_like(flat)
        differences = np.repeat(differences[..., :1], LEAST_SEEDS, axis=-1)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of seeds that are alike
        found = ttest_1samp(differences, 0, axis=-1)
        intervals = [found.confidence_interval(level) for level in (1 - ALPHA, 1 - 2 * ALPHA)]
    known = [np.where(flat, np.nan, x) for x in (found.pvalue, *intervals[0], *intervals[1])]
    return Test(known[0], (known[1], known[2]), np.maximum(abs(known[3]), abs(known[4])))


def partition(outcomes: np.ndarray) -> tuple[float, float, float]:
    """Return the variances (seed, start, residual) of outcomes (S, n): a crossed two-way random model.

    Those of seed and start are unbiased estimates, cut off at 0; what is left is the rollouts' own noise and
    how seeds find different starts hard.
    """
    seeds, starts = outcomes.shape
    rows, columns = outcomes.mean(1, keepdims=True), outcomes.mean(0, keepdims=True)
    rest = outcomes - rows - columns + outcomes.mean()
    residual = (rest**2).sum() / ((seeds - 1) * (starts - 1))
    seed, start = rows.var(ddof=1) - residual / starts, columns.var(ddof=1) - residual / seeds
    return max(0.0, float(seed)), max(0.0, float(start)), float(residual)


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
    config: dict

    @property
    def own(self) -> str:
        """The memory mode it was trained with."""
        return self.memory if self.fusion else "off"

    @property
    def role(self) -> str:
        """What an arm is to others: none, or which control; `treated` for a memory that is meant to help."""
        if not self.fusion:
            return "blind" if self.blind else "none"
        if self.config.get("hypotheses_alike", self.arm == ALIKE):
            return "dup"
        if self.memory == "pred":
            return "treated" if self.config.get("lambda_world", 1) else "lambda 0"
        return {"shuffle": "noise", "random": "noise"}.get(self.memory, self.memory)

    def unmet(self, mode: str) -> bool:
        """Whether a mode without memory is one that the policy never met in training."""
        dropout = self.config.get("memory_dropout") or 0
        return bool(self.fusion) and mode in {"off", "zero"} - {self.own, "off" if dropout else ""}

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
    return "-" if p is None or math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True, eq=False)
class Contrast:
    """A against B over seeds: two arms, or (`within`) an arm's own memory mode and another."""

    family: str
    a: str
    b: str
    seeds: tuple[int, ...]
    won: np.ndarray  # (2, S, n): whether A, B solved start i under seed s
    within: bool = False
    arm: str = ""
    role: str = ""  # what B is to A: a role of Run, or a memory mode
    p_holm: float = math.nan

    @property
    def n(self) -> int:
        """Pairs of each seed."""
        return self.won.shape[2]

    @property
    def paired(self) -> np.ndarray:
        """Differences (S, n): 1, 0 or -1."""
        return self.won[0].astype(int) - self.won[1]

    @property
    def differences(self) -> np.ndarray:
        return self.paired.sum(1) / self.n  # (S, n) -> (S,), alike to the bit where the counts are

    @property
    def difference(self) -> float:
        return float(self.differences.mean())

    def cells(self, seed: int) -> tuple[int, int, int, int]:
        """Count the pairs of the seed at this place: both solved, only A, only B, neither."""
        a, b = self.won[:, seed]
        return int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum()), int((~a & ~b).sum())

    @property
    def of_one(self) -> bool:
        """Whether it is of one checkpoint under two modes: what differs is how episodes went, not weights."""
        return self.within and len(self.seeds) == 1

    @property
    def test(self) -> Test:
        if not self.of_one:
            p, (low, high), excluded = over_seeds(self.differences)
            return Test(p, (np.maximum(low, -1), np.minimum(high, 1)), np.minimum(excluded, 1))
        cells = self.cells(0)
        wide = newcombe(*cells, 1 - 2 * ALPHA)
        return Test(mcnemar(*cells[1:3]), newcombe(*cells), max(map(abs, wide)))

    @property
    def told(self) -> bool:
        """Whether there is a verdict at all."""
        return not math.isnan(self.p_holm)

    @property
    def shown(self) -> bool:
        return self.told and self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        if not self.told:
            return "no verdict"
        return "not shown" if not self.shown else "higher" if self.difference > 0 else "lower"

    def __str__(self) -> str:
        seed = f" (seed {self.seeds[0]})" if self.of_one else ""
        said = f"{self.a} against {self.b}{seed}: {100 * self.difference:+.0f} points"
        if not self.told:
            few = len(self.seeds) < LEAST_SEEDS
            why = f"{len(self.seeds)} of {LEAST_SEEDS} seeds" if few else "all seeds alike"
            return f"{said}, no verdict ({why})"
        beyond = f", beyond {100 * self.test.excluded:.0f} excluded" if not self.shown else ""
        return f"{said}, Holm p {format_p(self.p_holm)}, {self.verdict}{beyond}"


class Named(NamedTuple):
    family: str
    arm_a: str
    mode_a: str
    arm_b: str
    mode_b: str
    role: str


def named_contrasts(panel: list[Run]) -> list[Named]:
    """Return the contrasts that these runs could answer: of arms, then of each memory arm's modes."""
    arms = {run.arm: run for run in panel if run.episodes}
    named = {}
    for arm, run in sorted(arms.items()):
        others = [*NAMED.get(arm, ()), *(run.config.get("compared_with") or ())]
        if run.role == "treated" and not others:
            others = ["E0", "E2", *(arm + control for control in (*CONTROLS, "z"))]
        for other in others:
            if other in arms and other != arm and frozenset((arm, other)) not in named:
                b = arms[other]
                family = "checks" if "blind" in (run.role, b.role) else "primary"
                named[frozenset((arm, other))] = Named(family, arm, run.own, other, b.own, b.role)
    rank = {arm: i for i, arm in enumerate(NAMED)}
    of_arms = sorted(named.values(), key=lambda c: (FAMILIES.index(c.family), rank.get(c.arm_a, 99), c.arm_a))
    return of_arms + [
        Named(family, arm, run.own, arm, mode, mode)
        for family, modes in MODES.items()
        for arm, run in sorted(arms.items())
        for mode in modes
        if run.fusion and mode != run.own
    ]


def outcomes(panel: list[Run], arm: str, mode: str) -> dict[int, dict[tuple, bool]]:
    """Return seed -> (suite, task, init state) -> success, without crashes."""
    found = {
        run.seed: {pair_key(e): e["success"] for e in in_mode([run], mode) if not e.get("crash")}
        for run in panel
        if run.arm == arm
    }
    return {seed: episodes for seed, episodes in found.items() if episodes}


def compare(panel: list[Run], named: Named) -> Iterator[Contrast]:
    """Yield a named contrast as runs can answer it: over seeds, or of modes with few of them one a seed."""
    a, b = (outcomes(panel, *side) for side in (named[1:3], named[3:5]))
    within, seeds = named.arm_a == named.arm_b, sorted(a.keys() & b.keys())
    names = [f"{named.arm_a} {mode}" for mode in (named.mode_a, named.mode_b)] if within else named[1:5:2]
    apart = within and len(seeds) < LEAST_SEEDS
    for group in [[seed] for seed in seeds] if apart else [seeds] if seeds else []:
        keys = sorted(set.intersection(*({*a[seed]} & {*b[seed]} for seed in group)))
        won = np.array([[[side[seed][key] for key in keys] for seed in group] for side in (a, b)], bool)
        if keys:
            yield Contrast(named.family, *names, tuple(group), won, within, named.arm_a, named.role)


def all_contrasts(panel: list[Run]) -> list[Contrast]:
    """Return every named contrast, with the p that Holm corrects within its family.

    A contrast of fewer than 3 seeds is no test; one whose seeds are alike is one that finds nothing.
    """
    found = [contrast for named in named_contrasts(panel) for contrast in compare(panel, named)]
    for family in FAMILIES:
        tests = [i for i, c in enumerate(found) if c.family == family and is_test(c)]
        ps = [float(found[i].test.p) for i in tests]
        for i, p, corrected in zip(tests, ps, holm([1.0 if math.isnan(p) else p for p in ps]), strict=True):
            found[i] = replace(found[i], p_holm=math.nan if math.isnan(p) else corrected)
    return found


def is_test(contrast: Contrast) -> bool:
    return contrast.of_one or len(contrast.seeds) >= LEAST_SEEDS
