"""One command of ``python -m models`` or ``python -m autotune``: its arguments, and its errors as one line.

A command's module offers ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit code; its docstring is what
``--help`` shows above the options.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

OURS = ("autotune", "kernels", "models")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class CommandError(Exception):
    """Something that the user gave cannot be used. Shown without a traceback; the exit code is 2."""


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """For checks of what the user gave: turns the errors with which functions refuse input into ``CommandError``."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error


def run_command(
    package: str, description: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None = None
) -> int:
    """Runs a command line (``sys.argv`` by default) and returns its exit code; SystemExit for malformed arguments.

    ``commands`` maps each name to its module, which is imported only when it is called, and to one line of help. Exit
    code 2: the input or the machine is at fault, not the program; 130: the user interrupted it; 141: nobody reads
    its output any more.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in commands:
        parser = argparse.ArgumentParser(prog=f"python -m {package}", description=description)
        known = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
        for name, (_, summary) in commands.items():
            known.add_parser(name, help=summary, add_help=False)
        parser.parse_args(argv)  # ends here, with the help or with what is malformed, but for "--"
        return 2
    name, code = f"python -m {package} {argv[0]}", 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than are printed
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
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"error: there is not enough memory; a smaller batch or size needs less ({reason})"
    _give_up_stdout()
    if message:
        process = f" [process {os.environ['RANK']}]" if "RANK" in os.environ else ""
        print(f"{name}{process}: {message}", file=sys.stderr)
    return code


def _run(name: str, module_name: str, argv: Sequence[str]) -> int:
    import kernels  # here, because it brings PyTorch, and the list of commands is shown without

    with input_errors():
        kernels.get_backend()  # refuses a wrong DYNAMIC_KERNELS_BACKEND
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(
            prog=name,
            description=(inspect.getdoc(module) or "").replace("``", ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        return module.run(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OURS:
            raise
        command = name.rpartition(" ")[2]
        missing = f"{command} needs the package {error.name}, which is not installed here"
        raise CommandError(f"{missing}; pip install -e . in a checkout brings it") from None


def _give_up_stdout() -> bool:
    """Drops output that cannot be written, which Python would try to flush again as it ends. True if there was any."""
    try:
        sys.stdout.flush()
        return False
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
