"""The symmetries of the family's networks: what one may do to their parameters and nothing changes.

Parameters are dicts of NumPy arrays by name here. Letters as in model.py; n units of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

    from analysis.matching import Group
    from jaxgpt.config import ModelConfig

Arrays = dict[str, Any]  # NumPy arrays by the parameter's name


def axes_of(c: ModelConfig, params: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    """Which units each axis of each parameter counts. Of a pre-norm Transformer with an MLP and learned positions."""
    ends: dict[str, tuple[str | None, ...]] = {
        "embed.embedding": (None, "stream"), "position.embedding": (None, "stream"),
        "unembed.kernel": ("stream", None), "unembed.bias": (None,),
        "_norm.scale": ("stream",), "_norm.bias": ("stream",),
        "query.kernel": ("stream", "qk"), "query.bias": ("qk",), "key.kernel": ("stream", "qk"), "key.bias": ("qk",),
        "value.kernel": ("stream", "vo"), "value.bias": ("vo",), "out.kernel": ("vo", "stream"),
        "out.bias": ("stream",),
        "up.kernel": ("stream", "units"), "up.bias": ("units",), "down.kernel": ("units", "stream"),
        "down.bias": ("stream",),
    }  # fmt: skip
    found = {}
    for name in params:
        (axes,) = (axes for end, axes in ends.items() if name.endswith(end))
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        found[name] = tuple(axis if axis in (None, "stream") else f"{axis}.{layer}" for axis in axes)
    assert c.positions == "learned", "rotary positions tie the units of queries and keys together"
    return found


def groups_of(c: ModelConfig) -> list[Group]:
    """What is permuted together: the stream, each layer's MLP units, its heads and the units within them."""
    from analysis.matching import Group

    each = [(Group((f"qk.{i}", f"vo.{i}"), c.head_width), Group((f"units.{i}",))) for i in range(c.n_layers)]
    return [Group(("stream",)), *itertools.chain.from_iterable(each)]


Change = Callable[[Arrays, "ModelConfig", "numpy.random.Generator"], Arrays]


def permute(which: Sequence[str]) -> Change:
    """A random order of the units of these kinds: stream, units, qk and vo."""

    def change(params: Arrays, c: ModelConfig, rng: numpy.random.Generator) -> Arrays:
        from analysis import matching

        axes = axes_of(c, params)
        order = matching.random_order(groups_of(c), matching.sizes(params, axes), rng)
        kept = {axis: units for axis, units in order.items() if axis.split(".")[0] in which}
        return matching.permuted(params, axes, kept)

    return change


@dataclass(frozen=True)
class Wires:
    """Parameters of a layer that compute a unit's input, units last, and those that read it, by their axis of units."""

    written: tuple[str, ...]
    read: Mapping[str, int]


UP = Wires(("mlp.up.kernel", "mlp.up.bias"), {"mlp.down.kernel": 0})
VALUE = Wires(("attention.value.kernel", "attention.value.bias"), {"attention.out.kernel": 0})
QUERY = Wires(("attention.query.kernel", "attention.query.bias"), {"attention.key.kernel": 1, "attention.key.bias": 0})


def rescale(wires: Wires, signs: bool, factor: float | None = None) -> Change:
    """Units of each layer times c where they are written, and divided by c where they are read. c of each unit is drawn
    from 1/4 to 4, evenly in the logarithm, with a random sign if `signs`; or it is `factor`.
    """

    def change(params: Arrays, c: ModelConfig, rng: numpy.random.Generator) -> Arrays:
        import numpy as np

        changed = dict(params)
        for i in range(c.n_layers):
            n = params[f"layers.{i}.{wires.written[0]}"].shape[-1]
            c_n = 4.0 ** rng.uniform(-1, 1, n) if factor is None else np.full(n, factor)
            c_n = (c_n * (rng.choice([-1, 1], n) if signs else 1)).astype(np.float32)
            for name in wires.written:
                changed[f"layers.{i}.{name}"] = params[f"layers.{i}.{name}"] * c_n
            for name, axis in wires.read.items():
                array = params[f"layers.{i}.{name}"]
                changed[f"layers.{i}.{name}"] = array / (c_n if axis == array.ndim - 1 else c_n[:, None])
        return changed

    return change


SYMMETRIES: dict[str, Change] = {
    "MLP units permuted": permute(("units",)),
    "heads permuted": permute(("qk", "vo")),
    "stream permuted": permute(("stream",)),
    "all of these permuted": permute(("units", "qk", "vo", "stream")),
    "MLP units scaled": rescale(UP, signs=False),
    "values scaled and flipped": rescale(VALUE, signs=True),
    "queries against keys": rescale(QUERY, signs=True),
    "MLP units scaled by 2^20: no rounding": rescale(UP, signs=False, factor=2.0**20),
}
ALL = "all of these permuted"
NONE: dict[str, Change] = {  # beside them, what is no symmetry
    "no symmetry: MLP units flipped": rescale(UP, signs=False, factor=-1.0),
}
