"""nnU-Net model folders through the fast path: equal to nnUNetPredictor, exported once, torch never again."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from fastnnunet.cli.main import main
from fastnnunet.errors import BackendError, FastnnUNetError, MismatchError, NotFoundError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.export.models import cached_bundle, load_model
from fastnnunet.nnunet.files.paths import trained_folds
from fastnnunet.nnunet.onnx import to_onnx
from fastnnunet.runtime.ensemble import ensemble_logits
from fastnnunet.runtime.sliding_window import SlidingWindow
from fastnnunet.specs.bundle import load_bundle_spec
from tests.bundles import Toy, smooth_noise, write_image
from tests.readonly import read_only
from tests.teachers import make_teacher, nnunet_files, nnunet_predictor, random_labels, save_checkpoint

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
SHAPE = (18, 23, 29)


@dataclass
class Kind:
    toy: Toy
    folds: tuple[int, ...] = (0, 1)
    cascade: bool = False
    shape: tuple[int, ...] = SHAPE
    spacing_xyz: tuple[float, ...] = (1.0, 1.0, 1.0)


KINDS = {
    "five_folds": Kind(Toy(mirror_axes=(0, 1, 2)), (0, 1, 2, 3, 4)),
    "regions": Kind(
        Toy(labels=REGIONS, regions_class_order=[1, 3, 2], mirror_axes=(1, 2)), spacing_xyz=(1.1, 0.9, 1.0)
    ),
    "2d": Kind(Toy(dims=2, spacing=(1.0, 1.0), mirror_axes=(0, 1)), shape=(5, 30, 41), spacing_xyz=(1.0, 1.1, 3.0)),
    "cascade": Kind(Toy(mirror_axes=(0, 1, 2)), cascade=True, spacing_xyz=(1.2, 0.9, 1.0)),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of the module's own, so that each model is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("FASTNNUNET_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            kind = KINDS[name]
            made[name] = make_teacher(kind.toy, tmp_path_factory.mktemp(name), kind.folds, cascade=kind.cascade)
        return made[name]

    return get


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were not installed."""
    from fastnnunet.export import models

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)


def _labels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _write_case(kind: Kind, folder: Path) -> list[Path]:
    return [write_image(smooth_noise(kind.shape, 1, border=2), folder / "case_0000.nii.gz", kind.spacing_xyz)]


