"""Imagined futures as pictures: one filmstrip a decision.

A strip has the past that the prophet saw, a row for each imagined future with its share of attention, and
what then happened. Latents become pictures through the encoder's own inverse, or, where it has none, as the
nearest frame of a gallery. True frames go the same way by default: what differs between `imagined` and `then`
is then the prophet's error, without what compression loses.

    python eval.py runs/demo/E2-n40000-s0 --imagine 2 --init-states 48-49      # RUN/imagined/*.png
    pytest tests/rollouts/test_imagine.py

Shapes: B batch, T history frames, K future frames, N hypotheses, D latent width, C chunk, A_max the model's
action width, n pictures of a call, h x w a picture, F frames of a gallery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from arm import Arm
from files import beside
from latents.encoders import PCA
from prophet import NEEDS
from simulator.env import CONTROL_HZ
from training.diagnostics import memory_mass

GREY = (214, 214, 214)  # a frame that never came
INK, RULE = (40, 40, 40), (190, 190, 190)
LEAST = 64  # pixels of a shown picture's shorter side
MARGIN, GAP, LINE, FONT = 10, 3, 18, 12  # pixels
ON_SHEET = 6  # decisions of an episode's contact sheet


class Decision(NamedTuple):
    """What a decision was made from; everything on the CPU, latents standardised."""

    step: int  # control steps since the episode's start
    z_hist: Tensor  # (T, D), the past that the prophet saw; before the start the first frame repeats
    imagined: Tensor  # (N, K, D), absolute: what the policy was handed
    mass: Tensor | None = None  # (N,), shares of attention


class Gallery(NamedTuple):
    """Frames that stand for latents which cannot be inverted."""

    latents: Tensor  # (F, D), standardised
    frames: np.ndarray  # (F, h, w, 3) uint8


# ---- decisions ----------------------------------------------------------------------------------------


def decisions_of(
    arm: Arm, inputs: dict, world: dict[str, Tensor], noise: Tensor, mode: str, steps: Sequence[int]
) -> list[Decision]:
    """Note what a batch's decisions, made at `steps`, are handed; none where no prophet makes the memory.

    Args as `diagnostics.attention_mass` takes them. The past of `shuffle` is the partner's.
    """
    if arm.policy.fusion is None or "prophet" not in NEEDS[mode]:
        return []
    with torch.no_grad():
        memory = arm.memory(mode, arm.like(noise), world)
    mass = memory_mass(arm, inputs, memory, noise)
    mass = [None] * len(memory.rows) if mass is None else mass.cpu()
    past = world["z_partner" if mode == "shuffle" else "z_hist"].cpu()
    imagined = memory.rows.cpu().unflatten(1, (-1, arm.config.future))  # (B, N*K, D) -> (B, N, K, D)
    return [Decision(*of) for of in zip(steps, past, imagined, mass, strict=True)]


def future_plan(n: int, future: int, stride: int) -> list[int]:
    """Which of a decision's n actions (1-based) end on a frame that some decision imagines.

    Decisions fall n steps apart; each imagines the frames s, 2s, .. Ks steps after it.
    """
    return sorted({(k * stride - 1) % n + 1 for k in range(1, future + 1)})


# ---- latents as pictures ------------------------------------------------------------------------------


def decode(encoder: PCA, z: Tensor) -> np.ndarray:
    """Turn standardised latents (n, D) into pictures (n, h, w, 3) uint8, cameras side by side."""
    pictures = encoder.decode(encoder.unstandardise(z.detach().float().cpu()))
    return pictures.permute(0, 2, 3, 1).contiguous().numpy()  # (n, 3, h, w) -> (n, h, w, 3)


def nearest_frames(z: Tensor, gallery_latents: Tensor, gallery_frames: np.ndarray) -> np.ndarray:
    """Pick for each latent (n, D) the frame (n, h, w, 3) of the gallery whose latent is nearest."""
    z, gallery_latents = (x.detach().float().cpu() for x in (z, gallery_latents))
    # By differences: through a matrix product, near latents would lose their last digits.
    distance = torch.cdist(z, gallery_latents, compute_mode="donot_use_mm_for_euclid_dist")  # (n, F)
    return gallery_frames[distance.argmin(1).numpy()]


def pictures_of(arm: Arm, z: Tensor, gallery: Gallery | None = None) -> np.ndarray:
    """Show latents (n, D) as pictures (n, h, w, 3): by a gallery where there is one, else by the inverse."""
    if gallery is not None:
        return nearest_frames(z, *gallery)
    assert hasattr(arm.encoder, "decode"), "this encoder has no inverse: give a gallery of frames"
    return decode(arm.encoder, z)


def strips_of_episode(
    arm: Arm,
    decisions: Sequence[Decision],
    latents: Mapping[int, Tensor],
    pictures: Mapping[int, np.ndarray] | None = None,
    gallery: Gallery | None = None,
) -> list[np.ndarray]:
    """Draw one strip (H, W, 3) uint8 for each decision of an episode.

    Args: latents (D,), standardised, by control step; frames that are absent there, not drawn or after the
    end, stay grey. pictures (h, w, 3) by step, cameras side by side, to show in `then` instead of what the
    latents decode to: compression is visible then too. gallery for an encoder without inverse.
    """
    strips = []
    for number, (step, z_hist, imagined, mass) in enumerate(decisions):
        seen = pictures_of(arm, imagined.flatten(0, 1), gallery)  # (N, K, D) -> (N*K, h, w, 3)
        ahead = [step + k * arm.config.world_stride for k in range(1, imagined.shape[1] + 1)]
        if pictures is None:
            known = [s for s in ahead if s in latents]
            came = pictures_of(arm, torch.stack([latents[s] for s in known]), gallery) if known else []
            pictures_ahead = dict(zip(known, came, strict=True))
        else:
            pictures_ahead = pictures
        strips.append(
            strip(
                pictures_of(arm, z_hist, gallery),
                seen.reshape(*imagined.shape[:2], *seen.shape[1:]),  # (N*K, h, w, 3) -> (N, K, h, w, 3)
                [pictures_ahead.get(s) for s in ahead],
                mass,
                arm.config.world_stride,
                f"decision {number}, step {step}, {step / CONTROL_HZ:.2f} s",
            )
        )
    return strips


# ---- layout -------------------------------------------------------------------------------------------


def strip(
    past: np.ndarray,
    imagined: np.ndarray,
    future: np.ndarray | Sequence[np.ndarray | None] | None,
    mass: Tensor | Sequence[float] | None = None,
    stride: int = 1,
    title: str = "",
) -> np.ndarray:
    """Lay one decision out, (H, W, 3) uint8: past above, then a row a hypothesis, then what came.

    Args: past (T, h, w, 3), imagined (N, K, h, w, 3), future (k <= K, h, w, 3), all uint8; frames of the
    future that are missing, at the end or None, are grey. mass (N,), shares of attention; stride, control
    steps between two frames. Pictures are enlarged by a whole factor, to LEAST pixels or more.
    """
    count, ahead = imagined.shape[:2]
    assert future is None or len(future) <= ahead, f"{len(future)} frames came, only {ahead} were imagined"
    came = [*([] if future is None else future), *[None] * ahead][:ahead]
    before = [moment((t + 1 - len(past)) * stride) for t in range(len(past))]
    after = [moment((k + 1) * stride) for k in range(ahead)]
    rows = list(zip(hypothesis_labels(count, mass), imagined, strict=True))
    blocks = [(before, [("past", past)]), (after, [*rows, ("then", came)])]
    return draw_blocks(blocks, cell_size([*past, *imagined.reshape(-1, *imagined.shape[2:]), *came]), title)


def moment(steps: int) -> str:
    """Name a column by its seconds from the decision."""
    return "now" if steps == 0 else f"{steps / CONTROL_HZ:+.2f} s"


def hypothesis_labels(count: int, mass: Tensor | Sequence[float] | None) -> list[str]:
    """Name the rows of hypotheses; one alone needs neither number nor share."""
    if count == 1:
        return ["imagined"]
    shares = [""] * count if mass is None else [f"  {float(share):.2f}" for share in mass]
    return [f"imagined {n + 1}{share}" for n, share in enumerate(shares)]


def cell_size(pictures: Sequence[np.ndarray | None]) -> tuple[int, int]:
    """Give the (width, height) at which pictures (h, w, 3) are shown: the largest one's, enlarged."""
    height, width = max(p.shape[:2] for p in pictures if p is not None)
    factor = max(1, -(-LEAST // min(height, width)))  # ceil
    return width * factor, height * factor


def draw_blocks(
    blocks: list[tuple[list[str], list[tuple[str, Sequence[np.ndarray | None]]]]],
    cell: tuple[int, int],
    title: str,
) -> np.ndarray:
    """Draw blocks of (column labels, rows of (label, pictures)) below one another, None as grey."""
    font, (width, height) = ImageFont.load_default(FONT), cell
    labels = [label for _, rows in blocks for label, _ in rows]
    left = MARGIN + max(round(font.getlength(label)) for label in labels) + MARGIN
    right = left + max(len(heads) for heads, _ in blocks) * (width + GAP) - GAP + MARGIN
    bottom = MARGIN + bool(title) * LINE + len(blocks) * (LINE + MARGIN) + len(labels) * (height + GAP)
    canvas = Image.new("RGB", (right, bottom), "white")
    draw, y = ImageDraw.Draw(canvas), MARGIN
    if title:
        draw.text((MARGIN, y), title, INK, font)
        y += LINE
    for heads, rows in blocks:
        for column, head in enumerate(heads):
            middle = left + column * (width + GAP) + width / 2
            draw.text((middle, y + LINE / 2), head, INK, font, anchor="mm")
        y += LINE
        for label, pictures in rows:
            draw.text((left - MARGIN, y + height / 2), label, INK, font, anchor="rm")
            for column, picture in enumerate(pictures):
                x = left + column * (width + GAP)
                if picture is None:
                    draw.rectangle((x, y, x + width - 1, y + height - 1), GREY)
                else:
                    canvas.paste(Image.fromarray(picture).resize(cell, Image.Resampling.NEAREST), (x, y))
            y += height + GAP
        y += MARGIN
    return np.asarray(canvas)


def contact_sheet(strips: Sequence[np.ndarray], most: int = ON_SHEET) -> np.ndarray:
    """Stack up to `most` evenly spaced strips (H, W, 3), a thin line between two."""
    chosen = np.linspace(0, len(strips) - 1, min(most, len(strips))).round().astype(int)
    width, parts = max(s.shape[1] for s in strips), []
    for i in chosen:
        parts.append(np.full((1, width, 3), RULE, np.uint8))
        short = width - strips[i].shape[1]
        parts.append(np.pad(strips[i], ((0, 0), (0, short), (0, 0)), constant_values=255))
    return np.concatenate(parts[1:])


def save_strips(folder: Path, name: str, strips: Sequence[np.ndarray]) -> list[Path]:
    """Write an episode's strips as `name_d000.png`, .. and its contact sheet `name.png`; give the paths.

    Each is written beside, then renamed: none is ever half there. Without strips nothing is written.
    """
    if not strips:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"{name}_d{number:03d}.png": picture for number, picture in enumerate(strips)}
    drawn[f"{name}.png"] = contact_sheet(strips)
    for file, picture in drawn.items():
        with beside(folder / file) as partial:
            Image.fromarray(picture).save(partial)
    return [folder / file for file in drawn]
