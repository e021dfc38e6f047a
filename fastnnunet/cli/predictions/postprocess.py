"""`fastnnunet postprocess`: tidy label maps, as nnUNetv2_apply_postprocessing does and more."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.cli.parts import options


def postprocess(
    source: Annotated[Path, typer.Option("-i", "--input", help="Folder of predictions.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results, under the same names.")],
    pp_pkl_file: options.PostprocessingFile = None,
    keep_largest: options.KeepLargest = None,
    min_size: options.MinSize = None,
    fill_holes: options.FillHoles = None,
    workers: Annotated[int, typer.Option("-np", "--workers", min=1, help="Files at a time.")] = 2,
    plans_json: Annotated[
        Path | None, typer.Option("-plans_json", "--plans_json", help="Default: plans.json among the predictions.")
    ] = None,
    dataset_json: Annotated[
        Path | None, typer.Option("-dataset_json", "--dataset_json", help="Default: dataset.json among them.")
    ] = None,
) -> None:
    """Postprocess a folder of predictions: nnU-Net's postprocessing.pkl, largest components, small pieces, holes.

    Steps of a file come first, then largest components, small pieces and holes. A label map that cannot be read is
    reported and left out, and the exit code is 1.

    Examples:

      fastnnunet postprocess -i predictions -o cleaned -pp_pkl_file postprocessing.pkl

      fastnnunet postprocess -i predictions -o cleaned --keep-largest liver spleen --min-size 50mm3 --fill-holes
    """
    from fastnnunet.errors import LINES, SpecError, printable
    from fastnnunet.events import Event, Result
    from fastnnunet.images.tidy.folder import postprocess_folder, read_label_source
    from fastnnunet.images.tidy.rules import cleanup_from_words

    labels = read_label_source(source, plans_json, dataset_json)
    cleanup = cleanup_from_words(
        labels.labels,
        keep_largest=keep_largest or (),
        min_size=min_size,
        fill_holes=fill_holes or (),
        postprocessing_file=pp_pkl_file,
    )
    if cleanup is None:
        raise SpecError("nothing to do: give -pp_pkl_file, --keep-largest, --min-size or --fill-holes")

    failed = 0

    def show(event: Event) -> None:
        nonlocal failed
        if isinstance(event, Result) and event.value is not None:
            failed += 1
            print(f"failed: {printable(event.what)}: {printable(event.value, keep=LINES)}", file=sys.stderr)

    total = postprocess_folder(source, output, labels, cleanup, workers=workers, progress=show)
    print(f"{total - failed} label map(s) postprocessed into {output}")
    if failed:
        print(f"{failed} label map(s) failed, see above", file=sys.stderr)
        raise typer.Exit(1)
