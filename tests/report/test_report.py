"""The report on synthetic run folders: what is read, what is refused, what the tables and sentences say."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from files import Refused
from report import __main__ as report
from report import reading, stats, tables

ROOT = Path(__file__).resolve().parents[2]


def write_run(root: Path, arm: str, results: dict, seed: int = 0, **config) -> Path:
    """Write a run folder; `results` maps memory mode -> 1, 0 or "crash" for each init state of task 1."""
    folder = root / f"{arm}_s{seed}"
    folder.mkdir(parents=True)
    defaults = {"fusion": ["none"], "memory": "pred", "blind": False, "data_fingerprint": "abc"}
    defaults |= {"total_samples": 6400, "params_total": 2000, "params_trainable": 1500}
    (folder / "config.json").write_text(json.dumps(defaults | {"arm": arm, "seed": seed} | config))
    lines = [
        {"samples": 64 * i, "loss": 1 / i, "action_loss": 0.5 / i, "world_gate": i / 99} for i in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [episode(mode, i, r) for mode, outcomes in results.items() for i, r in enumerate(outcomes)]
    write_episodes(folder, rows)
    return folder


def episode(mode: str, init_state: int, result: int | str, **changes) -> dict:
    crashed = result == "crash"
    row = {"suite": "libero_goal", "task_id": 1, "task": "put_the_bowl", "init_state": init_state, "seed": 7}
    row |= {
        "success": None if crashed else bool(result),
        "crash": "died" if crashed else None,
        "memory": mode,
    }
    row |= {
        "steps": 100 + init_state,
        "checkpoint": "step_000100",
        "render_fingerprint": {"front": [init_state]},
    }
    return row | {"protocol": {"max_steps": 300, "versions": {"mujoco": "3.3.2"}}} | changes


def write_episodes(folder: Path, rows: list[dict]) -> None:
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(root: Path) -> list[stats.Run]:
    return reading.load_runs((root,))[0]


def set_aside(root: Path) -> list[str]:
    return [str(each) for each in reading.load_runs((root,))[1]]


def row_of(text: str, *starts: str) -> list[str]:
    """Return the cells of the one table row that begins with these cells."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if tuple(row[: len(starts)]) == starts]
    return row


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four arms, one seed, ten init states; a crash in E2."""
    root = tmp_path / "demo"
    write_run(root, "E0", {"off": [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]})
    write_run(root, "E0b", {"off": [0] * 10}, blind=True)
    write_run(root, "E1", {"zero": [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]}, fusion=["late"], memory="zero")
    results = {"off": [0] * 10, "pred": [1] * 9 + ["crash"], "zero": [0] * 9 + [1]}
    write_run(root, "E2", results, fusion=["late"])
    return root


# ---- reading


def test_repeated_episodes_count_once_and_the_first_counts(tmp_path):
    folder = write_run(tmp_path, "E0", {})
    write_episodes(folder, [episode("off", 0, 1), episode("off", 0, 0), episode("off", 1, 0)])
    (run,) = load(tmp_path)
    assert [e["success"] for e in run.episodes] == [True, False]
    assert run.notes == ("1 recorded twice, the first counts",)


def test_the_newest_checkpoint_is_reported_and_earlier_ones_show_how_success_grew(tmp_path):
    folder = write_run(tmp_path, "E0", {})
    rows = [episode("off", i, n > 200, checkpoint=f"step_{n:06d}") for n in (200, 1000, 600) for i in (0, 1)]
    for row in rows[:2]:
        row["samples"] = 1280
    (folder / "step_000600").mkdir()
    (folder / "step_000600" / "state.json").write_text('{"samples": 3840}')
    write_episodes(folder, rows)
    (run,) = load(tmp_path)
    assert [e["checkpoint"] for e in run.episodes] == ["step_001000"] * 2
    assert [(c.samples, len(c.episodes)) for c in run.earlier] == [(1280, 2), (3840, 2)]
    report.write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert row_of(text, "arm", "1,280") == ["arm", "1,280", "3,840", "6,400"]
    assert row_of(text, "E0", "0/2 (0 to 66)")[2:] == ["2/2 (34 to 100)"] * 2
    assert (tmp_path / "out" / "growth_6400.svg").is_file()
    assert row_of(text, "E0", "no memory")[3] == "2/2"


def test_earlier_checkpoints_of_unknown_age_or_another_protocol_are_left_out(tmp_path):
    folder = write_run(tmp_path, "E0", {})
    other = episode("off", 0, 1)["protocol"] | {"max_steps": 9}
    rows = [episode("off", i, 1, checkpoint="step_000050") for i in range(2)]
    rows += [episode("off", i, 1, checkpoint="step_000060", samples=9, protocol=other) for i in range(2)]
    write_episodes(folder, [*rows, episode("off", 0, 1)])
    (run,) = load(tmp_path)
    assert run.earlier == () and run.budget == 6400
    assert run.notes[0] == "2 of step_000050 left out, its samples are unknown"
    [aside] = set_aside(tmp_path)
    assert "E0_s0/episodes.jsonl, line 3-4: another protocol of libero_goal: max_steps 9, not 300" in aside


def test_half_trained_checkpoint_is_reported_under_the_samples_it_saw(tmp_path):
    folder = write_run(tmp_path, "E0", {"off": [1]})
    (folder / "step_000100").mkdir()
    (folder / "step_000100" / "state.json").write_text('{"samples": 3200}')
    assert load(tmp_path)[0].budget == 3200


def test_a_last_line_that_is_being_written_is_no_fault(tmp_path):
    folder = write_run(tmp_path, "E0", {"off": [1, 0]})
    with (folder / "episodes.jsonl").open("a") as file:
        file.write('{"suite": "libero_g')
    (run,), aside = reading.load_runs((tmp_path,))
    assert len(run.episodes) == 2 and not aside


BROKEN = [
    ("{broken", "not a JSON object"),
    ("[" * 100_000, "nested too deep"),
    ("null", "not an object"),
    ({"success": None}, "success is None without a crash"),
    ({"success": 1}, "success is 1 without a crash"),
    ({"suite": 3}, "suite is 3"),
    ({"protocol": []}, r"protocol is \[\]"),
    ({"checkpoint": "../../x"}, "checkpoint '../../x' is no name"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_line_that_is_no_episode_is_set_aside_with_the_command_that_removes_it(tmp_path, change, message):
    folder = write_run(tmp_path, "E0", {"off": [1, 0, 1]})
    path = folder / "episodes.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = change if isinstance(change, str) else json.dumps(json.loads(lines[1]) | change)
    path.write_text("\n".join(lines) + "\n")
    (run,), (aside,) = reading.load_runs((tmp_path,))
    assert [e["init_state"] for e in run.episodes] == [0, 2]
    assert re.search(rf"line 2: .*{message}", str(aside)) and str(tmp_path) not in aside.name
    subprocess.run(str(aside).rpartition("remove it: ")[2], shell=True, check=True, executable="bash")
    assert set_aside(tmp_path) == [] and len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "text", ["{broken", '{"arm": "E9"}', '{"arm": 3, "seed": 0, "total_samples": 1}', "[]x"]
)
def test_a_run_whose_record_is_broken_is_set_aside_and_the_rest_is_reported(tmp_path, text):
    write_run(tmp_path, "E0", {"off": [1]})
    (write_run(tmp_path, "odd'name\x1b", {"off": [1]}) / "config.json").write_text(text)
    (run,), (aside,) = reading.load_runs((tmp_path,))
    assert run.arm == "E0" and aside.name == "odd'name_s0" and "config.json cannot be used, " in aside.why
    subprocess.run(str(aside).rpartition("remove it: ")[2], shell=True, check=True, executable="bash")
    assert [path.name for path in tmp_path.iterdir()] == ["E0_s0"]


def test_control_characters_in_names_are_left_out_where_they_are_read(tmp_path):
    folder = write_run(tmp_path, "E0", {})
    write_episodes(folder, [episode("off", 0, 1, task="put\x1b[31m the\u202e bowl", suite="li\x07bero")])
    config = json.loads((folder / "config.json").read_text()) | {"arm": "E\x1b[2J0\ud800"}
    (folder / "config.json").write_text(json.dumps(config))
    printed = report.write_report(load(tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "E[2J0" in printed and "put[31m the bowl" in text
    assert all(c.isprintable() or c == "\n" for c in printed + text)


def test_checkpoint_folders_are_not_taken_for_runs(tmp_path):
    folder = write_run(tmp_path, "E0", {"off": [1]})
    for parent in (folder, tmp_path):
        (parent / "step_000100").mkdir()
        (parent / "step_000100" / "config.json").write_text('{"type": "smolvla"}')
    assert [name for name, _ in reading.find_runs((tmp_path, folder))] == ["E0_s0"]


def test_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(Refused, match="no run folder"):
        reading.find_runs((tmp_path,))
    with pytest.raises(Refused, match="is not a folder"):
        reading.find_runs((tmp_path / "absent",))


# ---- what may stand in one table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_fingerprint": "xyz"}, 'data fingerprint is "xyz", not "abc" as in most runs here'),
        ({"arm": "E0", "seed": 0}, "arm E0, seed 0 is there twice, E0_s0 has no fewer episodes"),
        (
            {"arm": "E0", "seed": 2, "fusion": ["late"]},
            "arm E0 is late, trained with pred, not no memory as in",
        ),
        ({"arm": "E0", "seed": 2, "params_total": 9}, "size of arm E0 is (9, 1500), not (2000, 1500) as in"),
    ],
)
def test_a_run_that_does_not_belong_is_set_aside_and_most_stay(tmp_path, changes, message):
    write_run(tmp_path, "A1", {"off": [1]})
    config = tmp_path / "A1_s0" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    for seed in (0, 1):
        write_run(tmp_path, "E0", {"off": [1, 1]}, seed)
    runs, (aside,) = reading.load_runs((tmp_path,))
    assert [run.name for run in runs] == ["E0_s0", "E0_s1"]
    assert aside.name == "A1_s0" and message in str(aside) and f"rm -r {tmp_path}/A1_s0" in str(aside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"protocol": {"max_steps": 300, "versions": {"mujoco": "3.9.0"}}},
            "versions.mujoco '3.9.0', not '3.3.2'",
        ),
        ({"protocol": {"max_steps": 220, "versions": {"mujoco": "3.3.2"}}}, "max_steps 220, not 300"),
        ({"seed": 8}, "eval_seed 8, not 7"),
    ],
)
def test_episodes_of_another_protocol_are_set_aside_within_a_suite_only(tmp_path, change, message):
    write_run(tmp_path, "E0", {"off": [1, 1, 1]})
    folder = write_run(tmp_path, "E1", {})
    write_episodes(folder, [episode("off", 0, 1, suite="libero_10") | change])
    assert set_aside(tmp_path) == []
    stray = [episode("off", i, 1) | change for i in (1, 2)]
    write_episodes(folder, [stray[0], episode("off", 0, 1), stray[1]])
    runs, (aside,) = reading.load_runs((tmp_path,))
    assert [len(run.episodes) for run in runs] == [3, 1]
    assert f"E1_s0/episodes.jsonl, line 1, 3: another protocol of libero_goal: {message}" in str(aside)
    report.write_report(runs, tmp_path / "out", aside=[aside])
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"Set aside: {aside.name} ({aside.why})" in text and str(tmp_path) not in text


def test_a_stray_evaluations_own_file_is_set_aside_whichever_came_first(tmp_path):
    write_run(tmp_path, "E0", {"off": [1, 1, 1]})
    folder = write_run(tmp_path, "E1", {})
    stray = [
        episode("off", i, 1, protocol=episode("off", i, 1)["protocol"] | {"max_steps": 9}) for i in (1, 2)
    ]
    for names in (
        ("episodes.jsonl", "episodes.0a1b2c3d.jsonl"),
        ("episodes.0a1b2c3d.jsonl", "episodes.jsonl"),
    ):
        for name, rows in zip(names, ([episode("off", 0, 0)], stray)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs, (aside,) = reading.load_runs((tmp_path,))
        assert [len(run.episodes) for run in runs] == [3, 1]
        assert f"E1_s0/{names[1]}, line 1-2: another protocol of libero_goal: max_steps 9, not 300" in str(
            aside
        )


def test_one_checkpoint_under_two_numbers_of_actions_is_paired_in_one_report(tmp_path):
    wins = {10: (1, 1, 0, 1), 50: (0, 1, 0, 0)}
    for seed in (0, 1, 2):
        for arm, fusion in (("E0", ["none"]), ("E2", ["late"])):
            folder = write_run(tmp_path, arm, {"off": []}, seed, fusion=fusion)
            rows = []
            for steps, won in wins.items():
                protocol = episode("off", 0, 1)["protocol"] | {"n_action_steps": steps}
                won = (*won[:3], won[3] and seed > 0)
                rows += [
                    episode("pred" if arm == "E2" else "off", i, w, protocol=protocol)
                    for i, w in enumerate(won)
                ]
            write_episodes(folder, rows)
    runs, aside = reading.load_runs((tmp_path,))
    assert not aside
    arms = {run.arm: run for run in runs if run.seed == 2}
    assert set(arms) == {"E0", "E2", "E0, 50 actions a chunk", "E2, 50 actions a chunk"}
    assert {len(run.episodes) for run in runs} == {4}
    for name, run in arms.items():
        assert {e["protocol"]["n_action_steps"] for e in run.episodes} == {50 if "50" in name else 10}
    [contrast] = [c for c in stats.all_contrasts(runs) if (c.a, c.b) == ("E2, 50 actions a chunk", "E2")]
    assert contrast.seeds == (0, 1, 2) and contrast.n == 4
    assert contrast.differences.tolist() == [-0.25, -0.5, -0.5]
    report.write_report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert row_of(text, "E2, 50 actions a chunk", "E2", "0 1 2", "4")


# ---- the report


def test_report_has_the_right_rows_and_figures(tree, tmp_path):
    out = tmp_path / "out"
    printed = report.write_report(load(tree), out)
    text = (out / "table.md").read_text()
    figures = {f"{name}_6400.{kind}" for name in ("curves", "gates", "success") for kind in ("png", "svg")}
    files = {"report.html", "table.md", "results.csv", "looks.json"}
    assert {p.name for p in out.iterdir()} == figures | files
    assert row_of(text, "E0", "no memory")[2:8] == ["off (own)", "6/10", "60", "31 to 83", "60", "104"]
    assert row_of(text, "E2", "late, trained with pred", "pred (own)")[3:9] == [
        "9/9",
        "100",
        "70 to 100",
        "100",
        "104",
        "1",
    ]
    assert row_of(text, "E2", "E0", "0", "9")[4:] == ["+44", "+44", "-", "-", "no verdict", "-"]
    assert row_of(text, "E2", "E0", "0", "5")[4:7] == ["4", "0", "0"]  # the crashed pair is left out
    off = row_of(text, "E2 pred", "E2 off (never met in training; E0: 6/10 (31 to 83))")
    assert off[2:] == ["seed 0", "9", "+100", "+100 (+58 to +100)", "0.004", "0.004", "higher", "100"]
    assert row_of(text, "E2", "9/9 (70 to 100)") == ["E2", "9/9 (70 to 100)", "9/9 (70 to 100)"]  # by task
    assert row_of(text, "E0b", "0/10 (0 to 28)")[2] == "0/10 (0 to 28)" and "1 put_the_bowl" in text
    assert row_of(text, "E0", "no memory") == row_of(printed, "E0", "no memory")
    assert '"versions.mujoco": "3.3.2"' in text and "task 1: 0-9" in text
    assert 'task 1, init state 0: {"front": [0]}' in text
    assert str(tmp_path) not in text


def test_own_memory_mode_comes_first(tree):
    arms = stats.by_arm(load(tree))
    assert stats.arm_modes(arms["E2"]) == ["pred", "off", "zero"]
    assert arms["E0"][0].own == "off" and arms["E1"][0].own == "zero"


def test_the_terminal_shows_tables_sentences_and_signals(tree):
    text = report.write_report(load(tree), tree / "report")
    assert "Fewer than 3 training seeds an arm: no verdict on arms, only the tables." in text
    assert (
        "- E2: memory helps, above no memory, a memory trained as noise: cannot be told. E2 against E0"
        in text
    )
    assert "unless training met it (`off`: `--memory-dropout`)" in text
    assert row_of(text, "E2", "zero at rollout lowers success")[2:] == [
        "own minus zero: +100 points, shown in 1 of 1 checkpoints",
        "yes",
    ]


@pytest.mark.slow
def test_looks_are_counted_once_for_the_same_episodes(tree):
    said = lambda: re.search(r"Looked at (\d)", report.write_report(load(tree), tree / "report"))  # noqa: E731
    assert said() is None and said() is None
    with (tree / "E0_s0" / "episodes.jsonl").open("a") as file:
        file.write(json.dumps(episode("off", 10, 1)) + "\n")
    assert said()[1] == "2" and said()[1] == "2"
    with (tree / "E0_s0" / "episodes.jsonl").open("a") as file:
        file.write(json.dumps(episode("off", 0, 1, checkpoint="step_000050", samples=3200)) + "\n")
    assert said()[1] == "3"
    (tree / "report" / "looks.json").write_text("[1]")
    assert said()[1] == "2"


def test_every_off_and_zero_figure_says_that_training_never_met_it_unless_it_did(tmp_path):
    write_run(tmp_path, "E0", {"off": [1, 0]})
    results = {"pred": [1, 1], "off": [0, 0], "zero": [0, 1], "shuffle": [1, 0]}
    write_run(tmp_path, "E2", results, fusion=["late"])
    write_run(tmp_path, "E2m", results, fusion=["late"], memory_dropout=0.2)
    report.write_report(load(tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    beside = "(never met in training; E0: 1/2 (9 to 91))"
    modes = [
        row_of(text, arm, "late, trained with pred", mode)
        for arm, mode in (("E2m", "off"), ("E2", "shuffle"))
    ]
    modes += [
        row_of(text, arm, "late, trained with pred", f"{mode} {beside}")
        for arm, mode in (("E2", "off"), ("E2", "zero"), ("E2m", "zero"))
    ]
    assert (
        len(modes) == 5
        and row_of(text, "E2 pred", f"E2 off {beside}")
        and row_of(text, "E2m pred", "E2m off")
    )


def test_dose_and_response_is_drawn_from_gate_modes(tmp_path):
    results = {"pred": [1, 1, 1], "gate:0": [0, 0, 0], "gate:0.5": [1, 0, 1], "gate:1.5": [1, 1, 0]}
    write_run(tmp_path, "E2", results, fusion=["late"])
    write_run(tmp_path, "E0", {"off": [1, 1, 1]})
    report.write_report(load(tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "dose_6400.svg").read_text()
    assert "gate strength S" in text and ">1.5<" in text and ">E2<" in text and ">E0<" not in text


def test_budgets_get_their_own_sections_and_unevaluated_runs_are_listed(tmp_path):
    write_run(tmp_path, "E0", {"off": [1, 1]})
    write_run(tmp_path, "E1", {"off": [1, 0]}, total_samples=12800)
    (write_run(tmp_path, "E2", {}) / "episodes.jsonl").unlink()
    report.write_report(load(tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.index("## 6,400 training samples") < text.index("## 12,800 training samples")
    assert "Not evaluated: E2_s0." in text
    assert row_of(text, "E2_s0")[4] == "not evaluated"


def test_runs_without_any_episode_are_refused(tmp_path):
    write_run(tmp_path, "E0", {})
    with pytest.raises(Refused, match=r"no episodes in episodes\.jsonl of E0_s0; run eval\.py"):
        report.write_report(load(tmp_path), tmp_path / "out")
    (tmp_path / "E0_s0" / "config.json").write_text("[]")
    runs, aside = reading.load_runs((tmp_path,))
    with pytest.raises(
        Refused, match=r"of any run; set aside: E0_s0 \(.*cannot be used, it is not a JSON.*; run eval"
    ):
        report.write_report(runs, tmp_path / "out", aside=aside)


def test_all_crashed_and_no_metrics_still_make_a_report(tmp_path):
    folder = write_run(tmp_path, "E0", {"off": ["crash", "crash"]})
    (folder / "metrics.jsonl").unlink()
    report.write_report(load(tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert row_of(text, "E0", "no memory")[3:9] == ["0/0", "-", "0 to 100", "-", "-", "2"]
    assert not list((tmp_path / "out").glob("curves*"))


def test_script_prints_the_table_and_refuses_in_one_line(tree, monkeypatch):
    command = [sys.executable, "-m", "report", tree / "E0_s0", tree / "E0b_s0", "--out", tree / "out"]
    good = subprocess.run(command, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "31 to 83" in good.stdout and (tree / "out" / "report.html").is_file()
    monkeypatch.setattr(sys, "argv", ["report", str(tree / "E0_s0"), str(tree / "absent")])
    with pytest.raises(SystemExit) as bad:
        report.main()
    absent = f"{tree}/absent is not a folder; name run folders or a folder that holds some"
    assert bad.value.code == f"error: {absent}"


def test_reporting_imports_neither_torch_nor_the_simulator():
    names = "report.__main__"
    code = f"import sys, {names}; print(sorted({{'torch', 'mujoco', 'libero'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---- suites, checkpoints from elsewhere, other files


def test_suites_are_told_apart_and_averaged_alike(tmp_path):
    folder = write_run(tmp_path, "E0", {})
    rows = [episode("off", i, 1, suite="libero_10") for i in range(2)]
    write_episodes(folder, [*rows, *(episode("off", i, 0) for i in range(8))])
    report.write_report(load(tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert row_of(text, "E0", "no memory")[3:5] == ["2/10", "20"]
    cells = row_of(text, "E0", "off (own)")
    assert cells[2:4] == ["2/2 (34 to 100)", "0/8 (0 to 32)"]
    # the mean of 1 and 0; Wilson reaches 0.658 below 1 and 0.324 above 0, halved
    assert cells[4] == "50 (17 to 66)"
    assert (tmp_path / "out" / "suites_6400.png").is_file()


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=5))
def test_an_average_lies_within_its_interval_and_one_rate_keeps_its_own(counts):
    parts = [stats.Tally(min(k, n), n, 0, None) for k, n in counts]
    mean, low, high = map(int, re.findall(r"-?\d+", tables.average(parts)))
    assert 0 <= low <= mean <= high <= 100
    if len(parts) == 1:
        assert tables.average(parts).split(" ", 1)[1] == tables.count(parts[0]).split(" ", 1)[1]


def test_checkpoints_from_elsewhere_get_a_panel_of_their_own(tree):
    elsewhere = {"total_samples": None, "data_fingerprint": None}
    first = write_run(tree, "smolvla_libero", {"off": [1, 1, 0]}, **elsewhere)
    with (first / "episodes.jsonl").open("a") as file:
        file.write(json.dumps(episode("off", 0, 1, checkpoint="step_000001", samples=7)) + "\n")
    folder = write_run(tree, "other", {}, **elsewhere)
    protocol = {"max_steps": 9, "versions": {}}
    write_episodes(folder, [episode("off", 0, 1, protocol=protocol, suite="libero_10")])
    runs = load(tree)
    report.write_report(runs, tree / "out")
    text = (tree / "out" / "table.md").read_text()
    trained, own = text.split("## Checkpoints from elsewhere")
    assert "smolvla_libero" not in trained
    assert "trained elsewhere" in own and "Without E0b" not in own
    assert row_of(own.split("## Reproduction")[0], "smolvla_libero", "no memory")[3] == "2/3"
    write_episodes(folder, [episode("off", 0, 1, protocol=protocol)])  # now of the same suite as the first
    [aside] = set_aside(tree)
    assert "other_s0/episodes.jsonl, line 1: another protocol of libero_goal: max_steps 9, not 300" in aside


def test_results_have_a_row_a_cell_and_pooled_rows(tmp_path):
    for seed in (0, 1):
        results = {"pred": [1, 1, "crash"], "off": [seed, 0, 0]}
        write_run(tmp_path, "E2", results, seed, fusion=["late"], flops_per_sample=2e9)
    report.write_report(load(tmp_path), tmp_path / "out")
    with (tmp_path / "out" / "results.csv").open() as file:
        table = [*csv.DictReader(file)]
    rows = {(r["memory"], r["seed"], r["suite"]): r for r in table if r["kind"] == "success"}
    assert len(rows) == 2 * 3 * 2  # modes, seeds and all, suites and all
    pooled = rows["pred", "all", "all"]
    assert [pooled[k] for k in ("successes", "episodes", "crashes", "own", "samples")] == list("4421") + [
        "6400"
    ]
    assert float(pooled["low"]) == pytest.approx(stats.wilson(4, 4)[0], abs=1e-6)
    one = rows["off", "1", "libero_goal"]
    assert (one["successes"], one["rate"], one["mean_steps_to_success"]) == ("1", "0.333333", "100.00")
    assert (one["parameters"], one["flops_per_sample"]) == ("2000", "2000000000.0")
    assert one["protocol"] == reading.protocol_hash(episode("off", 0, 1)) and len(one["protocol"]) == 12
    checks = [r for r in table if r["kind"] == "contrast"]
    assert [(r["a"], r["b"], r["seed"], r["family"]) for r in checks] == [
        ("E2 pred", "E2 off", seed, "checks") for seed in "01"
    ]
    assert (
        float(checks[0]["p"]) == pytest.approx(stats.mcnemar(2, 0)) and checks[0]["difference"] == "1.000000"
    )
    sentences = {r["what"].partition(",")[0]: r["answer"] for r in table if r["kind"] == "sentence"}
    assert sentences == dict.fromkeys(
        ("memory helps", "prediction helps", "the policy depends on it"), "cannot be told"
    )
    assert [r["what"] for r in table if r["kind"] == "signal"] == ["gate away from 0"]


@pytest.mark.parametrize("name", report.SUBCOMMANDS)
def test_a_subcommand_hands_its_arguments_to_the_module_of_that_name(monkeypatch, name):
    got = []
    monkeypatch.setitem(sys.modules, f"report.{name}", SimpleNamespace(main=got.append))
    monkeypatch.setattr(sys, "argv", ["report", name, "RUN", "--n", "3"])
    report.main()
    assert got == [["RUN", "--n", "3"]]
