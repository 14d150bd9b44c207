"""Key-value memories: triggers, endings, coherence and agreement against cases done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import memories


def test_triggers_are_the_largest_activations_behind_the_skipped_places():
    hidden = np.zeros((2, 4, 2), np.float32)
    hidden[0, 0] = 9.0  # too early
    hidden[1, 2, 0], hidden[0, 3, 0], hidden[1, 3, 1] = 3.0, 2.0, 1.0
    values, places = memories.triggers(hidden, 2, skip=1)
    assert np.asarray(values).tolist() == [[3, 2], [1, 0]]
    # Of the zeros of the second unit the earliest place: 1 of the first window.
    assert np.asarray(places).tolist() == [[6, 3], [7, 1]]


def test_too_few_places_for_triggers_are_refused():
    with pytest.raises(ValueError, match="no 3 places"):
        memories.triggers(np.zeros((1, 4, 2), np.float32), 3, skip=2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_endings_are_equal_where_the_last_tokens_are(seed, length):
    token = np.random.default_rng(seed).integers(0, 2, (3, 6))
    ending = memories.endings(token, length)
    last = {(w, t): tuple(token[w, t - length + 1 : t + 1]) for w in range(3) for t in range(length - 1, 6)}
    assert (ending[:, : length - 1] == -1).all()
    assert all((ending[a] == ending[b]) == (last[a] == last[b]) for a in last for b in last)


def test_coherence_is_the_share_of_the_commonest_ending():
    ending = np.asarray([[5, 5, 7, 5, 8, 9]])
    assert memories.coherence(ending, np.asarray([[0, 1, 2, 3], [0, 2, 4, 5]])).tolist() == [0.75, 0.25]


def test_the_promoted_token_is_the_largest_logit_behind_the_final_norm():
    rng = np.random.default_rng(0)
    value, scale, unembed = rng.standard_normal((20, 6)), rng.uniform(0.5, 2, 6), rng.standard_normal((6, 9))
    normed = (value - value.mean(axis=1, keepdims=True)) / value.std(axis=1, keepdims=True) * scale
    assert (memories.promoted(value, scale, unembed) == (normed @ unembed).argmax(axis=1)).all()


def test_luck_is_the_mean_over_all_ways_to_deal_the_values_anew():
    rng = np.random.default_rng(1)
    said, came = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    agrees, luck = memories.agreement(said, came)
    assert agrees == np.mean(said == came)
    # Each value meets each key equally often: all pairs.
    assert luck == pytest.approx(np.mean(said[:, None] == came[None]))
    assert np.isnan(memories.agreement(said[:0], came[:0])).all()
