"""World encoders: pictures, or clips of them, to latents. One object makes the cache's rows and a rollout's.

- `pca`: pictures shrunk by area, side by side where there are several cameras, on their first D principal
  directions. Fitted on the demonstrations, needs no download, and can be inverted.
- `siglip`: the policy's own vision tower, which must stay frozen; the mean of its patches.
- `dinov2`, `vjepa2`: transformers' models, a hub id at a revision or a folder; the mean of their patches. A
  small thing that moves counts by its area in a mean; a class token is trained to ignore it.

vjepa2 sees clips of m consecutive control steps, the others one frame. Cameras are encoded one by one and
laid end to end. A picture is scaled to the model's side as a whole: the crop of its processor would cut off
the margin, where robots work too. Learned encoders compute in float32. Their weights stay out of checkpoints:
these hold a fingerprint, and a rollout with other weights is refused. A tower is rounded to bfloat16 first,
so that it stays the same one when a checkpoint is saved in that type.

Latents leave standardised: for `pca` by the mean and one scalar, since dividing each dimension by its own
spread would blow the noise of the last ones up to the size of the signal; for the others one by one.

    pytest tests/latents/test_encoders.py

Shapes: n frames or clips of a call, m frames of a clip, S picture side, V cameras, W width of a camera's
vector, D latent width, P = 3 * resolution * (V * resolution) pixels of a shrunk picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from torch import Tensor

from files import Refused, check_numbers, parse_json, read_json
from readers.selection import camera_name
from smolvla.folders import find_folder
from smolvla.layers import VisionTower, resize_with_pad

if TYPE_CHECKING:
    from model import SmolVLA

WorldEncoder = Literal["pca", "siglip", "dinov2", "vjepa2"]
REVISION = {
    "pca": "1",
    "siglip": "1",
    "dinov2": "1",
    "vjepa2": "1",
}  # raised when the arithmetic here changes
MODELS = {"dinov2": "facebook/dinov2-base", "vjepa2": "facebook/vjepa2-vitg-fpc64-256"}
KINDS = {"dinov2": ("dinov2", "dinov2_with_registers"), "vjepa2": ("vjepa2",)}  # model_type in config.json
# What a config.json leaves out where it is transformers' default.
DEFAULTS = {
    "dinov2": {"hidden_size": 768, "patch_size": 14, "image_size": 224, "num_register_tokens": 0},
    "vjepa2": {"hidden_size": 1024, "patch_size": 16, "crop_size": 256, "tubelet_size": 2},
}
VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PILLOW = {2: "bilinear", 3: "bicubic"}  # numbers of `resample` in preprocessor_config.json
TRANSFORMERS = "transformers==5.23.0"
FLOOR = 0.01  # least spread that a dimension is divided by, as a share of the RMS spread


@dataclass(frozen=True)
class WorldConfig:
    """What the world latents are made of."""

    world_encoder: WorldEncoder = "pca"
    """Encoder of the world latents: `pca` is fitted on the demonstrations and needs no download, `siglip` is
    the policy's own frozen tower, `dinov2` and `vjepa2` are transformers' models."""

    world_camera: tuple[str, ...] = ("observation.images.image",)
    """Cameras that the world latents see, by the names that --cameras gives; several make one latent."""

    world_dim: int = 64
    """Width D of a `pca` latent, in principal directions; other encoders have a width of their own."""

    world_resolution: int = 32
    """Side in pixels to which `pca` shrinks pictures; other encoders have a side of their own."""

    world_clip: int = 1
    """Consecutive frames m that one latent of `vjepa2` sees, its own frame the last."""

    world_model: str | None = None
    """Folder or hub id of the model of `dinov2` or `vjepa2`; default: facebook/dinov2-base,
    facebook/vjepa2-vitg-fpc64-256."""

    world_revision: str | None = None
    """Revision of the hub id, to pin it."""

    held_out: tyro.conf.Suppress[tuple[int, ...]] = ()
    """Episodes that nothing is fitted on; follows from --val-every and --val-share."""

    limits: ClassVar = {"world_resolution": (1, 4096), "world_dim": (1, 10**6), "world_clip": (1, 10_000)}

    def __post_init__(self) -> None:
        check_numbers(self)  # those of the classes that inherit from this one, too
        if len(set(self.latent_cameras)) < len(self.world_camera):
            raise Refused(f"--world-camera needs different cameras, got {self.world_camera}: name each once")
        if self.world_encoder == "pca" and self.world_dim > self.latent_pixels:
            seen = f"{self.world_dim} with {self.latent_pixels} pixels in a shrunk picture"
            raise Refused(
                f"--world-dim is {seen}: choose 1..{self.latent_pixels}, or a larger --world-resolution"
            )
        if self.world_clip > 1 and self.world_encoder != "vjepa2":
            sees = f"--world-clip {self.world_clip} with --world-encoder {self.world_encoder}"
            raise Refused(f"{sees}: only vjepa2 sees more than one frame; use 1")
        if self.world_model is not None and self.world_encoder not in MODELS:
            own = "the policy's tower" if self.world_encoder == "siglip" else "fitted on the data"
            named = f"--world-model {self.world_model} with --world-encoder {self.world_encoder}"
            raise Refused(f"{named}, which is {own}: leave it out")

    @property
    def latent_cameras(self) -> tuple[str, ...]:
        """The cameras' full names."""
        return tuple(camera_name(camera) for camera in self.world_camera)

    @property
    def latent_model(self) -> str | None:
        """Where the encoder's weights come from, if from a model of their own."""
        return self.world_model or MODELS.get(self.world_encoder)

    @property
    def latent_pixels(self) -> int:
        """P, the values of a shrunk picture."""
        return 3 * self.world_resolution**2 * max(1, len(self.world_camera))

    @property
    def latent_identity(self) -> dict[str, Any]:
        """What decides a latent's value besides a model, as JSON."""
        return {
            "encoder": self.world_encoder,
            "revision": REVISION[self.world_encoder],
            "cameras": list(self.latent_cameras),
            "dim": self.world_dim,
            "resolution": self.world_resolution,
            "clip": self.world_clip,
            **({"held_out": list(self.held_out)} if self.held_out else {}),
        }


