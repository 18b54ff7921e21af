"""LIBERO's protocol, starts, replay and the pool. Slow ones need the simulator."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim

CASES = Path(__file__).parent / "libero_env"
FRONT, WRIST = sim.CAMERAS


def recorded_actions(case: str) -> np.ndarray:
    with np.load(CASES / case / "run.npz") as arrays:
        return arrays["actions"]


def test_importing_sim_loads_neither_mujoco_nor_torch():
    code = "import sys, sim; assert not {'mujoco', 'torch', 'libero', 'robosuite'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(sim.__file__).parent, check=True)


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


@given(st.integers(0, 10**6), st.floats(0.01, 0.1), st.integers(0, 6))
def test_a_displaced_object_is_free_and_near_or_stays(seed, displace, count):
    generator = np.random.default_rng(seed)
    shipped, others = np.zeros(2), generator.uniform(-0.3, 0.3, (count, 2))
    place = sim.free_position(shipped, others, displace, generator)
    assert np.abs(place).max() <= displace
    moved = bool(np.any(place != shipped))
    assert not moved or all(np.linalg.norm(others - place, axis=1) > sim.CLEARANCE)


def test_an_object_with_no_free_place_keeps_the_shipped_one():
    generator = np.random.default_rng(0)
    shipped = np.array([0.1, 0.2])
    assert np.array_equal(sim.free_position(shipped, shipped[None], 0.02, generator), shipped)
    assert np.array_equal(
        sim.free_position(shipped, np.zeros((0, 2)), 0.02, generator, lambda _: False), shipped
    )


def test_decimation_keeps_the_outline_and_drops_collapsed_faces():
    vertices = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    faces = np.random.default_rng(1).integers(0, 500, (900, 3))
    merged, kept = sim.decimated_mesh(vertices, faces, 4)
    assert len(merged) == kept.sum() <= 900 and set(merged.ravel()) <= set(range(500))
    assert all(len(set(face)) == 3 for face in merged.tolist())
    assert np.abs(vertices[merged] - vertices[faces[kept]]).max() <= 2 / 4 + 1e-9  # no vertex leaves its cell


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sim.SimConfig(suite="libero_spacial"), "libero_spatial"),
        (lambda: sim.SimConfig(displace=6), "--displace 0.06"),
        (lambda: sim.SimConfig(draw="pretty"), "exact, fast"),
        (lambda: sim.SimConfig(max_steps=0), "--max-steps"),
        (lambda: sim.check_task("libero_goal", 10), "0..9"),
        (lambda: sim.check_init_state(50), "0..49"),
        (lambda: sim.EnvPool(0, sim.SimConfig()), "at least 1"),
        (lambda: sim.verify(Path("/nonexistent"), 0.5), "no recorded episodes"),
    ],
)
def test_mistakes_are_named_in_one_line_with_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_missing_gl_library_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(sim, "_egl_devices", lambda: 0)
    monkeypatch.setattr(sim.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no library")))
    with pytest.raises(RuntimeError, match="apt-get install libegl1"):
        sim.setup_gl()


def test_a_users_gl_backend_stays(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    assert sim.setup_gl() == "osmesa"


def test_the_record_of_a_configuration_is_json_with_versions():
    record = json.loads(json.dumps(sim.SimConfig(suite="libero_10", displace=0.06).record()))
    assert record["max_steps"] == 520 and record["displace"] == 0.06 and "mujoco" in record["versions"]


# ---------------------------------------------------------------- with the simulator


@pytest.mark.slow
def test_recorded_episodes_replay_and_a_perturbed_one_does_not(tmp_path, capsys):
    assert sim.verify(CASES, 0.5), capsys.readouterr().out
    shutil.copytree(CASES / "libero_goal_task1_init0", tmp_path / "case")
    path = tmp_path / "case" / "run.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["actions"] = changed["actions"].copy()
    changed["actions"][3, 0] += 0.5
    np.savez(path, **changed)
    assert not sim.verify(tmp_path, 0.5)
    assert "DIFFERS" in capsys.readouterr().out


def soft_and_hard(task_id: int) -> float:
    """Replay an episode in a fresh and in reused environments; return the largest difference."""
    actions = np.random.default_rng(0).uniform(-1, 1, (25, 7))
    traces = []
    for reset, draw, before in (("hard", "exact", ()), ("soft", "fast", (3, 4)), ("hard", "fast", (4,))):
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
        traces.append(np.stack(trace))
        env.close()
    return max(sim.largest(traces[0], trace) for trace in traces[1:])


@pytest.mark.slow
def test_soft_resets_and_fast_drawing_leave_the_motion_unchanged():
    assert sim.in_fresh_process(soft_and_hard, 1) < 1e-9


def direct_states(_: object) -> tuple[list[np.ndarray], list[np.ndarray]]:
    actions = recorded_actions("libero_goal_task1_init0")[:8]
    env = sim.LiberoEnv(sim.SimConfig("libero_goal", size=64), 1)
    states = [env.reset(0), *(env.step(action)[0] for action in actions)]
    return states, [env.draw(FRONT), env.draw(WRIST)]


@pytest.mark.slow
def test_the_pool_gives_what_one_environment_gives_and_survives_a_dead_process():
    states, pictures = sim.in_fresh_process(direct_states, None)
    actions = recorded_actions("libero_goal_task1_init0")[:8]
    with sim.EnvPool(1, sim.SimConfig("libero_goal", size=64, max_steps=8)) as pool:
        assert pool.ready(0) == []
        pool.reset(0, 4, 2, cameras=())  # another task first: the process rebuilds its environment
        [(_, first)] = pool.ready()
        pool.reset(0, 1, 0)
        [(_, start)] = pool.ready()
        assert first.language != start.language and not first.frames
        assert set(start.frames) == {(0, FRONT), (0, WRIST)} and np.array_equal(start.state, states[0])
        pool.run(0, actions[:7], [(7, FRONT), (7, WRIST)])
        [(i, middle)] = pool.ready(60)
        assert (i, middle.steps, middle.done) == (0, 7, False) and np.array_equal(middle.state, states[7])
        assert middle.frames[7, FRONT].shape == (64, 64, 3) and middle.drawing_seconds > 0
        pool.run(0, actions[5:], [(3, FRONT)])  # one step is left
        [(_, end)] = pool.ready()
        assert end.done and not end.success and end.steps == 8 and not end.frames
        os.kill(pool._workers[0][0].pid, signal.SIGKILL)
        pool.run(0, actions)
        with pytest.raises(sim.SimCrash, match="libero_goal task 1 init state 0") as crash:
            pool.ready()
        assert crash.value.env == 0
        pool.reset(0, 1, 0)
        [(_, again)] = pool.ready()
    assert np.array_equal(again.frames[0, FRONT], start.frames[0, FRONT])
    assert pictures[0].shape == (64, 64, 3)
