"""Turns run folders into success tables, paired comparisons and figures, an interval beside every number.

Two arms are compared on the same (suite, task, init state) pairs, within one training seed; seeds are what
verdicts rest on. Another sample budget gets a panel of its own, and so do checkpoints from elsewhere; another
protocol or other data are set aside. A simulator crash is neither a success nor a failure.

    python -m report runs/demo                            # -> runs/demo/report/: report.html, table.md, ...
    python -m report runs/a runs/b/E2_s0 --out report     # any run folders, or folders that hold some
    python -m report results/data --publish results       # a study: a page, tables, figures
    python -m report power --help                         # how many episodes would show a difference
    python -m report watch RUN                            # a run while it trains

Reads JSON lines, pictures and videos; needs neither torch nor a simulator. reading.py reads run folders and
sets aside, findings.py, tables.py and figures.py say and draw, page.py lays out; stats.py has the statistics.
"""

import csv
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import tyro

from files import Refused, beside, naming, plain, replace_text, told, type_in
from report import figures
from report.findings import looks, partitions, sentences, signals
from report.page import Bullets, Media, Plot, Section, Shot, Table, Text, markdown, markdown_table, page
from report.reading import Aside, Rollout, RunFolder, filmed, held_out, imagined, load_runs
from report.stats import LEAST_SEEDS, Contrast, all_contrasts, by_arm, tally
from report.tables import (
    COLUMNS,
    PRIMARY,
    contrast_blocks,
    glance_table,
    growth_table,
    loss_table,
    modes_table,
    offline_table,
    partition_table,
    reproduction,
    result_rows,
    signal_table,
    success_table,
    suite_table,
    suites_of,
    taken_table,
    task_table,
)

SUBCOMMANDS = ("power", "watch")  # each a module beside this one, with main(argv)
TOLD = ("Success", "Paired comparisons", "What these tables can say", "Expected signals")  # at the terminal
PUBLISHED = ("Expected signals", "What these tables can say", "Success", "Paired comparisons")
PUBLISHED += ("Over training samples", "Dose and response", "Held-out action loss", "Memory")  # in this order
IMAGINED, FILMED = 2, 4  # pictures and videos shown of an arm


@dataclass(frozen=True)
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders that hold run folders."""
    out: Path | None = None
    """Folder for the page, tables and figures; default: `report` inside the first folder of `runs`."""
    publish: Path | None = None
    """Folder for a study's page, README.md, and a folder a part: the folders inside the one of `runs` that is
    named are the parts. Added are what stands in its learned.md, in its own words, and a part's
    imagined.png."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(
                "no run folder is named; name one, or a folder that holds some, such as runs/demo"
            )
        if self.publish and (self.out or len(self.runs) > 1):
            raise ValueError("--publish takes one folder, whose folders are the parts, and no --out")


# --------------------------------------------------------------------------------------------------
# what the tables can say


ELSEWHERE_SAYS = (
    "These checkpoints were trained elsewhere, on data, seeds and budgets that are not known here: the "
    "intervals cover the choice of episodes only, and nothing compares them with arms trained here."
)


def seeds_say(arms: dict[str, list[RunFolder]]) -> str:
    if max(len(runs) for runs in arms.values()) < LEAST_SEEDS:
        return (
            f"Fewer than {LEAST_SEEDS} training seeds an arm: no verdict on arms, only the tables. Wilson "
            "intervals cover the choice of episodes, not what training seeds vary by, which may be as much."
        )
    counted = ", ".join(f"{arm} {len(runs)}" for arm, runs in arms.items())
    return (
        f"Training seeds: {counted}. Verdicts on arms are t tests over seeds and speak about new seeds; "
        "Wilson intervals pool the episodes of these seeds and speak about these alone."
    )


def what_it_says(panel: list[RunFolder], contrasts: list[Contrast], looked: int) -> list[str]:
    """Return what follows from these runs and what does not."""
    arms = by_arm(panel)
    says = [ELSEWHERE_SAYS if panel[0].elsewhere else seeds_say(arms)]
    if looked > 1:
        says.append(f"Looked at {looked} times; each may give a false verdict, and p counts one alone.")
    says += [f"{f.arm}: {f.what}: {f.answer}. {f.number}." for f in sentences(panel, contrasts)]
    if any(run.unmet(mode) for run in panel for mode in ("off", "zero")):
        says.append(
            "An arm's fall from its own memory to `off` or `zero` shows that policy and memory grew used to "
            "each other, not that memory helps, unless training met it (`off`: `--memory-dropout`)."
        )
    blind = [c for c in contrasts if (c.a, c.b) == ("E0", "E0b")]
    says += [
        f"{c}. E0b sees no picture: success that it reaches too says nothing about seeing." for c in blind
    ]
    if "E0" in arms and not blind:
        says.append("Without E0b, which is blind, nobody knows how much of this success needs eyes.")
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
    "own": "Success under each arm's own memory mode and its 95 % Wilson interval, seeds and suites pooled. "
    "Small dots: single seeds. Right: solved/ran.",
    "dose": "Success with the gates' strength times S at rollout (`eval.py --gate-scale`); 1: the policy as "
    "trained. Band: 95 % Wilson interval, seeds pooled.",
    "suites": "Success by suite under each arm's own memory mode; 95 % Wilson intervals; small dots: seeds.",
    "growth": "Success at every evaluated checkpoint, own memory mode, seeds and suites pooled; band: 95 % "
    "Wilson interval.",
    "curves": "A line a run, a running mean over a twentieth of the log; where runs are few, the log itself "
    "is faint. The world loss is on top of the action loss in arms that have one.",
    "held_out": "Action loss on held-out episodes by the memory mode they are read with, a line a run; noise "
    "and times are the same under each mode, so differences within a pane are paired. oracle: true futures.",
    "offline": "Paired difference of held-out action loss from mode off (`eval.py --offline`). Small dots: "
    "seeds; 95 %: over these, or of one seed over episodes.",
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
STRIP_SAYS = (
    "the past that the prophet saw, each imagined future with its share of attention, and what then "
    "happened, turned into pictures through the latents' own inverse."
)


