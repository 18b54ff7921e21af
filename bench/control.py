"""Positive and negative control of the whole instrument, on a synthetic world whose answer is known.

Before a null result on a real benchmark is believed, the instrument has to find an effect where there is one,
and none where there is none. Here only the data are made up; arm, prophet, fusion, policy and diagnostics are
the project's own, at a small size. One table says what passed, one figure shows it; the exit code is 1 if
anything failed.

    python -m bench control                                # about 2 minutes on one CPU core
    python -m bench control --seed 1 --out runs/control-1
    pytest tests/bench/test_control.py

The world: a present latent holds R blocks of q random numbers. Its next K latents take one of R equally
likely branches, drawn independently of the past: branch r moves along a direction of its own and carries
block r to q readout directions, both growing with k. The action chunk *is* block r of the branch taken. So
the future gives the action away; the past does not, nor does the cue, one entry of the policy's state that
names the branch in half of the samples and is 0 in the others. Prophets never see the cue.

What `choose_best` is held against: without a cue a hit is a matter of chance, with probability 1/R, the odds
of the branch, however many hypotheses there are: who always attends to the one that covers a branch is right
whenever that branch comes. Therefore N = R here, with a bank that covers every branch (a check of its own):
then "the hypothesis nearest to the truth" and "a hypothesis of the true branch" are the same, and chance is
exactly 1/R. N = 2R would have pairs of near-identical hypotheses, where a miss is often a tie. It is measured
at flow time 1, as in the first denoising step of a rollout: at earlier times the noisy actions already
contain the true ones, and attention can follow these without any cue (a line that is shown, not judged).
The site is `fusion.Late`, since nothing nonlinear comes after it: what the cue changes, attention changes.

Shapes: B batch, T history frames, K future frames, R branches, N hypotheses, D latent width, C actions in a
chunk, A = q numbers in a block.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor

from arm import Arm, ArmConfig, Summary
from files import Refused, check_numbers, type_in
from fusion import SITES, Late
from latents.encoders import PCA, WorldStats
from model import SmolVLA
from prophet import absolute
from report.figures import COLOURS, save, tidy
from report.stats import wilson
from smolvla.config import PRESETS
from training.diagnostics import attention_diagnostics, world_diagnostics

BRANCHES, BLOCK, LATENT, HISTORY, FUTURE = 2, 4, 32, 4, 4  # R, q, D, T, K
APART = 2.0  # length of each branch's own direction; a block's usual length is sqrt(q), 2 too
WANDER = 0.3  # step of the random walk that led to the present
POLICY = dataclasses.replace(
    PRESETS["tiny"], cameras=("observation.images.image",), state_dim=4, max_state_dim=4, action_dim=BLOCK,
    max_action_dim=BLOCK, chunk_size=2, n_action_steps=2, vision_width=16, vision_mlp=16, vision_layers=1,
    vision_heads=2, image_size=16, patch_size=8, scale_factor=2, width=32, mlp=48, layers=2, heads=2,
    kv_heads=1, head_dim=16, expert_layers=2, expert_width=32, vocab_size=16,
)  # fmt: skip
DRAWS = 2  # flow draws a sample
FAR, NEAR = 0.5, 0.3  # relative errors: no branch is met; a branch is
RATIO = 0.5  # of action losses: memory helped
MARGIN = 0.05  # share of the action loss that noise may seem to gain
ALPHA = 0.001  # a seed in a thousand fails `choose_best` without the cue by chance
WORLD, TRAIN, HELD_OUT, BATCHES, FLOW, BOOTSTRAP = range(6)  # streams of randomness


@dataclass(frozen=True)
class ControlConfig:
    """Check on a synthetic world that the instrument finds an effect, and only where there is one."""

    out: Path = Path("runs/control")
    """Folder for the figure."""

    seed: int = 0
    """Seed of the world, of its samples and of every training."""

    steps: int = 500
    """AdamW steps of each prophet and of each policy."""

    quick: bool = False
    """Take 3 steps on few samples, to see that everything runs: checks are then expected to fail."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.steps < 1:
            raise Refused(f"--steps {self.steps} must be at least 1")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Steps, samples to train on, samples held out."""
        return (3, 256, 64) if self.quick else (self.steps, 8192, 2048)


class Check(NamedTuple):
    """One line of the table."""

    name: str
    value: float
    wanted: str
    passed: bool | None  # None: shown, not judged


# ---- the world ----------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """What is drawn of the world; `futures` are those of every branch, of which one came."""

    z_hist: Tensor  # (B, T, D)
    futures: Tensor  # (B, R, K, D)
    blocks: Tensor  # (B, R, q)
    branch: Tensor  # (B,)
    cued: Tensor  # (B,) bool
    state: Tensor  # (B, 4): the cue, and numbers that mean nothing

    def take(self, index: Tensor) -> Samples:
        return Samples(*(x[index] for x in self))

    def world(self) -> dict[str, Tensor]:
        """Gather what prophet and memory are made from."""
        rows = torch.arange(len(self.branch))
        z_future = self.futures[rows, self.branch]  # (B, R, K, D) -> (B, K, D)
        always = torch.ones(z_future.shape[:2]) > 0
        return {"z_hist": self.z_hist, "z_future": z_future, "valid": always, "early": always[:, 0]}

    def inputs(self) -> dict:
        """Make the policy's inputs: a black picture, one token, the state, and the true chunk."""
        size = len(self.branch)
        action = self.blocks[torch.arange(size), self.branch]  # (B, R, q) -> (B, q)
        return {
            "images": [torch.zeros(1, 3, POLICY.image_size, POLICY.image_size)],
            "image_masks": [None],
            "tokens": torch.ones(size, 1, dtype=torch.long),
            "token_mask": torch.ones(size, 1, dtype=torch.bool),
            "state": self.state,
            "action": action[:, None].expand(-1, POLICY.chunk_size, -1),
        }


