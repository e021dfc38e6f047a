"""`fastnnunet benchmark` on a toy model that exists twice: as nnU-Net folds, and as a bundle holding fold 0."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.configuration import default_num_processes

from fastnnunet.bench.cold import cold_start
from fastnnunet.bench.job import BenchmarkJob, prepare
from fastnnunet.bench.report.page import page as make_page
from fastnnunet.cli.main import main
from fastnnunet.errors import BackendError, SpecError
from fastnnunet.evaluate.metrics import label_metrics
from fastnnunet.images.cases import Case
from fastnnunet.specs.teacher import TeacherSpec
from tests.browsers import chromium
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
        patch.setenv("FASTNNUNET_CACHE_HOME", str(place / "home"))
        for name in ("nnUNet_npp", "nnUNet_nps"):  # nnUNetv2_predict without further processes, which import torch each
            patch.setenv(name, "0")
        base = ("benchmark", "-d", 999, "-c", "3d_toy", "-p", "toyPlans", "-f", *folds, "--threads", threads)
        try:
            main([str(a) for a in (*base, *args)])
        except SystemExit as e:
            return int(e.code or 0)
    return 0


def files(place: Path, out: Path) -> tuple[object, ...]:
    return ("-i", place / "images", "-g", place / "labels", "-m", place / "bundle", "-o", out)


def job_of(place: Path, out: Path, **options: Any) -> BenchmarkJob:
    teacher = TeacherSpec(dataset="999", configuration="3d_toy", plans="toyPlans", folds=(0, 1))
    return BenchmarkJob(
        teacher=teacher, bundles=(place / "bundle",), images=place / "images", labels=None, output=out, **options
    )


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@dataclass(frozen=True)
class Run:
    """A finished benchmark."""

    record: dict[str, Any]
    out: Path
    page: Path
    printed: str


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every kind of arm."""
    out = tmp_path_factory.mktemp("whole")
    page = out / "pages" / "benchmark.html"
    options = (
        "--backend",
        "onnxruntime",
        "--runtime-ensemble",
        "--baseline-cases",
        2,
        "--repeat",
        2,
        "--cold-rounds",
        1,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(place, *files(place, out), *options, "--html", page) == 0
    record_file = next(out.glob("benchmark_*.json"))
    assert record_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return Run(json.loads(record_file.read_text()), out, page, printed.getvalue())


def test_one_run_measures_speed_parity_and_dice(place: Path, whole: Run) -> None:
    record = whole.record
    names = [
        *("nnunetv2 ensemble", "nnunetv2 one fold", "ensemble onnxruntime"),
        "bundle nnunetv2",
        "bundle onnxruntime",
    ]
    assert list(record["arms"]) == names
    ensemble, fold, ours, stock, student = record["arms"].values()
    assert record["threads"] == 1
    assert record["hardware"]["cpu"]
    assert record["versions"]["nnunetv2"]

    assert (ensemble["cases"], ensemble["samples"], ensemble["folds"]) == (2, 2, ["0", "1"])
    assert list(ensemble["per_case_s"]) == list(ours["per_case_s"]) == ["one", "three"]  # the first two by name
    assert ensemble["size_bytes"] == 2 * fold["size_bytes"] == 8 * ensemble["parameters"]
    for case, passes in ensemble["forward_passes"].items():  # two folds and every mirror of three axes
        assert passes == 16 * fold["forward_passes"][case] == 16 * stock["forward_passes"][case] > 0
    assert (student["cases"], student["samples"]) == (3, 6)
    assert student["parity"]["label_agreement"] == 1.0
    assert student["parity"]["max_abs_logit_difference"] < 1e-3
    ratios = [ensemble["per_case_s"][c] / student["per_case_s"][c] for c in ("one", "three")]
    assert student["times_faster_than_ensemble"] == pytest.approx(np.median(ratios))
    assert ensemble["times_faster_than_ensemble"] == 1.0
    assert ensemble["agreement_with_ensemble"] == 1.0

    for arm in record["arms"].values():
        assert set(arm["stages"]) == {"read", "preprocess", "infer", "postprocess", "write"}
        for stage in arm["stages"].values():
            assert 0 < stage["p50_s"] <= stage["p90_s"] < arm["p90_s"]
        assert 30e6 < arm["peak_memory_bytes"] < 4e9
        assert arm["peak_gpu_memory_bytes"] is None
        assert "CPU" in arm["no_gpu_memory_because"]
    assert student["peak_memory_bytes"] < 400e6 < stock["peak_memory_bytes"], "its process has no torch"

    predictions = whole.out / "predictions"
    for case in ("one", "three"):  # the bundle holds fold 0, so it predicts what fold 0 without mirroring predicts
        single = read(predictions / "nnunetv2_one_fold" / f"{case}.nii.gz")
        np.testing.assert_array_equal(single, read(predictions / "bundle_nnunetv2" / f"{case}.nii.gz"))
        assert np.mean(single == read(predictions / "bundle_onnxruntime" / f"{case}.nii.gz")) >= 0.9999
        assert np.mean(single == read(predictions / "nnunetv2_ensemble" / f"{case}.nii.gz")) < 0.9999
    for arm, name, other in (
        (student, "bundle_onnxruntime", "bundle nnunetv2"),
        (ours, "ensemble_onnxruntime", names[0]),
    ):
        pairs = [
            [read(predictions / folder / f"{case}.nii.gz") for folder in (name, other.replace(" ", "_"))]
            for case in ("one", "three")
        ]
        same = arm["same_network"]
        assert (same["arm"], same["cases"], same["voxels"]) == (other, 2, 2 * 16 * 22 * 27)
        assert same["different_voxels"] == sum(np.count_nonzero(mine != theirs) for mine, theirs in pairs) <= 2
        assert same["share"] >= 0.9999
    dice = [
        label_metrics(
            read(place / "labels" / f"{case}.nii.gz"),
            read(predictions / "bundle_onnxruntime" / f"{case}.nii.gz"),
            (1,),
            (1.0, 1.0, 1.0),
        ).dice
        for case in CASES
    ]
    assert student["metrics"]["a"]["dice"] == pytest.approx(np.mean(dice))
    assert "nnunetv2 ensemble" in whole.printed
    assert record["summary"].startswith("bundle onnxruntime predicts a case in ")
    assert record["summary"] in " ".join(whole.printed.split())


def test_cold_start_is_a_new_process_that_leaves_the_same_labels(whole: Run) -> None:
    cold = {name: arm["cold"] for name, arm in whole.record["arms"].items() if "cold" in arm}
    assert list(cold) == ["nnunetv2 ensemble", "nnunetv2 one fold", "ensemble onnxruntime", "bundle onnxruntime"]
    for name, times in cold.items():
        assert len(times["elapsed_s"]) == 1
        assert times["median_s"] == times["elapsed_s"][0] > whole.record["arms"][name]["median_s"]
        assert times["agreement_with_warm"] == 1.0
    ratio = cold["nnunetv2 ensemble"]["median_s"] / cold["bundle onnxruntime"]["median_s"]
    assert cold["bundle onnxruntime"]["times_faster_than_ensemble"] == pytest.approx(ratio)


def test_an_ensemble_can_be_extrapolated_from_counted_forward_passes(place: Path, whole: Run, tmp_path: Path) -> None:
    """Only fold 0 is there."""
    few = tmp_path / "place"
    shutil.copytree(place, few)
    shutil.rmtree(next(few.glob("results/*/*/fold_1")))
    page = tmp_path / "page.html"
    options = ("--backend", "onnxruntime", "--no-same-network", "--baseline-cases", 1, "--no-baseline-warm-up")
    more = ("--repeat", 1, "--cold-rounds", 0, "--extrapolate-ensemble", "--html", page)
    assert run(few, *files(few, tmp_path), *options, *more) == 0
    record = json.loads(next(tmp_path.glob("benchmark_*.json")).read_text())
    assert list(record["arms"]) == ["nnunetv2 ensemble", "nnunetv2 one fold", "bundle onnxruntime"]
    ensemble, fold = record["arms"]["nnunetv2 ensemble"], record["arms"]["nnunetv2 one fold"]
    counted = whole.record["arms"]["nnunetv2 ensemble"]["forward_passes"]["one"]
    assert ensemble["extrapolated"]["forward_passes"] == {"one": counted}
    assert ensemble["stages"]["infer"]["p50_s"] == pytest.approx(16 * fold["stages"]["infer"]["p50_s"])
    for stage in ("read", "preprocess", "postprocess", "write"):
        assert ensemble["stages"][stage] == fold["stages"][stage]
    assert ensemble["median_s"] == pytest.approx(fold["median_s"] + 15 * fold["stages"]["infer"]["p50_s"])
    assert fold["times_faster_than_ensemble"] == pytest.approx(ensemble["median_s"] / fold["median_s"])
    assert ensemble["peak_memory_bytes"] is ensemble["agreement_with_ensemble"] is None
    assert "metrics" not in ensemble
    assert not (tmp_path / "predictions" / "nnunetv2_ensemble").exists()
    text = page.read_text()
    assert "nnunetv2 ensemble was not run. Its times are extrapolated" in text
    assert "(extrapolated)" in text


def test_every_backend_gets_the_precisions_it_has(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(place / "results"))
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(name, raising=False)
    setup = prepare(job_of(place, tmp_path, backends=("onnxruntime", "torch"), precisions=("fp32", "bf16")))
    assert [arm.name for arm in setup.arms[3:]] == ["bundle onnxruntime", "bundle torch", "bundle torch bf16"]
    assert setup.left_out == ("onnxruntime bf16: this backend does not compute in bf16",)
    assert set(setup.same_network.values()) == {"bundle nnunetv2"}


def test_a_backend_on_a_gpu(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`name:device`; what it computes on is asked before anything runs. The GPU is a number here, nothing is loaded."""
    monkeypatch.setenv("nnUNet_results", str(place / "results"))
    job = job_of(place, tmp_path, backends=("onnxruntime", "onnxruntime:cuda", "tensorrt"), same_network=False)
    monkeypatch.setattr("fastnnunet.engines.registry.cuda_device_count", lambda: 1)
    arms = prepare(job).arms[2:]
    assert [(arm.name, arm.device, arm.on_gpu) for arm in arms] == [
        ("bundle onnxruntime", "cpu", False),
        ("bundle onnxruntime cuda", "cuda", True),
        ("bundle tensorrt", "cuda", True),
    ]
    start = cold_start(arms[1], job.teacher, Case("one", (place / "images" / "one_0000.nii.gz",)), ".nii.gz", tmp_path)
    device = start.command.index("-device")
    assert start.command[device + 1] == "cuda"
    with pytest.raises(BackendError, match=r"openvino computes on cpu, not on cuda"):
        prepare(replace(job, backends=("openvino:cuda",)))
    with pytest.raises(SpecError, match=r"got 'gpu'"):
        prepare(replace(job, backends=("onnxruntime:gpu",)))
    monkeypatch.setattr("fastnnunet.engines.registry.cuda_device_count", lambda: 0)
    with pytest.raises(BackendError, match="a GPU is asked for"):
        prepare(job)


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
    told = reference.predict_case([image], tmp_path / "mine.nii.gz")
    assert list(told.stages_s) == ["read_s", "preprocess_s", "infer_s", "postprocess_s", "write_s"]
    assert min(told.stages_s.values()) > 0
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
        ((*given, "--backend", "onnxruntime", "--precision", "bf16"), {}, "none of the backends onnxruntime computes"),
        ((*given, "--extrapolate-ensemble", "--runtime-ensemble"), {}, "leave out one of the two"),
        ((*given, "--cold-rounds", -1), {}, "expected 0 or more"),
        (given, too_many, "nnUNet_def_n_proc"),
    ]
    for args, how, expected in cases:
        assert run(place, *args, **how) == 2, args
        message = capsys.readouterr().err
        assert expected in message
        assert "Traceback" not in message
        assert not out.exists()


def numbers_on_the_page(record: dict[str, Any]) -> set[str]:
    """Figures of the record as a reader should find them, written here by hand."""

    def seconds(value: float) -> str:
        value, unit = (value, "s") if value >= 1 else (1e3 * value, "ms")
        return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"

    found = set()
    for name, arm in record["arms"].items():
        peak = arm["peak_memory_bytes"]
        found |= {name, seconds(arm["median_s"]), seconds(arm["p90_s"])}
        found.add(f"{peak / 1e6:.1f} MB" if peak < 1e9 else f"{peak / 1e9:.2f} GB")
        found |= {seconds(stage[key]) for stage in arm["stages"].values() for key in ("p50_s", "p90_s")}
        found |= {f"{arm['metrics'][label]['dice']:.3f}" for label in record["labels"]}
        if "cold" in arm:
            found.add(seconds(arm["cold"]["median_s"]))
        if "same_network" in arm:
            share = 100 * arm["same_network"]["share"]
            found.add("100 %" if share == 100 else f"{share:.4f} %")
    return found | {record["summary"], record["hardware"]["cpu"], record["versions"]["nnunetv2"], record["created"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium("--disable-gpu") as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser_shows_the_record(whole: Run, browser: Any, width: int, scheme: str) -> None:
    problems: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:80]}"))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(whole.page.as_uri(), wait_until="load")
    assert problems == []
    assert {url for url in requests if not url.startswith("data:")} == {whole.page.as_uri()}

    text = " ".join(page.inner_text("body").split())
    missing = {number for number in numbers_on_the_page(whole.record) if number not in text}
    assert not missing
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt])")
    assert len(pictures) == 2 * 3  # two cases: true labels, ensemble, student
    assert all(natural > 0 and 0 < shown <= width and len(alt) > 20 for natural, shown, alt in pictures)
    plots = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getAttribute('aria-label'))")
    assert len(plots) == 3
    assert all(plots)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every(v => v < 128)")
    assert dark == (scheme == "dark")
    # nothing of the plots keeps a colour of its own that could vanish on the other background
    fills = page.evaluate("[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert set(fills) == {ink}
    context.close()


def test_page_of_a_record_with_less_and_with_odd_names(whole: Run) -> None:
    """No labels, no cold start: no Dice and no pictures. Names are text, never markup."""
    odd = "<b>&amp;'student\""
    record = {**whole.record, "cold_rounds": 0, "command": "fastnnunet benchmark -o '<out>'"}
    record["arms"] = {
        odd if name == "bundle onnxruntime" else name: {
            k: v for k, v in arm.items() if k not in ("metrics", "dice_on_common_cases", "cold")
        }
        for name, arm in record["arms"].items()
    }

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.text: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.add(tag)

        def handle_data(self, data: str) -> None:
            self.text.append(data)

    reader = Reader()
    reader.feed(make_page(record, []))
    text = " ".join(" ".join(reader.text).split())
    assert f"{odd} predicts a case in" in text
    assert "fastnnunet benchmark -o '<out>'" in text
    assert not {"b", "out", "img", "script"} & reader.tags
    assert "Dice against time" not in text
    assert "cold not measured" in text
    assert "nan" not in text.lower().replace("nano", "")
