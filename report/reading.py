"""Reads run folders and says which of them may stand in one table.

A run folder is one whose config.json names an arm. Of its episodes the newest checkpoint's are reported;
those of earlier ones only show how success grew. What does not fit the rest (other data, another protocol,
a line that is no episode) is set aside by name, with the command that removes it. Checkpoints from elsewhere
(no training budget in config.json) are compared among themselves only.

    python -c "from report import reading; print(reading.find_runs((reading.Path('runs'),)))"
    pytest tests/report/test_report.py

Files: config.json, metrics.jsonl, episodes.jsonl, offline.jsonl, step_*/state.json, imagined/, videos/.
"""

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import NUMBER, Refused, json_lines, misfit, plain, read_json
from report.stats import Run, over_seeds, pair_key

CONFIG = {
    **{"arm": str, "seed": int, "total_samples": int | None},
    **{"fusion?": list | str | None, "memory?": str | None, "compared_with?": list | None},
    **dict.fromkeys(("memory_dropout?", "lambda_world?", "flops_per_sample?"), NUMBER | None),
    **dict.fromkeys(("params_total?", "params_trainable?", "num_hypotheses?"), int | None),
    **dict.fromkeys(("blind?", "hypotheses_alike?"), bool | None),
}
EPISODE = {
    "suite": str,
    "task_id": int,
    "init_state": int,
    "memory": str,
    "checkpoint": str,
    "protocol": dict,
}
STEPS = "n_action_steps"  # of each chunk: one checkpoint may be seen under several
OFFLINE = {"checkpoint": str, "data": str, "fingerprint": str, "episodes": list, "modes": dict}


class Aside(NamedTuple):
    """What a report leaves out: a run folder, or lines of one of its files."""

    path: Path
    why: str
    lines: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The run folder, or its file and which lines, without the way there."""
        if not self.lines:
            return plain(self.path.name)
        return f"{plain(self.path.parent.name)}/{self.path.name}, line {ranges(set(self.lines))}"

    def __str__(self) -> str:
        parts = ";".join(f"{part.replace('-', ',')}d" for part in ranges(set(self.lines)).split(", "))
        command = f"sed -i '{parts}'" if self.lines else "rm -r"
        return f"set aside {self.name}: {self.why}; remove it: {command} {quoted(self.path)}"


class Checkpoint(NamedTuple):
    """An earlier checkpoint of a run, and its episodes."""

    samples: int
    episodes: tuple[dict, ...]


@dataclass(frozen=True)
class RunFolder(Run):
    """A run as the statistics see it, and what else its folder holds; from elsewhere, `budget` is None."""

    folder: Path
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


def quoted(path: Path) -> str:
    """Return a path as bash reads it, however it is named."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"


