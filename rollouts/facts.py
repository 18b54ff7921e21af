"""What checkpoint, training data and environment say of themselves, for conform.py to compare.

Each is described in the same terms, as JSON-ready facts: cameras, widths, moments, rates, instructions,
drawing. Pictures are described by sketches: 8 x 8 mean colours of first frames, a few hundred bytes a scene.
train.py keeps the data's facts in its config.json, so that a rollout needs no data.

    python -c "import data, facts; print(facts.describe_data(data.load('tests/lerobot_v3/L_image/dataset')))"
    pytest tests/rollouts/test_conform.py

Shapes: E episodes, H and W a picture's sides.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from readers.demos import Demos, statistics
from simulator.env import CAMERAS, CONTROL_HZ, SimConfig, task_instructions, versions
from simulator.pool import Observation
from smolvla.config import SmolVLAConfig
from smolvla.processor import ACTION, STATE, Processor, rename_map

SKETCH, FRAMES, SCENES = 8, 16, 10  # a sketch's side; frames decoded a camera; sketches kept a camera
GRIP = 8  # control steps in which fingers answer a command
INSTRUCTIONS = 100  # more are not kept
LAYOUT = "position 3, axis-angle 3, gripper 2"
STATE_DIM, ACTION_DIM = 8, 7
# Standard deviations between the two values that a way of normalising takes to -1 and 1; for MIN_MAX a guess.
SPREAD = {"MIN_MAX": 4.0, "QUANTILES": 4.65, "QUANTILE10": 2.56}


@dataclass(frozen=True)
class Facts:
    """What one side says of itself; what it does not say is None or empty."""

    cameras: dict[str, list[int] | None]
    """Camera -> height and width of its pictures."""
    state: dict[str, Any]
    """`width`; where known `mean`, `std`, `min`, `max` (lists), `mode`, `layout`, an episode's `first`."""
    action: dict[str, Any]
    """The same; of data, where the fingers show it, the sign of the command that `closes` the gripper."""
    sketches: dict[str, list[str]] = field(default_factory=dict)
    """Camera -> sketches of first frames, one a task, in base64."""
    tasks: list[str] | None = None
    """Instructions."""
    suites: list[str] = field(default_factory=list)
    task_ids: list[int] = field(default_factory=list)
    draw: list[str] = field(default_factory=list)
    """Ways of drawing, by SimConfig's names."""
    srgb: bool | None = None
    """Whether textures' sRGB marks were honoured, which makes LIBERO's floor darker."""
    control_hz: float | None = None
    fps: float | None = None
    """A data set's label for its rate."""
    noops: float | None = None
    """Share of the frames whose action does nothing."""
    n_action_steps: int | None = None
    chunk: int | None = None
    absent: int = 0
    """Cameras that may be missing: black pictures stand in."""
    rename: dict[str, str] = field(default_factory=dict)
    """Names that cameras get on their way into the policy."""
    about: dict[str, Any] = field(default_factory=dict)
    """Counts and a fingerprint, compared with nothing."""

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Facts:
        """Take facts from JSON, where another version may know others."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})

    def renamed(self, names: dict[str, str]) -> Facts:
        """Return the same facts with cameras under the policy's names."""
        cameras, sketches = (
            {names.get(name, name): value for name, value in table.items()}
            for table in (self.cameras, self.sketches)
        )
        return dataclasses.replace(self, cameras=cameras, sketches=sketches)


# ---- data ---------------------------------------------------------------------------------------------


