"""Demonstrations in flat arrays over frames: what every layout's reader returns, and statistics of it.

An episode is a range of frames, and no chunk, history or future ever leaves it. Pictures stay uint8, the
right way up. They are held in memory, or left in the files where they would not fit or hardly anyone looks.

    demos = load(Path("data/demo"))                    # readers/load.py
    demos.batch(np.arange(4), chunk=50, cameras=demos.images)
    pytest tests/test_data.py

Shapes: F frames, E episodes, S a picture's sides, B batch, T history frames, K future frames, C actions in a
chunk, A action width. Feature names are lerobot's.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from files import Refused
from readers.problems import wrong_statistics

NOOP = 1e-4  # length of an action that moves nothing, as openvla has it


@dataclass(frozen=True, eq=False)
class Demos:
    """All episodes, as flat arrays over frames."""

    images: dict[str, np.ndarray | StoredPictures]
    """Camera -> (F, S, S, 3) uint8, the right way up, as the policy sees it: in memory, or in the files."""
    state: np.ndarray
    """(F, 8) float32."""
    action: np.ndarray
    """(F, A) float32: the action taken on seeing that frame."""
    episode: np.ndarray
    """(F,) int64: the episode of each frame."""
    first: np.ndarray
    """(E,) int64: the first frame of each episode."""
    last: np.ndarray
    """(E,) int64: the last frame of each episode, itself included."""
    task: np.ndarray
    """(F,) int64: the place of each frame's instruction in `tasks`; it may change within an episode."""
    tasks: list[str]
    """All instructions: each task file's, or each task_index's."""
    provenance: list[dict[str, Any]]
    """One record per task file, JSON-able: how it was recorded and from which init states."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """One record per task file, JSON-able: its name, its bytes, and the bytes of each episode's pictures."""
    checks: dict[str, list[int]] = field(default_factory=dict)
    """Camera -> what `picture_checks` would give, where it is known already (latents/tower.py)."""
    own_stats: dict[str, dict[str, np.ndarray]] | None = None
    """The statistics that come with the data set, where they are complete and all of it is here."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Cameras whose name is another one in the data: that name -> the one in `images`."""
    numbers: np.ndarray | None = None
    """(E,) int64: the episodes' own numbers, where they are not 0 .. E-1."""

    def __len__(self) -> int:
        """Return the number of frames F."""
        return len(self.episode)

    @cached_property
    def fingerprint(self) -> str:
        """Name the data in 16 hex digits, wherever its folder lies."""
        return self.fingerprint_of(self.images)

    def fingerprint_of(self, cameras: Iterable[str]) -> str:
        """Name actions, states, instructions, boundaries and these cameras' pictures (all pixels, one CRC an
        episode): what was made from one camera stays good when another is loaded as well."""
        task = self.task[self.first]
        if (self.task != task[self.episode]).any():
            task = self.task
        digest = hashlib.sha256(json.dumps([self.tasks, task.tolist(), self.first.tolist()]).encode())
        for array in (self.state, self.action):
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        for camera in sorted(cameras):
            checks = self.checks.get(camera) or self.picture_checks(camera)
            digest.update(json.dumps([camera, self.images[camera].shape, checks]).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def light_fingerprint(self) -> str:
        """Name the data without decoding a picture: what `fingerprint_of(())` names, of pictures only what
        headers say. Compressed pictures hardly change without changing their bytes; others do."""
        return hashlib.sha256(json.dumps([self.fingerprint_of(()), self.files]).encode()).hexdigest()[:16]

    def phase(self, index: np.ndarray) -> np.ndarray:
        """Return how far into its episode each frame (B,) is: 0 to below 1."""
        first = self.first[self.episode[index]]
        return (index - first) / (self.last[self.episode[index]] + 1 - first)

    def mean_picture(self, camera: str) -> np.ndarray:
        """Return a camera's mean picture (S, S, 3) float64."""
        images = self.images[camera]
        sums = sum(images[a : b + 1].sum(0, dtype=np.int64) for a, b in zip(self.first, self.last))
        return sums / len(self)

    def picture_checks(self, camera: str, part: slice = slice(None)) -> list[int]:
        """Return one CRC over all pixels for each episode, or each of a part of them."""
        images = self.images[camera]
        return [zlib.crc32(images[a : b + 1]) for a, b in zip(self.first[part], self.last[part])]

    def only(self, episodes: np.ndarray) -> Demos:
        """Return these episodes alone, in the order of the data; tasks keep their numbers."""
        rows = np.flatnonzero(np.isin(self.episode, episodes))
        episode, first, last = boundaries((self.last - self.first + 1)[episodes])
        images = {
            name: pictures.only(episodes) if isinstance(pictures, StoredPictures) else pictures[rows]
            for name, pictures in self.images.items()
        }
        parts = {"images": images, "state": self.state[rows], "action": self.action[rows], "episode": episode}
        parts |= {"first": first, "last": last, "task": self.task[rows], "own_stats": None}
        parts |= {"numbers": None if self.numbers is None else self.numbers[episodes]}
        checks = {name: [found[e] for e in episodes] for name, found in self.checks.items()}
        return replace(self, **parts, checks=checks)

    @property
    def noops(self) -> np.ndarray:
        """(F,) bool: frames whose action does nothing, as openvla's "no_noops" data sets have it: the arm
        stays, and the gripper's command is that of the frame before, of those that do something."""
        still = np.linalg.norm(self.action[:, :-1], axis=1) < NOOP
        grip, begins = self.action[:, -1], set(self.first.tolist())
        does, command = ~still, None
        for row in range(len(self)):
            command = None if row in begins else command
            does[row] |= command is not None and grip[row] != command
            command = grip[row] if does[row] else command
        return ~does

    def without_noops(self) -> Demos:
        """Leave those out. Raises Refused where an episode has no other frames."""
        keep = ~self.noops
        kept = [np.flatnonzero(keep[a : b + 1]) for a, b in zip(self.first, self.last)]
        numbers = range(len(kept)) if self.numbers is None else self.numbers
        if empty := [number for number, steps in zip(numbers, kept) if not len(steps)]:
            raise Refused(f"--drop-noops leaves nothing of episode {empty[0]}: leave it out with --episodes")
        episode, first, last = boundaries(map(len, kept))
        images = {}
        for name, pictures in self.images.items():
            assert isinstance(pictures, StoredPictures), "before pictures are read"
            shape = (len(episode), *pictures.shape[1:])
            images[name] = replace(pictures, shape=shape, first=first, steps=kept)
        dropped = {"noops": f"{(~keep).sum():,} of {len(self):,} frames dropped"}
        parts = {name: getattr(self, name)[keep] for name in ("state", "action", "task")}
        parts |= {"images": images, "episode": episode, "first": first, "last": last, "own_stats": None}
        return replace(self, **parts, provenance=[record | dropped for record in self.provenance])

    @property
    def step(self) -> np.ndarray:
        """(F,) int64: each frame's step in its episode."""
        return np.arange(len(self)) - self.first[self.episode]

    def chunk(self, index: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Return the actions t .. t+length-1 (B, C, A) float32 and is_pad (B, C) bool: past the end the last
        action is repeated."""
        steps, inside = self._ahead(index, np.arange(length))  # (B,) -> (B, C)
        return torch.from_numpy(self.action[steps]), torch.from_numpy(~inside)

    def history(self, index: np.ndarray, T: int, stride: int) -> np.ndarray:
        """Return the frames t-(T-1)s .. t (B, T) int64; before the episode its first frame repeats."""
        index = self._check(index)
        steps = index[:, None] - stride * np.arange(T - 1, -1, -1)  # (B,) -> (B, T)
        return np.maximum(steps, self.first[self.episode[index]][:, None])

    def future(self, index: np.ndarray, K: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the frames t+s .. t+Ks (B, K) int64, clamped to the episode, and valid (B, K) bool."""
        return self._ahead(index, stride * np.arange(1, K + 1))

    def frames(self, index: np.ndarray, camera: str) -> Tensor:
        """Return pictures (B, 3, S, S) uint8, contiguous."""
        assert camera in self.images, f"camera {camera} was not loaded; these were: {', '.join(self.images)}"
        images = torch.from_numpy(self.images[camera][self._check(index)])
        return images.permute(0, 3, 1, 2).contiguous()  # (B, S, S, 3) -> (B, 3, S, S)

    def instruction(self, index: np.ndarray) -> list[str]:
        """Return each frame's instruction."""
        return [self.tasks[task] for task in self.task[self._check(index)]]

    def batch(self, index: np.ndarray, chunk: int, cameras: Iterable[str]) -> dict[str, Any]:
        """Return a batch under lerobot's names: pictures (B, 3, S, S) uint8 by camera, observation.state
        (B, 8), action (B, C, A), action_is_pad (B, C) and task, a list of B instructions."""
        action, is_pad = self.chunk(index, chunk)
        return {camera: self.frames(index, camera) for camera in cameras} | {
            "observation.state": torch.from_numpy(self.state[self._check(index)]),
            "action": action,
            "action_is_pad": is_pad,
            "task": self.instruction(index),
        }

    def _ahead(self, index: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return index + offsets clamped to the episode, and where that was not needed; both (B, n)."""
        index = self._check(index)
        steps = index[:, None] + offsets  # (B,) -> (B, n)
        last = self.last[self.episode[index]][:, None]
        return np.minimum(steps, last), steps <= last

    def _check(self, index: np.ndarray) -> np.ndarray:
        """Refuse what numpy takes silently: a negative index counts from the end, into another episode."""
        index = np.asarray(index, dtype=np.int64)
        assert index.ndim == 1, f"frame indices must be a vector, got shape {index.shape}"
        inside = (index >= 0) & (index < len(self))
        assert inside.all(), f"frame indices must lie in 0..{len(self) - 1}, got {index[~inside]}"
        return index


@dataclass(frozen=True, eq=False)
class StoredPictures:
    """One camera's pictures left in their files: an array (F, S, S, 3) uint8 that is read where indexed."""

    shape: tuple[int, int, int, int]
    places: list[Any]
    """Each episode's place in the files, as `read` takes it."""
    first: np.ndarray
    """(E,) int64: the first frame of each episode."""
    read: Callable[[Any, np.ndarray], np.ndarray]
    """The layout's own: an episode's place and steps (n,) -> pictures (n, S, S, 3), the right way up."""
    steps: list[np.ndarray] | None = None
    """Each episode's steps in the files, where some are left out."""

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read pictures (n, S, S, 3)."""
        rows = np.arange(self.shape[0])[rows]
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        episode = np.searchsorted(self.first, rows, side="right") - 1
        for number in np.unique(episode):
            here = np.flatnonzero(episode == number)
            steps = rows[here] - self.first[number]
            steps = steps if self.steps is None else self.steps[number][steps]
            out[here] = self.read(self.places[number], steps)
        return out

    def __len__(self) -> int:
        return self.shape[0]

    def only(self, episodes: np.ndarray) -> StoredPictures:
        """Return these episodes' pictures alone."""
        ends = np.append(self.first[1:], self.shape[0])
        _, first, last = boundaries((ends - self.first)[episodes])
        places = [self.places[e] for e in episodes]
        steps = None if self.steps is None else [self.steps[e] for e in episodes]
        shape = (int(last[-1]) + 1, *self.shape[1:])
        return replace(self, shape=shape, places=places, first=first, steps=steps)


def boundaries(lengths: Iterable[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return episode (F,), first (E,) and last (E,) for episodes of these lengths laid end to end."""
    lengths = np.asarray(list(lengths), dtype=np.int64)
    ends = np.cumsum(lengths)
    return np.repeat(np.arange(len(lengths)), lengths), ends - lengths, ends - 1


def picture_bytes(demos: Demos) -> int:
    return sum(math.prod(pictures.shape) for pictures in demos.images.values())


def available_memory() -> int | None:
    """Return the bytes to be had without swapping, or None where the system does not say (not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


# ---- statistics --------------------------------------------------------------------------------------

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def chosen_statistics(demos: Demos, computed: bool = False) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Return the statistics that a policy takes of its data, and a line that says where they come from.

    Args: computed, whether to leave the data set's own aside. Raises Refused where these are of other data.
    """
    stats, words = statistics(demos), f"computed from these {len(demos):,} frames"
    if demos.own_stats is None or computed:
        return stats, words
    for problem in wrong_statistics("meta/stats.json", demos.own_stats, stats):
        raise Refused(problem)
    for name, values in demos.own_stats.items():  # what they lack, older ones have no quantiles, is computed
        stats[name] |= {
            key: torch.from_numpy(value).to(torch.int64 if key == "count" else torch.float32)
            for key, value in values.items()
        }
    return stats, "the data set's own, meta/stats.json"


def statistics(demos: Demos) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of states and actions, under lerobot's names."""
    return statistics_of({"observation.state": demos.state, "action": demos.action})


def statistics_of(features: dict[str, np.ndarray]) -> dict[str, dict[str, Tensor]]:
    """Return float32 mean, std (population), min, max and quantiles of each (F, D), int64 count (1,)."""
    stats = {}
    for name, values in features.items():
        exact = torch.from_numpy(values).double()
        stats[name] = {
            "mean": exact.mean(0).float(),
            "std": exact.std(0, unbiased=False).float(),
            "min": exact.amin(0).float(),
            "max": exact.amax(0).float(),
            "count": torch.tensor([len(values)]),
        }
        found = np.quantile(exact.numpy(), list(QUANTILES.values()), axis=0).astype(np.float32)
        stats[name] |= {key: torch.from_numpy(row.copy()) for key, row in zip(QUANTILES, found)}
    return stats
