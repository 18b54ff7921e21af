"""What is in a data set, and what is wrong with it: `python data.py inspect` and `python data.py check`.

`check` reads every file and decodes every picture (`--no-decode`: only counts them), goes on after an error,
and names each one; the exit code is 1 where there is any. What may be meant so, a dimension that never
changes say, is a warning, and stands apart.

    python data.py inspect tests/lerobot_v3/L_video/dataset --out sheet.png
    python data.py check tests/lerobot_v3/L_image/dataset
    python data.py unpack DATA                    # once, before training reads PNG in parquet

Shapes: F frames, H and W a picture's sides.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw

from files import Refused
from readers import lerobot_pictures, lerobot_v3, libero_hdf5
from readers.demos import Demos, StoredPictures, boundaries, picture_bytes, statistics
from readers.load import layout, load
from readers.selection import DataConfig, find_data

TILE = 128  # side of a sample picture on the sheet, pixels
SAMPLES = 3  # of an episode: its first, middle and last frame
EPISODES = 8  # on the sheet
BLOCK = 64  # pictures decoded at a time
FULL = 2**30  # bytes of pictures up to which `inspect` takes the full fingerprint
PROGRESS = 10.0  # seconds between two lines
CONSTANT = 1e-8  # a smaller range than this is none


@dataclass(frozen=True)
class Config(DataConfig):
    """Look into a data set."""

    command: tyro.conf.Positional[Literal["inspect", "check", "unpack"]]
    """What to do: `inspect` prints what the data set holds, `check` what is wrong with it; `unpack` copies
    pictures out of parquet files, beside them, so that training can read single ones."""

    data: tyro.conf.Positional[Path]
    """A folder or file in LIBERO's HDF5 layout, a LeRobot v3 folder, or one's hub id."""

    out: Path = Path("inspect.png")
    """File that `inspect` writes sample frames with their instructions to."""

    decode: bool = True
    """Whether `check` decodes every picture, or only counts them."""


# ------------------------------------------------------------------------------------------------------------
# inspect


def describe(demos: Demos) -> str:
    """Return the lines that `inspect` prints."""
    lengths = demos.last - demos.first + 1
    full = picture_bytes(demos) <= FULL
    name = f"fingerprint {demos.fingerprint}" if full else f"light fingerprint {demos.light_fingerprint}"
    lines = [
        f"{len(lengths)} episodes, {len(demos):,} frames ({lengths.min()} to {lengths.max()} an episode), "
        f"{len(np.unique(demos.task))} tasks, {name}"
    ]
    for camera, images in demos.images.items():
        lines.append(f"camera {camera}: {images.shape[1]}x{images.shape[2]}")
    for feature, stats in statistics(demos).items():
        for key in ("min", "mean", "max"):
            values = " ".join(f"{value:8.3f}" for value in stats[key].tolist())
            lines.append(f"{feature:18s} {key:4s} {values}")
    records = demos.provenance if len(demos.provenance) == len(demos.tasks) else []
    for number, instruction in enumerate(demos.tasks):
        if count := int((demos.task == number).sum()):
            lines.append(f'task {number}: "{instruction}", {count} episodes')
            lines += [f"  {key}: {value}" for key, value in (records[number] if records else {}).items()]
    if not records:
        lines += [f"{key}: {value}" for record in demos.provenance for key, value in record.items()]
    return "\n".join(lines)


def contact_sheet(demos: Demos) -> Image.Image:
    """Draw sample frames of all cameras, a row an episode, with their instructions."""
    episodes = np.unique(np.linspace(0, len(demos.first) - 1, EPISODES).round().astype(int))
    cameras, line = list(demos.images), 14
    columns = SAMPLES * max(1, len(cameras))
    sheet = Image.new("RGB", (columns * TILE, len(episodes) * (TILE + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(episodes):
        first, last, top = int(demos.first[episode]), int(demos.last[episode]), row * (TILE + line)
        steps = np.linspace(first, last, SAMPLES).round().astype(np.int64)
        text = f"{episode}: {demos.tasks[demos.task[episode]]} ({last - first + 1} frames)"
        draw.text((2, top), text.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for number, camera in enumerate(cameras):
            for place, pixels in enumerate(demos.images[camera][steps]):
                tile = Image.fromarray(pixels)
                tile.thumbnail((TILE - 2, TILE - 2))
                sheet.paste(tile, ((number * SAMPLES + place) * TILE + 1, top + line + 1))
    return sheet


# ------------------------------------------------------------------------------------------------------------
# check


@dataclass
class Findings:
    """What `check` found."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    said: float = field(default_factory=time.perf_counter)

    def attempt(self, function: Any, *given: Any) -> Any:
        """Call a reader; what it refuses is noted, and None is returned."""
        try:
            return function(*given)
        except Refused as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))
            return None

    def progress(self, what: str) -> None:
        """Say now and then how far it is."""
        if time.perf_counter() - self.said > PROGRESS:
            self.said = time.perf_counter()
            print(f"checking {what}", file=sys.stderr, flush=True)

    def constant(self, what: str, values: np.ndarray) -> None:
        """Warn of dimensions of (F, D) that never change: normalised, they are noise."""
        for dim in np.flatnonzero(np.ptp(values, axis=0) < CONSTANT):
            self.warnings.append(
                f"{what}: dimension {dim} is {values[0, dim]:.6g} in all {len(values):,} frames"
            )


