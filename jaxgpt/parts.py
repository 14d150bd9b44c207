"""What the models are built from: linear maps, tables, norms and activations of Flax, set up by a config."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgpt.config import BadInput, ModelConfig

# Flax draws a key for each parameter, half of the time it takes to build a model, and zeros and ones need none.
NO_KEYS: Any = SimpleNamespace(params=lambda: None)


def dtypes(c: ModelConfig) -> dict[str, Any]:
    """Dtypes of arithmetic and of parameters, as Flax layers take them. Raises BadInput for float64 without x64."""
    if "float64" in (c.param_dtype, c.compute_dtype) and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        which = "param_dtype" if c.param_dtype == "float64" else "compute_dtype"
        raise BadInput(f"model.{which}=float64 needs JAX_ENABLE_X64=1 in the environment; without it use float32")
    return {"dtype": jnp.dtype(compute_dtype(c)), "param_dtype": jnp.dtype(c.param_dtype)}


def compute_dtype(c: ModelConfig) -> str:
    """The dtype of the arithmetic on this machine."""
    auto = c.param_dtype if jax.default_backend() == "cpu" else "bfloat16"
    return auto if c.compute_dtype == "auto" else c.compute_dtype


def linear(c: ModelConfig, d_in: int, d_out: int, bias: bool | None = None) -> nnx.Linear:
    """x W (+ b), with a bias where the config, or the caller, says so."""
    # Zeros, because `build.init_params` is the one place where parameters get their values.
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=c.bias if bias is None else bias,
        precision=c.matmul_precision,
        rngs=NO_KEYS,
        kernel_init=nnx.initializers.zeros,
        dot_general=_rows_times,
        **dtypes(c),
    )


def _rows_times(x: Array, w: Array, _contracted: Any, **how: Any) -> Array:
    """x W with the leading axes of x made one. For x [B, T, D] XLA's CPU backend would copy the gradient of x W
    transposed for that of W, which took three times as long.
    """
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), w, (((1,), (0,)), ((), ())), **how)
    return rows.reshape(*x.shape[:-1], w.shape[-1])


def table(c: ModelConfig, rows: int) -> nnx.Embed:
    """A look-up table of vectors of width d_model."""
    return nnx.Embed(rows, c.d_model, rngs=NO_KEYS, embedding_init=nnx.initializers.zeros, **dtypes(c))


def norm(c: ModelConfig) -> Callable[[Array], Array]:
    """The config's norm over the residual stream."""
    if c.norm == "none":
        return identity
    if c.norm == "rmsnorm":
        return rms_norm(c, c.d_model)
    # The two-pass variance: the fast one, E[x^2] - E[x]^2, cancels when the mean is large.
    return nnx.LayerNorm(
        c.d_model, epsilon=c.norm_epsilon, use_bias=c.bias, use_fast_variance=False, rngs=NO_KEYS, **dtypes(c)
    )


def rms_norm(c: ModelConfig, width: int) -> nnx.RMSNorm:
    """x / sqrt(mean x^2 + epsilon) times a learnt scale (Zhang & Sennrich 2019)."""
    return nnx.RMSNorm(width, epsilon=c.norm_epsilon, rngs=NO_KEYS, **dtypes(c))


def identity(x: Array) -> Array:
    """x."""
    return x


def activation(kind: str) -> Callable[[Array], Array]:
    """The MLP's nonlinearity; for swiglu that of its gate. gelu is GPT-2's tanh form; relu2: So et al. 2021."""
    return {
        "gelu": jax.nn.gelu,
        "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
        "swiglu": jax.nn.silu,
    }[kind]


def dropout(x: Array, rate: float, key: Array | None, site: int) -> Array:
    """x with a share `rate` of its units zeroed and the others scaled up; unchanged without a key.

    `site` tells apart the places that one key serves.
    """
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def output(c: ModelConfig) -> tuple[nnx.Linear | None, nnx.Linear | None]:
    """The vocabulary matrix and the read-out, of which a model has one, or neither when its output is tied."""
    last = None if c.tie_output else linear(c, c.d_model, c.output_width, c.has_output_bias)
    return (last, None) if c.d_output is None else (None, last)


def read(embed: nnx.Embed | None, read_in: nnx.Linear | None, inputs: Array) -> Array:
    """The first residual stream, [B, T, D], of token ids [B, T] or vectors [B, T, d_input]."""
    (layer,) = (layer for layer in (embed, read_in) if layer is not None)
    return layer(inputs)


def write(
    c: ModelConfig, embed: nnx.Embed | None, unembed: nnx.Linear | None, read_out: nnx.Linear | None, x_BxTxD: Array
) -> Array:
    """Logits, or the read-out, [B, T, V], of the last residual stream; a tied output multiplies by the embedding.

    Under muP they are divided by the width ratio (Yang et al. 2022, table 8); `logit_cap` keeps them within
    +- cap (Gemma 2, Riviere et al. 2024, section 2).
    """
    x_BxTxD = x_BxTxD / c.width_ratio
    if read_out is not None:
        return read_out(x_BxTxD)
    if unembed is not None:
        logits_BxTxV = unembed(x_BxTxD)
    else:
        assert embed is not None, "ModelConfig ties the output only to a token embedding"
        table_VxD = embed.embedding[...].astype(x_BxTxD.dtype)
        logits_BxTxV = _rows_times(x_BxTxD, table_VxD.T, None, precision=c.matmul_precision)
    return logits_BxTxV if c.logit_cap is None else c.logit_cap * jnp.tanh(logits_BxTxV / c.logit_cap)
