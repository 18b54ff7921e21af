"""Train one arm: SmolVLA, with or without a memory of imagined futures, on one budget of samples.

Everything random (data order, flow noise and times, memory noise) is keyed by (seed, global sample number),
never by batch or rank: the same seed and budget give the same run on any number of ranks, and a run that is
killed resumes to the same weights. Budget, warm-up and decay count samples, so batch size does not change
the schedule.

    python train.py --data data/demo --total-samples 2048 --batch-size 16             # E0 on a CPU
    torchrun --nproc-per-node 8 train.py --data DATA --init CHECKPOINT --fusion late  # E2 on a node
    python train.py --help

Shapes: B batch, R flow draws a sample, C actions in a chunk, A action width, T history, K future, D latent
width.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.nn.parallel import DistributedDataParallel

from arm import Arm, ArmConfig, load_arm
from data import Source, held_out
from files import read_json, read_tensors
from latents.encoders import open_backbone, resolved
from latents.tower import Features, load_with
from latents.world import Latents, cache_path, own_policy, prepare
from ranks import Stop, Together, start_ranks, sum_over_ranks, wait_for_ranks
from readers.demos import Demos
from readers.load import in_files, remember_checks
from readers.prefetch import Loader
from readers.selection import DataConfig, find_data
from rollouts.facts import describe_data
from training.diagnostics import (
    CollapseWatch,
    Usage,
    attention_diagnostics,
    memory_norm,
    world_diagnostics,
)
from training.flops import flops_per_sample, utilisation
from training.held_out import measure
from training.optimise import Average, BadSteps, make_optimizer, optimizer_step, shares
from training.run_folder import (
    OPTIMIZER,
    RAW,
    STATE,
    Progress,
    banner,
    check_space,
    cut_metrics,
    device_name,
    fingerprint,
    log,
    log_validation,
    newest_whole,
    open_run,
    point,
    save,
    writing,
)
from training.start import build_arm, make_fast

STEPS_AHEAD = 2  # steps whose pictures are decoded while another one runs


@dataclass(frozen=True)
class TrainConfig(ArmConfig, DataConfig):
    """Train one arm."""

    data: Path = Path("data/demo")
    """Demonstrations: a folder or file in LIBERO's HDF5 layout, a LeRobot v3 folder, or one's hub id."""

    out: Path = Path("runs/run")
    """Run folder; one that exists is resumed, if its configuration agrees."""

    arm: str = ""
    """Name of the arm in reports; default: made from --fusion and --memory."""

    init: str = "tiny"
    """Where the policy starts: a preset's name (fresh weights), a checkpoint folder, or a hub id."""

    revision: str | None = None
    """Revision of the hub id, to pin it."""

    vlm: str | None = None
    """Folder or hub id of the language model. With a checkpoint: its sizes and tokenizer, instead of what the
    checkpoint names. With a preset: its weights too, and a fresh expert beside them."""

    stats_of: str | None = None
    """Data set whose statistics to use, where a checkpoint holds those of several."""

    allow_missing: bool = False
    """Go on when tensors or statistics of a checkpoint are missing, or tensors unexpected."""

    freeze: Literal["expert", "vision", "none"] = "expert"
    """What stays frozen: all but the expert (lerobot's default), only the vision tower, or nothing."""

    features: Path | None = None
    """Folder that `python world.py features` wrote for this --data, --init and --seed: its tokens stand in
    for the pictures, and none is decoded. Not with --blind, whose mean picture needs them."""

    total_samples: int = 100_000
    """Training budget in samples, kept exactly."""

    batch_size: int = 64
    """Samples of an optimiser step, over all ranks."""

    accumulate: int = 1
    """Micro batches that each rank splits its share of a step into."""

    flow_draws: int = 1
    """Draws of noise and time a sample; they share one pass of the prefix."""

    lr: float = 1e-4
    """Peak learning rate."""

    lr_world: float | None = None
    """Peak learning rate of fusion and prophet; default: the same as --lr."""

    lr_end: float = 0.025
    """Final learning rate as a share of the peak."""

    warmup_samples: int = 6_400
    """Samples over which the learning rate rises; at most a tenth of the budget is used."""

    weight_decay: float = 1e-10
    """AdamW's weight decay (gates have none)."""

    clip: float = 10.0
    """Largest gradient norm."""

    state_std_floor: float = 0.0
    """Smallest deviation that a fresh policy's states are divided by, metres or radians. A dimension that the
    demonstrations hardly use would otherwise be blown up: far outside of unit scale in a rollout."""

    action_std_floor: float = 0.0
    """The same for actions (full scale is 1): noise in an unused dimension would be a target too."""

    seed: int = 0
    """Seed of weights, data order and noise."""

    val_every: int = 0
    """Samples between two measurements on held-out episodes (held_out.py); 0: never, none are held out."""

    val_share: float = 0.1
    """Share of the episodes that are held out, where --val-every is set."""

    log_every: int = 20
    """Optimiser steps between two log lines."""

    save_every: int = 50_000
    """Samples between two checkpoints; the last one is always written."""

    keep_every: int = 0
    """Samples between two checkpoints that stay, a multiple of --save-every; of the others the newest two do.
    0: all stay. Only the newest two hold the optimiser's state."""

    ema: float = 0.0
    """Decay, over 64 samples, of a moving average of what trains; 0: none. Checkpoints then hold the average
    as their weights, and beside it what to train on; held-out losses are the average's too."""

    max_bad_steps: int = 10
    """Steps in a row with a gradient that is not finite after which the run ends; such steps are skipped."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that tower, trunk and expert compute in; auto: bfloat16 on a GPU, float32 on a CPU. What trains is
    held in float32 in any case, what is frozen in this type."""

    compile: bool = False
    """Compile tower, trunk and expert block by block; for a GPU, where it pays within minutes."""

    workers: int = 0
    """Processes of each rank that decode coming batches, where pictures stay in the files; 0: none."""

    threads: int | None = None
    """Threads of torch on a CPU; default: torch's own choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        DataConfig.__post_init__(self)
        least_one = ("total_samples", "batch_size", "accumulate", "flow_draws", "log_every", "save_every")
        for flag in (*least_one, "max_bad_steps"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)} must be at least 1")
        if self.keep_every < 0 or self.keep_every % self.save_every:
            raise ValueError(
                f"--keep-every {self.keep_every} must be a multiple of --save-every {self.save_every}, or 0"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema} must be at least 0 and less than 1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers} must be at least 0")
        if self.features is not None and self.freeze != "expert":
            raise ValueError(
                f"--features with --freeze {self.freeze}: what makes the tokens would train, and theirs grow "
                "stale; use --freeze expert, or leave --features out"
            )
        if self.features is not None and self.blind:
            raise ValueError("--features with --blind: the mean picture needs the pictures; leave one out")
        if self.sites and self.world_encoder == "siglip" and self.freeze == "none":
            raise ValueError(
                "--world-encoder siglip with --freeze none: the tower would train, and its latents grow "
                "stale; use --freeze vision"
            )

    @property
    def arm_name(self) -> str:
        name = "+".join(self.sites) + f"-{self.memory}" if self.sites else "none"
        return self.arm or name + ("-blind" if self.blind else "")

    @property
    def free(self) -> tuple[str, ...]:
        """Fields and facts that may change when a run is resumed."""
        return (
            "out", "data", "pictures", "workers", "features", "log_every", "save_every", "keep_every",
            "max_bad_steps", "compile", "threads", "accumulate", "world_model", "data_facts",
            "flops_per_sample", "weights_fingerprint",
        )  # fmt: skip

    def stays(self, samples: int) -> bool:
        """Whether the checkpoint at this many samples, a whole number of steps, stays for good."""
        return not self.keep_every or passes(self.keep_every, samples - self.batch_size, samples)

    def precision(self, device: torch.device) -> torch.dtype:
        """The type to compute in on a device."""
        auto = "bfloat16" if device.type == "cuda" else "float32"
        return getattr(torch, auto if self.dtype == "auto" else self.dtype)


# ---- main ---------------------------------------------------------------------------------------------


def main(config: TrainConfig) -> None:
    """Train from the start, or from the run folder's last whole checkpoint, to the end of the budget."""
    rank, ranks, device = start_ranks()
    say = print if rank == 0 else lambda *_: None
    together = Together(ranks)
    if config.threads:
        torch.set_num_threads(config.threads)

    # data
    last = agree_on_checkpoint(config, rank, together)
    config, demos, features, latents = open_data(config, last, rank, ranks, say)
    out_episodes = held_out(demos, config.val_share) if config.val_every else np.empty(0, np.int64)
    frames = np.flatnonzero(~np.isin(demos.episode, out_episodes))

    # arm, at its start or at the last checkpoint
    progress = Progress()
    if last is not None:
        arm, processor = load_arm(last, config.world_model, allow_missing=config.allow_missing)
        progress = Progress(**read_json(last / STATE))
    else:
        arm, processor = build_arm(config, demos, latents, frames)
    weights = fingerprint(arm.policy) if rank == 0 else ""
    if latents is not None:
        latents = latents.under(arm.encoder, demos)  # of a checkpoint that was trained on other data
    arm.policy.freeze(config.freeze, processor.raw["train_state_proj"])
    arm.to(device).train()
    processor.pad_to = processor.longest(demos.tasks)  # one length for all batches
    make_fast(config, arm, device)
    if features is not None:
        features.check_policy(arm.policy)
    source = Source(
        arm,
        processor,
        demos,
        latents,
        device,
        config.seed,
        config.flow_draws,
        frames=frames,
        features=features,
    )
    facts = {
        "arm": config.arm_name,
        "data_fingerprint": demos.fingerprint,
        "data_provenance": demos.provenance,
        "data_facts": describe_data(demos, pictures=features is None),
        "feature_cache": None if features is None else features.facts,
        "held_out": out_episodes.tolist(),
        "params_total": sum(p.numel() for p in arm.parameters()),
        "params_trainable": sum(p.numel() for p in arm.parameters() if p.requires_grad),
        "dtype": str(arm.policy.dtype).removeprefix("torch."),
        "flops_per_sample": flops_per_sample(arm, source),
        "weights_fingerprint": weights,
    }

    # run folder
    if rank == 0:
        open_run(config, facts)
        check_space(config.out, arm, bool(config.ema))  # now rather than after the first hours
        cut_metrics(config.out, progress.samples)
        start = config.init if last is None else f"{last}, resumed at {progress.samples:,} samples"
        print("\n".join(banner(config, demos, arm, facts, ranks, device, start)), flush=True)
    if len(config.sites) > 1:
        say(f"warning: {len(config.sites)} fusion sites at once: what helps is harder to attribute to one")
    if progress.samples >= config.total_samples:
        say("nothing to do: the budget is spent")
        return

    # loop
    optimizer = make_optimizer(config, arm)
    average = Average(arm, config.ema) if config.ema else None
    if last is not None:
        optimizer.load_state_dict(torch.load(last / OPTIMIZER, weights_only=True, map_location=device))
        if average is not None:
            average.restore(read_tensors(last / RAW))
    if config.workers and features is None and in_files(demos):
        loader = Loader(demos, config.workers)
        source = dataclasses.replace(source, demos=loader.demos, loader=loader)
    model = DistributedDataParallel(arm, gradient_as_bucket_view=True) if ranks > 1 else arm
    spend(config, source, model, optimizer, average, progress, out_episodes, facts, rank, together)
    if source.loader is not None:
        source.loader.close()
    if progress.samples < config.total_samples:
        done = f"{progress.samples:,} of {config.total_samples:,} samples"
        say(f"stopped by SIGTERM at {done}: the same command goes on from there")
    else:
        say(f"done: {config.out / 'last'}")


