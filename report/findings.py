"""What a panel's runs say: sentences about memory arms, expected signals, where the spread comes from.

A sentence is about success and stands on contrasts that were named beforehand (stats.py): it is shown only
where each of them is. A signal is what the experiment would show if it went as hoped: a number, an answer.

    python -m report runs/demo          # -> runs/demo/report/: under "What these tables can say" and after it
    pytest tests/report/test_findings.py
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import Refused, read_json, replace_text
from report.figures import logged_keys, series
from report.reading import RunFolder
from report.stats import (
    ALIKE,
    ALPHA,
    BANKS,
    LEAST_SEEDS,
    NAMED,
    Contrast,
    Named,
    by_arm,
    compare,
    outcomes,
    over_seeds,
    partition,
)

OPEN = 0.01  # ctx_norm / act_norm from which a gate counts as open
YES, NO, UNKNOWN = "yes", "no", "cannot be told"
SAYS = {
    "none": "no memory",
    "noise": "a memory trained as noise",
    "lambda 0": "a prophet that predicts nothing (lambda 0)",
    "current": "the present latent",
    "history": "past latents",
    "dup": "one hypothesis repeated, trained so",
    "treated": "a single future",
    "shuffle": "its own mode shuffled at rollout",
}
SITE_SENTENCES = {
    "memory helps": ("none", "noise"),
    "prediction helps": ("none", "noise", "lambda 0", "current", "history"),
    "the policy depends on it": ("shuffle",),
}
BANK_SENTENCES = {"several futures help": ("dup", "treated"), "the policy depends on it": ("shuffle",)}


class Finding(NamedTuple):
    """A sentence or a signal of an arm, what was found, and the answer."""

    arm: str
    what: str
    number: str
    answer: str


def answered(contrasts: list[Contrast], sign: int = 1) -> str:
    """Say whether all contrasts are shown to point one way, or one to point the other."""
    if any(c.shown and sign * c.difference < 0 for c in contrasts):
        return NO
    return YES if contrasts and all(c.shown for c in contrasts) else UNKNOWN


def sentences(panel: list[RunFolder], contrasts: list[Contrast]) -> list[Finding]:
    """Return the sentences about each arm whose memory is meant to help."""
    found = []
    for arm, runs in by_arm(panel).items():
        if runs[0].role != "treated":
            continue
        of_arm = [c for c in contrasts if c.arm == arm and c.family != "signals"]
        for what, roles in (BANK_SENTENCES if is_bank(runs[0]) else SITE_SENTENCES).items():
            needed = [c for c in of_arm if c.role in roles]
            if not needed and arm not in NAMED:
                continue  # an arm of its own kind
            absent = [SAYS[role] for role in roles if role not in {c.role for c in needed}]
            above = f"{what}, above {', '.join(SAYS[role] for role in roles)}"
            details = [str(c) for c in needed] + [f"not compared with {', '.join(absent)}"] * bool(absent)
            found.append(Finding(arm, above, "; ".join(details), sentence_answer(needed, absent)))
    return found


def sentence_answer(needed: list[Contrast], absent: list[str]) -> str:
    answer = answered(needed)
    if answer == NO:
        return "not so"
    if absent or not all(c.told for c in needed):
        return UNKNOWN
    return "shown" if answer == YES else "not shown"


def is_bank(run: RunFolder) -> bool:
    return (run.config.get("num_hypotheses") or 1) > 1


# --------------------------------------------------------------------------------------------------
# signals


def tested(values: list[float], sign: int = 1) -> str:
    """Answer by a t test over seeds whether values are above 0, or with sign -1 below."""
    if len(values) < LEAST_SEEDS or over_seeds(np.array(values)).p >= ALPHA or np.ptp(values) == 0:
        return UNKNOWN
    return YES if sign * np.mean(values) > 0 else NO


def edge(run: RunFolder, key: str, last: bool = True) -> float:
    """Return the mean of the last, or first, tenth of what was logged under a name; NaN for nothing."""
    values = series(run, key)[1]
    count = max(1, len(values) // 10)
    return float(np.mean(values[-count:] if last else values[:count])) if len(values) else math.nan


def ratio(run: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    """Return (samples, ctx_norm / act_norm) of a run's first site that logs them."""
    for site in run.fusion:
        (x, added), (at, beside) = (series(run, f"{site}/{name}") for name in ("ctx_norm", "act_norm"))
        if len(x) and np.array_equal(x, at):
            return x, added / np.maximum(beside, 1e-12)
    return np.empty(0), np.empty(0)


