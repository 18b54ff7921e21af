"""How memory is made: the prophet that imagines futures from past latents, its loss, and the memory modes.

The prophet reads T world latents of the past and predicts the change to each of K future ones; the policy is
handed absolute latents. Which memory it is handed is a mode: `pred`, or a control that takes its place. One
pure function, `make_memory`, serves training, offline evaluation and rollout; everything random comes in as a
tensor, so results do not depend on what else is in the batch.

| mode | memory |
| --- | --- |
| `off` | none: fusion is bypassed |
| `pred` | the prophet's futures |
| `oracle` | the true futures: in training and offline, never in a rollout |
| `zero` | zeros: not `off`, since biases still speak |
| `random` | Gaussian, with the data's deviation per dimension and its correlation over the K steps |
| `shuffle` | the prophet's futures of another episode's past |
| `wrong_task` | the same, of an episode of another task |
| `stale` | the episode's first `pred`, kept to its end: in rollouts |
| `signflip` | `pred` times a fixed sign per dimension; half of the variance is turned, so their cosine is 0 |
| `mean` | the data's mean future |
| `current` | the present latent K times: a second encoder without prediction |
| `history` | the T past latents, the oldest repeated to fill K: memory of the past without prediction |

A bank is N hypotheses of the future. They never attend to one another, so that hypothesis i does not depend
on N; what tells them apart is a method, a class: chance (`dropout`, `noise`), weights of their own
(`ensemble`, `mixture`) or, as a control, nothing (`repeat`). Best-of-N losses let them specialise. The
policy is handed what a method imagines of the past alone; what the world loss sees may differ
(`Prophet.learned`), so that a posterior, which reads the future, has no way to the policy.

A new mode is a line of TABLE, a new method a subclass of `Prophet` and its name in METHODS.

    python train.py --fusion late --memory pred
    python train.py --fusion late --num-hypotheses 4 --hypothesis-method ensemble --world-loss softmin
    pytest tests/test_prophet.py

Shapes: B batch, T history frames, K future frames, N hypotheses, D latent width, h prophet width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

WorldLoss = Literal["single", "mean", "min", "softmin", "rwta"]


class Given(NamedTuple):
    """What a memory may be made from; what its mode does not need may be absent."""

    steps: int  # K
    like: Tensor  # (B, D), any tensor of the right batch, width and type
    futures: Tensor | None = None  # (B, N, K, D), the prophet's absolute ones, of the mode's past
    z_hist: Tensor | None = None  # (B, T, D)
    z_future: Tensor | None = None  # (B, K, D)
    noise: Tensor | None = None  # (B, N*K, D), with the data's own structure
    mean: Tensor | None = None  # (K, D), the data's mean future
    spread: Tensor | None = None  # (D,), the data's deviation per dimension


class Mode(NamedTuple):
    """One memory mode: what it needs, and its rows (B, N*K, D), or (B, K, D) for each hypothesis, or None."""

    needs: tuple[str, ...]  # the prophet, and what batches have under these names
    rows: Callable[[Given], Tensor | None]


def imagined(given: Given) -> Tensor:
    return given.futures.flatten(1, 2)  # (B, N, K, D) -> (B, N*K, D)


# A new mode is a line here: command line, training, held-out losses, rollouts and filmstrips ask this table.
TABLE: dict[str, Mode] = {
    "off": Mode((), lambda g: None),
    "pred": Mode(("prophet", "z_hist"), imagined),
    "oracle": Mode(("z_future",), lambda g: g.z_future),
    "zero": Mode((), lambda g: g.like.new_zeros(len(g.like), g.steps, g.like.shape[-1])),
    "random": Mode(("noise",), lambda g: g.noise),
    "shuffle": Mode(("prophet", "z_partner"), imagined),
    "wrong_task": Mode(("prophet", "z_other"), imagined),
    "stale": Mode(("prophet", "z_first"), imagined),
    "signflip": Mode(
        ("prophet", "z_hist"), lambda given: imagined(given) * signs(given.spread).to(given.like)
    ),
    "mean": Mode(("mean",), lambda g: g.mean.to(g.like).expand(len(g.like), -1, -1)),
    "current": Mode(("z_hist",), lambda g: g.z_hist[:, -1:].expand(-1, g.steps, -1)),
    "history": Mode(
        ("z_hist",), lambda given: given.z_hist[:, past_rows(given.z_hist.shape[1], given.steps)]
    ),
}
MODES = tuple(TABLE)
NEEDS: dict[str, tuple[str, ...]] = {name: mode.needs for name, mode in TABLE.items()}
ROLLOUT_MODES = tuple(mode for mode in MODES if "z_future" not in NEEDS[mode])  # nobody has the future there
MemoryMode = Literal[
    tuple(mode for mode in MODES if "z_first" not in NEEDS[mode])
]  # a sample has no first one
# Changes to `pred` with a bank, after training: which of N hypotheses the policy is left with.
INTERVENTIONS = ("best1", "mean1", "dup", "drop:i")
GATE = "gate:"  # a change to any mode: the gates' strength times a number, as in gate:0.5
STILL = 0.01  # a change shorter than this share of the usual one has no direction to learn


class ProphetBlock(nn.Module):
    """Pre-norm transformer block, feed-forward 4h; a mask scales what its branches add."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, L, 3h) -> 3 x (B, H, L, h/H)
        added = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + (added if mask is None else mask * added)
        added = self.mlp(self.norm2(x))
        return x + (added if mask is None else mask * added)


