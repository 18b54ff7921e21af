"""What power.py promises: its formulas against simulated episodes, its searches against their definition."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import nct, t, ttest_1samp

from report import power
from report.power import Design, main, t_power

ROOT = Path(__file__).resolve().parents[2]


def simulated_power(seeds: int, episodes: int, d: float, psi: float, tau: float, alpha: float) -> float:
    """Draw seeds, then each seed's pairs, and test the seeds' differences by scipy's t test, 4,000 times."""
    rng = np.random.default_rng(0)
    difference = np.clip(d + rng.normal(0, tau, (4000, seeds)), -psi, psi)
    wins = rng.binomial(episodes, (psi + difference) / 2)
    losses = rng.binomial(episodes - wins, (psi - difference) / 2 / (1 - (psi + difference) / 2))
    return float((ttest_1samp((wins - losses) / episodes, 0, axis=1).pvalue <= alpha).mean())


@pytest.mark.filterwarnings("ignore:Precision loss")  # seeds that happen to be alike
@pytest.mark.parametrize(
    ("seeds", "episodes", "d", "psi", "tau", "alpha"),
    [(3, 200, 0.12, 0.25, 0.03, 0.05), (5, 100, 0.08, 0.3, 0.0, 0.05), (8, 400, 0.06, 0.3, 0.05, 0.01)],
)
def test_power_over_seeds_is_that_of_simulated_episodes(seeds, episodes, d, psi, tau, alpha):
    found = Design(psi, tau, alpha, 0.8).over(d, episodes, seeds)
    assert 0.2 < found < 0.95  # where a wrong formula would show
    assert found == pytest.approx(simulated_power(seeds, episodes, d, psi, tau, alpha), abs=0.03)


@pytest.mark.parametrize("freedom", [1, 2, 4, 30])
def test_power_of_t_is_scipys_where_that_is_a_number_and_never_falls(freedom):
    shifts = [0, 0.5, 1, 2, 4, 8, 50, 500]
    powers = [t_power(shift, freedom, 0.05) for shift in shifts]
    critical = t.isf(0.025, freedom)
    for shift, found in zip(shifts[:5], powers, strict=False):
        exact = nct.sf(critical, freedom, shift) + nct.cdf(-critical, freedom, shift)
        assert found == pytest.approx(exact, abs=2e-4)
    assert powers == sorted(powers) and powers[-1] == pytest.approx(1, abs=1e-3)


def test_what_is_detected_and_needed_is_where_the_power_crosses():
    design = Design(0.2, 0.02, 0.05, 0.8)
    d = design.detects(300, 4)
    assert design.over(d - 1e-4, 300, 4) < 0.8 <= design.over(d, 300, 4)
    n = design.episodes_needed(0.08, 4)
    assert design.over(0.08, n - 1, 4) < 0.8 <= design.over(0.08, n, 4)
    seeds = design.seeds_needed(0.05, 300)
    assert design.over(0.05, 300, seeds - 1) < 0.8 <= design.over(0.05, 300, seeds)


def test_difference_above_the_discordance_brings_its_own_disagreements():
    design, alike = Design(0.02, 0.02, 0.05, 0.8), Design(0.3, 0.02, 0.05, 0.8)
    assert design.over(0.3, 40, 4) == alike.over(0.3, 40, 4)


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_seeds_than_a_verdict_needs_find_nothing(seeds):
    design = Design(0.2, 0.02, 0.05, 0.8)
    assert design.detects(10_000, seeds) is None and design.episodes_needed(0.5, seeds) is None
    assert design.seeds_needed(0.5, 10_000) == 3


def test_no_number_of_episodes_makes_up_for_seeds_that_differ():
    design = Design(0.2, 0.10, 0.05, 0.8)
    assert design.episodes_needed(0.1, 3) is None
    assert design.seeds_needed(0.1, 500) > 3
    assert Design(0.2, None, 0.05, 0.8).seeds_needed(0.1, 500) is None  # nothing is known of seeds
    assert design.detects(500, 3) > design.detects(500, 10) > design.detects(2000, 10)


# ---- text


