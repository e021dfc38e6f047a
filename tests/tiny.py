"""A tiny nnU-Net world made by nnU-Net itself: raw data, plans, preprocessed cases and five untrained teacher folds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

DATASET = "Dataset998_Tiny"
CONFIGURATION = "3d_fullres"
FEATURES = [16, 32, 32]
PATCH = [16, 16, 16]
NUM_CASES = 10


def write_raw_dataset(raw: Path, num_cases: int = NUM_CASES) -> Path:
    """Bright and dark balls in noise: one CT-like channel, labels 1 and 2, anisotropic spacing, shapes that differ."""
    import SimpleITK as sitk

    rng = np.random.default_rng(7)
    folder = raw / DATASET
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    for i in range(num_cases + 2):
        shape = (20 + i % 3, 24, 22 + i % 4)
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
        image, label = rng.normal(0, 20, shape), np.zeros(shape, np.uint8)
        for value, intensity, radius in ((1, 200, 6), (2, -150, 4)):
            centre = rng.uniform(radius, np.array(shape) - radius)
            ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < radius**2
            image[ball] += intensity
            label[ball] = value
        part = "Tr" if i < num_cases else "Ts"
        for array, name in (
            (image.astype(np.float32), f"images{part}/tiny_{i:02d}_0000"),
            (label, f"labels{part}/tiny_{i:02d}"),
        ):
            picture = sitk.GetImageFromArray(array)
            picture.SetSpacing((1.0, 1.0, 1.5))
            sitk.WriteImage(picture, str(folder / f"{name}.nii.gz"))
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "bright": 1, "dark": 2},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


def shrink_plans(plans: dict) -> dict:
    """Small patches and narrow stages, so that one step takes milliseconds."""
    config = plans["configurations"][CONFIGURATION]
    config["patch_size"], config["batch_size"] = PATCH, 2
    kwargs = config["architecture"]["arch_kwargs"]
    stages = len(FEATURES)
    kwargs.update(
        n_stages=stages,
        features_per_stage=FEATURES,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_conv_per_stage=[1] * stages,
        n_conv_per_stage_decoder=[1] * (stages - 1),
    )
    return {**plans, "configurations": {CONFIGURATION: config}}


def before_2_5(config: dict, network: str) -> dict:
    """A configuration of `shrink_plans` as nnU-Net wrote it before 2.5: no `architecture`, the network in fields."""
    old = {name: value for name, value in config.items() if name != "architecture"}
    kwargs, stages = config["architecture"]["arch_kwargs"], len(FEATURES)
    return old | {
        "UNet_class_name": network,
        "UNet_base_num_features": FEATURES[0],
        "unet_max_num_features": FEATURES[-1],
        "n_conv_per_stage_encoder": [1] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "num_pool_per_axis": [stages - 1] * 3,
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }


def write_teacher(preprocessed: Path, results: Path, folds: range = range(5)) -> Path:
    """Five folds of random weights, scaled so that their softmax is far from uniform, stored as nnU-Net does."""
    import torch

    from fastnnunet.nnunet.files.model import build_network, model_of

    base = preprocessed / DATASET
    plans, dataset_json = (json.loads((base / n).read_text()) for n in ("nnUNetPlans.json", "dataset.json"))
    folder = results / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    for fold in folds:
        torch.manual_seed(fold)
        weights = build_network(model_of(plans, CONFIGURATION, dataset_json)).state_dict()
        for name in weights:
            if "seg_layers" in name:
                weights[name] = weights[name] * 4
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": weights,
                "optimizer_state": None,
                "grad_scaler_state": None,
                "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": (0, 1, 2),
                "_best_ema": np.float64(0.5),  # nnU-Net's own checkpoints hold numpy scalars
                "init_args": {
                    "plans": plans,
                    "configuration": CONFIGURATION,
                    "fold": fold,
                    "dataset_json": dataset_json,
                },
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


def draw_few_voxels(patch: pytest.MonkeyPatch) -> None:
    """nnU-Net draws 10^8 voxels for a fingerprint, however few there are: from now on a thousandth of them."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    extract = DatasetFingerprintExtractor.run

    def run(self: DatasetFingerprintExtractor, *args: object, **kwargs: object) -> dict:
        self.num_foreground_voxels_for_intensitystats = 1e5
        return extract(self, *args, **kwargs)

    patch.setattr(DatasetFingerprintExtractor, "run", run)


def make_world(root: Path) -> None:
    """Create raw, preprocessed and results folders under `root`; the nnU-Net variables must point there already."""
    from fastnnunet.nnunet.files.prepare import plan_and_preprocess

    for name in ("raw", "preprocessed", "results"):
        (root / name).mkdir()
    write_raw_dataset(root / "raw")
    base = plan_and_preprocess("998", CONFIGURATION, num_processes=1)
    plans_file = base / "nnUNetPlans.json"
    plans_file.write_text(json.dumps(shrink_plans(json.loads(plans_file.read_text()))))
    write_teacher(root / "preprocessed", root / "results")


def world_environment(root: Path) -> dict[str, str]:
    """The environment variables of a world."""
    return {
        **os.environ,
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(root / "results"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }
