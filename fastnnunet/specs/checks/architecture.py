"""Whether the `architecture` of plans or of a bundle can be a network: kinds and ranges, before anything is built."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from fastnnunet.specs.checks.problems import is_integer, is_list, is_number, shown

MAX_STAGES = 32
MAX_PER_STAGE = 64  # convolutions or blocks
MAX_FEATURES = 2**14
_MAX_VALUES = 2**14
_MAX_NUMBER = 2**31
_UNETS = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
# arguments of U-Nets: one number for all stages, or a list with one for each
_PER_STAGE = {
    "features_per_stage": (0, MAX_FEATURES),
    "n_conv_per_stage": (0, MAX_PER_STAGE),
    "n_blocks_per_stage": (0, MAX_PER_STAGE),
    "n_conv_per_stage_decoder": (1, MAX_PER_STAGE),  # of one stage fewer
}
# and likewise with a number, or one for each axis, in each stage
_PER_AXIS = {"kernel_sizes": 63, "strides": 64}
# of Primus and its blocks
_ALONE = {"embed_dim": MAX_FEATURES, "eva_depth": 256, "eva_numheads": 1024, "stem_channels": MAX_FEATURES}


def architecture_problems(architecture: Any, patch_size: list[int] | tuple[int, ...]) -> list[str]:
    """What is wrong with an architecture for patches of that size; empty when nothing is.

    Whether its names may be looked up is another question (`specs/checks/networks.py`).
    """
    if not isinstance(architecture, dict):
        return [f"architecture: got {shown(architecture)}, expected network_class_name and arch_kwargs"]
    name, kwargs = architecture.get("network_class_name"), architecture.get("arch_kwargs")
    imports: Any = architecture.get("_kw_requires_import")
    problems = []
    if not isinstance(name, str):
        problems.append(f"network_class_name: got {shown(name)}, expected the name of a class")
    if not is_list(imports) or not all(isinstance(i, str) for i in imports):
        problems.append(f"_kw_requires_import: got {shown(imports)}, expected names of arguments")
    if not isinstance(kwargs, dict) or not all(isinstance(k, str) for k in kwargs):
        return [*problems, f"arch_kwargs: got {shown(kwargs)}, expected arguments by name"]
    problems += _size_problems(kwargs)
    if problems:
        return problems
    return _range_problems(kwargs, len(patch_size))


def _size_problems(kwargs: dict[str, Any]) -> list[str]:
    """Numbers and amounts that no network has, whatever the argument is called."""
    count, level = 0, list(kwargs.items())
    while level:
        count += len(level)
        if count > _MAX_VALUES:
            return [f"arch_kwargs: got more than {_MAX_VALUES} values"]
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if is_list(value):
                below += [(name, v) for v in value]
            elif isinstance(value, dict):
                below += [(name, v) for v in value.values()]
            elif isinstance(value, int | float) and not (isinstance(value, bool) or _is_usual(value)):
                return [f"{name}: got {shown(value)}, expected a finite number up to {_MAX_NUMBER}"]
        level = below
    return []


def _is_usual(value: float) -> bool:
    return is_number(value) and abs(value) <= _MAX_NUMBER


def _range_problems(kwargs: dict[str, Any], dims: int) -> list[str]:
    stages = kwargs.get("n_stages")
    if stages is not None and not is_integer(stages, 1, MAX_STAGES):
        return [f"n_stages: got {shown(stages)}, expected a whole number from 1 to {MAX_STAGES}"]
    problems = []
    for name, (fewer, most) in _PER_STAGE.items():
        if name in kwargs:
            count = None if stages is None else stages - fewer
            problems += _listed(name, kwargs[name], count, partial(is_integer, low=1, high=most), f"1 to {most}")
    for name, most in _PER_AXIS.items():
        if name in kwargs:
            fits = partial(_fits_axes, dims=dims, most=most)
            problems += _listed(name, kwargs[name], stages, fits, f"1 to {most}, or {dims} of them")
    for name, most in _ALONE.items():
        if kwargs.get(name) is not None and not is_integer(kwargs[name], 1, most):
            problems.append(f"{name}: got {shown(kwargs[name])}, expected a whole number from 1 to {most}")
    operation = re.search(r"\.(?:Lazy)?Conv([1-3])d$", str(kwargs.get("conv_op")))
    if operation and int(operation[1]) != dims:
        problems.append(f"conv_op: got {shown(kwargs['conv_op'])}, expected one of {dims} axes, as the patch has")
    return problems


def _fits_axes(value: Any, *, dims: int, most: int) -> bool:
    each = value if is_list(value) else [value] * dims
    return len(each) == dims and all(is_integer(v, 1, most) for v in each)


def _listed(name: str, value: Any, count: int | None, fits: Callable[[Any], bool], expected: str) -> list[str]:
    if fits(value) and not is_list(value):
        return []
    if not is_list(value, count) or len(value) > MAX_STAGES or not all(fits(v) for v in value):
        each = "each stage" if count is None else f"each of {count} stages"
        return [f"{name}: got {shown(value)}, expected whole numbers from {expected}, for {each}"]
    return []


def unet_problems(
    architecture: dict[str, Any], sizes: list[int] | tuple[int, ...], what: str = "patch_size"
) -> list[str]:
    """Axes that the strides of a U-Net do not divide, as its skip connections need them. `architecture` is checked.

    `what`: the sizes are.
    """
    strides = architecture["arch_kwargs"].get("strides")
    if architecture["network_class_name"].rpartition(".")[2] not in _UNETS or not is_list(strides):
        return []
    total = [1] * len(sizes)
    for stride in strides or ():
        each = stride if is_list(stride) else [stride] * len(total)
        total = [t * s for t, s in zip(total, each, strict=True)]
    return [
        f"{what} axis {axis}: got {n}, expected a multiple of {t} (the product of the strides)"
        for axis, (n, t) in enumerate(zip(sizes, total, strict=True))
        if n % t
    ]
