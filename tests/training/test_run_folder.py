"""What a run survives: kills, damaged checkpoints, a full disk, a step without a finite gradient, SIGTERM."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soak
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_data import write_task

import train
from data import Source
from readers.load import load
from smolvla.folders import checkpoints, damage, newest_whole
from train import TrainConfig
from training import run_folder
from training.optimise import Average, BadSteps
from training.run_folder import (
    COLUMNS,
    Progress,
    cut_metrics,
    log,
)

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"total_samples": 28, "batch_size": 8, "save_every": 8, "log_every": 1, "freeze": "none", "lr": 1e-3}
SHORT |= {"fusion": ("late",), "world_dim": 16, "world_resolution": 8, "future": 3, "threads": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_task(folder / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    return folder


def run(data: Path, out: Path, **fields) -> Path:
    train.main(TrainConfig(data=data, out=out, **SHORT | fields))
    return out


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run of four steps with a checkpoint after each."""
    return run(data, tmp_path_factory.mktemp("runs") / "straight")


@pytest.fixture
def copied(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "run", symlinks=True)


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    files = ("model", "world")
    return {f"{f}.{k}": t for f in files for k, t in load_file(out / name / f"{f}.safetensors").items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def child(data: Path, out: Path, *flags: str) -> list[str]:
    """The same run as `run`'s, as a command line."""
    fields = [(f"--{name.replace('_', '-')}", value) for name, value in SHORT.items()]
    given = [str(x) for name, v in fields for x in (name, *(v if isinstance(v, tuple) else (v,)))]
    return [sys.executable, str(ROOT / "train.py"), "--data", str(data), "--out", str(out), *given, *flags]


# ---- kills --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_in_steps_and_saves_ends_with_the_same_bits(tmp_path):
    """A few of what tests/soak.sh does at length."""
    write_task(tmp_path / "data" / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    steps = 24  # on a busy machine a moment may be missed: then the run must not have ended yet
    soak.finish(soak.launch(soak.command(tmp_path / "data", straight, steps)))
    hit = list(soak.kills(soak.command(tmp_path / "data", killed, steps), killed, 2, seed=5))
    assert len(hit) == 2 and soak.differences(straight, killed) == []
    samples = [line["samples"] for line in metrics(killed)]
    assert samples == [8 * step for step in range(1, steps + 1)]


def test_soak_sees_what_differs(copied, straight):
    for folder in (copied, straight):
        shutil.copy(folder / "last" / "model.safetensors", folder / "last" / "raw.safetensors")
    assert soak.differences(copied, straight) == []
    optimizer = torch.load(copied / "last" / "optimizer.pt")
    optimizer["state"][0]["exp_avg"][0] += 1e-4
    torch.save(optimizer, copied / "last" / "optimizer.pt")
    (copied / "metrics.jsonl").write_text((copied / "metrics.jsonl").read_text() * 2)
    assert soak.differences(copied, straight) == ["optimizer.0.exp_avg", "metrics.jsonl"]
    (straight / "last" / "raw.safetensors").unlink()


def test_lines_beyond_the_checkpoint_and_torn_ones_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    stay = '{"samples": 8, "loss": 1.0}\n{"samples": 16, "loss": NaN}\n'
    path.write_text(stay + '{"samples": 24}\n{"samples": 16, "lo')
    cut_metrics(tmp_path, 16)
    assert path.read_text() == stay
    cut_metrics(tmp_path, 0)  # killed before the first checkpoint
    assert path.read_text() == "" and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kill_between_rename_and_link_leaves_a_run_that_goes_on(copied, data, straight, capsys):
    (copied / "last").unlink()
    (copied / "last").symlink_to("step_000003")
    shutil.copytree(copied / "step_000004", copied / "step_000005.part")  # and one in the middle of a save
    run(data, copied)
    assert "resumed at 24 samples" in capsys.readouterr().out
    assert same(weights(copied), weights(straight)) and os.readlink(copied / "last") == "step_000004"
    assert not list(copied.glob("*.part"))


# ---- damage -------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60)
def test_any_changed_missing_or_cut_file_of_a_checkpoint_is_found(straight, draw):
    folder = straight / "last"
    assert damage(folder) is None
    path = draw.draw(st.sampled_from(run_folder.files_of(folder.resolve())))
    whole = path.read_bytes()
    place = draw.draw(st.integers(0, len(whole) - 1))
    how = draw.draw(st.sampled_from(["flipped", "cut", "gone"]))
    try:
        if how == "gone":
            path.unlink()
        else:
            flipped = bytes([whole[place] ^ 1 << draw.draw(st.integers(0, 7))])
            path.write_bytes(whole[:place] + (flipped + whole[place + 1 :] if how == "flipped" else b""))
        reason = damage(folder)
        assert reason is not None and "\n" not in reason
        assert newest_whole(straight)[0] == straight / "step_000003"
    finally:
        path.write_bytes(whole)


def test_a_damaged_checkpoint_is_skipped_with_a_line_and_the_run_ends_with_the_same_bits(
    copied, data, straight, capsys
):
    path = copied / "last" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])
    run(data, copied)
    said = capsys.readouterr().out
    skipped = r"^warning: .*step_000004 is damaged, .* before it is taken: optimizer.pt has .* bytes, not"
    assert re.search(skipped, said, re.M)
    assert "resumed at 24 samples" in said
    assert same(weights(copied), weights(straight)) and damage(copied / "last") is None


