"""The benchmark scripts at toy size: that they run, and that their figures are right where the answer is known."""

from fastnnunet.export.bundle import export_bundle
from tests.benchmarks import stock_agreement
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
