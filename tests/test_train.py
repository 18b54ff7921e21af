"""The real script at tiny sizes: resuming, accumulating and adding ranks change nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_data import write_task

from arm import Summary
from data import held_out, sample_order
from fusion import SITES
from readers.load import load
from smolvla.config import PRESETS
from train import TrainConfig, parallel, shares
from training import run_folder
from training.optimise import lr_factor, make_optimizer
from training.run_folder import check_space
from training.start import build_arm, keyed_seed, open_data

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--dtype",
    "float32",
    "--freeze",
    "none",
    "--batch-size",
    "8",
    "--log-every",
    "1",
    "--threads",
    "1",
    "--lr",
    "1e-3",
    "--world-dim",
    "16",
]
TWO_RANKS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
MEMORY = ["--fusion", "late", "--memory", "pred", "--future", "3", "--world-resolution", "8"]
MEMORY += ["--world-stride", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Episodes shorter and longer than a chunk: padding and episode ends are in every batch."""
    folder = tmp_path_factory.mktemp("data")
    write_task(folder / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    return folder


def train(data, out, *flags, launcher=(sys.executable,), check=True):
    command = [*launcher, ROOT / "train.py", "--data", data, "--out", out, *FLAGS, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd=ROOT)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def weights(run) -> dict:
    return {
        f"{name}.{k}": v
        for name in ("model", "world")
        for k, v in load_file(run / "last" / f"{name}.safetensors").items()
    }


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a, b) -> float:
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    return max((wa[k].double() - wb[k].double()).abs().max().item() for k in wa)


def assert_same_but_for_rounding(a, b) -> None:
    """Adam's first steps are signs: rounding of a tiny gradient can move a weight by a share of the rate."""
    assert largest_difference(a, b) < 1e-4
    for one, other in zip(metrics(a), metrics(b), strict=True):
        for key in ("samples", "action_loss", "world_loss", "world_cos", "grad_norm"):
            assert math.isclose(one[key], other[key], rel_tol=1e-4, abs_tol=1e-5), key


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run of 28 samples: three whole steps and one of four samples."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(data, out, *MEMORY, "--total-samples", "28")
    return out


