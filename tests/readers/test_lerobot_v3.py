"""LeRobot data sets: every value that lerobot reads back, and every edge that its two small sets lack."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_set import H, W, change, picture, png, read_picture, write_set, write_video
from safetensors.numpy import load_file

from readers import check, lerobot_pictures, selection
from readers import load as loading
from readers.demos import Demos, StoredPictures, chosen_statistics
from readers.lerobot_pictures import Video
from readers.load import load
from readers.selection import DataConfig

SETS = Path(__file__).resolve().parents[1] / "lerobot_v3"
CAMERA, WRIST = "observation.images.image", "observation.images.image2"
DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def expected(name: str) -> tuple[dict, dict]:
    """Return what lerobot read back from a fixture: numbers by name, and the rest."""
    folder = SETS / name
    return load_file(folder / "expected.safetensors"), json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", ["L_image", "L_video"])
def test_every_value_is_what_lerobot_reads_back(name, in_memory):
    demos = load(SETS / name / "dataset", in_memory=in_memory)
    wanted, facts = expected(name)
    np.testing.assert_array_equal(demos.state, wanted["all_state"])
    np.testing.assert_array_equal(demos.action, wanted["all_action"])
    np.testing.assert_array_equal(demos.episode, wanted["all_episode_index"])
    np.testing.assert_array_equal(
        np.arange(len(demos)) - demos.first[demos.episode], wanted["all_frame_index"]
    )
    index = wanted["indices"]
    for length in (16, 50):
        chunk, is_pad = demos.chunk(index, length)
        np.testing.assert_array_equal(chunk, wanted[f"action_chunk{length}"])
        np.testing.assert_array_equal(is_pad, wanted[f"action_chunk{length}_is_pad"])
    past = demos.history(wanted["hist_indices"], 3, 1)
    np.testing.assert_array_equal(demos.state[past], wanted["hist_state"])
    assert list(demos.images) == facts["camera_keys"]
    for camera, pictures in demos.images.items():
        assert isinstance(pictures, np.ndarray if in_memory else StoredPictures)
        np.testing.assert_array_equal(pictures[wanted["image_indices"]], wanted[f"images.{camera}"])
        seen = pictures[past[:, 1:].reshape(-1)].reshape(-1, 2, 64, 64, 3)
        np.testing.assert_array_equal(seen, wanted[f"hist_images.{camera}"])
    assert demos.tasks == facts["tasks_by_index"]
    for item in facts["items"]:
        assert demos.instruction([item["index"]]) == [item["task"]]
    for feature in ("observation.state", "action"):
        for key, values in demos.own_stats[feature].items():
            np.testing.assert_array_equal(values, np.array(facts["stats"][feature][key], np.float64))
    assert demos.provenance[0]["fps"] == facts["fps"]


@pytest.mark.parametrize("name", ["L_image", "L_video"])
def test_the_code_in_every_picture_names_its_frame(name):
    demos = load(SETS / name / "dataset", in_memory=False)
    wanted = np.stack([demos.episode, np.arange(len(demos)) - demos.first[demos.episode]], axis=1)
    for pictures in demos.images.values():
        blocks = (
            pictures[:][:, 48:].reshape(-1, 2, 8, 8, 8, 3).mean((2, 4, 5)) > 128
        )  # (F, 16, 64, 3) -> (F, 2, 8)
        np.testing.assert_array_equal(np.packbits(blocks, axis=2)[..., 0], wanted)


@pytest.mark.parametrize("name", ["L_image", "L_video"])
def test_a_part_of_the_episodes_is_the_part_that_lerobot_reads(name):
    wanted, facts = expected(name)
    part = facts["subset"]
    demos = load(SETS / name / "dataset", in_memory=False, options=DataConfig(episodes="4,1,3"))
    whole = load(SETS / name / "dataset")
    assert len(demos) == part["num_frames"] and len(demos.first) == part["num_episodes"]
    rows = np.array(part["absolute_index_of_item"])
    np.testing.assert_array_equal(demos.state, wanted["all_state"][rows])
    for camera, pictures in demos.images.items():
        np.testing.assert_array_equal(pictures[:], whole.images[camera][rows])
    probe = demos.images[CAMERA][[part["probe_item"]]][0]
    np.testing.assert_array_equal(probe, wanted[f"subset_probe_image.{CAMERA}"])
    chunk, is_pad = demos.chunk([part["probe_item"]], 16)
    np.testing.assert_array_equal(chunk[0], wanted["subset_probe_action_chunk16"])
    np.testing.assert_array_equal(is_pad[0], wanted["subset_probe_is_pad"])
    assert demos.instruction([part["probe_item"]]) == [part["probe_task"]]
    assert demos.own_stats is None and "computed from these" in chosen_statistics(demos)[1]
    assert "meta/stats.json" in chosen_statistics(whole)[1]


def check_pictures(demos: Demos, order: np.ndarray) -> None:
    """Read these frames of every camera, and check that each picture is the one that was asked for."""
    for number, pictures in enumerate(demos.images.values()):
        got = pictures[order]
        for frame, pixels in zip(order.tolist(), got):
            episode = int(demos.episode[frame])
            assert read_picture(pixels) == (episode, frame - int(demos.first[episode]), number)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_chunks_and_cameras_have_numbers_of_their_own(kind, tmp_path):
    lengths = (5, 1, 30, 1, 7, 2)
    places = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]
    videos = {"observation.front": [(0, 0)] * 3 + [(0, 1)] * 3, "left": [(2, 5)] + [(3, 0)] * 4 + [(3, 1)]}
    root = write_set(
        tmp_path, lengths, dict.fromkeys(videos, kind), places, videos, fps=30, fixed=False, meta_files=3,
        task_column="__index_level_0__",
    )  # fmt: skip
    demos = load(root, in_memory=False)
    assert demos.images["left"].shape == (sum(lengths), H, W, 3)
    assert (demos.last - demos.first + 1).tolist() == list(lengths)
    rng = np.random.default_rng(0)
    check_pictures(demos, np.arange(len(demos)))
    check_pictures(demos, rng.permutation(len(demos)))
    edges = np.concatenate([demos.first, demos.last])
    for frame in (*edges, *rng.integers(0, len(demos), 30)):  # one at a time: each looks for a key frame
        check_pictures(demos, np.array([frame]))
    check_pictures(demos, np.array([3, 3, 2, 9, 9]))


def test_a_list_column_is_the_same_as_one_of_fixed_size(tmp_path):
    fixed, loose = (load(write_set(tmp_path / str(kind), fixed=kind)) for kind in (True, False))
    np.testing.assert_array_equal(fixed.state, loose.state)
    np.testing.assert_array_equal(fixed.action, loose.action)
    assert fixed.fingerprint == loose.fingerprint


def test_row_groups_are_no_more_than_a_way_to_store(tmp_path):
    demos = [load(write_set(tmp_path / str(group), group=group)) for group in (1, 3, 100)]
    assert len({d.fingerprint for d in demos}) == 1
    check_pictures(demos[0], np.arange(8))


def test_unpacked_pictures_are_the_same_and_are_used_only_while_they_are_true(tmp_path, monkeypatch):
    root = write_set(tmp_path, (4, 1, 3), {CAMERA: "image"}, [(0, 0), (0, 0), (0, 1)])
    demos = load(root, in_memory=False)
    assert check.unpack(demos) > 0 and check.unpack(demos) == 0  # done once
    with monkeypatch.context() as patch:
        patch.setattr(lerobot_pictures, "read_group", lambda *_: pytest.fail("read a row group"))
        check_pictures(demos, np.array([7, 0, 3, 3, 4]))
        check_pictures(load(root), np.arange(8))
    copy = lerobot_pictures.unpacked_path(root / DATA, CAMERA)
    whole = copy.read_bytes()
    for torn in (whole[:-8], whole[: len(whole) // 2], b"", whole[8:]):
        copy.write_bytes(torn)
        check_pictures(load(root), np.arange(8))
    copy.write_bytes(whole)
    pictures = [{"bytes": png(picture(9, i, 0)), "path": ""} for i in range(5)]
    change(root / DATA, **{CAMERA: pictures})
    assert [read_picture(p)[0] for p in load(root).images[CAMERA][:]] == [9] * 5 + [2] * 3


def test_fingerprints_know_pictures_headers_and_not_the_place(tmp_path):
    cameras = {CAMERA: "image", WRIST: "video"}
    roots = [write_set(tmp_path / place, cameras=cameras) for place in ("here", "there")]
    here, there = (load(root, in_memory=False) for root in roots)
    assert here.fingerprint == there.fingerprint == load(roots[0]).fingerprint
    assert here.light_fingerprint == there.light_fingerprint
    assert load(roots[0], [WRIST]).fingerprint == here.fingerprint_of([WRIST]) != here.fingerprint
    change(roots[1] / DATA, **{CAMERA: [{"bytes": png(picture(9, 9, 9)), "path": ""}] * 8})
    other = load(roots[1], in_memory=False)
    assert other.fingerprint != here.fingerprint and other.light_fingerprint != here.light_fingerprint
    assert other.fingerprint_of([WRIST]) == here.fingerprint_of([WRIST])


# ------------------------------------------------------------------------------------------------------------
# parts and names


def test_cameras_get_the_names_that_are_asked_for(tmp_path):
    root = write_set(tmp_path, cameras={CAMERA: "image", "wrist_left": "image"})
    options = DataConfig(cameras=("front=image", "observation.images.wrist=wrist_left"))
    demos = load(root, options=options)
    assert list(demos.images) == ["observation.images.front", "observation.images.wrist"]
    check_pictures(demos, np.arange(8))
    only = load(root, ["wrist"], options=options)
    assert list(only.images) == ["observation.images.wrist"]
    assert read_picture(only.images["observation.images.wrist"][0])[2] == 1
    with pytest.raises(ValueError, match=r"unknown camera 'top' in --cameras: use front or wrist"):
        load(root, ["top"], options=options)
    with pytest.raises(ValueError, match=r"unknown camera 'image3' in .*: use image or wrist_left"):
        load(root, options=DataConfig(cameras=("front=image3",)))
    for wrong, message in {("a=",): "'a='", ("=a",): "'=a'", ("a=b", "a"): "two cameras one name"}.items():
        with pytest.raises(ValueError, match=message):
            DataConfig(cameras=wrong)


def test_tasks_are_chosen_by_number_by_instruction_and_by_suite(tmp_path, monkeypatch):
    root = write_set(tmp_path, (2, 3, 1, 4), tasks=("push the block", "Open the  drawer", "lift it"))
    for numbers, tasks, episodes in (
        ("0", (), [0, 3]),
        ("", ("open_the_drawer",), [1]),
        ("0,2", (), [0, 2, 3]),
        ("0-1", ("Open the drawer",), [1]),
    ):
        demos = load(root, options=DataConfig(task_ids=numbers, tasks=tasks))
        seen = [read_picture(demos.images[CAMERA][first])[0] for first in demos.first]
        assert seen == episodes
        assert demos.instruction(demos.first)[0] == ["push the block", "Open the  drawer"][episodes[0]]
    monkeypatch.setattr(selection, "suite_instructions", lambda suite: {"lift it", "open the drawer"})
    demos = load(root, options=DataConfig(suite="libero_toy", episodes="0-1"))
    assert [read_picture(demos.images[CAMERA][first])[0] for first in demos.first] == [1]
    with pytest.raises(ValueError, match="--tasks 'fly' is none of the 3 instructions"):
        load(root, options=DataConfig(tasks=("fly",)))
    with pytest.raises(ValueError, match=r"--episodes names 4, .* has 4: choose from 0\.\.3"):
        load(root, options=DataConfig(episodes="2-4"))
    with pytest.raises(ValueError, match=r"has no episode of --episodes 0, --task-ids 1"):
        load(root, options=DataConfig(task_ids="1", episodes="0"))
    with pytest.raises(ValueError, match=r"--task-ids 2-3 names 3, there are tasks 0\.\.2"):
        load(root, options=DataConfig(task_ids="2-3"))
    with pytest.raises(ValueError, match="--episodes '3-1' is no list of numbers"):
        DataConfig(episodes="3-1")


def test_the_instructions_of_a_suite_come_from_libero():
    found = selection.suite_instructions("libero_object")
    assert len(found) == 10 and "pick up the alphabet soup and place it in the basket" in found
    with pytest.raises(ValueError, match="suite 'libero_moon' is unknown"):
        selection.suite_instructions("libero_moon")


def test_caches_of_different_parts_have_different_places(tmp_path):
    parts = [{}, {"episodes": "0"}, {"episodes": "1"}, {"tasks": ("0",)}, {"suite": "libero_goal"}]
    parts += [{"cameras": ("front=image",)}]
    homes = [DataConfig(**part).cache_home(tmp_path) for part in parts]
    assert homes[0] == tmp_path and len(set(homes)) == len(homes)
    assert DataConfig(cameras=("image",), pictures="files").cache_home(tmp_path) == tmp_path


def test_pictures_stay_in_the_files_where_memory_is_short(tmp_path, monkeypatch, capsys):
    root = write_set(tmp_path)
    need = 8 * H * W * 3
    monkeypatch.setattr(loading, "available_memory", lambda: 2 * need)
    assert isinstance(load(root, in_memory=None).images[CAMERA], np.ndarray)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(loading, "available_memory", lambda: 2 * need - 1)
    assert isinstance(load(root, in_memory=None).images[CAMERA], StoredPictures)
    assert "stay in the files" in capsys.readouterr().out
    memory = DataConfig(pictures="memory")
    assert isinstance(load(root, in_memory=None, options=memory).images[CAMERA], np.ndarray)
    monkeypatch.setattr(loading, "available_memory", lambda: 4 * need)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # each rank would hold its own copy
    assert isinstance(load(root, in_memory=None).images[CAMERA], StoredPictures)


# ------------------------------------------------------------------------------------------------------------
# the hub


def test_a_hub_id_is_fetched_at_its_revision(tmp_path, monkeypatch, capsys):
    root = write_set(tmp_path / "c0ffee")
    asked = []

    def download(repo: str, **given: object) -> str:
        asked.append((repo, given))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert len(load("someone/toys", options=DataConfig(data_revision="c0ffee"))) == 8
    assert asked == [("someone/toys", {"repo_type": "dataset", "revision": "c0ffee"})]
    assert capsys.readouterr().out == ""
    load("someone/toys")
    assert "commit c0ffee, pin it with --data-revision" in capsys.readouterr().out


def test_without_network_the_hubs_cache_is_read_and_all_else_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "datasets--someone--toys"
    write_set(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert len(load("someone/toys", options=DataConfig(data_revision=commit))) == 8
    with pytest.raises(ValueError, match=r"someone/other is no folder here and can't be fetched") as error:
        load("someone/other")
    assert "\n" not in str(error.value)
    (tmp_path / "someone").mkdir()  # then it is a path that is written wrongly, and the hub isn't asked
    with pytest.raises(ValueError, match="no such data folder or file: someone/other"):
        load("someone/other")


# ------------------------------------------------------------------------------------------------------------
# what is refused


def info(root: Path, **fields: object) -> None:
    """Change fields of info.json; None drops one."""
    path = root / "meta" / "info.json"
    found = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def cut(path: Path, share: float = 0.7) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def column(path: Path, name: str, row: int, value: object) -> None:
    """Change one entry of a parquet file's column."""
    values = pq.read_table(path)[name].to_pylist()
    values[row] = value
    change(path, **{name: values})


