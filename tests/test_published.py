"""Published models of every age and kind, by folder and by zip; nnU-Net's predictor on that folder is the oracle."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from scipy import ndimage

from fastnnunet.cache.build import build_cache
from fastnnunet.cli.main import main
from fastnnunet.errors import CorruptError, ImageError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.files.cases import PreprocessedCases
from fastnnunet.nnunet.unlabelled.image_case import ImageTask, preprocess_case
from fastnnunet.nnunet.unlabelled.image_folder import find_images
from fastnnunet.nnunet.unlabelled.sets import ImageSet
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import PublishedSpec
from fastnnunet.teachers.images import UnlabelledJob
from fastnnunet.teachers.published import open_published
from fastnnunet.teachers.stages import open_stages
from tests.bundles import Toy, _dataset_json, _plans, make_labels_frequent, smooth_noise, write_image
from tests.teachers import nnunet_files, nnunet_predictor
from tests.test_checkpoint_types import as_numpy_1
from tests.test_nnunet_teacher import teacher_logits, well_weighted

RECIPE = CacheSpec(precision="fp32", engine="torch", mirroring=True)
TOY, LOWRES, CASCADE = "3d_toy", "3d_lowres", "3d_cascade_fullres"
IMAGE = np.random.default_rng(0).normal(size=(1, 20, 28, 30)).astype(np.float32)
STOCK = "nnUNetTrainer"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No place to unpack to but this test's own, and none of nnU-Net's folders."""
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path / "home"))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.delenv(name, raising=False)


def publish(
    where, kind="stock", *, toy=None, folds=(0,), trainer=STOCK, checkpoint="checkpoint_final.pth", save=torch.save
):
    """A model folder as nnU-Net lays it out below `where`; networks are made by nnU-Net of its own reading of plans."""
    toy = toy or Toy(mirror_axes=(0, 2))
    plans, dataset_json = _plans(toy), _dataset_json(toy)
    configuration = PLANS[kind](plans, f"{toy.dims}d_toy")
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    folder = where / "Dataset999_Toy" / f"{trainer}__toyPlans__{configuration}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        channels = determine_num_input_channels(manager, config, dataset_json)
        network = get_network_from_plans(
            config.network_arch_class_name,
            config.network_arch_init_kwargs,
            config.network_arch_init_kwargs_req_import,
            channels,
            toy.heads,
            deep_supervision=False,
        )
        make_labels_frequent(network.eval(), channels, toy.patch_size)
        (folder / f"fold_{fold}").mkdir()
        content = {
            "network_weights": network.state_dict(),
            "optimizer_state": {"state": {}, "param_groups": [{"lr": np.float64(0.01)}]},
            "logging": {"mean_fg_dice": [np.float32(0.5)], "times": np.arange(3.0)},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1000,
            "trainer_name": trainer,
            "init_args": {"plans": plans, "configuration": configuration, "fold": fold, "dataset_json": dataset_json},
            "inference_allowed_mirroring_axes": toy.mirror_axes,
        }
        save(content, folder / f"fold_{fold}" / checkpoint)
    return folder


def _old(network):
    def change(plans, name):
        config = plans["configurations"][name]
        del config["architecture"], plans["label_manager"]
        plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")
        config |= {
            "UNet_class_name": network,
            "UNet_base_num_features": 6,
            "unet_max_num_features": 16,
            "n_conv_per_stage_encoder": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "num_pool_per_axis": [2, 2, 2],
            "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "conv_kernel_sizes": [[3, 3, 3], [3, 3, 3], [1, 3, 3]],
        }
        return name

    return change


def _inherits(plans, name):
    plans["configurations"]["between"] = {"inherits_from": name, "patch_size": [16, 24, 16]}
    plans["configurations"]["own"] = {"inherits_from": "between", "batch_size": 4}
    return "own"


def _short_names(plans, name):
    architecture = plans["configurations"][name]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.PlainConvUNet"
    architecture["arch_kwargs"] |= {
        "conv_op": "torch.nn.Conv3d", "norm_op": "torch.nn.InstanceNorm3d", "nonlin": "torch.nn.LeakyReLU"
    }  # fmt: skip
    return name


