"""``python -m models COMMAND``: one module per command, imported only when the command is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from models.commands.dispatch import run_command

COMMANDS = {  # name -> (module, one line of help)
    "list": ("models.commands.list", "show every model: size, parameters, published accuracy, official weights"),
    "classify": ("models.commands.classify", "name what photographs show, and draw the five best guesses"),
    "evaluate": ("models.commands.evaluate", "measure top-1 and top-5 on a folder of images, as the papers do"),
    "finetune": ("models.commands.finetune", "train a model on a folder of images; a killed run continues"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return its exit code; SystemExit for a malformed one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return run_command("models", COMMANDS, argv)
    parser = argparse.ArgumentParser(prog="python -m models", description="Use, measure and train the models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    parser.parse_args(argv)  # ends here, with the help or with what is malformed
    return 2


if __name__ == "__main__":
    sys.exit(main())
