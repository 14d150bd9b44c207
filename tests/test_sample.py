"""Text from a model: what the next token is drawn from, and the text that follows."""

import math
from dataclasses import replace as with_
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from jaxgpt import build, sample
from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.recurrent import Recurrent
from jaxgpt.sample import distribution, draw, generate

V = 11
TINY = ModelConfig(d_model=12, n_layers=1, n_heads=3, context=16, vocab_size=V)
PROMPT = [3, 1, 4, 1, 5]


def lively(c, seed=0):
    """A model whose next tokens are neither certain nor all alike."""
    graphdef, state = nnx.split((build.Transformer if c.architecture == "transformer" else Recurrent)(c))
    rng = np.random.default_rng(seed)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(0.35 * rng.standard_normal(p.shape), p.dtype), state))


@pytest.fixture(scope="module")
def model():
    return lively(TINY)


@jax.jit
def full_pass(model, tokens_BxT):
    return model(tokens_BxT)


def logits_behind(model, ids):
    """By a full pass, of one shape for all lengths: what stands later changes nothing."""
    return full_pass(model, np.pad(ids, (0, TINY.context - len(ids)))[None])[0, len(ids) - 1]


def text(model, prompt=PROMPT, max_tokens=10, **settings):
    return list(generate(model, prompt, max_tokens=max_tokens, **settings))


# --- the distribution, by hand -------------------------------------------------------------------------------------

LOG_P = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32)) + 5  # logits are free up to a constant


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # p^2, scaled
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-45}, [0, 1, 0, 0]),  # 1 / temperature is beyond float32
        ({"temperature": 1e30}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),  # what crosses p is in
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),  # at least one
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),  # of .444 .333 .222 two reach .75; uncut it takes three
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),  # at temperature 1 it takes two
        ({"temperature": 0, "top_k": 3, "top_p": 0.9}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_small_cases_are_as_by_hand(settings, expected):
    for compiled in (partial(distribution, **settings), jax.jit(lambda x, s: distribution(x, **s))):
        p_V = compiled(LOG_P) if isinstance(compiled, partial) else compiled(LOG_P, settings)
        np.testing.assert_allclose(p_V, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 0.5, 0.5, 0, 0]),
        ({"top_k": 3}, [0, 1 / 3, 1 / 3, 0, 1 / 3]),
        ({"top_p": 0.3}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.5}, [0, 0.5, 0.5, 0, 0]),
        ({"temperature": 1e-6}, [0, 1 / 3, 1 / 3, 0, 1 / 3]),  # only at 0 itself the first of equals takes all
    ],
    ids=str,
)
def test_of_equally_probable_tokens_the_lower_ids_stay(settings, expected):
    p_V = distribution(jnp.array([0.0, 2.0, 2.0, -1.0, 2.0]), **settings)
    np.testing.assert_allclose(p_V, expected, rtol=1e-6, atol=0)


def test_probabilities_are_float32_whatever_the_logits():
    rough = distribution(jnp.asarray(LOG_P, jnp.bfloat16), 0.7, 3, 0.9)
    assert rough.dtype == jnp.float32
    assert rough.sum() == pytest.approx(1, abs=1e-6)


def test_top_p_1_drops_no_token_of_a_large_vocabulary_by_rounding():
    logits_V = np.random.default_rng(0).normal(0, 3, 20_000).astype(np.float32)
    np.testing.assert_array_equal(distribution(logits_V, 1.0, None, 1.0), jax.nn.softmax(logits_V))
    assert (distribution(logits_V, 1.0, 19_999, 1.0) > 0).sum() == 19_999


# --- what always holds ---------------------------------------------------------------------------------------------

LOGITS = hnp.arrays(np.float32, 7, elements=st.floats(-20, 20, width=32, allow_subnormal=False))  # XLA reads those as 0
TEMPERATURE = st.floats(0, 100, width=32)
TOP_K = st.integers(1, 9)
TOP_P = st.floats(2**-20, 1, width=32)
compiled = jax.jit(distribution)


@given(LOGITS, TEMPERATURE, TOP_K, TOP_P)
@settings(max_examples=150, deadline=None)
def test_it_is_a_distribution_that_favours_what_the_logits_do_and_its_best_is_the_greedy_token(
    logits_V, temperature, top_k, top_p
):
    p_V = np.asarray(compiled(logits_V, temperature, top_k, top_p))
    assert (p_V >= 0).all()
    assert p_V.sum() == pytest.approx(1, abs=1e-5)
    assert p_V[logits_V.argmax()] == p_V.max()
    assert 1 <= (p_V > 0).sum() <= top_k
    ordered_R = p_V[np.argsort(-logits_V, stable=True)]
    assert (np.diff(ordered_R) <= 1e-7).all()