def describe_data(demos: Demos, pictures: bool = True) -> dict[str, Any]:
    """Say what training data look like, in a few kB of JSON; at most `FRAMES` pictures a camera are read.

    Args: pictures, whether any may be: a run from features decodes none.
    """
    records, values, tasks = demos.provenance, statistics(demos), np.unique(demos.task)
    libero = all("init_state_ids" in record for record in records)  # in LIBERO's own HDF5 layout
    facts = Facts(
        cameras={name: list(images.shape[1:3]) for name, images in demos.images.items()},
        state=moments(values[STATE]) | ({"layout": LAYOUT} if libero else {}),
        action=moments(values[ACTION]) | gripper(demos),
        sketches=sketch_scenes(demos) if pictures else {},
        tasks=[demos.tasks[i] for i in tasks] if len(tasks) <= INSTRUCTIONS else None,
        control_hz=single(record.get("control_hz") for record in records),
        fps=single(record.get("fps") for record in records),
        noops=round(float(demos.noops.mean()), 4) if demos.action.shape[1] == ACTION_DIM else None,
        about={
            "episodes": len(demos.first),
            "frames": len(demos),
            "light_fingerprint": demos.light_fingerprint,
        },
        **recorded(records),
    )
    return dataclasses.asdict(facts)


def gripper(demos: Demos) -> dict[str, int]:
    """Say which sign of the gripper's command `closes` it, by what the fingers do after it changes.

    Empty where states and actions are not LIBERO's in width, where it never changes, and where they disagree.
    """
    if (demos.state.shape[1], demos.action.shape[1]) != (STATE_DIM, ACTION_DIM):
        return {}
    sign, width = np.sign(demos.action[:, 6]), demos.state[:, 6] - demos.state[:, 7]
    changes = 1 + np.flatnonzero((sign[1:] * sign[:-1] < 0) & (np.diff(demos.episode) == 0))
    after = np.minimum(changes + GRIP, demos.last[demos.episode[changes]])
    moved = sign[changes] * (width[after] - width[changes])  # positive: what is positive opens
    if not np.abs(moved).sum() > 0 or abs(share := moved.sum() / np.abs(moved).sum()) < 0.5:
        return {}
    return {"closes": -int(np.sign(share))}


