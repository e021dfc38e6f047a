"""Every configuration and label kind through cache, training, export and prediction; nnU-Net is the oracle."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import resize_segmentation

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.cache.reader import SoftLabelReader
from fastnnunet.distill.train import TrainingJob, train_student
from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.geometry.resample import ResampleSpec, plan_resampling, resample_labels
from fastnnunet.nnunet.dataset import open_teacher
from fastnnunet.nnunet.plans import build_network
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from tests.tiny import CONFIGURATION, DATASET, FEATURES

RECIPE = CacheSpec(precision="fp32", mirroring=False, engine="torch")
SHORT = DistillSpec(epochs=1, iterations_per_epoch=2, val_iterations_per_epoch=1, precision="fp32")
CASCADE = "3d_cascade_fullres"
REGIONS = {"background": 0, "both": [1, 2], "dark": 2}


def two_dimensional(config):
    kwargs = {**config["architecture"]["arch_kwargs"]}
    kwargs.update(
        conv_op="torch.nn.modules.conv.Conv2d",
        norm_op="torch.nn.modules.instancenorm.InstanceNorm2d",
        kernel_sizes=[[3, 3]] * len(FEATURES),
        strides=[[1, 1]] + [[2, 2]] * (len(FEATURES) - 1),
    )
    return {
        **config,
        "patch_size": [16, 16],
        "spacing": config["spacing"][1:],
        "batch_dice": True,
        "architecture": {**config["architecture"], "arch_kwargs": kwargs},
    }


def prepare(world, kind):
    """Turn the tiny world into one of another kind, with one untrained fold; returns the configuration."""
    base = world / "preprocessed" / DATASET
    plans, dataset_json = (json.loads((base / n).read_text()) for n in ("nnUNetPlans.json", "dataset.json"))
    config = plans["configurations"][CONFIGURATION]
    name = {"2d": "2d", "cascade": CASCADE}.get(kind, CONFIGURATION)
    if kind == "2d":
        config = two_dimensional(config)
    if kind == "anisotropic":
        config["architecture"]["arch_kwargs"].update(
            kernel_sizes=[[1, 3, 3]] + [[3, 3, 3]] * 2, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]
        )
    if kind == "resenc":
        architecture = config["architecture"]
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        del architecture["arch_kwargs"]["n_conv_per_stage"]
        architecture["arch_kwargs"]["n_blocks_per_stage"] = [1, 2, 2]
    if kind == "cascade":
        config = {**config, "previous_stage": "3d_lowres"}
        plans["configurations"]["3d_lowres"] = {**plans["configurations"][CONFIGURATION], "next_stage": [CASCADE]}
    if kind == "regions":
        dataset_json.update(labels=REGIONS, regions_class_order=[1, 2])
    if kind == "ignore":
        dataset_json["labels"]["ignore"] = 3
    plans["configurations"][name] = config
    folder = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{name}"
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    for where in (base / "nnUNetPlans.json", folder / "plans.json"):
        where.write_text(json.dumps(plans))
    for where in (base, folder):
        (where / "dataset.json").write_text(json.dumps(dataset_json))
    torch.manual_seed(1)
    weights = build_network(plans, name, dataset_json).state_dict()
    weights.update({k: 4 * v for k, v in weights.items() if "seg_layers" in k})
    init = {"plans": plans, "configuration": name, "fold": 0, "dataset_json": dataset_json}
    torch.save(
        {
            "network_weights": weights,
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": tuple(range(len(config["patch_size"]))),
            "init_args": init,
        },
        folder / "fold_0/checkpoint_final.pth",
    )
    if kind == "ignore":
        ignore_a_slab(base / config["data_identifier"])
    if kind == "cascade":
        write_previous(base / config["data_identifier"], previous_folder(world))
    return name


def ignore_a_slab(folder):
    """Label 3 in the first planes of every case, and the voxel lists nnU-Net's preprocessing makes for it."""
    import pickle

    import blosc2

    for file in sorted(folder.glob("*_seg.b2nd")):
        label = blosc2.open(str(file))[:]
        label[:, :6] = 3
        blosc2.asarray(label, urlpath=str(file), mode="w")
        properties_file = file.with_name(file.name.replace("_seg.b2nd", ".pkl"))
        properties = pickle.loads(properties_file.read_bytes())
        properties["class_locations"] = {key: np.argwhere(np.isin(label, key)) for key in (1, 2, (-1, 0, 1, 2))}
        properties_file.write_bytes(pickle.dumps(properties))


def previous_folder(world):
    return world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_lowres/predicted_next_stage" / CASCADE


