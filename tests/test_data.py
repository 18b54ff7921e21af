"""What a data set must hold to be read, and what a batch never does: leave its episode."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import sample_order, sample_rng
from readers import load as loading
from readers.demos import Demos, StoredPictures, boundaries, statistics
from readers.libero_hdf5 import CAMERAS
from readers.load import load

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def write_task(path: Path, lengths: tuple[int, ...] = (5, 3), size: int = 8, seed: int = 0) -> Path:
    """Write one task file in LIBERO's layout, as `simulator/record.py` does; tests then damage it."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["problem_info"] = json.dumps({"language_instruction": f"pick up the {path.stem}"})
        recorded = {"suite": "libero_spatial", "task_id": 3, "displace": 0.0, "noise": 0.1, "size": size}
        recorded |= {"draw": "exact", "reset": "hard", "env_seed": 7}
        recorded |= {"versions": json.dumps({"mujoco": "3.3.2"})}
        recorded |= {"pairing": "observation_before_action", "num_demos": len(lengths), "total": sum(lengths)}
        for name, value in recorded.items():
            group.attrs[name] = value
        for number, length in enumerate(lengths):
            demo = group.create_group(f"demo_{number}")
            demo.attrs.update(
                {"num_samples": length, "init_state_id": 10 + number, "init_state": np.zeros(4)}
            )
            demo["actions"] = rng.normal(size=(length, 7))
            for name, width in {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}.items():
                demo[f"obs/{name}"] = rng.normal(size=(length, width))
            for name in ("agentview_rgb", "eye_in_hand_rgb"):
                demo[f"obs/{name}"] = rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8)
    return path


def toy_demos(lengths: list[int], size: int = 4, seed: int = 0) -> Demos:
    """Return episodes of these lengths without a file; action 0 and state 0 hold the frame's own index."""
    rng = np.random.default_rng(seed)
    episode, first, last = boundaries(lengths)
    frames = len(episode)
    state, action = rng.normal(size=(frames, 8)), rng.normal(size=(frames, 7))
    state[:, 0] = action[:, 0] = np.arange(frames)
    images = {camera: rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8) for camera in CAMERAS}
    task = np.zeros(frames, np.int64)
    arrays = (images, state.astype(np.float32), action.astype(np.float32), episode, first, last, task)
    return Demos(*arrays, tasks=["go"], provenance=[{}])


def test_loading_keeps_order_boundaries_and_instructions(tmp_path):
    write_task(tmp_path / "b_demo.hdf5", lengths=(4,), seed=1)
    write_task(tmp_path / "a_demo.hdf5", lengths=(2,) * 10 + (3,))  # demo_10 comes after demo_2, not before
    demos = load(tmp_path)
    assert (demos.last - demos.first + 1).tolist() == [2] * 10 + [3, 4]
    assert demos.task.tolist() == [0] * 23 + [1] * 4
    assert demos.instruction([0, 26]) == ["pick up the a_demo", "pick up the b_demo"]
    assert demos.provenance[0]["init_state_ids"] == list(range(10, 21))
    assert (
        demos.provenance[1]["versions"] == {"mujoco": "3.3.2"}
        and demos.provenance[1]["file"] == "b_demo.hdf5"
    )
    json.dumps(demos.provenance)
    with h5py.File(tmp_path / "a_demo.hdf5") as file:
        demo = file["data/demo_10"]
        np.testing.assert_array_equal(demos.action[20:23], demo["actions"][()].astype(np.float32))
        obs = [demo[f"obs/{name}"][()] for name in ("ee_pos", "ee_ori", "gripper_states")]
        np.testing.assert_array_equal(demos.state[20:23], np.concatenate(obs, 1).astype(np.float32))


def test_pictures_are_turned_exactly_once_and_the_camera_names_match(tmp_path):
    path = write_task(tmp_path / "a_demo.hdf5", lengths=(2,))
    with h5py.File(path, "a") as file:
        for camera, row in (("agentview_rgb", 0), ("eye_in_hand_rgb", 1)):
            images = np.zeros((2, 8, 8, 3), np.uint8)
            images[:, row, 2] = (10, 20, 30)
            file[f"data/demo_0/obs/{camera}"][...] = images
    demos = load(path)
    for camera, row in (("observation.images.image", 7), ("observation.images.image2", 6)):
        frames = demos.frames([1], camera)
        assert frames.shape == (1, 3, 8, 8) and frames.dtype == torch.uint8 and frames.is_contiguous()
        assert frames[0, :, row, 5].tolist() == [10, 20, 30]
        assert frames.sum() == 60


