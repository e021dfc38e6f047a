"""Builds: in process and on dask, resumed after kills, with failing cases, never half-written."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import expit, softmax

from fastnnunet.cache import crew as crew_module
from fastnnunet.cache import plan as plan_module
from fastnnunet.cache.build import CaseDone, CasesFailedError, build_cache
from fastnnunet.cache.label import CaseTask
from fastnnunet.cache.plan import count_tiles, plan_cache
from fastnnunet.cache.store.reader import SoftLabelReader
from fastnnunet.cache.store.writer import PARTIAL, remove_leftovers
from fastnnunet.cache.verify import verify_cache
from fastnnunet.errors import BuildError, DiskSpaceError, SpecError
from fastnnunet.events import Message
from fastnnunet.specs.cache import CacheSpec
from tests.cache_fakes import SHAPES, FakeCases, FakeFactory, FakeTeacher, digests, make_job

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Digests of an uninterrupted build in one process."""
    return digests(build_cache(make_job(tmp_path_factory.mktemp("reference"))))


def test_largest_first_with_progress_and_resume(tmp_path, reference):
    events = []
    job = make_job(tmp_path)
    cache = build_cache(job, only=["flat"], progress=events.append)
    assert cache.missing_cases() == ["large", "small"]
    build_cache(job, progress=events.append)
    events = [event for event in events if isinstance(event, CaseDone)]
    assert [(e.case_id, e.done, e.total) for e in events] == [("flat", 1, 1), ("large", 1, 2), ("small", 2, 2)]
    assert [e.voxels for e in events] == [540, 40 * 37 * 41, 7 * 20 * 33]
    assert digests(cache) == reference
    build_cache(job, progress=lambda e: pytest.fail(f"{e.case_id} was built again"))


def test_one_teacher_for_all_cases(tmp_path):
    loads = tmp_path / "loads"
    loads.mkdir()
    job = make_job(tmp_path / "root", factory=FakeFactory(loads=str(loads)))
    build_cache(job)
    build_cache(job)  # complete: no teacher at all
    assert len(list(loads.iterdir())) == 1


def test_a_failing_case_is_named_and_the_others_are_stored(tmp_path):
    job = make_job(tmp_path, cases=FakeCases(nan_in="large"))
    with pytest.raises(CasesFailedError, match=r"(?s)1 of 3 cases failed.*large: .*NaN") as error:
        build_cache(job)
    assert list(error.value.failed) == ["large"]
    assert job.open().missing_cases() == ["large"]


def test_an_error_below_us_names_the_case_too(tmp_path, monkeypatch):
    def out_of_memory(self, image, folds, chunk, per_fold):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(FakeTeacher, "blocks", out_of_memory)
    with pytest.raises(CasesFailedError, match="flat: RuntimeError: not enough memory"):
        build_cache(make_job(tmp_path), only=["flat"])


def test_regions_store_every_head(tmp_path):
    factory = FakeFactory(has_regions=True)
    with pytest.raises(SpecError, match="use encoding: sigmoid_u8"):
        make_job(tmp_path, factory=factory)
    job = make_job(tmp_path, factory=factory, spec=CacheSpec(encoding="sigmoid_u8", level=3, temperature=3.0))
    cache = build_cache(job)
    reader = SoftLabelReader(cache.path)
    logits = factory.load(1).logits(FakeCases().image_CZYX("flat"), factory.folds)
    got = reader.to_probabilities(reader.read_patch("flat", (0, 0, 0), (1, 30, 20)))
    assert got.shape == (3, 1, 30, 20)
    np.testing.assert_allclose(got[..., :18], expit(logits / 3.0), atol=0.51 / 255)
    assert not got[..., 18:].any()  # outside the volume: in no region
    assert {r.status for r in verify_cache(cache)} == {"ok"}


def test_a_case_that_changed_meanwhile_is_refused(tmp_path):
    job = make_job(tmp_path)
    changed = FakeCases(shapes={**SHAPES, "small": (7, 20, 34)})
    object.__setattr__(job, "source", changed)
    with pytest.raises(CasesFailedError, match="image of case small changed"):
        build_cache(job)


