"""Batches that are a function of seed and batch number alone.

nnU-Net's loader processes draw from generators nobody seeds and hand batches over in the order they finish. Here every
batch has a number: before the cases of batch n are chosen, the generators are seeded from (seed, stream, n), before
sample i of it is chosen and augmented from (seed, stream, n, i) (`batches.py`), and batches are handed over in the
order of their numbers. Neither the number of processes nor their timing changes a batch, and a resumed training asks
for the numbers that come next.
"""

from fastnnunet.nnunet.trainer.loaders.numbered import BatchMaker, NumberedBatches
from fastnnunet.nnunet.trainer.loaders.processes import LoaderProcesses
from fastnnunet.nnunet.trainer.loading_errors import Repair


def ordered_batches(
    maker: BatchMaker,
    *,
    seed: int,
    stream: int,
    start: int,
    num_processes: int,
    pin_memory: bool,
    repair: Repair | None = None,
) -> NumberedBatches | LoaderProcesses:
    """An endless iterator of batches in the order of their numbers; 0 processes loads in this one.

    Raises what is named in NumberedBatches, in any number of processes.
    """
    batches = NumberedBatches(maker, seed=seed, stream=stream, start=start, num_processes=num_processes, repair=repair)
    return batches if num_processes == 0 else LoaderProcesses(batches, num_processes, pin_memory=pin_memory)
