"""A checkpoint beside data that are not its own: what its statistics know better, and what a fit changes."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import edit_json, run_model

from model import load_policy
from smolvla.checkpoint import read_cameras, save_policy
from smolvla.fit import Fit, own_fit, refit
from smolvla.folders import WEIGHTS
from smolvla.processor import rename_map, with_rename

CAMERA = "observation.images."
RENAME = {f"{CAMERA}image": f"{CAMERA}camera1", f"{CAMERA}image2": f"{CAMERA}camera2"}


def publish(folder, width: int = 8, pictures: bool = True, rename: dict = RENAME) -> None:
    """Leave a folder as lerobot's fine-tuning of a base does: config.json's inputs are the base's own."""
    path = folder / "config.json"
    features = json.loads(path.read_text())["input_features"]
    camera = features[f"{CAMERA}camera2"]
    edit_json(path, input_features={f"{CAMERA}camera{i}": camera for i in (1, 2, 3)} | features)
    path = folder / "policy_preprocessor.json"
    path.write_text(json.dumps(with_rename(json.loads(path.read_text()), rename)))
    for path in folder.glob("policy_*processor_step*.safetensors"):
        stats = {n: torch.arange(1.0, width + 1) if "state" in n else x for n, x in load_file(path).items()}
        if pictures:
            stats |= {f"{CAMERA}{name}.mean": torch.zeros(3, 1, 1) for name in ("image", "image2")}
        save_file(stats | {"timestamp.mean": torch.zeros(1)}, path)


def seen_by(processor, names: list[str], width: int) -> dict:
    batch = {f"{CAMERA}{name}": torch.rand(2, 3, 20, 20) for name in names}
    state = torch.zeros(2, width)
    return processor(processor.rename(batch | {"observation.state": state, "task": ["go", "stop"]}))


@pytest.mark.parametrize("pictures", [True, False])
def test_a_folder_as_lerobot_publishes_it_is_taken_at_the_word_of_its_statistics(folder, tmp_path, pictures):
    publish(folder, pictures=pictures)
    policy, processor = load_policy(folder)
    assert policy.config == processor.config and policy.config.state_dim == 8
    assert policy.config.cameras == (f"{CAMERA}camera1", f"{CAMERA}camera2")
    assert processor.notes[-2:] == [
        "camera3 of the checkpoint: not in the checkpoint's own statistics, left out",
        "observation.state is 8 wide in the checkpoint's own statistics, 6 in the checkpoint's config.json",
    ]
    assert len(seen_by(processor, ["image", "image2"], 8)["images"]) == 2
    save_policy(tmp_path / "consistent", policy, processor)
    again, plain = load_policy(tmp_path / "consistent")
    assert plain.notes == [] and again.config == policy.config
    raw = json.loads((tmp_path / "consistent" / "config.json").read_text())["input_features"]
    assert raw["observation.state"]["shape"] == [8] and f"{CAMERA}camera3" not in raw
    description = json.loads((tmp_path / "consistent" / "policy_preprocessor.json").read_text())
    assert rename_map(description) == RENAME
    assert description["steps"][-1]["config"]["features"]["observation.state"]["shape"] == [8]


@pytest.mark.slow
def test_model_py_describes_such_a_folder_and_says_what_is_odd(folder):
    publish(folder)
    done = run_model(folder)
    assert done.returncode == 0, done.stderr
    assert "state        8 of at most 16; MEAN_STD, statistics found" in done.stdout
    assert f"camera       {CAMERA}camera1 48 x 80, named {CAMERA}image outside" in done.stdout
    assert done.stdout.count("\nnote ") == 4 and "camera3 of the checkpoint" in done.stdout


def test_nothing_is_claimed_of_a_folder_that_agrees_with_itself(folder):
    _, processor = load_policy(folder)
    assert processor.notes == []
    partly = with_rename(processor.before, {f"{CAMERA}front": f"{CAMERA}camera1"})
    assert own_fit(processor.config, partly, processor.stats) is None  # camera2 has its own name
    publish(folder, width=6)  # another data set of the same width: only statistics of pictures tell
    assert load_policy(folder)[1].notes[-1].startswith("camera3 of the checkpoint")


def test_statistics_wider_than_the_model_has_room_for_are_refused(folder):
    publish(folder, width=17)
    with pytest.raises(ValueError, match="state is 17 wide and the model takes 16"):
        load_policy(folder)


def test_a_fit_brings_widths_cameras_and_statistics_and_moves_no_weight(folder):
    want = load_policy(folder)[0].state_dict()
    fit = Fit({f"{CAMERA}camera1": (3, 20, 20)}, 8, 7, {f"{CAMERA}image": f"{CAMERA}camera1"}, tiny.STATS)
    policy, processor = load_policy(folder, fit=fit)
    assert all(torch.equal(want[name], x) for name, x in policy.state_dict().items())
    assert (policy.config.cameras, policy.config.state_dim) == ((f"{CAMERA}camera1",), 8)
    assert processor.stats is processor.stats_after is tiny.STATS
    inputs = seen_by(processor, ["image"], 8)
    noise = torch.zeros(2, policy.config.chunk_size, policy.config.max_action_dim)
    assert policy.predict_chunk(inputs, noise).shape == (2, policy.config.chunk_size, 7)


def test_black_pictures_stay_when_cameras_are_left_out(folder):
    edit_json(folder / "config.json", empty_cameras=1)
    policy, processor = load_policy(folder)
    assert policy.config.given_cameras == (f"{CAMERA}camera1", f"{CAMERA}camera2")
    fitted = refit(processor, Fit({f"{CAMERA}camera2": None}, 6, 7, {}))
    assert fitted.config.cameras == (f"{CAMERA}camera2", f"{CAMERA}empty_camera_0")
    for each, names in ((processor, ["camera2"]), (fitted, ["camera2"]), (processor, ["camera1", "camera2"])):
        inputs = seen_by(each, names, 6)
        assert [m is None for m in inputs["image_masks"]] == [True] * len(names) + [False]


def test_cameras_are_renamed_once_though_names_are_swapped(folder):
    one, two = f"{CAMERA}camera1", f"{CAMERA}camera2"
    _, processor = load_policy(folder)
    swapped = refit(processor, Fit(dict.fromkeys((one, two)), 6, 7, {one: two, two: one}))
    batch = {one: torch.zeros(1, 3, 8, 8), two: torch.ones(1, 3, 8, 8)}
    given = batch | {"observation.state": torch.zeros(1, 6), "task": ["go"]}
    assert [x.mean() for x in swapped(given)["images"]] == [0, 1]  # by the policy's own names already
    assert [x.mean() for x in swapped(swapped.rename(given))["images"]] == [1, 0]


def test_cameras_are_known_without_reading_weights(folder):
    publish(folder)
    (folder / WEIGHTS).write_bytes(b"")
    cameras, renames = read_cameras(str(folder), None)
    assert cameras == [f"{CAMERA}camera{i}" for i in (1, 2, 3)] and renames == RENAME
