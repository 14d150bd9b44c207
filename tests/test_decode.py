"""The model's other ways to run: with a cache, with dropout, and on rows packed from several documents."""

import itertools
from dataclasses import replace as with_

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given as over
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from jaxgpt import build
from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.model import Transformer, document_positions
from jaxgpt.recurrent import Recurrent

B, T, V = 2, 7, 11
TINY = ModelConfig(d_model=12, n_layers=2, n_heads=3, context=8, vocab_size=V)
TOKENS_BxT = np.random.default_rng(1).integers(0, V, (B, T), np.int32)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def given(**fields):
    return fields


def random_model(c, seed=0):
    """Large random parameters, biases and norm scales too. A scanned model gets those of the unrolled one."""
    module = Transformer if c.architecture == "transformer" else Recurrent
    graphdef, state = nnx.split(module(c))

    def leaf(path, p):
        name = build.param_name(path)

        def draw(name, shape):
            rng = np.random.default_rng([seed, *name.encode()])
            return float(name.endswith("scale")) + 0.35 * rng.standard_normal(shape)

        if not c.scan_layers or not name.startswith("layers."):
            return jnp.asarray(draw(name, p.shape), p.dtype)
        layers = [draw(name.replace("layers", f"layers.{i}", 1), p.shape[1:]) for i in range(c.n_layers)]
        return jnp.asarray(np.reshape(layers, p.shape), p.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(leaf, state))


@jax.jit
def outputs(m, key=None):
    return m(TOKENS_BxT, key=key)


