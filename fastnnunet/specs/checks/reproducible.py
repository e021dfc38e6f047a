"""What nnU-Net's plans may name for predictions here to be nnU-Net's: anything else is refused, by its name.

The resampling functions are in `geometry/resample.py`, which knows their arguments as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastnnunet.errors import MismatchError
from fastnnunet.specs.checks.problems import shown

PREPROCESSOR = "DefaultPreprocessor"
LABEL_MANAGER = "LabelManager"
CT = "CTNormalization"
CT_STATISTICS = ("mean", "percentile_00_5", "percentile_99_5", "std")
SCHEMES = ("ZScoreNormalization", CT, "RescaleTo01Normalization", "RGBTo01Normalization", "NoNormalization")


def preprocessing_problems(preprocessor: Any, label_manager: Any) -> list[str]:
    """One line for each of the two that is not nnU-Net's own. None: plans that do not say, as those before 2.0."""
    given = {"preprocessor_name": (preprocessor, PREPROCESSOR), "label_manager": (label_manager, LABEL_MANAGER)}
    return [
        f"{field}: got {got!r}, expected {expected}"
        for field, (got, expected) in given.items()
        if got is not None and got != expected
    ]


def unknown_scheme_problems(schemes: Sequence[str], intensity_properties: Mapping[str, Any]) -> list[str]:
    """One line for each channel with a scheme the runtime does not have, or CT without its intensity statistics."""
    problems = []
    for index, scheme in enumerate(schemes):
        if scheme not in SCHEMES:
            problems.append(f"normalisation {scheme!r} of channel {index} is unknown; known: {', '.join(SCHEMES)}")
        missing = sorted(set(CT_STATISTICS) - intensity_properties.get(str(index), {}).keys()) if scheme == CT else []
        if missing:
            problems.append(f"{CT} of channel {index} needs the training statistics {', '.join(missing)}")
    return problems


def resolve_inheritance(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits, as nnU-Net resolves it. Raises MismatchError when that has no end."""
    chain = [name]
    while "inherits_from" in configurations[name]:
        name = configurations[name]["inherits_from"]
        if not isinstance(name, str) or name not in configurations:
            raise MismatchError(f"inherits_from: got {shown(name)}, which is no configuration of these plans")
        if name in chain:
            raise MismatchError(f"inherits_from: {shown([*chain, name])} is a circle, expected an end")
        chain.append(name)
    config: dict[str, Any] = {}
    for one in reversed(chain):
        config |= configurations[one]
    return config


def stated(plans: Mapping[str, Any], configuration: str, field: str) -> Any:
    """What a configuration says of a field, itself or through `inherits_from`; None where nothing does.

    For plans in a bundle, where nnU-Net's own managers are not installed; what is no object there says nothing.
    Raises MismatchError.
    """
    found = plans.get("configurations")
    if not isinstance(found, Mapping) or configuration not in found:
        return None
    configurations = {name: config if isinstance(config, Mapping) else {} for name, config in found.items()}
    return resolve_inheritance(configurations, configuration).get(field)
