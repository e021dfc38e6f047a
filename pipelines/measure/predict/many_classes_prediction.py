"""Peak memory of one whole prediction of 105 classes, an image of 512 x 512 x 300 voxels in, a label map out.

    python -m pipelines.measure.predict.many_classes_prediction -o record.json
    python -m pipelines.measure.predict.many_classes_prediction --one-pass -o record.json

`fastnnunet predict` runs in a process of its own on a generated CT, with ONNX Runtime; its highest resident set (VmHWM,
read from /proc, so on Linux) includes Python, libraries, image, network and label map. The network has two
convolutions, since only the logits count here: a real one adds its weights and activations, which do not depend on the
image. nnunetv2's side is arithmetic, read off nnU-Net 2.8: float16 logits of the network's grid, float16 logits of the
image, float32 logits of one patch; its Python, libraries and image are not in it.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.geometry.chunked_window import streamed_window
from fastnnunet.geometry.resample import resampled_shape
from fastnnunet.runtime.label_stream import MARGIN
from fastnnunet.specs.bundle import ONE_PASS_FORMAT, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file
from fastnnunet.specs.one_pass import OnePass
from pipelines.measure.head import arguments, header, put
from pipelines.measure.predict.pre_post_speed import SHAPE, SPACING_MM, TARGET_MM, load_image, spec_of

CLASSES, PATCH = 105, (128, 128, 128)
LIMIT_BYTES = 4 * 2**30
HALO, MULTIPLES, FLOAT32 = (32, 32, 32), (32, 32, 32), 4
_CHILD = """
import sys
from fastnnunet.cli.main import main
from fastnnunet.runtime import loaded
if sys.argv[1] != "default":
    loaded.STREAM_BYTES = int(sys.argv[1])
try:
    main(sys.argv[2:])
except SystemExit as done:
    if done.code:
        raise
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def make_bundle(folder: Path, classes: int, patch: Sequence[int], one_pass: bool = False) -> Path:
    """A bundle of a network of two convolutions, 8 channels between them; every class wins somewhere.

    `one_pass`: it is predicted so, with the halo and the strides of the network of six stages whose memory it has.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.5, (8, 1, 3, 3, 3)),
        "b1": rng.normal(0, 1, 8),
        "w2": rng.normal(0, 1, (classes, 8, 1, 1, 1)),
        "b2": rng.normal(0, 1, classes),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], pads=[1] * 6),
        helper.make_node("LeakyRelu", ["c1"], ["a1"], alpha=0.01),
        helper.make_node("Conv", ["a1", "w2", "b2"], ["logits"]),
    ]
    space = ["z", "y", "x"] if one_pass else patch
    rules = OnePass(halo=HALO, multiples=MULTIPLES, halo_is="measured", bytes_per_voxel=FLOAT32 * (1 + 2 * 8 + classes))
    graph = helper.make_graph(
        nodes,
        "two_convolutions",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, *space])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes, *space])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(folder / "model.onnx")
    )
    digests = {"model.onnx": sha256_of_file(folder / "model.onnx")}
    architecture = {"network_class_name": "none", "arch_kwargs": {}, "_kw_requires_import": []}  # no torch here
    spec = replace(
        spec_of(classes), name="two_convolutions", patch_size=tuple(patch), files=digests, architecture=architecture
    )
    if one_pass:
        spec = replace(spec, one_pass=rules, format_version=ONE_PASS_FORMAT)
    write_bundle_json(spec, folder / "bundle.json")
    return folder


def write_ct(file: Path, shape: Sequence[int]) -> None:
    """int16 Hounsfield units with the spacing of the benchmark."""
    import SimpleITK as sitk

    image, _ = load_image(None, shape)
    picture = sitk.GetImageFromArray(np.round(image[0]).astype(np.int16))
    picture.SetSpacing(SPACING_MM[::-1])
    sitk.WriteImage(picture, str(file), True)


def predict(folder: Path, out: Path, threads: int | None, stream_bytes: int | None = None) -> tuple[int, str]:
    """Peak bytes of a process that predicts the image at `folder`, and what it printed."""
    words = ["predict", "-i", folder / "ct_0000.nii.gz", "-o", out, "-m", folder / "bundle", "--backend", "onnxruntime"]
    words += ["--disable_progress_bar", *(["--threads", threads] if threads else [])]
    limit = "default" if stream_bytes is None else stream_bytes
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, (limit, *words))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    *printed, peak = done.stdout.strip().splitlines()  # VmHWM:  3117752 kB
    return 1024 * int(peak.split()[1]), "\n".join(printed)


def measure(
    shape: Sequence[int] = SHAPE,
    classes: int = CLASSES,
    patch: Sequence[int] = PATCH,
    threads: int | None = None,
    compare: bool = False,
    one_pass: bool = False,
) -> dict[str, Any]:
    """The record, of the window or of one pass.

    `compare`: predict a second time with all logits kept, whose labels must be the same.
    """
    import SimpleITK as sitk

    grid = resampled_shape(shape, SPACING_MM, TARGET_MM)
    chunks = streamed_window(grid, patch, 0.5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_bundle(folder / "bundle", classes, patch, one_pass)
        write_ct(folder / "ct_0000.nii.gz", shape)
        peak_bytes, printed = predict(folder, folder / "ct.nii.gz", threads, 0 if compare else None)
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "ct.nii.gz")))
        kept: dict[str, Any] = {}
        if compare:
            kept_bytes, _ = predict(folder, folder / "kept.nii.gz", threads, 2**62)
            other = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "kept.nii.gz")))
            kept = {"peak_bytes_all_logits_kept": kept_bytes, "labels_equal": bool((labels == other).all())}
    float16 = 2
    nnunet = {
        "logits_of_the_grid": float16 * classes * prod(grid),
        "logits_of_the_image": float16 * classes * prod(shape),
        "logits_of_a_patch": FLOAT32 * classes * prod(patch),
    }
    return {
        **header("peak resident memory of `fastnnunet predict`, one image, a process of its own"),
        "image": f"{tuple(shape)} at {SPACING_MM} mm, generated, int16 .nii.gz",
        "grid": f"{tuple(grid)} at {TARGET_MM} mm",
        "classes": classes,
        "classes_in_the_label_map": len(np.unique(labels)),
        "patch": tuple(patch),
        "way": "one pass" if one_pass else "window",
        **({"halo": HALO, "multiples": MULTIPLES} if one_pass else {"tiles": len(chunks.tiles)}),
        "network": "Conv 3x3x3 to 8 channels, LeakyReLU, Conv 1x1x1 to the classes; ONNX Runtime, float32",
        "peak_bytes": peak_bytes,
        "peak_gib": round(peak_bytes / 2**30, 3),
        "limit_bytes": LIMIT_BYTES,
        "within_limit": peak_bytes <= LIMIT_BYTES,
        **({} if one_pass else {"sums_of_the_window_bytes": float16 * classes * chunks.peak_voxels(MARGIN)}),
        "logits_of_a_patch_bytes": nnunet["logits_of_a_patch"],
        **kept,
        "nnunetv2_bytes": {
            "formula": "2 C grid + 2 C image + 4 C patch, C classes, voxels of each",
            **nnunet,
            "total": sum(nnunet.values()),
        },
        "printed": printed.replace(name, "FOLDER"),
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--one-pass", action="store_true", help="instead of the window")
    args = parser.parse_args()
    record = measure(threads=args.threads, one_pass=args.one_pass)
    put(record, args.o)
    print(
        f"{record['peak_gib']} GiB; nnunetv2 {record['nnunetv2_bytes']['total'] / 2**30:.1f} GiB\n{record['printed']}"
    )
