"""What a run starts from: fresh weights, a language model, or a checkpoint, with or without memory.

Everything random is drawn from the seed, the policy first: arms of one seed share its initial weights.

    arm, processor = build_arm(config, demos, latents, frames)      # config: StartConfig
    pytest tests/test_train.py

Shapes: T history, K future, S side of a picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from arm import Arm, ArmConfig, Summary, load_arm, stored_config
from data import held_out, saved_partners
from files import LARGEST, Refused
from latents import tower, world
from latents.blocks import with_checks
from latents.encoders import open_backbone, resolved
from latents.tower import Features, load_with
from latents.world import Latents, cache_path, change_statistics, future_statistics, prepare
from model import SmolVLA, load_policy, start_from_vlm
from prophet import MemoryMode
from ranks import Together
from readers.demos import Demos, chosen_statistics
from readers.load import camera_names, find_data, load, remember_checks
from readers.selection import (
    DataConfig,
    camera_key,
    camera_name,
    choose_cameras,
    match_cameras,
    split_camera,
)
from smolvla import kernels
from smolvla.checkpoint import fresh_processor, read_cameras
from smolvla.config import PRESETS, PRETRAINED, RECIPES
from smolvla.fit import Fit
from smolvla.folders import find_folder
from smolvla.processor import Processor, Statistics, with_rename

DEMO = Path("data/demo")


@dataclass(frozen=True)
class StartConfig(ArmConfig, DataConfig):
    """Where a run starts: data, the arm, and the weights, statistics and seed that it is built on."""

    data: Path = DEMO
    """Demonstrations: a folder or file in LIBERO's HDF5 layout, a LeRobot v3 folder, or one's hub id. The
    default, where it is not there, is recorded first."""

    init: str = "tiny"
    """Where the policy starts: a preset's name (fresh weights), a checkpoint folder, or a hub id."""

    revision: str | None = None
    """Revision of the hub id, to pin it."""

    vlm: str | None = None
    """Folder or hub id of the language model. With a checkpoint: its sizes and tokenizer, instead of what the
    checkpoint names. With a preset: its weights too, and a fresh expert beside them."""

    statistics: Literal["data", "computed", "checkpoint"] = "data"
    """Whose statistics normalise states and actions: the data's, as lerobot's fine-tuning has it, computed
    where they come with none (`computed`: in any case), or those of the checkpoint that --init names."""

    stats_of: str | None = None
    """With --statistics checkpoint: data set whose statistics to use, where it holds those of several."""

    allow_missing: bool = False
    """Go on when tensors or statistics of a checkpoint are missing, or tensors unexpected."""

    memory: MemoryMode | None = None
    """Memory that the policy is trained with; default: pred, off with --fusion none."""

    freeze: Literal["expert", "vision", "none"] | None = None
    """What stays frozen: all but the expert (lerobot's default), only the vision tower, or nothing (default
    of --init tiny)."""

    world_stride: int | None = None
    """Control steps (1/20 s) between two world latents; default: the recipe's of --init."""

    world_camera: tuple[str, ...] = ()
    """Cameras that the world latents see, by the names that --cameras gives; several make one latent.
    Default: the data's first."""

    state_std_floor: float | None = None
    """Smallest deviation that --statistics data divides states by, metres or radians. A dimension that the
    demonstrations hardly use would otherwise be blown up: far outside of unit scale in a rollout. Default:
    the recipe's."""

    action_std_floor: float | None = None
    """The same for actions (full scale is 1): noise in an unused dimension would be a target too."""

    seed: int = 0
    """Seed of weights, data order and noise."""

    val_every: int = 0
    """Samples between two measurements on held-out episodes (held_out.py); 0: never, none are held out."""

    val_share: float = 0.1
    """Share of the episodes that are held out, where --val-every is set."""

    features: Path | None = None
    """Folder of the frozen tower's tokens for this --data, --init and --seed, as --prepare writes them: they
    stand in for the pictures, and none is decoded. Not with --blind, whose mean picture needs them."""

    cache: Path | None = None
    """Folder for what is computed once from the data and kept: world latents, CRCs of pictures. Default:
    beside the data or, where they are only to be read, data/cache/."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that tower, trunk and expert compute in; auto: bfloat16 on a GPU, and with --freeze none on a CPU
    that has instructions for it, else float32. What trains is held in float32 in any case, what is frozen in
    this type."""

    limits: ClassVar = {
        **dict.fromkeys(("state_std_floor", "action_std_floor"), (0, 1e6)),
        **{"seed": (0, 2**32 - 1), "val_every": (0, LARGEST), "val_share": (0, 1)},
    }

    def __post_init__(self) -> None:
        self.settle(RECIPES.get(self.init, PRETRAINED))
        if self.memory not in (None, "off") and not self.sites:
            raise Refused(
                f"--memory {self.memory} with --fusion none: there is no site for it; name one, as in "
                "--fusion late, or leave --memory out"
            )
        self.settle({"memory": "pred" if self.sites else "off"})
        if self.memory == "off" and self.sites:
            raise Refused(
                f"--memory off with --fusion {' '.join(self.sites)}: the site would never be used; train "
                "--fusion none, or --memory zero for its capacity alone"
            )
        super().__post_init__()
        DataConfig.__post_init__(self)
        if self.statistics == "checkpoint" and self.init in PRESETS:
            raise Refused(f"--statistics checkpoint with --init {self.init}: only a checkpoint has its own")
        if self.stats_of is not None and self.statistics != "checkpoint":
            raise Refused(
                f"--stats-of {self.stats_of} chooses among a checkpoint's statistics, the data's are used: "
                "add --statistics checkpoint, or leave it out"
            )
        if self.features is not None and self.freeze != "expert":
            raise Refused(
                f"--features with --freeze {self.freeze}: what makes the tokens would train, and theirs grow "
                "stale; use --freeze expert, or leave --features out"
            )
        if self.features is not None and self.blind:
            raise Refused("--features with --blind: the mean picture needs the pictures; leave one out")
        if self.sites and self.world_encoder == "siglip" and self.freeze == "none":
            raise Refused(
                "--world-encoder siglip with --freeze none: the tower would train, and its latents grow "
                "stale; use --freeze vision"
            )

    def settle(self, defaults: Mapping[str, object]) -> None:
        """Give fields that were left open these values."""
        for name, value in defaults.items():
            if getattr(self, name, value) is None:
                object.__setattr__(self, name, value)

    def without(self, demos: Demos) -> StartConfig:
        """The same, with the episodes named that are held out: nothing is fitted on them."""
        out = held_out(demos, self.val_share).tolist() if self.val_every else ()
        return dataclasses.replace(self, held_out=tuple(out))

    def precision(self, device: torch.device) -> torch.dtype:
        """The type to compute in on a device."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        native = self.freeze == "none" and kernels.native_bfloat16()
        return torch.bfloat16 if device.type == "cuda" or native else torch.float32


# ---- data and what is kept beside them ----------------------------------------------------------------


def record_demo(config: StartConfig, rank: int, together: Together) -> None:
    """Record the demo's demonstrations, on the first rank, where there are none, or go on recording them.

    Raises Refused for a start that is not there: now, not after minutes of recording.
    """
    unfinished = [path for path in DEMO.glob("*.parts") if not path.with_suffix(".hdf5").is_file()]
    if not together.gather(bool(unfinished) or not any(DEMO.glob("[!.]*")))[0]:
        return
    check_init(config)
    if config.init not in PRESETS:
        find_folder(config.init, config.revision)
    if config.vlm is not None:
        find_folder(config.vlm)
    if rank == 0:
        from simulator import record  # imports HDF5

        what = "is not finished: going on with" if unfinished else "is not there: recording"
        print(f"{DEMO} {what} the demo's demonstrations first", flush=True)
        record.run(record.DemoConfig(out=DEMO))
    together.gather(None)


def make_caches(config: StartConfig, rank: int, ranks: int, device: torch.device) -> list[str]:
    """Make what this training reads beside the data, or check it, all ranks together; a line for each."""
    folder, lines = find_data(config.data, config), []
    config = settle_cameras(config, folder, config.init)
    demos = load(folder, in_memory=False, options=config)
    config = config.without(demos)
    if config.sites:
        backbone = open_backbone(config, own_policy(config, demos))
        if backbone is not None:
            backbone.device = device
        home, resolved_config = (
            config.cache_home(folder, config.cache, writes=True),
            resolved(config, backbone),
        )
        lines += filter(None, [world.scaled(demos, resolved_config)])
        lines.append(world.write(home, demos, resolved_config, backbone, rank, ranks))
    if config.features is not None:
        policy, processor = start_policy(config, demos)
        tower.freeze(policy, demos, config.precision(device), device)
        lines.append(tower.write(config.features, policy, processor, demos, rank, ranks))
    return lines or ["nothing to prepare: this training reads the data alone"]


def open_data(
    config: StartConfig, last: Path | None, rank: int, ranks: int, say: Callable[[str], None]
) -> tuple[StartConfig, Demos, Features | None, Latents | None]:
    """Read what is trained on; ranks share the work of a cache of world latents where there is none.

    Returns the configuration with what the world encoder's model settles, and the demonstrations, their
    features and their latents.
    """
    folder = find_data(config.data, config)
    config = settle_cameras(config, folder, config.init if last is None else str(last))
    home = config.cache_home(folder, config.cache, writes=True)
    if config.val_every:
        config = config.without(load(folder, in_memory=False, options=config))
    writes = config.sites and config.world_encoder == "pca" and not cache_path(home, config).exists()
    if config.features is not None and writes:
        say("there are no world latents yet: pictures are read once, to make them")
    demos, features = load_with(config.features, folder, bool(writes), config)
    backbone = None  # of the world latents
    if config.sites:
        start = {} if last is None else {"init": str(last), "revision": None, "stats_of": None}
        backbone = open_backbone(config, own_policy(dataclasses.replace(config, **start), demos))
        config = resolved(config, backbone)
        if line := world.scaled(demos, config):
            say(line)
    if features is None:
        demos = remember_checks(demos, home, lambda data: with_checks(data, rank, ranks), writes=rank == 0)
    latents = prepare(home, demos, config, backbone, rank, ranks) if config.sites else None
    return config, demos, features, latents


def settle_cameras(config: StartConfig, folder: Path, start: str) -> StartConfig:
    """Give the data's cameras the names of the checkpoint that a run starts from, or goes on from.

    Raises Refused, with the flag to type, where nobody says which is which.
    """
    there = camera_names(folder)
    if config.init in PRESETS and not config.cameras and any(camera_name(name) != name for name in there):
        full = tuple(f"{camera_name(name)}={name}" for name in there)  # as lerobot and LIBERO name them
        config = dataclasses.replace(config, cameras=full)
    names = choose_cameras(config.cameras, None) or {}
    check_init(config)
    if config.init not in PRESETS:
        known, renames = read_cameras(start, config.revision if start == config.init else None)
        besides = config.latent_cameras if config.sites else ()
        cameras = match_cameras(known, renames, there, config.cameras, besides)
        config, names = dataclasses.replace(config, cameras=cameras), dict(map(split_camera, cameras))
    new = {camera_key(old, there): name for name, old in names.items()}
    if len(new) < len(names):
        raise Refused(
            f"--cameras {' '.join(config.cameras)} gives one camera two names: a rollout gives it only one"
        )
    if not config.world_camera and there:
        config = dataclasses.replace(config, world_camera=(next(iter(names), there[0]),))
    pairs = zip(config.world_camera, config.latent_cameras, strict=True)
    world = tuple(asked if name in names else new.get(name, asked) for asked, name in pairs)
    return dataclasses.replace(config, world_camera=world)


# ---- the arm ------------------------------------------------------------------------------------------


def check_init(config: StartConfig) -> None:
    """Raise Refused for a start that is neither a preset, nor a folder, nor a name that a hub could know."""
    if config.init not in PRESETS and "/" not in config.init and not Path(config.init).is_dir():
        raise Refused(
            f"--init {config.init} is no preset ({', '.join(PRESETS)}), no folder and no hub id "
            "(owner/name): name one"
        )


def check_trunk(config: StartConfig) -> None:
    """Raise Refused for a head that would learn on a trunk that is random and stays so."""
    if config.init in PRESETS and config.freeze == "expert" and config.vlm is None:
        raise Refused(
            f"--init {config.init} --freeze expert: all but the expert stays random; leave --freeze out, "
            "or start from a checkpoint or a --vlm"
        )


def build_arm(
    config: StartConfig, demos: Demos, latents: Latents | None, frames: np.ndarray
) -> tuple[Arm, Processor]:
    """Build the arm at its start; arms of one seed share the policy's initial weights."""
    stored = None if config.init in PRESETS else stored_config(Path(config.init))
    if stored is not None and stored.sites:
        return continue_arm(config, stored, demos)
    policy, processor = build_policy(config, demos)
    images = {}
    if config.blind:
        images = {name: mean_image(demos, name) for name in policy.config.given_cameras}
    summary, encoder = Summary.none(config), None
    if latents is not None:
        ahead = demos, latents.z, config.future, config.world_stride
        scale, mean = change_statistics(*ahead, config.delta, frames)
        partners = saved_partners(demos, latents.z, config.history, config.world_stride, frames)
        summary = Summary(scale, mean, *partners, *future_statistics(*ahead, frames))
        encoder = latents.encoder
    torch.manual_seed(keyed_seed(config.seed, "memory"))
    return Arm(arm_config(config), policy, encoder, summary, images), processor


