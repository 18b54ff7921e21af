"""Damage every file that is read, and let every program that reads it say what it makes of it.

A small run with a memory, its results, its caches (whole and unfinished), a checkpoint as others leave them
(in shards, without a manifest), data sets and recordings of ours are made once. Then each file is damaged in
many ways (bits, ends, types, nesting), one at a time, and each program that reads it runs. Outcomes:

    named       one line: what is wrong, and of which file or run
    harmless    the same result as without the damage
    unseen      another result, of text or data that have no checksum: somebody could have written them so
    fault       a traceback, a hang, or another result without a word

    python tests/fuzz.py --heavy 2         # all: 13 minutes of one core; the table is docs/damage.md's
    python tests/fuzz.py --only config     # files whose path contains this
"""

# ruff: noqa: E402

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro
from safetensors.torch import load_file, save_file
from test_data import write_task

import eval as evaluation
import model
import train
from eval import EvalConfig
from files import Refused, Unwritable
from latents import blocks
from matrix import parse, text
from readers import check
from report import __main__ as report
from report import watch
from rollouts import episodes
from rollouts.plan import find_target
from simulator import record
from simulator.pool import in_fresh_process
from smolvla import folders
from train import TrainConfig

HANG = 60  # seconds
TINY = {"total_samples": 24, "batch_size": 8, "save_every": 8, "log_every": 1, "threads": 1, "lr": 1e-3}
MEMORY = {"fusion": ("late",), "world_dim": 16, "world_resolution": 8, "future": 3, "freeze": "none"}
WRONG = (None, [], {}, "text", -7, 10**12, True, [[None]], {"a": {"b": 5}})
# Files without a checksum (a cache's are written last): what reads well there is taken at its word.
WORDS = (
    "run/config.json",
    "run/metrics.jsonl",
    "run/episodes.jsonl",
    "run/offline.jsonl",
    "hdf5/soup",
    "lerobot/",
    "video/",
    "recorded/",
    "sharded/",
    "unfinished/",
)
RECORD = {"suite": "libero_object", "demos_per_task": 2, "init_states": "0-1", "size": 32, "noise": 0.0}
DEMO = "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo"


# ---- what is there -------------------------------------------------------------------------------------


def quiet(function: Callable, *args: object, **fields: object) -> str:
    """Call a program and give what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*args, **fields)
    return said.getvalue()


def make_world(home: Path) -> None:
    """Make what is damaged: data of both layouts, a run with memory, one from its tokens, and results."""
    write_task(home / "hdf5" / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    write_task(home / "other" / "soup_demo.hdf5", lengths=(9, 24), size=32, seed=1)
    for name, kind in (("lerobot", "L_image"), ("video", "L_video")):
        shutil.copytree(HERE / "lerobot_v3" / kind / "dataset", home / name)
    data = {"data": home / "hdf5"}
    quiet(train.main, TrainConfig(**TINY, **MEMORY, **data, out=home / "run"))
    shutil.rmtree(home / "run" / "step_000003")
    (home / "run" / "last").unlink()
    (home / "run" / "last").symlink_to("step_000002")
    frozen = {"init": str(home / "run" / "step_000001"), "freeze": "expert", "features": home / "tokens"}
    frozen |= {"fusion": ("late",), "world_dim": 16, "world_resolution": 8, "future": 3}
    quiet(train.main, TrainConfig(**TINY, **data, **frozen, prepare=True))
    line = {"checkpoint": "step_000002", "memory": "pred", "suite": "libero_object", "task_id": 1, "seed": 7}
    line |= {"success": True, "crash": None, "steps": 9, "protocol": {"a": 1}, "seconds": 2.0}
    with (home / "run" / "episodes.jsonl").open("w") as file:
        for start in range(6):
            file.write(json.dumps(line | {"init_state": start, "success": start % 2 == 0}) + "\n")
    quiet(offline, home)
    shard(home / "run" / "step_000001", home / "sharded")
    interrupt(home)
    make_recordings(home / "recorded")


def shard(whole: Path, folder: Path) -> None:
    """Copy a checkpoint as others leave them: weights in two files with an index, and no manifest."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(folders.MANIFEST, folders.WEIGHTS))
    tensors = load_file(whole / folders.WEIGHTS)
    table = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(table.values()):
        save_file({name: tensors[name] for name in table if table[name] == file}, folder / file)
    (folder / folders.SHARDS).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def interrupt(home: Path) -> None:
    """Copy the caches as a kill leaves them: the first block is there, and others, if any, are to be made."""
    for cache in (next((home / "hdf5").glob("world_*")), home / "tokens"):
        part = blocks.part_of(home / "unfinished" / cache.name)
        shutil.copytree(cache, part)
        (part / blocks.MARKS).write_bytes(b"\1")


