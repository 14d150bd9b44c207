"""The question of order: what is drawn, what is right, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import BadInput, RunConfig, override
from jaxgpt.tasks import order

TINY = {"model.d_model": 8, "model.n_heads": 2, "model.n_layers": 2, "model.context": 4, "model.vocab_size": 6,
        "train.batch_size": 4, "train.eval_windows": 16}  # fmt: skip


def task(**settings):
    return order.source(override(RunConfig(), {**TINY, **settings})).task


def test_letters_of_a_word_differ_and_the_mark_ends_it():
    words = order.draw(jax.random.key(0), 200, 3, 5)
    token_BxT = np.asarray(words.token_BxT)
    assert (token_BxT[:, -1] == 5).all()
    assert all(len(set(row)) == 3 and max(row) < 5 for row in token_BxT[:, :-1].tolist())
    assert (np.asarray(words.answer_B) == (token_BxT[:, 0] < token_BxT[:, 2])).all()


def test_every_word_is_as_likely():
    token_BxT = np.asarray(order.draw(jax.random.key(1), 30_000, 2, 4).token_BxT)
    counts = [np.all(token_BxT[:, :2] == pair, axis=1).sum() for pair in itertools.permutations(range(4), 2)]
    assert sum(counts) == len(token_BxT)
    assert np.abs(np.asarray(counts) - 2500).max() < 5 * np.sqrt(2500)


def test_a_set_of_letters_says_nothing_of_their_order():
    token_BxT = np.asarray(order.draw(jax.random.key(2), 20_000, 3, 5).token_BxT)
    chosen = (np.sort(token_BxT[:, :3], axis=1) == [0, 1, 4]).all(axis=1)
    first_below = (token_BxT[:, 0] < token_BxT[:, 2])[chosen]
    assert abs(first_below.mean() - 0.5) < 5 * 0.5 / np.sqrt(chosen.sum())


@pytest.mark.parametrize(("causal", "layers", "alike"), [(True, 1, True), (True, 2, False)])
def test_reordered_letters_get_another_answer_only_behind_two_layers_with_a_mask(causal, layers, alike):
    """In a single layer the mark sees a bag of tokens, whatever the mask."""
    its = task(**{"model.causal": causal, "model.positions": "none", "model.n_layers": layers})
    words = order.draw(jax.random.key(3), 50, 3, 5)
    turned = words._replace(token_BxT=words.token_BxT[:, jnp.asarray([2, 0, 1, 3])])
    answered = jax.jit(lambda token_BxT: its.answered(its.init(0), words._replace(token_BxT=token_BxT))[0])
    change = np.abs(np.asarray(answered(words.token_BxT) - answered(turned.token_BxT))).max()
    assert change < 1e-5 if alike else change > 1e-3


def test_a_summary_has_the_mean_and_its_standard_error():
    said = task().summarise((np.asarray([0.0, 2.0]), np.asarray([True, False])))
    assert said == pytest.approx({"validation_loss": 1, "validation_loss_sem": 1, "validation_accuracy": 0.5})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.context": 2}, "model.context=2 is too short"),
        ({"model.vocab_size": 3}, "model.vocab_size=3 is too small"),
        ({"model.d_output": 2}, "model.d_output"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(settings, said):
    with pytest.raises(BadInput, match=said) as refused:
        task(**settings)
    assert "\n" not in str(refused.value)
