"""ONNX in float32 -> the same graph computing in float16, statistics and sums over many values kept in float32.

In a strongly typed network precision is what the graph says, so this is where fp16 engines get theirs. Float16 ends at
65504: a sum of squares over a patch passes it where voxels reach a few hundred, and an InstanceNormalization in float16
would return zeros.

(onnxruntime.transformers has a converter of its own; the graph it returns is not in topological order, and importing it
changes sys.path.)
"""

from typing import TYPE_CHECKING

import numpy as np

from fastnnunet.errors import MismatchError

if TYPE_CHECKING:
    import onnx

FLOAT32, FLOAT16 = 1, 10  # onnx.TensorProto's numbers
FLOAT16_MAX = 65504.0
# what torch.autocast keeps in float32 on GPUs by their ONNX names, and operators that have inputs of a fixed type
FLOAT32_OPS = frozenset(
    (
        *("InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization"),
        *("RMSNormalization", "GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"),
        *("Softmax", "LogSoftmax", "Softplus", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Resize", "Range"),
    )
)
# they take any type, and what they return has the type they name
_UNTOUCHED_OPS = frozenset(("Cast", "Constant", "ConstantOfShape", "Shape", "Size"))


def to_half(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy of `model` that computes in float16 except for FLOAT32_OPS; its inputs and outputs stay float32.

    Raises MismatchError for a graph that is quantised or has graphs inside, and for weights float16 cannot hold.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    half = _HalfGraph(model.graph)
    for node in model.graph.node:
        half.add(node)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
    model.graph.node.extend(half.nodes)
    model.graph.initializer.extend(half.used_weights())
    onnx.checker.check_model(model, full_check=True)
    return model


class _HalfGraph:
    """The nodes made so far, and the float type of every tensor they know."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        values = (*graph.value_info, *graph.input, *graph.output)
        self._was = {value.name: value.type.tensor_type.elem_type for value in values}
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._is = {value.name: FLOAT32 for value in graph.input if self._was[value.name] == FLOAT32}
        self._is |= {name: FLOAT32 for name, tensor in self._weights.items() if tensor.data_type == FLOAT32}
        self.nodes: list[onnx.NodeProto] = []

    def add(self, old: "onnx.NodeProto") -> None:
        """Add a node of the float32 graph with the casts it needs. Nodes come in topological order."""
        import onnx

        if old.op_type in ("QuantizeLinear", "DequantizeLinear") or any(a.HasField("g") for a in old.attribute):
            raise MismatchError(
                f"node {old.name} is a {old.op_type}: float16 can be made of plain float32 graphs only\n"
                "export the bundle again from its student"
            )
        node = onnx.NodeProto()
        node.CopyFrom(old)
        untouched = old.op_type in _UNTOUCHED_OPS
        kind = FLOAT32 if untouched or old.op_type in FLOAT32_OPS else FLOAT16
        if not untouched:
            node.input[:] = [self._as(name, kind) for name in old.input]
        self.nodes.append(node)
        for index, name in enumerate(old.output):
            if self._was.get(name) != FLOAT32:
                continue
            if name in self._outputs and kind == FLOAT16:
                node.output[index] = f"{name}_float16"
                self._is[node.output[index]] = FLOAT16
                self._cast(node.output[index], name, FLOAT32)
            self._is.setdefault(name, kind)

    def used_weights(self) -> "list[onnx.TensorProto]":
        used = {name for node in self.nodes for name in node.input}
        return [tensor for name, tensor in self._weights.items() if name in used]

    def _as(self, name: str, kind: int) -> str:
        """The tensor in that float type, cast or converted the first time; what is no float tensor as it is."""
        if self._is.get(name, kind) == kind:
            return name
        other = f"{name}_float{'16' if kind == FLOAT16 else '32'}"
        if other not in self._is:
            if name in self._weights:
                self._weights[other] = _half_weight(self._weights[name], other)
                self._is[other] = kind
            else:
                self._cast(name, other, kind)
        return other

    def _cast(self, source: str, target: str, kind: int) -> None:
        import onnx

        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind))
        self._is[target] = kind


def _half_weight(tensor: "onnx.TensorProto", name: str) -> "onnx.TensorProto":
    import onnx

    values = onnx.numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0))
    if not largest <= FLOAT16_MAX:
        raise MismatchError(
            f"{tensor.name} holds {largest:g}, float16 ends at {FLOAT16_MAX:g}\nbuild this model with --precision fp32"
        )
    return onnx.numpy_helper.from_array(values.astype(np.float16), name)
