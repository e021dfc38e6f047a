"""Soft labels against hard pseudo-labels: students of both on the same batches, over numbers of scans and seeds.

Three steps, each resumed by the same command. `nnUNet_results` holds the teacher, `nnUNet_preprocessed` the data set.

    python -m pipelines.measure.train.soft_or_hard test -d 4 -i imagesTs -g labelsTs --work W
    python -m pipelines.measure.train.soft_or_hard labels -d 4 --spec RECIPE.yaml --work W
    python -m pipelines.measure.train.soft_or_hard train -d 4 --spec RECIPE.yaml --work W --labels teacher \\
        --scans 10 200 --seeds 0 1 2 -r 4 --steps 2000 --arm hard alpha=0 --arm soft alpha=1 -o R.json

`test` preprocesses the test images and labels them by the whole ensemble. `labels` makes a preprocessed data set of the
training scans whose labels are the teacher's (argmax of the soft labels of the recipe's cache), as if nobody had ever
labelled them. `train` trains every arm, an arm being fields of DistillSpec (and of StudentSpec: `student.norm=batch`;
what it does not name is the default, in records before December 2026 loss=kl and soft_deep_supervision=false), from
subsets of the scans (drawn by the seed, smaller ones inside larger ones) and judges it on the test images in
preprocessed space: Dice against the true labels, fidelity (Dice against the teacher's), and its probabilities,
everywhere and within two voxels of the borders of the teacher's labels. These also at the one temperature that brings
them closest to the teacher's on these very images, which favours students that were not taught probabilities. Students
with batch norm are also judged in one pass over each image, and in two and four shifted ones. `--labels true`
trains on the true labels, `--stable` tries one of the ways of `stability.py`.
"""

import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from scipy.special import softmax

from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.evaluate.calibration import case_calibration, summarise
from fastnnunet.evaluate.metrics import dice_of_labels
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.canonical import to_plain
from fastnnunet.specs.distill import DistillSpec
from fastnnunet.specs.load import build_spec, load_yaml_spec
from fastnnunet.specs.provenance import write_json
from fastnnunet.specs.student import StudentSpec
from fastnnunet.specs.teacher import PublishedSpec, TeacherSpec
from pipelines.measure.head import header, model_arguments, put
from pipelines.measure.train.stability import STABLE

PREPROCESSED = "nnUNet_preprocessed"
LABELS = ("teacher", "true")
TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 3.0)  # tried on a student's probabilities


def prepare_test(teacher: TeacherSpec, images: Path, labels: Path, work: Path) -> None:
    """Write W/test/CASE.npz: image, label and teacher's probabilities of every test case, in preprocessed space."""
    import torch

    from fastnnunet.nnunet.files.model import model_folder_of
    from fastnnunet.teachers.nnunet import make_teacher

    files = model_folder_of(teacher, keep=teacher.folds)
    model = files.model
    loaded = make_teacher(files, teacher.folds, CacheSpec(), {}).load(torch.get_num_threads())
    target = work / "test"
    target.mkdir(parents=True, exist_ok=True)
    ending = model.dataset_json["file_ending"]
    cases = sorted(p.name.removesuffix(ending) for p in labels.glob(f"*{ending}"))
    for case in cases:
        if (target / f"{case}.npz").is_file():
            continue
        preprocessor = model.config.preprocessor_class(verbose=False)
        channels = [str(p) for p in sorted(images.glob(f"{case}_[0-9]*{ending}"))]
        image, label, _ = preprocessor.run_case(
            channels, str(labels / f"{case}{ending}"), model.manager, model.config, model.dataset_json
        )
        image_CZYX = np.ascontiguousarray(image, np.float32)
        p_CZYX = probabilities(loaded, image_CZYX, teacher.folds)
        temporary = target / f".{case}.npz"
        np.savez_compressed(temporary, image=image_CZYX, label=np.asarray(label[0], np.int16), p=p_CZYX)
        temporary.rename(target / f"{case}.npz")
        print(case, flush=True)


def probabilities(loaded: Any, image_CZYX: np.ndarray, folds: Sequence[Any]) -> np.ndarray:
    """Softmax of the mean logits, float32 (C, Z, Y, X)."""
    shape = image_CZYX.shape[1:]
    (block,) = loaded.blocks(image_CZYX, folds, shape)
    return np.asarray(softmax(block[1], axis=0), np.float32)


