"""Critical batch and noise scale: planted ones come back."""

import math

import numpy as np
import pytest

from analysis.batches import fit_tradeoff, noise_scale
from analysis.fit import FitError

BATCHES = 2.0 ** np.arange(9)


def test_a_planted_trade_off_comes_back_whatever_never_got_there():
    steps = 120 + 6000 / BATCHES
    steps[3] = math.nan
    found = fit_tradeoff(BATCHES, steps)
    assert found.least_steps == pytest.approx(120)
    assert found.least_examples == pytest.approx(6000)
    assert found.critical_batch == pytest.approx(50)
    assert found.scatter < 1e-9
    # At the critical batch both are twice their least; everywhere the paper's equation holds.
    assert found.steps(50) == pytest.approx(240)
    s, e = found.steps(BATCHES) / 120, found.steps(BATCHES) * BATCHES / 6000
    assert (s - 1) * (e - 1) == pytest.approx(np.ones(9))


def test_noise_is_relative_so_that_large_and_small_batches_count_alike():
    noisy = (120 + 6000 / BATCHES) * np.exp(0.05 * np.random.default_rng(0).standard_normal(9))
    found = fit_tradeoff(BATCHES, noisy)
    assert found.critical_batch == pytest.approx(50, rel=0.15)
    # Gradient of the summed squares vanishes: no small change of either parameter fits better.
    for factor in ((1.001, 1), (0.999, 1), (1, 1.001), (1, 0.999)):
        moved = np.log((found.least_steps * factor[0] + found.least_examples * factor[1] / BATCHES) / noisy)
        assert math.sqrt(np.mean(moved**2)) > found.scatter


@pytest.mark.parametrize(
    ("steps", "said"),
    [([100.0, 50.0, math.nan], "2 batch sizes reached the loss; the trade-off needs at least 3"),
     ([100.0, 50.0, 0.0], "must be positive; the smallest are 1 and 0")],
)  # fmt: skip
def test_what_says_nothing_of_a_trade_off_is_refused(steps, said):
    with pytest.raises(FitError, match=said):
        fit_tradeoff([1, 2, 4], steps)


def test_the_noise_scale_follows_from_the_expected_norms_at_two_batch_sizes():
    found = noise_scale([3 + 12 / 2], [3 + 12 / 32], 2, 32)
    assert found.gradient2 == pytest.approx(3)
    assert found.noise == pytest.approx(12)
    assert found.batch == pytest.approx(4)


def test_the_estimates_are_unbiased_on_gradients_with_a_known_covariance():
    rng = np.random.default_rng(0)
    mean, deviation = rng.standard_normal(20), rng.uniform(0.5, 3, 20)
    examples = mean + deviation * rng.standard_normal((20_000, 8, 20))
    small, big = (examples**2).sum(-1), (examples.mean(1) ** 2).sum(-1)
    found = noise_scale(small, big, 1, 8)
    assert found.noise == pytest.approx((deviation**2).sum(), rel=0.02)
    assert found.gradient2 == pytest.approx((mean**2).sum(), rel=0.02)


def test_a_gradient_that_is_nothing_but_noise_has_no_noise_scale():
    assert math.isnan(noise_scale([8.0], [0.9], 1, 8).batch)


def test_equal_batch_sizes_say_nothing():
    with pytest.raises(FitError, match="small=8 must be above 0 and below big=8"):
        noise_scale([1.0], [1.0], 8, 8)
