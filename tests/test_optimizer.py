"""Schedules against their formulas, optimizers against NumPy, and one compiled program for many hyperparameters."""

import dataclasses
import math
from dataclasses import replace as with_
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgpt import RunConfig, build, override
from jaxgpt.config import ModelConfig, OptimizerConfig
from jaxgpt.optimizer import clip_by_norm, decay_mask, ema_init, ema_update, hparams, learning_rate, optimizer

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


# --- optimizers ----------------------------------------------------------------------------------------------------

NAMES = get_args(get_type_hints(OptimizerConfig)["name"])


def adam_in_numpy(config, gradients):
    """Kingma & Ba 2015, algorithm 1: the direction of each step, for the gradients of one tensor."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = config.beta1 * m + (1 - config.beta1) * g, config.beta2 * v + (1 - config.beta2) * g**2
        yield m / (1 - config.beta1**t) / (np.sqrt(v / (1 - config.beta2**t)) + config.epsilon)


def sgd_in_numpy(config, gradients):
    """Each step's direction is the sum of all gradients so far, weighted by momentum^age."""
    for t in range(len(gradients)):
        yield sum(config.momentum ** (t - i) * gradients[i] for i in range(t + 1))


def lion_in_numpy(config, gradients):
    """Chen et al. 2023, algorithm 2."""
    m = 0.0
    for g in gradients:
        yield np.sign(config.beta1 * m + (1 - config.beta1) * g)
        m = config.beta2 * m + (1 - config.beta2) * g


def newton_schulz(matrix):
    """Jordan et al. 2024: five steps of the quintic that draws singular values to about 1."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon_in_numpy(config, gradients):
    """Nesterov momentum with Adam's bias corrections as in NAdam, orthogonalised; Liu et al. 2025, eq. 4."""
    m, beta = 0.0, config.momentum
    for t, g in enumerate(gradients, 1):
        m = beta * m + (1 - beta) * g
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        matrices = [newton_schulz(matrix) for matrix in ahead.reshape(-1, *ahead.shape[-2:])]
        yield 0.2 * math.sqrt(max(ahead.shape[-2:])) * np.asarray(matrices).reshape(ahead.shape)


SHAPES = {
    "a.kernel": (3, 4),
    "a.bias": (4,),
    "table.embedding": (5, 3),
    "norm.scale": (3,),
    "unembed.kernel": (3, 5),
    "layers.0.query.kernel": (4, 4),
    "layers.0.up.kernel": (3, 6),
    "layers.0.down.kernel": (6, 3),
    "layers.0.up.bias": (6,),
    "layers.0.experts.kernel": (2, 3, 4),
    "layers.0.router.kernel": (3, 2),
}
ORTHOGONALISED = ("query", "up", "down", "experts")


def in_numpy(config, gradients, params, rates):
    """Clipping to a global norm, direction, weight decay of kernels, rate; leaves by name, float64."""
    norms = [math.sqrt(sum((g**2).sum() for g in gradient.values())) for gradient in gradients]
    scales = [1.0 if config.clip is None else min(1.0, config.clip / norm) for norm in norms]
    directions = {"adamw": adam_in_numpy, "sgd": sgd_in_numpy, "lion": lion_in_numpy, "muon": adam_in_numpy}
    new = {}
    for name, p in params.items():
        direct = directions[config.name]
        if config.name == "muon" and name.endswith("kernel") and name.split(".")[-2] in ORTHOGONALISED:
            direct = muon_in_numpy
        mine = [gradient[name] * scale for gradient, scale in zip(gradients, scales, strict=True)]
        for step, rate in zip(direct(config, mine), rates, strict=True):
            p = p - rate * (step + (config.weight_decay * p if name.endswith("kernel") else 0.0))
        new[name] = p
    return new


def nested(leaves, dtype=np.float64):
    tree = {}
    for name, leaf in leaves.items():
        *groups, last = name.split(".")
        inner = tree
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = leaf.astype(dtype)
    return tree


def flat(tree):
    """Leaves by name, as NumPy."""
    return {build.param_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) * 10.0 ** rng.integers(-1, 2) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_several_updates_equal_the_algorithm_in_numpy(name):
    rates = [0.1, 0.05, 0.2, 0.01, 0.0, 0.3]
    # Hyperparameters travel as float32, so that both get a decay that is one exactly.
    config = OptimizerConfig(name=name, weight_decay=0.375, beta1=0.8, beta2=0.9, momentum=0.7, epsilon=1e-3)
    start, gradients = draw(0), [draw(seed) for seed in range(1, 7)]
    with jax.enable_x64(True):

        @jax.jit
        def step(gradient, state, params, rate, h):
            updates, state = optimizer(config, rate, h).update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        for clip in (None, 1.0, 100.0):  # never, always and sometimes
            clipped = with_(config, clip=clip)
            h, params = hparams(with_(RunConfig(), optimizer=clipped)), nested(start)
            state = optimizer(config, 0.0, h).init(params)
            for gradient, rate in zip(gradients, rates, strict=True):
                params, state = step(nested(gradient), state, params, rate, h)
            expected = in_numpy(clipped, gradients, start, rates)
            assert flat(params).keys() == expected.keys()
            for leaf, value in flat(params).items():
                assert value.dtype == np.float64
                np.testing.assert_allclose(value, expected[leaf], rtol=1e-9, atol=1e-12, err_msg=leaf)


