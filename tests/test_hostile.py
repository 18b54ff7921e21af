"""What strangers' files may not do: write or read outside of their folder, run code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import safetensors
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_arm import processor
from test_data import write_task

import model
import train
from arm import ArmConfig, fingerprint, load_arm, save_arm, stored_config
from bench.control import ControlConfig
from eval import EvalConfig, Work
from files import (
    NO_ARRAY,
    Refused,
    Unwritable,
    append_json,
    json_lines,
    misfit,
    only_writer,
    plain_name,
    save_tensors,
    shape_of,
    write_json,
)
from model import load_policy
from prophet import ROLLOUT_MODES
from readers import lerobot_v3, libero_hdf5
from readers.lerobot_meta import FIELDS, check_pattern
from report.reading import load_runs
from rollouts import episodes
from rollouts.plan import find_target, make_plans
from rollouts.rollout import Episode, Rollout
from simulator import verify
from simulator.env import CAMERAS, SCENES, load_init_states, scenes
from simulator.pool import Observation
from simulator.record import DemoConfig
from smolvla.checkpoint import read_cameras, save_policy
from smolvla.folders import MANIFEST, OPTIMIZER, checksum, damage, newest_whole, point
from train import TrainConfig
from training import run_folder
from training.run_folder import Progress

ROOT, CPU = Path(__file__).resolve().parents[1], torch.device("cpu")
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


# ---- weights, actions, numbers --------------------------------------------------------------------------


def spoil(path: Path, name: str, value: float) -> None:
    """Set one number of a tensor in a file."""
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    with safetensors.safe_open(path, "pt") as file:
        save_file(tensors, path, file.metadata())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_read_nor_written(value, tmp_path):
    arm = tiny.arm()
    save_arm(tmp_path / "whole", arm, processor())
    for file, name in (("model", "model.state_proj.bias"), ("world", "prophet.query")):
        shutil.copytree(tmp_path / "whole", tmp_path / file)
        name = next(n for n in load_file(tmp_path / file / f"{file}.safetensors") if n.startswith(name))
        spoil(tmp_path / file / f"{file}.safetensors", name, value)
        ours = name.removeprefix("model.")
        with pytest.raises(Refused, match=rf"{file}.*1 of \S+ numbers of {ours} are not finite"):
            load_arm(tmp_path / file)
    with torch.no_grad():
        arm.policy.state_proj.bias[0] = value
    with pytest.raises(Refused, match=r"state_proj\.bias are not finite"):
        save_arm(tmp_path / "new", arm, processor())
    assert not (tmp_path / "new").exists()


def test_a_policy_whose_actions_are_not_finite_ends_an_evaluation_instead_of_failing_it():
    arm = tiny.arm().eval().requires_grad_(False)
    arm.policy.action_out_proj.weight.fill_(3e38)  # finite, but what it computes is not
    [plan] = make_plans(EvalConfig(episodes_per_task=2), tiny.run_config(), arm)
    pictures = {(0, camera): np.zeros((32, 32, 3), np.uint8) for camera in CAMERAS}
    seen = Observation(np.zeros(8, np.float32), pictures, False, False, 0, "open the drawer", 0.0, 0.0)
    for mode in ROLLOUT_MODES:
        rollout = Rollout(arm, processor(), plan, mode, None, CPU, "runs/x/step_9")
        rollout.running[0] = episode = Episode(1, 3, mode, names=rollout.names)
        episode.see(seen, arm, rollout.keep_history)
        said = f"runs/x/step_9, memory {mode}.*not finite .libero_object task 1, init state 3, decision 0"
        with pytest.raises(Refused, match=said):
            rollout.decide([(0, seen)])


@pytest.mark.parametrize("config", [TrainConfig, EvalConfig, DemoConfig, ControlConfig, verify.Command])
def test_every_number_on_a_command_line_is_finite(config):
    numbers = [f for f in dataclasses.fields(config) if re.search("float|int", str(f.type)) and f.init]
    assert numbers
    for field in numbers:
        if field.name == "held_out":  # not on the command line
            continue
        for value in (float("nan"), float("inf"), -float("inf"), 10**30):
            value = (value,) if "tuple" in str(field.type) else value
            with pytest.raises(Refused, match=f"--{field.name.replace('_', '-')} "):
                config(**{field.name: value})


@pytest.mark.parametrize(
    "flags",
    ["lr=-1", "lr_world=-1", "warmup_samples=-5", "grad_clip=0", "seed=-1", "val_share=2", "threads=0"],
)
def test_a_number_out_of_its_range_is_named_with_it(flags):
    name, _, value = flags.partition("=")
    with pytest.raises(Refused, match=f"--{name.replace('_', '-')} {value} must be at"):
        TrainConfig(**{name: int(value)})


# ---- checkpoints that are not as they were written -----------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with two checkpoints and their manifests, as train.py leaves it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    out.mkdir()
    arm = tiny.arm()
    (out / "config.json").write_text(json.dumps(tiny.run_config(fusion=["late"]) | {"fusion": ["late"]}))
    for step in (1, 2):
        optimizer = torch.optim.AdamW(arm.parameters(), lr=step)
        run_folder.save(out, arm, processor(), optimizer, Progress(8 * step, step))
        with torch.no_grad():
            arm.policy.state_proj.bias += 1
    return out


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def openers(folder: Path) -> list:
    """What opens a checkpoint: an evaluation, the description of one, and a training that starts from it."""
    config = EvalConfig(str(folder))
    return [
        lambda: load_arm(find_target(config).folder),
        lambda: model.main(model.DescribeConfig(str(folder))),
        lambda: load_policy(folder),
        lambda: read_cameras(str(folder), None),
        lambda: stored_config(folder),
    ]


def flip(path: Path) -> None:
    """Turn one bit in a file's middle around."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_named_by_all_that_open_it(run):
    step = run / "step_000002"
    files = [p for p in step.rglob("*") if p.is_file() and p.name != OPTIMIZER]
    assert len(files) > 10
    for path in files:
        whole = path.read_bytes()
        flip(path)
        for open_it in openers(step):
            with pytest.raises(Refused, match=rf"step_000002 is damaged: .*{path.name}"):
                open_it()
        path.write_bytes(whole)
    for open_it in openers(step):
        open_it()


