"""Lays a report out: as one HTML file that needs nothing else, and as markdown.

What a report holds is a list of sections, each a list of blocks: text, tables, plots, media, records. Both
renderers walk over the same list. The HTML has no script and loads nothing: plots are inline SVG whose ink
follows the page's; pictures, shrunk, and videos are embedded while a budget lasts and linked beyond. How it
looks stands in page.html, a template that escapes whatever comes from files.

    python -m report runs/demo          # -> runs/demo/report/report.html, table.md
    pytest tests/report/test_page.py
"""

import base64
import io
import os
import re
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

PICTURE_BYTES = 7_000_000  # of embedded pictures, before base64 makes 4 bytes of 3
VIDEO_BYTES = 9_000_000
WIDEST = 760  # pixels of an embedded picture
INK = "#7f858c"  # of figures.py: what of a figure takes the colour of the page's text


class Text(NamedTuple):
    text: str  # with `code` and **bold**


class Bullets(NamedTuple):
    items: list[str]


class Table(NamedTuple):
    """Cells as strings; `notes` explain what its words mean. `heat` gives a cell's success, 0 to 1."""

    header: tuple[str, ...]
    rows: list[tuple]
    notes: str = ""
    title: str = ""
    heat: dict[tuple[int, int], float] | None = None


class Plot(NamedTuple):
    """A figure that lies in the report's folder as NAME.png and NAME.svg."""

    name: str
    caption: str
    wide: bool = False
    kind: str = "png"  # as markdown shows it


class Record(NamedTuple):
    """What is folded away on the page: text as it stands, or a table."""

    title: str
    body: "str | Table"


class Shot(NamedTuple):
    """A picture of a rollout, or a video and, where there is one, its filmstrip."""

    caption: str
    picture: Path | None
    video: Path | None = None


class Media(NamedTuple):
    title: str
    shots: list[Shot]


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list
    level: int = 2


# --------------------------------------------------------------------------------------------------
# markdown


def markdown_table(table: Table) -> str:
    """Return a markdown table whose columns line up in a terminal too."""
    cells = [tuple(str(c).replace("|", "\\|") for c in row) for row in [table.header, *table.rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def markdown_block(block: object, out: Path) -> str:
    """Return a block as markdown; files are named relative to `out`."""
    match block:
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Table():
            title = f"{block.title}:" if block.title else ""
            return "\n\n".join(part for part in (title, markdown_table(block), block.notes) if part)
        case Plot(name, caption):
            return f"![{name}]({name}.{block.kind})\n\n{caption}"
        case Record(title, Table() as table):
            return f"{title}:\n\n{markdown_table(table)}"
        case Record(title, body):
            return f"{title}:\n\n```json\n{body}\n```"
        case Media(title, shots):
            lines = [f"- {shot.caption}: [{p.name}]({link(p, out)})" for shot in shots for p in files(shot)]
            return "\n".join([f"{title}:\n", *lines])
    raise AssertionError(f"{type(block).__name__} is no block")


def markdown(title: str, sections: list[Section], out: Path) -> str:
    """Return the report as markdown."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [markdown_block(block, out) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def files(shot: Shot) -> list[Path]:
    return [path for path in (shot.video, shot.picture) if path]


def link(path: Path, out: Path) -> str:
    return quote(os.path.relpath(path.resolve(), out.resolve()))


# --------------------------------------------------------------------------------------------------
# what is embedded


def shrink(path: Path) -> bytes | None:
    """Return a picture as WebP, at most WIDEST pixels wide; None for a file that is no whole picture."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):  # cut off, or made to fill the memory
        return None
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.LANCZOS)
    held = io.BytesIO()
    picture.save(held, "WEBP", quality=72)
    return held.getvalue()


def embed(galleries: list[Media]) -> dict[Path, str]:
    """Return file -> data URI while the two budgets last; each gallery's first shot before any's second."""
    left, found = {"image/webp": PICTURE_BYTES, "video/mp4": VIDEO_BYTES}, {}

    def put(path: Path | None, kind: str, content: bytes | None) -> None:
        if path and content and len(content) <= left[kind]:
            left[kind] -= len(content)
            found[path] = f"data:{kind};base64,{base64.b64encode(content).decode()}"

    for turn in zip_longest(*(gallery.shots for gallery in galleries)):
        for shot in filter(None, turn):
            put(shot.picture, "image/webp", shrink(shot.picture) if shot.picture else None)
            if shot.video and shot.video.stat().st_size <= left["video/mp4"]:
                put(shot.video, "video/mp4", shot.video.read_bytes())
    return found


# What matplotlib names without need, which would be on a page twice; what is referred to is named by a hash.
NEEDLESS = re.compile(r'<metadata>.*?</metadata>|<style.*?</style>| id="[A-Za-z.]+(2d)?_\d+"', re.S)


def inline_svg(path: Path, name: str, label: str) -> Markup:
    """Return an SVG file as an element of the page: its own ids, no namespaces, ink that follows the page."""
    text = NEEDLESS.sub("", path.read_text()).replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    box, body = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', text, re.S).groups()
    return Markup(f'<svg {box} role="img" aria-label="{escape(label)}">{body.strip()}')


# --------------------------------------------------------------------------------------------------
# HTML

NUMBER = re.compile(r"([-+~<\d.,/%() ]|\b(to|nan)\b)*+")  # possessive: time grows with a cell's length


def words(text: object) -> Markup:
    """Escape text; what stands between backticks is code, between double asterisks bold."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(str(text))))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text))


def numeric(table: Table) -> list[bool]:
    """Which columns hold numbers alone: they stand flush right."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    return [all(NUMBER.fullmatch(str(c)) for c in column) for column in columns]


def svg_of(plot: Plot, out: Path) -> dict:
    """Return a figure, and between which widths its text can be read."""
    svg = inline_svg(out / f"{plot.name}.svg", plot.name, plot.caption)
    points = float(re.search(r'viewBox="([^"]*)"', svg).group(1).split()[2])
    return {"svg": svg, "most": 1.45 * points, "least": 0.8 * points if plot.wide else min(0.8 * points, 320)}


def rows_of(section: Section) -> list[list]:
    """Group a section's blocks: plots that follow one another stand side by side where there is room."""
    together = lambda block: isinstance(block, Plot) or id(block)  # noqa: E731
    return [list(row) for _, row in groupby(section.blocks, together)]


def left_out(galleries: list[Media], held: dict[Path, str]) -> str:
    """Say how many pictures and videos are only linked."""
    linked = [path for one in galleries for shot in one.shots for path in files(shot) if path not in held]
    videos = sum(path.suffix == ".mp4" for path in linked)
    found = f"{len(linked) - videos} pictures and {videos} videos"
    return f"Not embedded, to keep this file small: {found}; they are linked." if linked else ""


def page(title: str, lead: str, sections: list[Section], out: Path) -> str:
    """Return the report as one HTML file; plots are read from `out`, media from where they lie.

    What is no Markup is escaped by the template.
    """
    galleries = [block for section in sections for block in section.blocks if isinstance(block, Media)]
    held = embed(galleries)
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters |= {"words": words, "numeric": numeric, "rows": rows_of, "files": files}
    env.filters |= {"svg": lambda plot: svg_of(plot, out), "link": lambda path: link(path, out)}
    env.tests["of"] = lambda block, name: type(block).__name__ == name
    return env.get_template("page.html").render(
        title=title, lead=lead, sections=sections, held=held, left_out=left_out(galleries, held)
    )
