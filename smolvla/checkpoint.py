"""lerobot's checkpoint folders, in and out: configuration, and weights under lerobot's names.

A folder holds `config.json`, `model.safetensors` and two processors with their statistics (processor.py); the
language model's own sizes and tokenizer live elsewhere, under `vlm_model_name`: a folder (relative to the
checkpoint, or not) or a hub id. Every published variant is read; what is written, lerobot reads.

    folder, raw, language, config = open_checkpoint("runs/demo/E0-s0", revision=None, vlm=None)
    python model.py runs/demo/E0-s0                # all of it in a screenful

The policy that such a folder fills is made in model.py and handed in here.

Source: lerobot 0.6.1 (policies/smolvla, policies/pretrained.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import safetensors
import torch
import torch.nn as nn
from torch import Tensor

from files import (
    NUMBER,
    Refused,
    check_finite,
    parse_json,
    plain_name,
    read_json,
    read_tensors,
    save_tensors,
    to_json,
)
from smolvla.config import EMPTY, SmolVLAConfig
from smolvla.fit import Fit, Shape, adapt, own_fit
from smolvla.folders import ADAPTER, SHARDS, WEIGHTS, find_folder
from smolvla.language import Language, fresh_language, language_config, language_sizes, read_language
from smolvla.processor import (
    ACTION,
    POST,
    PRE,
    STATE,
    STEPS,
    Processor,
    Statistics,
    choose_statistics,
    read_statistics,
    rename_map,
    sort_statistics,
)

WORLD_FILE = "world.safetensors"
Shapes = Shape | dict[str, Shape]  # of every camera's pictures, or each camera's
# Ours -> lerobot's, longest first; what is not listed sits directly under `model.`.
KEY_NAMES = {
    "vision.layers.": "model.vlm_with_expert.vlm.model.vision_model.encoder.layers.",
    "vision.post_layernorm.": "model.vlm_with_expert.vlm.model.vision_model.post_layernorm.",
    "vision.": "model.vlm_with_expert.vlm.model.vision_model.embeddings.",
    "connector.": "model.vlm_with_expert.vlm.model.connector.modality_projection.",
    "text.": "model.vlm_with_expert.vlm.model.text_model.",
    "lm_head.": "model.vlm_with_expert.vlm.lm_head.",
    "expert.": "model.vlm_with_expert.lm_expert.",
    "": "model.",
}
UNUSED = ("lm_head.weight", "text.norm.weight")  # may be missing: neither changes an action
SHOWN = 5  # tensors that do not fit
PROJECTIONS = ("state_proj.", "action_")  # stay in float32 whatever the rest is in, as lerobot builds them
VLM_PARTS = ("vision.", "connector.", "text.", "lm_head.")
# config.json's fields that SmolVLAConfig takes under the same name.
SAME_NAME = (
    "max_state_dim", "max_action_dim", "chunk_size", "n_action_steps", "num_steps", "prefix_length",
    "tokenizer_max_length", "min_period", "max_period", "empty_cameras", "attention_mode",
    "self_attn_every_n_layers",
)  # fmt: skip
LEROBOT_DEFAULTS = {
    "type": "smolvla", "n_obs_steps": 1, "input_features": {}, "output_features": {}, "device": "cpu",
    "use_amp": False, "use_peft": False, "push_to_hub": False, "repo_id": None, "private": None,
    "tags": None, "license": None, "pretrained_path": None, "pretrained_revision": None, "chunk_size": 50,
    "n_action_steps": 50,
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    "max_state_dim": 32, "max_action_dim": 32, "resize_imgs_with_padding": [512, 512], "empty_cameras": 0,
    "adapt_to_pi_aloha": False, "use_delta_joint_actions_aloha": False, "tokenizer_max_length": 48,
    "num_steps": 10, "use_cache": True, "freeze_vision_encoder": True, "train_expert_only": True,
    "train_state_proj": True, "optimizer_lr": 0.0001, "optimizer_betas": [0.9, 0.95],
    "optimizer_eps": 1e-08, "optimizer_weight_decay": 1e-10, "optimizer_grad_clip_norm": 10,
    "scheduler_warmup_steps": 1000, "scheduler_decay_steps": 30000, "scheduler_decay_lr": 2.5e-06,
    "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "load_vlm_weights": False,
    "add_image_special_tokens": False, "attention_mode": "cross_attn", "prefix_length": -1,
    "pad_language_to": "longest", "num_expert_layers": -1, "num_vlm_layers": 16,
    "self_attn_every_n_layers": 2, "expert_width_multiplier": 0.75, "min_period": 0.004, "max_period": 4.0,
    "rtc_config": None, "compile_model": False, "compile_mode": "max-autotune",
}  # fmt: skip
FEATURES = {str: {"type": str, "shape": [int]}}
CONFIG = {
    **{f"{name}?": type(LEROBOT_DEFAULTS[name]) for name in SAME_NAME if name in LEROBOT_DEFAULTS},
    **dict.fromkeys(("min_period?", "max_period?", "expert_width_multiplier?"), NUMBER),
    **dict.fromkeys(("num_vlm_layers?", "num_expert_layers?"), int),
    **dict.fromkeys(("type?", "vlm_model_name?", "pad_language_to?"), str),
    **dict.fromkeys(("adapt_to_pi_aloha?", "use_delta_joint_actions_aloha?"), bool),
    **dict.fromkeys(("add_image_special_tokens?", "train_state_proj?"), bool),
    **{"input_features?": FEATURES, "output_features?": FEATURES, "normalization_mapping?": {str: str}},
    "resize_imgs_with_padding?": ([int], type(None)),
}


# ---- names ---------------------------------------------------------------------------------


def lerobot_key(name: str) -> str:
    """Give lerobot's name of one of our parameters."""
    ours = next(prefix for prefix in KEY_NAMES if name.startswith(prefix))
    return KEY_NAMES[ours] + name[len(ours) :]


