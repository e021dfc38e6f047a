"""Plans as nnU-Net resolves them, whoever wrote them, and the names in them; nnU-Net's own managers are the oracle."""

import ast
import dataclasses
import importlib
import json
import logging
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import fastnnunet.nnunet.files.named as named
from fastnnunet.cli.main import main
from fastnnunet.engines.torch import build_network as build_from_bundle
from fastnnunet.errors import BackendError, CorruptError, MismatchError, NotFoundError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.export.graph import plans_for
from fastnnunet.nnunet.files.cases import PreprocessedCases, open_cases
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.files.plans import architecture_of, configuration_of, resolved
from fastnnunet.nnunet.student.fit import check_fit, network_cost, stride_products
from fastnnunet.nnunet.student.plans import RESIDUAL, student_plans
from fastnnunet.nnunet.trainer.cases import WritableCases
from fastnnunet.nnunet.versions import OLDEST, TRAINING, require_versions
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec, write_bundle_json
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.graph import GraphSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from tests.bundles import Toy, make_toy_model
from tests.teachers import nnunet_files, nnunet_predictor, save_checkpoint
from tests.tiny import CONFIGURATION, DATASET, before_2_5

PACKAGE = Path(__file__).resolve().parents[1] / "fastnnunet"
OWN = "of_its_own"  # a configuration that inherits
SHORT_NAMES = {"conv_op": "torch.nn.Conv3d", "norm_op": "torch.nn.InstanceNorm3d", "nonlin": "torch.nn.LeakyReLU"}


@pytest.fixture(scope="module")
def tiny(pristine_world):
    """The plans of the tiny world and its dataset.json."""
    folder = pristine_world / "preprocessed" / DATASET
    return tuple(json.loads((folder / f"{n}.json").read_text()) for n in ("nnUNetPlans", "dataset"))


def written(plans, kind):
    """The same plans in another way; (plans, configuration)."""
    plans = deepcopy(plans)
    configurations = plans["configurations"]
    config = configurations[CONFIGURATION]
    if kind in ("inherits", "chain"):
        configurations[OWN] = {"inherits_from": "between" if kind == "chain" else CONFIGURATION, "batch_size": 4}
        configurations["between"] = {"inherits_from": CONFIGURATION, "patch_size": [16, 32, 16]}
        return plans, OWN
    if kind == "short names":
        config["architecture"]["arch_kwargs"].update(SHORT_NAMES)
        config["architecture"]["network_class_name"] = "dynamic_network_architectures.architectures.PlainConvUNet"
    if kind.startswith("old"):
        configurations[CONFIGURATION] = before_2_5(config, kind.split()[1])
        plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")
        del plans["label_manager"]
    if kind == "cascade":
        configurations["3d_lowres"] = {**config, "next_stage": "3d_cascade_fullres"}
        configurations["3d_cascade_fullres"] = {"inherits_from": CONFIGURATION, "previous_stage": "3d_lowres"}
        return plans, "3d_cascade_fullres"
    return plans, CONFIGURATION


def flattened(plans, configuration):
    """The same written out as nnU-Net resolves it."""
    config = PlansManager(deepcopy(plans)).get_configuration(configuration).configuration
    config.pop("inherits_from", None)
    return {**plans, "configurations": {**plans["configurations"], configuration: config}}


WAYS = ["inherits", "chain", "short names", "old PlainConvUNet", "old ResidualEncoderUNet", "cascade"]


