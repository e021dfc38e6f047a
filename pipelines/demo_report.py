"""What the demo leaves: one table on the screen, the same as JSON, and one picture."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastnnunet.bench.benchmark import prediction_folder
from fastnnunet.bench.job import ENSEMBLE, SINGLE
from fastnnunet.bench.report.numbers import seconds
from fastnnunet.bench.report.plot import save_png
from fastnnunet.bench.report.slices import draw_slice, read_grey
from fastnnunet.evaluate.segmentations import read_segmentation
from fastnnunet.nnunet.files.plans import read_json
from fastnnunet.specs.provenance import write_json
from pipelines.demo_stages import Demo, cache_statistics


def report(demo: Demo, elapsed_s: dict[str, float]) -> None:
    """Write demo.json and demo.png into the demo's folder and print the table."""
    benchmark = read_json(demo.benchmark_file)
    labels = [name for name in next(iter(benchmark["arms"].values()))["metrics"] if name != "foreground_mean"]
    record = {
        "created": benchmark["created"],
        "hardware": benchmark["hardware"],
        "versions": benchmark["versions"],
        "threads": benchmark["threads"],
        "spec": demo.spec,
        "held_out_cases": benchmark["cases"],
        "rows": [_row(name, arm, labels) for name, arm in benchmark["arms"].items()],
        "cache": cache_statistics(demo),
        "elapsed_s": elapsed_s,
        "total_elapsed_s": sum(elapsed_s.values()),
        "benchmark": str(demo.benchmark_file.relative_to(demo.out)),
    }
    write_json(demo.out / "demo.json", record)
    _picture(demo, benchmark, demo.out / "demo.png")
    console = Console()
    console.print(_table(record, labels))
    for line in (
        f"table: {demo.out / 'demo.json'}",
        f"picture: {demo.out / 'demo.png'}",
        "your own nnU-Net: README.md, I trained an nnU-Net",
        f"next, predict with a student: {_next_command(demo)}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _next_command(demo: Demo) -> str:
    """Prediction of the held-out volumes by the smallest student."""
    fastnnunet, model = Path(sys.executable).with_name("fastnnunet"), demo.bundle(max(demo.spec.sizes))
    words = [fastnnunet, "predict", "-i", demo.raw / "imagesTs", "-o", demo.out / "predicted", "-m", model]
    return shlex.join(_from_here(word) for word in words)


def _from_here(word: str | Path) -> str:
    """A path as one types it in this folder."""
    here = Path.cwd()
    return str(word.relative_to(here) if isinstance(word, Path) and word.is_relative_to(here) else word)


def _row(name: str, arm: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    return {
        "name": {ENSEMBLE: "ensemble", SINGLE: "one fold"}.get(name, arm.get("bundle")),
        "arm": name,
        "dice": {label: arm["metrics"][label]["dice"] for label in labels},
        "mean_dice": arm["metrics"]["foreground_mean"]["dice"],
        "seconds_per_case": arm["median_s"],
        "times_faster_than_ensemble": arm["times_faster_than_ensemble"],
        "times_faster_than_single_fold": arm["times_faster_than_single_fold"],
        "parameters": arm["parameters"],
        "size_bytes": arm["size_bytes"],
        "parity": arm.get("parity"),
    }


def _table(record: dict[str, Any], labels: list[str]) -> Table:
    """Models as columns, so that any number of labels fits a terminal."""
    rows, cache = record["rows"], record["cache"]
    table = Table(
        title=f"{len(record['held_out_cases'])} held-out volumes, {record['threads']} threads",
        caption=f"soft-label cache: {cache['bytes_per_voxel']:.3f} bytes per voxel, float16 would be "
        f"{cache['float16_bytes_per_voxel']}\neverything took {record['total_elapsed_s'] / 60:.1f} min",
    )
    table.add_column("")
    for row in rows:
        table.add_column(row["name"].replace("_", " "), justify="right")
    for label in labels:
        table.add_row(f"Dice {label}", *(f"{row['dice'][label]:.3f}" for row in rows))
    table.add_row("Dice mean", *(f"{row['mean_dice']:.3f}" for row in rows), style="bold", end_section=True)
    table.add_row("time per case", *(seconds(row["seconds_per_case"]) for row in rows))
    table.add_row("x faster than the ensemble", *(f"{row['times_faster_than_ensemble']:.3g}" for row in rows))
    table.add_row("x faster than one fold", *(f"{row['times_faster_than_single_fold']:.3g}" for row in rows))
    table.add_row("parameters", *(f"{row['parameters'] / 1e6:.2f} M" for row in rows))
    table.add_row("size of the weights", *(f"{row['size_bytes'] / 1e6:.1f} MB" for row in rows))
    return table


def _picture(demo: Demo, benchmark: dict[str, Any], path: Path) -> None:
    """Image, truth, ensemble and students side by side: two held-out cases, the slice with most of the last label."""
    from matplotlib.figure import Figure

    arms = [name for name in benchmark["arms"] if name != SINGLE]
    columns = ["image", "truth", *arms]
    figure = Figure(figsize=(2.6 * len(columns), 5.6), layout="constrained")
    axes = figure.subplots(2, len(columns))
    for row, case in enumerate(benchmark["cases"][:2]):
        image = read_grey(demo.raw / "imagesTs" / f"{case}_0000.nii.gz")
        truth = read_segmentation(demo.raw / "labelsTs" / f"{case}.nii.gz")
        z = int(np.argmax((truth.labels_zyx == truth.labels_zyx.max()).sum(axis=(1, 2))))
        aspect = truth.spacing_mm[1] / truth.spacing_mm[2]
        for axis, column in zip(axes[row], columns, strict=True):
            labels = None
            if column != "image":
                predicted = prediction_folder(demo.benchmark_file.parent, column)
                folder = demo.raw / "labelsTs" if column == "truth" else predicted
                labels = read_segmentation(folder / f"{case}.nii.gz").labels_zyx[z]
            draw_slice(axis, image[z], labels, (-160, 240), aspect)
            if row == 0:
                axis.set_title(_caption(benchmark, column), fontsize=9)
    save_png(figure, path)


def _caption(benchmark: dict[str, Any], column: str) -> str:
    arm = benchmark["arms"].get(column)
    if arm is None:
        return column
    name = "teacher ensemble" if column == ENSEMBLE else column
    return f"{name}\nDice {arm['metrics']['foreground_mean']['dice']:.3f}, {seconds(arm['median_s'])}"