def plain_key(key: str) -> str:
    """Give a key as lerobot 0.6.1 writes it.

    Strips what torch.compile and DDP add, and undoes the nestings that other versions of transformers and
    lerobot have written: `vlm.text_model.`, `vlm.model.text_model.model.`, no leading `model.`.
    """
    key = key.replace("_orig_mod.", "").removeprefix("module.")
    if key.startswith(("vlm_with_expert.", *PROJECTIONS)):
        key = f"model.{key}"
    key = re.sub(
        r"(?<=vlm_with_expert\.vlm\.)(?:model\.)?(vision_model|connector|text_model)\.", r"model.\1.", key
    )
    return re.sub(r"(?<=\.)(vision_model|text_model|lm_expert)\.(?:model|\1)\.", r"\1.", key)


# ---- config -------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict:
    """Read a checkpoint's config.json with lerobot's defaults; raises Refused for what is not done here."""
    refuse_adapter(folder)
    path = folder / "config.json"
    raw = LEROBOT_DEFAULTS | read_json(path, CONFIG)
    if raw["type"] != "smolvla":
        raise Refused(f"{path} is of a policy of type {raw['type']!r}: only smolvla is read here")
    if raw["adapt_to_pi_aloha"] or raw["use_delta_joint_actions_aloha"]:
        raise Refused(f"{path} asks for adapt_to_pi_aloha, another robot's conventions: not supported here")
    for name, features in ((STATE, raw["input_features"]), (ACTION, raw["output_features"])):
        if name not in features:
            raise Refused(f"{path} has no feature {name} among {', '.join(features) or 'none'}")
    return raw


def policy_config(raw: dict, language: Language) -> SmolVLAConfig:
    """Join a checkpoint's config.json and its language model's into the sizes of a policy.

    Fields that nobody knows are ignored. Raises Refused for sizes that no policy can have.
    """
    inputs, outputs = raw["input_features"], raw["output_features"]
    cameras = [name for name, feature in inputs.items() if feature["type"] == "VISUAL"]
    empty = [f"{EMPTY}{i}" for i in range(raw["empty_cameras"])]
    sizes = language_sizes(language.config, raw)
    return SmolVLAConfig(
        cameras=tuple(dict.fromkeys(cameras + empty)),
        state_dim=inputs[STATE]["shape"][0],
        action_dim=outputs[ACTION]["shape"][0],
        expert_layers=raw["num_expert_layers"] if raw["num_expert_layers"] > 0 else sizes["layers"],
        expert_width=int(sizes["width"] * raw["expert_width_multiplier"]),
        image_special_ids=language.image_special_ids if raw["add_image_special_tokens"] else (),
        **sizes,
        **{name: raw[name] for name in SAME_NAME},
    )


