"""What `jaxgpt reproduce redundancy` does to a trained model: weights pruned, changed, blocks dropped and swapped.

Letters as in model.py; W windows, I inputs and O outputs of a matrix, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from experiments.anatomy import family
from experiments.anatomy.family import arrays_of, with_arrays

if TYPE_CHECKING:
    import numpy
    from flax import nnx

    from jaxgpt.config import ModelConfig

METHODS = {"random": "at random", "magnitude": "smallest of each matrix", "global": "smallest of all", "wanda": "Wanda",
           "output": "smallest of each output"}  # fmt: skip
KINDS = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")
TABLES = {"embed": "token table", "position": "position table", "unembed": "output matrix"}


# --- one model, opened ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Open:
    """A model of the family as arrays by name, and the loss that it has with some of them changed (nats per token).

    initial: its parameters before training; fresh: others of the same distribution. inputs: by block matrix, the norm
    of each input over calibration tokens. angles: by block, how far the stream turns in it.
    """

    member: family.Member
    trained: dict[str, numpy.ndarray]
    initial: dict[str, numpy.ndarray]
    fresh: dict[str, numpy.ndarray]
    inputs: dict[str, numpy.ndarray]
    angles: list[float]
    loss: Callable[[Mapping[str, numpy.ndarray]], float]

    @property
    def matrices(self) -> dict[str, numpy.ndarray]:
        """The trained matrices of the blocks."""
        return {name: w for name, w in self.trained.items() if name.startswith("layers.") and name.endswith(".kernel")}


def opened(member: family.Member, windows: Any, calibration: Any) -> Open:
    """A model of the family, to be changed; windows [W, T + 1] for losses, calibration [W, T + 1] of training text."""
    import numpy as np

    from analysis.pruning import angular_distance
    from jaxgpt import build

    state, losses = family.params(member), family.losses(member.model)

    def loss(new: Mapping[str, numpy.ndarray]) -> float:
        return float(losses(with_arrays(state, dict(new)), windows).mean())

    fresh = build.init_params(member.model, member.seed + 10_000)
    streams, inputs = _activity(member.model)(state, calibration[:, :-1])
    flat = [np.asarray(x_WxTxD).reshape(-1, x_WxTxD.shape[-1]) for x_WxTxD in streams]
    return Open(
        member=member,
        trained=arrays_of(state),
        initial=arrays_of(family.params(member, 0)),
        fresh=arrays_of(fresh),
        inputs={name: np.asarray(norm_I) for name, norm_I in inputs.items()},
        angles=[angular_distance(a_NxD, b_NxD) for a_NxD, b_NxD in pairwise(flat)],
        loss=loss,
    )


@cache
def _activity(c: ModelConfig) -> Callable[[nnx.State, Any], tuple[list[Any], dict[str, Any]]]:
    """A compiled function of parameters and tokens [W, T]: the streams before each block and behind the last
    [W, T, D], and by block matrix the norm of each of its inputs over all tokens.
    """
    import jax
    from flax import nnx

    from jaxgpt import build

    layers, last = range(c.n_layers), f"layers.{c.n_layers - 1}"
    taps = ("residual", "attention.heads", "residual_mid", "mlp.hidden", "mlp.out")

    def of(state: nnx.State, tokens_WxT: Any) -> tuple[list[Any], dict[str, Any]]:
        model: Any = nnx.merge(build.graphdef(c), state)
        seen = model.inspect(tokens_WxT, keep=[f"layers.{i}.{tap}" for i in layers for tap in taps])[1]
        streams, inputs = [seen[f"layers.{i}.residual"] for i in layers], {}
        for i, block in enumerate(model.layers):
            read = block.attention_norm(streams[i])
            into = {**dict.fromkeys(KINDS[:3], read), "attention.out": seen[f"layers.{i}.attention.heads"],
                    "mlp.up": block.mlp_norm(seen[f"layers.{i}.residual_mid"]),
                    "mlp.down": seen[f"layers.{i}.mlp.hidden"]}  # fmt: skip
            for kind, x_WxTxI in into.items():
                flat_NxI = x_WxTxI.reshape(x_WxTxI.shape[0] * x_WxTxI.shape[1], -1)
                inputs[f"layers.{i}.{kind}.kernel"] = (flat_NxI**2).sum(axis=0) ** 0.5
        return [*streams, seen[f"{last}.residual_mid"] + seen[f"{last}.mlp.out"]], inputs

    return jax.jit(of)


# --- what is done to it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Intervention:
    """Something done to a model: a `kind` of test, `what` is done, `where`, to which `share`, the loss afterwards, and
    the sum of squares of the change of parameters.
    """

    kind: str
    what: str
    where: str
    share: float
    loss: float
    squares: float


def _intervention(
    model: Open, kind: str, what: str, where: str, share: float, new: Mapping[str, numpy.ndarray]
) -> Intervention:
    import numpy as np

    squares = sum(float(np.square(w.astype(np.float64) - model.trained[name]).sum()) for name, w in new.items())
    return Intervention(kind, what, where, share, model.loss(new), squares)


def pruned(model: Open, method: str, share: float, draw: numpy.random.Generator) -> dict[str, numpy.ndarray]:
    """The block matrices with this share of weights set to 0, chosen by one of METHODS."""
    import numpy as np

    from analysis import anatomy, pruning

    matrices = model.matrices
    if method == "global":
        masks = pruning.lowest_of_all({name: np.abs(w) for name, w in matrices.items()}, share)
    elif method in ("wanda", "output"):
        inputs = {name: model.inputs[name] if method == "wanda" else np.ones(len(w)) for name, w in matrices.items()}
        scores = {name: anatomy.weight_scores(w, inputs[name]) for name, w in matrices.items()}
        masks = {name: pruning.lowest_by_output(score, share) for name, score in scores.items()}
    else:
        scores = {name: draw.random(w.shape) if method == "random" else np.abs(w) for name, w in matrices.items()}
        masks = {name: pruning.lowest(score, share) for name, score in scores.items()}
    return {name: np.where(masks[name], 0, w) for name, w in matrices.items()}


def modules(model: Open) -> dict[str, list[str]]:
    """Names of the parameters of each block, of each kind of matrix (and bias) over the blocks, and of each table."""
    names, layers = list(model.trained), range(model.member.model.n_layers)
    found = {f"block {i}": [n for n in names if n.startswith(f"layers.{i}.")] for i in layers}
    found |= {f"all {kind.partition('.')[2]}": [n for n in names if f".{kind}." in n] for kind in KINDS}
    return found | {words: [n for n in names if n.startswith(f"{table}.")] for table, words in TABLES.items()}


def interventions(model: Open, sparsities: Sequence[float], shares: Sequence[float]) -> Iterator[Intervention]:
    """All that is done to one model."""
    import numpy as np

    from analysis import pruning

    seeds = [model.member.width, model.member.seed]
    for method in METHODS:
        draw = np.random.default_rng([*seeds, 0])
        for share in sparsities:
            yield _intervention(model, "prune", method, "", share, pruned(model, method, share, draw))
    whole = {name: np.ones(w.shape, bool) for name, w in model.trained.items()}
    some = np.random.default_rng([*seeds, 1])
    for share in shares:
        masks = {name: pruning.lowest(some.random(w.shape), share) for name, w in model.matrices.items()}
        for how in pruning.CHANGES:
            yield _intervention(model, "change", how, "", share, _changed(model, how, masks, seeds))
    for module, names in modules(model).items():
        for how in pruning.CHANGES:
            new = _changed(model, how, {name: whole[name] for name in names}, seeds)
            yield _intervention(model, "module", how, module, 1.0, new)
    for i in range(model.member.model.n_layers - 1):
        yield _intervention(model, "swap", "swap", f"block {i}", 1.0, swapped(model, i))


def _changed(model: Open, how: Any, masks: Mapping[str, numpy.ndarray], seeds: list[int]) -> dict[str, numpy.ndarray]:
    import numpy as np

    from analysis.pruning import changed

    draw = np.random.default_rng([*seeds, 2])
    return {
        name: changed(how, model.trained[name], model.initial[name], model.fresh[name], mask, draw)
        for name, mask in masks.items()
    }


def swapped(model: Open, i: int) -> dict[str, numpy.ndarray]:
    """Block i in the place of the next one, and the next one in its."""
    new = {}
    for name, w in model.trained.items():
        for here, there in ((i, i + 1), (i + 1, i)):
            if name.startswith(f"layers.{here}."):
                new[name.replace(f"layers.{here}.", f"layers.{there}.", 1)] = w
    return new


def tried(
    members: list[family.Member], sparsities: Sequence[float], shares: Sequence[float], windows: Any, calibration: Any
) -> tuple[Any, Any]:
    """(costs, blocks). Costs: a row per intervention with nats (added to the trained loss), kept (of the gain) and
    parameters (their share). Blocks: a row per block of each model with its angle.
    """
    import pandas

    from analysis.pruning import retained

    rows, blocks = [], []
    for member in members:
        model = opened(member, windows, calibration)
        known = {"run_id": member.run_id, "width": member.width, "seed": member.seed}
        initial, trained = model.loss(model.initial), model.loss({})
        counted = {module: sum(model.trained[n].size for n in names) for module, names in modules(model).items()}
        total = sum(w.size for w in model.trained.values())
        for done in interventions(model, sparsities, shares):
            kept = float(retained(done.loss, initial, trained))
            rows.append(known | vars(done) | {"nats": done.loss - trained, "kept": kept, "gain": initial - trained,
                                              "parameters": counted.get(done.where, 0) / total})  # fmt: skip
        blocks += [known | {"where": f"block {i}", "angle": angle} for i, angle in enumerate(model.angles)]
    return pandas.DataFrame(rows), pandas.DataFrame(blocks)
