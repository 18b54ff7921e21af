"""A program's command line: --help, and a wrong flag in one line. Its ranks: one that is lost is named."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
import torch
from test_data import write_task

import eval as evaluation
import train
from eval import EvalConfig
from files import Refused, read_command_line
from ranks import run_program
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


def run(*line: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "module"), [("train.py", train), ("eval.py", evaluation)])
def test_help_begins_with_two_lines_to_copy_and_the_options_that_people_use(program, module):
    said = run(program, "--help").stdout
    assert said.count(f"python {program}") + said.count(f"{program} --") >= 2
    assert "{None}" not in said and "(default: )" not in said and "(default: None)" not in said
    flags = [f"--{name.replace('_', '-')}" for name in module.OFTEN if name != "checkpoint"]
    places = [said.index(f"│ {flag}") for flag in flags]
    assert places == sorted(places) and places[-1] < said.index("─ more options")


def test_a_config_without_flags_is_the_plain_one_and_flags_win():
    assert read_command_line(TrainConfig, None, train.OFTEN, []) == TrainConfig()
    assert read_command_line(EvalConfig, None, evaluation.OFTEN, []) == EvalConfig()
    one = read_command_line(TrainConfig, None, train.OFTEN, ["--lr", "0.5", "--fusion", "late", "--compile"])
    assert (one.lr, one.fusion, one.compile, one.memory, one.batch_size) == (0.5, ("late",), True, "pred", 16)
    two = read_command_line(EvalConfig, None, evaluation.OFTEN, ["runs/x", "--memory", "pred", "zero"])
    assert (two.checkpoint, two.memory) == ("runs/x", ("pred", "zero"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("--batch-size", "0"), "--batch-size 0 must be at least 1"),
        (("--init", "tinny"), "--init tinny is no preset (tiny, base, libero), no folder and no hub id"),
        (("--data", "README.md"), "README.md is no HDF5 file"),
        (("--fusion", "late", "--num-hypotheses", "4"), "repeat, dropout, noise, ensemble, mixture"),
        (("--memory", "pred"), "--memory pred with --fusion none: there is no site for it"),
        (("--fusion", "late", "--memory", "off"), "--memory off with --fusion late: the site would never"),
        (("--freeze", "expert"), "--init tiny --freeze expert: all but the expert stays random"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_type(line, said, tmp_path):
    data = () if "--data" in line else ("--data", "tests/lerobot_v3/L_image/dataset")
    done = run("train.py", *line, *data, "--out", str(tmp_path / "run"))
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_a_folder_of_runs_names_them_and_a_chunk_has_an_end(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "step_000001").mkdir(parents=True)
    done = run("eval.py", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} holds 2 runs, name one: {tmp_path / 'a'} {tmp_path / 'b'}\n"


def test_memory_that_is_not_there_is_one_line_and_other_errors_keep_their_place(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    given = (TrainConfig, None, Refused, train.OFTEN)
    with pytest.raises(SystemExit, match=r"^error: .*can't allocate memory.*: raise --accumulate, or lower"):
        run_program(lambda _: torch.empty(2**50, dtype=torch.uint8), *given)
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_program(lambda _: torch.zeros(2) + torch.zeros(3), *given)


TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher started, by their rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
            rank = re.search(rb"\0RANK=(\d+)", path.read_bytes())
            if parent == launcher and rank:
                found[int(rank[1])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


def two_ranks(data: Path, out: Path, *more: str) -> list[str]:
    """A training on two ranks, with a checkpoint after every fifth step."""
    flags = ("--save-every", "40", "--patience", "0.1", *more)
    return [sys.executable, *TWO_RANKS, *soak.command(data, out, 60)[1:], *flags]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The data, and a run of two ranks that nothing happens to."""
    home = tmp_path_factory.mktemp("ranks")
    write_task(home / "data" / "soup_demo.hdf5", lengths=(9, 24, 12), size=32)
    soak.finish(soak.launch(two_ranks(home / "data", home / "run")))
    return home / "data", home / "run"


def lose(command: list[str], said: Path, number: int, is_time: Callable[[int], object]) -> tuple[int, str]:
    """Send the second rank a signal when it is time (of the launcher); give its process, and what is said."""
    with said.open("w") as file:
        launcher = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        deadline = time.monotonic() + 120
        while not is_time(launcher.pid):
            assert time.monotonic() < deadline and launcher.poll() is None, said.read_text()[-3000:]
            time.sleep(0.01)
        victim = ranks_of(launcher.pid)[1]
        os.kill(victim, number)
        deadline = time.monotonic() + 60
        while "error: rank" not in said.read_text():
            assert time.monotonic() < deadline, said.read_text()[-3000:]
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)  # for a stopped one torchrun would wait half a minute
        assert launcher.wait(timeout=60)
    return victim, said.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"rank 1 \(process {} on \S+\) (is gone|does not answer), after step \d+"),
        (signal.SIGSTOP, r"rank 0 has waited for \d+ s: rank 1 \(process {} on \S+\) does not answer, after"),
    ],
)
def test_where_one_of_two_ranks_is_lost_the_other_says_which_and_the_run_goes_on_to_the_same_bits(
    undisturbed, tmp_path, number, said
):
    (data, straight), out = undisturbed, tmp_path / "run"
    victim, text = lose(two_ranks(data, out), tmp_path / "said", number, lambda _: soak.newest(out) >= 10)
    assert re.search(said.format(victim), text), text[-3000:]
    assert soak.newest(out) < 60
    soak.finish(soak.launch(two_ranks(data, out)))
    assert soak.differences(straight, out) == []


@pytest.mark.slow
def test_a_rank_that_is_lost_at_the_start_or_over_data_is_named(tmp_path):
    data = tmp_path / "long" / "soup_demo.hdf5"
    write_task(data, lengths=(1500, 1500), size=64)
    command = two_ranks(data.parent, tmp_path / "run")
    here = lambda launcher: len(ranks_of(launcher)) == 2  # noqa: E731
    _, text = lose(command, tmp_path / "start", signal.SIGSTOP, here)
    assert "rank 0 has waited for 6 s: rank 1 has not come" in text, text[-3000:]
    encodes = lambda _: list(data.parent.glob("world_*"))  # noqa: E731
    for number, why in ((signal.SIGSTOP, "does not answer"), (signal.SIGKILL, "is gone|does not answer")):
        victim, text = lose(command, tmp_path / "data", number, encodes)
        assert re.search(rf"rank 1 \(process {victim} on \S+\) ({why})[\n;]", text), text[-3000:]
        for cache in encodes(0):
            shutil.rmtree(cache)