def make_recordings(out: Path) -> None:
    """Record two demonstrations: a finished file, and the folder of one that a kill has interrupted."""
    config = record.DemoConfig(out=out, **RECORD)
    parts, settings = out / f"{DEMO}.parts", config.settings(1)
    parts.mkdir(parents=True)
    for attempt in range(2):
        job = record.Job(config, 1, attempt, record.part_path(parts, attempt))
        result = in_fresh_process(record.run_attempt, job)
        assert result.success, result
        record.log_attempt(parts, settings, result)
    shutil.copytree(parts, out / "kept")
    record.assemble(out / f"{DEMO}.hdf5", parts, [0, 1], settings)
    (out / "kept").rename(parts)


# ---- programs: each gives a result that damage must not change without a word -----------------------------


def copied(home: Path, name: str) -> Path:
    """Copy a folder that a program writes to."""
    shutil.rmtree(home / "copy", ignore_errors=True)
    return Path(shutil.copytree(home / name, home / "copy"))


def describe(home: Path) -> object:
    return quiet(model.main, model.DescribeConfig(str(home / "run")))


def offline(home: Path) -> object:
    path = home / "run" / "offline.jsonl"
    before = path.read_bytes() if path.exists() else None
    config = EvalConfig(str(home / "run"), offline=home / "other", memory=("off", "zero"))
    said = quiet(evaluation.main, config)
    if before is not None:
        path.write_bytes(before)
    return [line for line in said.splitlines() if not line.startswith("checkpoint ")]


def results(home: Path) -> object:
    """What an evaluation finds there, up to its first episode."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        target = find_target(EvalConfig(str(home / "run")))
    lines = episodes.read_all(home / "run" / "episodes.jsonl").values()
    return target.name, said.getvalue(), episodes.summary(lines)


def resume(home: Path) -> object:
    return train_on(home, MEMORY)


def goes_on(home: Path) -> object:
    """The checkpoint that training would go on from."""
    found, skipped = folders.newest_whole(home / "run")
    return found and found.name, skipped


def start(home: Path) -> object:
    return train_on(home, MEMORY | {"init": str(home / "run" / "step_000002")}, fresh=True)


def from_tokens(home: Path) -> object:
    fields = {"init": str(home / "run" / "step_000001"), "freeze": "expert", "features": home / "tokens"}
    return train_on(home, MEMORY | fields, fresh=True)


def describe_shards(home: Path) -> object:
    return quiet(model.main, model.DescribeConfig(str(home / "sharded")))


def start_from_shards(home: Path) -> object:
    return train_on(home, MEMORY | {"init": str(home / "sharded")}, fresh=True)


def prepare(home: Path) -> object:
    """Make what is unfinished, and check it once more."""
    data = copied(home, "hdf5")
    for cache in data.glob("world_*"):
        shutil.rmtree(cache)
    for part in (home / "unfinished").iterdir():
        shutil.copytree(part, data / part.name)
    return prepared(home, data, data / "tokens")


def check_caches(home: Path) -> object:
    return prepared(home, home / "hdf5", home / "tokens")[0]


def prepared(home: Path, data: Path, tokens: Path) -> tuple[list[str], list[int]]:
    fields = {"init": str(home / "run" / "step_000001"), "freeze": "expert", "features": tokens}
    config = TrainConfig(**TINY | MEMORY | fields, data=data, prepare=True)
    said = [line.split(" in ")[0] for line in quiet(train.main, config).splitlines()]
    caches = [tokens, *data.glob("world_*")]
    files = [path for cache in caches for path in sorted(cache.iterdir())]
    return said, [zlib.crc32(path.read_bytes()) for path in files]


def record_again(home: Path) -> object:
    """What `python -m simulator record` takes for done; it stops where the simulator would start."""
    out = copied(home, "recorded")
    path, parts, settings = out / f"{DEMO}.hdf5", out / f"{DEMO}.parts", record_settings(out)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = record.read_final(path, settings), record.read_parts(parts, settings)
    path.unlink(missing_ok=True)
    if found[1].successes == {0, 1}:
        record.assemble(path, parts, [0, 1], settings)
        return found, run_check(out)
    return found, said.getvalue()


def record_settings(out: Path) -> dict:
    return record.DemoConfig(out=out, **RECORD).settings(1)


def check_recorded(home: Path) -> object:
    return run_check(home / "recorded")


def check_video(home: Path) -> object:
    return run_check(home / "video")


def train_on(home: Path, fields: dict, fresh: bool = False) -> object:
    """Train on a copy of the run, or anew, and give the weights' CRCs."""
    out = home / "trained"
    shutil.rmtree(out, ignore_errors=True)
    if not fresh:
        shutil.copytree(home / "run", out, symlinks=True)
    try:
        said = quiet(train.main, TrainConfig(**TINY | fields, data=home / "hdf5", out=out))
        tensors = load_file(out / "last" / "model.safetensors")
        made = sum(float(t.double().sum()) for t in tensors.values())
        return made, [line for line in said.splitlines() if line.startswith("warning")]
    finally:
        shutil.rmtree(out, ignore_errors=True)