def test_a_run_without_any_whole_checkpoint_is_refused_not_begun_anew(copied, data):
    for folder in checkpoints(copied):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no whole checkpoint \(.*\): choose another --out"):
        run(data, copied)
    for folder in checkpoints(copied):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="`last` points nowhere"):
        run(data, copied)


def test_only_the_newest_two_hold_the_optimisers_state(straight, copied, data):
    assert [(f / "optimizer.pt").is_file() for f in checkpoints(straight)] == [True, True, False, False]
    (copied / "last").unlink()
    (copied / "last").symlink_to("step_000002")
    with pytest.raises(ValueError, match=r"no whole checkpoint \(.*optimizer.pt is missing"):
        run(data, copied)


def test_keep_every_says_which_checkpoints_stay(data, tmp_path):
    out = run(data, tmp_path / "run", total_samples=52, keep_every=16, fusion=("none",))
    assert [run_folder.number(f) for f in checkpoints(out)] == [7, 6, 4, 2]  # 52, 48, 32, 16 samples
    assert not list(out.glob("*.part"))
    with pytest.raises(ValueError, match="--keep-every 12 must be a multiple of --save-every 8"):
        TrainConfig(save_every=8, keep_every=12)


# ---- disks --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_save_is_one_line_and_the_run_goes_on(data, straight, tmp_path):
    out = tmp_path / "run"
    most = (straight / "last" / "model.safetensors").stat().st_size * 2 // 3

    def fill() -> None:  # beyond this size any write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = subprocess.run(child(data, out), capture_output=True, text=True, preexec_fn=fill)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert re.match(rf"error: --out {out} cannot be written \(.*File too large.*\): make room", done.stderr)
    assert not checkpoints(out) and not list(out.glob("*.part"))
    assert same(weights(run(data, out)), weights(straight))
    assert [line["samples"] for line in metrics(out)] == [8, 16, 24, 28]


