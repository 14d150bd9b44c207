"""Sparse subnetworks of a small network that predicts the next byte of text from the bytes before it.

A run is given where its weights start and which of them there are: the network computes with (start + change) x mask,
and the change, zero at first, is what is trained. So a weight that is masked is 0 throughout, whatever the optimizer,
and any subnetwork from any start is a run of one program. Weight decay would pull towards the start: leave it 0.

The network is that of Bengio et al. 2003: the vectors of the bytes side by side, two hidden ReLU layers, logits. Masks
are for the two hidden matrices; vectors, read-out and biases stay whole, as random masks would cut most at rare bytes.

Letters: B batch, T bytes that are read, V bytes there are, E width of a byte's vector, H and G widths of the hidden
layers, W validation windows, R runs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxgpt.config import BadInput, RunConfig
from jaxgpt.run import Source
from jaxgpt.step import Loss
from jaxgpt.tasks import text

BYTES = 256
PRUNED = ("first", "second")  # the matrices that have masks
Weights = Mapping[str, Any]  # arrays by name; masks are of the matrices in PRUNED


@dataclass(frozen=True)
class Network:
    """Widths: bytes that are read, of a byte's vector, of the two hidden layers."""

    reads: int
    embed: int
    first: int
    second: int

    def init(self, seed: int) -> dict[str, np.ndarray]:
        """Weights of variance 2 / fan-in where a ReLU follows (He et al. 2015), vectors of variance 1, biases 0."""
        rng = np.random.default_rng([5, seed])

        def normal(*shape: int, variance: float) -> np.ndarray:
            return (math.sqrt(variance) * rng.standard_normal(shape)).astype(np.float32)

        wide = self.reads * self.embed
        return {
            "embed": normal(BYTES, self.embed, variance=1),
            "first": normal(wide, self.first, variance=2 / wide),
            "first_bias": np.zeros(self.first, np.float32),
            "second": normal(self.first, self.second, variance=2 / self.first),
            "second_bias": np.zeros(self.second, np.float32),
            "out": normal(self.second, BYTES, variance=0.02**2),
            "out_bias": np.zeros(BYTES, np.float32),
        }

    def whole(self) -> dict[str, np.ndarray]:
        """Masks that leave everything."""
        shapes = {"first": (self.reads * self.embed, self.first), "second": (self.first, self.second)}
        return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def masked(weights: Weights, mask: Weights) -> dict[str, Any]:
    """The weights that there are."""
    return {name: array * mask[name] if name in PRUNED else array for name, array in weights.items()}


def logits(weights: Weights, read_BxT: Array) -> Array:
    """Of the next byte, [B, V]."""
    x_BxH = weights["embed"][read_BxT].reshape(len(read_BxT), -1)
    x_BxH = jax.nn.relu(x_BxH @ weights["first"] + weights["first_bias"])
    x_BxG = jax.nn.relu(x_BxH @ weights["second"] + weights["second_bias"])
    return x_BxG @ weights["out"] + weights["out_bias"]


def losses(weights: Weights, window_BxT1: Array) -> Array:
    """Cross-entropy [B] of the last byte of each window, from the others; nats."""
    window_BxT1 = window_BxT1.astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits(weights, window_BxT1[:, :-1]), window_BxT1[:, -1])


def pruned(weights: Weights, mask: Weights, share: float) -> dict[str, np.ndarray]:
    """A mask that keeps this share of the weights that are left in each matrix, the largest (Han et al. 2015)."""
    found = {}
    for name in PRUNED:
        size = np.where(mask[name] > 0, np.abs(weights[name]), -1.0).reshape(-1)
        keep = np.zeros(len(size), np.float32)
        keep[np.argsort(-size, kind="stable")[: round(share * int(mask[name].sum()))]] = 1
        found[name] = keep.reshape(mask[name].shape)
    return found


