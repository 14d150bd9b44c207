"""Pruning: masks against sorting by hand, changes against their definitions, costs against closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import pruning

shares = st.floats(0, 1)


@given(shares, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_what_goes_is_so_many_and_no_score_that_goes_is_above_one_that_stays(share, rows, columns, seed):
    score = np.random.default_rng(seed).integers(0, 5, (rows, columns)).astype(float)
    goes = pruning.lowest(score, share)
    assert goes.sum() == round(share * score.size)
    if goes.any() and not goes.all():
        assert score[goes].max() <= score[~goes].min()


def test_all_matrices_together_may_lose_all_of_one():
    masks = pruning.lowest_of_all({"small": np.array([[1.0, 2.0]]), "large": np.array([[3.0], [4.0], [5.0]])}, 0.6)
    assert masks["small"].tolist() == [[True, True]]
    assert masks["large"].tolist() == [[True], [False], [False]]


def test_each_output_keeps_as_many_weights_and_those_of_its_own_highest_scores():
    score_IxO = np.array([[1.0, 40.0], [2.0, 10.0], [3.0, 30.0], [4.0, 20.0]])
    goes = pruning.lowest_by_output(score_IxO, 0.5)
    assert goes.tolist() == [[True, False], [True, True], [False, False], [False, True]]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="share="):
        pruning.lowest(np.ones(3), share)


@pytest.mark.parametrize("how", pruning.CHANGES)
def test_a_change_is_what_it_says_under_the_mask_and_nothing_elsewhere(how):
    draw = np.random.default_rng(0)
    trained, initial, fresh = draw.standard_normal((3, 20, 30))
    mask = draw.random((20, 30)) < 0.5
    before = trained.copy()
    new = pruning.changed(how, trained, initial, fresh, mask, draw)
    assert (new[~mask] == trained[~mask]).all()
    assert (trained == before).all()
    expected = {"rewind": initial[mask], "re-random": fresh[mask], "zero": np.zeros(mask.sum())}
    if how == "permute":
        assert sorted(new[mask]) == sorted(trained[mask])
        assert (new[mask] != trained[mask]).mean() > 0.9
    else:
        assert (new[mask] == expected[how]).all()


def test_permuting_changes_twice_the_squares_of_zeroing():
    draw = np.random.default_rng(0)
    w, all_of_it = draw.standard_normal((300, 300)), np.ones((300, 300), bool)
    squares = {how: np.square(pruning.changed(how, w, w, w, all_of_it, draw) - w).sum() for how in ("permute", "zero")}
    assert squares["permute"] / squares["zero"] == pytest.approx(2, rel=0.02)


def test_what_is_kept_of_the_gain_runs_from_1_as_trained_to_0_as_untrained_and_below():
    assert pruning.retained(np.array([2.0, 3.5, 5.0, 6.5]), 5.0, 2.0).tolist() == [1.0, 0.5, 0.0, -0.5]
    with pytest.raises(ValueError, match="not below"):
        pruning.retained(2.0, 5.0, 5.0)


def test_the_tolerated_sparsity_is_the_first_crossing_on_straight_lines():
    sparsity = np.array([0.0, 0.2, 0.6, 0.8])
    assert pruning.tolerated(sparsity, np.array([1.0, 1.0, 0.8, 0.9]), 0.9) == pytest.approx(0.4)
    assert pruning.tolerated(sparsity, np.array([1.0, 0.99, 0.98, 0.97]), 0.9) == 0.8
    assert pruning.tolerated(sparsity, np.array([0.5, 0.4, 0.3, 0.2]), 0.9) == 0.0


@given(st.floats(0, np.pi), st.floats(0.1, 10))
def test_the_angle_of_a_turned_vector_is_the_turn_over_pi_whatever_the_lengths(turn, length):
    start = np.random.default_rng(0).uniform(0, 2 * np.pi, 5)
    a = np.stack([np.cos(start), np.sin(start)], axis=1)
    b = length * np.stack([np.cos(start + turn), np.sin(start + turn)], axis=1)
    assert pruning.angular_distance(a, b) == pytest.approx(turn / np.pi, abs=1e-6)
