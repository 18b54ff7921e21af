"""The same numbers reach W&B and TensorBoard as metrics.jsonl, also of a run that goes on."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from test_train import data, metrics, train, weights  # noqa: F401 (data is a fixture)

from files import Refused
from training import trackers

FLAGS = ("--total-samples", "16", "--log-every", "1", "--save-every", "8")


def go_on(folder) -> None:
    """Take a run back to its first checkpoint, as a kill leaves it."""
    (folder / "last").unlink()
    (folder / "last").symlink_to("step_000001")


def history(path: Path) -> list[dict]:
    """Read the lines that W&B keeps of a run without a network: protobuf records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, raw, at, content = [], b"", 7, path.read_bytes()
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # a block's end
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)  # whole 1, first 2, middle 3, last 4
        raw, at = raw * (kind > 2) + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = Record.FromString(raw)
            named = [(x.key or ".".join(x.nested_key), x.value_json) for x in record.history.item]
            found += [{name: json.loads(value) for name, value in named}] if named else []
    return found


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="--wandb needs the package wandb: pip install wandb, or leave it out"):
        trackers.check_package("wandb")


@pytest.mark.slow
def test_tensorboard_has_each_number_of_the_log_once(data, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    for _ in range(2):
        train(data, run, *FLAGS, "--tensorboard", "--val-every", "8", "--val-share", "0.34")
        written = EventAccumulator(str(run / "tensorboard")).Reload()
        rows = metrics(run)
        for name in ("action_loss", "val_loss_off"):
            found = [(event.step, event.value) for event in written.Scalars(name)]
            wanted = [(row["samples"], row[name]) for row in rows if name in row]
            assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted] and wanted
        go_on(run)


@pytest.mark.slow
def test_weights_and_biases_has_the_log_and_one_run_a_folder(data, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    train(data, run, *FLAGS, "--wandb", "test")
    go_on(run)
    train(data, run, *FLAGS, "--wandb", "test")
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1  # two parts of one run
    seen = [row for path in files for row in history(path)]
    rows = {row["samples"]: row for row in metrics(run)}
    assert [row["samples"] for row in seen] == [8, 16, 16]
    for row in seen[::2]:  # of the killed part's second line the log keeps nothing
        wanted = rows[row["samples"]]
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
