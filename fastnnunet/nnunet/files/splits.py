"""nnU-Net's cross-validation splits."""

from pathlib import Path

from fastnnunet.errors import CorruptError, MismatchError
from fastnnunet.specs.checks.json_text import read_json


def load_splits(preprocessed_base: Path, case_ids: tuple[str, ...]) -> list[dict[str, list[str]]]:
    """`splits_final.json` if it is there, else the five folds nnU-Net would write (seed 12345). Writes nothing."""
    path = preprocessed_base / "splits_final.json"
    if path.is_file():
        try:
            splits = read_json(path)
            return [{"train": list(s["train"]), "val": list(s["val"])} for s in splits]
        except (ValueError, TypeError, KeyError) as e:
            raise CorruptError(f"{path} is no nnU-Net splits file: {e}\ncorrect it, or delete it for five folds") from e
    if len(case_ids) < 5:
        raise MismatchError(
            f"five folds need at least 5 cases, got {len(case_ids)}\n"
            f"write your own splits_final.json in {preprocessed_base}"
        )
    from fastnnunet.nnunet.v2 import generate_crossval_split

    return list(generate_crossval_split(sorted(case_ids), seed=12345, n_splits=5))


def split_of(preprocessed_base: Path, case_ids: tuple[str, ...], fold: int | str) -> dict[str, list[str]] | None:
    """The split a fold trains on; None for `all` and for folds beyond the file, which nnU-Net makes itself."""
    if isinstance(fold, str):
        return None
    splits = load_splits(preprocessed_base, case_ids)
    return splits[fold] if fold < len(splits) else None
