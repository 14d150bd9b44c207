"""Networks whose units may stand in any order: permutations that match two of them, and the loss on the line between.

A hidden unit has no place of its own: permute the units of a layer together with what reads them, and the function
stays. `Group` says which axes of which parameters are permuted together, `matched` finds the order in which the units
of one network lie nearest to those of another (weight matching: Ainsworth et al. 2023, algorithm 1), `barrier` says
how far the loss rises on the straight line between two networks above that between their own losses (Frankle et al.
2020; Entezari et al. 2022).

Parameters are dicts {name: array}; the axes of each are named, None for one that has an order (tokens, positions).

Letters: n units of an axis, P points on a line, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

Params = Mapping[str, np.ndarray]
Axes = Mapping[str, tuple[str | None, ...]]  # of each parameter
Order = Mapping[str, np.ndarray]  # of each named axis: the unit that is put at each place, [n] ints


@dataclass(frozen=True)
class Group:
    """Axes whose units are permuted by one choice.

    With block = 1 there is one axis, of free units. Else units come in blocks of so many, such as attention's heads:
    the blocks are permuted alike on all axes of the group, and within a block each axis has an order of its own.
    """

    axes: tuple[str, ...]
    block: int = 1


def sizes(params: Params, axes: Axes) -> dict[str, int]:
    """How many units each named axis has. Raises ValueError where two parameters do not agree."""
    found: dict[str, int] = {}
    for name, names in axes.items():
        for axis, n in zip(names, params[name].shape, strict=True):
            if axis is not None and found.setdefault(axis, n) != n:
                raise ValueError(f"{name} has {n} units of {axis}, and another parameter {found[axis]}")
    return found


def permuted(params: Params, axes: Axes, order: Order) -> dict[str, np.ndarray]:
    """The network with its units in another order; axes that `order` does not name stay."""
    return {name: _taken(array, axes.get(name, ()), order) for name, array in params.items()}


def _taken(array: np.ndarray, names: Sequence[str | None], order: Order) -> np.ndarray:
    for place, axis in enumerate(names):
        if axis is not None and axis in order:
            array = np.take(array, order[axis], axis=place)
    return array


def random_order(groups: Sequence[Group], sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """An order of all groups, uniform among those that they allow."""
    order: dict[str, np.ndarray] = {}
    for group in groups:
        blocks_b = rng.permutation(sizes[group.axes[0]] // group.block)
        for axis in group.axes:
            within_bxk = np.stack([rng.permutation(group.block) for _ in blocks_b])
            order[axis] = (blocks_b[:, None] * group.block + within_bxk).reshape(-1)
    return order


def matched(a: Params, b: Params, axes: Axes, groups: Sequence[Group], rounds: int = 100) -> dict[str, np.ndarray]:
    """The order of b's units in which the sum of products with a's parameters, entry by entry, is large; so the
    distance is small.

    One group after the other gets its best order while the others keep theirs (Ainsworth et al. 2023, algorithm 1),
    until nothing changes, for at most so many rounds. No step makes the sum smaller; the end is a local optimum. In
    the first round a group looks only at parameters whose other axes have their order already, so that the first one
    should be named by parameters of which no other axis can be permuted.
    """
    n_of = sizes(a, axes)
    order: dict[str, np.ndarray] = {}
    for round_ in range(rounds):
        before = dict(order)
        for group in groups:
            order |= _best_order(a, b, axes, group, n_of, order, all_known=round_ > 0)
        if round_ and all(np.array_equal(before[axis], order[axis]) for axis in order):
            break
    return order


def _best_order(
    a: Params, b: Params, axes: Axes, group: Group, n_of: Mapping[str, int], order: Order, *, all_known: bool
) -> dict[str, np.ndarray]:
    """Of one group, given the others': an assignment of blocks, with the best assignment within each pair of them."""
    k, blocks = group.block, n_of[group.axes[0]] // group.block
    score_bxb, within = np.zeros((blocks, blocks)), {}
    for axis in group.axes:
        alike_bxbxkxk = (
            _alike(a, b, axes, axis, n_of[axis], order, all_known).reshape(blocks, k, blocks, k).transpose(0, 2, 1, 3)
        )
        if k == 1:
            score_bxb += alike_bxbxkxk[:, :, 0, 0]
            within[axis] = np.zeros((blocks, blocks, 1), int)
            continue
        within[axis] = np.zeros((blocks, blocks, k), int)
        for i in range(blocks):
            for j in range(blocks):
                rows_k, columns_k = linear_sum_assignment(alike_bxbxkxk[i, j], maximize=True)
                within[axis][i, j] = columns_k
                score_bxb[i, j] += alike_bxbxkxk[i, j][rows_k, columns_k].sum()
    rows_b, columns_b = linear_sum_assignment(score_bxb, maximize=True)
    return {
        axis: (columns_b[:, None] * k + which_bxbxk[rows_b, columns_b]).reshape(-1)
        for axis, which_bxbxk in within.items()
    }


