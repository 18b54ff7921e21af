"""Who may import whom: imports go down the floors, never up, never in a circle; files and doors stay small.

The floors are those of docs/architecture.md. An import inside a function or under TYPE_CHECKING counts too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion import SITES
from prophet import METHODS

ROOT = Path(__file__).resolve().parent.parent
# From the top floor down; what shares a line may not import one another.
FLOORS = (
    ("bench",),
    ("train", "eval"),
    ("rollouts",),
    ("training",),
    ("data",),
    ("arm",),
    ("latents",),
    ("model", "readers", "matrix"),
    ("smolvla", "simulator"),
    ("fusion", "prophet", "ranks", "report"),
    ("files",),
)
ROOMS = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
AT_THE_ROOT = {
    "train.py", "eval.py", "model.py", "fusion.py", "prophet.py", "data.py", "arm.py", "files.py", "ranks.py",
    "matrix.py", "run_matrix.sh", "setup.sh", "pyproject.toml", "README.md", "LICENSE", "docs", "tests",
    "smolvla", "readers", "latents", "simulator", "training", "rollouts", "report", "bench",
    "results", ".ci", ".git", ".gitignore",
}  # fmt: skip
LEFT_BY_USE = {
    ".venv",
    "data",
    "runs",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    "inspect.png",
}
MOST_LINES = 600


def code() -> list[Path]:
    """The files that are not tests."""
    rooms = [ROOT / room for room in ROOMS]
    return [*sorted(ROOT.glob("*.py")), *(path for room in rooms for path in sorted(room.glob("*.py")))]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(text: str, of: str) -> set[str]:
    """Name what a module's text imports of ours, each module by its dotted name."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{of} imports relative to itself: name the room"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in ROOMS}


def complaints(texts: dict[str, str]) -> list[str]:
    """Name every import that goes up or across, and every circle; texts: module -> its source."""
    arrows = {name: imports(text, name) for name, text in texts.items()}
    found = []
    for name, targets in arrows.items():
        room = name.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            if other != room and ROOMS[other] >= ROOMS[room]:
                found.append(f"{name} imports {target}, which does not lie below it")
    return found + circles(arrows)


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Name each module that reaches itself."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for target in arrows.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    return [f"{name} imports itself in a circle" for name in arrows if name in reach(name)]


def test_imports_go_down_the_floors_and_never_in_a_circle():
    assert complaints({module(path): path.read_text() for path in code()}) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("smolvla.layers", "from model import SmolVLA"),
        ("report.stats", "def f():\n    import eval"),
        ("readers.demos", "from readers import load"),
        (
            "training.start",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from train import TrainConfig",
        ),
        ("fusion", "from prophet import Prophet"),
    ],
)
def test_an_import_that_goes_up_across_or_in_a_circle_is_found(name, line):
    texts = {module(path): path.read_text() for path in code()}
    assert any(name in said for said in complaints(texts | {name: texts[name] + "\n" + line}))


def test_the_root_holds_what_a_reader_is_promised_and_nothing_else():
    there = {path.name for path in ROOT.iterdir()} - LEFT_BY_USE
    assert {name for name in there if not name.endswith(".egg-info")} <= AT_THE_ROOT


@pytest.mark.parametrize("path", code(), ids=module)
def test_no_file_is_longer_than_one_can_read_at_a_sitting(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if (ROOT / room).is_dir() and room not in LEFT_BY_USE]
)
def test_a_folders_door_says_what_lives_there_and_hands_on_names_alone(room):
    body = ast.parse((ROOT / room / "__init__.py").read_text()).body
    assert ast.get_docstring(ast.Module(body, [])), f"{room}/__init__.py does not say what lives there"
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in body[1:])


def test_only_what_a_person_gave_is_told_in_one_line():
    """Own errors keep their traceback; what fusion.py and prophet.py raise, arm.py passes on."""
    apart = ("fusion.py", "prophet.py", "report/")
    found = [path for path in code() if not str(path.relative_to(ROOT)).startswith(apart)]
    assert [module(path) for path in found if "raise ValueError(" in path.read_text()] == []


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield what a file says: its strings, docstrings and parts of f-strings among them, without commands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, re.sub(r"--fusion \w+", "", node.value)


@pytest.mark.parametrize("path", [path for path in code() if path.name != "fusion.py"], ids=module)
def test_no_file_but_its_own_names_a_site(path):
    """Commands to type may: they need one as an example. `late` alone is an English word."""
    names = {name for site in SITES.values() for name in (site.name, site.gate_name)} - {"late", "world_gate"}
    named = re.compile(rf"\b({'|'.join(names)})\b|^late$|^late/|`late`|world_gate_\w")
    assert [(line, word) for line, word in words_of(path) if named.search(word)] == []


@pytest.mark.parametrize(
    "path", [p for p in code() if p.name != "prophet.py" and p.parent.name != "bench"], ids=module
)
def test_no_file_but_its_own_names_a_hypothesis_method(path):
    """What is measured needs one as an example; samples have noise and training dropout, too."""
    names = METHODS.keys() - {"none", "noise", "dropout"}
    assert [(line, word) for line, word in words_of(path) if word in names] == []


def test_every_file_that_a_text_names_is_there():
    """What a docstring or a page tells a reader to run."""
    named = {}
    for pattern in ("*.md", "*.sh", "docs/*.md", *(f"{place}*.py" for place in ("", "*/", "tests/*/"))):
        for path in ROOT.glob(pattern):
            if ".venv" not in path.parts:
                found = re.findall(r"\b(?:tests|docs)/[a-z_/0-9]+\.(?:py|sh|md)\b", path.read_text())
                named |= dict.fromkeys(found, path.name)
    assert len(named) > 50
    assert not {name: where for name, where in named.items() if not (ROOT / name).is_file()}
