"""A locator from its training to a bundle: coarse cases by hand, nnU-Net's own predictor, held-out cases, refusals."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastnnunet.api import export, train_locator
from fastnnunet.api.export import Exported
from fastnnunet.errors import MismatchError, NotFoundError, SpecError
from fastnnunet.nnunet.files.cases import PreprocessedCases
from fastnnunet.nnunet.files.model import model_of
from fastnnunet.nnunet.student.coarse import check_locatable, coarse_factor, coarse_plans, make_coarse_cases
from fastnnunet.runtime.predict import Predictor
from fastnnunet.specs.bundle import load_bundle_spec
from fastnnunet.specs.teacher import TeacherSpec
from tests.bundles import Toy, _dataset_json, _plans
from tests.one_pass_models import whole
from tests.teachers import nnunet_predictor
from tests.test_cli import refused, run
from tests.tiny import CONFIGURATION, DATASET, world_environment

TEACHER = TeacherSpec(dataset=DATASET, configuration=CONFIGURATION, folds=(0,))
STEPS = {"steps": 50, "val_iterations_per_epoch": 1}
STOCK = f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"


@dataclass(frozen=True)
class Made:
    locator: Path  # model folder
    model: Path
    exported: Exported
    fine: PreprocessedCases
    coarse: Path


@pytest.fixture(scope="module")
def made(pristine_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A locator of fold 0 and a bundle of the (untrained) teacher's fold 0 with it."""
    root = tmp_path_factory.mktemp("locator") / "nnunet"
    shutil.copytree(pristine_world, root)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**world_environment(root), "nnUNet_n_proc_DA": "0"}.items():
            patch.setenv(name, value)
        trained = train_locator(TEACHER, 0, STEPS, threads=1, device="cpu")
        model = root / "results" / DATASET / STOCK
        out = root / "bundle"
        exported = export(model, 0, out, locator=trained.folder.parent)
        base = root / "preprocessed" / DATASET
        (coarse,) = base.glob(f"nnUNetPlans_coarse*_{CONFIGURATION}")
        yield Made(
            trained.folder.parent, model, exported, PreprocessedCases(base / f"nnUNetPlans_{CONFIGURATION}"), coarse
        )


def held_out(made: Made) -> list[str]:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    return sorted(generate_crossval_split(sorted(made.fine.case_ids), seed=12345, n_splits=5)[0]["val"])


def by_hand(image: np.ndarray, factor: tuple[int, ...], reduce: Any) -> np.ndarray:
    shape = [math.ceil(n / f) for n, f in zip(image.shape, factor, strict=True)]
    out = np.empty(shape, np.float64)
    for place in np.ndindex(*shape):
        out[place] = reduce(image[tuple(slice(i * f, (i + 1) * f) for i, f in zip(place, factor, strict=True))])
    return out


