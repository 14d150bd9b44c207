"""Subnetworks of a small text network: the network by hand, masks that hold, pruning, and starts that are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import RunConfig, step
from jaxgpt.config import BadInput, override
from jaxgpt.optimizer import hparams
from jaxgpt.tasks import tickets
from jaxgpt.tasks.tickets import Network, Ticket

NETWORK = Network(3, 4, 10, 6)
LOSSES = jax.jit(tickets.losses)


def config(number=0, corpus="stdlib", **more):
    return override(RunConfig(), {
        "model.n_heads": 1, "model.context": NETWORK.reads, "train.batch_size": 8, "train.steps": 5,
        "train.eval_windows": 16, "train.seed": number, "train.data_seed": 3, "optimizer.weight_decay": 0.0,
        "optimizer.learning_rate": 0.05, "data.corpus": corpus, **more,
    })  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text("the cat sat on the mat; " * 20)
    return str(tmp_path / "text")


def half():
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 2, m.shape).astype(np.float32) for name, m in NETWORK.whole().items()}


def test_the_network_by_hand_predicts_the_last_byte_from_those_before():
    weights = NETWORK.init(0)
    windows = np.random.default_rng(1).integers(0, 256, (5, NETWORK.reads + 1)).astype(np.uint8)
    found = LOSSES(weights, windows)
    for loss, window in zip(found, windows, strict=True):
        x = np.concatenate([weights["embed"][byte].astype(float) for byte in window[:-1]])
        x = np.maximum(x @ weights["first"] + weights["first_bias"], 0)
        x = np.maximum(x @ weights["second"] + weights["second_bias"], 0)
        out = x @ weights["out"] + weights["out_bias"]
        assert float(loss) == pytest.approx(np.log(np.exp(out).sum()) - out[window[-1]], rel=1e-5)


def test_pruning_keeps_the_largest_of_those_that_are_left_in_each_matrix():
    weights = {"first": np.array([[-5.0, 1.0], [2.0, -3.0]]), "second": np.array([[4.0, 0.5, -9.0, 7.0]])}
    mask = {"first": np.ones((2, 2)), "second": np.array([[1.0, 1.0, 0.0, 0.0]])}
    found = tickets.pruned(weights, mask, 0.5)
    np.testing.assert_array_equal(found["first"], [[1, 0], [0, 1]])
    np.testing.assert_array_equal(found["second"], [[1, 0, 0, 0]])


def test_pruning_again_and_again_leaves_ever_smaller_parts_of_the_last_mask():
    weights, mask = NETWORK.init(2), NETWORK.whole()
    for _ in range(3):
        smaller = tickets.pruned(weights, mask, 0.5)
        for name in mask:
            assert smaller[name].sum() == round(mask[name].sum() / 2)
            assert (smaller[name] <= mask[name]).all()
        mask = smaller


def test_a_shuffled_mask_has_as_many_weights_elsewhere():
    mask = half()
    found = tickets.shuffled(mask, np.random.default_rng(3))
    for name in mask:
        assert found[name].sum() == mask[name].sum()
        assert (found[name] != mask[name]).any()


def test_what_is_masked_stays_zero_and_the_rest_goes_from_its_start(corpus):
    given = [Ticket(NETWORK.init(0), NETWORK.whole()), Ticket(NETWORK.init(1), half())]
    setup = tickets.source(NETWORK, given)
    for number, ticket in enumerate(given):
        c = config(number, corpus)
        its = setup(c)
        assert its.numbers == {"ticket": number}
        data, prog, h = (its.data(), {"ticket": np.float32(number)}), step.program(c, its.task), hparams(c)
        state, _ = step.advance(prog, step.init_state(prog, h, number), 5, h, data)
        weights = tickets.trained(jax.tree.map(np.asarray, state.params), ticket)
        for name in tickets.PRUNED:
            there = ticket.mask[name] > 0
            assert (weights[name][~there] == 0).all()
            moved = np.abs(weights[name] - ticket.start[name])[there]
            assert 0.01 < moved.max() < 5 * 0.05 * 1.5  # Adam's step is about the rate: it went from its start


def test_a_step_of_the_change_is_a_step_of_the_weights():
    task, ticket = tickets.Tickets(NETWORK, 8), Ticket(NETWORK.init(4), half())
    windows = np.random.default_rng(2).integers(0, 256, (8, NETWORK.reads + 1)).astype(np.uint8)
    batch = jnp.asarray(windows), (ticket.start, ticket.mask)
    change = task.init(0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(change))

    @jax.jit
    def both(change, weights):
        ours = jax.grad(lambda change: task.loss(change, batch, jax.random.key(0)).total)(change)
        return ours, jax.grad(lambda w: tickets.losses(tickets.masked(w, ticket.mask), batch[0]).sum())(weights)

    ours, direct = both(change, ticket.start)
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, direct[name], rtol=1e-4, atol=1e-6)
    assert all((ours[name][ticket.mask[name] == 0] == 0).all() for name in tickets.PRUNED)


def test_validation_is_on_the_held_out_windows_from_the_runs_own_ticket(corpus):
    given = [Ticket(NETWORK.init(5), NETWORK.whole()), Ticket(NETWORK.init(6), half())]
    its = tickets.source(NETWORK, given)(config(1, corpus))
    data = its.data()
    loss_W = jax.jit(its.task.evaluate)(its.task.init(0), (data, {"ticket": np.float32(1)}))
    np.testing.assert_allclose(loss_W, LOSSES(tickets.masked(given[1].start, given[1].mask), data[1]), rtol=1e-5)
    said = its.task.summarise(np.array([1.0, 3.0]))
    assert said == {"validation_loss": 2.0, "validation_loss_sem": pytest.approx(1.0)}


def test_other_masks_are_other_runs(corpus):
    one, other = (tickets.source(NETWORK, [Ticket(NETWORK.init(0), mask)])(config(0, corpus))
                  for mask in (half(), NETWORK.whole()))  # fmt: skip
    assert one.task == other.task
    assert one.identity != other.identity


@pytest.mark.parametrize(("changed", "named"), [
    ({"train.seed": 1}, "train.seed=1 names no ticket"), ({"model.context": 4}, "model.context=4"),
    ({"train.microbatches": 2}, "train.microbatches=2"), ({"optimizer.weight_decay": 0.1}, "weight_decay=0.1"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(changed, named, corpus):
    setup = tickets.source(NETWORK, [Ticket(NETWORK.init(0), NETWORK.whole())])
    with pytest.raises(BadInput, match=named):
        setup(config(corpus=corpus, **changed))
