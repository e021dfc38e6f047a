"""Small random models, once as a bundle and once as an nnU-Net model folder, so that nnU-Net can be the oracle."""

import json
import shutil
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.specs.bundle import BundleSpec, load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import sha256_of_file

PATCH_3D = (16, 20, 24)
PATCH_2D = (24, 32)
_SKIMAGE = {"is_seg": False, "order_z": 0, "force_separate_z": None}
DEFAULT_RESAMPLING = {
    "data": {"fn": "resample_data_or_seg_to_shape", "kwargs": {**_SKIMAGE, "order": 3}},
    "seg": {"fn": "resample_data_or_seg_to_shape", "kwargs": {**_SKIMAGE, "is_seg": True, "order": 1}},
    "probabilities": {"fn": "resample_data_or_seg_to_shape", "kwargs": {**_SKIMAGE, "order": 1}},
}
TORCH_RESAMPLING = {
    kind: {"fn": "resample_torch_fornnunet", "kwargs": {"is_seg": kind == "seg", "force_separate_z": None}}
    for kind in ("data", "seg", "probabilities")
}
NO_RESAMPLING = {kind: {"fn": "no_resampling_hack", "kwargs": {}} for kind in ("data", "seg", "probabilities")}


@dataclass(kw_only=True)
class Toy:
    """What the plans, the data set and the checkpoint of a toy model say."""

    dims: int = 3
    channels: int = 1
    labels: dict[str, Any] = field(default_factory=lambda: {"background": 0, "a": 1, "b": 2})
    regions_class_order: list[int] | None = None
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    transpose: tuple[tuple[int, ...], tuple[int, ...]] = ((0, 1, 2), (0, 1, 2))
    schemes: list[str] | None = None  # default: z-score everywhere
    use_mask: bool = False
    intensity: dict[str, float] = field(default_factory=dict)
    resampling: dict[str, Any] = field(default_factory=lambda: DEFAULT_RESAMPLING)
    mirror_axes: tuple[int, ...] | None = None
    file_ending: str = ".nii.gz"
    reader_writer: str = "SimpleITKIO"

    @property
    def heads(self) -> int:
        return len(self.labels) - 1 if self.regions_class_order else len(self.labels)

    @property
    def patch_size(self) -> tuple[int, ...]:
        return PATCH_3D if self.dims == 3 else PATCH_2D


@dataclass
class ToyModel:
    """The same weights twice: `bundle` for this package, `folder` for nnU-Net (fold 0)."""

    bundle: Path
    folder: Path
    spec: BundleSpec


def described(bundle: Path, name: str, **changes: Any) -> Path:
    """A copy of a bundle beside it that says something else of itself."""
    copy = Path(shutil.copytree(bundle, bundle.with_name(name)))
    write_bundle_json(replace(load_bundle_spec(bundle), **changes), copy / "bundle.json")
    return copy


def make_toy_model(toy: Toy, where: Path) -> ToyModel:
    """Write the bundle and the nnU-Net model folder of a toy below `where`."""
    import torch

    network, onnx_bytes = _network(toy.dims, toy.channels, toy.heads)
    plans, dataset_json = _plans(toy), _dataset_json(toy)
    configuration = f"{toy.dims}d_toy"

    folder = where / "model"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    torch.save(
        {
            "network_weights": network.state_dict(),
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": configuration},
            "inference_allowed_mirroring_axes": toy.mirror_axes,
        },
        folder / "fold_0" / "checkpoint_final.pth",
    )

    bundle = where / "bundle"
    bundle.mkdir()
    (bundle / "model.onnx").write_bytes(onnx_bytes)
    image = np.random.default_rng(0).standard_normal((2, toy.channels, *toy.patch_size)).astype(np.float32)
    with torch.inference_mode():
        np.savez(bundle / "parity.npz", image=image, logits=network(torch.from_numpy(image)).numpy())
    config = plans["configurations"][configuration]
    spec = BundleSpec(
        name="toy",
        configuration=configuration,
        channel_names=tuple(dataset_json["channel_names"].values()),
        labels=toy.labels,
        regions_class_order=tuple(toy.regions_class_order) if toy.regions_class_order else None,
        num_heads=toy.heads,
        file_ending=toy.file_ending,
        reader_writer=toy.reader_writer,
        transpose_forward=toy.transpose[0],
        transpose_backward=toy.transpose[1],
        spacing_mm=toy.spacing,
        patch_size=toy.patch_size,
        normalization_schemes=tuple(config["normalization_schemes"]),
        use_mask_for_norm=tuple(config["use_mask_for_norm"]),
        intensity_properties=plans["foreground_intensity_properties_per_channel"],
        resampling=toy.resampling,
        mirror_axes=toy.mirror_axes,
        architecture=config["architecture"],
        plans=plans,
        dataset_json=dataset_json,
        provenance={},
        files={name: sha256_of_file(bundle / name) for name in ("model.onnx", "parity.npz")},
    )
    write_bundle_json(spec, bundle / "bundle.json")
    return ToyModel(bundle, folder, load_bundle_spec(bundle))


