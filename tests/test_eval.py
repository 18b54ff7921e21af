"""Rollouts pair up: starts, noise and frames follow from the protocol, never from how many run at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_arm import processor

from arm import save_arm
from episodes import key_of, read_done
from eval import EvalConfig, find_checkpoint, make_fast, make_plan, newest_run
from rollout import Episode, Rollout, frame_plan
from sim import NUM_INIT_STATES, parse_ids

ROOT = Path(__file__).parent.parent


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_the_frames_that_are_drawn_are_those_that_decisions_read(n, history, stride, clip):
    drawn = {0} | {m * n + k for m in range(8) for k in frame_plan(n, history, stride, clip)}
    back = {j * stride + i for j in range(history) for i in range(clip)}
    read = {max(0, m * n - b) for m in range(1, 8) for b in back}
    assert read <= drawn
    last = 7 * n  # further decisions read what lies beyond
    needed = {m * n - b for m in range(1, 60) for b in back} | {m * n for m in range(60)}
    assert {step for step in drawn if step <= last} <= needed | {0}


@pytest.mark.parametrize("method", ["dropout", "noise"])
def test_a_hypothesis_stays_what_it_is_for_an_episode_and_is_another_in_the_next(method):
    share = 0.3 if method == "dropout" else 0.0
    arm = tiny.arm(num_hypotheses=3, hypothesis_method=method, prophet_dropout=share)
    plan = make_plan(EvalConfig(episodes_per_task=2), run_config(), arm)
    rollout = Rollout(arm, None, plan, "pred", None, torch.device("cpu"))
    here, later, there = Episode(1, 3, "pred"), Episode(1, 3, "pred", decisions=5), Episode(1, 4, "pred")
    noise, world = rollout.draw([here, later, there])
    assert torch.equal(world["chance"][0], world["chance"][1]) and not torch.equal(noise[0], noise[1])
    assert not torch.equal(world["chance"][0], world["chance"][2])
    alone = rollout.draw([there])
    assert torch.equal(alone[1]["chance"][0], world["chance"][2]) and torch.equal(alone[0][0], noise[2])


def test_init_states_are_read_from_ranges_and_lists():
    assert parse_ids("10-12", "--init-states", NUM_INIT_STATES) == [10, 11, 12]
    assert parse_ids("0,3, 7-8", "--init-states", NUM_INIT_STATES) == [0, 3, 7, 8]
    for bad in ("", "a", "5-", "-3", "3-1", "48-50"):
        with pytest.raises(ValueError, match="--init-states"):
            parse_ids(bad, "--init-states", NUM_INIT_STATES)


def run_config(**fields) -> dict:
    record = {
        "suite": "libero_object",
        "task_id": 1,
        "displace": 0.06,
        "draw": "fast",
        "reset": "soft",
        "size": 32,
    }
    return {"data_provenance": [record | {"init_state_ids": [0, 1, 2]} | fields]}


def test_the_protocol_defaults_to_the_training_datas_and_its_unseen_starts():
    plan = make_plan(EvalConfig(episodes_per_task=3), run_config(), tiny.arm())
    assert plan.starts == [(1, 3), (1, 4), (1, 5)]
    assert not plan.seen & set(plan.starts)
    record = plan.record()
    assert (record["displace"], record["draw"], record["size"], record["n_action_steps"]) == (
        0.06,
        "fast",
        32,
        3,
    )
    assert record["max_steps"] == 280 and record["policy_batch"] == 1 and record["dtype"] == "float32"


def test_what_a_run_cannot_answer_is_asked_for():
    with pytest.raises(ValueError, match="--suite is needed"):
        make_plan(EvalConfig(), {}, tiny.arm())
    with pytest.raises(ValueError, match="--task-ids is needed: the run was not trained on libero_goal"):
        make_plan(EvalConfig(suite="libero_goal"), run_config(), tiny.arm())
    with pytest.raises(ValueError, match="--episodes-per-task 48: task 1 has only 47 left"):
        make_plan(EvalConfig(episodes_per_task=48), run_config(), tiny.arm())
    with pytest.raises(ValueError, match="libero_nowhere"):
        make_plan(EvalConfig(suite="libero_nowhere", task_ids=(1,)), run_config(), tiny.arm())


def test_a_checkpoint_is_found_from_its_run_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run under"):
        newest_run(tmp_path)
    with pytest.raises(ValueError, match="neither a run folder"):
        find_checkpoint(tmp_path)
    save_arm(tmp_path / "run" / "step_000001", tiny.arm(), processor())
    (tmp_path / "run" / "last").symlink_to("step_000001")
    assert newest_run(tmp_path) == tmp_path / "run"
    assert find_checkpoint(tmp_path / "run") == (tmp_path / "run", tmp_path / "run" / "step_000001")


def test_a_line_cut_off_by_a_kill_is_dropped_and_a_broken_one_is_an_error(tmp_path):
    path = tmp_path / "episodes.jsonl"
    assert read_done(path) == set()
    line = {"checkpoint": "step_1", "memory": "off", "task_id": 1, "init_state": 3, "protocol": {"a": 1}}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line)[:20])
    assert read_done(path) == {key_of(line)}
    assert path.read_text() == json.dumps(line) + "\n"
    path.write_text("no json\n")
    with pytest.raises(ValueError, match="holds a line that is no episode"):
        read_done(path)


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


def evaluate(run: Path, *flags: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "eval.py"), str(run), "--max-steps", "12", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def episodes(run: Path) -> dict[tuple, dict]:
    lines = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    return {(line["memory"], line["init_state"]): line for line in lines}


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
        "choose off, zero, random, current, history"
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
    assert make_plan(config, run_config(), tiny.arm()).record()["dtype"] == "bfloat16"


@pytest.mark.slow
def test_one_or_two_environments_interrupted_or_not_give_the_same_episodes(run):
    evaluate(run, "--memory", "pred", "off", "--episodes-per-task", "2", "--num-envs", "2")
    both = episodes(run)
    assert {key: line["crash"] for key, line in both.items()} == dict.fromkeys(both)
    assert set(both) == {(mode, i) for mode in ("pred", "off") for i in (3, 4)}
    first = (run / "episodes.jsonl").read_text().splitlines(keepends=True)
    kept = [
        line for line in first if json.loads(line)["memory"] == "pred" and json.loads(line)["init_state"] == 4
    ]
    (run / "episodes.jsonl").write_text("".join(kept) + first[0][:30])  # as after a kill
    done = evaluate(run, "--memory", "pred", "off", "--episodes-per-task", "2", "--num-envs", "1")
    assert "memory pred: 1 of 2 episodes are there" in done.stdout
    again = episodes(run)
    fields = ("success", "steps", "decisions", "final_state", "render_fingerprint", "prompt", "protocol")
    assert {k: [v[f] for f in fields] for k, v in again.items()} == {
        k: [v[f] for f in fields] for k, v in both.items()
    }
    assert again["pred", 3]["final_state"] != again["off", 3]["final_state"]  # the memory decides
