"""The gate: what int8 and bf16 lose is measured on real cases, and a bundle changes only when that is little."""

import json
import os
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnnunet.engines.openvino import shared_core
from fastnnunet.engines.registry import create_engine, is_installed
from fastnnunet.errors import BackendError, CorruptError, MismatchError, NotFoundError, ParityError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.release.gate import Comparison, require
from fastnnunet.release.gate_cases import TrainingCases, choose_cases
from fastnnunet.release.quantize import QuantizeJob, quantize_bundle
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec, write_bundle_json
from tests.bundles import PATCH_3D, Toy, ToyModel, make_toy_model, smooth_noise, write_image
from tests.test_cli import refused, run
from tests.tiny import CONFIGURATION, DATASET

has_openvino = is_installed("openvino")
needs_openvino = pytest.mark.skipif(not has_openvino, reason="openvino is not installed")
needs_nncf = pytest.mark.skipif(
    not has_openvino or find_spec("nncf") is None, reason="nncf (extra quantize) is not installed"
)
SHAPE = (16, 25, 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ToyModel:
    return make_toy_model(Toy(), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, and two without any structure."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        write_image(smooth_noise(SHAPE, number), folder / f"real{number}_0000.nii.gz")
    for number in range(2):
        write_image(np.full(SHAPE, 7, np.float32), folder / f"flat{number}_0000.nii.gz")
    return folder


@pytest.fixture
def real(images: Path, tmp_path: Path) -> Path:
    """The images with structure."""
    folder = tmp_path / "real"
    folder.mkdir()
    for file in images.glob("real*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def bundle(model: ToyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model.bundle, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def onnx_job(bundle: Path, images: Path, **changes) -> QuantizeJob:
    given = {"backends": ("onnxruntime",), "patches": 8, "max_loss_points": 10.0, "threads": 1}
    return QuantizeJob(bundle=bundle, images=images, **{**given, **changes})


class TestAccepted:
    def test_files_digests_and_measurement(self, bundle: Path, real: Path) -> None:
        seen: list[tuple[str, int, int]] = []
        done = quantize_bundle(onnx_job(bundle, real), lambda e: seen.append((e.what, e.done, e.total)))
        assert sorted(p.name for p in bundle.iterdir()) == [
            "bundle.json",
            "model.onnx",
            "model_int8.onnx",
            "parity.npz",
        ]
        spec = load_bundle_spec(bundle)  # checks every digest
        assert "model_int8.onnx" in spec.files
        measured = spec.measured("int8", "onnxruntime")
        assert measured is not None
        assert measured["cases"] == ["real0", "real1"]
        assert measured["calibration"] == {"cases": "images", "patches": 8, "seed": 0}
        assert measured["against"] == "fp32"
        assert "no labels" in measured["judged_on"]
        assert measured["dice_fp32"] == 1.0
        assert 0.9 <= measured["dice"] < 1.0
        assert spec.measured("int8", "openvino") is None
        assert seen[0] == ("calibrating for onnxruntime", 1, 8)
        assert seen[-1] == ("comparing with fp32", 2, 2)
        assert done.sizes_bytes["model_int8.onnx"] < done.sizes_bytes["model.onnx"]
        assert done.record["comparisons"] == [measured]

    def test_dice_is_that_of_nnunet(self, bundle: Path, real: Path, tmp_path: Path) -> None:
        """Against labels that are nobody's prediction, nnU-Net's evaluation of the written files is the oracle."""
        from nnunetv2.evaluation.evaluate_predictions import compute_metrics
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

        rng = np.random.default_rng(0)
        for number in range(4):
            values = smooth_noise(SHAPE, 10 + number, mean=0, spread=1)
            label = np.digitize(values, [0.3, 1.0]).astype(np.uint8)
            label[0, 0, : rng.integers(1, 4)] = 2
            write_image(label, tmp_path / "labels" / f"real{number}.nii.gz")
        job = onnx_job(bundle, real, labels=tmp_path / "labels", cases=("real1", "real3"), max_loss_points=100.0)
        (comparison,) = quantize_bundle(job).comparisons
        assert comparison.against == "labels"
        for precision, dice in (("fp32", comparison.dice_fp32), ("int8", comparison.dice)):
            out = tmp_path / precision
            predictor = Predictor.load(bundle, "onnxruntime", threads=1, precision=precision, mirroring=False)
            predictor.predict_files(real, out)
            oracle = [
                compute_metrics(
                    str(tmp_path / "labels" / f"{case}.nii.gz"), str(out / f"{case}.nii.gz"), SimpleITKIO(), [1, 2]
                )["metrics"]
                for case in ("real1", "real3")
            ]
            expected = np.mean([np.mean([case[label]["Dice"] for case in oracle]) for label in (1, 2)])
            assert dice == pytest.approx(expected, abs=1e-12)

    def test_predict_uses_it(self, bundle: Path, real: Path, model: ToyModel) -> None:
        quantize_bundle(onnx_job(bundle, real))
        spec = load_bundle_spec(bundle)
        image = np.random.default_rng(0).standard_normal((2, 1, *PATCH_3D)).astype(np.float32)
        exact = create_engine("onnxruntime", bundle, spec, threads=1).run(image)
        backend = create_engine("onnxruntime", bundle, spec, threads=1, precision="int8")
        assert (backend.name, backend.precision) == ("onnxruntime", "int8")
        got = backend.run(image)
        assert not np.array_equal(got, exact)
        assert (got.argmax(1) == exact.argmax(1)).mean() > 0.95

    def test_again_replaces_it(self, bundle: Path, real: Path) -> None:
        quantize_bundle(onnx_job(bundle, real))
        before = load_bundle_spec(bundle).files["model_int8.onnx"]
        quantize_bundle(onnx_job(bundle, real))
        assert load_bundle_spec(bundle).files["model_int8.onnx"] == before, "the same seed gives the same model"
        quantize_bundle(onnx_job(bundle, real, seed=1))
        spec = load_bundle_spec(bundle)
        assert spec.files["model_int8.onnx"] != before
        measured = spec.measured("int8", "onnxruntime")
        assert measured is not None
        assert measured["calibration"]["seed"] == 1

    def test_a_kill_between_files_leaves_a_whole_bundle(
        self, bundle: Path, real: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quantize_bundle(onnx_job(bundle, real))

        move = os.replace

        def killed(source, target):
            if Path(target).name == "model_int8.onnx":
                raise KeyboardInterrupt
            move(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize_bundle(onnx_job(bundle, real, seed=1))
        monkeypatch.undo()
        assert "model_int8.onnx" not in load_bundle_spec(bundle).files

    def test_a_bundle_of_format_1(self, bundle: Path, real: Path) -> None:
        """As the first version wrote it: without model_files and folds."""
        from fastnnunet.specs.canonical import sha256_of

        raw = json.loads((bundle / "bundle.json").read_text())
        for name in ("model_files", "folds", "self_sha256"):
            del raw[name]
        raw["format_version"] = 1
        raw["self_sha256"] = sha256_of(raw)
        (bundle / "bundle.json").write_text(json.dumps(raw))
        quantize_bundle(onnx_job(bundle, real))
        assert load_bundle_spec(bundle).format_version == 2

    def test_damage_is_noticed(self, bundle: Path, real: Path) -> None:
        quantize_bundle(onnx_job(bundle, real))
        file = bundle / "model_int8.onnx"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(CorruptError, match=r"model_int8\.onnx was changed"):
            load_bundle_spec(bundle)


def test_benchmark(bundle: Path, real: Path, tmp_path: Path) -> None:
    """The script behind the record: on all images, with labels that are the int8 prediction itself."""
    from pipelines.measure.predict import precisions

    quantize_bundle(onnx_job(bundle, real))
    int8 = Predictor.load(bundle, "onnxruntime", threads=1, precision="int8", mirroring=False)
    int8.predict_files(real, tmp_path / "labels")
    row = precisions.measure(bundle, real, tmp_path / "labels", rounds=1)
    (comparison,) = row["comparisons"]
    assert comparison["cases"] == ("real0", "real1", "real2", "real3")
    assert comparison["dice"] == 1.0
    assert comparison["loss_points"] < 0
    assert row["size_bytes"]["int8 onnxruntime"] == (bundle / "model_int8.onnx").stat().st_size
    assert set(row["cpu_ms_per_patch"]) == {"fp32 onnxruntime", "int8 onnxruntime"}
    assert all(ms > 0 for ms in row["cpu_ms_per_patch"].values())


@needs_nncf
def test_both_backends_and_bf16(bundle: Path, real: Path) -> None:
    from fastnnunet.engines.torch import cpu_has_bf16

    precisions = ("int8", "bf16") if cpu_has_bf16() else ("int8",)
    done = quantize_bundle(onnx_job(bundle, real, backends=(), precisions=precisions))
    expected = [("int8", "openvino"), ("int8", "onnxruntime"), ("bf16", "openvino")][: len(precisions) + 1]
    assert sorted((c.precision, c.backend) for c in done.comparisons) == sorted(expected)
    spec = load_bundle_spec(bundle)
    assert {"model_int8.onnx", "model_int8.xml", "model_int8.bin"} <= spec.files.keys()
    image = np.random.default_rng(0).standard_normal((1, 1, *PATCH_3D)).astype(np.float32)
    exact = create_engine("openvino", bundle, spec, threads=1).run(image).copy()
    got = create_engine("openvino", bundle, spec, threads=1, precision="int8").run(image)
    assert not np.array_equal(got, exact)
    assert (got.argmax(1) == exact.argmax(1)).mean() > 0.95
    for precision, backend in expected:
        measured = spec.measured(precision, backend)
        assert measured is not None
        assert ("calibration" in measured) == (precision == "int8")


class TestRefused:
    def test_ruined_calibration(self, bundle: Path, images: Path) -> None:
        """On images without structure every activation is far too small: the network is clipped to nothing."""
        before = contents(bundle)
        job = onnx_job(bundle, images, cases=("real0", "real1", "real2", "real3"))
        with pytest.raises(
            ParityError, match=r"(?s)more than 10 points.*int8 onnxruntime: Dice \d+\.\d\d, fp32 100.00 \(-\d\d"
        ) as caught:
            quantize_bundle(job)
        allow = float(str(caught.value).partition("--max-dice-loss ")[2].split()[0])
        assert contents(bundle) == before
        done = quantize_bundle(replace(job, max_loss_points=allow))
        assert done.comparisons[0].loss_points > 10
        assert "model_int8.onnx" in load_bundle_spec(bundle).files

    def test_command(self, bundle: Path, images: Path, real: Path, tmp_path: Path) -> None:
        before = contents(bundle)
        options = ("--backend", "onnxruntime", "--patches", "8", "--threads", "1")
        message = refused(
            run("export", "quantize", bundle, "-i", images, *options, "--case", "real0", "real1", "real2", "real3"),
            "more than 0.2 points of Dice",
            "nothing was written",
            "--max-dice-loss",
            "-g",
        )
        assert "int8 onnxruntime: Dice" in message
        assert contents(bundle) == before
        wanted = ("predict", "-i", real, "-o", tmp_path / "out", "-m", bundle, "--precision", "int8")
        refused(
            run(*wanted, "--backend", "onnxruntime"),
            "no int8 model for onnxruntime",
            f"fastnnunet export quantize {bundle} --precision int8 --backend onnxruntime",
        )
        assert not (tmp_path / "out").exists()
        report = tmp_path / "report.json"
        done = run("export", "quantize", bundle, "-i", real, *options, "--max-dice-loss", "10", "-o", report)
        assert done.returncode == 0, done.stderr
        assert "int8 onnxruntime: Dice 9" in done.stdout
        assert "model_int8.onnx" in done.stdout
        assert json.loads(report.read_text())["comparisons"][0]["backend"] == "onnxruntime"
        done = run(*wanted, "--backend", "onnxruntime")
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "out").glob("real*.nii.gz"))) == 4
        if has_openvino:
            refused(
                run(*wanted, "--backend", "openvino"), "model_int8.xml is missing", "--backend onnxruntime, which has"
            )

    def test_command_without_nnunet_data(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("nnUNet_preprocessed", raising=False)
        refused(
            run("export", "quantize", bundle, "--backend", "onnxruntime"), "nnUNet_preprocessed is not set", "-i IMAGES"
        )

    def test_wrong_words(self, bundle: Path, real: Path, tmp_path: Path) -> None:
        with pytest.raises(SpecError) as caught:
            QuantizeJob(
                bundle=bundle,
                precisions=("fp16",),
                backends=("torch",),
                labels=real,
                patches=0,
                max_loss_points=float("nan"),
            )
        for option in ("--precision: got fp16", "--backend: got torch", "-g", "--patches: got 0", "--max-dice-loss"):
            assert option in str(caught.value)
        with pytest.raises(SpecError, match="--case: no case named nobody\nthere are 4: real0"):
            quantize_bundle(onnx_job(bundle, real, cases=("nobody",)))
        with pytest.raises(NotFoundError, match=r"no label in .*real0, real1\nexpected real0\.nii\.gz"):
            quantize_bundle(onnx_job(bundle, real, labels=tmp_path))
        with pytest.raises(BackendError, match="bf16 is computed by openvino, got backend"):
            quantize_bundle(onnx_job(bundle, real, precisions=("int8", "bf16")))

    def test_nothing_to_judge(self, bundle: Path, real: Path, tmp_path: Path, monkeypatch) -> None:
        """Labels without foreground, predictions without foreground."""
        for number in range(4):
            write_image(np.zeros(SHAPE, np.uint8), tmp_path / "empty" / f"real{number}.nii.gz")
        monkeypatch.setattr(LoadedBundle, "postprocess", lambda self, logits, case: (np.zeros(SHAPE, np.uint8), None))
        with pytest.raises(MismatchError, match="no foreground to judge in real0, real1"):
            quantize_bundle(onnx_job(bundle, real, labels=tmp_path / "empty"))

    def test_labels_of_another_shape(self, bundle: Path, real: Path, tmp_path: Path) -> None:
        for number in range(4):
            write_image(np.ones((4, 5, 6), np.uint8), tmp_path / "labels" / f"real{number}.nii.gz")
        with pytest.raises(MismatchError, match=r"differ in shape: label \(4, 5, 6\), prediction \(16, 25, 24\)"):
            quantize_bundle(onnx_job(bundle, real, labels=tmp_path / "labels"))

    @needs_openvino
    def test_no_nncf(self, bundle: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "fastnnunet.export.quantize_openvino.find_spec", lambda name: None if name == "nncf" else object()
        )
        with pytest.raises(BackendError, match=r"(?s)not installed: nncf.*fastnnunet\[quantize\]"):
            quantize_bundle(onnx_job(bundle, real, backends=()))

    @needs_openvino
    def test_a_cpu_without_bf16(
        self, bundle: Path, real: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Prediction says that it computes in fp32 and does; there is nothing to be measured."""
        core = shared_core()

        class OldCore:
            def __getattr__(self, name: str) -> Any:
                return getattr(core, name)

            def get_property(self, device: str, name: str) -> Any:
                value = core.get_property(device, name)
                return [v for v in value if v != "BF16"] if name == "OPTIMIZATION_CAPABILITIES" else value

        monkeypatch.setattr("fastnnunet.engines.openvino.shared_core", OldCore)
        spec = load_bundle_spec(bundle)
        image = np.random.default_rng(0).standard_normal((1, 1, *PATCH_3D)).astype(np.float32)
        backend = create_engine("openvino", bundle, spec, threads=1, precision="bf16")
        assert backend.precision == "fp32"
        assert "this CPU has no bf16" in caplog.text
        fp32 = create_engine("openvino", bundle, spec, threads=1)
        np.testing.assert_array_equal(backend.run(image).copy(), fp32.run(image))
        with pytest.raises(BackendError, match="this CPU has no bf16: openvino would compute in fp32"):
            quantize_bundle(onnx_job(bundle, real, backends=("openvino",), precisions=("bf16",)))


@needs_openvino
def test_predict_says_when_bf16_was_not_measured(bundle: Path, real: Path, tmp_path: Path) -> None:
    if "BF16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")
    predict = ("predict", "-i", real, "-o", tmp_path / "out", "-m", bundle, "--precision", "bf16")
    assert "export quantize BUNDLE --precision bf16" in run(*predict).stderr
    before = contents(bundle)
    quantize_bundle(onnx_job(bundle, real, backends=("openvino",), precisions=("bf16",), max_loss_points=5.0))
    after = contents(bundle)
    assert {n for n in after if after[n] != before.get(n)} == {"bundle.json"}, "bf16 needs no model of its own"
    assert "export quantize" not in run(*predict).stderr


class TestChoice:
    def test_held_out_first(self) -> None:
        choice = choose_cases("abcdef", "fb", (), 8)
        assert (choice.judge, choice.calibrate, choice.overlap) == (("b", "f"), tuple("acde"), False)
        assert choose_cases("abcdef", "fb", (), 1) == replace(choice, judge=("b",))
        # named cases are judged on wherever they come from, and none of them is calibrated on
        assert choose_cases("abcdef", "fb", ("c",), 8) == replace(choice, judge=("c",), calibrate=tuple("ade"))

    def test_images_without_a_split(self) -> None:
        choice = choose_cases("abcde", "", (), 8)
        assert (choice.judge, choice.calibrate) == (tuple("ab"), tuple("cde"))
        alone = choose_cases("a", "", (), 8)
        assert (alone.judge, alone.calibrate, alone.overlap) == (("a",), ("a",), True)

    def test_wrong(self) -> None:
        with pytest.raises(SpecError, match="--cases: got 0"):
            choose_cases("ab", "", (), 0)


def test_gate_takes_the_worst() -> None:
    """A gain passes, a loss of exactly the limit passes, and one too much of several is enough."""

    def lost(points: float) -> Comparison:
        return Comparison(
            precision="int8",
            backend="openvino",
            against="labels",
            dice_fp32=0.75,
            dice=0.75 - points / 100,
            label_agreement=0.99,
            cases=("a",),
        )

    require([lost(-1), lost(0.125)], 0.125, "1 case")
    with pytest.raises(ParityError, match=r"(?s)Dice 74.56, fp32 75.00 \(-0.44 points\).*--max-dice-loss 0.5$"):
        require([lost(-1), lost(0.4375)], 0.2, "1 case")


class TestTrainingCases:
    def test_the_fold_of_a_model(self, world: Path, tmp_path: Path) -> None:
        """Judged on what nnU-Net held out, in the axes of a prediction; nothing of it is calibrated on."""
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        folder = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
        export_bundle(folder, 1, tmp_path / "bundle")
        spec = load_bundle_spec(tmp_path / "bundle")
        source = TrainingCases(spec)
        cases = [f"tiny_{i:02d}" for i in range(10)]
        split = generate_crossval_split(cases, seed=12345, n_splits=5)[1]
        assert source.choice.judge == tuple(sorted(split["val"]))
        assert source.choice.calibrate == tuple(sorted(split["train"]))
        assert source.held_out
        case_id = source.choice.judge[0]
        loaded = LoadedBundle.load(tmp_path / "bundle", "onnxruntime", threads=1, mirroring=False)
        case = source.preprocessed(case_id)
        prediction, _ = loaded.postprocess(loaded.logits(case.data_CZYX), case)
        assert prediction.shape == source.labels_ZYX(case_id).shape

        job = QuantizeJob(
            bundle=tmp_path / "bundle", backends=("onnxruntime",), patches=4, threads=1, max_loss_points=100.0
        )
        done = quantize_bundle(job)
        assert done.judged_on == f"{len(split['val'])} held-out cases"
        assert done.comparisons[0].against == "labels"
        truth, got = source.labels_ZYX(case_id), prediction
        assert done.comparisons[0].cases == source.choice.judge
        by_hand = 2 * ((truth == 1) & (got == 1)).sum() / ((truth == 1).sum() + (got == 1).sum())
        one = quantize_bundle(replace(job, cases=(case_id,))).comparisons[0]
        by_hand += 2 * ((truth == 2) & (got == 2)).sum() / ((truth == 2).sum() + (got == 2).sum())
        assert one.dice_fp32 == pytest.approx(by_hand / 2)
        assert one.dice_fp32 > 0
        assert "held-out" in quantize_bundle(replace(job, cases=(case_id,))).judged_on
        assert "training" in quantize_bundle(replace(job, cases=(sorted(split["train"])[0],))).judged_on

    def test_an_ensemble(self, world: Path, tmp_path: Path) -> None:
        """A quantised twin for every fold; every case was seen by some fold."""
        folder = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
        export_bundle(folder, (0, 1), tmp_path / "bundle")
        job = QuantizeJob(
            bundle=tmp_path / "bundle", backends=("onnxruntime",), patches=4, threads=1, max_loss_points=100.0
        )
        done = quantize_bundle(job)
        assert {"model_0_int8.onnx", "model_1_int8.onnx"} <= load_bundle_spec(tmp_path / "bundle").files.keys()
        assert done.judged_on == "5 preprocessed training cases"
        predictor = Predictor.load(tmp_path / "bundle", "onnxruntime", precision="int8", folds=(1,))
        assert [b.precision for b in predictor.backends] == ["int8"]


def test_a_cascade_stage_wants_its_preprocessed_cases(tmp_path: Path, real: Path) -> None:
    model = make_toy_model(Toy(channels=2), tmp_path / "cascade")
    spec = model.spec  # the second channel becomes the label of the previous stage
    stage = replace(
        spec,
        channel_names=spec.channel_names[:1],
        normalization_schemes=spec.normalization_schemes[:1],
        use_mask_for_norm=spec.use_mask_for_norm[:1],
        previous_labels=(1,),
    )
    write_bundle_json(stage, model.bundle / "bundle.json")
    with pytest.raises(SpecError, match="cascade stage, which cannot be calibrated on images alone"):
        quantize_bundle(onnx_job(model.bundle, real))