def test_out_of_fold_uses_only_unseen_folds(tmp_path):
    job = make_job(tmp_path, spec=CacheSpec(policy="out_of_fold", level=3))
    reader = SoftLabelReader(build_cache(job).path)
    for case, fold in {"small": 0, "large": 1, "flat": 2}.items():
        alone = make_job(tmp_path / case, factory=FakeFactory(folds=(fold,)))
        expected = SoftLabelReader(build_cache(alone, only=[case]).path).read_case(case)
        assert (reader.read_case(case) == expected).all()
    with pytest.raises(SpecError, match="trained on case large"):
        make_job(tmp_path, factory=FakeFactory(folds=(0, 2)), spec=CacheSpec(policy="out_of_fold"))


def test_probabilities_are_pooled_over_the_folds(tmp_path):
    """FakeTeacher adds 0.1 * fold to the foreground, so the mean of probabilities is not that of mean logits."""
    factory = FakeFactory(folds=(0, 1, 60))
    job = make_job(tmp_path, factory=factory, spec=CacheSpec(pooling="probabilities", level=3, temperature=3.0))
    assert job.identity["inference"]["pooling"] == "probabilities"
    reader = SoftLabelReader(build_cache(job, only=["flat"]).path)
    image, teacher = FakeCases().image_CZYX("flat"), factory.load(1)
    folds = [softmax(teacher.logits(image, (fold,)) / 3, axis=0) for fold in factory.folds]
    got = reader.to_probabilities(reader.read_case("flat"))
    np.testing.assert_allclose(got, np.mean(folds, axis=0), atol=1 / 255)
    pooled_logits = softmax(np.mean([teacher.logits(image, (f,)) for f in factory.folds], axis=0) / 3, axis=0)
    assert np.abs(got - pooled_logits).max() > 0.02
    with pytest.raises(SpecError, match="pooling: got probabilities"):
        CacheSpec(pooling="probabilities", encoding="logit_gap_u8", temperature_range=(1.0, 4.0))


