"""Reading pickles without running anything in them.

A pickle is a program: it names callables, which unpickling would import and call. This reader imports nothing. A name
stands for a plain constant or for a constructor out of a table (containers and values of the standard library, NumPy's
scalars and arrays under the module names of all its versions), and what a constructor returns has no behaviour that the
rest of the pickle could use: arrays and what callers add, such as tensors, are inert records until `load_plain` is done
with the pickle and exchanges them.
"""

import datetime
import math
import os
import pathlib
import pickle
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

_DTYPE = re.compile(r"(?P<kind>[?biufcSUMm])\d*|O8?")
_ORDERS = frozenset("<>=|")
_FACTORIES: dict[str, type] = {t.__name__: t for t in (list, dict, set, tuple, int, float, str, bool)}


class RefusedTypeError(pickle.UnpicklingError):
    """A pickle holds something that is not read."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not allowed")
        self.name = name


class Pickled:
    """Stands for a value that is made when the pickle is done; has no attribute a pickle can set."""

    __slots__ = ()

    def settle(self, settled: Callable[[Any], Any]) -> Any:
        """The value; `settled` does the same for a value in which there may be records."""
        raise NotImplementedError


class Constructor:
    """What a pickle may call. Neither a type nor a function, so that a pickle can do nothing else with it."""

    __slots__ = ("_make", "name")
    name: str
    _make: Callable[..., Any]

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise RefusedTypeError(f"changing {self.name}")

    def __setstate__(self, state: Any) -> None:
        raise RefusedTypeError(f"changing {self.name}")


def load_plain(file: IO[bytes], constants: Mapping[str, Any] = {}) -> Any:
    """The next pickle of `file`, if it holds nothing but plain values and `constants` by their full names.

    Raises RefusedTypeError naming what is not read; a damaged pickle raises nearly anything.
    """
    return settle(load_records(file, constants=constants))


def load_records(
    file: IO[bytes],
    constructors: Mapping[str, Callable[..., Any]] = {},
    constants: Mapping[str, Any] = {},
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """As `load_plain`, with the records still in it, which `settle` exchanges.

    `persistent` makes what a persistent id stands for. It and constructors return records or plain values, and
    constants are neither types nor callable.
    """
    unpickler = _Unpickler(file)
    unpickler.constructors, unpickler.constants = {**_CONSTRUCTORS, **constructors}, constants
    unpickler.persistent = persistent
    return unpickler.load()


def settle(value: Any) -> Any:
    """`value` with its records exchanged for what they stand for: in place in containers, and in new tuples."""
    return _Settling().settled(value)


class _Unpickler(pickle.Unpickler):
    constructors: Mapping[str, Callable[..., Any]]
    constants: Mapping[str, Any]
    persistent: Callable[[Any], Any] | None

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of protocol 2
        full = f"{module}.{name}"
        if full in self.constants:
            return self.constants[full]
        if full not in self.constructors:
            raise RefusedTypeError(full)
        return Constructor(full, self.constructors[full])

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise RefusedTypeError("a persistent id")
        return self.persistent(pid)


class _Settling:
    def __init__(self) -> None:
        self._done: dict[int, tuple[Any, Any]] = {}  # id -> value, which must live as long as its id counts, and result

    def settled(self, value: Any) -> Any:
        if not isinstance(value, Pickled | dict | list | tuple | deque):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = value, value  # before its contents: a container may hold itself
            self._done[id(value)] = value, self._settle(value)
        return self._done[id(value)][1]

    def _settle(self, value: Any) -> Any:
        if isinstance(value, Pickled):
            return value.settle(self.settled)
        if isinstance(value, tuple):
            items = [self.settled(item) for item in value]
            same = all(a is b for a, b in zip(items, value, strict=True))
            return value if same else tuple(items)
        attributes = getattr(value, "__dict__", {})
        for name in set(attributes) - {"_metadata"}:  # of a state dict; others could hide methods
            del attributes[name]
        for key, item in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
            new = self.settled(item)
            if new is not item:
                value[key] = new
        return value


class _Dtype(Pickled):
    """numpy.dtype('f8', False, True) and its state: numbers, text and times; `O` only for the items of an array."""

    __slots__ = ("_code", "_dtype")

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise RefusedTypeError(f"numpy.dtype({code!r})")
        self._code = code
        self._dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *structure = state[:5]
        if structure != [None] * 3 or order not in _ORDERS:
            raise RefusedTypeError(f"numpy.dtype({self._code!r}) with fields")
        if self._code[0] in "Mm" and len(state) > 8:
            unit, count, divisor, _ = state[8][1]
            self._dtype = np.dtype(f"{self._code}[{int(count)}{unit.decode()}/{int(divisor)}]")
        self._dtype = self._dtype.newbyteorder(order)

    def settle(self, settled: Callable[[Any], Any]) -> np.dtype[Any]:
        return self._dtype


class _Array(Pickled):
    """numpy.ndarray; its state comes later, when it was made by `_reconstruct`."""

    __slots__ = ("_value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self._value = value

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran, data = state[-4:]
        value = _array(data, dtype, shape, "F" if fortran else "C")
        self._value = value.astype(value.dtype.newbyteorder("="), copy=False)

    def settle(self, settled: Callable[[Any], Any]) -> np.ndarray:
        if self._value is None:
            raise pickle.UnpicklingError("an array without contents")
        if self._value.dtype.hasobject:
            for index, item in np.ndenumerate(self._value):
                self._value[index] = settled(item)
        return self._value


def _plain_dtype(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError(f"expected a dtype, got {type(dtype).__name__}")
    return dtype._dtype


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    dtype = _plain_dtype(dtype)
    shape = tuple(int(n) for n in (shape if isinstance(shape, tuple) else (shape,)))
    if min(shape, default=0) < 0 or order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array of shape {shape}, order {order}")
    if dtype.hasobject:
        if not isinstance(data, list) or len(data) != math.prod(shape):
            raise pickle.UnpicklingError("an array of objects without its items")
        flat = np.empty(len(data), object)
        for n, item in enumerate(data):
            flat[n] = item
        return flat.reshape(shape, order=order)
    if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape) * dtype.itemsize:
        raise pickle.UnpicklingError(f"an array of shape {shape}, {dtype}, with other data")
    if not data:
        return np.zeros(shape, dtype)
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any = (0,), code: Any = b"b") -> _Array:
    if getattr(kind, "name", None) != "numpy.ndarray":
        raise RefusedTypeError(f"an array of type {getattr(kind, 'name', type(kind).__name__)}")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> _Array:
    if order == "K" and axis_order is not None:
        return _Array(_array(data, dtype, shape, "C").transpose([int(n) for n in axis_order]))
    return _Array(_array(data, dtype, shape, order))


def _scalar(dtype: Any, data: Any = b"") -> Any:
    dtype = _plain_dtype(dtype)
    if dtype.hasobject or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError(f"a scalar of {dtype} with other data")
    return np.frombuffer(data, dtype)[0] if data else dtype.type()


def _refuse_call(*arguments: Any) -> Any:
    raise RefusedTypeError("calling a type")


def _default_dict(factory: Any = None) -> Any:
    if factory is None:
        return defaultdict()
    kind = _FACTORIES.get(factory.name.removeprefix("builtins.")) if isinstance(factory, Constructor) else None
    if kind is None:
        raise RefusedTypeError(f"a defaultdict of {getattr(factory, 'name', type(factory).__name__)}")
    return defaultdict(kind)


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedTypeError(f"_codecs.encode to {encoding!r}")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    return bytes(_byte_array(*arguments))


def _byte_array(data: Any = b"", encoding: str = "latin1") -> bytearray:
    if isinstance(data, str):
        data = _encoded(data, encoding)
    if not isinstance(data, bytes | bytearray):  # a number would be a length
        raise RefusedTypeError(f"a bytearray of {type(data).__name__}")
    return bytearray(data)


def _set(items: Any = ()) -> set[Any]:
    return set(_items(items))


def _frozen_set(items: Any = ()) -> frozenset[Any]:
    return frozenset(_items(items))


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(items if isinstance(items, dict) else _items(items))


def _counter(items: Any = ()) -> Counter[Any]:
    if items and not isinstance(items, dict):
        raise RefusedTypeError("a Counter of something else than counts")
    return Counter(items)


def _deque(items: Any = (), maxlen: int | None = None) -> deque[Any]:
    return deque(_items(items), maxlen)


def _items(items: Any) -> Any:
    if not isinstance(items, list | tuple | set | frozenset):
        raise RefusedTypeError(f"a container of {type(items).__name__}")
    return items


def _path(pure: type[pathlib.PurePath], real: str) -> Callable[..., Any]:
    def make(*parts: str) -> pathlib.PurePath:
        return (pathlib.Path if real == os.name else pure)(*parts)

    return make


_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encoded,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _byte_array,
    "builtins.complex": complex,
    "builtins.frozenset": _frozen_set,
    "builtins.set": _set,
    "builtins.slice": slice,
    "collections.Counter": _counter,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.deque": _deque,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _refuse_call,  # only as the type of an array
    **{f"builtins.{name}": _refuse_call for name in ("list", "dict", "tuple", "int", "float", "str", "bool")},
    **{f"datetime.{kind}": getattr(datetime, kind) for kind in ("date", "datetime", "time", "timedelta", "timezone")},
    **{f"{core}.numeric._frombuffer": _from_buffer for core in ("numpy.core", "numpy._core")},
    **{
        f"{core}.{module}.{name}": make
        for core in ("numpy.core", "numpy._core")
        for module in ("multiarray", "_multiarray_umath")
        for name, make in (("scalar", _scalar), ("_reconstruct", _reconstruct))
    },
    **{
        f"{module}.{name}": _path(pure, system)
        for module in ("pathlib", "pathlib._local")
        for name, pure, system in (
            ("PosixPath", pathlib.PurePosixPath, "posix"),
            ("WindowsPath", pathlib.PureWindowsPath, "nt"),
            ("PurePosixPath", pathlib.PurePosixPath, ""),
            ("PureWindowsPath", pathlib.PureWindowsPath, ""),
        )
    },
}
