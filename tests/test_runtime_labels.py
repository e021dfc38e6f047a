"""Tidying label maps against nnU-Net's postprocessing, SciPy and hand-made maps; files of steps are read, never run."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from fastnnunet.errors import CorruptError, NotFoundError, SpecError
from fastnnunet.images.tidy.cleanup import Cleanup, KeepLargest, clean
from fastnnunet.images.tidy.rules import cleanup_from_words, read_postprocessing

LABELS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "liver": 3, "ignore": 4}
PLAIN = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}
FULL = np.ones((3, 3, 3))


def _map(seed: int = 0, shape: tuple[int, ...] = (9, 14, 13), density: float = 0.35) -> np.ndarray:
    """Lumps of labels 1 to 3, of many sizes, with holes."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 0.7)
    labels = np.where(noise > np.quantile(noise, 1 - density), rng.integers(1, 4, shape), 0)
    return ndimage.median_filter(labels, 2).astype(np.uint8)


def _apply(labels: np.ndarray, cleanup: Cleanup, spacing: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    before = labels.copy()
    got = clean(labels, cleanup, spacing)
    np.testing.assert_array_equal(labels, before)
    assert got.dtype == labels.dtype
    return got


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("structure", [1, [1, 2, 3], (1, 2), [(1, 2), 3], 7], ids=str)
def test_keep_largest_as_nnunet(seed: int, structure: Any, tmp_path: Path) -> None:
    from nnunetv2.postprocessing.remove_connected_components import (
        apply_postprocessing,
        remove_all_but_largest_component_from_segmentation,
    )

    labels = _map(seed)
    steps = (
        [remove_all_but_largest_component_from_segmentation] * 2,
        [
            {"labels_or_regions": structure},
            {"labels_or_regions": 2, "background_label": 1},
        ],
    )
    (tmp_path / "postprocessing.pkl").write_bytes(pickle.dumps(steps))
    expected = apply_postprocessing(labels, *steps)
    got = _apply(labels, Cleanup(keep_largest=read_postprocessing(tmp_path / "postprocessing.pkl")))
    np.testing.assert_array_equal(got, expected)
    assert structure == 7 or (got != labels).any()


def test_components_of_equal_size_all_stay() -> None:
    labels = np.zeros((1, 3, 9), np.uint8)
    labels[0, 1, [1, 2, 4, 5, 7]] = 1
    expected = labels.copy()
    expected[0, 1, 7] = 0
    np.testing.assert_array_equal(_apply(labels, Cleanup(keep_largest=(KeepLargest((1,)),))), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("size", "unit", "voxels"), [(1, "voxels", 1), (6, "voxels", 6), (7.5, "mm3", 5), (7.6, "mm3", 6)]
)
def test_min_size_against_scipy(seed: int, size: float, unit: Any, voxels: int) -> None:
    labels = _map(seed)
    expected = labels.copy()
    for label in (1, 2, 3):
        components, count = ndimage.label(labels == label, FULL)
        for component in range(1, count + 1):
            if (components == component).sum() < voxels:
                expected[components == component] = 0
    got = _apply(labels, Cleanup(min_size=size, min_size_unit=unit), (3.0, 1.0, 0.5))
    np.testing.assert_array_equal(got, expected)
    assert voxels == 1 or (got != labels).any()


@pytest.mark.parametrize("seed", range(5))
def test_fill_holes_against_scipy(seed: int) -> None:
    labels = np.where(_map(seed, density=0.8) > 0, 2, 0).astype(np.uint8)
    expected = np.where(ndimage.binary_fill_holes(labels == 2), 2, 0)
    got = _apply(labels, Cleanup(fill_holes=(2,)))
    np.testing.assert_array_equal(got, expected)
    assert (got != labels).any()


def test_holes_go_to_the_innermost_label_and_leave_others_alone() -> None:
    labels = np.zeros((11, 11, 11), np.uint8)
    labels[1:10, 1:10, 1:10] = 3
    labels[2:9, 2:9, 2:9] = 0  # a gap between the shells
    labels[3:8, 3:8, 3:8] = 1
    labels[5, 5, 5] = 0
    labels[2, 2, 2] = 2
    expected = np.full_like(labels, 0)
    expected[1:10, 1:10, 1:10] = 3
    expected[3:8, 3:8, 3:8] = 1
    expected[2, 2, 2] = 2
    for order in ((1, 2, 3), (3, 2, 1)):
        np.testing.assert_array_equal(_apply(labels, Cleanup(fill_holes=order)), expected)
    expected[5, 5, 5] = 3
    np.testing.assert_array_equal(_apply(labels, Cleanup(fill_holes=(3,))), expected)


def test_a_picture_has_holes_too() -> None:
    labels = np.zeros((1, 6, 6), np.uint8)
    labels[0, 1:5, 1:5] = 1
    expected = labels.copy()
    labels[0, 2, 2] = 0
    labels[0, 1, 3] = expected[0, 1, 3] = 0  # open to the outside
    np.testing.assert_array_equal(_apply(labels, Cleanup(fill_holes=(1,))), expected)


def test_order_of_the_steps() -> None:
    """A shell whose inside is a smaller component: the component goes, and then the hole it left."""
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[1:8, 1:8, 1:8] = 1
    labels[2:7, 2:7, 2:7] = 0
    labels[4, 4, 4] = 1
    expected = np.zeros_like(labels)
    expected[1:8, 1:8, 1:8] = 1
    cleanup = Cleanup(keep_largest=(KeepLargest((1,)),), min_size=2, fill_holes=(1,))
    np.testing.assert_array_equal(_apply(labels, cleanup), expected)


def test_words() -> None:
    assert cleanup_from_words(PLAIN) is None
    got = cleanup_from_words(PLAIN, keep_largest=["all", "each", "spleen", "3", "liver+3"], min_size="20")
    assert got is not None
    assert [step.labels for step in got.keep_largest] == [(1, 2, 3), (1,), (2,), (3,), (2,), (3,), (1, 3)]
    assert (got.min_size, got.min_size_unit, got.fill_holes) == (20, "voxels", ())
    regions = cleanup_from_words(LABELS, keep_largest=["whole", "each"], fill_holes=["each"], min_size="1.5 mm3")
    assert regions is not None
    assert [step.labels for step in regions.keep_largest] == [(1, 2, 3), (1, 2, 3), (2, 3), (3,)]
    assert (regions.min_size, regions.min_size_unit, regions.fill_holes) == (1.5, "mm3", (1, 2, 3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"keep_largest": ["lung"]}, r"--keep-largest: 'lung' is no label .* liver \(1\), spleen \(2\)"),
        ({"keep_largest": ["0"]}, "'0' is no label"),
        ({"keep_largest": ["liver+9"]}, "'9' is no label"),
        ({"fill_holes": ["background"]}, "--fill-holes: 'background' is no label"),
        ({"min_size": "20ml"}, "--min-size: got '20ml'"),
        ({"min_size": "-3"}, "--min-size: got '-3'"),
        ({"min_size": "0"}, "--min-size: got '0'"),
    ],
)
def test_wrong_words(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        cleanup_from_words(PLAIN, **words)


def test_files_that_nnunet_determined(tmp_path: Path) -> None:
    from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

    kwargs = [{"labels_or_regions": [1, (2, 3)]}, {"labels_or_regions": (1, 2)}]
    functions = [remove_all_but_largest_component_from_segmentation] * 2
    expected = (KeepLargest((1, 2, 3)), KeepLargest((1, 2)))
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        (tmp_path / "p.pkl").write_bytes(pickle.dumps((functions, kwargs), protocol))
        assert read_postprocessing(tmp_path / "p.pkl") == expected
    (tmp_path / "p.json").write_text(
        json.dumps(
            {
                "postprocessing_fns": [f.__name__ for f in functions],
                "postprocessing_kwargs": [{"labels_or_regions": [1, [2, 3]]}, {"labels_or_regions": [1, 2]}],
                "input_folder": {},
            }
        )
    )
    assert read_postprocessing(tmp_path / "p.json") == expected
    (tmp_path / "none.pkl").write_bytes(pickle.dumps(([], [])))
    assert read_postprocessing(tmp_path / "none.pkl") == ()
    # a file that asks for nothing was asked for all the same
    assert cleanup_from_words(PLAIN, postprocessing_file=tmp_path / "none.pkl") == Cleanup()


class _Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_cannot_run_code(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "was_here"
    attacks = [_Attack(os.mkdir, str(trace)), _Attack(eval, f"__import__('os').mkdir({str(trace)!r})")]
    from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing

    attacks.append(_Attack(apply_postprocessing, None, [os.mkdir], [{}]))
    for attack in attacks:
        file = tmp_path / "p.pkl"
        file.write_bytes(pickle.dumps((attack, []), protocol))
        with pytest.raises(CorruptError, match=r"is not allowed.*\n.*nothing of it was run"):
            read_postprocessing(file)
        assert not trace.exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation

    with pytest.raises(NotFoundError, match=r"none\.pkl"):
        read_postprocessing(tmp_path / "none.pkl")
    whole = pickle.dumps(([remove_all_but_largest_component_from_segmentation], [{"labels_or_regions": 1}]))
    for content in (b"", b"hello", whole[:-5], pickle.dumps([1, 2, 3]), pickle.dumps(([1], []))):
        (tmp_path / "p.pkl").write_bytes(content)
        with pytest.raises(CorruptError, match="not a postprocessing file"):
            read_postprocessing(tmp_path / "p.pkl")
    (tmp_path / "p.json").write_text('{"postprocessing_fns": ["smooth"], "postprocessing_kwargs": [{}]}')
    with pytest.raises(SpecError, match="asks for smooth"):
        read_postprocessing(tmp_path / "p.json")
