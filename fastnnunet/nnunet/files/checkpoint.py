"""Reading nnU-Net checkpoints without running code from them, and digests of their weights."""

import hashlib
import itertools
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.errors import CorruptError, MismatchError, NotFoundError
from fastnnunet.specs.canonical import differences, to_plain
from fastnnunet.specs.checks.pickles import RefusedTypeError
from fastnnunet.specs.checks.problems import is_list, shown
from fastnnunet.specs.distill import BEFORE_THERE_WAS_A_CHOICE, OF_THE_SOFT_LOSS, DistillSpec
from fastnnunet.specs.student import StudentSpec

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]
_AXES = [[], *(list(axes) for count in (1, 2, 3) for axes in itertools.combinations("012", count))]
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # torch.compile wraps parts of a network too


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU: tensors, numbers, text and plain containers, and nothing that could run code.

    Raises NotFoundError, or CorruptError when the file is truncated, damaged or no nnU-Net checkpoint, or holds a type
    that is not read, which it names.
    """
    from fastnnunet.nnunet.files.torch_file import read_torch_file

    if not path.is_file():
        raise NotFoundError(f"checkpoint not found: {path}")
    try:
        checkpoint = read_torch_file(path)
    except RefusedTypeError as e:
        raise CorruptError(
            f"checkpoint {path} cannot be read: it holds {e.name}; expected tensors, numbers, text and containers of "
            "them, since anything else could run code. Nothing of it was run\n"
            "if you trust where it comes from, keep of it what prediction needs (this runs what is in it) and name the "
            f"new file with -chk:\n{_shortened(path)}"
        ) from e
    except Exception as e:  # a damaged pickle raises nearly anything
        reason = textwrap.shorten(str(e).partition("\n")[0], 200, placeholder=" ...") or type(e).__name__
        raise CorruptError(
            f"checkpoint {path} cannot be read ({path.stat().st_size} bytes): {reason}\n"
            "it is truncated, damaged, or not an nnU-Net checkpoint; copy it again from where it is whole. Only if no "
            "whole copy is left, train that fold again"
        ) from e
    if not isinstance(checkpoint, dict) or not {"network_weights", "init_args", "trainer_name"} <= checkpoint.keys():
        raise CorruptError(
            f"{path} is not an nnU-Net v2 checkpoint: network_weights, init_args or trainer_name missing"
        )
    if problems := _problems(checkpoint):
        raise CorruptError(f"{path} is not an nnU-Net v2 checkpoint: " + "; ".join(problems))
    from fastnnunet.nnunet.files.checkpoint_digest import DIGEST, require_undamaged

    if DIGEST in checkpoint:
        require_undamaged(checkpoint, path)
    return checkpoint


def _problems(checkpoint: dict[str, Any]) -> list[str]:
    """What of a checkpoint is not of the kind that is worked with."""
    import torch

    weights, arguments = checkpoint["network_weights"], checkpoint["init_args"]
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    wrong = []
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        wrong.append("network_weights: expected tensors by name")
    if not isinstance(arguments, dict) or not isinstance(arguments.get("configuration"), str):
        wrong.append("init_args: expected the name of a configuration in it")
    if not isinstance(checkpoint["trainer_name"], str):
        wrong.append(f"trainer_name: got {shown(checkpoint['trainer_name'])}, expected a name")
    if axes is not None and not (is_list(axes) and sorted(map(str, axes)) in _AXES):
        wrong.append(f"inference_allowed_mirroring_axes: got {shown(axes)}, expected axes of 0, 1, 2")
    return wrong


def _shortened(path: Path) -> str:
    """A command that writes what prediction needs of a checkpoint beside it."""
    keys = ("network_weights", "trainer_name", "inference_allowed_mirroring_axes")
    new = path.with_name(f"{path.stem}_plain.pth")
    program = (
        "import sys, torch; c = torch.load(sys.argv[1], 'cpu', weights_only=False); "
        f"torch.save({{**{{k: c.get(k) for k in {keys}}}, "
        "'init_args': {'configuration': c['init_args']['configuration']}}, sys.argv[2])"
    )
    return shlex.join(["python", "-c", program, str(path), str(new)])


def strip_prefix(weights: Weights) -> Weights:
    """Drop what DDP (`module.`) and torch.compile (`_orig_mod.`) put before names, in any order and number.

    Names that would become equal stay as they are.
    """
    stripped = {_bare(name): tensor for name, tensor in weights.items()}
    return stripped if len(stripped) == len(weights) else dict(weights)


def _bare(name: str) -> str:
    return _WRAPPERS.sub("", name)


def load_weights(network: "torch.nn.Module", weights: Weights, where: Path) -> None:
    """`load_state_dict(strict=True)`; a misfit is a MismatchError that names the first differences.

    Names count without what wrappers put before them, on both sides: a network may have a part called `module`.
    """
    own = network.state_dict()
    names = {_bare(name): name for name in own}
    if len(names) == len(own):
        weights = {names.get(bare, bare): tensor for bare, tensor in strip_prefix(weights).items()}
    problems = [f"missing {k}" for k in own if k not in weights]
    problems += [f"unexpected {k}" for k in weights if k not in own]
    problems += [
        f"{k}: checkpoint {tuple(weights[k].shape)}, plans {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:5])
        raise MismatchError(
            f"the plans beside {where} do not fit the checkpoint, {len(problems)} parameter(s) differ:\n{shown}\n"
            "use the plans.json the checkpoint was trained with"
        )
    network.load_state_dict(weights, strict=True)


def load_pretrained(network: "torch.nn.Module", path: Path) -> None:
    """Start from another model's weights: everything but the segmentation layers, as `nnUNetv2_train` does.

    Raises MismatchError naming what is missing or of another shape, NotFoundError, CorruptError.
    """
    given, own = strip_prefix(load_checkpoint(path)["network_weights"]), network.state_dict()
    wanted = {name: tensor for name, tensor in own.items() if ".seg_layers." not in name}
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [
        f"{name}: pretrained {tuple(given[name].shape)}, student {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:5])
        raise MismatchError(
            f"the pretrained weights {path} do not fit this student, {len(problems)} parameter(s) differ:\n{shown}\n"
            "give a checkpoint of the same architecture and width"
        )
    network.load_state_dict({**own, **{name: given[name] for name in wanted}}, strict=True)


def changed_settings(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What another run would do differently, `name: there -> now`; both as `provenance` gives them.

    Settings that `there` does not know were added later: then there was the default of today, but for
    `BEFORE_THERE_WAS_A_CHOICE`. Those of the soft loss count where one of the two has a soft loss. Neither the version
    of this package nor how the name of the plans came about counts.
    """
    return differences(_effective(there), _effective(now))


def _effective(run: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in run.items() if name != "version"}
    if "student" in run:
        settings["student"] = {**to_plain(StudentSpec()), **run["student"], "plans_name": None}
    if "distill" in run:
        default = to_plain(DistillSpec())
        distill = {**default, **BEFORE_THERE_WAS_A_CHOICE, **run["distill"]}
        if distill["alpha"] == 0:
            distill |= {name: default[name] for name in OF_THE_SOFT_LOSS}
        settings["distill"] = distill
    return settings


def check_same_run(path: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings. Raises MismatchError naming those of `changed_settings`."""
    changed = changed_settings(there, now)
    if changed:
        raise MismatchError(
            f"{path} was trained differently (there -> now), so it cannot be continued:\n"
            + "\n".join(f"  - {c}" for c in changed)
            + "\ngive the same options and images, or start over: with --overwrite, or in another --work"
        )


def weights_digest(weights: Weights) -> str:
    """Hex SHA-256 over name, dtype, shape and bytes of every parameter in name order, however the file is packed."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(_uint8()).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _uint8() -> Any:
    import torch

    return torch.uint8
