"""GPT-2 and Pythia (GPT-NeoX) weights in a local folder of Hugging Face's layout, read into our model and written.

    model = load_model("gpt2")            # config.json and model.safetensors (or shards and their index)
    config, params = load("pythia-160m")  # the same in two parts, as `build.init_params` gives them
    save(config, params, "exported", tokenizer=tokenizer)  # a folder that transformers loads

Nothing is downloaded, and neither transformers nor torch is needed: pip install 'jaxgpt[hf]' brings safetensors alone.
If the folder holds a tokenizer.json, `load_tokenizer` reads it, and `data.tokenizer=<folder>/tokenizer.json` trains
and evaluates on its ids.

What both families store, and how (D d_model, H heads, K head width): GPT-2's matrices are [in, out] as ours are,
GPT-NeoX's [out, in]; queries, keys and values are one matrix, whose outputs GPT-2 orders (3 H K), GPT-NeoX (H 3 K).
Sources: Radford et al. 2019; Black et al. 2022, GPT-NeoX-20B, section 2; Biderman et al. 2023, Pythia.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxgpt import build
from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.families import Family, expressible, read_config
from jaxgpt.store import read_json, store_error, sync_folder, write_bytes, write_json

if TYPE_CHECKING:
    from jaxgpt.tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# In config.json, where transformers passes over it: there is no tokenizer.json that says "bytes".
OF_BYTES = {"jaxgpt_tokenizer": "bytes"}
# Written into the file's header. transformers wants the format; by the other we know our own files again.
METADATA = {"format": "pt", "writer": "jaxgpt"}
READ = ("F16", "BF16", "F32", "F64")


# --- public --------------------------------------------------------------------------------------------------------


def load(folder: Path | str, **how: Any) -> tuple[ModelConfig, nnx.State]:
    """The config and the parameters (NumPy, as the state that `nnx.merge(build.graphdef(config), params)` takes).

    `how`: fields of families.HOW, for example param_dtype="bfloat16" or scan_layers=True. Parameters are float32 unless
    it says otherwise, which holds float16 and bfloat16 exactly. Raises BadInput, in one line, for a setting of
    config.json that our model lacks, for a tensor that is missing, left over or of another shape, and for a damaged
    file.
    """
    folder = Path(folder)
    family, c = read_config(folder / CONFIG, how)
    with ExitStack() as stack:
        stored = _open(folder, family, stack)
        return c, _read_params(c, family, stored)


def load_model(folder: Path | str, **how: Any) -> Any:
    """The model itself, on the default device: `load`, merged."""
    c, params = load(folder, **how)
    return nnx.merge(build.graphdef(c), jax.tree.map(jnp.asarray, params))


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a folder: its tokenizer.json, or bytes where config.json says so.

    Raises BadInput for a folder that has neither, and for a tokenizer.json that jaxgpt.tokenizer does not read.
    """
    from jaxgpt import tokenizer

    folder = Path(folder)
    if (folder / TOKENIZER).exists():
        return tokenizer.load(folder / TOKENIZER, str(folder / TOKENIZER))
    config = read_json(folder / CONFIG)
    if isinstance(config, dict) and OF_BYTES.items() <= config.items():
        return tokenizer.BYTES
    raise BadInput(f"{folder} has no {TOKENIZER}, and its {CONFIG} does not say that its tokens are bytes")


