"""The synthetic world is what it claims to be, and each check of the instrument can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import control
from bench.control import BRANCHES, HELD_OUT, TRAIN, Check, ControlConfig, draw
from prophet import Imagined, Prophet

ROOT = Path(__file__).resolve().parents[2]


class Perfect(nn.Module):
    """A prophet that knows the world: one hypothesis a branch, in order, from the present alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.axes = control.directions(seed)

    def forward(self, z_hist: Tensor, chance: Tensor | None = None) -> Imagined:
        blocks, branches, readout = self.axes
        found = torch.einsum("bd,rqd->brq", z_hist[:, -1], blocks)
        reached = control.APART * branches + found @ readout  # (B, R, D)
        ahead = torch.arange(1, control.FUTURE + 1) / control.FUTURE
        return Imagined(ahead[:, None] * reached[:, :, None])  # (B, R, K, D)

    learned = Prophet.learned


@pytest.fixture(scope="module")
def held() -> control.Samples:
    return draw(0, HELD_OUT, 2048)


@pytest.fixture(scope="module")
def reader(held):
    """A policy that has learned to attend to the hypothesis that the cue names."""
    samples = draw(0, TRAIN, 4096)
    arm = control.make_bank(samples, 0, BRANCHES, "softmin")
    arm.prophet = Perfect(0)
    return control.train(arm, samples, 200, 0)


def split(samples: control.Samples) -> tuple[control.Samples, control.Samples]:
    return samples.take(samples.cued), samples.take(~samples.cued)


def verdicts(arm, samples: control.Samples) -> list[bool]:
    cued, blind = split(samples)
    shares = (control.choose_best(arm, part, 0) for part in (cued, blind))
    return [check.passed for check in control.check_choice(*shares, len(blind.branch))]


# ---- the world ----------------------------------------------------------------------------------------


def test_half_of_the_samples_have_the_cue_and_branches_are_equally_likely_in_each_half(held):
    assert held.cued.sum() * 2 == len(held.cued)
    for part in split(held):
        assert part.branch.bincount().tolist() == [len(part.branch) // BRANCHES] * BRANCHES
    cued, blind = split(held)
    assert (blind.state[:, 0] == 0).all()
    assert len(cued.state[:, 0].unique()) == BRANCHES
    for r in range(BRANCHES):
        assert len(cued.state[cued.branch == r, 0].unique()) == 1


def test_the_past_does_not_tell_the_branch_and_without_the_cue_the_state_does_not_either(held):
    _, blind = split(held)
    for seen in (held.z_hist.flatten(1), blind.state):
        branch = held.branch if len(seen) == len(held.branch) else blind.branch
        features = torch.cat([seen, seen.square(), torch.ones(len(seen), 1)], dim=1)
        train, test = slice(0, None, 2), slice(1, None, 2)
        weights = torch.linalg.lstsq(features[train], branch[train].float() - 0.5, driver="gelsd").solution
        right = ((features[test] @ weights > 0) == (branch[test] > 0)).float().mean().item()
        assert abs(right - 0.5) < 4 * 0.5 / len(seen[test]) ** 0.5  # four standard errors


def test_the_true_future_is_the_branch_taken_and_branches_part_by_a_known_distance(held):
    rows = torch.arange(len(held.branch))
    world = held.world()
    assert torch.equal(world["z_future"], held.futures[rows, held.branch])
    apart = (held.futures[:, 0] - held.futures[:, 1]).norm(dim=-1)  # (B, K)
    squared = 2 * control.APART**2 + (held.blocks[:, 0] - held.blocks[:, 1]).square().sum(-1)
    ahead = torch.arange(1, control.FUTURE + 1) / control.FUTURE
    torch.testing.assert_close(apart, squared.sqrt()[:, None] * ahead, atol=1e-4, rtol=1e-4)
    assert (apart[:, -1] >= 2**0.5 * control.APART - 1e-4).all()


def test_the_action_can_be_read_off_the_true_future_and_off_no_other(held):
    readout = control.directions(0)[2]
    action = held.inputs()["action"][:, 0]
    read = held.futures[:, :, -1] @ readout.T  # (B, R, q)
    rows = torch.arange(len(held.branch))
    torch.testing.assert_close(read[rows, held.branch], action, atol=1e-4, rtol=1e-4)
    other = read[rows, (held.branch + 1) % BRANCHES]
    correlation = (other * action).mean() / (other.std() * action.std())
    assert correlation.abs() < 0.05
    for seen in (held.state, (held.z_hist[:, :-1] @ readout.T).flatten(1)):
        corner = torch.corrcoef(torch.cat([seen, action], dim=1).T)[: seen.shape[1], seen.shape[1] :]
        assert corner.abs().max() < 0.1


def test_a_seed_decides_the_samples_and_streams_differ():
    a, b, other = draw(3, TRAIN, 64), draw(3, TRAIN, 64), draw(3, HELD_OUT, 64)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a.z_hist, other.z_hist)
    assert not torch.equal(a.z_hist, draw(4, TRAIN, 64).z_hist)
    assert not torch.equal(control.directions(3)[2], control.directions(4)[2])


