"""Sparse features squeezed through fewer dimensions and out again: the toy model of superposition (Elhage et al. 2022).

A feature is 0, or with probability p (the density; sparsity is 1 - p) uniform in [0, 1], independently of the others.
The model has m dimensions for n features: x' = relu(W^T W x + b), or without the ReLU. The loss is
sum_i I_i (x_i - x'_i)^2 with importances I_i = decay^i, i = 0, 1, ...

A run holds several models that start elsewhere and see the same batches: the loss has poor local minima, and the best
of a few is closer to the optimum that one wants to know.

Letters: B batch, n features, m dimensions, R models of a run, W test points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import BadInput, RunConfig
from jaxgpt.run import Source
from jaxgpt.step import Loss

TEST_SEED = 2**32 - 1
Params = dict[str, Array]  # weight [R, m, n], bias [R, n]


@dataclass(frozen=True)
class Superposition:
    """The task. Numbers: `density`, `decay`. Its data are the test points before they are made sparse: uniform in
    [0, 1] twice, for whether a feature is there and for its value.
    """

    batch_size: int
    features: int
    dims: int
    models: int
    relu: bool

    def init(self, seed: int) -> Params:
        """Weights of variance 2 / (n + m) (Glorot & Bengio 2010); biases 0."""
        n, m = self.features, self.dims
        weight = np.random.default_rng([1, seed]).standard_normal((self.models, m, n)) * np.sqrt(2 / (n + m))
        return {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.zeros((self.models, n))}

    def sample(self, data: Any, key: Array, step: Array) -> tuple[Array, Array]:  # noqa: ARG002
        """Features [B, n] and, of each row, the importances [B, n]."""
        _, numbers = data
        drawn_2xBxn = jax.random.uniform(key, (2, self.batch_size, self.features))
        importance_n = numbers["decay"] ** jnp.arange(self.features)
        return _sparse(drawn_2xBxn, numbers["density"]), jnp.broadcast_to(importance_n, drawn_2xBxn.shape[1:])

    def loss(self, params: Params, batch: tuple[Array, Array], key: Array) -> Loss:  # noqa: ARG002
        """Summed over the batch and the models, none of which feels another. train_loss: the mean over models."""
        x_Bxn, importance_Bxn = batch
        error_RxBxn = (x_Bxn - self.outputs(params, x_Bxn)) ** 2
        total = (importance_Bxn * error_RxBxn).sum()
        return Loss(total, jnp.asarray(float(len(x_Bxn))), {"train_loss": total / self.models})

    def outputs(self, params: Params, x_Bxn: Array) -> Array:
        """x' of each model, [R, B, n]."""
        hidden_RxBxm = jnp.einsum("Bn,Rmn->RBm", x_Bxn, params["weight"])
        out_RxBxn = jnp.einsum("RBm,Rmn->RBn", hidden_RxBxm, params["weight"]) + params["bias"][:, None]
        return jax.nn.relu(out_RxBxn) if self.relu else out_RxBxn

    def evaluate(self, params: Params, data: Any) -> Array:
        """Losses at the test points, [R, W]."""
        drawn_2xWxn, numbers = data
        x_Wxn = _sparse(drawn_2xWxn, numbers["density"])
        importance_n = numbers["decay"] ** jnp.arange(self.features)
        return (importance_n * (x_Wxn - self.outputs(params, x_Wxn)) ** 2).sum(axis=-1)

    def summarise(self, held_out: Any) -> dict[str, float]:
        """The loss of the best model with its standard error, and which model that is."""
        loss_R = held_out.mean(axis=1)
        best = int(loss_R.argmin())
        sem = held_out[best].std(ddof=1) / np.sqrt(held_out.shape[1])
        return {
            "validation_loss": float(loss_R[best]),
            "validation_loss_sem": float(sem),
            "validation_best": float(best),
        }


def _sparse(drawn_2xBxn: Array, density: Array) -> Array:
    return jnp.where(drawn_2xBxn[0] < density, drawn_2xBxn[1], 0)


def source(
    config: RunConfig, features: int, dims: int, models: int, relu: bool, density: float, decay: float, points: int
) -> Source:
    """What a run trains on; `points` to test on. Raises BadInput for what is no such model."""
    if not 0 < density <= 1:
        raise BadInput(f"density={density} is not allowed; it must be above 0 and at most 1")
    if not 0 < dims < features:
        raise BadInput(f"dims={dims} is not allowed; it must be from 1 to {features - 1}, fewer than the features")
    task = Superposition(config.train.batch_size, features, dims, models, relu)

    def data() -> Array:
        drawn = np.random.default_rng(TEST_SEED).random((2, points, features), np.float32)
        return jnp.asarray(drawn)

    name = f"toy model of superposition, version 1, {(features, dims, models, relu, points)}"
    return Source(task, data, name, numbers={"density": density, "decay": decay})


# --- what is known exactly -----------------------------------------------------------------------------------------


def variance(density: float) -> float:
    """Of a feature: p/3 - p^2/4."""
    return density / 3 - density**2 / 4


def linear_loss(weight_mxn: np.ndarray, bias_n: np.ndarray, density: float, importance_n: np.ndarray) -> float:
    """The expected loss of a model without ReLU: sum_i I_i (v sum_j (1 - W^T W)_ij^2 + (mean error)_i^2)."""
    left_nxn = np.eye(len(bias_n)) - weight_mxn.T @ weight_mxn
    mean_n = density / 2 * left_nxn.sum(axis=1) - bias_n
    return float(importance_n @ (variance(density) * (left_nxn**2).sum(axis=1) + mean_n**2))


def linear_optimum(density: float, importance_n: np.ndarray, dims: int) -> float:
    """The least of it: the variance of all features but the `dims` most important, times their importance.

    v |I^(1/2) (1 - M)|^2 over M of rank m is least where I^(1/2) M keeps the m largest of I^(1/2)'s singular values
    (Eckart & Young 1936), and the projection on those features does so and is of the form W^T W.
    """
    return variance(density) * float(np.sort(importance_n)[::-1][dims:].sum())


def pair_loss(weight_2: np.ndarray, bias_2: np.ndarray, density: float, importance_2: np.ndarray) -> float:
    """The expected loss of the ReLU model of two features in one dimension, by Gauss-Legendre quadrature.

    Of W = (a, c): both features absent, one there, both there.
    """
    x_2xq, mass_q, there_q = _cases()
    chance_q = mass_q * density**there_q * (1 - density) ** (2 - there_q)
    out_2xq = np.maximum(np.outer(weight_2, weight_2 @ x_2xq) + np.asarray(bias_2)[:, None], 0)
    return float(importance_2 @ ((x_2xq - out_2xq) ** 2 @ chance_q))


@cache
def _cases() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points [2, q] at which two features are evaluated, their masses, and how many of the two are there."""
    node_q, mass_q = np.polynomial.legendre.leggauss(32)
    node_q, mass_q = (node_q + 1) / 2, mass_q / 2
    nothing_q = np.zeros_like(node_q)
    both_2xq = np.stack(np.meshgrid(node_q, node_q, indexing="ij")).reshape(2, -1)
    x_2xq = np.concatenate([np.zeros((2, 1)), [node_q, nothing_q], [nothing_q, node_q], both_2xq], axis=1)
    mass = [np.ones(1), mass_q, mass_q, np.outer(mass_q, mass_q).reshape(-1)]
    there = [np.full(len(m), count) for m, count in zip(mass, (0, 1, 1, 2), strict=True)]
    return x_2xq, np.concatenate(mass), np.concatenate(there)
