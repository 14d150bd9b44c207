"""Where a training step's time goes: device and host, kinds of operations, memory, and the share of the peak (MFU).

A profile trains a fresh state for a few steps and throws it away: the run's own files are not touched, and what the
run computes does not change.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt import flops, store
from jaxgpt.config import BadInput, RunConfig

if TYPE_CHECKING:
    from jaxgpt.run import Run

DISPATCHES = 3  # timed, and as many traced
TRACED_STEPS = 4  # at most, in a traced dispatch; a trace holds some thousand events per step

# --- peaks ---------------------------------------------------------------------------------------------------------

# Published peak of dense bfloat16 matrix products, FLOPs per second of one JAX device, by `device_kind`; the first that
# is found in it counts. Data sheets that state the rate with sparsity are halved. NVIDIA: data sheets of H100, H200,
# A100, V100, L4 and T4; V100 and T4 have no bfloat16 units, and stand with their float16 peak. TPU: Google Cloud's
# pages on the system architecture of each version, per chip; on v2 and v3 each of a chip's two cores is a device.
PEAKS: tuple[tuple[str, float], ...] = (
    ("H200 NVL", 835.5e12), ("H200", 989.4e12),
    ("H100 NVL", 835.5e12), ("H100 PCIe", 756e12), ("H100", 989.4e12),
    ("A100", 312e12),
    ("V100S", 130e12), ("V100-PCIE", 112e12), ("V100", 125e12),
    ("L4", 121e12), ("T4", 65e12),
    ("TPU v6 lite", 918e12), ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12),
    ("TPU v4", 275e12), ("TPU v3", 61.5e12), ("TPU v2", 22.5e12),
)  # fmt: skip


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak FLOPs per second of dense matrix products of one device; None where no published figure is known.

    For bfloat16 and float16 only: what float32 means on an accelerator depends on the precision that is asked for. A
    part of a GPU (MIG) has no published peak.
    """
    if dtype not in ("bfloat16", "float16") or " MIG " in device_kind:
        return None
    return next((peak for name, peak in PEAKS if re.search(rf"\b{re.escape(name)}(\b|-)", device_kind)), None)


