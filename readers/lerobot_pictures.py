"""Pictures of LeRobot data sets, read where they lie: image files inside parquet, and frames of videos.

A picture is decoded when it is asked for: of parquet only its row group is read, of a video only the frames
from the key frame on. Each process keeps the last few files open. A video frame is the one whose presentation
time lies nearest to its row's, and no further off than TOLERANCE or --nearest-frame. Presentation times come
from the packets, so B-frames and cuts are seen for what they are.

    python -m bench data                                   # how fast

Shapes: H and W a picture's sides, n pictures of a call.
Source: the format as lerobot 0.6.1 writes and reads it (github.com/huggingface/lerobot, datasets/).
"""

import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from files import Refused

TOLERANCE = 1e-4  # seconds between the time that is asked for and a frame's own, lerobot's default
RATE = 0.02  # how far a camera's rate may be off its label, of it, with --nearest-frame
AHEAD = 8  # frames that are decoded and dropped rather than looked for again from a key frame
OPEN_FILES = 8  # parquet files and videos that each process keeps open
OPEN_GROUPS = 4  # row groups of pictures, still compressed, that each process keeps in memory
COPY_AGAIN = "copy or download the data set again"
READING = threading.Lock()  # a parquet file is read by one thread at a time


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what pyarrow and PyAV raise for a missing or damaged file into a one-line ValueError."""
    try:
        yield
    except FileNotFoundError as error:
        raise Refused(f"{path} is missing, but meta/ speaks of it: {COPY_AGAIN}") from error
    except (pa.ArrowException, OSError, av.error.FFmpegError) as error:
        cause = " ".join(str(error).split())
        if (
            isinstance(error, OSError) and error.errno in errno.errorcode
        ):  # locked, not ours to read, a bad disk
            raise Refused(f"{path} cannot be read: {os.strerror(error.errno)}") from error
        raise Refused(f"{path} is truncated or damaged ({cause}): {COPY_AGAIN}") from error


def stamp(path: Path) -> tuple[str, int, int, int]:
    """Name an open file: by its process too, since a fork would share the position in it."""
    with readable(path):
        stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns, os.getpid()


# ------------------------------------------------------------------------------------------------------------
# image files inside parquet


@lru_cache(OPEN_FILES)
def open_parquet(name: tuple) -> tuple[pq.ParquetFile, np.ndarray]:
    """Open a data file; give also the first row of each row group, and the number of rows at the end."""
    with readable(Path(name[0])):
        file = pq.ParquetFile(name[0])
        groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    return file, np.cumsum([0, *groups])


@lru_cache(OPEN_GROUPS)
def read_group(name: tuple, column: str, group: int) -> pa.ChunkedArray:
    """Read a row group's pictures as they are stored, (n,) binary."""
    with readable(Path(name[0])), READING:
        found = open_parquet(name)[0].read_row_group(group, columns=[column])[column]
    return pc.struct_field(found, "bytes") if pa.types.is_struct(found.type) else found


@dataclass(frozen=True)
class ImagePlace:
    """An episode's pictures in a column of a data file."""

    path: Path
    column: str
    row: int
    """Its first row."""
    shape: tuple[int, int, int] | None = None
    """H, W, 3 of every picture of this camera; None: not known yet."""


def read_images(place: ImagePlace, steps: np.ndarray) -> np.ndarray:
    """Decode an episode's pictures (n, H, W, 3) uint8 at these steps, from image files inside parquet."""
    name = stamp(place.path)
    starts = open_parquet(name)[1]
    rows = place.row + steps
    pictures = {}
    unpacked = find_unpacked(name, place.column)
    for row in np.unique(rows).tolist():
        if unpacked is None:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            content = read_group(name, place.column, group)[row - int(starts[group])].as_py()
        else:
            content = unpacked.read(row)
        pictures[row] = decode_image(content, f"{place.path}: {place.column} in row {row}")
        check_shape(pictures[row].shape, place.shape, f"{place.path}: {place.column} in row {row}")
    return np.stack([pictures[row] for row in rows.tolist()])


class Unpacked:
    """Image files laid end to end, copied out of a parquet file; then where each begins, and of which file.

    Parquet gives no single picture: a whole row group is read for it, ten megabytes and more.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        size = path.stat().st_size
        tail = np.frombuffer(os.pread(self.file.fileno(), 24, max(size - 24, 0)), np.int64)
        self.source, count = tail[:2].tolist(), int(tail[2]) if len(tail) == 3 else -1
        begin = size - 24 - 8 * (count + 1)
        self.offsets = np.zeros(0, np.int64)
        if count >= 0 and begin >= 0:
            self.offsets = np.frombuffer(os.pread(self.file.fileno(), 8 * (count + 1), begin), np.int64)
        self.whole = len(self.offsets) > 0 and int(self.offsets[-1]) == begin

    def read(self, row: int) -> bytes:
        """Return a row's image file."""
        first, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return os.pread(self.file.fileno(), end - first, first)


