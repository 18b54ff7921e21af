"""Lays a report out: as one HTML file that needs nothing else, and as markdown.

What a report holds is a list of sections, each a list of blocks: text, tables, plots, media, records. Both
renderers walk over the same list. The HTML has no script and loads nothing: plots are inline SVG whose ink
follows the page's; pictures, shrunk, and videos are embedded while a budget lasts and linked beyond.

    python -m report runs/demo          # -> runs/demo/report/report.html, table.md
    pytest tests/report/test_page.py
"""

import base64
import html
import io
import os
import re
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

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
            return f"![{name}]({name}.png)\n\n{caption}"
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


def inline_svg(path: Path, name: str, label: str) -> str:
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
    return f'<svg {box} role="img" aria-label="{html.escape(label)}">{body.strip()}'


# --------------------------------------------------------------------------------------------------
# HTML

WORDS = re.compile(r"\b(to|nan)\b")  # that may stand in a number's cell
NUMBER = re.compile(r"[-+~<\d.,/%() ]*")  # one class: time grows with a cell's length and no faster


def words(text: str) -> str:
    """Escape text; what stands between backticks is code, between double asterisks bold."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


def html_table(table: Table) -> str:
    """Return a table in a box of its own that scrolls sideways; columns of numbers stand flush right."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    numeric = [all(NUMBER.fullmatch(WORDS.sub("", str(c))) for c in column) for column in columns]
    marks = [' class="n"' if n else "" for n in numeric]
    head = "".join(
        f'<th scope="col"{mark}>{words(str(c))}</th>' for c, mark in zip(table.header, marks, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(html_cell(table, i, j, marks[j]) for j in range(len(row)))}</tr>\n"
        for i, row in enumerate(table.rows)
    )
    title = f"<h4>{words(table.title)}</h4>" if table.title else ""
    notes = f'<p class="notes">{words(table.notes)}</p>' if table.notes else ""
    kind = "box heat" if table.heat else "box"
    label = html.escape(table.title or " ".join(map(str, table.header[:2])))
    return (
        f'{title}<div class="{kind}" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{notes}"
    )


def html_cell(table: Table, i: int, j: int, mark: str) -> str:
    """Return cell j of row i; the first names the row, and heat colours those that have a rate."""
    text = words(str(table.rows[i][j]))
    if j == 0:
        return f'<th scope="row"{mark}>{text}</th>'
    if table.heat is None or (i, j) not in table.heat:
        return f"<td{mark}>{text}</td>"
    shade, (big, _, small) = 0.08 + 0.6 * table.heat[i, j], text.partition(" ")
    return f'<td class="n" style="--heat:{shade:.2f}">{big}<small>{small}</small></td>'


def html_plot(plot: Plot, out: Path) -> str:
    """Return a figure, in a box that scrolls sideways where the figure would become too small to read."""
    svg = inline_svg(out / f"{plot.name}.svg", plot.name, plot.caption)
    points = float(re.search(r'viewBox="([^"]*)"', svg).group(1).split()[2])
    least = 0.8 * points if plot.wide else min(0.8 * points, 320)  # pixels that text is readable at
    size = f"max-width:{1.45 * points:.0f}px;min-width:{least:.0f}px"
    kind = "plot wide" if plot.wide else "plot"
    return (
        f'<figure class="{kind}"><div class="box" tabindex="0" role="region" aria-label="{plot.name}">'
        f'<div style="{size}">{svg}</div></div><figcaption>{words(plot.caption)} '
        f'<a href="{plot.name}.svg">SVG</a> <a href="{plot.name}.png">PNG</a></figcaption></figure>'
    )


def html_shot(shot: Shot, held: dict[Path, str], out: Path) -> str:
    """Return a picture, a video with its filmstrip as poster, or links to what does not fit."""
    caption, parts = words(shot.caption), []
    picture = held.get(shot.picture)
    if shot.video in held:
        poster = f' poster="{picture}"' if picture else ""
        parts.append(f'<video controls playsinline preload="none"{poster} src="{held[shot.video]}"></video>')
    elif picture:
        parts.append(f'<img loading="lazy" alt="{html.escape(shot.caption)}" src="{picture}">')
    missing = [path for path in files(shot) if path not in held]
    links = " ".join(f'<a href="{link(path, out)}">{html.escape(path.name)}</a>' for path in missing)
    return f'<figure class="shot">{"".join(parts)}<figcaption>{caption} {links}</figcaption></figure>'


def html_block(block: object, held: dict[Path, str], out: Path) -> str:
    """Return a block as HTML; `held` has the files that are embedded."""
    match block:
        case Text(text):
            return f"<p>{words(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{words(item)}</li>" for item in items) + "</ul>"
        case Table():
            return html_table(block)
        case Plot():
            return html_plot(block, out)
        case Record(title, body):
            inside = html_table(body) if isinstance(body, Table) else f"<pre>{html.escape(body)}</pre>"
            return f"<details><summary>{words(title)}</summary>{inside}</details>"
        case Media(title, shots):
            shown = "\n".join(html_shot(shot, held, out) for shot in shots)
            return f'<h4>{words(title)}</h4><div class="shots">{shown}</div>'
    raise AssertionError(f"{type(block).__name__} is no block")


def html_section(section: Section, number: int, held: dict[Path, str], out: Path) -> str:
    """Return a section; plots that follow one another stand side by side where there is room."""
    parts, row = [], []
    for block in [*section.blocks, None]:
        if isinstance(block, Plot):
            row.append(html_block(block, held, out))
            continue
        if row:
            parts.append(f'<div class="plots">{"".join(row)}</div>')
            row = []
        if block is not None:
            parts.append(html_block(block, held, out))
    tag = f"h{section.level}"
    body = "\n".join(parts)
    return f'<section id="s{number}"><{tag}>{words(section.title)}</{tag}>\n{body}\n</section>'


