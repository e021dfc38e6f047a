"""Seeds of everything that is drawn while a batch is made, and of every training step."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

TRAINING, VALIDATION, STEP, STATISTICS = range(4)  # streams of random numbers that never meet


def seed_generators(*numbers: int, device_type: str = "cpu") -> None:
    """Seed the global generators of random, NumPy and torch from whole numbers of at least 0.

    Of torch that is the CPU's, and with another `device_type` those of all devices, which takes a millisecond.
    """
    words = np.random.SeedSequence(numbers).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    seed_torch = torch.default_generator.manual_seed if device_type == "cpu" else torch.manual_seed
    seed_torch(int(words[2]) << 32 | int(words[3]))


@dataclass(frozen=True, slots=True)
class BatchNumber:
    """A batch of a stream of random numbers; `number` counts from the first of a training."""

    seed: int
    stream: int
    number: int

    def begin(self, *sample: int) -> None:
        """Seed the generators for this batch, or for one sample of it."""
        seed_generators(self.seed, self.stream, self.number, *sample)


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
