"""Do checkpoint, training data and environment agree? Asked before a rollout, answered item by item.

Published figures are missed for dull reasons: pictures of another size, turned twice or never, cameras
swapped, another state, other statistics, a darker floor. Each side says what it knows of itself (facts.py);
an item `differs` only where two sides know it and are in conflict, else it `agrees` or is `not stated`. What
can be measured is: the environment's first pictures and first state are laid beside the data's.

    environment = describe_environment(plan.sim, plan.n_action_steps, observation)
    lines = compare(describe_checkpoint(policy.config, processor, run), run.get("data_facts"), environment)
    print(table(lines))
    check(lines, accept=["sizes"], named=["n_action_steps"])       # ValueError for what else differs
    pytest tests/rollouts/test_conform.py

Thresholds were measured on first frames of 40 tasks of four suites, two starts each, drawn by MuJoCo 3.3.2;
of 8 of them also fast and small, and by 3.3.7, whose floor is darker. What was found stands beside them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, Literal, NamedTuple

import numpy as np

from files import Refused
from readers.selection import plain_text
from rollouts.facts import STATE_DIM, Facts, describe_checkpoint, describe_data, describe_environment, unpack
from simulator.env import SETTLE_STEPS
from smolvla.config import SmolVLAConfig
from smolvla.processor import Processor

__all__ = [  # all that a rollout needs
    "check", "check_statistics", "compare", "describe_checkpoint", "describe_data", "describe_environment",
    "record", "table",
]  # fmt: skip

Verdict = Literal["agrees", "differs", "not stated"]
ITEMS = (
    "cameras", "sizes", "rotation", "state", "action", "statistics", "rate", "no-ops", "n_action_steps",
    "instruction", "drawing",
)  # fmt: skip

# Pictures as they are correlate at 0.87 and more with their own scene's. Where they do not, in another scene,
# turned, mirrored or swapped ones never beat them by more than 0.09.
FITS, CLEARLY, NEARLY = 0.85, 0.15, 0.05
# Levels there lie in 0.93 to 1.07, drawn in full or fast, small or large; with the darker floor at 0.70.
SAME_SCENE, LEVEL = 0.7, 0.85
TURNS = tuple((quarters, mirrored) for mirrored in (False, True) for quarters in range(4))

STATE_NAMES = ("x", "y", "z", "axis-angle x", "axis-angle y", "axis-angle z", "finger 1", "finger 2")
STATE_LIMIT = np.array([2.0] * 3 + [2 * np.pi] * 3 + [0.1] * 2)  # metres, radians, metres: none lies beyond
ROLL = 3  # the hand points down, half a turn about x: unwrapped, as LIBERO's is, this angle stays positive
ACTION_LIMIT = 1.05  # of values in [-1, 1] neither mean nor deviation can be more than 1
STD_FLOOR = 0.02  # metres or radians: demonstrations hardly use some dimensions
FAR = 8.0  # deviations off the mean at which no first state lies; demonstrations' own reached 4.5
NOOPS = 0.01  # share of no-ops that is not there by chance
OFF = WIDER = 5.0  # data against a checkpoint's statistics: means apart, in deviations; deviations' ratio


@dataclass(frozen=True)
class Line:
    """One item: what each side says of it, and the verdict."""

    item: str
    checkpoint: str
    data: str
    environment: str
    verdict: Verdict
    why: str = ""


def verdict_of(why: Sequence[str], stated: bool = True) -> Verdict:
    return "differs" if why else "agrees" if stated else "not stated"


# ---- pictures -----------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """How the environment's first pictures fit those of the data."""

    cameras: tuple[str, ...]  # that both have
    taken: tuple[str, ...]  # for each, the data's camera that it fits best
    turns: tuple[int, ...]  # for each, the number of the turn that makes it fit
    score: float  # mean correlation then
    own: float  # and of the pictures as they are
    level: float  # brightness beside the data's in the same scene; NaN where there is no such scene

    @property
    def wrong(self) -> bool:
        """Whether other cameras or turns fit well, and clearly better."""
        return self.score >= FITS and self.score - self.own >= CLEARLY

    @property
    def figures(self) -> str:
        return f"correlation {self.own:.2f} as they are" + f", {self.score:.2f} so" * self.wrong


