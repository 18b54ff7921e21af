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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from files import Refused, Unwritable, read_command_line

BEAT, SILENT = 1.0, 2.5  # seconds between two signs of life; without one, after which a rank does not live
PATIENCE = 300.0  # seconds without a sign of life from another rank
STORE: list[dist.Store] = []  # of the ranks alive now
WATCH: list[Vigil] = []  # the one that this rank keeps now


def start_ranks(
    backend: str | None = None, timeout: timedelta | None = None, patience: float = PATIENCE
) -> tuple[int, int, torch.device]:
    """Join torchrun's process group where there is one: rank, number of ranks, this rank's device.

    backend: by default what fits the device. timeout: how long one waits for another in a collective;
    default torch's own. Raises Refused where another rank has not come after `patience` seconds.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, ranks = next(dist.rendezvous("env://"))
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    store = fresh_part(store, rank, ranks, patience)
    STORE[:] = [store]
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=ranks)
    return rank, ranks, device


def fresh_part(store: dist.Store, rank: int, ranks: int, patience: float) -> dist.Store:
    """Agree on a part of the store that is only of the processes alive now.

    When torchrun starts ranks again after one died, they find the store of before, with addresses of dead
    processes in it (torch 2.13), and would wait for these. So every rank says hello under a name that was
    never used, the first one answers to each name, until all have taken the answer.
    """
    me, begun = uuid.uuid4().hex, time.monotonic()
    late = f"rank {rank} has waited for {patience:.0f} s: rank {{}} has not come; start again"
    if rank:
        store.set(f"hello/{rank}", me)
        try:
            store.wait([f"part/{me}"], timedelta(seconds=patience))
        except dist.DistStoreError as error:
            raise Refused(late.format(0)) from error
        part = store.get(f"part/{me}").decode()
        store.set(f"joined/{part}/{rank}", me)
        return dist.PrefixStore(part, store)
    missing = set(range(1, ranks))
    while missing:
        for other in sorted(missing):
            if store.check([f"joined/{me}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):  # maybe a dead one's: asked again until it has joined
                store.set(f"part/{store.get(f'hello/{other}').decode()}", me)
        if missing and time.monotonic() - begun > patience:
            raise Refused(late.format(", ".join(map(str, sorted(missing)))))
        time.sleep(0.02)
    return dist.PrefixStore(me, store)


def waiting() -> AbstractContextManager:
    """Note, while it is open, that this rank waits for others."""
    return WATCH[-1].waiting() if WATCH else nullcontext()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def wait_for_ranks() -> None:
    """Go on when all ranks are here."""
    if dist.is_initialized():
        with waiting():
            dist.barrier()


class Together:
    """What ranks say to one another on the host: no device waits for it."""

    def __init__(self, ranks: int, vigil: Vigil) -> None:
        self.ranks, self.vigil = ranks, vigil
        self.group = dist.new_group(backend="gloo") if ranks > 1 else None

    def gather(self, value: object) -> list:
        """Give every rank's value to all of them, in order of rank."""
        found = [value]
        if self.group is not None:
            found = [None] * self.ranks
            with waiting():
                dist.all_gather_object(found, value, self.group)
        return found

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank."""
        counts = torch.tensor(flags, dtype=torch.int64)
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        return counts.bool().tolist()


@dataclass
class Sign:
    """What a rank says of itself, each second."""

    process: int = 0
    host: str = "an unknown host"
    steps: int = 0
    busy: bool = False
    waits: bool = False
    left: bool = False
    count: int = 0


class Vigil:
    """Watches, from a thread, that all ranks go on: one that waits too long ends, and says for which.

    Each rank tells the others through the store that it lives, and how many steps it took. Where a rank died
    the others' collectives break; for one that hangs they would wait half an hour without a word. Before the
    first step ranks may prepare data for hours: only what waits for others is timed then.
    """

    def __init__(self, rank: int, ranks: int, patience: float, longest: float = 6) -> None:
        """Args: patience, seconds without a step, or without a sign of life from another rank, after which
        this one gives up; longest, times that where one may be busy: before the first step, in a save."""
        self.rank, self.patience, self.longest, now = rank, patience, longest, time.monotonic()
        self.me = Sign(os.getpid(), socket.gethostname(), busy=True)
        self.others = {other: Sign() for other in range(ranks) if other != rank}
        self.heard = dict.fromkeys(self.others, now)  # when each said something last
        self.since: float | None = None  # when it took its last step or, before the first, began to wait
        self.over, self.thread = threading.Event(), threading.Thread(target=self.watch, daemon=True)

    def step(self, number: int, busy: bool = False) -> None:
        """Note the step that this rank took last; busy, before what may take long while the others wait."""
        self.me.steps, self.me.busy, self.since = number, busy, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time what this rank waits for before its first step."""
        early = self.since is None
        if early:
            self.since, self.me.waits = time.monotonic(), True
        yield
        if early:
            self.since, self.me.waits = None, False

    def __enter__(self) -> Vigil:
        if self.others:
            WATCH.append(self)
            self.thread.start()
            self.before = signal.signal(signal.SIGTERM, self.told_to_end)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self.others:
            return
        WATCH.remove(self)
        self.over.set()
        self.thread.join()
        try:
            if error is None:
                self.me.left = True
                self.exchange()
            elif isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                self.blame(error)
        finally:
            signal.signal(signal.SIGTERM, self.before)

    def told_to_end(self, number: int, frame: FrameType | None) -> None:
        """End at SIGTERM, which torchrun sends to all where one has died."""
        self.blame(None)
        sys.exit(128 + number)

    def blame(self, error: Exception | None) -> None:
        """Raise Refused where other ranks are dead: it is why this one cannot go on."""
        self.exchange()
        time.sleep(SILENT + BEAT)  # one that died says nothing meanwhile
        if self.exchange() and (lost := self.lost(behind=False)):
            raise Refused(f"{', '.join(lost)}; the same command goes on from where it was") from error

    def watch(self) -> None:
        told = False
        while self.exchange():
            busy = self.me.busy or any(sign.busy for sign in self.others.values())
            limit = self.patience * (self.longest if busy else 1)
            waited = 0.0 if self.since is None else time.monotonic() - self.since
            silent = max(map(self.silence, self.others))
            named = ", ".join(self.lost()) or "the ranks wait for one another"
            if waited > limit or silent > self.patience:
                end(f"rank {self.rank} has waited for {max(waited, silent):.0f} s: {named}", now=True)
            late = waited > limit / 2 or silent > self.patience / 2
            if late and not told:
                print(f"rank {self.rank} waits: {named}", flush=True)
            told = late
            if self.over.wait(BEAT):
                return

    def exchange(self) -> bool:
        """Say how this rank is, hear how others are; False where the store is gone, with who started them."""
        self.me.count += 1
        try:
            STORE[0].set(f"alive/{self.rank}", json.dumps(vars(self.me)))
            for rank, before in self.others.items():
                if STORE[0].check([f"alive/{rank}"]):
                    sign = Sign(**json.loads(STORE[0].get(f"alive/{rank}")))
                    if sign != before:
                        self.others[rank], self.heard[rank] = sign, time.monotonic()
        except RuntimeError:
            return False
        return True

    def silence(self, rank: int) -> float:
        """Seconds since a rank said something; 0 for one that is done."""
        return 0.0 if self.others[rank].left else time.monotonic() - self.heard[rank]

    def lost(self, behind: bool = True) -> list[str]:
        """Name the ranks that are gone or do not answer, and those that are behind."""
        found = []
        for rank, sign in self.others.items():
            who = f"rank {rank} (process {sign.process} on {sign.host})"
            where = f", after step {sign.steps}" if sign.steps else ""
            if self.silence(rank) > SILENT:
                gone = sign.host == self.me.host and not Path(f"/proc/{sign.process}").exists()
                found.append(f"{who} {'is gone' if gone else 'does not answer'}{where}")
            elif behind and sign.steps < self.me.steps:
                found.append(f"{who} hangs{where}")
            elif behind and self.me.waits and not (sign.waits or sign.left):
                found.append(f"{who} still prepares")
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
            with suppress(OSError):  # past sys.stdout, which a print may hold just now
                os.write(1, b"stopping after this step and a checkpoint; Ctrl-C again kills\n")

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
    except (refused, Unwritable, PermissionError) as error:
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
