"""An arm is saved and loaded whole, refuses what it cannot have, and a blind one sees nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import STATS

from arm import WORLD_FILE, ArmConfig, Summary, load_arm, save_arm
from files import Refused
from fusion import SITES
from smolvla.checkpoint import fresh_processor
from smolvla.folders import WEIGHTS


def processor():
    return fresh_processor(tiny.CONFIG, STATS, ["go"], (3, 32, 32))


@pytest.mark.parametrize("memory", ["pred", "zero"])
def test_an_arm_is_saved_and_loaded_whole(tmp_path, memory):
    arm = tiny.arm(memory)
    tiny.open_gates(arm)
    save_arm(tmp_path, arm.eval(), processor())
    again, _ = load_arm(tmp_path)
    assert again.config == arm.config
    noise, world = tiny.flow()[0][:, 0], tiny.world()
    a, b = (x.eval().act(tiny.inputs(), noise, memory, world) for x in (arm, again))
    assert torch.equal(a, b)
    frames = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(*(x.encoder.embed(frames) for x in (arm, again)))


def test_lerobot_finds_only_its_own_tensors_in_its_own_file(tmp_path):
    save_arm(tmp_path, tiny.arm(), processor())
    assert not [k for k in load_file(tmp_path / WEIGHTS) if not k.startswith("model.") or "fusion" in k]
    ours = load_file(tmp_path / WORLD_FILE)
    assert {k.split(".")[0] for k in ours} == {"policy", "prophet", "encoder", *Summary._fields}


def test_a_checkpoint_without_our_file_is_an_arm_without_memory():
    arm, _ = load_arm(tiny.golden() / "checkpoint")
    assert arm.config.mode == "off" and arm.prophet is None
    with pytest.raises(ValueError, match="--memory pred: this arm has no fusion site"):
        arm.needs("pred")


def test_files_that_do_not_fit_one_another_are_refused(tmp_path):
    save_arm(tmp_path, tiny.arm(), processor())
    path = tmp_path / WORLD_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"world\.safetensors cannot be read"):
        load_arm(tmp_path)
    tensors = load_file_with_config(path, whole)
    tensors[0].pop("prophet.time_code")
    save_file(tensors[0], path, metadata=tensors[1])
    with pytest.raises(ValueError, match=r"tensors that differ: prophet\.time_code"):
        load_arm(tmp_path)


def load_file_with_config(path, content):
    import safetensors

    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def test_modes_that_an_arm_cannot_have_are_refused_before_any_rollout():
    with pytest.raises(ValueError, match="--memory pred needs a prophet, and this arm has none"):
        tiny.arm("zero").needs("pred")
    assert tiny.arm("zero").needs("random") == ("noise",)
    assert tiny.arm("pred").needs("current") == tiny.arm("pred").needs("signflip") == ("z_hist",)
    with pytest.raises(ValueError, match="--memory oracle needs the future, which a rollout has not"):
        tiny.arm("pred").needs("oracle")
    assert tiny.arm("pred").needs("oracle", rollout=False) == ("z_future",)


def test_arms_whose_memory_needs_no_prophet_build_none():
    assert tiny.arm("zero").prophet is None and tiny.arm("current").prophet is None
    assert tiny.arm("pred").prophet is not None
    out = tiny.arm("zero")(tiny.inputs(), {}, *tiny.flow())
    assert set(out) == {"action", "bad_memory_rows"}


@pytest.mark.parametrize("site", SITES)
def test_a_sample_whose_memory_is_dropped_trains_as_without_memory(site):
    arm = tiny.arm("pred", fusion=(site,), memory_dropout=0.5, prefix_tokens=4)
    tiny.open_gates(arm.policy.fusion)
    world, (noise, time) = tiny.world(), tiny.flow()
    dropped = torch.tensor([True, False])
    out = arm(tiny.inputs(), world | {"dropped": dropped}, noise, time)["action"]
    whole = arm(tiny.inputs(), world, noise, time)["action"]
    off = arm.policy(tiny.inputs(), noise, time, None)
    torch.testing.assert_close(out[0], off[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], whole[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(off[0], whole[0], atol=1e-3)


def test_memory_rows_that_are_not_finite_are_counted():
    arm, world = tiny.arm("pred"), tiny.world()
    assert arm(tiny.inputs(), world, *tiny.flow())["bad_memory_rows"] == 0
    world["z_hist"][1] = torch.nan
    assert arm(tiny.inputs(), world, *tiny.flow())["bad_memory_rows"] == tiny.FUTURE


def test_random_memory_has_the_datas_correlation_over_steps_and_spread_over_dimensions():
    arm = tiny.arm("random")
    wanted = 0.9 ** (torch.arange(tiny.FUTURE)[:, None] - torch.arange(tiny.FUTURE)).abs().float()
    arm.step_factor.copy_(torch.linalg.cholesky(wanted))
    noise = torch.randn(4000, tiny.FUTURE, tiny.LATENT, generator=torch.Generator().manual_seed(0))
    rows = arm.memory("random", torch.zeros(4000, tiny.LATENT), {"noise": noise}).rows
    spread = rows.std(0)  # (K, D)
    torch.testing.assert_close(spread, arm.encoder.stats.dim_std.expand_as(spread), atol=0, rtol=0.05)
    scaled = (rows / spread).double()
    found = torch.einsum("nkd,nld->kl", scaled, scaled) / scaled[:, 0].numel()
    torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["zero", "gate:0.5", "mean", "random"])
def test_an_arm_without_a_site_refuses_every_memory(mode):
    with pytest.raises(Refused, match=f"--memory {mode}: this arm has no fusion site"):
        tiny.arm("off", fusion=("none",)).needs(mode)


@pytest.mark.parametrize("site", SITES)
def test_a_rescaled_gate_is_a_dose(site):
    arm = tiny.arm("pred", fusion=(site,), prefix_tokens=4)
    tiny.open_gates(arm.policy.fusion)
    arm.eval()
    inputs, world, noise = tiny.inputs(), tiny.world(), tiny.flow()[0][:, 0]
    chunks = {}
    for scale in (0.0, 0.5, 1.0):
        arm.policy.fusion.rescale(scale)
        chunks[scale] = arm.act(inputs, noise, f"gate:{scale:g}", world)
    arm.policy.fusion.rescale(1.0)
    assert torch.equal(chunks[1.0], arm.act(inputs, noise, "pred", world))
    torch.testing.assert_close(chunks[0.0], arm.act(inputs, noise, "off"), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(chunks[0.5], chunks[1.0], atol=1e-4)


def test_every_trained_parameter_gets_a_gradient():
    arm = tiny.arm("pred")
    out = arm(tiny.inputs(), tiny.world(), *tiny.flow())
    (out["action"].mean() + out["world"].mean()).backward()
    assert [n for n, p in arm.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_blind_arm_acts_the_same_whatever_it_is_shown():
    arm = tiny.arm("zero", fusion=("none",), blind=True)
    batch = {name: torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8) for name in tiny.CONFIG.cameras}
    other = {name: image.flip(0) for name, image in batch.items()}
    a, b = (arm.blindfold(x) for x in (batch, other))
    assert all(torch.equal(a[name], b[name]) and len(a[name]) == 1 for name in tiny.CONFIG.cameras)
    seeing = tiny.arm("zero", fusion=("none",))
    assert seeing.blindfold(batch) is batch


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": ("none", "late")}, "none excludes the others"),
        ({"future": 0}, "--future 0 must be at least 1"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ArmConfig(**fields)
