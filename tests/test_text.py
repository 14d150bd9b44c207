"""Language modelling on tokens: where windows come from, what the loss is, and a corpus whose entropy is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from jaxgpt import BadInput, RunConfig, build, mixture, override, tokenizer
from jaxgpt import corpus as read_corpus
from jaxgpt.launch import sweep
from jaxgpt.model import Transformer
from jaxgpt.optimizer import hparams
from jaxgpt.population import split
from jaxgpt.run import Run
from jaxgpt.step import data_key
from jaxgpt.tasks import text
from jaxgpt.tasks.text import HeldOut, TextData, TextTask
from jaxgpt.tokenizer import Tokens

T = 8


KEY = jax.random.key(0)


def task(tiny, batch_size=4, eval_windows=10, about=None, **fields):
    """A task on `tiny`'s model; fields: of the model, about: of the task itself."""
    return TextTask(override(tiny, {f"model.{name}": value for name, value in fields.items()}).model,
                    batch_size, eval_windows, **about or {})  # fmt: skip


def corpus(train, validation):
    """A corpus of these bytes."""
    return Tokens(np.asarray(train, np.uint8), np.asarray(validation, np.uint8))


# --- training windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [1, 2, 5])
def test_windows_start_at_every_position_up_to_the_last_and_nowhere_else(tiny, starts):
    # Byte i is i, so a window says where it starts; 255 in the validation text would show a leak.
    data = task(tiny).data(corpus(np.arange(T + starts), np.full(40, 255)))
    sample = jax.vmap(task(tiny, batch_size=64).sample, in_axes=(None, 0, None))
    windows = np.asarray(sample(data, jax.random.split(jax.random.key(0), 20), 0)).reshape(-1, T + 1)
    assert windows.dtype == np.int32
    assert sorted(set(windows[:, 0])) == list(range(starts))
    assert (windows == windows[:, :1] + np.arange(T + 1)).all()
    counts = np.bincount(windows[:, 0])
    assert abs(counts - len(windows) / starts).max() <= 5 * math.sqrt(len(windows) / starts)


def test_a_batch_is_a_function_of_data_seed_step_and_retry(tiny):
    data = task(tiny).data(corpus(np.random.default_rng(0).integers(0, 256, 5000), np.zeros(40)))
    sample = jax.jit(task(tiny).sample)

    def batch(step=0, retry=0, **seeds):
        h = hparams(override(tiny, {f"train.{name}": value for name, value in seeds.items()}))
        return np.asarray(sample(data, data_key(h, jnp.int32(step), jnp.int32(retry)), step)).tobytes()

    assert batch(3, 1, seed=5) == batch(3, 1, seed=5) == batch(3, 1, seed=9, data_seed=5)
    different = [batch(), batch(1), batch(2), batch(0, 1), batch(1, 1), batch(seed=1), batch(data_seed=2)]
    assert len(set(different)) == len(different)
    assert batch(steps=7) == batch()