def save(
    c: ModelConfig,
    params: Any,
    folder: Path | str,
    family: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Writes config.json and model.safetensors for transformers into a new folder, and gives its path.

    params: as `load` gives them, or `nnx.state(model)`; stored as c.param_dtype, all of them. family: gpt2 or gpt_neox;
    null: gpt2 for learned positions, gpt_neox for rope. Both have biases everywhere but on the logits: a model without
    gets zeros, and the same outputs. tokenizer: what the model's ids mean; BPE is written as tokenizer.json, and its
    separator is the token that begins and ends a text. null: the folder does not say.

    The folder appears whole or not at all; an earlier export is replaced, anything else refused, and so is the current
    directory. Raises BadInput naming the config's field that the family cannot express or the tokenizer does not fit,
    StoreError when the disk is full or refuses.
    """
    folder = Path(os.path.abspath(folder))
    chosen = expressible(c, family)
    if tokenizer is not None and tokenizer.vocab_size > c.vocab_size:
        raise BadInput(f"model.vocab_size={c.vocab_size} is too small for a tokenizer of {tokenizer.vocab_size} ids")
    _check_replaceable(folder)
    flat = _flat(c, params)
    tensors = {stored_as: _join(c, chosen, t, flat) for stored_as, t in _tensors(c, chosen)}
    if flat:
        raise BadInput(f"the parameters hold {min(flat)}, which the config does not have")
    settings = {
        "architectures": [chosen.architecture],
        "model_type": chosen.name,
        **chosen.write(c),
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_output,
        "torch_dtype": c.param_dtype,
        # The defaults of both are ids that a small vocabulary does not have.
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.separator if tokenizer else None),
        **(OF_BYTES if tokenizer and not tokenizer.json else {}),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    safetensors = _safetensors()
    try:
        try:
            temporary.mkdir(parents=True)
            safetensors.numpy.save_file(tensors, temporary / WEIGHTS, metadata=METADATA)
            write_json(temporary / CONFIG, settings)
            if tokenizer and tokenizer.json:
                write_bytes(temporary / TOKENIZER, tokenizer.json.encode())
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise store_error(folder, error) from error
    return folder


# --- tensors -------------------------------------------------------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor as stored, and the parameters of ours that it holds: one, or queries, keys and values."""

    name: str  # without the family's prefix
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    transposed: bool


def _tensors(c: ModelConfig, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model, with its full name."""

    def module(ours: str, leaves: tuple[str, ...], i: int | None = None) -> Iterator[tuple[str, Tensor]]:
        stem = family.modules[ours].format(i=i)
        at = ours if i is None else f"layers.{i}.{ours}"
        owners = [at.replace("qkv", part) for part in ("query", "key", "value")] if ours.endswith("qkv") else [at]
        for leaf in leaves:
            name, shape = f"{stem}.{'bias' if leaf == 'bias' else 'weight'}", shapes(ours, leaf)
            transposed = family.transposed and leaf == "kernel"
            held = tuple(f"{owner}.{leaf}" for owner in owners)
            yield family.prefix + name, Tensor(name, shape[::-1] if transposed else shape, held, transposed)

    def shapes(ours: str, leaf: str) -> tuple[int, ...]:
        out = {"attention.qkv": 3 * c.d_model, "mlp.up": c.mlp_width}.get(ours, c.d_model)
        rows = {"embed": c.vocab_size, "position": c.context, "mlp.down": c.mlp_width}.get(ours, c.d_model)
        return (rows, out) if leaf in ("kernel", "embedding") else (out,)

    yield from module("embed", ("embedding",))
    if "position" in family.modules:
        yield from module("position", ("embedding",))
    for i in range(c.n_layers):
        for ours in ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down"):
            yield from module(ours, ("scale" if ours.endswith("norm") else "kernel", "bias"), i)
    yield from module("final_norm", ("scale", "bias"))
    if not c.tie_output:
        head = family.head[0]
        yield head, Tensor(head, (c.vocab_size, c.d_model), ("unembed.kernel",), True)


def _split(c: ModelConfig, family: Family, tensor: Tensor, stored: np.ndarray) -> list[np.ndarray]:
    x = stored.T if tensor.transposed else stored
    return [x] if len(tensor.ours) == 1 else list(rearrange(x, " -> ".join(family.packing), H=c.n_heads, three=3))


def _join(c: ModelConfig, family: Family, tensor: Tensor, flat: dict[str, np.ndarray]) -> np.ndarray:
    """The inverse of `_split`; takes what it uses out of `flat`. A bias that the config has not is zero."""
    parts = []
    for name in tensor.ours:
        if name.endswith(".bias") and not c.bias:
            parts.append(np.zeros(tensor.shape[0] // len(tensor.ours), jnp.dtype(c.param_dtype)))
        elif name in flat:
            parts.append(flat.pop(name))
        else:
            raise BadInput(f"the parameters lack {name}, which the config has")
    try:
        x = rearrange(np.stack(parts), " -> ".join(family.packing[::-1]), H=c.n_heads) if len(parts) > 1 else parts[0]
    except ValueError:
        raise BadInput(f"{', '.join(tensor.ours)} have different shapes") from None
    x = np.ascontiguousarray(x.T if tensor.transposed else x)
    if x.shape != tensor.shape:
        raise BadInput(f"{' + '.join(tensor.ours)} has the shape {x.shape}, and the config makes it {tensor.shape}")
    return x


def _flat(c: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Parameters by dotted name, a scanned model's layer by layer; a running mean, too, in the config's dtype."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, value = build.param_name(path), np.asarray(leaf, jnp.dtype(c.param_dtype))
        if c.scan_layers and name.startswith("layers."):
            rest = name.removeprefix("layers.")
            flat |= {f"layers.{i}.{rest}": value_x for i, value_x in enumerate(value)}
        else:
            flat[name] = value
    return flat


# --- files ---------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where a tensor lies: its file, and its name there."""

    path: Path
    name: str
    opened: Any

    def look(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape, without reading the tensor."""
        part = self.opened.get_slice(self.name)
        return part.get_dtype(), tuple(part.get_shape())

    def read(self) -> np.ndarray:
        """The tensor. Raises BadInput for a dtype that is none of READ."""
        dtype, _ = self.look()
        if dtype not in READ:
            raise BadInput(f"{self.path}: the tensor {self.name} is {dtype}; it must be {', '.join(READ)}")
        return self.opened.get_tensor(self.name)


def _open(folder: Path, family: Family, stack: ExitStack) -> dict[str, Stored]:
    """All tensors of a folder, by name without prefix; the files stay open as long as `stack`."""
    safetensors = _safetensors()
    stored: dict[str, Stored] = {}
    for path in _files(folder):
        try:
            opened = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except (OSError, safetensors.SafetensorError) as error:
            raise BadInput(f"{path} cannot be read: {error}") from None
        for name in list(opened.keys()):
            short = name.removeprefix(family.prefix)
            short = family.head[0] if short in family.head else short
            if short in stored:
                raise BadInput(f"{path}: the tensor {name} stands also in {stored[short].path.name}")
            if not re.fullmatch(family.ignored, short):
                stored[short] = Stored(path, name, opened)
    return stored


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise BadInput(f"{folder} has neither {WEIGHTS} nor {INDEX}; other kinds of weights are not read")
    parts = read_json(index)
    names = parts.get("weight_map") if isinstance(parts, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise BadInput(f"{index} has no weight_map from tensors to files of this folder")
    return [folder / name for name in sorted(set(names.values()))]


def _read_params(c: ModelConfig, family: Family, stored: dict[str, Stored]) -> nnx.State:
    head, embed = stored.get(family.head[0]), stored.get(f"{family.modules['embed']}.weight")
    if c.tie_output and head is not None and embed is not None:
        if head.look()[1] != embed.look()[1] or not np.array_equal(head.read(), embed.read()):
            raise BadInput(f"{head.path}: {head.name} differs from {embed.name}, and tie_word_embeddings is true")
        del stored[family.head[0]]
    expected = dict(_tensors(c, family))
    extra = stored.keys() - {tensor.name for tensor in expected.values()}
    if extra:
        one = stored[min(extra)]
        raise BadInput(f"{one.path}: the tensor {one.name} is not part of a {family.name} of this {CONFIG}")
    flat: dict[str, np.ndarray] = {}
    for full_name, tensor in expected.items():
        if tensor.name not in stored:
            raise BadInput(f"the tensor {full_name} is missing from the weights")
        one = stored[tensor.name]
        if one.look()[1] != tensor.shape:
            raise BadInput(
                f"{one.path}: the tensor {one.name} has the shape {one.look()[1]}, and {CONFIG} makes it {tensor.shape}"
            )
        parts = _split(c, family, tensor, one.read())
        flat |= {
            ours: np.array(x, jnp.dtype(c.param_dtype), order="C") for ours, x in zip(tensor.ours, parts, strict=True)
        }

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
        name = build.param_name(path)
        if c.scan_layers and name.startswith("layers."):
            rest = name.removeprefix("layers.")
            return np.stack([flat.pop(f"layers.{i}.{rest}") for i in range(c.n_layers)]).reshape(like.shape)
        return flat.pop(name)

    return jax.tree_util.tree_map_with_path(leaf, build.abstract_params(c))


def _check_replaceable(folder: Path) -> None:
    """Raises BadInput where a file stands, or a folder where one works or with anything but an export of ours."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise BadInput(f"{folder} is a file or a link; name a new folder")
    if folder.samefile(Path.cwd()):
        raise BadInput(f"{folder} is the current directory; name a new folder")
    held = sorted(path.name for path in folder.iterdir())
    if held and set(held) - {TOKENIZER} != {CONFIG, WEIGHTS}:
        other = next((name for name in held if name not in (CONFIG, WEIGHTS, TOKENIZER)), held[0])
        raise BadInput(f"{folder} holds {other} already; name a new folder")
    if not held:
        return
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as opened:
            ours = (opened.metadata() or {}).get("writer") == METADATA["writer"]
    except (OSError, safetensors.SafetensorError):
        ours = False
    if not ours:
        raise BadInput(f"{folder} holds weights that jaxgpt did not write; name a new folder")


def _publish(temporary: Path, folder: Path) -> None:
    """Renames into place; an export that stood there is first set aside, then deleted."""
    aside = temporary.with_suffix(".replaced")
    if folder.exists():
        os.replace(folder, aside)
    os.replace(temporary, folder)
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise BadInput("Hugging Face weights need the safetensors package: pip install 'jaxgpt[hf]'") from None
    return safetensors