def test_the_deviation_of_the_teacher_is_recorded(tmp_path, monkeypatch):
    cache = build_cache(make_job(tmp_path))
    assert cache.provenance["deviation"] == {
        "against": "itself",
        "patches": 3,
        "argmax_equal": 1.0,
        "mean_abs_difference": 0.0,
    }

    def fails(self, images, temperature):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(FakeTeacher, "deviation", fails)
    with pytest.raises(BuildError, match="RuntimeError: not enough memory"):
        build_cache(make_job(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("equal", "difference", "far"), [(0.9991, 9e-4, False), (0.9989, 9e-4, True), (0.9991, 1.1e-3, True)]
)
def test_how_far_the_teacher_is_from_the_reference_is_told_once(tmp_path, monkeypatch, equal, difference, far):
    found = {"against": "another", "patches": 2, "argmax_equal": equal, "mean_abs_difference": difference}
    monkeypatch.setattr(FakeTeacher, "deviation", lambda *_: found)
    events, job = [], make_job(tmp_path)
    build_cache(job, only=["flat"], progress=events.append)
    told, *warned = [event for event in events if isinstance(event, Message)]
    expected = f"teacher against another, 2 patches: {equal * 100:.3f}% of labels equal, mean difference"
    assert told.text == f"{expected} of probabilities {difference:.1e}"
    assert [event.level for event in warned] == ["warning"] * far
    assert events[0] == told, "before the first case"
    events.clear()
    build_cache(job, progress=events.append)
    assert not [event for event in events if isinstance(event, Message)]


def test_the_key_ignores_place_and_layout(tmp_path):
    job = make_job(tmp_path / "a")
    assert make_job(tmp_path / "b", spec=CacheSpec(level=1, compressor="lz4")).path.name == job.path.name
    assert str(tmp_path) not in str(job.identity)
    assert make_job(tmp_path / "a", spec=CacheSpec(precision="fp32")).path != job.path


def test_unknown_case(tmp_path):
    with pytest.raises(SpecError, match=r"--case: got nobody, expected cases of this data set such as small"):
        build_cache(make_job(tmp_path), only=["nobody"])


def test_read_only_root(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BuildError, match="cannot write"):
        build_cache(make_job(file / "root"))


class TestPlan:
    def test_numbers(self, tmp_path):
        job = make_job(tmp_path / "root")
        plan = plan_cache(job, teacher=job.factory.load(1), workers=2)
        voxels = sum(z * y * x for z, y, x in SHAPES.values())
        assert (plan.cases, plan.cases_todo, plan.voxels_todo, plan.key) == (
            3,
            3,
            voxels,
            job.path.name + plan.key[16:],
        )
        # patch 16, step 8: 7 -> 1, 20 -> 2, 33 -> 4; 40 -> 4, 37 -> 4, 41 -> 5; 1 -> 1, 30 -> 3, 18 -> 2 tiles
        assert plan.tiles_todo == 1 * 2 * 4 + 4 * 4 * 5 + 1 * 3 * 2
        assert plan.seconds_estimated == pytest.approx(0.5 * plan.tiles_todo / 2)
        assert not plan.bytes_measured
        assert plan.memory_per_worker > 40 * 37 * 41 * 3 * 4
        assert not (tmp_path / "root").exists()

    @pytest.mark.parametrize(
        ("spec", "per_voxel"),
        [
            (CacheSpec(), 2 * 0.1),
            (CacheSpec(temperature=2.5), 2 * 0.35),
            (CacheSpec(temperature=9), 2 * 0.4),
            (CacheSpec(encoding="logit_gap_u8", temperature_range=(1.0, 4.0)), 3 * 0.4),
            (CacheSpec(encoding="float16"), 2 * 1.6),
        ],
    )
    def test_bytes_by_the_rule(self, tmp_path, spec, per_voxel):
        assert plan_cache(make_job(tmp_path, spec=spec)).bytes_per_voxel == pytest.approx(per_voxel)

    def test_measured_bytes(self, tmp_path):
        job = make_job(tmp_path)
        cache = build_cache(job, only=["large"])
        plan = plan_cache(job)
        manifest = cache.manifest("large")
        assert plan.bytes_measured
        assert plan.bytes_per_voxel == pytest.approx(manifest.stored_bytes / manifest.voxels)
        assert plan.cases_todo == 2
        assert plan.seconds_estimated is None

    def test_too_little_memory(self, tmp_path):
        job = make_job(tmp_path / "root")
        with pytest.raises(SpecError, match=r"(?s)case large \(40 x 37 x 41 voxels, 3 heads\).*--memory-limit"):
            build_cache(job, memory_limit_bytes=1 << 20)
        assert not (tmp_path / "root").exists()
        build_cache(job, only=["flat"], memory_limit_bytes=40 << 20)

    def test_tiles_of_a_2d_patch(self):
        assert count_tiles((10, 20, 33), (16, 16), 0.5) == 10 * 2 * 4

    def test_too_small_a_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan_module, "free_bytes", lambda path: 1000)
        job = make_job(tmp_path / "root")
        with pytest.raises(DiskSpaceError, match=r"(?s)not enough disk space.*got.*expected"):
            build_cache(job)
        assert not (tmp_path / "root").exists()


