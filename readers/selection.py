"""Which part of a data set: hub ids, episodes, tasks, LIBERO suites, cameras and the names that they get.

    python data.py inspect DATA --episodes 0-9 --task-ids 0,3
    python data.py inspect DATA --tasks "put the bowl on the plate"
    python data.py inspect DATA --cameras front=observation.images.image wrist=observation.images.image2
    python train.py --data HuggingFaceVLA/libero --data-revision COMMIT --suite libero_object

A name that a camera gets here is its name everywhere: in a batch, in a checkpoint, in a cache.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from files import Refused, naming, parse_numbers


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which part of a data set is read, and how."""

    data_revision: str | None = None
    """Revision of the data set's hub id, to pin it."""

    episodes: str = ""
    """Episodes to read, as in 0-99,150; default: all."""

    task_ids: str = ""
    """Tasks to read, by number as `data.py inspect` prints them, as in 0,3,5-7; default: all."""

    tasks: tuple[str, ...] = ()
    """Tasks to read, by instruction (all tasks that have it); default: all."""

    suite: str | None = None
    """LIBERO suite whose tasks are read, found by their instructions (needs LIBERO); default: all tasks."""

    cameras: tuple[str, ...] = ()
    """Cameras to read, each by its name in the data, or renamed: NAME=NAME_IN_THE_DATA, as in
    front=observation.images.image; `observation.images.` may be left out. Default: all, as they are named."""

    state: str = "observation.state"
    """Name of the state in a LeRobot set, where it is another one."""

    action: str = "action"
    """Name of the action in a LeRobot set."""

    pairing: Literal["before", "after"] | None = None
    """Whether an HDF5 file's observations were recorded before or after the action beside them, where neither
    its attributes nor its layout say so."""

    drop_noops: bool = False
    """Leave out frames whose action does nothing, as openvla's "no_noops" sets have it."""

    nearest_frame: float = 0.0
    """Share of a frame's time (less than 0.5) that a video's frame may lie off its row's time, for cameras
    whose rate is not quite the label's (a steady drift is followed, where no frame is lost); 0: 0.1 ms, as
    lerobot has it."""

    pictures: Literal["auto", "memory", "files"] = "auto"
    """Where pictures stay: decoded in memory, or in the files, to be decoded as they are needed; auto: in
    memory where they fit in half of what is free."""

    def __post_init__(self) -> None:
        parse_numbers(self.episodes, "--episodes")
        parse_numbers(self.task_ids, "--task-ids")
        names = [name for name, _ in map(split_camera, self.cameras)]
        if len(set(names)) < len(names):
            raise Refused(f"--cameras {' '.join(self.cameras)} gives two cameras one name: name each once")
        if not 0 <= self.nearest_frame < 0.5:
            raise Refused(
                f"--nearest-frame {self.nearest_frame} must be at least 0 and less than 0.5: from there on "
                "two rows could show one frame"
            )

    @property
    def part(self) -> list:
        """What decides which frames and names are read, JSON-able; nothing where it is the whole data set."""
        renamed = sorted(camera for camera in self.cameras if "=" in camera)
        chosen = [
            sorted(parse_numbers(self.episodes, "--episodes")),
            sorted([*self.tasks, *map(str, parse_numbers(self.task_ids, "--task-ids"))]),
            self.suite or 0,
            renamed,
            *(["no no-ops"] if self.drop_noops else []),
        ]
        return chosen if any(chosen) else []

    def cache_home(self, folder: Path, cache: Path | None = None, writes: bool = False) -> Path:
        """Return the place beside which caches of this part of a data set lie (`world.cache_folder`): the
        data's, unless `cache` or a read-only disk says another, which is made where somebody `writes`."""
        name = f"part_{hashlib.sha256(json.dumps(self.part).encode()).hexdigest()[:8]}"
        home = folder / name if folder.is_dir() else folder.with_name(f"{folder.stem}_{name}")
        place = home = home if self.part else folder
        while not place.is_dir():
            place = place.parent
        there = any(home.parent.glob(f"{home.stem}_world_*")) or any(home.glob("world_*"))
        if cache is None and (there or os.access(place, os.W_OK)):
            return home
        key = hashlib.sha256(f"{folder.resolve()} {self.part}".encode()).hexdigest()[:8]
        elsewhere = (cache or Path("data", "cache")) / f"{folder.stem}_{key}"
        with naming(elsewhere):
            if writes:
                elsewhere.mkdir(parents=True, exist_ok=True)
        return elsewhere


# ------------------------------------------------------------------------------------------------------------
# cameras


def camera_name(name: str) -> str:
    """Return the feature name of a camera given in full or in short (image, image2)."""
    return name if name.startswith("observation.") else f"observation.images.{name}"


def camera_key(name: str, there: Iterable[str], where: str = "the data set") -> str:
    """Return a camera's name in the data, given in full or in short; Refused where there is none."""
    for key in (name, camera_name(name)):
        if key in there:
            return key
    known = " or ".join(key.removeprefix("observation.images.") for key in there) or "none, it has no camera"
    raise Refused(f"unknown camera {name!r} in {where}: use {known}")


def split_camera(choice: str) -> tuple[str, str]:
    """Return the full name that a camera gets, and its name in the data."""
    new, _, old = choice.partition("=")
    if not new or choice.endswith("="):
        raise Refused(f"--cameras {choice!r}: write a camera's name, or NAME=NAME_IN_THE_DATA")
    return camera_name(new), old or new


