"""How fast, against the plain path in the same run, and how near to what this machine can do.

Every case runs in a process of its own, on random weights and random data: some steps to warm up, then the
fastest of several; cases take turns, so that a busy minute does not fall on one of them. FLOPs are those that
torch's own counter finds in a case's formulas; the peak is the best that this machine's matrix products reach
at a large square size in the case's type.

    python -m bench step --size tiny                # an optimiser step, from pictures and from features
    python -m bench step --size tiny --arms sites   # at every site, beside what it costs in FLOPs; or bank
    python -m bench chunk --size tiny               # a chunk of actions: vision, prefix, denoising
    python -m bench load --size tiny                # import and load
    python -m bench loop --size tiny                # what training costs beside its steps; a save
    python -m bench data                            # samples/s of each reader, alone and with processes
    python -m bench world --size tiny               # world encoders, and their caches against pictures
    python -m bench sim --size tiny                 # LIBERO's steps/s by when it draws; an evaluation's parts
    python -m bench step                            # full size, 450 M parameters; some minutes on two cores

Plain: eager, default kernels, pictures encoded at every step, gradients recorded through the whole prefix,
float32 weights under autocast where the type is bfloat16. Fast: as train.py and eval.py run.

Shapes: B batch, C actions in a chunk, A action width, D latent width, T history, K future.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from arm import Arm, ArmConfig, Summary
from bench import latents, loop, simulator
from files import Refused, check_numbers, type_in
from fusion import SITES as ALL
from fusion import Late
from model import SmolVLA, prefix_inputs
from readers.demos import Demos
from readers.load import load
from readers.prefetch import Loader
from smolvla import kernels
from smolvla.config import PRESETS, RECIPES
from train import TrainConfig, optimizer_step
from training.flops import only_math
from training.optimise import make_optimizer

OFTEN = ("what", "arms", "size", "dtype", "batch_size", "only", "out")
PROMPT = 16  # tokens of an instruction
LEAST = 1.0  # seconds that a case is measured for at least
ONE = {"none": {"fusion": ("none",)}}
SITES = ONE | {
    " ".join([name, *fields.values()]): {"fusion": (name,)} | fields
    for name, site in ALL.items()
    for fields in site.variants
}
LATE = {"fusion": (Late.name,)}
BANKS = {
    "1 hypothesis": LATE,
    "4 hypotheses": LATE | {"num_hypotheses": 4, "hypothesis_method": "mixture", "world_loss": "softmin"},
}


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory on random weights; `python -m bench control` asks if effects are found."""

    what: Annotated[Literal["step", "chunk", "load", "loop", "data", "world", "sim"], tyro.conf.Positional]
    """An optimiser step; a chunk's latency; import and load; training around its steps, and a save; random
    frames' pictures, read from the files; world encoders and their caches; the simulator."""

    arms: Literal["none", "sites", "bank"] = "none"
    """Of `step` and `chunk`: without memory, at every site, or with one and four hypotheses."""

    size: Literal["base", "tiny"] = "base"
    """Preset: 450 M parameters and two pictures of 512 x 512, or the demo's."""

    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types to compute in."""

    batch_size: int = 4
    """Samples of a training step; a chunk is always one sample's."""

    repeats: int = 3
    """Least measurements of each case and round, which go on for a second; the fastest of all counts."""

    rounds: int = 2
    """Turns that each case takes, in a new process each."""

    only: str = ""
    """Measure only cases whose name contains this; ratios are then to the first of these."""

    compile: bool = False
    """Compile blocks, and the denoising loop, in the fast cases."""

    threads: int | None = None
    """Threads of torch on a CPU; default: torch's own choice."""

    data: tuple[Path, ...] = ()
    """Data sets that `data` reads; default: the two small LeRobot sets among the tests."""

    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of processes that `data` is measured with; 0: read in this one."""

    checkpoint: Path | None = None
    """Folder in which `load` leaves the random checkpoint that it loads; default: a temporary one. Of `sim`:
    the checkpoint that it rolls out; default: a tiny random one."""

    world_model: str | None = None
    """Folder or hub id of a dinov2 or vjepa2 model that `world` measures alone; default: all encoders that
    need no download, these two small and random."""

    sim: Annotated[simulator.SimOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=simulator.SimOptions
    )

    out: Path | None = None
    """File that the JSON lines are appended to as well."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if min(self.workers, default=0) < 0:
            raise Refused(f"--workers {self.workers} must be at least 0 each")
        for flag in ("batch_size", "repeats", "rounds"):
            if getattr(self, flag) < 1:
                raise Refused(f"--{flag.replace('_', '-')} {getattr(self, flag)} must be at least 1")


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    name: str
    kind: Literal["chunk", "step"]
    size: str
    dtype: str
    batch: int
    repeats: int
    plain: bool = False
    features: bool = False
    compile: bool = False
    threads: int | None = None
    arm: dict = dataclasses.field(default_factory=lambda: {"fusion": ("none",)})
    freeze: str = "expert"
    draws: int = 1  # flow draws a sample

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def plan(config: BenchConfig) -> list[list[Case]]:
    """Lay out the cases in groups of one type; each begins with its plain path."""
    groups = []
    for dtype in config.dtype:
        one = {"size": config.size, "dtype": dtype, "batch": config.batch_size, "repeats": config.repeats}
        one |= {"threads": config.threads}
        fast, single = one | {"compile": config.compile}, {"batch": 1}
        arms = {"none": ONE, "sites": SITES, "bank": BANKS}[config.arms]
        name, arm = next(iter(arms.items()))
        if config.what == "chunk":
            group = [Case(f"{name}, plain", "chunk", plain=True, arm=arm, **one | single)]
            groups.append(group + [Case(n, "chunk", arm=arm, **fast | single) for n, arm in arms.items()])
        elif config.arms == "none":
            group = [Case("step from pictures, plain", "step", plain=True, **one)]
            group += [Case("step from pictures", "step", **fast)]
            groups.append([*group, Case("step from features", "step", features=True, **fast)])
        else:
            group = [Case(f"{name}, plain", "step", plain=True, features=True, arm=arm, **one)]
            group += [Case(n, "step", features=True, arm=arm, **fast) for n, arm in arms.items()]
            groups.append(group)
    if (
        config.what == "step" and config.size in RECIPES
    ):  # what trains whole, in either type beside the plain path
        recipe = RECIPES[config.size]
        one = {"kind": "step", "size": config.size, "batch": recipe["batch_size"], "repeats": config.repeats}
        one |= {"threads": config.threads, "freeze": recipe["freeze"], "draws": recipe["flow_draws"]}
        fast = [
            Case(f"recipe's step, {dtype}", dtype=dtype, compile=config.compile, **one)
            for dtype in config.dtype
        ]
        groups.append([Case("recipe's step, plain", dtype="float32", plain=True, **one), *fast])
    kept = [[case for case in group if config.only in case.name] for group in groups]
    if not any(kept):
        names = ", ".join(dict.fromkeys(case.name for group in groups for case in group))
        raise Refused(f"--only {config.only!r} is in no case's name: these are {names}")
    return [group for group in kept if group]


