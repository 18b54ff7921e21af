"""AdamW, its schedule over the budget of samples, steps that were not finite, an average of the weights.

optimizer = make_optimizer(config, arm)          # config: OptimiseConfig
pytest tests/test_train.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from arm import Arm
from files import LARGEST

DECAY_SAMPLES = 64  # a step of the default batch size

# ---- optimiser and schedule ---------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimiseConfig:
    """The budget, and how it is spent."""

    total_samples: int | None = None
    """Training budget in samples, kept exactly; default: the recipe's of --init."""

    batch_size: int | None = None
    """Samples of an optimiser step, over all ranks; default: the recipe's of --init."""

    accumulate: int = 1
    """Micro batches that each rank splits its share of a step into."""

    lr: float | None = None
    """Peak learning rate; default: the recipe's of --init."""

    lr_world: float | None = None
    """Peak learning rate of fusion and prophet; default: the same as --lr."""

    lr_end: float = 0.025
    """Final learning rate as a share of the peak."""

    warmup_samples: int = 6_400
    """Samples over which the learning rate rises; at most a tenth of the budget is used."""

    weight_decay: float = 1e-10
    """AdamW's weight decay (gates have none)."""

    grad_clip: float = 10.0
    """Largest gradient norm."""

    ema: float = 0.0
    """Decay, over 64 samples, of a moving average of what trains; 0: none. Checkpoints then hold the average
    as their weights, and beside it what to train on; held-out losses are the average's too."""

    limits: ClassVar = {
        **dict.fromkeys(("total_samples", "batch_size", "accumulate"), (1, LARGEST)),
        **dict.fromkeys(("lr", "lr_world", "lr_end"), (0, 100)),
        **{
            "ema": (0, 0.9999),
            "warmup_samples": (0, LARGEST),
            "weight_decay": (0, 100),
            "grad_clip": (1e-9, LARGEST),
        },
    }


def make_optimizer(config: OptimiseConfig, arm: Arm) -> torch.optim.AdamW:
    """AdamW in three groups: the policy's own weights; the new modules'; their gates, without decay."""
    new = {id(p) for module in arm.new_modules() for p in module.parameters()}
    lr_world = config.lr if config.lr_world is None else config.lr_world
    decay = config.weight_decay
    own, world, gates = groups = (
        {"params": [], "lr": config.lr, "peak": config.lr, "weight_decay": decay},
        {"params": [], "lr": lr_world, "peak": lr_world, "weight_decay": decay},
        {"params": [], "lr": lr_world, "peak": lr_world, "weight_decay": 0.0},
    )
    for name, p in arm.named_parameters():
        if p.requires_grad:
            group = gates if name.endswith(".gate") else world if id(p) in new else own
            group["params"].append(p)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)


def lr_factor(config: OptimiseConfig, done: int) -> float:
    """Share of the peak learning rate after `done` samples: linear warm-up, then cosine down to `lr_end`."""
    warmup = min(config.warmup_samples, config.total_samples // 10)
    if done < warmup:
        return (done + config.batch_size) / (warmup + config.batch_size)
    progress = (done - warmup) / max(1, config.total_samples - warmup)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---- bad steps ----------------------------------------------------------------------------------------


class BadSteps:
    """Counts on the device the steps that were skipped, since their gradient was not finite."""

    def __init__(self, device: torch.device, total: int = 0, in_a_row: int = 0) -> None:
        # in all; since the last step that was taken; the longest row of them
        self.counts = torch.tensor([total, in_a_row, in_a_row], device=device)

    def see(self, bad: Tensor) -> None:
        """Note a step, () bool."""
        total, row, longest = self.counts
        row = (row + 1) * bad
        self.counts = torch.stack([total + bad, row, torch.maximum(longest, row)])

    def read(self) -> tuple[int, int, int]:
        """Give all, those at the end, and the longest row."""
        total, row, longest = self.counts.tolist()
        return total, row, longest


# ---- average ------------------------------------------------------------------------------------------


class Average:
    """Exponential moving average, in float32, of what trains (--ema).

    It counts samples: a skipped step moves it as well, towards the weights that stayed.
    """

    def __init__(self, arm: Arm, decay: float) -> None:
        """Begin at the weights that the arm has now."""
        self.decay = decay
        self.params = {name: p for name, p in arm.named_parameters() if p.requires_grad}
        self.mean = {name: p.detach().clone() for name, p in self.params.items()}

    def update(self, count: int) -> None:
        """Move on by a step of `count` samples: --ema is the decay over DECAY_SAMPLES, whatever the batch."""
        move = get_ema_multi_avg_fn(self.decay ** (count / DECAY_SAMPLES))
        move(list(self.mean.values()), [p.detach() for p in self.params.values()], None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the arm hold the average for a while, to be measured or saved."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        for name, p in self.params.items():
            p.data, self.mean[name] = self.mean[name], p.data

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor]) -> None:
        """Give the arm back the weights to train on: after loading it holds the average."""
        for name, p in self.params.items():
            p.copy_(weights[name])
