"""What shape the ONNX graph of a bundle has."""

from dataclasses import dataclass

from fastnnunet.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """The default: the trained patch size, any number of patches at once, as the exporter writes it."""

    patch_size: tuple[int, ...] | None = None  # of the sliding window, instead of the trained one; order of the plans
    dynamic_space: bool = False  # the graph takes every patch size the network's strides divide
    simplify: bool = False  # what depends on no input and no weight is computed at export
    batch_size: int | None = None  # the graph takes exactly so many patches at once

    def __post_init__(self) -> None:
        problems = []
        if self.patch_size is not None and min(self.patch_size, default=0) < 1:
            problems.append(f"patch_size: got {self.patch_size}, expected whole numbers of at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            problems.append(f"batch_size: got {self.batch_size}, expected at least 1")
        if problems:
            raise SpecError("; ".join(problems))
