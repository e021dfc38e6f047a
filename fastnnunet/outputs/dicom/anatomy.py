"""Names that models give to structures, where they are not those of SNOMED CT: TotalSegmentator's classes and others.

A name is written as `codes.words_of` reduces it: small letters, one space between words, without its side. It stands
for a name in pydicom's SNOMED dictionary or, of what that lacks, for (code, meaning), which are those of
TotalSegmentator's own table.
"""

from collections.abc import Mapping

Alias = str | tuple[str, str]

_ORDINALS = {
    1: ("48535007", "First rib"),
    2: ("78247007", "Second rib"),
    3: ("25888004", "Third rib"),
    4: ("25523003", "Fourth rib"),
    5: ("15339008", "Fifth rib"),
    6: ("59558009", "Sixth rib"),
    7: ("24915002", "Seventh rib"),
    8: ("5953002", "Eighth rib"),
    9: ("22565002", "Ninth rib"),
    10: ("77644006", "Tenth rib"),
    11: ("58830002", "Eleventh rib"),
    12: ("43993008", "Twelfth rib"),
}
_VERTEBRAE = [f"{part}{n}" for part, count in (("c", 7), ("t", 12), ("l", 5)) for n in range(1, count + 1)]

ALIASES: Mapping[str, Alias] = {
    # TotalSegmentator
    "lung upper lobe": "UpperLobeOfLung",
    "lung lower lobe": "LowerLobeOfLung",
    "lung middle lobe": "MiddleLobeOfRightLung",
    "thyroid gland": "Thyroid",
    "small bowel": "SmallIntestine",
    "urinary bladder": "Bladder",
    "atrial appendage left": "LeftAuricularAppendage",
    "heart atrium left": "LeftAtrium",
    "heart atrium right": "RightAtrium",
    "heart ventricle left": "LeftVentricle",
    "heart ventricle right": "RightVentricle",
    "heart myocardium": ("74281007", "Myocardium"),
    "myocardium": ("74281007", "Myocardium"),
    "iliac artery": "CommonIliacArtery",
    "iliac vena": "CommonIliacVein",
    "portal vein and splenic vein": ("110765007", "Portal vein and splenic vein"),
    "brachiocephalic trunk": "InnominateArtery",
    "brachiocephalic vein": "InnominateVein",
    "clavicula": "Clavicle",
    "autochthon": ("244849004", "Deep muscle of back"),
    "gluteus maximus": ("181674001", "Gluteus maximus muscle"),
    "gluteus medius": ("78333006", "Gluteus medius muscle"),
    "gluteus minimus": ("75297007", "Gluteus minimus muscle"),
    "iliopsoas": ("68455001", "Iliopsoas muscle"),
    "costal cartilages": "CostalCartilage",
    "vertebrae s1": ("65985001", "S1 vertebra"),
    "face": "Face",
    "subcutaneous fat": "SubcutaneousTissue",
    "torso fat": "AdiposeTissue",
    "skeletal muscle": "SkeletalMuscle",
    "coronary arteries": "CoronaryArtery",
    "brainstem": "BrainStem",
    "hyoid": "HyoidBone",
    **{f"rib {n}": rib for n, rib in _ORDINALS.items()},
    **{f"vertebrae {name}": f"{name.upper()}Vertebra" for name in _VERTEBRAE},
    **{f"vertebra {name}": f"{name.upper()}Vertebra" for name in _VERTEBRAE},
    # other data sets
    "oesophagus": "Esophagus",
    "adrenal": "AdrenalGland",
    "bowel": "SmallIntestine",
    "intestine": "SmallIntestine",
    "ivc": "InferiorVenaCava",
    "svc": "SuperiorVenaCava",
    "postcava": "InferiorVenaCava",
    "fat": "AdiposeTissue",
    "csf": "CerebrospinalFluid",
    "bone": "BoneTissue",
    "muscle": "SkeletalMuscle",
    "prostate gland": "Prostate",
    "la": "LeftAtrium",
    "lv": "LeftVentricle",
    "rv": "RightVentricle",
}
# What is abnormal: the word in a name -> what it is; other words of the name may say where
FINDINGS: Mapping[str, Alias] = {
    "tumor": "Neoplasm",
    "tumour": "Neoplasm",
    "tumors": "Neoplasm",
    "tumours": "Neoplasm",
    "cancer": "Neoplasm",
    "neoplasm": "Neoplasm",
    "metastasis": "NeoplasmSecondary",
    "metastases": "NeoplasmSecondary",
    "cyst": "Cyst",
    "cysts": "Cyst",
    "lesion": "Lesion",
    "lesions": "Lesion",
    "nodule": "Nodule",
    "nodules": "Nodule",
    "mass": "Mass",
    "edema": "Edema",
    "oedema": "Edema",
    "necrosis": "Necrosis",
    "hemorrhage": "Hemorrhage",
    "haemorrhage": "Hemorrhage",
    "abscess": "Abscess",
}
