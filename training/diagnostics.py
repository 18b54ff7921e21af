"""What a run says of itself on log steps: how well futures are predicted, and how the policy attends to them.

Pure measurement, without gradients and outside the training forward: nothing here draws from a global
generator, switches a mode or leaves a hook behind. A number without a meaning (of hypotheses where N = 1, an
entropy over one thing, a mean over nothing) is absent, not 0 or 1. In cosines, losses and attention every
sample weighs the same, however many of its steps or tokens count.

    world_diagnostics(arm, world, out["predicted"]) | attention_diagnostics(arm, inputs, world, noise, time)
    pytest tests/training/test_diagnostics.py

Shapes: B batch, T history frames, K future frames, N hypotheses, D latent width, R flow draws, C chunk, A
action, P prefix tokens, M = N*K memory tokens (flat index n*K + k), m world tokens, L tokens of a site, W its
width, H heads, G key heads, S keys, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arm import Arm
from fusion import Calls, Memory, MemoryCache, Site
from model import SmolVLA, flow_target, prefix_inputs
from prophet import change_target, counted_steps, signs, world_loss

CONTROL_SEED = 0xC0  # of the matched control's noise: the same in every run


def sample_mean(values: Tensor, kept: Tensor) -> float | None:
    """Average (B, n) over each sample's `kept` entries, then over samples with any; None without any."""
    count = kept.sum(1)
    if not count.any():
        return None
    means = torch.where(kept, values, 0.0).sum(1) / count.clamp(min=1)  # (B, n) -> (B,)
    return means[count > 0].mean().item()


# ---- the prophet --------------------------------------------------------------------------------------


@torch.no_grad()
def world_diagnostics(arm: Arm, world: dict[str, Tensor], predicted: Tensor) -> dict[str, float]:
    """Compare the prophet's predictions (B, N, K, D) with the truth, with baselines and with one another.

    Args: world with z_hist (B, T, D), z_future (B, K, D), valid (B, K) and early (B,); predicted as the
    prophet gives it, changes or (`--no-delta`) latents. Only steps that the world loss counts are read. With
    several hypotheses `world_cos_k*` is the mean of theirs, as in the log's `world_cos`.
    """
    past, future, valid = world["z_hist"].float(), world["z_future"].float(), world["valid"]
    target = change_target(past, future, arm.config.delta)
    counted = counted_steps(target, valid, arm.scale)
    # The target's uncounted steps are dropped wherever it is read; a prediction's would be multiplied by 0.
    predicted = torch.where(counted[:, None, :, None], predicted.float(), 0.0)
    cosine = F.cosine_similarity(predicted, target[:, None], dim=-1).mean(1)  # (B, N, K, D) -> (B, K)
    steps = zip(cosine.split(1, dim=1), counted.split(1, dim=1), strict=True)
    out = {f"world_cos_k{k}": sample_mean(*step) for k, step in enumerate(steps, start=1)}
    for name, guess in baselines(arm, past).items():
        out[name] = sample_mean(F.cosine_similarity(guess, target, dim=-1), counted)
    out["world_valid_frac"] = valid.float().mean().item()
    out["norm_history"] = past.norm(dim=-1).mean().item()
    out["norm_future"] = future.norm(dim=-1)[valid].mean().item() if valid.any() else None
    if predicted.shape[1] > 1:
        out |= bank_diagnostics(arm, predicted, target, counted, world["early"])
    return {name: value for name, value in out.items() if value is not None}


@torch.no_grad()
def memory_norm(arm: Arm, world: dict[str, Tensor], noise: Tensor) -> dict[str, float]:
    """Give `norm_memory`, the mean length of the finite rows that the arm's own mode hands to the policy.

    Where that is `pred`, `signflip_cos` too: the control's mean cosine with it, 0 as far as the data's spread
    tells the rows'.
    """
    memory = arm.memory(arm.config.mode, arm.like(noise), world)
    if memory is None:
        return {}
    finite = memory.rows.isfinite().all(-1)
    rows = torch.where(finite[..., None], memory.rows, 0.0)
    found = {"norm_memory": sample_mean(rows.norm(dim=-1), finite)}
    if arm.config.mode == "pred" and arm.encoder is not None:
        turned = rows * signs(arm.encoder.stats.dim_std).to(rows)
        found["signflip_cos"] = sample_mean(F.cosine_similarity(rows, turned, dim=-1), finite)
    return {name: value for name, value in found.items() if value is not None}


