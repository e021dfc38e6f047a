"""Checkpoints and other pickles: every type nnU-Net's trainers write is read, nothing that could run code is.

The oracle is `torch.load(weights_only=False)` and `pickle.loads`, on files made here.
"""

import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastnnunet.errors import CorruptError
from fastnnunet.nnunet.files.checkpoint import load_checkpoint, load_weights, strip_prefix
from fastnnunet.nnunet.files.torch_file import read_torch_file
from fastnnunet.specs.checks.pickles import RefusedTypeError, load_plain
from tests.tiny import CONFIGURATION, DATASET

SCALARS = [np.dtype(code).type(1) for code in "?bhilBHILefdgFDG"]
SCALARS += [np.str_("ä"), np.str_(""), np.bytes_(b"x"), np.datetime64("2020-01-02T03", "10m"), np.timedelta64(3, "s")]
ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
    np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[:, ::-1],
    np.zeros((0, 3)),
    np.array(3, np.uint16),
    np.array(["a", "bcd"]),
    np.array([1, (np.float64(2), np.arange(2)), None], dtype=object),
]
PLAIN = {
    "scalars": SCALARS,
    "arrays": ARRAYS,
    "dtype": np.dtype("float32"),
    "default": defaultdict(list, {"train_losses": [np.float32(1)], "nested": defaultdict(dict, a=1)}),
    "without factory": defaultdict(None, a=1),
    "ordered": OrderedDict([("b", 1), ("a", OrderedDict(c=np.float64(2)))]),
    "counter": Counter("aab"),
    "queue": deque([np.int64(1), (np.arange(2),)], maxlen=4),
    "sets": [{1, "a"}, frozenset({np.int64(2)}), set()],
    "bytes": [b"", b"a\xff", bytearray(b"b")],
    "numbers": [True, None, -5, 2**100, 1.5, float("inf"), 1 + 2j, slice(1, None, 2)],
    "paths": [pathlib.Path("/a/b c"), pathlib.PurePosixPath("x"), pathlib.PureWindowsPath("C:\\x")],
    "times": [datetime(2024, 5, 6, 7, 8, 9), timedelta(days=1)],
    "tuples": (1, (2, [3, {"four": (np.float64(5), ())}])),
    ("key", 1): {0: "keys of other types"},
}
_SHARED = torch.arange(12.0)
TENSORS = {
    **{str(t): torch.tensor([[1, 2], [3, 4]]).to(t) for t in (torch.float64, torch.float16, torch.bfloat16)},
    **{str(t): torch.tensor([1, 0]).to(t) for t in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
    **{str(t): torch.tensor([1, 0]).to(t) for t in (torch.bool, torch.complex64, torch.uint16)},
    "whole": _SHARED,
    "views": [_SHARED[3:7], _SHARED.reshape(3, 4).t()[1:], _SHARED[:0]],
    "none and one": [torch.empty(0, 3), torch.tensor(2.0), torch.zeros(())],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "gradient": torch.ones(2, requires_grad=True),
    "device": [torch.device("cuda", 0), torch.device("cpu")],
    "size": torch.Size([1, 2]),
    "dtype": [torch.float32, torch.bfloat16],
}


def assert_same(got: Any, expected: Any) -> None:
    """Equal in value and type, all the way down."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same(got[key], expected[key])
        if isinstance(expected, defaultdict):
            assert got.default_factory is expected.default_factory
    elif isinstance(expected, torch.Tensor):
        assert (got.dtype, got.shape, got.stride(), got.requires_grad) == (
            *(expected.dtype, expected.shape, expected.stride()),
            expected.requires_grad,
        )
        assert torch.equal(got, expected)
    elif isinstance(expected, np.ndarray) and expected.dtype == object:
        assert_same(got.ravel().tolist(), expected.ravel().tolist())
    elif isinstance(expected, np.ndarray):
        assert got.dtype == expected.dtype
        assert expected.size == 0 or got.strides == expected.strides
        np.testing.assert_array_equal(got, expected)
        assert got.flags.writeable
    elif isinstance(expected, list | tuple | deque):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    else:
        assert got == expected


def as_numpy_1(path: Path) -> None:
    """The same file with the module names that NumPy 1 writes."""
    data = path.read_bytes()
    if not zipfile.is_zipfile(path):
        path.write_bytes(data.replace(b"numpy._core.", b"numpy.core."))
        return
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(path, "w") as after:
        for item in before.infolist():
            content = before.read(item)
            assert not item.filename.endswith("data.pkl") or b"numpy._core.multiarray" in content
            after.writestr(item, content.replace(b"numpy._core.", b"numpy.core."))


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("numpy_version", [1, 2])
def test_every_type_as_torch_reads_it(numpy_version: int, is_zip: bool, tmp_path: Path) -> None:
    file = tmp_path / "c.pth"
    tensors = {key: t for key, t in TENSORS.items() if is_zip or key != "torch.uint16"}  # torch cannot read it either
    torch.save({**PLAIN, **tensors}, file, _use_new_zipfile_serialization=is_zip)
    if numpy_version == 1:
        as_numpy_1(file)
    got = read_torch_file(file)
    assert_same(got, torch.load(file, "cpu", weights_only=False))
    assert got["views"][0].untyped_storage().data_ptr() == got["whole"].untyped_storage().data_ptr()
    got["scalars"].append(1)  # nothing of it stays bound to this package when it is saved again
    assert b"fastnnunet" not in pickle.dumps({key: got[key] for key in PLAIN})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_plain_type_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps(PLAIN, protocol)
    assert_same(load_plain(io.BytesIO(data)), pickle.loads(data))
    torch.save(PLAIN, tmp_path / "c.pth", pickle_protocol=max(protocol, 1))
    assert_same(read_torch_file(tmp_path / "c.pth"), torch.load(tmp_path / "c.pth", weights_only=False))


def test_containers_that_hold_themselves_and_values_twice() -> None:
    array = np.arange(3)
    value: list[Any] = [array, (array,), {"a": array}]
    value += [value, (value,)]
    got = load_plain(io.BytesIO(pickle.dumps(value)))
    assert got[3] is got
    assert got[4][0] is got
    assert got[1][0] is got[0]
    assert got[2]["a"] is got[0]


@pytest.mark.parametrize("numpy_version", [1, 2])
def test_what_nnunets_trainer_writes(
    numpy_version: int, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    base = world / "preprocessed" / DATASET
    plans, dataset = (json.loads((base / n).read_text()) for n in ("nnUNetPlans.json", "dataset.json"))
    plans["continue_training"] = False
    trainer = nnUNetTrainer(plans, CONFIGURATION, 0, dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.network(torch.ones(1, 1, 16, 16, 16))[0].sum().backward()
    trainer.optimizer.step()
    for epoch in range(2):
        trainer.current_epoch = epoch
        trainer.logger.log("lrs", trainer.optimizer.param_groups[0]["lr"], epoch)
        trainer.on_train_epoch_end([{"loss": np.float32(0.5)}, {"loss": np.array(0.25, np.float32)}])
        counts = {key: np.array([3.0, 4.0], np.float32) for key in ("tp_hard", "fp_hard", "fn_hard")}
        trainer.on_validation_epoch_end([{"loss": np.array(0.1, np.float32), **counts}])
    trainer._best_ema = trainer.logger.get_value("ema_fg_dice", -1)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    if numpy_version == 1:
        as_numpy_1(tmp_path / "c.pth")
    expected = torch.load(tmp_path / "c.pth", "cpu", weights_only=False)
    assert isinstance(expected["_best_ema"], np.floating)
    assert "momentum_buffer" in expected["optimizer_state"]["state"][0]
    got = load_checkpoint(tmp_path / "c.pth")
    assert_same(got, expected)
    assert_same(got["network_weights"]._metadata, expected["network_weights"]._metadata)
    trainer.network.load_state_dict(got["network_weights"])
    trainer.optimizer.load_state_dict(got["optimizer_state"])


class Call:
    """Pickled, it is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


class WithState:
    """Pickled, it is what a function makes and a state to change it by."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any) -> None:
        self.reduced = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def attacks(canary: Path) -> dict[str, tuple[Any, str]]:
    """Attack -> what is pickled, and the name that has to be told."""
    write = f"open({str(canary)!r}, 'w')"
    command = f"touch {canary}"
    return {
        "shell": (Call(os.system, command), f"{os.system.__module__}.system"),
        "eval": (Call(eval, write), "builtins.eval"),
        "exec": (Call(exec, write), "builtins.exec"),
        "open": (Call(open, str(canary), "w"), "io.open"),
        "getattr": (Call(getattr, 1, "real"), "builtins.getattr"),
        "import": (Call(__import__, "os"), "builtins.__import__"),
        "process": (Call(subprocess.Popen, ["touch", str(canary)]), "subprocess.Popen"),
        "numpy function": (Call(np.savetxt, str(canary), [1.0]), "numpy.savetxt"),
        "numpy loads": (Call(np.load, str(canary), None, True), "numpy.load"),
        "numpy memmap": (Call(np.memmap, str(canary), "u1", "w+", 0, (1,)), "numpy.memmap"),
        "numpy apply": (Call(np.apply_along_axis, eval, 0, [write]), "numpy.apply_along_axis"),
        "torch function": (Call(torch.save, 1, str(canary)), "torch.serialization.save"),
        "torch loads": (Call(torch.load, str(canary)), "torch.serialization.load"),
        "torch storage": (Call(torch.storage._load_from_bytes, b""), "torch.storage._load_from_bytes"),
        "torch module": (torch.nn.Conv3d(1, 1, 1), "torch.nn.modules.conv.Conv3d"),
        "path method": (Call(pathlib.Path.touch, canary), "getattr"),
        "namespace": (SimpleNamespace(a=1), "types.SimpleNamespace"),
        "factory": (defaultdict(os.getcwd), f"{os.getcwd.__module__}.getcwd"),
        "array of a subclass": (np.ma.masked_array([1, 2]), "numpy.ma"),
        "records": (np.zeros(1, [("a", "f4")]), "numpy.dtype"),
        "random generator": (np.random.default_rng(0), "numpy.random"),
        "sparse": (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        "own class": (Call(CorruptError, "x"), "fastnnunet.errors.CorruptError"),
        "attributes of a constructor": (
            WithState(getattr, (OrderedDict, "fromkeys"), (None, {"__call__": 1})),
            "getattr",
        ),
        "bytes of any length": (Call(bytearray, 10**13), "a bytearray of int"),
        "another codec": (Call(__import__("_codecs").encode, "x", "rot13"), "_codecs.encode to 'rot13'"),
    }


@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
def test_no_pickle_runs_code(attack: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    value, name = attacks(canary)[attack]
    for number, is_zip in enumerate((True, False)):
        file = tmp_path / f"{number}.pth"
        content = {"network_weights": {}, "init_args": {"x": [value]}, "trainer_name": "t"}
        torch.save(content, file, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(CorruptError, match=r"(?s)cannot be read: it holds .*Nothing of it was run") as refused:
            load_checkpoint(file)
        assert name in str(refused.value).splitlines()[0]
        assert "again" not in str(refused.value)  # neither copying nor training helps
        assert not canary.exists()


def test_of_what_torch_says_no_half_sentence_is_told(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"w": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CorruptError, match="cannot be read") as refused:
        load_checkpoint(file)
    said = str(refused.value).splitlines()[0]
    assert said.endswith((" ...", "."))
    assert "failed finding central directory" in said


def test_a_torchscript_program_and_tar_archives_are_refused(tmp_path: Path) -> None:
    import tarfile

    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pth")
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.add(tmp_path / "script.pth", "storages")
    for name in ("script", "tar"):
        with pytest.raises(CorruptError, match=r"holds a (TorchScript program|tar archive)"):
            load_checkpoint(tmp_path / f"{name}.pth")


def test_the_command_that_a_refusal_prints(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3.0)}
    content = {"network_weights": weights, "trainer_name": "t", "logging": np.random.default_rng(0)}
    file = tmp_path / "it's.pth"
    torch.save({**content, "init_args": {"configuration": "2d", "x": SimpleNamespace()}}, file)
    with pytest.raises(CorruptError) as refused:
        load_checkpoint(file)
    command = str(refused.value).splitlines()[-1]
    assert command.startswith("python -c")
    subprocess.run(sys.executable + command.removeprefix("python"), shell=True, check=True)
    got = load_checkpoint(tmp_path / "it's_plain.pth")
    assert torch.equal(got["network_weights"]["a"], weights["a"])
    assert got["init_args"] == {"configuration": "2d"}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
def test_tensors_that_lie_beyond_their_storage(is_zip: bool, tmp_path: Path) -> None:
    """Sizes in the pickle are checked against the numbers that are there."""
    file = tmp_path / "c.pth"
    tensor = torch.arange(100.0)[:77]
    torch.save({"a": tensor}, file, _use_new_zipfile_serialization=is_zip)
    for number, wrong in ((77, 101), (77, 255)):  # K<n>: a number of one byte
        data = file.read_bytes()
        if is_zip:
            changed = io.BytesIO()
            with zipfile.ZipFile(file) as before, zipfile.ZipFile(changed, "w") as after:
                for item in before.infolist():
                    content = before.read(item)
                    after.writestr(item, content.replace(bytes((75, number)), bytes((75, wrong))))
            (tmp_path / "d.pth").write_bytes(changed.getvalue())
        else:
            (tmp_path / "d.pth").write_bytes(data.replace(bytes((75, number)), bytes((75, wrong))))
        with pytest.raises(ValueError, match="beyond storage"):
            read_torch_file(tmp_path / "d.pth")


def test_every_flipped_byte_of_a_pickle_is_read_or_refused() -> None:
    """A damaged pickle ends in an exception that callers expect, never in something else."""
    data = pickle.dumps({"a": [np.float64(1), np.arange(3), defaultdict(list)], "b": OrderedDict(c=2)}, 2)
    refused = 0
    for place in range(len(data)):
        for change in (1, 0x80):
            changed = bytearray(data)
            changed[place] ^= change
            try:
                load_plain(io.BytesIO(changed))
            except Exception:
                refused += 1
    assert refused > len(data) / 2
    with pytest.raises(RefusedTypeError, match=r"(posix|nt)\.system"):
        load_plain(io.BytesIO(pickle.dumps(os.system)))


class _Wrapped(torch.nn.Module):
    """A network with a part called as a wrapper calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(2, 2)
        self.rest = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.module."]
)
def test_prefixes_of_wrappers(prefix: str) -> None:
    weights = {f"{part}.{kind}": torch.rand(2, 2) for part in ("encoder", "decoder") for kind in ("weight", "module.w")}
    wrapped = {prefix + name: tensor for name, tensor in weights.items()}
    assert_same(strip_prefix(wrapped), weights)
    network, source = _Wrapped(), _Wrapped()
    given = {prefix + name: tensor.clone() for name, tensor in source.state_dict().items()}
    for start in (given, strip_prefix(given)):
        load_weights(network, start, Path("here"))
        for name, tensor in source.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor)


def test_compiled_and_parallel_networks() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    expected = list(network.state_dict())
    inner = torch.nn.Sequential(network[0], torch.compile(network[1]))
    for wrapped in (torch.compile(torch.nn.DataParallel(inner)), torch.nn.DataParallel(torch.compile(inner))):
        names = list(wrapped.state_dict())
        assert any("_orig_mod" in name for name in names)
        assert list(strip_prefix(wrapped.state_dict())) == expected


def test_names_that_would_become_equal_stay() -> None:
    weights = {"module.a": torch.zeros(1), "a": torch.ones(1)}
    assert_same(strip_prefix(weights), weights)