# ---- what is measured ---------------------------------------------------------------------------------


def build(case: Case, device: str) -> Arm:
    """Make a random arm as train.py or eval.py holds it; plain: all in float32, nothing replaced."""
    torch.manual_seed(0)
    config = ArmConfig(**case.arm)
    with torch.device(device):
        policy = SmolVLA(PRESETS[case.size])
        if device != "meta":
            policy.initialise()
        arm = Arm(config, policy, None, Summary.none(config), {})
    arm.policy.freeze(case.freeze)
    if arm.policy.fusion is not None:
        arm.policy.fusion.requires_grad_(True)
    if case.kind == "chunk":
        for name, p in arm.named_parameters():
            if name.endswith(".gate"):
                torch.nn.init.ones_(p)  # a closed site would be skipped
        arm.requires_grad_(False).train(device == "meta")  # to see which gates are open takes values
    arm.policy.split = not case.plain
    if case.plain:
        return arm
    arm.policy.set_dtype(case.torch_dtype)
    if case.compile and device != "meta":
        arm.policy.compile_blocks()
        arm.policy.compile_denoise()
    elif device == "cpu":
        kernels.speed_up(arm if case.kind == "chunk" else arm.policy, case.torch_dtype)
    return arm


def inputs_of(case: Case, device: str) -> dict:
    """Make random inputs as a Processor makes them, or with tokens in place of pictures."""
    config, batch = PRESETS[case.size], case.batch
    side, tokens = config.image_size, config.image_tokens
    with torch.device(device):
        picture = (
            (lambda: torch.randn(batch, tokens, config.width))
            if case.features
            else (lambda: torch.rand(batch, 3, side, side))
        )
        return {
            "images": [picture() for _ in config.cameras],
            "image_masks": [None for _ in config.cameras],
            "tokens": torch.randint(config.vocab_size, (batch, PROMPT)),
            "token_mask": torch.ones(batch, PROMPT, dtype=torch.bool),
            "state": torch.randn(batch, config.state_dim),
            "action": torch.randn(batch, config.chunk_size, config.action_dim),
            "is_pad": torch.zeros(batch, config.chunk_size, dtype=torch.bool),
        }  # fmt: skip


