import dataclasses
import functools
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import build, flops, memory, mixture, population, step
from jaxgpt.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig, override
from jaxgpt.known_models import KNOWN_MODELS
from jaxgpt.optimizer import hparams
from jaxgpt.tasks.text import TextData, TextTask

# --- the real programs ---------------------------------------------------------------------------------------------


def task(config: RunConfig) -> TextTask:
    c, d, t = config.model, config.data, config.train
    masked = d.objective == "masked"
    return TextTask(
        c,
        t.batch_size,
        t.eval_windows,
        tokens=min(256, c.vocab_size - masked),
        mask_fraction=d.mask_fraction if masked else None,
        document_mask=d.document_mask,
        z_loss=t.z_loss,
        load_balance=t.load_balance,
    )


def like(tree: Any, *leading: int) -> Any:
    """Shapes and dtypes only: nothing is allocated."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*leading, *np.shape(x)), x.dtype), tree)


def first_state(config: RunConfig, program: step.Program) -> step.TrainState:
    make = functools.partial(step.first_state, program, hparams(config))
    return jax.eval_shape(make, build.abstract_params(config.model))


def compiled(config: RunConfig, mode: population.Mode, runs: int) -> Any:
    """XLA's memory analysis of the program that advances so many equal runs."""
    program = step.program(config, task(config))
    window = jax.ShapeDtypeStruct((4, config.model.context + 1), jnp.uint8)
    data = TextData(jax.ShapeDtypeStruct((1000,), jnp.uint8), window, jax.ShapeDtypeStruct((4,), jnp.float32))
    state, n = first_state(config, program), np.zeros((), np.int32)
    states_R, n_R, h_R = (like(tree, runs) for tree in (state, n, hparams(config)))
    lowered = population.advance.lower(program, mode, states_R, n_R, h_R, {}, data)
    # Machine code is not looked at: what takes memory is decided before it is made.
    found = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).memory_analysis()
    assert found is not None, "the CPU backend plans its memory"
    return found


def config_of(words: str) -> RunConfig:
    """Of `field=value ...` on top of a small default, with `model.` left out."""

    def value(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return {"true": True, "false": False}.get(text, text)

    base = {"model.d_model": 32, "model.n_layers": 2, "model.context": 64, "train.batch_size": 4}
    given = dict(word.split("=") for word in words.split())
    return override(
        RunConfig(), base | {name if "." in name else f"model.{name}": value(text) for name, text in given.items()}
    )


# --- the state -----------------------------------------------------------------------------------------------------

MODELS = [
    ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, qk_norm=True, bias=True, mlp="swiglu"),
    ModelConfig(d_model=16, n_layers=2, tie_output=True, positions="learned", param_dtype="bfloat16", d_mlp=24),
    ModelConfig(d_model=16, n_layers=3, n_experts=3, bias=True, scan_layers=True, norm="rmsnorm"),
    ModelConfig(d_model=16, n_layers=2, n_experts=3, mlp="swiglu", norm_placement="post", d_head=8),
    ModelConfig(architecture="lstm", d_model=16, n_layers=2, output_bias=True),
    ModelConfig(architecture="rnn", d_model=16, n_layers=1, n_experts=3),
    ModelConfig(d_model=16, n_layers=0, mlp="none", norm="none"),
]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
@pytest.mark.parametrize("model", MODELS, ids=lambda c: f"{c.architecture}, {c.mlp}, {c.n_experts}, {c.n_layers}")
def test_state_bytes_are_those_of_the_real_states_leaves(model: ModelConfig, name: str, ema: float | None):
    config = RunConfig(model, optimizer=OptimizerConfig(name=name, ema=ema))
    state = first_state(config, step.program(config, task(config)))
    real = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.state_bytes(config) == real


def test_state_bytes_of_float64_are_those_of_the_real_states_leaves():
    model = ModelConfig(d_model=16, n_layers=1, param_dtype="float64")
    with jax.enable_x64(True):
        for name in ("adamw", "muon"):
            config = RunConfig(model, optimizer=OptimizerConfig(name=name, ema=0.9))
            state = first_state(config, step.program(config, task(config)))
            real = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            assert memory.state_bytes(config) == real


# --- a step's working set ------------------------------------------------------------------------------------------

