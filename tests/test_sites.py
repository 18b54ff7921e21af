"""Every site in the whole policy: no harm while closed, learning from there, and what it says when open."""

from __future__ import annotations

import dataclasses

import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusion
from fusion import SITES, GatedCrossAttention, PrefixTokens, token_rows
from model import SmolVLA, prefix_inputs

VARIANTS = {
    "/".join([name, *fields.values()]): {"fusion": (name,)} | fields
    for name, site in SITES.items()
    for fields in site.variants
}
ALL = {"fusion": tuple(SITES)}  # at once
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_arm(variant: str, config=tiny.CONFIG, memory: str = "pred", **fields):
    """An arm with one site, or all, freshly initialised."""
    fields = {"prefix_tokens": tiny.FUTURE, "heads": 2} | (VARIANTS | {"all": ALL})[variant] | fields
    return tiny.arm(memory, policy_config=config, **fields)


class EachLayer(GatedCrossAttention):
    """A site that no arm has yet: behind each of the expert's layers."""

    name, gate_name, at = "each_layer", "world_gate_each_layer", "layer"


@st.composite
def situations(draw):
    """A policy's layer pattern, a batch with its own prompt lengths, masks and padding, and memory."""
    layers, expert_layers, every = draw(
        st.sampled_from([(2, 2, 2), (3, 3, 0), (2, 2, 1), (4, 2, 0), (4, 2, 4), (3, 1, 0), (4, 4, 3)])
    )
    heads, kv = draw(st.sampled_from([(2, 1), (2, 2), (4, 2)]))
    batch = draw(st.integers(1, 3))
    config = dataclasses.replace(
        tiny.CONFIG, layers=layers, expert_layers=expert_layers, self_attn_every_n_layers=every, heads=heads,
        kv_heads=kv, head_dim=draw(st.sampled_from([16, 32])), prefix_length=draw(st.sampled_from([-1, 50])),
        chunk_size=draw(st.integers(3, 6)), image_special_ids=draw(st.sampled_from([(), (7, 9)])),
    )  # fmt: skip
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    lengths = torch.randint(1, 6, (batch,), generator=g)
    inputs = {
        "images": [torch.rand(batch, 3, 32, 32, generator=g) for _ in config.cameras],
        "image_masks": [None, torch.rand(batch, generator=g) > 0.3],
        "tokens": torch.randint(config.vocab_size, (batch, 5), generator=g),
        "token_mask": torch.arange(5) < lengths[:, None],
        "state": torch.randn(batch, config.state_dim, generator=g),
        "action": torch.randn(batch, config.chunk_size, config.action_dim, generator=g),
        "is_pad": torch.zeros(batch, config.chunk_size, dtype=torch.bool),
    }
    noise = torch.randn(batch, 2, config.chunk_size, config.max_action_dim, generator=g)
    memory = torch.randn(batch, tiny.FUTURE, tiny.LATENT, generator=g)
    return config, inputs, noise, torch.rand(batch, 2, generator=g) * 0.9 + 0.05, memory


PROPERTY = settings(max_examples=12)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- do no harm ---------------------------------------------------------------------------------------


@each_variant
@PROPERTY
@given(situations())
def test_without_memory_or_with_a_closed_gate_a_rollout_is_plain_smolvla_to_the_bit(variant, situation):
    config, inputs, noise, _, memory = situation
    plain = tiny.policy(config).eval().predict_chunk(inputs, noise[:, 0])
    arm = make_arm(variant, config).eval()
    assert torch.equal(arm.policy.predict_chunk(inputs, noise[:, 0], memory), plain)  # closed
    tiny.open_gates(arm)
    arm.eval()
    assert torch.equal(arm.policy.predict_chunk(inputs, noise[:, 0], None), plain)  # mode off
    assert not torch.equal(arm.policy.predict_chunk(inputs, noise[:, 0], memory), plain)


@each_variant
@PROPERTY
@given(situations())
def test_a_closed_gate_leaves_training_as_it_is_and_has_a_gradient(variant, situation):
    config, inputs, noise, time, memory = situation
    plain, arm = tiny.policy(config), make_arm(variant, config)
    want, got = plain(inputs, noise, time), arm.policy(inputs, noise, time, memory)
    if variant.startswith(PrefixTokens.name):  # its rows change the shapes of matrices, hence last bits
        torch.testing.assert_close(got, want, **CLOSE)
    else:
        assert torch.equal(got, want)
    want.mean().backward()
    got.mean().backward()
    (gate,) = (p for n, p in arm.named_parameters() if n.endswith(".gate"))
    assert gate.grad.abs() > 1e-7
    for (name, p), (_, q) in zip(plain.named_parameters(), named_policy(arm)):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=name)


