"""A closed gate changes nothing and still learns; an open one does what it says."""

from __future__ import annotations

import pytest
import tiny
import torch

from fusion import Fusion, FusionConfig, GatedCrossAttention, Late, Sizes

SIZES = Sizes(expert=48, trunk=64, layers=2, memory=tiny.LATENT, steps=tiny.FUTURE)


def branch() -> GatedCrossAttention:
    torch.manual_seed(0)
    return Late(FusionConfig(), SIZES)


def hidden(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 6, 48, generator=torch.Generator().manual_seed(5))


def test_a_closed_gate_leaves_the_policy_unchanged_to_the_bit_in_training():
    plain, arm = tiny.policy(), tiny.arm()
    inputs, (noise, time), world = tiny.inputs(), tiny.flow(draws=2), tiny.world()
    want = plain(inputs, noise, time)
    out = arm(inputs, world, noise, time)["action"]
    assert torch.equal(out, want)


def test_a_closed_gate_has_a_gradient_and_opens():
    arm = tiny.arm()
    arm(tiny.inputs(), tiny.world(), *tiny.flow())["action"].mean().backward()
    gate = arm.policy.fusion.sites["late"].gate
    assert gate.grad.abs() > 1e-6
    torch.optim.SGD([gate], lr=1.0).step()
    assert arm.policy.fusion.gates()["world_gate"] != 0.0


def test_a_gate_that_was_closed_in_an_evaluation_learns_again_afterwards():
    arm = tiny.arm().eval()
    assert arm.policy.fusion.open == ()
    for training in (False, True):
        arm.train(training).zero_grad()
        arm(tiny.inputs(), tiny.world(), *tiny.flow())["action"].mean().backward()
        assert arm.policy.fusion.sites["late"].gate.grad.abs() > 1e-6


def test_without_gradients_a_closed_gate_is_skipped_and_needs_no_memory():
    arm = tiny.arm().eval()
    plain, (noise, _) = tiny.policy().eval(), tiny.flow()
    want = plain.predict_chunk(tiny.inputs(), noise[:, 0])
    for memory in (None, torch.full((2, tiny.FUTURE, tiny.LATENT), float("nan"))):
        assert torch.equal(arm.policy.predict_chunk(tiny.inputs(), noise[:, 0], memory), want)
    assert arm.policy.fusion.open == ()


def test_an_open_gate_acts_in_training_and_at_every_denoising_step():
    arm = tiny.arm()
    tiny.open_gates(arm)
    arm.eval()
    assert arm.policy.fusion.open == ("late",)
    inputs, (noise, time), world = tiny.inputs(), tiny.flow(), tiny.world()
    assert (arm(inputs, world, noise, time)["action"] - tiny.policy()(inputs, noise, time)).abs().max() > 1e-3
    calls = []
    arm.policy.fusion.sites["late"].register_forward_hook(lambda *_: calls.append(1))
    chunk = arm.act(inputs, noise[:, 0], "pred", world)
    assert len(calls) == tiny.CONFIG.num_steps
    assert (chunk - tiny.policy().predict_chunk(inputs, noise[:, 0])).abs().max() > 1e-3


def test_mode_off_bypasses_an_open_gate_to_the_bit():
    arm = tiny.arm()
    tiny.open_gates(arm)
    arm.eval()
    noise = tiny.flow()[0][:, 0]
    assert torch.equal(
        arm.act(tiny.inputs(), noise, "off"), tiny.policy().eval().predict_chunk(tiny.inputs(), noise)
    )


def test_zero_memory_is_not_off():
    arm = tiny.arm()
    tiny.open_gates(arm)
    arm.eval()
    noise = tiny.flow()[0][:, 0]
    assert not torch.equal(arm.act(tiny.inputs(), noise, "zero"), arm.act(tiny.inputs(), noise, "off"))


def test_the_order_of_the_steps_matters():
    site, h = branch(), hidden()
    tiny.open_gates(site)
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    a, b = (site(h, site.prepare(m)) for m in (memory, memory.flip(1)))
    assert (a - b).abs().max() > 1e-4


def test_hypotheses_of_one_step_may_change_places():
    site, h = branch(), hidden()
    tiny.open_gates(site)
    memory = torch.randn(2, 3, tiny.FUTURE, tiny.LATENT)
    a, b = (site(h, site.prepare(m.flatten(1, 2))) for m in (memory, memory.flip(1)))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_contributes_nothing_to_its_sample_and_leaves_the_others(bad):
    site, h = branch(), hidden().requires_grad_()
    tiny.open_gates(site)
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    broken = memory.clone()
    broken[0, 1, 3] = bad
    broken.requires_grad_()
    out = site(h, site.prepare(broken))
    out.square().sum().backward()
    torch.testing.assert_close(out[1], site(h, site.prepare(memory))[1])
    assert out.isfinite().all() and h.grad.isfinite().all()
    assert broken.grad.isfinite().all() and broken.grad[0, 1].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in site.parameters())


def test_a_sample_without_any_finite_row_is_left_alone():
    site, h = branch(), hidden().requires_grad_()
    tiny.open_gates(site)
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    memory[0] = float("nan")
    out = site(h, site.prepare(memory))
    out.sum().backward()
    assert torch.equal(out[0], h[0])
    assert h.grad.isfinite().all() and all(p.grad.isfinite().all() for p in site.parameters())


def test_bad_choices_are_refused_in_one_line():
    with pytest.raises(ValueError, match="--fusion nowhere is unknown: choose from late"):
        Fusion(("nowhere",), FusionConfig(), SIZES)
    with pytest.raises(ValueError, match="--heads 7 does not divide the fused width 48"):
        Late(FusionConfig(heads=7), SIZES)
    arm = tiny.arm()
    with pytest.raises(ValueError, match="memory has width 5"):
        arm.policy.fusion.prepare(torch.zeros(1, tiny.FUTURE, 5))
