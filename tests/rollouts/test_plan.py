"""What an evaluation rolls out: defaults from the training data, checkpoints from anywhere."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
from test_arm import processor

from arm import save_arm
from eval import EvalConfig
from files import Refused, parse_numbers
from rollouts.plan import Plan, find_target, make_plans, newest_run, open_out
from simulator.env import NUM_INIT_STATES, SimConfig
from smolvla.checkpoint import fresh_processor, save_policy


def test_init_states_are_read_from_ranges_and_lists():
    assert parse_numbers("10-12", "--init-states", NUM_INIT_STATES) == [10, 11, 12]
    assert parse_numbers("0,3, 7-8", "--init-states", NUM_INIT_STATES) == [0, 3, 7, 8]
    for bad in ("a", "5-", "-3", "3-1", "48-50"):
        with pytest.raises(ValueError, match="--init-states"):
            parse_numbers(bad, "--init-states", NUM_INIT_STATES)


def test_the_protocol_defaults_to_the_training_datas_and_its_unseen_starts():
    [plan] = make_plans(EvalConfig(episodes_per_task=3), tiny.run_config(), tiny.arm())
    assert plan.starts == [(1, 3), (1, 4), (1, 5)]
    assert not plan.seen & set(plan.starts)
    record = plan.record()
    assert (record["displace"], record["draw"], record["size"], record["n_action_steps"]) == (
        0.06,
        "fast",
        32,
        3,
    )
    assert record["max_steps"] == 280 and record["policy_batch"] == 1 and record["dtype"] == "float32"
    [all_left] = make_plans(EvalConfig(), tiny.run_config(), tiny.arm())
    assert all_left.starts == [(1, i) for i in range(3, NUM_INIT_STATES)]


def test_an_ambiguous_task_is_taken_from_the_training_data_unless_the_command_line_says_otherwise():
    run = tiny.run_config(either="cream_cheese,milk")
    for asked, wanted in ((None, "cream_cheese,milk"), ("butter", "butter"), ("", "")):
        [plan] = make_plans(EvalConfig(either=asked), run, tiny.arm())
        assert plan.record()["either"] == wanted
    with pytest.raises(ValueError, match="--either beer: besides its own cream_cheese"):
        make_plans(EvalConfig(either="beer"), run, tiny.arm())


def test_a_checkpoint_from_elsewhere_gets_libero_as_published():
    plans = make_plans(EvalConfig(suite=("spatial", "libero_10")), {}, tiny.arm())
    assert [plan.sim.suite for plan in plans] == ["libero_spatial", "libero_10"]
    everything = [(task, i) for task in range(10) for i in range(NUM_INIT_STATES)]
    for plan, limit in zip(plans, (280, 520), strict=True):
        record = plan.record()
        assert plan.starts == everything and not plan.seen
        assert (record["draw"], record["reset"], record["size"], record["displace"]) == (
            "exact",
            "hard",
            256,
            0,
        )
        assert (record["max_steps"], record["seed"], record["settle_steps"]) == (limit, 7, 10)


@pytest.mark.parametrize(
    "limit, spatial, goal", [("lerobot", 280, 300), ("openpi", 220, 300), ("150", 150, 150)]
)
def test_step_limits_are_somebodys_protocol_or_a_number(limit, spatial, goal):
    config = EvalConfig(suite=("spatial", "goal"), max_steps=limit)
    assert [p.record()["max_steps"] for p in make_plans(config, {}, tiny.arm())] == [spatial, goal]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"max_steps": "many"}, "--max-steps many is no limit: give a number, or lerobot or openpi"),
        ({"suite": ("nowhere",)}, "libero_nowhere"),
        ({"episodes_per_task": 0}, "--episodes-per-task 0 must be at least 1"),
        ({"num_envs": 0}, "--num-envs 0 must be at least 1"),
        ({"video_fps": 40}, "--video-fps 40 must be at most 20"),
        ({"accept": ("colour",)}, "--accept colour is no item: choose from cameras, sizes, rotation"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(flags, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**flags)


def test_what_a_run_cannot_answer_is_asked_for():
    with pytest.raises(ValueError, match="--suite is needed"):
        make_plans(EvalConfig(), {}, tiny.arm())
    with pytest.raises(ValueError, match="--episodes-per-task 48: task 1 has only 47 left"):
        make_plans(EvalConfig(episodes_per_task=48), tiny.run_config(), tiny.arm())
    with pytest.raises(ValueError, match="libero_goal has no task 10"):
        make_plans(EvalConfig(suite=("goal",), task_ids="10"), tiny.run_config(), tiny.arm())


def test_a_checkpoint_is_found_from_its_run_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run under"):
        newest_run(tmp_path)
    with pytest.raises(ValueError, match="neither a run folder"):
        find_target(EvalConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="no folder"):
        find_target(EvalConfig(str(tmp_path / "nothing")))
    run = tmp_path / "run"
    save_arm(run / "step_000001", tiny.arm(), processor())
    save_arm(run / "step_000002", tiny.arm(), processor())
    (run / "last").symlink_to("step_000002")
    (run / "config.json").write_text(json.dumps(tiny.run_config()))
    assert newest_run(tmp_path) == run
    for given, step in ((run, 2), (run / "last", 2), (run / "step_000001", 1)):
        target = find_target(EvalConfig(str(given)))
        name = f"step_00000{step}"
        assert (target.folder, target.out, target.name) == (run / name, run, name)
        assert target.run["arm"] == "E2"


def test_results_of_a_bare_checkpoint_get_a_folder_of_their_own_that_keeps_others_out(tmp_path):
    arm = tiny.arm(fusion=("none",))
    for name in ("a", "b"):
        save_policy(tmp_path / name, arm.policy, processor())
    target = find_target(EvalConfig(str(tmp_path / "a")))
    assert str(target.out) == "runs/eval/a" and target.run == {}
    first = find_target(EvalConfig(str(tmp_path / "a"), out=tmp_path / "results"))
    open_out(first, arm)
    open_out(first, arm)
    record = json.loads((tmp_path / "results" / "config.json").read_text())
    assert (record["arm"], record["total_samples"], record["fusion"]) == ("results", None, ["none"])
    with pytest.raises(ValueError, match=r"holds results of .*/a, not of .*/b: choose another --out"):
        open_out(find_target(EvalConfig(str(tmp_path / "b"), out=tmp_path / "results")), arm)


def test_a_plan_knows_its_instructions_and_what_a_tokenizer_cuts_of_them():
    plan = Plan(SimConfig("libero_object"), [(3, 0), (1, 5), (1, 6)], set(), 3, 1)
    cream, bbq = plan.instructions()
    assert cream == "pick up the cream cheese and place it in the basket" and "bbq sauce" in bbq

    def cut(longest: int) -> list[str]:
        config = dataclasses.replace(tiny.CONFIG, tokenizer_max_length=longest)
        return fresh_processor(config, tiny.STATS, [cream, bbq], (3, 8, 8)).cut([cream, bbq])

    assert cut(20) == []
    assert f'"{cream}" has 14 tokens and is cut to 5: "heese and place it in the basket" is lost' in cut(5)
    with pytest.raises(Refused, match=r"are one and the same in their first 3 tokens"):
        cut(3)


def test_a_run_whose_data_name_no_suite_is_told_why():
    run = {
        "data_provenance": [{"suite": None}],
        "data_facts": {"tasks": ["Pick_up the cream cheese and place it in the basket"]},
    }
    with pytest.raises(Refused, match="the data's instructions are those of --suite object"):
        make_plans(EvalConfig(), run, tiny.arm())
    run["data_facts"]["tasks"] = ["fold the towel"]
    with pytest.raises(
        Refused, match='was trained on no LIBERO data, but on such as "fold the towel"; choose from'
    ):
        make_plans(EvalConfig(), run, tiny.arm())
