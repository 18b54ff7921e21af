"""LIBERO's HDF5 layout -> episodes: a folder of `<task>_demo.hdf5` files, or one such file.

Three kinds of files are about. Ours have the attribute `pairing`: `obs[t]` is what a policy sees before it
takes `actions[t]`. openvla's "no_noops" files, which have no attributes at all, are paired so too. In
LIBERO's public files, known by the attributes of its scripts, `obs[t]` was recorded after `actions[t]`. A
policy that takes `actions[t]` in a rollout sees `obs[t-1]`, so these two are paired, and the first action,
before which nothing was recorded, is left out. Provenance says so. Of any other file --pairing must say it.

Headers are read first, and what can't be used is refused there; then states and actions, straight into place.
Pictures stay in the files until they are asked for, and are turned by 180 degrees exactly once, here: the
files keep MuJoCo's raw, upside-down frames.

    python -m simulator record --help                     # records demonstrations in this layout
    python data.py inspect DATA                # what is in them

Shapes: F frames, S picture side. State (8) = end-effector position 3 (m), axis-angle 3 (rad), gripper 2 (m).
Source: LIBERO's demonstration files (github.com/Lifelong-Robot-Learning/LIBERO); feature names as in lerobot.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from files import Refused, inside, parse_json
from readers.demos import Demos, StoredPictures, boundaries
from readers.problems import far_values
from readers.selection import DataConfig, camera_key, choose_episodes

# lerobot's feature name -> the name inside LIBERO's files
CAMERAS = {"observation.images.image": "agentview_rgb", "observation.images.image2": "eye_in_hand_rgb"}
STATE_PARTS = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}
ACTION_DIM = 7
PAIRING = "observation_before_action"
PROVENANCE = (
    "suite", "task_id", "displace", "either", "noise", "size", "draw", "texture_colorspace", "reset",
    "env_seed", "versions",
)  # fmt: skip
SIGNATURE = b"\x89HDF\r\n\x1a\n"
RECORD_AGAIN = "record it again with `python -m simulator record`, or download it again"
PUBLIC = "observations after actions: action[t] goes with observation[t-1], the first action is left out"
BARE = "observations before actions: no attribute says so, but a file without any is laid out as openvla's"
SCENE = re.compile(r"^[A-Z][A-Z0-9_]*SCENE\d+_")  # before the instruction, in the names of LIBERO-90's files


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
    skipped: int  # actions at an episode's start that no observation precedes: 1 in public files


class Place(NamedTuple):
    """An episode's pictures from one camera."""

    path: Path
    name: str  # of the dataset inside the file


def read(path: Path, cameras: list[str] | None = None, options: DataConfig | None = None) -> Demos:
    """Read a folder of task files, or one file, or the episodes of it that are asked for; pictures stay where
    they are. Cameras: None for all.

    Raises Refused, in one line, for what is missing, damaged or inconsistent.
    """
    options = options or DataConfig()
    cameras = list(CAMERAS) if cameras is None else [camera_key(name, CAMERAS) for name in cameras]
    files = [read_header(file, cameras, options) for file in task_files(path)]
    sizes = common_sizes(files)
    chosen = choose(files, options, path)
    keep = np.concatenate(chosen)
    numbers = np.flatnonzero(keep)
    episode, first, last = boundaries(np.concatenate([file.lengths for file in files])[keep])
    images = {}
    for camera, size in sizes.items():
        places = [
            Place(file.path, f"data/{name}/obs/{CAMERAS[camera]}") for file in files for name in file.demos
        ]
        places = [places[number] for number in numbers]
        images[camera] = StoredPictures((len(episode), size, size, 3), places, first, read_pictures)
    task = np.repeat(np.arange(len(files)), [len(file.demos) for file in files])[keep]
    demos = Demos(
        images=images,
        state=np.empty((len(episode), sum(STATE_PARTS.values())), np.float32),
        action=np.empty((len(episode), ACTION_DIM), np.float32),
        episode=episode,
        first=first,
        last=last,
        task=task[episode],
        tasks=[file.instruction for file in files],
        provenance=[file.provenance for file in files],
        files=[{"file": f.path.name, "bytes": f.path.stat().st_size, "pictures": f.stored} for f in files],
        numbers=None if keep.all() else numbers,
    )
    row = 0
    for file, here in zip(files, chosen):
        with opened(file.path) as handle:
            for name, length in zip(
                np.array(file.demos)[here].tolist(), np.array(file.lengths)[here].tolist()
            ):
                where, rows = f"{file.path}: {name}", slice(row, row + length)
                read_episode(handle["data"][name], where, demos, rows, file.skipped)
                row += length
    for problem in wrong_values(path, demos.action, demos.state, numbers[episode], demos.step):
        raise Refused(problem)
    return demos


