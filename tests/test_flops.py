import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from jaxgpt import flops
from jaxgpt.config import ModelConfig, RunConfig, TrainConfig
from jaxgpt.build import graphdef, param_name
from jaxgpt.model import Transformer


def abstract_params(c: ModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Transformer(c)))


def inputs_like(c: ModelConfig, batch: int) -> jax.ShapeDtypeStruct:
    if c.d_input is None:
        return jax.ShapeDtypeStruct((batch, c.context), jnp.int32)
    return jax.ShapeDtypeStruct((batch, c.context, c.d_input), jnp.float32)


@st.composite
def model_configs(draw: st.DrawFn, plain: bool = False) -> ModelConfig:
    """Any combination of the options that change a shape; `plain`: unrolled layers with dense attention."""
    vectors = draw(st.booleans())
    d_output = draw(st.sampled_from([None, 1, 7]))
    linear = draw(st.booleans())
    return ModelConfig(
        d_model=draw(st.sampled_from([6, 12])),
        n_layers=draw(st.integers(0, 3)),
        n_heads=draw(st.sampled_from([1, 3])),
        d_head=draw(st.sampled_from([None, 2, 10])),
        d_mlp=draw(st.sampled_from([None, 5])),
        context=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 20)),
        positions=draw(st.sampled_from(["learned", "sinusoidal", "rope", "none", *([] if linear else ["alibi"])])),
        attention="linear" if linear else "softmax",
        causal=draw(st.booleans()),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm", "none"])),
        norm_placement=draw(st.sampled_from(["pre", "post", "parallel"])),
        mlp=draw(st.sampled_from(["gelu", "relu", "swiglu", "none"])),
        bias=draw(st.booleans()),
        tie_output=not vectors and d_output is None and draw(st.booleans()),
        d_input=draw(st.integers(1, 5)) if vectors else None,
        d_output=d_output,
        attention_kernel="plain",
        scan_layers=not plain and draw(st.booleans()),
    )


# --- parameters ----------------------------------------------------------------------------------------------------

GROUP_OF = {
    "embed": "token_embedding",
    "position": "position_embedding",
    "read_in": "read_in",
    "attention": "attention",
    "mlp": "mlp",
    "unembed": "output",
    "read_out": "output",
}


def counted_groups(c: ModelConfig) -> dict[str, int]:
    """The groups of `parameter_groups`, counted leaf by leaf in the real model."""
    counts = dict.fromkeys([*GROUP_OF.values(), "norm"], 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(c)):
        parts = [part for part in param_name(path).split(".") if part != "layers" and not part.isdigit()]
        counts["norm" if parts[0].endswith("norm") else GROUP_OF[parts[0]]] += math.prod(leaf.shape)
    return counts


@settings(max_examples=40, deadline=None)
@given(model_configs())
def test_every_group_has_the_real_models_leaves(c: ModelConfig):
    assert flops.parameter_groups(c) == counted_groups(c)


@settings(max_examples=100, deadline=None)
@given(model_configs())
def test_the_two_conventions_differ_by_the_embeddings(c: ModelConfig):
    n, groups = flops.parameters(c), flops.parameter_groups(c)
    assert n.total == n.non_embedding + n.embedding == sum(groups.values())
    blocks = groups["attention"] + groups["mlp"] + groups["norm"]
    vectors = groups["read_in"] + (groups["output"] if c.d_output is not None else 0)
    assert n.non_embedding == blocks + vectors


def test_kaplans_count_does_not_depend_on_vocabulary_context_or_tying():
    few = ModelConfig(vocab_size=256, context=8, positions="none", tie_output=True)
    many = ModelConfig(vocab_size=5000, context=99, positions="learned", tie_output=False)
    assert flops.parameters(few).non_embedding == flops.parameters(many).non_embedding
    assert flops.parameters(few).total < flops.parameters(many).total


def test_kaplans_formula_is_our_count_without_biases_and_norms():
    c = ModelConfig(d_model=48, n_layers=3, n_heads=4, d_mlp=100, norm="none", bias=False)
    assert flops.parameters(c).non_embedding == 2 * 48 * 3 * (2 * 48 + 100)  # Kaplan et al. 2020, eq. 2.1


@pytest.mark.parametrize("name", flops.KNOWN_MODELS)
def test_a_published_model_has_its_published_number_of_parameters(name: str):
    known = flops.KNOWN_MODELS[name]
    n = flops.parameters(known.config).total
    assert abs(n - known.published) <= known.rounding


@pytest.mark.parametrize("name", ["gpt2", "gpt3", "llama2-7b"])
def test_the_real_model_of_a_published_config_has_that_many_leaves(name: str):
    # Scanned: one block with an axis of layers, as 96 NNX blocks take half a minute to build even without values.
    c = dataclasses.replace(flops.KNOWN_MODELS[name].config, scan_layers=True)
    assert counted_groups(c) == flops.parameter_groups(c)


