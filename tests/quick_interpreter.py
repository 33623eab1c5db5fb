"""Triton's interpreter without two costs that tests of small shapes need not pay: three quarters of its time.

It patches ``triton.language`` again in every call from one jitted function to another, 2 ms, though the kernel around
them has done it; and it computes all integer arithmetic a second time in 64 bits to see whether it overflows. Offsets
that need 64 bits have tests of their own.
"""

import dataclasses

__all__ = ["quicken"]


def quicken() -> None:
    """Best effort: where Triton's internals have other names, the interpreter stays as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, error_type = interpreter._patch_lang, interpreter.InterpreterError
        function, builder = interpreter.InterpretedFunction, interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return

    def call(self, *arguments, **keywords):
        modules = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):  # not patched yet
            patch(self.fn)
        try:
            return self.rewrite()(*arguments, **keywords)
        except Exception as error:
            raise error_type(repr(error)) from error

    function.__call__ = call
    builder.options = options
