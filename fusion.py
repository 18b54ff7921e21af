"""Where memory enters the policy: four sites, each behind a gate that starts closed.

A site is a place in the policy with a learned scalar, its gate, of strength tanh(gate). Three sites add a
gated cross-attention to hidden states: `h + tanh(gate) * branch`. The fourth inserts world tokens into the
prefix; there the gate sits on every attention that can see them, `o0 + tanh(gate) * (o1 - o0)`, with o0 the
output without them (layers.attend). Gates start closed. With gradients on, a branch always runs, so that a
closed gate can open: gate 0 leaves the policy as it is, while the gate's own gradient is not zero. Without
gradients, a closed site is skipped.

    python train.py --fusion late --memory pred                     # F1: after the expert's final norm
    python train.py --fusion suffix_in                              # F2: on the actions before the expert
    python train.py --fusion prefix_tokens --prefix-block state     # F3a: tokens of the prefix
    python train.py --fusion prefix_cross                           # F3b: from the prefix's own embeddings
    pytest tests/test_fusion.py

Shapes: B batch, N hypotheses, K future frames, M = N*K memory tokens (flat index n*K + k), D latent width,
m world tokens, L tokens of the site, W its width, H heads. Source: Flamingo's gated cross-attention
(arXiv 2204.14198).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Site = Literal["late", "suffix_in", "prefix_tokens", "prefix_cross"]
SITES: tuple[str, ...] = get_args(Site)
SUFFIX_SITES = ("late", "suffix_in")  # once a denoising step; the others once a decision
GATE_NAMES = {  # as logged
    "late": "world_gate",
    "suffix_in": "world_gate_suffix_in",
    "prefix_tokens": "world_gate_prefix",
    "prefix_cross": "world_gate_prefix_cross",
}
CLOSED = 1e-6  # |tanh(gate)| below this is closed where no gradient is wanted


class Memory(NamedTuple):
    """What a decision may attend to: imagined futures and, from a mixture, how likely each hypothesis is."""

    rows: Tensor  # (B, M, D)
    log_pi: Tensor | None = None  # (B, N)


class SiteMemory(NamedTuple):
    """A cross-attention's view of the memory, projected once a decision."""

    k: Tensor  # (B, H, M, W/H)
    v: Tensor  # (B, H, M, W/H)
    finite: Tensor  # (B, M) bool: rows that may be attended to
    bias: Tensor | None = None  # (B, M), added to the attention's logits


class WorldTokens(NamedTuple):
    """Memory as tokens of the prefix."""

    x: Tensor  # (B, m, W)
    finite: Tensor  # (B, m) bool: tokens that may be attended to
    strength: Tensor  # (), tanh(gate)
    bias: Tensor | None = None  # (B, m), added to the attention's logits


MemoryCache = dict[str, SiteMemory | WorldTokens]


