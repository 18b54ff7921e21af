"""Films of episodes: both cameras, the instruction, and what the policy attends to while it acts.

An evaluation draws only what its policy looks at. A film needs every picture, so the few episodes that are
worth one are run a second time, drawn throughout; episodes repeat exactly, and that they did is checked. The
overlay has the step, each gate's strength and, for a memory, the attention over imagined futures: a row a
hypothesis, a cell an imagined step, brightest where the attention is.

    python eval.py runs/demo/E2-n40000-s0 --video       # RUN/videos/*.mp4, and a filmstrip .png of each
    pytest tests/rollouts/test_film.py

Shapes: S picture side, N hypotheses, K future frames, F frames of a film.
Sources: H.264 through PyAV; yuv420p and the index in front, so that browsers play it from disk.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files import beside
from simulator.env import CAMERAS, CONTROL_HZ
from simulator.pool import Observation

SIDE = 256  # pixels of a camera's picture in the film
PANEL, MARGIN, LINE, FONT = 112, 8, 16, 12  # pixels
CELL = 14  # pixels of an imagined step, where there is room
INK, DIM, PAPER, RULE = (236, 236, 236), (150, 150, 150), (24, 24, 28), (70, 70, 76)
ON_STRIP = 6  # moments of a filmstrip


@dataclass
class Film:
    """What is filmed of one episode: pictures by control step, and the attention of each decision."""

    every: int  # control steps between two pictures
    gates: dict[str, float]  # strength tanh(gate) by its name in the log; none without memory
    pictures: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)  # step -> camera -> (S, S, 3)
    attention: dict[int, np.ndarray] = field(default_factory=dict)  # step of a decision -> (N, K) shares

    def plan(self, step: int, n: int) -> list[int]:
        """Which of the next n actions (1-based), from `step` on, end on a picture of the film."""
        return [k for k in range(1, n + 1) if (step + k) % self.every == 0]

    def see(self, before: int, observation: Observation) -> None:
        """Take the pictures in that an observation brings; `before`: steps when its actions were sent."""
        for offset in sorted({k for k, _ in observation.frames}):
            frames = {camera: f for (k, camera), f in observation.frames.items() if k == offset}
            even = (before + offset) % self.every == 0  # a decision may look at others
            if set(frames) >= set(CAMERAS) and (even or observation.done):
                self.pictures[before + offset] = frames


def episode_name(checkpoint: str, mode: str, suite: str, task: int, init_state: int) -> str:
    """Name what is drawn of an episode, without suffix."""
    return f"{checkpoint}-{mode}-{suite}-task{task}-init{init_state}".replace(":", "")


def film_name(checkpoint: str, mode: str, suite: str, task: int, init_state: int, success: bool) -> str:
    """Name an episode's film, without suffix."""
    verdict = "success" if success else "failure"
    return f"{episode_name(checkpoint, mode, suite, task, init_state)}-{verdict}"


def save_film(path: Path, film: Film, instruction: str, title: str, success: bool) -> None:
    """Write an episode's film, and its filmstrip as a .png beside; each is renamed when it is whole.

    It plays in real time; the last picture stays for a second.
    """
    assert film.pictures, "nothing was filmed"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = sorted(film.pictures)
    verdicts = {steps[-1]: success}
    frames = [compose(film, step, instruction, title, verdicts.get(step)) for step in steps]
    rate = Fraction(CONTROL_HZ, film.every)
    with beside(path) as partial:  # last in its place: where the film is, its strip is
        write_video(partial, frames + frames[-1:] * round(rate), rate)
        with beside(path.with_suffix(".png")) as strip:
            Image.fromarray(filmstrip(film, steps)).save(strip, optimize=True)


