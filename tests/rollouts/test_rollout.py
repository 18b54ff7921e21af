"""Rollouts: what is drawn, and what stays or changes from episode to episode."""

from __future__ import annotations

import os
import signal

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_arm import processor
from tiny import run_config

from eval import EvalConfig, first_look
from files import Refused
from prophet import METHODS
from rollouts.plan import make_plans
from rollouts.rollout import Episode, Rollout, frame_plan
from simulator.pool import EnvPool


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_the_frames_that_are_drawn_are_those_that_decisions_read(n, history, stride, clip):
    drawn = {0} | {m * n + k for m in range(8) for k in frame_plan(n, history, stride, clip)}
    back = {j * stride + i for j in range(history) for i in range(clip)}
    read = {max(0, m * n - b) for m in range(1, 8) for b in back}
    assert read <= drawn
    last = 7 * n  # further decisions read what lies beyond
    needed = {m * n - b for m in range(1, 60) for b in back} | {m * n for m in range(60)}
    assert {step for step in drawn if step <= last} <= needed | {0}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.chance])
def test_a_hypothesis_stays_what_it_is_for_an_episode_and_is_another_in_the_next(method):
    arm = tiny.arm(num_hypotheses=3, hypothesis_method=method, **METHODS[method].settings)
    [plan] = make_plans(EvalConfig(episodes_per_task=2), run_config(), arm)
    rollout = Rollout(arm, processor(), plan, "pred", None, torch.device("cpu"))
    here, later, there = Episode(1, 3, "pred"), Episode(1, 3, "pred", decisions=5), Episode(1, 4, "pred")
    noise, world = rollout.draw([here, later, there])
    assert torch.equal(world["chance"][0], world["chance"][1]) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(world["chance"][0], world["chance"][2])
    alone = rollout.draw([there])
    assert torch.equal(alone[1]["chance"][0], world["chance"][2]) and torch.equal(alone[0][0], noise[2])


@pytest.mark.slow
def test_a_simulator_that_dies_once_is_tried_again_and_one_that_dies_twice_is_a_crash(monkeypatch):
    arm = tiny.arm().eval().requires_grad_(False)
    [plan] = make_plans(EvalConfig(episodes_per_task=2, max_steps="4"), run_config(), arm)
    deaths = {3: 2, 4: 1}  # init state -> how many more times its process dies

    class Deadly(EnvPool):
        def run(self, i, *args, **kwargs):
            init_state = self._episodes[i][1]
            if deaths[init_state]:
                deaths[init_state] -= 1
                os.kill(self._workers[i][0].pid, signal.SIGKILL)
            super().run(i, *args, **kwargs)

    with Deadly(1, plan.sim) as pool:
        rollout = Rollout(arm, processor(), plan, "pred", pool, torch.device("cpu"))
        ended = {e.init_state: (last, crash) for e, last, crash in rollout.run(plan.starts)}
    assert deaths == {3: 0, 4: 0}
    assert ended[3][0] is None and "libero_object task 1 init state 3" in ended[3][1]
    assert ended[4][1] is None and ended[4][0].done and ended[4][0].steps == 4


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_simulator_that_dies_before_the_first_episode_gets_its_second_try(deaths):
    arm = tiny.arm().eval().requires_grad_(False)
    [plan] = make_plans(EvalConfig(episodes_per_task=1, max_steps="4"), run_config(), arm)
    left = [deaths]

    class Deadly(EnvPool):
        def reset(self, i, *args, **kwargs):
            super().reset(i, *args, **kwargs)
            if left[0]:
                left[0] -= 1
                os.kill(self._workers[i][0].pid, signal.SIGKILL)

    with Deadly(1, plan.sim) as pool:
        rollout = Rollout(arm, processor(), plan, "pred", pool, torch.device("cpu"))
        if deaths == 1:
            assert first_look(rollout).frames
        else:
            with pytest.raises(Refused, match="died with exit code -9"):
                first_look(rollout)