def test_pictures_left_in_the_files_are_those_in_memory(tmp_path):
    write_task(tmp_path / "a_demo.hdf5", lengths=(5, 3))
    write_task(tmp_path / "b_demo.hdf5", lengths=(4,), seed=1)
    here, there = load(tmp_path), load(tmp_path, in_memory=False)
    assert isinstance(here.images["observation.images.image"], np.ndarray)
    for camera, pictures in there.images.items():
        assert isinstance(pictures, StoredPictures)
        assert pictures.shape == here.images[camera].shape
        for index in ([11, 0, 7, 7, 8, 4], [3], []):
            assert torch.equal(there.frames(index, camera), here.frames(index, camera))
    assert there.fingerprint == here.fingerprint and there.light_fingerprint == here.light_fingerprint
    (tmp_path / "b_demo.hdf5").write_bytes((tmp_path / "b_demo.hdf5").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"b_demo.hdf5 is truncated or damaged"):
        there.frames([11], "observation.images.image")


def make_public(path: Path) -> Path:
    """Turn a file of ours into a public one: the attribute is all that differs in the layout."""
    with h5py.File(path, "a") as file:
        del file["data"].attrs["pairing"]
        file["data"].attrs["macros_image_convention"] = "opengl"
    return path


def test_public_files_pair_an_action_with_the_observation_before_it(tmp_path):
    ours = load(write_task(tmp_path / "ours" / "a_demo.hdf5", lengths=(5, 3)))
    public = load(make_public(write_task(tmp_path / "public" / "a_demo.hdf5", lengths=(5, 3))))
    acts, sees = [1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 5, 6]  # rows of the same file, read as ours
    np.testing.assert_array_equal(public.action, ours.action[acts])
    np.testing.assert_array_equal(public.state, ours.state[sees])
    for camera in CAMERAS:
        np.testing.assert_array_equal(public.images[camera], ours.images[camera][sees])
    assert (public.last - public.first + 1).tolist() == [4, 2]
    assert "action[t] goes with observation[t-1]" in public.provenance[0]["pairing"]
    assert "pairing" not in ours.provenance[0]
    assert public.fingerprint != ours.fingerprint


def test_a_public_episode_of_one_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"an episode of 1 step, .* no observation precedes: delete"):
        load(make_public(write_task(tmp_path / "a_demo.hdf5", lengths=(5, 1))))


def test_instructions_in_quotes_or_letters_are_read(tmp_path):
    path = write_task(tmp_path / "a_demo.hdf5")
    for written in ('"pick it up" ', list("pick it up")):
        edit(path, problem_info=json.dumps({"language_instruction": written}))
        assert load(path).tasks == ["pick it up"]


def test_a_batch_speaks_lerobots_names(tmp_path):
    demos = load(write_task(tmp_path / "a_demo.hdf5"))
    batch = demos.batch(np.array([0, 7, 4]), 3, demos.images)
    expected = {"observation.images.image": (3, 3, 8, 8), "observation.images.image2": (3, 3, 8, 8)}
    expected |= {"observation.state": (3, 8), "action": (3, 3, 7), "action_is_pad": (3, 3)}
    assert {name: tuple(value.shape) for name, value in batch.items() if name != "task"} == expected
    assert batch["task"] == ["pick up the a_demo"] * 3
    assert batch["action_is_pad"].tolist() == [[False] * 3, [False, True, True], [False, True, True]]
    assert torch.equal(batch["action"][1], torch.from_numpy(demos.action[[7, 7, 7]]))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 4))
def test_no_chunk_history_or_future_leaves_its_episode(lengths, count, stride):
    demos = toy_demos(lengths, size=1)
    index = np.arange(len(demos))
    action, is_pad = demos.chunk(index, count)
    history = demos.history(index, count, stride)
    future, valid = demos.future(index, count, stride)
    for steps in (action[..., 0].long().numpy(), history, future):
        assert (demos.episode[steps] == demos.episode[:, None]).all()
    ahead = index[:, None] + np.arange(count)
    last = demos.last[demos.episode][:, None]
    np.testing.assert_array_equal(action[..., 0].numpy(), np.minimum(ahead, last))
    np.testing.assert_array_equal(is_pad.numpy(), ahead > last)
    back = index[:, None] - stride * np.arange(count)[::-1]
    np.testing.assert_array_equal(history, np.maximum(back, demos.first[demos.episode][:, None]))
    np.testing.assert_array_equal(future[valid], (index[:, None] + stride * np.arange(1, count + 1))[valid])
    assert (history[:, -1] == index).all() and (np.diff(history) >= 0).all() and (np.diff(future) >= 0).all()
    assert (future[~valid] == np.broadcast_to(last, future.shape)[~valid]).all()


