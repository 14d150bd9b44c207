import math
import re
from dataclasses import replace as with_

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model as reference
from flax import nnx

from jaxgpt import build, model, taps
from jaxgpt.config import BadInput, ModelConfig

# Tiny, and of equal shapes and dtype wherever possible: what runs without jit then compiles once for all tests.
B, T, V = 2, 7, 11
TINY = ModelConfig(d_model=12, n_layers=2, n_heads=3, context=8, vocab_size=V)
TINY64 = with_(TINY, param_dtype="float64")
TOKENS_BxT = np.random.default_rng(1).integers(0, V, (B, T), np.int32)
VECTORS_BxTxI = np.random.default_rng(2).normal(size=(B, T, 5))
# Row 0 hides one key; row 1 hides the first two, so that its first query sees no key when causal.
KEY_MASK_BxS = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], bool)


@pytest.fixture(autouse=True)
def _ranks_are_explicit():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def given(**fields):
    return fields


def named(tree):
    """A state or a gradient as {'layers.0.mlp.up.kernel': array}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {build.param_name(path): np.asarray(leaf) for path, leaf in leaves}


def random_params(c, seed=0):
    """Large random parameters; biases and scales too, which start at 0 and 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, p):
        centre = 1.0 if build.param_name(path).endswith("scale") else 0.0
        return jnp.asarray(centre + 0.35 * rng.standard_normal(p.shape), p.dtype)

    return jax.tree_util.tree_map_with_path(leaf, build.init_params(c, 0))


def random_model(c, seed=0):
    return nnx.merge(build.graphdef(c), random_params(c, seed))


def inputs_of(c):
    return TOKENS_BxT if c.d_input is None else VECTORS_BxTxI


