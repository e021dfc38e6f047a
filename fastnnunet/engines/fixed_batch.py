"""A model that takes exactly so many patches at once, behind the contract that takes any number."""

import numpy as np
import numpy.typing as npt

from fastnnunet.engines.base import Backend, Precision


class FixedBatch:
    def __init__(self, backend: Backend, batch_size: int) -> None:
        self.name, self.precision = backend.name, backend.precision
        self._backend, self._batch_size = backend, batch_size

    name: str
    precision: Precision

    def run(self, batch_NCX: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        size, count = self._batch_size, len(batch_NCX)
        if count == size:
            return self._backend.run(batch_NCX)
        parts = []
        full = np.zeros((size, *batch_NCX.shape[1:]), np.float32)
        for first in range(0, count, size):
            part = batch_NCX[first : first + size]
            full[: len(part)] = part
            # the engine's own memory, valid until it runs again
            parts.append(self._backend.run(full)[: len(part)].copy())
        return np.concatenate(parts)