def mfu(config: RunConfig, tokens_per_second: float, device_kind: str, dtype: str, devices: int = 1) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), a share of the peak from 0 to 1; None without one.

    The model's FLOPs are `flops_exact` with the attention that a causal mask leaves: recomputation does not count.
    """
    peak = peak_flops(device_kind, dtype)
    if peak is None or not tokens_per_second > 0:  # NaN too: nothing was measured
        return None
    return flops.flops_exact(config.model, tokens_per_second, attention="causal") / (peak * devices)


# --- kinds of operations -------------------------------------------------------------------------------------------

MATRIX, COLLECTIVE, ARITHMETIC, MOVEMENT, OTHER = (
    "matrix products", "collectives", "elementwise and reductions", "data movement", "other",
)  # fmt: skip
KINDS = (MATRIX, COLLECTIVE, ARITHMETIC, MOVEMENT, OTHER)  # a fusion is of the first kind that it holds
MOVES = frozenset((
    "bitcast", "bitcast-convert", "broadcast", "concatenate", "copy", "copy-start", "copy-done", "dynamic-slice",
    "dynamic-update-slice", "gather", "iota", "pad", "reshape", "reverse", "scatter", "slice", "transpose",
))  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
PASSIVE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id"))
CONTAINERS = frozenset(("while", "conditional", "call"))  # their time is that of what they hold
UNCLEAR = frozenset(("custom-call", "sort", "fft", "rng-bit-generator", "infeed", "outfeed", "send", "recv"))
PRODUCT_NAMES = re.compile(r"gemm|matmul|cublas|cutlass|xmma|conv|dot|fmha|flash|attention", re.IGNORECASE)


def kinds_of_operations(hlo: str) -> dict[str, str]:
    """{operation: kind} of a compiled program's text (`compiled.as_text()`), for those that take time by themselves.

    A fusion, or a custom call of a library's matrix product, is of the first kind in KINDS that it holds.
    """
    computations: dict[str, list[tuple[str, str, str]]] = {}
    inside: list[tuple[str, str, str]] = []
    for line in hlo.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = computations.setdefault(found[1], [])
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\((.*)", line):
            inside.append((found[1], found[2], found[3]))

    def kind(opcode: str, rest: str) -> str | None:
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)
        if opcode == "fusion" and called:
            held = {kind(code, more) for _, code, more in computations.get(called[1], [])}
            return next((one for one in KINDS if one in held), MOVEMENT)
        if opcode in PASSIVE or opcode in CONTAINERS:
            return None
        if opcode in ("dot", "convolution", "ragged-dot"):
            return MATRIX
        if opcode.startswith(COLLECTIVES):
            return COLLECTIVE
        if opcode in UNCLEAR:
            target = re.search(r'custom_call_target="([^"]*)"', rest)
            return MATRIX if target and PRODUCT_NAMES.search(target[1]) else OTHER
        return MOVEMENT if opcode in MOVES else ARITHMETIC

    every = (operation for operations in computations.values() for operation in operations)
    return {name: its for name, opcode, rest in every if (its := kind(opcode, rest)) is not None}


def operations_in(trace: Mapping[str, Any], kinds: Mapping[str, str]) -> list[tuple[str, float, float]]:
    """(kind, begin, end in seconds) of each execution of an operation in a trace that jax.profiler wrote.

    An event is an operation if it says so (`hlo_op`: CPU, and GPU kernels) or is called like one (TPU). A GPU kernel
    without it, as in a CUDA graph, goes by its name: a product, a copy, a collective of NCCL, or other.
    """
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M" and e["name"] == "process_name"}
    lanes = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("ph") == "M" and e["name"] == "thread_name"
    }
    found = []
    for e in events:
        if e.get("ph") != "X":
            continue
        operation = (e.get("args") or {}).get("hlo_op", e["name"])
        its = kinds.get(operation)
        if its is None and "/device:GPU" in names.get(e["pid"], "") and "Stream" in lanes.get((e["pid"], e["tid"]), ""):
            its = _kind_of_kernel(e["name"])
        if its is not None:
            found.append((its, e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6))
    return found


def _kind_of_kernel(name: str) -> str:
    if "nccl" in name.lower():
        return COLLECTIVE
    if re.match(r"mem(cpy|set)", name, re.IGNORECASE):
        return MOVEMENT
    return MATRIX if PRODUCT_NAMES.search(name) else OTHER


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


# --- a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What a step of a run costs. Seconds, bytes and FLOPs; of one step where nothing else is said."""

    device: str
    dtype: str  # of the arithmetic
    steps_per_dispatch: int  # as many as in training
    trace_seconds: float  # Python to XLA's program
    compile_seconds: float  # XLA's program to the device's, or reading it from the cache
    from_cache: bool
    dispatch_seconds: float  # of a whole dispatch, until its result is there
    host_seconds: float  # of it, until Python goes on
    device_seconds: float | None  # of a traced step, in which any operation ran; None if the trace names none
    tokens_per_second: float
    flops_per_second: float | None  # the model's, by the closed form
    mfu: float | None
    flops_exact: float | None  # by the closed form, causal; None for a task with a model of its own
    xla_flops: float | None  # XLA's own count; it takes the body of a loop within the step once
    memory: dict[str, int]  # XLA's plan in bytes: arguments, outputs, temporaries, of which aliased
    shares: dict[str, float]  # of the operations' time, by kind; {} if the trace names none
    trace: str  # folder of the trace


