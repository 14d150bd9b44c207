import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.build import create, graphdef, init_params, param_name
from jaxgpt.config import ModelConfig
from jaxgpt.mixture import Mixture, blocks, router_names, statistics
from jaxgpt.model import MLP

TINY = ModelConfig(d_model=8, n_layers=2, n_heads=2, d_mlp=5, vocab_size=11, n_experts=4, experts_per_token=2)


def untapped(_, value):
    return value


def drawn(c, seed=0, kind=Mixture):
    """A mixture (or an MLP) with every parameter drawn, biases too, and its parameters by name, in float64."""
    split, state = nnx.split(kind(c))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) * p.shape[-1] ** -0.5, p.dtype), state)
    named = {param_name(path): np.asarray(leaf, float) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return nnx.merge(split, state), named


@jax.jit
def outputs(mixture, x_BxTxD):
    """In one program; one by one, its operations would each have to be compiled."""
    return mixture(x_BxTxD, untapped)


def stream(c, batch=3, length=7, seed=1):
    return np.random.default_rng(seed).standard_normal((batch, length, c.d_model)).astype(np.float32)


ACT = {
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "swiglu": lambda x: x / (1 + math.exp(-x)),
}


def slow_mixture(c, params, x_D):
    """One token in float64: Shazeer et al. 2017, eq. 1, with Mixtral's weights."""

    def linear(name, e, x):
        return x @ params[f"{name}.kernel"][e] + (params[f"{name}.bias"][e] if c.bias else 0)

    scores_E = x_D @ params["router.kernel"]
    p_E = np.exp(scores_E) / np.exp(scores_E).sum()
    chosen = sorted(range(c.n_experts), key=lambda e: -p_E[e])[: c.experts_per_token]
    total = sum(p_E[e] for e in chosen) if c.experts_per_token > 1 else 1.0
    y_D = np.zeros(c.d_model)
    for e in chosen:
        hidden = linear("gate" if c.mlp == "swiglu" else "up", e, x_D)
        hidden = np.array([ACT[c.mlp](float(h)) for h in hidden])
        hidden = hidden * linear("up", e, x_D) if c.mlp == "swiglu" else hidden
        y_D += p_E[e] / total * linear("down", e, hidden)
    return y_D


# --- what a token gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mlp", "bias", "n_experts", "k", "shape"),
    [
        ("gelu", False, 4, 2, (4, 16)),
        ("gelu_exact", True, 2, 1, (2, 5)),
        ("relu", True, 5, 4, (1, 1)),
        ("relu2", False, 6, 3, (2, 5)),
        ("swiglu", False, 3, 3, (4, 16)),
        ("swiglu", True, 6, 1, (4, 16)),
    ],
)
def test_every_token_gets_the_weighted_sum_of_its_experts(mlp, bias, n_experts, k, shape):
    c = dataclasses.replace(TINY, mlp=mlp, bias=bias, n_experts=n_experts, experts_per_token=k)
    mixture, params = drawn(c)
    x_BxTxD = stream(c, *shape)
    expected = [[slow_mixture(c, params, x_D.astype(float)) for x_D in x_TxD] for x_TxD in x_BxTxD]
    np.testing.assert_allclose(outputs(mixture, x_BxTxD), expected, rtol=2e-5, atol=2e-6)


