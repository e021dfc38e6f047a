"""The C++ engine against the Python runtime: the same labels on every voxel, the same refusals in the same words."""

import ctypes
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnnunet.errors import FastnnUNetError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.runtime import loaded
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.specs.bundle import load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of, sha256_of_file
from tests import engine
from tests.bundles import NO_RESAMPLING, TORCH_RESAMPLING, Toy, make_toy_model, smooth_noise
from tests.engine import Engine, EngineError
from tests.hostile_models import bundle_json, model, mutated, text_of, toy, write_bundle  # noqa: F401
from tests.one_pass_models import write_batchnorm_model
from tests.test_runtime_parity import SCENARIOS, Scenario
from tests.test_threads import _second_fold

BACKENDS = ("onnxruntime", "openvino")
SPLINES = {kind: {**entry, "kwargs": {**entry["kwargs"], "order": 3}} for kind, entry in Toy().resampling.items()}
MORE = {
    "spline_logits": Scenario(Toy(resampling=SPLINES), (17, 21, 27), (1.2, 0.8, 1.3)),
    "spline_regions": Scenario(
        Toy(resampling=SPLINES, labels={"background": 0, "ab": [1, 2], "b": 2}, regions_class_order=[1, 2]),
        (17, 21, 27),
        (1.2, 0.8, 1.3),
    ),
    "rescaled": Scenario(Toy(schemes=["RescaleTo01Normalization"]), (16, 25, 24), (1.1, 1, 1)),
    "colours": Scenario(Toy(schemes=["RGBTo01Normalization"]), (16, 25, 24), dtype=np.uint8),
    "as_they_are": Scenario(Toy(schemes=["NoNormalization"]), (16, 25, 24)),
    "masked_transposed": Scenario(
        Toy(channels=2, use_mask=True, transpose=((1, 2, 0), (2, 0, 1)), spacing=(3.0, 1.0, 1.0)), (25, 30, 9), border=2
    ),
    "wide_labels": Scenario(
        Toy(labels={"background": 0, "x": [1, 300], "y": [300]}, regions_class_order=[1, 300]), (16, 25, 24)
    ),
    "mirrored_2d": Scenario(Toy(dims=2, spacing=(1.0, 1.0), mirror_axes=(0, 1)), (5, 40, 45), (1.1, 1.0, 3.0)),
}


@pytest.fixture(scope="module", autouse=True)
def built() -> Path:
    return engine.build()


def image_of(scenario: Scenario) -> np.ndarray:
    channels = [
        smooth_noise(scenario.shape_zyx, 1 + channel, border=scenario.border)
        for channel in range(scenario.toy.channels)
    ]
    image = np.stack(channels)
    return (image.clip(0, 255) if scenario.dtype == np.uint8 else image).astype(scenario.dtype).astype(np.float32)


def assert_equal(
    bundle: Path,
    image_CZYX: np.ndarray,
    spacing: Any,
    previous: np.ndarray | None = None,
    *,
    backend: str = "onnxruntime",
    options: dict[str, Any] | None = None,
    **python: Any,
) -> np.ndarray:
    """Labels of the engine, which are those of the Python runtime."""
    theirs = LoadedBundle.load(bundle, backend, threads=1, **python)
    expected = theirs.predict_array(image_CZYX, {"spacing": list(spacing)}, previous_ZYX=previous).segmentation_ZYX
    got = Engine(bundle, backend, **options or {}).predict(image_CZYX, spacing, previous).labels_ZYX
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(got)) > 1  # the comparison means something
    return got


@pytest.mark.parametrize("name", [*SCENARIOS, *MORE])
def test_labels_equal_the_runtimes(name: str, tmp_path: Path) -> None:
    scenario = {**SCENARIOS, **MORE}[name]
    bundle = make_toy_model(scenario.toy, tmp_path).bundle
    assert_equal(bundle, image_of(scenario), scenario.spacing_xyz[::-1])


