"""Recording demonstrations: scheduling, files, settings. Slow ones need the simulator."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from simulator import env as sim
from simulator import expert, pool, verify
from simulator import record as recording

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--noise",
    "0",
    "--displace",
    "0",
    "--suite",
    "libero_object",
    "--task-ids",
    "1",
    "--init-states",
    "3,0",
    "--size",
    "64",
    "--workers",
    "1",
]


def config(out: Path, **changes) -> recording.DemoConfig:
    return recording.DemoConfig(**{"out": out, "size": 16, "init_states": "0-4", **changes})


def tiny_part(folder: Path, attempt: int, made: recording.DemoConfig, steps: int = 3) -> Path:
    pictures = np.full((steps, 16, 16, 3), attempt, dtype=np.uint8)
    arrays = {"actions": np.zeros((steps, 7)), "obs/agentview_rgb": pictures, "obs/eye_in_hand_rgb": pictures}
    path = recording.part_path(folder, attempt)
    folder.mkdir(exist_ok=True)
    about = {"pairing": recording.PAIRING, "suite": made.suite}
    recording.write_part(
        path, arrays, {"num_samples": steps, "attempt": attempt}, recording.Job(made, 0, attempt, path), about
    )
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": "libero_gaol"}, "libero_goal"),
        ({"task_ids": "10"}, "0..9"),
        ({"suite": "libero_goal", "task_ids": "0"}, "1, 2, 4, 6, 8, 9"),
        ({"suite": "libero_10"}, "does not know"),
        ({"init_states": "40-50"}, "0..49"),
        ({"noise": 2.0}, "--noise"),
        ({"demos_per_task": 0}, "--demos-per-task"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        config(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_attempts_walk_through_the_init_states_and_then_displace_anew(tmp_path):
    made = config(tmp_path, init_states="20-22")
    assert [recording.Job(made, 0, a, None).start for a in range(5)] == [
        (20, 0),
        (21, 0),
        (22, 0),
        (20, 1),
        (21, 1),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_kept_attempts_do_not_depend_on_workers_or_interruptions(seed):
    """Whatever finishes first, and whenever all running attempts are lost, the first successes are kept."""
    generator = np.random.default_rng(seed)
    solved = [*(generator.random(40) < 0.6).tolist(), *[True] * 20]
    wanted, workers = int(generator.integers(1, 9)), int(generator.integers(1, 6))
    successes, tried, running = set(), set(), set()
    while True:
        attempt = recording.next_attempt(successes, tried, running, wanted)
        if attempt is not None and len(running) < workers:
            running.add(attempt)
        elif running and generator.random() < 0.1:
            running.clear()  # killed
        elif running:
            done = int(generator.choice(sorted(running)))
            running.discard(done)
            tried.add(done)
            successes |= {done} if solved[done] else set()
        else:
            break
    assert sorted(successes)[:wanted] == [a for a, ok in enumerate(solved) if ok][:wanted]


def test_parts_become_one_file_in_the_order_of_attempts_and_grow_it_later(tmp_path):
    made, folder, path = config(tmp_path), tmp_path / "x.parts", tmp_path / "x_demo.hdf5"
    for attempts in ([2, 0], [2, 0, 5]):
        for attempt in set(attempts) - recording.read_final(path, made.settings(0)).successes:
            tiny_part(folder, attempt, made, steps=3 + attempt)
        recording.assemble(path, folder, sorted(attempts), made.settings(0))
        assert not folder.exists() and list(tmp_path.glob("*.tmp")) == []
    with h5py.File(path) as file:
        data = file["data"]
        assert (data.attrs["num_demos"], data.attrs["total"], data.attrs["pairing"]) == (
            3,
            16,
            recording.PAIRING,
        )
        assert [int(data[f"demo_{i}"].attrs["attempt"]) for i in range(3)] == [0, 2, 5]
        assert (
            data["demo_1/obs/agentview_rgb"].chunks == (1, 16, 16, 3)
            and data["demo_1/obs/agentview_rgb"][0, 0, 0, 0] == 2
        )
    stored = recording.read_final(path, made.settings(0))
    assert stored.successes == {0, 2, 5} and stored.tried == set(range(6))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 32},
        {"displace": 0.05},
        {"either": "milk"},
        {"noise": 0.1},
        {"draw": "exact"},
        {"seed": 8},
        {"init_states": "0-3"},
    ],
)
def test_files_and_parts_of_other_settings_are_refused_with_both_values(tmp_path, changes):
    made, folder, path = config(tmp_path), tmp_path / "x.parts", tmp_path / "x_demo.hdf5"
    other = config(tmp_path, **changes).settings(0)
    flag = "--" + next(iter(changes)).replace("_", "-")
    tiny_part(folder, 0, made)
    with pytest.raises(ValueError, match=f"{flag} .*, this run asks for"):
        recording.read_parts(folder, other)
    recording.assemble(path, folder, [0], made.settings(0))
    with pytest.raises(ValueError, match=f"{flag} .*, this run asks for"):
        recording.read_final(path, other)


def test_a_truncated_part_is_redone_and_a_truncated_file_is_an_error(tmp_path, capsys):
    made, folder, path = config(tmp_path), tmp_path / "x.parts", tmp_path / "x_demo.hdf5"
    for attempt in (0, 1):
        tiny_part(folder, attempt, made)
    recording.log_attempt(folder, made.settings(0), recording.Outcome(2, False, 280, 3.0))
    whole = recording.part_path(folder, 1).read_bytes()
    recording.part_path(folder, 1).write_bytes(whole[: len(whole) // 2])
    stored = recording.read_parts(folder, made.settings(0))
    assert stored.successes == {0} and stored.tried == {0, 2} and "recorded again" in capsys.readouterr().out
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="delete it"):
        recording.read_final(path, made.settings(0))


def test_a_torn_last_log_line_is_left_out(tmp_path):
    settings = config(tmp_path).settings(0)
    recording.log_attempt(tmp_path, settings, recording.Outcome(0, False, 280, 3.0))
    with (tmp_path / "attempts.jsonl").open("a") as log:
        log.write('{"attempt": 1, "succ')
    assert recording.read_parts(tmp_path, settings).tried == {0}


def test_a_disk_that_is_too_small_is_named_before_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6})())
    with pytest.raises(ValueError, match="too full"):
        recording.check_space(tmp_path, 50, 128)


def test_a_disk_that_fills_up_leaves_no_torn_file(tmp_path, monkeypatch):
    made, folder = config(tmp_path), tmp_path / "x.parts"
    tiny_part(folder, 0, made)

    def full(*_: object) -> None:
        raise RuntimeError("unable to write (errno = 28, error message = 'No space left on device')")

    monkeypatch.setattr(recording.os, "replace", full)
    with pytest.raises(OSError, match="no space left") as caught:
        tiny_part(folder, 1, made)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir()] == ["attempt_00000.hdf5"]


def test_rotation_vectors_undo_their_rotation():
    for angle in (-3.0, -1.0, 0.0, 0.5, 3.0):
        np.testing.assert_allclose(expert.rotation_vector(expert.rotation_z(angle)), [0, 0, angle], atol=1e-9)


# ---------------------------------------------------------------- with the simulator


def record(out: Path, demos_per_task: int, *more: str) -> subprocess.CompletedProcess:
    flags = [*FLAGS, "--demos-per-task", str(demos_per_task), "--out", str(out), *more]
    return subprocess.run(
        [sys.executable, "-m", "simulator", "record", *flags], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_a_recorded_demonstration_replays_and_recording_goes_on_where_it_stopped(tmp_path):
    first = record(tmp_path, 1)
    assert first.returncode == 0, first.stderr
    [path] = tmp_path.glob("*_demo.hdf5")
    written = path.stat().st_mtime_ns
    started = time.perf_counter()
    assert "nothing to do" in record(tmp_path, 1).stdout and path.stat().st_mtime_ns == written
    assert time.perf_counter() - started < 10  # under 2 s on an idle machine; the simulator would need 10
    assert "--noise 0.0, this run asks for 0.1" in record(tmp_path, 1, "--noise", "0.1").stderr
    assert record(tmp_path, 2).returncode == 0
    with h5py.File(path) as file:
        data = file["data"]
        assert [int(demo.attrs["init_state_id"]) for demo in data.values()] == [3, 0]
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == data.attrs["language"] != ""
        demo = {
            name: data[f"demo_1/{name}"][:] for name in ("actions", "states", "dones", "obs/agentview_rgb")
        }
    assert demo["dones"].sum() == demo["dones"][-1] == 1
    assert demo["actions"].dtype == np.float64 and np.abs(demo["actions"]).max() <= 1
    frame, deviation, success = pool.in_fresh_process(replay_demo, demo)
    assert success and deviation < 1e-9
    assert (
        np.abs(frame[::-1, ::-1].astype(float) - demo["obs/agentview_rgb"][20]).mean() < 0.1
    )  # stored upside down


def replay_demo(demo: dict[str, np.ndarray]) -> tuple[np.ndarray, float, bool]:
    env = sim.LiberoEnv(sim.SimConfig("libero_object", size=64, draw="fast"), 1)
    env.reset(0)
    worst, success, frame = 0.0, False, None
    for t, action in enumerate(demo["actions"]):
        worst = max(worst, verify.largest(env.sim_state(), demo["states"][t]))
        frame = env.draw("observation.images.image") if t == 20 else frame  # before action 20
        _, success = env.step(action)
    return frame, worst, success


@pytest.mark.slow
def test_a_killed_run_leaves_finished_parts_that_count(tmp_path):
    flags = [*FLAGS, "--demos-per-task", "3", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "simulator", "record", *flags], stdout=subprocess.DEVNULL
    )
    limit = time.perf_counter() + 120
    while not list(tmp_path.glob("*.parts/attempt_*.hdf5")) and time.perf_counter() < limit:
        time.sleep(0.2)
    os.kill(process.pid, 9)
    process.wait()
    [part] = tmp_path.glob("*.parts/attempt_00000.hdf5")
    written = part.stat().st_mtime_ns
    quiet = {"noise": 0.0, "displace": 0.0}
    made = recording.DemoConfig(tmp_path, task_ids="1", init_states="3,0", size=64, **quiet)
    stored = recording.read_parts(part.parent, made.settings(1))
    assert 0 in stored.successes and part.stat().st_mtime_ns == written
