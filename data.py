"""Episodes -> batches: LIBERO-layout HDF5 files held in memory, cut into what one training sample needs.

A data set is a folder of `<task>_demo.hdf5` files, or one such file. Everything is read once into flat arrays
over frames; an episode is a range of frames, and no chunk, history or future ever leaves it. Pictures stay
uint8 and are turned by 180 degrees exactly once, here: the files keep MuJoCo's raw, upside-down frames. Who
hardly looks at them leaves them in the files (`in_memory=False`): features.py, and training from its tokens.

    python demos.py --help                     # records demonstrations in this layout
    python data.py inspect DATA                # episodes, frames, tasks, cameras, ranges, provenance

Shapes: F frames, E episodes, S picture side, B batch, T history frames, K future frames, C actions in a
chunk, A action width (7). State (8) = end-effector position 3 (m), axis-angle 3 (rad), gripper 2 (m).
Sources: LIBERO's HDF5 layout (github.com/Lifelong-Robot-Learning/LIBERO); feature names as in lerobot.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
import tyro
from torch import Tensor

# lerobot's feature name -> the name inside LIBERO's files
CAMERAS = {"observation.images.image": "agentview_rgb", "observation.images.image2": "eye_in_hand_rgb"}
STATE_PARTS = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}
ACTION_DIM = 7
PAIRING = "observation_before_action"
PROVENANCE = ("suite", "task_id", "displace", "noise", "size", "draw", "reset", "env_seed", "versions")
RECORD_AGAIN = "record it again with `python demos.py`"
ORDER_STREAM = 0x0DE5  # keeps the data order apart from any other stream that is keyed by the same seed


# ------------------------------------------------------------------------------------------------------------
# episodes in memory


@dataclass(frozen=True, eq=False)
class Demos:
    """All episodes, as flat arrays over frames."""

    images: "dict[str, np.ndarray | StoredPictures]"
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
    """(E,) int64: the episode's place in `tasks`."""
    tasks: list[str]
    """The instruction of each task file."""
    provenance: list[dict[str, Any]]
    """One record per task file, JSON-able: how it was recorded and from which init states."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """One record per task file, JSON-able: its name, its bytes, and the bytes of each episode's pictures."""
    checks: dict[str, list[int]] = field(default_factory=dict)
    """Camera -> what `picture_checks` would give, where it is known already (features.py)."""

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
        digest = hashlib.sha256(json.dumps([self.tasks, self.task.tolist(), self.first.tolist()]).encode())
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

    def picture_checks(self, camera: str, part: slice = slice(None)) -> list[int]:
        """Return one CRC over all pixels for each episode, or each of a part of them."""
        images = self.images[camera]
        return [zlib.crc32(images[a : b + 1]) for a, b in zip(self.first[part], self.last[part])]

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
        return [self.tasks[task] for task in self.task[self.episode[self._check(index)]]]

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