def test_parameters_have_an_axis_of_experts():
    _, params = drawn(dataclasses.replace(TINY, mlp="swiglu", bias=True))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "router.kernel": (8, 4),
        "up.kernel": (4, 8, 5),
        "up.bias": (4, 5),
        "gate.kernel": (4, 8, 5),
        "gate.bias": (4, 5),
        "down.kernel": (4, 5, 8),
        "down.bias": (4, 8),
    }


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_equal_experts_are_one_mlp_whatever_the_router_says(mlp, k):
    c = dataclasses.replace(TINY, mlp=mlp, bias=True, experts_per_token=k)
    one, _ = drawn(dataclasses.replace(c, n_experts=None), kind=MLP)
    mixture, _ = drawn(c)
    for name in ("up", "down", *(["gate"] if mlp == "swiglu" else [])):
        for part in ("kernel", "bias"):
            leaf = getattr(getattr(one, name), part)[...]
            getattr(getattr(mixture, name), part)[...] = jnp.broadcast_to(leaf, (4, *leaf.shape))
    x_BxTxD = stream(c)
    np.testing.assert_allclose(outputs(mixture, x_BxTxD), outputs(one, x_BxTxD), rtol=1e-5, atol=1e-6)


def test_with_all_experts_the_weights_are_the_routers_probabilities():
    c = dataclasses.replace(TINY, experts_per_token=4)
    mixture, params = drawn(c)
    x_BxTxD = stream(c)
    hidden = jax.nn.gelu(np.einsum("BTD,EDF->BTEF", x_BxTxD, params["up.kernel"]))
    p_BxTxE = jax.nn.softmax(x_BxTxD @ params["router.kernel"])
    expected = np.einsum("BTE,BTEF,EFD->BTD", p_BxTxE, hidden, params["down.kernel"])
    np.testing.assert_allclose(outputs(mixture, x_BxTxD), expected, rtol=2e-5, atol=2e-6)


def test_the_order_of_the_experts_does_not_matter():
    c = dataclasses.replace(TINY, mlp="swiglu", bias=True)
    (mixture, _), (turned, _) = drawn(c), drawn(c)
    order = np.array([2, 0, 3, 1])
    turned.router.kernel[...] = turned.router.kernel[...][:, order]
    for experts in (turned.up, turned.gate, turned.down):
        experts.kernel[...], experts.bias[...] = experts.kernel[...][order], experts.bias[...][order]
    x_BxTxD = stream(c)
    np.testing.assert_allclose(outputs(mixture, x_BxTxD), outputs(turned, x_BxTxD), rtol=1e-5, atol=1e-6)


