"""Record golden folders from lerobot itself: small policies of many configurations, every tensor of a pass.

Needs lerobot (made with 0.6.1, torch 2.13.0, transformers 5.5.4, on a CPU in float32) in an environment of
its own; the project never imports it. Weights are drawn from a seed, large enough that a wrong mask, rope,
scale or layout shows as an error of 0.1 to 3, not of 1e-6.

    python tests/make_golden.py tests/golden            # one folder a case, beside the one named smolvla
    python tests/make_golden.py --double tests/golden   # float64 tensors beside those of every folder there
    python tests/golden.py tests/golden/cross           # this project's numbers against a folder's
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.common import flow_matching, vla_utils
from lerobot.policies.common.vla_utils import make_att_2d_masks, resize_with_pad
from lerobot.policies.smolvla import modeling_smolvla as smolvla_modeling
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.smolvlm import modeling_smolvlm

TASKS = ["pick up the black bowl and place it on the plate", "open the drawer"]
STATE, ACTION = "observation.state", "action"
# Of the float64 pass: what is copied, not computed, and what needs the processors, which are float32.
LEFT_OUT = (
    "pre.",
    "state_padded",
    "actions_padded",
    "action_chunk_unnormalized",
    "suffix.time_emb",
    "suffix.att",
)


@dataclass
class Case:
    """One configuration: the policy's, its language model's, and what the batch looks like."""

    policy: dict
    cameras: dict[str, tuple[int, int]]  # name -> height, width of its pictures
    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    scale_factor: int = 2
    norm: dict = field(default_factory=lambda: {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"})
    absent: tuple[str, ...] = ()  # cameras of the configuration that the batch lacks
    masked: tuple[str, ...] = ()  # cameras whose second sample is marked as padding
    rename: dict[str, str] = field(default_factory=dict)  # what the batch calls a feature -> its name
    time_axis: bool = False  # give states and pictures a leading axis of two observations
    state_dim: int = 8
    action_dim: int = 7


CASES = {
    # What is published about smolvla_libero: all text layers, narrow expert, cross attention everywhere.
    "cross": Case(
        policy={
            "num_vlm_layers": 0, "self_attn_every_n_layers": 0, "expert_width_multiplier": 0.5,
            "n_action_steps": 1, "prefix_length": 0,
        },
        cameras={"image": (64, 64), "image2": (24, 24)},
        text={"num_hidden_layers": 3},
        norm={"STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        rename={"observation.images.agentview": "observation.images.image"},
    ),
    # Fewer expert layers, special tokens, every padding, three cameras, inner width unlike the hidden one.
    "skip": Case(
        policy={
            "num_vlm_layers": 4, "num_expert_layers": 2, "self_attn_every_n_layers": 4,
            "add_image_special_tokens": True, "prefix_length": 60, "pad_language_to": "max_length",
            "train_expert_only": False, "num_steps": 4,
        },
        cameras={"camera1": (32, 32), "camera2": (40, 24), "camera3": (24, 40)},
        text={"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4},
        norm={"STATE": "IDENTITY", "ACTION": "MEAN_STD"},
        masked=("camera2",),
    ),
    # No cross attention, absent cameras with and without a stand-in, everything trains but the state's layer.
    "self": Case(
        policy={
            "attention_mode": "self_attn", "num_vlm_layers": 2, "empty_cameras": 1, "num_steps": 3,
            "train_expert_only": False, "freeze_vision_encoder": False, "train_state_proj": False,
            "n_action_steps": 2,
        },
        cameras={"left": (32, 32), "right": (32, 32)},
        absent=("left",),
        norm={"STATE": "QUANTILES", "ACTION": "QUANTILES"},
    ),
    # Self attention by the pattern, a full-width expert, pictures smaller than the tower's, two observations.
    "every": Case(
        policy={
            "self_attn_every_n_layers": 1, "num_vlm_layers": 2, "expert_width_multiplier": 1.0,
            "num_steps": 1, "resize_imgs_with_padding": (40, 40), "train_expert_only": False,
            "freeze_vision_encoder": False,
        },
        cameras={"top": (30, 50)},
        vision={"image_size": 64},
        scale_factor=1,
        norm={"STATE": "QUANTILE10", "ACTION": "QUANTILE10"},
        time_axis=True,
    ),
    # Three text layers an expert layer, all cross attention; VLM layers cut from a longer stack.
    "stride": Case(
        policy={
            "num_vlm_layers": 6, "num_expert_layers": 2, "self_attn_every_n_layers": -1,
            "train_expert_only": False, "num_steps": 2, "min_period": 1e-2, "max_period": 2.0,
        },
        cameras={"front": (48, 32)},
        text={"num_hidden_layers": 7, "num_key_value_heads": 4},
        norm={"STATE": "MEAN_STD", "ACTION": "IDENTITY"},
    ),
}  # fmt: skip


def vlm_folder(case: Case, tokenizer: Path, folder: Path) -> Path:
    """Write a language model's folder: its sizes and a tiny tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    raw = json.loads((tokenizer / "config.json").read_text())
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    raw["text_config"] |= text | case.text
    raw["vision_config"] |= vision | case.vision
    raw["scale_factor"] = case.scale_factor
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return folder


