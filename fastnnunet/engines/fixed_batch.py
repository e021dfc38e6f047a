"""A model that takes exactly so many patches at once, behind the contract that takes any number."""

import numpy as np

from fastnnunet.engines.base import Array, Engine, Precision


class FixedBatch:
    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.name, self.precision = engine.name, engine.precision
        self.overhead, self.largest_tile = engine.overhead, engine.largest_tile
        self._engine, self._batch_size = engine, batch_size

    name: str
    precision: Precision
    overhead: float
    largest_tile: tuple[int, ...] | None

    def run(self, batch_NCX: Array) -> Array:
        size, count = self._batch_size, len(batch_NCX)
        if count == size:
            return self._engine.run(batch_NCX)
        parts = []
        full = np.zeros((size, *batch_NCX.shape[1:]), np.float32)
        for first in range(0, count, size):
            part = batch_NCX[first : first + size]
            full[: len(part)] = part
            # the engine's own memory, valid until it runs again
            parts.append(self._engine.run(full)[: len(part)].copy())
        return np.concatenate(parts)
