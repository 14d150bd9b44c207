"""jaxgpt: a JAX research codebase for the science of scale.

from jaxgpt import RunConfig, load, product, sweep
runs = sweep(product(RunConfig(), {"model.d_model": [32, 64], "train.steps": [200, 400]}), "results/raw/mine")
runs, curves = load("results/raw/mine")
"""

from typing import TYPE_CHECKING, Any

from jaxgpt.config import BadInput, ModelConfig, RunConfig, override

if TYPE_CHECKING:
    from jaxgpt.build import create
    from jaxgpt.launch import product, sweep, zipped
    from jaxgpt.sample import generate
    from jaxgpt.store import load
    from jaxgpt.trained import load_model

__all__ = ["BadInput", "ModelConfig", "RunConfig", "create", "generate", "load", "load_model", "override", "product",
           "sweep", "zipped"]  # fmt: skip

_WHERE = {"create": "build", "generate": "sample", "load": "store", "load_model": "trained",
          "product": "launch", "sweep": "launch", "zipped": "launch"}  # fmt: skip


def __getattr__(name: str) -> Any:
    """JAX and pandas cost seconds, so what needs them is imported when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"jaxgpt.{_WHERE[name]}"), name)
