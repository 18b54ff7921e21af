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
import socket
import sys
import threading
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

from files import Refused, Unwritable, read_command_line

BEAT, SILENT = 1.0, 2.5  # seconds between two signs of life; without one, after which a rank does not live
STORE: list[dist.Store] = []  # of the ranks alive now


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
    STORE[:] = [store]
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


class Vigil:
    """Watches, from a thread, that all ranks go on: one that waits too long ends, and says for which.

    Each rank tells the others through the store that it lives, and how many steps it took. Where a rank died
    the others' collectives break; for one that hangs they would wait half an hour without a word.
    """

    def __init__(self, rank: int, ranks: int, patience: float) -> None:
        """Args: patience, seconds without a step after which this rank gives up."""
        self.rank, self.others, self.patience = rank, [r for r in range(ranks) if r != rank], patience
        self.steps, self.at, self.busy, self.over = 0, time.monotonic(), False, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def step(self, busy: bool = False) -> None:
        """Note that this rank goes on; busy, before what may take long while the others wait."""
        self.steps, self.at, self.busy = self.steps + (not busy), time.monotonic(), busy

    def __enter__(self) -> Vigil:
        if self.others:
            self.say()
            self.thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.over.set()
        if self.others and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            self.thread.join()
            time.sleep(SILENT + BEAT)  # one that died has said nothing since
            if lost := self.lost():
                again = "the same command goes on from the last checkpoint"
                raise Refused(f"{', '.join(lost)}; {again}") from error

    def watch(self) -> None:
        told = False
        try:
            while not self.over.wait(BEAT):
                self.say()
                waited, busy = time.monotonic() - self.at, any(state[3] for state in self.heard().values())
                limit = self.patience * (6 if busy or self.busy else 1)
                if waited > limit:
                    named = ", ".join(self.lost()) or "the ranks wait for one another"
                    end(f"rank {self.rank} has waited for {waited:.0f} s: {named} (--patience)", now=True)
                if waited > limit / 2 and not told:
                    print(f"rank {self.rank} waits: {', '.join(self.lost()) or 'for the others'}", flush=True)
                told = waited > limit / 2
        except RuntimeError:  # the store is gone, and with it whoever started the ranks
            return

    def say(self) -> None:
        state = [os.getpid(), socket.gethostname(), self.steps, self.busy, time.time()]
        STORE[0].set(f"alive/{self.rank}", json.dumps(state))

    def heard(self) -> dict[int, list]:
        """What each other rank said last."""
        there = [rank for rank in self.others if STORE[0].check([f"alive/{rank}"])]
        return {rank: json.loads(STORE[0].get(f"alive/{rank}")) for rank in there}

    def lost(self) -> list[str]:
        """Name the ranks that are gone, do not answer, or are behind."""
        found, heard = [], self.heard()
        for rank in self.others:
            process, host, steps, _, at = heard.get(rank, (0, "an unknown host", 0, False, 0.0))
            who = f"rank {rank} (process {process} on {host})"
            if time.time() - at > SILENT:
                gone = host == socket.gethostname() and not Path(f"/proc/{process}").exists()
                found.append(f"{who} {'is gone' if gone else 'does not answer'}, after step {steps}")
            elif steps < self.steps:
                found.append(f"{who} hangs after step {steps}")
        return found


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


MEMORY = (torch.OutOfMemoryError, MemoryError)  # a CPU's is a RuntimeError with words


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
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MEMORY) or "can't allocate memory" in str(error)):
            raise
        said = (str(error) or "out of memory").splitlines()[0]
        line = f"{said}: raise --accumulate, or lower --batch-size or --num-envs"
    except KeyboardInterrupt:
        line = "interrupted; the same command goes on from here"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if line is not None:
        end(line)


def end(line: str, now: bool = False) -> None:
    """End with a line; now, from a thread, whatever the others do."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": f"error: {line}"}))
    if now:
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(f"error: {line}")
