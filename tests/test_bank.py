"""The bank: hypotheses on their own, losses within bounds, odds in the attention, chance from its keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_source import demos, source  # noqa: F401, a fixture

from arm import ArmConfig, load_arm, save_arm
from fusion import SITES, Memory
from model import prefix_inputs
from prophet import METHODS, Imagined, Prophet, ProphetConfig, Repeat, bank_loss, prophet_width
from smolvla.checkpoint import fresh_processor
from training.diagnostics import CollapseWatch, Usage

N, K = 3, tiny.FUTURE
WIDTH = prophet_width(tiny.LATENT)
BANKS = [name for name, method in METHODS.items() if not method.single and method is not Repeat]
CHANCE = [name for name in BANKS if METHODS[name].chance]
each_method = pytest.mark.parametrize("method", BANKS)


def prophet(method: str, count: int = N, seed: int = 0) -> Prophet:
    torch.manual_seed(seed)
    return METHODS[method](settings_of(method, count), tiny.LATENT)


def settings_of(method: str, count: int = N) -> ProphetConfig:
    return ProphetConfig(tiny.HISTORY, K, count, method, **METHODS[method].settings)


def chance(method: str, batch: int = 2, count: int = N) -> torch.Tensor | None:
    rows = [
        METHODS[method].draw(
            [np.random.default_rng([b, n]) for n in range(count)], settings_of(method), WIDTH
        )
        for b in range(batch)
    ]
    return None if rows[0] is None else torch.from_numpy(np.stack(rows))


def bank_arm(method: str, fusion: tuple[str, ...] = ("late",), **fields):
    fields |= METHODS[method].settings
    return tiny.arm("pred", fusion, num_hypotheses=N, hypothesis_method=method, prefix_tokens=2 * N, **fields)


def world(method: str) -> dict:
    out = tiny.world()
    out["noise"] = torch.randn(2, N * K, tiny.LATENT, generator=torch.Generator().manual_seed(6))
    return out | ({"chance": chance(method)} if method in CHANCE else {})


# ---- hypotheses ---------------------------------------------------------------------------------------


@each_method
def test_hypotheses_differ_and_none_depends_on_how_many_there_are(method):
    z, drawn = torch.randn(2, tiny.HISTORY, tiny.LATENT), chance(method)
    many = prophet(method)
    y = many(z, drawn).y
    assert y.shape == (2, N, K, tiny.LATENT)
    assert all((y[:, a] - y[:, b]).abs().max() > 1e-3 for a in range(N) for b in range(a))
    few = prophet(method, 2)
    state = {k: v for k, v in many.state_dict().items() if not k.startswith(("query", "proj_out.2", "odds"))}
    few.load_state_dict(state | {"query": many.query[: len(few.query)]}, strict=False)
    alone = few(z, None if drawn is None else drawn[:, :2]).y
    torch.testing.assert_close(y[:, :2], alone, atol=1e-6, rtol=1e-5)


@each_method
def test_a_sample_is_imagined_the_same_alone_and_in_a_batch(method):
    z, drawn, made = torch.randn(2, tiny.HISTORY, tiny.LATENT), chance(method), prophet(method)
    together, alone = made(z, drawn), made(z[:1], None if drawn is None else drawn[:1])
    torch.testing.assert_close(together.y[:1], alone.y, atol=1e-6, rtol=1e-5)
    assert (together.log_pi is None) == (method != "mixture")
    if together.log_pi is not None:
        torch.testing.assert_close(together.log_pi[:1], alone.log_pi, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together.log_pi.exp().sum(1), torch.ones(2))


@pytest.mark.parametrize("method", CHANCE)
def test_hypotheses_that_chance_tells_apart_change_places_with_it(method):
    z, drawn, made = torch.randn(2, tiny.HISTORY, tiny.LATENT), chance(method), prophet(method)
    torch.testing.assert_close(made(z, drawn.flip(1)).y, made(z, drawn).y.flip(1), atol=1e-6, rtol=1e-5)


def test_a_dropout_mask_is_shared_over_time_and_keeps_the_mean():
    mask = chance("dropout", batch=400)
    assert mask.shape == (400, N, 1, WIDTH)
    assert set(mask.unique().tolist()) == {0.0, np.float32(1 / 0.7)}
    assert mask.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("method", CHANCE)
def test_chance_is_keyed_by_sample_and_hypothesis(demos, method):  # noqa: F811
    made = source(demos, memory="pred")
    made.arm = bank_arm(method)
    index, keys = np.array([0, 9]), np.array([5, 6])
    both = made.world(index, keys, ("chance",))["chance"]
    assert torch.equal(both[1:], made.world(index[1:], keys[1:], ("chance",))["chance"])
    assert not torch.equal(both[0], both[1]) and not torch.equal(both[0, 0], both[0, 1])
    fields = METHODS[method].settings
    made.arm = tiny.arm("pred", num_hypotheses=N - 1, hypothesis_method=method, **fields)
    assert torch.equal(both[:, :-1], made.world(index, keys, ("chance",))["chance"])


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.single])
def test_no_method_lets_the_future_reach_the_policy(method):
    """Neither in value nor through a gradient; what the loss sees is another matter."""
    arm, made = bank_arm(method), world(method)
    tiny.open_gates(arm)
    other = made | {"z_future": made["z_future"] + 1.0, "valid": ~made["valid"]}
    a, b = (arm(tiny.inputs(), x, *tiny.flow()) for x in (made, other))
    assert torch.equal(a["action"], b["action"]) and torch.equal(a["predicted"], b["predicted"])
    assert not torch.equal(a["world"], b["world"])


def test_a_posterior_teaches_the_prophet_and_the_policy_never_sees_it(monkeypatch):
    class Posterior(METHODS["noise"]):
        def __init__(self, config, latent):
            super().__init__(config, latent)
            self.encode = torch.nn.Linear(latent, latent)

        def learned(self, imagined, world):
            truth = self.encode(world["z_future"] - world["z_hist"][:, -1:])
            return Imagined(imagined.y + truth[:, None], cost=truth.square().mean((1, 2)))

    monkeypatch.setitem(METHODS, "noise", Posterior)
    test_no_method_lets_the_future_reach_the_policy("noise")
    arm, made = bank_arm("noise"), world("noise")
    tiny.open_gates(arm)
    out = arm(tiny.inputs(), made, *tiny.flow())
    assert torch.equal(out["predicted"], arm.imagine(made["z_hist"], made).y)  # as is its logged cosine
    out["action"].mean().backward(retain_graph=True)
    assert arm.prophet.encode.weight.grad is None and arm.prophet.query.grad is not None
    out["world"].mean().backward()
    assert arm.prophet.encode.weight.grad.abs().sum() > 0
    nothing = made | {"valid": torch.zeros_like(made["valid"])}
    assert arm.world_losses(arm.imagine(made["z_hist"], made), nothing)["world"].abs().max() == 0


# ---- losses -------------------------------------------------------------------------------------------

losses_of = st.lists(st.floats(0, 3), min_size=2, max_size=6).map(lambda x: torch.tensor([x]))
KINDS = ("mean", "min", "softmin", "rwta")


@given(st.floats(0, 3))
def test_with_one_hypothesis_every_loss_is_its_own(loss):
    one = torch.tensor([[loss]])
    for kind in KINDS:
        torch.testing.assert_close(bank_loss(one, kind, None), one[:, 0], atol=1e-5, rtol=1e-5)
    assert bank_loss(one, "single", one[:, 0]).item() == one.item()


@settings(max_examples=60)
@given(losses_of, st.floats(0.01, 10))
def test_softmin_and_rwta_lie_between_the_best_and_the_mean(losses, tau):
    best, mean = losses.amin(1), losses.mean(1)
    for value in (bank_loss(losses, "softmin", None, tau=tau), bank_loss(losses, "rwta", None, eps=0.05)):
        assert (value >= best - 1e-4).all() and (value <= mean + 1e-4).all()


@given(losses_of)
def test_softmin_tends_to_the_best_and_to_the_mean(losses):
    count = losses.shape[1]
    assert bank_loss(losses, "softmin", None, tau=1e-4).item() == pytest.approx(losses.min().item(), abs=1e-2)
    assert bank_loss(losses, "softmin", None, tau=1e3).item() == pytest.approx(losses.mean().item(), abs=1e-2)
    even = torch.full((1, count), -math.log(count))
    torch.testing.assert_close(bank_loss(losses, "softmin", None, even), bank_loss(losses, "softmin", None))
    torch.testing.assert_close(bank_loss(losses, "rwta", None, eps=(count - 1) / count), losses.mean(1))


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="--world-loss median is unknown: choose from single, mean"):
        bank_loss(torch.zeros(1, 2), "median", None)


@each_method
@pytest.mark.parametrize("kind", ["single", *KINDS])
def test_every_parameter_gets_a_gradient_the_losing_heads_too(method, kind):
    arm = bank_arm(method, world_loss=kind)
    out = arm(tiny.inputs(), world(method), *tiny.flow())
    assert out["world"].shape == (2,) and out["world_cos"].shape == (2, N)
    (out["action"].mean() + out["world"].mean()).backward()
    assert [n for n, p in arm.named_parameters() if p.requires_grad and p.grad is None] == []


# ---- in the policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@each_method
def test_a_bank_reaches_every_site_and_cached_equals_joint(site, method):
    arm = bank_arm(method, (site,))
    tiny.open_gates(arm)
    inputs, (noise, time) = tiny.inputs(), tiny.flow()
    memory = arm.memory("pred", arm.like(noise), world(method))
    assert memory.rows.shape == (2, N * K, tiny.LATENT)
    policy = arm.policy
    embs, mask, early = policy.embed_prefix(*prefix_inputs(inputs))
    cache = policy.fusion.prepare(memory)
    got = policy.velocity(noise[:, 0], time[:, 0], policy.prefix(embs, mask, early, cache), cache)
    want = reference.velocity(policy, embs, mask, early, noise[:, 0], time[:, 0], memory)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (
        got - tiny.policy().velocity(noise[:, 0], time[:, 0], policy.prefix(embs, mask, early))
    ).abs().max() > 1e-4


@pytest.mark.parametrize("site", SITES)
def test_odds_weigh_hypotheses_and_certainty_is_one_of_them_alone(site):
    arm = bank_arm("mixture", (site,))
    tiny.open_gates(arm)
    inputs, noise = tiny.inputs(), tiny.flow()[0][:, 0]
    rows = torch.randn(2, N, K, tiny.LATENT)
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf]]).expand(2, -1)
    alone = rows.clone()
    alone[:, 1:] = torch.nan  # rows that are not finite contribute nothing
    even = torch.zeros(2, N)
    act = lambda rows, log_pi: arm.policy.predict_chunk(inputs, noise, Memory(rows.flatten(1, 2), log_pi))  # noqa: E731
    torch.testing.assert_close(act(rows, sure), act(alone, even), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(act(rows, even), act(rows, None), atol=1e-5, rtol=1e-5)
    assert (act(rows, torch.tensor([[0.0, -3.0, -3.0]]).expand(2, -1)) - act(rows, even)).abs().max() > 1e-4


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", ["dropout", "ensemble"])
def test_exchangeable_hypotheses_may_change_places_coded_ones_not(site, method):
    arm = bank_arm(method, (site,))
    tiny.open_gates(arm)
    code = arm.policy.fusion.sites[site].tokens.hypothesis_code
    assert (code is not None) == METHODS[method].coded
    if code is not None:
        assert code.abs().max() == 0  # at the start nothing tells them apart
        torch.nn.init.normal_(code)
    inputs, noise = tiny.inputs(), tiny.flow()[0][:, 0]
    rows = torch.randn(2, N, K, tiny.LATENT)
    a, b = (arm.policy.predict_chunk(inputs, noise, x.flatten(1, 2)) for x in (rows, rows.flip(1)))
    assert ((a - b).abs().max() < 2e-5) == (method == "dropout")


@pytest.mark.slow
@each_method
def test_a_bank_is_saved_loaded_and_compiles_whole(method, tmp_path):
    from tiny import STATS

    arm = bank_arm(method).eval()
    tiny.open_gates(arm)
    save_arm(tmp_path, arm.eval(), fresh_processor(tiny.CONFIG, STATS, ["go"], (3, 32, 32)))
    again = load_arm(tmp_path)[0].eval()
    inputs, noise, made = tiny.inputs(), tiny.flow()[0][:, 0], world(method)
    assert torch.equal(arm.act(inputs, noise, "pred", made), again.act(inputs, noise, "pred", made))
    args = inputs, made, *tiny.flow()
    compiled = torch.compile(arm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args)["action"], arm(*args)["action"])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hypotheses": 2}, "--num-hypotheses 2 with --hypothesis-method none"),
        ({"hypothesis_method": "noise"}, "--num-hypotheses 1 with --hypothesis-method noise"),
        ({"num_hypotheses": 2, "hypothesis_method": "dropout"}, "--prophet-dropout 0.0 with"),
        ({"prophet_dropout": 0.1}, "--prophet-dropout 0.1 with --hypothesis-method none"),
        ({"tau": 0.0}, "--tau 0.0 must be at least 1e-06"),
        (
            {"num_hypotheses": 2, "hypothesis_method": "mixture", "detach_memory": True, "world_loss": "min"},
            "nothing would teach the odds",
        ),
    ],
)
def test_banks_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ArmConfig(**fields)


# ---- interventions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
@each_method
def test_interventions_leave_the_policy_with_what_they_say(site, method):
    arm = bank_arm(method, (site,)).eval()
    tiny.open_gates(arm)
    arm.eval()
    inputs, noise, made = tiny.inputs(), tiny.flow()[0][:, 0], world(method)
    rows = arm.memory("pred", arm.like(noise), made).rows.unflatten(1, (N, K))
    memory = lambda mode, **more: arm.memory(mode, arm.like(noise), made, **more).rows.unflatten(1, (N, K))  # noqa: E731
    dropped = memory("drop:1")
    assert torch.equal(dropped[:, [0, 2]], rows[:, [0, 2]]) and dropped[:, 1].isnan().all()
    best = memory("best1", best=torch.tensor([2, 0]))
    assert torch.equal(best[0, 2], rows[0, 2]) and torch.equal(best[1, 0], rows[1, 0])
    assert best[0, :2].isnan().all() and best[1, 1:].isnan().all()
    mean = memory("mean1")
    torch.testing.assert_close(mean[:, 0], rows.mean(1))
    assert mean[:, 1:].isnan().all()
    assert all(torch.equal(row, rows[:, 0]) for row in memory("dup").unbind(1))
    acts = {m: arm.act(inputs, noise, m, made) for m in ("pred", "drop:1", "mean1", "dup", "off")}
    assert all(a.isfinite().all() for a in acts.values())
    names = list(acts)
    assert all((acts[a] - acts[b]).abs().max() > 1e-6 for i, a in enumerate(names) for b in names[:i])


def test_interventions_that_make_no_sense_are_refused():
    bank, single = bank_arm("ensemble"), tiny.arm()
    assert bank.needs("drop:2") == bank.needs("best1") == ("z_hist",)
    for arm, mode, message in (
        (bank, "drop:3", "hypotheses are numbered 0 to 2"),
        (bank, "drop:x", "--memory drop:x is unknown"),
        (single, "best1", "this arm imagines one future, there is no bank to change"),
        (bank, "best2", "with a bank best1, mean1, dup, drop:i"),
    ):
        with pytest.raises(ValueError, match=message):
            arm.needs(mode)


# ---- over many steps ----------------------------------------------------------------------------------


def test_usage_counts_the_last_thousand_wins():
    usage = Usage(4, torch.device("cpu"))
    usage.add(torch.zeros(600, dtype=torch.long))
    assert usage.read() == pytest.approx({"usage_ppl": 1.0, "dead": 3})
    usage.add(torch.arange(1000) % 4)
    assert usage.read() == pytest.approx({"usage_ppl": 4.0, "dead": 0})
    usage.add(torch.full((995,), -1))
    assert usage.read()["usage_ppl"] > 3  # of five samples that counted
    assert Usage(1, torch.device("cpu")).read() == {}


def test_a_collapse_is_said_once_after_a_thousand_steps_of_it():
    watch = CollapseWatch()
    assert [watch.see(step, {"div_cos": 0.001}) is None for step in (10, 500, 1009)] == [True] * 3
    assert "the same for 1000 steps" in watch.see(1010, {"div_cos": 0.001})
    assert watch.see(3000, {"div_cos": 0.001}) is None
    fresh = CollapseWatch()
    for step, value in ((0, 0.001), (900, 0.5), (1000, 0.001), (1999, 0.001)):
        assert fresh.see(step, {"div_cos": value}) is None
    assert fresh.see(5000, {}) is None  # one hypothesis has no diversity to lose
