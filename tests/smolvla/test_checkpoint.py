"""lerobot's folders: what goes in comes out, and what does not fit is one clear error."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from model import load_policy, start_from_vlm
from smolvla.checkpoint import (
    VLM_PARTS,
    fresh_processor,
    lerobot_key,
    multiplier,
    plain_key,
    policy_config,
    save_policy,
)
from smolvla.config import PRESETS
from smolvla.folders import SHARDS, WEIGHTS, find_folder
from smolvla.language import read_language

ROOT = Path(__file__).resolve().parents[2]
VLM = "model.vlm_with_expert.vlm."


def edit_weights(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.parent.name for p in tiny.golden().parent.glob("*/checkpoint")))
def test_a_checkpoint_of_lerobots_is_written_back_byte_by_byte(name, tmp_path):
    folder = tiny.golden().parent / name / "checkpoint"
    save_policy(tmp_path, *load_policy(folder))
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()} - {"vlm"}
    assert [n for n in sorted(names) if (folder / n).read_bytes() != (tmp_path / n).read_bytes()] == []
    language = folder.parent / "vlm"
    assert all(p.read_bytes() == (tmp_path / "vlm" / p.name).read_bytes() for p in language.iterdir())


def test_a_fresh_policy_is_saved_and_loaded_unchanged(tmp_path):
    policy = tiny.policy()
    processor = fresh_processor(tiny.CONFIG, tiny.STATS, ["pick up the soup"], (3, 64, 64))
    save_policy(tmp_path / "a", policy, processor)
    again, other = load_policy(tmp_path / "a")
    assert again.config == policy.config
    assert all(torch.equal(p, q) for p, q in zip(policy.state_dict().values(), again.state_dict().values()))
    assert torch.equal(*(p.tokenize(["pick up the soup"])[0] for p in (processor, other)))
    assert all(torch.equal(tiny.STATS[f][s], other.stats[f][s]) for f in tiny.STATS for s in tiny.STATS[f])


def test_a_policy_can_be_saved_over_the_folder_that_its_weights_are_mapped_from(folder):
    policy, processor = load_policy(folder)
    want = {name: p.clone() for name, p in policy.state_dict().items()}
    with torch.no_grad():
        policy.state_proj.bias.add_(1.0)  # touches this process's copy of the page, never the file
    assert torch.equal(load_policy(folder)[0].state_proj.bias, want["state_proj.bias"])
    save_policy(folder, policy, processor)
    again = load_policy(folder)[0].state_dict()
    assert torch.equal(again.pop("state_proj.bias"), want.pop("state_proj.bias") + 1.0)
    assert all(torch.equal(want[name], p) for name, p in again.items())
    assert all(torch.equal(want[name], p) for name, p in policy.state_dict().items() if name in want)


# ---- in: names and formats ----------------------------------------------------------------------------


NESTINGS = {
    "compiled": lambda key: key.replace("layers.", "layers._orig_mod.", 1),
    "distributed": lambda key: f"module.{key}",
    "without the policy": lambda key: key.removeprefix("model."),
    "shallower": lambda key: key.replace("vlm.model.", "vlm."),
    "deeper": lambda key: key.replace("text_model.", "text_model.model."),
    "vision deeper": lambda key: key.replace("vision_model.", "vision_model.vision_model."),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_names_that_other_versions_wrote_are_understood(folder, nesting):
    want = load_policy(folder)[0].state_dict()
    tensors = load_file(folder / WEIGHTS)
    renamed = {NESTINGS[nesting](key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / WEIGHTS)
    got = load_policy(folder)[0].state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_every_parameter_has_lerobots_name_and_it_is_a_plain_one():
    names = [lerobot_key(name) for name in tiny.policy().state_dict()]
    assert len(set(names)) == len(names)
    assert all(name.startswith("model.") and plain_key(name) == name for name in names)


def test_two_tensors_of_one_name_are_refused(folder):
    edit_weights(folder, lambda t: t.update({"module.model.state_proj.bias": torch.zeros(64)}))
    with pytest.raises(ValueError, match=r"two tensors for model\.state_proj\.bias"):
        load_policy(folder)


def test_the_unused_head_and_norm_may_be_missing_and_half_precision_is_widened(folder):
    def change(tensors):
        del tensors[f"{VLM}lm_head.weight"], tensors[f"{VLM}model.text_model.norm.weight"]
        for key in list(tensors):
            tensors[key] = tensors[key].bfloat16() if "layers.0" in key else tensors[key].half()

    noise, time = tiny.flow(config=load_policy(folder)[0].config)
    edit_weights(folder, change)
    policy, _ = load_policy(folder)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy(golden_inputs(policy), noise, time).isfinite().all()


def test_a_policy_in_bfloat16_keeps_its_projections_and_stays_close(folder):
    full, half = load_policy(folder)[0], load_policy(folder, dtype=torch.bfloat16)[0]
    wide = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, _ in half.named_parameters() if name.startswith(("state_proj", "action_"))}
    noise, _ = tiny.flow(config=full.config)
    a, b = (p.predict_chunk(golden_inputs(p), noise[:, 0]) for p in (full, half))
    assert b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < 0.05


def golden_inputs(policy) -> dict:
    inputs = tiny.inputs()
    return (
        inputs
        | {"state": inputs["state"][:, : policy.config.state_dim]}
        | {"action": torch.zeros(2, policy.config.chunk_size, policy.config.action_dim)}
    )


# ---- in: what does not fit ----------------------------------------------------------------------------


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


def test_of_many_tensors_that_do_not_fit_some_are_named(folder):
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)[3:]])
    with pytest.raises(ValueError, match=r"missing .*; and \d+ more") as error:
        load_policy(folder)
    assert len(str(error.value)) < 1000


def test_missing_and_unexpected_tensors_are_passed_over_on_demand_misshapen_ones_never(folder):
    def change(tensors):
        tensors["model.state_proj.extra"] = torch.zeros(1)
        del tensors["model.action_in_proj.bias"]

    edit_weights(folder, change)
    policy, _ = load_policy(folder, allow_missing=True)
    assert all(p.isfinite().all() and not p.is_meta for p in policy.parameters())
    edit_weights(folder, lambda t: t.update({"model.state_proj.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"state_proj\.bias is \(3,\), not \(64,\)$"):
        load_policy(folder, allow_missing=True)


def test_damaged_and_missing_files_are_one_line_each(folder, monkeypatch):
    content = (folder / WEIGHTS).read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b"", b"\x00" * 64):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
            load_policy(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        load_policy(folder)
    (folder.parent / "vlm" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_policy(folder)
    (folder.parent / "vlm" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing.*--vlm DIR"):
        load_policy(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="it is not a JSON object"):
        load_policy(folder)
    with pytest.raises(ValueError, match=r"no folder './nowhere'"):
        find_folder("./nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"some/where@main is no folder here and cannot be fetched") as error:
        find_folder("some/where@main")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha"),
        ({"type": "pi0"}, "type 'pi0'"),
        ({"resize_imgs_with_padding": None}, "one square size"),
        ({"resize_imgs_with_padding": [64, 48]}, "one square size"),
        (
            {"resize_imgs_with_padding": [72, 72]},
            "image_size 72 must be a positive multiple of patch_size 16",
        ),
        ({"num_expert_layers": 3}, "layers 4 must be a positive multiple of expert_layers 3"),
        ({"num_expert_layers": 2}, "self_attn_every_n_layers 2 with 2 expert layers over 4 text layers"),
        ({"n_action_steps": 11}, r"n_action_steps 11 must lie in 1\.\.10"),
        ({"num_steps": 0}, "num_steps 0"),
        ({"max_action_dim": 5}, "action is 7 wide and the model takes 5"),
        ({"output_features": {}}, r"config\.json has no feature action"),
        ({"input_features": {"observation.state": {"type": "STATE", "shape": [6]}}}, "needs a camera"),
        ({"expert_width_multiplier": 0.33}, "expert_width 21 must be a positive multiple of 2"),
    ],
)
def test_configurations_that_cannot_be_are_refused(folder, field, message):
    edit_json(folder / "config.json", **field)
    with pytest.raises(ValueError, match=message) as error:
        load_policy(folder)
    assert str(folder) in str(error.value)  # whose it is


def test_heads_that_do_not_divide_and_other_activations_are_refused(folder):
    path = folder.parent / "vlm" / "config.json"
    whole = json.loads(path.read_text())
    for change, message in (
        ({"num_key_value_heads": 3}, "heads 4 must be a positive multiple of kv_heads 3"),
        ({"hidden_act": "gelu"}, "activation gelu"),
    ):
        path.write_text(json.dumps(whole | {"text_config": whole["text_config"] | change}))
        with pytest.raises(ValueError, match=message):
            load_policy(folder)
    path.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="has no text_config, vision_config"):
        load_policy(folder)


def test_a_run_folder_stands_for_its_last_checkpoint(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "last").symlink_to(folder)
    assert load_policy(tmp_path / "run", vlm=str(folder.parent / "vlm"))[0].config.cameras


@pytest.mark.parametrize(
    "place", ["", "checkpoints", "checkpoints/last", "checkpoints/last/pretrained_model"]
)
def test_lerobots_training_folder_stands_for_its_last_checkpoint(folder, tmp_path, place):
    """As lerobot-train leaves it: checkpoints/000002/pretrained_model, and a link to the newest."""
    there = tmp_path / "outputs" / "checkpoints" / "000002" / "pretrained_model"
    there.parent.mkdir(parents=True)
    folder.rename(there)
    (there.parents[1] / "last").symlink_to("000002")
    vlm = str(tmp_path / "vlm")
    assert load_policy(tmp_path / "outputs" / place, vlm=vlm)[0].config.state_dim == 6
    with pytest.raises(ValueError, match="no folder"):
        find_folder(str(tmp_path / "outputs" / "nowhere"))


def split_weights(folder: Path, change: dict[str, str] | None = None) -> None:
    """Store a folder's weights in two shards, as transformers does above 5 GB."""
    tensors = load_file(folder / WEIGHTS)
    files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == name}, folder / name)
    (folder / SHARDS).write_text(json.dumps({"metadata": {}, "weight_map": files | (change or {})}))
    (folder / WEIGHTS).unlink()


