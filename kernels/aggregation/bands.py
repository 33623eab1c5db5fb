# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
"""correlate for windows of up to 7 x 7 without a stride, of 16-bit numbers: matrix products.

A tile is 8 x 2 outputs, which see 14 x 8 inputs of 7 x 7 windows. The product of their channels is a band, of which an
output needs what its own window sees: by its row in the tile whole rows of the band are moved, by its column single
numbers. An odd number of taps does not fill words of 32 bits, but those of two groups do: a warp stores 128 bytes in a
row, where rows that slide over registers (``correlate``) store one column of a window, 14 bytes, at a time.

A value that is not finite reaches the taps that it is in, and no others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aggregation.tiles import pitch
from kernels.dtypes import precision, upcast
from kernels.launch import ceil_divide, launch
from kernels.layout import empty_kernel_layout, image_last
from kernels.products import dot
from kernels.registers import apart, shifted, stack, together, unstack
from kernels.views import View, view
from kernels.windows import Window

ROWS, COLUMNS = 8, 2  # of a tile
PROGRAMS = 2048  # that keep a GPU busy; where there would be more, each goes down several tiles


@triton.jit
def _bands_kernel(
    g,  # [B, G, C, height, width]
    x,  # [B, G, C, x_height, x_width]
    out,  # [B, G, Kh, Kw, height, width], groups and taps fastest; its strides count words of 32 bits
    groups, x_height, x_width, height, width, row_blocks, walks,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Two pairs of groups, in ``walks`` tiles one below the other."""
    KERNEL_H: tl.constexpr = WINDOW.kernel_size[0]
    KERNEL_W: tl.constexpr = WINDOW.kernel_size[1]
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    SEEN_H: tl.constexpr = pitch(ROWS + KERNEL_H - 1)
    SEEN_W: tl.constexpr = pitch(COLUMNS + KERNEL_W - 1)
    dtype: tl.constexpr = g.ptr.dtype.element_ty
    i_group, i_rest = tl.program_id(0) % (groups // 4) * 4, tl.program_id(0) // (groups // 4)
    column_blocks = tl.cdiv(width, COLUMNS)
    left, i_rest = i_rest % column_blocks * COLUMNS, i_rest // column_blocks
    i_walks, i_batch = i_rest % row_blocks * walks, (i_rest // row_blocks).to(tl.int64)

    # The tile's outputs [16], for each pair [32], and the inputs that they see [J]
    o_output, o_seen = tl.arange(0, 16), tl.arange(0, SEEN_H * SEEN_W)
    o_row, o_column = o_output // COLUMNS, left + o_output % COLUMNS
    o_seen_row, o_seen_column = o_seen // SEEN_W, left - WINDOW.padding[1] + o_seen % SEEN_W
    m_seen = (o_seen_row < ROWS + KERNEL_H - 1) & (o_seen_column >= 0) & (o_seen_column < x_width)
    o_entry, o_word = tl.arange(0, 32), tl.arange(0, pitch(TAPS))[None, :]
    o_entry_row, o_entry_column = o_entry % 16 // COLUMNS, left + o_entry % COLUMNS
    # Channels of the first group of each pair
    o_channel = tl.arange(0, 2 * CHANNELS)[None, :]
    o_channel = (i_group + o_channel // CHANNELS * 2) * CHANNELS + o_channel % CHANNELS
    p_g = g.ptr + i_batch * g.b + o_channel
    p_x = x.ptr + i_batch * x.b + o_channel
    p_out = out.ptr.to(tl.pointer_type(tl.int32), bitcast=True) + i_batch * out.b + o_word
    p_out += (o_entry_column.to(OFFSET) * out.w + (i_group // 2 + o_entry // 16) * TAPS)[:, None]
    for i_walk in tl.range(i_walks, i_walks + walks, disable_licm=True):
        o_g_row, o_x_row = i_walk * ROWS + o_row, i_walk * ROWS + o_seen_row - WINDOW.padding[0]
        m_g = ((o_g_row < height) & (o_column < width))[:, None]
        m_x = (m_seen & (o_x_row >= 0) & (o_x_row < x_height))[:, None]
        o_g = (o_g_row.to(OFFSET) * g.h + o_column.to(OFFSET) * g.w)[:, None]
        o_x = (o_x_row.to(OFFSET) * x.h + o_seen_column.to(OFFSET) * x.w)[:, None]
        taps = ()
        for i_of_pair in tl.static_range(2):
            # [2, 16, C], [2, C, J]
            b_g = tl.load(p_g + o_g + i_of_pair * CHANNELS, mask=m_g, other=0)
            b_x = tl.load(p_x + o_x + i_of_pair * CHANNELS, mask=m_x, other=0)
            b_g = tl.permute(tl.reshape(b_g, [16, 2, CHANNELS]), [1, 0, 2])
            b_x = tl.permute(tl.reshape(b_x, [SEEN_H * SEEN_W, 2, CHANNELS]), [1, 2, 0])
            b_band = dot(b_g, b_x, tl.zeros([2, 16, SEEN_H * SEEN_W], ACCUMULATOR), UPCAST)
            rows = apart(tl.reshape(b_band, [32, SEEN_H * SEEN_W]), SEEN_H)[: ROWS + KERNEL_H - 1]
            rows = shifted(rows, o_entry_row, ROWS, True)
            rows = rows + (rows[0],) * (pitch(KERNEL_H) - KERNEL_H)
            seen = unstack(together(rows).to(dtype).to(tl.uint16, bitcast=True))
            for kh in tl.static_range(KERNEL_H):
                for i in tl.static_range(kh * SEEN_W, kh * SEEN_W + KERNEL_W):
                    taps = taps + (tl.where((o_entry % COLUMNS == 0)[:, None], seen[i], seen[i + 1]).to(tl.int32),)
        words = ()
        for i in tl.static_range(TAPS):
            words = words + (taps[2 * i] | (taps[2 * i + 1] << 16),)
        # The sum has one term. Past it Triton moves whole rows to where they are stored, not words one by one.
        b_words = tl.trans(stack(words + (words[0],) * (pitch(TAPS) - TAPS)))
        b_words = tl.trans(tl.sum(tl.reshape(b_words, [pitch(TAPS), 32, 1]), 2))
        o_row_out = i_walk * ROWS + o_entry_row
        m_out = ((o_row_out < height) & (o_entry_column < width))[:, None] & (o_word < TAPS)
        tl.store(p_out + (o_row_out.to(OFFSET) * out.h)[:, None], b_words, mask=m_out)


def fits(g: Tensor, x: Tensor, window: Window) -> bool:
    """Whether there are such windows and numbers, and the channels of a pixel's groups follow each other."""
    channels = g.shape[2]
    return (
        window.stride == window.dilation == (1, 1)
        and max(window.kernel_size) <= 7
        and g.dtype in (torch.float16, torch.bfloat16)
        and g.shape[1] % 4 == 0
        and channels in (16, 32)
        and image_last(g)  # not where all pixels are one, as in the gradient of a sum over them
        and all(
            m.stride(2) == 1
            and m.stride(1) == channels
            and not any(number % 16 for number in (m.stride(0), *m.stride()[3:], m.data_ptr()))
            for m in (g, x)
        )
    )


def correlate(g: Tensor, x: Tensor, window: Window) -> Tensor:
    """out[b,g,k,i] = Σ_c g[b,g,c,i] · x[b,g,c,nbr(i,k)]; [B,G,Kh,Kw,H',W'] in the memory order of g."""
    out = empty_kernel_layout(g, window.kernel_size)
    if out.numel() == 0:
        return out
    batch, groups, channels, height, width = g.shape
    columns = batch * groups // 4 * ceil_divide(width, COLUMNS)
    tiles = ceil_divide(height, ROWS)
    walks = ceil_divide(tiles, min(tiles, ceil_divide(PROGRAMS, columns)))
    row_blocks = ceil_divide(tiles, walks)
    arguments = {
        "g": view(g, "b g c h w"), "x": view(x, "b g c h w"),
        "out": View(out, b=out.stride(0) // 2, h=out.stride(4) // 2, w=out.stride(5) // 2),
        "groups": groups, "x_height": x.shape[3], "x_width": x.shape[4], "height": height, "width": width,
        "row_blocks": row_blocks, "walks": walks, "WINDOW": window, "ROWS": ROWS, "COLUMNS": COLUMNS,
        "CHANNELS": channels, **precision(g, x, out), "UPCAST": upcast(g.dtype),
    }  # fmt: skip
    # One program per (four groups, column of tiles, block of its rows, image), fastest first.
    launch(_bands_kernel, (columns * row_blocks,), g.device, arguments, num_warps=1, num_stages=2)
    return out
