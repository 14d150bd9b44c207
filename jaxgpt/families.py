"""How transformers spells what our model has: the config.json and the tensor names of GPT-2 and GPT-NeoX (Pythia).

A setting that our model has is mapped, in either direction; one that would change what is computed and that it lacks
is refused in one line. What neither transformers nor we know of a model type is ignored, as transformers ignores it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.store import read_json

# What a caller may choose when loading: how the function is computed, not which function it is.
HOW = (
    "param_dtype", "compute_dtype", "matmul_precision", "attention_kernel", "scan_layers", "remat", "dropout",
)  # fmt: skip
# transformers' names of activations: the one that is written first, then how else the same function is called.
ACTIVATIONS = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "gelu_exact": ("gelu", "gelu_python"),
    "relu": ("relu",),
    "relu2": ("relu2",),
}
_REQUIRED = object()


# --- the two families ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How one of transformers' model types spells what our model has.

    modules: its names of ours; `{i}` is the layer. head: names of the output matrix, the written one first.
    packing: einops patterns, from the outputs of the joint matrix to queries, keys and values. ignored: names of
    buffers without content of their own. only: fields of config.json with the values that our model can follow.
    allowed: fields of our config with the values that the family has.
    """

    name: str
    architecture: str
    prefix: str
    modules: Mapping[str, str]
    head: tuple[str, ...]
    transposed: bool
    packing: tuple[str, str]
    ignored: str
    only: Mapping[str, tuple[Any, ...]]
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    allowed: Mapping[str, tuple[str, ...]]


class Settings(NamedTuple):
    """A config.json that was read, and where, for messages."""

    path: Path
    values: Mapping[str, Any]

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value, transformers' default where it has one, or BadInput."""
        if name not in self.values and default is _REQUIRED:
            raise BadInput(f"{self.path} has no {name}")
        return self.values.get(name, default)

    def agreed(self, names: Iterable[str], found: Mapping[str, Any], default: float) -> Any:
        """The value of a setting that goes by several names. Raises BadInput where they contradict each other."""
        given = {name: found[name] for name in names if found.get(name) is not None}
        if any(value != next(iter(given.values())) for value in given.values()):
            words = " and ".join(f"{name}={value}" for name, value in given.items())
            raise BadInput(f"{self.path}: {words} contradict each other; they are one setting")
        return next(iter(given.values()), default)

    def activation(self, name: str, default: str) -> str:
        """Our name of the MLP's activation."""
        value = self.get(name, default)
        for ours, theirs in ACTIVATIONS.items():
            if value in theirs:
                return ours
        known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
        raise BadInput(f"{self.path}: {name}={value} is not one of our activations; those are {known}")

    def dropout(self, names: tuple[str, ...], default: float) -> float:
        """The one rate of our model, or BadInput if the places differ in theirs."""
        rates = {name: self.get(name, default) for name in names}
        if any(rate != rates[names[0]] for rate in rates.values()):
            words = ", ".join(f"{name}={rate}" for name, rate in rates.items())
            raise BadInput(f"{self.path}: {words} differ; our model has one rate, give it as dropout=")
        return rates[names[0]]


def _read_gpt2(settings: Settings) -> dict[str, Any]:
    return {
        "d_model": settings.get("n_embd"),
        "n_layers": settings.get("n_layer"),
        "n_heads": settings.get("n_head"),
        "d_mlp": settings.get("n_inner", None),
        "context": settings.get("n_positions"),
        "positions": "learned",
        "norm_epsilon": settings.get("layer_norm_epsilon", 1e-5),
        "mlp": settings.activation("activation_function", "gelu_new"),
        "tie_output": settings.get("tie_word_embeddings", True),
    }


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.mlp_width,
        "n_positions": c.context,
        "activation_function": ACTIVATIONS[c.mlp][0],
        "layer_norm_epsilon": c.norm_epsilon,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        **dict.fromkeys(DROPOUTS["gpt2"][0], c.dropout),
    }


