"""Paired action loss on held-out episodes, under every memory mode: the cheapest strong evidence there is.

The same frames, the same flow noise and the same times under each mode, so that modes differ in nothing but
the memory; one number an episode, so that intervals come from episodes, which are independent, not from
frames, which are not. `oracle`, the true futures, is among the modes: nobody has them in a rollout, and what
even they do not improve no prophet will. A smaller action loss is not success: rollouts have the last word.

    python train.py --data data/demo --val-every 6400 --fusion late     # between training steps
    python eval.py runs/run --offline data/demo                         # the episodes that this run held out
    python eval.py runs/run --offline data/other --memory pred oracle   # all episodes of other data

Shapes: E episodes, B batch, R flow draws a frame, C actions in a chunk, A action width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from arm import Arm
from data import HELD_OUT, Source, spread_over
from files import Refused
from model import sample_means
from prophet import MODES
from readers.demos import Demos
from training.diagnostics import most_attended

SEED = 7  # of frames' noise and times: the same for every run, so that runs can be paired as well
DRAWS = 10_000


@dataclass
class Offline:
    """The action losses of some episodes under some modes: squared errors of the velocity, real dimensions
    and unpadded steps."""

    episodes: np.ndarray  # (E,) their numbers in the data
    losses: dict[str, np.ndarray]  # mode -> (E,)

    def check(self, checkpoint: object) -> None:
        """Refuse losses that are not finite: of a policy that is broken, not of one that predicts badly."""
        for mode, losses in self.losses.items():
            if len(broken := self.episodes[~np.isfinite(losses)]):
                raise Refused(
                    f"{checkpoint}, memory {mode}: the action loss of episode {broken[0]} is not finite "
                    f"({len(broken)} of {len(losses)} episodes): the policy is broken; take another one"
                )

    def mean(self, mode: str) -> float:
        return float(self.losses[mode].mean())

    def interval(self, mode: str, against: str | None = None) -> tuple[float, float]:
        """95 % of the bootstrap over episodes: of a mode's loss, or of its difference from another's."""
        values = self.losses[mode] if against is None else self.losses[mode] - self.losses[against]
        return bootstrap(values)


def measurable(arm: Arm, tasks: int) -> list[str]:
    """Name the modes that an arm can be measured under on data of some tasks, oracle among them."""
    found = []
    count = arm.config.num_hypotheses
    for mode in (*MODES, "best1", "mean1", "dup", *(f"drop:{i}" for i in range(count))):
        try:
            arm.needs(mode, rollout=False)
        except Refused:
            continue
        if mode != "wrong_task" or tasks > 1:
            found.append(mode)
    return found if arm.config.sites else ["off"]


def measure(
    source: Source, episodes: np.ndarray, modes: list[str], frames: int = 16, draws: int = 4, batch: int = 16
) -> Offline:
    """Measure the action loss of an arm on `frames` frames an episode, evenly spaced, `draws` draws a frame.

    The arm is put into eval mode meanwhile: a closed gate is skipped, as in a rollout.
    """
    demos, arm = source.demos, source.arm
    # Partners, for `shuffle`, come from any other episode of the data, trained on or not.
    every = np.arange(len(demos))
    source = dataclasses.replace(source, seed=SEED, stream=HELD_OUT, draws=draws, frames=every)
    index = np.concatenate([np.empty(0, np.int64), *(spread(demos, int(e), frames) for e in episodes)])
    training = arm.training
    arm.eval()
    try:
        parts = [source_losses(source, index[i : i + batch], modes) for i in range(0, len(index), batch)]
    finally:
        arm.train(training)
    losses = {mode: np.concatenate([np.empty(0), *(part[mode] for part in parts)]) for mode in modes}
    of = demos.episode[index]
    by_episode = {mode: np.array([rows[of == e].mean() for e in episodes]) for mode, rows in losses.items()}
    return Offline(np.asarray(episodes), by_episode)


@torch.no_grad()
def world_cosine(source: Source, episodes: np.ndarray, frames: int = 16) -> tuple[float, int]:
    """Measure how well an arm's prophet predicts episodes: the sum of cosines, and over how many samples.

    On the same frames as `measure`; the mean over hypotheses, where a future moves at all.
    """
    arm, demos = source.arm, source.demos
    total, count = 0.0, 0
    for episode in episodes:
        index = spread(demos, int(episode), frames)
        needed = ("z_hist", "z_future", *(("chance",) if arm.prophet.chance else ()))
        world = dataclasses.replace(source, seed=SEED, stream=HELD_OUT).world(index, index, needed)
        losses = arm.world_losses(arm.imagine(world["z_hist"], world), world)
        total += losses["world_cos"].mean(1).sum().item()
        count += int(losses["counted"].sum())
    return total, count


def spread(demos: Demos, episode: int, frames: int) -> np.ndarray:
    """Choose up to `frames` frames of an episode, evenly spaced."""
    return spread_over(int(demos.first[episode]), int(demos.last[episode]), frames)


@torch.no_grad()
def source_losses(source: Source, index: np.ndarray, modes: list[str]) -> dict[str, np.ndarray]:
    """Compute each frame's action loss (B,) under each mode, with the frame's own noise and times."""
    arm = source.arm
    inputs, (noise, times) = source.observe(index), source.flow(index)
    needed = {name for mode in modes for name in arm.needs(mode, rollout=False)}
    world, out = source.world(index, index, tuple(needed)), {}
    for mode in modes:
        best = most_attended(arm, inputs, world, noise[:, 0]) if mode == "best1" else None
        memory = arm.memory(mode, arm.like(noise), world, best=best)
        loss = arm.policy(inputs, noise, times, memory)  # (B, R, C, A)
        out[mode] = sample_means(loss, inputs["is_pad"]).double().cpu().numpy()
    return out


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Give the 2.5th and 97.5th percentile of the mean of values (E,), resampled over episodes."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)  # (draws, E) -> (draws,)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table(found: Offline) -> str:
    """Lay the modes out, best first, each against `off` where that was measured."""
    lines = [f"{len(found.episodes)} episodes, action loss (95 % over episodes), difference from off (95 %)"]
    for mode in sorted(found.losses, key=found.mean):
        low, high = found.interval(mode)
        line = f"{mode:9s} {found.mean(mode):8.4f} ({low:.4f} to {high:.4f})"
        if "off" in found.losses and mode != "off":
            low, high = found.interval(mode, "off")
            line += f"  {found.mean(mode) - found.mean('off'):+8.4f} ({low:+.4f} to {high:+.4f})"
        lines.append(line)
    return "\n".join(lines)


def record(found: Offline) -> dict:
    """Give what a line of offline.jsonl holds of a measurement."""
    modes = {}
    for mode, values in found.losses.items():
        modes[mode] = {
            "loss": found.mean(mode),
            "interval": found.interval(mode),
            "episodes": values.tolist(),
        }
        if "off" in found.losses:
            modes[mode]["from_off"] = found.mean(mode) - found.mean("off")
            modes[mode]["from_off_interval"] = found.interval(mode, "off")
    return {"episodes": found.episodes.tolist(), "modes": modes}