@dataclass
class RandomSource:
    """Stands where source.Source does: gives `optimizer_step` one batch, made before the clock runs."""

    arm: Arm
    data: tuple
    device: torch.device

    def batch(self, numbers: np.ndarray) -> tuple:
        return self.data


def batch_of(case: Case, arm: Arm, device: str) -> tuple:
    """Make what `Arm.forward` takes."""
    config, policy, batch = arm.config, arm.policy.config, case.batch
    with torch.device(device):
        z = {
            "z_hist": torch.randn(batch, config.history, config.world_dim),
            "z_future": torch.randn(batch, config.future, config.world_dim),
            "valid": torch.ones(batch, config.future, dtype=torch.bool),
        }
        world = {name: z[name] for name in config.trains_on} | (
            {"valid": z["valid"]} if config.has_prophet else {}
        )
        noise = torch.randn(batch, case.draws, policy.chunk_size, policy.max_action_dim)
        return inputs_of(case, device), world, noise, torch.rand(batch, case.draws)


def step_of(case: Case, arm: Arm, device: str) -> Callable[[], dict]:
    """One optimiser step, by training's own function."""
    config = TrainConfig(batch_size=case.batch, total_samples=10**6, **case.arm)
    optimizer = make_optimizer(config, arm)
    source = RandomSource(arm, batch_of(case, arm, device), torch.device(device))

    def step() -> dict[str, float]:
        with autocast(case, device):
            optimizer_step(config, source, arm, optimizer, 0, case.batch, 0, 1, logged=False)
        return {}

    return step


def chunk_of(case: Case, arm: Arm, device: str) -> Callable[[], dict]:
    """One chunk of actions, as `Arm.act` makes it; gives the time of its parts, memory in the prefix's."""
    policy, (inputs, world, noise, _) = arm.policy, batch_of(case, arm, device)

    @torch.no_grad()
    def chunk() -> dict[str, float]:
        with autocast(case, device):
            start = now(device)
            embedded = policy.embed_prefix(*prefix_inputs(inputs))
            seen = now(device)
            memory = arm.memory(arm.config.mode, arm.like(noise), world)
            cache = None if policy.fusion is None else policy.fusion.prepare(memory)
            prefix = policy.prefix(*embedded, cache)
            read = now(device)
            policy.denoise(noise[:, 0], prefix, cache)
        return {"vision": seen - start, "prefix": read - seen, "denoise": now(device) - read}

    return chunk


def autocast(case: Case, device: str) -> AbstractContextManager:
    """The plain path's way to bfloat16."""
    wanted = case.plain and case.torch_dtype != torch.float32
    return torch.autocast(device, case.torch_dtype) if wanted else nullcontext()


# ---- how it is measured -------------------------------------------------------------------------------


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(case: Case) -> dict:
    """Run a case: seconds of the fastest repeat and of its parts, and the peak of memory so far in bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.threads:
        torch.set_num_threads(case.threads)
    if device == "cpu" and not case.plain:
        kernels.keep_memory()
    arm = build(case, device)
    run = (step_of if case.kind == "step" else chunk_of)(case, arm, device)
    for _ in range(2):
        run()
    found, begun = [], now(device)
    while len(found) < case.repeats or now(device) - begun < LEAST:
        start = now(device)
        parts = run()
        found.append((now(device) - start, parts))
    seconds, parts = min(found, key=lambda pair: pair[0])
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    return {"seconds": seconds, "parts": parts, "memory": memory, "threads": torch.get_num_threads()}


def peak_resident() -> int:
    """The most memory this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_flops(case: Case) -> int:
    """Count a case's FLOPs on tensors without memory, in float32 and without replaced kernels."""
    case = dataclasses.replace(case, dtype="float32", compile=False)
    arm = build(case, "meta")
    with FlopCounterMode(display=False) as counter, only_math():
        if case.kind == "chunk":
            inputs, world, noise, _ = batch_of(case, arm, "meta")
            arm.act(inputs, noise[:, 0], arm.config.mode, world)
        else:
            out = arm(*batch_of(case, arm, "meta"))
            (out["action"].mean() + (out["world"].mean() if "world" in out else 0)).backward()
    return counter.get_total_flops()


