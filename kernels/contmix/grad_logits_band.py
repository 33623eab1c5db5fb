# pyright: reportGeneralTypeIssues=false

"""The first kernel of ContMix's backward pass for windows of 16-bit numbers, where nearly every output has one of its
own.

Tiles are those of ``forward_band``, logits those of ``logits_band``. The inputs that a tile sees are whole tiles,
too, as wide and high as those of outputs, the first of which begins K // 2 before the map: so p, of as many rows of
inputs as such tiles have at a time, is what value's gradient multiplies. There the rows of a window, a block each,
are moved to where its output's begin; ds = p ∘ (Σ_c grad · value − δ), where the sum is a product of the tile's
outputs and inputs; and rows of ds are moved back, to be multiplied with keys for query's gradient. As numbers outside
of windows take part, too, a value or a gradient that is not finite reaches gradients of all outputs and inputs of
tiles that see it.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Targets, Tensors, adding, launch_on, problem_of, reference_gradients
from kernels.contmix.bands import load_moved, outputs_of_block, rows_of_block
from kernels.contmix.configs import TILES, Tiles, block, grad_tiles_heuristic
from kernels.contmix.forward_band import band_arguments
from kernels.contmix.logits_band import first_entry, logits_of_rows, moved_keys, position_table, query_of_ones
from kernels.contmix.tiles import at_head, key_scale
from kernels.launch import next_power_of_2
from kernels.products import LOG2_E, dot
from kernels.registers import apart, shifted, together
from kernels.tuning import tunable
from kernels.views import at, view
from kernels.windows_triton import first_seen, load_pixels, offsets, store_pixels


@triton.jit
def _grad_logits_band_kernel(
    query,  # [B, G, Dq, H, W]
    projected,  # [B, G, Dq, K²]
    bias,  # [K²]
    rpb,  # [G, 2K-1, 2K-1]
    value,  # [B, G, Dv, H, W]
    grad,  # [B, G, Dv, H, W]
    out,  # [B, G, Dv, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    previous,  # [B, G, Dq, H, W]: a gradient of query to add to, where ADD
    grad_query,  # [B, G, Dq, H, W]: written
    weights,  # [B, G, H, W, patch]: p of inputs tile by tile, written
    grad_logits,  # [B, G, H, W, rows of a window · SEEN]: ds, written
    sizes, programs, walks,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, TILES: tl.constexpr, ACROSS: tl.constexpr, COLUMNS: tl.constexpr,
    SEEN: tl.constexpr, TABLE: tl.constexpr, BLOCK_QUERY: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """TILES tiles, ACROSS of them side by side, whose inputs are SEEN columns wide each. Rows of a window are BLOCKS
    blocks, rows of inputs PLANES, of as many as a tile has; the last of a window may have fewer."""
    _batch, groups, height, width = sizes
    OUTPUTS: tl.constexpr = 16 * TILES
    ROWS: tl.constexpr = 16 // COLUMNS
    PLANE: tl.constexpr = ROWS * SEEN
    PLANES: tl.constexpr = (KERNEL + 2 * ROWS - 2) // ROWS
    BLOCKS: tl.constexpr = (KERNEL + ROWS - 1) // ROWS
    dtype: tl.constexpr = query.ptr.dtype.element_ty
    SCALE: tl.constexpr = LOG2_E * key_scale(dtype)
    i_program = tl.program_id(0)
    i_walks = i_program % programs * walks
    i_group, i_batch = (i_program // programs % groups).to(tl.int64), (i_program // programs // groups).to(tl.int64)
    queries = at_head(query, i_batch, i_group, QUERY_CHANNELS)
    keys = at_head(projected, i_batch, i_group, QUERY_CHANNELS)
    values, outs = at_head(value, i_batch, i_group, CHANNELS), at_head(out, i_batch, i_group, CHANNELS)
    grads, targets = at_head(grad, i_batch, i_group, CHANNELS), at_head(grad_query, i_batch, i_group, QUERY_CHANNELS)
    sums = at(statistics, i_batch, i_group)
    weights, grad_logits = at(weights, i_batch, i_group), at(grad_logits, i_batch, i_group)

    keys_of_rows = ()
    for i in tl.static_range(BLOCKS):
        b_keys = moved_keys(
            keys, bias, i * ROWS, rows_of_block(KERNEL, ROWS, SEEN, i), SEEN, COLUMNS, KERNEL, QUERY_CHANNELS,
            BLOCK_QUERY, ACCUMULATOR, OFFSET, dtype,
        )  # fmt: skip
        keys_of_rows = keys_of_rows + (b_keys,)
    b_table = position_table(rpb, i_group, KERNEL, COLUMNS, TABLE, ACCUMULATOR, dtype)

    o_flat, o_input, o_plane = tl.arange(0, COLUMNS * BLOCK_QUERY), tl.arange(0, TILES * PLANE), tl.arange(0, PLANE)
    o_seen_tile, o_seen = o_input // PLANE, o_input % PLANE
    for i_walk in range(i_walks, i_walks + walks):
        row, column, outputs = outputs_of_block(i_walk, height, width, KERNEL, TILES, ACROSS, COLUMNS)
        down = outputs.start_h - first_seen(outputs.row, height, KERNEL, ROWS)
        right = outputs.start_w - first_seen(outputs.column, width, KERNEL, COLUMNS)
        seen_row = tl.minimum(row + o_seen_tile // ACROSS * ROWS, height - 1)
        seen_column = tl.minimum(column + o_seen_tile % ACROSS * COLUMNS, width - 1)
        seen_h = first_seen(seen_row, height, KERNEL, ROWS) + o_seen // SEEN
        seen_w = first_seen(seen_column, width, KERNEL, COLUMNS) + o_seen % SEEN
        m_seen = (o_seen % SEEN < KERNEL + COLUMNS - 1) & (seen_w >= 0) & (seen_w < width)
        # [M, COLUMNS · Dq]
        o_query = offsets(queries, outputs, OFFSET)
        b_query = load_moved(queries, o_query, outputs.mask | True, right, QUERY_CHANNELS, COLUMNS, BLOCK_QUERY)
        # [M, Dv]; outputs that are not there have no gradient
        b_grad = load_pixels(grads, offsets(grads, outputs, OFFSET), outputs.mask, CHANNELS, BLOCK_CHANNELS)
        b_out = load_pixels(outs, offsets(outs, outputs, OFFSET), outputs.mask, CHANNELS, BLOCK_CHANNELS)
        b_delta = tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), 1)
        b_statistics = tl.load(sums.ptr + offsets(statistics, outputs, OFFSET)) * LOG2_E
        if ADD:
            added = at_head(previous, i_batch, i_group, QUERY_CHANNELS)
            b_added = load_pixels(added, offsets(added, outputs, OFFSET), outputs.mask, QUERY_CHANNELS, BLOCK_QUERY)
        b_one, o_base = query_of_ones(right, dtype), first_entry(outputs, right, KERNEL, COLUMNS)

        o_row = outputs.row.to(OFFSET)
        o_stored = o_row * weights.h + outputs.column.to(OFFSET) * weights.w
        p_weight = weights.ptr + o_stored[:, None] + o_plane[None, :]
        o_stored = o_row * grad_logits.h + outputs.column.to(OFFSET) * grad_logits.w
        p_logits = grad_logits.ptr + o_stored[:, None]
        b_nothing = tl.zeros([OUTPUTS, SEEN], ACCUMULATOR)
        rows, products = (), ()
        for _ in tl.static_range(ROWS - 1):
            rows = rows + (b_nothing,)
        b_sum = tl.zeros([OUTPUTS, COLUMNS * BLOCK_QUERY], ACCUMULATOR)
        for i in tl.static_range(PLANES):
            if i < BLOCKS:
                b_logits = logits_of_rows(
                    b_query, b_one, keys_of_rows[i], b_table, o_base, i * ROWS, rows_of_block(KERNEL, ROWS, SEEN, i),
                    SEEN, KERNEL, UPCAST,
                )  # fmt: skip
                rows = rows + apart(
                    tl.exp2(b_logits * SCALE - b_statistics[:, None]), rows_of_block(KERNEL, ROWS, SEEN, i)
                )
            for _ in tl.static_range((i + 2) * ROWS - 1 - len(rows)):
                rows = rows + (b_nothing,)
            b_products = tl.zeros([TILES, 16, PLANE], ACCUMULATOR) - tl.reshape(b_delta, [TILES, 16, 1])
            o_h = seen_h + i * ROWS
            o_value = o_h.to(OFFSET) * values.h + seen_w.to(OFFSET) * values.w
            b_value = load_pixels(values, o_value, m_seen & (o_h >= 0) & (o_h < height), CHANNELS, BLOCK_CHANNELS)
            b_value = tl.permute(tl.reshape(b_value, [TILES, PLANE, BLOCK_CHANNELS]), [0, 2, 1])
            b_products = dot(tl.reshape(b_grad, [TILES, 16, BLOCK_CHANNELS]), b_value, b_products, UPCAST)
            b_weight = together(shifted(rows[i * ROWS : i * ROWS + 2 * ROWS - 1], down, ROWS, False))
            products = products + apart(tl.reshape(b_products, [OUTPUTS, PLANE]) * b_weight, ROWS)
            # Inputs of a plane tile by tile
            b_weight = tl.reshape(b_weight, [OUTPUTS, ROWS, SEEN // COLUMNS, COLUMNS])
            b_weight = tl.reshape(tl.permute(b_weight, [0, 2, 1, 3]), [OUTPUTS, PLANE])
            tl.store(p_weight + i * PLANE, b_weight.to(dtype), mask=outputs.mask[:, None])
            if i == PLANES - 1 and KERNEL % ROWS == 1:
                for _ in tl.static_range(rows_of_block(KERNEL, ROWS, SEEN, BLOCKS - 1) - 1):
                    products = products + (b_nothing,)
            for j in tl.static_range(BLOCKS):
                if i == min(j + 1, PLANES - 1):
                    b_rows = products[j * ROWS : j * ROWS + rows_of_block(KERNEL, ROWS, SEEN, j) + ROWS - 1]
                    b_grad_logits = together(shifted(b_rows, down, ROWS, True)).to(dtype)
                    o_step = j * PLANE + tl.arange(0, b_grad_logits.shape[1])
                    tl.store(p_logits + o_step[None, :], b_grad_logits, mask=outputs.mask[:, None])
                    b_sum = dot(b_grad_logits, keys_of_rows[j][0], b_sum, UPCAST)
        # Of an output's part alone
        b_sum = tl.where(right[:, None] == (o_flat // BLOCK_QUERY)[None, :], b_sum, 0.0)
        b_sum = tl.sum(tl.reshape(b_sum, [OUTPUTS, COLUMNS, BLOCK_QUERY]), 1) * key_scale(dtype)
        if ADD:
            b_sum += b_added
        store_pixels(targets, offsets(targets, outputs, OFFSET), outputs.mask, b_sum, QUERY_CHANNELS)


@tunable(
    TILES,
    grad_tiles_heuristic,
    problem=problem_of,
    reference=lambda tensors, targets, *_: reference_gradients(tensors, targets)[0],
    name="contmix.band.grad_logits",
)
def grad_logits_band(
    tensors: Tensors, targets: Targets, weights: Tensor, grad_logits: Tensor, *, config: Tiles
) -> Tensor:
    """Fills p [B, G, H, W, patch], ds [B, G, H, W, rows of a window · SEEN], and the gradient of query."""
    arguments, programs = band_arguments(tensors, config)
    seen, columns, kernel_size = arguments["SEEN"], arguments["COLUMNS"], tensors.kernel_size
    arguments |= {
        **adding(targets),
        "weights": view(weights, "b g h w k"),
        "grad_logits": view(grad_logits, "b g h w k"),
        "TABLE": next_power_of_2((2 * kernel_size + 6) * (2 * kernel_size - 1) + seen + columns),
        "BLOCK_CHANNELS": block(tensors.value.shape[2]),
    }
    launch_on(tensors, _grad_logits_band_kernel, programs, **arguments)
    return targets.query
