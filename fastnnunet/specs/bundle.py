"""The bundle: the folder a model is deployed as, a student or an ensemble of folds.

BUNDLE/
  model.onnx    weights inside; input `image` (N, C, *patch) float32, output `logits` (N, heads, *patch) float32;
                N is `batch_size` where that is set, else any
                an ensemble has one for each fold instead: model_0.onnx, model_1.onnx, ...
  bundle.json   this spec, with the SHA-256 of every other file and of itself
  parity.npz    `image` (N, C, *patch) patches and `logits` (N, heads, *patch) expected in fp32, the folds' mean
  locator.onnx  of a bundle with a locator: its network, at a coarse spacing, two heads (see `specs/locator.py`)
after `fastnnunet export quantize`, for each model file:
  model_int8.onnx             quantised with Q/DQ nodes, for ONNX Runtime and TensorRT
  model_int8.xml, .bin        quantised for OpenVINO
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastnnunet.errors import CorruptError, NewerFormatError, NotFoundError, SpecError
from fastnnunet.specs.canonical import sha256_of, sha256_of_file, to_plain
from fastnnunet.specs.checks.architecture import architecture_problems, unet_problems
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.checks.onnx_file import FLOAT32, OnnxValue, read_onnx_file
from fastnnunet.specs.checks.problems import (
    intensity_problems,
    is_file_ending,
    is_integer,
    is_name,
    label_problems,
    patch_size_problems,
    resampling_problems,
    scheme_list_problems,
    shown,
    spacing_problems,
    transpose_problems,
)
from fastnnunet.specs.load import build_spec
from fastnnunet.specs.locator import FOREGROUND, Locator, locator_problems
from fastnnunet.specs.one_pass import OnePass, one_pass_problems

FORMAT_VERSION = 2  # 2: ensembles (model_files, folds)
ONE_PASS_FORMAT = 3  # of bundles that say how they are predicted in one pass, which earlier versions could not
LOCATOR_FORMAT = 4  # of bundles with a locator
MODEL_FILE = "model.onnx"
INPUT, OUTPUT = "image", "logits"  # of a model file
SMALLEST_STEP = 0.01  # of a patch; nnU-Net's is 0.5, and tiles grow with its inverse cubed
_MAX_HEADS = 2**12
_MAX_CHANNELS = 2**10
MEASURED = "measured"  # of the provenance: quality and speed, see `release/measured.py`
PRECISIONS = "precisions"  # of the provenance: precision -> backend -> how it compares with fp32


def int8_file(model_file: str, ending: str = ".onnx") -> str:
    """The quantised twin of a model file: `model.onnx` -> `model_int8.onnx`."""
    return f"{Path(model_file).stem}_int8{ending}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleSpec:
    """Everything the runtime must know. Axis order is nnU-Net's internal one (after transpose_forward)."""

    format_version: int = FORMAT_VERSION
    name: str
    configuration: str
    channel_names: tuple[str, ...]
    labels: dict[str, Any]  # as in dataset.json: name -> int, or name -> list of int for regions
    regions_class_order: tuple[int, ...] | None = None
    num_heads: int
    previous_labels: tuple[int, ...] = ()  # of a cascade stage: labels of the previous segmentation, a channel each
    file_ending: str
    reader_writer: str  # nnU-Net class name, e.g. SimpleITKIO
    transpose_forward: tuple[int, ...]
    transpose_backward: tuple[int, ...]
    spacing_mm: tuple[float, ...]  # target spacing; two entries for 2d
    patch_size: tuple[int, ...]  # zyx, two entries for 2d
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensity_properties: dict[str, Any]  # channel index as text -> mean, std, percentile_00_5, percentile_99_5, ...
    resampling: dict[str, Any]  # "data" | "seg" | "probabilities" -> {"fn": name, "kwargs": {...}}
    step_size: float = 0.5
    mirror_axes: tuple[int, ...] | None = None
    batch_size: int | None = None  # the model takes exactly so many patches at once; None: any number
    one_pass: OnePass | None = None  # how it is predicted without overlapping tiles; None: it cannot be
    locator: Locator | None = None  # finds the box in which alone it is predicted; None: everywhere
    architecture: dict[str, Any]  # network_class_name, arch_kwargs, _kw_requires_import: for the torch backend
    plans: dict[str, Any]  # the student's whole plans.json, copied beside predictions as nnU-Net does
    dataset_json: dict[str, Any]
    model_files: tuple[str, ...] = (MODEL_FILE,)  # an ensemble's logits are averaged over these
    folds: tuple[str, ...] = ()  # the fold of each model file; empty in bundles of format 1
    provenance: dict[str, Any]  # versions, checkpoint digest, cache key, distillation settings
    files: dict[str, Any]  # file name -> SHA-256

    @property
    def model_file(self) -> str:
        """The one model file of a bundle, or of the part of an ensemble that a backend is made for."""
        return self.model_files[0]

    def measured(self, precision: str, backend: str) -> dict[str, Any] | None:
        """How that precision compares with fp32 on a backend, if it was measured."""
        found: Any = self.provenance
        for key in (PRECISIONS, precision, backend):
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else None

    def of_locator(self) -> "BundleSpec":
        """The locator as a bundle of its own in the same folder, for engines. Only where there is one."""
        locator = self.locator
        assert locator is not None
        factor = locator.factor
        return replace(
            self,
            name=f"locator of {self.name}",
            labels=FOREGROUND,
            regions_class_order=None,
            num_heads=len(FOREGROUND),
            spacing_mm=tuple(s * f for s, f in zip(self.spacing_mm, factor, strict=True)),
            patch_size=locator.patch_size,
            mirror_axes=None,
            batch_size=None,
            one_pass=locator.one_pass,
            locator=None,
            architecture=locator.architecture,
            model_files=(locator.model_file,),
            folds=(),
        )


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (folder / "bundle.json").is_file()


