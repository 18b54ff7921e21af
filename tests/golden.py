"""Recompute every tensor of a golden folder, recorded from lerobot, and print each one's largest error.

    python tests/golden.py tests/golden/smolvla

A folder holds `checkpoint/` (as lerobot saved it), `vlm/`, `inputs.safetensors`, `expected.safetensors`,
`info.json`, and `expected64.safetensors` where lerobot's pass was recorded in float64 as well; any policy
configuration, batch size and number of cameras will do, absent ones too. Exit code 1 when anything is beyond
its tolerance, or is expected and not recomputed here.

In float64 a tensor of ours lies within 1e-9 of lerobot's (of its largest entry, where that is above 1): no
processor's rounding shows there. What float32 may differ by is a property of lerobot's own rounding, not
of ours: at most MULTIPLE times the distance of its float32 tensor from its float64 one. Without a float64
recording it is 1e-5 absolute plus 1e-5 relative (gradient norms: 1e-4 relative or 1e-5 absolute).
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import (
    SmolVLA,
    flow_target,
    load_policy,
    masked_mean,
    prefix_inputs,
    sample_means,
)  # fmt: skip
from smolvla.checkpoint import lerobot_key
from smolvla.layers import resize_with_pad
from smolvla.processor import Processor

ATOL = RTOL = 1e-5
EXACT = 1e-9  # of float64
MULTIPLE = 20  # of lerobot's own distance; seen: 3.2 with AVX-512, 5.7 with AVX2 alone. Or of
FLOOR = 1e-6  # of a tensor's largest entry, where lerobot's happens to round to nearly nothing


class Row(NamedTuple):
    """One tensor's comparison."""

    name: str
    largest: float  # absolute error
    bound: float
    within: bool


class ActionQueue:
    """lerobot's `select_action`: hand out a chunk's first n actions one by one, then ask for the next."""

    def __init__(self, policy: SmolVLA) -> None:
        self.policy = policy
        self.queue: deque[Tensor] = deque()

    def reset(self) -> None:
        self.queue.clear()

    def select(self, inputs: dict, noise: Tensor, memory: Tensor | None = None) -> Tensor:
        """Give the next action (B, A), normalised; the inputs are ignored while the queue holds some."""
        if not self.queue:
            chunk = self.policy.predict_chunk(inputs, noise, memory)
            self.queue.extend(chunk[:, : self.policy.config.n_action_steps].unbind(1))
        return self.queue.popleft()


@contextmanager
def in_double() -> Iterator[None]:
    """Let the policy compute in float64 throughout: rotations and the action head ask for float32."""
    torch.set_default_dtype(torch.float64)
    with mock.patch.object(Tensor, "float", Tensor.double):
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def recompute_double(folder: Path) -> dict[str, Tensor]:
    """Compute in float64 what `expected64.safetensors` names, from lerobot's own float32 inputs."""
    policy, processor = load_policy(folder / "checkpoint")
    given, info = load_file(folder / "inputs.safetensors"), json.loads((folder / "info.json").read_text())
    policy.freeze(frozen_part(processor.raw), train_state_proj=processor.raw["train_state_proj"])
    inputs = processor(processor.rename(batch_of(given, info)))
    stored = load_file(folder / "expected.safetensors")
    inputs |= {"state": processor.last(stored["pre.state"], 2), "action": stored["pre.action"]}
    wide = lambda x: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x  # noqa: E731
    inputs = {k: [wide(x) for x in v] if isinstance(v, list) else wide(v) for k, v in inputs.items()}
    given = {name: wide(x) for name, x in given.items()}
    with in_double():
        policy.double().dtype = torch.float64
        out = preprocessing(policy, inputs, {}, []) | prefix_tensors(policy, inputs)
        out |= suffix_tensors(policy, inputs, given, out["prefix.pad_masks"], out["prefix.att_masks"])
        out |= losses(policy, inputs, given, info) | inference(policy, None, inputs, given)
        out |= five_steps(policy, inputs, given)
    return {name: x.detach() for name, x in out.items()}


