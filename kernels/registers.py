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


@triton.jit
def apart(b, ROWS: tl.constexpr):
    """[M, ROWS · S] as ROWS blocks [M, S]; ROWS is a power of two."""
    rows, blocks = unstack(tl.permute(tl.reshape(b, [b.shape[0], ROWS, b.shape[1] // ROWS]), [0, 2, 1])), ()
    for i in tl.static_range(ROWS):
        blocks = blocks + (tl.reshape(rows[i], [b.shape[0], b.shape[1] // ROWS]),)
    return blocks


@triton.jit
def together(blocks):
    """The inverse of ``apart``."""
    rows = ()
    for i in tl.static_range(len(blocks)):
        rows = rows + (tl.reshape(blocks[i], [blocks[i].shape[0], blocks[i].shape[1], 1]),)
    b = tl.permute(stack(rows), [0, 2, 1])
    return tl.reshape(b, [b.shape[0], b.shape[1] * b.shape[2]])


@triton.jit
def _shifted_by(rows, m_moved, STEP: tl.constexpr, BACK: tl.constexpr):
    found = ()
    for i in tl.static_range(len(rows) - STEP):
        if BACK:
            found = found + (tl.where(m_moved, rows[i + STEP], rows[i]),)
        else:
            found = found + (tl.where(m_moved, rows[i], rows[i + STEP]),)
    return found


@triton.jit
def shifted(rows, o_moved, MOST: tl.constexpr, BACK: tl.constexpr):
    """A tuple of rows, MOST - 1 shorter. Without BACK entry m of row r becomes that of row r + MOST - 1 - o_moved[m],
    with it that of row r + o_moved[m]. o_moved is from 0 to MOST - 1, and MOST a power of two, 16 at most."""
    for level in tl.static_range(4):
        if MOST >> level > 1:
            rows = _shifted_by(rows, ((o_moved >> level) & 1 == 1)[:, None], 1 << level, BACK)
    return rows
