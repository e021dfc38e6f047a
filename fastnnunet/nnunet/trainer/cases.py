"""What a training reads its samples from: nnU-Net's data sets, and the soft labels of their cases."""

from typing import Any, Protocol

import numpy as np

from fastnnunet.nnunet.augment.drawn_first import Box
from fastnnunet.nnunet.augment.soft_samples import SoftBox, SoftLabels, read_box


class Cases(Protocol):
    """Preprocessed cases; `identifiers` are those that nnU-Net's loader draws from."""

    identifiers: Any

    def load_case(self, identifier: str, /) -> tuple[Any, ...]:
        """Image (C, z, y, x), label (1, z, y, x), label (z, y, x) of the stage before or None, and properties."""


class SoftCases(Cases, Protocol):
    """Cases with soft labels."""

    def read_soft(self, identifier: str, shape_zyx: tuple[int, ...], box: Box, /) -> SoftBox:
        """The soft label of a box of a case whose image has `shape_zyx` voxels."""


class WritableCases:
    """An nnU-Net data set whose arrays may be written to.

    nnU-Net opens unpacked .npy files as read-only memory maps. A patch that lies within the volume is a view of one,
    and augmentation in place would end the process. Here pages that are written to become copies; the files stay.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self.identifiers = base.identifiers

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        """As nnU-Net's data sets."""
        return tuple(_writable(part) for part in self._base.load_case(identifier))


def _writable(part: Any) -> Any:
    if isinstance(part, np.memmap) and part.filename is not None and not part.flags.writeable:
        return np.load(part.filename, mmap_mode="c")
    return part


class SoftLabelDataset:
    """An nnU-Net data set and the soft labels of its cases."""

    def __init__(self, base: Any, soft: SoftLabels) -> None:
        self._base, self._soft = base, soft
        self.identifiers = base.identifiers

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        """As nnU-Net's data sets."""
        return tuple(self._base.load_case(identifier))

    def read_soft(self, identifier: str, shape_zyx: tuple[int, ...], box: Box) -> SoftBox:
        """As SoftCases."""
        return read_box(self._soft, identifier, shape_zyx, box)


class JoinedDataset:
    """A data set that also knows unlabelled cases; nnU-Net's loader draws from `identifiers`, the labelled ones."""

    def __init__(self, labelled: Any, unlabelled: Any) -> None:
        """Both are Cases; SoftCases where soft labels are read."""
        self._labelled, self._unlabelled = labelled, unlabelled
        self._unlabelled_ids = frozenset(unlabelled.identifiers)
        self.identifiers = labelled.identifiers

    def _holder(self, identifier: str) -> Any:
        return self._unlabelled if identifier in self._unlabelled_ids else self._labelled

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        """The case from the data set that has it."""
        return tuple(self._holder(identifier).load_case(identifier))

    def read_soft(self, identifier: str, shape_zyx: tuple[int, ...], box: Box) -> SoftBox:
        """As SoftCases, from the data set that has the case."""
        soft: SoftBox = self._holder(identifier).read_soft(identifier, shape_zyx, box)
        return soft
