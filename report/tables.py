"""The report's tables: what stands in each cell, and what its words mean.

A rate stands with its interval, in per cent; what was not recorded, or cannot be told, is `-`. Tables are
data, which page.py lays out as HTML and as markdown.

    python -m report runs/demo          # -> the tables in runs/demo/report/table.md and results.csv
    pytest tests/report/test_report.py

Source of the interval of an average over suites: Zou and Donner 2008 (Statistics in Medicine 27:1693).
"""

import functools
import json
import math
from collections import defaultdict
from pathlib import Path

from report import stats
from report.page import Record, Table, Text
from report.reading import RunFolder, checkpoints_of, protocol_hash, protocol_of
from report.stats import (
    ALPHA,
    BOOTSTRAP_DRAWS,
    POWER,
    Contrast,
    Tally,
    arm_modes,
    by_arm,
    format_p,
    in_mode,
    tally,
    wilson,
)

# --------------------------------------------------------------------------------------------------
# success


def points(x: float | None) -> str:
    return "-" if x is None or math.isnan(x) else f"{100 * x:.0f}"


def count(t: Tally) -> str:
    """Return successes of episodes with Wilson's interval in per cent, `-` for none."""
    low, high = wilson(t.k, t.n)
    return f"{t.k}/{t.n} ({points(low)} to {points(high)})" if t.n else "-"


def suites_of(runs: list[RunFolder]) -> list[str]:
    return sorted({e["suite"] for run in runs for e in run.episodes})


def of_suite(episodes: list[dict], suite: str) -> list[dict]:
    return [e for e in episodes if e["suite"] == suite]


CELLS = "Cells: solved/ran (95 % Wilson interval, in %)."
SUCCESS_NOTES = """\
**success**: episodes solved of those that ran to an end, all suites and seeds pooled. **95 % (Wilson)**: \
interval of that rate, in %. **(own)**: the memory the arm was trained with; other modes are interventions \
at rollout. **steps to success**: mean control steps of solved episodes, {hz}. **crashes**: of the \
simulator, counted neither way. **trained**: parameters with a gradient. **GFLOP a sample**: of training, \
forward and backward, 10^9 operations. **-**: not recorded."""


def success_table(panel: list[RunFolder]) -> Table:
    header = ("arm", "what it is", "memory at rollout", "success", "%", "95 % (Wilson)", "% per seed")
    rows = []
    for arm, runs in by_arm(panel).items():
        size = ["-" if p is None else f"{p:,}" for p in runs[0].params]
        size.append("-" if runs[0].gflops is None else f"{runs[0].gflops:,.3g}")
        for mode in arm_modes(runs):
            t = tally(in_mode(runs, mode))
            low, high = wilson(t.k, t.n)
            seeds = " ".join(points(tally(in_mode([run], mode)).rate) for run in runs)
            name = f"{mode} (own)" if mode == runs[0].own else mode
            interval = f"{points(low)} to {points(high)}"
            row = (arm, runs[0].what, name, f"{t.k}/{t.n}", points(t.rate), interval, seeds)
            rows.append((*row, "-" if t.steps is None else f"{t.steps:.0f}", t.crashes, *size))
    rates = {e["protocol"].get("control_hz") for run in panel for e in run.episodes}
    hz = f"{rates.pop()} a second" if len(rates) == 1 and None not in rates else "as the protocol times them"
    header = (*header, "steps to success", "crashes", "parameters", "trained", "GFLOP a sample")
    return Table(header, rows, SUCCESS_NOTES.format(hz=hz))


def average(parts: list[Tally]) -> str:
    """Return the mean of several rates, each weighing the same, with a 95 % interval, in per cent.

    Each Wilson interval's distance from its rate is added in squares (Zou and Donner 2008: the MOVER).
    """
    if not all(t.n for t in parts):
        return "-"
    limits = [wilson(t.k, t.n) for t in parts]
    mean = sum(t.rate for t in parts) / len(parts)
    below = math.hypot(*(t.rate - low for t, (low, _) in zip(parts, limits, strict=True))) / len(parts)
    above = math.hypot(*(high - t.rate for t, (_, high) in zip(parts, limits, strict=True))) / len(parts)
    return f"{points(mean)} ({points(mean - below)} to {points(mean + above)})"


