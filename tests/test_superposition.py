"""The toy model of superposition: sparse features, importances, and its exact losses against samples and searches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxgpt import RunConfig
from jaxgpt.config import BadInput, override
from jaxgpt.tasks import superposition

BATCH, N, M, R = 4096, 6, 2, 3
IMPORTANCE = 0.7 ** np.arange(N)


def source(density=0.3, decay=0.7, relu=True, features=N, dims=M):
    config = override(RunConfig(), {"train.batch_size": BATCH})
    return superposition.source(config, features, dims, R, relu, density, decay, points=5000)


def given(its):
    return its.data(), {name: np.float32(value) for name, value in its.numbers.items()}


def test_features_are_there_with_their_density_and_then_uniform():
    its = source(0.3)
    x, importance = (np.asarray(a) for a in its.task.sample(given(its), jax.random.key(0), jnp.int32(0)))
    assert x.shape == (BATCH, N)
    assert (x > 0).mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / x.size))
    there = np.sort(x[x > 0])
    assert np.abs(there - np.linspace(0, 1, len(there))).max() < 2 / np.sqrt(len(there))  # Kolmogorov and Smirnov
    assert x.var() == pytest.approx(superposition.variance(0.3), rel=0.05)
    np.testing.assert_allclose(importance, np.broadcast_to(IMPORTANCE, (BATCH, N)), rtol=1e-6)


@pytest.mark.parametrize("relu", [True, False])
def test_outputs_and_loss_are_those_of_each_model_by_hand(relu):
    its = source(relu=relu)
    params = {name: np.asarray(leaf) for name, leaf in its.task.init(1).items()}
    params["bias"] = np.random.default_rng(0).standard_normal((R, N)).astype(np.float32)
    batch = its.task.sample(given(its), jax.random.key(0), jnp.int32(0))
    x, total = np.asarray(batch[0], float), 0.0
    for weight, bias in zip(params["weight"].astype(float), params["bias"].astype(float), strict=True):
        out = x @ weight.T @ weight + bias
        total += (IMPORTANCE * (x - (np.maximum(out, 0) if relu else out)) ** 2).sum()
    loss = its.task.loss(params, batch, jax.random.key(1))
    assert float(loss.total) == pytest.approx(total, rel=1e-4)
    assert float(loss.weight) == BATCH


def test_models_of_a_run_do_not_feel_each_other():
    its = source()
    params, batch = its.task.init(0), its.task.sample(given(its), jax.random.key(0), jnp.int32(0))
    gradient = jax.jit(jax.grad(lambda params: its.task.loss(params, batch, jax.random.key(0)).total))
    changed = {"weight": params["weight"].at[1].multiply(3.0), "bias": params["bias"].at[1].add(1.0)}
    before, after = gradient(params), gradient(changed)
    for name in params:
        np.testing.assert_allclose(before[name][0], after[name][0], rtol=1e-5, atol=1e-3)
        assert np.abs(before[name][1] - after[name][1]).max() > 1


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_the_linear_loss_is_that_of_many_samples(density):
    its = source(density, relu=False)
    rng = np.random.default_rng(0)
    params = {"weight": rng.standard_normal((R, M, N)) / 2, "bias": rng.standard_normal((R, N)) / 4}
    seen = np.asarray(its.task.evaluate(params, given(its)))
    for r in range(R):
        exact = superposition.linear_loss(params["weight"][r], params["bias"][r], density, IMPORTANCE)
        assert seen[r].mean() == pytest.approx(exact, abs=4 * seen[r].std() / np.sqrt(5000))


def test_no_search_finds_a_linear_model_below_the_optimum_and_one_reaches_it():
    rng = np.random.default_rng(1)

    def loss(v):
        return superposition.linear_loss(v[: M * N].reshape(M, N), v[M * N :], 0.4, IMPORTANCE)

    found = [minimize(loss, rng.standard_normal(M * N + N) / 2).fun for _ in range(3)]
    assert min(found) == pytest.approx(superposition.linear_optimum(0.4, IMPORTANCE, M), rel=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_the_loss_of_a_pair_is_that_of_many_samples(density):
    its = source(density, decay=0.5, features=2, dims=1)
    rng = np.random.default_rng(2)
    params = {"weight": np.array([[[1.0, -0.9]], [[0.8, 0.4]], [[1.0, 0.0]]]), "bias": rng.standard_normal((R, 2)) / 4}
    seen = np.asarray(its.task.evaluate(params, given(its)))
    for r in range(R):
        exact = superposition.pair_loss(params["weight"][r, 0], params["bias"][r], density, np.array([1, 0.5]))
        assert seen[r].mean() == pytest.approx(exact, abs=4 * seen[r].std() / np.sqrt(5000))


def test_one_feature_alone_costs_the_variance_of_the_other():
    exact = superposition.pair_loss(np.array([1.0, 0.0]), np.array([0.0, 0.2]), 0.4, np.array([1.0, 0.5]))
    assert exact == pytest.approx(0.5 * superposition.variance(0.4))


def test_the_best_model_speaks_for_the_run():
    held_out = np.array([[3.0, 5.0], [1.0, 2.0], [9.0, 9.0]])
    said = source().task.summarise(held_out)
    assert (said["validation_loss"], said["validation_best"]) == (1.5, 1)
    assert said["validation_loss_sem"] == pytest.approx(0.5)


def test_runs_that_differ_in_numbers_share_a_program():
    one, other = source(0.1, 0.7), source(1.0, 1.0)
    assert (one.task, one.identity) == (other.task, other.identity)
    assert one.numbers != other.numbers


@pytest.mark.parametrize(("arguments", "named"), [({"density": 0.0}, "density=0"), ({"density": 1.1}, "density=1.1"),
                                                  ({"dims": N}, "dims=6")])  # fmt: skip
def test_what_does_not_fit_is_refused(arguments, named):
    with pytest.raises(BadInput, match=named):
        source(**arguments)
