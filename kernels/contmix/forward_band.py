"""ContMix's forward pass for large windows of 16-bit numbers, where nearly every output has a window of its own.

A tile is 16 outputs, COLUMNS of them side by side. Together they see hardly more inputs than one of them does, and all
sums are matrix products over the tile's outputs and inputs:

- *Logits* come in the columns of the tile's inputs, from ``logits_band``.
- *Weights* of a row of the windows are a block. Those of an output whose window begins y rows below the tile's first
  move y blocks on, and the blocks side by side are a banded matrix.
- *Values* are multiplied with that matrix, once for all outputs of the tile. Tiles side by side share a table of what
  they see, pairs of adjacent columns, from which each gathers its own in the order of a product's operand.

A program keeps the keys of its head and walks over blocks of tiles. As the band's zeros are multiplied too, a value
that is not finite reaches all outputs of a tile that sees it.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Tensors, launch_on, problem_of, reference_forward
from kernels.contmix.bands import (
    as_left_side,
    as_right_side,
    largest,
    load_moved,
    lost,
    moved,
    outputs_of_block,
    packed,
    seen_by_tile,
)
from kernels.contmix.configs import TILES, Tiles, block, tile_of, tiles_heuristic
from kernels.contmix.logits_band import first_entry, logits_of_rows, moved_keys, position_table, query_of_ones
from kernels.contmix.tiles import at_head, key_scale
from kernels.launch import ceil_divide, next_power_of_2
from kernels.products import LOG2_E, dot
from kernels.registers import apart
from kernels.tuning import tunable
from kernels.views import at
from kernels.windows_triton import offsets, store_pixels


@triton.jit
def load_pairs(
    values, o_h, o_w, height, stop_w, ROW: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """A table of inputs [P · C]: of row ROW after ``o_h`` [P] those of column ``o_w`` [P] and of the next as one number
    of 32 bits. The first four channels of every eight come before the others, and of both some side by side, so that a
    warp's threads store to and gather from different banks of shared memory."""
    o_channel = tl.arange(0, BLOCK)[None, :]
    o_input = (o_h + ROW).to(OFFSET) * values.h + o_w.to(OFFSET) * values.w
    p_even = values.ptr + o_input[:, None] + o_channel.to(OFFSET) * values.c
    m_input = (o_h + ROW < height)[:, None] & (o_channel < CHANNELS)
    m_even, m_odd = (o_w >= 0) & (o_w < stop_w), (o_w >= -1) & (o_w < stop_w - 1)
    b_even = tl.load(p_even, mask=m_input & m_even[:, None], other=0)
    b_odd = tl.load(p_even + values.w, mask=m_input & m_odd[:, None], other=0)
    b_even, b_odd = b_even.to(tl.uint16, bitcast=True).to(tl.int32), b_odd.to(tl.uint16, bitcast=True).to(tl.int32)
    EIGHTS: tl.constexpr = max(min(8, BLOCK // 2), BLOCK // 4) // 4
    b_pairs = tl.reshape(b_even | (b_odd << 16), [o_h.shape[0], BLOCK // 8 // EIGHTS, EIGHTS, 2, 4])
    return tl.reshape(tl.permute(b_pairs, [3, 1, 0, 2, 4]), [o_h.shape[0] * BLOCK])


@triton.jit
def entries_of_tiles(
    row, column, height, width, KERNEL: tl.constexpr, TILES: tl.constexpr, ACROSS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARED: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where in such a table the pairs that tiles see are [TILES · STEP · SEEN / 2 · C], in the order of a right side
    that ``as_left_side`` fits. The table has STEP rows of WIDE inputs for every SHARED tiles."""
    PAIRS: tl.constexpr = STEP * SEEN // 2
    TABLE: tl.constexpr = STEP * (TILES // SHARED) * (WIDE // 2)
    NEAR: tl.constexpr = max(min(8, BLOCK // 2), BLOCK // 4)
    o_entry = tl.arange(0, TILES * PAIRS * BLOCK)
    o_tile, o_pair, o_channel = o_entry // BLOCK // PAIRS, o_entry // BLOCK % PAIRS, o_entry % BLOCK
    o_pair = o_pair // 8 * 8 + o_pair % 2 * 4 + o_pair % 8 // 2
    _, tile_w = seen_by_tile(o_tile, row, column, height, width, KERNEL, ACROSS, COLUMNS)
    _, first_w = seen_by_tile(o_tile // SHARED * SHARED, row, column, height, width, KERNEL, ACROSS, COLUMNS)
    o_row = o_pair // (SEEN // 2) * (TILES // SHARED) + o_tile // SHARED
    o_pair = o_row * (WIDE // 2) + o_pair % (SEEN // 2) + (tile_w - first_w) // 2
    return (o_channel // NEAR * TABLE + o_pair) * NEAR + o_channel % NEAR


@triton.jit
def _forward_band_kernel(
    query,  # [B, G, Dq, H, W]
    projected,  # [B, G, Dq, K²]
    bias,  # [K²]
    rpb,  # [G, 2K-1, 2K-1]
    value,  # [B, G, Dv, H, W]
    out,  # [B, G, Dv, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    sizes, programs, walks,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, TILES: tl.constexpr, ACROSS: tl.constexpr, COLUMNS: tl.constexpr,
    SEEN: tl.constexpr, SHARED: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """TILES tiles, ACROSS of them side by side, whose inputs are SEEN columns wide each, those of SHARED tiles WIDE.
    The rows of a window, and one more where a row is shorter than the 16 numbers of a product, come in blocks of 8, 4,
    2 and 1, the powers of two whose sum they are; STEP rows of inputs are one product."""
    _batch, groups, height, width = sizes
    OUTPUTS: tl.constexpr = 16 * TILES
    ROWS: tl.constexpr = 16 // COLUMNS
    WINDOW: tl.constexpr = KERNEL if SEEN == 16 else KERNEL + 1
    dtype: tl.constexpr = query.ptr.dtype.element_ty
    SCALE: tl.constexpr = LOG2_E * key_scale(dtype)
    i_program = tl.program_id(0)
    i_walks = i_program % programs * walks
    i_group, i_batch = (i_program // programs % groups).to(tl.int64), (i_program // programs // groups).to(tl.int64)
    queries = at_head(query, i_batch, i_group, QUERY_CHANNELS)
    keys = at_head(projected, i_batch, i_group, QUERY_CHANNELS)
    values = at_head(value, i_batch, i_group, CHANNELS)

    keys_of_rows = ()
    for level in tl.static_range(4):
        if WINDOW & (8 >> level):
            i_row = WINDOW // (16 >> level) * (16 >> level)
            b_keys = moved_keys(
                keys, bias, i_row, 8 >> level, SEEN, COLUMNS, KERNEL, QUERY_CHANNELS, BLOCK_QUERY, ACCUMULATOR, OFFSET,
                dtype,
            )  # fmt: skip
            keys_of_rows = keys_of_rows + (b_keys,)
    b_table = position_table(rpb, i_group, KERNEL, COLUMNS, TABLE, ACCUMULATOR, dtype)

    PARTS: tl.constexpr = TILES // SHARED
    STEPS: tl.constexpr = (KERNEL + ROWS - 2 + STEP) // STEP
    # Values are on their way early where a thread has registers for them, 48 at most.
    EARLY: tl.constexpr = STEPS * STEP * PARTS * WIDE * BLOCK_CHANNELS <= 3072 * TILES
    o_tile, o_pair = tl.arange(0, OUTPUTS) // 16, tl.arange(0, STEP * PARTS * (WIDE // 2))
    o_part, o_pair = o_pair // (WIDE // 2), o_pair % (WIDE // 2)
    for i_walk in tl.range(i_walks, i_walks + walks, disable_licm=True):
        row, column, outputs = outputs_of_block(i_walk, height, width, KERNEL, TILES, ACROSS, COLUMNS)
        tile_h, tile_w = seen_by_tile(o_tile, row, column, height, width, KERNEL, ACROSS, COLUMNS)
        down, right = outputs.start_h - tile_h, outputs.start_w - tile_w
        o_first = o_part % PARTS * SHARED
        seen_h, seen_w = seen_by_tile(o_first, row, column, height, width, KERNEL, ACROSS, COLUMNS)
        _, stop_w = seen_by_tile(o_first + SHARED - 1, row, column, height, width, KERNEL, ACROSS, COLUMNS)
        stop_w = tl.minimum(stop_w + KERNEL + COLUMNS - 1, width)
        inputs, tables = (seen_h + o_part // PARTS, seen_w + 2 * o_pair, height, stop_w), ()
        for i in tl.static_range(STEPS if EARLY else 0):
            tables = tables + (load_pairs(values, *inputs, i * STEP, CHANNELS, BLOCK_CHANNELS, OFFSET),)
        # [M, COLUMNS · Dq]
        o_query = offsets(queries, outputs, OFFSET)
        b_query = load_moved(queries, o_query, outputs.mask | True, right, QUERY_CHANNELS, COLUMNS, BLOCK_QUERY)
        b_one, o_base = query_of_ones(right, dtype), first_entry(outputs, right, KERNEL, COLUMNS)

        blocks, logits = (), ()
        for level in tl.static_range(4):
            if WINDOW & (8 >> level):
                i_row = WINDOW // (16 >> level) * (16 >> level)
                keys_of = keys_of_rows[len(blocks)]
                b_logits = logits_of_rows(
                    b_query, b_one, keys_of, b_table, o_base, i_row, 8 >> level, SEEN, KERNEL, UPCAST
                )
                blocks, logits = blocks + (b_logits,), logits + apart(b_logits, 8 >> level)
        b_max, b_total = tl.full([OUTPUTS, SEEN], float("-inf"), ACCUMULATOR), tl.zeros([OUTPUTS, SEEN], ACCUMULATOR)
        for i in tl.static_range(KERNEL):
            b_max = tl.maximum(b_max, logits[i])
        b_max = tl.max(b_max, axis=1) * SCALE - largest(dtype)
        rows = ()
        for i in tl.static_range(KERNEL):
            b_weight = tl.exp2(logits[i] * SCALE - b_max[:, None])
            b_total += b_weight
            rows = rows + (packed(b_weight, dtype),)
        rows = moved(rows, down, ROWS)
        for _ in tl.static_range(-len(rows) % STEP):
            rows = rows + (tl.zeros_like(rows[0]),)

        o_entry = entries_of_tiles(
            row, column, height, width, KERNEL, TILES, ACROSS, COLUMNS, SHARED, SEEN, WIDE, STEP, BLOCK_CHANNELS
        )
        b_sum = tl.zeros([TILES, 16, BLOCK_CHANNELS], ACCUMULATOR)
        for i in tl.static_range(STEPS):
            b_pairs = tables[i] if EARLY else load_pairs(values, *inputs, i * STEP, CHANNELS, BLOCK_CHANNELS, OFFSET)
            b_weight = tl.reshape(as_left_side(rows[i * STEP : i * STEP + STEP], dtype), [TILES, 16, STEP * SEEN])
            b_pairs = tl.reshape(tl.gather(b_pairs, o_entry, 0), [TILES, STEP * SEEN // 2, BLOCK_CHANNELS])
            b_sum = dot(b_weight, as_right_side(b_pairs, dtype), b_sum, UPCAST)
        b_sum = tl.permute(tl.reshape(b_sum, [OUTPUTS, 2, BLOCK_CHANNELS // 8, 4]), [0, 2, 1, 3])
        b_total = tl.log2(tl.sum(b_total, 1))
        b_sum = tl.reshape(b_sum, [OUTPUTS, BLOCK_CHANNELS]) * tl.exp2(lost(dtype) - b_total)[:, None]
        outs, sums = at_head(out, i_batch, i_group, CHANNELS), at(statistics, i_batch, i_group)
        store_pixels(outs, offsets(outs, outputs, OFFSET), outputs.mask, b_sum, CHANNELS)
        tl.store(sums.ptr + offsets(statistics, outputs, OFFSET), (b_max + b_total) / LOG2_E, mask=outputs.mask)


def band_arguments(tensors: Tensors, config: Tiles) -> tuple[dict[str, Any], int]:
    """What the kernels of bands take, and their programs: one per (blocks that it walks over, group,
    batch entry), such that the last of the rounds in which they run ends early. To begin takes as long as a block."""
    batch, groups, height, width = tensors.sizes
    seen, tile_columns = tile_of(problem_of(tensors))
    blocks, _, columns = config.block_of(tile_columns, height, width)
    images = groups * batch
    walks = min(
        range(1, blocks + 1),
        key=lambda walks: (ceil_divide(images * ceil_divide(blocks, walks), config.programs) * (walks + 1), -walks),
    )
    programs = ceil_divide(blocks, walks)
    arguments = {
        "programs": programs, "walks": walks,
        "TILES": config.tiles, "ACROSS": columns // tile_columns, "COLUMNS": tile_columns, "SEEN": seen,
        "BLOCK_QUERY": max(8, next_power_of_2(tensors.query.shape[2])),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    return arguments, programs * images


@tunable(TILES, tiles_heuristic, problem=problem_of, reference=reference_forward, name="contmix.band")
def forward_band(tensors: Tensors, *, config: Tiles) -> Tensor:
    """Fills ``out`` and ``statistics``."""
    channels = tensors.value.shape[2]
    arguments, programs = band_arguments(tensors, config)
    seen, columns, side = arguments["SEEN"], arguments["COLUMNS"], 2 * tensors.kernel_size - 1
    # Those of tiles of one column do not begin an even number of columns apart.
    shared = arguments["ACROSS"] if columns > 1 else 1
    arguments |= {
        "SHARED": shared,
        "WIDE": next_power_of_2((shared - 1) * columns + seen),
        "STEP": min(64, 2048 // block(channels)) // seen,
        "TABLE": next_power_of_2((side + 1) * side + seen + columns),
        "BLOCK_CHANNELS": max(8, next_power_of_2(channels)),
        "most_registers": config.most_registers,
    }
    launch_on(tensors, _forward_band_kernel, programs, **arguments)
    return tensors.out
