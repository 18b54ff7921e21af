"""World latents z: what is computed once from frames and cached, and the very same encoding online.

One encoder object (encoders.py), made for the demonstrations or restored from a checkpoint, makes the rows of
the cache and the latents of a rollout, so the two can't differ. A latent belongs to a frame; where it is made
from a clip, that is the frame and the m-1 control steps before it, and before its episode begins the first
frame repeats.

    python train.py --prepare --data DATA --fusion late         # pca, into DATA/world_pca_<hash>/
    torchrun --nproc-per-node 8 train.py --prepare --data DATA --fusion late --world-encoder vjepa2

A cache holds raw latents in one array, the encoder, and a sidecar that says what it was made from; it opens
only where every field agrees. blocks.py writes it: killed at any moment, the same command goes on (and reads
all pictures once more: the data's fingerprint sees every pixel). Training writes the cache of `pca` itself
where there is none; of the others it names --prepare, which wants all of a machine's devices.

Shapes: F frames, n frames of a call, m frames of a clip, S picture side, V cameras, D latent width, K future
frames.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from files import NO_ARRAY, Refused, read_json, replace_text
from latents import blocks
from latents.blocks import Layout, agree, cache_folder, compare, part_of, with_checks
from latents.encoders import (
    PCA,
    Backbone,
    Learned,
    Sizes,
    WorldConfig,
    WorldStats,
    as_tensor,
    encoder_from_state,
    from_tensor,
    in_words,
    principal,
    shrink,
    sizes_of,
    views,
)
from ranks import wait_for_ranks
from readers.demos import Demos

FIT_FRAMES = 8192  # evenly spaced; more would cost memory and minutes, and move the first directions little
ENCODE_FRAMES = 256  # pictures in float at a time
CLIPS = 32  # of a network's one pass
ROWS, SIDECAR, ENCODER = "z.npy", "cache.json", "encoder.safetensors"
CHUNK = 2**27  # numbers in double at a time


# ------------------------------------------------------------------------------------------------------------
# frames -> latents


def check_cameras(demos: Demos, config: WorldConfig) -> None:
    """Raise Refused where the data have no camera of that name."""
    for camera in config.latent_cameras:
        if camera not in demos.images:
            there = ", ".join(demos.images)
            raise Refused(
                f"--world-camera {camera} is not among the loaded cameras, {there}: load it as well,"
                " or rename one with --cameras"
            )


def clips(demos: Demos, config: WorldConfig, index: np.ndarray) -> dict[str, Tensor]:
    """Return what the latents of these frames see: by camera (n, 3, S, S), or clips (n, m, 3, S, S) uint8."""
    check_cameras(demos, config)
    if config.world_clip == 1:
        return {camera: demos.frames(index, camera) for camera in config.latent_cameras}
    steps = demos.history(index, config.world_clip, 1)  # (n, m)
    unique, place = np.unique(steps, return_inverse=True)  # clips overlap
    place = torch.from_numpy(place.reshape(steps.shape))
    return {camera: demos.frames(unique, camera)[place] for camera in config.latent_cameras}


def block_of(config: WorldConfig) -> int:
    """How many latents are made in one call."""
    return ENCODE_FRAMES if config.world_encoder == "pca" else CLIPS


def picture_batches(demos: Demos, config: WorldConfig, index: np.ndarray) -> Iterator[dict[str, Tensor]]:
    """Yield what the latents of these frames see, a few at a time."""
    size = block_of(config)
    for start in range(0, len(index), size):
        yield clips(demos, config, index[start : start + size])


def encode_demos(encoder: PCA | Learned, demos: Demos) -> Tensor:
    """Return the raw latents (F, D) of all frames."""
    return torch.cat(
        [encoder.encode(b) for b in picture_batches(demos, encoder.config, np.arange(len(demos)))]
    )


def fit(demos: Demos, config: WorldConfig) -> PCA:
    """Fit the encoder and its standardisation on the demonstrations; the same data give the same encoder."""
    among = fitted_on(demos, config)
    every = np.unique(np.linspace(0, len(among) - 1, min(len(among), FIT_FRAMES)).round().astype(np.int64))
    batches = picture_batches(demos, config, among[every])
    pixels = torch.cat([shrink(views(frames, config), config.world_resolution) for frames in batches])
    mean, components = principal(pixels, config.world_dim)
    return PCA(
        config, picture_size(demos, config), mean, components, WorldStats.of((pixels - mean) @ components.T)
    )


def fitted_on(demos: Demos, config: WorldConfig) -> np.ndarray:
    """The frames that encoders and their statistics are fitted on: not those of held-out episodes."""
    return np.flatnonzero(~np.isin(demos.episode, config.held_out))


def picture_size(demos: Demos, config: WorldConfig) -> Sizes:
    """How big the data's pictures are."""
    check_cameras(demos, config)
    return sizes_of([tuple(demos.images[camera].shape[1:3]) for camera in config.latent_cameras])


