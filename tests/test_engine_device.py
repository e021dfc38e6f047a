"""The C++ engine with every step on a GPU, here on one whose kernels run on the CPU: labels are those of the same network
with everything else on the CPU, voxel for voxel; and what it says where a GPU, its driver or its memory is missing.

Nothing of this has run on a real GPU: pipelines/measure/predict/device_campaign.py is there to do it.
"""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fastnnunet.specs.bundle import load_bundle_spec, write_bundle_json
from fastnnunet.specs.one_pass import OnePass
from tests import emulated_gpu, engine
from tests.bundles import (
    DEFAULT_RESAMPLING,
    NO_RESAMPLING,
    TORCH_RESAMPLING,
    Toy,
    make_toy_model,
    smooth_noise,
    write_image,
)
from tests.emulated_gpu import EmulatedGpu
from tests.test_threads import _second_fold

CUBIC = {**DEFAULT_RESAMPLING, "probabilities": DEFAULT_RESAMPLING["data"]}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
WIDE = {"background": 0, "x": [1, 300], "y": [300]}
IN_ONE_PASS = OnePass(multiples=(4, 4, 4), halo=(1, 1, 1), halo_is="exact", bytes_per_voxel=200.0)


@dataclass(kw_only=True)
class Scenario:
    toy: Toy
    shape: tuple[int, ...] = (18, 23, 29)  # z, y, x as read
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    border: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)  # of the bundle's spec
    folds: int = 1
    job: dict[str, Any] = field(default_factory=dict)
    stages: str = "cuda"


