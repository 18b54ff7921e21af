"""Arrays of one row a frame, written block by block: safe against kills, shared by ranks and by runs.

Frames are computed in fixed blocks, so what a row holds depends neither on the ranks nor on where a killed
run stopped. While blocks are missing the folder is named `.part`, and `done.bin` marks those that are there:
rows go to the disk first, then their mark. The last step is a rename: under its own name a cache is whole.
tower.py and world.py write through this file; each keeps a sidecar, JSON that says what it was made from.

    torchrun --nproc-per-node 2 -m latents.world cache DATA     # each rank writes its share of the blocks
    pytest tests/latents

Shapes: F frames.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from files import Refused, replace_text
from ranks import waiting
from readers.demos import Demos

MARKS = "done.bin"
PROGRESS = 10.0  # seconds between two lines


@dataclass(frozen=True)
class Layout:
    """Where the rows of a cache go."""

    what: str
    """What the rows are, in messages."""
    shape: str
    """Their size in words."""
    file: str
    """The array's file; the sidecar lies beside it."""
    sidecar: str
    frames: int
    row_bytes: int
    block: int
    """Frames of one pass."""
    elsewhere: str = "free some"
    """What to do where the disk is full."""
    header: bytes = b""
    """What stands before the first row."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.frames * self.row_bytes

    @property
    def blocks(self) -> int:
        return -(-self.frames // self.block)

    def index(self, block: int) -> np.ndarray:
        """The frames of a block; the last one may be short."""
        return np.arange(block * self.block, min((block + 1) * self.block, self.frames))


# ---- what must agree ----------------------------------------------------------------------------------


def cache_folder(data_path: Path, kind: str, identity: dict[str, Any]) -> Path:
    """Return a cache's folder, inside a data folder or beside a data file. Its name has a hash of what is not
    the data: where these changed, the old cache is met and refused, instead of caches piling up."""
    data_path = Path(data_path)
    name = f"{kind}_{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]}"
    return data_path / name if data_path.is_dir() else data_path.with_name(f"{data_path.stem}_{name}")


def compare(stored: dict[str, Any], wanted: dict[str, Any], again: str, what: str = "world cache") -> None:
    """Raise Refused, naming the field and both sides, at the first disagreement."""
    for field, value in wanted.items():
        if stored.get(field) != value:
            has, wants = (f"{side}"[:80] for side in (stored.get(field), value))
            raise Refused(f"{what}, {field}: cache has {has}, run wants {wants}: {again}")


def with_checks(demos: Demos, rank: int = 0, ranks: int = 1, cameras: Iterable[str] | None = None) -> Demos:
    """Decode every picture once, each rank its share of the episodes, and note the CRCs."""
    cameras = list(demos.images if cameras is None else cameras)
    share = {camera: demos.picture_checks(camera, slice(rank, None, ranks)) for camera in cameras}
    shares = [share] * ranks
    if ranks > 1:
        with waiting():
            dist.all_gather_object(shares, share)
    checks = {camera: [0] * len(demos.first) for camera in cameras}
    for i, share in enumerate(shares):
        for camera, found in share.items():
            checks[camera][i::ranks] = found
    return dataclasses.replace(demos, checks=checks)


def agree(value: Any) -> Any:
    """Give every rank the first one's answer: what lies on a disk may change between two looks."""
    answer = [value]
    if dist.is_initialized():
        with waiting():
            dist.broadcast_object_list(answer)
    return answer[0]


# ---- writing ------------------------------------------------------------------------------------------


def part_of(path: Path) -> Path:
    """Return where a cache lies while it is unfinished."""
    return path.with_name(f"{path.name}.part")


def unfinished(path: Path) -> bool:
    """Whether a cache, by either of its names, still lacks rows."""
    marks = path / MARKS
    return (marks.is_file() and 0 in marks.read_bytes()) or (not path.exists() and part_of(path).exists())


