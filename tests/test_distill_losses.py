"""The distillation loss against hand-computed arrays, SciPy and its own derivative."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, rel_entr, softmax, xlogy

from fastnnunet import native
from fastnnunet.distill.losses import (
    DistillationObjective,
    dice_semimetric,
    kl_and_difference,
    kl_and_difference_by_core,
    kl_classes,
    kl_regions,
)
from fastnnunet.distill.soft_targets import full_simplex


def random_problem(seed, classes, shape=(2, 3, 4, 5)):
    rng = np.random.default_rng(seed)
    n, *space = shape
    teacher = rng.normal(0, 3, (n, classes, *space))
    student = rng.normal(0, 3, (n, classes, *space))
    return teacher, student


def test_kl_by_hand():
    # one voxel, two classes: p = (1/4, 3/4), q = softmax(0, 0) = (1/2, 1/2)
    logits = torch.zeros(1, 2, 1, 1, 1)
    soft = torch.full((1, 1, 1, 1, 1), 0.75)
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert kl_classes(logits, soft, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_kl_of_a_region_by_hand():
    # one voxel, two regions: p = 0.75 against sigmoid(0) = 0.5, and p = 0 against sigmoid(0)
    soft = torch.tensor([0.75, 0.0]).reshape(1, 2, 1, 1, 1)
    first = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    got = kl_regions(torch.zeros(1, 2, 1, 1, 1), soft, 1.0).item()
    assert got == pytest.approx(first + np.log(2), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 7), st.floats(0.5, 8))
def test_kl_sums_classes_and_averages_voxels(seed, classes, temperature):
    teacher, student = random_problem(seed, classes)
    p, q = softmax(teacher / temperature, 1), softmax(student / temperature, 1)
    expected = rel_entr(p, q).sum(1).mean()  # SciPy: p log(p / q)
    got = kl_classes(torch.tensor(student), torch.tensor(p[:, 1:]), temperature)
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.floats(0.5, 8))
def test_region_kl_is_binary(seed, regions, temperature):
    teacher, student = random_problem(seed, regions)
    p, q = expit(teacher / temperature), expit(student / temperature)
    expected = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).sum(1).mean()
    assert kl_regions(torch.tensor(student), torch.tensor(p), temperature).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_is_t_times_difference():
    """d(T^2 KL)/dz = T (q - p) per voxel, here divided by the number of voxels because KL averages them."""
    temperature, (teacher, student) = 3.0, random_problem(0, 4)
    p = torch.tensor(softmax(teacher / temperature, 1))
    z = torch.tensor(student, requires_grad=True)
    (temperature**2 * kl_classes(z, p[:, 1:], temperature)).backward()
    q = torch.softmax(z.detach() / temperature, 1)
    voxels = z.numel() / z.shape[1]
    torch.testing.assert_close(z.grad, temperature * (q - p) / voxels)


def test_certain_teacher_has_finite_loss_and_gradient():
    soft = torch.zeros(1, 2, 2, 2, 2)
    soft[:, 0, 0] = 1.0  # one-hot: log(0) must not appear
    z = torch.full((1, 3, 2, 2, 2), 50.0, requires_grad=True)
    loss = kl_classes(z, soft, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_background_is_what_is_left_also_after_rounding():
    soft = torch.tensor([0.6, 0.4000001]).reshape(1, 2, 1, 1, 1)
    assert full_simplex(soft)[0, 0].item() == 0
    assert full_simplex(torch.zeros(1, 2, 1, 1, 1))[0, 0].item() == 1


def test_objective_weighs_hard_and_soft():
    logits, soft = torch.zeros(1, 2, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 0.75)
    hard = torch.tensor(2.0)
    total, soft_loss = DistillationObjective(alpha=0.3, temperature=3.0)(hard, logits, soft)
    kl = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert soft_loss.item() == pytest.approx(9 * kl, rel=1e-6)
    assert total.item() == pytest.approx(0.7 * 2 + 0.3 * 9 * kl, rel=1e-6)
    zero, _ = DistillationObjective(alpha=0.3, temperature=3.0)(
        torch.tensor(0.0), torch.tensor([[0.0, np.log(27.0)]]).reshape(1, 2, 1, 1, 1), soft
    )
    assert zero.item() == pytest.approx(0, abs=1e-6)  # softmax((0, 3 log 3) / 3) = (1/4, 3/4): the teacher's opinion


def test_annealed_objective_gives_way_to_the_labels():
    logits, soft, hard = torch.zeros(1, 2, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 0.75), torch.tensor(2.0)
    kl = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    annealed, constant = (DistillationObjective(alpha=0.4, temperature=1.0, anneal=anneal) for anneal in (True, False))
    for progress, alpha in ((0.0, 0.4), (0.25, 0.3), (0.5, 0.2), (1.0, 0.0)):
        total, soft_loss = annealed(hard, logits, soft, None, progress)
        assert total.item() == pytest.approx((1 - alpha) * 2 + alpha * kl, rel=1e-6)
        assert soft_loss.item() == pytest.approx(kl, rel=1e-6)  # what is logged does not fall with the weight
        assert constant(hard, logits, soft, None, progress)[0].item() == pytest.approx(1.2 + 0.4 * kl, rel=1e-6)


def test_dice_semimetric_by_hand():
    # class of sample 1: p = (1/2, 1), q = (1/4, 1): sums 2.75, |p - q| sums to 1/4; sample 2: p = q, loss 0
    p = torch.tensor([[[0.5, 1.0]], [[0.3, 0.0]]])
    q = torch.tensor([[[0.25, 1.0]], [[0.3, 0.0]]])
    expected = (1 - (2.75 - 0.25) / 2.75) / 2
    assert dice_semimetric(q, p).item() == pytest.approx(expected, rel=1e-4)


def test_dice_semimetric_is_nnunets_dice_where_the_target_is_hard():
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    rng = np.random.default_rng(4)
    label = torch.tensor(rng.integers(0, 4, (2, 1, 5, 6, 7)))
    q = torch.tensor(softmax(rng.normal(0, 2, (2, 4, 5, 6, 7)), 1))
    p = torch.stack([label[:, 0] == c for c in range(4)], 1).double()
    nnunet = MemoryEfficientSoftDiceLoss(batch_dice=False, do_bg=False, smooth=1e-5)(q, label)
    assert dice_semimetric(q[:, 1:], p[:, 1:]).item() == pytest.approx(1 + nnunet.item(), rel=1e-6)


def test_dice_semimetric_is_least_at_the_target():
    """Ordinary soft Dice is not: a harder answer than the soft target would please it more."""
    p = torch.full((1, 1, 50), 0.7)
    losses = [dice_semimetric(torch.full((1, 1, 50), q), p).item() for q in (0.5, 0.6, 0.7, 0.8, 1.0)]
    assert np.argmin(losses) == 2
    assert losses[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_kl_and_dice_are_added(regions):
    temperature, (teacher, student) = 2.0, random_problem(3, 3)
    p = expit(teacher / temperature) if regions else softmax(teacher / temperature, 1)
    q = expit(student / temperature) if regions else softmax(student / temperature, 1)
    binary = rel_entr(p, q) + (rel_entr(1 - p, 1 - q) if regions else 0)
    first = 0 if regions else 1  # the background has no Dice
    overlap = np.minimum(p, q)[:, first:].sum((2, 3, 4))  # (p + q - |p - q|) / 2
    dice = (2 * overlap / (p + q)[:, first:].sum((2, 3, 4))).mean()
    expected = temperature**2 * binary.sum(1).mean() + 1 - dice
    objective = DistillationObjective(0.25, temperature, regions, dice=True)
    total, soft = objective(torch.tensor(4.0), torch.tensor(student), torch.tensor(p[:, first:]))
    assert soft.item() == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(0.75 * 4 + 0.25 * expected, rel=1e-5)


class TestCore:
    """The compiled soft loss of CPUs against SciPy in double precision, and against torch's functions."""

    LAYOUTS = (torch.contiguous_format, torch.channels_last, "strided")

    def tensors(self, classes, space, layout, seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = 6 * torch.randn(3, classes, *space, generator=generator)
        soft = torch.softmax(5 * torch.randn(3, classes, *space, generator=generator), 1)[:, 1:]
        soft[:, :, :2] = soft[:, :, :2].round()  # certain: p log p at p = 0
        if layout == "strided":
            logits = logits.repeat_interleave(2, -1)[..., ::2]
        elif layout == torch.channels_last:
            logits = logits.to(memory_format=torch.channels_last if len(space) == 2 else torch.channels_last_3d)
        return logits, soft, torch.rand(3, 1, *space, generator=generator) > 0.3

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("classes", "space"), [(3, (7, 9, 11)), (2, (16, 40)), (20, (5, 33)), (3, (4, 64, 128))])
    @pytest.mark.parametrize("masked", [True, False])
    def test_against_scipy(self, layout, classes, space, masked):
        logits, soft, mask = self.tensors(classes, space, layout)
        total, difference, voxels = kl_and_difference_by_core(logits, soft, 3.0, mask if masked else None)
        z, p = logits.double().numpy() / 3, soft.double().numpy()
        p = np.concatenate([np.maximum(1 - p.sum(1, keepdims=True), 0), p], 1)
        counts = mask.numpy() if masked else np.ones_like(mask.numpy())
        kl = (xlogy(p, p) - p * log_softmax(z, 1)).sum(1, keepdims=True)
        assert voxels == counts.sum()
        assert total.item() == pytest.approx((kl * counts).sum(), rel=1e-6)
        np.testing.assert_allclose(difference.numpy(), (softmax(z, 1) - p) * counts, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_same_as_on_other_devices(self, layout):
        logits, soft, mask = self.tensors(3, (8, 9, 10), layout)
        for got, expected in zip(
            kl_and_difference_by_core(logits, soft, 2.0, mask),
            kl_and_difference(logits, soft, 2.0, mask),
            strict=True,
        ):
            torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=1e-6, atol=1e-6)

    def test_extremes(self):
        """Logits far apart, and nothing that counts."""
        logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]]).movedim(0, 1)
        soft = torch.tensor([[[0.0, 0.25, 1.0]]])
        total, difference, _ = kl_and_difference_by_core(logits, soft, 1.0, None)
        assert total.item() == pytest.approx(0.75 * (2e4 + np.log(0.75)) + 0.25 * np.log(0.25) + np.log(2), rel=1e-6)
        torch.testing.assert_close(difference[0], torch.tensor([[0.0, -0.75, 0.5], [0.0, 0.75, -0.5]]))
        total, difference, voxels = kl_and_difference_by_core(logits, soft, 1.0, torch.zeros(1, 1, 3, dtype=torch.bool))
        assert (total.item(), voxels) == (0, 1)
        assert not difference.any()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("nan")])
    def test_what_is_not_finite_shows(self, value):
        logits, soft, _ = self.tensors(3, (4, 20), torch.contiguous_format)
        logits[1, 1, 2, 3] = value
        total, difference, _ = kl_and_difference_by_core(logits, soft, 1.0, None)
        assert np.isnan(total.item())
        assert difference[1, :, 2, 3].isnan().all()
        assert difference.isnan().sum() == 3

    def test_threads_change_no_bit(self):
        logits, soft, mask = self.tensors(3, (8, 64, 70), torch.contiguous_format)
        arrays = logits.flatten(2).numpy(), soft.flatten(2).numpy(), 3.0, mask.flatten(1).numpy()
        differences = [np.empty((3, 3, 8 * 64 * 70), np.float32) for _ in range(2)]
        sums = [native.kl_classes(*arrays, d, threads=n) for d, n in zip(differences, (1, 5), strict=True)]
        assert sums[0] == sums[1]
        np.testing.assert_array_equal(*differences)

    def test_arrays_that_do_not_fit(self):
        logits, soft, mask = self.tensors(3, (4, 20), torch.contiguous_format)
        z, p, m = logits.flatten(2).numpy(), soft.flatten(2).numpy(), mask.flatten(1).numpy()
        for arrays in ((z, p[:, :1], 1.0, m, z.copy()), (z, p, 1.0, m[:, 1:].copy(), z.copy()), (z, p, 1.0, m, z[1:])):
            with pytest.raises(ValueError, match="do not fit"):
                native.kl_classes(*arrays)
