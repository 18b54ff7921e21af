"""The feature cache: what a frozen vision tower makes of every picture, computed once and read in training.

A tower that stays frozen, on pictures that are never augmented, gives the same tokens every epoch. Here tower
and connector run once over every frame and camera (`SmolVLA.embed_images`, in the type that is stored);
`train.py --features` gathers those tokens from a memory map and decodes no picture at all.

    python train.py --data DATA --init CHECKPOINT --features data/tokens --prepare
    torchrun --nproc-per-node 8 train.py --data DATA --init CHECKPOINT --features data/tokens --prepare
    python train.py --data DATA --init CHECKPOINT --features data/tokens

Frames are encoded in fixed blocks, each in one pass of one shape, and written by blocks.py: on one kind of
device a row depends neither on the ranks nor on where a killed run stopped. `features.json` is the sidecar:
all that a run must agree with, the tower's weights and sizes, cameras, type, data.

Two fingerprints name the data. The full one sees every pixel, and has to decode them: it is taken when a
cache is begun, when the command meets a finished one, and when training reads pictures all the same. The
light one sees states, actions, instructions and boundaries in full, but of pictures only the files' names and
bytes and what each episode's pictures take of them. In compressed files, such as our recordings, a changed
picture hardly ever keeps its bytes; in uncompressed ones it always does, and goes unseen.

Shapes: F frames, V cameras, n tokens of a camera, W hidden width, b frames of a block, B batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from files import NO_ARRAY, Refused, read_json, replace_text
from latents import blocks
from latents.blocks import (
    Layout,
    agree,
    compare,
    finish,
    lay_out,
    part_of,
    unfinished,
    with_checks,
)
from model import SmolVLA
from ranks import wait_for_ranks
from readers.demos import Demos
from readers.load import load
from readers.selection import DataConfig
from smolvla import kernels
from smolvla.processor import Processor

FORMAT = 2  # raised when the files are laid out in another way
PICTURES = 1  # raised when anything changes between a stored picture and what the tower sees
BLOCK = 32  # frames of one pass of the tower
ROWS, SIDECAR, CHECKS = "features.bin", "features.json", "crc.npy"
KINDS = {"bfloat16": np.int16, "float32": np.float32}  # numpy has no bfloat16: its 16 bits, as they are
# Of the tower's sizes, those that its weights' shapes leave open.
SIZES = ("image_size", "vision_size", "patch_size", "scale_factor", "vision_heads", "vision_eps")


# ------------------------------------------------------------------------------------------------------------
# what must agree


def tower_identity(policy: SmolVLA, dtype: str) -> dict[str, Any]:
    """Return what decides a token's value besides the data, as JSON."""
    c = policy.config
    return {
        "format": FORMAT,
        "dtype": dtype,
        "cameras": list(c.given_cameras),
        "pictures": PICTURES,
        **{name: getattr(c, name) for name in SIZES},
        "tokens": c.image_tokens,
        "width": c.width,
        "tower": tower_fingerprint(policy, dtype),
    }