def lerobot_config(config: SmolVLAConfig, vlm_name: str, shapes: Shapes) -> dict:
    """Write a fresh policy's config.json: lerobot's fields for this config, cameras of these shapes."""
    shapes = shapes if isinstance(shapes, dict) else dict.fromkeys(config.cameras, shapes)
    features = {name: {"type": "VISUAL", "shape": list(shapes[name])} for name in config.cameras}
    return LEROBOT_DEFAULTS | {name: getattr(config, name) for name in SAME_NAME} | {
        "input_features": features | {"observation.state": {"type": "STATE", "shape": [config.state_dim]}},
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
        "resize_imgs_with_padding": [config.image_size] * 2,
        "add_image_special_tokens": bool(config.image_special_ids),
        "vlm_model_name": vlm_name,
        "num_vlm_layers": config.layers,
        "num_expert_layers": config.expert_layers,
        "expert_width_multiplier": multiplier(config.expert_width, config.width),
    }  # fmt: skip


def multiplier(part: int, whole: int) -> float:
    """Give the factor that takes whole to part when the product is rounded down, as lerobot does."""
    factor = part / whole
    return factor if int(whole * factor) == part else math.nextafter(factor, math.inf)


# ---- weights ------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read a folder's weights, in one file or in shards, memory-mapped.

    Raises Refused for files that are missing or broken, for an index that names anything but files beside
    it or tensors that these lack, and for an adapter, whose weights are no policy's.
    """
    if (folder / WEIGHTS).is_file() or not (folder / SHARDS).is_file():
        refuse_adapter(folder)
        yield from read_tensors(folder / WEIGHTS).items()
        return
    table = read_json(folder / SHARDS, {"weight_map": {str: object}})["weight_map"]
    for name in sorted({plain_name(file, folder / SHARDS) for file in table.values()}):
        tensors = read_tensors(folder / name)
        if lost := [key for key, file in table.items() if file == name and key not in tensors]:
            raise Refused(f"{folder / name} lacks {lost[0]!r}, which {SHARDS} says it has: copy it again")
        yield from ((key, tensor) for key, tensor in tensors.items() if table.get(key) == name)


def refuse_adapter(folder: Path) -> None:
    """Raise Refused where a folder holds a PEFT adapter instead of weights."""
    if (folder / ADAPTER).is_file() and not (folder / WEIGHTS).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "an unnamed base"
        raise Refused(
            f"{folder} is a PEFT adapter of {base!r}, no policy: merge it where lerobot and peft are, "
            "PeftModel.from_pretrained(SmolVLAPolicy.from_pretrained(BASE), ADAPTER).merge_and_unload()"
            ".save_pretrained(NEW), and copy its policy_*processor* files to NEW"
        )


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read weights, under lerobot's present names, and the statistics that older ones keep among them."""
    tensors, statistics = {}, {}
    for key, value in read_folder(folder):
        plain = plain_key(key)
        if plain in tensors:
            raise Refused(f"{folder} has two tensors for {plain}, one of them {key}: keep one")
        (statistics if "normalize_" in plain else tensors)[plain] = value
    return tensors, statistics


def read_language_weights(folder: Path, layers: int) -> dict[str, Tensor]:
    """Read a language model's own weights under lerobot's names, the first text layers alone."""
    tensors = {}
    for key, value in read_folder(folder):
        key = plain_key(f"model.vlm_with_expert.vlm.{key}")
        layer = re.search(r"text_model\.layers\.(\d+)\.", key)
        if layer is None or int(layer[1]) < layers:
            tensors[key] = value
    return tensors


def place(
    policy: nn.Module,
    tensors: dict[str, Tensor],
    source: Path,
    dtype: torch.dtype = torch.float32,
    allow_missing: bool = False,
) -> None:
    """Put tensors under lerobot's names into a policy laid out on the meta device.

    Raises Refused that names missing, unexpected and misshapen tensors; with `allow_missing` only the last
    are errors, what is missing is drawn afresh and what is unexpected is left out.
    """
    wanted = {lerobot_key(name): (name, p) for name, p in policy.state_dict().items()}
    shapes = {key: tensor.shape for key, tensor in tensors.items() if key in wanted}
    problems = [
        f"{key} is {tuple(shape)}, not {tuple(wanted[key][1].shape)}"
        for key, shape in shapes.items()
        if shape != wanted[key][1].shape
    ]
    missing = {key: name for key, (name, _) in wanted.items() if key not in tensors and name not in UNUSED}
    if not allow_missing:
        problems += [f"missing {key}" for key in missing]
        problems += [f"unexpected {key}" for key in tensors if key not in wanted]
    if problems:
        hint = "" if allow_missing else " (--allow-missing goes on without what is missing or unexpected)"
        more = f"; and {len(problems) - SHOWN} more" * (len(problems) > SHOWN)
        raise Refused(f"{source} does not fit its config.json: {'; '.join(problems[:SHOWN])}{more}{hint}")
    draw(policy, set(missing.values()))
    state = {name: torch.zeros(p.shape) for name, p in wanted.values() if name in UNUSED}
    state |= {wanted[key][0]: tensors[key] for key in shapes}
    typed = {n: t.to(torch.float32 if n.startswith(PROJECTIONS) else dtype) for n, t in state.items()}
    check_finite(typed, source)
    policy.load_state_dict(typed, assign=True, strict=False)