@dataclass(frozen=True, eq=False)
class WorldStats:
    """How latents are standardised; the values travel with the checkpoint."""

    mean: Tensor
    """(D,) float32."""
    std: Tensor
    """(1,) float32 for one scalar, (D,) for an encoder whose dimensions are standardised one by one."""
    dim_std: Tensor
    """(D,) float32: what spread each dimension has after standardising."""

    @classmethod
    def of(cls, z: Tensor) -> WorldStats:
        """Measure raw latents (F, D) with one scalar spread for all dimensions."""
        exact = z.double()
        spread = exact.std(0, unbiased=False)
        std = spread.square().mean().sqrt().reshape(1)
        if not std > 0:
            raise Refused("the world latents never change, all pictures are the same: record other ones")
        return cls(exact.mean(0).float(), std.float(), (spread / std).float())

    @classmethod
    def of_each(cls, z: np.ndarray, rows: int = 4096) -> WorldStats:
        """Measure raw latents (F, D), which may lie in a file, dimension by dimension.

        A dimension that hardly moves is divided by FLOOR of the RMS spread instead: noise stays small.
        """
        parts = [slice(start, start + rows) for start in range(0, len(z), rows)]
        mean = sum(z[part].sum(0, dtype=np.float64) for part in parts) / len(z)
        variance = sum(np.square(z[part] - mean).sum(0) for part in parts) / len(z)
        spread, least = np.sqrt(variance), FLOOR * np.sqrt(variance.mean())
        if not least > 0:
            raise Refused("the world latents never change, all pictures are the same: record other ones")
        std = np.maximum(spread, least)
        return cls(*(torch.from_numpy(x.astype(np.float32)) for x in (mean, std, spread / std)))


# ---- pictures -----------------------------------------------------------------------------------------