def lay_out(part: Path, layout: Layout, wanted: dict[str, Any]) -> None:
    """Make an unfinished cache's files, or keep those that are there; Refused where the disk is full.

    The sidecar comes first and the marks last: where there are marks, the rows that they speak of are there.
    """
    rows, marks = part / layout.file, part / MARKS
    check_space(part, layout)
    part.mkdir(parents=True, exist_ok=True)
    replace_text(part / layout.sidecar, json.dumps(wanted) + "\n")
    if marks.is_file() and not (rows.is_file() and rows.stat().st_size == layout.size):
        marks.unlink()
    for file, length in ((rows, layout.size), (marks, layout.blocks)):
        with file.open("ab") as handle:  # never cuts off what another process has written there
            handle.truncate(length)
    with rows.open("r+b") as handle:
        handle.write(layout.header)


def write_once(path: Path, content: bytes) -> None:
    """Write a file, but not over one that is there: of several processes the first one's counts."""
    with suppress(FileExistsError), tempfile.NamedTemporaryFile(dir=path.parent) as partial:
        partial.write(content)
        partial.flush()
        os.link(partial.name, path)


def check_space(part: Path, layout: Layout) -> None:
    """Say how big the array will be; Refused where the disk has too little left for what is missing."""
    size, rows = layout.size, part / layout.file
    held = min(size, rows.stat().st_blocks * 512) if rows.is_file() else 0  # of a sparse file
    there = f", {held / 1e9:.3g} there" * bool(held)
    print(f"{layout.what}: {layout.shape} = {size / 1e9:.3g} GB{there}", flush=True)
    free = shutil.disk_usage(next(p for p in (part, *part.absolute().parents) if p.exists())).free
    if size - held > free:
        need = f"{layout.what} need {(size - held) / 1e9:.3g} GB more, the disk has {free / 1e9:.3g} GB left"
        raise Refused(f"{need}: {layout.elsewhere}")


def write_blocks(
    part: Path,
    layout: Layout,
    read: Callable[[int], Any],
    compute: Callable[[Any], np.ndarray],
    rank: int,
    ranks: int,
) -> None:
    """Compute this rank's blocks; each goes to its place on the disk, and then it is marked.

    Args: read gives what a block is computed from, one block ahead, in a thread; compute gives its rows, an
    array of at least as many as the block has: what is more is left out.
    """
    start = said = time.perf_counter()
    frames = layout.frames
    with (part / layout.file).open("r+b") as rows, (part / MARKS).open("r+b", buffering=0) as marks:
        done = marks.read()
        todo = [block for block in range(rank, len(done), ranks) if not done[block]]
        for block, given in read_ahead(read, todo):
            values = np.ascontiguousarray(compute(given)[: len(layout.index(block))])  # no padding
            assert values.nbytes == len(values) * layout.row_bytes, f"rows are {values.shape} {values.dtype}"
            rows.seek(len(layout.header) + block * layout.block * layout.row_bytes)
            rows.write(values)
            rows.flush()
            os.fsync(rows.fileno())
            marks.seek(block)
            marks.write(b"\1")
            if rank == 0 and time.perf_counter() - said > PROGRESS:
                said = time.perf_counter()
                marks.seek(0)
                there = min(marks.read().count(1) * layout.block, frames)  # by all ranks
                rate = (there - done.count(1) * layout.block) / (said - start)
                left = f"{rate:8,.1f} frames/s  {(frames - there) / rate / 60:6.1f} min left"
                print(f"{layout.what}: {there:>11,} of {frames:,} frames  {left}", flush=True)


def read_ahead(read: Callable[[int], Any], blocks: list[int]) -> Iterator[tuple[int, Any]]:
    """Yield what each block is computed from, while the next one's is being read."""
    with ThreadPoolExecutor(1) as reader:
        coming = [reader.submit(read, block) for block in blocks[:1]]
        for number, block in enumerate(blocks):
            coming += [reader.submit(read, following) for following in blocks[number + 1 : number + 2]]
            yield block, coming.pop(0).result()


def finish(part: Path, path: Path) -> None:
    """Give a complete cache its name."""
    try:
        part.rename(path)
    except OSError:
        if not path.exists():  # else another process was faster, and it has written the same bits
            raise
        shutil.rmtree(part, ignore_errors=True)
    (path / MARKS).unlink(missing_ok=True)
