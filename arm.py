"""One arm of the experiment: a policy, the prophet that feeds its memory, and the statistics of both.

What `train.py` trains, `eval.py` rolls out and a checkpoint folder holds: the policy in lerobot's layout,
everything that is ours (fusion, prophet, world encoder, their config) in one file beside it,
`world.safetensors`.

    arm, processor = load_arm("runs/demo/E2-s0/last")

Shapes: B batch, R flow draws a sample, T history frames, K future frames, N hypotheses, D latent width, C
chunk, A action.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from files import Refused, check_finite, misfit, read_json, read_tensors, save_tensors, shape_of
from fusion import SITES, Fusion, FusionConfig, Memory, Sizes
from latents.encoders import PCA, Learned, WorldConfig, encoder_from_state
from model import SmolVLA, load_policy
from prophet import (
    METHODS,
    NEEDS,
    ROLLOUT_MODES,
    Imagined,
    MemoryMode,
    Prophet,
    ProphetConfig,
    WorldLoss,
    absolute,
    bank_loss,
    change_target,
    counted_steps,
    gate_scale,
    intervene,
    make_memory,
    parse_mode,
    world_loss,
)
from smolvla.checkpoint import WORLD_FILE, save_policy, stored_arm
from smolvla.folders import checkpoint_in
from smolvla.processor import Processor

Fusions = Literal[("none", *SITES)]


@contextmanager
def asked() -> Iterator[None]:
    """Pass on what fusion.py and prophet.py, which need torch alone, refuse of a person's flags."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


@dataclass(frozen=True)
class ArmConfig(FusionConfig, ProphetConfig, WorldConfig):
    """What makes one arm differ from another."""

    fusion: tuple[Fusions, ...] = ("none",)
    """Where memory enters the policy: none (E0), or sites of fusion.py; several may be named."""

    memory: MemoryMode = "pred"
    """Memory that the policy is trained with (ignored with --fusion none)."""

    memory_dropout: float = 0.0
    """Share of the samples that train with memory off, so that off in a rollout is nothing new."""

    detach_memory: bool = False
    """Stop the action loss at the prophet: it learns from the world loss alone."""

    blind: bool = False
    """Replace every image by the data set's mean picture (E0b): what the benchmark gives away unseen."""

    world_stride: int = 1
    """Control steps (1/20 s) between two world latents."""

    delta: bool = True
    """Predict the change from the present latent rather than the future latent itself."""

    lambda_world: float = 0.2
    """Weight of the world loss beside the action loss."""

    lambda_mag: float = 0.1
    """Weight of the length term inside the world loss; 0 leaves the plain cosine."""

    world_loss: WorldLoss = "softmin"
    """How hypotheses' losses make one: of their mean prediction (single), mean, min, softmin, or relaxed
    winner-takes-all (rwta); with one hypothesis all are the same."""

    tau: float = 0.1
    """Temperature of --world-loss softmin."""

    rwta_eps: float = 0.05
    """Share of the loss that --world-loss rwta leaves to the losers."""

    limits: ClassVar = {
        "world_stride": (1, 10_000), "lambda_world": (0, 1e6), "lambda_mag": (0, 1e6), "tau": (1e-6, 1e6),
        "rwta_eps": (0, 1),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if "none" in self.fusion and len(self.fusion) > 1:
            raise Refused(f"--fusion {' '.join(self.fusion)}: none excludes the others; name either")
        with asked():
            METHODS[self.hypothesis_method].check(self)
        if not 0 <= self.memory_dropout < 1:
            raise Refused(f"--memory-dropout {self.memory_dropout} must be at least 0 and less than 1")

    # Fields in which a run that goes on from an arm's checkpoint may differ from it.
    free_to_change: ClassVar = (
        "memory", "memory_dropout", "blind", "detach_memory", "lambda_world", "lambda_mag", "gate_init",
        "world_model", "held_out",
    )  # fmt: skip

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site in self.fusion if site != "none")

    @property
    def mode(self) -> str:
        """The memory mode that applies: `off` where there is no site for it."""
        return self.memory if self.sites else "off"

    @property
    def has_prophet(self) -> bool:
        return "prophet" in NEEDS[self.mode]

    @property
    def trains_on(self) -> tuple[str, ...]:
        """The latents and noise that a training batch must hold."""
        needed = self.made_from(self.mode)
        if self.has_prophet:
            needed += ("z_hist", "z_future", "valid")  # for the world loss
        if self.memory_dropout and self.sites:
            needed += ("dropped",)
        return tuple(dict.fromkeys(needed))

    def made_from(self, mode: str) -> tuple[str, ...]:
        """The latents and noise that a mode's memory is made from."""
        drawn = "prophet" in NEEDS[mode] and METHODS[self.hypothesis_method].chance
        own = ("prophet", "mean")  # what the arm has itself
        return tuple(name for name in NEEDS[mode] if name not in own) + (("chance",) if drawn else ())