def named_policy(arm):
    return [(n, p) for n, p in arm.policy.named_parameters() if not n.startswith("fusion.")]


@each_variant
@pytest.mark.parametrize("freeze", ["expert", "vision", "none"])
def test_every_parameter_that_trains_gets_a_gradient_whatever_is_frozen(variant, freeze):
    arm = make_arm(variant)
    arm.policy.freeze(freeze)
    arm.policy.fusion.requires_grad_(True)
    tiny.open_gates(arm)
    out = arm(tiny.inputs(), tiny.world(), *tiny.flow())
    (out["action"].mean() + out["world"].mean()).backward()
    assert [n for n, p in arm.named_parameters() if p.requires_grad and p.grad is None] == []


# ---- what an open gate does ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*VARIANTS, "all"])
@PROPERTY
@given(situations())
def test_the_cached_policy_equals_one_joint_pass_over_all_tokens(variant, situation):
    config, inputs, noise, time, memory = situation
    arm = make_arm(variant, config)
    tiny.open_gates(arm)
    policy = arm.policy
    embs, mask, early = policy.embed_prefix(*prefix_inputs(inputs))
    cache = policy.fusion.prepare(memory)
    prefix = policy.prefix(embs, mask, early, cache)
    got = policy.velocity(noise[:, 0], time[:, 0], prefix, cache)
    want = reference.velocity(policy, embs, mask, early, noise[:, 0], time[:, 0], memory)
    torch.testing.assert_close(got, want, **CLOSE)
    both = policy.velocity(
        noise.flatten(0, 1), time.flatten(), prefix.repeat(2), policy.fusion.repeat(cache, 2)
    )
    torch.testing.assert_close(both[::2], want, **CLOSE)


@pytest.mark.parametrize("block", ["prefix", "state"])
@PROPERTY
@given(situations())
def test_a_gate_of_one_is_plain_insertion_of_the_tokens(block, situation):
    config, inputs, noise, time, memory = situation
    arm = make_arm(f"{PrefixTokens.name}/{block}", config)
    tiny.open_gates(arm, 20.0)  # tanh is 1
    embs, mask, early = arm.policy.embed_prefix(*prefix_inputs(inputs))
    want = reference.velocity(arm.policy, embs, mask, early, noise[:, 0], time[:, 0], memory, gated=False)
    cache = arm.policy.fusion.prepare(memory)
    got = arm.policy.velocity(noise[:, 0], time[:, 0], arm.policy.prefix(embs, mask, early, cache), cache)
    torch.testing.assert_close(got, want, **CLOSE)


@each_variant
def test_the_order_of_the_imagined_steps_matters(variant):
    arm = make_arm(variant)
    tiny.open_gates(arm)
    inputs, noise = tiny.inputs(), tiny.flow()[0][:, 0]
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    a, b = (arm.policy.predict_chunk(inputs, noise, m) for m in (memory, memory.flip(1)))
    assert (a - b).abs().max() > 1e-4


@each_variant
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_of_memory_changes_no_other_sample_in_value_or_gradient(variant, bad):
    inputs, (noise, time) = tiny.inputs(), tiny.flow()
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    one, all_rows = memory.clone(), memory.clone()
    one[0, 1, 3], all_rows[0] = bad, bad
    out, grads = {}, {}
    for name, given_memory in (("good", memory), ("one", one), ("all", all_rows), ("off", None)):
        arm = make_arm(variant)
        tiny.open_gates(arm)
        loss = arm.policy(inputs, noise, time, given_memory)
        loss[1].mean().backward()
        out[name] = loss.detach()
        grads[name] = [p.grad for _, p in arm.policy.named_parameters() if p.grad is not None]
    for name in ("one", "all"):
        torch.testing.assert_close(out[name][1], out["good"][1], **CLOSE)
        assert out[name].isfinite().all()
        for p, q in zip(grads[name], grads["good"]):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out["all"][0], out["off"][0], **CLOSE)
    assert (out["one"][0] - out["off"][0]).abs().max() > 1e-5


# ---- prefix tokens ------------------------------------------------------------------------------------


def trunk_with_world(policy: SmolVLA, inputs: dict, memory: torch.Tensor):
    """Hidden states of the prefix after the trunk, without and with world tokens, and what went in."""
    embs, mask, early = policy.embed_prefix(*prefix_inputs(inputs))
    seen = []
    hook = policy.text.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    world = policy.fusion.world_tokens(policy.fusion.prepare(memory))
    plain, _ = policy.trunk(embs, mask, early, policy.config.layers)
    fused, _ = policy.trunk(embs, mask, early, policy.config.layers, world)
    hook.remove()
    return embs, mask, plain, fused, seen


