"""``%load_ext autotune`` in IPython or Jupyter: ``%profile layer(x)`` is ``autotune.compare(layer, x)``."""

import ast
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class

from autotune.contenders import compare
from autotune.contest import Contest

FLAGS, VALUES = ("backward", "compiled", "different"), ("against", "seconds")


@magics_class
class ProfileMagics(Magics):
    shell: Any

    @line_magic
    def profile(self, line: str) -> Contest:
        """Check and time a call on every backend that runs here: %profile [options] layer(x, key=value)

        --backward        the gradients too
        --compiled        what torch.compile makes of the naive path takes part
        --against=NAME    another function of the same inputs (an expression without spaces; a list or a dict of them)
        --different       the others compute something else on purpose: they are timed without being compared
        --seconds=S       time to spend on all contenders together
        """
        chosen: dict[str, Any] = {}
        line = line.strip()
        while line.startswith("--"):
            option, _, line = line.partition(" ")
            name, _, value = option[2:].partition("=")
            if name not in (VALUES if value else FLAGS):
                known = ", ".join(f"--{name}" for name in (*FLAGS, *(f"{name}=VALUE" for name in VALUES)))
                raise UsageError(f"%profile knows the options {known}, and not {option}; see %profile?")
            chosen[name] = self.shell.ev(value) if value else True
            line = line.strip()
        chosen["same"] = not chosen.pop("different", False)
        function, inputs, keywords = self._taken_apart(line)
        return compare(function, *inputs, **chosen, **keywords)

    def _taken_apart(self, text: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The function of a call, and its arguments, evaluated; the call itself is not made."""
        try:
            call = ast.parse(text, mode="eval").body
        except SyntaxError:
            call = None
        if not isinstance(call, ast.Call):
            raise UsageError(f"%profile takes a call, as in: %profile layer(x); got {text!r}")
        apart = "lambda function, /, *inputs, **keywords: (function, inputs, keywords)"
        collect: Any = ast.parse(apart, mode="eval").body
        return self.shell.ev(ast.unparse(ast.Call(collect, [call.func, *call.args], call.keywords)))


def load_ipython_extension(shell: Any) -> None:
    """Called by ``%load_ext autotune``."""
    shell.register_magics(ProfileMagics)