# --- validation windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [2, 3, 7, 10, 1000])
@pytest.mark.parametrize("length", [9, 17, 18, 19, 64, 90, 91, 200])
def test_validation_windows_do_not_overlap_and_reach_from_end_to_end(tiny, length, windows):
    data = task(tiny, eval_windows=windows).data(corpus(np.full(50, 255), np.arange(length)))
    starts = np.asarray(data.validation_WxT1[:, 0], np.int64)
    assert (np.asarray(data.validation_WxT1) == starts[:, None] + np.arange(T + 1)).all()  # nothing of the training
    assert len(starts) == min(windows, length // (T + 1))
    assert (np.diff(starts) >= T + 1).all()
    assert starts[0] == 0
    assert len(starts) == 1 or starts[-1] == length - T - 1


def test_the_reader_reads_a_corpus_once_and_its_source_holds_both_sides(tiny, monkeypatch):
    reads, load = [], text.corpus.load
    monkeypatch.setattr(text.corpus, "load", lambda *args: (reads.append(args), load(*args))[1])
    source = text.reader()
    a, b = source(tiny), source(override(tiny, {"train.seed": 3, "model.d_model": 16}))
    assert len(reads) == 1
    assert a.identity == b.identity == load(*reads[0]).sha256
    found = a.data()
    assert bytes(np.asarray(found.train_n)) == bytes(load(*reads[0]).train)
    assert a.task == source(override(tiny, {"train.seed": 3})).task != b.task


def test_a_run_on_a_part_of_the_text_sees_every_window_of_that_part_and_no_other(tiny):
    source = text.reader()
    whole, part, larger = (source(override(tiny, {"data.training_tokens": n})) for n in (None, 3 * T, 500))
    assert whole.numbers == {}
    assert part.numbers == {"training_tokens": 3 * T}
    of_part, of_whole = part.data(), whole.data()
    train_n = np.asarray(of_part.train_n)
    np.testing.assert_array_equal(np.asarray(larger.data().train_n), train_n)  # so that sizes share a program
    np.testing.assert_array_equal(np.asarray(of_part.validation_WxT1), np.asarray(of_whole.validation_WxT1))
    # the same documents in another order
    documents = [sorted(bytes(np.asarray(d.train_n)).split(text.corpus.SEPARATOR)) for d in (of_part, of_whole)]
    assert documents[0] == documents[1]
    numbers = {"training_tokens": jnp.float32(3 * T)}
    keys, sample = jax.random.split(jax.random.key(0), 40), jax.jit(part.task.sample)
    windows = {bytes(w.astype(np.uint8)) for key in keys for w in np.asarray(sample((of_part, numbers), key, 0))}
    assert windows == {bytes(train_n[i : i + T + 1]) for i in range(2 * T)}
    loss_W = jax.jit(part.task.evaluate)(part.task.init(0), (of_part, numbers)).loss_W
    np.testing.assert_array_equal(loss_W, jax.jit(whole.task.evaluate)(whole.task.init(0), of_whole).loss_W)


def test_parts_of_a_text_of_every_size_are_one_population(tiny, tmp_path):
    runs = [
        Run(
            override(tiny, {"data.training_tokens": n}),
            text.reader()(override(tiny, {"data.training_tokens": n})),
            tmp_path,
        )
        for n in (100, 200)
    ]
    assert len(split(runs)) == 1
    assert len({run.id for run in runs}) == 2


@pytest.mark.parametrize("tokens", [T, 10**7])
def test_a_part_that_the_text_does_not_have_is_refused_in_one_line(tiny, tokens):
    with pytest.raises(BadInput, match=rf"data.training_tokens={tokens} is not allowed; it must be from {T + 1} "):
        text.reader()(override(tiny, {"data.training_tokens": tokens}))


def test_a_part_of_a_streamed_text_is_refused(tiny):
    with pytest.raises(BadInput, match=r"data\.training_tokens=50 is for a corpus in memory; with data.stream=true"):
        override(tiny, {"data.training_tokens": 50, "data.stream": True})


# --- the loss ------------------------------------------------------------------------------------------------------


def model_of(made, params):
    """The model of a task as one program; one by one, its operations would each have to be compiled."""
    run = jax.jit(lambda params, inputs: nnx.merge(build.graphdef(made.model), params)(inputs))
    return lambda inputs: run(params, inputs)


def cross_entropy(logits_BxTxV, window_BxT1):
    """-log p of the next byte, [B, T] nats, float64, written out."""
    x = np.asarray(logits_BxTxV, np.float64)
    losses = np.empty(x.shape[:2])
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            losses[b, t] = (
                np.log(np.exp(x[b, t] - x[b, t].max()).sum()) + x[b, t].max() - x[b, t, window_BxT1[b, t + 1]]
            )
    return losses


@pytest.fixture(scope="module")
def trained_like(tiny):
    """A task and parameters whose logits are far from uniform."""
    made = task(tiny, eval_windows=7)
    return made, jax.tree.map(lambda p: jnp.asarray(p) * 20, made.init(0))


def test_the_loss_is_the_summed_cross_entropy_of_the_next_bytes(trained_like):
    made, params = trained_like
    window_BxT1 = np.random.default_rng(1).integers(0, 256, (4, T + 1)).astype(np.int32)
    logits_BxTxV = model_of(made, params)(window_BxT1[:, :-1])
    expected = cross_entropy(logits_BxTxV, window_BxT1)
    total, weight, metrics = jax.jit(made.loss)(params, window_BxT1, KEY)
    assert weight == 4 * T
    assert metrics == {"train_loss": total}
    assert abs(expected.mean() - math.log(256)) > 0.1
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_evaluation_gives_each_window_its_mean_and_the_summary_its_error(trained_like):
    made, params = trained_like  # 7 windows are no multiple of the batch of 4
    validation = np.random.default_rng(2).integers(0, 256, 7 * (T + 1)).astype(np.uint8)
    data = made.data(corpus(np.zeros(50), validation))
    held_out = jax.tree.map(np.asarray, jax.jit(made.evaluate)(params, data))
    windows_WxT1 = validation.reshape(7, T + 1).astype(np.int32)
    logits_WxTxV = model_of(made, params)(windows_WxT1[:, :-1])
    expected_W = cross_entropy(logits_WxTxV, windows_WxT1).mean(axis=1)
    np.testing.assert_allclose(held_out.loss_W, expected_W, rtol=1e-5)
    summary = made.summarise(held_out)
    assert summary["validation_loss"] == pytest.approx(expected_W.mean(), rel=1e-5)
    sem = math.sqrt(((expected_W - expected_W.mean()) ** 2).sum() / 6 / 7)
    assert summary["validation_loss_sem"] == pytest.approx(sem, rel=1e-4)
    assert summary["validation_bits_per_byte"] == summary["validation_loss"] / math.log(2)


def test_the_summary_of_a_single_window_has_no_error(tiny):
    assert math.isnan(task(tiny).summarise(HeldOut(np.ones(1), np.ones(1)))["validation_loss_sem"])


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(tiny):
    made = task(tiny, compute_dtype="bfloat16")
    loss = jax.eval_shape(made.loss, made.init(0), jax.ShapeDtypeStruct((4, T + 1), jnp.int32), KEY)
    assert (loss.total.dtype, loss.weight.dtype) == (jnp.float32, jnp.float32)
    windows = jax.ShapeDtypeStruct((7, T + 1), jnp.uint8)
    data = TextData(None, windows, jax.ShapeDtypeStruct((7,), jnp.float32))
    assert jax.eval_shape(made.evaluate, made.init(0), data).loss_W.dtype == jnp.float32


def test_a_model_trained_on_random_letters_comes_to_their_entropy_and_not_below(tiny, tmp_path):
    settings = {"train.steps": 400, "train.batch_size": 32, "train.eval_windows": 200, "train.checkpoint_every": 400}
    row = sweep([override(tiny, settings)], tmp_path, progress=False).loc[0]
    entropy = math.log(8)
    # Every letter is equally likely, so a window's loss varies only by what the model believes beyond that.
    assert row["final_loss"] < entropy + 0.03
    assert row["final_loss"] > entropy - 4 * row["final_loss_sem"]
    assert row["final_bits_per_byte"] == pytest.approx(row["final_loss"] / math.log(2))


# --- tokens --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of words, so that BPE finds pairs."""
    root = tmp_path_factory.mktemp("documents")
    for i in range(20):
        chosen = np.random.default_rng(i).choice(["the cat ", "a dog\n", "\u20ac 25 ", "sat; "], 40)
        (root / f"{i:02d}").write_text("".join(chosen))
    return str(root)


def test_a_run_on_bpe_trains_on_the_same_text_and_says_which_tokenizer(tiny, folder, tmp_path):
    pytest.importorskip("tokenizers")
    source = text.reader()
    settings = {"data.corpus": folder, "model.vocab_size": 280}
    plain = source(override(tiny, settings))
    bpe = source(override(tiny, settings | {"data.tokenizer": "bpe"}))
    held = read_corpus.load(folder, 0.1, T)
    bpe.keep(tmp_path)
    used = tokenizer.kept(tmp_path, bpe.identity)
    assert plain.identity == held.sha256
    assert bpe.identity == f"{held.sha256}+{used.sha256}"
    assert used.vocab_size == bpe.task.tokens <= 280
    assert used.json == tokenizer.train(held.train.tobytes().split(b"\0"), 280).json  # of training documents alone
    data = bpe.data()
    assert data.train_n.dtype == np.uint16
    assert used.decode(data.train_n) == held.train.tobytes()
    assert len(data.train_n) < 0.5 * len(held.train)
    for window, mean_bytes in zip(data.validation_WxT1, data.bytes_W, strict=True):
        assert used.decode(window) in held.validation.tobytes()
        assert mean_bytes * T == len(used.decode(window[1:]))
    # The file that was kept is as good as the words that made it.
    (path,) = (tmp_path / "tokenizers").iterdir()
    again = source(override(tiny, settings | {"data.tokenizer": str(path)}))
    assert (again.identity, again.task) == (bpe.identity, bpe.task)


def test_a_sweep_over_contexts_reads_and_tokenizes_once(tiny, folder, monkeypatch):
    pytest.importorskip("tokenizers")
    made, train = [], tokenizer.train
    monkeypatch.setattr(tokenizer, "train", lambda *args: (made.append(args), train(*args))[1])
    source = text.reader()
    settings = {"data.corpus": folder, "model.vocab_size": 280, "data.tokenizer": "bpe"}
    a, b = (source(override(tiny, settings | {"model.context": context})) for context in (4, 8))
    assert len(made) == 1
    assert a.identity == b.identity


def test_a_model_that_knows_nothing_needs_the_same_bits_for_a_byte_however_text_is_cut(tiny, folder):
    """Uniform over V: log2 V bits for each token, so log2 V / (bytes per token) for each byte."""
    pytest.importorskip("tokenizers")
    source = text.reader()
    for name in ("bytes", "bpe"):
        made = source(override(tiny, {"data.corpus": folder, "model.vocab_size": 280, "data.tokenizer": name}))
        data = made.data()
        nothing = jax.tree.map(jnp.zeros_like, made.task.init(0))
        found = made.task.summarise(jax.tree.map(np.asarray, jax.jit(made.task.evaluate)(nothing, data)))
        assert found["validation_loss"] == pytest.approx(math.log(280), rel=1e-6)
        bytes_each = float(np.mean(data.bytes_W))
        assert found["validation_bits_per_byte"] == pytest.approx(math.log2(280) / bytes_each, rel=1e-6)
        assert (bytes_each == 1) == (name == "bytes")


def test_a_bpe_of_single_bytes_has_the_bits_per_byte_of_bytes(tiny, folder):
    """The same model, its rows in the other order of ids, on the same text: every number is the same."""
    pytest.importorskip("tokenizers")
    source = text.reader()
    settings = {"data.corpus": folder, "model.vocab_size": 257}
    plain, bpe = (source(override(tiny, settings | {"data.tokenizer": name})) for name in ("bytes", "bpe"))
    spelled = tokenizer.train([b"a"], 257).spelled
    # Byte 0 is the separator, id 0 of both; the NUL of a text, which there is none of, takes the row left over.
    byte_V = [256 if i and token == b"\0" else token[0] for i, token in enumerate(spelled)]
    params = jax.tree.map(lambda p: jnp.asarray(p) * 20, plain.task.init(0))

    def reordered(path, p):
        name = build.param_name(path)
        return p[np.array(byte_V)] if "embed.embedding" in name else p[:, byte_V] if "unembed" in name else p

    other = jax.tree_util.tree_map_with_path(reordered, params)
    found = [
        made.task.summarise(jax.tree.map(np.asarray, jax.jit(made.task.evaluate)(p, made.data())))
        for made, p in ((plain, params), (bpe, other))
    ]
    assert abs(found[0]["validation_loss"] - math.log(257)) > 0.1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# --- the masked objective ------------------------------------------------------------------------------------------


def masked(tiny, fraction=0.25, **about):
    fields = {"causal": False, "vocab_size": 257, **about.pop("fields", {})}
    return task(tiny, about={"mask_fraction": fraction} | about, **fields)


def within(count, n, p):
    """Whether a count lies where a binomial one does with probability 1 - 2e-9."""
    return stats.binom.ppf(1e-9, n, p) <= count <= stats.binom.ppf(1 - 1e-9, n, p)


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.25, 0.9])
def test_what_is_shown_at_the_tokens_to_predict(tiny, fraction):
    made, windows = masked(tiny, fraction), 20_000
    window_BxT1 = np.random.default_rng(0).integers(0, 256, (windows, T + 1)).astype(np.int32)
    examples = jax.jit(made._examples)(window_BxT1, jax.random.split(KEY, windows))
    token_BxT, shown_BxT = window_BxT1[:, :-1], np.asarray(examples.input_BxT)
    place_BxN = np.asarray(examples.place_BxN)
    n = max(1, round(fraction * T))
    assert place_BxN.shape == (windows, n)
    target_BxT = np.zeros((windows, T), bool)
    np.put_along_axis(target_BxT, place_BxN, True, axis=1)
    assert (target_BxT.sum(axis=1) == n).all()  # no place twice
    assert (shown_BxT == token_BxT)[~target_BxT].all()
    np.testing.assert_array_equal(examples.target_BxN, np.take_along_axis(token_BxT, place_BxN, axis=1))
    for t in range(T):
        assert within(target_BxT[:, t].sum(), windows, n / T)
    shown, token, all_ = shown_BxT[target_BxT], token_BxT[target_BxT], windows * n
    hidden, same = shown == 256, shown == token
    assert within(hidden.sum(), all_, 0.8)
    assert within(same.sum(), all_, 0.1 + 0.1 / 256)
    others = shown[~hidden & ~same]
    assert within(others.size, all_, 0.1 * 255 / 256)
    assert others.max() <= 255
    assert within((others < 128).sum(), others.size, 0.5)