@pytest.mark.slow
def test_weights_in_shards_are_those_in_one_file(folder):
    want = load_policy(folder)[0].state_dict()
    split_weights(folder)
    got = load_policy(folder)[0].state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert "stored in float32" in run_model(folder).stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.state_proj.bias": "../secret.safetensors"},
            r"names a file '\.\./secret\.safetensors': only",
        ),
        ({"model.state_proj.bias": "/etc/passwd"}, "names a file '/etc/passwd': only a plain file name"),
        ({"model.state_proj.bias": [3]}, r"names a file \[3\]"),
        ({"model.state_proj.bias": "other.safetensors"}, r"other\.safetensors is missing"),
        ({"model.more": "model-00001-of-00002.safetensors"}, "lacks 'model.more', which model"),
    ],
)
def test_an_index_names_nothing_but_files_beside_it_that_hold_what_it_says(folder, change, message):
    split_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


def test_an_adapter_is_called_one_with_the_way_to_merge_it(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "lerobot/smolvla_base"})
    )
    with pytest.raises(ValueError, match=r"PEFT adapter of 'lerobot/smolvla_base'.*merge_and_unload\(\)"):
        load_policy(folder)


def test_fields_that_nobody_knows_are_ignored_and_handed_back(folder, tmp_path):
    edit_json(folder / "config.json", from_the_future={"a": 1})
    save_policy(tmp_path / "copy", *load_policy(folder))
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["from_the_future"] == {"a": 1}