def generator(*key: int) -> torch.Generator:
    """A generator of its own for each key."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def directions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw orthonormal directions: of the blocks (R, q, D), of the branches (R, D), to read out (q, D)."""
    basis = torch.linalg.qr(torch.randn(LATENT, LATENT, generator=generator(seed, WORLD)))[0].T
    blocks, branches, readout, _ = basis.split(
        [BRANCHES * BLOCK, BRANCHES, BLOCK, LATENT - BRANCHES * (BLOCK + 1) - BLOCK]
    )
    return blocks.unflatten(0, (BRANCHES, BLOCK)), branches, readout


def draw(seed: int, stream: int, count: int) -> Samples:
    """Draw `count` samples of the world of this seed: half with the cue, and each branch equally often."""
    g, (block_axes, branch_axes, readout) = generator(seed, stream), directions(seed)
    blocks = torch.randn(count, BRANCHES, BLOCK, generator=g)
    present = torch.einsum("brq,rqd->bd", blocks, block_axes)  # (B, D)
    steps = WANDER * torch.randn(count, HISTORY - 1, LATENT, generator=g)
    back = F.pad(steps.cumsum(1).flip(1), (0, 0, 0, 1))  # (B, T, D): 0 now, farther away the longer ago
    ahead = torch.arange(1, FUTURE + 1) / FUTURE
    reached = APART * branch_axes + blocks @ readout  # (B, R, D)
    futures = present[:, None, None] + ahead[:, None] * reached[:, :, None]  # (B, R, K, D)
    order = torch.randperm(count, generator=g)  # exact halves and shares, in an order that means nothing
    branch, cued = order % BRANCHES, order // BRANCHES % 2 == 0
    state = torch.randn(count, POLICY.state_dim, generator=g)
    state[:, 0] = torch.where(cued, torch.linspace(-1, 1, BRANCHES)[branch], 0.0)
    return Samples(present[:, None] + back, futures, blocks, branch, cued, state)


# ---- arms ---------------------------------------------------------------------------------------------


