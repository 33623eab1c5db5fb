"""``python -m models COMMAND``: one module per command, imported only when the command is called."""

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
    return run_command("models", "Use, measure and train the models.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