@pytest.mark.parametrize("block", ["prefix", "state"])
def test_world_tokens_move_nothing_of_the_prefix(block):
    arm = make_arm(f"{PrefixTokens.name}/{block}")
    tiny.open_gates(arm)
    inputs = tiny.inputs()
    embs, mask, plain, fused, seen = trunk_with_world(
        arm.policy, inputs, torch.randn(2, tiny.FUTURE, tiny.LATENT)
    )
    (x0, rope0, *_), (x1, rope1, *_) = seen
    length = embs.shape[1]
    assert torch.equal(x0, x1[:, :length]) and torch.equal(x0, embs)  # the state token among them
    assert all(torch.equal(a, b[:, :, :length]) for a, b in zip(rope0, rope1))  # positions
    early = mask.sum(1) - 1
    own = torch.arange(tiny.FUTURE) + early[:, None]
    want = torch.cos(own[:, None, :, None].float())  # the first frequency is 1
    torch.testing.assert_close(rope1[0][:, :, length:, :1], want)
    moved = (fused[:, :length] - plain).abs().amax(-1)
    assert (moved[:, -1] > 1e-4).all()  # the state sees them
    assert (moved[:, :-1].max() < 1e-5) == (block == "state")  # images and language only in their own block


@pytest.mark.parametrize("block", ["prefix", "state"])
def test_a_sample_does_not_depend_on_how_long_the_others_prompts_are(block):
    arm = make_arm(f"{PrefixTokens.name}/{block}")
    tiny.open_gates(arm)
    arm.eval()
    inputs, noise = tiny.inputs(), tiny.flow()[0][:, 0]
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    alone = {
        k: v[:1] if isinstance(v, torch.Tensor) else [x if x is None else x[:1] for x in v]
        for k, v in inputs.items()
    }
    a = arm.policy.predict_chunk(inputs, noise, memory)
    b = arm.policy.predict_chunk(alone, noise[:1], memory[:1])
    wider = inputs | {
        "tokens": torch.nn.functional.pad(inputs["tokens"], (0, 7)),
        "token_mask": torch.nn.functional.pad(inputs["token_mask"], (0, 7)),
    }
    c = arm.policy.predict_chunk(wider, noise, memory)
    torch.testing.assert_close(a[:1], b, **CLOSE)
    torch.testing.assert_close(a, c, **CLOSE)


def test_fewer_tokens_than_rows_are_taken_evenly_with_the_last_step():
    assert token_rows(8, 1, 8) == list(range(8))
    assert token_rows(2, 1, 8) == [3, 7]
    assert token_rows(3, 1, 8) == [2, 5, 7]
    assert token_rows(4, 2, 8) == [3, 7, 11, 15]
    for count, hypotheses in ((3, 2), (9, 1), (0, 1)):
        with pytest.raises(ValueError, match=f"--prefix-tokens {count} must be a multiple of {hypotheses}"):
            token_rows(count, hypotheses, 8)


def test_only_the_chosen_rows_of_memory_matter_to_world_tokens():
    arm = make_arm(f"{PrefixTokens.name}/prefix", prefix_tokens=2)
    tiny.open_gates(arm)
    inputs, noise = tiny.inputs(), tiny.flow()[0][:, 0]
    memory = torch.randn(2, tiny.FUTURE, tiny.LATENT)
    others = memory.clone()
    others[:, [0, 2]] += 1.0  # of 4 steps the 2nd and the 4th are taken
    a, b = (arm.policy.predict_chunk(inputs, noise, m) for m in (memory, others))
    assert torch.equal(a, b)


# ---- learning -----------------------------------------------------------------------------------------


TOY = dataclasses.replace(
    tiny.CONFIG, layers=2, expert_layers=2, width=32, mlp=48, heads=2, kv_heads=1, head_dim=16,
    expert_width=32, vision_width=16, vision_mlp=16, image_size=16, patch_size=8, chunk_size=2,
    n_action_steps=2, num_steps=2,
)  # fmt: skip