@pytest.mark.parametrize("mirroring", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_equals_nnunet(name: str, mirroring: bool, teachers: Any, tmp_path: Path) -> None:
    kind, folder = KINDS[name], teachers(name)
    files = _write_case(kind, tmp_path / "in")
    previous = None
    if kind.cascade:
        previous = tmp_path / "previous"
        write_image(random_labels(kind.shape, 3, 5), previous / "case.nii.gz", kind.spacing_xyz)
    oracle = nnunet_predictor(folder, kind.folds, mirroring=mirroring)
    nnunet_files(oracle, {"case": files}, tmp_path / "theirs", probabilities=True, previous=previous)
    predictor = load_model(folder, kind.folds, backend="onnxruntime", threads=1, mirroring=mirroring)
    predictor.predict_files(tmp_path / "in", tmp_path / "ours", save_probabilities=True, previous=previous)
    ours, theirs = (_labels(tmp_path / who / "case.nii.gz") for who in ("ours", "theirs"))
    assert (ours == theirs).mean() >= 0.9999
    assert np.bincount(theirs.ravel()).max() < 0.97 * theirs.size  # there is something to agree on
    got, expected = (np.load(tmp_path / who / "case.npz")["probabilities"] for who in ("ours", "theirs"))
    np.testing.assert_allclose(got, expected, atol=5e-3)  # logits are rounded to float16 on both sides


def test_one_fold_of_a_model(teachers: Any, tmp_path: Path) -> None:
    folder = teachers("five_folds")
    files = _write_case(KINDS["five_folds"], tmp_path / "in")
    outcomes = {}
    for fold in (3, 1):
        nnunet_files(nnunet_predictor(folder, (fold,)), {"case": files}, tmp_path / f"theirs{fold}")
        # of the exported ensemble, since a bundle can be used in parts
        bundle = cached_bundle(folder, KINDS["five_folds"].folds)
        load_model(bundle, (fold,), backend="onnxruntime").predict_files(tmp_path / "in", tmp_path / f"ours{fold}")
        outcomes[fold] = _labels(tmp_path / f"theirs{fold}" / "case.nii.gz")
        assert (_labels(tmp_path / f"ours{fold}" / "case.nii.gz") == outcomes[fold]).mean() >= 0.9999
    assert (outcomes[3] != outcomes[1]).mean() > 0.01
    with pytest.raises(SpecError, match=r"-f 7: the bundle .* has fold\(s\) 0 1 2 3 4"):
        load_model(bundle, (7,))
    with pytest.raises(SpecError, match="one checkpoint"):
        load_model(bundle, checkpoint="checkpoint_best.pth")


@pytest.mark.parametrize("use_gaussian", [True, False])
def test_half_precision_sums_are_bit_for_bit_nnunets(teachers: Any, use_gaussian: bool) -> None:
    """The same PyTorch networks on both sides: every voxel of the float16 logits is the same."""
    folder, folds = teachers("five_folds"), (4, 0, 2)
    oracle = nnunet_predictor(folder, folds, gaussian=use_gaussian, step_size=0.7)

    class Network:
        name, precision = "torch", "fp32"

        def __init__(self, weights: dict[str, Any]) -> None:
            self.weights = weights

        def run(self, batch: np.ndarray) -> np.ndarray:
            oracle.network.load_state_dict(self.weights)
            with torch.inference_mode():
                return torch.cat([oracle.network(torch.from_numpy(one[None])) for one in batch]).numpy()

    data = smooth_noise((19, 33, 30), 3, mean=0, spread=1)[None]
    expected = oracle.predict_logits_from_preprocessed_data(torch.from_numpy(data)).numpy()
    assert expected.dtype == np.float16
    got = ensemble_logits(
        data,
        [Network(weights) for weights in oracle.list_of_parameters],
        SlidingWindow(
            num_heads=3, patch_size=(16, 20, 24), step_size=0.7, mirror_axes=(0, 1, 2), use_gaussian=use_gaussian
        ),
    )
    np.testing.assert_array_equal(got, expected)


class TestCache:
    @pytest.fixture
    def folder(self, teachers: Any, tmp_path: Path) -> Path:
        """A copy that may be changed."""
        return Path(shutil.copytree(teachers("five_folds"), tmp_path / "model"))

    def test_later_runs_need_no_torch(self, teachers: Any, tmp_path: Path) -> None:
        folder = teachers("five_folds")
        cached_bundle(folder, (0, 1, 2, 3, 4))
        _write_case(KINDS["five_folds"], tmp_path / "in")
        code = (
            "import sys\nfor m in ('torch', 'nnunetv2', 'onnx', 'zarr'): sys.modules[m] = None\n"
            "from fastnnunet.cli.main import main\nmain(sys.argv[1:])"
        )
        words = ["predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m", folder, "-f", *"01234"]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words), "--backend", "onnxruntime"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "exporting" not in done.stderr
        assert (tmp_path / "out" / "case.nii.gz").is_file()

    def test_key_is_what_the_files_hold(self, teachers: Any, folder: Path) -> None:
        folds = (0, 1, 2, 3, 4)
        bundle = cached_bundle(teachers("five_folds"), folds)
        assert cached_bundle(folder, folds) == bundle  # another place, the same model
        assert bundle.parent.name == "teachers"
        checkpoint = torch.load(folder / "fold_1" / "checkpoint_final.pth", weights_only=True)
        changed = {k: v + 0.01 for k, v in checkpoint["network_weights"].items()}
        save_checkpoint(folder / "fold_1" / "checkpoint_final.pth", changed, "3d_toy", (0, 1, 2))
        other = cached_bundle(folder, folds)
        assert other != bundle
        digests = [load_bundle_spec(b).provenance["weights_sha256"] for b in (bundle, other)]
        assert [fold for fold in "01234" if digests[0][fold] != digests[1][fold]] == ["1"]

    def test_a_damaged_bundle_is_made_again(self, folder: Path) -> None:
        bundle = cached_bundle(folder, (2, 3))
        (bundle / "model_1.onnx").write_bytes(b"damage")
        told: list[str] = []
        predictor = load_model(
            folder, (2, 3), progress=lambda e: told.append(getattr(e, "text", "")), backend="onnxruntime"
        )
        assert any("made again" in message for message in told)
        assert predictor.spec.model_files == ("model_0.onnx", "model_1.onnx")
        assert sorted(p.name for p in bundle.iterdir()) == ["bundle.json", "model_0.onnx", "model_1.onnx", "parity.npz"]

    def test_without_torch_it_says_what_to_do(self, folder: Path, no_torch: None) -> None:
        with pytest.raises(
            BackendError, match=r"(?s)torch, nnunetv2.*pip install 'fastnnunet\[train\]'.*export onnx -m"
        ):
            cached_bundle(folder, (0, 4))

    def test_a_cache_that_cannot_be_written(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "home").mkdir()
        monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
        with read_only(tmp_path / "home"), pytest.raises(FastnnUNetError, match="FASTNNUNET_CACHE_HOME"):
            cached_bundle(folder, (0,))
        assert list((tmp_path / "home").iterdir()) == []

    def test_what_is_missing_is_named(self, folder: Path, tmp_path: Path) -> None:
        shutil.rmtree(folder / "fold_3")
        with pytest.raises(NotFoundError, match=r"fold\(s\) 3 have no checkpoint_final\.pth"):
            load_model(folder, (0, 1, 2, 3, 4))
        assert trained_folds(folder, "checkpoint_final.pth") == (0, 1, 2, 4)
        with pytest.raises(NotFoundError, match=r"neither bundle\.json nor plans\.json"):
            load_model(tmp_path)
        with pytest.raises(NotFoundError, match="no fold"):
            load_model(folder, checkpoint="checkpoint_best.pth")


