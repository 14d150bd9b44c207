"""The profile of a step: peaks by device, kinds of operations, and a fresh state that leaves the run alone."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import RunConfig, flops, launch, override, store, sweep
from jaxgpt.profile import (
    ARITHMETIC,
    COLLECTIVE,
    KINDS,
    MATRIX,
    MOVEMENT,
    OTHER,
    covered,
    kinds_of_operations,
    mfu,
    operations_in,
    peak_flops,
    profile,
)

# --- peaks and utilisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla V100S-PCIE-32GB", 130),
        ("NVIDIA L4", 121), ("Tesla T4", 65),
        ("TPU v2", 22.5), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459),
        ("TPU v5p", 459), ("TPU v6 lite", 918),
        ("cpu", None), ("NVIDIA L40S", None), ("NVIDIA T400", None), ("NVIDIA RTX A1000", None), ("NVIDIA GH200", None),
        ("NVIDIA H200 MIG 1g.18gb", None), ("TPU v7", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_is_the_published_one_or_unknown(device_kind, teraflops):
    assert peak_flops(device_kind, "bfloat16") == (None if teraflops is None else teraflops * 1e12)
    assert peak_flops(device_kind, "float32") is None


def test_utilisation_is_the_models_flops_over_the_peak():
    config = override(RunConfig(), {"model.context": 32})
    per_token = flops.training_flops_per_sequence(config.model, 32, attention="causal") / 32
    assert mfu(config, 1e6, "NVIDIA H100 80GB HBM3", "bfloat16") == pytest.approx(1e6 * per_token / 989.4e12)
    assert mfu(config, 1e6, "TPU v4", "bfloat16", devices=4) == pytest.approx(1e6 * per_token / (4 * 275e12))
    assert mfu(config, 1e6, "cpu", "bfloat16") is None
    assert mfu(config, float("nan"), "TPU v4", "bfloat16") is None


# --- kinds of operations -------------------------------------------------------------------------------------------

HLO = """HloModule jit_f, is_scheduled=true

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add.1 = f32[] add(%a, %a)
}

%moves (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %transpose.1 = f32[8,4]{1,0} transpose(%p), dimensions={1,0}
}

%mixed (p.1: f32[4,8]) -> f32[8,4] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %copy.9 = f32[4,8]{1,0} copy(%p.1)
  ROOT %tanh.1 = f32[8,4]{1,0} tanh(%copy.9)
}

%product (p.2: f32[4,8]) -> f32[4,4] {
  %p.2 = f32[4,8]{1,0} parameter(0)
  %exp = f32[4,8]{1,0} exponential(%p.2)
  ROOT %dot.7 = f32[4,4]{1,0} dot(%exp, %exp), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %gte = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %product_fusion = f32[4,4]{1,0} fusion(%gte), kind=kOutput, calls=%product
  ROOT %tuple.3 = (s32[], f32[4,8]{1,0}) tuple(%gte, %gte)
}

