"""LeRobot data sets, version 3 -> episodes: vectors from parquet, pictures from PNG in parquet or from video.

Of meta/ (lerobot_meta.py) all is read, of data/ all columns that are no pictures, and only those files that
hold an episode that is asked for. Pictures stay in the files until they are asked for (lerobot_pictures.py),
and are upright as they are stored. Which frame of a video belongs to a row, its timestamp says.

    python data.py inspect tests/lerobot_v3/L_video/dataset   # what is in a data set
    python data.py check tests/lerobot_v3/L_video/dataset     # what is wrong with it

Shapes: F frames, E episodes, D a vector's width.
Source: the format as lerobot 0.6.1 writes and reads it (github.com/huggingface/lerobot, datasets/).
"""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from files import Refused, inside
from readers.demos import Demos, StoredPictures, boundaries
from readers.lerobot_meta import (
    Episodes,
    camera_features,
    data_file,
    read_episodes,
    read_info,
    read_stats,
    read_table,
    read_tasks,
    vectors,
    video_file,
)
from readers.lerobot_pictures import (
    COPY_AGAIN,
    TOLERANCE,
    ImagePlace,
    VideoFile,
    VideoPlace,
    read_images,
    read_video,
    readable,
)
from readers.problems import far_values, not_finite
from readers.selection import DataConfig, camera_key

STATE, ACTION = "observation.state", "action"
SAID = ("task", "language_instruction")  # columns in which some sets repeat each row's instruction
COUNTERS = ("index", "episode_index", "frame_index", "task_index")
CONTROL_RATE = "fps is the label of the data set; LIBERO's control rate is 20 Hz"


# ------------------------------------------------------------------------------------------------------------
# rows


def read_file(
    root: Path, info: dict[str, Any], path: Path, places: list[int], episodes: Episodes, options: DataConfig
) -> dict[str, np.ndarray]:
    """Read states, actions, times and counters of these episodes' file, under our own names.

    Raises Refused for a wrong count of rows and for a feature that the set calls otherwise.
    """
    names = {STATE: options.state, ACTION: options.action} | {name: name for name in COUNTERS}
    with readable(inside(root, path)), pq.ParquetFile(path) as file:
        there = file.schema_arrow.names
        said = [
            name for name in SAID if name in there and pa.types.is_string(file.schema_arrow.field(name).type)
        ]
    for flag, ours in (("state", STATE), ("action", ACTION)):
        if names[ours] not in there:
            others = ", ".join(name for name in there if name not in (*COUNTERS, "timestamp"))
            raise Refused(
                f"{path} has no column {names[ours]}, there are {others}: say which is the {flag} with "
                f"--{flag} NAME; where there is none, write a column of zeros"
            )
    if "timestamp" in there or episodes.videos:
        names["timestamp"] = "timestamp"
    table = read_table(root, path, [*names.values(), *said])
    wanted = int(episodes.length[places].sum())
    if len(table) != wanted:
        ends = episodes.number[places[0]], episodes.number[places[-1]]
        raise Refused(
            f"{path} has {len(table):,} rows, its episodes {ends[0]}..{ends[1]} have {wanted:,}: {COPY_AGAIN}"
        )
    rows = {ours: vectors(table[name], f"{path}: {name}") for ours, name in names.items()}
    if "timestamp" in rows:
        rows["timestamp"] = rows["timestamp"].astype(np.float64)  # added to where a video's part begins
    for name in said[:1]:
        rows["said"] = table[name].to_numpy()[:, None]
    return rows