def fit_pictures(data: Facts, environment: Facts) -> Fit | None:
    """Look for the cameras and turns that make pictures fit, all of them one and the same scene of the data.

    Of fits that are nearly as good, the one that changes least counts: a scene may be nearly symmetric.
    """
    names = tuple(name for name in environment.sketches if data.sketches.get(name))
    if not names:
        return None
    seen = {name: unpack(environment.sketches[name][0]) for name in names}
    scenes = {name: [unpack(text) for text in data.sketches[name]] for name in names}
    fits = {
        (a, b, t): np.array([correlation(turned(seen[a], *TURNS[t]), scene) for scene in scenes[b]])
        for a, b, t in product(names, names, range(len(TURNS)))
    }

    def score(taken: tuple[str, ...], turns: tuple[int, ...]) -> float:
        return float(sum(fits[key] for key in zip(names, taken, turns)).max() / len(names))

    ways = product(permutations(names), product(range(len(TURNS)), repeat=len(names)))
    scores = {way: score(*way) for way in ways}
    near = [way for way in scores if scores[way] >= max(scores.values()) - NEARLY]
    best = min(near, key=lambda way: ((way[0] != names) + sum(map(bool, way[1])), -scores[way]))
    straight = {name: fits[name, name, 0] for name in names}
    scene = int(sum(straight.values()).argmax())
    same = [name for name in names if straight[name][scene] >= SAME_SCENE]
    levels = [level(seen[name], scenes[name][scene]) for name in same]
    oddest = max(levels, key=lambda ratio: abs(np.log(ratio)), default=np.nan)
    return Fit(names, *best, scores[best], scores[names, (0,) * len(names)], oddest)


def turned(picture: np.ndarray, quarters: int, mirrored: bool) -> np.ndarray:
    picture = np.rot90(picture, quarters)
    return picture[:, ::-1] if mirrored else picture


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlate two sketches (8, 8, 3) over place, each colour about its own mean; 0 where one is plain."""
    a, b = a - a.mean((0, 1)), b - b.mean((0, 1))
    size = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / size) if size > 0 else 0.0


def level(a: np.ndarray, b: np.ndarray) -> float:
    """Return how much brighter one sketch is than another at the median place."""
    return float(np.median(a.mean(-1).clip(1) / b.mean(-1).clip(1)))


def turn_text(number: int) -> str:
    quarters, mirrored = TURNS[number]
    words = [f"turned by {90 * quarters} degrees"] * bool(quarters) + ["mirrored"] * mirrored
    return " and ".join(words)


# ---- items --------------------------------------------------------------------------------------------


def compare(
    checkpoint: Facts,
    data: dict[str, Any] | None,
    environment: Facts,
    prompt: Callable[[str], Any] = str,
) -> list[Line]:
    """Lay the three sides beside each other, a line an item.

    Args: data, what `describe_data` gave, or None; prompt, what the policy makes of an instruction.
    """
    ours = {old: new for old, new in checkpoint.rename.items() if old not in checkpoint.cameras}
    known = Facts.read(data).renamed(ours) if data else None  # a run's own have the policy's names
    environment = environment.renamed(checkpoint.rename)
    fit = fit_pictures(known, environment) if known else None
    return [
        compare_cameras(checkpoint, known, environment, fit),
        compare_sizes(checkpoint, known, environment),
        compare_rotation(known, fit),
        compare_state(checkpoint, known, environment),
        compare_action(checkpoint, known, environment),
        compare_statistics(checkpoint, known, environment),
        compare_rate(known, environment),
        compare_noops(checkpoint, known),
        compare_steps(checkpoint, environment),
        compare_instructions(known, environment, prompt),
        compare_drawing(checkpoint, known, environment, fit),
    ]


def compare_cameras(checkpoint: Facts, data: Facts | None, environment: Facts, fit: Fit | None) -> Line:
    """Compare names, and whose pictures look like whose."""
    why = []
    for side, facts in (("environment", environment), ("data", data)):
        missing = [short(name) for name in checkpoint.cameras if facts and name not in facts.cameras]
        if len(missing) > checkpoint.absent:
            why.append(f"not in the {side}: {', '.join(missing)}")
            if side == "environment":
                pairs = zip(map(short, checkpoint.cameras), map(short, facts.cameras))
                why[-1] += f" (--cameras {' '.join(f'{a}={b}' for a, b in pairs)} would say which is which)"
    if fit and fit.wrong:
        pairs = [(short(a), short(b)) for a, b in zip(fit.cameras, fit.taken) if a != b]
        why += [f"{a} looks like the data's {b}, {fit.figures}" for a, b in pairs[:1]]
    cells = (", ".join(map(short, side.cameras)) if side else "-" for side in (checkpoint, data, environment))
    return Line("cameras", *cells, verdict_of(why), "; ".join(why))


def compare_sizes(checkpoint: Facts, data: Facts | None, environment: Facts) -> Line:
    """Compare what is drawn with what was trained on: the data's, where they are known."""
    trained = data or checkpoint
    names = [n for n in checkpoint.cameras if trained.cameras.get(n) and environment.cameras.get(n)]
    pairs = {(by(trained.cameras[n]), by(environment.cameras[n])) for n in names}
    why = [f"drawn at {b}, trained on at {a}" for a, b in sorted(pairs) if a != b]
    earlier = {by(size) for size in checkpoint.cameras.values() if size} - {a for a, _ in pairs}
    note = f"config.json's {', '.join(earlier)} is of an earlier training" if pairs and earlier else ""
    cells = (sizes_text(side, checkpoint) for side in (checkpoint, data, environment))
    return Line("sizes", *cells, verdict_of(why, bool(pairs)), "; ".join(why) or note)


