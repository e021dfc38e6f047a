"""`fastnnunet cache` on a tiny nnU-Net world, with nnU-Net's predictor as oracle; every recipe in cache_specs/."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.codecs import softmax
from fastnnunet.cache.identity import FORMAT_VERSION
from fastnnunet.cache.store.folder import open_cache
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cli.main import main
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import cache_for_training
from tests.cache_fakes import FakeCases, make_job
from tests.readonly import read_only
from tests.tiny import CONFIGURATION, DATASET

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "cache_specs").glob("*.yaml"))
BASE = ["-d", "998", "-c", CONFIGURATION, "-f", "0", "1", "--threads", "1"]


@pytest.fixture
def cli(capsys):
    """Runs the command; returns (exit code, what it printed)."""

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main(["cache", *map(str, args)])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out + captured.err

    return run


@pytest.mark.parametrize("command", ["build", "plan"])
def test_an_engine_that_needs_a_gpu_is_refused_before_cases_are_read(world, cli, command, monkeypatch):
    monkeypatch.setattr("fastnnunet.engines.labelling.cuda_device_count", lambda: 0)
    monkeypatch.setattr("fastnnunet.nnunet.files.cases.PreprocessedCases.digest", lambda *_: pytest.fail("read"))
    code, text = cli(command, *BASE, "--engine", "tensorrt")
    assert code == 2
    assert "engine tensorrt needs an NVIDIA GPU" in text


def test_any_engine_labels_and_a_training_finds_it(world, cli, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mirroring: false\nprecision: fp32\n")
    made = {}
    for engine in ("onnxruntime", "torch"):
        code, text = cli("build", *BASE, "--spec", recipe, "--workers", "0", "--engine", engine)
        assert code == 0, text
        (folder,) = (p.parent for p in world.rglob("fastnnunet_*/*/zarr.json") if p.parent not in made.values())
        made[engine] = folder
        command = open_cache(folder).build_command
        assert command.endswith(f"--engine {engine}")
    case = next(iter(open_cache(folder).cases))
    one, other = (
        reader.to_probabilities(reader.read_patch(case, (0, 0, 0), (16, 16, 16)))
        for reader in map(SoftLabelReader, made.values())
    )
    assert np.abs(one - other).max() <= 1 / 255 + 1e-6  # a step of the encoding
    teacher = TeacherSpec(dataset="998", configuration=CONFIGURATION, folds=(0, 1))
    for engine, folder in made.items():
        spec = CacheSpec(mirroring=False, precision="fp32", engine=engine)
        assert cache_for_training(teacher, spec) == folder
    shutil.rmtree(made["torch"])
    assert cache_for_training(teacher, CacheSpec(mirroring=False, precision="fp32")) == made["onnxruntime"]


def test_build_list_info_verify(world, cli):
    root = world / "preprocessed" / DATASET / f"fastnnunet_nnUNetPlans_{CONFIGURATION}"
    cases = sorted(p.name.removesuffix("_seg.b2nd") for p in (world / "preprocessed" / DATASET).rglob("*_seg.b2nd"))
    code, text = cli("plan", *BASE)
    assert code == 0
    assert f"{len(cases)}, of which {len(cases)} to do" in text
    assert "s per patch" in text
    assert "rule of thumb" in text
    assert not root.exists()

    code, text = cli("build", *BASE, "--workers", "0", "--case", cases[0], cases[3])
    assert code == 0
    assert f"2 of {len(cases)} cases stored" in text
    (folder,) = (p.parent for p in root.glob("*/zarr.json"))

    code, text = cli("verify", folder.name[:6])
    assert code == 1
    assert f"2 cases ok, 0 damaged, {len(cases) - 2} missing" in text

    code, text = cli("build", *BASE, "--workers", "0")
    assert code == 0
    assert f"{len(cases)} of {len(cases)} cases stored" in text
    assert cli("verify")[0] == 0

    code, text = cli("list", "-d", "998")
    assert code == 0
    assert re.search(rf"{folder.name}.*simplex_u8.*ensemble.*0 1.*{len(cases)}/{len(cases)}", text)
    code, text = cli("info", folder)
    assert code == 0
    assert "temperature: 1.0" in text
    assert "fastnnunet cache build -d 998" in text

    shard = folder / cases[1] / "c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, text = cli("verify")
    assert code == 1
    command = re.search(rf"fastnnunet (cache build .* --case {cases[1]})", text).group(1)
    assert cli(*command.split()[1:], "--workers", "0", "--threads", "1")[0] == 0
    assert cli("verify")[0] == 0


def test_stored_values_are_nnunets_own(world, cli, tmp_path):
    """A patch of the cache against softmax(logits / T) of nnUNetPredictor over the same folds, within the bound."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    case = sorted((world / "preprocessed" / DATASET).rglob("*_seg.b2nd"))[0].name.removesuffix("_seg.b2nd")
    spec = tmp_path / "spec.yaml"
    spec.write_text("precision: fp32\ntemperature: 2.0\nstep_size: 0.5\n")
    assert (
        cli("build", *BASE, "--spec", spec, "--root", tmp_path / "r", "--case", case, "--workers", "1")[0] == 0
    )  # dask
    (folder,) = (p.parent for p in (tmp_path / "r").glob("*/zarr.json"))

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    model = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    predictor.initialize_from_trained_model_folder(str(model), (0, 1), "checkpoint_final.pth")
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    images = world / "preprocessed" / DATASET / f"nnUNetPlans_{CONFIGURATION}"
    image = np.asarray(infer_dataset_class(str(images))(str(images)).load_case(case)[0][:])
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float().numpy()
    reader = SoftLabelReader(folder)
    lower, upper = (-2, 3, 5), (9, 14, 40)
    got = reader.to_probabilities(reader.read_patch(case, lower, upper))
    expected = softmax(logits, 2.0)[:, :9, 3:14, 5:40]
    difference = np.abs(got[:, 2:, :, : expected.shape[-1]] - expected)
    assert (difference < 1 / 255).mean() > 0.999  # at the corners of tiles nnU-Net's half-precision sums lose digits
    assert difference.max() < 0.01
    assert zarr.open_array(str(folder / case), mode="r").shape == (2, *image.shape[1:])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["build", "-d", "77"], "unknown data set '77'"),
        (["build", "-d", "998", "-f", "0", "7"], "fold(s) 7 have no checkpoint_final.pth"),
        (["build", *BASE, "--case", "nobody"], "--case: got nobody"),
        (["build", *BASE, "--temp", "-1"], "temperature: got -1.0"),
        (["build", *BASE, "--spec", "nothing.yaml"], "spec file not found"),
        (["info", "beef"], "no soft-label cache beef found"),
        (["list", "--root", "no/such/folder"], "is not a folder"),
        (["gc", "--root", "no/such/folder"], "is not a folder"),
    ],
)
def test_bad_input_is_one_message(world, cli, args, expected):
    code, text = cli(*args)
    assert code == 2
    assert expected in text
    assert "Traceback" not in text
    assert not list(world.rglob("fastnnunet_*"))


