"""Does this machine's simulator replay recorded episodes? `python -m simulator verify` asks here.

Each recorded episode is replayed in a fresh process; simulator states, policy states, pictures and success
are compared step by step. What differs is told in plain words: what it does to results, what to install or
set. Pictures that differ are told apart by how they do: darker floors (MuJoCo from 3.3.3 on honours sRGB
marks of textures), turned, mirrored or blank ones, another renderer's, another scene's.

    python -m simulator verify                   # the episodes in tests/libero_env, a picture in tests/render
    python -m simulator verify tests/render          # one picture each, drawn by MuJoCo 3.3.2 and 3.3.7
    python -m simulator verify --texture-colorspace linear

A recording is a folder with meta.json, run.npz (actions, states, success) and stepNN_image[2].png, of either
camera or both. Without run.npz it is the picture after reset and settling, step00_image.png.

Shapes: S picture side, T actions.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import tyro

from files import NO_ARRAY, Refused, check_numbers, read_json, told, type_in
from simulator.env import CAMERAS, MUJOCO_VERSION, LiberoEnv, SimConfig, versions
from simulator.pool import in_fresh_process
from simulator.render import APT_LINE, check_gl, setup_gl

TOLERANCE = 0.5  # mean absolute difference of a picture, of 255
GPU_TOLERANCE = 4.0  # what another driver may differ by
CLEAR = 10  # a channel that differs by more has another cause than a renderer's rounding
VISIBLE = 1e-3  # states that differ by less draw the same picture
PIN = f"pip install mujoco=={MUJOCO_VERSION} robosuite==1.4.0"
TESTS = Path(__file__).resolve().parents[1] / "tests"


@dataclass(frozen=True)
class Command:
    """Replay recorded episodes and compare simulator states, policy states, pictures and success.

    Exit code 0 if all agree, 1 if not.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = (
        TESTS / "libero_env",
        TESTS / "render" / "mujoco-3.3.2_object0",  # the others hardly show a floor
    )
    """Recordings, or folders of them: meta.json, run.npz and stepNN_image[2].png; or one picture alone."""
    picture_tolerance: float = TOLERANCE
    """Largest mean absolute difference of a picture, of 255; a GPU's driver may need 4."""
    texture_colorspace: Literal["as_installed", "linear"] = "as_installed"
    """linear: draw textures as MuJoCo did up to 3.3.2, whatever is installed."""

    limits: ClassVar = {"picture_tolerance": (0, 255)}

    def __post_init__(self) -> None:
        check_numbers(self)


# ---------------------------------------------------------------- two pictures

MOVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "turned by 180 degrees": lambda p: p[::-1, ::-1],
    "upside down": lambda p: p[::-1],
    "mirrored left to right": lambda p: p[:, ::-1],
    "turned by 90 degrees": np.rot90,
    "turned by 270 degrees": lambda p: np.rot90(p, 3),
    "red and blue swapped": lambda p: p[..., ::-1],
}


def diagnose(here: np.ndarray, recorded: np.ndarray, tolerance: float = TOLERANCE) -> tuple[str, ...]:
    """Name what differs between two pictures (S, S, 3) of 0..255 of one scene; nothing within the tolerance.

    A key of `MOVES` may come first and is undone before looking on. Then one of: size, blank here, blank
    recording, darker here, darker recording, another renderer, another scene.
    """
    here, recorded = np.asarray(here, np.float64), np.asarray(recorded, np.float64)
    if here.shape != recorded.shape:
        return ("size",)
    if np.abs(here - recorded).mean() <= tolerance:
        return ()
    for name, picture in (("blank here", here), ("blank recording", recorded)):
        if np.ptp(picture) <= 2:
            return (name,)
    moved = find_move(here, recorded)
    here = MOVES[moved](here) if moved else here
    return (moved,) * bool(moved) + _name_colours(here, recorded, tolerance)


def _name_colours(here: np.ndarray, recorded: np.ndarray, tolerance: float) -> tuple[str, ...]:
    mean = np.abs(here - recorded).mean()
    if mean <= tolerance:
        return ()
    if is_darker_in_places(here, recorded):
        return ("darker here",)
    if is_darker_in_places(recorded, here):
        return ("darker recording",)
    return ("another renderer",) if mean <= GPU_TOLERANCE else ("another scene",)