def compare_rotation(data: Facts | None, fit: Fit | None) -> Line:
    """Compare which way up pictures are, where they fit the data's in some way."""
    cells = ("-", "first pictures" if data and any(data.sketches.values()) else "-", "turned by 180 degrees")
    if fit is None:
        return Line("rotation", *cells, "not stated", "there are no first pictures of both to compare")
    if fit.wrong:  # all turns may be right, where cameras are swapped
        pairs = [(short(c), turn_text(t)) for c, t in zip(fit.cameras, fit.turns) if t]
        why = [f"{camera} fits the data when {how}" for camera, how in pairs]
        return Line("rotation", *cells, verdict_of(why), "; ".join([*why, fit.figures]))
    if fit.own < FITS:
        return Line("rotation", *cells, "not stated", f"the data show no such scene, {fit.figures}")
    return Line("rotation", *cells, "agrees", fit.figures)


def compare_state(checkpoint: Facts, data: Facts | None, environment: Facts) -> Line:
    """Compare widths, which give away the usual layouts."""
    layouts = {9: "with a quaternion?", 7: "joints?"}
    why, width = [], environment.state["width"]
    for side, facts in (("checkpoint", checkpoint), ("data", data)):
        if facts and (found := facts.state["width"]) != width:
            why.append(f"the {side}'s {found} is not {width}: {layouts.get(found, 'another robot?')}")
    cells = (width_text(side and side.state) for side in (checkpoint, data, environment))
    return Line("state", *cells, verdict_of(why), "; ".join(why))


def compare_action(checkpoint: Facts, data: Facts | None, environment: Facts) -> Line:
    """Compare widths, and whether values can be relative ones in [-1, 1]."""
    why, width = [], environment.action["width"]
    for side, facts in (("checkpoint", checkpoint), ("data", data)):
        if facts and (found := facts.action["width"]) != width:
            why.append(f"the {side}'s {found} is not {width}: another robot?")
        elif facts and (problem := action_problem(facts.action)):
            why.append(f"the {side}'s {problem}")
    if data and data.action.get("closes") == -1:
        why.append("the data's gripper closes at -1, as their fingers show; here -1 opens it")
    cells = (width_text(side and side.action) for side in (checkpoint, data, environment))
    stated = any(facts and "mean" in facts.action for facts in (checkpoint, data))
    return Line("action", *cells, verdict_of(why, stated), "; ".join(why))


