"""Our control step against robosuite's own: states, forces, observations and success, to the bit."""

import numpy as np
import pytest

from simulator import env as sim
from simulator import pool

COMPUTED = ("time", "qpos", "qvel", "qacc", "qacc_warmstart", "ctrl", "qfrc_constraint", "sensordata")


def actions_of(seed: int) -> np.ndarray:
    """Return actions (40, 7): down to the objects first, then anything, beyond the limits too."""
    actions = np.random.default_rng(seed).uniform(-1.3, 1.3, (40, 7))
    actions[:15, :3] = [0.3, 0.0, -0.9]
    actions[3, 3:6] = 0  # without a rotation the controller keeps its goal
    return actions


def trace(env: sim.LiberoEnv, own: bool, seed: int) -> np.ndarray:
    """Return what an episode's steps leave in MuJoCo, in observations and for drawing (40, .)."""
    observables = {name: env.raw._observables[name] for name in sim.READ}
    for observable in observables.values():
        observable.set_enabled(not own)
    env.reset(seed, seed)
    rows = []
    for action in actions_of(seed):
        success = env.step(action)[1] if own else env.env.step(action)[2]
        read = env.obs if own else {n: o._current_observed_value for n, o in observables.items()}
        arrays = [
            *(getattr(env.data, name) for name in (*COMPUTED, *sim.DRAWN)),
            *env._drawn,
            *read.values(),
            success,
        ]
        rows.append(np.concatenate([np.ravel(array) for array in arrays]))
    return np.stack(rows)


def both(case: tuple[str, int, str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the traces of robosuite's step and of ours, of two episodes in one environment."""
    suite, task_id, reset = case
    env = sim.LiberoEnv(sim.SimConfig(suite, size=16, reset=reset, displace=0.06), task_id)
    return [(trace(env, False, seed), trace(env, True, seed)) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [("libero_object", 1, "soft"), ("libero_goal", 7, "hard"), ("libero_spatial", 4, "soft")]
)
def test_our_step_is_robosuites_to_the_bit(case):
    for robosuites, ours in pool.in_fresh_process(both, case):
        assert np.array_equal(robosuites, ours)
        assert len(np.unique(ours[:, 0])) == 40 and np.ptp(ours, axis=0).max() > 0.1  # it moves
