"""A page that needs no other file, and its elements, as texts of HTML. Readable on a phone and in print, light and dark."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

CSS = """
:root { --page: #fefefd; --ink: #1c1c1b; --soft: #5d5d5a; --grid: #dededc; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #191a1b; --ink: #e6e6e3; --soft: #a4a4a0; --grid: #3c3d3e; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; } p, h1, dd { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin-bottom: .3rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { font-size: 1.05rem; } .soft, figcaption { color: var(--soft); } figcaption { font-size: .9rem; }
figure { margin: 1rem 0 2rem; } figure svg, figure img { width: 100%; height: auto; } figure.narrow { max-width: 38rem; }
.pixels { image-rendering: pixelated; }
.side { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.side figure { margin: .7rem 0; min-width: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; } th { font-weight: 600; vertical-align: bottom; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1rem; font-size: .9rem; }
dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
summary { cursor: pointer; } a { color: inherit; }
@media (max-width: 40rem) { figure.scroll { overflow-x: auto; } figure.scroll > svg, figure.scroll > img { width: 40rem; } }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --grid: #ccc; }
  body { margin: 0; max-width: none; font-size: 10pt; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""
LARGEST_PICTURE = 400_000  # bytes of a file that is embedded as it is
WIDEST_PICTURE = 1200  # pixels of a larger one


def page(title: str, body: str) -> str:
    """The page. title: text; body: HTML."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{CSS}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def image(path: Path, description: str) -> str:
    """The <img> element of a picture file, which it contains; a large picture is scaled down and stored as JPEG."""
    data, kind = path.read_bytes(), "png"
    if len(data) > LARGEST_PICTURE:
        with Image.open(path) as picture:
            picture.thumbnail((WIDEST_PICTURE, 10 * WIDEST_PICTURE))
            file = io.BytesIO()
            picture.convert("RGB").save(file, "JPEG", quality=88)
        data, kind = file.getvalue(), "jpeg"
    text = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(description, quote=True)}" src="data:image/{kind};base64,{text}">'


def figure(content: str, caption: str, kind: str = "") -> str:
    """A <figure> with its caption, both HTML. kind: a class of the style sheet: "narrow", or "scroll" (wide also on a phone)."""
    name = f' class="{kind}"' if kind else ""
    return f"<figure{name}>{content}<figcaption>{caption}</figcaption></figure>"


def side_by_side(figures: Iterable[str]) -> str:
    """Figures in one row where there is room, else below one another."""
    return f'<div class="side">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways where it does not fit. The cells are HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return (
        '<div class="wide"><table><thead><tr>'
        + "".join(f"<th>{html.escape(name)}</th>" for name in head)
        + "</tr></thead><tbody>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table></div>"
    )


def facts(values: Mapping[str, Any]) -> str:
    """A list of names and values."""
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in values.items()) + "</dl>"


def paragraphs(*texts: str) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def details(summary: str, content: str) -> str:
    """HTML that is shown on a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"
