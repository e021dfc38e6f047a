"""How a bundle predicts that stays in memory: what `predict` can be told of it, with the same meaning."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from fastnnunet.errors import SpecError
from fastnnunet.specs.option import Option
from fastnnunet.specs.run.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptModelSpec:
    """A bundle and its settings."""

    bundle: Annotated[Path, Option("-m --model", "Bundle of `fastnnunet export`.", True)]
    backend: Annotated[str, Option("--backend", "As of `predict`.")] = "auto"
    precision: Annotated[Precision, Option("--precision", "As of `predict`.")] = "fp32"
    device: Annotated[str | None, Option("-device --device", "As of `predict`.")] = None
    threads: Annotated[int | None, Option("--threads", "CPU threads (default: all).")] = None
    mirroring: Annotated[bool, Option("--mirroring/--disable_tta", "Mirror as the model was trained, or not.")] = True
    keep_largest: Annotated[tuple[str, ...], Option("--keep-largest", "As of `predict`.")] = ()
    min_size: Annotated[str | None, Option("--min-size", "As of `predict`.")] = None
    fill_holes: Annotated[tuple[str, ...], Option("--fill-holes", "As of `predict`.")] = ()

    def __post_init__(self) -> None:
        """Raises SpecError with all problems."""
        problems = []
        if self.precision not in (known := get_args(Precision)):
            problems.append(f"--precision: got {self.precision!r}, expected one of {', '.join(known)}")
        if self.threads is not None and self.threads < 1:
            problems.append(f"--threads: got {self.threads}, expected at least 1")
        if problems:
            raise SpecError("\n".join(problems))

    def changes(self) -> dict[str, Any]:
        """The settings that change labels and are not their defaults: one more changes nothing for the others."""
        names = ("precision", "mirroring", "keep_largest", "min_size", "fill_holes")
        defaults = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}