def make_arm(samples: Samples, seed: int, **fields: object) -> Arm:
    """Build an arm on these training samples' statistics; every arm of a seed starts from the same policy."""
    usual = ArmConfig(
        fusion=(Late.name,), world_dim=LATENT, history=HISTORY, future=FUTURE, prophet_heads=4, heads=4,
        prefix_tokens=FUTURE, detach_memory=True,
    )  # fmt: skip
    config = dataclasses.replace(usual, **fields)
    world = samples.world()
    frames = torch.cat([samples.z_hist, world["z_future"]], dim=1).flatten(0, 1)  # (B * (T + K), D)
    # Of the encoder only the latents' spread is read, for `random`: nothing here comes from pictures.
    stats = WorldStats(torch.zeros(LATENT), torch.ones(1), frames.std(0))
    pixels = config.latent_pixels
    encoder = PCA(config, POLICY.image_size, torch.zeros(pixels), torch.eye(LATENT, pixels), stats)
    change = world["z_future"] - samples.z_hist[:, -1:]
    scale = change.square().sum(-1).mean(0).sqrt()  # (B, K, D) -> (K,)
    torch.manual_seed(seed)
    policy = SmolVLA(POLICY).initialise()
    policy.freeze("none")
    return Arm(config, policy, encoder, Summary.of(scale, change.mean(0), samples.z_hist[:16]), {})


def make_bank(samples: Samples, seed: int, count: int, loss: str) -> Arm:
    """Build an arm with a prophet of `count` hypotheses."""
    method = "ensemble" if count > 1 else "none"
    return make_arm(samples, seed, num_hypotheses=count, hypothesis_method=method, world_loss=loss)


def with_noise(samples: Samples, g: torch.Generator) -> dict[str, Tensor]:
    """Add what `random` memory is made from."""
    return samples.world() | {"noise": torch.randn(len(samples.branch), FUTURE, LATENT, generator=g)}


