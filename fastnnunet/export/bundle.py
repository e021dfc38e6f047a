"""Student folder -> bundle, written only when ONNX Runtime computes what PyTorch computes on real patches."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastnnunet import __version__
from fastnnunet.errors import MismatchError, NotFoundError, ParityError
from fastnnunet.export.graph import dynamic_multiples, fix_batch, fold_constants, larger_patches, plans_for
from fastnnunet.export.onnx import INPUT, OUTPUT, to_onnx
from fastnnunet.nnunet.cases import open_cases
from fastnnunet.nnunet.checkpoint import load_checkpoint, load_weights, strip_prefix, weights_digest
from fastnnunet.nnunet.plans import build_network, configuration_of, label_manager_of, num_input_channels, read_json
from fastnnunet.nnunet.primus import stock_architecture
from fastnnunet.specs.bundle import BundleSpec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.graph import GraphSpec

if TYPE_CHECKING:
    import torch

MODEL_FILE, PARITY_FILE = "model.onnx", "parity.npz"
PARITY_PATCHES = 2
# fp32 convolutions summed in another order differ in the last digits; anything more is a wrong graph
RELATIVE_TOLERANCE = 1e-3
LABEL_AGREEMENT = 0.9999


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far the exported model is from PyTorch on the parity patches."""

    patches: int
    max_abs_difference: float  # in logits
    max_abs_logit: float
    label_agreement: float  # share of voxels with the same argmax


def export_bundle(
    model_folder: Path,
    fold: int | str,
    out: Path,
    *,
    checkpoint: str = "checkpoint_final.pth",
    overwrite: bool = False,
    graph: GraphSpec = GraphSpec(),
) -> ParityReport:
    """Export one fold of an nnU-Net model folder as a bundle at `out`.

    Raises NotFoundError (model, fold or preprocessed cases missing), MismatchError (`out` exists, plans do not fit),
    CorruptError (checkpoint), ParityError (the exported model computes something else); leaves nothing at `out` in any
    of these cases.
    """
    _check_target(out, overwrite)
    plans, dataset_json = read_json(model_folder / "plans.json"), read_json(model_folder / "dataset.json")
    path = model_folder / f"fold_{fold}" / checkpoint
    if not path.is_file():
        there = sorted(p.parent.name.removeprefix("fold_") for p in model_folder.glob(f"fold_*/{checkpoint}"))
        raise NotFoundError(f"{path} is missing\nfolds with a {checkpoint}: {', '.join(there) or '(none)'}")
    stored = load_checkpoint(path)
    configuration = stored["init_args"]["configuration"]
    plans = plans_for(plans, configuration, graph)
    plans_manager, config = configuration_of(plans, configuration)
    weights = strip_prefix(stored["network_weights"])
    network = build_network(plans, configuration, dataset_json, trainer=stored["trainer_name"])
    load_weights(network, weights, path)
    network.eval()

    previous_labels = _previous_labels(plans, configuration, dataset_json)
    image_NCZYX = real_patches(plans, configuration, tuple(config.patch_size), previous_labels)
    logits_NKZYX = _run_torch(network, image_NCZYX)
    multiples = dynamic_multiples(config.configuration, graph)
    channels = num_input_channels(plans_manager, config, dataset_json)
    model = to_onnx(network, channels, tuple(config.patch_size), multiples)
    if graph.simplify:
        fold_constants(model, network)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (temporary / MODEL_FILE).write_bytes(model.SerializeToString())
        report = _compare(temporary / MODEL_FILE, image_NCZYX, logits_NKZYX)
        if multiples:
            larger = larger_patches(image_NCZYX, multiples)
            _compare(temporary / MODEL_FILE, larger, _run_torch(network, larger))
        if graph.batch_size is not None:
            fix_batch(temporary / MODEL_FILE, graph.batch_size)
            images, logits = (np.resize(a, (graph.batch_size, *a.shape[1:])) for a in (image_NCZYX, logits_NKZYX))
            _compare(temporary / MODEL_FILE, images, logits, alone=False)
        np.savez_compressed(temporary / PARITY_FILE, image=image_NCZYX, logits=logits_NKZYX)
        provenance = {
            "fastnnunet": __version__,
            "fold": str(fold),
            "checkpoint": checkpoint,
            "weights_sha256": weights_digest(weights),
            "training": stored.get("fastnnunet", {}),
            "parity": {"max_abs_difference": report.max_abs_difference, "label_agreement": report.label_agreement},
            "parameters": int(sum(p.numel() for p in network.parameters())),
        }
        files = {name: sha256_of_file(temporary / name) for name in (MODEL_FILE, PARITY_FILE)}
        spec = _bundle_spec(plans, configuration, dataset_json, stored, provenance, files, graph)
        write_bundle_json(spec, temporary / "bundle.json")
        temporary.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


