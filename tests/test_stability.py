"""What is tried so that students answer the same wherever their strides begin."""

import numpy as np
import pytest
import torch

from pipelines.measure.train.stability import disagreement, filter_strided, moved, without_nyquist

ALTERNATING = np.array([1.0, -1.0, 1.0])


@pytest.mark.parametrize("axis", [2, 3])
def test_what_is_left_of_three_taps_is_a_blur_and_two_taps(axis: int) -> None:
    kernel = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 3, 3)))
    found = np.moveaxis(without_nyquist(kernel, axis).numpy(), axis, -1)
    for taps in found.reshape(-1, 3):
        assert np.allclose(np.convolve([1, 1], [taps[0], taps[2]]), taps)
    difference = np.moveaxis(kernel.numpy(), axis, -1) - found
    assert np.allclose(difference, difference[..., :1] * ALTERNATING)  # nothing else was taken


def test_a_strided_convolution_no_longer_sees_the_highest_frequency_and_others_are_left() -> None:
    torch.manual_seed(0)
    first, strided = torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.Conv3d(2, 2, 3, (1, 2, 2), bias=False)
    before = first.weight.clone(), strided.weight.clone()
    assert filter_strided(torch.nn.Sequential(first, strided)) == 1
    assert torch.equal(first.weight, before[0])
    checks = torch.tensor([(-1.0) ** n for n in range(9)])
    for axis, silent in ((2, False), (3, True), (4, True)):
        image = checks.reshape([9 if n == axis else 1 for n in range(5)]).expand(1, 2, 9, 9, 9)
        assert (strided(image).abs().max().item() < 1e-5) == silent


def test_moved_predictions_of_a_network_without_strides_agree() -> None:
    torch.manual_seed(0)
    image, shift = torch.randn(2, 3, 8, 9, 10), (1, 0, 5)
    again = moved(image, shift)
    assert torch.equal(again[:, :, 1:, :, 5:], image[:, :, :-1, :, :-5])
    assert again[:, :, :1].abs().max() == 0 == again[..., :5].abs().max()
    assert disagreement(image, again, shift).item() == pytest.approx(0, abs=1e-6)
    assert disagreement(image, image, shift).item() > 0.1


def test_the_divergence_of_two_predictions_is_the_mean_over_voxels() -> None:
    p, q = np.array([[0.7, 0.3], [0.5, 0.5]]), np.array([[0.6, 0.4], [0.9, 0.1]])  # a row for each voxel
    first, second = (torch.from_numpy(np.log(a)).T[None, :, None, :].requires_grad_() for a in (p, q))
    found = disagreement(first, second, (0, 0))
    assert found.item() == pytest.approx((p * np.log(p / q)).sum(1).mean())
    found.backward()
    assert first.grad is None
    assert second.grad is not None
