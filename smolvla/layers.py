"""The transformer parts SmolVLA is made of: SigLIP's tower, pixel shuffle, llama blocks with grouped heads.

Each block's `forward` is what is called, so that blocks compile one by one. The same llama block serves the
trunk and the expert; one built with a `kv_width` has no keys of its own input and only cross-attends.

    pytest tests/test_model.py

Shapes: B batch, L tokens, S picture side or length of keys, W hidden width, H query heads, G key/value heads,
d head width. Sources: SigLIP and llama as in transformers (SmolVLM, Llama); rotary embedding as in lerobot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from smolvla.config import SmolVLAConfig

ROPE_BASE = 10_000.0  # fixed: SmolVLA ignores the language model's own rope_theta


def rope_table(position: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Give cos and sin, (B, 1, L, d/2) float32 each, of integer positions (B, L)."""
    frequency = ROPE_BASE ** -(torch.arange(head_dim // 2, device=position.device) * 2.0 / head_dim)
    angle = position[:, None, :, None].float() * frequency  # (B, L) -> (B, 1, L, d/2)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head, (B, H, L, d), in float32."""
    cos, sin = table
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class WorldMask(NamedTuple):
    """Who sees whom where some keys are world tokens, behind a gate (fusion.py)."""

    hidden: Tensor  # (B, 1, L, S) bool, without world tokens
    shown: Tensor  # (B, 1, L, S) with them: bool, or what is added to the logits
    strength: Tensor  # (), tanh(gate): 0 is the output without them, 1 the one with them


Mask = Tensor | WorldMask


def remake(mask: Mask, change: Callable[[Tensor], Tensor]) -> Mask:
    """Change what may be seen, with world tokens and without."""
    if isinstance(mask, WorldMask):
        return WorldMask(change(mask.hidden), change(mask.shown), mask.strength)
    return change(mask)


def lay_out(mask: Tensor, share: int, dtype: torch.dtype) -> Tensor:
    """Turn what may be seen, (B, 1, L, S) bool or to add, into what `attend` adds: (B, 1, share*L, S).

    Once for all layers. share: query heads to each key/value head.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype).repeat(1, 1, share, 1)


def join(past: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Put earlier tokens' keys and values, where there are any, before one's own, (B, G, S, d) each."""
    return own if past is None else tuple(torch.cat(pair, dim=2) for pair in zip(past, own, strict=True))


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """Attend by torch's kernels: q (B, G, L, d), k, v (B, G, S, d), mask (B, 1, L, S), added."""
    if isinstance(mask, WorldMask):
        without = attend_fused(q, k, v, mask.hidden)
        return without + mask.strength.to(q.dtype) * (attend_fused(q, k, v, mask.shown) - without)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, core: Callable) -> Tensor:
    """Attend with grouped heads: q (B, H, L, d), k, v (B, G, S, d), mask laid out -> (B, L, H*d).

    `core` is `attend_fused`, or what stands in for it.
    """
    # The query heads that share keys are laid end to end, as one head with a longer query: keys are
    # not copied, and fused kernels take it, on ROCm too, where they refuse enable_gqa beside a mask.
    out = core(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v, mask)  # -> (B, G, share*L, d)
    return out.reshape(q.shape).transpose(1, 2).flatten(2)  # (B, G, share*L, d) -> (B, L, H*d)


class VisionAttention(nn.Module):
    """SigLIP's self-attention: biases everywhere, no mask."""

    core = staticmethod(attend_fused)  # smolvla/kernels.py has another

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v, None, self.core))