@pytest.mark.timeout(400)
class TestDask:
    def test_two_workers_give_the_serial_digests(self, tmp_path, reference):
        loads = tmp_path / "loads"
        loads.mkdir()
        job = make_job(tmp_path / "root", factory=FakeFactory(loads=str(loads)))
        assert digests(build_cache(job, workers=2)) == reference
        assert len({p.name.split("-")[0] for p in loads.iterdir()}) == len(list(loads.iterdir())) <= 2

    def test_a_failing_case_and_a_dying_worker(self, tmp_path, reference):
        poison = tmp_path / "poison"
        poison.touch()
        job = make_job(tmp_path / "root", FakeCases(nan_in="small"), FakeFactory(die_once=str(poison)))
        with pytest.raises(CasesFailedError, match="small") as error:
            build_cache(job, workers=1)
        assert list(error.value.failed) == ["small"]
        assert not poison.exists()  # the worker did die, and its case was done by the next one
        others = [job.open().manifest(case).content_sha256 for case in ("flat", "large")]
        assert others == [digests_of(job, case) for case in ("flat", "large")]

    def test_an_existing_cluster(self, tmp_path, reference):
        from distributed import LocalCluster

        with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
            cache = build_cache(make_job(tmp_path), scheduler=cluster.scheduler_address)
        assert digests(cache) == reference

    @pytest.mark.parametrize("existing", [False, True])
    def test_a_worker_killed_in_mid_case_costs_only_that_case(self, tmp_path, existing):
        from distributed import LocalCluster

        shapes = {f"case{n}": (6, 8, 9 + n) for n in range(5)}
        expected = digests(build_cache(make_job(tmp_path / "serial", FakeCases(shapes=shapes))))
        labels = tmp_path / "labels"
        labels.mkdir()
        job = make_job(tmp_path / "root", FakeCases(shapes=shapes), FakeFactory(labels=str(labels), delay_s=1.0))
        events = []
        with contextlib.ExitStack() as stack:
            where = {"workers": 2}
            if existing:
                cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
                where = {"scheduler": stack.enter_context(cluster).scheduler_address}
            pool = stack.enter_context(ThreadPoolExecutor(1))
            build = pool.submit(build_cache, job, progress=events.append, **where)
            while len(begun := sorted(labels.iterdir(), key=lambda file: int(file.name.split("-")[2]))) < 3:
                assert not build.done()
                time.sleep(0.02)
            shape, process, _ = begun[-1].name.split("-")  # begun a moment ago, a second from its end
            assert len({file.name.split("-")[1] for file in begun}) == 2
            os.kill(int(process), signal.SIGKILL)
            cache = build.result(300)
        assert digests(cache) == expected
        assert sorted(event.case_id for event in events if isinstance(event, CaseDone)) == sorted(shapes)
        times = Counter(file.name.split("-")[0] for file in labels.iterdir())
        assert times == {"x".join(map(str, s)): 1 for s in shapes.values()} | {shape: 2}
        assert {r.status for r in verify_cache(cache)} == {"ok"}

    def test_a_lost_scheduler(self, tmp_path, monkeypatch, capfd):
        shapes = {f"case{n}": (6, 8, 9 + n) for n in range(4)}
        expected = digests(build_cache(make_job(tmp_path / "serial", FakeCases(shapes=shapes))))
        job = make_job(tmp_path / "root", FakeCases(shapes=shapes), FakeFactory(delay_s=1.0))
        message = r"(?s)connection to the dask scheduler at tcp://127.* is lost.*run the same command again"
        with dask_processes(tmp_path) as (address, scheduler), pytest.raises(BuildError, match=message):
            build_cache(job, scheduler=address, progress=lambda event: isinstance(event, CaseDone) and scheduler.kill())
        assert "Traceback" not in "".join(capfd.readouterr())
        assert 0 < len(job.open().missing_cases()) < 4
        assert {r.status for r in verify_cache(job.open())} == {"ok", "missing"}
        assert digests(build_cache(make_job(tmp_path / "root", FakeCases(shapes=shapes)))) == expected

    def test_no_workers(self, tmp_path, monkeypatch):
        monkeypatch.setattr(crew_module, "WORKERS_TIMEOUT_S", 1)
        with dask_processes(tmp_path, workers=0) as (address, _), pytest.raises(BuildError, match="no worker for 1 s"):
            build_cache(make_job(tmp_path / "root"), scheduler=address)

    def test_a_case_stored_by_a_worker_that_died_since_is_not_labelled_again(self, tmp_path, monkeypatch):
        job = make_job(tmp_path)
        cache = build_cache(job)
        task = CaseTask(
            case_id="flat", cache=cache, source=job.source, factory=job.factory, folds=job.factory.folds, threads=1
        )
        monkeypatch.setattr(FakeFactory, "load", lambda *_: pytest.fail("a teacher was loaded"))
        assert crew_module._label_in_worker(task) == cache.manifest("flat")


