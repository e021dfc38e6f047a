"""The benchmark scripts at toy size: that they run, and that their figures are right where the answer is known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnnunet.distill.train import train_student
from fastnnunet.export.bundle import export_bundle
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec
from pipelines.measure import beside, head
from pipelines.measure.cache import bit_flips, cache_layout, kills, reader_speed, soft_maps, stage1_speed
from pipelines.measure.predict import (
    agreement,
    file_to_file,
    large_volume,
    many_classes_prediction,
    one_pass,
    pre_post_speed,
    stock_agreement,
)
from pipelines.measure.train import (
    augmentation_speed,
    loader_speed,
    norm_speed,
    online_distillation,
    orphans,
    step_speed,
    student_table,
)
from tests import test_distill_seeds
from tests.bundles import Toy, make_toy_model, smooth_noise, write_image
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


def test_pre_post_speed():
    record = pre_post_speed.measure(None, shape=(24, 40, 44), few=3, many=7, repeats=1, threads=1)
    assert record["largest_difference_of_range"] < 1e-6
    assert record["label_agreement"] > 0.999
    assert record["grid"].startswith("(16, 21, 23)")
    assert all(seconds > 0 for stage in record["median_s"].values() for seconds in stage.values())
    assert record["peak_bytes"]["7"] > record["logits_bytes"]["7"] == 2 * 7 * 16 * 21 * 23


def test_large_volume():
    record = large_volume.measure(
        None, shape=(24, 50, 44), patch=(16, 16, 16), features=(8, 16, 32), precisions=("fp32",), repeats=1, threads=1
    )
    assert record["patches"] == 1 * 3 * 2  # of a grid of 16 x 27 x 23
    assert record["parameters"]["student"] < record["parameters"]["teacher"]
    assert min(record["label_shares"]) > 0.01
    fold, ours = record["nnunetv2"], record["fastnnunet"]["openvino fp32"]
    rest = fold["single_fold_s"] - fold["stages_s"]["infer_s"]
    assert fold["ensemble_s"] == pytest.approx(rest + 40 * fold["stages_s"]["infer_s"])
    assert ours["agreement_with_nnunetv2"] > 0.999
    assert ours["times_faster_than_ensemble"] > ours["times_faster_than_single_fold"] > 0


def test_one_pass():
    record = one_pass.measure(
        None,
        shape=(24, 50, 44),
        patch=(16, 16, 16),
        features=(8, 16, 32),
        backend="onnxruntime",
        precisions=("fp32",),
        passes=(1,),
        rounds=1,
        threads=1,
    )
    arm = record["arms"]["one pass, batch norm, fp32"]
    assert arm["agreement_with_whole"] > 0.999
    assert arm["described"]["way"] == "one pass"
    assert arm["times_faster_than_window"] > 0 < arm["peak_gib"]
    assert record["arms"]["window, batch norm, fp32"]["described"]["way"] == "window"
    assert record["halo_is"] == "exact"
    nnunet = record["nnunetv2"]
    assert nnunet["single_fold_s"] == pytest.approx(6 * nnunet["pass_s"])  # a grid of 16 x 27 x 23
    assert sorted(nnunet["all_pass_s"])[1] == nnunet["pass_s"]
    assert arm["times_faster_than_ensemble"] == pytest.approx(40 * nnunet["single_fold_s"] / arm["seconds"])


def test_file_to_file(tmp_path):
    bundle = make_toy_model(Toy(), tmp_path / "toy").bundle
    write_image(smooth_noise((12, 25, 20), 0), tmp_path / "in" / "a_0000.nii.gz")
    record = file_to_file.measure(bundle, tmp_path / "in", None, rounds=1, repeats=2, shape=(24, 40, 44))
    assert set(record["cold"]) == set(record["warm"]) == {"openvino bf16", "openvino fp32", "onnxruntime fp32"}
    assert all(arm["median_s"] >= arm["least_s"] > 0 for part in ("cold", "warm") for arm in record[part].values())
    warm = record["warm"]
    assert warm["openvino fp32"]["labels_crc32"] == warm["onnxruntime fp32"]["labels_crc32"] != 0
    assert record["volume"]["image_bytes"] > record["volume"]["label_bytes"] > 352
    assert record["volume"]["write"]["processor_s"] >= 0


def test_reader_speed():
    record = reader_speed.measure(None, edge=40, patch=16, patches=3, chunk_zyx=(8, 8, 8), level=1)
    assert record["stored_shape"] == [3, 40, 40, 40]
    assert set(record["median_ms"]) == set(record["patches_that_differ"])
    assert len(record["median_ms"]) == 5
    assert not any(record["patches_that_differ"].values())
    assert all(ms > 0 for ms in record["median_ms"].values())


def test_cache_layout():
    volumes = [
        cache_layout.Volume(
            classes=classes,
            edge=24,
            patch=16,
            chunk_edges=(8, 24),
            codecs=(("zstd", 3), ("lz4", 9)),
            channels=(None, 2),
        )
        for classes in (3, 7)
    ]
    record = cache_layout.measure(None, tuple(volumes), temperatures=(1.0, 3.0), patches=2)
    assert [(t["classes"], t["temperature"]) for t in record["tables"]] == [(3, 1.0), (3, 3.0), (7, 1.0), (7, 3.0)]
    for table in record["tables"]:
        *rows, nnunet = table["rows"]
        assert len(rows) == 8
        assert nnunet["compressor"].startswith("blosc2")
        smallest = min(rows, key=lambda row: row["bytes_per_voxel"])
        fastest = min(rows, key=lambda row: row["patch_ms"])
        assert smallest["pareto"] or smallest["patch_ms"] > fastest["patch_ms"]
        assert any(row["pareto"] for row in rows)
        assert all(0 < row["bytes_per_voxel"] < table["classes"] for row in rows)
    assert "T = 3" in cache_layout.table_text(record["tables"][1])


def test_maps_for_benchmarks():
    maps, origin = soft_maps.load_maps(None)
    assert origin.startswith("generated")
    tiled = soft_maps.mosaic(maps, 4, 64)
    assert tiled.shape == (4, 64, 64, 64)
    np.testing.assert_array_equal(tiled[:3, :32, :32, :32], maps[0])
    np.testing.assert_array_equal(tiled[:3, :32, :32, 32:], maps[0][..., ::-1])
    many = soft_maps.lattice(maps, 8, 64)  # four cells of 32^3, two structures each
    np.testing.assert_array_equal(many[:3, :32, :32, :32], maps[0])
    np.testing.assert_array_equal(many[[0, 3, 4], :32, :32, 32:], maps[1])
    np.testing.assert_array_equal(many[[0, 7], :32, 32:, 32:], maps[3][:2])
    assert many[7, 63, 63, 63] == maps[3][1, 31, 31, 31] - 32 * soft_maps.DECAY


def test_bit_flips():
    record = bit_flips.measure(40)
    assert record["detected"] == record["flips"] == 40
    for row in record["compressors"].values():
        assert row["same_digests_after_rebuilding_the_case"]
        assert len(row["other_damage_detected"]) == 6
        assert all(row["other_damage_detected"].values())


def test_an_intact_cache_is_not_called_damaged(tmp_path):
    cache = bit_flips.make_cache(tmp_path / "root", "zstd")
    assert not bit_flips.is_noticed(cache, "first")
    assert not bit_flips.is_noticed(cache, "first", group=True)


def test_kills():
    record = kills.measure(2)
    assert record["kills"] == 2
    assert record["identical"] == record["without_leftovers"] == record["rounds"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_orphans(world):
    record = orphans.measure(1, world)
    assert record["nothing_alive_after_5_s"] == record["trials"] == 1
    assert record["each"][0]["processes"] > 1


def test_step_speed(world):
    """The teachers' folder is linked to, and nothing is written beside it."""
    test_distill_seeds.build()
    before = sorted(p.relative_to(world) for p in world.rglob("*"))
    record = step_speed.measure(test_distill_seeds.make_job(alpha=0.3), (2, 3), rounds=1, steps=2, loss_cases=1)
    assert record["loss"]["largest_gradient_difference"] <= record["loss"]["temperature_times_eps"]
    assert record["loss"]["largest_loss_difference"] < 0.05 * record["loss"]["cases"][0]["online"]
    new = {p.relative_to(world) for p in world.rglob("*")} - set(before)
    assert {p.name for p in new} <= {"splits_final.json"}, "nnU-Net's own split, and nothing in nnUNet_results"
    median = record["median_s"]
    assert set(median) == {"bare_r2", "bare_r3", "soft", "hard", "online", "online_as_cached", "together"}
    assert all(len(seconds) == 2 for seconds in record["seconds"].values())
    assert median["together"] > median["bare_r2"] > 0
    assert record["online_over_soft"] == median["online"] / median["soft"]


