"""Where memory enters the policy: sites, each a class behind a gate that starts closed.

A site is a place in the policy with a learned scalar, its gate, of strength tanh(gate). Most add a branch to
hidden states, `h + tanh(gate) * branch`, by cross-attention to the memory. One inserts world tokens into the
prefix; there the gate sits on every attention that can see them, `o0 + tanh(gate) * (o1 - o0)`, with o0 the
output without them (layers.attend). Gates start closed. With gradients on, a branch always runs, so that a
closed gate can open: gate 0 leaves the policy as it is, while the gate's own gradient is not zero. Without
gradients, a closed site is skipped.

A new site is a subclass of `Site` and its name in SITES. It says where it acts (POINTS), how it views the
memory (`prepare`) and what its gate scales (`branch`); command line, diagnostics, reports and tests find it
through SITES, and nothing outside this file names one.

    python train.py --fusion late --memory pred                     # F1: after the expert's final norm
    python train.py --fusion suffix_in                              # F2: on the actions before the expert
    python train.py --fusion prefix_tokens --prefix-block state     # F3a: tokens of the prefix
    python train.py --fusion prefix_cross                           # F3b: from the prefix's own embeddings
    pytest tests/test_fusion.py tests/test_sites.py

Shapes: B batch, N hypotheses, K future frames, M = N*K memory tokens (flat index n*K + k), D latent width,
m world tokens, L tokens of the site, W its width, H heads, C chunk, S keys. Source: Flamingo's gated
cross-attention (arXiv 2204.14198).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

CLOSED = 1e-6  # |tanh(gate)| below this is closed where no gradient is wanted
# Where a site can act: on the prefix's embeddings or beside them, as tokens, once a decision; on the embedded
# actions, behind each of the expert's layers or after its final norm, once a denoising step.
ONCE, EACH_STEP = ("prefix", "tokens"), ("actions_in", "layer", "actions_out")
POINTS = ONCE + EACH_STEP


@dataclass(frozen=True)
class FusionConfig:
    """What sites are made with, beside the policy's sizes."""

    heads: int = 8
    """Attention heads of each fusion site."""

    gate_init: float = 0.0
    """Initial value of the gates' scalar, before tanh."""

    prefix_tokens: int = 8
    """World tokens of --fusion prefix_tokens, a multiple of the hypotheses."""

    prefix_block: Literal["prefix", "state"] = "prefix"
    """Where they stand: in the block of images and language, or in one of their own that these can't see."""

    limits: ClassVar = {"heads": (1, 10_000), "prefix_tokens": (1, 10_000), "gate_init": (-100, 100)}


class Sizes(NamedTuple):
    """What a site is built for."""

    expert: int  # width of the actions' hidden states
    trunk: int  # of the prefix's
    layers: int  # of the expert
    memory: int  # D
    steps: int  # K
    hypotheses: int = 1
    coded: bool = False  # whether hypotheses have weights, hence codes, of their own


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
    each: int  # tokens of one hypothesis
    early: bool  # whether images and language see them, too
    bias: Tensor | None = None  # (B, m), added to the attention's logits


View = Tensor | tuple | None  # a site's own, a NamedTuple, of tensors (B, ...) where it acts at each step
MemoryCache = dict[str, View]
Calls = list[tuple[nn.Module, tuple]]  # what read the memory in one pass, and what it was called with


class Attention(NamedTuple):
    """How a site's queries looked at memory in one pass, on average over its calls."""

    p: Tensor  # (B, H, L, m)
    rows: Sequence[int]  # the memory rows n*K + k that these are
    finite: Tensor  # (B, m) bool