def frames(count: int, size: tuple[int, int] = (H, W)) -> list[np.ndarray]:
    return [np.full((*size, 3), 10 * i, np.uint8) for i in range(count)]


DAMAGES = {
    "v2.1": (lambda r: info(r, codebase_version="v2.1"), "version v2.1, .*convert_dataset_v21_to_v30"),
    "v4": (lambda r: info(r, codebase_version="v4.0"), "version v4.0, v3.0 is read here: use a copy"),
    "no info": (lambda r: (r / "meta/info.json").unlink(), "info.json is missing"),
    "half an info": (lambda r: cut(r / "meta/info.json"), "info.json cannot be used, it is not a JSON"),
    "no fps": (lambda r: info(r, fps=None), "info.json cannot be used, it has no fps"),
    "no name of files": (lambda r: info(r, data_path=7), "info.json cannot be used, data_path is 7"),
    "fps 0": (lambda r: info(r, fps=0), "fps is 0, it must be a positive"),
    "fps in words": (lambda r: info(r, fps="10"), "info.json cannot be used, fps is '10'"),
    "total in words": (lambda r: info(r, total_frames="8"), "info.json cannot be used, total_frames is '8'"),
    "feature": (lambda r: info(r, features={"action": 7}), "info.json cannot be used, features.action is 7"),
    "no tasks": (lambda r: (r / "meta/tasks.parquet").unlink(), "tasks.parquet is missing"),
    "blank task": (lambda r: change(r / "meta/tasks.parquet", task=["a", " "]), "no instruction, got ' '"),
    "null task": (lambda r: change(r / "meta/tasks.parquet", task=["a", None]), "task 1 has no instruction"),
    "two texts": (
        lambda r: change(r / "meta/tasks.parquet", task=None, more=["a", "b"], most=["a", "b"]),
        "one column of text",
    ),
    "task twice": (
        lambda r: change(r / "meta/tasks.parquet", task_index=[0, 0]),
        "task 0 is there twice, 'push the block' and 'open the drawer'",
    ),
    "lost task": (
        lambda r: change(r / "meta/tasks.parquet", task_index=[0, 7]),
        r"episode 1 has no instruction for task_index 1, tasks.parquet has \[0, 7\]",
    ),
    "task changes": (
        lambda r: column(r / DATA, "task_index", 2, 1),
        r"episode 0 are \['open the drawer', 'push the block'\], meta/episodes says \['push the block'\]",
    ),
    "no episodes": (lambda r: shutil.rmtree(r / "meta/episodes"), "no chunk-.* in .*episodes"),
    "half the episodes": (lambda r: cut(r / EPISODES), "truncated or damaged"),
    "episode gap": (
        lambda r: column(r / EPISODES, "episode_index", 1, 5),
        "episode 5 begins at frame 4, not 8",
    ),
    "episode twice": (
        lambda r: (info(r, total_episodes=None), column(r / EPISODES, "episode_index", 2, 1)),
        r"episodes \[1\] are there twice",
    ),
    "empty episode": (lambda r: column(r / EPISODES, "length", 1, 0), "the shortest of no frames"),
    "wrong start": (
        lambda r: column(r / EPISODES, "dataset_from_index", 2, 6),
        "episode 2 begins at frame 6, not 5",
    ),
    "wrong total": (lambda r: info(r, total_frames=9), "have 8 frames, info.json says 9"),
    "column lost": (lambda r: change(r / EPISODES, length=None), "has no column length"),
    "no data": (lambda r: (r / DATA).unlink(), "file-000.parquet is missing, but meta/"),
    "half the data": (lambda r: cut(r / DATA), "file-000.parquet is truncated or damaged"),
    "empty data": (lambda r: (r / DATA).write_bytes(b""), "file-000.parquet is truncated or damaged"),
    "row lost": (
        lambda r: pq.write_table(pq.read_table(r / DATA).slice(0, 7), r / DATA),
        r"has 7 rows, its episodes 0\.\.2 have 8",
    ),
    "no action": (lambda r: change(r / DATA, action=None), "has no column action, there are"),
    "index gap": (lambda r: column(r / DATA, "index", 6, 9), "index is 9 in row 6, not 6, 1 rows"),
    "frame gap": (lambda r: column(r / DATA, "frame_index", 1, 2), "frame_index is 2 in row 1, not 1"),
    "nan": (
        lambda r: column(r / DATA, "action", 6, [float("nan")] * 7),
        "action has a non-finite value at step 1 of episode 2",
    ),
    "short vector": (lambda r: column(r / DATA, "action", 6, [0.0] * 6), "vectors of one length"),
    "null vector": (lambda r: column(r / DATA, "action", 6, None), "action has 1 empty rows"),
    "no picture": (lambda r: column(r / DATA, CAMERA, 6, {"bytes": None}), "row 6 holds no picture"),
    "no png": (lambda r: column(r / DATA, CAMERA, 6, {"bytes": b"hello"}), "row 6 is a damaged picture"),
    "half a png": (
        lambda r: column(r / DATA, CAMERA, 6, {"bytes": png(picture(1, 1, 1))[:90], "path": "x"}),
        "row 6 is a damaged picture",
    ),
    "bomb": (
        lambda r: column(r / DATA, CAMERA, 6, {"bytes": png(np.zeros((14_000, 14_000), bool)), "path": "x"}),
        "row 6 is a damaged picture .*pixels",
    ),
    "grey": (
        lambda r: column(r / DATA, CAMERA, 6, {"bytes": png(np.zeros((H, W), np.uint8)), "path": "x"}),
        "a picture in L, not in RGB",
    ),
    "other size": (
        lambda r: column(r / DATA, CAMERA, 6, {"bytes": png(np.zeros((W, H, 3), np.uint8)), "path": "x"}),
        r"row 6 is a picture of \(64, 48, 3\), the camera's others are \(48, 64, 3\)",
    ),
}  # fmt: skip
VIDEO_DAMAGES = {
    "no video": (lambda r: (r / VIDEO).unlink(), "file-000.mp4 is missing, but meta/"),
    "half a video": (lambda r: cut(r / VIDEO), "file-000.mp4 is truncated or damaged"),
    "no mp4": (lambda r: (r / VIDEO).write_bytes(b"hello"), "file-000.mp4 is truncated or damaged"),
    "frames lost": (
        lambda r: write_video(r / VIDEO, frames(7), 10),
        r"no frame at 0\.7000 s, step 2 of episode 2, the nearest of 7 is at 0\.6000 s: --episodes leaves",
    ),
    "other rate": (
        lambda r: write_video(r / VIDEO, frames(8), 12),
        r"no frame at 0\.1000 s, step 1 of episode 0.*--nearest-frame 0.4 takes",
    ),
    "shifted": (
        lambda r: column(r / EPISODES, f"videos/{CAMERA}/from_timestamp", 1, 0.45),
        r"no frame at 0\.4500 s",
    ),
    "sizes": (
        lambda r: write_video(r / VIDEO.replace("000.mp4", "001.mp4"), frames(3, (16, 16)), 10),
        r"a picture of \(16, 16, 3\), the camera's others are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_data_are_refused_in_one_line(name, tmp_path):
    damage, message = DAMAGES[name]
    load(write_set(tmp_path))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value) and ": " in str(error.value)


@pytest.mark.parametrize("name", VIDEO_DAMAGES)
def test_damaged_videos_are_refused_in_one_line(name, tmp_path):
    damage, message = VIDEO_DAMAGES[name]
    places = {CAMERA: [(0, 0), (0, 0), (0, int(name == "sizes"))]}
    load(write_set(tmp_path, cameras={CAMERA: "video"}, video_files=places))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_damage_that_comes_while_a_file_is_open_is_seen(tmp_path):
    demos = load(write_set(tmp_path, cameras={CAMERA: "video"}), in_memory=False)
    check_pictures(demos, np.arange(8))
    write_video(tmp_path / VIDEO, frames(4), 10)
    with pytest.raises(ValueError, match="no frame at"):
        demos.images[CAMERA][:]


def test_frames_are_read_on_where_they_follow_and_looked_for_where_they_do_not(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", [picture(0, i, 0) for i in range(60)], 10, gop=20)
    jumps = []
    jump = Video.jump
    monkeypatch.setattr(Video, "jump", lambda self, wanted: jumps.append(wanted) or jump(self, wanted))
    video = Video(tmp_path / "a.mp4")
    assert [read_picture(p)[1] for p in video.read(np.arange(10, 40, 3))] == list(range(10, 40, 3))
    assert len(jumps) == 1
    assert [read_picture(p)[1] for p in video.read(np.array([39, 59, 0, 20, 19]))] == [39, 59, 0, 20, 19]
    assert len(jumps) == 5
