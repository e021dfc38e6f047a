"""Stage 1: soft labels of the teacher ensemble, once for all student sizes.

make cache DATASET=4 CONFIG=3d_fullres
"""

import argparse
import os
from pathlib import Path

from rich.progress import Progress

from fastnnunet.cache.build import CaseDone, build_cache
from fastnnunet.cache.verify import verify_cache
from fastnnunet.errors import CorruptError
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.load import load_yaml_spec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import cache_job
from pipelines.common import run


def main(dataset: str, configuration: str, spec_file: Path) -> None:
    teacher = TeacherSpec(dataset=dataset, configuration=configuration)
    job = cache_job(teacher, load_yaml_spec(CacheSpec, spec_file), spec_file=spec_file)
    todo = job.todo()
    print(f"cache {job.path}: {len(todo)} of {len(job.cases)} cases to label")
    with Progress() as bar:
        task = bar.add_task("labelling", total=sum(map(job.voxels, todo)))

        def advance(case: CaseDone) -> None:
            bar.advance(task, case.voxels)

        cache = build_cache(job, workers=0, threads=os.cpu_count() or 1, progress=advance)
    if damaged := [f"{report.case_id}: {report.problem}" for report in verify_cache(cache) if report.problem]:
        raise CorruptError("\n".join(["cases that did not verify, run the same command again:", *damaged]))
    print(f"verified: all {len(cache.cases)} cases intact")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("--spec", type=Path, default=Path("cache_specs/default.yaml"))
    args = parser.parse_args()
    run(lambda: main(args.dataset, args.configuration, args.spec))
