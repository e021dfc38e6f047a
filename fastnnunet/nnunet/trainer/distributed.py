"""One training over several processes, started by torchrun: each makes and trains on its samples of every batch."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from fastnnunet.errors import BuildError, FastnnUNetError, SpecError
from fastnnunet.system.children import end_with


@dataclass(frozen=True, slots=True)
class Share:
    """Which samples of a batch process `rank` of `world_size` makes and trains on; as nnU-Net divides them."""

    rank: int = 0
    world_size: int = 1

    def of(self, batch_size: int) -> range:
        """The numbers of its samples; the first processes get one more where the batch cannot be divided evenly."""
        each, more = divmod(batch_size, self.world_size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))


def share() -> Share:
    """This process's place in the group; alone where there is none."""
    if not distributed.is_initialized():
        return Share()
    return Share(distributed.get_rank(), distributed.get_world_size())


def is_first() -> bool:
    """Whether this process writes files and progress."""
    return share().rank == 0


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started: NCCL on GPUs, gloo on CPUs. Does nothing in a process started alone.

    Raises BuildError where another of them has ended; that one has said why. They end with torchrun, however that ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(local_device("cuda"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid(), started_by_main_thread=False)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, FastnnUNetError) or not re.search("gloo|NCCL|onnection (closed|reset)", str(e)):
            raise
        raise BuildError(
            "another process of this training has ended, and this one with it; what was wrong is above or below"
        ) from e
    finally:
        distributed.destroy_process_group()


def local_device(device: str) -> torch.device:
    """`cuda` -> the GPU of this process; other devices as they are."""
    if device == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(device)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if distributed.is_initialized():
        distributed.barrier()


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a scalar over processes; its own value where there is one."""
    if not distributed.is_initialized():
        return value
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()


def least_of_processes(value: int, device: torch.device) -> int:
    """The least of a number of each process."""
    if not distributed.is_initialized():
        return value
    least = torch.tensor(value, device=device)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return int(least)


def loss_weight(batch_size: int) -> float:
    """Share of the samples times processes: the mean of losses so weighted is the loss of the whole batch."""
    mine = share()
    return len(mine.of(batch_size)) * mine.world_size / batch_size


def valid_share(masks: Sequence[torch.Tensor], samples: int | None = None) -> torch.Tensor:
    """Valid voxels per sample here, divided by those per sample in all processes: a number for each mask.

    `masks`, bool (N, 1, space), say which voxels of this process's N samples count. A mean over the valid voxels here
    times this number and the weight of the samples (`loss_weight`) gives, averaged over processes, the mean over the
    valid voxels of the whole batch. 0 where no process has any. `samples` says how many of them count, if not all.
    """
    samples = len(masks[0]) if samples is None else samples
    counts = torch.stack([mask.sum(dtype=torch.float64) for mask in masks])
    total = torch.cat([counts, counts.new_tensor([samples])])
    if distributed.is_initialized():
        distributed.all_reduce(total)
    everywhere = total[:-1] / total[-1]
    return torch.where(everywhere > 0, counts / max(1, samples) / everywhere, 0).float()


class LossOverValidVoxels(torch.nn.Module):  # type: ignore[misc]
    """nnU-Net's loss for data with an ignore label, so that its cross entropy counts every valid voxel alike.

    nnU-Net averages it over the valid voxels of a process. `valid_mask` makes bool (N, 1, space) of a target.
    """

    def __init__(self, loss: torch.nn.Module, valid_mask: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._loss, self._valid_mask = loss, valid_mask
        self._shares: dict[tuple[int, ...], torch.Tensor] = {}  # by shape, which tells the resolution
        for module in list(loss.modules()):
            if hasattr(module, "ce"):
                module.ce = _Weighted(module.ce, self._shares)

    def forward(self, outputs: Any, target: Any) -> torch.Tensor:
        return self._of(outputs, target, counts=True)

    def of_no_sample(self, outputs: Any, target: Any) -> torch.Tensor:
        """0 with a gradient of zeros: none of this process's samples counts, while others wait for its numbers."""
        return self._of(outputs, target, counts=False) * 0

    def _of(self, outputs: Any, target: Any, *, counts: bool) -> torch.Tensor:
        masks = [self._valid_mask(t) & counts for t in (target if isinstance(target, list) else [target])]
        for mask, value in zip(masks, valid_share(masks, None if counts else 0), strict=True):
            self._shares[tuple(mask.shape[2:])] = value
        return self._loss(outputs, target)


class _Weighted(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, loss: torch.nn.Module, shares: dict[tuple[int, ...], torch.Tensor]) -> None:
        super().__init__()
        self._loss, self._shares = loss, shares

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._loss(logits, target) * self._shares[tuple(logits.shape[2:])]


def average_gradients(network: torch.nn.Module) -> None:
    """Replace gradients by their mean over processes.

    Students are small, so one message after the backward pass does; torch's DistributedDataParallel, which overlaps
    the two, wants a gradient for every output, and nnU-Net gives its coarsest one no weight.
    """
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def prepare_loss(loss: Any, batch_size: int, batch_dice: bool) -> None:
    """Let nnU-Net's batch Dice sum over all processes.

    Raises SpecError when the batch cannot be divided: fewer samples than processes, or unequal shares where nnU-Net
    computes Dice over the whole batch, which it gathers in equal parts.
    """
    processes = share().world_size
    if batch_size < processes or (batch_dice and batch_size % processes):
        raise SpecError(
            f"{processes} processes: the batch of {batch_size} cannot be divided among them\n"
            f"start torchrun with --nproc-per-node of {'a divisor of' if batch_dice else 'at most'} {batch_size}"
        )
    for module in loss.modules():
        if hasattr(module, "ddp"):
            module.ddp = True
