"""What a LeRobot data set, version 3, says of itself in meta/: features, instructions, where episodes lie.

Small tables, read whole; every name and number in them is a stranger's, and checked before it is used. Which
file holds an episode is said by the episode's own row, for the data and for each camera independently.

    info = read_info(root)
    episodes = read_episodes(root, info, camera_features(info))
    pytest tests/readers/test_lerobot_v3.py

Shapes: F frames, E episodes, D a vector's width.
Source: the format as lerobot 0.6.1 writes and reads it (github.com/huggingface/lerobot, datasets/).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from files import NUMBER, Refused, inside, parse_json, read_json
from readers.lerobot_pictures import COPY_AGAIN, readable
from readers.selection import DataConfig, camera_key, choose_cameras, choose_episodes

CONVERT = "convert a copy with lerobot's convert_dataset_v21_to_v30"
INDEX, CAMERA_FIELD = r"\{(chunk_index|file_index)(:0?\dd?)?\}", r"|\{video_key\}"
FIELDS = {  # of the names of files in info.json
    "data_path": re.compile(INDEX),
    "video_path": re.compile(INDEX + CAMERA_FIELD),
}
INFO = {
    **{"codebase_version": object, "features": {str: dict}, "fps": NUMBER, "data_path": str},
    **dict.fromkeys(("total_episodes?", "total_frames?"), int | None),
}
DEPTH = ("is_depth_map", "video.is_depth_map")  # as lerobot has written it since 0.6, and before
TEXTS = ("task", "__index_level_0__")  # what lerobot calls the column of instructions


# ------------------------------------------------------------------------------------------------------------
# metadata


def read_info(root: Path) -> dict[str, Any]:
    """Read meta/info.json; Refused for other versions and for what no data set can lack."""
    path = inside(root, root / "meta" / "info.json")
    info = read_json(path, INFO, COPY_AGAIN)
    version = info["codebase_version"]
    if str(version).startswith(("v2.", "v1.")):
        raise Refused(f"{root} is a LeRobot data set of version {version}, v3.0 is read here: {CONVERT}")
    if not str(version).startswith("v3."):
        raise Refused(
            f"{root} is a LeRobot data set of version {version}, v3.0 is read here: use a copy in v3.0"
        )
    for name in FIELDS:
        check_pattern(info.get(name), f"{path}: {name}", FIELDS[name])
    videos = [name for name, kind in camera_features(info).items() if kind == "video"]
    if videos and info.get("video_path") is None:
        raise Refused(f"{path}: video_path is null, but {videos[0]} is a video: {COPY_AGAIN}")
    fps = info["fps"]
    if not 0 < fps < np.inf:
        raise Refused(f"{path}: fps is {fps!r}, it must be a positive number: correct it, or {COPY_AGAIN}")
    return info


def check_pattern(pattern: object, where: str, known: re.Pattern[str]) -> None:
    """Refuse a pattern of files' names that asks for anything but the numbers of LeRobot's own ones."""
    if pattern is None:  # a data set without videos
        return
    bad = not isinstance(pattern, str) or not known.sub("0", pattern).isprintable()
    if bad or set(known.sub("", pattern)) & set("{}\\:") or ".." in pattern or pattern.startswith("/"):
        like = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        raise Refused(f"{where} is {pattern!r}, not like {like}: {COPY_AGAIN}")


def camera_features(info: dict[str, Any]) -> dict[str, str]:
    """Return each camera's feature name and how it is stored, image or video; depth maps are left out."""
    return {
        name: feature["dtype"]
        for name, feature in info["features"].items()
        if feature.get("dtype") in ("image", "video") and not is_depth(feature)
    }


def is_depth(feature: dict[str, Any]) -> bool:
    """Say whether a camera's pictures are distances, by whichever lerobot wrote them."""
    places = (feature, feature.get("info"), feature.get("video_info"))
    return any(bool(place.get(key)) for place in places if isinstance(place, dict) for key in DEPTH)


