"""The cache as a trainer sees it."""

import numpy as np

from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.storage import Place


class CachedSoftLabels:
    """Random access to the float32 soft labels of a cache. Fork and spawn safe: the reader opens files on first use."""

    def __init__(self, cache: Place, temperature: float | None = None) -> None:
        """`temperature` None = the cache's own. Raises MismatchError when the cache does not serve it."""
        self._reader = SoftLabelReader(cache, temperature)
        self.num_channels = self._reader.codec.num_targets
        self.key = self._reader.key

    @property
    def image_digests(self) -> dict[str, str]:
        """Case id -> digest of its preprocessed image."""
        return self._reader.cache.cases

    def read(self, case_id: str, lower_zyx: tuple[int, ...], upper_zyx: tuple[int, ...]) -> np.ndarray:
        """Probabilities float32 (num_channels, z, y, x); background, channel 0 of classes, is left out."""
        probabilities = self._reader.to_probabilities(self._reader.read_patch(case_id, lower_zyx, upper_zyx))
        return probabilities[probabilities.shape[0] - self.num_channels :]