def choose_cameras(options: Iterable[str], wanted: Iterable[str] | None) -> dict[str, str] | None:
    """Return the names that cameras get and their names in the data; None: all, as they are there."""
    names = dict(map(split_camera, options))
    if wanted is None:
        return names or None
    if not names:
        return {camera_name(name): name for name in wanted}
    return {camera_name(name): names[camera_key(name, names, "--cameras")] for name in wanted}


def match_cameras(
    known: Iterable[str],
    renames: dict[str, str],
    there: list[str],
    asked: tuple[str, ...] = (),
    besides: Iterable[str] = (),
) -> tuple[str, ...]:
    """Return the `--cameras` under which a data set's cameras have a checkpoint's names; empty: as they are.

    Args: known, the checkpoint's cameras, of which some may be missing in the data; renames, its rename map,
    which applies where `asked` (--cameras) names none; there, the data's; besides, what else may be named.
    Raises Refused, with the flag to type, where cameras of both sides are left over: which is which?
    """
    known, names = list(known), choose_cameras(asked, None)
    if names is None:
        names = {}
        for old in there:  # a camera that has a name already keeps it
            new = renames.get(old, old)
            names[old if new in there else new] = old
    left = [name for name in known if name not in names]
    over = [name for name in names if name not in {*known, *besides}]
    if left and (over or len(left) == len(known)):
        short = lambda cameras: [name.removeprefix("observation.images.") for name in cameras]  # noqa: E731
        flag = " ".join(f"{new}={old}" for new, old in zip(short(known), short(there)))
        raise Refused(
            f"the checkpoint's cameras are {', '.join(short(known))}, those of the data "
            f"{', '.join(short(names)) or 'none'}: say which is which, as in --cameras {flag}"
        )
    same = all(new == old for new, old in names.items())
    return asked if asked or same else tuple(f"{new}={old}" for new, old in names.items())


# ------------------------------------------------------------------------------------------------------------
# episodes and tasks


def choose_episodes(
    tasks: list[str],
    of: Sequence[Collection[int]],
    options: DataConfig,
    path: Path,
    numbers: np.ndarray | None = None,
) -> np.ndarray:
    """Return the places of the episodes that all of --episodes, --tasks and --suite name; Refused where none
    is left.

    Args: tasks, all instructions; of, for each episode the places among them of those that it has: one that
    is asked for is enough; numbers (E,), the episodes' own, default 0 .. E-1.
    """
    numbers = np.arange(len(of)) if numbers is None else numbers
    keep = np.ones(len(of), bool)
    if asked := parse_numbers(options.episodes, "--episodes"):
        if lost := sorted(set(asked) - set(numbers.tolist())):
            raise Refused(
                f"--episodes names {lost[-1]}, {path} has {len(numbers)}: choose from {numbers[0]}.."
                f"{numbers[-1]}"
            )
        keep &= np.isin(numbers, asked)
    wanted = []
    if options.task_ids:
        wanted.append(set(numbered(tasks, options.task_ids)))
    if options.tasks:
        wanted.append({task for name in options.tasks for task in find_tasks(tasks, name)})
    if options.suite:
        suite = suite_instructions(options.suite)
        wanted.append({task for task, text in enumerate(tasks) if plain_text(text) in suite})
    for those in wanted:
        keep &= np.array([not those.isdisjoint(own) for own in of], bool)
    if not keep.any():
        asked = f"--episodes {options.episodes or 'all'}, --task-ids {options.task_ids or 'all'}"
        asked += f", --tasks {' '.join(options.tasks) or 'all'}"
        raise Refused(
            f"{path} has no episode of {asked}, --suite {options.suite or 'all'}: `python data.py"
            " inspect` prints what it has"
        )
    return np.flatnonzero(keep)


def numbered(tasks: list[str], wanted: str) -> list[int]:
    """Return the numbers of --task-ids; Refused where the set has no such task."""
    found = parse_numbers(wanted, "--task-ids")
    if lost := [number for number in found if number >= len(tasks)]:
        raise Refused(
            f"--task-ids {wanted} names {lost[0]}, there are tasks 0..{len(tasks) - 1}: `python data.py"
            " inspect` prints them"
        )
    return found


def find_tasks(tasks: list[str], wanted: str) -> list[int]:
    """Return the numbers of the tasks of one instruction, which several may share."""
    found = [number for number, task in enumerate(tasks) if plain_text(task) == plain_text(wanted)]
    if not found:
        raise Refused(
            f"--tasks {wanted!r} is none of the {len(tasks)} instructions: `python data.py inspect` prints"
            " them, and their numbers, which --task-ids takes"
        )
    return found


def plain_text(instruction: str) -> str:
    """Bring an instruction to the form in which two are compared."""
    return " ".join(instruction.lower().replace("_", " ").split())


def suite_instructions(suite: str) -> set[str]:
    """Return the instructions of a LIBERO suite; Refused where LIBERO isn't installed."""
    from simulator.env import task_instructions  # which imports LIBERO when it is called

    try:
        return set(map(plain_text, task_instructions(suite)))
    except Refused as error:
        raise Refused(f"--suite {suite}: {error}, or name the tasks with --tasks") from error
