"""`fastnnunet cache`: soft labels of the teacher ensemble, computed once and stored."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastnnunet.cli.guard import SAME_COMMAND, going_on
from fastnnunet.cli.parts import options, published
from fastnnunet.cli.parts.choices import recipe_of, teacher_of
from fastnnunet.cli.parts.fields import Asked, spread
from fastnnunet.cli.parts.soft_maps import import_maps
from fastnnunet.errors import NotFoundError, SpecError
from fastnnunet.specs.cache import CacheSpec, TeacherEngine

if TYPE_CHECKING:
    from fastnnunet.cache.job import CacheJob
    from fastnnunet.cache.store.folder import CacheFolder
    from fastnnunet.cache.store.storage import Place
    from fastnnunet.events import Listener
    from fastnnunet.nnunet.files.model import ModelFolder
    from fastnnunet.specs.teacher import TeacherSpec
    from fastnnunet.teachers.images import UnlabelledJob

app = typer.Typer(
    no_args_is_help=True,
    help="Stage 1: run the teacher ensemble once over every case and store its soft labels.",
)

AnyDataset = Annotated[str | None, options.ask("-d --dataset", "Data set id or name (default: all).")]
Images = Annotated[
    Path | None,
    options.ask(
        "--images", "Label this folder of images without labels instead (CASE_0000.nii.gz ...).", options.CASES
    ),
]
SetName = Annotated[
    str | None, options.ask("--name", "With --images: name of the set (default: the folder's).", options.CASES)
]
Cases = Annotated[
    list[str] | None, options.ask("--case", "Only these cases; damaged ones are replaced.", options.CASES)
]
Workers = Annotated[int | None, options.ask("--workers", "Processes; 0: none but this one.", options.RUN, min=0)]
Threads = Annotated[int | None, options.ask("--threads", "CPU threads per process.", options.RUN, min=1)]
MemoryLimit = Annotated[
    float, options.ask("--memory-limit", "GiB a worker may use beyond the teacher's weights.", options.RUN, min=0.1)
]
LeftCache = Annotated[
    str, typer.Argument(metavar="A", help="Folder or URL of a cache, or the first digits of its key.")
]
RightCache = Annotated[str, typer.Argument(metavar="B", help="The other one.")]
Engine = Annotated[TeacherEngine | None, options.option(CacheSpec, "engine", panel=options.TEACHER)]
WhichCache = Annotated[str | None, typer.Argument(help="Folder or URL of the cache, or the first digits of its key.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which cache is meant."""

    teacher: "TeacherSpec"
    recipe: CacheSpec
    recipe_file: Path | None
    place: "Place | None"


