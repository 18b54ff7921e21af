"""LeRobot data sets, version 3 -> episodes: vectors from parquet, pictures from PNG in parquet or from video.

Small tables are read whole: meta/, and of data/ all columns that are no pictures. Pictures stay in the files
until they are asked for (lerobot_pictures.py), and are upright as they are stored. Which file holds an
episode is said by the episode's own row, for the data and for each camera independently.

    python data.py inspect tests/lerobot_v3/L_video/dataset   # what is in a data set
    python data.py check tests/lerobot_v3/L_video/dataset     # what is wrong with it

Shapes: F frames, E episodes, D a vector's width.
Source: the format as lerobot 0.6.1 writes and reads it (github.com/huggingface/lerobot, datasets/).
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from files import Refused, inside
from readers.demos import Demos, StoredPictures, boundaries
from readers.lerobot_pictures import COPY_AGAIN, ImagePlace, VideoPlace, read_images, read_video, readable
from readers.selection import camera_key

STATE, ACTION = "observation.state", "action"
COUNTERS = ("index", "episode_index", "frame_index", "task_index")
CONVERT = "convert a copy with lerobot's convert_dataset_v21_to_v30"
FIELD = re.compile(r"\{(chunk_index|file_index|video_key)(:0?\dd?)?\}")  # of the names of files in info.json
CONTROL_RATE = "fps is the label of the data set; LIBERO's control rate is 20 Hz"


# ------------------------------------------------------------------------------------------------------------
# metadata


def read_info(root: Path) -> dict[str, Any]:
    """Read meta/info.json; ValueError for other versions and for what no data set can lack."""
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
        version = info["codebase_version"]
        info["features"].items(), int(info["fps"]), info["data_path"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise Refused(f"{path} is missing or damaged ({cause}): {COPY_AGAIN}") from error
    if str(version).startswith(("v2.", "v1.")):
        raise Refused(f"{root} is a LeRobot data set of version {version}, v3.0 is read here: {CONVERT}")
    if not str(version).startswith("v3."):
        raise Refused(
            f"{root} is a LeRobot data set of version {version}, v3.0 is read here: use a copy in v3.0"
        )
    for name in ("data_path", "video_path"):
        check_pattern(info.get(name), f"{path}: {name}")
    if info["fps"] <= 0:
        raise Refused(f"{path}: fps is {info['fps']}, it must be positive: {COPY_AGAIN}")
    return info


def check_pattern(pattern: object, where: str) -> None:
    """Refuse a pattern of files' names that asks for anything but the numbers of LeRobot's own ones."""
    if pattern is None:  # a data set without videos
        return
    bad = not isinstance(pattern, str) or not FIELD.sub("0", pattern).isprintable()
    if bad or set(FIELD.sub("", pattern)) & set("{}\\:") or ".." in pattern or pattern.startswith("/"):
        like = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        raise Refused(f"{where} is {pattern!r}, not like {like}: {COPY_AGAIN}")


def camera_features(info: dict[str, Any]) -> dict[str, str]:
    """Return each camera's feature name and how it is stored, image or video; depth maps are left out."""
    return {
        name: feature["dtype"]
        for name, feature in info["features"].items()
        if feature.get("dtype") in ("image", "video")
        and not (feature.get("info") or feature.get("video_info") or {}).get("is_depth_map")
    }


def read_tasks(root: Path) -> dict[int, str]:
    """Return the instructions by task_index: the text is in the column that isn't the number."""
    path = root / "meta" / "tasks.parquet"
    table = read_table(path)
    text = [name for name in table.column_names if name != "task_index"]
    if "task_index" not in table.column_names or len(text) != 1:
        raise Refused(
            f"{path} should have task_index and one column of text, got {table.column_names}: {COPY_AGAIN}"
        )
    tasks = dict(zip(table["task_index"].to_pylist(), table[text[0]].to_pylist()))
    for number, instruction in tasks.items():
        if not isinstance(instruction, str) or not instruction.strip():
            raise Refused(
                f"{path}: task {number} has no instruction, got {instruction!r}: write one, a policy is blind"
                " to its task without"
            )
    return {int(number): instruction.strip() for number, instruction in tasks.items()}


