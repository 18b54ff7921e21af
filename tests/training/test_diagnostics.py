"""Each number of a log line against its definition, and none of them changes what it measures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from arm import Arm, Summary
from fusion import SITES, GatedCrossAttention, Memory, Site, layer_attention, token_rows
from prophet import change_target
from training.diagnostics import (
    attention_diagnostics,
    attention_mass,
    attention_statistics,
    entropy,
    gradient_norms,
    group_mass,
    matched_control,
    memory_norm,
    nearest_hypothesis,
    pair_distances,
    record,
    world_diagnostics,
)

K, D = tiny.FUTURE, tiny.LATENT
BANK = ("world_cos_best", "oracle_gap", "oracle_gap_excess", "oracle_gap_excess_early", "div_cos")
CROSS = [name for name, site in SITES.items() if issubclass(site, GatedCrossAttention)]
ATTENDING = [name for name, site in SITES.items() if site.attention is not Site.attention]
seeds = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(a: dict[str, float], b: dict[str, float], rel: float = 1e-4) -> bool:
    return a == pytest.approx(b, rel=rel, abs=1e-5)


def made(fusion: tuple[str, ...] = ("late",), config=tiny.CONFIG, memory: str = "pred", **fields) -> Arm:
    """An arm with open gates, on a policy of another shape where one is given."""
    arm = tiny.arm(memory, fusion, **fields)
    if config is not tiny.CONFIG:
        summary = Summary.of(arm.scale, arm.mean_change, arm.partners)
        arm = Arm(arm.config, tiny.policy(config), arm.encoder, summary, {})
    tiny.open_gates(arm)
    return arm


def with_bank(site: str, memory: torch.Tensor) -> Arm:
    """An arm that is handed this memory (B, N, K, D), whatever its mode."""
    arm = made((site,), prefix_tokens=K)
    arm.memory = lambda *_: Memory(memory.flatten(1, 2))
    if SITES[site].at == "tokens":
        arm.policy.fusion.sites[site].rows = token_rows(memory.shape[1] * K, memory.shape[1], K)
    return arm


def attention(arm: Arm, world: dict | None = None, inputs: dict | None = None) -> dict[str, float]:
    inputs = inputs or tiny.inputs()
    noise, time = (x[: len(inputs["state"])] for x in tiny.flow())
    return attention_diagnostics(arm, inputs, world or tiny.world(), noise, time)


def first_sample(batch: dict) -> dict:
    """The batch's first sample alone."""
    cut = lambda x: None if x is None else x[:1]  # noqa: E731
    return {name: [cut(y) for y in x] if isinstance(x, list) else cut(x) for name, x in batch.items()}


# ---- the prophet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [True, False])
def test_perfect_predictions_have_cosine_1_at_every_step(delta):
    arm, world = tiny.arm(delta=delta), tiny.world()
    target = change_target(world["z_hist"], world["z_future"], delta)
    out = world_diagnostics(arm, world, target[:, None])
    assert [out[f"world_cos_k{k}"] for k in (1, 2, 3, 4)] == pytest.approx([1.0] * 4, abs=1e-5)
    assert f"world_cos_k{K + 1}" not in out and "world_cos_k0" not in out
    assert world_diagnostics(arm, world, -target[:, None])["world_cos_k2"] == pytest.approx(-1, abs=1e-5)


