"""The C++ engine with every step on a GPU, here on one whose kernels run on the CPU: labels are those of the same
network with everything else on the CPU, voxel for voxel; and what it says where GPU, driver or memory is missing.

Nothing of this has run on a real GPU: pipelines/measure/predict/device_campaign.py is there to do it.
"""

import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import SimpleITK as sitk

from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.one_pass import OnePass
from tests import emulated_gpu, engine
from tests.bundles import (
    DEFAULT_RESAMPLING,
    NO_RESAMPLING,
    TORCH_RESAMPLING,
    Toy,
    _dataset_json,
    _plans,
    smooth_noise,
    write_image,
)
from tests.emulated_gpu import EmulatedGpu
from tests.test_locate import give_locator, image_with_target
from tests.test_threads import _second_fold

CUBIC = {**DEFAULT_RESAMPLING, "probabilities": DEFAULT_RESAMPLING["data"]}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
WIDE = {"background": 0, "x": [1, 300], "y": [300]}


@dataclass(kw_only=True)
class Scenario:
    toy: Toy
    shape: tuple[int, ...] = (18, 23, 29)  # z, y, x as read
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    border: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)  # of the bundle's spec
    folds: int = 1
    one_pass: bool = False
    locator: bool = False
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
    "after one that was cancelled": Scenario(toy=Toy(mirror_axes=(1,)), job={"cancel_at": 2}),
    "mirrors and folds": Scenario(toy=Toy(mirror_axes=(0, 1, 2)), shape=(17, 22, 24), folds=2),
    "2d with mirrors": Scenario(
        toy=Toy(dims=2, spacing=(1.0, 1.0), mirror_axes=(0, 1)), shape=(5, 37, 41), spacing=(3.0, 0.8, 1.1)
    ),
    "step": Scenario(toy=Toy(), options={"step_size": 0.3, "no_gaussian": 1}),
    "one pass": Scenario(
        toy=Toy(mirror_axes=(2,)),
        shape=(26, 60, 69),
        options={"passes": 2, "memory_limit": "30M"},
        folds=2,
        one_pass=True,
    ),
    "one pass in 2d": Scenario(toy=Toy(dims=2, spacing=(1.0, 1.0)), shape=(7, 37, 41), one_pass=True),
    "located": Scenario(toy=Toy(mirror_axes=(0, 2)), locator=True, spacing=(0.9, 1.2, 1.1)),
    "a cascade stage": Scenario(
        toy=Toy(channels=3),
        changes={
            "channel_names": ("ct",),
            "normalization_schemes": ("ZScoreNormalization",),
            "use_mask_for_norm": (False,),
            "previous_labels": (1, 2),
        },
        spacing=(1.2, 0.9, 1.0),
    ),  # preprocessed on the CPU
    "of one batch size": Scenario(toy=Toy(), changes={"batch_size": 2}, stages="cpu"),
    "probabilities": Scenario(toy=Toy(), spacing=(0.8, 1.3, 1.1), border=3, job={"probabilities": True}),
}
IN_CHUNKS = ["cropped, resampled", "torch", "transposed", "regions", "2d with mirrors", "one pass in 2d"]
for _name in IN_CHUNKS:
    SCENARIOS[f"{_name}, chunk by chunk"] = replace(SCENARIOS[_name], job={"stream_bytes": 0})
SCENARIOS["one pass, chunk by chunk"] = replace(SCENARIOS["one pass"], job={"stream_bytes": 0})
SCENARIOS["one pass, chunk by chunk"].options = {"memory_limit": "30M", "folds": "1"}


def image_of(scenario: Scenario) -> np.ndarray:
    colours = "RGBTo01Normalization" in (scenario.toy.schemes or ())
    images = [smooth_noise(scenario.shape, seed, border=scenario.border) for seed in range(scenario.toy.channels)]
    return np.clip(np.stack(images), 0, 255) if colours else np.stack(images)


