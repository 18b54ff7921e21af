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
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from arm import Arm, load_arm
from data import Source
from files import LARGEST, Refused, only_writer, read_json, read_tensors, shape_of
from model import masked_mean
from ranks import Stop, Together, Vigil, run_program, start_ranks, sum_over_ranks
from readers.demos import Demos
from readers.load import in_files
from readers.prefetch import Loader
from rollouts.conform import check_statistics
from rollouts.facts import describe_data
from simulator.env import CONTROL_HZ
from smolvla import kernels
from smolvla.folders import OPTIMIZER, RAW, STATE, newest_whole, point
from training.diagnostics import (
    CollapseWatch,
    Usage,
    attention_diagnostics,
    gradient_norms,
    memory_norm,
    world_diagnostics,
)
from training.flops import flops_per_sample, utilisation
from training.held_out import measure, world_cosine
from training.optimise import Average, BadSteps, OptimiseConfig, lr_factor, make_optimizer
from training.run_folder import (
    Progress,
    check_space,
    cut_metrics,
    device_name,
    environment,
    fingerprint,
    log,
    log_validation,
    open_run,
    save,
    writing,
)
from training.start import (
    DEMO,
    StartConfig,
    build_arm,
    check_trunk,
    make_caches,
    open_data,
    record_demo,
    whose_statistics,
)
from training.trackers import check_package, open_trackers

# Options that --help begins with.
OFTEN = ("data", "init", "fusion", "memory", "total_samples", "batch_size", "lr", "seed", "out", "arm")
STEPS_AHEAD = 2  # steps whose pictures are decoded while another one runs


