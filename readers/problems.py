"""What cannot be right in a data set, whatever its layout: `data.py check` collects it, a training stops.

Each function yields a line for each thing that is wrong, or nothing.

    for problem in far_values("action", action, episode, step): ...
    pytest tests/readers/test_as_people_have_them.py

Shapes: F frames, D a vector's width.
"""

from collections.abc import Iterator, Mapping

import numpy as np

FAR = (
    1e4  # times what the rest reaches: the least that a flipped high bit of a float's exponent does is 65,536
)
FEW = 10  # frames of which no value stands out
OFF, WIDER, OUTSIDE = 1.0, 3.0, 1.0  # statistics against the data: deviations, their ratio, ranges
ROUNDING = 1e-3  # of a dimension's largest value: spreads below it are lost where squares are in float32
RECOMPUTE = "correct the file, or add --statistics computed"

Moments = Mapping[str, np.ndarray]  # mean, std, min, max, maybe q01 and so on -> (D,)


def not_finite(name: str, values: np.ndarray, episode: np.ndarray, step: np.ndarray) -> Iterator[str]:
    """Name the episodes (F,) with a value (F, D) that is no number in float32, by their first such step."""
    with np.errstate(over="ignore"):
        rows = np.flatnonzero(~np.isfinite(values.astype(np.float32)).all(1))
    for number in np.unique(episode[rows]):
        first = step[rows[episode[rows] == number][0]]
        yield f"{name} has a non-finite value at step {first} of episode {number}"


def far_values(name: str, values: np.ndarray, episode: np.ndarray, step: np.ndarray) -> Iterator[str]:
    """Name values (F, D) that the others make impossible: normalised, they would make all others 0."""
    if len(values) < FEW:
        return
    size = np.where(np.isfinite(values), np.abs(values), 0).astype(np.float64)
    few = max(1, len(size) // 1000)
    rest = np.partition(size, -few - 1, axis=0)[-few - 1]  # (F, D) -> (D,): what all but a few reach
    limit = FAR * np.maximum(rest, np.median(rest))
    for dim in np.flatnonzero((limit > 0) & (size > limit).any(0)):
        row = int(size[:, dim].argmax())
        where = f"dimension {dim} at step {step[row]} of episode {episode[row]}"
        yield f"{name} is {values[row, dim]:.3g} in {where}, the rest lies within {rest[dim]:.3g}"


def wrong_statistics(where: str, stored: Mapping[str, Moments], own: Mapping[str, Moments]) -> Iterator[str]:
    """Name what stored statistics say of the data that these are not, the worst dimension of each kind."""
    for feature, given in stored.items():
        seen = {key: np.asarray(value, np.float64) for key, value in own[feature].items()}
        given = {key: np.asarray(value, np.float64) for key, value in given.items()}
        least = ROUNDING * np.maximum(np.abs(seen["min"]), np.abs(seen["max"])) + 1e-12
        spread = np.maximum(seen["std"], least)
        moves = seen["std"] > least
        wide = np.maximum(given["max"] - given["min"], 0)
        span, ratio = OUTSIDE * wide + least, np.maximum(given["std"], least) / spread
        excess = {
            "mean": np.abs(given["mean"] - seen["mean"]) / (OFF * spread),
            "std": np.where(moves, np.maximum(ratio, 1 / ratio) / WIDER, 0) + 2 * (given["std"] < 0),
            "min": (given["min"] - seen["min"]) / span,
            "max": (seen["max"] - given["max"]) / span,
        }
        for low, high in (("q01", "q99"), ("q10", "q90")):
            if low in given and high in given:
                room = OUTSIDE * (seen["max"] - seen["min"]) + least
                excess[low] = np.where(moves & (given[high] <= given[low]), 2, 0)
                excess[low] = np.maximum(excess[low], (seen["min"] - given[low]) / room)
                excess[high] = (given[high] - seen["max"]) / room
        for key, beyond in excess.items():
            if beyond.max(initial=0) > 1:
                dim = int(beyond.argmax())
                says = f"{key} of {feature}, dimension {dim}, is {given[key][dim]:.6g}"
                yield f"{where}: {says}, that of the data {seen[key][dim]:.6g}: {RECOMPUTE}"