def ranges(numbers: Iterable[int]) -> str:
    """Return sorted numbers with runs shortened: {0, 1, 2, 5} -> "0-2, 5"."""
    parts: list[list[int]] = []
    for x in sorted(numbers):
        if parts and x == parts[-1][-1] + 1:
            parts[-1].append(x)
        else:
            parts.append([x])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def made_plain(value: object) -> object:
    if isinstance(value, dict):
        return {plain(key): made_plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [made_plain(x) for x in value]
    return plain(value) if isinstance(value, str) else value


def find_runs(paths: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """Return (name, folder) of each run folder in or below `paths`: one whose config.json names an arm.

    One whose config.json cannot be read is named too.
    """
    found: dict[Path, str] = {}

    def look(folder: Path, name: str, depth: int) -> None:
        if may_be_run(folder / "config.json"):
            found.setdefault(folder.resolve(), plain(name))
        elif depth < 3:
            for child in sorted(p for p in folder.iterdir() if p.is_dir()):
                look(child, f"{name}/{child.name}" if depth else child.name, depth + 1)

    for path in paths:
        if not path.is_dir():
            raise Refused(f"{path} is not a folder; name run folders or a folder that holds some")
        look(path, path.resolve().name, 0)
    if not found:
        seen = ", ".join(map(str, paths))
        raise Refused(f"no run folder (a config.json that names an arm) in {seen}; make one with train.py")
    return [(name, folder) for folder, name in found.items()]


def may_be_run(path: Path) -> bool:
    try:
        return path.is_file() and "arm" in read_config(path)
    except Refused:
        return True


def read_config(path: Path) -> dict:
    """Return the object that a JSON file holds, its strings made plain."""
    return made_plain(read_json(path, again="train this run again"))


def read_lines(
    path: Path, shape: dict, aside: list[Aside], check: Callable[[dict], str] = lambda _: ""
) -> list[dict]:
    """Return the objects of a JSONL file, each with its number as `_line`; what is none is set aside."""
    rows, bad = [], {}
    for number, row, why in json_lines(path, shape):
        if why := why or check(row):
            bad.setdefault(why, []).append(number)
        else:
            rows.append(made_plain(row) | {"_line": number})
    aside += [Aside(path, plain(why), tuple(numbers)) for why, numbers in bad.items()]
    return rows


# --------------------------------------------------------------------------------------------------
# episodes


def episode_wrong(row: dict) -> str:
    """Say what keeps a line from being an episode that either ran or crashed; "" for one that is."""
    name = row["checkpoint"]
    if "/" in name or name.startswith(".") or len(name) > 200:
        return f"checkpoint {name!r:.40} is no name"
    ran = isinstance(row.get("success"), bool) and isinstance(row.get("steps"), NUMBER)
    return "" if ran or row.get("crash") else f"success is {row.get('success')!r} without a crash"


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


def read_episodes(folder: Path, has_memory: bool, aside: list[Aside]) -> dict[str, list[dict]]:
    """Return checkpoint -> its episodes, of all files, a protocol each; the newest checkpoint last."""
    found: dict[str, list[dict]] = {}
    packed = {path.with_suffix("") for path in folder.glob("episodes*.jsonl.gz")}
    files = {*folder.glob("episodes*.jsonl"), *packed}
    files = sorted(files, key=lambda path: (len(path.name), path.name))
    lines = [(file, row) for file in files for row in read_lines(file, EPISODE, aside, episode_wrong)]
    for file, row in lines:
        row["_file"] = file.name
        if not has_memory:
            row["memory"] = "off"  # an arm without fusion has nothing to intervene on
        found.setdefault(row["checkpoint"], []).append(row)
    return {checkpoint: found[checkpoint] for checkpoint in sorted(found, key=age)}


def samples_of(folder: Path, checkpoint: str, rows: list[dict]) -> int | None:
    """Return the samples behind a checkpoint: its own record's, else its episodes', else None."""
    state = folder / checkpoint / "state.json"
    recorded = read_config(state).get("samples") if state.is_file() else None
    samples = rows[0].get("samples") if recorded is None and rows else recorded
    return samples if isinstance(samples, int) else None


def checkpoints_of(runs: list[RunFolder]) -> dict[int, list[dict]]:
    """Return samples -> episodes of an arm's own memory mode, of all its checkpoints and seeds."""
    found: dict[int, list[dict]] = {}
    for run in (run for run in runs if not run.elsewhere):
        for samples, episodes in (*run.earlier, (run.budget, run.episodes)):
            if own := [e for e in episodes if e["memory"] == run.own]:
                found.setdefault(samples, []).extend(own)
    return dict(sorted(found.items()))


def load_run(name: str, folder: Path, aside: list[Aside]) -> RunFolder:
    """Read one run folder; one without episodes.jsonl has no episodes. Broken lines go to `aside`."""
    config = read_config(folder / "config.json")
    sites = config.get("fusion") or []
    sites = [sites] if isinstance(sites, str) else sites
    why = misfit(config, CONFIG)
    names = [config.get("compared_with") or [], sites] if not why else []
    if why or not all(isinstance(x, str) for some in names for x in some):
        why = why or "fusion and compared_with must be lists of names"
        raise Refused(f"{folder / 'config.json'} cannot be used, {why}: train this run again")
    fusion = tuple(s for s in sites if s != "none")
    found = read_episodes(folder, bool(fusion), aside)
    newest, rows = found.popitem() if found else ("", [])
    episodes = first_of_each(rows)
    notes = [f"{twice} recorded twice, the first counts"] if (twice := len(rows) - len(episodes)) else []
    earlier = []
    for checkpoint, older in found.items():
        if (samples := samples_of(folder, checkpoint, older)) is None:
            notes.append(f"{len(older)} of {checkpoint} left out, its samples are unknown")
        else:
            earlier.append(Checkpoint(samples, tuple(first_of_each(older))))
            notes.append(f"{len(earlier[-1].episodes)} of {checkpoint} only in success over samples")
    budget = config["total_samples"]
    if budget is not None and (seen := samples_of(folder, newest or "last", rows)) is not None:
        budget = seen  # fewer than the budget where it was saved half-way
    return RunFolder(
        name=name,
        arm=config["arm"],
        seed=config["seed"],
        budget=budget,
        fusion=fusion,
        memory=config.get("memory") or "off",
        blind=bool(config.get("blind")),
        fingerprint=json.dumps(config.get("data_fingerprint"), sort_keys=True),
        params=(config.get("params_total"), config.get("params_trainable")),
        episodes=tuple(episodes),
        metrics=tuple(read_lines(folder / "metrics.jsonl", {"samples": NUMBER}, aside)),
        notes=tuple(notes),
        folder=folder,
        config=config,
        checkpoint=newest,
        earlier=tuple(earlier),
        offline=tuple(read_lines(folder / "offline.jsonl", OFFLINE, aside)),
    )


def load_runs(paths: tuple[Path, ...]) -> tuple[list[RunFolder], list[Aside]]:
    """Return the runs in or below `paths` that fit together, and what is set aside."""
    runs, aside = [], []
    for name, folder in find_runs(paths):
        try:
            runs.append(load_run(name, folder, aside))
        except Refused as error:
            aside.append(Aside(folder, str(error)))
    return fitting(runs, aside), aside


# --------------------------------------------------------------------------------------------------
# what may stand in one table


def fitting(runs: list[RunFolder], aside: list[Aside]) -> list[RunFolder]:
    """Return the runs that may stand in one table; of what differs, what most have stays.

    Runs share data, and an arm is one thing, once a seed and budget; episodes share a protocol within their
    suite, since step limits belong to one. Checkpoints from elsewhere need to agree with one another only.
    """
    kept = []
    for group in ([r for r in runs if not r.elsewhere], [r for r in runs if r.elsewhere]):
        group = alike(group, lambda r: None, lambda r: ("data fingerprint", r.fingerprint), aside)
        group = alike(group, lambda r: r.arm, lambda r: (f"arm {r.arm}", r.what), aside)
        group = alike(group, lambda r: r.arm, lambda r: (f"size of arm {r.arm}", r.params), aside)
        first: dict[tuple, RunFolder] = {}
        for run in sorted(group, key=lambda r: -len(r.episodes)):  # stable
            twin = first.setdefault((run.arm, run.seed, run.budget), run)
            if twin is not run:
                why = f"arm {run.arm}, seed {run.seed} is there twice, {twin.name} has no fewer episodes"
                aside.append(Aside(run.folder, why))
        kept += of_one_protocol([run for run in group if run in first.values()], aside)
    return kept


def alike(
    runs: list[RunFolder], within: Callable, what: Callable[[RunFolder], tuple], aside: list[Aside]
) -> list[RunFolder]:
    """Return the runs that have what most have, the first of equals, among those with the same `within`."""
    counts: dict[object, Counter] = {}
    for run in runs:
        counts.setdefault(within(run), Counter())[what(run)] += 1
    usual = {key: count.most_common(1)[0][0] for key, count in counts.items()}
    for run in runs:
        (name, here), (_, most) = what(run), usual[within(run)]
        if here != most:
            aside.append(Aside(run.folder, f"{name} is {here}, not {most} as in most runs here"))
    return [run for run in runs if what(run) == usual[within(run)]]


def of_one_protocol(runs: list[RunFolder], aside: list[Aside]) -> list[RunFolder]:
    """Return the runs with the episodes alone whose suite's protocol is that of most; those that executed
    another part of each chunk, and differ in nothing else, are a run beside, compared with its own."""
    counts: dict[str, Counter] = {}
    records: dict[str, dict] = {}
    hashes = {id(e): protocol_hash(e) for run in runs for e in all_episodes(run)}
    for run in runs:
        for e in run.episodes:
            counts.setdefault(e["suite"], Counter())[hashes[id(e)]] += 1
            records.setdefault(hashes[id(e)], protocol_of(e))
    usual = {suite: count.most_common(1)[0][0] for suite, count in counts.items()}
    found = []
    for run in runs:
        other: dict[tuple, list[dict]] = {}
        beside: dict[object, set[int]] = {}  # actions a chunk -> episodes
        for e in all_episodes(run):
            if hashes[id(e)] != usual.get(e["suite"], hashes[id(e)]):
                other.setdefault((hashes[id(e)], e["_file"]), []).append(e)
        for episodes in other.values():
            here, there = protocol_of(episodes[0]), records[usual[episodes[0]["suite"]]]
            keys = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
            if keys == [STEPS]:
                beside.setdefault(here[STEPS], set()).update(map(id, episodes))
                continue
            said = ", ".join(f"{key} {here.get(key)!r:.40}, not {there.get(key)!r:.40}" for key in keys[:3])
            lines = tuple(e["_line"] for e in episodes)
            why = f"another protocol of {episodes[0]['suite']}: {said}"
            aside.append(Aside(run.folder / episodes[0]["_file"], why, lines))
        out = {id(e) for episodes in other.values() for e in episodes}
        found.append(of_episodes(run, {id(e) for e in all_episodes(run)} - out) if out else run)
        for steps, here in beside.items():
            arm, name = (f"{of}, {steps} actions a chunk" for of in (run.arm, run.name))
            config = run.config | {"compared_with": [run.arm]}
            found.append(replace(of_episodes(run, here), arm=arm, name=name, config=config))
    return found


def of_episodes(run: RunFolder, kept: set[int]) -> RunFolder:
    """Return a run with some of its episodes alone, by their ids."""
    fit = lambda some: tuple(e for e in some if id(e) in kept)  # noqa: E731
    earlier = [Checkpoint(c.samples, fit(c.episodes)) for c in run.earlier]
    return replace(run, episodes=fit(run.episodes), earlier=tuple(c for c in earlier if c.episodes))


def all_episodes(run: RunFolder) -> list[dict]:
    return [*run.episodes, *(e for c in run.earlier for e in c.episodes)]


# --------------------------------------------------------------------------------------------------
# held-out losses


class HeldOut(NamedTuple):
    """An arm's held-out action loss under a memory mode, a value a seed, each (S,)."""

    run: RunFolder  # of its first seed
    data: str
    episodes: int
    mode: str
    seeds: tuple[int, ...]
    losses: np.ndarray
    from_off: (
        np.ndarray
    )  # minus that of `off`, on the same frames, noise and times; (0,) where it was not measured
    bootstrap: dict[str, tuple[float, float]]  # over episodes, of the first seed

    def interval(self, name: str) -> tuple[float, float]:
        """Return the 95 % interval of the mean: of one seed over episodes, of 3 and more over seeds."""
        if len(self.seeds) == 1:
            return self.bootstrap[name]
        low, high = over_seeds(getattr(self, name)).interval
        return float(low), float(high)


def held_out(panel: list[RunFolder]) -> list[HeldOut]:
    """Return the last measurements of the reported checkpoints, by arm and data set, small losses first."""
    groups: dict[tuple, list] = {}
    for run in sorted(panel, key=lambda run: (run.arm, run.seed)):
        lines = {x["fingerprint"]: x for x in run.offline if run.checkpoint in ("", x["checkpoint"])}
        for line in lines.values():
            where = (run.arm, Path(line["data"]).name, len(line["episodes"]))
            for mode, found in line["modes"].items():
                groups.setdefault((*where, mode), []).append((run, found))
    measured = []
    for (_, data, episodes, mode), group in groups.items():
        runs, found = zip(*group, strict=True)
        paired = mode != "off" and all("from_off" in one for one in found)
        bootstrap = {"losses": found[0]["interval"], "from_off": found[0].get("from_off_interval")}
        losses, from_off = (
            np.array([one[key] for one in some])
            for key, some in (("loss", found), ("from_off", found if paired else ()))
        )
        seeds = tuple(run.seed for run in runs)
        measured.append(HeldOut(runs[0], data, episodes, mode, seeds, losses, from_off, bootstrap))
    return sorted(measured, key=lambda m: (m.run.arm, m.data, m.losses.mean()))


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
