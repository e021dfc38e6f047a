"""Calibration: hand-computed arrays, scikit-learn and plain loops as oracles; what holds for any probabilities."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.errors import MismatchError, SpecError
from fastnnunet.evaluate.calibration import BINS, Calibration, case_calibration, near_borders, scores, summarise
from fastnnunet.specs.provenance import write_json


def softmax_like(rng: np.random.Generator, shape: tuple[int, ...], classes: int, peak: float = 0.4) -> np.ndarray:
    return np.moveaxis(rng.dirichlet([peak] * classes, shape), -1, 0)


def test_hand_computed() -> None:
    student = np.array([[0.8, 0.4], [0.2, 0.6]]).reshape(2, 1, 1, 2)
    teacher = np.array([[1.0, 0.5], [0.0, 0.5]]).reshape(2, 1, 1, 2)
    found = summarise(case_calibration(student, teacher, np.array([0, 0]).reshape(1, 1, 2)))
    t = found.teacher
    assert t.voxels == 2
    assert t.brier == pytest.approx((2 * 0.2**2 + 2 * 0.1**2) / 2)
    assert t.nll == pytest.approx(-(np.log(0.8) + 0.5 * np.log(0.4) + 0.5 * np.log(0.6)) / 2)
    assert t.target_entropy == pytest.approx(np.log(2) / 2)
    assert t.kl == pytest.approx(t.nll - np.log(2) / 2)
    assert t.ece == pytest.approx((abs(0.8 - 1.0) + abs(0.6 - 0.5)) / 2)  # in bins 12 and 9 of 15
    of = found.labels
    assert of is not None
    assert of.brier == pytest.approx((2 * 0.2**2 + 2 * 0.6**2) / 2)
    assert of.nll == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert (of.target_entropy, of.kl) == pytest.approx((0, of.nll))
    assert of.ece == pytest.approx((0.2 + 0.6) / 2)
    assert [(n, c) for n, c, _ in t.bins if n] == [(1, pytest.approx(0.6)), (1, pytest.approx(0.8))]


def test_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(3)
    student, labels = softmax_like(rng, (3, 9, 11), 4, peak=2.0), rng.integers(0, 4, (3, 9, 11))
    found = scores(case_calibration(student, student, labels).labels)
    q_NC, y = student.reshape(4, -1).T, labels.ravel()
    assert found.nll == pytest.approx(metrics.log_loss(y, q_NC, labels=range(4)))
    per_class = [metrics.brier_score_loss(y == c, q_NC[:, c]) for c in range(4)]
    assert found.brier == pytest.approx(sum(per_class))
    hit, confidence = q_NC.argmax(1) == y, q_NC.max(1)
    accuracy, mean_confidence = calibration.calibration_curve(hit, confidence, n_bins=BINS)
    bins = [b for b in found.bins if b[0]]
    assert [b[1] for b in bins] == pytest.approx(list(mean_confidence))
    assert [b[2] for b in bins] == pytest.approx(list(accuracy))
    sizes = np.histogram(confidence, np.linspace(0, 1, BINS + 1))[0]
    assert found.ece == pytest.approx((sizes[sizes > 0] * np.abs(accuracy - mean_confidence)).sum() / y.size)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 5),
    peaks=st.tuples(st.floats(0.05, 3), st.floats(0.05, 3)),
    border_mm=st.floats(0, 4),
)
def test_bounds_and_the_perfect_student(seed: int, classes: int, peaks: tuple[float, float], border_mm: float) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = (softmax_like(rng, (2, 5, 6), classes, peak).astype(np.float32) for peak in peaks)
    found = summarise(case_calibration(student, teacher, rng.integers(0, classes, (2, 5, 6)), border_mm=border_mm))
    for s in (found.teacher, found.teacher_border, found.labels, found.labels_border):
        if s.voxels:
            assert 0 <= s.brier <= 2
            assert 0 <= s.ece <= 1
            assert s.kl >= -1e-4  # clipped at 1e-7
            assert s.nll >= s.kl - 1e-12
            assert sum(b[0] for b in s.bins) == s.voxels
    assert found.teacher_border.voxels <= found.teacher.voxels == 60
    same = summarise(case_calibration(teacher, teacher, border_mm=border_mm)).teacher
    assert (same.brier, same.ece) == pytest.approx((0, 0))
    assert same.nll == pytest.approx(same.target_entropy, abs=1e-4)


def test_a_calibrated_student_has_no_error_against_labels_and_a_sure_one_has() -> None:
    rng = np.random.default_rng(8)
    student = softmax_like(rng, (20, 50, 50), 3, 0.8)
    drawn = rng.uniform(size=(20, 50, 50))
    labels = (drawn > student[0]).astype(int) + (drawn > student[0] + student[1])  # drawn with just these probabilities
    assert scores(case_calibration(student, student, labels).labels).ece < 0.01
    surer = student**3 / (student**3).sum(axis=0)
    assert scores(case_calibration(surer, student, labels).labels).ece > 0.1
    assert scores(case_calibration(surer, student).teacher).ece > 0.1


def test_cases_add_up() -> None:
    rng = np.random.default_rng(0)
    parts = [(softmax_like(rng, (z, 4, 5), 3), softmax_like(rng, (z, 4, 5), 3)) for z in (2, 3)]
    labels = [rng.integers(0, 3, (z, 4, 5)) for z in (2, 3)]
    added = summarise(sum_of([case_calibration(*p, y) for p, y in zip(parts, labels, strict=True)]))
    student, teacher = (np.concatenate(p, axis=1) for p in zip(*parts, strict=True))
    whole = summarise(case_calibration(student, teacher, np.concatenate(labels)))
    for name in ("voxels", "brier", "nll", "target_entropy", "kl", "ece"):
        for place in ("teacher", "labels"):
            assert getattr(getattr(added, place), name) == pytest.approx(getattr(getattr(whole, place), name))
    one_with = summarise(sum_of([case_calibration(*parts[0]), case_calibration(*parts[1], labels[1])]))
    assert one_with.labels.voxels == 60
    assert one_with.teacher.voxels == 100
    with pytest.raises(MismatchError, match="borders of 1 and 2 do not add"):
        case_calibration(*parts[0], border_mm=1) + case_calibration(*parts[0], border_mm=2)


def sum_of(found: list[Calibration]) -> Calibration:
    total = found[0]
    for other in found[1:]:
        total = total + other
    return total


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), border_mm=st.sampled_from([0, 1, 1.5, 2.5, 6]))
def test_near_borders_is_what_distances_say(seed: int, border_mm: float) -> None:
    rng = np.random.default_rng(seed)
    labels, spacing = np.zeros((3, 9, 8), int), np.array([2.5, 1.0, 0.7])
    labels[tuple(rng.integers(0, n, 2) for n in labels.shape)] = rng.integers(1, 3)
    places = np.argwhere(np.ones(labels.shape))
    steps = [s * np.eye(3, dtype=int)[a] for a in range(3) for s in (-1, 1)]

    def at_border(place: np.ndarray) -> bool:
        inside = [tuple(place + s) for s in steps if ((place + s >= 0) & (place + s < labels.shape)).all()]
        return any(labels[n] != labels[tuple(place)] for n in inside)

    borders = np.array([p for p in places if at_border(p)]).reshape(-1, 3)
    expected = [
        bool(len(borders)) and np.linalg.norm((p - borders) * spacing, axis=1).min() <= border_mm + 1e-12
        for p in places
    ]
    found = near_borders(labels, tuple(spacing), border_mm)
    assert found.ravel().tolist() == expected


def test_regions_are_problems_of_two_classes() -> None:
    rng = np.random.default_rng(4)
    student, teacher = rng.uniform(size=(2, 2, 4, 5)), rng.uniform(size=(2, 2, 4, 5))
    labels = rng.integers(0, 4, (2, 4, 5))  # 3 is to be ignored
    found = case_calibration(student, teacher, labels, regions=((1, 2), (2,)), ignore_label=3, border_mm=100)
    each = [
        case_calibration(
            np.stack((1 - student[c], student[c])),
            np.stack((1 - teacher[c], teacher[c])),
            np.where(labels == 3, 9, np.isin(labels, values)),
        )
        for c, values in enumerate(((1, 2), (2,)))
    ]
    expected = summarise(each[0] + each[1])
    got = summarise(found)
    assert got.teacher.voxels == 80
    assert got.labels.voxels == 2 * int((labels < 3).sum())
    for name in ("brier", "nll", "target_entropy", "ece"):
        assert getattr(got.teacher, name) == pytest.approx(getattr(expected.teacher, name))
        assert getattr(got.labels, name) == pytest.approx(getattr(expected.labels, name))
    # 100 voxels reach everywhere
    assert (got.teacher_border.voxels, got.teacher_border.kl) == (got.teacher.voxels, got.teacher.kl)


def test_summary_is_plain_json(tmp_path: Path) -> None:
    flat = np.stack((np.full((1, 3, 3), 0.9), np.full((1, 3, 3), 0.1)))
    write_json(tmp_path / "calibration.json", summarise(case_calibration(flat, flat)))
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["teacher"]["voxels"] == 9
    assert found["teacher_border"] | {"bins": None} == {
        **{"voxels": 0, "brier": None, "nll": None, "target_entropy": None, "kl": None, "ece": None, "bins": None}
    }
    assert found["labels"] is None


def test_refusals() -> None:
    p = np.full((2, 2, 3, 3), 0.5)
    for student, label, match in (
        (p[:, :1], None, "do not fit"),
        (p, np.zeros((3, 3), int), "do not fit"),
        (p * 5, None, "softmax, not logits"),
        (p * 0.8, None, "sum to 1"),
        (np.full_like(p, np.nan), None, "not probabilities"),
        (np.stack((p[0] - 1, p[1] + 1)), None, "not probabilities"),
    ):
        with pytest.raises(MismatchError, match=match):
            case_calibration(student, p, label)
    with pytest.raises(SpecError, match="border: got -1"):
        case_calibration(p, p, border_mm=-1)
    with pytest.raises(MismatchError, match="1 regions for 2 channels"):
        case_calibration(p, p, regions=((1,),))