@contextlib.contextmanager
def dask_processes(folder, workers=2):
    """A scheduler and workers of their own, as on a cluster; yields its address and process."""
    file = folder / "scheduler.json"
    commands = [["scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]]
    commands += [["worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-nanny"]] * workers
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{command}", *options, "--no-dashboard"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for command, *options in commands
    ]
    try:
        while not file.exists():
            assert processes[0].poll() is None
            time.sleep(0.05)
        yield json.loads(file.read_text())["address"], processes[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def digests_of(job, case):
    """Digest of one case built alone, elsewhere."""
    alone = make_job(job.root / ".." / "alone", job.source)
    return build_cache(alone, only=[case]).manifest(case).content_sha256


SCRIPT = """
import pickle, signal, sys
from fastnnunet.cache.build import build_cache
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background ignores it
    print("ready", flush=True)
    build_cache(pickle.load(open(sys.argv[1], "rb")), workers=int(sys.argv[2]))
"""


def start_build(tmp_path, job, workers=0):
    (tmp_path / "job.pkl").write_bytes(pickle.dumps(job))
    (tmp_path / "build.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "build.py"), str(tmp_path / "job.pkl"), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


class TestKilled:
    def test_sigkill_at_any_moment(self, tmp_path, reference):
        """Killed again and again at growing delays, until a build comes through: same digests, no leftovers."""
        job = make_job(tmp_path / "root", factory=FakeFactory(delay_s=0.05))
        for attempt in range(8):
            process = start_build(tmp_path, job)
            time.sleep(0.05 + 0.07 * attempt)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if (cache := job.open()) is not None:
                assert {r.status for r in verify_cache(cache)} <= {"ok", "missing"}
        cache = build_cache(job)
        assert digests(cache) == reference
        assert not list((tmp_path / "root" / PARTIAL).iterdir())

    def test_leftovers_of_the_dead_go_those_of_the_living_stay(self, tmp_path):
        from fastnnunet.cache.store.writer import _partial_folder

        cache = build_cache(make_job(tmp_path))
        dead = tmp_path / PARTIAL / f"{cache.path.name}.small.1.abc"
        dead.mkdir()
        with _partial_folder(cache, "large") as living:
            assert remove_leftovers(cache) == [dead.name]
            assert living.is_dir()
        assert not living.exists()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_interrupt_leaves_a_resumable_cache(self, tmp_path, reference, workers):
        job = make_job(tmp_path / "root", factory=FakeFactory(delay_s=1.0))
        process = start_build(tmp_path, job, workers)
        deadline = time.monotonic() + 300
        while not list(job.path.glob("*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode != 0
        assert "KeyboardInterrupt" in stderr
        cache = job.open()
        assert 0 < len(cache.missing_cases()) < 3
        assert {r.status for r in verify_cache(cache)} == {"ok", "missing"}
        assert digests(build_cache(make_job(tmp_path / "root"))) == reference

    def test_two_builders_at_once(self, tmp_path, reference):
        job = make_job(tmp_path / "root", factory=FakeFactory(delay_s=0.1))
        processes = [start_build(tmp_path, job) for _ in range(2)]
        assert [p.wait(300) for p in processes] == [0, 0]
        assert digests(job.open()) == reference
        assert {r.status for r in verify_cache(job.open())} == {"ok"}
        assert not list((tmp_path / "root" / PARTIAL).iterdir())


def test_a_damaged_case_is_built_again(tmp_path, reference):
    job = make_job(tmp_path)
    cache = build_cache(job)
    (cache.case_dir("small") / "c/0/0/0/0").unlink()
    shutil.rmtree(cache.case_dir("flat"))
    rebuilt = []
    build_cache(job, progress=lambda e: rebuilt.append(e.case_id))
    assert rebuilt == ["small", "flat"]
    assert digests(cache) == reference


def test_labelling_may_be_left_after_its_client(monkeypatch):
    """As an interrupt does that arrives while a finished case is told of."""
    from distributed import Client

    monkeypatch.setattr(crew_module, "_label_in_worker", lambda task: task.case_id)
    tasks = [SimpleNamespace(case_id=case, cache=SimpleNamespace(key="key")) for case in ("a", "b")]
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        left = crew_module.Cluster(client, "key", None, 1).label(tasks)
        assert next(left)[0] in ("a", "b")
    left.close()


def test_no_cluster_at_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(crew_module, "SCHEDULER_TIMEOUT_S", 1)
    with pytest.raises(BuildError, match="no dask scheduler answers"):
        build_cache(make_job(tmp_path), scheduler="tcp://127.0.0.1:1")


def test_workers_that_are_slow_to_stop_undo_nothing(monkeypatch, caplog):
    """On a busy machine dask's patience with its worker processes ends before they do."""
    import distributed

    from fastnnunet.cache.crew import _client

    class Slow:
        def __init__(self, **_options):
            pass

        def close(self):
            raise TimeoutError

    monkeypatch.setattr(distributed, "LocalCluster", Slow)
    monkeypatch.setattr(distributed, "Client", lambda cluster: contextlib.nullcontext(cluster))
    with _client(1, None) as client:
        assert isinstance(client, Slow)
    assert "slow to stop" in caplog.text