def batch_of(given: dict[str, Tensor], info: dict) -> dict:
    """A recorded batch as the processor takes it."""
    batch = {"task": info["tasks"], "observation.state": given["raw_state"], "action": given["raw_action"]}
    batch |= {name.removesuffix(".uint8"): x for name, x in given.items() if name.endswith(".uint8")}
    batch |= {name: value for name, value in given.items() if name.endswith("_padding_mask")}
    return batch | {"action_is_pad": given.get("action_is_pad")}


def recompute(folder: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute what `expected.safetensors` names; gives (computed, expected), padded positions blanked."""
    with torch.device(device):  # of every tensor that is made on the way
        out, expected = recompute_there(folder, device)
    out = {name: x.detach().cpu() for name, x in out.items()}
    blank_padding(out, expected)
    return out, expected


def recompute_there(folder: Path, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    policy, processor = load_policy(folder / "checkpoint")
    policy.to(device)
    info = json.loads((folder / "info.json").read_text())
    given = load_file(folder / "inputs.safetensors", device)
    expected = load_file(folder / "expected.safetensors")
    policy.freeze(frozen_part(processor.raw), train_state_proj=processor.raw["train_state_proj"])
    batch = batch_of(given, info)
    inputs = processor(processor.rename(batch))

    out = preprocessing(policy, inputs, processor.rename(batch), info["cams"])
    out |= prefix_tensors(policy, inputs)
    out |= suffix_tensors(policy, inputs, given, out["prefix.pad_masks"], out["prefix.att_masks"])
    out |= losses(policy, inputs, given, info)
    out |= inference(policy, processor, inputs, given)
    out |= {f"trains.{lerobot_key(n)}": torch.tensor(p.requires_grad) for n, p in policy.named_parameters()}
    out |= five_steps(policy, inputs, given)
    still = (*info["frozen"], *info["trainable_without_grad"])  # we freeze what no loss can reach
    expected |= {f"trains.{k}": torch.tensor(k not in still) for k in (*info["grad_norms"], *still)}
    expected |= {f"grad_norm.{k}": torch.tensor(v) for k, v in info["grad_norms"].items()}
    expected |= {"lang_tokens": given["lang_tokens"], "lang_mask": given["lang_mask"].bool()}
    expected["pre.state"] = processor.last(expected["pre.state"], 2)  # we keep the observation that counts
    return out, {name: x.cpu() for name, x in expected.items()}


def frozen_part(raw: dict) -> str:
    """Our name of what a config.json freezes."""
    if raw["train_expert_only"]:
        return "expert"
    return "vision" if raw["freeze_vision_encoder"] else "none"


def preprocessing(policy: SmolVLA, inputs: dict, batch: dict, cameras: list[str]) -> dict[str, Tensor]:
    config, out = policy.config, {"pre.state": inputs["state"], "pre.action": inputs["action"]}
    out["lang_tokens"], out["lang_mask"] = inputs["tokens"], inputs["token_mask"]
    out["state_padded"] = F.pad(inputs["state"], (0, config.max_state_dim - config.state_dim))
    out["actions_padded"] = F.pad(inputs["action"], (0, config.max_action_dim - config.action_dim))
    for name in cameras:
        if f"observation.images.{name}" not in batch:  # absent: lerobot had nothing to resize either
            continue
        image = Processor.last(batch[f"observation.images.{name}"], 4)
        out[f"resize_with_pad.{name}"] = resize_with_pad(image[:1].float() / 255, config.image_size)
    batch = len(inputs["state"])
    for i, (image, mask) in enumerate(zip(inputs["images"], inputs["image_masks"], strict=True)):
        out[f"image{i}.prepared"] = policy.prepare_image(image).expand(batch, -1, -1, -1)
        out[f"image{i}.mask"] = torch.ones(batch, dtype=torch.bool) if mask is None else mask
    patches = policy.vision(out["image0.prepared"])
    return out | {"image0.vision_last_hidden": patches, "image0.connector_out": policy.connector(patches)}


def prefix_tensors(policy: SmolVLA, inputs: dict) -> dict[str, Tensor]:
    embs, mask, early = policy.embed_prefix(*prefix_inputs(inputs))
    hidden, kv = policy.trunk(embs, mask, early, policy.config.layers)
    block = (torch.arange(embs.shape[1]) == early).long().expand_as(mask)  # 1 where a causal block starts
    out = {"prefix.embs": embs, "prefix.pad_masks": mask, "prefix.att_masks": block.bool()}
    out |= {"prefix.position_ids": mask.cumsum(1) - 1, "prefix.att_2d_masks": visible(block, mask)}
    out["prefix.hidden_final_normed"] = policy.text.norm(hidden)
    for i, (k, v) in enumerate(kv):
        out |= {f"kv.{i}.key": k.transpose(1, 2), f"kv.{i}.value": v.transpose(1, 2)}
    return out


def visible(flags: Tensor, mask: Tensor) -> Tensor:
    """Which token (B, L) may attend to which, as lerobot's masks say it: (B, L, L) bool."""
    block = flags.cumsum(1)
    return (block[:, None, :] <= block[:, :, None]) & mask[:, None, :] & mask[:, :, None]


def suffix_tensors(
    policy: SmolVLA, inputs: dict, given: dict, mask: Tensor, flags: Tensor
) -> dict[str, Tensor]:
    batch, chunk = given["noise"].shape[:2]
    x_t, u_t = (
        x[:, 0] for x in flow_target(inputs["action"], given["noise"][:, None], given["time"][:, None])
    )
    ones = torch.ones(batch, chunk)
    joint = torch.cat([mask, ones.bool()], 1)
    return {
        "x_t": x_t,
        "u_t": u_t,
        "suffix.embs": policy.embed_suffix(x_t, given["time"]),
        "suffix.time_emb": policy.embed_time(given["time"]),
        "suffix.pad_masks": ones.bool(),
        "suffix.att_masks": ones,
        "train.position_ids": joint.cumsum(1) - 1,
        "train.att_2d_masks": visible(torch.cat([flags.long(), ones.long()], 1), joint),
    }


def losses(policy: SmolVLA, inputs: dict, given: dict, info: dict) -> dict[str, Tensor]:
    noise, time = given["noise"][:, None], given["time"][:, None]
    prefix = policy.prefix(*policy.embed_prefix(*prefix_inputs(inputs)))
    x_t, target = (x[:, 0] for x in flow_target(inputs["action"], noise, time))
    velocity = policy.velocity(x_t, given["time"], prefix)
    loss = policy(inputs, noise, time)
    total, count = masked_mean(loss, inputs["is_pad"])
    mean = total / count
    policy.zero_grad()
    mean.backward()
    grads = {lerobot_key(n): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    out = {
        "v_t.train": velocity,
        "losses_elementwise_padded_dims": (target - velocity) ** 2,
        "loss": mean[None],
        "loss_without_is_pad": loss.mean()[None],
        "loss_per_sample": sample_means(loss, inputs["is_pad"]),
        "loss_per_sample_without_is_pad": sample_means(loss, None),
        "grad_total_norm": torch.stack([g.norm() for g in grads.values()]).norm()[None],
    }
    out |= {
        f"grad_norm.{key}": grads[key].norm() if key in grads else torch.tensor(0.0)
        for key in info["grad_norms"]
    }
    return out | {f"grad.{key}": grad for key, grad in grads.items()}


def inference(policy: SmolVLA, processor: Processor, inputs: dict, given: dict) -> dict[str, Tensor]:
    with torch.no_grad():
        prefix = policy.prefix(*policy.embed_prefix(*prefix_inputs(inputs)))
        x_t, _ = flow_target(inputs["action"], given["noise"][:, None], given["time"][:, None])
        velocity = policy.velocity(x_t[:, 0], given["time"], prefix)
    trace: list = []
    final = policy.denoise(given["noise"], prefix, trace=trace)
    chunk = policy.predict_chunk(inputs, given["noise"])
    queue = ActionQueue(policy)
    picked = [queue.select(inputs, given["noise"]) for _ in range(3)]  # longer than some queues
    return {
        "v_t.cached": velocity,
        "euler.x": torch.stack([x for x, _ in trace]),
        "euler.v": torch.stack([v for _, v in trace]),
        "euler.final_padded": final,
        "action_chunk": chunk,
        "action_chunk_unnormalized": chunk if processor is None else processor.unnormalise(chunk),
        "select_action": torch.stack(picked),
    }


def five_steps(policy: SmolVLA, inputs: dict, given: dict) -> dict[str, Tensor]:
    """Loss before and after 1..4 AdamW steps on one batch with fixed noise and times."""
    live = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-10)
    values = []
    for _ in range(5):
        total, count = masked_mean(
            policy(inputs, given["noise"][:, None], given["time"][:, None]), inputs["is_pad"]
        )
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(live, 10.0)
        optimizer.step()
        values.append((total / count).detach())
    return {"train_5_losses_lr1e-3": torch.stack(values)}


def blank_padding(out: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Zero hidden states, keys and values at padded prefix positions: nobody reads them."""
    padded = ~expected["prefix.pad_masks"]
    for name in [n for n in expected if n.startswith("kv.") or n == "prefix.hidden_final_normed"]:
        for side in (out, expected):
            side[name] = side[name].clone()
            side[name][padded] = 0


def error(name: str, got: Tensor, want: Tensor, bound: float | None = None, slack: float = 1.0) -> Row:
    """Hold a tensor against its bound, absolute, or against the float32 tolerance times `slack`."""
    if got.shape != want.shape:
        return Row(name, float("inf"), 0.0, False)
    difference, size = (got.detach().double() - want.double()).abs(), want.double().abs()
    if bound is not None:
        largest = difference.max().item()
        return Row(name, largest, bound, largest <= bound)
    if name.startswith("grad_norm.") or name == "grad_total_norm":
        allowed = slack * (1e-4 * size).clamp(min=ATOL)
    else:
        allowed = slack * (ATOL + RTOL * size)
    return Row(name, difference.max().item(), allowed.max().item(), bool((difference <= allowed).all()))


def compare(folder: Path, device: str = "cpu", slack: float = 1.0) -> list[Row]:
    """Compare a folder's tensors; one that is not recomputed is beyond any bound.

    Where lerobot's float64 is there, ours is held against it: in float64, and in float32 within MULTIPLE
    times lerobot's own rounding (times `slack`, for a device with other products).
    """
    got, want = recompute(folder, device)
    rows = [Row(name, float("nan"), 0.0, False) for name in want if name not in got]
    exact = folder / "expected64.safetensors"
    exact = load_file(exact) if exact.is_file() else {}
    wide = recompute_double(folder) if exact else {}
    padded = ~want["prefix.pad_masks"]
    for name, value in exact.items():
        if name.startswith("kv.") or name == "prefix.hidden_final_normed":
            value[padded] = wide[name][padded] = 0
        size = max(1.0, value.abs().max().item())
        rows.append(error(f"float64:{name}", wide[name], value, EXACT * size))
    for name in want:
        bound = None
        if name in exact and got[name].shape == exact[name].shape:
            own = (want[name].double() - exact[name]).abs().max().item()
            bound = slack * MULTIPLE * max(own, FLOOR * max(1.0, exact[name].abs().max().item()))
        if name in got:
            rows.append(
                error(name, got[name], exact[name] if bound is not None else want[name], bound, slack)
            )
    return rows


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1], "expected.safetensors").is_file():
        sys.exit(f"usage: python tests/golden.py DIR, a folder with expected.safetensors; got {sys.argv[1:]}")
    rows = compare(Path(sys.argv[1]))
    for name, largest, bound, within in rows:
        print(f"{'ok  ' if within else 'FAIL'} {largest:9.2e} of {bound:9.2e}  {name}")
    failed = sum(not row.within for row in rows)
    print(f"{len(rows)} tensors, {failed} beyond their bounds")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