def choose(files: list[TaskFile], options: DataConfig, path: Path) -> list[np.ndarray]:
    """Say of each file's episodes which are asked for."""
    of = [[task] for task, file in enumerate(files) for _ in file.demos]
    keep = np.zeros(len(of), bool)
    keep[choose_episodes([file.instruction for file in files], of, options, path)] = True
    return np.split(keep, np.cumsum([len(file.demos) for file in files])[:-1])


def wrong_values(
    path: Path, action: np.ndarray, state: np.ndarray, episode: np.ndarray, step: np.ndarray
) -> Iterator[str]:
    """Yield what the values of all episodes together make impossible."""
    for name, values in (("actions", action), ("state", state)):
        for problem in far_values(name, values, episode, step):
            yield f"{path}: {problem}: leave the episode out with --episodes, or {RECORD_AGAIN}"


def read_pictures(place: Place, steps: np.ndarray) -> np.ndarray:
    """Read an episode's pictures (n, S, S, 3) and turn them by 180 degrees: the one place that does so."""
    with opened(place.path) as file:
        found = file[place.name][steps.min() : steps.max() + 1]
    return found[steps - steps.min(), ::-1, ::-1]


def task_files(path: Path) -> list[Path]:
    """Return the data set's HDF5 files by name; other layouts would branch off here."""
    if not path.exists():
        raise Refused(f"no such data folder or file: {path}; record some with `python -m simulator record`")
    if path.is_file():
        return [path]
    for parts in sorted([path] if path.suffix == ".parts" else path.glob("[!.]*.parts")):
        stem = parts.with_suffix("")  # a recording collects its episodes in NAME.parts, then writes NAME.hdf5
        finals = (stem, stem.with_name(stem.name + ".hdf5"), stem.with_name(stem.name + "_demo.hdf5"))
        if not any(final.is_file() for final in finals):
            raise Refused(
                f"interrupted recording, {parts} has no final file: run the command that began it again"
            )
    files = sorted(path.glob("[!.]*.hdf5"))  # a Mac leaves a ._ file beside each
    if not files:
        raise Refused(f"no *.hdf5 file in {path}: record some there with `python -m simulator record`")
    return [inside(path, file) for file in files]


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; damage, found now or while reading, becomes a one-line ValueError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:  # what h5py raises, depending on where the damage lies
        cause = " ".join(str(error).split())
        if code := re.search(r"errno = (\d+)", cause):  # locked, not ours to read, too many open files
            raise Refused(f"{path} cannot be read: {os.strerror(int(code[1]))}") from error
        with path.open("rb") as file:
            ours = file.read(8) == SIGNATURE
        if not ours:
            raise Refused(
                f"{path} is no HDF5 file: --data takes those of LIBERO, or a LeRobot v3 folder"
            ) from error
        raise Refused(f"{path} is truncated or damaged ({cause}): move it away and {RECORD_AGAIN}") from error


