"""Every configuration and label kind through cache, training, export and prediction; nnU-Net is the oracle."""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.augmentations.utils import resize_segmentation

from fastnnunet.cache.build import build_cache
from fastnnunet.cache.job import prepare_job
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.distill.job import TrainingJob
from fastnnunet.distill.train import train_student
from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.export.bundle import export_bundle
from fastnnunet.geometry.resample import ResampleSpec, plan_resampling, resample_labels
from fastnnunet.nnunet.files.model import build_network, model_of
from fastnnunet.nnunet.files.paths import teacher_folder
from fastnnunet.nnunet.files.splits import split_of
from fastnnunet.nnunet.student.plans import student_plans
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.data_set import open_teacher
from tests.samples import NNUNETS, transformed
from tests.tiny import CONFIGURATION, DATASET, FEATURES, before_2_5

RECIPE = CacheSpec(temperature=3.0, precision="fp32", mirroring=False, engine="torch")
SHORT = DistillSpec(temperature=3.0, epochs=1, iterations_per_epoch=2, val_iterations_per_epoch=1, precision="fp32")
CASCADE, LOWRES = "3d_cascade_fullres", "3d_lowres"
REGIONS = {"background": 0, "both": [1, 2], "dark": 2}
CONFIGURATIONS = {
    "2d": "2d",
    "cascade": CASCADE,
    "lowres": LOWRES,
    "inherits": "3d_fullres_bd",
}  # of kinds; the others have the tiny world's
TEACHERS = {  # what is not nnU-Net's default
    "resenc_m": {"plans": "nnUNetResEncUNetMPlans"},
    "resenc_l": {"plans": "nnUNetResEncUNetLPlans"},
    "named": {"trainer": "TrainerOfOurOwn", "checkpoint": "checkpoint_best.pth"},
}
RESENC_BLOCKS = (1, 3, 4, 6, 6, 6)  # of nnU-Net's M, L and XL plans with six stages
CHANNELS = {"0": "CT", "1": "MRI", "2": "rescale_to_0_1"}


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
    if kind in ("resenc_m", "resenc_l"):
        plan_resenc(base, f"nnUNetPlannerResEnc{kind[-1].upper()}")
    spec = teacher_spec(kind)
    plans, dataset_json = (json.loads((base / n).read_text()) for n in (f"{spec.plans}.json", "dataset.json"))
    config = plans["configurations"][CONFIGURATION]
    name = spec.configuration
    if kind in ("old", "old_resenc"):  # with cases as they were stored then, and a fingerprint that got lost
        config = before_2_5(config, "PlainConvUNet" if kind == "old" else "ResidualEncoderUNet")
        plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")
        store_as_npz(base / config["data_identifier"], unpacked=kind == "old")
        (base / "dataset_fingerprint.json").unlink()
    if kind == "inherits":
        plans["configurations"]["between"] = {"inherits_from": CONFIGURATION, "batch_size": 3}
        config = {"inherits_from": "between", "batch_dice": True}
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
        config = {"inherits_from": CONFIGURATION, "previous_stage": LOWRES}  # as nnU-Net's planner writes it
        plans["configurations"][LOWRES] = {**plans["configurations"][CONFIGURATION], "next_stage": [CASCADE]}
    if kind == "lowres":
        plans["configurations"][CASCADE] = {**config, "previous_stage": LOWRES}
        spacing = [1.5 * s for s in config["spacing"]]
        config = {**config, "spacing": spacing, "data_identifier": f"nnUNetPlans_{LOWRES}", "next_stage": CASCADE}
    if kind == "channels":
        config.update(
            normalization_schemes=["CTNormalization", "ZScoreNormalization", "RescaleTo01Normalization"],
            use_mask_for_norm=[False, True, False],
        )
        dataset_json["channel_names"] = CHANNELS
        intensities = plans["foreground_intensity_properties_per_channel"]
        intensities.update(dict.fromkeys(("1", "2"), intensities["0"]))  # CT alone looks at them
        for folder in ("imagesTr", "imagesTs"):
            write_more_channels(world / "raw" / DATASET / folder)
    if "regions" in kind:
        dataset_json.update(labels=dict(REGIONS), regions_class_order=[1, 2])
    if "ignore" in kind:
        dataset_json["labels"]["ignore"] = 3
        ignore_a_slab(world / "raw" / DATASET / "labelsTr")
    plans["configurations"][name] = config
    config = resolved_by_nnunet(plans, name)
    folder = world / "results" / DATASET / f"{spec.trainer}__{spec.plans}__{name}"
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    for where in (base / f"{spec.plans}.json", folder / "plans.json"):
        where.write_text(json.dumps(plans))
    for where in (base, folder):
        (where / "dataset.json").write_text(json.dumps(dataset_json))
    torch.manual_seed(1)
    weights = build_network(model_of(plans, name, dataset_json)).state_dict()
    weights.update({k: 4 * v for k, v in weights.items() if "seg_layers" in k})
    init = {"plans": plans, "configuration": name, "fold": 0, "dataset_json": dataset_json}
    torch.save(
        {
            "network_weights": weights,
            "trainer_name": spec.trainer,
            "inference_allowed_mirroring_axes": tuple(range(len(config["patch_size"]))),
            "init_args": init,
        },
        folder / "fold_0" / spec.checkpoint,
    )
    if "ignore" in kind or kind in ("lowres", "channels"):
        preprocess_again(world, plans, name, dataset_json)
    if kind == "cascade":
        write_previous(base / config["data_identifier"], previous_folder(world))
    return name


