"""Ctrl-C and SIGTERM that end the process at once, with a line instead of a traceback: while nothing is at stake yet,
or when somebody asks for the second time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PREEMPTED = 75  # EX_TEMPFAIL: what asks to be run again


def ended_by(signum: int) -> int:
    """The exit code after a signal that stopped the work cleanly. A machine that is wanted back sends SIGTERM, and
    schedulers run again what ends with 75.
    """
    return PREEMPTED if signum == signal.SIGTERM else 128 + signum


def end_beside(threads: Collection[threading.Thread], code: int) -> None:
    """Ends the process at once if any of these threads is alive; else returns.

    Python would take down its interpreter around them, and a thread that comes out of XLA then aborts the process.
    """
    if any(thread.is_alive() for thread in threads):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # the reader of our output has gone
                stream.flush()
        os._exit(code)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """For imports, which write nothing: an exception raised inside one may be swallowed by an extension module, or
    leave a package half imported, so there is none.
    """
    # Only the main thread may set handlers; in another one the caller's stand.
    signals = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {signum: signal.signal(signum, _end) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(signum: int, _frame: Any) -> None:
    os.write(2, b"\njaxgpt: stopped; the same command goes on\n")
    os._exit(ended_by(signum))
