"""The Markov source: its entropy and floor by hand, its samples against its probabilities, and a run that learns."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import RunConfig, sweep
from jaxgpt.config import override
from jaxgpt.tasks import markov

SETTINGS = {
    "model.d_model": 8, "model.n_layers": 1, "model.n_heads": 1, "model.vocab_size": 4, "model.context": 8,
    "train.batch_size": 16, "train.eval_windows": 64, "train.steps": 60, "train.log_every": 60,
}  # fmt: skip


def made(p_CxV, order):
    return markov.Chain(order, np.array(p_CxV), markov.stationary(np.array(p_CxV)))


def sequences(chain, length):
    """Probability of every sequence of so many tokens: an independent way to any entropy."""
    vocabulary = chain.p_CxV.shape[1]
    found = {}
    for tokens in itertools.product(range(vocabulary), repeat=length):
        context = sum(t * vocabulary**i for i, t in enumerate(reversed(tokens[: chain.order])))
        p = chain.p_C[context]
        for token in tokens[chain.order :]:
            p *= chain.p_CxV[context, token]
            context = (context * vocabulary + token) % len(chain.p_C)
        found[tokens] = p
    return found


def test_a_two_state_chain_has_the_closed_form_entropy():
    chain = made([[0.9, 0.1], [0.3, 0.7]], 1)
    np.testing.assert_allclose(chain.p_C, [0.75, 0.25], atol=1e-12)
    by_hand = -0.75 * (0.9 * math.log(0.9) + 0.1 * math.log(0.1)) - 0.25 * (0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert markov.entropy_rate(chain) == pytest.approx(by_hand, rel=1e-12)
    assert markov.floor(chain, 5) == pytest.approx(by_hand, rel=1e-12)  # one token tells all that the past can


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_floor_is_the_entropy_of_a_window_given_its_first_token(order):
    chain, context = markov.chain(3, 3, order, 2.0), 4
    p = np.array(list(sequences(chain, context + 1).values()))
    assert p.sum() == pytest.approx(1, rel=1e-9)
    first = chain.p_C.reshape(3, -1).sum(axis=1)
    entropy = -(p * np.log(p)).sum() + (first * np.log(first)).sum()
    assert markov.floor(chain, context) == pytest.approx(entropy / context, rel=1e-9)
    assert markov.floor(chain, context) >= markov.entropy_rate(chain) - 1e-12


def test_a_window_shorter_than_the_order_has_a_floor_of_its_own():
    chain = markov.chain(0, 3, 3, 2.0)
    joint = chain.p_C.reshape(3, 3, 3).sum(axis=2)
    by_hand = -(joint * np.log(joint / joint.sum(axis=1, keepdims=True))).sum()
    assert markov.floor(chain, 1) == pytest.approx(by_hand, rel=1e-9)


def test_a_chain_that_never_settles_is_refused():
    with pytest.raises(ValueError, match="does not settle"):
        markov.stationary(np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]))


def test_sampled_sequences_have_the_chains_probabilities():
    chain = markov.chain(1, 3, 2, 3.0)
    cumulative = jnp.asarray(chain.p_CxV.cumsum(axis=1)), jnp.asarray(chain.p_C.cumsum())
    drawn = np.asarray(markov.walk(*cumulative, jax.random.key(0), 2, 20_000, 4))
    assert drawn.shape == (20_000, 4)
    assert drawn.dtype == np.int32
    seen = np.bincount(drawn @ 3 ** np.arange(3, -1, -1), minlength=81) / len(drawn)
    expected = np.array(list(sequences(chain, 4).values()))
    # Five standard errors of each frequency, with room for the rarest.
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected / len(drawn)) + 1e-4).all()


def test_each_seed_learns_a_chain_of_its_own_and_stays_above_its_floor(tmp_path):
    configs = [override(RunConfig(), {**SETTINGS, "train.seed": seed}) for seed in (0, 1)]
    runs = sweep(configs, tmp_path, setup=lambda c: markov.source(c, 1, 1.0, 2), progress=False)
    assert list(runs["numbers.chain"]) == [0, 1]
    losses, errors = runs["final_loss"].to_numpy(), runs["final_loss_sem"].to_numpy()
    for seed in (0, 1):
        chain = markov.chain(seed, 4, 1, 1.0)
        assert losses[seed] > markov.floor(chain, 8) - 4 * errors[seed]
        assert losses[seed] < -(chain.p_C * np.log(chain.p_C)).sum()  # it uses what the last token tells
    assert losses[0] != losses[1]
    assert markov.floor(markov.chain(0, 4, 1, 1.0), 8) != markov.floor(markov.chain(1, 4, 1, 1.0), 8)