def _read_gpt_neox(settings: Settings) -> dict[str, Any]:
    # transformers 5 gathers in rope_parameters what version 4 spread over the file.
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = settings.get(name, None) or {}
        kinds = [part.get(key, "default") for key in ("rope_type", "type")] if isinstance(part, dict) else [part]
        if kinds != ["default", "default"]:
            raise BadInput(f"{settings.path}: {name}={json.dumps(part)} is not in our model; its type must be default")
        rope |= part
    found = {**settings.values, **{f"rope_parameters.{name}": value for name, value in rope.items()}}
    bases = ("rope_parameters.rope_theta", "rotary_emb_base", "rope_theta")
    fractions = ("rope_parameters.partial_rotary_factor", "rotary_pct", "partial_rotary_factor")
    parallel = settings.get("use_parallel_residual", True)
    if not isinstance(parallel, bool):
        raise BadInput(f"{settings.path}: use_parallel_residual={parallel} is not allowed; it must be true or false")
    return {
        "d_model": settings.get("hidden_size"),
        "n_layers": settings.get("num_hidden_layers"),
        "n_heads": settings.get("num_attention_heads"),
        "d_mlp": settings.get("intermediate_size"),
        "context": settings.get("max_position_embeddings"),
        "positions": "rope",
        "rope_base": settings.agreed(bases, found, 10_000.0),
        "rope_fraction": settings.agreed(fractions, found, 0.25),
        "norm_placement": "parallel" if parallel else "pre",
        "norm_epsilon": settings.get("layer_norm_eps", 1e-5),
        "mlp": settings.activation("hidden_act", "gelu"),
        "tie_output": settings.get("tie_word_embeddings", False),
    }


def _write_gpt_neox(c: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        "rotary_pct": _rotary_pct(c),
        "rotary_emb_base": c.rope_base,
        "use_parallel_residual": c.norm_placement == "parallel",
        "hidden_act": ACTIVATIONS[c.mlp][0],
        "attention_bias": True,
        "layer_norm_eps": c.norm_epsilon,
        **dict.fromkeys(DROPOUTS["gpt_neox"][0], c.dropout),
    }


def _rotary_pct(c: ModelConfig) -> float:
    """A share of the head of which transformers turns as many units as we: it rounds down, and to odd numbers too."""
    turns = int(c.head_width * c.rope_fraction)
    return c.rope_fraction if turns == c.rotary_width else (c.rotary_width + 0.5) / c.head_width