def _stage(configuration):
    def change(plans, name):
        config = plans["configurations"].pop(name)
        plans["configurations"] |= {
            LOWRES: {**config, "spacing": [1.7, 1.7, 1.7], "data_identifier": "low", "next_stage": CASCADE},
            "3d_fullres": config,
            CASCADE: {"inherits_from": "3d_fullres", "previous_stage": LOWRES},
        }
        return configuration

    return change


PLANS = {
    "stock": lambda _plans, name: name,
    LOWRES: _stage(LOWRES),
    CASCADE: _stage(CASCADE),
    "old plain": _old("PlainConvUNet"),
    "old residual": _old("ResidualEncoderUNet"),
    "inherits": _inherits,
    "short names": _short_names,
}


def nnunets(folder, image_CZYX, folds, checkpoint="checkpoint_final.pth"):
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image_CZYX)).float().numpy()


def assert_labels_as(factory, expected, image_CZYX=IMAGE):
    """Logits within what nnU-Net's half precision leaves, where it leaves them their digits; and the same labels."""
    got = teacher_logits(factory, image_CZYX, factory.folds)
    patch = (1, *factory.patch_size)[-3:]
    inner = well_weighted(image_CZYX.shape[1:], patch)
    np.testing.assert_allclose(got[:, inner], expected[:, inner], rtol=4e-3, atol=8e-3)
    assert len(np.unique(expected.argmax(0))) == len(expected), "a label is nowhere: nothing is tested"
    assert (got.argmax(0) == expected.argmax(0))[inner].mean() > 0.999


