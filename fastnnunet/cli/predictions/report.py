"""`fastnnunet report`: a page of a folder of predictions."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of predictions.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: report.html in the folder.")] = None,
    images: Annotated[
        Path | None,
        typer.Option("-i", "--images", help="Folder that was predicted: for cases without --statistics and --preview."),
    ] = None,
) -> None:
    """One page of a folder of predictions: volumes of every label and case, pictures, and what stands out.

    It is one file that needs no other and opens no connection. What `predict --statistics --preview` left is shown as
    it is, the rest is made of the label maps. Exit code 1 where some cases cannot be read; the page names them.

    Examples:

      fastnnunet report predictions

      fastnnunet report predictions -i imagesTs -o predictions.html
    """
    from fastnnunet.api import View, write_report
    from fastnnunet.errors import printable

    with View() as view:
        done = write_report(folder, output, images=images, progress=view)
    print(f"{done.cases} case(s) in {printable(done.page)}")
    for (case, label), what in sorted(done.outliers.items()):
        print(f"{printable(case)}: {printable(label)} is {what}")
    for reason in done.failed.values():
        print(printable(reason, keep="\n"), file=sys.stderr)
    if done.failed:
        raise typer.Exit(1)