def measure_peak(dtype: str, threads: int | None) -> float:
    """The most FLOP/s that a large matrix product reaches here, through any of the kernels in use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    side = 8192 if device == "cuda" else 2048
    x = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
    layer = torch.nn.Linear(side, side, bias=False, device=device, dtype=x.dtype).requires_grad_(False)
    best = 0.0
    for packed in (False, True) if device == "cpu" else (False,):
        if packed:
            kernels.speed_up(layer)
        for _ in range(12):
            start = now(device)
            layer(x)
            best = max(best, 2 * side**3 / (now(device) - start))
    return best


def alone(function: Callable, *arguments: object) -> object:
    """Call a function in a process of its own: no case leaves memory or kernels to the next."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---- import and load ----------------------------------------------------------------------------------

LOAD = """
import sys, time
start = time.perf_counter()
from model import load_policy
imported = time.perf_counter()
policy, _ = load_policy(sys.argv[1])
print(imported - start, time.perf_counter() - imported)
"""


def write_checkpoint(folder: Path, size: str) -> None:
    """Write a random checkpoint, its language model's description beside it."""
    from smolvla.checkpoint import fresh_processor, save_policy

    config = PRESETS[size]
    stats = {
        "observation.state": {"mean": torch.zeros(config.state_dim), "std": torch.ones(config.state_dim)},
        "action": {"mean": torch.zeros(config.action_dim), "std": torch.ones(config.action_dim)},
    }
    torch.manual_seed(0)
    processor = fresh_processor(config, stats, ["open the middle drawer of the cabinet"], (3, 256, 256))
    save_policy(folder, SmolVLA(config).initialise(), processor)


def measure_load(config: BenchConfig) -> dict:
    """Import and load in fresh processes, files in the page cache; the fastest of the repeats."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.checkpoint or Path(temporary) / "checkpoint"
        if not (folder / "model.safetensors").is_file():
            alone(write_checkpoint, folder, config.size)
        found = []
        for _ in range(config.repeats):
            command = [sys.executable, "-c", LOAD, str(folder.resolve())]
            answer = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1]
            )
            found.append([float(x) for x in answer.stdout.split()])
    imported, loaded = min(found, key=sum)
    return {"case": "import and load", "seconds": imported + loaded, "import": imported, "load": loaded}


def measure_data(config: BenchConfig) -> Iterator[dict]:
    """Read batches of random frames, all cameras, from each set's files: samples a second, the best turn."""
    root = Path(__file__).resolve().parents[1] / "tests" / "lerobot_v3"
    for path in config.data or (root / "L_image" / "dataset", root / "L_video" / "dataset"):
        demos = load(path, in_memory=False)
        shape = " ".join(f"{p.shape[1]}x{p.shape[2]}" for p in demos.images.values())
        for workers in config.workers:
            rates = [samples_a_second(demos, workers, config.batch_size) for _ in range(config.rounds)]
            yield {
                "case": f"{path}, {workers} processes",
                "frames": len(demos),
                "cameras": shape,
                "batch": config.batch_size,
                "workers": workers,
                "per_second": max(rates),
            }


def samples_a_second(demos: Demos, workers: int, batch: int) -> float:
    """Read random batches for a while; with processes, two batches are always on their way."""
    loader = Loader(demos, workers) if workers else None
    rng, cameras = np.random.default_rng(0), tuple(demos.images)
    coming = [rng.integers(0, len(demos), batch) for _ in range(3)]
    start, done, warm = time.perf_counter(), 0, 0
    while time.perf_counter() - start < LEAST:
        if loader is not None:
            for index in coming:
                loader.expect(index, cameras)
        index = coming.pop(0)
        coming.append(rng.integers(0, len(demos), batch))
        for camera in cameras:
            (loader.demos if loader else demos).frames(index, camera)
        done, warm = done + batch, warm + 1
        if warm == 4:  # files are open, processes busy
            start, done = time.perf_counter(), 0
    rate = done / (time.perf_counter() - start)
    if loader is not None:
        loader.close()
    return rate


# ---- main ---------------------------------------------------------------------------------------------