def step_of(config, gradient, params, rate=1.0, width_ratio=1.0):
    """The first update, by name."""
    made = optimizer(config, rate, hparams(with_(RunConfig(), optimizer=config)), width_ratio)
    return flat(jax.jit(made.update)(gradient, made.init(params), params)[0])


@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (3, 64, 24)])
def test_muon_turns_a_matrix_into_one_whose_directions_are_about_equally_strong(shape):
    gradient = {"layers": {"up": {"kernel": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}}}
    update = step_of(OptimizerConfig(name="muon", weight_decay=0.0, clip=None), gradient, gradient)
    update = update["layers.up.kernel"]
    strengths = np.linalg.svd(update, compute_uv=False) / (0.2 * math.sqrt(64))
    assert strengths.min() > 0.65
    assert strengths.max() < 1.25
    assert math.sqrt((update**2).mean()) == pytest.approx(0.2, rel=0.2)
    # Downhill: along every direction of the gradient, against it.
    u, _, vt = np.linalg.svd(gradient["layers"]["up"]["kernel"], full_matrices=False)
    along = np.einsum("...ij,...ik,...kj->...k", np.swapaxes(vt, -1, -2), np.swapaxes(update, -1, -2), u)
    assert (along < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_scanned_layers_are_updated_as_unrolled_ones(name):
    def first_update(scanned, gradient_of):
        c = ModelConfig(d_model=8, n_layers=3, n_heads=2, context=4, vocab_size=7, bias=True, scan_layers=scanned)
        params = build.init_params(c, 0)
        gradient = jax.tree_util.tree_map_with_path(lambda path, p: gradient_of(build.param_name(path), p), params)
        return step_of(OptimizerConfig(name=name, clip=None), gradient, params, width_ratio=2.0)

    def of_layer(leaf, i):
        return leaf.replace("layers.", f"layers.{i}.", 1)

    rng, noise = np.random.default_rng(0), {}
    one_by_one = first_update(
        False, lambda leaf, p: noise.setdefault(leaf, rng.standard_normal(p.shape).astype(np.float32))
    )
    stacked = first_update(
        True,
        lambda leaf, _: (
            np.stack([noise[of_layer(leaf, i)] for i in range(3)]) if leaf.startswith("layers.") else noise[leaf]
        ),
    )
    for leaf, update in stacked.items():
        parts = {of_layer(leaf, i): update[i] for i in range(3)} if leaf.startswith("layers.") else {leaf: update}
        for one, value in parts.items():
            np.testing.assert_allclose(value, one_by_one.pop(one), rtol=2e-5, atol=1e-6, err_msg=one)
    assert not one_by_one


@pytest.mark.parametrize("name", NAMES)
def test_a_finite_gradient_gives_finite_updates_whatever_its_size(name):
    # What the guard of `train_step` relies on: it looks at the gradient and not at the update.
    config = OptimizerConfig(name=name, clip=None)
    made = optimizer(config, 0.1, hparams(with_(RunConfig(), optimizer=config)))
    params = nested(draw(0), np.float32)
    update = jax.jit(made.update)
    for scale in (0.0, 1e-38, 1e-20, 1.0, 1e15):
        state = made.init(params)
        for gradient_scale in (scale, 1.0, scale):
            gradient = jax.tree.map(lambda p, s=gradient_scale: p * np.float32(s), params)
            updates, state = update(gradient, state, params)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("name", NAMES)
def test_without_gradient_only_the_decay_moves_the_kernels(name):
    params = nested(draw(0), np.float32)
    config = OptimizerConfig(name=name, weight_decay=0.5)
    updates = step_of(config, jax.tree.map(np.zeros_like, params), params, rate=0.1)
    for leaf, p in flat(params).items():
        np.testing.assert_allclose(updates[leaf], -0.05 * p if leaf.endswith(".kernel") else 0 * p, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_compiled_update_serves_all_rates_and_numbers_of_a_run(name):
    config, params = OptimizerConfig(name=name), nested(draw(0), np.float32)
    gradient, compiled = jax.tree.map(lambda p: p * 0.5, params), []

    @jax.jit
    def update(rate, h):
        compiled.append(1)
        made = optimizer(config, rate, h)
        return made.update(gradient, made.init(params), params)[0]

    for rate, settings in [(0.1, {"clip": 0.5, "weight_decay": 0.2}), (0.3, {"clip": None, "weight_decay": 0.0})]:
        settled = with_(config, **settings)
        got = flat(update(jnp.float32(rate), hparams(with_(RunConfig(), optimizer=settled))))
        for leaf, value in step_of(settled, gradient, params, rate=rate).items():
            np.testing.assert_allclose(got[leaf], value, rtol=2e-4, atol=1e-6, err_msg=leaf)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "params", [{"kernel": 1, "w": 0}, [{"kernel": 1}, 0], {"layers": [{"kernel": 1}, {"k": 2}]}, 0]
)
@pytest.mark.parametrize("name", NAMES)
def test_any_pytree_can_be_trained(name, params):
    # Leaves of rank 1 to 3; only a matrix called a layer's kernel is one for Muon.
    params = jax.tree.map(lambda rank: jnp.ones((3,) * (rank + 1)), params)
    config = OptimizerConfig(name=name, weight_decay=0.0, clip=None)
    for leaf in jax.tree.leaves(jax.tree.map(jnp.negative, step_of(config, params, params, width_ratio=4.0))):
        assert (leaf > 0).all()


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


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_can_be_updated(name):
    config = OptimizerConfig(name=name, clip=0.01, weight_decay=0.1)
    h = hparams(with_(RunConfig(), optimizer=config))
    params = nested(draw(0), jnp.bfloat16)
    exact = jax.tree.map(lambda p: p.astype(np.float32), params)
    made = optimizer(config, jnp.float32(0.1), h, 2.0)
    updates, state = jax.jit(made.update)(params, made.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(optax.apply_updates, params, updates))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, made.init(params))
    wide = flat(jax.jit(made.update)(exact, made.init(exact), exact)[0])
    for leaf, update in flat(updates).items():
        # 8 bits; for Muon in five steps of a polynomial (which Jordan et al. 2024 run in bfloat16 on purpose).
        tolerance = (0.15 if name == "muon" else 0.03) * np.abs(wide[leaf]).max()
        np.testing.assert_allclose(update.astype(np.float32), wide[leaf], atol=tolerance, err_msg=leaf)


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


