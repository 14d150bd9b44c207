"""What training needs of a device's memory: the state of a run, exactly, and one step's working set, estimated.

Closed forms from the config alone: they import no JAX, so that a sweep can be cut into blocks before anything compiles.
Tests hold the state to the real one's leaves, and the estimates to XLA's memory analysis of the real programs on CPU.
No accelerator was there to hold them to one: see `step_bytes`. The corpus is not counted: all runs share it.

Letters as in model.py, and N tokens of one microbatch, P parameters, R runs.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from jaxgpt.config import ModelConfig, RunConfig
from jaxgpt.flops import parameters

USABLE = 0.8  # of a device's memory: the rest is for what the estimates miss, validation, and fragmentation
METRICS_BYTES = 4 * 128 * 8  # step.CHUNK float32 numbers of at most about 8 metrics

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


# --- the state -----------------------------------------------------------------------------------------------------


def state_bytes(config: RunConfig) -> int:
    """Bytes of a run's `step.TrainState`: parameters, the optimizer's moments, the running mean, counters. Exact."""
    c, o = config.model, config.optimizer
    width, n = _BYTES[c.param_dtype], parameters(c).total
    mean = 0 if o.ema is None else n * max(4, width)  # in float32 or wider
    counters = 4 * 4  # step, retry, bad_in_a_row, bad_steps: int32
    # optax counts Adam's and Lion's steps; Muon has a count for each of its two parts, and three coefficients.
    coefficient = 8 if "float64" in (c.param_dtype, c.compute_dtype) else 4
    own = {"adamw": 4, "lion": 4, "sgd": 0, "muon": 2 * 4 + 3 * coefficient}[o.name]
    return (n + moments(config)) * width + mean + counters + own


def moments(config: RunConfig) -> int:
    """Numbers that the optimizer keeps: two per parameter with Adam, one with SGD, Lion and Muon's hidden matrices."""
    n = parameters(config.model).total
    return {"adamw": 2 * n, "sgd": n, "lion": n, "muon": 2 * n - hidden(config.model)}[config.optimizer.name]


def hidden(c: ModelConfig) -> int:
    """Entries of the hidden matrices, those that Muon orthogonalises: a block's or a cell's, without the router."""
    if c.architecture != "transformer":
        gates = 4 if c.architecture == "lstm" else 1
        return c.n_layers * 2 * c.d_model * gates * c.d_model
    heads = 2 * (c.n_heads + c.kv_heads) * c.head_width
    return c.n_layers * c.d_model * (heads + (c.n_experts or 1) * (3 if c.mlp == "swiglu" else 2) * c.mlp_width)


# --- a step's working set, estimated -------------------------------------------------------------------------------

# Arrays of the MLP's hidden width that its backward pass reads. Within one step XLA computes some of them again from
# others; a scan over layers hands on all that JAX lists as residuals (relu's condition is a quarter: a byte).
HIDDEN_UNROLLED = {"gelu": 3, "gelu_exact": 4, "relu": 2, "relu2": 2, "swiglu": 5, "none": 0}
HIDDEN_SCANNED = {"gelu": 6, "gelu_exact": 4, "relu": 1.25, "relu2": 2.25, "swiglu": 6, "none": 0}
# Per position and unit of a recurrent layer: its gates and their derivatives, its input, state and output.
CELL = {"lstm": 13, "rnn": 4}
NORM = 3  # the centred input, the normed one, and the scaled one


@dataclass(frozen=True)
class _Widths:
    """Where a step runs, as far as memory depends on it."""

    compute: int  # bytes of an activation
    wide: int  # bytes of what is computed in float32 or wider
    cpu: bool
    flash: bool  # a kernel of attention that keeps nothing of size [B, H, T, T]
    blockwise: bool  # blockwise.py, which keeps nothing of it either, and works on a block of it


def step_bytes(config: RunConfig, platform: str) -> int:
    """Bytes that one training step of one run needs on top of its state, estimated; not a bound.

    `platform`: cpu, gpu or tpu. The larger of two moments:

    - the backward pass begins: what the forward pass keeps of one microbatch in every layer, what the first backward
      products make (of the logits, or in a block), and arrays of the parameters' size that XLA makes early: the decayed
      moments, which need no gradient, and sums over microbatches or stacked gradients of scanned layers;
    - it has ended: all gradients (their norm needs all of them), the decayed moments, and Muon's iteration.

    On CPU 0.75 to 1.35 of XLA's own figure (memory_analysis, temporary bytes) for every config of tests/test_memory.py,
    for most 0.9 to 1.2. For accelerators the same terms are taken, with activations at the compute dtype's width, less
    what was seen of XLA on CPU only; that could not be held against one.
    """
    c, w = config.model, _widths(config, platform)
    weights = parameters(c).total * _BYTES[c.param_dtype]
    decayed = moments(config) * _BYTES[c.param_dtype]
    # In the loop over microbatches: the sums so far and the part's own. Only after it come the moments.
    early = 2 * weights if config.train.microbatches > 1 else decayed + weights * _scanned(c)
    iteration = _iterated(c) * _BYTES[c.param_dtype] if config.optimizer.name == "muon" else 0
    return METRICS_BYTES + int(max(_activations(config, w) + early, weights + decayed + iteration))


