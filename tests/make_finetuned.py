"""Record what lerobot's own fine-tuning makes of a base with other cameras and widths, and how it starts.

Needs lerobot (made with 0.6.1) with its data and training packages, in an environment of its own; the project
never imports it. A tiny base with smolvla_base's features (camera1 to camera3, 6 and 6 wide) is trained for
two steps on the LIBERO-shaped set in tests/lerobot_v3 (image, image2, 8 and 7 wide).

    python tests/make_finetuned.py tests/finetuned

Writes `base/` and `vlm/`; `train/`, as lerobot-train leaves it; `expected.safetensors`: on given frames,
noise and times the loss and gradients at the start, and the chunk of what was trained.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.scripts.lerobot_train import train
from make_golden import Case, build
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
DATA = HERE / "lerobot_v3" / "L_image" / "dataset"
RENAME = {
    f"observation.images.{a}": f"observation.images.{b}"
    for a, b in (("image", "camera1"), ("image2", "camera2"))
}
FRAMES = [3, 40, 130]  # the last chunk is padded
CASE = Case(
    policy={
        "num_vlm_layers": 2, "prefix_length": 0, "num_expert_layers": 0, "pad_language_to": "max_length",
        "num_steps": 3, "tokenizer_max_length": 16,
    },
    cameras={f"camera{i}": (256, 256) for i in (1, 2, 3)},
    text={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "head_dim": 8},
    vision={"hidden_size": 16, "intermediate_size": 24},
    state_dim=6,
    action_dim=6,
)  # fmt: skip


def make_base(root: Path) -> None:
    """Write the base beside its language model; its weights are exact in bfloat16, and stored so."""
    build(CASE, root, HERE / "golden" / "smolvla" / "vlm")
    (root / "checkpoint").rename(root / "base")
    for path in (root / "base").glob("*.json"):  # lerobot looks from where it runs; `tidy` undoes this
        path.write_text(path.read_text().replace("../vlm", str(root / "vlm")))
    weights = root / "base" / "model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(weights).items()}, weights)


def fine_tune(root: Path) -> None:
    """Run lerobot-train itself for two steps."""
    policy = PreTrainedConfig.from_pretrained(root / "base")
    policy.pretrained_path, policy.push_to_hub, policy.device = root / "base", False, "cpu"
    config = TrainPipelineConfig(
        dataset=DatasetConfig(repo_id="toy/libero", root=str(DATA)), policy=policy, output_dir=root / "train",
        steps=2, batch_size=2, num_workers=0, save_freq=2, log_freq=1, rename_map=RENAME, seed=5,
    )  # fmt: skip
    train(config)


def observed(data: LeRobotDataset) -> dict:
    """Collate the frames as lerobot's loader does."""
    return torch.utils.data.default_collate([data[i] for i in FRAMES])


def start(root: Path) -> dict[str, torch.Tensor]:
    """Record loss and gradients of the first step, as lerobot-train sets policy and processors up."""
    config = PreTrainedConfig.from_pretrained(root / "base")
    config.pretrained_path, config.device = root / "base", "cpu"
    deltas = {"action": [i / 20 for i in range(config.chunk_size)]}
    data = LeRobotDataset("toy/libero", root=DATA, delta_timestamps=deltas)
    policy = make_policy(config, ds_meta=data.meta, rename_map=RENAME)
    features = {**policy.config.input_features, **policy.config.output_features}
    shared = {"norm_map": policy.config.normalization_mapping, "stats": data.meta.stats}
    pre, _ = make_pre_post_processors(
        config, pretrained_path=str(root / "base"),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "normalizer_processor": shared | {"features": features},
            "rename_observations_processor": {"rename_map": RENAME},
        },
        postprocessor_overrides={
            "unnormalizer_processor": shared | {"features": policy.config.output_features},
        },
    )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(len(FRAMES), config.chunk_size, config.max_action_dim, generator=g)
    time = torch.tensor([0.2, 0.5, 0.9])
    loss, _ = policy.train().forward(pre(observed(data)), noise=noise, time=time)
    loss.backward()
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    grads = {f"grad.{n}": x for n, x in found.items() if x.numel() < 2000}  # the others' norms will do
    grads |= {f"norm.{n}": x.norm()[None] for n, x in found.items()}
    return {"frames": torch.tensor(FRAMES), "noise": noise, "time": time, "loss": loss.detach()[None]} | grads


def end(root: Path, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Record the chunk of the fine-tuned policy, as lerobot loads it."""
    folder = root / "train" / "checkpoints" / "last" / "pretrained_model"
    policy = SmolVLAPolicy.from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    batch = observed(LeRobotDataset("toy/libero", root=DATA))
    chunk = policy.eval().predict_action_chunk(pre(batch), noise=noise)
    return {"chunk": chunk, "chunk_unnormalized": post(chunk.clone())}


def tidy(root: Path) -> None:
    """Keep what a loader reads: no optimiser state, and paths beside the folder instead of this machine's."""
    for path in (root / "train").rglob("training_state"):
        shutil.rmtree(path)
    for path in [*root.rglob("*.json")]:
        for name in ("vlm", "base"):
            text = path.read_text().replace(
                str(root / name), f"{'../' * (len(path.relative_to(root).parts) - 1)}{name}"
            )
            path.write_text(text)
    for path in (root / "train").rglob("train_config.json"):
        raw = json.loads(path.read_text())
        raw["dataset"]["root"], raw["output_dir"] = None, "outputs/train/x"
        path.write_text(json.dumps(raw, indent=4))


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    shutil.rmtree(root, ignore_errors=True)
    make_base(root)
    found = start(root)
    fine_tune(root)
    found |= end(root, found["noise"])
    save_file({n: x.contiguous() for n, x in found.items()}, root / "expected.safetensors")
    tidy(root)
    print(sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and not p.is_symlink()), "bytes")


if __name__ == "__main__":
    main()
