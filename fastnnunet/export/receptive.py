"""What a graph looks at: the receptive field of its output, and the numbers that it holds at once.

Both follow from the operators alone. A voxel of the output is followed back through the graph as an interval along one
axis; since strides make voxels differ by their phase, every phase is followed.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import MismatchError
from fastnnunet.export.parity import is_local

if TYPE_CHECKING:
    import onnx

_MOVING = ("AveragePool", "Conv", "ConvTranspose", "MaxPool")  # operators that look at other voxels than their own
_OVERWRITES = ("BatchNormalization", "Dropout", "Elu", "Identity", "LeakyRelu", "PRelu", "Relu", "Sigmoid")


def tile_dependence(model: "onnx.ModelProto", spatial: int) -> str | None:
    """What makes the output depend on where a tile ends, beyond a receptive field; None where nothing does."""
    fields = {tensor.name for tensor in model.graph.initializer if math.prod(tensor.dims[-spatial:]) > 1}
    for node in model.graph.node:
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        if node.op_type == "InstanceNormalization" or training:
            return f"{node.op_type} takes its statistics from the tile"
        if not is_local(node, fields):
            return f"{node.op_type} is no operator that looks at the same surroundings everywhere"
    return None


def receptive_reach(model: "onnx.ModelProto", multiples: Sequence[int]) -> tuple[int, ...]:
    """Along each axis, how far from a voxel of the output the furthest voxel of the input lies that it depends on.

    `multiples`: products of the strides. The graph must not depend on tiles. Raises MismatchError for one whose output
    is on another grid than its input.
    """
    return tuple(_reach(model, axis, multiple) for axis, multiple in enumerate(multiples))


def bytes_per_voxel(model: "onnx.ModelProto", channels: int, spatial: int) -> int:
    """The float32 numbers that are held at once, per voxel of the input and in bytes, the input among them.

    Operators run in the graph's order, what nobody needs any more is freed, and norms and activations overwrite.
    """
    graph = model.graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    image, logits = graph.input[0].name, graph.output[0].name
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    held: dict[str, Fraction] = {image: Fraction(channels)}  # numbers per voxel of the image
    scale: dict[str, Fraction] = {image: Fraction(1)}  # voxels, per voxel of the image
    peak = Fraction(channels)
    for i, node in enumerate(graph.node):
        inputs = [name for name in node.input if name in scale]
        if not inputs:
            continue  # of weights alone
        source, result = inputs[0], node.output[0]
        strides = math.prod(_numbers(node, "strides", spatial, 1)) if node.op_type in _MOVING else 1
        scale[result] = scale[source] * strides if node.op_type == "ConvTranspose" else scale[source] / strides
        if node.op_type == "Conv":
            held[result] = weights[node.input[1]][0] * scale[result]
        elif node.op_type == "ConvTranspose":
            group = next((a.i for a in node.attribute if a.name == "group"), 1)
            held[result] = weights[node.input[1]][1] * group * scale[result]
        elif node.op_type == "Concat":
            held[result] = sum((held[name] for name in inputs), Fraction(0))
        else:
            held[result] = held[source] / (scale[source] / scale[result])
        overwrites = node.op_type in _OVERWRITES and last[source] == i and source != image
        now = sum(held.values(), Fraction(0)) - (held[source] if overwrites else 0)
        peak = max(peak, now)
        for name in {name for name in inputs if last[name] == i and name != image}:
            held[name] = Fraction(0)
    return math.ceil(4 * max(peak, held[image] + held[logits]))


def _reach(model: "onnx.ModelProto", axis: int, multiple: int) -> int:
    furthest = 0
    image, logits = model.graph.input[0].name, model.graph.output[0].name
    for voxel in range(multiple):
        needs = {logits: (voxel, voxel)}
        for node in reversed(model.graph.node):
            wanted = [needs.pop(name) for name in node.output if name in needs]
            if not wanted:
                continue
            interval = _interval_before(node, axis, *wanted[0])
            for name in node.input:
                known = needs.get(name, interval)
                needs[name] = min(known[0], interval[0]), max(known[1], interval[1])
        first, last = needs[image]
        furthest = max(furthest, voxel - first, last - voxel)
        if not first <= voxel <= last:
            raise MismatchError("the network's output lies on another grid than its input")
    return furthest


def _interval_before(node: "onnx.NodeProto", axis: int, first: int, last: int) -> tuple[int, int]:
    """What an operator's output from `first` to `last` needs of its input."""
    if node.op_type not in _MOVING:
        return first, last
    kernel = next(a for a in node.attribute if a.name == "kernel_shape").ints
    spatial = len(kernel)
    stride, dilation = (_numbers(node, name, spatial, 1)[axis] for name in ("strides", "dilations"))
    padding, span = _numbers(node, "pads", 2 * spatial, 0)[axis], (kernel[axis] - 1) * dilation
    if node.op_type == "ConvTranspose":  # output = input * stride - padding + 0 .. span
        return -((span - first - padding) // stride), (last + padding) // stride
    return first * stride - padding, last * stride - padding + span


def _numbers(node: "onnx.NodeProto", name: str, count: int, default: int) -> Sequence[Any]:
    found = next((list(a.ints) for a in node.attribute if a.name == name), [])
    return found or [default] * count
