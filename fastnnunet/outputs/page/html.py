"""Parts of a page that needs no other file: style, plots and pictures are inside."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from fastnnunet.outputs.page.style import STYLE
from fastnnunet.system.files import atomic_output, make_folder


def document(title: str, *parts: str) -> str:
    """The text of a page; `parts` are HTML, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or browsers ask for one
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_document(text: str, path: Path) -> None:
    """Write a page, whole or not at all. Raises FastnnUNetError when it cannot be written."""
    make_folder(path.parent)
    with atomic_output(path) as partial:
        # names of files may hold bytes that are no text
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def section(heading: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(content) + "\n</section>"


def box(content: str) -> str:
    """A box that scrolls when its content is wider than the page."""
    return f'<div class="box" tabindex="0">{content}</div>'


def plot_box(svg: str) -> str:
    return f'<div class="box plot" tabindex="0">{svg}</div>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def figure(picture: bytes, caption: str, alt: str) -> str:
    """Of a PNG or a JPEG."""
    data, kind = base64.b64encode(picture).decode(), "jpeg" if picture[:2] == b"\xff\xd8" else "png"
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def legend_list(entries: list[tuple[str, str]]) -> str:
    """Of (colour, name)."""
    items = "".join(
        f'<li><span class="swatch" style="background: {colour}"></span>{escape(name)}</li>' for colour, name in entries
    )
    return f'<ul class="legend">{items}</ul>'


def entries(pairs: Mapping[str, Any]) -> str:
    """What is what."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs.items()) + "</dl>"
