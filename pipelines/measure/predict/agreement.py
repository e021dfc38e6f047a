"""Share of voxels with nnU-Net's label: ensembles and single networks of every kind, this runtime against nnunetv2.

    python -m pipelines.measure.predict.agreement --ct CT.nii.gz --teacher MODEL --student MODEL -i imagesTs -o R.json

The same weights on both sides, image file in and label file out. Networks of each kind (3d on a CT, anisotropic,
2d, cascade, regions) have random weights under which all labels occur, two folds with mirroring ("ensemble")
and one fold without ("one fold"), and see a block of the CT, or every fourth slice of it. `--teacher` (five
folds, mirrored) and `--student` (one fold, not mirrored) are trained models for the images of `-i`.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from fastnnunet.export.models import load_model
from pipelines.measure.head import arguments, header, put
from pipelines.measure.predict.stock_agreement import equal_voxels
from tests.bundles import Toy, write_image
from tests.teachers import make_teacher, nnunet_files, nnunet_predictor, random_labels

CT = {
    "schemes": ["CTNormalization"],
    "intensity": {"mean": -150.0, "std": 350.0, "percentile_00_5": -950.0, "percentile_99_5": 900.0},
}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A toy network and what it sees of the CT: a step per axis (zyx), and at most so many voxels of each."""

    toy: Toy
    step: tuple[int, int, int] = (1, 1, 1)
    most: tuple[int, int, int] = (64, 80, 80)
    cascade: bool = False


KINDS = {
    "3d, resampled": Kind(toy=Toy(**CT, spacing=(2.0, 1.7, 1.7), mirror_axes=(0, 1, 2))),
    "anisotropic, separate z": Kind(toy=Toy(**CT, spacing=(5.0, 1.2, 1.2), mirror_axes=(1, 2)), step=(4, 1, 1)),
    "2d": Kind(toy=Toy(**CT, dims=2, spacing=(1.3, 1.3), mirror_axes=(0, 1)), most=(20, 126, 164)),
    "cascade": Kind(toy=Toy(**CT, spacing=(1.7, 1.7, 1.7), mirror_axes=(0, 1, 2)), cascade=True),
    "regions": Kind(
        toy=Toy(**CT, labels=REGIONS, regions_class_order=[1, 3, 2], spacing=(1.7, 1.7, 1.7), mirror_axes=(0, 1, 2))
    ),
}


def write_part(ct: sitk.Image, kind: Kind, folder: Path) -> list[Path]:
    """The part of the CT that a kind sees, as the only case of `folder`."""
    values = sitk.GetArrayFromImage(ct)
    starts = [max(0, (n - m) // 2) for n, m in zip(values.shape, kind.most, strict=True)]
    block = tuple(slice(s, s + m, step) for s, m, step in zip(starts, kind.most, kind.step, strict=True))
    spacing_xyz = tuple(s * step for s, step in zip(ct.GetSpacing(), kind.step[::-1], strict=True))
    return [write_image(np.ascontiguousarray(values[block]), folder / "case_0000.nii.gz", spacing_xyz)]


def compare(
    model: Path,
    folds: Sequence[int],
    mirroring: bool,
    images: Path,
    backends: Sequence[str],
    work: Path,
    previous: Path | None = None,
) -> dict[str, Any]:
    """Backend -> cases, voxels, how many differ."""
    cases: dict[str, list[Path]] = {}
    for file in sorted(images.iterdir()):
        cases.setdefault(file.name.rpartition("_")[0], []).append(file)
    theirs = work / "nnunetv2"
    nnunet_files(nnunet_predictor(model, folds, mirroring=mirroring), cases, theirs, previous=previous)
    rows = {}
    for backend in backends:
        predictor = load_model(model, folds, backend=backend, mirroring=mirroring)
        predictor.predict_files(images, work / backend, previous=previous)
        rows[backend] = equal_voxels(theirs, work / backend, ".nii.gz")
        print(f"  {backend}: {rows[backend]}", flush=True)
    shares = np.zeros(256, np.int64)
    for file in theirs.glob("*.nii.gz"):
        shares += np.bincount(sitk.GetArrayFromImage(sitk.ReadImage(str(file))).ravel(), minlength=256)
    return {
        "folds": list(folds),
        "mirroring": mirroring,
        "label_shares": (shares[: 1 + shares.nonzero()[0].max()] / shares.sum()).round(6).tolist(),
        "agreement": rows,
    }


def measure(
    ct_file: Path,
    teacher: Path | None = None,
    student: Path | None = None,
    images: Path | None = None,
    backends: Sequence[str] = ("openvino", "onnxruntime"),
    kinds: Sequence[str] = tuple(KINDS),
) -> dict[str, Any]:
    """The record."""
    rows = {}
    ct = sitk.ReadImage(str(ct_file))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTNNUNET_CACHE_HOME"] = str(Path(folder) / "home")  # where folders are kept as bundles
        for name in kinds:
            kind, where = KINDS[name], Path(folder) / name
            (where / "in").mkdir(parents=True)
            files = write_part(ct, kind, where / "in")
            model = make_teacher(kind.toy, where, cascade=kind.cascade)
            previous = None
            if kind.cascade:
                previous, image = where / "previous", sitk.ReadImage(str(files[0]))
                labels = random_labels(image.GetSize()[::-1], 3, 5)
                write_image(labels, previous / "case.nii.gz", image.GetSpacing())
            for arm, folds, mirroring in (("ensemble", (0, 1), True), ("one fold", (0,), False)):
                print(f"{name}, {arm}", flush=True)
                rows[f"{name}, {arm}"] = compare(model, folds, mirroring, where / "in", backends, where / arm, previous)
        for name, trained, folds, mirroring in (
            ("trained teacher, ensemble", teacher, (0, 1, 2, 3, 4), True),
            ("trained student, one fold", student, (0,), False),
        ):
            if trained is not None and images is not None:
                print(name, flush=True)
                rows[name] = compare(trained, folds, mirroring, images, backends, Path(folder) / name)
    return {
        **header("share of voxels with the same label: nnunetv2's predictor against this runtime, same weights, fp32"),
        "ct": ct_file.name,
        "least_agreement": min(b["agreement"] for row in rows.values() for b in row["agreement"].values()),
        "rows": rows,
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ct", type=Path, required=True, help="a CT in any format SimpleITK reads")
    parser.add_argument("--teacher", type=Path, help="a trained model folder with folds 0 to 4")
    parser.add_argument("--student", type=Path, help="a trained student's model folder with fold 0")
    parser.add_argument("-i", type=Path, help="images for the trained models")
    args = parser.parse_args()
    if args.i is None and (args.teacher or args.student):
        parser.error("--teacher and --student need images: give -i")
    record = measure(args.ct, args.teacher, args.student, args.i)
    put(record, args.o)
    for name, row in record["rows"].items():
        print(f"{name}: " + ", ".join(f"{b} {100 * a['agreement']:.4f} %" for b, a in row["agreement"].items()))
    print(f"least {100 * record['least_agreement']:.4f} %")
