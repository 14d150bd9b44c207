"""How large a model is and what its training costs: parameters, FLOPs and bytes, by stated conventions.

Closed forms from the config alone: they import no JAX, so that a sweep can be planned before anything starts.
Tests hold them to the real model's leaves, to the matrix products of its traced gradient, and to XLA's own count.

Letters as in model.py: T positions, D d_model, H heads, K head width, F MLP width, L layers, V output width.
One multiply and one add are 2 FLOPs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from jaxgpt.config import ModelConfig, RunConfig

Pairs = Literal["full", "causal"]  # which query-key pairs are counted


# --- parameters ----------------------------------------------------------------------------------------------------


def parameter_groups(c: ModelConfig) -> dict[str, int]:
    """Parameters by what they do, in units. The groups are disjoint and together are all leaves of the model.

    `output` is the vocabulary matrix or the read-out, with its bias; 0 when tied, as that matrix is then
    the token embedding. `norm` counts scales and biases, the final norm's too.
    """
    d, hk, f = c.d_model, c.n_heads * c.head_width, c.mlp_width

    def linear(d_in: int, d_out: int) -> int:
        return d_in * d_out + c.bias * d_out

    up_and_gate = 2 if c.mlp == "swiglu" else 1
    mlp = up_and_gate * linear(d, f) + linear(f, d) if f else 0
    per_norm = {"layernorm": d + c.bias * d, "rmsnorm": d, "none": 0}[c.norm]
    n_norms = c.n_layers * (2 if f else 1) + (c.norm_placement != "post")
    return {
        "token_embedding": c.vocab_size * d if c.d_input is None else 0,
        "position_embedding": c.context * d if c.positions == "learned" else 0,
        "read_in": linear(c.d_input, d) if c.d_input is not None else 0,
        "attention": c.n_layers * (3 * linear(d, hk) + linear(hk, d)),
        "mlp": c.n_layers * mlp,
        "norm": n_norms * per_norm,
        "output": 0 if c.tie_output else linear(d, c.output_width),
    }


@dataclass(frozen=True)
class Parameters:
    """N by the two conventions of the scaling-law literature; total = non_embedding + embedding.

    `total` is Chinchilla's: every parameter (Hoffmann et al. 2022, appendix F, counts the embedding matrices).
    `non_embedding` is Kaplan's: without the token table, the position table, and the vocabulary matrix with its
    bias (Kaplan et al. 2020, section 1.3, "excluding all vocabulary and positional embeddings"). The linear
    read-in and read-out of vectors have no vocabulary and stay in. So do biases and norms, which Kaplan's own
    formula N = 2 D L (2 H K + F) drops as sub-leading: for GPT-2 small 0.14 %.
    Which of them N means matters: at small sizes it moves the fitted exponents (Pearce & Song 2024).
    """

    total: int
    non_embedding: int
    embedding: int


def parameters(c: ModelConfig) -> Parameters:
    """Parameters of a model, in units, by both conventions."""
    groups = parameter_groups(c)
    tables = ["token_embedding", "position_embedding", *(["output"] if c.d_output is None else [])]
    embedding = sum(groups[name] for name in tables)
    total = sum(groups.values())
    return Parameters(total=total, non_embedding=total - embedding, embedding=embedding)


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def flops_6nd(n_params: float, tokens: float) -> float:
    """C = 6 N D training FLOPs (Kaplan et al. 2020, section 2.1); state which N. Attention's scores are left out."""
    return 6.0 * n_params * tokens


def forward_flops_per_sequence(c: ModelConfig, length: int, *, attention: Pairs = "full") -> int:
    """FLOPs of the matrix products of one forward pass over one sequence of `length` positions.

    Counted: query, key, value and output matrices, scores, pattern times values, the MLP's two matrices (three for
    swiglu), the read-in, and the unembedding (tied too) or read-out. Not counted: embedding look-ups, norms, softmax,
    activations, biases, masks.
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
    one forward pass more, which is not counted, and neither is the optimizer, O(N) per step.
    """
    return 2 * _read_in_flops(c, length) + 3 * _other_forward_flops(c, length, attention)


def flops_exact(c: ModelConfig, tokens: float, *, attention: Pairs = "full") -> float:
    """Training FLOPs for `tokens` tokens in sequences of `c.context`: see `training_flops_per_sequence`."""
    return tokens / c.context * training_flops_per_sequence(c, c.context, attention=attention)


def _read_in_flops(c: ModelConfig, length: int) -> int:
    return 0 if c.d_input is None else 2 * length * c.d_input * c.d_model


def _other_forward_flops(c: ModelConfig, length: int, attention: Pairs) -> int:
    d, hk = c.d_model, c.n_heads * c.head_width
    pairs = length * (length + 1) // 2 if attention == "causal" and c.causal else length**2
    mlp_matrices = 3 if c.mlp == "swiglu" else 2
    per_token = 4 * d * hk + mlp_matrices * d * c.mlp_width  # multiply-adds of one layer's weights
    return 2 * (c.n_layers * (length * per_token + 2 * pairs * hk) + length * d * c.output_width)


