"""The demo's data set: reproducible, complete, geometrically consistent, and neither trivial nor hopeless."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.errors import MismatchError
from pipelines.demo_data import LABELS, SPACINGS_MM, make_case, make_dataset

SEED = 20240901


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("raw"), n_train=4, n_test=2, seed=SEED)


def test_layout_is_nnunets(folder: Path) -> None:
    assert folder.name == "Dataset901_ProceduralCT"
    described = json.loads((folder / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "CT"}
    assert described["numTraining"] == 4
    for part, n in (("Tr", 4), ("Ts", 2)):
        cases = [p.name.removesuffix("_0000.nii.gz") for p in sorted((folder / f"images{part}").iterdir())]
        assert len(cases) == n
        assert cases == [p.name.removesuffix(".nii.gz") for p in sorted((folder / f"labels{part}").iterdir())]


def test_nnunet_accepts_it(folder: Path) -> None:
    check = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    check.verify_dataset_integrity(str(folder), num_processes=1)


def test_image_and_label_share_geometry_and_both_spacings_occur(folder: Path) -> None:
    spacings = set()
    for image_file in sorted((folder / "imagesTr").iterdir()):
        image = sitk.ReadImage(str(image_file))
        label = sitk.ReadImage(str(folder / "labelsTr" / image_file.name.replace("_0000", "")))
        assert image.GetPixelID() == sitk.sitkInt16
        assert label.GetPixelID() == sitk.sitkUInt8
        assert image.GetSize() == label.GetSize()
        np.testing.assert_allclose(image.GetSpacing(), label.GetSpacing())
        np.testing.assert_allclose(image.GetOrigin(), label.GetOrigin())
        spacings.add(tuple(round(s, 4) for s in image.GetSpacing()[::-1]))
    assert spacings == set(SPACINGS_MM)


def test_files_hold_the_voxels_of_make_case(folder: Path) -> None:
    case = make_case(SEED, 5)
    image = sitk.ReadImage(str(folder / "imagesTs" / "ct_005_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), case.image_zyx)
    np.testing.assert_allclose(image.GetSpacing(), case.spacing_mm[::-1], rtol=1e-6)
    label = sitk.ReadImage(str(folder / "labelsTs" / "ct_005.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), case.labels_zyx)


def test_same_seed_same_voxels_and_other_seed_others() -> None:
    first, again, other, next_one = make_case(1, 0), make_case(1, 0), make_case(2, 0), make_case(1, 1)
    np.testing.assert_array_equal(first.image_zyx, again.image_zyx)
    np.testing.assert_array_equal(first.labels_zyx, again.labels_zyx)
    for different in (other, next_one):
        same_shape = different.image_zyx.shape == first.image_zyx.shape
        assert not same_shape or (different.image_zyx != first.image_zyx).any()


def test_every_case_looks_like_a_ct_with_every_organ() -> None:
    """All 30 cases of the demo: every label is there, sizes differ by an order, contrasts overlap but differ."""
    for index in range(30):
        case = make_case(SEED, index)
        image, labels = case.image_zyx.astype(float), case.labels_zyx
        assert all(16 <= n <= 64 for n in labels.shape)
        voxels = {name: int((labels == value).sum()) for name, value in LABELS.items()}
        assert min(voxels.values()) >= 40, (index, voxels)
        assert voxels["liver"] > 5 * voxels["tumour"]
        mean = {name: image[labels == value].mean() for name, value in LABELS.items()}
        assert mean["tumour"] + 15 < mean["liver"] < mean["kidneys"] < mean["spine"]
        spread = image[labels == LABELS["liver"]].std()
        assert spread > 0.2 * (mean["liver"] - mean["tumour"])  # no single threshold separates them
        assert image.min() < -900  # air around the body
        assert (labels[:, [0, -1]] == 0).all()  # organs end before the image does, front and back
        assert -1024 <= image.min() <= image.max() <= 2000


def test_existing_data_set_is_kept_and_another_one_refused(folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert make_dataset(folder.parent, n_train=4, n_test=2, seed=SEED) == folder
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(MismatchError, match="delete that folder"):
        make_dataset(folder.parent, n_train=5, n_test=2, seed=SEED)
