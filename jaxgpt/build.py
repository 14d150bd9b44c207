"""A config made into a model: its module, and its initial parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.config import ModelConfig
from jaxgpt.model import Transformer
from jaxgpt.recurrent import Recurrent

MODULES = {"transformer": Transformer, "lstm": Recurrent, "rnn": Recurrent}

# Standard deviation of the normal distribution that a parameter starts from, by the end of its name.
# fan_in is the number of rows of a matrix. Norm scales start at 1, biases at 0.
INIT_STD: dict[str, Callable[[ModelConfig, int], float]] = {
    # Order 1, as what the blocks add: from GPT-2's .02, which only a tied output needs (its logits would be of order
    # sqrt(D)), tokens hardly show in the stream at first, and a model of width 64 was .2 nats behind after 300 steps.
    "embed.embedding": lambda c, fan_in: 0.02 if c.tie_output else 1.0,
    "position.embedding": lambda c, fan_in: 0.02 if c.tie_output else 1.0,
    "read_in.kernel": lambda c, fan_in: fan_in**-0.5,
    "query.kernel": lambda c, fan_in: fan_in**-0.5,  # keeps the variance of its input (LeCun)
    "key.kernel": lambda c, fan_in: fan_in**-0.5,
    "value.kernel": lambda c, fan_in: fan_in**-0.5,
    "up.kernel": lambda c, fan_in: fan_in**-0.5,
    "gate.kernel": lambda c, fan_in: fan_in**-0.5,
    # What writes to the residual stream, so that 2 L such additions leave its variance at that of the tokens (GPT-2).
    "attention.out.kernel": lambda c, fan_in: fan_in**-0.5 * (2 * c.n_layers) ** -0.5 * _stream(c),
    "down.kernel": lambda c, fan_in: fan_in**-0.5 * (2 * c.n_layers) ** -0.5 * _stream(c),
    "dense_i.kernel": lambda c, fan_in: fan_in**-0.5,  # of a recurrent cell: from its input, and from its state
    "dense_h.kernel": lambda c, fan_in: fan_in**-0.5,
    # Its output does not grow with width, so under muP it starts smaller (Yang et al. 2022, table 8).
    "router.kernel": lambda c, fan_in: (fan_in * c.width_ratio) ** -0.5,
    "unembed.kernel": lambda c, fan_in: 0.02,  # small logits: the first loss is close to ln V
    "read_out.kernel": lambda c, fan_in: (fan_in / c.width_ratio) ** -0.5,  # muP: its input is divided by the ratio
}


def _stream(c: ModelConfig) -> float:
    """The scale of what blocks that read a normed stream add to it: that of the tokens. A model of width 128 with a
    tied output, whose tokens start at .02 and whose blocks added order 1, was .2 nats behind after 200 steps.
    """
    return 0.02 if c.tie_output and c.norm != "none" and c.norm_placement != "post" else 1.0


def init_params(c: ModelConfig, seed: int) -> nnx.State:
    """Initial parameters by INIT_STD, as the state that `nnx.merge(graphdef(c), params)` takes.

    Each tensor of each layer has its own stream, so a tensor's values depend on its name, shape and seed only, and a
    scanned model starts from the same values as an unrolled one. NumPy: JAX would compile as long as for a step.
    """

    def leaf(path: tuple, shape_dtype: jax.ShapeDtypeStruct) -> np.ndarray:
        name = param_name(path)
        if c.scan_layers and name.startswith("layers."):
            rest, shape = name.removeprefix("layers."), shape_dtype.shape[1:]
            drawn = [_draw(c, seed, f"layers.{i}.{rest}", shape) for i in range(c.n_layers)]
            return np.asarray(drawn, shape_dtype.dtype).reshape(shape_dtype.shape)
        return _draw(c, seed, name, shape_dtype.shape).astype(shape_dtype.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(c))


def param_name(path: tuple) -> str:
    """A parameter's dotted name from its pytree path: layers.0.attention.query.kernel."""
    # The last key is NNX's own: the `.value` of a variable.
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _draw(c: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if c.architecture == "lstm" and name.endswith("dense_h.bias"):
        # An LSTM that at first remembers: its forget gate, the second of Flax's four, is open (Jozefowicz et al. 2015).
        return np.repeat([0.0, 1.0, 0.0, 0.0], shape[0] // 4)
    if name.endswith(".bias"):
        return np.zeros(shape)
    if name.endswith(".scale"):
        return np.ones(shape)
    (std,) = (rule(c, shape[-2]) for end, rule in INIT_STD.items() if name.endswith(end))
    return std * np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)


@cache  # half a second for a deep model
def _abstract(c: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: MODULES[c.architecture](c)))


def abstract_params(c: ModelConfig) -> nnx.State:
    """The parameters' shapes and dtypes, as jax.ShapeDtypeStructs."""
    return _abstract(c)[1]


def graphdef(c: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters: static, hashable; `nnx.merge(graphdef(c), params)` is the model again."""
    return _abstract(c)[0]


def create(c: ModelConfig, seed: int = 0) -> Transformer | Recurrent:
    """An initialised model."""
    return nnx.merge(graphdef(c), jax.tree.map(jnp.asarray, init_params(c, seed)))
