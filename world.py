"""World latents z: what is computed once from frames and cached, and the very same encoding online.

One encoder object, fitted on the demonstrations or restored from a checkpoint, makes the rows of the cache
and the latents of a rollout, so the two can't differ. `pca` needs no download: pictures are shrunk by area,
laid side by side where there are several cameras, and projected on their first D principal directions. It can
be inverted, so that a predicted latent can be looked at.

    python world.py cache DATA                                  # fits, encodes, writes DATA/world_pca_<hash>/
    python world.py cache DATA --camera image image2 --dim 32   # both cameras in one latent
    python world.py features DATA --init CHECKPOINT             # another cache, the policy's: features.py

A cache holds raw latents, the encoder, and a sidecar that says what it was made from; it opens only where
every field agrees. Latents leave this file standardised: for `pca` by the mean and one scalar, since dividing
each dimension by its own spread would blow the noise of the last ones up to the size of the signal.

Shapes: F frames, n frames of a call, S picture side, V cameras, D latent width, K future frames,
P = 3 * resolution * (V * resolution) pixels of a shrunk picture.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blocks import cache_folder, compare
from data import Demos, camera_name, load

FIT_FRAMES = 8192  # evenly spaced; more would cost memory and minutes, and move the first directions little
ENCODE_FRAMES = 256  # pictures in float at a time
REVISION = {
    "pca": "1"
}  # raised when an encoder's arithmetic changes; for a downloaded encoder its revision hash


@dataclass(frozen=True)
class WorldConfig:
    """What the world latents are made of."""

    world_encoder: Literal["pca"] = "pca"
    """Encoder of the world latents: `pca` is fitted on the demonstrations and needs no download."""

    world_camera: tuple[str, ...] = ("observation.images.image",)
    """Cameras that the world latents see, image and image2 for short; several make one latent."""

    world_dim: int = 64
    """Width D of a world latent, in principal directions."""

    world_resolution: int = 32
    """Side in pixels to which pictures are shrunk before they are encoded."""

    def __post_init__(self) -> None:
        if not self.world_camera or len(set(self.latent_cameras)) < len(self.world_camera):
            raise ValueError(
                f"--world-camera needs different cameras, got {self.world_camera}: name each once"
            )
        if self.world_resolution < 1:
            raise ValueError(f"--world-resolution must be positive, got {self.world_resolution}: 32 is usual")
        if not 1 <= self.world_dim <= self.latent_pixels:
            seen = f"{self.world_dim} with {self.latent_pixels} pixels in a shrunk picture"
            raise ValueError(
                f"--world-dim is {seen}: choose 1..{self.latent_pixels}, or a larger --world-resolution"
            )

    @property
    def latent_cameras(self) -> tuple[str, ...]:
        """The cameras' full names."""
        return tuple(camera_name(camera) for camera in self.world_camera)

    @property
    def latent_pixels(self) -> int:
        """P, the values of a shrunk picture."""
        return 3 * self.world_resolution**2 * len(self.world_camera)

    @property
    def latent_identity(self) -> dict[str, Any]:
        """What decides a latent's value, as JSON; clip is the number of frames that one latent sees."""
        return {
            "encoder": self.world_encoder,
            "revision": REVISION[self.world_encoder],
            "cameras": list(self.latent_cameras),
            "dim": self.world_dim,
            "resolution": self.world_resolution,
            "clip": 1,
        }


# ------------------------------------------------------------------------------------------------------------
# encoders


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
    def of(cls, z: Tensor) -> "WorldStats":
        """Measure raw latents (F, D) with one scalar spread for all dimensions."""
        exact = z.double()
        spread = exact.std(0, unbiased=False)
        std = spread.square().mean().sqrt().reshape(1)
        if not std > 0:
            raise ValueError("the world latents never change, all pictures are the same: record other ones")
        return cls(exact.mean(0).float(), std.float(), (spread / std).float())


