"""Rollouts pair up: starts, noise and frames follow from the protocol, never from how many run at once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import tiny
import torch
from test_arm import processor
from tiny import run_config

from arm import save_arm
from eval import EvalConfig, by_taken, make_fast
from rollouts.plan import make_plans
from simulator.env import CAMERAS
from smolvla.fit import Fit, refit

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with an untrained arm whose gate is open, so that memory decides what it does."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arm = tiny.arm()
    tiny.open_gates(arm)
    save_arm(folder / "step_000001", arm, processor())
    (folder / "last").symlink_to("step_000001")
    (folder / "config.json").write_text(json.dumps(run_config()))
    return folder


def evaluate(run: Path, *flags: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run"]
    start += [] if ranks == 1 else ["--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, str(ROOT / "eval.py"), str(run), "--max-steps", "12", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def episodes(run: Path) -> dict[tuple, dict]:
    lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    return {(line["memory"], line["init_state"]): line for line in lines}


@pytest.mark.slow
def test_a_mode_that_the_arm_lacks_is_one_line_before_any_simulator_starts(tmp_path):
    save_arm(tmp_path / "step_000001", tiny.arm("zero"), processor())
    done = evaluate(
        tmp_path / "step_000001",
        "--memory",
        "pred",
        "--suite",
        "libero_object",
        "--task-ids",
        "1",
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: --memory pred needs a prophet, and this arm has none: "
        "choose off, zero, random, mean, current, history"
    )


def test_a_policy_in_bfloat16_acts_alike_and_its_protocol_says_so():
    found, config = [], EvalConfig(dtype="bfloat16", episodes_per_task=3)
    for dtype in ("float32", "bfloat16"):
        arm = tiny.arm().eval().requires_grad_(False)
        make_fast(EvalConfig(dtype=dtype), arm, processor(), torch.device("cpu"))
        found.append(arm.act(tiny.inputs(), tiny.flow()[0][:, 0], "pred", tiny.world()))
        assert {p.dtype for p in arm.policy.expert.parameters()} == {getattr(torch, dtype)}
        assert {p.dtype for p in arm.prophet.parameters()} == {torch.float32}
    torch.testing.assert_close(found[1], found[0], atol=0.05, rtol=0)
    assert make_plans(config, run_config(), tiny.arm())[0].record()["dtype"] == "bfloat16"


def test_success_is_counted_by_what_was_taken_and_crashes_count_nowhere():
    lines = [("milk", True, None), ("milk", False, None), (None, False, None), (None, None, "it died")]
    named = [dict(zip(("taken", "success", "crash"), line)) for line in lines]
    assert by_taken(named) == "milk 1/2, nothing 0/1"


@pytest.mark.slow
def test_renamed_cameras_act_and_remember_as_those_that_keep_their_names(tmp_path):
    """The same policy under other names, known by its rename map, or told by --cameras: the same episode."""
    names = dict(zip(CAMERAS, ("observation.images.camera1", "observation.images.camera2")))
    found = {}
    for case in ("own", "map", "flag"):
        arm, made = tiny.arm(), processor()
        tiny.open_gates(arm)
        if case != "own":
            shapes = {new: made.raw["input_features"][old] for old, new in names.items()}
            made.raw["input_features"] = shapes | made.raw["input_features"]
            made.config = dataclasses.replace(made.config, cameras=tuple(names.values()))
            made = refit(made, Fit(dict.fromkeys(shapes), 8, 7, names if case == "map" else {}))
            arm.policy.config = made.config
            arm.config = dataclasses.replace(arm.config, world_camera=("observation.images.camera1",))
        run = tmp_path / case
        save_arm(run / "step_000001", arm, made)
        (run / "last").symlink_to("step_000001")
        (run / "config.json").write_text(json.dumps(run_config()))
        flags = [
            "--episodes-per-task",
            "1",
            "--num-envs",
            "1",
            "--imagine",
            "1",
            "--accept",
            "action",
            "statistics",
        ]
        if case == "flag":
            done = evaluate(run, *flags, check=False)
            assert "--cameras camera1=image camera2=image2 would say which is which" in done.stderr
            flags += ["--cameras", "camera1=image", "camera2=image2"]
        evaluate(run, *flags)
        found[case] = episodes(run)["pred", 3]
        assert list((run / "imagined").glob("*.png"))
    assert found["map"]["final_state"] == found["own"]["final_state"] == found["flag"]["final_state"]
    assert found["flag"]["protocol"].pop("cameras") == "camera1=image camera2=image2"
    assert found["map"]["protocol"] == found["own"]["protocol"] == found["flag"]["protocol"]


@pytest.mark.slow
def test_environments_ranks_and_kills_change_no_episode_and_films_repeat_them(run):
    refused = evaluate(run, "--check", check=False)  # the tiny arm's statistics are no robot's
    assert refused.returncode == 1 and not (run / "episodes.jsonl").exists()
    assert refused.stderr.startswith("error: not as in training: action") and refused.stderr.count("\n") == 1
    assert refused.stderr.endswith("--accept action statistics\n")
    flags = ("--memory", "pred", "off", "--episodes-per-task", "2", "--accept", "action", "statistics")
    evaluate(run, *flags, "--num-envs", "2")
    both, path = episodes(run), run / "episodes.jsonl"
    assert {key: line["crash"] for key, line in both.items()} == dict.fromkeys(both)
    assert set(both) == {(mode, i) for mode in ("pred", "off") for i in (3, 4)}
    first = path.read_text().splitlines(keepends=True)
    kept = [text for text in first if json.loads(text)["memory"] == "pred"]
    path.write_text(kept[0][:30])  # as after a kill, of two ranks
    (run / "episodes.rank1.jsonl").write_text(kept[1])
    done = evaluate(run, *flags, "--num-envs", "1", "--video", ranks=2)
    assert "memory pred: 1 of 2 episodes are there" in done.stdout
    warned = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert len(warned) == 1 and "tokens and is cut to 32" in warned[0]  # the tiny arm knows no such words
    again = episodes(run)
    fields = ("success", "steps", "decisions", "final_state", "render_fingerprint", "prompt", "protocol")
    assert {k: [v[f] for f in fields] for k, v in again.items()} == {
        k: [v[f] for f in fields] for k, v in both.items()
    }
    assert again["pred", 3]["final_state"] != again["off", 3]["final_state"]  # the memory decides
    assert not list(run.glob("*rank*"))
    conformance = json.loads((run / "conformance.json").read_text())["libero_object"]
    assert (conformance["action"], conformance["sizes"]) == ("differs", "agrees")
    for mode in ("pred", "off"):  # nothing is solved in 12 steps: the first failure of each
        film = run / "videos" / f"step_000001-{mode}-libero_object-task1-init3-failure.mp4"
        with av.open(str(film)) as container:
            [stream] = container.streams.video
            frames = sum(1 for _ in container.decode(stream))
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
        assert frames == 7 + 10  # every second step, both ends, and a second's stand
        assert film.with_suffix(".png").is_file()
    assert len(list((run / "videos").iterdir())) == 4
