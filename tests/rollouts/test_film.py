"""Films show what was seen and attended to, at the moment at which it was."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.film import SIDE, Film, compose, film_name, save_film, write_video
from simulator.env import CAMERAS
from simulator.pool import Observation

FRONT, WRIST = CAMERAS


def flat(value: int, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def observation(steps: int, *offsets: int, cameras=(FRONT, WRIST), done: bool = False) -> Observation:
    frames = {(k, camera): flat(10 * (steps + k)) for k in offsets for camera in cameras}
    return Observation(np.zeros(8, np.float32), frames, False, done, steps, "do it", 0.0, 0.0)


@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 5))
def test_pictures_are_planned_evenly_however_chunks_cut_the_episode(every, n, decisions):
    film = Film(every, {})
    steps = [m * n + k for m in range(decisions) for k in film.plan(m * n, n)]
    assert steps == [s for s in range(1, decisions * n + 1) if s % every == 0]


def test_kept_are_even_moments_that_both_cameras_saw_and_the_end():
    film = Film(2, {})
    film.see(0, observation(0, 0))
    film.see(0, observation(3, 2, 3))
    film.see(3, observation(6, 1, cameras=(FRONT,)))
    film.see(6, observation(7, 1, done=True))
    assert sorted(film.pictures) == [0, 2, 7]


def test_the_overlay_follows_the_newest_decision():
    film = Film(1, {"world_gate": 0.25}, {s: {FRONT: flat(200), WRIST: flat(90)} for s in range(4)})
    early, late = np.zeros((2, 8)), np.zeros((2, 8))
    early[0, 0], late[1, 7] = 1, 1
    film.attention = {0: early, 2: late}
    at = [compose(film, step, "pick up the soup", "E2, memory pred", None) for step in range(4)]
    assert at[0].shape[1] == 2 * SIDE and at[0].shape[0] % 2 == 0
    assert (at[0][:SIDE, :SIDE] == 200).all() and (at[0][:SIDE, SIDE:] == 90).all()
    cells = [np.argwhere((picture[..., 0] == 255) & (picture[..., 2] == 60)).mean(0) for picture in at]
    assert np.array_equal(cells[0], cells[1]) and np.array_equal(cells[2], cells[3])
    assert cells[2][0] > cells[0][0] and cells[2][1] > cells[0][1]  # a row below, steps further ahead


@pytest.mark.parametrize("shape", [(1, 8), (4, 8), (16, 32)])
def test_any_number_of_futures_and_an_instruction_of_any_length_fit(shape):
    film = Film(1, {f"world_gate_{i}": 0.1 for i in range(4)}, {0: {FRONT: flat(1), WRIST: flat(2)}})
    film.attention = {0: np.full(shape, np.nan)}
    picture = compose(film, 0, "move the very long thing " * 9, "title", False)
    assert (picture[:SIDE, :SIDE] == 1).all()


def test_a_film_plays_in_real_time_and_is_whole_or_not_there(tmp_path):
    film = Film(4, {}, {s: {FRONT: flat(20 * s), WRIST: flat(0)} for s in (0, 4, 8, 9)})
    path = tmp_path / "videos" / f"{film_name('step_1', 'drop:1', 'libero_goal', 2, 7, True)}.mp4"
    save_film(path, film, "do it", "E2", True)
    assert path.name == "step_1-drop1-libero_goal-task2-init7-success.mp4"
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.with_suffix(".png").name]
    with av.open(str(path)) as container:
        pictures = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert container.streams.video[0].average_rate == Fraction(20, 4)
    assert len(pictures) == 4 + 5
    front = [picture[64:192, 64:192].mean() for picture in pictures[:4]]
    assert np.abs(np.array(front) - [0, 80, 160, 180]).max() < 6


def test_an_encoder_that_fails_leaves_no_film(tmp_path):
    with pytest.raises((ValueError, av.error.FFmpegError)):
        write_video(tmp_path / "odd.mp4", [flat(0, 33)], Fraction(10))
