# pyright: reportArgumentType=false, reportOperatorIssue=false
"""Matrix products, and the exponentials of a softmax, as the kernels of several operators take them."""

import triton
import triton.language as tl

# Logits live in units of log 2, so that a softmax takes ``exp2``, one instruction.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, accumulator, UPCAST: tl.constexpr):
    """accumulator + a @ b; float32 exactly, not in tf32."""
    if UPCAST:
        a, b = a.to(accumulator.dtype), b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)