def test_baselines_are_what_a_hand_computes():
    e1, e2 = torch.eye(D)[:2]
    past = torch.stack([normal(D), 0 * e1, e1])[None]
    future = e1 + torch.stack([e1, e1 + e2, e2, -e1])[None]  # the last one: at the origin
    world = {
        "z_hist": past,
        "z_future": future,
        "valid": torch.ones(1, K, dtype=torch.bool),
        "early": torch.ones(1) > 0,
    }
    got = {}
    for delta in (True, False):
        arm = tiny.arm(delta=delta)
        arm.mean_change.copy_(torch.stack([e2, e2, e2, -e1]))
        got[delta] = world_diagnostics(arm, world, normal(1, 1, K, D))
    half, fifth = 0.5**0.5, 0.2**0.5
    assert got[True]["world_cos_linear"] == pytest.approx((1 + half + 0 - 1) / 4, abs=1e-6)
    assert got[True]["world_cos_mean_change"] == pytest.approx((0 + half + 1 + 1) / 4, abs=1e-6)
    # as absolute latents the targets are 2 e1, 2 e1 + e2, e1 + e2 and nothing, which does not count
    assert got[False]["world_cos_linear"] == pytest.approx((1 + 2 * fifth + half) / 3, abs=1e-6)
    assert got[False]["world_cos_mean_change"] == pytest.approx((0 + fifth + half) / 3, abs=1e-6)
    assert "world_cos_k4" in got[True] and "world_cos_k4" not in got[False]
    assert got[True]["norm_future"] == pytest.approx((2 + 5**0.5 + 2**0.5 + 0) / 4)
    assert got[True]["norm_history"] == pytest.approx((past[0, 0].norm().item() + 0 + 1) / 3)


def test_linear_extrapolation_is_exact_on_a_line_and_absent_without_a_second_latent():
    start, slope = normal(2, 1, D), normal(2, 1, D, seed=1)
    line = start + torch.arange(tiny.HISTORY + K)[:, None] * slope
    world = tiny.world() | {"z_hist": line[:, : tiny.HISTORY], "z_future": line[:, tiny.HISTORY :]}
    for delta in (True, False):
        arm = tiny.arm(delta=delta)
        out = world_diagnostics(arm, world, normal(2, 1, K, D))
        assert out["world_cos_linear"] == pytest.approx(1, abs=1e-5)
        world_of_one = world | {"z_hist": world["z_hist"][:, -1:]}
        assert "world_cos_linear" not in world_diagnostics(arm, world_of_one, normal(2, 1, K, D))


@pytest.mark.parametrize("garbage", [1e30, float("nan")])
def test_what_does_not_count_changes_nothing(garbage):
    arm, world, predicted = tiny.arm(), tiny.world(), normal(2, 3, K, D)
    world["z_future"][0, 1] = world["z_hist"][0, -1]  # valid, but still
    want = world_diagnostics(arm, world, predicted)
    assert want["world_valid_frac"] == 0.75 and set(BANK) < set(want)
    future, bad = world["z_future"].clone(), predicted.clone()
    future[1, 2:] = garbage
    bad[1, :, 2:] = garbage
    bad[0, :, 1] = garbage
    assert world_diagnostics(arm, world | {"z_future": future}, bad) == want
    bad[0, :, 0] += 1.0  # whereas this one counts
    assert not near(world_diagnostics(arm, world, bad), want)


def test_every_sample_weighs_the_same_whatever_its_number_of_steps():
    arm, world, predicted = tiny.arm(), tiny.world(), normal(2, 3, K, D)
    world["valid"][1, 1:] = False
    alone = [
        world_diagnostics(arm, {n: x[i : i + 1] for n, x in world.items()}, predicted[i : i + 1])
        for i in (0, 1)
    ]
    both = world_diagnostics(arm, world, predicted)
    for name in ("world_cos_linear", "world_cos_mean_change", "world_cos_best", "oracle_gap", "div_cos"):
        assert both[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, abs=1e-5)
    assert both["world_cos_k2"] == pytest.approx(alone[0]["world_cos_k2"], abs=1e-5)
    assert "world_cos_k2" not in alone[1]


def test_where_nothing_counts_cosines_are_absent():
    world = tiny.world() | {"valid": torch.zeros(2, K, dtype=torch.bool)}
    out = world_diagnostics(tiny.arm(), world, normal(2, 3, K, D))
    assert set(out) == {"world_valid_frac", "norm_history"} and out["world_valid_frac"] == 0.0


