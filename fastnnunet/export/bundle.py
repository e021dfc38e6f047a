"""Model folder -> bundle, written only when ONNX Runtime computes what PyTorch computes.

One fold gives the bundle of a student (or of a teacher without its siblings), several give that of an ensemble.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet.errors import MismatchError, NotFoundError, ParityError, printable
from fastnnunet.events import Listener, Message, Stage, ignore
from fastnnunet.export.fold import folding_of
from fastnnunet.export.graph import fix_batch, fold_constants, plans_for
from fastnnunet.export.one_pass import CASES as HALO_CASES
from fastnnunet.export.one_pass import Proof, may_be_one_pass, one_pass_of, wider
from fastnnunet.export.parity import ParityCheck, ParityReport
from fastnnunet.export.patches import noise_patches, real_images, real_patches
from fastnnunet.nnunet.files.checkpoint import load_checkpoint, load_weights, strip_prefix, weights_digest
from fastnnunet.nnunet.files.model import Model, build_network, check_fits, check_stand_in, model_of
from fastnnunet.nnunet.files.named import check_reproducible, resampling_of
from fastnnunet.nnunet.files.plans import (
    architecture_of,
    builder_of,
    intensity_properties,
    read_json,
)
from fastnnunet.nnunet.onnx import put_weights, to_onnx
from fastnnunet.nnunet.student.fit import stride_products
from fastnnunet.nnunet.student.primus import stock_architecture
from fastnnunet.specs.bundle import MODEL_FILE, ONE_PASS_FORMAT, BundleSpec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file, to_plain
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.one_pass import OnePass
from fastnnunet.system.files import replace_folder
from fastnnunet.version import __version__

if TYPE_CHECKING:
    import onnx

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
    `progress` gets a `Stage` before each stage of the work, and a warning where the trainer is not installed and the
    network in the plans, which the weights fit, stands in for its own.
    Raises NotFoundError (model, fold or preprocessed cases missing), MismatchError (`out` exists, plans do not fit, a
    network that ONNX cannot express), SpecError (the plans name what a bundle cannot reproduce), CorruptError
    (checkpoint), ParityError (the exported model computes something else); leaves nothing at `out` then.
    """
    folds = (folds,) if isinstance(folds, int | str) else tuple(folds)
    check_target(out, overwrite)
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
    first = strip_prefix(stored["network_weights"])
    stand_in = check_stand_in(described, stored["trainer_name"], first, paths[0])
    trainer = builder_of(stored["trainer_name"])
    if stand_in is None:
        check_fits(described, trainer, first, paths[0])
    else:
        progress(Message(text=stand_in, level="warning"))
    network = build_network(described, trainer=trainer).eval()
    strides = stride_products(described.config.configuration)
    tries_one_pass = may_be_one_pass(graph, strides, network)
    multiples = strides if graph.dynamic_space or tries_one_pass else None
    folding = folding_of(described, network)
    image_NCZYX, is_real = _patches(described, needs_real_patches)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model_files = [MODEL_FILE] if len(folds) == 1 else [f"model_{i}.onnx" for i in range(len(folds))]
        total_NKZYX: Any = 0
        reports, digests = [], {}
        stages.begin("writing its graph")
        load_weights(network, first, paths[0])
        written = network if folding is None else folding.apply(network)
        model = to_onnx(written, image_NCZYX.shape[1], image_NCZYX.shape[2:], multiples)
        if graph.simplify:
            fold_constants(model, written)
        one_pass, proof = _one_pass(model, described, image_NCZYX[0], graph) if tries_one_pass else (None, None)
        parity = ParityCheck(network, image_NCZYX, is_real=is_real, has_regions=described.has_regions)
        parity.choose_patches(model, strides)
        for number, (fold, path, name) in enumerate(zip(folds, paths, model_files, strict=True)):
            weights = strip_prefix(load_checkpoint(path)["network_weights"]) if number else first
            load_weights(network, weights, path)
            digests[str(fold)] = weights_digest(weights)
            if number:
                put_weights(model, (network if folding is None else folding.apply(network)).state_dict())
                if one_pass is not None:
                    one_pass = wider(one_pass, _one_pass(model, described, image_NCZYX[0], graph)[0])
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
            **({} if stand_in is None else {"network_of": trainer}),
            "weights_sha256": digests,
            "training": stored.get("fastnnunet", {}),
            "parity": {
                "patches": "real" if is_real else "noise",
                "max_abs_difference": report.max_abs_difference,
                "label_agreement": min(r.label_agreement for r in reports),
            },
            **({"one_pass": to_plain(proof)} if proof is not None else {}),
            "parameters": int(sum(p.numel() for p in network.parameters())),
        }
        files = {name: sha256_of_file(temporary / name) for name in (*model_files, PARITY_FILE)}
        architecture = architecture_of(plans, configuration) if folding is None else folding.architecture
        spec = _bundle_spec(described, architecture, stored, provenance, tuple(model_files), files, graph)
        if one_pass is not None:
            spec = replace(spec, one_pass=one_pass, format_version=ONE_PASS_FORMAT)
        write_bundle_json(spec, temporary / "bundle.json")
        temporary.chmod(0o755)
        put_in_place(temporary, out, overwrite)
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


def _one_pass(
    model: "onnx.ModelProto", described: Model, patch_CX: np.ndarray, graph: GraphSpec
) -> tuple[OnePass | None, Proof | None]:
    """How a network is predicted in one pass, if it can be. Raises ParityError where it was asked for and cannot be."""
    strides = stride_products(described.config.configuration)
    assert strides is not None  # `may_be_one_pass` looked
    images_CZYX = real_images(described.plans, described.configuration, _previous_labels(described), HALO_CASES)
    # of a 2d network the middle plane of each
    images_CX = (image if len(strides) == 3 else image[:, image.shape[1] // 2] for image in images_CZYX)
    try:
        return one_pass_of(model, patch_CX, strides, images_CX, has_regions=described.has_regions)
    except ParityError as e:
        if graph.one_pass:
            raise ParityError(f"--one-pass: {e}\nleave it out; the bundle is then predicted in nnU-Net's window") from e
        return None, None


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


def put_in_place(bundle: Path, out: Path, overwrite: bool) -> None:
    """Rename a finished bundle to its place. Raises MismatchError where something else has come there meanwhile."""
    try:
        if overwrite:
            replace_folder(bundle, out)
        else:
            os.replace(bundle, out)
    except OSError:
        check_target(out, overwrite)  # somebody else was faster
        raise


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a place that is taken. Raises MismatchError."""
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
    architecture: dict[str, Any],
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
        architecture=stock_architecture(architecture),
        plans=_without_nan(model.plans),
        dataset_json=_without_nan(dataset_json),
        model_files=model_files,
        folds=folds,
        provenance=provenance,
        files=files,
    )