def check(path: Path, decode: bool = True) -> Findings:
    """Look for all that is wrong with a data set."""
    found = Findings()
    (check_lerobot if layout(path) is lerobot_v3 else check_libero)(path, decode, found)
    return found


def check_libero(path: Path, decode: bool, found: Findings) -> None:
    """Check a folder of task files, or one file."""
    cameras = list(libero_hdf5.CAMERAS)
    paths = found.attempt(libero_hdf5.task_files, path) or []
    files = [f for p in paths if (f := found.attempt(libero_hdf5.read_header, p, cameras)) is not None]
    if files:
        found.attempt(libero_hdf5.common_sizes, files)
    parts = []
    for file in files:
        for name, length in zip(file.demos, file.lengths):
            found.progress(f"{file.path}: {name}")
            episode = found.attempt(read_libero_episode, file, name, length)
            parts += [] if episode is None else [episode]
            for camera in cameras if decode else ():
                place = libero_hdf5.Place(file.path, f"data/{name}/obs/{libero_hdf5.CAMERAS[camera]}")
                found.attempt(libero_hdf5.read_pictures, place, np.arange(length))
    if parts:
        found.constant("observation.state", np.concatenate([state for state, _ in parts]))
        found.constant("action", np.concatenate([action for _, action in parts]))