def prepare_labels(teacher: TeacherSpec, recipe: CacheSpec, spec_file: Path | None, work: Path) -> None:
    """Make W/teacher_labels, an nnUNet_preprocessed whose segmentations are the teacher's."""
    from fastnnunet.nnunet.files.cases import open_cases
    from fastnnunet.nnunet.files.model import model_folder_of
    from fastnnunet.nnunet.unlabelled.teacher_labels import is_labelled, write_labelled
    from fastnnunet.teachers.data_set import cache_root
    from fastnnunet.teachers.images import teacher_label
    from fastnnunet.teachers.jobs import cache_for_training

    files = model_folder_of(teacher)
    cache = cache_for_training(teacher, recipe, spec_file=spec_file)
    key = SoftLabelReader(cache).key
    cases = open_cases(files.plans, teacher.configuration)
    source = cases.folder.parent
    target = work / "teacher_labels" / source.name
    data = target / cases.folder.name
    data.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    caches = cache_root(source.name, teacher.plans, teacher.configuration)
    if not (target / caches.name).exists():
        (target / caches.name).symlink_to(caches.resolve())
    for case in cases.case_ids:
        if not is_labelled(cases, case, data, key):
            write_labelled(cases, case, data, teacher_label(cache, case, files.model.labels), key, files.model)
    print(f"{len(cases.case_ids)} cases in {data}")


def subset(cases: Sequence[str], number: int, seed: int) -> list[str]:
    """The scans of a training; those of a smaller number are among those of a larger one."""
    return sorted(np.random.default_rng([20261129, seed]).permutation(sorted(cases))[:number].tolist())


def judge(probabilities_of: Any, work: Path) -> dict[str, Any]:
    """Dice, fidelity and calibration over the test cases; `probabilities_of` gets the image and the teacher's."""
    rows: dict[str, Any] = {}
    sums: dict[float, Any] = {}
    for file in sorted((work / "test").glob("*.npz")):
        with np.load(file) as case:
            image_CZYX, label_ZYX, p_CZYX = case["image"], np.maximum(case["label"], 0), case["p"]
        q_CZYX = probabilities_of(image_CZYX, p_CZYX)
        names = {str(label): (label,) for label in range(1, len(p_CZYX))}
        student_ZYX, teacher_ZYX = q_CZYX.argmax(0), p_CZYX.argmax(0)
        for t in TEMPERATURES:
            tempered_CZYX = q_CZYX if t == 1 else softmax(np.log(np.clip(q_CZYX, 1e-7, 1)) / t, axis=0)
            found = case_calibration(tempered_CZYX, p_CZYX, label_ZYX)
            sums[t] = sums[t] + found if t in sums else found
        rows[file.stem] = {
            "dice": list(dice_of_labels(label_ZYX, student_ZYX, names).values()),
            "fidelity": list(dice_of_labels(teacher_ZYX, student_ZYX, names).values()),
        }
    mean = {n: float(np.nanmean([np.nanmean(r[n]) for r in rows.values()])) for n in ("dice", "fidelity")}
    per_label = {f"{n}_per_label": np.nanmean([r[n] for r in rows.values()], 0).tolist() for n in ("dice", "fidelity")}
    scores = {t: to_plain(summarise(sums[t])) for t in TEMPERATURES}
    best = min(TEMPERATURES, key=lambda t: scores[t]["teacher_border"]["kl"])
    return {
        **mean,
        **per_label,
        "calibration": scores[1.0],
        "calibration_tempered": {"temperature": best, **scores[best]},
        "cases": rows,
    }