def lines(config: BenchConfig) -> Iterator[dict]:
    """Measure group after group; gives each case's JSON line."""
    for group in plan(config):
        turns, peaks = [], dict.fromkeys((case.dtype for case in group), 0.0)
        for turn in range(config.rounds):
            for dtype, peak in peaks.items():
                peaks[dtype] = max(peak, alone(measure_peak, dtype, config.threads))
            turns.append([])
            for case in group:
                turns[-1].append(alone(measure, case))
                said = f"{turns[-1][-1]['seconds']:.3f} s in round {turn + 1} of {config.rounds}"
                print(f"{case.name} {case.kind} {case.dtype}: {said}", file=sys.stderr, flush=True)
        best = [min(found, key=lambda one: one["seconds"]) for found in zip(*turns, strict=True)]
        flops = [alone(count_flops, case) for case in group]
        # Sites beside no memory, a bank beside one hypothesis; else beside the plain path.
        base = int(config.arms != "none" and not config.only)
        for case, found, count in zip(group, best, flops, strict=True):
            seconds, peak = found["seconds"], peaks[case.dtype]
            yield {
                "case": case.name,
                "kind": case.kind,
                "dtype": case.dtype,
                "batch": case.batch,
                "seconds": seconds,
                "per_second": case.batch / seconds,
                **found["parts"],
                "times_faster_than_plain": best[0]["seconds"] / seconds,
                "time_ratio": seconds / best[base]["seconds"],
                "flops": count,
                "flops_ratio": count / flops[base],
                "peak_flops": peak,
                "share_of_peak": count / seconds / peak,
                "memory_gb": found["memory"] / 1e9,
                "threads": found["threads"],
            }


def loop_of(config: BenchConfig, dtype: str) -> list[dict]:
    """What training costs beside its steps, from pictures (bench/loop.py)."""
    return list(loop.lines(config.size, dtype, config.batch_size, config.threads))


def table(rows: list[dict]) -> str:
    """Lay cases out: time and FLOPs beside the plain path's, or those without memory or a bank of it."""
    out = [
        f"{'case':28s} {'kind':5s} {'type':8s} {'seconds':>8s} {'a second':>9s} {'faster':>7s} {'time':>6s} "
        f"{'FLOPs':>6s} {'GFLOP':>8s} {'of peak':>7s} {'GB':>6s}"
    ]
    for row in rows:
        if "share_outside" in row or "ratio" in row:
            out.append(loop.table(row))
            continue
        if "kind" not in row:
            parts = f"import {row['import']:.2f}, load {row['load']:.2f}"
            out.append(f"{row['case']:43s} {row['seconds']:8.3f}  {parts}")
            continue
        line = f"{row['case']:28s} {row['kind']:5s} {row['dtype']:8s} {row['seconds']:8.3f} "
        line += f"{row['per_second']:9.3f} {row['times_faster_than_plain']:6.2f}x {row['time_ratio']:6.3f} "
        line += f"{row['flops_ratio']:6.3f} {row['flops'] / 1e9:8.1f} {row['share_of_peak']:7.1%} "
        parts = ", ".join(f"{k} {row[k]:.3f}" for k in ("vision", "prefix", "denoise") if k in row)
        out.append(f"{line}{row['memory_gb']:6.2f}  {parts}".rstrip())
    return "\n".join(out)


def measured(config: BenchConfig) -> Iterator[dict]:
    """Give the JSON lines of what was asked for."""
    if config.what == "data":
        return measure_data(config)
    if config.what == "load":
        return iter([measure_load(config)])
    if config.what == "loop":
        return (row for dtype in config.dtype for row in alone(loop_of, config, dtype))
    if config.what == "sim":
        turns = (config.repeats, config.rounds)
        how = (write_checkpoint, turns, config.only)
        return simulator.lines(config.sim, config.size, config.checkpoint, *how)
    return latents.lines(config.size, config.world_model) if config.what == "world" else lines(config)


def tables(config: BenchConfig, rows: list[dict]) -> str:
    """Lay out what was measured."""
    if config.what == "data":
        return "\n".join(
            f"{row['case']:60s} {row['cameras']:16s} {row['per_second']:9.1f} samples/s" for row in rows
        )
    own = {"world": latents.table, "sim": simulator.table}
    return own.get(config.what, table)(rows)


def main(args: list[str] | None = None) -> None:
    """Run the command line: measure all cases of one kind."""
    measure_all(type_in(BenchConfig, __doc__, OFTEN, "python -m bench", args))


def measure_all(config: BenchConfig) -> None:
    """Print a JSON line a case, then a table."""
    rows, device = [], torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    common = {"what": config.what, "size": config.size, "device": device, "torch": torch.__version__}
    if config.what == "world" and config.threads:
        torch.set_num_threads(config.threads)
    for row in (common | found for found in measured(config)):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if config.out is not None:
            with config.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(tables(config, rows))
    for dtype, peak in {r["dtype"]: r["peak_flops"] for r in rows if "peak_flops" in r}.items():
        print(f"peak of a matrix product in {dtype}: {peak / 1e9:,.0f} GFLOP/s on {rows[0]['device']}")