def scaled(demos: Demos, config: WorldConfig) -> str:
    """Say how pictures that are not square, or not of one size, are brought to the encoder's side; or ""."""
    size = picture_size(demos, config)
    if isinstance(size, int):
        return ""
    side, margin = config.world_resolution, " with a margin" * (config.world_encoder == "siglip")
    return f"world latents: pictures of {in_words(size)} are scaled whole to {side} x {side}{margin}"


# ------------------------------------------------------------------------------------------------------------
# the cache


@dataclass(frozen=True, eq=False)
class Latents:
    """The world latents of a data set, with what made them."""

    z: Tensor
    """(F, D) float32, standardised, in memory."""
    encoder: PCA | Learned
    config: WorldConfig
    raw: np.ndarray | None = None
    """(F, D) float32 before that, mapped from the cache."""

    def under(self, encoder: PCA | Learned, demos: Demos) -> Latents:
        """Give the same frames' latents as another encoder has them, a checkpoint's from other data say."""
        if same_encoder(self.encoder, encoder):
            return self
        if isinstance(encoder, PCA) or self.raw is None:
            return latents_of(encoder, demos)
        return Latents(standardised(encoder, self.raw), encoder, self.config, self.raw)  # the same network


def same_encoder(a: PCA | Learned, b: PCA | Learned) -> bool:
    """Whether two encoders give the same latents, where both are of one configuration."""
    others = b.state()
    return all(torch.equal(t, others[name]) for name, t in a.state().items() if name != "learned.facts")


