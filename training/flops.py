"""What a training step costs in FLOPs, and what share of the device's peak a run reaches (MFU).

FLOPs are counted by torch's own counter on a copy of the arm without memory ("meta" tensors): the same code,
nothing computed. Only what trains is gone back through, so the count is what this configuration has to do.

    flops = flops_per_sample(arm, source)
    utilisation(flops, samples_per_second, "NVIDIA H100 80GB HBM3", torch.bfloat16)    # a share; or None

Sources of the peaks: the makers' data sheets, bfloat16 on matrix units, dense (without sparsity), one device
as torch counts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from arm import Arm, Summary
from data import Source
from model import SmolVLA

# By torch.cuda.get_device_name(). A device that is not listed has no MFU, rather than a wrong one.
PEAKS = {
    "AMD Instinct MI300X": 1307.4e12,
    "AMD Instinct MI300X VF": 1307.4e12,  # the same, as a virtual machine sees it
    "AMD Instinct MI250X": 191.5e12,  # one of the two dies of a card
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM; PCIe cards have another name and another peak
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


def flops_per_sample(arm: Arm, source: Source) -> int:
    """Count the FLOPs that a sample adds to a training step, forward and backward, all its flow draws.

    What a step has once, whatever its samples (a blind arm's mean picture, the optimiser), is not in it.
    """
    copy = without_memory(arm)
    one = count(copy, source.batch(np.arange(1)))
    return count(copy, source.batch(np.arange(2))) - one if arm.config.blind else one


def without_memory(arm: Arm) -> Arm:
    """Build an arm of the same shapes on the meta device; the same parameters train."""
    with torch.device("meta"):
        copy = Arm(arm.config, SmolVLA(arm.policy.config), arm.encoder, Summary.none(arm.config), {})
    copy.policy.split = arm.policy.split
    trains = {name: p.requires_grad for name, p in arm.named_parameters()}
    for name, p in copy.named_parameters():
        p.requires_grad_(trains[name])
    return copy


def count(arm: Arm, batch: tuple) -> int:
    """Count the FLOPs of a forward and backward pass of an arm on the meta device."""
    batch = tree_map_only(Tensor, lambda t: t.to("meta"), batch)
    with FlopCounterMode(display=False) as counter, only_math():
        out = arm(*batch)
        (out["action"].mean() + (out["world"].mean() if "world" in out else 0)).backward()
    return counter.get_total_flops()


@contextmanager
def only_math() -> Iterator[None]:
    """Spell attention out, so that the counter sees its products whatever kernels there are."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def utilisation(flops: int, samples_per_second: float, device: str, dtype: torch.dtype) -> float | None:
    """Give the share of the peak (MFU) that one device reaches; None where its peak is not known.

    Args: samples_per_second of this device alone; dtype, the type computed in: peaks are bfloat16's.
    """
    peak = PEAKS.get(device) if dtype == torch.bfloat16 else None
    return None if peak is None else flops * samples_per_second / peak