# The places with a dropout rate, and transformers' default.
DROPOUTS = {
    "gpt2": (("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1),
    "gpt_neox": (("hidden_dropout", "attention_dropout"), 0.0),
}
FAMILIES = {
    "gpt2": Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        modules={
            "embed": "wte",
            "position": "wpe",
            "attention_norm": "h.{i}.ln_1",
            "attention.qkv": "h.{i}.attn.c_attn",
            "attention.out": "h.{i}.attn.c_proj",
            "mlp_norm": "h.{i}.ln_2",
            "mlp.up": "h.{i}.mlp.c_fc",
            "mlp.down": "h.{i}.mlp.c_proj",
            "final_norm": "ln_f",
        },
        head=("lm_head.weight",),
        transposed=False,
        packing=("... (three H K)", "three ... (H K)"),
        ignored=r"h\.\d+\.attn\.(masked_)?bias",
        # reorder_and_upcast_attn is free: in float32 it is the same sum, and our softmax is never narrower.
        only={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "pruned_heads": ({}, None),
            "quantization_config": (None,),
        },
        read=_read_gpt2,
        write=_write_gpt2,
        allowed={"positions": ("learned",), "norm_placement": ("pre",)},
    ),
    "gpt_neox": Family(
        name="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        prefix="gpt_neox.",
        modules={
            "embed": "embed_in",
            "attention_norm": "layers.{i}.input_layernorm",
            "attention.qkv": "layers.{i}.attention.query_key_value",
            "attention.out": "layers.{i}.attention.dense",
            "mlp_norm": "layers.{i}.post_attention_layernorm",
            "mlp.up": "layers.{i}.mlp.dense_h_to_4h",
            "mlp.down": "layers.{i}.mlp.dense_4h_to_h",
            "final_norm": "final_layer_norm",
        },
        head=("embed_out.weight", "lm_head.weight"),
        transposed=True,
        packing=("... (H three K)", "three ... (H K)"),
        ignored=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq",
        only={"attention_bias": (True,), "pruned_heads": ({}, None), "quantization_config": (None,)},
        read=_read_gpt_neox,
        write=_write_gpt_neox,
        allowed={"positions": ("rope",), "norm_placement": ("pre", "parallel")},
    ),
}
# What both ask of our config, beside their own `allowed`.
ALLOWED = {
    "architecture": ("transformer",),
    "attention": ("softmax",),
    "causal": (True,),
    "qk_norm": (False,),
    "norm": ("layernorm",),
    "mlp": tuple(ACTIVATIONS),
    "n_experts": (None,),
    "logit_cap": (None,),
    "d_input": (None,),
    "d_output": (None,),
}


# --- config.json ---------------------------------------------------------------------------------------------------


def read_config(path: Path, how: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and the config of a config.json. Raises BadInput, in one line, for what our model lacks."""
    for name in how:
        if name not in HOW:
            raise BadInput(f"{name} is not free when weights are loaded; free are {', '.join(HOW)}")
    try:
        values = read_json(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}; a folder of weights has a config.json") from None
    if not isinstance(values, dict) or values.get("model_type") not in FAMILIES:
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise BadInput(f"{path}: model_type={kind} is not read; it must be {' or '.join(FAMILIES)}")
    family, settings = FAMILIES[values["model_type"]], Settings(path, values)
    for name, only in family.only.items():
        if (value := settings.get(name, only[0])) not in only:
            words = f"{name}={json.dumps(value)} is not in our model; it must be {json.dumps(only[0])}"
            raise BadInput(f"{path}: {words}")
    found = {"vocab_size": settings.get("vocab_size"), "bias": True, "output_bias": False, **family.read(settings)}
    if "dropout" not in how:
        found["dropout"] = settings.dropout(*DROPOUTS[family.name])
    try:
        c = ModelConfig(**{**found, **how})
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    if c.positions == "rope" and int(c.head_width * c.rope_fraction) != c.rotary_width:
        raise BadInput(
            f"{path}: rotary_pct={c.rope_fraction} of a head of {c.head_width} is an odd number of units; "
            "rope turns pairs"
        )
    return family, dataclasses.replace(c, d_mlp=None) if c.d_mlp == 4 * c.d_model else c


def expressible(c: ModelConfig, name: str | None) -> Family:
    """The family to write; by positions if none is named. Raises BadInput naming the field that it cannot express."""
    if name is None:
        name = {"learned": "gpt2", "rope": "gpt_neox"}.get(c.positions)
        if name is None:
            raise BadInput(f"model.positions={c.positions} is in neither family; gpt2 has learned, gpt_neox rope")
    if name not in FAMILIES:
        raise BadInput(f"family={name} is not one that is written; choose {' or '.join(FAMILIES)}")
    family = FAMILIES[name]

    def refuse(field: str, allowed: str) -> BadInput:
        return BadInput(f"model.{field}={_word(getattr(c, field))} cannot be written as {name}; it must be {allowed}")

    for field, allowed in {**ALLOWED, **family.allowed}.items():
        if getattr(c, field) not in allowed:
            raise refuse(field, " or ".join(map(_word, allowed)))
    if c.kv_heads != c.n_heads:
        raise refuse("n_kv_heads", f"n_heads={c.n_heads}")
    if c.head_width * c.n_heads != c.d_model:
        raise refuse("d_head", "d_model / n_heads")
    if c.has_output_bias:
        raise refuse("output_bias", "false")
    if c.width_ratio != 1:
        raise refuse("parametrization", "standard")
    return family


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
