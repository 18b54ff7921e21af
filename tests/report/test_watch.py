"""The live view on run folders that grow, stop, resume and break, and on terminals of any width."""

import functools
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from report import stats, watch

ROOT = Path(__file__).resolve().parents[2]


def make_run(root: Path, name: str = "E2-s0", **config) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    facts = {"arm": "E2", "seed": 0, "total_samples": 1000, "fusion": ["late"], "memory": "pred"}
    (folder / "config.json").write_text(json.dumps(facts | config))
    return folder


def line(i: int, **more) -> dict:
    """A log line after 10 i samples, at 20 samples a second: one every half a second."""
    row = {"samples": 10 * i, "step": i, "loss": 2 / i, "action_loss": 1 / i, "samples_per_second": 20.0}
    return row | {"grad_norm": 0.25, "grad_norm_gates": 0.01, "world_gate": i / 100} | more


def append(path: Path, *rows: dict) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def episode(state: int, success: bool | None, memory: str = "pred", checkpoint: str = "step_000100") -> dict:
    row = {"suite": "goal", "task_id": 1, "init_state": state, "success": success, "memory": memory}
    ran = {"steps": 50, "crash": None if success is not None else "died", "seed": 7, "protocol": {"fps": 20}}
    return row | {"checkpoint": checkpoint} | ran


def seen(folder: Path) -> watch.Watched:
    return watch.read(folder.name, folder)


def counts(run: watch.Watched) -> tuple:
    return run.checkpoint, {mode: (t.k, t.n, t.crashes) for mode, t in run.tallies.items()}


def lines_of(shown, width: int = 100) -> list[str]:
    """What a terminal of that width shows."""
    console = Console(width=width, file=io.StringIO(), **watch.PLAIN)
    console.print(shown)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def text_of(run: watch.Watched, width: int = 100) -> str:
    """One run in full, as words: how wide columns are is rich's affair."""
    return "\n".join(re.sub(" {2,}", "   ", line) for line in lines_of(watch.detail(run, width), width))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


# ---- one run


def test_view_has_the_numbers_of_the_log(tmp_path):
    folder = make_run(tmp_path)
    append(
        folder / "metrics.jsonl",
        *(line(i, world_loss=0.5, world_cos=0.7, bad_steps=3, mfu=0.41) for i in range(1, 41)),
    )
    append(
        folder / "metrics.jsonl",
        {"samples": 400, "val_loss_off": 0.5, "val_loss_pred": 0.4, "val_loss_zero": 0.625},
    )
    run, text = seen(folder), text_of(seen(folder))
    assert "E2-s0   arm E2: late, pred, seed 0" in text and "40.0%" in text
    assert "400 of 1,000   20.0 a second now, 20.0 on average   30 s left" in text
    tail = sum(2 / i for i in range(37, 41)) / 4
    assert f"loss   {2 / 40:.4f}   last tenth {tail:.4f}" in text
    assert "held-out   off 0.5000   pred 0.4000 (-0.1000)   zero 0.6250 (+0.1250)" in text
    assert "gates   +0.4000" in text and "world   loss 0.5000   cos 0.7000" in text
    assert "gradients   0.25   gates 0.01" in text and "bad steps   3" in text and "mfu   41.0%" in text
    assert run.state == "running" and "rollouts" not in text


def test_only_what_changed_is_read_and_a_half_written_line_waits(tmp_path, monkeypatch):
    path, known, taken, read = make_run(tmp_path) / "metrics.jsonl", {}, [], watch.read
    make_run(tmp_path, "E2-s1")
    monkeypatch.setattr(watch, "read", lambda name, folder: taken.append(name) or read(name, folder))
    append(path, *(line(i) for i in range(1, 51)))
    age(path, 60)
    assert watch.look((tmp_path,), known)[0].samples == 500 and taken == ["E2-s0", "E2-s1"]
    half = json.dumps(line(51))
    with path.open("a") as file:
        file.write(half[:30])
    run = watch.look((tmp_path,), known)[0]
    assert (run.samples, run.broken) == (500, 0) and taken[2:] == ["E2-s0"]
    age(path, 30)
    with path.open("a") as file:
        file.write(half[30:] + "\n")
    assert watch.look((tmp_path,), known)[0].samples == 510 and taken[3:] == ["E2-s0"]
    watch.look((tmp_path,), known)
    assert len(taken) == 4


