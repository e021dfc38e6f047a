"""The script that measures the kernels on a GPU: here on one whose kernels run on the CPU, and where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.measure.predict import device_campaign
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
    monkeypatch.setattr(device_campaign, "engines_part", lambda index: {})  # tests/test_device_stages.py has engines
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


def test_kernels_on_the_gpu_of_this_machine(tmp_path: Path) -> None:
    """All of it, where there is a GPU."""
    from fastnnunet.engines.devices import cuda_device_count

    if cuda_device_count() == 0:
        pytest.skip("no GPU")
    args = device_campaign.parser().parse_args(["-o", str(tmp_path / "record.json"), "--shape", "60", "200", "200"])
    assert device_campaign.campaign(args) == 0, (tmp_path / "record.json").read_text()
