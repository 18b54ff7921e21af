"""What differs between checkpoint, data and environment is found where it is, and nothing else is claimed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from test_data import toy_demos
from tiny import CONFIG, golden

from model import load_policy
from readers.demos import StoredPictures, statistics
from readers.load import load
from readers.selection import suite_instructions
from rollouts import conform, facts
from rollouts.conform import (
    check,
    compare,
    describe_checkpoint,
    describe_data,
    describe_environment,
    record,
    table,
)
from simulator.env import CAMERAS, SimConfig
from simulator.pool import Observation
from smolvla.checkpoint import fresh_processor

HERE = Path(__file__).resolve().parents[1]
FRONT, WRIST = CAMERAS
SPATIAL = "pick up the black bowl between the plate and the ramekin and place it on the plate"
# of libero_spatial task 0, init state 25, whose first pictures are in tests/conform
STATE = [-0.2102, 0.001, 1.1605, 3.1396, 0.0047, -0.091, 0.0387, -0.0387]


def picture(name: str) -> np.ndarray:
    return np.asarray(Image.open(HERE / name).convert("RGB"))


def recorded(episode: str) -> SimpleNamespace:
    """A recorded episode: states, actions, and its first pictures (256, 256, 3) by camera."""
    folder = HERE / "libero_env" / episode
    with np.load(folder / "run.npz") as run:
        state, action, raw = run["state"][:-1], run["actions"], run["raw"][:-1]
    names = {FRONT: "step00_image.png", WRIST: "step00_image2.png"}
    pictures = {camera: picture(f"libero_env/{episode}/{name}") for camera, name in names.items()}
    return SimpleNamespace(state=state, action=action, raw=raw, pictures=pictures)


def write_demos(path: Path, pictures: dict[str, np.ndarray], suite: str, instruction: str, draw: str) -> Path:
    """Write a recorded episode as our recordings are, its first pictures standing in for others."""
    episode = recorded("success_libero_spatial_task0_init0")
    length = len(episode.action)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"suite": suite, "task_id": 0, "draw": draw, "size": pictures[FRONT].shape[0]})
        data.attrs.update({"pairing": "observation_before_action", "num_demos": 1})
        data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
        data.attrs["versions"] = json.dumps({"mujoco": "3.3.2"})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        demo = data.create_group("demo_0")
        demo.attrs.update({"num_samples": length, "init_state_id": 0})
        demo["actions"] = episode.action
        parts = np.split(episode.state, [3, 6], axis=1)
        for name, part in zip(("ee_pos", "ee_ori", "gripper_states"), parts):
            demo[f"obs/{name}"] = part
        for camera, name in ((FRONT, "agentview_rgb"), (WRIST, "eye_in_hand_rgb")):
            stack = np.repeat(pictures[camera][None, ::-1, ::-1], length, axis=0)  # raw, upside down
            demo.create_dataset(f"obs/{name}", data=stack, compression="lzf", chunks=(1, *stack.shape[1:]))
    return path


def observe(**frames: np.ndarray) -> Observation:
    named = {FRONT: frames.get("front"), WRIST: frames.get("wrist")}
    seen = {(0, camera): frame for camera, frame in named.items() if frame is not None}
    return Observation(np.array(STATE, np.float32), seen, False, False, 0, SPATIAL, 0.0, 0.0)


def checkpoint_of(demos) -> tuple:
    """What train.py starts from on these data."""
    shape = (3, *demos.images[FRONT].shape[1:3])
    return CONFIG, fresh_processor(CONFIG, statistics(demos), demos.tasks, shape)


@pytest.fixture(scope="module")
def spatial(tmp_path_factory):
    pictures = recorded("success_libero_spatial_task0_init0").pictures
    path = tmp_path_factory.mktemp("spatial") / "bowl_demo.hdf5"
    return load(write_demos(path, pictures, "libero_spatial", SPATIAL, "exact"), in_memory=False)


@pytest.fixture
def case(spatial) -> SimpleNamespace:
    """A run on recorded data, about to be rolled out from another start of the same task."""
    config, processor = checkpoint_of(spatial)
    data = json.loads(json.dumps(describe_data(spatial)))
    front, wrist = (picture(f"conform/spatial0_init25_{name}.png") for name in ("image", "image2"))
    return SimpleNamespace(
        config=config, processor=processor, data=data, sim=SimConfig("libero_spatial"),
        run={"data_provenance": spatial.provenance, "data_facts": data},
        n_action_steps=3, front=front, wrist=wrist,
    )  # fmt: skip


def lines_of(case: SimpleNamespace) -> list[conform.Line]:
    environment = describe_environment(
        case.sim, case.n_action_steps, observe(front=case.front, wrist=case.wrist)
    )
    return compare(describe_checkpoint(case.config, case.processor, case.run), case.data, environment)


def verdicts(lines: list[conform.Line]) -> dict[str, str]:
    return {line.item: line.verdict for line in lines}


def differing(lines: list[conform.Line]) -> list[str]:
    return [line.item for line in lines if line.verdict == "differs"]


# ---- damage -------------------------------------------------------------------------------------------


def turn_both(case):
    case.front, case.wrist = case.front[::-1, ::-1], case.wrist[::-1, ::-1]


def turn_the_wrist(case):
    case.wrist = case.wrist[::-1, ::-1]


def mirror(case):
    case.front, case.wrist = case.front[:, ::-1], case.wrist[:, ::-1]


def swap(case):
    case.front, case.wrist = case.wrist, case.front


def draw_at_360(case):
    case.sim = SimConfig("libero_spatial", size=360)
    case.front, case.wrist = (
        np.asarray(Image.fromarray(x).resize((360, 360))) for x in (case.front, case.wrist)
    )


def change_statistics(case, feature: str, values: np.ndarray) -> None:
    """Let the checkpoint have been trained on other states or actions (F, D)."""
    exact = torch.from_numpy(np.asarray(values, np.float64))
    found = {"mean": exact.mean(0), "std": exact.std(0), "min": exact.amin(0), "max": exact.amax(0)}
    stats = case.processor.stats | {feature: {k: v.float() for k, v in found.items()}}
    case.config = dataclasses.replace(case.config, **{f"{feature.split('.')[-1]}_dim": values.shape[1]})
    case.processor = dataclasses.replace(case.processor, config=case.config, stats=stats, stats_after=stats)


def quaternion_state(case):
    change_statistics(case, "observation.state", recorded("libero_goal_task1_init0").raw[:, :9])


def wrapped_state(case):
    state = recorded("success_libero_spatial_task0_init0").state.copy()
    state[:, 3:6] = Rotation.from_rotvec(state[:, 3:6]).as_rotvec()
    change_statistics(case, "observation.state", state)


def always_wrapped_state(case):
    state = recorded("success_libero_spatial_task0_init0").state.copy()
    state[:, 3] -= 2 * np.pi
    change_statistics(case, "observation.state", state)
    del case.processor.stats["observation.state"]["min"]


def state_in_degrees(case):
    state = np.random.default_rng(0).normal(40, 60, (200, 8))  # a joint robot's
    change_statistics(case, "observation.state", state)


def absolute_action(case):
    state = recorded("success_libero_spatial_task0_init0").state
    change_statistics(case, "action", state[1:, :7])


def gripper_from_0_to_1(case):
    action = recorded("success_libero_spatial_task0_init0").action.copy()
    action[:, 6] = action[:, 6] > 0
    change_statistics(case, "action", action)


def another_camera(case):
    case.config = dataclasses.replace(case.config, cameras=(FRONT, WRIST, "observation.images.image3"))


def another_suite(case):
    case.data["tasks"] = sorted(suite_instructions("libero_goal"))


def drawn_fast(case):
    case.sim = SimConfig("libero_spatial", draw="fast")


def more_actions(case):
    case.n_action_steps = 6


def another_rate(case):
    case.data["control_hz"] = 10


DAMAGE: dict[Callable, str] = {
    turn_both: "rotation", turn_the_wrist: "rotation", mirror: "rotation", swap: "cameras",
    draw_at_360: "sizes", quaternion_state: "state", wrapped_state: "statistics",
    always_wrapped_state: "statistics", state_in_degrees: "statistics", absolute_action: "action",
    gripper_from_0_to_1: "action", another_camera: "cameras", another_suite: "instruction",
    drawn_fast: "drawing", more_actions: "n_action_steps", another_rate: "rate",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_found_at_its_item_and_at_no_other(damage, case):
    damage(case)
    lines = lines_of(case)
    assert differing(lines) == [DAMAGE[damage]], table(lines)
    with pytest.raises(ValueError, match=f"{DAMAGE[damage]} .*--accept {DAMAGE[damage]}$") as error:
        check(lines)
    assert "\n" not in str(error.value)
    check(lines, accept=[DAMAGE[damage]])


def test_what_is_found_is_said_in_words(case):
    said = {}
    for damage in (turn_both, mirror, swap, always_wrapped_state, quaternion_state):
        damaged = SimpleNamespace(**vars(case))
        damage(damaged)
        said[damage] = next(x.why for x in lines_of(damaged) if x.verdict == "differs")
    assert "image fits the data when turned by 180 degrees" in said[turn_both]
    assert "mirrored" in said[mirror] and "image looks like the data's image2" in said[swap]
    assert "axis-angle x" in said[always_wrapped_state] and "wrapped" in said[always_wrapped_state]
    assert "9 is not 8" in said[quaternion_state] and "quaternion" in said[quaternion_state]


# ---- no damage ----------------------------------------------------------------------------------------


def test_a_run_on_its_own_data_agrees_in_every_item(case):
    assert set(verdicts(lines_of(case)).values()) == {"agrees"}


@pytest.mark.parametrize("small", [16, 128])
def test_small_pictures_drawn_fast_agree_with_data_drawn_so(tmp_path, small):
    first = recorded("success_libero_spatial_task0_init0").pictures
    shrunk = {c: np.asarray(Image.fromarray(p).resize((small, small))) for c, p in first.items()}
    path = write_demos(tmp_path / "bowl_demo.hdf5", shrunk, "libero_spatial", SPATIAL, "fast")
    demos = load(path)
    seen = [picture(f"conform/spatial0_init25_{name}.png") for name in ("image", "image2")]
    front, wrist = (np.asarray(Image.fromarray(p).resize((small, small))) for p in seen)
    sim = SimConfig("libero_spatial", size=small, draw="fast", displace=0.06)
    environment = describe_environment(sim, 3, observe(front=front, wrist=wrist))
    run = {"data_provenance": demos.provenance, "data_facts": describe_data(demos)}
    checkpoint = describe_checkpoint(*checkpoint_of(demos), run)
    assert set(verdicts(compare(checkpoint, describe_data(demos), environment)).values()) == {"agrees"}
    older = verdicts(compare(checkpoint, None, environment))  # a run that kept no facts of its data
    assert "differs" not in older.values() and older["sizes"] == older["drawing"] == "agrees"


def test_an_ambiguous_task_agrees_with_its_own_data_alone(case):
    both = SPATIAL.replace("the black bowl", "the black bowl or the ramekin", 1)
    seen = dataclasses.replace(observe(front=case.front, wrist=case.wrist), language=both)
    checkpoint = describe_checkpoint(case.config, case.processor, case.run)
    for either, trained_on, differs in (
        ("ramekin", both, []), ("ramekin", SPATIAL, ["instruction"]), ("", both, ["instruction"]),
    ):  # fmt: skip
        environment = describe_environment(SimConfig("libero_spatial", either=either), 3, seen)
        assert differing(compare(checkpoint, case.data | {"tasks": [trained_on]}, environment)) == differs


def test_of_a_published_checkpoint_nothing_is_claimed_that_it_does_not_say(case):
    case.data, case.run = None, {}
    found = verdicts(lines_of(case))
    assert "differs" not in found.values()
    unknown = {"rotation", "rate", "no-ops", "instruction", "drawing"}
    assert {item for item, verdict in found.items() if verdict == "not stated"} == unknown
    case.sim = SimConfig("libero_spatial", draw="fast")
    assert differing(lines_of(case)) == ["drawing"]


def test_a_fine_tuned_checkpoint_may_keep_wider_statistics_and_an_older_size(case):
    state = np.random.default_rng(1).normal(
        [-0.05, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027],  # those of all of LIBERO
        [0.10, 0.15, 0.38, 0.34, 0.91, 0.33, 0.014, 0.014], (5000, 8),
    )  # fmt: skip
    change_statistics(case, "observation.state", state)
    case.processor.raw["input_features"][FRONT]["shape"] = [3, 480, 640]
    case.run = {}
    lines = {line.item: line for line in lines_of(case)}
    assert lines["statistics"].verdict == lines["sizes"].verdict == "agrees"
    assert "the data's state is" in lines["statistics"].why and "480 x 640" in lines["sizes"].why


def test_a_checkpoint_of_another_robot_differs_where_it_is_another():
    policy, processor = load_policy(golden() / "checkpoint")
    found = verdicts(
        compare(
            describe_checkpoint(policy.config, processor, {}),
            None,
            describe_environment(SimConfig("libero_goal"), policy.config.n_action_steps),
        )
    )
    assert [item for item in found if found[item] == "differs"] == ["cameras", "state", "action"]


def test_cameras_that_the_preprocessor_renames_are_there(case):
    named = ("observation.images.camera1", "observation.images.camera2")
    case.config = dataclasses.replace(case.config, cameras=named)
    assert "cameras" in differing(lines_of(case))
    names = dict(zip(CAMERAS, named))
    case.processor.before["steps"][0]["config"]["rename_map"] = names
    case.processor.raw["input_features"] = {n: {"shape": [3, 256, 256]} for n in named}
    assert differing(lines_of(case)) == []


@pytest.mark.parametrize("name", ["L_image", "L_video"])
def test_pictures_that_are_not_liberos_give_no_verdict_on_pictures(name, case):
    case.data = describe_data(load(HERE / "lerobot_v3" / name / "dataset", in_memory=False))
    found = verdicts(lines_of(case))
    assert found["cameras"] == "agrees" and found["rotation"] == "not stated"
    assert found["rate"] == "not stated"  # fps is a label
    assert found["instruction"] == found["sizes"] == "differs"


@pytest.mark.parametrize("words", [SPATIAL.title(), SPATIAL.replace(" ", "_"), f"{SPATIAL} "])
def test_instructions_that_read_alike_and_are_other_tokens_differ(words, case):
    prompt = lambda text: case.processor.tokenize([text])[0].tolist()  # noqa: E731
    environment = describe_environment(case.sim, 3, observe(front=case.front, wrist=case.wrist))
    checkpoint = describe_checkpoint(case.config, case.processor, case.run)
    assert differing(compare(checkpoint, case.data, environment, prompt)) == []
    case.data["tasks"] = [words]
    [line] = [x for x in compare(checkpoint, case.data, environment, prompt) if x.verdict == "differs"]
    assert line.item == "instruction" and f'the data say "{words}", here it is "{SPATIAL}"' in line.why
    case.data["tasks"].append(SPATIAL)  # as two recorders wrote it
    assert differing(compare(checkpoint, case.data, environment, prompt)) == []


def test_a_gripper_with_its_sign_turned_shows_in_the_fingers(spatial, case):
    assert case.data["action"]["closes"] == 1
    action = spatial.action.copy()
    action[:, 6] *= -1
    case.data = describe_data(dataclasses.replace(spatial, action=action))
    change_statistics(case, "action", action)
    [line] = [x for x in lines_of(case) if x.verdict == "differs"]
    assert line.item == "action" and "gripper closes at -1" in line.why
    still = spatial.state.copy()
    still[:, 6:] = 0.02  # a hand that never moves says nothing
    assert "closes" not in describe_data(dataclasses.replace(spatial, state=still))["action"]


def test_every_recorded_gripper_closes_at_plus_one():
    for episode in ("success_libero_spatial_task0_init0", "libero_goal_task1_init0"):
        found = recorded(episode)
        demos = toy_demos([len(found.action)])
        demos = dataclasses.replace(demos, state=found.state[: len(found.action)], action=found.action)
        assert facts.gripper(demos) == {"closes": 1}, episode


# ---- the floor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mujoco, wanted", [("3.3.2", []), ("3.3.7", ["drawing"])])
def test_a_darker_floor_is_seen_in_the_pictures(tmp_path, mujoco, wanted):
    known = picture("render/mujoco-3.3.2_object0/step00_image.png")
    pictures = {FRONT: known, WRIST: recorded("libero_goal_task1_init0").pictures[WRIST]}
    task = "pick up the alphabet soup and place it in the basket"
    path = write_demos(tmp_path / "soup_demo.hdf5", pictures, "libero_object", task, "exact")
    demos = load(path, in_memory=False)
    seen = observe(front=picture(f"render/mujoco-{mujoco}_object0/step00_image.png"))
    environment = describe_environment(SimConfig("libero_object"), 3, seen)
    checkpoint = describe_checkpoint(*checkpoint_of(demos), {"data_provenance": demos.provenance})
    lines = compare(checkpoint, describe_data(demos), environment)
    assert differing(lines) == wanted
    assert ("simulator verify" in lines[-1].why) == bool(wanted)


@pytest.mark.parametrize(
    "mujoco, texture, darker",
    [("3.3.2", "as_installed", False), ("3.3.3", "as_installed", True), ("3.10.0", "as_installed", True),
     ("3.3.7", "linear", False), ("", "as_installed", None)],
)  # fmt: skip
def test_without_pictures_the_versions_say_which_floor_is_drawn(mujoco, texture, darker, case, monkeypatch):
    monkeypatch.setattr(facts, "versions", lambda: {"mujoco": mujoco})
    environment = describe_environment(dataclasses.replace(case.sim, texture_colorspace=texture), 3)
    assert environment.srgb is darker
    found = verdicts(
        compare(describe_checkpoint(case.config, case.processor, case.run), case.data, environment)
    )
    assert found["drawing"] == ("differs" if darker else "agrees")


# ---- facts --------------------------------------------------------------------------------------------


def test_facts_are_few_bytes_and_few_pictures_even_of_forty_tasks():
    demos = toy_demos([3] * 80, size=20)
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    tasks = [task for suite in suites for task in sorted(suite_instructions(suite))]
    read = []

    def reading(camera: str) -> StoredPictures:
        def take(place: int, steps: np.ndarray) -> np.ndarray:
            read.append(camera)
            return demos.images[camera][demos.first[place] + steps]

        return StoredPictures(demos.images[camera].shape, list(range(80)), demos.first, take)

    stored = dataclasses.replace(
        demos, images={c: reading(c) for c in CAMERAS}, tasks=tasks, task=np.repeat(np.arange(80) % 40, 3)
    )
    found = describe_data(stored)
    assert len(json.dumps(found)) < 10_000
    assert max(map(read.count, CAMERAS)) <= facts.FRAMES
    in_memory = dataclasses.replace(stored, images=demos.images)
    assert describe_data(in_memory) == found
    read.clear()
    assert describe_data(stored, pictures=False) == found | {"sketches": {}} and not read


def test_facts_that_another_version_kept_are_read(case):
    case.data |= {"colour_of_the_robot": "white"}
    del case.data["fps"]
    assert differing(lines_of(case)) == []


def test_hdf5_data_state_their_rate_and_say_nothing_where_they_do_not(spatial, tmp_path):
    assert describe_data(spatial)["control_hz"] == 20
    path = write_demos(tmp_path / "a_demo.hdf5", recorded("libero_goal_task1_init0").pictures, "x", "go", "y")
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = "none"
    assert describe_data(load(path, in_memory=False))["control_hz"] is None


# ---- verdicts in words --------------------------------------------------------------------------------


def test_named_items_are_shown_and_do_not_stop(case):
    more_actions(case)
    lines = lines_of(case)
    check(lines, named={"n_action_steps"})
    assert record(lines, named={"n_action_steps"})["accepted"] == ["n_action_steps"]
    assert record(lines) == verdicts(lines) | {"accepted": []}
    json.dumps(record(lines))


def test_accepting_what_agrees_is_fine_and_what_does_not_exist_is_an_error(case):
    lines = lines_of(case)
    check(lines, accept=["sizes"])
    assert record(lines, accept=["sizes"])["accepted"] == []
    with pytest.raises(ValueError, match="--accept colour is no item: choose from cameras, sizes"):
        check(lines, accept=["colour"])


def test_all_differences_stand_in_one_error_with_both_values(case):
    draw_at_360(case)
    more_actions(case)
    with pytest.raises(ValueError, match=r"--accept rate sizes n_action_steps$") as error:
        check(lines_of(case), accept=["rate"])
    for value in ("256 x 256", "360 x 360", "checkpoint 3 of 6", "environment 6"):
        assert value in str(error.value)


def test_the_table_fits_a_terminal_and_names_every_item(case):
    for damage in (None, turn_both, state_in_degrees, another_camera, drawn_fast):
        if damage:
            damage(case)
        rows = table(lines_of(case)).splitlines()
        assert max(map(len, rows)) <= 110
        assert {row.split()[0] for row in rows if row[0] != " "} == {"item", *conform.ITEMS}


def test_a_checkpoint_without_noops_and_data_with_them_differ(case):
    case.run["data_facts"] = case.data | {"noops": 0.0}
    case.data["noops"] = 0.12
    [line] = [line for line in lines_of(case) if line.item == "no-ops"]
    assert line.verdict == "differs" and line.environment == "10 before the first"
    assert line.why == "no-ops are 0.0 % of frames in training, 12.0 % of frames in the data"
    case.data["noops"] = 0.004
    assert verdicts(lines_of(case))["no-ops"] == "agrees"
    del case.data["noops"]
    assert verdicts(lines_of(case))["no-ops"] == "not stated"
