"""Turns run folders into success tables, paired comparisons and figures, an interval beside every number.

Two arms are compared on the same (suite, task, init state) pairs, within one training seed. Another sample
budget gets a panel of its own, and so do checkpoints from elsewhere; another protocol or other data are
refused. A simulator crash is neither a success nor a failure: it is counted beside them.

    python -m report runs/demo                            # -> runs/demo/report/: report.html, table.md, ...
    python -m report runs/a runs/b/E2_s0 -o report   # any run folders, or folders that hold some
    python -m report power --help                         # how many episodes would show a difference
    python -m report watch RUN                            # a run while it trains

Reads JSON lines, pictures and videos; needs neither torch nor a simulator. reading.py reads run folders and
refuses, tables.py and figures.py say and draw, page.py lays out; stats.py has the statistics and sources.
"""

import csv
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated

import tyro

from report import figures
from report.page import Bullets, Media, Plot, Section, Shot, Table, Text, markdown, markdown_table, page
from report.reading import (
    Refusal,
    Rollout,
    RunFolder,
    check_comparable,
    filmed,
    find_runs,
    imagined,
    load_run,
)
from report.stats import Contrast, all_contrasts, by_arm, tally
from report.tables import (
    COLUMNS,
    contrast_blocks,
    glance_table,
    growth_table,
    offline_lines,
    offline_table,
    reproduction,
    result_rows,
    success_table,
    suite_table,
    suites_of,
    task_table,
)

SUBCOMMANDS = ("power", "watch")  # each a module beside this one, with main(argv)
IMAGINED, FILMED = 2, 4  # pictures and videos shown of an arm


@dataclass(frozen=True)
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders that hold run folders."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for the page, tables and figures; default: `report` inside the first folder of `runs`."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(
                "no run folder is named; name one, or a folder that holds some, such as runs/demo"
            )


# --------------------------------------------------------------------------------------------------
# what the tables can say


ELSEWHERE_SAYS = (
    "These checkpoints were trained elsewhere, on data, seeds and budgets that are not known here: the "
    "intervals cover the choice of episodes only, and nothing compares them with arms trained here."
)


def seeds_say(arms: dict[str, list[RunFolder]]) -> str:
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


def memory_helps_say(arms: dict[str, list[RunFolder]], found: dict[tuple[str, str], Contrast]) -> str:
    needed = [found.get(("E2", other)) for other in ("E1", "E0")]
    if None in needed:
        verdict = "cannot be told, a comparison is missing"
    elif all(c.shown and c.difference > 0 for c in needed):
        verdict = "shown here"
    else:
        verdict = "not shown here"
    details = "".join(f"; {c.verdict}" for c in needed if c)
    return (
        "That memory helps takes E2 above both E1 (the same fusion, fed zeros) and E0 (no memory): "
        f"{verdict}{details}."
    )


def what_it_says(panel: list[RunFolder], contrasts: list[Contrast]) -> list[str]:
    """Return what follows from these runs and what does not."""
    arms = by_arm(panel)
    found = {(c.a, c.b): c for c in contrasts if c.p_holm is not None}
    says = [ELSEWHERE_SAYS if panel[0].elsewhere else seeds_say(arms)]
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
    return says


# --------------------------------------------------------------------------------------------------
# pictures and videos


def gallery(panel: list[RunFolder], find: Callable, most: int, where: str) -> list:
    """Return what pictures or videos an arm's runs have, a few an arm, and how many are left out."""
    blocks = []
    for arm, runs in by_arm(panel).items():
        found = [(run, rollout) for run in runs for rollout in find(run)]
        found.sort(key=lambda pair: pair[1].mode != pair[0].own)  # stable: the own memory mode first
        if found:
            shots = [shot_of(run, rollout) for run, rollout in mixed(found)[:most]]
            more = len(found) - len(shots)
            rest = f", {more} more in {where} of its run folders" if more else ""
            blocks.append(Media(f"{arm}{rest}", shots))
    return blocks


def mixed(found: list[tuple[RunFolder, Rollout]]) -> list[tuple[RunFolder, Rollout]]:
    """Let successes and others take turns, a success first."""
    sides = [[pair for pair in found if (verdict_of(*pair) == "success") == won] for won in (True, False)]
    return [pair for pair in chain.from_iterable(zip_longest(*sides)) if pair]