def test_the_masked_loss_is_the_cross_entropy_at_the_targets_and_nowhere_else(tiny):
    made = masked(tiny)
    params = jax.tree.map(lambda p: jnp.asarray(p) * 20, made.init(0))
    window_BxT1 = np.random.default_rng(1).integers(0, 256, (4, T + 1)).astype(np.int32)
    run = jax.jit(made.loss)
    loss = run(params, window_BxT1, KEY)
    examples = jax.jit(made._examples)(window_BxT1, jax.random.split(jax.random.split(KEY)[0], 4))
    logits_BxTxV = model_of(made, params)(examples.input_BxT)
    all_BxT = cross_entropy(logits_BxTxV, np.pad(window_BxT1[:, :-1], ((0, 0), (1, 0))))
    expected = np.take_along_axis(all_BxT, np.asarray(examples.place_BxN), axis=1)
    assert loss.weight == expected.size == 4 * 2
    np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-5)
    assert run(params, window_BxT1, jax.random.key(1)).total != loss.total  # other tokens are hidden


def test_logits_beside_the_targets_get_no_gradient(tiny, monkeypatch):
    made = masked(tiny)
    window_BxT1 = np.random.default_rng(1).integers(0, 256, (4, T + 1)).astype(np.int32)
    params, inspect = made.init(0), Transformer.inspect

    def loss(extra_BxTxV):
        def shifted(*args, **kwargs):
            logits_BxTxV, seen = inspect(*args, **kwargs)
            return logits_BxTxV + extra_BxTxV, seen

        monkeypatch.setattr(Transformer, "inspect", shifted)
        return made.loss(params, window_BxT1, KEY).total

    touched_BxT = (np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((4, T, 257)))) != 0).any(axis=-1)
    examples = jax.jit(made._examples)(window_BxT1, jax.random.split(jax.random.split(KEY)[0], 4))
    target_BxT = np.zeros((4, T), bool)
    np.put_along_axis(target_BxT, np.asarray(examples.place_BxN), True, axis=1)
    np.testing.assert_array_equal(touched_BxT, target_BxT)


