"""A network of PyTorch -> ONNX graph, checked node by node."""

import warnings
from collections import Counter
from typing import TYPE_CHECKING

from fastnnunet.errors import MismatchError, ParityError
from fastnnunet.specs.bundle import INPUT, OUTPUT

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 18


def to_onnx(
    network: "torch.nn.Module", channels: int, patch_size: tuple[int, ...], multiples: tuple[int, ...] | None = None
) -> "onnx.ModelProto":
    """Export `network` (eval, no deep supervision): image (N, C, *patch) -> logits (N, heads, *patch), N dynamic.

    With `multiples` the patch is dynamic too: any multiple of each along its axis.

    Weights stay inside the model under their state_dict names. Raises MismatchError for a network that ONNX cannot
    express, ParityError when the graph lost what makes it fast and exact: InstanceNormalization nodes taken apart, or
    parameters folded away.
    """
    import torch

    network = network.float().eval().to(memory_format=torch.contiguous_format)
    # a batch of two for the trace: a batch of one would be taken for a constant
    # and a dynamic axis of one multiple likewise
    shape = [max(n, 2 * m) for n, m in zip(patch_size, multiples, strict=True)] if multiples else patch_size
    example = torch.zeros(2, channels, *shape)
    dynamic: dict[int, object] = {0: torch.export.Dim("batch", min=1, max=1024)}
    for axis, multiple in enumerate(multiples or (), start=2):
        dynamic[axis] = multiple * torch.export.Dim(f"axis{axis}", min=1 if multiple == 1 else 2, max=4096)
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(dynamic,),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                optimize=False,  # its optimiser merges parameters that happen to be equal, and their names are lost
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as e:
            reason = str(e.__cause__ or e).strip().splitlines()[0][:200]
            raise MismatchError(
                f"the network {type(network).__name__} cannot be exported to ONNX: {reason}\n"
                "predict with nnU-Net itself (nnUNetv2_predict), or distil it into a student"
            ) from e
    model = program.model_proto
    _drop_zero_biases(model)
    _drop_trace_metadata(model)
    _check_graph(model, network)
    return model


def put_weights(model: "onnx.ModelProto", weights: "dict[str, torch.Tensor]") -> None:
    """Replace the weights in an exported model by those of another checkpoint of the same network."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].float().contiguous().numpy(), tensor.name))


def _check_graph(model: "onnx.ModelProto", network: "torch.nn.Module") -> None:
    import onnx
    import torch

    onnx.checker.check_model(model, full_check=True)
    nodes = Counter(node.op_type for node in model.graph.node)
    kinds = [m for m in _used_modules(network) if isinstance(m, torch.nn.modules.instancenorm._InstanceNorm)]
    norms = sum(not m.track_running_stats for m in kinds)  # one that keeps statistics becomes a BatchNormalization
    if nodes["InstanceNormalization"] != norms:
        raise ParityError(
            f"the exported graph has {nodes['InstanceNormalization']} InstanceNormalization nodes, expected {norms}\n"
            f"operators: {dict(nodes)}\nuse a torch version that exports instance_norm as one node"
        )
    external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        raise ParityError(f"{len(external)} weights lie outside the model file, expected all inside")


def _drop_zero_biases(model: "onnx.ModelProto") -> None:
    """Convolutions without bias get zeros that the graph computes, of a size ONNX Runtime rejects; take them out."""
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) == 3 and node.input[2] not in stored:
            del node.input[2]
    while True:
        used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        dead = [node for node in graph.node if not used.intersection(node.output)]
        if not dead:
            return
        for node in dead:
            graph.node.remove(node)


def _drop_trace_metadata(model: "onnx.ModelProto") -> None:
    """Source paths and stack traces of the exporting machine, which the exporter records in every node."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


def _used_modules(network: "torch.nn.Module") -> "list[torch.nn.Module]":
    """Modules by identity: nnU-Net registers the encoder twice (as itself and inside the decoder)."""
    return list({id(m): m for m in network.modules()}.values())
