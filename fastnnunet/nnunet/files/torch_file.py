"""Reading what `torch.save` wrote, zip archives and the older format, without running anything in it."""

import io
import math
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from fastnnunet.specs.checks.pickles import Pickled, RefusedTypeError, load_plain, load_records, settle

_ZIP = b"PK\x03\x04"
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
# what these names stand for: a storage for its type of numbers, classes for their names
_CONSTANTS: dict[str, Any] = {
    **{str(t): t for t in vars(torch).values() if isinstance(t, torch.dtype)},
    **{f"{module}.{name}Storage": t for module in ("torch", "torch.cuda") for name, t in _STORAGES.items()},
    **{name: torch.uint8 for name in ("torch.UntypedStorage", "torch.storage.UntypedStorage")},
    **{name: name for name in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")},
}


def read_torch_file(path: Path) -> Any:
    """What was saved, with tensors on the CPU.

    Raises RefusedTypeError for other things than tensors and plain values; a damaged file raises nearly anything.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
        file.seek(0)
        return _read_zip(file) if is_zip else _read_old(file, path)


class _Storages(dict[str, torch.Tensor]):
    """Storage -> its bytes, read when they are first asked for."""

    def __init__(self, read: Callable[[str], bytes]) -> None:
        self._read = read

    def __missing__(self, key: str) -> torch.Tensor:
        self[key] = tensor = _byte_tensor(self._read(key))
        return tensor


class _Storage(Pickled):
    __slots__ = ("_dtype", "_key", "_numel", "_storages")

    def __init__(self, storages: _Storages, dtype: torch.dtype, key: str, numel: int) -> None:
        self._storages, self._dtype, self._key, self._numel = storages, dtype, key, numel

    def __setstate__(self, state: Any) -> None:
        raise RefusedTypeError("a storage with a state")

    def tensor(self, dtype: torch.dtype | None, offset: Any, size: Any, stride: Any) -> torch.Tensor:
        """A view of the storage; `dtype` None: of the storage's own."""
        data, numbers = self._storages[self._key], (offset, *size, *stride)
        if data.numel() != self._numel * self._dtype.itemsize:
            raise ValueError(f"storage {self._key} has {data.numel()} bytes, not {self._numel} x {self._dtype}")
        dtype = dtype or self._dtype
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"a tensor of size {size}, stride {stride}, offset {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else -1
        if (last + 1) * dtype.itemsize > data.numel():
            raise ValueError(f"a tensor of size {size} that lies beyond storage {self._key}")
        return torch.empty(0, dtype=dtype).set_(data.untyped_storage(), offset, tuple(size), tuple(stride))


class _Tensor(Pickled):
    __slots__ = ("_arguments", "_is_parameter", "_needs_gradient", "_storage")

    def __init__(self, storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, needs_gradient: Any) -> None:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype | None):
            raise ValueError("a tensor without a storage")
        self._storage, self._arguments = storage, (dtype, offset, size, stride)
        self._needs_gradient, self._is_parameter = bool(needs_gradient), False

    def __setstate__(self, state: Any) -> None:
        raise RefusedTypeError("a tensor with a state")

    def parameter(self, needs_gradient: Any) -> "_Tensor":
        """The same as a parameter."""
        new = _Tensor(self._storage, *self._arguments, needs_gradient)
        new._is_parameter = True
        return new

    def settle(self, settled: Callable[[Any], Any]) -> torch.Tensor:
        tensor = self._storage.tensor(*self._arguments)
        if self._is_parameter:
            return torch.nn.Parameter(tensor, requires_grad=self._needs_gradient)
        return tensor.requires_grad_(self._needs_gradient)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, needs_gradient: Any = False, hooks: Any = None, metadata: Any = 0
) -> _Tensor:
    return _Tensor(storage, None, offset, size, stride, needs_gradient)


def _tensor_of_type(
    storage: Any, offset: Any, size: Any, stride: Any, needs_gradient: Any, hooks: Any, dtype: Any, metadata: Any = 0
) -> _Tensor:
    return _Tensor(storage, dtype, offset, size, stride, needs_gradient)


def _parameter(tensor: Any, needs_gradient: Any, hooks: Any = None, state: Any = None) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter without a tensor")
    return tensor.parameter(needs_gradient)


def _with_attributes(make: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, which are left out. A class of its own is refused by its name before."""
    if getattr(make, "name", None) not in _CONSTRUCTORS:
        raise ValueError("a tensor made in an unknown way")
    return make(*arguments)


_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch.Size": lambda items=(): torch.Size(items),
    "torch.device": lambda *names: torch.device(*names),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}


def _records(file: IO[bytes], storages: _Storages, found: dict[str, int]) -> Any:
    """The pickle in which tensors name their storages; `found` gets the size in bytes of each."""

    def persistent(pid: Any) -> _Storage:
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or view not in ([], [None]):
            raise RefusedTypeError(f"a persistent {kind!r}")
        found[str(key)] = int(numel) * dtype.itemsize
        return _Storage(storages, dtype, str(key), int(numel))

    return load_records(file, _CONSTRUCTORS, _CONSTANTS, persistent)


def _read_zip(file: IO[bytes]) -> Any:
    archive = torch._C.PyTorchFileReader(file)  # torch.load's own, so that both see the same files in it
    names = set(archive.get_all_records())
    if "constants.pkl" in names:
        raise RefusedTypeError("a TorchScript program")
    if "byteorder" in names and archive.get_record("byteorder") != sys.byteorder.encode():
        raise ValueError(f"its numbers are not {sys.byteorder}-endian")
    storages = _Storages(lambda key: archive.get_record(f"data/{key}"))
    return settle(_records(io.BytesIO(archive.get_record("data.pkl")), storages, {}))


def _read_old(file: IO[bytes], path: Path) -> Any:
    """The format before PyTorch 1.6: a pickle, then the numbers of its storages one after the other."""
    if tarfile.is_tarfile(path):
        raise RefusedTypeError("a tar archive of PyTorch 0.1")
    if load_plain(file) != _OLD_MAGIC or load_plain(file) != _OLD_VERSION:
        raise ValueError("no file of torch.save")
    if load_plain(file)["little_endian"] != (sys.byteorder == "little"):
        raise ValueError(f"its numbers are not {sys.byteorder}-endian")
    storages, sizes = _Storages(lambda key: b""), dict[str, int]()
    records = _records(file, storages, sizes)
    for key in load_plain(file):
        file.read(8)  # how many numbers follow, as the pickle says as well
        storages[key] = _byte_tensor(file.read(sizes[key]))
    return settle(records)


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
