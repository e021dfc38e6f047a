"""The headers of a series as a segmentation or structure set may refer to them: mended, or refused where not.

What identifies patient, study and images is taken from the slices; no other attribute of theirs reaches the writer.
"""

import contextlib
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from fastnnunet.errors import ImageError, printable
from fastnnunet.images.dicom.head import Head
from fastnnunet.images.dicom.series import DicomSeries, slice_heads
from fastnnunet.outputs.dicom.values import CHARACTERS, mended, mended_sex, positive

# modules of patient, study, equipment and clinical trial; what of them a segmentation takes over is highdicom's choice
_GROUPS = (0x0008, 0x0010, 0x0012, 0x0032, 0x0038, 0x0040)
# may be empty but must be there (type 2); anonymisers and converters leave some out
IDENTIFYING = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_UIDS = {  # of each slice
    **{"SOPClassUID": "storage_class", "SOPInstanceUID": "sop_uid", "StudyInstanceUID": "study_uid"},
    **{"SeriesInstanceUID": "series_uid", "FrameOfReferenceUID": "frame_uid"},
}
_CLASSES = {"CT": "1.2.840.10008.5.1.4.1.1.2", "MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MOST_SERIES_NUMBER = 2**31 - 1
_OURS = 1000  # added to the number of the series, which is not one of the scanner's then
_PREFIX_OF_STANDARD_CLASSES = "1.2.840.10008."
_TEXT_KINDS = ("AS", "DA", "DS", "DT", "IS", "PN", "TM", "UI", *CHARACTERS)
_ESCAPES = re.compile("\x1b[$()*+,./-]{1,2}[0-9@-Z]")
_ISO_IR = re.compile("ISO[-_ ]?(2022)?[-_ ]?IR[-_ ]?")  # written in many ways
_DEEPEST = 8  # sequences in sequences

_log = logging.getLogger(__name__)
_one_at_a_time = RLock()


@dataclass(frozen=True, slots=True)
class SourceHeaders:
    """What a segmentation takes over from the slices it was made from."""

    slices: list[Any]  # pydicom data sets in the order of the slices; the first has what the writer copies
    identifying: Any  # data set of the attributes IDENTIFYING
    storage_classes: list[str]  # of the slices, which for the writer have a standard one
    series_number: int
    done: dict[str, str]  # attribute -> how it was mended

    @property
    def is_ascii(self) -> bool:
        return _is_ascii(self.slices[0]) and _is_ascii(self.identifying)


@contextlib.contextmanager
def no_complaints() -> Iterator[None]:
    """pydicom and highdicom neither check values nor warn of them inside the block, which one thread is in at a time.

    These settings are of the whole process.
    """
    import warnings

    import pydicom

    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    with _one_at_a_time, warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def tell(source: SourceHeaders, series: DicomSeries, made: Any, what: str) -> None:
    """Log what was mended of what a DICOM object (`what`) has from the series."""
    given = {(e.keyword, str(e.value)) for part in (source.slices[0], source.identifying) for e in part.iterall()}
    taken = {e.keyword for e in made.iterall() if (e.keyword, str(e.value)) in given} | {"SeriesNumber", "SOPClassUID"}
    if done := [f"{name} ({how})" for name, how in source.done.items() if name in taken]:
        _log.warning("%s: mended for the %s: %s", printable(series.folder), what, "; ".join(done))


def source_headers(series: DicomSeries) -> SourceHeaders:
    """Read and mend the headers of a series. Raises ImageError when they lack what nothing can stand for."""
    import pydicom

    heads = slice_heads(series)
    with no_complaints():
        try:
            first = pydicom.dcmread(next(iter(heads)), stop_before_pixels=True, force=True)
        except Exception as e:  # it raises whatever its parts raise
            raise ImageError(f"{series.folder}: pydicom cannot read its headers: {e}{WITHOUT}") from e
        return _mend(series, heads, first)


WITHOUT = "\nleave dicom-seg and rtstruct out of --output-format"
UTF8 = "ISO_IR 192"  # what everything can be written in


def _mend(series: DicomSeries, heads: dict[Path, Head], first: Any) -> SourceHeaders:
    from pydicom.dataset import Dataset

    done: dict[str, str] = {}
    encodings = _encodings(first, [])
    copied, identifying = _mend_data_set(first, encodings, done, 0), Dataset()
    for name in IDENTIFYING:
        if name in copied:
            identifying.add(copied[name])
            del copied[name]
        else:
            setattr(identifying, name, "")
        setattr(copied, name, "")  # the writer checks these more strictly than it must; they are set afterwards
    sex, what = mended_sex(_raw_text(first, "PatientSex", encodings))
    done.pop("PatientSex", None)
    identifying.PatientSex = sex
    _note(done, "PatientSex", what)
    identities = _identities(series, heads, done)
    slices = []
    orientation = next(iter(heads.values())).orientation
    for number, (head, identity) in enumerate(zip(heads.values(), identities, strict=True)):
        header = Dataset() if number else copied
        for name, uid in identity.items():
            setattr(header, name, uid)
        if not identity["SOPClassUID"].startswith(_PREFIX_OF_STANDARD_CLASSES):
            header.SOPClassUID = _standard_class(head)
        header.Modality = _code_of(head.modality)
        header.ImagePositionPatient = _decimals(head.position, 3, series, "ImagePositionPatient")
        # of all slices alike: the reader allows rounding, the writer does not
        header.ImageOrientationPatient = _decimals(orientation, 6, series, "ImageOrientationPatient")
        header.PixelSpacing = _decimals(head.pixel_spacing, 2, series, "PixelSpacing")
        slices.append(header)
    _set_thickness(slices, _raw_text(first, "SliceThickness", encodings), done)
    return SourceHeaders(
        slices=slices,
        identifying=identifying,
        storage_classes=[identity["SOPClassUID"] for identity in identities],
        series_number=_series_number(first, done),
        done=done,
    )


def _set_thickness(slices: list[Any], given: str, done: dict[str, str]) -> None:
    """The distance of the slices as their positions have it; SpacingBetweenSlices is often missing or not that."""
    from pydicom.valuerep import DSfloat

    thickness, spacing = positive(given), None
    if len(slices) > 1:
        spacing = math.dist(slices[0].ImagePositionPatient, slices[-1].ImagePositionPatient) / (len(slices) - 1)
    if thickness is None and (given or spacing is None):
        said = "no positive number" if given else "missing"
        done["SliceThickness"] = f"{said}, {'1 mm' if spacing is None else 'the distance of the slices'} is taken"
    for header in slices:
        header.SliceThickness = DSfloat(thickness or spacing or 1.0, auto_format=True)
        header.SpacingBetweenSlices = DSfloat(spacing or thickness or 1.0, auto_format=True)


def _identities(series: DicomSeries, heads: dict[Path, Head], done: dict[str, str]) -> list[dict[str, str]]:
    """The UIDs of each slice: as they are, were they not legal, since others refer to the images by them."""
    from pydicom.uid import generate_uid

    found = [{name: getattr(head, of_head) for name, of_head in _UIDS.items()} for head in heads.values()]
    for (file, head), uids in zip(heads.items(), found, strict=True):
        if not uids["SOPInstanceUID"]:
            raise ImageError(f"{file} has no SOPInstanceUID, by which a DICOM object refers to its image{WITHOUT}")
        if not uids["SOPClassUID"]:
            uids["SOPClassUID"] = _CLASSES.get(head.modality, _SECONDARY_CAPTURE)
            done["SOPClassUID"] = "missing, taken from the modality"
    if len({uids["SOPInstanceUID"] for uids in found}) < len(found):
        raise ImageError(
            f"{series.folder}: several slices have the same SOPInstanceUID (anonymised?), so that a DICOM object "
            f"cannot refer to them{WITHOUT}"
        )
    first = found[0]
    if not first["FrameOfReferenceUID"]:
        raise ImageError(
            f"{series.folder}: the series has no FrameOfReferenceUID, which a DICOM object must share with it{WITHOUT}"
        )
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        if not first[name]:
            first[name] = str(generate_uid(entropy_srcs=[name, *(uids["SOPInstanceUID"] for uids in found)]))
            done[name] = f"made up, the series has no {name} (anonymised?)"
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if any(uids[name] not in ("", first[name]) for uids in found):
            done[name] = "that of the first slice, others have another one"
        for uids in found:
            uids[name] = first[name]
    return found


def _series_number(first: Any, done: dict[str, str]) -> int:
    given = _raw_text(first, "SeriesNumber", [])
    values, _ = mended("IS", given, single=True)
    number = int(values[0] or 0)
    if not 0 <= number <= _MOST_SERIES_NUMBER - _OURS or (given and not values[0]):
        done["SeriesNumber"] = f"{_OURS}, that of the series is no number from 0 to {_MOST_SERIES_NUMBER - _OURS}"
        number = 0
    return number + _OURS


def _mend_data_set(header: Any, encodings: list[str], done: dict[str, str], depth: int) -> Any:
    """The public attributes of the groups that matter (of an item: all), with legal values only."""
    from pydicom.datadict import dictionary_VM, dictionary_VR, keyword_for_tag
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

    made = Dataset()
    for tag in list(header.keys()):
        keyword = keyword_for_tag(tag)
        if (
            not keyword
            or keyword == "SpecificCharacterSet"
            or (depth == 0 and tag.group not in _GROUPS and keyword not in IDENTIFYING)
        ):
            continue
        vr = dictionary_VR(tag)
        if vr in _TEXT_KINDS:
            values, what = mended(vr, _raw_text(header, keyword, encodings), single=dictionary_VM(tag) == "1")
            made[tag] = DataElement(tag, vr, values[0] if len(values) == 1 else values)
            _note(done, keyword, what)
            continue
        try:
            value = header[tag].value
            if vr == "SQ":
                items = list(value or ()) if depth < _DEEPEST else []
                items = [_mend_data_set(item, _encodings(item, encodings), done, depth + 1) for item in items]
                made[tag] = DataElement(tag, vr, items)
            elif " or " not in vr:
                made[tag] = DataElement(tag, vr, value)
        except Exception as e:  # pydicom raises whatever the conversion of a value raises
            _note(done, keyword, f"left out, it cannot be read ({type(e).__name__})")
    return made


def _raw_text(header: Any, keyword: str, encodings: list[str]) -> str:
    """The text of an attribute, decoded and otherwise as it is in the file; "" where there is none."""
    from pydicom.datadict import dictionary_VR

    if keyword not in header:
        return ""
    value = header.get_item(keyword).value
    if isinstance(value, bytes):
        return _decoded(value, encodings, is_name=dictionary_VR(keyword) == "PN").strip("\0 ")
    if value is None:
        return ""
    several = not isinstance(value, str) and hasattr(value, "append")
    return "\\".join(map(str, value)) if several else str(value)


def _decoded(value: bytes, encodings: list[str], *, is_name: bool) -> str:
    """Text in the character sets that are named; where none is, or it does not fit, UTF-8 if it is that, or Latin-1."""
    from pydicom.charset import decode_bytes

    if encodings:
        # at these the character set is the first one again: line breaks, and ^ and = in names
        text = str(decode_bytes(value, encodings, {0x3D, 0x5E} if is_name else {0x09, 0x0A, 0x0C, 0x0D}))
        if "\ufffd" not in text:
            return _ESCAPES.sub("", text)  # Python leaves those of GB 2312
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _encodings(header: Any, inherited: list[str]) -> list[str]:
    """Python's names for the character sets of a header; empty where it names none, or one that does not exist."""
    from pydicom.charset import convert_encodings, python_encoding

    if "SpecificCharacterSet" not in header:
        return inherited
    names = [name.strip("\0 ").upper() for name in _raw_text(header, "SpecificCharacterSet", []).split("\\")]
    names = [_ISO_IR.sub(lambda match: f"ISO{'_' if match[1] is None else ' 2022 '}IR ", name) for name in names]
    if not any(names) or any(name not in python_encoding for name in names):
        return []
    return list(convert_encodings(names if len(names) > 1 else names[0]))


def _code_of(modality: str) -> str:
    values, _ = mended("CS", modality, single=True)
    return values[0] or "OT"


def _standard_class(head: Head) -> str:
    """A storage class that stands for a maker's own one while the segmentation is put together."""
    return _CLASSES.get(head.modality, _CLASSES["CT"])


def _decimals(values: tuple[float, ...], count: int, series: DicomSeries, name: str) -> list[Any]:
    from pydicom.valuerep import DSfloat

    if len(values) != count:
        raise ImageError(
            f"{series.folder}: the slices have no {name}, which a DICOM object must share with them{WITHOUT}"
        )
    return [DSfloat(value, auto_format=True) for value in values]


def _note(done: dict[str, str], name: str, what: str) -> None:
    if what:
        done.setdefault(name, what)


def _is_ascii(header: Any) -> bool:
    return all(str(element.value).isascii() for element in header.iterall() if element.VR in _TEXT_KINDS)