@app.command("build")
@spread
def build(
    context: typer.Context,
    teacher: options.TeacherOrModel,
    fold: options.Folds = None,
    spec: options.SpecFile = None,
    temperature: options.Temperature = None,
    engine: Engine = None,
    root: options.CacheRoot = None,
    previous: options.Previous = None,
    images: Images = None,
    name: SetName = None,
    case: Cases = None,
    workers: Workers = None,
    threads: Threads = None,
    scheduler: Annotated[
        str | None, options.ask("--scheduler", "Use this dask cluster, e.g. tcp://host:8786.", options.RUN)
    ] = None,
    memory_limit: MemoryLimit = 4.0,
    model: published.Model = None,
    scans: published.OptionalScans = None,
    work: published.Work = None,
    no_mirroring: published.NoMirroring = False,
    hold_out: published.HoldOut = None,
    keep_all: published.KeepAll = None,
    allow_code: options.AllowCode = False,
) -> None:
    """Label every case with the teacher ensemble. Interrupt it at any time: the same command resumes.

    Example:

      fastnnunet cache build -d 4 -c 3d_fullres -f 0 1 2 3 4 --spec cache_specs/default.yaml

    Images without labels, for fastnnunet train --unlabelled, are preprocessed with the teacher's plans and labelled by
    all given folds; new and changed images are noticed:

      fastnnunet cache build -d 4 -c 3d_fullres --images more_scans

    The first stage of `fastnnunet distill images` alone, without a data set:

      fastnnunet cache build -m MODEL -i scans --work work
    """
    from fastnnunet.cli.parts.cache_view import cache_view, print_summary

    if published.asks_for_scans(context, scans, ("root", "previous", "images", "name", "case", "scheduler")):
        from fastnnunet.api import label_images

        with going_on(SAME_COMMAND), cache_view() as view:
            ready = label_images(
                published.named_model(context, teacher, model, fold),
                published.required(scans),
                published.required(work),
                recipe=published.scans_recipe(spec, temperature, engine, no_mirroring),
                recipe_file=spec,
                held_out=hold_out,
                keep_all=keep_all,
                workers=workers or 0,
                threads=threads,
                progress=view,
            )
        published.print_scans(ready)
        published.print_training_command(ready)
        return
    from fastnnunet.api import label

    request = _request(teacher, fold, previous, spec, temperature, engine, root)
    workers, threads = _parallelism(workers, threads, request.recipe.engine)
    _require_images(images, name)
    with going_on(SAME_COMMAND), cache_view() as view:
        labelled = label(
            request.teacher,
            request.recipe,
            recipe_file=request.recipe_file,
            root=request.place,
            images=images,
            name=name,
            cases=case,
            workers=workers,
            threads=threads,
            scheduler=scheduler,
            memory_limit_bytes=int(memory_limit * 2**30),
            progress=view,
        )
    print_summary(labelled.cache)
    if labelled.unlabelled is not None:
        print(f"train with: --unlabelled {labelled.unlabelled}")


@app.command("plan")
@spread
def plan(
    teacher: options.Teacher,
    fold: options.Folds = None,
    spec: options.SpecFile = None,
    temperature: options.Temperature = None,
    engine: Engine = None,
    root: options.CacheRoot = None,
    previous: options.Previous = None,
    images: Images = None,
    name: SetName = None,
    case: Cases = None,
    workers: Workers = None,
    threads: Threads = None,
    memory_limit: MemoryLimit = 4.0,
    allow_code: options.AllowCode = False,
    timing: Annotated[
        bool, options.ask("--time/--no-time", "Load the teacher and time one patch.", options.RUN)
    ] = True,
) -> None:
    """Say what a build would write, need and take. Writes nothing; exit code 2 when disk or memory is too small.

    Example:

      fastnnunet cache plan -d 4 -c 3d_fullres --workers 2
    """
    from fastnnunet.cache.plan import plan_cache, require_memory, require_space
    from fastnnunet.cache.store.folder import require_root
    from fastnnunet.cli.parts.cache_view import cache_view, print_plan, print_preprocessing
    from fastnnunet.nnunet.files.model import model_folder_of

    request = _request(teacher, fold, previous, spec, temperature, engine, root)
    workers, threads = _parallelism(workers, threads, request.recipe.engine)
    files = model_folder_of(request.teacher, keep=request.teacher.folds if timing else ())
    unlabelled = _unlabelled(request, images, name, files)
    missing: list[str] = []
    with cache_view() as view:
        if unlabelled is None:
            job = _job(request, files, view)
        else:
            expected, missing = unlabelled.expected(workers, view)
            job = unlabelled.cache_job(expected if missing else unlabelled.target.cases, view)
    todo = job.todo(case)
    require_root(job.root)
    loaded = job.factory.load(threads) if timing and todo else None
    if unlabelled is not None:
        size_bytes = unlabelled.require_preprocessing_space(job, missing)
        print_preprocessing(unlabelled.target.cases_folder, len(missing), len(job.cases), size_bytes)
    planned = plan_cache(job, teacher=loaded, workers=max(1, workers), only=case)
    print_plan(planned, None if not missing else f"under {job.root}, named once the images are preprocessed")
    if todo:
        require_space(job, todo)
        require_memory(job, todo, int(memory_limit * 2**30))