def test_norm_speed(world):
    before = sorted(p.relative_to(world) for p in (world / "results").rglob("*"))
    record = norm_speed.measure(test_distill_seeds.make_job(), steps=3)
    assert sorted(p.relative_to(world) for p in (world / "results").rglob("*")) == before
    assert record["batch"][2:] == [16, 16, 16]
    for name in ("instance", "batch", "batch_frozen"):
        assert len(record["seconds"][name]) == 3
        assert record["ratio"][name] == record["median_s"]["instance"] / record["median_s"][name]
        assert min(record["median_s"][name], record["median_cpu_s"][name]) > 0
    operators = {name: set(found) for name, found in record["profile_ms"].items()}
    assert all("aten::convolution_backward" in found for found in operators.values())


def test_loader_speed(world):
    """All three loaders make the same samples, and nothing is written beside the teacher."""
    test_distill_seeds.build()
    before = sorted(p.relative_to(world) for p in (world / "results").rglob("*"))
    record = loader_speed.measure(test_distill_seeds.make_job(alpha=0.3), rounds=2, batches=1)
    assert sorted(p.relative_to(world) for p in (world / "results").rglob("*")) == before
    assert record["largest_difference_of_images"] < 1e-4
    assert record["soft_over_nnunet"] == record["median_s"]["soft"] / record["median_s"]["nnunet"]
    assert all(len(seconds) == 2 for seconds in record["seconds"].values())