def flow(count: int, draws: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw noise (B, R, C, A) and times (B, R) as training does: Beta(1.5, 1), by its quantile function."""
    noise = torch.randn(count, draws, POLICY.chunk_size, POLICY.max_action_dim, generator=g)
    return noise, torch.rand(count, draws, generator=g) ** (2 / 3) * 0.999 + 0.001


def train(arm: Arm, samples: Samples, steps: int, seed: int, what: str = "policy", batch: int = 64) -> Arm:
    """Train the whole arm, or its prophet alone; all arms see the same samples in the same order."""
    params = [p for p in (arm.prophet if what == "prophet" else arm).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    g = generator(seed, BATCHES)
    for _ in range(steps):
        part = samples.take(torch.randint(len(samples.branch), (batch,), generator=g))
        world = with_noise(part, g)
        noise, times = flow(batch, DRAWS, g)
        if what == "prophet":
            loss = arm.world_losses(arm.imagine(world["z_hist"], world), world)["world"].mean()
        else:
            out = arm(part.inputs(), world, noise, times)
            loss = out["action"].mean()
            if "world" in out:
                loss = loss + arm.config.lambda_world * out["world"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return arm.eval()


@torch.no_grad()
def action_losses(arm: Arm, samples: Samples, seed: int, draws: int = 8) -> Tensor:
    """Measure each sample's action loss (B,) under the arm's own mode, with the same noise for every arm."""
    g = generator(seed, FLOW)
    world = with_noise(samples, g)
    return arm(samples.inputs(), world, *flow(len(samples.branch), draws, g))["action"].mean((1, 2, 3))


# ---- what is measured ---------------------------------------------------------------------------------


@torch.no_grad()
def imagined(arm: Arm, samples: Samples) -> Tensor:
    """Run the prophet: absolute futures (B, N, K, D)."""
    return absolute(arm.imagine(samples.z_hist, {}).y, samples.z_hist, arm.config.delta)


def branch_errors(futures: Tensor, samples: Samples) -> Tensor:
    """Compare each hypothesis (B, N, K, D) with each branch at the last step: relative errors (B, N, R)."""
    last, true = futures[:, :, None, -1], samples.futures[:, None, :, -1]  # (B, N, 1, D), (B, 1, R, D)
    moved = (true - samples.z_hist[:, None, None, -1]).norm(dim=-1)  # (B, 1, R)
    return (last - true).norm(dim=-1) / moved


def coverage(futures: Tensor, samples: Samples) -> Tensor:
    """How far each branch (R,) is from its nearest hypothesis, on average."""
    return branch_errors(futures, samples).amin(1).mean(0)  # (B, N, R) -> (R,)


def dead_share(futures: Tensor, samples: Samples) -> float:
    """Share of hypotheses that are never the nearest to what came."""
    errors = branch_errors(futures, samples)[torch.arange(len(samples.branch)), :, samples.branch]  # (B, N)
    return 1 - len(errors.argmin(1).unique()) / errors.shape[1]


def choose_best(arm: Arm, samples: Samples, seed: int, at: float | None = 1.0) -> float:
    """Ask how often the most attended hypothesis is the one nearest to the truth, at one flow time or, as in
    training, at random ones."""
    noise, times = flow(len(samples.branch), 1, generator(seed, FLOW))
    times = times if at is None else torch.full_like(times, at)
    found = attention_diagnostics(arm, samples.inputs(), samples.world(), noise, times)
    return found[f"{Late.name}/choose_best"]


def gain_interval(ours: Tensor, theirs: Tensor, seed: int) -> tuple[float, float, float]:
    """Give by which share our losses (B,) are lower than theirs, with its paired 95 % bootstrap interval."""
    g = generator(seed, BOOTSTRAP)
    index = torch.randint(len(ours), (2000, len(ours)), generator=g)
    shares = 1 - ours[index].mean(1) / theirs[index].mean(1)  # (2000,)
    low, high = np.quantile(shares.numpy(), (0.025, 0.975))
    return 1 - (ours.mean() / theirs.mean()).item(), float(low), float(high)


# ---- checks -------------------------------------------------------------------------------------------


def mean_cosine(arm: Arm, samples: Samples) -> float:
    """The cosine of the first hypothesis' last change to the mean of the branches' last changes."""
    futures, present = imagined(arm, samples), samples.z_hist[:, -1]
    mean = samples.futures[:, :, -1].mean(1) - present  # (B, R, K, D) -> (B, D)
    return F.cosine_similarity(futures[:, 0, -1] - present, mean, dim=-1).mean().item()


def check_untaught(arm: Arm, samples: Samples) -> Check:
    """A prophet that the world loss never reached predicts nothing, whatever its memory does for actions."""
    cosine = mean_cosine(arm, samples)
    return Check("no world loss: cosine to the branches' mean", cosine, "within 0.5", abs(cosine) < 0.5)


def check_single(arm: Arm, samples: Samples) -> list[Check]:
    """One hypothesis predicts the average of the branches, which is none of them."""
    futures, cosine = imagined(arm, samples), mean_cosine(arm, samples)
    error = branch_errors(futures, samples).amin((1, 2)).mean().item()
    return [
        Check("one hypothesis: error to the nearest branch", error, f"> {FAR}", error > FAR),
        Check("one hypothesis: cosine to the branches' mean", cosine, "> 0.9", cosine > 0.9),
    ]


def check_bank(name: str, arm: Arm, samples: Samples, judged: bool = True) -> list[Check]:
    """Every branch has a hypothesis that meets it; the best hypothesis points to what came."""
    futures = imagined(arm, samples)
    found = world_diagnostics(arm, samples.world(), arm.imagine(samples.z_hist, {}).y)
    worst, cosine = coverage(futures, samples).max().item(), found["world_cos_best"]
    checks = [
        Check(f"{name}: error of the branch covered worst", worst, f"< {NEAR}", worst < NEAR),
        Check(f"{name}: world_cos_best", cosine, "> 0.95", cosine > 0.95),
    ]
    if not judged:
        checks = [check._replace(wanted="", passed=None) for check in checks]
    shown = {"oracle_gap_excess": found["oracle_gap_excess"], "dead heads": dead_share(futures, samples)}
    return checks + [Check(f"{name}: {what}", value, "", None) for what, value in shown.items()]


def check_memory(name: str, ours: Tensor, off: Tensor) -> Check:
    """A memory that holds the answer lowers the action loss well below that of an arm without memory."""
    ratio = (ours.mean() / off.mean()).item()
    return Check(f"{name}: action loss / off", ratio, f"< {RATIO}", ratio < RATIO)


def check_random(ours: Tensor, zero: Tensor, seed: int) -> Check:
    """Noise as memory buys nothing: even the interval's upper end is a small gain."""
    gain, low, high = gain_interval(ours, zero, seed)
    wanted = f"[{low:+.4f}, {high:+.4f}] below {MARGIN}"
    return Check("random: share of action loss gained on zero", gain, wanted, high < MARGIN)


def check_choice(cued: float, blind: float, count: int) -> list[Check]:
    """Attention finds the true hypothesis with the cue, and not without; shares of `count` samples each."""
    chance, least = 1 / BRANCHES, 1.3 / BRANCHES
    p_cued, p_blind = p_value(cued, count, "greater"), p_value(blind, count, "two-sided")
    return [
        Check("choose_best with the cue", cued, f"> {least:.2f}, p < 0.01 (p {p_cued:.2g})",
              cued > least and p_cued < 0.01),
        Check("choose_best without the cue", blind, f"{chance:.2f}, p > {ALPHA} (p {p_blind:.2g})",
              p_blind > ALPHA),
    ]  # fmt: skip


def p_value(share: float, count: int, side: str) -> float:
    """Test a share of `count` samples against chance, exactly."""
    return float(binomtest(round(share * count), count, 1 / BRANCHES, side).pvalue)


def report(checks: list[Check]) -> tuple[str, int]:
    """Lay the checks out as a table; give it with the exit code, 1 if any failed."""
    mark = {True: "pass", False: "FAIL", None: "-"}
    rows = [f"{c.name:48s} {c.value:8.4f}  {c.wanted:32s} {mark[c.passed]}" for c in checks]
    failed = sum(c.passed is False for c in checks)
    judged = sum(c.passed is not None for c in checks)
    verdict = f"{failed} of {judged} checks FAILED" if failed else f"all {judged} checks passed"
    return "\n".join([f"{'check':48s} {'value':>8s}  {'wanted':32s}", *rows, verdict]), int(failed > 0)


# ---- figure -------------------------------------------------------------------------------------------


def draw_paths(axis: plt.Axes, banks: dict[str, Arm], samples: Samples, seed: int) -> None:
    """Draw where hypotheses go, on the branches' own directions, averaged over samples."""
    axes = directions(seed)[1][:2]
    path = lambda z: F.pad((z - samples.z_hist[:, None, -1:]).mean(0) @ axes.T, (0, 0, 1, 0))  # noqa: E731
    for line in path(samples.futures):  # (B, R, K, D) -> (R, K + 1, 2)
        axis.plot(*line.T, color="0.8", linewidth=7, solid_capstyle="round", zorder=1)
    for name, colour in {"one": 1, "min": 3, "rwta": 2, "softmin": 0}.items():
        for i, line in enumerate(path(imagined(banks[name], samples))):
            axis.plot(*line.T, ".-", color=COLOURS[colour], linewidth=1.2, label=None if i else name)
    axis.set_xlabel("along branch 1")
    axis.set_ylabel("along branch 2")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title("imagined futures; grey: the two true branches", fontsize=9.5, loc="left")


def draw_coverage(axis: plt.Axes, banks: dict[str, Arm], samples: Samples) -> None:
    """Draw each branch's distance to its nearest hypothesis, by bank."""
    for y, arm in enumerate(banks.values()):
        axis.plot(coverage(imagined(arm, samples), samples), [y] * BRANCHES, "o", color=COLOURS[0])
    axis.axvline(NEAR, color="0.5", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(banks)), list(banks))
    axis.set_xlim(0, None)
    axis.invert_yaxis()
    axis.set_title("error of the nearest hypothesis, a dot a branch", fontsize=9.5, loc="left")