def check_hdf5(home: Path) -> object:
    return run_check(home / "hdf5")


def check_lerobot(home: Path) -> object:
    return run_check(home / "lerobot")


def run_check(path: Path) -> object:
    return str(dataclasses.replace(check.check(path), said=0.0))


def reports(home: Path) -> object:
    out = home / "report"
    runs, aside = report.load_runs((home / "run",))
    said = quiet(lambda: print(report.write_report(runs, out, "x", aside)))
    shutil.rmtree(out)
    return "\n".join(line for line in said.splitlines() if not line.startswith("wrote"))


def watched(home: Path) -> object:
    said = quiet(watch.main, [str(home / "run"), "--once"])
    return [line for line in said.splitlines() if "ago" not in line]


def standing(home: Path) -> object:
    """What run_matrix.sh looks at."""
    state = parse(text(home / "run" / "last" / "state.json"))
    return state, text(home / "run" / "episodes.jsonl").count("\n") > 0


CHECKPOINT = (describe, offline, results, goes_on, start)
HEAVY = (offline, reports, resume, from_tokens, start, start_from_shards)
READERS: dict[str, tuple[Callable, ...]] = {
    "run/config.json": (offline, results, resume, reports, watched),
    "run/metrics.jsonl": (resume, reports, watched),
    "run/episodes.jsonl": (results, reports, watched, standing),
    "run/offline.jsonl": (reports,),
    "run/step_000002/": CHECKPOINT,
    "sharded/": (describe_shards, start_from_shards),
    "hdf5/world_": (resume, check_caches),
    "tokens/": (from_tokens, check_caches),
    "unfinished/": (prepare,),
    "hdf5/soup": (resume, from_tokens, check_hdf5),
    "recorded/": (record_again, check_recorded),
    "lerobot/": (check_lerobot,),
    "video/": (check_video,),
}


# ---- damage --------------------------------------------------------------------------------------------


