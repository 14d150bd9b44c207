"""Units of the MLPs of a model, seen over many tokens: how high each goes, how often it is active, what taking it out
does. Letters as in model.py; W windows.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.anatomy.family import arrays_of, with_arrays

if TYPE_CHECKING:
    import numpy
    from flax import nnx
    from jax import Array

    from jaxgpt.config import ModelConfig, RunConfig

AT_ONCE = 64  # windows of a dispatch: one shape serves any number


class Seen(NamedTuple):
    """largest_WxLxF: each unit's largest pre-activation in a window (of the gate for SwiGLU). active_LxF: share of
    tokens on which it is above 0. peak_LxF: largest |activation|. stream_L: mean Euclidean norm of the stream that the
    MLP of a block adds to.
    """

    largest_WxLxF: Any
    active_LxF: Any
    peak_LxF: Any
    stream_L: Any


@cache
def _watch(c: ModelConfig) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt import build

    names = ("mlp.pre", "mlp.hidden", "residual_mid")

    def one(state: nnx.State, window_T1: Array) -> Seen:
        keep = [f"layers.{i}.{name}" for i in range(c.n_layers) for name in names]
        kept = nnx.merge(build.graphdef(c), state).inspect(window_T1[None, :-1], keep=keep)[1]
        pre_LxTxF, hidden_LxTxF, mid_LxTxD = (
            jnp.stack([kept[f"layers.{i}.{name}"][0] for i in range(c.n_layers)]) for name in names
        )
        return Seen(pre_LxTxF.max(axis=1), (pre_LxTxF > 0).mean(axis=1), jnp.abs(hidden_LxTxF).max(axis=1),
                    jnp.sqrt((mid_LxTxD**2).sum(axis=-1)).mean(axis=1))  # fmt: skip

    def of(state: nnx.State, window_WxT1: Array) -> Seen:
        each = jax.lax.map(lambda window_T1: one(state, window_T1), window_WxT1, batch_size=8)
        return Seen(each[0], each[1].mean(axis=0), each[2].max(axis=0), each[3].mean(axis=0))

    return jax.jit(of)


def watch(c: ModelConfig, state: nnx.State, window_WxT1: numpy.ndarray) -> Seen:
    """What the units do on these windows. More than AT_ONCE of them have to be a multiple of it."""
    import numpy as np

    step = min(AT_ONCE, len(window_WxT1))
    parts = [_watch(c)(state, window_WxT1[at : at + step]) for at in range(0, len(window_WxT1), step)]
    largest, active, peak, stream = (np.stack([np.asarray(p[i], np.float64) for p in parts]) for i in range(4))
    return Seen(largest.reshape(-1, *largest.shape[2:]), active.mean(axis=0), peak.max(axis=0), stream.mean(axis=0))


def windows(config: RunConfig, count: int) -> numpy.ndarray:
    """So many windows of validation text, [W, T + 1] int32, evenly over it, in an order that is always the same: the
    first ones of any number are spread over the whole text too. Raises BadInput where the text holds fewer.
    """
    import numpy as np

    from jaxgpt.config import BadInput, override
    from jaxgpt.tasks import text

    data = text.reader()(override(config, {"train.eval_windows": count})).data()
    window_WxT1 = np.asarray(data.validation_WxT1).astype(np.int32)
    if len(window_WxT1) < count:
        length = config.model.context + 1
        raise BadInput(f"validation text holds {len(window_WxT1)} windows of {length} tokens; {count} are needed")
    return np.random.default_rng(0).permutation(window_WxT1)


def out_of(state: nnx.State, c: ModelConfig) -> numpy.ndarray:
    """What each unit writes, [L, F, D]."""
    import numpy as np

    arrays = arrays_of(state)
    return np.stack([arrays[f"layers.{i}.mlp.down.kernel"] for i in range(c.n_layers)])


def without_units(state: nnx.State, taken_LxF: numpy.ndarray) -> nnx.State:
    """The parameters with what these units (bool) write set to 0."""
    import numpy as np

    arrays, new = arrays_of(state), {}
    for i, taken_F in enumerate(np.asarray(taken_LxF)):
        name = f"layers.{i}.mlp.down.kernel"
        new[name] = np.where(taken_F[:, None], 0, arrays[name]).astype(arrays[name].dtype)
    return with_arrays(state, new)


def as_many(taken_LxF: numpy.ndarray, draw: numpy.random.Generator) -> numpy.ndarray:
    """As many units of each layer, drawn among the others, [L, F] bool. Raises ValueError where there are too few."""
    import numpy as np

    found = np.zeros_like(taken_LxF)
    for i, taken_F in enumerate(taken_LxF):
        found[i, draw.choice(np.flatnonzero(~taken_F), int(taken_F.sum()), replace=False)] = True
    return found