def views(frames: Tensor | Mapping[str, Tensor], config: WorldConfig) -> list[Tensor]:
    """Return the config's cameras' pictures (n, 3, H, W) uint8, or clips (n, m, 3, H, W), in its order.

    Clips of one frame may come with or without their dimension of one, and leave without it.
    """
    if isinstance(frames, Tensor):
        assert len(config.latent_cameras) == 1, (
            f"{len(config.latent_cameras)} cameras: give a mapping, not one tensor"
        )
        pictures = [frames]
    else:
        pictures = [frames[camera] for camera in config.latent_cameras]
    if config.world_clip == 1:
        pictures = [p.squeeze(1) if p.ndim == 5 else p for p in pictures]
    for picture in pictures:
        assert picture.dtype == torch.uint8, f"pictures must be uint8 in 0..255, got {picture.dtype}"
        clip = tuple(picture.shape[1:-3])
        assert clip == ((config.world_clip,) if config.world_clip > 1 else ()), (
            f"--world-clip {config.world_clip} does not fit pictures {tuple(picture.shape)}"
        )
    return pictures


def shrink(pictures: list[Tensor], resolution: int) -> Tensor:
    """Average pictures (n, 3, H, W) uint8 by area, each as a whole, and lay cameras side by side: (n, P)
    float32 in 0..1."""
    size = min(side for picture in pictures for side in picture.shape[-2:])
    if size < resolution:
        raise Refused(f"--world-resolution {resolution} is more than the pictures' {size} pixels: lower it")
    small = [F.interpolate(picture.float() / 255, size=resolution, mode="area") for picture in pictures]
    return torch.cat(small, dim=-1).flatten(1)  # V x (n, 3, R, R) -> (n, 3, R, V*R) -> (n, P)


Sizes = int | tuple[tuple[int, int], ...]  # the side of square pictures of one size, or each camera's H, W


def sizes_of(pictures: list[tuple[int, int]]) -> Sizes:
    """Say how big the cameras' pictures are."""
    sides = {side for size in pictures for side in size}
    return sides.pop() if len(sides) == 1 else tuple(pictures)


def in_words(size: Sizes) -> str:
    return f"{size}-pixel" if isinstance(size, int) else " and ".join(f"{h} x {w}" for h, w in size)


def as_tensor(size: Sizes) -> Tensor:
    return torch.tensor([size] if isinstance(size, int) else size)


def from_tensor(size: Tensor) -> Sizes:
    return int(size) if size.numel() == 1 else tuple(map(tuple, size.tolist()))


# ---- encoders -----------------------------------------------------------------------------------------


