"""What MkDocs does not do by itself: README.md is the front page, pages lie beside mkdocs.yml, links may leave docs/.

Pages are written for whoever reads them in the checkout, so their links are paths in it. Here each is turned into the
place that file has in the site; records and pictures of pipelines/results become part of it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from reference import pages as reference_pages

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the target of a link or picture, without its anchor


def sources() -> dict[str, str]:
    """Path in the checkout -> path in the site, of every file that is written by hand or by a measurement."""
    found = {"README.md": "index.md"}
    found |= {name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    pages = (*DOCS.glob("*.md"), *DOCS.glob("guides/*.md"), *DOCS.glob("design/*.md"))
    found |= {path.relative_to(ROOT).as_posix(): path.relative_to(DOCS).as_posix() for path in pages}
    found |= {p.relative_to(ROOT).as_posix(): p.relative_to(DOCS).as_posix() for p in DOCS.glob("notebooks/*.ipynb")}
    records = (ROOT / "pipelines" / "results").iterdir()
    return found | {path.relative_to(ROOT).as_posix(): f"records/{path.name}" for path in records}


def relinked(markdown: str, here: str, there: str, places: dict[str, str]) -> str:
    """The text of the file `here` in the checkout with links for its place `there` in the site."""

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[0]))
        return posixpath.relpath(places[target], posixpath.dirname(there) or ".") if target in places else link[0]

    return LINK.sub(moved, markdown)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, what they refer to, and the reference, which is made from the code."""
    places = sources()
    for here, there in places.items():
        text = ROOT / here
        if there.endswith(".md"):
            content = relinked(text.read_text(encoding="utf-8"), here, there, places)
            files.append(File.generated(config, there, content=content))
        else:
            files.append(File.generated(config, there, abs_src_path=str(text)))
    for there, content in reference_pages().items():
        files.append(File.generated(config, there, content=content))
    return files
