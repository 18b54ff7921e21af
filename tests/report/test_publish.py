"""A study's page is what its records give, whoever computes it, and what is published still is."""

import csv
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from study import config_of, episode_lines, write_picture, write_run

import matrix
from files import Refused
from report import __main__ as report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


def study(root: Path) -> Path:
    """Write two parts of kept cells, E0 and E2 with three seeds."""
    for place, part in enumerate(("site", "bank")):
        for arm, site, rates in (("E0", None, {"off": 0.3}), ("E2", "late", {"pred": 0.6, "off": 0.2})):
            for seed in range(3):
                config = config_of(arm, seed, site, 64_000) | {"data_fingerprint": part}
                lines = episode_lines(rates, ("libero_object",), 1, 40, 10 * place + seed, "step_000100")
                run = write_run(root / "runs" / part / f"{arm}-s{seed}", config, lines)
                (run / "finished.txt").write_text("python train.py\n")
                matrix.keep(run, root / "data" / part / run.name)
    return root / "data"


@pytest.mark.slow
def test_a_page_says_of_each_part_what_its_records_give(tmp_path):
    data, out = study(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "learned.md").write_text("Nothing: the numbers are made up.\n")
    write_picture(out / "site" / "imagined.png")
    said = report.publish(data, out)
    page = (out / "README.md").read_text()
    assert "README.md" in said and "## What we learned\n\nNothing: the numbers are made up." in page
    assert re.findall("^## (.*)", page, re.M) == [
        "bank: 64,000 training samples", "site: 64,000 training samples", "What we learned",
    ]  # fmt: skip
    figures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert figures and all((out / name).is_file() for name in figures)
    drawn = [name for name in figures if not name.endswith(".svg")]
    assert drawn == ["site/imagined.png"] == [str(p.relative_to(out)) for p in out.rglob("*.png")]
    for part in ("site", "bank"):
        lines = [
            json.loads(x) for p in (tmp_path / "runs" / part).glob("E2*/episodes.jsonl") for x in p.open()
        ]
        own = [line["success"] for line in lines if line["memory"] == "pred"]
        rows = csv.DictReader((out / part / "results.csv").open())
        [row] = [
            r for r in rows if (r["arm"], r["memory"], r["seed"], r["suite"]) == ("E2", "pred", "all", "all")
        ]
        assert (int(row["successes"]), int(row["episodes"])) == (sum(own), 120)
        assert f"| {sum(own)}/120 " in page.split(f"## {part}:")[1].split("\n## ")[0]
    again = tmp_path / "again"
    shutil.copytree(out, again)
    report.publish(data, again)
    assert (again / "README.md").read_text() == page


def test_a_folder_without_parts_cannot_be_published(tmp_path):
    with pytest.raises(Refused, match="has no folders, which would be a study's parts"):
        report.publish(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="--publish takes one folder"):
        report.Config((tmp_path, tmp_path), publish=tmp_path)


@pytest.mark.skipif(not (RESULTS / "README.md").is_file(), reason="nothing is published yet")
def test_what_is_published_is_what_its_data_give_within_a_minute(tmp_path):
    copy = tmp_path / "results"
    shutil.copytree(RESULTS, copy, ignore=shutil.ignore_patterns("data"))
    begun = time.monotonic()
    report.publish(RESULTS / "data", copy)
    assert time.monotonic() - begun < 60
    for path in (RESULTS / "README.md", *RESULTS.glob("*/results.csv"), *RESULTS.glob("*/table.md")):
        assert (copy / path.relative_to(RESULTS)).read_text() == path.read_text(), path