def continue_arm(config: StartConfig, stored: ArmConfig, demos: Demos) -> tuple[Arm, Processor]:
    """Go on from an arm's checkpoint, memory modules included; Refused where it is built another way."""
    for field in dataclasses.fields(ArmConfig):
        there, asked = getattr(stored, field.name), getattr(config, field.name)
        if field.name not in ArmConfig.free_to_change and there != asked:
            raise Refused(
                f"--init {config.init} was trained with {field.name} {there!r}, not {asked!r}: ask for the "
                "same, or start from a checkpoint without memory"
            )
    if stored.has_prophet != config.has_prophet:
        raise Refused(
            f"--init {config.init} was trained with --memory {stored.memory}, --memory {config.memory} "
            f"{'needs a prophet that it lacks' if config.has_prophet else 'would drop its prophet'}"
        )
    arm, processor = load_arm(config.init, config.world_model, **how_to_load(config, demos))
    arm.config = arm_config(config)
    return arm, processor


def keyed_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose of a run: no purpose of one seed meets another seed's."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:4], "big")


def start_policy(config: StartConfig, demos: Demos) -> tuple[SmolVLA, Processor]:
    """Build the policy that a run starts from; its draws leave the caller's generator alone."""
    with torch.random.fork_rng(devices=[]):
        return build_policy(config, demos)