def shuffled(mask: Weights, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """As many weights in each matrix, anywhere."""
    return {name: rng.permutation(array.reshape(-1)).reshape(array.shape) for name, array in mask.items()}


@dataclass(frozen=True)
class Ticket:
    """Where a run's weights start, and which of them there are."""

    start: Weights
    mask: Weights


@dataclass(frozen=True)
class Tickets:
    """The task. Its data are text and the tickets of all runs of a sweep, stacked; the number `ticket` picks one."""

    network: Network
    batch_size: int

    def init(self, seed: int) -> dict[str, Array]:
        """No change yet, whatever the seed."""
        return jax.tree.map(jnp.zeros_like, self.network.init(seed))

    def sample(self, data: Any, key: Array, step: Array) -> Any:  # noqa: ARG002
        """Windows [B, T + 1] from anywhere in the training text; beside them the run's ticket, which has no axis of a
        batch, so that batches are not cut into parts.
        """
        (train_n, _, tickets_R), numbers = data
        length = self.network.reads + 1
        start_B = jax.random.randint(key, (self.batch_size,), 0, train_n.shape[0] - length + 1)
        return train_n[start_B[:, None] + jnp.arange(length)], _picked(tickets_R, numbers)

    def loss(self, params: Weights, batch: Any, key: Array) -> Loss:  # noqa: ARG002
        """Cross-entropy in nats."""
        window_BxT1, ticket = batch
        loss_B = losses(_moved(params, ticket), window_BxT1)
        return Loss(loss_B.sum(), jnp.asarray(float(len(loss_B))))

    def evaluate(self, params: Weights, data: Any) -> Array:
        """Losses [W] of the validation windows."""
        (_, validation_WxT1, tickets_R), numbers = data
        return losses(_moved(params, _picked(tickets_R, numbers)), validation_WxT1)

    def summarise(self, held_out: Any) -> dict[str, float]:
        """Mean loss in nats per byte, with its standard error over windows."""
        sem = held_out.std(ddof=1) / np.sqrt(len(held_out))
        return {"validation_loss": float(held_out.mean()), "validation_loss_sem": float(sem)}


def trained(change: Weights, ticket: Ticket) -> dict[str, np.ndarray]:
    """The weights of a run, of which `change` was trained."""
    return _moved(change, (ticket.start, ticket.mask))


def source(network: Network, tickets: Sequence[Ticket]) -> Callable[[RunConfig], Source]:
    """Tells what a run trains on: text, in windows of model.context + 1 bytes, from the ticket of number train.seed.

    Raises BadInput for a number that no ticket has, another context than the network reads, parts of batches, and
    weight decay.
    """
    stacks = [
        {name: np.stack([np.asarray(part[name], np.float32) for part in parts]) for name in parts[0]}
        for parts in ([t.start for t in tickets], [t.mask for t in tickets])
    ]
    sha256 = hashlib.sha256()
    for stack in stacks:
        for name in sorted(stack):
            sha256.update(stack[name].tobytes())
    read = text.reader()

    def of(config: RunConfig) -> Source:
        c, t = config.model, config.train
        if t.seed >= len(tickets):
            raise BadInput(f"train.seed={t.seed} names no ticket; it must be from 0 to {len(tickets) - 1}")
        if c.context != network.reads:
            raise BadInput(f"model.context={c.context} is not the {network.reads} bytes that the network reads")
        if t.microbatches != 1 or config.optimizer.weight_decay:
            raise BadInput(f"train.microbatches={t.microbatches} and optimizer.weight_decay="
                           f"{config.optimizer.weight_decay} must be 1 and 0 for tickets")  # fmt: skip
        its = read(config)

        def data() -> Any:
            given = its.data()
            return given.train_n, given.validation_WxT1, tuple(jax.tree.map(jnp.asarray, stack) for stack in stacks)

        name = f"{its.identity}, lottery tickets, version 1, {network}, {sha256.hexdigest()}"
        return Source(Tickets(network, t.batch_size), data, name, numbers={"ticket": t.seed})

    return of


def _picked(tickets_R: Any, numbers: Any) -> Any:
    return jax.tree.map(lambda leaf_R: leaf_R[numbers["ticket"].astype(jnp.int32)], tickets_R)


def _moved(change: Weights, ticket: tuple[Weights, Weights]) -> dict[str, Any]:
    start, mask = ticket
    return masked({name: start[name] + change[name] for name in start}, mask)