def baselines(arm: Arm, past: Tensor) -> dict[str, Tensor]:
    """Guess what the prophet predicts, (B, K, D) each, without learning; past (B, T, D)."""
    out = {"world_cos_mean_change": arm.mean_change.expand(len(past), -1, -1)}  # (K, D) -> (B, K, D)
    if past.shape[1] > 1:
        ahead = torch.arange(1, arm.config.future + 1, device=past.device)[:, None]
        line = ahead * (past[:, -1:] - past[:, -2:-1])  # (B, 1, D) -> (B, K, D)
        out["world_cos_linear"] = line if arm.config.delta else past[:, -1:] + line
    return out


def bank_diagnostics(
    arm: Arm, predicted: Tensor, target: Tensor, counted: Tensor, early: Tensor
) -> dict[str, float | None]:
    """Measure what several hypotheses (B, N, K, D) are worth against targets (B, K, D) at `counted` (B, K).

    The best of N improves on pure noise as well, so the gap is also given in excess of a control's; and for
    `early` samples (B,) alone, whose episode may still go several ways.
    """
    count, mean = predicted.shape[1], predicted.mean(1, keepdim=True)  # (B, N, K, D) -> (B, 1, K, D)
    candidates = torch.cat([predicted, mean, matched_control(predicted, counted)], dim=1)
    losses, known, cosine = world_loss(candidates, target, counted, arm.scale, arm.config.lambda_mag)
    bank, alone, control = losses.split([count, 1, count], dim=1)
    best, control_best = bank.amin(1, keepdim=True), control.amin(1, keepdim=True)  # (B, N) -> (B, 1)
    apart = pair_distances(F.normalize(predicted, dim=-1)).square() / 2  # 1 - cos of two unit vectors
    known = known[:, None]
    excess = control_best - best  # both have the bank's mean, so it is (alone - best) minus the control's
    return {
        "world_cos_best": sample_mean(cosine[:, :count].amax(1, keepdim=True), known),
        "oracle_gap": sample_mean(alone - best, known),
        "oracle_gap_excess": sample_mean(excess, known),
        "oracle_gap_excess_early": sample_mean(excess, known & early[:, None]),
        "div_cos": sample_mean(apart.mean(-1), counted),
    }


def matched_control(predicted: Tensor, counted: Tensor) -> Tensor:
    """Replace a bank (B, N, K, D) by its mean plus Gaussian noise of the same mean pairwise distance.

    The noise sums to zero over hypotheses, as the bank's own deviations do: control and bank then have the
    same mean, and a bank that *is* noise has no excess.
    """
    generator = torch.Generator().manual_seed(CONTROL_SEED)
    noise = torch.randn(predicted.shape, generator=generator, device="cpu").to(predicted)
    noise = noise - noise.mean(1, keepdim=True)
    weight = counted.float()  # a ratio of sums over counted steps is one of means
    wanted, has = ((pair_distances(x).mean(-1) * weight).sum(1) for x in (predicted, noise))  # (B,)
    ratio = wanted / has.clamp(min=1e-12)
    return predicted.mean(1, keepdim=True) + ratio[:, None, None, None] * noise


def pair_distances(x: Tensor) -> Tensor:
    """Euclidean distances of all pairs of hypotheses (B, N, K, D), (B, K, N(N-1)/2)."""
    i, j = torch.triu_indices(x.shape[1], x.shape[1], offset=1)
    x = x.transpose(1, 2)  # (B, N, K, D) -> (B, K, N, D)
    # By differences: through a matrix product, near hypotheses would lose their last digits.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")[..., i, j]


# ---- attention to memory ------------------------------------------------------------------------------


