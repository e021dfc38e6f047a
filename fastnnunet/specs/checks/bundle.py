"""Whether a bundle can be what `fastnnunet export` writes: its fields, its files, and the models in them.

A digest says that nothing was damaged, not who made it: whoever changes a bundle can compute it again.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastnnunet.errors import CorruptError
from fastnnunet.specs.checks.architecture import architecture_problems, unet_problems
from fastnnunet.specs.checks.onnx_file import FLOAT32, OnnxValue, read_onnx_file
from fastnnunet.specs.checks.problems import (
    intensity_problems,
    is_file_ending,
    is_integer,
    is_name,
    label_problems,
    normalization_problems,
    patch_size_problems,
    resampling_problems,
    shown,
    spacing_problems,
    transpose_problems,
)

if TYPE_CHECKING:
    from fastnnunet.specs.bundle import BundleSpec

SMALLEST_STEP = 0.01  # of a patch; nnU-Net's is 0.5, and tiles grow with its inverse cubed
_MAX_HEADS = 2**12
_MAX_CHANNELS = 2**10


def check_bundle_spec(spec: "BundleSpec", where: Path) -> None:
    """Refuse a bundle.json whose fields cannot be, alone or together. Raises CorruptError with all problems."""
    problems = patch_size_problems(spec.patch_size) or _field_problems(spec)
    problems += _file_problems(spec)
    if problems:
        raise CorruptError(
            f"{where} cannot be used, {len(problems)} problem(s):\n"
            + "\n".join(f"  - {p}" for p in problems[:20])
            + "\nexport the bundle again"
        )


def _field_problems(spec: "BundleSpec") -> list[str]:
    dims, channels = len(spec.patch_size), len(spec.channel_names)
    problems = spacing_problems(spec.spacing_mm, dims, "spacing_mm")
    problems += transpose_problems(spec.transpose_forward, spec.transpose_backward)
    if not 1 <= channels <= _MAX_CHANNELS:
        problems.append(f"channel_names: got {channels} names, expected 1 to {_MAX_CHANNELS}")
    problems += normalization_problems(spec.normalization_schemes, spec.use_mask_for_norm, channels)
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
    for kind in ("data", "probabilities", *(["seg"] if spec.previous_labels else [])):
        problems += resampling_problems(spec.resampling.get(kind), f"resampling.{kind}")
    wrong = architecture_problems(spec.architecture, spec.patch_size)
    return problems + (wrong or unet_problems(spec.architecture, spec.patch_size))


def _file_problems(spec: "BundleSpec") -> list[str]:
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
    problems += [
        f"files: {shown(name)} has no digest for its weights, {shown(name[:-4] + '.bin')}"
        for name in spec.files
        if name.endswith(".xml") and f"{name[:-4]}.bin" not in spec.files
    ]
    if spec.folds and (len(spec.folds) != len(spec.model_files) or len(set(spec.folds)) != len(spec.folds)):
        problems.append(f"folds: got {shown(spec.folds)}, expected one for each of {len(spec.model_files)} model files")
    return problems


def check_model(file: Path, spec: "BundleSpec") -> None:
    """Refuse an ONNX file that computes on other shapes than the bundle says, or refers to another file.

    Raises CorruptError.
    """
    model = read_onnx_file(file)
    channels = len(spec.channel_names) + len(spec.previous_labels)
    expected = {
        "input": (model.inputs, (spec.batch_size, channels, *spec.patch_size)),
        "output": (model.outputs, (spec.batch_size, spec.num_heads, *spec.patch_size)),
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