def assert_close(actual, expected, tolerance):
    """Within `tolerance` of the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


# --- decoding with a cache -----------------------------------------------------------------------------------------


def decoded(m, pieces, room, inputs=TOKENS_BxT):
    """The outputs of decode, piece by piece from an empty cache, put together."""
    cache, outputs, start = m.empty_cache(len(inputs), room), [], 0
    for size in pieces:
        piece_BxTxV, cache = m.decode(inputs[:, start : start + size], cache)
        outputs.append(piece_BxTxV)
        start += size
    assert start == inputs.shape[1]
    return jnp.concatenate(outputs, axis=1)


# One layer where one shows it: half the time to compile.
CASES = {
    "the defaults": given(n_layers=2),
    "as GPT-2": given(positions="learned", bias=True, tie_output=True, mlp="gelu_exact"),
    "as Llama": given(norm="rmsnorm", mlp="swiglu", n_kv_heads=1),
    "as Vaswani's decoder": given(positions="sinusoidal", norm_placement="post", mlp="relu", bias=True),
    "as Pythia": given(rope_fraction=0.5, norm_placement="parallel", output_bias=True),
    "as Gemma 2": given(n_heads=6, n_kv_heads=2, qk_norm=True, mlp="relu2", logit_cap=1.5, d_head=4),
    "ALiBi, scanned, rematerialised": given(positions="alibi", scan_layers=True, remat=True, n_layers=3),
    "no positions, a fused kernel": given(positions="none", attention_kernel="fused", mlp="none", n_layers=2),
    "linear attention": given(attention="linear", norm="none", d_mlp=10),
    "linear attention, scanned, no positions": given(attention="linear", positions="none", scan_layers=True),
    "muP": given(parametrization="mup", base_width=4),
    "vectors to a read-out": given(d_input=5, d_output=2, qk_norm=True),
    "experts": given(n_experts=4, experts_per_token=2, mlp="swiglu"),
    "experts, one per token, scanned": given(n_experts=3, experts_per_token=1, scan_layers=True, n_layers=2),
    "no layers": given(n_layers=0, positions="sinusoidal"),
    "no layers, scanned": given(n_layers=0, positions="learned", scan_layers=True),
    "dropout without a key": given(dropout=0.5),
    "LSTM": given(architecture="lstm", norm="rmsnorm", n_layers=2),
    "RNN": given(architecture="rnn", bias=True, tie_output=True, remat=True),
}


def inputs_of(c):
    return TOKENS_BxT if c.d_input is None else np.random.default_rng(2).normal(size=(B, T, 5)).astype(np.float32)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_cached_outputs_equal_those_of_a_full_pass_in_one_go_and_in_pieces(fields):
    c = with_(TINY, **(given(n_layers=1) | fields))
    inputs = inputs_of(c)

    @jax.jit
    def run(m):
        return m(inputs), decoded(m, (T,), T, inputs), decoded(m, (4, 1, 2), T + 1, inputs)

    full_BxTxV, at_once_BxTxV, in_pieces_BxTxV = run(random_model(c))
    assert_close(at_once_BxTxV, full_BxTxV, 1e-5)
    assert_close(in_pieces_BxTxV, full_BxTxV, 1e-5)


def full_and_in_pieces(c):
    return jax.jit(lambda m: (m(TOKENS_BxT), decoded(m, (4, 1, 1, 1), T)))(random_model(c))


@pytest.mark.parametrize("fields", [given(positions="alibi", n_kv_heads=1), given(architecture="lstm")], ids=str)
@pytest.mark.usefixtures("x64")
def test_cached_outputs_equal_those_of_a_full_pass_to_1e_12_in_float64(fields):
    full_BxTxV, in_pieces_BxTxV = full_and_in_pieces(with_(TINY, param_dtype="float64", **fields))
    assert full_BxTxV.dtype == np.float64
    assert_close(in_pieces_BxTxV, full_BxTxV, 1e-12)


@pytest.mark.parametrize("fields", [given(), given(norm="rmsnorm", mlp="swiglu", scan_layers=True)], ids=str)
def test_a_bfloat16_cache_holds_bfloat16_and_agrees_to_its_precision(fields):
    c = with_(TINY, compute_dtype="bfloat16", **fields)
    kept = jax.tree.leaves(Transformer(c).empty_cache(B, T).layers)
    assert {leaf.dtype for leaf in kept} == {np.dtype(jnp.bfloat16)}
    full_BxTxV, in_pieces_BxTxV = full_and_in_pieces(c)
    assert full_BxTxV.dtype == in_pieces_BxTxV.dtype == jnp.bfloat16
    assert_close(in_pieces_BxTxV, full_BxTxV, 0.03)  # bfloat16's epsilon is 0.008


def test_every_value_of_every_option_that_decoding_meets_is_among_the_cases():
    covered = {(name, getattr(with_(TINY, **case), name)) for case in CASES.values() for name in vars(TINY)}
    options = given(
        architecture=["transformer", "lstm", "rnn"], positions=["learned", "sinusoidal", "rope", "alibi", "none"],
        rope_fraction=[1.0, 0.5], attention=["softmax", "linear"], norm=["layernorm", "rmsnorm", "none"],
        norm_placement=["pre", "post", "parallel"], mlp=["gelu", "gelu_exact", "relu", "relu2", "swiglu", "none"],
        n_kv_heads=[None, 1, 2], qk_norm=[False, True], n_experts=[None, 3, 4], scan_layers=[False, True],
        tie_output=[False, True], logit_cap=[None, 1.5], bias=[False, True], remat=[False, True],
        parametrization=["standard", "mup"], attention_kernel=["auto", "fused"], d_input=[None, 5],
    )  # fmt: skip
    assert {(name, value) for name, values in options.items() for value in values} <= covered


@pytest.mark.parametrize("fields", [given(), given(positions="sinusoidal"), given(positions="alibi")], ids=str)
def test_decoding_goes_on_beyond_the_context_where_positions_are_no_table(fields):
    full_BxTxV, in_pieces_BxTxV = full_and_in_pieces(with_(TINY, context=5, **fields))
    assert full_BxTxV.shape[1] == T > 5
    assert_close(in_pieces_BxTxV, full_BxTxV, 1e-5)


def test_a_cache_longer_than_a_learned_position_table_is_refused():
    m = random_model(with_(TINY, positions="learned", n_layers=0))
    with pytest.raises(BadInput, match=r"^a sequence of 9 positions is longer than model\.context=8"):
        m.empty_cache(1, 9)


def test_a_model_that_sees_the_future_has_no_cache():
    with pytest.raises(BadInput, match=r"^model\.causal=false: "):
        random_model(with_(TINY, causal=False, n_layers=0)).empty_cache(1, 8)


@pytest.mark.parametrize("fields", [given(), given(scan_layers=True), given(architecture="lstm")], ids=str)
def test_one_compiled_step_serves_every_position_and_leaves_its_cache_as_it_was(fields):
    m = random_model(with_(TINY, **fields))
    step = jax.jit(lambda m, tokens_Bx1, cache: m.decode(tokens_Bx1, cache))
    full_BxTxV, cache = outputs(m), m.empty_cache(B, T)
    for t in range(T):
        (one_Bx1xV, after), (again_Bx1xV, _) = (step(m, TOKENS_BxT[:, t : t + 1], cache) for _ in range(2))
        np.testing.assert_array_equal(one_Bx1xV, again_Bx1xV)
        assert_close(one_Bx1xV[:, 0], full_BxTxV[:, t], 1e-5)
        cache = after
    assert step._cache_size() == 1


def test_a_cache_put_back_to_an_earlier_length_forgets_what_came_after():
    m = random_model(TINY)
    changed_BxT = TOKENS_BxT.copy()
    changed_BxT[:, 4:] = (TOKENS_BxT[:, 4:] + 3) % V

    @jax.jit
    def run(m):
        _, cache = m.decode(TOKENS_BxT, m.empty_cache(B, 8))
        return m.decode(changed_BxT[:, 4:], cache._replace(length=jnp.int32(4)))[0], m(changed_BxT)[:, 4:]

    tail_BxTxV, expected_BxTxV = run(m)
    assert_close(tail_BxTxV, expected_BxTxV, 1e-5)


# --- dropout -------------------------------------------------------------------------------------------------------

RATE = 0.3
KEYS = jax.random.split(jax.random.key(7), 4000)
ONE_IN_A_MILLION = 1e-6


def assert_binomial(count, n, p):
    """`count` of `n` is no less and no more likely than one in a million."""
    low, high = stats.binom.ppf([ONE_IN_A_MILLION, 1 - ONE_IN_A_MILLION], n, p)
    assert low <= count <= high


@pytest.mark.parametrize("fields", [given(), given(scan_layers=True), given(architecture="rnn")], ids=str)
def test_without_a_key_or_at_rate_0_nothing_is_dropped(fields):
    c = with_(TINY, **fields)
    plain, dropping = random_model(c), random_model(with_(c, dropout=RATE))
    plain_BxTxV = np.asarray(outputs(plain))
    np.testing.assert_array_equal(outputs(dropping), plain_BxTxV)
    np.testing.assert_array_equal(outputs(plain, KEYS[0]), plain_BxTxV)
    assert np.abs(outputs(dropping, KEYS[0]) - plain_BxTxV).max() > 0.1


@pytest.mark.parametrize("fields", [given(), given(architecture="lstm")], ids=str)
def test_the_same_key_drops_the_same_units_and_another_key_others(fields):
    m = random_model(with_(TINY, dropout=RATE, **fields))
    one, again, other = (np.asarray(outputs(m, key)) for key in (KEYS[0], KEYS[0], KEYS[1]))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    "fields", [given(scan_layers=True), given(scan_layers=True, remat=True), given(remat=True)], ids=str
)
def test_scanned_or_rematerialised_the_same_key_drops_the_same_units_and_gives_the_same_gradient(fields):
    def run(c):
        def loss(stream_BxTxD, m):
            replace = {"embedding": stream_BxTxD}
            outputs_BxTxV, _ = m.inspect(TOKENS_BxT, key=KEYS[0], replace=replace)
            return (outputs_BxTxV**2).sum(), outputs_BxTxV

        stream_BxTxD = np.random.default_rng(3).normal(size=(B, T, 12)).astype(np.float32)
        return jax.jit(jax.grad(loss, has_aux=True))(stream_BxTxD, random_model(c))

    c = with_(TINY, dropout=RATE)
    for actual, expected in zip(run(with_(c, **fields)), run(c), strict=True):
        assert_close(actual, expected, 1e-5)


def test_where_the_pattern_drops_the_fused_kernel_gives_way_to_the_plain_one():
    m, fused = (random_model(with_(TINY, dropout=RATE, attention_kernel=kind)) for kind in ("plain", "fused"))
    np.testing.assert_array_equal(outputs(m, KEYS[0]), outputs(fused, KEYS[0]))


def test_dropped_units_of_the_embedding_are_zero_others_scaled_up_and_their_share_is_the_rate():
    m = random_model(with_(TINY, n_layers=0, norm="none", dropout=RATE))
    x_BxTxD = np.asarray(m.inspect(TOKENS_BxT, keep=["embedding"])[1]["embedding"])
    final = jax.jit(jax.vmap(lambda key: m.inspect(TOKENS_BxT, keep=["final"], key=key)[1]["final"]))
    kept_NxBxTxD = np.asarray(final(KEYS))
    dropped_NxBxTxD = kept_NxBxTxD == 0
    np.testing.assert_allclose(kept_NxBxTxD, np.where(dropped_NxBxTxD, 0, x_BxTxD / (1 - RATE)), rtol=1e-6)
    assert_binomial(dropped_NxBxTxD.sum(), dropped_NxBxTxD.size, RATE)
    for count in dropped_NxBxTxD.sum(axis=0).ravel():  # each unit by itself
        assert_binomial(count, len(KEYS), RATE)


def test_the_mean_over_keys_is_the_output_without_dropout_where_the_model_is_linear():
    m = random_model(with_(TINY, n_layers=0, norm="none", dropout=RATE))
    outputs_NxBxTxV = np.asarray(jax.jit(jax.vmap(lambda key: m(TOKENS_BxT, key=key)))(KEYS))
    x_BxTxD, w_DxV = m.embed(TOKENS_BxT), m.unembed.kernel[...]
    variance_BxTxV = np.asarray((x_BxTxD**2) @ (w_DxV**2)) * RATE / (1 - RATE)  # of a sum of independent units
    error_BxTxV = outputs_NxBxTxV.mean(axis=0) - np.asarray(m(TOKENS_BxT))
    assert np.abs(error_BxTxV / np.sqrt(variance_BxTxV / len(KEYS))).max() < 5.5
    spread_BxTxV = outputs_NxBxTxV.var(axis=0) / variance_BxTxV
    assert np.abs(spread_BxTxV - 1).max() < 0.2


def added_in(m, key, tokens_BxT):
    """(before dropout, after it) for what each branch of each layer adds to the stream."""
    residuals = ["layers.0.residual", "layers.0.residual_mid", "layers.1.residual", "layers.1.residual_mid", "final"]
    outs = ["layers.0.attention.out", "layers.0.mlp.out", "layers.1.attention.out", "layers.1.mlp.out"]
    _, seen = jax.jit(lambda m: m.inspect(tokens_BxT, keep=residuals + outs, key=key))(m)
    steps = [seen[after] - seen[before] for before, after in itertools.pairwise(residuals)]
    return [(np.asarray(seen[out]), np.asarray(step)) for out, step in zip(outs, steps, strict=True)]


@pytest.mark.parametrize("fields", [given(), given(scan_layers=True)], ids=str)
def test_what_each_branch_adds_is_dropped_at_the_rate_and_no_two_alike(fields):
    # No norm but one: the last, which would hide what the last layer adds.
    c = with_(TINY, norm="none", mlp="relu", dropout=RATE, **fields)
    tokens_BxT = np.tile(TOKENS_BxT, (20, 1))
    masks = []
    for added_BxTxD, step_BxTxD in added_in(random_model(c), KEYS[0], tokens_BxT):
        dropped_BxTxD = np.abs(step_BxTxD) < 1e-4 * np.abs(added_BxTxD).max()
        expected_BxTxD = np.where(dropped_BxTxD, 0, added_BxTxD / (1 - RATE))
        assert_close(step_BxTxD, expected_BxTxD, 1e-3)
        live_BxTxD = np.abs(added_BxTxD) > 1e-3 * np.abs(added_BxTxD).max()  # else one cannot tell
        assert live_BxTxD.mean() > 0.9
        assert_binomial((dropped_BxTxD & live_BxTxD).sum(), live_BxTxD.sum(), RATE)
        masks.append(dropped_BxTxD)
    for one, other in itertools.combinations(masks, 2):
        assert (one == other).mean() == pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.08)


def test_weights_of_the_attention_pattern_are_dropped_at_the_rate_each_by_itself():
    """With one token per row each head's pattern is a single 1, so that what is dropped are whole heads."""
    m = random_model(with_(TINY, n_layers=1, dropout=RATE))
    tokens_Bx1 = np.tile(np.arange(V, dtype=np.int32), 100)[:, None]

    @jax.jit
    def heads(m):
        return m.inspect(tokens_Bx1, keep=["layers.0.attention.heads"], key=KEYS[0])[1]["layers.0.attention.heads"]

    z_BxHxK = np.asarray(heads(m))[:, 0]
    dropped_BxH = (z_BxHxK == 0).all(axis=-1)
    np.testing.assert_array_equal(dropped_BxH, (z_BxHxK == 0).any(axis=-1))
    assert_binomial(dropped_BxH.sum(), dropped_BxH.size, RATE)
    for one, other in itertools.combinations(dropped_BxH.T, 2):
        assert_binomial((one & other).sum(), len(one), RATE**2)


