"""What an evaluation rolls out: the checkpoint, the protocol, the starts, and where results go.

What the command line leaves open comes from what the training run recorded of its data, so that a policy
meets the pictures and objects that it was trained on; a checkpoint from elsewhere gets LIBERO as published.

    python eval.py runs/demo/E2-n40000-s0 --check     # the protocol, compared with checkpoint and data
    pytest tests/rollouts/test_plan.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from arm import Arm
from files import (
    NUMBER,
    Refused,
    check_numbers,
    naming,
    number_from_environment,
    parse_numbers,
    read_json,
    shape_of,
    write_json,
)
from readers.selection import plain_text
from rollouts.facts import Facts
from simulator.env import (
    NUM_INIT_STATES,
    NUM_TASKS,
    SCENES,
    STEP_LIMITS,
    SUITES,
    SimConfig,
    check_either,
    check_suite,
    check_task,
    scenes,
    task_instructions,
)
from smolvla.folders import find_folder, holds_weights

RECORDED = {
    **dict.fromkeys(("suite?", "either?"), str | None),  # draw, reset and colours are SimConfig's
    **dict.fromkeys(("task_id?", "size?"), int | None),
    **{
        "displace?": NUMBER | None,
        "init_state_ids?": ([int | None], type(None)),
        "versions?": ({str: str}, type(None)),
    },
}
# What a run records of itself, as far as an evaluation reads it.
RUN = {
    **{"fusion?": [str], "held_out?": [int], "data_provenance?": ([RECORDED], type(None))},
    **{"data?": str, "data_fingerprint?": str | None, "data_facts?": (shape_of(Facts), type(None))},
}


@dataclass(frozen=True)
class ProtocolConfig:
    """What is rolled out, from which starts, under which protocol."""

    checkpoint: Annotated[str | None, tyro.conf.Positional] = None
    """Run folder, checkpoint folder (lerobot's too), or hub id; default: the newest run under runs/."""

    revision: str | None = None
    """Revision of the hub id, to pin it."""

    out: Path | None = None
    """Folder that gets episodes.jsonl; default: the run folder, or runs/eval/NAME for a checkpoint without
    one."""

    cameras: tuple[str, ...] = ()
    """Which of LIBERO's cameras (image, image2) is which of the checkpoint's, where it does not say so:
    NAME=CAMERA, as in camera1=image camera2=image2; its others are left out. With --offline: the data's."""

    suite: tuple[str, ...] = ()
    """LIBERO suites, one after the other: spatial, object, goal, 10, 90; default: the training data's."""

    task_ids: str = ""
    """Tasks of each suite, as in 0,3,5-7; default: those of the training data, all where it has none."""

    episodes_per_task: int | None = number_from_environment("EPISODES", 0) or None
    """Episodes a task and mode; default: all init states that no demonstration started from."""

    init_states: str | None = None
    """Init states, such as 10-49 or 0,3,7; default: those that no demonstration started from."""

    displace: float | None = None
    """Largest displacement of the task's objects in metres; default: the training data's."""

    either: str | None = None
    """Objects of which either solves the task, as in cream_cheese,milk; default: the training data's."""

    draw: Literal["exact", "no-reflections", "fast"] | None = None
    """Drawing: as LIBERO draws, without reflections, or with decimated meshes too; default: the training
    data's, exact for a checkpoint from elsewhere."""

    texture_colorspace: Literal["as_installed", "linear"] | None = None
    """linear: textures as MuJoCo 3.3.2 draws them, under any version (`python -m simulator verify`)."""

    reset: Literal["hard", "soft"] | None = None
    """Resets between episodes; default: the training data's, hard for a checkpoint from elsewhere."""

    size: int | None = None
    """Side of the rendered pictures; default: the training data's."""

    n_action_steps: int | None = None
    """Actions executed of each chunk; default: the checkpoint's."""

    max_steps: str = "lerobot"
    """Step limit of an episode: a number, or whose protocol: lerobot, openpi (220 on spatial)."""

    seed: int = 7
    """Seed of the environments and of the policy's noise."""

    policy_batch: int = 1
    """Rows of every policy call, padded: part of the protocol, since it can change a float's last bits."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that tower, trunk and expert are held and computed in."""

    limits: ClassVar = {
        **dict.fromkeys(("episodes_per_task", "n_action_steps", "policy_batch"), (1, 10_000)),
        "seed": (0, 2**32 - 1),
    }

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.max_steps not in STEP_LIMITS and not self.max_steps.isdecimal():
            raise Refused(
                f"--max-steps {self.max_steps} is no limit: give a number, or {' or '.join(STEP_LIMITS)}"
            )
        for suite in self.suites:
            check_suite(suite)

    @property
    def suites(self) -> tuple[str, ...]:
        """The suites' full names."""
        return tuple(s if s.startswith("libero_") else f"libero_{s}" for s in self.suite)

    def step_limit(self, suite: str) -> int:
        """Steps after which an episode of a suite counts as failed."""
        limits = STEP_LIMITS.get(self.max_steps)
        return int(self.max_steps) if limits is None else limits[suite]


# ---- checkpoint and results ---------------------------------------------------------------------------


def newest_run(root: Path, sited: bool = False) -> Path:
    """Find the run folder under `root` whose checkpoint was written last, of those with a site if `sited`."""
    steps = [path for path in root.glob("**/step_*") if holds_weights(path) and path.suffix != ".part"]
    steps.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    runs = list(dict.fromkeys(step.parent for step in steps if (step.parent / "config.json").is_file()))
    if sited:
        sites = {run: read_json(run / "config.json", RUN).get("fusion", ["none"]) for run in runs}
        runs = [run for run in runs if sites[run] != ["none"]]
    if not runs:
        which = " with a memory site" if sited else ""
        raise Refused(
            f"no run{which} under {root}/: train one with `python train.py --fusion prefix_cross`, or name a "
            "checkpoint folder"
        )
    return runs[0]


@dataclass
class Target:
    """The checkpoint that is rolled out, and where its results go."""

    folder: Path  # the checkpoint's
    out: Path  # the run folder, or one made for a checkpoint without
    name: str  # what results call the checkpoint
    run: dict  # what its training run recorded of itself; empty for a checkpoint without
    weights: str = ""  # their fingerprint, once they are loaded


def find_target(config: ProtocolConfig, sited: bool = False) -> Target:
    """Find a run's last checkpoint, a run's named one, a bare checkpoint folder, or a hub id's files.

    Where none is named, the newest run's, of those with a site if `sited`. Raises Refused if there is none.
    """
    given = config.checkpoint or str(newest_run(Path("runs"), sited))
    path = Path(given)
    title = path.name if path.is_dir() else given.partition("@")[0].replace("/", "-")
    folder = find_folder(given, config.revision).resolve()
    if path.is_dir() and not holds_weights(folder):
        inside = sorted({str(step.parent) for step in path.glob("*/step_*")})
        if inside:
            raise Refused(f"{given} holds {len(inside)} runs, name one: {' '.join(inside)}")
        raise Refused(
            f"{given} is neither a run folder (with `last`, or lerobot's checkpoints/last) nor a checkpoint "
            "folder (with model.safetensors)"
        )
    record = folder.parent / "config.json"
    if record.is_file() and "arm" in (run := read_json(record, RUN)):
        return Target(folder, config.out or folder.parent, folder.name, run)
    return Target(folder, config.out or Path("runs/eval", title), folder.name, {})


def open_out(target: Target, arm: Arm) -> None:
    """Make a folder of its own for results, where it is asked for or the checkpoint is of no run of ours.

    Its config.json says of what, so that a report can read it. Raises Refused where it holds another's.
    """
    if target.run and target.out.resolve() == target.folder.parent:
        return
    record = target.run or {
        "arm": target.out.name, "seed": 0, "total_samples": None,
        "fusion": list(arm.config.sites) or ["none"], "memory": arm.config.memory,
        "blind": arm.config.blind, "data_fingerprint": None,
        "params_total": sum(p.numel() for p in arm.parameters()), "params_trainable": None,
    }  # fmt: skip
    source, path = str(target.folder.parent if target.run else target.folder), target.out / "config.json"
    there = read_json(path).get("results_of", "a training run") if path.is_file() else source
    if there != source:
        raise Refused(f"{target.out} holds results of {there}, not of {source}: choose another --out")
    with naming(target.out):
        target.out.mkdir(parents=True, exist_ok=True)
    write_json(path, record | {"results_of": source})


# ---- protocol and starts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The protocol and the starts of an evaluation."""

    sim: SimConfig
    starts: list[tuple[int, int]]  # (task id, init state)
    seen: set[tuple[int, int]]  # those that a demonstration of the training data started from
    n_action_steps: int
    policy_batch: int
    dtype: str = "float32"
    cameras: tuple[str, ...] = ()  # --cameras, where it was needed
    scenes: str = ""  # CRC of LIBERO's files, which every line has

    def __str__(self) -> str:
        """The protocol in a line."""
        sim, tasks = self.sim, sorted({task for task, _ in self.starts})
        what = f"tasks {','.join(map(str, tasks))}, {len(self.starts)} starts, at most {sim.max_steps} steps"
        moved = f", displaced by up to {100 * sim.displace:g} cm" if sim.displace else ""
        return f"{sim.suite}: {what}, {self.n_action_steps} actions a chunk, drawn {sim.draw}{moved}"

    @property
    def of_another_libero(self) -> bool:
        """Whether LIBERO's files are not the pinned package's: then it is another protocol."""
        return self.scenes not in ("", SCENES[self.sim.suite])

    def instructions(self) -> list[str]:
        """The instructions of its tasks, as LIBERO has them."""
        every = task_instructions(self.sim.suite)
        return [every[task] for task in sorted({task for task, _ in self.starts})]

    def record(self) -> dict:
        """The protocol, as it is stored with every result."""
        named = {"cameras": " ".join(sorted(self.cameras))} if self.cameras else {}
        named |= {"scenes": self.scenes} if self.of_another_libero else {}
        return self.sim.record() | named | {
            "n_action_steps": self.n_action_steps, "policy_batch": self.policy_batch, "dtype": self.dtype,
        }  # fmt: skip


def make_plans(config: ProtocolConfig, run: dict, arm: Arm) -> list[Plan]:
    """Fill what the command line leaves open from the run's training data, a plan a suite.

    Raises Refused where neither says a suite, or there are not enough init states.
    """
    data = [d for d in run.get("data_provenance") or [] if d.get("suite")]
    suites = config.suites or tuple(dict.fromkeys(d["suite"] for d in data))
    if not suites:
        raise Refused(f"--suite is needed: {why_no_suite(run)}")
    return [
        make_plan(config, suite, {d["task_id"]: d for d in data if d["suite"] == suite}, arm)
        for suite in suites
    ]


def why_no_suite(run: dict) -> str:
    """Say why a run's data name no suite, and which ones have their instructions."""
    said = (run.get("data_facts") or {}).get("tasks")
    choose = "choose from " + ", ".join(s.removeprefix("libero_") for s in SUITES)
    if said is None:
        return f"the checkpoint does not say what it was trained on; {choose}"
    known = set(map(plain_text, said))
    fit = [suite for suite in SUITES if known & set(map(plain_text, task_instructions(suite)))]
    if not fit:
        return f'the run was trained on no LIBERO data, but on such as "{said[0]}"; {choose}'
    short = " ".join(suite.removeprefix("libero_") for suite in fit)
    return f"the data's instructions are those of --suite {short}"


def make_plan(config: ProtocolConfig, suite: str, mine: dict[int, dict], arm: Arm) -> Plan:
    """Plan one suite; mine: task -> what the training data record of it."""
    first = next(iter(mine.values()), {})
    chosen = {}
    for name in ("displace", "either", "draw", "texture_colorspace", "reset", "size"):
        asked = getattr(config, name)
        value = first.get(name) if asked is None else asked
        if value is not None:
            chosen[name] = value
    sim = SimConfig(suite=suite, seed=config.seed, max_steps=config.step_limit(suite), **chosen)
    starts, seen = [], set()
    asked = parse_numbers(config.task_ids, "--task-ids")
    for task in asked or sorted(mine) or range(NUM_TASKS[suite]):
        check_task(suite, task)
        if sim.either:
            check_either(suite, task, sim.either)
        used = set(mine.get(task, {}).get("init_state_ids", ()))
        starts += [(task, i) for i in chosen_starts(config, task, used)]
        seen |= {(task, i) for i in used}
    steps, chunk = config.n_action_steps or arm.policy.config.n_action_steps, arm.policy.config.chunk_size
    if steps > chunk:
        raise Refused(
            f"--n-action-steps {steps}: a chunk of this policy has {chunk} actions, ask for no more"
        )
    return Plan(sim, starts, seen, steps, config.policy_batch, config.dtype, config.cameras, scenes(suite))


def chosen_starts(config: ProtocolConfig, task: int, used: set[int]) -> list[int]:
    """The init states of a task, of which demonstrations `used` some; Refused where there are too few."""
    if config.init_states is not None:
        ids = parse_numbers(config.init_states, "--init-states", NUM_INIT_STATES)
    else:
        ids = [i for i in range(NUM_INIT_STATES) if i not in used]
    if len(ids) < (config.episodes_per_task or 1):
        raise Refused(
            f"--episodes-per-task {config.episodes_per_task}: task {task} has only {len(ids)} left "
            f"({len(used)} are the demonstrations'); ask for fewer, or name --init-states"
        )
    return ids[: config.episodes_per_task]
