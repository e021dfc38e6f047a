"""model.onnx -> a quantised model in OpenVINO's own format, by NNCF.

OpenVINO also reads Q/DQ graphs, but computes something else of them than ONNX Runtime (on the hippocampus students it
loses more Dice), and NNCF corrects the biases for what quantisation shifts.
"""

import contextlib
import io
import logging
import os
from importlib.util import find_spec
from pathlib import Path

from fastnnunet.engines.openvino import import_openvino, shared_core
from fastnnunet.errors import BackendError, MismatchError
from fastnnunet.events import Listener, ignore
from fastnnunet.export.patches import CalibrationBatches, Patches


def check_openvino_quantizer() -> None:
    """Raise BackendError, naming the extra, when NNCF or OpenVINO is not installed."""
    missing = [name for name in ("nncf", "openvino") if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"the int8 model for OpenVINO is made by NNCF; not installed: {', '.join(missing)}\n"
            "install it: pip install 'fastnnunet[quantize]', or leave OpenVINO out with --backend onnxruntime"
        )


def quantize_openvino(
    model_file: Path,
    patches_NCX: Patches,
    out: Path,
    *,
    batch_size: int = 1,
    progress: Listener = ignore,
) -> None:
    """Calibrate `model_file` on float32 patches (N, C, *patch); write `out` (.xml) and its weights beside it (.bin).

    `batch_size`: what the model takes at once; patches beyond the last full batch are not used.
    Raises MismatchError when NNCF cannot quantise the model.
    """
    # it would report each use to its makers, without asking
    os.environ.setdefault("NNCF_CI", "1")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # imported by it where there is a torch
    import nncf

    batches = CalibrationBatches(patches_NCX, batch_size, progress)
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own set_log_level changes handlers of others too
    model = shared_core().read_model(str(model_file))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its own progress bar
            quantized = nncf.quantize(
                model,
                nncf.Dataset(batches),
                preset=nncf.QuantizationPreset.MIXED,  # activations behind a leaky ReLU are not symmetric
                subset_size=len(batches),
            )
    except (RuntimeError, nncf.UnsupportedModelError, nncf.ValidationError, nncf.InternalError) as e:
        raise MismatchError(f"NNCF cannot quantise {model_file}: {e}") from e
    import_openvino().save_model(quantized, str(out), compress_to_fp16=False)