def test_a_token_gets_the_same_alone_as_among_others():
    mixture, _ = drawn(TINY)
    x_BxTxD = stream(TINY, 4, 16)
    alone = [[outputs(mixture, x_D[None, None])[0, 0] for x_D in x_TxD[:5]] for x_TxD in x_BxTxD[:2]]
    np.testing.assert_allclose(outputs(mixture, x_BxTxD)[:2, :5], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_a_token_is_never_dropped_even_if_all_want_the_same_expert(k):
    c = dataclasses.replace(TINY, experts_per_token=k)
    mixture, params = drawn(c)
    x_BxTxD = np.abs(stream(c, 4, 16))
    mixture.router.kernel[...] = params["router.kernel"] = np.array([[9.0, 3.0, 0.0, 0.0]] * 8)
    expected = [[slow_mixture(c, params, x_D.astype(float)) for x_D in x_TxD] for x_TxD in x_BxTxD]
    np.testing.assert_allclose(outputs(mixture, x_BxTxD), expected, rtol=2e-5, atol=2e-6)


@settings(max_examples=200, deadline=None)
@given(
    load_E=st.lists(st.integers(0, 40), min_size=2, max_size=9).filter(any),
    d_model=st.sampled_from([1, 8, 64]),
)
def test_blocks_are_enough_for_any_load_and_at_most_about_twice_what_is_needed(load_E, d_model):
    c = ModelConfig(d_model=d_model, n_heads=1, d_head=2, n_experts=len(load_E), experts_per_token=1)
    n = sum(load_E)
    count, size = blocks(c, n)
    assert sum(math.ceil(load / size) for load in load_E) <= count
    assert n <= count * size < 2 * n + len(load_E)


# --- taps ----------------------------------------------------------------------------------------------------------


def test_the_router_can_be_seen_and_replaced():
    mixture, _ = drawn(TINY)
    x_BxTxD, seen = stream(TINY), {}

    def keep(name, value):
        seen[name] = value
        return value

    y_BxTxD = mixture(x_BxTxD, keep)
    assert sorted(seen) == ["mlp.out", "mlp.router"]
    np.testing.assert_array_equal(seen["mlp.out"], y_BxTxD)
    np.testing.assert_allclose(seen["mlp.router"].sum(axis=-1), 1, rtol=1e-6)

    def only_expert_three(name, value):
        return jnp.zeros_like(value).at[..., 3].set(1) if name == "mlp.router" else value

    hidden = jax.nn.gelu(x_BxTxD @ mixture.up.kernel[3])
    np.testing.assert_allclose(
        mixture(x_BxTxD, only_expert_three), hidden @ mixture.down.kernel[3], rtol=1e-5, atol=1e-6
    )


# --- gradients and dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_are_those_of_finite_differences(k):
    """Along random directions in all parameters and inputs at once; a step so small that no token changes expert."""
    with jax.enable_x64(True):
        c = dataclasses.replace(TINY, mlp="swiglu", bias=True, experts_per_token=k, param_dtype="float64")
        mixture, _ = drawn(c)
        split, state = nnx.split(mixture)
        x_BxTxD = jnp.asarray(stream(c), jnp.float64)
        target_BxTxD = jnp.asarray(stream(c, seed=2), jnp.float64)

        @jax.jit
        def loss(state, x_BxTxD):
            return jnp.sum((nnx.merge(split, state)(x_BxTxD, untapped) - target_BxTxD) ** 2)

        gradient = jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x_BxTxD))
        rng = np.random.default_rng(3)
        for _ in range(5):
            direction = jax.tree.map(lambda p: rng.standard_normal(p.shape), (state, x_BxTxD))
            up, down = (
                loss(*jax.tree.map(lambda p, d, h=h: p + h * d, (state, x_BxTxD), direction)) for h in (1e-6, -1e-6)
            )
            along = sum(float((g * d).sum()) for g, d in zip(gradient, jax.tree.leaves(direction), strict=True))
            assert (up - down) / 2e-6 == pytest.approx(along, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_the_loss_teaches_the_router_also_with_one_expert_per_token(k):
    c = dataclasses.replace(TINY, experts_per_token=k)
    split, state = nnx.split(drawn(c)[0])
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(nnx.merge(split, s)(stream(c), untapped) ** 2)))(state)
    assert float(jnp.abs(gradient["router"]["kernel"][...]).max()) > 1e-3


def test_bfloat16_is_close_to_float32_and_routes_in_float32():
    c = dataclasses.replace(TINY, experts_per_token=4)  # all experts: rounding cannot change the choice
    mixture, _ = drawn(c)
    half, _ = drawn(dataclasses.replace(c, compute_dtype="bfloat16"))
    seen = {}
    x_BxTxD = stream(c).astype(jnp.bfloat16)
    y_BxTxD = half(x_BxTxD, lambda name, value: seen.setdefault(name, value))
    assert y_BxTxD.dtype == jnp.bfloat16
    assert seen["mlp.router"].dtype == jnp.float32
    exact_BxTxD = outputs(mixture, x_BxTxD.astype(np.float32))
    assert float(jnp.abs(y_BxTxD - exact_BxTxD).max()) < 0.03 * float(jnp.abs(exact_BxTxD).max())


# --- in the transformer --------------------------------------------------------------------------------------------


def tokens(c, batch=2, length=9):
    return np.random.default_rng(0).integers(0, c.vocab_size, (batch, length))