# --- rows packed from documents ------------------------------------------------------------------------------------

# Documents of two and three tokens.
SEGMENT_BxT = np.array([[0, 0, 1, 1, 1, 2, 2], [5, 5, 3, 3, 4, 4, 4]], np.int32)
PACKED = [
    *[given(positions=p, attention_kernel="plain") for p in ("learned", "sinusoidal", "rope", "alibi", "none")],
    *[given(positions=p, attention_kernel="fused", causal=False) for p in ("learned", "sinusoidal", "alibi", "none")],
    given(attention_kernel="fused"),
    given(attention_kernel="plain", causal=False),
    given(attention="linear"),
    given(attention="linear", causal=False, scan_layers=True),
    given(rope_fraction=0.5, n_kv_heads=1, qk_norm=True, scan_layers=True),
    given(n_experts=3, positions="learned"),
    given(architecture="lstm"),
    given(architecture="rnn"),
]


def documents(length):
    """Rows [N, 1] and places [N, length] of all documents of one length."""
    places = [
        (row, np.flatnonzero(segment_T == number))
        for row, segment_T in enumerate(SEGMENT_BxT)
        for number in np.unique(segment_T)
    ]
    found = [(row, at) for row, at in places if len(at) == length]
    return np.array([[row] for row, _ in found]), np.array([at for _, at in found])