@dataclass(frozen=True)
class TrainConfig(StartConfig, OptimiseConfig):
    """Train one arm."""

    out: Path | None = None
    """Run folder; one that exists is resumed, if it agrees. Default: runs/ARM-nBUDGET-sSEED."""

    arm: str = ""
    """Name of the arm in reports; default: made from --fusion and --memory."""

    compared_with: tuple[str, ...] = ()
    """Arms that reports compare this one with."""

    prepare: bool = False
    """Only make, or check, what this training reads beside the data, world latents and the --features: for
    sweeps, whose runs share them, or before a GPU is paid for."""

    accept: tuple[Literal["statistics"], ...] = ()
    """With --statistics checkpoint: start although the data lie far outside of them."""

    flow_draws: int | None = None
    """Draws of noise and time a sample; they share one pass of the prefix. Default: the recipe's."""

    log_every: int = 20
    """Optimiser steps between two log lines."""

    save_every: int | None = None
    """Samples between two checkpoints; the last one is always written. Default: the recipe's of --init."""

    save_minutes: float = 10.0
    """Minutes after which a checkpoint is written in between, for the first time after one; the next replaces
    it."""

    keep_every: int = 0
    """Samples between two checkpoints that stay, a multiple of --save-every; of the others the newest two do.
    0: all stay. Only the newest two hold the optimiser's state."""

    patience: float = 5.0
    """Minutes without a step or a sign of life after which a rank that waits for another ends, naming it."""

    max_bad_steps: int = 10
    """Steps in a row with a gradient that is not finite after which the run ends; such steps are skipped."""

    compile: bool = False
    """Compile tower, trunk and expert block by block; for a GPU, where it pays within minutes."""

    workers: int = 0
    """Processes of each rank that decode coming batches, where pictures stay in the files; 0: none."""

    threads: int | None = None
    """Threads of torch on a CPU; default: torch's own choice."""

    wandb: str | None = None
    """Project of Weights & Biases that gets the log lines as well; needs the package wandb."""

    tensorboard: bool = False
    """Write the log lines for TensorBoard as well, to OUT/tensorboard; needs the package tensorboard."""

    limits: ClassVar = {
        **dict.fromkeys(("flow_draws", "log_every", "save_every", "max_bad_steps"), (1, LARGEST)),
        **dict.fromkeys(("keep_every", "save_minutes"), (0, LARGEST)),
        **{"workers": (0, 1000), "threads": (1, 1000), "patience": (0.01, LARGEST)},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle({"out": Path("runs", f"{self.arm_name}-n{self.total_samples}-s{self.seed}")})
        for package in filter(lambda name: getattr(self, name), ("wandb", "tensorboard")):
            check_package(package)
        if self.keep_every % self.save_every:
            raise Refused(
                f"--keep-every {self.keep_every} must be a multiple of --save-every {self.save_every}, or 0"
            )

    @property
    def arm_name(self) -> str:
        name = "+".join(self.sites) + f"-{self.memory}" if self.sites else "none"
        return self.arm or name + ("-blind" if self.blind else "")

    @property
    def free(self) -> tuple[str, ...]:
        """Fields and facts that may change when a run is resumed."""
        return (
            "out", "data", "cache", "pictures", "workers", "features", "prepare", "log_every", "save_every",
            "save_minutes", "keep_every", "patience", "max_bad_steps", "compile", "threads", "accumulate",
            "world_model", "data_facts", "flops_per_sample", "weights_fingerprint", "compared_with", "accept",
            "wandb", "tensorboard",
        )  # fmt: skip

    def stays(self, step: int) -> bool:
        """Whether a step's checkpoint stays for good: not one that was written between two planned ones."""
        samples = step * self.batch_size
        return passes(self.keep_every or self.save_every, samples - self.batch_size, samples)


# ---- main ---------------------------------------------------------------------------------------------


def main(config: TrainConfig) -> None:
    """Train from the start, or from the run folder's last whole checkpoint, to the end of the budget."""
    rank, ranks, device = start_ranks(patience=60 * config.patience)
    if config.threads:
        torch.set_num_threads(config.threads)
    with Vigil(rank, ranks, 60 * config.patience) as vigil:
        together = Together(ranks, vigil)
        config.prepare or check_trunk(config)
        if config.data == DEMO:
            record_demo(config, rank, together)
        if config.prepare:
            lines = make_caches(config, rank, ranks, device)
            if rank == 0:
                print(*lines, sep="\n")
            return
        with only_writer(config.out, "train.py") if rank == 0 else nullcontext():
            train(config, rank, ranks, device, together)


def train(config: TrainConfig, rank: int, ranks: int, device: torch.device, together: Together) -> None:
    """Train into a run folder that is this run's alone."""
    say = print if rank == 0 else lambda *_: None

    # data
    last = agree_on_checkpoint(config, rank, together)
    config, demos, features, latents = open_data(config, last, rank, ranks, say)
    out_episodes = np.array(config.held_out, np.int64)
    frames = np.flatnonzero(~np.isin(demos.episode, out_episodes))

    # arm, at its start or at the last checkpoint
    progress = Progress()
    if last is not None:
        arm, processor = load_arm(last, config.world_model, allow_missing=config.allow_missing)
        progress = Progress(**read_json(last / STATE, shape_of(Progress)))
    else:
        arm, processor = build_arm(config, demos, latents, frames)
        for note in processor.notes:
            say(f"adapted: {note}")
    for cut in processor.cut(demos.tasks[task] for task in np.unique(demos.task)):
        say(f"warning: {cut}")
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
        "statistics_of": whose_statistics(config, demos),
        "feature_cache": None if features is None else features.facts,
        "held_out": out_episodes.tolist(),
        "params_total": sum(p.numel() for p in arm.parameters()),
        "params_trainable": sum(p.numel() for p in arm.parameters() if p.requires_grad),
        "dtype": str(arm.policy.dtype).removeprefix("torch."),
        "flops_per_sample": flops_per_sample(arm, source),
        "hypotheses_alike": bool(arm.prophet and arm.prophet.alike),
        "weights_fingerprint": weights,
    }

    if config.statistics == "checkpoint" and last is None:
        check_statistics(arm.policy.config, processor, facts["data_facts"], config.accept)

    # run folder
    if rank == 0:
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        open_run(config.out, dataclasses.asdict(config) | facts, defaults, config.free)
        check_space(config.out, arm, bool(config.ema))  # now rather than after the first hours
        cut_metrics(config.out, progress.samples)
        start = config.init if last is None else f"{last}, resumed at {progress.samples:,} samples"
        print("\n".join(banner(config, demos, arm, facts, ranks, device, start)), flush=True)
    if len(config.sites) > 1:
        say(f"warning: {len(config.sites)} fusion sites at once: what helps is harder to attribute to one")
    if progress.samples >= config.total_samples:
        say(
            f"nothing to do: the budget of {config.total_samples:,} samples is spent; to go on, add --init "
            f"{config.out / 'last'} --statistics checkpoint --out NEW"
        )
        return

    # loop
    together.vigil.step(progress.step, busy=True)
    optimizer = make_optimizer(config, arm)
    average = Average(arm, config.ema) if config.ema else None
    if last is not None:
        optimizer.load_state_dict(torch.load(last / OPTIMIZER, weights_only=True, map_location=device))
        if average is not None:
            average.restore(read_tensors(last / RAW))
    if config.workers and features is None and in_files(demos):
        loader = Loader(demos, config.workers)
        source = dataclasses.replace(source, demos=loader.demos, loader=loader)
    model = parallel(arm) if ranks > 1 else arm
    spend(config, source, model, optimizer, average, progress, out_episodes, facts, rank, together)
    if source.loader is not None:
        source.loader.close()
    if progress.samples < config.total_samples:
        done = f"{progress.samples:,} of {config.total_samples:,} samples"
        say(f"stopped at {done}: the same command goes on from there")
    else:
        say(f"done: {config.out / 'last'}")


