"""Recordings replay here, and what differs is named with its side. The slow ones need the simulator."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from files import Refused
from simulator import env as sim
from simulator import pool, verify

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).resolve().parents[1] / "libero_env"
RENDER = Path(__file__).resolve().parents[1] / "render"


def picture(version: str) -> np.ndarray:
    """The same scene, drawn by two versions of MuJoCo."""
    return np.asarray(Image.open(RENDER / f"mujoco-{version}_object0" / "step00_image.png").convert("RGB"))


OLD, NEW = picture("3.3.2"), picture("3.3.7")  # bright and dark floor
WRIST = np.asarray(Image.open(CASES / "libero_goal_task1_init0" / "step10_image2.png").convert("RGB"))


def verified(*folders: Path) -> subprocess.CompletedProcess:
    """Run the program on these recordings, or on its own."""
    command = [sys.executable, "-m", "simulator", "verify", *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True)


def noisy(known: np.ndarray, spread: float) -> np.ndarray:
    """As another renderer's rounding would have it."""
    noise = np.random.default_rng(0).normal(0, spread, known.shape)
    return np.clip(known + noise, 0, 255).round().astype(np.uint8)


# ---------------------------------------------------------------- two pictures


def test_the_darker_floor_is_named_with_its_side():
    assert verify.diagnose(NEW, OLD) == ("darker here",)
    assert verify.diagnose(OLD, NEW) == ("darker recording",)
    assert verify.diagnose(noisy(NEW, 2), OLD) == ("darker here",)
    assert verify.diagnose(OLD, OLD) == verify.diagnose(NEW, NEW) == ()


@pytest.mark.parametrize("known", [OLD, NEW, WRIST])
@pytest.mark.parametrize("name", verify.MOVES)
def test_turned_mirrored_and_swapped_pictures_are_told_apart(name, known):
    back = {"turned by 90 degrees": "turned by 270 degrees", "turned by 270 degrees": "turned by 90 degrees"}
    moved = verify.MOVES[back.get(name, name)](known)  # so that `name` brings it back
    assert verify.diagnose(moved, known) == (name,)
    assert verify.diagnose(noisy(moved, 2), known) == (name, "another renderer")


def test_a_turned_picture_with_a_darker_floor_is_both():
    assert verify.diagnose(NEW[::-1, ::-1], OLD) == ("turned by 180 degrees", "darker here")
    assert verify.diagnose(OLD[:, ::-1], NEW) == ("mirrored left to right", "darker recording")


def test_a_blank_picture_is_named_with_its_side():
    for value in (0, 128):
        blank = np.full_like(OLD, value)
        assert verify.diagnose(blank, OLD) == ("blank here",)
        assert verify.diagnose(OLD, blank) == ("blank recording",)
        assert verify.diagnose(blank, blank) == ()


@pytest.mark.parametrize("known", [OLD, NEW, WRIST])
def test_small_differences_everywhere_are_another_renderers(known):
    assert verify.diagnose(noisy(known, 3), known) == ("another renderer",)
    assert verify.diagnose(noisy(known, 3), known, tolerance=verify.GPU_TOLERANCE) == ()
    assert verify.diagnose(noisy(known, 0.1), known) == ()


def test_a_weaker_light_another_view_and_another_size_are_no_darker_floor():
    assert verify.diagnose((OLD * 0.8).astype(np.uint8), OLD) == ("another scene",)
    assert verify.diagnose(np.roll(OLD, 20, axis=1), OLD) == ("another scene",)
    assert verify.diagnose(WRIST, OLD) == ("another scene",)
    assert verify.diagnose(OLD[::2, ::2], OLD) == ("size",)


# ---------------------------------------------------------------- words


