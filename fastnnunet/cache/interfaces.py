"""What a cache build needs from the outside: cases and a teacher.

`cache` imports neither nnU-Net nor torch; whatever implements these three protocols can be cached.
Shape suffixes: C = channels (of an image: modalities; of logits: network heads), Z, Y, X = space in the order of the
preprocessed arrays.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastnnunet.specs.cache import CacheSpec

Fold = int | str
Float32Array = npt.NDArray[np.float32]
StoredArray = npt.NDArray[np.uint8 | np.float16]  # what an encoding stores; its dtype is the codec's


class CaseSource(Protocol):
    """Preprocessed cases. Picklable and cheap to pickle: it travels to every worker."""

    @property
    def case_ids(self) -> tuple[str, ...]: ...

    def shape_zyx(self, case_id: str) -> tuple[int, int, int]: ...

    def image_CZYX(self, case_id: str) -> Float32Array: ...

    def digest(self, case_id: str) -> str:
        """Hex SHA-256 of the dtype, shape and decoded values of the image (not of the file that holds it)."""
        ...


# How close a fast teacher should be to the reference implementation: labels equal, mean difference of probabilities.
MIN_ARGMAX_EQUAL = 0.999
MAX_MEAN_DIFFERENCE = 1e-3

Block = tuple[tuple[int, int, int], Float32Array]  # number of a chunk (z, y, x) and its values (heads, z, y, x)


class Teacher(Protocol):
    """A loaded ensemble."""

    def blocks(
        self,
        image_CZYX: Float32Array,
        folds: Sequence[Any],
        chunk_zyx: Sequence[int],
        per_fold: Callable[[Float32Array], Float32Array] | None = None,
    ) -> Iterator[Block]:
        """Mean logits over mirrors, tiles and `folds`, every chunk of the grid once, in any but always the same order.

        `per_fold`, when given, turns each fold's logits (heads, z, y, x) of a tile into what is averaged instead.
        """
        ...

    def seconds_per_patch(self) -> float:
        """Measured seconds for one patch with all folds and mirrors, warm."""
        ...

    def deviation(self, images_CZYX: Sequence[Float32Array], temperature: float) -> dict[str, Any]:
        """How far the middle patches of these images are from the reference implementation.

        Plain JSON values: `against`, `patches`, `argmax_equal`, `mean_abs_difference` and whatever else is of interest.
        """
        ...


class TeacherFactory(Protocol):
    """Describes a teacher without loading it. Picklable and cheap: it travels to every worker."""

    @property
    def num_heads(self) -> int: ...

    @property
    def has_regions(self) -> bool:
        """True when heads are overlapping regions (sigmoid), False when they are exclusive classes (softmax)."""
        ...

    @property
    def patch_size(self) -> tuple[int, ...]: ...

    @property
    def folds(self) -> tuple[Any, ...]: ...

    def identity(self) -> dict[str, Any]:
        """Everything about the teacher that changes a logit, as plain JSON values; no paths, no host names."""
        ...

    def unseen_folds(self, case_id: str) -> tuple[Any, ...]:
        """The folds that did not train on this case."""
        ...

    def alternatives(self, spec: CacheSpec) -> "Iterator[TeacherFactory]":
        """This teacher as another machine would load it, in everything that the recipe leaves open (`auto`)."""
        ...

    def memory_bytes(self, shape_zyx: Sequence[int], chunk_zyx: Sequence[int]) -> int:
        """Peak bytes a loaded teacher needs for an image of this shape, beyond its weights and activations."""
        ...

    def load(self, threads: int) -> Teacher: ...
