"""How fast, against the plain path in the same run, and how near to what this machine can do.

Every case runs in a process of its own, on random weights and random data: some steps to warm up, then the
fastest of several; cases take turns, so that a busy minute does not fall on one of them. FLOPs are those that
torch's own counter finds in a case's formulas; the peak is the best that this machine's matrix products reach
at a large square size in the case's type.

    python bench.py model --size tiny               # a chunk: vision, prefix, denoising; import and load
    python bench.py train --size tiny               # an optimiser step, from pictures and from features
    python bench.py fusion --size tiny              # a step at every site, beside what it costs in FLOPs
    python bench.py bank --size tiny                # a step with 1 and 4 hypotheses
    python bench.py world --size tiny               # world encoders, and their caches against pictures
    python bench.py train                           # full size, 450 M parameters; some minutes on two cores

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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import bench_world
import cpu
from arm import Arm, ArmConfig, Summary
from config import PRESETS
from model import SmolVLA, prefix_inputs
from train import TrainConfig, make_optimizer, optimizer_step

PROMPT = 16  # tokens of an instruction
LEAST = 1.0  # seconds that a case is measured for at least
SITES = {
    "none": {"fusion": ("none",)},
    "late": {"fusion": ("late",)},
    "suffix_in": {"fusion": ("suffix_in",)},
    "prefix_tokens, block state": {"fusion": ("prefix_tokens",), "prefix_block": "state"},
    "prefix_tokens, block prefix": {"fusion": ("prefix_tokens",)},
    "prefix_cross": {"fusion": ("prefix_cross",)},
}
BANKS = {
    "late, 1 hypothesis": {"fusion": ("late",)},
    "late, 4 hypotheses": {
        "fusion": ("late",), "num_hypotheses": 4, "hypothesis_method": "mixture", "world_loss": "softmin",
    },
}  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory on random weights."""

    what: Annotated[Literal["model", "train", "fusion", "bank", "world"], tyro.conf.Positional]
    """A chunk's latency, with import and load; an optimiser step; one at every site; one with a bank; world
    encoders and their caches."""

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

    compile: bool = False
    """Compile blocks, and the denoising loop, in the fast cases."""

    threads: int | None = None
    """Threads of torch on a CPU; default: torch's own choice."""

    checkpoint: Path | None = None
    """Folder in which `model` leaves the random checkpoint that it loads; default: a temporary one."""

    world_model: str | None = None
    """Folder or hub id of a dinov2 or vjepa2 model that `world` measures alone; default: all encoders that
    need no download, these two small and random."""

    out: Path | None = None
    """File that the JSON lines are appended to as well."""

    def __post_init__(self) -> None:
        for flag in ("batch_size", "repeats", "rounds"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)} must be at least 1")


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

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def plan(config: BenchConfig) -> list[list[Case]]:
    """Lay out the cases in groups; the first of a group is what the others are compared with."""
    groups = []
    for dtype in config.dtype:
        one = {"size": config.size, "dtype": dtype, "batch": config.batch_size, "repeats": config.repeats}
        one["threads"] = config.threads
        fast = one | {"compile": config.compile}
        if config.what == "model":
            one, fast = one | {"batch": 1}, fast | {"batch": 1}
            groups.append([Case("chunk, plain", "chunk", plain=True, **one), Case("chunk", "chunk", **fast)])
        elif config.what == "train":
            groups.append(
                [
                    Case("step from pictures, plain", "step", plain=True, **one),
                    Case("step from pictures", "step", **fast),
                    Case("step from features", "step", features=True, **fast),
                ]
            )
        else:
            arms = SITES if config.what == "fusion" else BANKS
            groups.append([Case(n, "step", features=True, arm=arm, **fast) for n, arm in arms.items()])
    return groups


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
    arm.policy.freeze("expert")
    if arm.policy.fusion is not None:
        arm.policy.fusion.requires_grad_(True)
    if case.kind == "chunk":
        arm.eval().requires_grad_(False)
    arm.policy.split = not case.plain
    if case.plain:
        return arm
    arm.policy.set_dtype(case.torch_dtype)
    if case.compile and device != "meta":
        arm.policy.compile_blocks()
        arm.policy.compile_denoise()
    elif device == "cpu":
        cpu.speed_up(arm if case.kind == "chunk" else arm.policy, case.torch_dtype)
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
        noise = torch.randn(batch, 1, policy.chunk_size, policy.max_action_dim)
        return inputs_of(case, device), world, noise, torch.rand(batch, 1)


def step_of(case: Case, arm: Arm, device: str) -> Callable[[], dict]:
    """One optimiser step, by train.py's own function."""
    config = TrainConfig(batch_size=case.batch, total_samples=10**6, **case.arm)
    optimizer = make_optimizer(config, arm)
    source = RandomSource(arm, batch_of(case, arm, device), torch.device(device))

    def step() -> dict[str, float]:
        with autocast(case, device):
            optimizer_step(config, source, arm, optimizer, 0, case.batch, 0, 1, logged=False)
        return {}

    return step


