"""A CT of 512 x 512 x 300 voxels in one pass and in nnU-Net's window: students r=4 with batch and with instance norm.

    python -m pipelines.measure.predict.one_pass --image CT.nii.gz -o record.json

Image and networks as in `large_volume.py`: six stages, lite, random weights under which all labels occur. They decide
no time, and no accuracy is claimed. Each arm is a process of its own, image file in and label file out, the first run
not counted; its highest resident set (VmHWM) is that of all runs. Arms take turns, so that a machine that others use is
as slow for each.

window, instance norm   the path until now
window, batch norm      the same window, a network that needs none
one pass, batch norm    few tiles; `--passes` also shifted passes

nnunetv2                nnU-Net's network of one fold, of which three passes over a patch are timed in between: the
                        passes of one fold and of five with mirrors are counted and their time is extrapolated,
                        nothing else that nnU-Net does is in it

`agreement_with_whole` is parity: the share of voxels with the label that PyTorch gives of the whole image at once.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.engines.registry import available_cores
from fastnnunet.export.bundle import export_bundle
from fastnnunet.geometry.grid import tile_starts
from fastnnunet.geometry.resample import resampled_shape
from fastnnunet.images.io import image_io
from fastnnunet.nnunet.student.plans import student_architecture
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.student import StudentSpec
from pipelines.measure.head import arguments, header, put
from pipelines.measure.predict.large_volume import (
    CLASSES,
    CONFIGURATION,
    ENSEMBLE_FOLDS,
    FEATURES,
    MIRRORED_PASSES,
    PATCH,
    read_labels,
    teacher_plans,
    write_case,
    write_model,
)
from pipelines.measure.predict.pre_post_speed import SHAPE, SPACING_MM, TARGET_MM, load_image

CHILD = """
import json, sys
from pathlib import Path
from fastnnunet.images.cases import Case
from fastnnunet.runtime.predict import Predictor
asked = json.loads(sys.argv[1])
predictor = Predictor.load(Path(asked["bundle"]), asked["backend"], mirroring=False, **asked["options"])
case, out = Case("ct", (Path(asked["image"]),)), Path(asked["out"])
times = [predictor.predict_case(case, out).times for _ in range(asked["runs"])]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
stages = [{s: getattr(t, s + "_s") for s in ("read", "preprocess", "infer", "postprocess", "write")} for t in times]
print(json.dumps({"stages_s": stages, "peak_bytes": 1024 * int(peak.split()[1]), "described": predictor.describe()}))
"""

PASS = """
import json, sys
from time import perf_counter
import torch
from fastnnunet.nnunet.files.model import build_network, model_of
from pipelines.measure.predict.large_volume import CLASSES, CONFIGURATION, _dataset_json, teacher_plans, toy_of
features, patch, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
network = build_network(model_of(teacher_plans(features, patch), CONFIGURATION, _dataset_json(toy_of(CLASSES)))).eval()
image, times = torch.zeros(1, 1, *patch), []
with torch.inference_mode():
    for _ in range(4):
        start = perf_counter()
        network(image)
        times.append(perf_counter() - start)
print(json.dumps(times[1:]))
"""


def batchnorm(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans with batch norm."""
    plans = json.loads(json.dumps(plans))
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    return plans


