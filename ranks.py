"""The processes of one run: joining them, summing over them, and deciding together.

A rank is one process with one device; torchrun starts them, on one machine or several. Whatever steers a run
(which checkpoint it goes on from, when it stops) is decided by all ranks together, since one that takes
another way leaves the others waiting in a collective.

    torchrun --nproc-per-node 8 train.py ...                                                       # a node
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py  # on each
    pytest tests/test_train.py -m ''
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commands import read_command_line
from files import Unwritable


def start_ranks(
    backend: str | None = None, timeout: timedelta | None = None
) -> tuple[int, int, torch.device]:
    """Join torchrun's process group where there is one: rank, number of ranks, this rank's device.

    backend: by default what fits the device. timeout: how long one waits for another; default torch's own.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, ranks = next(dist.rendezvous("env://"))
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    store = fresh_part(store, rank, ranks)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=ranks)
    return rank, ranks, device


def fresh_part(store: dist.Store, rank: int, ranks: int) -> dist.Store:
    """Agree on a part of the store that is only of the processes alive now.

    When torchrun starts ranks again after one died, they find the store of before, with addresses of dead
    processes in it (torch 2.13), and would wait for these. So every rank says hello under a name that was
    never used, the first one answers to each name, until all have taken the answer.
    """
    me = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", me)
        part = store.get(f"part/{me}").decode()  # waits for it
        store.set(f"joined/{part}/{rank}", me)
        return dist.PrefixStore(part, store)
    missing = set(range(1, ranks))
    while missing:
        for other in sorted(missing):
            if store.check([f"joined/{me}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):  # maybe a dead one's: asked again until it has joined
                store.set(f"part/{store.get(f'hello/{other}').decode()}", me)
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def wait_for_ranks() -> None:
    """Go on when all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


class Together:
    """What ranks say to one another on the host: no device waits for it."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.group = dist.new_group(backend="gloo") if ranks > 1 else None

    def gather(self, value: object) -> list:
        """Give every rank's value to all of them, in order of rank."""
        found = [value]
        if self.group is not None:
            found = [None] * self.ranks
            dist.all_gather_object(found, value, self.group)
        return found

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank."""
        counts = torch.tensor(flags, dtype=torch.int64)
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return counts.bool().tolist()


class Stop:
    """Notes SIGTERM and Ctrl-C while it is open, so that a run ends at a step's end instead of in its middle.

    A second Ctrl-C kills.
    """

    def __enter__(self) -> Stop:
        self.asked = False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            print("stopping after this step and a checkpoint; Ctrl-C again kills", flush=True)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run_program(
    main: Callable[[Any], None],
    config: type,
    description: str | None,
    refused: type[Exception],
    first: Sequence[str],
) -> None:
    """Read the command line into a config and run main on this rank; --help begins with the options `first`.

    What a person gave wrong (`refused`) is one line; torchrun, which prints a traceback of its own after it,
    is handed the line to end with.
    """
    line = None
    try:
        main(read_command_line(config, description, first))
    except refused as error:
        line = str(error)
    except Unwritable as error:
        line = str(error)
    except torch.OutOfMemoryError as error:
        line = f"{str(error).splitlines()[0]}: raise --accumulate, or lower --batch-size or --num-envs"
    except KeyboardInterrupt:
        line = "interrupted; the same command goes on from here"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if line is None:
        return
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": f"error: {line}"}))
    sys.exit(f"error: {line}")
