"""Dimensions: estimators against closed forms, against another library's numbers, and on clouds that are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal

from analysis import dimension

# Of scikit-dimension 0.5.0 for the points of `points()`: `skdim.id.TwoNN(discard_fraction=0, method="mle")`,
# `TwoNN()` and `GRIDE(n1=4)`, each `.fit(points()).dimension_`.
REFERENCE = {"twonn": 7.379578077984176, "twonn_fit": 7.11870605293796, "gride": 1.9962649997265123}


def points():
    """A curved sheet with a little noise, the same on every machine up to rounding: [500, 6]. They keep their distance
    from each other more than random ones, which is why nearest neighbours seem to have many dimensions.
    """
    i_N = np.arange(1, 501)
    u_N, v_N, w_N = (np.mod(i_N * a, 1.0) for a in (0.7548776662466927, 0.5698402909980532, 0.4142135623730951))
    flat = [u_N, v_N, np.sin(4 * u_N), np.cos(3 * v_N), u_N * v_N, 0.02 * w_N]
    return np.stack(flat, axis=1)


def pareto(d, n, seed, k=1):
    """Distances of points whose ratios follow Gride's law for dimension d exactly: volumes are sums of exponentials."""
    volume_NxK = np.cumsum(np.random.default_rng(seed).exponential(size=(n, 2 * k)), axis=1)
    return volume_NxK ** (1 / d)


def test_neighbours_are_the_nearest_by_plain_distances_also_far_from_the_origin():
    for shift in (0.0, 1e4):
        x = np.random.default_rng(1).standard_normal((700, 7)) * np.array([1, 1, 1, 1, 1, 1e-3, 1e-5]) + shift
        plain = np.sort(cdist(x, x), axis=1)[:, 1:6]
        np.testing.assert_allclose(dimension.neighbours(x, 5), plain, rtol=1e-9)


def test_two_points_much_closer_than_the_rest_keep_their_distance():
    x = np.random.default_rng(2).standard_normal((40, 5))
    x[7] = x[3] + 1e-9
    assert dimension.neighbours(x, 2)[7, 0] == pytest.approx(np.sqrt(5) * 1e-9, rel=1e-5)


@pytest.mark.parametrize("count", [0, 4, 5])
def test_a_number_of_neighbours_that_is_not_there_is_refused(count):
    with pytest.raises(ValueError, match=f"count={count}"):
        dimension.neighbours(np.eye(4), count)


def test_points_in_one_place_are_refused_and_distinct_drops_them_in_order():
    x = np.array([[3.0, 1], [0, 0], [3, 1], [1, 1], [0, 0]])
    with pytest.raises(ValueError, match="4 points have another in the same place"):
        dimension.neighbours(x, 2)
    np.testing.assert_array_equal(dimension.distinct(x), [[3, 1], [0, 0], [1, 1]])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        dimension.neighbours(np.array([[0.0, 1], [np.nan, 2], [3, 4]]), 1)


def test_lattices_have_no_ratios():
    lattice = np.stack(np.meshgrid(*[np.arange(5.0)] * 2), axis=-1).reshape(-1, 2)
    r = dimension.neighbours(lattice, 4)
    with pytest.raises(ValueError, match="lattice"):
        dimension.twonn(r)
    with pytest.raises(ValueError, match="lattice"):
        dimension.gride(r, 2)


@pytest.mark.parametrize("d", [0.7, 3.0, 25.0])
def test_on_exact_ratios_every_estimator_finds_the_dimension_within_its_error(d):
    r = pareto(d, 4000, 3, k=8)
    tight = [dimension.twonn(r), dimension.twonn_fit(r), dimension.gride(r, 1)]
    for found, error in [*((each, 0.06) for each in tight), (dimension.gride(r, 8), 0.02)]:
        assert found.value == pytest.approx(d, rel=error)
        assert found.low < found.value < found.high
        assert found.points == 4000


def test_twonn_is_unbiased_and_its_interval_covers_as_often_as_it_says():
    found = [dimension.twonn(pareto(5.0, 12, seed), level=0.8) for seed in range(2000)]
    assert np.mean([each.value for each in found]) == pytest.approx(5.0, rel=0.025)
    covered = np.mean([each.low <= 5.0 <= each.high for each in found])
    assert covered == pytest.approx(0.8, abs=0.03)


def test_grides_interval_covers_as_often_as_it_says():
    found = [dimension.gride(pareto(5.0, 60, seed, k=4), 4, level=0.8) for seed in range(800)]
    assert np.mean([each.low <= 5.0 <= each.high for each in found]) == pytest.approx(0.8, abs=0.045)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.floats(0.3, 40), k=st.sampled_from([1, 2, 5]))
def test_gride_is_the_top_of_its_likelihood(seed, d, k):
    r = pareto(d, 30, seed, k)
    found = dimension.gride(r, k).value
    log_mu = np.log(r[:, 2 * k - 1] / r[:, k - 1])

    def likelihood(d):
        return (len(r) - 1) * np.log(d) + ((k - 1) * np.log(np.expm1(d * log_mu)) - (2 * k - 1) * d * log_mu).sum()

    assert all(likelihood(found) >= likelihood(found * factor) for factor in (0.999, 1.001))


