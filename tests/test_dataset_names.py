"""Names and numbers of data sets, and of channels, as nnU-Net resolves them; nnunetv2 is the oracle."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name, maybe_convert_to_dataset_name

from fastnnunet.errors import FastnnUNetError, NotFoundError, SpecError
from fastnnunet.export.bundle import _channel_names, export_bundle
from fastnnunet.nnunet.files.paths import dataset_number, resolve_dataset, trained_model_folder
from fastnnunet.nnunet.files.prepare import plan_and_preprocess
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from tests.test_kinds import nnunet_predictor, read
from tests.tiny import CONFIGURATION, DATASET

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
NAMES = (
    *(
        "Dataset1234_URDE",
        "Dataset12345_Five",
        "Dataset7_Short",
        "Dataset042",
        "Dataset043_With Space",
        "Dataset000_Zero",
    ),
    *(
        "Dataset044_A",
        "Dataset044_B",
        "Dataset0045_Zeros",
        "Dataset_NoNumber",
        "DatasetName",
        "Dataset046_ü[x]*",
        "Other001_X",
    ),
)


def nnunet_resolves(query: str) -> str | None:
    """None: it refuses."""
    try:
        return str(maybe_convert_to_dataset_name(query))
    except (RuntimeError, ValueError):
        return None


def ours(query: str) -> str | None:
    try:
        return resolve_dataset(query)
    except FastnnUNetError:
        return None


@pytest.fixture
def roots(tmp_path, monkeypatch):
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def test_as_nnunet_resolves_them(roots):
    for number, name in enumerate(NAMES):
        (roots / FOLDERS[number % 3] / name).mkdir()
    (roots / FOLDERS[0] / NAMES[1]).mkdir()  # in two folders, which is one name
    (roots / FOLDERS[0] / "Dataset050_File").write_text("no folder")
    (roots / FOLDERS[2] / "Dataset051_Link").symlink_to(roots / FOLDERS[0])
    queries = [
        *map(str, range(60)),
        "1234",
        "123",
        "12345",
        "12",
        "0042",
        "042",
        "+42",
        " 42 ",
        "4_2",
        "-5",
        "x",
        "",
        "4.0",
    ]
    resolved = {query: ours(query) for query in queries}
    assert resolved == {query: nnunet_resolves(query) for query in queries}
    assert resolved["1234"] is None  # Dataset12345_Five begins with it as well
    assert resolved["12345"] == "Dataset12345_Five"
    assert resolved["42"] == "Dataset042"
    assert resolved["51"] == "Dataset051_Link"
    for name in NAMES[:-1]:
        assert ours(name) == nnunet_resolves(name) == name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.from_regex(r"Dataset0{0,2}[1-9]?[0-9]{1,3}(_[AB])?", fullmatch=True), max_size=4, unique=True),
    query=st.integers(0, 3000),
)
def test_any_names_and_numbers(roots, names, query):
    for old in (roots / FOLDERS[2]).iterdir():
        old.rmdir()
    for name in names:
        (roots / FOLDERS[2] / name).mkdir()
    for text in (str(query), f"{query:04d}"):
        assert ours(text) == nnunet_resolves(text)


def test_what_refusals_say(roots):
    for name in ("Dataset044_A", "Dataset044_B", "Dataset7_Short"):
        (roots / FOLDERS[0] / name).mkdir()
    with pytest.raises(SpecError, match="44 stands for several names: Dataset044_A, Dataset044_B"):
        resolve_dataset("44")
    with pytest.raises(NotFoundError, match=r"(?s)unknown data set '7'.*Dataset7_Short has too few digits"):
        resolve_dataset("7")
    with pytest.raises(NotFoundError, match=r"(?s)unknown data set 'Dataset9_X'.*Dataset044_A, Dataset044_B"):
        resolve_dataset("Dataset9_X")
    with pytest.raises(SpecError, match=r"(?s)Dataset7_Short: nnU-Net plans by an id.*rename"):
        plan_and_preprocess("Dataset7_Short", CONFIGURATION, num_processes=1)


@pytest.mark.parametrize("name", ["Dataset1234_URDE", "Dataset7_Short", "Dataset042", "Dataset043_With Space"])
def test_models_of_such_data_sets_are_found(name, roots):
    model = roots / "nnUNet_results" / name / "nnUNetTrainer__nnUNetPlans__2d"
    model.mkdir(parents=True)
    assert trained_model_folder(name, "nnUNetTrainer", "nnUNetPlans", "2d") == model
    if name != "Dataset7_Short":
        number = name.removeprefix("Dataset").split("_")[0]
        assert trained_model_folder(number, "nnUNetTrainer", "nnUNetPlans", "2d") == model


def test_of_a_trained_model_the_folder_of_results_is_asked_for_first(monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotFoundError, match="nnUNet_results is not set"):
        trained_model_folder("4", "nnUNetTrainer", "nnUNetPlans", CONFIGURATION)


def test_numbers_for_nnunets_commands(roots):
    for name in NAMES:
        (roots / FOLDERS[0] / name).mkdir()
    numbers = {name: dataset_number(name) for name in NAMES}
    assert {name for name in NAMES if numbers[name] is None} == {
        *("Dataset1234_URDE", "Dataset7_Short", "Dataset044_A", "Dataset044_B", "Dataset0045_Zeros"),
        *("Dataset_NoNumber", "DatasetName", "Other001_X"),
    }
    assert all(convert_id_to_dataset_name(n) == name for name, n in numbers.items() if n is not None)


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({"channel_names": {"f": "noNorm", "l": "T2"}}, ("noNorm", "T2")),
        ({"channel_names": {"1": "T2", "0": "T1"}}, ("T2", "T1")),
        ({"channel_names": {"10": "a", "9": 5}}, ("a", "5")),
        ({"channel_names": ["CT", "PET"]}, ("CT", "PET")),
        ({"modality": {"b": "R", "a": "B"}}, ("R", "B")),
        ({"modality": {"0": "old"}, "channel_names": {"0": "CT", "1": "PET"}}, ("old",)),
    ],
    ids=str,
)
def test_channel_names(description, expected):
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    assert _channel_names(description) == expected
    no_cascade = SimpleNamespace(previous_stage_name=None)
    plans = SimpleNamespace(get_label_manager=lambda dataset_json: None)
    assert determine_num_input_channels(plans, no_cascade, description) == len(expected)


@pytest.mark.parametrize("keys", [("f", "l"), ("1", "0")])
def test_channels_in_the_order_in_which_they_are_written(keys, two_channels, tmp_path):
    """The normalisations differ, so that channels taken the other way would give other labels."""
    model, images = two_channels
    description = json.loads((model / "dataset.json").read_text())
    description["channel_names"] = dict(zip(keys, ("a", "b"), strict=True))
    (model / "dataset.json").write_text(json.dumps(description))
    export_bundle(model, 0, tmp_path / "bundle", needs_real_patches=False)
    assert load_bundle_spec(tmp_path / "bundle").channel_names == ("a", "b")
    Predictor.load(tmp_path / "bundle", "onnxruntime").predict_files(images, tmp_path / "ours")
    nnunet = nnunet_predictor(model)
    nnunet.use_mirroring = True
    files = [[str(images / f"case_000{channel}.nii.gz") for channel in (0, 1)]]
    nnunet.predict_from_files_sequential(files, [str(tmp_path / "theirs")])
    assert (read(tmp_path / "ours" / "case.nii.gz") == read(tmp_path / "theirs.nii.gz")).all()


@pytest.fixture
def two_channels(world, tmp_path):
    """A model of two channels that are normalised in other ways, and an image for it."""
    import SimpleITK as sitk
    import torch

    from fastnnunet.nnunet.files.model import build_network, model_of

    base = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    plans, dataset = (json.loads((base / n).read_text()) for n in ("plans.json", "dataset.json"))
    config = plans["configurations"][CONFIGURATION]
    config["normalization_schemes"], config["use_mask_for_norm"] = (
        ["CTNormalization", "ZScoreNormalization"],
        [False] * 2,
    )
    properties = plans["foreground_intensity_properties_per_channel"]
    properties["1"] = properties["0"]
    dataset["channel_names"] = {"0": "a", "1": "b"}
    model = tmp_path / "model"
    (model / "fold_0").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(
        {
            "network_weights": build_network(model_of(plans, CONFIGURATION, dataset)).state_dict(),
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2),
            "init_args": {"configuration": CONFIGURATION},
        },
        model / "fold_0" / "checkpoint_final.pth",
    )
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    images = tmp_path / "images"
    images.mkdir()
    image = sitk.ReadImage(str(world / "raw" / DATASET / "imagesTs" / "tiny_10_0000.nii.gz"))
    for channel in (0, 1):
        sitk.WriteImage(image * (1 - 2.0 * channel), str(images / f"case_000{channel}.nii.gz"))
    return model, images
