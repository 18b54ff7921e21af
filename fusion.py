"""Where memory enters the policy: gated cross-attention from its hidden states to imagined futures.

A site is a place in the policy; each has a gate, a learned scalar whose tanh scales what the branch adds.
Gates start closed. With gradients on, the branch always runs, so that a closed gate can open: `h +
tanh(gate) * branch` is bit-identical to `h` at gate 0, while the gate's own gradient is not zero. Without
gradients, a closed site is skipped.

    python train.py --fusion late --memory pred      # F1: after the expert's final norm
    pytest tests/test_fusion.py

Shapes: B batch, N hypotheses, K future frames, M = N*K memory tokens (flat index n*K + k), D latent width,
L tokens of the site, W its width, H heads. Sources: Flamingo's gated cross-attention (arXiv 2204.14198).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SITES = ("late",)
GATE_NAMES = {"late": "world_gate"}  # as logged
CLOSED = 1e-6  # |tanh(gate)| below this is closed where no gradient is wanted


class SiteMemory(NamedTuple):
    """One site's view of the memory, projected once a decision."""

    k: Tensor  # (B, H, M, W/H)
    v: Tensor  # (B, H, M, W/H)
    finite: Tensor  # (B, M) bool: rows that may be attended to


MemoryCache = dict[str, SiteMemory]


class GatedCrossAttention(nn.Module):
    """`h + tanh(gate) * MHA(LN(h), LN(W_m memory + step code))`."""

    def __init__(
        self, width: int, memory_width: int, steps: int, heads: int = 8, gate_init: float = 0.0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"--heads {heads} does not divide the fused width {width}: choose a divisor")
        self.heads, self.steps = heads, steps
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self.norm = nn.LayerNorm(width)
        self.memory_proj = nn.Linear(memory_width, width)
        self.step_code = nn.Parameter(torch.randn(steps, width) * width**-0.5)
        self.memory_norm = nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, W) -> (B, H, L, W/H)

    def prepare(self, memory: Tensor) -> SiteMemory:
        """Project memory (B, M, D); a row with a non-finite value is blanked here and masked in attention."""
        finite = memory.isfinite().all(-1)
        # torch.where, not a product: 0 * NaN is NaN, in value and in gradient.
        memory = torch.where(finite[..., None], memory, 0.0)
        code = self.step_code.repeat(memory.shape[1] // self.steps, 1)  # (K, W) -> (N*K, W)
        tokens = self.memory_norm(self.memory_proj(memory) + code)
        return SiteMemory(self.split(self.k_proj(tokens)), self.split(self.v_proj(tokens)), finite)

    def forward(self, h: Tensor, memory: SiteMemory) -> Tensor:
        """Add the gated branch to h (B, L, W); a sample whose rows are all non-finite gets nothing added."""
        any_row = memory.finite.any(-1)
        # With no row left the mask is lifted, so that softmax stays finite, and the result is dropped below.
        mask = (memory.finite | ~any_row[:, None])[:, None, None]  # (B, M) -> (B, 1, 1, M)
        context = F.scaled_dot_product_attention(
            self.split(self.q_proj(self.norm(h))), memory.k, memory.v, attn_mask=mask
        )
        branch = self.out_proj(context.transpose(1, 2).flatten(2))  # (B, H, L, W/H) -> (B, L, W)
        return h + torch.tanh(self.gate) * torch.where(any_row[:, None, None], branch, 0.0)


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
    ) -> None:
        super().__init__()
        unknown = [s for s in sites if s not in SITES]
        if unknown or not sites:
            raise ValueError(
                f"--fusion {' '.join(unknown) or '(nothing)'} is unknown: choose from {', '.join(SITES)}"
            )
        self.memory_width = memory_width
        self.sites = nn.ModuleDict(
            {s: GatedCrossAttention(widths[s], memory_width, steps, heads, gate_init) for s in sites}
        )
        self.open: tuple[str, ...] = sites

    def gates(self) -> dict[str, float]:
        """Read each site's strength, tanh(gate), under the name that is logged."""
        return {GATE_NAMES[name]: torch.tanh(site.gate).item() for name, site in self.sites.items()}

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

    def prepare(self, memory: Tensor | None, repeat: int = 1) -> MemoryCache | None:
        """Project memory (B, M, D) for each active site, then repeat samples in a row; None stays None."""
        if memory is None:
            return None
        if memory.shape[-1] != self.memory_width:
            raise ValueError(f"memory has width {memory.shape[-1]}, fusion was built for {self.memory_width}")
        caches = {name: self.sites[name].prepare(memory) for name in self.active()}
        if repeat == 1:
            return caches
        return {n: SiteMemory(*(x.repeat_interleave(repeat, dim=0) for x in c)) for n, c in caches.items()}

    def forward(self, site: str, h: Tensor, memory: MemoryCache | None) -> Tensor:
        """Fuse at `site` if it is this arm's, is active and has memory; else give h back untouched."""
        if memory is None or site not in memory:
            return h
        return self.sites[site](h, memory[site])
