"""One symbol to hold: what is drawn, what is right, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import BadInput, RunConfig, override
from jaxgpt.tasks import latch

TINY = {"model.architecture": "rnn", "model.d_model": 6, "model.n_layers": 1, "model.context": 6,
        "model.vocab_size": 8, "train.batch_size": 64, "train.eval_windows": 10}  # fmt: skip


def task(symbols=3, lags=(1, 5), shortest=1, **settings):
    return latch.source(override(RunConfig(), {**TINY, **settings}), symbols, lags, shortest).task


def test_the_symbol_stands_its_lag_before_the_mark_and_noise_elsewhere():
    lag_B = jnp.asarray([1, 2, 3, 4, 5] * 20)
    drawn = jax.jit(latch.draw, static_argnums=(2, 3, 4))(jax.random.key(0), lag_B, 6, 3, 4)
    token_BxT, symbol_B = np.asarray(drawn.token_BxT), np.asarray(drawn.symbol_B)
    place_B = 5 - np.asarray(lag_B)
    assert (token_BxT[np.arange(100), place_B] == symbol_B).all()
    assert set(symbol_B) == {0, 1, 2}
    assert (token_BxT[:, -1] == 7).all()
    noise = np.ones_like(token_BxT, bool)
    noise[:, -1] = noise[np.arange(100), place_B] = False
    assert set(token_BxT[noise]) == {3, 4, 5, 6}


@pytest.mark.parametrize("shortest", [1, 3, 5])
def test_a_batch_has_all_lags_from_the_shortest_to_the_longest(shortest):
    data = (None, {"shortest": jnp.float32(shortest)})
    token_BxT = np.asarray(jax.jit(task().sample)(data, jax.random.key(1), jnp.asarray(0)).token_BxT)
    assert set(5 - (token_BxT < 3).argmax(axis=1)) == set(range(shortest, 6))
    assert ((token_BxT < 3).sum(axis=1) == 1).all()


def test_held_out_answers_come_by_lag():
    its = task()
    key = jax.random.split(jax.random.key(latch.HELD_OUT), 2)[1]

    @jax.jit
    def both(params):
        return its.evaluate(params, None), its.answered(params, its.drawn(key, jnp.full(10, 5)))

    seen, (nats_W, right_W) = both(its.init(0))
    assert seen[0].shape == seen[1].shape == (2, 10)
    assert np.allclose(seen[0][1], nats_W, rtol=1e-5)
    assert (seen[1][1] == right_W).all()


def test_a_summary_has_recall_by_lag_and_the_error_of_a_mean_of_means():
    nats = np.asarray([[0.0, 2.0], [1.0, 1.0]])
    said = task().summarise((nats, np.asarray([[True, False], [True, True]])))
    assert said == pytest.approx({"validation_loss": 1, "validation_loss_sem": 0.5, "validation_recall_1": 0.5,
                                  "validation_recall_5": 1})  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"symbols": 1}, "symbols=1 is not allowed"),
        ({"symbols": 7}, "symbols=7 is not allowed"),
        ({"lags": (6,)}, "a lag of 6 is not allowed"),
        ({"shortest": 0}, "a lag of 0 is not allowed"),
        ({"model.d_output": 2}, "model.d_output"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given, said):
    with pytest.raises(BadInput, match=said) as refused:
        task(**given)
    assert "\n" not in str(refused.value)
