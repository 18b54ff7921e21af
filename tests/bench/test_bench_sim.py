"""What `bench sim` lays out and adds up. The slow ones need the simulator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import simulator
from bench.simulator import Case, SimOptions

ROOT = Path(__file__).resolve().parents[2]


class FakePool:
    """Answers at once, the last environment that was asked first; remembers what was run."""

    def __init__(self, num_envs: int, done: bool = False) -> None:
        self.num_envs, self.done, self.ran, self.waiting = num_envs, done, [], []

    def run(self, i, actions, frames):
        self.ran.append((i, actions, tuple(frames)))
        self.waiting.append(i)

    def ready(self):
        return [(self.waiting.pop(), SimpleNamespace(done=self.done))]


def test_every_environment_executes_every_block_of_a_window():
    pool, options = FakePool(3), SimOptions(decide_every=4)
    rate = simulator.run_window(pool, options, [(4, "camera")], first=5, blocks=2)
    assert Counter(i for i, *_ in pool.ran) == {0: 2, 1: 2, 2: 2} and rate > 0
    for env in range(3):
        blocks = [actions for i, actions, _ in pool.ran if i == env]
        for found, number in zip(blocks, (5, 6), strict=True):
            np.testing.assert_array_equal(found, simulator.actions_of(options, number))
    assert all(frames == ((4, "camera"),) for *_, frames in pool.ran)


def test_a_window_in_which_an_episode_ended_counts_for_nothing():
    with pytest.raises(ValueError, match="solved by chance"):
        simulator.run_window(FakePool(1, done=True), SimOptions(), [], 0, 1)


def test_each_number_of_processes_draws_always_and_at_decisions():
    cases = simulator.plan(SimOptions(num_envs=(1, 3)), repeats=2, blocks=1)
    assert [(case.when, case.num_envs) for case in cases] == [
        ("libero", 1), ("always", 1), ("decisions", 1), ("always", 3), ("decisions", 3),
    ]  # fmt: skip
    assert len({case.name for case in cases}) == 5


def test_a_rate_stands_beside_drawing_always_with_as_many_processes_and_beside_liberos():
    cases = simulator.plan(SimOptions(), 1, 1)
    rows = simulator.compare(cases, [5.0, 6.0, 30.0, 8.0, 60.0])
    assert [row.get("times_faster_than_always") for row in rows] == [5 / 6, 1.0, 5.0, 1.0, 7.5]
    assert [row["times_faster_than_libero"] for row in rows] == [1.0, 1.2, 6.0, 1.6, 12.0]
    alone = simulator.compare(cases[2:3], [30.0])
    assert set(alone[0]) == {"case", "num_envs", "steps_per_second"}
    assert "5.00 x" in simulator.table(rows) and "12.00 x" in simulator.table(rows)


def episode(**fields) -> dict:
    line = {"crash": None, "steps": 20, "decisions": 2, "seconds": 10.0}
    return line | {"physics_seconds": 4.0, "drawing_seconds": 3.0, "policy_seconds": 2.0} | fields


def test_an_evaluations_parts_add_up_to_what_its_episodes_took():
    found = simulator.shares([episode(), episode(seconds=30.0, crash="died")])
    parts = (*simulator.PARTS, "waiting")
    assert sum(found[f"{part}_seconds"] for part in parts) == found["episode_seconds"] == 40
    assert [found[f"{part}_share"] for part in parts] == [0.2, 0.15, 0.1, 0.55]
    assert (found["episodes"], found["crashes"], found["steps"], found["decisions"]) == (2, 1, 40, 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"suite": "libero_spacial"}, "libero_spatial"),
        ({"task_id": 10}, "0..9"),
        ({"num_envs": (1, 0)}, "--num-envs"),
        ({"decide_every": 0}, "--decide-every 0"),
        ({"max_steps": 0}, "--max-steps 0"),
        ({"episodes": 51}, "--episodes 51"),
        ({"draw": "pretty"}, "no-reflections"),
    ],
)
def test_mistakes_are_named_in_one_line_with_the_flag(flags, words):
    with pytest.raises(ValueError, match=words) as caught:
        SimOptions(**flags)
    assert "\n" not in str(caught.value)


def test_a_name_that_no_case_has_is_answered_with_all_names():
    with pytest.raises(ValueError, match=r"--only 'nothing' .*LIBERO's own.*evaluation of 2 episodes"):
        next(simulator.lines(SimOptions(), "tiny", None, None, (1, 1), "nothing"))


# ---------------------------------------------------------------- with the simulator


@pytest.mark.slow
def test_a_rate_is_measured_in_the_simulator():
    options = SimOptions("libero_object", picture_size=64)
    assert simulator.measure(Case("decisions", options, when="decisions", repeats=1, blocks=1)) > 0


@pytest.mark.slow
def test_less_is_computed_than_by_robosuites_own_step():
    options = SimOptions("libero_object", 1, "fast", picture_size=16)
    rows = simulator.compare_cpu(options, simulator.ATTEMPTS[:1], 1)
    assert [row["case"] for row in rows] == [
        "control step", "episode of 100 steps", "demonstrations, 1 tried"
    ]  # fmt: skip
    assert rows[0]["times_less_cpu"] > 1.3 and all(row["cpu_seconds"] > 0 for row in rows)
    assert "control step" in simulator.table(rows)


@pytest.mark.slow
def test_an_evaluation_is_a_json_line_and_rows_of_its_parts(tmp_path):
    out = tmp_path / "bench.jsonl"
    flags = ["--only", "evaluation", "--size", "tiny", "--episodes", "1", "--num-envs", "1"]
    flags += ["--picture-size", "64", "--max-steps", "15", "--out", out]
    command = [sys.executable, "-m", "bench", "sim", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["episodes"], row["steps"], row["decisions"], row["crashes"]) == (1, 15, 2, 0)
    assert min(row[f"{part}_seconds"] for part in simulator.PARTS) > 0
    assert row["seconds"] > row["episode_seconds"]
    table = done.stdout.splitlines()[1:]
    assert "evaluation of 1 episode, 1 at once" in table[0] and len(table) == 5
