"""Which part of a data set: hub ids, episodes, tasks, LIBERO suites, cameras and the names that they get.

    python data.py inspect DATA --episodes 0-9 --tasks 3 "put the bowl on the plate"
    python data.py inspect DATA --cameras front=observation.images.image wrist=observation.images.image2
    python train.py --data HuggingFaceVLA/libero --data-revision COMMIT --suite libero_object

A name that a camera gets here is its name everywhere: in a batch, in a checkpoint, in a cache.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from files import Refused


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which part of a data set is read, and how."""

    data_revision: str | None = None
    """Revision of the data set's hub id, to pin it."""

    episodes: str = ""
    """Episodes to read, as in 0-99,150; default: all."""

    tasks: tuple[str, ...] = ()
    """Tasks to read, by number (as `data.py inspect` prints them) or by instruction; default: all."""

    suite: str | None = None
    """LIBERO suite whose tasks are read, found by their instructions (needs LIBERO); default: all tasks."""

    cameras: tuple[str, ...] = ()
    """Cameras to read, each by its name in the data, or renamed: NAME=NAME_IN_THE_DATA, as in
    front=observation.images.image; `observation.images.` may be left out. Default: all, as they are named."""

    pictures: Literal["auto", "memory", "files"] = "auto"
    """Where pictures stay: decoded in memory, or in the files, to be decoded as they are needed; auto: in
    memory where they fit in half of what is free."""

    def __post_init__(self) -> None:
        parse_numbers(self.episodes, "--episodes")
        names = [name for name, _ in map(split_camera, self.cameras)]
        if len(set(names)) < len(names):
            raise Refused(f"--cameras {' '.join(self.cameras)} gives two cameras one name: name each once")

    @property
    def part(self) -> list:
        """What decides which frames and names are read, JSON-able; nothing where it is the whole data set."""
        renamed = sorted(camera for camera in self.cameras if "=" in camera)
        chosen = [
            sorted(parse_numbers(self.episodes, "--episodes")),
            sorted(self.tasks),
            self.suite or 0,
            renamed,
        ]
        return chosen if any(chosen) else []

    def cache_home(self, folder: Path) -> Path:
        """Return the place beside which caches of this part of a data set lie (`world.cache_folder`)."""
        if not self.part:
            return folder
        name = f"part_{hashlib.sha256(json.dumps(self.part).encode()).hexdigest()[:8]}"
        return folder / name if folder.is_dir() else folder.with_name(f"{folder.stem}_{name}")


def find_data(name: Path | str, revision: str | None = None) -> Path:
    """Return a data set's folder or file; what isn't there but has a hub id's form is fetched from the hub.

    Raises Refused where it is neither, and where the hub gives nothing.
    """
    path, parts = Path(name), Path(name).parts
    if path.exists():
        return path
    if path.is_absolute() or len(parts) != 2 or parts[0].startswith((".", "~")) or Path(parts[0]).exists():
        raise Refused(
            f"no such data folder or file: {name}; record some with `python -m simulator record`, or give the"
            " hub id of a LeRobot v3 data set"
        )
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download("/".join(parts), repo_type="dataset", revision=revision)
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        reason = str(error).strip().splitlines()[0]
        raise Refused(
            f"{name} is no folder here and can't be fetched as a data set from the hub ({reason}): give a"
            " folder, or record demonstrations with `python -m simulator record`"
        ) from error
    if revision is None:
        print(f"data {name}: commit {Path(found).name}, pin it with --data-revision")
    return Path(found)


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


def parse_numbers(text: str, flag: str) -> list[int]:
    """Return the numbers of '0,3,5-7'; none of an empty text. Raises Refused for anything else."""
    numbers: list[int] = []
    for piece in filter(None, text.split(",")):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise Refused(f"{flag} {text!r} is no list of numbers: write it like 0,3,5-7")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def choose_episodes(tasks: list[str], task: np.ndarray, options: DataConfig, path: Path) -> np.ndarray:
    """Return the episodes that all of --episodes, --tasks and --suite name; Refused where none is left.

    Args: tasks, all instructions; task (E,), each episode's place among them.
    """
    keep = np.ones(len(task), bool)
    if numbers := parse_numbers(options.episodes, "--episodes"):
        if max(numbers) >= len(keep):
            raise Refused(
                f"--episodes names {max(numbers)}, {path} has {len(keep)}: choose from 0..{len(keep) - 1}"
            )
        keep &= np.isin(np.arange(len(keep)), numbers)
    if options.tasks:
        keep &= np.isin(task, [find_task(tasks, wanted) for wanted in options.tasks])
    if options.suite:
        wanted = suite_instructions(options.suite)
        keep &= np.isin(task, [i for i, text in enumerate(tasks) if plain_text(text) in wanted])
    if not keep.any():
        asked = f"--episodes {options.episodes or 'all'}, --tasks {' '.join(options.tasks) or 'all'}"
        raise Refused(
            f"{path} has no episode of {asked}, --suite {options.suite or 'all'}: `python data.py"
            " inspect` prints what it has"
        )
    return np.flatnonzero(keep)


def find_task(tasks: list[str], wanted: str) -> int:
    """Return the number of a task given by number or by instruction."""
    if wanted.isdecimal() and int(wanted) < len(tasks):
        return int(wanted)
    for number, task in enumerate(tasks):
        if plain_text(task) == plain_text(wanted):
            return number
    raise Refused(
        f"--tasks {wanted!r} is none of the {len(tasks)} tasks (0..{len(tasks) - 1}, or an instruction):"
        " `python data.py inspect` prints them"
    )


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
