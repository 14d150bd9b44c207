"""What a run is: frozen dataclasses, their JSON form, their identity, and overrides such as `model.d_model=64`.

Every field states its meaning and its allowed values once, in its metadata; `--help`, validation and
error messages are made from that.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import dacite

# Raised when what a run computes from the same config changes: old runs then keep their ids and new ones get others.
DATA_FORMAT_VERSION = 1
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 1.1754944e-38, 3.4028234e38
LARGEST_INT32 = 2**31 - 1

T = TypeVar("T")


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one line: the field, the value, what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a value may hold line breaks


def _field(default: Any, help: str, *, low: float | None = None, above: float | None = None, identity: bool = True):
    """A config field. `low`/`above`: inclusive/exclusive lower bound. `identity=False`: not part of `run_id`."""
    meta = {"help": help, "low": low, "above": above, "identity": identity}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class ModelConfig:
    """A transformer. Sizes are in units (not bytes); all fields are part of a run's identity."""

    d_model: int = _field(64, "width of the residual stream", low=1)
    n_layers: int = _field(4, "number of blocks", low=0)
    n_heads: int = _field(4, "attention heads per block", low=1)
    d_head: int | None = _field(None, "width of a head; null: d_model / n_heads", low=1)
    d_mlp: int | None = _field(
        None, "hidden width of the MLP; null: 4 d_model (swiglu: 8/3 d_model, up to a multiple of 8)", low=1
    )
    context: int = _field(128, "tokens per sequence in training, T", low=1)
    vocab_size: int = _field(256, "number of token ids; bytes need 256", low=1)
    positions: Literal["learned", "sinusoidal", "rope", "alibi", "none"] = _field("rope", "how positions enter")
    attention: Literal["softmax", "linear"] = _field("softmax", "linear: no softmax, mean over the visible keys")
    causal: bool = _field(True, "false: every position sees every other")
    norm: Literal["layernorm", "rmsnorm", "none"] = _field("layernorm", "normalisation")
    norm_placement: Literal["pre", "post", "parallel"] = _field("pre", "x+f(N x), N(x+f(x)), or x+Attn(N x)+MLP(N' x)")
    mlp: Literal["gelu", "relu", "swiglu", "none"] = _field("gelu", "activation of the MLP; none: attention only")
    bias: bool = _field(False, "biases in linear maps and layer norms")
    tie_output: bool = _field(False, "the output matrix is the transposed token embedding")
    d_input: int | None = _field(None, "width of real input vectors, read in linearly; null: token ids", low=1)
    d_output: int | None = _field(None, "width of a linear read-out; null: logits over the vocabulary", low=1)
    param_dtype: Literal["float32", "bfloat16", "float64"] = _field("float32", "dtype of the parameters")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = _field(
        "auto", "dtype of the arithmetic; auto: bfloat16 on accelerators, param_dtype on CPU"
    )
    matmul_precision: Literal["default", "high", "highest"] = _field("default", "of matrix products on accelerators")
    attention_kernel: Literal["auto", "plain", "fused"] = _field(
        "auto", "fused: jax.nn.dot_product_attention; auto: fused on GPU, plain elsewhere"
    )
    scan_layers: bool = _field(False, "one compiled block looped over the layers: compiles faster, runs slower on CPU")
    remat: bool = _field(False, "recompute activations in the backward pass: less memory, about a third more time")

    def __post_init__(self) -> None:
        _check_fields(self, "model")
        if self.d_head is None and self.d_model % self.n_heads:
            raise BadInput(
                f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}; "
                f"choose n_heads from {_divisors(self.d_model)} or set model.d_head"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise BadInput(
                f"model.positions=rope rotates pairs and needs an even head width, "
                f"not {self.head_width}; set model.d_head to an even number"
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise BadInput(f"model.d_model={self.d_model} is odd; model.positions=sinusoidal needs an even width")
        if self.positions == "alibi" and self.attention == "linear":
            raise BadInput(
                "model.positions=alibi biases softmax scores; "
                "with model.attention=linear use learned, sinusoidal, rope or none"
            )
        if self.attention == "linear" and self.attention_kernel == "fused":
            raise BadInput("model.attention_kernel=fused is for softmax attention; with linear use auto or plain")
        if self.tie_output and (self.d_input is not None or self.d_output is not None):
            raise BadInput(
                "model.tie_output=true needs token input and logits: leave model.d_input and model.d_output null"
            )

    @property
    def head_width(self) -> int:
        """d_head in units, whether given or derived."""
        return self.d_model // self.n_heads if self.d_head is None else self.d_head

    @property
    def mlp_width(self) -> int:
        """Hidden units of the MLP; 0 without one."""
        if self.mlp == "none":
            return 0
        if self.d_mlp is not None:
            return self.d_mlp
        return 4 * self.d_model if self.mlp != "swiglu" else 8 * math.ceil(self.d_model / 3)

    @property
    def output_width(self) -> int:
        """Width of the output: the read-out's, or the vocabulary's."""
        return self.vocab_size if self.d_output is None else self.d_output


@dataclass(frozen=True)
class DataConfig:
    """Text as bytes. The run's identity holds the sha256 of what was read, not the path."""

    corpus: str = _field("stdlib", "a text file, a folder of text, or `stdlib` (Python's own library)", identity=False)
    validation_fraction: float = _field(0.1, "share of the bytes held out, whole documents at a time", above=0.0)

    def __post_init__(self) -> None:
        _check_fields(self, "data")
        if self.validation_fraction >= 0.5:
            raise BadInput(f"data.validation_fraction={self.validation_fraction} is not allowed; it must be below 0.5")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = _field(5e-3, "peak learning rate", low=0.0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = _field("cosine", "shape after warm-up")
    warmup_steps: int | None = _field(
        None, "steps of linear warm-up from 0; null: a tenth of the run, at most 100", low=0
    )
    decay_fraction: float = _field(0.2, "wsd: share of the run in which the rate falls linearly at the end", above=0.0)
    final_fraction: float = _field(0.1, "the rate at the end as a share of the peak (cosine, linear, wsd)", low=0.0)
    beta1: float = _field(0.9, "decay of Adam's first moment", low=0.0)
    beta2: float = _field(0.95, "decay of Adam's second moment", low=0.0)
    epsilon: float = _field(1e-8, "Adam's epsilon", above=0.0)
    weight_decay: float = _field(
        0.1, "decoupled, times the learning rate; matrices only (see optimizer.DECAYED)", low=0.0
    )
    clip: float | None = _field(1.0, "largest global gradient norm; null: no clipping", above=0.0)

    def __post_init__(self) -> None:
        _check_fields(self, "optimizer")
        for name, limit in (("beta1", 1.0), ("beta2", 1.0)):
            if getattr(self, name) >= limit:
                raise BadInput(f"optimizer.{name}={getattr(self, name)} is not allowed; it must be below {limit:g}")
        for name in ("decay_fraction", "final_fraction"):
            if getattr(self, name) > 1.0:
                raise BadInput(f"optimizer.{name}={getattr(self, name)} is not allowed; it must be at most 1")


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much, and how often something is written."""

    steps: int = _field(1000, "optimizer steps", low=1)
    batch_size: int = _field(16, "sequences per step", low=1)
    microbatches: int = _field(1, "gradient accumulation: parts that a batch is cut into", low=1)
    seed: int = _field(0, "of the initial parameters, below 2^32", low=0)
    data_seed: int | None = _field(None, "of the data order, below 2^32; null: the same as seed", low=0)
    eval_windows: int = _field(128, "validation windows of length context that the loss is measured on", low=2)
    max_bad_steps: int = _field(10, "non-finite steps in a row before the run is rolled back", low=1)
    max_rollbacks: int = _field(3, "roll-backs before the run is given up as diverged", low=0)
    log_every: int = _field(20, "steps between points of the training curve", low=1, identity=False)
    eval_every: int | None = _field(None, "steps between validations; null: a fifth of the run", low=1, identity=False)
    checkpoint_every: int | None = _field(
        None, "steps between checkpoints; null: a fifth of the run, at most 1000", low=1, identity=False
    )

    def __post_init__(self) -> None:
        _check_fields(self, "train")
        for name in ("seed", "data_seed"):
            if (getattr(self, name) or 0) >= 2**32:
                raise BadInput(f"train.{name}={getattr(self, name)} is not allowed; it must be below 2^32")
        if self.steps > LARGEST_INT32:
            raise BadInput(f"train.steps={self.steps} is not allowed; it must be at most 2^31 - 1")
        if self.batch_size % self.microbatches:
            raise BadInput(
                f"train.batch_size={self.batch_size} is not divisible by train.microbatches="
                f"{self.microbatches}; choose microbatches from {_divisors(self.batch_size)}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that one training run is made of."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        warmup = self.optimizer.warmup_steps
        if warmup is not None and warmup > self.train.steps:
            raise BadInput(f"optimizer.warmup_steps={warmup} is longer than train.steps={self.train.steps}")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, whether given or derived."""
        given = self.optimizer.warmup_steps
        return min(100, self.train.steps // 10) if given is None else given

    @property
    def tokens(self) -> int:
        """Training tokens D: steps x batch x context."""
        return self.train.steps * self.train.batch_size * self.model.context


# --- identity and JSON ---------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """The nested JSON form of a config."""
    return dataclasses.asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'model': {'d_model': 64}} -> {'model.d_model': 64}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def from_dict(tree: Mapping[str, Any], cls: type[T] = RunConfig) -> T:
    """The config that `to_dict` wrote. Raises BadInput for unknown keys (with the nearest name) and wrong types."""
    known = {f.path for f in fields(cls)}
    for path in flatten(tree):
        if path not in known:
            raise BadInput(_unknown(path, known))
    try:
        return dacite.from_dict(cls, tree, config=dacite.Config(strict=True, check_types=False))
    except dacite.DaciteError as error:
        raise BadInput(f"config: {error}") from error


def run_id(config: RunConfig, corpus_sha256: str) -> str:
    """12 hex digits that name a run: config, corpus and data-format version; not device, launcher or logging."""
    flat = flatten(to_dict(config))
    # float(1) and 1 are the same learning rate, so they must hash alike.
    identity = {
        f.path: float(flat[f.path]) if type(flat[f.path]) is int and float in _alternatives(f.type) else flat[f.path]
        for f in fields(RunConfig)
        if f.identity
    }
    text = json.dumps([identity, corpus_sha256, DATA_FORMAT_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- overrides -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldInfo:
    """One field of a config as the command line shows it."""

    path: str
    type: Any
    default: Any
    help: str
    identity: bool
    low: float | None
    above: float | None

    @property
    def takes_text(self) -> bool:
        """Whether a string can be its value: free text, or one of its choices."""
        return any(kind is str or get_origin(kind) is Literal for kind in _alternatives(self.type))

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        low = f" of at least {self.low:g}" if self.low is not None else ""
        above = f" above {self.above:g}" if self.above is not None else ""
        return _allowed(self.type, low + above)


def fields(cls: type = RunConfig) -> list[FieldInfo]:
    """All fields of a config class, nested ones by dotted path, in order of declaration."""
    return list(_fields(cls))


@cache
def _fields(cls: type, prefix: str = "") -> tuple[FieldInfo, ...]:
    hints, found = get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            found += _fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            found.append(FieldInfo(prefix + f.name, hints[f.name], f.default, **f.metadata))
    return tuple(found)


def override(config: T, settings: Mapping[str, Any]) -> T:
    """A copy with fields replaced: `override(config, {'model.d_model': 64})`. Strings are read by the field's type."""
    known = {f.path: f for f in fields(type(config))}
    tree = to_dict(config)
    for path, value in settings.items():
        if path not in known:
            raise BadInput(_unknown(path, known))
        node = tree
        *groups, leaf = path.split(".")
        for group in groups:
            node = node[group]
        # Axes may come from NumPy: np.int64(3) is the 3 that it prints.
        value = value.item() if hasattr(value, "item") else value
        node[leaf] = _parse(known[path], value) if isinstance(value, str) else value
    return from_dict(tree, type(config))


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """['model.d_model=64'] -> {'model.d_model': '64'}. Raises BadInput without `=` and for a repeated field."""
    settings: dict[str, str] = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals or not path or not value:
            raise BadInput(f"{word!r} is not a setting; write field=value, for example model.d_model=64")
        if path in settings:
            raise BadInput(f"{path} is given twice: {settings[path]} and {value}")
        settings[path] = value
    return settings


def _parse(field: FieldInfo, text: str) -> Any:
    kinds = _alternatives(field.type)
    if text.lower() in ("null", "none") and types.NoneType in kinds:
        return None
    for kind in kinds:
        try:
            if kind is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if kind is int:
                return int(text.replace("_", ""))
            if kind is float:
                return float(text)
            if kind is str or get_origin(kind) is Literal:
                return text
        except ValueError:
            continue
    several = " (for several values use `jaxgpt sweep`)" if "," in text else ""
    raise BadInput(f"{field.path}={text} is not allowed; it must be {field.allowed}{several}")


# --- validation ----------------------------------------------------------------------------------------------------


def _check_fields(config: Any, group: str) -> None:
    """Types, choices and bounds of every field of one group; raises BadInput naming field, value, what is allowed."""
    for f in fields(type(config)):
        value = getattr(config, f.path)
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT32:  # NaN too
            raise BadInput(f"{group}.{f.path}={value} is not allowed; it must be finite, also in float32")
        right_kind = any(_is(value, kind) for kind in _alternatives(f.type))
        too_low = right_kind and value is not None and f.low is not None and value < f.low
        # As float32 holds it: 1e-60 is above 0 here and 0 in the step.
        too_close = right_kind and value is not None and f.above is not None and value - f.above < SMALLEST_FLOAT32
        if not right_kind or too_low or too_close:
            raise BadInput(f"{group}.{f.path}={value} is not allowed; it must be {f.allowed}")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _allowed(kind: Any, bound: str) -> str:
    words: Iterator[str] = (
        ", ".join(map(str, get_args(k)))
        if get_origin(k) is Literal
        else {
            int: f"a whole number{bound}",
            float: f"a number{bound}",
            bool: "true or false",
            str: "text",
            types.NoneType: "null",
        }[k]
        for k in _alternatives(kind)
    )
    return " or ".join(words)


def _unknown(path: str, known: Any) -> str:
    near = difflib.get_close_matches(path, list(known), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path} is not a field of the config{hint} (`jaxgpt train --help` lists all)"


def _divisors(n: int) -> str:
    """The divisors of n up to 1000: enough to choose from, and quick for any n."""
    return ", ".join(str(k) for k in range(1, min(n, 1000) + 1) if n % k == 0)