def read_stats(root: Path, widths: dict[str, int]) -> dict[str, dict[str, np.ndarray]] | None:
    """Return meta/stats.json's vectors of these features, or None where any of what training needs lacks."""
    try:
        stored = json.loads((root / "meta" / "stats.json").read_text())
        found = {
            name: {key: np.asarray(value, np.float64) for key, value in stored[name].items()}
            for name in widths
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    for name, width in widths.items():
        needed = [found[name].get(key) for key in ("mean", "std", "min", "max")]
        if not all(v is not None and v.shape == (width,) and np.isfinite(v).all() for v in needed):
            return None
    return found


@dataclass(frozen=True, eq=False)
class Episodes:
    """meta/episodes, sorted by episode: where each one's rows and pictures lie."""

    length: np.ndarray
    """(E,) int64."""
    data: list[tuple[int, int]]
    """Each episode's chunk and file of the data."""
    videos: dict[str, list[tuple[int, int, float]]]
    """Camera -> each episode's chunk and file of its video, and where it begins in it, seconds."""
    row: np.ndarray
    """(E,) int64: each episode's first row in its data file."""

    def data_files(self, root: Path, info: dict[str, Any]) -> dict[Path, list[int]]:
        """Return the data files in order, with the episodes in each."""
        files: dict[Path, list[int]] = {}
        for number, place in enumerate(self.data):
            files.setdefault(data_file(root, info, place), []).append(number)
        return files


def read_episodes(root: Path, info: dict[str, Any], cameras: Iterable[str]) -> Episodes:
    """Read meta/episodes, the few columns that are needed of it; Refused where it doesn't add up."""
    folder = root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise Refused(f"no chunk-*/file-*.parquet in {folder}: {COPY_AGAIN}")
    videos = [name for name in cameras if camera_features(info)[name] == "video"]
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
    for name in videos:
        columns += [f"videos/{name}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    table = pa.concat_tables([read_table(file, columns) for file in files])
    found = {name: table[name].to_numpy() for name in columns}
    order = np.argsort(found["episode_index"], kind="stable")
    found = {name: values[order] for name, values in found.items()}
    check_episodes(folder, info, found)
    data = list(zip(found["data/chunk_index"].tolist(), found["data/file_index"].tolist()))
    begins = {}  # the first episode of each file
    for place, start in zip(data, found["dataset_from_index"].tolist()):
        begins.setdefault(place, start)
    places = {
        name: list(
            zip(
                *(
                    found[f"videos/{name}/{p}"].tolist()
                    for p in ("chunk_index", "file_index", "from_timestamp")
                )
            )
        )
        for name in videos
    }
    row = found["dataset_from_index"] - np.array([begins[place] for place in data])
    return Episodes(found["length"], data, places, row)


def check_episodes(folder: Path, info: dict[str, Any], found: dict[str, np.ndarray]) -> None:
    """Raise Refused where episodes are missing, empty, or other than their own counts say."""
    numbers, lengths = found["episode_index"], found["length"]
    total = info.get("total_episodes", len(numbers))
    if not np.array_equal(numbers, np.arange(total)):
        odd = (
            sorted(set(range(total)) ^ set(numbers.tolist())) or numbers[:-1][np.diff(numbers) == 0].tolist()
        )
        raise Refused(
            f"{folder}: episodes should be 0..{total - 1}, each once, but {odd[:5]} are missing, there twice"
            f" or too many: {COPY_AGAIN}"
        )
    if not len(numbers) or lengths.min() < 1:
        raise Refused(f"{folder}: {len(numbers)} episodes, the shortest of no frames: {COPY_AGAIN}")
    starts = np.cumsum(lengths) - lengths
    if not np.array_equal(found["dataset_from_index"], starts):
        first = int(np.flatnonzero(found["dataset_from_index"] != starts)[0])
        seen = f"{found['dataset_from_index'][first]}, not {starts[first]} as the lengths before it say"
        raise Refused(f"{folder}: episode {first} begins at frame {seen}: {COPY_AGAIN}")
    if info.get("total_frames", lengths.sum()) != lengths.sum():
        raise Refused(
            f"{folder}: the episodes have {lengths.sum():,} frames, info.json says {info['total_frames']:,}:"
            f" {COPY_AGAIN}"
        )


def data_file(root: Path, info: dict[str, Any], place: tuple[int, int]) -> Path:
    return inside(root, root / info["data_path"].format(chunk_index=place[0], file_index=place[1]))


def video_file(root: Path, info: dict[str, Any], camera: str, place: tuple) -> Path:
    name = info["video_path"].format(video_key=camera, chunk_index=place[0], file_index=place[1])
    return inside(root, root / name)


# ------------------------------------------------------------------------------------------------------------
# parquet


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file, or columns of it; Refused where one isn't there."""
    with readable(path), pq.ParquetFile(path) as file:
        there = file.schema_arrow.names
        if lost := [name for name in columns or () if name not in there]:
            raise Refused(f"{path} has no column {lost[0]}, there are {', '.join(there)}: {COPY_AGAIN}")
        return file.read(columns=columns)


def vectors(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Return a column of vectors (F, D), or of numbers (F, 1), whichever kind of list it is."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    kind = array.type
    if array.null_count:
        raise Refused(f"{where} has {array.null_count} empty rows: {COPY_AGAIN}")
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return array.to_numpy(zero_copy_only=False)[:, None]  # (F,) -> (F, 1)
    flat = array.flatten()
    if pa.types.is_fixed_size_list(kind):
        widths = np.array([kind.list_size])
    else:
        widths = np.unique(array.value_lengths().to_numpy(zero_copy_only=False))
    if len(widths) > 1 or not pa.types.is_primitive(flat.type) or flat.null_count:
        seen = f"lengths {widths[:4].tolist()} of {flat.type}, {flat.null_count} empty"
        raise Refused(f"{where} should hold vectors of one length, got {seen}: {COPY_AGAIN}")
    return flat.to_numpy(zero_copy_only=False).reshape(len(array), -1)


def read_file(path: Path, numbers: list[int], episodes: Episodes) -> dict[str, np.ndarray]:
    """Read states, actions and counters of these episodes' file; ValueError for a wrong count of rows."""
    table = read_table(path, [STATE, ACTION, *COUNTERS])
    wanted = int(episodes.length[numbers].sum())
    if len(table) != wanted:
        raise Refused(
            f"{path} has {len(table):,} rows, its episodes {numbers[0]}..{numbers[-1]} have {wanted:,}:"
            f" {COPY_AGAIN}"
        )
    return {name: vectors(table[name], f"{path}: {name}") for name in table.column_names}


def wrong_rows(
    path: Path, numbers: list[int], episodes: Episodes, rows: dict[str, np.ndarray]
) -> Iterator[str]:
    """Yield what can't be right in a data file's rows: counters that jump, values that aren't finite."""
    lengths = episodes.length[numbers]
    episode = np.repeat(numbers, lengths)
    step = np.concatenate([np.arange(length) for length in lengths])
    starts = np.cumsum(episodes.length) - episodes.length
    wanted = {"index": starts[episode] + step, "episode_index": episode, "frame_index": step}
    for name, values in wanted.items():
        if (wrong := np.flatnonzero(rows[name][:, 0] != values)).size:
            row = int(wrong[0])
            seen = f"{rows[name][row, 0]} in row {row}, not {values[row]}"
            yield f"{path}: {name} is {seen}, {wrong.size} rows in all: {COPY_AGAIN}"
    for name in (STATE, ACTION):
        broken = np.flatnonzero(~np.isfinite(rows[name]).all(1))
        for number in np.unique(episode[broken]):
            first = int(step[broken[episode[broken] == number][0]])
            where = f"step {first} of episode {number}"
            yield f"{path}: {name} has a non-finite value at {where}: delete the episode, or {COPY_AGAIN}"


def read_rows(root: Path, info: dict[str, Any], episodes: Episodes) -> dict[str, np.ndarray]:
    """Read states, actions and counters of all data files; Refused where rows aren't what meta/ says."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (STATE, ACTION, *COUNTERS)}
    for path, numbers in episodes.data_files(root, info).items():
        rows = read_file(path, numbers, episodes)
        for problem in wrong_rows(path, numbers, episodes, rows):
            raise Refused(f"{problem}; `python data.py check {root}` lists all that is wrong")
        for name, part in parts.items():
            part.append(rows[name])
            if part[0].shape[1] != part[-1].shape[1]:
                widths = f"{part[-1].shape[1]} wide, {part[0].shape[1]} in the files before"
                raise Refused(f"{path}: {name} is {widths}: {COPY_AGAIN}")
    return {name: np.concatenate(part) for name, part in parts.items()}


# ------------------------------------------------------------------------------------------------------------
# all of it


def read(root: Path, cameras: list[str] | None = None) -> Demos:
    """Read a data set; pictures stay where they are. Cameras: names as in the data, None for all.

    Raises Refused, in one line, for what is missing, damaged, inconsistent or of another version.
    """
    info = read_info(root)
    kinds = camera_features(info)
    names = list(kinds) if cameras is None else [camera_key(name, kinds, str(root)) for name in cameras]
    tasks, episodes = read_tasks(root), read_episodes(root, info, names)
    rows = read_rows(root, info, episodes)
    episode, first, last = boundaries(episodes.length)
    widths = {name: rows[name].shape[1] for name in (STATE, ACTION)}
    return Demos(
        images={name: stored_pictures(root, info, name, episodes, first) for name in names},
        state=rows[STATE].astype(np.float32),
        action=rows[ACTION].astype(np.float32),
        episode=episode,
        first=first,
        last=last,
        task=episode_tasks(root, rows["task_index"][:, 0], tasks, first, last),
        tasks=list(tasks.values()),
        provenance=[provenance(root, info)],
        files=file_records(root, info, episodes),
        own_stats=read_stats(root, widths),
    )


def stored_pictures(
    root: Path, info: dict[str, Any], camera: str, episodes: Episodes, first: np.ndarray
) -> StoredPictures:
    """Find a camera's pictures; their size is the first picture's, whatever info.json says."""
    if camera_features(info)[camera] == "image":
        reader = read_images
        places = [
            ImagePlace(data_file(root, info, place), camera, int(row))
            for place, row in zip(episodes.data, episodes.row)
        ]
    else:
        reader = read_video
        places = [
            VideoPlace(video_file(root, info, camera, place), place[2], info["fps"])
            for place in episodes.videos[camera]
        ]
    shape = reader(places[0], np.zeros(1, np.int64)).shape[1:]
    places = [type(p)(**(vars(p) | {"shape": shape})) for p in places]
    return StoredPictures((int(episodes.length.sum()), *shape), places, first, reader)


def episode_tasks(
    root: Path, numbers: np.ndarray, tasks: dict[int, str], first: np.ndarray, last: np.ndarray
) -> np.ndarray:
    """Return each episode's place among the tasks (E,); Refused where it has none, or more than one."""
    for a, b in zip(first, last):
        found = np.unique(numbers[a : b + 1])
        if len(found) > 1 or int(found[0]) not in tasks:
            at = int(np.searchsorted(first, a))
            why = "changes its instruction on the way" if len(found) > 1 else "has no instruction"
            raise Refused(
                f"{root}: episode {at} {why}, task_index {found.tolist()}, tasks.parquet has"
                f" {sorted(tasks)[:9]}: give each episode one instruction"
            )
    place = {number: i for i, number in enumerate(tasks)}
    return np.array([place[int(number)] for number in numbers[first]], np.int64)


def provenance(root: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Return what the data set says of itself."""
    known = ("codebase_version", "robot_type", "fps", "total_episodes", "total_frames")
    record = {name: info.get(name) for name in known}
    return {"file": root.name, "suite": None, "task_id": None, **record, "control_rate": CONTROL_RATE}


def file_records(root: Path, info: dict[str, Any], episodes: Episodes) -> list[dict[str, Any]]:
    """Return what the headers say: each file's name and bytes, and a CRC of what places the episodes."""
    files = list(episodes.data_files(root, info))
    for camera, places in episodes.videos.items():
        files += dict.fromkeys(video_file(root, info, camera, place) for place in places)
    for file in files:
        with readable(file):
            file.stat()
    placed = json.dumps([info["fps"], episodes.length.tolist(), episodes.data, episodes.videos])
    records = [{"file": str(f.relative_to(root)), "bytes": f.stat().st_size} for f in files]
    return [{"file": "meta", "crc": zlib.crc32(placed.encode())}, *records]
