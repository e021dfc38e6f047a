"""Normalisation, cropping, sliding window and labelling, each alone against nnU-Net's code."""

from typing import Any

import numpy as np
import pytest

from fastnnunet.errors import BackendError, ImageError, SpecError
from fastnnunet.geometry.resample import parse_resample_spec
from fastnnunet.runtime.logits import LabelRule, label_rule, plan_logits, postprocess
from fastnnunet.runtime.normalize import SCHEMES, check_normalization
from fastnnunet.runtime.preprocess import Preprocessed, nonzero_bbox, preprocess
from fastnnunet.runtime.sliding_window import SlidingWindow
from fastnnunet.specs.bundle import BundleSpec
from tests.bundles import DEFAULT_RESAMPLING, smooth_noise
from tests.one_piece import argmax_heads, sliding_window_logits

INTENSITY = {"mean": 55.5, "std": 20.25, "percentile_00_5": 10.0, "percentile_99_5": 98.5}
DATA = parse_resample_spec(DEFAULT_RESAMPLING["data"], "data")
LOGITS = parse_resample_spec(DEFAULT_RESAMPLING["probabilities"], "logits")


def _spec(**changes: Any) -> BundleSpec:
    values: dict[str, Any] = {
        "name": "x",
        "configuration": "3d",
        "channel_names": ("MRI",),
        "labels": {"background": 0, "a": 1, "b": 2},
        "num_heads": 3,
        "file_ending": ".nii.gz",
        "reader_writer": "SimpleITKIO",
        "transpose_forward": (0, 1, 2),
        "transpose_backward": (0, 1, 2),
        "spacing_mm": (1.0, 1.0, 1.0),
        "patch_size": (8, 8, 8),
        "normalization_schemes": ("ZScoreNormalization",),
        "use_mask_for_norm": (False,),
        "intensity_properties": {},
        "resampling": DEFAULT_RESAMPLING,
        "architecture": {},
        "plans": {},
        "dataset_json": {},
        "provenance": {},
        "files": {},
    }
    return BundleSpec(**{**values, **changes})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_normalisation_is_bit_identical(scheme: str, use_mask: bool, constant: bool) -> None:
    from nnunetv2.preprocessing.normalization import default_normalization_schemes

    image = np.full((9, 10, 11), 7.0, np.float32) if constant else smooth_noise((9, 10, 11), 0, border=2).clip(0, 255)
    mask = image != 0
    theirs = getattr(default_normalization_schemes, scheme)(use_mask_for_norm=use_mask, intensityproperties=INTENSITY)
    expected = theirs.run(image.copy(), np.where(mask, 0, -1))
    SCHEMES[scheme](image, mask if use_mask and scheme == "ZScoreNormalization" else None, INTENSITY)
    np.testing.assert_array_equal(image, expected)


def test_colours_out_of_range_are_refused() -> None:
    with pytest.raises(ImageError, match="0 to 255"):
        SCHEMES["RGBTo01Normalization"](np.full((1, 2, 2), 300, np.float32), None, {})


def test_normalisation_of_the_bundle_is_checked() -> None:
    with pytest.raises(SpecError, match="'MyNormalization' of channel 1"):
        check_normalization(("NoNormalization", "MyNormalization"), {})
    with pytest.raises(SpecError, match="percentile_00_5"):
        check_normalization(("CTNormalization",), {"0": {"mean": 1.0, "std": 1.0, "percentile_99_5": 1.0}})


@pytest.mark.parametrize("kind", ["blob", "full", "empty", "one_voxel", "two_channels"])
def test_bounding_box_equals_nnunet(kind: str) -> None:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    image = np.zeros((2 if kind == "two_channels" else 1, 9, 10, 11), np.float32)
    if kind == "full":
        image += 1
    elif kind == "one_voxel":
        image[0, 3, 0, 10] = -1
    elif kind != "empty":
        image[0, 2:5, 3:9, 1:3] = 1
        image[-1, 4:7, 3:4, 5:8] = 2
    _, _, expected = crop_to_nonzero(image)
    assert [list(limits) for limits in nonzero_bbox(image)] == expected