class Encoder:
    """What `PCA` and `Learned` share: the check of sizes, and standardising."""

    config: WorldConfig
    size: Sizes
    stats: WorldStats

    def pictures(self, frames: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
        """Return the cameras' pictures; ValueError for another size, which would shrink differently."""
        pictures = views(frames, self.config)
        found = sizes_of([tuple(picture.shape[-2:]) for picture in pictures])
        if found != self.size:
            how = f"render with --size {self.size}" if isinstance(self.size, int) else "give it such ones"
            raise Refused(
                f"the world encoder was fitted on {in_words(self.size)} pictures, got {in_words(found)} ones:"
                f" {how}"
            )
        return pictures

    def standardise(self, z: Tensor) -> Tensor:
        """Bring raw latents (..., D) to the scale that prophet and fusion work in."""
        return (z - self.stats.mean) / self.stats.std

    def unstandardise(self, z: Tensor) -> Tensor:
        """Undo `standardise`; this is what `decode` takes."""
        return z * self.stats.std + self.stats.mean

    def embed(self, frames: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return standardised latents (n, D): the one call that a rollout needs."""
        return self.standardise(self.encode(frames))

    def stats_state(self) -> dict[str, Tensor]:
        return {f"stats.{name}": getattr(self.stats, name) for name in ("mean", "std", "dim_std")}


@dataclass(frozen=True, eq=False)
class PCA(Encoder):
    """The first D principal directions of shrunk pictures: deterministic, and it can be inverted."""

    config: WorldConfig
    size: Sizes
    """Of the pictures that it was fitted on; others are refused, since they shrink differently."""
    mean: Tensor
    """(P,) float32, the mean picture in [0, 1]."""
    components: Tensor
    """(D, P) float32, orthonormal rows, by falling variance; each one's largest entry is positive."""
    stats: WorldStats

    def encode(self, frames: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return raw latents (n, D) float32, on the CPU, of pictures (n, 3, S, S) or clips (n, m, 3, S, S)
        uint8: a tensor for one camera, or a mapping by camera, in which others are ignored. Cache and
        rollouts both call this; it computes in float32, on the CPU, whatever the policy runs on."""
        pictures = self.pictures(frames)
        with torch.autocast("cpu", enabled=False):  # a caller's bfloat16 must not reach the latents
            pixels = shrink([picture.cpu() for picture in pictures], self.config.world_resolution)  # (n, P)
            return (pixels - self.mean) @ self.components.T  # (n, P) -> (n, D)

    def decode(self, z: Tensor) -> Tensor:
        """Return the pictures (n, 3, resolution, V * resolution) uint8 of raw latents (n, D)."""
        pixels = (z @ self.components + self.mean).mul(255).round().clamp(0, 255).byte()  # (n, D) -> (n, P)
        return pixels.reshape(len(z), 3, self.config.world_resolution, -1)  # (n, P) -> (n, 3, R, V*R)

    def to(self, device: torch.device) -> PCA:
        """It stays on the CPU."""
        return self

    def state(self) -> dict[str, Tensor]:
        """Return all that `encoder_from_state` needs besides the config, as tensors."""
        return {
            "pca.size": as_tensor(self.size),
            "pca.mean": self.mean,
            "pca.components": self.components,
        } | (self.stats_state())


@dataclass(eq=False)
class Backbone:
    """A frozen network that makes a vector of a picture or a clip; its weights are read at the first call."""

    facts: dict[str, Any]
    """What must agree wherever its latents are used: model, revision, the weights' fingerprint, pooling."""
    width: int
    """W."""
    side: int
    """Pixels that a picture is scaled to."""
    read: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    """(network, pictures (n, 3, S, S) or clips (n, m, 3, S, S) uint8) -> (n, W)."""
    revision: str | None = None
    """The hub's commit."""
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def network(self) -> nn.Module:
        return self.read().eval().requires_grad_(False).float()

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.run(self.network.to(self.device), pictures.to(self.device)).float().cpu()


@dataclass(frozen=True, eq=False)
class Learned(Encoder):
    """A frozen network's vectors, the cameras' end to end."""

    config: WorldConfig
    size: Sizes
    """Of the pictures that its statistics are of."""
    backbone: Backbone
    stats: WorldStats | None
    """None until all rows of a cache are there."""

    def encode(self, frames: Tensor | Mapping[str, Tensor]) -> Tensor:
        """As `PCA.encode`; the network runs where `to` has put it."""
        found = torch.cat([self.backbone(picture) for picture in self.pictures(frames)], -1)  # -> (n, V*W)
        assert found.shape[1] == self.config.world_dim, f"{found.shape[1]} wide, not {self.config.world_dim}"
        return found

    def to(self, device: torch.device) -> Learned:
        """Compute on this device from now on."""
        self.backbone.device = device
        return self

    def state(self) -> dict[str, Tensor]:
        """Return all that `encoder_from_state` needs besides config and weights, as tensors."""
        facts = torch.tensor(list(json.dumps(self.backbone.facts).encode()), dtype=torch.uint8)
        return {"learned.size": as_tensor(self.size), "learned.facts": facts} | self.stats_state()


def encoder_from_state(
    tensors: Mapping[str, Tensor], config: WorldConfig, policy: SmolVLA | None = None
) -> PCA | Learned:
    """Rebuild the encoder that `state()` described; Refused where tensors or weights are of another one.

    Args: policy, whose tower `siglip` is.
    """
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    own = ("pca.size", "pca.mean", "pca.components")
    own = own if config.world_encoder == "pca" else ("learned.size", "learned.facts")
    statistics = [f"stats.{name}" for name in ("mean", "std", "dim_std")]
    if lacking := sorted({*own, *statistics} - set(tensors)):
        raise Refused(
            f"the stored world encoder lacks {', '.join(lacking)}: it is damaged, or of another kind"
        )
    stats = WorldStats(*(tensors[name] for name in statistics))
    if config.world_encoder != "pca":
        backbone = open_backbone(config, policy)
        try:
            shape = dict.fromkeys(("weights", "pooling", "model"), str)
            stored = parse_json(bytes(tensors["learned.facts"].tolist()), shape)
        except ValueError as error:
            raise Refused(f"the stored world encoder's facts are damaged: {error}") from error
        for field in ("weights", "pooling"):
            if stored[field] != backbone.facts[field]:
                raise Refused(
                    f"the world encoder's {field} differ: checkpoint has {stored[field]}, of"
                    f" {stored['model']}, {config.latent_model or 'the policy'} has {backbone.facts[field]}:"
                    " name the model that it was trained with by --world-model"
                )
        return Learned(config, from_tensor(tensors["learned.size"]), backbone, stats)
    shape, wanted = tuple(tensors["pca.components"].shape), (config.world_dim, config.latent_pixels)
    if shape != wanted:
        raise Refused(
            f"the stored world encoder has components {shape}, but --world-dim, --world-resolution and"
            f" --world-camera ask for {wanted}: use those that it was made with"
        )
    return PCA(
        config, from_tensor(tensors["pca.size"]), tensors["pca.mean"], tensors["pca.components"], stats
    )


def principal(pixels: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the mean (P,) and the first `dim` principal directions (dim, P) of rows (n, P), float32, by an
    exact eigen-decomposition in float64; an eigenvector's sign is free: its largest entry is positive."""
    if dim >= len(pixels):
        raise Refused(f"--world-dim {dim} needs more than {dim} frames, got {len(pixels)}: lower it")
    exact = pixels.double()
    mean = exact.mean(0)
    exact -= mean
    _, vectors = torch.linalg.eigh(exact.T @ exact / len(exact))  # (n, P) -> (P, P), by rising variance
    components = vectors.T.flip(0)[:dim]  # (P, P) -> (dim, P)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # (dim, 1)
    return mean.float(), (components * largest.sign()).float().contiguous()


# ---- frozen networks ----------------------------------------------------------------------------------


def open_backbone(config: WorldConfig, policy: SmolVLA | None = None) -> Backbone | None:
    """Find a learned encoder's network and name its weights, without building it; None for `pca`.

    Args: policy, whose tower `siglip` is.
    """
    if config.world_encoder == "pca":
        return None
    if config.world_encoder == "siglip":
        assert policy is not None, "siglip needs the policy whose tower it is"
        return tower_backbone(policy)
    return folder_backbone(config)


def resolved(config: WorldConfig, backbone: Backbone | None) -> Any:
    """Fill in what the network decides: width, side, and which model it is; a config of the same class."""
    if backbone is None:
        return config
    width, plain = len(config.world_camera) * backbone.width, WorldConfig()
    for flag, own in (("world_dim", width), ("world_resolution", backbone.side)):
        if getattr(config, flag) not in (own, getattr(plain, flag)):
            given = f"--{flag.replace('_', '-')} {getattr(config, flag)} with --world-encoder"
            raise Refused(f"{given} {config.world_encoder}, whose own is {own}: leave it out")
    return dataclasses.replace(
        config,
        world_dim=width,
        world_resolution=backbone.side,
        world_model=config.latent_model,
        world_revision=backbone.revision,
    )


def tower_backbone(policy: SmolVLA) -> Backbone:
    """A copy of the policy's vision tower: the policy's own may be cast, moved or given other kernels."""
    c, digest, state = policy.config, hashlib.sha256(), {}
    for name, weight in policy.vision.state_dict().items():
        state[name] = weight.detach().cpu().bfloat16().float()
        digest.update(json.dumps([name, list(weight.shape)]).encode() + state[name].numpy().tobytes())
    sizes = (c.image_size, c.vision_size, c.patch_size, c.vision_heads, c.vision_eps)
    digest.update(json.dumps(sizes).encode())

    def read() -> nn.Module:
        with torch.device("meta"):
            tower = VisionTower(c)
        tower.load_state_dict(state, assign=True)
        return tower

    def run(tower: nn.Module, pictures: Tensor) -> Tensor:
        return tower(resize_with_pad(pictures.float() / 255, c.image_size) * 2 - 1).mean(1)

    facts = {
        "model": "policy",
        "model_revision": None,
        "weights": digest.hexdigest()[:16],
        "pooling": "mean of patches",
    }
    return Backbone(facts, c.vision_width, c.image_size, read, run)


def folder_backbone(config: WorldConfig) -> Backbone:
    """A model of transformers' from a folder or the hub."""
    encoder, name = config.world_encoder, config.latent_model
    folder = find_folder(name, config.world_revision)
    revision = None if Path(name).is_dir() else folder.name  # the hub's folders are named after commits
    described = DEFAULTS[encoder] | read_json(folder / "config.json")
    if described.get("model_type") not in KINDS[encoder]:
        kind = described.get("model_type")
        raise Refused(f"--world-model {name} is a {kind!r} model, not {encoder}: name one that is")
    side, mean, std, mode = read_processing(folder, described)
    check_sizes(config, described, side)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (mean, std))
    facts = {
        "model": name if revision else folder.resolve().name,
        "model_revision": revision,
        "weights": folder_fingerprint(folder, described, [side, mean.tolist(), std.tolist(), mode]),
        "pooling": "mean of patches",
    }
    special = 1 + described.get("num_register_tokens", 0)  # in front of dinov2's patches

    def run(network: nn.Module, pictures: Tensor) -> Tensor:
        flat = pictures.flatten(0, -4).float() / 255  # (n, m, 3, S, S) -> (n*m, 3, S, S)
        if flat.shape[-2:] != (side, side):
            flat = F.interpolate(flat, size=side, mode=mode, antialias=True, align_corners=False)
        x = ((flat - mean.to(flat)) / std.to(flat)).unflatten(0, (len(pictures), -1))  # (n, m, 3, side, side)
        if encoder == "dinov2":
            return network(pixel_values=x[:, 0]).last_hidden_state[:, special:].mean(1)
        return network(pixel_values_videos=x, skip_predictor=True).last_hidden_state.mean(1)

    return Backbone(
        facts, described["hidden_size"], side, lambda: read_network(folder, encoder), run, revision
    )


def read_processing(folder: Path, described: dict[str, Any]) -> tuple[int, list[float], list[float], str]:
    """Return side, mean and std (3 each) and scaling, as the folder's processor has them, or the model."""
    files = [folder / f"{kind}preprocessor_config.json" for kind in ("", "video_")]
    found = next((read_json(file) for file in files if file.is_file()), {})
    video = described["model_type"] == "vjepa2"
    side = found.get("crop_size") or described["crop_size" if video else "image_size"]
    side = side["height"] if isinstance(side, dict) else side
    mean, std = (list(found.get(f"image_{name}", v)) for name, v in zip(("mean", "std"), IMAGENET))
    return side, mean, std, PILLOW.get(found.get("resample", 2 if video else 3), "bilinear")


def check_sizes(config: WorldConfig, described: dict[str, Any], side: int) -> None:
    """Refuse what a model would cut off in silence: pixels beyond the last patch, a clip's newest frame."""
    patch, tubelet, m = described["patch_size"], described.get("tubelet_size", 1), config.world_clip
    if side % patch:
        raise Refused(f"{config.latent_model} has pictures of {side} by patches of {patch}: mend its side")
    if m > 1 and m % tubelet:
        raise Refused(f"--world-clip {m} is no multiple of {tubelet} frames, the model's step: use {m + 1}")


def folder_fingerprint(folder: Path, described: dict[str, Any], processing: list[Any]) -> str:
    """Name a model's weights, sizes and processing in 16 hex digits."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Refused(f"{folder} has no *.safetensors: save the model there with save_pretrained")
    kept = {key: value for key, value in described.items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps([kept, processing], sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def read_network(folder: Path, encoder: str) -> nn.Module:
    """Build a model of transformers' on its weights; ValueError, one line, where any is missing."""
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError as error:
        needs = f"--world-encoder {encoder} needs the package transformers ({error})"
        raise Refused(f"{needs}: pip install {TRANSFORMERS}") from error
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights before it reads them
            network, info = AutoModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:300]
        raise Refused(f"--world-model {folder} cannot be read ({cause}): copy it again") from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise Refused(
            f"--world-model {folder} lacks {len(info['missing_keys'])} tensors ({names}): copy it again"
        )
    return network
