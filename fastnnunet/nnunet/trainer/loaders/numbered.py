"""Batches by their numbers, in this process or as one of several."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from fastnnunet.errors import FastnnUNetError
from fastnnunet.nnunet.trainer.loading_errors import Repair, loading_error
from fastnnunet.nnunet.trainer.seeds import BatchNumber, generators_kept


class BatchMaker(Protocol):
    """Makes the batch of a number."""

    def make(self, number: BatchNumber, is_loading: Callable[[str], None], /) -> dict[str, Any]:
        """The same batch whenever it is asked for a number; tells `is_loading` the case it loads, '' for none."""


class NumberedBatches:
    """Batches start, start + 1, ... of a maker; process i of n gives every n-th one from start + i.

    What goes wrong is raised as a FastnnUNetError that names the case, with what `repair` says of it.
    """

    def __init__(
        self, maker: BatchMaker, *, seed: int, stream: int, start: int, num_processes: int, repair: Repair | None = None
    ) -> None:
        self._maker, self._seed, self._stream, self.repair = maker, seed, stream, repair
        self._number, self._stride = start, max(1, num_processes)
        self._case = ""  # the one that is being loaded
        self.on_case: Callable[[str], None] | None = None

    def _is_loading(self, case: str) -> None:
        self._case = case
        if self.on_case is not None:
            self.on_case(case)

    def set_thread_id(self, thread_id: int) -> None:
        """Called once in each loader process, before its first batch."""
        torch.set_num_threads(1)  # a forked process must not enter its parent's thread pool
        self._number += thread_id

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        with generators_kept():
            try:
                batch = self._maker.make(BatchNumber(self._seed, self._stream, self._number), self._is_loading)
            except FastnnUNetError:
                raise
            except Exception as e:  # a damaged file makes the libraries underneath raise nearly anything
                raise loading_error(e, self._case, self.repair) from e
        self._number += self._stride
        return batch