def test_view_follows_a_run_that_is_being_written(tmp_path):
    folder = make_run(tmp_path)
    rows = "".join(json.dumps(line(i)) + "\n" for i in range(1, 101))

    def write() -> None:  # in pieces that end anywhere in a line
        with (folder / "metrics.jsonl").open("w") as file:
            for at in range(0, len(rows), 701):
                file.write(rows[at : at + 701])
                file.flush()
                time.sleep(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    seen_then = []
    while writer.is_alive():
        seen_then.append(seen(folder).samples)
    writer.join()
    run = seen(folder)
    assert seen_then == sorted(seen_then) and len({*seen_then}) > 2  # it was seen on the way
    assert list(run.curves["loss"]) == [2 / i for i in range(1, 101)]
    assert run.broken == 0 and run.state == "finished" and run.average == pytest.approx(20)


def test_resumed_run_is_read_anew(tmp_path):
    path, known = make_run(tmp_path) / "metrics.jsonl", {}
    append(path, *(line(i) for i in range(1, 31)))
    watch.look((tmp_path,), known)
    path.write_text("".join(json.dumps(line(i)) + "\n" for i in range(1, 21)))  # as train.py cuts it
    append(path, *(line(i, loss=9.0) for i in range(21, 41)))
    [run] = watch.look((tmp_path,), known)
    assert list(run.curves["loss"]) == [2 / i for i in range(1, 21)] + [9.0] * 20 and run.samples == 400


def test_broken_lines_are_counted_not_hidden(tmp_path):
    folder = make_run(tmp_path)
    (folder / "metrics.jsonl").write_text('{"samples": 1\n[1]\n' + json.dumps(line(1)) + "\n")
    append(folder / "episodes.jsonl", {"suite": "goal"}, episode(1, True))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"samples": 20, "los{"samples": 20, "loss": 3}\n{"samples": "many", "loss": 1}\n')
    text = text_of(seen(folder))
    assert "note   5 broken lines are left out" in text and "1/1   100%" in text


@pytest.mark.parametrize(
    ("quiet", "state"), [(0, "running"), (8, "running"), (12, "stalled"), (500, "stalled"), (700, "killed?")]
)
def test_run_that_went_quiet_is_stalled_then_maybe_killed(tmp_path, quiet, state):
    folder = make_run(tmp_path)
    append(folder / "metrics.jsonl", line(1), line(2))
    age(folder / "metrics.jsonl", quiet)
    run = seen(folder)
    assert run.state == state and f"state   {state}: " in text_of(run)
    append(folder / "metrics.jsonl", line(100))
    age(folder / "metrics.jsonl", quiet)
    assert seen(folder).state == "finished" and "left" not in text_of(seen(folder))


def test_run_with_slow_lines_has_longer_to_be_quiet(tmp_path):
    folder = make_run(tmp_path)
    append(folder / "metrics.jsonl", *(line(i, samples_per_second=0.1) for i in (1, 2, 3)))  # 100 s a line
    for quiet, state in ((900, "running"), (1100, "stalled"), (9000, "stalled"), (11000, "killed?")):
        age(folder / "metrics.jsonl", quiet)
        assert seen(folder).state == state


def test_run_without_a_line_is_starting(tmp_path):
    folder = make_run(tmp_path)
    age(folder / "config.json", 300)
    text = text_of(seen(folder))
    assert "state   starting: no log line yet, for 5 min" in text and "0.0%" in text


def test_checkpoint_is_named_with_its_age(tmp_path):
    folder = make_run(tmp_path)
    assert "checkpoint" not in text_of(seen(folder))
    (folder / "step_000040").mkdir()
    (folder / "step_000040" / "state.json").write_text('{"samples": 400, "step": 40}')
    (folder / "last").symlink_to("step_000040")
    age(folder / "step_000040" / "state.json", 180)
    assert "checkpoint   step_000040   400 samples   3 min ago" in text_of(seen(folder))


def test_rollouts_count_the_newest_checkpoint_once_and_crashes_apart(tmp_path):
    folder = make_run(tmp_path)
    rows = [episode(i, i < 7) for i in range(10)] + [episode(3, False), episode(11, None)]
    rows += [episode(i, True, checkpoint="step_000020") for i in range(20)]
    append(folder / "episodes.jsonl", *rows)
    append(folder / "episodes_rank1.jsonl", *(episode(i, False, "off") for i in range(5)))
    low, high = (f"{100 * x:.0f}" for x in stats.wilson(7, 10))
    lines = lines_of(watch.detail(seen(folder), 100))
    start = next(i for i, x in enumerate(lines) if x.startswith("rollouts of step_000100"))
    assert [x.split() for x in lines[start + 1 :]] == [
        ["pred", "7/10", "70%", low, "to", high, "%", "1", "crashed"],
        ["off", "0/5", "0%", "0", "to", "43", "%"],
    ]
    append(folder / "episodes_rank1.jsonl", episode(5, True, "off"))
    assert counts(seen(folder)) == ("step_000100", {"pred": (7, 10, 1), "off": (1, 6, 0)})


def test_values_are_those_of_the_json_whatever_stands_around_them(tmp_path):
    tricky = episode(4, None) | {
        "prompt": 'say \\"success\\": true, "memory": "off"',
        "crash": 'died, "at 3" \\',
    }
    nested = {"suite": "other", "seed": 9, "memory": "zero", "late": {"loss": 7}}
    folder = make_run(tmp_path)
    append(folder / "episodes.jsonl", tricky | {"protocol": nested}, episode(5, True) | {"protocol": nested})
    append(folder / "metrics.jsonl", line(1) | {"late/loss": 5.0, "loss_scale": 2}, line(2, loss=1e-7))
    run = seen(folder)
    assert counts(run) == ("step_000100", {"pred": (1, 1, 1)}) and run.broken == 0
    assert list(run.curves["loss"]) == [2, 1e-7]


def test_arm_without_fusion_has_one_rollout_mode(tmp_path):
    folder = make_run(tmp_path, fusion=["none"], blind=True)
    append(folder / "episodes.jsonl", episode(1, True, "pred"), episode(2, False, "off"))
    run = seen(folder)
    assert counts(run)[1] == {"off": (1, 2, 0)} and "arm E2: no memory, blind, seed 0" in text_of(run)


# ---- shapes on the screen


@pytest.mark.parametrize("width", [1, 20, 40, 60, 61, 100, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path, width):
    folders = [make_run(tmp_path, f"a_run_with_a_rather_long_name-{i}", num_hypotheses=4) for i in range(3)]
    append(
        folders[0] / "metrics.jsonl", *(line(i, val_loss_off=1.0, val_loss_pred=2.0) for i in range(1, 90))
    )
    append(folders[0] / "episodes.jsonl", episode(1, True, "signflip"))
    runs = [seen(folder) for folder in folders]
    for shown in (watch.overview(runs, width), *(watch.detail(run, width) for run in runs)):
        lines = lines_of(shown, width)
        assert lines and max(map(len, lines)) <= width
    if width >= 60:  # it is the run's name that is cut where room is short
        header, first = lines_of(watch.overview(runs, width), width)[:2]
        assert header.endswith("  solved") and re.search(r"(…|-0) +running .* -$", first)


def test_wide_overview_has_every_column_and_a_narrow_one_what_matters(tmp_path):
    folders = [make_run(tmp_path, f"E2-n64000-s{i}") for i in range(2)]
    append(folders[0] / "metrics.jsonl", *(line(i) for i in range(1, 41)))
    append(folders[0] / "episodes.jsonl", episode(1, True), episode(2, False))
    runs = [seen(folder) for folder in folders]
    header, first, second = (re.split(r" {2,}", x) for x in lines_of(watch.overview(runs, 100), 100)[:3])
    assert header == ["run", "state", "done", "samples/s", "left", "loss", "checkpoint", "solved"]
    loss = f"{sum(2 / i for i in range(37, 41)) / 4:.4f}"
    assert first == ["E2-n64000-s0", "running", "40%", "20.0", "30 s", loss, "-", "1/2"]
    assert second == ["E2-n64000-s1", "starting", "0%", "-", "-", "-", "-", "-"]
    assert lines_of(watch.overview(runs, 40), 40)[0].split() == ["run", "state", "solved"]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200), st.integers(1, 80))
