"""Whole predictions against nnU-Net's own predictor: same weights, same files in, same voxels out."""

import gzip
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.runtime.predict import Predictor
from tests.bundles import (
    NO_RESAMPLING,
    TORCH_RESAMPLING,
    Toy,
    make_toy_model,
    nnunet_predict,
    smooth_noise,
    write_image,
)

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
OBLIQUE = (0.9553364891, -0.2955202067, 0.0, 0.2955202067, 0.9553364891, 0.0, 0.0, 0.0, 1.0)  # 0.3 rad about z


@dataclass
class Scenario:
    toy: Toy
    shape_zyx: tuple[int, ...]
    spacing_xyz: tuple[float, ...] = (1.0, 1.0, 1.0)
    border: int = 0
    dtype: Any = np.float32
    image: dict[str, Any] = field(default_factory=dict)  # origin_xyz, direction
    agreement: float = 0.9999


SCENARIOS = {
    "one_tile": Scenario(Toy(), (16, 20, 24)),
    "smaller_than_patch": Scenario(Toy(), (9, 13, 11)),
    "several_tiles": Scenario(Toy(), (20, 33, 41)),
    "isotropic_resampled": Scenario(Toy(), (17, 21, 27), spacing_xyz=(1.2, 0.8, 1.3)),
    "anisotropic_separate_z": Scenario(Toy(spacing=(4.0, 1.0, 1.0)), (11, 25, 30), spacing_xyz=(0.8, 1.1, 5.0)),
    "anisotropic_image_only": Scenario(Toy(), (6, 22, 24), spacing_xyz=(1.0, 1.0, 3.5)),
    "transposed": Scenario(Toy(transpose=((2, 0, 1), (1, 2, 0))), (22, 17, 31), spacing_xyz=(0.9, 1.2, 1.1)),
    "cropped": Scenario(Toy(), (22, 25, 31), border=4),
    "cropped_masked_two_channels": Scenario(Toy(channels=2, use_mask=True), (21, 26, 30), (1.1, 0.9, 1.0), border=3),
    "ct": Scenario(Toy(schemes=["CTNormalization"]), (18, 22, 26), dtype=np.int16),
    "regions": Scenario(Toy(labels=REGIONS, regions_class_order=[1, 3, 2]), (20, 24, 28), (1.0, 1.1, 1.0), border=2),
    "mirrored": Scenario(Toy(mirror_axes=(0, 1, 2)), (16, 20, 29)),
    "torch_resampling": Scenario(Toy(resampling=TORCH_RESAMPLING), (19, 24, 22), (1.2, 0.8, 1.3)),
    "torch_resampling_separate_z": Scenario(Toy(resampling=TORCH_RESAMPLING), (7, 24, 22), (1.2, 0.8, 4.0)),
    "no_resampling": Scenario(Toy(resampling=NO_RESAMPLING), (19, 24, 22), (1.2, 0.8, 1.3)),
    "2d": Scenario(Toy(dims=2, spacing=(1.0, 1.0)), (5, 40, 45), spacing_xyz=(1.0, 1.0, 3.0)),
    "2d_resampled": Scenario(Toy(dims=2, spacing=(1.0, 1.0)), (6, 31, 44), spacing_xyz=(0.8, 1.2, 1.0)),
    "2d_mirrored_small": Scenario(Toy(dims=2, spacing=(1.0, 1.0), mirror_axes=(0, 1)), (4, 20, 45)),
    "oblique_nrrd": Scenario(
        Toy(file_ending=".nrrd"), (17, 22, 24), image={"origin_xyz": (-7.5, 3.25, 12.0), "direction": OBLIQUE}
    ),
    "reoriented": Scenario(
        Toy(reader_writer="SimpleITKIOWithReorient"),
        (17, 21, 24),
        spacing_xyz=(1.1, 1.0, 1.0),
        image={"origin_xyz": (-7.5, 3.25, 12.0), "direction": (-1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0)},
    ),
}


def _write_case(scenario: Scenario, folder: Path, name: str, seed: int = 1) -> list[Path]:
    toy = scenario.toy
    files = []
    for channel in range(toy.channels):
        array = smooth_noise(scenario.shape_zyx, seed + channel, border=scenario.border).astype(scenario.dtype)
        file = folder / f"{name}_{channel:04d}{toy.file_ending}"
        files.append(write_image(array, file, scenario.spacing_xyz, **scenario.image))
    return files


def _same_voxels(left: Path, right: Path) -> tuple[float, np.ndarray]:
    a, b = sitk.ReadImage(str(left)), sitk.ReadImage(str(right))
    assert a.GetPixelIDValue() == b.GetPixelIDValue()
    assert a.GetSpacing() == b.GetSpacing()
    assert a.GetOrigin() == b.GetOrigin()
    assert a.GetDirection() == b.GetDirection()
    x, y = sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b)
    assert x.shape == y.shape
    if (x == y).all() and left.name.endswith(".gz"):
        # header and all: the same geometry, codes and descriptions
        assert gzip.decompress(left.read_bytes()) == gzip.decompress(right.read_bytes())
    return float((x == y).mean()), y


@pytest.mark.parametrize("name", SCENARIOS)
def test_equals_nnunet(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    model = make_toy_model(scenario.toy, tmp_path)
    files = _write_case(scenario, tmp_path / "in", "case")
    nnunet_predict(model, {"case": files}, tmp_path / "expected")
    Predictor.load(model.bundle, "onnxruntime", threads=1).predict_files(tmp_path / "in", tmp_path / "got")
    ending = scenario.toy.file_ending
    agreement, expected = _same_voxels(tmp_path / "got" / f"case{ending}", tmp_path / "expected" / f"case{ending}")
    assert agreement >= scenario.agreement
    # the comparison means something: every label occurs, none is nearly everything
    counts = np.bincount(expected.ravel(), minlength=scenario.toy.heads)
    assert counts.max() < 0.97 * counts.sum()
    assert np.count_nonzero(counts) >= 2
    print(name, agreement, counts)


@pytest.mark.parametrize("name", ["isotropic_resampled", "regions", "transposed", "2d_resampled", "cropped"])
def test_probabilities_equal_nnunet(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    scenario = Scenario(scenario.toy, scenario.shape_zyx, scenario.spacing_xyz, border=2)
    model = make_toy_model(scenario.toy, tmp_path)
    files = _write_case(scenario, tmp_path / "in", "case")
    nnunet_predict(model, {"case": files}, tmp_path / "expected", save_probabilities=True)
    Predictor.load(model.bundle, "onnxruntime", threads=1).predict_files(
        tmp_path / "in", tmp_path / "got", save_probabilities=True
    )
    expected = np.load(tmp_path / "expected" / "case.npz")["probabilities"]
    got = np.load(tmp_path / "got" / "case.npz")["probabilities"]
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    # logits are rounded to float16 (relative 5e-4), where a last bit may fall either way
    np.testing.assert_allclose(got, expected, atol=5e-3)
    assert np.abs(got - expected).mean() < 1e-5
    agreement, _ = _same_voxels(tmp_path / "got" / "case.nii.gz", tmp_path / "expected" / "case.nii.gz")
    assert agreement >= 0.9999
    properties = [pickle.loads((tmp_path / side / "case.pkl").read_bytes()) for side in ("got", "expected")]
    assert properties[0].keys() == properties[1].keys()
    for key, value in properties[1].items():
        assert properties[0][key] == value, key
    # nnU-Net's numbers, plainly: tuples, lists and floats of the same types
    assert str(properties[0]) == str(properties[1])
