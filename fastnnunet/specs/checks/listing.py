"""What lies in a folder: its files, and in words what else there is. Nothing is opened: a pipe would never answer."""

import os
import stat
from collections.abc import Collection
from pathlib import Path

from fastnnunet.errors import printable

# written beside segmentations by every prediction; nobody takes them for images
SIDE_FILES = frozenset({"dataset.json", "plans.json", "predict_from_raw_data_args.json", "DICOMDIR"})
_EXAMPLES = 3


def regular_files(folder: Path, ending: str = "") -> list[str]:
    """Names of the files of an ending, sorted, links to files among them; hidden ones are left out.

    macOS leaves hidden `._` twins of files.
    """
    return sorted(
        name
        for name in os.listdir(folder)
        if name.endswith(ending) and not name.startswith(".") and os.path.isfile(folder / name)
    )


def passed_over(folder: Path, taken: Collection[str], ending: str = "") -> list[str]:
    """A phrase for each kind of entry that is not `taken`, with their number and examples; hidden ones are left out.

    `ending`: what the names of files should end in.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if not name.startswith(".") and name not in taken and name not in SIDE_FILES:
            kinds.setdefault(_kind(folder / name, ending), []).append(name)
    return [f"{len(names)} {kind}: {examples(names)}" for kind, names in sorted(kinds.items())]


def examples(names: Collection[str]) -> str:
    """The first few names, fit for a line of a message."""
    shown = [printable(name) for name in list(names)[:_EXAMPLES]]
    return ", ".join([*shown, *(["..."] if len(names) > len(shown) else [])])


def _kind(path: Path, ending: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "broken link(s)" if path.is_symlink() else "that cannot be read"
    if stat.S_ISDIR(mode):
        return "folder(s)" if not ending or not path.name.endswith(ending) else f"folder(s) called like {ending} files"
    if not stat.S_ISREG(mode):
        return "pipe(s), socket(s) or device(s)"
    if not ending:
        return "other file(s)"
    if path.name.lower().endswith(ending.lower()) and not path.name.endswith(ending):
        return f"file(s) whose ending is not spelled {ending}"
    return f"file(s) that do not end in {ending}" if not path.name.endswith(ending) else "other file(s)"