def test_gride_at_one_neighbour_is_twonn():
    r = pareto(4.0, 100, 5)
    assert dimension.gride(r, 1).value == pytest.approx(dimension.twonn(r).value, rel=1e-9)


def test_distances_in_other_units_change_nothing_and_other_powers_change_d():
    r = pareto(6.0, 300, 6, k=4)
    for estimate in (dimension.twonn, dimension.twonn_fit, lambda r: dimension.gride(r, 4)):
        assert estimate(1e3 * r).value == pytest.approx(estimate(r).value, rel=1e-9)
        assert estimate(r**2).value == pytest.approx(estimate(r).value / 2, rel=1e-9)


def test_the_participation_ratio_is_that_of_the_covariances_eigenvalues():
    x = np.random.default_rng(7).standard_normal((300, 4)) * [3.0, 2, 1, 0.1] + 5
    values = np.linalg.eigvalsh(np.cov(x.T))
    found = dimension.participation_ratio(x)
    assert found.value == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)
    assert found.low < found.value < found.high
    assert dimension.participation_ratio(np.outer(np.arange(9.0), [1, 2])).value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="same place"):
        dimension.participation_ratio(np.ones((5, 2)))


def test_the_gaussian_null_has_mean_and_covariance_of_the_points_and_their_rank():
    flat = np.random.default_rng(8).exponential(size=(20_000, 2))
    x = flat @ np.array([[1.0, 2, 0], [0, 1, -1]]) + [5, 6, 7]
    null = dimension.gaussian_like(x, 0)
    standard = np.sqrt(np.diag(np.cov(x.T)) / len(x))
    assert (abs(null.mean(axis=0) - x.mean(axis=0)) < 4 * standard).all()
    np.testing.assert_allclose(np.cov(null.T), np.cov(x.T), rtol=0.04, atol=0.04)
    assert np.linalg.matrix_rank(null - null.mean(axis=0), tol=1e-6) == 2
    density = multivariate_normal(x.mean(axis=0)[:2], np.cov(x[:, :2].T))
    assert density.logpdf(null[:, :2]).mean() == pytest.approx(-density.entropy(), rel=0.01)


@pytest.mark.parametrize("name", sorted(dimension.MANIFOLDS))
@pytest.mark.parametrize("d", [2, 5])
def test_on_known_clouds_of_few_dimensions_twonn_is_right(name, d):
    x = dimension.cloud(name, d, 1500, 16, 0.0, 9)
    assert x.shape == (1500, 16)
    assert dimension.twonn(dimension.neighbours(x, 2)).value == pytest.approx(d, rel=0.12)


def test_in_many_dimensions_twonn_falls_short_the_more_the_fewer_the_points():
    few, many = dimension.by_sample_size(dimension.cloud("cube", 20, 2000, 32, 0.0, 10), [125, 2000], 0)
    assert few < many < 18


def test_noise_fills_all_coordinates_at_small_scales_and_gride_sees_past_it():
    r = dimension.neighbours(dimension.cloud("cube", 2, 2000, 16, 0.01, 11), 64)
    near, far = dimension.gride(r, 1).value, dimension.gride(r, 32).value
    assert near > 3.5
    assert far < 2.8


def test_samples_of_a_size_are_disjoint_and_the_whole_cloud_is_one():
    x = np.random.default_rng(12).random((200, 3))
    whole = dimension.twonn(dimension.neighbours(x, 2)).value
    found = dimension.by_sample_size(x, [100, 200], 0)
    assert found[1] == pytest.approx(whole, rel=1e-12)
    order = np.random.default_rng(0).permutation(200)
    halves = [dimension.twonn(dimension.neighbours(x[part], 2)).value for part in (order[:100], order[100:])]
    assert found[0] == pytest.approx(np.mean(halves), rel=1e-12)
    with pytest.raises(ValueError, match="size=300"):
        dimension.by_sample_size(x, [300], 0)


def test_a_cloud_needs_room_for_its_dimensions():
    with pytest.raises(ValueError, match="coordinates=5 must be at least 6 for sphere"):
        dimension.cloud("sphere", 5, 10, 5, 0.0, 0)


def ours():
    """Our estimates for what REFERENCE holds."""
    r = dimension.neighbours(points(), 8)
    return {"twonn": dimension.twonn(r).value, "twonn_fit": dimension.twonn_fit(r).value,
            "gride": dimension.gride(r, 4).value}  # fmt: skip


def test_estimates_are_those_that_scikit_dimension_gave():
    assert ours() == pytest.approx(REFERENCE, rel=1e-7)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # its own, of the largest ratio
def test_estimates_are_those_of_scikit_dimension_where_it_is_there():
    theirs = pytest.importorskip("skdim").id
    made = {"twonn": theirs.TwoNN(discard_fraction=0, method="mle"), "twonn_fit": theirs.TwoNN(),
            "gride": theirs.GRIDE(n1=4)}  # fmt: skip
    assert ours() == pytest.approx({name: each.fit(points()).dimension_ for name, each in made.items()}, rel=1e-7)
