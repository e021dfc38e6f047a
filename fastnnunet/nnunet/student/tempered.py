"""A temperature folded into a network's last layer: probabilities change, labels do not, and nobody need know of it."""

import shutil
from pathlib import Path

from fastnnunet.nnunet.files.checkpoint import Weights, load_checkpoint
from fastnnunet.nnunet.files.checkpoint_digest import DIGEST, write_checkpoint

FOLDED = "folded_temperature"  # in the provenance of a checkpoint


def copy_tempered(checkpoint: Path, target: Path, temperature: float) -> None:
    """Copy a student's checkpoint with its logits divided by `temperature`, which its provenance then tells.

    Raises as `load_checkpoint` and `write_checkpoint` do.
    """
    stored = load_checkpoint(checkpoint)
    weights = tempered(stored["network_weights"], temperature)
    if weights is stored["network_weights"]:
        shutil.copyfile(checkpoint, target)
        return
    stored.pop(DIGEST, None)
    provenance = {**stored.get("fastnnunet", {}), FOLDED: temperature}
    write_checkpoint({**stored, "network_weights": weights, "fastnnunet": provenance}, target)


def tempered(weights: Weights, temperature: float) -> Weights:
    """Weights of a U-Net whose full-resolution head gives logits / temperature; as given, where there is none.

    Its other heads are for deep supervision, which prediction does not have.
    """
    heads = sorted({name.rpartition(".")[0] for name in weights if ".seg_layers." in name}, key=_stage)
    if temperature == 1 or not heads:
        return weights
    last = f"{heads[-1]}."
    return {name: tensor / temperature if name.startswith(last) else tensor for name, tensor in weights.items()}


def _stage(head: str) -> int:
    return int(head.rpartition(".")[2])
