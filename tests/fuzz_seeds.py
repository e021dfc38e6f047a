"""Inputs for the engine's fuzzers to begin with: `python -m tests.fuzz_seeds FOLDER`."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests import hostile
from tests.bundles import Toy, make_toy_model
from tests.dicom_files import write_series
from tests.test_locate import give_locator

# as fastnnunet/native/engine/fuzz/images.cpp counts them: kind of seed -> formats and readers
WAYS = {
    **dict.fromkeys(("nifti", "nifti scaled", "nifti float", "nifti 2d", "nifti 4d", "nib two"), (0, 2, 4)),
    **dict.fromkeys(("nifti gz", "nifti scaled gz"), (1, 3)),
    **dict.fromkeys(("mha", "mha zlib"), (5,)),
    **dict.fromkeys(("nrrd", "nrrd gz"), (6, 7)),
    **dict.fromkeys(("picture png", "picture png rgb", "picture png palette"), (8,)),
}


def dicom_series() -> Iterator[bytes]:
    """Files of small series as `fuzz/dicom.cpp` divides them; one slice alone too."""
    stored = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    kinds = ({}, {"rescale": [(1.5, -1000)]}, {"orientation": (0, 1, 0, 0, 0, -1)}, {"compressed": True})
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            files = [file.read_bytes() for file in write_series(Path(scratch), stored, **kind)]
        yield b"SLICE".join(files)
        yield files[0]


def main(folder: Path) -> None:
    for name in ("images", "bundle", "dicom"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        seeds = hostile.seeds(Path(scratch))
    for kind, ways in WAYS.items():
        (content,) = seeds[kind].values()
        for way in ways:
            (folder / "images" / f"{kind} {way}".replace(" ", "-")).write_bytes(content + bytes([way]))
    for number, content in enumerate(dicom_series()):
        (folder / "dicom" / f"series{number}").write_bytes(content)
    for number, toy in enumerate((Toy(), Toy(dims=2, spacing=(1.0, 1.0)), Toy())):
        with tempfile.TemporaryDirectory() as scratch:
            bundle = make_toy_model(toy, Path(scratch)).bundle
            if number == 2:
                give_locator(bundle, margin_mm=3)
            (folder / "bundle" / f"document{number}").write_bytes((bundle / "bundle.json").read_bytes() + b"d")
            (folder / "bundle" / f"model{number}").write_bytes((bundle / "model.onnx").read_bytes() + b"m")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
