"""The whole job on generated data: CT-like volumes, five teacher folds, one soft-label cache, two students, one table.

make demo          everything goes into demo_out/; a second run resumes, make clean starts over
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastnnunet.errors import MismatchError
from fastnnunet.specs.canonical import differences, to_plain
from fastnnunet.specs.provenance import write_json
from pipelines import demo_stages as stages
from pipelines.common import run
from pipelines.demo_report import report
from pipelines.demo_stages import Demo, DemoSpec
from pipelines.steps import Step, read_stamp, run_steps


def demo_steps(demo: Demo) -> list[Step]:
    """The job as resumable steps. The expected seconds are those of two cores of a server CPU of 2024."""

    def step(
        key: str,
        title: str,
        expected_s: float,
        after: list[str],
        work: Callable[..., None],
        is_valid: Callable[..., bool],
        *args: int,
    ) -> Step:
        return Step(
            key=key,
            title=title,
            expected_s=expected_s,
            after=tuple(after),
            run=partial(work, demo, *args),
            is_valid=partial(is_valid, demo, *args),
        )

    spec, folds = demo.spec, range(5)
    volumes, teacher_iterations = spec.n_train + spec.n_test, spec.teacher_epochs * spec.iterations
    teachers, bundles = [f"teacher_{f}" for f in folds], [f"bundle_{r}" for r in spec.sizes]
    steps = [
        step("data", f"generating {volumes} volumes", 0.2 * volumes, [], stages.make_data, stages.has_data),
        step("prepare", "planning and preprocessing", 0.8 * volumes, ["data"], stages.prepare, stages.is_prepared),
    ]
    for fold, key in zip(folds, teachers, strict=True):
        expected_s = 5 + 0.4 * teacher_iterations
        steps.append(
            step(key, f"training teacher fold {fold}", expected_s, ["prepare"], stages.teach, stages.is_taught, fold)
        )
    steps.append(
        step("cache", "labelling with the ensemble", 4 * spec.n_train, teachers, stages.label, stages.is_labelled)
    )
    title = f"distilling students {' and '.join(f'r={r}' for r in spec.sizes)}"
    expected_s = 5 + 0.1 * len(spec.sizes) * spec.student_epochs * spec.iterations
    steps.append(step("students", title, expected_s, ["cache"], stages.distil, stages.is_distilled))
    for r, key in zip(spec.sizes, bundles, strict=True):
        title = f"exporting student r={r}"
        steps.append(step(key, title, 6, ["students"], stages.export, stages.is_exported, r))
    title, expected_s = "predicting held-out volumes", 12 * spec.n_test
    steps.append(step("measure", title, expected_s, bundles, stages.measure, stages.is_measured))
    return steps


def main(out: Path, spec: DemoSpec) -> None:
    place = {f"nnUNet_{name}": str(out / "nnunet" / name) for name in ("raw", "preprocessed", "results")}
    for folder in place.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    # before nnU-Net is imported, which reads them once; two loader processes keep a narrow student busy
    os.environ.update(place, nnUNet_n_proc_DA="2", nnUNet_compile="f")
    os.environ.pop("nnUNet_def_n_proc", None)
    stamps = out / "steps"
    before = read_stamp(stamps / "spec.json")
    if before and (changed := differences(before, to_plain(spec))):
        raise MismatchError(
            f"{out} holds a demo made with other settings (there -> now): {'; '.join(changed)}\n"
            "start over with: make clean demo, or give another folder with --out"
        )
    write_json(stamps / "spec.json", to_plain(spec))
    demo = Demo(out=out, spec=spec)
    report(demo, run_steps(demo_steps(demo), stamps))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    args = parser.parse_args()
    run(lambda: main(args.out.resolve(), DemoSpec()))