def test_the_documents_are_all_there():
    assert [len(documents(length)[0]) for length in (1, 2, 3, 4)] == [0, 4, 2, 0]


@pytest.mark.parametrize("fields", PACKED, ids=str)
def test_each_document_of_a_packed_row_gets_the_outputs_that_it_gets_alone(fields):
    @jax.jit
    def run(m):
        packed_BxTxV, unmarked_BxTxV = m(TOKENS_BxT, segment_BxT=SEGMENT_BxT), m(TOKENS_BxT)
        return packed_BxTxV, unmarked_BxTxV, [m(TOKENS_BxT[documents(length)]) for length in (2, 3)]

    packed_BxTxV, unmarked_BxTxV, alone = run(random_model(with_(TINY, n_layers=1, **fields)))
    for length, alone_NxTxV in zip((2, 3), alone, strict=True):
        assert_close(packed_BxTxV[documents(length)], alone_NxTxV, 1e-5)
    assert (np.abs(packed_BxTxV - unmarked_BxTxV).max(axis=-1)[:, 2:] > 1e-3).all()  # unmarked they see what precedes


@pytest.mark.parametrize(
    "fields",
    [
        given(),
        given(causal=False, positions="sinusoidal"),
        given(attention_kernel="fused", positions="alibi"),
        given(attention="linear", causal=False),
        given(architecture="lstm"),
    ],
    ids=str,
)
def test_no_output_depends_on_an_input_of_another_document_and_each_on_all_it_sees_of_its_own(fields):
    m = random_model(with_(TINY, d_input=5, d_output=2, **fields))
    x_TxI = np.random.default_rng(2).normal(size=(T, 5)).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(lambda x_TxI: m(x_TxI[None], segment_BxT=SEGMENT_BxT[:1])[0]))
    influence_TxS = np.abs(np.asarray(jacobian(x_TxI))).sum(axis=(1, 3))
    sees_TxS = SEGMENT_BxT[0][:, None] == SEGMENT_BxT[0][None]
    if m.config.causal:
        sees_TxS &= np.tri(T, dtype=bool)
    np.testing.assert_array_equal(influence_TxS > 0, sees_TxS)


