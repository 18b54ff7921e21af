"""An arm is saved and loaded whole, refuses what it cannot have, and a blind one sees nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import STATS

from arm import WORLD_FILE, ArmConfig, Summary, load_arm, save_arm
from smolvla.checkpoint import WEIGHTS, fresh_processor


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
    assert set(out) == {"action"}


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