def write_previous(cases, folder):
    """Previous segmentations in nnU-Net's own format: the labels, moved by two voxels."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    folder.mkdir(parents=True)
    dataset = infer_dataset_class(str(cases))(str(cases))
    for case in dataset.identifiers:
        label = np.maximum(np.asarray(dataset.load_case(case)[1][0]), 0).astype(np.int8)
        dataset.save_seg(np.roll(label, 2, axis=1), str(folder / case))


def teacher_spec(kind, name):
    previous = "teacher" if kind == "cascade" else None
    return TeacherSpec(dataset="998", configuration=name, folds=(0,), previous=previous)


def recipe_for(kind):
    return dataclasses.replace(RECIPE, encoding="sigmoid_u8") if kind == "regions" else RECIPE


def nnunet_predictor(folder):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


def nnunet_soft_label(world, name, kind, case):
    """Of nnU-Net's own data set, one-hot encoding and predictor; where its half-precision sums are good."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    predictor = nnunet_predictor(world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{name}")
    cases = str(world / "preprocessed" / DATASET / predictor.configuration_manager.data_identifier)
    previous = str(previous_folder(world)) if kind == "cascade" else None
    image, _, seg_prev, _ = infer_dataset_class(cases)(cases, None, previous).load_case(case)
    image = image[:]
    if kind == "cascade":
        image = np.vstack([image, convert_labelmap_to_one_hot(seg_prev[:], [1, 2], image.dtype)])
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float() / RECIPE.temperature
    return (logits.sigmoid() if kind == "regions" else logits.softmax(0)).numpy()


