"""Data as people really have them: read right, picture by picture, or refused by a training and by check."""

import fnmatch
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import h5py
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_set import H, W, change, picture, png, read_picture, write_set, write_video
from test_data import make_public, write_task
from test_lerobot_v3 import CAMERA, DATA, EPISODES, VIDEO, WRIST, column, info

import train
from arm import load_arm
from data import partner_rows, saved_partners
from files import Refused
from readers import check
from readers.demos import Demos, chosen_statistics
from readers.lerobot_meta import read_table
from readers.lerobot_pictures import Video
from readers.load import load
from readers.problems import far_values
from readers.selection import DataConfig, find_tasks
from rollouts.facts import describe_data
from smolvla.processor import rename_map
from train import TrainConfig


def codes(demos: Demos, camera: str = CAMERA) -> list[tuple[int, int]]:
    """Return the episode and the step that every picture itself says it is of."""
    return [read_picture(pixels[:48])[:2] for pixels in demos.images[camera][:]]


def wanted(demos: Demos, numbers: list[int] | None = None) -> list[tuple[int, int]]:
    """Return the episode and step that every row is of; numbers, the episodes' own."""
    numbers = range(len(demos.first)) if numbers is None else numbers
    return [(numbers[e], s) for e, s in zip(demos.episode.tolist(), demos.step.tolist())]


def refused(root: Path, message: str, options: DataConfig | None = None) -> None:
    """See a training and `data.py check` stop at the same thing, in one line."""
    with pytest.raises(Refused, match=message) as error:
        load(root, options=options)
    assert "\n" not in str(error.value)
    found = check.check(root, options=options).errors
    assert [line for line in found if str(error.value).partition("; `python")[0] == line], found


def episodes_column(root: Path, name: str, values: list) -> None:
    change(root / EPISODES, **{name: values})


def bare(path: Path) -> Path:
    """Take all attributes out of a task file, as openvla's regenerated ones have none."""
    with h5py.File(path, "a") as file:
        for group in (file["data"], *file["data"].values()):
            for name in list(group.attrs):
                del group.attrs[name]
    return path


# ---- frames of a video -----------------------------------------------------------------------------------


def test_a_wrong_label_fps_shows_no_row_another_frame(tmp_path):
    root = write_set(tmp_path, (5, 4, 3), {CAMERA: "video"}, fps=20)
    info(root, fps=10)
    for options in (None, DataConfig(episodes="1-2"), DataConfig(episodes="2")):
        demos = load(root, in_memory=False, options=options)
        numbers = None if demos.numbers is None else demos.numbers.tolist()
        assert codes(demos) == wanted(demos, numbers)
    found = check.check(root)
    assert not found.errors
    [line] = [line for line in found.warnings if "timestamp" in line]
    assert "timestamp is 0.0500 s, not 0.1000 s at step 1 of episode 0, 9 rows in all" in line


def test_no_row_shows_another_episodes_frame_and_no_two_share_one(tmp_path):
    def fresh(name: str) -> Path:
        return write_set(tmp_path / name, (4, 3), {CAMERA: "video"})

    begin, end = (f"videos/{CAMERA}/{part}_timestamp" for part in ("from", "to"))
    late = fresh("late")
    column(late / DATA, "timestamp", 3, 0.4)  # the first frame of episode 1
    refused(late, r"episode 0 shows step 3 at 0.4000 s and .* episode 1 begins at 0.4000 s")
    beyond = fresh("beyond")
    column(beyond / DATA, "timestamp", 3, 0.5)
    refused(beyond, "episode 0 shows step 3 at 0.5000 s, but meta/episodes gives it 0.0000 to 0.4000 s")
    for name in (begin, end):
        nowhere = fresh(f"nowhere {name[-14:-10]}")
        episodes_column(nowhere, name, [float("nan"), 0.4])
        refused(nowhere, r"episode 0 shows step 0 at .* but meta/episodes gives it .*nan")
    shared = fresh("shared")
    episodes_column(shared, begin, [0.0, 0.0])
    episodes_column(shared, end, [0.4, 0.3])
    refused(shared, "episode 1 begins at 0.0000 s")
    back = fresh("back")
    column(back / DATA, "timestamp", 5, 0.0)
    refused(back, "timestamp is 0.0000 s at step 1 of episode 1, no later than the one before")
    assert codes(load(back, options=DataConfig(episodes="0"))) == [(0, step) for step in range(4)]


def test_frames_that_ffmpeg_marks_corrupt_stop_a_training_and_a_check(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, H, W, 3), np.uint8)
    root = write_set(tmp_path, (12,), {CAMERA: "video"})
    [path] = (root / "videos").rglob("*.mp4")
    write_video(path, noise, 10)
    load(root)
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 2
    content[middle : middle + 60] = bytes(60)
    path.write_bytes(content)
    refused(root, r"frame \d+ is damaged, FFmpeg marks it corrupt|truncated or damaged")


