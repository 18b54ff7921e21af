"""Episodes of a policy in LIBERO: what a decision sees, what it is given at random, and what it sends off.

A rollout keeps a pool of environments busy and decides for a fixed number of rows at a time, padded: the
shape of a policy call never depends on what else runs, so neither does an episode. Pictures are drawn only
where a decision, the world encoder's history or somebody's eyes will look at them.

    python eval.py runs/demo/E2-n40000-s0 --memory pred off
    pytest tests/test_eval.py

Shapes: B batch (fixed, padded), C chunk, A action, T history, K future, D latent width, S picture side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arm import Arm, ArmConfig
from data import CHANCE, FLOW, MEMORY, ROLLOUT, chance, memory_noise, partner_rows, sample_rng, stack
from files import Refused
from prophet import NEEDS, gate_scale
from rollouts.film import Film
from rollouts.imagine import Decision, decisions_of, future_plan
from rollouts.plan import Plan
from simulator.env import CAMERAS, CONTROL_HZ, SUITES
from simulator.pool import EnvPool, Observation, SimCrash
from smolvla.processor import Processor, rename_map
from training.diagnostics import most_attended, rows_attended

# ---- one episode --------------------------------------------------------------------------------------


def frame_plan(n: int, history: int, stride: int, clip: int = 1) -> list[int]:
    """Which of a decision's n actions (1-based) end on a frame that some later decision's history reads.

    Decisions fall n steps apart; each reads the frames 0, s, .. (T-1)s steps before it, and for each the clip
    that ends there.
    """
    back = [j * stride + i for j in range(history) for i in range(clip)]
    reach = range(1, 2 + max(back) // n)
    wanted = {m * n - b for m in reach for b in back}
    return [k for k in range(1, n + 1) if k in wanted or k == n]


@dataclass
class Episode:
    """What a rollout remembers: where it is, the pictures that its past is made of, and its timings."""

    task: int
    init_state: int
    mode: str
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    decisions: int = 0
    frames: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # step -> camera -> (3, S, S)
    physics: float = 0.0
    drawing: float = 0.0
    policy: float = 0.0
    fingerprint: dict[str, list[float]] = field(default_factory=dict)
    prompt: str = ""
    retried: bool = False
    first: Tensor | None = None  # the past (T, D) of its first decision
    imagined: list[Decision] | None = None  # where its futures are to be drawn
    film: Film | None = None  # where it is filmed
    names: dict[str, str] = field(default_factory=dict)  # environment's cameras -> the policy's names

    def see(self, observation: Observation, arm: Arm, keep_history: bool) -> None:
        """Take in an observation: timings, the first pictures' mean colours, pictures for the history."""
        before = self.steps
        if self.film is not None:
            self.film.see(before, observation)
        self.steps, self.prompt = observation.steps, observation.language
        self.physics += observation.physics_seconds
        self.drawing += observation.drawing_seconds
        if not self.fingerprint:
            self.fingerprint = {
                c: f.mean((0, 1)).round(2).tolist() for (_, c), f in observation.frames.items()
            }
        if keep_history and (self.imagined is not None or not observation.done):
            self.remember(observation, arm, before)

    def remember(self, observation: Observation, arm: Arm, before: int) -> None:
        """Keep the observation's pictures, and drop those that no later decision will read."""
        config = arm.config
        for offset in sorted({k for k, _ in observation.frames}):
            seen = {c: as_images(f)[0] for (k, c), f in observation.frames.items() if k == offset}
            frames = {self.names.get(c, c): f for c, f in seen.items()}
            if all(camera in frames for camera in config.latent_cameras):
                self.frames[before + offset] = {camera: frames[camera] for camera in config.latent_cameras}
        if self.imagined is None:
            reach = (config.history - 1) * config.world_stride + config.world_clip - 1
            self.frames = {step: f for step, f in self.frames.items() if step >= max(0, self.steps - reach)}

    def clip(self, step: int, config: ArmConfig) -> dict[str, Tensor]:
        """What a step's latent sees, by camera (m, 3, S, S); before the start the first frame repeats."""
        steps = [max(0, step - i) for i in reversed(range(config.world_clip))]
        return {c: torch.stack([self.frames[s][c] for s in steps]) for c in config.latent_cameras}

    def past(self, config: ArmConfig) -> list[dict[str, Tensor]]:
        """The T clips of the history at the present step; before the start the first frame repeats."""
        steps = [max(0, self.steps - j * config.world_stride) for j in reversed(range(config.history))]
        return [self.clip(step, config) for step in steps]