def find_move(here: np.ndarray, recorded: np.ndarray) -> str:
    """Return the key of `MOVES` under which two pictures agree far better than as they are; '' for none."""

    def apart(picture: np.ndarray) -> float:  # 1 - correlation: blind to darker floors
        return 1 - float(np.corrcoef(picture.ravel(), recorded.ravel())[0, 1])

    best = min(MOVES, key=lambda name: apart(MOVES[name](here)))
    least = apart(MOVES[best](here))
    return best if least < 0.2 and least < apart(here) / 2 else ""


def is_darker_in_places(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether what clearly differs is darker in a, in every channel, while other bright parts stay.

    So look floors whose texture is decoded from sRGB; a weaker light would darken all that is bright.
    """
    difference = a - b
    clear = np.abs(difference).max(-1) > CLEAR  # (S, S)
    bright = b.max(-1) > 40
    if clear.mean() < 0.002 or clear[bright].mean() > 0.98:
        return False
    return bool((difference[clear] <= 0).all(-1).mean() > 0.9)


# ---------------------------------------------------------------- one recording


@dataclass(frozen=True)
class Replay:
    """How far a replay lies from its recording at its worst step, and with what it was drawn."""

    sim_state: float
    state: float
    picture: float  # mean absolute difference, of 255
    pictures: int = 0  # compared
    has_states: bool = True  # else only a picture was recorded
    success_differs: bool = False
    differences: tuple[str, ...] = ()  # of the worst picture drawn while states agree, by `diagnose`
    recorded_mujoco: str = ""
    drawn_by: dict[str, str] = field(default_factory=dict)
    srgb_textures: int | None = None  # None: this MuJoCo knows no such mark

    def physics_ok(self) -> bool:
        """NaN counts as a difference."""
        return self.sim_state <= 1e-6 and self.state <= 1e-5 and not self.success_differs

    def agrees(self, picture_tolerance: float) -> bool:
        """Tell whether states, success and pictures are the recorded ones."""
        return self.physics_ok() and self.picture <= picture_tolerance


META = {"suite": str, **dict.fromkeys(("px", "env_seed", "task_id", "init_state_id"), int)}


def replay(folder: Path, texture_colorspace: str = "as_installed", tolerance: float = TOLERANCE) -> Replay:
    """Replay one recorded episode here. Raises OSError, KeyError or ValueError for a broken recording."""
    run = read_run(folder)
    meta = read_json(folder / "meta.json", META, "record it again")
    config = SimConfig(
        suite=meta["suite"],
        size=meta["px"],
        seed=meta["env_seed"],
        texture_colorspace=texture_colorspace,
    )
    env = LiberoEnv(config, meta["task_id"])
    worst, pictures, success_differs = np.zeros(3), 0, False
    differences: tuple[float, tuple[str, ...]] = (0.0, ())
    state, success = env.reset(meta["init_state_id"]), False
    for step in range(len(run["actions"]) + 1 if run else 1):
        if step:
            state, success = env.step(run["actions"][step - 1])
        if run:
            success_differs |= success != bool(run["is_success"][step])
            states = (env.sim_state(), run["sim_state"][step]), (state, run["state"][step])
            worst[:2] = np.maximum(worst[:2], [largest(*pair) for pair in states])  # keeps NaN
        for camera, known in recorded_pictures(folder, step):
            here = env.draw(camera)
            mean = float(np.abs(here - known).mean()) if here.shape == known.shape else float("inf")
            worst[2], pictures = max(worst[2], mean), pictures + 1
            if worst[0] <= VISIBLE and mean > max(tolerance, differences[0]):
                differences = (mean, diagnose(here, known, tolerance))
    found = Replay(
        *map(float, worst),
        pictures,
        bool(run),
        bool(success_differs),
        differences[1],
        str(meta.get("mujoco", "")),
        env.drawn_by(),
        env.srgb_textures,
    )
    env.close()
    return found


def read_run(folder: Path) -> dict[str, np.ndarray]:
    """Read a recording's actions and states; empty where it is a picture alone.

    Raises Refused where it is neither.
    """
    names = ("actions", "state", "sim_state", "is_success")
    if (folder / "run.npz").exists():
        with np.load(folder / "run.npz") as arrays:
            return {name: arrays[name] for name in names}
    if not any((folder / f"step00_{name}.png").exists() for name in ("image", "image2")):
        raise Refused("neither run.npz nor step00_image.png is there")
    return {}


def recorded_pictures(folder: Path, step: int) -> Iterator[tuple[str, np.ndarray]]:
    """Give (camera, picture (S, S, 3)) of those that were recorded after so many actions."""
    from PIL import Image

    for camera, name in zip(CAMERAS, ("image", "image2"), strict=True):
        path = folder / f"step{step:02d}_{name}.png"
        if path.exists():
            try:
                yield camera, np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)
            except (SyntaxError, Image.DecompressionBombError) as error:
                raise OSError(f"{path.name} is no picture of that size: {error}") from error


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest absolute difference; infinity for other shapes."""
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


# ---------------------------------------------------------------- all recordings, in words


def find_recordings(folders: Sequence[Path]) -> list[Path]:
    """List the recordings that these folders are or hold. Raises Refused where one holds none."""
    cases = []
    for folder in folders:
        found = sorted(path.parent for path in [*folder.glob("meta.json"), *folder.glob("*/meta.json")])
        if not found:
            raise Refused(
                f"{folder} holds no recorded episodes: pass a folder that has meta.json and run.npz, "
                "or whose subfolders do"
            )
        cases += found
    return cases


def verify(
    folders: Sequence[Path], picture_tolerance: float = TOLERANCE, texture_colorspace: str = "as_installed"
) -> bool:
    """Replay all recordings, print a line each and what their differences mean; return if all agree.

    Raises Refused if there are none or one is broken, and where this MuJoCo cannot simulate or
    nothing can draw.
    """
    cases = find_recordings(folders)
    check_gl(setup_gl())
    print("installed: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    found = []
    for case in cases:
        found.append(replay_apart(case, picture_tolerance, texture_colorspace))
        if len(found) == 1:
            print(describe_drawing(found[0].drawn_by))
        print(line_of(case.name, found[-1], picture_tolerance), flush=True)
    print("\n".join(advise(found, picture_tolerance, texture_colorspace)))
    return all(one.agrees(picture_tolerance) for one in found)


def replay_apart(case: Path, tolerance: float, texture_colorspace: str) -> Replay:
    """Replay in a fresh process, and say in one line what went wrong if it did not get to its end."""
    one = functools.partial(replay, texture_colorspace=texture_colorspace, tolerance=tolerance)
    try:
        return in_fresh_process(one, case)
    except (*NO_ARRAY, KeyError) as error:
        raise Refused(f"{case} is no complete recording: {error}: copy it anew") from error
    except (TypeError, AttributeError) as error:
        installed = versions()
        if installed["mujoco"] == MUJOCO_VERSION and installed["robosuite"] == "1.4.0":
            raise
        raise Refused(
            f"MuJoCo {installed['mujoco']} does not run under robosuite {installed['robosuite']} "
            f"({str(error).splitlines()[0].rstrip(':')}): {PIN}"
        ) from error


def describe_drawing(gl: dict[str, str]) -> str:
    """Say what draws here."""
    library = f"; {gl['library']}" if gl["library"] else ""
    return f"drawn by: {gl['renderer']}, {gl['vendor']}, OpenGL {gl['version']}{library}"


def line_of(name: str, found: Replay, tolerance: float) -> str:
    """Lay a recording's differences out in a row of the table."""
    picture = f"picture {found.picture:6.3f} ({found.pictures})"
    verdict = "ok" if found.agrees(tolerance) else "DIFFERS"
    if found.differences:
        verdict += ": " + ", ".join(found.differences)
    if not found.has_states:
        return f"{name:<40} {'no states recorded':<34}{picture}{'':18}{verdict}"
    success = "differs" if found.success_differs else "same"
    states = f"sim_state {found.sim_state:.1e}  state {found.state:.1e}"
    return f"{name:<40} {states}  {picture}  success {success:<7}  {verdict}"


def advise(found: list[Replay], tolerance: float, texture_colorspace: str) -> list[str]:
    """Say in a sentence or two each what differs, what that does to results, what to install or set."""
    out = []
    if all(one.agrees(tolerance) for one in found):
        out = ["All recordings replay: results from here compare with those of the recording environment."]
    out += explain_motion([one for one in found if not one.physics_ok()])
    for one in found:
        out += [explain_picture(name, one) for name in one.differences]
    out += explain_textures(found, texture_colorspace)
    return list(dict.fromkeys(out))


def explain_motion(found: list[Replay]) -> list[str]:
    """Say what states that differ do to results, and what newer versions of MuJoCo move differently."""
    now, out = versions(), []
    pin = f"{PIN} (now {now['mujoco']}, {now['robosuite']})"
    if found and all(max(one.sim_state, one.state) <= VISIBLE and not one.success_differs for one in found):
        most = max(one.sim_state for one in found)
        out.append(
            f"Simulated states differ a little (by up to {most:.1e}) and contacts amplify that: single "
            f"episodes may end otherwise, so pair results only with others from here; or {pin}."
        )
    elif found:
        out.append(
            "Robot and objects move differently here, so success rates will not compare with those of the "
            f"recording environment: {pin}."
        )
    if tuple(map(int, now["mujoco"].split(".")[:2])) >= (3, 4):
        out.append(
            f"MuJoCo from 3.4 on (now {now['mujoco']}) also changes the physics of libero_spatial task 5, "
            f"whether or not these recordings show it: {pin}."
        )
    return out


def explain_textures(found: list[Replay], texture_colorspace: str) -> list[str]:
    """Say what this MuJoCo makes of textures marked sRGB, which not every scene shows."""
    if all(one.srgb_textures is None for one in found):
        if texture_colorspace == "as_installed":
            return []
        return [
            f"--texture-colorspace linear changes nothing here: MuJoCo {versions()['mujoco']} knows no "
            "colour space of textures and draws them as the demonstrations were drawn."
        ]
    if not any(one.srgb_textures for one in found):
        return []
    if texture_colorspace == "linear":
        return ["Textures marked sRGB were set back to linear: so floors are those of the demonstrations."]
    return [
        "This MuJoCo honours the sRGB marks of textures, as all from 3.3.3 on do: the floor of "
        "libero_object falls from brightness 151 to 109 of 255, other floors alike. A policy sees other "
        "pictures than it was trained on; users report 98 % -> 91 % for one policy between versions. Draw as "
        f"the demonstrations were drawn with --texture-colorspace linear, or {PIN}."
    ]


def explain_picture(difference: str, found: Replay) -> str:
    """Say what one difference that `diagnose` names does, and what to do."""
    now = versions()
    recorder = found.recorded_mujoco or "not named in meta.json"
    if difference in MOVES:
        return (
            f"Pictures from here match a recording only when changed ({difference}), so a policy trained on "
            "those is lost here: env.py turns MuJoCo's raw pictures once by 180 degrees, as public data sets "
            "do; do the same where the recording was made."
        )
    return {
        "size": "Pictures have another size than meta.json's px: record them at that size.",
        "blank here": (
            "Pictures are blank here, so a policy would act blindly: a GL library without its driver draws "
            "nothing, and two environments in one process blank each other's: set MUJOCO_GL=osmesa (now "
            f"{now['gl']}), or {APT_LINE}."
        ),
        "blank recording": (
            "A recorded picture is blank: nothing was drawn where it was made, and a policy there acted "
            "blindly: record anew with one environment a process, or with MUJOCO_GL=osmesa."
        ),
        "darker here": (
            f"Floors are darker here (MuJoCo {now['mujoco']}) than in a recording (MuJoCo {recorder})"
            + ("." if found.srgb_textures else ", but not by sRGB marks: another light or renderer.")
        ),
        "darker recording": (
            f"A recording has darker floors (MuJoCo {recorder}) than are drawn here (MuJoCo "
            f"{now['mujoco']}): it was drawn by MuJoCo 3.3.3 or later, which honours sRGB marks of textures. "
            "Policies met other pictures there than the public demonstrations hold: record anew with "
            f"mujoco=={MUJOCO_VERSION} or --texture-colorspace linear; to repeat its figures install its "
            "version here."
        ),
        "another renderer": (
            "Small differences all over the pictures: another renderer is at work (a GPU's driver, another "
            f"Mesa): set MUJOCO_GL=osmesa (now {now['gl']}) to draw in software as the recording was, or "
            f"accept a GPU's pictures with --picture-tolerance {GPU_TOLERANCE:g}."
        ),
        "another scene": (
            "Pictures differ by more than a renderer explains: another seed, init state, camera, light, or "
            f"other assets (now {now['libero']}): compare meta.json with how the recording was made."
        ),
    }[difference]


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    command = type_in(Command, __doc__, ("folders", "picture_tolerance"), "python -m simulator verify", args)
    with told():
        agree = verify(command.folders, command.picture_tolerance, command.texture_colorspace)
    sys.exit(0 if agree else 1)
