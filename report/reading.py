"""Reads run folders and says which of them may stand in one table.

A run folder is one whose config.json names an arm. Of its episodes the newest checkpoint's are reported;
those of earlier ones only show how success grew. Runs with another protocol or other data are refused, in one
line. Checkpoints from elsewhere (no training budget in config.json) are compared among themselves only.

    python -c "import reading; print(reading.find_runs((reading.Path('runs'),)))"
    pytest tests/report/test_report.py

Files: config.json, metrics.jsonl, episodes.jsonl, offline.jsonl, step_*/state.json, imagined/, videos/.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from report.stats import Run, pair_key


class Refusal(ValueError):
    """What a person can put right, in one line."""


class Checkpoint(NamedTuple):
    """An earlier checkpoint of a run, and its episodes."""

    samples: int
    episodes: tuple[dict, ...]


@dataclass(frozen=True)
class RunFolder(Run):
    """A run as the statistics see it, and what else its folder holds; from elsewhere, `budget` is None."""

    folder: Path
    config: dict
    checkpoint: str  # of `episodes`; empty where there are none
    earlier: tuple[Checkpoint, ...]
    offline: tuple[dict, ...]

    @property
    def elsewhere(self) -> bool:
        """Trained by somebody else, on nobody knows how many samples."""
        return self.budget is None

    @property
    def gflops(self) -> float | None:
        """What a training sample costs, forward and backward."""
        flops = self.config.get("flops_per_sample")
        return None if flops is None else flops / 1e9


# --------------------------------------------------------------------------------------------------
# files


def find_runs(paths: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """Return (name, folder) of each run folder in or below `paths`: one whose config.json names an arm."""
    found: dict[Path, str] = {}

    def look(folder: Path, name: str, depth: int) -> None:
        config = folder / "config.json"
        if config.is_file() and "arm" in read_config(config):
            found.setdefault(folder.resolve(), name)
        elif depth < 3:
            for child in sorted(p for p in folder.iterdir() if p.is_dir()):
                look(child, f"{name}/{child.name}" if depth else child.name, depth + 1)

    for path in paths:
        if not path.is_dir():
            raise Refusal(f"{path} is not a folder; name run folders or a folder that holds some")
        look(path, path.resolve().name, 0)
    if not found:
        seen = ", ".join(map(str, paths))
        raise Refusal(f"no run folder (a config.json that names an arm) in {seen}; make one with train.py")
    return [(name, folder) for folder, name in found.items()]


def read_config(path: Path) -> dict:
    """Return the object that a JSON file holds; an empty one where it holds something else."""
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise Refusal(f"{path}:{error.lineno}: not JSON ({error.msg}); train this run again") from None
    return config if isinstance(config, dict) else {}


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a JSONL file; a last line that was cut off is left out with a warning."""
    lines = path.read_text().split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            at = f"{path}:{number}"
            if any(rest.strip() for rest in lines[number:]):
                raise Refusal(
                    f"{at}: malformed line ({error}); delete it and run that program again"
                ) from None
            print(f"warning: {at}: the last line is cut off and left out", file=sys.stderr)
            continue
        row["_at"] = f"{path}:{number}"
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# episodes


def check_episode(row: dict) -> None:
    """Raise Refusal unless an episode has what the tables need and either ran or crashed."""
    needed = ("suite", "task_id", "init_state", "success", "steps", "memory", "checkpoint", "protocol")
    if missing := [key for key in needed if key not in row]:
        raise Refusal(
            f"{row['_at']}: an episode without {', '.join(missing)}; evaluate again with this eval.py"
        )
    if not isinstance(row["success"], bool) and not row.get("crash"):
        raise Refusal(
            f"{row['_at']}: success is {row['success']!r} without a crash; delete it, evaluate again"
        )


def protocol_of(episode: dict) -> dict:
    """Return the protocol record, flat, with the evaluation seed, which decides where the fixtures stand."""
    flat = {"eval_seed": episode.get("seed")}
    for key, value in episode["protocol"].items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat


