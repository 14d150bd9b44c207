"""Tokens per second of sampling with the cache, and by a full pass per token: python -m benchmarks.sampling

The two take turns, A B A B, in one process, and make the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import harness
from jaxgpt import ModelConfig, create, generate
from jaxgpt.sample import draw


def without_cache(model: nnx.Module, prompt: list[int], length: int, tokens: int) -> Iterator[int]:
    """What `generate` makes, from a full pass over `length` padded positions for each token."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def follow(params: nnx.State, ids_1xT: jax.Array, position: jax.Array) -> jax.Array:
        logits_1xTxV = nnx.merge(graphdef, params)(ids_1xT)
        return draw(jnp.take(logits_1xTxV[0], position - 1, axis=0), 0, position)

    ids_1xT = np.zeros((1, length), np.int32)
    ids_1xT[0, : len(prompt)] = prompt
    for position in range(len(prompt), len(prompt) + tokens):
        ids_1xT[0, position] = follow(params, ids_1xT, np.int32(position))
        yield int(ids_1xT[0, position])


def main() -> None:
    """Measures and writes sampling.json."""
    args = harness.arguments(__doc__, width=128, layers=4, context=256, tokens=100, turns=5)
    model = create(ModelConfig(d_model=args.width, n_layers=args.layers, context=args.context))
    prompt = list(b"def mean(")
    ways = {
        "with the cache": lambda: generate(model, prompt, max_tokens=args.tokens),
        "without": lambda: without_cache(model, prompt, args.context, args.tokens),
    }
    made = {name: list(way()) for name, way in ways.items()}  # and compiles
    assert made["with the cache"] == made["without"]
    found = harness.alternate(
        {name: lambda way=way: harness.timed(lambda: list(way())) for name, way in ways.items()}, args.turns
    )
    rates = {name: [args.tokens / one["wall"] for one in turns] for name, turns in found.items()}
    shape = f"width {args.width}, {args.layers} layers, context {args.context}"
    lines = [
        harness.Row(f"sampling with the cache: {shape}", harness.median(rates["with the cache"]), "tokens/s", "more"),
        harness.Row("with the cache over without", harness.ratio(rates["with the cache"], rates["without"]),
                    "times the tokens/s", "more"),
    ]  # fmt: skip
    device = jax.devices()[0]
    where = None if device.platform == "cpu" else device.device_kind
    harness.write("sampling", "Sampling", lines, {"seconds": found}, device=where, results=args.out)


if __name__ == "__main__":
    main()