def found(**fields) -> verify.Replay:
    return dataclasses.replace(verify.Replay(0.0, 0.0, 0.0, 4), **fields)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that a version of MuJoCo is installed."""

    def pretend(mujoco: str) -> None:
        known = {"mujoco": mujoco, "robosuite": "1.4.0", "libero": "libero 0.1.1", "gl": "egl"}
        monkeypatch.setattr(verify, "versions", lambda: known)

    return pretend


def words(*one: verify.Replay, texture_colorspace: str = "as_installed") -> str:
    return "\n".join(verify.advise(list(one), 0.5, texture_colorspace))


def test_the_advice_says_which_side_is_darker_and_how_to_draw_as_before(installed):
    installed("3.3.7")
    dark = found(picture=36.0, differences=("darker here",), recorded_mujoco="3.3.2", srgb_textures=2)
    assert "darker here (MuJoCo 3.3.7) than in a recording (MuJoCo 3.3.2)" in words(dark)
    assert "98 % -> 91 %" in words(dark) and "--texture-colorspace linear" in words(dark)
    linear = words(found(srgb_textures=2), texture_colorspace="linear")
    assert "All recordings replay" in linear and "set back to linear" in linear
    installed("3.3.2")
    light = found(picture=36.0, differences=("darker recording",), recorded_mujoco="3.3.7")
    assert "darker floors (MuJoCo 3.3.7) than are drawn here (MuJoCo 3.3.2)" in words(light)
    assert "changes nothing here" in words(found(), texture_colorspace="linear")


def test_darker_floors_are_warned_of_even_where_no_recording_shows_them(installed):
    installed("3.3.3")
    advice = words(found(srgb_textures=1))
    assert "All recordings replay" in advice and "honours the sRGB marks" in advice
    assert "sRGB" not in words(found(srgb_textures=0))


def test_motion_that_differs_is_told_by_how_much_and_from_which_version(installed):
    installed("3.3.7")
    assert "differ a little (by up to 5.6e-05)" in words(found(sim_state=5.6e-5))
    for far in (found(sim_state=2.7), found(sim_state=float("nan")), found(success_differs=True)):
        assert "move differently" in words(far) and "mujoco==3.3.2" in words(far)
    assert "task 5" not in words(found())
    installed("3.17.0")
    assert "task 5" in words(found())


@pytest.mark.parametrize(
    "name", [*verify.MOVES, "size", "blank here", "blank recording", "another renderer", "another scene"]
)
def test_every_difference_between_pictures_has_words_of_its_own(name, installed):
    installed("3.3.2")
    advice = words(found(picture=9.0, differences=(name,)))
    assert advice.count("\n") == 0 and len(advice) > 60 and "All recordings" not in advice


def test_a_mujoco_that_cannot_simulate_is_one_line_with_the_pin(installed, monkeypatch):
    def fail(*_):
        raise TypeError("mj_fullM(): incompatible function arguments. Supported are:\n  1. ...")

    monkeypatch.setattr(verify, "in_fresh_process", fail)
    installed("3.8.1")
    with pytest.raises(Refused, match=r"MuJoCo 3.8.1 does not run .*mujoco==3.3.2") as caught:
        verify.replay_apart(RENDER, 0.5, "as_installed")
    assert "\n" not in str(caught.value)
    installed("3.3.2")
    with pytest.raises(TypeError):  # a defect of ours
        verify.replay_apart(RENDER, 0.5, "as_installed")


# ---------------------------------------------------------------- folders


def test_a_folder_without_recordings_is_named_in_one_line():
    with pytest.raises(ValueError, match="no recorded episodes") as caught:
        verify.verify([Path("/nonexistent")])
    assert "\n" not in str(caught.value)


def test_a_recording_is_found_by_itself_and_among_others():
    one = RENDER / "mujoco-3.3.2_object0"
    assert verify.find_recordings([one]) == [one]
    assert verify.find_recordings([RENDER, CASES]) == [
        *(RENDER / f"mujoco-{v}_object0" for v in ("3.3.2", "3.3.7")),
        *sorted(CASES.iterdir()),
    ]


def test_the_script_finds_its_replay_in_a_child_process_and_names_a_broken_recording_in_one_line(tmp_path):
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "meta.json").write_text("{}")
    done = verified(tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/case is no complete recording: neither run.npz nor step00_image.png is there: "
        "copy it anew\n"
    )


# ---------------------------------------------------------------- with the simulator


@pytest.mark.slow
def test_recordings_replay_and_a_perturbed_or_darker_one_does_not(tmp_path):
    done = verified()
    assert done.returncode == 0 and "drawn by: " in done.stdout, done.stdout
    shutil.copytree(CASES / "libero_goal_task1_init0", tmp_path / "case")
    path = tmp_path / "case" / "run.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["actions"] = changed["actions"].copy()
    changed["actions"][3, 0] += 0.5
    np.savez(path, **changed)
    done = verified(tmp_path, RENDER / "mujoco-3.3.7_object0")
    assert done.returncode == 1
    out = done.stdout
    assert "move differently" in out
    assert "DIFFERS: darker recording" in out and "A recording has darker floors (MuJoCo 3.3.7)" in out


def draw_without_reflections(suite: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw the start after each of two hard resets, then move; return the pictures and the states."""
    actions = np.load(CASES / "success_libero_spatial_task0_init0" / "run.npz")["actions"][:20]
    pictures = []
    config = sim.SimConfig(suite, draw="no-reflections", texture_colorspace="linear")
    env = sim.LiberoEnv(config, 0)
    for _ in range(2):  # the second reset makes another GL context, which reflects unless told again
        env.reset(0)
        pictures.append(env.draw("observation.images.image"))
    states = [env.sim_state()]
    for action in actions:
        env.step(action)
        states.append(env.sim_state())
    env.close()
    return pictures, np.stack(states)


@pytest.mark.slow
def test_without_reflections_motion_is_the_same_and_pictures_nearly():
    pictures, _ = pool.in_fresh_process(draw_without_reflections, "libero_object")
    assert all(np.array_equal(one, OLD) for one in pictures)  # this scene reflects nothing
    pictures, states = pool.in_fresh_process(draw_without_reflections, "libero_spatial")
    case = CASES / "success_libero_spatial_task0_init0"
    with np.load(case / "run.npz") as run:
        assert np.abs(states - run["sim_state"][: len(states)]).max() < 1e-6
    known = np.asarray(Image.open(case / "step00_image.png").convert("RGB"), dtype=np.float64)
    means = [np.abs(one - known).mean() for one in pictures]
    assert means[0] == means[1] and 0.1 < means[0] < 3, means