@pytest.mark.parametrize("fields", [given(positions="learned"), given(attention_kernel="fused")], ids=str)
def test_documents_and_a_key_mask_hide_together(fields):
    m = random_model(with_(TINY, **fields))
    key_mask_BxS = np.ones((B, T), bool)
    key_mask_BxS[0, 3] = key_mask_BxS[1, 0] = False  # within a document, and the first of one

    @jax.jit
    def run(m):
        alone = [m(TOKENS_BxT[at], key_mask_BxS[at]) for at in map(documents, (2, 3))]
        return m(TOKENS_BxT, key_mask_BxS, segment_BxT=SEGMENT_BxT), alone

    both_BxTxV, alone = run(m)
    for length, alone_NxTxV in zip((2, 3), alone, strict=True):
        assert_close(both_BxTxV[documents(length)], alone_NxTxV, 1e-5)


def test_one_document_a_row_is_the_same_as_no_marks():
    m = random_model(with_(TINY, positions="learned"))
    marked_BxTxV = jax.jit(lambda m: m(TOKENS_BxT, segment_BxT=np.full((B, T), 4, np.int32)))(m)
    assert_close(marked_BxTxV, outputs(m), 1e-6)


@over(segment_BxT=hnp.arrays(np.int32, (2, 9), elements=st.integers(-1, 2)))
@settings(max_examples=60, deadline=None)
def test_a_token_s_place_counts_from_where_its_stretch_of_equal_numbers_begins(segment_BxT):
    expected_BxT = np.zeros_like(segment_BxT)
    for b, t in itertools.product(range(2), range(1, 9)):
        if segment_BxT[b, t] == segment_BxT[b, t - 1]:
            expected_BxT[b, t] = expected_BxT[b, t - 1] + 1
    np.testing.assert_array_equal(document_positions(jnp.asarray(segment_BxT)), expected_BxT)