CONFIGS = {
    "plain": "",
    "scores weigh most": "context=256 d_model=16",
    "remat does nothing to unrolled layers": "remat=true mlp=relu positions=alibi norm=none",
    "scanned": "scan_layers=true n_layers=4",
    "scanned, remat": "scan_layers=true remat=true n_layers=4",
    "large vocabulary, tied, swiglu": "vocab_size=2048 tie_output=true mlp=swiglu n_kv_heads=1 norm=rmsnorm n_layers=1",
    "microbatches": "train.microbatches=2 train.batch_size=8",
    "muon": "optimizer.name=muon d_model=64 context=16 train.batch_size=1 n_layers=1",
    "parameters, ema": "d_model=128 context=16 train.batch_size=1 optimizer.ema=0.9 n_layers=1",
    "lion, experts": "n_experts=4 optimizer.name=lion train.batch_size=8 n_layers=1",
    "lstm": "architecture=lstm context=128",
    "masked, linear": "data.objective=masked causal=false vocab_size=257 attention=linear norm_placement=parallel",
    "dropout, documents": "dropout=0.1 data.document_mask=true qk_norm=true n_layers=1",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_estimate_of_a_step_is_near_what_xla_plans(name: str):
    config = config_of(CONFIGS[name])
    found = compiled(config, "map", 1)
    assert 0.75 < memory.step_bytes(config, "cpu") / found.temp_size_in_bytes < 1.35
    # The state is donated, all of it, and stays where it is.
    assert found.alias_size_in_bytes == memory.state_bytes(config)
    need = found.temp_size_in_bytes + found.alias_size_in_bytes
    bound = memory.training_bytes(config, "cpu")
    assert memory.training_bytes(config) <= bound <= need <= 12 * bound


@pytest.mark.parametrize(("mode", "together"), [("map", 1), ("vmap", 4)])
def test_the_estimate_of_a_population_is_near_what_xla_plans(mode: population.Mode, together: int):
    config = config_of("d_model=64 context=32 train.batch_size=1 n_layers=1")  # state and working set weigh alike
    assert 0.5 < memory.state_bytes(config) / memory.step_bytes(config, "cpu") < 2
    found = compiled(config, mode, 4)
    need = found.temp_size_in_bytes + found.alias_size_in_bytes
    assert found.alias_size_in_bytes == 4 * memory.state_bytes(config)
    assert 0.85 < memory.population_bytes(config, 4, together, "cpu") / need < 1.15


def test_a_mixtures_rows_are_those_of_the_model():
    for d_model, experts, k, tokens in [(16, 4, 2, 1024), (64, 8, 1, 100), (64, 3, 3, 1), (128, 16, 2, 4096)]:
        c = ModelConfig(d_model=d_model, n_experts=experts, experts_per_token=k)
        assert memory.blocks(c, tokens) == mixture.blocks(c, tokens)


def scores(c: ModelConfig, platform: str) -> float:
    """By how much four times the positions at a quarter of the batch raise the estimate, in [B, H, T, T] arrays of 4
    bytes: what else there is depends on the number of tokens alone.
    """
    train = TrainConfig(batch_size=64)
    long = dataclasses.replace(c, context=4 * c.context)
    short_bytes = memory.step_bytes(RunConfig(c, train=train), platform)
    long_bytes = memory.step_bytes(RunConfig(long, train=dataclasses.replace(train, batch_size=16)), platform)
    return (long_bytes - short_bytes) / (3 * 64 * c.n_heads * c.context**2 * 4)


@pytest.mark.parametrize(
    ("fields", "platform", "arrays"),
    [
        ({"attention_kernel": "plain"}, "cpu", 3),  # exponentials, sums, pattern
        ({"attention": "linear"}, "cpu", 1),
        ({}, "tpu", 1.5),  # exponentials; the pattern in bfloat16
        ({}, "gpu", 0),  # cuDNN's kernel
        ({"attention_kernel": "plain"}, "gpu", 1.5),
        ({"positions": "alibi"}, "gpu", 1.5),
        ({"compute_dtype": "float32"}, "gpu", 2),
        ({"matmul_precision": "highest"}, "gpu", 1.5),
        ({"attention_kernel": "plain", "remat": True}, "gpu", 1.5 / 4),  # one layer's of four
    ],
)
def test_arrays_of_all_pairs_are_counted_where_the_kernel_has_them(fields: dict, platform: str, arrays: float):
    c = ModelConfig(d_model=64, n_layers=4, context=256, **fields)
    assert scores(c, platform) == pytest.approx(4 * arrays)


def test_what_saves_memory_is_seen_to():
    config = config_of("scan_layers=true n_layers=8 n_heads=2")
    remat = override(config, {"model.remat": True})
    parts = override(config, {"train.microbatches": 4})
    for platform in ("cpu", "gpu", "tpu"):
        plain, *smaller = (memory.step_bytes(c, platform) for c in (config, remat, parts))
        assert max(smaller) < plain / 2
    unrolled, unrolled_remat = (override(c, {"model.scan_layers": False}) for c in (config, remat))
    assert memory.step_bytes(unrolled_remat, "cpu") == memory.step_bytes(unrolled, "cpu")
    assert memory.step_bytes(unrolled_remat, "gpu") < memory.step_bytes(unrolled, "gpu")


# --- how many runs fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together_all", [True, False])
def test_the_largest_block_fits_and_one_run_more_does_not(together_all: bool):
    config = config_of("")

    def need(runs: int) -> int:
        return memory.population_bytes(config, runs, runs if together_all else 1, "gpu")

    have = int(need(37) / memory.USABLE) + 1
    assert memory.largest_block(config, 1000, together_all, have, "gpu") == 37
    assert need(37) <= memory.USABLE * have < need(38)
    assert memory.largest_block(config, 5, together_all, have, "gpu") == 5
    assert memory.largest_block(config, 5, together_all, need(1), "gpu") == 0


def test_runs_computed_one_after_the_other_share_the_working_set():
    config = config_of("")
    state, working_set = memory.state_bytes(config), memory.step_bytes(config, "cpu")
    assert memory.population_bytes(config, 1, 1, "cpu") == state + working_set
    assert memory.population_bytes(config, 8, 8, "cpu") == 8 * (state + working_set)
    # Beside the eight the new states of all, and the one that is worked on.
    assert memory.population_bytes(config, 8, 1, "cpu") == (8 + 1) * state + working_set


# --- the bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "copies"),
    [({}, 4), ({"name": "sgd"}, 3), ({"name": "lion"}, 3), ({"ema": 0.9}, 5)],
    ids=["adamw", "sgd", "lion", "adamw, ema"],
)
def test_training_bytes_grow_by_so_many_float32_copies_of_each_parameter(fields: dict, copies: int):
    """Parameters, gradients, the optimizer's moments, the running mean."""
    small, large = (ModelConfig(d_model=512, n_layers=n, context=1) for n in (10, 20))
    rest = {"train": TrainConfig(batch_size=1), "optimizer": OptimizerConfig(**fields)}
    grown = memory.training_bytes(RunConfig(large, **rest)) - memory.training_bytes(RunConfig(small, **rest))
    assert grown == 4 * copies * (flops.parameters(large).total - flops.parameters(small).total)