def bundle_digest(folder: Path) -> str:
    """The digest of a bundle that `load_bundle_spec` takes, over all its files. Raises NotFoundError, CorruptError."""
    return str(read_json_object(folder / "bundle.json")["self_sha256"])


def write_bundle_json(spec: BundleSpec, path: Path) -> None:
    """Write `bundle.json` with its own digest (`self_sha256`, over the canonical JSON of everything else)."""
    raw = to_plain(spec)
    for name in ("one_pass", "locator"):
        if raw[name] is None:
            del raw[name]  # a field that earlier versions do not know
    raw["self_sha256"] = sha256_of(raw)
    # keys keep their order: dataset.json and plans.json are copied from here, and nnU-Net's regions are ordered
    path.write_text(json.dumps(raw, indent=1))


def load_bundle_spec(folder: Path) -> BundleSpec:
    """Read and check a bundle folder.

    Raises NotFoundError when it is not a bundle, CorruptError when any file in it was changed, truncated or removed,
    lies elsewhere, or is not what an export writes; NewerFormatError when it was written by a later version of this
    package.
    """
    path = folder / "bundle.json"
    if not path.is_file():
        raise NotFoundError(
            f"no bundle at {folder}: bundle.json is missing\nmake one with: fastnnunet export onnx ... -o {folder}"
        )
    _check_inside(folder, path.name)
    try:
        raw = read_json_object(path, finite=True)
    except CorruptError as e:
        raise CorruptError(f"the bundle's description is damaged: {e}\nexport the bundle again") from e
    declared, version = raw.pop("self_sha256", None), raw.get("format_version")
    if declared is None or not isinstance(version, int):
        raise CorruptError(f"{path} is damaged (self_sha256 or format_version is missing); export the bundle again")
    if version > LOCATOR_FORMAT:
        raise NewerFormatError(
            f"{path} has format version {str(version)[:20]}, this fastnnunet reads up to {LOCATOR_FORMAT}\n"
            "update it: pip install --upgrade fastnnunet, or export the bundle again with this version"
        )
    if sha256_of(raw) != declared:
        raise CorruptError(f"{path} was changed after export (its digest does not match); export the bundle again")
    try:
        spec = build_spec(BundleSpec, raw, where=str(path))
    except SpecError as e:
        raise CorruptError(f"{e}\nexport the bundle again") from e
    _check_spec(spec, path)
    for name, digest in spec.files.items():
        file = folder / name
        _check_inside(folder, name)
        if not file.is_file():
            raise CorruptError(f"bundle {folder} is incomplete: {name} is missing; export it again")
        if (got := sha256_of_file(file)) != digest:
            raise CorruptError(
                f"{file} was changed after export\n"
                f"  got      sha256 {got}\n  expected sha256 {digest}\nexport the bundle again"
            )
        if name.endswith(".onnx"):
            is_locator = spec.locator is not None and name == spec.locator.model_file
            _check_model(file, spec.of_locator() if is_locator else spec)
    return spec