def test_a_hidden_token_does_not_reach_the_model(tiny):
    made = masked(tiny)
    window_BxT1 = np.random.default_rng(1).integers(0, 256, (64, T + 1)).astype(np.int32)
    keys, examples = jax.random.split(KEY, 64), jax.jit(made._examples)
    shown = np.asarray(examples(window_BxT1, keys).input_BxT)
    changed = window_BxT1.copy()
    changed[:, :-1][shown == 256] ^= 1
    changed[:, -1] ^= 1
    assert (changed != window_BxT1)[:, :-1].sum() > 50
    np.testing.assert_array_equal(examples(changed, keys).input_BxT, shown)


def test_a_masked_evaluation_hides_the_same_tokens_each_time_whatever_the_batch(tiny):
    made = masked(tiny)
    params = jax.tree.map(lambda p: jnp.asarray(p) * 20, made.init(0))
    data = made.data(corpus(np.zeros(50), np.random.default_rng(2).integers(0, 256, 7 * (T + 1))))
    found = [jax.jit(dataclasses.replace(made, batch_size=b).evaluate)(params, data).loss_W for b in (4, 4, 7)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
    assert len(set(np.asarray(found[0]).tolist())) == 7
    summary = made.summarise(HeldOut(np.asarray(found[0]), None))
    assert summary["validation_loss"] == pytest.approx(float(np.mean(found[0])))
    assert "validation_bits_per_byte" not in summary


def test_a_masked_model_learns_to_fill_in(tiny, tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abcdefgh" * 500)  # any token that is seen tells all others
    settings = {"data.corpus": str(path), "data.objective": "masked", "model.causal": False, "model.vocab_size": 257}
    config = override(tiny, settings | {"train.steps": 150, "train.checkpoint_every": 150})
    row = sweep([config], tmp_path / "runs", progress=False).loc[0]
    assert row["final_loss"] < 0.9 * math.log(8)  # who does not look at the others cannot come below ln 8
    assert math.isnan(row["final_bits_per_byte"])


# --- several documents in a window ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [*({"positions": name} for name in ("rope", "learned", "alibi")), {"architecture": "lstm"}], ids=str
)
def test_a_packed_window_has_the_losses_of_its_documents_alone(tiny, fields):
    length, documents = 16, [b"abc", b"defgh", b"ij", b"klm"]
    made = task(tiny, about={"document_mask": True}, context=length, n_layers=2, **fields)
    params = jax.tree.map(lambda p: jnp.asarray(p) * 5, made.init(0))
    packed = b"".join(b"\0" + document for document in documents) + b"\0"
    window_BxT1 = np.array([list(packed[: length + 1]), list(packed[1 : length + 2])], np.int32)
    assert window_BxT1.shape == (2, length + 1)
    model = model_of(made, params)

    def alone(tokens):
        ids = np.array([list(tokens)], np.int32)
        return cross_entropy(model(ids[:, :-1]), ids).sum()

    # The first token from the separator alone, and the end, which the next separator says, as well.
    whole = [alone(b"\0" + document + b"\0") for document in documents]
    cut = alone(b"abc\0")  # a window that begins within a document
    found = [jax.jit(made.loss)(params, window[None], KEY).total for window in window_BxT1]
    np.testing.assert_allclose(found[0], sum(whole) - _after(alone, packed, length), rtol=1e-4)
    np.testing.assert_allclose(found[1], cut + sum(whole[1:]), rtol=1e-4)
    unmasked = jax.jit(dataclasses.replace(made, document_mask=False).loss)(params, window_BxT1[:1], KEY).total
    assert abs(unmasked - found[0]) > 0.1


def _after(alone, packed, length):
    """What a window of `length` targets cuts off the last document."""
    last = packed.rindex(b"\0", 0, len(packed) - 1)
    return alone(packed[last:]) - alone(packed[last : length + 1])


def test_a_document_mask_follows_the_separators_of_the_text_and_not_what_is_shown(tiny):
    made = masked(tiny, 0.9, document_mask=True, separator=7)
    window_BxT1 = np.array([[1, 7, 2, 3, 7, 7, 4, 5, 6]] * 50, np.int32)
    examples = jax.jit(made._examples)(window_BxT1, jax.random.split(KEY, 50))
    assert (np.asarray(examples.segment_BxT) == [0, 1, 1, 1, 2, 3, 3, 3]).all()
    assert (np.asarray(examples.input_BxT)[:, 1] != 7).any()


# --- auxiliary losses and dropout ----------------------------------------------------------------------------------


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_softmaxs_sum(trained_like):
    plain, params = trained_like
    made = dataclasses.replace(plain, z_loss=0.01)
    window_BxT1 = np.random.default_rng(1).integers(0, 256, (4, T + 1)).astype(np.int32)
    logits = np.asarray(model_of(made, params)(window_BxT1[:, :-1]), np.float64)
    top = logits.max(axis=-1)
    squares = (np.log(np.exp(logits - top[..., None]).sum(axis=-1)) + top) ** 2
    loss, without = jax.jit(made.loss)(params, window_BxT1, KEY), jax.jit(plain.loss)(params, window_BxT1, KEY)
    np.testing.assert_allclose(loss.metrics["z_loss"], squares.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["train_loss"], without.total, rtol=1e-6)
    np.testing.assert_allclose(loss.total, without.total + 0.01 * squares.sum(), rtol=1e-5)
    data = made.data(corpus(np.zeros(50), np.arange(50)))
    loss_W = (jax.jit(task.evaluate)(params, data).loss_W for task in (made, plain))
    np.testing.assert_array_equal(*loss_W)


def test_experts_add_their_balance_to_the_loss_and_their_statistics_to_the_metrics(tiny):
    made = task(tiny, about={"load_balance": 0.5}, n_experts=4, n_layers=2)
    params = jax.tree.map(lambda p: jnp.asarray(p) * 5, made.init(0))
    window_BxT1 = np.random.default_rng(1).integers(0, 256, (4, T + 1)).astype(np.int32)

    @jax.jit
    def inspected(params):
        model = nnx.merge(build.graphdef(made.model), params)
        return model.inspect(window_BxT1[:, :-1], keep=mixture.router_names(made.model))

    logits, seen = inspected(params)
    expected, plain = mixture.statistics(made.model, seen), cross_entropy(logits, window_BxT1).sum()
    loss = jax.jit(made.loss)(params, window_BxT1, KEY)
    assert loss.weight == 4 * T
    assert set(loss.metrics) == {"train_loss", *expected}
    np.testing.assert_allclose(loss.metrics["train_loss"], plain, rtol=1e-5)
    for name, mean in expected.items():
        np.testing.assert_allclose(loss.metrics[name] / loss.weight, mean, rtol=1e-5)
    assert expected["load_balance"] > 1.01
    np.testing.assert_allclose(loss.total, plain + 0.5 * 4 * T * expected["load_balance"], rtol=1e-5)


def test_dropout_is_by_key_in_training_and_not_in_validation(tiny):
    made, plain = task(tiny, dropout=0.5), task(tiny)
    params = jax.tree.map(lambda p: jnp.asarray(p) * 20, made.init(0))
    window_BxT1 = np.random.default_rng(1).integers(0, 256, (4, T + 1)).astype(np.int32)
    loss = jax.jit(made.loss)
    assert loss(params, window_BxT1, KEY).total == loss(params, window_BxT1, KEY).total
    assert loss(params, window_BxT1, KEY).total != loss(params, window_BxT1, jax.random.key(1)).total
    same = jax.jit(plain.loss)
    assert same(params, window_BxT1, KEY).total == same(params, window_BxT1, jax.random.key(1)).total
    data = made.data(corpus(np.zeros(50), np.arange(50)))
    np.testing.assert_array_equal(
        jax.jit(made.evaluate)(params, data).loss_W, jax.jit(plain.evaluate)(params, data).loss_W
    )


def test_what_does_nothing_in_a_run_does_not_split_programs(tiny):
    source = text.reader()
    ones = ({"data.mask_fraction": 0.3}, {"train.load_balance": 1.0}, {"train.seed": 4}, {})
    assert len({source(override(tiny, settings)).task for settings in ones}) == 1
    others = ({"train.z_loss": 1e-4}, {"data.document_mask": True}, {"model.n_experts": 2}, {})
    assert len({source(override(tiny, settings)).task for settings in others}) == 4


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.causal": False}, r"model.causal=false .* data.objective=next needs model.causal=true"),
        ({"model.vocab_size": 255}, "model.vocab_size=255 is too small for bytes; it must be at least 256"),
        ({"model.d_input": 3}, "model.d_input and model.d_output are for vectors"),
        ({"model.d_output": 3}, "model.d_input and model.d_output are for vectors"),
        ({"model.param_dtype": "float64"}, "model.param_dtype=float64 needs JAX_ENABLE_X64=1"),
        ({"model.compute_dtype": "float64"}, "model.compute_dtype=float64 needs JAX_ENABLE_X64=1"),
    ],
)
def test_a_model_that_text_cannot_have_is_refused_in_one_line(settings, message):
    config = override(RunConfig(), settings)
    with pytest.raises(BadInput, match=message) as error:
        TextTask(config.model, 4, 8)
    assert "\n" not in str(error.value)