def zipped(folder, file, root):
    """Names below `root`."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(root))
    return file


def opened(path, **names):
    """The teacher, and what was said."""
    said = []
    return open_published(PublishedSpec(path=path, **names), RECIPE, said.append), [m.text for m in said]


def before_torch_1_6(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


def with_numpy_1(content, file):
    torch.save(content, file)
    as_numpy_1(file)


def before_torch_1_6_with_numpy_1(content, file):
    before_torch_1_6(content, file)
    as_numpy_1(file)


def without_mirror_axes(content, file):
    """As before nnU-Net stored them: it mirrors along none then."""
    torch.save({k: v for k, v in content.items() if k != "inference_allowed_mirroring_axes"}, file)


class TestEveryAge:
    @pytest.mark.parametrize("kind", [k for k in PLANS if k not in ("stock", LOWRES, CASCADE)])
    def test_plans(self, tmp_path, kind):
        folder = publish(tmp_path / "results", kind, folds=(0, 1))
        factory, said = opened(folder, folds=(0, 1))
        assert said == []
        assert_labels_as(factory, nnunets(folder, IMAGE, (0, 1)))
        file = zipped(folder, tmp_path / "a.zip", folder.parents[1])
        shutil.rmtree(folder)
        assert opened(file, folds=(0, 1))[0].identity() == factory.identity()

    @pytest.mark.parametrize(
        "save", [before_torch_1_6, with_numpy_1, before_torch_1_6_with_numpy_1, without_mirror_axes]
    )
    def test_checkpoints(self, tmp_path, save):
        folder = publish(tmp_path / "results", save=save)
        factory, _ = opened(folder, folds=(0,))
        assert factory.mirror_axes() == (() if save is without_mirror_axes else (0, 2))
        assert_labels_as(factory, nnunets(folder, IMAGE, (0,)))
        if save is not without_mirror_axes:  # the same weights in another packing are the same teacher
            stock = publish(tmp_path / "stock")
            assert opened(stock, folds=(0,))[0].identity() == factory.identity()


class TestFoldsAndCheckpoints:
    def test_all_numbered_folds_and_those_missing_are_said(self, tmp_path):
        folder = publish(tmp_path / "results", folds=(0, 1, 3, "all"))
        (folder / "fold_3/checkpoint_final.pth").rename(folder / "fold_3/checkpoint_best.pth")
        factory, said = opened(folder)
        assert factory.folds == (0, 1)
        assert len(said) == 1
        assert "fold 2 is not there, fold 3 has no checkpoint_final.pth, fold 4 is not there" in said[0]
        assert said[0].endswith("the teacher is fold 0 1")
        predictor = nnUNetPredictor(device=torch.device("cpu"))
        found = predictor.auto_detect_available_folds(str(folder), "checkpoint_final.pth")
        assert sorted(found) == [0, 1]
        assert_labels_as(factory, nnunets(folder, IMAGE, None))
        assert opened(folder, folds=(1,))[1] == [], "asked for, so expected"
        with pytest.raises(NotFoundError, match=r"fold\(s\) 3 have no checkpoint_final"):
            opened(folder, folds=(0, 3), checkpoint="checkpoint_final.pth")

    def test_five_folds_need_no_words(self, tmp_path):
        factory, said = opened(publish(tmp_path / "results", folds=range(5)))
        assert (factory.folds, said) == ((0, 1, 2, 3, 4), [])

    def test_fold_all(self, tmp_path):
        folder = publish(tmp_path / "results", folds=("all",))
        factory, said = opened(folder)
        assert factory.folds == ("all",)
        assert "fold all is the teacher" in said[0]
        assert_labels_as(factory, nnunets(folder, IMAGE, ("all",)))
        pickle.loads(pickle.dumps(factory)).load(1)

    def test_checkpoint_best_is_used_where_it_is_the_only_one(self, tmp_path):
        folder = publish(tmp_path / "results", checkpoint="checkpoint_best.pth", folds=range(5))
        factory, said = opened(folder)
        assert said == [f"{folder}: there is no checkpoint_final.pth; checkpoint_best.pth is used, the only one"]
        assert_labels_as(factory, nnunets(folder, IMAGE, None, "checkpoint_best.pth"))
        shutil.copy(folder / "fold_0/checkpoint_best.pth", folder / "fold_0/checkpoint_latest.pth")
        with pytest.raises(NotFoundError, match=r"(?s)got +checkpoint_best\.pth, checkpoint_latest\.pth\n.*with -chk"):
            opened(folder)
        assert opened(folder, checkpoint="checkpoint_best.pth")[0].folds == (0, 1, 2, 3, 4)
        with pytest.raises(NotFoundError, match=r"(?s)no fold .* has a checkpoint_x\.pth.*got +checkpoint_best\.pth"):
            opened(folder, checkpoint="checkpoint_x.pth")

    def test_checkpoint_final_before_best(self, tmp_path):
        folder = publish(tmp_path / "results", folds=range(5))
        final = opened(folder)[0]
        for fold in range(5):  # another, which nobody asked for
            torch.save({}, folder / f"fold_{fold}/checkpoint_best.pth")
        again, said = opened(folder)
        assert said == []
        assert again.identity() == final.identity()

    def test_a_damaged_fold_is_named_with_the_way_around_it(self, tmp_path):
        folder = publish(tmp_path / "results", folds=(0, 1, 2))
        file = folder / "fold_1/checkpoint_final.pth"
        file.write_bytes(file.read_bytes()[:-3000])
        with pytest.raises(CorruptError, match=r"(?s)fold_1/checkpoint_final\.pth.*or leave fold 1 out: -f 0 2$"):
            opened(folder)
        assert opened(folder, folds=(0, 2))[0].folds == (0, 2)


class TestLayouts:
    def test_folder_and_zips_are_one_teacher(self, tmp_path):
        folder = publish(tmp_path / "results", folds=range(5))
        for beside in ("crossval_results_folds_0_1_2_3_4", "../ensembles/ensemble___a__b__c___d__e__f___0_1_2_3_4"):
            (folder / beside).mkdir(parents=True)  # nnU-Net puts copies there
            shutil.copy(folder / "plans.json", folder / beside)
            shutil.copy(folder / "dataset.json", folder / beside)
            (folder / beside / "postprocessing.json").write_text("{}")
        (folder / "fold_0/._checkpoint_final.pth").write_bytes(b"of another system")
        ways = {
            "the folder": folder,
            "its data set": folder.parent,
            "the results": folder.parents[1],
            "as nnU-Net exports": zipped(folder.parent, tmp_path / "a.zip", folder.parents[1]),
            "the model folder": zipped(folder, tmp_path / "b.zip", folder.parent),
            "what is in it": zipped(folder, tmp_path / "c.zip", folder),
            "under another name": tmp_path / "renamed",
        }
        shutil.copytree(folder, tmp_path / "renamed")
        identities = {way: (opened(path)[0].identity(), opened(path)[1]) for way, path in ways.items()}
        expected = identities["the folder"]
        assert expected[1] == []
        assert {way: found for way, found in identities.items() if found != expected} == {}
        assert str(tmp_path) not in json.dumps(expected[0])

    def test_a_folder_of_another_configurations_name(self, tmp_path):
        """nnU-Net goes by what the checkpoint says."""
        folder = publish(tmp_path / "results", "inherits")
        (moved := folder.with_name("nnUNetTrainer__toyPlans__mine")).parent.mkdir(exist_ok=True)
        folder.rename(moved)
        factory, _ = opened(moved, folds=(0,))
        assert factory.files.configuration == "own"
        assert_labels_as(factory, nnunets(moved, IMAGE, (0,)))

    def test_several_models(self, tmp_path):
        where = tmp_path / "results"
        one, other = publish(where), publish(where, trainer="nnUNetTrainer_5epochs")
        third = publish(where, "inherits", trainer="nnUNetTrainer_5epochs")
        file = zipped(where, tmp_path / "a.zip", where)
        with pytest.raises(SpecError, match=r"(?s)3 models fit, .*no option.*choose one with -tr and -c$") as said:
            opened(file)
        assert all(f"  - Dataset999_Toy/{folder.name}\n" in str(said.value) for folder in (one, other, third))
        with pytest.raises(SpecError, match=r"(?s)2 models fit.*got +-c 3d_toy\n.*choose one with -tr$"):
            opened(file, configuration=TOY)
        with pytest.raises(SpecError, match=r"0 models fit"):
            opened(file, plans="others")
        with pytest.raises(SpecError) as said:
            opened(one, configuration="2d")
        assert str(said.value).endswith(f"  - {one.name}\nleave out -c 2d, or name another model")
        found = opened(file, configuration=TOY, trainer="nnUNetTrainer_5epochs")[0]
        assert found.folder.name == other.name
        shutil.copytree(one.parent, where / "Dataset998_Copy")
        with pytest.raises(SpecError, match=r"(?s)2 models fit.*\nname its folder$"):
            opened(where, configuration=TOY, trainer=STOCK)
        with pytest.raises(SpecError, match=r"(?s)2 models fit.*\nunzip it and name one of these folders$"):
            opened(zipped(where, tmp_path / "b.zip", where), configuration=TOY, trainer=STOCK)

    def test_what_is_no_model(self, tmp_path):
        folder = publish(tmp_path / "results")
        (folder / "fold_0/checkpoint_final.pth").unlink()
        with pytest.raises(NotFoundError, match=r"there is a plans\.json, but no fold_0 with a checkpoint_final\.pth"):
            opened(folder)
        first = tmp_path / "v1/nnUNet/3d_fullres/Task004/nnUNetTrainerV2__nnUNetPlansv2.1"
        (first / "fold_0").mkdir(parents=True)
        for name in ("plans.pkl", "fold_0/model_final_checkpoint.model", "fold_0/model_final_checkpoint.model.pkl"):
            (first / name).write_bytes(b"x")
        for path in (first, zipped(first, tmp_path / "v1.zip", tmp_path / "v1")):
            with pytest.raises(NotFoundError, match="a model of nnU-Net v1"):
                opened(path)
        other = zipped(Path(__file__).parent / "objects.py", tmp_path / "none.zip", Path(__file__).parent)
        with pytest.raises(NotFoundError, match=r"there is no plans\.json"):
            opened(other)
        assert not list((tmp_path / "home/models").iterdir())


class TestUnknownTrainers:
    def test_the_network_of_the_plans_takes_their_place(self, tmp_path):
        """What nnU-Net labels once somebody has told it that the trainer is its own."""
        folder = publish(tmp_path / "results", trainer="nnUNetTrainerOfSomebody")
        with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
            nnunets(folder, IMAGE, (0,))
        factory, said = opened(folder, folds=(0,))
        assert len(said) == 1
        assert said[0].startswith(f"trainer nnUNetTrainerOfSomebody of {folder} is not installed")
        file = folder / "fold_0/checkpoint_final.pth"
        stored = torch.load(file, weights_only=False)
        known = shutil.copytree(folder, tmp_path / "known")
        torch.save({**stored, "trainer_name": STOCK}, known / "fold_0/checkpoint_final.pth")
        assert_labels_as(factory, nnunets(known, IMAGE, (0,)))
        assert opened(known, folds=(0,))[0].identity() == factory.identity()
        deviation = factory.load(1).deviation([IMAGE], 1.0)  # from nnU-Net's predictor, which does not know it either
        assert deviation == opened(known, folds=(0,))[0].load(1).deviation([IMAGE], 1.0)
        assert deviation["mean_abs_difference"] < 1e-3

    def test_predict_and_export_take_it_too(self, tmp_path, capsys):
        """With the same words, also when the bundle is there already."""
        folder = publish(tmp_path / "results", trainer="nnUNetTrainerOfSomebody")
        known = publish(tmp_path / "known")
        _, (said,) = opened(folder, folds=(0,))
        image = tmp_path / "scans/a_0000.nii.gz"
        write_image(smooth_noise((22, 29, 31), 3), image, (1.1, 0.9, 1.3))
        nnunet_files(nnunet_predictor(known, (0,)), {"a": [image]}, tmp_path / "theirs")
        theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "theirs/a.nii.gz")))
        assert len(np.unique(theirs)) == 3
        for output in ("first", "again"):
            with pytest.raises(SystemExit) as done:
                main(["predict", "-i", str(image.parent), "-o", str(tmp_path / output), "-m", str(folder), "-f", "0"])
            assert done.value.code == 0
            heard = " ".join(capsys.readouterr().err.split())
            assert heard.count(" ".join(said.split())) == 1
            assert ("first use of this model" in heard) == (output == "first")
            ours = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / output / "a.nii.gz")))
            assert (ours == theirs).mean() > 0.999
        with pytest.raises(SystemExit) as done:
            main(["export", "onnx", "-m", str(folder), "-f", "0", "-o", str(tmp_path / "bundle")])
        assert done.value.code == 0
        assert " ".join(said.split()) in " ".join(capsys.readouterr().err.split())
        assert load_bundle_spec(tmp_path / "bundle").provenance["trainer"] == "nnUNetTrainerOfSomebody"

    def test_another_network_than_the_plans_is_refused(self, tmp_path, capsys):
        folder = publish(tmp_path / "results", trainer="nnUNetTrainerOfSomebody")
        plans = json.loads((folder / "plans.json").read_text())
        plans["configurations"][TOY]["architecture"]["arch_kwargs"]["features_per_stage"] = [6, 8, 14]
        (folder / "plans.json").write_text(json.dumps(plans))
        with pytest.raises(
            MismatchError, match=r"(?s)OfSomebody of .* is not installed, and its network.*nnUNet_extTr"
        ):
            opened(folder, folds=(0,))
        write_image(smooth_noise((22, 29, 31), 3), tmp_path / "scans/a_0000.nii.gz")
        for command in (["predict", "-i", str(tmp_path / "scans"), "-o"], ["export", "onnx", "-o"]):
            with pytest.raises(SystemExit) as done:
                main([*command, str(tmp_path / "out"), "-m", str(folder), "-f", "0"])
            assert done.value.code == 2
            assert "OfSomebody of" in (said := capsys.readouterr().err)
            assert "its network is not the one in the plans" in " ".join(said.split())
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "home").rglob("bundle.json"))


class TestPictures:
    def test_2d_with_rgb_pictures(self, tmp_path):
        """From the files to labels: nnU-Net's own files-to-files prediction is the oracle."""
        folder = publish(
            tmp_path / "results",
            toy=Toy(
                dims=2, channels=3, file_ending=".png", reader_writer="NaturalImage2DIO", spacing=(1.0, 1.0),
                mirror_axes=(0, 1),
            ),
        )  # fmt: skip
        scans = tmp_path / "scans"
        scans.mkdir()
        rng = np.random.default_rng(1)
        for name in ("a", "b"):
            noise = ndimage.gaussian_filter(rng.normal(size=(41, 50, 3)), (2, 2, 0))
            pixels = (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
            Image.fromarray(pixels).save(scans / f"{name}_0000.png")
        factory, _ = opened(folder, folds=(0,))
        files = factory.files
        found = find_images(scans, ".png", 3)
        assert found == {name: (scans / f"{name}_0000.png",) for name in ("a", "b")}
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), (0,))
        (tmp_path / "theirs").mkdir()
        predictor.predict_from_files_sequential(
            [[str(f) for f in channels] for channels in found.values()],
            [str(tmp_path / "theirs" / case) for case in found],
        )
        for case, channels in found.items():
            preprocess_case(
                ImageTask(
                    case_id=case,
                    files=channels,
                    folder=tmp_path / "cases",
                    plans=files.plans,
                    configuration=files.configuration,
                    dataset_json=files.dataset_json,
                )
            )
            image_CZYX = PreprocessedCases(tmp_path / "cases").image_CZYX(case)
            ours = teacher_logits(factory, image_CZYX, factory.folds).argmax(0)
            theirs = np.asarray(Image.open(tmp_path / "theirs" / f"{case}.png"))
            assert len(np.unique(theirs)) == 3
            assert (ours[0] == theirs).mean() > 0.999

    def test_pictures_with_too_few_channels(self, tmp_path):
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(tmp_path / "a_0000.png")
        with pytest.raises(ImageError, match="a: got channels _0000, expected _0000 to _0002"):
            find_images(tmp_path, ".png", 3)
        Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "a_0000.png")
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(tmp_path / "b_0000.png")
        found = find_images(tmp_path, ".png", 3)  # nnU-Net's reader counts when it reads them
        toy = Toy(dims=2, channels=3, file_ending=".png", reader_writer="NaturalImage2DIO", spacing=(1.0, 1.0))
        task = ImageTask(
            case_id="b", files=found["b"], folder=tmp_path / "cases", plans=_plans(toy), configuration="2d_toy",
            dataset_json=_dataset_json(toy),
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"it has 1 channel\(s\), expected 3"):
            preprocess_case(task)
        assert not (tmp_path / "cases").exists()


