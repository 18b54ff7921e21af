"""One optimiser step: shares of ranks and micro batches, losses, gradients, AdamW, its schedule, an average.

Losses are sums over what counts, divided by its count over the whole step; which samples a step has, and what
is random about them, follows from their numbers. So ranks and accumulation change nothing but the order of
a sum.

    out = optimizer_step(config, source, model, optimizer, first=0, count=64, rank=0, ranks=1)
    pytest tests/test_train.py

Shapes: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from arm import Arm
from data import Source
from model import masked_mean
from ranks import sum_over_ranks
from training.diagnostics import gradient_norms

if TYPE_CHECKING:
    from train import TrainConfig

DECAY_SAMPLES = 64  # a step of the default batch size

# ---- optimiser and schedule ---------------------------------------------------------------------------


def make_optimizer(config: TrainConfig, arm: Arm) -> torch.optim.AdamW:
    """AdamW in three groups: the policy's own weights; the new modules'; their gates, without decay."""
    new = {id(p) for module in arm.new_modules() for p in module.parameters()}
    lr_world, decay = config.lr_world or config.lr, config.weight_decay
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


def lr_factor(config: TrainConfig, done: int) -> float:
    """Share of the peak learning rate after `done` samples: linear warm-up, then cosine down to `lr_end`."""
    warmup = min(config.warmup_samples, config.total_samples // 10)
    if done < warmup:
        return (done + config.batch_size) / (warmup + config.batch_size)
    progress = (done - warmup) / max(1, config.total_samples - warmup)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# ---- one optimiser step -------------------------------------------------------------------------------


def shares(first: int, count: int, rank: int, ranks: int, accumulate: int) -> list[tuple[np.ndarray, float]]:
    """This rank's micro batches of the step over samples first..first+count-1: numbers and weight.

    Where a step has fewer samples than micro batches, a rank runs sample `first` with weight 0, so that all
    ranks take part in every collective.
    """
    parts = np.array_split(np.arange(first, first + count), ranks * accumulate)
    mine = parts[rank * accumulate : (rank + 1) * accumulate]
    return [(part, 1.0) if len(part) else (np.array([first]), 0.0) for part in mine]


def optimizer_step(
    config: TrainConfig,
    source: Source,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    count: int,
    rank: int,
    ranks: int,
    logged: bool = True,
) -> dict:
    """Take one step on samples first..first+count-1; gives this rank's sums for `log_line`, on the device.

    The losses are sums over what counts (unpadded action terms; samples with a counted future), divided by
    that count over the whole step, all ranks and micro batches: ranks and accumulation change nothing but
    the order of a sum.
    """
    micro = [
        (source.batch(numbers), weight)
        for numbers, weight in shares(first, count, rank, ranks, config.accumulate)
    ]
    counts = sum_over_ranks(sum(weight * count_terms(source, batch) for batch, weight in micro))
    optimizer.zero_grad(set_to_none=True)
    winners = []
    logs = torch.zeros(3, device=source.device)  # action loss, world loss, world cosine: sums
    for i, (batch, weight) in enumerate(micro):
        last = i == len(micro) - 1
        with nullcontext() if last or ranks == 1 else model.no_sync():
            out = model(*batch)
            action, _ = masked_mean(out["action"], batch[0]["is_pad"])
            loss = action / counts[0]
            sums = [action.detach(), torch.zeros_like(action), torch.zeros_like(action)]
            if "world" in out:
                world = torch.where(out["counted"], out["world"], 0).sum()
                loss = loss + config.lambda_world * world / counts[1].clamp(min=1)
                sums[1], sums[2] = world.detach(), out["world_cos"].mean(1).sum()
                winners.append(out["winner"])
            (loss * ranks * weight).backward()  # DDP averages over ranks; times `ranks` makes it the sum
        logs += weight * torch.stack(sums)
    norms = gradient_norms(source.arm) if logged else {}  # before they are clipped
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor(config, first)
    # Gradients are the sum over ranks by now, so all ranks see the same norm and skip the same steps. The
    # fused kernel does the skipping (this is how GradScaler asks for it): no device waits for the host.
    bad = ~torch.isfinite(norm)
    optimizer.found_inf = bad.float()
    optimizer.step()
    facts = {"sums": logs, "counts": counts, "lr": optimizer.param_groups[0]["lr"], "bad": bad}
    facts |= {"winner": torch.cat(winners)} if winners else {}
    if logged:  # kept for `diagnose`; on other steps the batch and its graph go now
        facts |= {"norms": {"grad_norm": norm} | norms, "batch": batch, "predicted": out.get("predicted")}
    return facts


def count_terms(source: Source, batch: tuple) -> Tensor:
    """How many action terms and how many samples with a counted future a micro batch has, (2,) float64."""
    inputs, world, _, times = batch
    steps = (~inputs["is_pad"]).sum() * times.shape[1] * source.arm.policy.config.action_dim
    moving = torch.zeros((), device=source.device)
    if "valid" in world and source.arm.prophet is not None:
        moving = source.arm.counts(world).sum()
    return torch.stack([steps, moving]).double()


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