def draw_losses(axis: plt.Axes, losses: dict[str, Tensor]) -> None:
    """Draw the action loss by arm with its 95 % interval."""
    for y, values in enumerate(losses.values()):
        half = 1.96 * (values.std() / len(values) ** 0.5).item()
        axis.errorbar(values.mean().item(), y, xerr=half, fmt="o", color=COLOURS[0], markersize=5)
    axis.set_yticks(range(len(losses)), list(losses))
    axis.set_xlim(0, None)
    axis.invert_yaxis()
    axis.set_title("held-out action loss, samples without the cue", fontsize=9.5, loc="left")


def draw_choice(axis: plt.Axes, shares: dict[str, float], count: int) -> None:
    """Draw how often the most attended hypothesis was the true one, with Wilson intervals."""
    for y, share in enumerate(shares.values()):
        axis.plot(wilson(round(share * count), count), [y, y], color=COLOURS[0], linewidth=2.4)
        axis.plot(share, y, "o", color=COLOURS[0])
    axis.axvline(1 / BRANCHES, color="0.5", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(shares)), list(shares))
    axis.set_xlim(0, 1.02)
    axis.set_ylim(len(shares) - 0.5, -0.5)
    axis.set_title("choose_best; dashed: chance", fontsize=9.5, loc="left")


