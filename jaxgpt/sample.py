"""Text from a model, token by token, with a cache of its past: temperature, top-k, top-p.

from jaxgpt.sample import generate
for token in generate(model, tokenizer.encode(b"def mean("), max_tokens=100, temperature=0.8, top_p=0.95, seed=1):
    print(tokenizer.decode([token]).decode(errors="replace"), end="", flush=True)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxgpt.config import BadInput, ModelConfig

# The prompt is read in pieces of these lengths, longest first: a prompt of any length then needs at most these
# programs, and no padding, which would stay in the carry of a recurrent model.
PIECES = (256, 16, 1)
NOT_FINITE = -1  # in place of a token: the logits hold NaN or infinity


def distribution(
    logits_V: Array,
    temperature: Array | float = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
) -> Array:
    """Probabilities [V] that the next token is drawn from. float32 or wider; all arguments may be traced.

    First softmax(logits / temperature); then all but the `top_k` most probable tokens get 0, and what is left is
    scaled to sum to 1 (Fan et al. 2018); then all but the smallest set of most probable tokens whose mass reaches
    `top_p` get 0, the token that crosses it being in the set, and what is left is scaled again (Holtzman et al. 2020,
    section 3.1). Of equal logits the one of lower id counts as larger, so that exactly k stay. Temperature
    0 puts all mass on the first of the largest logits. None, top_k >= V and top_p = 1 cut nothing.
    """
    width = logits_V.shape[-1]
    logits_V = logits_V.astype(jnp.promote_types(logits_V.dtype, jnp.float32))
    # What is smaller than the smallest normal number a CPU may read as 0, and divide by it.
    greedy = jnp.asarray(temperature, logits_V.dtype) < jnp.finfo(logits_V.dtype).tiny
    p_V = jax.nn.softmax((logits_V - logits_V.max()) / jnp.where(greedy, 1, temperature))
    p_V = jnp.where(greedy, jax.nn.one_hot(logits_V.argmax(), width, dtype=p_V.dtype), p_V)
    if top_k is None and top_p is None:
        return p_V
    k, mass = width if top_k is None else top_k, 1.0 if top_p is None else top_p

    def cut(p_V: Array) -> Array:
        # R: ranks. By logits, as different ones may round to the same probability.
        order_R = jnp.argsort(logits_V, descending=True, stable=True)
        p_R = jnp.where(jnp.arange(width) < k, p_V[order_R], 0)
        p_R /= p_R.sum()
        before_R = jnp.pad(jnp.cumsum(p_R)[:-1], (1, 0))
        # Rounding takes the sum to 1 before its end: no reason to drop what follows when all was asked for.
        p_R = jnp.where((before_R < mass) | (mass >= 1), p_R, 0)
        return jnp.zeros_like(p_V).at[order_R].set(p_R / p_R.sum(), unique_indices=True)

    return jax.lax.cond(jnp.asarray((k < width) | (mass < 1)), cut, lambda p_V: p_V, p_V)


def draw(
    logits_V: Array,
    seed: Array | int,
    position: Array | int,
    temperature: Array | float = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | float | None = None,
) -> Array:
    """The token, int32, that stands at `position` of the text, drawn from `distribution`; NOT_FINITE for bad logits.

    Its randomness is a function of seed and position alone: a text that is continued goes on as it would have.
    """
    key = jax.random.fold_in(jax.random.key(seed), position)
    token = jax.random.categorical(key, jnp.log(distribution(logits_V, temperature, top_k, top_p)))
    return jnp.where(jnp.isfinite(logits_V.max()), token, NOT_FINITE).astype(jnp.int32)


def generate(
    model: Any,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """The tokens that follow a prompt, each as soon as it is made; at most `max_tokens`, and none from `stop` on.

    `model`: a causal one from token ids to logits, transformer or recurrent. `temperature`, `top_k`, `top_p`: see
    `distribution`. `vocabulary`: only ids below it are drawn, for a model with more logits than its tokenizer has ids;
    null: all. Prompt and text may outgrow model.context, except with learned positions; a model seldom predicts
    well there. The same seed gives the same text, whatever max_tokens within model.context; beyond, the cache grows
    in powers of two, and another size may round differently. Compiled once per model shape and cache size, for each
    of PIECES; other settings take the same programs.

    Raises BadInput at the call for what is not allowed, and during the text for logits that are not finite.
    """
    prompt_T = _prompt(model.config, prompt_ids)
    _check(model.config, max_tokens, temperature, top_k, top_p, seed, stop, vocabulary)
    read = len(prompt_T) + max_tokens - 1  # the last token is not read
    context = model.config.context
    if model.config.architecture == "transformer" and model.config.positions == "learned" and read > context:
        raise BadInput(
            f"max_tokens={max_tokens} behind a prompt of {len(prompt_T)} is too long for model.positions=learned with "
            f"model.context={context}; at most {max(0, context + 1 - len(prompt_T))} tokens fit"
        )
    width = model.config.vocab_size
    settings = (
        jnp.int32(width if vocabulary is None else min(vocabulary, width)),
        jnp.uint32(seed),
        jnp.float32(temperature),
        jnp.int32(width if top_k is None else min(top_k, width)),
        jnp.float32(1.0 if top_p is None else top_p),
    )
    cache_length = context if read <= context else 2 ** math.ceil(math.log2(read))
    return _text(model, prompt_T, cache_length, settings, max_tokens, stop)


def _text(
    model: Any, prompt_T: np.ndarray, cache_length: int, settings: tuple[Array, ...], max_tokens: int, stop: int | None
) -> Iterator[int]:
    graphdef, params = nnx.split(model)
    cache = model.empty_cache(1, cache_length)
    token_1x1: Any = None
    for piece_T in _pieces(prompt_T):
        token_1x1, cache = _advance(graphdef, params, piece_T[None], cache, settings)
    for made in range(max_tokens):
        if made:
            token_1x1, cache = _advance(graphdef, params, token_1x1, cache, settings)
        token = int(token_1x1[0, 0])
        if token == NOT_FINITE:
            raise BadInput(f"the logits behind {len(prompt_T) + made} tokens are not finite; has the model diverged?")
        if token == stop:
            return
        yield token


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(
    graphdef: nnx.GraphDef, params: nnx.State, tokens_1xT: Array, cache: Any, settings: tuple[Array, ...]
) -> tuple[Array, Any]:
    """The token that follows, [1, 1], and the cache with the tokens read."""
    logits_1xTxV, cache = nnx.merge(graphdef, params).decode(tokens_1xT, cache)
    vocabulary, seed, *rest = settings
    logits_V = logits_1xTxV[0, -1]
    logits_V = jnp.where(jnp.arange(len(logits_V)) < vocabulary, logits_V, -jnp.inf)
    return draw(logits_V, seed, cache.length, *rest)[None, None], cache


def _pieces(prompt_T: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    for size in PIECES:
        while len(prompt_T) - start >= size:
            yield prompt_T[start : start + size]
            start += size


# --- what is allowed -----------------------------------------------------------------------------------------------


def _prompt(c: ModelConfig, prompt_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Token ids [T], int32."""
    ids = np.asarray(prompt_ids)
    if ids.size == 0:
        raise BadInput("prompt_ids is empty; it must hold at least one token, which the first prediction starts from")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BadInput(f"prompt_ids of shape {ids.shape} and type {ids.dtype}: it must be one list of whole numbers")
    outside = ids[(ids < 0) | (ids >= c.vocab_size)]
    if outside.size:
        raise BadInput(f"prompt_ids holds {outside[0]}; token ids must be from 0 to {c.vocab_size - 1}")
    return ids.astype(np.int32)


