"""How large a model is and what its training costs: parameters and FLOPs, by stated conventions. Bytes: memory.py.

Closed forms from the config alone: they import no JAX, so that a sweep can be planned before anything starts.
Tests hold them to the real model's leaves, to the matrix products of its traced gradient, and to XLA's own count.

Letters as in model.py: T positions, D d_model, H heads, G heads of keys and values, K head width, F MLP width,
E experts of which a token goes through k, L layers, V output width.
One multiply and one add are 2 FLOPs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jaxgpt.config import BadInput, ModelConfig

Pairs = Literal["full", "causal"]  # which query-key pairs are counted


# --- parameters ----------------------------------------------------------------------------------------------------


def parameter_groups(c: ModelConfig) -> dict[str, int]:
    """Parameters by what they do, in units. The groups are disjoint and together are all leaves of the model.

    `mlp` counts all experts and the router. `recurrent` is the cells of an LSTM or RNN. `output` is the vocabulary
    matrix or the read-out, with its bias; 0 when tied, as that matrix is then the token embedding. `norm` counts scales
    and biases, those of queries and keys and the final norm's too.
    """
    d = c.d_model
    per_norm = {"layernorm": d + c.bias * d, "rmsnorm": d, "none": 0}[c.norm]
    recurrent = c.architecture != "transformer"
    groups = {
        "token_embedding": c.vocab_size * d if c.d_input is None else 0,
        "position_embedding": c.context * d if c.positions == "learned" and not recurrent else 0,
        "read_in": _linear(c, c.d_input, d) if c.d_input is not None else 0,
        "attention": 0,
        "mlp": 0,
        "recurrent": 0,
        "output": 0 if c.tie_output else d * c.output_width + c.has_output_bias * c.output_width,
    }
    if recurrent:
        gates = 4 if c.architecture == "lstm" else 1
        groups["recurrent"] = c.n_layers * (2 * d * gates * d + gates * d)  # a bias whatever c.bias says
        return groups | {"norm": (c.n_layers + 1) * per_norm}
    hk, gk = c.n_heads * c.head_width, c.kv_heads * c.head_width
    groups["attention"] = c.n_layers * (_linear(c, d, hk) + 2 * _linear(c, d, gk) + _linear(c, hk, d))
    router = 0 if c.n_experts is None else d * c.n_experts
    groups["mlp"] = c.n_layers * ((c.n_experts or 1) * _one_mlp(c) + router)
    n_norms = c.n_layers * (2 if c.mlp_width else 1) + (c.norm_placement != "post")
    return groups | {"norm": n_norms * per_norm + c.n_layers * c.qk_norm * 2 * c.head_width}


def _linear(c: ModelConfig, d_in: int, d_out: int) -> int:
    return d_in * d_out + c.bias * d_out


def _one_mlp(c: ModelConfig) -> int:
    """Parameters of an MLP, or of one expert."""
    if not c.mlp_width:
        return 0
    return (2 if c.mlp == "swiglu" else 1) * _linear(c, c.d_model, c.mlp_width) + _linear(c, c.mlp_width, c.d_model)


@dataclass(frozen=True)
class Parameters:
    """N by the two conventions of the scaling-law literature; total = non_embedding + embedding.

    `total` is Chinchilla's: every parameter (Hoffmann et al. 2022, appendix F, counts the embedding matrices).
    `non_embedding` is Kaplan's: without the token table, the position table, and the vocabulary matrix with its
    bias (Kaplan et al. 2020, section 1.3, "excluding all vocabulary and positional embeddings"). The linear
    read-in and read-out of vectors have no vocabulary and stay in. So do biases and norms, which Kaplan's own
    formula N = 2 D L (2 H K + F) drops as sub-leading: for GPT-2 small 0.14 %.
    Which of them N means matters: at small sizes it moves the fitted exponents (Pearce & Song 2024).
    Both count every expert of a mixture; `active` is the part of the total that one token goes through: k experts of
    each layer and all that is no expert (Jiang et al. 2024, section 2.1).
    """

    total: int
    non_embedding: int
    embedding: int
    idle: int = 0  # of the experts that a token does not go through

    @property
    def active(self) -> int:
        """Parameters that one token goes through; the total without experts."""
        return self.total - self.idle


def parameters(c: ModelConfig) -> Parameters:
    """Parameters of a model, in units, by all conventions."""
    groups = parameter_groups(c)
    tables = ["token_embedding", "position_embedding", *(["output"] if c.d_output is None else [])]
    embedding = sum(groups[name] for name in tables)
    total = sum(groups.values())
    idle = 0
    if c.n_experts is not None and c.architecture == "transformer":
        idle = c.n_layers * (c.n_experts - c.experts_per_token) * _one_mlp(c)
    return Parameters(total=total, non_embedding=total - embedding, embedding=embedding, idle=idle)


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def flops_6nd(n_params: float, tokens: float) -> float:
    """C = 6 N D training FLOPs (Kaplan et al. 2020, section 2.1); state which N. Attention's scores are left out.

    With experts, 6 N D of the total says what a dense model of that size would cost (the run table's `flops_6nd`, as
    Chinchilla's N is the total); what is computed is near 6 N D of the active parameters.
    """
    return 6.0 * n_params * tokens


def forward_flops_per_sequence(c: ModelConfig, length: int, *, attention: Pairs = "full") -> int:
    """FLOPs of the matrix products of one forward pass over one sequence of `length` positions.

    Counted: query, key, value and output matrices, scores, pattern times values, the MLP's two matrices (three for
    swiglu), of experts those of the k that a token goes through and the router (rows that mixture.py leaves empty are
    not counted), an LSTM's or RNN's matrices for input and state, the read-in, and the unembedding (tied too) or
    read-out. Not counted: embedding look-ups, norms, softmax, activations, biases, masks.
    `attention`: "full" is every query against every key, as dense attention computes; "causal" is only the pairs
    that the model sees, T (T + 1) / 2, as a kernel that skips hidden blocks computes at best. Without a causal mask
    both are T^2. Linear attention is counted as the model computes it, by pairs. A key mask changes neither.
    """
    return _read_in_flops(c, length) + _other_forward_flops(c, length, attention)


def training_flops_per_sequence(c: ModelConfig, length: int, *, attention: Pairs = "full") -> int:
    """FLOPs of the matrix products of one forward and backward pass over one sequence.

    A product y = x W costs as much again for dL/dW and for dL/dx: three times the forward pass. Of token models this
    holds for every product, as the embedding below the first layer is trained. Real vectors are data, so the read-in
    needs no dL/dx and costs twice its forward pass. These are the model's FLOPs: `remat` makes the hardware do about
    one forward pass more, which is not counted, and neither is the optimizer: O(N) per step, with Muon more.
    """
    return 2 * _read_in_flops(c, length) + 3 * _other_forward_flops(c, length, attention)


def flops_exact(c: ModelConfig, tokens: float, *, attention: Pairs = "full") -> float:
    """Training FLOPs for `tokens` tokens in sequences of `c.context`: see `training_flops_per_sequence`."""
    return tokens / c.context * training_flops_per_sequence(c, c.context, attention=attention)


def _read_in_flops(c: ModelConfig, length: int) -> int:
    return 0 if c.d_input is None else 2 * length * c.d_input * c.d_model


def _other_forward_flops(c: ModelConfig, length: int, attention: Pairs) -> int:
    d = c.d_model
    output = length * d * c.output_width
    if c.architecture != "transformer":
        gates = 4 if c.architecture == "lstm" else 1
        return 2 * (c.n_layers * length * 2 * d * gates * d + output)
    hk, gk = c.n_heads * c.head_width, c.kv_heads * c.head_width
    pairs = length * (length + 1) // 2 if attention == "causal" and c.causal else length**2
    mlp = (3 if c.mlp == "swiglu" else 2) * d * c.mlp_width
    if c.n_experts is not None:
        mlp = c.experts_per_token * mlp + d * c.n_experts
    per_token = 2 * d * hk + 2 * d * gk + mlp  # multiply-adds of one layer's weights
    return 2 * (c.n_layers * (length * per_token + 2 * pairs * hk) + output)


def xla_flops(c: ModelConfig, batch: int) -> float:
    """XLA's own count of the FLOPs of one loss-and-gradient step on `batch` sequences of `c.context`.

    For those who doubt `flops_exact(attention="full")`: everything elementwise is in it, a look-up or a transcendental
    is not. At d_model = 128 it was 1 to 4 % higher with heads of 32 or wider and up to 256 positions. Softmax works on
    T^2 scores whose products are only K deep, so its share grows with T and 1 / K: 10 % with heads of 8 at T = 512; and
    at d_model = 32 everything elementwise weighs 12 %. With experts, rows that mixture.py leaves empty are in it.

    Layers are unrolled (XLA counts the body of a loop once), attention is dense (a fused kernel hides its products from
    the count), nothing is rematerialised, all is float32. Compiled for the CPU, whose count does not depend on the
    machine; nothing is allocated. Seconds for small models, minutes for deep ones.
    Raises BadInput for a recurrent model, whose loop is over positions and stays.
    """
    if c.architecture != "transformer":
        raise BadInput(f"model.architecture={c.architecture}: XLA counts the body of its loop once; choose transformer")
    import jax  # here, so that planning a sweep does not wait for JAX
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt.build import graphdef
    from jaxgpt.model import Transformer

    c = dataclasses.replace(
        c,
        scan_layers=False,
        remat=False,
        attention_kernel="plain",
        param_dtype="float32",
        compute_dtype="float32",
    )

    def loss(params: nnx.State, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        outputs_BxTxV = nnx.merge(graphdef(c), params)(inputs)
        if c.d_output is not None:
            return jnp.mean((outputs_BxTxV - targets) ** 2)
        log_p_BxTxV = jax.nn.log_softmax(outputs_BxTxV)
        return -jnp.mean(jnp.take_along_axis(log_p_BxTxV, targets[..., None], axis=-1))

    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    shape = (batch, c.context)
    ids, vectors = jax.ShapeDtypeStruct(shape, jnp.int32), lambda d: jax.ShapeDtypeStruct((*shape, d), jnp.float32)
    params = nnx.state(nnx.eval_shape(lambda: Transformer(c)))
    inputs = ids if c.d_input is None else vectors(c.d_input)
    targets = ids if c.d_output is None else vectors(c.d_output)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=cpu, out_shardings=cpu)
    counted = step.lower(params, inputs, targets).compile().cost_analysis()
    assert counted is not None, "the CPU backend counts"
    return float(counted["flops"])
