"""Specs: every problem at once, and keys that depend on content alone."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import canonical_json, differences, sha256_of
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.load import build_spec, load_yaml_spec
from fastnnunet.specs.student import StudentSpec, student_plans_name

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_contradictions_are_told_with_the_unknown_fields(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("temperature: -1\nlevel: 40\nencodng: float16\nmirroring: 3\n")
    with pytest.raises(SpecError) as error:
        load_yaml_spec(CacheSpec, path)
    text = str(error.value)
    assert "4 problem(s)" in text
    assert all(f"- {start}" in text for start in ("temperature: got -1", "level: got 40", "unknown field 'encodng'"))


def test_all_problems_at_once(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("temprature: 3\nstep_size: big\nchunk_zyx: [32, 32]\n")
    with pytest.raises(SpecError, match="3 problem") as caught:
        load_yaml_spec(CacheSpec, path)
    message = str(caught.value)
    assert "unknown field 'temprature'" in message
    assert "'step_size'" in message
    assert "'chunk_zyx': got 2 values, expected 3" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature: 0", "temperature: got 0.0"),
        ("step_size: 1.5", "step_size: got 1.5"),
        ("encoding: jpeg", "expected one of 'simplex_u8'"),
        ("mirroring: 1", "expected bool"),
        ("- 1\n- 2", "expected a mapping"),
        ("{", "not valid YAML"),
    ],
)
def test_wrong_values(tmp_path, text, expected):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SpecError, match=expected):
        load_yaml_spec(CacheSpec, tmp_path / "s.yaml")


def test_missing_file():
    with pytest.raises(NotFoundError, match="spec file not found"):
        load_yaml_spec(CacheSpec, Path("nowhere.yaml"))


def test_empty_file_is_the_default(tmp_path):
    (tmp_path / "s.yaml").write_text("# nothing\n")
    assert load_yaml_spec(CacheSpec, tmp_path / "s.yaml") == CacheSpec()


def test_whole_numbers_are_floats_where_floats_are_meant():
    assert build_spec(CacheSpec, {"temperature": 2}) == CacheSpec(temperature=2.0)


@pytest.mark.parametrize(
    "wrong", [{"alpha": 1.5}, {"alpha": -0.1}, {"epochs": 0}, {"initial_lr": 0.0}, {"optimizer": "magic"}]
)
def test_hyperparameters_out_of_range(wrong):
    with pytest.raises(SpecError, match=next(iter(wrong))):
        build_spec(DistillSpec, wrong)


def test_runs_of_different_settings_have_different_names():
    names = {
        student_plans_name("nnUNetPlans", StudentSpec(r=r), DistillSpec(alpha=a, temperature=t))
        for r in (2, 4)
        for a in (0.3, 0.5)
        for t in (1.0, 3.0)
    }
    assert len(names) == 8
    assert "nnUNetPlans_r4_a0.3_T3" in names
    assert student_plans_name("P", StudentSpec(r=4), DistillSpec()) == "P_r4_a0.5_T1"
    control = DistillSpec(alpha=0, loss="kl", soft_deep_supervision=False, soft_voxels="uncertain", sharpen_above=0.9)
    for spec in (DistillSpec(alpha=0), replace(control, soft_on_ignored=False)):
        assert student_plans_name("P", StudentSpec(r=2), spec) == "P_r2_a0", "no soft loss, no words of one"
    soft = replace(control, alpha=1, soft_on_ignored=False)
    assert soft.tag == "a1_T1_kl_nosoftds_uncertain_sharp0.9p2_unignored"
    assert not any("__" in n for n in names), "nnU-Net splits folder names at double underscores"


@given(st.dictionaries(st.text(), json_values, max_size=6))
def test_key_does_not_depend_on_order(mapping):
    backwards = dict(reversed(mapping.items()))
    assert canonical_json(mapping) == canonical_json(backwards)
    assert sha256_of(mapping) == sha256_of(backwards)
    assert differences(mapping, backwards) == []


def test_differences_name_the_field():
    left = {"teacher": {"folds": [0, 1], "plans": "a"}, "T": 3.0}
    right = {"teacher": {"folds": [0, 2], "plans": "a"}, "T": 2.0, "extra": 1}
    assert differences(left, right) == ["T: 3.0 -> 2.0", "extra: absent -> 1", "teacher.folds: [0, 1] -> [0, 2]"]
