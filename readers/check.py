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

from files import Refused, told, type_in
from readers import lerobot_meta, lerobot_pictures, lerobot_v3, libero_hdf5
from readers.demos import Demos, StoredPictures, boundaries, picture_bytes, statistics, statistics_of
from readers.load import find_data, layout, load
from readers.problems import wrong_statistics
from readers.selection import DataConfig
from smolvla.config import SmolVLAConfig

TILE = 128  # side of a sample picture on the sheet, pixels
SAMPLES = 3  # of an episode: its first, middle and last frame
EPISODES = 8  # on the sheet
BLOCK = 64  # pictures decoded at a time
FULL = 2**30  # bytes of pictures up to which `inspect` takes the full fingerprint
PROGRESS = 10.0  # seconds between two lines
OFTEN = ("command", "data", "out", "episodes", "task_ids", "tasks", "decode", "init")
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

    init: str | None = None
    """Checkpoint (folder or hub id) whose tokenizer tells `check` which instructions it would cut; default:
    only those are named that have too many words for any."""


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
        if (frames := demos.task == number).any():
            count = len(np.unique(demos.episode[frames]))
            lines.append(f'task {number}: "{instruction}", {count} episodes, {frames.sum():,} frames')
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
        said = " / ".join(demos.tasks[task] for task in dict.fromkeys(demos.task[first : last + 1].tolist()))
        number = episode if demos.numbers is None else demos.numbers[episode]
        text = f"{number}: {said} ({last - first + 1} frames)"
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
    instructions: list[str] = field(default_factory=list)
    said: float = field(default_factory=time.perf_counter)

    def error(self, problem: str) -> None:
        """Note what is wrong, once."""
        if problem not in self.errors:
            self.errors.append(problem)

    def attempt(self, function: Any, *given: Any) -> Any:
        """Call a reader; what it refuses is noted, and None is returned."""
        try:
            return function(*given)
        except Refused as error:
            self.error(str(error))
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


def check(
    path: Path, decode: bool = True, options: DataConfig | None = None, init: str | None = None
) -> Findings:
    """Look for all that is wrong with a data set, or with the episodes of it that are asked for.

    Args: init, a checkpoint that is to be trained on it.
    """
    found, options = Findings(), options or DataConfig()
    (check_lerobot if layout(path) is lerobot_v3 else check_libero)(path, decode, found, options)
    found.warnings += found.attempt(cut_instructions, found.instructions, init) or []
    return found


def cut_instructions(tasks: list[str], init: str | None) -> list[str]:
    """Say which instructions a checkpoint's tokenizer would cut, or any: a word is a token at least."""
    if init is None:
        longest = SmolVLAConfig.tokenizer_max_length
        long = [task for task in tasks if len(task.split()) + 1 > longest]  # a line's end is one, too
        return [f'"{task}" has more words than {longest} tokens hold and will be cut' for task in long]
    from smolvla.checkpoint import load_processor, open_checkpoint  # imports torch

    folder, raw, language, config = open_checkpoint(init, None, None)
    return load_processor(folder, config, raw, language, {}, None, allow_missing=True).cut(tasks)


def check_libero(path: Path, decode: bool, found: Findings, options: DataConfig) -> None:
    """Check a folder of task files, or one file."""
    cameras = list(libero_hdf5.CAMERAS)
    paths = found.attempt(libero_hdf5.task_files, path) or []
    headers = (found.attempt(libero_hdf5.read_header, p, cameras, options) for p in paths)
    files = [file for file in headers if file is not None]
    if not files:
        return
    found.instructions += [file.instruction for file in files]
    found.attempt(libero_hdf5.common_sizes, files)
    keep = found.attempt(libero_hdf5.choose, files, options, path)
    keep = [np.ones(len(file.demos), bool) for file in files] if keep is None else keep
    each = [(f, name, length) for f in files for name, length in zip(f.demos, f.lengths)]
    parts, numbers = [], []
    for number in np.flatnonzero(np.concatenate(keep)):
        file, name, length = each[number]
        found.progress(f"{file.path}: {name}")
        episode = found.attempt(read_libero_episode, file, name, length)
        if episode is not None:
            parts.append(episode)
            numbers.append(number)
        for camera in cameras if decode else ():
            place = libero_hdf5.Place(file.path, f"data/{name}/obs/{libero_hdf5.CAMERAS[camera]}")
            found.attempt(libero_hdf5.read_pictures, place, np.arange(length))
    if parts:
        state, action = map(np.concatenate, zip(*parts))
        episode, first, _ = boundaries([len(part) for part, _ in parts])
        step = np.arange(len(episode)) - first[episode]
        for problem in libero_hdf5.wrong_values(path, action, state, np.array(numbers)[episode], step):
            found.error(problem)
        found.constant("observation.state", state)
        found.constant("action", action)