def test_a_video_whose_first_frame_is_late_is_read_from_there(tmp_path):
    root = write_set(tmp_path / "late", (5, 4), {CAMERA: "video"}, late=2)
    for options in (None, DataConfig(episodes="1")):
        demos = load(root, options=options)
        assert codes(demos) == wanted(demos, None if options is None else [1])
    assert not check.check(root).errors
    meta = write_set(tmp_path / "meta", (5, 4), {CAMERA: "video"}, late=2)  # and meta/ says so
    for part in ("from", "to"):
        name = f"videos/{CAMERA}/{part}_timestamp"
        episodes_column(meta, name, [t + 0.2 for t in pq.read_table(meta / EPISODES)[name].to_pylist()])
    demos = load(meta)
    assert codes(demos) == wanted(demos)
    lost = write_set(tmp_path / "lost", (5, 4), {CAMERA: "video"})  # its first two frames are gone
    frames = [picture(e, s, 0) for e, n in enumerate((5, 4)) for s in range(n)]
    write_video(lost / VIDEO, frames[2:], 10, late=2)
    refused(lost, "no frame at 0.0000 s, step 0 of episode 0, .*--episodes leaves")


def test_a_frame_hours_into_a_video_is_found(tmp_path):
    """There a float32, as timestamps are stored, no longer tells 0.1 ms."""
    root = write_set(tmp_path, (5, 4), {CAMERA: "video"}, fps=30, late=4 * 3600 * 30)
    for part in ("from", "to"):
        name = f"videos/{CAMERA}/{part}_timestamp"
        begins = pq.read_table(root / EPISODES)[name].to_pylist()
        episodes_column(root, name, [t + 4 * 3600 for t in begins])
    demos = load(root)
    assert codes(demos) == wanted(demos) and not check.check(root).errors


def test_a_camera_of_nearly_the_labels_rate_is_read_with_a_flag(tmp_path):
    root = write_set(tmp_path, (60, 50), {CAMERA: "video"}, fps=30, video_fps=Fraction(30000, 1001))
    refused(root, r"no frame at 0\.1333 s, step 4 of episode 0.*--nearest-frame 0.4 takes frames that are a")
    options = DataConfig(nearest_frame=0.4)
    demos = load(root, options=options)
    assert codes(demos) == wanted(demos)
    assert not check.check(root, options=options).errors
    frames = [picture(e, s, 0) for e, n in enumerate((60, 50)) for s in range(n)]
    write_video(root / VIDEO, [*frames[:70], *frames[71:]], Fraction(30000, 1001))
    refused(root, r"no frame at .*, step .* of episode 1.*--episodes leaves the episode out", options)
    slow = write_set(tmp_path / "slow", (200, 150), {CAMERA: "video"}, fps=30, video_fps=Fraction(297, 10))
    refused(slow, "no frame at")
    for options in (DataConfig(nearest_frame=0.4), DataConfig(nearest_frame=0.1, episodes="1")):
        demos = load(slow, options=options)  # 3.5 frames off in the end, and still in order
        assert codes(demos) == wanted(demos, None if demos.numbers is None else [1])
    frames = [picture(e, s, 0) for e, n in enumerate((200, 150)) for s in range(n)]
    write_video(slow / VIDEO, [*frames[:100], *frames[101:], frames[-1]], Fraction(297, 10), lost=100)
    for options in (DataConfig(nearest_frame=0.49), DataConfig(nearest_frame=0.49, episodes="0")):
        refused(slow, "no frame at", options)  # a frame is lost, another there twice
    write_video(slow / VIDEO, frames[:-1], Fraction(297, 10))
    for options in (DataConfig(nearest_frame=0.4), DataConfig(nearest_frame=0.4, episodes="0")):
        refused(slow, "no frame at .*, step 4[01] of episode 0", options)
    with pytest.raises(Refused, match=r"--nearest-frame 0.5 must be .* less than 0.5"):
        DataConfig(nearest_frame=0.5)


@pytest.mark.parametrize("place", ["info", "video_info"])
@pytest.mark.parametrize("key", ["is_depth_map", "video.is_depth_map"])
def test_depth_is_no_picture_in_whichever_place_it_is_said(tmp_path, place, key):
    root = write_set(tmp_path, cameras={CAMERA: "video", "depth": "video"})
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["depth"][place] = {key: True}
    info(root, features=features)
    assert list(load(root, in_memory=False).images) == [CAMERA]
    with pytest.raises(Refused, match="unknown camera 'depth'"):
        load(root, options=DataConfig(cameras=("a=depth",)))


# ---- instructions ----------------------------------------------------------------------------------------


def test_an_instruction_that_several_tasks_have_names_them_all(tmp_path):
    texts = ("turn on the stove", "Turn on  the stove", "open it")
    assert find_tasks(list(texts), "turn_on_the_stove") == [0, 1]
    root = write_set(tmp_path / "v3", (2, 3, 1, 4), tasks=texts)
    demos = load(root, options=DataConfig(tasks=("turn on the stove",)))
    assert codes(demos) == wanted(demos, [0, 1, 3])
    for scene in ("KITCHEN_SCENE3", "KITCHEN_SCENE8"):
        path = write_task(tmp_path / "hdf5" / f"{scene}_turn_on_the_stove_demo.hdf5", (2, 3))
        bare(path)
    write_task(tmp_path / "hdf5" / "other_demo.hdf5", (5,))
    demos = load(tmp_path / "hdf5", options=DataConfig(tasks=("turn on the stove",)))
    assert demos.tasks[:2] == ["turn on the stove"] * 2 and len(demos) == 10


