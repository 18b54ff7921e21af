"""lerobot's checkpoint folders, in and out: config, weights under their key names, statistics, tokenizer.

A folder holds `config.json`, `model.safetensors` and two processor files with their statistics; the language
model's own sizes and tokenizer live elsewhere, under `vlm_model_name`: a folder (relative to the checkpoint,
or not) or a hub id. `Processor` is what stands between raw observations and the policy: normalisation and
tokens, exactly as lerobot's.

    policy, processor = load_policy("runs/demo/E0-s0/last")        # a folder of ours or of lerobot's
    policy, processor = load_policy("HuggingFaceVLA/smolvla_libero", revision="...")

Sources: lerobot 0.6.1 (processor/normalize_processor.py, policies/smolvla), SmolVLM2's config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from model import SmolVLA, SmolVLAConfig

WEIGHTS = "model.safetensors"
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


# ---- names and places ---------------------------------------------------------------------------------


def find_folder(
    name: str,
    revision: str | None = None,
    relative_to: Path | None = None,
    patterns: tuple[str, ...] = ("*",),
) -> Path:
    """Find a folder: beside `relative_to`, as a path, or else as a hub id (owner/name) at `revision`.

    Raises ValueError when it is neither a folder nor of a hub id's form.
    """
    for path in ([relative_to / name] if relative_to else []) + [Path(name)]:
        if path.is_dir():
            return path
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise ValueError(f"no folder {name!r}: give a checkpoint folder, or a hub id of the form owner/name")
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def read_json(path: Path) -> dict:
    """Read a JSON file; a missing or broken one is a ValueError that names it."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: a checkpoint folder needs it")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy the checkpoint again") from error


def lerobot_key(name: str) -> str:
    """Give lerobot's name of one of our parameters."""
    ours = next(prefix for prefix in KEY_NAMES if name.startswith(prefix))
    return KEY_NAMES[ours] + name[len(ours) :]