@pytest.mark.parametrize("fields", [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True}])
def test_scanned_and_recomputed_layers_have_the_same_outputs_and_gradients(fields):
    other = dataclasses.replace(TINY, **fields)

    def outputs_and_gradient(c):
        def loss(params):
            logits, seen = nnx.merge(graphdef(c), params).inspect(tokens(c), keep=router_names(c))
            return jnp.sum(logits**2) + statistics(c, seen)["load_balance"], logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(init_params(c, 0))

    (loss, logits), gradient = outputs_and_gradient(TINY)
    (other_loss, other_logits), other_gradient = outputs_and_gradient(other)
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(other_logits, logits, atol=1e-5)
    up = other_gradient["layers"]["mlp"]["up"]["kernel"][...] if other.scan_layers else None
    for i in range(TINY.n_layers):
        mine = gradient["layers"][i]["mlp"]["up"]["kernel"][...]
        theirs = other_gradient["layers"][i]["mlp"]["up"]["kernel"][...] if up is None else up[i]
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=1e-6)


def test_no_token_reads_the_future():
    model, logits = create(TINY), jax.jit(lambda model, ids: model(ids))
    changed = tokens(TINY)
    changed[:, 5:] = (changed[:, 5:] + 1) % TINY.vocab_size
    before, after = (np.asarray(logits(model, ids)) for ids in (tokens(TINY), changed))
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-6)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-3


def test_decoding_token_by_token_is_the_full_pass():
    model, ids = create(TINY), tokens(TINY)
    cache, steps = model.empty_cache(2, 9), []
    decode = jax.jit(lambda model, ids, cache: model.decode(ids, cache))
    for t in range(9):
        logits, cache = decode(model, ids[:, t : t + 1], cache)
        steps.append(logits)
    whole = jax.jit(lambda model, ids: model(ids))(model, ids)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, atol=1e-5)


def test_many_models_at_once_are_each_alone():
    params = [init_params(TINY, seed) for seed in (0, 1, 2)]

    def logits(params):
        return nnx.merge(graphdef(TINY), params)(tokens(TINY))

    alone = [jax.jit(logits)(p) for p in params]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    together = jax.jit(jax.vmap(logits))(stacked)
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.slow
def test_training_starts_near_ln_vocabulary():
    c = ModelConfig(d_model=32, n_heads=2, vocab_size=50, n_experts=8)
    logits_BxTxV = create(c)(tokens(c, 4, 32))
    loss = -jax.nn.log_softmax(logits_BxTxV)[np.arange(4)[:, None], np.arange(32), tokens(c, 4, 32)].mean()
    assert float(loss) == pytest.approx(math.log(50), abs=0.1)


# --- how evenly the tokens spread ----------------------------------------------------------------------------------


def routed(c, p_NxE, layers=None):
    """What `statistics` reads, the same in every layer or one table per layer."""
    tables = [p_NxE] * c.n_layers if layers is None else layers
    return {name: jnp.asarray(p, jnp.float32)[None] for name, p in zip(router_names(c), tables, strict=True)}


def test_names_are_intermediates_of_the_model():
    _, seen = create(TINY).inspect(tokens(TINY), keep=router_names(TINY))
    assert [seen[name].shape for name in router_names(TINY)] == [(2, 9, 4)] * 2
    for fields in ({"n_experts": None}, {"n_layers": 0}, {"architecture": "lstm"}):
        assert router_names(dataclasses.replace(TINY, **fields)) == []


def test_statistics_of_perfect_balance():
    c = dataclasses.replace(TINY, experts_per_token=1)
    p_NxE = 0.05 + 0.8 * np.eye(4)
    found = statistics(c, routed(c, p_NxE))
    entropy = -(0.85 * math.log(0.85) + 3 * 0.05 * math.log(0.05))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"load_balance": 1, "router_entropy": entropy, "expert_load_max": 1, "experts_idle": 0}, rel=1e-6
    )


def test_statistics_of_collapse():
    c = dataclasses.replace(TINY, experts_per_token=1)
    p_NxE = np.tile([0.0, 1.0, 0.0, 0.0], (5, 1))
    found = statistics(c, routed(c, p_NxE))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"load_balance": 4, "router_entropy": 0, "expert_load_max": 4, "experts_idle": 0.75}, rel=1e-6
    )