def _alike(a: Params, b: Params, axes: Axes, axis: str, n: int, order: Order, all_known: bool) -> np.ndarray:
    """Sum of products of each unit of a with each of b over all parameters that have the axis, [n, n]; float64."""
    alike_nxn = np.zeros((n, n))
    for name, names in axes.items():
        others = [other for other in names if other not in (None, axis)]
        if axis not in names or not (all_known or all(other in order for other in others)):
            continue
        theirs = _taken(b[name], [None if other == axis else other for other in names], order)
        place = names.index(axis)
        rows_a, rows_b = (np.moveaxis(x, place, 0).reshape(n, -1).astype(float) for x in (a[name], theirs))
        alike_nxn += rows_a @ rows_b.T
    return alike_nxn


# --- distances and barriers ----------------------------------------------------------------------------------------


def norm(params: Params) -> float:
    """The root of the sum of squares over all parameters."""
    return float(np.sqrt(sum(np.square(array, dtype=float).sum() for array in params.values())))


def distance(a: Params, b: Params) -> float:
    """The norm of the difference."""
    return norm({name: np.asarray(a[name], float) - b[name] for name in a})


def between(a: Params, b: Params, share: float) -> dict[str, np.ndarray]:
    """A point of the straight line from a (share 0) to b (share 1)."""
    return {name: ((1 - share) * a[name] + share * b[name]).astype(a[name].dtype) for name in a}


def barrier(loss_P: np.ndarray, share_P: np.ndarray) -> float:
    """How far the loss on a line rises above the straight line between the losses of its ends, at most; at least 0.

    Frankle et al. 2020 and Entezari et al. 2022, which measure it as the error or the loss. share_P: from 0 to 1.
    """
    loss_P, share_P = np.asarray(loss_P, float), np.asarray(share_P, float)
    return float((loss_P - ((1 - share_P) * loss_P[0] + share_P * loss_P[-1])).max())


def per_seed(values: Mapping[tuple[int, int], float]) -> np.ndarray:
    """One number per seed whose mean is the mean over all pairs of seeds: jackknife pseudo-values, [S].

    Pairs that share a seed are not independent, so that an interval over pairs would be too narrow. Left out in turn,
    the seeds say how much each moves the mean m: S m - (S - 1) m_without (Tukey's), nearly independent numbers whose
    spread gives the interval. NaN throughout where a pair has no value. Raises ValueError unless there are three seeds
    or more and every pair of them once.
    """
    seeds = sorted({seed for pair in values for seed in pair})
    n = len(seeds)
    if n < 3 or len({frozenset(pair) for pair in values}) != len(values) or len(values) != n * (n - 1) // 2:
        raise ValueError(f"{len(values)} values are not one for every pair of {n} seeds, of which there must be three")
    mean = np.mean(list(values.values()))
    without_S = [np.mean([value for pair, value in values.items() if seed not in pair]) for seed in seeds]
    return np.asarray([n * mean - (n - 1) * each for each in without_S])
