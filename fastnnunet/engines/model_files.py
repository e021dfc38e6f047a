"""Which file of a bundle an engine loads."""

import shlex
from pathlib import Path

from fastnnunet.engines.base import Precision
from fastnnunet.errors import BackendError
from fastnnunet.specs.bundle import BundleSpec, int8_file

INT8_ENDINGS = {"onnxruntime": ".onnx", "openvino": ".xml"}  # of the files these load for int8


def model_path(bundle_dir: Path, spec: BundleSpec, precision: Precision, backend: str) -> Path:
    """The file a backend loads, for int8 its quantised twin. Raises BackendError when the bundle has none."""
    if precision != "int8":
        return bundle_dir / spec.model_file
    names = {name: int8_file(spec.model_file, ending) for name, ending in INT8_ENDINGS.items()}
    if names[backend] not in spec.files:
        others = [name for name, file in names.items() if file in spec.files]
        raise BackendError(
            f"this bundle has no int8 model for {backend}: {names[backend]} is missing\n"
            f"make it: fastnnunet export quantize {shlex.quote(str(bundle_dir))} --precision int8 --backend {backend}"
            + (f"\nor predict with --backend {others[0]}, which has one" if others else "")
        )
    return bundle_dir / names[backend]
