"""`fastnnunet cache import`: soft maps of one's own in the teacher's place."""

from pathlib import Path
from typing import Annotated

import typer

from fastnnunet.cli.parts import options
from fastnnunet.cli.parts.choices import recipe_of
from fastnnunet.cli.parts.fields import Asked, Group, ask, spread
from fastnnunet.specs.teacher import TeacherSpec

Data = Annotated[Asked, Group(TeacherSpec, options.CASES, only=("dataset", "configuration", "plans"))]
SoftDirs = Annotated[
    list[Path],
    typer.Argument(metavar="SOFT_DIR...", help="Folders of soft maps, one of every rater; their mean is taken."),
]


@spread
def import_maps(
    folders: SoftDirs,
    data: Data,
    spec: options.SpecFile = None,
    temperature: options.Temperature = None,
    root: options.CacheRoot = None,
    cases: Annotated[
        list[str] | None, ask("--cases", "There are maps of these cases alone (default: of all).", options.CASES)
    ] = None,
    memory_limit: Annotated[float, ask("--memory-limit", "GiB that one case may use.", options.RUN, min=0.1)] = 4.0,
) -> None:
    """Make a cache of soft maps of your own: of several raters, or of a model that is no nnU-Net.

    SOFT_DIR holds CASE.nii.gz with a channel per class, on the grid of the case's image, or what nnUNetv2_predict
    --save_probabilities writes (CASE.npz and CASE.pkl). All maps are checked before anything is written.

    Example:

      fastnnunet cache import rater_1 rater_2 -d 4 -c 3d_fullres

    Then train from it, with --start random where there is no teacher's model:

      fastnnunet train -d 4 -c 3d_fullres -f 0 -r 4 --soft-labels KEY --start random
    """
    from fastnnunet.api.soft_maps import import_maps as make
    from fastnnunet.cache.store.storage import place_at
    from fastnnunet.cli.parts.cache_view import cache_view, print_summary

    recipe = recipe_of(spec, temperature)
    with cache_view() as view:
        made = make(
            folders,
            TeacherSpec(**data),
            recipe,
            recipe_file=spec,
            root=None if root is None else place_at(root),
            cases=cases,
            memory_limit_bytes=int(memory_limit * 2**30),
            progress=view,
        )
    print_summary(made.cache)
    print(f"train with: --soft-labels {made.cache.path.name}")
