"""The two ways to predict a bundle beside each other: one pass, and nnU-Net's window."""

from dataclasses import dataclass, replace
from pathlib import Path

from fastnnunet.errors import MismatchError, NotFoundError
from fastnnunet.events import Listener, ignore
from fastnnunet.release.gate import POINTS, compare
from fastnnunet.release.gate_cases import TrainingCases
from fastnnunet.runtime.loaded import LoadedBundle
from fastnnunet.specs.bundle import load_bundle_spec, write_bundle_json
from fastnnunet.specs.canonical import to_plain
from fastnnunet.system.files import atomic_output

FEW = 4  # cases: an export is not to take long
BESIDE_WINDOW = "beside_window"  # of the provenance's `one_pass`


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Dice are means over cases per label, then over foreground labels; without mirroring."""

    dice_one_pass: float
    dice_window: float
    label_agreement: float  # share of voxels with the same label
    cases: tuple[str, ...]
    held_out: bool  # kept from the training of the model

    def describe(self) -> str:
        """One line."""
        kind = "held-out" if self.held_out else "training"
        return (
            f"one pass beside nnU-Net's window on {len(self.cases)} {kind} case(s): Dice "
            f"{POINTS * self.dice_one_pass:.2f} and {POINTS * self.dice_window:.2f}, same label on "
            f"{self.label_agreement:.3%} of voxels"
        )


def compare_ways(bundle: Path, progress: Listener = ignore) -> Ways | None:
    """Predict preprocessed cases both ways and note in the bundle how they compare.

    None where the bundle has one way only, or there are no cases, or nothing to judge in them. Raises what
    `LoadedBundle.load` raises.
    """
    spec = load_bundle_spec(bundle)
    if spec.one_pass is None:
        return None
    one_pass = LoadedBundle.load(bundle, mirroring=False)
    window = one_pass.with_settings(step_size=spec.step_size, mirroring=False, use_gaussian=True)
    try:
        source = TrainingCases(spec, count=FEW)
        (found,) = compare(source, {window.backend.name: window}, [one_pass], progress)
    except (NotFoundError, MismatchError):
        return None
    ways = Ways(
        dice_one_pass=found.dice,
        dice_window=found.dice_fp32,
        label_agreement=found.label_agreement,
        cases=found.cases,
        held_out=source.held_out,
    )
    noted = {**spec.provenance.get("one_pass", {}), BESIDE_WINDOW: to_plain(ways)}
    with atomic_output(bundle / "bundle.json") as unfinished:
        write_bundle_json(replace(spec, provenance={**spec.provenance, "one_pass": noted}), unfinished)
    return ways