def unpacked_path(path: Path, column: str) -> Path:
    return path.with_suffix(f".{column}.pictures")


@lru_cache(16 * OPEN_FILES)
def open_unpacked(name: tuple) -> Unpacked:
    return Unpacked(Path(name[0]))


def find_unpacked(name: tuple, column: str) -> Unpacked | None:
    """Return the copy of a data file's pictures, where there is one that is whole and of this very file."""
    path = unpacked_path(Path(name[0]), column)
    if not path.is_file():
        return None
    found = open_unpacked(stamp(path))
    return found if found.whole and found.source == list(name[1:3]) else None


def unpack(path: Path, column: str) -> int:
    """Copy a column's image files out of a data file, unless that is done; return the bytes written."""
    name = stamp(path)
    if find_unpacked(name, column) is not None:
        return 0
    target = unpacked_path(path, column)
    beside = target.with_name(f"{target.name}.{os.getpid()}")
    offsets = [0]
    with beside.open("wb") as out:
        for group in range(len(open_parquet(name)[1]) - 1):
            for content in read_group(name, column, group):
                offsets.append(offsets[-1] + out.write(content.as_py() or b""))
        out.write(np.array([*offsets, name[1], name[2], len(offsets) - 1], np.int64).tobytes())
    beside.replace(target)
    return offsets[-1]