def action_problem(action: dict[str, Any]) -> str:
    """Say which values no relative action in [-1, 1] has, or nothing."""
    for name in ("mean", "std", "min", "max"):
        values = np.abs(action.get(name, [0]))
        if values.max() > ACTION_LIMIT:
            worst = int(values.argmax())
            return f"{name} of dimension {worst} is {action[name][worst]:.3g}: absolute, or in other units?"
    if action.get("min", [-1])[-1] >= 0 and action.get("max", [0])[-1] > 0.5:
        return f"gripper is never below {action['min'][-1]:.3g}, here -1 opens it: is it in [0, 1]?"
    return ""


def compare_statistics(checkpoint: Facts, data: Facts | None, environment: Facts) -> Line:
    """Compare both sides' statistics with what LIBERO's states can be and the first one is, and the two."""
    first = environment.state.get("first")
    why, notes = [], []
    for side, facts in (("checkpoint", checkpoint), ("data", data)):
        if facts and "mean" in facts.state and facts.state["width"] == STATE_DIM:
            if problem := state_problem(facts.state, first):
                why.append(f"the {side}'s {problem}")
            elif first:
                notes.append(f"the first state lies within {deviations(facts.state, first).max():.1f} std")
    for feature in ("state", "action"):
        a, b = getattr(checkpoint, feature), getattr(data, feature) if data else {}
        strange = feature == "action" and any(map(action_problem, (a, b)))  # said under action
        if not strange and (found := apart(feature, a, b)):
            notes.append(found[0])
            why += notes[-1:] if found[1] else []
    mode = checkpoint.state["mode"] + ("" if "mean" in checkpoint.state else ", no statistics")
    frames = f"{data.about.get('frames', 0):,} frames" if data else "-"
    cells = (mode, frames, "first state" if first else "-")
    reasons = why[:1] or list(dict.fromkeys(notes))
    return Line("statistics", *cells, verdict_of(why, bool(notes)), "; ".join(reasons))


def apart(feature: str, own: dict[str, Any], data: dict[str, Any]) -> tuple[str, bool] | None:
    """Say how far data lie outside of a checkpoint's statistics, and whether too far; None: unknown."""
    if "mean" not in own or "mean" not in data or own["width"] != data["width"]:
        return None
    off = float(deviations(own, data["mean"]).max())
    wider = float((np.array(data["std"]) / np.maximum(own["std"], STD_FLOOR)).max())
    return f"the data's {feature} is {off:.1f} std off, {wider:.1f} x as wide", off > OFF or wider > WIDER


def check_statistics(
    config: SmolVLAConfig, processor: Processor, data: dict[str, Any], accept: Collection[str] = ()
) -> None:
    """Raise Refused where training data lie far outside of a checkpoint's statistics, before any step.

    Args: data, as `describe_data` gives them; accept, ("statistics",) to train all the same.
    """
    own, known = describe_checkpoint(config, processor, {}), Facts.read(data)
    found = [apart(name, getattr(own, name), getattr(known, name)) for name in ("state", "action")]
    why = [text for text, far in filter(None, found) if far]
    if why and "statistics" not in accept:
        raise Refused(
            f"--statistics checkpoint: {'; '.join(why)}; use --statistics data, or go on with "
            "--accept statistics"
        )


def deviations(state: dict[str, Any], values: Sequence[float]) -> np.ndarray:
    """Return how far values lie from a feature's mean, in its deviations."""
    return np.abs(np.array(values) - state["mean"]) / np.maximum(state["std"], STD_FLOOR)


def state_problem(state: dict[str, Any], first: list[float] | None) -> str:
    """Say what in a state's statistics no LIBERO state has, or how far off the first state is; or nothing."""
    for name in ("mean", "std"):
        share = np.abs(state[name]) / STATE_LIMIT
        if share.max() > 1:
            worst = int(share.argmax())
            value = f"{name} of {STATE_NAMES[worst]} is {state[name][worst]:.3g}"
            return f"{value}: of another robot, or in other units?"
    if first is not None and (far := deviations(state, first)).max() > FAR:
        worst = int(far.argmax())
        text = f"{STATE_NAMES[worst]} is {state['mean'][worst]:.3g} on average, the first state's"
        return f"{text} {first[worst]:.3g} is {far[worst]:.0f} std off{wrapped_text(state, first, worst)}"
    if state["std"][ROLL] > 2 or state.get("min", np.zeros(STATE_DIM))[ROLL] < -2.5:
        return f"{STATE_NAMES[ROLL]} has both signs: a wrapped angle, which LIBERO's is not"
    return ""


