"""LIBERO's protocol and policy states. The slow one needs the simulator."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from simulator import env as sim
from simulator import pool, render, verify

CASES = Path(__file__).resolve().parents[1] / "libero_env"
FRONT, _ = sim.CAMERAS


def test_importing_the_simulator_loads_neither_mujoco_nor_torch():
    heavy = "{'mujoco', 'torch', 'libero', 'robosuite'}"
    code = "import sys\nfor name in ('control', 'render', 'env', 'pool', 'verify'):\n"
    code += f"    __import__('simulator.' + name)\n    assert not {heavy} & set(sys.modules), name"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_axis_angle_is_not_wrapped_and_equals_the_recorded_states():
    for case in sorted(CASES.iterdir()):
        with np.load(case / "run.npz") as arrays:
            raw, states = arrays["raw"], arrays["state"]
        for row, state in zip(raw, states, strict=True):
            obs = {"robot0_eef_pos": row[:3], "robot0_eef_quat": row[3:7], "robot0_gripper_qpos": row[7:9]}
            np.testing.assert_allclose(sim.state_vector(obs), state, atol=1e-5)
    over = sim.axis_angle(np.array([np.sqrt(0.75), 0, 0, -0.5]))
    np.testing.assert_allclose(
        over, [4 * np.pi / 3, 0, 0], atol=1e-6
    )  # past pi, where scipy would say -2 pi / 3


def test_state_vector_is_float32_and_finite_for_the_identity():
    obs = {
        "robot0_eef_pos": np.ones(3),
        "robot0_eef_quat": np.array([0, 0, 0, 1.0]),
        "robot0_gripper_qpos": np.ones(2),
    }
    state = sim.state_vector(obs)
    assert state.dtype == np.float32 and state.tolist() == [1, 1, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sim.SimConfig(suite="libero_spacial"), "libero_spatial"),
        (lambda: sim.SimConfig(displace=6), "--displace 0.06"),
        (lambda: sim.SimConfig(draw="pretty"), "exact, no-reflections, fast"),
        (lambda: sim.SimConfig(texture_colorspace="srgb"), "--texture-colorspace .* as_installed, linear"),
        (lambda: sim.SimConfig(max_steps=0), "--max-steps"),
        (lambda: sim.check_task("libero_goal", 10), "0..9"),
        (lambda: sim.check_init_state(50), "0..49"),
        (lambda: sim.check_camera("front"), "observation.images.image2"),
    ],
)
def test_mistakes_are_named_in_one_line_with_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_record_of_a_configuration_is_json_with_versions():
    record = json.loads(json.dumps(sim.SimConfig("libero_10", displace=0.06, draw="no-reflections").record()))
    assert record["max_steps"] == 520 and record["displace"] == 0.06 and "mujoco" in record["versions"]
    assert record["draw"] == "no-reflections" and record["texture_colorspace"] == "as_installed"


# ---------------------------------------------------------------- with the simulator


REUSED = {  # resets, drawing, and the init states that ran in the same environment before
    "hard": ("hard", "exact", ()),
    "hard, later": ("hard", "fast", (4,)),
    "soft": ("soft", "fast", ()),
    "soft, later": ("soft", "fast", (3, 4)),
}


def soft_and_hard(task_id: int) -> dict[str, np.ndarray]:
    """Return an episode's simulator states, in fresh and in reused environments."""
    actions = np.random.default_rng(0).uniform(-1, 1, (25, 7))
    traces = {}
    for name, (reset, draw, before) in REUSED.items():
        config = sim.SimConfig("libero_object", size=64, draw=draw, reset=reset, displace=0.06)
        env = sim.LiberoEnv(config, task_id)
        for init_state in before:
            env.reset(init_state)
            env.draw(FRONT)
            for action in actions[::-1]:
                env.step(action)
        env.reset(5, 1)
        trace = [env.sim_state()]
        for action in actions:
            env.step(action)
            trace.append(env.sim_state())
        traces[name] = np.stack(trace)
        check_pictures(env)
        env.close()
    return traces


def check_pictures(env: sim.LiberoEnv) -> None:
    """Assert that what lies out of sight is left out, where nothing is mirrored, and changes no pixel."""
    for camera, name in sim.CAMERAS.items():
        picture = env.draw(camera)
        groups = env.model.geom_group.copy()
        with mock.patch.object(sim, "out_of_sight", return_value=np.zeros(0, int)) as asked:
            assert np.array_equal(env.draw(camera), picture) and picture.std() > 10
        assert asked.called == (env.config.draw != "exact") and np.array_equal(env.model.geom_group, groups)
        number = env.env.sim.model.camera_name2id(name)
        assert 5 <= len(render.out_of_sight(env.model, env.data, number)) < 60  # of 60 meshes


@pytest.mark.slow
def test_what_ran_before_changes_no_bit_and_soft_resets_hardly_any():
    traces = pool.in_fresh_process(soft_and_hard, 1)
    for reset in ("hard", "soft"):
        assert np.array_equal(traces[reset], traces[f"{reset}, later"])
    assert verify.largest(traces["hard"], traces["soft"]) < 1e-9