def test_augmentation_speed(world):
    """Without a cache; the teachers' folder is linked to, and nothing is written beside it."""
    before = sorted(p.relative_to(world) for p in (world / "results").rglob("*"))
    record = augmentation_speed.measure(test_distill_seeds.make_job(), rounds=1, steps=2)
    assert sorted(p.relative_to(world) for p in (world / "results").rglob("*")) == before
    arms = {"loader", "loader_loop", "device", "device_loop", "device_alone", "bare"}
    assert record["samples_per_s"].keys() == record["seconds"].keys() == arms
    assert all(len(seconds) == 2 for seconds in record["seconds"].values())
    each_s = sum(record["seconds"]["device"]) / 2
    assert record["samples_per_s"]["device"] == pytest.approx(record["batch_size"] / each_s)
    assert record["device_over_loader"] == record["samples_per_s"]["device"] / record["samples_per_s"]["loader"]


def test_students_taught_online_in_the_table(world, tmp_path, monkeypatch):
    """One student with teachers in every step, one without soft labels; both in one table."""
    teacher = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
    folders = {}
    for name, alpha in (("online", 0.3), ("control", 0.0)):
        root = tmp_path / name
        (root / DATASET).mkdir(parents=True)
        (root / DATASET / teacher.name).symlink_to(teacher)
        monkeypatch.setenv("nnUNet_results", str(root))
        job = test_distill_seeds.make_job(alpha, epochs=1)
        if alpha:
            folders[name] = online_distillation.train_online(job)
        else:
            folders[name] = train_student(job, validate=False)
    assert set(student_table.find_students([tmp_path / "online", tmp_path / "control"])) == set(folders.values())

    raw = world / "raw" / DATASET
    asked = (teacher, raw / "imagesTs", raw / "labelsTs", (0,), 1, 1)
    rows = student_table.measure([tmp_path / "online", tmp_path / "control"], *asked)
    first = student_table.measure([tmp_path / "control"], *asked)
    extended = student_table.measure([tmp_path / "online"], *asked, earlier=first)
    ((control, row),) = first["table"].items()
    assert extended["table"][control] == row
    assert {k: r["dice"] for k, r in extended["table"].items()} == {k: r["dice"] for k, r in rows["table"].items()}
    assert (extended["ensemble"], extended["created"]) == (first["ensemble"], first["created"])
    assert 0 <= rows["ensemble"]["mean_dice"] <= 1
    table = {row["soft_loss"]: row for row in rows["table"].values()}
    assert set(table) == {"kl_dice T=1 every resolution online", "none"}
    for name, row in table.items():
        assert (row["r"], row["family"], row["seeds"]) == (2, "lite", [5])
        assert row["steps"] == job.distill.iterations_per_epoch  # of its one epoch
        assert row["points_below_ensemble"] == pytest.approx(100 * (rows["ensemble"]["mean_dice"] - row["dice"][0]))
        assert row["parameters"] == table["none"]["parameters"], name
        assert row["against_control"] is None, "one seed says nothing about a difference"
    weights = [load_checkpoint(f / "checkpoint_final.pth")["network_weights"] for f in folders.values()]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0]), "the soft loss trains"