def resolved_by_nnunet(plans, name):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(plans).get_configuration(name).configuration


def store_as_npz(folder, *, unpacked):
    """As nnU-Net before 2.6 stored preprocessed cases; `unpacked` by a training."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

    dataset = nnUNetDatasetBlosc2(str(folder))
    for case in dataset.identifiers:
        data, seg, _, properties = dataset.load_case(case)
        nnUNetDatasetNumpy.save_case(data[:], seg[:], properties, str(folder / case))
        (folder / f"{case}.b2nd").unlink()
        (folder / f"{case}_seg.b2nd").unlink()
    if unpacked:
        nnUNetDatasetNumpy.unpack_dataset(str(folder), num_processes=1)


def plan_resenc(base, name):
    """Plans of nnU-Net's own planner, made narrow and as deep as they are on large images."""
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("nnUNet_n_proc_DA", "1")  # the planner takes as many threads
        planner = getattr(residual_encoder_unet_planners, name)(DATASET)
        planner.plan_experiment()
    file = base / f"{planner.plans_identifier}.json"
    plans = json.loads(file.read_text())
    config = plans["configurations"][CONFIGURATION]
    kwargs, stages = config["architecture"]["arch_kwargs"], len(RESENC_BLOCKS)
    assert tuple(kwargs["n_blocks_per_stage"]) == RESENC_BLOCKS[: kwargs["n_stages"]]
    config.update(patch_size=[16] * 3, batch_size=2)
    kwargs.update(
        n_stages=stages,
        features_per_stage=[16] * 3 + [20] * 3,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1] * 3, [2] * 3, [2] * 3] + [[1] * 3] * (stages - 3),
        n_blocks_per_stage=list(planner.UNet_blocks_per_stage_encoder[:stages]),
        n_conv_per_stage_decoder=list(planner.UNet_blocks_per_stage_decoder[: stages - 1]),
    )
    plans["configurations"] = {CONFIGURATION: config}
    file.write_text(json.dumps(plans))


def write_more_channels(folder):
    """Channels 1 (zero where the first is small) and 2 beside the first."""
    import SimpleITK as sitk

    for file in sorted(folder.glob("*_0000.nii.gz")):
        first = sitk.ReadImage(str(file))
        values = sitk.GetArrayFromImage(first)
        for channel, array in ((1, np.where(values > -10, 300 - values, 0)), (2, np.abs(values) + 7)):
            picture = sitk.GetImageFromArray(array.astype(np.float32))
            picture.CopyInformation(first)
            sitk.WriteImage(picture, str(file).replace("_0000", f"_{channel:04d}"))


def ignore_a_slab(folder):
    """Label 3 in the first planes of every case, not equally many."""
    import SimpleITK as sitk

    for number, file in enumerate(sorted(folder.glob("*.nii.gz"))):
        label = sitk.ReadImage(str(file))
        label[:, :, : 4 + 3 * (number % 3)] = 3
        sitk.WriteImage(label, str(file))