def _check(
    c: ModelConfig,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: int | None,
    vocabulary: int | None,
) -> None:
    for name, value in (("d_input", c.d_input), ("d_output", c.d_output)):
        if value is not None:
            raise BadInput(f"model.{name}={value}: text comes from a model from token ids to logits; it must be null")
    if not c.causal:
        raise BadInput("model.causal=false: a text is made from left to right; it must be true")
    for name, value, fits, allowed in (
        ("max_tokens", max_tokens, _whole(max_tokens, 1), "a whole number of at least 1"),
        (
            "temperature",
            temperature,
            isinstance(temperature, Real) and 0 <= temperature < math.inf,
            "a finite number of at least 0",
        ),
        ("top_k", top_k, top_k is None or _whole(top_k, 1), "a whole number of at least 1 or null"),
        (
            "top_p",
            top_p,
            top_p is None or (isinstance(top_p, Real) and 0 < top_p <= 1),
            "a number above 0 and at most 1 or null",
        ),
        ("seed", seed, _whole(seed, 0, 2**32 - 1), "a whole number from 0 to 2^32 - 1"),
        ("vocabulary", vocabulary, vocabulary is None or _whole(vocabulary, 1), "a whole number of at least 1 or null"),
        ("stop", stop, stop is None or _whole(stop, 0, c.vocab_size - 1), f"a token id below {c.vocab_size} or null"),
    ):
        if not fits:
            raise BadInput(f"{name}={value} is not allowed; it must be {allowed}")


def _whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high