def read_tasks(root: Path) -> dict[int, str]:
    """Return the instructions by task_index: the text is in lerobot's column, or in the only one of text."""
    path = root / "meta" / "tasks.parquet"
    table = read_table(root, path)
    kinds = dict(zip(table.column_names, table.schema.types))
    text = [n for n, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    named = [name for name in TEXTS if name in text] or text
    if "task_index" not in kinds or not named or (len(named) > 1 and named[0] not in TEXTS):
        raise Refused(
            f"{path} should have task_index and one column of text, got {table.column_names}: {COPY_AGAIN}"
        )
    numbers, texts = whole_numbers(table, "task_index", path).tolist(), table[named[0]].to_pylist()
    for name in named[1:]:
        if table[name].to_pylist() != texts:
            raise Refused(f"{path}: columns {named[0]} and {name} have different instructions: drop one")
    for number, instruction in zip(numbers, texts):
        if not isinstance(instruction, str) or not instruction.strip():
            raise Refused(
                f"{path}: task {number} has no instruction, got {instruction!r}: write one, a policy is blind"
                " to its task without"
            )
        if numbers.count(number) > 1:
            said = " and ".join(repr(text) for n, text in zip(numbers, texts) if n == number)
            raise Refused(f"{path}: task {number} is there twice, {said}: leave the right one")
    return {number: instruction.strip() for number, instruction in zip(numbers, texts)}


def read_stats(root: Path, widths: dict[str, tuple[str, int]]) -> dict[str, dict[str, np.ndarray]] | None:
    """Return meta/stats.json's vectors, or None where any of what training needs lacks.

    Args: widths, the feature here -> its name in the data, and how wide it is.
    """
    path = inside(root, root / "meta" / "stats.json")
    try:
        stored = parse_json(path.read_bytes())
        found = {
            name: {key: np.asarray(value, np.float64) for key, value in stored[there].items()}
            for name, (there, _) in widths.items()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    for name, (_, width) in widths.items():
        for key, values in list(found[name].items()):
            if key == "count" or (values.shape == (width,) and np.isfinite(values).all()):
                continue
            if key in ("mean", "std", "min", "max"):
                return None
            del found[name][key]  # of no use, and computed where it is needed
        if not {"mean", "std", "min", "max"} <= set(found[name]):
            return None
    return found


@dataclass(frozen=True, eq=False)
class Episodes:
    """meta/episodes, sorted by episode: where each one's rows and pictures lie."""

    number: np.ndarray
    """(E,) int64: their own numbers; complete episodes may leave some out."""
    length: np.ndarray
    """(E,) int64."""
    start: np.ndarray
    """(E,) int64: each episode's first frame by the set's own count."""
    data: list[tuple[int, int]]
    """Each episode's chunk and file of the data."""
    videos: dict[str, list[tuple[int, int, float]]]
    """Camera -> each episode's chunk and file of its video, and where it begins in it, seconds."""
    ends: dict[str, np.ndarray]
    """Camera -> (E,) where each episode ends in its video, seconds."""
    row: np.ndarray
    """(E,) int64: each episode's first row in its data file."""
    tasks: list[list[str]]
    """The instructions of each, as meta/ has them."""

    def data_files(
        self, root: Path, info: dict[str, Any], among: Iterable[int] | None = None
    ) -> dict[Path, list[int]]:
        """Return the data files in order, of some episodes or all, with the episodes in each."""
        wanted = {self.data[e] for e in (range(len(self.data)) if among is None else among)}
        files: dict[Path, list[int]] = {}
        for number, place in enumerate(self.data):
            if place in wanted:
                files.setdefault(data_file(root, info, place), []).append(number)
        return files

    def chosen(self, root: Path, tasks: dict[int, str], options: DataConfig) -> np.ndarray:
        """Return the places of the episodes that are asked for, by what meta/ says of them."""
        texts, places = list(tasks.values()), {}
        for place, text in enumerate(texts):
            places.setdefault(text, []).append(place)
        of = [[place for text in own for place in places.get(text, ())] for own in self.tasks]
        return choose_episodes(texts, of, options, root, self.number)


def read_episodes(root: Path, info: dict[str, Any], cameras: Iterable[str]) -> Episodes:
    """Read meta/episodes, the few columns that are needed of it; Refused where it doesn't add up."""
    folder = root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    if not files:
        raise Refused(f"no chunk-*/file-*.parquet in {folder}: {COPY_AGAIN}")
    videos = [name for name in cameras if camera_features(info)[name] == "video"]
    counts = ["episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
    counts += [f"videos/{name}/{part}" for name in videos for part in ("chunk_index", "file_index")]
    times = [f"videos/{name}/{part}_timestamp" for name in videos for part in ("from", "to")]
    try:
        table = pa.concat_tables([read_table(root, file, [*counts, *times, "tasks"]) for file in files])
    except pa.ArrowInvalid as error:
        raise Refused(f"{folder}: its files have columns of different types: {COPY_AGAIN}") from error
    found = {name: whole_numbers(table, name, folder) for name in counts}
    found |= {name: vectors(table[name], f"{folder}: {name}")[:, 0].astype(np.float64) for name in times}
    order = np.argsort(found["episode_index"], kind="stable")
    found = {name: values[order] for name, values in found.items()}
    check_episodes(folder, info, found)
    data = list(zip(found["data/chunk_index"].tolist(), found["data/file_index"].tolist()))
    rows: dict[tuple[int, int], int] = {}  # of each file, so far
    row = np.empty(len(data), np.int64)
    for number, place in enumerate(data):
        row[number] = rows.get(place, 0)
        rows[place] = int(row[number] + found["length"][number])
    places, ends = {}, {}
    for name in videos:
        parts = (f"videos/{name}/{part}" for part in ("chunk_index", "file_index", "from_timestamp"))
        places[name] = list(zip(*(found[part].tolist() for part in parts)))
        ends[name] = found[f"videos/{name}/to_timestamp"]
    said = table["tasks"].to_pylist()
    tasks = [said[i] if isinstance(said[i], list) else [said[i]] for i in order.tolist()]
    tasks = [[str(text).strip() for text in own] for own in tasks]
    named = (found[name] for name in ("episode_index", "length", "dataset_from_index"))
    return Episodes(*named, data, places, ends, row, tasks)


def check_episodes(folder: Path, info: dict[str, Any], found: dict[str, np.ndarray]) -> None:
    """Raise Refused where episodes are missing, empty, or other than their own counts say."""
    numbers, lengths, begins = found["episode_index"], found["length"], found["dataset_from_index"]
    if twice := numbers[:-1][np.diff(numbers) == 0].tolist():
        raise Refused(f"{folder}: episodes {twice[:5]} are there twice: {COPY_AGAIN}")
    total = info.get("total_episodes")
    if total not in (None, len(numbers)):
        lost = sorted(set(range(total)) ^ set(numbers.tolist()))
        raise Refused(
            f"{folder} has {len(numbers)} episodes, info.json says {total}, of 0..{total - 1} {lost[:5]} are"
            f" missing or too many: {COPY_AGAIN}"
        )
    if not len(numbers) or lengths.min() < 1:
        raise Refused(f"{folder}: {len(numbers)} episodes, the shortest of no frames: {COPY_AGAIN}")
    gaps = np.diff(numbers, prepend=-1) > 1  # episodes that were taken out may leave their frames' numbers
    starts = np.append(0, (begins + lengths)[:-1])
    wrong = np.flatnonzero((begins != starts) & ~(gaps & (begins > starts)))
    if wrong.size:
        first = int(wrong[0])
        seen = f"{begins[first]}, not {starts[first]} as the lengths before it say"
        raise Refused(f"{folder}: episode {numbers[first]} begins at frame {seen}: {COPY_AGAIN}")
    if info.get("total_frames") not in (None, lengths.sum()):
        raise Refused(
            f"{folder}: the episodes have {lengths.sum():,} frames, info.json says {info['total_frames']:,}:"
            f" {COPY_AGAIN}"
        )


def data_file(root: Path, info: dict[str, Any], place: tuple[int, int]) -> Path:
    return inside(root, root / info["data_path"].format(chunk_index=place[0], file_index=place[1]))


def video_file(root: Path, info: dict[str, Any], camera: str, place: tuple) -> Path:
    name = info["video_path"].format(video_key=camera, chunk_index=place[0], file_index=place[1])
    return inside(root, root / name)


def needed_files(root: Path, options: DataConfig) -> list[str]:
    """Name the files beside meta/, relative to the set, that hold what is asked for."""
    info = read_info(root)
    kinds = camera_features(info)
    asked = choose_cameras(options.cameras, None)
    cameras = list(
        kinds if asked is None else (camera_key(name, kinds, str(root)) for name in asked.values())
    )
    episodes = read_episodes(root, info, cameras)
    keep = episodes.chosen(root, read_tasks(root), options)
    files = dict.fromkeys(episodes.data_files(root, info, keep))
    for camera, places in episodes.videos.items():
        files |= dict.fromkeys(video_file(root, info, camera, places[e]) for e in keep)
    return [file.relative_to(root).as_posix() for file in files]


# ------------------------------------------------------------------------------------------------------------
# parquet


def read_table(root: Path, path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file of a data set, or columns of it; Refused where one isn't there."""
    with readable(inside(root, path)), pq.ParquetFile(path) as file:
        there = file.schema_arrow.names
        if lost := [name for name in columns or () if name not in there]:
            raise Refused(f"{path} has no column {lost[0]}, there are {', '.join(there)}: {COPY_AGAIN}")
        return file.read(columns=columns)


def whole_numbers(table: pa.Table, name: str, where: Path) -> np.ndarray:
    """Return a column (F,) int64 of whole numbers."""
    column = table[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        seen = f"{column.type}, {column.null_count} empty"
        raise Refused(f"{where}: column {name} should hold whole numbers, got {seen}: {COPY_AGAIN}")
    return column.to_numpy().astype(np.int64)


def vectors(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Return a column of vectors (F, D), or of numbers (F, 1), whichever kind of list it is."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    kind = array.type
    if array.null_count:
        raise Refused(f"{where} has {array.null_count} empty rows: {COPY_AGAIN}")
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return array.to_numpy(zero_copy_only=False)[:, None]  # (F,) -> (F, 1)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise Refused(f"{where} should hold numbers or vectors, got {kind}: {COPY_AGAIN}")
    flat = array.flatten()
    if pa.types.is_fixed_size_list(kind):
        widths = np.array([kind.list_size])
    else:
        widths = np.unique(array.value_lengths().to_numpy(zero_copy_only=False))
    numbers = pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)
    if len(widths) > 1 or not numbers or flat.null_count:
        seen = f"lengths {widths[:4].tolist()} of {flat.type}, {flat.null_count} empty"
        raise Refused(f"{where} should hold vectors of one length, got {seen}: {COPY_AGAIN}")
    return flat.to_numpy(zero_copy_only=False).reshape(len(array), -1)
