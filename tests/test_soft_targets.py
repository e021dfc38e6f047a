"""Targets and weights of voxels of the soft loss against NumPy, SciPy, scikit-image and nnU-Net's own wrapper."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.special import expit, rel_entr, softmax
from scipy.stats import entropy
from skimage.measure import block_reduce

from fastnnunet.distill.job import run_folder
from fastnnunet.distill.losses import DistillationObjective, dice_semimetric, kl_classes, kl_regions
from fastnnunet.distill.soft_targets import pooled, sharpened, voxel_weights
from fastnnunet.distill.train import train_student
from fastnnunet.errors import SpecError
from fastnnunet.nnunet.augment.soft_samples import NO_OPINION, SampleTransforms, has_opinion
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.trainer.distributed import valid_share
from fastnnunet.nnunet.trainer.seeds import generators_kept, seed_generators
from fastnnunet.nnunet.trainer.trainer import StudentTrainer
from fastnnunet.specs.distill import DistillSpec
from tests.samples import transformed
from tests.test_device_augmentation import KINDS, nnunet_transforms, on_device
from tests.test_distill_distributed import of_all_processes
from tests.test_distill_train import SHORT, build, make_job

pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice")  # NumPy's mean of a block without a voxel
CHOICES = ("all", "uncertain", "entropy", "boundary")


def problem(space, *, regions=False, seed=0, dtype=np.float64):
    """Logits (2, 3, ...), a soft label that is certain in places, and a mask of four voxels of five."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0, 8, (2, 3, *space))
    soft = (expit(teacher) if regions else softmax(teacher, 1)[:, 1:]).astype(dtype)
    mask = rng.random((2, 1, *space)) < 0.8
    return (
        torch.tensor((teacher / 4 + rng.normal(0, 1, teacher.shape)).astype(dtype)),
        torch.tensor(soft),
        torch.tensor(mask),
    )


def distribution(soft, regions):
    """Of a voxel over classes, (N, C, ...); with regions of every region over inside and outside, (N, R, 2, ...)."""
    soft = soft.numpy()
    return np.stack([soft, 1 - soft], 2) if regions else np.concatenate([1 - soft.sum(1, keepdims=True), soft], 1)