def test_plan_says_what_the_design_says(capsys):
    main(
        [
            "--episodes",
            "500",
            "--seeds",
            "4",
            "--discordance",
            "0.15",
            "--seed-sd",
            "0.02",
            "--effect",
            "8",
            "30",
        ]
    )
    text = capsys.readouterr().out
    design = Design(0.15, 0.02, 0.05, 0.8)
    (row,) = [line.split() for line in text.splitlines() if line.startswith("   500 (50)")]
    assert row[2:] == [power.points(design.detects(500, seeds)) for seeds in (3, 4, 5, 7, 10)]
    (needed,) = [line.split() for line in text.splitlines() if line.startswith("     8")]
    assert needed[1] == str(design.episodes_needed(0.08, 4))
    assert needed[-1] == str(design.seeds_needed(0.08, 500))
    (beyond,) = [line.split() for line in text.splitlines() if line.startswith("    30")]
    assert beyond == ["30", "-", "-"]  # 80 % and 30 points are more than all
    assert max(map(len, text.splitlines())) <= 100


def test_more_contrasts_find_less(capsys):
    main(["--effect", "10"])
    main(["--effect", "10", "--contrasts", "20"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    10")]
    one, twenty = (int(row[-1].replace(",", "")) for row in rows)
    assert twenty > 1.5 * one


def write_run(root: Path, arm: str, seed: int, successes: list[int], **config) -> None:
    """Write a run folder whose episodes are of two tasks, half each."""
    folder = root / f"{arm}-s{seed}"
    folder.mkdir(parents=True)
    facts = {"arm": arm, "seed": seed, "total_samples": 640, "fusion": ["none"], "memory": "off"}
    (folder / "config.json").write_text(json.dumps(facts | config))
    shared = {"suite": "goal", "steps": 9, "memory": "off", "checkpoint": "step_10", "protocol": {}}
    keys = [{"task_id": i % 2, "init_state": i // 2} for i in range(len(successes))]
    rows = [key | {"success": bool(x)} | shared for key, x in zip(keys, successes)]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_show_their_pairs_discordance_and_spread(tmp_path, capsys):
    rng, shares = np.random.default_rng(0), (0.8, 0.6, 0.7)
    differences, chance, disagree = [], [], []
    for seed, share in enumerate(shares):
        a, b = (rng.random(60) < share).astype(int), (rng.random(60) < 0.4).astype(int)
        write_run(tmp_path, "E1", seed, a, compared_with=["E0"])
        write_run(tmp_path, "E0", seed, b)
        differences.append((a - b).mean())
        chance.append((a - b).var() / 60)
        disagree.append((a != b).mean())
    main([str(tmp_path), "--effect", "10"])
    text = capsys.readouterr().out
    spread = np.std(differences, ddof=1)
    tau = max(0, spread**2 - np.mean(chance)) ** 0.5
    design = Design(np.mean(disagree), tau, 0.05, 0.8)
    seen = [
        np.mean(differences),
        np.mean(disagree),
        spread,
        tau,
        design.detects(60, 3),
    ]
    row, needed = (line.split() for line in text.splitlines() if line.startswith("E1 - E0"))
    assert row[3:6] == ["3", "60", "(30)"]
    assert row[6:] == [power.points(seen[0], "+"), *map(power.points, seen[1:])]
    assert needed[-1] == power.many(design.seeds_needed(0.1, 60))
    assert max(map(len, text.splitlines())) <= 100
    main([str(tmp_path), "--effect", "10", "--seed-sd", "0.2"])
    assert "Beyond episodes: --seed-sd 0.2, not what is seen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base", "1.2"], "--base 1.2 must lie between 0 and 1"),
        (["--discordance", "0.5"], "at most 0.40"),
        (["--episodes", "0"], "--episodes 0 must be at least 1"),
        (["--seed-sd", "3"], "3 points are 0.03"),
        (["--effect", "0"], "--effect 0.0 must be above 0"),
        (["--contrasts", "0"], "--contrasts 0 must be at least 1"),
        (["--alpha", "0.9"], "--power 0.8 must be above --alpha 0.9"),
        (["somewhere", "--seeds", "3"], "--seeds 3 is for a plan"),
    ],
)
def test_bad_values_are_named(flags, message):
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code.startswith("error: ") and message in exit.value.code


def test_runs_without_episodes_are_refused_in_a_line(tmp_path):
    write_run(tmp_path, "E0", 0, [])
    command = [sys.executable, "-m", "report", "power", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no episodes in these runs")


@pytest.mark.parametrize("name", ["power", "watch"])
def test_help_says_what_to_type(name):
    done = subprocess.run([sys.executable, "-m", "report", name, "--help"], capture_output=True, text=True)
    assert f"usage: python -m report {name}" in done.stdout and f"python {name}.py" not in done.stdout
