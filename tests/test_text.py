"""Language modelling on bytes: where windows come from, what the loss is, and a corpus whose entropy is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import BadInput, RunConfig, build, override
from jaxgpt.corpus import Corpus
from jaxgpt.launch import sweep
from jaxgpt.optimizer import hparams
from jaxgpt.tasks import text
from jaxgpt.tasks.text import TextData, TextTask
from jaxgpt.train import data_key

T = 8


def task(tiny, batch_size=4, eval_windows=10, **fields):
    return TextTask(override(tiny, {f"model.{name}": value for name, value in fields.items()}).model,
                    batch_size, eval_windows)  # fmt: skip


def corpus(train, validation):
    """A corpus of these bytes."""
    return Corpus("made", np.asarray(train, np.uint8), np.asarray(validation, np.uint8), "0" * 64, (1, 1), "")


# --- training windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [1, 2, 5])
def test_windows_start_at_every_position_up_to_the_last_and_nowhere_else(tiny, starts):
    # Byte i is i, so a window says where it starts; 255 in the validation text would show a leak.
    data = task(tiny).data(corpus(np.arange(T + starts), np.full(40, 255)))
    sample = jax.vmap(task(tiny, batch_size=64).sample, in_axes=(None, 0))
    windows = np.asarray(sample(data, jax.random.split(jax.random.key(0), 20))).reshape(-1, T + 1)
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
        return np.asarray(sample(data, data_key(h, jnp.int32(step), jnp.int32(retry)))).tobytes()

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


# --- the loss ------------------------------------------------------------------------------------------------------


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
    logits_BxTxV = nnx.merge(build.graphdef(made.model), params)(window_BxT1[:, :-1])
    expected = cross_entropy(logits_BxTxV, window_BxT1)
    total, weight = jax.jit(made.loss)(params, window_BxT1)
    assert weight == 4 * T
    assert abs(expected.mean() - math.log(256)) > 0.1
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_evaluation_gives_each_window_its_mean_and_the_summary_its_error(trained_like):
    made, params = trained_like  # 7 windows are no multiple of the batch of 4
    validation = np.random.default_rng(2).integers(0, 256, 7 * (T + 1)).astype(np.uint8)
    data = made.data(corpus(np.zeros(50), validation))
    losses_W = np.asarray(jax.jit(made.evaluate)(params, data))
    windows_WxT1 = validation.reshape(7, T + 1).astype(np.int32)
    logits_WxTxV = nnx.merge(build.graphdef(made.model), params)(windows_WxT1[:, :-1])
    expected_W = cross_entropy(logits_WxTxV, windows_WxT1).mean(axis=1)
    np.testing.assert_allclose(losses_W, expected_W, rtol=1e-5)
    summary = made.summarise(losses_W)
    assert summary["validation_loss"] == pytest.approx(expected_W.mean(), rel=1e-5)
    sem = math.sqrt(((expected_W - expected_W.mean()) ** 2).sum() / 6 / 7)
    assert summary["validation_loss_sem"] == pytest.approx(sem, rel=1e-4)
    assert summary["validation_bits_per_byte"] == summary["validation_loss"] / math.log(2)


def test_the_summary_of_a_single_window_has_no_error(tiny):
    assert math.isnan(task(tiny).summarise(np.asarray([2.0], np.float32))["validation_loss_sem"])


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(tiny):
    made = task(tiny, compute_dtype="bfloat16")
    abstract = jax.eval_shape(made.loss, made.init(0), jax.ShapeDtypeStruct((4, T + 1), jnp.int32))
    assert [x.dtype for x in abstract] == [jnp.float32, jnp.float32]
    data = TextData(jax.ShapeDtypeStruct((50,), jnp.uint8), jax.ShapeDtypeStruct((7, T + 1), jnp.uint8))
    assert jax.eval_shape(made.evaluate, made.init(0), data).dtype == jnp.float32


def test_a_model_trained_on_random_letters_comes_to_their_entropy_and_not_below(tiny, tmp_path):
    settings = {"train.steps": 400, "train.batch_size": 32, "train.eval_windows": 200, "train.checkpoint_every": 400}
    row = sweep([override(tiny, settings)], tmp_path, progress=False).loc[0]
    entropy = math.log(8)
    # Every letter is equally likely, so a window's loss varies only by what the model believes beyond that.
    assert row["final_loss"] < entropy + 0.03
    assert row["final_loss"] > entropy - 4 * row["final_loss_sem"]
    assert row["final_bits_per_byte"] == pytest.approx(row["final_loss"] / math.log(2))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.causal": False}, "model.causal=false"),
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


def test_a_corpus_that_is_too_long_for_32_bit_positions_is_refused(tiny):
    endless = np.broadcast_to(np.uint8(0), 2**31)
    with pytest.raises(BadInput, match=r"has 2,147,483,648 bytes; a corpus on the device has at most 2\^31 - 1"):
        task(tiny).data(Corpus("endless", endless, endless[:50], "0" * 64, (1, 1), ""))
