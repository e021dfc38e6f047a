"""Locate, then look: what is predicted in a locator's box against PyTorch and nnU-Net everywhere, and on the crop."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.api.fast_predictor import FastPredictor
from fastnnunet.errors import CorruptError, NewerFormatError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.geometry.blocks import block_any, block_means
from fastnnunet.geometry.tiles import Axis
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.runtime import loaded
from fastnnunet.runtime.locate import CERTAIN, Box, with_margin
from fastnnunet.runtime.predict import Predictor
from fastnnunet.runtime.sliding_window import SlidingWindow
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.locator import LOCATOR_FILE, Locator
from tests.bundles import DEFAULT_RESAMPLING, NO_RESAMPLING, PATCH_3D, Toy, _architecture, make_toy_model, write_image
from tests.one_pass_models import NORM, batchnorm_plans, whole, write_batchnorm_model
from tests.teachers import nnunet_predictor, save_checkpoint
from tests.test_cli import run

PROPERTIES = {"spacing": [1.0, 1.0, 1.0]}
FACTOR, MULTIPLE, REACH = (2, 3, 2), 4, 10  # REACH: receptive field of the toys, see tests/test_one_pass_export.py
BRIGHT = 1.5  # of the mean of a block, which the locator of these tests sees
SHAPE = (60, 90, 72)


def seeing_network(architecture: dict[str, Any]) -> Any:
    """A U-Net whose second head is positive where its input exceeds BRIGHT, by its skip at full resolution alone."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    network = get_network_from_plans(*architecture.values(), 1, 2, deep_supervision=False).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.weight.fill_(1)
        first, last = network.encoder.stages[0], network.decoder.stages[-1]
        (conv,) = [m for m in first.modules() if isinstance(m, torch.nn.Conv3d)][:1]
        conv.weight[0, 0, 1, 1, 1] = 1
        (conv,) = [m for m in last.modules() if isinstance(m, torch.nn.Conv3d)][:1]
        conv.weight[0, conv.in_channels // 2, 1, 1, 1] = 1  # the skip comes after what is upsampled
        head = network.decoder.seg_layers[-1]
        head.weight[1, 0] = 10
        head.bias[1] = -10 * BRIGHT
    return network


def give_locator(bundle: Path, margin_mm: float) -> BundleSpec:
    """Put the locator of these tests into a bundle."""
    architecture = _architecture(3)
    architecture["arch_kwargs"]["norm_op"] = NORM.format(dims=3)
    model = to_onnx(seeing_network(architecture), 1, (12, 12, 12))
    (bundle / LOCATOR_FILE).write_bytes(model.SerializeToString())
    spec = load_bundle_spec(bundle)
    locator = Locator(
        model_file=LOCATOR_FILE,
        factor=FACTOR,
        patch_size=(12, 12, 12),
        architecture=architecture,
        threshold=0.5,
        margin_mm=margin_mm,
    )
    files = {**spec.files, LOCATOR_FILE: sha256_of_file(bundle / LOCATOR_FILE)}
    write_bundle_json(replace(spec, format_version=4, locator=locator, files=files), bundle / "bundle.json")
    return load_bundle_spec(bundle)


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Bundle with a locator, nnU-Net model folder, network."""
    where = tmp_path_factory.mktemp("locate")
    folder, (network,) = write_batchnorm_model(where / "model", Toy(resampling=NO_RESAMPLING))
    export_bundle(folder, 0, where / "bundle", needs_real_patches=False)
    give_locator(where / "bundle", margin_mm=3)
    return where / "bundle", folder, network


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose network labels what is bright, with a locator."""
    where, toy = tmp_path_factory.mktemp("seeing"), Toy(labels={"background": 0, "a": 1}, resampling=NO_RESAMPLING)
    folder, _ = write_batchnorm_model(where / "model", toy)
    plans = batchnorm_plans(toy)
    network = seeing_network(plans["configurations"]["3d_toy"]["architecture"])
    save_checkpoint(folder / "fold_0" / "checkpoint_final.pth", network.state_dict(), "3d_toy", None)
    export_bundle(folder, 0, where / "bundle", needs_real_patches=False)
    give_locator(where / "bundle", margin_mm=3)
    return where / "bundle"


@pytest.fixture
def bundle(one_pass: tuple[Path, Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_pass[0], tmp_path / "bundle"))


def image_with_target(
    begin: tuple[int, ...] = (20, 33, 30), end: tuple[int, ...] = (34, 45, 42), noise: float = 0.1
) -> np.ndarray:
    """Noise (1, Z, Y, X), and a bright box; that of the default consists of whole blocks."""
    image = np.random.default_rng(0).normal(0, noise, (1, *SHAPE)).astype(np.float32)
    image[(0, *(slice(b, e) for b, e in zip(begin, end, strict=True)))] += 4
    return image


def inside(begin: tuple[int, ...], end: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(b, e) for b, e in zip(begin, end, strict=True))


class TestBlocks:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        shape=st.tuples(*[st.integers(1, 9)] * 3), factor=st.tuples(*[st.integers(1, 5)] * 3), seed=st.integers(0, 99)
    )
    def test_by_hand(self, shape: tuple[int, ...], factor: tuple[int, ...], seed: int) -> None:
        image = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
        means, found = block_means(image, factor), block_any(image[0] > 1, factor)
        assert means.dtype == np.float32
        assert found.shape == means.shape[1:]
        for place in np.ndindex(found.shape):
            block = tuple(slice(i * f, (i + 1) * f) for i, f in zip(place, factor, strict=True))
            expected = image[(slice(None), *block)].mean(axis=(1, 2, 3), dtype=np.float64)
            np.testing.assert_allclose(means[(slice(None), *place)], expected, atol=1e-6)
            assert found[place] == (image[0] > 1)[block].any()


