"""`fastnnunet evaluate`: Dice and surface Dice of a folder of predictions."""

from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.errors import SpecError


def evaluate(
    predictions: Annotated[Path, typer.Option("-p", "--predictions", help="Folder of predicted segmentations.")],
    labels: Annotated[Path, typer.Option("-g", "--labels", help="Folder of true segmentations, same file names.")],
    dataset_json: Annotated[
        Path | None,
        typer.Option("-dj", "--dataset-json", help="Names of labels and regions; found by itself beside the files."),
    ] = None,
    tolerance_mm: Annotated[float, typer.Option("--tolerance", help="Tolerance of the surface Dice in mm.")] = 1.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the full report as JSON.")] = None,
    processes: Annotated[int, typer.Option("-np", help="Worker processes.")] = 1,
    chill: Annotated[bool, typer.Option("--chill", help="Compare the cases both folders have.")] = False,
) -> None:
    """Compare predictions with the truth: Dice, surface Dice at a tolerance and HD95 per label and case.

    Example:

      fastnnunet evaluate -p predictions -g labelsTs -o scores.json
    """
    from rich.progress import track

    from fastnnunet.evaluate import segmentations as files
    from fastnnunet.evaluate.cases import evaluate_cases, report
    from fastnnunet.evaluate.tables import case_table, mean_table, wide_console
    from fastnnunet.images.overlap import refuse_overlap
    from fastnnunet.specs.provenance import write_json
    from fastnnunet.system.files import check_output_folder

    if output is not None and output.suffix != ".json":
        raise SpecError(f"-o: got {output}, expected a file name ending in .json")
    if output is not None:
        if output.is_dir():
            raise SpecError(f"-o: {output} is a folder, expected a file name")
        check_output_folder(output.parent)
    if tolerance_mm < 0:
        raise SpecError(f"--tolerance: got {tolerance_mm}, expected 0 mm or more")
    described = dataset_json or files.find_dataset_json(predictions, labels)
    label_set = files.labels_from_dataset_json(described) if described else files.labels_from_files(labels)
    pairing = files.pair_cases(predictions, labels, label_set.file_ending)
    if not chill:
        files.require_complete(pairing)
    if output is not None:
        read = files.files_read((predictions, labels), pairing, label_set.file_ending)
        refuse_overlap([*read, *([described] if described else [])], [output])
    console = wide_console()
    found = evaluate_cases(predictions, labels, pairing.cases, label_set, tolerance_mm, processes)
    results = list(track(found, "evaluating", total=len(pairing.cases), console=console, transient=True))
    record = report(results, label_set, pairing, tolerance_mm, (predictions, labels))
    console.print(case_table(results, label_set))
    console.print(mean_table(record["mean"], tolerance_mm))
    for name in ("without_prediction", "without_label"):
        if record[name]:
            console.print(f"left out, {name.replace('_', ' ')}: {', '.join(record[name])}")
    if output is not None:
        write_json(output, record)
        console.print(f"report: {output}")
