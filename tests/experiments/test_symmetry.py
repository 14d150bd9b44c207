"""Symmetries of our model in float64, where they are exact, and planted barriers to verdicts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from analysis import matching
from experiments.anatomy import family, symmetries, symmetry
from experiments.claims import verdict
from jaxgpt import build
from jaxgpt.config import ModelConfig

CLAIMS = {claim.id: claim for claim in symmetry.CLAIMS}
MODEL = ModelConfig(d_model=12, n_heads=3, n_layers=2, context=6, vocab_size=16, mlp="relu", bias=True,
                    positions="learned")  # fmt: skip


@pytest.fixture(scope="module")
def network():
    """Parameters of which none is 0 or 1 by its start."""
    rng = np.random.default_rng(0)
    params = family.arrays_of(build.init_params(MODEL, 0))
    return {name: (array + 0.3 * rng.standard_normal(array.shape)).astype(np.float32) for name, array in params.items()}


@pytest.fixture(scope="module")
def logits():
    like = build.init_params(MODEL, 0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 16, (2, 6)))
    forward = jax.jit(lambda state: nnx.merge(build.graphdef(MODEL), state)(tokens))
    return lambda params: np.asarray(forward(family.with_arrays(like, params)))


@pytest.mark.parametrize("name", symmetries.SYMMETRIES)
def test_a_symmetry_changes_parameters_and_no_logit(name, network, logits):
    other = symmetries.SYMMETRIES[name](network, MODEL, np.random.default_rng(2))
    assert matching.distance(network, other) > 0.05 * matching.norm(network)
    before, after = logits(network), logits(other)
    assert np.abs(after - before).max() < 2e-5 * before.std()
    assert before.std() > 0.1


def test_flipping_relu_units_is_none(network, logits):
    (change,) = symmetries.NONE.values()
    assert np.abs(logits(change(network, MODEL, np.random.default_rng(2))) - logits(network)).max() > 0.1


def test_every_parameter_moves_with_its_units(network):
    """An order of which one parameter did not take part would show in the logits; here: that all axes are named."""
    axes = symmetries.axes_of(MODEL, network)
    assert axes.keys() == network.keys()
    assert all(len(axes[name]) == array.ndim for name, array in network.items())
    assert matching.sizes(network, axes) == {"stream": 12} | {
        f"{axis}.{i}": n for i in range(2) for axis, n in (("qk", 12), ("vo", 12), ("units", 48))
    }


def test_matching_finds_the_permutation_of_a_whole_network(network):
    copy = symmetries.SYMMETRIES[symmetries.ALL](network, MODEL, np.random.default_rng(3))
    axes = symmetries.axes_of(MODEL, network)
    back = matching.permuted(copy, axes, matching.matched(network, copy, axes, symmetries.groups_of(MODEL)))
    for name, array in network.items():
        np.testing.assert_array_equal(array, back[name])


def test_parameters_and_states_turn_into_each_other():
    state = build.init_params(MODEL, 1)
    back = family.with_arrays(state, family.arrays_of(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


# --- verdicts ------------------------------------------------------------------------------------------------------


def lines(before, after):
    return symmetry.Lines(*(symmetry.Line(np.array([1, 1 + b, 1]), b, 1.3) for b in (before, after)))


def planted(copy=(1.0, 0.0), pairs=lambda width: (1.0, 0.05 * 32 / width), change=1e-6, distance=1.4, seeds=4):
    widths = (32, 64, 96)
    moved = {name: symmetry.Moved(change, distance) for name in symmetries.SYMMETRIES}
    moved |= {name: symmetry.Moved(5.0, 0.5) for name in symmetries.NONE}
    return symmetry.Found(
        {w: dict.fromkeys(range(seeds), moved) for w in widths},
        {w: dict.fromkeys(range(seeds), lines(*copy)) for w in widths},
        {w: {(i, j): lines(*pairs(w)) for i in range(seeds) for j in range(i + 1, seeds)} for w in widths},
    )


def verdicts(**how):
    measured = symmetry.measure(planted(**how))
    assert set(measured) == set(CLAIMS)
    return {name: verdict(CLAIMS[name], m) for name, m in measured.items()}


def test_barriers_that_matching_removes_bear_out_every_claim():
    assert set(verdicts().values()) == {"reproduced"}


@pytest.mark.parametrize(("how", "missing"), [
    ({"change": 0.01}, {"same"}), ({"distance": 1.0}, {"distance"}), ({"copy": (0.01, 0.0)}, {"copy_before"}),
    ({"copy": (1.0, 0.3)}, {"copy_after"}), ({"pairs": lambda w: (1.0, 0.9 * 32 / w)}, {"seeds_after"}),
    ({"pairs": lambda w: (1.0, 0.02 * w / 96)}, {"width"}),
    ({"pairs": lambda w: (0.05, 0.001 * 32 / w)}, {"seeds_before"}),
])  # fmt: skip
def test_each_claim_can_fail_alone(how, missing):
    against = {name for name, v in verdicts(**how).items() if v in ("contradicted", "not seen at this scale")}
    assert against == missing


def test_a_single_pair_of_seeds_decides_nothing_on_pairs():
    measured = symmetry.measure(planted(seeds=2))
    for name in ("seeds_before", "seeds_after", "width"):
        assert verdict(CLAIMS[name], measured[name]) == "inconclusive"


def test_pairs_without_a_barrier_leave_the_exponent_open():
    measured = symmetry.measure(planted(pairs=lambda w: (1.0, 0.0)))
    assert verdict(CLAIMS["width"], measured["width"]) == "inconclusive"
    assert verdict(CLAIMS["seeds_after"], measured["seeds_after"]) == "reproduced"


def test_the_loss_on_a_line_is_asked_between_its_ends_only():
    a, b = ({"w": np.array([value])} for value in (0.0, 2.0))
    asked = []

    def loss(params):
        asked.append(float(params["w"][0]))
        return 5.0

    found = symmetry.line(a, b, loss, (1.0, 3.0), 5)
    assert asked == [0.5, 1.0, 1.5]
    assert found.barrier == pytest.approx(5 - 1.5)
    assert found.distance == pytest.approx(2.0)


def test_tables_say_what_a_single_pair_cannot_have_an_interval_for():
    table = symmetry.barrier_table(planted(seeds=2))
    assert list(table["seeds, before"]) == ["1", "1", "1"]
    assert list(symmetry.barrier_table(planted())["width"]) == ["32", "64", "96"]


@pytest.mark.slow
def test_the_command_runs_from_end_to_end(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "symmetry", "--scale", "smoke", "--json", "out.json")
    assert said.code == 0, said.err
    claims = json.loads((tmp_path / "results/raw/symmetry/smoke/outcome/claims.json").read_text())
    assert {claim["id"] for claim in claims} == set(CLAIMS)
    assert "nan" not in said.out