def train_arms(
    teacher: TeacherSpec,
    recipe: CacheSpec,
    spec_file: Path | None,
    arms: dict[str, tuple[DistillSpec, StudentSpec]],
    scans: int,
    seed: int,
    threads: int,
    labels: str,
    stable: str | None = None,
) -> dict[str, Path]:
    """Train all arms on the same batches of one subset of the scans; fold folders. Resumes finished ones."""
    import torch

    from fastnnunet.distill.check import check_job
    from fastnnunet.distill.configure import configure
    from fastnnunet.distill.job import FINAL, TrainingJob, run_folder, start_fold
    from fastnnunet.distill.memory import keep_freed_memory
    from fastnnunet.distill.soft_labels import CachedSoftLabels
    from fastnnunet.engines.devices import CPU
    from fastnnunet.nnunet.files.model import model_folder_of
    from fastnnunet.nnunet.trainer.epochs import run_epochs
    from fastnnunet.nnunet.trainer.online import LastEpochs
    from fastnnunet.teachers.jobs import cache_for_training
    from fastnnunet.teachers.online import online_teacher

    keep_freed_memory()
    torch.set_num_threads(threads)
    way = [None, *STABLE].index(stable)
    fold = (10 * way + LABELS.index(labels)) * 10**6 + seed * 1000 + scans  # a name for the subset and its labels
    jobs = {
        name: TrainingJob(teacher=teacher, student=student, distill=spec, cache=recipe, fold=fold, device="cpu")
        for name, (spec, student) in arms.items()
    }
    folders = {name: run_folder(job) for name, job in jobs.items()}
    todo = {name: job for name, job in jobs.items() if not (folders[name] / FINAL).is_file()}
    for name in jobs.keys() - todo.keys():
        check_job(jobs[name], resume=True, overwrite=False)  # the name does not say all of how it was trained
    trainers = []
    for job in todo.values():
        files = model_folder_of(teacher)
        plans, dataset_json, _ = check_job(job, resume=False, overwrite=True, files=files)
        soft = None
        if job.distill.alpha > 0:
            cache = cache_for_training(teacher, recipe, spec_file=spec_file)
            soft = CachedSoftLabels(cache, job.distill.temperature)
        torch.manual_seed(seed)
        start = partial(files.take_weights, start_fold(job))
        trainer = configure(job, plans, dataset_json, soft, False, "cpu", start)
        if job.distill.alpha == 0:
            trainer.objective = None
        cases = sorted(p.name.removesuffix(".pkl") for p in Path(trainer.preprocessed_dataset_folder).glob("*.pkl"))
        chosen = subset(cases, scans, seed)
        held_out = sorted(set(cases) - set(chosen))[:2] or chosen[:2]
        trainer.do_split = lambda chosen=chosen, held_out=held_out: (chosen, held_out)
        trainer.save_every = 10**6
        if share := job.distill.online_teacher:
            loaded = online_teacher(
                teacher, recipe, files, temperature=job.distill.temperature, threads=threads, device=CPU
            )
            trainer.online = LastEpochs(loaded, share)
        if stable is not None:
            STABLE[stable](trainer)
        trainers.append(trainer)
    for has_soft in (False, True):  # which share no batches, but see the same ones
        if some := [trainer for trainer in trainers if (trainer.soft_labels is not None) == has_soft]:
            run_epochs(some)
    return folders


def student_probabilities(folder: Path, configuration: str, threads: int) -> Any:
    """image -> probabilities of the student in a fold folder, not mirrored."""
    from fastnnunet.teachers.published import open_published

    fold = int(folder.name.removeprefix("fold_"))
    spec = PublishedSpec(path=folder.parent, configuration=configuration, folds=(fold,))
    loaded = open_published(spec, CacheSpec(mirroring=False, precision="fp32")).load(threads)
    return lambda image_CZYX, _: probabilities(loaded, image_CZYX, (fold,))


def one_pass_probabilities(folder: Path, configuration: str, passes: int) -> Any:
    """image -> probabilities of a student in a fold folder in one pass, in the frame that `predict` takes.

    The logits of several passes are averaged.
    """
    import torch

    from fastnnunet.geometry.tiles import Axis
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint, load_weights, strip_prefix
    from fastnnunet.nnunet.files.model import ModelFolder, build_network
    from fastnnunet.nnunet.student.fit import stride_products

    files = ModelFolder(folder.parent, configuration, "checkpoint_final.pth")
    network = build_network(files.model).eval()
    path = folder / "checkpoint_final.pth"
    load_weights(network, strip_prefix(load_checkpoint(path)["network_weights"]), path)
    config = files.model.config
    strides = stride_products(config.configuration)

    def run(image_CZYX: np.ndarray, _: np.ndarray) -> np.ndarray:
        shape, total = image_CZYX.shape[1:], np.zeros(())
        axes = [
            Axis(size=size, least=least, multiple=multiple, halo=0, shifts=passes)
            for size, least, multiple in zip(shape, config.patch_size, strides, strict=True)
        ]
        for number in range(passes):
            front = [axis.before[number] for axis in axes]
            pads = [(f, axis.frame - n - f) for f, n, axis in zip(front, shape, axes, strict=True)]
            with torch.inference_mode():
                padded = torch.from_numpy(np.pad(image_CZYX, [(0, 0), *pads]))[None]
                logits = network(padded)[0].numpy()
            inside = (slice(f, f + n) for f, n in zip(front, shape, strict=True))
            total = total + logits[(slice(None), *inside)]
        return np.asarray(softmax(total / passes, axis=0), np.float32)

    return run


