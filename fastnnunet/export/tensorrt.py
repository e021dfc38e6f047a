"""Bundle -> TensorRT engines: the bundle's ONNX in the precision asked for, checked on a CPU, built and stored.

Batches are dynamic from 1 to `max_batch`, or of one size where the bundle's model takes no other. Space is fixed to the
patch, also of a model that takes any: a sliding window has one patch size, and kernels are chosen for it. For one pass
it is dynamic, from the product of the strides to the largest tile, for which kernels are chosen. An ensemble gets an
engine for each fold. What a library cannot take, a graph that is not what it should be, or a precision that
loses too much is one error, and nothing of that model file is stored.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastnnunet.engines.base import Precision
from fastnnunet.engines.trt.build import DEFAULT_BATCH, build_plan, check_parity, run_onnx, simplify
from fastnnunet.engines.trt.half import to_half
from fastnnunet.engines.trt.library import Library, find_library
from fastnnunet.engines.trt.store import EngineKey, StoredEngine, engine_folders, find_engine, source_file, write_engine
from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, SpecError
from fastnnunet.export.quantized import prepare_quantized
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.checks.problems import MAX_AXIS
from fastnnunet.specs.one_pass import DEFAULT_MEMORY_LIMIT

if TYPE_CHECKING:
    import onnx

PARITY_FILE = "parity.npz"
# operators an InstanceNormalization becomes when an exporter takes it apart; slower, and in fp16 wrong
_TAKEN_APART = ("BatchNormalization", "GroupNormalization", "Sqrt", "Reciprocal")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    stored: StoredEngine
    was_there: bool


def export_engines(
    bundle: Path,
    *,
    precision: Precision = "fp16",
    architectures: Sequence[str] = (),
    library_name: str | None = None,
    max_batch: int | None = None,
    largest_tile: Sequence[int] | None = None,
    beside_bundle: bool = True,
) -> list[BuiltEngine]:
    """Build an engine of each model file of a bundle for each architecture, or take those that are there.

    `architectures` empty: the GPU of this machine for tensorrt; for tensorrt_rtx all it knows from sm80 on.
    `max_batch` None: DEFAULT_BATCH (for one pass of volumes 1), or what the bundle's model takes.
    `largest_tile`: of a bundle of one pass; None: what `DEFAULT_MEMORY_LIMIT` allows, axes as equal as they can be.
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
    tile = _largest_tile(spec, largest_tile)
    library = find_library(library_name)
    targets = tuple(architectures) or default_architectures(library)
    for architecture in targets:
        library.set_target(library.module.Builder(library.logger).create_builder_config(), architecture)
    model_files = [_model_file(bundle, spec, file, precision) for file in spec.model_files]
    folder = engine_folders(bundle)[0 if beside_bundle else 1]
    built: list[BuiltEngine] = []
    for fold, model_file in enumerate(model_files):
        keys = [engine_key(spec, model_file, precision, library, target, max_batch, tile) for target in targets]
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
    precision: Precision,
    library: Library,
    architecture: str,
    max_batch: int | None,
    largest_tile: tuple[int, ...] | None = None,
) -> EngineKey:
    """`largest_tile`: for one pass."""
    channels, tile = len(spec.channel_names) + len(spec.previous_labels), largest_tile or spec.patch_size
    default = 1 if largest_tile is not None and len(tile) == 3 else DEFAULT_BATCH[len(tile)]
    most = spec.batch_size or max_batch or default
    return EngineKey(
        model_sha256=sha256_of_file(model_file),
        precision=precision,
        library=library.name,
        library_version=library.version,
        architecture=architecture,
        max_batch=most,
        min_batch=spec.batch_size or 1,
        input_shape=(channels, *tile),
        output_shape=(spec.num_heads, *tile),
        smallest_tile=None if largest_tile is None or spec.one_pass is None else spec.one_pass.multiples,
    )


def _largest_tile(spec: BundleSpec, wanted: Sequence[int] | None) -> tuple[int, ...] | None:
    """None for a bundle of the window alone. Raises SpecError for tiles that cannot be."""
    if spec.one_pass is None:
        if wanted is not None:
            raise SpecError(f"--tile: the bundle {spec.name} is predicted in nnU-Net's window alone; leave it out")
        return None
    patch, multiples, dims = spec.patch_size, spec.one_pass.multiples, len(spec.patch_size)
    if wanted is None:
        batch = 1 if dims == 3 else DEFAULT_BATCH[dims]
        side = (DEFAULT_MEMORY_LIMIT / spec.one_pass.bytes_per_voxel / batch) ** (1 / dims)
        return tuple(max(n, int(min(side, MAX_AXIS)) // m * m) for n, m in zip(patch, multiples, strict=True))
    is_possible = len(wanted) == dims and all(
        n >= p and n % m == 0 and n <= MAX_AXIS for n, p, m in zip(wanted, patch, multiples, strict=True)
    )
    if not is_possible:
        raise SpecError(
            f"--tile: got {list(wanted)}, expected {dims} multiples of {list(multiples)}, none below the patch's "
            f"{list(patch)}"
        )
    return tuple(wanted)


def make_graph(model_file: Path, spec: BundleSpec, precision: Precision) -> "onnx.ModelProto":
    """The graph to build from, in that precision. Raises CorruptError, MismatchError."""
    import onnx

    try:
        model = onnx.load(str(model_file))
        onnx.checker.check_model(model, full_check=True)
    except Exception as e:  # protobuf's DecodeError and onnx's own errors share no base class
        raise CorruptError(f"cannot read {model_file}: {e}") from e
    check_norms(model, spec)
    if spec.one_pass is None:
        _fix_space(model, spec.patch_size)
    model = simplify(model)
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
        expected = run_onnx(str(bundle / spec.model_files[fold]), image_NCX)
    return image_NCX, expected


def _model_file(bundle: Path, spec: BundleSpec, model_file: str, precision: Precision) -> Path:
    file = bundle / source_file(model_file, precision)
    if file.name not in spec.files:
        raise NotFoundError(
            f"{bundle} has no {file.name}, the quantised (Q/DQ) model that int8 engines are built from\n"
            f"make it: fastnnunet export quantize {shlex.quote(str(bundle))} --backend onnxruntime; "
            "or build with --precision fp16"
        )
    return file
