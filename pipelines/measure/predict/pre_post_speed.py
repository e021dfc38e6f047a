"""Preprocessing and postprocessing of a CT of 512 x 512 x 300 voxels: this package's native core against nnunetv2.

    python -m pipelines.measure.predict.pre_post_speed --image CT.nii.gz -o record.json

The image is brought to the size first (not timed) and generated without --image. Both sides get the same array and the
same plans: CT normalisation, cubic resampling to the target spacing; then logits of that grid (smooth noise, float16)
back to the image and to labels. nnunetv2's side is `DefaultPreprocessor.run_case_npy` and
`convert_predicted_logits_to_segmentation_with_correct_shape`, which use one core for the resampling; both run in this
process, in turn. It resamples head by head, so its time for many classes is stated as that of few times their ratio,
and its memory for them by arithmetic: the resampled heads in float16. Peak memory of this package is the highest
resident set of a process of its own that holds the logits and labels them, libraries and logits included.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet import native
from fastnnunet.bench.worker import own_peak_bytes
from fastnnunet.geometry.resample import parse_resample_spec, resampled_shape
from fastnnunet.runtime.logits import label_rule, plan_logits, postprocess
from fastnnunet.runtime.preprocess import Preprocessed, preprocess
from fastnnunet.specs.bundle import BundleSpec
from fastnnunet.specs.provenance import hardware
from pipelines.measure.head import arguments, header, put
from tests.bundles import Toy, _dataset_json, _plans
from tests.test_runtime_stages import DATA, _spec

SHAPE = (300, 512, 512)
SPACING_MM = (1.0, 0.8, 0.8)
TARGET_MM = (1.5, 1.5, 1.5)
INTENSITY = {"mean": -150.0, "std": 350.0, "percentile_00_5": -950.0, "percentile_99_5": 900.0}


def toy_of(classes: int) -> Toy:
    labels = {"background": 0, **{str(i): i for i in range(1, classes)}}
    return Toy(spacing=TARGET_MM, schemes=["CTNormalization"], intensity=INTENSITY, labels=labels)


def spec_of(classes: int) -> BundleSpec:
    return _spec(
        labels=toy_of(classes).labels,
        num_heads=classes,
        spacing_mm=TARGET_MM,
        normalization_schemes=("CTNormalization",),
        intensity_properties={"0": INTENSITY},
    )


def load_image(file: Path | None, shape: Sequence[int]) -> tuple[np.ndarray, str]:
    """(1, *shape) float32 Hounsfield units and where they come from."""
    if file is None:
        coarse = np.random.default_rng(0).normal(-150, 350, (1, *(max(2, n // 8) for n in shape)))
        return native.resample(coarse.astype(np.float32), shape, (3, 3, 3)), "generated smooth noise"
    import SimpleITK as sitk

    values = sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.float32)[None]
    return native.resample(values, shape, (1, 1, 1)), f"{file.name} {values.shape[1:]} resampled linearly"


def make_logits(classes: int, grid: Sequence[int]) -> np.ndarray:
    """(classes, *grid) float16, smooth."""
    rng = np.random.default_rng(1)
    logits = np.empty((classes, *grid), np.float16)
    for head in logits:
        coarse = rng.normal(0, 8, (1, *(max(2, n // 12) for n in grid))).astype(np.float32)
        head[...] = native.resample(coarse, grid, (1, 1, 1))[0]
    return logits


def case_of(shape: Sequence[int], grid: Sequence[int]) -> Preprocessed:
    return Preprocessed(
        data_CZYX=np.empty((1, *grid), np.float32),
        spacing_mm=SPACING_MM,
        target_spacing_mm=TARGET_MM,
        shape_before_cropping=tuple(shape),
        bbox=tuple((0, n) for n in shape),
        properties={},
    )


def label_ours(logits: np.ndarray, shape: Sequence[int], threads: int | None) -> np.ndarray:
    spec = spec_of(len(logits))
    how = parse_resample_spec(spec.resampling["probabilities"], "the logits")
    case = case_of(shape, logits.shape[1:])
    return postprocess(logits, case, spec, plan_logits(how, case), label_rule(spec), threads=threads)[0]


def label_nnunet(logits: np.ndarray, shape: Sequence[int], cores: int) -> np.ndarray:
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    toy = toy_of(len(logits))
    plans = PlansManager(_plans(toy))
    properties = {
        "spacing": list(SPACING_MM),
        "shape_before_cropping": tuple(shape),
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": tuple(shape),
    }
    manager = plans.get_label_manager(_dataset_json(toy))
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, plans.get_configuration("3d_toy"), manager, properties, False, cores
    )


def preprocess_nnunet(image: np.ndarray) -> np.ndarray:
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    toy = toy_of(3)
    plans = PlansManager(_plans(toy))
    return DefaultPreprocessor(verbose=False).run_case_npy(
        image, None, {"spacing": list(SPACING_MM)}, plans, plans.get_configuration("3d_toy"), _dataset_json(toy)
    )[0]


def peak_bytes(classes: int, shape: Sequence[int], threads: int | None) -> int:
    """Highest resident set of a fresh process that makes logits of `classes` heads and labels them."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_label_alone, (classes, tuple(shape), threads))