def contents(sections: list[Section]) -> str:
    """Return the table of contents: sections, and under each its own."""
    items = []
    for number, section in enumerate(sections):
        kind = "top" if section.level == 2 else "sub"
        items.append(f'<li class="{kind}"><a href="#s{number}">{words(section.title)}</a></li>')
    return f'<nav aria-label="contents"><ol>{"".join(items)}</ol></nav>'


def left_out(galleries: list[Media], held: dict[Path, str]) -> str:
    """Say how many pictures and videos are only linked."""
    shots = [shot for gallery in galleries for shot in gallery.shots]
    pictures = sum(shot.picture is not None and shot.picture not in held for shot in shots)
    videos = sum(shot.video is not None and shot.video not in held for shot in shots)
    if not pictures + videos:
        return ""
    return f"Not embedded, to keep this file small: {pictures} pictures and {videos} videos; they are linked."


def page(title: str, lead: str, sections: list[Section], out: Path) -> str:
    """Return the report as one HTML file; plots are read from `out`, media from where they lie."""
    galleries = [block for section in sections for block in section.blocks if isinstance(block, Media)]
    held = embed(galleries)
    body = "\n".join(html_section(section, n, held, out) for n, section in enumerate(sections))
    foot = " ".join(
        filter(None, ["Made by report/__main__.py from JSON lines; no script.", left_out(galleries, held)])
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{words(title)}</h1><p class="lead">{words(lead)}</p></header>
{contents(sections)}
<main>
{body}
<footer>{words(foot)}</footer>
</main>
</body>
</html>
"""


CSS = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2024; --soft: #60666d; --rule: #dfe2e6;
  --lift: #f5f6f8; --link: #0b5cad; --hot: 0 114 178; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --ink: #e4e6e9; --soft: #9aa1a9; --rule: #30353b; --lift: #1c2024;
    --link: #7db8ee; --hot: 64 150 214; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
header, main, nav { min-width: 0; max-width: 74rem; padding: 0 clamp(1rem, 4vw, 3rem); }
header { padding-top: 1.5rem; }
main { padding-bottom: 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; margin: 3.5rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
h4 { font-size: .95rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.lead { color: var(--soft); font-size: 1.05rem; margin-top: 0; }
.notes, figcaption { color: var(--soft); font-size: .82rem; line-height: 1.5; overflow-wrap: anywhere; }
.notes { margin: .5rem 0 1.5rem; }
a { color: var(--link); text-decoration-thickness: 1px; text-underline-offset: 2px; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88em; }
pre { overflow-x: auto; background: var(--lift); padding: .8rem 1rem; border-radius: 6px; }
nav { font-size: .88rem; }
nav ol { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
nav li { max-width: none; }
nav .top { font-weight: 600; flex-basis: 100%; margin-top: .4rem; }
nav a { text-decoration: none; color: var(--soft); }
nav .top a { color: var(--ink); }
nav a:hover { text-decoration: underline; }
.box { overflow-x: auto; max-width: 100%; }
.box:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .3rem 0; }
th, td { padding: .32rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
td, tbody th { white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); vertical-align: bottom; border-bottom: 1px solid var(--soft);
  min-width: 3.2rem; max-width: 9rem; line-height: 1.3; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--ground); }
@media (max-width: 40rem) { tbody th { max-width: 8rem; white-space: normal; overflow-wrap: break-word; } }
td:not(.n) { max-width: 24rem; min-width: 7.5rem; white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover td, tbody tr:hover th { background-color: var(--lift); }
.n { text-align: right; }
.heat td[style] { background: rgb(var(--hot) / var(--heat)) !important; text-align: center; font-weight: 600;
  border: 2px solid var(--ground); padding: .25rem .5rem; }
.heat small { display: block; font-weight: 400; font-size: .72rem; opacity: .85; }
.plots { display: grid; gap: 1rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 1rem 0; min-width: 0; }
.plot.wide { grid-column: 1 / -1; }
.plot svg { display: block; width: 100%; height: auto; color: var(--soft); font-family: inherit; }
@media (max-width: 40rem) { .plot { overflow-x: auto; } .plot svg { min-width: 27rem; } }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
.plot svg text { fill: var(--ink); }
.shots { display: grid; gap: 1rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.shot { margin: .3rem 0; }
.shot img, .shot video { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.shot video { width: 100%; background: #000; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; overflow-wrap: anywhere; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .82rem; }
@media (min-width: 80rem) {
  body { display: grid; grid-template: auto 1fr / 15rem minmax(0, 1fr); }
  header, main { grid-column: 2; }
  nav { grid-area: 1 / 1 / span 2; position: sticky; top: 0; height: 100vh; overflow-y: auto;
    padding: 2rem 0 2rem 1.5rem; border-right: 1px solid var(--rule); }
  nav ol { display: block; }
  nav .top { margin-top: 1rem; }
  nav .sub { padding-left: .8rem; }
}
@media print {
  :root { --ground: #fff; --ink: #000; --soft: #444; --rule: #bbb; --lift: #fff; }
  body { display: block; font-size: 10.5pt; }
  nav { display: none; }
  main { max-width: none; padding: 0; }
  h2 { break-before: page; }
  h2, h3, h4 { break-after: avoid; }
  tr, .plot, .shot { break-inside: avoid; }
  .box, pre { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .35rem; }
  tbody th { position: static; }
  details::details-content { content-visibility: visible; height: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
