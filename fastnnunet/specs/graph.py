"""What shape the ONNX graph of a bundle has."""

from dataclasses import dataclass
from typing import Annotated

from fastnnunet.errors import SpecError
from fastnnunet.specs.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """The default: the trained patch size, any number of patches at once, as the exporter writes it."""

    patch_size: Annotated[
        tuple[int, ...] | None,
        Option("--patch-size", "Window of another size than the trained one, z y x as in the plans; U-Nets only."),
    ] = None
    # of those that the network's strides divide
    dynamic_space: Annotated[bool, Option("--dynamic", "The graph takes any patch size; U-Nets only.")] = False
    simplify: Annotated[
        bool, Option("--simplify", "Fold constants, which need neither input nor weights (matters for Primus).")
    ] = False
    one_pass: Annotated[  # None: where it can be
        bool | None,
        Option("--one-pass/--no-one-pass", "Predict without overlapping tiles (default: where the network can)."),
    ] = None
    batch_size: Annotated[int | None, Option("--batch", "Fixed batch size (default: any).")] = None

    def __post_init__(self) -> None:
        problems = []
        if self.patch_size is not None and min(self.patch_size, default=0) < 1:
            problems.append(f"patch_size: got {self.patch_size}, expected whole numbers of at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            problems.append(f"batch_size: got {self.batch_size}, expected at least 1")
        if problems:
            raise SpecError("; ".join(problems))
