"""The action loss on held-out episodes: paired, by episode, and the same whoever asks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from test_source import demos, source  # noqa: F401, a fixture

from prophet import MODES
from training.held_out import bootstrap, measurable, measure, record, spread, table


def open_arm(made):
    tiny.open_gates(made.arm)
    made.arm.mean_future.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_every_mode_is_measured_on_the_same_frames_noise_and_times(demos):  # noqa: F811
    made = open_arm(source(demos, memory="pred"))
    modes = measurable(made.arm, tasks=1)
    assert modes == [mode for mode in MODES if mode not in ("wrong_task", "stale")]
    found = measure(made, np.arange(4), modes, frames=4, draws=2)
    assert len({round(found.mean(mode), 9) for mode in modes}) == len(modes)  # all of them differ
    again = measure(made, np.arange(4), ["off", "pred"], frames=4, draws=2, batch=3)
    for mode in ("off", "pred"):
        np.testing.assert_allclose(found.losses[mode], again.losses[mode], rtol=1e-5)


def test_a_closed_gate_makes_all_modes_one(demos):  # noqa: F811
    found = measure(source(demos, memory="pred"), np.arange(4), ["off", "pred", "oracle"], frames=3)
    assert np.array_equal(found.losses["off"], found.losses["pred"])
    assert found.interval("pred", "off") == (0.0, 0.0)


def test_an_episodes_loss_does_not_depend_on_the_others(demos):  # noqa: F811
    made = open_arm(source(demos, memory="pred"))
    together = measure(made, np.array([1, 3]), ["pred"], frames=5)
    apart = [measure(made, np.array([e]), ["pred"], frames=5).losses["pred"][0] for e in (1, 3)]
    np.testing.assert_allclose(together.losses["pred"], apart, rtol=1e-5)


def test_measuring_leaves_the_arm_as_it_was(demos):  # noqa: F811
    made = source(demos, memory="pred")
    made.arm.train()
    state = torch.get_rng_state()
    before = {name: p.clone() for name, p in made.arm.state_dict().items()}
    measure(made, np.arange(2), ["off", "random"], frames=2)
    assert made.arm.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], p) for name, p in made.arm.state_dict().items())


def test_modes_without_a_prophet_are_left_out():
    without = ["off", "oracle", "zero", "random", "mean", "current", "history"]
    assert measurable(tiny.arm("zero"), tasks=2) == without
    assert "wrong_task" in measurable(tiny.arm("pred"), tasks=2)
    assert measurable(tiny.arm(fusion=("none",)), tasks=2) == ["off"]


def test_frames_are_spread_over_an_episode_and_none_is_taken_twice(demos):  # noqa: F811
    assert spread(demos, 1, 3).tolist() == [9, 20, 32]
    assert spread(demos, 3, 16).tolist() == list(range(45, 50))


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = [low <= 0.0 <= high for low, high in (bootstrap(rng.normal(size=40)) for _ in range(60))]
    assert 50 <= sum(hits) <= 60
    assert bootstrap(np.full(5, 2.0)) == (2.0, 2.0)


def test_table_and_record_say_the_same(demos):  # noqa: F811
    found = measure(open_arm(source(demos, memory="pred")), np.arange(3), ["off", "pred"], frames=2)
    lines, kept = table(found).splitlines(), json.loads(json.dumps(record(found)))
    assert len(lines) == 3 and lines[0].startswith("3 episodes")
    assert f"{kept['modes']['pred']['loss']:8.4f}" in next(line for line in lines if line.startswith("pred"))
    assert kept["modes"]["pred"]["from_off"] == pytest.approx(found.mean("pred") - found.mean("off"))
    assert len(kept["modes"]["off"]["episodes"]) == 3


def test_interventions_on_a_bank_are_measured_beside_its_modes(demos):  # noqa: F811
    made = source(demos, memory="pred")
    made.arm = tiny.arm("pred", num_hypotheses=3, hypothesis_method="ensemble")
    open_arm(made)
    made.arm.mean_future.normal_(generator=torch.Generator().manual_seed(0))
    modes = measurable(made.arm, tasks=1)
    assert modes[-6:] == ["best1", "mean1", "dup", "drop:0", "drop:1", "drop:2"]
    found = measure(made, np.arange(2), modes, frames=2, draws=1)
    assert len({round(found.mean(mode), 7) for mode in modes}) == len(modes)
