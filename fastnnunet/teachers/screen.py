"""Which scans would do harm in a training on the teacher's labels, by a stated rule and with the numbers.

A scan is left out when
- *folds disagree*: the Dice of their label maps, mean over labels and pairs of folds, is below `MIN_DICE`: on less than
  half of what they label they are of one mind. Or it is below `SURE_DICE` and below the lower quartile of all scans by
  `FENCE` times the distance of the quartiles: worse than these scans are as a rule. How far folds agree is a matter of
  the task, 0.9 for organs and 0.6 for small lesions, so that no one bound would do. On hippocampus MR with five folds
  ordinary scans have 0.90 to 0.95; inverted, turned, cut in half or replaced by noise 0.3 to 0.7.
- *nothing seen*: no label has `MIN_VOXELS` voxels. A training draws a third of its patches around labelled voxels, of
  which there are none.
- *intensities*: far outside the fingerprint, by the rules of `intensities.py`.

What cannot be told is said to be unknown and never a reason: folds of a single one, of a teacher that does not tell
them apart, or of cases labelled before this was counted. A label counts in the Dice of a scan when its folds give it
`MIN_VOXELS` voxels in the mean: of a few voxels Dice says little.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from fastnnunet.cache.seen import Seen, seen_of
from fastnnunet.cache.store.folder import CacheFolder
from fastnnunet.events import Listener, Progress, ignore
from fastnnunet.nnunet.files.cases import PreprocessedCases
from fastnnunet.nnunet.files.model import Model
from fastnnunet.teachers.images import teacher_label
from fastnnunet.teachers.intensities import (
    CT,
    MAX_CLIPPED,
    Fingerprint,
    Intensities,
    clipped_share,
    fingerprints_of,
    outside,
)

MIN_DICE = 0.5
SURE_DICE = 0.8
FENCE = 3.0
MIN_SCANS_FOR_FENCE = 8  # quartiles of fewer say nothing
MIN_VOXELS = 10
MIN_SCANS_OF_LABEL = 3  # a label in one or two scans is learnt by heart, and perhaps in no held-out scan to be judged

Rule = Literal["folds disagree", "nothing seen", "intensities"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldAgreement:
    """Pairwise Dice of the folds' label maps of one scan."""

    dice: float | None  # mean over labels and pairs; None where no label has enough voxels
    labels: dict[str, float]  # mean over pairs of each label that has
    worst: tuple[str, str] | None  # the pair of folds that agree least
    worst_dice: float | None  # mean over labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a scan is bad; `text` has the numbers."""

    rule: Rule
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is known of one scan, and what speaks against it."""

    case_id: str
    voxels: dict[str, int]  # of each label, as the whole teacher gives it
    agreement: FoldAgreement | None  # None: unknown
    intensities: tuple[Intensities, ...]  # of each channel; empty: unknown
    clipped: float | None  # see `clipped_share`; None without a CT channel
    reasons: tuple[Reason, ...]
    unknown: tuple[str, ...]  # what could not be told, in words

    @property
    def bad(self) -> bool:
        return bool(self.reasons)

    @property
    def line(self) -> str:
        """One line for a list of bad scans."""
        return f"{self.case_id}: " + "; ".join(f"{reason.rule}: {reason.text}" for reason in self.reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """The verdicts on all scans, and whether bad ones are kept nevertheless."""

    verdicts: tuple[Verdict, ...]
    dice_bound: float  # what `dice` had to reach among these scans
    keep_all: bool

    @property
    def bad(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.bad)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Case ids not to train on."""
        return () if self.keep_all else tuple(verdict.case_id for verdict in self.bad)

    @property
    def kept(self) -> tuple[str, ...]:
        out = set(self.left_out)
        return tuple(verdict.case_id for verdict in self.verdicts if verdict.case_id not in out)

    @property
    def rule(self) -> str:
        """The rule in words, with the bounds that held here."""
        return (
            f"left out are scans on which the folds' label maps have a pairwise Dice below {self.dice_bound:.2f}, in "
            f"which the teacher gives no label {MIN_VOXELS} voxels, or whose intensities are far outside those it "
            "learnt from"
        )

    def lines(self) -> list[str]:
        """What to tell before a training: the bad scans with their numbers, and what is unknown."""
        told = []
        if self.bad:
            does = "are kept (--keep-all)" if self.keep_all else "are left out of training (--keep-all keeps them)"
            told.append(f"{len(self.bad)} of {len(self.verdicts)} scans {does}:")
            told += [f"  {verdict.line}" for verdict in self.bad]
        counts: dict[str, int] = {}
        for verdict in self.verdicts:
            for what in verdict.unknown:
                counts[what] = counts.get(what, 0) + 1
        told += [f"unknown of {count} of {len(self.verdicts)} scans: {what}" for what, count in counts.items()]
        return told