class TestCrop:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        size=st.integers(1, 300),
        multiple=st.sampled_from([1, 2, 8, 32]),
        patch=st.integers(1, 4),
        shifts=st.integers(1, 3),
        ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    )
    def test_holds_the_box_and_lies_as_the_whole_against_the_strides(
        self, size: int, multiple: int, patch: int, shifts: int, ends: tuple[float, float]
    ) -> None:
        of_size = partial(Axis, least=patch * multiple, multiple=multiple, halo=0, shifts=shifts)
        axis = of_size(size=size)
        lower, upper = sorted(round(share * size) for share in ends)
        begin, end = min(lower, size - 1), max(upper, min(lower, size - 1) + 1)
        origin, length = axis.crop(begin, end)
        assert origin <= begin < end <= origin + length
        assert length % multiple == 0
        assert axis.least <= length < max(axis.least + 1, end - begin + 2 * multiple)
        part = of_size(size=length)
        for in_part, in_whole in zip(part.before, axis.before, strict=True):
            assert (in_part - (origin + in_whole)) % multiple == 0
        if shifts == 1:
            assert origin >= -axis.before[0]
            assert origin + length <= axis.frame - axis.before[0]

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(shape=st.tuples(*[st.integers(1, 60)] * 3), seed=st.integers(0, 999))
    def test_of_the_window_holds_the_box_and_a_patch(self, shape: tuple[int, ...], seed: int) -> None:
        way = SlidingWindow(num_heads=2, patch_size=(16, 20, 24), step_size=0.5, mirror_axes=None)
        rng = np.random.default_rng(seed)
        begin = [int(rng.integers(n)) for n in shape]
        end = [int(rng.integers(b + 1, n + 1)) for b, n in zip(begin, shape, strict=True)]
        for (o, n), b, e, size, p in zip(way.crop(shape, begin, end), begin, end, shape, way.patch_size, strict=True):
            assert 0 <= o <= b < e <= o + n <= size
            assert n == max(e - b, min(p, size))

    def test_margin_in_mm(self) -> None:
        box = with_margin(Box((5, 5, 5), (8, 8, 8)), 3.0, (1.0, 2.0, 10.0), (10, 10, 10))
        assert box == Box((2, 3, 4), (10, 10, 9))
        # 0.3 / 0.1 is not 3
        assert with_margin(Box((5,) * 3, (8,) * 3), 0.3, (0.1,) * 3, (20,) * 3) == Box((2,) * 3, (11,) * 3)


