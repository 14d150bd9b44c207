"""Attention in blocks of queries equals the softmax of the definition, and so does its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import blockwise


def plain(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, scale):
    """The definition, with every score at once."""
    length = q_BxTxHxK.shape[1]
    scores_BxHxTxS = scale * jnp.einsum("BTHK,BSHK->BHTS", q_BxTxHxK, k_BxTxHxK)
    seen_TxS = np.tril(np.ones((length, length), bool))
    pattern_BxHxTxS = jax.nn.softmax(jnp.where(seen_TxS, scores_BxHxTxS, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHK->BTHK", pattern_BxHxTxS, v_BxTxHxK)


def values_and_gradients(attention, arrays, g):
    """In one program; one by one, its operations would each have to be compiled."""

    @jax.jit
    def both(arrays, g):
        value, back = jax.vjp(attention, *arrays)
        return value, back(g)

    return both(arrays, g)


@pytest.mark.parametrize("length", [1, 7, 130, 192])
def test_values_and_gradients_are_those_of_the_definition(length):
    random = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(random.normal(size=(2, length, 3, 4)), jnp.float32) for _ in range(4))
    ours, gradients = values_and_gradients(lambda *qkv: blockwise.causal(*qkv, 0.7, None), (q, k, v), g)
    theirs, their_gradients = values_and_gradients(lambda *qkv: plain(*qkv, 0.7), (q, k, v), g)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    for mine, right in zip(gradients, their_gradients, strict=True):
        np.testing.assert_allclose(mine, right, atol=5e-6)


def test_scores_beyond_the_range_of_exp_stay_finite():
    x = jnp.full((1, 128, 1, 2), 30.0)
    value, gradient = jax.jit(jax.value_and_grad(lambda q: blockwise.causal(q, x, x, 1.0, None).sum()))(x)
    assert value == 128 * 2 * 30.0
    assert jnp.isfinite(gradient).all()


def test_a_query_whose_own_scores_are_all_minus_infinity_reads_nothing_from_later_on():
    random = np.random.default_rng(0)
    k, q, v, g = (jnp.asarray(random.normal(size=(1, 128, 1, 2)), jnp.float32) for _ in range(4))
    k = abs(k)
    blind = q.at[:, 5].set(-jnp.inf)
    out, (gradient,) = values_and_gradients(lambda v: blockwise.causal(blind, k, v, 1.0, None), (v,), g)
    others, (their_gradient,) = values_and_gradients(lambda v: plain(q, k, v, 1.0), (v,), g.at[:, 5].set(0))
    np.testing.assert_allclose(out, others.at[:, 5].set(0), atol=2e-6)
    np.testing.assert_allclose(gradient, their_gradient, atol=5e-6)


@pytest.mark.parametrize(
    ("length", "count"), [(1, 1), (63, 1), (64, 1), (128, 2), (130, 2), (256, 4), (1024, 8), (131, 1)]
)
def test_blocks_are_equal_and_not_shorter_than_worthwhile(length, count):
    assert blockwise.blocks(length) == count
    assert length % count == 0


def test_half_precision_comes_out_as_it_went_in():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, 128, 2, 4)), jnp.bfloat16) for _ in range(3))
    out, gradients = values_and_gradients(lambda *qkv: blockwise.causal(*qkv, 0.5, None), (q, k, v), v)
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(
        out.astype(np.float32), plain(*(x.astype(jnp.float32) for x in (q, k, v)), 0.5), atol=0.03
    )


def test_a_gradient_of_the_gradient_is_that_of_the_definition():
    random = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(random.normal(size=(1, 130, 2, 4)), jnp.float32) for _ in range(4))

    def curvature(attention):  # along g
        slope = jax.grad(lambda q: (attention(q) ** 2).sum())
        return jax.jit(jax.grad(lambda q: (slope(q) * g).sum()))(q)

    np.testing.assert_allclose(
        curvature(lambda q: blockwise.causal(q, k, v, 0.7, None)), curvature(lambda q: plain(q, k, v, 0.7)), atol=1e-3
    )
