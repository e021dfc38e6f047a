"""What the measuring scripts share: their arguments, how a record begins, and how it is put down.

Every record says what was measured, when, with which code, versions and hardware. `beside.py` runs a script of another
checkout in turn with this one's, for figures before and after a change.
"""

import argparse
import subprocess
from pathlib import Path
from typing import Any

from fastnnunet.specs.provenance import hardware, now_utc, versions, write_json

CHECKOUT = Path(__file__).resolve().parents[2]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring as it is written and takes `-o`, the record to be written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, metavar="RECORD", help="the JSON record to be written")
    return parser


def model_arguments(description: str | None) -> argparse.ArgumentParser:
    """As `arguments`, with the data set and configuration whose teacher or student is measured."""
    parser = arguments(description)
    parser.add_argument("-d", default="4", help="data set: id or name")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    return parser


def training_arguments(description: str | None) -> argparse.ArgumentParser:
    """As `model_arguments`, with the fold and the place of the cache of a training."""
    parser = model_arguments(description)
    parser.add_argument("-f", type=int, default=0, help="fold")
    parser.add_argument("--cache-root", type=Path, help="where the cache is, if not beside the preprocessed cases")
    return parser


def header(what: str | None = None, *, packages: dict[str, str] | None = None) -> dict[str, Any]:
    """The head of a record; `packages` are versions that matter to this measurement besides the usual ones."""
    head = {"what": what} if what else {}
    return head | {
        "created": now_utc(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions() | (packages or {}),
    }


def commit(checkout: Path = CHECKOUT) -> str | None:
    """The commit that is measured, with `+` where files differ from it; None where there is no git."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def put(record: Any, path: Path) -> None:
    """Write the record, whole or not at all, and say where it is."""
    write_json(path, record)
    print(f"record: {path}")
