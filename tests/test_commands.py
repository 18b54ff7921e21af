"""What programs share of their command lines: --help in two boxes, lists of numbers, mistakes in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from files import parse_numbers
from prophet import MemoryMode

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {  # how it is called, an option that people use first, one for experts
    "train.py": ("--fusion", "--grad-clip"),
    "eval.py": ("--memory", "--policy-batch"),
    "data.py": ("--task-ids", "--nearest-frame"),
    "model.py": ("--revision", "--stats-of"),
    "-m simulator record": ("--task-ids", "--texture-colorspace"),
    "-m simulator verify": ("--picture-tolerance", "--texture-colorspace"),
    "-m report": ("--out", ""),
    "-m report watch": ("--every", ""),
    "-m report power": ("--seeds", "--contrasts"),
    "-m bench": ("--size", "--rounds"),
    "-m bench control": ("--seed", ""),
}


def run(program: str, *flags: str, **more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *program.split(), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | more)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_begins_with_what_people_use_and_has_lines_to_type(program):
    done = run(program, "--help", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert f"python {program}" in done.stdout.split("often options")[0]  # an example, as typed
    first, rest = done.stdout.split("often options")[1].partition("more options")[::2]
    often, expert = PROGRAMS[program]
    assert often in first and expert in rest and (not expert or expert not in first)
    assert "{None}" not in done.stdout and "(default: )" not in done.stdout and "None|" not in done.stdout
    assert run(program, "--no-such-flag").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "-m simulator record --task-ids 3-1",
            "--task-ids '3-1' is no list of numbers: write it like 0,3,5-7",
        ),
        ("-m simulator record --init-states 0-50", "--init-states '0-50' names 50: choose from 0..49"),
        ("data.py inspect somewhere --task-ids 1,1", "--task-ids '1,1' names a number twice: name each once"),
        ("-m report watch --every 0 x", "--every 0.0 must be 0.1 seconds or more"),
        ("-m bench control --steps 0", "--steps 0 must be at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(line, said):
    done = run(line)
    assert done.returncode == 1 and done.stderr == f"error: {said}\n"


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_choices_stand_in_one_order(seed):
    said = run("train.py --memory prde", PYTHONHASHSEED=seed, COLUMNS="200").stderr
    assert ", ".join(map(repr, get_args(MemoryMode))) in said and "None" not in said


def test_numbers_are_lists_and_ranges_in_the_order_given():
    assert (
        parse_numbers("7,0-2, 5", "--task-ids") == [7, 0, 1, 2, 5] and parse_numbers("", "--task-ids") == []
    )
    assert parse_numbers("0-49", "--init-states", 50) == list(range(50))


@pytest.mark.parametrize(
    "text", ["a", "1-", "3-1", "1,,2", ",", "-1", "1,0-2", "1.5", "0-99999999999", "48-50"]
)
def test_anything_else_is_one_line_that_names_the_flag(text):
    with pytest.raises(ValueError, match=f"--init-states '{text}'") as caught:
        parse_numbers(text, "--init-states", 50)
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(0, 99), unique=True))
def test_numbers_that_are_written_out_come_back(numbers):
    assert parse_numbers(",".join(map(str, numbers)), "--episodes") == numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [*(f"{program} --help" for program in PROGRAMS), "-m simulator --help"]
    + [f"run_matrix.sh demo {action}" for action in ("--help", "--dry-run", "--list")],
)
def test_what_is_said_may_be_cut_off_by_who_reads_it(line):
    command = ["bash" if line.startswith("run_matrix") else sys.executable, *line.split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before a word is said
    assert process.stderr.read() == b"" and process.wait() == 0
    process.stderr.close()