def test_an_undecided_router_has_the_entropy_of_all_experts_and_a_balance_loss_of_one():
    found = statistics(TINY, routed(TINY, np.full((6, 4), 0.25)))
    assert float(found["router_entropy"]) == pytest.approx(math.log(4), rel=1e-6)
    assert float(found["load_balance"]) == pytest.approx(1, rel=1e-6)
    assert float(found["experts_idle"]) == 0.5  # equal probabilities: the first two get every token


def test_statistics_are_means_over_layers_of_counts_by_hand():
    rng = np.random.default_rng(0)
    layers = [rng.dirichlet(np.ones(4), 7) for _ in range(2)]
    found = statistics(TINY, routed(TINY, None, layers))
    by_hand = {"load_balance": 0.0, "router_entropy": 0.0, "expert_load_max": 0.0, "experts_idle": 0.0}
    for p_NxE in layers:
        counts = np.zeros(4)
        for p_E in p_NxE:
            counts[np.argsort(p_E)[-2:]] += 1
        f_E = counts / 14
        by_hand["load_balance"] += 4 * f_E @ p_NxE.mean(axis=0) / 2
        by_hand["router_entropy"] += -(p_NxE * np.log(p_NxE)).sum(axis=1).mean() / 2
        by_hand["expert_load_max"] += 4 * f_E.max() / 2
        by_hand["experts_idle"] += (counts == 0).mean() / 2
    assert {name: float(value) for name, value in found.items()} == pytest.approx(by_hand, rel=1e-5)


def test_the_balance_loss_has_the_gradient_of_the_mean_probabilities_alone():
    rng = np.random.default_rng(0)
    p_NxE = rng.dirichlet(np.ones(4), 7)
    c = dataclasses.replace(TINY, n_layers=1)
    gradient = jax.grad(lambda p: statistics(c, routed(c, p))["load_balance"])(jnp.asarray(p_NxE, jnp.float32))
    counts = np.bincount(np.argsort(p_NxE, axis=1)[:, -2:].ravel(), minlength=4)
    np.testing.assert_allclose(gradient, np.tile(4 * counts / 14 / 7, (7, 1)), rtol=1e-5)


def test_following_the_balance_loss_balances_a_router():
    c = dataclasses.replace(TINY, n_layers=1)
    mixture, _ = drawn(c)
    split, state = nnx.split(mixture)
    x_BxTxD = stream(c, 8, 16) + 1  # a common direction that all tokens share, so that some expert is liked by most

    def balance(state):
        seen = {}
        nnx.merge(split, state)(x_BxTxD, lambda name, value: seen.setdefault(f"layers.0.{name}", value))
        found = statistics(c, seen)
        return found["load_balance"], found

    step = jax.jit(jax.value_and_grad(balance, has_aux=True))
    first = step(state)[0][1]
    for _ in range(200):
        state = jax.tree.map(lambda p, g: p - 0.1 * g, state, step(state)[1])
    last = step(state)[0][1]
    assert float(first["expert_load_max"]) > 1.4
    assert float(last["expert_load_max"]) < 1.2
    assert float(last["load_balance"]) == pytest.approx(1, abs=0.05)


def test_compiles_to_work_that_grows_with_the_experts_used_and_not_with_those_there_are():
    def counted(n_experts, k):
        c = ModelConfig(d_model=32, d_mlp=128, n_heads=1, n_experts=n_experts, experts_per_token=k)
        split, state = nnx.split(nnx.eval_shape(partial(Mixture, c)))
        forward = jax.jit(lambda s, x: nnx.merge(split, s)(x, untapped))
        lowered = forward.lower(state, jax.ShapeDtypeStruct((8, 256, 32), jnp.float32))
        return lowered.compile().cost_analysis()["flops"]

    assert counted(16, 2) < 1.15 * counted(4, 2)
    assert counted(4, 4) > 1.7 * counted(4, 2)