def decode_image(content: bytes | None, where: str) -> np.ndarray:
    """Decode one picture file, (H, W, 3) uint8; ValueError for what isn't one, or not in RGB."""
    if not content:
        raise Refused(f"{where} holds no picture: {COPY_AGAIN}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode != "RGB":
                raise Refused(f"{where} is a picture in {image.mode}, not in RGB: convert the data set")
            return np.asarray(image)
    # What PIL raises for damage, and for a size that would fill the memory.
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        cause = " ".join(str(error).split())
        raise Refused(f"{where} is a damaged picture ({cause}): {COPY_AGAIN}") from error


def check_shape(seen: tuple[int, ...], wanted: tuple[int, ...] | None, where: str) -> None:
    if wanted is not None and seen != wanted:
        raise Refused(f"{where} is a picture of {seen}, the camera's others are {wanted}: {COPY_AGAIN}")


# ------------------------------------------------------------------------------------------------------------
# video


@dataclass(frozen=True)
class VideoFile:
    """A video that holds episodes end to end."""

    path: Path
    begins: float
    """Where meta/ has the first of its episodes begin, seconds."""
    frames: int
    """Of all its episodes."""
    far: float = TOLERANCE
    """How far a frame may lie off its row's time, seconds: less than half of a frame's."""


@dataclass(frozen=True, eq=False)
class VideoPlace:
    """An episode's pictures in a video."""

    file: VideoFile
    episode: int
    """Its own number, for messages."""
    row: int
    """Its first frame in the video, if none is lost there."""
    times: np.ndarray
    """(n,) where each step lies in the video, by its row's timestamp, seconds."""
    shape: tuple[int, int, int] | None = None
    """H, W, 3 of every picture of this camera; None: not known yet."""

    @property
    def path(self) -> Path:
        return self.file.path


class Video:
    """An open video: every frame's presentation time, and frames decoded from the nearest key frame on."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        with readable(path):
            self.container = av.open(str(path))
            if not self.container.streams.video or self.container.streams.video[0].codec_context is None:
                raise Refused(f"{path} is truncated or damaged (it holds no video): {COPY_AGAIN}")
            self.stream = self.container.streams.video[0]
            self.stream.codec_context.thread_count = 1  # several would hold frames back after every seek
            packets = [(p.pts, p.is_keyframe) for p in self.container.demux(self.stream) if p.pts is not None]
        self.pts = np.array(sorted(pts for pts, _ in packets), np.int64)
        """(n,) int64: presentation times in the stream's time base, in the order they are shown."""
        self.keys = np.array(sorted(pts for pts, key in packets if key), np.int64)
        self.decoder: Iterator[av.VideoFrame] = iter(())
        self.at: int | None = None  # the frame, in the order shown, that was decoded last

    def number(self, place: VideoPlace, steps: np.ndarray) -> np.ndarray:
        """Return the frames (n,) nearest to these steps' times; Refused where one is too far off."""
        far, loose = place.file.far, place.file.far > TOLERANCE
        # Where frames may lie off, all of the episode's must fit: with a drift, a neighbour's would, late.
        looked = np.arange(len(place.times)) if loose else steps
        seconds = place.times[looked]
        if not len(self.pts):
            raise Refused(f"{self.path} has no frames: {COPY_AGAIN}")
        times = self.pts * float(self.stream.time_base)
        if len(times) == place.file.frames:
            if place.file.begins <= TOLERANCE:  # its first frame is the first row's
                times = times - times[0]
            if loose and fits_in_order(times, place):
                return place.row + steps
        after = np.searchsorted(times, seconds).clip(1, max(len(times) - 1, 1))
        after = after.clip(max=len(times) - 1)
        before = np.maximum(after - 1, 0)
        nearest = np.where(seconds - times[before] <= times[after] - seconds, before, after)
        off = np.abs(times[nearest] - seconds)
        if off.max(initial=0) > far:
            lost = int((off > far).argmax())
            near = off.max() < np.diff(times).mean() / 2
            flag = "--nearest-frame 0.4 takes frames that are a little off, " * bool(near)
            raise Refused(
                f"{self.path} has no frame at {seconds[lost]:.4f} s, step {looked[lost]} of episode "
                f"{place.episode}, the nearest of {len(times):,} is at {times[nearest[lost]]:.4f} s: "
                f"{flag}--episodes leaves the episode out, or {COPY_AGAIN}"
            )
        return nearest[steps] if loose else nearest

    def read(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Yield frames (H, W, 3) uint8 by number; rising numbers are read with the fewest jumps."""
        for number in numbers.tolist():
            with readable(self.path):
                yield self.decode(number).to_ndarray(format="rgb24")

    def decode(self, number: int) -> av.VideoFrame:
        """Decode on to a frame where it is near, else from the last key frame that comes before it."""
        wanted = int(self.pts[number])
        near = self.at is not None and self.at < number <= self.at + AHEAD
        frame = next(self.decoder, None) if near else self.jump(wanted)
        key, broken = self.keys[max(0, int(np.searchsorted(self.keys, wanted, side="right")) - 1)], False
        while frame is not None and frame.pts < wanted:
            broken |= frame.is_corrupt and frame.pts >= key  # before its key frame, what it needs may lack
            frame = next(self.decoder, None)
        self.at = None
        if frame is None or frame.pts != wanted:
            raise Refused(f"{self.path}: frame {number} can't be decoded: {COPY_AGAIN}")
        if broken or frame.is_corrupt:
            raise Refused(f"{self.path}: frame {number} is damaged, FFmpeg marks it corrupt: {COPY_AGAIN}")
        self.at = number
        return frame

    def jump(self, wanted: int) -> av.VideoFrame | None:
        """Seek to a key frame and decode it; one further back where the demuxer lands behind `wanted`."""
        key = int(np.searchsorted(self.keys, wanted, side="right")) - 1
        while True:
            self.container.seek(int(self.keys[key]) if key >= 0 else 0, stream=self.stream, backward=True)
            self.decoder = self.container.decode(self.stream)
            frame = next(self.decoder, None)
            if key < 0 or (frame is not None and frame.pts <= wanted):
                return frame
            key -= 1


def fits_in_order(times: np.ndarray, place: VideoPlace) -> bool:
    """Say whether a video with a frame for each row, at these times (n,), shows an episode at a rate that is
    nearly its label's: but for that drift every frame lies within what is allowed."""
    own, wanted = times[place.row : place.row + len(place.times)], place.times
    off = own - wanted
    drift = np.polyval(np.polyfit(wanted - wanted[0], off, 1), wanted - wanted[0]) if len(off) > 2 else off
    most = place.file.far + RATE * (wanted - place.file.begins)
    return bool((np.abs(off - drift) <= place.file.far).all() and (np.abs(off) <= most).all())


@lru_cache(OPEN_FILES)
def open_video(name: tuple) -> Video:
    return Video(Path(name[0]))


def count_frames(path: Path) -> int:
    """Return a video's frames."""
    return len(open_video(stamp(path)).pts)


def frame_numbers(place: VideoPlace, steps: np.ndarray) -> np.ndarray:
    """Return the frames of the video that are an episode's steps (n,), without decoding them."""
    return open_video(stamp(place.path)).number(place, steps)


def read_video(place: VideoPlace, steps: np.ndarray) -> np.ndarray:
    """Decode an episode's pictures (n, H, W, 3) uint8 at these steps, from its video."""
    video = open_video(stamp(place.path))
    with video.lock:
        distinct, back = np.unique(frame_numbers(place, steps), return_inverse=True)
        pictures = np.stack(list(video.read(distinct)))
    check_shape(pictures.shape[1:], place.shape, str(place.path))
    return pictures[back]
