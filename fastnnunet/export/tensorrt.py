"""Bundle -> TensorRT engines: the bundle's ONNX in the precision asked for, checked on a CPU, built and stored.

Batches are dynamic from 1 to `max_batch`, space is fixed to the patch. What a library cannot take, a graph that is not
what it should be, or a precision that loses too much is one error, and nothing is stored.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, ParityError
from fastnnunet.export.half import to_half
from fastnnunet.export.onnx import INPUT, OUTPUT
from fastnnunet.export.quantized import prepare_quantized
from fastnnunet.export.stepwise import run_stepwise
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.trt.library import Library, find_library
from fastnnunet.trt.store import MODEL_FILES, EngineKey, StoredEngine, engine_folders, find_engine, write_engine

if TYPE_CHECKING:
    import onnx

EnginePrecision = Literal["fp32", "fp16", "int8"]
PARITY_FILE = "parity.npz"
DEFAULT_BATCH = {2: 16, 3: 4}  # dimensions of the patch -> largest batch
# operators an InstanceNormalization becomes when an exporter takes it apart; slower, and in fp16 wrong
_TAKEN_APART = ("BatchNormalization", "GroupNormalization", "Sqrt", "Reciprocal")
# what torch exports of Primus and TensorRT does not take
_FOR_OPTIMIZER = ("SplitToSequence", "SequenceAt")
# share of voxels that keep their label, of logits near each other in float16 or 8 bits; less is a wrong graph
LABEL_AGREEMENT = {"fp32": 0.9999, "fp16": 0.995, "int8": 0.9}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphParity:
    """How far the graph an engine is built from is from the bundle's expected logits, run on a CPU."""

    patches: int
    max_abs_difference: float  # in logits
    max_abs_logit: float
    label_agreement: float  # share of voxels with the same argmax


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    stored: StoredEngine
    was_there: bool


def export_engines(
    bundle: Path,
    *,
    precision: EnginePrecision = "fp16",
    architectures: Sequence[str] = (),
    library_name: str | None = None,
    max_batch: int | None = None,
    beside_bundle: bool = True,
) -> list[BuiltEngine]:
    """Build an engine of a bundle for each architecture, or take those that are there.

    `architectures` empty: the GPU of this machine for tensorrt; for tensorrt_rtx all it knows from sm80 on.
    `beside_bundle` False: below this machine's cache folder, for bundles that cannot be written to.
    Raises NotFoundError and CorruptError (bundle), BackendError (library), SpecError (architecture), MismatchError (the
    graph is wrong or has what the library does not support), ParityError (the precision loses too much).
    """
    spec = load_bundle_spec(bundle)
    if len(spec.model_files) > 1:
        raise MismatchError(
            f"{bundle} is an ensemble of {len(spec.model_files)} folds, engines are built of one network\n"
            "export one fold by itself, or distil the ensemble into a student"
        )
    library = find_library(library_name)
    targets = tuple(architectures) or default_architectures(library)
    for architecture in targets:
        library.set_target(library.module.Builder(library.logger).create_builder_config(), architecture)
    model_file = _model_file(bundle, precision)
    keys = [engine_key(spec, model_file, precision, library, target, max_batch) for target in targets]
    folder = engine_folders(bundle)[0 if beside_bundle else 1]
    built: dict[EngineKey, BuiltEngine] = {}
    for key in keys:
        if (stored := find_engine(folder, key)) is not None:
            built[key] = BuiltEngine(stored=stored, was_there=True)
    if len(built) < len(keys):
        graph = make_graph(model_file, spec, precision)
        parity = check_parity(graph, bundle / PARITY_FILE, precision)
        for key in keys:
            if key not in built:
                plan = build_plan(graph, key, library)
                built[key] = BuiltEngine(stored=write_engine(folder, key, plan, asdict(parity)), was_there=False)
    return [built[key] for key in keys]


def default_architectures(library: Library) -> tuple[str, ...]:
    """For tensorrt_rtx all but Turing, on which TensorRT has no 3d convolution in fp32; for tensorrt the GPU here."""
    return tuple(name for name in library.architectures() if name != "sm75")