def tower_fingerprint(policy: SmolVLA, dtype: str) -> str:
    """Name the weights of tower and connector, rounded to `dtype` as they are used, in 16 hex digits.

    A tower that is held in bfloat16 already, and one that was saved so, keep the name of the exact one.
    """
    digest = hashlib.sha256()
    for part in (policy.vision, policy.connector):
        for name, weight in part.state_dict().items():
            values = weight.detach().cpu().to(getattr(torch, dtype)).float().contiguous()
            digest.update(json.dumps([name, dtype, list(values.shape)]).encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def data_identity(demos: Demos) -> dict[str, Any]:
    """Return what names the data, as JSON; its pictures are decoded where their `checks` are not known."""
    return {
        "rows": len(demos),
        "light_fingerprint": demos.light_fingerprint,
        "fingerprint": demos.fingerprint,
        "checks": demos.checks,
    }


# ------------------------------------------------------------------------------------------------------------
# reading


@dataclass(frozen=True, eq=False)
class Features:
    """A finished cache, mapped from its file."""

    path: Path
    stored: dict[str, Any]
    """The sidecar: what a run must agree with."""
    rows: np.ndarray
    """(F, V, n, W), float32 or the 16 bits of bfloat16, memory-mapped."""
    crc: np.ndarray
    """(F,) uint32, of each frame's rows: looked at when they are read, and starting a run costs nothing."""

    @classmethod
    def open(cls, path: Path) -> Features:
        """Map a cache; Refused where it is missing, unfinished or damaged."""
        rows, run = path / ROWS, "run the same command with --prepare"
        if unfinished(path):
            raise Refused(f"features {path} are not finished: {run}")
        stored = read_sidecar(path, run)
        size = rows.stat().st_size if rows.is_file() else 0
        if size != row_bytes(stored):
            has = f"{size:,} bytes instead of {row_bytes(stored):,}"
            raise Refused(f"features {path} are damaged ({ROWS} has {has}): delete {path} and {run}")
        rows = np.memmap(rows, KINDS[stored["dtype"]], "r", shape=row_shape(stored))
        try:
            crc = np.load(path / CHECKS)
        except NO_ARRAY as error:
            lost = f"features {path}: {CHECKS} is missing or damaged"
            raise Refused(f"{lost} ({error}): delete {path} and {run}") from error
        if crc.shape != rows.shape[:1] or crc.dtype != np.uint32:
            raise Refused(f"features {path}: {CHECKS} is not one CRC a frame: delete {path} and {run}")
        return cls(path, stored, rows, crc)

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's record says of the features that it was trained on."""
        return {name: self.stored[name] for name in ("dtype", "tower", "fingerprint")}

    def check(self, wanted: dict[str, Any]) -> None:
        """Raise Refused, naming the field and both sides, where the cache was made from something else."""
        again = "write others with --prepare and this run's data, --init, --seed and --dtype"
        compare(self.stored, wanted, f"{again}, or leave --features out", f"features {self.path}")

    def vouch(self, demos: Demos, full: bool = False) -> Demos:
        """Check the data, by every pixel or by the light fingerprint; give them with the CRCs in place."""
        known = dataclasses.replace(demos, checks=self.stored["checks"])
        self.check(data_identity(with_checks(demos) if full else known))
        return known

    def check_policy(self, policy: SmolVLA) -> None:
        """Refuse a policy whose own tower would give other tokens, or will once it has been trained."""
        tower = [*policy.vision.parameters(), *policy.connector.parameters()]
        if any(p.requires_grad for p in tower):
            raise Refused("--features of a tower that trains: its tokens will change; use --freeze expert")
        self.check(tower_identity(policy, str(tower[0].dtype).removeprefix("torch.")))

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """Gather these frames' tokens from the map: camera -> (B, n, W). Refused where one is damaged."""
        rows = np.ascontiguousarray(self.rows[index])  # (B, V, n, W)
        for frame, row, crc in zip(index, rows, self.crc[index], strict=True):
            if zlib.crc32(row) != crc:
                raise Refused(
                    f"features {self.path} are damaged (frame {frame} of {ROWS} has other bytes than "
                    f"written): delete {self.path} and run the same command with --prepare"
                )
        rows = torch.from_numpy(rows)
        return dict(zip(self.stored["cameras"], rows.view(getattr(torch, self.stored["dtype"])).unbind(1)))


SHAPE = {
    **dict.fromkeys(("rows", "tokens", "width"), int),
    **{"cameras": [str], "dtype": Literal["bfloat16", "float32"], "checks": {str: [int]}},
}


def read_sidecar(folder: Path, again: str) -> dict[str, Any]:
    """Read what a cache was made from; Refused where it is missing or damaged."""
    try:
        return read_json(folder / SIDECAR, SHAPE)
    except Refused as error:
        raise Refused(f"features {folder} are missing or damaged ({error}): {again}") from error


def row_shape(stored: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return (F, V, n, W) of a sidecar."""
    return stored["rows"], len(stored["cameras"]), stored["tokens"], stored["width"]


def row_bytes(stored: dict[str, Any], frames: int | None = None) -> int:
    """Return the bytes of the array, or of a number of its frames."""
    F, *frame = row_shape(stored)
    return math.prod(frame) * np.dtype(KINDS[stored["dtype"]]).itemsize * (F if frames is None else frames)


def layout_of(stored: dict[str, Any]) -> Layout:
    """Return where blocks.py writes the rows of a sidecar."""
    F, V, n, W = row_shape(stored)
    shape = f"{F:,} frames x {V} cameras x {n} tokens x {W} in {stored['dtype']}"
    elsewhere = "free some, or give --features on another disk"
    return Layout("features", shape, ROWS, SIDECAR, F, row_bytes(stored, 1), BLOCK, elsewhere)


def load_with(
    path: Path | None, data: Path, full: bool, options: DataConfig | None = None
) -> tuple[Demos, Features | None]:
    """Load a data set; where features of it are given, its pictures stay in the files.

    Args: full, where the caller will read pictures all the same: then every pixel is checked.
    """
    if path is None:
        return load(data, in_memory=None, options=options), None
    features = Features.open(path)
    return features.vouch(load(data, in_memory=False, options=options), full), features


# ------------------------------------------------------------------------------------------------------------
# writing


def open_part(part: Path, wanted: dict[str, Any]) -> None:
    """Lay an unfinished cache out, or go on with one; Refused where it is of something else."""
    if (part / SIDECAR).is_file():
        again = f"delete {part} and run again"
        compare(read_sidecar(part, again), wanted, again, f"unfinished features {part}")
    lay_out(part, layout_of(wanted), wanted)


def write_blocks(
    part: Path, policy: SmolVLA, processor: Processor, demos: Demos, rank: int, ranks: int
) -> None:
    """Encode this rank's blocks, each in one pass of one shape: the last one repeats its last frame."""
    wanted = read_sidecar(part, "run again")

    def read(block: int) -> dict[str, Tensor]:
        index = np.arange(block * BLOCK, (block + 1) * BLOCK).clip(max=len(demos) - 1)
        return {camera: demos.frames(index, camera) for camera in wanted["cameras"]}

    def compute(pictures: dict[str, Tensor]) -> np.ndarray:
        return encode(policy, processor, pictures).contiguous().view(torch.uint8).cpu().numpy()

    blocks.write_blocks(part, layout_of(wanted), read, compute, rank, ranks)


def seal(part: Path) -> None:
    """Write the CRC of each frame's rows beside them."""
    stored = read_sidecar(part, "run again")
    rows = np.memmap(part / ROWS, KINDS[stored["dtype"]], "r", shape=row_shape(stored))
    content = io.BytesIO()
    np.save(content, np.array([zlib.crc32(row) for row in rows], np.uint32))
    replace_text(part / CHECKS, content.getvalue())


@torch.no_grad()
def encode(policy: SmolVLA, processor: Processor, pictures: dict[str, Tensor]) -> Tensor:
    """Run the tower on pictures (b, 3, S, S) uint8 by camera, as training does: (b, V, n, W)."""
    device = policy.connector.proj.weight.device
    images, _ = processor.cameras({name: picture.to(device) for name, picture in pictures.items()})
    given = images[: len(pictures)]  # without the black ones behind them
    return torch.stack(policy.embed_images(given), dim=1)  # V x (b, n, W) -> (b, V, n, W)


def freeze(policy: SmolVLA, demos: Demos, dtype: torch.dtype, device: torch.device) -> None:
    """Bring a policy to a device, frozen, in the stored type, with the kernels of training."""
    for camera in policy.config.given_cameras:
        if camera not in demos.images:
            raise Refused(
                f"the policy's camera {camera} is not in the data, there are {', '.join(demos.images)}:"
                " rename one with --cameras"
            )
    policy.to(device).freeze("expert")
    policy.set_dtype(dtype)
    if device.type == "cpu":
        kernels.speed_up(policy, policy.dtype)


def write(
    path: Path, policy: SmolVLA, processor: Processor, demos: Demos, rank: int = 0, ranks: int = 1
) -> str:
    """Write the cache of a policy as `freeze` leaves it, or go on with it, or check a finished one.

    Every rank calls it; says what was done, in a line.
    """
    start = time.perf_counter()
    tower = tower_identity(policy, str(policy.dtype).removeprefix("torch."))
    part, again = part_of(path), "delete {} and run again"
    there, begun = agree((path.exists(), (part / SIDECAR).is_file()))
    if begun and not there:  # the light fingerprint is enough to go on
        demos = dataclasses.replace(demos, checks=read_sidecar(part, again.format(part))["checks"])
    else:
        demos = with_checks(demos, rank, ranks)
    wanted = tower | data_identity(demos)
    if there:
        features = Features.open(path)
        compare(features.stored, wanted, again.format(path), f"features {path}")
        for start in range(rank * BLOCK, len(demos), ranks * BLOCK):
            features.batch(np.arange(start, min(start + BLOCK, len(demos))))
    else:
        if rank == 0:
            open_part(part, wanted)
        agree(None)  # the folder is laid out
        write_blocks(part, policy, processor, demos, rank, ranks)
        wait_for_ranks()
        if rank == 0:
            try:
                seal(part)
            except (OSError, Refused):
                if not path.exists():  # else another process was faster, and it has written the same bits
                    raise
            finish(part, path)
    seconds = time.perf_counter() - start
    return f"{'checked' if there else 'wrote'} {path}: {len(demos):,} frames in {seconds:.1f} s"
