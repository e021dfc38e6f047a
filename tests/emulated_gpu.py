"""A GPU for the C++ engine where there is none (native/engine/cuda/emulation): a driver whose kernels run on the CPU,
and a network under the name of TensorRT."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tests import engine

CUDA = engine.NATIVE / "engine" / "cuda"


@dataclass
class EmulatedGpu:
    """Folders of plugins hold what stands for the kernels' machine code, too."""

    folder: Path  # of the libraries
    plugins: Path  # with the network
    tensorrt: Path  # with the plugin for TensorRT
    program: Path

    def environment(self, **variables: str) -> dict[str, str]:
        found = {**engine.environment(), "FASTNNUNET_PLUGINS": str(self.plugins)}
        places = [str(self.folder), found.get("LD_LIBRARY_PATH", "")]
        return {**found, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, places)), **variables}

    def run(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """The program, with these variables of the environment."""
        command = list(map(str, (self.program, *words)))
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(**variables), check=False)

    def predict(self, jobs: list[dict[str, Any]], where: Path, **variables: str) -> list[dict[str, Any]]:
        """What comes of each job (tests/engine_worker.py)."""
        where.mkdir(parents=True)
        for number, job in enumerate(jobs):
            job["out"] = str(where / f"{number}.npz")
        (where / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [sys.executable, "-m", "tests.engine_worker", str(where / "jobs.json")],
            cwd=engine.CHECKOUT,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return [dict(np.load(job["out"])) for job in jobs]


def build(where: Path) -> EmulatedGpu:
    """Built where the engine is. Skips where nothing can be."""
    engine.build()
    folder = engine.build("emulated_gpu") / "emulated"
    sources = sorted([*CUDA.glob("*.hpp"), *CUDA.glob("*.cu")])
    lines = [f"{sha256(source.read_bytes()).hexdigest()}  {source}\n" for source in sources]
    plugins = []
    for name in ("network", "tensorrt"):
        plugins.append(where / name)
        plugins[-1].mkdir()
        shutil.copy(folder / f"libemulated_{name}.so", plugins[-1] / "libfastnnunet_tensorrt.so")
        (plugins[-1] / "kernels.fatbin").write_bytes(b"emulated")
        (plugins[-1] / "kernels.sha256").write_text("".join(lines))
    return EmulatedGpu(folder, *plugins, engine.BUILD / "bin" / "fastnnunet-engine")
