"""One command of ``python -m models`` or ``python -m autotune``: its arguments, its output, and its errors as one line.

A command's module offers ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit code; its docstring is what
``--help`` shows above the options.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import importlib
import inspect
import io
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence

import kernels
from models.commands.errors import CommandError

__all__ = ["run_command"]

OURS = ("autotune", "kernels", "models")
PLAIN = {
    "×": "x",
    "–": "-",
    "—": "-",
    "−": "-",
    "·": "*",
    "⁄": "/",
    "½": "1/2",
    "µ": "u",
    "→": "->",
    "≥": ">=",
    "≤": "<=",
}


def run_command(package: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str]) -> int:
    """Runs the command that ``argv`` begins with and returns its exit code; SystemExit for malformed arguments.

    2 says that nothing was wrong with the program but with what it was given or where it runs, 130 that the user
    interrupted it, 141 that nobody reads its output any more.
    """
    name, code = f"python -m {package} {argv[0]}", 2
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    try:
        try:
            return _run(name, commands[argv[0]][0], argv[1:])
        finally:
            sys.stdout.flush()  # a full disk is noticed here, not while Python ends
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:
        message, code = "", 141
    except CommandError as error:
        message = f"error: {error}"
    except OSError as error:
        unwritten = _give_up_stdout()
        message = f"error: standard output cannot be written: {error.strerror}" if unwritten else f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        message = f"error: there is not enough memory; a smaller batch or size needs less ({_first_line(error)})"
    _give_up_stdout()
    if message:
        process = f" [process {os.environ['RANK']}]" if "RANK" in os.environ else ""
        print(f"{name}{process}: {message}", file=sys.stderr)
    return code


def _run(name: str, module_name: str, argv: Sequence[str]) -> int:
    try:
        kernels.get_backend()
    except ValueError as error:  # of the environment variable that presets it
        raise CommandError(str(error)) from None
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(
            prog=name, description=inspect.getdoc(module), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(parser)
        return module.run(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        command = name.rpartition(" ")[2]
        raise CommandError(
            f"{command} needs the package {error.name}, which is not installed here; pip install -e . brings it"
        ) from None


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """In place of a character that a terminal's encoding lacks: the nearest it has. A file name's bytes stay as are."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    simpler = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return PLAIN.get(character) or simpler or "?", error.start + 1


def _give_up_stdout() -> bool:
    """Leaves out what can no longer be written, if anything: Python would try once more while it ends."""
    try:
        sys.stdout.flush()
        return False
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
