"""The page: one valid file that needs nothing else, whatever the runs' files hold."""

import base64
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from study import config_of, episode_lines, offline_line, write_picture, write_run, write_study, write_video

from report import __main__ as report
from report import figures, page, reading
from report.page import Media, Record, Section, Shot, Table, Text

VOID = {"meta", "img", "br", "path", "use", "circle", "rect", "line", "polygon"}
NASTY = '<b>&"x'


class Reader(HTMLParser):
    """Reads a page strictly: every element that opens closes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID - {"path", "use", "circle", "rect", "line", "polygon"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert tag in VOID or tag in ("g", "defs")
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def table_of(table: Table) -> str:
    return page.page("T", "", [Section("S", [table])], Path())


def make(root: Path, out: Path | None = None) -> tuple[str, Reader]:
    runs, _ = reading.load_runs((root,))
    report.write_report(runs, out or root / "report", "study")
    text = ((out or root / "report") / "report.html").read_text()
    return text, Reader(text)


def run_of(root: Path, arm: str, logged: bool = False, **more) -> Path:
    """Write one evaluated run; with what training logged only where a test needs the many figures of it."""
    config = config_of(arm, 0, "late", 64_000) | more
    episodes = episode_lines({"pred": 0.9, "off": 0.3}, ("libero_goal",), 2, 3, 0, "step_000100")
    folder = write_run(root / re.sub(r"\W", "", arm), config, episodes)
    if not logged:
        (folder / "metrics.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, str, Reader]:
    root = tmp_path_factory.mktemp("page") / "study"
    write_study(root, arms=5, seeds=2, budgets=(64_000,), tasks=2, states=2)
    run_of(root, "late", total_samples=128_000)
    return root, *make(root)


# ---- the whole


@pytest.mark.slow
def test_the_page_is_balanced_its_ids_are_unique_and_its_links_lead_somewhere(study):
    root, text, read = study
    assert text.startswith("<!doctype html>")
    assert len(read.ids) == len(set(read.ids)) > 100
    for tag in ("a", "use"):
        for href in (attrs["href"] for attrs in read.all(tag)):
            assert href[1:] in read.ids if href[0] == "#" else (root / "report" / href).is_file(), href
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(read.ids)


def test_the_page_loads_nothing_and_runs_nothing(study):
    _, text, read = study
    assert not re.search(r"https?://|//[a-z]+\.|@import|javascript:", re.sub(r"base64,[\w+/=]+", "", text))
    assert not {"script", "iframe", "link", "object", "embed"} & {tag for tag, _ in read.tags}
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on")]
    sources = [attrs["src"] for tag in ("img", "video") for attrs in read.all(tag)]
    assert sources and all(source.startswith("data:") for source in sources)


def test_each_budget_and_what_is_from_elsewhere_has_a_panel_with_its_figures(study):
    root, text, read = study
    said = "".join(read.words)
    for title in ("64,000 training samples", "128,000 training samples", "Checkpoints from elsewhere"):
        assert said.count(title) >= 2  # in the contents too
    names = [
        "success",
        "dose",
        "suites",
        "growth",
        "curves",
        "held_out",
        "offline",
        "gates",
        "world",
        "attention",
        "bank",
    ]
    for name in names:
        for kind in ("png", "svg"):
            assert (root / "report" / f"{name}_64000.{kind}").stat().st_size > 2000
        assert f'href="{name}_64000.svg"' in text
    assert len(read.all("svg")) == len(names) + 3  # success of the bare run; and suites, from elsewhere


def test_every_figure_says_what_was_logged(study):
    root, _, _ = study
    drawn = {path.stem: path.read_text() for path in (root / "report").glob("*_64000.svg")}
    assert all(f">{mode}<" in drawn["held_out_64000"] for mode in ("off", "pred", "zero", "oracle"))
    assert "baseline: linear extrapolation" in drawn["world_64000"] and "future step" in drawn["world_64000"]
    assert "entropy over hypotheses" in drawn["attention_64000"]
    assert "hypotheses in use" in drawn["bank_64000"]
    assert "world_gate_suffix_in" in drawn["gates_64000"] and "-0.0400" in drawn["offline_64000"].replace(
        "−", "-"
    )


def test_the_page_shows_every_number_of_a_figure_as_it_was_drawn(study):
    root, text, _ = study
    drawn = (root / "report" / "offline_64000.svg").read_text()
    shown = page.inline_svg(root / "report" / "offline_64000.svg", "offline_64000", "")
    words = [re.findall(r"<text[^>]*>([^<]*)</text>", source) for source in (drawn, shown)]
    assert words[0] == words[1] and shown.split(">", 1)[1] in text
    assert any(re.search(r"\d\.\d{4}", word) for word in words[0])


def test_ink_follows_the_page_and_grounds_are_transparent(study):
    root, text, _ = study
    assert page.INK == figures.INK not in text and "currentColor" in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    from PIL import Image

    with Image.open(root / "report" / "success_64000.png") as picture:
        assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] == 0


def test_the_same_runs_make_the_same_page(tmp_path):
    run_of(tmp_path / "runs", "E2")
    assert make(tmp_path / "runs", tmp_path / "a")[0] == make(tmp_path / "runs", tmp_path / "b")[0]


def test_an_arm_with_several_sites_has_a_line_for_each(tmp_path):
    folder = run_of(tmp_path, "both", fusion=["late", "suffix_in"])
    line = {"samples": 64, "late/attn_pmax": 0.2, "suffix_in/attn_pmax": 0.4}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    make(tmp_path)
    drawn = (tmp_path / "report" / "attention_64000.svg").read_text()
    assert ">both late<" in drawn and ">both suffix_in<" in drawn


# ---- what files may hold


def test_what_comes_from_files_is_escaped_everywhere(tmp_path):
    folder = run_of(tmp_path / "runs", NASTY, logged=True, world_encoder=NASTY)
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    for row in rows:
        row["task"] = NASTY
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "offline.jsonl").write_text(json.dumps(offline_line()) + "\n")
    write_picture(folder / "videos" / "step_000100-pred-libero_goal-task0-init0-success.png")
    text, read = make(tmp_path / "runs")
    assert "<b>&" not in text and read.all("b") == [a for a in read.all("b") if not a]
    assert "".join(read.words).count(NASTY) > 10
    assert NASTY in (tmp_path / "runs" / "report" / "table.md").read_text()


def test_arms_with_signs_that_drawing_reads_as_orders_are_drawn(tmp_path):
    for arm in ("_hidden", "$x_{1", "a|b"):
        run_of(tmp_path, arm, logged=arm[0] != "a")
    text, _ = make(tmp_path)
    assert text.count("_hidden") > 5 and "$x_{1" in text
    assert "| a\\|b " in (tmp_path / "report" / "table.md").read_text()


def test_a_picture_that_was_cut_off_is_linked_only(tmp_path):
    folder = run_of(tmp_path / "runs", "E2")
    whole = folder / "imagined" / "step_000100-pred-libero_goal-task0-init0.png"
    write_picture(whole)
    broken = whole.with_name("step_000100-pred-libero_goal-task0-init1.png")
    broken.write_bytes(whole.read_bytes()[:300])
    text, read = make(tmp_path / "runs")
    assert len(read.all("img")) == 1
    assert "1 pictures and 0 videos" in text and f'href="../E2/imagined/{broken.name}"' in text


# ---- pictures and videos


def test_videos_are_embedded_while_the_budget_lasts_and_linked_beyond(tmp_path, monkeypatch):
    folder = run_of(tmp_path / "runs", "E2")
    for state, verdict in enumerate(("success", "failure", "failure")):
        stem = folder / "videos" / f"step_000100-pred-libero_goal-task0-init{state}-{verdict}"
        write_video(stem.with_suffix(".mp4"))
        write_picture(stem.with_suffix(".png"))
    videos = sorted((folder / "videos").glob("*.mp4"))
    monkeypatch.setattr(page, "VIDEO_BYTES", videos[0].stat().st_size + videos[1].stat().st_size)
    text, read = make(tmp_path / "runs")
    held = [base64.b64decode(attrs["src"].split(",")[1]) for attrs in read.all("video")]
    assert held == [videos[0].read_bytes(), videos[1].read_bytes()]
    assert all(
        a["preload"] == "none" and a["poster"].startswith("data:image/webp") for a in read.all("video")
    )
    assert len(read.all("img")) == 1  # the filmstrip of the one that is linked
    assert f'href="../E2/videos/{videos[2].name}"' in text and "0 pictures and 1 videos" in text


def test_contact_sheets_are_shown_and_single_decisions_and_older_checkpoints_are_not(tmp_path):
    folder = run_of(tmp_path / "runs", "E2")
    stem = "step_000100-pred-libero_goal-task1-init2"
    for name in (stem, f"{stem}_d000", stem.replace("100-", "050-"), "notes"):
        write_picture(folder / "imagined" / f"{name}.png", 1500, 300)
    _, read = make(tmp_path / "runs")
    [picture] = read.all("img")
    assert "libero_goal task 1, init state 2, memory pred" in picture["alt"]
    width = page.Image.open(page.io.BytesIO(base64.b64decode(picture["src"].split(",")[1]))).width
    assert width == page.WIDEST


def test_every_arm_gets_a_picture_before_any_gets_its_second(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for seed, path in enumerate(paths):
        write_picture(path, seed=seed)
    sizes = [len(page.shrink(path)) for path in paths]
    monkeypatch.setattr(page, "PICTURE_BYTES", sizes[0] + sizes[2] + 10)
    shots = [Shot("", path) for path in paths]
    held = page.embed([Media("A", shots[:2]), Media("B", shots[2:])])
    assert set(held) == {paths[0], paths[2]}


# ---- blocks


def test_columns_of_numbers_stand_flush_right():
    table = Table(
        ("arm", "rate", "p", "what"), [("E0", "3/4 (1 to 2)", "< 0.001", "3 of 4"), ("E1", "-", "", "x")]
    )
    assert re.findall(r'<th scope="col"( class="n")?>', table_of(table)) == [
        "",
        ' class="n"',
        ' class="n"',
        "",
    ]


@pytest.mark.parametrize(
    ("cell", "numeric"),
    [
        *(
            (x, True)
            for x in ("33/40", "+12 (-3 to +28)", "1,955,105", "< 0.001", "-", "", "nan", "60 80 75", "3 %")
        ),
        *(
            (x, False)
            for x in ("E2", "3 of 4", "12e", "to be", "seed 1", "1" * 26 + "a", "1 " * 40_000 + "x")
        ),
    ],
)
def test_cells_of_numbers_are_told_from_names_in_no_time(cell, numeric):
    started = time.perf_counter()
    html = table_of(Table(("a", "b"), [("x", cell)]))
    assert ('<td class="n">' in html) == numeric and time.perf_counter() - started < 1


def test_both_renderers_show_every_block(tmp_path):
    table = Table(("a", "b"), [("x", "1")], "**b**: a number", "Title")
    blocks = [Text("with `code`"), table, Record("Kept", '{"k": 1}'), Record("Rows", table)]
    text = page.page("T", "lead", [Section("S", blocks)], tmp_path)
    Reader(text)
    assert "<code>code</code>" in text and "<b>b</b>" in text and text.count("<table>") == 2
    assert "<summary>Kept</summary><pre>{&#34;k&#34;: 1}</pre>" in text
    written = page.markdown("T", [Section("S", blocks)], tmp_path)
    assert written.count("| x | 1 |") == 2 and '```json\n{"k": 1}\n```' in written
