"""Two ways to teach a student that its answer shall not depend on where its strides begin; tried, not offered.

`alias_free`   strided convolutions see nothing of the highest frequency, which striding would fold onto the lowest:
               after each step the part of their kernels that answers to (+1, -1, +1) along a strided axis is taken out.
               What is left of three taps is a blur of two taps followed by a kernel of two, so it is the blurred
               pooling of Zhang, "Making Convolutional Networks Shift-Invariant Again" (ICML 2019), as plain weights
               that stock nnU-Net loads.
`shifts`       each patch is predicted a second time, moved by less than the largest stride, and the divergence of the
               two predictions where both lie is added to the loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from fastnnunet.nnunet.student.fit import stride_products
from fastnnunet.nnunet.trainer.trainer import StudentTrainer


def without_nyquist(kernel: torch.Tensor, axis: int) -> torch.Tensor:
    """The nearest kernel that answers nothing to (+1, -1, +1, ...) along an axis."""
    alternating = torch.tensor([(-1.0) ** n for n in range(kernel.shape[axis])], dtype=kernel.dtype)
    along = alternating.reshape([-1 if n == axis % kernel.ndim else 1 for n in range(kernel.ndim)])
    return kernel - along * (kernel * along).sum(axis, keepdim=True) / kernel.shape[axis]


@torch.no_grad()
def filter_strided(network: torch.nn.Module) -> int:
    """Do so for every strided convolution of at least three taps; how many there are."""
    found = 0
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) and max(module.stride) > 1:
            for axis, (stride, taps) in enumerate(zip(module.stride, module.kernel_size, strict=True)):
                if stride > 1 and taps > 2:
                    module.weight.copy_(without_nyquist(module.weight, 2 + axis))
            found += 1
    return found


def alias_free(trainer: StudentTrainer) -> None:
    """Let a trainer do so before the first and after each step."""
    if filter_strided(trainer.plain_network) == 0:
        raise ValueError("the network has no strided convolutions")
    trainer.optimizer.register_step_post_hook(lambda *_: filter_strided(trainer.plain_network))


def moved(image_NCX: torch.Tensor, shift: tuple[int, ...]) -> torch.Tensor:
    """An image moved on by `shift`; zeros come in."""
    pads = [n for amount in reversed(shift) for n in (amount, -amount)]
    return functional.pad(image_NCX, pads)


def disagreement(first_NHX: torch.Tensor, second_NHX: torch.Tensor, shift: tuple[int, ...]) -> torch.Tensor:
    """Mean divergence KL(first || second) in nats where both lie; the first is a constant. Logits (N, H, *space)."""
    here = tuple(slice(0, n - s) for n, s in zip(first_NHX.shape[2:], shift, strict=True))
    there = tuple(slice(s, None) for s in shift)
    first = first_NHX[(..., *here)].detach().float().log_softmax(1)
    second = second_NHX[(..., *there)].float().log_softmax(1)
    return (first.exp() * (first - second)).sum(1).mean()


def shifts(trainer: StudentTrainer) -> None:
    """Let a trainer's loss count what predictions of moved patches differ by."""
    strides = stride_products(trainer.configuration_manager.configuration)
    if strides is None:
        raise ValueError("the network has no list of strides")
    generator = torch.Generator().manual_seed(trainer.seed)
    seen: list[torch.Tensor] = []
    plain: Callable[[Any, Any], torch.Tensor] = trainer.loss

    def look(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[:] = arguments[:1]

    def loss(outputs: Any, target: Any) -> torch.Tensor:
        hard = plain(outputs, target)
        if not torch.is_grad_enabled():  # validation
            return hard
        shift = tuple(int(torch.randint(stride, (), generator=generator)) for stride in strides)
        (image_NCX,) = seen
        again = trainer.network(moved(image_NCX, shift))
        return hard + disagreement(outputs[0], again[0], shift)

    trainer.network.register_forward_pre_hook(look)
    trainer.loss = loss


STABLE: dict[str, Callable[[StudentTrainer], None]] = {"alias_free": alias_free, "shifts": shifts}