@pytest.mark.parametrize("kind", ["2d", "anisotropic", "regions", "ignore", "cascade", "resenc"])
def test_cache_train_export_predict(world, tmp_path, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        _whole_way(world, tmp_path, kind)


def _whole_way(world, tmp_path, kind):
    name = prepare(world, kind)
    spec, recipe = teacher_spec(kind, name), recipe_for(kind)
    source, factory, root = open_teacher(spec, recipe)
    cache = build_cache(prepare_job(source, factory, recipe, root, command="rebuild"))
    reader = SoftLabelReader(cache.path)
    case = source.case_ids[0]
    got = reader.to_probabilities(reader.read_case(case))
    expected = nnunet_soft_label(world, name, kind, case)
    assert got.shape == expected.shape
    assert expected.std() > 0.02
    # nnU-Net sums tiles in half precision: far off at a few voxels in the corners of tiles
    assert np.quantile(np.abs(got - expected), 0.95) < 0.006

    seen = []
    distill = dataclasses.replace(SHORT, soft_on_ignored=kind != "ignore")
    job = TrainingJob(
        teacher=spec, student=StudentSpec(r=2), distill=distill, cache=recipe, fold=0, device="cpu", threads=1
    )
    folder = train_student(job, validate=False, progress=seen.append)
    assert all(s.soft > 0 and np.isfinite(s.hard) for s in seen)

    bundle = tmp_path / "bundle"
    export_bundle(folder.parent, 0, bundle)
    assert load_bundle_spec(bundle).previous_labels == ((1, 2) if kind == "cascade" else ())
    images = world / "raw" / DATASET / "imagesTs"
    previous = world / "raw" / DATASET / "labelsTs" if kind == "cascade" else None
    Predictor.load(bundle, "onnxruntime").predict_files(images, tmp_path / "ours", previous=previous)
    cases = sorted(p.name.removesuffix("_0000.nii.gz") for p in images.iterdir())
    (tmp_path / "theirs").mkdir()
    nnunet_predictor(folder.parent).predict_from_files_sequential(
        [[str(images / f"{c}_0000.nii.gz")] for c in cases],
        [str(tmp_path / "theirs" / c) for c in cases],
        folder_with_segs_from_prev_stage=str(previous) if previous else None,
    )
    for case in cases:
        ours, theirs = (read(tmp_path / who / f"{case}.nii.gz") for who in ("ours", "theirs"))
        assert (ours == theirs).mean() >= 0.9999


def read(file: Path):
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


class TestCascade:
    def test_other_predictions_make_another_cache(self, world):
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        name = prepare(world, "cascade")
        cases, _, _ = open_teacher(teacher_spec("cascade", name), RECIPE)
        before = cases.digest("tiny_00")
        previous = np.asarray(cases._dataset.load_case("tiny_00")[2][:]).copy()
        previous[0, 0, 0] = 1 - previous[0, 0, 0]
        (previous_folder(world) / "tiny_00.b2nd").unlink()
        nnUNetDatasetBlosc2.save_seg(previous, str(previous_folder(world) / "tiny_00"))
        again, _, _ = open_teacher(teacher_spec("cascade", name), RECIPE)
        assert again.digest("tiny_00") != before
        assert again.digest("tiny_01") == cases.digest("tiny_01")

    def test_everything_moves_together(self):
        """Image, label, previous one-hot and soft label of one ball stay that ball under rotation, scaling, mirrors."""
        from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
        from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

        from fastnnunet.nnunet.trainer import _SplitSoftLabels

        grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
        centre = np.array([8, 10, 14])[:, None, None, None]
        ball = torch.from_numpy((((grid - centre) ** 2).sum(0) < 36).astype(np.float32))[None]
        spatial = SpatialTransform(
            (20, 20, 20), 0, False, p_rotation=1, rotation=(-0.5, 0.5), p_scaling=1, scaling=(0.8, 1.2)
        )
        one_hot = MoveSegAsOneHotToDataTransform(1, [1, 2], remove_channel_from_source=True)
        split = _SplitSoftLabels(ComposeTransforms([spatial, MirrorTransform((0, 1, 2)), one_hot]), 1)
        np.random.seed(3)
        torch.manual_seed(3)
        for _ in range(4):
            out = split(torch.cat([ball, ball]), torch.cat([ball, 2 * ball]).to(torch.int16))
            (image, is_1, is_2), (label, soft) = out["image"], out["segmentation"]
            torch.testing.assert_close(soft[0], image)
            assert label.shape == (1, 20, 20, 20)
            assert not is_1.any()
            assert is_2.equal(label[0].float())
            inside = image > 0.5
            assert inside.sum() > 100
            assert (inside != is_2.bool()).sum() < 0.1 * inside.sum()

    def test_refusals(self, world):
        name = prepare(world, "cascade")
        spec = teacher_spec("cascade", name)
        with pytest.raises(SpecError, match="give --previous teacher"):
            open_teacher(dataclasses.replace(spec, previous=None), RECIPE)
        with pytest.raises(NotFoundError, match=r"(?s)no predictions of 3d_lowres at /nowhere.*nnUNetv2_train 998"):
            open_teacher(dataclasses.replace(spec, previous="/nowhere"), RECIPE)
        with pytest.raises(SpecError, match="has no previous stage"):
            open_teacher(dataclasses.replace(spec, configuration=CONFIGURATION), RECIPE)
        (previous_folder(world) / "tiny_03.b2nd").unlink()
        with pytest.raises(NotFoundError, match=r"(?s)no prediction of 1 of 10 cases: tiny_03.*nnUNetv2_train"):
            open_teacher(spec, RECIPE)


@pytest.mark.parametrize("shape_out", [(9, 20, 14), (9, 9, 31), (9, 13, 17)])
def test_labels_are_resampled_as_nnunet_does(shape_out):
    labels = np.random.default_rng(5).integers(-1, 4, (9, 13, 17))
    plan = plan_resampling(ResampleSpec(convention="scipy", order=1), labels.shape, shape_out, (1, 1, 1), (1, 1, 1))
    np.testing.assert_array_equal(resample_labels(labels, plan), resize_segmentation(labels, shape_out, 1))


@pytest.mark.parametrize("regions", [False, True])
def test_soft_loss_of_valid_voxels_only(regions):
    """Equal to the loss of those voxels alone; what is elsewhere has no gradient."""
    from fastnnunet.distill.losses import DistillationObjective

    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 5, 6, generator=rng, requires_grad=True)
    soft = torch.randn(2, 3, 4, 5, 6, generator=rng).softmax(1)[:, 0 if regions else 1 :]
    mask = torch.rand(2, 1, 4, 5, 6, generator=rng) > 0.4
    objective = DistillationObjective(0.3, 2.0, regions)
    total, got = objective(torch.tensor(1.5), logits, soft, mask)
    chosen = [x.movedim(1, -1)[mask[:, 0]].T[None] for x in (logits, soft)]  # (1, channels, valid voxels)
    expected_total, expected = objective(torch.tensor(1.5), *chosen)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(total, expected_total)
    got.backward()
    assert (logits.grad.abs().sum(1, keepdim=True) > 0).equal(mask)
    assert objective(torch.tensor(1.5), logits, soft, torch.zeros_like(mask))[1] == 0


class TestIgnoreLabelInTraining:
    def mask(self, soft_on_ignored):
        """What the trainer makes of a batch of which one half is ignored."""
        from types import SimpleNamespace

        from fastnnunet.nnunet.trainer import StudentTrainer

        labels = SimpleNamespace(has_ignore_label=True, has_regions=False, ignore_label=3)
        me = SimpleNamespace(soft_on_ignored=soft_on_ignored, label_manager=labels)
        target = torch.full((1, 1, 2, 2, 2), 3)
        target[:, :, 0] = 1
        return StudentTrainer._valid_mask(me, [target, target[..., :1]]), target

    def test_mask(self):
        mask, target = self.mask(False)
        assert mask.equal(target == 1)
        assert self.mask(True)[0] is None
