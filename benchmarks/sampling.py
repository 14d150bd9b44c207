"""Tokens per second of sampling with the cache, and by a full pass per token: python benchmarks/sampling.py

The two take turns, A B A B, in one process, and make the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
    """Measures and prints."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, default in (("width", 128), ("layers", 4), ("context", 256), ("tokens", 100), ("rounds", 5)):
        asked.add_argument(f"--{name}", type=int, default=default)
    args = asked.parse_args()
    model = create(ModelConfig(d_model=args.width, n_layers=args.layers, context=args.context))
    prompt = list(b"def mean(")
    ways = {
        "with the cache": lambda: generate(model, prompt, max_tokens=args.tokens),
        "without": lambda: without_cache(model, prompt, args.context, args.tokens),
    }
    made = {name: list(way()) for name, way in ways.items()}  # and compiles
    assert made["with the cache"] == made["without"]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            count = len(list(way()))
            rates[name].append(count / (time.perf_counter() - began))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{jax.devices()[0].device_kind}, {vars(args)}")
    for name, value in middle.items():
        print(f"{name:>15} {value:9.0f} tokens/s {value / middle['without']:7.1f} x without")


if __name__ == "__main__":
    main()
