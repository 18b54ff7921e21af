"""What a run starts from: fresh weights, a language model, or a checkpoint, with or without memory.

Everything random is drawn from the seed, the policy first: arms of one seed share its initial weights.

    arm, processor = build_arm(config, demos, latents, frames)      # config: train.TrainConfig
    pytest tests/test_train.py

Shapes: T history, K future, S side of a picture.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from arm import Arm, ArmConfig, Summary, load_arm, stored_config
from data import saved_partners
from latents.world import Latents, change_statistics
from model import SmolVLA, load_policy, start_from_vlm
from readers.demos import Demos, chosen_statistics
from smolvla import kernels
from smolvla.checkpoint import fresh_processor
from smolvla.config import PRESETS
from smolvla.processor import Processor

if TYPE_CHECKING:
    from train import TrainConfig


def build_arm(
    config: TrainConfig, demos: Demos, latents: Latents | None, frames: np.ndarray
) -> tuple[Arm, Processor]:
    """Build the arm at its start; arms of one seed share the policy's initial weights."""
    stored = None if config.init in PRESETS else stored_config(Path(config.init))
    if stored is not None and stored.sites:
        return continue_arm(config, stored)
    policy, processor = build_policy(config, demos)
    images = {}
    if config.blind:
        images = {name: mean_image(demos, name) for name in policy.config.cameras}
    summary, encoder = Summary.none(config), None
    if latents is not None:
        scale, mean = change_statistics(demos, latents.z, config.future, config.world_stride, config.delta)
        partners = saved_partners(demos, latents.z, config.history, config.world_stride, frames)
        summary, encoder = Summary(scale, mean, partners), latents.encoder
    torch.manual_seed(config.seed + 1)
    return Arm(arm_config(config), policy, encoder, summary, images), processor


def continue_arm(config: TrainConfig, stored: ArmConfig) -> tuple[Arm, Processor]:
    """Go on from an arm's checkpoint, memory modules included; ValueError where it is built another way."""
    for field in dataclasses.fields(ArmConfig):
        there, asked = getattr(stored, field.name), getattr(config, field.name)
        if field.name not in ArmConfig.free_to_change and there != asked:
            raise ValueError(
                f"--init {config.init} was trained with {field.name} {there!r}, not {asked!r}: ask for the "
                "same, or start from a checkpoint without memory"
            )
    if stored.has_prophet != config.has_prophet:
        raise ValueError(
            f"--init {config.init} was trained with --memory {stored.memory}, --memory {config.memory} "
            f"{'needs a prophet that it lacks' if config.has_prophet else 'would drop its prophet'}"
        )
    how = {"vlm": config.vlm, "allow_missing": config.allow_missing}
    arm, processor = load_arm(config.init, config.world_model, **how)
    arm.config = arm_config(config)
    return arm, processor


def build_policy(config: TrainConfig, demos: Demos) -> tuple[SmolVLA, Processor]:
    """A fresh preset with statistics and tokenizer from the data, or on a language model; or a checkpoint."""
    torch.manual_seed(config.seed)
    if config.init not in PRESETS:
        return load_policy(config.init, config.revision, config.vlm, config.stats_of, config.allow_missing)
    widths = {"state_dim": demos.state.shape[1], "action_dim": demos.action.shape[1]}
    preset = dataclasses.replace(PRESETS[config.init], cameras=tuple(demos.images), **widths)
    size = next(iter(demos.images.values())).shape[1]
    stats, _ = chosen_statistics(demos)
    floors = {"observation.state": config.state_std_floor, "action": config.action_std_floor}
    for feature, floor in floors.items():
        stats[feature]["std"] = stats[feature]["std"].clamp(min=floor)
    if config.vlm is not None:
        return start_from_vlm(preset, config.vlm, stats, (3, size, size))
    processor = fresh_processor(preset, stats, demos.tasks, (3, size, size))
    return SmolVLA(preset).initialise(), processor


def make_fast(config: TrainConfig, arm: Arm, device: torch.device) -> None:
    """Hold and compute the policy in the wanted type, and take the device's fast path."""
    arm.policy.set_dtype(config.precision(device))
    if config.compile:
        arm.policy.compile_blocks()
    elif device.type == "cpu":
        kernels.keep_memory()
        kernels.speed_up(arm.policy, arm.policy.dtype)


def arm_config(config: TrainConfig) -> ArmConfig:
    """The part of the configuration that stays with a checkpoint."""
    return ArmConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ArmConfig)})


def mean_image(demos: Demos, camera: str) -> Tensor:
    """The data set's mean picture of a camera, (3, S, S) uint8."""
    mean = demos.mean_picture(camera).round().astype(np.uint8)
    return torch.from_numpy(mean).permute(2, 0, 1).contiguous()  # (S, S, 3) -> (3, S, S)
