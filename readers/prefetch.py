"""Pictures of coming batches, decoded by background processes while the policy trains on the last one.

Which frames a batch has is known from its samples' numbers alone, so they can be asked for ahead, and the
processes change nothing but the time: what they give is what the files hold. A batch that nobody asked for
ahead is decoded on the spot.

    python train.py --data DATA --pictures files --workers 2
    python -m bench data --data DATA                           # samples/s with 0, 1 and 2 processes

Shapes: B batch, H and W a picture's sides.
"""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import numpy as np

from files import Refused
from readers.demos import Demos, StoredPictures
from simulator.pool import light_start

PART = 8  # frames of one camera that a process decodes at a time
HELD: dict[str, StoredPictures] = {}  # in a worker: the cameras


@dataclass(frozen=True, eq=False)
class Prefetched(StoredPictures):
    """Pictures in the files, of which some are on their way."""

    coming: dict[bytes, list[Future]] = field(default_factory=dict)
    """Rows (B,) int64, as bytes -> their parts, in order."""

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return pictures (B, H, W, 3): those that were asked for ahead, or else read now."""
        parts = None if isinstance(rows, slice) else self.coming.pop(key(rows), None)
        if parts is None:
            return super().__getitem__(rows)
        try:
            return np.concatenate([part.result() for part in parts])
        except BrokenProcessPool as error:
            raise Refused(
                f"a process that decodes pictures died ({error}): maybe out of memory, lower --workers"
            ) from error


class Loader:
    """Background processes, and demonstrations whose pictures they decode ahead."""

    def __init__(self, demos: Demos, workers: int) -> None:
        stored = {name: p for name, p in demos.images.items() if isinstance(p, StoredPictures)}
        self.coming: dict[str, dict[bytes, list[Future]]] = {name: {} for name in stored}
        ahead = {name: Prefetched(**vars(p), coming=self.coming[name]) for name, p in stored.items()}
        self.demos = replace(demos, images=demos.images | ahead)
        context = get_context("spawn")  # a fork would share open files, and torch's threads would be lost
        self.pool = ProcessPoolExecutor(workers, context, initializer=hold, initargs=(stored,))
        with light_start():  # each task starts a process, as long as none is idle
            for start in [self.pool.submit(len, ()) for _ in range(workers)]:
                start.result()

    def expect(self, index: np.ndarray, cameras: tuple[str, ...]) -> None:
        """Have these frames (B,) decoded for these cameras; nothing is done twice."""
        for camera in cameras:
            if camera in self.coming and key(index) not in self.coming[camera]:
                parts = np.split(index, range(PART, len(index), PART))
                self.coming[camera][key(index)] = [self.pool.submit(decode, camera, part) for part in parts]

    def close(self) -> None:
        """End the processes; what is still on its way is dropped."""
        self.pool.shutdown(cancel_futures=True)


def key(rows: np.ndarray) -> bytes:
    return np.asarray(rows, np.int64).tobytes()


def hold(cameras: dict[str, StoredPictures]) -> None:
    """Keep the cameras in this worker."""
    HELD.update(cameras)


def decode(camera: str, rows: np.ndarray) -> np.ndarray:
    """Read pictures (n, H, W, 3) in this worker."""
    return HELD[camera][rows]
