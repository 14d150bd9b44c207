"""Looking inside a model by name: which intermediates it has, and keeping and replacing them while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import BadInput, ModelConfig

Tap = Callable[[str, Array], Array]  # sees a named value on its way and returns it, or another in its place
Replacement = Array | np.ndarray | Callable[[Array], Array]


def intermediates(c: ModelConfig) -> list[str]:
    """The names that `Transformer.inspect` knows for this config, in order of computation.

    embedding, final: [B, T, D]. In layers.i: residual and residual_mid (the stream before the block, and between
    attention and MLP), attention.out, mlp.out (what each adds): [B, T, D]; attention.pattern: [B, H, T, S];
    attention.heads (before the output matrix): [B, T, H, K]; mlp.pre (pre-activations; the gate's for swiglu) and
    mlp.hidden: [B, T, F]; with experts instead of these two mlp.router (probabilities): [B, T, E].
    Of a recurrent model: embedding, layers.i.residual, layers.i.out (what each layer adds), final: [B, T, D].
    """
    if c.architecture != "transformer":
        return [
            "embedding",
            *(f"layers.{i}.{name}" for i in range(c.n_layers) for name in ("residual", "out")),
            "final",
        ]
    layer = ["residual", "attention.pattern", "attention.heads", "attention.out"]
    if c.norm_placement != "parallel":
        layer.append("residual_mid")
    if c.n_experts is not None:
        layer += ["mlp.router", "mlp.out"]
    elif c.mlp != "none":
        layer += ["mlp.pre", "mlp.hidden", "mlp.out"]
    return ["embedding", *(f"layers.{i}.{name}" for i in range(c.n_layers) for name in layer), "final"]


class Taps:
    """What a caller wants to keep and to replace. Python at trace time only: nothing asked, nothing traced."""

    def __init__(self, c: ModelConfig, keep: frozenset[str], replace: Mapping[str, Replacement]):
        known = intermediates(c)
        for name in [*keep, *replace]:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise BadInput(
                    f"{name!r} is not an intermediate of this model"
                    f"{f'; did you mean {near[0]!r}?' if near else ''} (see jaxgpt.taps.intermediates)"
                )
        self.keep, self.replace = keep, replace

    def wants(self, name: str) -> bool:
        """Whether any layer's value of this name is kept or replaced."""
        return any(full.endswith("." + name) for full in [*self.keep, *self.replace])

    def at(self, name: str, kept: dict[str, Array], value: Array) -> Array:
        """A value outside the layers."""
        if name in self.replace:
            value = _replaced(value, self.replace[name], name)
        if name in self.keep:
            kept[name] = value
        return value

    def in_layer(self, index: int | Array, seen: dict[str, Array], name: str, value: Array) -> Array:
        """A value inside a layer. A scanned layer's number is traced: there all layers compute, and one chooses."""
        scanned = not isinstance(index, int)
        for full, new in self.replace.items():
            layer, _, local = full.removeprefix("layers.").partition(".")
            if local == name and (scanned or int(layer) == index):
                value = (
                    jnp.where(index == int(layer), _replaced(value, new, full), value)
                    if scanned
                    else _replaced(value, new, full)
                )
        if any(full.endswith("." + name) for full in self.keep) if scanned else f"layers.{index}.{name}" in self.keep:
            seen[name] = value
        return value


def _replaced(value: Array, new: Replacement, name: str) -> Array:
    new = jnp.asarray(new(value) if callable(new) else new, value.dtype)
    if new.shape != value.shape:
        raise BadInput(f"the replacement of {name!r} has shape {new.shape}; it must be {value.shape}")
    return new
