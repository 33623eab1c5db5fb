"""``python -m autotune COMMAND``: one module per command, imported only when the command is called."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from models.commands.dispatch import run_command

COMMANDS = {  # name -> (module, one line of help)
    "profile": ("autotune.profile", "run operators and models on a real photograph, ours against the naive path"),
    "tune": ("autotune.tune", "time configs for a model's or an operator's launches and keep the best"),
    "show": ("autotune.show", "show every tuned config, and which of them are out of date"),
    "verify": ("autotune.verify", "check every tuned config against the reference again"),
    "bench": ("autotune.bench", "measure operators and models against naive and compiled"),
    "compile": ("autotune.compile", "compile the Triton kernels ahead of time for a named architecture, without a GPU"),
    # What keeps this repository's own results lies beside them, and runs in a checkout only.
    "suite": ("notebooks.results.suite", "measure everything on a GPU, tests and tuning included, within nine minutes"),
    "figures": ("notebooks.results.figures", "write the tables and figures of the pages from the committed results"),
}


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # PyTorch's profiler warns of all memory there was before it
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # where notebooks is, from wherever this is called
    return run_command("autotune", "Measure and build the kernels.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