def suite_table(panel: list[RunFolder]) -> Table:
    """Return success by suite, and the suites' average, for every arm and memory mode."""
    suites, rows = suites_of(panel), []
    for arm, runs in by_arm(panel).items():
        for mode in arm_modes(runs):
            parts = [tally(of_suite(in_mode(runs, mode), suite)) for suite in suites]
            name = f"{mode} (own)" if mode == runs[0].own else mode
            rows.append((arm, name, *map(count, parts), average(parts)))
    notes = (
        f"{CELLS} **average over suites**: the mean of the suites' rates, in %, each suite weighing the "
        "same, however many episodes it has; **-**: a suite is missing."
    )
    return Table(("arm", "memory at rollout", *suites, "average over suites"), rows, notes, "By suite")


def task_table(panel: list[RunFolder], suite: str) -> Table:
    """Return success per task of a suite, each arm under its own mode, as a heat table."""
    episodes = [e for run in panel for e in of_suite(run.episodes, suite)]
    names = {e["task_id"]: str(e.get("task", "")) for e in episodes}
    tasks, rows, heat = sorted(names), [], {}
    for i, (arm, runs) in enumerate(by_arm(panel).items()):
        own = of_suite(in_mode(runs, runs[0].own), suite)
        parts = [tally(own), *(tally([e for e in own if e["task_id"] == task]) for task in tasks)]
        rows.append((arm, *map(count, parts)))
        heat |= {(i, j): t.rate for j, t in enumerate(parts, start=1) if t.n}
    listed = "; ".join(f"{task} {names[task]}" for task in tasks)
    notes = f"{CELLS} Each arm under its own memory mode. Tasks of {suite}: {listed}."
    header = ("arm", "all tasks", *(f"task {task}" for task in tasks))
    return Table(header, rows, notes, f"{suite}, by task", heat)


def growth_table(panel: list[RunFolder]) -> Table | None:
    """Return success at every evaluated checkpoint; None where no run has several."""
    found = {arm: checkpoints_of(runs) for arm, runs in by_arm(panel).items()}
    found = {arm: points for arm, points in found.items() if len(points) > 1}
    samples = sorted({s for at in found.values() for s in at})
    rows = [(arm, *(count(tally(at.get(s, []))) for s in samples)) for arm, at in found.items()]
    notes = f"{CELLS} Columns: training samples. Own memory mode, all seeds and suites pooled."
    title = "Over training samples"
    return Table(("arm", *(f"{s:,}" for s in samples)), rows, notes, title) if rows else None


# --------------------------------------------------------------------------------------------------
# comparisons and held-out losses


smallest_detectable = functools.cache(stats.smallest_detectable)  # contrasts often have as many pairs


def contrast_table(contrasts: list[Contrast]) -> Table:
    header = ("A", "B", "seed", "pairs", "both", "only A", "only B", "neither", "A - B in points (95 %)", "p")
    rows = []
    for c in contrasts:
        low, high = (f"{100 * x:+.0f}" for x in c.interval)
        difference = f"{100 * c.difference:+.0f} ({low} to {high})"
        best = smallest_detectable(c.n)
        here = smallest_detectable(c.n, (c.counts[1] + c.counts[2]) / c.n)
        row = (c.a, c.b, c.seed, c.n, *c.counts, difference, format_p(c.p), format_p(c.p_holm))
        rows.append((*row, points(best), points(here)))
    return Table((*header, "Holm p", "detects at best", "detects here"), rows)


CONTRAST_NOTES = f"""\
**pairs** share suite, task, init state and training seed; pairs with a crash are left out. **both**, \
**only A**, **only B**, **neither**: which side solved them. **p**: exact McNemar, two-sided. **A - B**: \
Newcombe 1998, method 10, for paired proportions; in rows `all` a bootstrap of {BOOTSTRAP_DRAWS:,} draws \
that resamples seeds and, the same ones for all seeds, init states within task; they pool the pairs that \
every seed has. **Holm p**: corrected over the contrasts of this table. \
**detects**: the smallest true difference, in points, that exact McNemar at alpha {ALPHA} finds with \
{POWER:.0%} power in this many pairs, the discordant ones being Binomial(pairs, discordance); **at best**: \
all disagreements point one way; **here**: as many pairs disagree as in this row (-: none can be found)."""


