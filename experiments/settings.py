"""Run configs from what stands on the command line: a --config file, settings, axes of settings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxgpt.config import BadInput, RunConfig, fields, flatten, override


def settings_of(path: Path | None) -> dict[str, Any]:
    """The settings of a --config file by dotted path. They need not make a config by themselves."""
    from jaxgpt import store

    if path is None:
        return {}
    if not path.is_file():
        raise BadInput(f"config={path} is not there; it must be a JSON file")
    tree = store.read_json(path)
    if not isinstance(tree, dict):
        raise BadInput(f'config={path} must hold a JSON object such as {{"model": {{"d_model": 64}}}}')
    settings, known = flatten(tree), {f.path: f for f in fields(RunConfig)}
    for name, value in settings.items():
        # Strings on the command line are read by the field's type; in JSON a number is a number.
        if isinstance(value, str) and name in known and not known[name].takes_text:
            raise BadInput(
                f"config={path}: {name}={json.dumps(value)} is not allowed; it must be {known[name].allowed}"
            )
    return settings


def configs(base: dict[str, Any], settings: dict[str, str], zips: Sequence[str]) -> list[RunConfig]:
    """Lists of values are axes, zipped where asked, else in all combinations; a single value is in all of them."""
    values = {path: value.split(",") for path, value in settings.items()}
    axes: list[list[dict[str, str]]] = []
    for group in zips:
        names = group.split(",")
        for name in names:
            if len(values.get(name, ())) < 2 or names.count(name) > 1:
                raise BadInput(f"--zip {group}: {name} is not an axis here; give it values, as in {name}=1,2")
        if len({len(values[name]) for name in names}) > 1:
            lengths = ", ".join(f"{name} has {len(values[name])}" for name in names)
            raise BadInput(f"--zip {group}: the axes need equally many values, but {lengths}")
        together = zip(*(values.pop(name) for name in names), strict=True)
        axes.append([dict(zip(names, each, strict=True)) for each in together])
    axes += [[{path: value} for value in several] for path, several in values.items()]
    # All settings of a run at once: 48 wide with 3 heads is a model, 3 heads in the default width is none.
    return [
        override(RunConfig(), base | dict(itertools.chain(*(d.items() for d in each))))
        for each in itertools.product(*axes)
    ]


def all_fields() -> Table:
    """Every field of a run's config, for the end of `train --help` and `sweep --help`."""
    table = Table(title="Fields of a run", title_justify="left")
    for column in ("field=default", "what it means", "allowed"):
        table.add_column(column, overflow="fold")  # a name cut short could not be typed
    for f in fields(RunConfig):
        default = f.default if isinstance(f.default, str) else json.dumps(f.default)
        table.add_row(f"{f.path}={default}", f.help, f.allowed)
    return table