app.command("import")(import_maps)


@app.command("list")
def list_caches(dataset: AnyDataset = None, root: options.CacheRoot = None) -> None:
    """List the caches that exist, finished or not.

    Example:

      fastnnunet cache list -d 4
    """
    from fastnnunet.cli.parts.cache_view import print_list

    print_list(_all_folders(dataset, root))


@app.command("info")
def info(cache: WhichCache = None, dataset: AnyDataset = None, root: options.CacheRoot = None) -> None:
    """Show one cache: what it is made from, by what, and how large and how accurate it is.

    Example:

      fastnnunet cache info 40467043
    """
    from fastnnunet.cli.parts.cache_view import print_info

    print_info(_select(cache, dataset, root))


@app.command("verify")
def verify(cache: WhichCache = None, dataset: AnyDataset = None, root: options.CacheRoot = None) -> None:
    """Read a whole cache again and check every digest, chunk and value. Exit code 1 when anything is not right.

    Example:

      fastnnunet cache verify 40467043
    """
    from fastnnunet.cache.verify import verify_cache
    from fastnnunet.cli.parts.cache_view import cache_view, print_reports

    folder = _select(cache, dataset, root)
    with cache_view() as view:
        reports = verify_cache(folder, view)
    if not print_reports(folder, reports):
        raise typer.Exit(1)


@app.command("diff")
def diff(left: LeftCache, right: RightCache, dataset: AnyDataset = None, root: options.CacheRoot = None) -> None:
    """Name what makes two caches different: every field of their identities, A -> B. Exit code 1 when they differ.

    What changes no stored value (place, chunks, compression) is not compared.

    Example:

      fastnnunet cache diff 40467043 9f3c
    """
    from fastnnunet.cli.parts.cache_view import print_differences

    if not print_differences(_select(left, dataset, root), _select(right, dataset, root)):
        raise typer.Exit(1)


@app.command("gc")
def gc(
    dataset: AnyDataset = None,
    root: options.CacheRoot = None,
    damaged: Annotated[bool, options.ask("--damaged", "Read every case and remove the damaged ones too.")] = False,
    dry_run: Annotated[bool, options.ask("--dry-run", "Only say what would be removed.")] = False,
) -> None:
    """Remove what interrupted builds left behind. Valid cases and the work of running builders are never touched.

    What --damaged removes, `cache build` makes again.

    Example:

      fastnnunet cache gc -d 4 --dry-run
    """
    from fastnnunet.cache.gc import collect_garbage
    from fastnnunet.cli.parts.cache_view import cache_view, print_leftovers

    leftovers = []
    with cache_view() as view:
        for place in _roots(dataset, root):
            leftovers += collect_garbage(place, damaged=damaged, dry_run=dry_run, progress=view)
    print_leftovers(leftovers, dry_run=dry_run)


def _request(
    teacher: Asked,
    folds: list[str] | None,
    previous: str | None,
    spec_file: Path | None,
    temperature: float | None,
    engine: str | None,
    root: str | None,
) -> "Request":
    """Teacher, recipe and place as the options name them. Raises SpecError, NotFoundError."""
    from fastnnunet.cache.store.storage import place_at

    place = None if root is None else place_at(root)
    ensemble = teacher_of(teacher, folds, previous)
    recipe = recipe_of(spec_file, temperature, engine)
    if temperature is not None and recipe.temperature_range is not None:
        raise SpecError("--temp: this recipe serves every temperature of its temperature_range; leave --temp out")
    return Request(teacher=ensemble, recipe=recipe, recipe_file=spec_file, place=place)


