"""First weights of a student from its teacher: the teacher's network with most channels left out.

A U-Net of the same stages with fewer channels takes, of every layer, the output channels that matter most to the layers
that read them, and the matching input channels; what it cannot take keeps its own random start. Normalisation after
each convolution absorbs most of what leaving channels out does to the scale, and training mends the rest: measured, a
student starts about where one with random weights is after some hundred steps (compare Samragh et al. 2023, "Weight
subcloning").

A network is read off the names of its parameters, as dynamic_network_architectures names those of PlainConvUNet and
ResidualEncoderUNet. A *space* is a set of channels that several layers write (residual blocks) or read (skip
connections), and from which the same ones have to be chosen for all of them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

INPUT = ("input",)


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution; a transposed one has the input channels first in its weight."""

    name: str  # of its parameters: <name>.weight, <name>.bias
    norm: str | None  # of the normalisation after it
    reads: tuple[tuple[object, ...], ...]  # spaces, concatenated
    writes: tuple[object, ...]  # a space
    transposed: bool = False


def read_layers(weights: Mapping[str, torch.Tensor]) -> list[Layer]:
    """The convolutions of a U-Net in the order of computation; empty for a network of another kind."""
    stages = _count(weights, r"encoder\.stages\.(\d+)\.")
    if not stages or _count(weights, r"decoder\.transpconvs\.(\d+)\.weight") != stages - 1:
        return []
    layers: list[Layer] = []
    before: tuple[object, ...] = INPUT
    if "encoder.stem.convs.0.conv.weight" in weights:
        before = ("encoder", 0) if _is_identity(weights, 0) else ("stem",)
        layers += _stacked(weights, "encoder.stem", INPUT, before)
    for s in range(stages):
        after = ("encoder", s)
        plain = f"encoder.stages.{s}.0"
        if f"{plain}.convs.0.conv.weight" in weights:
            layers += _stacked(weights, plain, before, after)
        else:
            layers += _residual(weights, f"encoder.stages.{s}", before, after)
        before = after
    for d in range(stages - 1):
        if f"decoder.stages.{d}.convs.0.conv.weight" not in weights:
            return []  # a decoder of residual blocks
        up, after = ("up", d), ("decoder", d)
        layers.append(Layer(f"decoder.transpconvs.{d}", None, (before,), up, transposed=True))
        first, *rest = _stacked(weights, f"decoder.stages.{d}", up, after)
        layers += [replace(first, reads=(up, ("encoder", stages - 2 - d))), *rest]
        layers.append(Layer(f"decoder.seg_layers.{d}", None, (after,), ("heads", d)))
        before = after
    return layers if all(f"{layer.name}.weight" in weights for layer in layers) else []