def test_agreement(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNNUNET_CACHE_HOME", str(tmp_path))
    ct = write_image(smooth_noise((20, 24, 28), 3, mean=-150, spread=300), tmp_path / "ct.nii.gz", (1.5, 1.5, 1.5))
    record = agreement.measure(ct, backends=("onnxruntime",), kinds=("cascade", "regions"))
    assert set(record["rows"]) == {f"{k}, {arm}" for k in ("cascade", "regions") for arm in ("ensemble", "one fold")}
    for row in record["rows"].values():
        assert row["agreement"]["onnxruntime"]["voxels"] == 20 * 24 * 28
        assert row["agreement"]["onnxruntime"]["agreement"] >= record["least_agreement"] > 0.999
        assert max(row["label_shares"]) < 0.97, "there is something to agree on"


def test_many_classes_prediction():
    record = many_classes_prediction.measure((40, 60, 62), 20, (16, 16, 16), threads=1, compare=True)
    assert record["grid"].startswith("(27, 32, 33)")
    assert record["labels_equal"]
    assert record["classes_in_the_label_map"] > 5
    assert record["nnunetv2_bytes"]["total"] == 20 * (2 * 27 * 32 * 33 + 2 * 40 * 60 * 62 + 4 * 16**3)
    assert record["peak_bytes"] > record["sums_of_the_window_bytes"]
    assert "1 case(s) predicted with onnxruntime" in record["printed"]


def test_a_record_beside_that_of_another_commit():
    records = [{"versions": {"a": 1}, "median_s": {"soft": s, "fine": True}, "runs": [s], "cases": 2} for s in (3, 2)]
    here, before = (dict(beside.figures(record)) for record in records)
    assert here == {"median_s.soft": 3.0, "cases": 2.0}
    table = beside.compare([here, here, {"median_s.soft": 6.0}], [before, {"median_s.soft": 1.0}, before])
    assert table == {"median_s.soft": {"here": 3.0, "before": 2.0, "ratio": 3.0, "ratios": [1.5, 3.0, 3.0]}}


def test_a_script_that_fails_beside_another_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="No module named"):
        beside.run(Path(sys.executable), tmp_path, "no_such_script", [])


def test_a_record_names_code_and_machine(tmp_path, capsys):
    head.put({**head.header("nothing", packages={"numpy": np.__version__}), "figure": 1}, tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["what"] == "nothing"
    assert record["versions"]["numpy"] == np.__version__
    assert record["hardware"]["cores"] >= 1
    assert str(tmp_path / "r.json") in capsys.readouterr().out
    assert head.commit(tmp_path) is None