def own_policy(config: StartConfig, demos: Demos) -> SmolVLA | None:
    """Build the policy that a run starts from, where the world latents are its tower's; else None."""
    return start_policy(config, demos)[0] if config.world_encoder == "siglip" else None


def build_policy(config: StartConfig, demos: Demos) -> tuple[SmolVLA, Processor]:
    """A fresh preset with statistics and tokenizer from the data, or on a language model; or a checkpoint."""
    torch.manual_seed(keyed_seed(config.seed, "policy"))
    if config.init not in PRESETS:
        return load_policy(config.init, **how_to_load(config, demos))
    widths = {"state_dim": demos.state.shape[1], "action_dim": demos.action.shape[1]}
    preset = dataclasses.replace(PRESETS[config.init], cameras=tuple(demos.images), **widths)
    shapes = {name: (3, *pictures.shape[1:3]) for name, pictures in demos.images.items()}
    stats = data_statistics(config, demos)
    if config.vlm is not None:
        policy, processor = start_from_vlm(preset, config.vlm, stats, shapes)
    else:
        processor = fresh_processor(preset, stats, demos.tasks, shapes)
        policy = SmolVLA(preset).initialise()
    processor.before = with_rename(processor.before, demos.renamed)
    return policy, processor


def how_to_load(config: StartConfig, demos: Demos) -> dict[str, Any]:
    """Say to `load_policy` how the checkpoint is meant, and what it is brought to: the data's cameras (found
    by `settle_cameras`), widths and, but with --statistics checkpoint, statistics."""
    known, _ = read_cameras(config.init, config.revision)
    cameras = {name: (3, *demos.images[name].shape[1:3]) for name in known if name in demos.images}
    stats = data_statistics(config, demos) if config.statistics != "checkpoint" else None
    fit = Fit(cameras, demos.state.shape[1], demos.action.shape[1], demos.renamed, stats)
    names = ("revision", "vlm", "stats_of", "allow_missing")
    return {name: getattr(config, name) for name in names} | {"fit": fit}