def _iterated(c: ModelConfig) -> int:
    """Numbers that Muon's iteration needs at once. XLA interleaves the iterations of separate matrices, and about five
    arrays of the size of each are there together; of tensors that stack matrices (experts, scanned layers) about one.
    """
    stacked = hidden(c) if c.scan_layers else 0
    if c.n_experts is not None and c.architecture == "transformer" and not c.scan_layers:
        stacked = hidden(c) - hidden(dataclasses.replace(c, n_experts=None, mlp="none"))
    return 5 * (hidden(c) - stacked) + stacked


def _widths(config: RunConfig, platform: str) -> _Widths:
    c, cpu = config.model, platform == "cpu"
    auto = c.param_dtype if cpu else "bfloat16"
    compute = auto if c.compute_dtype == "auto" else c.compute_dtype
    # XLA computes bfloat16 in float32 on CPU, and keeps what it computed.
    width = max(4, _BYTES[compute]) if cpu else _BYTES[compute]
    return _Widths(width, max(4, _BYTES[compute]), cpu, _flash(c, platform, compute), cpu and _blockwise(config))


def _flash(c: ModelConfig, platform: str, compute: str) -> bool:
    """Whether model.py takes cuDNN's kernel."""
    fits = compute == "bfloat16" and c.head_width <= 128 and c.head_width % 8 == 0 and c.positions != "alibi"
    chosen = c.attention == "softmax" and c.attention_kernel != "plain" and c.matmul_precision == "default"
    return platform == "gpu" and fits and chosen and c.dropout == 0


def _blockwise(config: RunConfig) -> bool:
    """Whether model.py takes blockwise.py on a CPU."""
    c = config.model
    plain = c.attention == "softmax" and c.causal and c.positions != "alibi" and c.attention_kernel == "auto"
    return plain and c.dropout == 0 and not config.data.document_mask


def _activations(config: RunConfig, w: _Widths) -> float:
    """Bytes when the backward pass begins, without anything of the parameters' size."""
    c = config.model
    tokens = config.train.batch_size // config.train.microbatches * c.context
    stream = tokens * c.d_model * w.compute
    # The norm before the output, the embedding and the last stream; two gradients of the stream.
    ends = (NORM * (c.norm != "none") + 2 + 2) * stream
    # Logits; softmax, which becomes their gradient; what a cap was computed from.
    head = ends + tokens * c.output_width * (w.compute + w.wide + (c.logit_cap is not None) * w.compute)
    if c.architecture != "transformer":
        cell = (CELL[c.architecture] + NORM * (c.norm != "none") + 1 + 2 * (c.dropout > 0)) * stream
        return c.n_layers * cell + max(head, 2 * stream)
    if not c.n_layers:
        return head
    block = 2 * stream + 2 * tokens * c.mlp_width * w.compute
    block += 2 * tokens * c.n_heads * c.context * w.compute if c.dropout else 0
    # XLA works on all blocks of queries at once; together they see so much of the square.
    seen = (1 + 1 / _query_blocks(c.context)) / 2
    block += 3 * seen * tokens * c.n_heads * c.context * w.wide if w.blockwise else 0
    # On CPU XLA finds that what remat computes again is there already, and keeps it; a loop hides that from it.
    if c.remat and (_scanned(c) or not w.cpu):
        return c.n_layers * stream + max(head, _layer(c, tokens, w, HIDDEN_UNROLLED, in_loop=False) + block)
    if _scanned(c):  # the body takes its layer's part out of the stacks
        taken = _scores(c, tokens, w, in_loop=False) + 8 * stream
        return c.n_layers * _layer(c, tokens, w, HIDDEN_SCANNED, in_loop=True) + max(head, taken + block)
    layer = _layer(c, tokens, w, HIDDEN_UNROLLED, in_loop=config.train.microbatches > 1)
    return c.n_layers * layer + max(head, block)