def screen(
    cache: CacheFolder,
    model: Model,
    *,
    cases: PreprocessedCases | None = None,
    measured: Mapping[str, tuple[Intensities, ...]] | None = None,
    label_ZYX: Callable[[str], np.ndarray] | None = None,
    keep_all: bool = False,
    progress: Listener = ignore,
) -> Screening:
    """Judge every case of a complete cache.

    `measured`: intensities of the scans as `measure_scans` gives them. `cases`: the preprocessed images, in which is
    looked what a CT's normalisation clipped. Without either, that is unknown. `label_ZYX`: the teacher's label map of a
    case where it is written already; default: out of the cache, which takes longer. It is read for CT, and for cases
    labelled before their voxels were counted. `keep_all` changes no verdict, only what follows of it.

    Raises CorruptError, NotFoundError when a case is damaged or not stored, MismatchError for plans without statistics.
    """
    labels_of = label_ZYX or (lambda case: teacher_label(cache.path, case, model.labels))
    names, fingerprints = head_names(model), fingerprints_of(model)
    known: list[_Known] = []
    for done, case in enumerate(sorted(cache.cases), start=1):
        seen, image = seen_of(cache, case), None
        if cases is not None and any(f.scheme == CT for f in fingerprints):
            image = cases.image_CZYX(case)
        label = labels_of(case) if seen is None or image is not None else None
        known.append(
            _Known(
                case_id=case,
                voxels=voxels_of_label(label, model) if seen is None else foreground_of(seen.voxels, names),
                seen=seen,
                agreement=None if seen is None else agreement_of(seen, names),
                intensities=(measured or {}).get(case, ()),
                clipped=None if image is None else clipped_share(image, np.asarray(label) > 0, fingerprints),
            )
        )
        progress(Progress(what="screening", done=done, total=len(cache.cases), unit="cases"))
    bound = dice_bound([k.agreement.dice for k in known if k.agreement is not None and k.agreement.dice is not None])
    return Screening(verdicts=tuple(_judge(k, bound, fingerprints) for k in known), dice_bound=bound, keep_all=keep_all)


def rare_labels(
    verdicts: Sequence[Verdict], training: Sequence[str], least: int = MIN_SCANS_OF_LABEL
) -> dict[str, int]:
    """Labels that have `MIN_VOXELS` voxels in fewer than `least` of the scans to train on, and in how many."""
    chosen = set(training)
    inside = [verdict for verdict in verdicts if verdict.case_id in chosen]
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict.voxels))
    counts = {name: sum(v.voxels[name] >= MIN_VOXELS for v in inside) for name in names}
    return {name: count for name, count in counts.items() if count < least}


def rare_text(rare: Mapping[str, int], scans: int) -> str:
    """`rare_labels` in words; `scans`: how many there are to train on."""
    each = "; ".join(f"{name} in {count or 'none'}" for name, count in rare.items())
    return (
        f"too few of the {scans} scans to train on show these labels: {each} (expected at least {MIN_SCANS_OF_LABEL} "
        "each)\na student will hardly learn them: add scans that show them"
    )


def head_names(model: Model) -> tuple[str | None, ...]:
    """The label of every head of the network, None for the background."""
    labels = model.dataset_json["labels"]
    if not model.has_regions:
        by_value = {value: str(name) for name, value in labels.items()}
        return (None, *(by_value.get(head, f"label {head}") for head in range(1, model.num_heads)))
    by_region = {_as_region(value): str(name) for name, value in labels.items()}
    regions = [_as_region(region) for region in model.labels.foreground_regions]
    return tuple(by_region.get(region, f"region {region}") for region in regions)


def foreground_of(counts: Sequence[int], names: Sequence[str | None]) -> dict[str, int]:
    """Counts of heads by label, without the background."""
    return {name: count for name, count in zip(names, counts, strict=True) if name is not None}