def wrapped_text(state: dict[str, Any], first: list[float], worst: int) -> str:
    """Say so where the same rotation with its angle less 2 pi would fit."""
    wrapped = np.array(first)
    angle = max(np.linalg.norm(wrapped[3:6]), 1e-9)
    wrapped[3:6] *= 1 - 2 * np.pi / angle
    fits = worst in (3, 4, 5) and deviations(state, wrapped)[worst] <= FAR
    return f"; wrapped, less 2 pi, {wrapped[worst]:.3g} would fit" if fits else ""


def compare_rate(data: Facts | None, environment: Facts) -> Line:
    """Compare control rates; a LeRobot data set's fps is a label."""
    hz, label = (data.control_hz, data.fps) if data else (None, None)
    cell = f"{hz:g} Hz" if hz else f"fps {label:g}" if label else "-"
    why = [f"actions were taken at {cell}"] if hz and hz != environment.control_hz else []
    note = "fps is a label, LIBERO's demonstrations run at 20 Hz" if label and not hz else ""
    cells = ("-", cell, f"{environment.control_hz:g} Hz")
    return Line("rate", *cells, verdict_of(why, bool(hz)), "".join(why) or note)


def compare_noops(checkpoint: Facts, data: Facts | None) -> Line:
    """Compare the data that a checkpoint was trained on with those that are named: without frames in which
    nothing is done, or with them."""
    shares = [side.noops if side else None for side in (checkpoint, data)]
    cells = ["-" if share is None else f"{100 * share:.1f} % of frames" for share in shares]
    both = None not in shares
    why = [f"no-ops are {cells[0]} in training, {cells[1]} in the data"] * (both and few_or_none(*shares))
    return Line("no-ops", *cells, f"{SETTLE_STEPS} before the first", verdict_of(why, both), "".join(why))


def few_or_none(a: float, b: float) -> bool:
    """Say whether one side's no-ops were left out and the other's were not."""
    return min(a, b) == 0 and max(a, b) > NOOPS


def compare_steps(checkpoint: Facts, environment: Facts) -> Line:
    """Compare how many actions of each chunk are executed."""
    wanted, executed = checkpoint.n_action_steps, environment.n_action_steps
    why = [f"the checkpoint says {wanted}, {executed} of each chunk are executed"] * (wanted != executed)
    cells = (f"{wanted} of {checkpoint.chunk}", "-", f"{executed}")
    return Line("n_action_steps", *cells, verdict_of(why), "".join(why))


def compare_instructions(data: Facts | None, environment: Facts, prompt: Callable[[str], Any] = str) -> Line:
    """Look for the suite's instructions among the data's; those that are there must be the same tokens."""
    known: dict[str, list[str]] = {}
    for text in (data.tasks if data else None) or ():
        known.setdefault(plain_text(text), []).append(text)
    asked, suite = {plain_text(text): text for text in environment.tasks or ()}, " ".join(environment.suites)
    both = sorted(known.keys() & asked.keys())
    why = [f'none of {suite} is among the data\'s, such as "{min(known)}"'] if known and not both else []
    other = [key for key in both if prompt(asked[key]) not in map(prompt, known[key])]
    if other:
        said, here = known[other[0]][0], asked[other[0]]
        why.append(
            f'{len(other)} of {len(both)} are other tokens: the data say "{said}", here it is "{here}"'
        )
    note = f"{len(both)} of {suite} are among the data's" if both else ""
    cells = ("-", f"{len(known)} known" if known else "-", f"{len(asked)} of {suite}")
    return Line("instruction", *cells, verdict_of(why, bool(known)), "; ".join(why) or note)