def test_a_saved_width_multiplier_gives_the_expert_its_width_back():
    widths = [(part, whole) for whole in range(8, 1200, 8) for part in range(2, whole + 1, 2)]
    assert all(int(whole * multiplier(part, whole)) == part for part, whole in widths)
    assert any(
        int(whole * (part / whole)) != part for part, whole in widths
    )  # 30 of 88, plainly divided, is 29


# ---- language model -----------------------------------------------------------------------------------


def test_the_language_model_may_lie_in_any_folder_and_then_nothing_is_fetched(folder, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("went to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    (folder.parent / "vlm").rename(tmp_path / "elsewhere")
    edit_json(folder / "config.json", vlm_model_name="HuggingFaceTB/SmolVLM2-500M-Video-Instruct")
    policy, processor = load_policy(folder, vlm=str(tmp_path / "elsewhere"))
    save_policy(tmp_path / "copy", policy, processor)
    again, _ = load_policy(tmp_path / "copy")  # brings its own copy
    assert again.config == policy.config
    raw = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert raw["vlm_model_name"] == "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # lerobot fetches that


def test_the_hub_is_asked_for_the_pinned_revision_and_only_for_what_is_read(folder, monkeypatch):
    asked = []

    def serve(repo, revision, allow_patterns):
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(folder if repo == "owner/policy" else folder.parent / "vlm")

    monkeypatch.setattr("huggingface_hub.snapshot_download", serve)
    edit_json(folder / "config.json", vlm_model_name="owner/vlm")
    load_policy("owner/policy", revision="abc")
    load_policy("owner/policy@def", vlm="owner/vlm@123")
    policy, text = ("*.json", "*.safetensors"), ("*.json", "*.txt", "*.jinja")
    assert asked == [
        ("owner/policy", "abc", policy), ("owner/vlm", None, text),
        ("owner/policy", "def", policy), ("owner/vlm", "123", text),
    ]  # fmt: skip


def test_sizes_that_the_published_language_model_leaves_out_are_filled_in(folder):
    published = {
        "model_type": "smolvlm", "pad_token_id": 128002, "scale_factor": 4,
        "text_config": {
            "head_dim": 64, "hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15,
            "num_hidden_layers": 32, "num_key_value_heads": 5, "pad_token_id": 2, "rms_norm_eps": 1e-05,
            "rope_theta": 100000, "torch_dtype": "bfloat16", "vocab_size": 49280,
        },
        "vision_config": {
            "hidden_size": 768, "image_size": 512, "model_type": "smolvlm_vision", "num_attention_heads": 12,
            "patch_size": 16,
        },
    }  # fmt: skip
    language = dataclasses.replace(read_language(folder.parent / "vlm"), config=published)
    raw = json.loads((folder / "config.json").read_text()) | {"num_vlm_layers": 16, "prefix_length": 0}
    features = {"observation.state": {"type": "STATE", "shape": [8]}}
    features |= {n: {"type": "VISUAL", "shape": [3, 256, 256]} for n in PRESETS["base"].cameras}
    full = {name: getattr(PRESETS["base"], name) for name in ("chunk_size", "n_action_steps")}
    raw |= full | {"input_features": features, "max_state_dim": 32, "max_action_dim": 32, "prefix_length": -1}
    raw |= {"resize_imgs_with_padding": [512, 512], "tokenizer_max_length": 48}
    assert policy_config(raw, language) == PRESETS["base"]
    assert language.pad_id == 2  # not 128002, for which there is no embedding


def test_a_policy_starts_from_the_language_models_own_folder_with_a_fresh_expert(folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    own = {k.removeprefix(VLM): v.bfloat16() for k, v in tensors.items() if k.startswith(VLM)}
    last = {k: v for k, v in own.items() if "text_model.layers.3." in k}
    own |= {
        k.replace("layers.3.", "layers.4."): v.clone() for k, v in last.items()
    }  # deeper than what is kept
    vlm = folder.parent / "vlm"
    save_file(own, vlm / WEIGHTS)
    split_weights(vlm)
    preset = dataclasses.replace(tiny.CONFIG, width=128, expert_width=96)
    torch.manual_seed(5)
    policy, processor = start_from_vlm(preset, str(vlm), tiny.STATS, (3, 64, 64))
    assert (policy.config.width, policy.config.layers, policy.config.expert_width) == (64, 4, 48)
    theirs = {lerobot_key(n): p for n, p in policy.state_dict().items() if n.startswith(VLM_PARTS)}
    assert all(torch.equal(tensors[key].bfloat16().float(), p) for key, p in theirs.items())
    assert policy.expert.layers[0].self_attn.k_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    inputs = processor(tiny.batch(image=(64, 64)))
    assert policy.predict_chunk(inputs, tiny.flow()[0][:, 0]).isfinite().all()
    torch.manual_seed(5)
    again, _ = start_from_vlm(preset, str(vlm), tiny.STATS, (3, 64, 64))
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), again.parameters()))
    save_policy(tmp_path / "copy", policy, processor)
    assert load_policy(tmp_path / "copy")[0].config == policy.config


# ---- command line -------------------------------------------------------------------------------------


def run_model(*argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "model.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_model_py_says_what_a_checkpoint_is(folder):
    for path in folder.glob("policy_*processor_step*.safetensors"):
        save_file({k: v for k, v in load_file(path).items() if not k.startswith("action.")}, path)
    done = run_model(folder)
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    said = dict(rows)
    assert said["parameters"].startswith("493,564; trained with --freeze expert")
    assert "scsc" in said["expert"]
    assert [text for name, text in rows if name == "camera"] == [
        "observation.images.camera1 48 x 80", "observation.images.camera2 48 x 80",
    ]  # fmt: skip
    assert (said["state"], said["action"]) == (
        "6 of at most 16; MEAN_STD, statistics found", "7 of at most 12; MEAN_STD, statistics MISSING",
    )  # fmt: skip
    assert "n_action_steps 10" in said["chunk"]
    assert said["tokenizer"].startswith("272 of 320 ids")


@pytest.mark.slow
def test_model_py_ends_in_one_line_where_there_is_nothing_to_describe(tmp_path):
    done = run_model(tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/config.json is missing: copy the checkpoint again\n"
