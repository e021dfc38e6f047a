"""What the stage scripts share: errors as one message, names of student bundles."""

import sys
from collections.abc import Callable
from pathlib import Path

from fastnnunet.errors import FastnnUNetError


def run(stage: Callable[[], None]) -> None:
    """Run a stage; a FastnnUNetError becomes one message and exit code 2."""
    try:
        stage()
    except FastnnUNetError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def bundle_folder(root: Path, dataset_name: str, configuration: str, fold: int, r: int) -> Path:
    """Where `make export` puts a bundle and `make benchmark` looks for it."""
    return root / f"{dataset_name}_{configuration}_fold{fold}_r{r}"
