"""Single weights that matter: by what they carry, |w| max|x|, by size, or drawn at random.

Yu et al. 2024 find "super weights" by spikes in what a matrix reads and writes: a single large weight that meets a
large input. Here all weights of the blocks' matrices are ranked by |w| times the largest input that they meet.
Letters as in model.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from experiments.anatomy.family import arrays_of, with_arrays

if TYPE_CHECKING:
    import numpy
    from flax import nnx

    from jaxgpt.config import ModelConfig

READS = {"attention.query": "reads", "attention.key": "reads", "attention.value": "reads", "attention.out": "heads",
         "mlp.up": "thinks", "mlp.down": "hidden"}  # fmt: skip


@cache
def largest_inputs(c: ModelConfig) -> Any:
    """A compiled function of parameters and windows [W, T + 1]: by block and by what a matrix reads (see READS) the
    largest size of each of its inputs, [d_in].
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt import build

    def one(state: nnx.State, tokens_T: Any) -> dict[str, Any]:
        model = nnx.merge(build.graphdef(c), state)
        names = ("residual", "residual_mid", "attention.heads", "mlp.hidden")
        seen = model.inspect(tokens_T[None], keep=[f"layers.{i}.{n}" for i in range(c.n_layers) for n in names])[1]
        found = {}
        for i, block in enumerate(model.layers):
            residual, mid, heads, hidden = (seen[f"layers.{i}.{n}"][0] for n in names)
            inputs = (block.attention_norm(residual), block.mlp_norm(mid), heads.reshape(len(tokens_T), -1), hidden)
            for name, x_TxI in zip(("reads", "thinks", "heads", "hidden"), inputs, strict=True):
                found[f"{i}.{name}"] = jnp.abs(x_TxI).max(axis=0)
        return found

    def of(state: nnx.State, window_WxT1: Any) -> dict[str, Any]:
        each = jax.lax.map(lambda window_T1: one(state, window_T1[:-1]), window_WxT1)
        return {name: x_WxI.max(axis=0) for name, x_WxI in each.items()}

    return jax.jit(of)


def ranked(
    arrays: dict[str, numpy.ndarray], inputs: dict[str, numpy.ndarray], most: int
) -> dict[str, list[tuple[str, int]]]:
    """By way of ranking, "carries" (|w| max|x|) and "size" (|w|): the first `most` weights as (parameter, flat index).

    arrays: of `arrays_of`; those that READS names count.
    """
    import numpy as np

    from analysis.anatomy import weight_scores

    names = [f"layers.{i}.{matrix}.kernel" for i in range(len(inputs) // 4) for matrix in READS]
    size = [np.abs(arrays[name]) for name in names]
    met = [inputs[f"{name.split('.')[1]}.{READS[name.split('.', 2)[2].removesuffix('.kernel')]}"] for name in names]
    scores = {"carries": [weight_scores(w, x) for w, x in zip(size, met, strict=True)], "size": size}
    owner = np.concatenate([np.full(w.size, n) for n, w in enumerate(size)])
    flat = np.concatenate([np.arange(w.size) for w in size])
    order = {way: np.argsort(-np.concatenate([s.reshape(-1) for s in score]), kind="stable")[:most]
             for way, score in scores.items()}  # fmt: skip
    return {way: [(names[owner[at]], int(flat[at])) for at in first] for way, first in order.items()}


def like(
    chosen: list[tuple[str, int]], arrays: dict[str, numpy.ndarray], draw: numpy.random.Generator
) -> list[tuple[str, int]]:
    """As many weights of the same matrices, at random."""
    import numpy as np

    names, counts = np.unique([name for name, _ in chosen], return_counts=True)
    return [(str(name), int(at)) for name, n in zip(names, counts, strict=True)
            for at in draw.choice(arrays[name].size, n, replace=False)]  # fmt: skip


def without(state: nnx.State, arrays: dict[str, numpy.ndarray], chosen: list[tuple[str, int]]) -> nnx.State:
    """The parameters with these weights set to 0."""
    new: dict[str, Any] = {}
    for name, at in chosen:
        new.setdefault(name, arrays[name].copy()).reshape(-1)[at] = 0
    return with_arrays(state, new)


def rises(
    state: nnx.State, c: ModelConfig, windows: numpy.ndarray, counts: tuple[int, ...], draws: int, seed: int
) -> dict[tuple[str, int], float]:
    """By (ranking, count): how much the mean held-out loss rises without the first so many weights, nats; "random": the
    mean over draws of as many of the matrices that "carries" names. Inputs are measured on the same windows.
    """
    import numpy as np

    from experiments.anatomy import family

    arrays, draw = arrays_of(state), np.random.default_rng(seed)
    inputs = {name: np.asarray(x) for name, x in largest_inputs(c)(state, windows).items()}
    first = ranked(arrays, inputs, max(counts))
    losses, found = family.losses(c), {}
    whole = np.asarray(losses(state, windows), float).mean()

    def rise(chosen: list[tuple[str, int]]) -> float:
        return float(np.asarray(losses(without(state, arrays, chosen), windows), float).mean() - whole)

    for count in counts:
        for way in first:
            found[way, count] = rise(first[way][:count])
        some = [rise(like(first["carries"][:count], arrays, draw)) for _ in range(draws)]
        found["random", count] = float(np.mean(some))
    return found