def test_one_room_reads_plans():
    """Elsewhere nobody looks into plans by hand. `specs` checks them where nnU-Net is not installed."""
    keys = {"configurations", "architecture", "inherits_from", "UNet_class_name", "previous_stage"}
    keys |= {"foreground_intensity_properties_per_channel", "transpose_forward", "data_identifier"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in ("nnunet", "specs"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            key = None
            if isinstance(node, ast.Subscript):
                key = node.slice
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "get" and node.args:
                key = node.args[0]
            if isinstance(key, ast.Constant) and key.value in keys:
                found.append(f"{path.name}:{node.lineno} {key.value}")
    assert found == []


@pytest.mark.parametrize("kind", WAYS)
def test_a_student_is_that_of_the_plans_written_out(tiny, kind, monkeypatch, pristine_world):
    monkeypatch.setenv("nnUNet_preprocessed", str(pristine_world / "preprocessed"))
    plans, dataset_json = tiny
    given, configuration = written(plans, kind)
    before, flat = deepcopy(given), flattened(given, configuration)
    cost = network_cost(model_of(given, configuration, dataset_json))
    assert cost == network_cost(model_of(flat, configuration, dataset_json))
    assert cost["parameters"] == sum(
        p.numel() for p in build_network(model_of(given, configuration, dataset_json)).parameters()
    )

    student = student_plans(given, configuration, StudentSpec(r=2), DistillSpec(batch_size=3))
    assert given == before
    check_fit(given, student, dataset_json, configuration)
    assert network_cost(model_of(student, configuration, dataset_json))["parameters"] < cost["parameters"]
    expected = student_plans(flat, configuration, StudentSpec(r=2), DistillSpec(batch_size=3))
    theirs = PlansManager(student).get_configuration(configuration).configuration
    assert theirs == PlansManager(expected).get_configuration(configuration).configuration
    assert theirs["batch_size"] == 3
    others = PlansManager(deepcopy(given))
    for name in set(given["configurations"]) - {configuration}:  # all else as the teacher's, whatever it inherits from
        got = PlansManager(student).get_configuration(name).configuration
        assert {**got, "inherits_from": None} == {**others.get_configuration(name).configuration, "inherits_from": None}


def test_what_inherits_from_a_students_configuration_stays_the_teachers(tiny):
    given, _ = written(tiny[0], "chain")
    odd = {"inherits_from": OWN, "architecture": {"network_class_name": "my.Own"}, "preprocessor_name": "Mine"}
    given["configurations"]["odd"] = odd  # which nobody asks for
    student = student_plans(given, CONFIGURATION, StudentSpec(r=2), DistillSpec())
    expected = PlansManager(deepcopy(given)).get_configuration("odd").configuration
    assert {**PlansManager(student).get_configuration("odd").configuration, "inherits_from": OWN} == expected
    for name in ("between", OWN):
        theirs = PlansManager(student).get_configuration(name)
        assert theirs.network_arch_init_kwargs["features_per_stage"] == [16, 32, 32]
        assert theirs.patch_size == [16, 32, 16]
    mine = PlansManager(student).get_configuration(CONFIGURATION)
    assert mine.network_arch_init_kwargs["features_per_stage"] == [8, 16, 16]


def test_a_moved_network_has_the_name_it_has_now(tiny, capsys):
    given, configuration = written(tiny[0], "old ResidualEncoderUNet")
    assert PlansManager(given).get_configuration(configuration).network_arch_class_name != RESIDUAL
    assert architecture_of(given, configuration)["network_class_name"] == RESIDUAL
    capsys.readouterr()
    assert type(build_network(model_of(given, configuration, tiny[1]))).__name__ == "ResidualEncoderUNet"
    assert capsys.readouterr().out == ""  # nnU-Net says where it found it, into whatever a command prints


@pytest.mark.parametrize("kind", ["chain", "old PlainConvUNet"])
def test_describe_says_the_same(tiny, tmp_path, monkeypatch, capsys, kind):
    plans, dataset_json = tiny
    said = []
    given, configuration = written(plans, kind)
    for number, plans in enumerate((given, flattened(given, configuration))):
        folder = tmp_path / str(number) / DATASET
        folder.mkdir(parents=True)
        (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset_json))
        for name in ("nnUNet_preprocessed", "nnUNet_raw", "nnUNet_results"):
            monkeypatch.setenv(name, str(folder.parent))
        with pytest.raises(SystemExit) as stop:
            main(["student", "describe", "-d", "998", "-c", configuration, "-r", "2", "4", "--json"])
        assert not stop.value.code
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    assert said[0][1]["parameters"] < said[0][0]["parameters"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inherits_from": OWN}, "circle"),
        ({"inherits_from": "nothing"}, "nothing"),
        ({"UNet_class_name": "SwinUNETR"}, "SwinUNETR"),
        ({"conv_kernel_sizes": None}, "conv_kernel_sizes"),
        ({"UNet_class_name": None}, "architecture|UNet_class_name"),
    ],
)
def test_what_nnunet_cannot_resolve_is_one_message(tiny, change, words):
    old = {**before_2_5(tiny[0]["configurations"][CONFIGURATION], "PlainConvUNet"), **change}
    config = {name: value for name, value in old.items() if value is not None}
    plans = {**tiny[0], "configurations": {**tiny[0]["configurations"], OWN: config}}
    with pytest.raises(MismatchError, match=words):
        configuration_of(plans, OWN)
    with pytest.raises(MismatchError, match="plan the data set again"):
        student_plans(plans, OWN, StudentSpec(r=2), DistillSpec())