@pytest.mark.parametrize("name", ["spline_logits", "regions", "spline_regions", "masked_transposed", "2d_resampled"])
def test_probabilities_equal_the_runtimes(name: str, tmp_path: Path) -> None:
    """Bit for bit: softmax and sigmoid are the core's for both."""
    scenario = {**SCENARIOS, **MORE}[name]
    bundle = make_toy_model(scenario.toy, tmp_path).bundle
    image, spacing = image_of(scenario), list(scenario.spacing_xyz[::-1])
    theirs = LoadedBundle.load(bundle, "onnxruntime", threads=1)
    expected = theirs.predict_array(image, {"spacing": spacing}, return_probabilities=True)
    got = Engine(bundle).predict(image, spacing, probabilities=True)
    assert got.probabilities_HZYX is not None
    np.testing.assert_array_equal(got.probabilities_HZYX, expected.probabilities_HZYX)
    np.testing.assert_array_equal(got.labels_ZYX, expected.segmentation_ZYX)
    assert Engine(bundle).predict(image, spacing).probabilities_HZYX is None


def test_the_ignore_label_has_no_head(tmp_path: Path) -> None:
    bundle = make_toy_model(Toy(), tmp_path).bundle
    spec = load_bundle_spec(bundle)
    write_bundle_json(replace(spec, labels={**spec.labels, "ignore": 3}), bundle / "bundle.json")
    assert_equal(bundle, smooth_noise((16, 25, 24), 0)[None], (1.1, 1.0, 1.0))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("kinds")
    made = {
        "ensemble": make_toy_model(Toy(mirror_axes=(0, 2)), where / "ensemble").bundle,
        "cascade": make_toy_model(Toy(channels=3, use_mask=True), where / "cascade").bundle,
        "fixed": make_toy_model(Toy(dims=2, spacing=(1.0, 1.0)), where / "fixed").bundle,
    }
    _second_fold(made["ensemble"])
    spec = load_bundle_spec(made["cascade"])
    one_channel = {
        name: getattr(spec, name)[:1] for name in ("channel_names", "normalization_schemes", "use_mask_for_norm")
    }
    write_bundle_json(replace(spec, previous_labels=(1, 2), **one_channel), made["cascade"] / "bundle.json")
    for dims in (2, 3):
        flat = Toy(dims=dims, spacing=(1.0,) * dims, resampling=NO_RESAMPLING if dims == 3 else TORCH_RESAMPLING)
        folder, _ = write_batchnorm_model(where / f"model_{dims}", replace(flat, mirror_axes=(1,)))
        export_bundle(folder, 0, where / f"one_pass_{dims}", needs_real_patches=False)
        made[f"one_pass_{dims}"] = where / f"one_pass_{dims}"
    return made