def _label_alone(classes: int, shape: tuple[int, ...], threads: int | None) -> int:
    label_ours(make_logits(classes, resampled_shape(shape, SPACING_MM, TARGET_MM)), shape, threads)
    return own_peak_bytes()


def timed(arms: dict[str, Callable[[], np.ndarray]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every arm, repetitions outermost, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, arm in arms.items():
            results.pop(name, None)  # no arm is measured while an earlier result of its own is in memory
            start = time.perf_counter()
            results[name] = arm()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def time_ours(
    classes: int, grid: Sequence[int], shape: Sequence[int], repeats: int, threads: int | None
) -> dict[str, list[float]]:
    logits = make_logits(classes, grid)
    return timed({"fastnnunet": lambda: label_ours(logits, shape, threads)}, repeats)[0]


def measure(
    image_file: Path | None,
    shape: Sequence[int] = SHAPE,
    few: int = 3,
    many: int = 105,
    repeats: int = 3,
    threads: int | None = None,
) -> dict[str, Any]:
    """The record. `threads` of this package, None for all cores; nnunetv2 gets as many torch threads."""
    image, origin = load_image(image_file, shape)
    properties = {"spacing": list(SPACING_MM)}
    cores = threads or hardware()["cores"]
    pre_s, pre = timed(
        {
            "fastnnunet": lambda: preprocess(image.copy(), properties, spec_of(few), DATA, threads=threads).data_CZYX,
            "nnunetv2": lambda: preprocess_nnunet(image.copy()),
        },
        repeats,
    )
    difference = np.abs(pre["fastnnunet"] - pre["nnunetv2"]).max() / np.ptp(pre["nnunetv2"])
    logits = make_logits(few, pre["nnunetv2"].shape[1:])
    post_s, post = timed(
        {
            "fastnnunet": lambda: label_ours(logits, shape, threads),
            "nnunetv2": lambda: label_nnunet(logits.copy(), shape, cores),
        },
        repeats,
    )
    agreement = float((post["fastnnunet"] == post["nnunetv2"]).mean())
    grid = resampled_shape(shape, SPACING_MM, TARGET_MM)
    many_s = time_ours(many, grid, shape, repeats, threads)
    median = {
        stage: {name: float(np.median(times)) for name, times in seconds.items()}
        for stage, seconds in (("preprocess", pre_s), (f"label_{few}", post_s), (f"label_{many}", many_s))
    }
    extrapolated_s = median[f"label_{few}"]["nnunetv2"] * many / few
    total = {name: median["preprocess"][name] + median[f"label_{few}"][name] for name in ("fastnnunet", "nnunetv2")}
    return {
        **header("seconds, medians: image array to network input, and logits to label map"),
        "image": f"{tuple(shape)} at {SPACING_MM} mm; {origin}",
        "grid": f"{tuple(grid)} at {TARGET_MM} mm",
        "repeats": repeats,
        "threads": cores,
        "median_s": median,
        "all_s": {"preprocess": pre_s, f"label_{few}": post_s, f"label_{many}": many_s},
        "times_faster": total["nnunetv2"] / total["fastnnunet"],
        "times_faster_preprocess": median["preprocess"]["nnunetv2"] / median["preprocess"]["fastnnunet"],
        f"times_faster_label_{few}": median[f"label_{few}"]["nnunetv2"] / median[f"label_{few}"]["fastnnunet"],
        f"times_faster_label_{many}": extrapolated_s / median[f"label_{many}"]["fastnnunet"],
        f"nnunetv2_label_{many}_extrapolated_s": extrapolated_s,
        "largest_difference_of_range": float(difference),
        "label_agreement": agreement,
        "peak_bytes": {str(classes): peak_bytes(classes, shape, threads) for classes in (few, many)},
        "logits_bytes": {str(classes): 2 * classes * int(np.prod(grid)) for classes in (few, many)},
        "nnunetv2_resampled_heads_bytes": {str(c): 2 * c * int(np.prod(shape)) for c in (few, many)},
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--image", type=Path, help="a CT in any format SimpleITK reads; default: generated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args()
    record = measure(args.image, repeats=args.repeats, threads=args.threads)
    put(record, args.o)
    print(f"{record['times_faster']:.1f} times faster, labels {100 * record['label_agreement']:.4f} % equal")
    print(f"peak memory {record['peak_bytes']}")
