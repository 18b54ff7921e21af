"""What a numbered sample stands for: its frame, noise and flow times, past, future and partner.

Everything random about a sample is drawn here, on the CPU, from a generator keyed by (seed, number): never by
batch, rank or the order of calls. Training, and the measurements on held-out episodes between, read the same
demonstrations (readers/) through this file, with different streams of randomness.

    source = Source(arm, processor, demos, latents, torch.device("cpu"), seed=0)
    inputs, world, noise, times = source.batch(np.arange(16))      # what `Arm.forward` takes

    python data.py inspect DATA                # episodes, tasks, cameras, ranges; sample pictures
    python data.py check DATA                  # what is wrong with it

Shapes: F frames, B batch, R flow draws a sample, C actions in a chunk, A_max the model's action width, T
history, K future, N hypotheses, D latent width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from arm import Arm, ArmConfig
from files import Refused
from latents.tower import Features
from latents.world import Latents
from prophet import METHODS, prophet_width
from readers.demos import Demos
from readers.prefetch import Loader
from readers.selection import plain_text
from smolvla.processor import Processor

ORDER_STREAM = 0x0DE5  # keeps the data order apart from any other stream that is keyed by the same seed
FLOW, MEMORY, PARTNER, CHANCE, DROP = 1, 2, 3, 4, 5  # keep apart what one number draws
TRAINING, ROLLOUT, HELD_OUT = 0, 10, 20  # and what it is drawn for
SPLIT_STREAM = 31
EARLY = 0.1  # of an episode: where it may still go several ways
PARTNERS = 1024  # pasts that travel with an arm, for `shuffle` in rollouts


@dataclass
class Source:
    """What batches are made from: samples are numbered over the run; a number decides all that is random."""

    arm: Arm
    processor: Processor
    demos: Demos
    latents: Latents | None
    device: torch.device
    seed: int
    draws: int = 1
    stream: int = TRAINING
    frames: np.ndarray | None = None  # those that are drawn from; default: all
    features: Features | None = None  # stand in for the pictures, where given
    loader: Loader | None = None  # decodes what `expect` is told, while something else is done

    def __post_init__(self) -> None:
        if self.frames is None:
            self.frames = np.arange(len(self.demos))

    def batch(self, numbers: np.ndarray) -> tuple[dict, dict, Tensor, Tensor]:
        """Make `Arm.forward`'s arguments for these global sample numbers, consecutive ones."""
        index = self.index(numbers)
        world = self.world(index, numbers, self.arm.config.trains_on)
        return self.observe(index), world, *self.flow(numbers)

    def index(self, numbers: np.ndarray) -> np.ndarray:
        """Return these samples' frames; the numbers are consecutive, the data have one order an epoch."""
        return self.frames[sample_order(len(self.frames), self.seed, int(numbers[0]), len(numbers))]

    def expect(self, numbers: np.ndarray) -> None:
        """Have the pictures of a coming batch decoded in the background."""
        if self.loader is not None:
            self.loader.expect(self.index(numbers), self.cameras)

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras whose pictures are read."""
        blind = self.arm.config.blind or self.features is not None
        return () if blind else self.arm.policy.config.given_cameras

    def observe(self, index: np.ndarray) -> dict:
        """Make the policy's inputs of these frames, actions included."""
        policy = self.arm.policy.config
        batch = self.demos.batch(index, policy.chunk_size, self.cameras)
        if self.features is not None:
            batch |= self.features.batch(index)
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return self.processor(self.arm.blindfold(batch))

    def flow(self, keys: np.ndarray) -> tuple[Tensor, Tensor]:
        """Draw noise (B, R, C, A_max) and times (B, R), Beta(1.5, 1) * 0.999 + 0.001."""
        policy = self.arm.policy.config
        shape = (self.draws, policy.chunk_size, policy.max_action_dim)
        noise = np.empty((len(keys), *shape), np.float32)
        times = np.empty((len(keys), self.draws), np.float32)
        for i, key in enumerate(keys):
            rng = self.rng(FLOW, key)
            noise[i] = rng.standard_normal(shape, np.float32)
            times[i] = rng.beta(1.5, 1.0, self.draws) * 0.999 + 0.001
        return torch.from_numpy(noise).to(self.device), torch.from_numpy(times).to(self.device)

    def world(self, index: np.ndarray, keys: np.ndarray, needed: tuple[str, ...]) -> dict[str, Tensor]:
        """Gather past and future latents, partners' pasts and hypotheses' noise, those that are `needed`."""
        config, out = self.arm.config, {}
        if "z_hist" in needed:
            out["z_hist"] = self.past(index)  # (B, T, D)
        if "z_future" in needed:
            future, valid = self.demos.future(index, config.future, config.world_stride)
            out |= {"z_future": self.latents.z[future], "valid": torch.as_tensor(valid)}  # (B, K, D), (B, K)
            out["early"] = torch.as_tensor(self.demos.phase(index) < EARLY)  # (B,)
        if "z_partner" in needed:
            out["z_partner"] = self.past(self.partners(index, keys))
        if "z_other" in needed:
            out["z_other"] = self.past(self.partners(index, keys, other_task=True))
        if "dropped" in needed:
            share = config.memory_dropout
            out["dropped"] = torch.tensor([self.rng(DROP, key).random() < share for key in keys])
        if "noise" in needed:
            out["noise"] = stack(memory_noise(config, self.hypotheses(MEMORY, key)) for key in keys)
        if "chance" in needed:
            out["chance"] = stack(chance(config, self.hypotheses(CHANCE, key)) for key in keys)
        return {name: tensor.to(self.device) for name, tensor in out.items()}

    def past(self, index: np.ndarray) -> Tensor:
        """Look up the histories (B, T, D) of these frames."""
        config = self.arm.config
        return self.latents.z[self.demos.history(index, config.history, config.world_stride)]

    def partners(self, index: np.ndarray, keys: np.ndarray, other_task: bool = False) -> np.ndarray:
        """Draw a frame of another episode, or task, for each frame (B,); Refused where there is none."""
        of = self.demos.task if other_task else self.demos.episode
        if len(np.unique(of[self.frames])) < 2:
            mode, what = ("wrong_task", "tasks") if other_task else ("shuffle", "episodes")
            raise Refused(f"--memory {mode} needs demonstrations of at least two {what}: record more")
        found = []
        for frame, key in zip(index, keys, strict=True):
            rng = self.rng(PARTNER, key)
            while of[other := self.frames[rng.integers(len(self.frames))]] == of[frame]:
                continue
            found.append(other)
        return np.array(found)

    def hypotheses(self, what: int, key: int) -> list[np.random.Generator]:
        """One generator a hypothesis, so that what is drawn for one does not depend on their number."""
        return [self.rng(what, key, n) for n in range(self.arm.config.num_hypotheses)]

    def rng(self, what: int, *key: int) -> np.random.Generator:
        return sample_rng(self.seed, self.stream + what, *map(int, key))