class TestCascades:
    @pytest.fixture
    def scans(self, tmp_path, monkeypatch):
        """Two images, and a place for what is made of them."""
        monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
        (tmp_path / "preprocessed").mkdir()
        for seed, name in enumerate(("a", "b")):
            image = smooth_noise((22, 29, 31), seed, border=2)
            write_image(image, tmp_path / "scans" / f"{name}_0000.nii.gz", (1.1, 0.9, 1.3))
        return tmp_path / "scans"

    def job(self, stages, scans):
        files = stages.teacher.files
        return UnlabelledJob(
            target=ImageSet(
                name="scans", plans=files.plans, configuration=files.configuration, dataset_json=files.dataset_json
            ),
            images=scans,
            data_set=None,
            factory=stages.teacher,
            spec=RECIPE,
            root=scans.parent / "caches",
            command="again",
            first=stages.first,
        )

    def test_both_stages_of_a_zip(self, tmp_path, scans):
        """Oracle: nnU-Net's predictor with the first stage, then with the second on the files that the first wrote."""
        results = tmp_path / "results"
        low, full = publish(results, LOWRES, folds=(0, 1)), publish(results, CASCADE)
        file, said = zipped(results, tmp_path / "a.zip", results), []
        stages = open_stages(PublishedSpec(path=file, configuration=CASCADE, folds=(0,)), RECIPE, said.append)
        assert stages.first.folds == (0, 1), "all that are there"
        assert said[0].text == f"{CASCADE} is a cascade's second stage: {low.name} labels first"
        job = self.job(stages, scans)
        cases = job.preprocess(0)
        assert cases.case_ids == ("a", "b")

        files = {case: [scans / f"{case}_0000.nii.gz"] for case in cases.case_ids}
        nnunet_files(nnunet_predictor(low, (0, 1)), files, tmp_path / "low")
        second = nnunet_predictor(full, (0,))
        nnunet_files(second, files, tmp_path / "full", previous=tmp_path / "low")
        plans, config = second.plans_manager, second.configuration_manager
        for case, channels in files.items():
            image, seg, properties = config.preprocessor_class(verbose=False).run_case(
                [str(f) for f in channels], str(tmp_path / f"low/{case}.nii.gz"), plans, config, second.dataset_json
            )
            expected = np.vstack([image, convert_labelmap_to_one_hot(seg[0], [1, 2], image.dtype)])
            image_CZYX = cases.image_CZYX(case)
            assert image_CZYX.shape == expected.shape
            np.testing.assert_array_equal(image_CZYX[0], expected[0])
            assert (image_CZYX[1:] == expected[1:]).mean() > 0.999
            assert 0.1 < image_CZYX[1].mean() < 0.9
            logits = teacher_logits(stages.teacher, image_CZYX, (0,))
            ours = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits, plans, config, second.label_manager, properties
            )
            theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"full/{case}.nii.gz")))
            assert len(np.unique(theirs)) == 3
            assert (ours == theirs).mean() > 0.998
        cache = build_cache(job.cache_job(job.finished()))
        assert sorted(cache.cases) == ["a", "b"]

    def test_only_what_is_new_is_labelled_by_the_first_stage(self, tmp_path, scans):
        results = tmp_path / "results"
        publish(results, LOWRES), publish(results, CASCADE)
        stages = open_stages(PublishedSpec(path=results, configuration=CASCADE), RECIPE)
        job, said = self.job(stages, scans), []
        with pytest.raises(NotFoundError, match="no unlabelled images were preprocessed"):
            job.finished()
        before = job.preprocess(0)
        digests = {case: before.digest(case) for case in before.case_ids}
        times = {p.name: p.stat().st_mtime_ns for p in before.previous.iterdir()}
        again = job.preprocess(0, said.append)
        assert not [event for event in said if event.what.startswith("labelling")]
        assert {case: again.digest(case) for case in again.case_ids} == digests
        write_image(smooth_noise((22, 29, 31), 7), scans / "b_0000.nii.gz", (1.1, 0.9, 1.3))
        after = job.preprocess(0)
        changed = [p.name for p in after.previous.iterdir() if p.stat().st_mtime_ns != times[p.name]]
        assert changed == ["b.b2nd"]
        assert [case for case in digests if after.digest(case) != digests[case]] == ["b"]
        other = publish(tmp_path / "other", LOWRES, folds=(1, 2))  # another first stage has a folder of its own
        shutil.rmtree(results / "Dataset999_Toy" / other.name)
        shutil.copytree(other, results / "Dataset999_Toy" / other.name)
        stages = open_stages(PublishedSpec(path=results, configuration=CASCADE), RECIPE)
        with pytest.raises(NotFoundError, match="2 of 2 images were not labelled by 3d_lowres yet, first a"):
            self.job(stages, scans).finished()

    def test_refusals(self, tmp_path):
        results = tmp_path / "results"
        full = publish(results, CASCADE)
        alone = PublishedSpec(path=full)
        with pytest.raises(SpecError, match="is a cascade stage and needs predictions of 3d_lowres"):
            open_published(alone, RECIPE)
        for path in (full, zipped(full, tmp_path / "a.zip", full)):
            with pytest.raises(NotFoundError, match="needs the predictions of 3d_lowres, which is not beside it"):
                open_stages(PublishedSpec(path=path), RECIPE)
        low = publish(results, LOWRES, trainer="nnUNetTrainer_5epochs")
        assert open_stages(alone, RECIPE).first.folder == low, "of another trainer, where there is no other"
        described = json.loads((low / "dataset.json").read_text())
        described["labels"] = {"background": 0, "b": 1, "a": 2}
        (low / "dataset.json").write_text(json.dumps(described))
        with pytest.raises(MismatchError, match=r"(?s)does not belong to 3d_cascade_fullres:\n  - labels: got"):
            open_stages(alone, RECIPE)
        assert open_stages(PublishedSpec(path=low), RECIPE).first is None
