"""The report's tables: what stands in each cell, and what its words mean.

A rate stands with its interval, in per cent; what was not recorded, or cannot be told, is `-`. Tables are
data, which page.py lays out as HTML and as markdown.

    python -m report runs/demo          # -> the tables in runs/demo/report/table.md and results.csv
    pytest tests/report/test_report.py

Source of the interval of an average over suites: Zou and Donner 2008 (Statistics in Medicine 27:1693).
"""

import json
import math
from collections import defaultdict

import numpy as np

from files import plain
from report.findings import Finding, estimate
from report.page import Record, Table, Text
from report.reading import HeldOut, RunFolder, checkpoints_of, held_out, protocol_hash, protocol_of, ranges
from report.stats import (
    LEAST_SEEDS,
    Contrast,
    Tally,
    arm_modes,
    by_arm,
    format_p,
    in_mode,
    newcombe,
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


def mode_said(run: RunFolder, mode: str, panel: list[RunFolder]) -> str:
    """Name a memory mode; beside one that the policy never met in training stands E0's success."""
    if mode == run.own:
        return f"{mode} (own)"
    if not run.unmet(mode):
        return mode
    plain = [other for other in panel if other.arm == "E0"]
    beside = f"; E0: {count(tally(in_mode(plain, 'off')))}" if plain else ""
    return f"{mode} (never met in training{beside})"


CELLS = "Cells: solved/ran (95 % Wilson interval, in %)."
SUCCESS_NOTES = """\
**success**: episodes solved of those that ran to an end, all suites and seeds pooled. **95 % (Wilson)**: \
interval of that rate, in %. **(own)**: the memory the arm was trained with; other modes are interventions \
at rollout. **(never met in training)**: a fall under such a mode is mostly that policy and memory grew \
used to each other; E0 is what a policy without memory reaches. **steps to success**: mean control steps \
of solved episodes, {hz}. **crashes**: of the simulator, counted neither way. **trained**: parameters with a \
gradient. **GFLOP a sample**: of training, forward and backward, 10^9 operations. **-**: not recorded."""


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
            name = mode_said(runs[0], mode, panel)
            interval = f"{points(low)} to {points(high)}"
            row = (arm, runs[0].what, name, f"{t.k}/{t.n}", points(t.rate), interval, seeds)
            rows.append((*row, "-" if t.steps is None else f"{t.steps:.0f}", t.crashes, *size))
    rates = {e["protocol"].get("control_hz") for run in panel for e in run.episodes}
    hz = f"{rates.pop()} a second" if len(rates) == 1 and None not in rates else "as the protocol times them"
    header = (*header, "steps to success", "crashes", "parameters", "trained", "GFLOP a sample")
    return Table(header, rows, SUCCESS_NOTES.format(hz=hz))


def modes_table(panel: list[RunFolder]) -> Table:
    """Return success by arm and memory mode, a row an arm: what a page has room for."""
    arms, rows = by_arm(panel), []
    modes = dict.fromkeys(m for runs in arms.values() for m in arm_modes(runs) if m != runs[0].own)
    for arm, runs in arms.items():
        own = runs[0].own
        others = (count(tally(in_mode(runs, mode))) if mode != own else "own" for mode in modes)
        seeds = " ".join(points(tally(in_mode([run], own)).rate) for run in runs)
        rows.append((arm, runs[0].what, count(tally(in_mode(runs, own))), seeds, *others))
    notes = (
        f"{CELLS} All seeds pooled. **own**: the memory an arm was trained with; others: at rollout alone."
    )
    return Table(("arm", "what it is", "own", "own, % per seed", *modes), rows, notes)


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
            name = mode_said(runs[0], mode, panel)
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


def taken_table(panel: list[RunFolder]) -> Table | None:
    """Return success on ambiguous tasks by the object that was taken; None where there are none."""
    rows, taken = {}, set()
    for arm, runs in by_arm(panel).items():
        for mode in arm_modes(runs):
            found = defaultdict(list)
            for e in in_mode(runs, mode):
                if e["protocol"].get("either") and not e.get("crash"):
                    found[plain(str(e.get("taken") or "nothing"))].append(e)
            rows |= {(arm, mode_said(runs[0], mode, panel)): found} if found else {}
            taken |= found.keys()
    header = ("arm", "memory at rollout", *(names := sorted(taken)))
    table = [(*row, *(count(tally(found[name])) for name in names)) for row, found in rows.items()]
    notes = f"{CELLS} Columns: the object that was in its place at the end, or was last in the hand."
    return Table(header, table, notes, "By what was taken") if rows else None


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


PRIMARY = "Primary contrasts"
CONTRASTS = {"primary": PRIMARY, "checks": "Manipulation checks"}
CONTRAST_NOTES = f"""\
**pairs a seed** share suite, task and init state; pairs with a crash, or that a seed lacks, are left out. \
**A - B**: the mean over seeds of the paired differences, with the t interval of these; **p**: t test over \
seeds, which needs {LEAST_SEEDS} of them. Where one seed is named, A and B are one checkpoint under two \
memory modes, p is exact McNemar's and the interval Newcombe's (1998, method 10). **Holm p**: corrected over \
this table. **excluded beyond**: the data exclude larger differences, either way, at 95 % (two one-sided \
tests): where this is small, a null is a result. **no verdict**: too few seeds, or all alike."""


def contrast_table(contrasts: list[Contrast], names: dict[str, str]) -> Table:
    """Return rows of contrasts; `names` has what is said of a side instead of its own name."""
    rows = []
    for c in contrasts:
        test, each = c.test, " ".join(f"{100 * d:+.0f}" for d in c.differences)
        excluded = "-" if np.isnan(test.excluded) else points(float(test.excluded))
        seeds = " ".join(map(str, c.seeds))
        row = (c.a, names.get(c.b, c.b), f"seed {seeds}" if c.of_one else seeds, c.n, each)
        rows.append((*row, estimate(c), format_p(test.p), format_p(c.p_holm), c.verdict, excluded))
    header = ("A", "B", "seeds", "pairs a seed", "A - B per seed", "A - B in points (95 %)", "p", "Holm p")
    return Table((*header, "verdict", "excluded beyond"), rows)


def seed_table(contrasts: list[Contrast]) -> Table:
    """Return each seed's pairs of two arms: descriptions, without a verdict."""
    rows = []
    for c in contrasts:
        for i, seed in enumerate(c.seeds):
            low, high = (f"{100 * x:+.0f}" for x in newcombe(*c.cells(i)))
            rows.append((c.a, c.b, seed, *c.cells(i), f"{100 * c.differences[i]:+.0f} ({low} to {high})"))
    return Table(("A", "B", "seed", "both", "only A", "only B", "neither", "A - B in points (95 %)"), rows)


def contrast_blocks(panel: list[RunFolder], contrasts: list[Contrast]) -> list:
    """Return a table a family, and each seed's own pairs folded."""
    names = {
        f"{arm} {mode}": f"{arm} {mode_said(runs[0], mode, panel)}"
        for arm, runs in by_arm(panel).items()
        for mode in arm_modes(runs)
    }
    found = []
    for family, title in CONTRASTS.items():
        if rows := [c for c in contrasts if c.family == family]:
            found.append(contrast_table(rows, names)._replace(title=title, notes=CONTRAST_NOTES))
    if arms := [c for c in contrasts if not c.within]:
        found.append(Record("The same within each seed, which is no verdict on arms", seed_table(arms)))
    return found or [Text("No two arms or modes share pairs.")]


def signal_table(signals: list[Finding]) -> Table:
    notes = (
        "What the experiment would show if it went as hoped. Success: **yes** or **no** by the verdicts of "
        "its contrasts, Holm over those of zero and random. Gates: by "
        "ctx_norm/act_norm above 1 % in the last tenth of each run's log. The rest: a t test over seeds, "
        "uncorrected. **spike**: (share of the most attended hypothesis - 1/N)/(1 - 1/N)."
    )
    return Table(("arm", "signal", "number", "answer"), [tuple(signal) for signal in signals], notes)


def partition_table(found: list[tuple]) -> Table:
    """Return standard deviations, in points, of what varies success and differences."""
    rows = [
        (what, seeds, starts, *(f"{100 * math.sqrt(x):.1f}" for x in variances))
        for what, seeds, starts, variances in found
    ]
    notes = (
        "Standard deviations, in points, of an episode's success (or of a pair's difference): between "
        "training seeds, between starts whatever the seed, and the rest: rollouts' own noise, and seeds that "
        "find other starts hard. A two-way random model; 0.0: no more than the rest explains. More seeds "
        "help against **seed** and **rest**, more starts against **start** and **rest**."
    )
    return Table(("of", "seeds", "starts", "seed", "start", "rest"), rows, notes)


LOSS_NOTES = (
    "Action loss: mean squared error of the velocity, the same frames, noise and times under each mode. "
    "oracle: the true futures, which no rollout has. A smaller loss is not success; rollouts have the last "
    "word."
)


def loss_table(panel: list[RunFolder]) -> Table:
    """Return mean held-out losses by arm and memory mode, a row an arm: what a page has room for."""
    rows: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for m in held_out(panel):
        rows[m.run.arm, m.data][m.mode] = f"{m.losses.mean():.4f}"
    modes = sorted({mode for row in rows.values() for mode in row})
    table = [(*names, *(row.get(mode, "-") for mode in modes)) for names, row in rows.items()]
    return Table(("arm", "data", *modes), table, f"{LOSS_NOTES} The mean of all seeds.")


def offline_table(measured: list[HeldOut]) -> Table:
    """Return an arm's losses by memory mode, over its seeds."""
    rows = []
    for m in measured:
        name = f"{m.mode} (never met in training)" if m.run.unmet(m.mode) else m.mode
        paired = loss_said(m, "from_off", "+.4f") if len(m.from_off) else "-"
        row = (m.run.arm, " ".join(map(str, m.seeds)), m.data, m.episodes, name)
        rows.append((*row, loss_said(m, "losses", ".4f"), paired))
    notes = (
        f"{LOSS_NOTES} Intervals, 95 %: of one seed the bootstrap's over episodes, from {LEAST_SEEDS} on the "
        "t interval over seeds."
    )
    header = ("arm", "seeds", "data", "episodes", "memory", "action loss (95 %)", "minus that of off (95 %)")
    return Table(header, rows, notes, "Held-out action loss by memory mode")


def loss_said(m: HeldOut, name: str, form: str) -> str:
    """Return the mean of seeds' losses with its interval, where there is one."""
    low, high = m.interval(name)
    interval = "" if math.isnan(low) else f" ({low:{form}} to {high:{form}})"
    return f"{getattr(m, name).mean():{form}}{interval}"


# --------------------------------------------------------------------------------------------------
# what a repetition needs


def glance_table(panels: dict[str, list[RunFolder]], looks: dict[str, int]) -> Table:
    """Return how much stands behind each panel."""
    rows = []
    for title, panel in panels.items():
        arms, episodes = by_arm(panel), [e for run in panel for e in run.episodes]
        t, seeds = tally(episodes), max(len(runs) for runs in arms.values())
        tasks = {(e["suite"], e["task_id"]) for e in episodes}
        row = (title, len(arms), seeds, " ".join(suites_of(panel)), len(tasks), f"{t.n:,}", t.crashes)
        rows.append((*row, looks[title]))
    header = ("panel", "arms", "seeds an arm", "suites", "tasks", "episodes", "crashes", "looks")
    notes = (
        "Panels are never compared with one another. **seeds an arm**: at most. **looks**: reports on other "
        "episodes than before, and checkpoints on the way that were rolled out; each may be stopped at."
    )
    return Table(header, rows, notes)


MEASURED = {"params_total", "params_trainable", "flops_per_sample", "hypotheses_alike"}
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


COLUMNS = (
    *(
        "kind",
        "samples",
        "arm",
        "memory",
        "own",
        "suite",
        "seed",
        "checkpoint",
        "successes",
        "episodes",
        "crashes",
    ),
    *(
        "rate",
        "low",
        "high",
        "mean_steps_to_success",
        "parameters",
        "trainable",
        "flops_per_sample",
        "protocol",
    ),
    *("family", "a", "b", "difference", "p", "p_holm", "excluded", "what", "number", "answer"),
)


def result_rows(
    panel: list[RunFolder], contrasts: list[Contrast], findings: dict[str, list[Finding]], spread: list[tuple]
) -> list[dict]:
    """Return a panel's rows of results.csv: success (`all` pools suites, or seeds), contrasts, the rest."""
    rows = []
    for arm, runs in by_arm(panel).items():
        for mode in arm_modes(runs):
            for seed, some in [*((run.seed, [run]) for run in runs), ("all", runs)]:
                episodes = in_mode(some, mode)
                for suite in [*sorted({e["suite"] for e in episodes}), "all"]:
                    here = episodes if suite == "all" else of_suite(episodes, suite)
                    if here:
                        row = {"arm": arm, "memory": mode, "own": int(mode == runs[0].own), "suite": suite}
                        rows.append(row | {"seed": seed} | result(some, here))
    rows += map(contrast_result, contrasts)
    for kind, found in findings.items():
        rows += [{"kind": kind} | finding._asdict() for finding in found]
    for what, _, starts, variances in spread:
        parts = zip(("seed", "start", "rest"), variances, strict=True)
        row = {"kind": "variance", "arm": what, "episodes": starts}
        rows += [row | {"what": part, "number": decimals(x)} for part, x in parts]
    return [{"samples": panel[0].budget} | row for row in rows]


def decimals(x: float | None) -> str | None:
    return None if x is None or math.isnan(x) else f"{x:.6f}"


def contrast_result(c: Contrast) -> dict:
    low, high = c.test.interval
    row = {"kind": "contrast", "arm": c.arm, "family": c.family, "a": c.a, "b": c.b, "episodes": c.n}
    row |= {"seed": " ".join(map(str, c.seeds)), "answer": c.verdict, "difference": decimals(c.difference)}
    numbers = {"low": low, "high": high, "p": c.test.p, "p_holm": c.p_holm, "excluded": c.test.excluded}
    return row | {key: decimals(x) for key, x in numbers.items()}


def result(runs: list[RunFolder], episodes: list[dict]) -> dict:
    """Return what a row of success has behind what names it; None for what is unknown."""
    t = tally(episodes)
    low, high = wilson(t.k, t.n)
    return {
        "kind": "success",
        "checkpoint": " ".join(sorted({e["checkpoint"] for e in episodes})),
        **{"successes": t.k, "episodes": t.n, "crashes": t.crashes},
        **{"rate": decimals(t.rate), "low": decimals(low), "high": decimals(high)},
        "mean_steps_to_success": None if t.steps is None else f"{t.steps:.2f}",
        **dict(zip(("parameters", "trainable"), runs[0].params, strict=True)),
        "flops_per_sample": runs[0].config.get("flops_per_sample"),
        "protocol": " ".join(sorted({protocol_hash(e) for e in episodes})),
    }
