"""Larger patches for the last part of a training.

A network that is to see whole images has learnt on patches: their rims, beyond which it sees zeros, are everywhere, and
context ends early. The last steps on larger patches teach it what it will meet.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LastPatch:
    """`size` (z, y, x; y, x) of the patches of the last `share` of the epochs, at least one."""

    size: tuple[int, ...]
    share: float

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch, counted from 0, has the larger patches."""
        return epoch >= epochs - max(1, round(self.share * epochs))


@contextmanager
def patches_of(configuration: Any, size: tuple[int, ...]) -> Iterator[None]:
    """Within, nnU-Net's ConfigurationManager has this patch size, and so would plans that are written meanwhile."""
    settings = configuration.configuration
    before, settings["patch_size"] = settings["patch_size"], list(size)
    try:
        yield
    finally:
        settings["patch_size"] = before
