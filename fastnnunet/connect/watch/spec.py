"""Which folder is watched, where results go, and how long an image must have been left alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.specs.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSpec:
    """Times are seconds."""

    source: Annotated[Path, Option("-i --input", "Folder to watch: image files, or folders of DICOM slices.", True)]
    output: Annotated[Path, Option("-o --output", "Folder for results; not in the watched one.", True)]
    settle_s: Annotated[float, Option("--settle", "Seconds without a change after which an image is complete.")] = 10.0
    every_s: Annotated[float, Option("--every", "Seconds between two looks at the folder.")] = 2.0
    once: Annotated[bool, Option("--once", "End when all that is there is predicted.")] = False

    def __post_init__(self) -> None:
        """Raises SpecError with all problems, NotFoundError where there is no folder."""
        problems = []
        if self.settle_s < 0:
            problems.append(f"--settle: got {self.settle_s}, expected 0 s or more")
        if not self.every_s > 0:
            problems.append(f"--every: got {self.every_s}, expected seconds above 0")
        source, output = self.source.resolve(), self.output.resolve()
        if output == source or source in output.parents:
            problems.append(f"-o: {self.output} is in the watched folder, where results would be taken for images")
        if problems:
            raise SpecError("\n".join(problems))
        if not self.source.is_dir():
            raise NotFoundError(f"no folder to watch at {self.source}; make it first")
