"""The policy against lerobot's numbers, and each fast form of it against the plain one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from golden import ActionQueue, compare
from safetensors.torch import load_file, save_file

from model import (
    SmolVLA,
    masked_mean,
    prefix_inputs,
    sample_means,
)
from smolvla.config import PRESETS, SmolVLAConfig
from smolvla.layers import patch_positions, resize_with_pad


@pytest.mark.parametrize("name", sorted(p.parent.name for p in tiny.golden().parent.glob("*/info.json")))
def test_every_tensor_of_a_golden_case_is_lerobots(name):
    rows = compare(tiny.golden().parent / name)
    assert len(rows) > 100
    assert [row for row in rows if not row.within] == []


@pytest.mark.slow
def test_the_golden_script_fails_on_a_tensor_that_is_off_or_unknown(tmp_path):
    for name in ("checkpoint", "vlm", "info.json", "inputs.safetensors"):
        (tmp_path / name).symlink_to(tiny.golden() / name)
    expected = load_file(tiny.golden() / "expected.safetensors")
    expected["never_heard_of"] = torch.zeros(1)
    save_file(expected, tmp_path / "expected.safetensors")
    exact = load_file(tiny.golden() / "expected64.safetensors")
    exact["action_chunk"] = exact["action_chunk"] + 1e-7
    save_file(exact, tmp_path / "expected64.safetensors")
    script = Path(__file__).parent / "golden.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    failed = {line.split()[-1] for line in done.stdout.splitlines() if line.startswith("FAIL")}
    assert (done.returncode, failed) == (1, {"float64:action_chunk", "never_heard_of"})


def test_the_base_preset_has_the_published_number_of_parameters():
    with torch.device("meta"):
        policy = SmolVLA(PRESETS["base"])
    policy.freeze("expert")
    assert sum(p.numel() for p in policy.parameters()) == 450_046_176
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == 99_880_992


def test_flow_draws_that_share_a_prefix_equal_draws_on_their_own():
    policy, inputs = tiny.policy(), tiny.inputs()
    noise, time = tiny.flow(draws=3)
    together = policy(inputs, noise, time)
    apart = [policy(inputs, noise[:, i : i + 1], time[:, i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), atol=1e-5, rtol=1e-5)


def test_an_image_shared_by_the_batch_equals_a_copy_for_each_sample():
    policy, inputs = tiny.policy(), tiny.inputs()
    shared = [image[:1] for image in inputs["images"]]
    copies = [image.expand(2, -1, -1, -1) for image in shared]
    a, b = (policy.embed_prefix(*prefix_inputs(inputs | {"images": x}))[0] for x in (shared, copies))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_padded_prefix_and_a_masked_camera_do_not_move_the_actions():
    inputs, (noise, _) = tiny.inputs(), tiny.flow()
    longer = dataclasses.replace(tiny.CONFIG, prefix_length=60)
    plain = tiny.policy().predict_chunk(inputs, noise[:, 0])
    padded = tiny.policy(longer).predict_chunk(inputs, noise[:, 0])
    torch.testing.assert_close(plain, padded, atol=1e-5, rtol=1e-5)

    absent = torch.zeros(2, dtype=torch.bool)
    black = inputs | {
        "images": [inputs["images"][0], torch.zeros(2, 3, 32, 32)],
        "image_masks": [None, absent],
    }
    grey = black | {"images": [inputs["images"][0], torch.full((2, 3, 32, 32), 0.5)]}
    a, b = (tiny.policy().predict_chunk(x, noise[:, 0]) for x in (black, grey))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_actions_are_causal_in_self_layers_and_the_prefix_never_sees_them():
    policy, inputs = tiny.policy(), tiny.inputs()
    noise, time = tiny.flow()
    prefix = policy.prefix(*policy.embed_prefix(*prefix_inputs(inputs)))
    later = noise[:, 0].clone()
    later[:, 4:] += 1.0
    a, b = (policy.velocity(x, time[:, 0], prefix) for x in (noise[:, 0], later))
    torch.testing.assert_close(a[:, :4], b[:, :4], atol=1e-5, rtol=1e-5)
    assert (a[:, 4:] - b[:, 4:]).abs().max() > 1e-2


def test_fewer_expert_layers_than_text_layers_run_and_bad_ratios_are_refused():
    config = dataclasses.replace(tiny.CONFIG, layers=4, expert_layers=2, self_attn_every_n_layers=0)
    policy, (noise, _) = tiny.policy(config), tiny.flow()
    assert policy.predict_chunk(tiny.inputs(), noise[:, 0]).isfinite().all()
    with pytest.raises(ValueError, match="layers 4 must be a positive multiple of expert_layers 3"):
        dataclasses.replace(tiny.CONFIG, layers=4, expert_layers=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 36}, "image_size 36 must be a positive multiple of patch_size 8"),
        ({"image_size": 24}, "patches a side 3 must be a positive multiple of scale_factor 2"),
        ({"head_dim": 7}, "head_dim 7 must be a positive multiple of 2"),
        ({"vision_heads": 5}, "width 32 must be a positive multiple of vision_heads 5"),
        ({"kv_heads": 0}, "heads 2 must be a positive multiple of kv_heads 0"),
        ({"max_state_dim": 7}, "state is 8 wide and the model takes 7"),
        ({"cameras": ()}, "a policy needs a camera"),
        ({"num_steps": 0}, "num_steps 0"),
        ({"n_action_steps": 9}, r"n_action_steps 9 must lie in 1\.\.6"),
    ],
)
def test_sizes_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.CONFIG, **change)


@pytest.mark.parametrize("what", ["expert", "vision", "none"])
def test_freezing_leaves_gradients_where_lerobot_does_and_nowhere_else(what):
    policy = tiny.policy()
    policy.freeze(what)
    policy(tiny.inputs(), *tiny.flow()).mean().backward()
    live = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert live == {name for name, p in policy.named_parameters() if p.grad is not None}  # DDP: none unused
    assert any(n.startswith("vision.") for n in live) == (what == "none")
    assert any(n.startswith("text.") for n in live) == (what != "expert")
    assert not any(n.startswith(("lm_head", "text.norm", "text.layers.3")) for n in live)
    with pytest.raises(ValueError, match="--freeze 'all' is unknown"):
        policy.freeze("all")


def test_the_action_queue_asks_for_a_chunk_only_when_empty():
    policy, inputs = tiny.policy(), tiny.inputs()
    noise = tiny.flow()[0][:, 0]
    chunk, queue = policy.predict_chunk(inputs, noise), ActionQueue(policy)
    steps = [queue.select(inputs if i == 0 else {}, noise) for i in range(tiny.CONFIG.n_action_steps)]
    torch.testing.assert_close(torch.stack(steps, 1), chunk[:, : tiny.CONFIG.n_action_steps])
    with pytest.raises(KeyError):
        queue.select({}, noise)


def test_padded_steps_do_not_count_in_the_mean():
    loss, pad = torch.ones(1, 2, 3, 4), torch.tensor([[False, False, True]])
    loss[:, :, 2] = float("nan")
    total, count = masked_mean(loss, pad)
    assert (total.item(), count.item()) == (16.0, 16)
    assert masked_mean(torch.ones(1, 2, 3, 4), None)[1].item() == 24


def test_a_samples_mean_is_over_its_own_steps_and_zero_where_there_are_none():
    loss = torch.arange(24.0).reshape(2, 1, 3, 4)
    pad = torch.tensor([[False, True, True], [True, True, True]])
    assert sample_means(loss, pad).tolist() == [1.5, 0.0]
    assert sample_means(loss, None).tolist() == [5.5, 17.5]


def test_patches_take_their_row_of_the_position_table_and_its_neighbours_where_smolvlm_rounds():
    assert patch_positions(4, 4) == list(range(16))
    assert patch_positions(2, 4) == [0, 2, 8, 10]  # smaller pictures spread over the table
    assert patch_positions(4, 2) == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    odd = [n for n in range(1, 41) if patch_positions(n, n) != list(range(n * n))]
    assert odd == [19, 25, 29, 31, 38, 40]  # as transformers 5.5.4 computes them in float32


def test_pictures_keep_their_aspect_and_sit_bottom_right():
    out = resize_with_pad(torch.ones(1, 3, 10, 20), 40)
    assert out.shape == (1, 3, 40, 40)
    assert out[..., :20, :].max() == 0 and out[..., 20:, :].min() == 1
    same = torch.rand(1, 3, 40, 40)
    assert resize_with_pad(same, 40) is same


def test_the_default_config_is_the_published_one():
    assert SmolVLAConfig().expert_mlp == 2048
    assert PRESETS["libero"].expert_mlp == 1280
    assert SmolVLAConfig().image_tokens == 64