def _check_inside(folder: Path, name: str) -> None:
    """Refuse a file of a bundle that is a link: it may be a file of the user's, and is not copied with the bundle."""
    if (folder / name).is_symlink():
        raise CorruptError(
            f"{folder / name} is a link, expected a file inside the bundle\ncopy the bundle with what it links to: "
            f"cp -rL {folder} COPY"
        )


def _check_spec(spec: BundleSpec, where: Path) -> None:
    """Refuse a bundle.json whose fields cannot be, alone or together. Raises CorruptError with all problems."""
    problems = patch_size_problems(spec.patch_size) or _field_problems(spec)
    problems += _file_problems(spec)
    if problems:
        raise CorruptError(
            f"{where} cannot be used, {len(problems)} problem(s):\n"
            + "\n".join(f"  - {p}" for p in problems[:20])
            + "\nexport the bundle again"
        )


def _field_problems(spec: BundleSpec) -> list[str]:
    dims, channels = len(spec.patch_size), len(spec.channel_names)
    problems = spacing_problems(spec.spacing_mm, dims, "spacing_mm")
    problems += transpose_problems(spec.transpose_forward, spec.transpose_backward)
    if not 1 <= channels <= _MAX_CHANNELS:
        problems.append(f"channel_names: got {channels} names, expected 1 to {_MAX_CHANNELS}")
    problems += scheme_list_problems(spec.normalization_schemes, spec.use_mask_for_norm, channels)
    problems += intensity_problems(spec.intensity_properties, spec.normalization_schemes, "intensity_properties")
    problems += label_problems(spec.labels, spec.regions_class_order)
    if not 1 <= spec.num_heads <= _MAX_HEADS:
        problems.append(f"num_heads: got {spec.num_heads}, expected 1 to {_MAX_HEADS}")
    if len(spec.previous_labels) > _MAX_CHANNELS or not all(is_integer(n, 0, 2**16) for n in spec.previous_labels):
        problems.append(f"previous_labels: got {shown(spec.previous_labels)}, expected labels")
    if not is_file_ending(spec.file_ending):
        problems.append(f"file_ending: got {shown(spec.file_ending)}, expected one such as .nii.gz")
    for field in ("name", "configuration", "reader_writer"):
        if not getattr(spec, field).isprintable():
            problems.append(f"{field}: got {shown(getattr(spec, field))}, expected text without control characters")
    if not all(name.isprintable() for name in (*spec.channel_names, *spec.folds)):
        problems.append("channel_names, folds: got control characters, expected text without them")
    if not SMALLEST_STEP <= spec.step_size <= 1:
        problems.append(f"step_size: got {spec.step_size}, expected a number from {SMALLEST_STEP} to 1")
    axes = spec.mirror_axes or ()
    if len(set(axes)) != len(axes) or not set(axes) <= set(range(dims)):
        problems.append(f"mirror_axes: got {shown(axes)}, expected each axis of {dims} at most once, counted from 0")
    if spec.batch_size is not None and not 1 <= spec.batch_size <= 2**10:
        problems.append(f"batch_size: got {spec.batch_size}, expected 1 to {2**10}")
    if spec.one_pass is not None:
        has_format = spec.format_version >= ONE_PASS_FORMAT
        problems += one_pass_problems(spec.one_pass, spec.patch_size, spec.batch_size, has_format)
    if spec.locator is not None:
        if spec.format_version < LOCATOR_FORMAT:
            problems.append("locator: bundles of this format version have none")
        problems += locator_problems(spec.locator, dims, bool(spec.previous_labels), "ignore" in spec.labels)
    for kind in ("data", "probabilities", *(["seg"] if spec.previous_labels else [])):
        problems += resampling_problems(spec.resampling.get(kind), f"resampling.{kind}")
    wrong = architecture_problems(spec.architecture, spec.patch_size)
    wrong = wrong or unet_problems(spec.architecture, spec.patch_size)
    if spec.one_pass is not None and not problems and not wrong:
        wrong = unet_problems(spec.architecture, spec.one_pass.multiples, "one_pass.multiples")
    return problems + wrong


