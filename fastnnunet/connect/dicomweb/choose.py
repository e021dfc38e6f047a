"""The series that is meant, of those that a study has."""

from collections.abc import Sequence

from fastnnunet.connect.dicomweb.archive import FoundSeries
from fastnnunet.connect.dicomweb.spec import DicomWebSpec
from fastnnunet.errors import NotFoundError, SpecError, printable

# what is no image, or none of slices: presentation states, reports, segmentations, plans, waveforms
_NO_IMAGES = frozenset(
    [
        *("AU", "CTPROTOCOL", "DOC", "ECG", "FID", "HD", "KO", "M3D", "OT", "PLAN", "PR", "REG", "RTDOSE", "RTIMAGE"),
        *("RTPLAN", "RTRECORD", "RTSTRUCT", "RWV", "SEG", "SMR", "SR", "STAIN"),
    ]
)
_MOST_SHOWN = 50


def choose_series(found: Sequence[FoundSeries], spec: DicomWebSpec, channels: int) -> tuple[FoundSeries, ...]:
    """One series for each of a model's channels, in their order.

    Raises NotFoundError where none fits what was asked for, SpecError where several do or there are too few.
    """
    if spec.series:
        by_uid = {series.uid: series for series in found}
        if unknown := [uid for uid in spec.series if uid not in by_uid]:
            raise NotFoundError(f"the study has no series {', '.join(unknown)}; it has\n{listing(found)}")
        if len(spec.series) != channels:
            raise SpecError(
                f"got {len(spec.series)} --series, expected one for each of the model's {channels} channel(s)"
            )
        return tuple(by_uid[uid] for uid in spec.series)
    images = [series for series in found if series.modality.upper() not in _NO_IMAGES]
    if channels > 1:
        raise SpecError(
            f"this model takes {channels} channels: name the series of each with --series, in their order; there are\n"
            f"{listing(images)}"
        )
    modality, text = (spec.modality or "").casefold(), (spec.description or "").casefold()
    fitting = [
        series
        for series in images
        if (not modality or series.modality.casefold() == modality) and text in series.description.casefold()
    ]
    if not fitting:
        raise NotFoundError(f"no series of the study fits what was asked for; it has\n{listing(found)}")
    if len(fitting) > 1:
        raise SpecError(
            f"{len(fitting)} series of the study fit, expected one\n{listing(fitting)}\n"
            "name it with --series, or say more with --modality and --description"
        )
    return (fitting[0],)


def listing(found: Sequence[FoundSeries]) -> str:
    """A line for each series: UID, modality, number of images, description."""
    lines = []
    for series in found[:_MOST_SHOWN]:
        count = "" if series.count is None else f"{series.count} image(s)"
        words = (series.uid, printable(series.modality), count, printable(series.description)[:64])
        lines.append("  " + ", ".join(filter(None, words)))
    more = len(found) - _MOST_SHOWN
    return "\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])]) or "  no series of images"