@pytest.mark.parametrize("when", ["optimizer.pt", "seal", "log"])
def test_an_error_of_the_disk_at_any_moment_of_a_save_leaves_the_one_before(
    when, data, straight, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    full = OSError(28, "No space left on device")

    def fail(*_: object) -> None:
        raise full

    with monkeypatch.context() as patch:
        if when == "optimizer.pt":
            patch.setattr(torch, "save", fail)
        elif when == "seal":
            patch.setattr(run_folder, "to_disk", fail)
        else:
            patch.setattr(run_folder, "append_json", fail)
        with pytest.raises(ValueError, match=rf"--out {out} cannot be written \(.*No space left on device\)"):
            run(data, out)
    assert not checkpoints(out) and not list(out.glob("*.part"))


def test_a_folder_that_cannot_be_written_is_one_line(data):
    out = "/proc/self/fd/run"  # root writes anywhere else
    with pytest.raises(ValueError, match=rf"--out {out} cannot be written \(.*\): make room or choose"):
        run(data, Path(out))


# ---- steps that are skipped ---------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Make the noise of these samples NaN."""
    flow = Source.flow

    def poisoned(self: Source, keys: np.ndarray) -> tuple:
        noise, times = flow(self, keys)
        noise[[key in numbers for key in keys]] = torch.nan
        return noise, times

    monkeypatch.setattr(Source, "flow", poisoned)


def test_a_step_whose_gradient_is_not_finite_moves_nothing_and_is_counted(data, tmp_path, monkeypatch):
    poison(monkeypatch, 19)  # in the third step
    out = run(data, tmp_path / "run", flow_draws=2)
    assert [line["bad_steps"] for line in metrics(out)] == [0, 0, 1, 1]
    assert [np.isfinite(line["loss"]) for line in metrics(out)] == [True, True, False, True]
    kept = [weights(out, f"step_00000{i}") for i in (2, 3, 4)]
    assert same(kept[0], kept[1]) and not same(kept[1], kept[2])
    assert all(t.isfinite().all() for t in kept[2].values() if t.is_floating_point())
    steps = {s["step"].item() for s in torch.load(out / "last" / "optimizer.pt")["state"].values()}
    assert steps == {3.0}  # Adam's own count, which corrects its moments' bias
    assert json.loads((out / "last" / "state.json").read_text())["bad_steps"] == 1


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_end_the_run_in_one_line(data, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 17, 26)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="--max-bad-steps 2: 2 steps in a row, up to 28 samples"):
        run(data, out, max_bad_steps=2)
    assert newest_whole(out)[0] == out / "step_000003"
    with pytest.raises(ValueError, match="--max-bad-steps 2: 2 steps in a row"):  # the row goes on
        run(data, out, max_bad_steps=2)
    assert "resumed at 24 samples" in capsys.readouterr().out
    run(data, out, max_bad_steps=3)
    assert [line["bad_steps"] for line in metrics(out)] == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="--max-bad-steps 0 must be at least 1"):
        TrainConfig(max_bad_steps=0)


def test_a_training_that_took_no_step_is_not_done(data, tmp_path, monkeypatch):
    poison(monkeypatch, *range(28))
    with pytest.raises(ValueError, match="up to 28 samples, the whole budget, had a gradient"):
        run(data, tmp_path / "run")
    assert json.loads((tmp_path / "run/last/state.json").read_text())["samples"] == 24  # not the budget's end


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 3))
def test_bad_steps_are_counted_in_all_and_in_a_row(seen, before):
    bad = BadSteps(torch.device("cpu"), before, before)
    for flag in seen:
        bad.see(torch.tensor(flag))
    text = "x" * before + "".join("x" if flag else "." for flag in seen)
    assert bad.read() == (text.count("x"), len(text.split(".")[-1]), max(map(len, text.split("."))))


# ---- SIGTERM ------------------------------------------------------------------------------------------


def wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "heard"), [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGINT, False)]
)
def test_asked_to_stop_a_run_saves_after_the_step_exits_with_0_and_goes_on(data, tmp_path, number, heard):
    """Heard or not: Ctrl-C ends the tee behind a program, too."""
    long = ("--total-samples", "120", "--save-every", "10000", "--ema", "0.9")
    out = tmp_path / "run"
    process = subprocess.Popen(child(data, out, *long), stdout=subprocess.PIPE, text=True)
    wait_for(out / "metrics.jsonl")
    if not heard:
        process.stdout.close()
    process.send_signal(number)
    said = process.communicate(timeout=60)[0] if heard else ""
    assert process.wait(60) == 0
    done = json.loads((out / "last" / "state.json").read_text())["samples"]
    assert 8 <= done < 120 and done % 8 == 0
    assert not heard or f"stopped at {done} of 120 samples: the same command goes on" in said
    assert ("Ctrl-C again kills" in said) == (heard and number == signal.SIGINT)
    assert metrics(out)[-1]["samples"] == done
    run(data, tmp_path / "straight", total_samples=120, save_every=10000, ema=0.9)
    run(data, out, total_samples=120, save_every=10000, ema=0.9)
    assert soak.differences(tmp_path / "straight", out) == ["files"]  # and one checkpoint more
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- average ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_averaged_run_trains_alike_and_saves_both_kinds_of_weights(data, straight, tmp_path):
    out = run(data, tmp_path / "run", ema=0.9)
    raw, plain = load_file(out / "last" / "raw.safetensors"), weights(straight)
    ours, theirs = "policy.action_out_proj.weight", "model.model.action_out_proj.weight"
    assert torch.equal(raw[ours], plain[theirs])
    assert all(torch.equal(t, plain[f"world.{n}"]) for n, t in raw.items() if n.startswith("prophet."))
    assert all(t.dtype == torch.float32 for t in raw.values())
    averaged = weights(out)
    assert averaged.keys() == plain.keys()  # what lerobot loads has its names and shapes
    assert not torch.equal(averaged[theirs], raw[ours])
    shutil.rmtree(out / "step_000004")
    run(data, out, ema=0.9)
    assert same(averaged, weights(out))
    again = load_file(out / "last" / "raw.safetensors")
    assert all(torch.equal(raw[name], again[name]) for name in raw)
    with pytest.raises(ValueError, match=r"holds another run: ema is 0\.9, not 0\.5"):
        run(data, out, ema=0.5)