class Imagined(NamedTuple):
    """What a prophet makes of a past."""

    y: Tensor  # (B, N, K, D), changes, or latents with --no-delta
    log_pi: Tensor | None = None  # (B, N), from a mixture
    cost: Tensor | None = None  # (B,), what the world loss adds: a posterior's divergence from the prior


# ---- prophets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProphetConfig:
    """What prophets are made with."""

    history: int = 4
    """Past world latents T that the prophet reads."""

    future: int = 8
    """Future world latents K that it imagines."""

    num_hypotheses: int = 1
    """Imagined futures N that the memory holds."""

    hypothesis_method: HypothesisMethod = "none"
    """What tells hypotheses apart: nothing (N = 1, or repeat: one future N times, a control), dropout masks,
    noise in the queries, heads of their own (ensemble), such heads with odds (mixture)."""

    hypothesis_sigma: float = 0.5
    """Size of the noise of --hypothesis-method noise, in units of the queries' own."""

    prophet_dropout: float = 0.0
    """Share that --hypothesis-method dropout blanks, in training and in rollouts."""

    prophet_layers: int = 2
    """Transformer layers of the prophet."""

    prophet_heads: int = 8
    """Attention heads of the prophet."""

    limits: ClassVar = {
        **dict.fromkeys(("history", "future", "num_hypotheses"), (1, 10_000)),
        **{"prophet_layers": (1, 10_000), "prophet_heads": (1, 10_000), "hypothesis_sigma": (0, 1e6)},
    }