def _previous_labels(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> tuple[int, ...]:
    """Foreground labels a cascade stage sees one-hot beside the image; none for other configurations."""
    manager, config = configuration_of(plans, configuration)
    if config.previous_stage_name is None:
        return ()
    return tuple(int(label) for label in label_manager_of(manager, dataset_json).foreground_labels)


def real_patches(
    plans: dict[str, Any], configuration: str, patch_size: tuple[int, ...], previous_labels: tuple[int, ...] = ()
) -> np.ndarray:
    """Centre patches of the first preprocessed cases, zero padded: float32 (N, C, *patch).

    In a cascade the label of the case stands in for the previous stage's segmentation.
    """
    cases = open_cases(plans, configuration)
    size = patch_size if len(patch_size) == 3 else (1, *patch_size)
    patches = []
    for case_id in cases.case_ids[:PARITY_PATCHES]:
        image_CZYX = cases.image_CZYX(case_id)
        if previous_labels:
            label_ZYX = cases.label_ZYX(case_id)
            one_hot = np.stack([label_ZYX == label for label in previous_labels])
            image_CZYX = np.concatenate([image_CZYX, one_hot.astype(np.float32)])
        patch = np.zeros((image_CZYX.shape[0], *size), np.float32)
        source, target = zip(*(_centred(n, p) for n, p in zip(image_CZYX.shape[1:], size, strict=True)), strict=True)
        patch[(slice(None), *target)] = image_CZYX[(slice(None), *source)]
        patches.append(patch.reshape(image_CZYX.shape[0], *patch_size))
    return np.stack(patches)


def _centred(length: int, window: int) -> tuple[slice, slice]:
    """Slices (in the image, in the window) that put the image's centre into the window's centre."""
    common = min(length, window)
    start, offset = (length - common) // 2, (window - common) // 2
    return slice(start, start + common), slice(offset, offset + common)


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise MismatchError(f"{out} exists already\ngive another -o, or --overwrite to replace the bundle in it")
    if not (out / "bundle.json").is_file() and any(out.iterdir()):
        raise MismatchError(f"--overwrite: {out} is not a bundle and not empty; it is left alone\ngive another -o")


def _run_torch(network: "torch.nn.Module", image_NCZYX: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return network(torch.from_numpy(image_NCZYX)).float().numpy()


def _compare(model_file: Path, image_NCZYX: np.ndarray, expected: np.ndarray, alone: bool = True) -> ParityReport:
    """In one batch and, with `alone`, one by one. Raises ParityError."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model_file), providers=["CPUExecutionProvider"])
    together = session.run([OUTPUT], {INPUT: image_NCZYX})[0]
    results = [together]
    if alone:
        results.append(np.concatenate([session.run([OUTPUT], {INPUT: image[None]})[0] for image in image_NCZYX]))
    difference = max(float(np.abs(got - expected).max()) for got in results)
    scale = float(np.abs(expected).max())
    agreement = float((together.argmax(1) == expected.argmax(1)).mean())
    if not difference <= RELATIVE_TOLERANCE * scale or agreement < LABEL_AGREEMENT:
        raise ParityError(
            f"the exported model differs from PyTorch on {len(image_NCZYX)} real patches:\n"
            f"  largest logit difference {difference:.3g}, allowed {RELATIVE_TOLERANCE * scale:.3g}\n"
            f"  same label on {agreement:.4%} of voxels, expected at least {LABEL_AGREEMENT:.2%}\nno bundle was written"
        )
    return ParityReport(
        patches=len(image_NCZYX), max_abs_difference=difference, max_abs_logit=scale, label_agreement=agreement
    )


def _bundle_spec(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    checkpoint: dict[str, Any],
    provenance: dict[str, Any],
    files: dict[str, str],
    graph: GraphSpec,
) -> BundleSpec:
    plans_manager, config = configuration_of(plans, configuration)
    channels = dataset_json.get("channel_names") or dataset_json["modality"]  # nnU-Net accepts both keys
    order = dataset_json.get("regions_class_order")
    mirror_axes = checkpoint.get("inference_allowed_mirroring_axes")
    return BundleSpec(
        name=f"{plans['dataset_name']} {plans['plans_name']} {configuration} fold {provenance['fold']}",
        configuration=configuration,
        channel_names=tuple(channels[k] for k in sorted(channels, key=int)),
        labels=dataset_json["labels"],
        regions_class_order=tuple(order) if order else None,
        previous_labels=_previous_labels(plans, configuration, dataset_json),
        num_heads=int(label_manager_of(plans_manager, dataset_json).num_segmentation_heads),
        file_ending=dataset_json["file_ending"],
        reader_writer=plans["image_reader_writer"],
        transpose_forward=tuple(plans["transpose_forward"]),
        transpose_backward=tuple(plans["transpose_backward"]),
        spacing_mm=tuple(float(s) for s in config.spacing),
        patch_size=tuple(int(p) for p in config.patch_size),
        normalization_schemes=tuple(config.normalization_schemes),
        use_mask_for_norm=tuple(bool(u) for u in config.use_mask_for_norm),
        intensity_properties=plans["foreground_intensity_properties_per_channel"],
        resampling={
            kind: {
                "fn": config.configuration[f"resampling_fn_{kind}"],
                "kwargs": config.configuration[f"resampling_fn_{kind}_kwargs"],
            }
            for kind in ("data", "seg", "probabilities")
        },
        mirror_axes=tuple(mirror_axes) if mirror_axes else None,
        batch_size=graph.batch_size,
        architecture=stock_architecture(config.configuration["architecture"]),
        plans=plans,
        dataset_json=dataset_json,
        provenance=provenance,
        files=files,
    )
