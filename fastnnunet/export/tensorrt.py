"""Bundle -> TensorRT engines: the bundle's ONNX in the precision asked for, checked on a CPU, built and stored.

Batches are dynamic from 1 to `max_batch`, or of one size where the bundle's model takes no other. Space is fixed to the
patch, also of a model that takes any: a sliding window has one patch size, and kernels are chosen for it. An ensemble
gets an engine for each fold. What a library cannot take, a graph that is not what it should be, or a precision that
loses too much is one error, and nothing of that model file is stored.
"""

import logging
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastnnunet.engines.trt.library import Library, find_library
from fastnnunet.engines.trt.store import EngineKey, StoredEngine, engine_folders, find_engine, source_file, write_engine
from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, ParityError, SpecError
from fastnnunet.export.half import to_half
from fastnnunet.export.onnx import INPUT, OUTPUT
from fastnnunet.export.quantized import prepare_quantized
from fastnnunet.export.stepwise import run_stepwise
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec
from fastnnunet.specs.canonical import sha256_of_file

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
    """Build an engine of each model file of a bundle for each architecture, or take those that are there.

    `architectures` empty: the GPU of this machine for tensorrt; for tensorrt_rtx all it knows from sm80 on.
    `max_batch` None: DEFAULT_BATCH, or what the bundle's model takes.
    `beside_bundle` False: below this machine's cache folder, for bundles that cannot be written to.
    Raises NotFoundError and CorruptError (bundle), BackendError (library), SpecError (architecture, batch),
    MismatchError (the graph is wrong or has what the library does not support), ParityError (the precision loses too
    much).
    """
    spec = load_bundle_spec(bundle)
    if spec.batch_size is not None and max_batch not in (None, spec.batch_size):
        raise SpecError(
            f"--batch {max_batch}: the model of {bundle} was exported for batches of exactly {spec.batch_size}\n"
            "leave --batch out here, or export the bundle again without it"
        )
    library = find_library(library_name)
    targets = tuple(architectures) or default_architectures(library)
    for architecture in targets:
        library.set_target(library.module.Builder(library.logger).create_builder_config(), architecture)
    model_files = [_model_file(bundle, spec, file, precision) for file in spec.model_files]
    folder = engine_folders(bundle)[0 if beside_bundle else 1]
    built: list[BuiltEngine] = []
    for fold, model_file in enumerate(model_files):
        keys = [engine_key(spec, model_file, precision, library, target, max_batch) for target in targets]
        there = {key: stored for key in keys if (stored := find_engine(folder, key)) is not None}
        missing = [key for key in keys if key not in there]
        new: dict[EngineKey, StoredEngine] = {}
        if missing:
            graph = make_graph(model_file, spec, precision)
            parity = check_parity(graph, *_parity_patches(bundle, spec, fold), precision)
            new = {key: write_engine(folder, key, build_plan(graph, key, library), asdict(parity)) for key in missing}
        built += [BuiltEngine(stored=(there | new)[key], was_there=key in there) for key in keys]
    return built


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
    most = spec.batch_size or max_batch or DEFAULT_BATCH[len(spec.patch_size)]
    return EngineKey(
        model_sha256=sha256_of_file(model_file),
        precision=precision,
        library=library.name,
        library_version=library.version,
        architecture=architecture,
        max_batch=most,
        min_batch=spec.batch_size or 1,
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
    _fix_space(model, spec.patch_size)
    if any(node.op_type in _FOR_OPTIMIZER for node in model.graph.node):
        model = _simplify(model)
    if precision == "fp16":
        return to_half(model)
    return prepare_quantized(model) if precision == "int8" else model


def _fix_space(model: "onnx.ModelProto", patch_size: Sequence[int]) -> None:
    """Give dynamic axes of space the size of the patch."""
    for value in (*model.graph.input, *model.graph.output):
        for axis, size in zip(value.type.tensor_type.shape.dim[2:], patch_size, strict=True):
            if axis.HasField("dim_param"):
                axis.dim_value = size  # the other of the two goes
    del model.graph.value_info[:]  # shapes in between, which may name those axes


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


def _parity_patches(bundle: Path, spec: BundleSpec, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches of the bundle and the logits the model file of a fold is expected to give, as many as a batch needs.

    An ensemble's file holds the mean over folds: one fold's are computed in fp32, as the exporter compared them.
    """
    with np.load(bundle / PARITY_FILE) as stored:
        image_NCX, expected = stored["image"], stored["logits"]
    if spec.batch_size is not None:
        image_NCX, expected = (np.resize(a, (spec.batch_size, *a.shape[1:])) for a in (image_NCX, expected))
    if len(spec.model_files) > 1:
        import onnxruntime

        file = str(bundle / spec.model_files[fold])
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        expected = session.run([OUTPUT], {INPUT: image_NCX})[0]
    return image_NCX, expected


def check_parity(
    graph: "onnx.ModelProto", image_NCX: np.ndarray, expected: np.ndarray, precision: EnginePrecision
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
    """Target, range of batches and what little of precision is not in the graph."""
    config = builder.create_builder_config()
    library.set_target(config, key.architecture)
    if key.precision == "fp32":
        config.clear_flag(library.module.BuilderFlag.TF32)  # on by default; rounds factors of convolutions to 11 bits
    profile = builder.create_optimization_profile()
    smallest, largest = (key.min_batch, *key.input_shape), (key.max_batch, *key.input_shape)
    profile.set_shape(INPUT, smallest, largest, largest)
    config.add_optimization_profile(profile)
    return config


def _check_network(network: Any, graph: "onnx.ModelProto", key: EngineKey, module: Any) -> None:
    """What the parser made of the graph: inputs and outputs of the bundle, norms still norms and in float32."""
    problems = []
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or -1
    for kind, got, name, shape in (
        ("inputs", [network.get_input(i) for i in range(network.num_inputs)], INPUT, key.input_shape),
        ("outputs", [network.get_output(i) for i in range(network.num_outputs)], OUTPUT, key.output_shape),
    ):
        found = [(t.name, tuple(t.shape), t.dtype) for t in got]
        if found != (expected_here := [(name, (batch, *shape), module.float32)]):
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


def _model_file(bundle: Path, spec: BundleSpec, model_file: str, precision: EnginePrecision) -> Path:
    file = bundle / source_file(model_file, precision)
    if file.name not in spec.files:
        raise NotFoundError(
            f"{bundle} has no {file.name}, the quantised (Q/DQ) model that int8 engines are built from\n"
            f"make it: fastnnunet export quantize {shlex.quote(str(bundle))} --backend onnxruntime; "
            "or build with --precision fp16"
        )
    return file
