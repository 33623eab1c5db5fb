"""What a tuned config's time comes from: a version of Triton, and the jit functions that a launch may run."""

import functools
import hashlib
import importlib.metadata
import inspect
import io
import sys
import tokenize
from collections.abc import Iterator

IGNORED_TOKENS = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


@functools.cache
def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def source_of(module: str) -> str:
    """Hash of the jit functions that a launcher's module may launch, comments and docstrings left out."""
    digest = hashlib.sha256()
    for name in sorted(modules_of(module)):
        for line in jit_code(name):
            digest.update(line.encode())
    return digest.hexdigest()[:16]


def modules_of(name: str) -> set[str]:
    """A module of this package and those whose jit functions or launchers it uses, directly or through others."""
    found, left = set(), [name]
    while left:
        name = left.pop()
        found.add(name)
        for value in vars(sys.modules[name]).values():
            function = getattr(value, "fn", None) or getattr(value, "launch", None)
            module = getattr(function, "__module__", None)
            if isinstance(module, str) and module.startswith("kernels.") and module not in found:
                left.append(module)
    return found


def jit_code(module: str) -> Iterator[str]:
    """The tokens of a module's jit functions, and the constants that they see: the same in every version of Python."""
    for name, value in sorted(vars(sys.modules[module]).items()):
        function = getattr(value, "fn", None)
        if type(value).__name__ == "constexpr":
            yield f"{name} = {value.value!r}"
        elif function is not None and getattr(function, "__module__", None) == module:
            for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline):
                if token.type not in IGNORED_TOKENS and not token.string.startswith('"""'):
                    yield token.string