def inherit(teacher: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a student takes over: names of its own parameters -> tensors of their shapes. Empty when nothing fits."""
    given, wanted = read_layers(teacher), {layer.name: layer for layer in read_layers(student)}
    if not given or not wanted:
        return {}
    widths = _widths(given, teacher)
    chosen = _choose(given, teacher, widths, _widths(wanted.values(), student))
    taken: dict[str, torch.Tensor] = {}
    for layer in given:
        own = wanted.get(layer.name)
        if own is None or own != layer or not {*layer.reads, layer.writes} <= chosen.keys():
            continue
        weight, like = teacher[f"{layer.name}.weight"].float(), student[f"{layer.name}.weight"]
        if weight.shape[2:] != like.shape[2:]:
            continue  # another kernel
        new = {f"{layer.name}.weight": _sliced(layer, weight, chosen, widths)}
        parts = [layer.name] if layer.norm is None else [layer.name, layer.norm]
        for name in [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")][1:]:
            if name in teacher and not (name == f"{layer.name}.bias" and name not in student):  # which norms take away
                new[name] = teacher[name][chosen[layer.writes]]
        if all(name in student and student[name].shape == tensor.shape for name, tensor in new.items()):
            taken |= {name: tensor.to(student[name].dtype) for name, tensor in new.items()}
    return taken


def inherit_weights(network: torch.nn.Module, teacher: Mapping[str, torch.Tensor]) -> float:
    """Give `network` what it can take over of a teacher's weights; returns the share of its parameters that is."""
    own = dict(network.named_parameters())  # each tensor once, though state dicts name some twice
    taken = {name: tensor for name, tensor in inherit(teacher, network.state_dict()).items() if name in own}
    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    return sum(t.numel() for t in taken.values()) / sum(p.numel() for p in own.values())


def _choose(
    given: Sequence[Layer],
    teacher: Mapping[str, torch.Tensor],
    widths: Mapping[tuple[object, ...], int],
    narrow: Mapping[tuple[object, ...], int],
) -> dict[tuple[object, ...], torch.Tensor]:
    """Space -> which of the teacher's channels the student gets, ascending: those with the greatest importance.

    `widths` and `narrow`: channels of each space of teacher and student.
    The importance of a channel is the size of the normalisation's factors that write it times that of the weights that
    read it, each relative to the layer's other channels.
    """
    written = {space: torch.zeros(n) for space, n in widths.items()}
    read = {space: torch.zeros(n) for space, n in widths.items()}
    for layer in given:
        weight = teacher[f"{layer.name}.weight"].float()
        factor = teacher.get(f"{layer.norm}.weight") if layer.norm is not None else None
        size = _norm(weight, 1 if layer.transposed else 0) if factor is None else factor.float().abs()
        written[layer.writes] += size / size.mean()
        sizes = _norm(weight, 0 if layer.transposed else 1)
        for space, part in zip(layer.reads, sizes.split([widths[s] for s in layer.reads]), strict=True):
            read[space] += part / part.mean()
    chosen = {}
    for space, count in narrow.items():
        if space == INPUT or space[0] == "heads":
            chosen[space] = torch.arange(count)
        elif space in widths and count <= widths[space]:
            chosen[space] = (written[space] * read[space]).topk(count).indices.sort().values
    return {space: kept for space, kept in chosen.items() if widths.get(space, -1) >= len(kept)}


def _sliced(
    layer: Layer,
    weight: torch.Tensor,
    chosen: Mapping[tuple[object, ...], torch.Tensor],
    widths: Mapping[tuple[object, ...], int],
) -> torch.Tensor:
    """The weight of the chosen channels; without a normalisation after it each output keeps the size of its weights."""
    outputs, inputs = (1, 0) if layer.transposed else (0, 1)
    starts = [sum(widths[s] for s in layer.reads[:n]) for n in range(len(layer.reads))]
    columns = torch.cat([start + chosen[space] for start, space in zip(starts, layer.reads, strict=True)])
    whole = weight.index_select(outputs, chosen[layer.writes])
    part = whole.index_select(inputs, columns)
    if layer.norm is None:
        shape = [-1 if axis == outputs else 1 for axis in range(part.ndim)]
        part = part * (_norm(whole, outputs) / _norm(part, outputs).clamp(min=1e-12)).reshape(shape)
    return part


def _widths(layers: Iterable[Layer], weights: Mapping[str, torch.Tensor]) -> dict[tuple[object, ...], int]:
    layers = list(layers)
    widths = {layer.writes: weights[f"{layer.name}.weight"].shape[1 if layer.transposed else 0] for layer in layers}
    first = next((layer for layer in layers if layer.reads == (INPUT,)), None)
    return widths if first is None else widths | {INPUT: weights[f"{first.name}.weight"].shape[1]}


def _norm(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Euclidean norm of the part of a weight that belongs to each channel of `axis`."""
    return weight.transpose(0, axis).flatten(1).square().sum(1).sqrt()


def _stacked(
    weights: Mapping[str, torch.Tensor], prefix: str, before: tuple[object, ...], after: tuple[object, ...]
) -> list[Layer]:
    """Convolutions one after the other; only the last writes the space that others read."""
    count = _count(weights, re.escape(prefix) + r"\.convs\.(\d+)\.")
    spaces = [before, *((prefix, n) for n in range(count - 1)), after]
    return [_block(weights, f"{prefix}.convs.{n}", spaces[n], spaces[n + 1]) for n in range(count)]


def _residual(
    weights: Mapping[str, torch.Tensor], prefix: str, before: tuple[object, ...], after: tuple[object, ...]
) -> list[Layer]:
    """Residual blocks of two convolutions, all of which write the space of their stage."""
    layers = []
    for b in range(_count(weights, re.escape(prefix) + r"\.blocks\.(\d+)\.")):
        block, inner = f"{prefix}.blocks.{b}", (prefix, b)
        source = before if b == 0 else after
        layers += [_block(weights, f"{block}.conv1", source, inner), _block(weights, f"{block}.conv2", inner, after)]
        for n in (0, 1):  # after pooling, where the stage has a stride
            if f"{block}.skip.{n}.conv.weight" in weights:
                layers.append(_block(weights, f"{block}.skip.{n}", source, after))
    return layers


def _block(
    weights: Mapping[str, torch.Tensor], name: str, source: tuple[object, ...], target: tuple[object, ...]
) -> Layer:
    norm = f"{name}.norm" if f"{name}.norm.weight" in weights else None
    return Layer(f"{name}.conv", norm, (source,), target)


def _is_identity(weights: Mapping[str, torch.Tensor], stage: int) -> bool:
    """Whether the first residual block of a stage adds its input as it is."""
    return not any(name.startswith(f"encoder.stages.{stage}.blocks.0.skip.") for name in weights)


def _count(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in weights)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