class VisionMLP(nn.Module):
    """Two layers with tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm transformer block of the tower."""

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.vision_width, config.vision_eps)
        self.self_attn = VisionAttention(config.vision_width, config.vision_heads)
        self.layer_norm2 = nn.LayerNorm(config.vision_width, config.vision_eps)
        self.mlp = VisionMLP(config.vision_width, config.vision_mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def resize_with_pad(image: Tensor, size: int) -> Tensor:
    """Fit (B, 3, h, w) into size x size keeping the aspect; the picture sits bottom right, the rest is 0."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    fitted = (int(height / ratio), int(width / ratio))
    image = F.interpolate(image, size=fitted, mode="bilinear", align_corners=False)
    return F.pad(image, (size - fitted[1], 0, size - fitted[0], 0))


def patch_positions(side: int, table: int) -> list[int]:
    """Give each patch of a side x side grid its row in a position table made for table x table.

    SmolVLM sorts fractional coordinates into the table's buckets, in float32. On the table's own grid that is
    the plain row-major number but for some sizes (19, 25, 29 a side), where rounding picks a neighbour's row.
    """
    with torch.device("cpu"):  # also while a policy is laid out without memory
        edges = torch.arange(1 / table, 1.0, 1 / table)
        coordinate = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    coordinate = coordinate.clamp(max=1.0 - 1e-6)
    bucket = torch.bucketize(coordinate, edges, right=True).tolist()
    return [row * table + column for row in bucket for column in bucket]


class VisionTower(nn.Module):
    """SigLIP without pooling: images (B, 3, S, S) in [-1, 1] -> patches (B, (S/p)^2, Wv), row-major."""

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        table = (config.vision_size or config.image_size) // patch
        self.position_embedding = nn.Embedding(table**2, width)
        positions = patch_positions(config.image_size // patch, table)
        self.positions = None if positions == list(range(table**2)) else positions
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_layers))
        self.post_layernorm = nn.LayerNorm(width, config.vision_eps)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, patches, Wv)
        table = self.position_embedding.weight
        x = x + (table if self.positions is None else table[torch.tensor(self.positions, device=x.device)])
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Connector(nn.Module):
    """Pixel shuffle, then one linear layer: r x r neighbouring patches become one text-width token."""

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        self.r = config.scale_factor
        self.proj = nn.Linear(config.vision_width * self.r**2, config.width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        batch, count, width = patches.shape
        r, side = self.r, int(count**0.5)
        x = patches.view(batch, side // r, r, side // r, r, width)
        x = x.transpose(2, 3).reshape(
            batch, count // r**2, r * r * width
        )  # (B, patches, Wv) -> (B, tokens, r*r*Wv)
        return self.proj(x)


class Attention(nn.Module):
    """The four projections of a llama attention; `kv_width` is what keys and values are made from."""

    core = staticmethod(attend_fused)  # smolvla/kernels.py has another

    def __init__(self, width: int, kv_width: int, config: SmolVLAConfig) -> None:
        super().__init__()
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(kv_width, kv_inner, bias=False)
        self.v_proj = nn.Linear(kv_width, kv_inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """Split into heads: (B, L, heads*d) -> (B, heads, L, d)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return apply_rope(self.split(self.q_proj(x)), rope)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return apply_rope(self.split(self.k_proj(x)), rope), self.split(self.v_proj(x))


class MLP(nn.Module):
    """llama's gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A llama block; `kv_width` other than `width` makes it one that only cross-attends."""

    def __init__(self, width: int, mlp: int, config: SmolVLAConfig, kv_width: int | None = None) -> None:
        super().__init__()
        self.cross = kv_width is not None
        self.input_layernorm = nn.RMSNorm(width, config.eps)
        self.self_attn = Attention(width, kv_width or width, config)
        self.post_attention_layernorm = nn.RMSNorm(width, config.eps)
        self.mlp = MLP(width, mlp)

    def project(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Project the text layer's rotated keys and its values, (B, G, P, d) each; no further rope."""
        attention = self.self_attn
        flat = (x.transpose(1, 2).flatten(2) for x in (k, v))  # (B, G, P, d) -> (B, P, G*d)
        return tuple(
            attention.split(proj(x))
            for proj, x in zip((attention.k_proj, attention.v_proj), flat, strict=True)
        )

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.self_attn.keys_values(self.input_layernorm(x), rope)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Give the block's output and the keys and values it attended to; `past` comes before its own."""
        h = self.input_layernorm(x)
        q = self.self_attn.queries(h, rope)
        if self.cross:
            k, v = past
        else:
            k, v = join(past, self.self_attn.keys_values(h, rope))
        x = x + self.self_attn.o_proj(attend(q, k, v, mask, self.self_attn.core))
        return x + self.mlp(self.post_attention_layernorm(x)), (k, v)


class TextModel(nn.Module):
    """The language trunk: embeddings, llama blocks and a final norm that SmolVLA never reads."""

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config.width, config.mlp, config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)


class Expert(nn.Module):
    """The action expert: narrower llama blocks beside the trunk's, self- or cross-attending."""

    def __init__(self, config: SmolVLAConfig) -> None:
        super().__init__()
        kv_width = config.kv_heads * config.head_dim
        width, mlp = config.expert_width, config.expert_mlp
        kinds = [config.is_self_layer(i * config.stride) for i in range(config.expert_layers)]
        self.layers = nn.ModuleList(Block(width, mlp, config, None if own else kv_width) for own in kinds)
        self.norm = nn.RMSNorm(width, config.eps)