# ---- main ---------------------------------------------------------------------------------------------


def main(args: list[str]) -> int:
    """Train every arm, print the table, draw the figure; give the exit code."""
    torch.set_num_threads(1)  # at these sizes more threads only wait for one another
    config = type_in(
        ControlConfig, __doc__, ("out", "seed", "steps", "quick"), "python -m bench control", args
    )
    start, seed = time.perf_counter(), config.seed
    steps, many, few = config.sizes
    samples, held = draw(seed, TRAIN, many), draw(seed, HELD_OUT, few)

    # prophets, which never see the cue
    sizes = {"one": (1, "single"), "softmin": (2 * BRANCHES, "softmin"), "rwta": (2 * BRANCHES, "rwta")}
    sizes |= {"min": (2 * BRANCHES, "min"), "N = R": (BRANCHES, "softmin")}
    banks = {}
    for name, (count, loss) in sizes.items():
        banks[name] = make_bank(samples, seed, count, loss)
        train(banks[name], samples, steps, seed, "prophet")
        print(f"{time.perf_counter() - start:5.0f} s  prophet {name}", flush=True)
    checks = check_single(banks["one"], held)
    for name in ("softmin", "rwta", "min"):
        checks += check_bank(name, banks[name], held, judged=name != "min")

    # policies without a prophet: nothing, the true future at each site, and what holds nothing
    arms = {"off": {"fusion": ("none",)}, "zero": {"memory": "zero"}, "random": {"memory": "random"}}
    arms |= {f"oracle {site}": {"memory": "oracle", "fusion": (site,)} for site in SITES}
    losses = {}
    for name, fields in arms.items():
        arm = train(make_arm(samples, seed, **fields), samples, steps, seed)
        losses[name] = action_losses(arm, held, seed)
        print(f"{time.perf_counter() - start:5.0f} s  policy {name}", flush=True)
    checks.append(check_random(losses["random"], losses["zero"], seed))
    untaught = train(make_arm(samples, seed, lambda_world=0.0, detach_memory=False), samples, steps, seed)
    losses["pred, no world loss"] = action_losses(untaught, held, seed)
    checks.append(check_untaught(untaught, held))

    # a policy with the bank, which must attend to the hypothesis that the cue names
    arm = train(banks["N = R"], samples, steps, seed)
    checks += check_bank("N = R", arm, held)
    losses["pred"] = action_losses(arm, held, seed)
    without = {name: values[~held.cued] for name, values in losses.items()}
    checks += [check_memory(name, without[name], without["off"]) for name in arms if "oracle" in name]
    checks.append(check_memory("pred, cue", losses["pred"][held.cued], losses["off"][held.cued]))
    cued, blind = held.take(held.cued), held.take(~held.cued)
    shares = {"cue": choose_best(arm, cued, seed), "no cue": choose_best(arm, blind, seed)}
    checks += check_choice(shares["cue"], shares["no cue"], len(blind.branch))
    shares["no cue, training's\nflow times"] = anytime = choose_best(arm, blind, seed, None)
    checks.append(Check("choose_best without the cue, training's times", anytime, "", None))

    # table and figure
    table, code = report(checks)
    print(table)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    draw_paths(axes[0, 0], banks, held, seed)
    draw_coverage(axes[0, 1], banks, held)
    draw_losses(axes[1, 0], without | {"pred, cue": losses["pred"][held.cued]})
    draw_choice(axes[1, 1], shares, len(blind.branch))
    for axis in axes.flat:
        tidy(axis)
    config.out.mkdir(parents=True, exist_ok=True)
    save(figure, config.out / "control")
    print(f"{config.out / 'control.png'}, {time.perf_counter() - start:.0f} s")
    return code
