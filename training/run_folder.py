"""A run folder: what the run was started with, what it logs, and its checkpoints.

`config.json` and `env.json` are written once; `metrics.jsonl` gets a line at each log step. A checkpoint is
written beside, to the disk and with its files' sizes and CRCs (`manifest.json`), renamed, and then pointed at
by `last`: a kill at any moment leaves the one before, and damage is found before anything is read from it.

    cat runs/run/config.json; tail -n 1 runs/run/metrics.jsonl
    pytest tests/training/test_run_folder.py
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from arm import Arm, save_arm
from files import (
    NUMBER,
    Refused,
    append_json,
    json_lines,
    read_json,
    replace_text,
    save_tensors,
    to_disk,
    to_json,
    write_json,
)
from model import SmolVLA
from smolvla.folders import (
    MANIFEST,
    OPTIMIZER,
    RAW,
    STATE,
    WHOLE,
    checkpoints,
    number,
    point,
    remove,
    seal,
)
from smolvla.processor import Processor
from training.optimise import Average


@dataclass
class Progress:
    """How far a run is: what `state.json` holds."""

    samples: int = 0
    step: int = 0
    bad_steps: int = 0
    """Steps that were skipped, since their gradient was not finite."""
    bad_in_a_row: int = 0
    """Those since the last step that was taken."""


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what a disk refuses, in any library's words, into one line."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides it
        reason = getattr(cause, "strerror", None) or (str(cause).splitlines() or [type(cause).__name__])[0]
        raise Refused(
            f"--out {out} cannot be written ({reason}): make room or choose another folder; in the same one, "
            "the same command goes on from the last checkpoint"
        ) from error


# ---- start --------------------------------------------------------------------------------------------


def open_run(out: Path, record: Mapping, defaults: Mapping, free: Collection[str]) -> None:
    """Create the run folder, or check that an existing one is of this configuration, but for what is `free`.

    Args: record, configuration and facts; defaults, of fields that an earlier version may not have written.
    Raises Refused, naming the field and both values, where it is another run's. Facts that an older
    version did not record are not compared.
    """
    path = out / "config.json"
    record, defaults = (json.loads(json.dumps(given, default=str)) for given in (record, defaults))
    if path.is_file():
        there = defaults | read_json(path)
        for name in record:
            if name in there and name not in free and there[name] != record[name]:
                raise Refused(
                    f"{out} holds another run: {name} is {there[name]!r}, not {record[name]!r}; "
                    "choose another --out"
                )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for unfinished in out.glob("step_*.part"):
            shutil.rmtree(unfinished)
        if not path.is_file():
            replace_text(out / "env.json", to_json(environment()) + "\n")
            replace_text(path, to_json(record) + "\n")


def environment() -> dict:
    """What the run ran on: versions, git hash, device, command line."""
    packages = ("torch", "numpy", "tokenizers", "safetensors", "h5py", "pyarrow", "av")
    changes = git("status", "--porcelain", "--", ":/", ":!/results")  # finished cells of a study are none
    return {
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
    }


def device_name() -> str:
    """The GPU's name as torch reports it, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"


def git(*arguments: str) -> str | None:
    """Ask git about this code; None for a copy without it."""
    try:
        here = Path(__file__).resolve().parents[1]
        answer = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def fingerprint(policy: SmolVLA) -> str:
    """A CRC over a policy's weights, without what memory adds: arms of one start share it."""
    crc = 0
    for name, tensor in policy.state_dict().items():
        if not name.startswith("fusion."):
            crc = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


# ---- writing checkpoints ------------------------------------------------------------------------------


def save(
    out: Path,
    arm: Arm,
    processor: Processor,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    average: Average | None = None,
    stays: Callable[[int], bool] = lambda step: True,
) -> Path:
    """Write a checkpoint beside, rename it, point `last` at it; then drop what need not stay.

    With an average, that is what the policy's files hold; the weights to train on lie beside them. `stays`
    says of an older checkpoint's step whether it is kept.
    """
    check_space(out, arm, average is not None)
    folder = out / f"step_{progress.step:06d}"
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(out):
            write_checkpoint(beside, arm, processor, optimizer, progress, average)
    except ValueError:
        shutil.rmtree(beside, ignore_errors=True)  # half of it would only fill the disk
        raise
    with writing(out):
        remove(folder)  # a damaged one, or one that `last` was turned back from
        beside.rename(folder)
        point(out, folder)
        prune(out, progress, stays)
    return folder


