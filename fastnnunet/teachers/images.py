"""Images without labels: preprocessed, and labelled by the teacher into a cache of their own.

No fold of the teacher saw these images, so all chosen folds label them whatever the recipe's policy says. Their cache
is an ordinary one; its key differs from that of the data set's own because the digests of the images do.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastnnunet.cache.interfaces import CaseSource
from fastnnunet.cache.job import CacheJob, prepare_job
from fastnnunet.cache.plan import free_bytes
from fastnnunet.cache.store.folder import CacheFolder
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.shard import chunk_for
from fastnnunet.cache.store.storage import Place
from fastnnunet.errors import DiskSpaceError, NotFoundError, SpecError
from fastnnunet.events import Listener, ignore
from fastnnunet.nnunet.files.model import ModelFolder, model_folder_of
from fastnnunet.nnunet.files.plans import configuration_of, label_manager_of
from fastnnunet.nnunet.unlabelled.foreground import (
    SEGMENTATION,
    as_segmentation,
    sample_foreground,
    write_locations,
    write_segmentation,
)
from fastnnunet.nnunet.unlabelled.parallel import finish_each
from fastnnunet.nnunet.unlabelled.previous import UnlabelledCascadeCases
from fastnnunet.nnunet.unlabelled.sets import (
    ImageSet,
    UnlabelledCases,
    default_name,
    expected_shapes,
    name_for,
    preprocess_images,
    require_other_images,
    resolve_set,
)
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.system.words import size_text
from fastnnunet.teachers.data_set import open_teacher
from fastnnunet.teachers.jobs import build_command
from fastnnunet.teachers.nnunet import NnUNetTeacher
from fastnnunet.teachers.stages import first_stage_cases, label_first


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlabelledJob:
    """A set of images, a teacher and a recipe; make one with `open_images`."""

    target: ImageSet
    images: Path
    data_set: CaseSource | None  # labelled cases that the images must not be
    factory: NnUNetTeacher
    spec: CacheSpec
    root: Place
    command: str  # what a person types to bring everything up to date
    first: NnUNetTeacher | None = None  # of a cascade: the teacher of its first stage

    @property
    def labelled(self) -> tuple[str, ...]:
        """Ids of the data set's own cases."""
        return () if self.data_set is None else tuple(self.data_set.case_ids)

    def refuse_labelled(self, job: CacheJob) -> None:
        """Refuse images of `job` that the data set has with labels; of these only those of the same shape are read.

        Raises MismatchError.
        """
        if self.data_set is not None:
            shapes = {job.source.shape_zyx(case) for case in job.cases}
            alike = [case for case in self.data_set.case_ids if self.data_set.shape_zyx(case) in shapes]
            require_other_images(job.cases, {case: self.data_set.digest(case) for case in alike})

    def preprocess(
        self, processes: int, progress: Listener = ignore, threads: int | None = None
    ) -> "UnlabelledCases | UnlabelledCascadeCases":
        """See `preprocess_images`, and `label_first`, which has `threads`, for a cascade."""
        return self.label_first(self.preprocess_alone(processes, progress), threads, progress)

    def preprocess_alone(self, processes: int, progress: Listener = ignore) -> UnlabelledCases:
        """The images without the labels of a cascade's first stage; see `preprocess_images`."""
        return preprocess_images(self.target, self.images, self.labelled, processes, progress)

    def label_first(
        self, cases: UnlabelledCases, threads: int | None = None, progress: Listener = ignore
    ) -> "UnlabelledCases | UnlabelledCascadeCases":
        """What the teacher sees of preprocessed images; of a cascade see `label_first` of `stages`."""
        return cases if self.first is None else label_first(self.target, self.images, self.first, threads, progress)

    def finished(self) -> "UnlabelledCases | UnlabelledCascadeCases":
        """The cases as `preprocess` left them. Raises NotFoundError, CorruptError."""
        return self.target.cases if self.first is None else first_stage_cases(self.target, self.first)

    def expected(self, processes: int, progress: Listener = ignore) -> "tuple[ExpectedCases, list[str]]":
        """The cases as they are or will be, and those not preprocessed yet; writes nothing."""
        shapes, missing = expected_shapes(self.target, self.images, self.labelled, processes, progress)
        return ExpectedCases(shapes), missing

    def require_preprocessing_space(self, job: CacheJob, missing: Sequence[str]) -> int:
        """Bytes that preprocessing these cases would write at most. Raises DiskSpaceError."""
        voxels = sum(map(job.voxels, missing))
        size_bytes = voxels * (4 * self.factory.num_channels + 2)  # float32 image and int16 segmentation, uncompressed
        free = free_bytes(self.target.folder)
        if size_bytes > free:
            raise DiskSpaceError(
                f"not enough disk space for {len(missing)} preprocessed images in {self.target.folder}\n"
                f"  got      {size_text(free)} free\n  expected {size_text(size_bytes)}\nfree some space"
            )
        return size_bytes

    def cache_job(
        self, cases: "UnlabelledCases | UnlabelledCascadeCases | ExpectedCases", progress: Listener = ignore
    ) -> CacheJob:
        """The cache of these cases."""
        return prepare_job(cases, self.factory, self.spec, self.root, command=self.command, progress=progress)


@dataclass(frozen=True, slots=True)
class ExpectedCases:
    """Shapes of cases that need not be preprocessed yet: what a plan needs."""

    shapes: dict[str, tuple[int, int, int]]

    @property
    def case_ids(self) -> tuple[str, ...]:
        return tuple(sorted(self.shapes))

    def shape_zyx(self, case_id: str) -> tuple[int, int, int]:
        return self.shapes[case_id]

    def image_CZYX(self, case_id: str) -> np.ndarray:
        raise NotFoundError(f"case {case_id} is not preprocessed yet")

    def digest(self, case_id: str) -> str:
        """The same for all: the key of the cache is not known before they are preprocessed."""
        return "not preprocessed"