def test_one_hypothesis_has_no_hypothesis_numbers():
    world = tiny.world()
    steps = {f"world_cos_k{k + 1}" for k in range(K)}
    common = {"world_cos_mean_change", "world_cos_linear", "world_valid_frac", "norm_history", "norm_future"}
    assert set(world_diagnostics(tiny.arm(), world, normal(2, 1, K, D))) == steps | common
    assert set(world_diagnostics(tiny.arm(), world, normal(2, 2, K, D))) == steps | common | set(BANK)


def test_a_right_and_an_opposite_hypothesis_have_the_gap_that_a_hand_computes():
    arm, world = tiny.arm(lambda_mag=0.0), tiny.world()
    target = change_target(world["z_hist"], world["z_future"], True)
    out = world_diagnostics(arm, world, torch.stack([target, -target], dim=1))
    # their mean is no prediction at all: loss 1
    assert out["oracle_gap"] == pytest.approx(1, abs=1e-5)
    assert out["world_cos_best"] == pytest.approx(1, abs=1e-5)
    assert out["div_cos"] == pytest.approx(2, abs=1e-5)
    assert out["world_cos_k1"] == pytest.approx(0, abs=1e-5)
    same = world_diagnostics(arm, world, torch.stack([target, target], dim=1))
    assert [same[name] for name in BANK] == pytest.approx([1, 0, 0, 0, 0], abs=1e-5)


@settings(max_examples=20)
@given(seeds, st.permutations(range(4)))
def test_the_order_of_hypotheses_does_not_matter(seed, order):
    arm, world, predicted = tiny.arm(), tiny.world(), normal(2, 4, K, D, seed=seed)
    a, b = (world_diagnostics(arm, world, x) for x in (predicted, predicted[:, order]))
    assert near(a, b)


