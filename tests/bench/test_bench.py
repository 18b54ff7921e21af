"""What bench reports: counted FLOPs, honest ratios, one JSON line a case."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import loop
from bench import speed as bench
from smolvla.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
TINY = PRESETS["tiny"]


def case(kind: str = "step", **fields) -> bench.Case:
    return bench.Case("some case", kind, "tiny", "float32", 2, 1, **fields)


def tower_flops(batch: int) -> int:
    """By hand: patch convolution, blocks with attention, connector; two FLOPs a multiplication."""
    c, patches = TINY, (TINY.image_size // TINY.patch_size) ** 2
    block = 2 * patches * (4 * c.vision_width**2 + 2 * c.vision_width * c.vision_mlp)
    block += 4 * patches**2 * c.vision_width
    convolution = 2 * patches * 3 * c.patch_size**2 * c.vision_width
    connector = 2 * patches * c.vision_width * c.width
    return batch * len(c.cameras) * (c.vision_layers * block + convolution + connector)


def test_flops_of_encoding_are_those_counted_by_hand():
    pictures, features = (bench.count_flops(case(features=f)) for f in (False, True))
    assert pictures - features == tower_flops(batch=2)


@pytest.mark.slow
def test_flops_grow_with_batch_steps_and_live_tokens():
    one = bench.count_flops(case("chunk"))
    assert bench.count_flops(dataclasses.replace(case("chunk"), batch=4)) == 2 * one
    split, whole = (bench.count_flops(case(features=True, plain=p)) for p in (False, True))
    assert split < whole  # no gradient goes back through images and language
    cross = bench.count_flops(case(features=True, arm={"fusion": ("prefix_cross",)}))
    late = bench.count_flops(case(features=True, arm={"fusion": ("late",)}))
    assert split < late < cross


def test_the_fast_case_computes_what_the_plain_one_does():
    found = []
    for plain in (True, False):
        arm = bench.build(case(plain=plain), "cpu")
        torch.manual_seed(1)
        found.append(arm(*bench.batch_of(case(), arm, "cpu"))["action"])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_a_step_trains_and_a_chunk_gives_its_parts():
    one = case(features=True, arm={"fusion": ("late",)})
    arm = bench.build(one, "cpu")
    before = {name: p.detach().clone() for name, p in arm.named_parameters()}
    bench.step_of(one, arm, "cpu")()
    changed = {name for name, p in arm.named_parameters() if not torch.equal(p, before[name])}
    assert "policy.action_out_proj.weight" in changed and "policy.fusion.sites.late.gate" in changed
    assert not any(name.startswith(("policy.vision", "policy.text")) for name in changed)
    parts = bench.chunk_of(case("chunk"), bench.build(case("chunk"), "cpu"), "cpu")()
    assert list(parts) == ["vision", "prefix", "denoise"] and min(parts.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "arms", "only", "cases"),
    [("chunk", "none", "", 2), ("load", "none", "", 1), ("step", "bank", "4 hypotheses", 1)],
)
def test_every_case_is_a_json_line_and_a_row(tmp_path, what, arms, only, cases):
    flags = ["--size", "tiny", "--dtype", "float32", "--repeats", "1", "--rounds", "1", "--threads", "1"]
    out = tmp_path / "bench.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "bench", what, "--arms", arms, "--only", only, *flags, "--out", out],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == cases and done.stdout.splitlines()[: len(rows)] == out.read_text().splitlines()
    for row in rows:
        assert row["case"] in done.stdout.split("}\n")[-1]  # in the table too
        if "dtype" in row:
            first = next(r for r in rows if r.get("kind") == row["kind"])  # the plain path
            assert row["times_faster_than_plain"] == pytest.approx(first["seconds"] / row["seconds"])
            assert row["share_of_peak"] == pytest.approx(row["flops"] / row["seconds"] / row["peak_flops"])
            assert 0 < row["share_of_peak"] < 1.5 and row["memory_gb"] > 0.1
    if what == "load":
        assert rows[-1]["seconds"] == pytest.approx(rows[-1]["import"] + rows[-1]["load"])


def test_cases_can_be_chosen_by_name():
    groups = bench.plan(bench.BenchConfig("step", "sites", only="prefix_", dtype=("float32",)))
    assert [[(c.name, c.kind) for c in group] for group in groups] == [
        [(name, kind) for name in bench.SITES if name.startswith("prefix_")] for kind in ("step",)
    ]
    with pytest.raises(
        ValueError, match="--only 'nothing' is in no case's name: these are none, plain, none"
    ):
        bench.plan(bench.BenchConfig("step", "sites", only="nothing"))


@pytest.mark.slow
def test_readers_are_measured_alone_and_with_a_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "LEAST", 0.05)
    out = tmp_path / "bench.jsonl"
    bench.measure_all(bench.BenchConfig("data", workers=(0, 1), rounds=1, out=out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["workers"], row["cameras"]) for row in rows] == [(w, "64x64 64x64") for w in (0, 1)] * 2
    assert [row["frames"] for row in rows] == [131, 131, 139, 139]
    table = capsys.readouterr().out.splitlines()[-4:]
    for row, line in zip(rows, table, strict=True):
        assert row["per_second"] > 1 and line.endswith(f"{row['per_second']:.1f} samples/s")


@pytest.mark.slow
def test_world_encoders_and_their_caches_are_measured(tmp_path):
    out = tmp_path / "bench.jsonl"
    flags = ["--size", "tiny", "--threads", "1", "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "world", *flags], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"].split(",")[0] for row in rows] == ["pca", "siglip", "dinov2", "vjepa2"]
    for row in rows:
        assert row["frames_per_second"] > 0 and row["case"] in done.stdout.split("}\n")[-1]
        found = row["samples_per_second_cache"] / row["samples_per_second_pictures"]
        assert row["ratio"] == pytest.approx(found) and found > 10


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="--batch-size 0 must be at least 1"):
        bench.BenchConfig("chunk", batch_size=0)


def test_the_loop_around_steps_and_a_save_are_measured_in_a_real_run():
    around, saving = loop.lines("tiny", "float32", 2, 1)
    parts = [around[name] for name in ("forward", "backward", "optimiser")]
    assert min(parts) > 0 and 0 < around["share_outside"] < 1
    assert around["seconds"] * (1 - around["share_outside"]) == pytest.approx(sum(parts))
    assert saving["ratio"] == pytest.approx(saving["seconds"] / saving["plain_seconds"])
    assert saving["bytes"] > 4 * 1.8e6  # the tiny policy's weights alone
    rows = [row | {"case": "x"} for row in (around, saving)]
    assert "outside of them" in bench.table(rows) and "written plainly" in bench.table(rows)