def write_checkpoint(
    folder: Path,
    arm: Arm,
    processor: Processor,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    average: Average | None,
) -> None:
    """Write the files and their manifest; what is written is checked off while the next is being written."""
    with ThreadPoolExecutor(1) as pool:
        if average is None:
            save_arm(folder, arm, processor)
        else:
            with average.in_place():
                save_arm(folder, arm, processor)
        first = {path: pool.submit(seal, path) for path in files_of(folder)}
        with (folder / OPTIMIZER).open("wb") as file:  # torch's own writer does not say that a disk is full
            torch.save(optimizer.state_dict(), file)
        if average is not None:
            save_tensors({name: p.detach() for name, p in average.params.items()}, folder / RAW)
        write_json(folder / STATE, dataclasses.asdict(progress))
        seals = first | {path: pool.submit(seal, path) for path in files_of(folder) if path not in first}
        found = {str(path.relative_to(folder)): made.result() for path, made in seals.items()}
    write_json(folder / MANIFEST, found)
    for path in (folder / MANIFEST, folder):
        to_disk(path)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def prune(out: Path, progress: Progress, stays: Callable[[int], bool]) -> None:
    """Of the checkpoints before the newest ones, remove the optimiser's state, or all (--keep-every)."""
    made = [folder for folder in checkpoints(out) if number(folder) <= progress.step]
    for folder in made[WHOLE:]:
        if stays(number(folder)):
            for name in (OPTIMIZER, RAW):
                (folder / name).unlink(missing_ok=True)
        else:
            remove(folder)


def check_space(out: Path, arm: Arm, averaged: bool = False) -> None:
    """Raise Refused where the disk cannot take a checkpoint: weights, and what is kept of what trains."""
    extra = 3 if averaged else 2  # two moments, and the weights beside their average
    need = sum(p.numel() * (1 + extra if p.requires_grad else 1) for p in arm.parameters()) * 4 + 10_000_000
    free = shutil.disk_usage(out).free
    if free < need:
        raise Refused(
            f"--out {out}: a checkpoint needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left; "
            "free some and run the same command: it goes on from the last checkpoint"
        )


# ---- log ----------------------------------------------------------------------------------------------


def cut_metrics(out: Path, done: int) -> None:
    """Drop logged lines beyond the checkpoint that a run resumes from: they will be logged again."""
    path = out / "metrics.jsonl"
    if path.is_file():
        kept = [line for _, line, why in json_lines(path, {"samples": NUMBER}) if not why]
        with writing(out):
            replace_text(path, "".join(json.dumps(x) + "\n" for x in kept if x["samples"] <= done))


def log_validation(out: Path, line: dict[str, float]) -> None:
    """Append a measurement to metrics.jsonl and print it."""
    with writing(out):
        append_json(out / "metrics.jsonl", line)
    named = {k.removeprefix("val_loss_"): line[k] for k in line if k.startswith("val_loss_")}
    said = "".join(f"  {mode} {loss:.4f}" for mode, loss in named.items())
    cosine = f"; world cos {line['val_world_cos']:+.3f}" if "val_world_cos" in line else ""
    print(f"{line['samples']:>9,} samples  held-out action loss{said}{cosine}", flush=True)


# Key of metrics.jsonl -> how the console shows it, in this order, where a line has it.
COLUMNS = {
    "samples": "{:9,d} samples",
    "loss": "loss {:7.4f}",
    "action_loss": "action {:7.4f}",
    "world_loss": "world {:6.4f}",
    "world_cos": "cos {:+.3f}",
    "lr": "lr {:.1e}",
    "grad_norm": "norm {:8.2e}",
    "bad_steps": "bad {:2d}",
    "samples_per_second": "{:7.1f} samples/s",
    "mfu": "mfu {:5.1%}",
}


def log(out: Path, line: dict[str, float], budget: int) -> None:
    """Append a line to metrics.jsonl and print its essence: one line of fixed columns, gates at its end."""
    with writing(out):
        append_json(out / "metrics.jsonl", line)
    shown = [text.format(line[key]) for key, text in COLUMNS.items() if key in line]
    left = (budget - line["samples"]) / line["samples_per_second"] / 60
    gates = [f"{k.removeprefix('world_')} {v:+.4f}" for k, v in line.items() if k.startswith("world_gate")]
    print("  ".join([*shown, f"{left:6.1f} min left", *gates]), flush=True)
