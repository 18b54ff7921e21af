"""FLOPs are counted as bench counts them, for every arm; shares of a peak only where the peak is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch

from arm import Arm
from bench import speed as bench
from training.flops import PEAKS, flops_per_sample, utilisation


@dataclasses.dataclass
class Batches:
    """Stands where source.Source does: random batches of any size."""

    arm: Arm
    case: bench.Case

    def batch(self, numbers: np.ndarray) -> tuple:
        return bench.batch_of(dataclasses.replace(self.case, batch=len(numbers)), self.arm, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("fields", [*bench.SITES.values(), *bench.BANKS.values()], ids=str)
def test_a_samples_flops_are_a_batchs_share_at_every_site(fields):
    case = bench.Case("some case", "step", "tiny", "float32", 4, 1, arm=fields)
    arm = bench.build(case, "meta")
    assert flops_per_sample(arm, Batches(arm, case)) == bench.count_flops(case) // 4


@pytest.mark.parametrize("memory", ["oracle", "zero", "random", "shuffle", "signflip", "current", "history"])
def test_every_memory_mode_can_be_counted(memory):
    arm = tiny.arm(memory)
    noise, time = tiny.flow(2)

    class Two:
        def batch(self, numbers: np.ndarray) -> tuple:
            return tiny.inputs(2), tiny.world(2), noise, time

    found = flops_per_sample(arm, Two())
    assert found > 0 and all(p.grad is None and p.device.type == "cpu" for p in arm.parameters())


def test_what_is_frozen_is_not_gone_back_through():
    case = bench.Case("some case", "step", "tiny", "float32", 1, 1)
    arm = bench.build(case, "cpu")
    frozen = flops_per_sample(arm, Batches(arm, case))
    arm.policy.freeze("none")
    assert flops_per_sample(arm, Batches(arm, case)) > 1.5 * frozen


def test_a_blind_arms_one_picture_is_no_samples_cost():
    seeing, blind = (tiny.arm(fusion=("none",), blind=flag) for flag in (False, True))

    class Source:
        def __init__(self, arm: Arm) -> None:
            self.arm = arm

        def batch(self, numbers: np.ndarray) -> tuple:
            inputs = tiny.inputs(len(numbers))
            if self.arm.config.blind:
                inputs["images"] = [x[:1] for x in inputs["images"]]
            return inputs, {}, *tiny.flow(len(numbers))

    assert flops_per_sample(blind, Source(blind)) < flops_per_sample(seeing, Source(seeing))


def test_utilisation_needs_a_known_device_and_its_type():
    assert utilisation(10**12, 494.7, "NVIDIA H200", torch.bfloat16) == pytest.approx(0.5)
    assert utilisation(10**12, 494.7, "NVIDIA H200", torch.float32) is None
    assert utilisation(10**12, 494.7, "cpu", torch.bfloat16) is None
    assert utilisation(10**12, 494.7, "NVIDIA H100 PCIe", torch.bfloat16) is None
    assert all(1e14 < peak < 2e15 for peak in PEAKS.values())
