"""JSON and tensors on disk: one-line errors that name the file, and writing beside before renaming.

    from files import Refused, read_json, read_tensors
    weights = read_tensors(Path("runs/demo/E0-n64000-s0/last/model.safetensors"))    # name -> tensor

Tensors that are read stay mapped from their file; what replaces it is another file under the same name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

LARGEST = 10**15  # of any number that a person gives

if TYPE_CHECKING:
    from torch import Tensor


class Refused(ValueError):
    """What a person gave cannot be used: one line that says what is wrong, the value seen, and what to type.

    Programs print it as that line. Any other error is ours, and keeps its traceback.
    """


def plain_name(name: object, where: object) -> str:
    """Return a file's name that a stranger's file gives, if it is one: no folder, no way out of its own.

    Raises Refused, naming `where` it stands.
    """
    bad = not isinstance(name, str) or not name or name.startswith(".") or not name.isprintable()
    if bad or set(name) & set("/\\:"):
        raise Refused(f"{where} names a file {name!r}: only a plain file name beside it is read")
    return name


def inside(root: Path, path: Path) -> Path:
    """Return a path that a stranger's data set names or holds, if it stays in its folder `root`, links too.

    The hub's own folders are links to blobs/ beside snapshots/. Raises Refused.
    """
    try:
        real, home = path.resolve(), root.resolve()
    except RuntimeError as error:
        raise Refused(f"{path} is a link to itself: copy what is meant into the folder") from error
    if not any(real.is_relative_to(place) for place in (home, home.parent.parent / "blobs")):
        raise Refused(f"{path} leads out of {root}, to {real}: copy what is meant into the folder")
    return path


def number_from_environment(name: str, default: int) -> int:
    """Return what the environment sets of a recipe (TOTAL_SAMPLES, DEMOS, EPISODES), if it is one number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def check_numbers(config: object) -> None:
    """Refuse a number of a configuration that is not finite or out of its range.

    Ranges, both ends in them, stand in the mapping `limits` of a dataclass and of those above it.
    """
    limits: dict[str, tuple[float, float]] = {}
    for cls in reversed(type(config).__mro__):
        limits |= vars(cls).get("limits", {})
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        low, high = limits.get(field.name, (-LARGEST, LARGEST))
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or low <= number <= high:
                continue
            flag = f"--{field.name.replace('_', '-')} {number}"
            if not abs(number) <= LARGEST:
                raise Refused(f"{flag} is no finite number, or too large: give another, or leave it out")
            raise Refused(f"{flag} must be at " + (f"least {low:g}" if number < low else f"most {high:g}"))


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse weights that are not finite: what they compute would be taken for a policy that fails."""
    for name, tensor in tensors.items():
        # The sum is one pass without a copy; where it is not finite, it may have overflowed.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise Refused(
                f"{where}: {count:,} of {tensor.numel():,} numbers of {name} are not finite: the weights are "
                "damaged or their training diverged; take an earlier checkpoint"
            )


def read_json(path: Path) -> dict:
    """Read a JSON file; a missing or broken one is Refused by name."""
    if not path.is_file():
        raise Refused(f"{path} is missing: a checkpoint folder needs it")
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no UTF-8
        raise Refused(f"{path} is not JSON ({error}): copy the checkpoint again") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, memory-mapped; a missing or broken one is Refused by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # imports torch, which reports and the simulator do without

    if not path.is_file():
        raise Refused(f"{path} is missing: a checkpoint folder needs it")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} cannot be read ({error}): copy the checkpoint again") from error


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file beside, then rename it: tensors may be mapped from the one it replaces."""
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON."""
    path.write_text(to_json(content) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file beside, to the disk, then rename it: a kill leaves the one before, or none."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    to_disk(beside)
    beside.replace(path)


def to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; some say only here that it is full."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def append_json(path: Path, line: dict) -> None:
    """Append one line of JSON."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def to_json(content: dict, indent: int = 2) -> str:
    return json.dumps(content, indent=indent)
