"""A mixture of experts, forward and backward, beside other ways to compute the same: python -m benchmarks.mixture

The ways take turns, A B C D A B C D ..., in one process. All give the same outputs, which is checked first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from benchmarks import harness
from jaxgpt.config import ModelConfig
from jaxgpt.mixture import Mixture


def routed(m: Mixture, x_NxD: Array) -> tuple[Array, Array]:
    """Weights [N, k] of the chosen experts, and which they are."""
    weight_Nxk, expert_Nxk = jax.lax.top_k(jax.nn.softmax(m.router(x_NxD)), m.config.experts_per_token)
    return weight_Nxk / weight_Nxk.sum(-1, keepdims=True), expert_Nxk


def ours(m: Mixture, x_NxD: Array) -> Array:
    """jaxgpt.mixture: assignments sorted into blocks of one expert each."""
    return m(x_NxD[None], lambda _, value: value)[0]


def dense(m: Mixture, x_NxD: Array) -> Array:
    """Every expert sees every token, in one product; weights choose afterwards."""
    weight_NxE = gate(m, x_NxD)
    h_ExNxF = jax.nn.gelu(jnp.einsum("ND,EDF->ENF", x_NxD, m.up.kernel[...]))
    return jnp.einsum("NE,ENF,EFD->ND", weight_NxE, h_ExNxF, m.down.kernel[...])


def loop(m: Mixture, x_NxD: Array) -> Array:
    """Every expert sees every token, one expert after the other."""
    weight_NxE = gate(m, x_NxD)

    def add(y_NxD: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        up_DxF, down_FxD, weight_N = expert
        return y_NxD + weight_N[:, None] * (jax.nn.gelu(x_NxD @ up_DxF) @ down_FxD), None

    return jax.lax.scan(add, jnp.zeros_like(x_NxD), (m.up.kernel[...], m.down.kernel[...], weight_NxE.T))[0]


def ragged(m: Mixture, x_NxD: Array) -> Array:
    """Assignments sorted by expert, and jax.lax.ragged_dot."""
    weight_Nxk, expert_Nxk = routed(m, x_NxD)
    expert_A = expert_Nxk.ravel()
    order_A = jnp.argsort(expert_A)
    load_E = jnp.bincount(expert_A, length=m.config.n_experts or 0)
    x_AxD = x_NxD[order_A // m.config.experts_per_token]
    h_AxF = jax.nn.gelu(jax.lax.ragged_dot(x_AxD, m.up.kernel[...], load_E))
    y_AxD = jax.lax.ragged_dot(h_AxF, m.down.kernel[...], load_E) * weight_Nxk.ravel()[order_A, None]
    return jnp.zeros_like(x_NxD).at[order_A // m.config.experts_per_token].add(y_AxD)


def gate(m: Mixture, x_NxD: Array) -> Array:
    """Weights of all experts, [N, E]; 0 for those that are not chosen."""
    weight_Nxk, expert_Nxk = routed(m, x_NxD)
    rows_Nx1 = jnp.arange(len(x_NxD))[:, None]
    return jnp.zeros((len(x_NxD), m.config.n_experts or 0)).at[rows_Nx1, expert_Nxk].set(weight_Nxk)


WAYS: dict[str, Callable[[Mixture, Array], Array]] = {"ours": ours, "loop": loop, "ragged_dot": ragged, "dense": dense}


def main() -> None:
    """Measures and writes mixture.json."""
    args = harness.arguments(__doc__, width=64, hidden=256, experts=8, per_token=2, tokens=1024, turns=30)
    c = ModelConfig(d_model=args.width, n_heads=1, d_mlp=args.hidden, n_experts=args.experts,
                    experts_per_token=args.per_token, compute_dtype="float32")  # fmt: skip
    keys = iter(jax.random.split(jax.random.key(0), 8))
    graphdef, zeros = nnx.split(Mixture(c))
    params = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape) * p.shape[-2] ** -0.5, zeros)
    x_NxD = jax.random.normal(next(keys), (args.tokens, args.width))

    def step(way: Callable[[Mixture, Array], Array]) -> Callable[..., Any]:
        def loss(params: Any, x_NxD: Array) -> Array:
            return jnp.square(way(nnx.merge(graphdef, params), x_NxD)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    steps = {name: step(way) for name, way in WAYS.items()}
    losses = {name: float(run(params, x_NxD)[0]) for name, run in steps.items()}
    assert all(abs(loss / losses["ours"] - 1) < 1e-4 for loss in losses.values()), losses
    sides = {
        name: lambda run=run: harness.timed(lambda: jax.block_until_ready(run(params, x_NxD)))
        for name, run in steps.items()
    }
    found = harness.alternate(sides, args.turns)
    wall = {name: [one["wall"] for one in turns] for name, turns in found.items()}
    shape = f"{args.experts} experts of {args.hidden}, {args.per_token} per token, {args.tokens} x {args.width}"
    mine = harness.median(1e3 * seconds for seconds in wall["ours"])
    lines = [harness.Row(f"a mixture forward and backward: {shape}", mine, "ms", "less")]
    lines += [
        harness.Row(f"{name} over ours", harness.ratio(wall[name], wall["ours"]), "times the time", "more")
        for name in wall
        if name != "ours"
    ]
    device = jax.devices()[0]
    where = None if device.platform == "cpu" else device.device_kind
    harness.write("mixture", "A mixture of experts", lines, {"seconds": found}, device=where, results=args.out)


if __name__ == "__main__":
    main()