def read_header(path: Path, cameras: list[str], options: DataConfig) -> TaskFile:
    """Read a file's attributes and the shapes of its episodes, and refuse what can't be used."""
    with opened(path) as file:
        if "data" not in file:
            raise Refused(f"{path} has no group 'data', so it isn't in LIBERO's layout: {RECORD_AGAIN}")
        check_own(file, str(path))
        data = file["data"]
        demos = [name for name in data if re.fullmatch(r"demo_\d+", name)]
        demos.sort(key=lambda name: int(name.removeprefix("demo_")))
        after, words, plainly = pairing_of(data, demos, path, options.pairing)
        skipped = int(after)
        convention = plain(data.attrs.get("macros_image_convention", "opengl"))
        if convention != "opengl":
            raise Refused(
                f"{path}: macros_image_convention is {convention!r}, not 'opengl': its pictures are not"
                f" upside down, as these files' are; {RECORD_AGAIN}"
            )
        declared = plain(data.attrs.get("num_demos", len(demos) if plainly else None))
        if declared != len(demos) or not demos:
            raise Refused(f"{path}: num_demos is {declared}, episodes there {len(demos)}: {RECORD_AGAIN}")
        # frame k of an episode is obs[k] in either kind of file; actions start at `skipped`
        shapes = [episode_shape(data[name], f"{path}: {name}", cameras, plainly) for name in demos]
        sizes = {camera: {shape[1][camera] for shape in shapes} for camera in cameras}
        if mixed := {camera: sorted(size) for camera, size in sizes.items() if len(size) > 1}:
            raise Refused(f"{path} mixes image sizes {mixed}: {RECORD_AGAIN}")
        if (shortest := min(length for length, _ in shapes)) <= skipped:
            raise Refused(
                f"{path} has an episode of {shortest} step, whose only action no observation precedes: delete"
                " that episode"
            )
        named = plainly and "problem_info" not in data.attrs
        return TaskFile(
            path=path,
            instruction=instruction_of_name(path) if named else read_instruction(data, path),
            demos=demos,
            lengths=[length - skipped for length, _ in shapes],
            sizes={camera: size.pop() for camera, size in sizes.items()},
            stored={
                camera: [data[f"{name}/obs/{CAMERAS[camera]}"].id.get_storage_size() for name in demos]
                for camera in cameras
            },
            provenance=read_provenance(data, demos, path) | ({"pairing": words} if words else {}),
            skipped=skipped,
        )


def pairing_of(data: h5py.Group, demos: list[str], path: Path, asked: str | None) -> tuple[bool, str, bool]:
    """Say whether observations come after the action beside them, in words for the record, and whether the
    file may lack attributes. It is never guessed: an attribute, a known layout or --pairing says it."""
    stated = plain(data.attrs.get("pairing"))
    if stated not in (PAIRING, None):
        raise Refused(
            f"{path}: pairing is {stated!r}, neither {PAIRING!r} nor left out as in LIBERO's public"
            f" files: {RECORD_AGAIN}"
        )
    if stated and asked == "after":
        raise Refused(f"--pairing after: {path} says itself that pairing is {stated!r}; leave the flag out")
    if stated:
        return False, "", False
    if asked:
        return (
            asked == "after",
            PUBLIC if asked == "after" else "observations before actions: --pairing",
            True,
        )
    public = "macros_image_convention" in data.attrs
    if public and all({"init_state", "num_samples"} <= set(data[name].attrs) for name in demos):
        return True, PUBLIC, False
    if not data.attrs and not any(len(data[name].attrs) for name in demos):
        return False, BARE, True
    raise Refused(
        f"{path} does not say whether observations were recorded before or after the action beside them, and"
        " has not all the attributes of LIBERO's public files: add --pairing before (as in openvla's no_noops"
        " files) or --pairing after (as in the public ones)"
    )


def instruction_of_name(path: Path) -> str:
    """Read the instruction from a file's name, as LIBERO names its files."""
    text = SCENE.sub("", path.stem.removesuffix("_demo")).replace("_", " ").strip()
    if not text:
        raise Refused(
            f"{path} has no instruction, neither in problem_info nor in its name: name it after one"
        )
    return text