def test_spark_fits_and_rises_where_the_values_do(values, width):
    drawn = watch.spark(np.array(sorted(values)), width)
    assert len(drawn) == min(width, len(values)) and list(drawn) == sorted(drawn)


def test_spark_shows_its_ends_the_mean_of_parts_and_what_is_not_finite():
    assert watch.spark(np.array([1, 10, 100]), 3) == "▁▅█"  # by logarithms: 10 is in the middle
    assert watch.spark(np.array([-1, 0, 1]), 3) == "▁▅█"
    assert watch.spark(np.array([1, 3, 200, 0]), 2) == "▁█"
    assert watch.spark(np.array([1, float("nan"), 100, float("inf")]), 4) == "▁×█×"
    assert watch.spark(np.array([5, 5]), 9) == "▁▁" and watch.spark(np.array([]), 9) == ""


def test_not_a_number_in_the_log_is_drawn(tmp_path):
    folder = make_run(tmp_path)
    append(folder / "metrics.jsonl", line(1), line(2, loss=float("nan"), grad_norm=float("nan")))
    text = text_of(seen(folder))
    assert "×" in text and "last tenth nan" in text and "gradients   nan" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (9000, "2.5 h"),
        (10 * 86400, "10 d"),
        (float("nan"), "-"),
    ],
)
def test_durations_are_in_the_unit_a_person_would_use(seconds, text):
    assert watch.duration(seconds) == text