@given(LOGITS, TEMPERATURE, TOP_P)
@settings(max_examples=150, deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits_V, temperature, top_p):
    all_V = np.asarray(compiled(logits_V, temperature, 7, 1.0), np.float64)
    kept = set(np.flatnonzero(compiled(logits_V, temperature, 7, top_p)))
    order = np.argsort(-logits_V, stable=True)
    reached = np.cumsum([all_V[token] for token in order])
    assume(np.abs(reached - top_p).min() > 1e-5)  # else rounding decides
    needed = 1 + int((reached < top_p).sum())
    assert kept == {token for token in order[:needed] if all_V[token] > 0}


@given(LOGITS, TEMPERATURE, TOP_K, TOP_P)
@settings(max_examples=100, deadline=None)
def test_top_p_acts_on_what_top_k_left_scaled(logits_V, temperature, top_k, top_p):
    first_V = compiled(logits_V, temperature, top_k, 1.0)
    both_V = compiled(logits_V, temperature, top_k, top_p)
    again_V = compiled(jnp.log(first_V), 1.0, 7, top_p)
    reached = np.cumsum(np.sort(np.asarray(first_V))[::-1])
    assume(np.abs(reached - top_p).min() > 1e-5)
    # Sorted: different logits may have the same probability, and then `again` cannot tell which is first.
    np.testing.assert_allclose(np.sort(both_V), np.sort(again_V), rtol=1e-4, atol=1e-7)


@given(LOGITS, TEMPERATURE)
@example(np.zeros(7, np.float32), 0.0)
@example(np.array([0, 1e-7, 0, 0, 0, 0, 0], np.float32), 4.0)  # all probabilities round to the same
@settings(max_examples=100, deadline=None)
def test_what_cuts_nothing_changes_nothing_and_top_k_1_and_temperature_0_are_greedy(logits_V, temperature):
    np.testing.assert_array_equal(compiled(logits_V, temperature, 7, 1.0), compiled(logits_V, temperature, None, None))
    greedy_V = np.eye(7)[logits_V.argmax()]
    np.testing.assert_array_equal(compiled(logits_V, 0.0, None, None), greedy_V)
    np.testing.assert_array_equal(compiled(logits_V, temperature, 1, None), greedy_V)


@given(LOGITS)
@settings(max_examples=50, deadline=None)
def test_as_temperature_falls_to_0_all_mass_goes_to_the_largest_logit(logits_V):
    second, first = np.sort(logits_V)[-2:]
    assume(first - second > 1e-3)
    np.testing.assert_allclose(compiled(logits_V, 1e-5, None, None), np.eye(7)[logits_V.argmax()], atol=1e-6)


def test_batches_of_logits_go_through_vmap():
    logits_BxV = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)
    settings = (jnp.array([0.0, 0.5, 2.0]), jnp.array([3, 4, 5]), jnp.array([1.0, 0.5, 0.9]))
    batch_BxV = jax.jit(jax.vmap(distribution))(logits_BxV, *settings)
    for row, logits_V in enumerate(logits_BxV):
        np.testing.assert_allclose(batch_BxV[row], compiled(logits_V, *(s[row] for s in settings)), atol=1e-7)


# --- draws ---------------------------------------------------------------------------------------------------------


def chi_square_p(counts_V, p_V):
    """How likely so large a deviation is, after asserting that what is impossible was never drawn."""
    assert (counts_V[p_V == 0] == 0).all()
    expected_V = counts_V.sum() * p_V[p_V > 0]
    assert expected_V.min() > 20
    chi_square = ((counts_V[p_V > 0] - expected_V) ** 2 / expected_V).sum()
    return stats.chi2.sf(chi_square, len(expected_V) - 1)


@pytest.mark.parametrize("settings", [(1.0, 4, 1.0), (0.6, 3, 1.0), (2.0, 4, 0.7)], ids=str)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_tokens_are_drawn_as_often_as_the_distribution_says(settings, over):
    many = jnp.arange(20_000)
    one = (lambda i: draw(LOG_P, i, 3, *settings)) if over == "seeds" else (lambda i: draw(LOG_P, 3, i, *settings))
    counts_V = np.bincount(jax.jit(jax.vmap(one))(many), minlength=4)
    p_V = np.asarray(distribution(LOG_P, *settings))
    assert chi_square_p(counts_V, p_V) > 1e-4
    assert chi_square_p(counts_V, np.where(p_V > 0, 1, 0) / (p_V > 0).sum()) < 1e-9  # it would see another one