def agree_on_checkpoint(config: TrainConfig, rank: int, together: Together) -> Path | None:
    """Find the checkpoint that all ranks go on from, and point `last` at it; None for a fresh run.

    Raises ValueError where a rank does not see it: it would train something else.
    """
    found = None
    if rank == 0:
        found, skipped = newest_whole(config.out)
        for line in skipped:
            print(line, flush=True)
        if found is not None:
            with writing(config.out):
                point(config.out, found)
    found = together.gather(found)[0]
    seen = together.gather((config.out / "last").exists())
    if len(set(seen)) > 1:
        raise ValueError(
            f"--out {config.out}: {sum(seen)} of {len(seen)} ranks see a checkpoint there; all nodes must "
            "share the folder"
        )
    return found


def open_data(
    config: TrainConfig, last: Path | None, rank: int, ranks: int, say: Callable[[str], None]
) -> tuple[TrainConfig, Demos, Features | None, Latents | None]:
    """Read what is trained on; ranks share the work of a cache of world latents where there is none.

    Returns the configuration with what the world encoder's model settles, and the demonstrations, their
    features and their latents.
    """
    folder = find_data(config.data, config.data_revision)
    home = config.cache_home(folder)
    writes = config.sites and config.world_encoder == "pca" and not cache_path(home, config).exists()
    if config.features is not None and writes:
        say("there are no world latents yet: pictures are read once, to make them")
    demos, features = load_with(config.features, folder, bool(writes), config)
    backbone = None  # of the world latents
    if config.sites:
        start = {} if last is None else {"init": str(last), "stats_of": None}
        backbone = open_backbone(config, own_policy(dataclasses.replace(config, **start), demos))
        config = resolved(config, backbone)
    if rank:
        wait_for_ranks()  # the first rank checks the pictures, the others find that it did
    if features is None:
        demos = remember_checks(demos, home)
    if rank == 0:
        wait_for_ranks()
    latents = prepare(home, demos, config, backbone, rank, ranks) if config.sites else None
    return config, demos, features, latents