def memory_noise(config: ArmConfig, rngs: list[np.random.Generator]) -> np.ndarray:
    """Draw one sample's rows (N*K, D) of `random` memory, unit Gaussian."""
    shape = (config.future, config.world_dim)
    return np.concatenate([rng.standard_normal(shape, np.float32) for rng in rngs])


def chance(config: ArmConfig, rngs: list[np.random.Generator]) -> np.ndarray:
    """Draw what tells one sample's hypotheses apart, (N, ., h)."""
    return METHODS[config.hypothesis_method].draw(rngs, config, prophet_width(config.world_dim))


def stack(rows: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(rows)))


def held_out(demos: Demos, share: float) -> np.ndarray:
    """Choose the episodes that are not trained on: the same ones for every arm and seed.

    Raises Refused where nothing would be left on one side.
    """
    count = round(share * len(demos.first))
    if not 0 < count < len(demos.first):
        raise Refused(
            f"--val-share {share} of {len(demos.first)} episodes holds {count} out: at least one must be, "
            "and one must be left"
        )
    return np.sort(sample_rng(0, SPLIT_STREAM).permutation(len(demos.first))[:count])


def saved_partners(
    demos: Demos, z: Tensor, history: int, stride: int, frames: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Choose pasts (n, T, D) that travel with an arm, and where they are from, (n, 3): episode, step, task.

    Whole episodes, evenly over those that are trained on, each at steps evenly over its length: a rollout's
    partner stays one episode, and is met at the step that the rollout is at.
    """
    episodes = np.unique(demos.episode[frames])
    some = episodes[np.linspace(0, len(episodes) - 1, min(len(episodes), 64)).round().astype(np.int64)]
    each = PARTNERS // len(some)
    chosen = [spread_over(demos.first[e], demos.last[e], each) for e in some]
    rows = np.concatenate(chosen)
    tasks = [zlib.crc32(plain_text(task).encode()) for task in demos.tasks]
    step, task = demos.step, demos.task
    at = [(e, step[f], tasks[task[f]]) for e, found in zip(some, chosen, strict=True) for f in found]
    return z[demos.history(rows, history, stride)], torch.tensor(at, dtype=torch.int64)


def spread_over(first: int, last: int, count: int) -> np.ndarray:
    """Up to `count` numbers evenly from first to last, both included."""
    return np.unique(np.linspace(first, last, min(count, last - first + 1)).round().astype(np.int64))


def partner_rows(
    at: Tensor, key: tuple[int, ...], seed: int, step: int, instruction: str | None = None
) -> int:
    """Choose a rollout's partner among saved pasts: its episode by the episode's key, then its step.

    Args: at (n, 3) as `saved_partners` gives it; instruction, where the partner must be of another task.
    Raises Refused where there is none.
    """
    other = torch.ones(len(at), dtype=torch.bool)
    if instruction is not None:
        other = at[:, 2] != zlib.crc32(plain_text(instruction).encode())
        if not other.any():
            raise Refused("--memory wrong_task: this arm was trained on one task alone; leave it out")
    episodes = at[other, 0].unique()
    mine = episodes[int(sample_rng(seed, ROLLOUT + PARTNER, *key).integers(len(episodes)))]
    rows = torch.nonzero((at[:, 0] == mine) & other)[:, 0]
    past = int((at[rows, 1] <= step).sum())  # none, where the other task begins later in that episode
    return int(rows[max(past, 1) - 1])


# ---- keyed randomness --------------------------------------------------------------------------------


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of this seed and key: the same wherever and in whatever order it is asked for.

    The key's length goes in too, and each number must fit in 32 bits: numpy pads its entropy with zeros and
    splits big numbers into words, so that (1, 2) and (1, 2, 0) would otherwise share one stream.
    """
    if not all(0 <= number < 2**32 for number in (seed, *key)):
        raise Refused(f"seed and key must lie in 0..2**32-1, got {(seed, *key)}: choose another --seed")
    return np.random.default_rng([len(key), seed, *(int(number) for number in key)])


def sample_order(num_frames: int, seed: int, first: int, count: int) -> np.ndarray:
    """Return the frames (count,) int64 of global samples first .. first+count-1: one permutation an epoch,
    keyed by seed and epoch, so that a resumed or wider run sees the same order."""
    assert num_frames > 0 and first >= 0 and count >= 0, f"bad sample range {(num_frames, first, count)}"
    epoch, place = np.divmod(np.arange(first, first + count), num_frames)
    parts = [epoch_order(num_frames, seed, int(e))[place[epoch == e]] for e in np.unique(epoch)]
    return np.concatenate([np.empty(0, np.int64), *parts])


@lru_cache(maxsize=4)
def epoch_order(num_frames: int, seed: int, epoch: int) -> np.ndarray:
    """Return one epoch's permutation (num_frames,) int64, read-only since it is shared."""
    order = sample_rng(seed, ORDER_STREAM, epoch).permutation(num_frames)
    order.setflags(write=False)
    return order


if __name__ == "__main__":
    from readers import check

    check.main()
