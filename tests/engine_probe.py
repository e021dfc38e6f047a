"""The engine's image files, compiled once and asked over a pipe what they read and write."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import engine


def images_probe(*options: str, folder: Path = engine.BUILD) -> Path:
    """The program, brought up to date in a build of the engine; the test is skipped where none can be built."""
    engine.build("images_probe", folder, *options)
    return folder / "engine" / "images" / "images_probe"


class Probe:
    """A running `images_probe`."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._voxels, self._labels = folder / "voxels", folder / "labels"
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0

    def ask(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*words, sep="\t", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the probe ended with {self._process.wait(timeout=60)}: {words}"
        return json.loads(line)

    def read(self, reader: str, *files: Path, segmentation: bool = False) -> tuple[np.ndarray, dict[str, Any]] | str:
        """Image (C, z, y, x) and what was told of it, or the message of the refusal."""
        return self._told(self.ask("segmentation" if segmentation else "read", reader, self._voxels, *files))

    def series(self, reader: str, folder: Path, uid: str = "") -> tuple[np.ndarray, dict[str, Any]] | str:
        """As `read`, of a folder of DICOM files."""
        return self._told(self.ask("series", reader, self._voxels, uid, folder))

    def _told(self, told: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]] | str:
        if "refused" in told:
            return told["refused"]
        return np.fromfile(self._voxels, np.float32).reshape(told["shape"]), told

    def write(self, reader: str, labels_ZYX: np.ndarray, out: Path, *files: Path) -> str | None:
        """None, or the message of the refusal. Labels as uint8 or uint16."""
        self._labels.write_bytes(labels_ZYX.tobytes())
        return self.ask("write", reader, labels_ZYX.dtype.name, self._labels, out, *files).get("refused")


def with_gdcm(folder: Path) -> Path:
    """`images_probe` with GDCM; the test is skipped where its headers are not."""
    if not list(Path("/usr/include").glob("gdcm-*")):
        pytest.skip("no GDCM to build the engine with (Debian: libgdcm-dev)")
    return images_probe("-DFASTNNUNET_GDCM=ON", folder=folder)