def bundle_of(scenario: Scenario, where: Path) -> Path:
    """A bundle whose model file has the right shapes: the emulated network takes no more than its digest from it."""
    toy, bundle = scenario.toy, where / "bundle"
    bundle.mkdir(parents=True)
    space = [f"x{axis}" for axis in range(toy.dims)] if scenario.one_pass else toy.patch_size
    weights = np.random.default_rng(1).standard_normal((toy.heads, toy.channels, *[1] * toy.dims), np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["image", "decoder.seg_layers"], ["logits"])],
        "toy",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", toy.channels, *space])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", toy.heads, *space])],
        [onnx.numpy_helper.from_array(weights, "decoder.seg_layers")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), bundle / "model.onnx")
    plans, dataset_json = _plans(toy), _dataset_json(toy)
    config = plans["configurations"][f"{toy.dims}d_toy"]
    halo = OnePass(multiples=(4,) * toy.dims, halo=(1,) * toy.dims, halo_is="exact", bytes_per_voxel=400)
    spec = BundleSpec(
        format_version=3 if scenario.one_pass else 2,
        name="toy",
        configuration=f"{toy.dims}d_toy",
        channel_names=tuple(dataset_json["channel_names"].values()),
        labels=toy.labels,
        regions_class_order=tuple(toy.regions_class_order) if toy.regions_class_order else None,
        num_heads=toy.heads,
        file_ending=toy.file_ending,
        reader_writer=toy.reader_writer,
        transpose_forward=toy.transpose[0],
        transpose_backward=toy.transpose[1],
        spacing_mm=toy.spacing,
        patch_size=toy.patch_size,
        normalization_schemes=tuple(config["normalization_schemes"]),
        use_mask_for_norm=tuple(config["use_mask_for_norm"]),
        intensity_properties=plans["foreground_intensity_properties_per_channel"],
        resampling=toy.resampling,
        mirror_axes=toy.mirror_axes,
        one_pass=halo if scenario.one_pass else None,
        architecture=config["architecture"],
        plans=plans,
        dataset_json=dataset_json,
        provenance={},
        files={"model.onnx": sha256_of_file(bundle / "model.onnx")},
    )
    write_bundle_json(spec, bundle / "bundle.json")
    if scenario.folds > 1:
        _second_fold(bundle)
    if scenario.changes:
        write_bundle_json(replace(load_bundle_spec(bundle), **scenario.changes), bundle / "bundle.json")
    if scenario.locator:
        give_locator(bundle, margin_mm=3)
    return bundle