def check_own(group: h5py.Group, where: str) -> None:
    """Refuse links and pieces of other files: a stranger's file could show any file of this machine."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise Refused(f"{where}: {name} is a link, not data of the file's own: {RECORD_AGAIN}")
        if isinstance(found := group[name], h5py.Group):
            check_own(found, f"{where}: {name}")
        elif isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
            raise Refused(f"{where}: {name} is stored in another file: {RECORD_AGAIN}")


def read_instruction(data: h5py.Group, path: Path) -> str:
    """Return the instruction; an empty one would train a policy blind to its prompt, at plausible losses."""
    text = plain(data.attrs.get("problem_info", "{}"))
    try:
        instruction = parse_json(text).get("language_instruction", "")
    except ValueError as error:
        raise Refused(f"{path}: problem_info is no JSON object, got {text!r}: {RECORD_AGAIN}") from error
    if isinstance(instruction, list):  # some public files keep its letters apart
        instruction = "".join(map(str, instruction))
    if not isinstance(instruction, str) or not instruction.strip(' "'):
        raise Refused(f"{path}: problem_info has no language_instruction, got {text!r}: {RECORD_AGAIN}")
    return instruction.strip(' "')


def read_provenance(data: h5py.Group, demos: list[str], path: Path) -> dict[str, Any]:
    """Return how the file was recorded; what it does not say is None."""
    record = {name: plain(data.attrs.get(name)) for name in PROVENANCE}
    if isinstance(record["versions"], str) and record["versions"].startswith("{"):
        with suppress(ValueError):
            record["versions"] = parse_json(record["versions"])
    init_states = [plain(data[name].attrs.get("init_state_id")) for name in demos]
    record |= {"control_hz": read_control_rate(data), "init_state_ids": init_states}
    return {"file": path.name, **record}


def read_control_rate(data: h5py.Group) -> float | None:
    """Return the actions a second that env_args states, or None."""
    try:
        return parse_json(plain(data.attrs.get("env_args", "{}")))["env_kwargs"]["control_freq"]
    except (ValueError, KeyError, TypeError):
        return None


def plain(value: Any) -> Any:
    """Turn an HDF5 attribute into what JSON can hold."""
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def episode_shape(
    demo: h5py.Group, where: str, cameras: list[str], plainly: bool
) -> tuple[int, dict[str, int]]:
    """Return an episode's length and its picture sizes, after checking each dataset's shape.

    Args: plainly, whether the length may be that of its actions, where no attribute says it.
    """
    actions = demo["actions"].shape if plainly and "actions" in demo else ()
    length = plain(demo.attrs.get("num_samples", actions[0] if actions else None))
    expected = {"actions": (length, ACTION_DIM)}
    expected |= {f"obs/{name}": (length, width) for name, width in STATE_PARTS.items()}
    for name, shape in expected.items():
        if name not in demo or demo[name].shape != shape or not length:
            seen = demo[name].shape if name in demo else "nothing"
            raise Refused(f"{where}: {name} should be {shape} by num_samples, got {seen}: {RECORD_AGAIN}")
    sizes = {}
    for camera in cameras:
        name = f"obs/{CAMERAS[camera]}"
        if name not in demo:
            there = ", ".join(sorted(n for n in demo["obs"] if n.endswith("_rgb"))) or "none"
            raise Refused(f"{where}: no camera {CAMERAS[camera]}, there are {there}: {RECORD_AGAIN}")
        images = demo[name]
        size = images.shape[1] if images.ndim == 4 else 0
        if images.shape != (length, size, size, 3) or images.dtype != np.uint8:
            seen = f"{images.shape} {images.dtype}"
            raise Refused(f"{where}: {name} should be ({length}, S, S, 3) uint8, got {seen}: {RECORD_AGAIN}")
        sizes[camera] = size
    return length, sizes


def common_sizes(files: list[TaskFile]) -> dict[str, int]:
    """Return the picture size of each camera, which all files must share."""
    for file in files[1:]:
        if file.sizes != files[0].sizes:
            raise Refused(
                f"image sizes differ: {files[0].path.name} has {files[0].sizes}, {file.path.name} has"
                f" {file.sizes}: record all task files with one --size"
            )
    return files[0].sizes


def read_episode(demo: h5py.Group, where: str, demos: Demos, rows: slice, skipped: int) -> None:
    """Fill one episode's rows of states and actions; the first actions may have no observation before."""
    demos.action[rows] = demo["actions"][skipped:]
    state = np.concatenate([demo[f"obs/{name}"][()] for name in STATE_PARTS], axis=1)
    demos.state[rows] = state[: len(state) - skipped]
    for name, values in (("actions", demos.action[rows]), ("state", demos.state[rows])):
        if not np.isfinite(values).all():
            step = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise Refused(f"{where}: {name} has a non-finite value at step {step}: {RECORD_AGAIN}")