def as_images(frame: np.ndarray) -> Tensor:
    """A picture (S, S, 3) uint8 as a batch of one, (1, 3, S, S)."""
    return torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()


def histories(arm: Arm, episodes: list[Episode]) -> Tensor:
    """Encode the episodes' pasts (B, T, D) in one batch, by the very function that made the training cache.

    The batch has one shape whatever an episode has seen so far, so that what else runs changes no bit.
    """
    clips = [clip for episode in episodes for clip in episode.past(arm.config)]
    z = arm.encoder.embed({c: torch.stack([clip[c] for clip in clips]) for c in arm.config.latent_cameras})
    return z.unflatten(0, (len(episodes), -1))  # (B*T, D) -> (B, T, D)


def seen_latents(arm: Arm, episode: Episode) -> dict[int, Tensor]:
    """Encode all pictures that an episode has kept, by step, one by one; of an encoder of single frames."""
    return {step: arm.encoder.embed(episode.clip(step, arm.config))[0] for step in episode.frames}


# ---- rollouts -----------------------------------------------------------------------------------------


class Rollout:
    """Runs episodes of one mode in a pool of environments, deciding for a fixed number of rows at a time."""

    def __init__(
        self,
        arm: Arm,
        processor: Processor,
        plan: Plan,
        mode: str,
        pool: EnvPool,
        device: torch.device,
        checkpoint: object = "the policy",
    ) -> None:
        """Args: checkpoint, as messages call it."""
        self.arm, self.processor, self.mode, self.checkpoint = arm, processor, mode, checkpoint
        self.plan, self.pool, self.device = plan, pool, device
        self.needs = arm.needs(mode)
        self.keep_history = bool({"z_hist", "z_first"} & set(self.needs))
        self.scale = 1.0 if gate_scale(mode) is None else gate_scale(mode)
        names = rename_map(processor.before)
        self.names = {camera: names.get(camera, camera) for camera in CAMERAS}
        known = () if arm.config.blind else arm.policy.config.given_cameras
        self.cameras = self.drawn(known)
        self.world_cameras = self.drawn(arm.config.latent_cameras) if self.keep_history else ()
        if self.keep_history and len(self.world_cameras) < len(arm.config.latent_cameras):
            short = lambda names: [name.removeprefix("observation.images.") for name in names]  # noqa: E731
            pairs = zip(short(arm.policy.config.given_cameras), short(CAMERAS))
            raise Refused(
                f"the world latents' {', '.join(short(arm.config.latent_cameras))} are not among LIBERO's "
                f"{', '.join(short(CAMERAS))}: --cameras {' '.join(f'{a}={b}' for a, b in pairs)} would say "
                "which is which"
            )
        self.at_decision = tuple(dict.fromkeys((*self.cameras, *self.world_cameras)))
        self.gates = {} if mode == "off" or arm.policy.fusion is None else arm.policy.fusion.gates()
        self.running: dict[int, Episode] = {}
        self.waiting: deque[tuple[int, Observation]] = deque()

    def drawn(self, known: Iterable[str]) -> tuple[str, ...]:
        """The environment's cameras that have these names in the policy, in their order."""
        own = {new: old for old, new in self.names.items()}
        return tuple(own[name] for name in known if name in own)

    def run(
        self, starts: list[tuple[int, int]], imagine: int = 0, film: float = 0.0
    ) -> Iterator[tuple[Episode, Observation | None, str | None]]:
        """Roll out all starts; yields (episode, last observation or None, crash or None) as each ends.

        imagine: of how many the imagined futures are kept, the first ones; none in a mode without prophet.
        film: pictures a second to film all of them with; 0: none.
        """
        imagine = imagine if "prophet" in NEEDS.get(self.mode, ()) else 0
        queue = deque(self.episode(*start, n < imagine, film) for n, start in enumerate(starts))
        free = list(range(self.pool.num_envs))
        while queue or self.running:
            while queue and free:
                self.begin(free.pop(0), queue.popleft())
            try:
                answers = self.pool.ready()
            except SimCrash as crash:
                episode = self.running.pop(crash.env)
                free.append(crash.env)
                if episode.retried:
                    yield episode, None, str(crash)
                else:
                    again = self.episode(episode.task, episode.init_state, episode.imagined is not None, film)
                    again.retried = True
                    queue.appendleft(again)
                continue
            for i, observation in answers:
                self.running[i].see(observation, self.arm, self.keep_history)
                if observation.done:
                    free.append(i)
                    yield self.running.pop(i), observation, None
                else:
                    self.waiting.append((i, observation))
            while self.waiting:
                rows = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.plan.policy_batch))]
                self.decide(rows)

    def episode(self, task: int, init_state: int, imagine: bool, film: float) -> Episode:
        """A new episode of this mode, whose imagined futures are kept, or that is filmed."""
        shot = Film(round(CONTROL_HZ / film), self.gates) if film else None
        kept = [] if imagine else None
        return Episode(task, init_state, self.mode, imagined=kept, film=shot, names=self.names)

    def begin(self, i: int, episode: Episode) -> None:
        self.running[i] = episode
        episode.started = time.perf_counter()
        cameras = self.at_decision if episode.film is None else tuple(CAMERAS)
        self.pool.reset(i, episode.task, episode.init_state, cameras=cameras)

    @torch.inference_mode()  # a tenth less than without gradients alone, of many small operations
    def decide(self, rows: list[tuple[int, Observation]]) -> None:
        """Compute a chunk a row and send its first actions off; rows are padded with the first."""
        started = time.perf_counter()
        padded = rows + [rows[0]] * (self.plan.policy_batch - len(rows))
        episodes = [self.running[i] for i, _ in padded]
        batch = {
            "observation.state": torch.from_numpy(np.stack([o.state for _, o in padded])),
            "task": [o.language for _, o in padded],
        }
        for camera in self.cameras:
            batch[self.names[camera]] = torch.cat([as_images(latest(o, camera)) for _, o in padded])
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        inputs = self.processor(self.arm.blindfold(batch))
        noise, world = self.draw(episodes)
        if self.keep_history:
            world["z_hist"] = histories(self.arm, episodes).to(self.device)
            for episode, past in zip(episodes, world["z_hist"], strict=True):
                episode.first = past if episode.decisions == 0 else episode.first
            world["z_first"] = torch.stack([episode.first for episode in episodes])
        if self.arm.policy.fusion is not None:
            self.arm.policy.fusion.rescale(self.scale)
        best = most_attended(self.arm, inputs, world, noise) if self.mode == "best1" else None
        chunk = self.arm.act(inputs, noise, self.mode, world, best)
        actions = self.processor.unnormalise(chunk).cpu()
        self.check(episodes, actions)
        actions = actions.clamp(-1, 1).numpy()
        actions[..., 6] = np.where(actions[..., 6] > 0, 1.0, -1.0)  # of the gripper's only the sign counts
        seconds = (time.perf_counter() - started) / len(rows)
        self.note(episodes[: len(rows)], inputs, world, noise, best)
        for (i, _), row in zip(rows, actions, strict=False):
            self.running[i].policy += seconds
            self.running[i].decisions += 1
            self.send(i, row)

    def check(self, episodes: list[Episode], actions: Tensor) -> None:
        """Refuse actions (B, C, A) that are not finite: a policy that is broken is not one that fails."""
        for episode, chunk in zip(episodes, actions, strict=True):
            if not chunk.isfinite().all():
                where = f"{self.plan.sim.suite} task {episode.task}, init state {episode.init_state}"
                raise Refused(
                    f"{self.checkpoint}, memory {self.mode}: an action is not finite ({where}, decision "
                    f"{episode.decisions}): the policy is broken, and no episode of it counts; take another "
                    "checkpoint"
                )

    def note(
        self, episodes: list[Episode], inputs: dict, world: dict, noise: Tensor, best: Tensor | None
    ) -> None:
        """Keep what a decision was made from, for episodes whose futures are drawn or that are filmed."""
        if any(e.imagined is not None for e in episodes):
            at = [e.steps for e in episodes] + [0] * (len(noise) - len(episodes))
            made = decisions_of(self.arm, inputs, world, noise, self.mode, at)
            for episode, decision in zip(episodes, made, strict=False):
                if episode.imagined is not None:
                    episode.imagined.append(decision)
        if any(e.film is not None for e in episodes):
            mass = rows_attended(self.arm, inputs, world, noise, self.mode, best)
            for row, episode in enumerate(episodes):
                if episode.film is not None and mass is not None:
                    episode.film.attention[episode.steps] = mass[row].cpu().numpy()  # (N, K)

    def send(self, i: int, actions: np.ndarray) -> None:
        """Execute a chunk's first actions, drawing only what somebody will look at."""
        n, config, episode = self.plan.n_action_steps, self.arm.config, self.running[i]
        frames = [(n, camera) for camera in self.at_decision]
        if self.keep_history:
            steps = frame_plan(n, config.history, config.world_stride, config.world_clip)
            if episode.imagined is not None:
                steps = {*steps, *future_plan(n, config.future, config.world_stride)}
            frames += [(k, camera) for k in sorted(steps) if k < n for camera in self.world_cameras]
        if episode.film is None:
            self.pool.run(i, actions[:n], frames)
            return
        filmed = [(k, camera) for k in episode.film.plan(episode.steps, n) for camera in CAMERAS]
        self.pool.run(i, actions[:n], tuple(dict.fromkeys([*frames, *filmed])), last=tuple(CAMERAS))

    def draw(self, episodes: list[Episode]) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw flow noise (B, C, A_max), the same for every arm and mode, and what of memory is random."""
        policy, config, seed = self.arm.policy.config, self.arm.config, self.plan.sim.seed
        keys = [(SUITES.index(self.plan.sim.suite), e.task, e.init_state, e.decisions) for e in episodes]
        rng = lambda what, *key: sample_rng(seed, ROLLOUT + what, *key)  # noqa: E731
        shape = (policy.chunk_size, policy.max_action_dim)
        flow = [rng(FLOW, *key).standard_normal(shape, np.float32) for key in keys]
        world = {}
        many = range(config.num_hypotheses)
        if "noise" in self.needs:
            rows = (memory_noise(config, [rng(MEMORY, *key, n) for n in many]) for key in keys)
            world["noise"] = stack(rows).to(self.device)  # (B, N*K, D)
        if "chance" in self.needs:  # without the decision: a hypothesis stays what it is for an episode
            rows = (chance(config, [rng(CHANCE, *key[:-1], n) for n in many]) for key in keys)
            world["chance"] = stack(rows).to(self.device)  # (B, N, ., h)
        at = self.arm.partner_at.cpu()
        for name in {"z_partner", "z_other"} & set(self.needs):  # one episode, met at this one's step
            told = [e.prompt if name == "z_other" else None for e in episodes]
            pairs = zip(keys, episodes, told, strict=True)
            chosen = [partner_rows(at, key[:-1], seed, e.steps, text) for key, e, text in pairs]
            world[name] = self.arm.partners[chosen]  # (B, T, D)
        return torch.from_numpy(np.stack(flow)).to(self.device), world


def latest(observation: Observation, camera: str) -> np.ndarray:
    """The newest frame of a camera in an observation."""
    return observation.frames[max((k, c) for k, c in observation.frames if c == camera)]