SCENARIOS = {
    "window": Scenario(toy=Toy()),
    "smaller than the patch": Scenario(toy=Toy(), shape=(9, 11, 24)),
    "cropped, resampled": Scenario(toy=Toy(schemes=["CTNormalization"]), spacing=(0.8, 1.3, 1.1), border=3),
    "separate z": Scenario(toy=Toy(), spacing=(4.0, 0.9, 0.8), shape=(8, 23, 29)),
    "separate y": Scenario(toy=Toy(), spacing=(0.9, 4.0, 0.8), shape=(21, 8, 29)),
    "torch": Scenario(toy=Toy(resampling=TORCH_RESAMPLING), spacing=(1.2, 0.9, 0.8)),
    "no resampling": Scenario(toy=Toy(resampling=NO_RESAMPLING), spacing=(1.2, 0.9, 0.8), border=2),
    "cubic logits": Scenario(toy=Toy(resampling=CUBIC), spacing=(1.2, 0.9, 0.8)),
    "cubic regions": Scenario(
        toy=Toy(resampling=CUBIC, labels=REGIONS, regions_class_order=[1, 2]), spacing=(1.2, 0.9, 0.8)
    ),
    "transposed": Scenario(toy=Toy(transpose=((2, 0, 1), (1, 2, 0))), spacing=(1.2, 1.0, 0.8), border=2),
    "regions": Scenario(toy=Toy(labels=REGIONS, regions_class_order=[1, 2]), spacing=(0.9, 1.1, 1.0)),
    "labels beyond a byte": Scenario(toy=Toy(labels=WIDE, regions_class_order=[1, 300]), border=2),
    "ignore": Scenario(toy=Toy(), changes={"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}),
    "channels": Scenario(
        toy=Toy(channels=3, schemes=["RescaleTo01Normalization", "NoNormalization", "RGBTo01Normalization"])
    ),
    "masked": Scenario(toy=Toy(use_mask=True), border=3),  # preprocessed on the CPU
    "mirrors and folds": Scenario(toy=Toy(mirror_axes=(0, 1, 2)), shape=(17, 22, 24), folds=2),
    "2d with mirrors": Scenario(
        toy=Toy(dims=2, spacing=(1.0, 1.0), mirror_axes=(0, 1)), shape=(5, 37, 41), spacing=(3.0, 0.8, 1.1)
    ),
    "step": Scenario(toy=Toy(), options={"step_size": 0.3, "no_gaussian": 1}),
    "one pass": Scenario(
        toy=Toy(mirror_axes=(2,)),
        shape=(18, 40, 49),
        options={"passes": 2, "memory_limit": "3M"},
        changes={"one_pass": IN_ONE_PASS},
        folds=2,
    ),
    "one pass in 2d": Scenario(
        toy=Toy(dims=2, spacing=(1.0, 1.0)),
        shape=(7, 37, 41),
        changes={"one_pass": replace(IN_ONE_PASS, multiples=(4, 4), halo=(1, 1))},
    ),
    "of one batch size": Scenario(toy=Toy(), changes={"batch_size": 2}, stages="cpu"),
    "probabilities": Scenario(toy=Toy(), spacing=(0.8, 1.3, 1.1), border=3, job={"probabilities": True}),
}
IN_CHUNKS = ["cropped, resampled", "torch", "transposed", "regions", "2d with mirrors", "one pass in 2d"]
for _name in IN_CHUNKS:
    SCENARIOS[f"{_name}, chunk by chunk"] = replace(SCENARIOS[_name], job={"stream_bytes": 0})
SCENARIOS["one pass, chunk by chunk"] = replace(SCENARIOS["one pass"], job={"stream_bytes": 0}, folds=1)


def image_of(scenario: Scenario) -> np.ndarray:
    colours = "RGBTo01Normalization" in (scenario.toy.schemes or ())
    images = [smooth_noise(scenario.shape, seed, border=scenario.border) for seed in range(scenario.toy.channels)]
    return np.clip(np.stack(images), 0, 255) if colours else np.stack(images)


def bundle_of(scenario: Scenario, where: Path) -> Path:
    where.mkdir(parents=True)
    bundle = make_toy_model(scenario.toy, where).bundle
    if scenario.folds > 1:
        _second_fold(bundle)
    if scenario.changes:
        write_bundle_json(replace(load_bundle_spec(bundle), **scenario.changes), bundle / "bundle.json")
    return bundle


def job_of(scenario: Scenario, bundle: Path, where: Path) -> dict[str, Any]:
    image = where / "image.npy"
    np.save(image, image_of(scenario))
    options = {"device": "cuda", **scenario.options}
    return {
        "bundle": str(bundle), "image": str(image), "spacing": scenario.spacing, "options": options, **scenario.job
    }  # fmt: skip


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    return emulated_gpu.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def predicted(
    gpu: EmulatedGpu, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """For each scenario what comes of it with the stages on the CPU, and on the GPU."""
    where, jobs = tmp_path_factory.mktemp("jobs"), []
    for number, scenario in enumerate(SCENARIOS.values()):
        folder = where / str(number)
        jobs.append(job_of(scenario, bundle_of(scenario, folder), folder))
    on_cpu = gpu.predict(jobs, where / "cpu", FASTNNUNET_STAGES="cpu")
    on_gpu = gpu.predict(jobs, where / "gpu", FASTNNUNET_EMULATED_LOG=str(where / "log.json"))
    made = json.loads((where / "log.json").read_text())["kernels"]
    names = re.findall(r"FNN_KERNEL\((\w+),", (emulated_gpu.CUDA / "kernels.hpp").read_text())
    assert set(made) == set(names) - {"body"}, "the scenarios leave a kernel out"
    return dict(zip(SCENARIOS, zip(on_cpu, on_gpu, strict=True), strict=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_labels_are_those_of_the_cpu(name: str, predicted: dict[str, Any]) -> None:
    cpu, gpu = predicted[name]
    assert "error" not in cpu, cpu["error"]
    assert "error" not in gpu, gpu["error"]
    assert gpu["labels"].dtype == cpu["labels"].dtype
    np.testing.assert_array_equal(gpu["labels"], cpu["labels"])
    shares = np.bincount(cpu["labels"].ravel()) / cpu["labels"].size
    assert np.count_nonzero(shares > 0.01) >= 2, "the comparison means nothing"
    assert json.loads(str(cpu["describe"]))["stages"] == "cpu"
    assert json.loads(str(gpu["describe"]))["stages"] == SCENARIOS[name].stages
    np.testing.assert_array_equal(gpu["heard"], cpu["heard"])
    if "probabilities" in cpu:
        np.testing.assert_array_equal(gpu["probabilities"], cpu["probabilities"])