class MemoryTokens(nn.Module):
    """`LN(W_m memory + step code [+ hypothesis code])`: memory rows at a site's width.

    The codes tell the K steps apart and, where hypotheses have weights of their own, these too; hypotheses
    that differ by chance alone have no code, and may change places.
    """

    def __init__(self, width: int, sizes: Sizes) -> None:
        super().__init__()
        self.memory_proj = nn.Linear(sizes.memory, width)
        self.step_code = nn.Parameter(torch.randn(sizes.steps, width) * width**-0.5)
        self.memory_norm = nn.LayerNorm(width)
        coded = nn.Parameter(torch.zeros(sizes.hypotheses, width)) if sizes.coded else None
        self.hypothesis_code = coded

    def forward(self, memory: Memory | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Project memory to tokens (B, M, W); give also which rows (B, M) are finite, and their log pi.

        A row with a non-finite value is blanked here and masked in attention.
        """
        memory = as_memory(memory)
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


# ---- sites --------------------------------------------------------------------------------------------


class Site(nn.Module):
    """What all sites share: a gate, and what is called where the site acts."""

    name: ClassVar[str]  # on the command line
    gate_name: ClassVar[str]  # as logged; it begins with world_gate
    at: ClassVar[str]  # one of POINTS
    width: ClassVar[str] = "expert"  # whose hidden states it adds to: the expert's or the trunk's
    variants: ClassVar[tuple[dict, ...]] = ({},)  # settings that tests and bench look at it with

    def __init__(self, config: FusionConfig, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(float(config.gate_init)))
        self.scale = 1.0  # of the gate's strength, in rollouts (`Fusion.rescale`)

    def strength(self) -> Tensor:
        return self.scale * torch.tanh(self.gate)

    def prepare(self, memory: Memory | Tensor) -> View:
        """Make the site's view of a memory, or of its rows (B, M, D) alone, once a decision."""
        raise NotImplementedError

    def branch(self, h: Tensor, view: View, layer: int = 0) -> Tensor:
        """What the gate scales, (B, L, W), behind the expert's `layer` where the site acts at several."""
        raise NotImplementedError

    def forward(self, h: Tensor, view: View, layer: int = 0) -> Tensor:
        """Add the gated branch to h (B, L, W)."""
        return h + self.strength() * self.branch(h, view, layer)

    def reaches_prefix(self) -> bool:
        """Whether images and language may see memory."""
        return self.at == "prefix"

    def readers(self, policy: nn.Module) -> list[nn.Module]:
        """The modules whose calls, recorded over one pass, the next two are given."""
        return [self]

    def attention(self, calls: Calls, view: View) -> Attention | None:
        """How memory was attended to in one pass; None of a site that does not attend."""
        return None

    def logged(self, calls: Calls, view: View) -> dict[str, Tensor]:
        """What else to log, (B, L) each: the lengths of what the site adds and of what it adds to."""
        pairs = [(self.added(*args), args[0]) for _, args in calls]
        lengths = [torch.stack([x.float().norm(dim=-1) for x in side]).mean(0) for side in zip(*pairs)]
        return dict(zip(("ctx_norm", "act_norm"), lengths))  # (B, L, W) -> (B, L)

    def added(self, h: Tensor, view: View, layer: int = 0) -> Tensor:
        return torch.tanh(self.gate) * self.branch(h, view, layer)


class GatedCrossAttention(Site):
    """`h + tanh(gate) * MHA(LN(h), memory tokens)`."""

    def __init__(self, config: FusionConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        width, self.heads = getattr(sizes, self.width), config.heads
        if width % self.heads:
            raise ValueError(
                f"--heads {self.heads} does not divide the fused width {width}: choose a divisor"
            )
        self.norm = nn.LayerNorm(width)
        self.tokens = MemoryTokens(width, sizes)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, W) -> (B, H, L, W/H)

    def prepare(self, memory: Memory | Tensor) -> SiteMemory:
        tokens, finite, bias = self.tokens(memory)
        return SiteMemory(self.split(self.k_proj(tokens)), self.split(self.v_proj(tokens)), finite, bias)

    def branch(self, h: Tensor, view: SiteMemory, layer: int = 0) -> Tensor:
        """What the gate scales, (B, L, W); 0 for a sample whose rows are all non-finite."""
        any_row = view.finite.any(-1)
        # With no row left the mask is lifted, so that softmax stays finite, and the result is dropped below.
        mask = (view.finite | ~any_row[:, None])[:, None, None]  # (B, M) -> (B, 1, 1, M)
        if view.bias is not None:
            mask = with_bias(mask, view.bias)
        context = F.scaled_dot_product_attention(
            self.split(self.q_proj(self.norm(h))), view.k, view.v, attn_mask=mask
        )
        out = self.out_proj(context.transpose(1, 2).flatten(2))  # (B, H, L, W/H) -> (B, L, W)
        return torch.where(any_row[:, None, None], out, 0.0)

    def probabilities(self, h: Tensor, view: SiteMemory) -> Tensor:
        """Recompute the attention (B, H, L, M); NaN for a sample whose rows are all non-finite."""
        mask = view.finite[:, None, None]
        if view.bias is not None:
            mask = with_bias(mask, view.bias)
        return probabilities(self.split(self.q_proj(self.norm(h))), view.k, mask)

    def attention(self, calls: Calls, view: SiteMemory) -> Attention:
        p = torch.stack([self.probabilities(h, view) for _, (h, view, *_) in calls]).mean(0)
        return Attention(p, range(p.shape[-1]), view.finite)

    def added(self, h: Tensor, view: SiteMemory, layer: int = 0) -> Tensor:
        context = self.probabilities(h, view).to(view.v.dtype) @ view.v
        branch = self.out_proj(context.transpose(1, 2).flatten(2))  # (B, H, L, W/H) -> (B, L, W)
        return torch.tanh(self.gate) * branch


class Late(GatedCrossAttention):
    """F1: the expert's hidden states after its final norm, at every denoising step."""

    name, gate_name, at = "late", "world_gate", "actions_out"


class SuffixIn(GatedCrossAttention):
    """F2: the embedded noisy actions before the expert reads them, at every denoising step."""

    name, gate_name, at = "suffix_in", "world_gate_suffix_in", "actions_in"


class PrefixCross(GatedCrossAttention):
    """F3b: the prefix's embeddings before the trunk, once a decision."""

    name, gate_name, at, width = "prefix_cross", "world_gate_prefix_cross", "prefix", "trunk"


class PrefixTokens(Site):
    """F3a: memory rows as tokens of the prefix; the gate's strength goes with them to every attention."""

    name, gate_name, at, width = "prefix_tokens", "world_gate_prefix", "tokens", "trunk"
    variants = ({"prefix_block": "state"}, {"prefix_block": "prefix"})

    def __init__(self, config: FusionConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.tokens = MemoryTokens(sizes.trunk, sizes)
        self.rows = token_rows(config.prefix_tokens, sizes.hypotheses, sizes.steps)
        self.each, self.block = len(self.rows) // sizes.hypotheses, config.prefix_block

    def prepare(self, memory: Memory | Tensor) -> WorldTokens:
        x, finite, bias = self.tokens(memory)
        bias = None if bias is None else bias[:, self.rows]
        early = self.reaches_prefix()
        return WorldTokens(x[:, self.rows], finite[:, self.rows], self.strength(), self.each, early, bias)

    def reaches_prefix(self) -> bool:
        return self.block == "prefix"

    def readers(self, policy: nn.Module) -> list[nn.Module]:
        """The expert's cross-attending layers, or its others where it has none."""
        layers = list(policy.expert.layers)
        return [layer for layer in layers if layer.cross] or layers

    def shares(self, calls: Calls) -> Tensor:
        """Average layers' attention (B, H, C, m) to world tokens, the prefix's last, among all they see."""
        found = []
        for block, (x, rope, mask, past) in calls:
            end = past[0].shape[2]
            found.append(layer_attention(block, x, rope, mask.shown, past)[..., end - len(self.rows) : end])
        return torch.stack(found).mean(0)

    def attention(self, calls: Calls, view: WorldTokens) -> Attention:
        p = self.shares(calls)
        mass = p.sum(-1)
        p = p / mass[..., None].clamp(min=torch.finfo(p.dtype).tiny)
        return Attention(p, self.rows, view.finite)

    def logged(self, calls: Calls, view: WorldTokens) -> dict[str, Tensor]:
        """The share (B, C) of all attention that is theirs; the lengths of what they add to a layer's
        attention, and of what it gives without them."""
        pairs = [(torch.tanh(self.gate) * (shown - hidden), hidden) for hidden, shown in map(outputs, calls)]
        lengths = [torch.stack([x.float().norm(dim=-1) for x in side]).mean(0) for side in zip(*pairs)]
        mass = self.shares(calls).sum(-1).mean(1)  # (B, H, C, m) -> (B, C)
        return {"world_mass": mass, **dict(zip(("ctx_norm", "act_norm"), lengths))}


# A new site is a name here: command line, diagnostics, reports, speed and tests all read this table.
SITES: dict[str, type[Site]] = {site.name: site for site in (Late, SuffixIn, PrefixTokens, PrefixCross)}


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


# ---- all sites of an arm ------------------------------------------------------------------------------


class Fusion(nn.Module):
    """The sites of one arm: `prepare` projects the memory once a decision, calling it applies a point's."""

    def __init__(self, sites: Sequence[str], config: FusionConfig, sizes: Sizes) -> None:
        super().__init__()
        unknown = [s for s in sites if s not in SITES]
        if unknown or not sites:
            raise ValueError(
                f"--fusion {' '.join(unknown) or '(nothing)'} is unknown: choose from {', '.join(SITES)}"
            )
        if len(tokens := [name for name in sites if SITES[name].at == "tokens"]) > 1:
            raise ValueError(f"--fusion {' '.join(tokens)}: one site alone may add tokens; name either")
        self.memory_width = sizes.memory
        self.sites = nn.ModuleDict({name: SITES[name](config, sizes) for name in sites})
        self.open: tuple[str, ...] = tuple(sites)

    def gates(self) -> dict[str, float]:
        """Read each site's strength, tanh(gate), under the name that is logged."""
        return {site.gate_name: torch.tanh(site.gate).item() for site in self.sites.values()}

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

    def attends(self) -> bool:
        """Whether any site attends to memory, so that one can ask to what."""
        return any(type(site).attention is not Site.attention for site in self.sites.values())

    def prepare(self, memory: Memory | Tensor | None) -> MemoryCache | None:
        """Project a memory, or its rows (B, M, D) alone, for each active site; None stays None."""
        if memory is None:
            return None
        memory = as_memory(memory)
        width = memory.rows.shape[-1]
        if width != self.memory_width:
            raise ValueError(f"memory has width {width}, fusion was built for {self.memory_width}")
        return {name: self.sites[name].prepare(memory) for name in self.active()}

    def forward(self, point: str, h: Tensor, memory: MemoryCache | None, layer: int = 0) -> Tensor:
        """Apply the arm's sites that act at `point`, in float32, to h (B, L, W); without any, h as it is."""
        for name, view in (memory or {}).items():
            if self.sites[name].at == point:
                with in_float32(h.device.type):
                    h = self.sites[name](h.float(), view, layer).to(h.dtype)
        return h

    def world_tokens(self, memory: MemoryCache | None) -> WorldTokens | None:
        """The tokens that the memory adds to the prefix, where a site does so."""
        found = [view for name, view in (memory or {}).items() if self.sites[name].at == "tokens"]
        return found[0] if found else None

    def reaches_prefix(self, memory: MemoryCache | None) -> bool:
        """Whether images and language may see this memory."""
        return any(self.sites[name].reaches_prefix() for name in memory or {})

    def repeat(self, memory: MemoryCache | None, times: int) -> MemoryCache | None:
        """Repeat each sample `times` times in a row for the sites that act once a denoising step."""
        if memory is None or times == 1:
            return memory
        return {
            name: repeat(view, times) for name, view in memory.items() if self.sites[name].at in EACH_STEP
        }


def repeat(view: View, times: int) -> View:
    """Repeat each sample of a site's view, or of a tensor (B, ...), `times` times in a row.

    By a stack, whose gradients are added one by one: repeat_interleave's sum is slow on a CPU in bfloat16.
    """
    if view is None or isinstance(view, Tensor):
        return None if view is None else torch.stack([view] * times, dim=1).flatten(0, 1)
    return type(view)(*(repeat(x, times) for x in view))


def in_float32(device: str) -> AbstractContextManager:
    """Undo what casts the expert's layers as they run; not every device (meta) knows of it."""
    casts = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if casts else nullcontext()


def with_bias(mask: Tensor, bias: Tensor) -> Tensor:
    """Turn a mask (B, 1, L, S) bool into what is added to logits: bias (B, S) where one may look."""
    return torch.where(mask, bias[:, None, None], -torch.inf)


def as_memory(memory: Memory | Tensor) -> Memory:
    return memory if isinstance(memory, Memory) else Memory(memory)


# ---- attention, recomputed ----------------------------------------------------------------------------


def probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Attend in float32: q (B, H, L, d), k (B, G, S, d) -> (B, H, L, S); NaN where nothing may be seen.

    The mask says what may be seen, or is added to the logits. Of one laid out for heads that share keys, end
    to end, the first head's part is all there is to know.
    """
    mask = mask[:, :, : q.shape[2]]  # (B, 1, share*L, S) -> (B, 1, L, S)
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # G -> H heads
    logits = q.float() @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return (logits + mask).softmax(-1)


def outputs(call: tuple[nn.Module, tuple]) -> list[Tensor]:
    """Recompute what an expert layer's attention gives, (B, C, W), without world tokens and with them."""
    block, (x, rope, mask, past) = call
    q, keys, values = layer_inputs(block, x, rope, past)
    values = values.float().repeat_interleave(q.shape[1] // values.shape[1], dim=1)  # G -> H heads
    found, out = [], block.self_attn.o_proj
    for seen in (mask.hidden, mask.shown):
        context = probabilities(q, keys, seen) @ values  # (B, H, C, d)
        found.append(out(context.transpose(1, 2).flatten(2).to(out.weight.dtype)))
    return found


def layer_attention(
    block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
) -> Tensor:
    """Recompute the attention (B, H, C, S) of an expert layer (layers.Block), with what `mask` shows."""
    q, keys, _ = layer_inputs(block, x, rope, past)
    return probabilities(q, keys, mask)


def layer_inputs(
    block: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute an expert layer's queries (B, H, C, d), and the keys and values (B, G, S, d) that it sees."""
    h = block.input_layernorm(x)
    if not block.cross:  # its own keys and values come after the prefix's
        own = block.self_attn.keys_values(h, rope)
        past = tuple(torch.cat(pair, dim=2) for pair in zip(past, own))
    return block.self_attn.queries(h, rope), *past