def assert_close(actual, expected, tolerance):
    """Within `tolerance` of the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


# --- every option against the slow reference -------------------------------------------------------------------

AGAINST_REFERENCE = {
    "as GPT-2": given(positions="learned", bias=True, tie_output=True),
    "as Llama": given(positions="rope", norm="rmsnorm", mlp="swiglu"),
    "as Vaswani's encoder": given(
        positions="sinusoidal", norm_placement="post", mlp="relu", bias=True, causal=False, key_mask=True
    ),
    "as GPT-NeoX": given(positions="rope", norm_placement="parallel", bias=True, key_mask=True),
    "alibi, explicit widths": given(
        positions="alibi", n_heads=3, d_head=6, d_mlp=10, norm="rmsnorm", norm_placement="post", key_mask=True
    ),
    "alibi, both directions": given(
        positions="alibi", causal=False, norm="rmsnorm", norm_placement="parallel", mlp="swiglu", bias=True
    ),
    "in-context regression": given(
        positions="none", attention="linear", norm="none", mlp="none", d_input=5, d_output=2, causal=False,
        key_mask=True,
    ),
    "linear, causal": given(
        positions="rope", attention="linear", d_input=5, bias=True, mlp="relu", norm_placement="parallel",
        norm="none", key_mask=True,
    ),
    "linear, post": given(
        positions="learned", attention="linear", d_output=2, bias=True, norm_placement="post", norm="none"
    ),
    "attention only": given(positions="none", mlp="none", n_layers=1, d_input=5),
    "parallel attention only": given(positions="none", mlp="none", norm_placement="parallel", n_layers=1),
    "as Pythia": given(
        rope_fraction=0.5, rope_base=500.0, norm_placement="parallel", mlp="gelu_exact", bias=True, output_bias=False
    ),
    "as Gemma 2 and Primer": given(
        n_heads=6, n_kv_heads=2, logit_cap=1.5, mlp="relu2", norm="rmsnorm", norm_epsilon=0.1, tie_output=True
    ),
    "grouped, normed, masked": given(
        n_heads=6, n_kv_heads=1, qk_norm=True, output_bias=True, key_mask=True, causal=False, d_head=4
    ),
    "linear, grouped, normed": given(n_heads=6, n_kv_heads=3, qk_norm=True, attention="linear", norm="rmsnorm"),
    "muP": given(parametrization="mup", base_width=4, bias=True),
    "muP, heads of one width, a read-out": given(parametrization="mup", base_width=24, d_head=4, d_output=2),
    "no layers": given(positions="sinusoidal", n_layers=0, d_output=2, d_input=5, bias=True),
}  # fmt: skip


@pytest.mark.parametrize("fields", AGAINST_REFERENCE.values(), ids=AGAINST_REFERENCE)
@pytest.mark.usefixtures("x64")
def test_outputs_and_every_intermediate_equal_the_reference_in_float64(fields):
    fields = dict(fields)
    key_mask_BxS = KEY_MASK_BxS if fields.pop("key_mask", False) else None
    c = with_(TINY64, **fields)
    params = random_params(c)
    asked = taps.intermediates(c)
    outputs, seen = nnx.merge(build.graphdef(c), params).inspect(inputs_of(c), key_mask_BxS, keep=asked)
    expected, expected_seen = reference.forward(c, named(params), inputs_of(c), key_mask_BxS)
    assert outputs.dtype == np.float64
    assert_close(outputs, expected, 1e-10)
    assert set(seen) == set(asked) == set(expected_seen)
    for name in asked:
        assert_close(seen[name], expected_seen[name], 1e-10)


def test_every_value_of_every_option_of_the_model_is_among_the_cases():
    covered = {(name, value) for case in AGAINST_REFERENCE.values() for name, value in case.items()}
    covered |= {(name, TINY.__dict__[name]) for case in AGAINST_REFERENCE.values() for name in vars(TINY).keys() - case}
    options = given(
        positions=["learned", "sinusoidal", "rope", "alibi", "none"], attention=["softmax", "linear"],
        norm=["layernorm", "rmsnorm", "none"], norm_placement=["pre", "post", "parallel"],
        mlp=["gelu", "gelu_exact", "relu", "relu2", "swiglu", "none"], causal=[True, False], bias=[True, False],
        tie_output=[True, False], d_input=[None, 5], d_output=[None, 2], d_head=[None, 6], d_mlp=[None, 10],
        n_kv_heads=[None, 1, 2], qk_norm=[True, False], rope_fraction=[1.0, 0.5], output_bias=[None, True, False],
        logit_cap=[None, 1.5], parametrization=["standard", "mup"],
    )  # fmt: skip
    assert {(name, value) for name, values in options.items() for value in values} <= covered


def test_layernorm_is_accurate_in_float32_where_the_mean_is_large():
    x_BxTxD = np.random.default_rng(6).normal(1e3, 1.0, (B, T, 12)).astype(np.float32)
    m = build.create(with_(TINY, n_layers=0))
    _, seen = m.inspect(TOKENS_BxT, keep=["final"], replace={"embedding": x_BxTxD})
    x_BxTxD = x_BxTxD.astype(np.float64)
    expected_BxTxD = (x_BxTxD - x_BxTxD.mean(-1, keepdims=True)) / x_BxTxD.std(-1, keepdims=True)
    assert_close(seen["final"], expected_BxTxD, 1e-3)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 20])
def test_alibi_slopes_equal_the_reference_for_any_number_of_heads(n_heads):
    bias_HxTxT = np.asarray(model.alibi_HxTxS(n_heads, np.arange(3), np.arange(3)))
    np.testing.assert_allclose(-bias_HxTxT[:, 2, 1], [reference._slope(h, n_heads) for h in range(n_heads)], rtol=1e-6)


def test_alibi_slopes_of_eight_heads_are_those_printed_in_the_paper():
    np.testing.assert_array_equal(
        -np.asarray(model.alibi_HxTxS(8, np.arange(2), np.arange(2)))[:, 1, 0], [2.0**-h for h in range(1, 9)]
    )


# --- who sees whom ---------------------------------------------------------------------------------------------


def jacobian(c, key_mask_BxS=None, seed=0):
    """|d output_t / d input_s| summed over widths, [T, S], by reverse mode."""
    m = random_model(c, seed)
    mask = None if key_mask_BxS is None else key_mask_BxS[:1]
    jac_TxVxSxI = jax.jit(jax.jacrev(lambda x_TxI: m(x_TxI[None], mask)[0]))(VECTORS_BxTxI[0].astype(np.float32))
    assert np.isfinite(jac_TxVxSxI).all()
    return np.abs(jac_TxVxSxI).sum(axis=(1, 3))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "alibi", "none"])
def test_no_output_depends_on_a_later_input_and_each_on_all_earlier_ones(positions):
    influence_TxS = jacobian(with_(TINY, positions=positions, mlp="relu", d_input=5, d_output=2))
    later = np.triu(np.ones((T, T), bool), k=1)
    assert (influence_TxS[later] == 0).all()
    assert (influence_TxS[~later] > 0).all()


def test_without_causality_each_output_depends_on_every_input():
    assert (jacobian(with_(TINY, causal=False, mlp="none", d_input=5, d_output=2)) > 0).all()


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_a_masked_key_influences_its_own_output_only(attention):
    influence_TxS = jacobian(
        with_(TINY, attention=attention, causal=False, mlp="none", d_input=5, d_output=2), KEY_MASK_BxS
    )
    masked = ~KEY_MASK_BxS[:1] & ~np.eye(T, dtype=bool)
    assert (influence_TxS[masked] == 0).all()
    assert (influence_TxS[~masked] > 0).all()


@pytest.mark.parametrize("fields", [given(attention="linear"), given(), given(attention_kernel="fused")], ids=str)
def test_a_query_that_sees_no_key_gets_zeros_and_finite_gradients(fields):
    c = with_(TINY, n_layers=1, mlp="none", positions="none", **fields)

    @jax.jit
    def run(m):
        def loss(m):
            outputs_BxTxV, seen = m.inspect(TOKENS_BxT, KEY_MASK_BxS, keep=["layers.0.attention.heads"])
            return (outputs_BxTxV**2).sum(), seen["layers.0.attention.heads"]

        return jax.grad(loss, has_aux=True)(m)

    gradient, heads_BxTxHxK = run(random_model(c))
    blind_BxT = ~np.tril(np.broadcast_to(KEY_MASK_BxS[:, None], (B, T, T))).any(axis=-1)
    assert blind_BxT.sum() == 2
    np.testing.assert_array_equal((np.asarray(heads_BxTxHxK) == 0).all(axis=(-2, -1)), blind_BxT)
    for g in named(gradient).values():
        assert np.isfinite(g).all()
        assert np.abs(g).max() > 0


ORDER = np.random.default_rng(3).permutation(T)


@pytest.mark.parametrize(
    ("fields", "equivariant"),
    [
        (given(positions="none", causal=False), True),
        (given(positions="none", causal=False, attention="linear"), True),
        (given(positions="none", causal=True), False),
        (given(positions="rope", causal=False), False),
        (given(positions="alibi", causal=False), False),
        (given(positions="learned", causal=False), False),
        (given(positions="sinusoidal", causal=False), False),
    ],
    ids=str,
)
@pytest.mark.usefixtures("x64")
def test_permuting_the_input_permutes_the_output_only_without_positions_and_mask(fields, equivariant):
    m = random_model(with_(TINY64, **fields))
    difference = np.abs(m(TOKENS_BxT[:, ORDER]) - m(TOKENS_BxT)[:, ORDER]).max()
    assert difference < 1e-12 if equivariant else difference > 1e-3


def test_a_sequence_longer_than_the_position_table_is_refused_and_others_are_not():
    tokens_BxT = np.zeros((B, TINY.context + 1), int)
    with pytest.raises(BadInput, match=r"9 positions .*model\.context=8"):
        random_model(with_(TINY, positions="learned", n_layers=0))(tokens_BxT)
    assert random_model(with_(TINY, positions="sinusoidal", n_layers=0))(tokens_BxT).shape == (B, 9, V)


# --- dtypes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [given(mlp="swiglu"), given(positions="alibi", norm="rmsnorm", bias=True)], ids=str)
def test_bfloat16_compute_is_close_to_float32_and_keeps_float32_parameters(fields):
    c = with_(TINY, **fields)
    rough = nnx.merge(build.graphdef(with_(c, compute_dtype="bfloat16")), random_params(c))
    exact_BxTxV, rough_BxTxV = (jax.jit(lambda m: m(TOKENS_BxT))(m) for m in (random_model(c), rough))
    assert (exact_BxTxV.dtype, rough_BxTxV.dtype) == (jnp.float32, jnp.bfloat16)
    assert {p.dtype for p in named(nnx.state(rough)).values()} == {np.dtype("float32")}
    error = np.abs(np.asarray(rough_BxTxV, np.float32) - exact_BxTxV).max() / np.std(exact_BxTxV)
    assert 1e-4 < error < 0.1  # bfloat16's epsilon is 0.008


def test_parameters_have_the_dtype_that_the_config_names():
    params = build.init_params(with_(TINY, param_dtype="bfloat16", scan_layers=True, bias=True), 0)
    assert {p.dtype for p in named(params).values()} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("field", ["param_dtype", "compute_dtype"])
def test_float64_without_x64_is_refused_instead_of_silently_becoming_float32(field):
    with pytest.raises(BadInput, match=rf"model\.{field}=float64 needs JAX_ENABLE_X64=1"):
        build.create(with_(TINY, n_layers=0, **{field: "float64"}))


# --- the same function, computed in other ways -----------------------------------------------------------------


def value_gradients_intermediates(c, key_mask_BxS=None, keep=()):
    """Outputs, gradients by unrolled parameter name, and intermediates, from `create(c, seed=0)`."""

    @jax.jit
    def run(m):
        def loss(m):
            outputs, seen = m.inspect(inputs_of(c), key_mask_BxS, keep=keep)
            return (outputs * jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)).sum(), (outputs, seen)

        (_, (outputs, seen)), gradient = jax.value_and_grad(loss, has_aux=True)(m)
        return outputs, gradient, seen

    outputs, gradient, seen = run(build.create(c, seed=0))
    return outputs, unrolled(c, named(gradient)), seen


def unrolled(c, params):
    """The parameters of a scanned model under the names of an unrolled one."""
    if not c.scan_layers:
        return params
    outside = {name: p for name, p in params.items() if not name.startswith("layers.")}
    inside = {name: p for name, p in params.items() if name.startswith("layers.")}
    return outside | {n.replace("layers", f"layers.{i}", 1): p[i] for n, p in inside.items() for i in range(c.n_layers)}


def assert_same(one, other, tolerance):
    for a, b in zip(one, other, strict=True):
        a, b = (x if isinstance(x, dict) else {"outputs": x} for x in (a, b))
        assert set(a) == set(b)
        for name in a:
            assert_close(a[name], b[name], tolerance)


@pytest.fixture(scope="module")
def plain_run():
    with jax.enable_x64(True):
        c = with_(TINY64, bias=True, n_heads=6, n_kv_heads=2, qk_norm=True)
        return c, value_gradients_intermediates(c, KEY_MASK_BxS, taps.intermediates(c))


@pytest.mark.parametrize("fields", [given(remat=True), given(scan_layers=True, remat=True)], ids=str)
@pytest.mark.usefixtures("x64")
def test_scan_and_remat_change_no_output_gradient_or_intermediate(fields, plain_run):
    c, expected = plain_run
    actual = value_gradients_intermediates(with_(c, **fields), KEY_MASK_BxS, taps.intermediates(c))
    assert_same(actual, expected, 1e-13)


def test_remat_really_recomputes_and_scan_really_scans():
    def program(**fields):
        m = build.create(with_(TINY, **fields))
        return str(jax.make_jaxpr(jax.grad(lambda m: m(TOKENS_BxT).sum()))(m))

    assert "remat" in program(remat=True)
    assert "scan" in program(scan_layers=True)
    assert not re.search("remat|scan", program())


@pytest.fixture
def fused_calls(monkeypatch):
    calls, fused = [], jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("fields", "key_mask_BxS"),
    [
        (given(positions="alibi"), KEY_MASK_BxS),
        (given(positions="rope", d_head=6, causal=False), None),
        (given(n_heads=2, n_kv_heads=1, parametrization="mup", base_width=4), None),
    ],
    ids=["alibi, causal, key mask", "rope, both directions", "grouped queries, muP's scale"],
)
def test_fused_attention_equals_plain_in_outputs_and_gradients(fields, key_mask_BxS, fused_calls):
    c = with_(TINY, mlp="none", n_layers=1, **fields)
    expected = value_gradients_intermediates(with_(c, attention_kernel="plain"), key_mask_BxS)
    assert not fused_calls
    actual = value_gradients_intermediates(with_(c, attention_kernel="fused"), key_mask_BxS)
    assert fused_calls
    assert_same(actual, expected, 2e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("fields", "kernel"),
    [
        (given(d_model=32, n_heads=2), "cudnn"),
        (given(d_model=32, n_heads=2, causal=False), "cudnn"),
        (given(d_model=24, n_heads=2), "xla"),  # heads of 12
        (given(d_model=32, n_heads=2, positions="alibi"), "xla"),
        (given(d_model=32, n_heads=2, compute_dtype="float32"), "xla"),
        (given(d_model=32, n_heads=2, matmul_precision="highest"), None),
        (given(d_model=32, n_heads=2, attention_kernel="plain"), None),
        (given(d_model=32, n_heads=2, n_kv_heads=1), "cudnn"),
    ],
    ids=str,
)
def test_on_a_gpu_attention_takes_the_kernel_that_its_config_allows(monkeypatch, fields, kernel, masked):
    """Traced with XLA's kernel in cuDNN's place, which is not here; cuDNN wants a mask of all [B, 1, T, S]."""
    asked, fused = [], jax.nn.dot_product_attention

    def record(*arrays, mask, implementation, **more):
        asked.append(implementation)
        assert (mask is not None and mask.shape == (2, 1, 16, 16)) == masked
        return fused(*arrays, mask=mask, implementation="xla", **more)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    c = ModelConfig(n_layers=1, context=16, vocab_size=32, **fields)
    key_mask_BxS = jnp.ones((2, 16), bool) if masked else None
    out = jax.eval_shape(lambda: model.Transformer(c)(jnp.zeros((2, 16), jnp.int32), key_mask_BxS))
    assert out.shape == (2, 16, 32)
    assert out.dtype == (jnp.float32 if "compute_dtype" in fields else jnp.bfloat16)
    assert asked == ([kernel] if kernel else [])


def test_asking_for_the_pattern_leaves_the_fused_kernel_and_asking_for_heads_does_not(fused_calls):
    m = build.create(with_(TINY, attention_kernel="fused"))

    def calls(**asked):
        fused_calls.clear()
        jax.eval_shape(lambda: m.inspect(TOKENS_BxT, **asked))
        return len(fused_calls)

    assert calls() == calls(keep=["layers.0.attention.heads"]) == TINY.n_layers
    # All layers leave it: one that stayed would differ in rounding from layer to layer.
    assert calls(keep=["layers.0.attention.pattern"]) == 0
    assert calls(replace={"layers.1.attention.pattern": lambda p: p}) == 0


# --- looking inside --------------------------------------------------------------------------------------------

SHAPES = {
    "residual": (B, T, 12), "attention.pattern": (B, 3, T, T), "attention.heads": (B, T, 3, 6),
    "attention.out": (B, T, 12), "residual_mid": (B, T, 12), "mlp.pre": (B, T, 10), "mlp.hidden": (B, T, 10),
    "mlp.out": (B, T, 12),
}  # fmt: skip


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("fields", [given(), given(norm_placement="parallel"), given(mlp="none")], ids=str)
def test_the_list_of_intermediates_is_what_inspect_keeps_with_the_documented_shapes(fields, scan_layers):
    c = with_(TINY, **(given(d_head=6, d_mlp=10, scan_layers=scan_layers) | fields))
    names = taps.intermediates(c)
    assert len(set(names)) == len(names)
    seen = jax.eval_shape(lambda: build.create(c).inspect(TOKENS_BxT, keep=names)[1])
    assert set(seen) == set(names)
    for name in names:
        assert (
            seen[name].shape
            == (SHAPES | {"embedding": (B, T, 12), "final": (B, T, 12)})[re.sub(r"layers\.\d+\.", "", name)]
        )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_inspect_keeps_what_was_asked_and_nothing_else(scan_layers):
    m = build.create(with_(TINY, scan_layers=scan_layers))
    asked = {"layers.0.mlp.out", "layers.1.residual", "final"}
    kept = jax.eval_shape(lambda: m.inspect(TOKENS_BxT, keep=asked, replace={"layers.1.mlp.out": jnp.sin})[1])
    assert set(kept) == asked


@pytest.mark.parametrize("fields", [given(), given(scan_layers=True), given(attention_kernel="fused")], ids=str)
def test_unasked_intermediates_cost_nothing(fields):
    m = build.create(with_(TINY, **fields))

    def program(apply):
        return jax.jit(lambda m, tokens_BxT: apply(m, tokens_BxT)).lower(m, TOKENS_BxT).as_text()

    called = program(lambda m, x: m(x))
    assert called == program(lambda m, x: m.inspect(x)[0])
    assert called == program(lambda m, x: m.inspect(x, keep=["layers.0.residual"])[0])  # kept, then not used
    assert called != program(lambda m, x: m.inspect(x, keep=["layers.0.residual"]))
    assert called != program(lambda m, x: m.inspect(x, replace={"layers.0.residual": jnp.sin})[0])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.usefixtures("x64")
def test_replacing_intermediates_by_their_own_values_changes_no_bit(scan_layers):
    c = with_(TINY64, scan_layers=scan_layers)
    m, names = random_model(c), taps.intermediates(c)
    outputs_BxTxV, seen = m.inspect(TOKENS_BxT, keep=names)
    again_BxTxV, seen_again = m.inspect(TOKENS_BxT, keep=names, replace=seen)
    np.testing.assert_array_equal(outputs_BxTxV, again_BxTxV)
    for name in names:
        np.testing.assert_array_equal(seen[name], seen_again[name])


@pytest.mark.parametrize("fields", [given(), given(attention_kernel="fused")], ids=str)
@pytest.mark.usefixtures("x64")
def test_zeroing_a_head_equals_zeroing_its_rows_of_the_output_matrix(fields):
    c, head = with_(TINY64, **fields), 1
    m = random_model(c)
    intact_BxTxV = m(TOKENS_BxT)
    ablated_BxTxV, _ = m.inspect(
        TOKENS_BxT, replace={"layers.1.attention.heads": lambda z_BxTxHxK: z_BxTxHxK.at[:, :, head].set(0)}
    )
    m.layers[1].attention.out.kernel[head * c.head_width : (head + 1) * c.head_width] = 0
    assert_close(ablated_BxTxV, m(TOKENS_BxT), 1e-13)
    assert np.abs(ablated_BxTxV - intact_BxTxV).max() > 0.1


@pytest.mark.parametrize(("name", "as_function"), [("residual", False), ("attention.pattern", True)])
@pytest.mark.usefixtures("x64")
def test_a_replacement_acts_in_exactly_the_named_layer_scanned_or_not(name, as_function):
    names = taps.intermediates(TINY64)
    new = np.random.default_rng(4).normal(size=SHAPES[name])
    by_new = {f"layers.0.{name}": (lambda _: new) if as_function else new}
    seen, scanned_seen, before = (
        build.create(c).inspect(TOKENS_BxT, keep=names, replace=replace)[1]
        for c, replace in [(TINY64, by_new), (with_(TINY64, scan_layers=True), by_new), (TINY64, {})]
    )
    np.testing.assert_array_equal(seen[f"layers.0.{name}"], new)
    for each in names:
        assert_close(scanned_seen[each], seen[each], 1e-13)
    changed = [each for each in names if np.abs(before[each] - seen[each]).max() > 0]
    assert changed == names[names.index(f"layers.0.{name}") :]  # nothing before it, all after it


@pytest.mark.usefixtures("x64")
def test_the_embedding_and_the_final_stream_can_be_replaced_too():
    m = random_model(TINY64)
    zeros_BxTxD = np.zeros((B, T, 12))
    out_BxTxV, _ = m.inspect(TOKENS_BxT, replace={"final": zeros_BxTxD})
    assert (np.asarray(out_BxTxV) == 0).all()
    _, seen = m.inspect(TOKENS_BxT, keep=["layers.0.residual"], replace={"embedding": zeros_BxTxD})
    assert (np.asarray(seen["layers.0.residual"]) == 0).all()


@pytest.mark.parametrize("asked", ["keep", "replace"])
def test_an_unknown_intermediate_is_refused_with_the_nearest_name(asked):
    wrong = "layers.0.atention.pattern"
    with pytest.raises(BadInput, match=rf"'{wrong}' .*did you mean 'layers\.0\.attention\.pattern'\?"):
        build.create(TINY).inspect(TOKENS_BxT, **{asked: [wrong] if asked == "keep" else {wrong: 0}})


@pytest.mark.parametrize("name", ["layers.2.residual", "layers.-1.residual", "layers.0.attention.scores", "logits"])
def test_what_this_model_does_not_have_is_refused(name):
    with pytest.raises(BadInput, match=f"^'{re.escape(name)}' is not an intermediate"):
        build.create(TINY).inspect(TOKENS_BxT, keep=[name])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("new", [np.zeros((T, 12)), lambda x: x[:1], 0.0], ids=["array", "function", "number"])
def test_a_replacement_of_another_shape_is_refused(new, scan_layers):
    m = build.create(with_(TINY, scan_layers=scan_layers))
    with pytest.raises(BadInput, match=r"'layers\.1\.mlp\.out' has shape .*; it must be \(2, 7, 12\)"):
        jax.eval_shape(lambda: m.inspect(TOKENS_BxT, replace={"layers.1.mlp.out": new}))


# --- initialisation --------------------------------------------------------------------------------------------

ALL_OPTIONS = [
    given(positions="learned", mlp="swiglu", bias=True), given(norm="rmsnorm", mlp="relu", tie_output=True),
    given(d_input=5, d_output=2, bias=True, norm="none"), given(mlp="none", scan_layers=True),
    given(qk_norm=True, n_kv_heads=1, n_experts=3, bias=True), given(n_experts=2, mlp="swiglu", scan_layers=True),
    given(architecture="lstm"), given(architecture="rnn", bias=True, tie_output=True),
]  # fmt: skip


def test_every_parameter_of_every_option_has_exactly_one_rule_and_every_rule_is_used():
    used = set()
    for fields in ALL_OPTIONS:
        for name in named(build.init_params(with_(TINY, **fields), 0)):
            rules = [end for end in [*build.INIT_STD, ".bias", ".scale"] if name.endswith(end)]
            assert len(rules) == 1, name
            used |= set(rules)
    assert used == {*build.INIT_STD, ".bias", ".scale"}


def expected_std(name, c):
    """The table of standard deviations, written a second time."""
    residual, table = 1 / math.sqrt(2 * c.n_layers), 0.02 if c.tie_output else 1.0
    # Where blocks read a normed stream, what they add is as small as the tokens are.
    residual *= 0.02 if c.tie_output and c.norm != "none" and c.norm_placement != "post" else 1
    last_two = ".".join(name.split(".")[-3:-1])
    wider = c.d_model / c.base_width if c.parametrization == "mup" else 1
    return {
        "embed": table, "position": table, "unembed": 0.02, "read_in": c.d_input and c.d_input**-0.5,
        "read_out": (c.d_model / wider) ** -0.5, "attention.query": c.d_model**-0.5, "attention.key": c.d_model**-0.5,
        "attention.value": c.d_model**-0.5, "mlp.up": c.d_model**-0.5, "mlp.gate": c.d_model**-0.5,
        "attention.out": (c.n_heads * c.head_width) ** -0.5 * residual, "mlp.down": c.mlp_width**-0.5 * residual,
        "mlp.router": (c.d_model * wider) ** -0.5, "cell.dense_i": c.d_model**-0.5, "cell.dense_h": c.d_model**-0.5,
    }[last_two]  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        given(positions="learned", mlp="swiglu", bias=True, d_head=24, d_mlp=80),
        given(positions="learned", tie_output=True),
        given(tie_output=True, norm_placement="post"),
        given(tie_output=True, norm="none"),
        given(d_input=24, d_output=32, n_layers=3, norm="rmsnorm"),
        given(d_input=24, d_output=32, n_experts=4, mlp="swiglu", parametrization="mup", base_width=16),
        given(n_experts=4, bias=True, qk_norm=True, n_kv_heads=2),
        given(architecture="lstm"),
    ],
    ids=str,
)
def test_each_tensor_has_the_mean_and_standard_deviation_of_the_table(fields):
    c = with_(ModelConfig(d_model=64, n_layers=2, n_heads=4, context=32, vocab_size=50), **fields)
    for name, p in named(build.init_params(c, 7)).items():
        if name.endswith("dense_h.bias"):  # of an LSTM: only the forget gate, the second, is open
            assert (p.reshape(4, 64) == [[0], [1], [0], [0]]).all()
            continue
        if name.endswith((".bias", ".scale")):
            assert (p == name.endswith(".scale")).all()
            continue
        std = expected_std(name, c)
        assert abs(p.std() / std - 1) < 4.5 / math.sqrt(2 * p.size), name
        assert abs(p.mean() / std) < 4.5 / math.sqrt(p.size), name


def test_seeds_layers_and_tensors_draw_different_values_and_the_same_seed_the_same_bits():
    c = with_(TINY, mlp="swiglu")
    params = named(build.init_params(c, 0))
    drawn = [p for name, p in params.items() if not name.endswith("scale")]
    drawn += [p for name, p in named(build.init_params(c, 1)).items() if not name.endswith("scale")]
    assert len({p.ravel()[:8].tobytes() for p in drawn}) == len(drawn)
    again = named(build.init_params(c, 0))
    assert all(p.tobytes() == again[name].tobytes() for name, p in params.items())


def test_another_layer_leaves_the_values_of_the_others_and_scales_what_writes_to_the_stream():
    two, three = (named(build.init_params(with_(TINY, n_layers=n), 0)) for n in (2, 3))
    assert set(two) < set(three)
    for name, p in two.items():
        shrinks = name.endswith(("attention.out.kernel", "down.kernel"))
        np.testing.assert_allclose(three[name], p * math.sqrt(2 / 3) if shrinks else p, rtol=1e-6 if shrinks else 0)


def test_a_scanned_model_starts_from_the_bits_of_an_unrolled_one():
    c = with_(TINY, bias=True, positions="learned")
    expected = named(build.init_params(c, 5))
    actual = unrolled(with_(c, scan_layers=True), named(build.init_params(with_(c, scan_layers=True), 5)))
    assert set(actual) == set(expected)
    assert all(p.tobytes() == expected[name].tobytes() for name, p in actual.items())


@pytest.mark.parametrize("fields", [given(), given(tie_output=True, positions="learned", mlp="swiglu")], ids=str)
def test_the_loss_of_a_fresh_model_is_close_to_ln_V(fields):
    c = with_(ModelConfig(d_model=64, n_layers=2, vocab_size=256, context=32), **fields)
    tokens_BxT = np.random.default_rng(0).integers(0, 256, (4, 33))
    log_p_BxTxV = jax.nn.log_softmax(jax.jit(lambda m, x: m(x))(build.create(c), tokens_BxT[:, :-1]))
    loss = -np.take_along_axis(np.asarray(log_p_BxTxV), tokens_BxT[:, 1:, None], axis=-1).mean()
    assert abs(loss - math.log(256)) < 0.1


# --- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_every_tensor_equals_finite_differences_in_float64():
    c = with_(TINY64, bias=True, mlp="swiglu", positions="learned", tie_output=True)
    params, graphdef = random_params(c), build.graphdef(c)

    def loss(params):
        log_p_BxTxV = jax.nn.log_softmax(nnx.merge(graphdef, params)(TOKENS_BxT, KEY_MASK_BxS))
        return -jnp.take_along_axis(log_p_BxTxV, (TOKENS_BxT[..., None] + 1) % V, axis=-1).mean()

    gradient, loss = jax.jit(jax.grad(loss))(params), jax.jit(loss)
    rng, step = np.random.default_rng(5), 1e-5
    leaves, treedef = jax.tree_util.tree_flatten(params)
    for i, (name, g) in enumerate(named(gradient).items()):
        direction = rng.standard_normal(g.shape)
        up, down = (
            loss(jax.tree_util.tree_unflatten(treedef, [*leaves[:i], leaves[i] + s * direction, *leaves[i + 1 :]]))
            for s in (step, -step)
        )
        assert (up - down) / (2 * step) == pytest.approx((g * direction).sum(), rel=1e-6, abs=1e-9), name


# --- a model is a thing one can open and edit ------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_setting_a_weight_by_hand_is_one_line():
    m = build.create(TINY64)
    m.layers[0].attention.out.kernel[...] = jnp.zeros((12, 12))
    _, seen = m.inspect(TOKENS_BxT, keep=["layers.0.attention.out", "layers.1.attention.out"])
    assert np.abs(seen["layers.0.attention.out"]).max() == 0
    assert np.abs(seen["layers.1.attention.out"]).max() > 0


def test_setting_one_entry_by_hand_is_one_line():
    m = build.create(with_(TINY, n_layers=0, norm="none"))
    m.embed.embedding[3, 5] = 1.5
    _, seen = m.inspect(np.full((1, 1), 3), keep=["embedding"])
    assert seen["embedding"][0, 0, 5] == 1.5


@pytest.mark.usefixtures("x64")
def test_an_edit_of_one_layer_s_parts_counts_in_that_layer():
    m = random_model(TINY64)
    expected_BxTxV, _ = m.inspect(TOKENS_BxT, replace={"layers.1.mlp.out": jnp.zeros_like})
    m.layers[1].mlp = None
    assert_close(m(TOKENS_BxT), expected_BxTxV, 1e-13)
    m.layers[0].mlp.kind = "relu"
    assert np.abs(m(TOKENS_BxT) - expected_BxTxV).max() > 1e-3
