"""Triton's interpreter without three costs that tests of small shapes need not pay: most of its time.

It patches ``triton.language`` again in every call from one jitted function to another, 2 ms, though the kernel around
them has done it; it computes all integer arithmetic a second time in 64 bits to see whether it overflows; and every
operation makes and compares the types of its operands anew. Offsets that need 64 bits have tests of their own.
"""

import dataclasses
from typing import Any

__all__ = ["quicken"]


def quicken() -> None:
    """Best effort: where Triton's internals have other names, the interpreter stays as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, error_type = interpreter._patch_lang, interpreter.InterpreterError
        function, builder = interpreter.InterpretedFunction, interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        _make_types_once(tl, interpreter)
    except (ImportError, AttributeError, TypeError):
        return

    def call(self, *arguments, **keywords):
        if "languages" not in self.__dict__:
            self.languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in self.languages):  # not patched yet
            patch(self.fn)
        try:
            return self.rewrite()(*arguments, **keywords)
        except Exception as error:
            raise error_type(repr(error)) from error

    function.__call__ = call
    builder.options = options


def _make_types_once(tl: Any, interpreter: Any) -> None:
    """A type of blocks is made once, and keeps what follows from it; values of the right type are not converted."""
    block_type, tensor, semantic = tl.core.block_type, tl.tensor, type(interpreter.interpreter_semantic)
    init_type, init_tensor, numpy_type = block_type.__init__, tensor.__init__, interpreter._get_np_dtype
    broadcast, cast = semantic.broadcast_impl_value, semantic.cast

    def init_type_once(self, element_ty, shape):
        made = element_ty.__dict__.setdefault("blocks", {})
        lengths = tuple([length.value if isinstance(length, tl.constexpr) else length for length in shape])
        if lengths not in made:
            init_type(self, element_ty, shape)
            made[lengths] = self.__dict__
        self.__dict__ = made[lengths]

    def init_tensor_by_type(self, handle, type):
        if "tensors" not in type.__dict__:
            init_tensor(self, handle, type)
            type.tensors = {name: value for name, value in self.__dict__.items() if name != "handle"}
        self.__dict__.update(type.tensors, handle=handle)

    def numpy_type_once(type):
        if "numpy_type" not in type.__dict__:
            type.numpy_type = numpy_type(type)
        return type.numpy_type

    def broadcast_other_shapes(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_other_types(self, input, dst_ty, *rounding):
        return input if input.type.scalar is dst_ty.scalar else cast(self, input, dst_ty, *rounding)

    block_type.__init__, tensor.__init__, interpreter._get_np_dtype = (
        init_type_once,
        init_tensor_by_type,
        numpy_type_once,
    )
    semantic.broadcast_impl_value, semantic.cast = broadcast_other_shapes, cast_other_types