def protocol_hash(episode: dict) -> str:
    """Return twelve hex digits that stand for the protocol record."""
    record = json.dumps(protocol_of(episode), sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()[:12]


def first_of_each(rows: list[dict]) -> list[dict]:
    """Drop episodes that are recorded twice; the first counts."""
    first: dict[str, dict] = {}
    for row in rows:
        key = json.dumps([*pair_key(row), row["memory"], protocol_of(row)], sort_keys=True)
        first.setdefault(key, row)
    return list(first.values())


def age(checkpoint: str) -> list[int]:
    """Order checkpoints by the numbers in their names."""
    return [int(digits) for digits in re.findall(r"\d+", checkpoint)]


def read_episodes(path: Path, has_memory: bool) -> dict[str, list[dict]]:
    """Return checkpoint -> its episodes as they stand in the file, the newest checkpoint last."""
    found: dict[str, list[dict]] = {}
    for row in read_lines(path):
        check_episode(row)
        if not has_memory:
            row["memory"] = "off"  # an arm without fusion has nothing to intervene on
        found.setdefault(row["checkpoint"], []).append(row)
    return {checkpoint: found[checkpoint] for checkpoint in sorted(found, key=age)}


def samples_of(folder: Path, checkpoint: str, rows: list[dict]) -> int | None:
    """Return the samples behind a checkpoint: its own record's, else its episodes', else None."""
    state = folder / checkpoint / "state.json"
    recorded = read_config(state).get("samples") if state.is_file() else None
    return rows[0].get("samples") if recorded is None and rows else recorded


def earlier_checkpoints(
    folder: Path, found: dict[str, list[dict]], current: list[dict]
) -> tuple[list[Checkpoint], list[str]]:
    """Return the earlier checkpoints that can stand beside the newest, whose episodes are `current`.

    Those of another protocol, or of unknown age, are left out, and a note says so.
    """
    protocols = {row["suite"]: protocol_of(row) for row in current}
    kept, notes = [], []
    for checkpoint, rows in found.items():
        samples = samples_of(folder, checkpoint, rows)
        like = [row for row in rows if protocols.get(row["suite"]) == protocol_of(row)]
        if samples is None:
            notes.append(f"{len(rows)} of {checkpoint} left out, its samples are unknown")
            continue
        if other := len(rows) - len(like):
            notes.append(f"{other} of {checkpoint} left out, of another protocol")
        if like:
            kept.append(Checkpoint(samples, tuple(first_of_each(like))))
            notes.append(f"{len(kept[-1].episodes)} of {checkpoint} only in success over samples")
    return kept, notes


def checkpoints_of(runs: list[RunFolder]) -> dict[int, list[dict]]:
    """Return samples -> episodes of an arm's own memory mode, of all its checkpoints and seeds."""
    found: dict[int, list[dict]] = {}
    for run in (run for run in runs if not run.elsewhere):
        for samples, episodes in (*run.earlier, (run.budget, run.episodes)):
            if own := [e for e in episodes if e["memory"] == run.own]:
                found.setdefault(samples, []).extend(own)
    return dict(sorted(found.items()))


def load_run(name: str, folder: Path) -> RunFolder:
    """Read one run folder; one without episodes.jsonl has no episodes."""
    config = read_config(folder / "config.json")
    for key in ("seed", "total_samples"):
        if key not in config:
            raise Refusal(f"{folder}/config.json has no {key}; train this run again with this train.py")
    sites = config.get("fusion") or []
    fusion = tuple(s for s in ([sites] if isinstance(sites, str) else sites) if s != "none")
    found = read_episodes(folder / "episodes.jsonl", bool(fusion))
    newest, rows = found.popitem() if found else ("", [])
    episodes = first_of_each(rows)
    notes = [f"{twice} recorded twice, the first counts"] if (twice := len(rows) - len(episodes)) else []
    earlier, left_out = earlier_checkpoints(folder, found, episodes)
    budget = config["total_samples"]
    if budget is not None and (seen := samples_of(folder, newest or "last", rows)) is not None:
        budget = seen  # fewer than the budget where it was saved half-way
    return RunFolder(
        name=name,
        arm=str(config["arm"]),
        seed=config["seed"],
        budget=budget,
        fusion=fusion,
        memory=config.get("memory") or "off",
        blind=bool(config.get("blind")),
        fingerprint=json.dumps(config.get("data_fingerprint"), sort_keys=True),
        params=(config.get("params_total"), config.get("params_trainable")),
        episodes=tuple(episodes),
        metrics=tuple(read_lines(folder / "metrics.jsonl")),
        notes=tuple(notes + left_out),
        folder=folder,
        config=config,
        checkpoint=newest,
        earlier=tuple(earlier),
        offline=tuple(read_lines(folder / "offline.jsonl")),
    )


# --------------------------------------------------------------------------------------------------
# what may stand in one table


def same(what: str, a: object, name_a: str, b: object, name_b: str) -> None:
    """Raise Refusal where two runs that are to be compared differ."""
    if a != b:
        raise Refusal(f"{what}: {a!r} in {name_a}, {b!r} in {name_b}; make them alike, or report them apart")


def check_comparable(runs: list[RunFolder]) -> None:
    """Raise Refusal unless runs share data and protocol and an arm is one thing, once a seed and budget.

    Checkpoints from elsewhere share no table with trained arms, and need to agree with one another only.
    """
    check_alike([run for run in runs if not run.elsewhere])
    check_alike([run for run in runs if run.elsewhere])


def check_alike(runs: list[RunFolder]) -> None:
    """Raise Refusal unless these runs may stand in one table."""
    arms: dict[str, RunFolder] = {}
    seen: dict[tuple, str] = {}
    protocols: dict[str, tuple[str, dict]] = {}
    for run in runs:
        first, twin = runs[0], arms.setdefault(run.arm, run)
        same("data fingerprints differ", first.fingerprint, first.name, run.fingerprint, run.name)
        same(f"arm {run.arm} means two things", twin.what, twin.name, run.what, run.name)
        same(f"arm {run.arm} has two sizes", twin.params, twin.name, run.params, run.name)
        other = seen.setdefault((run.arm, run.seed, run.budget), run.name)
        if other != run.name:
            budget = "budget unknown" if run.elsewhere else f"{run.budget} samples"
            twice = f"arm {run.arm}, seed {run.seed}, {budget}"
            raise Refusal(f"{twice} is there twice: {other} and {run.name}; report one of them")
        for episode in run.episodes:  # step limits belong to a suite, so protocols are compared within one
            suite, record = episode["suite"], protocol_of(episode)
            name, expected = protocols.setdefault(suite, (run.name, record))
            for key in sorted({*record, *expected}):
                there, here = expected.get(key), record.get(key)
                same(f"protocols of {suite} differ in {key}", there, name, here, run.name)


# --------------------------------------------------------------------------------------------------
# pictures and videos


class Rollout(NamedTuple):
    """A pictured episode: what its file's name says, and the files; `verdict` may be empty."""

    mode: str
    suite: str
    task: int
    init_state: int
    verdict: str
    picture: Path | None
    video: Path | None = None


NAME = re.compile(
    r"(?P<mode>.+)-(?P<suite>[^-]+)-task(?P<task>\d+)-init(?P<init>\d+)(-(?P<verdict>success|failure|crash))?"
)


def rollout_of(run: RunFolder, picture: Path | None, video: Path | None = None) -> Rollout | None:
    """Read a name like step_004000-pred-libero_goal-task1-init9; None unless of the reported checkpoint."""
    stem = (video or picture).stem
    if not stem.startswith(f"{run.checkpoint}-"):
        return None
    found = NAME.fullmatch(stem.removeprefix(f"{run.checkpoint}-"))
    if found is None:
        return None
    numbers = int(found["task"]), int(found["init"])
    return Rollout(found["mode"], found["suite"], *numbers, found["verdict"] or "", picture, video)


def imagined(run: RunFolder) -> list[Rollout]:
    """Return the contact sheets of imagined futures; pictures of single decisions (_dNNN) match no name."""
    found = (rollout_of(run, path) for path in sorted((run.folder / "imagined").glob("*.png")))
    return [rollout for rollout in found if rollout]


def filmed(run: RunFolder) -> list[Rollout]:
    """Return the videos, each with the filmstrip beside it, and filmstrips that have no video."""
    folder = run.folder / "videos"
    stems = sorted({path.stem for kind in ("*.mp4", "*.png") for path in folder.glob(kind)})
    beside = lambda stem, kind: path if (path := folder / f"{stem}{kind}").is_file() else None  # noqa: E731
    found = (rollout_of(run, beside(stem, ".png"), beside(stem, ".mp4")) for stem in stems)
    return [rollout for rollout in found if rollout]