class Summary(NamedTuple):
    """What of the training data's latents travels with an arm."""

    scale: Tensor  # (K,), the RMS length of each change
    mean_change: Tensor  # (K, D), the mean of each, a baseline for the prophet
    partners: Tensor  # (n, T, D), pasts that `shuffle` and `wrong_task` take in rollouts
    partner_at: Tensor  # (n, 3) int64: each one's episode, step and task (a CRC of its instruction)
    mean_future: Tensor  # (K, D), what `mean` shows
    step_factor: Tensor  # (K, K) lower triangular: unit noise becomes correlated over steps, as futures are

    @classmethod
    def of(cls, scale: Tensor, mean_change: Tensor, partners: Tensor) -> Summary:
        """Partners of one episode each, a mean of 0, steps that know nothing of one another."""
        K, n = len(scale), len(partners)
        at = torch.stack([torch.arange(n), torch.zeros(n), torch.zeros(n)], 1).long()
        return cls(scale, mean_change, partners, at, torch.zeros_like(mean_change), torch.eye(K))

    @classmethod
    def none(cls, config: ArmConfig) -> Summary:
        """That of an arm without memory."""
        K, D = config.future, config.world_dim
        return cls.of(torch.ones(K), torch.zeros(K, D), torch.zeros(0, config.history, D))


