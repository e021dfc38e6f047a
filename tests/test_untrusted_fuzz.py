"""Hundreds of spoilt models: what gets past the checks works, what does not is an error of this package."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastnnunet.engines.torch import load_network
from fastnnunet.errors import FastnnUNetError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.files.model import build_network, check_fits, model_of
from fastnnunet.nnunet.files.plans import configuration_of, label_manager_of, read_json
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.canonical import sha256_of
from tests.bundles import ToyModel
from tests.hostile_models import CONFIGURATION, bundle_json, mutated, plans_json, text_of
from tests.hostile_models import toy as toy  # a fixture

FUZZ = settings(
    max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class TestFuzz:
    @staticmethod
    def memory_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def bounded_memory(cls, toy: ToyModel) -> Iterator[None]:
        """A GiB more than the valid model takes, as address space."""
        import resource

        predict(toy)
        spec = load_bundle_spec(toy.bundle)
        load_network(spec, toy.bundle / spec.model_file)
        build_network(model_of(plans_json(toy), CONFIGURATION, read_json(toy.folder / "dataset.json")))
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (cls.memory_bytes() + 2**30, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_AS, before)

    def test_bundles(self, toy: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> None:
        bundle = tmp_path_factory.mktemp("fuzz") / "bundle"
        shutil.copytree(toy.bundle, bundle)
        spoilt = replace(toy, bundle=bundle)

        @FUZZ
        @given(mutated(bundle_json(toy)), st.booleans())
        def check(change: tuple[dict[str, Any], str | None], with_torch: bool) -> None:
            raw, text = change
            raw.pop("self_sha256", None)
            content = text_of({**raw, "self_sha256": sha256_of(raw)}, text)
            (bundle / "bundle.json").write_text(content)
            try:
                spec = load_bundle_spec(bundle)
                if with_torch:
                    load_network(spec, bundle / spec.model_file)
                predict(spoilt)
            except FastnnUNetError as e:
                str(e).encode()  # else it could not be printed

        check()

    def test_plans(self, toy: ToyModel, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("fuzz")
        path = toy.folder / "fold_0" / "checkpoint_final.pth"
        weights = load_checkpoint(path)["network_weights"]
        valid = {name: json.loads((toy.folder / f"{name}.json").read_text()) for name in ("plans", "dataset")}

        @FUZZ
        @given(mutated(valid["plans"]) | mutated(valid["plans"]), mutated(valid["dataset"]), st.integers(0, 3))
        def check(
            plans: tuple[dict[str, Any], str | None], dataset: tuple[dict[str, Any], str | None], which: int
        ) -> None:
            documents = {"plans": plans if which else (valid["plans"], None), "dataset": (valid["dataset"], None)}
            if which == 0:
                documents["dataset"] = dataset
            for name, (tree, text) in documents.items():
                (folder / f"{name}.json").write_text(text_of(tree, text))
            try:
                made, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
                manager, _ = configuration_of(made, CONFIGURATION)
                check_fits(model_of(made, CONFIGURATION, dataset_json), "nnUNetTrainer", weights, path)
                build_network(model_of(made, CONFIGURATION, dataset_json))
                label_manager_of(manager, dataset_json)
            except FastnnUNetError as e:
                str(e).encode()

        check()


def predict(model: ToyModel) -> None:
    """Load a bundle and predict an image as large as its patch was."""
    predictor = Predictor.load(model.bundle, "onnxruntime", threads=1)
    image = np.random.default_rng(0).standard_normal((1, 16, 20, 24)).astype(np.float32)
    predictor.predict_array(image, {"spacing": [1, 1, 1]})
