"""Pictures that are decoded ahead are those in the files, and training can't tell how they came."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_set import write_set, write_video
from safetensors.torch import load_file
from test_train import metrics

import eval as eval_program
import train
from eval import EvalConfig
from readers.demos import Demos, StoredPictures
from readers.load import decode_all, load, remember_checks
from readers.prefetch import Loader, Prefetched
from train import TrainConfig

SETS = Path(__file__).resolve().parents[1] / "lerobot_v3"
CAMERA, WRIST = "observation.images.image", "observation.images.image2"
SHORT = {"total_samples": 12, "batch_size": 4, "log_every": 1, "freeze": "expert"}


@pytest.fixture(autouse=True)
def random_trunks_will_do(monkeypatch):
    monkeypatch.setattr(train, "check_trunk", lambda _: None)  # weights do not matter here


@pytest.fixture(scope="module")
def loader():
    """A process that decodes a set of one camera in images and one in a video."""
    demos = load(SETS / "L_video" / "dataset", in_memory=False)
    running = Loader(demos, workers=1)
    yield running
    running.close()


def test_what_was_asked_for_ahead_is_what_the_files_hold(loader, monkeypatch):
    demos, cameras = loader.demos, (CAMERA, WRIST)
    plain = {camera: demos.images[camera].only(np.arange(6)) for camera in cameras}
    wanted = load(SETS / "L_video" / "dataset")
    for index in ([138, 0, 7, 7, 8, 40, 3, 2, 1, 99, 138], [5]):
        index = np.array(index)
        loader.expect(index, cameras)
        loader.expect(index, cameras)  # nothing is done twice
        monkeypatch.setattr(StoredPictures, "__getitem__", lambda *_: pytest.fail("decoded here"))
        for camera in cameras:
            assert torch.equal(demos.frames(index, camera), wanted.frames(index, camera))
        monkeypatch.undo()
        assert not any(loader.coming.values())
        for camera in cameras:  # nobody asked for them this time
            assert torch.equal(demos.frames(index, camera), wanted.frames(index, camera))
    assert all(isinstance(pictures, Prefetched) for pictures in plain.values())
    np.testing.assert_array_equal(demos.images[CAMERA][3:9], wanted.images[CAMERA][3:9])


def test_damage_is_said_in_the_same_line(tmp_path):
    demos = load(write_set(tmp_path, cameras={CAMERA: "video"}), in_memory=False)
    write_video(
        tmp_path / f"videos/{CAMERA}/chunk-000/file-000.mp4", [np.zeros((48, 64, 3), np.uint8)] * 3, 10
    )
    running = Loader(demos, workers=1)
    try:
        running.expect(np.array([0, 7]), (CAMERA,))
        with pytest.raises(ValueError, match=r"file-000.mp4 has no frame at 0\.7000 s"):
            running.demos.frames(np.array([0, 7]), CAMERA)
        running.expect(np.array([1]), (CAMERA,))
        for process in list(running.pool._processes.values()):
            process.kill()
        deadline = time.monotonic() + 20
        with pytest.raises(ValueError, match=r"process that decodes pictures died .*lower --workers"):
            while time.monotonic() < deadline:
                running.expect(np.array([2]), (CAMERA,))
                running.demos.frames(np.array([2]), CAMERA)
    finally:
        running.close()


@pytest.mark.slow
def test_training_is_the_same_wherever_pictures_are(tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(SETS / "L_video" / "dataset", root)
    runs = {"memory": {}, "files": {}, "worker": {"pictures": "files", "workers": 1, "accumulate": 1}}
    for run, fields in runs.items():
        fields = {"pictures": run} | fields
        train.main(TrainConfig(data=root, out=tmp_path / run, cameras=("front=image2",), **SHORT, **fields))
    out = capsys.readouterr().out
    assert out.count("statistics: the data's, the data set's own, meta/stats.json") == 3
    assert out.count("decoding") == 1  # the second run finds the fingerprint
    weights = [load_file(tmp_path / run / "last" / "model.safetensors") for run in runs]
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in runs]
    assert len(losses[0]) == 3 and losses[0] == losses[1] == losses[2]


def test_fingerprints_are_kept_only_for_the_files_that_they_were_taken_of(tmp_path, monkeypatch, capsys):
    root = write_set(tmp_path / "set")

    def remembered() -> Demos:
        return remember_checks(load(root, in_memory=False), root)

    whole = load(root).fingerprint
    assert remember_checks(load(root), root).checks == {}  # in memory they are cheap
    assert remembered().fingerprint == whole and "decoding" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(StoredPictures, "__getitem__", lambda *_: pytest.fail("decoded a picture"))
        patch.setattr("readers.lerobot_v3.stored_pictures", stand_in(load(root, in_memory=False)))
        assert remembered().fingerprint == whole
    write_set(root, seed=1)
    assert remembered().fingerprint == load(root).fingerprint != whole
    assert "decoding" in capsys.readouterr().out
    (root / "picture_checks.json").write_text('{"headers": ')
    assert remembered().fingerprint == load(root).fingerprint


def test_the_work_of_fingerprints_can_be_shared_and_one_process_writes_them(tmp_path):
    root, asked = write_set(tmp_path / "set"), []

    def decode(demos: Demos) -> Demos:
        asked.append(demos)
        return decode_all(demos)

    other = remember_checks(load(root, in_memory=False), root, decode, writes=False)
    assert len(asked) == 1 and not (root / "picture_checks.json").exists()
    first = remember_checks(load(root, in_memory=False), root, decode)
    assert len(asked) == 2 and first.checks == other.checks and (root / "picture_checks.json").exists()
    remember_checks(load(root, in_memory=False), root, decode, writes=False)
    assert len(asked) == 2


def stand_in(demos: Demos):
    """Return pictures that were found before, so that nothing is decoded to learn their size."""
    return lambda root, info, camera, *_: demos.images[camera]


def test_offline_evaluation_reads_the_part_that_was_trained_on(tmp_path, capsys):
    root, part = SETS / "L_video" / "dataset", {"episodes": "0-3,5", "cameras": ("front=image",)}
    held = {"val_every": 12, "val_share": 0.4}
    home = tmp_path / "set"
    shutil.copytree(root, home)
    train.main(TrainConfig(data=home, out=tmp_path / "run", **part, **held, **SHORT))
    eval_program.main(EvalConfig(str(tmp_path / "run"), offline=home))
    line = json.loads((tmp_path / "run" / "offline.jsonl").read_text())
    measured = metrics(tmp_path / "run")[-1]["val_loss_off"]
    assert f"{measured:.4f}" in capsys.readouterr().out and len(line["episodes"]) == 2
