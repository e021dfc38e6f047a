"""Bundles that are predicted in one pass: what their export proves, what engines make of them, what is refused."""

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fastnnunet.api.fast_predictor import FastPredictor
from fastnnunet.engines.registry import create_engine
from fastnnunet.engines.trt.build import builder_config
from fastnnunet.engines.trt.library import find_library
from fastnnunet.engines.trt.store import EngineKey, write_engine
from fastnnunet.errors import BackendError, CorruptError, ParityError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.export.one_pass import measure_halo, prove
from fastnnunet.export.receptive import bytes_per_voxel, receptive_reach, tile_dependence
from fastnnunet.export.tensorrt import engine_key, export_engines
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.runtime.ensemble import ensemble_logits
from fastnnunet.runtime.one_pass import OnePassTiles
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.one_pass import OnePass
from tests.bundles import NO_RESAMPLING, PATCH_3D, Toy, _network, make_toy_model, smooth_noise, write_image
from tests.fake_gpu import FakeTensorRT
from tests.one_pass_models import runner, whole, write_batchnorm_model
from tests.small_networks import residual_network
from tests.teachers import nnunet_predictor
from tests.test_cli import refused, run
from tests.test_trt_backend import cuda, rtx  # noqa: F401
from tests.test_trt_export import needs_rtx