def test_the_first_token_of_a_text_comes_from_the_distribution_of_the_models_logits(model):
    logits_V = logits_behind(model, PROMPT)
    settings = {"temperature": 1.5, "top_k": 4, "top_p": 0.8}
    p_V = np.asarray(distribution(logits_V, **settings))
    assert 2 <= (p_V > 0).sum() <= 4
    first = jax.jit(jax.vmap(lambda seed: draw(logits_V, seed, len(PROMPT), **settings)))(np.arange(20_000))
    assert chi_square_p(np.bincount(first, minlength=V), p_V) > 1e-4
    assert [text(model, max_tokens=1, seed=seed, **settings)[0] for seed in range(20)] == first[:20].tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_token(bad):
    logits_V = jnp.zeros(V).at[3].set(bad)
    assert draw(logits_V, 0, 0) == sample.NOT_FINITE
    impossible = jnp.zeros(V).at[3].set(-np.inf)  # as a mask makes a token
    assert int(draw(impossible, 0, 0)) in set(range(V)) - {3}


def test_a_model_of_nans_says_so_instead_of_making_text():
    broken = lively(with_(TINY, n_layers=0))
    broken.unembed.kernel[...] = jnp.full((12, V), jnp.nan)
    with pytest.raises(BadInput, match=r"^the logits behind 5 tokens are not finite"):
        text(broken)


# --- text ----------------------------------------------------------------------------------------------------------


jitted_draw = jax.jit(draw)


