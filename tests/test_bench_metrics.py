"""Oracles: hand-counted arrays, closed-form geometry, nnU-Net's own evaluation."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.errors import MismatchError
from fastnnunet.evaluate.metrics import label_metrics, nanmean, region_mask, robust_hausdorff_mm, surface_dice
from fastnnunet.evaluate.surface import CORNERS, SurfaceDistances, cell_areas_mm2, surface_distances

UNIT = (1.0, 1.0, 1.0)


def box(shape: tuple[int, int, int], low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    return mask


class TestCellAreas:
    def test_known_cells(self) -> None:
        areas = cell_areas_mm2(UNIT)
        assert areas[0] == areas[255] == 0
        assert areas[1] == pytest.approx(np.sqrt(3) / 8)  # one corner: triangle with side sqrt(1/2)
        assert areas[0b00001111] == pytest.approx(1)  # half cell: unit square
        assert areas[0b00000011] == pytest.approx(np.sqrt(0.5))  # one edge: rectangle 1 x sqrt(1/2)
        assert areas[1 | 1 << 7] == pytest.approx(np.sqrt(3) / 4)  # two opposite corners: two triangles

    def test_every_mixed_cell_has_area_and_rotations_agree(self) -> None:
        areas = cell_areas_mm2(UNIT)
        assert (areas[1:255] > 0.2).all()
        for code in range(256):
            turned = sum(1 << CORNERS.index((y, x, z)) for bit, (z, y, x) in enumerate(CORNERS) if code >> bit & 1)
            assert areas[turned] == pytest.approx(areas[code])

    def test_spacing_scales_faces(self) -> None:
        areas = cell_areas_mm2((5.0, 2.0, 3.0))
        half_z = sum(1 << bit for bit, (z, _, _) in enumerate(CORNERS) if z == 0)
        half_x = sum(1 << bit for bit, (_, _, x) in enumerate(CORNERS) if x == 0)
        assert areas[half_z] == pytest.approx(2 * 3)
        assert areas[half_x] == pytest.approx(5 * 2)

    @pytest.mark.parametrize("spacing_mm", [UNIT, (2.0, 1.0, 0.5)])
    def test_area_is_that_of_marching_cubes(self, spacing_mm: tuple[float, float, float]) -> None:
        measure = pytest.importorskip("skimage.measure")
        radius = 15.0
        shape = tuple(int(2 * radius / s) + 6 for s in spacing_mm)
        grid = np.meshgrid(*((np.arange(n) - n / 2) * s for n, s in zip(shape, spacing_mm, strict=True)), indexing="ij")
        ball = sum(g**2 for g in grid) < radius**2
        found = surface_distances(ball, ball, spacing_mm)
        assert found is not None
        vertices, faces, *_ = measure.marching_cubes(ball.astype(float), 0.5, spacing=spacing_mm, method="lorensen")
        assert found.reference_area_mm2.sum() == pytest.approx(measure.mesh_surface_area(vertices, faces), rel=0.02)


class TestSurfaceDistances:
    def test_shifted_plane_figures(self) -> None:
        """Two squares in one slice, the second 3 voxels of 2 mm to the right: only vertical outlines are apart."""
        a, b = box((1, 12, 20), (0, 2, 4), (1, 10, 12)), box((1, 12, 20), (0, 2, 7), (1, 10, 15))
        found = surface_distances(a > 0, b > 0, (1.0, 1.0, 2.0))
        assert found is not None
        assert found.reference_mm.max() == pytest.approx(6.0)
        # outline: 2 sides of 8 * 1 mm and 2 of 8 * 2 mm, with the four corners cut (square cell 1 x 2: diagonal half)
        cut = 4 * (0.5 + 1 - np.sqrt(0.5**2 + 1))
        assert found.reference_area_mm2.sum() == pytest.approx(2 * 8 + 2 * 16 - cut)

    def test_structure_at_the_border_is_closed(self) -> None:
        full = np.ones((4, 4, 4), bool)
        found = surface_distances(full, full, UNIT)
        assert found is not None
        assert found.reference_area_mm2.sum() > 6 * 3 * 3

    def test_cropping_changes_nothing(self) -> None:
        rng = np.random.default_rng(3)
        a, b = rng.random((2, 6, 7, 8)) > 0.6
        wide = [np.pad(m, 5) for m in (a, b)]
        small, large = surface_distances(a, b, (2.0, 1.0, 1.5)), surface_distances(*wide, (2.0, 1.0, 1.5))
        assert small is not None
        assert large is not None
        np.testing.assert_array_equal(small.reference_mm, large.reference_mm)
        np.testing.assert_array_equal(small.prediction_area_mm2, large.prediction_area_mm2)

    def test_distances_by_brute_force(self) -> None:
        rng = np.random.default_rng(11)
        spacing = (3.0, 1.0, 0.7)
        a, b = rng.random((2, 5, 6, 7)) > 0.7
        points = [np.array(corner_points(m)) * spacing for m in (a, b)]
        expected = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(-1))
        found = surface_distances(a, b, spacing)
        assert found is not None
        np.testing.assert_allclose(np.sort(found.reference_mm), np.sort(expected.min(1)))
        np.testing.assert_allclose(np.sort(found.prediction_mm), np.sort(expected.min(0)))

    def test_shape_mismatch_is_named(self) -> None:
        with pytest.raises(MismatchError, match=r"\(1, 2, 3\) and \(3, 2, 1\)"):
            surface_distances(np.ones((1, 2, 3), bool), np.ones((3, 2, 1), bool), UNIT)


def corner_points(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """Grid corners whose eight voxels are not all equal."""
    padded = np.pad(mask, 1)
    return [
        (z, y, x)
        for z, y, x in product(*(range(n + 1) for n in mask.shape))
        if 0 < padded[z : z + 2, y : y + 2, x : x + 2].sum() < 8
    ]


class TestLabelMetrics:
    def test_hand_counted(self) -> None:
        truth, guess = box((4, 4, 4), (0, 0, 0), (2, 4, 4)), box((4, 4, 4), (1, 0, 0), (3, 4, 4))
        m = label_metrics(truth, guess, (1,), UNIT, tolerance_mm=1.0)
        assert (m.reference_voxels, m.prediction_voxels) == (32, 32)
        assert m.dice == 0.5
        assert m.surface_dice == 1.0  # every sample is at most one voxel away
        assert m.hd95_mm == 1.0
        assert label_metrics(truth, guess, (1,), (2.0, 1.0, 1.0), 1.0).surface_dice < 1.0  # now 2 mm apart

    def test_both_empty_is_nan_and_one_empty_is_zero(self) -> None:
        empty, some = np.zeros((3, 3, 3), np.uint8), box((3, 3, 3), (1, 1, 1), (2, 2, 2))
        both = label_metrics(empty, empty, (1,), UNIT)
        assert np.isnan([both.dice, both.surface_dice, both.hd95_mm]).all()
        for truth, guess in ((empty, some), (some, empty)):
            m = label_metrics(truth, guess, (1,), UNIT)
            assert (m.dice, m.surface_dice) == (0.0, 0.0)
            assert np.isnan(m.hd95_mm)

    def test_region_joins_its_labels(self) -> None:
        seg = np.array([[[0, 1, 2, 3]]])
        assert region_mask(seg, (1, 3)).tolist() == [[[False, True, False, True]]]

    def test_ignored_voxels_count_nowhere(self) -> None:
        truth, guess = box((6, 6, 6), (1, 1, 1), (3, 5, 5)), box((6, 6, 6), (1, 1, 1), (5, 5, 5))
        truth[3:] = 9
        m = label_metrics(truth, guess, (1,), UNIT, 0.0, ignore_label=9)
        assert (m.dice, m.surface_dice, m.hd95_mm) == (1.0, 1.0, 0.0)

    def test_symmetric_and_bounded(self) -> None:
        @settings(max_examples=40, deadline=None)
        @given(seed=st.integers(0, 10**6), p=st.floats(0.05, 0.95), tolerance=st.floats(0, 5))
        def check(seed: int, p: float, tolerance: float) -> None:
            a, b = (np.random.default_rng(seed).random((2, 4, 5, 6)) < p).astype(np.uint8)
            ab = label_metrics(a, b, (1,), (2.5, 1.0, 0.8), tolerance)
            ba = label_metrics(b, a, (1,), (2.5, 1.0, 0.8), tolerance)
            values = np.array([ab.dice, ab.surface_dice, ab.hd95_mm])
            np.testing.assert_allclose(values, [ba.dice, ba.surface_dice, ba.hd95_mm])
            assert np.isnan(values[:2]).all() or ((values[:2] >= 0) & (values[:2] <= 1)).all()
            same = label_metrics(a, a, (1,), (2.5, 1.0, 0.8), tolerance)
            assert not a.any() or (same.dice, same.surface_dice, same.hd95_mm) == (1.0, 1.0, 0.0)

        check()

    @pytest.mark.parametrize("ignore_label", [None, 4])
    def test_dice_is_nnunets(self, tmp_path: Path, ignore_label: int | None) -> None:
        evaluation = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
        import SimpleITK as sitk
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

        rng = np.random.default_rng(5)
        truth, guess = rng.integers(0, 5, (2, 7, 8, 9), dtype=np.uint8)
        guess[guess == 4] = 0
        for name, seg in (("truth", truth), ("guess", guess)):
            sitk.WriteImage(sitk.GetImageFromArray(seg), str(tmp_path / f"{name}.nii.gz"))
        wanted = [1, 3, (1, 2), (2, 3)]
        oracle = evaluation.compute_metrics(
            str(tmp_path / "truth.nii.gz"), str(tmp_path / "guess.nii.gz"), SimpleITKIO(), wanted, ignore_label
        )["metrics"]
        for key in wanted:
            values = key if isinstance(key, tuple) else (key,)
            mine = label_metrics(truth, guess, values, UNIT, 1.0, ignore_label)
            assert mine.dice == pytest.approx(oracle[key]["Dice"], abs=1e-12)
            assert (mine.reference_voxels, mine.prediction_voxels) == (oracle[key]["n_ref"], oracle[key]["n_pred"])


def test_quantile_and_share_are_by_area() -> None:
    far = SurfaceDistances(np.array([0.0, 4.0]), np.array([97.0, 3.0]), np.array([0.0, 2.0]), np.array([90.0, 10.0]))
    assert robust_hausdorff_mm(far) == 2.0
    assert surface_dice(far, 1.0) == pytest.approx(187 / 200)
    assert surface_dice(far, 2.0) == pytest.approx(197 / 200)


def test_nanmean() -> None:
    assert nanmean([1.0, float("nan"), 3.0]) == 2.0
    assert np.isnan(nanmean([float("nan")]))
