"""Recorded episodes replay here, and one that was changed does not. The slow one needs the simulator."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import replay

ROOT = Path(__file__).parent.parent
CASES = Path(__file__).parent / "libero_env"


def test_a_folder_without_recordings_is_named_in_one_line():
    with pytest.raises(ValueError, match="no recorded episodes") as caught:
        replay.verify(Path("/nonexistent"), 0.5)
    assert "\n" not in str(caught.value)


def test_the_script_finds_its_replay_in_a_child_process_and_names_a_broken_recording_in_one_line(tmp_path):
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "meta.json").write_text("{}")
    command = [sys.executable, str(ROOT / "sim.py"), "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/case is no complete recording: [Errno 2]")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_recorded_episodes_replay_and_a_perturbed_one_does_not(tmp_path, capsys):
    assert replay.verify(CASES, 0.5), capsys.readouterr().out
    shutil.copytree(CASES / "libero_goal_task1_init0", tmp_path / "case")
    path = tmp_path / "case" / "run.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["actions"] = changed["actions"].copy()
    changed["actions"][3, 0] += 0.5
    np.savez(path, **changed)
    assert not replay.verify(tmp_path, 0.5)
    assert "DIFFERS" in capsys.readouterr().out