# ---- loop ---------------------------------------------------------------------------------------------


def spend(
    config: TrainConfig,
    source: Source,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    progress: Progress,
    out_episodes: np.ndarray,
    facts: dict,
    rank: int,
    together: Together,
) -> None:
    """Spend the budget: steps, log lines, measurements and checkpoints, until its end or SIGTERM.

    Raises ValueError after --max-bad-steps steps in a row without a finite gradient.
    """
    arm, ranks = source.arm, together.ranks
    usage, watch = Usage(config.num_hypotheses, source.device), CollapseWatch()
    bad = BadSteps(source.device, progress.bad_steps, progress.bad_in_a_row)
    clock, since = time.perf_counter(), progress.samples
    with Stop() as stop:
        while progress.samples < config.total_samples:
            before = progress.samples
            count = min(config.batch_size, config.total_samples - before)
            done, step = before + count, progress.step + 1
            finished = done >= config.total_samples
            logged = step % config.log_every == 0 or finished
            expect(config, source, before, rank, ranks)
            out = optimizer_step(config, source, model, optimizer, before, count, rank, ranks, logged)
            progress.samples, progress.step = done, step
            bad.see(out["bad"])
            if "winner" in out:
                usage.add(out["winner"])
            if average is not None:
                average.update(count)
            stopping = together.any(stop.asked)
            saves = finished or stopping or passes(config.save_every, before, done)
            if logged or saves:
                check_bad(config, bad, progress, rank)
            if logged:
                rate = (done - since) / (time.perf_counter() - clock)
                line = log_line(config, arm, out, progress, rate, ranks, facts) | usage.read()
                if rank == 0:
                    log(config, line)
                if (warning := watch.see(step, line)) and rank == 0:
                    print(warning, flush=True)
                clock, since = time.perf_counter(), done
            if config.val_every and (finished or passes(config.val_every, before, done)):
                with nullcontext() if average is None else average.in_place():
                    found = validate(source, out_episodes, rank, ranks)
                if rank == 0:
                    log_validation(config, {"samples": done, "step": step} | found)
            if rank == 0 and saves:
                save(config, arm, source.processor, optimizer, progress, average)
            if stopping:
                return


