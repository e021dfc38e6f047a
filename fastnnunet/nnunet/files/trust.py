"""What plans may name of nnU-Net's own: its classes and functions, not whatever its modules have imported."""

import contextlib
import io
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from fastnnunet.errors import MismatchError
from fastnnunet.nnunet.files.plans_checks import check_dataset_json, check_plans, is_class_name
from fastnnunet.nnunet.v2 import find_below
from fastnnunet.specs.checks.networks import ALLOW_CODE_OPTION, code_is_allowed
from fastnnunet.specs.checks.problems import shown
from fastnnunet.specs.checks.reproducible import resolve_inheritance

# field of plans or of a configuration -> where nnU-Net searches for what it names, and what it writes there itself
_SEARCHED = {
    "image_reader_writer": (
        "imageio",
        (
            "SimpleITKIO",
            "SimpleITKIOWithReorient",
            "NibabelIO",
            "NibabelIOWithReorient",
            "NaturalImage2DIO",
            "Tiff3DIO",
        ),
    ),
    "label_manager": ("utilities.label_handling", ("LabelManager",)),
    "preprocessor_name": ("preprocessing", ("DefaultPreprocessor",)),
    **{
        f"resampling_fn_{kind}": (
            "preprocessing.resampling",
            ("resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"),
        )
        for kind in ("data", "seg", "probabilities")
    },
    "normalization_schemes": (
        "preprocessing.normalization",
        (
            *("CTNormalization", "NoNormalization", "RGBTo01Normalization", "RescaleTo01Normalization"),
            "ZScoreNormalization",
        ),
    ),
}


def check_trusted(plans: Mapping[str, Any], configuration: str) -> None:
    """Refuse plans before nnU-Net works with them: see `check_plans`; and names that nnU-Net would find in its modules
    but that are not defined there (`os` is one). Raises MismatchError.
    """
    check_plans(plans, configuration)
    if configuration not in plans["configurations"]:
        return
    config = {**plans, **resolve_inheritance(plans["configurations"], configuration)}
    for field, (place, usual) in _SEARCHED.items():
        value = config.get(field)
        for name in value if isinstance(value, list | tuple) else [value]:
            if name is not None and name not in usual and not code_is_allowed():
                _check_defined(name, field, f"nnunetv2.{place}")


def check_labels(plans_manager: Any, dataset_json: Mapping[str, Any]) -> None:
    """Refuse a dataset.json of which nnU-Net's label manager cannot be made. Raises MismatchError."""
    check_dataset_json(dataset_json)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # that plans name no label manager
            if plans_manager.label_manager_class is not None:  # else told where it is asked for
                plans_manager.get_label_manager(dataset_json)
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise MismatchError(
            f"the labels in dataset.json are not as nnU-Net takes them: {e}\n"
            f"  got      {shown(dataset_json['labels'])}\n"
            '  expected {"background": 0, "organ": 1, ...}, and regions_class_order where there are regions'
        ) from e


def _check_defined(name: Any, field: str, place: str) -> None:
    """What is not there at all is left to whoever needs it."""
    from fastnnunet.nnunet.v2 import LabelManager

    kind = FunctionType if field.startswith("resampling") else type
    found = find_below(place, name) if is_class_name(name) else object
    if found is None:
        if field != "label_manager":
            return
        raise MismatchError(
            f"{field}: got {shown(name)}, which is not in {place}\ninstall it there, as nnU-Net needs it"
        )
    is_theirs = isinstance(found, kind) and found.__module__.startswith("nnunetv2.")
    if not is_theirs or (field == "label_manager" and not issubclass(found, LabelManager)):
        what = "function" if kind is FunctionType else "class"
        raise MismatchError(
            f"{field}: got {shown(name)}, expected the name of a {what} of {place}: other code is not run\n"
            f"if you trust whoever made this model, give {ALLOW_CODE_OPTION}"
        )