def test_gpt2_is_124m_and_gpt3_is_175b_with_9216_heads_and_a_context_of_2048():
    gpt2, gpt3 = (flops.KNOWN_MODELS[name].config for name in ("gpt2", "gpt3"))
    assert round(flops.parameters(gpt2).total, -6) == 124_000_000
    assert round(flops.parameters(gpt3).total, -9) == 175_000_000_000
    assert (gpt3.n_layers, gpt3.n_heads, gpt3.d_model, gpt3.context) == (96, 96, 12_288, 2048)
    assert gpt3.n_layers * gpt3.n_heads == 9216


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def product_flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of all dot_generals in a jaxpr, those of inner jaxprs too."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            a = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(a[i] for i in contracted)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            total += product_flops(inner) if isinstance(inner, core.Jaxpr) else 0
    return total


def traced_flops(c: ModelConfig, batch: int, *, backward: bool) -> int:
    """FLOPs of the matrix products that JAX itself writes down for the real model, without compiling it."""

    def loss(params: nnx.State, inputs: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef(c), params)(inputs) ** 2)

    function = jax.value_and_grad(loss) if backward else loss
    return product_flops(jax.make_jaxpr(function)(abstract_params(c), inputs_like(c, batch)).jaxpr)


@settings(max_examples=15, deadline=None)
@given(model_configs(plain=True), st.integers(1, 3))
def test_full_count_is_exactly_the_products_of_the_traced_model(c: ModelConfig, batch: int):
    forward = flops.forward_flops_per_sequence(c, c.context)
    assert batch * forward == traced_flops(c, batch, backward=False)
    assert flops.flops_exact(c, batch * c.context) == pytest.approx(traced_flops(c, batch, backward=True), rel=1e-12)


def test_backward_costs_twice_the_forward_but_data_needs_no_gradient():
    tokens = ModelConfig(d_model=12, n_heads=2, context=5)
    vectors = ModelConfig(d_model=12, n_heads=2, context=5, d_input=7, d_output=3)
    assert flops.training_flops_per_sequence(tokens, 5) == 3 * flops.forward_flops_per_sequence(tokens, 5)
    read_in = 2 * 5 * 7 * 12
    assert flops.training_flops_per_sequence(vectors, 5) == 3 * flops.forward_flops_per_sequence(vectors, 5) - read_in


@pytest.mark.parametrize("length", [1, 2, 17, 256])
def test_causal_counts_the_pairs_that_the_mask_lets_through(length: int):
    c = ModelConfig(d_model=24, n_layers=3, n_heads=2, d_head=10, context=length)
    full, causal = (flops.training_flops_per_sequence(c, length, attention=a) for a in ("full", "causal"))
    hidden_pairs = int((~np.tri(length, dtype=bool)).sum())
    assert full - causal == 3 * 3 * 2 * (2 * 2 * 10) * hidden_pairs  # passes, layers, products, 2 H K


def test_without_a_causal_mask_every_pair_is_seen():
    c = ModelConfig(causal=False)
    assert flops.flops_exact(c, 1e6, attention="causal") == flops.flops_exact(c, 1e6, attention="full")


def test_options_that_change_memory_and_speed_leave_the_models_flops():
    c = ModelConfig()
    other = ModelConfig(remat=True, scan_layers=True, attention_kernel="fused", compute_dtype="bfloat16")
    assert flops.flops_exact(c, 1e6) == flops.flops_exact(other, 1e6)


def test_flops_are_proportional_to_tokens():
    c = ModelConfig()
    assert flops.flops_exact(c, 3e9) == pytest.approx(3e3 * flops.flops_exact(c, 1e6), rel=1e-12)


def test_6nd_of_gpt3_is_the_published_training_compute():
    n = flops.KNOWN_MODELS["gpt3"].published
    assert flops.flops_6nd(n, 300e9) == pytest.approx(3.14e23, abs=0.005e23)  # Brown et al. 2020, table D.1


def test_exact_count_of_a_wide_model_with_a_short_context_tends_to_6nd():
    c = flops.KNOWN_MODELS["gpt3"].config
    n = flops.parameters(c).non_embedding + c.vocab_size * c.d_model  # what multiplies activations; tied
    ratio = flops.flops_exact(c, 300e9, attention="causal") / flops.flops_6nd(n, 300e9)
    # Above 1 by attention's scores, T / (2 * 6 D) to first order (Kaplan et al. 2020, section 2.1).
    assert ratio == pytest.approx(1 + c.context / (12 * c.d_model), abs=1e-3)