def verdict_of(run: RunFolder, rollout: Rollout) -> str:
    """Return how a pictured rollout ended, from its name or else from its episode; empty where unknown."""
    key = (rollout.suite, rollout.task, rollout.init_state, rollout.mode)
    for e in run.episodes:
        if (e["suite"], e["task_id"], e["init_state"], e["memory"]) == key and not rollout.verdict:
            return "crash" if e.get("crash") else "success" if e["success"] else "failure"
    return rollout.verdict


def shot_of(run: RunFolder, rollout: Rollout) -> Shot:
    where = f"{rollout.suite} task {rollout.task}, init state {rollout.init_state}, memory {rollout.mode}"
    caption = ", ".join(filter(None, [f"seed {run.seed}", where, verdict_of(run, rollout)]))
    return Shot(caption, rollout.picture, rollout.video)


# --------------------------------------------------------------------------------------------------
# the report

LEAD = (
    "Success of policies in simulated rollouts, with and without imagined futures; an interval beside every "
    "number."
)
CAPTIONS = {
    "success": "Success and its 95 % Wilson interval, seeds and suites pooled. Filled: the arm's own memory "
    "mode; open: an intervention at rollout. Small dots: single seeds. Right: solved/ran.",
    "suites": "Success by suite under each arm's own memory mode; 95 % Wilson intervals; small dots: seeds.",
    "growth": "Success at every evaluated checkpoint, own memory mode, seeds and suites pooled; band: 95 % "
    "Wilson interval.",
    "curves": "A line a run, a running mean over a twentieth of the log; where runs are few, the log itself "
    "is faint. The world loss is on top of the action loss in arms that have one.",
    "held_out": "Action loss on held-out episodes by the memory mode they are read with, a line a run; noise "
    "and times are the same under each mode, so differences within a pane are paired. oracle: true futures.",
    "offline": "Paired difference of held-out action loss from mode off (`eval.py --offline`), 95 % of a "
    "bootstrap over episodes.",
    "gates": "How far each fusion site opened: 0 is closed, 1 or -1 fully open; a line a run.",
    "world": "How well the prophet imagines: cosine between imagined and true change of the latent, 1 is "
    "perfect. Baselines know nothing of the episode (mean change) or only its last step (linear "
    "extrapolation).",
    "attention": "Attention to memory, mean over samples, heads and queries. Entropies are divided by their "
    "maximum. Most attended hypothesis: (its share - 1/N)/(1 - 1/N). Nearest to truth: how often; dotted: "
    "chance, 1/N.",
    "bank": "Several hypotheses: perplexity of which one wins (N: all alike), how many have under 1 % of "
    "wins, their mean pairwise distance, and what the best gains over the mean, beyond what noise would.",
}
WIDE = ("success", "suites", "offline")  # figures that need the page's width
IMAGINED_SAYS = (
    "Contact sheets of single episodes: the past that the prophet saw, each imagined future with its share "
    "of attention, and what then happened, turned into pictures through the latents' own inverse."
)


def draw(name: str, panel: list[RunFolder], palette: dict, out: Path, *more: object) -> list[Plot]:
    """Draw one figure of a panel; none where it has nothing to show."""
    stem = f"{name}_{'elsewhere' if panel[0].elsewhere else panel[0].budget}"
    drawn = getattr(figures, f"{name}_figure")(panel, palette, out / stem, *more)
    return [Plot(stem, CAPTIONS[name], name in WIDE)] if drawn else []


def success_sections(panel: list[RunFolder], palette: dict, out: Path) -> list[Section]:
    """Return what rollouts showed: success, comparisons, what these say, and the parts of success."""
    contrasts, suites, growth = all_contrasts(panel), suites_of(panel), growth_table(panel)
    by_suite = [*draw("suites", panel, palette, out), *([suite_table(panel)] if len(suites) > 1 else [])]
    blocks = {
        "Success": [*draw("success", panel, palette, out, panel_title(panel)), success_table(panel)],
        "Paired comparisons": contrast_blocks(contrasts),
        "What these tables can say": [Bullets(what_it_says(panel, contrasts))],
        "By suite and task": [*by_suite, *(task_table(panel, suite) for suite in suites)],
        "Over training samples": [*draw("growth", panel, palette, out), growth] if growth else [],
    }
    return [Section(title, found, 3) for title, found in blocks.items() if found]


