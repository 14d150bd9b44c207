"""One model over many devices equals one on one device, is really divided, and moves between meshes bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt import RunConfig, build, override, parallel
from jaxgpt.config import BadInput
from jaxgpt.parallel import Layout

ROOT = Path(__file__).parents[1]


# --- on eight simulated devices ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What eight_devices.py prints. A process of its own: the number of devices is settled when JAX starts."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "tests/eight_devices.py", str(tmp_path_factory.mktemp("checkpoints"))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


CASES = [(model, layout) for model in ("grouped", "plain") for layout in ("DP", "FSDP", "TP", "FSDP x TP")]
CASES += [("mixture", "DP"), ("mixture", "FSDP x TP")]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_loss_gradient_and_training_equal_those_of_one_device(figures, model, layout):
    case = figures["models"][model][layout]
    assert case["loss"] < 1e-5
    assert case["gradient"] < 1e-5 < 1e-2 < case["gradient_size"]
    assert case["params"] < 1e-5 < 1e-2 < case["moved"]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_each_device_does_its_share_of_the_arithmetic(figures, model, layout):
    share = {"DP": 1 / 8, "FSDP": 1 / 8, "TP": 1 / 2, "FSDP x TP": 1 / 8}[layout]
    # Not less; and more only by what is small in a real model: each device of DP updates all parameters.
    assert share < figures["models"][model][layout]["flops"] < 2 * share


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_what_is_sent_is_what_the_layout_needs(figures, model, layout):
    sent = set(figures["models"][model][layout]["collectives"])
    if layout == "FSDP" or layout == "FSDP x TP":
        assert {"all-gather", "all-reduce"} <= sent  # parameters before they are used, gradients after
    elif model != "mixture":
        assert sent == {"all-reduce"}  # of gradients, or of what heads and MLP columns add to the stream
    else:
        assert "all-reduce" in sent


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_fsdp_and_tp_divide_parameters_moments_and_running_mean(figures, model, layout):
    case, parts = figures["models"][model][layout], {"DP": 1, "FSDP": 8, "TP": 2, "FSDP x TP": 8}[layout]
    # Vectors stay whole, and in the plain model the position table and in the mixture the router over `model`.
    assert 1 / parts <= case["matrix_bytes"] < 1.02 / parts
    assert case["matrix_bytes"] <= case["bytes"] < 1.25 / parts


def test_heads_mlp_and_vocabulary_are_divided_over_model_and_the_other_axis_over_data(figures):
    # d_model 16, 4 heads of 4 with 2 of keys, MLP 48, 256 tokens; data 4, model 2.
    assert figures["advanced"]["shapes"] == {
        "query": [16 // 4, 16 // 2],
        "key": [16 // 4, 8 // 2],
        "out": [16 // 2, 16 // 4],
        "up": [16 // 4, 48 // 2],
        "down": [48 // 2, 16 // 4],
        "embed": [256 // 2, 16 // 4],
    }


def test_advance_and_evaluate_run_divided_and_leave_the_state_where_it_lies(figures):
    advanced = figures["advanced"]
    assert advanced["stays"]  # else the second dispatch would compile again
    assert max(advanced["params"], advanced["train_loss"], advanced["validation"]) < 1e-5


@pytest.mark.parametrize(("pair", "devices"), [("8 -> 1", [8, 1]), ("1 -> 8", [1, 8]), ("2x4 -> 4x2", [8, 8])])
def test_a_checkpoint_of_one_mesh_comes_back_on_another_bit_for_bit(figures, pair, devices):
    assert figures["moved"][pair]["devices"] == devices
    assert figures["moved"][pair]["same"]


def test_lanes_share_no_device_and_have_the_layouts_shape(figures):
    assert figures["lanes"]["shapes"] == [[[1, 1]] * 8, [[2, 2]] * 2, [[3, 1]] * 2]
    assert figures["lanes"]["devices"] == [list(range(8)), list(range(8)), list(range(6))]


def test_a_sweep_over_lanes_of_two_devices_ends_as_one_over_single_devices(figures):
    swept = figures["swept"]
    assert list(swept["alone"]) == swept["ids"]
    assert len(set(swept["alone"].values())) == 5
    assert swept["lanes"] == pytest.approx(swept["alone"], abs=1e-5)


def test_a_sweep_stopped_on_four_lanes_goes_on_and_ends_as_one_on_one_lane_of_eight(figures):
    swept = figures["swept"]
    assert swept["interrupted"].startswith("0 of 5 runs are done")
    assert swept["saved"] == [[4]] * 4 + [[]]  # each lane had one, the fifth waited
    assert [step for step, _ in swept["ended_watched"]["dispatches"][:9]] == [*range(4, 12), 4]
    assert swept["ended"] == pytest.approx(swept["alone"], abs=1e-5)


@pytest.mark.parametrize(("sweep", "parts", "new"), [("lanes", 2, 5), ("ended", 8, 1)])
def test_a_state_is_divided_from_the_first_dispatch_and_made_on_one_device(figures, sweep, parts, new):
    seen = figures["swept"][f"{sweep}_watched"]
    assert seen["first_states"] == [1] * new  # the host's; no device of the lane is given a whole one
    assert sum(step == 0 for step, _ in seen["dispatches"]) == new
    for _, share in seen["dispatches"]:
        assert 1 / parts <= share < 1.02 / parts


# --- the rules -----------------------------------------------------------------------------------------------------

FOUR_BY_TWO = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def specs(changes, layout=None, leading=0):
    """{name: PartitionSpec} of a model's parameters."""
    model = override(RunConfig(), {"model.d_model": 16, "model.n_heads": 4} | changes).model
    params = build.abstract_params(model)
    if leading:
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct((4, *p.shape), p.dtype), params)
    tree = parallel.shardings(params, FOUR_BY_TWO, layout or Layout(4, 2, fsdp=True), model, leading)
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {build.param_name(path): sharding.spec for path, sharding in found}


