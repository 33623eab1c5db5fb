"""``python -m autotune COMMAND``: one module per command, imported only when the command is called.

A command's module offers ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit code; its docstring is what
``python -m autotune COMMAND --help`` shows above the options.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

COMMANDS = {  # name -> (module, one line of help)
    "profile": ("autotune.profile", "run operators and models on a real photograph, ours against the naive path"),
    "figures": ("autotune.figures", "write the README's tables and figures from the committed results"),
    "tune": ("autotune.tune", "time configs for a model's or an operator's launches and keep the best"),
    "show": ("autotune.show", "show every tuned config, and which of them are out of date"),
    "verify": ("autotune.verify", "check every tuned config against the reference again"),
    "bench": (
        "autotune.bench",
        "measure operators and models against naive, compiled and peers; --suite for all of it",
    ),
    "notebooks": ("autotune.execute", "execute the notebooks again and write their outputs into them"),
    "compile": ("autotune.compile", "compile the Triton kernels ahead of time for a named architecture, without a GPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return its exit code; SystemExit for a malformed one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m autotune", description="Measure and build the kernels.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        if argv[:1] != [name]:
            commands.add_parser(name, help=summary, add_help=False)
            continue
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("autotune", "kernels", "models"):
                raise
            message = f"{name} needs the package {error.name}, which is not installed here; pip install -e . brings it"
            print(f"error: {message}", file=sys.stderr)
            return 2
        command = commands.add_parser(
            name,
            help=summary,
            description=inspect.getdoc(module),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    from kernels.files import WriteError  # with PyTorch, which --help does without

    try:
        return arguments.run(arguments)
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
