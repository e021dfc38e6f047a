"""A digest that a student's checkpoint carries over all that is in it: bits that flip on a disk still load as numbers.

It is an entry of the file, so that there is no second file to lose or to be a step ahead; nnU-Net reads past it.
Checkpoints without one, written before there was one or by nnU-Net, are checked by the CRC-32 that torch stores with
every tensor and that torch does not look at when it loads.
"""

import hashlib
import os
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnnunet.errors import NO_ROOM, BuildError, CorruptError, DiskSpaceError

DIGEST = "fastnnunet_sha256"


def write_checkpoint(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint with its digest, whole or not at all, also when the power fails.

    Raises DiskSpaceError, BuildError.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("wb") as f:
            torch.save({**checkpoint, DIGEST: digest_of(checkpoint)}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except (OSError, RuntimeError) as e:  # torch makes a RuntimeError of a write that failed
        temporary.unlink(missing_ok=True)
        cause = next((c for c in (e, e.__cause__, e.__context__) if isinstance(c, OSError)), None)
        if cause is not None and cause.errno in NO_ROOM:
            raise DiskSpaceError(
                f"no room left while writing {file}\nfree some space and go on with --continue; earlier epochs are kept"
            ) from e
        raise BuildError(
            f"cannot write {file}: {e}\nmend that and go on with --continue; earlier epochs are kept"
        ) from e


def require_undamaged(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Raise CorruptError when a checkpoint that was loaded from `file` is not what was written."""
    if DIGEST in checkpoint:
        damaged = checkpoint[DIGEST] != digest_of({k: v for k, v in checkpoint.items() if k != DIGEST})
        how = "its contents are not those it was written with"
    else:
        damaged, how = _has_damaged_record(file), "a part of it does not have the checksum it was written with"
    if damaged:
        raise CorruptError(
            f"checkpoint {file} is damaged: {how}\n"
            f"copy it again from where it is whole; or remove it with: rm {shlex.quote(str(file))}\n"
            "and give the command that trains it again with --continue, which goes on from the checkpoint before it"
        )


def digest_of(checkpoint: Mapping[str, Any]) -> str:
    """Hex SHA-256 over names, tensors, arrays, numbers and texts in their order, however they are packed."""
    digest = hashlib.sha256()
    _update(digest, checkpoint)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(f"map {len(value)};".encode())
        for name, item in value.items():
            _update(digest, name)
            _update(digest, item)
    elif isinstance(value, list | tuple | set | frozenset):
        digest.update(f"list {len(value)};".encode())
        for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            _update(digest, item)
    elif isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"array {value.dtype} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, os.PathLike):
        _update(digest, os.fspath(value))
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex | np.generic):
        # a number of NumPy is its value, since what reads checkpoints may give it as one of Python
        plain = value.item() if isinstance(value, np.generic) else value
        digest.update(f"{type(plain).__name__} {plain!r};".encode())
    else:  # what is read back as something else has no digest of its own
        digest.update(b"other;")


def _has_damaged_record(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False  # torch's format before 1.6 has no checksums
    with zipfile.ZipFile(file) as archive:
        try:
            return archive.testzip() is not None
        except (zipfile.BadZipFile, OSError):
            return True