@dataclass(frozen=True, eq=False)
class Rows:
    """What the data files hold of the episodes that are asked for, in their order."""

    keep: np.ndarray
    """(n,) int64: the episodes' places among all."""
    values: dict[str, np.ndarray]
    """Feature, counter or timestamp -> (F, D)."""
    length: np.ndarray
    """(n,) int64."""
    number: np.ndarray
    """(n,) int64: their own numbers."""

    @classmethod
    def of(
        cls, rows: dict[str, np.ndarray], places: list[int], keep: np.ndarray, episodes: Episodes
    ) -> "Rows":
        """Take those of a file's episodes that are asked for."""
        here = np.isin(places, keep)
        kept = np.array(places)[here]
        mask = np.repeat(here, episodes.length[places])
        values = {name: column[mask] for name, column in rows.items()}
        return cls(kept, values, episodes.length[kept], episodes.number[kept])

    @property
    def episode(self) -> np.ndarray:
        """(F,) the number of each frame's episode."""
        return np.repeat(self.number, self.length)

    @property
    def step(self) -> np.ndarray:
        """(F,) each frame's step."""
        return np.arange(self.length.sum()) - np.repeat(np.cumsum(self.length) - self.length, self.length)

    def each(self, name: str) -> list[np.ndarray]:
        """Return a column of one number a frame, episode by episode."""
        return np.split(self.values[name][:, 0], np.cumsum(self.length)[:-1])


def wrong_rows(path: Path, rows: Rows, episodes: Episodes, tasks: dict[int, str] | None) -> Iterator[str]:
    """Yield what can't be right in a data file's rows: counters that jump, times that don't rise, values that
    aren't finite, instructions that are none or others than meta/ has."""
    step, values = rows.step, rows.values
    start = np.repeat(episodes.start[rows.keep], rows.length)
    wanted = {"index": start + step, "episode_index": rows.episode, "frame_index": step}
    for name, right in wanted.items():
        if (wrong := np.flatnonzero(values[name][:, 0] != right)).size:
            row = int(wrong[0])
            seen = f"{values[name][row, 0]} in row {row}, not {right[row]}"
            yield f"{path}: {name} is {seen}, {wrong.size} rows in all: {COPY_AGAIN}"
    for name in (STATE, ACTION):
        for problem in not_finite(name, values[name], rows.episode, step):
            yield f"{path}: {problem}: leave the episode out with --episodes, or {COPY_AGAIN}"
    if "timestamp" in values:
        for number, times in zip(rows.number, rows.each("timestamp")):
            if not (np.diff(times) > TOLERANCE).all() or not np.isfinite(times).all():
                at = int((~(np.diff(times, prepend=-np.inf) > TOLERANCE)).argmax())
                seen = f"{times[at]:.4f} s at step {at} of episode {number}"
                yield f"{path}: timestamp is {seen}, no later than the one before: {COPY_AGAIN}"
    for place, number, own in zip(rows.keep, rows.number, rows.each("task_index")):
        seen = np.unique(own).tolist()
        if tasks is None:
            continue
        if lost := [task for task in seen if task not in tasks]:
            known = f"tasks.parquet has {sorted(tasks)[:9]}"
            yield f"{path}: episode {number} has no instruction for task_index {lost[0]}, {known}: add it"
        elif {tasks[task] for task in seen} != set(episodes.tasks[place]):
            said = f"{sorted({tasks[task] for task in seen})}, meta/episodes says {episodes.tasks[place]}"
            yield f"{path}: the instructions of episode {number} are {said}: correct either"
    for row, text in enumerate(values["said"][:, 0] if "said" in values and tasks else ()):
        task = tasks.get(int(values["task_index"][row, 0]))
        if task is not None and str(text).strip() != task:
            where = f"step {step[row]} of episode {rows.episode[row]}"
            yield f"{path}: {where} says {text!r}, its task_index stands for {task!r}: correct either"
            break