@pytest.mark.slow
@each_variant
def test_a_task_that_only_memory_can_solve_opens_the_gate_and_is_solved_in_300_steps(variant):
    arm = make_arm(variant, TOY, memory="oracle", lambda_world=0.0)
    arm.policy.freeze("none")
    g, batch = torch.Generator().manual_seed(0), 16
    inputs = tiny.inputs(2, TOY)
    inputs = {
        "images": [torch.zeros(1, 3, 16, 16) for _ in TOY.cameras], "image_masks": [None, None],
        "tokens": inputs["tokens"][:1].expand(batch, -1),
        "token_mask": torch.ones(batch, 5, dtype=torch.bool),
        "state": torch.zeros(batch, TOY.state_dim), "is_pad": torch.zeros(batch, 2, dtype=torch.bool),
    }  # fmt: skip
    pattern = torch.randn(tiny.FUTURE, tiny.LATENT, generator=g)

    def losses(mode: str, draws: int = 1) -> torch.Tensor:
        side = torch.randint(2, (batch,), generator=g) * 2.0 - 1.0  # the imagined future says which way to go
        action = side[:, None, None].expand(-1, 2, TOY.action_dim)
        world = {"z_future": side[:, None, None] * pattern}
        noise, time = tiny.flow(batch, draws, TOY, seed=int(torch.randint(10**6, (1,), generator=g)))
        memory = arm.memory(mode, arm.like(noise), world)
        return arm.policy(inputs | {"action": action}, noise, time, memory).mean()

    optimizer = torch.optim.AdamW([p for p in arm.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        losses("oracle").backward()
        optimizer.step()
    (strength,) = arm.policy.fusion.gates().values()
    assert abs(strength) > 0.01
    with torch.no_grad():
        with_memory, without = losses("oracle", 16).item(), losses("off", 16).item()
    assert with_memory < 0.5 * without, (with_memory, without)


# ---- compiled -----------------------------------------------------------------------------------------


@pytest.mark.slow
@each_variant
def test_training_and_inference_compile_whole(variant):
    arm = make_arm(variant)
    tiny.open_gates(arm)
    args = tiny.inputs(), tiny.world(), *tiny.flow()
    compiled = torch.compile(arm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args)["action"], arm(*args)["action"])
    arm.eval()
    memory, noise = torch.randn(2, tiny.FUTURE, tiny.LATENT), tiny.flow()[0][:, 0]
    predict = torch.compile(arm.policy.predict_chunk, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        predict(tiny.inputs(), noise, memory), arm.policy.predict_chunk(tiny.inputs(), noise, memory)
    )
    torch._dynamo.reset()


# ---- a site that is new -------------------------------------------------------------------------------


@pytest.fixture
def each_layer(monkeypatch):
    monkeypatch.setitem(SITES, EachLayer.name, EachLayer)
    monkeypatch.setitem(VARIANTS, EachLayer.name, {"fusion": (EachLayer.name,)})
    return EachLayer.name


@pytest.mark.slow
def test_a_site_may_act_behind_each_layer_of_the_expert(each_layer):
    for test in (
        test_without_memory_or_with_a_closed_gate_a_rollout_is_plain_smolvla_to_the_bit,
        test_a_closed_gate_leaves_training_as_it_is_and_has_a_gradient,
        test_the_cached_policy_equals_one_joint_pass_over_all_tokens,
    ):
        test(each_layer)
    test_a_bad_row_of_memory_changes_no_other_sample_in_value_or_gradient(each_layer, float("nan"))
    test_training_and_inference_compile_whole(each_layer)
    arm, calls = make_arm(each_layer), []
    arm.policy.fusion.sites[each_layer].register_forward_hook(lambda _, args, out: calls.append(args[2]))
    arm(tiny.inputs(), tiny.world(), *tiny.flow())
    assert calls == list(range(tiny.CONFIG.expert_layers)) and len(calls) > 1


def test_under_bfloat16_a_site_between_layers_computes_in_float32_and_closed_changes_no_bit(each_layer):
    plain, arm, seen = tiny.arm(fusion=("none",)), make_arm(each_layer), []
    arm.policy.fusion.sites[each_layer].register_forward_hook(lambda _, args, h: seen.append(h.dtype))
    for x in (plain, arm):
        x.policy.set_dtype(torch.bfloat16)  # held in float32, cast as it is used
    want, got = (x(tiny.inputs(), tiny.world(), *tiny.flow())["action"] for x in (plain, arm))
    assert torch.equal(got, want) and set(seen) == {torch.float32}


def test_two_sites_of_tokens_are_refused(monkeypatch):
    monkeypatch.setitem(SITES, "more", type("More", (PrefixTokens,), {"name": "more"}))
    with pytest.raises(ValueError, match="--fusion prefix_tokens more: one site alone may add tokens"):
        tiny.arm(fusion=(PrefixTokens.name, "more"), prefix_tokens=tiny.FUTURE)


def test_sites_have_names_gates_and_places_of_their_own():
    assert all(site.at in fusion.POINTS and site.width in fusion.Sizes._fields for site in SITES.values())
    gates = [site.gate_name for site in SITES.values()]
    assert len(set(gates)) == len(gates) and all(name.startswith("world_gate") for name in gates)