# ---- the program


def test_pipe_gets_one_view_without_escapes_and_new_runs_are_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    make_run(tmp_path)
    watch.main([str(tmp_path)])
    assert "arm E2: late, pred" in (alone := capsys.readouterr().out) and "\x1b" not in alone
    known = {}
    assert len(watch.look((tmp_path,), known)) == 1
    make_run(tmp_path, "E2-s1")
    assert [run.name for run in watch.look((tmp_path,), known)] == ["E2-s0", "E2-s1"]


def test_terminal_is_drawn_over_until_ctrl_c(tmp_path):
    folder = make_run(tmp_path)
    append(folder / "metrics.jsonl", line(1))
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "report", "watch", folder, "--every", "0.1"]
    # Behind a shell's & Ctrl-C is ignored, and children inherit that.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, preexec_fn=listens)
    drawn = b""
    while b"E2-s0" not in drawn:
        drawn += os.read(master, 65536)
    append(folder / "metrics.jsonl", line(77))
    while b"770 of 1,000" not in drawn:
        drawn += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    until = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < until:  # who draws waits where nobody reads
        if select.select([master], [], [], 0.1)[0]:
            drawn += os.read(master, 65536)
    process.kill()
    errors = process.stderr.read()
    process.stderr.close(), os.close(slave), os.close(master)
    assert process.returncode == 0 and errors == b""
    assert drawn.count(b"\x1b[?1049h") == drawn.count(b"\x1b[?1049l") == 1  # the other screen, and back,
    assert b"770 of 1,000" in drawn.split(b"\x1b[?1049l")[1]  # with the last view left behind


def test_folder_without_runs_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: no run folder"):
        watch.main([str(tmp_path)])


def test_neither_torch_nor_the_simulator_is_imported():
    code = "import sys, report.watch, report.power; print({'torch', 'mujoco', 'libero'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_markup_and_escapes_in_names_are_shown_not_obeyed(tmp_path):
    folder = make_run(tmp_path, "[red]E2[", arm="[bold]x[/]\x1b[2J", memory="[link=a]m")
    append(folder / "episodes.jsonl", episode(1, True, "[blink]pred"))
    run = seen(folder)
    for shown in (watch.detail(run, 200), watch.overview([run, run], 200)):
        text = "\n".join(lines_of(shown, 200))
        assert "[red]E2[" in text and "\x1b" not in text
    assert "[blink]pred" in text_of(run) and "[bold]x[/]" in text_of(run)
