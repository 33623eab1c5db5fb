"""Matrix products, and the exponentials of a softmax, as the kernels of several operators take them."""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

# Logits live in units of log 2, so that a softmax takes ``exp2``, one instruction.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, accumulator, UPCAST: tl.constexpr):
    """accumulator + a @ b, of float32 as precisely as float32.

    NVIDIA's tensor cores take the sum of three products in tf32: of each number's first digits and of the rest.
    """
    if UPCAST:
        a, b = a.to(accumulator.dtype), b.to(accumulator.dtype)
    PRECISION: tl.constexpr = "tf32x3" if a.dtype == tl.float32 and not is_hip() else "ieee"
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)