def test_all_problems_of_a_recipe_at_once(world, cli, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("temprature: 3\npolicy: best\nlevel: nineteen\n")
    code, text = cli("build", *BASE, "--spec", spec)
    assert code == 2
    assert all(word in text for word in ("3 problem(s)", "temprature", "policy", "level"))


def test_a_case_that_fails_gives_exit_code_1(world, cli, monkeypatch):
    from fastnnunet.teachers.nnunet import LoadedTeacher

    original = LoadedTeacher.tallied_blocks

    def nan(self, *args):
        for number, logits in original(self, *args):
            yield number, logits * np.float32(np.nan)

    monkeypatch.setattr(LoadedTeacher, "tallied_blocks", nan)
    code, text = cli("build", *BASE, "--workers", "0", "--case", "tiny_00")
    assert code == 1
    assert "1 of 1 cases failed" in text
    assert "NaN" in text


@pytest.mark.parametrize("command", ["build", "plan", "list", "info", "verify", "diff", "gc"])
def test_help_ends_with_an_example(cli, command):
    code, text = cli(command, "--help")
    assert code == 0
    assert f"fastnnunet cache {command}" in text.split("Example")[1]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestPlaces:
    """Roots that cannot be built in, and caches that cannot be read: one message, nothing written."""

    @pytest.fixture(autouse=True)
    def no_teacher(self, monkeypatch):
        from fastnnunet.teachers.nnunet import NnUNetTeacher

        monkeypatch.setattr(NnUNetTeacher, "load", lambda *_: pytest.fail("the teacher was loaded"))

    @pytest.mark.parametrize("inside", ["", "small", "small/c/0", "new/folder"])
    @pytest.mark.parametrize("command", ["build", "plan"])
    def test_a_root_inside_another_cache(self, world, cli, tmp_path, command, inside):
        cache = build_cache(make_job(tmp_path / "root"))
        before = files(tmp_path)
        code, text = cli(command, *BASE, "--root", cache.path / inside)
        assert code == 2
        assert text.count("error: ") == 1
        # a case is an array of its own: the innermost is named
        inner = cache.path / "small" if inside.startswith("small") else cache.path
        assert f"error: root {cache.path / inside} is inside a Zarr store\n  got      {inner / 'zarr.json'}" in text
        assert "choose a folder outside any cache with --root" in text
        assert files(tmp_path) == before

    def test_a_cache_that_was_put_inside_another_still_verifies(self, cli, tmp_path):
        outer, inner = build_cache(make_job(tmp_path)), build_cache(make_job(tmp_path / "elsewhere"))
        inner.path.parent.rename(outer.path / "small/inner")
        for place in (outer.path, outer.path / "small/inner" / inner.path.name):
            assert cli("verify", place) == (0, "3 cases ok, 0 damaged, 0 missing\n")

    def test_a_read_only_folder(self, world, cli, tmp_path):
        cache = build_cache(make_job(tmp_path / "root"))
        (cache.case_dir("flat") / "manifest.json").unlink()
        (tmp_path / "root/.partial" / f"{cache.path.name}.flat.1.abc").mkdir()
        before = files(tmp_path / "root")
        with read_only(tmp_path / "root"):
            code, text = cli("build", *BASE, "--root", tmp_path / "root")
            assert code == 2
            assert f"error: cannot write {tmp_path / 'root'}: Permission denied\nmake the folder writable" in text
            code, text = cli("gc", "--root", tmp_path / "root")
            assert code == 2
            assert text.startswith(f"error: cannot remove leftovers under {tmp_path / 'root'}: ")
            assert "make the folder writable" in text
            code, text = cli("verify", cache.path)  # reading needs no more
            assert code == 1
            assert "2 cases ok, 1 damaged, 0 missing" in text
            assert cli("list", "--root", tmp_path / "root")[0] == 0
        assert files(tmp_path / "root") == before

    def test_a_newer_format(self, world, cli, tmp_path):
        cache, old = build_cache(make_job(tmp_path)), make_job(tmp_path, FakeCases(seed=1)).create({})
        group = cache.path / "zarr.json"
        document = json.loads(group.read_text())
        document["attributes"]["fastnnunet"]["format_version"] = FORMAT_VERSION + 1
        group.write_text(json.dumps(document))
        before = files(tmp_path)
        for command in (["verify", cache.path], ["info", cache.path], ["diff", old.path, cache.path]):
            assert cli(*command) == (
                2,
                f"error: cache {cache.path} was written by a newer fastnnunet\n  got      format version "
                f"{FORMAT_VERSION + 1}\n  expected at most {FORMAT_VERSION}\nupdate fastnnunet\n",
            )
        code, text = cli("list", "--root", tmp_path)
        assert code == 0
        assert re.search(rf"{cache.path.name} +newer format", text)
        assert cli("gc", "--damaged", "--root", tmp_path)[0] == 0
        assert files(tmp_path) == before

    def test_no_folder_at_all(self, cli, tmp_path):
        (tmp_path / "file").touch()
        for command in ("verify", "info"):
            code, text = cli(command, "--root", tmp_path / "file")
            assert (code, text) == (2, f"error: --root {tmp_path / 'file'} is not a folder\n")


def test_off_a_terminal_verify_prints_one_line(cli, tmp_path):
    cache = build_cache(make_job(tmp_path))
    assert cli("verify", cache.path) == (0, "3 cases ok, 0 damaged, 0 missing\n")


class TestDiff:
    def test_equal(self, cli, tmp_path):
        left = make_job(tmp_path / "a").create({})
        right = make_job(tmp_path / "b", spec=CacheSpec(compressor="lz4", level=1)).create({})
        assert cli("diff", left.path, right.path) == (0, f"no difference: both have the key {left.key}\n")

    def test_fields_and_cases_are_named(self, cli, tmp_path):
        left = make_job(tmp_path).create({})
        right = make_job(tmp_path, FakeCases(seed=1), spec=CacheSpec(temperature=2.0, mirroring=False)).create({})
        code, text = cli("diff", left.path.name[:8], right.path.name[:8], "--root", tmp_path)
        assert code == 1
        lines = text.splitlines()
        assert lines[0] == f"{left.path.name} -> {right.path.name}"
        assert lines[1].startswith("  data.sha256: ")
        assert lines[2:] == [
            "  inference.mirroring: true -> false",
            "  soft_labels.temperature: 1.0 -> 2.0",
            "  cases whose preprocessed image changed: flat large small",
        ]

    def test_bad_input(self, cli, tmp_path):
        left = make_job(tmp_path).create({})
        code, text = cli("diff", left.path, "beef", "--root", tmp_path)
        assert code == 2
        assert "no soft-label cache beef found" in text
        (left.path / "zarr.json").write_text("{}")
        code, text = cli("diff", left.path, left.path)
        assert code == 2
        assert "damaged" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes(recipe):
    spec = load_yaml_spec(CacheSpec, recipe)
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("fastnnunet cache build" in line and f"cache_specs/{recipe.name}" in line for line in header)
    named = {"default": CacheSpec(), "out_of_fold": CacheSpec(policy="out_of_fold")}
    named |= {"no_mirroring": CacheSpec(mirroring=False), "regions": CacheSpec(encoding="sigmoid_u8")}
    named |= {"levels_63": CacheSpec(levels=63), "levels_31": CacheSpec(levels=31)}
    named |= {"logit_gap": CacheSpec(encoding="logit_gap_u8", temperature_range=(1.0, 4.0))}
    named |= {"many_classes": CacheSpec(encoding="sparse_u8", tolerance=0.016, levels=63)}
    named |= {"float16": CacheSpec(encoding="float16")}
    assert spec == named[recipe.stem]  # the default recipe is what the commands use without --spec


def test_a_cache_of_a_range_of_temperatures(world, cli, tmp_path):
    spec = tmp_path / "gap.yaml"
    spec.write_text(
        "encoding: logit_gap_u8\ntemperature_range: [1.0, 4.0]\nprecision: fp32\nmirroring: false\nlevel: 3\n"
    )
    code, text = cli("build", *BASE, "--spec", spec, "--case", "tiny_00", "--workers", "0", "--threads", "1")
    assert code == 0, text
    code, text = cli("list", "-d", "998")
    assert re.search(r"\b1-4 +logit_gap_u8\b", text)
    code, text = cli("info", "-d", "998")
    assert "temperature_range: [1.0, 4.0]" in text
    assert f"--spec {spec}" in text
    code, text = cli("build", *BASE, "--spec", spec, "--temp", "2")
    assert code == 2
    assert "leave --temp out" in text
