"""Feed-forward layers as key-value memories (Geva et al. 2021): which inputs open a unit, and what its output says.

A unit of a layer is one memory: its incoming weights are the key, its activation says how well an input fits, and its
outgoing weights are the value, which the activation adds to the stream. The inputs that open it most are its triggers.

Letters: W windows, T positions, F units of a layer, K triggers of a unit, V vocabulary, D width of the stream.
"""

import jax
import numpy as np


def triggers(hidden_WxTxF: jax.Array, count: int, skip: int) -> tuple[jax.Array, jax.Array]:
    """Each unit's `count` largest activations [F, K], largest first, and their places as index into W x T; may be
    compiled. Of equal ones the earlier place.

    The first `skip` positions of a window do not count: they have fewer tokens before them than patterns are long.
    Raises ValueError where fewer places than `count` are left.
    """
    windows, length, units = hidden_WxTxF.shape
    span = max(length - skip, 0)
    if windows * span < count:
        raise ValueError(f"{windows} windows of {span} positions have no {count} places")
    value_FxK, at_FxK = jax.lax.top_k(hidden_WxTxF[:, skip:].reshape(-1, units).T, count)
    return value_FxK, at_FxK // span * length + at_FxK % span + skip


def endings(token_WxT: np.ndarray, length: int) -> np.ndarray:
    """A number [W, T] for the last `length` tokens up to each place, equal where they are equal; -1 where a window has
    not so many yet.
    """
    windows, span = token_WxT.shape
    gram_WxPxn = np.lib.stride_tricks.sliding_window_view(token_WxT, length, axis=1)
    _, number_N = np.unique(gram_WxPxn.reshape(-1, length), axis=0, return_inverse=True)
    found_WxT = np.full((windows, span), -1)
    found_WxT[:, length - 1 :] = number_N.reshape(windows, -1)
    return found_WxT


def coherence(ending_WxT: np.ndarray, place_FxK: np.ndarray) -> np.ndarray:
    """Which share [F] of a unit's triggers have the ending that most of them have; at least 1 / K."""
    of_trigger_FxK = ending_WxT.reshape(-1)[place_FxK]
    equal_FxKxK = of_trigger_FxK[:, :, None] == of_trigger_FxK[:, None]
    return equal_FxKxK.sum(axis=2).max(axis=1) / place_FxK.shape[1]


def promoted(value_FxD: np.ndarray, scale_D: np.ndarray, unembed_DxV: np.ndarray) -> np.ndarray:
    """The token [F] that each value raises most: its largest logit behind the final norm's centring and scale."""
    centred_FxD = value_FxD - value_FxD.mean(axis=1, keepdims=True)
    return ((centred_FxD * scale_D) @ unembed_DxV).argmax(axis=1)


def agreement(promoted_F: np.ndarray, next_F: np.ndarray) -> tuple[float, float]:
    """How often the promoted token is the one behind the unit's trigger, and how often it would be by luck.

    By luck: the mean over all ways to deal the values out among the keys anew, exactly; which tokens are common among
    the promoted ones and among the next ones stays as it is. NaN without units.
    """
    if not len(promoted_F):
        return np.nan, np.nan
    size = int(max(promoted_F.max(), next_F.max())) + 1
    said_V, came_V = (np.bincount(token_F, minlength=size) / len(token_F) for token_F in (promoted_F, next_F))
    return float((promoted_F == next_F).mean()), float(said_V @ came_V)
