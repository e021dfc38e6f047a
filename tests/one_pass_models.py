"""Small random networks with batch norm, whose output at a voxel depends on its surroundings alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.bundles import Toy, _dataset_json, _plans, make_labels_frequent
from tests.teachers import save_checkpoint

NORM = "torch.nn.modules.batchnorm.BatchNorm{dims}d"


def batchnorm_plans(toy: Toy) -> dict[str, Any]:
    """The plans of a toy with batch norm in place of instance norm."""
    plans = _plans(toy)
    kwargs = plans["configurations"][f"{toy.dims}d_toy"]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = NORM.format(dims=toy.dims)
    return plans


def batchnorm_network(plans: dict[str, Any], dataset_json: dict[str, Any], configuration: str, seed: int = 0) -> Any:
    """In eval mode, with random statistics; no label is rare."""
    import torch

    from fastnnunet.nnunet.files.model import build_network, model_of

    torch.manual_seed(seed)
    model = model_of(plans, configuration, dataset_json)
    network = build_network(model).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    make_labels_frequent(network, model.num_channels, model.patch_size)
    return network


def write_batchnorm_model(folder: Path, toy: Toy, folds: int = 1) -> tuple[Path, list[Any]]:
    """An nnU-Net model folder and the networks of its folds."""
    plans, dataset_json, configuration = batchnorm_plans(toy), _dataset_json(toy), f"{toy.dims}d_toy"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    networks = [batchnorm_network(plans, dataset_json, configuration, seed) for seed in range(folds)]
    for fold, network in enumerate(networks):
        (folder / f"fold_{fold}").mkdir()
        file = folder / f"fold_{fold}" / "checkpoint_final.pth"
        save_checkpoint(file, network.state_dict(), configuration, toy.mirror_axes)
    return folder, networks


def runner(network: Any) -> Any:
    """The network as a function of arrays (N, C, *tile)."""
    import torch

    def run(batch_NCX: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(batch_NCX)).numpy()

    return run


def whole(
    network: Any,
    image_CX: np.ndarray,
    least: tuple[int, ...],
    multiple: int | tuple[int, ...],
    offset: int = 0,
    extra: int = 0,
) -> np.ndarray:
    """The oracle: PyTorch on the whole image at once, centred in zeros that make it a multiple of the strides.

    `offset`: further on in the zeros, of which there are `extra` more.
    """
    padding = []
    multiples = multiple if isinstance(multiple, tuple) else (multiple,) * len(least)
    for size, at_least, strides in zip(image_CX.shape[1:], least, multiples, strict=True):
        frame = -(-max(size + extra, at_least) // strides) * strides
        before = (frame - size - extra) // 2 + offset
        padding.append((before, frame - size - before))
    logits = runner(network)(np.pad(image_CX, [(0, 0), *padding])[None])[0]
    return logits[(slice(None), *(slice(b, b + n) for (b, _), n in zip(padding, image_CX.shape[1:], strict=True)))]