def plain_key(key: str) -> str:
    """Strip what torch.compile and DDP add to names."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


# ---- config -------------------------------------------------------------------------------------------


def policy_config(raw: dict, vlm: dict) -> SmolVLAConfig:
    """Join a checkpoint's config.json and its language model's into the sizes of a policy.

    Raises ValueError for what this project does not do (Aloha adaptation, image special tokens for now).
    """
    raw = LEROBOT_DEFAULTS | raw
    if raw["adapt_to_pi_aloha"] or raw["use_delta_joint_actions_aloha"]:
        raise ValueError(
            "config.json asks for adapt_to_pi_aloha, another robot's conventions: not supported here"
        )
    if raw["add_image_special_tokens"]:
        raise ValueError("config.json asks for add_image_special_tokens: not supported yet")
    text, vision = vlm["text_config"], vlm["vision_config"]
    size = tuple(raw["resize_imgs_with_padding"] or ())
    if size != (vision["image_size"],) * 2:
        raise ValueError(
            f"resize_imgs_with_padding {size} differs from the tower's image size {vision['image_size']}"
        )
    width = text["hidden_size"]
    layers = raw["num_vlm_layers"] if raw["num_vlm_layers"] > 0 else text["num_hidden_layers"]
    features = raw["input_features"]
    return SmolVLAConfig(
        cameras=tuple(name for name, f in features.items() if f["type"] == "VISUAL"),
        state_dim=features["observation.state"]["shape"][0],
        action_dim=raw["output_features"]["action"]["shape"][0],
        vision_width=vision["hidden_size"],
        vision_mlp=vision["intermediate_size"],
        vision_layers=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"],
        vision_eps=vision.get("layer_norm_eps", 1e-6),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        scale_factor=vlm["scale_factor"],
        width=width,
        mlp=text["intermediate_size"],
        layers=layers,
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or width // text["num_attention_heads"],
        vocab_size=text["vocab_size"],
        eps=text.get("rms_norm_eps", 1e-5),
        expert_layers=raw["num_expert_layers"] if raw["num_expert_layers"] > 0 else layers,
        expert_width=int(width * raw["expert_width_multiplier"]),
        **{name: raw[name] for name in SAME_NAME},
    )


def lerobot_config(config: SmolVLAConfig, vlm_name: str, image_shape: tuple[int, int, int]) -> dict:
    """Write a fresh policy's config.json: lerobot's fields for this config, cameras of `image_shape`."""
    features = {name: {"type": "VISUAL", "shape": list(image_shape)} for name in config.cameras}
    return LEROBOT_DEFAULTS | {name: getattr(config, name) for name in SAME_NAME} | {
        "input_features": features | {"observation.state": {"type": "STATE", "shape": [config.state_dim]}},
        "output_features": {"action": {"type": "ACTION", "shape": [config.action_dim]}},
        "resize_imgs_with_padding": [config.image_size] * 2,
        "vlm_model_name": vlm_name,
        "num_vlm_layers": config.layers,
        "num_expert_layers": config.expert_layers,
        "expert_width_multiplier": config.expert_width / config.width,
    }  # fmt: skip


def vlm_config(config: SmolVLAConfig) -> dict:
    """Write the language model's config.json for a fresh policy, in SmolVLM's layout."""
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "scale_factor": config.scale_factor,
        "tie_word_embeddings": False,
        "pad_token_id": 2,
        "text_config": {
            "model_type": "llama",
            "hidden_size": config.width,
            "intermediate_size": config.mlp,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.eps,
            "pad_token_id": 2,
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": config.vision_width,
            "intermediate_size": config.vision_mlp,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "layer_norm_eps": config.vision_eps,
        },
    }


# ---- processor ----------------------------------------------------------------------------------------


def build_tokenizer(instructions: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the instructions: lossless for any text, short for those."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],  # ids 0, 1, 2, as SmolVLM's
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted({text + "\n" for text in instructions}), trainer)
    return tokenizer


@dataclass
class Processor:
    """Raw observations -> policy inputs, and normalised actions -> the robot's: lerobot's two processors."""

    config: SmolVLAConfig
    raw: dict  # lerobot's config.json
    vlm: dict  # the language model's config.json
    stats: dict[str, dict[str, Tensor]]  # feature -> statistic -> (width,)
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self._ids: dict[str, list[int]] = {}
        for feature in ("observation.state", "action"):
            mode = self.mode(feature)
            needed = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "IDENTITY": ()}.get(mode)
            if needed is None:
                raise ValueError(
                    f"normalization_mapping {mode!r} of {feature} is unknown: MEAN_STD, MIN_MAX or IDENTITY"
                )
            missing = [name for name in needed if name not in self.stats.get(feature, {})]
            if missing:
                raise ValueError(
                    f"statistics {', '.join(missing)} of {feature} are missing: {mode} needs them"
                )

    def mode(self, feature: str) -> str:
        return self.raw["normalization_mapping"]["ACTION" if feature == "action" else "STATE"]

    def normalise(self, feature: str, x: Tensor, eps: float = 1e-8) -> Tensor:
        """Normalise a state or an action (..., width) with the checkpoint's statistics."""
        s = {name: value.to(x) for name, value in self.stats.get(feature, {}).items()}
        if self.mode(feature) == "MEAN_STD":
            return (x - s["mean"]) / (s["std"] + eps)
        if self.mode(feature) == "MIN_MAX":
            span = s["max"] - s["min"]
            return 2 * (x - s["min"]) / torch.where(span == 0, eps, span) - 1
        return x

    def unnormalise(self, action: Tensor, eps: float = 1e-8) -> Tensor:
        """Give actions (..., A) in the robot's units."""
        s = {name: value.to(action) for name, value in self.stats.get("action", {}).items()}
        if self.mode("action") == "MEAN_STD":
            return action * s["std"] + s["mean"]
        if self.mode("action") == "MIN_MAX":
            span = s["max"] - s["min"]
            return (action + 1) / 2 * torch.where(span == 0, eps, span) + s["min"]
        return action

    def tokenize(self, tasks: list[str]) -> tuple[Tensor, Tensor]:
        """Turn instructions into token ids and mask, (B, n) each; an empty instruction is an error."""
        for task in tasks:
            if not task or not task.strip():
                raise ValueError(
                    f"an instruction is empty ({task!r}): a policy without one cannot know its task"
                )
            if task not in self._ids:
                text = task if task.endswith("\n") else task + "\n"
                ids = self.tokenizer.encode(text, add_special_tokens=False).ids
                self._ids[task] = ids[: self.config.tokenizer_max_length]
        rows = [self._ids[task] for task in tasks]
        fixed = self.raw["pad_language_to"] == "max_length"
        length = self.config.tokenizer_max_length if fixed else max(map(len, rows))
        tokens = torch.full((len(rows), length), self.vlm.get("pad_token_id") or 0)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return tokens, mask

    def __call__(self, batch: dict) -> dict:
        """Make the policy's inputs from a batch under lerobot's feature names.

        Args: batch with camera images (B, 3, h, w) uint8 or float in [0, 1], "observation.state" (B, S),
        "task" (list of str), and for training "action" (B, C, A) and "action_is_pad" (B, C);
        "<camera>_padding_mask" (B,) where given. Raises ValueError when no camera of the checkpoint is in
        the batch.
        """
        cameras = [name for name in self.config.cameras if name in batch]
        if not cameras:
            raise ValueError(
                f"none of the cameras {', '.join(self.config.cameras)} is in the batch: {', '.join(batch)}"
            )
        images = [
            batch[name].float() / 255 if batch[name].dtype == torch.uint8 else batch[name] for name in cameras
        ]
        masks = [batch.get(f"{name}_padding_mask") for name in cameras]
        state = self.normalise("observation.state", batch["observation.state"].float())
        for _ in range(min(self.config.empty_cameras, len(self.config.cameras) - len(cameras))):
            images.append(images[0].new_zeros(1, 3, self.config.image_size, self.config.image_size))
            masks.append(torch.zeros(len(state), dtype=torch.bool, device=state.device))
        tokens, token_mask = (x.to(state.device) for x in self.tokenize(batch["task"]))
        inputs = {
            "images": images,
            "image_masks": masks,
            "state": state,
            "tokens": tokens,
            "token_mask": token_mask,
        }
        if "action" in batch:
            inputs |= {
                "action": self.normalise("action", batch["action"]),
                "is_pad": batch.get("action_is_pad"),
            }
        return inputs


