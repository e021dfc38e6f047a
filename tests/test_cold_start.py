"""What `fastnnunet predict` does not load, what it keeps for the next time, and that it means the same without."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from fastnnunet import api
from fastnnunet.cli.main import app, command, spread_multi_values
from fastnnunet.engines import compiled
from fastnnunet.engines.openvino import shared_core
from fastnnunet.engines.registry import create_engine
from fastnnunet.errors import BackendError
from fastnnunet.images.output import RunArguments
from fastnnunet.images.sitk import SimpleITKIO
from fastnnunet.runtime import loaded
from fastnnunet.specs.bundle import load_bundle_spec
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image

WORDS = [
    ["-i", "a", "-o", "b", "-m", "c"],
    ["-i", "a", "-o", "b", "-d", "4", "-c", "3d_fullres", "-f", "0", "1", "all", "-p", "plans", "-tr", "trainer"],
    ["-i", "a", "-o", "b", "-m", "c", "--precision", "bf16", "--threads", "3", "-step_size", "0.25", "-npp", "0"],
    ["-i", "a", "-o", "b", "-m", "c", "--keep-largest", "--fill-holes", "1", "-num_parts", "2", "-part_id", "1"],
    ["-i", "a", "-o", "b", "-m", "c", "--disable_tta", "--verbose", "--output-format", "dicom-seg", "-device", "cpu"],
]
WRONG = [
    ["-i", "a"],
    ["-i", "a", "-o", "b", "--precision", "fp8"],
    ["-i", "a", "-o", "b", "--threads", "many"],
    ["-i", "a", "-o", "b", "-step_size", "half"],
    ["-i", "a", "-o", "b", "-m", "c", "more"],
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy")).bundle


def _parsed(made: Any, words: list[str]) -> dict[str, Any] | str:
    """The arguments of the function, or what is said of wrong ones."""
    predict = made.commands["predict"]
    try:
        return predict.make_context("predict", spread_multi_values(["predict", *words])[1:]).params
    except Exception as e:  # Typer's errors moved from one package to another
        return f"{type(e).__name__}: {e.format_message()}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [*WORDS, *WRONG], ids=" ".join)
def test_arguments_mean_what_typer_makes_of_them(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_npp", raising=False)
    ours, typers = _parsed(command(), words), _parsed(typer.main.get_command(app), words)
    assert ours == typers
    assert isinstance(ours, str) == (words in WRONG)
    if not isinstance(ours, str) and not isinstance(typers, str):
        assert {name: type(value) for name, value in ours.items()} == {n: type(v) for n, v in typers.items()}


def test_predicting_a_plain_image_loads_neither_itk_nor_yaml_nor_converters(bundle: Path, tmp_path: Path) -> None:
    image = write_image(smooth_noise((12, 25, 20), 0), tmp_path / "a_0000.nii.gz")
    words = ["predict", "-i", str(image), "-o", str(tmp_path / "out"), "-m", str(bundle), "--threads", "1"]
    heavy = ("SimpleITK", "yaml", "scipy", "pydantic", "rich.progress", "torch", "nnunetv2", "openvino.tools.ovc")
    code = (
        "import sys\nfrom fastnnunet.cli.main import main\n"
        f"try:\n    main({words})\n"
        f"except SystemExit as e:\n    print(e.code, [m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert (tmp_path / "out" / "a.nii.gz").is_file()


def test_openvino_keeps_its_converter(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    code = (
        "import sys\nfrom fastnnunet.engines.openvino import import_openvino\n"
        "openvino = import_openvino()\nassert 'openvino.tools.ovc' not in sys.modules\n"
        "assert import_openvino() is openvino\n"
        "try:\n    openvino.convert_model('nowhere.onnx')\n"
        "except Exception as e:\n    print('nowhere.onnx' in str(e))\n"
        "import openvino.tools.ovc as ovc\nprint(callable(ovc.convert_model))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_closed_pipe_is_no_success(bundle: Path, tmp_path: Path) -> None:
    """What cannot be printed is said as Python says it, although the process ends early."""
    image = write_image(smooth_noise((12, 25, 20), 0), tmp_path / "a_0000.nii.gz")
    words = ["predict", "-i", image, "-o", tmp_path / "out", "-m", bundle, "--threads", "1"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-m", "fastnnunet", *map(str, words)], stdout=full, stderr=-1)
    assert done.returncode != 0
    assert (tmp_path / "out" / "a.nii.gz").is_file()


class TestCompiledModels:
    """Kept for the next process: the same logits to the last bit, whatever became of the files."""

    @pytest.fixture(autouse=True)
    def kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        pytest.importorskip("openvino")
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
        return tmp_path / "home" / "compiled"

    @staticmethod
    def logits(bundle: Path, **options: Any) -> np.ndarray:
        spec = load_bundle_spec(bundle)
        engine = create_engine("openvino", bundle, spec, **{"threads": 1, **options})
        shape = (2, len(spec.channel_names), *spec.patch_size)
        return engine.run(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).copy()

    @pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"apart": True, "threads": 2}], ids=str)
    def test_give_the_same_and_read_no_model(
        self, options: dict[str, Any], bundle: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import openvino

        expected = self.logits(bundle, **options)
        assert len(list(kept.iterdir())) == 1
        monkeypatch.setattr(openvino.Core, "read_model", None)
        np.testing.assert_array_equal(self.logits(bundle, **options), expected)

    def test_of_other_settings_are_others(self, bundle: Path, kept: Path) -> None:
        has_bf16 = "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # else it is fp32 again
        made = 0
        for options, is_other in (
            ({}, True),
            ({"threads": 2}, True),
            ({"precision": "bf16"}, has_bf16),
            ({"apart": True}, True),
        ):
            self.logits(bundle, **options)
            made += is_other
            assert len(list(kept.iterdir())) == made, options

    @pytest.mark.parametrize("damage", ["empty", "cut off", "flipped bit", "of something else", "a folder"])
    def test_that_are_damaged_are_made_again(self, damage: str, bundle: Path, kept: Path) -> None:
        expected = self.logits(bundle)
        (file,) = kept.iterdir()
        content = file.read_bytes()
        junk = b"junk" * 100
        if damage == "a folder":
            file.unlink()
            (file / "inside").mkdir(parents=True)
        else:
            file.write_bytes(
                {
                    "empty": b"",
                    "cut off": content[:-10],
                    "flipped bit": content[:500] + bytes([content[500] ^ 1]) + content[501:],
                    "of something else": hashlib.sha256(junk).digest() + junk,
                }[damage]
            )
        np.testing.assert_array_equal(self.logits(bundle), expected)
        assert list(kept.iterdir()) == [file]
        assert damage == "a folder" or hashlib.sha256(file.read_bytes()[32:]).digest() == file.read_bytes()[:32]

    def test_a_home_that_is_none(self, bundle: Path, kept: Path) -> None:
        kept.parent.parent.mkdir(exist_ok=True)
        kept.parent.write_text("a file")
        assert np.isfinite(self.logits(bundle)).all()
        assert kept.parent.read_text() == "a file"

    def test_do_not_grow_for_ever(self, bundle: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits(bundle)
        (first,) = kept.iterdir()
        monkeypatch.setattr(compiled, "MOST_BYTES", int(2.5 * first.stat().st_size))
        self.logits(bundle, threads=2)
        os.utime(first, (1, 1))
        self.logits(bundle)  # is used again, so the other one is the oldest
        self.logits(bundle, threads=3)
        assert first in list(kept.iterdir())
        assert len(list(kept.iterdir())) == 2


class TestModelOnItsWay:
    """The first image is read while the model is loaded; what is wrong with the model ends the run as before."""

    @pytest.mark.parametrize("single", [True, False])
    def test_reads_meanwhile(self, single: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        image = write_image(smooth_noise((12, 25, 20), 0), tmp_path / "in" / "a_0000.nii.gz")
        was_read = threading.Event()
        create, read = loaded.create_ensemble, SimpleITKIO.read

        def slowly(*arguments: Any, **options: Any) -> Any:
            assert was_read.wait(60)
            return create(*arguments, **options)

        def told(self: SimpleITKIO, files: Any) -> Any:
            image = read(self, files)
            was_read.set()
            return image

        monkeypatch.setattr(loaded, "create_ensemble", slowly)
        monkeypatch.setattr(SimpleITKIO, "read", told)
        source = image if single else image.parent
        done = api.predict(bundle, source, tmp_path / "out", backend="onnxruntime", threads=1)
        assert [case.case_id for case in done.done] == ["a"]
        assert done.engine == "onnxruntime"
        assert done.load_s > 0 < done.wall_s

    @pytest.mark.parametrize("processes", [0, 3])
    @pytest.mark.parametrize("single", [True, False])
    def test_a_model_that_does_not_load(
        self, single: bool, processes: int, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = write_image(smooth_noise((12, 25, 20), 0), tmp_path / "in" / "a_0000.nii.gz")

        def fail(*_: Any, **__: Any) -> Any:
            raise BackendError("no such engine here")

        monkeypatch.setattr(loaded, "create_ensemble", fail)
        arguments = RunArguments(num_processes_preprocessing=processes, num_processes_segmentation_export=processes)
        with pytest.raises(BackendError, match="no such engine here"):
            api.predict(
                bundle, image if single else image.parent, tmp_path / "out", backend="onnxruntime", arguments=arguments
            )
        assert not (tmp_path / "out").exists()