def write_video(path: Path, frames: Iterable[np.ndarray], rate: Fraction) -> None:
    """Encode frames (H, W, 3) uint8, all of one even size, as H.264."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("h264", rate=rate, options={"crf": "24", "preset": "veryfast"})
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# ---- layout -------------------------------------------------------------------------------------------


def compose(film: Film, step: int, instruction: str, title: str, verdict: bool | None) -> np.ndarray:
    """Lay one moment out, (SIDE + PANEL, 2 SIDE, 3): cameras above, words and attention below."""
    width = SIDE * len(CAMERAS)
    canvas = Image.new("RGB", (width, SIDE + PANEL), PAPER)
    for column, camera in enumerate(CAMERAS):
        canvas.paste(shown(film.pictures[step][camera]), (column * SIDE, 0))
    draw = ImageDraw.Draw(canvas)
    half, y = width // 2, SIDE + MARGIN
    letters = round((half - 2 * MARGIN) / text_width("n"))
    for line in textwrap.wrap(instruction, letters)[:3]:
        y = write(draw, (MARGIN, y), line)
    y = write(draw, (MARGIN, y), title, DIM)
    clock = f"step {step}   {step / CONTROL_HZ:.1f} s"
    write(
        draw,
        (MARGIN, SIDE + PANEL - MARGIN - LINE),
        clock if verdict is None else f"{clock}   {said(verdict)}",
    )
    draw_memory(draw, (half + MARGIN, SIDE + MARGIN), (half - 2 * MARGIN, PANEL - 2 * MARGIN), film, step)
    return np.asarray(canvas)


def draw_memory(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], room: tuple[int, int], film: Film, step: int
) -> None:
    """Draw gates, and the newest decision's attention (N, K) as cells: brightest at the largest share."""
    (x, y), (width, height) = at, room
    if not film.gates:
        write(draw, at, "no memory", DIM)
        return
    for name, strength in film.gates.items():
        y = write(draw, (x, y), f"{name} {strength:+.3f}", DIM)
    decided = [s for s in film.attention if s <= step]
    if not decided:
        return
    shares = np.nan_to_num(film.attention[max(decided)])  # (N, K)
    count, ahead = shares.shape
    y = write(draw, (x, y), f"attention to {count} x {ahead} imagined steps", DIM)
    cell = min(CELL, (at[1] + height - y) // count, (width - 40) // ahead)
    if cell < 2:  # more than there is room for
        return
    peak = max(float(shares.max()), 1e-9)
    for row in range(count):
        for column in range(ahead):
            left, top = x + column * cell, y + row * cell
            box = (left, top, left + cell - 2, top + cell - 2)
            draw.rectangle(box, fill=warm(float(shares[row, column]) / peak), outline=RULE)
        if count > 1 and cell >= FONT:
            write(draw, (x + ahead * cell + 4, y + row * cell - 1), f"{shares[row].sum():.2f}", DIM)


def warm(share: float) -> tuple[int, int, int]:
    """Give the colour of a share in 0..1: from the paper to a warm yellow."""
    low, high = np.array(PAPER), np.array((255, 196, 60))
    return tuple((low + (high - low) * share).round().astype(int).tolist())


def said(verdict: bool) -> str:
    return "solved" if verdict else "not solved"


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, ink: tuple = INK) -> int:
    """Write a line and give the height at which the next one begins."""
    draw.text(at, text, ink, ImageFont.load_default(FONT))
    return at[1] + LINE


def text_width(text: str) -> float:
    return ImageFont.load_default(FONT).getlength(text)


def shown(picture: np.ndarray) -> Image.Image:
    """Scale a picture (S, S, 3) to the film's size."""
    return Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def filmstrip(film: Film, steps: list[int]) -> np.ndarray:
    """Lay out evenly spaced moments, a column each, cameras below one another, (H, W, 3)."""
    chosen = [steps[i] for i in np.linspace(0, len(steps) - 1, min(ON_STRIP, len(steps))).round().astype(int)]
    columns = [np.concatenate([np.asarray(shown(film.pictures[s][c])) for c in CAMERAS]) for s in chosen]
    return np.concatenate(columns, axis=1)[::2, ::2]  # half the size: a strip is for a glance