# --- the running mean ----------------------------------------------------------------------------------------------


def test_the_running_mean_is_a_weighted_mean_of_all_parameters_so_far():
    rng, decay = np.random.default_rng(0), 0.6
    trail = rng.standard_normal((21, 3)).astype(np.float32)  # the initial parameters, then those after each update
    ema = ema_init({"w": jnp.asarray(trail[0])})
    for step in range(20):
        ema = ema_update(ema, {"w": jnp.asarray(trail[step + 1])}, decay, jnp.int32(step))
    kept = np.minimum(decay, (1 + np.arange(20)) / (10 + np.arange(20)))  # reaches .6 at step 12.5
    after = np.append(np.cumprod(kept[::-1])[::-1], 1.0)  # what later updates leave of each one's share
    weights = np.append(1.0, 1 - kept) * after
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(ema["w"], weights @ trail.astype(float), rtol=1e-5)


def test_while_the_decay_warms_up_the_first_parameters_fade_with_the_ninth_power_of_time():
    ema = ema_init(jnp.ones(1))
    for step in range(30):
        ema = ema_update(ema, jnp.zeros(1), 0.9999, step)
        # The product of (1 + t) / (10 + t) up to t = step is 9! (step + 1)! / (step + 10)!.
        expected = math.factorial(9) * math.factorial(step + 1) / math.factorial(step + 10)
        np.testing.assert_allclose(ema, expected, rtol=1e-5)


def test_after_the_warm_up_the_running_mean_forgets_by_its_decay():
    ema = ema_init(jnp.ones(1))
    for step in range(1000, 1010):
        ema = ema_update(ema, jnp.zeros(1), 0.9, step)
    np.testing.assert_allclose(ema, 0.9**10, rtol=1e-6)
    np.testing.assert_array_equal(ema_update(jnp.ones(1), jnp.full(1, 3.0), 0.0, 5), [3.0])


def test_the_running_mean_of_bfloat16_parameters_moves_by_less_than_their_resolution():
    first = jnp.ones(1, jnp.bfloat16)
    ema, params = ema_init({"w": first}), {"w": first + jnp.bfloat16(2**-7)}  # the next number
    ema = ema_update(ema, params, 0.99, 10_000)
    assert ema["w"].dtype == np.float32
    np.testing.assert_allclose(ema["w"] - 1, 0.01 * 2**-7, rtol=1e-2)


def test_the_running_mean_does_not_share_memory_with_the_parameters():
    params = jnp.ones(1000)
    assert ema_init(params).unsafe_buffer_pointer() != params.unsafe_buffer_pointer()


# --- hyperparameters -----------------------------------------------------------------------------------------------


def test_every_field_of_the_config_that_is_not_traced_splits_the_program():
    from jaxgpt.step import program

    traced = {"learning_rate", "warmup_steps", "decay_fraction", "final_fraction", "weight_decay", "clip"}
    other = {"schedule": "wsd", "epsilon": 1e-3, "clip": None, "warmup_steps": 3, "name": "sgd"}
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
