"""The prophet knows the order of time, its loss is bounded, and every memory mode is what it says."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prophet import (
    MODES,
    NEEDS,
    ROLLOUT_MODES,
    MemoryMode,
    One,
    ProphetConfig,
    absolute,
    change_target,
    counted_steps,
    gate_scale,
    make_memory,
    parse_mode,
    signs,
    world_loss,
)


def prophet() -> One:
    torch.manual_seed(0)
    return One(ProphetConfig(tiny.HISTORY, tiny.FUTURE), tiny.LATENT)


def test_permuting_the_history_changes_the_future():
    z = torch.randn(2, tiny.HISTORY, tiny.LATENT)
    a, b = prophet()(z).y, prophet()(z.flip(1)).y
    assert a.shape == (2, 1, tiny.FUTURE, tiny.LATENT)
    assert (a - b).abs().max() > 1e-3


def test_future_steps_differ_and_samples_do_not_mix():
    z = torch.randn(3, tiny.HISTORY, tiny.LATENT)
    out = prophet()(z).y
    assert (out[:, 0, 0] - out[:, 0, 1]).abs().max() > 1e-3
    torch.testing.assert_close(prophet()(z[:1]).y, out[:1], atol=1e-5, rtol=1e-5)


def test_memory_is_absolute_whatever_is_predicted():
    world = tiny.world()
    for delta in (True, False):
        target = change_target(world["z_hist"], world["z_future"], delta)
        torch.testing.assert_close(absolute(target[:, None], world["z_hist"], delta)[:, 0], world["z_future"])


def test_each_mode_is_what_it_says():
    world, futures = tiny.world(), torch.randn(2, 2, tiny.FUTURE, tiny.LATENT)
    like = torch.zeros(2, tiny.LATENT)
    make = lambda mode, **more: make_memory(mode, tiny.FUTURE, like=like, hypotheses=2, **more)  # noqa: E731
    assert make("off") is None
    assert make("zero").shape == (2, 2 * tiny.FUTURE, tiny.LATENT) and make("zero").abs().max() == 0
    current = make("current", z_hist=world["z_hist"])
    assert all(torch.equal(row, world["z_hist"][:, -1]) for row in current.unbind(1))
    for mode in ("pred", "shuffle"):
        memory = make(mode, futures=futures)
        assert torch.equal(memory[:, tiny.FUTURE + 1], futures[:, 1, 1])  # flat index n*K + k
    assert torch.equal(make("oracle", z_future=world["z_future"])[:, tiny.FUTURE :], world["z_future"])
    noise = torch.randn(2, 2 * tiny.FUTURE, tiny.LATENT)
    assert torch.equal(make("random", noise=noise), noise)
    mean = torch.randn(tiny.FUTURE, tiny.LATENT)
    assert torch.equal(make("mean", mean=mean), mean.repeat(2, 1).expand(2, -1, -1))


def test_history_repeats_the_oldest_latent_and_keeps_time_order():
    past, like = tiny.world()["z_hist"], torch.zeros(2, tiny.LATENT)
    memory = make_memory("history", 5, like=like, z_hist=past)
    assert torch.equal(memory, past[:, [0, 0, 0, 1, 2]])
    assert torch.equal(make_memory("history", 2, like=like, z_hist=past), past[:, 1:])  # the newest


def test_signflip_turns_half_of_the_variance_of_every_future_and_always_the_same():
    futures, like = torch.randn(2, 3, tiny.FUTURE, tiny.LATENT), torch.zeros(2, tiny.LATENT)
    given = {"like": like, "futures": futures, "spread": torch.linspace(2, 0.1, tiny.LATENT)}
    plain, flipped = (make_memory(m, tiny.FUTURE, **given) for m in ("pred", "signflip"))
    sign = (flipped / plain)[0, 0].round()
    assert torch.equal(flipped, plain * sign) and torch.equal(signs(given["spread"]), sign)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(16, 128))
def test_a_flipped_memorys_expected_cosine_with_the_plain_one_is_zero(seed, width):
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 0.05, width) * (0.5 + torch.rand(width, generator=g))
    variance = spread.square()
    assert abs((signs(spread) * variance).sum() / variance.sum()) < 0.05


def test_unknown_modes_and_a_missing_prophet_are_errors():
    with pytest.raises(ValueError, match="memory mode 'prophecy' is unknown: choose from off, pred"):
        make_memory("prophecy", 4, like=torch.zeros(1, 2))
    for mode, needs in NEEDS.items():
        if needs:
            with pytest.raises(ValueError, match=f"'{mode}' needs {needs[0]}"):
                make_memory(mode, 4, like=torch.zeros(1, 2))
    assert set(MODES) - set(ROLLOUT_MODES) == {"oracle"}
    assert set(MODES) - set(get_args(MemoryMode)) == {"stale"}


@pytest.mark.parametrize(("name", "scale"), [("gate:0.5", 0.5), ("gate:0", 0.0), ("gate:12", 12.0)])
def test_a_gates_strength_is_a_mode_like_any_other(name, scale):
    assert gate_scale(name) == scale and parse_mode(name, 1, own="zero") == ("zero", name)
    for bad in ("gate:", "gate:-1", "gate:x", "gate:1e9", "gates:1"):
        assert gate_scale(bad) is None
        with pytest.raises(ValueError, match="is unknown"):
            parse_mode(bad, 1)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.floats(0.05, 20))
def test_the_loss_is_zero_at_the_truth_and_bounded(seed, size):
    g = torch.Generator().manual_seed(seed)
    target = size * torch.randn(3, tiny.FUTURE, tiny.LATENT, generator=g)
    guess = torch.randn(3, 2, tiny.FUTURE, tiny.LATENT, generator=g)
    valid, scale = torch.ones(3, tiny.FUTURE, dtype=torch.bool), torch.full((tiny.FUTURE,), size * 4.0)
    exact, counted, cosine = world_loss(target[:, None], target, valid, scale, 0.1)
    torch.testing.assert_close(exact, torch.zeros(3, 1), atol=1e-5, rtol=0)
    assert counted.all() and (cosine > 0.999).all()
    loss, _, cosine = world_loss(guess, target, valid, scale, 0.0)
    assert ((loss >= 0) & (loss <= 2)).all()
    torch.testing.assert_close(loss, 1 - cosine)


def test_clamped_and_still_futures_count_nothing_and_stay_finite():
    target = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    target[0, 2:] = 0.0  # clamped at the end
    target[1] = 0.0  # still all along
    valid = torch.tensor([[True, True, False, False], [True] * 4])
    guess = torch.zeros(2, 1, tiny.FUTURE, tiny.LATENT, requires_grad=True)
    loss, counted, _ = world_loss(guess, target, valid, torch.ones(tiny.FUTURE), 0.1)
    loss.sum().backward()
    assert counted.tolist() == [True, False]
    assert loss.isfinite().all() and loss[1].item() == 0.0
    assert (
        guess.grad.isfinite().all()
        and guess.grad[1].abs().max() == 0
        and guess.grad[0, 0, 2:].abs().max() == 0
    )


def test_a_nan_beyond_the_end_is_never_read():
    target = torch.randn(1, tiny.FUTURE, tiny.LATENT)
    broken = target.clone()
    broken[0, -1] = float("nan")
    valid = torch.tensor([[True, True, True, False]])
    guess = torch.randn(1, 1, tiny.FUTURE, tiny.LATENT, requires_grad=True)
    losses = [world_loss(guess, t, valid, torch.ones(tiny.FUTURE), 0.1)[0] for t in (target, broken)]
    assert torch.equal(*losses)
    losses[1].sum().backward()
    assert guess.grad.isfinite().all()


def test_the_length_term_pulls_the_scale_and_the_cosine_does_not():
    target, valid = torch.randn(1, tiny.FUTURE, tiny.LATENT), torch.ones(1, tiny.FUTURE, dtype=torch.bool)
    plain, with_length = (
        [world_loss(f * target[:, None], target, valid, torch.ones(4), mag)[0].item() for f in (1, 5)]
        for mag in (0.0, 0.1)
    )
    assert math.isclose(*plain, abs_tol=1e-5)
    assert with_length[1] > with_length[0] + 0.05


def test_a_change_shorter_than_a_hundredth_of_the_usual_does_not_count():
    target = torch.zeros(1, 2, 3)
    target[0, :, 0] = torch.tensor([0.5, 1.5])
    assert counted_steps(target, torch.ones(1, 2, dtype=torch.bool), torch.full((2,), 100.0)).tolist() == [
        [False, True]
    ]
