"""Strips show what they say where they say it; attention's shares are exact and leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from test_bank import K, N, bank_arm, world

from fusion import SITES, Memory
from rollouts.imagine import (
    GREY,
    LEAST,
    contact_sheet,
    decisions_of,
    decode,
    future_plan,
    nearest_frames,
    save_strips,
    strip,
    strips_of_episode,
)  # fmt: skip
from training.diagnostics import attention_mass, memory_mass, most_attended

each_site = pytest.mark.parametrize("site", SITES)


def opened(method: str, site: str):
    arm = bank_arm(method, (site,))
    tiny.open_gates(arm)
    return arm.eval()


# ---- shares of attention ------------------------------------------------------------------------------


@each_site
def test_shares_sum_to_one_and_do_not_depend_on_the_batch(site):
    arm, noise, made = opened("ensemble", site), tiny.flow()[0][:, 0], world("ensemble")
    mass = attention_mass(arm, tiny.inputs(), made, noise)
    assert mass.shape == (2, N)
    torch.testing.assert_close(mass.sum(1), torch.ones(2))
    first = {
        k: v[:1] if isinstance(v, torch.Tensor) else [x if x is None else x[:1] for x in v]
        for k, v in tiny.inputs().items()
    }
    alone = attention_mass(arm, first, {k: v[:1] for k, v in made.items()}, noise[:1])
    torch.testing.assert_close(mass[:1], alone, atol=1e-5, rtol=1e-4)
    # The second sample's last token is padding; without it nothing else changes.
    second = {
        k: v[1:] if isinstance(v, torch.Tensor) else [x if x is None else x[1:] for x in v]
        for k, v in tiny.inputs().items()
    }
    second |= {k: second[k][:, :-1] for k in ("tokens", "token_mask")}
    alone = attention_mass(arm, second, {k: v[1:] for k, v in made.items()}, noise[1:])
    torch.testing.assert_close(mass[1:], alone, atol=1e-5, rtol=1e-4)


@each_site
def test_alike_hypotheses_share_evenly_odds_decide_and_closed_gates_count_too(site):
    arm, noise = bank_arm("mixture", (site,)).eval(), tiny.flow()[0][:, 0]
    assert arm.policy.fusion.open == ()
    same = torch.randn(2, 1, K, tiny.LATENT).expand(-1, N, -1, -1).flatten(1, 2)
    even = memory_mass(arm, tiny.inputs(), Memory(same), noise)
    torch.testing.assert_close(even, torch.full((2, N), 1 / N), atol=1e-4, rtol=1e-3)
    odds = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    torch.testing.assert_close(
        memory_mass(arm, tiny.inputs(), Memory(same, odds.log()), noise), odds, atol=0.02, rtol=0.05
    )


def test_the_most_attended_hypothesis_is_the_one_that_best1_keeps():
    arm, noise, made = opened("mixture", "late"), tiny.flow()[0][:, 0], world("mixture")
    with torch.no_grad():
        arm.prophet.odds.weight.zero_()
        arm.prophet.odds.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    best = most_attended(arm, tiny.inputs(), made, noise)
    assert best.tolist() == [2, 2]
    rows = arm.memory("best1", arm.like(noise), made, best=best).rows.unflatten(1, (N, K))
    assert rows[:, :2].isnan().all() and rows[:, 2].isfinite().all()
    made["z_hist"] = torch.full_like(made["z_hist"], torch.nan)
    assert most_attended(arm, tiny.inputs(), made, noise).tolist() == [0, 0]


def test_measuring_leaves_the_arm_and_the_generators_as_they_were():
    arm, noise, made = opened("ensemble", "late").train(), tiny.flow()[0][:, 0], world("ensemble")
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in arm.state_dict().items()}
    attention_mass(arm, tiny.inputs(), made, noise)
    assert arm.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in arm.state_dict().items())
    assert attention_mass(tiny.arm(fusion=("none",)), tiny.inputs(), made, noise) is None


# ---- pictures -----------------------------------------------------------------------------------------


def flat(value: int, *shape: int) -> np.ndarray:
    return np.full((*shape, 8, 8, 3), value, np.uint8)


def has(picture: np.ndarray, colour: int | tuple[int, int, int]) -> int:
    """How many cells have this colour; letters' edges have a few pixels of any grey."""
    return int((picture == np.array(colour)).all(-1).sum()) // LEAST**2


