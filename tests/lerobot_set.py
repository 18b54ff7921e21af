"""Writes small LeRobot v3 data sets for tests; every picture says in blocks which one it is."""

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

H, W = 48, 64  # three rows of eight blocks: episode, step, camera
PLACE = tuple[int, int]  # chunk and file


def picture(episode: int, step: int, camera: int) -> np.ndarray:
    """Draw a picture (H, W, 3) uint8 that `read_picture` reads, through a lossy codec too."""
    bits = np.unpackbits(np.array([[episode], [step], [camera]], np.uint8), axis=1)  # (3, 8)
    blocks = np.kron(bits * 200 + 25, np.ones((H // 3, W // 8), np.uint8)).astype(np.uint8)
    return np.repeat(blocks[..., None], 3, axis=2)


def read_picture(pixels: np.ndarray) -> tuple[int, int, int]:
    """Return episode, step and camera of a picture (H, W, 3)."""
    blocks = pixels.reshape(3, H // 3, 8, W // 8, 3).mean((1, 3, 4)) > 125
    return tuple(np.packbits(blocks, axis=1)[:, 0].tolist())


def png(pixels: np.ndarray) -> bytes:
    """Return a picture as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    fps: int | Fraction,
    gop: int = 12,
    bframes: int = 2,
    late: int = 0,
    lost: int | None = None,
) -> None:
    """Write an mp4 in h264: frames out of order in the file, key frames far apart, the first `late` frames
    after 0 s; where that of number `lost` would be, the next one follows a frame's time later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.options = {"g": str(gop), "bf": str(bframes), "preset": "ultrafast", "crf": "10"}
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            after = lost is not None and number >= lost
            frame.pts, frame.time_base = number + late + after, 1 / Fraction(fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def write_set(
    root: Path,
    lengths: Sequence[int] = (4, 1, 3),
    cameras: dict[str, str] | None = None,
    data_files: Sequence[PLACE] | None = None,
    video_files: dict[str, Sequence[PLACE]] | None = None,
    fps: int = 10,
    fixed: bool = True,
    group: int = 3,
    task_column: str = "task",
    tasks: Sequence[str] = ("push the block", "open the drawer"),
    meta_files: int = 1,
    seed: int = 0,
    late: int = 0,
    video_fps: int | Fraction = 0,
) -> Path:
    """Write a data set; episode e has task e % len(tasks). Places: each episode's chunk and file. Videos may
    begin `late` and have another rate than the label."""
    rng = np.random.default_rng(seed)
    cameras = {"observation.images.image": "image"} if cameras is None else cameras
    data_files = list(data_files or [(0, 0)] * len(lengths))
    video_files = {c: list((video_files or {}).get(c, [(0, 0)] * len(lengths))) for c in cameras}
    starts = np.cumsum(lengths) - lengths
    rows = [(e, step) for e, length in enumerate(lengths) for step in range(length)]
    state = rng.normal(size=(len(rows), 8)).astype(np.float32)
    action = rng.normal(size=(len(rows), 7)).astype(np.float32)

    for place in dict.fromkeys(data_files):
        here = [i for i, (e, _) in enumerate(rows) if data_files[e] == place]
        columns = {"observation.state": vectors(state[here], fixed), "action": vectors(action[here], fixed)}
        for number, (name, kind) in enumerate(cameras.items()):
            if kind == "image":
                files = [{"bytes": png(picture(*rows[i], number)), "path": "frame.png"} for i in here]
                columns[name] = pa.array(files, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        columns["timestamp"] = pa.array([rows[i][1] / fps for i in here], pa.float32())
        columns |= {"frame_index": [rows[i][1] for i in here], "episode_index": [rows[i][0] for i in here]}
        columns |= {"index": here, "task_index": [rows[i][0] % len(tasks) for i in here]}
        write_table(root / "data" / name_of(place, "parquet"), columns, group)

    episodes = {
        "episode_index": list(range(len(lengths))), "length": list(lengths),
        "tasks": [[tasks[e % len(tasks)]] for e in range(len(lengths))],
        "data/chunk_index": [c for c, _ in data_files], "data/file_index": [f for _, f in data_files],
        "dataset_from_index": starts.tolist(), "dataset_to_index": (starts + lengths).tolist(),
    }  # fmt: skip
    for number, (name, kind) in enumerate(cameras.items()):
        if kind == "video":
            begins = [
                sum(lengths[b] for b in range(e) if video_files[name][b] == place) / fps
                for e, place in enumerate(video_files[name])
            ]
            for place in dict.fromkeys(video_files[name]):
                frames = [picture(*row, number) for row in rows if video_files[name][row[0]] == place]
                path = root / "videos" / name / name_of(place, "mp4")
                write_video(path, frames, video_fps or fps, late=late)
            episodes |= {
                f"videos/{name}/chunk_index": [c for c, _ in video_files[name]],
                f"videos/{name}/file_index": [f for _, f in video_files[name]],
                f"videos/{name}/from_timestamp": begins,
                f"videos/{name}/to_timestamp": [b + n / fps for b, n in zip(begins, lengths)],
            }
    for file, part in enumerate(np.array_split(np.arange(len(lengths)), meta_files)):
        chosen = {name: [values[e] for e in part] for name, values in episodes.items()}
        write_table(root / "meta" / "episodes" / name_of((0, file), "parquet"), chosen)
    write_table(
        root / "meta" / "tasks.parquet", {"task_index": list(range(len(tasks))), task_column: list(tasks)}
    )
    features = {name: {"dtype": kind, "shape": [H, W, 3], "names": None} for name, kind in cameras.items()}
    features |= {"observation.state": {"dtype": "float32", "shape": [8], "names": None}}
    features |= {"action": {"dtype": "float32", "shape": [7], "names": None}}
    info = {
        "codebase_version": "v3.0", "fps": fps, "robot_type": "toy", "total_episodes": len(lengths),
        "total_frames": len(rows), "total_tasks": len(tasks), "chunks_size": 1000, "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }  # fmt: skip
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root


def name_of(place: PLACE, ending: str) -> str:
    return f"chunk-{place[0]:03d}/file-{place[1]:03d}.{ending}"


def vectors(values: np.ndarray, fixed: bool) -> pa.Array:
    """Store vectors (n, D) as recorders do, in lists of fixed size, or as the converter does."""
    kind = pa.list_(pa.float32(), values.shape[1]) if fixed else pa.list_(pa.float32())
    return pa.array(values.tolist(), kind)


def write_table(path: Path, columns: dict, group: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)


def change(path: Path, **columns: object) -> None:
    """Replace columns of a parquet file; None drops one."""
    table = pq.read_table(path).to_pydict() | columns
    write_table(path, {name: values for name, values in table.items() if values is not None})
