"""Running an ONNX graph node by node, every tensor in between rounded to the type the graph gives it.

ONNX Runtime has next to no float16 kernels for CPUs: it computes such nodes in float32 and drops the casts between
them, so that nothing in the middle of a graph is rounded or overflows. One node at a time it has to hand out float16,
which is what a GPU does: sums in float32 inside an operator, float16 between operators.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]


def run_stepwise(model: "onnx.ModelProto", inputs: dict[str, Array]) -> dict[str, Array]:
    """The graph's outputs by name. A tensor is kept until its last reader has run."""
    import onnx
    import onnxruntime

    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    outputs = [value.name for value in graph.output]
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(outputs)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer} | inputs
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for node in graph.node:
        given = {name: tensors[name] for name in node.input if name}
        step = _one_node_model(node, given, types, model)
        session = onnxruntime.InferenceSession(step, options, providers=["CPUExecutionProvider"])
        made = [name for name in node.output if name]
        tensors |= dict(zip(made, session.run(made, given), strict=True))
        readers.subtract(name for name in node.input if name)
        for name in given:
            if readers[name] <= 0:
                del tensors[name]
    return {name: tensors[name] for name in outputs}


def _one_node_model(
    node: "onnx.NodeProto", given: dict[str, Array], types: dict[str, int], model: "onnx.ModelProto"
) -> bytes:
    from onnx import helper

    graph = helper.make_graph(
        [node],
        "step",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype), array.shape)
            for name, array in given.items()
        ],
        [helper.make_tensor_value_info(name, types[name], None) for name in node.output if name],
    )
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return made.SerializeToString()