def test_no_forward_sends_buffers_to_other_ranks(tmp_path):
    """A memory arm's partners alone can be 23 MB; no step changes them."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = parallel(tiny.arm())
        assert any(name == "partners" for name, _ in model.module.named_buffers())
        assert not model.will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_run_spends_its_budget_exactly_and_logs_what_it_did(straight):
    lines = metrics(straight)
    assert [line["samples"] for line in lines] == [8, 16, 24, 28]
    assert all(
        math.isfinite(line[k])
        for line in lines
        for k in ("loss", "action_loss", "world_loss", "world_cos", "world_gate")
    )
    said = ("world_cos_k1", "world_cos_linear", "late/attn_entropy", "late/ctx_norm", "norm_memory")
    assert all(k in lines[-1] for k in (*said, "grad_norm_gates", "grad_norm_fusion", "grad_norm_prophet"))
    assert not any("hyp" in k or k == "oracle_gap" for k in lines[-1])  # with one hypothesis
    config = json.loads((straight / "config.json").read_text())
    assert config["arm"] == "late-pred" and config["params_trainable"] < config["params_total"]
    state = {"samples": 28, "step": 4, "bad_steps": 0, "bad_in_a_row": 0}
    assert json.loads((straight / "last" / "state.json").read_text()) == state
    assert not list(straight.glob("*.part"))


def test_training_moves_the_gate_and_the_loss(straight):
    lines = metrics(straight)
    assert lines[-1]["world_gate"] != 0.0
    assert lines[-1]["action_loss"] < lines[0]["action_loss"]


@pytest.mark.slow
def test_a_run_killed_before_its_last_step_resumes_to_the_same_bits(data, straight, tmp_path):
    # A checkpoint after each step; without the later ones, the folder is what a kill would leave behind.
    train(data, tmp_path / "run", *MEMORY, "--total-samples", "28", "--save-every", "8")
    shutil.rmtree(tmp_path / "run" / "step_000004")
    again = train(data, tmp_path / "run", *MEMORY, "--total-samples", "28")
    assert "resumed at 24 samples" in again.stdout
    assert largest_difference(straight, tmp_path / "run") == 0.0
    lines, wanted = metrics(tmp_path / "run"), metrics(straight)
    for line in lines + wanted:
        line.pop("samples_per_second")
    assert lines == wanted
    assert "nothing to do" in train(data, tmp_path / "run", *MEMORY, "--total-samples", "28").stdout


# ---- ranks and micro batches --------------------------------------------------------------------------


def test_every_step_holds_padded_chunks_and_whole_ones_and_futures_past_an_episodes_end(data):
    """So that runs with other ranks and micro batches have to weigh them right to agree."""
    demos, chunk = load(data), PRESETS["tiny"].chunk_size
    for first, count in ((0, 8), (8, 8), (16, 8), (24, 4)):
        index = sample_order(len(demos), 0, first, count)
        pads = demos.batch(index, chunk, ())["action_is_pad"].sum(1)
        _, valid = demos.future(index, 3, 1)
        assert (pads > 0).any() and len(set(pads.tolist())) > 2
        halves = [pads[:4].sum(), pads[4:].sum()]
        assert count == 4 or halves[0] != halves[1]  # a mean of ranks' means would be another loss
        assert first == 24 or (not valid.all() and valid.all(1).any())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 3])  # halves, and shares of 3, 3 and 2 samples
def test_accumulation_changes_nothing_but_rounding(data, straight, tmp_path, accumulate):
    train(data, tmp_path / "run", *MEMORY, "--total-samples", "28", "--accumulate", accumulate)
    assert_same_but_for_rounding(straight, tmp_path / "run")


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """The same run on two ranks."""
    out = tmp_path_factory.mktemp("runs") / "two"
    train(data, out, *MEMORY, "--total-samples", "28", launcher=TWO_RANKS)
    return out


@pytest.mark.slow
def test_two_ranks_change_nothing_but_rounding(straight, two_ranks):
    assert_same_but_for_rounding(straight, two_ranks)


def start(data, out, *flags, launcher) -> subprocess.Popen:
    command = [*launcher, ROOT / "train.py", "--data", data, "--out", out, *FLAGS, *MEMORY, *flags]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(c) for c in command], env=env, cwd=ROOT, **streams)


@pytest.mark.slow
def test_two_nodes_and_accumulation_change_nothing_but_rounding(data, straight, tmp_path):
    """Two agents on this machine meet as two nodes would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    node = (*TWO_RANKS[:3], "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    node += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test", "--local-addr", "127.0.0.1")
    flags = ("--total-samples", "28", "--accumulate", "2")
    nodes = [start(data, tmp_path / "run", *flags, launcher=node) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    assert sum("micro 2 x accumulation 2 x ranks 2" in text for text in said) == 1  # the first rank's
    assert_same_but_for_rounding(straight, tmp_path / "run")


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes of torchrun's ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def signalled(data, out, number: int, step: int, *flags) -> tuple[str, int]:
    """Run on two ranks and send one of them a signal once a checkpoint is there; output and exit status."""
    again = (*TWO_RANKS, "--max-restarts", "2", "--monitor-interval", "0.1")
    process = start(data, out, "--total-samples", "60", "--save-every", "8", *flags, launcher=again)
    while not (out / f"step_{step:06d}").is_dir() and process.poll() is None:
        time.sleep(0.01)
    os.kill(workers(process)[1], number)
    return process.communicate(timeout=120)[0], process.returncode


@pytest.mark.slow
def test_ranks_stop_together_at_sigterm_and_a_dead_one_is_started_again(data, tmp_path):
    train(data, tmp_path / "straight", *MEMORY, "--total-samples", "60", launcher=TWO_RANKS)
    said, status = signalled(data, tmp_path / "run", signal.SIGTERM, 1)
    assert status == 0 and "stopped at" in said, said
    done = metrics(tmp_path / "run")[-1]["samples"]
    state = json.loads((tmp_path / "run" / "last" / "state.json").read_text())
    assert state["samples"] == done < 60
    said, status = signalled(data, tmp_path / "run", signal.SIGKILL, done // 8 + 1)
    assert status == 0 and said.count("resumed at") == 2, said  # by the command, then by itself
    assert largest_difference(tmp_path / "straight", tmp_path / "run") == 0.0
    assert [line["samples"] for line in metrics(tmp_path / "run")] == [8, 16, 24, 32, 40, 48, 56, 60]


POISONED = """
import sys
sys.path[:0] = sys.argv.pop(1).split(":")
import torch, train, tyro
from data import Source
flow = Source.flow
def poisoned(self, keys):
    noise, times = flow(self, keys)
    noise[[key == 13 for key in keys]] = torch.nan
    return noise, times
Source.flow = poisoned
train.main(tyro.cli(train.TrainConfig, console_outputs=False))
"""


@pytest.mark.slow
def test_a_sample_that_one_rank_cannot_learn_from_is_skipped_by_both(data, tmp_path):
    (tmp_path / "poisoned.py").write_text(POISONED)
    for name, launcher in (("one", (sys.executable,)), ("two", TWO_RANKS)):  # sample 13 is the second rank's
        command = [*launcher, tmp_path / "poisoned.py", f"{ROOT}:{ROOT / 'tests'}", "--data", data]
        command += ["--out", tmp_path / name, *FLAGS, *MEMORY, "--total-samples", "28"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([str(c) for c in command], check=True, capture_output=True, env=env)
        assert [line["bad_steps"] for line in metrics(tmp_path / name)] == [0, 1, 1, 1]
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-4


# ---- arms and errors ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_arms_of_one_seed_share_the_policys_first_loss(data, straight, tmp_path):
    train(data, tmp_path / "run", "--total-samples", "8")
    assert metrics(tmp_path / "run")[0]["action_loss"] == metrics(straight)[0]["action_loss"]


@pytest.mark.slow
def test_a_blind_arm_trains_on_the_mean_picture(data, tmp_path):
    train(data, tmp_path / "run", "--blind", "--total-samples", "8")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["arm"] == "none-blind"
    assert set(load_file(tmp_path / "run" / "last" / "world.safetensors")) == {
        *Summary._fields, "mean_images.observation/images/image", "mean_images.observation/images/image2",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "2e-3"], r"holds another run: lr is 0.001, not 0.002"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--fusion", "none", "late"], "none excludes the others"),
        (["--total-samples", "0"], "--total-samples 0 must be at least 1"),
        (["--init", "./no-such-folder"], "no folder './no-such-folder'"),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(data, straight, flags, message):
    before = (straight / "config.json").read_text()
    out = straight if flags[0] in ("--lr", "--data") else straight.parent / "other"
    done = train(data, out, *MEMORY, "--total-samples", "28", *flags, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert message in " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert (straight / "config.json").read_text() == before


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    arm = tiny.arm()
    check_space(tmp_path, arm)
    usage = run_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ValueError, match=r"a checkpoint needs 0\.\d+ GB, the disk has 0\.00 GB left"):
        check_space(tmp_path, arm)


@given(st.integers(0, 1000), st.integers(1, 70), st.integers(1, 5), st.integers(1, 4))
def test_ranks_and_micro_batches_share_out_each_sample_once(first, count, ranks, accumulate):
    parts = [p for rank in range(ranks) for p in shares(first, count, rank, ranks, accumulate)]
    assert len(parts) == ranks * accumulate
    used = np.concatenate([numbers for numbers, weight in parts if weight])
    assert used.tolist() == list(range(first, first + count))
    assert all(len(numbers) for numbers, _ in parts)


def test_the_schedule_counts_samples():
    a = TrainConfig(total_samples=10_000, warmup_samples=500, batch_size=10)
    assert lr_factor(a, 500) == 1.0
    assert math.isclose(lr_factor(a, 10_000), a.lr_end)
    assert 0 < lr_factor(a, 0) < lr_factor(a, 250) < 1
    short = TrainConfig(total_samples=1000, warmup_samples=500, batch_size=10)
    assert lr_factor(short, 100) == 1.0  # at most a tenth of the budget warms up


# ---- held-out episodes, and going on from an arm ------------------------------------------------------


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    """A run that holds one of three episodes out and measures on it twice."""
    out = tmp_path_factory.mktemp("runs") / "measured"
    train(data, out, *MEMORY, "--total-samples", "16", "--val-every", "8", "--val-share", "0.34")
    return out


@pytest.mark.slow
def test_held_out_losses_are_logged_under_the_runs_modes_and_oracle(measured):
    lines = [line for line in metrics(measured) if "val_loss_off" in line]
    assert [line["samples"] for line in lines] == [8, 16]
    assert all(
        math.isfinite(line[f"val_loss_{m}"]) for line in lines for m in ("off", "pred", "zero", "oracle")
    )
    assert len(json.loads((measured / "config.json").read_text())["held_out"]) == 1
    assert all(-1 <= line["val_world_cos"] <= 1 for line in lines)


def test_nothing_is_fitted_on_what_is_held_out(tmp_path):
    """Other pictures and states in the held-out episode change no statistic, latent or normalisation."""
    summaries = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        write_task(folder / "soup_demo.hdf5", lengths=(20, 24, 22), size=16)
        config = TrainConfig(
            data=folder, fusion=("late",), val_every=8, val_share=0.34, world_dim=8, world_resolution=4,
            future=2, world_stride=1, out=folder / "run",
        )  # fmt: skip
        [out] = held_out(load(folder), 0.34)
        if seed:
            with h5py.File(folder / "soup_demo.hdf5", "a") as file:
                demo = file[f"data/demo_{out}"]
                demo["obs/agentview_rgb"][...] = 255 - demo["obs/agentview_rgb"][...]
                demo["obs/ee_pos"][...] = demo["obs/ee_pos"][...] * 3 + 1
        config, demos, _, latents = open_data(config, None, 0, 1, print)
        frames = np.flatnonzero(demos.episode != out)
        arm, processor = build_arm(config, demos, latents, frames)
        found = {**arm.encoder.state(), **{f: getattr(arm, f) for f in Summary._fields}}
        summaries.append(found | {f"stats.{k}": v for k, v in processor.stats["observation.state"].items()})
    assert summaries[0].keys() == summaries[1].keys()
    assert [name for name, x in summaries[0].items() if not torch.equal(x, summaries[1][name])] == []


def test_a_rate_of_zero_is_zero_and_no_purpose_of_a_seed_meets_another_seeds():
    config = TrainConfig(lr=1e-3, lr_world=0.0, fusion=("late",), out=Path("x"))
    rates = {group["peak"] for group in make_optimizer(config, tiny.arm("pred")).param_groups}
    assert rates == {1e-3, 0.0}
    seeds = [keyed_seed(seed, purpose) for seed in range(50) for purpose in ("policy", "memory")]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.slow
def test_a_run_that_measures_on_two_ranks_logs_the_same(data, tmp_path):
    flags = (*MEMORY, "--total-samples", "16", "--val-every", "8", "--val-share", "0.67")
    flags += ("--world-dim", "8")  # one short episode is left to fit on
    losses = []
    for i, launcher in enumerate(((sys.executable,), TWO_RANKS)):
        train(data, tmp_path / str(i), *flags, launcher=launcher)
        losses.append(
            [line["val_loss_pred"] for line in metrics(tmp_path / str(i)) if "val_loss_pred" in line]
        )
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_eval_measures_the_held_out_episodes_offline(data, measured, straight):
    command = [sys.executable, ROOT / "eval.py", measured, "--offline", data]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "1 episodes, action loss" in done.stdout and "oracle" in done.stdout
    line = json.loads((measured / "offline.jsonl").read_text())
    last = [line for line in metrics(measured) if "val_loss_pred" in line][-1]
    assert line["modes"]["pred"]["loss"] == pytest.approx(last["val_loss_pred"], rel=1e-5)
    done = subprocess.run(
        [str(c) for c in [*command[:2], straight, *command[3:]]], capture_output=True, text=True
    )
    assert done.returncode == 1 and "was trained on all episodes of it" in done.stderr


@pytest.mark.slow
def test_a_run_goes_on_from_an_arms_checkpoint_and_refuses_another_site(data, straight, tmp_path):
    flags = ("--init", straight, "--total-samples", "8")
    train(data, tmp_path / "same", *MEMORY, *flags, "--lr", "0")
    a, b = weights(straight), weights(tmp_path / "same")
    assert all((a[name] == b[name]).all() for name in a)  # the memory's modules too
    for other, message in (
        (("--fusion", "suffix_in"), "was trained with fusion ('late',), not ('suffix_in',)"),
        (("--fusion", "late", "--memory", "zero"), "--memory zero would drop its prophet"),
    ):
        done = train(data, tmp_path / "other", *MEMORY, *other, *flags, check=False)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fusion", SITES)
def test_every_site_trains_saves_and_resumes(data, fusion, tmp_path):
    flags = ("--fusion", fusion, "--memory", "shuffle", "--prefix-tokens", "2", "--future", "2")
    train(data, tmp_path / "run", *MEMORY, *flags, "--total-samples", "16", "--save-every", "8")
    whole = weights(tmp_path / "run")
    assert any(f"fusion.sites.{fusion}.gate" in name for name in whole)
    (tmp_path / "run" / "last").unlink()
    (tmp_path / "run" / "last").symlink_to("step_000001")
    train(data, tmp_path / "run", *MEMORY, *flags, "--total-samples", "16", "--save-every", "8")
    again = weights(tmp_path / "run")
    assert all((whole[name] == again[name]).all() for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [("ensemble", "--world-loss", "min"), ("dropout", "--prophet-dropout", "0.2")]
)
def test_a_bank_trains_and_logs_what_its_hypotheses_do(data, method, tmp_path):
    flags = ("--num-hypotheses", "3", "--hypothesis-method", *method, "--total-samples", "16")
    train(data, tmp_path / "run", *MEMORY, *flags)
    line = metrics(tmp_path / "run")[-1]
    said = ("usage_ppl", "dead", "oracle_gap", "oracle_gap_excess", "div_cos", "world_cos_best")
    assert all(
        math.isfinite(line[k]) for k in (*said, "late/attn_entropy_hyp", "late/spike", "late/choose_best")
    )
    assert 1 <= line["usage_ppl"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--dtype", "bfloat16"), ("--dtype", "float32", "--compile")])
def test_a_frozen_trunk_in_bfloat16_or_compiled_trains_alike_and_resumes_to_the_bit(data, tmp_path, flags):
    budget, base = ("--save-every", "8", "--total-samples"), tiny.golden() / "checkpoint"
    frozen = (*MEMORY, "--init", base, "--freeze", "expert", "--cameras", "camera1=image", "camera2=image2")
    for name in ("straight", "killed"):
        train(data, tmp_path / name, *frozen, *flags, *budget, "16")
    shutil.rmtree(tmp_path / "killed" / "step_000002")
    (tmp_path / "killed" / "last").unlink()
    (tmp_path / "killed" / "last").symlink_to("step_000001")
    assert "resumed at 8" in train(data, tmp_path / "killed", *frozen, *flags, *budget, "16").stdout
    straight, killed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    held = {t.dtype for name, t in straight.items() if ".text_model." in name or ".vision_model." in name}
    assert held == {getattr(torch, flags[1])}
    assert json.loads((tmp_path / "straight" / "config.json").read_text())["dtype"] == flags[1]
    train(data, tmp_path / "plain", *frozen, *budget, "16")
    for one, other in zip(metrics(tmp_path / "straight"), metrics(tmp_path / "plain"), strict=True):
        assert math.isclose(one["action_loss"], other["action_loss"], rel_tol=0.01)
