import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgpt.build import create, graphdef, init_params, param_name
from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.taps import intermediates

KINDS = ["lstm", "rnn"]


def tiny(kind, **fields):
    return ModelConfig(architecture=kind, d_model=6, n_layers=2, n_heads=1, vocab_size=11, context=9, **fields)


def tokens(c, batch=2, length=9, seed=0):
    return np.random.default_rng(seed).integers(0, c.vocab_size, (batch, length))


def drawn(c, seed=0):
    """A model with every parameter drawn, biases and scales too, and its parameters by name, in float64."""
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) * 0.5, p.dtype), init_params(c, 0))
    named = {param_name(path): np.asarray(leaf, float) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return nnx.merge(graphdef(c), state), named


# --- what it computes ----------------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_sequence(c, params, row):
    """Outputs [T, V] and intermediates of one sequence, position by position through all layers, in float64."""

    def norm(name, x):
        if c.norm == "none":
            return x
        centred = x - x.mean() if c.norm == "layernorm" else x
        y = centred / math.sqrt((centred**2).mean() + c.norm_epsilon) * params[f"{name}.scale"]
        return y + params[f"{name}.bias"] if c.bias and c.norm == "layernorm" else y

    width = c.d_model
    state = [(np.zeros(width), np.zeros(width)) for _ in range(c.n_layers)]
    outputs, seen = [], {name: [] for name in intermediates(c)}
    for item in row:
        x = item @ params["read_in.kernel"] if c.d_input else params["embed.embedding"][item]
        x = x + params["read_in.bias"] if c.d_input and c.bias else x
        seen["embedding"].append(x)
        for i, (memory, h) in enumerate(state):
            seen[f"layers.{i}.residual"].append(x)
            cell, u = f"layers.{i}.cell", norm(f"layers.{i}.norm", x)
            a = u @ params[f"{cell}.dense_i.kernel"] + h @ params[f"{cell}.dense_h.kernel"]
            if c.architecture == "rnn":
                h = np.tanh(a + params[f"{cell}.dense_i.bias"])
            else:
                a = a + params[f"{cell}.dense_h.bias"]
                enter, forget, new, leave = (a[j * width : (j + 1) * width] for j in range(4))
                memory = sigmoid(forget) * memory + sigmoid(enter) * np.tanh(new)
                h = sigmoid(leave) * np.tanh(memory)
            state[i] = (memory, h)
            seen[f"layers.{i}.out"].append(h)
            x = x + h
        x = norm("final_norm", x)
        seen["final"].append(x)
        if c.d_output:
            y = x @ params["read_out.kernel"] + (params["read_out.bias"] if c.has_output_bias else 0)
        elif c.tie_output:
            y = params["embed.embedding"] @ x
        else:
            y = x @ params["unembed.kernel"] + (params["unembed.bias"] if c.has_output_bias else 0)
        outputs.append(c.logit_cap * np.tanh(y / c.logit_cap) if c.logit_cap else y)
    return np.array(outputs), {name: np.array(values) for name, values in seen.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True, "norm_epsilon": 0.1},
        {"norm": "rmsnorm", "tie_output": True},
        {"norm": "none", "output_bias": True, "logit_cap": 0.7},
        {"d_input": 3, "d_output": 2, "bias": True},
    ],
    ids=lambda fields: ",".join(fields) or "plain",
)
def test_outputs_and_intermediates_are_those_of_the_recurrence_written_out(kind, fields):
    c = tiny(kind, **fields)
    model, params = drawn(c)
    inputs = np.random.default_rng(0).standard_normal((2, 9, 3)).astype(np.float32) if c.d_input else tokens(c)
    outputs, seen = model.inspect(inputs, keep=intermediates(c))
    rows = [slow_sequence(c, params, row) for row in inputs]
    np.testing.assert_allclose(outputs, [out for out, _ in rows], rtol=1e-4, atol=1e-5)
    assert set(seen) == set(intermediates(c))
    for name, value in seen.items():
        np.testing.assert_allclose(value, [kept[name] for _, kept in rows], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind):
    with jax.enable_x64(True):
        c = tiny(kind, param_dtype="float64")
        state = nnx.split(drawn(c)[0])[1]
        target_BxTxV = np.random.default_rng(5).standard_normal((2, 9, 11))

        @jax.jit
        def loss(state):
            return jnp.sum((nnx.merge(graphdef(c), state)(tokens(c)) - target_BxTxV) ** 2)

        gradient = jax.grad(loss)(state)
        rng = np.random.default_rng(3)
        for _ in range(5):
            direction = jax.tree.map(lambda p: rng.standard_normal(p.shape), state)
            up, down = (loss(jax.tree.map(lambda p, d, h=h: p + h * d, state, direction)) for h in (1e-6, -1e-6))
            along = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
            assert (up - down) / 2e-6 == pytest.approx(along, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_activations_changes_no_gradient(kind):
    def gradient(c):
        loss = lambda params: jnp.sum(nnx.merge(graphdef(c), params)(tokens(c)) ** 2)  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(loss))(init_params(c, 0)))

    for plain, again in zip(gradient(tiny(kind)), gradient(tiny(kind, remat=True)), strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_compute_is_close_to_float32(kind):
    exact, half = (
        np.asarray(create(tiny(kind, compute_dtype=dtype))(tokens(tiny(kind))), float)
        for dtype in ("float32", "bfloat16")
    )
    assert create(tiny(kind, compute_dtype="bfloat16"))(tokens(tiny(kind))).dtype == jnp.bfloat16
    assert np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def test_the_lstm_sums_its_memory_in_float32():
    c = tiny("lstm", compute_dtype="bfloat16")
    model = create(c)
    _, cache = model.decode(tokens(c), model.empty_cache(2, 9))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cells_products_have_the_configs_precision(kind):
    c = tiny(kind, matmul_precision="highest")
    lowered = jax.jit(lambda ids: create(c)(ids)).lower(tokens(c)).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 3  # of input, state and output
    assert all("HIGHEST" in line for line in products)


# --- what reads what -----------------------------------------------------------------------------------------------


def reads(c, **how):
    """[T, T] bool: whether output t depends on input s, by gradient."""
    c = dataclasses.replace(c, d_input=3, d_output=1)
    model, _ = drawn(c)
    x_TxI = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    jacobian_TxTxI = jax.jacobian(lambda x: model(x[None], **how)[0, :, 0])(x_TxI)
    return np.abs(jacobian_TxTxI).max(axis=-1) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_reads_its_own_and_every_earlier_input_and_no_later_one(kind):
    np.testing.assert_array_equal(reads(tiny(kind)), np.tri(7, dtype=bool))


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_position_is_read_by_itself_alone(kind):
    mask_T = np.array([1, 1, 0, 1, 1, 0, 1], bool)
    expected = np.tri(7, dtype=bool) & (mask_T[None] | np.eye(7, dtype=bool))
    np.testing.assert_array_equal(reads(tiny(kind), key_mask_BxS=mask_T[None]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_read_as_if_it_stood_alone(kind):
    c = tiny(kind)
    model, _ = drawn(c)
    segment_BxT = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    together = model(tokens(c), segment_BxT=segment_BxT)
    for row, segment_T in enumerate(segment_BxT):
        alone = [model(tokens(c)[row : row + 1, segment_T == s])[0] for s in np.unique(segment_T)]
        np.testing.assert_allclose(together[row], np.concatenate(alone), rtol=1e-5, atol=1e-6)


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_in_any_pieces_is_the_full_pass(kind, dtype):
    c = tiny(kind, compute_dtype=dtype)
    model, ids = drawn(c)[0], tokens(c)
    decode, cache, pieces = jax.jit(lambda ids, cache: model.decode(ids, cache)), model.empty_cache(2, 9), []
    for piece in np.split(ids, [4, 5, 6, 8], axis=1):
        logits, cache = decode(piece, cache)
        pieces.append(logits)
    assert int(cache.length) == 9
    atol = 1e-5 if dtype == "float32" else 0.05
    full, decoded = (np.asarray(a, float) for a in (model(ids), jnp.concatenate(pieces, axis=1)))
    np.testing.assert_allclose(decoded, full, atol=atol)


# --- interventions, dropout, initial values ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_layer_output_is_what_the_stream_gets(kind):
    c = tiny(kind)
    _, seen = create(c).inspect(
        tokens(c), keep=["layers.1.residual", "layers.1.out", "embedding"], replace={"layers.0.out": lambda h: 0 * h}
    )
    np.testing.assert_array_equal(seen["layers.1.residual"], seen["embedding"])
    assert float(jnp.abs(seen["layers.1.out"]).max()) > 0


def test_an_intermediate_of_the_transformer_is_refused_with_the_names_source():
    with pytest.raises(BadInput, match=r"^'layers.0.attention.out' is not an intermediate of this model"):
        create(tiny("lstm")).inspect(tokens(tiny("lstm")), keep=["layers.0.attention.out"])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_zeroes_its_share_by_key_and_nothing_without_one(kind):
    c = tiny(kind, dropout=0.25)
    model, plain, ids = create(c), create(tiny(kind)), tokens(tiny(kind), 32)
    names = ["embedding", "layers.0.residual", "layers.0.out", "layers.1.residual"]
    np.testing.assert_array_equal(model(ids), plain(ids))
    _, seen = model.inspect(ids, key=jax.random.key(0), keep=names)
    dropped = np.asarray(seen["layers.0.residual"] == 0)
    assert dropped.mean() == pytest.approx(0.25, abs=0.05)  # 1728 units: a standard error of .01
    np.testing.assert_allclose(
        seen["layers.0.residual"], np.where(dropped, 0, seen["embedding"] / 0.75), rtol=1e-6, atol=0
    )
    added = np.asarray(seen["layers.1.residual"] - seen["layers.0.residual"])
    scaled = np.abs(added - seen["layers.0.out"] / 0.75) < 1e-5
    assert scaled.mean() == pytest.approx(0.75, abs=0.05)
    np.testing.assert_allclose(added[~scaled], 0, atol=1e-6)
    np.testing.assert_array_equal(model(ids, key=jax.random.key(0)), model(ids, key=jax.random.key(0)))
    assert float(jnp.abs(model(ids, key=jax.random.key(1)) - model(ids, key=jax.random.key(0))).max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("lstm", {"dense_i.kernel": (6, 24), "dense_h.kernel": (6, 24), "dense_h.bias": (24,)}),
        ("rnn", {"dense_i.kernel": (6, 6), "dense_i.bias": (6,), "dense_h.kernel": (6, 6)}),
    ],
)
def test_parameters_have_names_by_layer_and_cell(kind, cell):
    c = dataclasses.replace(tiny(kind), n_layers=1)
    named = {param_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(create(c)))}
    assert named == {
        "embed.embedding": (11, 6),
        "layers.0.norm.scale": (6,),
        **{f"layers.0.cell.{name}": shape for name, shape in cell.items()},
        "final_norm.scale": (6,),
        "unembed.kernel": (6, 11),
    }


def test_a_new_lstm_remembers():
    """The forget gate starts at sigmoid(1), not 1/2 (Jozefowicz et al. 2015, section 2.2)."""
    c = tiny("lstm")
    params = {param_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(init_params(c, 0))}
    np.testing.assert_array_equal(params["layers.1.cell.dense_h.bias"], np.repeat([0, 1, 0, 0], 6))


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_near_ln_vocabulary_and_learns_to_repeat_what_it_read_before(kind):
    """Tokens of period 3: the next one is known from the past and not from the last token alone."""
    c = ModelConfig(architecture=kind, d_model=32, n_layers=2, n_heads=1, vocab_size=4, context=12)
    starts_BxP = np.random.default_rng(0).integers(0, 4, (64, 3))
    ids = np.tile(starts_BxP, (1, 4))
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits_BxTxV = nnx.merge(graphdef(c), params)(ids[:, :-1])
        losses_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, ids[:, 1:])
        return losses_BxT[:, 2:].mean(), losses_BxT.mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, moments = carry
            (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=120)

    params = jax.tree.map(jnp.asarray, init_params(c, 0))
    assert float(loss(params)[1]) == pytest.approx(math.log(4), abs=0.05)
    assert float(train(params)[1][-1]) < 0.05 * math.log(4)