@given(LENGTHS, st.integers(1, 8), st.integers(1, 3))
def test_the_valid_fraction_is_what_the_lengths_say(lengths, K, stride):
    demos = toy_demos(lengths, size=1)
    _, valid = demos.future(np.arange(len(demos)), K, stride)
    assert valid.sum() == sum(max(length - k * stride, 0) for length in lengths for k in range(1, K + 1))


def test_a_frame_index_outside_the_data_is_refused():
    demos = toy_demos([3, 2])
    for index in ([-1], [5]):
        with pytest.raises(AssertionError, match=r"must lie in 0\.\.4"):
            demos.history(index, 2, 1)


def test_statistics_match_numpy_and_take_the_population_spread():
    demos = toy_demos([7, 5])
    for name, values in (("observation.state", demos.state), ("action", demos.action)):
        stats = statistics(demos)[name]
        for key in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(stats[key], getattr(np, key)(values.astype(np.float64), 0), rtol=1e-6)
            assert stats[key].dtype == torch.float32
        assert stats["count"].tolist() == [12]


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(0, 30))
def test_the_order_is_pure_and_a_permutation_each_epoch(frames, seed, first, count):
    whole = sample_order(frames, seed, 0, 60 + frames)
    for start in range(0, 60, frames):
        assert sorted(whole[start : start + frames]) == list(range(frames))
    np.testing.assert_array_equal(sample_order(frames, seed, first, count), whole[first : first + count])


def test_epochs_and_seeds_have_different_orders():
    one = sample_order(50, 0, 0, 100)
    assert not np.array_equal(one[:50], one[50:])
    assert not np.array_equal(one, sample_order(50, 1, 0, 100))


def test_keys_that_numpy_would_confuse_have_their_own_streams():
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1)]
    draws = {sample_rng(5, *key).integers(2**63) for key in keys}
    assert len(draws) == len(keys)
    assert sample_rng(5, 1).integers(2**63) == sample_rng(5, 1).integers(2**63)
    with pytest.raises(ValueError, match=r"seed and key must lie in .* choose another --seed"):
        sample_rng(2**32)


def test_the_fingerprint_knows_the_content_and_not_the_place(tmp_path):
    paths = [write_task(tmp_path / place / "a_demo.hdf5") for place in ("here", "there")]
    here, there = (load(path.parent) for path in paths)
    assert here.fingerprint == there.fingerprint == load(paths[0]).fingerprint
    camera = "observation.images.image"
    assert load(paths[0], ["image"]).fingerprint == here.fingerprint_of([camera]) != here.fingerprint
    seen = {here.fingerprint}
    for array in (there.images[camera], there.state, there.action):
        array[3, -1] += 1
        assert there.fingerprint_of(there.images) not in seen
        seen.add(there.fingerprint_of(there.images))
    assert load(write_task(tmp_path / "cut" / "a_demo.hdf5", (4, 4))).fingerprint not in seen


def edit(path: Path, **attributes: object) -> None:
    """Change attributes of a task file's `data` group."""
    with h5py.File(path, "a") as file:
        file["data"].attrs.update(attributes)


def replace(path: Path, name: str, value: np.ndarray) -> None:
    """Put another dataset in the place of one of demo_1's."""
    with h5py.File(path, "a") as file:
        del file[f"data/demo_1/{name}"]
        file[f"data/demo_1/{name}"] = value


def drop(path: Path, name: str) -> None:
    """Delete a dataset or a group."""
    with h5py.File(path, "a") as file:
        del file[f"data/{name}"]


