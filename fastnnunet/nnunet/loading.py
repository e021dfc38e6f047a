"""Batches that are a function of seed and batch number alone.

nnU-Net's loader processes draw from generators nobody seeds and hand batches over in the order they finish. Here every
batch has a number: before nnU-Net's own loader samples and augments batch n, the generators are seeded from
(seed, stream, n), and batches are handed over in the order of their numbers. Neither the number of processes nor their
timing changes a batch, and a resumed training asks for the numbers that come next.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

TRAINING, VALIDATION, STEP = range(3)  # streams of random numbers that never meet


def seed_generators(seed: int, stream: int, number: int) -> None:
    """Seed the global generators of random, NumPy and torch (CPU and CUDA) from three whole numbers of at least 0."""
    words = np.random.SeedSequence((seed, stream, number)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


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


class NumberedBatches:
    """nnU-Net's loader giving batches start, start + 1, ...; process i of n gives every n-th one from start + i."""

    def __init__(self, loader: Any, *, seed: int, stream: int, start: int, num_processes: int) -> None:
        self._loader, self._seed, self._stream = loader, seed, stream
        self._number, self._stride = start, max(1, num_processes)

    def set_thread_id(self, thread_id: int) -> None:
        """Called once in each loader process, before its first batch."""
        torch.set_num_threads(1)  # a forked process must not enter its parent's thread pool
        self._number += thread_id

    def __next__(self) -> dict[str, Any]:
        with generators_kept():
            seed_generators(self._seed, self._stream, self._number)
            batch = next(self._loader)
        self._number += self._stride
        return batch


def ordered_batches(
    loader: Any, *, seed: int, stream: int, start: int, num_processes: int, pin_memory: bool
) -> SingleThreadedAugmenter | MultiThreadedAugmenter:
    """An endless iterator of batches in the order of their numbers; 0 processes loads in this one."""
    batches = NumberedBatches(loader, seed=seed, stream=stream, start=start, num_processes=num_processes)
    if num_processes == 0:
        return SingleThreadedAugmenter(batches, None)
    return MultiThreadedAugmenter(batches, None, num_processes, pin_memory=pin_memory, wait_time=0.002)


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
