"""The script that measures the kernels on a GPU: here on one whose kernels run on the CPU, and where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.measure.predict import device_campaign
from tests import emulated_gpu
from tests.bundles import Toy, make_toy_model, smooth_noise
from tests.fake_kernels import use_fake_cuda


def test_without_a_gpu_it_refuses_with_one_message(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, "-m", device_campaign.__name__, "-o", str(record)],
        cwd=device_campaign.CHECKOUT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert "the device campaign needs an NVIDIA GPU, and there is none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not record.exists()


def test_the_record_tells_what_is_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = use_fake_cuda(monkeypatch)
    monkeypatch.setattr(device_campaign, "kernel_code", lambda architecture: b"emulated")
    monkeypatch.setattr(device_campaign, "engines_part", lambda *_: {})  # tests/test_device_stages.py has engines
    monkeypatch.setattr(device_campaign, "tests_part", lambda left_s: {"passed": left_s > 0, "says": []})
    arguments = ["-o", str(tmp_path / "record.json"), "--shape", "9", "21", "33", "--repeat", "1"]
    args = device_campaign.parser().parse_args(arguments)
    assert device_campaign.campaign(args) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["passed"]
    assert record["gpu"] == {"name": "Fake GPU", "architecture": "sm86", "memory_bytes": 1 << 30}
    assert len(record["stages"]) == 7
    assert all(stage["equal"] for stage in record["stages"].values())

    scale = cuda.driver.cuLaunchKernel  # a kernel that does nothing is found out
    monkeypatch.setattr(cuda.driver, "cuLaunchKernel", lambda name, *a: (0,) if name == "scale" else scale(name, *a))
    assert device_campaign.campaign(args) == 1
    record = json.loads((tmp_path / "record.json").read_text())
    assert [name for name, stage in record["stages"].items() if not stage["equal"]] == ["z-score"]


def test_the_engine_in_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program on the emulated GPU: equal labels and times, or what it says."""
    gpu = emulated_gpu.build(tmp_path)
    for variable, value in gpu.environment().items():
        monkeypatch.setenv(variable, value)
    bundle = make_toy_model(Toy(mirror_axes=(0,)), tmp_path).bundle
    image = (smooth_noise((18, 23, 29), 1, border=3), (1.2, 0.9, 0.8))

    def measured() -> dict[str, object]:
        return device_campaign.program_part(gpu.program, bundle, "tensorrt", 0, image, 1, (12, 20, 24))

    part = measured()
    assert part["labels_equal"], part
    assert min(part[f"{place}_{what}_ms"] for place in ("cpu", "gpu") for what in ("infer", "wall")) > 0
    monkeypatch.setenv("FASTNNUNET_EMULATED_FAIL", "cuModuleLoadData:1:700")
    part = measured()
    assert not part["labels_equal"]
    assert "stays on the CPU" in part["error"]
    missing = device_campaign.program_part(tmp_path / "none", bundle, "tensorrt", 0, image, 1)
    assert "make engine builds it" in missing["not run"]


def test_kernels_on_the_gpu_of_this_machine(tmp_path: Path) -> None:
    """All of it, where there is a GPU."""
    from fastnnunet.engines.devices import cuda_device_count

    if cuda_device_count() == 0:
        pytest.skip("no GPU")
    args = device_campaign.parser().parse_args(["-o", str(tmp_path / "record.json"), "--shape", "60", "200", "200"])
    assert device_campaign.campaign(args) == 0, (tmp_path / "record.json").read_text()
