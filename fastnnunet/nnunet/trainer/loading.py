"""Batches that are a function of seed and batch number alone.

nnU-Net's loader processes draw from generators nobody seeds and hand batches over in the order they finish. Here every
batch has a number: before nnU-Net's own loader chooses the cases of batch n, the generators are seeded from
(seed, stream, n), before it samples and augments sample i of it from (seed, stream, n, i), and batches are handed over
in the order of their numbers. Neither the number of processes nor their timing changes a batch, a resumed training asks
for the numbers that come next, and the processes of a distributed training make only their own samples of a batch.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from fastnnunet.errors import FastnnUNetError
from fastnnunet.nnunet.trainer.loading_errors import Repair, loading_error

if TYPE_CHECKING:
    from fastnnunet.nnunet.trainer.loader_processes import LoaderProcesses
    from fastnnunet.nnunet.trainer.mixing import Unlabelled

TRAINING, VALIDATION, STEP = range(3)  # streams of random numbers that never meet


def seed_generators(*numbers: int, device_type: str = "cpu") -> None:
    """Seed the global generators of random, NumPy and torch from whole numbers of at least 0.

    Of torch that is the CPU's, and with another `device_type` those of all devices, which takes a millisecond.
    """
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    seed_torch = torch.default_generator.manual_seed if device_type == "cpu" else torch.manual_seed
    seed_torch(int(words[2]) << 32 | int(words[3]))


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global CPU generators on leaving, so that loading in this process does not disturb the training."""
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


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


@dataclass(frozen=True)
class Share:
    """Which samples of a batch process `rank` of `world_size` makes and trains on; as nnU-Net divides them."""

    rank: int = 0
    world_size: int = 1

    def of(self, batch_size: int) -> range:
        """The numbers of its samples; the first processes get one more where the batch cannot be divided evenly."""
        each, more = divmod(batch_size, self.world_size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))


class NumberedBatches:
    """nnU-Net's loader giving batches start, start + 1, ...; process i of n gives every n-th one from start + i.

    `transform` is called with each batch and returns what is given. What goes wrong is raised as a FastnnUNetError that
    names the case, with what `repair` says of it.
    """

    def __init__(
        self,
        loader: Any,
        *,
        seed: int,
        stream: int,
        start: int,
        num_processes: int,
        share: Share = Share(),
        unlabelled: "Unlabelled | None" = None,
        transform: Callable[..., dict[str, Any]] | None = None,
        repair: Repair | None = None,
    ) -> None:
        self._unlabelled, self._transform, self.repair = unlabelled, transform, repair
        self._mine: list[str] = []  # cases of the batch that is being made
        self.case = ""  # the one that is being loaded
        self.on_case: Callable[[str], None] | None = None
        self._loader, self._seed, self._stream = loader, seed, stream
        self._number, self._stride = start, max(1, num_processes)
        if isinstance(loader, nnUNetDataLoader):
            self._batch_size = loader.batch_size
            self._samples = share.of(loader.batch_size)
            self._draw_cases, self._oversamples = loader.get_indices, loader.get_do_oversample
            loader.batch_size = len(self._samples)
            loader.get_indices, loader.get_do_oversample = self._cases, self._begin_sample

    def _cases(self) -> list[str]:
        """This process's part of the cases drawn for the whole batch."""
        cases = list(self._with_whole_batch(self._draw_cases))
        if self._unlabelled is not None:
            cases = self._unlabelled.mixed(cases, self._number)
        self._mine = cases[self._samples.start : self._samples.stop]
        return self._mine

    def _begin_sample(self, index: int) -> bool:
        """Called by nnU-Net's loader before every sample: whether it must show foreground."""
        sample = self._samples[index]
        self._is_loading(self._mine[index])
        seed_generators(self._seed, self._stream, self._number, sample)
        return bool(self._with_whole_batch(self._oversamples, sample))

    def _with_whole_batch(self, ask: Callable[..., Any], *args: int) -> Any:
        self._loader.batch_size = self._batch_size
        try:
            return ask(*args)
        finally:
            self._loader.batch_size = len(self._samples)

    def _is_loading(self, case: str) -> None:
        self.case = case
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
            seed_generators(self._seed, self._stream, self._number)
            try:
                batch = next(self._loader)
                self._is_loading("")
                if self._transform is not None:
                    batch = self._transform(**batch)
            except FastnnUNetError:
                raise
            except Exception as e:  # a damaged file makes the libraries underneath raise nearly anything
                raise loading_error(e, self.case, self.repair) from e
        self._number += self._stride
        return batch


def ordered_batches(
    loader: Any,
    *,
    seed: int,
    stream: int,
    start: int,
    num_processes: int,
    pin_memory: bool,
    share: Share = Share(),
    unlabelled: "Unlabelled | None" = None,
    transform: Callable[..., dict[str, Any]] | None = None,
    repair: Repair | None = None,
) -> "NumberedBatches | LoaderProcesses":
    """An endless iterator of batches in the order of their numbers; 0 processes loads in this one.

    Some samples of each are `unlabelled` cases, where given. `transform` is called with each batch where it is loaded
    and returns what is handed over. Raises what is named in NumberedBatches, in any number of processes.
    """
    from fastnnunet.nnunet.trainer.loader_processes import LoaderProcesses

    batches = NumberedBatches(
        loader,
        seed=seed,
        stream=stream,
        start=start,
        num_processes=num_processes,
        share=share,
        unlabelled=unlabelled,
        transform=transform,
        repair=repair,
    )
    return batches if num_processes == 0 else LoaderProcesses(batches, num_processes, pin_memory=pin_memory)


@contextlib.contextmanager
def loading_in_this_process() -> Iterator[None]:
    """nnU-Net starts its loader processes where it makes the loaders; told to use none, it gives the loaders alone."""
    name = "nnUNet_n_proc_DA"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