def test_without_fsdp_nothing_is_divided_over_data():
    assert not any("data" in spec for spec in specs({}, Layout(4, 2)).values())
    assert any("model" in spec for spec in specs({}, Layout(4, 2)).values())


def test_leading_axes_of_runs_layers_and_experts_are_left_alone():
    plain, stacked = specs({}), specs({}, leading=1)
    assert stacked == {name: P(None, *spec) for name, spec in plain.items()}
    scanned = specs({"model.scan_layers": True, "model.n_experts": 4})
    assert scanned["layers.mlp.up.kernel"] == P(None, None, "data", "model")
    assert scanned["layers.mlp.router.kernel"] == P(None, "data", None)


def test_a_tensor_that_cannot_be_divided_is_held_whole_and_no_head_is_cut():
    found = specs({"model.n_kv_heads": 1, "model.vocab_size": 257, "model.d_mlp": 6})
    assert found["layers.0.attention.key.kernel"] == P("data", None)  # 4 columns, but one head
    assert found["layers.0.attention.query.kernel"] == P("data", "model")
    assert found["embed.embedding"] == P(None, "data")
    assert found["layers.0.mlp.down.kernel"] == P("model", "data")
    assert specs({"model.d_mlp": 5})["layers.0.mlp.down.kernel"] == P(None, "data")


def test_every_rule_is_of_a_parameter_and_every_matrix_of_the_transformer_is_divided():
    everything = {"model.bias": True, "model.positions": "learned"}
    kinds = [
        everything | {"model.mlp": "swiglu", "model.qk_norm": True},
        everything | {"model.d_input": 8, "model.d_output": 8},
        {"model.n_experts": 4, "model.tie_output": True, "model.mlp": "swiglu"},
    ]
    names = set()
    for changes in kinds:
        found = specs(changes)
        names |= set(found)
        vectors = {name for name, spec in found.items() if len(spec) < 2}
        assert {name for name, spec in found.items() if "data" not in spec} == vectors
    for architecture in ("lstm", "rnn"):
        names |= set(specs({"model.architecture": architecture}))
    assert all(any(name.endswith(end) for name in names) for end in parallel.RULES)


def test_a_tasks_own_matrices_are_divided_along_their_longest_axis():
    tree = {"w": np.zeros((3, 8, 12)), "odd": np.zeros((5, 7)), "v": np.zeros(16), "n": np.zeros(())}
    model = RunConfig().model
    found = parallel.shardings(tree, FOUR_BY_TWO, Layout(4, 2, fsdp=True), model)
    assert {name: sharding.spec for name, sharding in found.items()} == {
        "w": P(None, None, "data"),
        "odd": P(None, None),
        "v": P(None),
        "n": P(),
    }
    runs = parallel.shardings({"v": np.zeros((8, 16))}, FOUR_BY_TWO, Layout(4, 2, fsdp=True), model, leading=1)
    assert runs["v"].spec == P(None, None)


# --- on one device -------------------------------------------------------------------------------------------------


def test_without_a_mesh_or_with_one_device_a_program_is_what_it_was():
    (mesh,) = parallel.lanes(Layout(), jax.devices()[:1])
    x = jnp.arange(12.0).reshape(4, 3)

    def marked(x):
        return parallel.each_group(jnp.sin, parallel.over_data(x)) * 2

    plain = str(jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(x))
    assert str(jax.make_jaxpr(marked)(x)) == plain
    with jax.set_mesh(mesh):
        assert str(jax.make_jaxpr(marked)(x)) == plain
    with jax.sharding.use_abstract_mesh(FOUR_BY_TWO):
        assert str(jax.make_jaxpr(marked)(x)).count("sharding_constraint") == 3


