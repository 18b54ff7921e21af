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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import cpu
from arm import Arm, ArmConfig, Summary, load_arm, stored_config
from checkpoint import fresh_processor, load_policy, start_from_vlm
from config import PRESETS
from data import Demos, chosen_statistics, in_files, remember_checks
from diagnostics import (
    CollapseWatch,
    Usage,
    attention_diagnostics,
    memory_norm,
    world_diagnostics,
)
from encoders import open_backbone, resolved
from features import load_with
from files import read_json
from loader import Loader
from model import SmolVLA
from offline import measure
from optimise import make_optimizer, optimizer_step, shares, sum_over_ranks
from processor import Processor
from runs import check_space, cut_metrics, log, log_validation, open_run, save
from selection import DataConfig, find_data
from source import Source, held_out, saved_partners
from world import Latents, cache_path, change_statistics, own_policy, prepare

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
    """Samples between two measurements on held-out episodes (offline.py); 0: never, and none are held out."""

    val_share: float = 0.1
    """Share of the episodes that are held out, where --val-every is set."""

    log_every: int = 20
    """Optimiser steps between two log lines."""

    save_every: int = 50_000
    """Samples between two checkpoints; the last one is always written."""

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
        for flag in ("total_samples", "batch_size", "accumulate", "flow_draws", "log_every", "save_every"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)} must be at least 1")
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
        """Fields that may change when a run is resumed."""
        return (
            "out", "data", "pictures", "workers", "features", "log_every", "save_every", "compile", "threads",
            "accumulate", "world_model",
        )  # fmt: skip

    def precision(self, device: torch.device) -> torch.dtype:
        """The type to compute in on a device."""
        auto = "bfloat16" if device.type == "cuda" else "float32"
        return getattr(torch, auto if self.dtype == "auto" else self.dtype)


# ---- ranks --------------------------------------------------------------------------------------------


def start_ranks() -> tuple[int, int, torch.device]:
    """Join torchrun's process group where there is one: rank, number of ranks, this rank's device."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


# ---- arm --------------------------------------------------------------------------------------------


def build_arm(
    config: TrainConfig, demos: Demos, latents: Latents | None, frames: np.ndarray
) -> tuple[Arm, Processor]:
    """Build the arm at its start; arms of one seed share the policy's initial weights."""
    stored = None if config.init in PRESETS else stored_config(Path(config.init))
    if stored is not None and stored.sites:
        return continue_arm(config, stored)
    policy, processor = build_policy(config, demos)
    images = {}
    if config.blind:
        images = {name: mean_image(demos, name) for name in policy.config.cameras}
    summary, encoder = Summary.none(config), None
    if latents is not None:
        scale, mean = change_statistics(demos, latents.z, config.future, config.world_stride, config.delta)
        partners = saved_partners(demos, latents.z, config.history, config.world_stride, frames)
        summary, encoder = Summary(scale, mean, partners), latents.encoder
    torch.manual_seed(config.seed + 1)
    return Arm(arm_config(config), policy, encoder, summary, images), processor


def continue_arm(config: TrainConfig, stored: ArmConfig) -> tuple[Arm, Processor]:
    """Go on from an arm's checkpoint, memory modules included; ValueError where it is built another way."""
    for field in dataclasses.fields(ArmConfig):
        there, asked = getattr(stored, field.name), getattr(config, field.name)
        if field.name not in ArmConfig.free_to_change and there != asked:
            raise ValueError(
                f"--init {config.init} was trained with {field.name} {there!r}, not {asked!r}: ask for the "
                "same, or start from a checkpoint without memory"
            )
    if stored.has_prophet != config.has_prophet:
        raise ValueError(
            f"--init {config.init} was trained with --memory {stored.memory}, --memory {config.memory} "
            f"{'needs a prophet that it lacks' if config.has_prophet else 'would drop its prophet'}"
        )
    how = {"vlm": config.vlm, "allow_missing": config.allow_missing}
    arm, processor = load_arm(config.init, config.world_model, **how)
    arm.config = arm_config(config)
    return arm, processor


