"""The C++ engine on bundles with a locator against the Python runtime: the same labels, refusals in the same words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnnunet.export.bundle import export_bundle
from fastnnunet.runtime import loaded
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.specs.canonical import sha256_of
from tests import engine
from tests.bundles import NO_RESAMPLING, Toy, make_toy_model
from tests.engine import Engine
from tests.one_pass_models import write_batchnorm_model
from tests.test_engine import assert_equal, said_by_engine, said_by_python
from tests.test_locate import SHAPE, give_locator, image_with_target

SPACING = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module", autouse=True)
def built() -> Path:
    return engine.build()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("located")
    regions = Toy(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    made = {
        "window": make_toy_model(Toy(mirror_axes=(0, 2)), where / "window").bundle,
        "regions": make_toy_model(regions, where / "regions").bundle,
        "one pass": where / "one_pass",
    }
    folder, _ = write_batchnorm_model(where / "model", Toy(resampling=NO_RESAMPLING), folds=2)
    export_bundle(folder, (0, 1), made["one pass"], needs_real_patches=False)
    for bundle in made.values():
        give_locator(bundle, margin_mm=3)
    return made


def located_image() -> np.ndarray:
    return 60 + 40 * image_with_target()


class TestLabels:
    @pytest.mark.parametrize(
        ("kind", "options", "python"),
        [
            ("one pass", {}, {}),
            ("one pass", {"folds": "1", "passes": 2}, {"folds": ["1"], "passes": 2}),
            ("one pass", {"step_size": 0.5}, {"step_size": 0.5}),
            ("one pass", {"folds": "0", "no_locate": 1}, {"folds": ["0"], "locate": False}),
            ("window", {"no_mirroring": 1}, {"mirroring": False}),
            ("regions", {}, {}),
        ],
        ids=str,
    )
    def test_are_those_of_the_runtime(
        self, kind: str, options: dict[str, Any], python: dict[str, Any], bundles: dict[str, Path]
    ) -> None:
        spacing = SPACING if kind == "one pass" else (0.9, 1.2, 1.1)
        got = assert_equal(bundles[kind], located_image(), spacing, options=options, **python)
        locate = python.get("locate", True)
        assert f'"locate": {str(locate).lower()}' in Engine(bundles[kind], **options).describe()
        at_the_corner = got[:8, :8, :8]  # far from the target
        assert at_the_corner.any() == (not locate)

    def test_on_openvino(self, bundles: dict[str, Path]) -> None:
        pytest.importorskip("openvino")
        assert_equal(bundles["window"], located_image(), SPACING, backend="openvino")

    def test_where_nothing_is_seen(self, bundles: dict[str, Path]) -> None:
        noise = 60 + 40 * np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
        python = LoadedBundle.load(bundles["one pass"], "onnxruntime", threads=1)
        assert python.box_of(python.preprocess_array(noise, {"spacing": SPACING}).data_CZYX) is None
        assert_equal(bundles["one pass"], noise, SPACING)

    @pytest.mark.parametrize("kind", ["one pass", "window"])
    def test_logits_that_are_not_kept(
        self, kind: str, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In chunks, those of tiles within the box and others around it; those of the window not in C order."""
        image = 60 + 40 * image_with_target((8, 24, 16), (48, 72, 60))
        limited: dict[str, Any] = {"memory_limit": "30M"} if kind == "one pass" else {}
        spacing, fold = SPACING if kind == "one pass" else (0.9, 1.2, 1.1), "0" if kind == "one pass" else None
        options = {**limited, **({} if fold is None else {"folds": fold})}
        python = {"folds": None if fold is None else [fold], **limited}
        kept = assert_equal(bundles[kind], image, spacing, options=options, **python)
        monkeypatch.setattr(loaded, "STREAM_BYTES", 0)
        before = engine.stream_bytes(0)
        try:
            streamed = assert_equal(bundles[kind], image, spacing, options=options, **python)
            np.testing.assert_array_equal(streamed, kept)
        finally:
            engine.stream_bytes(before)


@pytest.fixture
def described(bundles: dict[str, Path]) -> Iterator[Path]:
    """A bundle whose bundle.json the test may write."""
    path = bundles["one pass"] / "bundle.json"
    before = path.read_bytes()
    yield bundles["one pass"]
    path.write_bytes(before)


def describe_anew(bundle: Path, changes: dict[str, Any], of_locator: dict[str, Any]) -> None:
    raw = json.loads((bundle / "bundle.json").read_text())
    raw.pop("self_sha256")
    raw["locator"].update(of_locator)
    raw.update(changes)
    (bundle / "bundle.json").write_text(json.dumps({**raw, "self_sha256": sha256_of(raw)}))


class TestRefusals:
    @pytest.mark.parametrize(
        "changes",
        [
            {"factor": [2, 3]},
            {"factor": [0, 3, 65]},
            {"threshold": 1.0, "margin_mm": -1},
            {"threshold": "a", "more": 1},
            {"patch_size": [12, 12]},
            {"patch_size": [12, 12, 13], "factor": []},
            {"patch_size": [0, 12, 12]},
            {"architecture": {}},
            {"model_file": "model_0.onnx"},
            {"model_file": "parity.npz"},
            {"model_file": "../locator.onnx"},
            {"one_pass": {"halo": [1, 1, 1], "multiples": [5, 5, 5], "halo_is": "exact", "bytes_per_voxel": 1}},
            {"one_pass": {"halo": [1, 1, 1], "multiples": [3, 3, 3], "halo_is": "exact", "bytes_per_voxel": 64}},
            {"one_pass": {"halo": 1}},
        ],
        ids=str,
    )
    def test_fields_of_the_locator(self, changes: dict[str, Any], described: Path) -> None:
        describe_anew(described, {}, changes)
        expected = said_by_python(described)
        assert expected is not None
        assert said_by_engine(described) == expected

    @pytest.mark.parametrize(
        "changes",
        [
            {"format_version": 3},
            {"previous_labels": [1], "labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
            {"locator": 3},
            {"locator": {}},
        ],
        ids=str,
    )
    def test_bundles_that_have_none(self, changes: dict[str, Any], described: Path) -> None:
        describe_anew(described, changes, {})
        expected = said_by_python(described)
        assert expected is not None
        assert said_by_engine(described) == expected
