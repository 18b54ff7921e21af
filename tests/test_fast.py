"""Each fast path is an equality: split prefix, bfloat16, tokens, compiled blocks and loop."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from test_arm import processor
from test_sites import CLOSE, PROPERTY, VARIANTS, each_variant, make_arm, situations

from arm import load_arm, save_arm
from fusion import PrefixTokens
from model import prefix_inputs


def frozen_arm(variant: str, config=tiny.CONFIG, freeze: str = "expert"):
    arm = make_arm(variant, config)
    tiny.open_gates(arm)
    arm.policy.freeze(freeze)
    arm.policy.fusion.requires_grad_(True)
    return arm


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# ---- static and live tokens ---------------------------------------------------------------------------


@each_variant
@PROPERTY
@given(situations())
def test_a_split_prefix_gives_the_whole_ones_losses_and_gradients(variant, situation):
    config, inputs, noise, time, memory = situation
    arm, found = frozen_arm(variant, config), []
    for split in (False, True):
        arm.policy.split = split
        arm.zero_grad()
        loss = arm.policy(inputs, noise, time, memory.requires_grad_())
        loss.mean().backward()
        found.append({"loss": loss.detach(), "memory": memory.grad, **gradients(arm.policy)})
        memory.grad = None
    whole, split = found
    assert whole.keys() == split.keys() and "state_proj.weight" in whole
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], msg=name, **CLOSE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("freeze", ["expert", "vision", "none"])
def test_what_is_live_follows_from_the_site_and_from_what_trains(variant, freeze):
    arm = frozen_arm(variant, freeze=freeze)
    cache = arm.policy.fusion.prepare(torch.randn(2, tiny.FUTURE, tiny.LATENT))
    [site] = arm.policy.fusion.sites.values()
    meets = site.at == "prefix" or variant == f"{PrefixTokens.name}/prefix"  # memory, images and language
    assert arm.policy.is_static(cache) == (freeze == "expert" and not meets)
    assert arm.policy.is_static(None) == (freeze == "expert")
    with torch.no_grad():
        assert not arm.policy.is_static(cache)  # one pass is cheaper where no gradient is recorded


def test_no_gradient_is_recorded_for_images_and_language():
    arm, recorded = frozen_arm("late"), []
    layer = arm.policy.text.layers[0]
    layer.register_forward_hook(
        lambda m, args, out: recorded.append((args[0].shape[1], out[0].requires_grad))
    )
    embs, mask, early = arm.policy.embed_prefix(*prefix_inputs(tiny.inputs()))
    arm.policy.prefix(embs, mask, early)
    assert recorded == [(early, False), (embs.shape[1] - early, True)]


# ---- bfloat16 -----------------------------------------------------------------------------------------


def test_what_is_frozen_is_held_in_bfloat16_and_what_trains_in_float32():
    arm = frozen_arm("late")
    arm.policy.set_dtype(torch.bfloat16)
    for name, p in arm.policy.named_parameters():
        held = name.startswith(("vision.", "connector.", "text.", "lm_head."))
        assert p.dtype == (torch.bfloat16 if held else torch.float32), name
    loss = arm(tiny.inputs(), tiny.world(), *tiny.flow())
    loss["action"].mean().backward()
    assert loss["action"].dtype == torch.float32
    assert {g.dtype for g in gradients(arm.policy).values()} == {torch.float32}


@each_variant
@pytest.mark.parametrize("freeze", ["expert", "vision", "none"])
def test_bfloat16_training_is_float32s_but_for_rounding(variant, freeze):
    losses, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        arm = frozen_arm(variant, freeze=freeze)
        arm.policy.set_dtype(dtype)
        loss = arm(tiny.inputs(), tiny.world(), *tiny.flow())["action"]
        loss.mean().backward()
        losses.append(loss.mean().item())
        grads.append(torch.cat([g.flatten() for g in gradients(arm.policy).values()]))
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_action_head_stays_in_float32(variant):
    """Of the chunk's rounding errors none may be the head's: actions would move in steps of 1/256."""
    arm, seen = frozen_arm(variant).requires_grad_(False).eval(), []
    arm.policy.set_dtype(torch.bfloat16)
    arm.policy.action_out_proj.register_forward_hook(
        lambda m, args, out: seen.append((args[0].dtype, out.dtype))
    )
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    chunk = arm.policy.predict_chunk(tiny.inputs(), tiny.flow()[0][:, 0], memory)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert {p.dtype for p in arm.policy.expert.parameters()} == {torch.bfloat16}
    assert not torch.equal(chunk, chunk.bfloat16().float())


def test_float32_casts_nothing():
    policy = tiny.policy()
    policy.set_dtype(torch.float32)
    held = [p.dtype for p in policy.parameters()]
    assert set(held) == {torch.float32}
    assert torch.equal(policy(tiny.inputs(), *tiny.flow()), tiny.policy()(tiny.inputs(), *tiny.flow()))


def test_an_arm_in_bfloat16_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    arm = frozen_arm("late")
    arm.policy.set_dtype(torch.bfloat16)
    save_arm(tmp_path, arm, processor())
    again, _ = load_arm(tmp_path)
    again.policy.freeze("expert")
    again.policy.set_dtype(torch.bfloat16)
    args = tiny.inputs(), tiny.world(), *tiny.flow()
    assert torch.equal(again(*args)["action"], arm(*args)["action"])


# ---- tokens instead of pictures -----------------------------------------------------------------------


def test_tokens_of_an_earlier_call_stand_in_for_pictures():
    policy, inputs = tiny.policy(), tiny.inputs()
    noise, time = tiny.flow()
    tokens = policy.embed_images(inputs["images"])
    want = policy(inputs, noise, time)
    assert torch.equal(policy(inputs | {"images": tokens}, noise, time), want)
    mixed = [inputs["images"][0], tokens[1]]  # at another batch shape of the tower, so not to the bit
    torch.testing.assert_close(policy(inputs | {"images": mixed}, noise, time), want, **CLOSE)


# ---- compiled -----------------------------------------------------------------------------------------


@pytest.mark.slow
@each_variant
def test_compiled_blocks_and_loop_give_the_eager_policys_values(variant):
    torch._dynamo.reset()
    memory, (noise, time) = torch.randn(2, tiny.FUTURE, tiny.LATENT), tiny.flow()
    eager, compiled = frozen_arm(variant).policy, frozen_arm(variant).policy
    compiled.compile_blocks(backend="aot_eager")
    compiled.compile_denoise(backend="eager")
    losses = [policy(tiny.inputs(), noise, time, memory) for policy in (eager, compiled)]
    for loss in losses:
        loss.mean().backward()
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    want = gradients(eager)
    for name, got in gradients(compiled).items():
        torch.testing.assert_close(got, want[name], msg=name, **CLOSE)
    chunks = [p.eval().predict_chunk(tiny.inputs(), noise[:, 0], memory) for p in (eager, compiled)]
    torch.testing.assert_close(chunks[1], chunks[0], **CLOSE)


def test_one_graph_serves_all_blocks_of_a_kind_and_no_step_compiles_again():
    torch._dynamo.reset()
    graphs = []
    policy = tiny.policy()
    policy.freeze("expert")
    policy.compile_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for seed in range(3):
        policy(tiny.inputs(seed=seed), *tiny.flow(seed=seed))
        if seed == 0:
            first = len(graphs)
    # tower; trunk: images and language, then state behind them; expert: self- and cross-attending
    assert first == len(graphs) == 5


@pytest.mark.slow
def test_blocks_and_loop_compile_to_code_that_computes_the_same():
    torch._dynamo.reset()
    eager, compiled = tiny.policy(), tiny.policy()
    (noise, time), inputs = tiny.flow(), tiny.inputs()
    compiled.compile_blocks()
    compiled.compile_denoise()
    torch.testing.assert_close(compiled(inputs, noise, time), eager(inputs, noise, time), **CLOSE)
    chunks = [policy.eval().predict_chunk(inputs, noise[:, 0]) for policy in (eager, compiled)]
    torch.testing.assert_close(chunks[1], chunks[0], **CLOSE)