class Arm(nn.Module):
    """Policy, prophet (where the memory needs one) and world statistics; `forward` gives a batch's losses."""

    def __init__(
        self,
        config: ArmConfig,
        policy: SmolVLA,
        encoder: PCA | Learned | None,
        summary: Summary,
        mean_images: dict[str, Tensor],
    ) -> None:
        """Args: encoder, None for an arm without memory; mean_images per camera (3, S, S) uint8, for a blind
        arm."""
        super().__init__()
        self.config, self.policy, self.encoder = config, policy, encoder
        self.prophet: Prophet | None = None
        with asked():
            self.build(config, policy)
        for name, value in summary._asdict().items():
            self.register_buffer(name, value)
        self.mean_images = nn.Module()  # of buffers, so that pictures do not count as parameters
        for name, picture in mean_images.items():
            self.mean_images.register_buffer(name.replace(".", "/"), picture)

    def build(self, config: ArmConfig, policy: SmolVLA) -> None:
        """Make what a plain policy does not have: the fusion sites and the prophet."""
        if config.sites:
            sizes = Sizes(
                expert=policy.config.expert_width,
                trunk=policy.config.width,
                layers=policy.config.expert_layers,
                memory=config.world_dim,
                steps=config.future,
                hypotheses=config.num_hypotheses,
                coded=METHODS[config.hypothesis_method].coded,
            )
            policy.fusion = Fusion(config.sites, config, sizes)
        if config.has_prophet:
            self.prophet = METHODS[config.hypothesis_method](config, config.world_dim)

    def new_modules(self) -> list[nn.Module]:
        """The modules that a plain policy does not have."""
        return [m for m in (self.policy.fusion, self.prophet) if m is not None]

    def blindfold(self, batch: dict) -> dict:
        """Replace the cameras' images by the mean picture, as a batch of one, where the arm is blind."""
        if not self.config.blind:
            return batch
        pictures = self.mean_images.named_buffers()
        return batch | {name.replace("/", "."): picture[None] for name, picture in pictures}

    def needs(self, mode: str, rollout: bool = True) -> tuple[str, ...]:
        """Name what `mode` is made from: "z_hist", "z_future", "z_partner", "noise", "chance".

        Raises Refused for a mode that this arm cannot have, or no rollout.
        """
        with asked():
            mode, change = parse_mode(mode, self.config.num_hypotheses, self.config.mode)
        if not rollout and "z_first" in NEEDS[mode]:
            raise Refused(f"--memory {mode} is of a rollout's first decision, there is none offline")
        if rollout and mode not in ROLLOUT_MODES:
            raise Refused(
                f"--memory {mode} needs the future, which a rollout has not: choose from "
                f"{', '.join(ROLLOUT_MODES)}, or evaluate offline"
            )
        if (mode != "off" or change) and not self.config.sites:
            raise Refused(
                f"--memory {change or mode}: this arm has no fusion site to give memory to; only off applies"
            )
        if change == "best1" and not self.policy.fusion.attends():
            raise Refused(f"--memory {change} keeps what is attended to most: no site of this arm attends")
        if "prophet" in NEEDS[mode] and self.prophet is None:
            without = ", ".join(m for m in ROLLOUT_MODES if "prophet" not in NEEDS[m])
            raise Refused(f"--memory {mode} needs a prophet, and this arm has none: choose {without}")
        return self.config.made_from(mode)

    def imagine(self, past: Tensor, world: dict) -> Imagined:
        """Run the prophet on a past (B, T, D); world has "chance" where hypotheses differ by it."""
        return self.prophet(past, world.get("chance"))

    def memory(
        self,
        mode: str,
        like: Tensor,
        world: dict,
        imagined: Imagined | None = None,
        best: Tensor | None = None,
    ) -> Memory | None:
        """Make the memory of `mode`, or of an intervention on a bank, rows (B, N*K, D).

        Args: like (B, D) gives batch, width and type; world with what `needs` names: z_hist and z_partner
        (B, T, D), z_future (B, K, D), noise (B, N*K, D), unit Gaussian, chance (B, N, ., h); imagined, what
        the prophet makes of z_hist, where it has run already; best (B,), the hypothesis that `best1` keeps.
        """
        mode, change = parse_mode(mode, self.config.num_hypotheses, self.config.mode)
        futures = log_pi = None
        if "prophet" in NEEDS[mode] and self.prophet is not None:
            [whose] = (name for name in NEEDS[mode] if name.startswith("z_"))
            past = world[whose]
            if imagined is None or whose != "z_hist":
                imagined = self.imagine(past, world)
            futures, log_pi = absolute(imagined.y, past, self.config.delta), imagined.log_pi
            if change is not None and gate_scale(change) is None:
                futures, log_pi = intervene(change, futures, log_pi, best)
        rows = make_memory(
            mode,
            self.config.future,
            like=like,
            futures=futures,
            z_hist=world.get("z_hist"),
            z_future=world.get("z_future"),
            noise=self.coloured(world["noise"]) if "noise" in NEEDS[mode] else None,
            mean=self.mean_future,
            spread=None if self.encoder is None else self.encoder.stats.dim_std,
            hypotheses=self.config.num_hypotheses,
        )
        if rows is None:
            return None
        if self.config.detach_memory:
            rows, log_pi = rows.detach(), None if log_pi is None else log_pi.detach()
        return Memory(rows, log_pi)

    def coloured(self, noise: Tensor) -> Tensor:
        """Give unit noise (B, N*K, D) the data's correlation over steps and deviation per dimension."""
        steps = noise.unflatten(1, (-1, self.config.future))  # (B, N*K, D) -> (B, N, K, D)
        return (self.step_factor @ steps).flatten(1, 2) * self.encoder.stats.dim_std.to(noise)

    def forward(self, inputs: dict, world: dict, noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Compute a batch's losses before any reduction.

        Args: inputs as `Processor` makes them; world with what the configuration's `trains_on` names, "valid"
        (B, K) among it; noise (B, R, C, A_max), time (B, R).
        Returns: "action" (B, R, C, A); with a prophet "predicted" (B, N, K, D), "world" (B,), "counted" (B,),
        "world_cos" (B, N) and "winner" (B,), the hypothesis of least loss, -1 where nothing counts; with
        memory "bad_memory_rows", how many are not finite.
        """
        imagined = None if self.prophet is None else self.imagine(world["z_hist"], world)
        memory, bad = self.memory(self.config.mode, self.like(noise), world, imagined), None
        if memory is not None:
            bad = (~memory.rows.detach().isfinite().all(-1)).sum()
            if "dropped" in world:  # a sample whose rows are all not finite has none: off, to the bit
                rows = torch.where(world["dropped"][:, None, None], torch.nan, memory.rows)
                memory = memory._replace(rows=rows)
        out = {"action": self.policy(inputs, noise, time, memory)}
        if bad is not None:
            out["bad_memory_rows"] = bad
        return out if imagined is None else out | self.world_losses(imagined, world)

    def world_losses(self, imagined: Imagined, world: dict) -> dict[str, Tensor]:
        """Compare what was imagined with what came: one loss a sample, by the configuration's rule.

        The loss is that of what a method learns from; what is logged beside it, of what the policy sees.
        """
        config, single, learned = self.config, None, self.prophet.learned(imagined, world)
        target = change_target(world["z_hist"], world["z_future"], config.delta)
        rest = target, world["valid"], self.scale, config.lambda_mag
        losses, counted, cosine = world_loss(learned.y, *rest)
        if config.world_loss == "single":
            single = world_loss(learned.y.mean(1, keepdim=True), *rest)[0][:, 0]
        loss = bank_loss(losses, config.world_loss, single, learned.log_pi, config.tau, config.rwta_eps)
        if learned.cost is not None:
            loss = loss + torch.where(counted, learned.cost, 0.0)
        if learned is not imagined:
            losses, _, cosine = world_loss(imagined.y, *rest)
        winner = torch.where(counted, losses.detach().argmin(1), -1)
        return {
            "predicted": imagined.y, "world": loss, "counted": counted, "world_cos": cosine, "winner": winner,
        }  # fmt: skip

    def like(self, noise: Tensor) -> Tensor:
        """A tensor (B, D) of the batch, type and device of the flow noise (B, ...)."""
        return noise.new_zeros(len(noise), self.config.world_dim)

    def counts(self, world: dict) -> Tensor:
        """Which samples (B,) bool the world loss will count: train.py divides by their number."""
        target = change_target(world["z_hist"], world["z_future"], self.config.delta)
        return counted_steps(target, world["valid"], self.scale).any(1)

    @torch.no_grad()
    def act(
        self, inputs: dict, noise: Tensor, mode: str, world: dict | None = None, best: Tensor | None = None
    ) -> Tensor:
        """Predict a chunk of normalised actions (B, C, A) under a memory mode; world, best as in `memory`."""
        memory = self.memory(mode, self.like(noise), world or {}, best=best)
        return self.policy.predict_chunk(inputs, noise, memory)


def save_arm(folder: Path, arm: Arm, processor: Processor) -> None:
    """Write a checkpoint folder: the policy as lerobot loads it, and what is ours in `world.safetensors`."""
    tensors = {name: t for name, t in arm.state_dict().items() if is_ours(name)}
    if arm.encoder is not None:
        tensors |= {f"encoder.{name}": t for name, t in arm.encoder.state().items()}
    check_finite(tensors, folder / WORLD_FILE)
    save_policy(folder, arm.policy, processor)
    config = json.dumps(dataclasses.asdict(arm.config))
    save_tensors(tensors, folder / WORLD_FILE, {"config": config})


def fingerprint(arm: Arm, processor: Processor) -> str:
    """A CRC over all that decides an arm's actions: weights, memory, world encoder, statistics."""
    crc, encoder = 0, {} if arm.encoder is None else arm.encoder.state()
    statistics = {f"{f}.{k}": t for f, x in processor.stats_after.items() for k, t in x.items()}
    statistics |= {f"{f} {k}": t for f, x in processor.stats.items() for k, t in x.items()}
    for name, tensor in (*arm.state_dict().items(), *sorted(encoder.items()), *sorted(statistics.items())):
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(values, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def is_ours(name: str) -> bool:
    """Whether a tensor of an arm's state is not part of lerobot's policy."""
    return not name.startswith("policy.") or name.startswith("policy.fusion.")


def load_arm(folder: str | Path, world_model: str | None = None, **how: object) -> tuple[Arm, Processor]:
    """Load an arm from a checkpoint folder; lerobot's own, without `world.safetensors`, has no memory.

    Args: world_model, where the world encoder's model lies, if not where it lay in training. What else
    `load_policy` takes goes to it.
    Raises Refused, one line, where the folder is incomplete or its files do not fit one another.
    """
    policy, processor = load_policy(folder, **how)
    path = world_file(Path(folder))
    config = stored_config(Path(folder))
    if config is None:
        return Arm(ArmConfig(), policy, None, Summary.none(ArmConfig()), {}), processor
    tensors = read_tensors(path)
    check_finite(tensors, path)
    encoded = {n.removeprefix("encoder."): tensors.pop(n) for n in list(tensors) if n.startswith("encoder.")}
    images = {
        n.removeprefix("mean_images.").replace("/", "."): t
        for n, t in tensors.items()
        if n.startswith("mean_images.")
    }
    if world_model is not None and config.sites:
        config = dataclasses.replace(config, world_model=world_model)
    encoder = encoder_from_state(encoded, config, policy) if encoded else None
    absent = [name for name in Summary._fields if name not in tensors]
    if absent:
        raise Refused(f"{path} has no {', '.join(absent)}: an older version wrote it; train the arm again")
    summary = Summary(*(tensors[name] for name in Summary._fields))
    arm = Arm(config, policy, encoder, summary, images)
    wanted = {name for name in arm.state_dict() if is_ours(name)}
    if wanted != set(tensors):
        raise Refused(
            f"{path} does not fit its config; tensors that differ: {', '.join(sorted(wanted ^ set(tensors)))}"
        )
    arm.load_state_dict(tensors, strict=False)
    return arm, processor


def world_file(folder: Path) -> Path:
    """Where a checkpoint folder, or the last one of a run folder, keeps what is ours."""
    return checkpoint_in(folder) / WORLD_FILE


def stored_config(folder: Path) -> ArmConfig | None:
    """Read the configuration that an arm was saved with; None for a checkpoint without memory's file.

    Raises Refused where the file is damaged or of another version.
    """
    path = world_file(folder)
    stored = stored_arm(path.parent)
    if stored is None:
        refuse_lost_memory(path)
        return None
    known = shape_of(ArmConfig)
    strange = sorted(name for name in stored if f"{name}?" not in known)
    why = f"nobody knows {', '.join(strange)}" if strange else misfit(stored, known)
    if why:
        raise Refused(f"{path} cannot be read ({why}): another version wrote it; train the arm again")
    return ArmConfig(**{name: as_tuple(value) for name, value in stored.items()})


def refuse_lost_memory(path: Path) -> None:
    """Raise Refused where the run of a checkpoint that lacks `path` had a memory: it would act without."""
    record = path.resolve().parent.parent / "config.json"
    run = read_json(record) if record.is_file() else {}
    if "arm" in run and run.get("fusion", ["none"]) != ["none"]:
        raise Refused(
            f"{path} is missing, and {record} says that the run has a memory, --fusion "
            f"{' '.join(run['fusion'])}: copy the checkpoint again"
        )


def as_tuple(value: object) -> object:
    """Undo JSON's turning of tuples into lists."""
    return tuple(value) if isinstance(value, list) else value