def read_libero_episode(file: libero_hdf5.TaskFile, name: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one episode's states and actions."""
    episode, first, last = boundaries([length])
    widths = (sum(libero_hdf5.STATE_PARTS.values()), libero_hdf5.ACTION_DIM)
    state, action = (np.empty((length, width), np.float32) for width in widths)
    demos = Demos({}, state, action, episode, first, last, np.zeros(length, np.int64), [""], [{}])
    with libero_hdf5.opened(file.path) as handle:
        where = f"{file.path}: {name}"
        libero_hdf5.read_episode(handle["data"][name], where, demos, slice(0, length), file.skipped)
    return state, action


def check_lerobot(root: Path, decode: bool, found: Findings, options: DataConfig) -> None:
    """Check a LeRobot v3 folder, by what a training stops at too."""
    info = found.attempt(lerobot_meta.read_info, root)
    if info is None:
        return
    cameras = lerobot_meta.camera_features(info)
    tasks = found.attempt(lerobot_meta.read_tasks, root)
    episodes = found.attempt(lerobot_meta.read_episodes, root, info, list(cameras))
    keep = None if episodes is None else found.attempt(episodes.chosen, root, tasks or {}, options)
    if keep is None:
        return
    found.progress(str(root))
    rows = found.attempt(lerobot_v3.read_rows, root, info, episodes, keep, tasks, options, found.error)
    if rows is None:
        return
    seen = np.unique(rows.values["task_index"]).tolist()
    found.instructions += [text for number, text in (tasks or {}).items() if number in seen]
    values = {name: rows.values[name] for name in (lerobot_v3.STATE, lerobot_v3.ACTION)}
    for name, part in values.items():
        found.constant(name, part)
    whole = len(keep) == len(episodes.number)
    check_statistics(root, values, len(rows.keep) == len(episodes.number), options, found)
    if "timestamp" in rows.values and (off := lerobot_v3.far_from_rate(rows, info["fps"])).any():
        row = int(off.argmax())
        seen = f"{rows.values['timestamp'][row, 0]:.4f} s, not {rows.step[row] / info['fps']:.4f} s"
        where = f"at step {rows.step[row]} of episode {rows.episode[row]}, {off.sum():,} rows in all"
        found.warnings.append(f"{root}: timestamp is {seen} {where}: fps in info.json is another rate")
    for camera, kind in cameras.items():
        if kind == "video":
            for problem in lerobot_v3.wrong_spans(root, info, camera, episodes, rows):
                found.error(problem)
        pictures = found.attempt(lerobot_v3.stored_pictures, root, info, camera, episodes, rows, options)
        if pictures is not None:
            check_pictures(camera, pictures, rows, decode, found)
    if whole:
        check_strays(root, info, episodes, found)


def check_statistics(
    root: Path, values: dict[str, np.ndarray], whole: bool, options: DataConfig, found: Findings
) -> None:
    """Compare meta/stats.json with the frames, where all of them are here and are numbers."""
    names = {lerobot_v3.STATE: options.state, lerobot_v3.ACTION: options.action}
    widths = {name: (names[name], part.shape[1]) for name, part in values.items()}
    stored = found.attempt(lerobot_meta.read_stats, root, widths)
    if stored is None:
        found.warnings.append(f"{root}/meta/stats.json is missing or incomplete: they will be computed")
    elif whole and all(np.isfinite(part).all() for part in values.values()):
        own = statistics_of(values)
        for problem in wrong_statistics(f"{root}/meta/stats.json", stored, own):
            found.error(problem)


def check_pictures(
    camera: str, pictures: StoredPictures, rows: lerobot_v3.Rows, decode: bool, found: Findings
) -> None:
    """Decode every picture, or look only whether the videos have a frame for each; a line an episode."""
    for number, place, length in zip(rows.number, pictures.places, rows.length.tolist()):
        found.progress(f"{camera}, episode {number}")
        if decode:
            for start in range(0, length, BLOCK):
                steps = np.arange(start, min(start + BLOCK, length))
                if found.attempt(pictures.read, place, steps) is None:
                    break
        elif isinstance(place, lerobot_pictures.VideoPlace):
            found.attempt(lerobot_pictures.frame_numbers, place, np.arange(length))


def check_strays(root: Path, info: dict[str, Any], episodes: lerobot_meta.Episodes, found: Findings) -> None:
    """Warn of files that no episode lies in, and of frames in a video that no episode shows."""
    known = set(episodes.data_files(root, info))
    shown: dict[Path, int] = {}
    for camera, places in episodes.videos.items():
        for place, length in zip(places, episodes.length.tolist()):
            path = lerobot_meta.video_file(root, info, camera, place)
            shown[path] = shown.get(path, 0) + length
    files = [*root.glob("data/**/*.parquet"), *root.glob("videos/**/*.mp4")]
    for path in sorted(set(files) - known - set(shown)):
        if path.name.startswith("."):  # a Mac leaves a ._ file beside each
            continue
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
    config = type_in(Config, __doc__, OFTEN, "data.py")
    with told():
        folder = find_data(config.data, config)
        if config.command == "check":
            raise SystemExit(report(folder, check(folder, config.decode, config, config.init)))
        demos = load(folder, in_memory=False, options=config)
        if config.command == "unpack":
            print(f"{folder}: {unpack(demos) / 1e9:.3g} GB of pictures copied out of parquet")
            return
        print(describe(demos))
        contact_sheet(demos).save(config.out)
        print(f"sample frames: {config.out}")


def report(folder: Path, found: Findings) -> int:
    """Print what was found, and return the exit code."""
    for warning in found.warnings:
        print(f"warning: {warning}")
    for error in found.errors:
        print(f"error: {error}")
    print(f"{folder}: {len(found.errors)} errors, {len(found.warnings)} warnings")
    return int(bool(found.errors))
