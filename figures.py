"""The report's figures: success with intervals, learning curves, and how far the memory's gates opened.

An arm keeps its colour and line style in every figure. Each function draws one sample budget's runs, writes
one PNG and returns its path, or None where nothing was logged to draw.

    python report.py runs/demo          # -> runs/demo/report/*.png
    pytest tests/test_report.py -k figures

Source of the colours: Okabe and Ito, Color Universal Design (2008).
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from stats import Run, arm_modes, by_arm, in_mode, tally, wilson

# Okabe and Ito's palette without its yellow: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def tidy(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)


def save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def success_figure(panel: list[Run], palette: dict, path: Path) -> Path:
    """Draw success with Wilson intervals, one row an arm and memory mode, one small dot a seed."""
    arms = by_arm(panel)
    rows = [(arm, mode, runs) for arm, runs in arms.items() for mode in arm_modes(runs)]
    figure, axis = plt.subplots(figsize=(7.5, 1.3 + 0.38 * len(rows)))
    for y, (arm, mode, runs) in enumerate(rows):
        colour, own = palette[arm][0], mode == runs[0].own
        t = tally(in_mode(runs, mode))
        low, high = wilson(t.k, t.n)
        axis.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2.4 if own else 1.2)
        face = colour if own else "white"
        axis.plot(100 * t.rate, y, "o", color=colour, markersize=8, markerfacecolor=face, zorder=3)
        if len(runs) > 1:
            rates = [100 * tally(in_mode([run], mode)).rate for run in runs]
            axis.plot(rates, [y + 0.27] * len(rates), "d", color="0.35", markersize=3.5, zorder=3)
        axis.text(102, y, f"{t.k}/{t.n}", va="center", fontsize=9, color="0.3")
        if y and arm != rows[y - 1][0]:
            axis.axhline(y - 0.5, color="0.85", linewidth=0.8)
    labels = [f"{arm} ({runs[0].site})   {mode}" for arm, mode, runs in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(-2, 100)
    axis.set_xlabel("success (%) with 95 % Wilson interval")
    seeds = "small diamonds: seeds" if any(len(runs) > 1 for runs in arms.values()) else "one seed an arm"
    title = f"{panel[0].budget:,} training samples; filled: own memory mode, open: intervention; {seeds}"
    axis.set_title(title, fontsize=9.5, loc="left")
    tidy(axis)
    axis.grid(axis="y", visible=False)
    return save(figure, path)


def series(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
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


def draw_lines(axis: plt.Axes, lines: list[tuple], title: str, ylabel: str) -> None:
    """Draw each (label, colour, style, samples, values), naming a label once."""
    named = set()
    for label, colour, style, samples, values in lines:
        shown = None if label in named else label
        axis.plot(samples, values, style, color=colour, linewidth=1.6, label=shown)
        named.add(label)
    axis.set_title(title, fontsize=9.5, loc="left")
    axis.set_ylabel(ylabel)
    axis.set_xlabel("training samples")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    tidy(axis)


def curves_figure(panel: list[Run], palette: dict, path: Path) -> Path | None:
    """Draw loss and action loss over samples, a running mean a run with the logged values faintly behind."""
    titles = {"loss": "with the world loss, where an arm has one", "action_loss": "comparable between arms"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        lines = []
        for run in panel:
            samples, values = series(run, key)
            if len(samples):
                axis.plot(samples, values, color=palette[run.arm][0], alpha=0.2, linewidth=0.7)
                lines.append((run.arm, *palette[run.arm], samples, smooth(values)))
        draw_lines(axis, lines, title, key.replace("_", " "))
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = axes[0].get_legend_handles_labels()
    if not handles:
        plt.close(figure)
        return None
    figure.legend(handles, labels, title="arm", frameon=False, loc="outside right center")
    return save(figure, path)


def gates_figure(panel: list[Run], palette: dict, path: Path) -> Path | None:
    """Draw tanh(gate) over samples, one line a run and fusion site."""
    keys = sorted({key for run in panel for m in run.metrics for key in m if key.startswith("world_gate")})
    lines = [
        (f"{run.arm} {key}", palette[run.arm][0], STYLES[i % len(STYLES)], *series(run, key))
        for run in panel
        for i, key in enumerate(keys)
    ]
    lines = [line for line in lines if len(line[3])]
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axis.axhline(0, color="0.5", linewidth=0.8)
    draw_lines(axis, lines, "strength of the memory branch: 0 is closed, 1 or -1 fully open", "tanh(gate)")
    figure.legend(frameon=False, loc="outside right center")
    return save(figure, path)