def damages(path: Path, rng: random.Random) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield names of damages and what does them to a file."""
    whole = path.read_bytes()
    size = len(whole)

    def put(content: bytes) -> Callable[[], None]:
        return lambda: path.write_bytes(content)

    for at in sorted({0, *(rng.randrange(max(1, size)) for _ in range(4))} & {*range(size)}):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        yield f"bit of byte {at:,}", put(bytes(flipped))
    middle = size // 2
    yield "half", put(whole[:middle])
    yield "last byte cut off", put(whole[:-1])
    yield "empty", put(b"")
    yield "zeros inside", put(whole[:middle] + bytes(min(64, size - middle)) + whole[middle + 64 :])
    yield "bytes behind", put(whole + b"\xff\xfe garbage")
    yield "random bytes", put(rng.randbytes(200))
    yield "missing", path.unlink
    if path.suffix not in (".json", ".jsonl"):
        return
    deep = "[" * 100_000 + "]" * 100_000
    for content in ("null", "[]", "{}", "5", '"text"', deep, '{"a": "\udcff"}'):
        yield f"{content:.12}", put(content.encode("utf-8", "surrogateescape"))
    lines = whole.splitlines()
    try:
        fields = json.loads(lines[0] if path.suffix == ".jsonl" else whole)
    except ValueError:
        return
    for key in rng.sample(sorted(fields), min(8, len(fields))) if isinstance(fields, dict) else ():
        changed = json.dumps(fields | {key: rng.choice(WRONG)}).encode()
        rest = b"\n".join([b"", *lines[1:], b""]) if path.suffix == ".jsonl" else b""
        yield f"{key} of another type", put(changed + rest)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(program: Callable, home: Path, path: Path, wanted: object) -> tuple[str, str]:
    """Run a program beside damage; give the outcome and, of a fault, what it was."""
    folders.checksum_of.cache_clear()
    try:
        with time_limit(HANG):
            found = program(home)
    except (Refused, Unwritable, SystemExit) as error:
        line = str(error)
        one = "\n" not in line and len(line) < 1500
        return ("named", "") if one else ("fault", f"not one line: {line[:300]}")
    except BaseException as error:  # whatever it was, it is what a person would have seen
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__}: {str(error)[:150]} ({Path(at.filename).name}:{at.lineno})"
    if found == wanted:
        return "harmless", ""
    told = [path.name, "broken", "set aside", "warning", "damaged", "cannot", "problem"]
    said, name = str(found), str(path.relative_to(home))
    if any(said.count(word) > str(wanted).count(word) for word in told):
        return "named", ""
    return ("unseen", "") if name.startswith(WORDS) else ("fault", f"silent: {said[:200]}")


@dataclasses.dataclass(frozen=True)
class Options:
    """Damage files, and print what programs make of it."""

    only: str = ""
    """Files whose path contains this; default: all."""

    heavy: int = 1
    """Run programs that take seconds on one of so many damages."""

    seed: int = 0
    """Of what is damaged where."""


def main(options: Options) -> None:
    """Print each fault as it is found, and the table at the end; exit code 1 where there is any."""
    home = Path(tempfile.mkdtemp(prefix="fuzz_"))
    torch.set_num_threads(1)
    make_world(home)
    programs = dict.fromkeys(program for group in READERS.values() for program in group)
    wanted = {program: program(home) for program in programs}
    counts: dict[str, Counter] = {}
    rng, tried, ran = random.Random(options.seed), 0, 0
    for prefix, readers in READERS.items():
        files = [p for p in home.rglob("*") if p.is_file() and str(p.relative_to(home)).startswith(prefix)]
        for path in sorted(p for p in files if options.only in str(p.relative_to(home))):
            if path.is_symlink() or "/last/" in str(path):
                continue
            whole, name = path.read_bytes(), str(path.relative_to(home))
            for what, damage in damages(path, rng):
                tried += 1
                for program in readers:
                    if program in HEAVY and (tried + readers.index(program)) % options.heavy:
                        continue
                    damage()
                    result, why = outcome(program, home, path, wanted[program])
                    ran += 1
                    counts.setdefault(prefix, Counter())[result] += 1
                    if result == "fault":
                        print(f"FAULT {program.__name__:12s} {name}, {what}: {why}", flush=True)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(whole)
    print(f"\n{tried} damages, {ran} runs of {len(programs)} programs (seed {options.seed})\n", flush=True)
    kinds = ("named", "harmless", "unseen", "fault")
    print(f"| files | {' | '.join(kinds)} |\n| --- {'| --- ' * len(kinds)}|")
    for prefix, count in counts.items():
        print(f"| `{prefix}` | {' | '.join(str(count[kind]) for kind in kinds)} |")
    shutil.rmtree(home)
    sys.exit(any(count["fault"] for count in counts.values()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