def draw(name: str, panel: list[RunFolder], palette: dict, out: Path, *more: object) -> list[Plot]:
    """Draw one figure of a panel; none where it has nothing to show."""
    stem = f"{name}_{'elsewhere' if panel[0].elsewhere else panel[0].budget}"
    drawn = getattr(figures, f"{name}_figure")(panel, palette, out / stem, *more)
    return [Plot(stem, CAPTIONS[name], name in WIDE)] if drawn else []


def success_sections(
    panel: list[RunFolder], palette: dict, out: Path, looked: int
) -> tuple[list[Section], list[dict]]:
    """Return what rollouts showed (success, comparisons, what these say), and its rows of results.csv."""
    contrasts, suites, growth = all_contrasts(panel), suites_of(panel), growth_table(panel)
    expected, spread = signals(panel, contrasts), partitions(panel, contrasts)
    by_suite = draw("suites", panel, palette, out) + ([suite_table(panel)] if len(suites) > 1 else [])
    by_suite += [taken] if (taken := taken_table(panel)) else []
    blocks = {
        "Success": [*draw("success", panel, palette, out, panel_title(panel)), success_table(panel)],
        "Paired comparisons": contrast_blocks(panel, contrasts),
        "What these tables can say": [Bullets(what_it_says(panel, contrasts, looked))],
        "Expected signals": [signal_table(expected)] if expected else [],
        "Dose and response": draw("dose", panel, palette, out),
        "Where the spread comes from": [partition_table(spread)] if spread else [],
        "By suite and task": [*by_suite, *(task_table(panel, suite) for suite in suites)],
        "Over training samples": [*draw("growth", panel, palette, out), growth] if growth else [],
    }
    said = {"sentence": sentences(panel, contrasts), "signal": expected}
    sections = [Section(title, found, 3) for title, found in blocks.items() if found]
    return sections, result_rows(panel, contrasts, said, spread)


