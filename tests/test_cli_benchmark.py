"""`fastnnunet benchmark` on a toy model that exists twice: as nnU-Net folds, and as a bundle holding fold 0."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.configuration import default_num_processes

from fastnnunet.bench.arms import BundleArm
from fastnnunet.bench.measure import peak_memory_bytes
from fastnnunet.bench.metrics import label_metrics
from fastnnunet.cli.main import main
from fastnnunet.runtime.cases import Case
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image

CASES = ("one", "three", "two")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with labels, a bundle, and a results folder with two folds of which the first is the bundle's."""
    root = tmp_path_factory.mktemp("benchmark")
    model = make_toy_model(Toy(mirror_axes=None), root)
    folder = root / "results" / "Dataset999_Toy" / "nnUNetTrainer__toyPlans__3d_toy"
    shutil.copytree(model.folder, folder)
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)
    # nnU-Net mirrors along these axes; the second fold is the first with some noise
    checkpoint["inference_allowed_mirroring_axes"] = (0, 1, 2)
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    generator = torch.Generator().manual_seed(0)
    checkpoint["network_weights"] = {
        k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in checkpoint["network_weights"].items()
    }
    (folder / "fold_1").mkdir()
    torch.save(checkpoint, folder / "fold_1" / "checkpoint_final.pth")
    rng = np.random.default_rng(0)
    for seed, case in enumerate(CASES):
        image = smooth_noise((16, 22, 27), seed)
        write_image(image, root / "images" / f"{case}_0000.nii.gz")
        write_image(rng.integers(0, 3, image.shape).astype(np.uint8), root / "labels" / f"{case}.nii.gz")
    return root


def run(place: Path, *args: object, folds: tuple[int, ...] = (0, 1), threads: int = 1) -> int:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(place / "results"))
        base = ("benchmark", "-d", 999, "-c", "3d_toy", "-p", "toyPlans", "-f", *folds, "--threads", threads)
        try:
            main([str(a) for a in (*base, *args)])
        except SystemExit as e:
            return int(e.code or 0)
    return 0


def files(place: Path, out: Path) -> tuple[object, ...]:
    return ("-i", place / "images", "-g", place / "labels", "-m", place / "bundle", "-o", out)


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_one_run_measures_speed_parity_and_dice(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--backend", "onnxruntime", "torch", "--baseline-cases", 2, "--repeat", 2, "--no-memory")
    assert run(place, *files(place, tmp_path), *options) == 0
    record_file = next(tmp_path.glob("benchmark_*.json"))
    record = json.loads(record_file.read_text())
    assert record_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    ensemble, fold, *students = record["arms"].values()
    assert list(record["arms"])[:2] == ["nnunetv2 ensemble", "nnunetv2 one fold"]
    assert [s["backend"] for s in students] == ["onnxruntime", "torch"]
    assert record["threads"] == 1
    assert record["hardware"]["cpu"]
    assert record["versions"]["nnunetv2"]

    assert (ensemble["cases"], ensemble["samples"], ensemble["folds"]) == (2, 2, ["0", "1"])
    assert list(ensemble["per_case_s"]) == ["one", "three"]  # the first two by name
    assert ensemble["size_bytes"] == 2 * fold["size_bytes"] == 8 * ensemble["parameters"]
    for student in students:
        assert (student["cases"], student["samples"]) == (3, 6)
        assert student["parity"]["label_agreement"] == 1.0
        assert student["parity"]["max_abs_logit_difference"] < 1e-3
        ratios = [ensemble["per_case_s"][c] / student["per_case_s"][c] for c in ("one", "three")]
        assert student["times_faster_than_ensemble"] == pytest.approx(np.median(ratios))
    assert ensemble["times_faster_than_ensemble"] == 1.0
    assert ensemble["agreement_with_ensemble"] == 1.0

    predictions = tmp_path / "predictions"
    for case in ("one", "three"):  # the bundle holds fold 0, so it predicts what fold 0 without mirroring predicts
        single = read(predictions / "nnunetv2_one_fold" / f"{case}.nii.gz")
        assert np.mean(single == read(predictions / "bundle_onnxruntime" / f"{case}.nii.gz")) >= 0.9999
        assert np.mean(single == read(predictions / "nnunetv2_ensemble" / f"{case}.nii.gz")) < 0.9999
    dice = [
        label_metrics(
            read(place / "labels" / f"{case}.nii.gz"),
            read(predictions / "bundle_torch" / f"{case}.nii.gz"),
            (1,),
            (1.0, 1.0, 1.0),
        ).dice
        for case in CASES
    ]
    assert students[1]["metrics"]["a"]["dice"] == pytest.approx(np.mean(dice))
    printed = capsys.readouterr().out
    assert "nnunetv2 ensemble" in printed
    assert "bundle onnxruntime" in printed


def test_ensemble_arm_is_nnunets_prediction(place: Path, tmp_path: Path) -> None:
    """The baseline that speed is measured against labels every voxel as `predict_from_files_sequential` does."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from fastnnunet.nnunet.reference import load_reference

    folder = next((place / "results").glob("*/*"))
    oracle = nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    oracle.initialize_from_trained_model_folder(str(folder), (0, 1))
    image = place / "images" / "two_0000.nii.gz"
    oracle.predict_from_files_sequential([[str(image)]], [str(tmp_path / "oracle")])
    reference = load_reference(folder, (0, 1), mirroring=True, threads=1)
    stages = reference.predict_case([image], tmp_path / "mine.nii.gz")
    assert set(stages) == {"preprocess_s", "infer_s", "postprocess_s"}
    assert min(stages.values()) > 0
    np.testing.assert_array_equal(read(tmp_path / "oracle.nii.gz"), read(tmp_path / "mine.nii.gz"))


def test_bad_input_is_one_message_and_nothing_is_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    changed = tmp_path / "changed"
    shutil.copytree(place / "bundle", changed)
    with (changed / "model.onnx").open("ab") as f:
        f.write(b"x")
    (tmp_path / "few").mkdir()
    shutil.copy(place / "labels" / "one.nii.gz", tmp_path / "few")
    given = files(place, out)
    too_many = {"threads": default_num_processes + 1}
    cases = [
        (given, {"folds": (0, 3)}, "fold(s) 3 have no checkpoint_final.pth"),
        ((*given, "-g", tmp_path / "few"), {}, "three, two"),
        ((*given, "--backend", "abacus"), {}, "abacus"),
        ((*given, "--repeat", 0), {}, "expected at least 1"),
        ((*given, "-i", tmp_path / "none"), {}, "input not found"),
        ((*given, "-m", changed), {}, "was changed after export"),
        ((*given, "--precision", "fp8"), {}, "expected one of fp32, bf16, fp16, int8"),
        (given, too_many, "nnUNet_def_n_proc"),
    ]
    for args, how, expected in cases:
        assert run(place, *args, **how) == 2, args
        message = capsys.readouterr().err
        assert expected in message
        assert "Traceback" not in message
        assert not out.exists()


def test_memory_of_an_arm(place: Path, tmp_path: Path) -> None:
    """The process holds the engine and NumPy, and no torch."""
    arm = BundleArm(name="x", bundle=place / "bundle", backend="onnxruntime", precision="fp32", threads=1)
    case = Case("one", (place / "images" / "one_0000.nii.gz",))
    assert 30e6 < peak_memory_bytes(arm, case, tmp_path / "one.nii.gz") < 400e6
