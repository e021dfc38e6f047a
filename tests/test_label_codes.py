"""Codes of labels: those of TotalSegmentator's own table, of files, and what names say by themselves."""

from pathlib import Path
from typing import Any

import pytest
from pydicom.sr.codedict import codes

from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.outputs.dicom.anatomy import ALIASES, FINDINGS
from fastnnunet.outputs.dicom.codes import Coded, codes_of_name, label_codes
from fastnnunet.outputs.labelled import structures_of

# type codes of resources/totalsegmentator_snomed_mapping.csv of TotalSegmentator 2; of names with both sides the first
# part. It has no codes for costal cartilages; of the subclavian artery and the atrial appendage DICOM's are others.
TOTAL = {
    **{"spleen": "78961009", "gallbladder": "28231008", "liver": "10200004", "stomach": "69695003"},
    **{"pancreas": "15776009", "lung_middle_lobe_right": "72481006", "esophagus": "32849002", "trachea": "44567001"},
    **{"thyroid_gland": "69748006", "small_bowel": "30315005", "duodenum": "38848004", "colon": "71854001"},
    **{"urinary_bladder": "89837001", "prostate": "41216001", "sacrum": "54735007", "vertebrae_S1": "65985001"},
    **{"vertebrae_L5": "49668003", "vertebrae_L4": "11994002", "vertebrae_L3": "36470004", "vertebrae_L2": "14293000"},
    **{
        "vertebrae_L1": "66794005",
        "vertebrae_T12": "23215003",
        "vertebrae_T11": "12989004",
        "vertebrae_T10": "7610001",
    },
    **{"vertebrae_T9": "82687006", "vertebrae_T8": "11068009", "vertebrae_T7": "62487009", "vertebrae_T6": "45296009"},
    **{"vertebrae_T5": "56401006", "vertebrae_T4": "73071006", "vertebrae_T3": "1626008", "vertebrae_T2": "53733008"},
    **{"vertebrae_T1": "64864005", "vertebrae_C7": "87391001", "vertebrae_C6": "36054005", "vertebrae_C5": "36978003"},
    **{"vertebrae_C4": "5329002", "vertebrae_C3": "113205007", "vertebrae_C2": "39976000", "vertebrae_C1": "14806007"},
    **{"heart": "80891009", "aorta": "15825003", "pulmonary_vein": "122972007", "brachiocephalic_trunk": "12691009"},
    **{"superior_vena_cava": "48345005", "inferior_vena_cava": "64131007", "portal_vein_and_splenic_vein": "110765007"},
    **{"spinal_cord": "2748008", "brain": "12738006", "skull": "89546000", "sternum": "56873002"},
    **{"heart_atrium_left": "82471001", "heart_ventricle_right": "53085002", "heart_myocardium": "74281007"},
}
BOTH_SIDES = {
    **{"kidney": "64033007", "adrenal_gland": "23451007", "lung_upper_lobe": "45653009", "lung_lower_lobe": "90572001"},
    **{"common_carotid_artery": "32062004", "brachiocephalic_vein": "8887007", "iliac_artery": "73634005"},
    **{"iliac_vena": "46027005", "humerus": "85050009", "scapula": "79601000", "clavicula": "51299004"},
    **{"femur": "71341001", "hip": "29836001", "gluteus_maximus": "181674001", "gluteus_medius": "78333006"},
    **{"gluteus_minimus": "75297007", "autochthon": "244849004", "iliopsoas": "68455001"},
}
RIBS = "48535007 78247007 25888004 25523003 15339008 59558009 24915002 5953002 22565002 77644006 58830002 43993008"
LEFT, RIGHT = "7771000", "24028007"


def test_totalsegmentators_classes_have_its_codes() -> None:
    for name, value in TOTAL.items():
        assert codes_of_name(name).type.value == value, name
        assert codes_of_name(name).category.meaning == "Anatomical Structure"
    sides = {"left": LEFT, "right": RIGHT}
    named = {f"{name}_{side}": (value, side) for name, value in BOTH_SIDES.items() for side in sides}
    named |= {f"rib_{side}_{n}": (value, side) for n, value in enumerate(RIBS.split(), 1) for side in sides}
    for name, (value, side) in named.items():
        found = codes_of_name(name)
        assert (found.type.value, found.laterality and found.laterality.value) == (value, sides[side]), name
    cyst = codes_of_name("kidney_cyst_left")
    assert (cyst.category.value, cyst.type.value, cyst.region and cyst.region.value, cyst.laterality) == (
        *("49755003", "367643001", "64033007"),
        Coded(LEFT, "SCT", "Left"),
    )


