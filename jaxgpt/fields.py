"""Frozen dataclasses as settings: bounds, the JSON form, overrides such as `model.d_model=64`, and clear refusals.

Every field states its meaning and its allowed values once, in its metadata; `--help`, validation and error messages
are made from that.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

SMALLEST_FLOAT32, LARGEST_FLOAT32 = 1.1754944e-38, 3.4028234e38

T = TypeVar("T")


class BadInput(ValueError):
    """Something the user gave is wrong. The message is one line: the field, the value, what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a value may hold line breaks


def field(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    identity: bool = True,
):
    """A config field. `low`/`above` and `high`/`below`: inclusive/exclusive bounds. `identity=False`: not part of
    `run_id`.
    """
    meta = {"help": help, "low": low, "above": above, "high": high, "below": below, "identity": identity}
    return dataclasses.field(default=default, metadata=meta)


# --- the JSON form -------------------------------------------------------------------------------------------------


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


def from_dict(tree: Mapping[str, Any], cls: type[T]) -> T:
    """The config that `to_dict` wrote. Raises BadInput for unknown keys (with the nearest name) and wrong types."""
    known = {f.path for f in fields(cls)}
    for path in flatten(tree):
        if path not in known:
            raise BadInput(_unknown(path, known))
    import dacite  # here: who only makes configs in Python needs it not

    try:
        return dacite.from_dict(cls, tree, config=dacite.Config(strict=True, check_types=False))
    except dacite.DaciteError as error:
        raise BadInput(f"config: {error}") from error


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
    high: float | None
    below: float | None

    @property
    def takes_text(self) -> bool:
        """Whether a string can be its value: free text, or one of its choices."""
        return any(kind is str or get_origin(kind) is Literal for kind in alternatives(self.type))

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        bounds = (("of at least", self.low), ("above", self.above), ("at most", self.high), ("below", self.below))
        words = [f"{word} {_number(bound)}" for word, bound in bounds if bound is not None]
        return _allowed(self.type, " " + " and ".join(words) if words else "")


def fields(cls: type) -> list[FieldInfo]:
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
    kinds = alternatives(field.type)
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


def check_fields(config: Any, group: str) -> None:
    """Types, choices and bounds of every field of one group; raises BadInput naming field, value, what is allowed."""
    for f in fields(type(config)):
        value = getattr(config, f.path)
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT32:  # NaN too
            raise BadInput(f"{group}.{f.path}={value} is not allowed; it must be finite, also in float32")
        if not any(_is(value, kind) for kind in alternatives(f.type)) or not _within(value, f):
            raise BadInput(f"{group}.{f.path}={value} is not allowed; it must be {f.allowed}")


def _within(value: Any, f: FieldInfo) -> bool:
    if value is None:
        return True
    outside = (f.low is not None and value < f.low) or (f.high is not None and value > f.high)
    # As float32 holds it: 1e-60 is above 0 here and 0 in the step.
    too_low = f.above is not None and value - f.above < SMALLEST_FLOAT32
    return not (outside or too_low or (f.below is not None and value >= f.below))


def _number(bound: float) -> str:
    """2^32 and 2^31 - 1 as such; else in short."""
    power = round(math.log2(bound + 1)) if bound >= 2**20 else 0
    return (
        f"2^{power}" if bound == 2**power > 2**20 else f"2^{power} - 1" if bound == 2**power - 1 > 1 else f"{bound:g}"
    )


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type: `int | None` -> (int, NoneType)."""
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
        for k in alternatives(kind)
    )
    return " or ".join(words)


def _unknown(path: str, known: Any) -> str:
    near = difflib.get_close_matches(path, list(known), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path} is not a field of the config{hint} (`jaxgpt train --help` lists all)"


def divisors(n: int) -> str:
    """The divisors of n up to 1000: enough to choose from, and quick for any n."""
    return ", ".join(str(k) for k in range(1, min(n, 1000) + 1) if n % k == 0)
