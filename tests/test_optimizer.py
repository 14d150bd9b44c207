"""Schedules against their formulas, AdamW against NumPy, and one compiled program for many hyperparameters."""

import dataclasses
import math
from dataclasses import replace as with_

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import RunConfig, build, override
from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.optimizer import clip_by_norm, decay_mask, hparams, learning_rate, optimizer

# --- schedules -----------------------------------------------------------------------------------------------------


def rates(schedule, steps, warmup=0, peak=0.01, **fields):
    """The rate of every update of a run, float32."""
    config = override(
        RunConfig(),
        {
            "train.steps": steps,
            "optimizer.warmup_steps": warmup,
            "optimizer.learning_rate": peak,
            "optimizer.schedule": schedule,
            **{f"optimizer.{name}": value for name, value in fields.items()},
        },
    )
    return np.asarray(ALL_STEPS[schedule](np.arange(300, dtype=np.int32), hparams(config)))[:steps]


ALL_STEPS = {
    name: jax.jit(jax.vmap(lambda step, h, name=name: learning_rate(name, step, h), in_axes=(0, None)))
    for name in ("cosine", "linear", "constant", "wsd")
}


def formula(schedule, step, steps, warmup, peak, final, decay):
    """Written from the definitions, in float64: updates are counted from 1."""
    done = step + 1
    if done < warmup:
        return peak * done / warmup
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        start = steps * (1 - decay)
        return peak if done <= start else peak * (1 + (final - 1) * (done - start) / (steps - start))
    x = (done - warmup) / (steps - warmup)
    return peak * (final + (1 - final) * (1 - x if schedule == "linear" else (1 + math.cos(math.pi * x)) / 2))


@pytest.mark.parametrize("warmup", [0, 1, 17])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_a_schedule_equals_its_formula_at_every_update(schedule, warmup):
    got = rates(schedule, 200, warmup, peak=0.02, final_fraction=0.05, decay_fraction=0.3)
    expected = [formula(schedule, i, 200, warmup, 0.02, 0.05, 0.3) for i in range(200)]
    np.testing.assert_allclose(got, expected, rtol=3e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_starts_at_its_first_part_and_reaches_the_peak_exactly(schedule):
    got = rates(schedule, 100, warmup=8, peak=0.02)
    peak = np.float32(0.02)
    np.testing.assert_allclose(got[:8], peak * np.arange(1, 9) / 8, rtol=1e-6)
    assert got[7] == got.max() == peak
    assert rates(schedule, 100, warmup=0, peak=0.02)[0] == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 0), (7, 2), (100, 0), (251, 10)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_update_has_exactly_the_final_fraction(schedule, steps, warmup, final):
    got = rates(schedule, steps, warmup, peak=0.03, final_fraction=final)
    assert got[-1] == np.float32(0.03) * np.float32(final)
    assert rates("constant", steps, warmup, peak=0.03, final_fraction=final)[-1] == np.float32(0.03)


def test_wsd_stays_at_the_peak_until_its_decay_begins():
    got = rates("wsd", 100, warmup=10, peak=0.02, decay_fraction=0.25)
    assert (got[9:75] == np.float32(0.02)).all()
    assert (np.diff(got[74:]) < 0).all()


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak():
    assert rates("cosine", 20, warmup=20, peak=0.02)[-1] == np.float32(0.02)


# --- AdamW ---------------------------------------------------------------------------------------------------------


def adamw_in_numpy(config, gradients, params, rates):
    """Loshchilov & Hutter 2019, algorithm 2, with clipping to a global norm; leaves by name, float64."""
    decayed = {name for name in params if name.endswith("kernel")}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = 1.0 if config.clip is None else min(1.0, config.clip / norm)
        new = {}
        for name, p in params.items():
            g = gradient[name] * scale
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            step = m[name] / (1 - config.beta1**t) / (np.sqrt(v[name] / (1 - config.beta2**t)) + config.epsilon)
            new[name] = p - rate * (step + (config.weight_decay * p if name in decayed else 0.0))
        params = new
    return params


SHAPES = {"a.kernel": (3, 4), "a.bias": (4,), "table.embedding": (5, 3), "norm.scale": (3,)}


def nested(leaves):
    tree = {}
    for name, leaf in leaves.items():
        group, last = name.split(".")
        tree.setdefault(group, {})[last] = jnp.asarray(leaf)
    return tree


@pytest.mark.parametrize("clip", [None, 1.0, 100.0], ids=["no clipping", "always clipped", "sometimes clipped"])
def test_several_updates_equal_adamw_in_numpy(clip):
    rng, rates = np.random.default_rng(1), [0.1, 0.05, 0.2, 0.01, 0.0, 0.3]
    config = OptimizerConfig(clip=clip, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3)
    start = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    gradients = [{n: rng.standard_normal(s) * 10.0 ** rng.integers(-1, 3) for n, s in SHAPES.items()} for _ in rates]
    with jax.enable_x64(True):
        h = hparams(with_(RunConfig(), optimizer=config))
        params = nested(start)
        state = optimizer(config, 0.0, h).init(params)
        for gradient, rate in zip(gradients, rates, strict=True):
            updates, state = optimizer(config, rate, h).update(nested(gradient), state, params)
            params = optax.apply_updates(params, updates)
    # Hyperparameters travel as float32, so the reference gets what they were rounded to.
    rounded = with_(config, weight_decay=float(np.float32(0.3)))
    for name, expected in adamw_in_numpy(rounded, gradients, start, rates).items():
        group, last = name.split(".")
        assert params[group][last].dtype == np.float64
        np.testing.assert_allclose(params[group][last], expected, rtol=1e-9, atol=1e-12)


