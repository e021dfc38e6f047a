"""The teacher against nnU-Net's own predictor, and what it refuses."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
import torch

from fastnnunet.errors import CorruptError, MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.checkpoint import load_checkpoint, weights_digest
from fastnnunet.nnunet.dataset import open_teacher
from fastnnunet.nnunet.paths import resolve_dataset
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec
from tests.tiny import DATASET

SPEC = TeacherSpec(dataset="998")
FP32 = CacheSpec(precision="fp32")


def nnunet_logits(folder, image_CZYX, folds, mirroring=True):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
        return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image_CZYX)).float().numpy()


@pytest.mark.parametrize(("folds", "mirroring"), [((0, 1, 2, 3, 4), True), ((2,), False)])
def test_logits_equal_nnunets(world, folds, mirroring):
    cases, teacher, _ = open_teacher(SPEC, dataclasses.replace(FP32, mirroring=mirroring))
    image_CZYX = cases.image_CZYX(cases.case_ids[0])
    got = teacher.load(threads=1).logits(image_CZYX, folds)
    np.testing.assert_array_equal(got, nnunet_logits(teacher.folder, image_CZYX, folds, mirroring))


def test_bf16_keeps_labels(world):
    cases, teacher, _ = open_teacher(SPEC, CacheSpec(precision="bf16"))
    image_CZYX = cases.image_CZYX(cases.case_ids[0])
    got = teacher.load(threads=1).logits(image_CZYX, teacher.folds)
    expected = nnunet_logits(teacher.folder, image_CZYX, teacher.folds)
    assert got.dtype == np.float32
    assert not np.array_equal(got, expected), "bf16 was asked for and fp32 was run"
    assert (got.argmax(0) == expected.argmax(0)).mean() > 0.98


def test_identity_follows_the_weights_and_nothing_else(world):
    _, teacher, _ = open_teacher(SPEC, FP32)
    before = teacher.identity()
    path = teacher.folder / "fold_3" / "checkpoint_final.pth"
    checkpoint = load_checkpoint(path)
    checkpoint["logging"] = {"more": [1.0]}
    torch.save(checkpoint, path)
    assert teacher.identity() == before
    checkpoint["network_weights"]["decoder.seg_layers.0.bias"][0] += 1e-3
    torch.save(checkpoint, path)
    after = teacher.identity()
    assert [f for f in "01234" if after["checkpoints"][f] != before["checkpoints"][f]] == ["3"]


def test_weights_digest_sees_shape_and_dtype():
    zeros = torch.zeros(4)
    variants = [{"w": zeros}, {"w": zeros.view(2, 2)}, {"w": zeros.half()}, {"v": zeros}]
    assert len({weights_digest(v) for v in variants}) == len(variants)


def test_unseen_folds_follow_nnunets_split(world):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases, teacher, _ = open_teacher(SPEC, FP32)
    for fold, split in enumerate(generate_crossval_split(sorted(cases.case_ids), seed=12345, n_splits=5)):
        for case in split["val"]:
            assert teacher.unseen_folds(case) == (fold,)


def test_case_digest_is_of_the_values(world):
    cases, _, _ = open_teacher(SPEC, FP32)
    first, second = cases.case_ids[:2]
    assert cases.digest(first) == cases.digest(first) != cases.digest(second)


class TestRefusals:
    def test_unknown_dataset(self, world):
        with pytest.raises(NotFoundError, match=f"(?s)unknown data set '77'.*{DATASET}"):
            resolve_dataset("77")

    def test_missing_fold(self, world):
        (world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/fold_2/checkpoint_final.pth").unlink()
        with pytest.raises(NotFoundError, match=r"(?s)fold\(s\) 2 have no.*0, 1, 3, 4"):
            open_teacher(SPEC, FP32)

    def test_unset_variable(self, world, monkeypatch):
        monkeypatch.delenv("nnUNet_results")
        with pytest.raises(NotFoundError, match="nnUNet_results is not set"):
            open_teacher(SPEC, FP32)

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
    def test_truncated_checkpoint(self, world, keep):
        path = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/fold_1/checkpoint_final.pth"
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        _, teacher, _ = open_teacher(SPEC, FP32)
        with pytest.raises(CorruptError, match=r"(?s)fold_1/checkpoint_final\.pth cannot be read"):
            teacher.load(threads=1)

    def test_checkpoint_that_runs_code(self, tmp_path):
        import pickle

        class Evil:
            def __reduce__(self):
                return print, ("ran",)

        torch.save(
            {"network_weights": Evil(), "init_args": {}, "trainer_name": ""}, tmp_path / "c.pth", pickle_module=pickle
        )
        with pytest.raises(CorruptError):
            load_checkpoint(tmp_path / "c.pth")

    def test_plans_that_do_not_fit(self, world):
        path = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/plans.json"
        path.write_text(path.read_text().replace("[16, 32, 32]", "[16, 24, 32]"))
        _, teacher, _ = open_teacher(SPEC, FP32)
        with pytest.raises(MismatchError, match="do not fit the checkpoint"):
            teacher.load(threads=1)

    def test_data_preprocessed_with_other_plans(self, world):
        path = world / "preprocessed" / DATASET / "nnUNetPlans.json"
        path.write_text(path.read_text().replace("CTNormalization", "ZScoreNormalization"))
        with pytest.raises(MismatchError, match="normalization_schemes"):
            open_teacher(SPEC, FP32)

    def test_out_of_fold_needs_a_fold_for_every_case(self, world):
        with pytest.raises(MismatchError, match="out_of_fold"):
            open_teacher(TeacherSpec(dataset="998", folds=(0,)), CacheSpec(policy="out_of_fold"))

    def test_no_folds(self):
        with pytest.raises(SpecError, match="folds"):
            TeacherSpec(dataset="998", folds=())

    def test_cascade(self, world):
        import json

        path = world / "results" / DATASET / "nnUNetTrainer__nnUNetPlans__3d_fullres/plans.json"
        plans = json.loads(path.read_text())
        plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
        path.write_text(json.dumps(plans))
        with pytest.raises(MismatchError, match="cascades cannot be cached yet"):
            open_teacher(SPEC, FP32)


def test_one_timed_patch_takes_time(world):
    _, teacher, _ = open_teacher(SPEC, FP32)
    assert teacher.load(threads=1).seconds_per_patch() > 0
