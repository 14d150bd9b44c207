"""Hugging Face weights: the same logits as in NumPy and (`make test-hf`) transformers; exact round trips; refusals."""

import dataclasses
import errno
import json
import math
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgpt import build, huggingface, tokenizer
from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.families import read_config
from jaxgpt.store import StoreError

WHY = "optional: `make test-hf` installs it"
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 9,
    "n_inner": 20,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-3,
}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
    "intermediate_size": 20,
    "rotary_pct": 0.5,
    "rotary_emb_base": 500,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
}
TOKENS_BxT = np.random.default_rng(5).integers(0, 11, (2, 9))


# --- folders made by hand ------------------------------------------------------------------------------------------


def gpt2_tensors(s, seed=0):
    """Random tensors of GPT-2 in the layout of its release: matrices [in, out], names without a prefix."""
    D, F = s["n_embd"], s.get("n_inner") or 4 * s["n_embd"]
    shapes = {"wte.weight": (s["vocab_size"], D), "wpe.weight": (s["n_positions"], D)}
    for i in range(s["n_layer"]):
        linears = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for name, shape in linears.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        shapes |= {f"h.{i}.{norm}.{leaf}": (D,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
    shapes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    if not s.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (s["vocab_size"], D)
    return draw(shapes, seed)


def neox_tensors(s, seed=0):
    """Random tensors of GPT-NeoX: matrices [out, in]."""
    D, F = s["hidden_size"], s["intermediate_size"]
    shapes = {"gpt_neox.embed_in.weight": (s["vocab_size"], D)}
    for i in range(s["num_hidden_layers"]):
        at = f"gpt_neox.layers.{i}."
        linears = {"attention.query_key_value": (3 * D, D), "attention.dense": (D, D)}
        linears |= {"mlp.dense_h_to_4h": (F, D), "mlp.dense_4h_to_h": (D, F)}
        for name, shape in linears.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{at}{norm}.{leaf}": (D,) for norm in norms for leaf in ("weight", "bias")}
    shapes |= {f"gpt_neox.final_layer_norm.{leaf}": (D,) for leaf in ("weight", "bias")}
    if not s.get("tie_word_embeddings", False):
        shapes["embed_out.weight"] = (s["vocab_size"], D)
    return draw(shapes, seed)


def draw(shapes, seed):
    """Large enough that attention is far from uniform and every bias and scale shows."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * (0.5 if len(shape) == 2 else 0.7)).astype(np.float32)
        for name, shape in shapes.items()
    }


TENSORS = {"gpt2": gpt2_tensors, "gpt_neox": neox_tensors}


def write(folder, settings, tensors=None, shards=1, **kw):
    """A folder as a hub has it; in `shards` files with an index if more than one."""
    save_file = pytest.importorskip("safetensors.numpy", reason=WHY).save_file
    folder.mkdir(parents=True, exist_ok=True)
    tensors = TENSORS[settings["model_type"]](settings, **kw) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = {f"model-{k + 1:05}-of-{shards:05}.safetensors": sorted(tensors)[k::shards] for k in range(shards)}
    for file, held in names.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in names.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def logits(folder, **how):
    return np.asarray(huggingface.load_model(folder, **how)(jnp.asarray(TOKENS_BxT)))


def flat(params):
    return {build.param_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def assert_identical(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert np.asarray(a[name]).dtype == np.asarray(b[name]).dtype, name
        assert np.array_equal(a[name], b[name]), name


# --- an independent second computation, in NumPy float64 on the stored layout --------------------------------------


def layer_norm(x, p, name, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[name + ".weight"] + p[name + ".bias"]


def attend(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK):
    B, T, H, K = q_BxTxHxK.shape
    out = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        weight_S = np.exp(k_BxTxHxK[b, : t + 1, h] @ q_BxTxHxK[b, t, h] / math.sqrt(K))
        out[b, t, h] = weight_S @ v_BxTxHxK[b, : t + 1, h] / weight_S.sum()
    return out.reshape(B, T, H * K)


def gelu_exact(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def gpt2_logits(s, p):
    B, T = TOKENS_BxT.shape
    eps, H = s["layer_norm_epsilon"], s["n_head"]
    x = p["wte.weight"][TOKENS_BxT] + p["wpe.weight"][:T]
    for i in range(s["n_layer"]):
        at = f"h.{i}."
        y = layer_norm(x, p, at + "ln_1", eps) @ p[at + "attn.c_attn.weight"] + p[at + "attn.c_attn.bias"]
        q, k, v = (part.reshape(B, T, H, -1) for part in np.split(y, 3, axis=-1))
        x = x + attend(q, k, v) @ p[at + "attn.c_proj.weight"] + p[at + "attn.c_proj.bias"]
        y = gelu_tanh(layer_norm(x, p, at + "ln_2", eps) @ p[at + "mlp.c_fc.weight"] + p[at + "mlp.c_fc.bias"])
        x = x + y @ p[at + "mlp.c_proj.weight"] + p[at + "mlp.c_proj.bias"]
    return layer_norm(x, p, "ln_f", eps) @ p.get("lm_head.weight", p["wte.weight"]).T


def neox_logits(s, p):
    p = {name.removeprefix("gpt_neox."): value for name, value in p.items()}
    B, T = TOKENS_BxT.shape
    eps, H = s["layer_norm_eps"], s["num_attention_heads"]
    K = s["hidden_size"] // H
    R = int(K * s["rotary_pct"])
    x = p["embed_in.weight"][TOKENS_BxT]

    def turn(x_BxTxHxK):
        """Pairs (i, i + R/2) as complex numbers."""
        out = x_BxTxHxK.copy()
        for t, i in np.ndindex(T, R // 2):
            z = x_BxTxHxK[:, t, :, i] + 1j * x_BxTxHxK[:, t, :, i + R // 2]
            z = z * np.exp(1j * t * s["rotary_emb_base"] ** (-2 * i / R))
            out[:, t, :, i], out[:, t, :, i + R // 2] = z.real, z.imag
        return out

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    for i in range(s["num_hidden_layers"]):
        at = f"layers.{i}."
        y = linear(layer_norm(x, p, at + "input_layernorm", eps), at + "attention.query_key_value")
        q, k, v = np.moveaxis(y.reshape(B, T, H, 3, K), 3, 0)
        added = linear(attend(turn(q), turn(k), v), at + "attention.dense")
        into = x if s.get("use_parallel_residual", True) else x + added
        y = linear(layer_norm(into, p, at + "post_attention_layernorm", eps), at + "mlp.dense_h_to_4h")
        x = x + added + linear(gelu_exact(y), at + "mlp.dense_4h_to_h")
    return layer_norm(x, p, "final_layer_norm", eps) @ p.get("embed_out.weight", p["embed_in.weight"]).T


BY_HAND = {"gpt2": gpt2_logits, "gpt_neox": neox_logits}
CASES = [
    pytest.param(GPT2, id="gpt2"),
    pytest.param({**GPT2, "tie_word_embeddings": False}, id="gpt2-untied"),
    pytest.param(NEOX, id="neox"),
    pytest.param({**NEOX, "use_parallel_residual": False}, id="neox-sequential"),
    pytest.param({**NEOX, "tie_word_embeddings": True, "rotary_pct": 1.0}, id="neox-tied-full-rope"),
]


@pytest.mark.parametrize("settings", CASES)
def test_logits_are_those_of_the_formulas_on_the_stored_layout(settings, tmp_path):
    tensors = TENSORS[settings["model_type"]](settings)
    expected = BY_HAND[settings["model_type"]](settings, {k: v.astype(np.float64) for k, v in tensors.items()})
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits(write(tmp_path, settings, tensors)), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [pytest.param(GPT2, id="gpt2"), pytest.param(NEOX, id="neox")])
def test_every_stored_tensor_is_read(settings, tmp_path):
    tensors = TENSORS[settings["model_type"]](settings)
    params = flat(huggingface.load(write(tmp_path / "whole", settings, tensors))[1])
    assert sum(x.size for x in params.values()) == sum(x.size for x in tensors.values())
    # As sets of numbers, too: nothing is read twice, nothing is left at its start.
    assert sorted(np.concatenate([x.ravel() for x in params.values()])) == sorted(
        np.concatenate([x.ravel() for x in tensors.values()])
    )


def test_a_loaded_model_decodes_with_a_cache(tmp_path):
    model = huggingface.load_model(write(tmp_path, NEOX))
    whole = model(jnp.asarray(TOKENS_BxT))
    first, cache = model.decode(jnp.asarray(TOKENS_BxT[:, :4]), model.empty_cache(2, 9))
    second, _ = model.decode(jnp.asarray(TOKENS_BxT[:, 4:]), cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)


def test_the_configs_of_the_published_models():
    """GPT-2 small and Pythia 160M as their publishers' config.json says it."""
    gpt2 = ModelConfig(
        d_model=768, n_layers=12, n_heads=12, context=1024, vocab_size=50257, positions="learned", mlp="gelu",
        bias=True, output_bias=False, tie_output=True, dropout=0.1,
    )  # fmt: skip
    pythia = ModelConfig(
        d_model=768, n_layers=12, n_heads=12, context=2048, vocab_size=50304, positions="rope", rope_fraction=0.25,
        norm_placement="parallel", mlp="gelu_exact", bias=True, output_bias=False,
    )  # fmt: skip
    sizes = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257}
    published = {
        gpt2: {"model_type": "gpt2", **sizes, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
               "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
        pythia: {"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
                 "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 12,
                 "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
                 "torch_dtype": "float16", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304},
    }  # fmt: skip
    for config, settings in published.items():
        assert read(settings) == config


def read(settings, **how):
    """The config of a config.json, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(settings))
        return read_config(path, how)[1]


# --- how a folder may look -----------------------------------------------------------------------------------------


def test_shards_and_one_file_hold_the_same(tmp_path):
    whole = huggingface.load(write(tmp_path / "whole", NEOX))[1]
    parts = write(tmp_path / "parts", NEOX, shards=3)
    assert len(list(parts.glob("*.safetensors"))) == 3
    assert_identical(whole, huggingface.load(parts)[1])


@pytest.mark.parametrize(("settings", "prefix"), [(GPT2, "transformer."), (NEOX, "gpt_neox.")])
def test_names_with_and_without_prefix_and_buffers_without_content(settings, prefix, tmp_path):
    settings = {**settings, "tie_word_embeddings": False}
    tensors = TENSORS[settings["model_type"]](settings)
    bare = {name.removeprefix(prefix): value for name, value in tensors.items()}
    full = {name if "lm_head" in name or "embed_out" in name else prefix + name: value for name, value in bare.items()}
    buffers = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 9, 9), np.uint8),
        "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32),
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 9, 9), bool),
        "gpt_neox.layers.1.attention.masked_bias": np.array(-1e4, np.float32),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    full |= {name: value for name, value in buffers.items() if name.startswith(prefix)}
    assert_identical(
        huggingface.load(write(tmp_path / "bare", settings, bare))[1],
        huggingface.load(write(tmp_path / "full", settings, full))[1],
    )


def test_the_output_matrix_of_gpt_neox_goes_by_two_names(tmp_path):
    tensors = neox_tensors(NEOX)
    renamed = {name.replace("embed_out", "lm_head"): value for name, value in tensors.items()}
    old, new = write(tmp_path / "old", NEOX, tensors), write(tmp_path / "new", NEOX, renamed)
    assert_identical(huggingface.load(old)[1], huggingface.load(new)[1])


def test_a_tied_output_may_be_stored_if_it_is_the_embedding(tmp_path):
    tensors = gpt2_tensors(GPT2)
    same = write(tmp_path / "same", GPT2, {**tensors, "lm_head.weight": tensors["wte.weight"].copy()})
    assert_identical(huggingface.load(write(tmp_path / "without", GPT2, tensors))[1], huggingface.load(same)[1])
    other = write(tmp_path / "other", GPT2, {**tensors, "lm_head.weight": tensors["wte.weight"] + 1})
    with pytest.raises(BadInput, match=r"lm_head.weight differs from wte.weight, and tie_word_embeddings is true"):
        huggingface.load(other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_stored_dtypes_are_read_exactly(dtype, tmp_path):
    stored = {name: value.astype(jnp.dtype(dtype)) for name, value in gpt2_tensors(GPT2).items()}
    wide = {name: value.astype(np.float32) for name, value in stored.items()}
    a, b = write(tmp_path / "a", GPT2, stored), write(tmp_path / "b", GPT2, wide)
    assert_identical(huggingface.load(a)[1], huggingface.load(b)[1])


def test_how_the_function_is_computed_is_free(tmp_path):
    folder = write(tmp_path, NEOX)
    np.testing.assert_allclose(logits(folder, scan_layers=True, remat=True), logits(folder), atol=1e-5)
    c, params = huggingface.load(folder, param_dtype="bfloat16", dropout=0.2)
    assert (c.param_dtype, c.dropout) == ("bfloat16", 0.2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    with pytest.raises(BadInput, match=r"^n_layers is not free when weights are loaded; free are param_dtype, "):
        huggingface.load(folder, n_layers=1)


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        {"rotary_pct": 0.75, "rotary_emb_base": 300},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75}},
        {"rotary_pct": 0.75, "rotary_emb_base": 300, "rope_theta": 300, "partial_rotary_factor": 0.75},
        {"rope_parameters": {"rope_theta": 300}, "rotary_pct": 0.75, "rope_scaling": None},
    ],
)
def test_rope_goes_by_many_names(names):
    bare = {name: value for name, value in NEOX.items() if not name.startswith("rotary")}
    c = read({**bare, **names})
    assert (c.rope_base, c.rope_fraction) == (300, 0.75)
    assert (read(bare).rope_base, read(bare).rope_fraction) == (10_000, 0.25)


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (GPT2, {"model_type": "llama"}, "model_type=llama is not read; it must be gpt2 or gpt_neox"),
        (GPT2, {"activation_function": "silu"}, "activation_function=silu is not one of our activations"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=false is not in our model; it must be true"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true is not in our model"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=true is not in our model"),
        (GPT2, {"pruned_heads": {"0": [1]}}, 'pruned_heads={"0": [1]} is not in our model'),
        (GPT2, {"quantization_config": {"bits": 8}}, 'quantization_config={"bits": 8} is not in our model'),
        (GPT2, {"attn_pdrop": 0.2}, "embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.1 differ"),
        (GPT2, {"n_embd": 13}, "model.d_model=13 is not divisible by model.n_heads=3"),
        (GPT2, {"n_embd": None}, "model.d_model=None is not allowed"),
        (GPT2, {"layer_norm_epsilon": 0}, "model.norm_epsilon=0 is not allowed"),
        (NEOX, {"hidden_act": ["gelu"]}, "hidden_act=['gelu'] is not one of our activations"),
        (NEOX, {"attention_bias": False}, "attention_bias=false is not in our model; it must be true"),
        (NEOX, {"use_parallel_residual": "yes"}, "use_parallel_residual=yes is not allowed"),
        (NEOX, {"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_scaling={"type": "linear", "factor": 2} is no'),
        (NEOX, {"rope_parameters": {"rope_type": "yarn"}}, 'rope_parameters={"rope_type": "yarn"} is not in our model'),
        (NEOX, {"rope_parameters": [1]}, "rope_parameters=[1] is not in our model"),
        (NEOX, {"rope_theta": 7}, "rotary_emb_base=500 and rope_theta=7 contradict each other"),
        (NEOX, {"rotary_pct": 0.4}, "rotary_pct=0.4 of a head of 8 is an odd number of units"),
        (NEOX, {"rotary_pct": 0}, "model.rope_fraction=0 is not allowed"),
    ],
)
def test_a_setting_that_our_model_lacks_is_refused_by_name(base, change, says):
    with pytest.raises(BadInput) as refused:
        read({**base, **change})
    assert says in str(refused.value)
    assert "config.json: " in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("base", [GPT2, NEOX], ids=["gpt2", "neox"])
def test_a_missing_size_is_named(base):
    for name in base.keys() & {"vocab_size", "n_embd", "hidden_size", "n_layer", "num_attention_heads"}:
        with pytest.raises(BadInput, match=f"config.json has no {name}$"):
            read({key: value for key, value in base.items() if key != name})


def test_unequal_dropout_is_taken_when_the_caller_names_the_rate():
    assert read({**GPT2, "attn_pdrop": 0.2}, dropout=0.0).dropout == 0.0
    assert read({**NEOX, "attention_dropout": 0.3, "hidden_dropout": 0.3}).dropout == 0.3


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("gelu", "gelu_exact"), ("gelu_pytorch_tanh", "gelu"), ("relu", "relu"), ("relu2", "relu2")],
)
def test_activations_are_mapped(theirs, ours):
    assert read({**GPT2, "activation_function": theirs}).mlp == ours
    assert read({**NEOX, "hidden_act": theirs}).mlp == ours


# --- damaged and foreign folders -----------------------------------------------------------------------------------


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    tensors = neox_tensors(NEOX)
    one = "gpt_neox.layers.1.attention.dense.bias"
    less = write(tmp_path / "less", NEOX, {name: value for name, value in tensors.items() if name != one})
    with pytest.raises(BadInput, match=rf"^the tensor {one} is missing from the weights$"):
        huggingface.load(less)
    more = write(tmp_path / "more", NEOX, {**tensors, "gpt_neox.layers.2.attention.dense.bias": tensors[one]})
    with pytest.raises(BadInput, match=r"the tensor gpt_neox.layers.2.attention.dense.bias is not part of a gpt_neox"):
        huggingface.load(more)
    # A square matrix would load silently when transposed; this one is not square.
    turned = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    other = write(tmp_path / "other", NEOX, {**tensors, turned: np.ascontiguousarray(tensors[turned].T)})
    with pytest.raises(BadInput, match=rf"{turned} has the shape \(16, 20\), and config.json makes it \(20, 16\)$"):
        huggingface.load(other)
    whole = write(tmp_path / "int", NEOX, {**tensors, one: tensors[one].astype(np.int32)})
    with pytest.raises(BadInput, match=rf"the tensor {one} is I32; it must be F16, BF16, F32, F64$"):
        huggingface.load(whole)
    twice = write(tmp_path / "twice", NEOX, {**tensors, one.removeprefix("gpt_neox."): tensors[one]})
    with pytest.raises(BadInput, match=r"attention.dense.bias stands also in model.safetensors$"):
        huggingface.load(twice)


def test_a_folder_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    with pytest.raises(BadInput, match=r"nothing/config.json cannot be read: No such file or directory"):
        huggingface.load(tmp_path / "nothing")
    folder = write(tmp_path / "folder", GPT2)
    for broken, says in (("{", "is not a JSON file"), ("[1]", "model_type=None is not read")):
        (folder / "config.json").write_text(broken)
        with pytest.raises(BadInput, match=says):
            huggingface.load(folder)
    (folder / "config.json").write_text(json.dumps(GPT2))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(BadInput, match=r"model.safetensors cannot be read: "):
        huggingface.load(folder)
    weights.unlink()
    with pytest.raises(BadInput, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        huggingface.load(folder)
    for index in ("[]", '{"weight_map": []}', '{"weight_map": {"wte.weight": "../model.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(BadInput, match=r"index.json has no weight_map from tensors to files of this folder$"):
            huggingface.load(folder)
    shards = write(tmp_path / "shards", GPT2, shards=2)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match=r"model-00002-of-00002.safetensors cannot be read: "):
        huggingface.load(shards)


def test_without_safetensors_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(BadInput, match=r"need the safetensors package: pip install 'jaxgpt\[hf\]'$"):
        huggingface.load(tmp_path)


# --- writing -------------------------------------------------------------------------------------------------------

LEARNED = ModelConfig(
    d_model=12, n_layers=2, n_heads=3, context=9, vocab_size=11, positions="learned", bias=True, output_bias=False,
    tie_output=True, d_mlp=20, dropout=0.25, norm_epsilon=1e-3,
)  # fmt: skip
ROPE = dataclasses.replace(
    LEARNED, d_model=16, n_heads=2, positions="rope", rope_fraction=0.5, rope_base=77.0, norm_placement="parallel",
    mlp="gelu_exact", tie_output=False, dropout=0.0,
)  # fmt: skip
OURS = [
    pytest.param(LEARNED, id="gpt2"),
    pytest.param(dataclasses.replace(LEARNED, tie_output=False, mlp="relu2", d_mlp=None), id="gpt2-untied"),
    pytest.param(dataclasses.replace(LEARNED, scan_layers=True), id="gpt2-scanned"),
    pytest.param(dataclasses.replace(LEARNED, param_dtype="bfloat16"), id="gpt2-bfloat16"),
    pytest.param(ROPE, id="neox"),
    pytest.param(dataclasses.replace(ROPE, norm_placement="pre", rope_fraction=1.0, mlp="gelu"), id="neox-sequential"),
    pytest.param(dataclasses.replace(ROPE, tie_output=True, scan_layers=True, rope_fraction=0.25), id="neox-tied"),
]


def random_params(c, seed=1):
    """Every leaf random and large: initial biases are 0 and scales 1, which would hide what is mixed up."""
    rng = np.random.default_rng(seed)
    params = build.init_params(c, seed)
    return jax.tree.map(lambda x: (rng.standard_normal(x.shape) * 0.5).astype(x.dtype), params)


def ours(c, params):
    return np.asarray(nnx.merge(build.graphdef(c), jax.tree.map(jnp.asarray, params))(jnp.asarray(TOKENS_BxT)))


@pytest.mark.parametrize("c", OURS)
def test_what_is_saved_loads_bit_identical(c, tmp_path):
    pytest.importorskip("safetensors", reason=WHY)
    params = random_params(c)
    folder = huggingface.save(c, params, tmp_path / "out")
    how = {"param_dtype": c.param_dtype, "scan_layers": c.scan_layers}
    again, loaded = huggingface.load(folder, **how)
    assert again == c
    assert_identical(params, loaded)
    assert_identical(params, nnx.state(huggingface.load_model(folder, **how)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("settings", CASES)
def test_a_foreign_folder_comes_back_tensor_by_tensor(settings, tmp_path):
    load_file = pytest.importorskip("safetensors.numpy", reason=WHY).load_file
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}[settings["model_type"]]
    c, params = huggingface.load(write(tmp_path / "in", settings))
    out = huggingface.save(c, params, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    before = {name.removeprefix(prefix): value for name, value in before.items()}
    after = {name.removeprefix(prefix): value for name, value in after.items()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert huggingface.load(out)[0] == c


def test_a_model_without_biases_is_written_with_zeros_and_computes_the_same(tmp_path):
    pytest.importorskip("safetensors", reason=WHY)
    c = ModelConfig(d_model=16, n_layers=2, n_heads=2, context=9, vocab_size=11)  # jaxgpt's defaults, small
    params = random_params(c)
    folder = huggingface.save(c, params, tmp_path / "out")
    again, loaded = huggingface.load(folder)
    assert again == dataclasses.replace(c, bias=True, output_bias=False)
    assert not any(np.any(leaf) for name, leaf in flat(loaded).items() if name.endswith(".bias"))
    np.testing.assert_allclose(logits(folder), ours(c, params), atol=1e-5)


def test_as_many_units_turn_in_transformers_as_here(tmp_path):
    pytest.importorskip("safetensors", reason=WHY)
    for fraction in (0.2, 0.35, 0.5, 0.62, 0.99, 1.0):
        c = dataclasses.replace(ROPE, n_heads=1, rope_fraction=fraction)
        folder = huggingface.save(c, random_params(c), tmp_path / str(fraction))
        assert int(16 * json.loads((folder / "config.json").read_text())["rotary_pct"]) == c.rotary_width
        assert huggingface.load(folder)[0].rotary_width == c.rotary_width


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (LEARNED, {"mlp": "swiglu"}, "model.mlp=swiglu cannot be written as gpt2; it must be gelu or gelu_exact or"),
        (LEARNED, {"mlp": "none", "d_mlp": None}, "model.mlp=none cannot"),
        (LEARNED, {"norm": "rmsnorm"}, "model.norm=rmsnorm cannot be written as gpt2; it must be layernorm"),
        (LEARNED, {"norm_placement": "parallel"}, "model.norm_placement=parallel cannot be written as gpt2"),
        (LEARNED, {"positions": "alibi"}, "model.positions=alibi is in neither family"),
        (LEARNED, {"qk_norm": True}, "model.qk_norm=true cannot be written as gpt2; it must be false"),
        (LEARNED, {"n_experts": 4}, "model.n_experts=4 cannot be written as gpt2; it must be null"),
        (LEARNED, {"causal": False}, "model.causal=false cannot"),
        (LEARNED, {"attention": "linear"}, "model.attention=linear cannot"),
        (LEARNED, {"logit_cap": 30.0}, "model.logit_cap=30.0 cannot"),
        (LEARNED, {"architecture": "lstm"}, "model.architecture=lstm cannot"),
        (ROPE, {"n_kv_heads": 1}, "model.n_kv_heads=1 cannot be written as gpt_neox; it must be n_heads=2"),
        (ROPE, {"d_head": 4}, "model.d_head=4 cannot be written as gpt_neox; it must be d_model / n_heads"),
        (ROPE, {"output_bias": None}, "model.output_bias=null cannot be written as gpt_neox; it must be false"),
        (ROPE, {"parametrization": "mup"}, "model.parametrization=mup cannot be written as gpt_neox; it must be stan"),
        (ROPE, {"norm_placement": "post"}, "model.norm_placement=post cannot"),
        (ROPE, {"d_input": 3}, "model.d_input=3 cannot"),
        (ROPE, {"d_output": 1}, "model.d_output=1 cannot"),
    ],
)
def test_a_config_that_the_family_lacks_is_refused_by_field_and_nothing_is_written(base, change, says, tmp_path):
    with pytest.raises(BadInput) as refused:
        huggingface.save(dataclasses.replace(base, **change), {}, tmp_path / "out")
    assert says in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_family_may_be_named_and_is_held_to(tmp_path):
    with pytest.raises(BadInput, match=r"model.positions=rope cannot be written as gpt2; it must be learned"):
        huggingface.save(ROPE, {}, tmp_path / "out", family="gpt2")
    with pytest.raises(BadInput, match=r"family=llama is not one that is written; choose gpt2 or gpt_neox"):
        huggingface.save(ROPE, {}, tmp_path / "out", family="llama")


def test_parameters_of_another_config_are_refused(tmp_path):
    params = random_params(LEARNED)
    for change, says in (
        ({"d_mlp": 24}, r"layers.0.mlp.up.kernel has the shape \(12, 20\), and the config makes it \(12, 24\)"),
        ({"n_layers": 3}, "the parameters lack layers.2.attention_norm.scale"),
        ({"n_layers": 1}, "the parameters hold layers.1.attention.key.bias, which the config does not have"),
    ):
        with pytest.raises(BadInput, match=says):
            huggingface.save(dataclasses.replace(LEARNED, **change), params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    pytest.importorskip("safetensors", reason=WHY)
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    huggingface.save(LEARNED, random_params(LEARNED, seed=1), tmp_path / "out")
    huggingface.save(LEARNED, random_params(LEARNED, seed=2), tmp_path / "out")
    assert_identical(huggingface.load(tmp_path / "out")[1], random_params(LEARNED, seed=2))
    foreign = write(tmp_path / "foreign", GPT2)
    with pytest.raises(BadInput, match=r"foreign holds weights that jaxgpt did not write; name a new folder$"):
        huggingface.save(LEARNED, random_params(LEARNED), foreign)
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match=r"out holds thesis.tex already; name a new folder$"):
        huggingface.save(LEARNED, random_params(LEARNED), tmp_path / "out")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tokenizer.json").write_text("mine")
    with pytest.raises(BadInput, match=r"alone holds tokenizer.json already; name a new folder$"):
        huggingface.save(LEARNED, random_params(LEARNED), tmp_path / "alone")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match=r"file is a file or a link; name a new folder$"):
        huggingface.save(LEARNED, random_params(LEARNED), tmp_path / "file")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "file", "foreign", "out"]


@pytest.mark.parametrize("earlier", [False, True], ids=["empty", "an earlier export"])
def test_the_current_directory_is_never_replaced(earlier, tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason=WHY)
    here = tmp_path / "here"
    here.mkdir()
    if earlier:
        huggingface.save(LEARNED, random_params(LEARNED), here)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    before = here.stat().st_ino
    for name in ("", ".", Path(""), Path("."), here, "../here", tmp_path / "link" / "."):
        with pytest.raises(BadInput, match=r"^[^\n]* is (the current directory|a file or a link); name a new folder$"):
            huggingface.save(LEARNED, random_params(LEARNED), name)
    assert here.stat().st_ino == before
    huggingface.save(LEARNED, random_params(LEARNED), "new")
    assert (here / "new" / "config.json").exists()


def bpe():
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'jaxgpt[bpe]'")
    return tokenizer.train([b"the cat sat on the mat"], 260)


def test_a_tokenizer_is_written_beside_the_weights_and_read_again(tmp_path):
    pytest.importorskip("safetensors", reason=WHY)
    c = dataclasses.replace(LEARNED, vocab_size=300)
    made, out = bpe(), tmp_path / "out"

    def written(**how):
        huggingface.save(c, random_params(c), out, **how)
        config = json.loads((out / "config.json").read_text())
        assert huggingface.load(out)[0] == c
        return {path.name for path in out.iterdir()} - {"config.json", "model.safetensors"}, {
            name: config.get(name) for name in ("bos_token_id", "eos_token_id", "jaxgpt_tokenizer")
        }

    separated = dataclasses.replace(made, separator=7)  # an id that is no default
    ends = {"bos_token_id": 7, "eos_token_id": 7, "jaxgpt_tokenizer": None}
    assert written(tokenizer=separated) == ({"tokenizer.json"}, ends)
    assert huggingface.load_tokenizer(out) == made
    # Each replaces the one before, tokenizer.json and all.
    of_bytes = {"bos_token_id": 0, "eos_token_id": 0, "jaxgpt_tokenizer": "bytes"}
    assert written(tokenizer=tokenizer.BYTES) == (set(), of_bytes)
    assert huggingface.load_tokenizer(out) is tokenizer.BYTES
    assert written() == (set(), dict.fromkeys(of_bytes))
    with pytest.raises(BadInput, match=r"out has no tokenizer.json, and its config.json does not say that its tokens"):
        huggingface.load_tokenizer(out)
    assert written(tokenizer=made)[0] == {"tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"^model.vocab_size=11 is too small for a tokenizer of 256 ids$"):
        huggingface.save(LEARNED, random_params(LEARNED), tmp_path / "out", tokenizer=tokenizer.BYTES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("c", [LEARNED, ROPE], ids=["gpt2", "neox"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_all_tensors_of_a_running_mean_have_the_dtype_of_the_config(c, scan_layers, tmp_path):
    """The running mean of a bfloat16 model is float32, and a model without biases gets zeros."""
    load_file = pytest.importorskip("safetensors.numpy", reason=WHY).load_file
    c = dataclasses.replace(c, param_dtype="bfloat16", bias=False, scan_layers=scan_layers)
    mean = jax.tree.map(lambda x: x.astype(np.float32) * np.float32(1.001), random_params(c))
    folder = huggingface.save(c, mean, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    assert {name: value.dtype for name, value in tensors.items()} == dict.fromkeys(tensors, jnp.dtype("bfloat16"))
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = flat(huggingface.load(folder, param_dtype="bfloat16", scan_layers=scan_layers)[1])
    for name, value in flat(mean).items():
        assert np.array_equal(loaded[name], value.astype(jnp.dtype("bfloat16"))), name


def test_a_full_disk_leaves_what_stood_before(tmp_path, monkeypatch):
    numpy = pytest.importorskip("safetensors.numpy", reason=WHY)
    params = random_params(LEARNED)
    huggingface.save(LEARNED, params, tmp_path / "out")

    def full(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numpy, "save_file", full)
    with pytest.raises(StoreError, match=r"out: no space left on the disk"):
        huggingface.save(LEARNED, random_params(LEARNED, seed=2), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_identical(huggingface.load(tmp_path / "out")[1], params)


# --- against transformers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason=WHY)
    found = pytest.importorskip("transformers", reason=WHY)
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def randomised(model):
    """Their model, every parameter random and large."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if parameter.ndim == 2 else 0.7)
            assert parameter.std() > 0.1, name
    return model.eval()


def theirs(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS_BxT)).logits.float().numpy()


THEIR_CONFIGS = [
    pytest.param(GPT2, id="gpt2"),
    pytest.param({**GPT2, "tie_word_embeddings": False, "activation_function": "gelu"}, id="gpt2-untied-gelu"),
    pytest.param({**GPT2, "activation_function": "relu", "n_inner": None}, id="gpt2-relu"),
    pytest.param({**GPT2, "reorder_and_upcast_attn": True, "attn_implementation": "eager"}, id="gpt2-upcast"),
    pytest.param(NEOX, id="neox"),
    pytest.param({**NEOX, "rotary_pct": 0.25, "rotary_emb_base": 10000}, id="neox-quarter-rope"),
    pytest.param({**NEOX, "rotary_pct": 1.0, "use_parallel_residual": False}, id="neox-sequential"),
    pytest.param({**NEOX, "tie_word_embeddings": True, "hidden_act": "gelu_new"}, id="neox-tied"),
]


@pytest.mark.parametrize("settings", THEIR_CONFIGS)
@pytest.mark.parametrize("shard", [None, "2KB"], ids=["whole", "sharded"])
def test_logits_of_their_model_in_ours(settings, shard, transformers, tmp_path):
    config = transformers.AutoConfig.for_model(**settings)
    model = randomised(transformers.AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard is not None)
    expected = theirs(model)
    assert expected.std() > 0.5
    difference = np.abs(logits(tmp_path) - expected).max()
    print(f"theirs in ours: {difference:.3g} of {np.abs(expected).max():.3g}")
    assert difference < 1e-5


@pytest.mark.parametrize("c", OURS)
def test_logits_of_our_model_in_theirs(c, transformers, tmp_path):
    params = random_params(c)
    folder = huggingface.save(c, params, tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not any(info.values()), info
    # In float32 also where bfloat16 is stored: how that rounds on the way is each side's own.
    expected = ours(dataclasses.replace(c, param_dtype="float32"), jax.tree.map(lambda x: x.astype(np.float32), params))
    assert expected.std() > 0.5
    difference = np.abs(theirs(model.eval()) - expected).max()
    print(f"ours in theirs: {difference:.3g} of {np.abs(expected).max():.3g}")
    assert difference < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_folders_of_theirs_are_read_exactly(dtype, transformers, tmp_path):
    import torch

    config = transformers.AutoConfig.for_model(**NEOX)
    model = randomised(transformers.AutoModelForCausalLM.from_config(config)).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    # Read again, for `model.float()` would keep the frequencies of RoPE as half precision has rounded them.
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    difference = np.abs(logits(tmp_path) - theirs(wide)).max()
    print(f"stored as {dtype}: {difference:.3g}")
    assert difference < 1e-5


def test_their_models_at_full_length_agree(transformers, tmp_path):
    """Angles of RoPE grow with the position, and with them the error of float32."""
    import torch

    config = transformers.AutoConfig.for_model(**{**NEOX, "max_position_embeddings": 2048, "rotary_emb_base": 10_000})
    model = randomised(transformers.AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path)
    tokens_BxT = np.random.default_rng(0).integers(0, 11, (1, 2048))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_BxT)).logits.numpy()
    difference = np.abs(huggingface.load_model(tmp_path)(jnp.asarray(tokens_BxT)) - expected).max()
    print(f"at 2048 positions: {difference:.3g} of {np.abs(expected).max():.3g}")
    assert difference < 1e-4
