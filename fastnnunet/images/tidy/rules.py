"""Where rules for tidying label maps come from: nnU-Net's postprocessing.pkl and .json, and words on the command line.

A pickle can run any code when it is read. nnU-Net's holds `([function, ...], [its keyword arguments, ...])`, so plain
values are admitted, NumPy's integers among them, which are what nnU-Net's label manager has, and that one function,
which is never imported: its name stands for it.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import CorruptError, NotFoundError, SpecError
from fastnnunet.images.tidy.cleanup import Cleanup, KeepLargest, SizeUnit
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.checks.pickles import load_plain

_FUNCTION = "remove_all_but_largest_component_from_segmentation"
_MODULE = "nnunetv2.postprocessing.remove_connected_components"
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>voxels?|mm3|)")


def read_postprocessing(path: Path) -> tuple[KeepLargest, ...]:
    """The steps of a postprocessing.pkl or postprocessing.json that nnU-Net determined.

    Raises NotFoundError, CorruptError when the file is none of the two, SpecError for a step this package has not.
    """
    if not path.is_file():
        raise NotFoundError(
            f"postprocessing file not found: {path}\nnnUNetv2_determine_postprocessing and "
            "nnUNetv2_find_best_configuration write postprocessing.pkl"
        )
    try:
        if path.suffix == ".json":
            content = read_json_object(path)
            names, arguments = content["postprocessing_fns"], content["postprocessing_kwargs"]
        else:
            pickled = io.BytesIO(path.read_bytes())
            names, arguments = load_plain(pickled, {f"{_MODULE}.{_FUNCTION}": _FUNCTION})
        pairs = [(str(name), kwargs) for name, kwargs in zip(names, arguments, strict=True)]
    # a damaged pickle raises nearly anything
    except Exception as e:
        raise CorruptError(
            f"{path} is not a postprocessing file of nnU-Net ({type(e).__name__}: {e})\n"
            f"expected a pickle of {_FUNCTION} and its arguments, or postprocessing.json; nothing of it was run"
        ) from e
    return tuple(_step(path, name, kwargs) for name, kwargs in pairs)


def _step(path: Path, name: str, kwargs: Mapping[str, Any]) -> KeepLargest:
    known = {"labels_or_regions", "background_label"}
    if name != _FUNCTION or not isinstance(kwargs, dict) or "labels_or_regions" not in kwargs or set(kwargs) - known:
        raise SpecError(
            f"{path} asks for {name} with {kwargs}, expected {_FUNCTION} with labels_or_regions\n"
            "apply it with nnUNetv2_apply_postprocessing"
        )
    try:
        return KeepLargest(_flat(kwargs["labels_or_regions"]), int(kwargs.get("background_label", 0)))
    except (TypeError, ValueError) as e:
        raise CorruptError(f"{path}: labels_or_regions and background_label: got {kwargs}, expected integers") from e


def _flat(labels: Any) -> tuple[int, ...]:
    """A label, a region or a list of both: nnU-Net joins them all into one mask."""
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if isinstance(labels, list | tuple):
        return tuple(label for item in labels for label in _flat(item))
    return (int(labels),)


def cleanup_from_words(
    labels: Mapping[str, Any],
    *,
    keep_largest: Sequence[str] = (),
    min_size: str | None = None,
    fill_holes: Sequence[str] = (),
    postprocessing_file: Path | None = None,
) -> Cleanup | None:
    """What options ask for; None when they ask for nothing. `labels` as in dataset.json.

    Words for labels: `all` (the foreground as one structure), `each` (every label or region by itself), a name of
    dataset.json or a number; several joined with `+` are one structure. `min_size`: a number of voxels, or of mm3 with
    that unit behind it. Steps of a file come before those of options.
    Raises SpecError naming the word that is wrong, and what read_postprocessing raises.
    """
    from_file = read_postprocessing(postprocessing_file) if postprocessing_file else ()
    structures = [s for word in keep_largest for s in _structures(word, labels, "--keep-largest")]
    holes = [label for word in fill_holes for s in _structures(word, labels, "--fill-holes") for label in s]
    size, unit = _parse_size(min_size) if min_size is not None else (0.0, "voxels")
    if not (from_file or structures or holes or size or postprocessing_file):
        return None
    return Cleanup(
        keep_largest=(*from_file, *map(KeepLargest, structures)),
        min_size=size,
        min_size_unit=unit,
        fill_holes=tuple(dict.fromkeys(holes)),
    )


def _structures(word: str, labels: Mapping[str, Any], option: str) -> list[tuple[int, ...]]:
    named = {name: _flat(value) for name, value in labels.items() if name != "ignore" and _flat(value) != (0,)}
    values = {label for value in named.values() for label in value}
    if word == "all":
        return [tuple(sorted(values - {0}))]
    if word == "each":
        return list(named.values())
    joined: list[int] = []
    for part in word.split("+"):
        if part in named:
            joined.extend(named[part])
        elif part.isdigit() and int(part) in values - {0}:
            joined.append(int(part))
        else:
            known = ", ".join(f"{name} ({'+'.join(map(str, value))})" for name, value in named.items())
            raise SpecError(f"{option}: {part!r} is no label of this model, expected all, each, or of {known}")
    return [tuple(joined)]


def _parse_size(text: str) -> tuple[float, SizeUnit]:
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match["number"]) <= 0:
        raise SpecError(f"--min-size: got {text!r}, expected a number of voxels such as 20, or a volume such as 50mm3")
    return float(match["number"]), "mm3" if match["unit"] == "mm3" else "voxels"