def agree_on_checkpoint(config: TrainConfig, rank: int, together: Together) -> Path | None:
    """Find the checkpoint that all ranks go on from, and point `last` at it; None for a fresh run.

    Raises Refused where a rank does not see it: it would train something else.
    """
    found = None
    if rank == 0:
        found, skipped = newest_whole(config.out)
        for line in skipped:
            print(line, flush=True)
        if found is not None:
            with writing(config.out):
                found = point(config.out, found)
    found = together.gather(found)[0]
    seen = together.gather((config.out / "last").exists())
    if len(set(seen)) > 1:
        raise Refused(
            f"--out {config.out}: {sum(seen)} of {len(seen)} ranks see a checkpoint there; all nodes must "
            "share the folder"
        )
    return found


def make_fast(config: TrainConfig, arm: Arm, device: torch.device) -> None:
    """Hold and compute the policy in the wanted type, and take the device's fast path."""
    arm.policy.set_dtype(config.precision(device))
    if config.compile:
        arm.policy.compile_blocks()
    elif device.type == "cpu":
        kernels.keep_memory()
        kernels.speed_up(arm.policy, arm.policy.dtype)


def parallel(arm: Arm) -> DistributedDataParallel:
    """Average gradients over ranks; buffers, partners of up to 23 MB, are alike from the start on."""
    return DistributedDataParallel(arm, gradient_as_bucket_view=True, broadcast_buffers=False)


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
    """Spend the budget: steps, log lines, measurements and checkpoints, until its end, SIGTERM or Ctrl-C.

    Raises Refused after --max-bad-steps steps in a row without a finite gradient.
    """
    arm, ranks = source.arm, together.ranks
    usage, watch = Usage(config.num_hypotheses, source.device), CollapseWatch()
    bad = BadSteps(source.device, progress.bad_steps, progress.bad_in_a_row)
    clock, since = time.perf_counter(), progress.samples
    trackers = open_trackers(vars(config), config.out, progress.samples) if rank == 0 else []
    saved, wait = time.monotonic(), min(1.0, config.save_minutes)  # a first checkpoint comes early
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
            together.vigil.step(step)
            bad.see(out["bad"])
            if "winner" in out:
                usage.add(out["winner"])
            if average is not None:
                average.update(count)
            stopping, due = together.any(stop.asked, time.monotonic() > saved + 60 * wait)
            saves = finished or stopping or due or passes(config.save_every, before, done)
            if logged or saves:
                check_bad(config, bad, progress, rank)
            if logged:
                rate = (done - since) / (time.perf_counter() - clock)
                line = log_line(config, arm, out, progress, rate, ranks, facts) | usage.read()
                if rank == 0:
                    log(config.out, line, config.total_samples)
                    for tell in trackers:
                        tell(line)
                if (warning := watch.see(step, line)) and rank == 0:
                    print(warning, flush=True)
                clock, since = time.perf_counter(), done
            together.vigil.step(step, busy=saves or bool(config.val_every))
            if config.val_every and (finished or passes(config.val_every, before, done)):
                with nullcontext() if average is None else average.in_place():
                    found = validate(source, out_episodes, rank, ranks)
                if rank == 0:
                    found = {"samples": done, "step": step} | found
                    log_validation(config.out, found)
                    for tell in trackers:
                        tell(found)
            if rank == 0 and saves:
                save(config.out, arm, source.processor, optimizer, progress, average, config.stays)
            if saves:
                saved, wait = time.monotonic(), config.save_minutes
            if stopping:
                return


def passes(every: int, before: int, done: int) -> bool:
    """Whether a step from `before` to `done` samples reaches or passes a multiple of `every`."""
    return done // every > before // every