class TestExport:
    def test_command(self, teachers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder, bundle = teachers("2d"), tmp_path / "bundle"
        main_words = ["export", "onnx", "-m", str(folder), "-f", "0", "1", "-o", str(bundle)]
        with pytest.raises(SystemExit) as done:
            main(main_words)
        assert done.value.code == 0
        assert "parity with PyTorch on 2 noise patches" in capsys.readouterr().out
        spec = load_bundle_spec(bundle)
        assert (spec.folds, spec.model_files) == (("0", "1"), ("model_0.onnx", "model_1.onnx"))
        assert spec.provenance["parity"]["patches"] == "noise"
        parity = np.load(bundle / "parity.npz")
        expected = 0
        for weights in nnunet_predictor(folder, (0, 1)).list_of_parameters:
            network = nnunet_predictor(folder, (0,)).network.eval()
            network.load_state_dict(weights)
            with torch.inference_mode():
                expected = expected + network(torch.from_numpy(parity["image"])).numpy() / 2
        np.testing.assert_allclose(parity["logits"], expected, atol=1e-4)

    def test_refusals(self, teachers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = ["-f", "0", "-o", str(tmp_path / "b")]
        for words, message in (
            (["-m", "x", "-d", "4"], "either -m, or -d with --teacher"),
            (["-m", "x", "-r", "2"], "leave out -r"),
            (["--teacher"], "--teacher needs -d"),
            ([], "which model?"),
        ):
            with pytest.raises(SystemExit) as done:
                main(["export", "onnx", *words, *out])
            assert done.value.code == 2
            assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_folds_of_different_models(self, teachers: Any, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(teachers("2d"), tmp_path / "model"))
        save_checkpoint(folder / "fold_1" / "checkpoint_final.pth", {"a": torch.zeros(1)}, "2d_toy", (0, 1))
        with pytest.raises(MismatchError, match="do not fit the checkpoint"):
            export_bundle(folder, (0, 1), tmp_path / "b", needs_real_patches=False)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]

    def test_a_network_that_onnx_cannot_express(self) -> None:
        class Undecided(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x if x.sum() > 0 else -x

        with pytest.raises(MismatchError, match=r"(?s)Undecided cannot be exported.*nnUNetv2_predict"):
            to_onnx(Undecided(), 1, (8, 8, 8))


def test_results_folder(teachers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-d, -c, -p, -tr, -f and -chk name a model as they do for nnUNetv2_predict."""
    folder = teachers("five_folds")
    results = tmp_path / "results"
    copy = results / "Dataset999_Toy" / "MyTrainer__myPlans__3d_mine"
    shutil.copytree(folder, copy)
    (copy / "fold_all").mkdir()
    shutil.copy(copy / "fold_2" / "checkpoint_final.pth", copy / "fold_all" / "checkpoint_best.pth")
    monkeypatch.setenv("nnUNet_results", str(results))
    files = _write_case(KINDS["five_folds"], tmp_path / "in")
    words = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-d", "999", "-tr", "MyTrainer", "-p", "myPlans"]
    words += ["-c", "3d_mine", "-f", "all", "-chk", "checkpoint_best.pth", "--disable_tta", "-step_size", "0.8"]
    with pytest.raises(SystemExit) as done:
        main(["predict", *map(str, words), "--backend", "onnxruntime", "-npp", "2", "-device", "cpu"])
    assert done.value.code == 0
    nnunet_files(nnunet_predictor(folder, (2,), mirroring=False, step_size=0.8), {"case": files}, tmp_path / "theirs")
    ours, theirs = (_labels(tmp_path / who / "case.nii.gz") for who in ("out", "theirs"))
    assert (ours == theirs).mean() >= 0.9999
    record = json.loads((tmp_path / "out" / "predict_from_raw_data_args.json").read_text())
    assert record["num_processes_preprocessing"] == 2
    assert record["fastnnunet"]["folds"] == ["all"]
    assert record["fastnnunet"]["mirror_axes"] == []