def profile(run: Run, folder: Path) -> Profile:
    """Times and traces a few steps of a run from a fresh state. Only `folder` is written to: the trace, profile.json.

    Raises BadInput as the run's data does, StoreError when the disk is full.
    """
    import jax
    import numpy as np

    from jaxgpt.optimizer import hparams
    from jaxgpt.parts import compute_dtype
    from jaxgpt.population import STREAM_CHUNK, Feed, inputs
    from jaxgpt.run import run_parameters
    from jaxgpt.step import CHUNK, advance, init_state, program
    from jaxgpt.train import SECONDS_PER_DISPATCH

    h, prog = hparams(run.config), program(run.config, run.source.task)
    state = init_state(prog, h, run.config.train.seed)
    numbers: dict[str, Any] = {name: np.float32(x) for name, x in run.source.numbers.items()}
    data = inputs(run.source.data(), numbers)
    feed = Feed(run.source.stream, int(h.data_seed))

    hits: list[str] = []
    listen = partial(_note_cache_hit, hits)
    jax.monitoring.register_event_listener(listen)
    began = time.perf_counter()
    lowered = advance.lower(prog, state, np.int32(1), h, data, feed.take(0, 0, 1))
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    jax.monitoring.unregister_event_listener(listen)

    def dispatch(n: int) -> tuple[float, float]:
        nonlocal state
        batches, start = feed.take(0, int(state.step), n), time.perf_counter()
        state, _ = compiled(state, np.int32(n), h, data, batches)
        returned = time.perf_counter()
        jax.block_until_ready(state)
        return returned - start, time.perf_counter() - start

    dispatch(1)  # the first is slower: memory is found
    most = CHUNK if run.source.stream is None else STREAM_CHUNK
    n = max(1, min(most, int(SECONDS_PER_DISPATCH / dispatch(1)[1])))
    host, total = np.mean([dispatch(n) for _ in range(DISPATCHES)], 0).tolist()
    few = min(n, TRACED_STEPS)
    trace = _traced(folder, lambda: [dispatch(few) for _ in range(DISPATCHES)])
    ran = operations_in(trace, kinds_of_operations(compiled.as_text() or ""))

    c, device = run.config, jax.devices()[0].device_kind
    tokens = n * c.train.batch_size * c.model.context / total
    exact = None
    if run_parameters(run, state.params)[1]:
        exact = flops.flops_exact(c.model, c.train.batch_size * c.model.context, attention="causal")
    cost = compiled.cost_analysis() or {}
    found = Profile(
        device=device,
        dtype=str(compute_dtype(c.model)),
        steps_per_dispatch=n,
        trace_seconds=lowered_at - began,
        compile_seconds=compiled_at - lowered_at,
        from_cache=bool(hits),
        dispatch_seconds=total,
        host_seconds=host,
        device_seconds=covered((a, b) for _, a, b in ran) / (DISPATCHES * few) if ran else None,
        tokens_per_second=tokens,
        flops_per_second=None if exact is None else exact * n / total,
        mfu=None if exact is None else mfu(c, tokens, device, str(compute_dtype(c.model))),
        flops_exact=exact,
        xla_flops=cost.get("flops"),
        memory=_memory(compiled.memory_analysis()),
        shares=_shares(ran),
        trace=str(folder),
    )
    store.write_json(folder / "profile.json", vars(found))
    return found


def _note_cache_hit(hits: list[str], event: str, **_details: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        hits.append(event)


def _traced(folder: Path, work: Any) -> dict[str, Any]:
    """The trace of `work()`, which stays in `folder` for a viewer; an older trace there is replaced."""
    import shutil

    import jax

    shutil.rmtree(folder / "plugins", ignore_errors=True)  # what the profiler writes
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store.store_error(folder, error) from error
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would fill the trace and slow what is measured
    with jax.profiler.trace(str(folder), profiler_options=options):
        work()
    paths = sorted(folder.rglob("*.trace.json.gz"))
    if not paths:
        raise BadInput(f"the profiler of {jax.default_backend()} left no trace in {folder}")
    with gzip.open(paths[-1]) as file:
        return json.load(file)


def _shares(ran: list[tuple[str, float, float]]) -> dict[str, float]:
    seconds = {its: sum(end - begin for kind, begin, end in ran if kind == its) for its in KINDS}
    total = sum(seconds.values())
    return {its: spent / total for its, spent in seconds.items() if spent} if total else {}


def _memory(plan: Any) -> dict[str, int]:
    names = {"arguments": "argument", "outputs": "output", "temporaries": "temp", "aliased": "alias"}
    return {ours: int(getattr(plan, f"{xla}_size_in_bytes")) for ours, xla in names.items()} if plan else {}