def read_libero_episode(file: libero_hdf5.TaskFile, name: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one episode's states and actions."""
    episode, first, last = boundaries([length])
    widths = (sum(libero_hdf5.STATE_PARTS.values()), libero_hdf5.ACTION_DIM)
    state, action = (np.empty((length, width), np.float32) for width in widths)
    demos = Demos({}, state, action, episode, first, last, np.zeros(1, np.int64), [""], [{}])
    with libero_hdf5.opened(file.path) as handle:
        where = f"{file.path}: {name}"
        libero_hdf5.read_episode(handle["data"][name], where, demos, slice(0, length), file.skipped)
    return state, action


def check_lerobot(root: Path, decode: bool, found: Findings) -> None:
    """Check a LeRobot v3 folder."""
    info = found.attempt(lerobot_v3.read_info, root)
    if info is None:
        return
    cameras = lerobot_v3.camera_features(info)
    tasks = found.attempt(lerobot_v3.read_tasks, root)
    episodes = found.attempt(lerobot_v3.read_episodes, root, info, list(cameras))
    if episodes is None:
        return
    rows = {}
    for path, numbers in episodes.data_files(root, info).items():
        found.progress(str(path))
        part = found.attempt(lerobot_v3.read_file, path, numbers, episodes)
        if part is not None:
            found.errors += lerobot_v3.wrong_rows(path, numbers, episodes, part)
            steps = np.concatenate([np.arange(length) for length in episodes.length[numbers]])
            found.attempt(check_times, path, info["fps"], steps)
            check_tasks(path, numbers, episodes, part["task_index"][:, 0], tasks, found)
            for name in (lerobot_v3.STATE, lerobot_v3.ACTION):
                rows.setdefault(name, []).append(part[name])
    for name, parts in rows.items():
        if len({part.shape[1] for part in parts}) > 1:
            widths = sorted({part.shape[1] for part in parts})
            found.errors.append(f"{root}: {name} is {widths} wide in different files: make them one width")
        else:
            found.constant(name, np.concatenate(parts))
    if lerobot_v3.read_stats(root, {name: parts[0].shape[1] for name, parts in rows.items()}) is None:
        found.warnings.append(f"{root}/meta/stats.json is missing or incomplete: they will be computed")
    _, first, _ = boundaries(episodes.length)
    for camera in cameras:
        pictures = found.attempt(lerobot_v3.stored_pictures, root, info, camera, episodes, first)
        if pictures is not None:
            check_pictures(camera, pictures, episodes, decode, found)
    check_strays(root, info, episodes, found)


def check_times(path: Path, fps: float, step: np.ndarray) -> None:
    """Raise Refused where timestamps aren't the frame's number over the rate, as videos need."""
    column = lerobot_v3.read_table(path, ["timestamp"])["timestamp"]
    times = lerobot_v3.vectors(column, f"{path}: timestamp")[:, 0]
    wrong = np.flatnonzero(~(np.abs(times - step / fps) <= lerobot_pictures.TOLERANCE))
    if wrong.size:
        row = int(wrong[0])
        seen = f"{times[row]:.4f} s in row {row}, not {step[row] / fps:.4f} s"
        raise Refused(f"{path}: timestamp is {seen}, {wrong.size} rows in all: correct fps in info.json")


def check_tasks(
    path: Path,
    numbers: list[int],
    episodes: lerobot_v3.Episodes,
    task: np.ndarray,
    tasks: dict[int, str] | None,
    found: Findings,
) -> None:
    """Note every episode without an instruction, or with more than one."""
    _, first, last = boundaries(episodes.length[numbers])
    for number, a, b in zip(numbers, first, last):
        seen = np.unique(task[a : b + 1]).tolist()
        if len(seen) > 1 or (tasks is not None and seen[0] not in tasks):
            what = "several instructions" if len(seen) > 1 else "no instruction"
            found.errors.append(f"{path}: episode {number} has {what}, task_index {seen}: give it one")


def check_pictures(
    camera: str, pictures: StoredPictures, episodes: lerobot_v3.Episodes, decode: bool, found: Findings
) -> None:
    """Decode every picture, or look only whether the videos have a frame for each; a line an episode."""
    for number, (place, length) in enumerate(zip(pictures.places, episodes.length.tolist())):
        found.progress(f"{camera}, episode {number}")
        if decode:
            for start in range(0, length, BLOCK):
                steps = np.arange(start, min(start + BLOCK, length))
                if found.attempt(pictures.read, place, steps) is None:
                    break
        elif isinstance(place, lerobot_pictures.VideoPlace):
            found.attempt(lerobot_pictures.frame_numbers, place, np.arange(length))


def check_strays(root: Path, info: dict[str, Any], episodes: lerobot_v3.Episodes, found: Findings) -> None:
    """Warn of files that no episode lies in, and of frames in a video that no episode shows."""
    known = set(episodes.data_files(root, info))
    shown: dict[Path, int] = {}
    for camera, places in episodes.videos.items():
        for place, length in zip(places, episodes.length.tolist()):
            path = lerobot_v3.video_file(root, info, camera, place)
            shown[path] = shown.get(path, 0) + length
    files = [*root.glob("data/**/*.parquet"), *root.glob("videos/**/*.mp4")]
    for path in sorted(set(files) - known - set(shown)):
        found.warnings.append(f"{path} belongs to no episode")
    for path, count in shown.items():
        there = lerobot_pictures.count_frames(path) if path.is_file() else count
        if there > count:
            found.warnings.append(f"{path} has {there:,} frames, {count:,} belong to episodes")


def unpack(demos: Demos) -> int:
    """Copy the pictures of all parquet files out of them; return the bytes written."""
    places = [p for pictures in demos.images.values() for p in pictures.places]
    columns = {(p.path, p.column) for p in places if isinstance(p, lerobot_pictures.ImagePlace)}
    return sum(lerobot_pictures.unpack(path, column) for path, column in sorted(columns))


# ------------------------------------------------------------------------------------------------------------
# the command line


def main() -> None:
    """Run the command line; what is wrong with the data is said in one line each."""
    config = tyro.cli(Config, description=__doc__)
    try:
        folder = find_data(config.data, config.data_revision)
        if config.command == "check":
            raise SystemExit(report(folder, check(folder, config.decode)))
        demos = load(folder, in_memory=False, options=config)
        if config.command == "unpack":
            print(f"{folder}: {unpack(demos) / 1e9:.3g} GB of pictures copied out of parquet")
            return
        print(describe(demos))
        contact_sheet(demos).save(config.out)
        print(f"sample frames: {config.out}")
    except Refused as error:
        raise SystemExit(f"error: {error}") from error


def report(folder: Path, found: Findings) -> int:
    """Print what was found, and return the exit code."""
    for warning in found.warnings:
        print(f"warning: {warning}")
    for error in found.errors:
        print(f"error: {error}")
    print(f"{folder}: {len(found.errors)} errors, {len(found.warnings)} warnings")
    return int(bool(found.errors))
