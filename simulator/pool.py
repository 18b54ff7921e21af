"""LIBERO in processes of its own: a pool of environments that answer when they are ready.

Calls return at once and `ready` collects what is there, so that a policy computes while simulators run. A
simulator that raises, dies or hangs costs its own episode alone; the next reset gives that slot a fresh
process.

    pytest -m '' tests/simulator/test_pool.py

Importing this file loads neither LIBERO, MuJoCo nor torch, and a worker never loads the caller's script.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from files import Refused
from simulator.env import (
    CAMERAS,
    LiberoEnv,
    SimConfig,
    check_camera,
    check_init_state,
    check_task,
    state_vector,
)


class SimCrash(RuntimeError):
    """A simulator that raised, died or hung: neither failure nor success. `env` is its number in the pool."""

    def __init__(self, message: str, env: int) -> None:
        super().__init__(message)
        self.env = env


@dataclass(frozen=True)
class Observation:
    """What a policy gets after a reset or after a run of actions."""

    state: np.ndarray  # (8,) float32
    # (offset, camera key) -> (size, size, 3) uint8; after the end only what `last` asked for
    frames: dict[tuple[int, str], np.ndarray]
    success: bool
    done: bool  # solved, or out of steps
    steps: int  # executed since the reset
    language: str
    physics_seconds: float
    drawing_seconds: float
    taken: str | None = None  # of an ambiguous task: the object that is in its place, or was last in the hand


class EnvPool:
    """`num_envs` environments, one process each; calls return at once and `ready` collects the answers.

    One that gives no answer for `hang_after` seconds is taken for hung, and ended.
    """

    def __init__(self, num_envs: int, config: SimConfig, hang_after: float = 300.0) -> None:
        if num_envs < 1:
            raise Refused(
                f"number of environments must be at least 1, got {num_envs}: pass --num-envs 1 or more"
            )
        if not hang_after > 0:
            raise Refused(f"--hang-after must be more than 0 seconds, got {hang_after}")
        self.num_envs, self.config, self.hang_after = num_envs, config, hang_after
        self._workers: list[tuple[Any, Any] | None] = [None] * num_envs  # (process, connection)
        self._episodes = [(-1, -1)] * num_envs  # (task id, init state)
        self._busy: dict[int, float] = {}  # environment -> when it is taken for hung
        self._crashes: list[SimCrash] = []

    def reset(
        self, i: int, task_id: int, init_state: int, draw: int = 0, cameras: Sequence[str] = tuple(CAMERAS)
    ) -> None:
        """Begin an episode in environment i; its observation holds a frame (0, camera) for each of `cameras`.

        Restarts a crashed process. Raises Refused for an unknown task, init state or camera.
        """
        check_task(self.config.suite, task_id)
        check_init_state(init_state)
        _check_cameras(cameras)
        assert i not in self._busy, "collect this environment's answer with ready() first"
        if self._workers[i] is None:
            self._workers[i] = self._start()
        self._episodes[i] = (task_id, init_state)
        self._send(i, ("reset", task_id, init_state, draw, tuple(cameras)))

    def run(
        self,
        i: int,
        actions: np.ndarray,
        frames: Sequence[tuple[int, str]] = (),
        last: Sequence[str] = (),
    ) -> None:
        """Execute actions (n, 7) in environment i, up to the episode's end.

        frames: pairs (k, camera) to draw after action k (1-based), unless the episode is over by then.
        last: cameras to draw where the episode ends.
        """
        actions = np.asarray(actions, dtype=np.float64)
        assert actions.ndim == 2 and actions.shape[1] == 7, f"actions must be (n, 7), got {actions.shape}"
        assert all(1 <= k <= len(actions) for k, _ in frames), (
            f"frames {frames} lie outside 1..{len(actions)}"
        )
        assert i not in self._busy and self._workers[i] is not None, "reset this environment first"
        _check_cameras([*(camera for _, camera in frames), *last])
        self._send(i, ("run", actions, tuple(frames), tuple(last)))

    def ready(self, timeout: float | None = None) -> list[tuple[int, Observation]]:
        """Return the answers that are there, waiting up to `timeout` seconds (None: for ever) for the first.

        Raises SimCrash for an environment that raised, died or hung; the others' answers come with the next
        call.
        """
        if self._crashes:
            raise self._crashes.pop(0)
        answers = []
        for i in self._answered(timeout):
            answer = self._receive(i)
            if isinstance(answer, Observation):
                answers.append((i, answer))
            else:
                self._crashes.append(self._crash(i, answer))
        if not answers and self._crashes:
            raise self._crashes.pop(0)
        return answers

    def _answered(self, timeout: float | None) -> list[int]:
        """Wait for the first environments to answer; what hangs until its time is over becomes a crash."""
        if not self._busy:
            return []
        connections = {self._workers[i][1]: i for i in self._busy}
        left = max(0.0, min(self._busy.values()) - time.monotonic())
        answered = [
            connections[c] for c in wait(list(connections), left if timeout is None else min(left, timeout))
        ]
        for i in [i for i, due in self._busy.items() if due <= time.monotonic() and i not in answered]:
            del self._busy[i]
            self._crashes.append(self._crash(i, f"no answer within {self.hang_after:g} s"))
        return answered

    def _start(self) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.config), daemon=True)
        with light_start():
            process.start()
        there.close()  # so that a dead process reads as end of file
        return process, here

    def _send(self, i: int, message: tuple) -> None:
        self._busy[i] = time.monotonic() + self.hang_after
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile: ready() says so
            self._workers[i][1].send(message)

    def _receive(self, i: int) -> Observation | str:
        del self._busy[i]
        try:
            return self._workers[i][1].recv()
        except (EOFError, ConnectionResetError):
            self._workers[i][0].join(5)
            code = self._workers[i][0].exitcode
            return f"the process died with exit code {code} (-9: killed, maybe out of memory)"

    def _crash(self, i: int, reason: str) -> SimCrash:
        self._end(i)
        task_id, init_state = self._episodes[i]
        where = f"{self.config.suite} task {task_id} init state {init_state}"
        return SimCrash(
            f"the simulator crashed in {where}: {reason}; reset it to go on in a fresh process", i
        )

    def _end(self, i: int) -> None:
        if self._workers[i] is not None:
            process, connection = self._workers[i]
            connection.close()
            process.kill()  # whatever it is doing: a process that hangs may not hear SIGTERM
            process.join(10)
            self._workers[i] = None

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for i in range(self.num_envs):
            self._end(i)
        self._busy.clear()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_cameras(cameras: Sequence[str]) -> None:
    for camera in cameras:
        check_camera(camera)


# ---------------------------------------------------------------- worker processes


@contextlib.contextmanager
def light_start() -> Iterator[None]:
    """Start child processes that use one thread, and without loading the caller's script (and torch)."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    threads["LP_NUM_THREADS"] = os.environ.get("LP_NUM_THREADS", "0")  # Mesa: no thread but the caller's
    before = {name: os.environ.get(name) for name in threads}
    main = sys.modules["__main__"]
    os.environ.update(threads)
    sys.modules["__main__"] = types.ModuleType("__main__")  # spawn imports __main__.__file__ in the child
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def quiet_worker() -> None:
    """Make this child process silent on stdout (LIBERO prints) and deaf to Ctrl-C (its parent ends it)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_fresh_process(function: Callable[[Path], Any], argument: Path) -> Any:
    """Call a module-level function in a process of its own. Raises what it raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=quiet_worker) as pool, light_start():
        return pool.submit(function, argument).result()


