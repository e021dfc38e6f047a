"""The bundle: the folder a model is deployed as, a student or an ensemble of folds.

BUNDLE/
  model.onnx    weights inside; input `image` (N, C, *patch) float32, output `logits` (N, heads, *patch) float32;
                N is `batch_size` where that is set, else any
                an ensemble has one for each fold instead: model_0.onnx, model_1.onnx, ...
  bundle.json   this spec, with the SHA-256 of every other file and of itself
  parity.npz    `image` (N, C, *patch) patches and `logits` (N, heads, *patch) expected in fp32, the folds' mean
after `fastnnunet export quantize`, for each model file:
  model_int8.onnx             quantised with Q/DQ nodes, for ONNX Runtime and TensorRT
  model_int8.xml, .bin        quantised for OpenVINO
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastnnunet.errors import CorruptError, NewerFormatError, NotFoundError, SpecError
from fastnnunet.specs.canonical import sha256_of, sha256_of_file, to_plain
from fastnnunet.specs.checks.bundle import check_bundle_spec, check_model
from fastnnunet.specs.checks.json_text import read_json_object
from fastnnunet.specs.load import build_spec

FORMAT_VERSION = 2  # 2: ensembles (model_files, folds)
MODEL_FILE = "model.onnx"
INPUT, OUTPUT = "image", "logits"  # of a model file
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


def is_bundle(folder: Path) -> bool:
    """Whether a folder claims to be a bundle."""
    return (folder / "bundle.json").is_file()


def write_bundle_json(spec: BundleSpec, path: Path) -> None:
    """Write `bundle.json` with its own digest (`self_sha256`, over the canonical JSON of everything else)."""
    raw = to_plain(spec)
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
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format version {str(version)[:20]}, this fastnnunet reads up to {FORMAT_VERSION}\n"
            "update it: pip install --upgrade fastnnunet, or export the bundle again with this version"
        )
    if sha256_of(raw) != declared:
        raise CorruptError(f"{path} was changed after export (its digest does not match); export the bundle again")
    try:
        spec = build_spec(BundleSpec, raw, where=str(path))
    except SpecError as e:
        raise CorruptError(f"{e}\nexport the bundle again") from e
    check_bundle_spec(spec, path)
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
            check_model(file, spec)
    return spec


def _check_inside(folder: Path, name: str) -> None:
    """Refuse a file of a bundle that is a link: it may be a file of the user's, and is not copied with the bundle."""
    if (folder / name).is_symlink():
        raise CorruptError(
            f"{folder / name} is a link, expected a file inside the bundle\ncopy the bundle with what it links to: "
            f"cp -rL {folder} COPY"
        )
