"""Turns run folders into success tables, paired comparisons and figures, an interval beside every number.

Two arms are compared on the same (suite, task, init state) pairs, within one training seed. Another sample
budget gets a table of its own; another protocol or other data are refused. A simulator crash is neither a
success nor a failure: it is counted beside them.

    python report.py runs/demo                               # -> runs/demo/report/report.md and figures
    python report.py runs/a runs/b/E2_s0 --out /tmp/report   # any run folders, or folders that hold some

Reads config.json, metrics.jsonl and episodes.jsonl of each run folder; needs neither torch nor a simulator.
The statistics and their sources are in stats.py, the figures in figures.py.
"""

import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from figures import COLOURS, STYLES, curves_figure, gates_figure, success_figure
from stats import (
    ALPHA,
    BOOTSTRAP_DRAWS,
    POWER,
    Contrast,
    Run,
    all_contrasts,
    arm_modes,
    by_arm,
    format_p,
    in_mode,
    pair_key,
    smallest_detectable,
    tally,
    wilson,
)


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
# run folders


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
# tables and text


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