def passes(every: int, before: int, done: int) -> bool:
    """Whether a step from `before` to `done` samples reaches or passes a multiple of `every`."""
    return done // every > before // every


def check_bad(config: TrainConfig, bad: BadSteps, progress: Progress, rank: int) -> None:
    """Note skipped steps; ValueError, on the first rank's console, where they were too many in a row."""
    progress.bad_steps, progress.bad_in_a_row, longest = bad.read()
    if longest < config.max_bad_steps:
        return
    if rank:
        sys.exit(1)
    raise ValueError(
        f"--max-bad-steps {config.max_bad_steps}: {longest} steps in a row, up to {progress.samples:,} "
        "samples, had a gradient that is not finite; lower --lr, or look at the data (data.py check)"
    )


def expect(config: TrainConfig, source: Source, done: int, rank: int, ranks: int) -> None:
    """Have the pictures of this step and the next ones decoded in the background."""
    for first in range(done, done + (1 + STEPS_AHEAD) * config.batch_size, config.batch_size):
        if (count := min(config.batch_size, config.total_samples - first)) > 0:
            for numbers, _ in shares(first, count, rank, ranks, config.accumulate):
                source.expect(numbers)


def log_line(
    config: TrainConfig, arm: Arm, out: dict, progress: Progress, rate: float, ranks: int, facts: dict
) -> dict[str, float]:
    """Gather what is logged of a step; all ranks call it, since it sums over them."""
    counts = out["counts"][[0, 1, 1]].clamp(min=1)
    action, world, cosine = (sum_over_ranks(out["sums"].double()) / counts).tolist()
    line = {"samples": progress.samples, "step": progress.step, "action_loss": action, "loss": action}
    line |= {"lr": out["lr"], "bad_steps": progress.bad_steps}
    line |= {name: float(norm) for name, norm in out["norms"].items()} | {"samples_per_second": rate}
    mfu = utilisation(facts["flops_per_sample"], rate / ranks, device_name(), arm.policy.dtype)
    if mfu is not None:
        line["mfu"] = mfu
    if arm.prophet is not None:
        line |= {"world_loss": world, "world_cos": cosine, "loss": action + config.lambda_world * world}
    if arm.policy.fusion is not None:
        line |= arm.policy.fusion.gates() | diagnose(arm, out)
    return line