def several(root: Path) -> Path:
    """Write episodes of which the first and the last change their instruction on the way."""
    write_set(root, (5, 2, 4), {CAMERA: "image"}, tasks=("push", "pull", "lift"))
    change(root / DATA, task_index=[0, 0, 2, 2, 0, 1, 1, 2, 2, 2, 1])
    episodes_column(root, "tasks", [["push", "lift"], ["pull"], ["lift", "pull"]])
    return root


def test_each_row_has_its_own_instruction_and_no_episode_ends_with_one(tmp_path, capsys):
    demos = load(several(tmp_path))
    said = ["push"] * 2 + ["lift"] * 2 + ["push"] + ["pull"] * 2 + ["lift"] * 3 + ["pull"]
    assert demos.instruction(np.arange(11)) == said
    assert demos.batch(np.arange(11), 2, [CAMERA])["task"] == said
    assert (demos.last - demos.first + 1).tolist() == [5, 2, 4] and codes(demos) == wanted(demos)
    action, is_pad = demos.chunk(np.array([1]), 4)
    assert not is_pad.any() and np.array_equal(action[0], demos.action[1:5])
    text = check.describe(demos)
    for number, counts in enumerate(("1 episodes, 3 frames", "2 episodes, 3 frames", "2 episodes, 5 frames")):
        assert f"task {number}: " in text and counts in text
    assert not check.check(tmp_path).errors
    part = load(tmp_path, options=DataConfig(tasks=("pull",)))
    assert codes(part) == wanted(part, [1, 2])
    other = load(write_set(tmp_path / "other", (5, 2, 4), {CAMERA: "image"}, tasks=("push", "pull", "lift")))
    assert other.fingerprint != demos.fingerprint
    np.testing.assert_array_equal(demos.only(np.array([2])).task, [2, 2, 2, 1])


def test_a_rollouts_partner_of_another_task_is_found_in_an_episode_of_several(tmp_path):
    import torch

    demos = load(several(tmp_path))
    _, at = saved_partners(demos, torch.randn(11, 3), 2, 1, np.arange(11))
    for step in range(6):
        for text in demos.tasks:
            rows = [partner_rows(at, (0, 1, start), 7, step, text) for start in range(20)]
            frames = demos.first[at[rows, 0]] + at[rows, 1].numpy()
            assert text not in demos.instruction(frames)


def test_a_row_and_meta_must_agree_on_the_instruction(tmp_path):
    root = several(tmp_path)
    episodes_column(root, "tasks", [["push", "lift"], ["push"], ["lift", "pull"]])
    refused(root, r"the instructions of episode 1 are \['pull'\], meta/episodes says \['push'\]")
    assert len(load(root, options=DataConfig(episodes="0,2"))) == 9


@pytest.mark.parametrize("name", ["task", "language_instruction"])
def test_a_rows_own_words_must_be_those_of_its_task_index(tmp_path, name):
    root = several(tmp_path)
    said = load(root).instruction(np.arange(11))
    change(root / DATA, **{name: said})
    assert load(root).instruction(np.arange(11)) == said and not check.check(root).errors
    change(root / DATA, **{name: [*said[:6], "push", *said[7:]]})
    refused(root, "step 1 of episode 1 says 'push', its task_index stands for 'pull': correct either")


def test_two_columns_of_instructions_must_agree(tmp_path):
    root = write_set(tmp_path)
    texts = load(root).tasks
    change(root / "meta/tasks.parquet", __index_level_0__=texts)
    assert load(root).tasks == texts
    change(root / "meta/tasks.parquet", __index_level_0__=texts[::-1])
    refused(root, "columns task and __index_level_0__ have different instructions: drop one")


def test_columns_beside_the_instruction_are_no_matter(tmp_path):
    root = write_set(tmp_path)
    change(root / "meta/tasks.parquet", scene=["kitchen", "office"], count=[1, 2])
    assert load(root).tasks == ["push the block", "open the drawer"]


LONG = " ".join(["push"] * 30 + ["then", "pull"] * 15)


