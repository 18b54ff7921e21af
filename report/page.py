"""Lays a report out: as one HTML file that needs nothing else, and as markdown.

What a report holds is a list of sections, each a list of blocks: text, tables, plots, media, records. Both
renderers walk over the same list. The HTML has no script and loads nothing: plots are inline SVG whose ink
follows the page's; pictures, shrunk, and videos are embedded while a budget lasts and linked beyond. How it
looks stands in page.html, a template that escapes whatever comes from files, and page.css.

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

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from PIL import Image

HERE = Path(__file__).parent
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


def coarse(tag: str) -> str:
    """Round a tag's coordinates to hundredths of a point, and let the page choose the font."""
    tag = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", tag)


def inline_svg(path: Path, name: str, label: str) -> Markup:
    """Return an SVG file as an element of the page: its own ids, no namespaces, ink that follows the page."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = text.replace("xlink:href", "href")
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head).group()
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in wanted else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"<[^>]+>", lambda m: coarse(m[0]), body)  # tags only: numbers in the text are results
    body = body.replace(INK, "currentColor")
    return Markup(f'<svg {box} role="img" aria-label="{escape(label)}">{body.strip()}')


# --------------------------------------------------------------------------------------------------
# HTML

WORDS = re.compile(r"\b(to|nan)\b")  # that may stand in a number's cell
NUMBER = re.compile(r"[-+~<\d.,/%() ]*")  # one class: time grows with a cell's length and no faster


def words(text: object) -> Markup:
    """Escape text; what stands between backticks is code, between double asterisks bold."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(str(text))))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text))


def numeric(table: Table) -> list[bool]:
    """Which columns hold numbers alone: they stand flush right."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    return [all(NUMBER.fullmatch(WORDS.sub("", str(c))) for c in column) for column in columns]


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
    shots = [shot for gallery in galleries for shot in gallery.shots]
    pictures = sum(shot.picture is not None and shot.picture not in held for shot in shots)
    videos = sum(shot.video is not None and shot.video not in held for shot in shots)
    if not pictures + videos:
        return ""
    return f"Not embedded, to keep this file small: {pictures} pictures and {videos} videos; they are linked."


def template() -> Template:
    """Open page.html; what is no Markup is escaped there."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    env.filters |= {"words": words, "numeric": numeric, "rows": rows_of, "files": files}
    env.tests["of"] = lambda block, name: type(block).__name__ == name
    return env.get_template("page.html")


def page(title: str, lead: str, sections: list[Section], out: Path) -> str:
    """Return the report as one HTML file; plots are read from `out`, media from where they lie."""
    galleries = [block for section in sections for block in section.blocks if isinstance(block, Media)]
    held = embed(galleries)
    return template().render(
        title=title, lead=lead, sections=sections, held=held, css=Markup((HERE / "page.css").read_text()),
        svg=lambda plot: svg_of(plot, out), link=lambda path: link(path, out),
        left_out=left_out(galleries, held),
    )  # fmt: skip