def test_the_first_update_moves_every_entry_by_the_learning_rate():
    config = OptimizerConfig(weight_decay=0.0, clip=None)
    h = hparams(with_(RunConfig(), optimizer=config))
    params = {"w": jnp.zeros(4)}
    gradient = {"w": jnp.asarray([1e-4, -3.0, 70.0, -1e5])}  # the bias corrections undo (1 - beta) at the first step
    adam = optimizer(config, 0.02, h)
    updates, _ = adam.update(gradient, adam.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.02 * np.sign(gradient["w"]), rtol=2e-4)


def test_clipping_keeps_the_direction_and_is_by_the_norm_of_all_leaves_together():
    gradient = {"a": np.asarray([3.0, 0.0], np.float32), "b": np.asarray([[4.0]], np.float32)}
    clipped = clip_by_norm(gradient, np.float32(0.5))
    np.testing.assert_allclose([*clipped["a"], *clipped["b"][0]], [0.3, 0.0, 0.4], rtol=1e-6)
    for large in (5.001, np.inf):
        untouched = clip_by_norm(gradient, np.float32(large))
        assert [*untouched["a"], *untouched["b"][0]] == [3.0, 0.0, 4.0]
    zero = clip_by_norm({"a": np.zeros(2, np.float32)}, np.float32(1.0))
    assert (np.asarray(zero["a"]) == 0).all()


@pytest.mark.parametrize("clip", [None, 0.01])
def test_bfloat16_parameters_can_be_updated(clip):
    config = OptimizerConfig(clip=clip)
    h = hparams(with_(RunConfig(), optimizer=config))
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    adam = optimizer(config, jnp.float32(0.1), h)
    updates, state = adam.update(params, adam.init(params), params)
    new = optax.apply_updates(params, updates)
    assert new["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(new["kernel"], np.float32), 0.89, atol=0.01)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, adam.init(params))


# --- what is decayed -----------------------------------------------------------------------------------------------

LAYER = {
    **dict.fromkeys(("query.kernel", "key.kernel", "value.kernel", "out.kernel"), True),
    **dict.fromkeys(("query.bias", "key.bias", "value.bias", "out.bias"), False),
}
EVERY_KIND = {
    **{f"layers.0.attention.{name}": decayed for name, decayed in LAYER.items()},
    **{f"layers.0.mlp.{m}.{k}": k == "kernel" for m in ("up", "gate", "down") for k in ("kernel", "bias")},
    **{f"layers.0.{n}.{k}": False for n in ("attention_norm", "mlp_norm") for k in ("scale", "bias")},
    "final_norm.scale": False,
    "final_norm.bias": False,
    "position.embedding": False,
}
TOKENS = {"embed.embedding": False, "unembed.kernel": True, "unembed.bias": False}
VECTORS = {"read_in.kernel": True, "read_in.bias": False, "read_out.kernel": True, "read_out.bias": False}


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(("widths", "ends"), [({}, TOKENS), ({"d_input": 3, "d_output": 2}, VECTORS)])
def test_weight_decay_acts_on_matrices_and_on_nothing_else(widths, ends, scanned):
    c = ModelConfig(d_model=4, n_layers=1, n_heads=2, context=4, vocab_size=7, positions="learned", bias=True,
                    mlp="swiglu", scan_layers=scanned, **widths)  # fmt: skip
    leaves, _ = jax.tree_util.tree_flatten_with_path(decay_mask(build.init_params(c, 0)))
    mask = {build.param_name(path): decayed for path, decayed in leaves}
    expected = EVERY_KIND | ends
    if scanned:
        expected = {name.replace("layers.0.", "layers."): decayed for name, decayed in expected.items()}
    assert mask == expected


def test_a_tied_table_is_not_decayed():
    c = ModelConfig(d_model=4, n_layers=0, n_heads=2, context=4, vocab_size=7, tie_output=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(decay_mask(build.init_params(c, 0)))
    assert {build.param_name(path): decayed for path, decayed in leaves} == {
        "embed.embedding": False,
        "final_norm.scale": False,
    }


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"kernel": 0, "my_kernel": 0, "w": 0}, {"kernel": True, "my_kernel": False, "w": False}),
        ([{"kernel": 0}, 0], [{"kernel": True}, False]),
        (0, False),
    ],
)
def test_any_pytree_of_parameters_has_a_mask(params, expected):
    assert decay_mask(params) == expected


# --- hyperparameters -----------------------------------------------------------------------------------------------


def test_every_field_of_the_config_that_is_not_traced_splits_the_program():
    from jaxgpt.train import program

    traced = {"learning_rate", "warmup_steps", "decay_fraction", "final_fraction", "weight_decay", "clip"}
    other = {"schedule": "wsd", "beta1": 0.5, "beta2": 0.5, "epsilon": 1e-3, "clip": None, "warmup_steps": 3}
    for field in dataclasses.fields(OptimizerConfig):
        changed = override(RunConfig(), {f"optimizer.{field.name}": other.get(field.name, 0.5)})
        same = program(changed, "task") == program(RunConfig(), "task")
        assert same == (field.name in traced), field.name
        differs = any(np.asarray(a != b) for a, b in zip(hparams(changed), hparams(RunConfig()), strict=True))
        assert differs == (field.name in traced), field.name


def test_no_clipping_is_an_infinite_norm_and_the_data_seed_follows_the_seed():
    h = hparams(override(RunConfig(), {"optimizer.clip": None, "train.seed": 7}))
    assert (h.clip, h.data_seed) == (np.inf, 7)
    assert hparams(override(RunConfig(), {"train.seed": 7, "train.data_seed": 3})).data_seed == 3