def _architecture(dims: int) -> dict[str, Any]:
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [6, 8, 12],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": [[3] * dims] * 3,
            "strides": [[1] * dims, [2] * dims, [2] * dims],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


@cache
def _network(dims: int, channels: int, heads: int) -> tuple[Any, bytes]:
    """A network whose labels are all frequent, and its ONNX file; exported once per shape."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    from fastnnunet.nnunet.onnx import to_onnx

    torch.manual_seed(dims * 100 + channels * 10 + heads)
    architecture = _architecture(dims)
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        heads,
        deep_supervision=False,
    ).eval()
    patch = PATCH_3D if dims == 3 else PATCH_2D
    make_labels_frequent(network, channels, patch)
    return network, to_onnx(network, channels, patch).SerializeToString()


def make_labels_frequent(network: Any, channels: int, patch: tuple[int, ...]) -> None:
    """Random weights under which no label is rare on noise of that size."""
    import torch

    with torch.no_grad():
        # equal tensors would be merged by the exporter, and trained ones are not equal
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.2)
        head = network.decoder.seg_layers[-1]
        head.weight.normal_(0, 2)
        head.bias.zero_()
        logits = network(torch.randn(1, channels, *patch))
        head.bias.copy_(-logits.flatten(2).mean(2)[0])


def _plans(toy: Toy) -> dict[str, Any]:
    intensity = {"mean": 50.0, "std": 30.0, "percentile_00_5": 5.0, "percentile_99_5": 110.0, **toy.intensity}
    return {
        "dataset_name": "Dataset999_Toy",
        "plans_name": "toyPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": toy.reader_writer,
        "transpose_forward": list(toy.transpose[0]),
        "transpose_backward": list(toy.transpose[1]),
        "configurations": {
            f"{toy.dims}d_toy": {
                "data_identifier": "toy",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(toy.patch_size),
                "median_image_size_in_voxels": [20.0] * toy.dims,
                "spacing": list(toy.spacing),
                "normalization_schemes": toy.schemes or ["ZScoreNormalization"] * toy.channels,
                "use_mask_for_norm": [toy.use_mask] * toy.channels,
                **{f"resampling_fn_{kind}": entry["fn"] for kind, entry in toy.resampling.items()},
                **{f"resampling_fn_{kind}_kwargs": entry["kwargs"] for kind, entry in toy.resampling.items()},
                "architecture": _architecture(toy.dims),
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): intensity for c in range(toy.channels)},
    }


def _dataset_json(toy: Toy) -> dict[str, Any]:
    regions = {"regions_class_order": toy.regions_class_order} if toy.regions_class_order else {}
    return {
        "channel_names": {str(c): f"channel{c}" for c in range(toy.channels)},
        "labels": toy.labels,
        "numTraining": 1,
        "file_ending": toy.file_ending,
        **regions,
    }


def nnunet_predict(
    model: ToyModel,
    cases: dict[str, list[Path]],
    out: Path,
    *,
    save_probabilities: bool = False,
    step_size: float = 0.5,
) -> None:
    """nnU-Net's own predictor (CPU, one process) on case name -> channel files."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    out.mkdir(parents=True, exist_ok=True)
    predictor = nnUNetPredictor(tile_step_size=step_size, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model.folder), (0,))
    predictor.predict_from_files_sequential(
        [[str(f) for f in files] for files in cases.values()],
        [str(out / name) for name in cases],
        save_probabilities=save_probabilities,
    )


def smooth_noise(
    shape: tuple[int, ...], seed: int, *, mean: float = 60, spread: float = 40, border: int = 0
) -> np.ndarray:
    """A float32 image with structure at several scales, optionally with a border of exact zeros."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    image = sum(gaussian_filter(rng.standard_normal(shape), s, mode="wrap") * s ** (len(shape) / 2) for s in (1, 3))
    image = (mean + spread * image / image.std()).astype(np.float32)
    image[image == 0] = 1
    for axis in range(len(shape)):
        for side in (slice(0, border), slice(shape[axis] - border, None)):
            if border:
                image[(slice(None),) * axis + (side,)] = 0
    return image


def write_image(
    array: np.ndarray,
    file: Path,
    spacing_xyz: tuple[float, ...] = (1.0, 1.0, 1.0),
    origin_xyz: tuple[float, ...] | None = None,
    direction: tuple[float, ...] | None = None,
) -> Path:
    """Write an array (z, y, x) with SimpleITK."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing_xyz)
    if origin_xyz is not None:
        image.SetOrigin(origin_xyz)
    if direction is not None:
        image.SetDirection(direction)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file), True)
    return file
