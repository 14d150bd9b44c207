"""The training text of the family of models: its tokens, and windows of it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from experiments.anatomy import family

if TYPE_CHECKING:
    import numpy


@cache
def training_text(scale: str) -> numpy.ndarray:
    """The tokens that the family of this scale was trained on."""
    import numpy as np

    from jaxgpt.tasks import text

    train_n = text.reader()(family.configs(family.SIZES[scale])[0]).data().train_n
    assert train_n is not None, "a streamed corpus stays on disk"
    return np.asarray(train_n)


def training_windows(scale: str, windows: int) -> numpy.ndarray:
    """Windows of the training text, [W, T + 1] int32, evenly over it."""
    import numpy as np

    tokens_n, length = training_text(scale), family.configs(family.SIZES[scale])[0].model.context + 1
    starts_W = np.linspace(0, len(tokens_n) - length, windows).astype(np.int64)
    return tokens_n[starts_W[:, None] + np.arange(length)].astype(np.int32)