@pytest.mark.parametrize(
    ("name", "meaning", "region", "side"),
    [
        ("costal_cartilages", "Costal Cartilage", None, None),
        ("subclavian_artery_left", "Subclavian artery", None, "Left"),
        ("atrial_appendage_left", "Left auricular appendage", None, None),
        ("Left-Hippocampus", "Hippocampus", None, "Left"),
        ("kidneyRight", "Kidney", None, "Right"),
        ("kidney_l", "Kidney", None, "Left"),
        ("left atrium", "Left atrium", None, None),
        ("liver tumour", "Neoplasm", "Liver", None),
        ("enhancing_tumor", "Neoplasm", None, None),
        ("edema", "Edema", None, None),
        ("kidneys", "Kidney", None, None),
        ("left_right_kidney", "Anatomical Structure", None, None),
        ("label 7", "Anatomical Structure", None, None),
        ("", "Anatomical Structure", None, None),
        ("肝", "Anatomical Structure", None, None),
    ],
)
def test_names(name: str, meaning: str, region: str | None, side: str | None) -> None:
    found = codes_of_name(name)
    assert found.type.meaning == meaning
    assert (found.region.meaning if found.region else None) == region
    assert (found.laterality.meaning if found.laterality else None) == side


def test_every_alias_is_in_the_dictionary() -> None:
    for alias in (*ALIASES.values(), *FINDINGS.values()):
        if isinstance(alias, str):
            assert getattr(codes.SCT, alias).scheme_designator == "SCT"
        else:
            assert alias[0].isdecimal()
            assert alias[1]


STRUCTURES: Any = structures_of({"background": 0, "liver": 1, "lump": 2, "kidney": 3, "spleen": 4})


def test_a_file_says_it(tmp_path: Path) -> None:
    file = tmp_path / "codes.yaml"
    file.write_text(
        "liver: Spleen\n"
        "lump: {type: [4147007, SCT, Mass], category: MorphologicallyAbnormalStructure, region: Kidney, "
        "laterality: Left}\n"
        "kidney: {type: Kidney, laterality: Right}\n"
    )
    found = label_codes(STRUCTURES, file)
    assert [found[n].type.value for n in found] == ["78961009", "4147007", "64033007", "78961009"]
    assert found["lump"].category.value == "49755003"
    assert found["lump"].region == Coded("64033007", "SCT", "Kidney")
    assert found["kidney"].laterality == Coded(RIGHT, "SCT", "Right")
    assert found["kidney"].category == found["spleen"].category == Coded("91723000", "SCT", "Anatomical Structure")


def test_all_that_is_wrong_in_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "codes.yaml"
    file.write_text("livr: Liver\nliver: Livr\nlump: {kind: Mass}\nkidney: [1, 2]\nspleen: [a, SCT, 'x\\y']\n")
    with pytest.raises(SpecError, match="5 problem") as error:
        label_codes(STRUCTURES, file)
    text = str(error.value)
    assert "'livr' is no label of the model (did you mean liver?)" in text
    assert "has no 'Livr' (did you mean Liver" in text
    for words in ("got kind, expected type", "got [1, 2], expected a name, or a list", "meaning: got 'x\\\\y'"):
        assert words in text
    with pytest.raises(NotFoundError):
        label_codes(STRUCTURES, tmp_path / "none.yaml")
    file.write_text("[1]")
    with pytest.raises(SpecError, match="expected a mapping"):
        label_codes(STRUCTURES, file)


@pytest.mark.parametrize("name", ["aortic knob", "anterior_junction_line", "abdominalCompressionArch"])
def test_concepts_of_other_schemes_are_none_of_snomed(name: str) -> None:
    """pydicom's context groups hold some of DCM and others."""
    assert codes_of_name(name).type == codes_of_name("something").type