ENTRY %main.1 (x: f32[4,8]) -> f32[] {
  %x = f32[4,8]{1,0} parameter(0)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%x), condition=%cond, body=%body
  %move_fusion = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%moves
  %mixed_fusion.2 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%mixed
  %gemm.1 = (f32[4,4]{1,0}, s8[64]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %unknown.1 = f32[4]{0} custom-call(%x), custom_call_target="SomethingElse"
  %all-reduce-start.1 = f32[4,8]{1,0} all-reduce-start(%x), to_apply=%region_0.1
  ROOT %reduce.1 = f32[] reduce(%x, %x), dimensions={0,1}, to_apply=%region_0.1
}
"""


def test_each_operation_of_a_program_has_a_kind_and_containers_have_none():
    kinds = kinds_of_operations(HLO)
    assert {
        "product_fusion": MATRIX, "dot.7": MATRIX, "gemm.1": MATRIX, "move_fusion": MOVEMENT, "transpose.1": MOVEMENT,
        "mixed_fusion.2": ARITHMETIC, "reduce.1": ARITHMETIC, "unknown.1": OTHER, "all-reduce-start.1": COLLECTIVE,
    }.items() <= kinds.items()  # fmt: skip
    assert not {"while.1", "x", "tuple.3", "gte"} & kinds.keys()


def test_the_kinds_of_a_real_program_hold_its_products_and_elementwise_operations():
    def f(x_NxN):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ x_NxN).T.sum(0) + x, x_NxN)

    kinds = kinds_of_operations(jax.jit(f).lower(jnp.ones((256, 256))).compile().as_text())
    assert {MATRIX, ARITHMETIC} <= set(kinds.values()) <= set(KINDS)


def metadata(pid, name, tid=None, thread=None):
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
    if thread:
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}}


def event(pid, tid, name, ts, dur, **args):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": args}


def test_operations_are_found_by_what_they_say_by_name_and_on_a_gpu_by_kernel():
    trace = {
        "traceEvents": [
            *metadata(1, "/host:CPU", 7, "tf_XLAEigen/1"), *metadata(2, "/device:TPU:0", 8, "XLA Ops"),
            *metadata(3, "/device:GPU:0", 9, "Stream #14(Compute)"),
            event(1, 7, "dot.7", 0, 10, hlo_op="dot.7"), event(1, 7, "while.1", 0, 99, hlo_op="while.1"),
            event(1, 7, "end: dot.7", 10, 1), event(1, 7, "ThunkExecutor::Execute", 0, 99),
            event(2, 8, "reduce.1", 5, 2),
            event(3, 9, "nvjet_tst_gemm_128x64", 20, 4), event(3, 9, "MemcpyD2D", 24, 1),
            event(3, 9, "ncclDevKernel_AllReduce", 25, 1), event(3, 9, "input_reduce_3", 26, 1),
            event(3, 9, "kernel", 30, 3, hlo_op="move_fusion"),
            {"ph": "i", "pid": 1, "tid": 7, "name": "dot.7", "ts": 3},
        ]
    }  # fmt: skip
    found = [(kind, round(1e6 * a), round(1e6 * b)) for kind, a, b in operations_in(trace, kinds_of_operations(HLO))]
    assert found == [
        (MATRIX, 0, 10), (ARITHMETIC, 5, 7), (MATRIX, 20, 24), (MOVEMENT, 24, 25), (COLLECTIVE, 25, 26),
        (OTHER, 26, 27), (MOVEMENT, 30, 33),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8))))
def test_the_time_covered_by_intervals_counts_each_moment_once(starts_and_lengths):
    intervals = [(a, a + n) for a, n in starts_and_lengths]
    moments = set(itertools.chain(*(range(a, b) for a, b in intervals)))
    assert covered(intervals) == len(moments)


# --- a run ---------------------------------------------------------------------------------------------------------


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_profile_says_what_a_step_costs_and_leaves_a_finished_run_alone(tiny, tmp_path):
    config = override(tiny, {"train.steps": 2})
    sweep([config], tmp_path / "s", progress=False)
    before = content(tmp_path / "s")
    (run,) = launch.plan([config], tmp_path / "s")
    found = profile(run, tmp_path / "p")
    assert content(tmp_path / "s") == before
    assert found.device == "cpu"
    assert (found.dtype, found.mfu) == ("float32", None)
    assert found.flops_exact == flops.flops_exact(config.model, 4 * 8, attention="causal")
    tokens = found.steps_per_dispatch * 4 * 8
    assert found.tokens_per_second == pytest.approx(tokens / found.dispatch_seconds)
    assert found.flops_per_second == pytest.approx(found.flops_exact / (4 * 8) * found.tokens_per_second)
    assert 0 < found.host_seconds <= found.dispatch_seconds
    assert found.device_seconds > 0
    assert min(found.trace_seconds, found.compile_seconds) > 0
    # The state goes in and comes out: parameters, AdamW's two moments, its counter and the state's own four.
    state_bytes = 3 * 4 * flops.parameters(config.model).total
    assert state_bytes <= found.memory["aliased"] <= found.memory["outputs"] < 1.1 * state_bytes + 4096
    assert found.memory["arguments"] > 18_000 + state_bytes  # with the corpus
    assert sum(found.shares.values()) == pytest.approx(1)
    assert {MATRIX, ARITHMETIC, MOVEMENT} <= found.shares.keys() <= set(KINDS)
    # XLA counts what is not a matrix product as well, and attention's hidden half.
    assert found.flops_exact < found.xla_flops < 10 * found.flops_exact
    assert json.loads((tmp_path / "p" / "profile.json").read_text()) == store.jsonable(vars(found))
    assert len(list((tmp_path / "p").rglob("*.xplane.pb"))) == 1


def test_a_second_profile_replaces_the_first_and_its_program_comes_from_the_cache(tiny, tmp_path):
    (run,) = launch.plan([override(tiny, {"train.steps": 2})], tmp_path / "s")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("stays")
    profile(run, tmp_path / "p")
    jax.clear_caches()
    again = profile(run, tmp_path / "p")
    assert again.from_cache
    assert len(list((tmp_path / "p").rglob("*.xplane.pb"))) == 1
    assert (tmp_path / "p" / "mine.txt").exists()
    assert not (tmp_path / "s").exists()


def test_a_profiled_run_ends_as_one_that_was_not(tiny, tmp_path):
    config = override(tiny, {"train.steps": 4})
    sweep([config], tmp_path / "plain", progress=False)
    (run,) = launch.plan([config], tmp_path / "s")
    profile(run, tmp_path / "s" / "profile" / run.id)
    sweep([config], tmp_path / "s", progress=False)
    plain, profiled = (store.read_row(tmp_path / name, run.id) for name in ("plain", "s"))
    timed = ("wall_seconds", "tokens_per_second", "mfu")
    assert {k: v for k, v in plain.items() if k not in timed} == {k: v for k, v in profiled.items() if k not in timed}
    assert np.isfinite(plain["final_loss"])