def truncate(path: Path) -> None:
    """Cut a file's last third off, as a full disk would."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


DAMAGES = {
    "truncated": (truncate, "truncated or damaged .* move it away and record it again"),
    "not hdf5": (lambda path: path.write_text("hello"), "is no HDF5 file: --data takes"),
    "empty": (lambda path: h5py.File(path, "w").close(), "has no group 'data'"),
    "pairing": (
        lambda path: edit(path, pairing="after"),
        "pairing is 'after', neither .* nor left out",
    ),
    "convention": (
        lambda path: edit(path, macros_image_convention="opencv"),
        "macros_image_convention is 'opencv', not 'opengl'",
    ),
    "instruction": (lambda path: edit(path, problem_info="{}"), "problem_info has no language_instruction"),
    "blank": (
        lambda path: edit(path, problem_info='{"language_instruction": " "}'),
        "no language_instruction",
    ),
    "no json": (lambda path: edit(path, problem_info="pick"), "problem_info is no JSON object, got 'pick'"),
    "num_demos": (lambda path: edit(path, num_demos=3), "num_demos is 3, episodes there 2"),
    "lost episode": (lambda path: drop(path, "demo_1"), "num_demos is 2, episodes there 1"),
    "camera": (
        lambda path: drop(path, "demo_1/obs/eye_in_hand_rgb"),
        "no camera eye_in_hand.*are agentview_rgb",
    ),
    "lost state": (lambda path: drop(path, "demo_1/obs/ee_ori"), r"demo_1: obs/ee_ori .* got nothing"),
    "short": (
        lambda path: replace(path, "actions", np.zeros((2, 7))),
        r"actions should be \(3, 7\).*got \(2, 7\)",
    ),
    "nan": (
        lambda path: replace(path, "actions", np.full((3, 7), np.nan)),
        "actions has a non-finite.* step 0",
    ),
    "inf": (
        lambda path: replace(path, "obs/ee_pos", np.full((3, 3), np.inf)),
        "state has a non-finite value",
    ),
    "float pictures": (
        lambda path: replace(path, "obs/agentview_rgb", np.zeros((3, 8, 8, 3))),
        r"should be \(3, S, S, 3\) uint8, got .* float64",
    ),
    "sizes in a file": (
        lambda path: replace(path, "obs/agentview_rgb", np.zeros((3, 4, 4, 3), np.uint8)),
        r"mixes image sizes .*\[4, 8\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_in_one_line(name, tmp_path):
    damage, message = DAMAGES[name]
    path = write_task(tmp_path / "a_demo.hdf5")
    load(path)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_damage_inside_a_dataset_is_found_on_reading(tmp_path):
    path = write_task(tmp_path / "a_demo.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_1/actions"]
        actions = file["data/demo_1"].create_dataset(
            "actions", data=np.ones((3, 7)), chunks=(3, 7), fletcher32=True
        )
        offset = actions.id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\x55\x55\x55")
    with pytest.raises(ValueError, match=r"truncated or damaged .*: move it away"):
        load(path)


def test_a_folder_without_a_usable_recording_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"no such data folder or file.*python -m simulator record"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \*\.hdf5 file in .*python -m simulator record"):
        load(tmp_path)
    (tmp_path / "b_demo.parts").mkdir()
    write_task(tmp_path / "a_demo.hdf5")
    for path in (tmp_path, tmp_path / "b_demo.parts"):
        with pytest.raises(
            ValueError,
            match=r"interrupted recording, .*b_demo\.parts .*: run the command that began it",
        ):
            load(path)
    write_task(tmp_path / "b_demo.hdf5")
    assert len(load(tmp_path).tasks) == 2  # the recording did end; its folder was merely left behind


def test_files_of_different_picture_sizes_are_refused(tmp_path):
    write_task(tmp_path / "a_demo.hdf5", size=8)
    write_task(tmp_path / "b_demo.hdf5", size=6)
    with pytest.raises(ValueError, match=r"image sizes differ: a_demo.* 8.*b_demo.* 6.*one --size"):
        load(tmp_path)


def test_data_larger_than_memory_are_refused_before_reading(tmp_path, monkeypatch):
    path = write_task(tmp_path / "a_demo.hdf5")
    need = 8 * 2 * 8 * 8 * 3
    monkeypatch.setattr(loading, "available_memory", lambda: need)
    load(path)
    monkeypatch.setattr(loading, "available_memory", lambda: need - 1)
    with pytest.raises(ValueError, match=r"8 frames from 2 cameras need .* are free: use fewer"):
        load(path)


def test_an_unknown_camera_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown camera 'wrist' in .*: use image or image2"):
        load(write_task(tmp_path / "a_demo.hdf5"), ["wrist"])