def schedule(steps: int, seed: int) -> dict[str, Any]:
    """Fields of DistillSpec that all arms share: epochs of 50 steps of two samples."""
    return {
        "epochs": max(1, steps // 50),
        "iterations_per_epoch": 50,
        "val_iterations_per_epoch": 1,
        "batch_size": 2,
        "optimizer": "adamw",
        "seed": seed,
    }


def arm(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """NAME FIELD=VALUE ..."""
    name, *pairs = words
    return name, {k: json.loads(v) if v[:1] in "0123456789tf.[" else v for k, v in (p.split("=", 1) for p in pairs)}


def main() -> None:
    parser = model_arguments(__doc__)
    parser.add_argument("step", choices=["test", "labels", "train"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--spec", type=Path)
    parser.add_argument("-tf", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("-tr", default="nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-i", type=Path)
    parser.add_argument("-g", type=Path)
    parser.add_argument("--labels", choices=LABELS, default=LABELS[0])
    parser.add_argument("--scans", nargs="+", type=int, default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("-r", type=int, default=4)
    parser.add_argument("--family", default="auto")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stable", choices=STABLE)
    parser.add_argument("--arm", nargs="+", action="append", default=[])
    args = parser.parse_args()
    work: Path = args.work.resolve()
    teacher = TeacherSpec(dataset=args.d, configuration=args.c, folds=tuple(args.tf), trainer=args.tr, plans=args.p)
    recipe = CacheSpec() if args.spec is None else load_yaml_spec(CacheSpec, args.spec)
    if args.step == "test":
        prepare_test(teacher, args.i, args.g, work)
        return
    if args.step == "labels":
        prepare_labels(teacher, recipe, args.spec, work)
        return
    if args.labels == "teacher":
        os.environ[PREPROCESSED] = str(work / "teacher_labels")  # before nnU-Net is imported
    from fastnnunet.nnunet.files.checkpoint import load_checkpoint

    record = json.loads(args.o.read_text()) if args.o.is_file() else {**header(__doc__.splitlines()[0]), "rows": []}
    if "teacher" not in record:
        record["teacher"] = judge(lambda _, p: p, work)
        print(f"teacher: Dice {record['teacher']['dice']:.4f}", flush=True)
    for seed in args.seeds:
        for scans in args.scans:
            key = {
                "labels": args.labels,
                "scans": scans,
                "seed": seed,
                "r": args.r,
                "steps": args.steps,
                "stable": args.stable,
            }
            done = {row["arm"] for row in record["rows"] if key.items() <= row.items()}
            given = dict(map(arm, args.arm))
            arms = {}
            for name, fields in given.items():
                common = {**schedule(args.steps, seed), "initial_lr": args.lr, "temperature": 1.0}
                if name not in done:
                    of_student = {k.removeprefix("student."): v for k, v in fields.items() if k.startswith("student.")}
                    own = {k: v for k, v in fields.items() if not k.startswith("student.")}
                    student = build_spec(StudentSpec, {"r": args.r, "family": args.family} | of_student, where="--arm")
                    arms[name] = build_spec(DistillSpec, common | own, where="--arm"), student
            folders = train_arms(teacher, recipe, args.spec, arms, scans, seed, args.threads, args.labels, args.stable)
            for name, folder in folders.items():
                found = judge(student_probabilities(folder, args.c, args.threads), work)
                if given[name].get("student.norm") == "batch":
                    found["one_pass"] = {
                        passes: judge(one_pass_probabilities(folder, args.c, passes), work) for passes in (1, 2, 4)
                    }
                    print(*(f"{k} passes {v['dice']:.4f}" for k, v in found["one_pass"].items()), flush=True)
                trained = load_checkpoint(folder / "checkpoint_final.pth")["fastnnunet"]["distill"]
                record["rows"].append({**key, "arm": name, "fields": given[name], "distill": trained, **found})
                write_json(args.o, record)
                near = found["calibration"]["labels_border"]
                print(
                    f"{scans} scans, seed {seed}, r={args.r}, {name}: Dice {found['dice']:.4f} "
                    f"fidelity {found['fidelity']:.4f} NLL {near['nll']:.3f} ECE {near['ece']:.3f}",
                    flush=True,
                )
    put(record, args.o)


if __name__ == "__main__":
    main()