class TestCoarseCases:
    def test_are_blocks_of_the_preprocessed_cases(self, made: Made) -> None:
        factor = load_bundle_spec(made.exported.bundle).locator.factor
        coarse = PreprocessedCases(made.coarse)
        assert coarse.case_ids == made.fine.case_ids
        for case in coarse.case_ids[:2]:
            image, label = made.fine.image_CZYX(case)[0], made.fine.label_ZYX(case)
            np.testing.assert_allclose(coarse.image_CZYX(case)[0], by_hand(image, factor, np.mean), atol=1e-5)
            np.testing.assert_array_equal(coarse.label_ZYX(case), by_hand(label > 0, factor, np.any))
            places = coarse.load(case)[3]["class_locations"][1]
            assert set(map(tuple, places)) == {(0, *place) for place in np.argwhere(coarse.label_ZYX(case))}

    def test_are_made_once_and_anew_where_the_cases_changed(self, world: Path) -> None:
        base = world / "preprocessed" / DATASET
        plans, dataset_json = (json.loads((base / n).read_text()) for n in ("nnUNetPlans.json", "dataset.json"))
        model = model_of(plans, CONFIGURATION, dataset_json)
        folder = make_coarse_cases(model, (2, 2, 2))
        first = (folder / "tiny_00.pkl").stat().st_mtime_ns
        assert make_coarse_cases(model, (2, 2, 2)) == folder
        assert (folder / "tiny_00.pkl").stat().st_mtime_ns == first
        source = base / f"nnUNetPlans_{CONFIGURATION}"
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            shutil.copy(source / f"tiny_01{ending}", source / f"tiny_00{ending}")
        make_coarse_cases(model, (2, 2, 2))
        coarse = PreprocessedCases(folder)
        np.testing.assert_array_equal(coarse.image_CZYX("tiny_00"), coarse.image_CZYX("tiny_01"))

    def test_factor(self) -> None:
        """Alike in mm, and a median image of at most 2^16 voxels."""
        plans = _plans(Toy(spacing=(3.0, 1.0, 1.0)))
        config = plans["configurations"]["3d_toy"]
        for median, expected in (((30, 60, 60), (1, 2, 2)), ((100, 273, 273), (3, 8, 8)), ((9, 9, 9), (1, 2, 2))):
            config["median_image_size_in_voxels"] = list(median)
            model = model_of(plans, "3d_toy", _dataset_json(Toy()))
            assert coarse_factor(model) == expected  # of 7 mm, (2, 7, 7), the second would have 50 x 39 x 39 voxels
            assert math.prod(math.ceil(n / f) for n, f in zip(median, expected, strict=True)) <= 2**16
            coarse = coarse_plans(model, expected)["configurations"]["3d_toy"]
            assert coarse["spacing"] == [3.0 * expected[0], 1.0 * expected[1], 1.0 * expected[2]]
            strides = np.prod(coarse["architecture"]["arch_kwargs"]["strides"], axis=0)
            for n, f, size, stride in zip(median, expected, coarse["patch_size"], strides, strict=True):
                assert size % stride == 0
                assert 0 <= size - math.ceil(n / f) < stride


class TestBundle:
    def test_margin(self, made: Made) -> None:
        """nnU-Net's own network on the whole of the held-out coarse images is the oracle of what the locator sees."""
        spec = load_bundle_spec(made.exported.bundle)
        noted, factor = spec.provenance["locator"]["margin"], spec.locator.factor
        assert noted["cases"] == held_out(made)
        assert noted["held_out"]
        assert noted["nothing_seen"] == 0
        assert noted["safety_mm"] == 2 * max(s * f for s, f in zip(spec.spacing_mm, factor, strict=True))
        stock, coarse = nnunet_predictor(made.locator, (0,)), PreprocessedCases(made.coarse)
        stock.network.load_state_dict(stock.list_of_parameters[0])
        multiples = spec.locator.one_pass.multiples
        needed = 0.0
        for case in held_out(made):
            logits = whole(stock.network.eval(), coarse.image_CZYX(case), spec.locator.patch_size, multiples)
            seen, truth = np.argwhere(logits[1] > logits[0]), np.argwhere(made.fine.label_ZYX(case) > 0)
            for axis, (f, s) in enumerate(zip(factor, spec.spacing_mm, strict=True)):
                low, high = seen[:, axis].min() * f, (seen[:, axis].max() + 1) * f
                needed = max(needed, (low - truth[:, axis].min()) * s, (truth[:, axis].max() + 1 - high) * s)
        assert noted["needed_mm"] == pytest.approx(needed)
        assert noted["margin_mm"] == spec.locator.margin_mm
        assert needed + noted["safety_mm"] <= spec.locator.margin_mm < needed + noted["safety_mm"] + 0.1

    def test_every_foreground_voxel_of_held_out_cases_is_predicted(self, made: Made) -> None:
        predictor = Predictor.load(made.exported.bundle, "onnxruntime", threads=1)
        for case in held_out(made):
            part = predictor.part_of(made.fine.image_CZYX(case))
            if part is not None:
                truth = np.argwhere(made.fine.label_ZYX(case) > 0)
                assert (truth >= part.origin).all()
                assert (truth < np.add(part.origin, part.size)).all()

    def test_what_the_export_says(self, made: Made) -> None:
        spec = load_bundle_spec(made.exported.bundle)
        noted = spec.provenance["locator"]
        assert spec.format_version == 4
        assert noted["training"]["coarser"] == list(spec.locator.factor)
        assert noted["training"]["distill"]["alpha"] == 0
        beside = noted["beside_everywhere"]
        assert set(beside["cases"]) <= set(held_out(made))
        assert 0 < beside["share"] <= 1
        assert min(beside["seconds_located"], beside["seconds_everywhere"]) > 0
        lines = made.exported.described.splitlines()
        assert lines[-2].startswith(f"locator: margin {spec.locator.margin_mm:g} mm")
        assert f"Dice {100 * beside['dice_located']:.2f} and {100 * beside['dice_everywhere']:.2f}" in lines[-1]

    def test_stock_nnunet_knows_the_locator_as_a_model(self, made: Made) -> None:
        plans, dataset = (json.loads((made.locator / n).read_text()) for n in ("plans.json", "dataset.json"))
        assert dataset["labels"] == {"background": 0, "foreground": 1}
        assert plans["configurations"][CONFIGURATION]["data_identifier"] == made.coarse.name
        assert not list(made.coarse.parent.glob("*locator*.json"))  # not beside the plans of the data set