class TestOnePass:
    @pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
    def test_is_everywhere_inside_and_background_outside(self, one_pass: tuple[Path, Path, Any], backend: str) -> None:
        """PyTorch on the whole image is the oracle, up to the receptive field at the part's border."""
        pytest.importorskip(backend)
        image = image_with_target()
        predictor = Predictor.load(one_pass[0], backend, threads=1, mirroring=False)
        assert predictor.box_of(image) == Box((20, 33, 30), (34, 45, 42))
        part = predictor.part_of(image)
        assert part is not None
        begin = tuple(max(0, o) for o in part.origin)
        end = tuple(min(n, o + s) for n, o, s in zip(SHAPE, part.origin, part.size, strict=True))
        for b, e, lower, upper in zip(begin, end, (17, 30, 27), (37, 48, 45), strict=True):  # with the margin
            assert lower - MULTIPLE < b <= lower < upper <= e < upper + 2 * MULTIPLE
        got, expected = predictor.logits(image).astype(np.float32), whole(one_pass[2], image, PATCH_3D, MULTIPLE)
        core = inside(tuple(b + REACH for b in begin), tuple(e - REACH for e in end))
        assert got[(0, *core)].size > 0
        size = np.abs(expected).max()
        np.testing.assert_allclose(got[:, *core], expected[:, *core], atol=2e-3 * size)
        outside = np.ones(SHAPE, bool)
        outside[inside(begin, end)] = False
        assert (got[0][outside] == 0).all()
        assert (got[1:, outside] == -CERTAIN).all()
        everywhere = predictor.with_settings(step_size=None, mirroring=False, use_gaussian=True, locate=False)
        np.testing.assert_allclose(everywhere.logits(image).astype(np.float32), expected, atol=2e-3 * size)

    def test_at_the_corner_it_is_everywhere_up_to_the_images_border(self, one_pass: tuple[Path, Path, Any]) -> None:
        """The zeros around the image are those of the whole image too."""
        image = image_with_target((0, 0, 60), (12, 12, 72))
        predictor = Predictor.load(one_pass[0], "onnxruntime", threads=1, mirroring=False)
        part = predictor.part_of(image)
        assert part is not None
        ends = [o + s - REACH for o, s in zip(part.origin, part.size, strict=True)]
        core = (slice(0, ends[0]), slice(0, ends[1]), slice(part.origin[2] + REACH, SHAPE[2]))
        got, expected = predictor.logits(image).astype(np.float32), whole(one_pass[2], image, PATCH_3D, MULTIPLE)
        np.testing.assert_allclose(got[:, *core], expected[:, *core], atol=2e-3 * np.abs(expected).max())

    @pytest.mark.parametrize("options", [{}, {"passes": 2}, {"step_size": 0.5}])
    def test_small_targets_have_the_labels_of_everywhere(self, seeing: Path, options: dict[str, Any]) -> None:
        """Of a network that sees what is bright and nothing else."""
        image = 60 + image_with_target((22, 36, 32), (33, 43, 41), noise=0.01)
        predictor = Predictor.load(seeing, "onnxruntime", threads=1, mirroring=False, **options)
        everywhere = Predictor.load(seeing, "onnxruntime", threads=1, mirroring=False, locate=False, **options)
        assert predictor.part_of(predictor.preprocess_array(image, PROPERTIES).data_CZYX) is not None
        expected = np.zeros(SHAPE, np.uint8)
        expected[inside((22, 36, 32), (33, 43, 41))] = 1
        for model in (predictor, everywhere):
            np.testing.assert_array_equal(model.predict_array(image, PROPERTIES).segmentation_ZYX, expected)

    def test_where_nothing_is_seen_it_is_everywhere(self, one_pass: tuple[Path, Path, Any]) -> None:
        image = image_with_target() - 4
        predictor = Predictor.load(one_pass[0], "onnxruntime", threads=1, mirroring=False)
        assert predictor.box_of(image) is None
        everywhere = predictor.with_settings(step_size=None, mirroring=False, use_gaussian=True, locate=False)
        np.testing.assert_array_equal(predictor.logits(image), everywhere.logits(image))

    def test_a_box_as_large_as_the_image(self, one_pass: tuple[Path, Path, Any]) -> None:
        image = image_with_target((0, 0, 0), SHAPE)
        predictor = Predictor.load(one_pass[0], "onnxruntime", threads=1, mirroring=False)
        assert predictor.part_of(image) is None

    def test_labels_are_streamed(self, one_pass: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """In chunks, those of tiles within the box and others around it, they are the labels of all logits."""
        image = 60 + 40 * image_with_target((8, 24, 16), (48, 72, 60))
        spec = load_bundle_spec(one_pass[0])
        assert spec.one_pass is not None
        limit = int(32**3 * spec.one_pass.bytes_per_voxel * 1.25 + 6 * 32 * 32 * 60)
        kept = Predictor.load(one_pass[0], "onnxruntime", threads=1, mirroring=False, memory_limit=limit)
        kept._resample_logits = loaded.parse_resample_spec(DEFAULT_RESAMPLING["probabilities"], "logits")
        case = replace(
            kept.preprocess_array(image, PROPERTIES),
            shape_before_cropping=(81, 70, 72),
            bbox=((0, 81), (0, 70), (0, 72)),
        )
        part = kept.part_of(case.data_CZYX)
        assert part is not None
        assert min(part.way.tiling(part.size).grid) > 1
        expected, _ = kept.postprocess(kept.logits(case.data_CZYX), case)
        monkeypatch.setattr(loaded, "STREAM_BYTES", 0)
        inferred = kept.infer(case, loaded.StageTimes())
        assert isinstance(inferred, loaded.Labelled)
        np.testing.assert_array_equal(kept.postprocess(inferred, case)[0], expected)
        assert (expected != 0).any()

    def test_folds_are_averaged_in_the_same_box(self, one_pass: tuple[Path, Path, Any], tmp_path: Path) -> None:
        folder, networks = write_batchnorm_model(tmp_path / "model", Toy(resampling=NO_RESAMPLING), folds=2)
        export_bundle(folder, (0, 1), tmp_path / "bundle", needs_real_patches=False)
        give_locator(tmp_path / "bundle", margin_mm=3)
        image = image_with_target()
        predictor = Predictor.load(tmp_path / "bundle", "onnxruntime", threads=1)
        part = predictor.part_of(image)
        assert part is not None
        expected = np.mean([whole(network, image, PATCH_3D, MULTIPLE) for network in networks], axis=0)
        core = tuple(slice(max(0, o) + REACH, o + s - REACH) for o, s in zip(part.origin, part.size, strict=True))
        got = predictor.logits(image).astype(np.float32)
        np.testing.assert_allclose(got[:, *core], expected[:, *core], atol=4e-3 * np.abs(expected).max())


class TestWindow:
    def test_is_nnunets_on_the_crop(self, tmp_path: Path) -> None:
        """Instance norm: nnU-Net's own predictor on the crop is the oracle, pasted by hand."""
        toy = make_toy_model(Toy(resampling=NO_RESAMPLING, mirror_axes=(0, 2)), tmp_path)
        give_locator(toy.bundle, margin_mm=2)
        image = image_with_target()
        predictor = Predictor.load(toy.bundle, "onnxruntime", threads=1)
        assert predictor.describe()["way"] == "window"
        part = predictor.part_of(image)
        assert part is not None
        assert (part.origin, part.size) == ((18, 29, 24), (18, 20, 24))  # a patch is 16 x 20 x 24
        crop = inside(part.origin, tuple(o + s for o, s in zip(part.origin, part.size, strict=True)))
        theirs = nnunet_predictor(toy.folder, (0,)).predict_logits_from_preprocessed_data(
            torch.from_numpy(np.ascontiguousarray(image[:, *crop]))
        )
        expected = np.full((3, *SHAPE), -CERTAIN, np.float32)
        expected[0] = 0
        expected[:, *crop] = theirs.numpy()
        got = predictor.logits(image).astype(np.float32)
        np.testing.assert_allclose(got, expected, atol=2e-3 * np.abs(theirs.numpy()).max())

    def test_regions(self, tmp_path: Path) -> None:
        """Outside no region is there, and probabilities say so."""
        labels = {"background": 0, "whole": [1, 2], "core": 2}
        toy = make_toy_model(Toy(resampling=NO_RESAMPLING, labels=labels, regions_class_order=[1, 2]), tmp_path)
        give_locator(toy.bundle, margin_mm=2)
        image = 60 + 40 * image_with_target()
        predictor = Predictor.load(toy.bundle, "onnxruntime", threads=1)
        found = predictor.predict_array(image, PROPERTIES, return_probabilities=True)
        part = predictor.part_of(predictor.preprocess_array(image, PROPERTIES).data_CZYX)
        assert part is not None
        assert found.probabilities_HZYX is not None
        outside = np.ones(SHAPE, bool)
        outside[inside(part.origin, tuple(o + s for o, s in zip(part.origin, part.size, strict=True)))] = False
        assert (found.segmentation_ZYX[outside] == 0).all()
        assert (found.probabilities_HZYX[:, outside] < 1e-6).all()
        assert (found.segmentation_ZYX[~outside] != 0).any()


class TestWays:
    def test_the_command(self, bundle: Path, tmp_path: Path) -> None:
        image = 60 + 40 * image_with_target()[0]
        file = write_image(image, tmp_path / "in" / "case_0000.nii.gz")
        words = ("predict", "-i", file, "-m", bundle, "--backend", "onnxruntime", "--threads", "1")
        labels = {}
        for name, options in (("located", ()), ("everywhere", ("--no-locate",)), ("window", ("-step_size", "0.5"))):
            done = run(*words, "-o", tmp_path / name / "out.nii.gz", "--profile_json", *options)
            assert done.returncode == 0, done.stderr
            assert ("in the locator's box" in done.stdout) == (name != "everywhere")
            record = json.loads((tmp_path / name / "fastnnunet_profile.json").read_text())
            assert (record["locate"], record["way"]) == (
                name != "everywhere",
                "window" if name == "window" else "one pass",
            )
            labels[name] = read(tmp_path / name / "out.nii.gz")
        predictor = Predictor.load(bundle, "onnxruntime", threads=1)
        part = predictor.part_of(predictor.preprocess_array(image[None], PROPERTIES).data_CZYX)
        assert part is not None
        outside = np.ones(SHAPE, bool)
        outside[inside(part.origin, tuple(o + s for o, s in zip(part.origin, part.size, strict=True)))] = False
        assert (labels["located"][outside] == 0).all()
        assert (labels["everywhere"][outside] != 0).any()
        assert (labels["window"] != labels["located"]).any()

    def test_fast_predictor(self, bundle: Path) -> None:
        image = 60 + 40 * image_with_target()
        fast = FastPredictor(tile_step_size=None, use_mirroring=False, backend="onnxruntime", threads=1)
        fast.initialize_from_trained_model_folder(bundle)
        for locate in (True, False):
            fast.locate = locate
            expected = Predictor.load(bundle, "onnxruntime", threads=1, mirroring=False, locate=locate)
            np.testing.assert_array_equal(
                fast.predict_single_npy_array(image, dict(PROPERTIES)),
                expected.predict_array(image, PROPERTIES).segmentation_ZYX,
            )

    def test_loaded_meanwhile(self, bundle: Path) -> None:
        image = 60 + 40 * image_with_target()
        waiting = Predictor.load(bundle, "onnxruntime", threads=1, wait=False)
        expected = Predictor.load(bundle, "onnxruntime", threads=1).predict_array(image, PROPERTIES)
        np.testing.assert_array_equal(
            waiting.predict_array(image, PROPERTIES).segmentation_ZYX, expected.segmentation_ZYX
        )


def read(file: Path) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


class TestBundles:
    def test_what_is_written(self, bundle: Path) -> None:
        raw = json.loads((bundle / "bundle.json").read_text())
        assert raw["format_version"] == 4
        assert set(raw["locator"]) == {
            *("model_file", "factor", "patch_size", "one_pass", "architecture", "threshold", "margin_mm")
        }
        assert raw["files"]["locator.onnx"] == sha256_of_file(bundle / "locator.onnx")
        spec = load_bundle_spec(bundle)
        write_bundle_json(replace(spec, locator=None, format_version=3), bundle / "bundle.json")
        assert "locator" not in json.loads((bundle / "bundle.json").read_text())  # which earlier versions do not know

    def test_newer_formats(self, bundle: Path) -> None:
        spec = load_bundle_spec(bundle)
        write_bundle_json(replace(spec, format_version=5), bundle / "bundle.json")
        with pytest.raises(NewerFormatError, match="format version 5, this fastnnunet reads up to 4"):
            load_bundle_spec(bundle)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"factor": (2, 3)}, "locator.factor: .*expected 3 whole numbers"),
            ({"factor": (0, 3, 2)}, "locator.factor"),
            ({"factor": (2, 3, 65)}, "locator.factor"),
            ({"threshold": 1.0}, "locator.threshold: got 1.0, expected a number between 0 and 1"),
            ({"margin_mm": -1.0}, "locator.margin_mm: got -1.0"),
            ({"patch_size": (12, 12)}, "locator.patch_size: .*expected 3 numbers"),
            ({"patch_size": (12, 12, 13)}, "locator.patch_size axis 2: got 13"),
            ({"architecture": {}}, "locator.network_class_name"),
            ({"model_file": "model.onnx"}, "locator.model_file: .*no model file"),
            ({"model_file": "parity.npz"}, "locator.model_file: .*expected an ONNX file"),
            ({"model_file": "../locator.onnx"}, "locator.model_file"),
        ],
    )
    def test_values_that_cannot_be(self, bundle: Path, changes: dict[str, Any], message: str) -> None:
        spec = load_bundle_spec(bundle)
        assert spec.locator is not None
        write_bundle_json(replace(spec, locator=replace(spec.locator, **changes)), bundle / "bundle.json")
        with pytest.raises(CorruptError, match=message):
            load_bundle_spec(bundle)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format_version": 3}, "locator: bundles of this format version have none"),
            ({"previous_labels": (1,)}, "locator: a cascade stage has none"),
            ({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}, "locator: a model with an ignore label"),
        ],
    )
    def test_bundles_that_have_none(self, bundle: Path, changes: dict[str, Any], message: str) -> None:
        write_bundle_json(replace(load_bundle_spec(bundle), **changes), bundle / "bundle.json")
        with pytest.raises(CorruptError, match=message):
            load_bundle_spec(bundle)

    def test_a_changed_file(self, bundle: Path) -> None:
        with (bundle / "locator.onnx").open("ab") as f:
            f.write(b"\0")
        with pytest.raises(CorruptError, match=r"locator.onnx was changed after export"):
            load_bundle_spec(bundle)

    def test_a_network_of_other_shapes(self, bundle: Path) -> None:
        spec = load_bundle_spec(bundle)
        shutil.copy(bundle / "model.onnx", bundle / "locator.onnx")
        files = {**spec.files, "locator.onnx": sha256_of_file(bundle / "locator.onnx")}
        write_bundle_json(replace(spec, files=files), bundle / "bundle.json")
        with pytest.raises(CorruptError, match=r"locator.onnx is not the model .*\n.*\n.*\(\*, 2, 12, 12, 12\)"):
            load_bundle_spec(bundle)