def test_an_instruction_that_is_cut_is_said_with_what_is_lost(tmp_path, folder, capsys):
    root = write_set(tmp_path / "set", (9, 7), {CAMERA: "image"}, tasks=("open it", LONG))
    [plain] = [line for line in check.check(root).warnings if "words" in line]
    assert LONG in plain and "open it" not in plain
    lost = "then pull then pull then pull"  # tiny's tokenizer has a token a word, 32 are kept
    train.main(TrainConfig(data=root, out=tmp_path / "run", total_samples=4, batch_size=2))
    [warning] = [line for line in capsys.readouterr().out.splitlines() if "tokens and is cut" in line]
    assert warning.startswith(f'warning: "{LONG}" has 61 tokens and is cut to 32') and lost in warning
    [counted] = [line for line in check.check(root, init=str(folder)).warnings if "is cut to" in line]
    assert LONG in counted and "is lost" in counted
    arguments = ["data.py", "check", str(root), "--init", str(folder)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr("sys.argv", arguments)
        check.main()
    assert f"warning: {counted}" in capsys.readouterr().out


def test_two_instructions_that_become_the_same_are_refused(tmp_path, folder):
    root = write_set(tmp_path / "set", (9, 7), {CAMERA: "image"}, tasks=(LONG, f"{LONG} then stop"))
    with pytest.raises(Refused, match="are one and the same in their first 32 tokens"):
        train.main(TrainConfig(data=root, out=tmp_path / "run", total_samples=4, batch_size=2))
    assert [e for e in check.check(root, init=str(folder)).errors if "one and the same" in e]


# ---- names, parts and numbers ----------------------------------------------------------------------------


def test_openpis_names_are_read_with_flags(tmp_path):
    root = write_set(tmp_path, cameras={"image": "image", "wrist_image": "image"})
    before = load(root)
    table = pq.read_table(root / DATA)
    names = {"observation.state": "state", "action": "actions"}
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), root / DATA)
    refused(root, r"has no column observation.state, there are state, actions, image, .* with --state NAME")
    refused(root, "with --action NAME", DataConfig(state="state"))
    options = DataConfig(state="state", action="actions", cameras=("image=image", "image2=wrist_image"))
    demos = load(root, options=options)
    np.testing.assert_array_equal(demos.state, before.state)
    np.testing.assert_array_equal(demos.action, before.action)
    assert codes(demos) == wanted(demos) == codes(demos, WRIST)
    stats = {name: {key: values.tolist() for key, values in chosen_statistics(before)[0][full].items()}
             for full, name in names.items()}  # fmt: skip
    (root / "meta/stats.json").write_text(json.dumps(stats))
    assert "meta/stats.json" in chosen_statistics(load(root, options=options))[1]
    assert not check.check(root, options=options).warnings


PLACES = [(0, 0), (0, 0), (0, 1), (1, 0)]


def partly(tmp_path: Path) -> Path:
    """Write a set of which only the first two episodes' files are on the disk."""
    cameras = {CAMERA: "video", WRIST: "image"}
    root = write_set(tmp_path, (4, 3, 2, 5), cameras, PLACES, {CAMERA: [(0, 0), (0, 0), (0, 1), (0, 1)]})
    (root / "data/chunk-000/file-001.parquet").unlink()
    shutil.rmtree(root / "data/chunk-001")
    (root / VIDEO.replace("000.mp4", "001.mp4")).unlink()
    return root


def test_a_part_is_read_where_only_its_files_are_there(tmp_path):
    root, options = partly(tmp_path), DataConfig(episodes="0-1")
    demos = load(root, in_memory=False, options=options)
    assert codes(demos) == codes(demos, WRIST) == wanted(demos) and len(demos) == 7
    assert not check.check(root, options=options).errors
    assert codes(load(root, options=DataConfig(episodes="1"))) == [(1, 0), (1, 1), (1, 2)]
    refused(root, "file-001.parquet is missing, but meta/")
    with pytest.raises(Refused, match=r"--episodes names 4, .* has 4: choose from 0\.\.3"):
        load(root, options=DataConfig(episodes="4"))


def test_of_a_part_only_its_files_are_fetched(tmp_path, monkeypatch, capsys):
    cameras = {CAMERA: "video", WRIST: "image"}
    far = write_set(
        tmp_path / "far", (4, 3, 2, 5), cameras, PLACES, {CAMERA: [(0, 0), (0, 0), (0, 1), (0, 1)]}
    )
    asked = []

    def download(repo: str, revision: str | None, repo_type: str, allow_patterns: list | None = None) -> str:
        asked.append((revision, allow_patterns))
        for file in filter(Path.is_file, far.rglob("*")):
            name = file.relative_to(far)
            if allow_patterns is None or any(fnmatch.fnmatch(str(name), p) for p in allow_patterns):
                (tmp_path / "c0ffee" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "c0ffee" / name)
        return str(tmp_path / "c0ffee")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    demos = load("someone/toys", options=DataConfig(episodes="0-1"))
    assert codes(demos) == wanted(demos) and len(demos) == 7
    assert asked[0] == (None, ["meta/*"])
    assert asked[1] == ("c0ffee", ["meta/*", DATA, VIDEO])
    there = {
        str(f.relative_to(tmp_path / "c0ffee")) for f in (tmp_path / "c0ffee").rglob("*.*") if f.is_file()
    }
    assert {name for name in there if not name.startswith("meta")} == {DATA, VIDEO}
    load("someone/toys", options=DataConfig(tasks=("open the drawer",)))
    assert asked[3][1][1:] == [
        DATA,
        "data/chunk-001/file-000.parquet",
        VIDEO,
        VIDEO.replace("0.mp4", "1.mp4"),
    ]
    assert "commit c0ffee, pin it" in capsys.readouterr().out