def read_rows(
    root: Path,
    info: dict[str, Any],
    episodes: Episodes,
    keep: np.ndarray,
    tasks: dict[int, str] | None,
    options: DataConfig,
    note: Callable[[str], None],
) -> Rows:
    """Read the rows of the episodes that are asked for; what is wrong with them goes to `note`, which raises
    Refused in a training and collects in a check. Raises Refused where nothing can be read."""
    parts: list[Rows] = []
    for path, places in episodes.data_files(root, info, keep).items():
        try:
            part = Rows.of(read_file(root, info, path, places, episodes, options), places, keep, episodes)
            wrong = list(wrong_rows(path, part, episodes, tasks))
            for name in (STATE, ACTION) if parts else ():
                seen, before = (p.values[name].shape[1] for p in (part, parts[0]))
                if seen != before:
                    raise Refused(
                        f"{path}: {name} is {seen} wide, {before} in the files before: {COPY_AGAIN}"
                    )
        except Refused as error:
            note(str(error))
            continue
        for problem in wrong:
            note(problem)
        parts.append(part)
    if not parts:
        raise Refused(f"{root}: none of its data files can be read")
    shared = [name for name in parts[0].values if all(name in part.values for part in parts)]
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in shared}
    joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("length", "number"))
    rows = Rows(np.concatenate([part.keep for part in parts]), values, *joined)
    for name in (STATE, ACTION):
        for problem in far_values(name, values[name], rows.episode, rows.step):
            note(f"{root}: {problem}: leave the episode out with --episodes, or {COPY_AGAIN}")
    return rows


# ------------------------------------------------------------------------------------------------------------
# pictures


def wrong_spans(
    root: Path, info: dict[str, Any], camera: str, episodes: Episodes, rows: Rows
) -> Iterator[str]:
    """Yield where a row would show another episode's frame: times outside of its own episode's part of a
    video, and parts that overlap."""
    places, ends = episodes.videos[camera], episodes.ends[camera]
    begins = np.array([place[2] for place in places])
    follows: dict[int, int] = {}  # each episode's follower in its video
    for here in by_file(places).values():
        follows.update(pairwise(sorted(here, key=lambda e: begins[e])))
    for e, number, own_times in zip(rows.keep.tolist(), rows.number, rows.each("timestamp")):
        where = f"{video_file(root, info, camera, places[e])}: episode {number}"
        own = f"meta/episodes gives it {begins[e]:.4f} to {ends[e]:.4f} s"
        times = own_times + begins[e]
        after = begins[follows[e]] if e in follows else np.inf
        outside = (times < begins[e] - TOLERANCE) | (times > ends[e] + TOLERANCE)
        if not np.isfinite([*times, ends[e]]).all() or outside.any():
            step = int(outside.argmax())
            yield f"{where} shows step {step} at {times[step]:.4f} s, but {own}: {COPY_AGAIN}"
        elif after < ends[e] - TOLERANCE or after < times[-1] + TOLERANCE:
            other = f"episode {episodes.number[follows[e]]} begins at {after:.4f} s"
            seen = f"shows step {len(times) - 1} at {times[-1]:.4f} s and {own}"
            yield f"{where} {seen}, but {other}: {COPY_AGAIN}"


def by_file(places: list[tuple[int, int, float]]) -> dict[tuple[int, int], list[int]]:
    """Sort episodes by the video that they lie in."""
    files: dict[tuple[int, int], list[int]] = {}
    for e, place in enumerate(places):
        files.setdefault(place[:2], []).append(e)
    return files


def stored_pictures(
    root: Path,
    info: dict[str, Any],
    camera: str,
    episodes: Episodes,
    rows: Rows,
    options: DataConfig,
) -> StoredPictures:
    """Find a camera's pictures; their size is the first picture's, whatever info.json says."""
    if camera_features(info)[camera] == "image":
        reader = read_images
        places = [
            ImagePlace(data_file(root, info, episodes.data[e]), camera, int(episodes.row[e]))
            for e in rows.keep
        ]
    else:
        reader, places = read_video, video_places(root, info, camera, episodes, rows, options)
    shape = reader(places[0], np.zeros(1, np.int64)).shape[1:]
    places = [replace(place, shape=shape) for place in places]
    return StoredPictures((int(rows.length.sum()), *shape), places, boundaries(rows.length)[1], reader)