RTX = "tensorrt_rtx"
PROPERTIES = {"spacing": [1.0, 1.0, 1.0]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Bundle, nnU-Net model folder, network."""
    where = tmp_path_factory.mktemp("one_pass")
    folder, (network,) = write_batchnorm_model(where / "model", Toy(resampling=NO_RESAMPLING, mirror_axes=(0, 2)))
    export_bundle(folder, 0, where / "bundle", needs_real_patches=False)
    return where / "bundle", folder, network


@pytest.fixture
def bundle(made: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(made[0], tmp_path / "bundle"))


@pytest.fixture(scope="module")
def residual() -> tuple[Any, onnx.ModelProto]:
    """Sums, strides of one axis alone, kernels of one and three: with batch norm."""
    network, shape = residual_network(norm_op=torch.nn.BatchNorm3d, norm_op_kwargs={})
    return network, to_onnx(network, shape[0], shape[1:], (1, 2, 2))


def looked_at(network: Any, channels: int, size: int, multiples: tuple[int, ...]) -> list[int]:
    """The oracle: how far from a voxel the furthest voxel lies that its logits have a gradient for, in PyTorch."""
    furthest = [0] * len(multiples)
    for phase in range(max(multiples)):
        image = torch.randn(1, channels, *[size] * len(multiples), requires_grad=True)
        voxel = tuple(size // 2 + phase % m for m in multiples)
        network(image)[(0, slice(None), *voxel)].sum().backward()
        seen = image.grad[0].abs().sum(0).nonzero()
        reach = (seen - torch.tensor(voxel)).abs().max(0).values
        furthest = [max(f, int(r)) for f, r in zip(furthest, reach, strict=True)]
    return furthest


class TestProof:
    def test_what_the_bundle_says(self, made: tuple[Path, Path, Any]) -> None:
        spec = load_bundle_spec(made[0])
        assert spec.format_version == 3
        assert spec.one_pass is not None
        assert list(spec.one_pass.halo) == looked_at(made[2], 1, 48, (4, 4, 4))
        assert (spec.one_pass.multiples, spec.one_pass.halo_is) == ((4, 4, 4), "exact")  # noise decides about no halo
        proof = spec.provenance["one_pass"]
        assert proof["cases"] == 0
        assert 0 <= proof["max_abs_difference"] < 1e-4 * proof["max_abs_logit"]

    def test_sums_and_strides_of_one_axis(self, residual: tuple[Any, onnx.ModelProto]) -> None:
        network, model = residual
        assert tile_dependence(model, 3) is None
        assert list(receptive_reach(model, (1, 2, 2))) == looked_at(network, 2, 32, (1, 2, 2))
        # a sum of 8 channels beside the skip connection, or their 16 channels before the last stage
        assert 4 * 16 <= bytes_per_voxel(model, 2, 3) <= 4 * 40

    def test_instance_norm(self) -> None:
        network, onnx_bytes = _network(3, 1, 3)
        model = onnx.load_model_from_string(onnx_bytes)
        assert "InstanceNormalization takes its statistics" in str(tile_dependence(model, 3))
        with pytest.raises(ParityError, match=r"the same voxel of two tiles .* differs by"):
            prove(one(network), smooth_noise(PATCH_3D, 0)[None], (10, 10, 10), (4, 4, 4))

    def test_a_field_that_is_too_small(self, made: tuple[Path, Path, Any]) -> None:
        """Numbers alone find it, whatever the graph says."""
        patch = smooth_noise(PATCH_3D, 0, mean=0, spread=1)[None]
        prove(one(made[2]), patch, (10, 10, 10), (4, 4, 4))
        with pytest.raises(ParityError, match="depends on where a tile ends"):
            prove(one(made[2]), patch, (10, 4, 10), (4, 4, 4))


class TestMeasuredHalo:
    def images(self, *shape: int) -> Iterator[np.ndarray]:
        return (smooth_noise(shape, seed, mean=0, spread=1)[None] for seed in range(2))

    def test_the_smallest_that_changes_no_label(self, made: tuple[Path, Path, Any]) -> None:
        """A network whose far surroundings hardly count: the deepest stage adds a thousandth."""
        network = weakened(made[2], 1e-4)
        halo, measured = measure_halo(one(network), (10, 10, 10), (4, 4, 4), self.images(40, 44, 40), has_regions=False)
        assert (measured.cases, halo) == (2, (4, 4, 4))
        assert measured.voxels > 2 * 40**3 / 4
        # the same labels as the whole, from tiles with that halo
        rules = OnePass(halo=halo, multiples=(4, 4, 4), halo_is="measured", bytes_per_voxel=100)
        way = OnePassTiles(num_heads=3, patch_size=(4, 4, 4), rules=rules, memory_limit=16**3 * 100 + 6 * 16 * 16 * 40)
        image = next(self.images(40, 44, 40))
        _, ((_, logits),) = way.begin(image, runner(network), whole=True)
        expected = whole(network, image, (4, 4, 4), 4)
        assert (logits.argmax(0) == expected.astype(np.float16).argmax(0)).mean() > 0.9999

    def test_what_counts_is_in_the_halo(self, made: tuple[Path, Path, Any]) -> None:
        """Where the deepest stage counts most, 4 voxels change labels, and 8 of the 10 do not."""
        network = one(weakened(made[2], 10.0))
        halo, measured = measure_halo(network, (10, 10, 10), (4, 4, 4), self.images(40, 44, 40), has_regions=False)
        assert halo == (8, 8, 8)
        assert measured.changed_by_less > 0

    def test_short_axes_and_no_images(self, made: tuple[Path, Path, Any]) -> None:
        network = one(weakened(made[2], 1e-4))
        halo, measured = measure_halo(network, (10,) * 3, (4,) * 3, self.images(12, 40, 40), has_regions=True)
        assert (halo, measured.cases) == ((10, 4, 4), 2)
        assert measure_halo(network, (10,) * 3, (4,) * 3, iter(()), has_regions=False)[0] == (10, 10, 10)


def one(network: Any) -> Any:
    return lambda tile: runner(network)(np.ascontiguousarray(tile)[None])[0]


def weakened(network: Any, factor: float) -> Any:
    """A copy in which the stages below the first count so many times as much."""
    changed = deepcopy(network)
    with torch.no_grad():
        up = changed.decoder.transpconvs[-1]
        up.weight.mul_(factor)
    return changed


class TestPrediction:
    @pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
    def test_is_that_of_the_whole_image(self, made: tuple[Path, Path, Any], backend: str) -> None:
        pytest.importorskip(backend)
        bundle, _, network = made
        image = smooth_noise((22, 47, 25), 3)[None]
        grids = set()
        predictor = Predictor.load(bundle, backend, threads=1)
        rules = load_bundle_spec(bundle).one_pass
        assert rules is not None
        smallest = int(24 * 24 * 28 * (rules.bytes_per_voxel * predictor.backend.overhead + 6))
        for limit in (None, smallest):
            predictor = predictor.with_settings(step_size=None, mirroring=False, use_gaussian=True, memory_limit=limit)
            case = predictor.preprocess_array(image, PROPERTIES)
            expected = whole(network, case.data_CZYX, PATCH_3D, 4)
            got = predictor.logits(case.data_CZYX).astype(np.float32)
            assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
            labels = predictor.predict_array(image, PROPERTIES).segmentation_ZYX
            assert (labels == expected.argmax(0)).mean() > 0.999
            grids.add(predictor.way.tiling(case.data_CZYX.shape[1:]).grid)
            assert predictor.describe()["way"] == "one pass"
        assert len(grids) == 2

    def test_shapes_that_vary_are_compiled_once(
        self, made: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        openvino = pytest.importorskip("openvino")
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path))  # where nothing compiled is kept yet
        compiled, compile_model = [], openvino.Core.compile_model

        def counted(*arguments: Any, **named: Any) -> Any:
            compiled.append(arguments)
            return compile_model(*arguments, **named)

        monkeypatch.setattr(openvino.Core, "compile_model", counted)
        predictor = Predictor.load(made[0], "openvino", threads=1, mirroring=False)
        for shape in ((16, 20, 24), (28, 20, 24), (20, 40, 32), (16, 20, 24)):
            data = smooth_noise(shape, 7, mean=0, spread=1)[None]
            expected = whole(made[2], data, PATCH_3D, 4)
            assert np.abs(predictor.logits(data) - expected).max() < 2e-3 * np.abs(expected).max()
        assert len(compiled) == 1

    @pytest.mark.parametrize("window_first", [True, False])
    def test_what_is_compiled_for_the_window_is_not_for_one_pass(
        self, window_first: bool, made: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bundles of one graph, such as `--dynamic --no-one-pass` writes beside one of one pass."""
        pytest.importorskip("openvino")
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path))
        spec = load_bundle_spec(made[0])
        ways = [(replace(spec, one_pass=None), (16, 20, 24)), (spec, (28, 20, 24))]
        for way, tile in ways if window_first else ways[::-1]:
            batch = smooth_noise(tile, 7, mean=0, spread=1)[None, None]
            logits = create_engine("openvino", made[0], way, threads=1).run(batch)
            expected = runner(made[2])(batch)
            assert np.abs(logits - expected).max() < 2e-3 * np.abs(expected).max()
        assert len(list((tmp_path / "compiled").iterdir())) == 2

    def test_a_step_size_asks_for_the_window(self, made: tuple[Path, Path, Any]) -> None:
        """nnU-Net's own predictor is the oracle."""
        bundle, folder, _ = made
        image = smooth_noise((22, 47, 25), 3)[None]
        predictor = Predictor.load(bundle, "onnxruntime", threads=1, step_size=0.5)
        assert predictor.describe()["way"] == "window"
        ours = predictor.predict_array(image, PROPERTIES).segmentation_ZYX
        theirs = nnunet_predictor(folder, (0,)).predict_single_npy_array(image, PROPERTIES)
        assert (ours == theirs).mean() >= 0.9999

    def test_fast_predictor(self, made: tuple[Path, Path, Any]) -> None:
        """nnU-Net's step size is its default, None asks for one pass."""
        image = smooth_noise((22, 47, 25), 3)[None]
        expected = {
            step: Predictor.load(made[0], "onnxruntime", threads=1, mirroring=False, step_size=step).predict_array(
                image, PROPERTIES
            )
            for step in (0.5, None)
        }
        predictor = FastPredictor(use_mirroring=False, backend="onnxruntime", threads=1, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(made[0])
        for step in (0.5, None):
            predictor.tile_step_size = step
            got = predictor.predict_single_npy_array(image, dict(PROPERTIES))
            np.testing.assert_array_equal(got, expected[step].segmentation_ZYX)
        assert (expected[0.5].segmentation_ZYX != expected[None].segmentation_ZYX).any()
        predictor.tile_step_size, predictor.passes = 0.5, 2
        with pytest.raises(SpecError, match="passes: nnU-Net's window has none, and a step size asks for it"):
            predictor.predict_single_npy_array(image, dict(PROPERTIES))

    def test_folds_are_averaged(self, made: tuple[Path, Path, Any]) -> None:
        networks = [made[2], weakened(made[2], 3.0)]

        class Engine:
            def __init__(self, network: Any) -> None:
                self.run = runner(network)

        rules = OnePass(halo=(10,) * 3, multiples=(4,) * 3, halo_is="exact", bytes_per_voxel=100)
        way = OnePassTiles(num_heads=3, patch_size=(4,) * 3, rules=rules, memory_limit=24 * 32 * 24 * 106)
        image = smooth_noise((20, 45, 21), 4, mean=0, spread=1)[None]
        assert max(way.tiling(image.shape[1:]).grid) > 1
        got = ensemble_logits(image, [Engine(network) for network in networks], way).astype(np.float32)
        expected = np.mean([whole(network, image, (4,) * 3, 4) for network in networks], axis=0)
        assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()

    def test_the_command(self, bundle: Path, tmp_path: Path) -> None:
        image = write_image(smooth_noise((30, 40, 20), 5), tmp_path / "in" / "case_0000.nii.gz")
        words = ("predict", "-i", image, "-m", bundle, "--backend", "onnxruntime", "--threads", "1")
        refused(
            run(*words, "-o", tmp_path / "out.nii.gz", "--memory-limit", "1M"),
            "memory limit: got 1024K",
            "--memory-limit",
        )
        refused(run(*words, "-o", tmp_path / "out.nii.gz", "--memory-limit", "much"), "expected a size such as 4G")
        refused(run(*words, "-o", tmp_path / "out.nii.gz", "--passes", "5"), "passes: got 5, expected 1 to 4")
        refused(
            run(*words, "-o", tmp_path / "out.nii.gz", "--passes", "2", "-step_size", "0.5"), "leave out the step size"
        )
        assert not (tmp_path / "out.nii.gz").exists()
        done = run(*words, "-o", tmp_path / "out.nii.gz", "--passes", "2", "--profile_json")
        assert done.returncode == 0, done.stderr
        assert "1 case(s) predicted with onnxruntime in 2 passes into" in done.stdout
        record = json.loads((tmp_path / "fastnnunet_profile.json").read_text())
        assert (record["way"], record["passes"], record["halo"]) == ("2 passes", 2, [10, 10, 10])


class TestRefusedBundles:
    def write(self, bundle: Path, **changes: Any) -> BundleSpec:
        spec = load_bundle_spec(bundle)
        rules = {k: v for k, v in changes.items() if k in OnePass.__dataclass_fields__}
        others = {k: v for k, v in changes.items() if k not in rules}
        assert spec.one_pass is not None
        changed = replace(spec, one_pass=replace(spec.one_pass, **rules), **others)
        write_bundle_json(changed, bundle / "bundle.json")
        return changed

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"halo": (10, 10)}, "one_pass.halo: .* expected 3 whole numbers"),
            ({"halo": (10, -1, 10)}, "one_pass.halo"),
            ({"halo": (10, 10, 2**40)}, "one_pass.halo"),
            ({"multiples": (4, 0, 4)}, "one_pass.multiples"),
            ({"multiples": (4, 3, 4)}, "one_pass.multiples: .* expected divisors"),
            ({"multiples": (4, 2, 4)}, "one_pass.multiples axis 1: got 2, expected a multiple of 4"),
            ({"halo_is": "guessed"}, "expected one of 'exact', 'measured'"),
            ({"bytes_per_voxel": 0}, "one_pass.bytes_per_voxel"),
            ({"bytes_per_voxel": 10.5}, "bytes_per_voxel"),
            ({"batch_size": 2}, "one_pass: the model takes exactly 2 patches"),
            ({"format_version": 2}, "one_pass: bundles of this format version have none"),
        ],
    )
    def test_values_that_cannot_be(self, bundle: Path, changes: dict[str, Any], message: str) -> None:
        self.write(bundle, **changes)
        with pytest.raises(CorruptError, match=message):
            load_bundle_spec(bundle)

    @pytest.mark.parametrize("value", [7, [1], {"halo": [1, 1, 1]}, {"unknown": 1}])
    def test_no_rules_at_all(self, bundle: Path, value: Any) -> None:
        spec = load_bundle_spec(bundle)
        write_bundle_json(replace(spec, one_pass=value), bundle / "bundle.json")
        with pytest.raises(CorruptError, match="field 'one_pass'"):
            load_bundle_spec(bundle)

    def test_a_graph_of_one_size(self, bundle: Path, made: tuple[Path, Path, Any]) -> None:
        (bundle / "model.onnx").write_bytes(to_onnx(made[2], 1, PATCH_3D).SerializeToString())
        spec = load_bundle_spec(made[0])
        files = {**spec.files, "model.onnx": sha256_of_file(bundle / "model.onnx")}
        write_bundle_json(replace(spec, files=files), bundle / "bundle.json")
        with pytest.raises(CorruptError, match=r"got .*16, 20, 24.*\n.*\(\*, 1, \*, \*, \*\)"):
            load_bundle_spec(bundle)

    def test_what_is_asked_for_and_cannot_be(self, tmp_path: Path) -> None:
        toy = make_toy_model(Toy(), tmp_path)
        out = tmp_path / "out"
        with pytest.raises(SpecError, match="--one-pass: the network's InstanceNorm3d takes its statistics"):
            export_bundle(toy.folder, 0, out, graph=GraphSpec(one_pass=True), needs_real_patches=False)
        assert not out.exists()

    def test_a_claim_that_numbers_refute(
        self, made: tuple[Path, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Asked for, it is refused; else the bundle goes without it."""
        monkeypatch.setattr("fastnnunet.export.one_pass.receptive_reach", lambda *_: (4, 4, 4))
        with pytest.raises(ParityError, match="--one-pass: the network's output depends on where a tile ends"):
            export_bundle(made[1], 0, tmp_path / "out", graph=GraphSpec(one_pass=True), needs_real_patches=False)
        assert not (tmp_path / "out").exists()
        export_bundle(made[1], 0, tmp_path / "out", needs_real_patches=False)
        assert load_bundle_spec(tmp_path / "out").one_pass is None
        assert load_bundle_spec(tmp_path / "out").format_version == 2
        assert "one_pass" not in json.loads((tmp_path / "out" / "bundle.json").read_text())

    def test_settings_of_one_pass_for_the_window(self, made: tuple[Path, Path, Any], tmp_path: Path) -> None:
        toy = make_toy_model(Toy(), tmp_path)
        for settings in ({"passes": 1}, {"memory_limit": "4G"}):
            with pytest.raises(SpecError, match="nnU-Net's window has none, and the bundle toy has no other way"):
                Predictor.load(toy.bundle, "onnxruntime", **settings)


class TestTensorRT:
    @needs_rtx
    def test_a_profile_for_tiles(self, bundle: Path) -> None:
        """Built by the real library."""
        with pytest.raises(SpecError, match=r"--tile: got \[16, 20, 22\].*multiples of \[4, 4, 4\]"):
            export_engines(bundle, largest_tile=(16, 20, 22))
        for precision in ("fp32", "fp16"):
            (built,) = export_engines(
                bundle, precision=precision, architectures=["sm89"], largest_tile=(32, 40, 48), library_name=RTX
            )
            key = built.stored.key
            assert (key.input_shape, key.output_shape) == ((1, 32, 40, 48), (3, 32, 40, 48))
            assert (key.smallest_tile, key.min_batch, key.max_batch) == ((4, 4, 4), 1, 1)
            assert len(built.stored.read_plan()) > 1000
        library = find_library(RTX)
        builder = library.module.Builder(library.logger)
        config = builder_config(builder, key, library)
        assert config.num_optimization_profiles == 1
        default = engine_key(load_bundle_spec(bundle), bundle / "model.onnx", "fp32", library, "sm89", None, None)
        assert default.smallest_tile is None

    def test_tiles_of_any_size(self, bundle: Path, made: tuple[Path, Path, Any], rtx: FakeTensorRT) -> None:  # noqa: F811
        """Run on the simulated GPU, whose engines are ONNX models: each shape is captured once, and 16 are kept."""
        key = EngineKey(
            model_sha256=sha256_of_file(bundle / "model.onnx"),
            precision="fp32",
            library=rtx.__name__,
            library_version=rtx.__version__,
            architecture="sm86",
            max_batch=1,
            input_shape=(1, 24, 24, 40),
            output_shape=(3, 24, 24, 40),
            smallest_tile=(4, 4, 4),
        )
        plan = rtx.plan((bundle / "model.onnx").read_bytes(), "sm86", 1)
        write_engine(bundle / "engines", key, plan, {})
        predictor = Predictor.load(bundle, "tensorrt", mirroring=False)
        image = smooth_noise((22, 47, 25), 3)[None]
        case = predictor.preprocess_array(image, PROPERTIES)
        tiling = predictor.way.tiling(case.data_CZYX.shape[1:])
        assert tiling.tile[1] == 24 < 48 == tiling.cuts[1].length
        expected = whole(made[2], case.data_CZYX, PATCH_3D, 4)
        for _ in range(2):
            got = predictor.logits(case.data_CZYX).astype(np.float32)
            assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
        engine = predictor.backend
        assert engine.captured() == [1]
        run_network = runner(made[2])
        for depth in (*range(4, 25, 4), *range(4, 25, 4)):
            for width in (4, 12, 40):
                batch = np.random.default_rng(depth).standard_normal((2, 1, depth, 8, width)).astype(np.float32)
                np.testing.assert_allclose(engine.run(batch), run_network(batch), atol=1e-3)
        assert len(engine.captured()) == 16
        assert rtx.cuda.alive()["graphs"] == 16
        for shape in ((1, 1, 28, 24, 40), (1, 1, 24, 24, 2), (1, 2, 24, 24, 40)):
            with pytest.raises(BackendError, match=r"expected \(N, 1, 24, 24, 40\), or axes down to 4 x 4 x 4"):
                engine.run(np.zeros(shape, np.float32))