def build_policy(config: TrainConfig, demos: Demos) -> tuple[SmolVLA, Processor]:
    """A fresh preset with statistics and tokenizer from the data, or on a language model; or a checkpoint."""
    torch.manual_seed(config.seed)
    if config.init not in PRESETS:
        return load_policy(config.init, config.revision, config.vlm, config.stats_of, config.allow_missing)
    widths = {"state_dim": demos.state.shape[1], "action_dim": demos.action.shape[1]}
    preset = dataclasses.replace(PRESETS[config.init], cameras=tuple(demos.images), **widths)
    size = next(iter(demos.images.values())).shape[1]
    stats, _ = chosen_statistics(demos)
    floors = {"observation.state": config.state_std_floor, "action": config.action_std_floor}
    for feature, floor in floors.items():
        stats[feature]["std"] = stats[feature]["std"].clamp(min=floor)
    if config.vlm is not None:
        return start_from_vlm(preset, config.vlm, stats, (3, size, size))
    processor = fresh_processor(preset, stats, demos.tasks, (3, size, size))
    return SmolVLA(preset).initialise(), processor


def make_fast(config: TrainConfig, arm: Arm, device: torch.device) -> None:
    """Hold and compute the policy in the wanted type, and take the device's fast path."""
    arm.policy.set_dtype(config.precision(device))
    if config.compile:
        arm.policy.compile_blocks()
    elif device.type == "cpu":
        cpu.keep_memory()
        cpu.speed_up(arm.policy, arm.policy.dtype)


def arm_config(config: TrainConfig) -> ArmConfig:
    """The part of the configuration that stays with a checkpoint."""
    return ArmConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ArmConfig)})


def mean_image(demos: Demos, camera: str) -> Tensor:
    """The data set's mean picture of a camera, (3, S, S) uint8."""
    mean = demos.mean_picture(camera).round().astype(np.uint8)
    return torch.from_numpy(mean).permute(2, 0, 1).contiguous()  # (S, S, 3) -> (3, S, S)


# ---- main ---------------------------------------------------------------------------------------------


