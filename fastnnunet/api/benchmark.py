"""`benchmark`: bundles beside nnU-Net's own predictor, with record, plot and page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastnnunet.events import Listener, ignore

if TYPE_CHECKING:
    from fastnnunet.bench.job import BenchmarkJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmarked:
    """A record and the files it was written to."""

    record: dict[str, Any]
    file: Path
    plot: Path
    page: Path | None

    @property
    def table(self) -> str:
        """The arms, a line each."""
        from fastnnunet.bench.report.table import benchmark_table
        from fastnnunet.evaluate.tables import wide_console

        console = wide_console()
        with console.capture() as captured:
            console.print(benchmark_table(self.record))
        return captured.get().rstrip("\n")


def benchmark(
    job: "BenchmarkJob",
    *,
    command: Sequence[str],
    file: Path | None = None,
    page: Path | None = None,
    progress: Listener = ignore,
) -> Benchmarked:
    """Measure, and write the record as JSON (`file`; default: in the job's output, named by the time), with a plot.

    `command`: the words by which it can be repeated. `page`: also an HTML page, one file without links.
    Raises what `fastnnunet.bench.benchmark.run_benchmark` raises, and NotFoundError and the like where nothing can be
    written, before anything is measured.
    """
    import shlex

    from fastnnunet.bench.benchmark import run_benchmark
    from fastnnunet.bench.report.headline import headline
    from fastnnunet.bench.report.plot import plot_benchmark
    from fastnnunet.specs.provenance import write_json
    from fastnnunet.system.files import check_output_folder

    for folder in (job.output, *([] if page is None else [page.parent])):
        check_output_folder(folder)
    record = run_benchmark(job, progress, [] if page is None else [page])
    record["command"] = shlex.join(command)
    record["summary"] = headline(record)
    stamp = record["created"][:19].replace("-", "").replace(":", "")
    file = file or job.output / f"benchmark_{stamp}.json"
    plot = file.with_suffix(".png")
    write_json(file, record)
    plot_benchmark(record, plot)
    if page is not None:
        from fastnnunet.bench.report.page import pictures_of, write_page

        write_page(record, pictures_of(record, job.images, job.labels, job.output), page)
    return Benchmarked(record=record, file=file, plot=plot, page=page)


def raw_folder(dataset: str) -> Path:
    """Where nnU-Net has the images of a data set, by its id or name. Raises NotFoundError."""
    from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset

    return nnunet_folder("nnUNet_raw") / resolve_dataset(dataset)
