"""Where a checkpoint lies, and whether it is whole: what a person names, a run's newest step, its manifest.

A checkpoint of ours has `manifest.json`, the size and CRC of each file as it was written. Whoever opens a
checkpoint comes through `find_folder` or `checkpoint_in`, and these read it: damage is one line instead of
another policy. A run's `last` is a link to its newest step; where a copy has lost it, or made a folder of
it, the steps themselves say which is the newest.

    python -c "from smolvla.folders import find_folder; print(find_folder('runs/demo/E0-s0'))"
    pytest tests/training/test_run_folder.py tests/test_hostile.py

Reading alone needs no package; a hub id needs huggingface_hub.
"""

from __future__ import annotations

import os
import shutil
import zlib
from functools import lru_cache
from pathlib import Path

from files import Refused, read_json, to_disk

WEIGHTS, SHARDS, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
MANIFEST, STATE, OPTIMIZER, RAW = "manifest.json", "state.json", "optimizer.pt", "raw.safetensors"
# Where a checkpoint lies in what a person names, beside a run folder of ours: itself, one of lerobot's runs.
PLACES = ("", "pretrained_model", "last/pretrained_model", "checkpoints/last/pretrained_model", "last")
WHOLE = 2  # newest checkpoints that a run can go on from
SEALS = {str: {"bytes": int, "crc32": int}}
CHUNK = 2**22  # bytes read at a time


# ---- names and places ---------------------------------------------------------------------------------


def find_folder(
    name: str,
    revision: str | None = None,
    relative_to: Path | None = None,
    patterns: tuple[str, ...] = ("*.json", "*.safetensors"),
) -> Path:
    """Find a folder: beside `relative_to`, as a path, or else as a hub id, owner/name or owner/name@revision.

    Raises Refused when it is neither a folder nor of a hub id's form, and when the hub gives nothing.
    """
    if not isinstance(name, str) or not name.isprintable():
        raise Refused(f"{name!r} is no name: give a checkpoint folder, or a hub id of the form owner/name")
    for path in ([relative_to / name] if relative_to else []) + [Path(name)]:
        if path.is_dir():
            return checkpoint_in(path)
    repo, _, pinned = name.partition("@")
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise Refused(f"no folder {name!r}: give a checkpoint folder, or a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repo, revision=pinned or revision, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        reason = str(error).strip().splitlines()[0]
        raise Refused(
            f"{name} is no folder here and cannot be fetched from the hub ({reason}): give a folder"
        ) from error
    return checkpoint_in(Path(found))


def checkpoint_in(folder: Path) -> Path:
    """Find the checkpoint in a run folder, ours or lerobot's (outputs/train/x); else the folder itself.

    Of a run of ours it is the newest whole one, with a line about any that is damaged. Raises Refused where
    none is whole.
    """
    if checkpoints(folder):
        found, skipped = newest_whole(folder, resume=False)
        for line in skipped if os.environ.get("RANK", "0") == "0" else ():
            print(line, flush=True)
        return found or folder
    found = next((folder / place for place in PLACES if holds_weights(folder / place)), folder)
    if why := damage(found, resume=False):
        raise Refused(
            f"{found} is damaged: {why}; copy the checkpoint again, or delete {MANIFEST} where you changed "
            "the file yourself"
        )
    return found


def holds_weights(folder: Path) -> bool:
    """Say whether a folder is a checkpoint, or an adapter that could be merged into one."""
    return any((folder / name).is_file() for name in (WEIGHTS, SHARDS, ADAPTER))


# ---- a run's steps ------------------------------------------------------------------------------------


def number(folder: Path) -> int:
    """The optimiser step of a checkpoint's folder; of a `last` that a copy made a folder of, what it says."""
    step = folder.name.removeprefix("step_")
    if not step.isdecimal():
        step = read_json(folder / STATE, {"step": int})["step"]
    return int(step)


def checkpoints(out: Path) -> list[Path]:
    """List a run's checkpoints, the newest first; `last` is among them where it is a folder of its own."""
    found = [p for p in out.glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    last = out / "last"
    if last.is_dir() and not last.is_symlink() and (last / STATE).is_file():
        found.append(last)
    return sorted(found, key=lambda folder: (number(folder), folder.name), reverse=True)


def newest_whole(out: Path, resume: bool = True) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to go on from: the one that `last` points at, or the nearest before that is whole.

    Args: resume, whether training is to go on, which needs the optimiser's state.
    Returns it, None for a run without any, and a line about each one that was skipped.
    Raises Refused where there are checkpoints and none is whole.
    """
    found, skipped, why = checkpoints(out), [], "`last` points nowhere"
    last = out / "last"
    step = Path(os.readlink(last)).name.removeprefix("step_") if last.is_symlink() else ""
    if step.isdecimal():  # else a copy has lost it
        found = [folder for folder in found if number(folder) <= int(step)]
    for folder in found:
        if (why := damage(folder, resume)) is None:
            return folder, skipped
        skipped.append(f"warning: {folder} is damaged, the checkpoint before it is taken: {why}")
    if found or (resume and os.path.lexists(last)):
        again = "choose another --out to start anew" if resume else "copy it again"
        raise Refused(f"{out} has no whole checkpoint ({why}): {again}")
    return None, []


def point(out: Path, folder: Path) -> Path:
    """Point `last` at a checkpoint, in one stroke; give its folder, a step's again where a copy lost that."""
    last, link = out / "last", out / "last.part"
    if folder == last:
        folder = out / f"step_{number(last):06d}"
        remove(folder)  # a damaged one
        last.rename(folder)
    elif last.is_dir() and not last.is_symlink():
        remove(last)
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.rename(last)
    to_disk(out)
    return folder


def remove(folder: Path) -> None:
    """Remove a checkpoint; a kill on the way leaves nothing that looks like one."""
    if folder.is_dir():
        going = folder.with_name(folder.name + ".gone.part")
        folder.rename(going)
        shutil.rmtree(going)


# ---- manifests ----------------------------------------------------------------------------------------


def seal(path: Path) -> dict[str, int]:
    """Bring a file to the disk; give its size and CRC."""
    to_disk(path)
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def checksum(path: Path) -> int:
    """The CRC-32 of a file; one that has not changed since is read once in a process."""
    found = path.stat()
    return checksum_of(path.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(1024)
def checksum_of(path: Path, *version: int) -> int:
    crc, part = 0, memoryview(bytearray(CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(part):
                crc = zlib.crc32(part[:read], crc)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    return crc


def damage(folder: Path, resume: bool = True) -> str | None:
    """Say what of a checkpoint is not as it was written; None where it is whole.

    Args: resume, whether it is to be trained on: else it needs neither a manifest, which lerobot's have not,
    nor the optimiser's state, nor texts that a download may leave out.
    """
    path = folder / MANIFEST
    if not resume and not path.exists():
        return None
    try:
        wanted = {n: (made["bytes"], made["crc32"]) for n, made in read_json(path, SEALS).items()}
    except Refused as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, crc) in wanted.items():
        path, training = folder / name, name in (OPTIMIZER, RAW)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{MANIFEST} speaks of {name}, which lies elsewhere"
        if not path.is_file():
            if not resume and (training or not name.endswith((".json", ".safetensors"))):
                continue
            return f"{name} is missing" + f", which only the newest {WHOLE} checkpoints keep" * training
        if not resume and training:
            continue
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
        if checksum(path) != crc:
            return f"{name} has other bytes than were written (CRC)"
    return None