@pytest.mark.parametrize("use_mask", [False, True])
@pytest.mark.parametrize("transpose", [((0, 1, 2), (0, 1, 2)), ((2, 0, 1), (1, 2, 0))])
def test_preprocessing_equals_nnunet(use_mask: bool, transpose: Any) -> None:
    """Holes, cropping, transposition and anisotropic resampling at once."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from tests.bundles import Toy, _dataset_json, _plans

    toy = Toy(channels=2, use_mask=use_mask, transpose=transpose, spacing=(1.0, 0.9, 1.2))
    image = np.stack([smooth_noise((17, 19, 23), seed, border=3) for seed in (0, 1)])
    image[:, 6:9, 7:10, 8:11] = 0  # a hole, filled before the mask is used
    image[:, 3:6, 9:11, 9:11] = 0  # open to the outside: no hole
    plans = PlansManager(_plans(toy))
    expected, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image, None, {"spacing": [3.5, 1.0, 1.1]}, plans, plans.get_configuration("3d_toy"), _dataset_json(toy)
    )
    spec = _spec(
        channel_names=("a", "b"),
        transpose_forward=transpose[0],
        transpose_backward=transpose[1],
        spacing_mm=toy.spacing,
        normalization_schemes=("ZScoreNormalization",) * 2,
        use_mask_for_norm=(use_mask,) * 2,
    )
    got = preprocess(image.copy(), {"spacing": [3.5, 1.0, 1.1]}, spec, DATA)
    np.testing.assert_allclose(got.data_CZYX, expected, rtol=1e-6, atol=1e-6)
    assert got.properties == properties


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (4, 5, 6), (0, 4, 5, 6)])
def test_wrong_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"the model needs 1 channel\(s\) \(MRI\)"):
        preprocess(np.ones(shape, np.float32), {"spacing": [1.0, 1.0, 1.0]}, _spec(), DATA)


def _nnunet_window(data: np.ndarray, network: Any, patch: tuple[int, ...], heads: int, mirror: Any) -> np.ndarray:
    """nnU-Net's own sliding window around an arbitrary function."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(network(x.numpy()))

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.network = Network()
    predictor.allowed_mirroring_axes = mirror
    predictor.configuration_manager = type("C", (), {"patch_size": list(patch)})()
    predictor.label_manager = type("L", (), {"num_segmentation_heads": heads})()
    return predictor.predict_sliding_window_return_logits(torch.from_numpy(data)).float().numpy()


def _fake_network(batch_NCX: np.ndarray) -> np.ndarray:
    """Not symmetric, not linear, different heads: mistakes in flips, order or batching show."""
    ramp = np.linspace(-3, 3, batch_NCX.shape[-1], dtype=np.float32)
    heads = [np.sin(3 * batch_NCX[:, 0]) * 7 + ramp, batch_NCX[:, 0] * 5 - ramp**2, np.cumsum(batch_NCX[:, 0], 1)]
    return np.ascontiguousarray(np.stack(heads, 1).astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "patch", "mirror"),
    [
        ((8, 8, 8), (8, 8, 8), None),
        ((5, 7, 6), (8, 8, 8), None),
        ((13, 8, 21), (8, 8, 8), None),
        ((13, 6, 21), (8, 8, 8), (0, 1, 2)),
        ((4, 9, 17), (8, 8), None),
        ((4, 5, 6), (8, 8), (0, 1)),
        ((1, 5, 6), (8, 8), (1,)),
        ((40, 9, 17), (8, 8), None),
    ],
)
def test_sliding_window_is_bit_identical(shape: tuple[int, ...], patch: tuple[int, ...], mirror: Any) -> None:
    data = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    expected = _nnunet_window(data, _fake_network, patch, 3, mirror)
    seen: list[tuple[int, int]] = []
    window = SlidingWindow(num_heads=3, patch_size=patch, step_size=0.5, mirror_axes=mirror)
    got = sliding_window_logits(data, _fake_network, window, progress=lambda e: seen.append((e.done, e.total)))
    np.testing.assert_array_equal(got, expected)
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_logits_beyond_float16_are_an_error() -> None:
    window = SlidingWindow(num_heads=1, patch_size=(4, 4, 4), step_size=0.5, mirror_axes=None)
    for value, shape in ((7000.0, (4, 4, 4)), (7000.0, (4, 4, 9)), (np.nan, (4, 4, 9))):
        data = np.zeros((1, *shape), np.float32)
        with pytest.raises(BackendError, match="range of float16"):
            sliding_window_logits(data, lambda batch, v=value: np.full_like(batch, v), window)