def test_old_plans_are_read_without_a_word(tiny, capsys, recwarn):
    given, configuration = written(tiny[0], "old PlainConvUNet")
    network_cost(model_of(given, configuration, tiny[1]))
    assert capsys.readouterr().out == ""
    assert not [w for w in recwarn if "old nnU-Net plans" in str(w.message)]


def write_model(folder, plans, configuration, dataset_json):
    """A model folder of one fold with random weights."""
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    torch.manual_seed(0)
    weights = build_network(model_of(plans, configuration, dataset_json)).state_dict()
    weights |= {name: 4 * tensor for name, tensor in weights.items() if "seg_layers" in name}
    save_checkpoint(folder / "fold_0" / "checkpoint_final.pth", weights, configuration, (0, 1, 2))
    return folder


@pytest.mark.parametrize("kind", ["chain", "old ResidualEncoderUNet"])
def test_bundles_of_other_windows(tiny, pristine_world, tmp_path, kind):
    """Exported with another patch size: nnU-Net with such plans predicts the same, and loads what is written."""
    import SimpleITK as sitk

    given, configuration = written(tiny[0], kind)
    folder = write_model(tmp_path / "model", given, configuration, tiny[1])
    graph = GraphSpec(patch_size=(24, 16, 32), dynamic_space=kind == "chain", simplify=True, batch_size=2)
    export_bundle(folder, 0, tmp_path / "bundle", graph=graph, needs_real_patches=False)
    spec = load_bundle_spec(tmp_path / "bundle")
    assert spec.patch_size == (24, 16, 32)
    assert json.loads((folder / "plans.json").read_text()) == given
    theirs = PlansManager(deepcopy(spec.plans)).get_configuration(configuration)
    expected = {**PlansManager(deepcopy(given)).get_configuration(configuration).configuration}
    expected["patch_size"] = [24, 16, 32]
    assert {**theirs.configuration, "inherits_from": None} == {**expected, "inherits_from": None}
    assert (
        type(build_from_bundle(spec)).__name__ == type(build_network(model_of(given, configuration, tiny[1]))).__name__
    )

    (folder / "plans.json").write_text(json.dumps(spec.plans))
    image = sorted((pristine_world / "raw" / DATASET / "imagesTs").iterdir())[0]
    nnunet_files(nnunet_predictor(folder, (0,), mirroring=False), {"case": [image]}, tmp_path / "theirs")
    loaded = Predictor.load(tmp_path / "bundle", "onnxruntime", threads=1, mirroring=False)
    loaded.predict_files(image, tmp_path / "ours" / "case.nii.gz")
    ours, nnunets = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / w / "case.nii.gz"))) for w in ("ours", "theirs")
    )
    assert len(np.unique(nnunets)) > 1
    assert (ours == nnunets).mean() >= 0.9999