def compare_drawing(checkpoint: Facts, data: Facts | None, environment: Facts, fit: Fit | None) -> Line:
    """Compare how pictures are drawn; what nobody recorded here was drawn in full, by LIBERO's own MuJoCo."""
    said = data if data and data.draw else checkpoint
    draw, srgb = (said.draw, said.srgb) if said.draw else (["exact"], False)
    ratio = fit.level if fit else np.nan
    why = []
    if environment.draw != draw and not without_reflections(environment, draw):
        why.append(f"drawn {environment.draw[0]}, trained on {' and '.join(draw)}: pass --draw {draw[0]}")
    if not np.isnan(ratio):  # measured, whatever versions say
        if not LEVEL <= ratio <= 1 / LEVEL:
            why.append(
                f"pictures are {ratio:.2f} x as bright as the data's: see `python -m simulator verify`"
            )
    elif None not in (srgb, environment.srgb) and srgb != environment.srgb:
        how = "darker" if environment.srgb else "brighter"
        why.append(f"MuJoCo draws a {how} floor here than in the data: ask `python -m simulator verify`")
    cells = [" and ".join(side.draw) or "-" if side else "-" for side in (checkpoint, data)]
    stated = bool(said.draw) or not np.isnan(ratio)
    note = "" if said.draw else "nothing says how the data were drawn: exact is expected"
    return Line("drawing", *cells, environment.draw[0], verdict_of(why, stated), "; ".join(why) or note)


def without_reflections(environment: Facts, draw: list[str]) -> bool:
    """Say whether only reflections are left out, in a suite whose scenes have none."""
    plain = {"libero_object", "libero_10"}.issuperset(environment.suites)
    return plain and {*environment.draw, *draw} <= {"exact", "no-reflections"}


# ---- in words -----------------------------------------------------------------------------------------


def short(camera: str) -> str:
    return camera.removeprefix("observation.images.")


def by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def sizes_text(side: Facts | None, checkpoint: Facts) -> str:
    """Name the sizes of the pictures that the policy sees, once where they are all the same."""
    sizes = {n: by(s) for n, s in side.cameras.items() if s and n in checkpoint.cameras} if side else {}
    if len(set(sizes.values())) < 2:
        return next(iter(sizes.values()), "-")
    return ", ".join(f"{short(name)} {size}" for name, size in sizes.items())


def width_text(feature: dict[str, Any] | None) -> str:
    return (
        ": ".join(str(feature[name]) for name in ("width", "layout") if name in feature) if feature else "-"
    )


def table(lines: Sequence[Line]) -> str:
    """Return a text table of at most 110 columns; reasons stand under their item."""
    widths = (16, 12, 24, 26, 30)
    rows = [("item", "verdict", "checkpoint", "data", "environment", "")]
    rows += [(x.item, x.verdict, x.checkpoint, x.data, x.environment, x.why) for x in lines]
    out = []
    for *row, why in rows:
        cells = [textwrap.wrap(c, w - 2, break_on_hyphens=False) for c, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = (cell[i] if i < len(cell) else "" for cell in cells)
            out.append("".join(f"{part:{w}s}" for part, w in zip(parts, widths, strict=True)).rstrip())
        indent = " " * (widths[0] + 2)
        out += textwrap.wrap(why, 108, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(out)


def check(lines: Sequence[Line], accept: Collection[str] = (), named: Collection[str] = ()) -> None:
    """Raise Refused, in one line, for differences that are not accepted.

    Args: accept, the items of --accept; named, items that a flag of the command line chose (n_action_steps).
    """
    if strange := [name for name in accept if name not in ITEMS]:
        raise Refused(f"--accept {' '.join(strange)} is no item: choose from {', '.join(ITEMS)}")
    stop = [x for x in lines if x.verdict == "differs" and x.item not in {*accept, *named}]
    if stop:
        found = "; ".join(f"{x.item} ({values(x)}): {x.why}" for x in stop)
        items = " ".join([*accept, *(x.item for x in stop)])
        raise Refused(f"not as in training: {found}; mend it, or go on with --accept {items}")


def values(line: Line) -> str:
    """Return what those sides say that say anything."""
    sides = {"checkpoint": line.checkpoint, "data": line.data, "environment": line.environment}
    return ", ".join(f"{side} {text}" for side, text in sides.items() if text != "-")


def record(
    lines: Sequence[Line], accept: Collection[str] = (), named: Collection[str] = ()
) -> dict[str, Any]:
    """Return the verdicts, and the differences that were accepted, to be stored beside results."""
    accepted = [x.item for x in lines if x.verdict == "differs" and x.item in {*accept, *named}]
    return {x.item: x.verdict for x in lines} | {"accepted": accepted}
