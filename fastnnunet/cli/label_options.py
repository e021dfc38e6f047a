"""Options for tidying label maps, the same wherever they are offered."""

from pathlib import Path
from typing import Annotated

import typer

_WORDS = "'all' (the foreground as one structure), 'each', names or numbers of labels, a+b for both as one"
KeepLargest = Annotated[
    list[str] | None,
    typer.Option("--keep-largest", help=f"Keep only the largest component of: {_WORDS}. Alone: all."),
]
MinSize = Annotated[
    str | None,
    typer.Option("--min-size", help="Remove components of a label smaller than this: 20 (voxels) or 50mm3."),
]
FillHoles = Annotated[
    list[str] | None,
    typer.Option("--fill-holes", help="Fill background enclosed by: 'each' label, names or numbers. Alone: each."),
]
PostprocessingFile = Annotated[
    Path | None,
    typer.Option("-pp_pkl_file", "--pp_pkl_file", help="nnU-Net's postprocessing.pkl or .json; no code in it is run."),
]
