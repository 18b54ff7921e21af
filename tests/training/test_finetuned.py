"""Starting as lerobot's fine-tuning starts, and reading what it leaves: numbers that lerobot 0.6.1 recorded.

tests/make_finetuned.py made them, with lerobot's own training script: a base of other cameras and widths, on
tests/lerobot_v3.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arm import load_arm
from model import load_policy, masked_mean
from readers.load import load
from rollouts.plan import ProtocolConfig, find_target
from smolvla.checkpoint import lerobot_key, save_policy
from train import TrainConfig
from training.start import build_policy, settle_cameras

HERE = Path(__file__).resolve().parents[1]
MADE, DATA = HERE / "finetuned", HERE / "lerobot_v3" / "L_image" / "dataset"
CAMERA = "observation.images."


@pytest.fixture(scope="module")
def expected() -> dict:
    return load_file(MADE / "expected.safetensors")


def test_the_first_step_has_lerobots_loss_and_gradients(expected):
    config = TrainConfig(data=DATA, init=str(MADE / "base"), cameras=("camera1=image", "camera2=image2"))
    config = settle_cameras(config, DATA, config.init)
    demos = load(DATA, options=config)
    policy, processor = build_policy(config, demos)
    policy.freeze("expert")
    chunk, cameras = policy.config.chunk_size, policy.config.given_cameras
    inputs = processor(demos.batch(expected["frames"].numpy(), chunk, cameras))
    assert inputs["is_pad"].any() and (policy.config.state_dim, policy.config.action_dim) == (8, 7)
    total, count = masked_mean(
        policy(inputs, expected["noise"][:, None], expected["time"][:, None]), inputs["is_pad"]
    )
    loss = total / count
    torch.testing.assert_close(loss[None], expected["loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    grads = {lerobot_key(n): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    norms = {name.removeprefix("norm."): x for name, x in expected.items() if name.startswith("norm.")}
    assert set(grads) == {name for name, norm in norms.items() if norm > 0}
    for name, grad in grads.items():
        torch.testing.assert_close(grad.norm()[None], norms[name], atol=1e-5, rtol=1e-4)
        if f"grad.{name}" in expected:
            torch.testing.assert_close(grad, expected[f"grad.{name}"], atol=1e-5, rtol=1e-4)


def test_what_lerobot_fine_tuned_acts_as_in_lerobot_and_is_written_back_consistently(expected, tmp_path):
    raw = json.loads((MADE / "train/checkpoints/last/pretrained_model/config.json").read_text())
    assert raw["input_features"]["observation.state"]["shape"] == [
        6
    ]  # the base's, beside the data's statistics
    policy, processor = load_policy(MADE / "train")
    source = "the checkpoint's own statistics"
    assert processor.notes == [
        f"camera1 is image of {source}",
        f"camera2 is image2 of {source}",
        f"camera3 of the checkpoint: not in {source}, left out",
        f"observation.state is 8 wide in {source}, 6 in the checkpoint's config.json",
    ]
    save_policy(tmp_path, policy, processor)
    again = load_policy(tmp_path)
    assert again[1].notes == [] and again[0].config == policy.config
    demos = load(DATA)
    given = demos.batch(expected["frames"].numpy(), policy.config.chunk_size, demos.images)
    for one, its in ((policy, processor), again):
        chunk = one.predict_chunk(its(its.rename(given)), expected["noise"])
        torch.testing.assert_close(chunk, expected["chunk"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            its.unnormalise(chunk), expected["chunk_unnormalized"], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("place", ["", "checkpoints/last", "checkpoints/000002/pretrained_model"])
def test_lerobots_training_folder_is_a_checkpoint_to_every_program(place):
    assert load_arm(MADE / "train" / place)[0].policy.config.cameras == (
        f"{CAMERA}camera1",
        f"{CAMERA}camera2",
    )
    target = find_target(ProtocolConfig(str(MADE / "train" / place)))
    assert target.folder.name == "pretrained_model" and target.run == {}


def test_a_run_goes_on_from_it_without_a_flag():
    config = settle_cameras(TrainConfig(data=DATA, init=str(MADE / "train")), DATA, str(MADE / "train"))
    assert config.cameras == (f"{CAMERA}camera1={CAMERA}image", f"{CAMERA}camera2={CAMERA}image2")
    policy, _ = build_policy(config, load(DATA, options=config))
    assert policy.config.given_cameras == (f"{CAMERA}camera1", f"{CAMERA}camera2")
