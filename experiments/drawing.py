"""jaxgpt.sample held against arithmetic: the slope of entropy, what top-k and top-p leave, how often tokens are drawn.

It stands here and not in a group, whose modules `jaxgpt list` imports: this one imports JAX when it is imported.

Letters: V tokens, N draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import entr

from jaxgpt.sample import distribution, draw

SPREAD = 2.0  # standard deviation of random logits, about that of a trained model's
STEP = 0.02  # of central differences, by the temperature: float32 carries five digits of so wide a one

# Compiled once per number of tokens: the settings are arguments.
_distribution = jax.jit(distribution)
AT_ONCE = 1024  # draws, each of which takes V random numbers


@jax.jit
def _draws(logits_V: Array, seed: int, place_N: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """A token [N] for each place."""
    return jax.lax.map(
        lambda place: draw(logits_V, seed, place, temperature, top_k, top_p), place_N, batch_size=AT_ONCE
    )


def entropy(p_V: np.ndarray) -> float:
    """Entropy in nats; 0 log 0 is 0."""
    return float(entr(np.asarray(p_V, float)).sum())


def slopes(logits_V: np.ndarray, temperature: float) -> tuple[float, float]:
    """dH/dT of softmax(z / T), nats: by central differences of `sample.distribution`, and Var_p(z) / T^3."""
    low_V, high_V = (
        np.asarray(_distribution(jnp.asarray(logits_V, jnp.float32), temperature * (1 + step)), float)
        for step in (-STEP, STEP)
    )
    weight_V = np.exp((logits_V - logits_V.max()) / temperature)
    p_V = weight_V / weight_V.sum()
    variance = p_V @ (logits_V - p_V @ logits_V) ** 2
    return (entropy(high_V) - entropy(low_V)) / (2 * STEP * temperature), float(variance / temperature**3)


def worst_slope(seed: int, tokens: int, temperatures: Sequence[float]) -> float:
    """Slope of the entropy of random logits by what it should be, at the temperature where this is farthest from 1.

    Slopes too small for float32 do not count.
    """
    logits_V = SPREAD * np.random.default_rng(seed).standard_normal(tokens)
    ratios = [found / exact for found, exact in (slopes(logits_V, t) for t in temperatures) if exact > 1e-2]
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def kept(logits_V: np.ndarray, top_k: int | None, top_p: float | None) -> set[int]:
    """The tokens that top-k, then top-p leave, by their definition: an independent computation in float64. Of equal
    logits the one of lower id goes first.
    """
    order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))[:top_k]
    weight = np.exp(logits_V[order] - logits_V.max())
    mass, left = 0.0, set()
    for token, share in zip(order, weight / weight.sum(), strict=True):
        if top_p is not None and mass >= top_p:
            break
        left.add(token)
        mass += share
    return left


def supports_right(seed: int, tokens: int, cases: int) -> float:
    """In which share of random cases `sample.distribution` leaves the tokens of `kept` and no other."""
    random, right = np.random.default_rng(seed), []
    for _ in range(cases):
        logits_V = (SPREAD * random.standard_normal(tokens)).astype(np.float32)
        top_k = int(random.integers(1, tokens + 1)) if random.random() < 0.7 else None
        top_p = float(random.uniform(0.05, 0.999)) if random.random() < 0.7 else None
        p_V = np.asarray(_distribution(logits_V, 1.0, tokens if top_k is None else top_k, top_p or 1.0))
        right.append(set(np.flatnonzero(p_V)) == kept(logits_V.astype(float), top_k, top_p))
    return float(np.mean(right))


def chi_squared(seed: int, tokens: int, draws: int) -> float:
    """Pearson's statistic of drawn tokens against their exact distribution, by its degrees of freedom: about 1.

    At temperature .8 and without the rarest third, from logits within about one of each other, so that each token left
    is drawn often. Infinite if one is drawn that never should be.
    """
    logits_V = jnp.asarray(0.5 * np.random.default_rng(seed).standard_normal(tokens), jnp.float32)
    settings = (0.8, tokens * 2 // 3, 1.0)
    token_N = _draws(logits_V, seed, jnp.arange(draws), *settings)
    p_V = np.asarray(_distribution(logits_V, *settings), float)
    count_V = np.bincount(np.asarray(token_N), minlength=tokens)
    left_V = p_V > 0
    if count_V[~left_V].any():
        return math.inf
    expected = draws * p_V[left_V] / p_V.sum()
    return float(((count_V[left_V] - expected) ** 2 / expected).sum() / (left_V.sum() - 1))