def _job(request: "Request", files: "ModelFolder", progress: "Listener") -> "CacheJob":
    """Join nnU-Net's cases and teacher with a cache recipe."""
    from fastnnunet.teachers.jobs import cache_job

    return cache_job(
        request.teacher,
        request.recipe,
        root=request.place,
        spec_file=request.recipe_file,
        progress=progress,
        files=files,
    )


def _unlabelled(
    request: "Request", images: Path | None, name: str | None, files: "ModelFolder"
) -> "UnlabelledJob | None":
    """The unlabelled images that are asked for, or None. Raises SpecError, NotFoundError."""
    _require_images(images, name)
    if images is None:
        return None
    from fastnnunet.teachers.images import open_images

    return open_images(request.teacher, request.recipe, images, name, request.place, request.recipe_file, files)


def _require_images(images: Path | None, name: str | None) -> None:
    if images is None and name is not None:
        raise SpecError(f"--name {name} names a set of unlabelled images; give their folder with --images")


def _parallelism(workers: int | None, threads: int | None, engine: str) -> tuple[int, int]:
    """Processes and threads per process: what was asked for, else up to four processes that share the CPUs.

    With a GPU one process, since all of them would share it. Raises BackendError when the engine needs one.
    """
    from fastnnunet.engines.labelling import resolve_device
    from fastnnunet.engines.registry import available_cores

    on_gpu = engine != "auto" and resolve_device(engine).kind == "cuda"
    cpus = available_cores()
    if workers is None:
        import torch

        workers = 1 if on_gpu or torch.cuda.is_available() else min(4, cpus)
    return workers, threads or max(1, cpus // max(1, workers))


def _roots(dataset: str | None, root: str | None) -> "list[Place]":
    """`root`, or the folders of caches beside the preprocessed cases of one or all data sets."""
    from fastnnunet.cache.store.storage import place_at
    from fastnnunet.nnunet.files.paths import nnunet_folder, resolve_dataset

    if root is not None:
        place = place_at(root)
        if not place.is_dir():
            raise NotFoundError(_no_place(place))
        return [place]
    base = nnunet_folder("nnUNet_preprocessed")
    folders = base.glob("Dataset*") if dataset is None else [base / resolve_dataset(dataset)]
    return [*sorted(caches for folder in folders for caches in folder.glob("fastnnunet_*"))]


def _no_place(place: "Place") -> str:
    if isinstance(place, Path):
        return f"--root {place} is not a folder"
    return (
        f"--root {place}: nothing is stored there, or there is no such bucket\n"
        "expected a bucket and prefix that hold caches; make one with: fastnnunet cache build -d DATASET "
        f"--root {place}"
    )


def _all_folders(dataset: str | None, root: str | None) -> "list[Place]":
    """Every cache folder under `root`, or beside the preprocessed cases of one or all data sets."""
    from fastnnunet.cache.store.folder import cache_folders

    return [folder for caches in _roots(dataset, root) for folder in cache_folders(caches)]


def _select(which: str | None, dataset: str | None, root: str | None) -> "CacheFolder":
    """The cache meant by a path, by the start of a key, or by being the only one."""
    from fastnnunet.cache.store.folder import open_cache
    from fastnnunet.cache.store.storage import place_at

    if which is not None and "://" in which:
        return open_cache(place_at(which))
    if which is not None and Path(which).is_dir():
        return open_cache(Path(which).resolve())
    folders = _all_folders(dataset, root)
    matching = [folder for folder in folders if folder.name.startswith(which or "")]
    if not matching:
        raise NotFoundError(
            f"no soft-label cache {f'{which} ' if which else ''}found\n"
            f"there are: {', '.join(folder.name for folder in folders) or 'none'}\n"
            "expected a cache folder or the first digits of a key; see: fastnnunet cache list"
        )
    if len(matching) > 1:
        raise SpecError(
            "which cache? there are several:\n"
            + "\n".join(f"  {folder}" for folder in matching)
            + "\ngive the folder, more digits of the key, -d or --root"
        )
    return open_cache(matching[0])
