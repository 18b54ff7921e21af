"""Sentences, signals and variances of made-up runs whose answers are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from study import offline_line, write_lines

from report import findings, reading, stats, tables

STARTS = 40


def write(
    root: Path, arm: str, solved: dict[str, list[int]], metrics: list[list[dict]] | None = None, **config
):
    """Write a run a seed; solved: memory mode -> starts solved under each seed, the first its own mode."""
    own = next(iter(solved))
    for seed in range(len(solved[own])):
        folder = root / f"{arm}-s{seed}"
        folder.mkdir(parents=True)
        facts = {"arm": arm, "seed": seed, "total_samples": 1000, "memory": own, "fusion": ["late"]} | config
        (folder / "config.json").write_text(json.dumps(facts))
        shared = {
            "suite": "goal",
            "task_id": 0,
            "crash": None,
            "steps": 9,
            "checkpoint": "step_10",
            "protocol": {},
        }
        lines = [
            shared | {"memory": mode, "init_state": i, "success": i < counts[seed]}
            for mode, counts in solved.items()
            for i in range(STARTS)
        ]
        write_lines(folder / "episodes.jsonl", lines)
        if metrics:
            write_lines(folder / "metrics.jsonl", metrics[seed])


def judged(root: Path) -> tuple[dict, dict]:
    """Return (arm, sentence) -> answer and (arm, signal) -> finding."""
    panel, aside = reading.load_runs((root,))
    assert not aside
    contrasts = stats.all_contrasts(panel)
    said = {(f.arm, f.what.partition(",")[0]): f.answer for f in findings.sentences(panel, contrasts)}
    return said, {(f.arm, f.what): f for f in findings.signals(panel, contrasts)}


def write_controls(root: Path, **changes: list[int]) -> None:
    """Write E2 at about 35 of 40 and its controls at about 10, but for those in `changes`."""
    low = [11, 10, 10, 9, 12]
    own = {"pred": [35, 36, 35, 34, 36], "shuffle": [12] * 5, "zero": [8] * 5}
    own["random"] = [34, 37, 35, 36, 33]
    write(root, "E2", own, lambda_world=0.2)
    write(root, "E0", {"off": changes.get("E0", low)}, fusion=["none"])
    write(root, "E2n", {"pred": changes.get("E2n", low)}, lambda_world=0)
    for arm, mode in {"E1s": "shuffle", "E2c": "current", "E2h": "history"}.items():
        if changes.get(arm) != []:
            write(root, arm, {mode: changes.get(arm, low)})


SENTENCES = ("memory helps", "prediction helps", "the policy depends on it")


@pytest.mark.parametrize(
    ("changes", "answers"),
    [
        ({}, ("shown", "shown", "shown")),
        ({"E2n": [35, 33, 36, 36, 35]}, ("shown", "not shown", "shown")),
        ({"E2n": [40, 40, 40, 40, 39]}, ("shown", "not so", "shown")),
        ({"E1s": [35, 33, 36, 36, 35]}, ("not shown", "not shown", "shown")),
        ({"E2h": []}, ("shown", "cannot be told", "shown")),
        (
            {"E0": [5, 6, 5, 4, 6]},
            ("cannot be told", "cannot be told", "shown"),
        ),  # every seed 30 above: no spread
    ],
)
def test_a_sentence_is_shown_where_each_of_its_contrasts_is(tmp_path, changes, answers):
    write_controls(tmp_path, **changes)
    said, _ = judged(tmp_path)
    assert tuple(said["E2", what] for what in SENTENCES) == answers and len(said) == 3


def test_two_seeds_tell_nothing_of_arms_but_of_what_each_checkpoint_depends_on(tmp_path):
    write(tmp_path, "E2", {"pred": [35, 36], "shuffle": [12, 36]}, lambda_world=0.2)
    write(tmp_path, "E0", {"off": [10, 11]}, fusion=["none"])
    write(tmp_path, "E1s", {"shuffle": [10, 11]})
    said, found = judged(tmp_path)
    assert said["E2", "memory helps"] == "cannot be told"
    assert said["E2", "the policy depends on it"] == "not shown"  # of seed 0's it is, of seed 1's not
    assert (
        found["E2", "above E0"].answer == "cannot be told" and found["E2", "above E0"].number == "+62 points"
    )


def test_signals_of_success_have_their_number_and_answer(tmp_path):
    write_controls(tmp_path)
    _, found = judged(tmp_path)
    assert found["E2", "above E0"].answer == "yes" and found["E2", "above E0"].number.startswith("+62 (")
    zero, random = (found["E2", f"{mode} at rollout lowers success"] for mode in ("zero", "random"))
    assert zero.answer == "yes" and zero.number == "own minus zero: +68 (+65 to +70) points"
    assert random.answer == "cannot be told" and random.number == "own minus random: +0 (-5 to +8) points"


def test_held_out_losses_are_means_over_seeds_and_of_one_seed_have_the_bootstraps_interval(tmp_path):
    write(tmp_path, "E2", {"pred": [1, 2, 3]})
    for seed, more in enumerate((0, 0.01, 0.03)):
        line = offline_line() | {"checkpoint": "step_10"}
        line["modes"]["pred"]["loss"] += more
        write_lines(tmp_path / f"E2-s{seed}" / "offline.jsonl", [line])
    runs, _ = reading.load_runs([tmp_path])
    found = {m.mode: m for m in reading.held_out(runs)}
    losses = 0.33 + np.array([0, 0.01, 0.03])
    interval = ttest_1samp(losses, 0).confidence_interval(0.95)
    assert found["pred"].seeds == (0, 1, 2) and found["pred"].losses == pytest.approx(losses)
    assert found["pred"].interval("losses") == pytest.approx(tuple(interval))
    assert not len(found["off"].from_off)
    [row] = [row for row in tables.offline_table([*found.values()]).rows if row[4] == "pred"]
    assert row[5] == f"{losses.mean():.4f} ({interval.low:.4f} to {interval.high:.4f})"
    assert tables.loss_table(runs).rows == [("E2", "demo", "0.3700", "0.3400", "0.3433", "0.3800")]
    alone = {m.mode: m for m in reading.held_out(runs[:1])}
    assert tuple(alone["pred"].interval("from_off")) == pytest.approx((-0.06, -0.02))
    assert math.isnan({m.mode: m for m in reading.held_out(runs[:2])}["pred"].interval("losses")[0])


def gate_log(opens: float, site: str = "late") -> list[dict]:
    """Return a log whose ctx_norm/act_norm rises evenly and passes 1 % after `opens` samples."""
    rows = [{"samples": 100 * i, f"{site}/act_norm": 5.0} for i in range(1, 11)]
    return [
        r | {f"{site}/ctx_norm": 0.05 * r["samples"] / opens, "world_gate": r["samples"] / 1e4} for r in rows
    ]


def test_gates_count_as_open_by_what_they_let_in_and_the_earlier_is_told_over_seeds(tmp_path):
    late, early = [gate_log(x) for x in (650, 750, 650)], [gate_log(x, "suffix_in") for x in (250, 150, 250)]
    write(tmp_path, "E2", {"pred": [9, 9, 9]}, late)
    write(tmp_path, "F2", {"pred": [9, 9, 9]}, early, fusion=["suffix_in"])
    write(tmp_path, "F3b", {"pred": [9, 9, 9]}, [gate_log(5000, "prefix_cross")] * 3, fusion=["prefix_cross"])
    _, found = judged(tmp_path)
    gate = found["E2", "gate away from 0"]
    assert gate.answer == "yes" and "world_gate +0.100" in gate.number
    assert found["F3b", "gate away from 0"].answer == "no"
    opening = found["F2", "gate opens earlier than F1's"]
    assert opening.number == "samples: 300, 200, 300; E2 (F1): 700, 800, 700" and opening.answer == "yes"


def test_a_gate_that_never_opens_is_later_and_two_seeds_tell_nothing(tmp_path):
    write(tmp_path, "E2", {"pred": [9, 9]}, [gate_log(1e6), gate_log(700)])
    write(tmp_path, "F2", {"pred": [9, 9]}, [gate_log(250, "suffix_in")] * 2, fusion=["suffix_in"])
    _, found = judged(tmp_path)
    opening = found["F2", "gate opens earlier than F1's"]
    assert opening.number == "samples: 300, 300; E2 (F1): never, 800" and opening.answer == "cannot be told"
    assert found["E2", "gate away from 0"].answer == "cannot be told"  # open in one of two


def test_attention_is_spiky_above_that_over_hypotheses_that_are_alike(tmp_path):
    log = lambda first, last: [{"samples": i, "late/spike": x} for i, x in ((1, first), (2, last))]  # noqa: E731
    spiky = [log(0.1, x) for x in (0.4, 0.5, 0.45)]
    write(tmp_path, "B4mixture", {"pred": [30, 31, 32]}, spiky, num_hypotheses=4)
    write(tmp_path, "B4min", {"pred": [9, 9, 9]}, [log(0.1, x) for x in (0.1, 0.12, 0.09)], num_hypotheses=4)
    write(tmp_path, "B4dup", {"pred": [10, 10, 11]}, [log(0.1, 0.1)] * 3, num_hypotheses=4)
    alike = {"num_hypotheses": 4, "hypotheses_alike": True, "compared_with": ["B4dup"]}
    write(tmp_path, "mine", {"pred": [10, 10, 11]}, [log(0.1, 0.1)] * 3, **alike)
    write(tmp_path, "E2", {"pred": [10, 12, 12]})
    said, found = judged(tmp_path)
    names = ("attention over hypotheses spikier than chance", "and growing", "above E2")
    assert [found["B4mixture", name].answer for name in names[:2]] == ["yes", "yes"]
    assert [found["B4min", name].answer for name in names[:2]] == ["cannot be told"] * 2
    assert found["B4mixture", "above E2"].number.startswith("+49 (")
    assert said["B4mixture", "several futures help"] == "shown"
    assert ("B4dup", "several futures help") not in said and ("mine", "several futures help") not in said


def test_a_bank_is_compared_on_tasks_with_two_right_answers_and_on_the_others(tmp_path):
    for arm, plain, ambiguous in (("B4min", 10, 30), ("E2", 10, 10)):
        write(tmp_path, arm, {"pred": [plain] * 3}, num_hypotheses=4 if arm == "B4min" else 1)
        for seed in range(3):
            path = tmp_path / f"{arm}-s{seed}" / "episodes.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            other = {"suite": "object", "protocol": {"either": "milk,cream_cheese"}}
            more = [
                line | other | {"success": line["init_state"] < ambiguous + seed * (arm == "E2")}
                for line in lines
            ]
            write_lines(path, lines + more)
    _, found = judged(tmp_path)
    signal = found["B4min", "above E2 most on the ambiguous task"]
    assert signal.number == "+48 (+45 to +50) there, +0 (+0 to +0) elsewhere" and signal.answer == "yes"


def test_success_by_what_was_taken_is_a_table_of_ambiguous_tasks_alone(tmp_path):
    write(tmp_path, "E2", {"pred": [10], "off": [0]})
    panel, _ = reading.load_runs((tmp_path,))
    assert tables.taken_table(panel) is None
    path = tmp_path / "E2-s0" / "episodes.jsonl"
    went = {0: None, 1: "milk", 2: "cream_cheese"}
    lines = [
        line | {"protocol": {"either": "milk,cream_cheese"}, "taken": went[line["init_state"] % 3]}
        for line in map(json.loads, path.read_text().splitlines())
        if line["init_state"] < 12
    ]
    write_lines(path, lines)
    table = tables.taken_table(reading.load_runs((tmp_path,))[0])
    assert table.header == ("arm", "memory at rollout", "cream_cheese", "milk", "nothing")
    assert [[cell.partition(" ")[0] for cell in row] for row in table.rows] == [
        ["E2", "pred", "3/4", "3/4", "4/4"],
        ["E2", "off", "0/4", "0/4", "0/4"],
    ]


def test_variances_are_of_arms_and_of_differences_over_seeds(tmp_path):
    write_controls(tmp_path)
    panel, _ = reading.load_runs((tmp_path,))
    found = findings.partitions(panel, stats.all_contrasts(panel))
    assert [what for what, *_ in found[:2]] == ["E0", "E1s"] and "E2 - E2n" in [what for what, *_ in found]
    won = np.array([[i < k for i in range(STARTS)] for k in (11, 10, 10, 9, 12)], float)
    assert found[0][1:3] == (5, STARTS) and found[0][3] == pytest.approx(stats.partition(won))
    rows = [row for row in tables.result_rows(panel, [], {}, found) if row.get("kind") == "variance"]
    assert [(row["arm"], row["what"]) for row in rows[:3]] == [("E0", x) for x in ("seed", "start", "rest")]
    assert float(rows[1]["number"]) == pytest.approx(found[0][3][1], abs=1e-6)