def draw_weights(policy: SmolVLAPolicy) -> None:
    """Fill the policy with seeded weights of a size that makes mistakes visible, exact in bfloat16."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            draw = torch.randn(p.shape, generator=g)
            if p.ndim == 1:
                value = draw * 0.2 + (0.0 if name.endswith("bias") else 1.0)
            else:
                value = draw * 1.3 / p[0].numel() ** 0.5
            p.copy_(value.bfloat16().float())  # such weights pack into half of the space in git


def make_batch(case: Case, config: SmolVLAConfig) -> tuple[dict, dict]:
    """Draw (raw observations and actions as recorded in inputs.safetensors, noise and time)."""
    stats = make_stats(case)
    g, batch = torch.Generator().manual_seed(11), len(TASKS)
    back = {new: old for old, new in case.rename.items()}
    raw: dict[str, Tensor] = {}
    for i, (name, (h, w)) in enumerate(case.cameras.items()):
        key = f"observation.images.{name}"
        if name in case.absent:
            continue
        shape = (batch, 2, 3, h, w) if case.time_axis else (batch, 3, h, w)
        raw[f"{back.get(key, key)}.uint8"] = torch.randint(
            256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(100 + i)
        )
        if name in case.masked:
            raw[f"{key}_padding_mask"] = torch.tensor([True, False])
    width = case.state_dim
    raw["raw_state"] = torch.randn((batch, 2, width) if case.time_axis else (batch, width), generator=g)
    raw["raw_action"] = torch.randn(batch, config.chunk_size, case.action_dim, generator=g)
    for name, feature in (("raw_state", STATE), ("raw_action", ACTION)):
        raw[name][..., -1] = stats[feature]["mean"][-1]  # the dimension that never moves
    raw["action_is_pad"] = torch.arange(config.chunk_size) >= torch.tensor([config.chunk_size, 3])[:, None]
    noise = torch.randn(batch, config.chunk_size, config.max_action_dim, generator=g)
    return raw, {"noise": noise, "time": torch.tensor([0.35, 0.8])}


def make_stats(case: Case) -> dict[str, dict[str, Tensor]]:
    """Draw statistics of every kind that a mapping may ask for; one dimension never moves."""
    g, stats = torch.Generator().manual_seed(13), {}
    for feature, width in ((STATE, case.state_dim), (ACTION, case.action_dim)):
        mean, std = torch.randn(width, generator=g) * 0.3, torch.rand(width, generator=g) + 0.5
        low, high = mean - 2.5 * std, mean + 2.5 * std
        low[-1] = high[-1] = mean[-1]  # a range of zero
        stats[feature] = {"mean": mean, "std": std, "min": low, "max": high}
        for name, share in (("q01", 0.9), ("q99", 0.9), ("q10", 0.5), ("q90", 0.5)):
            edge = low if name in ("q01", "q10") else high
            stats[feature][name] = mean + share * (edge - mean)
    return stats


def build(case: Case, folder: Path, tokenizer: Path) -> tuple[SmolVLAPolicy, object, object]:
    """Construct the policy and its processors, and save them as lerobot does."""
    vlm = vlm_folder(case, tokenizer, folder / "vlm")
    features = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, h, w))
        for name, (h, w) in case.cameras.items()
    }
    settings = {
        "chunk_size": 6, "n_action_steps": 6, "max_state_dim": 12, "max_action_dim": 10,
        "tokenizer_max_length": 20, "resize_imgs_with_padding": (32, 32),
    }  # fmt: skip
    config = SmolVLAConfig(
        input_features=features | {STATE: PolicyFeature(FeatureType.STATE, (case.state_dim,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (case.action_dim,))},
        normalization_mapping={"VISUAL": NormalizationMode.IDENTITY}
        | {kind: NormalizationMode(mode) for kind, mode in case.norm.items()},
        vlm_model_name=str(vlm),
        device="cpu",
        push_to_hub=False,
        **settings | case.policy,
    )
    policy = SmolVLAPolicy(config)
    draw_weights(policy)
    pre, post = make_smolvla_pre_post_processors(config, dataset_stats=make_stats(case))
    next(s for s in pre.steps if hasattr(s, "rename_map")).rename_map = dict(case.rename)
    checkpoint = folder / "checkpoint"
    policy.save_pretrained(checkpoint)
    pre.save_pretrained(checkpoint)
    post.save_pretrained(checkpoint)
    (checkpoint / "README.md").unlink(missing_ok=True)
    for path in checkpoint.glob("*.json"):  # the folder may be copied anywhere: name the VLM beside it
        path.write_text(path.read_text().replace(str(vlm), "../vlm"))
    return policy, pre, post


def to_batch(raw: dict) -> dict:
    """Give what lerobot's processor takes: float pictures in [0, 1] under the batch's own names."""
    batch = {
        name.removesuffix(".uint8"): x.float() / 255 for name, x in raw.items() if name.endswith(".uint8")
    }
    batch |= {name: x for name, x in raw.items() if name.endswith("_padding_mask")}
    return batch | {
        STATE: raw["raw_state"], ACTION: raw["raw_action"], "action_is_pad": raw["action_is_pad"],
        "task": list(TASKS),
    }  # fmt: skip


def prefix_pass(policy: SmolVLAPolicy, batch: dict) -> tuple[dict[str, Tensor], tuple]:
    """Record the prefix: prepared pictures, embeddings, masks, keys and values of every text layer."""
    flow = policy.model
    images, masks = policy.prepare_images(batch)
    state, action = policy.prepare_state(batch), policy.prepare_action(batch)
    tokens, token_mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    out = {"pre.state": batch[STATE], "pre.action": batch[ACTION]}
    out |= {"lang_tokens": tokens, "lang_mask": token_mask, "state_padded": state, "actions_padded": action}
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        out |= {f"image{i}.prepared": image, f"image{i}.mask": mask}
    vlm = flow.vlm_with_expert.get_vlm_model()
    out["image0.vision_last_hidden"] = vlm.vision_model(pixel_values=images[0]).last_hidden_state
    out["image0.connector_out"] = vlm.connector(out["image0.vision_last_hidden"])
    embs, pad, att = flow.embed_prefix(images, masks, tokens, token_mask, state=state)
    visible, position = make_att_2d_masks(pad, att), torch.cumsum(pad, dim=1) - 1
    (hidden, _), cache = flow.vlm_with_expert.forward(
        attention_mask=visible, position_ids=position, past_key_values=None, inputs_embeds=[embs, None],
        use_cache=True,
    )  # fmt: skip
    out |= {"prefix.embs": embs, "prefix.pad_masks": pad, "prefix.att_masks": att}
    out |= {
        "prefix.position_ids": position,
        "prefix.att_2d_masks": visible,
        "prefix.hidden_final_normed": hidden,
    }
    for i, layer in enumerate(cache.layers):
        out |= {f"kv.{i}.key": layer.keys.transpose(1, 2), f"kv.{i}.value": layer.values.transpose(1, 2)}
    return out, (images, masks, tokens, token_mask, state, action)


GRADIENTS = (
    "model.action_in_proj.weight",
    "model.state_proj.weight",
    "model.vlm_with_expert.lm_expert.layers.0.self_attn.k_proj.weight",
)


def training_pass(
    policy: SmolVLAPolicy, batch: dict, inputs: tuple, draw: dict, kept: Iterable[str] = GRADIENTS
) -> tuple[dict, dict]:
    """Record the losses in every reduction, the gradients and five AdamW steps."""
    noise, time, action = draw["noise"], draw["time"], inputs[-1]
    t = time[:, None, None]
    x_t = t * noise + (1 - t) * action
    embs, pad, att = policy.model.embed_suffix(x_t, time)
    out = {
        "x_t": x_t,
        "u_t": noise - action,
        "suffix.embs": embs,
        "suffix.pad_masks": pad,
        "suffix.att_masks": att,
    }
    out["losses_elementwise_padded_dims"] = policy.model.forward(*inputs, noise, time)
    plain = {k: v for k, v in batch.items() if k != "action_is_pad"}
    out["loss_without_is_pad"] = policy.forward(plain, noise, time)[0][None]
    out["loss_per_sample"] = policy.forward(batch, noise, time, reduction="none")[0]
    out["loss_per_sample_without_is_pad"] = policy.forward(plain, noise, time, reduction="none")[0]
    policy.zero_grad()
    loss, _ = policy.forward(batch, noise, time)
    loss.backward()
    out["loss"] = loss[None]
    grads = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad and p.grad is not None}
    out["grad_total_norm"] = torch.stack([g.norm() for g in grads.values()]).norm()[None]
    named = dict(policy.named_parameters())
    info = {
        "tasks": TASKS, "cams": [], "loss": loss.item(),
        "grad_norms": {n: g.norm().item() for n, g in grads.items()},
        "trainable_without_grad": [n for n, p in named.items() if p.requires_grad and p.grad is None],
        "frozen": [n for n, p in named.items() if not p.requires_grad],
    }  # fmt: skip
    for name in kept:
        if name in grads:
            out[f"grad.{name}"] = grads[name].clone()
    live = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-10)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        value, _ = policy.forward(batch, noise, time)
        value.backward()
        torch.nn.utils.clip_grad_norm_(live, 10.0)
        optimizer.step()
        values.append(value.detach())
    out["train_5_losses_lr1e-3"] = torch.stack(values)
    return out, info


def inference_pass(policy: SmolVLAPolicy, post: object, batch: dict, noise: Tensor) -> dict[str, Tensor]:
    """Record the Euler trajectory, the chunk before and after the postprocessor, and the action queue."""
    observed = {k: v for k, v in batch.items() if k not in (ACTION, "action_is_pad")}
    trace, step = [], policy.model.denoise_step

    def recorded(**kwargs) -> Tensor:
        v = step(**kwargs)
        trace.append((kwargs["x_t"] - v / policy.config.num_steps, v))
        return v

    policy.model.denoise_step = recorded
    chunk = policy.predict_action_chunk(dict(observed), noise=noise)
    policy.model.denoise_step = step
    policy.reset()
    picked = [policy.select_action(dict(observed), noise=noise) for _ in range(3)]
    return {
        "euler.x": torch.stack([x for x, _ in trace]),
        "euler.v": torch.stack([v for _, v in trace]),
        "euler.final_padded": trace[-1][0],
        "action_chunk": chunk,
        "action_chunk_unnormalized": post(chunk.clone()),
        "select_action": torch.stack(picked),
    }


def record(name: str, case: Case, root: Path) -> None:
    """Write one golden folder."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    policy, pre, post = build(case, folder, root / "smolvla" / "vlm")
    raw, draw = make_batch(case, policy.config)
    batch = pre(to_batch(raw))
    policy.eval()
    with torch.no_grad():
        out, inputs = prefix_pass(policy, batch)
        out |= inference_pass(policy, post, batch, draw["noise"])
    trained = copy.deepcopy(policy).train()
    more, info = training_pass(trained, batch, inputs, draw)
    info["missing"] = [f"observation.images.{camera}" for camera in case.absent]
    for camera, key in ((c, f"observation.images.{c}") for c in case.cameras if c not in case.absent):
        size = policy.config.resize_imgs_with_padding
        x = batch[key][:, -1] if batch[key].ndim == 5 else batch[key]
        out[f"resize_with_pad.{camera}"] = resize_with_pad(x[:1], size[1], size[0], pad_value=0)
        info["cams"].append(camera)
    given = raw | draw | {"lang_tokens": out.pop("lang_tokens"), "lang_mask": out.pop("lang_mask")}
    save_file({k: v.contiguous() for k, v in given.items()}, folder / "inputs.safetensors")
    save_file(
        {k: v.detach().clone().contiguous() for k, v in (out | more).items()}, folder / "expected.safetensors"
    )
    info["params"] = sum(p.numel() for p in policy.parameters())
    (folder / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    print(f"{folder}: loss {info['loss']:.4f}, {info['params']:,} parameters, {len(out | more)} tensors")


class Doubled:
    """Stands for torch inside a module of lerobot's or transformers': who asks for float32 gets float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@contextmanager
def in_double() -> Iterator[None]:
    """Let lerobot compute in float64 throughout: rotations, norms and attention ask for float32 by name."""
    modules = (
        smolvla_modeling,
        smolvlm_with_expert,
        flow_matching,
        vla_utils,
        modeling_llama,
        modeling_smolvlm,
    )
    torch.set_default_dtype(torch.float64)
    for module in modules:
        module.torch = Doubled()
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        for module in modules:
            module.torch = torch


def record_double(folder: Path) -> None:
    """Write expected64.safetensors: a folder's checkpoint on its float32 inputs, computed in float64."""
    here = Path.cwd()
    given = load_file(folder / "inputs.safetensors")
    stored = load_file(folder / "expected.safetensors")
    info = json.loads((folder / "info.json").read_text())
    os.chdir(folder / "checkpoint")  # its language model is named relative to itself
    try:
        policy = SmolVLAPolicy.from_pretrained(".")
        steps = json.loads(Path("policy_preprocessor.json").read_text())["steps"]
    finally:
        os.chdir(here)
    renamed = next((s["config"].get("rename_map", {}) for s in steps if "rename" in s["registry_name"]), {})
    batch = {STATE: stored["pre.state"].double(), ACTION: stored["pre.action"].double()}
    for name, x in given.items():
        if name.endswith(".uint8"):
            name = name.removesuffix(".uint8")
            batch[renamed.get(name, name)] = (x.float() / 255).double()
        elif name.endswith("_padding_mask"):
            batch[name] = x
    batch["observation.language.tokens"] = given["lang_tokens"]
    batch["observation.language.attention_mask"] = given["lang_mask"].bool()
    if "action_is_pad" in given:
        batch["action_is_pad"] = given["action_is_pad"]
    draw = {"noise": given["noise"].double(), "time": given["time"].double()}
    with in_double():
        policy = policy.double().eval()
        with torch.no_grad():
            out, inputs = prefix_pass(policy, batch)
            out |= inference_pass(policy, lambda chunk: chunk, batch, draw["noise"])
        kept = [name.removeprefix("grad.") for name in stored if name.startswith("grad.")]
        more, found = training_pass(copy.deepcopy(policy).train(), batch, inputs, draw, kept)
        norms = {f"grad_norm.{name}": torch.tensor(norm) for name, norm in found["grad_norms"].items()}
    assert found["grad_norms"].keys() == info["grad_norms"].keys(), "another set of gradients"
    out |= more | norms
    kept = {k: v for k, v in out.items() if v.dtype == torch.float64 and not k.startswith(LEFT_OUT)}
    save_file(
        {k: v.detach().clone().contiguous() for k, v in kept.items()}, folder / "expected64.safetensors"
    )
    worst = max((stored[k].double() - v).abs().max().item() for k, v in kept.items() if k in stored)
    print(f"{folder}: {len(kept)} tensors in float64; lerobot's own float32 lies up to {worst:.1e} away")


def main() -> None:
    if sys.argv[1:2] == ["--double"] and len(sys.argv) == 3:
        for found in sorted(Path(sys.argv[2]).glob("*/inputs.safetensors")):
            record_double(found.parent)
        return
    if len(sys.argv) < 2 or not Path(sys.argv[1], "smolvla", "vlm").is_dir():
        sys.exit(
            "usage: python tests/make_golden.py tests/golden [CASE ...]; the folder must hold smolvla/vlm"
        )
    for name in sys.argv[2:] or CASES:
        record(name, CASES[name], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
