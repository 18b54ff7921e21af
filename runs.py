"""A run folder: what the run was started with, what it logs, and its checkpoints.

`config.json` and `env.json` are written once; `metrics.jsonl` gets a line at each log step; checkpoints are
written beside, renamed, and then pointed at by `last`, so that a kill at any moment leaves the one before.

    cat runs/run/config.json; tail -n 1 runs/run/metrics.jsonl
    pytest tests/test_train.py
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from arm import Arm, save_arm
from files import append_json, read_json, write_json
from processor import Processor

if TYPE_CHECKING:
    from train import TrainConfig


# ---- start --------------------------------------------------------------------------------------------


def open_run(config: TrainConfig, facts: dict) -> None:
    """Create the run folder, or check that an existing one is of this configuration.

    Raises ValueError, naming the field and both values, where it is another run's.
    """
    path = config.out / "config.json"
    record = json.loads(json.dumps(dataclasses.asdict(config) | facts, default=str))
    if path.is_file():
        defaults = {f.name: f.default for f in dataclasses.fields(config)}  # of fields that came later
        there = json.loads(json.dumps(defaults, default=str)) | read_json(path)
        for name in record:
            if name not in config.free and there.get(name) != record[name]:
                raise ValueError(
                    f"{config.out} holds another run: {name} is {there.get(name)!r}, not {record[name]!r}; "
                    "choose another --out"
                )
        return
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "env.json", environment())
    write_json(path, record)


def environment() -> dict:
    """What the run ran on: versions, git hash, device, command line."""
    packages = ("torch", "numpy", "tokenizers", "safetensors", "h5py", "pyarrow", "av")
    changes = git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
    }


def git(*arguments: str) -> str | None:
    """Ask git about this code; None for a copy without it."""
    try:
        here = Path(__file__).resolve().parent
        answer = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


# ---- checkpoints --------------------------------------------------------------------------------------


def save(
    config: TrainConfig,
    arm: Arm,
    processor: Processor,
    optimizer: torch.optim.Optimizer,
    done: int,
    step: int,
) -> Path:
    """Write a checkpoint beside, then rename it, then point `last` at it: a kill leaves the one before."""
    check_space(config.out, arm)
    folder = config.out / f"step_{step:06d}"
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    save_arm(beside, arm, processor)
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    write_json(beside / "state.json", {"samples": done, "step": step})
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    link = config.out / "last.part"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.rename(config.out / "last")
    return folder


def check_space(out: Path, arm: Arm) -> None:
    """Raise ValueError where the disk cannot take a checkpoint: weights, and two moments of what trains."""
    need = sum(p.numel() * (3 if p.requires_grad else 1) for p in arm.parameters()) * 4 + 10_000_000
    free = shutil.disk_usage(out).free
    if free < need:
        raise ValueError(
            f"--out {out}: a checkpoint needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left; "
            "free some and run the same command: it goes on from the last checkpoint"
        )


# ---- log ----------------------------------------------------------------------------------------------


def cut_metrics(path: Path, done: int) -> None:
    """Drop logged lines beyond the checkpoint that a run resumes from: they will be logged again."""
    if path.is_file():
        lines = [
            line
            for line in path.read_text().splitlines()
            if line.endswith("}") and json.loads(line)["samples"] <= done
        ]
        path.write_text("".join(line + "\n" for line in lines))


def log_validation(config: TrainConfig, line: dict[str, float]) -> None:
    """Append a measurement to metrics.jsonl and print it."""
    append_json(config.out / "metrics.jsonl", line)
    losses = "".join(f"  {k.removeprefix('val_loss_')} {line[k]:.4f}" for k in line if k.startswith("val_"))
    print(f"{line['samples']:>9,} samples  held-out action loss{losses}", flush=True)


def log(config: TrainConfig, line: dict[str, float]) -> None:
    """Append a line to metrics.jsonl and print its essence."""
    append_json(config.out / "metrics.jsonl", line)
    rate = line["samples_per_second"]
    speed = f"{rate:6.1f} samples/s  {(config.total_samples - line['samples']) / rate / 60:5.1f} min left"
    shown = [k for k in line if k in ("world_loss", "world_cos") or k.startswith("world_gate")]
    extra = "".join(f"  {k} {line[k]:+.4f}" for k in shown)
    print(
        f"{line['samples']:>9,} samples  loss {line['loss']:.4f}  lr {line['lr']:.1e}  {speed}{extra}",
        flush=True,
    )
