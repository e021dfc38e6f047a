"""What the server of tests/forked.py imports: what most processes of the tests do, but nothing of ours or nnU-Net's.

nnU-Net takes its folders from the environment when it is imported, and each process has an environment of its own.
"""

import contextlib
import importlib
import multiprocessing.forkserver as forkserver
import multiprocessing.resource_tracker
import multiprocessing.spawn as spawn
import os
import warnings
from typing import Any

from tests import forked, graphs

LIBRARIES = (
    "acvl_utils.cropping_and_padding.bounding_boxes", "batchgenerators.utilities.file_and_folder_operations",
    "batchgeneratorsv2.transforms.utils.compose", "blosc2", "dask.distributed",
    "dynamic_network_architectures.architectures.unet", "google_crc32c", "isal.igzip", "matplotlib.pyplot",
    "nibabel", "numcodecs", "onnx", "onnxruntime", "onnxscript", "openvino", "pandas", "PIL.Image", "rich.progress",
    "scipy.interpolate", "scipy.ndimage", "scipy.stats", "seaborn", "SimpleITK", "skimage.measure",
    "skimage.transform", "tifffile", "timm", "torch", "torch._dynamo", "torch.onnx._internal.exporter._core",
    "torch.utils.tensorboard", "tqdm", "typer", "yaml", "zarr",
)  # fmt: skip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # of one that is optional; tests that need it say so
            importlib.import_module(library)
graphs.list_operators_once()

prepare_as_spawned = spawn.prepare


def prepare(data: dict[str, Any]) -> None:
    """In a new process: the environment and the output of the process that asked for it; it asks the same server."""
    for place, of_parent in enumerate(data["output"], start=1):
        os.dup2(of_parent, place)
        os.close(of_parent)
    os.environ.clear()
    os.environ.update(data["environment"])
    forkserver._forkserver.ensure_running = multiprocessing.resource_tracker.ensure_running
    forked.install()
    prepare_as_spawned(data)


spawn.prepare = prepare