# Every option at least once; ratios are about 1.00 to 1.04, what is above 1 being norms, softmax and activations.
AT_LEAST_128 = {
    "swiglu, tied": ModelConfig(
        d_model=128, n_layers=2, n_heads=2, context=32, mlp="swiglu", norm="rmsnorm", tie_output=True
    ),
    "parallel, learned, vocabulary 2048": ModelConfig(
        d_model=128,
        n_layers=1,
        n_heads=2,
        context=16,
        norm_placement="parallel",
        positions="learned",
        bias=True,
        vocab_size=2048,
    ),
    "post, alibi, relu": ModelConfig(
        d_model=128, n_layers=1, n_heads=2, context=32, norm_placement="post", positions="alibi", mlp="relu"
    ),
    "256 positions, heads of 32": ModelConfig(d_model=128, n_layers=1, n_heads=4, context=256),
    "256 wide, 256 positions": ModelConfig(d_model=256, n_layers=1, n_heads=4, context=256, tie_output=True),
    "vectors": ModelConfig(d_model=128, n_layers=1, n_heads=2, context=32, d_input=256, d_output=1),
    "gelu, scanned, remat": ModelConfig(d_model=128, n_layers=2, n_heads=2, context=32, scan_layers=True, remat=True),
}


@pytest.mark.parametrize("name", AT_LEAST_128)
def test_xlas_own_count_agrees_within_five_percent(name: str):
    c = AT_LEAST_128[name]
    assert flops.xla_flops(c, batch=2) / flops.flops_exact(c, 2 * c.context, attention="full") == pytest.approx(
        1, abs=0.05
    )


def test_xlas_count_is_further_off_where_softmax_meets_narrow_heads():
    """The five percent are a matter of shape: the docstring says so, and this is the other side of it."""
    c = ModelConfig(d_model=128, n_layers=1, n_heads=16, context=256)
    assert flops.xla_flops(c, batch=1) / flops.flops_exact(c, c.context, attention="full") > 1.05


# --- memory --------------------------------------------------------------------------------------------------------


def compiled_bytes(config: RunConfig) -> int:
    """XLA's count for one AdamW step with clipping: the state and a batch, and the largest scratch space."""
    c, t = config.model, config.train
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def step(params: nnx.State, moments: optax.OptState, tokens_BxT: jax.Array) -> tuple:
        def loss(params: nnx.State) -> jax.Array:
            logits_BxTxV = nnx.merge(graphdef(c), params)(tokens_BxT)
            return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, tokens_BxT).mean()

        gradient = jax.grad(loss)(params)
        updates, moments = adamw.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    params = abstract_params(c)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(adamw.init, params), inputs_like(c, t.batch_size)
    )
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(ModelConfig(d_model=128, n_layers=1, context=16), train=TrainConfig(batch_size=1)),
        RunConfig(ModelConfig(d_model=32, n_layers=1, context=64, vocab_size=2000), train=TrainConfig(batch_size=8)),
        RunConfig(
            ModelConfig(d_model=32, n_layers=1, mlp="none", norm="none", attention="linear", compute_dtype="float32"),
            train=TrainConfig(batch_size=8),
        ),
        RunConfig(
            ModelConfig(d_model=32, n_layers=8, context=64, scan_layers=True, remat=True, compute_dtype="float32"),
            train=TrainConfig(batch_size=16),
        ),
    ],
    ids=["mostly weights", "mostly logits", "bare", "remat"],
)
def test_training_bytes_are_below_what_xla_needs_and_not_absurdly_so(config: RunConfig):
    need, bound = compiled_bytes(config), flops.training_bytes(config)
    assert bound <= need <= 12 * bound


def test_training_bytes_grow_by_16_for_each_float32_parameter():
    small, large = (ModelConfig(d_model=512, n_layers=n, context=1) for n in (10, 20))
    one = TrainConfig(batch_size=1)
    grown = flops.training_bytes(RunConfig(large, train=one)) - flops.training_bytes(RunConfig(small, train=one))
    assert grown == 16 * (flops.parameters(large).total - flops.parameters(small).total)


def test_training_bytes_count_one_microbatch_at_the_compute_width():
    c = ModelConfig(d_model=8, n_layers=1, n_heads=2, context=1000, compute_dtype="float32")
    whole, half, thin = (
        flops.training_bytes(RunConfig(model, train=TrainConfig(batch_size=8, microbatches=parts)))
        for model, parts in [(c, 1), (c, 2), (ModelConfig(d_model=8, n_layers=1, n_heads=2, context=1000), 1)]
    )
    weights = 3 * 4 * flops.parameters(c).total
    assert whole - weights == 8 * 1000 * (256 + 2 * 8) * 4
    assert half - weights == thin - weights == (whole - weights) / 2


def test_gpt3_does_not_fit_on_one_accelerator():
    c = flops.KNOWN_MODELS["gpt3"].config
    assert flops.training_bytes(RunConfig(c, train=TrainConfig(batch_size=1))) > 2.7e12


def test_planning_imports_no_jax():
    code = (
        "import sys; from jaxgpt import flops; c = flops.KNOWN_MODELS['gpt3'].config; flops.parameters(c); "
        "flops.flops_exact(c, 1e9); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
