"""What training costs beside training: the loop around the steps, and a save beside plain writing.

The loop is train.py's own, on random pictures in memory, with a log line at each step. Forward passes,
backward passes and the optimiser's step are timed; what the clock shows beyond them is the loop's: batches,
clipping, counting, logging. The last save is repeated, in turns with writing as many bytes plainly, both to
the disk.

    python -m bench loop --size tiny

Called by bench/speed.py.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import torch

import train
from arm import Arm
from files import to_disk
from train import TrainConfig
from training.run_folder import files_of

STEPS = 6  # of which the first warms up
TURNS = 3  # of saving and writing; the fastest of each counts
SIDE = 256  # pixels of a picture


def lines(size: str, dtype: str, batch: int, threads: int | None) -> Iterator[dict]:
    """Measure in a temporary folder; gives a row for the loop and one for saving."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        write_demos(home / "data" / "bench_demo.hdf5", frames=STEPS * batch)
        flags = {"data": home / "data", "out": home / "run", "init": size, "dtype": dtype, "threads": threads}
        flags |= {"batch_size": batch, "total_samples": STEPS * batch, "log_every": 1}
        config = TrainConfig(**flags)
        spent, saving = [], []
        said = io.StringIO()
        with contextlib.redirect_stdout(said), watching(spent), timing_saves(saving):
            train.main(config)
        common = {"case": "the loop around a step", "dtype": dtype, "batch": batch}
        yield common | shares_of(spent)
        yield {"case": "a save beside plain writing", "dtype": dtype, "batch": batch} | saving[0]


def write_demos(path: Path, frames: int) -> None:
    """Write one random episode in LIBERO's layout."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["problem_info"] = '{"language_instruction": "open the middle drawer"}'
        file["data"].attrs.update(pairing="observation_before_action", num_demos=1, total=frames)
        demo = file["data"].create_group("demo_0")
        demo.attrs["num_samples"] = frames
        demo["actions"] = rng.normal(size=(frames, 7))
        for name, width in {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}.items():
            demo[f"obs/{name}"] = rng.normal(size=(frames, width))
        for name in ("agentview_rgb", "eye_in_hand_rgb"):
            demo[f"obs/{name}"] = rng.integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)


@contextmanager
def watching(spent: list[tuple[str, float, float]]) -> Iterator[None]:
    """Note when each forward pass, backward pass and optimiser step begins and ends."""

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            start = now()
            out = function(*args, **kwargs)
            spent.append((name, start, now()))
            return out

        return call

    with (
        mock.patch.object(Arm, "__call__", timed("forward", Arm.__call__)),
        mock.patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward)),
        mock.patch.object(torch.optim.AdamW, "step", timed("optimiser", torch.optim.AdamW.step)),
    ):
        yield


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def shares_of(spent: list[tuple[str, float, float]]) -> dict[str, float]:
    """Split the time from the end of the first step to that of the last."""
    ends = [end for name, _, end in spent if name == "optimiser"]
    inside = [(name, end - start) for name, start, end in spent if start >= ends[0]]
    names = ("forward", "backward", "optimiser")
    parts = {part: sum(t for name, t in inside if name == part) for part in names}
    whole = ends[-1] - ends[0]
    steps = len(ends) - 1
    found = {name: t / steps for name, t in parts.items()}
    return {"seconds": whole / steps, **found, "share_outside": 1 - sum(parts.values()) / whole}


@contextmanager
def timing_saves(found: list[dict]) -> Iterator[None]:
    """Repeat the run's last save, in turns with writing as many bytes."""
    save = train.save

    def measured(*given: object) -> Path:
        seconds, plain = [], []
        for _ in range(TURNS):
            start = now()
            folder = save(*given)
            seconds.append(now() - start)
            plain.append(write_plainly(folder))
            size = sum(path.stat().st_size for path in files_of(folder))
            shutil.rmtree(folder)
        row = {"seconds": min(seconds), "plain_seconds": min(plain), "bytes": size}
        found.append(row | {"ratio": min(seconds) / min(plain)})
        return folder

    with mock.patch.object(train, "save", measured):
        yield


def write_plainly(folder: Path) -> float:
    """Write files of a checkpoint's sizes and bring them to the disk: seconds."""
    sizes = [path.stat().st_size for path in files_of(folder)]
    block, spent = os.urandom(2**24), 0.0
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        start = time.perf_counter()
        for i, size in enumerate(sizes):
            path = Path(beside) / str(i)
            with path.open("wb", buffering=0) as file:
                for written in range(0, size, len(block)):
                    file.write(block[: size - written])
            to_disk(path)
        spent = time.perf_counter() - start
    return spent


def table(row: dict) -> str:
    """Lay a row out."""
    line = f"{row['case']:28s} {row['dtype']:8s} "
    if "ratio" in row:
        written = f"{row['bytes'] / 1e9:.3f} GB written plainly in {row['plain_seconds']:.3f} s"
        return f"{line}{row['seconds']:8.3f} s  {written}: {row['ratio']:.2f} x"
    parts = ", ".join(f"{k} {row[k]:.3f}" for k in ("forward", "backward", "optimiser"))
    return f"{line}{row['seconds']:8.3f} s a step: {parts}; outside of them {row['share_outside']:.1%}"