def engine_key(
    spec: BundleSpec,
    model_file: Path,
    precision: EnginePrecision,
    library: Library,
    architecture: str,
    max_batch: int | None,
) -> EngineKey:
    channels = len(spec.channel_names) + len(spec.previous_labels)
    return EngineKey(
        model_sha256=sha256_of_file(model_file),
        precision=precision,
        library=library.name,
        library_version=library.version,
        architecture=architecture,
        max_batch=max_batch or DEFAULT_BATCH[len(spec.patch_size)],
        input_shape=(channels, *spec.patch_size),
        output_shape=(spec.num_heads, *spec.patch_size),
    )


def make_graph(model_file: Path, spec: BundleSpec, precision: EnginePrecision) -> "onnx.ModelProto":
    """The graph to build from, in that precision. Raises CorruptError, MismatchError."""
    import onnx

    try:
        model = onnx.load(str(model_file))
        onnx.checker.check_model(model, full_check=True)
    except Exception as e:  # protobuf's DecodeError and onnx's own errors share no base class
        raise CorruptError(f"cannot read {model_file}: {e}") from e
    check_norms(model, spec)
    if any(node.op_type in _FOR_OPTIMIZER for node in model.graph.node):
        model = _simplify(model)
    if precision == "fp16":
        return to_half(model)
    return prepare_quantized(model) if precision == "int8" else model


def _simplify(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph without sequences of tensors and type casts that turn out to do nothing."""
    from onnxscript import optimizer

    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every constant it leaves alone
    try:
        return optimizer.optimize(model)
    finally:
        logger.setLevel(level)


def check_norms(model: "onnx.ModelProto", spec: BundleSpec) -> None:
    """Raise MismatchError when the network has instance norms and the graph has something else in their place."""
    norm = str(spec.architecture.get("arch_kwargs", {}).get("norm_op"))
    if "InstanceNorm" not in norm:
        return
    nodes = Counter(node.op_type for node in model.graph.node)
    apart = [f"{nodes[name]} {name}" for name in _TAKEN_APART if nodes[name]]
    if not nodes["InstanceNormalization"] or apart:
        raise MismatchError(
            f"the bundle's network has {norm}, its graph {nodes['InstanceNormalization']} InstanceNormalization nodes"
            + (f" and {', '.join(apart)}" if apart else "")
            + "\nexpected InstanceNormalization alone; export the bundle again with a torch version that exports "
            "instance_norm as one node"
        )


def check_parity(graph: "onnx.ModelProto", parity_file: Path, precision: EnginePrecision) -> GraphParity:
    """Run the graph on the bundle's patches. Raises ParityError for NaN or when too many labels differ."""
    with np.load(parity_file) as stored:
        image_NCX, expected = stored["image"], stored["logits"]
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
    """Target, range of batches and what little of precision is not in the graph."""
    config = builder.create_builder_config()
    library.set_target(config, key.architecture)
    if key.precision == "fp32":
        config.clear_flag(library.module.BuilderFlag.TF32)  # on by default; rounds factors of convolutions to 11 bits
    profile = builder.create_optimization_profile()
    smallest, largest = (1, *key.input_shape), (key.max_batch, *key.input_shape)
    profile.set_shape(INPUT, smallest, largest, largest)
    config.add_optimization_profile(profile)
    return config


def _check_network(network: Any, graph: "onnx.ModelProto", key: EngineKey, module: Any) -> None:
    """What the parser made of the graph: inputs and outputs of the bundle, norms still norms and in float32."""
    problems = []
    for kind, got, name, shape in (
        ("inputs", [network.get_input(i) for i in range(network.num_inputs)], INPUT, key.input_shape),
        ("outputs", [network.get_output(i) for i in range(network.num_outputs)], OUTPUT, key.output_shape),
    ):
        found = [(t.name, tuple(t.shape), t.dtype) for t in got]
        if found != [(name, (-1, *shape), module.float32)]:
            problems.append(f"{kind} are {found}, expected {[(name, (-1, *shape), module.float32)]}")
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


def _model_file(bundle: Path, precision: EnginePrecision) -> Path:
    file = bundle / MODEL_FILES[precision]
    if not file.is_file():
        raise NotFoundError(
            f"{file} is missing, int8 engines are built from a quantised (Q/DQ) model of the bundle\n"
            "quantise the bundle first, see fastnnunet export --help; or build with --precision fp16"
        )
    return file
