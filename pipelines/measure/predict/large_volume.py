"""A CT of 512 x 512 x 300 voxels and a six-stage network with 128^3 patches: a student of r=4 against nnU-Net.

    python -m pipelines.measure.predict.large_volume --image CT.nii.gz -o record.json

The image is brought to the size first (not timed) and generated without --image. The teacher has the widths nnU-Net
plans for such a CT (32 64 128 256 320 320, two convolutions a stage); the student is that network at r=4. Weights are
random, arranged so that all labels occur: they decide no time, and no accuracy is claimed.

nnunetv2        one fold without mirroring, run whole by nnU-Net's predictor, image file in and label file out
ensemble        not run: `folds` x 2^3 mirrored passes of that fold's counted passes, plus its measured rest, once
fastnnunet      the student's bundle, same files, warm, medians of `repeats`
parity          the student's own weights in nnU-Net's predictor: share of voxels with the same label
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from fastnnunet.bench.arms import BundleArm, ReferenceArm
from fastnnunet.engines.base import Precision
from fastnnunet.engines.registry import available_cores
from fastnnunet.export.bundle import export_bundle
from fastnnunet.geometry.grid import tile_starts
from fastnnunet.geometry.resample import resampled_shape
from fastnnunet.images.cases import Case
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.student.plans import student_architecture
from fastnnunet.specs.student import Family, StudentSpec
from pipelines.measure.head import arguments, header, put
from pipelines.measure.predict.pre_post_speed import SHAPE, SPACING_MM, TARGET_MM, load_image, toy_of
from tests.bundles import _dataset_json, _plans, make_labels_frequent, write_image
from tests.teachers import save_checkpoint

CONFIGURATION = "3d_toy"
PATCH = (128, 128, 128)
FEATURES = [32, 64, 128, 256, 320, 320]
CLASSES = 3
ENSEMBLE_FOLDS, MIRRORED_PASSES = 5, 8


def teacher_plans(features: Sequence[int], patch: Sequence[int]) -> dict[str, Any]:
    """Plans of a U-Net of these widths, one stage each, two convolutions a stage."""
    plans = _plans(toy_of(CLASSES))
    config = plans["configurations"][CONFIGURATION]
    stages = len(features)
    config["patch_size"] = list(patch)
    config["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=list(features),
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    return plans


def write_model(plans: dict[str, Any], folder: Path) -> int:
    """An nnU-Net model folder with one fold of random weights under which all labels occur; returns its parameters."""
    import torch

    torch.manual_seed(0)
    dataset_json = _dataset_json(toy_of(CLASSES))
    network = build_network(model_of(plans, CONFIGURATION, dataset_json)).eval()
    half = tuple(n // 2 for n in plans["configurations"][CONFIGURATION]["patch_size"])
    make_labels_frequent(network, 1, half)
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    save_checkpoint(folder / "fold_0" / "checkpoint_final.pth", network.state_dict(), CONFIGURATION, None)
    return sum(p.numel() for p in network.parameters())


def write_case(image: np.ndarray, folder: Path) -> Case:
    file = write_image(np.rint(image[0]).astype(np.int16), folder / "ct_0000.nii.gz", SPACING_MM[::-1])
    return Case("ct", (file,))


def read_labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def measure(
    image_file: Path | None,
    shape: Sequence[int] = SHAPE,
    patch: Sequence[int] = PATCH,
    features: Sequence[int] = FEATURES,
    precisions: Sequence[Precision] = ("bf16", "fp32"),
    repeats: int = 3,
    threads: int | None = None,
    family: Family = "auto",
) -> dict[str, Any]:
    """The record. `threads` of every arm, None for all cores."""
    spec = StudentSpec(r=4, family=family)
    threads = threads or available_cores()
    image, origin = load_image(image_file, shape)
    grid = resampled_shape(shape, SPACING_MM, TARGET_MM)
    patches = int(np.prod([len(s) for s in tile_starts(grid, patch, 0.5)]))
    with tempfile.TemporaryDirectory() as work:
        where = Path(work)
        case = write_case(image, where)
        del image
        plans = teacher_plans(features, patch)
        parameters = {"teacher": write_model(plans, where / "teacher")}
        config = plans["configurations"][CONFIGURATION]
        config["architecture"] = student_architecture(plans, CONFIGURATION, spec, None)
        parameters["student"] = write_model(plans, where / "student")
        export_bundle(where / "student", 0, where / "bundle", needs_real_patches=False)

        nnunet = {}
        for name in ("teacher", "student"):
            arm = ReferenceArm(
                name=name, model_folder=where / name, folds=(0,), mirroring=False, threads=threads
            ).load()
            nnunet[name] = dict(arm(case, where / f"{name}.nii.gz").stages_s)
            print(f"nnunetv2, {name}: {sum(nnunet[name].values()):.1f} s", nnunet[name], flush=True)
        expected = read_labels(where / "student.nii.gz")

        single_s = sum(nnunet["teacher"].values())
        ensemble_s = single_s + (ENSEMBLE_FOLDS * MIRRORED_PASSES - 1) * nnunet["teacher"]["infer_s"]
        arms = {}
        for precision in precisions:
            run = BundleArm(
                name=precision, bundle=where / "bundle", backend="openvino", precision=precision, threads=threads
            ).load()
            out = where / f"{precision}.nii.gz"
            stages = [dict(run(case, out).stages_s) for _ in range(1 + repeats)][1:]  # the first is not warm
            seconds = statistics.median(sum(s.values()) for s in stages)
            arms[f"openvino {precision}"] = {
                "seconds": seconds,
                "stages_s": {name: statistics.median(s[name] for s in stages) for name in stages[0]},
                "all_s": [sum(s.values()) for s in stages],
                "times_faster_than_single_fold": single_s / seconds,
                "times_faster_than_ensemble": ensemble_s / seconds,
                "agreement_with_nnunetv2": float((read_labels(out) == expected).mean()),
            }
            print(f"fastnnunet, {precision}: {seconds:.2f} s", arms[f"openvino {precision}"]["stages_s"], flush=True)
    return {
        **header("whole prediction of a CT, six-stage network of random weights: student r=4 and nnunetv2, seconds"),
        "image": f"{tuple(shape)} at {SPACING_MM} mm; {origin}",
        "grid": f"{tuple(grid)} at {TARGET_MM} mm",
        "patches": patches,
        "patch": list(patch),
        "features": list(features),
        "family": "lite" if spec.is_lite else "width",
        "parameters": parameters,
        "label_shares": [float((expected == c).mean()) for c in range(CLASSES)],
        "nnunetv2": {
            "single_fold_s": single_s,
            "stages_s": nnunet["teacher"],
            "forward_passes": patches,
            "ensemble_s": ensemble_s,
            "ensemble_forward_passes": patches * ENSEMBLE_FOLDS * MIRRORED_PASSES,
            "ensemble": "extrapolated from the counted passes of the single fold, which was run",
            "student_stages_s": nnunet["student"],
        },
        "fastnnunet": arms,
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--image", type=Path, help="a CT in any format SimpleITK reads; default: generated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--family", default="auto", help="of the student: auto, width or lite")
    args = parser.parse_args()
    record = measure(args.image, repeats=args.repeats, family=args.family)
    put(record, args.o)
    for name, arm in record["fastnnunet"].items():
        print(
            f"{name}: {arm['seconds']:.1f} s, {arm['times_faster_than_single_fold']:.1f} times faster than one fold, "
            f"{arm['times_faster_than_ensemble']:.0f} than the ensemble (extrapolated), "
            f"{100 * arm['agreement_with_nnunetv2']:.4f} % of voxels equal"
        )