@dataclass(frozen=True, eq=False)
class PCA:
    """The first D principal directions of shrunk pictures: deterministic, and it can be inverted."""

    config: WorldConfig
    size: int
    """Side S of the pictures that it was fitted on; others are refused, since they shrink differently."""
    mean: Tensor
    """(P,) float32, the mean picture in [0, 1]."""
    components: Tensor
    """(D, P) float32, orthonormal rows, by falling variance; each one's largest entry is positive."""
    stats: WorldStats

    def encode(self, frames: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return raw latents (n, D) float32 of pictures (n, 3, S, S) uint8: a tensor for one camera, or a
        mapping by camera, in which others are ignored. The cache and rollouts both call this; it stays on the
        CPU, in float32, whatever the policy runs on."""
        pictures = views(frames, self.config)
        if pictures[0].shape[-1] != self.size:
            raise ValueError(
                f"the world encoder was fitted on {self.size}-pixel pictures, got {tuple(pictures[0].shape)}:"
                f" render with --size {self.size}"
            )
        with torch.autocast("cpu", enabled=False):  # a caller's bfloat16 must not reach the latents
            pixels = shrink([picture.cpu() for picture in pictures], self.config.world_resolution)  # (n, P)
            return (pixels - self.mean) @ self.components.T  # (n, P) -> (n, D)

    def decode(self, z: Tensor) -> Tensor:
        """Return the pictures (n, 3, resolution, V * resolution) uint8 of raw latents (n, D)."""
        pixels = (z @ self.components + self.mean).mul(255).round().clamp(0, 255).byte()  # (n, D) -> (n, P)
        return pixels.reshape(len(z), 3, self.config.world_resolution, -1)  # (n, P) -> (n, 3, R, V*R)

    def standardise(self, z: Tensor) -> Tensor:
        """Bring raw latents (..., D) to the scale that prophet and fusion work in."""
        return (z - self.stats.mean) / self.stats.std

    def unstandardise(self, z: Tensor) -> Tensor:
        """Undo `standardise`; this is what `decode` takes."""
        return z * self.stats.std + self.stats.mean

    def embed(self, frames: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return standardised latents (n, D): the one call that a rollout needs."""
        return self.standardise(self.encode(frames))

    def state(self) -> dict[str, Tensor]:
        """Return all that `encoder_from_state` needs besides the config, as tensors."""
        return {
            "pca.size": torch.tensor([self.size]),
            "pca.mean": self.mean,
            "pca.components": self.components,
            **{f"stats.{name}": getattr(self.stats, name) for name in ("mean", "std", "dim_std")},
        }


def encoder_from_state(tensors: Mapping[str, Tensor], config: WorldConfig) -> PCA:
    """Rebuild the encoder that `state()` described; ValueError where the tensors belong to another config."""
    shape, wanted = tuple(tensors["pca.components"].shape), (config.world_dim, config.latent_pixels)
    if shape != wanted:
        raise ValueError(
            f"the stored world encoder has components {shape}, but --world-dim, --world-resolution and"
            f" --world-camera ask for {wanted}: use those that it was made with"
        )
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    stats = WorldStats(*(tensors[f"stats.{name}"] for name in ("mean", "std", "dim_std")))
    return PCA(config, int(tensors["pca.size"]), tensors["pca.mean"], tensors["pca.components"], stats)


def views(frames: Tensor | Mapping[str, Tensor], config: WorldConfig) -> list[Tensor]:
    """Return the config's cameras' pictures (n, 3, S, S) uint8 in its order."""
    if isinstance(frames, Tensor):
        assert len(config.latent_cameras) == 1, (
            f"{len(config.latent_cameras)} cameras: give a mapping, not one tensor"
        )
        pictures = [frames]
    else:
        pictures = [frames[camera] for camera in config.latent_cameras]
    for picture in pictures:
        assert picture.dtype == torch.uint8, f"pictures must be uint8 in 0..255, got {picture.dtype}"
        assert picture.shape == pictures[0].shape and picture.shape[-2] == picture.shape[-1], (
            f"cameras must share one square picture size, got {[tuple(p.shape) for p in pictures]}"
        )
    return pictures


def shrink(pictures: list[Tensor], resolution: int) -> Tensor:
    """Average pictures (n, 3, S, S) uint8 by area and lay cameras side by side: (n, P) float32 in 0..1."""
    size = pictures[0].shape[-1]
    if size < resolution:
        raise ValueError(
            f"--world-resolution {resolution} is more than the pictures' {size} pixels: lower it"
        )
    small = [F.interpolate(picture.float() / 255, size=resolution, mode="area") for picture in pictures]
    return torch.cat(small, dim=-1).flatten(1)  # V x (n, 3, R, R) -> (n, 3, R, V*R) -> (n, P)


def fit(demos: Demos, config: WorldConfig) -> PCA:
    """Fit the encoder and its standardisation on the demonstrations; the same data give the same encoder."""
    every = np.unique(np.linspace(0, len(demos) - 1, min(len(demos), FIT_FRAMES)).round().astype(np.int64))
    batches = picture_batches(demos, config, every)
    pixels = torch.cat([shrink(views(frames, config), config.world_resolution) for frames in batches])
    mean, components = principal(pixels, config.world_dim)
    size = demos.images[config.latent_cameras[0]].shape[1]
    return PCA(config, size, mean, components, WorldStats.of((pixels - mean) @ components.T))


def principal(pixels: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the mean (P,) and the first `dim` principal directions (dim, P) of rows (n, P), float32, by an
    exact eigen-decomposition in float64; an eigenvector's sign is free: its largest entry is positive."""
    if dim >= len(pixels):
        raise ValueError(f"--world-dim {dim} needs more than {dim} frames, got {len(pixels)}: lower it")
    exact = pixels.double()
    mean = exact.mean(0)
    exact -= mean
    _, vectors = torch.linalg.eigh(exact.T @ exact / len(exact))  # (n, P) -> (P, P), by rising variance
    components = vectors.T.flip(0)[:dim]  # (P, P) -> (dim, P)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))  # (dim, 1)
    return mean.float(), (components * largest.sign()).float().contiguous()


def picture_batches(demos: Demos, config: WorldConfig, index: np.ndarray) -> Iterator[dict[str, Tensor]]:
    """Yield the config's cameras' pictures of these frames, a few at a time."""
    for camera in config.latent_cameras:
        if camera not in demos.images:
            there = ", ".join(demos.images)
            raise ValueError(
                f"--world-camera {camera} is not among the loaded cameras, {there}: load it as well"
            )
    for start in range(0, len(index), ENCODE_FRAMES):
        yield {
            camera: demos.frames(index[start : start + ENCODE_FRAMES], camera)
            for camera in config.latent_cameras
        }


def encode_demos(encoder: PCA, demos: Demos) -> Tensor:
    """Return the raw latents (F, D) of all frames."""
    return torch.cat(
        [encoder.encode(b) for b in picture_batches(demos, encoder.config, np.arange(len(demos)))]
    )


# ------------------------------------------------------------------------------------------------------------
# the cache


@dataclass(frozen=True, eq=False)
class Latents:
    """The world latents of a data set, with what made them."""

    z: Tensor
    """(F, D) float32, standardised, in memory."""
    encoder: PCA
    config: WorldConfig


def prepare(data_path: Path, demos: Demos, config: WorldConfig) -> Latents:
    """Open the data set's cache, after writing it where there is none yet."""
    path = cache_path(data_path, config)
    if not path.exists():
        write_cache(path, demos, fit(demos, config))
    return open_cache(path, demos, config)


def latents_of(encoder: PCA, demos: Demos) -> Latents:
    """Encode other demonstrations, held-out ones say, with the encoder of a run; nothing is cached."""
    return Latents(encoder.standardise(encode_demos(encoder, demos)), encoder, encoder.config)


def cache_path(data_path: Path, config: WorldConfig) -> Path:
    """Return the folder of the world latents' cache."""
    return cache_folder(data_path, f"world_{config.world_encoder}", config.latent_identity)


def sidecar(demos: Demos, encoder: PCA) -> dict[str, Any]:
    """Return all that a cache must agree on with the run that opens it, as JSON."""
    return {
        **encoder.config.latent_identity,
        "size": encoder.size,
        "fingerprint": demos.fingerprint_of(encoder.config.latent_cameras),
        "rows": len(demos),
        "mean": encoder.stats.mean.tolist(),
        "std": encoder.stats.std.tolist(),
    }


def write_cache(path: Path, demos: Demos, encoder: PCA) -> None:
    """Encode all frames; write latents, encoder and sidecar beside, then rename: none is ever half there."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    np.save(beside / "z.npy", encode_demos(encoder, demos).numpy())
    save_file(encoder.state(), beside / "encoder.safetensors")
    (beside / "cache.json").write_text(json.dumps(sidecar(demos, encoder), indent=1) + "\n")
    try:
        beside.rename(path)
    except OSError:
        if not path.exists():  # another process was faster, and its cache is checked like any other
            raise
        shutil.rmtree(beside)


def open_cache(path: Path, demos: Demos, config: WorldConfig) -> Latents:
    """Read a cache; ValueError with both sides where any field of its sidecar isn't what this run needs."""
    again = f"delete {path} and run again"
    try:
        stored = json.loads((path / "cache.json").read_text())
        rows = np.load(path / "z.npy", mmap_mode="r")
        tensors = load_file(path / "encoder.safetensors")
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"world cache {path} is missing or damaged ({cause}): {again}") from error
    # the config's fields first: where they differ, the stored encoder can't be rebuilt to compare the rest
    compare(stored, config.latent_identity, again)
    encoder = encoder_from_state(tensors, config)
    compare(
        stored, sidecar(demos, encoder) | {"size": demos.images[config.latent_cameras[0]].shape[1]}, again
    )
    if rows.shape != (len(demos), config.world_dim) or rows.dtype != np.float32:
        raise ValueError(
            f"world cache {path}: z.npy is {rows.shape} {rows.dtype}, not one row a frame: {again}"
        )
    return Latents(encoder.standardise(torch.from_numpy(np.array(rows))), encoder, config)


# ------------------------------------------------------------------------------------------------------------
# how far the future lies


def change_statistics(
    demos: Demos, z: Tensor, K: int, stride: int, delta: bool = True
) -> tuple[Tensor, Tensor]:
    """Return r (K,), the RMS of ||y_k||, and the mean of y_k (K, D), over the steps inside episodes; float32.

    y_k = z_{t+ks} - z_t, or z_{t+ks} with delta false; z (F, D) are standardised latents.
    """
    assert len(z) == len(demos), f"{len(z)} latents for {len(demos)} frames"
    index = np.arange(len(demos))
    future, valid = demos.future(index, K, stride)  # (F, K)
    if not valid[:, -1].any():
        longest = int((demos.last - demos.first).max()) + 1
        raise ValueError(
            f"the last future frame lies {K * stride} steps ahead, but the longest episode has {longest}"
            " frames: lower the number of future frames or --world-stride"
        )
    rms, means = [], []
    for k in range(K):
        now, then = torch.from_numpy(index[valid[:, k]]), torch.from_numpy(future[valid[:, k], k])
        change = (z[then] - z[now] if delta else z[then]).double()  # (n, D)
        rms.append(change.square().sum(1).mean().sqrt())
        means.append(change.mean(0))
    return torch.stack(rms).float(), torch.stack(means).float()


# ------------------------------------------------------------------------------------------------------------
# the command line


@dataclass(frozen=True)
class Config:
    """Fit the world encoder, encode all frames and write both beside the data."""

    data: tyro.conf.Positional[Path]
    """A folder of `*.hdf5` task files, or one such file."""

    world_encoder: Literal["pca"] = "pca"
    """Encoder of the world latents."""

    camera: tuple[Literal["image", "image2"], ...] = ("image",)
    """Cameras that the world latents see; several make one latent."""

    dim: int = 64
    """Width D of a world latent, in principal directions."""

    resolution: int = 32
    """Side in pixels to which pictures are shrunk before they are encoded."""

    @property
    def world(self) -> WorldConfig:
        """The same choice as the training program spells it."""
        return WorldConfig(self.world_encoder, self.camera, self.dim, self.resolution)


def main() -> None:
    """Run the command line: `cache`, or features.py's `features`."""
    import features  # which imports this file

    cache = Annotated[Config, tyro.conf.subcommand("cache")]
    tokens = Annotated[features.Config, tyro.conf.subcommand("features")]
    rank0 = os.environ.get("RANK", "0") == "0"
    config = tyro.cli(cache | tokens, description=__doc__, console_outputs=rank0)
    try:
        features.main(config) if isinstance(config, features.Config) else prepare_once(config)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def prepare_once(config: Config) -> None:
    """Write the world latents; a cache that is there and agrees is left alone."""
    start = time.perf_counter()
    path = cache_path(config.data, config.world)
    action = "checked" if path.exists() else "wrote"
    latents = prepare(config.data, load(config.data, config.world.latent_cameras), config.world)
    seconds = time.perf_counter() - start
    print(f"{action} {path}: {len(latents.z):,} latents of width {latents.z.shape[1]} in {seconds:.1f} s")


if __name__ == "__main__":
    main()
