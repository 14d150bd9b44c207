"""muP: the table of factors, and what it is for: no activation's change grows or dies out with the model's width."""

from dataclasses import replace as with_

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgpt import RunConfig, build
from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.optimizer import MUP, hparams, kind, optimizer, scale_by_width

# --- the table -----------------------------------------------------------------------------------------------------

SMALL = {"n_layers": 1, "n_heads": 2, "context": 4, "vocab_size": 7, "positions": "learned", "bias": True}
HIDDEN = ("query", "key", "value", "attention.out", "up", "gate", "down")


def names(**settings):
    params = build.init_params(ModelConfig(d_model=8, **SMALL | settings), 0)
    return [build.param_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("settings", [{}, {"d_input": 3, "d_output": 2}, {"n_experts": 3}, {"qk_norm": True}])
def test_every_parameter_of_a_model_has_its_row_in_the_table(settings, scanned):
    for name in names(mlp="swiglu", scan_layers=scanned, **settings):
        owner, _, last = name.rpartition(".")
        if owner.endswith("router"):
            expected = "router"
        elif owner.endswith(HIDDEN) and last == "kernel":
            expected = "hidden"
        elif owner in ("unembed", "read_out"):
            expected = {"kernel": "output", "bias": "fixed"}[last]
        else:
            assert last in ("bias", "scale", "embedding") or name == "read_in.kernel", name
            expected = "vector"
        assert kind(name) == expected, name


@pytest.mark.parametrize("name", ["", "w", "kernel", "0.kernel", "mlp.kernel", "layers", "unembed"])
def test_a_tensor_that_is_not_the_transformers_is_left_alone(name):
    assert kind(name) == "fixed"
    assert set(MUP["fixed"].values()) == {0}


def test_adams_and_sgds_factors_are_those_of_table_8():
    # Yang et al. 2022, table 8, whose n is our m: learning rates of input weights and biases, output, hidden weights.
    assert {row: MUP[row]["sgd"] for row in ("vector", "output", "hidden")} == {"vector": 1, "output": 1, "hidden": 0}
    for name in ("adamw", "lion"):
        assert {row: MUP[row][name] for row in ("vector", "output", "hidden")} == {
            "vector": 0, "output": 0, "hidden": -1}  # fmt: skip


def test_the_factor_multiplies_the_update_and_not_the_weight_decay():
    params = {"layers": {"up": {"kernel": np.ones((3, 4), np.float32)}}, "embed": {"embedding": np.ones(2, np.float32)}}
    config = OptimizerConfig(clip=None, weight_decay=0.5)
    made = optimizer(config, 0.1, hparams(with_(RunConfig(), optimizer=config)), 8.0)
    updates, _ = made.update(params, made.init(params), params)  # Adam's first direction is 1 everywhere
    np.testing.assert_allclose(updates["layers"]["up"]["kernel"], -0.1 * (1 / 8 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.1, rtol=1e-6)


@pytest.mark.parametrize("name", MUP["hidden"])
def test_at_the_base_width_both_parametrizations_are_the_same(name):
    update = {"layers": {"up": {"kernel": np.arange(6, dtype=np.float32)}}, "router": {"kernel": np.ones(2)}}
    for leaf, same in zip(jax.tree.leaves(scale_by_width(update, name, 1.0)), jax.tree.leaves(update), strict=True):
        np.testing.assert_array_equal(leaf, same)
    models = [ModelConfig(d_model=8, base_width=8, parametrization=p, **SMALL) for p in ("standard", "mup")]
    tokens = np.arange(4)[None]
    first, second = (build.create(c)(tokens) for c in models)
    np.testing.assert_array_equal(first, second)


# --- the coordinate check: Yang et al. 2022, appendix D.1 ----------------------------------------------------------

WIDTHS = (32, 64, 128, 256, 512)
CHECKED = ("layers.0.attention.out", "layers.0.mlp.out", "final")
STEPS = 4


def changes(width, name, rate, *, keep=CHECKED, seed=0, **settings):
    """RMS of the change of logits and activations after a few steps on one batch; by name."""
    c = ModelConfig(d_model=width, base_width=WIDTHS[0], n_layers=1, n_heads=2, context=16, vocab_size=64, **settings)
    config = OptimizerConfig(name=name, weight_decay=0.0)
    tokens_BxT1 = np.random.default_rng(seed).integers(0, 64, (4, 17))
    made = optimizer(config, rate, hparams(with_(RunConfig(), optimizer=config)), c.width_ratio)

    def look(params):
        logits, seen = nnx.merge(build.graphdef(c), params).inspect(tokens_BxT1[:, :-1], keep=keep)
        return {"logits": logits, **seen}

    def loss(params):
        logits_BxTxV = look(params)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, tokens_BxT1[:, 1:]).mean()

    @jax.jit
    def run(params):
        def step(_, carry):
            params, state = carry
            updates, state = made.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        after, _ = jax.lax.fori_loop(0, STEPS, step, (params, made.init(params)))
        difference = jax.tree.map(jnp.subtract, look(after), look(params))
        return {name: jnp.sqrt(jnp.mean(d**2)) for name, d in difference.items()}

    return run(jax.tree.map(jnp.asarray, build.init_params(c, seed)))


def slopes(measured, widths):
    """Power of the width with which each quantity goes, least squares in the logarithms."""
    table = {name: [float(m[name]) for m in measured] for name in measured[0]}
    return {name: np.polyfit(np.log(widths), np.log(sizes), 1)[0] for name, sizes in table.items()}


# Flat means: 16 times the width changes an activation's change by less than 16^.2 = 1.7, where it grows 16-fold without
# muP if all terms of its sums have one sign. At these widths some do not yet, so that growing means half of that power.
FLAT, GROWING = 0.2, 0.5


def test_under_mup_no_activations_change_depends_on_the_width_and_without_it_they_grow():
    base = changes(WIDTHS[0], "adamw", 0.01)  # where both parametrizations are the same
    flat = [base, *(changes(width, "adamw", 0.01, parametrization="mup") for width in WIDTHS[1:])]
    assert {name: slope for name, slope in slopes(flat, WIDTHS).items() if abs(slope) > FLAT} == {}
    grown = slopes([base, *(changes(width, "adamw", 0.01) for width in WIDTHS[1:])], WIDTHS)
    # Not `final`: behind the last norm a vector can only turn.
    assert min(grown[name] for name in ("logits", "layers.0.attention.out", "layers.0.mlp.out")) > GROWING


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("lion", 0.003), ("sgd", 1.0), ("muon", 0.01)])
def test_the_factors_of_the_other_optimizers_hold_changes_flat_too(name, rate):
    widths = WIDTHS[::3]  # 32 and 256
    base, mup, standard = (
        changes(width, name, rate, parametrization=parametrization)
        for width, parametrization in [(widths[0], "mup"), (widths[1], "mup"), (widths[1], "standard")]
    )
    assert {quantity: s for quantity, s in slopes([base, mup], widths).items() if abs(s) > FLAT} == {}
    assert slopes([base, standard], widths)["layers.0.attention.out"] > 2 * FLAT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rate", "fields"),
    [
        ("adamw", 0.01, {"tie_output": True}),
        ("adamw", 0.01, {"norm_placement": "post", "positions": "learned", "bias": True}),
        ("adamw", 0.01, {"mlp": "swiglu", "n_kv_heads": 1, "qk_norm": True}),
        ("adamw", 0.01, {"n_experts": 4}),
        ("sgd", 1.0, {"tie_output": True}),
        ("muon", 0.01, {"n_experts": 4, "mlp": "swiglu"}),
    ],
    ids=str,
)
def test_changes_are_flat_for_other_models_too(name, rate, fields):
    widths = WIDTHS[::3]
    mup = [changes(width, name, rate, parametrization="mup", **fields) for width in widths]
    assert {quantity: s for quantity, s in slopes(mup, widths).items() if abs(s) > FLAT} == {}


@pytest.mark.slow
def test_under_mup_a_router_does_not_learn_faster_in_a_wider_model():
    widths, router = WIDTHS[::3], "layers.0.mlp.router"
    base, mup, standard = (
        changes(width, "adamw", 0.01, keep=[router], n_experts=4, parametrization=parametrization)
        for width, parametrization in [(widths[0], "mup"), (widths[1], "mup"), (widths[1], "standard")]
    )
    # It may be slower: in a narrow model the noise of its gradient's signs adds to what it learns.
    assert -0.5 < slopes([base, mup], widths)[router] < FLAT
    assert slopes([base, standard], widths)[router] > 0.3
