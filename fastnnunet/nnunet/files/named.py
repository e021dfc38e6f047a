"""Classes and functions that plans name: whether nnU-Net finds them, and whether predictions here can do what they do.

nnU-Net looks for them by name below fixed packages of its own, and stops where there is none. Stages 1 and 2 run on
what nnU-Net has preprocessed and need no more than that; a bundle is predicted without nnU-Net, whose own it repeats.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.geometry.resample import parse_label_resample_spec, parse_resample_spec
from fastnnunet.nnunet.files.plans import configuration_of, intensity_properties
from fastnnunet.nnunet.v2 import find_below
from fastnnunet.specs.checks.reproducible import LABEL_MANAGER, preprocessing_problems, unknown_scheme_problems

log = logging.getLogger(__name__)
# field of the plans -> package of nnunetv2 in which nnU-Net looks for what it names
_RESAMPLING = {f"resampling_fn_{kind}": "preprocessing.resampling" for kind in ("data", "seg", "probabilities")}
_OF_CONFIGURATION = {
    "preprocessor_name": "preprocessing",
    **_RESAMPLING,
    "normalization_schemes": "preprocessing.normalization",
}
_OF_PLANS = {"image_reader_writer": "imageio", "label_manager": "utilities.label_handling"}
_OPTIONAL = ("label_manager",)  # plans without one mean nnU-Net's own


def check_loadable(plans: dict[str, Any], configuration: str) -> None:
    """Refuse plans that cannot be labelled and trained with; warn of a student that only nnU-Net will predict.

    Raises MismatchError naming everything that nnU-Net itself would not find, and a label manager of its own kind.
    """
    problems = _missing(plans, configuration)
    own = configuration_of(plans, configuration)[0].plans.get("label_manager", LABEL_MANAGER)
    if own != LABEL_MANAGER and not any(p.startswith("label_manager") for p in problems):
        problems.append(f"label_manager: got {own!r}, expected {LABEL_MANAGER}, as which soft labels are made")
    if problems:
        raise MismatchError(
            f"plans {plans.get('plans_name')} name what cannot be used, {len(problems)} problem(s):\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\ninstall it in nnunetv2 as for nnU-Net itself, or plan the data set again without it"
        )
    if others := _irreproducible(plans, configuration):
        warn_once(
            f"plans {plans.get('plans_name')}, {configuration}: labelled and trained on what nnU-Net has preprocessed, "
            "but the student can be predicted by nnU-Net only (nnUNetv2_predict), not exported:\n"
            + "\n".join(f"  - {p}" for p in others)
        )


def check_reproducible(plans: dict[str, Any], configuration: str) -> None:
    """Refuse plans of which a bundle would predict something else than nnU-Net. Raises SpecError naming all of it."""
    missing = _missing(plans, configuration)
    problems = [*missing, *(p for p in _irreproducible(plans, configuration) if not _same_field(p, missing))]
    if problems:
        raise SpecError(
            f"plans {plans.get('plans_name')}, {configuration}, name what cannot be reproduced without nnU-Net, "
            f"{len(problems)} problem(s):\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\npredict with nnU-Net itself, nnUNetv2_predict, where what they name is installed in nnunetv2"
        )


def _same_field(problem: str, others: list[str]) -> bool:
    return any(problem.split(":")[0] == other.split(":")[0] for other in others)


def _missing(plans: dict[str, Any], configuration: str) -> list[str]:
    problems = []
    for field, package, name in _named(plans, configuration):
        if name is None:
            problems.append(f"{field}: nothing is named, which nnU-Net needs")
        elif not _is_found(package, str(name), is_class=field not in _RESAMPLING):
            problems.append(f"{field}: got {name!r}, which is not in nnunetv2.{package}")
    return list(dict.fromkeys(problems))  # channels may share a scheme


def _named(plans: dict[str, Any], configuration: str) -> Iterator[tuple[str, str, Any]]:
    """Field, package of nnunetv2, and a name; None where the field is missing."""
    manager, config = configuration_of(plans, configuration)
    for fields, source in ((_OF_CONFIGURATION, config.configuration), (_OF_PLANS, manager.plans)):
        for field, package in fields.items():
            value = source.get(field)
            names = value if isinstance(value, list) else [value]
            yield from ((field, package, name) for name in names if name is not None or field not in _OPTIONAL)
    for field in _RESAMPLING:
        if f"{field}_kwargs" not in config.configuration:
            yield f"{field}_kwargs", "", None


@functools.cache
def _is_found(package: str, name: str, is_class: bool) -> bool:
    """As nnU-Net finds it; it takes any attribute of a module, here it has to be of the right kind."""
    found = find_below(f"nnunetv2.{package}", name)
    return inspect.isclass(found) if is_class else inspect.isfunction(found)


def _irreproducible(plans: dict[str, Any], configuration: str) -> list[str]:
    """What the runtime does not have. An image reader is none of it: arrays can be predicted without one."""
    manager, config = configuration_of(plans, configuration)
    problems = preprocessing_problems(config.configuration.get("preprocessor_name"), manager.plans.get("label_manager"))
    schemes = config.configuration.get("normalization_schemes") or ()
    problems += unknown_scheme_problems(schemes, intensity_properties(manager))
    # without a previous stage nnU-Net resamples a segmentation only to throw it away
    parsers = {"data": parse_resample_spec, "probabilities": parse_resample_spec, "seg": parse_label_resample_spec}
    for kind, parse in parsers.items():
        if kind == "seg" and config.previous_stage_name is None:
            continue
        try:
            parse(resampling_of(plans, configuration, kind), kind)
        except SpecError as e:
            problems.append(f"resampling_fn_{kind}: {str(e).splitlines()[0]}")
    return problems


def resampling_of(plans: dict[str, Any], configuration: str, kind: str) -> dict[str, Any]:
    """`fn` and `kwargs` with which a configuration resamples `data`, `seg` or `probabilities`."""
    config = configuration_of(plans, configuration)[1].configuration
    return {name: config.get(f"resampling_fn_{kind}{end}") for name, end in (("fn", ""), ("kwargs", "_kwargs"))}


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has already."""
    log.warning(message)
