"""Environments in processes. The slow one needs the simulator."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from simulator import env as sim
from simulator import pool

CASES = Path(__file__).resolve().parents[1] / "libero_env"
FRONT, WRIST = sim.CAMERAS


def recorded_actions(case: str) -> np.ndarray:
    with np.load(CASES / case / "run.npz") as arrays:
        return arrays["actions"]


def test_a_pool_of_none_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        pool.EnvPool(0, sim.SimConfig())


# ---------------------------------------------------------------- with the simulator


def direct_states(_: object) -> tuple[list[np.ndarray], list[np.ndarray]]:
    actions = recorded_actions("libero_goal_task1_init0")[:8]
    env = sim.LiberoEnv(sim.SimConfig("libero_goal", size=64), 1)
    states = [env.reset(0)]
    view, start = env.view(), env.draw(FRONT)
    states += [env.step(action)[0] for action in actions]
    assert np.array_equal(env.draw(FRONT, view), start)  # an earlier moment is drawn as it was
    assert not np.array_equal(env.draw(FRONT), start)
    return states, [env.draw(FRONT), env.draw(WRIST)]


@pytest.mark.slow
def test_the_pool_gives_what_one_environment_gives_and_survives_dead_and_hung_processes():
    states, pictures = pool.in_fresh_process(direct_states, None)
    actions = recorded_actions("libero_goal_task1_init0")[:8]
    with pool.EnvPool(1, sim.SimConfig("libero_goal", size=64, max_steps=8)) as envs:
        assert envs.ready(0) == []
        envs.reset(0, 4, 2, cameras=())  # another task first: the process rebuilds its environment
        [(_, first)] = envs.ready()
        envs.reset(0, 1, 0)
        [(_, start)] = envs.ready()
        assert first.language != start.language and not first.frames
        assert set(start.frames) == {(0, FRONT), (0, WRIST)} and np.array_equal(start.state, states[0])
        envs.run(0, actions[:7], [(7, FRONT), (7, WRIST)])
        [(i, middle)] = envs.ready(60)
        assert (i, middle.steps, middle.done) == (0, 7, False) and np.array_equal(middle.state, states[7])
        assert middle.frames[7, FRONT].shape == (64, 64, 3) and middle.drawing_seconds > 0
        envs.run(0, actions[5:], [(1, FRONT), (3, FRONT)], last=(WRIST,))  # one step is left
        [(_, end)] = envs.ready()
        assert end.done and not end.success and end.steps == 8 and set(end.frames) == {(1, WRIST)}
        os.kill(envs._workers[0][0].pid, signal.SIGKILL)
        envs.run(0, actions)
        with pytest.raises(pool.SimCrash, match="libero_goal task 1 init state 0") as crash:
            envs.ready()
        assert crash.value.env == 0
        envs.reset(0, 1, 0)
        [(_, again)] = envs.ready()
        envs.hang_after = 1.5
        os.kill(envs._workers[0][0].pid, signal.SIGSTOP)
        envs.run(0, actions)
        with pytest.raises(pool.SimCrash, match=r"no answer within 1\.5 s"):
            envs.ready()
        assert envs._workers[0] is None and envs.ready(0) == []
    assert np.array_equal(again.frames[0, FRONT], start.frames[0, FRONT])
    assert pictures[0].shape == (64, 64, 3)