@pytest.mark.parametrize("regions", [False, True])
def test_what_nnunet_does_not_look_at_is_not_refused(tiny, pristine_world, tmp_path, monkeypatch, regions):
    """Fields that its predictor never reads, text where it takes int() of it, axes that are NumPy's numbers."""
    import SimpleITK as sitk

    monkeypatch.setenv("nnUNet_preprocessed", str(pristine_world / "preprocessed"))
    plans, dataset_json = deepcopy(tiny)
    plans["experiment_planner_used"] = None if regions else "my planner v2.0"
    config = plans["configurations"][CONFIGURATION]
    del config["data_identifier"]
    config["batch_size"] = None
    plans["foreground_intensity_properties_per_channel"]["0"]["median"] = float("nan")  # nobody needs it
    if regions:
        dataset_json["labels"] = {"background": 0, "whole": ["1", "2"], "dark": "2"}
        dataset_json["regions_class_order"] = ["1", "2"]
    else:
        dataset_json |= {"regions_class_order": [], "channel_names": {"0": "T1\u00a0Gd\n"}}
        config["architecture"]["arch_kwargs"]["norm_op_kwargs"] = {"affine": True, "track_running_stats": True}
    folder = write_model(tmp_path / "model", plans, CONFIGURATION, dataset_json)
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    axes = [np.int64(0), np.int32(2)]
    torch.save({**torch.load(checkpoint), "inference_allowed_mirroring_axes": axes}, checkpoint)
    image = sorted((pristine_world / "raw" / DATASET / "imagesTs").iterdir())[0]
    nnunet_files(nnunet_predictor(folder, (0,)), {"case": [image]}, tmp_path / "theirs")

    with pytest.raises(NotFoundError, match="no data_identifier"):
        export_bundle(folder, 0, tmp_path / "bundle")
    export_bundle(folder, 0, tmp_path / "bundle", needs_real_patches=False)
    Predictor.load(tmp_path / "bundle", "onnxruntime", threads=1).predict_files(image, tmp_path / "ours/case.nii.gz")
    ours, theirs = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / w / "case.nii.gz"))) for w in ("ours", "theirs")
    )
    assert len(np.unique(theirs)) > 1
    assert (ours == theirs).mean() >= 0.9999


@pytest.mark.parametrize("kind", WAYS)
def test_windows_of_plans_written_in_another_way(tiny, kind):
    given, configuration = written(tiny[0], kind)
    changed = plans_for(given, configuration, GraphSpec(patch_size=(32, 16, 16), dynamic_space=True))
    assert PlansManager(changed).get_configuration(configuration).patch_size == [32, 16, 16]
    config = configuration_of(changed, configuration)[1].configuration
    assert stride_products(config) == (4, 4, 4)
    with pytest.raises(SpecError, match="multiple of 4"):
        plans_for(given, configuration, GraphSpec(patch_size=(30, 16, 16)))


# what nnU-Net finds by name, and how a user would have added his own: beside nnU-Net's class, in the same module
NAMED = {
    "preprocessor_name": ("preprocessing.preprocessors.default_preprocessor", "DefaultPreprocessor"),
    "normalization_schemes": ("preprocessing.normalization.default_normalization_schemes", "ZScoreNormalization"),
    "resampling_fn_data": ("preprocessing.resampling.default_resampling", "resample_data_or_seg_to_shape"),
    "resampling_fn_probabilities": ("preprocessing.resampling.default_resampling", "resample_data_or_seg_to_shape"),
    "resampling_fn_seg": ("preprocessing.resampling.default_resampling", "resample_data_or_seg_to_shape"),
    "image_reader_writer": ("imageio.simpleitk_reader_writer", "SimpleITKIO"),
    "label_manager": ("utilities.label_handling.label_handling", "LabelManager"),
}


def naming(plans, field, name, configuration=CONFIGURATION):
    plans = deepcopy(plans)
    place = plans if field in plans else plans["configurations"][configuration]
    assert field in place
    place[field] = [name] if isinstance(place[field], list) else name
    return plans


