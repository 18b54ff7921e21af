"""Lines of results: nothing is lost by a kill, nothing counts twice."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest

from rollouts.episodes import file_of, gather, key_of, own_file, parts, read_all, read_lines


def line(init_state: int, **fields) -> dict:
    made = {"checkpoint": "step_1", "memory": "off", "suite": "s", "task_id": 1, "init_state": init_state}
    return made | {"success": True, "crash": None, "protocol": {"a": 1}} | fields


def write(path, *lines: dict, tail: str = "") -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + tail)


def test_a_line_cut_off_by_a_kill_is_dropped_and_a_broken_one_is_an_error(tmp_path):
    path = tmp_path / "episodes.jsonl"
    assert read_all(path) == {} and gather(path) is None and not path.exists()
    write(path, line(3), tail=json.dumps(line(4))[:20])
    assert read_lines(path) == [line(3)]
    gather(path)
    assert path.read_text() == json.dumps(line(3)) + "\n"
    path.write_text("no json\n")
    with pytest.raises(ValueError, match=r"episodes\.jsonl:1 is no episode"):
        read_lines(path)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"is no episode .*checkpoint"):
        read_lines(path)


def test_other_ranks_lines_are_taken_in_once_and_their_files_removed(tmp_path):
    path = tmp_path / "episodes.jsonl"
    assert own_file(path, 0) == path
    write(path, line(3), line(4))
    write(own_file(path, 1), line(4), line(5), tail="{")
    write(own_file(path, 12), line(6))
    assert set(read_all(path)) == {key_of(line(i)) for i in (3, 4, 5, 6)}
    gather(path)
    assert read_lines(path) == [line(i) for i in (3, 4, 5, 6)]
    assert parts(path) == [] and sorted(p.name for p in tmp_path.iterdir()) == ["episodes.jsonl"]


def test_crashes_stay_unless_they_are_to_be_tried_again(tmp_path):
    path = tmp_path / "episodes.jsonl"
    write(path, line(3), line(4, crash="died"))
    gather(path)
    assert len(read_lines(path)) == 2
    gather(path, retry_crashes=True)
    assert read_lines(path) == [line(3)]


def test_an_episode_is_told_from_others_by_checkpoint_memory_start_and_protocol():
    keys = {key_of(line(3, **f)) for f in ({}, {"memory": "pred"}, {"task_id": 2}, {"checkpoint": "step_2"})}
    keys |= {key_of(line(4)), key_of(line(3, protocol={"a": 2}))}
    assert len(keys) == 6
    assert key_of(line(3, success=True)) == key_of(line(3))


class Suite(NamedTuple):
    """What `file_of` reads of a plan."""

    suite: str
    protocol: dict
    seed: int = 7

    @property
    def sim(self) -> Suite:
        return self

    def record(self) -> dict:
        return self.protocol


def test_a_stray_evaluation_has_a_file_of_its_own_and_changes_nobody_elses(tmp_path):
    path, usual, stray = tmp_path / "episodes.jsonl", Suite("s", {"a": 1}), Suite("s", {"a": 2})
    assert file_of(tmp_path, [usual]) == path  # nothing is there
    write(path, line(3, seed=7))
    write(own_file(path, 1), line(4, seed=7))
    assert file_of(tmp_path, [usual]) == file_of(tmp_path, [Suite("t", {"a": 2})]) == path
    own = file_of(tmp_path, [stray])
    assert own != path and own == file_of(tmp_path, [stray]) and own.name.startswith("episodes.")
    assert file_of(tmp_path, [usual._replace(seed=8)]) not in (path, own)  # fixtures stand elsewhere
    assert file_of(tmp_path, [Suite("t", {}), stray]) not in (path, own)
    write(own, line(3, protocol={"a": 2}, seed=7))
    write(own_file(own, 1), line(4, protocol={"a": 2}, seed=7))
    gather(own)
    gather(path)
    assert [len(read_all(one)) for one in (path, own)] == [2, 2] and len(list(tmp_path.iterdir())) == 2
    assert file_of(tmp_path, [usual]) == path and file_of(tmp_path, [stray]) == own
    path.unlink()  # a folder of before, whose one file holds several
    write(path, line(3, seed=7), line(3, protocol={"a": 2}, seed=7))
    assert file_of(tmp_path, [usual]) == file_of(tmp_path, [stray]) == path
