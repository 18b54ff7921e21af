"""lerobot's folders: what goes in comes out, and what does not fit is one clear error."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from checkpoint import (
    WEIGHTS,
    build_tokenizer,
    find_folder,
    fresh_processor,
    lerobot_key,
    load_policy,
    save_policy,
)

STATS = {
    "observation.state": {
        "mean": torch.zeros(8),
        "std": torch.ones(8),
        "min": -torch.ones(8),
        "max": torch.ones(8),
    },
    "action": {
        "mean": torch.full((7,), 0.5),
        "std": torch.full((7,), 2.0),
        "min": torch.zeros(7),
        "max": torch.ones(7),
    },
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint beside its language model."""
    for name in ("checkpoint", "vlm"):
        shutil.copytree(tiny.golden() / name, tmp_path / name)
    return tmp_path / "checkpoint"


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_checkpoint_of_lerobots_is_written_back_tensor_by_tensor(folder, tmp_path):
    policy, processor = load_policy(folder)
    save_policy(tmp_path / "copy", policy, processor)
    for name in (WEIGHTS, *(p.name for p in folder.glob("policy_*.safetensors"))):
        before, after = load_file(folder / name), load_file(tmp_path / "copy" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        before, after = (json.loads((f / name).read_text()) for f in (folder, tmp_path / "copy"))
        assert before == after


def test_a_fresh_policy_is_saved_and_loaded_unchanged(tmp_path):
    policy = tiny.policy()
    processor = fresh_processor(tiny.CONFIG, STATS, ["pick up the soup"], (3, 64, 64))
    save_policy(tmp_path / "a", policy, processor)
    again, other = load_policy(tmp_path / "a")
    assert again.config == policy.config
    assert all(torch.equal(p, q) for p, q in zip(policy.state_dict().values(), again.state_dict().values()))
    assert torch.equal(*(p.tokenize(["pick up the soup"])[0] for p in (processor, other)))
    assert all(torch.equal(STATS[f][s], other.stats[f][s]) for f in STATS for s in STATS[f])


def test_names_from_compiled_and_distributed_models_are_understood(folder):
    want, _ = load_policy(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {"module." + k.replace("layers.", "layers._orig_mod.", 1): v for k, v in tensors.items()},
        folder / WEIGHTS,
    )
    got, _ = load_policy(folder)
    assert all(torch.equal(p, q) for p, q in zip(want.state_dict().values(), got.state_dict().values()))


def test_the_unused_head_may_be_missing_and_half_precision_is_widened(folder):
    def change(tensors):
        del tensors["model.vlm_with_expert.vlm.lm_head.weight"]
        tensors["model.state_proj.weight"] = tensors["model.state_proj.weight"].bfloat16()

    edit_weights(folder, change)
    policy, _ = load_policy(folder)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_tensors_that_do_not_fit_are_listed_in_one_error(folder):
    def change(tensors):
        tensors["model.state_proj.extra"] = torch.zeros(1)
        tensors["model.state_proj.bias"] = torch.zeros(3)
        del tensors["model.action_in_proj.bias"]

    edit_weights(folder, change)
    with pytest.raises(ValueError) as error:
        load_policy(folder)
    message = str(error.value)
    for part in (
        "unexpected model.state_proj.extra",
        "missing model.action_in_proj.bias",
        "state_proj.bias is (3,), not (64,)",
    ):
        assert part in message
    assert "\n" not in message


def test_damaged_and_missing_files_are_one_line_each(folder, tmp_path):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_policy(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_policy(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_policy(folder)
    with pytest.raises(ValueError, match=r"no folder './nowhere'"):
        find_folder("./nowhere")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha"),
        ({"resize_imgs_with_padding": [32, 32]}, "differs from the tower"),
    ],
)
def test_what_the_project_does_not_do_is_refused(folder, field, message):
    edit_json(folder / "config.json", **field)
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


def test_missing_statistics_are_an_error_not_an_identity(folder):
    for path in folder.glob("policy_*processor_step*.safetensors"):
        tensors = {k: v for k, v in load_file(path).items() if not k.startswith("observation.state.")}
        save_file(tensors, path)
    with pytest.raises(ValueError, match=r"statistics mean, std of observation\.state are missing"):
        load_policy(folder)


def test_min_max_and_identity_invert_and_match_their_formulas():
    action = torch.rand(2, 6, 7)
    for mode in ("MEAN_STD", "MIN_MAX", "IDENTITY"):
        processor = fresh_processor(tiny.CONFIG, STATS, ["go"], (3, 64, 64))
        processor.raw["normalization_mapping"] = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
        normal = processor.normalise("action", action)
        torch.testing.assert_close(processor.unnormalise(normal), action)
        want = {"MEAN_STD": (action - 0.5) / 2.0, "MIN_MAX": 2 * action - 1, "IDENTITY": action}[mode]
        torch.testing.assert_close(normal, want)


def test_the_built_tokenizer_is_lossless_and_short_on_its_instructions():
    text = "pick up the alphabet soup and place it in the basket"
    tokenizer = build_tokenizer([text, "open the drawer"], 300)
    assert len(tokenizer.encode(text).ids) < len(text) / 2
    for other in (text, "wholly unseen wörds, 42!\n"):
        assert tokenizer.decode(tokenizer.encode(other).ids) == other


def test_instructions_end_in_a_new_line_are_cut_and_an_empty_one_is_an_error():
    processor = fresh_processor(tiny.CONFIG, STATS, ["pick it up"], (3, 64, 64))
    a, b = (processor.tokenize([text])[0] for text in ("pick it up", "pick it up\n"))
    assert torch.equal(a, b)
    assert processor.tokenize(["x" * 500])[0].shape[1] == tiny.CONFIG.tokenizer_max_length
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="an instruction is empty"):
            processor.tokenize([empty])


def test_a_batch_without_any_known_camera_is_refused():
    processor = fresh_processor(tiny.CONFIG, STATS, ["go"], (3, 64, 64))
    with pytest.raises(ValueError, match=r"none of the cameras observation\.images\.image"):
        processor({"observation.state": torch.zeros(1, 8), "task": ["go"], "front": torch.zeros(1, 3, 8, 8)})


def test_every_parameter_has_lerobots_name():
    names = [lerobot_key(name) for name in tiny.policy().state_dict()]
    assert len(set(names)) == len(names)
    assert all(name.startswith("model.") for name in names)