# ---- reading ------------------------------------------------------------------------------------------


def load_policy(name: str | Path, revision: str | None = None) -> tuple[SmolVLA, Processor]:
    """Load a policy in float32 and its processor: a folder in lerobot's layout, or a hub id at a revision.

    Raises ValueError, one line, for missing or broken files, tensors that do not fit and missing statistics.
    """
    folder = find_folder(str(name), revision)
    raw = LEROBOT_DEFAULTS | read_json(folder / "config.json")
    vlm_folder = folder / "vlm"  # what we save is complete; lerobot's name a folder or a hub id
    if not vlm_folder.is_dir():
        vlm_folder = find_folder(raw["vlm_model_name"], relative_to=folder, patterns=("*.json",))
    vlm = read_json(vlm_folder / "config.json")
    config = policy_config(raw, vlm)
    tokenizer = Tokenizer.from_file(str(vlm_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    processor = Processor(config, raw, vlm, load_statistics(folder), tokenizer)
    return load_weights(config, folder / WEIGHTS), processor


def load_weights(config: SmolVLAConfig, path: Path) -> SmolVLA:
    """Build a policy on one file's weights, float32; every tensor must fit, none be missing or left."""
    try:
        tensors = {plain_key(key): value for key, value in load_file(path).items()}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: a checkpoint folder needs it") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): copy the checkpoint again") from error
    with torch.device("meta"):  # no memory and no random draws for weights that are about to be replaced
        policy = SmolVLA(config)
    wanted = {lerobot_key(name): (name, p) for name, p in policy.state_dict().items()}
    state, problems = {}, [f"unexpected {key}" for key in tensors if key not in wanted]
    for key, (ours, parameter) in wanted.items():
        if key not in tensors and ours in UNUSED:
            state[ours] = torch.zeros(parameter.shape)
        elif key not in tensors:
            problems.append(f"missing {key}")
        elif tensors[key].shape != parameter.shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)}, not {tuple(parameter.shape)}")
        else:
            state[ours] = tensors[key].float()
    if problems:
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(problems)}")
    policy.load_state_dict(state, assign=True)
    return policy