def boundaries(lengths: Iterable[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return episode (F,), first (E,) and last (E,) for episodes of these lengths laid end to end."""
    lengths = np.asarray(list(lengths), dtype=np.int64)
    ends = np.cumsum(lengths)
    return np.repeat(np.arange(len(lengths)), lengths), ends - lengths, ends - 1


# ------------------------------------------------------------------------------------------------------------
# reading LIBERO's HDF5 layout


@dataclass(frozen=True)
class TaskFile:
    """What a file's header says, before any picture is read."""

    path: Path
    instruction: str
    demos: list[str]
    lengths: list[int]
    sizes: dict[str, int]  # camera -> S, pixels
    stored: dict[str, list[int]]  # camera -> bytes that each episode's pictures take, compressed or not
    provenance: dict[str, Any]


@dataclass(frozen=True, eq=False)
class StoredPictures:
    """One camera's pictures left in their files: an array (F, S, S, 3) uint8 that is read where indexed."""

    shape: tuple[int, int, int, int]
    places: list[tuple[Path, str]]
    """Each episode's file, and the dataset in it."""
    first: np.ndarray
    """(E,) int64: the first frame of each episode."""

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read pictures (n, S, S, 3) and turn them by 180 degrees: the one place where that happens."""
        rows = np.arange(self.shape[0])[rows]
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        episode = np.searchsorted(self.first, rows, side="right") - 1
        for number in np.unique(episode):
            here = np.flatnonzero(episode == number)
            steps = rows[here] - self.first[number]
            with opened(self.places[number][0]) as file:
                found = file[self.places[number][1]][steps.min() : steps.max() + 1]
            out[here] = found[steps - steps.min(), ::-1, ::-1]
        return out


def load(path: Path, cameras: Iterable[str] = tuple(CAMERAS), in_memory: bool = True) -> Demos:
    """Read a folder of task files, or one file, into memory: headers first, then straight into place.

    Pictures stay in the files where `in_memory` is false, and are read from there when they are asked for.
    Raises ValueError, in one line, for what is missing, damaged, inconsistent or too big for this machine.
    """
    cameras = [camera_name(camera) for camera in cameras]
    files = [read_header(file, cameras) for file in task_files(Path(path))]
    sizes = common_sizes(files)
    lengths = [length for file in files for length in file.lengths]
    episode, first, last = boundaries(lengths)
    images = {}
    for camera, size in sizes.items():
        places = [(file.path, f"data/{name}/obs/{CAMERAS[camera]}") for file in files for name in file.demos]
        images[camera] = StoredPictures((len(episode), size, size, 3), places, first)
    if in_memory:
        check_memory(len(episode), sizes)
        images = {camera: pictures[:] for camera, pictures in images.items()}
    demos = Demos(
        images=images,
        state=np.empty((len(episode), sum(STATE_PARTS.values())), np.float32),
        action=np.empty((len(episode), ACTION_DIM), np.float32),
        episode=episode,
        first=first,
        last=last,
        task=np.repeat(np.arange(len(files)), [len(file.demos) for file in files]),
        tasks=[file.instruction for file in files],
        provenance=[file.provenance for file in files],
        files=[{"file": f.path.name, "bytes": f.path.stat().st_size, "pictures": f.stored} for f in files],
    )
    row = 0
    for file in files:
        with opened(file.path) as handle:
            for name, length in zip(file.demos, file.lengths):
                read_episode(handle["data"][name], f"{file.path}: {name}", demos, slice(row, row + length))
                row += length
    return demos


def camera_name(name: str) -> str:
    """Return the feature name of a camera given in full or in short (image, image2)."""
    full = name if name.startswith("observation.images.") else f"observation.images.{name}"
    if full not in CAMERAS:
        short = " or ".join(camera.rsplit(".", 1)[1] for camera in CAMERAS)
        raise ValueError(f"unknown camera {name!r}: use {short}")
    return full


def task_files(path: Path) -> list[Path]:
    """Return the data set's HDF5 files by name; other layouts would branch off here."""
    if not path.exists():
        raise ValueError(f"no such data folder or file: {path}; record demonstrations with `python demos.py`")
    if path.is_file():
        return [path]
    for parts in sorted([path] if path.suffix == ".parts" else path.glob("*.parts")):
        stem = parts.with_suffix("")  # a recording collects its episodes in NAME.parts, then writes NAME.hdf5
        finals = (stem, stem.with_name(stem.name + ".hdf5"), stem.with_name(stem.name + "_demo.hdf5"))
        if not any(final.is_file() for final in finals):
            raise ValueError(f"interrupted recording, {parts} has no final file: run `python demos.py` again")
    files = sorted(path.glob("*.hdf5"))
    if not files:
        raise ValueError(f"no *.hdf5 file in {path}: record demonstrations there with `python demos.py`")
    return files


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; damage, found now or while reading, becomes a one-line ValueError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:  # what h5py raises, depending on where the damage lies
        cause = " ".join(str(error).split())
        raise ValueError(f"{path} is truncated or damaged ({cause}): delete it and {RECORD_AGAIN}") from error


def read_header(path: Path, cameras: list[str]) -> TaskFile:
    """Read a file's attributes and the shapes of its episodes, and refuse what can't be used."""
    with opened(path) as file:
        if "data" not in file:
            raise ValueError(f"{path} has no group 'data', so it isn't in LIBERO's layout: {RECORD_AGAIN}")
        data = file["data"]
        pairing = plain(data.attrs.get("pairing"))
        if pairing != PAIRING:
            raise ValueError(
                f"{path}: pairing is {pairing!r}, not {PAIRING!r}: public LIBERO files record observations"
                f" after the action, a step off from what a policy sees: not supported yet; {RECORD_AGAIN}"
            )
        demos = sorted((n for n in data if n.startswith("demo_")), key=lambda n: int(n.removeprefix("demo_")))
        declared = plain(data.attrs.get("num_demos"))
        if declared != len(demos) or not demos:
            raise ValueError(f"{path}: num_demos is {declared}, episodes there {len(demos)}: {RECORD_AGAIN}")
        shapes = [episode_shape(data[name], f"{path}: {name}", cameras) for name in demos]
        sizes = {camera: {shape[1][camera] for shape in shapes} for camera in cameras}
        if mixed := {camera: sorted(size) for camera, size in sizes.items() if len(size) > 1}:
            raise ValueError(f"{path} mixes image sizes {mixed}: {RECORD_AGAIN}")
        return TaskFile(
            path=path,
            instruction=read_instruction(data, path),
            demos=demos,
            lengths=[length for length, _ in shapes],
            sizes={camera: size.pop() for camera, size in sizes.items()},
            stored={
                camera: [data[f"{name}/obs/{CAMERAS[camera]}"].id.get_storage_size() for name in demos]
                for camera in cameras
            },
            provenance=read_provenance(data, demos, path),
        )


def read_instruction(data: h5py.Group, path: Path) -> str:
    """Return the instruction; an empty one would train a policy blind to its prompt, at plausible losses."""
    text = plain(data.attrs.get("problem_info", "{}"))
    try:
        instruction = json.loads(text).get("language_instruction", "")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: problem_info is no JSON object, got {text!r}: {RECORD_AGAIN}") from error
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"{path}: problem_info has no language_instruction, got {text!r}: {RECORD_AGAIN}")
    return instruction.strip()


def read_provenance(data: h5py.Group, demos: list[str], path: Path) -> dict[str, Any]:
    """Return how the file was recorded; what it does not say is None."""
    record = {name: plain(data.attrs.get(name)) for name in PROVENANCE}
    if isinstance(record["versions"], str) and record["versions"].startswith("{"):
        record["versions"] = json.loads(record["versions"])
    init_states = [plain(data[name].attrs.get("init_state_id")) for name in demos]
    return {"file": path.name, **record, "init_state_ids": init_states}


def plain(value: Any) -> Any:
    """Turn an HDF5 attribute into what JSON can hold."""
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def episode_shape(demo: h5py.Group, where: str, cameras: list[str]) -> tuple[int, dict[str, int]]:
    """Return an episode's length and its picture sizes, after checking each dataset's shape."""
    length = plain(demo.attrs.get("num_samples"))
    expected = {"actions": (length, ACTION_DIM)}
    expected |= {f"obs/{name}": (length, width) for name, width in STATE_PARTS.items()}
    for name, shape in expected.items():
        if name not in demo or demo[name].shape != shape or not length:
            seen = demo[name].shape if name in demo else "nothing"
            raise ValueError(f"{where}: {name} should be {shape} by num_samples, got {seen}: {RECORD_AGAIN}")
    sizes = {}
    for camera in cameras:
        name = f"obs/{CAMERAS[camera]}"
        if name not in demo:
            there = ", ".join(sorted(n for n in demo["obs"] if n.endswith("_rgb"))) or "none"
            raise ValueError(f"{where}: no camera {CAMERAS[camera]}, there are {there}: {RECORD_AGAIN}")
        images = demo[name]
        size = images.shape[1] if images.ndim == 4 else 0
        if images.shape != (length, size, size, 3) or images.dtype != np.uint8:
            seen = f"{images.shape} {images.dtype}"
            raise ValueError(
                f"{where}: {name} should be ({length}, S, S, 3) uint8, got {seen}: {RECORD_AGAIN}"
            )
        sizes[camera] = size
    return length, sizes


def common_sizes(files: list[TaskFile]) -> dict[str, int]:
    """Return the picture size of each camera, which all files must share."""
    for file in files[1:]:
        if file.sizes != files[0].sizes:
            raise ValueError(
                f"image sizes differ: {files[0].path.name} has {files[0].sizes}, {file.path.name} has"
                f" {file.sizes}: record all task files with one --size"
            )
    return files[0].sizes


def check_memory(frames: int, sizes: dict[str, int]) -> None:
    """Refuse a data set that would not fit, before the machine starts to swap or kills the run."""
    need = frames * sum(size * size * 3 for size in sizes.values())
    free = available_memory()
    if free is not None and need > free:
        raise ValueError(
            f"{frames:,} frames from {len(sizes)} cameras need {need / 2**30:.3g} GiB of memory, but"
            f" {free / 2**30:.3g} GiB are free: use fewer task files, or record smaller pictures"
        )


def available_memory() -> int | None:
    """Return the bytes to be had without swapping, or None where the system does not say (not Linux)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def read_episode(demo: h5py.Group, where: str, demos: Demos, rows: slice) -> None:
    """Fill one episode's rows of states and actions."""
    demos.action[rows] = demo["actions"][()]
    demos.state[rows] = np.concatenate([demo[f"obs/{name}"][()] for name in STATE_PARTS], axis=1)
    for name, values in (("actions", demos.action[rows]), ("state", demos.state[rows])):
        if not np.isfinite(values).all():
            step = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(f"{where}: {name} has a non-finite value at step {step}: {RECORD_AGAIN}")


# ------------------------------------------------------------------------------------------------------------
# statistics and keyed randomness


def statistics(demos: Demos) -> dict[str, dict[str, Tensor]]:
    """Return float32 mean, std (population), min, max and int64 count (1,), under lerobot's names."""
    stats = {}
    for name, values in (("observation.state", demos.state), ("action", demos.action)):
        exact = torch.from_numpy(values).double()
        stats[name] = {
            "mean": exact.mean(0).float(),
            "std": exact.std(0, unbiased=False).float(),
            "min": exact.amin(0).float(),
            "max": exact.amax(0).float(),
            "count": torch.tensor([len(values)]),
        }
    return stats


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """Return the generator of this seed and key: the same wherever and in whatever order it is asked for.

    The key's length goes in too, and each number must fit in 32 bits: numpy pads its entropy with zeros and
    splits big numbers into words, so that (1, 2) and (1, 2, 0) would otherwise share one stream.
    """
    if not all(0 <= number < 2**32 for number in (seed, *key)):
        raise ValueError(f"seed and key must lie in 0..2**32-1, got {(seed, *key)}: choose another --seed")
    return np.random.default_rng([len(key), seed, *(int(number) for number in key)])


def sample_order(num_frames: int, seed: int, first: int, count: int) -> np.ndarray:
    """Return the frames (count,) int64 of global samples first .. first+count-1: one permutation an epoch,
    keyed by seed and epoch, so that a resumed or wider run sees the same order."""
    assert num_frames > 0 and first >= 0 and count >= 0, f"bad sample range {(num_frames, first, count)}"
    epoch, place = np.divmod(np.arange(first, first + count), num_frames)
    parts = [epoch_order(num_frames, seed, int(e))[place[epoch == e]] for e in np.unique(epoch)]
    return np.concatenate([np.empty(0, np.int64), *parts])


@lru_cache(maxsize=4)
def epoch_order(num_frames: int, seed: int, epoch: int) -> np.ndarray:
    """Return one epoch's permutation (num_frames,) int64, read-only since it is shared."""
    order = sample_rng(seed, ORDER_STREAM, epoch).permutation(num_frames)
    order.setflags(write=False)
    return order


# ------------------------------------------------------------------------------------------------------------
# the command line


@dataclass(frozen=True)
class Config:
    """Look into a data set."""

    command: tyro.conf.Positional[Literal["inspect"]]
    """What to do: `inspect` prints what the data set holds."""

    data: tyro.conf.Positional[Path]
    """A folder of `*.hdf5` task files, or one such file."""


def describe(demos: Demos) -> str:
    """Return the lines that `inspect` prints."""
    lengths = demos.last - demos.first + 1
    lines = [
        f"{len(lengths)} episodes, {len(demos):,} frames ({lengths.min()} to {lengths.max()} an episode), "
        f"{len(demos.tasks)} tasks, fingerprint {demos.fingerprint}"
    ]
    lines += [f"camera {name}: {images.shape[1]}x{images.shape[2]}" for name, images in demos.images.items()]
    for name, stats in statistics(demos).items():
        for key in ("min", "mean", "max"):
            lines.append(f"{name:18s} {key:4s} " + " ".join(f"{value:8.3f}" for value in stats[key].tolist()))
    for number, (instruction, record) in enumerate(zip(demos.tasks, demos.provenance)):
        lines.append(f'task {number}: "{instruction}", {int((demos.task == number).sum())} episodes')
        lines += [f"  {name}: {value}" for name, value in record.items()]
    return "\n".join(lines)


def main() -> None:
    """Run the command line; what is wrong with the data is said in one line."""
    config = tyro.cli(Config, description=__doc__)
    try:
        print(describe(load(config.data)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