def training_sections(panel: list[RunFolder], palette: dict, out: Path) -> list[Section]:
    """Return what was logged and measured without rollouts, and what can be looked at."""
    measured, sheets = offline_lines(panel), gallery(panel, imagined, IMAGINED, "imagined/")
    held_out = draw("held_out", panel, palette, out) + draw("offline", panel, palette, out, measured)
    memory = [draw(name, panel, palette, out) for name in ("gates", "world", "attention", "bank")]
    blocks = {
        "Training loss": draw("curves", panel, palette, out),
        "Held-out action loss": [*held_out, *([offline_table(measured)] if measured else [])],
        "Memory": list(chain.from_iterable(memory)),
        "Imagined futures": [Text(IMAGINED_SAYS), *sheets] if sheets else [],
        "Rollouts": gallery(panel, filmed, FILMED, "videos/"),
    }
    return [Section(title, found, 3) for title, found in blocks.items() if found]


def panel_title(panel: list[RunFolder]) -> str:
    return "Checkpoints from elsewhere" if panel[0].elsewhere else f"{panel[0].budget:,} training samples"


def panels_of(runs: list[RunFolder]) -> dict[str, list[RunFolder]]:
    """Return title -> runs of each sample budget that was evaluated, rising, then those from elsewhere."""
    budgets = {run.budget for run in runs if run.episodes}
    found = {}
    for budget in sorted(budgets, key=lambda b: (b is None, b or 0)):
        panel = sorted((run for run in runs if run.budget == budget), key=lambda r: (r.arm, r.seed))
        found[panel_title(panel)] = panel
    return found


def for_terminal(sections: list[Section]) -> str:
    """Return a panel's title and the tables of its first two parts: success, and comparisons."""
    title, *parts = sections[:3]
    first = [next(b for b in part.blocks if isinstance(b, Table | Text)) for part in parts]
    tables = [markdown_table(block) if isinstance(block, Table) else block.text for block in first]
    return "\n\n".join([title.title, *tables]) + "\n"


def write_report(runs: list[RunFolder], out: Path, title: str = "Report") -> str:
    """Write report.html, table.md, results.csv and the figures, and return what goes to the terminal."""
    check_comparable(runs)
    panels = panels_of(runs)
    if not panels:
        names = ", ".join(run.name for run in runs)
        raise Refusal(f"no episodes in episodes.jsonl of {names}; run eval.py on a checkpoint first")
    out.mkdir(parents=True, exist_ok=True)
    palette = figures.looks(sorted({run.arm for run in runs}))
    sections, printed = [Section("At a glance", [glance_table(panels)])], []
    if missing := [run.name for run in runs if not run.episodes]:
        sections[0].blocks.append(Text(f"Not evaluated: {', '.join(missing)}."))
    for name, panel in panels.items():
        found = [Section(name, []), *success_sections(panel, palette, out)]
        printed.append(for_terminal(found))
        sections += [*found, *training_sections(panel, palette, out)]
    sections.append(Section("Reproduction", reproduction(runs)))
    (out / "table.md").write_text(markdown(title, sections, out))
    with (out / "results.csv").open("w", newline="") as file:
        rows = (row for panel in panels.values() for row in result_rows(panel))
        csv.writer(file).writerows([COLUMNS, *rows])
    (out / "report.html").write_text(page(title, LEAD, sections, out))
    printed += [block.text for block in sections[0].blocks[1:]]
    size = (out / "report.html").stat().st_size / 1e6
    wrote = f"wrote {out}/report.html ({size:.1f} MB), table.md, results.csv and figures"
    return "\n".join([*printed, wrote])


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SUBCOMMANDS:
        importlib.import_module(f"report.{sys.argv[1]}").main(sys.argv[2:])
        return
    config = tyro.cli(Config, description=__doc__)
    try:
        runs = [load_run(name, folder) for name, folder in find_runs(config.runs)]
        title = " and ".join(path.resolve().name for path in config.runs)
        print(write_report(runs, config.out or config.runs[0] / "report", title))
    except Refusal as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