def recorded(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say what provenance knows of suites, tasks and drawing; of drawing, what our recordings say."""
    ours = [record for record in records if record.get("draw")]
    marks = (
        honours_srgb((record.get("versions") or {}).get("mujoco", ""), record.get("texture_colorspace"))
        for record in ours
    )
    return {
        "suites": sorted({r["suite"] for r in records if r.get("suite")}),
        "task_ids": sorted({r["task_id"] for r in records if r.get("task_id") is not None}),
        "draw": sorted({r["draw"] for r in ours}),
        "srgb": single(marks),
    }


def sketch_scenes(demos: Demos) -> dict[str, list[str]]:
    """Sketch the first frames of up to `SCENES` tasks, evenly chosen, each the mean of some episodes'.

    One mean over all tasks would do for suites that share one scene, and fits nothing where they do not.
    """
    begins = demos.task[demos.first]
    tasks = evenly(np.unique(begins), SCENES)
    episodes = [evenly(np.flatnonzero(begins == task), FRAMES // len(tasks)) for task in tasks]
    rows = [demos.first[chosen] for chosen in episodes]
    return {
        name: [pack(np.mean([sketch(picture) for picture in images[row]], axis=0)) for row in rows]
        for name, images in demos.images.items()
    }


def evenly(values: np.ndarray, count: int) -> np.ndarray:
    """Choose up to `count` of sorted values, evenly spaced."""
    return values[np.unique(np.linspace(0, len(values) - 1, count).round().astype(np.int64))]


def sketch(picture: np.ndarray) -> np.ndarray:
    """Shrink a picture (H, W, 3) uint8 to its mean colours (8, 8, 3) float64."""
    small = Image.fromarray(np.ascontiguousarray(picture)).resize((SKETCH, SKETCH), Image.Resampling.BOX)
    return np.asarray(small, np.float64)


def pack(colours: np.ndarray) -> str:
    """Write a sketch as text."""
    return base64.b64encode(colours.round().astype(np.uint8).tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    """Read a sketch (8, 8, 3) float64."""
    colours = np.frombuffer(base64.b64decode(text), np.uint8)
    return colours.reshape(SKETCH, SKETCH, 3).astype(np.float64)


# ---- checkpoint ---------------------------------------------------------------------------------------


def describe_checkpoint(config: SmolVLAConfig, processor: Processor, run: dict[str, Any]) -> Facts:
    """Say what a checkpoint expects; run: its run folder's config.json, {} of a published checkpoint."""
    inputs, records = processor.raw["input_features"], run.get("data_provenance") or []
    named = config.given_cameras
    shapes = {name: inputs.get(name, {}).get("shape") for name in named}
    size = single(record.get("size") for record in records)  # config.json's may be of an earlier training
    return Facts(
        cameras={n: [size] * 2 if size else shape and list(shape[-2:]) for n, shape in shapes.items()},
        state={"width": config.state_dim} | normalisation(processor, STATE, processor.stats),
        action={"width": config.action_dim} | normalisation(processor, ACTION, processor.stats_after),
        noops=(run.get("data_facts") or {}).get("noops"),
        n_action_steps=config.n_action_steps,
        chunk=config.chunk_size,
        absent=max(0, config.empty_cameras - (len(config.cameras) - len(named))),
        rename=rename_map(processor.before),
        **recorded(records),
    )


def normalisation(processor: Processor, feature: str, stats: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """Say how a feature is normalised, and what moments its statistics state or imply."""
    mode, names = processor.mode(feature), processor.used(feature, stats)
    if not names:
        return {"mode": mode}
    found = {"mode": mode} | moments(stats[feature])
    if mode != "MEAN_STD":
        low, high = (stats[feature][name].double() for name in names)
        found |= {"mean": listed((low + high) / 2), "std": listed((high - low) / SPREAD[mode])}
    return found


def moments(stats: dict[str, Tensor]) -> dict[str, Any]:
    """Return width, mean, std, min and max, where they are there and finite."""
    names = [n for n in ("mean", "std", "min", "max") if n in stats and stats[n].isfinite().all()]
    width = {"width": len(stats[names[0]])} if names else {}
    return width | {name: listed(stats[name]) for name in names}


def listed(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.double().tolist()]


# ---- environment --------------------------------------------------------------------------------------


def describe_environment(
    plan_sim: SimConfig, n_action_steps: int, observation: Observation | None = None
) -> Facts:
    """Say what a rollout will meet: the simulator's constants, and what a first observation shows.

    Raises Refused where LIBERO, which knows the suite's instructions, isn't installed.
    """
    frames = {} if observation is None else {c: f for (at, c), f in observation.frames.items() if at == 0}
    first = {} if observation is None else {"first": [float(x) for x in observation.state]}
    ambiguous = plan_sim.either and observation is not None  # another instruction than any of the suite's
    instructions = [observation.language] if ambiguous else sorted(task_instructions(plan_sim.suite))
    return Facts(
        cameras={name: [plan_sim.size] * 2 for name in CAMERAS}
        | {name: list(frame.shape[:2]) for name, frame in frames.items()},
        state={"width": STATE_DIM, "layout": LAYOUT} | first,
        action={"width": ACTION_DIM, "layout": "relative, in [-1, 1]"},
        sketches={name: [pack(sketch(frame))] for name, frame in frames.items()},
        tasks=instructions,
        suites=[plan_sim.suite],
        draw=[plan_sim.draw],
        srgb=honours_srgb(versions()["mujoco"], plan_sim.texture_colorspace),
        control_hz=CONTROL_HZ,
        n_action_steps=n_action_steps,
    )


def honours_srgb(mujoco: str, texture_colorspace: str | None) -> bool | None:
    """Say whether textures are read by their sRGB marks: MuJoCo 3.3.3 and later do, unless set back."""
    if texture_colorspace == "linear":
        return False
    parts = mujoco.split(".")[:3]
    return tuple(map(int, parts)) >= (3, 3, 3) if all(part.isdecimal() for part in parts) else None


def single(values: Iterable[Any]) -> Any:
    """Return the one value that all share, or None."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else None