def check_bad(config: TrainConfig, bad: BadSteps, progress: Progress, rank: int) -> None:
    """Note skipped steps; Refused, on the first rank's console, where they were too many in a row, or all."""
    progress.bad_steps, progress.bad_in_a_row, longest = bad.read()
    spent = progress.samples >= config.total_samples and progress.bad_steps == progress.step
    if longest < config.max_bad_steps and not spent:
        return
    if rank:
        sys.exit(1)
    raise Refused(
        f"--max-bad-steps {config.max_bad_steps}: {longest} steps in a row, up to {progress.samples:,} "
        f"samples{', the whole budget,' * spent} had a gradient that is not finite; lower --lr, or look at "
        "the data (data.py check)"
    )


def expect(config: TrainConfig, source: Source, done: int, rank: int, ranks: int) -> None:
    """Have the pictures of this step and the next ones decoded in the background."""
    for first in range(done, done + (1 + STEPS_AHEAD) * config.batch_size, config.batch_size):
        if (count := min(config.batch_size, config.total_samples - first)) > 0:
            for numbers, _ in shares(first, count, rank, ranks, config.accumulate):
                source.expect(numbers)


def shares(first: int, count: int, rank: int, ranks: int, accumulate: int) -> list[tuple[np.ndarray, float]]:
    """This rank's micro batches of the step over samples first..first+count-1: numbers and weight.

    Where a step has fewer samples than micro batches, a rank runs sample `first` with weight 0, so that all
    ranks take part in every collective.
    """
    parts = np.array_split(np.arange(first, first + count), ranks * accumulate)
    mine = parts[rank * accumulate : (rank + 1) * accumulate]
    return [(part, 1.0) if len(part) else (np.array([first]), 0.0) for part in mine]


