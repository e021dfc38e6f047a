"""What mirrors at prediction are worth: models judged with and without, on the test images of `soft_or_hard test`.

    python -m pipelines.measure.train.mirrors -m TEACHER_FOLDER STUDENT_FOLDER --work W -o R.json

All are mirrored along the axes that the first allows. A student that was trained without `--mirroring` does not allow
any, though it learnt from mirrored patches like its teacher: the option changes nothing of the training.
"""

from dataclasses import replace
from pathlib import Path

from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.provenance import write_json
from fastnnunet.specs.teacher import PublishedSpec
from fastnnunet.teachers.published import open_published
from pipelines.measure.head import arguments, header, put
from pipelines.measure.train.soft_or_hard import judge, probabilities


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("-m", type=Path, nargs="+", required=True, help="model folders of one fold each")
    parser.add_argument("--work", type=Path, required=True, help="the folder of `soft_or_hard test`")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    record = {**header(__doc__.splitlines()[0]), "rows": []}
    axes: tuple[int, ...] | None = None
    for folder in args.m:
        model = open_published(PublishedSpec(path=folder), CacheSpec(precision="fp32"))
        axes = model.mirror_axes() if axes is None else axes
        loaded = model.load(args.threads)
        for chosen in ((), axes):
            judged = replace(loaded, mirror_axes=chosen)
            found = judge(lambda image_CZYX, _, m=judged, f=model.folds: probabilities(m, image_CZYX, f), args.work)
            record["rows"].append({"model": folder.name, "mirror_axes": chosen, **found})
            write_json(args.o, record)
            print(f"{folder.name} {chosen}: Dice {found['dice']:.4f} fidelity {found['fidelity']:.4f}", flush=True)
    put(record, args.o)


if __name__ == "__main__":
    main()