def slow_text(model, prompt, max_tokens, seed=0, **settings):
    """By full passes over all that is there, again for each token."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(jitted_draw(logits_behind(model, ids), seed, len(ids), **settings)))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"positions": "learned", "scan_layers": True},
        {"n_experts": 3},
        {"n_layers": 0},
        {"architecture": "lstm"},
        {"architecture": "rnn"},
    ],
    ids=str,
)
def test_a_text_is_what_full_passes_over_all_before_would_make(fields):
    m = lively(with_(TINY, **fields))
    greedy = text(m, max_tokens=4, temperature=0)
    assert greedy == slow_text(m, PROMPT, 4, temperature=0)
    drawn = text(m, max_tokens=4, seed=5, temperature=2.0)
    assert drawn == slow_text(m, PROMPT, 4, seed=5, temperature=2.0)
    assert greedy != drawn


@pytest.mark.parametrize("architecture", ["transformer", "rnn"])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 15])
def test_a_prompt_of_any_length_is_read_whole_in_pieces(monkeypatch, architecture, length):
    monkeypatch.setattr(sample, "PIECES", (4, 2, 1))
    c = with_(TINY, architecture=architecture)
    prompt = np.random.default_rng(length).integers(0, V, length)
    assert [len(piece) for piece in sample._pieces(prompt)] == [4] * (length // 4) + [2] * (length % 4 // 2) + [1] * (
        length % 2
    )
    m = shared(c)
    assert text(m, prompt, 1, seed=3) == [int(jitted_draw(logits_behind(m, prompt), 3, length))]


_models = {}


def shared(c):
    return _models.setdefault(c, lively(c))


def test_a_text_may_outgrow_the_context_where_positions_are_no_table(model):
    longer = text(model, max_tokens=20, temperature=0)
    assert len(PROMPT) + len(longer) > TINY.context
    full = full_pass(model, np.array([[*PROMPT, *longer]]))
    np.testing.assert_array_equal(np.argmax(full[0, len(PROMPT) - 1 : -1], axis=-1), longer)


def test_learned_positions_are_used_to_their_last_row():
    m = shared(with_(TINY, positions="learned", n_layers=0))
    assert len(text(m, max_tokens=12)) == 12  # the last token is made from position 16, and not read
    with pytest.raises(BadInput, match=r"^max_tokens=13 behind a prompt of 5 .*model\.context=16; at most 12 tokens"):
        generate(m, PROMPT, max_tokens=13)


def test_the_same_seed_gives_the_same_text_and_other_seeds_others(model):
    texts = [tuple(text(model, seed=seed)) for seed in range(20)]
    assert texts == [tuple(text(model, seed=seed)) for seed in range(20)]
    assert len(set(texts)) == 20


def test_a_shorter_text_and_a_continued_one_are_parts_of_the_longer_one(model):
    whole = text(model, max_tokens=10, seed=4)
    assert text(model, max_tokens=3, seed=4) == whole[:3]
    assert text(model, PROMPT + whole[:3], max_tokens=7, seed=4) == whole[3:]


def test_stop_ends_the_text_and_is_not_part_of_it(model):
    whole = text(model, seed=2)
    stop = whole[4]
    assert text(model, seed=2, stop=stop) == whole[: whole.index(stop)]
    never = next(token for token in range(V) if token not in whole)
    assert text(model, seed=2, stop=never) == whole


def test_settings_and_prompts_of_the_same_pieces_take_the_programs_that_are_there(model):
    text(model)
    before = sample._advance._cache_size()
    for change in ({"temperature": 0.3}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.4}, {"seed": 9}, {"stop": 1}):
        text(model, **change)
    text(model, [1, 2, 3], max_tokens=4)
    text(model, np.array([7], np.uint8), max_tokens=1)
    assert sample._advance._cache_size() == before
    text(lively(with_(TINY, n_layers=0, d_model=18)), max_tokens=1)
    assert sample._advance._cache_size() > before  # another shape is seen


def test_each_token_comes_before_the_next_is_computed(monkeypatch, model):
    calls, advance = [], sample._advance
    monkeypatch.setattr(sample, "_advance", lambda *args: calls.append(1) or advance(*args))
    stream = generate(model, [3], max_tokens=5)
    assert len(calls) == 0
    for made in range(1, 6):
        next(stream)
        assert len(calls) == made  # one for the prompt, one for each token but the last
    assert list(stream) == []
    assert len(calls) == 5


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, r"prompt_ids is empty; .*at least one token"),
        ([[1, 2]], {}, r"prompt_ids of shape \(1, 2\) .*one list of whole numbers"),
        ([1.0], {}, r"prompt_ids of shape \(1,\) and type float64"),
        ([1, V], {}, r"prompt_ids holds 11; .*from 0 to 10"),
        ([-1], {}, r"prompt_ids holds -1; .*from 0 to 10"),
        ([1], {"max_tokens": 0}, r"max_tokens=0 .*at least 1"),
        ([1], {"max_tokens": 2.5}, r"max_tokens=2\.5 .*whole number"),
        ([1], {"temperature": -0.1}, r"temperature=-0\.1 .*at least 0"),
        ([1], {"temperature": math.nan}, r"temperature=nan .*finite"),
        ([1], {"temperature": "hot"}, r"temperature=hot .*number"),
        ([1], {"top_k": 0}, r"top_k=0 .*at least 1 or null"),
        ([1], {"top_k": True}, r"top_k=True .*whole number"),
        ([1], {"top_p": 0}, r"top_p=0 .*above 0 and at most 1"),
        ([1], {"top_p": 1.01}, r"top_p=1\.01 .*above 0 and at most 1"),
        ([1], {"top_p": math.nan}, r"top_p=nan .*above 0 and at most 1"),
        ([1], {"seed": -1}, r"seed=-1 .*from 0 to 2\^32 - 1"),
        ([1], {"seed": 2**32}, r"seed=4294967296 .*from 0 to 2\^32 - 1"),
        ([1], {"stop": V}, r"stop=11 .*below 11 or null"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_refused_at_the_call_in_one_line(model, prompt, settings, message):
    with pytest.raises(BadInput, match="^" + message) as error:
        generate(model, prompt, **({"max_tokens": 3} | settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"causal": False}, r"model\.causal=false"),
        ({"d_input": 5}, r"model\.d_input=5"),
        ({"d_output": 2}, r"model\.d_output=2"),
    ],
    ids=str,
)
def test_a_model_that_makes_no_text_is_refused(fields, message):
    with pytest.raises(BadInput, match="^" + message):
        generate(lively(with_(TINY, n_layers=0, **fields)), [1], max_tokens=3)


def test_the_largest_seed_and_a_top_k_beyond_the_vocabulary_are_taken(model):
    assert text(model, seed=2**32 - 1, top_k=10**12) == text(model, seed=np.uint32(2**32 - 1), top_k=V)


def test_only_ids_of_the_vocabulary_are_drawn_and_as_if_there_were_no_others(model):
    logits_V = logits_behind(model, PROMPT)
    settings = {"temperature": 3.0, "seed": 5}
    assert (
        text(model, vocabulary=V, **settings) == text(model, vocabulary=10 * V, **settings) == text(model, **settings)
    )
    assert max(text(model, max_tokens=4, **settings, vocabulary=3)) < 3 <= max(text(model, max_tokens=4, **settings))
    expected = int(draw(logits_V.at[3:].set(-jnp.inf), 5, len(PROMPT), temperature=3.0))
    assert text(model, max_tokens=1, **settings, vocabulary=3) == [expected]