def preprocess_again(world, plans, name, dataset_json):
    """By nnU-Net's preprocessor, in this process."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    config = manager.get_configuration(name)
    out = world / "preprocessed" / DATASET / config.data_identifier
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    raw = world / "raw" / DATASET
    preprocessor = config.preprocessor_class(verbose=False)
    for label in sorted((raw / "labelsTr").iterdir()):
        case = label.name.removesuffix(".nii.gz")
        images = sorted(str(p) for p in (raw / "imagesTr").glob(f"{case}_*.nii.gz"))
        preprocessor.run_case_save(str(out / case), images, str(label), manager, config, dataset_json)


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


def teacher_spec(kind):
    previous = "teacher" if kind == "cascade" else None
    name = CONFIGURATIONS.get(kind, CONFIGURATION)
    return TeacherSpec(dataset="998", configuration=name, folds=(0,), previous=previous, **TEACHERS.get(kind, {}))


def recipe_for(kind):
    return dataclasses.replace(RECIPE, encoding="sigmoid_u8") if "regions" in kind else RECIPE


def nnunet_predictor(folder, checkpoint="checkpoint_final.pth"):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), checkpoint)
    return predictor


def nnunet_soft_label(world, spec, regions, case):
    """Of nnU-Net's own data set, one-hot encoding and predictor; where its half-precision sums are good."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    folder = world / "results" / DATASET / f"{spec.trainer}__{spec.plans}__{spec.configuration}"
    predictor = nnunet_predictor(folder, spec.checkpoint)
    cases = str(world / "preprocessed" / DATASET / predictor.configuration_manager.data_identifier)
    previous = str(previous_folder(world)) if spec.previous else None
    image, _, seg_prev, _ = infer_dataset_class(cases)(cases, None, previous).load_case(case)
    image = image[:]
    if spec.previous:
        image = np.vstack([image, convert_labelmap_to_one_hot(seg_prev[:], [1, 2], image.dtype)])
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float() / RECIPE.temperature
    return (logits.sigmoid() if regions else logits.softmax(0)).numpy()


