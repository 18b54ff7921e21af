"""One arm of the experiment: a policy, the prophet that feeds its memory, and the statistics of both.

What `train.py` trains, `eval.py` rolls out and a checkpoint folder holds: the policy in lerobot's layout,
everything that is ours (fusion, prophet, world encoder, their config) in one file beside it,
`world.safetensors`.

    arm, processor = load_arm("runs/demo/E2-s0/last")

Shapes: B batch, R flow draws a sample, T history frames, K future frames, N hypotheses, D latent width, C
chunk, A action.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor

from checkpoint import load_policy, save_policy
from fusion import Fusion
from model import SmolVLA
from processor import Processor
from prophet import (
    NEEDS_HISTORY,
    NEEDS_NOISE,
    NEEDS_PROPHET,
    MemoryMode,
    Prophet,
    absolute,
    change_target,
    counted_steps,
    make_memory,
    world_loss,
)
from world import PCA, WorldConfig, encoder_from_state

WORLD_FILE = "world.safetensors"


@dataclass(frozen=True)
class ArmConfig(WorldConfig):
    """What makes one arm differ from another."""

    fusion: tuple[Literal["none", "late"], ...] = ("none",)
    """Where memory enters the policy: none (E0), late (F1); several may be named."""

    memory: MemoryMode = "pred"
    """Memory that the policy is trained with (ignored with --fusion none)."""

    blind: bool = False
    """Replace every image by the data set's mean picture (E0b): what the benchmark gives away unseen."""

    history: int = 4
    """Past world latents T that the prophet reads."""

    future: int = 8
    """Future world latents K that it imagines."""

    world_stride: int = 1
    """Control steps (1/20 s) between two world latents."""

    delta: bool = True
    """Predict the change from the present latent rather than the future latent itself."""

    lambda_world: float = 0.2
    """Weight of the world loss beside the action loss."""

    lambda_mag: float = 0.1
    """Weight of the length term inside the world loss; 0 leaves the plain cosine."""

    heads: int = 8
    """Attention heads of each fusion site."""

    gate_init: float = 0.0
    """Initial value of the gates' scalar, before tanh."""

    prophet_layers: int = 2
    """Transformer layers of the prophet."""

    prophet_heads: int = 8
    """Attention heads of the prophet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "none" in self.fusion and len(self.fusion) > 1:
            raise ValueError(f"--fusion {' '.join(self.fusion)}: none excludes the others; name either")
        for flag in ("history", "future", "world_stride"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)} must be at least 1")

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site in self.fusion if site != "none")

    @property
    def mode(self) -> str:
        """The memory mode that applies: `off` where there is no site for it."""
        return self.memory if self.sites else "off"

    @property
    def has_prophet(self) -> bool:
        return self.mode in NEEDS_PROPHET


class Arm(nn.Module):
    """Policy, prophet (where the memory needs one) and world statistics; `forward` gives a batch's losses."""

    def __init__(
        self,
        config: ArmConfig,
        policy: SmolVLA,
        encoder: PCA | None,
        scale: Tensor,
        mean_images: dict[str, Tensor],
    ) -> None:
        """Args: encoder, None for an arm without memory; scale (K,), each change's RMS length;
        mean_images per camera (3, S, S) uint8, for a blind arm."""
        super().__init__()
        self.config, self.policy, self.encoder = config, policy, encoder
        self.prophet: Prophet | None = None
        latent = config.world_dim
        if config.sites:
            widths = {"late": policy.config.expert_width}
            policy.fusion = Fusion(
                config.sites, widths, latent, config.future, config.heads, config.gate_init
            )
        if config.has_prophet:
            self.prophet = Prophet(
                latent, config.history, config.future, config.prophet_layers, config.prophet_heads
            )
        self.register_buffer("scale", scale)
        self.mean_images = nn.Module()  # of buffers, so that pictures do not count as parameters
        for name, picture in mean_images.items():
            self.mean_images.register_buffer(name.replace(".", "/"), picture)

    def new_modules(self) -> list[nn.Module]:
        """The modules that a plain policy does not have."""
        return [m for m in (self.policy.fusion, self.prophet) if m is not None]

    def blindfold(self, batch: dict) -> dict:
        """Replace the cameras' images by the mean picture, as a batch of one, where the arm is blind."""
        if not self.config.blind:
            return batch
        pictures = self.mean_images.named_buffers()
        return batch | {name.replace("/", "."): picture[None] for name, picture in pictures}

    def needs(self, mode: str) -> dict[str, bool]:
        """What a rollout under `mode` must supply: past latents, Gaussian noise.

        Raises ValueError for a mode that this arm cannot have.
        """
        if mode not in ("off", "zero") and not self.config.sites:
            raise ValueError(
                f"--memory {mode}: this arm has no fusion site to give memory to; only off applies"
            )
        if mode in NEEDS_PROPHET and self.prophet is None:
            raise ValueError(
                f"--memory {mode} needs a prophet, and this arm has none: choose off, zero, random or current"
            )
        return {"history": mode in NEEDS_HISTORY, "noise": mode in NEEDS_NOISE}

    def memory(
        self, mode: str, like: Tensor, z_hist: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Make the memory (B, N*K, D) of `mode` and, where the prophet ran, its raw predictions (B, N, K, D).

        Args: like (B, D) gives batch, width and type; z_hist (B, T, D); noise (B, N*K, D).
        """
        predicted = futures = None
        if mode in NEEDS_PROPHET and self.prophet is not None:
            predicted = self.prophet(z_hist)
            futures = absolute(predicted, z_hist, self.config.delta)
        dim_std = self.encoder.stats.dim_std.to(like) if mode in NEEDS_NOISE else None
        steps = self.config.future
        memory = make_memory(
            mode, steps, z_hist=z_hist, futures=futures, noise=noise, dim_std=dim_std, like=like
        )
        return memory, predicted

    def forward(self, inputs: dict, world: dict, noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Compute a batch's losses before any reduction.

        Args: inputs as `Processor` makes them; world with "z_hist" (B, T, D), "z_future" (B, K, D), "valid"
        (B, K) and "noise" (B, N*K, D) where the arm's mode needs them; noise (B, R, C, A_max), time (B, R).
        Returns: "action" (B, R, C, A); with a prophet "world" (B, N), "counted" (B,) and "world_cos" (B, N).
        """
        mode = self.config.mode
        like = world.get("z_hist", noise.new_zeros(len(noise), 1, self.config.world_dim))[:, -1]
        memory, predicted = self.memory(mode, like, world.get("z_hist"), world.get("noise"))
        out = {"action": self.policy(inputs, noise, time, memory)}
        if predicted is not None:
            target = change_target(world["z_hist"], world["z_future"], self.config.delta)
            loss, counted, cosine = world_loss(
                predicted, target, world["valid"], self.scale, self.config.lambda_mag
            )
            out |= {"world": loss, "counted": counted, "world_cos": cosine}
        return out

    def counts(self, world: dict) -> Tensor:
        """Which samples (B,) bool the world loss will count: train.py divides by their number."""
        target = change_target(world["z_hist"], world["z_future"], self.config.delta)
        return counted_steps(target, world["valid"], self.scale).any(1)

    @torch.no_grad()
    def act(
        self,
        inputs: dict,
        noise: Tensor,
        mode: str,
        z_hist: Tensor | None = None,
        memory_noise: Tensor | None = None,
    ) -> Tensor:
        """Predict a chunk of normalised actions (B, C, A) under a memory mode."""
        memory, _ = self.memory(
            mode, noise.new_zeros(len(noise), self.config.world_dim), z_hist, memory_noise
        )
        return self.policy.predict_chunk(inputs, noise, memory)


def save_arm(folder: Path, arm: Arm, processor: Processor) -> None:
    """Write a checkpoint folder: the policy as lerobot loads it, and what is ours in `world.safetensors`."""
    save_policy(folder, arm.policy, processor)
    tensors = {name: t.contiguous() for name, t in arm.state_dict().items() if is_ours(name)}
    if arm.encoder is not None:
        tensors |= {f"encoder.{name}": t.contiguous() for name, t in arm.encoder.state().items()}
    config = json.dumps(dataclasses.asdict(arm.config))
    save_file(tensors, folder / WORLD_FILE, metadata={"config": config})


def is_ours(name: str) -> bool:
    """Whether a tensor of an arm's state is not part of lerobot's policy."""
    return not name.startswith("policy.") or name.startswith("policy.fusion.")


def load_arm(folder: str | Path, **how: object) -> tuple[Arm, Processor]:
    """Load an arm from a checkpoint folder; lerobot's own, without `world.safetensors`, has no memory.

    What else `load_policy` takes goes to it.

    Raises ValueError, one line, where the folder is incomplete or its files do not fit one another.
    """
    policy, processor = load_policy(folder, **how)
    path = Path(folder) / WORLD_FILE
    if not path.is_file():
        return Arm(ArmConfig(), policy, None, torch.ones(ArmConfig.future), {}), processor
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            config = ArmConfig(**{k: as_tuple(v) for k, v in json.loads(file.metadata()["config"]).items()})
    except (safetensors.SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}): take the checkpoint before it") from error
    encoded = {n.removeprefix("encoder."): tensors.pop(n) for n in list(tensors) if n.startswith("encoder.")}
    images = {
        n.removeprefix("mean_images.").replace("/", "."): t
        for n, t in tensors.items()
        if n.startswith("mean_images.")
    }
    encoder = encoder_from_state(encoded, config) if encoded else None
    arm = Arm(config, policy, encoder, tensors["scale"], images)
    wanted = {name for name in arm.state_dict() if is_ours(name)}
    if wanted != set(tensors):
        raise ValueError(
            f"{path} does not fit its config; tensors that differ: {', '.join(sorted(wanted ^ set(tensors)))}"
        )
    arm.load_state_dict(tensors, strict=False)
    return arm, processor


def as_tuple(value: object) -> object:
    """Undo JSON's turning of tuples into lists."""
    return tuple(value) if isinstance(value, list) else value