@pytest.fixture
def install(monkeypatch):
    """Put a class or function of another name into nnunetv2, as nnU-Net wants users to do it."""

    def installed(field, name):
        module, like = NAMED[field]
        module = importlib.import_module(f"nnunetv2.{module}")
        original = getattr(module, like)
        own = type(name, (original,), {}) if isinstance(original, type) else lambda *a, **k: original(*a, **k)
        own.__module__ = module.__name__
        monkeypatch.setattr(module, name, own, raising=False)

    for cached in (named._is_found, named.warn_once):
        cached.cache_clear()
    yield installed
    for cached in (named._is_found, named.warn_once):
        cached.cache_clear()


@pytest.mark.parametrize("field", NAMED)
def test_what_nnunet_would_not_find_is_refused_by_name(tiny, tmp_path, world, field, install):
    plans = naming(tiny[0], field, "NotThere")
    theirs = PlansManager(deepcopy(plans))
    if field in ("preprocessor_name", "label_manager"):  # nnU-Net goes on with None, and calls it
        manager = theirs.get_configuration(CONFIGURATION) if field == "preprocessor_name" else theirs
        assert getattr(manager, field.replace("name", "class") if "name" in field else f"{field}_class") is None
    folder = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises((SpecError, MismatchError), match=rf"{field}: got 'NotThere', which is not in nnunetv2\."):
        export_bundle(folder, 0, tmp_path / "bundle", needs_real_patches=False)
    assert not list(tmp_path.glob("*bundle*"))
    with pytest.raises(MismatchError, match=f"{field}: got 'NotThere', which is not in nnunetv2"):
        open_teacher(TeacherSpec(dataset="998", folds=(0,)), CacheSpec())


@pytest.mark.parametrize("field", NAMED)
def test_what_nnunet_finds_and_the_runtime_does_not_have(tiny, tmp_path, world, field, install, caplog):
    """Exports are refused; labelling and training go on with what nnU-Net has preprocessed, and say so."""
    install(field, "MyOwn")
    plans = naming(tiny[0], field, "MyOwn")
    folder = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    (folder / "plans.json").write_text(json.dumps(plans))
    irrelevant = field in ("image_reader_writer", "resampling_fn_seg")  # for arrays, and where there is no cascade
    if irrelevant:
        named.check_reproducible(plans, CONFIGURATION)
    else:
        with pytest.raises(SpecError, match=r"(?s)MyOwn.*nnUNetv2_predict"):
            named.check_reproducible(plans, CONFIGURATION)
    spec = TeacherSpec(dataset="998", folds=(0,))
    if field == "label_manager":
        with pytest.raises(MismatchError, match="label_manager: got 'MyOwn', expected LabelManager"):
            open_teacher(spec, CacheSpec())
        return
    (world / "preprocessed" / DATASET / "nnUNetPlans.json").write_text(json.dumps(plans))
    with caplog.at_level(logging.WARNING):
        open_teacher(spec, CacheSpec())
    assert ("MyOwn" in caplog.text) == (not irrelevant)


def test_a_cascade_needs_the_resampling_of_segmentations(tiny, install):
    install("resampling_fn_seg", "MyOwn")
    plans, configuration = written(naming(tiny[0], "resampling_fn_seg", "MyOwn"), "cascade")
    with pytest.raises(SpecError, match=r"resampling_fn_seg: .*MyOwn"):
        named.check_reproducible(plans, configuration)
    torch_seg, _ = written(naming(tiny[0], "resampling_fn_seg", "resample_torch_fornnunet"), "cascade")
    torch_seg["configurations"][CONFIGURATION]["resampling_fn_seg_kwargs"] = {"is_seg": True}
    with pytest.raises(SpecError, match=r"resampling_fn_seg: .*resample_torch_fornnunet"):
        named.check_reproducible(torch_seg, configuration)
    named.check_reproducible(torch_seg, CONFIGURATION)