class Prophet(nn.Module):
    """Imagine N x K futures from T past latents: z_hist (B, T, D) -> changes or latents Y (B, N, K, D).

    Methods are its subclasses: what tells a bank's hypotheses apart.
    """

    chance: ClassVar[bool] = False  # hypotheses differ by what is drawn for them: exchangeable
    coded: ClassVar[bool] = False  # by weights of their own
    single: ClassVar[bool] = False  # there is one
    alike: ClassVar[bool] = False  # nothing tells them apart: what several that differ are compared with
    settings: ClassVar[dict] = {}  # what it is tried with, where it needs any

    def __init__(self, config: ProphetConfig, latent: int) -> None:
        super().__init__()
        width, future, heads = prophet_width(latent), config.future, config.prophet_heads
        if width % heads:
            raise ValueError(
                f"--prophet-heads {heads} does not divide the prophet's width {width}: choose a divisor"
            )
        self.config, self.history, self.hypotheses = config, config.history, config.num_hypotheses
        own = self.hypotheses if self.coded else 1
        self.proj_in = nn.Linear(latent, width)
        # Codes make time order matter: without them a permuted history would give the same future.
        self.time_code = nn.Parameter(torch.randn(self.history, width) * width**-0.5)
        self.query = nn.Parameter(torch.randn(own, future, width) * width**-0.5)
        self.blocks = nn.ModuleList(ProphetBlock(width, heads) for _ in range(config.prophet_layers))
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.ModuleList(nn.Linear(width, latent) for _ in range(own))

    @classmethod
    def check(cls, config: ProphetConfig) -> None:
        """Raise ValueError where an arm's settings do not fit the method."""
        count, method, share = config.num_hypotheses, config.hypothesis_method, config.prophet_dropout
        if (count == 1) != cls.single:
            apart = ", ".join(name for name, other in METHODS.items() if not other.single)
            raise ValueError(
                f"--num-hypotheses {count} with --hypothesis-method {method}: one hypothesis needs none, "
                f"several need a method that tells them apart: {apart}"
            )
        if issubclass(cls, Dropout) != (share > 0) or not 0 <= share < 1:
            raise ValueError(
                f"--prophet-dropout {share} with --hypothesis-method {method}: dropout needs "
                "a share between 0 and 1, other methods 0"
            )

    @staticmethod
    def draw(rngs: list[np.random.Generator], config: ProphetConfig, width: int) -> np.ndarray | None:
        """Draw what tells one sample's hypotheses apart, (N, ..., h), each from its own generator."""
        return None

    def queries(self, batch: int, chance: Tensor | None) -> Tensor:
        """What futures are asked with, (B, N, K, h)."""
        return self.query.expand(self.hypotheses, -1, -1).expand(batch, -1, -1, -1)

    def mask(self, chance: Tensor | None) -> Tensor | None:
        """What scales the blocks' branches, (B, N, 1, h), if anything."""
        return None

    def answer(self, y: Tensor, x: Tensor) -> Imagined:
        """Make the answer of the futures (B, N, K, D) and the trunk's output (B, N, T + K, h)."""
        return Imagined(y)

    def forward(self, z_hist: Tensor, chance: Tensor | None = None) -> Imagined:
        """Run the trunk once for each hypothesis, folded into the batch, so that they cannot see one another.

        Args: z_hist (B, T, D); chance (B, N, ..., h), as the method's `draw` makes it for each sample.
        """
        past = self.proj_in(z_hist) + self.time_code  # (B, T, D) -> (B, T, h)
        query, mask = self.queries(len(z_hist), chance), self.mask(chance)
        batch, count = query.shape[:2]
        past = past[:, None].expand(-1, count, -1, -1)  # (B, T, h) -> (B, N, T, h)
        x = torch.cat([past, query], dim=2).flatten(0, 1)  # (B*N, T + K, h)
        for block in self.blocks:
            x = block(x, None if mask is None else mask.flatten(0, 1))  # (B, N, 1, h) -> (B*N, 1, h)
        x = self.norm(x).unflatten(0, (batch, count))  # (B*N, T + K, h) -> (B, N, T + K, h)
        futures = x[:, :, self.history :]
        if len(self.proj_out) == 1:
            y = self.proj_out[0](futures)  # (B, N, K, h) -> (B, N, K, D)
        else:
            y = torch.stack([head(futures[:, n]) for n, head in enumerate(self.proj_out)], dim=1)
        return self.answer(y, x)

    def learned(self, imagined: Imagined, world: dict[str, Tensor]) -> Imagined:
        """Give what the world loss sees: what the policy saw, or what a posterior makes of the future, too.

        Args: imagined, made of the past alone; world with z_hist (B, T, D), z_future (B, K, D), valid (B, K)
        and, of a method with chance, chance. Nothing of the answer reaches the policy.
        """
        return imagined


class Repeat(Prophet):
    """A control: one future N times, as many tokens without diversity."""

    alike = True

    def queries(self, batch: int, chance: Tensor | None) -> Tensor:
        return self.query.expand(batch, -1, -1, -1)  # (1, K, h) -> (B, 1, K, h)

    def answer(self, y: Tensor, x: Tensor) -> Imagined:
        return Imagined(y.expand(-1, self.hypotheses, -1, -1))  # (B, 1, K, D) -> (B, N, K, D)


class Dropout(Prophet):
    """By a mask each, shared over time, scaled so that its mean is 1, in rollouts too."""

    chance, settings = True, {"prophet_dropout": 0.3}

    @staticmethod
    def draw(rngs: list[np.random.Generator], config: ProphetConfig, width: int) -> np.ndarray:
        masks = [rng.random((1, width), np.float32) >= config.prophet_dropout for rng in rngs]
        return np.stack(masks).astype(np.float32) / (1 - config.prophet_dropout)  # (N, 1, h)

    def mask(self, chance: Tensor) -> Tensor:
        return chance


class Noise(Prophet):
    """By unit Gaussians, scaled and added to the queries."""

    chance = True

    @staticmethod
    def draw(rngs: list[np.random.Generator], config: ProphetConfig, width: int) -> np.ndarray:
        return np.stack([rng.standard_normal((config.future, width), np.float32) for rng in rngs])

    def queries(self, batch: int, chance: Tensor) -> Tensor:
        size = self.config.hypothesis_sigma * self.query.square().mean().sqrt()
        return super().queries(batch, chance) + size * chance


