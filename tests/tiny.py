"""What several test files need: a small policy and arm, and inputs for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from arm import Arm, ArmConfig, Summary
from latents.encoders import PCA, WorldStats
from model import SmolVLA
from smolvla.config import PRESETS, SmolVLAConfig
from training import run_folder

CONFIG = dataclasses.replace(
    PRESETS["tiny"], vision_width=32, vision_mlp=64, vision_layers=1, image_size=32, patch_size=8, width=64,
    mlp=96, heads=2, kv_heads=1, chunk_size=6, n_action_steps=3, num_steps=3, expert_width=48, vocab_size=300,
)  # fmt: skip
LATENT, HISTORY, FUTURE = 16, 3, 4
STATS = {
    "observation.state": {
        "mean": torch.zeros(8),
        "std": torch.ones(8),
        "min": -torch.ones(8),
        "max": torch.ones(8),
    },
    "action": {
        "mean": torch.full((7,), 0.5),
        "std": torch.full((7,), 2.0),
        "min": torch.zeros(7),
        "max": torch.ones(7),
    },
}


def policy(config: SmolVLAConfig = CONFIG, seed: int = 0) -> SmolVLA:
    torch.manual_seed(seed)
    out = SmolVLA(config).initialise()
    out.freeze("none")
    return out


def inputs(batch: int = 2, config: SmolVLAConfig = CONFIG, seed: int = 1) -> dict:
    """Inputs as a Processor makes them, one language token of the last sample padded."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, -1] = False
    return {
        "images": [torch.rand(batch, 3, 32, 32, generator=g) for _ in config.cameras],
        "image_masks": [None for _ in config.cameras],
        "tokens": torch.randint(config.vocab_size, (batch, 5), generator=g),
        "token_mask": mask,
        "state": torch.randn(batch, config.state_dim, generator=g),
        "action": torch.randn(batch, config.chunk_size, config.action_dim, generator=g),
        "is_pad": torch.arange(config.chunk_size)[None] >= torch.tensor([config.chunk_size, 4])[:batch, None],
    }


def batch(
    size: int = 2, config: SmolVLAConfig = CONFIG, image: tuple[int, int] = (32, 32), seed: int = 1
) -> dict:
    """A batch under lerobot's names, as a Processor takes it."""
    g = torch.Generator().manual_seed(seed)
    pictures = {name: torch.rand(size, 3, *image, generator=g) for name in config.cameras}
    return pictures | {
        "observation.state": torch.randn(size, config.state_dim, generator=g),
        "action": torch.randn(size, config.chunk_size, config.action_dim, generator=g),
        "task": ["open the drawer", "go"] * (size // 2),
    }


def flow(batch: int = 2, draws: int = 1, config: SmolVLAConfig = CONFIG, seed: int = 2):
    """Noise (B, R, C, A_max) and times (B, R)."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, draws, config.chunk_size, config.max_action_dim, generator=g)
    return noise, torch.rand(batch, draws, generator=g) * 0.9 + 0.05


def arm(
    memory: str = "pred",
    fusion: tuple[str, ...] = ("late",),
    policy_config: SmolVLAConfig = CONFIG,
    **fields,
) -> Arm:
    """An arm with a made-up world encoder of width LATENT."""
    config = ArmConfig(
        fusion=fusion,
        memory=memory,
        history=HISTORY,
        future=FUTURE,
        world_dim=LATENT,
        world_resolution=4,
        **fields,
    )
    torch.manual_seed(3)
    stats = WorldStats(torch.zeros(LATENT), torch.ones(1), torch.linspace(0.5, 1.5, LATENT))
    basis = torch.linalg.qr(torch.randn(48, LATENT))[0].T.contiguous()
    encoder = PCA(config, 32, torch.full((48,), 0.5), basis, stats)
    images = (
        {name: torch.full((3, 32, 32), 100, dtype=torch.uint8) for name in CONFIG.cameras}
        if config.blind
        else {}
    )
    g = torch.Generator().manual_seed(8)
    partners = torch.randn(5, HISTORY, LATENT, generator=g)
    summary = Summary.of(torch.ones(FUTURE), torch.randn(FUTURE, LATENT, generator=g) * 0.1, partners)
    return Arm(config, policy(policy_config), encoder, summary, images)


def world(batch: int = 2, seed: int = 4) -> dict:
    """Past and future latents, validity and memory noise, as train.py makes them."""
    g = torch.Generator().manual_seed(seed)
    return {
        "z_hist": torch.randn(batch, HISTORY, LATENT, generator=g),
        "z_future": torch.randn(batch, FUTURE, LATENT, generator=g),
        "valid": torch.tensor([[True] * FUTURE, [True] * (FUTURE - 2) + [False] * 2])[:batch],
        "early": torch.tensor([True, False])[:batch],
        "noise": torch.randn(batch, FUTURE, LATENT, generator=g),
        "z_partner": torch.randn(batch, HISTORY, LATENT, generator=g),
    }


def open_gates(module: torch.nn.Module, value: float = 0.7) -> None:
    """Set every gate, and make the fresh branches speak."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.split(".")[-1] == "gate":
                p.fill_(value)


def golden() -> Path:
    return Path(__file__).parent / "golden" / "smolvla"


def run_config(**fields) -> dict:
    """What a run's config.json says of its recordings."""
    record = {
        "suite": "libero_object",
        "task_id": 1,
        "displace": 0.06,
        "draw": "fast",
        "reset": "soft",
        "size": 32,
    }
    return {"arm": "E2", "data_provenance": [record | {"init_state_ids": [0, 1, 2]} | fields]}


def open_run(config, facts: dict) -> None:
    """Open a run's folder as train.py does."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    run_folder.open_run(config.out, dataclasses.asdict(config) | facts, defaults, config.free)