class TestRefusals:
    @pytest.mark.parametrize(
        ("toy", "changes", "message"),
        [
            (Toy(dims=2, spacing=(1.0, 1.0)), {}, "2d_toy is a 2d configuration"),
            (Toy(labels={"background": 0, "a": 1, "ignore": 2}), {}, "the data set has an ignore label"),
            (Toy(), {"previous_stage": "3d_lowres"}, "3d_toy is a cascade stage"),
        ],
    )
    def test_where_it_makes_no_sense(self, toy: Toy, changes: dict[str, Any], message: str) -> None:
        plans, configuration = _plans(toy), f"{toy.dims}d_toy"
        plans["configurations"]["3d_lowres"] = dict(plans["configurations"][configuration])
        plans["configurations"][configuration] |= changes
        with pytest.raises(SpecError, match=f"--locator: {message}.*\n.*everywhere"):
            check_locatable(model_of(plans, configuration, _dataset_json(toy)))

    def test_at_training(self, made: Made) -> None:
        words = ("train", "-d", "998", "-f", "0", "--locator")
        refused(run(*words, "-r", "4"), "--locator takes its network from the data set; leave out", "-r")
        for given in ({"alpha": 0.3}, {"start": "teacher"}, {"unlabelled": "scans", "pseudo_labels": True}):
            with pytest.raises(SpecError, match="a locator learns from labels alone"):
                train_locator(TEACHER, 0, given)
        with pytest.raises(MismatchError, match="holds a finished run"):
            train_locator(TEACHER, 0, STEPS)

    def test_at_export(self, made: Made, tmp_path: Path) -> None:
        out = tmp_path / "out"
        for locator, error, message in (
            (made.model, SpecError, "got a model that is no locator"),
            (made.exported.bundle, SpecError, "got a bundle, expected the model folder"),
            (tmp_path, NotFoundError, "no trained model there"),
        ):
            with pytest.raises(error, match=message):
                export(made.model, 0, out, locator=locator)
        with pytest.raises(MismatchError, match=r"it has fold\(s\) 0, the student is of fold 1"):
            export(made.model, 1, out, locator=made.locator)
        with pytest.raises(MismatchError, match="exists already"):
            export(made.model, 0, made.exported.bundle, locator=made.locator)
        assert not out.exists()
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    def test_of_other_data(self, made: Made, tmp_path: Path) -> None:
        other = Path(shutil.copytree(made.model, tmp_path / "model"))
        plans = json.loads((other / "plans.json").read_text())
        plans["configurations"][CONFIGURATION]["spacing"] = [1.0, 2.0, 3.0]
        (other / "plans.json").write_text(json.dumps(plans))
        with pytest.raises(MismatchError, match=r"is not of the model's data:\n  - spacing: locator .*expected"):
            export(other, 0, tmp_path / "out", locator=made.locator)

    def test_a_locator_that_sees_nothing(self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastnnunet.runtime.loaded.seen_box", lambda *_: None)
        with pytest.raises(MismatchError, match=r"the locator sees nothing in any of 2 case\(s\).*\n.*--steps"):
            export(made.model, 0, tmp_path / "out", locator=made.locator)
        assert not list(tmp_path.iterdir())
