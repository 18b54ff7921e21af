"""The policy with memory, written out slowly: one joint pass over all tokens, no cache, nothing shared.

Prefix, world tokens and actions run through their layers side by side, as lerobot trains SmolVLA; world
tokens really stand between language and state, softmax is spelt out, masks are built from block numbers.
Only weights are the policy's. What `model.py` computes from a cache must equal this.

Shapes: B batch, P prefix tokens, m world tokens, C actions, S all of them, H query heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import SmolVLA


def velocity(
    policy: SmolVLA,
    embs: Tensor,
    mask: Tensor,
    early: int,
    x_t: Tensor,
    time: Tensor,
    memory: Tensor | None,
    gated: bool = True,
) -> Tensor:
    """Compute the velocity (B, C, A_max) with memory (B, M, D) at the sites that policy.fusion has.

    Not `gated`: world tokens are tokens like any other.
    """
    sites = policy.fusion.sites if policy.fusion is not None and memory is not None else {}
    caches = {name: site.prepare(memory) for name, site in sites.items()}
    actions = policy.embed_suffix(x_t, time)

    def fused(point: str, h: Tensor, layer: int = 0) -> Tensor:
        for name, site in sites.items():
            h = site(h, caches[name], layer) if site.at == point else h
        return h

    embs, actions = fused("prefix", embs), fused("actions_in", actions)

    position = mask.cumsum(1) - 1
    block = (torch.arange(embs.shape[1]) >= early).expand_as(mask) * 2  # images and language 0, the rest 2
    world = torch.zeros_like(mask)
    strength = bias = None
    for site, tokens in ((sites[name], caches[name]) for name in sites if sites[name].at == "tokens"):
        x, finite, bias = tokens.x, tokens.finite, tokens.bias
        strength = torch.tanh(site.gate) if gated else None
        own = 1 if site.block == "state" else 0
        count = mask[:, :early].sum(1, keepdim=True)
        insert = lambda a, b: torch.cat([a[:, :early], b, a[:, early:]], dim=1)  # noqa: E731
        embs = insert(embs, x)
        each = len(site.rows) // len({row // len(site.tokens.step_code) for row in site.rows})
        position = insert(position, count + torch.arange(x.shape[1]) % each)
        block = insert(block, torch.full(finite.shape, own))
        world, mask = insert(world, torch.ones_like(finite)), insert(mask, finite)
    odds = torch.zeros(mask.shape)
    if bias is not None:
        odds[world] = bias.flatten()
    chunk = x_t.shape[1]
    unpadded = (mask & ~world).sum(1, keepdim=True)
    position = torch.cat([position, unpadded + torch.arange(chunk)], dim=1)
    block = torch.cat([block, 3 + torch.arange(chunk).expand(len(x_t), -1)], dim=1)  # causal among themselves
    mask = F.pad(mask, (0, chunk), value=True)
    world = F.pad(world & gated, (0, chunk))
    allowed = (block[:, None, :] <= block[:, :, None]) & mask[:, None, :]  # (B, S, S)
    odds = F.pad(odds, (0, chunk))
    actions = layers(policy, embs, actions, position, allowed, world, strength, odds, fused)
    return policy.action_out_proj(fused("actions_out", policy.expert.norm(actions)))


def layers(
    policy: SmolVLA,
    prefix: Tensor,
    actions: Tensor,
    position: Tensor,
    allowed: Tensor,
    world: Tensor,
    strength: Tensor | None,
    odds: Tensor,
    fused: Callable,
) -> Tensor:
    """Run all layers over prefix (B, P, W) and actions (B, C, We); gives the actions' hidden states."""
    config, length = policy.config, prefix.shape[1]
    for i, text in enumerate(policy.text.layers):
        expert = policy.expert.layers[i // config.stride] if i % config.stride == 0 else None
        q, k, v = project(text, prefix, position[:, :length], config.head_dim)
        seen, hides = allowed[:, :length, :length], world[:, :length]
        new = block_out(text, prefix, attention(q, k, v, seen, hides, strength, odds[:, :length]))
        if expert is not None and config.is_self_layer(i):
            qa, ka, va = project(expert, actions, position[:, length:], config.head_dim)
            k, v = torch.cat([k, ka], dim=1), torch.cat([v, va], dim=1)
            out = attention(qa, k, v, allowed[:, length:], world, strength, odds)
            actions = block_out(expert, actions, out)
        elif expert is not None:
            restarted = torch.arange(actions.shape[1]).expand(len(actions), -1)
            own = expert.self_attn
            qa = rotate(heads(own.q_proj(expert.input_layernorm(actions)), config.head_dim), restarted)
            k, v = (
                heads(own.k_proj(k.flatten(2)), config.head_dim),
                heads(own.v_proj(v.flatten(2)), config.head_dim),
            )
            out = attention(qa, k, v, allowed[:, length:, :length], hides, strength, odds[:, :length])
            actions = block_out(expert, actions, out)
        if expert is not None:
            actions = fused("layer", actions, i // config.stride)
        prefix = new
    return actions


def project(block, x: Tensor, position: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    h = block.input_layernorm(x)
    q, k, v = (heads(getattr(block.self_attn, f"{n}_proj")(h), width) for n in "qkv")
    return rotate(q, position), rotate(k, position), v


def heads(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width))  # (B, L, H*d) -> (B, L, H, d)


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of each head by position / 10000^(2i/d)."""
    half = x.shape[-1] // 2
    angle = position[..., None, None] / 10000 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, world: Tensor, strength: Tensor | None, odds: Tensor
) -> Tensor:
    """Softmax attention over (B, L, H, d) and (B, S, G, d); behind the gate where keys are world tokens."""
    group = q.shape[2] // k.shape[2]
    k, v = (x[:, :, torch.arange(q.shape[2]) // group] for x in (k, v))  # G -> H heads
    scores = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5 + odds[:, None, None]

    def out(visible: Tensor) -> Tensor:
        masked = torch.where(visible[:, None], scores, torch.finfo(scores.dtype).min)
        return torch.einsum("bhls,bshd->blhd", masked.softmax(-1), v).flatten(2)

    without = out(allowed & ~world[:, None, :])
    return without if strength is None else without + strength * (out(allowed) - without)


def block_out(block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.self_attn.o_proj(attended)
    return x + block.mlp(block.post_attention_layernorm(x))