def test_a_network_of_another_shape_is_an_error() -> None:
    data = np.zeros((1, 4, 4, 4), np.float32)
    window = SlidingWindow(num_heads=2, patch_size=(4, 4, 4), step_size=0.5, mirror_axes=None)
    with pytest.raises(BackendError, match=r"shape \(1, 1, 4, 4, 4\), expected \(1, 2, 4, 4, 4\)"):
        sliding_window_logits(data, lambda b: b, window)


@pytest.mark.parametrize("heads", [1, 2, 3, 7])
def test_argmax_takes_the_lowest_of_equals(heads: int) -> None:
    values = np.random.default_rng(0).integers(0, 3, (heads, 500)).astype(np.float32)
    out = np.full(500, 99, np.uint8)
    argmax_heads(values, out)
    np.testing.assert_array_equal(out, values.argmax(0))


@pytest.mark.parametrize("return_probabilities", [False, True])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("slab_values", [1, 500, 2**20])
def test_postprocessing_equals_nnunet(
    return_probabilities: bool, regions: bool, slab_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from tests.bundles import Toy, _dataset_json, _plans

    monkeypatch.setattr("fastnnunet.runtime.logits._SLAB_VALUES", slab_values)
    labels = {"background": 0, "ab": [1, 2], "b": [2, 3]} if regions else {"background": 0, "a": 1}
    order = [2, 1] if regions else None
    toy = Toy(labels=labels, regions_class_order=order, transpose=((1, 2, 0), (2, 0, 1)))
    plans = PlansManager(_plans(toy))
    manager = plans.get_label_manager(_dataset_json(toy))
    half = (np.random.default_rng(0).standard_normal((2, 8, 9, 7)) * 4).astype(np.float16)
    # ties, and probabilities of exactly one half
    half[:, 2:5] = np.round(half[:, 2:5])
    spacing_image = [1.25, 0.9, 1.1]
    bbox = ((1, 12), (0, 8), (2, 9))
    properties = {
        "spacing": spacing_image,
        "shape_before_cropping": (13, 8, 10),
        "bbox_used_for_cropping": [list(b) for b in bbox],
        "shape_after_cropping_and_before_resampling": (11, 8, 7),
    }
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(
        half.copy(), plans, plans.get_configuration("3d_toy"), manager, properties, return_probabilities, 1
    )
    spec = _spec(
        labels=labels,
        regions_class_order=tuple(order) if order else None,
        num_heads=2,
        transpose_forward=toy.transpose[0],
        transpose_backward=toy.transpose[1],
    )
    case = Preprocessed(
        data_CZYX=np.empty((1, 8, 9, 7), np.float32),
        spacing_mm=(0.9, 1.1, 1.25),
        target_spacing_mm=(1.0, 1.0, 1.0),
        shape_before_cropping=(13, 8, 10),
        bbox=bbox,
        properties={},
    )
    logits = half.astype(np.float32)
    segmentation, probabilities = postprocess(
        logits, case, spec, plan_logits(LOGITS, case), label_rule(spec), return_probabilities
    )
    np.testing.assert_array_equal(logits, half)  # left as it was
    if return_probabilities:
        assert probabilities is not None
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, expected[1], atol=3e-4)  # one float16 step of a logit
        expected = expected[0]
    assert segmentation.dtype == expected.dtype
    assert segmentation.shape == expected.shape
    assert (segmentation == expected).mean() > 0.999


def test_labels_that_do_not_fit_the_heads() -> None:
    with pytest.raises(SpecError, match="4 heads but 3 labels"):
        label_rule(_spec(num_heads=4))
    with pytest.raises(SpecError, match="regions_class_order"):
        label_rule(_spec(labels={"background": 0, "ab": [1, 2], "b": 2}, num_heads=2))


def test_label_types() -> None:
    def rule(last: int, **more: Any) -> LabelRule:
        labels = {"background": 0, **{str(i): i for i in range(1, last + 1)}}
        return label_rule(_spec(labels=labels, num_heads=last + 1, **more))

    assert rule(254).dtype is np.uint8
    assert rule(255).dtype is np.uint16
    regions = {"background": 0, "ab": [1, 300], "b": [300]}
    assert label_rule(_spec(labels=regions, num_heads=2, regions_class_order=(1, 300))).dtype is np.uint16
    # the ignore label has no head
    assert label_rule(_spec(labels={"background": 0, "a": 1, "b": 2, "ignore": 3})).num_heads == 3
