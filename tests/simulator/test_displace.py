"""Where a displaced object may lie."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simulator.displace import CLEARANCE, free_position


@given(st.integers(0, 10**6), st.floats(0.01, 0.1), st.integers(0, 6))
def test_a_displaced_object_is_free_and_near_or_stays(seed, displace, count):
    generator = np.random.default_rng(seed)
    shipped, others = np.zeros(2), generator.uniform(-0.3, 0.3, (count, 2))
    place = free_position(shipped, others, displace, generator)
    assert np.abs(place).max() <= displace
    moved = bool(np.any(place != shipped))
    assert not moved or all(np.linalg.norm(others - place, axis=1) > CLEARANCE)


def test_an_object_with_no_free_place_keeps_the_shipped_one():
    generator = np.random.default_rng(0)
    shipped = np.array([0.1, 0.2])
    assert np.array_equal(free_position(shipped, shipped[None], 0.02, generator), shipped)
    assert np.array_equal(free_position(shipped, np.zeros((0, 2)), 0.02, generator, lambda _: False), shipped)
