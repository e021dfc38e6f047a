"""How far a fast teacher is from nnU-Net's own predictor, on patches of real cases."""

import contextlib
import io
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastnnunet.nnunet.teacher import LoadedTeacher


def measure_deviation(
    teacher: "LoadedTeacher", images_CZYX: Sequence[np.ndarray], temperature: float
) -> dict[str, Any]:
    """Compare the teacher with a `nnUNetPredictor` that loads the same folds from disk, in its own arithmetic.

    Only the patch in the middle of every image is looked at, each by one fold, the folds taking turns: a mean over
    folds is no further off than they are, and nnU-Net needs minutes for all of them. Returns plain values for a record:
    the fraction of voxels with the same label, mean and largest difference of probabilities at `temperature`, the
    number of patches and what was compared.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    recipe = teacher.recipe
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a note about the device
        reference = nnUNetPredictor(
            tile_step_size=recipe.step_size,
            use_mirroring=recipe.mirroring,
            device=device,
            verbose=False,
            allow_tqdm=False,
        )
    equal, mean, largest = [], [], 0.0
    for number, image_CZYX in enumerate(images_CZYX):
        fold = recipe.folds[number % len(recipe.folds)]
        reference.initialize_from_trained_model_folder(str(recipe.folder), (fold,), recipe.checkpoint)
        patch_CZYX = _middle(image_CZYX, (1, *recipe.patch_size)[-3:])
        expected = reference.predict_logits_from_preprocessed_data(torch.from_numpy(patch_CZYX)).float()
        got = next(logits for _, logits in teacher.blocks(patch_CZYX, (fold,), patch_CZYX.shape[1:]))
        if not np.isfinite(got).all():
            continue  # labelling that case will fail and say so
        difference = (
            _probabilities(torch.from_numpy(got), temperature, recipe.has_regions)
            - _probabilities(expected, temperature, recipe.has_regions)
        ).abs()
        same = (
            (got > 0) == (expected.numpy() > 0) if recipe.has_regions else got.argmax(0) == expected.numpy().argmax(0)
        )
        equal.append(float(same.mean()))
        mean.append(float(difference.mean()))
        largest = max(largest, float(difference.max()))
    return {
        "against": f"nnunetv2 {metadata.version('nnunetv2')} nnUNetPredictor on {device.type}",
        "patches": len(equal),
        "argmax_equal": sum(equal) / max(1, len(equal)),
        "mean_abs_difference": sum(mean) / max(1, len(mean)),
        "max_abs_difference": largest,
        "temperature": temperature,
    }


def _middle(image_CZYX: np.ndarray, size_zyx: Sequence[int]) -> np.ndarray:
    starts = [max(0, (n - s) // 2) for n, s in zip(image_CZYX.shape[1:], size_zyx, strict=True)]
    inside = tuple(slice(a, a + s) for a, s in zip(starts, size_zyx, strict=True))
    return np.ascontiguousarray(image_CZYX[(slice(None), *inside)])


def _probabilities(logits: Any, temperature: float, has_regions: bool) -> Any:
    return (logits / temperature).sigmoid() if has_regions else (logits / temperature).softmax(0)