def opening(run: RunFolder) -> float:
    """Return the samples at which the gate counts as open; infinite where it never does, NaN for no log."""
    x, share = ratio(run)
    return math.nan if not len(x) else float(min(x[share > OPEN], default=math.inf))


def spread(values: list[float], form: str) -> str:
    """Return the mean of seeds, and their range where there are several."""
    values = [v for v in values if not math.isnan(v)]
    if not values:
        return "not logged"
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def gate_signal(arm: str, runs: list[RunFolder]) -> Finding:
    keys = [key for key in logged_keys(runs) if key.startswith("world_gate")]
    shares = [float(np.mean(y[-max(1, len(y) // 10) :])) for run in runs if len(y := ratio(run)[1])]
    gates = [f"{key} {spread([edge(run, key) for run in runs], '+.3f')}" for key in keys]
    beside = f"ctx_norm/act_norm {spread(shares, '.2%')}"
    opened = [share > OPEN for share in shares]
    answer = YES if opened and all(opened) else NO if opened and not any(opened) else UNKNOWN
    return Finding(arm, "gate away from 0", ", ".join([*gates, beside]), answer)


def opening_signal(arms: dict[str, list[RunFolder]]) -> Finding:
    """Compare where the gate of F2 opens with where F1's does, which is E2's; never counts as at the end."""
    pairs = []
    late = {run.seed: run for run in arms["E2"]}
    for run in arms["F2"]:
        if run.seed in late and not any(map(math.isnan, both := (opening(run), opening(late[run.seed])))):
            pairs.append(both)
    last = max(run.budget or 0 for run in (*arms["E2"], *arms["F2"]))
    said = [[f"{x:,.0f}" if math.isfinite(x) else "never" for x in side] for side in zip(*pairs, strict=True)]
    number = "samples: " + "; E2 (F1): ".join(map(", ".join, said)) if pairs else "not logged"
    answer = tested([min(a, last) - min(b, last) for a, b in pairs], -1)
    return Finding("F2", "gate opens earlier than F1's", number, answer)


def spike_signal(arm: str, runs: list[RunFolder], flat: dict[int, RunFolder]) -> Iterator[Finding]:
    """Compare attention over hypotheses with B4dup's, which are alike: a maximum is never below 0."""
    keys = [key for key in logged_keys(runs) if key.endswith("/spike")]
    for key in keys[:1]:
        ends, starts = ([edge(run, key, last) for run in runs] for last in (True, False))
        above = [end - edge(flat[r.seed], key) for r, end in zip(runs, ends, strict=True) if r.seed in flat]
        above = [x for x in above if not math.isnan(x)]
        number = f"spike {spread(ends, '.3f')}, minus {ALIKE}'s {spread(above, '+.3f')}"
        yield Finding(arm, "attention over hypotheses spikier than chance", number, tested(above))
        grown = [end - start for end, start in zip(ends, starts, strict=True)]
        yield Finding(arm, "and growing", f"last tenth minus first {spread(grown, '+.3f')}", tested(grown))


def ambiguous_signal(arm: str, runs: list[RunFolder], single: list[RunFolder]) -> Finding:
    """Compare a bank's gain over E2 on tasks with two right answers with its gain on the others."""
    gains = []
    for wanted in (True, False):
        parts = [only(run, wanted) for run in (*runs, *single)]
        named = Named("signals", arm, runs[0].own, "E2", single[0].own, "treated")
        gains.append(
            {s: d for c in compare(parts, named) for s, d in zip(c.seeds, c.differences, strict=True)}
        )
    said = [spread([100 * x for x in gain.values()], "+.0f") if gain else "not rolled out" for gain in gains]
    more = [gains[0][seed] - gains[1][seed] for seed in gains[0].keys() & gains[1].keys()]
    return Finding(
        arm, "above E2 most on the ambiguous task", f"{said[0]} there, {said[1]} elsewhere", tested(more)
    )


def only(run: RunFolder, ambiguous: bool) -> RunFolder:
    """Return a run with its episodes of ambiguous tasks, or with the others."""
    kept = tuple(e for e in run.episodes if bool(e["protocol"].get("either")) == ambiguous)
    return replace(run, episodes=kept)


def signals(panel: list[RunFolder], contrasts: list[Contrast]) -> list[Finding]:
    """Return what the experiment expects of these arms, each with its number and answer."""
    arms, found = by_arm(panel), []
    treated = {arm: runs for arm, runs in arms.items() if runs[0].role == "treated"}
    found += [gate_signal(arm, runs) for arm, runs in treated.items()]
    if {"E2", "F2"} <= arms.keys():
        found.append(opening_signal(arms))
    for pair in [("E2", "E0"), *((bank, "E2") for bank in BANKS)]:
        rows = [c for c in contrasts if (c.a, c.b) == pair]
        found += [Finding(c.a, f"above {c.b}", f"{estimate(c)} points", answered([c])) for c in rows]
    for arm in treated:
        for mode in ("zero", "random"):
            if rows := [c for c in contrasts if c.arm == arm and c.role == mode and c.within]:
                each = [100 * difference for c in rows for difference in c.differences]
                number = f"own minus {mode}: {spread(each, '+.0f')} points"
                if apart := [c.shown for c in rows if c.of_one]:
                    number += f", shown in {sum(apart)} of {len(apart)} checkpoints"
                found.append(Finding(arm, f"{mode} at rollout lowers success", number, answered(rows)))
    flat = {run.seed: run for run in arms.get(ALIKE, [])}
    for arm, runs in treated.items():
        if is_bank(runs[0]):
            found += spike_signal(arm, runs, flat)
            if "E2" in arms:
                found.append(ambiguous_signal(arm, runs, arms["E2"]))
    return found


def estimate(contrast: Contrast) -> str:
    low, high = contrast.test.interval
    interval = "" if np.isnan(low) else f" ({100 * low:+.0f} to {100 * high:+.0f})"
    return f"{100 * contrast.difference:+.0f}{interval}"


# --------------------------------------------------------------------------------------------------
# spread, and looks


def partitions(panel: list[RunFolder], contrasts: list[Contrast]) -> list[tuple]:
    """Return (what, seeds, starts, variances) of each arm's success, then of each contrast of arms."""
    found = []
    for arm, runs in by_arm(panel).items():
        won = list(outcomes(runs, arm, runs[0].own).values())
        if not won:
            continue
        starts = sorted(set.intersection(*map(set, won)))
        found.append((arm, np.array([[seed[start] for start in starts] for seed in won], float)))
    found += [(f"{c.a} - {c.b}", c.paired.astype(float)) for c in contrasts if not c.within]
    return [(what, *x.shape, partition(x)) for what, x in found if min(x.shape) > 1]


def looks(panels: dict[str, list[RunFolder]], path: Path) -> dict[str, int]:
    """Return how often each panel was looked at, this time included, and keep count in a file.

    A look is a report on episodes that no earlier report had in this number, or a checkpoint on the way.
    """
    try:
        kept = read_json(path, {str: [str]})
    except Refused:
        kept = {}
    for title, panel in panels.items():
        rows = sorted((run.name, run.checkpoint, len(run.episodes)) for run in panel)
        state = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
        kept[title] = [*(seen for seen in kept.get(title, []) if seen != state), state]
    replace_text(path, json.dumps(kept))
    earlier = {title: max(len(run.earlier) for run in panel) for title, panel in panels.items()}
    return {title: len(kept[title]) + earlier[title] for title in panels}
