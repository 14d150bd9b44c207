"""Measures of a model's inside: hand-made arrays whose value is known, second computations, and JAX beside NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis import anatomy

D = 12


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def even_pattern(length, heads=1):
    causal = np.tril(np.ones((length, length)))
    return np.broadcast_to(causal / causal.sum(axis=-1, keepdims=True), (heads, length, length))


def first_key_only(length):
    return np.zeros((1, length, length)) + np.eye(length)[0]


# --- parameters ----------------------------------------------------------------------------------------------------


def test_only_arrays_with_values_that_are_not_finite_are_counted():
    leaves = {"good": gaussian(3, 4), "bad": np.asarray([[1.0, np.nan], [-np.inf, np.inf]]), "empty": np.zeros(0)}
    assert anatomy.non_finite(leaves) == {"bad": 3}


def test_an_update_is_a_share_of_the_initial_norm_of_all_arrays_together():
    start = {"a": np.asarray([3.0, 0.0]), "b": np.asarray([[4.0]])}  # norm 5
    assert anatomy.update(start, start) == 0
    assert anatomy.update({"a": np.asarray([3.0, 2.5]), "b": np.asarray([[4.0]])}, start) == 0.5
    assert np.isnan(anatomy.update({"z": np.ones(2)}, {"z": np.zeros(2)}))
    with pytest.raises(KeyError, match="c"):
        anatomy.update({"c": np.ones(2)}, start)


def test_the_top_weight_is_the_one_that_adds_most_at_its_largest_input():
    weight, largest = np.asarray([[1.0, -5.0], [2.0, 0.5], [0.0, 0.1]]), np.asarray([1.0, 3.0, 40.0])
    top = anatomy.top_weight(weight, largest)  # scores: 1, 5; 6, 1.5; 0, 4
    assert (top.row, top.column, top.score) == (1, 0, 6.0)
    assert top.times_median == 6.0 / np.median([1, 5, 6, 1.5, 0, 4])
    inputs = gaussian(50, 3)
    most = abs(inputs[:, :, None] * weight).max(axis=0)
    np.testing.assert_allclose(anatomy.weight_scores(weight, abs(inputs).max(axis=0)), most)


def test_scores_that_are_no_number_are_never_the_top():
    assert anatomy.top_weight(np.asarray([[np.nan, 2.0], [1.0, np.nan]]), np.ones(2))[:3] == (0, 1, 2.0)


# --- units ---------------------------------------------------------------------------------------------------------


def test_a_unit_is_dead_that_was_never_above_zero():
    pre_NxF = np.asarray([[-1.0, 0.0, -3.0, np.nan], [-2.0, 0.0, 0.1, -1.0]])
    np.testing.assert_array_equal(anatomy.dead(pre_NxF.max(axis=0)), [True, True, False, False])


@given(st.floats(1e-3, 1e3))
def test_effectively_dead_does_not_change_when_a_unit_is_scaled_and_its_output_scaled_back(factor):
    largest_F, out_FxD = np.asarray([1e-6, 0.9e-3, 1.1e-3, 5.0]), np.ones((4, 4)) / 2  # rows of norm 1
    for scaled in (1.0, factor):
        found = anatomy.effectively_dead(largest_F * scaled, out_FxD / scaled, stream=1.0)
        np.testing.assert_array_equal(found, [True, True, False, False])
    np.testing.assert_array_equal(anatomy.effectively_dead(largest_F, out_FxD, stream=2.0), [True, True, True, False])


@given(st.integers(1, 10**7), st.sampled_from([0.9, 0.95, 0.99]))
def test_at_the_bound_a_unit_would_stay_silent_as_often_as_the_confidence_leaves_open(tokens, confidence):
    p = anatomy.never_bound(tokens, confidence)
    assert stats.binom.pmf(0, tokens, p) == pytest.approx(1 - confidence, rel=1e-6)
    assert p == pytest.approx(stats.beta.ppf(confidence, 1, tokens), rel=1e-6)  # Clopper-Pearson


def test_the_bound_is_the_rule_of_three_for_many_tokens_and_needs_one():
    assert anatomy.never_bound(100_000) == pytest.approx(3 / 100_000, rel=0.01)
    for tokens, confidence in ((0, 0.95), (5, 1.0)):
        with pytest.raises(ValueError, match="tokens="):
            anatomy.never_bound(tokens, confidence)


def test_the_active_fraction_counts_pairs_of_token_and_unit():
    assert anatomy.active_fraction(np.asarray([[1.0, -1.0, 0.0, 2.0], [-1.0, -1.0, -1.0, 3.0]])) == 3 / 8
    assert anatomy.active_fraction(np.stack([np.ones((5, 2)), -np.ones((5, 2))])).tolist() == [1.0, 0.0]


# --- outliers ------------------------------------------------------------------------------------------------------


def test_kurtosis_is_scipys_and_has_its_known_extremes():
    x = gaussian(7, D)
    np.testing.assert_allclose(anatomy.kurtosis(x), stats.kurtosis(x, axis=-1, fisher=False))
    alone = 5 * np.eye(D)[3]
    assert anatomy.kurtosis(alone) == pytest.approx(D - 2 + 1 / (D - 1))
    assert anatomy.kurtosis(np.tile([1.0, -1.0], 6)) == pytest.approx(1)
    assert np.isnan(anatomy.kurtosis(np.zeros(D)))


@pytest.mark.parametrize("width", [4, D, 96])
def test_kurtosis_of_few_gaussian_values_is_below_three(width):
    found = anatomy.kurtosis(gaussian(40_000, width))
    assert found.mean() == pytest.approx(anatomy.gaussian_kurtosis(width), abs=4 * found.std() / 200)
    assert anatomy.gaussian_kurtosis(width) < 3


def test_kurtosis_of_dimensions_runs_from_one_to_the_width():
    assert anatomy.dimension_kurtosis(np.tile([2.0, -2.0], (9, 6))) == pytest.approx(1)
    assert anatomy.dimension_kurtosis(gaussian(9, 1) * np.eye(D)[4]) == pytest.approx(D)
    assert np.isnan(anatomy.dimension_kurtosis(np.zeros((9, D))))


def test_the_max_median_ratio_is_of_magnitudes():
    assert anatomy.max_median_ratio(np.asarray([[1.0, -2.0, 8.0], [-30.0, 3.0, 2.0]])).tolist() == [4.0, 10.0]
    assert np.isnan(anatomy.max_median_ratio(np.zeros(3)))


@pytest.mark.parametrize(
    ("layers", "hit_layers", "positions", "found"),
    [(4, 1, 24, True), (4, 1, 23, False), (5, 1, 90, False), (4, 4, 6, True), (4, 4, 5, False)],
    ids=["25 % of layers, 6 % of all positions", "too few positions", "too few layers", "just enough", "just not"],
)
def test_int8_outliers_need_enough_layers_and_enough_positions(layers, hit_layers, positions, found):
    x_LxNxD = np.clip(gaussian(layers, 100, D), -5.9, 5.9)
    x_LxNxD[:hit_layers, :positions, 7] = -6.0
    wanted = np.arange(D) == 7
    np.testing.assert_array_equal(anatomy.int8_outliers(x_LxNxD), wanted & found)
    assert not anatomy.int8_outliers(x_LxNxD, magnitude=6.1).any()


@pytest.mark.parametrize(
    ("value", "middle", "found"), [(101, 0.1, True), (-101, 0.1, True), (99, 0.001, False), (150, 0.2, False)]
)
def test_massive_activations_are_large_and_many_times_the_median(value, middle, found):
    x_BxTxD = np.full((2, 20, D), middle)
    x_BxTxD[1, 0, 5] = value
    assert anatomy.massive(x_BxTxD).sum() == found
    assert anatomy.massive(x_BxTxD)[1, 0, 5] == found


# --- attention and the stream --------------------------------------------------------------------------------------


def test_even_attention_is_what_an_even_pattern_measures():
    pattern = even_pattern(9, heads=2)
    sink, entropy = anatomy.even_attention(9)
    np.testing.assert_allclose(anatomy.sinks(pattern), [sink, sink])
    np.testing.assert_allclose(anatomy.attention_entropy(pattern), [entropy, entropy])


def test_a_head_that_looks_at_the_first_position_alone_is_all_sink_and_has_no_entropy():
    assert anatomy.sinks(first_key_only(6)).tolist() == [1.0]
    assert anatomy.attention_entropy(first_key_only(6)).tolist() == [0.0]
    assert anatomy.sinks(np.eye(6)[None]).tolist() == [0.0]  # each at itself


def test_entropy_is_scipys():
    pattern = np.random.default_rng(1).dirichlet(np.ones(5), size=(3, 5))
    np.testing.assert_allclose(anatomy.attention_entropy(pattern), stats.entropy(pattern, axis=-1)[:, 1:].mean(axis=-1))


def test_growth_and_cosine_of_known_vectors():
    before, after = np.asarray([[3.0, 4.0], [1.0, 0.0]]), np.asarray([[3.0, 4.0], [1.0, 1.0]])
    np.testing.assert_allclose(anatomy.growth(before, after), [0, 1])
    np.testing.assert_allclose(anatomy.cosine(before, after), [1, 2**-0.5])
    assert np.isnan(anatomy.growth(np.zeros(2), np.ones(2)))
    assert np.isnan(anatomy.cosine(np.zeros(2), np.ones(2)))


@pytest.mark.parametrize(
    ("measure", "x"),
    [
        *[(f, 40 * gaussian(3, 10, D)) for f in (anatomy.kurtosis, anatomy.dimension_kurtosis, anatomy.massive,
          anatomy.max_median_ratio, anatomy.large, anatomy.int8_outliers, anatomy.active_fraction)],
        (anatomy.sinks, even_pattern(5, 2)), (anatomy.attention_entropy, even_pattern(5, 2)),
    ],
)  # fmt: skip
def test_compiled_for_jax_arrays_a_measure_is_what_it_is_for_numpy(measure, x):
    x = np.asarray(x, np.float32)
    np.testing.assert_allclose(np.asarray(jax.jit(measure)(jnp.asarray(x))), measure(x), rtol=2e-6)