def test_all_problems_at_once(tiny):
    plans = naming(naming(tiny[0], "preprocessor_name", "CT_Preprocessor"), "image_reader_writer", "Mine")
    del plans["configurations"][CONFIGURATION]["resampling_fn_data_kwargs"]
    plans["foreground_intensity_properties_per_channel"] = {}
    without = deepcopy(plans)
    del without["configurations"][CONFIGURATION]["normalization_schemes"]
    with pytest.raises(MismatchError, match="normalization_schemes: got None"):
        named.check_reproducible(without, CONFIGURATION)
    with pytest.raises(SpecError, match="4 problem") as error:
        named.check_reproducible(plans, CONFIGURATION)
    for word in ("CT_Preprocessor", "Mine", "resampling_fn_data_kwargs", "percentile_00_5"):
        assert word in str(error.value)
    del plans["foreground_intensity_properties_per_channel"]
    with pytest.raises(MismatchError, match="foreground_intensity_properties_per_channel"):
        named.check_reproducible(plans, CONFIGURATION)


@pytest.mark.parametrize("field", ["preprocessor_name", "label_manager", "image_reader_writer"])
def test_predict_refuses_before_it_exports(tiny, tmp_path, monkeypatch, capsys, field, pristine_world):
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fastnnunet.export.bundle.to_onnx", lambda *_: pytest.fail("the long work has begun"))
    folder = write_model(tmp_path / "model", tiny[0], CONFIGURATION, tiny[1])
    (folder / "plans.json").write_text(json.dumps(naming(tiny[0], field, "NotThere")))
    images = pristine_world / "raw" / DATASET / "imagesTs"
    with pytest.raises(SystemExit) as stop:
        main(["predict", "-i", str(images), "-o", str(tmp_path / "out"), "-m", str(folder), "-f", "0"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "NotThere" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_bundle_made_before_that_was_refused(tiny, tmp_path):
    """Bundles say their plans: one of an earlier export is not predicted otherwise than nnU-Net would."""
    toy = make_toy_model(Toy(), tmp_path)
    for plans, configuration in (
        (naming(tiny[0], "preprocessor_name", "Mine"), CONFIGURATION),
        written(naming(tiny[0], "preprocessor_name", "Mine"), "chain"),
        (naming(tiny[0], "label_manager", "Mine"), CONFIGURATION),
    ):
        spec = dataclasses.replace(toy.spec, plans=plans, configuration=configuration)
        write_bundle_json(spec, toy.bundle / "bundle.json")
        with pytest.raises(SpecError, match="got 'Mine'"):
            LoadedBundle.load(toy.bundle, "onnxruntime", threads=1)


class TestPreprocessedCases:
    @pytest.fixture
    def folder(self, world):
        return world / "preprocessed" / DATASET / f"nnUNetPlans_{CONFIGURATION}"

    def store_as_npy(self, folder):
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

        dataset = nnUNetDatasetBlosc2(str(folder))
        for case in dataset.identifiers:
            data, seg, _, properties = dataset.load_case(case)
            nnUNetDatasetNumpy.save_case(data[:], seg[:], properties, str(folder / case))
        for file in folder.glob("*.b2nd"):
            file.unlink()
        nnUNetDatasetNumpy.unpack_dataset(str(folder), num_processes=1)
        return nnUNetDatasetNumpy(str(folder))

    def test_unpacked_cases_may_be_written_to(self, folder):
        """nnU-Net's own data set is the oracle; its maps are read-only, and the files must not change."""
        theirs = self.store_as_npy(folder)
        case = theirs.identifiers[0]
        expected = [np.array(part) for part in theirs.load_case(case)[:2]]
        assert not theirs.load_case(case)[0].flags.writeable
        data, seg, previous, properties = WritableCases(theirs).load_case(case)
        np.testing.assert_array_equal(data, expected[0])
        np.testing.assert_array_equal(seg, expected[1])
        assert previous is None
        assert properties.keys() == theirs.load_case(case)[3].keys()
        patch = torch.from_numpy(data[:, 2:10, 2:10, 2:10]).float()
        patch += 1000  # in place, as augmentation does
        seg[...] = 1
        np.testing.assert_array_equal(theirs.load_case(case)[0], expected[0])
        np.testing.assert_array_equal(theirs.load_case(case)[1], expected[1])

    @pytest.mark.parametrize("damage", ["cut", "empty", "no image", "no pickle"])
    def test_damaged_npz(self, folder, damage):
        self.store_as_npy(folder)
        for file in folder.glob("*.npy"):
            file.unlink()
        cases = PreprocessedCases(folder)
        case = cases.case_ids[0]
        file = folder / f"{case}.npz"
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-200])
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "no image":
            np.savez(file, seg=np.zeros((1, 2, 2, 2)))
        else:
            (folder / f"{case}.pkl").write_bytes(b"\x80\x04.")
        with pytest.raises(CorruptError, match=f"preprocessed case '{case}'"):
            cases.image_CZYX(case)
        assert cases.image_CZYX(cases.case_ids[1]).dtype == np.float32

    def test_folder_of_two_kinds(self, folder):
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(CorruptError, match=r"(?s)\.b2nd, \.pkl, \.txt.*expected \.b2nd and \.pkl"):
            _ = PreprocessedCases(folder).case_ids

    def test_where_cases_would_come_from(self, folder, tiny):
        """The command that makes missing cases names plans that are the model's and its configuration."""
        given, configuration = written(tiny[0], "chain")
        assert open_cases(given, configuration).case_ids == open_cases(tiny[0], CONFIGURATION).case_ids
        for file in folder.iterdir():
            file.unlink()
        command = f"nnUNetv2_preprocess -d 998 -plans_name nnUNetPlans -c {OWN}"
        with pytest.raises(NotFoundError, match=f"run: {command}"):
            open_cases(given, configuration)

    def test_data_preprocessed_in_another_way(self, folder, tiny):
        """An inherited spacing counts as much as a written one."""
        given, configuration = written(tiny[0], "inherits")
        changed = deepcopy(given)
        changed["configurations"][CONFIGURATION]["spacing"] = [9.0, 9.0, 9.0]
        (folder.parent / "nnUNetPlans.json").write_text(json.dumps(changed))
        assert resolved(changed, configuration)["spacing"] == [9.0, 9.0, 9.0]
        with pytest.raises(MismatchError, match="spacing"):
            open_cases(given, configuration)
        student = student_plans(given, configuration, StudentSpec(r=2), DistillSpec())
        with pytest.raises(MismatchError, match="spacing: teacher"):
            check_fit(given, student, tiny[1], configuration)


def test_versions_that_are_too_old(monkeypatch, tmp_path):
    installed = {"batchgeneratorsv2": "0.3.5", "torch": "2.14.1+cpu", "nnunetv2": "2.8.1", "zarr": "3.0.10"}
    monkeypatch.setattr("fastnnunet.nnunet.versions.version", lambda name: installed[name])
    with pytest.raises(BackendError) as error:
        require_versions(TRAINING)
    lines = str(error.value).splitlines()
    assert lines[0] == "2 package(s) are too old:"
    assert "  - batchgeneratorsv2: got 0.3.5, expected 0.3.6 or later" in lines
    assert lines[-1] == "update: pip install 'batchgeneratorsv2>=0.3.6' 'zarr>=3.1'"
    installed |= {"batchgeneratorsv2": "0.3.10", "zarr": "3.1.0rc1"}
    require_versions(TRAINING)


def test_versions_are_those_of_pyproject():
    import tomllib

    from packaging.requirements import Requirement

    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {r.name: r.specifier for r in map(Requirement, extras["store"] + extras["train"])}
    for package, oldest in OLDEST.items():
        assert f">={oldest}" in {str(s) for s in wanted[package]}
