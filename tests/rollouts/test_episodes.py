"""Lines of results: nothing is lost by a kill, nothing counts twice."""

from __future__ import annotations

import json

import pytest

from rollouts.episodes import gather, key_of, own_file, parts, read_all, read_lines


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