def test_a_corpus_that_is_too_long_for_32_bit_positions_is_refused_unless_streamed(tiny):
    endless = np.broadcast_to(np.uint8(0), 2**31)
    with pytest.raises(BadInput, match=r"2,147,483,648 tokens does not go on the device.* set data\.stream=true"):
        task(tiny).data(Tokens(endless, endless[:50]))
    assert task(tiny).data(Tokens(endless, endless[:50]), streamed=True).train_n is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.objective": "masked", "model.vocab_size": 257}, "data.objective=masked .* needs model.causal=false"),
        (
            {"data.objective": "masked", "model.causal": False},
            "model.vocab_size=256 is too small for bytes and a mask; it must be at least 257",
        ),
        ({"data.tokenizer": "bpe"}, "as model.vocab_size leaves, 256 here, and needs at least 257"),
        ({"data.tokenizer": "gone.json"}, "data.tokenizer=gone.json cannot be read as a tokenizer: No such file"),
        ({"model.context": 5000}, "too short: the validation stream has 2000 bytes and needs 5001"),
        (
            {"model.context": 1500, "data.tokenizer": "bpe", "model.vocab_size": 300},
            "too short: the validation stream has .* tokens and needs 1501",
        ),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused_in_one_line(tiny, settings, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(BadInput, match=message) as error:
        text.reader()(override(tiny, settings))
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tiny, tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer.keep(tokenizer.train([b"the cat sat on the mat"], 262), tmp_path)
    (path,) = (tmp_path / "tokenizers").iterdir()
    message = "model.vocab_size=261 is too small for a tokenizer of 262 tokens; it must be at least 262"
    with pytest.raises(BadInput, match=message):
        text.reader()(override(tiny, {"data.tokenizer": str(path), "model.vocab_size": 261}))
