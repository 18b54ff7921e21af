"""Open a data set, whatever its layout, and choose the part of it that was asked for.

A data set is in LIBERO's HDF5 layout (libero_hdf5.py) or LeRobot's v3 (lerobot_v3.py), given by path or hub
id; selection.py says which part of it is read.

    demos = load("data/demo", in_memory=False)         # pictures stay in the files
    pytest tests/test_data.py tests/readers
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from glob import escape
from pathlib import Path
from types import ModuleType

from files import Refused, parse_json
from readers.demos import Demos, StoredPictures, available_memory, picture_bytes
from readers.selection import DataConfig, camera_key, choose_cameras


def load(
    path: Path | str,
    cameras: Iterable[str] | None = None,
    in_memory: bool | None = True,
    options: DataConfig | None = None,
) -> Demos:
    """Read a data set: a folder or file in LIBERO's HDF5 layout, a LeRobot v3 folder, or one's hub id.

    Args: cameras, by the names that they get, of those that `options` chooses; default: all of these.
    in_memory: whether pictures are decoded now; None: as `options` says, with a line where they are not.
    Raises Refused, in one line, for what is missing, damaged, inconsistent or too big for this machine.
    """
    options = options or DataConfig()
    path = find_data(path, options)
    names = choose_cameras(options.cameras, cameras)
    reader = layout(path)
    demos = reader.read(path, None if names is None else list(names.values()), options)
    if names is not None:  # two names may stand for one camera of the data
        old = {new: camera_key(name, demos.images) for new, name in names.items()}
        found = {new: demos.images[name] for new, name in old.items()}
        renamed = {name: new for new, name in old.items() if new != name}
        demos = replace(demos, images=found, renamed=renamed)
    if options.drop_noops:
        demos = demos.without_noops()
    if in_memory is None:
        in_memory = options.pictures == "memory" or (options.pictures == "auto" and fits(demos))
        if not in_memory and os.environ.get("RANK", "0") == "0":
            print(f"data {path}: {picture_bytes(demos) / 2**30:.3g} GiB of pictures stay in the files")
    if not in_memory:
        return demos
    check_memory(demos)
    return replace(demos, images={camera: pictures[:] for camera, pictures in demos.images.items()})


def find_data(name: Path | str, options: DataConfig) -> Path:
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
    try:
        found = fetch("/".join(parts), options)
    except Refused:
        raise
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        reason = str(error).strip().splitlines()[0]
        raise Refused(
            f"{name} is no folder here and can't be fetched as a data set from the hub ({reason}): give a"
            " folder, or record demonstrations with `python -m simulator record`"
        ) from error
    if options.data_revision is None:
        print(f"data {name}: commit {found.name}, pin it with --data-revision")
    return found


def fetch(repo: str, options: DataConfig) -> Path:
    """Fetch a data set from the hub; of a part of its episodes meta/ and then only the files that hold it."""
    from huggingface_hub import snapshot_download

    where = {"repo_type": "dataset", "revision": options.data_revision}
    if not (options.episodes or options.tasks or options.suite):
        return Path(snapshot_download(repo, **where))
    from readers.lerobot_meta import needed_files

    found = Path(snapshot_download(repo, **where, allow_patterns=["meta/*"]))
    files = [escape(name) for name in needed_files(found, options)]
    where["revision"] = found.name  # the same commit
    return Path(snapshot_download(repo, **where, allow_patterns=["meta/*", *files]))


def camera_names(path: Path) -> list[str]:
    """Return the cameras of a data set, by their names in it."""
    if (path / "meta").is_dir():
        from readers.lerobot_meta import camera_features, read_info

        return list(camera_features(read_info(path)))
    return list(layout(path).CAMERAS)


def layout(path: Path) -> ModuleType:
    """Return the reader of a data set's layout; each has `read(path, cameras)`."""
    if (path / "meta").is_dir():  # of whatever version; both import heavy packages
        from readers import lerobot_v3 as reader
    else:
        from readers import libero_hdf5 as reader
    return reader


def fits(demos: Demos) -> bool:
    """Say whether the pictures take at most half of the free memory, shared by the ranks of this machine."""
    free, ranks = available_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free is None or picture_bytes(demos) * ranks <= free / 2


def check_memory(demos: Demos) -> None:
    """Refuse a data set that would not fit, before the machine starts to swap or kills the run."""
    need = picture_bytes(demos)
    free = available_memory()
    if free is not None and need > free:
        raise Refused(
            f"{len(demos):,} frames from {len(demos.images)} cameras need {need / 2**30:.3g} GiB of memory,"
            f" but {free / 2**30:.3g} GiB are free: use fewer episodes, or --pictures files"
        )


def in_files(demos: Demos) -> bool:
    """Say whether pictures stay in the files."""
    return any(isinstance(pictures, StoredPictures) for pictures in demos.images.values())


def decode_all(demos: Demos) -> Demos:
    """Give demonstrations the CRCs of all their pictures."""
    return replace(demos, checks={camera: demos.picture_checks(camera) for camera in demos.images})


def remember_checks(
    demos: Demos, home: Path, decode: Callable[[Demos], Demos] = decode_all, writes: bool = True
) -> Demos:
    """Give pictures that stay in the files their CRCs, from a file beside the data; where it knows nothing of
    these files (names, bytes, times of change), every picture is decoded once, and the file is written.

    Args: home, as `DataConfig.cache_home` gives it; decode, how that is done, ranks sharing the work say;
    writes, whether this rank writes the file.
    """
    if not in_files(demos):
        return demos
    name = "picture_checks.json"
    path = home / name if home.is_dir() else home.with_name(f"{home.stem}_{name}")
    files = sorted({str(place.path) for pictures in demos.images.values() for place in pictures.places})
    headers = [demos.light_fingerprint, [Path(file).stat().st_mtime_ns for file in files]]
    try:
        stored = parse_json(path.read_bytes())
        checks = stored["checks"] if stored["headers"] == headers else {}
    except (OSError, ValueError, KeyError, TypeError):
        checks = {}
    if set(demos.images) <= set(checks):
        return replace(demos, checks={camera: checks[camera] for camera in demos.images})
    if writes:
        print(f"data: decoding {len(demos):,} frames once, to fingerprint them: {path}", flush=True)
    demos = decode(demos)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if writes:
            beside.write_text(json.dumps({"headers": headers, "checks": demos.checks}) + "\n")
            beside.replace(path)
    except OSError as error:  # a folder that is only read; nothing but time is lost
        print(f"data: the next run will do so again, {path} can't be written ({error.strerror})")
    return demos
