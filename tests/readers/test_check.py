"""`data.py inspect` says what is there, `data.py check` all that is wrong, in either layout."""

import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_set import H, W, change, picture, png, write_set, write_video
from PIL import Image
from test_data import drop, edit, make_public, replace, truncate, write_task

from files import Refused
from readers.check import TILE, check, contact_sheet, main
from readers.load import load

ROOT = Path(__file__).resolve().parents[2]
SETS = ROOT / "tests" / "lerobot_v3"
CAMERA, WRIST = "observation.images.image", "observation.images.image2"
DATA = "data/chunk-000/file-000.parquet"


def run(monkeypatch, capsys, *arguments: object) -> tuple[int | str, str]:
    """Run the command line in this process: exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_inspect_prints_an_hdf5_set(tmp_path, monkeypatch, capsys):
    path = write_task(tmp_path / "a_demo.hdf5")
    code, out = run(monkeypatch, capsys, "inspect", path, "--out", tmp_path / "sheet.png")
    assert code == 0
    for text in (
        "2 episodes, 8 frames (3 to 5 an episode), 1 tasks",
        "observation.images.image2: 8x8",
        'task 0: "pick up the a_demo", 2 episodes',
        "init_state_ids: [10, 11]",
        "env_seed: 7",
        "sample frames: ",
    ):
        assert text in out
    code, _ = run(monkeypatch, capsys, "inspect", tmp_path / "no")
    assert str(code).startswith("error: no such data folder") and "\n" not in code


@pytest.mark.slow
def test_inspect_prints_a_lerobot_set_and_a_part_of_it(tmp_path):
    command = [sys.executable, ROOT / "data.py", "inspect", SETS / "L_video" / "dataset"]
    command += ["--task-ids", "1"]
    command += ["--cameras", "front=image", "--out", tmp_path / "sheet.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for text in ("2 episodes, 51 frames", "camera observation.images.front: 64x64", "fps: 10"):
        assert text in done.stdout
    assert 'task 1: "put the red block on the blue plate", 2 episodes' in done.stdout
    assert "task 0" not in done.stdout


def test_the_sheet_shows_the_first_and_the_last_frame(tmp_path):
    demos = load(write_set(tmp_path, (4, 1, 3), cameras={CAMERA: "image", WRIST: "image"}))
    sheet = np.asarray(contact_sheet(demos))
    tile, line = TILE, 14
    assert sheet.shape == (3 * (tile + line), 6 * tile, 3)
    for row, episode in enumerate(range(3)):
        top = row * (tile + line) + line + 1
        ends = (0, demos.images[CAMERA][demos.first[episode]]), (2, demos.images[CAMERA][demos.last[episode]])
        for column, wanted in ends:
            np.testing.assert_array_equal(sheet[top : top + H, column * tile + 1 :][:, :W], wanted)
        assert (sheet[top - line : top - 1] != 255).any()  # the instruction


@pytest.mark.parametrize("name", ["L_image", "L_video"])
def test_a_sound_set_has_no_findings(name, monkeypatch, capsys):
    code, out = run(monkeypatch, capsys, "check", SETS / name / "dataset")
    assert code == 0 and out.endswith("0 errors, 0 warnings\n")


def test_check_names_everything_that_is_wrong_with_a_lerobot_set(tmp_path, monkeypatch, capsys):
    lengths = (4, 1, 3, 5, 2)
    places = {WRIST: [(0, 0)] * 3 + [(0, 1)] * 2}
    root = write_set(
        tmp_path,
        lengths,
        {CAMERA: "image", WRIST: "video"},
        [(0, 0)] * 3 + [(0, 1), (1, 0)],
        places,
        tasks=("a", "b"),
    )
    (root / "meta" / "stats.json").write_text("{}")
    table = pq.read_table(root / DATA).to_pydict()
    table["action"] = [
        [float("nan") if i in (1, 6) else 0.0] + row[1:] for i, row in enumerate(table["action"])
    ]
    table["frame_index"][2], table["index"][7], table["task_index"][4] = 9, 70, 5
    table["timestamp"][3] = 0.5
    table[CAMERA][5] = {"bytes": b"no picture", "path": ""}
    change(root / DATA, **table)
    truncate(root / "data/chunk-000/file-001.parquet")
    write_video(root / f"videos/{WRIST}/chunk-000/file-001.mp4", [picture(3, i, 1) for i in range(5)], 10)
    write_set(tmp_path / "other", (2,))
    (tmp_path / "other" / DATA).rename(root / "data/chunk-000/file-009.parquet")
    code, out = run(monkeypatch, capsys, "check", root)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    for message in (
        "frame_index is 9 in row 2, not 2",
        "index is 70 in row 7, not 7",
        "action has a non-finite value at step 1 of episode 0",
        "action has a non-finite value at step 1 of episode 2",
        "episode 0 shows step 3 at 0.5000 s, but meta/episodes gives it 0.0000 to 0.4000 s",
        "episode 1 has no instruction for task_index 5, tasks.parquet has [0, 1]",
        "chunk-000/file-001.parquet is truncated or damaged",
        f"{CAMERA} in row 5 is a damaged picture",
        "file-001.mp4 has no frame at 0.5000 s",
    ):
        assert [line for line in errors if message in line], message
    assert "timestamp is 0.5000 s, not 0.3000 s at step 3 of episode 0, 1 rows in all" in out
    assert f"warning: {root}/meta/stats.json is missing or incomplete" in out
    assert "file-009.parquet belongs to no episode" in out
    assert code == 1 and f"{len(errors)} errors" in out


def test_what_may_be_meant_so_is_a_warning(tmp_path, monkeypatch, capsys):
    root = write_set(tmp_path, (4, 3), {CAMERA: "video"})
    states = pq.read_table(root / DATA)["observation.state"].to_pylist()
    change(root / DATA, **{"observation.state": [[*row[:3], 0.25, *row[4:]] for row in states]})
    frames = [picture(0, i, 0) for i in range(9)]
    write_video(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", frames, 10)
    code, out = run(monkeypatch, capsys, "check", root)
    assert "warning: observation.state: dimension 3 is 0.25 in all 7 frames" in out
    assert "has 9 frames, 7 belong to episodes" in out
    assert code == 0 and "0 errors, 3 warnings" in out  # and no stats.json


def test_without_decoding_videos_are_counted_all_the_same(tmp_path):
    root = write_set(tmp_path, (4, 3), {CAMERA: "image", WRIST: "video"})
    table = pq.read_table(root / DATA)[CAMERA].to_pylist()
    change(root / DATA, **{CAMERA: [*table[:6], {"bytes": png(np.zeros((4, 4), np.uint8)), "path": ""}]})
    assert [e for e in check(root).errors if "a picture in L" in e]
    assert not check(root, decode=False).errors
    write_video(root / f"videos/{WRIST}/chunk-000/file-000.mp4", [picture(0, i, 1) for i in range(6)], 10)
    assert ["no frame at 0.6000 s" in e for e in check(root, decode=False).errors] == [True]


def test_a_set_whose_head_is_lost_is_one_error(tmp_path):
    root = write_set(tmp_path)
    (root / "meta" / "info.json").write_text("{")
    assert len(check(root).errors) == 1
    assert "info.json cannot be used" in check(root).errors[0]


def test_check_goes_through_all_files_of_an_hdf5_set(tmp_path, monkeypatch, capsys):
    good, cut, torn = (write_task(tmp_path / f"{name}_demo.hdf5", (5, 3, 4)) for name in "abc")
    drop(good, "demo_0/actions")
    with h5py.File(good, "a") as file:
        file["data/demo_0/actions"] = np.full((5, 7), np.nan)
    replace(good, "obs/ee_pos", np.full((3, 3), np.inf))
    truncate(cut)
    edit(torn, problem_info="{}")
    code, out = run(monkeypatch, capsys, "check", tmp_path)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 4
    for line, message in zip(sorted(errors), (
        "a_demo.hdf5: demo_0: actions has a non-finite value at step 0",
        "a_demo.hdf5: demo_1: state has a non-finite value at step 0",
        "b_demo.hdf5 is truncated or damaged",
        "c_demo.hdf5: problem_info has no language_instruction",
    )):  # fmt: skip
        assert message in line


def test_check_decodes_pictures_in_hdf5_and_warns_of_what_never_moves(tmp_path):
    path = write_task(tmp_path / "a_demo.hdf5")
    make_public(path)
    with h5py.File(path, "a") as file:
        for name in ("demo_0", "demo_1"):
            file[f"data/{name}/actions"][:, 6] = -1
        del file["data/demo_1/obs/agentview_rgb"]
        pictures = file["data/demo_1/obs"].create_dataset(
            "agentview_rgb", data=np.ones((3, 8, 8, 3), np.uint8), chunks=(3, 8, 8, 3), fletcher32=True
        )
        offset = pictures.id.get_chunk_info(0).byte_offset
    assert check(path).errors == []
    assert check(path).warnings == ["action: dimension 6 is -1 in all 6 frames"]
    with open(path, "r+b") as raw:
        raw.seek(offset)
        raw.write(b"\x55\x55\x55")
    assert len(check(path).errors) == 1 and "truncated or damaged" in check(path).errors[0]
    assert check(path, decode=False).errors == []


def test_the_sheet_is_a_picture_that_opens(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sheet.png"
    run(monkeypatch, capsys, "inspect", SETS / "L_image" / "dataset", "--out", out)
    with Image.open(out) as sheet:
        assert sheet.size == (6 * TILE, 6 * (TILE + 14))


@pytest.mark.parametrize("name", ["info.json", "stats.json"])
def test_json_that_is_nested_without_end_is_one_line(name, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(Path(__file__).parents[1] / "lerobot_v3" / "L_image" / "dataset", root)
    (root / "meta" / name).write_text('{"a": ' + "[" * 100_000)
    try:
        errors = check(root).errors
    except Refused as error:
        errors = [str(error)]
    assert (
        (len(errors) == 1 and "info.json cannot be used" in errors[0]) if name == "info.json" else not errors
    )
