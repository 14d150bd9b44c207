"""Papers as commands. `reproduce("demo")` does from Python what `jaxgpt reproduce demo` does from a shell."""

from typing import Any


def reproduce(name: str, scale: str = "laptop", **options: Any) -> list[dict[str, Any]]:
    """Runs a paper's experiment and returns its claims with verdicts; see `experiments.reproduce.reproduce`."""
    from experiments.reproduction import reproduce

    return reproduce(name, scale, **options).claims
