"""What a bundle says of its locator: a tiny network that sees the image at a coarse spacing and finds where the
foreground is, so that the bundle's own network runs in a box around it alone.

Axes are those of the bundle's patch size (z, y, x).
"""

from dataclasses import dataclass
from typing import Any

from fastnnunet.specs.checks.architecture import architecture_problems, unet_problems
from fastnnunet.specs.checks.problems import is_integer, is_list, is_number, patch_size_problems, shown
from fastnnunet.specs.one_pass import OnePass, one_pass_problems

FOREGROUND = {"background": 0, "foreground": 1}  # the labels of a locator
LOCATOR_FILE = "locator.onnx"
MOST_FACTOR = 64
_MOST_MARGIN_MM = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Locator:
    """A network of two heads, and what becomes of its answer.

    Its voxels are means of blocks of `factor` voxels of the preprocessed image; blocks at the end may be smaller. Where
    the probability of the foreground exceeds `threshold` in some of them, the box is theirs and `margin_mm` more on
    every side; else it is the whole image.
    """

    model_file: str
    factor: tuple[int, ...]
    patch_size: tuple[int, ...]  # of its network, in its own voxels
    one_pass: OnePass | None = None  # how its network is predicted without overlapping tiles
    architecture: dict[str, Any]
    threshold: float
    margin_mm: float


def locator_problems(locator: Locator, dims: int, has_previous: bool, has_ignored: bool) -> list[str]:
    """Values that cannot be, or not together with a bundle of `dims` axes."""
    if dims != 3:
        return ["locator: a bundle of two axes has none"]
    problems = []
    if has_previous:
        problems.append("locator: a cascade stage has none")
    if has_ignored:
        problems.append("locator: a model with an ignore label has none")
    factor = locator.factor
    if not is_list(factor, dims) or not all(is_integer(n, 1, MOST_FACTOR) for n in factor):
        problems.append(f"locator.factor: got {shown(factor)}, expected {dims} whole numbers from 1 to {MOST_FACTOR}")
    if not is_number(locator.threshold) or not 0 < locator.threshold < 1:
        problems.append(f"locator.threshold: got {shown(locator.threshold)}, expected a number between 0 and 1")
    if not is_number(locator.margin_mm) or not 0 <= locator.margin_mm <= _MOST_MARGIN_MM:
        problems.append(f"locator.margin_mm: got {shown(locator.margin_mm)}, expected 0 to {_MOST_MARGIN_MM:g}")
    of_network = patch_size_problems(locator.patch_size)
    if not of_network and len(locator.patch_size) != dims:
        of_network = [f"patch_size: got {shown(locator.patch_size)}, expected {dims} numbers"]
    if not of_network:
        of_network = architecture_problems(locator.architecture, locator.patch_size)
        of_network = of_network or unet_problems(locator.architecture, locator.patch_size)
        if locator.one_pass is not None:
            wrong = one_pass_problems(locator.one_pass, locator.patch_size, None, True)
            if not wrong and not of_network:
                wrong = unet_problems(locator.architecture, locator.one_pass.multiples, "one_pass.multiples")
            of_network += wrong
    return problems + [f"locator.{problem}" for problem in of_network]
