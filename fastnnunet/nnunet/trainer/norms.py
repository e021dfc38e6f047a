"""Batch norms in training: what they will divide by at prediction, and one batch in several processes.

A batch of two patches says little of what a network meets, so the statistics of prediction are more than its running
means: they are measured before the first step, where a network has its weights from another, and settled before the
last ones. `frozen`: for the last part of a training every norm keeps the statistics it has, so that the weights adapt
to the very network that predicts. `precise`: after the last step they are measured anew on many batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import distributed

FROZEN_SHARE = 0.2  # of the epochs, the last
START_BATCHES, PRECISE_BATCHES = 8, 100


def batch_norms(network: torch.nn.Module) -> list[Any]:
    """The norms whose statistics at prediction are those of training."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return [m for m in norms if m.track_running_stats]


def freeze(network: torch.nn.Module) -> None:
    """Let a network in training normalise as at prediction, until `train` is called again."""
    for norm in batch_norms(network):
        norm.eval()


def is_frozen(epoch: int, epochs: int) -> bool:
    """Whether the norms are frozen in an epoch, counted from 0."""
    return epoch >= epochs - round(FROZEN_SHARE * epochs)


@contextmanager
def measuring(network: torch.nn.Module) -> Iterator[None]:
    """Within, the network's passes in training mode are averaged, each alike, to statistics that replace the old."""
    norms = batch_norms(network)
    momenta, modes = [m.momentum for m in norms], [m.training for m in network.modules()]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all passes
    network.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in zip(network.modules(), modes, strict=True):
            module.training = mode


class Looks(Protocol):
    """A trainer, as far as it is needed to measure its network's statistics."""

    @property
    def plain_network(self) -> torch.nn.Module: ...

    def look_at(self, batch: Any, /) -> None:
        """Pass a batch through the network."""


def measure(trainers: Sequence[Looks], batches: Iterator[Any], count: int) -> None:
    """Measure the statistics of the trainers' batch norms, if any has some, on the next `count` batches."""
    with_norms = [t for t in trainers if batch_norms(t.plain_network)]
    if not with_norms:
        return
    with ExitStack() as stack, torch.no_grad():
        for trainer in with_norms:
            stack.enter_context(measuring(trainer.plain_network))
        for batch in islice(batches, count):
            for trainer in with_norms:
                trainer.look_at(batch)


def synchronise(network: torch.nn.Module) -> None:
    """Let norms see the batch of all processes, so that several train as one does.

    torch's SyncBatchNorm computes on GPUs alone.
    """
    for norm in batch_norms(network):
        norm.forward = partial(_of_all_processes, norm)


def _of_all_processes(norm: Any, x: torch.Tensor) -> torch.Tensor:
    if not norm.training:
        kept = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return torch.nn.functional.batch_norm(x, *kept, training=False, eps=norm.eps)
    axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    given = x.float()
    count = _summed(given.new_tensor([x.numel() // x.shape[1]], dtype=torch.float64))
    mean = _Sum.apply(given.sum(axes)) / count.float()
    centred = given - mean.reshape(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / count.float()
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        weight = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, weight)
        norm.running_var.lerp_(variance * (count / (count - 1)).float(), weight)
    factor = torch.rsqrt(variance + norm.eps)
    shift = 0
    if norm.affine:
        factor, shift = factor * norm.weight, norm.bias.reshape(shape)
    return (centred * factor.reshape(shape) + shift).to(x.dtype)


class _Sum(torch.autograd.Function):  # type: ignore[misc]
    """The sum over processes; the gradient is the sum of theirs."""

    @staticmethod
    def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
        return _summed(value)

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(value: torch.Tensor) -> torch.Tensor:
    total = value.contiguous().clone()
    distributed.all_reduce(total)
    return total