def prepare(
    data_path: Path,
    demos: Demos,
    config: WorldConfig,
    backbone: Backbone | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Latents:
    """Open the data set's cache; of `pca`, after writing it where there is none yet, all ranks together.

    Args: config as `resolved` gives it, for an encoder with a backbone.
    """
    check_cameras(demos, config)
    path = cache_path(data_path, config, backbone)
    if not agree(path.exists()):
        if backbone is not None:
            raise missing(path, config, backbone)
        write_cache(path, demos, config, None, rank, ranks)
        agree(None)  # the first rank has given it its name
    return open_cache(path, demos, config, backbone)


def missing(path: Path, config: WorldConfig, backbone: Backbone) -> Refused:
    """Say how to write a learned encoder's cache, and how one that is there differs."""
    if part_of(path).exists():
        return Refused(f"world cache {path} is not finished: run the same command with --prepare")
    identity, nearest = identity_of(config, backbone), None
    for other in sorted(path.parent.glob(f"{path.name.rsplit('_', 1)[0]}_*/{SIDECAR}")):
        try:
            stored = read_json(other)
        except Refused:
            continue
        differ = [field for field, value in identity.items() if stored.get(field) != value]
        if not other.parent.name.endswith(".part") and (nearest is None or len(differ) < len(nearest[0])):
            nearest = differ, other.parent, stored
    if nearest and nearest[0]:
        field = nearest[0][0]
        sides = f"{field}: cache has {nearest[2].get(field)}, run wants {identity[field]}"
        return Refused(
            f"world cache {nearest[1]}, {sides}: write another, the same command with --prepare, or ask "
            "for that one"
        )
    return Refused(f"there are no world latents at {path}: run the same command with --prepare first")


def latents_for(data_path: Path, encoder: PCA | Learned, demos: Demos) -> Latents:
    """Give a data set's latents under a checkpoint's encoder, from their cache where one is there."""
    if isinstance(encoder, Learned):
        path = cache_path(data_path, encoder.config, encoder.backbone)
        if path.exists():
            return open_cache(path, demos, encoder.config, encoder.backbone).under(encoder, demos)
    return latents_of(encoder, demos)


def latents_of(encoder: PCA | Learned, demos: Demos) -> Latents:
    """Encode other demonstrations, held-out ones say, with the encoder of a run; nothing is cached."""
    return Latents(encoder.standardise(encode_demos(encoder, demos)), encoder, encoder.config)


def identity_of(config: WorldConfig, backbone: Backbone | None) -> dict[str, Any]:
    """What decides a latent's value besides the pictures, as JSON."""
    return config.latent_identity | ({} if backbone is None else backbone.facts)


def cache_path(data_path: Path, config: WorldConfig, backbone: Backbone | None = None) -> Path:
    """Return the folder of the world latents' cache."""
    return cache_folder(data_path, f"world_{config.world_encoder}", identity_of(config, backbone))


def made_from(demos: Demos, config: WorldConfig, backbone: Backbone | None) -> dict[str, Any]:
    """Return what a cache must agree on with the run that opens it, but for the statistics, as JSON."""
    return {
        **identity_of(config, backbone),
        "size": as_tensor(size).tolist() if isinstance(size := picture_size(demos, config), tuple) else size,
        "fingerprint": demos.fingerprint_of(config.latent_cameras),
        "rows": len(demos),
    }


def stats_json(stats: WorldStats) -> dict[str, Any]:
    return {"mean": stats.mean.tolist(), "std": stats.std.tolist()}


def standardised(encoder: PCA | Learned, rows: np.ndarray) -> Tensor:
    """Copy raw rows (F, D) into memory, standardised."""
    z = torch.empty(rows.shape)
    for start in range(0, len(rows), 2**14):
        part = torch.from_numpy(np.array(rows[start : start + 2**14]))
        z[start : start + 2**14] = encoder.standardise(part)
    return z


def open_cache(path: Path, demos: Demos, config: WorldConfig, backbone: Backbone | None = None) -> Latents:
    """Read a cache; Refused with both sides where any field of its sidecar isn't what this run needs."""
    again = f"delete {path} and run again"
    if blocks.unfinished(path):
        raise Refused(f"world cache {path} is not finished: run the same command with --prepare")
    try:
        stored = read_json(path / SIDECAR, {"crc?": {str: int}})
        rows = np.load(path / ROWS, mmap_mode="r")
        tensors = load_file(path / ENCODER)
    except (*NO_ARRAY, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise Refused(f"world cache {path} is missing or damaged ({cause}): {again}") from error
    # the config's fields first: where they differ, the stored encoder can't be rebuilt to compare the rest
    compare(stored, identity_of(config, backbone), again)
    if backbone is None:
        encoder = encoder_from_state(tensors, config)
    else:
        stats = WorldStats(*(tensors[f"stats.{name}"] for name in ("mean", "std", "dim_std")))
        encoder = Learned(config, from_tensor(tensors["learned.size"]), backbone, stats)
    compare(stored, made_from(demos, config, backbone) | stats_json(encoder.stats), again)
    if rows.shape != (len(demos), config.world_dim) or rows.dtype != np.float32:
        raise Refused(
            f"world cache {path}: {ROWS} is {rows.shape} {rows.dtype}, not one row a frame: {again}"
        )
    for file, crc in checksums(path, rows).items():
        if stored.get("crc", {}).get(file, crc) != crc:  # earlier caches have none
            raise Refused(f"world cache {path} is damaged ({file} has other bytes than written): {again}")
    return Latents(standardised(encoder, rows), encoder, config, rows)


def checksums(folder: Path, rows: np.ndarray) -> dict[str, int]:
    """Return the CRCs of a cache's array, read piece by piece, and of its encoder's file."""
    crc = 0
    for start in range(0, len(rows), 2**14):
        crc = zlib.crc32(rows[start : start + 2**14], crc)
    return {ROWS: crc, ENCODER: zlib.crc32((folder / ENCODER).read_bytes())}


# ------------------------------------------------------------------------------------------------------------
# writing


def layout_of(config: WorldConfig, frames: int) -> Layout:
    """Return where blocks.py writes the rows: a numpy file, header first."""
    shape, header = (frames, config.world_dim), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    size = f"{frames:,} frames x {config.world_dim} in float32"
    row = 4 * config.world_dim
    return Layout(
        "world latents", size, ROWS, SIDECAR, frames, row, block_of(config), header=header.getvalue()
    )


def write_cache(
    path: Path,
    demos: Demos,
    config: WorldConfig,
    backbone: Backbone | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Encode all frames, or those that an earlier call left out; every rank calls it."""
    try:
        fill(part_of(path), demos, config, backbone, rank, ranks)
    except FileNotFoundError:
        if ranks > 1 or not path.exists():  # else another process was faster, and it has written the same
            raise
    if rank == 0 and part_of(path).exists():
        blocks.finish(part_of(path), path)


def fill(
    part: Path, demos: Demos, config: WorldConfig, backbone: Backbone | None, rank: int, ranks: int
) -> None:
    """Write all that a finished cache has into its unfinished folder."""
    layout = layout_of(config, len(demos))
    if rank == 0:
        open_part(part, layout, demos, config, backbone)
    agree(None)  # the folder is laid out
    if backbone is None:
        encoder = read_pca(part, config)
    else:
        encoder = Learned(config, picture_size(demos, config), backbone, None)

    def read(block: int) -> dict[str, Tensor]:
        return clips(demos, config, layout.index(block))

    def compute(frames: dict[str, Tensor]) -> np.ndarray:
        z = encoder.encode(frames)
        if not z.isfinite().all():
            raise Refused(
                f"--world-encoder {config.world_encoder} gave latents that are not finite: mend its model"
            )
        return z.numpy()

    blocks.write_blocks(part, layout, read, compute, rank, ranks)
    wait_for_ranks()
    if rank == 0:
        complete(part, encoder, fitted_on(demos, config) if config.held_out else None)


def open_part(
    part: Path, layout: Layout, demos: Demos, config: WorldConfig, backbone: Backbone | None
) -> None:
    """Lay an unfinished cache out, or go on with one; Refused where it is of something else."""
    wanted, again = made_from(demos, config, backbone), f"delete {part} and run again"
    if (part / SIDECAR).is_file():
        try:
            stored = read_json(part / SIDECAR)
        except Refused as error:
            raise Refused(f"unfinished world cache {part} is damaged ({error}): {again}") from error
        compare(stored, wanted, again, f"unfinished world cache {part}")
    blocks.lay_out(part, layout, wanted)
    if backbone is None and not (part / ENCODER).is_file():
        (part / blocks.MARKS).write_bytes(bytes(layout.blocks))  # what is there was another fit's
        # Where several processes fit at once, the first one's counts for all.
        blocks.write_once(part / ENCODER, save(fit(demos, config).state()))


def read_pca(part: Path, config: WorldConfig) -> PCA:
    try:
        return encoder_from_state(load_file(part / ENCODER), config)
    except (OSError, SafetensorError) as error:
        raise Refused(f"{part / ENCODER} is damaged ({error}): delete {part} and run again") from error


def complete(part: Path, encoder: PCA | Learned, among: np.ndarray | None = None) -> None:
    """Write what takes all rows to know: a learned encoder's statistics, and the CRCs."""
    rows = np.load(part / ROWS, mmap_mode="r")
    if isinstance(encoder, Learned):
        encoder = dataclasses.replace(
            encoder, stats=WorldStats.of_each(rows if among is None else rows[among])
        )
        replace_text(part / ENCODER, save(encoder.state()))
    stored = read_json(part / SIDECAR) | stats_json(encoder.stats)
    stored["crc"] = checksums(part, rows)
    replace_text(part / SIDECAR, json.dumps(stored, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------
# how far the future lies


def change_statistics(
    demos: Demos, z: Tensor, K: int, stride: int, delta: bool = True, frames: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Return r (K,), the RMS of ||y_k||, and the mean of y_k (K, D), over the steps inside episodes; float32.

    y_k = z_{t+ks} - z_t, or z_{t+ks} with delta false; z (F, D) are standardised latents; frames, those that
    are trained on, default all.
    """
    assert len(z) == len(demos), f"{len(z)} latents for {len(demos)} frames"
    index = np.arange(len(demos)) if frames is None else frames
    future, valid = demos.future(index, K, stride)  # (F, K)
    if not valid[:, -1].any():
        longest = int((demos.last - demos.first)[demos.episode[index]].max()) + 1
        raise Refused(
            f"the last future frame lies {K * stride} steps ahead, but the longest episode trained on has"
            f" {longest} frames: lower the number of future frames or --world-stride"
        )
    rms, means = [], []
    for k in range(K):
        now, then = torch.from_numpy(index[valid[:, k]]), torch.from_numpy(future[valid[:, k], k])
        squares, sums = [], []
        for a, b in zip(now.split(rows := max(1, CHUNK // z.shape[1])), then.split(rows)):
            change = (z[b] - z[a] if delta else z[b]).double()  # (n, D)
            squares.append(change.square().sum(1))
            sums.append(change.mean(0) * (len(a) / len(now)))
        rms.append(torch.cat(squares).mean().sqrt())
        means.append(torch.stack(sums).sum(0))
    return torch.stack(rms).float(), torch.stack(means).float()


def future_statistics(
    demos: Demos, z: Tensor, K: int, stride: int, frames: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean future (K, D), and a factor (K, K) that correlates noise over steps as futures are.

    Over frames whose K futures all lie inside their episode; the correlation of steps k and l is that of all
    dimensions together, each with its own variance: E[z_k . z_l] / sqrt(E[z_k . z_k] E[z_l . z_l]), centred.
    """
    index = np.arange(len(demos)) if frames is None else frames
    future, valid = demos.future(index, K, stride)  # (F, K)
    whole = torch.from_numpy(future[valid[:, -1]])
    mean = torch.stack([z[whole[:, k]].double().mean(0) for k in range(K)])  # (K, D)
    products = torch.zeros(K, K, dtype=torch.float64)
    for part in whole.split(max(1, CHUNK // (K * z.shape[1]))):
        centred = z[part].double() - mean  # (n, K, D)
        products += torch.einsum("nkd,nld->kl", centred, centred)
    scale = products.diagonal().sqrt().clamp(min=1e-12)
    correlation = products / (scale[:, None] * scale) + 1e-6 * torch.eye(K, dtype=torch.float64)
    return mean.float(), torch.linalg.cholesky(correlation).float()


def write(
    home: Path,
    demos: Demos,
    config: WorldConfig,
    backbone: Backbone | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> str:
    """Write a data set's cache, or go on with it, or check a finished one; say what was done, in a line.

    Args: home, as `DataConfig.cache_home` gives it; config as `resolved` gives it. Every rank calls it.
    """
    start = time.perf_counter()
    check_cameras(demos, config)
    demos = with_checks(demos, rank, ranks, config.latent_cameras)
    path = cache_path(home, config, backbone)
    there = agree(path.exists())
    if not there:
        write_cache(path, demos, config, backbone, rank, ranks)
    if rank == 0:
        open_cache(path, demos, config, backbone)
    seconds = time.perf_counter() - start
    shape = f"{len(demos):,} latents of width {config.world_dim}"
    return f"{'checked' if there else 'wrote'} {path}: {shape} in {seconds:.1f} s"
