"""Permutations found again, against all there are; barriers of known curves; intervals over pairs of seeds."""

import itertools

import numpy as np
import pytest

from analysis import matching
from analysis.matching import Group

AXES = {"in": (None, "stream"), "up": ("stream", "units"), "bias": ("units",), "query": ("stream", "qk"),
        "value": ("stream", "vo"), "out": ("vo", "stream")}  # fmt: skip
GROUPS = (Group(("stream",)), Group(("units",)), Group(("qk", "vo"), block=3))


def network(seed, stream=8, units=10, heads=2):
    rng = np.random.default_rng(seed)
    n = {"stream": stream, "units": units, "qk": 3 * heads, "vo": 3 * heads, None: 5}
    return {name: rng.standard_normal([n[axis] for axis in axes]) for name, axes in AXES.items()}


def test_a_permuted_copy_is_put_back_exactly():
    a = network(0)
    order = matching.random_order(GROUPS, matching.sizes(a, AXES), np.random.default_rng(1))
    copy = matching.permuted(a, AXES, order)
    assert matching.distance(a, copy) > matching.norm(a)
    back = matching.permuted(copy, AXES, matching.matched(a, copy, AXES, GROUPS))
    for name in a:
        np.testing.assert_array_equal(a[name], back[name])


def test_orders_of_heads_keep_their_units_together_and_move_both_sides_alike():
    order = matching.random_order(GROUPS, matching.sizes(network(0, heads=4), AXES), np.random.default_rng(2))
    heads = {axis: order[axis].reshape(4, 3) // 3 for axis in ("qk", "vo")}
    np.testing.assert_array_equal(heads["qk"], heads["vo"])
    assert (heads["qk"] == heads["qk"][:, :1]).all()
    assert (order["qk"] != order["vo"]).any()


def test_one_layer_gets_the_best_of_all_orders():
    axes, groups = {"up": (None, "units"), "bias": ("units",)}, (Group(("units",)),)
    rng = np.random.default_rng(3)
    a, b = ({"up": rng.standard_normal((4, 5)), "bias": rng.standard_normal(5)} for _ in range(2))
    found = matching.distance(a, matching.permuted(b, axes, matching.matched(a, b, axes, groups)))
    every = [matching.distance(a, matching.permuted(b, axes, {"units": np.array(order)}))
             for order in itertools.permutations(range(5))]  # fmt: skip
    assert found == pytest.approx(min(every))
    assert found < 0.9 * np.median(every)


def test_heads_get_the_best_of_all_orders():
    axes = {"query": (None, "qk"), "out": ("vo", None)}
    rng = np.random.default_rng(4)
    a, b = ({"query": rng.standard_normal((3, 4)), "out": rng.standard_normal((4, 3))} for _ in range(2))
    order = matching.matched(a, b, axes, (Group(("qk", "vo"), block=2),))
    found = matching.distance(a, matching.permuted(b, axes, order))
    heads, flips = ([0, 1], [1, 0]), ([0, 1], [1, 0])
    every = [
        matching.distance(a, matching.permuted(b, axes, {
            "qk": np.array([2 * h + u for h, units in zip(head, qk, strict=True) for u in units]),
            "vo": np.array([2 * h + u for h, units in zip(head, vo, strict=True) for u in units])}))
        for head in heads
        for qk in itertools.product(flips, repeat=2)
        for vo in itertools.product(flips, repeat=2)
    ]  # fmt: skip
    assert found == pytest.approx(min(every))


def test_matching_brings_two_networks_nearer_and_changes_neither():
    a, b = network(5), network(6)
    before = {name: array.copy() for name, array in b.items()}
    order = matching.matched(a, b, AXES, GROUPS)
    assert matching.distance(a, matching.permuted(b, AXES, order)) < 0.95 * matching.distance(a, b)
    for name, array in before.items():
        np.testing.assert_array_equal(b[name], array)


def test_sizes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="units of stream"):
        matching.sizes(network(0) | {"up": np.zeros((7, 10))}, AXES)


def test_the_barrier_is_measured_above_the_line_between_the_ends():
    share = np.linspace(0, 1, 11)
    assert matching.barrier(1 + share + 0.8 * share * (1 - share), share) == pytest.approx(0.2)
    assert matching.barrier(3 - share, share) == pytest.approx(0, abs=1e-12)
    assert matching.barrier(1 + share**2, share) == 0  # below the line: no barrier


def test_the_middle_of_a_line_keeps_the_precision_of_its_ends():
    a, b = ({"w": np.full(2, value, np.float32)} for value in (1.0, 3.0))
    middle = matching.between(a, b, 0.25)["w"]
    np.testing.assert_array_equal(middle, np.full(2, 1.5))
    assert middle.dtype == np.float32


def test_numbers_per_seed_have_the_mean_of_all_pairs_and_find_what_a_seed_adds():
    effect = {0: 1.0, 1: -2.0, 2: 0.5, 3: 4.0}
    pairs = {(i, j): 10 + effect[i] + effect[j] for i in effect for j in effect if i < j}
    found = matching.per_seed(pairs)
    assert found.mean() == pytest.approx(np.mean(list(pairs.values())))
    # Of a sum of effects the pseudo-values are those effects, twice, about the mean.
    np.testing.assert_allclose(found, [10 + 2 * effect[i] for i in effect])


@pytest.mark.parametrize("pairs", [{(0, 1): 1.0}, {(0, 1): 1.0, (0, 2): 1.0}, {(0, 1): 1.0, (1, 0): 1.0, (0, 2): 1.0}])
def test_pairs_that_are_not_all_are_refused(pairs):
    with pytest.raises(ValueError, match="every pair"):
        matching.per_seed(pairs)
