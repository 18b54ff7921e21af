"""One optimiser step: shares of ranks and micro batches, losses, gradients, AdamW and its schedule.

Losses are sums over what counts, divided by its count over the whole step; which samples a step has, and what
is random about them, follows from their numbers. So ranks and accumulation change nothing but the order of
a sum.

    out = optimizer_step(config, source, model, optimizer, first=0, count=64, rank=0, ranks=1)
    pytest tests/test_train.py

Shapes: B batch.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from arm import Arm
from diagnostics import gradient_norms
from model import masked_mean
from source import Source

if TYPE_CHECKING:
    from train import TrainConfig


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
    optimizer.step()
    facts = {"sums": logs, "counts": counts, "lr": optimizer.param_groups[0]["lr"]}
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


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
