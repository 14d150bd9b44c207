"""The `jaxgpt` command: reads the words, calls the sub-command (commands.py), and turns what went wrong into a line.

Numbers go to stdout, progress and notes to stderr. Bad input: one line, exit code 2, nothing written. Nothing but the
standard library is imported before `main` runs, so that Ctrl-C finds a handler.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import gc
import io
import itertools
import operator
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from experiments.interrupt import end_beside, ended_by, ending_at_once

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """jaxgpt: a JAX research codebase for the science of scale.

Reproduce a paper (jaxgpt reproduce demo), train a model (jaxgpt train model.d_model=128), sweep over sizes, data and
seeds (jaxgpt sweep model.d_model=32,64 train.steps=200,400), look at what is there (jaxgpt runs, show, diff) and
inside it (jaxgpt anatomy), fit a scaling law to any table (jaxgpt fit) and plan with it (jaxgpt plan), put questions to
checkpoints (jaxgpt evaluate) and ask which abilities of a table of scores appear suddenly (jaxgpt emergence), put all
results on one page (jaxgpt report), let a model write (jaxgpt sample) and take it away (jaxgpt export). Kill anything
at any time: the same command goes on where it was."""

SWITCHES = ("--dry-run", "--dry_run", "--profile")  # flags of `train` and `sweep` that take no value


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a launcher gave jobs up, 2 bad input or a full disk, 75 stopped by SIGTERM or
    --max-minutes before all was done (to be run again), 130 after Ctrl-C.
    """
    words, before = list(sys.argv[1:] if arguments is None else arguments), set(threading.enumerate())
    # Imports and tracing make many objects that stay; Python's collector, every 700, took a tenth of the start.
    gc.set_threshold(20_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no ± shows a ?
            stream.reconfigure(errors="replace")
    try:
        code = _guarded(words)
    except KeyboardInterrupt as stopped:
        reason = str(stopped) or "stopped"
        sys.stderr.write(f"\njaxgpt: {reason}; the same command goes on\n")
        code = ended_by(getattr(stopped, "signum", signal.SIGINT))
        if not hasattr(stopped, "signum"):  # not launch.Interrupted: a second signal, while lanes may still train
            end_beside(set(threading.enumerate()) - before, code)
    except BrokenPipeError:  # the reader of our output has gone: `jaxgpt list | head`
        sys.stderr.close()
        code = 141
    if code:
        sys.exit(code)


def _guarded(words: list[str]) -> int:
    """The exit code. Says in one line what is the user's to mend; anything else is a bug and shows its traceback."""
    with ending_at_once():
        from analysis.fit import FitError
        from experiments.commands import UNFINISHED
        from experiments.registry import Unfinished
        from jaxgpt.config import BadInput
        from jaxgpt.store import StoreError, out_of_space, store_error
    try:
        return _run(words)
    except Unfinished as error:
        sys.stderr.write(f"{error}\n")
        return UNFINISHED
    except (BadInput, FitError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            if not out_of_space(error):
                raise
            error = store_error(error.filename or "the disk", error)
        sys.stderr.write(f"jaxgpt: {' '.join(str(error).split())}\n")
        return 2


def _run(words: list[str]) -> int:
    from experiments.commands import COMMANDS, target, version

    if words == ["--version"]:
        sys.stdout.write(f"{version()}\n")
        return 0
    flags = _parse(words)
    target("--json", getattr(flags, "json", None))
    return COMMANDS[type(flags)][1](flags, _console()) or 0


def _parse(words: list[str]) -> Any:
    """The flags of a sub-command. Raises BadInput with tyro's own reason in one line; --help prints and exits."""
    import tyro

    from experiments.commands import COMMANDS

    subcommands = tuple(Annotated[flags, tyro.conf.subcommand(name)] for flags, (name, _) in COMMANDS.items())
    from jaxgpt.config import BadInput

    names = [name for name, _ in COMMANDS.values()]
    if words and not words[0].startswith("-") and words[0] not in names:
        near = difflib.get_close_matches(words[0], names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"{words[0]!r} is not a command; {hint}there are {', '.join(names)}")
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(  # pyright: ignore[reportCallIssue]
                functools.reduce(operator.or_, subcommands),  # pyright: ignore[reportArgumentType]
                prog="jaxgpt",
                args=_settings_first(words) or ["--help"],
                description=DESCRIPTION,
                config=config,
            )
    except SystemExit as stopped:
        if not stopped.code:
            if words and words[0] in ("train", "sweep"):
                from experiments.settings import all_fields

                _console().print(all_fields())
            raise
        # tyro draws a box, in ASCII where the terminal is not UTF-8: a title, then parts with rules between them.
        inside = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        parts = [" ".join(part) for text, part in itertools.groupby(inside, lambda s: s.strip("─-") != "") if text]
        reason = parts[0] if parts else "these arguments cannot be read"
        page = f"jaxgpt {words[0]} --help" if words[0] in names else "jaxgpt --help"
        raise BadInput(f"{' '.join(reason.split())} (see {page})") from None


def _settings_first(words: list[str]) -> list[str]:
    """Settings may stand between the flags of `train` and `sweep`; tyro wants them side by side."""
    if not words or words[0] not in ("train", "sweep"):
        return words
    settings, rest = [], []
    for before, word in itertools.pairwise(words):
        is_value = before.startswith("--") and "=" not in before and before not in SWITCHES
        (rest if is_value or word.startswith("-") else settings).append(word)
    return [words[0], *settings, *rest]


def _console() -> Console:
    from rich.console import Console

    # Tables keep their columns when they are piped into a file.
    return Console() if sys.stdout.isatty() else Console(width=160)