def job_of(scenario: Scenario, bundle: Path, where: Path) -> dict[str, Any]:
    image = 60 + 40 * image_with_target() if scenario.locator else image_of(scenario)
    stage = load_bundle_spec(bundle).previous_labels
    np.save(where / "image.npy", image[:1] if stage else image)
    job = {"bundle": str(bundle), "image": str(where / "image.npy"), "spacing": scenario.spacing, **scenario.job}
    if stage:
        np.save(where / "previous.npy", (smooth_noise(scenario.shape, 7) > 60).astype(np.int32))
        job["previous"] = str(where / "previous.npy")
    return {**job, "options": {"device": "cuda", **scenario.options}}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    return emulated_gpu.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def predicted(
    gpu: EmulatedGpu, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """For each scenario what comes of it with the stages on the CPU, and on the GPU."""
    where, bundles = tmp_path_factory.mktemp("jobs"), dict[str, Path]()
    jobs = []
    for number, scenario in enumerate(SCENARIOS.values()):
        folder = where / str(number)
        same = repr((scenario.toy, scenario.changes, scenario.folds, scenario.one_pass))
        if same not in bundles:
            bundles[same] = bundle_of(scenario, folder)
        folder.mkdir(exist_ok=True)
        jobs.append(job_of(scenario, bundles[same], folder))
    on_cpu = gpu.predict(jobs, where / "cpu", FASTNNUNET_STAGES="cpu")
    on_gpu = gpu.predict(jobs, where / "gpu", FASTNNUNET_EMULATED_LOG=str(where / "log.json"))
    log = json.loads((where / "log.json").read_text())
    names = re.findall(r"FNN_KERNEL\((\w+), \w+Params", (emulated_gpu.CUDA / "kernels.hpp").read_text())
    assert set(log["kernels"]) == set(names), "the scenarios leave a kernel out"
    assert (log["left_bytes"], log["left_streams"]) == (0, 0)
    return dict(zip(SCENARIOS, zip(on_cpu, on_gpu, strict=True), strict=True))


@pytest.mark.parametrize("name", SCENARIOS)
def test_labels_are_those_of_the_cpu(name: str, predicted: dict[str, Any]) -> None:
    cpu, gpu = predicted[name]
    assert "error" not in cpu, cpu["error"]
    assert "error" not in gpu, gpu["error"]
    assert gpu["labels"].dtype == cpu["labels"].dtype
    np.testing.assert_array_equal(gpu["labels"], cpu["labels"])
    shares = np.bincount(cpu["labels"].ravel()) / cpu["labels"].size
    assert np.count_nonzero(shares > 0.005) >= 2, "the comparison means nothing"
    assert json.loads(str(cpu["describe"]))["stages"] == "cpu"
    assert json.loads(str(gpu["describe"]))["stages"] == SCENARIOS[name].stages
    np.testing.assert_array_equal(gpu["heard"], cpu["heard"])
    if "probabilities" in cpu:
        np.testing.assert_array_equal(gpu["probabilities"], cpu["probabilities"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(Scenario(toy=Toy(mirror_axes=(0,)), folds=2), tmp_path_factory.mktemp("bundle") / "made")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(smooth_noise((18, 23, 29), 0, border=2), tmp_path / "image.nii.gz", (1.1, 1.3, 0.8))


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def words(image: Path, out: Path, bundle: Path, *more: object) -> tuple[object, ...]:
    return ("predict", "-i", image, "-o", out, "-m", bundle, "--backend", "tensorrt", *more)


class TestProgram:
    def test_the_image_goes_over_once_and_the_labels_come_back_once(
        self, gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path
    ) -> None:
        """All else that is copied is a box of six numbers, limits of logits, tables and weights of a tile."""
        log = tmp_path / "log.json"
        for place in ("cpu", "gpu"):
            done = gpu.run(
                *words(image, tmp_path / f"{place}.nii.gz", bundle, "-device", "cuda"),
                FASTNNUNET_STAGES=place, FASTNNUNET_EMULATED_LOG=str(log), FASTNNUNET_EMULATED_MOST="1",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        np.testing.assert_array_equal(read(tmp_path / "gpu.nii.gz"), read(tmp_path / "cpu.nii.gz"))
        made, voxels, patch = json.loads(log.read_text()), read(image).size, 16 * 20 * 24
        tables = 20 * 100
        # for each fold the weights of a tile
        assert sorted(n for n in made["uploads"] if n > tables) == sorted([4 * voxels] + [2 * patch, 4 * patch] * 2)
        assert sorted(made["downloads"]) == [24, 32, voxels]
        tiles = made["kernels"]["gather"]
        assert made["calls"]["cuGraphLaunch"] == tiles - 2  # the first of each fold is put on the stream by itself

    def test_files_overlap(self, gpu: EmulatedGpu, bundle: Path, tmp_path: Path) -> None:
        """Reading, network and writing in threads of their own, each case on its stream."""
        for seed in range(3):
            array = smooth_noise((18, 23, 25 + seed), seed, border=2)
            write_image(array, tmp_path / "in" / f"c{seed}_0000.nii.gz", (1.1, 1.3, 0.8))
        for place in ("cpu", "gpu"):
            assert gpu.run(*words(tmp_path / "in", tmp_path / place, bundle), FASTNNUNET_STAGES=place).returncode == 0
        for seed in range(3):
            np.testing.assert_array_equal(*(read(tmp_path / place / f"c{seed}.nii.gz") for place in ("cpu", "gpu")))

    def test_what_stays_on_the_cpu_is_told(self, gpu: EmulatedGpu, image: Path, tmp_path: Path) -> None:
        masked = bundle_of(Scenario(toy=Toy(use_mask=True)), tmp_path / "masked")
        fixed = bundle_of(Scenario(toy=Toy(), changes={"batch_size": 2}), tmp_path / "fixed")
        for bundle, said in (
            (masked, "preprocessing stays on the CPU: the model normalises inside a mask"),
            (fixed, "what comes before and after the network stays on the CPU: the model takes batches of one size"),
        ):
            done = gpu.run(*words(image, tmp_path / "out.nii.gz", bundle))
            assert done.returncode == 0
            assert done.stderr.startswith(said)

    def test_the_plugin_for_tensorrt(self, gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path) -> None:
        """Compiled with a stand-in for TensorRT's header, on a library that computes what the emulated network does."""
        of_both = shutil.copytree(bundle, tmp_path / "bundle")
        spec = load_bundle_spec(of_both)
        for name in spec.model_files:
            digest, folder = spec.files[name], of_both / "engines" / name
            folder.mkdir(parents=True)
            plan = f"{digest} 1 {spec.num_heads} 3 2"
            (folder / "engine.plan").write_text(plan)
            key = {
                "model_sha256": digest, "recipe": 1, "precision": "fp32", "library": "tensorrt",
                "library_version": "10.14.0", "architecture": "sm86", "max_batch": 2,
                "input_shape": [1, *spec.patch_size], "output_shape": [spec.num_heads, *spec.patch_size],
                "smallest_tile": None,
            }  # fmt: skip
            engine_json = {"key": key, "plan_sha256": sha256(plan.encode()).hexdigest()}
            (folder / "engine.json").write_text(json.dumps(engine_json))
        labels = []
        for number, (plugins, place) in enumerate([(gpu.plugins, "cpu"), (gpu.tensorrt, "cpu"), (gpu.tensorrt, "gpu")]):
            out = tmp_path / f"{number}.nii.gz"
            done = gpu.run(
                *words(image, out, of_both),
                FASTNNUNET_PLUGINS=str(plugins),
                FASTNNUNET_TENSORRT=str(gpu.folder / "libnvinfer.so"),
                FASTNNUNET_STAGES=place,
                FASTNNUNET_EMULATED_LOG=str(tmp_path / "log.json"),
            )
            assert done.returncode == 0, done.stderr
            labels.append(read(out))
        np.testing.assert_array_equal(labels[1], labels[0])
        np.testing.assert_array_equal(labels[2], labels[0])
        assert json.loads((tmp_path / "log.json").read_text())["calls"]["cuGraphLaunch"] > 1


class TestTrouble:
    def test_no_gpu(self, gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.nii.gz"
        none = gpu.run(*words(image, out, bundle), FASTNNUNET_EMULATED_GPUS="0")
        no_driver = gpu.run(*words(image, out, bundle), LD_LIBRARY_PATH=str(tmp_path))
        another = gpu.run(*words(image, out, bundle, "-device", "cuda:3"))
        for done, said in (
            (none, "CUDA_ERROR_NO_DEVICE"),
            (no_driver, "there is no libcuda.so.1"),
            (another, "this process sees 1 GPU(s)"),
        ):
            assert done.returncode == 2
            assert done.stderr.startswith("error: -device cuda")
            assert "needs an NVIDIA GPU with a current driver: " in done.stderr
            assert said in done.stderr
            assert "give -device cpu" in done.stderr
        assert not out.exists()

    @pytest.mark.skipif(
        "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime is one for GPUs"
    )
    def test_onnxruntime_for_cpus(self, gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path) -> None:
        given = words(image, tmp_path / "out.nii.gz", bundle)[:-1]
        done = gpu.run(*given, "onnxruntime", "-device", "cuda")
        assert done.returncode == 2
        assert " offers " in done.stderr
        assert "CPUExecutionProvider, expected CUDAExecutionProvider too\ninstall the one for GPUs" in done.stderr

    def test_every_failing_call_is_told(self, gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path) -> None:
        out, log = tmp_path / "out.nii.gz", tmp_path / "log.json"
        assert gpu.run(*words(image, out, bundle), FASTNNUNET_EMULATED_LOG=str(log)).returncode == 0
        expected = read(out)
        out.unlink()
        calls = json.loads(log.read_text())["calls"]
        del calls["cuLaunchHostFunc"]  # of the emulated network
        of_the_end = {"cuMemFreeAsync", "cuEventDestroy", "cuStreamDestroy", "cuGraphDestroy", "cuGraphExecDestroy"}
        assert set(calls) - of_the_end >= {"cuLaunchKernel", "cuStreamSynchronize", "cuGraphLaunch", "cuMemAllocAsync"}
        for name in sorted(set(calls) - of_the_end):
            done = gpu.run(*words(image, out, bundle), FASTNNUNET_EMULATED_FAIL=f"{name}:{calls[name]}:700")
            if done.returncode == 0:  # the kernels cannot be had
                assert name in ("cuModuleLoadData", "cuModuleGetFunction", "cuDeviceGet", "cuDeviceGetAttribute",
                                "cuDevicePrimaryCtxRetain"), name  # fmt: skip
                assert "what comes before and after the network stays on the CPU: the GPU failed" in done.stderr
                np.testing.assert_array_equal(read(out), expected)
                out.unlink()
                continue
            assert done.returncode == 2, f"{name}: {done.stderr}"
            assert "CUDA_ERROR_ILLEGAL_ADDRESS" in done.stderr, name
            assert not out.exists()

    def test_too_little_memory_for_the_image(self, gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.nii.gz"
        done = gpu.run(*words(image, out, bundle), FASTNNUNET_EMULATED_BYTES="20000")
        assert done.returncode == 2
        assert "the GPU has not enough memory: 1 MiB are needed at once, " in done.stderr
        assert "close other programs that use it, or predict with -device cpu" in done.stderr
        assert not out.exists()

    def test_too_little_memory_for_large_tiles(self, gpu: EmulatedGpu, tmp_path: Path) -> None:
        """One pass goes on with smaller ones: where the network finds none, and where its batches do not."""
        scenario = Scenario(toy=Toy(resampling=NO_RESAMPLING), shape=(29, 34, 43), one_pass=True)
        job = job_of(scenario, bundle_of(scenario, tmp_path / "bundle"), tmp_path)
        (whole,) = gpu.predict([job], tmp_path / "whole", FASTNNUNET_EMULATED_LOG=str(tmp_path / "log.json"))
        peak = json.loads((tmp_path / "log.json").read_text())["peak_bytes"]
        (network,) = gpu.predict([job], tmp_path / "network", FASTNNUNET_EMULATED_VOXELS="12000")
        (batches,) = gpu.predict([job], tmp_path / "batches", FASTNNUNET_EMULATED_BYTES=str(peak * 7 // 10))
        for smaller in (network, batches):
            np.testing.assert_array_equal(smaller["labels"], whole["labels"])
            assert smaller["heard"][-1, 1] > whole["heard"][-1, 1]

    def test_kernels_that_cannot_be_had_leave_the_rest_on_the_cpu(
        self, gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path
    ) -> None:
        plugins = shutil.copytree(gpu.plugins, tmp_path / "plugins")
        (plugins / "kernels.sha256").write_text("0 kernels.cu\n")  # of other sources
        out = tmp_path / "out.nii.gz"
        done = gpu.run(
            *words(image, out, bundle),
            FASTNNUNET_PLUGINS=str(plugins), FASTNNUNET_NVRTC=str(tmp_path / "none"),
            FASTNNUNET_CACHE_HOME=str(tmp_path / "cache"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(
            "what comes before and after the network stays on the CPU: the CUDA kernels have to be compiled, and NVRTC "
            "is missing"
        )
        beside_sources = tmp_path / "engine" / "cuda"
        beside_sources.mkdir(parents=True)
        for name in ("kernels.fatbin", "kernels.sha256"):
            shutil.copy(gpu.plugins / name, beside_sources)
        again = gpu.run(*words(image, tmp_path / "gpu.nii.gz", bundle), FASTNNUNET_PLUGINS=str(plugins))
        assert "stays on the CPU" not in again.stderr
        np.testing.assert_array_equal(read(out), read(tmp_path / "gpu.nii.gz"))

    def test_logits_beyond_float16_and_colours_that_are_none(self, gpu: EmulatedGpu, tmp_path: Path) -> None:
        scenarios = {
            "float16": Scenario(toy=Toy(schemes=["NoNormalization"])),
            "colours": Scenario(toy=Toy(schemes=["RGBTo01Normalization"])),
        }
        jobs = []
        for name, scenario in scenarios.items():
            jobs.append(job_of(scenario, bundle_of(scenario, tmp_path / name), tmp_path / name))
            np.save(jobs[-1]["image"], image_of(scenario) * 1e4)
        on_cpu = gpu.predict(jobs, tmp_path / "cpu", FASTNNUNET_STAGES="cpu")
        on_gpu = gpu.predict(jobs, tmp_path / "gpu")
        for cpu, one, said in zip(on_cpu, on_gpu, ("left the range of float16", "colour values"), strict=True):
            assert said in str(cpu["error"])
            assert str(one["error"]).split(": got")[0] == str(cpu["error"]).split(": got")[0]
            assert one["status"] == cpu["status"]


def test_nvrtc_compiles_the_sources_in_the_engine(gpu: EmulatedGpu, bundle: Path, image: Path, tmp_path: Path) -> None:
    """For the GPU that is there; what is made is kept, and has every kernel."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
    found = [file for folder in folders for file in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    if not found:
        pytest.skip("NVRTC is not installed")
    plugins = shutil.copytree(gpu.plugins, tmp_path / "plugins")
    (plugins / "kernels.fatbin").unlink()
    done = gpu.run(
        *words(image, tmp_path / "out.nii.gz", bundle),
        FASTNNUNET_PLUGINS=str(plugins), FASTNNUNET_NVRTC=str(found[0]), FASTNNUNET_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cuModuleLoadData failed: CUDA_ERROR_INVALID_VALUE" in done.stderr  # the emulated driver loads none
    (kept,) = (tmp_path / "cache" / "cuda").iterdir()
    digest, code = kept.read_bytes()[:64], kept.read_bytes()[64:]
    assert sha256(code).hexdigest().encode() == digest
    assert code.startswith(b"\x7fELF")
    for name in re.findall(r"FNN_KERNEL\((\w+), \w+Params", (emulated_gpu.CUDA / "kernels.hpp").read_text()):
        assert f"fastnnunet_{name}".encode() in code, name


def test_the_driver_is_declared_as_in_cuda_h(tmp_path: Path) -> None:
    """Sizes of the arguments of every function that is used, and the numbers."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
    headers = [file for place in places for file in place.glob("*/include/cuda.h")]
    headers += [file for file in [Path("/usr/local/cuda/include/cuda.h")] if file.is_file()]
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if not headers or compiler is None:
        pytest.skip("no cuda.h, or no C++ compiler")
    (tmp_path / "check.cpp").write_text(
        """#include <cuda.h>
#include <type_traits>
#include "backends/cuda_driver.hpp"
template <class A, class B>
constexpr bool alike = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <class... A, class... B>
constexpr bool same(CUresult (*)(A...), int (*)(B...)) {
    if constexpr (sizeof...(A) == sizeof...(B)) return (alike<A, B> && ...);
    return false;
}
using namespace fastnnunet::engine;
#define CHECK(name, symbol, arguments) \\
    static_assert(same(static_cast<decltype(&symbol)>(nullptr), decltype(CudaDriver::name)(nullptr)), #symbol);
FNN_DRIVER_FUNCTIONS(CHECK)
static_assert(CudaDriver::kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY &&
              CudaDriver::kNoTiming == CU_EVENT_DISABLE_TIMING &&
              CudaDriver::kMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR &&
              CudaDriver::kMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR &&
              CudaDriver::kNonBlocking == CU_STREAM_NON_BLOCKING &&
              CudaDriver::kCaptureInThread == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
"""
    )
    command = [
        compiler,
        "-std=c++17",
        "-fsyntax-only",
        "-I",
        str(headers[0].parent),
        "-I",
        str(engine.NATIVE / "engine"),
    ]
    done = subprocess.run([*command, str(tmp_path / "check.cpp")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
