"""SmolVLA in plain PyTorch: SigLIP tower, llama trunk, flow-matching action expert, room for memory.

The prefix (images, language, state) runs once a decision and leaves keys and values; the expert then turns
noise into a chunk of actions, attending to them in every layer. Nothing in the prefix can see the actions,
so training and cached inference are one code path: `prefix(...)`, then `velocity(...)`. Memory of imagined
futures enters through `fusion.py`.

    python model.py                                  # sizes of the presets
    python model.py runs/demo/E0-n64000-s0/last      # what a checkpoint is, before a run is spent on it
    python tests/golden.py tests/golden/smolvla      # every intermediate tensor against lerobot's

Shapes: B batch, P prefix tokens, C actions in a chunk, A action width, W hidden width, H query heads, G
key/value heads, d head width. Sources: lerobot 0.6.1 (policies/smolvla), SmolVLA (arXiv 2506.01844), SigLIP,
SmolVLM2.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor

from fusion import Fusion, MemoryCache
from layers import Connector, Expert, TextModel, VisionTower, rope_table


@dataclass(frozen=True)
class SmolVLAConfig:
    """Sizes and constants of one policy; the defaults are the published base model's.

    Everything here is read from a checkpoint's `config.json` and its language model's (checkpoint.py), never
    assumed.
    """

    cameras: tuple[str, ...] = ("observation.images.image", "observation.images.image2")
    state_dim: int = 8
    action_dim: int = 7
    max_state_dim: int = 32
    max_action_dim: int = 32
    chunk_size: int = 50
    n_action_steps: int = 50
    num_steps: int = 10
    prefix_length: int = -1
    tokenizer_max_length: int = 48
    min_period: float = 4e-3
    max_period: float = 4.0
    empty_cameras: int = 0

    vision_width: int = 768
    vision_mlp: int = 3072
    vision_layers: int = 12
    vision_heads: int = 12
    vision_eps: float = 1e-6
    image_size: int = 512  # side that pictures are brought to
    vision_size: int | None = None  # side that the tower's positions are made for, where it is another one
    patch_size: int = 16
    scale_factor: int = 4
    image_special_ids: tuple[int, ...] = ()  # (fake image token, global image token) around pictures, or none

    width: int = 960
    mlp: int = 2560
    layers: int = 16
    heads: int = 15
    kv_heads: int = 5
    head_dim: int = 64
    vocab_size: int = 49280
    eps: float = 1e-5

    expert_layers: int = 16
    expert_width: int = 720
    attention_mode: str = "cross_attn"
    self_attn_every_n_layers: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError for what no policy can have; each names the sizes and what would do."""
        for part, whole, share in (
            ("layers", self.layers, "expert_layers"),
            ("width", self.vision_width, "vision_heads"),
            ("heads", self.heads, "kv_heads"),
            ("head_dim", self.head_dim, 2),
            ("expert_width", self.expert_width, 2),
            ("image_size", self.image_size, "patch_size"),
            ("patches a side", self.image_size // self.patch_size, "scale_factor"),
        ):
            by = share if isinstance(share, int) else getattr(self, share)
            if by < 1 or whole < 1 or whole % by:
                named = share if isinstance(share, int) else f"{share} {by}"
                raise ValueError(f"{part} {whole} must be a positive multiple of {named}")
        for name in ("state", "action"):
            width, room = getattr(self, f"{name}_dim"), getattr(self, f"max_{name}_dim")
            if width > room:
                raise ValueError(
                    f"{name} is {width} wide and the model takes {room}: start from a checkpoint whose "
                    f"max_{name}_dim is at least {width}, or leave dimensions out"
                )
        if not 0 < self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps {self.n_action_steps} must lie in 1..{self.chunk_size}, the chunk"
            )
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps} must be at least 1 Euler step")
        if not self.cameras:
            raise ValueError("a policy needs a camera: config.json's input_features name none of type VISUAL")
        experts = range(self.expert_layers)
        if [self.is_self_layer(i) for i in experts] != [self.is_self_layer(i * self.stride) for i in experts]:
            raise ValueError(
                f"self_attn_every_n_layers {self.self_attn_every_n_layers} with {self.expert_layers} expert "
                f"layers over {self.layers} text layers: lerobot builds expert layers by their own number "
                "and runs them by the text layer's, and the two differ; 0 (cross attention only) works"
            )

    @property
    def image_tokens(self) -> int:
        """Tokens a camera."""
        return (self.image_size // self.patch_size // self.scale_factor) ** 2

    @property
    def expert_mlp(self) -> int:
        """llama's rule: 4 x two thirds of the width, rounded up to a multiple of 256."""
        return -(-int(2 * self.expert_width / 3) * 4 // 256) * 256

    @property
    def stride(self) -> int:
        """Text layers an expert layer: text layer i meets expert layer i // stride where stride divides i."""
        return self.layers // self.expert_layers

    @property
    def trunk_depth(self) -> int:
        """Text layers that run whole; of the next, beside the last expert layer, keys and values are read."""
        return (self.expert_layers - 1) * self.stride

    def is_self_layer(self, text_layer: int) -> bool:
        """Whether actions attend to one another (and the prefix) there; elsewhere they only cross-attend."""
        every = self.self_attn_every_n_layers
        return "cross" not in self.attention_mode or (every > 0 and text_layer % every == 0)


PRESETS: dict[str, SmolVLAConfig] = {
    # Every part of SmolVLA at a size that learns a LIBERO task on two CPU cores in minutes.
    "tiny": SmolVLAConfig(
        chunk_size=16, n_action_steps=8, tokenizer_max_length=32,
        vision_width=96, vision_mlp=288, vision_layers=3, vision_heads=4,
        image_size=128, patch_size=16, scale_factor=2,
        width=128, mlp=384, layers=4, heads=4, kv_heads=2, head_dim=32, vocab_size=512,
        expert_layers=4, expert_width=96,
    ),
    "base": SmolVLAConfig(),
    "libero": SmolVLAConfig(
        n_action_steps=1, layers=32, expert_layers=32, expert_width=480, self_attn_every_n_layers=0,
    ),
}  # fmt: skip


class Prefix(NamedTuple):
    """What a decision keeps of its prefix: computed once, read at every denoising step."""

    kv: list[
        tuple[Tensor, Tensor]
    ]  # per expert layer, (B, G, P, d) each, projected where the layer cross-attends
    mask: Tensor  # (B, P) bool, false at padding
    offset: Tensor  # (B,) number of unpadded tokens: where the actions' positions start

    def repeat(self, times: int) -> Prefix:
        """Repeat each sample `times` times in a row: several flow draws then share one prefix pass."""
        if times == 1:
            return self
        each = lambda x: x.repeat_interleave(times, dim=0)  # noqa: E731
        return Prefix([(each(k), each(v)) for k, v in self.kv], each(self.mask), each(self.offset))


class SmolVLA(nn.Module):
    """The policy, on what `checkpoint.Processor` makes: images in [0, 1], normalised states, tokens."""

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        self.config = config
        width, expert_width = config.width, config.expert_width
        self.vision = VisionTower(config)
        self.connector = Connector(config)
        self.text = TextModel(config)
        self.lm_head = nn.Linear(
            width, config.vocab_size, bias=False
        )  # never used; kept to hand the checkpoint back
        self.expert = Expert(config)
        self.state_proj = nn.Linear(config.max_state_dim, width)
        self.action_in_proj = nn.Linear(config.max_action_dim, expert_width)
        self.action_time_mlp_in = nn.Linear(2 * expert_width, expert_width)
        self.action_time_mlp_out = nn.Linear(expert_width, expert_width)
        self.action_out_proj = nn.Linear(expert_width, config.max_action_dim)
        self.fusion: Fusion | None = None  # where memory enters; attached by arm.py

    def initialise(self) -> SmolVLA:
        """Draw fresh weights to train from scratch: torch's own linear layers, unit-scale embeddings."""
        nn.init.normal_(
            self.text.embed_tokens.weight, std=self.config.width**-0.5
        )  # tokens are scaled by sqrt(W)
        nn.init.normal_(self.vision.position_embedding.weight, std=0.02)
        return self

    def freeze(self, what: str, train_state_proj: bool = True) -> None:
        """Freeze as lerobot does: `expert` trains expert and projections, `vision` the trunk too, `none` all.

        The language head, the trunk's final norm and its last layer (the last two where expert layers are
        fewer) stay frozen always, as lerobot has it; so does all that no loss can reach, since distributed
        training waits for every gradient that is asked for.
        """
        if what not in ("expert", "vision", "none"):
            raise ValueError(f"--freeze {what!r} is unknown: choose expert, vision or none")
        self.requires_grad_(True)
        self.lm_head.requires_grad_(False)
        self.text.norm.requires_grad_(False)
        depth = self.config.trunk_depth
        read = self.text.layers[depth]  # for its keys and values only
        unread = (read.self_attn.q_proj, read.self_attn.o_proj, read.post_attention_layernorm, read.mlp)
        last = self.text.layers[-1 if self.config.stride == 1 else -2 :]
        for module in (*unread, *self.text.layers[depth + 1 :], *last):
            module.requires_grad_(False)
        if what in ("expert", "vision"):
            self.vision.requires_grad_(False)
        if what == "expert":
            self.connector.requires_grad_(False)
            self.text.requires_grad_(False)
        self.state_proj.requires_grad_(train_state_proj)

    # ---- prefix ---------------------------------------------------------------------------------------

    def prepare_image(self, image: Tensor) -> Tensor:
        """Resize and pad (B, 3, h, w) in [0, 1] to (B, 3, S, S) in [-1, 1]."""
        return (resize_with_pad(image, self.config.image_size) * 2 - 1).to(self.lm_head.weight.dtype)

    def embed_images(self, images: list[Tensor]) -> list[Tensor]:
        """Embed each camera's prepared images, (b, 3, S, S) -> (b, n, W), all in one pass of the tower."""
        tokens = self.connector(self.vision(torch.cat(images))) * self.config.width**0.5
        return list(tokens.split([len(x) for x in images]))

    def embed_special(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Embed what stands before and after each picture, (B, 2, W) and (B, 1, W) or nothing; not scaled."""
        ids = torch.tensor(self.config.image_special_ids, dtype=torch.long, device=device)
        around = self.text.embed_tokens(ids).expand(batch, -1, -1)
        return around, around[:, :1]

    def embed_language(self, tokens: Tensor) -> Tensor:
        return self.text.embed_tokens(tokens) * self.config.width**0.5  # (B, n) -> (B, n, W)

    def embed_state(self, state: Tensor) -> Tensor:
        padded = F.pad(state, (0, self.config.max_state_dim - state.shape[-1]))
        return self.state_proj(padded)[:, None]  # (B, S) -> (B, 1, W)

    def embed_prefix(
        self,
        images: list[Tensor],
        image_masks: list[Tensor | None],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Concatenate image, language and state tokens.

        Args: images per camera (B or 1, 3, h, w) float in [0, 1] (a batch of one is shared by all samples);
        masks (B,) bool per camera, None for present in all; tokens and token_mask (B, n); state (B, S)
        normalised.
        Returns: embeddings (B, P, W), mask (B, P) bool, block flags (P,) with 1 where a new causal block
        starts.
        """
        batch, device = len(tokens), tokens.device
        present = torch.ones(batch, 1, dtype=torch.bool, device=device)
        before, after = self.embed_special(batch, device)
        parts, masks = [], []
        pictures = self.embed_images([self.prepare_image(i) for i in images])
        for x, mask in zip(pictures, image_masks, strict=True):
            parts += [before, x.expand(batch, -1, -1), after]
            seen = present if mask is None else mask[:, None]
            masks += [present.expand(-1, before.shape[1]), seen.expand(-1, x.shape[1])]
            masks += [present.expand(-1, after.shape[1])]  # special tokens stay when their picture is masked
        parts += [self.embed_language(tokens), self.embed_state(state)]
        masks += [token_mask, present]
        embs, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        flags = torch.zeros(embs.shape[1], dtype=torch.long, device=device)
        flags[-1] = 1  # images and language cannot see the state
        short = max(0, self.config.prefix_length - embs.shape[1])
        return F.pad(embs, (0, 0, 0, short)), F.pad(mask, (0, short)), F.pad(flags, (0, short))

    def trunk(
        self, embs: Tensor, mask: Tensor, flags: Tensor, depth: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the first `depth` text layers over (B, P, W).

        Returns: the hidden states after them, and the keys and values of each and of the layer that comes
        next.
        """
        rope = rope_table(
            mask.cumsum(1) - 1, self.config.head_dim
        )  # padded tokens do not advance the position
        block = flags.cumsum(0)
        # Padded queries attend like any other: a row masked whole has no softmax, and nobody reads theirs.
        allowed = ((block[None, :] <= block[:, None]) & mask[:, None, :])[:, None]  # (B, 1, P, P)
        x, kv = embs.to(self.lm_head.weight.dtype), []
        for layer in self.text.layers[:depth]:
            x, pair = layer(x, rope, allowed)
            kv.append(pair)
        kv += [layer.keys_values(x, rope) for layer in self.text.layers[depth : depth + 1]]
        return x, kv

    def prefix(self, embs: Tensor, mask: Tensor, flags: Tensor) -> Prefix:
        """Run the trunk over (B, P, W) and keep each expert layer's keys and values.

        The trunk stops where the last expert layer reads: of that text layer only keys and values are needed.
        """
        _, kv = self.trunk(embs, mask, flags, depth=self.config.trunk_depth)
        pairs = zip(self.expert.layers, kv[:: self.config.stride], strict=True)
        return Prefix(
            [layer.project(*pair) if layer.cross else pair for layer, pair in pairs], mask, mask.sum(1)
        )

    # ---- suffix ---------------------------------------------------------------------------------------

    def embed_time(self, time: Tensor) -> Tensor:
        """Encode flow times (B,) as sines and cosines (B, We), in float64: float32 moves actions by 3e-5."""
        steps = torch.linspace(0, 1, self.config.expert_width // 2, dtype=torch.float64, device=time.device)
        period = self.config.min_period * (self.config.max_period / self.config.min_period) ** steps
        angle = 2 * torch.pi * time.double()[:, None] / period
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def embed_suffix(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Embed noisy actions (B, C, A_max) at flow times (B,) -> (B, C, We)."""
        action = self.action_in_proj(x_t)
        clock = self.embed_time(time).to(action.dtype)[:, None].expand_as(action)
        return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([action, clock], dim=-1))))

    def velocity(
        self, x_t: Tensor, time: Tensor, prefix: Prefix, memory: MemoryCache | None = None
    ) -> Tensor:
        """Predict the flow's velocity (B, C, A_max) at noisy actions x_t (B, C, A_max) and times (B,)."""
        h = self.embed_suffix(x_t, time).to(self.expert.norm.weight.dtype)
        batch, chunk = h.shape[:2]
        own = torch.arange(chunk, device=h.device)
        causal = (own[None, :] <= own[:, None]).expand(batch, -1, -1)
        sees_prefix = prefix.mask[:, None, :].expand(-1, chunk, -1)  # (B, P) -> (B, C, P)
        mask_self = torch.cat([sees_prefix, causal], dim=2)[:, None]  # (B, 1, C, P + C)
        rope_self = rope_table(prefix.offset[:, None] + own, self.config.head_dim)
        rope_cross = rope_table(own[None], self.config.head_dim)  # restarts at 0 in cross layers
        for layer, past in zip(self.expert.layers, prefix.kv, strict=True):
            if layer.cross:
                h, _ = layer(h, rope_cross, sees_prefix[:, None], past)
            else:
                h, _ = layer(h, rope_self, mask_self, past)
        h = self.expert.norm(h).float()
        if self.fusion is not None:
            h = self.fusion("late", h, memory)
        return self.action_out_proj(h)

    # ---- training and inference -----------------------------------------------------------------------

    def forward(self, inputs: dict, noise: Tensor, time: Tensor, memory: Tensor | None = None) -> Tensor:
        """Compute the flow-matching losses (B, R, C, A), real action dimensions only, before any reduction.

        Args: inputs as `embed_prefix` takes them, with "action" (B, C, A) normalised; noise (B, R, C, A_max)
        and time (B, R): R draws a sample share one prefix pass; memory (B, M, D).
        """
        batch, draws = time.shape
        prefix = self.prefix(*self.embed_prefix(*prefix_inputs(inputs))).repeat(draws)
        x_t, target = flow_target(inputs["action"], noise, time)
        cache = None if self.fusion is None else self.fusion.prepare(memory, repeat=draws)
        v = self.velocity(x_t.flatten(0, 1), time.flatten(), prefix, cache)  # (B*R, C, A_max)
        loss = (target - v.unflatten(0, (batch, draws))) ** 2
        return loss[..., : self.config.action_dim]

    @torch.no_grad()
    def denoise(
        self, noise: Tensor, prefix: Prefix, memory: MemoryCache | None = None, trace: list | None = None
    ) -> Tensor:
        """Integrate the flow from noise (B, C, A_max) at t=1 to actions at t=0 in `num_steps` Euler steps."""
        x, steps = noise, self.config.num_steps
        for k in range(steps):
            time = torch.full((len(x),), 1.0 - k / steps, dtype=torch.float32, device=x.device)
            v = self.velocity(x, time, prefix, memory)
            x = x - v / steps
            if trace is not None:
                trace.append((x, v))
        return x

    @torch.no_grad()
    def predict_chunk(self, inputs: dict, noise: Tensor, memory: Tensor | None = None) -> Tensor:
        """Predict chunks of normalised actions (B, C, A) from observations and noise (B, C, A_max)."""
        cache = None if self.fusion is None else self.fusion.prepare(memory)
        prefix = self.prefix(*self.embed_prefix(*prefix_inputs(inputs)))
        return self.denoise(noise, prefix, cache)[..., : self.config.action_dim]


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


def resize_with_pad(image: Tensor, size: int) -> Tensor:
    """Fit (B, 3, h, w) into size x size keeping the aspect; the picture sits bottom right, the rest is 0."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    fitted = (int(height / ratio), int(width / ratio))
    image = F.interpolate(image, size=fitted, mode="bilinear", align_corners=False)
    return F.pad(image, (size - fitted[1], 0, size - fitted[0], 0))


def prefix_inputs(inputs: dict) -> tuple:
    """Pick `embed_prefix`'s arguments out of a dictionary of inputs."""
    return tuple(inputs[key] for key in ("images", "image_masks", "tokens", "token_mask", "state"))


def flow_target(action: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Mix actions (B, C, A) with noise (B, R, C, A_max) at times (B, R): x_t and the true velocity."""
    padded = F.pad(action, (0, noise.shape[-1] - action.shape[-1]))[:, None]  # (B, C, A) -> (B, 1, C, A_max)
    t = time[..., None, None]
    return t * noise + (1 - t) * padded, noise - padded


def masked_mean(loss: Tensor, is_pad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum losses (B, R, C, A) over unpadded steps; give the sum and its number of terms."""
    if is_pad is None:
        return loss.sum(), torch.tensor(loss.numel(), device=loss.device)
    keep = ~is_pad[:, None, :, None]  # (B, C) -> (B, 1, C, 1)
    return torch.where(keep, loss, 0).sum(), keep.sum() * loss.shape[1] * loss.shape[-1]


def sample_means(loss: Tensor, is_pad: Tensor | None) -> Tensor:
    """Average losses (B, R, C, A) over each sample's own unpadded steps, (B,); 0 where all are padded."""
    if is_pad is None:
        return loss.flatten(1).mean(1)
    keep = ~is_pad[:, None, :, None]  # (B, C) -> (B, 1, C, 1)
    terms = keep.flatten(1).sum(1) * loss.shape[1] * loss.shape[-1]
    return torch.where(keep, loss, 0).flatten(1).sum(1) / terms.clamp(min=1)


# ---- command line -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DescribeConfig:
    """Say what a checkpoint is; without one, what the presets are."""

    checkpoint: Annotated[str | None, tyro.conf.Positional] = None
    """Checkpoint folder or hub id."""

    revision: str | None = None
    """Revision of the hub id, to pin it."""

    vlm: str | None = None
    """Folder or hub id of the language model; default: what the checkpoint names."""

    stats_of: str | None = None
    """Data set whose statistics to use, where a checkpoint holds those of several."""

    allow_missing: bool = False
    """Go on when tensors are missing or unexpected; missing statistics are shown in any case."""


def main(config: DescribeConfig) -> None:
    """Print one checkpoint, or the presets' sizes."""
    if config.checkpoint is not None:
        from checkpoint import describe_checkpoint  # which imports this file

        print(describe_checkpoint(**dataclasses.asdict(config)))
        return
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            policy = SmolVLA(preset)
        policy.freeze("expert")
        total = sum(p.numel() for p in policy.parameters())
        live = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        print(f"{name:8s} {total:>13,} parameters, {live:>11,} trained with --freeze expert")


if __name__ == "__main__":
    try:
        main(tyro.cli(DescribeConfig))
    except ValueError as error:
        sys.exit(f"error: {error}")