def _file_problems(spec: BundleSpec) -> list[str]:
    problems = [
        f"files: {shown(name)} is no name of a file in the bundle, expected one without '/' or control characters"
        for name in spec.files
        if not is_name(name)
    ]
    problems += [
        f"files: {shown(name)} has the digest {shown(digest)}, expected a SHA-256 in hex"
        for name, digest in spec.files.items()
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest)
    ]
    if not spec.model_files or len(set(spec.model_files)) != len(spec.model_files):
        problems.append(f"model_files: got {shown(spec.model_files)}, expected at least one, each once")
    problems += [
        f"model_files: {shown(name)} has no digest in files, expected one for each model file"
        for name in spec.model_files
        if name not in spec.files
    ]
    problems += [
        f"model_files: got {shown(name)}, expected the name of an ONNX file"
        for name in spec.model_files
        if not name.endswith(".onnx")
    ]
    if spec.locator is not None:
        name = spec.locator.model_file
        if name not in {*spec.files} - {*spec.model_files} or not name.endswith(".onnx"):
            problems.append(f"locator.model_file: got {shown(name)}, expected an ONNX file in files, no model file")
    problems += [
        f"files: {shown(name)} has no digest for its weights, {shown(name[:-4] + '.bin')}"
        for name in spec.files
        if name.endswith(".xml") and f"{name[:-4]}.bin" not in spec.files
    ]
    if spec.folds and (len(spec.folds) != len(spec.model_files) or len(set(spec.folds)) != len(spec.folds)):
        problems.append(f"folds: got {shown(spec.folds)}, expected one for each of {len(spec.model_files)} model files")
    return problems


def _check_model(file: Path, spec: BundleSpec) -> None:
    """Refuse an ONNX file that computes on other shapes than the bundle says, or refers to another file.

    Raises CorruptError.
    """
    model = read_onnx_file(file)
    channels = len(spec.channel_names) + len(spec.previous_labels)
    space: tuple[int | None, ...] = spec.patch_size if spec.one_pass is None else (None,) * len(spec.patch_size)
    expected = {
        "input": (model.inputs, (spec.batch_size, channels, *space)),
        "output": (model.outputs, (spec.batch_size, spec.num_heads, *space)),
    }
    for what, (values, shape) in expected.items():
        if len(values) != 1 or not _fits(values[0], shape):
            got = "; ".join(f"{shown(v.name)} {_text(v.shape)} of type {v.element_type}" for v in values[:5])
            raise CorruptError(
                f"{file} is not the model that bundle.json describes\n"
                f"  got      {what} {got or '(none)'}\n"
                f"  expected one {what} {_text(shape)} of type {FLOAT32} (float32), * for any length\n"
                "export the bundle again"
            )


def _fits(value: OnnxValue, shape: tuple[int | None, ...]) -> bool:
    """Every axis has its length, or takes any; that of the batch has none where the bundle says none."""
    return (
        value.element_type == FLOAT32
        and len(value.shape) == len(shape)
        and all(got in (None, wanted) for got, wanted in zip(value.shape, shape, strict=True))
    )


def _text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('*' if n is None else str(n) for n in shape)})"