def voxels_of_label(label_ZYX: np.ndarray | None, model: Model) -> dict[str, int]:
    """Voxels of each label in a label map."""
    assert label_ZYX is not None
    regions: list[Any] = [*(model.labels.foreground_regions if model.has_regions else range(1, model.num_heads))]
    names = [name for name in head_names(model) if name is not None]
    return {
        name: int(np.isin(label_ZYX, _as_region(region)).sum()) for name, region in zip(names, regions, strict=True)
    }


def agreement_of(seen: Seen, names: Sequence[str | None]) -> FoldAgreement | None:
    """None where there are no two folds to compare."""
    pairs = list(combinations(range(len(seen.folds)), 2))
    if not pairs:
        return None
    of_folds, shared = np.asarray(seen.of_folds, float), np.asarray(seen.shared, float)
    counted = [head for head, name in enumerate(names) if name is not None and of_folds[:, head].mean() >= MIN_VOXELS]
    if not counted:
        return FoldAgreement(dice=None, labels={}, worst=None, worst_dice=None)
    sums = np.array([of_folds[one] + of_folds[other] for one, other in pairs])
    # where neither of a pair gives a label, they agree
    dice = np.where(sums > 0, 2 * shared / np.maximum(sums, 1), 1.0)[:, counted]
    worst = int(dice.mean(axis=1).argmin())
    return FoldAgreement(
        dice=float(dice.mean()),
        labels={str(names[head]): float(value) for head, value in zip(counted, dice.mean(axis=0), strict=True)},
        worst=(seen.folds[pairs[worst][0]], seen.folds[pairs[worst][1]]),
        worst_dice=float(dice.mean(axis=1)[worst]),
    )


def dice_bound(dices: Sequence[float]) -> float:
    """What the folds' Dice of a scan must reach, given that of all scans."""
    if len(dices) < MIN_SCANS_FOR_FENCE:
        return MIN_DICE
    lower, upper = np.percentile(dices, (25, 75))
    return float(np.clip(lower - FENCE * (upper - lower), MIN_DICE, SURE_DICE))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Of a scan, before it is compared with the others."""

    case_id: str
    voxels: dict[str, int]
    seen: Seen | None
    agreement: FoldAgreement | None
    intensities: tuple[Intensities, ...]
    clipped: float | None


def _judge(known: _Known, bound: float, fingerprints: Sequence[Fingerprint]) -> Verdict:
    reasons, unknown = [], []
    agreement = known.agreement
    if agreement is None:
        unknown.append(f"whether the folds agree ({_why_unknown(known.seen)})")
    elif agreement.dice is not None and agreement.dice < bound:
        reasons.append(Reason(rule="folds disagree", text=_disagreement(agreement, bound)))
    if max(known.voxels.values(), default=0) < MIN_VOXELS:
        most = max(known.voxels.values(), default=0)
        text = f"at most {most} voxels of any label, expected {MIN_VOXELS} of one"
        reasons.append(Reason(rule="nothing seen", text=text))
    if not known.intensities:
        unknown.append("intensities of the file (not measured)")
    for number, (found, expected) in enumerate(zip(known.intensities, fingerprints, strict=False)):
        if (problem := outside(found, expected)) is not None:
            reasons.append(Reason(rule="intensities", text=f"channel {number}: {problem}"))
    if known.clipped is not None and known.clipped >= MAX_CLIPPED:
        reasons.append(
            Reason(
                rule="intensities",
                text=f"{known.clipped:.0%} of what the teacher labels lies beyond the range it learnt from "
                f"({fingerprints[0].range_text})",
            )
        )
    return Verdict(
        case_id=known.case_id,
        voxels=known.voxels,
        agreement=agreement,
        intensities=known.intensities,
        clipped=known.clipped,
        reasons=tuple(reasons),
        unknown=tuple(unknown),
    )


def _why_unknown(seen: Seen | None) -> str:
    if seen is None:
        return "labelled by a version that did not count it"
    return "there is one fold" if len(seen.folds) == 1 else "the teacher does not tell its folds apart"


def _disagreement(agreement: FoldAgreement, bound: float) -> str:
    labels = ", ".join(f"{name} {dice:.2f}" for name, dice in sorted(agreement.labels.items(), key=lambda i: i[1])[:5])
    worst = "" if agreement.worst is None else f", folds {' and '.join(agreement.worst)} {agreement.worst_dice:.2f}"
    return f"pairwise Dice {agreement.dice:.2f}, expected at least {bound:.2f} ({labels}{worst})"


def _as_region(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)