def video_places(
    root: Path, info: dict[str, Any], camera: str, episodes: Episodes, rows: Rows, options: DataConfig
) -> list[VideoPlace]:
    """Say which file holds each episode's frames, and at which times: the timestamp column's, in its part."""
    places = episodes.videos[camera]
    times = [places[e][2] + own for e, own in zip(rows.keep, rows.each("timestamp"))]
    apart = min([1 / info["fps"], *(float(np.diff(own).min()) for own in times if len(own) > 1)])
    far = max(TOLERANCE, options.nearest_frame * apart)
    files, row, wanted = {}, {}, {places[e][:2] for e in rows.keep}
    for file, among in by_file(places).items():
        if file not in wanted:
            continue
        among = sorted(among, key=lambda e: places[e][2])
        row.update(zip(among, (np.cumsum(episodes.length[among]) - episodes.length[among]).tolist()))
        begins, frames = min(places[e][2] for e in among), int(episodes.length[among].sum())
        files[file] = VideoFile(video_file(root, info, camera, file), begins, frames, far)
    return [
        VideoPlace(files[places[e][:2]], int(number), row[e], own)
        for e, number, own in zip(rows.keep, rows.number, times)
    ]


# ------------------------------------------------------------------------------------------------------------
# all of it


def read(root: Path, cameras: list[str] | None = None, options: DataConfig | None = None) -> Demos:
    """Read a data set, or the part of it that is asked for; pictures stay where they are. Cameras: names as
    in the data, None for all.

    Raises Refused, in one line, for what is missing, damaged, inconsistent or of another version.
    """
    options = options or DataConfig()

    def stop(problem: str) -> None:
        raise Refused(f"{problem}; `python data.py check {root}` lists all that is wrong")

    info = read_info(root)
    kinds = camera_features(info)
    names = list(kinds) if cameras is None else [camera_key(name, kinds, str(root)) for name in cameras]
    tasks, episodes = read_tasks(root), read_episodes(root, info, names)
    keep = episodes.chosen(root, tasks, options)
    rows = read_rows(root, info, episodes, keep, tasks, options, stop)
    for name in episodes.videos:
        for problem in wrong_spans(root, info, name, episodes, rows):
            stop(problem)
    episode, first, last = boundaries(rows.length)
    state, action = (rows.values[name].astype(np.float32) for name in (STATE, ACTION))
    widths = {STATE: (options.state, state.shape[1]), ACTION: (options.action, action.shape[1])}
    place = {number: i for i, number in enumerate(tasks)}
    numbered = np.array_equal(rows.number, np.arange(len(keep)))
    return Demos(
        images={name: stored_pictures(root, info, name, episodes, rows, options) for name in names},
        state=state,
        action=action,
        episode=episode,
        first=first,
        last=last,
        task=np.array([place[int(number)] for number in rows.values["task_index"][:, 0]], np.int64),
        tasks=list(tasks.values()),
        provenance=[provenance(root, info)],
        files=file_records(root, info, episodes, rows),
        own_stats=read_stats(root, widths) if len(keep) == len(episodes.number) else None,
        numbers=None if numbered else rows.number,
    )


def provenance(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Return what the data set says of itself."""
    known = ("codebase_version", "robot_type", "fps", "total_episodes", "total_frames")
    record = {name: info.get(name) for name in known}
    return {"file": root.name, "suite": None, "task_id": None, **record, "control_rate": CONTROL_RATE}


def file_records(root: Path, info: dict[str, Any], episodes: Episodes, rows: Rows) -> list[dict[str, Any]]:
    """Return what the headers say: each file's name and bytes, and a CRC of what places the episodes."""
    files = list(episodes.data_files(root, info, rows.keep))
    for camera, places in episodes.videos.items():
        files += dict.fromkeys(video_file(root, info, camera, places[e]) for e in rows.keep)
    sizes = []
    for file in files:
        with readable(file):
            sizes.append(file.stat().st_size)
    said = [info["fps"], episodes.length.tolist(), episodes.data, episodes.videos]
    if episodes.videos and far_from_rate(rows, info["fps"]).any():
        said.append(zlib.crc32(rows.values["timestamp"].tobytes()))
    records = [{"file": str(f.relative_to(root)), "bytes": size} for f, size in zip(files, sizes)]
    return [{"file": "meta", "crc": zlib.crc32(json.dumps(said).encode())}, *records]


def far_from_rate(rows: Rows, fps: float) -> np.ndarray:
    """Say of each row (F,) whether its time is another than the label fps would have it."""
    return np.abs(rows.values["timestamp"][:, 0] - rows.step / fps) > TOLERANCE