def test_every_frame_is_shown_once_and_what_never_came_is_grey():
    imagined = np.stack([flat(50 + 10 * n, 4) for n in range(3)])
    out = strip(flat(10, 2), imagined, flat(20, 3), mass=torch.tensor([0.5, 0.3, 0.2]), stride=4, title="x")
    assert (has(out, 10), has(out, 20), has(out, GREY)) == (2, 3, 1)
    assert [has(out, 50 + 10 * n) for n in range(3)] == [4] * 3
    rows = [np.median(np.argwhere((out == v).all(-1))[:, 0]) for v in (10, 50, 60, 70, 20)]
    assert rows == sorted(rows)  # past, hypotheses in order, then
    assert (out[:, :40] < 128).any()  # labels


def test_a_longer_label_or_share_changes_the_labels_only():
    imagined = flat(50, 2, 3)
    a, b = (strip(flat(10, 2), imagined, None, mass=m) for m in ([0.9, 0.1], [0.1, 0.9]))
    assert a.shape == b.shape and not np.array_equal(a, b)
    assert has(a, 50) == has(b, 50) == 6 and has(a, GREY) == 3


def test_decoded_latents_are_the_shrunk_pictures():
    arm = tiny.arm()
    z = torch.randn(3, tiny.LATENT) * 0.2
    pictures = decode(arm.encoder, z)
    assert pictures.shape == (3, 4, 4, 3) and pictures.dtype == np.uint8
    large = torch.from_numpy(pictures).permute(0, 3, 1, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    again = decode(arm.encoder, arm.encoder.embed(large))
    assert np.abs(again.astype(int) - pictures).max() <= 2  # of 255: rounded twice


def test_without_an_inverse_the_nearest_frames_stand_in():
    latents, frames = torch.eye(4) * 3, np.arange(4, dtype=np.uint8)[:, None, None, None] * flat(1, 4)
    picked = nearest_frames(torch.tensor([[0.0, 2.0, 0, 0], [0, 0, 0, 1.0]]), latents, frames)
    assert picked[:, 0, 0, 0].tolist() == [1, 3]


def test_an_episode_becomes_a_strip_a_decision_and_a_sheet(tmp_path):
    arm, noise, made = opened("ensemble", "late"), tiny.flow()[0][:, 0], world("ensemble")
    decisions = decisions_of(arm, tiny.inputs(), made, noise, "pred", [0, 3])
    assert torch.equal(decisions[1].imagined.flatten(0, 1), arm.memory("pred", arm.like(noise), made).rows[1])
    latents = {step: torch.randn(tiny.LATENT) * 0.1 for step in range(6)}
    strips = strips_of_episode(arm, decisions, latents)
    assert [has(s, GREY) for s in strips] == [0, 2]  # steps 6 and 7 never came
    paths = save_strips(tmp_path / "imagined", "pred-task1-init9", strips)
    assert [p.name for p in paths] == [
        "pred-task1-init9_d000.png", "pred-task1-init9_d001.png", "pred-task1-init9.png",
    ]  # fmt: skip
    assert sorted(paths) == sorted((tmp_path / "imagined").iterdir())
    assert contact_sheet(strips * 9).shape[0] == 6 * (strips[0].shape[0] + 1) - 1
    assert decisions_of(arm, tiny.inputs(), made, noise, "zero", [0]) == []


def test_the_frames_that_strips_show_are_drawn():
    for n, future, stride in ((8, 8, 4), (3, 4, 1), (5, 2, 3)):
        drawn = {d * n + k for d in range(9) for k in (*future_plan(n, future, stride), n)}
        wanted = {d * n + k * stride for d in range(3) for k in range(1, future + 1)}
        assert {w for w in wanted if w <= 9 * n} <= drawn