def contrast_blocks(contrasts: list[Contrast]) -> list:
    """Return the rows that stand for contrasts, with notes, and each seed's own rows folded."""
    if not contrasts:
        return [Text("No two arms or modes share pairs.")]
    whole = contrast_table([c for c in contrasts if c.p_holm is not None])
    single = [c for c in contrasts if c.p_holm is None]
    folded = [Record("The same within each seed", contrast_table(single))] if single else []
    return [whole._replace(notes=CONTRAST_NOTES), *folded]


def offline_lines(panel: list[RunFolder]) -> list[tuple[RunFolder, dict]]:
    """Return each run's last measurement of its reported checkpoint on each data set."""
    found = {}
    for run in panel:
        for line in run.offline:
            if run.checkpoint in ("", line["checkpoint"]):
                found[run.name, line["fingerprint"]] = (run, line)
    return list(found.values())


def offline_table(measured: list[tuple[RunFolder, dict]]) -> Table:
    rows = []
    for run, line in measured:
        for mode, found in sorted(line["modes"].items(), key=lambda item: item[1]["loss"]):
            low, high = found["interval"]
            cells = [f"{found['loss']:.4f} ({low:.4f} to {high:.4f})", "-"]
            if mode != "off" and "from_off" in found:
                low, high = found["from_off_interval"]
                cells[1] = f"{found['from_off']:+.4f} ({low:+.4f} to {high:+.4f})"
            rows.append((run.arm, run.seed, Path(line["data"]).name, len(line["episodes"]), mode, *cells))
    notes = (
        "Action loss: mean squared error of the velocity, the same frames, noise and times under each mode. "
        "Intervals: 95 % of the bootstrap over episodes. oracle: the true futures, which no rollout has. "
        "A smaller loss is not success; rollouts have the last word."
    )
    header = ("arm", "seed", "data", "episodes", "memory", "action loss (95 %)", "minus that of off (95 %)")
    return Table(header, rows, notes, "Held-out action loss by memory mode")


# --------------------------------------------------------------------------------------------------
# what a repetition needs


def glance_table(panels: dict[str, list[RunFolder]]) -> Table:
    """Return how much stands behind each panel."""
    rows = []
    for title, panel in panels.items():
        arms, episodes = by_arm(panel), [e for run in panel for e in run.episodes]
        t, seeds = tally(episodes), max(len(runs) for runs in arms.values())
        tasks = {(e["suite"], e["task_id"]) for e in episodes}
        row = (title, len(arms), seeds, " ".join(suites_of(panel)), len(tasks), f"{t.n:,}", t.crashes)
        rows.append(row)
    header = ("panel", "arms", "seeds an arm", "suites", "tasks", "episodes", "crashes")
    return Table(header, rows, "Panels are never compared with one another. **seeds an arm**: at most.")


MEASURED = {"params_total", "params_trainable", "flops_per_sample"}
TOLD = {"arm", "seed", "out", "total_samples", "data_provenance", "held_out"}  # elsewhere, or of one run


def differences_table(runs: list[RunFolder]) -> Table | None:
    """Return the settings in which arms differ; None where they differ in none."""
    first = {}
    for run in runs:
        if not run.elsewhere:
            first.setdefault(run.arm, run.config)
    keys = sorted({key for config in first.values() for key in config} - MEASURED - TOLD)
    keys = [key for key in keys if len({said(config.get(key)) for config in first.values()}) > 1]
    rows = [(arm, *(said(config.get(key)) for key in keys)) for arm, config in sorted(first.items())]
    notes = "From config.json of each arm's first run; -: not set."
    return Table(("arm", *keys), rows, notes, "What the arms differ in") if keys else None


def said(value: object) -> str:
    """Return a setting as one would type it, cut where it is long."""
    if value is None:
        return "-"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 48 else text[:47] + "…"