def optimizer_step(
    config: TrainConfig,
    source: Source,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    count: int,
    rank: int,
    ranks: int,
    logged: bool = True,
) -> dict:
    """Take one step on samples first..first+count-1; gives this rank's sums for `log_line`, on the device.

    The losses are sums over what counts (unpadded action terms; samples with a counted future), divided by
    that count over the whole step, all ranks and micro batches: ranks and accumulation change nothing but
    the order of a sum.
    """
    micro = [
        (source.batch(numbers), weight)
        for numbers, weight in shares(first, count, rank, ranks, config.accumulate)
    ]
    counts = sum_over_ranks(sum(weight * count_terms(source, batch) for batch, weight in micro))
    optimizer.zero_grad(set_to_none=True)
    winners = []
    # sums of action loss, world loss and world cosine, and memory rows that are not finite
    logs = torch.zeros(4, device=source.device)
    for i, (batch, weight) in enumerate(micro):
        last = i == len(micro) - 1
        with nullcontext() if last or ranks == 1 else model.no_sync():
            out = model(*batch)
            action, _ = masked_mean(out["action"], batch[0]["is_pad"])
            loss = action / counts[0]
            zero = torch.zeros_like(action)
            sums = [action.detach(), zero, zero, out.get("bad_memory_rows", zero).float()]
            if "world" in out:
                world = torch.where(out["counted"], out["world"], 0).sum()
                loss = loss + config.lambda_world * world / counts[1].clamp(min=1)
                sums[1], sums[2] = world.detach(), out["world_cos"].mean(1).sum()
                winners.append(out["winner"])
            (loss * ranks * weight).backward()  # DDP averages over ranks; times `ranks` makes it the sum
        logs += weight * torch.stack(sums)
    norms = gradient_norms(source.arm) if logged else {}  # before they are clipped
    live = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(live, config.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor(config, first)
    # Gradients are the sum over ranks by now, so all ranks see the same norm and skip the same steps. The
    # fused kernel does the skipping (this is how GradScaler asks for it): no device waits for the host.
    bad = ~torch.isfinite(norm)
    optimizer.found_inf = bad.float()
    optimizer.step()
    facts = {"sums": logs, "counts": counts, "lr": optimizer.param_groups[0]["lr"], "bad": bad}
    facts |= {"winner": torch.cat(winners)} if winners else {}
    if logged:  # kept for `diagnose`; on other steps the batch and its graph go now
        facts |= {"norms": {"grad_norm": norm} | norms, "batch": batch, "predicted": out.get("predicted")}
    return facts


def count_terms(source: Source, batch: tuple) -> Tensor:
    """How many action terms and how many samples with a counted future a micro batch has, (2,) float64."""
    inputs, world, _, times = batch
    steps = (~inputs["is_pad"]).sum() * times.shape[1] * source.arm.policy.config.action_dim
    moving = torch.zeros((), device=source.device)
    if "valid" in world and source.arm.prophet is not None:
        moving = source.arm.counts(world).sum()
    return torch.stack([steps, moving]).double()


# ---- what is said ------------------------------------------------------------------------------------


def banner(
    config: TrainConfig, demos: Demos, arm: Arm, facts: dict, ranks: int, device: torch.device, start: str
) -> list[str]:
    """Lay out what a person wants to know before a run, in eight lines at most; `start` names the weights."""
    env, live, total = environment(), facts["params_trainable"], facts["params_total"]
    commit = (env["git"] or "unknown")[:10] + (" with changes" if env["git_dirty"] else "")
    versions = f"python {env['python']}, torch {torch.__version__}, numpy {env['versions']['numpy']}"
    flops = f"{facts['flops_per_sample'] / 1e9:.3g} GFLOP a sample"
    micro = -(-config.batch_size // (ranks * config.accumulate))
    most = "" if micro * ranks * config.accumulate == config.batch_size else "at most "
    tokens = f", tokens from {config.features}" if config.features else ""
    lines = [
        f"arm {facts['arm']}, seed {config.seed}, git {commit}; run folder {config.out}",
        f"device {env['device']} ({device.type}), {ranks} rank(s), {env['threads']} threads; {versions}",
        f"parameters {live:,} trainable of {total:,} (freeze {config.freeze}), in {facts['dtype']}; {flops}",
        f"effective batch {config.batch_size} = micro {most}{micro} x accumulation {config.accumulate} "
        f"x ranks {ranks}; {config.flow_draws} flow draw(s) a sample",
        f"budget {config.total_samples:,} samples at a peak rate of {config.lr:g}; a checkpoint every "
        f"{config.save_every:,} and {config.save_minutes:g} min",
        f"data {config.data}: {len(demos.first)} episodes, {len(demos):,} frames, fingerprint "
        f"{demos.fingerprint}{tokens}; statistics: {facts['statistics_of']}",
        f"checkpoint {start}, fingerprint {facts['weights_fingerprint']}",
    ]
    if config.sites:
        ahead, chunk = config.future * config.world_stride, arm.policy.config.n_action_steps
        back = (config.history - 1) * config.world_stride + config.world_clip - 1
        rate = facts["data_facts"]["control_hz"] or facts["data_facts"]["fps"] or CONTROL_HZ
        looks = f"looks {ahead / rate:.1f} s ahead, {back / rate:.1f} s back"
        lines.append(f"memory {config.mode}: {looks}; a chunk executes {chunk / rate:.1f} s, at {rate:g} Hz")
    return lines


def log_line(
    config: TrainConfig, arm: Arm, out: dict, progress: Progress, rate: float, ranks: int, facts: dict
) -> dict[str, float]:
    """Gather what is logged of a step; all ranks call it, since it sums over them."""
    *sums, bad_rows = sum_over_ranks(out["sums"].double()).tolist()
    terms, moving = out["counts"].clamp(min=1).tolist()
    action, world, cosine = sums[0] / terms, sums[1] / moving, sums[2] / moving
    line = {"samples": progress.samples, "step": progress.step, "action_loss": action, "loss": action}
    line |= {"lr": out["lr"], "bad_steps": progress.bad_steps}
    line |= {name: float(norm) for name, norm in out["norms"].items()} | {"samples_per_second": rate}
    mfu = utilisation(facts["flops_per_sample"], rate / ranks, device_name(), arm.policy.dtype)
    if mfu is not None:
        line["mfu"] = mfu
    if arm.prophet is not None:
        line |= {"world_loss": world, "world_cos": cosine, "loss": action + config.lambda_world * world}
    if arm.policy.fusion is not None:
        line |= {"bad_memory_rows": bad_rows} | arm.policy.fusion.gates() | diagnose(arm, out)
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
    found = {f"val_loss_{mode}": value for mode, value in zip(modes, (sums[:-1] / sums[-1]).tolist())}
    if arm.prophet is not None:
        cosine = torch.tensor(world_cosine(source, episodes[rank::ranks]), dtype=torch.float64)
        total, count = sum_over_ranks(cosine.to(source.device)).tolist()
        found["val_world_cos"] = total / max(1, count)
    return found


if __name__ == "__main__":
    run_program(main, TrainConfig, __doc__, Refused, OFTEN)