def test_a_checkpoint_serves_without_what_only_training_needs_and_one_of_lerobots_without_a_manifest(run):
    (run / "step_000002" / OPTIMIZER).unlink()
    load_arm(run / "step_000002")
    (run / "step_000002" / MANIFEST).unlink()
    load_arm(run / "step_000002")
    assert newest_whole(run)[0] == run / "step_000001"  # to go on from it takes all


@pytest.mark.parametrize("says", ["manifest", "config"])
def test_a_memory_that_is_lost_is_an_error_and_no_policy_without(run, says):
    (run / "step_000002" / "world.safetensors").unlink()
    if says == "config":
        (run / "step_000002" / MANIFEST).unlink()
    with pytest.raises(Refused, match=r"world\.safetensors is missing"):
        load_arm(run / "step_000002")


def test_a_manifest_reads_nothing_elsewhere(run):
    for name in ("../config.json", "/etc/hostname"):
        (run / "step_000002" / MANIFEST).write_text(json.dumps({name: {"bytes": 1, "crc32": 0}}))
        with pytest.raises(Refused, match=r"speaks of .*, which lies elsewhere"):
            load_arm(run / "step_000002")


def a_folder(run: Path) -> None:
    last = run / "last"
    last.unlink()
    shutil.copytree(run / "step_000002", last)


def a_folder_alone(run: Path) -> None:
    a_folder(run)
    for step in run.glob("step_*"):
        shutil.rmtree(step)


def a_link_to(target: str):
    def change(run: Path) -> None:
        (run / "last").unlink()
        (run / "last").symlink_to(target)

    return change