def xla_flops(c: ModelConfig, batch: int) -> float:
    """XLA's own count of the FLOPs of one loss-and-gradient step on `batch` sequences of `c.context`.

    For those who doubt `flops_exact(attention="full")`: everything elementwise is in it, a look-up or a transcendental
    is not. At d_model = 128 it was 1 to 4 % higher with heads of 32 or wider and up to 256 positions. Softmax works on
    T^2 scores whose products are only K deep, so its share grows with T and 1 / K: 10 % with heads of 8 at T = 512; and
    at d_model = 32 everything elementwise weighs 12 %. Layers
    are unrolled (XLA counts the body of a loop once), attention is dense (a fused kernel hides its products from the
    count), nothing is rematerialised, all is float32. Compiled for the CPU, whose count does not depend on the
    machine; nothing is allocated. Seconds for small models, minutes for deep ones.
    """
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


# --- memory --------------------------------------------------------------------------------------------------------

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


def training_bytes(config: RunConfig) -> int:
    """A LOWER bound of the device memory that training this run needs, in bytes: what exceeds the device cannot run.

    Parameters and Adam's two moments live throughout. On top of them comes the larger of two states: the end of the
    backward pass, when all gradients exist (their global norm needs all of them), and its start, when the output
    of one microbatch and the residual stream before each block and after the last exist. Everything else comes on
    top: attention patterns, MLP activations, casts, the corpus, XLA's buffers. Several times this is common.
    """
    c, parts = config.model, config.train.microbatches
    # auto is bfloat16 on accelerators and may be wider on CPU: the smaller one keeps this a bound on both.
    compute = min(2, _BYTES[c.param_dtype]) if c.compute_dtype == "auto" else _BYTES[c.compute_dtype]
    weights = parameters(c).total * _BYTES[c.param_dtype]
    tokens = config.train.batch_size // parts * c.context
    activations = tokens * (c.output_width + (c.n_layers + 1) * c.d_model) * compute
    return 3 * weights + max(weights, activations)


# --- known models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownModel:
    """A published model, its published number of parameters, and half the last digit that was published."""

    config: ModelConfig
    published: int
    rounding: int  # the true count is within published +- rounding; 0: every digit is known
    source: str


def _gpt2(
    n_layers: int, d_model: int, n_heads: int, published: int, rounding: int, source: str, context: int = 1024
) -> KnownModel:
    config = ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        context=context,
        vocab_size=50_257,
        positions="learned",
        bias=True,
        tie_output=True,
    )
    return KnownModel(config, published, rounding, source)


def _gpt3(n_layers: int, d_model: int, n_heads: int, published: int, rounding: int) -> KnownModel:
    source = "Brown et al. 2020, tables 2.1 and D.1"
    return _gpt2(n_layers, d_model, n_heads, published, rounding, source, context=2048)


def _llama2(n_layers: int, d_model: int, n_heads: int, d_mlp: int, published: int) -> KnownModel:
    config = ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_mlp=d_mlp,
        context=4096,
        vocab_size=32_000,
        norm="rmsnorm",
        mlp="swiglu",
    )
    return KnownModel(config, published, 0, "Touvron et al. 2023b; the released weights")


_GPT2 = "Radford et al. 2019; the released weights"
_MILLION = 10**6

# GPT-3 has 96 layers of 96 heads, 9,216 heads in all, and a context of 2048.
# Left out because this model cannot express them: Chinchilla and Gopher (relative positions with a matrix per layer),
# GPT-J and Pythia (biases in some maps only), Llama-2-70B (grouped queries). Left out because its table contradicts
# itself: GPT-3 XL (24 heads of 128 are not d_model = 2048) and 13B (40 of 128 are not 5140).
KNOWN_MODELS: dict[str, KnownModel] = {
    "gpt2": _gpt2(12, 768, 12, 124_439_808, 0, _GPT2),
    "gpt2-medium": _gpt2(24, 1024, 16, 354_823_168, 0, _GPT2),
    "gpt2-large": _gpt2(36, 1280, 20, 774_030_080, 0, _GPT2),
    "gpt2-xl": _gpt2(48, 1600, 25, 1_557_611_200, 0, _GPT2),
    "gpt3-small": _gpt3(12, 768, 12, 125 * _MILLION, _MILLION // 2),
    "gpt3-medium": _gpt3(24, 1024, 16, 356 * _MILLION, _MILLION // 2),
    "gpt3-large": _gpt3(24, 1536, 16, 760 * _MILLION, _MILLION // 2),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 2_650 * _MILLION, 5 * _MILLION),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 6_660 * _MILLION, 5 * _MILLION),
    "gpt3": _gpt3(96, 12_288, 96, 174_600 * _MILLION, 50 * _MILLION),
    "llama2-7b": _llama2(32, 4096, 32, 11_008, 6_738_415_616),
    "llama2-13b": _llama2(40, 5120, 40, 13_824, 13_015_864_320),
}
