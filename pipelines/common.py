"""What the stage scripts share: errors as one message, names of student bundles."""

from pathlib import Path

from fastnnunet.cli.guard import guarded as run

__all__ = ["bundle_folder", "run"]


def bundle_folder(root: Path, dataset_name: str, configuration: str, fold: int, r: int) -> Path:
    """Where `make export` puts a bundle and `make benchmark` looks for it."""
    return root / f"{dataset_name}_{configuration}_fold{fold}_r{r}"
