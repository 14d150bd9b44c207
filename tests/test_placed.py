"""Text with a given table of positions: it enters as the model's own do, and what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import build
from jaxgpt.config import BadInput, RunConfig, override
from jaxgpt.model import sinusoidal_TxD
from jaxgpt.run import Source
from jaxgpt.tasks import placed
from jaxgpt.tasks.text import TextData, TextTask

TINY = {"model.d_model": 8, "model.n_heads": 2, "model.n_layers": 1, "model.context": 6}
WINDOWS = np.arange(14, dtype=np.uint8).reshape(2, 7)
TABLE = np.asarray(sinusoidal_TxD(jnp.arange(6), 8))


def model(positions, **settings):
    return override(RunConfig(), {**TINY, "model.positions": positions, **settings}).model


def of_text(c):
    return Source(TextTask(c, 2, 2), lambda: TextData(jnp.asarray(WINDOWS[0]), jnp.asarray(WINDOWS), jnp.ones(2)), "a")


def test_the_table_enters_as_the_models_own_positions_do():
    own, its = model("sinusoidal"), placed.source(of_text(model("none")), TABLE, "right")
    params = build.init_params(own, 0)
    loss_W = jax.jit(lambda params: its.task.evaluate(params, its.data()))(params)
    logits = jax.jit(nnx.merge(build.graphdef(own), params).__call__)(WINDOWS[:, :-1].astype(np.int32))
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), WINDOWS[:, 1:, None].astype(int), axis=2)
    assert np.allclose(loss_W, -log_p[..., 0].mean(axis=1), atol=1e-4)


def test_tables_have_runs_of_their_own():
    first, second = (placed.source(of_text(model("none")), TABLE, name) for name in ("right", "wrong"))
    assert first.task == second.task
    assert first.identity != second.identity


@pytest.mark.parametrize(
    ("c", "table", "said"),
    [
        (model("none"), TABLE[:5], r"shape \(5, 8\); it must be .* = \(6, 8\)"),
        (model("rope"), TABLE, "model.positions=rope has positions of its own"),
        (model("none", **{"model.architecture": "rnn"}), TABLE, "model.architecture=rnn"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(c, table, said):
    with pytest.raises(BadInput, match=said) as refused:
        placed.source(of_text(c), table, "right")
    assert "\n" not in str(refused.value)