def training_sections(panel: list[RunFolder], palette: dict, out: Path) -> list[Section]:
    """Return what was logged and measured without rollouts, and what can be looked at."""
    measured, sheets = held_out(panel), gallery(panel, imagined, IMAGINED, "imagined/")
    losses = draw("held_out", panel, palette, out) + draw("offline", panel, palette, out, measured)
    memory = [draw(name, panel, palette, out) for name in ("gates", "world", "attention", "bank")]
    blocks = {
        "Training loss": draw("curves", panel, palette, out),
        "Held-out action loss": [*losses, *([offline_table(measured)] if measured else [])],
        "Memory": list(chain.from_iterable(memory)),
        "Imagined futures": [Text(f"Contact sheets of single episodes: {STRIP_SAYS}"), *sheets]
        if sheets
        else [],
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


def for_terminal(title: Section, sections: list[Section]) -> str:
    """Return a panel's title, and what its first parts say: success, comparisons, sentences, signals."""
    parts = [part for part in sections if part.title in TOLD]
    told = [b for part in parts for b in part.blocks if isinstance(b, Table | Text | Bullets)]
    return "\n\n".join([title.title, *map(terminal_block, told)]) + "\n"


def terminal_block(block: Table | Text | Bullets) -> str:
    if isinstance(block, Bullets):
        return "\n".join(f"- {item}" for item in block.items)
    return markdown_table(block) if isinstance(block, Table) else block.text


def write_tables(
    runs: list[RunFolder], out: Path, title: str = "Report", aside: Sequence[Aside] = ()
) -> tuple[dict[str, list[Section]], list[Section]]:
    """Write table.md, results.csv and the figures; return each panel's sections, and all in their order."""
    panels = panels_of(runs)
    if not panels:
        names = ", ".join(run.name for run in runs) or "any run"
        left = "".join(f"; set aside: {each.name} ({each.why})" for each in aside)
        raise Refused(f"no episodes in episodes.jsonl of {names}{left}; run eval.py on a checkpoint first")
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    palette = figures.looks(sorted({run.arm for run in runs}))
    looked = looks(panels, out / "looks.json")
    sections, rows, found = [Section("At a glance", [glance_table(panels, looked)])], [], {}
    if missing := [run.name for run in runs if not run.episodes]:
        sections[0].blocks.append(Text(f"Not evaluated: {', '.join(missing)}."))
    if aside:
        sections[0].blocks.append(Text(f"Set aside: {'; '.join(f'{a.name} ({a.why})' for a in aside)}."))
    for name, panel in panels.items():
        shown, more = success_sections(panel, palette, out, looked[name])
        found[name] = [*shown, *training_sections(panel, palette, out)]
        sections, rows = [*sections, Section(name, []), *found[name]], rows + more
    sections.append(Section("Reproduction", reproduction(runs)))
    replace_text(out / "table.md", markdown(title, sections, out))
    with beside(out / "results.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return found, sections


def write_report(runs: list[RunFolder], out: Path, title: str = "Report", aside: Sequence[Aside] = ()) -> str:
    """Write tables, figures and report.html, and return what goes to the terminal."""
    panels, sections = write_tables(runs, out, title, aside)
    replace_text(out / "report.html", page(title, LEAD, sections, out))
    printed = [for_terminal(Section(name, []), found) for name, found in panels.items()]
    missing = [run.name for run in runs if not run.episodes]
    printed += [f"Not evaluated: {', '.join(missing)}."] if missing else []
    size = (out / "report.html").stat().st_size / 1e6
    wrote = f"wrote {out}/report.html ({size:.1f} MB), table.md, results.csv and figures"
    return "\n".join([*printed, *map(str, aside), wrote])


def publish(data: Path, out: Path) -> str:
    """Write a study's page: of each part what its tables say, and what was learned, in words of its own."""
    sections = []
    parts = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    if not parts:
        raise Refused(f"--publish: {data} has no folders, which would be a study's parts")
    for part in parts:
        folder, (runs, aside) = out / part.name, load_runs((part,))
        for title, found in write_tables(runs, folder, part.name, aside)[0].items():
            panel, by_title = panels_of(runs)[title], {section.title: section for section in found}
            blocks = [
                (name, on_page(by_title[name], panel, folder)) for name in PUBLISHED if name in by_title
            ]
            sections.append(Section(f"{plain(part.name)}: {title}", [Text(part_says(part, runs, aside))]))
            sections += [
                Section(name, [moved(block, part.name) for block in some], 3) for name, some in blocks if some
            ]
        for figure in folder.glob("*.svg"):  # which the page shows
            figure.with_suffix(".png").unlink(missing_ok=True)
        if (folder / "imagined.png").is_file():
            strips = Plot(f"{quote(part.name)}/imagined", f"A decision of one episode: {STRIP_SAYS}")
            sections.append(Section("Imagined futures", [strips], 3))
    learned = out / "learned.md"
    sections += [Section("What we learned", [Text(learned.read_text().strip())])] if learned.is_file() else []
    replace_text(out / "README.md", markdown("Results", sections, out))
    return f"wrote {out}/README.md, and a folder a part with table.md, results.csv and figures"


def part_says(part: Path, runs: list[RunFolder], aside: Sequence[Aside]) -> str:
    seeds = ", ".join(f"{arm} {len(some)}" for arm, some in by_arm(runs).items())
    left = f" Set aside: {'; '.join(a.name for a in aside)}." if aside else ""
    name = quote(part.name)
    return f"Seeds: {seeds}.{left} All of it: [table.md]({name}/table.md), [results.csv]({name}/results.csv)."


def on_page(section: Section, panel: list[RunFolder], folder: Path) -> list:
    """Return what a study's page has of a section, to be read in minutes; table.md has all."""
    if section.title == "Success":
        return [*draw("own", panel, figures.looks(by_arm(panel)), folder), modes_table(panel)]
    if section.title == "Held-out action loss":
        return [loss_table(panel)]
    if section.title == "Paired comparisons":
        return [block for block in section.blocks if isinstance(block, Table) and block.title == PRIMARY]
    return section.blocks


def moved(block: object, folder: str) -> object:
    """Return a block as a page one folder up shows it, figures as SVG."""
    where = f"{quote(folder)}/{block.name}" if isinstance(block, Plot) else ""
    return block._replace(name=where, kind="svg") if where else block


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SUBCOMMANDS:
        importlib.import_module(f"report.{sys.argv[1]}").main(sys.argv[2:])
        return
    config = type_in(Config, __doc__, ("runs", "out", "publish"), "python -m report")
    with told():
        if config.publish:
            print(publish(config.runs[0], config.publish))
            return
        runs, aside = load_runs(config.runs)
        title = " and ".join(plain(path.resolve().name) for path in config.runs)
        print(write_report(runs, config.out or config.runs[0] / "report", title, aside))


if __name__ == "__main__":
    main()
