"""Measures of what a model's inside looks like: dead units, outliers, attention, how the stream grows, which weights
count. Arrays in, arrays or numbers out.

NumPy arrays and JAX arrays both do (under `jax.jit` too): each function computes with the library that its argument
belongs to. Letters as in jaxgpt/model.py; N tokens (of any number of sequences), `...` any leading axes. What is not
finite in the input makes the result not finite; `non_finite` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = Any  # of NumPy or of JAX

DEAD_SHARE = 1e-3  # of the stream's norm: a unit that never adds more is called effectively dead
INT8 = {"magnitude": 6.0, "layers": 0.25, "positions": 0.06}  # Dettmers et al. 2022, section 4
MASSIVE = {"magnitude": 100.0, "times_median": 1000.0}  # Sun et al. 2024, section 2


# --- parameters ----------------------------------------------------------------------------------------------------


def non_finite(leaves: Mapping[str, Array]) -> dict[str, int]:
    """How many values of each named array are NaN or infinite; arrays that have none are left out."""
    counts = {name: int(leaf.size - np.isfinite(np.asarray(leaf, np.float64)).sum()) for name, leaf in leaves.items()}
    return {name: count for name, count in counts.items() if count}


def norm(leaves: Iterable[Array]) -> float:
    """Euclidean norm of all values of some arrays together."""
    return math.sqrt(sum(float(np.square(np.asarray(leaf, np.float64)).sum()) for leaf in leaves))


def update(leaves: Mapping[str, Array], initial: Mapping[str, Array]) -> float:
    """How far parameters are from their initial values, as a share of the initial norm: |w - w0| / |w0|. NaN where
    these are all 0. Raises KeyError for a name that has no initial value.
    """
    far = norm(np.asarray(leaf, np.float64) - np.asarray(initial[name], np.float64) for name, leaf in leaves.items())
    return far / start if (start := norm(initial[name] for name in leaves)) else math.nan


class Weight(NamedTuple):
    """A weight w[row, column] that multiplies an input. score: |w| times the largest magnitude of that input.
    times_median: score over the median score of its matrix, NaN where that is 0."""

    row: int
    column: int
    score: float
    times_median: float


def weight_scores(weight_IxO: Array, largest_I: Array) -> Array:
    """|w_io| max|x_i|, [I, O]: the most that a weight ever adds to an output, for inputs of magnitude up to largest_I.

    Wanda's score (Sun et al. 2023) with the maximum over tokens in place of the Euclidean norm.
    """
    return abs(weight_IxO) * largest_I[:, None]


def top_weight(weight_IxO: Array, largest_I: Array) -> Weight:
    """The weight of largest score: `weight_scores`. Of equal ones the first in row-major order; NaN scores are passed
    over.
    """
    score_IxO = np.asarray(weight_scores(np.asarray(weight_IxO), np.asarray(largest_I)), np.float64)
    known_IxO = np.where(np.isnan(score_IxO), -1, score_IxO)
    row, column = (int(i) for i in np.unravel_index(int(known_IxO.argmax()), score_IxO.shape))
    best, middle = float(score_IxO[row, column]), float(np.median(score_IxO))
    return Weight(row, column, best, best / middle if middle > 0 else math.nan)


# --- units of the MLP ----------------------------------------------------------------------------------------------


def dead(largest_F: Array) -> Array:
    """Units that were never active, [F] bool, from each unit's largest (pre-)activation over all tokens: it is 0 or
    less. Exact for ReLU, whose activation then is 0 on every token; a GELU or SiLU unit still adds something there.
    NaN counts as alive.
    """
    return largest_F <= 0


def effectively_dead(largest_F: Array, out_FxD: Array, stream: float | Array, share: float = DEAD_SHARE) -> Array:
    """Units that never add more than a share of the stream's norm, [F] bool, whatever the activation function:
    max|a_f| |w_out,f| <= share * stream.

    largest_F: each unit's largest |activation| over all tokens; out_FxD: the matrix that writes to the residual stream;
    stream: mean Euclidean norm of that stream, over tokens. The threshold is ours.
    """
    return largest_F * (out_FxD**2).sum(axis=-1) ** 0.5 <= share * stream


def never_bound(tokens: int, confidence: float = 0.95) -> float:
    """Upper bound of how often a unit is active that was active on none of so many tokens, as a share of tokens.

    Exact (Clopper & Pearson 1934) for independent tokens: 1 - (1 - confidence)^(1/n), about 3/n at 95 % (the rule of
    three). Tokens of one window depend on each other, so what is printed is the least that the bound can be. Raises
    ValueError for no tokens.
    """
    if tokens < 1 or not 0 < confidence < 1:
        raise ValueError(f"tokens={tokens} must be at least 1, and confidence={confidence} between 0 and 1")
    return -math.expm1(math.log1p(-confidence) / tokens)


def active_fraction(pre_NxF: Array) -> Array:
    """Share of (token, unit) pairs whose pre-activation is above 0: 1 - the sparsity that Li et al. 2023 ("the lazy
    neuron phenomenon") report for ReLU. Axes before the last two stay.
    """
    return (pre_NxF > 0).mean(axis=(-2, -1))


# --- outliers of the stream ----------------------------------------------------------------------------------------


def kurtosis(x_NxD: Array) -> Array:
    """Pearson's kurtosis over the last axis, [...]: E (x - mean)^4 / var^2. 3 for a Gaussian, of D Gaussian
    values `gaussian_kurtosis(D)` on average; D - 2 + 1/(D - 1)
    at most (one dimension alone differs from 0), 1 at least; NaN for values that are all equal. Of each token's vector,
    as Elhage et al. 2023 ("Privileged bases in the transformer residual stream") take it.
    """
    centred_NxD = x_NxD - x_NxD.mean(axis=-1, keepdims=True)
    return _ratio((centred_NxD**4).mean(axis=-1), (centred_NxD**2).mean(axis=-1) ** 2)


def gaussian_kurtosis(width: int) -> float:
    """The mean `kurtosis` of so many independent Gaussian values, with their own mean and variance: 3 (D - 1)/(D + 1),
    exactly; 2.94 at D = 96.
    """
    return 3 * (width - 1) / (width + 1)


def dimension_kurtosis(x_NxD: Array) -> Array:
    """E_d s_d^4 / (E_d s_d^2)^2, where s_d is the root mean square of dimension d over tokens: from 1, all dimensions
    alike, to D, one dimension alone (He et al. 2024). NaN for zeros.
    """
    square_D = (x_NxD**2).mean(axis=-2)
    return _ratio((square_D**2).mean(axis=-1), square_D.mean(axis=-1) ** 2)


def max_median_ratio(x_NxD: Array) -> Array:
    """max_d |x_d| / median_d |x_d| over the last axis, [...] (He et al. 2024). Of D independent Gaussian values it is
    about 4.1 at D = 96. NaN where the median is 0.
    """
    size_NxD = abs(x_NxD)
    return _ratio(size_NxD.max(axis=-1), _median(size_NxD))


def large(x_NxD: Array, magnitude: float = INT8["magnitude"]) -> Array:
    """Share of tokens at which a dimension is at least so large in magnitude, [..., D]: of a layer, what
    `int8_dimensions` takes.
    """
    return (abs(x_NxD) >= magnitude).mean(axis=-2)


def int8_dimensions(
    share_LxD: Array, layers: float = INT8["layers"], positions: float = INT8["positions"]
) -> Array:  # fmt: skip
    """Outlier dimensions by LLM.int8's criterion, [D] bool (Dettmers et al. 2022, section 4): |x_d| >= 6 somewhere in
    at least 25 % of the layers, and at 6 % or more of the positions of all layers together.

    share_LxD: `large` of each layer's hidden states. There they are what the layer's linear maps read.
    """
    return ((share_LxD > 0).mean(axis=-2) >= layers) & (share_LxD.mean(axis=-2) >= positions)


def int8_outliers(x_LxNxD: Array, **criterion: float) -> Array:
    """`int8_dimensions` of hidden states, [D] bool; criterion: magnitude, layers, positions, as INT8 unless given."""
    magnitude, layers, positions = ({**INT8, **criterion}[name] for name in INT8)
    return int8_dimensions(large(x_LxNxD, magnitude), layers, positions)


def massive(
    x_TxD: Array, magnitude: float = MASSIVE["magnitude"], times_median: float = MASSIVE["times_median"]
) -> Array:  # fmt: skip
    """Massive activations of a hidden state, [..., T, D] bool (Sun et al. 2024, section 2): |x| > 100, and at least
    1000 times the median |x| of the whole hidden state, all its positions and dimensions.
    """
    size_TxD = abs(x_TxD)
    middle = _median(size_TxD.reshape(*size_TxD.shape[:-2], -1))[..., None, None]
    return (size_TxD > magnitude) & (size_TxD >= times_median * middle)


# --- attention -----------------------------------------------------------------------------------------------------


def sinks(pattern_HxTxS: Array) -> Array:
    """Mean attention that the queries after the first pay to the first position, by head, [..., H]; causal self-
    attention, T = S >= 2. Spread evenly it would be `even_attention(T)[0]`. Gu et al. 2024 call a head a sink above .3.
    """
    return pattern_HxTxS[..., 1:, 0].mean(axis=-1)


def attention_entropy(pattern_HxTxS: Array) -> Array:
    """Mean entropy of a query's attention, nats, by head, [..., H]; the first query, which sees itself alone, left out.
    Between 0, one key only, and `even_attention(T)[1]`.
    """
    later_HxTxS = pattern_HxTxS[..., 1:, :]
    log_HxTxS = _library(pattern_HxTxS).log(_where(later_HxTxS > 0, later_HxTxS, 1.0))
    return -(later_HxTxS * log_HxTxS).sum(axis=-1).mean(axis=-1)


def even_attention(length: int) -> tuple[float, float]:
    """(`sinks`, `attention_entropy`) of causal attention over `length` >= 2 positions that spreads evenly over all that
    a query sees: means over t = 2..length of 1/t and of ln t.
    """
    seen_T = np.arange(2, length + 1)
    return float((1 / seen_T).mean()), float(np.log(seen_T).mean())


# --- the stream from layer to layer --------------------------------------------------------------------------------


def growth(before_NxD: Array, after_NxD: Array) -> Array:
    """|after - before| / |before| of each token, [...]: how much a block adds to the stream, as a share of it. NaN
    where that is 0.
    """
    return _ratio(_length(after_NxD - before_NxD), _length(before_NxD))


def cosine(a_NxD: Array, b_NxD: Array) -> Array:
    """Cosine of the angle between two vectors of each token, [...]. NaN where one of them is 0."""
    return _ratio((a_NxD * b_NxD).sum(axis=-1), _length(a_NxD) * _length(b_NxD))


def _ratio(above: Array, below: Array) -> Array:
    """NaN where the divisor is 0, without a warning."""
    return _where(below != 0, above / _where(below != 0, below, 1.0), math.nan)


def _length(x_NxD: Array) -> Array:
    return (x_NxD**2).sum(axis=-1) ** 0.5


def _library(x: Array) -> Any:
    """numpy, or jax.numpy."""
    return x.__array_namespace__()


def _where(condition: Array, yes: Array, no: Array) -> Array:
    return _library(condition).where(condition, yes, no)


def _median(x: Array) -> Array:
    """Over the last axis."""
    return _library(x).median(x, axis=-1)
