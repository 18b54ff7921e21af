"""A sample's number decides all that is random about it; partners come from other episodes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from test_data import write_task
from tiny import STATS

from data import HELD_OUT, Source, held_out, partner_rows, saved_partners
from files import Refused
from latents.world import latents_of
from prophet import NEEDS
from readers.load import load
from smolvla.checkpoint import fresh_processor

OWN = {"prophet", "mean", "z_first"}  # of the arm and of rollouts, not of data
NEEDED = tuple({name for names in NEEDS.values() for name in names} - OWN)
LENGTHS = (9, 24, 12, 5)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_task(folder / "soup_demo.hdf5", lengths=LENGTHS, size=32)
    return load(folder)


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_task(folder / "soup_demo.hdf5", lengths=LENGTHS[:2], size=32)
    write_task(folder / "can_demo.hdf5", lengths=LENGTHS[2:], size=32)
    return load(folder)


def source(demos, memory: str = "shuffle", **fields) -> Source:
    arm = tiny.arm(memory)
    processor = fresh_processor(arm.policy.config, STATS, demos.tasks, (3, 32, 32))
    return Source(arm, processor, demos, latents_of(arm.encoder, demos), torch.device("cpu"), 0, **fields)


def dropping(made: Source) -> Source:
    made.arm.config = dataclasses.replace(made.arm.config, memory_dropout=0.5)
    return made


def test_a_partner_is_never_of_the_samples_own_episode_and_any_other_may_be(demos):
    index = np.repeat(np.arange(len(demos)), 20)
    partners = source(demos).partners(index, np.arange(len(index)))
    own, other = demos.episode[index], demos.episode[partners]
    assert (own != other).all()
    assert {(a, b) for a, b in zip(own, other)} == {(a, b) for a in range(4) for b in range(4) if a != b}


def test_one_episode_has_no_partner_and_says_so(demos):
    alone = source(demos, frames=np.arange(LENGTHS[0]))
    with pytest.raises(ValueError, match="--memory shuffle needs demonstrations of at least two episodes"):
        alone.partners(np.arange(2), np.arange(2))


def test_a_samples_tensors_depend_on_its_number_alone(two_tasks):
    needed = (*NEEDED, "dropped")
    made = dropping(source(two_tasks, draws=2))
    index, keys = np.array([3, 40, 11, 20]), np.array([7, 2, 9, 4])
    together, (noise, times) = made.world(index, keys, needed), made.flow(keys)
    assert set(together) == {
        *("z_hist", "z_future", "valid", "early", "z_partner", "z_other", "noise", "dropped")
    }
    for i in range(4):
        alone = dropping(source(two_tasks, draws=2))
        apart = alone.world(index[i : i + 1], keys[i : i + 1], needed)
        assert all(torch.equal(together[name][i : i + 1], apart[name]) for name in together)
        n, t = alone.flow(keys[i : i + 1])
        assert torch.equal(noise[i : i + 1], n) and torch.equal(times[i : i + 1], t)


def test_every_modes_memory_is_the_same_alone_and_in_a_batch(two_tasks):
    made = source(two_tasks, memory="pred")
    index = np.arange(5) * 7
    world = made.world(index, index, NEEDED)
    world["z_first"] = world["z_hist"]
    like = torch.zeros(5, tiny.LATENT)
    for mode in NEEDS:
        together = made.arm.memory(mode, like, world)
        if together is None:
            continue
        for i in range(5):
            apart = made.arm.memory(mode, like[:1], {k: v[i : i + 1] for k, v in world.items()})
            torch.testing.assert_close(together.rows[i : i + 1], apart.rows, atol=1e-6, rtol=1e-6)


def test_streams_do_not_share_their_noise(demos):
    keys = np.arange(3)
    a, b = (source(demos, stream=stream).flow(keys)[0] for stream in (0, HELD_OUT))
    assert not torch.equal(a, b)


def test_an_epoch_of_training_frames_has_each_of_them_once_and_no_held_out_one(demos):
    out = held_out(demos, 0.25)
    frames = np.flatnonzero(~np.isin(demos.episode, out))
    made = source(demos, memory="off", frames=frames)
    seen = []
    made.observe = lambda index: seen.extend(index) or {}
    made.batch(np.arange(len(frames)))
    assert sorted(seen) == frames.tolist()
    assert len(out) == 1 and not np.isin(demos.episode[seen], out).any()


def test_held_out_episodes_are_the_same_for_everyone_and_never_all(demos):
    assert np.array_equal(held_out(demos, 0.5), held_out(demos, 0.5))
    for share in (0.0, 0.1, 1.0):
        with pytest.raises(ValueError, match=f"--val-share {share} of 4 episodes"):
            held_out(demos, share)


def test_saved_pasts_are_histories_of_training_frames(demos):
    z, frames = torch.randn(len(demos), 3), np.arange(9, 33)
    saved, at = saved_partners(demos, z, history=2, stride=1, frames=frames)
    assert saved.shape == (24, 2, 3) and at.shape == (24, 3)
    assert torch.equal(saved[0], z[[9, 9]]) and torch.equal(saved[-1], z[[31, 32]])
    assert torch.equal(at[:, 1] + torch.from_numpy(demos.first)[at[:, 0]], torch.from_numpy(frames))


def test_a_rollouts_partner_stays_one_episode_at_the_rollouts_step_and_may_be_of_another_task(two_tasks):
    _, at = saved_partners(two_tasks, torch.randn(len(two_tasks), 3), 2, 1, np.arange(len(two_tasks)))
    rows = [partner_rows(at, (0, 1, 7), seed=7, step=step) for step in range(60)]
    assert len(at[rows, 0].unique()) == 1
    last = int(at[at[:, 0] == at[rows[0], 0], 1].max())
    assert at[rows, 1].tolist() == [min(step, last) for step in range(60)]
    episodes = {int(at[partner_rows(at, (0, 1, start), 7, 0), 0]) for start in range(40)}
    assert len(episodes) > 1
    for text in two_tasks.tasks:
        other = partner_rows(at, (0, 1, 7), 7, 3, instruction=text.upper())
        assert two_tasks.tasks[two_tasks.task[two_tasks.first[at[other, 0]]]] != text
    one = at[at[:, 2] == at[0, 2]]
    with pytest.raises(Refused, match="--memory wrong_task: this arm was trained on one task alone"):
        partner_rows(one, (0,), 7, 0, two_tasks.tasks[two_tasks.task[two_tasks.first[one[0, 0]]]])
