"""Small nnU-Net model folders of several folds that look trained, and nnU-Net's predictor on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bundles import Toy, _dataset_json, _network, _plans

LOWRES = "3d_lowres"


def make_teacher(toy: Toy, results: Path, folds: Sequence[int | str] = (0, 1), *, cascade: bool = False) -> Path:
    """A model folder below `results`; the folds' weights differ by some noise.

    `cascade`: a second stage, which sees the labels of a first one.
    """
    import torch

    plans, dataset_json = _plans(toy), _dataset_json(toy)
    configuration = f"{toy.dims}d_toy"
    previous = toy.heads - 1 if cascade else 0
    if cascade:
        config = plans["configurations"][configuration]
        plans["configurations"][LOWRES] = {**config, "next_stage": [configuration]}
        plans["configurations"][configuration] = {**config, "previous_stage": LOWRES}
    folder = results / "Dataset999_Toy" / f"nnUNetTrainer__toyPlans__{configuration}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    network, _ = _network(toy.dims, toy.channels + previous, toy.heads)
    for number, fold in enumerate(folds):
        generator = torch.Generator().manual_seed(number)
        weights = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in network.state_dict().items()}
        (folder / f"fold_{fold}").mkdir()
        save_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.pth", weights, configuration, toy.mirror_axes)
    return folder


def save_checkpoint(
    file: Path, weights: dict[str, Any], configuration: str, mirror_axes: tuple[int, ...] | None
) -> None:
    """What nnU-Net reads of a checkpoint."""
    import torch

    torch.save(
        {
            "network_weights": weights,
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": configuration},
            "inference_allowed_mirroring_axes": mirror_axes,
        },
        file,
    )


def nnunet_predictor(
    folder: Path, folds: Sequence[int | str], *, mirroring: bool = True, gaussian: bool = True, step_size: float = 0.5
) -> Any:
    """nnU-Net's own predictor on the CPU."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=step_size,
        use_gaussian=gaussian,
        use_mirroring=mirroring,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def nnunet_files(
    predictor: Any,
    cases: dict[str, list[Path]],
    out: Path,
    *,
    probabilities: bool = False,
    previous: Path | None = None,
) -> None:
    """nnU-Net's predictor on case name -> channel files, into a folder."""
    out.mkdir(parents=True)
    predictor.predict_from_files_sequential(
        [[str(f) for f in files] for files in cases.values()],
        [str(out / name) for name in cases],
        save_probabilities=probabilities,
        folder_with_segs_from_prev_stage=None if previous is None else str(previous),
    )


def random_labels(shape: tuple[int, ...], labels: int, seed: int) -> np.ndarray:
    """A label map of smooth regions, uint8."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    return np.stack([gaussian_filter(rng.standard_normal(shape), 3) for _ in range(labels)]).argmax(0).astype(np.uint8)


def start_weights_of(job):
    """What a training of `job` starts from, read when it is asked for."""
    from fastnnunet.distill.job import start_fold
    from fastnnunet.nnunet.files.model import model_folder_of

    return lambda: model_folder_of(job.teacher).take_weights(start_fold(job))
