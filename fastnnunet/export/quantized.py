"""A Q/DQ model as ONNX Runtime reads it -> as TensorRT reads it: the same numbers, biases in float32."""

from typing import TYPE_CHECKING

import numpy as np

from fastnnunet.errors import MismatchError

if TYPE_CHECKING:
    import onnx


def prepare_quantized(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy of `model` in which stored int32 values (biases) are float32, since TensorRT dequantises 8 bits and fewer.

    Raises MismatchError when the model is not quantised, or in a way TensorRT does not have: activations in other types
    than int8, zero points that are not zero.
    """
    import onnx
    from onnx import numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    if not quantize:
        raise MismatchError("the model has no QuantizeLinear nodes, expected a Q/DQ model for int8")
    problems = []
    for node in list(graph.node):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if len(node.input) < 3 or node.input[2] not in stored or node.input[1] not in stored:
            problems.append(f"{node.name}: scale or zero point is not stored in the model")
            continue
        zero = numpy_helper.to_array(stored[node.input[2]])
        if zero.any() or zero.dtype not in (np.int8, np.int32):
            problems.append(
                f"{node.name}: zero point {np.unique(zero)[:3]} of type {zero.dtype}, expected 0 of type int8"
            )
        elif zero.dtype == np.int32:
            if node.input[0] not in stored:
                problems.append(f"{node.name}: int32 values that are not stored in the model")
                continue
            values = numpy_helper.to_array(stored[node.input[0]]) * numpy_helper.to_array(stored[node.input[1]])
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
            graph.node.remove(node)
    if problems:
        raise MismatchError(
            "the quantised model cannot be built as it is:\n"
            + "\n".join(f"  - {p}" for p in problems[:5])
            + (f"\n  ... {len(problems) - 5} more" if len(problems) > 5 else "")
            + "\nquantise with symmetric int8 activations and weights"
        )
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.checker.check_model(made, full_check=True)
    return made