def test_what_is_not_divisible_is_not_constrained():
    with jax.sharding.use_abstract_mesh(FOUR_BY_TWO):
        jaxpr = str(jax.make_jaxpr(parallel.over_data)({"rows": jnp.zeros((6, 3)), "number": jnp.zeros(())}))
        assert "sharding_constraint" not in jaxpr
        assert "sharding_constraint" in str(jax.make_jaxpr(lambda x: parallel.over_data(x, axis=1))(jnp.zeros((3, 8))))


def test_each_group_gives_what_one_call_gives():
    x = jnp.arange(24.0).reshape(8, 3)
    with jax.sharding.use_abstract_mesh(FOUR_BY_TWO):
        jaxpr = jax.make_jaxpr(lambda x: parallel.each_group(lambda y: y * len(y), x))(x)
    assert jaxpr.out_avals[0].shape == (8, 3)
    assert "2.0" in str(jaxpr)  # rows of a group


def test_put_and_gather_return_the_same_bits():
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(3)}
    (mesh,) = parallel.lanes(Layout(), jax.devices()[:1])
    back = parallel.gather(parallel.put(tree, parallel.replicated(tree, mesh)))
    np.testing.assert_array_equal(back["a"], tree["a"])
    assert back["n"] == 3
    assert isinstance(back["a"], np.ndarray)


def test_one_process_agrees_with_itself_and_reads_all_rows():
    (mesh,) = parallel.lanes(Layout(), jax.devices()[:1])
    assert parallel.agree(5) == 5
    assert parallel.any_host(True) is True
    assert parallel.any_host(False) is False
    assert parallel.is_writer()
    assert parallel.rows(mesh, 8) == slice(0, 8)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": 0}, "layout.data=0 must be a whole number, 1 or more"),
        ({"model": 1.5}, "layout.model=1.5 must be a whole number, 1 or more"),
        ({"fsdp": True}, "layout.fsdp=true shares parameters over layout.data, which is 1; it must be 2 or more"),
    ],
)
def test_a_layout_that_is_none_is_refused(wrong, message):
    with pytest.raises(BadInput) as error:
        Layout(**wrong)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (Layout(3), {"train.batch_size": 16}, "train.batch_size=16 must be divisible by layout.data=3"),
        (
            Layout(8),
            {"train.batch_size": 16, "train.microbatches": 4},
            "train.batch_size=16 / train.microbatches=4 must be divisible by layout.data=8",
        ),
        (
            Layout(1, 2),
            {"model.architecture": "lstm"},
            "layout.model=2 is for model.architecture=transformer, not lstm",
        ),
        (
            Layout(1, 3),
            {"model.n_heads": 4, "model.d_mlp": 64},
            "layout.model=3 divides neither model.n_heads=4 nor the MLP's width 64; it must divide one of them",
        ),
        (
            Layout(1, 3),
            {"model.n_heads": 4, "model.mlp": "none"},
            "layout.model=3 divides neither model.n_heads=4 nor the MLP's width 0; it must divide one of them",
        ),
    ],
)
def test_a_run_that_cannot_be_spread_is_refused(layout, changes, message):
    with pytest.raises(BadInput) as error:
        parallel.check(layout, override(RunConfig(), changes))
    assert str(error.value) == message


def test_a_run_of_which_a_part_can_be_divided_is_not_refused():
    parallel.check(Layout(8, 3, fsdp=True), override(RunConfig(), {"model.n_heads": 4, "model.d_mlp": 66}))
    parallel.check(Layout(1, 4), override(RunConfig(), {"model.n_heads": 4, "model.d_mlp": 65}))


def test_more_devices_than_there_are_are_refused():
    message = r"layout.data=2 x layout.model=2 needs 4 devices; there are 1"
    with pytest.raises(BadInput, match=message):
        parallel.lanes(Layout(2, 2), jax.devices()[:1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"address": "127.0.0.1:1"}, "missing: count, index"),
        ({"count": 2, "index": 0}, "missing: address"),
        ({"address": "127.0.0.1:1", "count": 2, "index": 2}, "index=2 must be from 0 to 1, one less than count=2"),
    ],
)
def test_hosts_are_not_started_from_half_of_what_it_takes(given, message):
    with pytest.raises(BadInput, match=message):
        parallel.start_hosts(**given)


def test_without_a_cluster_it_says_what_to_give():
    code = "from jaxgpt import parallel, BadInput\ntry: parallel.start_hosts()\nexcept BadInput as e: print(e)"
    cluster = ("SLURM", "OMPI", "KUBERNETES", "TPU", "JAX_COORDINATOR")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(cluster)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("no cluster was recognised")
    assert "give address=HOST:PORT, count and index" in done.stdout