class MemoryTokens(nn.Module):
    """`LN(W_m memory + step code [+ hypothesis code])`: memory rows at a site's width.

    The codes tell the K steps apart and, where hypotheses have weights of their own (`coded` of them), these
    too; hypotheses that differ by chance alone have no code, and may change places.
    """

    def __init__(self, width: int, memory_width: int, steps: int, coded: int = 0) -> None:
        super().__init__()
        self.memory_proj = nn.Linear(memory_width, width)
        self.step_code = nn.Parameter(torch.randn(steps, width) * width**-0.5)
        self.memory_norm = nn.LayerNorm(width)
        self.hypothesis_code = nn.Parameter(torch.zeros(coded, width)) if coded else None

    def forward(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor | None]:
        """Project memory to tokens (B, M, W); give also which rows (B, M) are finite, and their log pi.

        A row with a non-finite value is blanked here and masked in attention.
        """
        steps, rows, bias = len(self.step_code), memory.rows, None
        finite = rows.isfinite().all(-1)
        if memory.log_pi is not None:
            bias = memory.log_pi.repeat_interleave(steps, dim=1)  # (B, N) -> (B, N*K)
            finite = finite & bias.isfinite()
            bias = torch.where(finite, bias, 0.0)
        # torch.where, not a product: 0 * NaN is NaN, in value and in gradient.
        rows = torch.where(finite[..., None], rows, 0.0)
        code = self.step_code.repeat(rows.shape[1] // steps, 1)  # (K, W) -> (N*K, W)
        if self.hypothesis_code is not None:
            code = code + self.hypothesis_code.repeat_interleave(steps, dim=0)  # (N, W) -> (N*K, W)
        return self.memory_norm(self.memory_proj(rows) + code), finite, bias


class GatedCrossAttention(nn.Module):
    """`h + tanh(gate) * MHA(LN(h), memory tokens)`."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        steps: int,
        heads: int = 8,
        gate_init: float = 0.0,
        coded: int = 0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"--heads {heads} does not divide the fused width {width}: choose a divisor")
        self.heads = heads
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self.scale = 1.0  # of the gate's strength, in rollouts (`Fusion.rescale`)
        self.norm = nn.LayerNorm(width)
        self.tokens = MemoryTokens(width, memory_width, steps, coded)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, W) -> (B, H, L, W/H)

    def prepare(self, memory: Memory | Tensor) -> SiteMemory:
        """Project a memory, or its rows (B, M, D) alone."""
        tokens, finite, bias = self.tokens(as_memory(memory))
        return SiteMemory(self.split(self.k_proj(tokens)), self.split(self.v_proj(tokens)), finite, bias)

    def branch(self, h: Tensor, memory: SiteMemory) -> Tensor:
        """What the gate scales, (B, L, W); 0 for a sample whose rows are all non-finite."""
        any_row = memory.finite.any(-1)
        # With no row left the mask is lifted, so that softmax stays finite, and the result is dropped below.
        mask = (memory.finite | ~any_row[:, None])[:, None, None]  # (B, M) -> (B, 1, 1, M)
        if memory.bias is not None:
            mask = with_bias(mask, memory.bias)
        context = F.scaled_dot_product_attention(
            self.split(self.q_proj(self.norm(h))), memory.k, memory.v, attn_mask=mask
        )
        out = self.out_proj(context.transpose(1, 2).flatten(2))  # (B, H, L, W/H) -> (B, L, W)
        return torch.where(any_row[:, None, None], out, 0.0)

    def forward(self, h: Tensor, memory: SiteMemory) -> Tensor:
        """Add the gated branch to h (B, L, W)."""
        return h + self.scale * torch.tanh(self.gate) * self.branch(h, memory)


class PrefixTokens(nn.Module):
    """Memory rows as tokens of the prefix; the gate's strength goes with them to every attention."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        steps: int,
        count: int,
        hypotheses: int,
        gate_init: float = 0.0,
        coded: int = 0,
    ) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self.scale = 1.0
        self.tokens = MemoryTokens(width, memory_width, steps, coded)
        self.rows = token_rows(count, hypotheses, steps)

    def prepare(self, memory: Memory | Tensor) -> WorldTokens:
        """Make world tokens (B, m, W) of a memory, or of its rows (B, M, D) alone."""
        x, finite, bias = self.tokens(as_memory(memory))
        bias = None if bias is None else bias[:, self.rows]
        return WorldTokens(x[:, self.rows], finite[:, self.rows], self.scale * torch.tanh(self.gate), bias)