@pytest.mark.parametrize("frames_too", [False, True])
def test_complete_episodes_may_leave_numbers_out(tmp_path, frames_too):
    root = write_set(tmp_path, (4, 3, 2), {CAMERA: "video", WRIST: "image"})
    episodes_column(root, "episode_index", [0, 2, 3])
    change(root / DATA, episode_index=[0] * 4 + [2] * 3 + [3] * 2)
    if frames_too:  # an episode of 6 frames was taken out
        episodes_column(root, "dataset_from_index", [0, 10, 13])
        change(root / DATA, index=[*range(4), *range(10, 15)])
    demos = load(root)
    assert codes(demos) == codes(demos, WRIST) == wanted(demos) and demos.numbers.tolist() == [0, 2, 3]
    assert not check.check(root).errors
    part = load(root, options=DataConfig(episodes="2-3"))
    assert codes(part) == codes(part, WRIST) == wanted(part, [1, 2])
    with pytest.raises(Refused, match=r"--episodes names 1, .* choose from 0\.\.3"):
        load(root, options=DataConfig(episodes="1"))
    column(root / DATA, "action", 5, [float("nan")] * 7)
    refused(root, "action has a non-finite value at step 1 of episode 2")


def test_what_a_mac_leaves_beside_files_is_not_read(tmp_path):
    write_task(tmp_path / "hdf5" / "a_demo.hdf5")
    (tmp_path / "hdf5" / "._a_demo.hdf5").write_bytes(b"\0\5\x16\7")
    assert len(load(tmp_path / "hdf5").tasks) == 1
    root = write_set(tmp_path / "v3")
    for path in (DATA, EPISODES):
        (root / path).with_name(f"._{Path(path).name}").write_bytes(b"\0\5\x16\7")
    assert len(load(root)) == 8
    found = check.check(root)
    assert not found.errors and not [line for line in found.warnings if "._" in line]


# ---- HDF5 as others write it -----------------------------------------------------------------------------


def coded(path: Path, lengths: tuple[int, ...] = (5, 3)) -> Path:
    """Write a task file whose raw pictures say which frame they are of."""
    write_task(path, lengths)
    with h5py.File(path, "a") as file:
        for number, length in enumerate(lengths):
            for code, name in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
                pictures = np.zeros((length, 64, 64, 3), np.uint8)
                pictures[:, :48] = [picture(number, step, code) for step in range(length)]
                del file[f"data/demo_{number}/obs/{name}"]
                file[f"data/demo_{number}/obs/{name}"] = pictures[:, ::-1, ::-1]
    return path


def test_openvlas_files_without_attributes_are_read_as_they_are(tmp_path):
    names = ("KITCHEN_SCENE10_put_the_bowl_on_it", "LIVING_ROOM_SCENE1_pick_up_the_soup", "open_the_drawer")
    ours = load(coded(tmp_path / "ours" / "x_demo.hdf5", (5, 3)))
    for name in names:
        bare(coded(tmp_path / "theirs" / f"{name}_demo.hdf5", (5, 3)))
    demos = load(tmp_path / "theirs")
    assert demos.tasks == ["put the bowl on it", "pick up the soup", "open the drawer"]
    assert (demos.last - demos.first + 1).tolist() == [5, 3] * 3  # no action is left out
    np.testing.assert_array_equal(demos.action[:8], ours.action)
    np.testing.assert_array_equal(demos.state[:8], ours.state)
    assert codes(demos)[:8] == codes(demos, WRIST)[:8] == wanted(ours) == codes(ours)
    assert demos.provenance[0]["pairing"].startswith("observations before actions")
    assert not check.check(tmp_path / "theirs").errors
    with h5py.File(tmp_path / "theirs" / f"{names[2]}_demo.hdf5", "a") as file:
        file.move("data/demo_0", "data/demo_7")  # of a failed replay none is left
    assert [n for f in [load(tmp_path / "theirs")] for n in (f.last - f.first + 1).tolist()][4:] == [3, 5]


def test_pairing_is_never_guessed(tmp_path):
    path = bare(write_task(tmp_path / "open_it_demo.hdf5", (5, 3)))
    with h5py.File(path, "a") as file:  # what our own errors once asked for
        file["data"].attrs["num_demos"] = 2
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "open it"})
        for name in ("demo_0", "demo_1"):
            file[f"data/{name}"].attrs["num_samples"] = len(file[f"data/{name}/actions"])
    refused(path, "does not say whether observations .* add --pairing before .* or --pairing after")
    with h5py.File(path) as file:
        actions, position = (file[f"data/demo_0/{name}"][()] for name in ("actions", "obs/ee_pos"))
    before, after = (load(path, options=DataConfig(pairing=pairing)) for pairing in ("before", "after"))
    np.testing.assert_array_equal(before.action[:5], actions.astype(np.float32))
    np.testing.assert_array_equal(before.state[:5, :3], position.astype(np.float32))
    np.testing.assert_array_equal(after.action[:4], actions[1:].astype(np.float32))
    np.testing.assert_array_equal(after.state[:4, :3], position[:-1].astype(np.float32))
    ours = write_task(tmp_path / "ours_demo.hdf5")
    refused(ours, "--pairing after: .* says itself that pairing is", DataConfig(pairing="after"))
    public = make_public(write_task(tmp_path / "public_demo.hdf5"))
    assert len(load(public)) == 6 and len(load(public, options=DataConfig(pairing="before"))) == 8


