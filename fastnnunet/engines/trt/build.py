"""An ONNX graph -> a TensorRT engine: simplified, checked on a CPU, built by the library."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.engines.base import Array, LiveNetwork, Precision
from fastnnunet.engines.trt.half import to_half
from fastnnunet.engines.trt.library import Library
from fastnnunet.engines.trt.stepwise import run_stepwise
from fastnnunet.engines.trt.store import EngineKey, StoredEngine, find_engine, machine_folder, write_engine
from fastnnunet.errors import MismatchError, ParityError
from fastnnunet.specs.bundle import INPUT, OUTPUT

if TYPE_CHECKING:
    import onnx

DEFAULT_BATCH = {2: 16, 3: 4}  # dimensions of the patch -> largest batch
# what torch exports of Primus and TensorRT does not take
_FOR_OPTIMIZER = ("SplitToSequence", "SequenceAt")
# share of voxels that keep their label, of logits near each other in float16 or 8 bits; less is a wrong graph
LABEL_AGREEMENT: dict[Precision, float] = {"fp32": 0.9999, "fp16": 0.995, "int8": 0.9}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphParity:
    """How far the graph an engine is built from is from the bundle's expected logits, run on a CPU."""

    patches: int
    max_abs_difference: float  # in logits
    max_abs_logit: float
    label_agreement: float  # share of voxels with the same argmax


def engine_of_network(network: LiveNetwork, precision: Precision, library: Library, architecture: str) -> StoredEngine:
    """The engine of a network in memory, built where this machine's folder has none.

    Raises MismatchError and ParityError as `check_parity` and `build_plan` do.
    """
    import onnx

    model = network.to_onnx()
    key = EngineKey(
        model_sha256=hashlib.sha256(model).hexdigest(),
        precision=precision,
        library=library.name,
        library_version=library.version,
        architecture=architecture,
        max_batch=DEFAULT_BATCH[len(network.patch_size)],
        input_shape=(network.channels, *network.patch_size),
        output_shape=(network.num_heads, *network.patch_size),
    )
    folder = machine_folder()
    if (stored := find_engine(folder, key)) is not None:
        return stored
    graph = simplify(onnx.load_model_from_string(model))
    if precision == "fp16":
        graph = to_half(graph)
    noise_NCX = np.random.default_rng(0).standard_normal((1, *key.input_shape)).astype(np.float32)
    parity = check_parity(graph, noise_NCX, run_onnx(model, noise_NCX), precision)
    return write_engine(folder, key, build_plan(graph, key, library), asdict(parity))


def run_onnx(model: str | bytes, image_NCX: Array) -> Array:
    """Logits of an ONNX file or its content, in float32 on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits_NHX: Array = session.run([OUTPUT], {INPUT: image_NCX})[0]
    return logits_NHX


def simplify(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph without sequences of tensors and type casts that turn out to do nothing, if it has any."""
    if not any(node.op_type in _FOR_OPTIMIZER for node in model.graph.node):
        return model
    from onnxscript import optimizer

    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every constant it leaves alone
    try:
        return optimizer.optimize(model)
    finally:
        logger.setLevel(level)


def check_parity(
    graph: "onnx.ModelProto", image_NCX: np.ndarray, expected: np.ndarray, precision: Precision
) -> GraphParity:
    """Run the graph on patches. Raises ParityError for NaN or when too many labels differ."""
    got = run_stepwise(graph, {graph.graph.input[0].name: image_NCX})[graph.graph.output[0].name]
    parity = GraphParity(
        patches=len(image_NCX),
        max_abs_difference=float(np.abs(got - expected).max()),
        max_abs_logit=float(np.abs(expected).max()),
        label_agreement=float((got.argmax(1) == expected.argmax(1)).mean()),
    )
    if not np.isfinite(got).all() or parity.label_agreement < LABEL_AGREEMENT[precision]:
        raise ParityError(
            f"in {precision} the network gives the same label on {parity.label_agreement:.3%} of the voxels of "
            f"{parity.patches} real patches, expected at least {LABEL_AGREEMENT[precision]:.2%} and finite logits\n"
            f"  largest logit difference {parity.max_abs_difference:.3g}, logits up to {parity.max_abs_logit:.3g}\n"
            "no engine was built; build it with --precision fp32"
        )
    return parity


def build_plan(graph: "onnx.ModelProto", key: EngineKey, library: Library) -> bytes:
    """The serialised engine. Raises MismatchError with the library's own words when it refuses the graph."""
    module = library.module
    library.logger.errors.clear()
    builder = module.Builder(library.logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, library.logger)
    if not parser.parse(graph.SerializeToString()):
        errors = (parser.get_error(i) for i in range(parser.num_errors))
        raise MismatchError(_refusal(key, [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]))
    _check_network(network, graph, key, module)
    plan = builder.build_serialized_network(network, builder_config(builder, key, library))
    if plan is None:
        raise MismatchError(_refusal(key, library.logger.errors))
    return bytes(plan)


def builder_config(builder: Any, key: EngineKey, library: Library) -> Any:
    """Target, range of batches and tiles, and what little of precision is not in the graph."""
    config = builder.create_builder_config()
    library.set_target(config, key.architecture)
    if key.precision == "fp32":
        config.clear_flag(library.module.BuilderFlag.TF32)  # on by default; rounds factors of convolutions to 11 bits
    profile = builder.create_optimization_profile()
    channels, *patch = key.input_shape
    smallest, largest = (key.min_batch, channels, *(key.smallest_tile or patch)), (key.max_batch, channels, *patch)
    profile.set_shape(INPUT, smallest, largest, largest)
    config.add_optimization_profile(profile)
    return config


def _check_network(network: Any, graph: "onnx.ModelProto", key: EngineKey, module: Any) -> None:
    """What the parser made of the graph: inputs and outputs of the bundle, norms still norms and in float32."""
    problems = []
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or -1
    for kind, got, name, channels in (
        ("inputs", [network.get_input(i) for i in range(network.num_inputs)], INPUT, key.input_shape[0]),
        ("outputs", [network.get_output(i) for i in range(network.num_outputs)], OUTPUT, key.output_shape[0]),
    ):
        found = [(t.name, tuple(t.shape), t.dtype) for t in got]
        if found != (expected_here := [(name, (batch, channels, *key.space), module.float32)]):
            problems.append(f"{kind} are {found}, expected {expected_here}")
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    norms = [layer for layer in layers if layer.type == module.LayerType.NORMALIZATION]
    expected = sum(node.op_type == "InstanceNormalization" for node in graph.graph.node)
    if len(norms) < expected:
        problems.append(f"{len(norms)} normalization layers were made of {expected} InstanceNormalization nodes")
    problems += [
        f"normalization {layer.name} is computed in {layer.get_input(0).dtype}, expected float32"
        for layer in norms
        if layer.get_input(0).dtype != module.float32
    ]
    if problems:
        raise MismatchError(_refusal(key, problems))


def _refusal(key: EngineKey, reasons: Sequence[str]) -> str:
    listed = "\n".join(f"  - {reason}" for reason in list(reasons)[:5]) or "  - (it gave no reason)"
    return (
        f"{key.library} {key.library_version} cannot build the model in {key.precision} for {key.architecture}:\n"
        f"{listed}\nno engine was written; try another --precision or --arch, or predict with another backend"
    )