# ---- checks can fail ----------------------------------------------------------------------------------


def test_an_untrained_prophet_covers_nothing_and_is_no_average(held):
    bank = control.make_bank(held, 0, 2 * BRANCHES, "softmin")
    assert [c.passed for c in control.check_bank("bank", bank, held)] == [False, False, None, None]
    assert control.check_single(control.make_bank(held, 0, 1, "single"), held)[1].passed is False


def test_a_perfect_prophet_covers_and_one_that_knows_a_single_branch_does_not(held):
    bank = control.make_bank(held, 0, BRANCHES, "softmin")
    bank.prophet = Perfect(0)
    assert [c.passed for c in control.check_bank("bank", bank, held)][:2] == [True, True]
    assert control.dead_share(control.imagined(bank, held), held) == 0
    assert control.check_single(bank, held)[0].passed is False
    perfect = bank.prophet.forward
    bank.prophet.forward = lambda *args: Imagined(perfect(*args).y[:, :1].expand(-1, BRANCHES, -1, -1))
    assert [c.passed for c in control.check_bank("bank", bank, held)][:2] == [False, False]
    assert control.dead_share(control.imagined(bank, held), held) == 1 - 1 / BRANCHES


@pytest.mark.slow
def test_attention_follows_the_cue_and_scrambled_it_is_at_chance(reader, held):
    assert verdicts(reader, held) == [True, True]
    cued, _ = split(held)
    assert control.choose_best(reader, cued, 0) > 0.9
    reversed_cue = cued._replace(state=-cued.state)
    assert control.choose_best(reader, reversed_cue, 0) < 0.1
    stale = cued._replace(state=cued.state[torch.randperm(len(cued.state), generator=torch.Generator())])
    assert abs(control.choose_best(reader, stale, 0) - 1 / BRANCHES) < 0.06
    query = reader.policy.fusion.sites["late"].q_proj
    kept = [p.detach().clone() for p in query.parameters()]
    with torch.no_grad():
        for p in query.parameters():
            p.zero_()  # attention no longer depends on what the policy sees
        scrambled = verdicts(reader, held)
        for p, value in zip(query.parameters(), kept):
            p.copy_(value)
    assert scrambled == [False, True]


def test_attention_that_knows_the_branch_without_a_cue_is_reported(reader, held):
    _, blind = split(held)
    peeking = blind._replace(state=blind.state.clone())
    peeking.state[:, 0] = blind.branch * 2.0 - 1
    shares = control.choose_best(reader, split(held)[0], 0), control.choose_best(reader, peeking, 0)
    assert [c.passed for c in control.check_choice(*shares, len(blind.branch))] == [True, False]


def test_an_effect_fails_the_negative_control_and_none_fails_the_positive():
    off = torch.rand(500, generator=torch.Generator().manual_seed(0)) + 1
    assert control.check_random(off, off, 0).passed and not control.check_random(0.8 * off, off, 0).passed
    assert control.check_random(1.2 * off, off, 0).passed  # worse is not better
    assert control.check_memory("oracle", 0.2 * off, off).passed
    assert not control.check_memory("oracle", off, off).passed


def test_a_failed_check_makes_the_exit_code_1_and_one_that_is_only_shown_does_not():
    good, bad, shown = (Check(name, 0.5, "< 1", passed) for name, passed in zip("abc", (True, False, None)))
    table, code = control.report([good, shown])
    assert code == 0 and "all 1 checks passed" in table
    table, code = control.report([good, bad, shown])
    assert code == 1 and "1 of 2 checks FAILED" in table
    assert [line.split()[-1] for line in table.splitlines()[1:4]] == ["pass", "FAIL", "-"]


# ---- the program --------------------------------------------------------------------------------------


def test_a_quick_run_trains_too_little_and_says_so(tmp_path, capsys):
    assert control.main(["--out", str(tmp_path), "--quick"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert (tmp_path / "control.png").stat().st_size > 10_000


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="--steps 0 must be at least 1"):
        ControlConfig(steps=0)


@pytest.mark.slow
def test_the_instrument_passes_its_own_control(tmp_path):
    command = [sys.executable, "-m", "bench", "control", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "control.png").is_file()