def load_statistics(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the normaliser's statistics, feature -> statistic -> tensor, from the file that the JSON names."""
    steps = read_json(folder / "policy_preprocessor.json")["steps"]
    file = next((s["state_file"] for s in steps if s["registry_name"] == "normalizer_processor"), None)
    stats: dict[str, dict[str, Tensor]] = {}
    if file is None:
        return stats
    for key, value in load_file(folder / file).items():
        feature, name = key.rsplit(".", 1)
        stats.setdefault(feature, {})[name] = value.float()
    return stats


# ---- writing ------------------------------------------------------------------------------------------


def fresh_processor(
    config: SmolVLAConfig,
    stats: dict[str, dict[str, Tensor]],
    instructions: list[str],
    image_shape: tuple[int, int, int],
) -> Processor:
    """Make the processor of a policy from scratch; its tokenizer is built from the instructions."""
    raw = lerobot_config(config, "vlm", image_shape)
    return Processor(config, raw, vlm_config(config), stats, build_tokenizer(instructions, config.vocab_size))


def save_policy(folder: Path, policy: SmolVLA, processor: Processor) -> None:
    """Write what lerobot loads: config, weights under its names, processors, the language model's config.

    Memory modules (`fusion.`) are not lerobot's and are left out; arm.py writes them beside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = processor.raw | {name: getattr(policy.config, name) for name in SAME_NAME}
    weights = {
        lerobot_key(n): p.contiguous() for n, p in policy.state_dict().items() if not n.startswith("fusion.")
    }
    save_file(weights, folder / WEIGHTS)
    write_json(folder / "config.json", raw)
    save_processors(folder, raw, processor.stats)
    vlm = folder / "vlm"
    vlm.mkdir(exist_ok=True)
    write_json(vlm / "config.json", processor.vlm)
    write_json(
        vlm / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "pad_token": "<|im_end|>"}
    )
    processor.tokenizer.save(str(vlm / "tokenizer.json"))


def save_processors(folder: Path, raw: dict, stats: dict[str, dict[str, Tensor]]) -> None:
    """Write lerobot's pre- and postprocessor descriptions and the statistics that they name."""
    norm = {"eps": 1e-8, "norm_map": raw["normalization_mapping"]}
    files = (
        "policy_preprocessor_step_5_normalizer_processor",
        "policy_postprocessor_step_0_unnormalizer_processor",
    )
    tokens = {
        "max_length": raw["tokenizer_max_length"],
        "task_key": "task",
        "padding_side": "right",
        "padding": raw["pad_language_to"],
        "truncation": True,
        "tokenizer_name": raw["vlm_model_name"],
    }
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    steps = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "smolvla_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": tokens},
        device,
        {
            "registry_name": "normalizer_processor",
            "config": norm | {"features": raw["input_features"] | raw["output_features"]},
            "state_file": f"{files[0]}.safetensors",
        },
    ]
    write_json(folder / "policy_preprocessor.json", {"name": "policy_preprocessor", "steps": steps})
    post = {
        "registry_name": "unnormalizer_processor",
        "config": norm | {"features": raw["output_features"]},
        "state_file": f"{files[1]}.safetensors",
    }
    write_json(
        folder / "policy_postprocessor.json", {"name": "policy_postprocessor", "steps": [post, device]}
    )
    flat = {
        f"{feature}.{name}": t.contiguous() for feature, entry in stats.items() for name, t in entry.items()
    }
    for file in files:
        save_file(flat, folder / f"{file}.safetensors")


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")