def draw(policy: nn.Module, names: set[str]) -> None:
    """Draw these parameters as torch does for a fresh layer."""
    for prefix, module in policy.named_modules():
        if any(f"{prefix}.{name}" in names for name, _ in module.named_parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()


# ---- reading ------------------------------------------------------------------------------------------


def open_checkpoint(
    name: str, revision: str | None, vlm: str | None
) -> tuple[Path, dict, Language, SmolVLAConfig]:
    """Find a checkpoint, a run folder's last one too, and read what it is: config, language model, sizes."""
    folder = find_folder(name, revision)
    raw = read_config(folder)
    language = find_language(raw["vlm_model_name"], folder, vlm)
    try:
        return folder, raw, language, policy_config(raw, language)
    except Refused as error:  # sizes of two folders that make no policy
        raise Refused(f"{folder}: {error}") from error


def read_cameras(name: str, revision: str | None) -> tuple[list[str], dict[str, str]]:
    """Give the cameras that a checkpoint's config.json names, and its rename map, without its weights."""
    folder = find_folder(name, revision)
    features = read_config(folder)["input_features"]
    cameras = [n for n, f in features.items() if f["type"] == "VISUAL" and not n.startswith(EMPTY)]
    path = folder / f"{PRE}.json"
    return cameras, rename_map(read_json(path, STEPS)) if path.is_file() else {}


def find_language(name: str, folder: Path, vlm: str | None) -> Language:
    """Read the language model's folder: the one asked for, else the checkpoint's own, else what it names."""
    if vlm is None and (folder / "vlm").is_dir():
        return read_language(folder / "vlm")
    text = ("*.json", "*.txt", "*.jinja")
    return read_language(find_folder(vlm or name, relative_to=None if vlm else folder, patterns=text))


def load_processor(
    folder: Path,
    config: SmolVLAConfig,
    raw: dict,
    language: Language,
    among_weights: dict[str, Tensor],
    stats_of: str | None,
    allow_missing: bool,
    fit: Fit | None = None,
) -> Processor:
    """Read both processors with their statistics; before there were processors, the weights held these.

    Args: fit, what the checkpoint is brought to; default: what its own statistics know better.
    """
    features = [*raw["input_features"], *raw["output_features"]]
    before, after, found, found_after = {}, {}, sort_statistics(among_weights, features), {}
    if (folder / f"{PRE}.json").is_file():
        before, after = (read_json(folder / f"{name}.json", STEPS) for name in (PRE, POST))
        found = read_statistics(folder, before, features) or found
        found_after = read_statistics(folder, after, features)
    try:
        stats, stats_after = (choose_statistics(x, stats_of) for x in (found, found_after or found))
        fit, notes = fit or own_fit(config, before, stats), []
        if fit is not None:
            config, raw, before, after, notes = adapt(config, raw, before, after, fit)
            stats, stats_after = (fit.stats or x for x in (stats, stats_after))
        made = (config, raw, language, stats, before, after, stats_after, allow_missing)
        return Processor(*made, notes=notes)
    except Refused as error:
        named = ", ".join(sorted(name for name in found if name))
        hint = f"; there are those of {named}: choose with --stats-of" if named and stats_of is None else ""
        raise Refused(f"{folder}: {error}{hint}") from error


# ---- starting -----------------------------------------------------------------------------------------


def fresh_processor(
    config: SmolVLAConfig,
    stats: Statistics,
    instructions: list[str],
    shapes: Shapes,
) -> Processor:
    """Make the processor of a policy from scratch; its tokenizer is built from the instructions."""
    raw = lerobot_config(config, "vlm", shapes)
    return Processor(config, raw, fresh_language(language_config(config), instructions), stats)


# ---- writing ------------------------------------------------------------------------------------------


def save_policy(folder: Path, policy: nn.Module, processor: Processor) -> None:
    """Write what lerobot loads: config, weights under its names, processors; beside them the language folder.

    Memory modules (`fusion.`) are not lerobot's and are left out; arm.py writes them. Raises Refused for
    weights that are not finite.
    """
    weights = {lerobot_key(n): p for n, p in policy.state_dict().items() if not n.startswith("fusion.")}
    check_finite(weights, folder / WEIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    raw = processor.raw | {name: getattr(policy.config, name) for name in SAME_NAME}
    save_tensors(weights, folder / WEIGHTS)
    (folder / "config.json").write_text(to_json(raw, indent=4))
    processor.save(folder)
    (folder / "vlm").mkdir(exist_ok=True)
    for name, content in processor.language.files.items():
        (folder / "vlm" / name).write_bytes(content)


# ---- describing ---------------------------------------------------------------------------------------


def describe_checkpoint(folder: Path, policy: nn.Module, processor: Processor) -> str:
    """Say what a checkpoint is, in a screenful: sizes, pattern, cameras, widths, statistics, tokenizer."""
    c, raw, language = policy.config, processor.raw, processor.language
    stored = sorted({str(t.dtype).removeprefix("torch.") for _, t in read_folder(folder)})
    total = sum(p.numel() for p in policy.parameters())
    rows = [
        ("checkpoint", f"{folder}, stored in {', '.join(stored)}"),
        ("parameters", f"{total:,}; trained with {count_trained(policy, raw)}"),
        ("vision", f"{c.vision_layers} layers of width {c.vision_width}, {c.vision_heads} heads"),
        ("pictures", f"{c.image_size} x {c.image_size} by {c.patch_size}, {c.image_tokens} tokens"),
        ("text", f"{c.layers} layers of width {c.width}, {c.heads} heads ({c.kv_heads} key) of {c.head_dim}"),
        ("expert", f"{c.expert_layers} layers of width {c.expert_width}: {describe_pattern(c)}"),
        *(("camera", f"{name} {describe_camera(processor, name)}") for name in c.cameras),
        ("state", f"{c.state_dim} of at most {c.max_state_dim}; {describe_statistics(processor, STATE)}"),
        ("action", f"{c.action_dim} of at most {c.max_action_dim}; {describe_statistics(processor, ACTION)}"),
        ("chunk", f"{c.chunk_size} actions, n_action_steps {c.n_action_steps}, {c.num_steps} Euler steps"),
        ("language", f"at most {c.tokenizer_max_length} tokens, padded to {raw['pad_language_to']}"),
        ("tokenizer", f"{language.tokenizer.get_vocab_size():,} of {c.vocab_size:,} ids, {language.source}"),
        *(("note", note) for note in processor.notes),
    ]  # fmt: skip
    arm = stored_arm(folder)
    if arm is not None:
        memory = "" if arm["fusion"] == ["none"] else f" --memory {arm['memory']}"
        rows.append(("memory", f"--fusion {' '.join(arm['fusion'])}{memory}"))
    return "\n".join(f"{name:12s} {text}" for name, text in rows)


def stored_arm(folder: Path) -> dict | None:
    """Read the configuration that an arm's file holds beside its tensors; None where there is no such file.

    Raises Refused where the file is damaged.
    """
    path = folder / WORLD_FILE
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("config", "")
        return parse_json(text, {"fusion": [str], "memory": str})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error}): take the checkpoint before it") from error


