"""Model folder -> bundle, written only when ONNX Runtime computes what PyTorch computes.

One fold gives the bundle of a student (or of a teacher without its siblings), several give that of an ensemble.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.errors import MismatchError, NotFoundError, printable
from fastnnunet.events import Listener, Stage, ignore
from fastnnunet.export.graph import dynamic_multiples, fix_batch, fold_constants, plans_for
from fastnnunet.export.parity import ParityCheck, ParityReport
from fastnnunet.export.patches import noise_patches, real_patches
from fastnnunet.nnunet.files.checkpoint import load_checkpoint, load_weights, strip_prefix, weights_digest
from fastnnunet.nnunet.files.model import Model, build_network, check_fits, model_of
from fastnnunet.nnunet.files.named import check_reproducible, resampling_of
from fastnnunet.nnunet.files.plans import (
    architecture_of,
    intensity_properties,
    read_json,
)
from fastnnunet.nnunet.onnx import put_weights, to_onnx
from fastnnunet.nnunet.student.fit import stride_products
from fastnnunet.nnunet.student.primus import stock_architecture
from fastnnunet.specs.bundle import MODEL_FILE, BundleSpec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.version import __version__

Fold = int | str
PARITY_FILE = "parity.npz"


def export_bundle(
    model_folder: Path,
    folds: Fold | Sequence[Fold],
    out: Path,
    *,
    checkpoint: str = "checkpoint_final.pth",
    overwrite: bool = False,
    graph: GraphSpec = GraphSpec(),
    needs_real_patches: bool = True,
    progress: Listener = ignore,
) -> ParityReport:
    """Export one fold of an nnU-Net model folder, or several as an ensemble, as a bundle at `out`.

    Without `needs_real_patches` noise takes the place of preprocessed cases that are not there.
    `progress` gets a `Stage` before each stage of the work.
    Raises NotFoundError (model, fold or preprocessed cases missing), MismatchError (`out` exists, plans do not fit, a
    network that ONNX cannot express), SpecError (the plans name what a bundle cannot reproduce), CorruptError
    (checkpoint), ParityError (the exported model computes something else); leaves nothing at `out` then.
    """
    folds = (folds,) if isinstance(folds, int | str) else tuple(folds)
    _check_target(out, overwrite)
    plans, dataset_json = read_json(model_folder / "plans.json"), read_json(model_folder / "dataset.json")
    paths = [model_folder / f"fold_{fold}" / checkpoint for fold in folds]
    for path in paths:
        if not path.is_file():
            there = sorted(p.parent.name.removeprefix("fold_") for p in model_folder.glob(f"fold_*/{checkpoint}"))
            raise NotFoundError(f"{path} is missing\nfolds with a {checkpoint}: {', '.join(there) or '(none)'}")
    stages = _Stages(progress, 2 + 2 * len(folds))
    stages.begin("building the network")
    stored = load_checkpoint(paths[0])  # as nnU-Net, which takes configuration, trainer and mirrors from the first
    configuration = stored["init_args"]["configuration"]
    check_reproducible(plans, configuration)
    plans = plans_for(plans, configuration, graph)
    described = model_of(plans, configuration, dataset_json)
    multiples = dynamic_multiples(described.config.configuration, graph)
    first = strip_prefix(stored["network_weights"])
    check_fits(described, stored["trainer_name"], first, paths[0])
    network = build_network(described, trainer=stored["trainer_name"]).eval()
    image_NCZYX, is_real = _patches(described, needs_real_patches)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model_files = [MODEL_FILE] if len(folds) == 1 else [f"model_{i}.onnx" for i in range(len(folds))]
        total_NKZYX: Any = 0
        reports, digests = [], {}
        stages.begin("writing its graph")
        load_weights(network, first, paths[0])
        model = to_onnx(network, image_NCZYX.shape[1], image_NCZYX.shape[2:], multiples)
        if graph.simplify:
            fold_constants(model, network)
        parity = ParityCheck(network, image_NCZYX, is_real=is_real, has_regions=described.has_regions)
        parity.choose_patches(model, stride_products(described.config.configuration))
        for number, (fold, path, name) in enumerate(zip(folds, paths, model_files, strict=True)):
            weights = strip_prefix(load_checkpoint(path)["network_weights"]) if number else first
            load_weights(network, weights, path)
            digests[str(fold)] = weights_digest(weights)
            if number:
                put_weights(model, network.state_dict())
            (temporary / name).write_bytes(model.SerializeToString())
            begin = partial(stages.begin, of=f"fold {fold}, ")
            if number:
                logits_NKZYX, of_fold = parity.check_other(model, temporary / name, begin)
            else:
                logits_NKZYX, of_fold = parity.check_first(model, temporary / name, multiples, begin)
            reports.append(of_fold)
            if graph.batch_size is not None:
                fix_batch(temporary / name, graph.batch_size)
                parity.check_fixed_batch(temporary / name, graph.batch_size, logits_NKZYX)
            total_NKZYX = total_NKZYX + logits_NKZYX
        report = max(reports, key=lambda r: r.max_abs_difference / r.max_abs_logit)
        np.savez_compressed(
            temporary / PARITY_FILE, image=parity.image_NCX, logits=(total_NKZYX / len(folds)).astype(np.float32)
        )
        provenance = {
            "fastnnunet": __version__,
            "fold": " ".join(map(str, folds)),
            "checkpoint": checkpoint,
            "trainer": stored["trainer_name"],
            "weights_sha256": digests,
            "training": stored.get("fastnnunet", {}),
            "parity": {
                "patches": "real" if is_real else "noise",
                "max_abs_difference": report.max_abs_difference,
                "label_agreement": min(r.label_agreement for r in reports),
            },
            "parameters": int(sum(p.numel() for p in network.parameters())),
        }
        files = {name: sha256_of_file(temporary / name) for name in (*model_files, PARITY_FILE)}
        spec = _bundle_spec(described, stored, provenance, tuple(model_files), files, graph)
        write_bundle_json(spec, temporary / "bundle.json")
        temporary.chmod(0o755)
        if overwrite and out.exists():
            shutil.rmtree(out)
        try:
            os.replace(temporary, out)
        except OSError:
            _check_target(out, overwrite)  # somebody else was faster
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


class _Stages:
    """Tells which stage begins, of how many."""

    def __init__(self, progress: Listener, total: int) -> None:
        self._progress, self._total, self._number = progress, total, 0

    def begin(self, what: str, of: str = "") -> None:
        self._number += 1
        self._progress(Stage(what="export", done=self._number, total=self._total, unit="stages", note=of + what))


def _previous_labels(model: Model) -> tuple[int, ...]:
    """Foreground labels a cascade stage sees one-hot beside the image; none for other configurations."""
    if model.config.previous_stage_name is None:
        return ()
    return tuple(int(label) for label in model.labels.foreground_labels)


def _patches(model: Model, needs_real: bool) -> tuple[np.ndarray, bool]:
    """Patches to compare on, float32 (N, C, *patch), and whether they are real."""
    previous_labels = _previous_labels(model)
    try:
        return real_patches(model.plans, model.configuration, model.patch_size, previous_labels), True
    except (NotFoundError, MismatchError):
        if needs_real:
            raise
    return noise_patches(model.num_channels, model.patch_size, len(previous_labels)), False


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise MismatchError(f"{out} exists already\ngive another -o, or --overwrite to replace the bundle in it")
    if not (out / "bundle.json").is_file() and any(out.iterdir()):
        raise MismatchError(f"--overwrite: {out} is not a bundle and not empty; it is left alone\ngive another -o")


def _channel_names(dataset_json: dict[str, Any]) -> tuple[str, ...]:
    """In the order in which they are written, as nnU-Net takes them; where `modality` is, the old key, that one."""
    names = dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"]
    return tuple(printable(str(name)) for name in (names.values() if isinstance(names, dict) else names))


def _without_nan(value: Any) -> Any:
    """A copy with None for numbers that are not finite, which JSON does not have; statistics of empty channels are."""
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bundle_spec(
    model: Model,
    checkpoint: dict[str, Any],
    provenance: dict[str, Any],
    model_files: tuple[str, ...],
    files: dict[str, str],
    graph: GraphSpec,
) -> BundleSpec:
    plans_manager, config, dataset_json = model.manager, model.config, model.dataset_json
    order = dataset_json.get("regions_class_order") if model.has_regions else None
    mirror_axes = checkpoint.get("inference_allowed_mirroring_axes")
    folds = tuple(provenance["weights_sha256"])
    return BundleSpec(
        name=f"{plans_manager.dataset_name} {plans_manager.plans_name} {model.configuration} "
        f"fold{'s' if len(folds) > 1 else ''} {provenance['fold']}",
        configuration=model.configuration,
        channel_names=_channel_names(dataset_json),
        labels=dataset_json["labels"],
        regions_class_order=tuple(map(int, order)) if order else None,
        previous_labels=_previous_labels(model),
        num_heads=model.num_heads,
        file_ending=dataset_json["file_ending"],
        reader_writer=plans_manager.plans["image_reader_writer"],
        transpose_forward=tuple(plans_manager.transpose_forward),
        transpose_backward=tuple(plans_manager.transpose_backward),
        spacing_mm=tuple(float(s) for s in config.spacing),
        patch_size=model.patch_size,
        normalization_schemes=tuple(config.normalization_schemes),
        use_mask_for_norm=tuple(bool(u) for u in config.use_mask_for_norm),
        intensity_properties=_without_nan(intensity_properties(plans_manager)),
        resampling={
            kind: resampling_of(model.plans, model.configuration, kind) for kind in ("data", "seg", "probabilities")
        },
        mirror_axes=tuple(map(int, mirror_axes)) if mirror_axes else None,
        batch_size=graph.batch_size,
        architecture=stock_architecture(architecture_of(model.plans, model.configuration)),
        plans=_without_nan(model.plans),
        dataset_json=_without_nan(dataset_json),
        model_files=model_files,
        folds=folds,
        provenance=provenance,
        files=files,
    )