KINDS = [
    "2d", "anisotropic", "regions", "ignore", "ignore_regions", "cascade", "lowres", "channels", "resenc", "resenc_l",
    "named", "old", "old_resenc", "inherits",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_cache_train_export_predict(world, tmp_path, monkeypatch, kind):
    if kind == "named":  # a trainer that only nnUNet_extTrainer knows
        own = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n\n\n"
        (tmp_path / "trainers").mkdir()
        (tmp_path / "trainers/own.py").write_text(own + "class TrainerOfOurOwn(nnUNetTrainer):\n    pass\n")
        monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
        shutil.rmtree(world / "results" / DATASET)  # no other teacher to fall back on
    with contextlib.redirect_stdout(io.StringIO()):
        _whole_way(world, tmp_path, kind)


def _whole_way(world, tmp_path, kind):
    prepare(world, kind)
    spec, recipe = teacher_spec(kind), recipe_for(kind)
    source, factory, root = open_teacher(spec, recipe)
    cache = build_cache(prepare_job(source, factory, recipe, root, command="rebuild"))
    reader = SoftLabelReader(cache.path)
    case = source.case_ids[0]
    got = reader.to_probabilities(reader.read_case(case))
    expected = nnunet_soft_label(world, spec, "regions" in kind, case)
    assert got.shape == expected.shape
    assert expected.std() > 0.02
    # nnU-Net sums tiles in half precision: far off at a few voxels in the corners of tiles
    assert np.quantile(np.abs(got - expected), 0.95) < 0.006

    seen = []
    distill = dataclasses.replace(SHORT, soft_on_ignored="ignore" not in kind)
    job = TrainingJob(
        teacher=spec, student=StudentSpec(r=2), distill=distill, cache=recipe, fold=0, device="cpu", threads=1
    )
    folder = train_student(job, validate=kind == "lowres", progress=seen.append)
    assert all(s.soft > 0 and np.isfinite(s.hard) for s in seen)
    if kind == "lowres":  # what a second stage would take as --previous
        assert sorted(p.name for p in (folder.parent / "predicted_next_stage" / CASCADE).iterdir()) == [
            f"{c}.b2nd" for c in sorted(split_of(source.folder.parent, source.case_ids, 0)["val"])
        ]

    bundle = tmp_path / "bundle"
    export_bundle(folder.parent, 0, bundle)
    assert load_bundle_spec(bundle).previous_labels == ((1, 2) if kind == "cascade" else ())
    images = world / "raw" / DATASET / "imagesTs"
    previous = world / "raw" / DATASET / "labelsTs" if kind == "cascade" else None
    Predictor.load(bundle, "onnxruntime").predict_files(images, tmp_path / "ours", previous=previous)
    cases = sorted(p.name.removesuffix("_0000.nii.gz") for p in images.glob("*_0000.nii.gz"))
    (tmp_path / "theirs").mkdir()
    nnunet_predictor(folder.parent).predict_from_files_sequential(
        [sorted(str(p) for p in images.glob(f"{c}_*.nii.gz")) for c in cases],
        [str(tmp_path / "theirs" / c) for c in cases],
        folder_with_segs_from_prev_stage=str(previous) if previous else None,
    )
    for case in cases:
        ours, theirs = (read(tmp_path / who / f"{case}.nii.gz") for who in ("ours", "theirs"))
        assert len(np.unique(theirs)) > 1
        assert (ours == theirs).mean() >= 0.9999


def test_blocks_of_a_resenc_l(world):
    prepare(world, "resenc_l")
    folder = teacher_folder(teacher_spec("resenc_l"))
    teacher, dataset_json = (json.loads((folder / n).read_text()) for n in ("plans.json", "dataset.json"))
    expected = {
        "keep": [1, 3, 4, 6, 6, 6],
        "reduce": [1, 2, 2, 3, 3, 3],
        "increase": [2, 5, 6, 9, 9, 9],
        # n (f / (2 g))^2 / sqrt(2), f 16 16 16 20 20 20, g 8 8 8 10 10 10: 0.7, 2.1, 2.8, 4.2
        "adaptive": [1, 2, 3, 4, 4, 4],
    }
    for strategy, blocks in expected.items():
        plans = student_plans(teacher, CONFIGURATION, StudentSpec(r=2, blocks=strategy, family="width"), SHORT)
        network = build_network(model_of(plans, CONFIGURATION, dataset_json))
        assert type(network).__name__ == "ResidualEncoderUNet"
        assert [len(stage.blocks) for stage in network.encoder.stages] == blocks
        assert plans["configurations"][CONFIGURATION]["data_identifier"] == "nnUNetPlans_3d_fullres"


def read(file: Path):
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


class TestCascade:
    def test_other_predictions_make_another_cache(self, world):
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        prepare(world, "cascade")
        cases, _, _ = open_teacher(teacher_spec("cascade"), RECIPE)
        before = cases.digest("tiny_00")
        previous = np.asarray(cases._dataset.load_case("tiny_00")[2][:]).copy()
        previous[0, 0, 0] = 1 - previous[0, 0, 0]
        (previous_folder(world) / "tiny_00.b2nd").unlink()
        nnUNetDatasetBlosc2.save_seg(previous, str(previous_folder(world) / "tiny_00"))
        again, _, _ = open_teacher(teacher_spec("cascade"), RECIPE)
        assert again.digest("tiny_00") != before
        assert again.digest("tiny_01") == cases.digest("tiny_01")

    def test_everything_moves_together(self):
        """Image, label, previous one-hot and soft label of one ball stay that ball under rotation, scaling, mirrors."""
        from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
        from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
        from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

        from fastnnunet.nnunet.augment.soft_samples import SampleTransforms

        grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
        centre = np.array([8, 10, 14])[:, None, None, None]
        ball = torch.from_numpy((((grid - centre) ** 2).sum(0) < 36).astype(np.float32))[None]
        spatial = SpatialTransform(
            (20, 20, 20), 0, False, p_rotation=1, rotation=(-0.5, 0.5), p_scaling=1, scaling=(0.8, 1.2), **NNUNETS
        )
        one_hot = MoveSegAsOneHotToDataTransform(1, [1, 2], remove_channel_from_source=True)
        split = SampleTransforms(ComposeTransforms([spatial, MirrorTransform((0, 1, 2)), one_hot]))
        np.random.seed(3)
        torch.manual_seed(3)
        for _ in range(4):
            out = transformed(split, ball, torch.cat([ball, 2 * ball]).to(torch.int16), ball)
            (image, is_1, is_2), (label, soft) = out
            torch.testing.assert_close(soft[0].clamp(min=0), image)  # -1 beyond the volume
            assert label.shape == (1, 20, 20, 20)
            label = label.clamp(min=0)  # -1 beyond the volume
            assert not is_1.any()
            assert is_2.equal(label[0].float())
            inside = image > 0.5
            assert inside.sum() > 100
            assert (inside != is_2.bool()).sum() < 0.1 * inside.sum()

    def test_refusals(self, world):
        prepare(world, "cascade")
        spec = teacher_spec("cascade")
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

        from fastnnunet.nnunet.augment.soft_samples import NO_OPINION
        from fastnnunet.nnunet.trainer.step_losses import valid_mask

        labels = SimpleNamespace(has_ignore_label=True, has_regions=False, ignore_label=3)
        target = torch.full((1, 1, 2, 2, 2), 3)
        target[:, :, 0] = 1
        soft = torch.full((1, 2, 2, 2, 2), 0.3)
        soft[..., 0] = NO_OPINION
        mask = valid_mask([target, target[..., :1]], soft, labels, on_ignored=soft_on_ignored)
        return mask, target, soft[:, :1] == 0.3

    def test_mask(self):
        mask, target, opinion = self.mask(False)
        assert mask.equal((target == 1) & opinion)
        mask, _, opinion = self.mask(True)
        assert mask.equal(opinion)
