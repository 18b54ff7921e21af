"""Does this machine's simulator replay recorded episodes? `python sim.py verify` asks here.

Each recorded episode is replayed in a fresh process; simulator states, policy states, pictures and success
are compared step by step, and the verdict says in plain words what to install where they differ.

    python sim.py verify                       # the recorded episodes in tests/libero_env
    python sim.py verify path/to/recordings    # any folder of that layout

A recording is a folder with meta.json, run.npz (actions, states, success) and stepNN_image[2].png.
"""

import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from pool import in_fresh_process
from render import setup_gl
from sim import CAMERAS, MUJOCO_VERSION, LiberoEnv, SimConfig, versions


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
