"""Papers as commands. `reproduce("demo")` does from Python what `jaxgpt reproduce demo` does from a shell."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.registry import Scale


def reproduce(name: str, scale: "Scale" = "laptop", **options: Any) -> list[dict[str, Any]]:
    """Runs a paper's experiment and returns its claims with verdicts; see `experiments.reproduction.reproduce`."""
    from experiments.reproduction import reproduce

    return reproduce(name, scale, **options).claims