def _query_blocks(length: int) -> int:
    """`blockwise.blocks`, without its import of JAX."""
    return next(n for n in range(min(8, max(1, length // 64)), 0, -1) if length % n == 0)


def _scanned(c: ModelConfig) -> bool:
    """Whether there is a loop over the layers: XLA unrolls one of a single turn."""
    return c.scan_layers and c.n_layers > 1


def _scores(c: ModelConfig, tokens: int, w: _Widths, *, in_loop: bool) -> float:
    """Bytes of what one layer keeps of size [B, H, T, T]."""
    pairs = tokens * c.n_heads * c.context
    dropped = 2 * (c.dropout > 0) * w.compute  # which, and the pattern without them
    if w.flash or w.blockwise:
        return tokens * c.n_heads * w.wide  # the log of each query's sum
    if c.attention == "linear":
        return pairs * (w.compute + dropped)
    # The exponentials and the pattern. XLA's softmax for CPU also keeps the sums, spread over the keys.
    spread = w.wide if w.cpu and not in_loop else 0
    return pairs * (w.wide + w.compute + spread + dropped)


def _layer(c: ModelConfig, tokens: int, w: _Widths, hidden_arrays: Mapping[str, float], *, in_loop: bool) -> float:
    """Bytes that one block keeps for its backward pass."""
    norm = NORM * (c.norm != "none") * c.d_model
    queries, keys = c.n_heads * c.head_width, c.kv_heads * c.head_width
    attention = norm + c.d_model + 2 * queries + 2 * (keys if w.flash else queries)  # plain repeats keys and values
    attention += 4 * c.qk_norm * (queries + keys) + 2 * (c.dropout > 0) * c.d_model
    attended = attention * tokens * w.compute + _scores(c, tokens, w, in_loop=in_loop)
    if not c.mlp_width:
        return attended
    arrays = hidden_arrays[c.mlp] * c.mlp_width
    shared = 2 * c.d_model if c.norm_placement == "parallel" else 0  # the stream and its centred form
    around = norm + c.d_model - shared + 2 * (c.dropout > 0) * c.d_model
    if c.n_experts is None:
        return attended + (around + arrays) * tokens * w.compute
    count, size = blocks(c, tokens)
    rows, assignments = count * size, tokens * c.experts_per_token
    kernels = count * (3 if c.mlp == "swiglu" else 2) * c.d_model * c.mlp_width  # each block's copy of its expert
    numbers = around * tokens + (arrays + 2 * c.d_model) * rows + 2 * c.d_model * assignments + kernels
    return attended + numbers * w.compute + 4 * tokens * c.n_experts * w.wide


def blocks(c: ModelConfig, n_tokens: int) -> tuple[int, int]:
    """`mixture.blocks`, without its import of JAX."""
    assert c.n_experts is not None, "a mixture has experts"
    assignments, size = n_tokens * c.experts_per_token, 1
    while 2 * size <= min(c.d_model, assignments // c.n_experts):
        size *= 2
    return (assignments + min(c.n_experts, assignments) * (size - 1)) // size, size


# --- many runs, and a bound ----------------------------------------------------------------------------------------


def population_bytes(config: RunConfig, runs: int, together: int, platform: str) -> int:
    """Bytes that `population.advance` needs for R = `runs` equal runs, `together` of them computed at once; estimated.

    `together`: R under vmap, 1 one after the other. The stacked states are donated and updated where they are; the run
    that is worked on, if not all are, is copied out of the stack. What a run logs and the corpus's tokens are not
    counted.
    """
    copies = 0 if together >= runs else together
    return (runs + copies) * state_bytes(config) + together * step_bytes(config, platform)


def largest_block(config: RunConfig, runs: int, together_all: bool, have_bytes: int, platform: str) -> int:
    """The most of `runs` equal runs whose `population_bytes` fit in USABLE of `have_bytes`; 0 when not even one does.

    `together_all`: under vmap; else one after the other. `have_bytes`: the device's memory, less the corpus.
    """

    def fits(r: int) -> bool:
        return population_bytes(config, r, r if together_all else 1, platform) <= USABLE * have_bytes

    return bisect.bisect_left(range(1, runs + 1), True, key=lambda r: not fits(r))


def training_bytes(config: RunConfig, platform: str | None = None) -> int:
    """A LOWER bound of the device memory that training this run needs, in bytes: what exceeds the device cannot run.

    The state lives throughout. On top of it comes the larger of two moments: the end of the backward pass, when all
    gradients exist (their global norm needs all of them), and its start, when the output of one microbatch, the
    residual stream before each block and after the last, and attention patterns exist: those of all layers on CPU
    without remat, else of one, as XLA may compute patterns again where memory is short. Everything else comes on
    top: MLP activations, casts, the corpus, XLA's buffers. Several times this is common.
    `platform`: cpu, gpu, tpu; None for what holds on each.
    """
    c = config.model
    compute = "bfloat16" if c.compute_dtype == "auto" and platform != "cpu" else c.compute_dtype
    compute = c.param_dtype if compute == "auto" else compute
    tokens = config.train.batch_size // config.train.microbatches * c.context
    numbers = tokens * (c.output_width + (c.n_layers + 1) * c.d_model)
    in_blocks = platform in ("cpu", None) and _blockwise(config)
    if c.architecture == "transformer" and not in_blocks and not _flash(c, platform or "gpu", compute):
        layers = c.n_layers if platform == "cpu" and not c.remat else min(1, c.n_layers)
        numbers += layers * tokens * c.n_heads * c.context
    gradients = parameters(c).total * _BYTES[c.param_dtype]
    return state_bytes(config) + max(gradients, numbers * _BYTES[compute])