MOVES = {
    "gone": lambda run: (run / "last").unlink(),
    "a folder, by cp -rL": a_folder,
    "a folder and nothing else": a_folder_alone,
    "a link to abc": a_link_to("abc"),
    "a link out of it": a_link_to("/tmp"),
    "a text, by a zip": lambda run: ((run / "last").unlink(), (run / "last").write_text("step_000002")),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_run_folder_that_was_moved_goes_on_from_its_newest_step(run, move):
    move(run)
    assert find_target(EvalConfig(str(run))).folder.name in ("step_000002", "last")
    for open_it in openers(run)[1:]:
        open_it()
    found, skipped = newest_whole(run)
    assert point(run, found) == run / "step_000002" and not skipped
    assert (run / "last").is_symlink() and (run / "last").resolve() == run / "step_000002"
    assert damage(run / "last") is None and not list(run.glob("*.part"))


def test_of_a_run_whose_newest_step_is_damaged_the_one_before_is_taken_with_a_line(run, capsys):
    flip(run / "step_000002" / "model.safetensors")
    assert find_target(EvalConfig(str(run))).folder.name == "step_000001"
    assert (
        "step_000002 is damaged, the checkpoint before it is taken: model.safetensors"
        in capsys.readouterr().out
    )
    flip(run / "step_000001" / "config.json")
    with pytest.raises(Refused, match="no whole checkpoint"):
        find_target(EvalConfig(str(run)))


# ---- JSON that is not what it should be -----------------------------------------------------------------

NOT_JSON = {
    "nested": "[" * 100_000 + "]" * 100_000,
    "latin-1": '{"a": "\u00e9"}'.encode("latin-1"),
    "nothing": "",
    "half": '{"a": [1, 2',
    **{text: text for text in ("null", "[]", "5", '"text"', "true")},
}
NOT_JSON = {name: x if isinstance(x, bytes) else x.encode() for name, x in NOT_JSON.items()}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize(
    "name", ["config.json", "policy_preprocessor.json", "policy_postprocessor.json", "manifest.json",
    "vlm/config.json", "vlm/tokenizer_config.json", "vlm/tokenizer.json"]
)  # fmt: skip
def test_json_of_a_checkpoint_that_is_none_is_one_line_with_its_name(run, name, content):
    step = run / "step_000002"
    if name != MANIFEST:
        (step / MANIFEST).unlink()
    (step / name).write_bytes(content)
    with pytest.raises(Refused, match=Path(name).name) as error:
        load_arm(step)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


WRONG = {
    "config.json": ("input_features", "output_features", "chunk_size", "vlm_model_name", "min_period",
        "normalization_mapping", "resize_imgs_with_padding", "num_vlm_layers", "attention_mode", "type"),
    "policy_preprocessor.json": ("steps",),
    "vlm/config.json": ("text_config", "vision_config", "scale_factor"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in WRONG.items() for key in keys])
def test_a_field_of_another_type_or_size_is_one_line(run, name, key):
    path = run / "step_000002" / name
    whole = json.loads(path.read_text())
    (run / "step_000002" / MANIFEST).unlink()
    for value in (None, [], {}, "text", -(10**12), 10**12, 1.5, True, [None], [[]], {"a": 5}):
        path.write_text(json.dumps(whole | {key: value}))
        try:
            load_arm(run / "step_000002")
        except Refused as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_a_line_that_is_no_episode_is_named_with_its_number(tmp_path, content):
    path = tmp_path / "episodes.jsonl"
    fields = {"checkpoint": "a", "memory": "off", "suite": "s", "task_id": 1, "init_state": 2}
    whole = json.dumps(fields | {"protocol": {}, "success": True, "crash": None}).encode() + b"\n"
    path.write_bytes(whole + content)  # cut off, or being written
    assert len(episodes.read_lines(path)) == 1
    path.write_bytes(whole + content + b"\n")
    if content:
        with pytest.raises(Refused, match=r"episodes.jsonl:2 is no episode"):
            episodes.read_lines(path)


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_a_log_and_a_runs_record_that_are_damaged_are_named_or_left_out(run, content):
    (run / "metrics.jsonl").write_bytes(b'{"samples": 8}\n' + content)
    run_folder.cut_metrics(run, 8)
    assert (run / "metrics.jsonl").read_text() == '{"samples": 8}\n'
    (run / "config.json").write_bytes(content)
    for read in (lambda: find_target(EvalConfig(str(run))), lambda: run_folder.open_run(run, {}, {}, ())):
        with pytest.raises(Refused, match=r"run/config\.json"):
            read()
    _, [aside] = load_runs((run,))
    assert "config.json" in str(aside)


def test_the_shape_of_json_says_what_is_where():
    shape = {"a": int, "b?": [float | None], "c?": {str: {"d": bool}}, "e?": ([int], type(None))}
    for value, said in (
        ({"a": 1}, ""),
        ({"a": 1, "b": [0.5, None], "c": {"x": {"d": True}}, "e": None, "f": 5}, ""),
        ({}, "it has no a"),
        ({"a": True}, "a is True"),
        ({"a": 1, "b": [0.5, "x"]}, "b[1] is 'x'"),
        ({"a": 1, "c": {"x": {}}}, "c.x has no d"),
        ({"a": 1, "c": {"x": []}}, "c.x is [], not an object"),
        ({"a": 1, "e": ["x"]}, "e[0] is 'x'"),
    ):
        assert misfit(value, shape) == said
    assert misfit({"memory": "prde"}, shape_of(ArmConfig)) == "memory is 'prde'"
    assert misfit(json.loads(json.dumps(dataclasses.asdict(ArmConfig()))), shape_of(ArmConfig)) == ""


# ---- disks that are full, or only to be read ------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, and a way to leave `room` bytes of it."""
    home = tmp_path / "disk"
    home.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", home]).returncode:
        pytest.skip("a disk can be mounted by root alone")

    def leave(room: int) -> None:
        (home / "filler").write_bytes(bytes(shutil.disk_usage(home).free - room))

    yield home, leave
    subprocess.run(["umount", home], check=True)


def test_a_full_disk_leaves_whole_files_and_whole_lines(small_disk):
    home, leave = small_disk
    write_json(home / "config.json", {"a": 1})
    line = {"text": "x" * 3000}
    append_json(home / "lines.jsonl", line)
    leave(4096)
    for _ in range(2):
        with pytest.raises(Unwritable, match=r"config.json cannot be written .No space left.*: make room"):
            write_json(home / "config.json", {"b": "y" * 20_000})
        with pytest.raises(Unwritable, match=r"lines.jsonl cannot be written"):
            for _ in range(9):
                append_json(home / "lines.jsonl", line)
    assert json.loads((home / "config.json").read_text()) == {"a": 1}
    assert [why for _, _, why in json_lines(home / "lines.jsonl")] == [""] * len(
        list(json_lines(home / "lines.jsonl"))
    )
    assert (home / "lines.jsonl").read_bytes().endswith(b"}\n")
    assert {p.name for p in home.iterdir()} == {"config.json", "lines.jsonl", "filler"}


def test_caches_of_data_that_are_only_to_be_read_lie_elsewhere(tmp_path, monkeypatch, small_disk):
    home, _ = small_disk
    write_task(home / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    subprocess.run(["mount", "-o", "remount,ro", home], check=True)
    monkeypatch.chdir(tmp_path)
    flags = {"total_samples": 16, "batch_size": 8, "threads": 1, "fusion": ("late",), "world_dim": 16}
    flags |= {"data": home, "world_resolution": 8, "future": 3, "pictures": "files"}
    train.main(TrainConfig(**flags, out=tmp_path / "a"))
    train.main(TrainConfig(**flags, out=tmp_path / "b", cache=tmp_path / "mine"))
    made = [
        [p.name.split("_")[0] for p in sorted((tmp_path / place).glob("*/*"))]
        for place in ("data/cache", "mine")
    ]
    assert made == [["picture", "world"]] * 2


def test_whatever_numpy_raises_for_a_damaged_array_is_known(tmp_path):
    """Bits of a header, which is Python, made a TokenError; of a packed array a zlib.error."""
    np.save(tmp_path / "crc.npy", np.arange(45, dtype=np.uint32))
    whole = (tmp_path / "crc.npy").read_bytes()
    for bit in range(8 * 128):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "crc.npy").write_bytes(damaged)
        for mode in (None, "r"):
            with contextlib.suppress(*NO_ARRAY):
                np.load(tmp_path / "crc.npy", mmap_mode=mode)
    whole = (ROOT / "tests/libero_env/libero_goal_task1_init0/run.npz").read_bytes()
    for at in range(0, len(whole), 211):
        (tmp_path / "run.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with contextlib.suppress(*NO_ARRAY, KeyError):
            verify.read_run(tmp_path)


def test_a_refusal_never_steers_the_terminal():
    assert str(Refused("no tensor \x1b[2J\x07 here\n")) == "no tensor [2J here"


# ---- whose results, and whose tasks ---------------------------------------------------------------------


def work_of(folder: Path, out: Path, weights: str | None = None) -> Work:
    target = find_target(EvalConfig(str(folder), out=out))
    target.weights = weights or fingerprint(*load_arm(target.folder))
    return Work(target, target.out / "episodes.jsonl", 0, 1, 0)


def test_results_are_found_by_the_weights_and_other_weights_are_refused(run, saved, tmp_path):
    arm = tiny.arm()
    [plan] = make_plans(EvalConfig(episodes_per_task=2), tiny.run_config(), arm)
    rollout = Rollout(arm, processor(), plan, "off", None, CPU)
    work = work_of(run, tmp_path / "out")
    assert work.missing(rollout, work.found()) == plan.starts
    line = work.shared(rollout) | {"suite": "libero_object", "success": True, "crash": None}
    work.path.parent.mkdir()
    for task, init_state in plan.starts[:1]:
        append_json(work.path, line | {"task_id": task, "init_state": init_state})
    assert work.missing(rollout, work.found()) == plan.starts[1:]

    shutil.copytree(run / "step_000002", tmp_path / "copied")  # under another name, without its run
    copied = work_of(tmp_path / "copied", tmp_path / "out")
    assert copied.target.name == "copied" and copied.missing(rollout, copied.found()) == plan.starts[1:]

    work = work_of(run / "step_000001", tmp_path / "out")  # another checkpoint of the run has its own
    work.refuse_other_weights()
    assert work.missing(rollout, work.found()) == plan.starts
    shutil.rmtree(run / "step_000002")
    (run / "step_000001").rename(run / "step_000002")  # trained on, or downloaded again
    with pytest.raises(Refused, match=r"episodes of step_000002 with other weights .*choose another --out"):
        work_of(run, tmp_path / "out").refuse_other_weights()


def test_lines_of_an_earlier_version_are_found_by_name_with_a_warning(run, tmp_path, capsys):
    work = work_of(run, tmp_path, "12345678")
    line = {"checkpoint": "step_000002", "memory": "off", "suite": "s", "task_id": 1, "init_state": 2}
    append_json(work.path, line | {"success": True, "crash": None, "protocol": {}})
    work.refuse_other_weights()
    assert "1 episodes of step_000002 do not say of which weights" in capsys.readouterr().out
    [key] = work.found()
    assert "12345678" in key


@pytest.mark.parametrize("part", ["weights", "memory", "encoder", "statistics"])
def test_whatever_decides_an_action_changes_the_fingerprint(part):
    whole, changed = [(tiny.arm(), processor()) for _ in range(2)]
    assert fingerprint(*whole) == fingerprint(*changed)
    arm, made = changed
    made.stats = made.stats_after = {f: {k: t.clone() for k, t in x.items()} for f, x in made.stats.items()}
    tensors = {
        "weights": arm.policy.state_proj.bias,
        "memory": next(arm.prophet.parameters()),
        "encoder": arm.encoder.stats.std,
        "statistics": made.stats["action"]["mean"],
    }
    with torch.no_grad():
        tensors[part].view(-1)[0] += 1
    assert fingerprint(*whole) != fingerprint(*changed)


def test_another_liberos_files_are_told_and_stand_in_the_protocol(tmp_path):
    """LIBERO_CONFIG_PATH at a copy whose goal is another one's: its BDDL would decide success."""
    libero = Path(pytest.importorskip("libero.libero").__file__).parent
    shutil.copytree(libero / "bddl_files" / "libero_object", tmp_path / "bddl" / "libero_object")
    paths = {"benchmark_root": libero, "bddl_files": tmp_path / "bddl", "init_states": libero / "init_files"}
    paths |= {"datasets": tmp_path, "assets": libero / "assets"}
    (tmp_path / "config.yaml").write_text("".join(f"{name}: {path}\n" for name, path in paths.items()))
    env = os.environ | {"LIBERO_CONFIG_PATH": str(tmp_path)}
    ask = "from simulator.env import *; print(scenes('libero_object') == SCENES['libero_object'])"

    def same() -> str:
        ended = subprocess.run([sys.executable, "-c", ask], env=env, cwd=ROOT, capture_output=True, text=True)
        return ended.stdout.strip() or ended.stderr

    assert same() == "True"
    path = next((tmp_path / "bddl" / "libero_object").glob("*.bddl"))
    path.write_text(path.read_text().replace("(And", "(Or"))
    assert same() == "False"
    [plan] = make_plans(EvalConfig(episodes_per_task=2), tiny.run_config(), tiny.arm())
    assert plan.scenes == SCENES[plan.sim.suite] and "scenes" not in plan.record()
    assert dataclasses.replace(plan, scenes="0123abcd").record()["scenes"] == "0123abcd"
    shown = episodes.result(plan, {}, Episode(*plan.starts[0], mode="off"), None, "crashed")
    assert shown["scenes"] == plan.scenes  # a line says whose files judged it, another's or not
    assert {suite: scenes(suite) for suite in SCENES} == SCENES


def test_a_checkpoint_that_may_not_be_read_is_named_and_ours_may_be_read_by_all(tmp_path):
    with pytest.raises(Refused, match=r"^/proc/\d+/mem cannot be read: Input/output error$"):
        checksum(Path("/proc/self/mem"))
    (tmp_path / "plain").touch()
    save_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- one writer -----------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from files import only_writer
with only_writer(Path(sys.argv[1]), "train.py"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_folder_has_one_writer_and_a_dead_one_stops_nobody(tmp_path, capsys):
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Refused, match=rf"--out .*run: process {holder.pid} on .*: train.py is at it; end it"):
        with only_writer(out, "train.py", grace=1):
            pass
    assert f"process {holder.pid}" in capsys.readouterr().out  # who waits says so
    with only_writer(out, "eval.py"):  # another program, another file
        pass
    holder.kill()
    holder.wait()
    with only_writer(out, "train.py"):
        pass
    assert not out.exists()
