"""The temperature that brings a student's probabilities closest to its teacher's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastnnunet.evaluate.calibration import label_codes, near_borders
from fastnnunet.evaluate.temperature import border_sample, fit_temperature


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), true=st.floats(0.4, 6), classes=st.integers(2, 6), regions=st.booleans())
def test_a_known_temperature_is_found(seed, true, classes, regions):
    logits = np.random.default_rng(seed).normal(0, 4, (400, classes))
    tempered = torch.from_numpy(logits / true)
    target = (torch.sigmoid(tempered) if regions else torch.softmax(tempered, 1)).numpy()
    assert fit_temperature(logits, target, regions=regions) == pytest.approx(true, rel=1e-3)


def test_against_a_search_with_torch():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(0, 6, (300, 3)), rng.dirichlet([0.3] * 3, 300)
    grid = np.geomspace(0.25, 8, 4001)
    losses = [
        float(torch.nn.functional.cross_entropy(torch.from_numpy(logits / t), torch.from_numpy(target))) for t in grid
    ]
    assert fit_temperature(logits, target) == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)


def test_no_voxels_and_hopeless_logits():
    none = np.zeros((0, 3))
    assert fit_temperature(none, none) == 1.0
    wrong = np.array([[9.0, 0.0]] * 5)
    assert fit_temperature(wrong, wrong[:, ::-1] / 9) == pytest.approx(8.0, rel=1e-3)


def test_samples_are_voxels_near_borders():
    rng = np.random.default_rng(1)
    target = rng.dirichlet([1] * 3, (6, 7, 8)).transpose(3, 0, 1, 2)
    target[:, :, :4] = np.array([1.0, 0, 0])[:, None, None, None]
    logits = np.arange(target.size, dtype=float).reshape(target.shape)
    near = near_borders(label_codes(target, False), (3.0, 1.0, 1.0), 2.0)
    got, of_target = border_sample(logits, target, 10**6, spacing_mm=(3.0, 1.0, 1.0))
    np.testing.assert_array_equal(got, logits[:, near].T)
    np.testing.assert_allclose(of_target, target[:, near].T, rtol=1e-6)
    few, _ = border_sample(logits, target, 5, spacing_mm=(3.0, 1.0, 1.0))
    assert len(few) == 5
    assert {tuple(row) for row in few} <= {tuple(row) for row in got}