class TestKinds:
    """Folds, mirrors, stages of cascades, one pass; on both backends."""

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("options", "python"),
        [
            ({}, {}),
            ({"folds": "1"}, {"folds": ["1"]}),
            ({"no_mirroring": 1, "step_size": 0.7}, {"mirroring": False, "step_size": 0.7}),
            ({"no_gaussian": 1, "folds": "1 0"}, {"use_gaussian": False, "folds": [1, 0]}),
        ],
        ids=str,
    )
    def test_ensemble(self, options: Any, python: Any, backend: str, bundles: dict[str, Path]) -> None:
        pytest.importorskip(backend)
        image = smooth_noise((18, 30, 33), 0)[None]
        assert_equal(bundles["ensemble"], image, (1.0, 1.0, 1.1), backend=backend, options=options, **python)

    @pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.3, 0.9, 1.0), (5.0, 1.1, 1.0)])
    def test_cascade(self, spacing: Any, bundles: dict[str, Path]) -> None:
        shape = (17, 26, 31)
        previous = np.random.default_rng(0).integers(0, 3, tuple(n // 4 + 1 for n in shape))
        previous = previous.repeat(4, 0).repeat(4, 1).repeat(4, 2)[tuple(slice(n) for n in shape)].astype(np.uint8)
        assert_equal(bundles["cascade"], smooth_noise(shape, 1, border=3)[None], spacing, previous)

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("limit", [None, "13M"])
    @pytest.mark.parametrize("passes", [None, 3])
    @pytest.mark.parametrize("mirroring", [True, False])
    def test_one_pass(
        self, dims: int, backend: str, limit: Any, passes: Any, mirroring: bool, bundles: dict[str, Path]
    ) -> None:
        """Without mirrors the logits of OpenVINO are read where they are."""
        pytest.importorskip(backend)
        image = smooth_noise((11, 50, 45) if dims == 2 else (41, 46, 55), 0)[None]
        options = {"passes": passes or 0, **({} if limit is None else {"memory_limit": limit})}
        options["no_mirroring"] = int(not mirroring)
        python = {"passes": passes, "memory_limit": limit, "mirroring": mirroring}
        bundle = bundles[f"one_pass_{dims}"]
        assert_equal(bundle, image, (3.0, 1.1, 1.0), backend=backend, options=options, **python)
        assert ('"way": "one pass"' if passes is None else '"way": "3 passes"') in Engine(bundle, **options).describe()

    @pytest.mark.parametrize(
        "limit", ["4X", "1.5m", "0", "800MB", "1e9", "4 GiB", "1G B", "9999999", "1.", "12kib", "-1G"]
    )
    def test_sizes_of_memory(self, limit: str, bundles: dict[str, Path]) -> None:
        """Too small, or no size at all, in the same words; or accepted by both."""
        bundle = bundles["one_pass_3"]
        assert said_by_engine(bundle, memory_limit=limit) == said_by_python(bundle, memory_limit=limit)

    @pytest.mark.parametrize("kind", ["one_pass_3", "one_pass_2", "spline", "plain", "2d", "transposed"])
    def test_logits_that_are_not_kept(
        self, kind: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Labels of large images are made while the window goes on."""
        monkeypatch.setattr(loaded, "STREAM_BYTES", 0)
        before = engine.stream_bytes(0)
        try:
            toys = {
                "spline": Toy(resampling=SPLINES),
                "plain": Toy(),
                "2d": Toy(dims=2, spacing=(1.0, 1.0)),
                "transposed": Toy(transpose=((1, 2, 0), (2, 0, 1)), spacing=(3.0, 1.0, 1.0)),
            }
            bundle = make_toy_model(toys[kind], tmp_path).bundle if kind in toys else bundles[kind]
            options: dict[str, Any] = {} if kind in toys else {"memory_limit": "13M"}
            image = smooth_noise((41, 46, 55), 0, border=2)[None]
            assert_equal(bundle, image, (0.8, 1.2, 1.3), options=options, **options)
        finally:
            engine.stream_bytes(before)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_model_for_so_many_patches(self, backend: str, bundles: dict[str, Path]) -> None:
        import onnx

        pytest.importorskip(backend)

        bundle = bundles["fixed"]
        fixed = onnx.load(str(bundle / "model.onnx"))
        for value in (*fixed.graph.input, *fixed.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 3
        onnx.save(fixed, str(bundle / "model.onnx"))
        spec = load_bundle_spec_of(bundle, batch_size=3)
        assert spec.batch_size == 3
        assert_equal(bundle, smooth_noise((5, 40, 45), 0)[None], (3.0, 1.0, 1.0), backend=backend)

    @pytest.mark.parametrize(("kind", "no_mirroring"), [("ensemble", 0), ("one_pass_3", 1)])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_threads_at_once(self, backend: str, kind: str, no_mirroring: int, bundles: dict[str, Path]) -> None:
        """24 threads, one model: each gets what it would get alone."""
        pytest.importorskip(backend)
        shapes = [(18, 30, 33), (16, 20, 24), (9, 13, 41)]
        images = [smooth_noise(shape, seed)[None] for seed, shape in enumerate(shapes)]
        one = Engine(bundles[kind], backend, no_mirroring=no_mirroring)
        expected = [one.predict(image, (1.0, 1.1, 1.0)).labels_ZYX for image in images]
        start = threading.Barrier(24)

        def predict(number: int) -> np.ndarray:
            start.wait()
            return one.predict(images[number % 3], (1.0, 1.1, 1.0)).labels_ZYX

        with ThreadPoolExecutor(24) as pool:
            for number, got in enumerate(pool.map(predict, range(24))):
                np.testing.assert_array_equal(got, expected[number % 3])

    def test_progress_and_cancelling(self, bundles: dict[str, Path]) -> None:
        one, image = Engine(bundles["ensemble"]), smooth_noise((18, 30, 33), 0)[None]
        seen: list[tuple[int, int]] = []
        one.predict(image, (1, 1, 1), heard=lambda done, total: seen.append((done, total)) or 0)
        assert seen == [(n + 1, len(seen)) for n in range(len(seen))]
        assert len(seen) > 4
        with pytest.raises(EngineError, match="cancelled") as caught:
            one.predict(image, (1, 1, 1), heard=lambda done, total: done == 3)
        assert caught.value.status == engine.CANCELLED


def load_bundle_spec_of(bundle: Path, **changes: Any) -> Any:
    """The bundle described anew, with the digests that its files have now."""
    raw = json.loads((bundle / "bundle.json").read_text())
    files = {name: sha256_of_file(bundle / name) for name in raw["files"]}
    raw.pop("self_sha256")
    raw.update(files=files, **changes)
    (bundle / "bundle.json").write_text(json.dumps({**raw, "self_sha256": sha256_of(raw)}))
    return load_bundle_spec(bundle)


def said_by_python(bundle: Path, **options: Any) -> str | None:
    try:
        LoadedBundle.load(bundle, "onnxruntime", threads=1, **options)
    except FastnnUNetError as e:
        return str(e)
    return None


def without_reasons_of_the_interpreter(said: str | None) -> str | None:
    """Of JSON that Python cannot hold, such as half a surrogate pair, it speaks in words of its own."""
    before, json_is_wrong, reason = (said or "").partition(" is no usable JSON: ")
    of_python = "digits" in reason or "codec" in reason
    return before + json_is_wrong if of_python else said


def said_by_engine(bundle: Path, **options: Any) -> str | None:
    try:
        Engine(bundle, **options)
    except EngineError as e:
        return str(e)
    return None


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300), repeat=st.integers(1, 60))
def test_digests(content: bytes, repeat: int) -> None:
    content *= repeat
    digest = ctypes.create_string_buffer(65)
    for plainly in (0, 1):
        engine.library().fastnnunet_testing_sha256(content, ctypes.c_size_t(len(content)), plainly, digest)
        assert digest.value.decode() == hashlib.sha256(content).hexdigest()


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class TestRefusals:
    """What the Python runtime refuses, in its words."""

    @settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_description(self, data: st.DataObject, toy: Any, model: Any) -> None:  # noqa: F811
        raw = bundle_json(toy)  # of which `model` is a copy that is spoilt anew every time
        raw.pop("self_sha256")
        tree, text = data.draw(mutated(raw))
        if text is None:
            write_bundle(model, tree)
        else:
            (model.bundle / "bundle.json").write_text(text_of({**tree, "self_sha256": "0" * 64}, text))
        got, expected = map(
            without_reasons_of_the_interpreter, (said_by_engine(model.bundle), said_by_python(model.bundle))
        )
        assert got == expected

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(tree=ANY_JSON, indent=st.sampled_from([None, 1]), escaped=st.booleans())
    def test_digest_of_any_description(self, tree: Any, indent: Any, escaped: bool, model: Any) -> None:  # noqa: F811
        """Numbers, texts and the order of keys as Python's canonical form has them, however the file is written."""
        raw = {**bundle_json(model), "provenance": {"any": tree}}
        raw.pop("self_sha256", None)
        text = json.dumps({**raw, "self_sha256": sha256_of(raw)}, indent=indent, ensure_ascii=escaped)
        (model.bundle / "bundle.json").write_text(text)
        assert said_by_engine(model.bundle) == said_by_python(model.bundle)

    @pytest.mark.parametrize(
        "changes",
        [
            {"patch_size": [16, -1, 24]},
            {"patch_size": [4096, 4096, 4096]},
            {"transpose_forward": [0, 0, 1]},
            {"transpose_backward": [2, 0, 1]},
            {"normalization_schemes": []},
            {"normalization_schemes": ["CTNormalization"], "intensity_properties": {"0": {"mean": 1.0}}},
            {"normalization_schemes": ["Own"]},
            {"labels": {"background": 0, "a": "x"}},
            {"labels": {"background": 0, "a": 1}},
            {"labels": {"background": 0, "ab": [1, 2], "b": [2]}},
            {"num_heads": 5000, "step_size": 0, "mirror_axes": [0, 0], "file_ending": "x/y", "batch_size": 0},
            {"resampling": {"data": {"fn": "mine"}, "probabilities": {}}},
            {"resampling": {"data": {"fn": "mine"}, "probabilities": {"fn": "no_resampling_hack"}}},
            {"previous_labels": [1], "resampling": {}},
            {"files": {}, "model_files": ["a", "a"], "folds": ["0"]},
            {"files": {"../x": "y", "m.xml": "0" * 64}},
            {"one_pass": {"halo": [1], "multiples": [3, 3, 3], "halo_is": "exact", "bytes_per_voxel": 1}},
            {"one_pass": {"halo": [1, 1, 1], "multiples": [4, 4, 4], "halo_is": "guessed", "more": 1}},
            {"architecture": {"network_class_name": 1, "arch_kwargs": {"n_stages": 99}, "_kw_requires_import": 0}},
            {"plans": {"label_manager": "Mine", "configurations": {"3d_toy": {"preprocessor_name": "Own"}}}},
            {"plans": {"configurations": {"3d_toy": {"inherits_from": "3d_toy"}}}},
            {"unknown": 1, "name": 3, "spacing_mm": "x"},
            {"format_version": 99},
            {"name": "caf\u00e9 \U0001f600 \x7f\n", "labels": {"b": 0, "\u00e9": "\u00e9"}},
        ],
        ids=str,
    )
    def test_fields(self, changes: dict[str, Any], model: Any) -> None:  # noqa: F811
        write_bundle(model, {**bundle_json(model), **changes})
        expected = said_by_python(model.bundle)
        assert expected is not None
        assert said_by_engine(model.bundle) == expected

    def test_files(self, model: Any) -> None:  # noqa: F811
        file, whole = model.bundle / "model.onnx", (model.bundle / "model.onnx").read_bytes()
        for content in (whole[:-1], b"", None):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            expected = said_by_python(model.bundle)
            assert said_by_engine(model.bundle) == expected
            assert expected is not None
        (model.bundle / "other").write_bytes(whole)
        file.symlink_to(model.bundle / "other")
        assert said_by_engine(model.bundle) == said_by_python(model.bundle)
        with pytest.raises(EngineError, match="no bundle at"):
            Engine(model.bundle / "nowhere")

    def test_models_that_refer_to_other_files(self, model: Any) -> None:  # noqa: F811
        import onnx

        path = model.bundle / "model.onnx"
        original = onnx.load(str(path))
        for spoil in ("external", "context", "shape", "two outputs"):
            changed = onnx.ModelProto.FromString(original.SerializeToString())
            if spoil == "external":
                changed.graph.initializer[0].external_data.add(key="location", value="elsewhere")
            elif spoil == "context":
                changed.graph.node[0].op_type = "EPContext"
            elif spoil == "shape":
                changed.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 5
            else:
                changed.graph.output.append(changed.graph.output[0])
            path.write_bytes(changed.SerializeToString())
            raw = bundle_json(model)
            write_bundle(model, {**raw, "files": {**raw["files"], "model.onnx": sha256_of_file(path)}})
            expected = said_by_python(model.bundle)
            assert expected is not None, spoil
            assert said_by_engine(model.bundle) == expected

    @pytest.mark.parametrize(
        ("options", "python"),
        [
            ({"step_size": 2.0}, {"step_size": 2.0}),
            ({"passes": 2}, {"passes": 2}),
            ({"memory_limit": "1G"}, {"memory_limit": "1G"}),
            ({"folds": "0 7 8"}, {"folds": ["0", "7", "8"]}),
            ({"precision": "int8"}, {"precision": "int8"}),
            ({"precision": "fp16"}, {"precision": "fp16"}),
            ({"device": "gpu"}, {"device": "gpu"}),
        ],
        ids=str,
    )
    def test_options(self, options: Any, python: Any, toy: Any) -> None:  # noqa: F811
        expected = said_by_python(toy.bundle, **python)
        assert expected is not None
        assert said_by_engine(toy.bundle, **options) == expected

    @pytest.mark.parametrize(
        ("shape", "spacing"),
        [
            ((2, 5, 6, 7), (1, 1, 1)),
            ((1, 5, 6, 7), (1, 0, 1)),
            ((1, 5, 6, 7), (1e-3, 1, 1)),
            ((1, 5, 6, 7), (1e8, 1, 1)),
        ],
    )
    def test_images(self, shape: Any, spacing: Any, toy: Any) -> None:  # noqa: F811
        image = np.ones(shape, np.float32)
        with pytest.raises(FastnnUNetError) as expected:
            LoadedBundle.load(toy.bundle, "onnxruntime").predict_array(image, {"spacing": [float(s) for s in spacing]})
        with pytest.raises(EngineError) as got:
            Engine(toy.bundle).predict(image, spacing)
        assert str(got.value) == str(expected.value)
        assert got.value.status == engine.BAD_IMAGE

    def test_voxels_and_previous_labels(self, toy: Any) -> None:  # noqa: F811
        image = np.ones((1, 5, 6, 7), np.float32)
        with pytest.raises(EngineError, match="no cascade stage"):
            Engine(toy.bundle).predict(image, (1, 1, 1), np.zeros((5, 6, 7)))
        image[0, 1, 2, 3] = np.nan
        with pytest.raises(EngineError, match="NaN or infinite voxels"):
            Engine(toy.bundle).predict(image, (1, 1, 1))

    def test_a_backend_that_is_not_there(self, toy: Any, tmp_path: Path) -> None:  # noqa: F811
        with pytest.raises(EngineError, match=r"backend: got 'mine', expected auto or one of openvino, onnxruntime"):
            Engine(toy.bundle, "mine")
        with pytest.raises(EngineError, match=r"libfastnnunet_onnxruntime\.so is in none of its folders"):
            Engine(toy.bundle, plugins=str(tmp_path))

    def test_null_pointers(self) -> None:
        found = engine.library()
        assert found.fastnnunet_load(None, None, None) == engine.BAD_ARGUMENT
        assert found.fastnnunet_predict(None, None, None) == engine.BAD_ARGUMENT
        assert found.fastnnunet_result_labels(None, None) == engine.BAD_ARGUMENT
        found.fastnnunet_free(None)
        found.fastnnunet_result_free(None)
        found.fastnnunet_options_init(None, ctypes.c_size_t(8))

    def test_a_program_of_an_older_header(self, toy: Any) -> None:  # noqa: F811
        """Which knows the first fields of the options alone."""
        given = engine.Options(struct_size=ctypes.sizeof(ctypes.c_size_t) + ctypes.sizeof(ctypes.c_char_p))
        given.backend, given.threads, given.step_size = b"onnxruntime", -5, 99.0
        one = ctypes.c_void_p()
        assert engine.library().fastnnunet_load(str(toy.bundle).encode(), ctypes.byref(given), ctypes.byref(one)) == 0
        assert b'"step_size": 0.5' in engine.library().fastnnunet_describe(one)
        engine.library().fastnnunet_free(one)
