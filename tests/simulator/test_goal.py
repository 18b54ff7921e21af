"""An ambiguous task: what it asks for in goals and words, and demonstrations that go either way."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from simulator import env as sim
from simulator import pool
from simulator.goal import either_goal, parse_either, way
from simulator.record import DemoConfig, Job

ROOT = Path(__file__).resolve().parents[2]
CHEESE = "pick up the cream cheese and place it in the basket"
BDDL = """(:objects cream_cheese_1 - cream_cheese basket_1 - basket milk_1 - milk butter_1 - butter)
(:obj_of_interest cream_cheese_1 basket_1) (:init (On milk_1 floor_region))
(:goal (And (In cream_cheese_1 basket_1_contain_region)))"""


def test_one_object_or_two_are_named_and_none_is_the_task_as_shipped():
    assert [parse_either(text) for text in ("", "milk", "cream_cheese,milk")] == [
        [],
        ["milk"],
        ["cream_cheese", "milk"],
    ]
    for bad in (",", "milk,", "milk,milk", "a,b,c", "cream cheese", "milk_1", "Milk"):
        with pytest.raises(ValueError, match=f"--either '{bad}' is not one object or two"):
            sim.SimConfig(either=bad)
        with pytest.raises(ValueError, match="--either"):
            DemoConfig(either=bad)


@pytest.mark.parametrize(
    ("either", "things", "words"),
    [
        ("milk", ["cream_cheese_1", "milk_1"], "the cream cheese or the milk"),
        ("milk,cream_cheese", ["milk_1", "cream_cheese_1"], "the milk or the cream cheese"),
        ("milk,butter", ["milk_1", "butter_1"], "the milk or the butter"),
    ],
)
def test_each_object_has_a_goal_and_the_instruction_names_both(either, things, words):
    goals, language = either_goal(BDDL, CHEESE, either)
    assert goals == [("In", thing, "basket_1_contain_region") for thing in things]
    assert language == f"pick up {words} and place it in the basket"


def test_objects_that_the_scene_lacks_and_tasks_of_another_kind_are_one_line():
    for missing in ("beer", "basket", "cream_cheese", "milk,beer"):
        with pytest.raises(ValueError, match=f"--either {missing}: besides its own .* only butter, milk$"):
            either_goal(BDDL, CHEESE, missing)
    for text, language in (
        (BDDL, "put the black bowl on the plate"),
        (BDDL[:-1] + "(In milk_1 basket_1_contain_region))", CHEESE),
        (BDDL.replace("(In cream", "(Open cream"), CHEESE),
    ):
        with pytest.raises(ValueError, match=r"names no single object .*: choose one of libero_object$"):
            either_goal(text, language, "milk")


def test_shipped_tasks_answer_for_themselves_without_a_simulator():
    sim.check_either("libero_object", 1, "cream_cheese,milk")
    with pytest.raises(
        ValueError, match=r"--either beer: besides its own cream_cheese, .* only alphabet_soup"
    ):
        sim.check_either("libero_object", 1, "beer")


def test_of_each_pair_of_attempts_from_one_start_one_goes_each_way_in_random_order(tmp_path):
    ways = np.array([way(7, attempt) for attempt in range(400)]).reshape(-1, 2)
    assert (ways.sum(1) == 1).all() and 70 < ways[:, 0].sum() < 130
    assert not np.array_equal(ways, [[way(8, 2 * j), way(8, 2 * j + 1)] for j in range(200)])
    made = DemoConfig(tmp_path, init_states="3,0", either="milk")
    starts = [Job(made, 1, attempt, None).start for attempt in range(6)]
    assert starts == [(3, 0), (3, 0), (0, 0), (0, 0), (3, 1), (3, 1)]


# ---------------------------------------------------------------- with the simulator


@pytest.mark.slow
def test_two_demonstrations_from_one_start_go_either_way_and_libero_judges_both(tmp_path):
    flags = "--task-ids 1 --init-states 3 --size 64 --workers 1 --demos-per-task 2 --displace 0.06 --noise 0"
    command = [sys.executable, "-m", "simulator", "record", *flags.split(), "--either", "milk"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*_demo.hdf5")
    with h5py.File(path) as file:
        data = file["data"]
        assert (data.attrs["either"], "the cream cheese or the milk" in data.attrs["language"]) == (
            "milk",
            True,
        )
        demos = {demo.attrs["taken"]: demo for demo in data.values()}
        assert set(demos) == {"milk", "cream_cheese"}
        one, other = demos.values()
        assert np.array_equal(one["states"][0], other["states"][0])
        moved = one.attrs["init_state"] - pool.in_fresh_process(shipped_start, 3)
        assert sorted(np.abs(moved[np.abs(moved) > 1e-3]) <= 0.06) == [True] * 4  # x and y of both objects
        actions = {taken: demo["actions"][:] for taken, demo in demos.items()}
    assert pool.in_fresh_process(replayed, ("milk", actions)) == {
        "milk": (True, "milk"),
        "cream_cheese": (True, "cream_cheese"),
        "milk, let go": (False, "milk"),
    }


def shipped_start(init_state: int) -> np.ndarray:
    return sim.LiberoEnv(sim.SimConfig("libero_object"), 1, render=False).init_states[init_state]


def replayed(given: tuple[str, dict[str, np.ndarray]]) -> dict[str, tuple[bool, str | None]]:
    """Return success and what was taken of demonstrations, and of one whose hand opens half way up."""
    either, actions = given
    cut = actions["milk"].copy()
    lifted = int(np.argmax(cut[:, 6] > 0)) + 14
    cut[lifted:, 6] = -1
    config = sim.SimConfig("libero_object", size=64, reset="soft", displace=0.06, either=either)
    env, found = sim.LiberoEnv(config, 1, render=False), {}
    for name, run in {**actions, "milk, let go": cut}.items():
        env.reset(3)
        success = [env.step(action)[1] for action in run]
        shipped = type(env.raw)._check_success(env.raw)  # LIBERO's own goal: the cream cheese
        assert shipped == (name == "cream_cheese") and not any(success[:-1])
        found[name] = (success[-1], env.taken)
    return found