@torch.no_grad()
def attention_diagnostics(
    arm: Arm, inputs: dict, world: dict[str, Tensor], noise: Tensor, time: Tensor
) -> dict[str, float]:
    """Measure, in one extra eager pass, how each fusion site attends to the memory of the arm's own mode.

    Takes a batch as `Arm.forward` does, and runs the first of its R flow draws. Samples without a finite
    memory row and padded prefix tokens are left out. Names are as `late/attn_pmax`; none without memory.
    """
    fusion, steps = arm.policy.fusion, arm.config.future
    memory = None if fusion is None else arm.memory(arm.config.mode, arm.like(noise), world)
    if memory is None:
        return {}
    # Not `fusion.prepare`, which leaves closed sites out where no gradient is wanted: these are read too.
    cache = {name: site.prepare(memory) for name, site in fusion.sites.items()}
    calls, mask = record(arm.policy, cache, inputs, noise[:, :1], time[:, :1])
    nearest = None
    if arm.prophet is not None and {"z_future", "valid"} <= world.keys():
        nearest = nearest_hypothesis(memory.rows.unflatten(1, (-1, steps)), world["z_future"], world["valid"])
    out = {}
    for name, site in fusion.sites.items():
        found, each = site.attention(calls[name], cache[name]), site.logged(calls[name], cache[name])
        kept = queries(site, calls[name], mask)  # (B, L)
        if found is not None:
            kept = kept & found.finite.any(1, keepdim=True)
        values = {} if found is None else attention_statistics(found.p, found.rows, steps, kept, nearest)
        values |= {key: sample_mean(value, kept) for key, value in each.items()}
        out |= {f"{name}/{key}": value for key, value in values.items()}
    return {name: value for name, value in out.items() if value is not None}


def queries(site: Site, calls: Calls, mask: Tensor) -> Tensor:
    """Which of a site's queries (B, L) count: those of the prefix's tokens without padding, `mask` (B, P)."""
    if site.at == "prefix":
        return mask
    _, (h, *_) = calls[0]
    return mask.new_ones(h.shape[:2])


def record(
    policy: SmolVLA, cache: MemoryCache, inputs: dict, noise: Tensor, time: Tensor
) -> tuple[dict[str, Calls], Tensor]:
    """Run the policy once, with one flow draw; keep, by site, what read the memory was called with.

    A site may be called several times. The second answer says which prefix tokens (B, P) are not padding.
    """
    readers = {name: site.readers(policy) for name, site in policy.fusion.sites.items()}
    calls: dict[str, Calls] = {name: [] for name in readers}
    pairs = [(module, calls[name]) for name, modules in readers.items() for module in modules]
    hooks = [m.register_forward_pre_hook(lambda m, args, to=to: to.append((m, args))) for m, to in pairs]
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks would make compiled blocks compile anew
            embs, mask, early = policy.embed_prefix(*prefix_inputs(inputs))
            prefix = policy.prefix(embs, mask, early, cache)
            x_t, _ = flow_target(inputs["action"], noise, time)
            policy.velocity(x_t.flatten(0, 1), time.flatten(), prefix, cache)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, mask