def trained_on(config: StartConfig, demos: Demos) -> Demos:
    """The data without what is held out of training."""
    return (
        demos.only(np.setdiff1d(np.arange(len(demos.first)), config.held_out)) if config.held_out else demos
    )


def data_statistics(config: StartConfig, demos: Demos) -> Statistics:
    """The data's statistics, with the floors that the configuration asks for."""
    stats, _ = chosen_statistics(trained_on(config, demos), config.statistics == "computed")
    floors = {"observation.state": config.state_std_floor, "action": config.action_std_floor}
    for feature, floor in floors.items():
        stats[feature]["std"] = stats[feature]["std"].clamp(min=floor)
    return stats


def whose_statistics(config: StartConfig, demos: Demos) -> str:
    """Say whose statistics a run uses, for its banner and its record."""
    if config.statistics != "checkpoint":
        found = chosen_statistics(trained_on(config, demos), config.statistics == "computed")[1]
        floors = config.state_std_floor, config.action_std_floor
        least = f", deviations of at least {floors[0]:g} (state) and {floors[1]:g} (action)"
        return f"the data's, {found}" + least * any(floors)
    return f"the checkpoint's, of {config.stats_of or config.init}"


def arm_config(config: StartConfig) -> ArmConfig:
    """The part of the configuration that stays with a checkpoint."""
    return ArmConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ArmConfig)})


def mean_image(demos: Demos, camera: str) -> Tensor:
    """The data set's mean picture of a camera, (3, S, S) uint8."""
    mean = demos.mean_picture(camera).round().astype(np.uint8)
    return torch.from_numpy(mean).permute(2, 0, 1).contiguous()  # (S, S, 3) -> (3, S, S)
