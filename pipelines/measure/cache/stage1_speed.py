"""Stage 1 against nnU-Net's own predictor: seconds per case and how far the soft labels are apart.

Both label the same preprocessed cases with the same folds and mirrors in one run, case by case in turn. Ours includes
encoding, writing and reading back; nnU-Net's is `predict_logits_from_preprocessed_data` alone.

Example:

    python -m pipelines.measure.cache.stage1_speed -d 4 -c 3d_fullres --cases 10 -o record.json
"""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from fastnnunet.cache.crew import InProcess
from fastnnunet.cache.identity import folds_for_case
from fastnnunet.cache.label import CaseTask
from fastnnunet.specs.cache import CacheSpec
from fastnnunet.specs.teacher import TeacherSpec
from fastnnunet.teachers.jobs import cache_job
from pipelines.measure.head import header, model_arguments, put


def measure(teacher_spec: TeacherSpec, spec: CacheSpec, num_cases: int, threads: int) -> dict[str, Any]:
    """The record. The cases are spread evenly over the data set."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with tempfile.TemporaryDirectory() as root:
        job = cache_job(teacher_spec, spec, root=Path(root))
        ids = list(job.cases)
        step = max(1, len(ids) // num_cases)
        ids = ids[::step][:num_cases]
        cache = job.create({})
        crew = InProcess(job.factory.load(threads))
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(
                str(job.factory.folder), teacher_spec.folds, teacher_spec.checkpoint
            )
        rows = []
        for warm, case in [(False, ids[0]), *((True, case) for case in ids)]:
            image_CZYX = job.source.image_CZYX(case)
            torch.set_num_threads(threads)
            start = time.perf_counter()
            theirs = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image_CZYX)).float().numpy()
            middle = time.perf_counter()
            task = CaseTask(
                case_id=case,
                cache=dataclasses.replace(cache, cases={case: cache.cases[case]}),
                source=job.source,
                factory=job.factory,
                folds=folds_for_case(job.factory, spec, case),
                threads=threads,
            )
            ((_, outcome),) = crew.label([task])
            end = time.perf_counter()
            if isinstance(outcome, Exception):
                raise outcome
            if not warm:
                continue
            ours = next(
                b for _, b in crew.ask(lambda t, i=image_CZYX: list(t.blocks(i, teacher_spec.folds, i.shape[1:])))
            )
            difference = np.abs(softmax(ours / spec.temperature, 0) - softmax(theirs / spec.temperature, 0))
            rows.append(
                {
                    "case": case,
                    "nnunet_s": middle - start,
                    "ours_s": end - middle,
                    "argmax_equal": float((ours.argmax(0) == theirs.argmax(0)).mean()),
                    "mean_abs_difference": float(difference.mean()),
                    "max_abs_difference": float(difference.max()),
                }
            )
            print(f"{case} nnU-Net {rows[-1]['nnunet_s']:.2f} s, ours {rows[-1]['ours_s']:.2f} s", flush=True)
    return {
        **header("labelling a case: five folds and eight mirrors, nnU-Net's predictor against ours"),
        "inference": job.identity["inference"],
        "folds": len(teacher_spec.folds),
        "threads": threads,
        "cases": len(rows),
        "nnunet_median_s": statistics.median(r["nnunet_s"] for r in rows),
        "ours_median_s": statistics.median(r["ours_s"] for r in rows),
        "speedup_median": statistics.median(r["nnunet_s"] / r["ours_s"] for r in rows),
        "argmax_equal": float(np.mean([r["argmax_equal"] for r in rows])),
        "argmax_equal_worst": min(r["argmax_equal"] for r in rows),
        "mean_abs_difference": float(np.mean([r["mean_abs_difference"] for r in rows])),
        "max_abs_difference": max(r["max_abs_difference"] for r in rows),
        "per_case": rows,
    }


if __name__ == "__main__":
    parser = model_arguments(__doc__)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--engine", default="auto")
    args = parser.parse_args()
    record = measure(
        TeacherSpec(dataset=args.d, configuration=args.c),
        CacheSpec(precision=args.precision, engine=args.engine),
        args.cases,
        args.threads,
    )
    put(record, args.o)
    print(
        f"{record['speedup_median']:.2f}x, argmax equal {record['argmax_equal']:.5%}, "
        f"mean |dp| {record['mean_abs_difference']:.2e}"
    )
