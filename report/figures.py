"""The report's figures: success, learning curves, gates, held-out losses, the prophet, attention.

An arm keeps its colour, line style and marker in every figure. Each function draws one panel's runs, writes
PATH.png and PATH.svg, and returns True, or False where nothing was logged to draw. Grounds are transparent
and ink is a mid-tone, so that figures can be read on white and on black; page.py lets ink follow the page.

    python -m report runs/demo          # -> runs/demo/report/*.png, *.svg
    pytest tests/report/test_report.py -k figures

Source of the colours: Okabe and Ito, Color Universal Design (2008).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from files import beside
from report.reading import HeldOut, RunFolder, checkpoints_of
from report.stats import Tally, arm_modes, by_arm, in_mode, tally, wilson

# Okabe and Ito's palette without its yellow and its black, which vanish on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#7f858c"
WIDTH = 5.6  # inches; two stand side by side on a wide page, one is readable on a phone
MOST_POINTS = 240  # of a line
DOSE = re.compile(r"gate:(\d+(?:\.\d+)?)")  # a memory mode

plt.rcParams.update(
    dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    | {"grid.color": INK, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
    | {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False}
    | {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "report"}
)


class Look(NamedTuple):
    """How a line is told from others."""

    colour: str
    style: str | tuple = "-"
    marker: str = "o"


class Line(NamedTuple):
    """A line; `band` is its interval, `faint` what it is a running mean of."""

    label: str
    look: Look
    x: np.ndarray
    y: np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None
    faint: np.ndarray | None = None
    dots: bool = False


class Pane(NamedTuple):
    """One pair of axes; `level` is a value to compare with."""

    title: str
    lines: list[Line]
    log: bool = False
    level: float | None = None
    x: str = "training samples"


class Mark(NamedTuple):
    """One row of a forest plot: a value and its interval."""

    label: str
    colour: str
    value: float
    interval: tuple[float, float]
    filled: bool = True
    seeds: tuple[float, ...] = ()
    text: str = ""
    group: str = ""  # a rule is drawn where it changes


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Give each name a look: colours cycle first, then line styles and markers."""
    names = list(names)
    turn = [(i, i // len(COLOURS)) for i in range(len(names))]
    return {
        name: Look(COLOURS[i % len(COLOURS)], STYLES[j % len(STYLES)], MARKERS[j % len(MARKERS)])
        for name, (i, j) in zip(names, turn, strict=True)
    }


def shorten(label: str, most: int = 40) -> str:
    """Cut a label in its middle; matplotlib drops one that begins with an underscore from a legend."""
    half = most // 2
    label = label if len(label) <= most else f"{label[: half - 1]}…{label[-half:]}"
    return " " + label if label.startswith("_") else label


def named(run: RunFolder) -> str:
    """Name an arm, and where its memory enters if there is room."""
    both = f"{run.arm} ({run.site})"
    return both if len(both) <= 40 else shorten(run.arm)


# --------------------------------------------------------------------------------------------------
# drawing


def tidy(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


def save(figure: plt.Figure, path: Path) -> bool:
    """Write a figure as PNG and SVG, the same bytes each time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out now: each file would do it anew, and it is most of the time
    with beside(path.with_name(path.name + ".png")) as png, beside(path.with_name(path.name + ".svg")) as svg:
        figure.savefig(png, dpi=150)
        figure.savefig(svg, metadata={"Date": None})
    plt.close(figure)
    return True


def forest(columns: dict[str, list[Mark]], path: Path, xlabel: str, percent: bool = True) -> bool:
    """Draw rows of values with intervals; several columns share the labels of the first."""
    marks = next(iter(columns.values()))
    width = 0.065 * max(len(mark.label) for mark in marks) + (4.2 if len(columns) == 1 else 2 * len(columns))
    size = (width, 0.9 + 0.25 * len(marks))
    figure, axes = plt.subplots(
        1, len(columns), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[0], columns.items(), strict=True):
        for y, mark in enumerate(rows):
            draw_mark(axis, y, mark)
            if y and mark.group != rows[y - 1].group:
                axis.axhline(y - 0.5, color=INK, alpha=0.35, linewidth=0.6)
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        tidy(axis)
        axis.grid(axis="y", visible=False)
        if percent:
            axis.set_xlim(-3, 103)
            axis.set_xticks([0, 25, 50, 75, 100])
        else:
            axis.axvline(0, color=INK, linewidth=0.8)
    axes[0, 0].set_yticks(range(len(marks)), [mark.label for mark in marks], fontsize=8.5)
    axes[0, 0].set_ylim(len(marks) - 0.4, -0.6)
    return save(figure, path)


def draw_mark(axis: plt.Axes, y: int, mark: Mark) -> None:
    """Draw one row: the interval, the value, seeds as dots below it, its count at the right edge."""
    if np.isfinite(mark.value):
        axis.plot(mark.interval, [y, y], color=mark.colour, linewidth=2.2 if mark.filled else 1.1)
        face = mark.colour if mark.filled else "none"
        axis.plot(mark.value, y, "o", color=mark.colour, markersize=6.5, markerfacecolor=face, zorder=3)
    if len(mark.seeds) > 1:
        axis.plot(mark.seeds, [y + 0.3] * len(mark.seeds), "o", color=INK, markersize=2.6, zorder=3)
    transform = axis.get_yaxis_transform()  # x in the axes' width, y in data
    axis.text(1.02, y, mark.text, va="center", fontsize=7.5, transform=transform)


def panes_figure(panes: list[Pane], path: Path, columns: int = 1) -> bool:
    """Draw panes with one legend below them; nothing where no pane has a line."""
    panes = [pane for pane in panes if pane.lines]
    if not panes:
        return False
    shown = {line.label: line for pane in panes for line in pane.lines}  # a label's last line stands for it
    entries = max(1, int(WIDTH / (0.6 + 0.068 * max(len(shorten(label)) for label in shown))))
    columns = min(columns, len(panes))
    rows = -(-len(panes) // columns)
    height = rows * (2.5 if columns == 1 else 1.95) + 0.2 * -(-len(shown) // entries)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height + 0.2), squeeze=False, layout="constrained"
    )
    for axis, pane in zip(axes.flat, panes, strict=False):
        draw_pane(axis, pane)
    for axis in axes.flat[len(panes) :]:
        axis.set_visible(False)
    handles = [proxy(line) for line in shown.values()]
    labels = [shorten(label) for label in shown]
    figure.legend(handles, labels, loc="outside lower center", ncols=entries, fontsize=8, handlelength=2.6)
    return save(figure, path)


def proxy(line: Line) -> plt.Line2D:
    marker = line.look.marker if line.dots else None
    return plt.Line2D([], [], color=line.look.colour, linestyle=line.look.style, marker=marker, markersize=4)


def draw_pane(axis: plt.Axes, pane: Pane) -> None:
    for line in pane.lines:
        at = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), MOST_POINTS)).round().astype(int))
        colour, style, marker = line.look
        if line.faint is not None:
            axis.plot(line.x[at], line.faint[at], color=colour, alpha=0.2, linewidth=0.7)
        if line.band is not None:
            axis.fill_between(line.x[at], *(edge[at] for edge in line.band), color=colour, alpha=0.12, lw=0)
        dotted = marker if line.dots or len(at) == 1 else None
        axis.plot(
            line.x[at], line.y[at], linestyle=style, color=colour, linewidth=1.4, marker=dotted, markersize=4
        )
    if pane.level is not None:
        axis.axhline(pane.level, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    if pane.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(pane.title)
    axis.set_xlabel(pane.x)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=not pane.x.startswith("gate")))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if abs(x) >= 1e6 else f"{x:,g}")
    tidy(axis)


# --------------------------------------------------------------------------------------------------
# what was logged


def series(run: RunFolder, key: str) -> tuple[np.ndarray, np.ndarray]:
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


def lines_of(panel: list[RunFolder], palette: dict[str, Look], key: str, raw: bool = False) -> list[Line]:
    """Return a running mean a run of one logged value, with `raw` the values behind it as well."""
    found = [(run, *series(run, key)) for run in panel]
    return [
        Line(run.arm, palette[run.arm], x, smooth(y), faint=y if raw else None)
        for run, x, y in found
        if len(x)
    ]


def logged_keys(panel: list[RunFolder]) -> list[str]:
    return sorted({key for run in panel for m in run.metrics for key in m})


# --------------------------------------------------------------------------------------------------
# success


def success_marks(
    arms: dict[str, list[RunFolder]], palette: dict[str, Look], suite: str | None, own_only: bool
) -> list[Mark]:
    """Return a row an arm and memory mode: success in a suite, or in all, in per cent."""
    marks = []
    for arm, runs in arms.items():
        for mode in [runs[0].own] if own_only else arm_modes(runs):
            of = lambda rs, mode=mode: [e for e in in_mode(rs, mode) if suite in (None, e["suite"])]  # noqa: E731
            t = tally(of(runs))
            low, high = wilson(t.k, t.n)
            seeds = tuple(100 * tally(of([run])).rate for run in runs)
            label = named(runs[0]) + ("" if own_only else f"  {mode}")
            interval, text = (100 * low, 100 * high), f"{t.k}/{t.n}"
            colour, filled = palette[arm].colour, mode == runs[0].own
            marks.append(Mark(label, colour, 100 * t.rate, interval, filled, seeds, text, arm))
    return marks


def success_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path, title: str) -> bool:
    """Draw success with Wilson intervals, one row an arm and memory mode, one small dot a seed."""
    marks = success_marks(by_arm(panel), palette, None, own_only=False)
    return forest({title: marks}, path, "success (%), 95 % Wilson interval")


def own_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw success with Wilson intervals under each arm's own memory mode alone."""
    marks = success_marks(by_arm(panel), palette, None, own_only=True)
    return forest({"own memory mode": marks}, path, "success (%), 95 % Wilson interval")


def suites_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw success by suite, each arm under its own memory mode; nothing where there is one suite."""
    suites = sorted({e["suite"] for run in panel for e in run.episodes})
    if len(suites) < 2:
        return False
    columns = {suite: success_marks(by_arm(panel), palette, suite, own_only=True) for suite in suites}
    return forest(columns, path, "success (%)")


def rates_line(label: str, look: Look, found: dict[float, Tally]) -> list[Line]:
    """Return success over some number, in per cent with Wilson's interval; none where one alone was tried."""
    found = {x: t for x, t in found.items() if t.n}
    if len(found) < 2:
        return []
    band = np.array([wilson(t.k, t.n) for t in found.values()]).T * 100
    x, y = np.array([*found], float), np.array([100 * t.rate for t in found.values()])
    return [Line(label, look, x, y, band=(band[0], band[1]), dots=True)]


def growth_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw success over training samples, where a run was evaluated at several checkpoints."""
    lines = []
    for arm, runs in by_arm(panel).items():
        found = {samples: tally(episodes) for samples, episodes in checkpoints_of(runs).items()}
        lines += rates_line(arm, palette[arm], found)
    return panes_figure([Pane("success (%), 95 % Wilson interval", lines)], path)


def dose_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw success over the strength of the gates at rollout (modes `gate:S`; the own mode is 1)."""
    lines = []
    for arm, runs in by_arm(panel).items():
        doses = {float(m[1]): m[0] for mode in arm_modes(runs) if (m := DOSE.fullmatch(mode))}
        doses = dict(sorted(({1.0: runs[0].own} | doses).items()))
        lines += rates_line(arm, palette[arm], {s: tally(in_mode(runs, mode)) for s, mode in doses.items()})
    return panes_figure([Pane("success (%), 95 % Wilson interval", lines, x="gate strength S")], path)


# --------------------------------------------------------------------------------------------------
# losses


def curves_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw loss and action loss over samples, a running mean a run with the logged values faintly behind."""
    raw = len(panel) <= 8
    panes = [
        Pane("action loss (comparable between arms)", lines_of(panel, palette, "action_loss", raw), log=True),
        Pane("loss (with the world loss, where an arm has one)", lines_of(panel, palette, "loss", raw), True),
    ]
    return panes_figure(panes, path)


MODE_ORDER = ("off", "pred", "zero", "oracle", "random", "shuffle", "signflip", "current", "history")


def mode_looks(modes: Iterable[str]) -> dict[str, Look]:
    """Give memory modes looks: the same ones in every figure, interventions on a bank after them."""
    extra = sorted(set(modes) - {*MODE_ORDER})
    return looks([*MODE_ORDER, *extra])


def held_out_figure(panel: list[RunFolder], _: dict[str, Look], path: Path) -> bool:
    """Draw the action loss on held-out episodes over samples, by memory mode, a pane an arm."""
    prefix = "val_loss_"
    modes = [key.removeprefix(prefix) for key in logged_keys(panel) if key.startswith(prefix)]
    palette, panes = mode_looks(modes), []
    modes = [mode for mode in palette if mode in modes]
    for arm in sorted({run.arm for run in panel}):
        runs = [run for run in panel if run.arm == arm]
        found = [(mode, *series(run, prefix + mode)) for run in runs for mode in modes]
        lines = [Line(mode, palette[mode], x, y, dots=True) for mode, x, y in found if len(x)]
        panes.append(Pane(shorten(arm, 30), lines))
    return panes_figure(panes, path, columns=2)


def offline_figure(panel: list[RunFolder], _: dict[str, Look], path: Path, measured: list[HeldOut]) -> bool:
    """Draw each mode's held-out action loss beside that of `off`, one row an arm and mode, a dot a seed."""
    palette = mode_looks(m.mode for m in measured)
    several, marks = len({m.data for m in measured}) > 1, []
    for m in measured:
        if len(m.from_off):
            label = shorten(m.run.arm) + (f" {m.data}" if several else "")
            value, colour = m.from_off.mean(), palette[m.mode].colour
            look = {"seeds": tuple(m.from_off), "text": f"{value:+.4f}", "group": label}
            marks.append(Mark(f"{label}  {m.mode}", colour, value, m.interval("from_off"), **look))
    xlabel = "action loss minus that of off; 95 %"
    title = "left of 0: better than without memory"
    return bool(marks) and forest({title: marks}, path, xlabel, percent=False)


# --------------------------------------------------------------------------------------------------
# memory


def gates_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw tanh(gate) over samples, a pane a fusion site, a line a run."""
    keys = [key for key in logged_keys(panel) if key.startswith("world_gate")]
    panes = [Pane(f"tanh(gate), {key}", lines_of(panel, palette, key), level=0.0) for key in keys]
    return panes_figure(panes, path, columns=1 if len(panes) < 3 else 2)


def world_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw the cosine of predicted and true futures beside two baselines, over samples and by future step."""
    lines = lines_of(panel, palette, "world_cos")
    if not lines:
        return False
    guesses = {"world_cos_mean_change": "mean change", "world_cos_linear": "linear extrapolation"}
    for style, (key, name) in zip(("--", ":"), guesses.items(), strict=True):
        found = lines_of(panel, palette, key)
        lines += [line._replace(label=f"baseline: {name}", look=Look(INK, style)) for line in found]
    best, ahead = lines_of(panel, palette, "world_cos_best"), steps_ahead(panel, palette)
    panes = [
        Pane("cosine of imagined and true change", lines, level=0.0),
        Pane("the best hypothesis' cosine", best, level=0.0),
        Pane("by future step, last tenth of training", ahead, level=0.0, x="future step"),
    ]
    return panes_figure(panes, path)


def steps_ahead(panel: list[RunFolder], palette: dict[str, Look]) -> list[Line]:
    """Return `world_cos_k*` against k, each the mean of a run's last tenth of log lines."""
    names = (key.removeprefix("world_cos_k") for key in logged_keys(panel) if key.startswith("world_cos_k"))
    steps, lines = sorted(int(name) for name in names if name.isdigit()), []
    for run in panel:
        logged = {k: series(run, f"world_cos_k{k}")[1] for k in steps}
        found = {k: y[-max(1, len(y) // 10) :].mean() for k, y in logged.items() if len(y)}
        if found:
            x, y = np.array([*found], float), np.array([*found.values()])
            lines.append(Line(run.arm, palette[run.arm], x, y, dots=True))
    return lines


ATTENTION = {
    "attn_entropy": "entropy over memory tokens (1: even)",
    "attn_entropy_step": "entropy over future steps (1: even)",
    "attn_entropy_hyp": "entropy over hypotheses (1: even)",
    "attn_pmax": "largest share of one token",
    "spike": "most attended hypothesis (0: chance)",
    "choose_best": "most attended is nearest to truth",
    "world_mass": "share of all attention",
    "ctx_norm": "length of what memory adds",
}
BANK = {
    "usage_ppl": "hypotheses in use (perplexity)",
    "dead": "dead hypotheses",
    "div_cos": "mean distance, 1 - cos (0: collapsed)",
    "oracle_gap_excess": "gain of the best, beyond noise's",
    "oracle_gap_excess_early": "the same in an episode's first tenth",
}


def attention_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw how memory is attended to: a pane a quantity, a line a run and fusion site."""
    keys, panes = logged_keys(panel), []
    counts = {run.config.get("num_hypotheses", 1) for run in panel} - {1}
    chance = 1 / min(counts) if len(counts) == 1 else None
    several = any(len(run.fusion) > 1 for run in panel)
    for name, title in ATTENTION.items():
        lines = []
        for style, key in zip(STYLES, (key for key in keys if key.endswith(f"/{name}")), strict=False):
            for line in lines_of(panel, palette, key):
                if several:  # sites are then told apart by line style, arms by colour
                    label = f"{line.label} {key.partition('/')[0]}"
                    line = line._replace(label=label, look=line.look._replace(style=style))
                lines.append(line)
        panes.append(Pane(title, lines, level=chance if name == "choose_best" else None))
    return panes_figure(panes, path, columns=2)


def bank_figure(panel: list[RunFolder], palette: dict[str, Look], path: Path) -> bool:
    """Draw whether several hypotheses stay several."""
    panes = [Pane(title, lines_of(panel, palette, key)) for key, title in BANK.items()]
    return panes_figure(panes, path, columns=2)