@settings(max_examples=20)
@given(seeds, st.integers(2, 5), st.floats(1e-3, 1e3))
def test_the_control_has_the_banks_mean_and_spread(seed, count, size):
    bank = size * normal(3, count, K, D, seed=seed) * torch.linspace(0.1, 3, K)[:, None]
    counted = torch.tensor([[True] * K, [True, False] * (K // 2), [True] + [False] * (K - 1)])
    control = matched_control(bank, counted)
    torch.testing.assert_close(control.mean(1), bank.mean(1), atol=1e-4 * size, rtol=1e-4)
    spread = [
        torch.where(counted, pair_distances(x).mean(-1), 0).sum(1) / counted.sum(1) for x in (bank, control)
    ]
    torch.testing.assert_close(*spread, rtol=1e-4, atol=0)
    assert (control - bank).abs().max() > 0.01 * size


def test_noise_has_a_gap_but_none_in_excess_and_hypotheses_that_hit_different_targets_have_both():
    batch, count = 1000, 4
    arm, mean = tiny.arm(lambda_mag=0.0), normal(batch, 1, K, D)
    target = mean[:, 0] + normal(batch, K, D, seed=1)
    valid = torch.arange(K).expand(batch, -1) < 1  # of one step: luck at many steps evens out
    early = torch.arange(batch) < batch // 2
    world = {
        "z_hist": torch.zeros(batch, tiny.HISTORY, D),
        "z_future": target,
        "valid": valid,
        "early": early,
    }
    noise = world_diagnostics(arm, world, mean + 0.3 * normal(batch, count, K, D, seed=2))
    assert noise["oracle_gap"] > 0.02 and abs(noise["oracle_gap_excess"]) < 0.01
    modes = mean + normal(batch, count - 1, K, D, seed=3)
    hits = world_diagnostics(arm, world, torch.cat([modes, target[:, None]], dim=1))
    assert hits["oracle_gap"] > 0.2 and hits["oracle_gap_excess"] > 0.2
    # Hypotheses that hit in the first half alone show in the early excess whole, in the other by half.
    hits = torch.where(early[:, None, None, None], torch.cat([modes, target[:, None]], dim=1), mean)
    found = world_diagnostics(arm, world, hits)
    assert found["oracle_gap_excess_early"] > 1.5 * found["oracle_gap_excess"] > 0.1


def test_the_control_is_the_same_every_time_and_draws_from_no_global_generator():
    arm, world, predicted = tiny.arm(), tiny.world(), normal(2, 3, K, D).requires_grad_()
    state = torch.get_rng_state()
    a, b = (world_diagnostics(arm, world, predicted) for _ in range(2))
    assert a == b and torch.equal(torch.get_rng_state(), state)


# ---- attention: the numbers ---------------------------------------------------------------------------


@settings(max_examples=50)
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.floats(0.1, 20))
def test_entropy_of_tokens_is_that_of_hypotheses_plus_that_of_steps_within(seed, count, steps, sharpness):
    p = (sharpness * normal(2, 3, 5, count * steps, seed=seed)).softmax(-1)
    mass = group_mass(p, [row // steps for row in range(count * steps)])
    within = p.unflatten(-1, (count, steps)) / mass[..., None]
    torch.testing.assert_close(
        entropy(p), entropy(mass) + (mass * entropy(within)).sum(-1), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3, 5))


@settings(max_examples=50)
@given(seeds, st.integers(2, 4), st.integers(2, 5), st.floats(0.0, 50))
def test_statistics_of_attention_are_bounded(seed, count, steps, sharpness):
    p = (sharpness * normal(2, 3, 5, count * steps, seed=seed)).softmax(-1)
    out = attention_statistics(p, range(count * steps), steps, torch.ones(2, 5, dtype=torch.bool))
    assert set(out) == {"attn_pmax", "attn_entropy", "attn_entropy_step", "attn_entropy_hyp", "spike"}
    assert all(-1e-5 <= value <= 1 + 1e-5 for value in out.values())
    assert out["attn_pmax"] >= 1 / (count * steps) - 1e-5


def test_attention_on_one_token_is_a_spike_without_entropy():
    p = F.one_hot(torch.tensor([[[5, 2], [1, 5]]]), 8).float()  # (1, 2, 2, 8), in each head another one
    out = attention_statistics(p, range(8), 4, torch.ones(1, 2, dtype=torch.bool))
    assert (out.pop("attn_pmax"), out.pop("spike")) == (1.0, 1.0)
    assert set(out.values()) == {0.0}


def test_some_of_the_rows_keep_their_steps_and_hypotheses():
    rows = token_rows(4, 2, 4)
    assert rows == [1, 3, 5, 7]
    p = torch.tensor([0.4, 0.1, 0.4, 0.1]).expand(1, 1, 1, 4)
    out = attention_statistics(p, rows, 4, torch.ones(1, 1, dtype=torch.bool))
    two = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(2)
    assert (out["attn_entropy_step"], out["attn_entropy_hyp"]) == pytest.approx((two, 1.0))
    assert out["spike"] == pytest.approx(0, abs=1e-6)


def test_entropies_over_one_thing_are_absent():
    one = torch.ones(1, dtype=torch.bool)[None]
    names = lambda rows, steps: set(  # noqa: E731
        attention_statistics(torch.full((1, 1, 1, len(rows)), 1 / len(rows)), rows, steps, one)
    )
    assert names([0], 1) == {"attn_pmax"}
    assert names([0, 1], 2) == {"attn_pmax", "attn_entropy", "attn_entropy_step"}
    assert names([0, 1], 1) == {"attn_pmax", "attn_entropy", "attn_entropy_hyp", "spike"}


def test_the_most_attended_hypothesis_is_compared_with_the_nearest():
    future, valid = normal(3, K, D) + 10.0, torch.arange(K) < torch.tensor([K, 1, 0])[:, None]
    memory = future[:, None] + torch.tensor([-3.0, 1.0])[:, None, None]  # the second is nearer
    memory[1, 1, 1:] += 100.0  # where nothing is valid
    index, known = nearest_hypothesis(memory, future, valid)
    assert index[:2].tolist() == [1, 1] and known.tolist() == [True, True, False]

    p = torch.full((3, 1, 2, 2 * K), 0.1 / K)
    p[..., K:] = 0.9 / K
    p[0, :, 1] = F.one_hot(torch.tensor(0), 2 * K)  # a query that does not count
    kept = torch.tensor([[True, False], [True, True], [True, True]])
    choose = lambda x, kept: attention_statistics(x, range(2 * K), K, kept, (index, known))["choose_best"]  # noqa: E731
    assert choose(p, kept) == 1.0
    assert choose(p.flip(-1), kept) == 0.0
    p[1] = p[1].flip(-1)
    assert choose(p, kept) == 0.5
    kept[1] = False
    assert choose(p, kept) == 1.0

    memory[0, 1, 0] = float("nan")
    assert nearest_hypothesis(memory, future, valid)[0][0] == 0
    memory[0] = float("nan")
    assert not nearest_hypothesis(memory, future, valid)[1][0]


# ---- attention: the pass ------------------------------------------------------------------------------

KINDS = ("attn_pmax", "attn_entropy", "attn_entropy_step")


@pytest.mark.parametrize("site", ATTENDING)
def test_each_site_reports_its_numbers_and_no_hypotheses_where_there_is_one(site):
    own = ("ctx_norm", "act_norm") + ("world_mass",) * (SITES[site].at == "tokens")
    out = attention(made((site,), prefix_tokens=K))
    assert set(out) == {f"{site}/{name}" for name in KINDS + own}
    bank = attention(with_bank(site, normal(2, 2, K, D)))
    assert set(bank) == set(out) | {f"{site}/{name}" for name in ("attn_entropy_hyp", "spike", "choose_best")}
    assert all(math.isfinite(value) for value in bank.values())


@pytest.mark.parametrize("site", CROSS)
def test_the_recomputed_context_is_what_the_site_added(site):
    arm, seen = made((site,)), []
    module = arm.policy.fusion.sites[site]
    module.register_forward_hook(lambda _, args, out: seen.append((args[0], out - args[0])))
    out = attention(arm)
    [(h, added)] = seen
    kept = torch.ones(h.shape[:2], dtype=torch.bool)
    if SITES[site].at == "prefix":
        kept[1, -2] = False  # the last sample's last language token is padding; the state comes after it
    mean = lambda x: torch.stack([n[k].mean() for n, k in zip(x.norm(dim=-1), kept)]).mean().item()  # noqa: E731
    assert out[f"{site}/ctx_norm"] == pytest.approx(mean(added), rel=1e-4)
    assert out[f"{site}/act_norm"] == pytest.approx(mean(h), rel=1e-4)
    tiny.open_gates(arm, 0.0)
    closed = attention(arm)
    assert closed.pop(f"{site}/ctx_norm") == 0.0
    assert closed[f"{site}/attn_pmax"] == pytest.approx(out[f"{site}/attn_pmax"], rel=1e-4)


@pytest.mark.parametrize("mode", ["cross_attn", "self_attn"])
def test_recomputed_attention_to_world_tokens_is_what_the_expert_did(mode):
    grouped = dataclasses.replace(tiny.CONFIG, attention_mode=mode, heads=4, kv_heads=2)
    arm = made(("prefix_tokens",), grouped, prefix_tokens=2)
    tiny.open_gates(arm, 20.0)  # tanh is 1: every attention gives the output with world tokens
    fusion, (noise, time), seen = arm.policy.fusion, tiny.flow(), []
    for layer in arm.policy.expert.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    memory = arm.memory("pred", arm.like(noise), tiny.world())
    calls, _ = record(arm.policy, fusion.prepare(memory), tiny.inputs(), noise, time)
    layers = list(arm.policy.expert.layers)
    read = [layer for layer, _ in calls["prefix_tokens"]]
    assert read == [layer for layer in layers if layer.cross == (mode == "cross_attn")] and len(read) > 1
    masses, added = [], []
    for layer, (x, rope, mask, past) in calls["prefix_tokens"]:
        v = past[1]
        if not layer.cross:
            v = torch.cat([v, layer.keys_values(x, rope)[1]], dim=2)
        p = layer_attention(layer, x, rope, mask.shown, past)
        context = (p @ v.repeat_interleave(p.shape[1] // v.shape[1], dim=1)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(context, seen[layers.index(layer)], atol=1e-5, rtol=1e-4)
        q = layer.self_attn.queries(layer.input_layernorm(x), rope)
        k = past[0] if layer.cross else torch.cat([past[0], layer.keys_values(x, rope)[0]], dim=2)
        hidden, shown = (some[:, :, : q.shape[2]] for some in (mask.hidden, mask.shown))  # as of one head
        without = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)
        both = (layer.self_attn.o_proj(c) for c in (context, without.transpose(1, 2).flatten(2)))
        added.append(torch.sub(*both).norm(dim=-1))
        masses.append((p * (shown.isfinite() & ~hidden.isfinite())).sum(-1))  # world tokens
    out = attention(arm)
    assert out["prefix_tokens/world_mass"] == pytest.approx(torch.stack(masses).mean().item(), rel=1e-4)
    assert 0 < out["prefix_tokens/world_mass"] < 1
    assert 0.5 <= out["prefix_tokens/attn_pmax"] < 1
    assert out["prefix_tokens/ctx_norm"] == pytest.approx(torch.stack(added).mean().item(), rel=1e-4)
    assert 0 < out["prefix_tokens/ctx_norm"] < 2 * out["prefix_tokens/act_norm"]


@pytest.mark.parametrize("freeze", ["expert", "none"])
def test_sites_are_measured_in_bfloat16_too(freeze):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        arm = made(tuple(SITES), prefix_tokens=K)
        arm.policy.freeze(freeze)
        arm.policy.set_dtype(dtype)
        found[dtype] = attention(arm)
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.1, abs=0.01)


def test_closed_gates_are_measured_too():
    arm = made(tuple(SITES), prefix_tokens=K)
    tiny.open_gates(arm, 0.0)
    arm.eval()
    assert arm.policy.fusion.open == ()
    out = attention(arm)
    assert {name.split("/")[0] for name in out} == set(SITES)
    assert 0 < out["prefix_tokens/world_mass"] < 1


@pytest.mark.parametrize("site", ATTENDING)
def test_where_nothing_tells_tokens_apart_attention_is_even(site):
    arm = with_bank(site, normal(2, 3, K, D))
    if SITES[site].at == "tokens":  # whose keys also carry positions: without a query they do not speak
        for layer in arm.policy.expert.layers:
            layer.self_attn.q_proj.weight.data.zero_()
    else:
        arm.policy.fusion.sites[site].k_proj.weight.data.zero_()
    out = {name.split("/")[1]: value for name, value in attention(arm).items()}
    for name in ("attn_entropy", "attn_entropy_step", "attn_entropy_hyp"):
        assert out[name] == pytest.approx(1, abs=1e-5)
    assert out["attn_pmax"] == pytest.approx(1 / (3 * K), abs=1e-5)
    assert out["spike"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("site", CROSS)
def test_identical_hypotheses_share_the_mass_equally(site):
    out = attention(with_bank(site, normal(2, 1, K, D).expand(-1, 3, -1, -1)))
    assert out[f"{site}/attn_entropy_hyp"] == pytest.approx(1, abs=1e-5)
    assert out[f"{site}/spike"] == pytest.approx(0, abs=1e-5)
    assert out[f"{site}/attn_entropy_step"] < 1 - 1e-4  # steps differ, so this is no accident


def test_choose_best_follows_the_truth_and_needs_one():
    memory, world = normal(2, 2, K, D), tiny.world()
    arm = with_bank("late", memory)
    best = [attention(arm, world | {"z_future": memory[:, n]})["late/choose_best"] for n in (0, 1)]
    assert sum(best) == 1.0 and set(best) <= {0.0, 0.5, 1.0}
    without = {name: x for name, x in world.items() if name != "z_future"}
    assert "late/choose_best" not in attention(arm, without)
    arm.prophet = None
    assert "late/choose_best" not in attention(arm, world) and "late/spike" in attention(arm, world)


@pytest.mark.parametrize("site", ATTENDING)
def test_a_sample_without_finite_memory_does_not_change_the_others(site):
    arm, world, inputs = made((site,), prefix_tokens=K), tiny.world(), tiny.inputs()
    want = attention(arm, first_sample(world), first_sample(inputs))
    broken = world | {"z_hist": world["z_hist"].clone()}
    broken["z_hist"][1] = float("nan")
    assert near(attention(arm, broken, inputs), want)
    assert not near(attention(arm, world, inputs), want, rel=1e-3)  # a sample that does count
    broken["z_hist"][0] = float("nan")
    assert attention(arm, broken, inputs) == {}


@pytest.mark.parametrize("site", ATTENDING)
def test_one_bad_row_is_not_attended_to(site):
    memory = normal(2, 1, K, D)
    memory[0, 0, 1] = float("inf")
    arm = with_bank(site, memory)
    before = attention(arm)
    memory[0, 0, 1, :] = float("nan")
    assert attention(arm) == before and all(math.isfinite(value) for value in before.values())
    arm.memory = lambda *_: Memory(memory[:1, 0])  # and its sample counts by the others
    assert set(attention(arm, first_sample(tiny.world()), first_sample(tiny.inputs()))) == set(before)


def test_a_site_that_is_called_several_times_is_averaged_and_one_without_attention_has_none(monkeypatch):
    class EachLayer(GatedCrossAttention):
        name, gate_name, at = "each_layer", "world_gate_each_layer", "layer"

    class Shift(Site):
        name, gate_name, at = "shift", "world_gate_shift", "layer"

        def prepare(self, memory):
            return memory.rows.mean((1, 2))

        def branch(self, h, view, layer=0):
            return (layer + 1.0) * view[:, None, None] * h

    for site in (EachLayer, Shift):
        monkeypatch.setitem(SITES, site.name, site)
    out = attention(made(("each_layer",)))
    assert set(out) == {f"each_layer/{name}" for name in (*KINDS, "ctx_norm", "act_norm")}
    arm, seen = made(("each_layer",)), []
    arm.policy.fusion.sites["each_layer"].register_forward_hook(lambda *a: seen.append((a[1], a[2])))
    assert attention(arm) == out and len(seen) == tiny.CONFIG.expert_layers > 1
    added = [(h_out - h).norm(dim=-1).mean() for (h, *_), h_out in seen]
    assert out["each_layer/ctx_norm"] == pytest.approx(torch.stack(added).mean().item(), rel=1e-3)
    arm = made(("shift",))
    assert set(attention(arm)) == {"shift/ctx_norm", "shift/act_norm"}
    noise = tiny.flow()[0][:, 0]
    assert attention_mass(arm, tiny.inputs(), tiny.world(), noise) is None
    bank = made(("shift",), num_hypotheses=2, hypothesis_method="ensemble")
    with pytest.raises(ValueError, match="--memory best1 keeps what is attended to most: no site of this"):
        bank.needs("best1")


def test_padding_of_the_prefix_does_not_dilute_its_numbers():
    longer = dataclasses.replace(tiny.CONFIG, prefix_length=60)
    a, b = (attention(made(("prefix_cross",), config)) for config in (tiny.CONFIG, longer))
    assert near(a, b)


def test_only_the_first_flow_draw_is_run():
    arm, (noise, time) = made(("suffix_in", "prefix_tokens"), prefix_tokens=2), tiny.flow(draws=3)
    three, first, second = (
        attention_diagnostics(arm, tiny.inputs(), tiny.world(), noise[:, draws], time[:, draws])
        for draws in ([0, 1, 2], [0], [1])
    )
    assert three == first != second


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(training):
    arm = made(tuple(SITES), prefix_tokens=K).train(training)
    out = arm(tiny.inputs(), tiny.world(), *tiny.flow())
    (out["action"].mean() + out["world"].mean()).backward()
    tiny.open_gates(arm, 0.0)  # what is open was read before and must not be read again
    weights = {name: x.clone() for name, x in arm.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in arm.named_parameters() if p.grad is not None}
    flags = {name: module.training for name, module in arm.named_modules()}
    state, opened = torch.get_rng_state(), arm.policy.fusion.open

    assert attention(arm)
    assert world_diagnostics(arm, tiny.world(), out["predicted"])
    assert gradient_norms(arm)

    assert all(torch.equal(x, weights[name]) for name, x in arm.state_dict().items())
    after = {name: p.grad for name, p in arm.named_parameters() if p.grad is not None}
    assert after.keys() == gradients.keys()
    assert all(torch.equal(after[name], x) for name, x in gradients.items())
    assert {name: module.training for name, module in arm.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), state) and arm.policy.fusion.open == opened == tuple(SITES)
    assert not any(module._forward_pre_hooks for module in arm.modules())
    assert torch.is_grad_enabled()


def test_hooks_go_even_where_the_pass_fails():
    arm, world = made(tuple(SITES), prefix_tokens=K), tiny.world()
    with pytest.raises(KeyError):
        attention(arm, world, {name: x for name, x in tiny.inputs().items() if name != "action"})
    assert not any(module._forward_pre_hooks for module in arm.modules())


def test_compiled_blocks_are_measured_without_compiling_them_again():
    arm, compiled = made(("prefix_tokens",), prefix_tokens=2), []
    want = attention(arm)
    for layer in arm.policy.expert.layers:
        layer.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    assert near(attention(arm), want) and compiled == []


def test_an_arm_without_memory_has_no_attention_to_it():
    assert attention(tiny.arm("pred", ("none",))) == {}
    assert attention(tiny.arm("off", ("late",))) == {}


# ---- gradients ----------------------------------------------------------------------------------------


def test_gradient_norms_split_what_is_new_and_leave_out_what_has_none():
    arm = made(("late", "prefix_cross"))
    assert gradient_norms(arm) == {}
    out = arm(tiny.inputs(), tiny.world(), *tiny.flow())
    out["action"].mean().backward()
    got = gradient_norms(arm)
    sites = arm.policy.fusion.sites
    gates = math.hypot(*(site.gate.grad.item() for site in sites.values()))
    assert got["grad_norm_gates"] == pytest.approx(gates) and gates > 0
    squares = sum(p.grad.square().sum().item() for m in arm.new_modules() for p in m.parameters())
    assert math.hypot(*got.values()) == pytest.approx(squares**0.5, rel=1e-4)
    prophet = sum(p.grad.square().sum().item() for p in arm.prophet.parameters())
    assert got["grad_norm_prophet"] == pytest.approx(prophet**0.5, rel=1e-4)
    assert set(got) == {"grad_norm_gates", "grad_norm_fusion", "grad_norm_prophet"}


def test_an_arm_without_a_prophet_has_no_norm_of_its_gradient():
    arm = tiny.arm("zero")
    arm(tiny.inputs(), tiny.world(), *tiny.flow())["action"].mean().backward()
    assert set(gradient_norms(arm)) == {"grad_norm_gates", "grad_norm_fusion"}
    arm.policy.fusion.requires_grad_(False)
    arm.zero_grad(set_to_none=True)
    assert gradient_norms(arm) == {}


def test_the_memorys_length_is_that_of_its_finite_rows_a_sample_at_a_time():
    arm, (noise, _) = tiny.arm("oracle"), tiny.flow()
    world = tiny.world()
    world["z_future"][0, 1:] = torch.nan
    rows = world["z_future"].norm(dim=-1)
    want = (rows[0, 0] + rows[1].mean()) / 2
    assert memory_norm(arm, world, noise) == pytest.approx({"norm_memory": want.item()})
    assert memory_norm(tiny.arm("off"), world, noise) == {}
    world["z_future"][:] = torch.nan
    assert memory_norm(arm, world, noise) == {}
