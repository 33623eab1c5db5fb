"""``python -m models COMMAND``: one module per command, imported only when the command is called.

A command's module offers ``add_arguments(parser)`` and ``run(arguments) -> int``, the exit code; its docstring is what
``python -m models COMMAND --help`` shows above the options.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence

from models.commands.errors import CommandError

__all__ = ["COMMANDS", "main"]

COMMANDS = {  # name -> (module, one line of help)
    "list": ("models.commands.list", "show every model: size, parameters, published accuracy, official weights"),
    "classify": ("models.commands.classify", "name what photographs show, and draw the five best guesses"),
    "evaluate": ("models.commands.evaluate", "measure top-1 and top-5 on a folder of images, as the papers do"),
    "finetune": ("models.commands.finetune", "train a model on a folder of images; a killed run continues"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return its exit code; SystemExit for a malformed one.

    2 says that nothing was wrong with the program but with what it was given, 130 that the user interrupted it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m models", description="Use, measure and train the models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        if argv[:1] != [name]:
            commands.add_parser(name, help=summary, add_help=False)
            continue
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name,
            help=summary,
            description=inspect.getdoc(module),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except CommandError as error:
        process = f" [process {os.environ['RANK']}]" if "RANK" in os.environ else ""
        print(f"{parser.prog} {argv[0]}{process}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog} {argv[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