def _serve(connection: Any, config: SimConfig) -> None:
    """Answer the pool's messages until it hangs up."""
    quiet_worker()
    host = _Host(config)
    while True:
        try:
            kind, *rest = connection.recv()
        except EOFError:
            return
        try:
            answer = host.reset(*rest) if kind == "reset" else host.run(*rest)
        except Exception as error:  # whatever it was, it must reach the parent, which names the episode
            connection.send(traceback.format_exception_only(error)[-1].strip())
            return
        connection.send(answer)


class _Host:
    """A worker's one environment, rebuilt when the task changes."""

    def __init__(self, config: SimConfig) -> None:
        self.config, self.env = config, None
        self.success, self.physics, self.drawing = False, 0.0, 0.0

    def reset(self, task_id: int, init_state: int, draw: int, cameras: Sequence[str]) -> Observation:
        started = time.perf_counter()
        if self.env is not None and self.env.task_id != task_id:
            self.env.close()
            self.env = None
        if self.env is None:
            self.env = LiberoEnv(self.config, task_id)
        state = self.env.reset(init_state, draw)
        self.success, self.drawing = False, 0.0
        self.physics = time.perf_counter() - started
        return self._observation(state, self._draw(0, [(0, camera) for camera in cameras]))

    def run(self, actions: np.ndarray, wanted: Sequence[tuple[int, str]], last: Sequence[str]) -> Observation:
        self.physics, self.drawing = 0.0, 0.0
        frames: dict[tuple[int, str], np.ndarray] = {}
        state = state_vector(self.env.obs)
        for k, action in enumerate(actions, start=1):
            if self._done():
                break
            started = time.perf_counter()
            state, self.success = self.env.step(action)
            self.physics += time.perf_counter() - started
            frames |= self._draw(k, [(k, camera) for camera in last] if self._done() else wanted)
        return self._observation(state, frames)

    def _done(self) -> bool:
        return self.success or self.env.steps >= self.env.max_steps

    def _draw(self, offset: int, wanted: Sequence[tuple[int, str]]) -> dict[tuple[int, str], np.ndarray]:
        started = time.perf_counter()
        frames = {(k, camera): self.env.draw(camera) for k, camera in wanted if k == offset}
        self.drawing += time.perf_counter() - started
        return frames

    def _observation(self, state: np.ndarray, frames: dict[tuple[int, str], np.ndarray]) -> Observation:
        env = self.env
        times = (round(self.physics, 4), round(self.drawing, 4))
        return Observation(
            state, frames, self.success, self._done(), env.steps, env.language, *times, env.taken
        )