def test_training_bytes_count_one_microbatch_at_the_compute_width():
    c = ModelConfig(d_model=8, n_layers=2, n_heads=2, context=1000, compute_dtype="float32", attention_kernel="plain")
    thin = dataclasses.replace(c, compute_dtype="auto")  # bfloat16 where that is narrower

    def beyond_the_state(c: ModelConfig, parts: int, platform: str | None = None) -> int:
        config = RunConfig(c, train=TrainConfig(batch_size=8, microbatches=parts))
        return memory.training_bytes(config, platform) - memory.state_bytes(config)

    one_layer, both = (8 * 1000 * (256 + 3 * 8 + layers * 2 * 1000) * 4 for layers in (1, 2))
    assert beyond_the_state(c, 1) == one_layer
    assert beyond_the_state(c, 2) == beyond_the_state(thin, 1) == one_layer / 2
    assert beyond_the_state(c, 1, "cpu") == beyond_the_state(thin, 1, "cpu") == both
    assert beyond_the_state(dataclasses.replace(c, remat=True), 1, "cpu") == one_layer


def test_training_bytes_leave_out_the_pattern_where_a_kernel_may_have_none():
    c = ModelConfig(d_model=64, n_layers=2, context=4096)
    config, plain = (RunConfig(dataclasses.replace(c, attention_kernel=kernel)) for kernel in ("auto", "plain"))
    pattern = 16 * 4 * 4096**2 * 2
    assert memory.training_bytes(plain) - memory.training_bytes(config) == pattern
    assert memory.training_bytes(config, "gpu") == memory.training_bytes(config)
    assert memory.training_bytes(config, "tpu") == memory.training_bytes(plain, "gpu")


def test_gpt3_does_not_fit_on_one_accelerator():
    c = KNOWN_MODELS["gpt3"].config
    assert memory.training_bytes(RunConfig(c, train=TrainConfig(batch_size=1))) > 2.7e12


def test_planning_memory_imports_no_jax():
    code = (
        "import sys; from jaxgpt import RunConfig, memory; c = RunConfig(); memory.training_bytes(c); "
        "memory.largest_block(c, 100, True, 10**9, 'gpu'); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