def count_trained(policy: nn.Module, raw: dict) -> str:
    counts = []
    for what in ("expert", "vision", "none"):
        policy.freeze(what, raw["train_state_proj"])
        live = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        counts.append(f"--freeze {what} {live:,}")
    return ", ".join(counts)


def describe_pattern(config: SmolVLAConfig) -> str:
    """Say what each expert layer attends to: `s` itself and the prefix, `c` the prefix alone."""
    kinds = ["s" if config.is_self_layer(i * config.stride) else "c" for i in range(config.expert_layers)]
    beside = "every text layer" if config.stride == 1 else f"one in {config.stride} text layers"
    return f"{''.join(kinds)} (s self and prefix, c prefix alone), beside {beside}"


def describe_camera(processor: Processor, name: str) -> str:
    if name not in processor.config.given_cameras:
        return "(a black picture stands in)"
    shape = processor.raw["input_features"][name]["shape"]
    outside = [old for old, new in rename_map(processor.before).items() if new == name]
    return f"{shape[1]} x {shape[2]}" + f", named {' or '.join(outside)} outside" * bool(outside)


def describe_statistics(processor: Processor, feature: str) -> str:
    mode, missing = processor.mode(feature), " ".join(processor.missing())
    if mode == "IDENTITY":
        return "taken as it is"
    return f"{mode}, statistics {'MISSING' if f' of {feature} ' in missing else 'found'}"
