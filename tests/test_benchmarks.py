"""The benchmark scripts at toy size: that they run, and that their figures are right where the answer is known."""

from fastnnunet.export.bundle import export_bundle
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec
from tests.benchmarks import stage1_speed, stock_agreement
from tests.tiny import CONFIGURATION, DATASET


def test_stock_agreement(world, tmp_path):
    model = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    images = world / "raw" / DATASET / "imagesTs"
    export_bundle(model, 0, tmp_path / "same")
    record = stock_agreement.measure("998", CONFIGURATION, "nnUNetPlans", "0", tmp_path / "same", images)
    assert set(record["agreement"]) >= {"onnxruntime", "torch"}
    for row in record["agreement"].values():
        assert row["cases"] == 2
        assert row["agreement"] >= 0.9999
    export_bundle(model, 1, tmp_path / "other")
    other = stock_agreement.measure(
        "998", CONFIGURATION, "nnUNetPlans", "0", tmp_path / "other", images, backends=["onnxruntime"]
    )
    assert other["agreement"]["onnxruntime"]["agreement"] < 0.9, "another fold must not agree"


def test_stage1_speed(world):
    record = stage1_speed.measure(
        TeacherSpec(dataset="998", folds=(0, 1)), CacheSpec(precision="fp32", engine="torch"), 2, threads=1
    )
    assert record["cases"] == len(record["per_case"]) == 2
    assert record["argmax_equal"] > 0.99
    assert 0 < record["mean_abs_difference"] < 1e-3
    assert record["nnunet_median_s"] > 0 < record["ours_median_s"]
    assert record["inference"] == {
        "mirroring": True,
        "step_size": 0.5,
        "pooling": "logits",
        "precision": "fp32",
        "engine": "torch",
    }