def diagnose(arm: Arm, out: dict) -> dict[str, float]:
    """Measure how futures are predicted and attended to, on this rank's last micro batch of the step."""
    inputs, world, noise, times = out["batch"]
    found = {} if out["predicted"] is None else world_diagnostics(arm, world, out["predicted"])
    found |= memory_norm(arm, world, noise)
    # At time 1, as in a decision's first step: earlier, the noisy actions give away which future came.
    return found | attention_diagnostics(arm, inputs, world, noise, torch.ones_like(times))


def validate(source: Source, episodes: np.ndarray, rank: int, ranks: int) -> dict[str, float]:
    """Measure the action loss on held-out episodes, each rank its share, under the run's modes and oracle."""
    arm = source.arm
    modes = list(dict.fromkeys(("off", arm.config.mode, "zero", "oracle"))) if arm.config.sites else ["off"]
    found = measure(source, episodes[rank::ranks], modes)
    sums = [values.sum() for values in found.losses.values()]
    sums = sum_over_ranks(
        torch.tensor([*sums, len(found.episodes)], dtype=torch.float64, device=source.device)
    )
    return {f"val_loss_{mode}": value for mode, value in zip(modes, (sums[:-1] / sums[-1]).tolist())}


if __name__ == "__main__":
    rank0 = os.environ.get("RANK", "0") == "0"
    try:
        main(tyro.cli(TrainConfig, console_outputs=rank0))
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
