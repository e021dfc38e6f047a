"""What plans may name of nnU-Net's own: its classes and functions, not whatever its modules have imported."""

import importlib
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from fastnnunet.errors import MismatchError
from fastnnunet.specs.networks import ALLOW_CODE_OPTION, code_is_allowed
from fastnnunet.specs.plans_checks import check_plans, is_class_name, resolve_inheritance
from fastnnunet.specs.problems import shown

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


def _check_defined(name: Any, field: str, place: str) -> None:
    """Nothing of that name is nnU-Net's to say; it is asked for it later."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = importlib.import_module(place).__path__[0]
    found = recursive_find_python_class(folder, name, place) if is_class_name(name) else object
    if found is None:
        return
    if not isinstance(found, type | FunctionType) or not found.__module__.startswith("nnunetv2."):
        raise MismatchError(
            f"{field}: got {shown(name)}, expected the name of a class or function of {place}: other code is not run\n"
            f"if you trust whoever made this model, give {ALLOW_CODE_OPTION}"
        )