def test_the_average_counts_samples_and_steps_aside_and_back():
    arm = tiny.arm()
    one, two = Average(arm, 0.9), Average(arm, 0.9)
    p, name = arm.policy.action_out_proj.weight, "policy.action_out_proj.weight"
    before = p.detach().clone()
    with torch.no_grad():
        p.add_(1.0)
    one.update(128)
    two.update(64)
    two.update(64)
    torch.testing.assert_close(one.mean[name], 0.81 * before + 0.19 * (before + 1))
    torch.testing.assert_close(one.mean[name], two.mean[name])
    with one.in_place():
        torch.testing.assert_close(arm.policy.action_out_proj.weight.detach(), two.mean[name])
    assert torch.equal(arm.policy.action_out_proj.weight, before + 1)


# ---- log and record -----------------------------------------------------------------------------------


def test_log_lines_are_of_one_width_with_units(tmp_path, capsys):
    for samples, loss, rate in ((64, 12.5, 3.25), (640_000, 0.01234, 12345.6)):
        line = {"samples": samples, "step": 1, "loss": loss, "action_loss": loss, "lr": 1e-4}
        line |= {"bad_steps": 3, "grad_norm": 17.0, "samples_per_second": rate, "mfu": 0.331}
        log(tmp_path, line | {"world_gate": -0.5}, budget=1_000_000)
    first, second = capsys.readouterr().out.splitlines()
    places = [[m.span() for m in re.finditer(r"[a-z/]{2,}", line)] for line in (first, second)]
    assert places[0] == places[1]
    assert "samples/s" in first and "mfu 33.1%" in first and "min left" in first and "gate -0.5000" in first
    assert set(COLUMNS) - {"world_loss", "world_cos"} <= set(metrics(tmp_path)[0])


def test_the_banner_has_eight_lines_at_most_and_says_what_runs(data, tmp_path, capsys):
    run(data, tmp_path / "run", total_samples=8, accumulate=2)
    lines = capsys.readouterr().out.splitlines()
    begins, ends = (next(i for i, line in enumerate(lines) if word in line) for word in ("arm ", " loss "))
    banner = lines[begins:ends]  # what is computed once is said before
    assert len(banner) <= 8
    text, config = "\n".join(banner), json.loads((tmp_path / "run" / "config.json").read_text())
    commit = (json.loads((tmp_path / "run" / "env.json").read_text())["git"] or "unknown")[:10]
    for said in (
        f"run folder {tmp_path / 'run'}", f"git {commit}", f"torch {torch.__version__}", "(cpu)",
        f"parameters {config['params_trainable']:,} trainable of {config['params_total']:,}",
        "effective batch 8 = micro 4 x accumulation 2 x ranks 1", "budget 8 samples",
        f"fingerprint {load(data).fingerprint}", f"fingerprint {config['weights_fingerprint']}",
    ):  # fmt: skip
        assert said in text, said


def test_a_fact_that_an_older_version_did_not_record_is_not_compared(tmp_path):
    config = TrainConfig(out=tmp_path / "run", save_every=50_000)
    facts = {"flops_per_sample": 7, "data_fingerprint": "a", "weights_fingerprint": "b"}
    tiny.open_run(config, facts)
    tiny.open_run(config, facts | {"flops_per_sample": 8, "weights_fingerprint": "c", "came_later": 1})
    assert json.loads((config.out / "config.json").read_text())["flops_per_sample"] == 7
    with pytest.raises(ValueError, match="holds another run: data_fingerprint is 'a', not 'b'"):
        tiny.open_run(config, facts | {"data_fingerprint": "b"})
    tiny.open_run(
        dataclasses.replace(config, keep_every=100_000, max_bad_steps=3, compared_with=("E0",)), facts
    )


def test_progress_is_what_state_json_holds(straight):
    state = json.loads((straight / "last" / "state.json").read_text())
    assert Progress(**state) == Progress(samples=28, step=4)