def whole_labels(bundle: Path, model: Path, image_file: Path) -> np.ndarray:
    """Labels by PyTorch on the whole image at once, of nnU-Net's checkpoint."""
    import torch

    from fastnnunet.nnunet.files.checkpoint import load_checkpoint
    from fastnnunet.nnunet.files.model import build_network, model_of

    plans, dataset_json = (json.loads((model / name).read_text()) for name in ("plans.json", "dataset.json"))
    network = build_network(model_of(plans, CONFIGURATION, dataset_json)).eval()
    network.load_state_dict(load_checkpoint(model / "fold_0" / "checkpoint_final.pth")["network_weights"])
    loaded = LoadedBundle.load(bundle, "onnxruntime", mirroring=False)
    image_CZYX, properties = image_io(loaded.spec.reader_writer).read((image_file,))
    case = loaded.preprocess(image_CZYX, properties)
    rules, padding = loaded.spec.one_pass, []
    assert rules is not None
    for size, least, multiple in zip(case.data_CZYX.shape[1:], loaded.spec.patch_size, rules.multiples, strict=True):
        missing = -(-max(size, least) // multiple) * multiple - size
        padding.append((missing // 2, missing - missing // 2))
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.pad(case.data_CZYX, [(0, 0), *padding]))[None])[0].numpy()
    inner = tuple(slice(b, b + n) for (b, _), n in zip(padding, case.data_CZYX.shape[1:], strict=True))
    return loaded.postprocess(logits[:, *inner].astype(np.float16), case)[0]


def run_arm(bundle: Path, image: Path, out: Path, backend: str, runs: int, options: dict[str, Any]) -> dict[str, Any]:
    """One process."""
    asked = {
        "bundle": str(bundle),
        "image": str(image),
        "out": str(out),
        "backend": backend,
        "runs": runs,
        "options": options,
    }
    threads = str(options["threads"])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(asked)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def nnunet_passes(features: Sequence[int], patch: Sequence[int], threads: int) -> list[float]:
    """Seconds of a pass of the teacher's network over a patch, three times, in a process of their own."""
    command = [sys.executable, "-c", PASS, json.dumps([list(features), list(patch), threads])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    times: list[float] = json.loads(done.stdout)
    return times


def measure(
    image_file: Path | None,
    shape: Sequence[int] = SHAPE,
    patch: Sequence[int] = PATCH,
    features: Sequence[int] = FEATURES,
    backend: str = "openvino",
    precisions: Sequence[str] = ("bf16", "fp32"),
    passes: Sequence[int] = (1, 2),
    rounds: int = 3,
    threads: int | None = None,
) -> dict[str, Any]:
    """The record."""
    threads = threads or available_cores()
    image, origin = load_image(image_file, shape)
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as work:
        where = Path(work)
        (file,) = write_case(image, where).channels
        del image
        plans = teacher_plans(features, patch)
        config = plans["configurations"][CONFIGURATION]
        config["architecture"] = student_architecture(plans, CONFIGURATION, StudentSpec(r=4), None)
        write_model(plans, where / "instance")
        write_model(batchnorm(plans), where / "batch")
        for name in ("instance", "batch"):
            export_bundle(where / name, 0, where / f"{name}_bundle", needs_real_patches=False)
        expected = whole_labels(where / "batch_bundle", where / "batch", Path(file))
        asked: dict[str, tuple[str, dict[str, Any]]] = {}
        for precision in precisions:
            common = {"threads": threads, "precision": precision}
            asked[f"window, instance norm, {precision}"] = "instance_bundle", {**common, "step_size": 0.5}
            asked[f"window, batch norm, {precision}"] = "batch_bundle", {**common, "step_size": 0.5}
            for count in passes:
                words = "one pass" if count == 1 else f"{count} passes"
                asked[f"{words}, batch norm, {precision}"] = "batch_bundle", {**common, "passes": count}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in asked}
        agreement: dict[str, float] = {}
        passes_s: list[float] = []
        for number in range(rounds):
            passes_s += nnunet_passes(features, patch, threads)
            for name, (bundle, options) in asked.items():
                out = where / "out.nii.gz"
                runs[name].append(run_arm(where / bundle, Path(file), out, backend, 2, options))
                agreement[name] = float((read_labels(out) == expected).mean())
                print(f"round {number + 1}, {name}: {sum(runs[name][-1]['stages_s'][-1].values()):.2f} s", flush=True)
        rules = load_bundle_spec(where / "batch_bundle").one_pass
    arms = {}
    for name, of_arm in runs.items():
        last = [one["stages_s"][-1] for one in of_arm]
        arms[name] = {
            "seconds": statistics.median(sum(stages.values()) for stages in last),
            "stages_s": {stage: statistics.median(stages[stage] for stages in last) for stage in last[0]},
            "all_s": [sum(stages.values()) for stages in last],
            "peak_gib": max(one["peak_bytes"] for one in of_arm) / 2**30,
            "described": of_arm[0]["described"],
        }
        if "batch" in name:
            arms[name]["agreement_with_whole"] = agreement[name]
    grid = resampled_shape(shape, SPACING_MM, TARGET_MM)
    patches = math.prod(len(starts) for starts in tile_starts(grid, patch, 0.5))
    single_s = patches * statistics.median(passes_s)
    ensemble_s = single_s * ENSEMBLE_FOLDS * MIRRORED_PASSES
    for one in arms.values():
        one["times_faster_than_single_fold"] = single_s / one["seconds"]
        one["times_faster_than_ensemble"] = ensemble_s / one["seconds"]
    for precision in precisions:
        for name in arms:
            before = arms[f"window, instance norm, {precision}"]
            if name.endswith(precision):
                arms[name]["times_faster_than_window"] = before["seconds"] / arms[name]["seconds"]
                arms[name]["inference_times_faster"] = before["stages_s"]["infer"] / arms[name]["stages_s"]["infer"]
    return {
        **header("whole prediction of a CT in one pass and in the window, six-stage lite r=4 students, random weights"),
        "image": f"{tuple(shape)} at {SPACING_MM} mm; {origin}",
        "patch": list(patch),
        "classes": CLASSES,
        "halo": None if rules is None else list(rules.halo),
        "halo_is": None if rules is None else rules.halo_is,
        "threads": threads,
        "nnunetv2": {
            "patches": patches,
            "pass_s": statistics.median(passes_s),
            "all_pass_s": passes_s,
            "single_fold_s": single_s,
            "ensemble_s": ensemble_s,
            "extrapolated": "passes of the network alone, times their number",
        },
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "arms": arms,
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--image", type=Path, help="a CT in any format SimpleITK reads; default: generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    args = parser.parse_args()
    record = measure(args.image, rounds=args.rounds, precisions=args.precision)
    put(record, args.o)
    for name, arm in record["arms"].items():
        print(
            f"{name}: {arm['seconds']:.1f} s, {arm['peak_gib']:.2f} GiB; times faster than the window "
            f"{arm['times_faster_than_window']:.1f}, than nnU-Net's passes of one fold "
            f"{arm['times_faster_than_single_fold']:.0f}, of the ensemble {arm['times_faster_than_ensemble']:.0f}"
        )