def open_images(
    teacher: TeacherSpec,
    spec: CacheSpec,
    images: Path | None,
    name: str | None = None,
    root: Place | None = None,
    spec_file: Path | None = None,
    files: ModelFolder | None = None,
) -> UnlabelledJob:
    """Join a folder of images with teacher and recipe; nothing is written. Without `images` those of the set `name`.

    `files`: as of `cache_job`.

    Raises SpecError for a cascade stage or an impossible name, and what `open_teacher` raises.
    """
    files = files or model_folder_of(teacher)
    _refuse_cascade(files)
    recipe = replace(spec, policy="ensemble")
    cases, factory, default_root = open_teacher(teacher, recipe, files)
    set_name = name_for(images or Path(), name)
    target = ImageSet(
        name=set_name,
        plans=files.plans,
        configuration=teacher.configuration,
        dataset_json=files.dataset_json,
    )
    try:
        folder = images if images is not None else target.record().images
    except NotFoundError as e:
        build = build_command(teacher, spec, spec_file, root)
        raise NotFoundError(f"{e}\nmake them with: {build} --images FOLDER --name {set_name}") from e
    return UnlabelledJob(
        target=target,
        images=folder,
        data_set=cases,
        factory=factory,
        spec=recipe,
        root=root or default_root,
        command=images_command(teacher, spec, folder, set_name, root, spec_file),
    )


def images_command(
    teacher: TeacherSpec, spec: CacheSpec, images: Path, name: str, root: Place | None, spec_file: Path | None
) -> str:
    """The `fastnnunet cache build --images` command of a set."""
    words = ["--images", str(images.resolve())]
    if name != default_name(images):
        words += ["--name", name]
    return f"{build_command(teacher, spec, spec_file, root)} {shlex.join(words)}"


def named_set(
    teacher: TeacherSpec,
    spec: CacheSpec,
    reference: str,
    root: Place | None = None,
    spec_file: Path | None = None,
) -> str:
    """The name of the set that a name or a folder of images stands for.

    Raises NotFoundError with the command that makes it, SpecError for a cascade stage.
    """
    files = model_folder_of(teacher)
    _refuse_cascade(files)
    try:
        return resolve_set(files.plans, teacher.configuration, reference)
    except NotFoundError as e:
        build = build_command(teacher, spec, spec_file, root)
        images = Path(reference)
        if images.is_dir():
            build = images_command(teacher, spec, images, default_name(images), root, spec_file)
        else:
            build += f" --images FOLDER --name {shlex.quote(reference)}"
        raise NotFoundError(f"{e}\nmake it with: {build}") from e


def list_foreground(job: UnlabelledJob, cache: CacheFolder, processes: int, progress: Listener = ignore) -> None:
    """Write foreground voxels and label map of every stored case, as the teacher sees it; what is there is kept.

    Raises CorruptError when the cache is damaged, BuildError.
    """
    folder = job.target.foreground_folder(cache.key)
    stored = [case for case, problem in cache.problems(cache.cases).items() if problem is None]
    tasks = {
        case: _ForegroundTask(cache=cache.path, case_id=case, target=job.target, file=folder / f"{case}.npz")
        for case in stored
        if not all((folder / f"{case}{ending}").is_file() for ending in (".npz", SEGMENTATION))
    }
    finish_each(_list_case, tasks, processes, "listing foreground", "foreground of {} cannot be listed", progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ForegroundTask:
    """One case, for any process."""

    cache: Place
    case_id: str
    target: ImageSet
    file: Path


def _list_case(task: _ForegroundTask) -> None:
    target = task.target
    manager = label_manager_of(configuration_of(target.plans, target.configuration)[0], target.dataset_json)
    segmentation = target.cases.load(task.case_id)[1]
    outside_ZYX = np.asarray(segmentation[0]) < 0
    label_1ZYX = as_segmentation(teacher_label(task.cache, task.case_id, manager), outside_ZYX)
    write_segmentation(task.file.with_name(f"{task.case_id}{SEGMENTATION}"), label_1ZYX, segmentation)
    write_locations(task.file, sample_foreground(label_1ZYX, manager))


def reader_at_any(cache: Place) -> SoftLabelReader:
    """A reader at one of the temperatures that a cache serves; none changes which class is largest."""
    reader = SoftLabelReader(cache)
    served = reader.cache.spec.temperature_range
    return reader if served is None else SoftLabelReader(cache, served[0])


def teacher_label(cache: Place, case_id: str, label_manager: Any) -> np.ndarray:
    """The label map (Z, Y, X), int16, that a cache's soft labels make; read one layer of chunks at a time."""
    reader = reader_at_any(cache)
    size_z, size_y, size_x = reader.shape_zyx(case_id)
    depth = chunk_for(reader.cache.spec, (size_z, size_y, size_x))[0]
    label_ZYX = np.empty((size_z, size_y, size_x), np.int16)
    for lower in range(0, size_z, depth):
        upper = min(lower + depth, size_z)
        stored = reader.read_patch(case_id, (lower, 0, 0), (upper, size_y, size_x))
        label_ZYX[lower:upper] = label_manager.convert_probabilities_to_segmentation(reader.to_probabilities(stored))
    return label_ZYX


def _refuse_cascade(files: ModelFolder) -> None:
    if (stage := configuration_of(files.plans, files.configuration)[1].previous_stage_name) is not None:
        raise SpecError(
            f"unlabelled images: {files.configuration} is a cascade stage and needs predictions of {stage}, which "
            "they do not have\nuse a configuration without a previous stage"
        )