class Ensemble(Prophet):
    """By queries and output heads of their own."""

    coded = True


class Mixture(Ensemble):
    """As an ensemble, with odds: how likely each is."""

    def __init__(self, config: ProphetConfig, latent: int) -> None:
        super().__init__(config, latent)
        self.odds = nn.Linear(prophet_width(latent), self.hypotheses)

    @classmethod
    def check(cls, config: ProphetConfig) -> None:
        super().check(config)
        if config.detach_memory and config.world_loss != "softmin":
            raise ValueError(
                f"--hypothesis-method mixture with --detach-memory and --world-loss {config.world_loss}: "
                "nothing would teach the odds; use softmin"
            )

    def answer(self, y: Tensor, x: Tensor) -> Imagined:
        return Imagined(y, self.odds(x.mean((1, 2))).log_softmax(-1))  # (B, N, T + K, h) -> (B, N)


class One(Prophet):
    """One hypothesis: nothing to tell apart."""

    single = True


# A new method is a name here: command line, training, rollouts and tests all read this table.
METHODS: dict[str, type[Prophet]] = {
    "none": One,
    "repeat": Repeat,
    "dropout": Dropout,
    "noise": Noise,
    "ensemble": Ensemble,
    "mixture": Mixture,
}
HypothesisMethod = Literal[tuple(METHODS)]


def prophet_width(latent: int) -> int:
    return min(latent, 512)


def absolute(change: Tensor, z_hist: Tensor, delta: bool) -> Tensor:
    """Turn predictions (B, N, K, D) into latents: memory is always absolute."""
    return change + z_hist[:, -1, None, None] if delta else change


def make_memory(mode: str, steps: int, *, hypotheses: int = 1, **given: Tensor | None) -> Tensor | None:
    """Make the memory (B, N*K, D) of a mode; `off` gives None.

    Args: steps K; what else `Given` holds, of which `like` must be there. Raises ValueError for an unknown
    mode, or where what it needs is not there.
    """
    if mode not in TABLE:
        raise ValueError(f"memory mode {mode!r} is unknown: choose from {', '.join(MODES)}")
    has = Given(steps, **given)
    required = ("futures",) if "prophet" in NEEDS[mode] else NEEDS[mode]  # which the prophet made of a past
    if any(getattr(has, name) is None for name in required):
        raise ValueError(f"memory mode {mode!r} needs {' and '.join(NEEDS[mode])}, which is not there")
    rows = TABLE[mode].rows(has)
    return rows.repeat(1, hypotheses, 1) if rows is not None and rows.shape[1] == steps else rows


def parse_mode(name: str, hypotheses: int, own: str = "pred") -> tuple[str, str | None]:
    """Split what --memory names into a mode and a change to it; ValueError for neither.

    Changes are interventions on the bank of `pred`, and the gates' strength under the `own` mode.
    """
    if name in MODES:
        return name, None
    if gate_scale(name) is not None:
        return own, name
    which = name.removeprefix("drop:")
    if name not in INTERVENTIONS[:3] and not (which != name and which.isdigit()):
        known = f"{', '.join(MODES)}; with a bank {', '.join(INTERVENTIONS)}; {GATE}0.5"
        raise ValueError(f"--memory {name} is unknown: choose from {known}")
    if hypotheses == 1:
        raise ValueError(f"--memory {name}: this arm imagines one future, there is no bank to change")
    if which != name and int(which) >= hypotheses:
        raise ValueError(f"--memory {name}: hypotheses are numbered 0 to {hypotheses - 1}")
    return "pred", name


def gate_scale(name: str | None) -> float | None:
    """The number of `gate:0.5`; None of any other name."""
    if name is None or not re.fullmatch(GATE + r"\d{1,3}(\.\d{1,3})?", name):
        return None
    return float(name.removeprefix(GATE))


def intervene(name: str, futures: Tensor, log_pi: Tensor | None, best: Tensor | None = None) -> tuple:
    """Change a bank's futures (B, N, K, D) and odds (B, N); what is taken away is not finite, hence not seen.

    `best1`: hypothesis `best` (B,) alone; `mean1`: their mean, as hypothesis 0; `dup`: hypothesis 0 in every
    place, as many tokens without diversity; `drop:i`: all but i.
    """
    count = futures.shape[1]
    if name == "dup":
        return futures[:, :1].expand(-1, count, -1, -1), None
    own = torch.arange(count, device=futures.device)
    if name == "mean1":
        futures, kept, log_pi = futures.mean(1, keepdim=True).expand(-1, count, -1, -1), own == 0, None
    elif name == "best1":
        kept = own == best[:, None]  # (B, N)
    else:
        kept = own != int(name.removeprefix("drop:"))
    return torch.where(kept.expand(len(futures), -1)[..., None, None], futures, torch.nan), log_pi


