# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
"""The last axis of a block taken apart into registers, one block for each entry, and put together again.

Triton moves all of a row into one thread for this, once; what follows takes entries by their numbers, as of a tuple.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _paired(shape):
    """A shape whose last axis is cut into pairs."""
    return [*shape[:-1], shape[-1] // 2, 2]


@triton.constexpr_function
def _joined(shape):
    """A shape whose last two axes are one."""
    return [*shape[:-2], shape[-2] * shape[-1]]


@triton.constexpr_function
def _logarithm(number):
    """Of a power of two, the binary one."""
    return number.bit_length() - 1


@triton.jit
def unstack(block):
    """[..., N] as N blocks [..., 1], N a power of two."""
    parts = (block,)
    for _ in tl.static_range(_logarithm(block.shape[-1])):
        evens, odds = (), ()
        for i in tl.static_range(len(parts)):
            even, odd = tl.split(tl.reshape(parts[i], _paired(parts[i].shape)))
            evens, odds = evens + (even,), odds + (odd,)
        parts = evens + odds
    return parts


@triton.jit
def stack(parts):
    """The inverse of ``unstack``."""
    for _ in tl.static_range(_logarithm(len(parts))):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            b_pairs = tl.join(parts[i], parts[i + len(parts) // 2])
            joined = joined + (tl.reshape(b_pairs, _joined(b_pairs.shape)),)
        parts = joined
    return parts[0]
