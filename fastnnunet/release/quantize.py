"""A bundle gets networks of lower precision: made, measured beside fp32, written only when they lose little enough."""

import os
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastnnunet.engines.base import Precision
from fastnnunet.engines.model_files import INT8_ENDINGS
from fastnnunet.engines.registry import create_ensemble, is_installed
from fastnnunet.errors import BackendError, SpecError
from fastnnunet.events import Event, Listener, Progress, ignore
from fastnnunet.export.patches import RandomPatches
from fastnnunet.export.quantize_onnx import check_onnx_quantizer, quantize_onnx
from fastnnunet.export.quantize_openvino import check_openvino_quantizer, quantize_openvino
from fastnnunet.release.gate import Comparison, compare, require
from fastnnunet.release.gate_cases import GateCases, ImageCases, TrainingCases
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.specs.bundle import (
    FORMAT_VERSION,
    PRECISIONS,
    BundleSpec,
    int8_file,
    load_bundle_spec,
    write_bundle_json,
)
from fastnnunet.specs.canonical import sha256_of_file, to_plain
from fastnnunet.specs.provenance import hardware, now_utc, versions
from fastnnunet.system.files import atomic_output, check_output_folder

MAX_LOSS_POINTS = 0.2
PRECISIONS_OF = {"onnxruntime": ("int8",), "openvino": ("int8", "bf16")}  # backend -> what it can be measured in


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """What to make of a bundle, and what to judge it on."""

    bundle: Path
    precisions: tuple[Precision, ...] = ("int8",)
    backends: tuple[str, ...] = ()  # none: all of PRECISIONS_OF that are installed
    images: Path | None = None  # None: nnU-Net's preprocessed training cases
    labels: Path | None = None  # of `images`; None: judged by the prediction in fp32
    cases: tuple[str, ...] = ()  # to judge on; none: the first `num_cases` held-out ones
    num_cases: int = 8
    patches: int = 64  # to calibrate on
    seed: int = 0
    max_loss_points: float = MAX_LOSS_POINTS
    threads: int | None = None

    def __post_init__(self) -> None:
        problems = []
        wrong = [p for p in self.precisions if not any(p in known for known in PRECISIONS_OF.values())]
        if wrong or not self.precisions:
            problems.append(f"--precision: got {', '.join(wrong) or 'none'}, expected int8 or bf16")
        if unknown := [b for b in self.backends if b not in PRECISIONS_OF]:
            problems.append(f"--backend: got {', '.join(unknown)}, expected {' or '.join(PRECISIONS_OF)}")
        if self.labels is not None and self.images is None:
            problems.append("-g: labels need their images, -i")
        if self.patches < 1:
            problems.append(f"--patches: got {self.patches}, expected at least 1")
        if not self.max_loss_points >= 0:
            problems.append(f"--max-dice-loss: got {self.max_loss_points}, expected 0 points or more")
        if problems:
            raise SpecError("\n".join(problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What was written."""

    comparisons: tuple[Comparison, ...]
    judged_on: str
    sizes_bytes: dict[str, int]  # of the new files and of those in fp32
    record: dict[str, Any]


def quantize_bundle(job: QuantizeJob, progress: Listener = ignore) -> Quantized:
    """Make and measure what the job asks for; the bundle changes only when everything loses little enough.

    Raises NotFoundError, CorruptError (bundle, cases), BackendError (a package or bf16 is missing), SpecError,
    MismatchError (a model that cannot be quantised, nothing to judge), ParityError (too much Dice lost).
    """
    spec = load_bundle_spec(job.bundle)
    check_output_folder(job.bundle)
    wanted = _wanted(job)
    backends = tuple(dict.fromkeys(backend for _, backend in wanted))
    fp32 = {backend: _load(backend, job.bundle, spec, "fp32", job) for backend in backends}
    source = _source(job, spec, next(iter(fp32.values())))
    if spec.batch_size is not None and job.patches < spec.batch_size:
        raise SpecError(f"--patches: got {job.patches}, the bundle's model takes {spec.batch_size} at once")

    # in the bundle's own folder, so that files need only be renamed
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=job.bundle) as name:
        staging = Path(name)
        made: list[str] = []
        if int8 := [backend for precision, backend in wanted if precision == "int8"]:
            made = _make_int8(job, spec, source, int8, staging, progress)
        digests = {file: sha256_of_file(staging / file) for file in made}
        candidate = replace(spec, files={**spec.files, **digests})
        others = [
            _load(backend, staging if precision == "int8" else job.bundle, candidate, precision, job)
            for precision, backend in wanted
        ]
        comparisons = compare(source, fp32, others, progress)
        judged_on = _judged_on(source)
        require(comparisons, job.max_loss_points, judged_on)
        calibration = {"cases": source.kind, "patches": job.patches, "seed": job.seed}
        measured = {
            (c.precision, c.backend): {
                **to_plain(asdict(c)),
                "judged_on": judged_on,
                "max_loss_points": job.max_loss_points,
                "versions": versions(),
                **({"calibration": calibration} if c.precision == "int8" else {}),
            }
            for c in comparisons
        }
        _commit(job.bundle, spec, staging, digests, measured)
    files = (*spec.model_files, *made)
    sizes = {file: (job.bundle / file).stat().st_size for file in files}
    record = {
        "created": now_utc(),
        "hardware": hardware(),
        "bundle": spec.name,
        "sizes_bytes": sizes,
        "comparisons": list(measured.values()),
    }
    return Quantized(comparisons=tuple(comparisons), judged_on=judged_on, sizes_bytes=sizes, record=record)


def _wanted(job: QuantizeJob) -> list[tuple[Precision, str]]:
    """Precision and backend of everything to be measured, with what they need installed. Raises BackendError."""
    chosen = job.backends or tuple(backend for backend in PRECISIONS_OF if is_installed(backend))
    wanted = [(p, b) for p in dict.fromkeys(job.precisions) for b in dict.fromkeys(chosen) if p in PRECISIONS_OF[b]]
    for precision in job.precisions:
        if not any(p == precision for p, _ in wanted):
            able = " or ".join(b for b, known in PRECISIONS_OF.items() if precision in known)
            raise BackendError(
                f"{precision} is computed by {able}, got backend(s) {', '.join(chosen)}\n"
                f"install it: pip install 'fastnnunet[openvino]', and name it with --backend, or leave {precision} out"
            )
    for backend, check in (("onnxruntime", check_onnx_quantizer), ("openvino", check_openvino_quantizer)):
        if ("int8", backend) in wanted:
            check()
    return wanted


def _load(backend: str, folder: Path, spec: BundleSpec, precision: Precision, job: QuantizeJob) -> LoadedBundle:
    loaded = LoadedBundle(
        spec,
        create_ensemble(backend, folder, spec, threads=job.threads, precision=precision),
        mirroring=False,
        threads=job.threads,
    )
    if loaded.backend.precision != precision:
        raise BackendError(
            f"this CPU has no {precision}: {backend} would compute in {loaded.backend.precision}\n"
            f"leave {precision} out, or measure it on a machine that has it"
        )
    return loaded


def _source(job: QuantizeJob, spec: BundleSpec, bundle: LoadedBundle) -> GateCases:
    if job.images is None:
        return TrainingCases(spec, job.cases, job.num_cases)
    return ImageCases(bundle, job.images, job.labels, job.cases, job.num_cases)


def _judged_on(source: GateCases) -> str:
    kind = "held-out cases" if source.held_out else source.kind
    also = ", calibrated on the same" if source.choice.overlap else ""
    against = "" if source.has_labels else ", against the prediction in fp32 since there are no labels"
    return f"{len(source.choice.judge)} {kind}{also}{against}"


def _make_int8(
    job: QuantizeJob, spec: BundleSpec, source: GateCases, backends: list[str], staging: Path, progress: Listener
) -> list[str]:
    """Write the quantised twins of the bundle's models into `staging`; their names."""
    patches = RandomPatches(
        source.choice.calibrate,
        lambda case_id: source.preprocessed(case_id).data_CZYX,
        spec.patch_size,
        job.patches,
        job.seed,
    )
    made = []
    for backend in backends:
        quantize = {"onnxruntime": quantize_onnx, "openvino": quantize_openvino}[backend]
        for model_file in spec.model_files:
            names = [int8_file(model_file, ending) for ending in _int8_endings(backend)]
            quantize(
                job.bundle / model_file,
                patches,
                staging / names[0],
                batch_size=spec.batch_size or 1,
                progress=partial(_named, progress, f"calibrating for {backend}"),
            )
            made += names
    return made


def _named(progress: Listener, what: str, event: Event) -> None:
    progress(replace(event, what=what) if isinstance(event, Progress) else event)


def _int8_endings(backend: str) -> tuple[str, ...]:
    """Of all files of a quantised model, the one that is loaded first."""
    return (INT8_ENDINGS[backend], *((".bin",) if backend == "openvino" else ()))


def _commit(
    bundle: Path,
    spec: BundleSpec,
    staging: Path,
    digests: dict[str, str],
    measured: dict[tuple[Precision, str], dict[str, Any]],
) -> None:
    """Move new files into place and say so in bundle.json, which never lists a file that is not as it says."""
    stale = [file for file in digests if file in spec.files]
    if stale:
        _write(bundle, replace(spec, files={k: v for k, v in spec.files.items() if k not in stale}))
    for file in digests:
        os.replace(staging / file, bundle / file)
    precisions = {p: dict(of_backend) for p, of_backend in spec.provenance.get(PRECISIONS, {}).items()}
    for (precision, backend), comparison in measured.items():
        precisions.setdefault(precision, {})[backend] = comparison
    _write(
        bundle,
        replace(
            spec,
            files={**spec.files, **digests},
            provenance={**spec.provenance, PRECISIONS: precisions},
        ),
    )


def _write(bundle: Path, spec: BundleSpec) -> None:
    with atomic_output(bundle / "bundle.json") as unfinished:
        write_bundle_json(replace(spec, format_version=max(spec.format_version, FORMAT_VERSION)), unfinished)