def main(config: TrainConfig) -> None:
    """Train from the start, or from the run folder's last checkpoint, to the end of the budget."""
    rank, ranks, device = start_ranks()
    say = print if rank == 0 else lambda *_: None
    if config.threads:
        torch.set_num_threads(config.threads)

    # data
    resumed = (config.out / "last" / "state.json").is_file()
    folder = find_data(config.data, config.data_revision)
    home = config.cache_home(folder)
    writes = config.sites and config.world_encoder == "pca" and not cache_path(home, config).exists()
    if config.features is not None and writes:
        say("there are no world latents yet: pictures are read once, to make them")
    demos, features = load_with(config.features, folder, bool(writes), config)
    backbone = None  # of the world latents
    if config.sites:
        last = {"init": str(config.out / "last"), "stats_of": None} if resumed else {}
        backbone = open_backbone(config, own_policy(dataclasses.replace(config, **last), demos))
        config = resolved(config, backbone)
    if rank and ranks > 1:
        dist.barrier()  # the first rank writes the cache, the others find it
    if features is None:
        demos = remember_checks(demos, home)
    latents = prepare(home, demos, config, backbone) if config.sites else None
    if rank == 0 and ranks > 1:
        dist.barrier()

    out_episodes = held_out(demos, config.val_share) if config.val_every else np.empty(0, np.int64)
    frames = np.flatnonzero(~np.isin(demos.episode, out_episodes))

    # arm, at its start or at the last checkpoint
    done = step = 0
    if resumed:
        arm, processor = load_arm(config.out / "last", config.world_model, allow_missing=config.allow_missing)
        state = read_json(config.out / "last" / "state.json")
        done, step = state["samples"], state["step"]
    else:
        arm, processor = build_arm(config, demos, latents, frames)
    if latents is not None:
        latents = latents.under(arm.encoder, demos)  # of a checkpoint that was trained on other data
    arm.policy.freeze(config.freeze, processor.raw["train_state_proj"])
    arm.to(device).train()
    processor.pad_to = processor.longest(demos.tasks)  # one length for all batches
    make_fast(config, arm, device)
    if features is not None:
        features.check_policy(arm.policy)
    live = sum(p.numel() for p in arm.parameters() if p.requires_grad)
    total = sum(p.numel() for p in arm.parameters())
    facts = {
        "arm": config.arm_name,
        "data_fingerprint": demos.fingerprint,
        "data_provenance": demos.provenance,
        "feature_cache": None if features is None else features.facts,
        "held_out": out_episodes.tolist(),
        "params_total": total,
        "params_trainable": live,
        "dtype": str(arm.policy.dtype).removeprefix("torch."),
    }
    if rank == 0:
        open_run(config, facts)
        check_space(config.out, arm)  # now rather than after the first hours
        cut_metrics(config.out / "metrics.jsonl", done)
    optimizer = make_optimizer(config, arm)
    if resumed:
        optimizer.load_state_dict(
            torch.load(config.out / "last" / "optimizer.pt", weights_only=True, map_location=device)
        )

    banner(config, demos, arm, facts, device, ranks, resumed, say)
    say(f"run folder {config.out}" + (f", resumed at {done:,} samples" if resumed else ""))
    if done >= config.total_samples:
        say("nothing to do: the budget is spent")
        return

    # loop
    loader = None
    if config.workers and features is None and in_files(demos):
        loader = Loader(demos, config.workers)
        demos = loader.demos
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
        loader=loader,
    )
    model = DistributedDataParallel(arm, gradient_as_bucket_view=True) if ranks > 1 else arm
    usage, watch = Usage(config.num_hypotheses, device), CollapseWatch()
    clock, since = time.perf_counter(), done
    while done < config.total_samples:
        count = min(config.batch_size, config.total_samples - done)
        finished = done + count >= config.total_samples
        expect(config, source, done, rank, ranks)
        logged = (step + 1) % config.log_every == 0 or finished
        out = optimizer_step(config, source, model, optimizer, done, count, rank, ranks, logged)
        step, done, before = step + 1, done + count, done
        if "winner" in out:
            usage.add(out["winner"])
        if logged:
            rate = (done - since) / (time.perf_counter() - clock)
            line = log_line(config, arm, out, step, done, rate) | usage.read()
            if rank == 0:
                log(config, line)
            if warning := watch.see(step, line):
                say(warning)
            clock, since = time.perf_counter(), done
        if config.val_every and (finished or done // config.val_every > before // config.val_every):
            line = {"samples": done, "step": step} | validate(source, out_episodes, rank, ranks)
            if rank == 0:
                log_validation(config, line)
        if rank == 0 and (finished or done // config.save_every > before // config.save_every):
            save(config, arm, processor, optimizer, done, step)
    if loader is not None:
        loader.close()
    say(f"done: {config.out / 'last'}")


def expect(config: TrainConfig, source: Source, done: int, rank: int, ranks: int) -> None:
    """Have the pictures of this step and the next ones decoded in the background."""
    for first in range(done, done + (1 + STEPS_AHEAD) * config.batch_size, config.batch_size):
        if (count := min(config.batch_size, config.total_samples - first)) > 0:
            for numbers, _ in shares(first, count, rank, ranks, config.accumulate):
                source.expect(numbers)


def banner(
    config: TrainConfig,
    demos: Demos,
    arm: Arm,
    facts: dict,
    device: torch.device,
    ranks: int,
    resumed: bool,
    say,
) -> None:
    """Print what a person wants to know before a run."""
    live, total, threads = facts["params_trainable"], facts["params_total"], torch.get_num_threads()
    say(f"arm {facts['arm']} on {device}, {ranks} rank(s), torch {torch.__version__}, {threads} threads")
    start = f"init {config.init}, freeze {config.freeze}, seed {config.seed}"
    say(f"{live:,} of {total:,} parameters train, in {facts['dtype']}; {start}")
    draws = f"{config.flow_draws} flow draw(s) each"
    say(f"budget {config.total_samples:,} samples in steps of {config.batch_size}, {draws}")
    episodes = f"{len(demos.first)} episodes, {len(demos):,} frames"
    tokens = f", tokens from {config.features}" if config.features else ""
    say(f"data {config.data}: {episodes}, fingerprint {demos.fingerprint}{tokens}")
    fresh = config.init in PRESETS and not resumed
    say(f"statistics: {chosen_statistics(demos)[1] if fresh else 'from the checkpoint'}")
    if len(config.sites) > 1:
        say(f"warning: {len(config.sites)} fusion sites at once: what helps is harder to attribute to one")
    if config.sites:
        ahead, chunk = config.future * config.world_stride, arm.policy.config.n_action_steps
        back = (config.history - 1) * config.world_stride + config.world_clip - 1
        looks = f"looks {ahead / 20:.1f} s ahead, {back / 20:.1f} s back"
        say(f"memory {config.mode}: {looks}; a chunk executes {chunk / 20:.1f} s")


def log_line(config: TrainConfig, arm: Arm, out: dict, step: int, done: int, rate: float) -> dict[str, float]:
    """Gather what is logged of a step; all ranks call it, since it sums over them."""
    counts = out["counts"][[0, 1, 1]].clamp(min=1)
    action, world, cosine = (sum_over_ranks(out["sums"].double()) / counts).tolist()
    line = {"samples": done, "step": step, "action_loss": action, "loss": action, "lr": out["lr"]}
    line |= {name: float(norm) for name, norm in out["norms"].items()} | {"samples_per_second": rate}
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