def runs_table(runs: list[RunFolder]) -> Table:
    header, rows = ("run folder", "arm", "seed", "samples", "checkpoint", "memory", "episodes"), []
    for run in sorted(runs, key=lambda r: (r.elsewhere, r.budget or 0, r.arm, r.seed)):
        samples = "-" if run.elsewhere else f"{run.budget:,}"
        hashes = sorted({protocol_hash(e) for e in run.episodes})
        row = (run.name, run.arm, run.seed, samples, run.checkpoint or "not evaluated")
        rows.append(
            (*row, " ".join(arm_modes([run])), len(run.episodes), " ".join(hashes), "; ".join(run.notes))
        )
    notes = "protocols: the first digits of the SHA-256 of each protocol record below, as in results.csv."
    return Table((*header, "protocols", "notes"), rows, notes)


def reproduction(runs: list[RunFolder]) -> list:
    """Return what a repetition needs: runs, seeds, init states, protocol records."""
    found, differ = [runs_table(runs)], differences_table(runs)
    found += [differ] if differ else []
    for trained in [run for run in runs if not run.elsewhere][:1]:
        found.append(Text(f"Data fingerprint: {trained.fingerprint}"))
    for where, group in (("", False), (" (checkpoints from elsewhere)", True)):
        episodes = [e for run in runs if run.elsewhere == group for e in run.episodes]
        for suite in sorted({e["suite"] for e in episodes}):
            found += protocol_blocks(of_suite(episodes, suite), suite + where)
    return found


def protocol_blocks(episodes: list[dict], title: str) -> list:
    """Return a suite's init states, its protocol record, and the colours of its first pictures."""
    states = defaultdict(set)
    for e in episodes:
        states[e["task_id"]].add(e["init_state"])
    used = "; ".join(f"task {task}: {ranges(states[task])}" for task in sorted(states))
    record = json.dumps(protocol_of(episodes[0]), indent=2, sort_keys=True)
    found = [
        Text(f"{title}, init states: {used}."),
        Record(f"Protocol {protocol_hash(episodes[0])} of {title}", record),
    ]
    if colours := episodes[0].get("render_fingerprint"):
        first = f"task {episodes[0]['task_id']}, init state {episodes[0]['init_state']}"
        found.append(Text(f"Mean colours of the first pictures, {first}: {json.dumps(colours)}"))
    return found


def ranges(numbers: set[int]) -> str:
    """Return sorted numbers with runs shortened: {0, 1, 2, 5} -> "0-2, 5"."""
    parts: list[list[int]] = []
    for x in sorted(numbers):
        if parts and x == parts[-1][-1] + 1:
            parts[-1].append(x)
        else:
            parts.append([x])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


COLUMNS = (
    *("arm", "memory", "own", "suite", "samples", "seed", "checkpoint", "successes", "episodes", "crashes"),
    *("rate", "wilson_low", "wilson_high", "mean_steps_to_success", "parameters", "trainable"),
    *("flops_per_sample", "protocol"),
)


def result_rows(panel: list[RunFolder]) -> list[tuple]:
    """Return a panel's rows of results.csv, as COLUMNS names them; `all` pools suites, or seeds."""
    rows = []
    for arm, runs in by_arm(panel).items():
        for mode in arm_modes(runs):
            for seed, some in [*((run.seed, [run]) for run in runs), ("all", runs)]:
                episodes = in_mode(some, mode)
                for suite in [*sorted({e["suite"] for e in episodes}), "all"]:
                    here = episodes if suite == "all" else of_suite(episodes, suite)
                    if here:
                        rows.append((arm, mode, int(mode == runs[0].own), suite, runs[0].budget, seed))
                        rows[-1] += result(some, here)
    return rows


def result(runs: list[RunFolder], episodes: list[dict]) -> tuple:
    """Return what results.csv has behind the six columns that name a row; None for what is unknown."""
    t = tally(episodes)
    low, high = wilson(t.k, t.n)
    checkpoints = " ".join(sorted({e["checkpoint"] for e in episodes}))
    protocols = " ".join(sorted({protocol_hash(e) for e in episodes}))
    rate = (f"{t.rate:.6f}" if t.n else None, f"{low:.6f}", f"{high:.6f}")
    steps = None if t.steps is None else f"{t.steps:.2f}"
    size = (*runs[0].params, runs[0].config.get("flops_per_sample"))
    return (checkpoints, t.k, t.n, t.crashes, *rate, steps, *size, protocols)
