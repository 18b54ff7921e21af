"""What strangers' files may not do: write or read outside of their folder, run code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from files import Refused, plain_name
from model import load_policy
from readers import lerobot_v3, libero_hdf5
from readers.lerobot_meta import FIELDS, check_pattern
from simulator.env import load_init_states
from smolvla.checkpoint import save_policy

NAMES = (
    "../../outside.pth",
    "/tmp/outside.pth",
    "a/b.safetensors",
    "..",
    "",
    ".hidden",
    "a\\b",
    "C:x",
    "a\0b",
    5,
)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_only_a_plain_name_is_a_files_name(name):
    with pytest.raises(Refused, match="only a plain file name"):
        plain_name(name, "config.json")
    assert plain_name("model-00001-of-00002.safetensors", "x") == "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("step", ["normalizer_processor", "rename_observations_processor"])
@pytest.mark.parametrize("where", ["../../escaped.pth", "{absolute}"])
def test_a_processor_that_names_a_file_elsewhere_is_refused(folder, tmp_path, step, where):
    path = folder / "policy_preprocessor.json"
    description = json.loads(path.read_text())
    [found] = [s for s in description["steps"] if s["registry_name"] == step]
    found["state_file"] = where.format(absolute=tmp_path / "escaped.pth")
    path.write_text(json.dumps(description))
    with pytest.raises(Refused, match=r"policy_preprocessor.json names a file .*escaped.pth"):
        load_policy(folder)


def test_what_is_saved_lies_in_its_folder_under_our_own_names(folder, tmp_path):
    """Whatever a description says by the time it is written."""
    policy, processor = load_policy(folder)
    for step in processor.before["steps"]:
        step["state_file"] = "../escaped.pth"
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    save_policy(tmp_path / "out" / "saved", policy, processor)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(tmp_path / "out" / "saved") for path in made)
    again, _ = load_policy(tmp_path / "out" / "saved")
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), again.parameters()))
    assert len(load_file(tmp_path / "out/saved/policy_preprocessor_step_5_normalizer_processor.safetensors"))


class Payload:
    """A pickle that would write a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.fixture
def init_states(tmp_path, monkeypatch):
    """A LIBERO package whose init states are a file of a stranger's."""
    path = tmp_path / "suite" / "task.pruned_init"
    path.parent.mkdir()
    libero = pytest.importorskip("libero.libero")
    monkeypatch.setattr(libero, "get_libero_path", lambda _: str(tmp_path))
    task = SimpleNamespace(problem_folder="suite", init_states_file=path.name)

    def refuse(_):
        raise pickle.UnpicklingError("Weights only load failed")

    return path, SimpleNamespace(get_task_init_states=refuse, get_task=lambda _: task)


def test_init_states_are_arrays_and_run_nothing(init_states, tmp_path):
    path, suite = init_states
    states = np.arange(6.0).reshape(2, 3)
    torch.save(states, path)
    assert np.array_equal(load_init_states(suite, 0), states)
    torch.save(Payload(tmp_path / "ran"), path)
    with pytest.raises(Refused, match="holds more than an array"):
        load_init_states(suite, 0)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "pattern",
    [
        "../outside/x",
        "/etc/x",
        "{0}",
        "{nope}",
        "{chunk_index:09999999999d}",
        "{chunk_index.real}",
        5,
        "{video_key}/x",
        "{video_key:3d}/x",
    ],
)
def test_a_pattern_of_file_names_asks_for_nothing_but_its_numbers(pattern):
    with pytest.raises(Refused, match=r"info\.json: data_path is"):
        check_pattern(pattern, "info.json: data_path", FIELDS["data_path"])
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    check_pattern(video, "info.json: video_path", FIELDS["video_path"])
    with pytest.raises(Refused, match="video_path is"):
        check_pattern(video.replace("key", "key:3d"), "info.json: video_path", FIELDS["video_path"])


def test_a_data_set_whose_file_is_a_link_out_of_it_is_refused(tmp_path):
    shutil.copytree(Path(__file__).parent / "lerobot_v3/L_image/dataset", tmp_path / "set")
    [file, *_] = (tmp_path / "set").rglob("data/**/*.parquet")
    file.rename(tmp_path / "outside.parquet")
    file.symlink_to(tmp_path / "outside.parquet")
    with pytest.raises(Refused, match="leads out of"):
        lerobot_v3.read(tmp_path / "set")


@pytest.mark.parametrize("kind", ["soft", "external", "elsewhere"])
def test_an_hdf5_file_shows_nothing_of_other_files(kind, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(64))
    with h5py.File(tmp_path / "x_demo.hdf5", "w") as file:
        obs = file.create_group("data/demo_0/obs")
        if kind == "elsewhere":
            obs.create_dataset("agentview_rgb", (64,), np.uint8, external=[(tmp_path / "secret", 0, 64)])
        else:
            link = h5py.SoftLink("/data") if kind == "soft" else h5py.ExternalLink("other.hdf5", "/x")
            obs["agentview_rgb"] = link
    with pytest.raises(Refused, match=r"is a link|stored in another file"):
        libero_hdf5.read(tmp_path)


def test_of_a_language_models_folder_only_its_own_files_are_handed_on(folder):
    (folder.parent / "vlm" / "secrets.json").write_text("{}")
    _, processor = load_policy(folder)
    assert "tokenizer.json" in processor.language.files and "secrets.json" not in processor.language.files