def token_rows(count: int, hypotheses: int, steps: int) -> list[int]:
    """Choose the memory rows that become `count` world tokens: of each hypothesis evenly, its last step too.

    Raises ValueError where they cannot be shared out evenly, or are more than there are rows.
    """
    each = count // hypotheses
    if count < 1 or count % hypotheses or each > steps:
        raise ValueError(
            f"--prefix-tokens {count} must be a multiple of {hypotheses} hypotheses and at most "
            f"{hypotheses * steps}, the memory's rows"
        )
    chosen = [-(-(j + 1) * steps // each) - 1 for j in range(each)]  # ceil((j + 1) K / each) - 1
    return [n * steps + k for n in range(hypotheses) for k in chosen]


class Fusion(nn.Module):
    """The sites of one arm: `prepare` projects the memory once a decision, calling it applies a site."""

    def __init__(
        self,
        sites: tuple[str, ...],
        widths: dict[str, int],
        memory_width: int,
        steps: int,
        heads: int = 8,
        gate_init: float = 0.0,
        hypotheses: int = 1,
        coded: bool = False,
        prefix_tokens: int = 8,
        prefix_block: str = "prefix",
    ) -> None:
        super().__init__()
        unknown = [s for s in sites if s not in SITES]
        if unknown or not sites:
            raise ValueError(
                f"--fusion {' '.join(unknown) or '(nothing)'} is unknown: choose from {', '.join(SITES)}"
            )
        self.memory_width, self.prefix_block, self.hypotheses = memory_width, prefix_block, hypotheses
        self.sites, codes = nn.ModuleDict(), hypotheses if coded else 0
        for site in sites:
            width = widths[site]
            if site == "prefix_tokens":
                made = PrefixTokens(width, memory_width, steps, prefix_tokens, hypotheses, gate_init, codes)
            else:
                made = GatedCrossAttention(width, memory_width, steps, heads, gate_init, codes)
            self.sites[site] = made
        self.open: tuple[str, ...] = tuple(sites)

    def gates(self) -> dict[str, float]:
        """Read each site's strength, tanh(gate), under the name that is logged."""
        return {GATE_NAMES[name]: torch.tanh(site.gate).item() for name, site in self.sites.items()}

    def rescale(self, scale: float) -> None:
        """Multiply every gate's strength from now on: how much memory does is a matter of dose."""
        for site in self.sites.values():
            site.scale = scale

    def train(self, mode: bool = True) -> Fusion:
        """Switch mode; `eval()` reads once which sites are open, so that compiled graphs see constants."""
        super().train(mode)
        if not mode:
            strength = {name: abs(torch.tanh(site.gate.detach()).item()) for name, site in self.sites.items()}
            self.open = tuple(name for name, value in strength.items() if value >= CLOSED)
        return self

    def active(self) -> tuple[str, ...]:
        """Name the sites that run now: all, with gradients on, since a skipped gate never opens."""
        return tuple(self.sites) if torch.is_grad_enabled() or self.training else self.open

    def prepare(self, memory: Memory | Tensor | None) -> MemoryCache | None:
        """Project a memory, or its rows (B, M, D) alone, for each active site; None stays None."""
        if memory is None:
            return None
        memory = as_memory(memory)
        width = memory.rows.shape[-1]
        if width != self.memory_width:
            raise ValueError(f"memory has width {width}, fusion was built for {self.memory_width}")
        return {name: self.sites[name].prepare(memory) for name in self.active()}

    def forward(self, site: str, h: Tensor, memory: MemoryCache | None) -> Tensor:
        """Fuse at a cross-attending `site` if it is this arm's and has memory; else give h back untouched."""
        if memory is None or site not in memory:
            return h
        return self.sites[site](h, memory[site])


def with_bias(mask: Tensor, bias: Tensor) -> Tensor:
    """Turn a mask (B, 1, L, S) bool into what is added to logits: bias (B, S) where one may look."""
    return torch.where(mask, bias[:, None, None], -torch.inf)


def as_memory(memory: Memory | Tensor) -> Memory:
    return memory if isinstance(memory, Memory) else Memory(memory)


def repeat_memory(memory: MemoryCache | None, times: int) -> MemoryCache | None:
    """Repeat each sample `times` times in a row for the sites that run once a denoising step."""
    if memory is None or times == 1:
        return memory
    each = lambda x: None if x is None else x.repeat_interleave(times, dim=0)  # noqa: E731
    return {name: SiteMemory(*map(each, memory[name])) for name in SUFFIX_SITES if name in memory}