def idle(path: Path, rows: dict[str, list[list[float]]]) -> Path:
    """Replace the pose and gripper of some actions: demo -> (step, moves, gripper)."""
    with h5py.File(path, "a") as file:
        for name, changes in rows.items():
            actions = file[f"data/{name}/actions"][()]
            actions[:, 6] = -1
            for step, moves, grip in changes:
                actions[step, :6], actions[step, 6] = moves, grip
            del file[f"data/{name}/actions"]
            file[f"data/{name}/actions"] = actions
    return path


IDLE = {"demo_0": [[0, 0, 1], [1, 0, -1], [4, 0, -1], [5, 0, 1], [6, 0, 1]], "demo_1": [[2, 1e-6, -1]]}


def is_noop(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """openvla's own rule (experiments/robot/libero/regenerate_libero_dataset.py)."""
    if previous is None:
        return np.linalg.norm(action[:-1]) < 1e-4
    return np.linalg.norm(action[:-1]) < 1e-4 and action[-1] == previous[-1]


@pytest.mark.parametrize("kind", ["ours", "public"])
def test_noops_are_dropped_by_openvlas_rule_picture_by_picture(tmp_path, kind):
    path = idle(coded(tmp_path / "a_demo.hdf5", (8, 4)), IDLE)
    path = make_public(path) if kind == "public" else path
    every = load(path)
    keep = []
    for first, last in zip(every.first, every.last):
        previous = None
        for row in range(first, last + 1):
            if not is_noop(every.action[row], previous):
                keep.append(row)
                previous = every.action[row]
    for in_memory in (True, False):
        demos = load(path, in_memory=in_memory, options=DataConfig(drop_noops=True))
        assert 0 < len(demos) == len(keep) < len(every)
        np.testing.assert_array_equal(demos.action, every.action[keep])
        np.testing.assert_array_equal(demos.state, every.state[keep])
        for camera in every.images:
            np.testing.assert_array_equal(demos.images[camera][:], every.images[camera][keep])
            np.testing.assert_array_equal(
                demos.images[camera][[3, 0, 3]], every.images[camera][keep][[3, 0, 3]]
            )
        assert codes(demos) == [wanted(every)[row] for row in keep] == codes(demos, WRIST)
    dropped = len(every) - len(keep)
    assert demos.provenance[0]["noops"] == f"{dropped} of {len(every)} frames dropped"
    assert describe_data(demos)["noops"] == 0 and describe_data(every)["noops"] == round(
        dropped / len(every), 4
    )
    part = load(path, in_memory=False, options=DataConfig(drop_noops=True, episodes="1"))
    np.testing.assert_array_equal(part.images[CAMERA][:], demos.images[CAMERA][demos.first[1] :])
    assert DataConfig(drop_noops=True).cache_home(tmp_path) != tmp_path


def test_an_episode_of_noops_alone_is_named(tmp_path):
    path = idle(write_task(tmp_path / "a_demo.hdf5", (5, 3)), {"demo_1": [[s, 0, -1] for s in range(3)]})
    with pytest.raises(
        Refused, match="--drop-noops leaves nothing of episode 1: leave it out with --episodes"
    ):
        load(path, options=DataConfig(drop_noops=True))
    assert len(load(path, options=DataConfig(drop_noops=True, episodes="0"))) == 5


# ---- values that cannot be -------------------------------------------------------------------------------


def with_statistics(root: Path, **changes: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Write a set with its own statistics, of which those of the state are changed, by name."""
    write_set(root, (40, 30))
    stats, _ = chosen_statistics(load(root))
    values = {f: {key: v.double().numpy() for key, v in entry.items()} for f, entry in stats.items()}
    for key, change_it in changes.items():
        values["observation.state"][key] = change_it(values["observation.state"][key])
    stored = {f: {key: v.tolist() for key, v in entry.items()} for f, entry in values.items()}
    (root / "meta/stats.json").write_text(json.dumps(stored))
    return root


def degrees(values: np.ndarray) -> np.ndarray:
    return values * 180 / np.pi


def shifted(values: np.ndarray) -> np.ndarray:
    return values + 1.5


STATISTICS = {
    "mean 100": (
        {"mean": lambda v: v * 0 + 100, "std": lambda v: v * 0 + 0.001},
        "mean of observation.state",
    ),
    "degrees": (
        dict.fromkeys(("mean", "std", "min", "max"), degrees),
        "(mean|std) of observation.state, dimension",
    ),
    "shifted": (dict.fromkeys(("mean", "min", "max"), shifted), "mean of observation.state, dimension"),
    "placeholder": (
        {"mean": lambda v: v * 0, "std": lambda v: v * 0 + 10},
        "std of .* is 10, that of the data",
    ),
    "no deviation": (
        {"std": lambda v: v * 0},
        "std of observation.state, dimension ., is 0, that of the data",
    ),
    "negative": ({"std": lambda v: -v}, "std of observation.state, dimension ., is -"),
    "one dimension": (
        {"std": lambda v: np.append(v[:-1], 9 * v[-1])},
        "std of observation.state, dimension 7",
    ),
    "range": ({"max": lambda v: v / 1000, "min": lambda v: v / 1000}, "m(in|ax) of observation.state"),
    "quantiles": ({"q01": lambda v: v + 9, "q99": lambda v: v * 0}, "q01 of observation.state"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_other_data_stop_a_training_and_a_check(name, tmp_path, monkeypatch):
    changes, message = STATISTICS[name]
    root = with_statistics(tmp_path / "set", **changes)
    found = [line for line in check.check(root).errors if re.search(message, line)]
    assert found and "add --statistics computed" in found[0]
    monkeypatch.chdir(tmp_path)
    small = {"total_samples": 4, "batch_size": 2, "out": tmp_path / "run", "data": root}
    with pytest.raises(Refused, match=message):
        train.main(TrainConfig(**small))
    train.main(TrainConfig(**small, statistics="computed"))
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert "computed from these 70 frames" in record["statistics_of"]


def test_statistics_of_the_data_pass_however_they_were_rounded(tmp_path):
    root = with_statistics(tmp_path, mean=lambda v: v.astype(np.float32), std=lambda v: v * np.sqrt(70 / 69))
    assert not check.check(root).errors and "stats.json" in chosen_statistics(load(root))[1]
    rough = write_set(
        tmp_path / "rough", (40, 30)
    )  # a spread that squares in float32 cannot tell from others
    states = np.array(pq.read_table(rough / DATA)["observation.state"].to_pylist())
    states[:, 2] = 0.5 + 1e-5 * states[:, 2]
    change(rough / DATA, **{"observation.state": states.tolist()})
    rounded = {f: {k: v.tolist() for k, v in e.items()} for f, e in chosen_statistics(load(rough))[0].items()}
    for found in (0.0, 1e-4):
        rounded["observation.state"]["std"][2] = found
        (rough / "meta/stats.json").write_text(json.dumps(rounded))
        assert not check.check(rough).errors
    still = write_set(tmp_path / "still", (4, 3))
    states = [
        [*row[:3], 0.25, *row[4:]] for row in pq.read_table(still / DATA)["observation.state"].to_pylist()
    ]
    change(still / DATA, **{"observation.state": states})
    stats = {f: {k: v.tolist() for k, v in e.items()} for f, e in chosen_statistics(load(still))[0].items()}
    for floor in (0.0, 1e-8, 1.0):  # a dimension that never moves may have any
        stats["observation.state"]["std"][3] = floor
        (still / "meta/stats.json").write_text(json.dumps(stats))
        assert not check.check(still).errors


@pytest.mark.parametrize("feature", ["observation.state", "action"])
@pytest.mark.parametrize("value", [1e30, -1e12, 7e4])
def test_a_value_that_the_rest_makes_impossible_is_named(feature, value, tmp_path):
    root = write_set(tmp_path / "v3", (40, 30))
    row = pq.read_table(root / DATA)[feature].to_pylist()[45]
    column(root / DATA, feature, 45, [*row[:2], value, *row[3:]])
    refused(root, rf"{feature} is .* in dimension 2 at step 5 of episode 1, the rest lies within")
    assert len(load(root, options=DataConfig(episodes="0"))) == 40
    path = write_task(tmp_path / "a_demo.hdf5", (40, 30))
    name = {"action": "actions", "observation.state": "obs/ee_pos"}[feature]
    with h5py.File(path, "a") as file:
        file[f"data/demo_1/{name}"][5, 2] = value
    refused(
        path, rf"{name.removeprefix('obs/').replace('ee_pos', 'state')} is .* in dimension 2 at step 5 of"
    )
    assert len(load(path, options=DataConfig(episodes="0"))) == 40


def test_a_number_too_large_for_float32_is_none(tmp_path):
    root = write_set(tmp_path)
    rows = pq.read_table(root / DATA)["action"].to_pylist()
    change(root / DATA, action=[*rows[:6], [1e300, *rows[6][1:]], rows[7]])
    refused(root, "action has a non-finite value at step 1 of episode 2")


def test_episodes_may_lie_in_files_in_any_order(tmp_path):
    places = [(0, 0), (0, 1), (0, 0), (0, 1), (0, 0)]
    root = write_set(
        tmp_path, (4, 3, 5, 2, 1), {CAMERA: "image", WRIST: "video"}, places, {WRIST: places[::-1]}
    )
    file = root / DATA.replace("000.parquet", "001.parquet")
    change(file, timestamp=pq.read_table(file)["timestamp"].to_pylist())
    demos = load(root)
    own = demos.numbers.tolist()
    assert sorted(own) == [0, 1, 2, 3, 4] and codes(demos) == codes(demos, WRIST) == wanted(demos, own)
    in_order = load(write_set(tmp_path / "one", (4, 3, 5, 2, 1)))
    for number, first, last in zip(own, demos.first, demos.last):
        a, b = in_order.first[number], in_order.last[number]
        np.testing.assert_array_equal(demos.state[first : last + 1], in_order.state[a : b + 1])
    part = load(root, options=DataConfig(episodes="1-2"))
    assert codes(part) == codes(part, WRIST) == wanted(part, part.numbers.tolist())
    assert not check.check(root).errors


def test_values_of_any_unit_are_possible():
    rng = np.random.default_rng(0)
    rows = np.arange(300)
    for scale in (1e-6, 1.0, 4096.0, 1e9):
        values = rng.normal(size=(300, 5)) * scale
        values[:, 1] = 0  # one dimension hardly moves, another is seldom used
        values[:, 2] = np.where(rows == 7, scale, 0)
        assert not list(far_values("x", values, rows, rows))


def test_a_checkpoint_says_each_cameras_own_shape(tmp_path):
    root = write_set(tmp_path / "set", (9, 7), {CAMERA: "image", WRIST: "image"})
    small = [{"bytes": png(np.full((32, 40, 3), 9, np.uint8)), "path": ""}] * 16
    change(root / DATA, **{WRIST: small})
    train.main(TrainConfig(data=root, out=tmp_path / "run", total_samples=4, batch_size=2))
    features = json.loads((tmp_path / "run/last/config.json").read_text())["input_features"]
    assert features[CAMERA]["shape"] == [3, 48, 64] and features[WRIST]["shape"] == [3, 32, 40]


# ---- strangers' meta/ ------------------------------------------------------------------------------------


def test_video_cameras_need_a_pattern_and_numbers_must_be_whole(tmp_path):
    root = write_set(tmp_path / "a", cameras={CAMERA: "video"})
    info(root, video_path=None)
    refused(root, "video_path is null, but observation.images.image is a video")
    for name, wrong in {"data/chunk_index": "0", f"videos/{CAMERA}/file_index": 0.5}.items():
        root = write_set(tmp_path / name.replace("/", "_"), cameras={CAMERA: "video"})
        episodes_column(root, name, [wrong] * 3)
        refused(root, f"column {name} should hold whole numbers, got (string|double)")
    root = write_set(tmp_path / "b", cameras={CAMERA: "video"})
    info(root, data_path="data/{video_key}/chunk-{chunk_index:03d}.parquet")
    refused(root, "data_path is 'data/{video_key}/chunk")


@pytest.mark.parametrize(
    "name", ["info.json", "tasks.parquet", "stats.json", "episodes/chunk-000/file-000.parquet"]
)
def test_a_meta_file_that_is_a_link_out_of_the_set_is_refused(tmp_path, name):
    root = write_set(tmp_path / "set")
    (root / "meta/stats.json").write_text("{}")
    (root / "meta" / name).rename(tmp_path / "outside")
    (root / "meta" / name).symlink_to(tmp_path / "outside")
    refused(root, "leads out of")


@contextmanager
def no_file_more() -> Iterator[None]:
    """Let this process open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    held = []
    try:
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        list(map(os.close, held))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    """As too many open files have it; a lock, missing rights or a bad disk say so in the same way."""
    root = write_set(tmp_path, cameras={CAMERA: "video"})
    for read in (Video, lambda path: read_table(root, path)):
        with no_file_more(), pytest.raises(Refused, match="cannot be read: Too many open files"):
            read(root / (VIDEO if read is Video else DATA))
    with no_file_more(), pytest.raises(Refused, match="cannot be read: Too many open files"):
        load(root)


def test_a_link_to_itself_is_one_line(tmp_path):
    root = write_set(tmp_path)
    (root / DATA).unlink()
    (root / DATA).symlink_to(root / DATA)
    refused(root, "is a link to itself")


def test_a_column_of_pictures_where_numbers_belong_is_one_line(tmp_path):
    root = write_set(tmp_path)
    change(root / DATA, action=[png(picture(0, 0, 0))] * 8)
    refused(root, "action should hold numbers or vectors, got binary")


# ---- another robot's pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["pca", "siglip"])
def test_another_robots_pictures_make_world_latents(tmp_path, capsys, encoder):
    root = write_set(tmp_path / "set", (40, 30), {"wrist": "image", "front": "image"}, fps=5)
    small = [{"bytes": png(picture(9, s % 256, 0)[:32, :40]), "path": ""} for s in range(70)]
    change(root / DATA, wrist=small)
    home = {"data": root, "out": tmp_path / "run", "total_samples": 4, "batch_size": 2}
    how = {"fusion": ("late",), "world_encoder": encoder, "future": 3, "freeze": "vision"}
    how |= {"world_dim": 8, "world_resolution": 8} if encoder == "pca" else {}
    if encoder == "siglip":
        train.main(TrainConfig(**home, **how, prepare=True))
    train.main(TrainConfig(**home, **how))
    out = capsys.readouterr().out
    side, margin = (8, "") if encoder == "pca" else (128, " with a margin")
    assert f"world latents: pictures of 32 x 40 are scaled whole to {side} x {side}{margin}" in out
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["world_camera"] == ["observation.images.wrist"]  # the data's first
    ahead = 3 * record["world_stride"] / 5
    assert f"looks {ahead:.1f} s ahead" in out and out.count("at 5 Hz") == 1
    arm, processor = load_arm(tmp_path / "run/last")
    assert arm.encoder.size == ((32, 40),)
    assert rename_map(processor.before) == {c: f"observation.images.{c}" for c in ("wrist", "front")}
    train.main(TrainConfig(**home, **how))  # the same run again
    assert "nothing to do" in capsys.readouterr().out