def chunk_of(case: Case, arm: Arm, device: str) -> Callable[[], dict]:
    """One chunk of actions, as `predict_chunk` makes it; gives the time of its parts."""
    policy, inputs = arm.policy, inputs_of(case, device)
    noise = torch.randn(case.batch, policy.config.chunk_size, policy.config.max_action_dim, device=device)

    @torch.no_grad()
    def chunk() -> dict[str, float]:
        with autocast(case, device):
            start = now(device)
            embedded = policy.embed_prefix(*prefix_inputs(inputs))
            seen = now(device)
            prefix = policy.prefix(*embedded)
            read = now(device)
            policy.denoise(noise, prefix)
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
        cpu.keep_memory()
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
            with torch.no_grad():
                inputs, policy = inputs_of(case, "meta"), arm.policy
                noise = torch.empty(
                    case.batch, policy.config.chunk_size, policy.config.max_action_dim, device="meta"
                )
                policy.denoise(noise, policy.prefix(*policy.embed_prefix(*prefix_inputs(inputs))))
        else:
            out = arm(*batch_of(case, arm, "meta"))
            (out["action"].mean() + (out["world"].mean() if "world" in out else 0)).backward()
    return counter.get_total_flops()


@contextmanager
def only_math() -> Iterator[None]:
    """Spell attention out, so that the counter sees its products whatever kernels there are."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


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
            cpu.speed_up(layer)
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
from checkpoint import load_policy
imported = time.perf_counter()
policy, _ = load_policy(sys.argv[1])
print(imported - start, time.perf_counter() - imported)
"""


def write_checkpoint(folder: Path, size: str) -> None:
    """Write a random checkpoint, its language model's description beside it."""
    from checkpoint import fresh_processor, save_policy

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
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent
            )
            found.append([float(x) for x in answer.stdout.split()])
    imported, loaded = min(found, key=sum)
    return {"case": "import and load", "seconds": imported + loaded, "import": imported, "load": loaded}


# ---- main ---------------------------------------------------------------------------------------------


def lines(config: BenchConfig) -> Iterator[dict]:
    """Measure group after group; gives each case's JSON line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    common = {"what": config.what, "size": config.size, "device": device, "torch": torch.__version__}
    for group in plan(config):
        turns, peaks = [], []
        for _ in range(config.rounds):
            peaks.append(alone(measure_peak, group[0].dtype, config.threads))
            turns.append([alone(measure, case) for case in group])
        peak, base = max(peaks), {}
        for case, *found in zip(group, *turns, strict=True):
            found, flops = min(found, key=lambda one: one["seconds"]), alone(count_flops, case)
            base = base or {"seconds": found["seconds"], "flops": flops}
            yield common | {
                "case": case.name,
                "dtype": case.dtype,
                "batch": case.batch,
                "seconds": found["seconds"],
                "per_second": case.batch / found["seconds"],
                **found["parts"],
                "speed_ratio": base["seconds"] / found["seconds"],
                "time_ratio": found["seconds"] / base["seconds"],
                "flops": flops,
                "flops_ratio": flops / base["flops"],
                "peak_flops": peak,
                "share_of_peak": flops / found["seconds"] / peak,
                "memory_gb": found["memory"] / 1e9,
                "threads": found["threads"],
            }
    if config.what == "model":
        yield common | measure_load(config)


def table(rows: list[dict]) -> str:
    """Lay cases out; ratios are to the first case of a type."""
    out = [
        f"{'case':28s} {'type':9s} {'seconds':>8s} {'a second':>9s} {'faster':>7s} {'time':>6s} "
        f"{'FLOPs':>6s} {'GFLOP':>8s} {'of peak':>7s} {'GB':>6s}"
    ]
    for row in rows:
        if "dtype" not in row:
            out.append(
                f"{row['case']:38s} {row['seconds']:8.3f}  import {row['import']:.2f}, load {row['load']:.2f}"
            )
            continue
        parts = ", ".join(f"{k} {row[k]:.3f}" for k in ("vision", "prefix", "denoise") if k in row)
        out.append(
            f"{row['case']:28s} {row['dtype']:9s} {row['seconds']:8.3f} {row['per_second']:9.3f} "
            f"{row['speed_ratio']:6.2f}x {row['time_ratio']:6.3f} {row['flops_ratio']:6.3f} "
            f"{row['flops'] / 1e9:8.1f} {row['share_of_peak']:7.1%} {row['memory_gb']:6.2f}"
            + (f"  {parts}" if parts else "")
        )
    return "\n".join(out)


def main(config: BenchConfig) -> None:
    """Measure all cases of one kind."""
    rows = []
    of_world = config.what == "world"
    if of_world and config.threads:
        torch.set_num_threads(config.threads)
    for row in bench_world.lines(config.size, config.world_model) if of_world else lines(config):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if config.out is not None:
            with config.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(bench_world.table(rows) if of_world else table(rows))
    for dtype, peak in {row["dtype"]: row["peak_flops"] for row in rows if "dtype" in row}.items():
        print(f"peak of a matrix product in {dtype}: {peak / 1e9:,.0f} GFLOP/s on {rows[0]['device']}")


if __name__ == "__main__":
    try:
        main(tyro.cli(BenchConfig))
    except ValueError as error:
        sys.exit(f"error: {error}")