def signs(spread: Tensor) -> Tensor:
    """One fixed +-1 a latent dimension (D,), so that half of the variance keeps its sign and half is turned.

    Dimensions come by falling deviation `spread` (D,), each with the sign that evens the two sums out.
    """
    out, sums = torch.ones(len(spread)), [0.0, 0.0]
    variance = spread.detach().double().cpu().square()
    for dimension in variance.argsort(descending=True, stable=True).tolist():
        turned = sums[0] > sums[1]
        out[dimension] = -1.0 if turned else 1.0
        sums[turned] += variance[dimension].item()
    return out


def past_rows(history: int, steps: int) -> list[int]:
    """Which of T past latents fill K rows, in time order: the oldest repeated, or the newest K."""
    return [max(0, history - steps + k) for k in range(steps)]


def change_target(z_hist: Tensor, z_future: Tensor, delta: bool) -> Tensor:
    """Give what the prophet predicts, (B, K, D): the change from the present latent, or the future one."""
    return z_future - z_hist[:, -1:] if delta else z_future


def counted_steps(target: Tensor, valid: Tensor, scale: Tensor) -> Tensor:
    """Which steps (B, K) have a change to learn: valid, and longer than 1 % of scale (K,), the usual."""
    return valid & (target.norm(dim=-1) > STILL * scale)


def world_loss(
    predicted: Tensor, target: Tensor, valid: Tensor, scale: Tensor, lambda_mag: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare predicted changes (B, N, K, D) with true ones (B, K, D), in float32.

    A future clamped at the episode's end has no direction, so only `counted_steps` count. l = mean over them
    of (1 - cos) + lambda_mag * smooth L1 of the log lengths; scale (K,) is the data set's RMS length of each
    change.
    Returns: l (B, N), 0 where nothing counts; whether a sample counts (B,) bool; the mean cosine (B, N).
    """
    predicted, target = predicted.float(), target.float()
    counted = counted_steps(target, valid, scale)
    # Uncounted targets are replaced before the division, not multiplied away after it: 0 * NaN is NaN.
    target = torch.where(counted[..., None], target, torch.ones_like(target))[:, None]
    cosine = F.cosine_similarity(predicted, target, dim=-1)  # (B, N, K)
    floor = 0.1 * scale
    magnitude = F.smooth_l1_loss(
        (safe_norm(predicted) + floor).log(),
        (target.norm(dim=-1) + floor).log().expand_as(cosine),
        reduction="none",
    )
    weight = counted / counted.sum(1, keepdim=True).clamp(min=1)  # (B, K), a sample's counted steps sum to 1
    weight = weight[:, None]
    losses = ((1 - cosine + lambda_mag * magnitude) * weight).sum(-1)  # (B, N, K) -> (B, N)
    return losses, counted.any(1), (cosine * weight).sum(-1).detach()


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean length over the last axis with a finite gradient at 0."""
    return (x.square().sum(-1) + 1e-12).sqrt()


def bank_loss(
    losses: Tensor,
    kind: str,
    single: Tensor,
    log_pi: Tensor | None = None,
    tau: float = 0.1,
    eps: float = 0.05,
) -> Tensor:
    """Make one loss a sample (B,) of its hypotheses' (B, N).

    `single` (B,) is the loss of their mean prediction, for that kind. `softmin` lies between min and mean,
    and tends to them for small and large tau; with a mixture's log_pi (B, N) it is a likelihood's. `rwta`
    leaves a share eps to the losers, so that no hypothesis dies. With one hypothesis each gives its loss.
    """
    count = losses.shape[1]
    if kind == "single":
        return single
    if kind == "mean":
        return losses.mean(1)
    if kind == "min":
        return losses.amin(1)
    if kind == "softmin":
        prior = -math.log(count) if log_pi is None else log_pi
        return -tau * torch.logsumexp(prior - losses / tau, dim=1)
    if kind != "rwta":
        raise ValueError(f"--world-loss {kind} is unknown: choose from {', '.join(get_args(WorldLoss))}")
    best = losses.amin(1)
    others = (losses.sum(1) - best) / max(1, count - 1)
    return (1 - eps) * best + eps * others if count > 1 else best
