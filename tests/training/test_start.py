"""A run starts on its data from another robot's checkpoint: cameras, widths and statistics, each said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_data import write_task

import eval as evaluate
import train
from arm import load_arm
from eval import EvalConfig
from files import Refused
from model import load_policy
from readers.demos import statistics
from readers.load import load
from readers.selection import match_cameras
from smolvla import kernels
from smolvla.processor import rename_map
from train import TrainConfig

CAMERA = "observation.images."
MATCHED = ("camera1=image", "camera2=image2")
SHORT = {"total_samples": 8, "batch_size": 4, "log_every": 1}
MEMORY = {"fusion": ("late",), "world_dim": 16, "world_resolution": 8, "future": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_task(folder / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Another robot's checkpoint: camera1 and camera2, states of 6."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("checkpoint", "vlm"):
        shutil.copytree(tiny.golden() / name, folder / name)
    return folder / "checkpoint"


def run(data, init, out, **fields):
    config = TrainConfig(data=data, init=str(init), out=out, **{"cameras": MATCHED} | SHORT | fields)
    train.main(config)
    return json.loads((out / "config.json").read_text())


@pytest.fixture(scope="module")
def adapted(data, base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "adapted"
    run(data, base, out)
    return out


# ---- which camera is which ----------------------------------------------------------------------------


def full(*names: str) -> list[str]:
    return [f"{CAMERA}{name}" for name in names]


def test_cameras_are_matched_by_name_by_the_rename_map_or_by_flag():
    there, three = full("image", "image2"), full("camera1", "camera2", "camera3")
    renames = dict(zip(there, three))
    assert match_cameras(full("image", "image2", "image3"), {}, there) == ()
    assert match_cameras(full("image"), {}, there) == ()  # more cameras than the checkpoint has
    assert match_cameras(three, renames, there) == tuple(f"{b}={a}" for a, b in renames.items())
    assert match_cameras(three, renames, full("camera1", "camera2")) == ()
    assert match_cameras(three, {}, there, MATCHED) == MATCHED
    assert match_cameras(three, {}, there, ("camera1=image", "side=image2"), full("side"))


@pytest.mark.parametrize(
    ("known", "there", "asked"),
    [
        (("camera1", "camera2", "camera3"), ("image", "image2"), ()),
        (("image", "image3"), ("image", "front"), ()),  # front may be image3, or not
        (("camera1", "camera2"), ("image", "image2"), ("camera1=image", "wrist=image2")),
    ],
)
def test_cameras_that_nobody_matches_are_one_line_with_both_sides_and_the_flag(known, there, asked):
    with pytest.raises(Refused) as error:
        match_cameras(full(*known), {}, full(*there), asked)
    assert f"the checkpoint's cameras are {', '.join(known)}, those of the data" in str(error.value)
    assert f"--cameras {known[0]}={there[0]} {known[1]}={there[1]}" in str(error.value)


def test_one_camera_cannot_have_two_names(data, base, tmp_path):
    with pytest.raises(Refused, match="gives one camera two names"):
        run(data, base, tmp_path, cameras=("camera1=image", "camera2=image"))


# ---- what is adapted ----------------------------------------------------------------------------------


def test_what_is_adapted_is_said_and_written(adapted, base, data, tmp_path, capsys):
    record = run(data, base, tmp_path / "again")
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("adapted")] == [
        "adapted: camera1 is image of the data",
        "adapted: camera2 is image2 of the data",
        "adapted: observation.state is 8 wide in the data, 6 in the checkpoint's config.json",
    ]
    assert "statistics: the data's, computed from these 45 frames" in out
    assert (record["statistics"], record["statistics_of"]) == (
        "data",
        "the data's, computed from these 45 frames",
    )
    policy, processor = load_policy(tmp_path / "again" / "last")
    assert processor.notes == [] and policy.config.state_dim == 8
    assert policy.config.cameras == tuple(full("camera1", "camera2"))
    assert rename_map(processor.before) == dict(zip(full("image", "image2"), full("camera1", "camera2")))
    want = statistics(load(data))
    for feature, entry in want.items():
        assert all(torch.equal(entry[name], processor.stats[feature][name]) for name in entry)


def test_a_fresh_policys_rename_is_written_too(data, tmp_path):
    run(data, "tiny", tmp_path, cameras=("front=image", "wrist=image2"))
    _, processor = load_policy(tmp_path / "last")
    assert rename_map(processor.before) == dict(zip(full("image", "image2"), full("front", "wrist")))


@pytest.mark.parametrize(("mode", "names"), [("QUANTILES", ("q01", "q99")), ("QUANTILE10", ("q10", "q90"))])
def test_quantiles_that_the_data_do_not_store_are_computed(mode, names, data, base, tmp_path):
    shutil.copytree(base.parent, tmp_path / "base")
    for name in ("policy_preprocessor", "policy_postprocessor"):
        path = tmp_path / "base" / "checkpoint" / f"{name}.json"
        description = json.loads(path.read_text())
        for step in description["steps"]:
            if step["registry_name"].endswith("normalizer_processor"):
                step["config"]["norm_map"] = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
        path.write_text(json.dumps(description))
    run(data, tmp_path / "base" / "checkpoint", tmp_path / "run")
    _, processor = load_policy(tmp_path / "run" / "last")
    demos = load(data)
    for feature, values in (("observation.state", demos.state), ("action", demos.action)):
        want = np.quantile(values.astype(np.float64), [int(name[1:]) / 100 for name in names], axis=0)
        got = torch.stack([processor.stats[feature][name] for name in names])
        np.testing.assert_allclose(got, want, rtol=1e-6)
        normal = processor.normalise(feature, torch.from_numpy(want).float())
        np.testing.assert_allclose(normal, [[-1] * values.shape[1], [1] * values.shape[1]], atol=1e-5)


def test_a_camera_that_the_data_lack_is_left_out_and_a_black_one_is_not_asked_of_them(
    data, base, tmp_path, capsys
):
    copy = tmp_path / "base" / "checkpoint"
    shutil.copytree(base.parent, copy.parent)
    raw = json.loads((copy / "config.json").read_text())
    raw["input_features"] = {k.replace("camera1", "image"): v for k, v in raw["input_features"].items()}
    (copy / "config.json").write_text(json.dumps(raw | {"empty_cameras": 1}))
    fields = {"cameras": ("image",), **MEMORY}
    run(data, copy, tmp_path / "plain", **fields)
    assert "adapted: camera2 of the checkpoint: not in the data, left out" in capsys.readouterr().out
    policy, _ = load_policy(tmp_path / "plain" / "last")
    assert policy.config.cameras == tuple(full("image", "empty_camera_0"))
    train.main(
        TrainConfig(data=data, init=str(copy), features=tmp_path / "tokens", prepare=True, **SHORT, **fields)
    )
    run(data, copy, tmp_path / "tokens_run", features=tmp_path / "tokens", **fields)
    losses = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "tokens_run")]
    first, other = ([json.loads(x)["action_loss"] for x in text.splitlines()] for text in losses)
    np.testing.assert_allclose(first, other, rtol=1e-5)


def test_a_run_goes_on_from_an_adapted_one_without_flags_and_resumes(data, adapted, tmp_path, capsys):
    fields = {"cameras": (), **MEMORY}
    run(data, adapted, tmp_path / "next", **fields)
    record = json.loads((tmp_path / "next" / "config.json").read_text())
    assert record["world_camera"] == [f"{CAMERA}camera1"]  # the data's image, by the checkpoint's rename map
    out = capsys.readouterr().out
    run(data, adapted, tmp_path / "next", **fields)
    said = capsys.readouterr().out
    assert "adapted: camera1 is image of the data" in out and "adapted" not in said
    how = f"--init {tmp_path}/next/last --statistics checkpoint --out NEW"
    assert said.endswith(f"is spent; to go on, add {how}\n")
    run(data, tmp_path / "next" / "last", tmp_path / "more", statistics="checkpoint", **fields)
    state = load_file(next((tmp_path / "more" / "last").glob("policy_preprocessor_step*.safetensors")))
    assert state["observation.state.mean"].shape == (8,)


def test_other_data_are_measured_and_described_under_the_policys_names(adapted, tmp_path, capsys):
    write_task(tmp_path / "other" / "soup_demo.hdf5", lengths=(7, 9), size=32, seed=5)
    evaluate.main(EvalConfig(str(adapted), offline=tmp_path / "other", out=tmp_path / "results"))
    assert (tmp_path / "results" / "offline.jsonl").is_file() and "off" in capsys.readouterr().out
    arm, processor = load_arm(adapted)
    config = EvalConfig(str(adapted), data=tmp_path / "other")
    options = evaluate.data_options(tmp_path / "other", config, {}, arm, processor)
    assert list(load(tmp_path / "other", options=options).images) == full("camera1", "camera2")


# ---- whose statistics ---------------------------------------------------------------------------------


def test_a_checkpoints_statistics_stay_on_demand_where_the_data_lie_within_them(
    data, adapted, tmp_path, capsys
):
    want = load_policy(adapted)[1].stats
    record = run(data, adapted, tmp_path, statistics="checkpoint", cameras=())
    assert record["statistics_of"] == f"the checkpoint's, of {adapted}"
    assert f"statistics: the checkpoint's, of {adapted}" in capsys.readouterr().out
    got = load_policy(tmp_path)[1].stats
    assert all(torch.equal(want[f][name], got[f][name]) for f in want for name in want[f])


def test_data_far_outside_of_a_checkpoints_statistics_stop_a_run_before_its_first_step(
    data, adapted, tmp_path
):
    copy = tmp_path / "far"
    shutil.copytree(adapted / "last", copy)
    (copy / "manifest.json").unlink()  # what is changed on purpose
    for path in copy.glob("policy_*processor_step*.safetensors"):
        stats = load_file(path)
        stats["observation.state.mean"] = (
            stats["observation.state.mean"] + 57 * stats["observation.state.std"]
        )
        save_file(stats, path)
    fields = {"statistics": "checkpoint", "cameras": ()}
    with pytest.raises(
        Refused, match=r"the data's state is 57\.0 std off.*--statistics data, or .*--accept stat"
    ):
        run(data, copy, tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()
    run(data, copy, tmp_path / "run", accept=("statistics",), **fields)
    run(data, copy, tmp_path / "other", cameras=())  # with the data's there is nothing to compare


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"statistics": "checkpoint"},
            r"statistics of observation\.state are 6 wide, not 8.*--statistics data",
        ),
        ({"stats_of": "so100"}, "--stats-of so100 chooses among a checkpoint's.*add --statistics checkpoint"),
        ({"statistics": "checkpoint", "init": "tiny"}, "only a checkpoint has its own"),
        ({"cameras": ()}, "those of the data image, image2: say which is which"),
    ],
)
def test_what_cannot_be_is_one_line(data, base, tmp_path, fields, message):
    with pytest.raises(Refused, match=message):
        run(data, fields.pop("init", base), tmp_path, **fields)


@pytest.mark.parametrize("native", [True, False])
def test_what_trains_whole_computes_in_bfloat16_where_the_processor_has_it(native, monkeypatch):
    monkeypatch.setattr(kernels, "native_bfloat16", lambda: native)
    cpu, fast = torch.device("cpu"), torch.bfloat16 if native else torch.float32
    assert TrainConfig(init="tiny").precision(cpu) == fast
    assert TrainConfig(init="tiny", dtype="float32").precision(cpu) == torch.float32
    assert TrainConfig(init="tiny", freeze="vision").precision(cpu) == torch.float32