def nearest_hypothesis(memory: Tensor, future: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Say which of the futures (B, N, K, D) lies nearest to the true one (B, K, D), and whether any does.

    Nearest by mean Euclidean distance over `valid` (B, K) steps; both answers (B,).
    """
    distance = (memory.float() - future.float()[:, None]).norm(dim=-1)  # (B, N, K, D) -> (B, N, K)
    distance = torch.where(valid[:, None], distance, 0.0).sum(-1)  # over as many steps in each hypothesis
    finite = distance.isfinite()
    return torch.where(finite, distance, torch.inf).argmin(1), valid.any(1) & finite.any(1)  # not the NaN


def attention_statistics(
    p: Tensor, rows: Sequence[int], steps: int, kept: Tensor, nearest: tuple[Tensor, Tensor] | None = None
) -> dict[str, float | None]:
    """Sum up attention (B, H, L, M) to memory rows `rows` (n*K + k), with K steps a hypothesis.

    Args: kept (B, L), the queries that count; nearest as `nearest_hypothesis` gives it.
    """
    by_step = group_mass(p, [row % steps for row in rows])
    by_hypothesis = group_mass(p, [row // steps for row in rows])
    out = {"attn_pmax": sample_mean(p.amax(-1).mean(1), kept)}  # (B, H, L, M) -> (B, L)
    for name, mass in (("", p), ("_step", by_step), ("_hyp", by_hypothesis)):
        if (count := mass.shape[-1]) > 1:
            out[f"attn_entropy{name}"] = sample_mean(entropy(mass).mean(1) / math.log(count), kept)
    if (count := by_hypothesis.shape[-1]) > 1:
        spike = (by_hypothesis.amax(-1) - 1 / count) / (1 - 1 / count)
        out["spike"] = sample_mean(spike.mean(1), kept)
        if nearest is not None:
            index, known = nearest
            total = torch.where(kept[..., None], by_hypothesis.mean(1), 0.0).sum(1)  # (B, H, L, N) -> (B, N)
            hit = (total.argmax(1) == index).float()
            out["choose_best"] = sample_mean(hit[:, None], (known & kept.any(1))[:, None])
    return out


def group_mass(p: Tensor, groups: list[int]) -> Tensor:
    """Sum probabilities (..., M) over the tokens of each group, (..., groups) in rising order."""
    names = sorted(set(groups))
    index = torch.tensor([names.index(group) for group in groups], device=p.device)
    return p.new_zeros(*p.shape[:-1], len(names)).index_add_(-1, index, p)


def entropy(p: Tensor) -> Tensor:
    """Shannon entropy over the last axis, in nats; 0 log 0 is 0."""
    return torch.special.entr(p).sum(-1)


# ---- which hypothesis is attended to ------------------------------------------------------------------


@torch.no_grad()
def attention_mass(
    arm: Arm,
    inputs: dict,
    world: dict[str, Tensor],
    noise: Tensor,
    time: Tensor | None = None,
    mode: str | None = None,
) -> Tensor | None:
    """Measure each hypothesis' share (B, N) of the attention to memory, at the first denoising step.

    Args: inputs as a rollout has them, without actions; world with what `arm.needs(mode)` names; noise
    (B, C, A_max), or the noisy actions at another flow time (B,); mode, by default the arm's own.
    Returns None where there is no memory (an arm without sites, mode `off`), and where no site attends.
    """
    shares = rows_attended(arm, inputs, world, noise, mode, time=time)
    return None if shares is None else shares.sum(-1)  # (B, N, K) -> (B, N)


@torch.no_grad()
def rows_attended(
    arm: Arm,
    inputs: dict,
    world: dict[str, Tensor],
    noise: Tensor,
    mode: str | None = None,
    best: Tensor | None = None,
    time: Tensor | None = None,
) -> Tensor | None:
    """Measure each imagined step's share (B, N, K) of the attention to memory, as `attention_mass` does.

    best (B,): the hypothesis that the intervention `best1` keeps.
    """
    memory = None
    if arm.policy.fusion is not None:
        memory = arm.memory(mode or arm.config.mode, arm.like(noise), world, best=best)
    return None if memory is None else row_mass(arm, inputs, memory, noise, time)


def memory_mass(
    arm: Arm, inputs: dict, memory: Memory, noise: Tensor, time: Tensor | None = None
) -> Tensor | None:
    """Measure what `attention_mass` does for a memory that is there already."""
    shares = row_mass(arm, inputs, memory, noise, time)
    return None if shares is None else shares.sum(-1)  # (B, N, K) -> (B, N)


@torch.no_grad()
def row_mass(
    arm: Arm, inputs: dict, memory: Memory, noise: Tensor, time: Tensor | None = None
) -> Tensor | None:
    """Measure the share of attention that each row of a memory gets, (B, N, K), at the first denoising step.

    Averages over queries without padding, heads and sites, closed ones too; a row that no prefix token holds
    gets none. A sample without a finite memory row has no shares: NaN. None where no site attends.
    """
    sites, count = arm.policy.fusion.sites, memory.rows.shape[1]
    # Not `fusion.prepare`, which leaves closed sites out where no gradient is wanted.
    cache = {name: site.prepare(memory) for name, site in sites.items()}
    time = noise.new_ones(len(noise)) if time is None else time
    # `record` mixes noise with actions; mixed with itself it stays what it is, at any time.
    calls, mask = record(arm.policy, cache, {**inputs, "action": noise}, noise[:, None], time[:, None])
    found = []
    for name, site in sites.items():
        if (seen := site.attention(calls[name], cache[name])) is None:
            continue
        p, kept = seen.p.mean(1), queries(site, calls[name], mask)  # (B, H, L, M) -> (B, L, M)
        p = torch.where(kept[..., None], p, 0.0).sum(1) / kept.sum(1, keepdim=True)  # -> (B, M)
        shares = p.new_zeros(len(p), count).index_add(1, torch.tensor([*seen.rows], device=p.device), p)
        found.append(torch.where(seen.finite.any(1, keepdim=True), shares, torch.nan))
    if not found:
        return None
    return torch.stack(found).mean(0).unflatten(1, (-1, arm.config.future))  # (B, N*K) -> (B, N, K)


def most_attended(arm: Arm, inputs: dict, world: dict[str, Tensor], noise: Tensor) -> Tensor:
    """Name the hypothesis (B,) of `pred` with most attention at the first denoising step: `best1` keeps it.

    Args as `attention_mass` takes them. A sample without a finite memory row gets hypothesis 0.
    """
    mass = attention_mass(arm, inputs, world, noise, mode="pred")
    return torch.nan_to_num(mass, nan=0.0).argmax(1)


# ---- over many steps ----------------------------------------------------------------------------------

WINDOW = 1_000  # samples that usage is counted over
DEAD = 0.01  # share of wins below which a hypothesis is dead
COLLAPSED = 0.01  # mean pairwise 1 - cos below which hypotheses are one
PATIENCE = 1_000  # steps of it before a word is said


class Usage:
    """Which hypotheses won of late: of each sample, the one nearest to what came."""

    def __init__(self, hypotheses: int, device: torch.device) -> None:
        self.hypotheses, self.seen = hypotheses, 0
        self.winners = torch.full((WINDOW,), -1, device=device)

    def add(self, winner: Tensor) -> None:
        """Note the winners (B,) of a batch, -1 where none was counted; nothing leaves the device."""
        place = (self.seen + torch.arange(len(winner), device=winner.device)) % WINDOW
        self.winners[place] = winner
        self.seen += len(winner)

    def read(self) -> dict[str, float]:
        """Give `usage_ppl`, the perplexity of wins (N: all alike, 1: one wins), and the number of `dead`."""
        wins = torch.bincount(self.winners[self.winners >= 0], minlength=self.hypotheses).double()
        if self.hypotheses == 1 or not wins.sum():
            return {}
        share = wins / wins.sum()
        return {"usage_ppl": entropy(share).exp().item(), "dead": int((share < DEAD).sum())}


class CollapseWatch:
    """Says once when hypotheses have been one and the same for PATIENCE steps; never stops a run."""

    def __init__(self) -> None:
        self.since: int | None = None
        self.said = False

    def see(self, step: int, line: dict[str, float]) -> str | None:
        """Look at a log line; give a warning where it is time for one."""
        if line.get("div_cos", 1.0) >= COLLAPSED:
            self.since = None
            return None
        self.since = step if self.since is None else self.since
        if self.said or step - self.since < PATIENCE:
            return None
        self.said = True
        return (
            f"warning: the hypotheses have been the same for {step - self.since} steps (div_cos "
            f"{line['div_cos']:.4f}): try --world-loss rwta or softmin, or another --hypothesis-method"
        )


# ---- gradients ----------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_norms(arm: Arm) -> dict[str, float]:
    """Give the L2 norm of the gradients of gates, of the rest of fusion, and of the prophet.

    After `backward`; after clipping they are the clipped ones. Groups without any gradient are absent.
    """
    fusion, prophet = arm.policy.fusion, arm.prophet
    named = [] if fusion is None else list(fusion.named_parameters())
    groups = {
        "gates": [p for name, p in named if name.endswith(".gate")],
        "fusion": [p for name, p in named if not name.endswith(".gate")],
        "prophet": [] if prophet is None else list(prophet.parameters()),
    }
    there = {name: [p.grad for p in group if p.grad is not None] for name, group in groups.items()}
    norm = torch.nn.utils.get_total_norm
    return {f"grad_norm_{name}": norm(grads).item() for name, grads in there.items() if grads}
