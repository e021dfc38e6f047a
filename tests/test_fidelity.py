"""Fidelity of students: Dice against nnU-Net's own and hand-counted maps, intervals against SciPy and enumeration."""

import itertools
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastnnunet.errors import FastnnUNetError, ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.evaluate.bootstrap import Interval, mean_intervals
from fastnnunet.evaluate.fidelity import Fidelity, fidelity_gap, fidelity_of, measure_fidelity
from fastnnunet.evaluate.metrics import dice_of_labels, dice_of_masks, region_mask
from fastnnunet.evaluate.segmentations import make_label_set
from fastnnunet.specs.provenance import write_json

LABELS = make_label_set({"background": 0, "whole": [1, 2], "core": [2], "other": 3}, ".nii.gz")


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.5, 2.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[: array.ndim])
    sitk.WriteImage(image, str(path))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A teacher and two students on five cases; in the last neither teacher nor students see label 3."""
    rng = np.random.default_rng(5)
    places = {name: tmp_path / name for name in ("teacher", "r2", "r4")}
    for number, case in enumerate("abcde"):
        teacher = rng.integers(0, 3 if case == "e" else 4, (4, 5, 6), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
        for name, place in places.items():
            share = {"teacher": 1.0, "r2": 0.95, "r4": 0.8 - 0.02 * number}[name]
            write(place / f"{case}.nii.gz", np.where(rng.random(teacher.shape) < share, teacher, 0).astype(np.uint8))
    return places


def measured(folders: dict[str, Path], student: str, **more: object) -> Fidelity:
    return measure_fidelity(folders["teacher"], folders[student], LABELS, student, **more)


def test_agrees_with_nnunet(folders: dict[str, Path], tmp_path: Path) -> None:
    evaluation = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    found = measured(folders, "r4")
    keys = {"whole": (1, 2), "core": 2, "other": 3}
    expected: dict[str, list[float]] = {name: [] for name in keys}
    for case in "abcde":
        files = (str(folders[name] / f"{case}.nii.gz") for name in ("teacher", "r4"))
        metrics = evaluation.compute_metrics(*files, SimpleITKIO(), list(keys.values()))["metrics"]
        for name, key in keys.items():
            expected[name].append(metrics[key]["Dice"])
            assert found.dice[case][name] == pytest.approx(metrics[key]["Dice"], abs=1e-12, nan_ok=True)
        assert found.of_cases()[case] == pytest.approx(np.nanmean([metrics[key]["Dice"] for key in keys.values()]))
    assert found.label_cases == {"whole": 5, "core": 5, "other": 4}
    for name in keys:
        assert found.labels[name].mean == pytest.approx(np.nanmean(expected[name]))
        assert found.labels[name].low < found.labels[name].mean < found.labels[name].high
    assert found.mean.mean == pytest.approx(np.mean([np.nanmean(v) for v in expected.values()]))
    write_json(tmp_path / "fidelity.json", found)
    assert '"other": null' in (tmp_path / "fidelity.json").read_text()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.uint16]),
    values=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=0, max_size=4),
    ignore_label=st.sampled_from([None, 4, 9, 200]),
)
def test_dice_of_all_labels_at_once_is_that_of_each_mask(seed, dtype, values, ignore_label):
    rng = np.random.default_rng(seed)
    pool = np.array([0, 1, 2, 3, 4, 9, 200, 254, *([-3] if np.issubdtype(dtype, np.signedinteger) else [])])
    truth, guess = (rng.choice(pool, (3, 4, 5)).astype(dtype) for _ in range(2))
    names = {str(i): tuple(v) for i, v in enumerate(values)}
    counted = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    found = dice_of_labels(truth, guess, names, ignore_label)
    assert found.keys() == names.keys()
    for name, of_label in names.items():
        masks = (region_mask(m, of_label) & counted for m in (truth, guess))
        assert found[name] == pytest.approx(dice_of_masks(*masks), nan_ok=True)


def test_intervals_agree_with_scipy() -> None:
    rng = np.random.default_rng(2)
    values = rng.uniform(0.6, 0.95, (25, 3))
    found = mean_intervals(values, seed=4)
    columns = [*((values[:, k], found.columns[k]) for k in range(3)), (values.mean(1), found.mean)]
    for sample, got in columns:
        oracle = stats.bootstrap(
            (sample,), np.mean, method="percentile", n_resamples=100_000, rng=np.random.default_rng(9)
        ).confidence_interval
        width = oracle.high - oracle.low
        assert got.mean == pytest.approx(sample.mean())
        assert (got.low, got.high) == pytest.approx((oracle.low, oracle.high), abs=0.03 * width)


def test_intervals_with_labels_that_some_cases_lack() -> None:
    """All 27 equally likely draws of three cases enumerated; a draw without the label says nothing about it."""
    values = np.array([[0.9, np.nan], [0.7, 0.2], [0.5, np.nan]])
    draws = [values[list(d)] for d in itertools.product(range(3), repeat=3)]
    second = [np.nanmean(d[:, 1]) for d in draws if np.isfinite(d[:, 1]).any()]
    overall = [np.nanmean([d[:, 0].mean(), *([0.2] if np.isfinite(d[:, 1]).any() else [])]) for d in draws]
    found = mean_intervals(values, seed=1)
    assert (found.columns[1].mean, found.columns[1].low, found.columns[1].high) == (0.2, min(second), max(second))
    assert found.mean.mean == pytest.approx((0.7 + 0.2) / 2)
    # 1 in 27 draws is one case three times, more than the 2.5 % that are cut off at each end
    assert (found.mean.low, found.mean.high) == pytest.approx((min(overall), max(overall)))
    nothing = mean_intervals(np.full((3, 1), np.nan))
    assert np.isnan([nothing.mean.mean, nothing.mean.low, nothing.columns[0].high]).all()
    assert mean_intervals(np.array([[0.3]])).mean == Interval(mean=0.3, low=0.3, high=0.3)


def test_draws_that_do_not_fit_into_memory_at_once_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).uniform(size=(30, 2))
    whole = mean_intervals(values, resamples=500)
    monkeypatch.setattr("fastnnunet.evaluate.bootstrap._AT_ONCE", 7 * 30)
    for got, expected in zip(mean_intervals(values, resamples=500).columns, whole.columns, strict=True):
        assert astuple(got) == pytest.approx(astuple(expected), rel=1e-12)  # matrix products add in another order


def test_gap_of_two_students_is_paired(folders: dict[str, Path]) -> None:
    r2, r4 = measured(folders, "r2"), measured(folders, "r4")
    gap, back = fidelity_gap(r2, r4), fidelity_gap(r4, r2)
    assert gap.mean.mean == pytest.approx(100 * (r2.mean.mean - r4.mean.mean)) == pytest.approx(-back.mean.mean)
    assert 0 < gap.mean.low < gap.mean.mean < gap.mean.high
    assert gap.labels["core"].low == pytest.approx(-back.labels["core"].high, rel=0.05)
    # cases differ by 0.5, the students by one point everywhere: pairing leaves no spread
    first = {"a": {"x": 0.3}, "b": {"x": 0.8}, "c": {"x": float("nan")}}
    second = {case: {"x": d["x"] - 0.01} for case, d in first.items()}
    constant = fidelity_gap(fidelity_of("first", first), fidelity_of("second", second)).mean
    assert (constant.mean, constant.low, constant.high) == pytest.approx((1, 1, 1))
    with pytest.raises(MismatchError, match="other cases or labels than each other: c"):
        fidelity_gap(fidelity_of("first", first), fidelity_of("second", {c: second[c] for c in "ab"}))


def test_pictures_and_a_choice_of_cases(tmp_path: Path) -> None:
    labels = make_label_set({"background": 0, "nucleus": 1}, ".png")
    square = np.zeros((6, 8), np.uint8)
    square[1:3, 1:5] = 1  # 8 pixels
    half = square.copy()
    half[1] = 0
    for case, guess in (("one", half), ("two", np.zeros_like(square)), ("three", square)):
        write(tmp_path / "teacher" / f"{case}.png", square if case != "three" else np.zeros_like(square))
        write(tmp_path / "r4" / f"{case}.png", guess)
    heard = []
    found = measure_fidelity(
        tmp_path / "teacher", tmp_path / "r4", labels, "r4", cases=("two", "one"), progress=heard.append
    )
    assert found.dice == {"two": {"nucleus": 0.0}, "one": {"nucleus": pytest.approx(2 * 4 / 12)}}
    assert [(p.done, p.total) for p in heard] == [(1, 2), (2, 2)]
    # a student that sees what its teacher does not fails as much as one that misses it
    assert measure_fidelity(tmp_path / "teacher", tmp_path / "r4", labels, "r4").dice["three"] == {"nucleus": 0.0}


def test_refusals(folders: dict[str, Path]) -> None:
    def refused(kind: type[FastnnUNetError], match: str, **more: object) -> None:
        with pytest.raises(kind, match=match):
            measured(folders, "r4", **more)

    refused(MismatchError, "no label map of teacher or student for nobody", cases=("a", "nobody"))
    refused(MismatchError, "there are no cases", cases=())
    (folders["r4"] / "b.nii.gz").rename(folders["r4"] / "z.nii.gz")
    refused(MismatchError, "without a prediction: b\n1 case.s. without a label: z")
    assert set(measured(folders, "r4", cases=("a", "c")).dice) == {"a", "c"}
    write(folders["r4"] / "b.nii.gz", np.zeros((2, 3, 4), np.uint8))
    refused(MismatchError, "case b: prediction and label do not lie on the same grid", cases=("a", "b"))
    (folders["r4"] / "b.nii.gz").write_bytes((folders["r4"] / "a.nii.gz").read_bytes()[:40])
    refused(ImageError, r"b\.nii\.gz", cases=("b",))
    with pytest.raises(NotFoundError, match="folder not found"):
        measure_fidelity(folders["teacher"] / "no", folders["r4"], LABELS, "r4")
    with pytest.raises(SpecError, match="resamples: got 0"):
        mean_intervals(np.ones((2, 1)), resamples=0)
