"""What a task asks for, and an ambiguous task: either of two objects in its place solves it (`--either`).

The instruction names both objects and the expert goes either way from one and the same start, so that two
futures are right: where a bank of hypotheses should help. LIBERO's own predicates judge each object.

    python -m simulator record --task-ids 1 --either cream_cheese,milk --displace 0.06 --out data/either
    pytest tests/simulator/test_goal.py
"""

import re

import numpy as np

from files import Refused

Goal = tuple[str, str, str]  # On | In, object, place


def goal_predicates(bddl: str) -> list[Goal]:
    """Return the (On | In, object, place) triples of a task's BDDL text, in order."""
    return re.findall(r"\((On|In) (\S+) ([^\s)]+)\)", bddl[bddl.index("(:goal") :])


def parse_either(text: str) -> list[str]:
    """Return the one or two objects of 'milk' or 'cream_cheese,milk'; none of ''. Raises Refused."""
    names = text.split(",") if text else []
    if len(set(names)) < len(names) or len(names) > 2 or not all(re.fullmatch("[a-z_]+", n) for n in names):
        raise Refused(f"--either {text!r} is not one object or two: write it like milk or cream_cheese,milk")
    return names


def either_goal(bddl: str, language: str, either: str) -> tuple[list[Goal], str]:
    """Return the goals of which any one will do, and the instruction that names their objects.

    either: the task's own object or this one; or one of these two. Raises Refused for a task that asks for
    more than one object, or names its object otherwise, and for objects that it lacks.
    """
    goals, names = goal_predicates(bddl), parse_either(either)
    own = short(goals[0][1]) if len(goals) == 1 else ""
    if not own or worded(own) not in language:
        raise Refused(
            f"--either {either}: the task {language!r} names no single object as LIBERO's scene does: "
            "choose one of libero_object"
        )
    [(predicate, _, place)] = goals
    names = names if len(names) == 2 else [own, *names]
    scene = re.findall(r"\S+_\d+", bddl[bddl.index("(:objects") : bddl.index("(:obj_of_interest")])
    there = sorted(short(thing) for thing in scene if not place.startswith(thing))
    for name in names:
        if name not in there or names == [own, own]:
            choice = ", ".join(n for n in there if n != own)
            raise Refused(f"--either {either}: besides its own {own}, {language!r} has only {choice}")
    both = " or ".join(map(worded, names))
    return [(predicate, f"{name}_1", place) for name in names], language.replace(worded(own), both)


def short(thing: str) -> str:
    """Return an object's name without its number: cream_cheese of cream_cheese_1."""
    return re.sub(r"_\d+$", "", thing)


def worded(name: str) -> str:
    """Return an object's name as instructions say it: the cream cheese."""
    return "the " + name.replace("_", " ")


def way(seed: int, attempt: int) -> int:
    """Return which of the two goals the expert goes for: attempts 2j and 2j + 1 differ, in random order."""
    first = int(np.random.default_rng([seed, attempt // 2]).integers(2))
    return (first + attempt) % 2