class TestPooled:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(
        ("space", "shapes"),
        [
            ((8, 12), [(8, 12), (4, 6), (2, 3)]),
            ((6, 8, 12), [(6, 8, 12), (6, 4, 6), (3, 2, 3)]),
            ((4, 6, 12), [(4, 2, 6), (4, 2, 4)]),  # the second is no multiple of the first
        ],
    )
    def test_means_over_blocks(self, space, shapes, masked):
        _, soft, mask = problem(space)
        mask[..., :4] = False  # blocks without a voxel that counts
        values = np.where(mask.numpy(), soft.numpy(), np.nan) if masked else soft.numpy()
        given = torch.where(mask, soft, NO_OPINION) if masked else soft
        for (target, valid), shape in zip(pooled(given, mask if masked else None, shapes), shapes, strict=True):
            block = (1, 1, *(n // m for n, m in zip(space, shape, strict=True)))
            expected = block_reduce(values, block, np.nanmean)
            there = block_reduce(~np.isnan(values), block, np.mean) >= 0.5
            assert there.any()
            if masked:
                np.testing.assert_array_equal(valid.numpy(), there[:, :1])
            else:
                assert valid is None
            np.testing.assert_allclose(target.numpy()[there], expected[there], rtol=1e-12)
            assert torch.isfinite(target).all()

    def test_sizes_that_do_not_divide(self):
        """7 voxels to 4: a coarse voxel is the mean of all that its interval touches."""
        _, soft, _ = problem((7, 5))
        ((target, _),) = pooled(soft, None, [(4, 3)])
        for i in range(4):
            for j in range(3):
                rows = slice(int(np.floor(i * 7 / 4)), int(np.ceil((i + 1) * 7 / 4)))
                columns = slice(int(np.floor(j * 5 / 3)), int(np.ceil((j + 1) * 5 / 3)))
                np.testing.assert_allclose(target[..., i, j], soft[..., rows, columns].mean((2, 3)))


class TestWeights:
    @pytest.mark.parametrize("regions", [False, True])
    @pytest.mark.parametrize("space", [(9, 11), (6, 7, 8)])
    def test_uncertain(self, space, regions):
        logits, soft, mask = problem(space, regions=regions)
        p = distribution(soft, regions)
        axis = 2 if regions else 1
        unsure = p.max(axis) <= 0.99
        label = p.argmax(axis)  # of a region 0 is inside
        student = (logits.numpy() <= 0).astype(int) if regions else logits.numpy().argmax(1)
        expected = unsure | (label != student)
        expected = expected.any(1, keepdims=True) if regions else expected[:, None]
        got = voxel_weights("uncertain", logits, soft, mask, regions=regions)
        assert got.dtype == torch.bool
        np.testing.assert_array_equal(got.numpy(), expected & mask.numpy())
        assert 0.05 < expected.mean() < 0.999

    @pytest.mark.parametrize("regions", [False, True])
    def test_entropy(self, regions):
        logits, soft, mask = problem((6, 7, 8), regions=regions)
        p = distribution(soft, regions)
        expected = entropy(p, axis=2, base=2).mean(1, keepdims=True) if regions else entropy(p, axis=1, base=3)[:, None]
        given = torch.where(mask, soft, NO_OPINION)
        got = voxel_weights("entropy", logits, given, mask, regions=regions)
        np.testing.assert_allclose(got.numpy(), expected * mask.numpy(), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("regions", [False, True])
    @pytest.mark.parametrize("space", [(24, 23), (16, 15, 14)])
    def test_boundary(self, space, regions):
        """Blocks of label 2 in label 0: SciPy's filters of five voxels an axis see two labels near their faces."""
        label = np.zeros((2, 1, *space), np.int64)
        label[0, 0, :6, :6] = 2
        label[1, 0, 12:] = 1
        soft = torch.tensor(np.concatenate([0.8 * (label == c) + 0.1 for c in (1, 2)], 1))
        mask = torch.ones(2, 1, *space, dtype=torch.bool)
        mask[1] = False
        size = (1, 1, *[5] * len(space))
        expected = maximum_filter(label, size, mode="nearest") != minimum_filter(label, size, mode="nearest")
        logits = torch.zeros(2, 3, *space)
        np.testing.assert_array_equal(voxel_weights("boundary", logits, soft, None, regions=regions).numpy(), expected)
        expected[1] = False
        np.testing.assert_array_equal(voxel_weights("boundary", logits, soft, mask, regions=regions).numpy(), expected)

    def test_where_targets_end_is_no_boundary(self):
        soft, mask = torch.full((1, 2, 9, 9), NO_OPINION), torch.zeros(1, 1, 9, 9, dtype=torch.bool)
        soft[..., :5] = torch.tensor([0.9, 0.1])[:, None, None]
        mask[..., :5] = True
        assert not voxel_weights("boundary", torch.zeros(1, 3, 9, 9), soft, mask, regions=False).any()
        soft[..., 0] = 0.0
        near = voxel_weights("boundary", torch.zeros(1, 3, 9, 9), soft, mask, regions=False)
        np.testing.assert_array_equal(near[0, 0].sum(0), [9, 9, 9, 0, 0, 0, 0, 0, 0])


class TestSharpened:
    def test_by_hand(self):
        # voxels: (0.05, 0.9, 0.05) is certain above 0.8, (0.3, 0.5, 0.2) is not
        soft = torch.tensor([[0.9, 0.5], [0.05, 0.2]], dtype=torch.float64)[None, :, :, None]
        got = sharpened(soft, 0.8, 2.0, regions=False)[0, :, :, 0]
        np.testing.assert_allclose(got[:, 0], [0.81 / 0.815, 0.0025 / 0.815])
        np.testing.assert_array_equal(got[:, 1], soft[0, :, 1, 0])
        got = sharpened(soft, 0.8, float("inf"), regions=False)[0, :, :, 0]
        np.testing.assert_array_equal(got, [[1, 0.5], [0, 0.2]])

    def test_regions_by_hand(self):
        soft = torch.tensor([0.9, 0.1, 0.5], dtype=torch.float64)[None, :, None, None]
        got = sharpened(soft, 0.8, 3.0, regions=True).flatten()
        np.testing.assert_allclose(got, [0.729 / 0.73, 0.001 / 0.73, 0.5])
        np.testing.assert_array_equal(sharpened(soft, 0.8, float("inf"), regions=True).flatten(), [1, 0, 0.5])

    @pytest.mark.parametrize("power", [2.5, float("inf")])
    @pytest.mark.parametrize("regions", [False, True])
    def test_no_label_changes_and_no_opinion_does_no_harm(self, regions, power):
        logits, soft, mask = problem((6, 7, 8), regions=regions)
        sharp = sharpened(torch.where(mask, soft, NO_OPINION), 0.6, power, regions=regions)
        assert torch.isfinite(sharp).all()
        axis = 2 if regions else 1
        before, after = (distribution(torch.where(mask, s, 0), regions) for s in (soft, sharp))
        np.testing.assert_array_equal(before.argmax(axis), after.argmax(axis))
        assert (after.max(axis) >= before.max(axis) - 1e-12).all()
        objective = DistillationObjective(1.0, 1.0, regions, sharpen_above=0.6, sharpen_power=power)
        _, loss = objective(torch.tensor(0.0), logits, torch.where(mask, soft, NO_OPINION), mask)
        kl = kl_regions if regions else kl_classes
        torch.testing.assert_close(loss, kl(logits, sharp, 1.0, mask))


def outputs_of(space, shapes, *, regions, dtype=np.float64):
    """What a network with deep supervision gives, and target and mask at full resolution."""
    logits = [problem(shape, seed=n, dtype=dtype)[0].requires_grad_() for n, shape in enumerate(shapes)]
    _, soft, mask = problem(space, regions=regions, seed=9, dtype=dtype)
    return logits, soft, mask


class TestObjective:
    SPACE, SHAPES, WEIGHTS = (4, 8, 12), [(4, 8, 12), (4, 4, 6), (2, 2, 3)], (2 / 3, 1 / 3, 0.0)

    @pytest.mark.parametrize("dice", [False, True])
    @pytest.mark.parametrize("regions", [False, True])
    def test_nnunets_wrapper_over_the_resolutions(self, regions, dice):
        logits, soft, mask = outputs_of(self.SPACE, self.SHAPES, regions=regions)
        temperature = 2.0
        valid = [v >= 0.5 for v in self.blocks(mask, np.mean)]
        values = torch.where(mask, soft, torch.nan)
        means = [torch.tensor(np.nan_to_num(v)) for v in self.blocks(values, np.nanmean)]

        def one(z, p, v):
            p = p.numpy()
            q = expit(z.numpy() / temperature) if regions else softmax(z.numpy() / temperature, 1)
            full = p if regions else np.concatenate([1 - p.sum(1, keepdims=True), p], 1)
            kl = (rel_entr(full, q) + (rel_entr(1 - p, 1 - q) if regions else 0)).sum(1)
            where = v[:, 0]
            out = temperature**2 * kl[where].mean()
            if dice:
                foreground = q if regions else q[:, 1:]
                out += dice_semimetric(torch.tensor(foreground * v[:, :1]), torch.tensor(p * v[:, :1])).item()
            return out

        expected = DeepSupervisionWrapper(one, self.WEIGHTS)([z.detach() for z in logits], means, valid)
        objective = DistillationObjective(0.4, temperature, regions, dice=dice, deep_supervision=True)
        total, got = objective(torch.tensor(3.0), logits, soft, mask, output_weights=self.WEIGHTS, shares=valid_share)
        assert got.item() == pytest.approx(expected, rel=1e-6)
        assert total.item() == pytest.approx(0.6 * 3 + 0.4 * expected, rel=1e-6)
        got.backward()
        assert [z.grad is not None and bool(z.grad.any()) for z in logits] == [True, True, False]

    def blocks(self, values, reduce):
        for shape in self.SHAPES:
            block = (1, 1, *(n // m for n, m in zip(self.SPACE, shape, strict=True)))
            yield block_reduce(values.numpy(), block, reduce)

    @pytest.mark.parametrize("regions", [False, True])
    @pytest.mark.parametrize("voxels", CHOICES[1:])
    def test_weighted_mean(self, voxels, regions):
        logits, soft, mask = problem((6, 7, 8), regions=regions)
        weights = voxel_weights(voxels, logits, soft, mask, regions=regions).double().numpy()
        p, q = soft.numpy(), expit(logits.numpy() / 3) if regions else softmax(logits.numpy() / 3, 1)
        full = p if regions else np.concatenate([1 - p.sum(1, keepdims=True), p], 1)
        kl = (rel_entr(full, q) + (rel_entr(1 - p, 1 - q) if regions else 0)).sum(1, keepdims=True)
        objective = DistillationObjective(1.0, 3.0, regions, voxels=voxels)
        _, got = objective(torch.tensor(0.0), logits, soft, mask)
        assert got.item() == pytest.approx(9 * (kl * weights).sum() / weights.sum(), rel=1e-6)
        assert objective(torch.tensor(0.0), logits, soft, torch.zeros_like(mask))[1] == 0

    @pytest.mark.parametrize("dice", [False, True])
    @pytest.mark.parametrize("regions", [False, True])
    @pytest.mark.parametrize("voxels", CHOICES)
    def test_gradient(self, voxels, regions, dice):
        space, shapes = (4, 4), [(4, 4), (2, 4), (1, 2)]
        logits, soft, mask = outputs_of(space, shapes, regions=regions)
        objective = DistillationObjective(
            0.7, 1.5, regions, dice=dice, deep_supervision=True, voxels=voxels, sharpen_above=0.9
        )

        def total(*outputs):
            return objective(torch.tensor(1.0), outputs, soft, mask, output_weights=self.WEIGHTS, shares=_ones)[0]

        assert torch.autograd.gradcheck(total, [*logits[:2], logits[2].detach()])

    @pytest.mark.parametrize("voxels", ["uncertain", "boundary"])
    def test_the_core_sums_voxels_that_are_chosen(self, voxels):
        """On the CPU in single precision a choice of voxels is the core's, by torch's functions it is the same."""
        logits, soft, mask = problem((8, 9, 10), dtype=np.float32)
        weights = voxel_weights(voxels, logits, soft, mask, regions=False)
        results = []
        for given in (weights, weights.float()):
            z = logits.clone().requires_grad_()
            loss = kl_classes(z, soft, 2.0, given)
            loss.backward()
            results.append((loss.detach(), z.grad))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("regions", [False, True])
    @pytest.mark.parametrize("dice", [False, True])
    def test_without_options_it_is_the_finest_output_alone(self, regions, dice):
        logits, soft, mask = outputs_of(self.SPACE, self.SHAPES, regions=regions, dtype=np.float32)
        objective = DistillationObjective(0.3, 2.0, regions, dice=dice)
        total, got = objective(torch.tensor(1.5), logits, soft, mask, output_weights=self.WEIGHTS, shares=valid_share)
        expected = 4.0 * (kl_regions if regions else kl_classes)(logits[0], soft, 2.0, mask) * valid_share([mask])[0]
        if dice:
            q = (logits[0] / 2.0).sigmoid() if regions else (logits[0] / 2.0).softmax(1)[:, 1:]
            expected = expected + dice_semimetric(q * mask, soft * mask)
        assert got.equal(expected)
        assert total.equal(0.7 * torch.tensor(1.5) + 0.3 * expected)

    @pytest.mark.parametrize("voxels", CHOICES)
    def test_weights_count_alike_in_all_processes(self, voxels, monkeypatch):
        """Two processes, one with two samples of a batch of three, whose weights do not sum to the same."""
        rng = np.random.default_rng(2)
        sizes = np.array([0.2, 4.0, 8.0])[:, None, None, None]  # from uncertain to certain
        soft = torch.tensor(softmax(sizes * rng.normal(size=(3, 3, 9, 11)), 1)[:, 1:])
        logits = torch.tensor(rng.normal(size=(3, 3, 9, 11)))
        mask = torch.tensor(rng.random((3, 1, 9, 11)) < 0.7)
        objective = DistillationObjective(1.0, 2.0, deep_supervision=True, voxels=voxels)
        outputs, weights = [logits, logits[..., ::3, ::2]], (0.75, 0.25)
        seen = []

        def of_whole_batch(given):
            seen.extend(given)
            return _ones(given)

        zero = torch.tensor(0.0)
        _, whole = objective(zero, outputs, soft, mask, output_weights=weights, shares=of_whole_batch)
        of_all_processes(monkeypatch, seen)
        parts = 0
        for part, share in ((slice(2), 2 / 3), (slice(2, 3), 1 / 3)):
            given = [o[part] for o in outputs]
            arguments = (given, soft[part], mask[part])
            parts += share * objective(zero, *arguments, output_weights=weights, shares=valid_share)[1]
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def _ones(given):
    return [1.0] * len(given)


@pytest.mark.parametrize("on", ["loader", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_hard_and_soft_loss_lie_on_each_other(kind, on):
    """The soft label is the label: at every resolution its mean is nnU-Net's target where a block is of one label."""
    patch, space, _ = KINDS[kind]
    scales = [[1.0] * len(patch), [1.0] + [0.5] * (len(patch) - 1), [0.5] * (len(patch) - 1) + [0.25]]
    blocks = np.random.default_rng(3).integers(0, 3, [-(-n // 7) for n in space])
    for axis in range(len(space)):
        blocks = blocks.repeat(7, axis)
    label = torch.from_numpy(blocks[tuple(map(slice, space))][None].astype(np.int16))
    soft = torch.cat([label == c for c in (1, 2)]).float()
    image = torch.zeros(2, *space)
    compared = 0
    with generators_kept():
        for seed in range(12):
            seed_generators(seed)
            transforms = nnunet_transforms(kind, scales=scales)
            if on == "loader":
                _, targets = transformed(SampleTransforms(transforms), image.clone(), label.clone(), soft)
                *hard, target = [t[None] for t in targets]
            else:
                coverage = torch.ones_like(soft[:1])
                given = (image.clone(), label.clone(), torch.cat([soft, coverage]))
                *hard, target = on_device(transforms.transforms, [given], [seed])["target"]
            assert len(hard) == 3
            means = pooled(target, has_opinion(target), [h.shape[2:] for h in hard])
            for (mean, valid), labels in zip(means, hard, strict=True):
                ((inside, _),) = pooled(has_opinion(target).double(), None, [labels.shape[2:]])
                whole = valid & (inside == 1)
                whole &= (mean.sum(1, keepdim=True) < 1e-4) | (mean.amax(1, keepdim=True) > 1 - 1e-4)
                expected = torch.cat([labels == c for c in (1, 2)], 1).float()
                assert (mean - expected).abs().amax(1, keepdim=True)[whole].max() < 1e-3
                assert expected[whole.expand_as(expected)].any()
                compared += int(whole.sum())
    assert compared > 0


class TestTraining:
    def test_outputs_targets_and_weights_that_a_step_hands_over(self, world, monkeypatch):
        """nnU-Net's own weights, for outputs as coarse as its own labels; the run is named by its options."""
        build()
        handed, objective = [], DistillationObjective.__call__

        def spy(self, hard, outputs, soft, mask, progress, **options):
            handed.append((options["output_weights"], [o.shape[2:] for o in outputs], soft.shape[2:]))
            return objective(self, hard, outputs, soft, mask, progress, **options)

        labels, loss = [], StudentTrainer._split_targets

        def targets(self, target):
            out = loss(self, target)
            labels.append([t.shape[2:] for t in out[0]])
            return out

        monkeypatch.setattr(DistillationObjective, "__call__", spy)
        monkeypatch.setattr(StudentTrainer, "_split_targets", targets)
        spec = dataclasses.replace(SHORT, alpha=1.0, epochs=1, soft_deep_supervision=True, soft_voxels="entropy")
        job = make_job(distill=spec)
        train_student(job, validate=False)
        count = len(handed[0][1])
        expected = np.array([0.5**i for i in range(count)])
        expected[-1] = 0
        assert count > 1
        for (weights, shapes, _), of_labels in zip(handed, labels[: len(handed)], strict=True):
            np.testing.assert_allclose(weights, expected / expected.sum())
            assert shapes == of_labels
        assert run_folder(job).parent.name.split("__")[1].endswith(f"_{job.distill.tag}")
        assert job.distill.tag.endswith("_entropy")
        assert "softds" not in job.distill.tag, "it is the default"
        stored = load_checkpoint(run_folder(job) / "checkpoint_final.pth")["fastnnunet"]["distill"]
        assert stored["soft_deep_supervision"] is True
        assert stored["soft_voxels"] == "entropy"


class TestSpec:
    def test_names(self):
        assert DistillSpec().tag == "a0.5_T1"
        assert DistillSpec(soft_deep_supervision=False, soft_voxels="boundary").tag == "a0.5_T1_nosoftds_boundary"
        assert DistillSpec(sharpen_above=0.9).tag == "a0.5_T1_sharp0.9p2"
        assert DistillSpec(sharpen_above=0.9, sharpen_power=float("inf")).tag == "a0.5_T1_sharp0.9hard"

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"sharpen_above": 0.0}, "sharpen_above: got 0.0"),
            ({"sharpen_above": float("nan")}, "sharpen_above: got nan"),
            ({"sharpen_above": 1.2}, "sharpen_above: got 1.2"),
            ({"sharpen_above": 0.9, "sharpen_power": 1.0}, "sharpen_power: got 1.0"),
            ({"sharpen_power": 4.0}, "without sharpen_above"),
        ],
    )
    def test_nonsense(self, fields, message):
        with pytest.raises(SpecError, match=message):
            DistillSpec(**fields)


def test_weights_are_those_nnunet_builds():
    """The weights as nnU-Net's `_build_loss` makes them of scales alone."""
    me = SimpleNamespace(
        label_manager=SimpleNamespace(has_regions=False, ignore_label=None),
        configuration_manager=SimpleNamespace(batch_dice=False),
        is_ddp=False,
        enable_deep_supervision=True,
        _do_i_compile=lambda: False,
        _get_deep_supervision_scales=lambda: [[1.0], [0.5], [0.25], [0.125]],
    )
    loss = nnUNetTrainer._build_loss(me)
    np.testing.assert_allclose(loss.weight_factors, np.array([4, 2, 1, 0]) / 7)
