"""How many bits text takes: by classical compressors, by a model's predictions, and by an arithmetic coder, which
makes a code of these predictions (Witten, Neal & Cleary 1987).

Letters: V symbols, n of them in a message; W windows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

TOTAL = 2**24  # the frequencies of a symbol's alternatives add up to this
HALF = 2**47  # the interval is a part of [0, 2 HALF)
QUARTER = HALF // 2
BITS = 48

# --- lengths -------------------------------------------------------------------------------------------------------


def classical() -> dict[str, Callable[[bytes], int]]:
    """Bits that each classical compressor takes for some bytes, at its best; xz without its container."""
    import bz2
    import gzip
    import lzma

    def xz(text: bytes) -> int:
        # A dictionary as large as the text finds as much as a larger one, which takes long to set up for each chunk.
        window = min(2**26, max(4096, len(text)))
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
        return 8 * len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))

    return {
        "gzip": lambda text: 8 * len(gzip.compress(text, 9, mtime=0)),
        "bzip2": lambda text: 8 * len(bz2.compress(text)),
        "xz": xz,
    }


def probabilities(model: Any) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """From tokens (B, T) to natural logarithms (B, T, V) of what follows each."""
    import numpy as np
    from flax import nnx

    graphdef, params = nnx.split(model)
    return lambda tokens_BxT: np.asarray(_program()(graphdef, params, tokens_BxT.astype(np.int32)))


@cache
def _program() -> Any:
    """Compiled once for all models of one shape."""
    import jax
    from flax import nnx

    return jax.jit(lambda graph, params, tokens: jax.nn.log_softmax(nnx.merge(graph, params)(tokens)), static_argnums=0)


def model_bits(log_p: Callable[[numpy.ndarray], numpy.ndarray], chunk_n: numpy.ndarray, context: int) -> float:
    """Bits of a chunk by a model that sees nothing before it: 8 for its first byte, then -log2 p of each.

    Windows of `context` bytes overlap by half, and of each only the predictions not yet had count: so each byte but the
    first ones is predicted from at least half a context.
    """
    import numpy as np

    last = len(chunk_n) - 1 - context
    starts_W = np.unique(np.minimum(np.arange(0, last + context // 2, max(1, context // 2)), max(0, last)))
    context = min(context, len(chunk_n) - 1)
    at_WxT = starts_W[:, None] + np.arange(context)
    log_p_WxTxV = log_p(chunk_n[at_WxT])
    log_p_WxT = np.take_along_axis(log_p_WxTxV, chunk_n[at_WxT + 1][..., None].astype(int), axis=2)[..., 0]
    first_W = np.append(0, starts_W[:-1] + context)  # bytes up to this one are predicted by an earlier window
    return 8 - float(log_p_WxT[at_WxT >= first_W[:, None]].sum()) / math.log(2)


def coded(log_p: Callable[[numpy.ndarray], numpy.ndarray], text_KxT: numpy.ndarray) -> float:
    """Bits per byte by which one arithmetic code of K texts is longer than their log loss. Each text is one context.

    The code is decoded again, byte after byte, by a model that sees only what has been decoded. Raises RuntimeError
    where that does not give the texts back.
    """
    import numpy as np

    def after(log_p_V: numpy.ndarray) -> numpy.ndarray:
        return frequencies(np.exp(log_p_V.astype(np.float64)))

    def following(message: Sequence[int]) -> numpy.ndarray:
        seen = len(message) % length
        if not seen:
            return first_V
        padded_T = np.zeros(length, np.int64)
        padded_T[:seen] = message[-seen:]
        return after(log_p(padded_T[None])[0, seen - 1])

    length = text_KxT.shape[1]
    # One text at a time: another shape would be another program, with other roundings than the decoder's.
    log_p_KxTxV = np.stack([log_p(text_T[None])[0] for text_T in text_KxT])
    first_V = frequencies(np.ones(log_p_KxTxV.shape[2]))
    tables = [counts_V for log_p_TxV in log_p_KxTxV for counts_V in (first_V, *map(after, log_p_TxV[:-1]))]
    message = text_KxT.ravel().tolist()
    code = encode(message, tables)
    if decode(code, len(message), following) != message:
        raise RuntimeError("the arithmetic code does not decode to the text that it was made of")
    told = np.take_along_axis(log_p_KxTxV[:, :-1], text_KxT[:, 1:, None], axis=2)
    return (8 * len(code) - 8 * len(text_KxT) + float(told.sum()) / math.log(2)) / len(message)


def online(curve: Any, batch: int, context: int) -> numpy.ndarray:
    """Bits of the windows of each step (steps,), coded before they are trained on: 8 for a first byte, then the loss.

    curve: train_loss of every step in order. Raises ValueError where a step is missing.
    """
    import numpy as np

    if curve["step"].tolist() != list(range(1, len(curve) + 1)):
        raise ValueError("the curve lacks steps; train.log_every must be 1")
    return batch * (8 + context * curve["train_loss"].to_numpy(np.float64) / math.log(2))


# --- the arithmetic coder ------------------------------------------------------------------------------------------


def frequencies(p_V: numpy.ndarray) -> numpy.ndarray:
    """Whole numbers (V,), each at least 1, that add up to TOTAL: what is left by rounding goes to the likeliest."""
    import numpy as np

    counts_V = 1 + np.floor(p_V.astype(np.float64) / p_V.sum(dtype=np.float64) * (TOTAL - len(p_V))).astype(np.int64)
    counts_V[p_V.argmax()] += TOTAL - counts_V.sum()
    return counts_V


def encode(message: Iterable[int], counts_nxV: Iterable[numpy.ndarray]) -> bytes:
    """The message's code; `counts_nxV`: for each symbol the frequencies of what may stand there."""
    low, high, waiting = 0, 2 * HALF, 0
    bits: list[int] = []
    for symbol, counts_V in zip(message, counts_nxV, strict=True):
        low, high = _narrowed(low, high, symbol, counts_V)
        while (action := _renormal(low, high)) is not None:
            if action == QUARTER:
                waiting += 1  # the next bit's opposite, so often, once it is known
            else:
                bit = action // HALF
                bits += [bit, *[1 - bit] * waiting]
                waiting = 0
            low, high = 2 * (low - action), 2 * (high - action)
    last = int(low >= QUARTER)
    bits += [last, *[1 - last] * (waiting + 1)]
    bits += [0] * (-len(bits) % 8)
    return int("".join(map(str, bits)), 2).to_bytes(len(bits) // 8, "big")


def decode(code: bytes, length: int, counts_after: Callable[[Sequence[int]], numpy.ndarray]) -> list[int]:
    """The message of so many symbols; `counts_after` gives the frequencies that follow what is decoded so far."""
    import numpy as np

    bits = iter(f"{int.from_bytes(code, 'big'):0{8 * len(code)}b}" if code else "")
    low, high, value = 0, 2 * HALF, 0
    for _ in range(BITS):
        value = 2 * value + int(next(bits, "0"))
    message: list[int] = []
    for _ in range(length):
        counts_V = counts_after(message)
        at = ((value - low + 1) * TOTAL - 1) // (high - low)
        message.append(int(np.searchsorted(np.cumsum(counts_V), at, side="right")))
        low, high = _narrowed(low, high, message[-1], counts_V)
        while (action := _renormal(low, high)) is not None:
            low, high = 2 * (low - action), 2 * (high - action)
            value = 2 * (value - action) + int(next(bits, "0"))
    return message


def _narrowed(low: int, high: int, symbol: int, counts_V: numpy.ndarray) -> tuple[int, int]:
    start = int(counts_V[:symbol].sum())
    width = high - low
    return low + width * start // TOTAL, low + width * (start + int(counts_V[symbol])) // TOTAL


def _renormal(low: int, high: int) -> int | None:
    """What to subtract before the interval is doubled: 0, HALF, or QUARTER when it lies around the middle; None for an
    interval that is wide enough.
    """
    if high <= HALF:
        return 0
    if low >= HALF:
        return HALF
    return QUARTER if low >= QUARTER and high <= 3 * QUARTER else None
