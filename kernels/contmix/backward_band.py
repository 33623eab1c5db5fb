"""ContMix's backward pass of bands, some heads of some images at a time.

The first kernel, in ``grad_logits_band``, makes softmax weights p again, and the logits' gradients ds = p ∘ (Σ_c grad ·
value − δ), δ = Σ_c grad · out; it ends query's gradient and stores p and ds. From these come the other gradients here:
value's, a sum over the outputs that see an input; projected keys' as a product; bias' and rpb's, sums over what shares
their entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Targets, Tensors, launch_on, problem_of
from kernels.contmix.bands import load_moved, rows_of_block
from kernels.contmix.configs import Problem, block, tile_of
from kernels.contmix.grad_logits_band import grad_logits_band
from kernels.contmix.parts import by_parts
from kernels.contmix.tiles import at_head
from kernels.launch import ceil_divide, next_power_of_2
from kernels.neighborhood.tables import fold
from kernels.products import dot
from kernels.sum_rows import sum_rows
from kernels.views import at, view
from kernels.windows_triton import first_block, first_seen, store_pixels, window_start

# Where programs have fewer window positions, 256 for each of a GPU's processors, several share the rows of a map.
LEAST_POSITIONS = 132 * 256
# Of a map of fewer pixels, whose rows are mostly border, ds is summed over images instead of rows.
SMALL_MAP = 1000
# Tiles of inputs side by side that a program takes.
INPUTS: tl.constexpr = tl.constexpr(4)


@triton.jit
def _tiles_seeing(i_first, i_last, length, KERNEL: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr):
    """(first, last) of the tiles of outputs whose patches of BLOCKS blocks hold any of some blocks of inputs."""
    first = tl.where(i_first - BLOCKS < KERNEL // 2 // TILE, 0, i_first - BLOCKS + 1)
    last = tl.where(i_last < (length - KERNEL + KERNEL // 2) // TILE, i_last, (length - 1) // TILE)
    return first, last


@triton.jit
def _grad_value_band_kernel(
    weights,  # [B, G, H, W, patch]: p of inputs tile by tile
    grad,  # [B, G, Dv, H, W]
    grad_value,  # [B, G, Dv, H, W]: written
    sizes, blocks,
    KERNEL: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, SEEN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program takes INPUTS tiles of inputs side by side, and the tiles of outputs that see them OUTPUTS at a time."""
    _batch, groups, height, width = sizes
    ROWS: tl.constexpr = 16 // COLUMNS
    PLANE: tl.constexpr = ROWS * SEEN
    WIDE: tl.constexpr = OUTPUTS * COLUMNS
    i_program = tl.program_id(0)
    i_block, i_image = i_program % blocks, i_program // blocks
    i_group, i_batch = (i_image % groups).to(tl.int64), (i_image // groups).to(tl.int64)
    blocks_w = (width - 1 + KERNEL // 2) // (INPUTS * COLUMNS) + 1
    i_row, i_column = i_block // blocks_w, i_block % blocks_w * INPUTS
    first_h, last_h = _tiles_seeing(i_row, i_row, height, KERNEL, ROWS, (KERNEL + 2 * ROWS - 2) // ROWS)
    first_w, last_w = _tiles_seeing(i_column, i_column + INPUTS - 1, width, KERNEL, COLUMNS, SEEN // COLUMNS)
    steps_w = (last_w - first_w) // OUTPUTS + 1
    weights, grads = at(weights, i_batch, i_group), at_head(grad, i_batch, i_group, CHANNELS)
    o_input, o_output, o_channel = tl.arange(0, 16 * INPUTS), tl.arange(0, 16 * OUTPUTS), tl.arange(0, BLOCK_CHANNELS)
    o_down, o_right = o_output // WIDE, o_output % WIDE
    o_weight = o_down.to(OFFSET) * weights.h + o_right.to(OFFSET) * weights.w
    o_grad = (o_down.to(OFFSET) * grads.h + o_right.to(OFFSET) * grads.w)[:, None]
    o_grad += (o_channel.to(OFFSET) * grads.c)[None, :]
    m_channel = (o_channel < CHANNELS)[None, :]
    b_sum = tl.zeros([16 * INPUTS, BLOCK_CHANNELS], ACCUMULATOR)
    for i_step in range((last_h - first_h + 1) * steps_w):
        i_tile_h, i_tile_w = first_h + i_step // steps_w, first_w + i_step % steps_w * OUTPUTS
        row, column = i_tile_h * ROWS, i_tile_w * COLUMNS
        m_output = (o_down < height - row) & (o_right < width - column)
        # Where in a plane of an output the program's inputs begin, tile by tile
        o_plane = (i_column - first_block(i_tile_w + o_right // COLUMNS, width, KERNEL, COLUMNS)) * 16
        o_inside = o_plane[:, None] + o_input[None, :]
        i_weight = tl.cast(row, OFFSET) * weights.h + tl.cast(column, OFFSET) * weights.w
        i_weight += (i_row - first_block(i_tile_h, height, KERNEL, ROWS)) * PLANE
        p_weight = weights.ptr + i_weight + o_weight[:, None] + o_inside
        m_weight = m_output[:, None] & (o_inside.to(tl.uint32, bitcast=True) < PLANE)
        b_weight = tl.load(p_weight, mask=m_weight, other=0)
        p_grad = grads.ptr + tl.cast(row, OFFSET) * grads.h + tl.cast(column, OFFSET) * grads.w + o_grad
        b_grad = tl.load(p_grad, mask=m_output[:, None] & m_channel, other=0)
        b_sum = dot(tl.trans(b_weight), b_grad, b_sum, UPCAST)
    # Inputs of a tile row by row
    o_row = i_row * ROWS - KERNEL // 2 + o_input % 16 // COLUMNS
    o_column = (i_column + o_input // 16) * COLUMNS - KERNEL // 2 + o_input % COLUMNS
    m_input = (o_row >= 0) & (o_row < height) & (o_column >= 0) & (o_column < width)
    target = at_head(grad_value, i_batch, i_group, CHANNELS)
    o_target = o_row.to(OFFSET) * target.h + o_column.to(OFFSET) * target.w
    store_pixels(target, o_target, m_input, b_sum, CHANNELS)


def _grad_value_band(tensors: Tensors, grad_value: Tensor, weights: Tensor) -> None:
    """Fills ``grad_value``."""
    batch, groups, height, width = tensors.sizes
    (seen, columns), half = tile_of(problem_of(tensors)), tensors.kernel_size // 2
    blocks = ceil_divide(height + half, 16 // columns) * ceil_divide(width + half, 4 * columns)
    # One program per (block of inputs, group, batch entry).
    launch_on(
        tensors, _grad_value_band_kernel, blocks * groups * batch,
        weights=view(weights, "b g h w k"), grad_value=view(grad_value, "b g c h w"), blocks=blocks,
        OUTPUTS=8 if half < 4 else 4, COLUMNS=columns, SEEN=seen, BLOCK_CHANNELS=block(tensors.value.shape[2]),
        num_warps=4, num_stages=2 if half < 4 else 3,
    )  # fmt: skip


@triton.jit
def _grad_parameters_band_kernel(
    query,  # [B, G, Dq, H, W]
    grad_logits,  # [B, G, H, W, S]: ds
    grad_projected,  # [N, B, G, Dq, K²]: written; N along the axis h
    sums,  # [B, G, classes, SEEN, S]: ds summed over outputs of a class and of a column in what they see
    totals,  # [B, G, classes, COLUMNS, S]: ds summed over outputs whose windows begin at a column of it
    sizes, parts, chunks, chunk,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_QUERY: tl.constexpr, COLUMNS: tl.constexpr, SEEN: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr, STORED: tl.constexpr, POSITIONS: tl.constexpr, BORDER: tl.constexpr,
    LOG_WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of outputs come in classes: BORDER from either border are each one of its own, and between them each
    ``chunk`` rows are. A program walks over all classes, or over one of N parts: those above, one chunk, those below.

    All sums are products with ds: of queries, each in the channels of the column where its window begins, and of ones,
    each at the output's column and at that one.
    """
    OUTPUTS: tl.constexpr = tl.constexpr(64)
    BLOCKS: tl.constexpr = (STORED + POSITIONS - 1) // POSITIONS
    batch, groups, height, width = sizes
    i_block, i_image = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    i_group, i_sum = (i_image % groups).to(tl.int64), (i_image // groups).to(tl.int64)
    i_batch, i_part = i_sum % batch, i_sum // batch
    queries, logits = at(query, i_batch, i_group), at(grad_logits, i_batch, i_group)
    sums, totals = at(sums, i_batch, i_group), at(totals, i_batch, i_group)
    o_stored, o_output = i_block * POSITIONS + tl.arange(0, POSITIONS), tl.arange(0, OUTPUTS)
    o_entry, m_stored = tl.arange(0, BLOCK_ENTRIES), o_stored < STORED
    # [S, SEEN + COLUMNS]: totals of windows that begin x columns into what is stored lie x entries to the left.
    o_total = tl.maximum(o_entry - SEEN, 0)
    m_sum = m_stored[:, None] & (o_entry < SEEN)[None, :]
    m_total = m_stored[:, None] & ((o_entry >= SEEN) & (o_entry < SEEN + COLUMNS))[None, :]
    m_total &= o_stored[:, None] >= o_total[None, :]
    begin = tl.where(i_part == 0, 0, BORDER - 1 + i_part.to(tl.int32))
    end = tl.where(i_part == parts - 1, 2 * BORDER + chunks, BORDER + i_part.to(tl.int32))
    b_projected = tl.zeros([POSITIONS, COLUMNS * BLOCK_QUERY], ACCUMULATOR)
    for i_class in range(begin, end):
        i_chunk = i_class - BORDER
        is_chunk = (i_chunk >= 0) & (i_chunk < chunks)
        begin_row = tl.where(is_chunk, BORDER + i_chunk * chunk, height - BORDER + i_chunk - chunks)
        begin_row = tl.where(i_chunk < 0, i_class, begin_row)
        end_row = tl.where(is_chunk, tl.minimum(begin_row + chunk, height - BORDER), begin_row + 1)
        # Outputs of a step lie in one row, or in a few columns of some rows; the binary logarithm of how many columns.
        log_wide = tl.where(is_chunk, LOG_WIDE, 6)
        steps_w = (width + (1 << log_wide) - 1) >> log_wide
        steps_h = tl.maximum(end_row - begin_row + (OUTPUTS >> log_wide) - 1, 0) >> (6 - log_wide)
        b_sum = tl.zeros([POSITIONS, BLOCK_ENTRIES], ACCUMULATOR)
        for i in range(steps_h * steps_w):
            o_row = begin_row + (i // steps_w << (6 - log_wide)) + (o_output >> log_wide)
            o_column = (i % steps_w << log_wide) + (o_output & ((1 << log_wide) - 1))
            m_output = (o_row < end_row) & (o_column < width)
            o_column = tl.minimum(o_column, width - 1)
            o_first = first_seen(o_column, width, KERNEL, COLUMNS)
            right = window_start(o_column, width, KERNEL, 1) - o_first
            o_step = o_row.to(OFFSET) * logits.h + o_column.to(OFFSET) * logits.w
            m_logits = m_output[:, None] & m_stored[None, :]
            b_grad_logits = tl.trans(tl.load(logits.ptr + o_step[:, None] + o_stored[None, :], mask=m_logits, other=0))
            o_query = o_row.to(OFFSET) * queries.h + o_column.to(OFFSET) * queries.w
            b_query = load_moved(queries, o_query, m_output, right, QUERY_CHANNELS, COLUMNS, BLOCK_QUERY)
            b_projected = dot(b_grad_logits, b_query, b_projected, UPCAST)
            o_ones = (1 << (o_column - o_first)) | (1 << (SEEN + right))
            b_one = tl.where((o_ones[None, :] >> o_entry[:, None]) & 1 == 1, 1.0, 0.0).to(b_query.dtype)
            b_sum = dot(b_grad_logits, tl.trans(b_one), b_sum, UPCAST)
        p_sums = sums.ptr + i_class * sums.h + o_stored[:, None] + (o_entry * sums.w)[None, :]
        tl.store(p_sums, b_sum, mask=m_sum)
        p_totals = totals.ptr + i_class * totals.h + o_stored[:, None] + (o_total * (totals.w - 1))[None, :]
        tl.store(p_totals, b_sum, mask=m_total)
    if COLUMNS > 1:
        b_parts = tl.reshape(b_projected, [POSITIONS, COLUMNS, BLOCK_QUERY])
        b_projected = tl.zeros([POSITIONS, BLOCK_QUERY], ACCUMULATOR)
        for i in tl.static_range(COLUMNS):
            b_part = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :, None] == i, b_parts, 0), 1)
            o_part = tl.minimum(tl.arange(0, POSITIONS) + i, POSITIONS - 1)
            b_projected += tl.gather(b_part, tl.broadcast_to(o_part[:, None], b_part.shape), 0)
    o_position = o_stored // SEEN * KERNEL + o_stored % SEEN
    m_position = (o_stored < KERNEL * SEEN) & (o_stored % SEEN < KERNEL)
    target = at(grad_projected, i_batch, i_group)
    o_target = i_part * target.h + o_position * target.k
    store_pixels(target, o_target, m_position, b_projected, QUERY_CHANNELS)


def _grad_parameters_band(tensors: Tensors, targets: Targets, grad_logits: Tensor) -> None:
    """Fills the gradients of projected keys, bias and rpb."""
    (batch, groups, height, width), (seen, columns) = tensors.sizes, tile_of(problem_of(tensors))
    kernel_size, new_sums = tensors.kernel_size, tensors.statistics.new_empty
    stored, whole = grad_logits.shape[-1], height * width < SMALL_MAP
    border = 0 if whole else kernel_size // 2
    inner = height - 2 * border
    # AMD's GPUs have 64 KiB of shared memory.
    positions = min(64 if torch.version.hip else 256, max(64, next_power_of_2(stored)))
    programs = ceil_divide(stored, positions) * groups * batch
    chunk, parts, pieces = inner, 1, None
    least = LEAST_POSITIONS // positions
    if programs < least:
        chunk = 4 * ceil_divide(inner * programs, 4 * least)
        parts = ceil_divide(inner, chunk) + 2
        pieces = new_sums((parts, kernel_size**2, *tensors.query.shape[:3]))
    classes = 2 * border + ceil_divide(inner, chunk)
    sums, totals = (new_sums((batch, groups, classes, number, stored)) for number in (seen, columns))
    # One program per (block of window positions, group, batch entry, part of the rows).
    launch_on(
        tensors, _grad_parameters_band_kernel, programs * parts, grad_logits=view(grad_logits, "b g h w k"),
        grad_projected=view(targets.projected, "b g c k") if pieces is None else view(pieces, "h k b g c"),
        sums=view(sums, "b g h w k"), totals=view(totals, "b g h w k"), parts=parts,
        chunks=ceil_divide(inner, chunk), chunk=chunk,
        COLUMNS=columns, SEEN=seen, BLOCK_ENTRIES=block(seen + columns), STORED=stored, POSITIONS=positions,
        BORDER=border, LOG_WIDE=min(4, (width - 1).bit_length()),
        num_warps=positions // 16, num_stages=3,
    )  # fmt: skip
    # Classes are like rows of a map, and what their outputs see like its columns.
    rows, tile = classes, 0
    if whole:
        sums = sum_rows(grad_logits.flatten(1), 12, sums.dtype).unflatten(1, grad_logits.shape[1:])
        rows, tile = height, columns
    fold(
        sums, targets.rpb, totals=totals.flatten(2, 3), bias=targets.bias, pieces=pieces, total=targets.projected,
        seen=seen, height=rows, tile=tile,
    )  # fmt: skip


def _stored_of(problem: Problem) -> tuple[int, int]:
    """How many numbers an output leaves: of p, of all that its tile sees, and of ds."""
    (seen, columns), kernel_size = tile_of(problem), problem.kernel_size
    rows = 16 // columns
    of_window = sum(int(rows_of_block(kernel_size, rows, seen, i)) for i in range(ceil_divide(kernel_size, rows)))
    return ceil_divide(kernel_size + rows - 1, rows) * rows * seen, of_window * seen


def _fill(tensors: Tensors, targets: Targets) -> None:
    counts = _stored_of(problem_of(tensors))
    weights, grad_logits = (tensors.value.new_empty((*tensors.sizes, count)) for count in counts)
    grad_logits_band(tensors, targets, weights, grad_logits)
    _grad_value_band(tensors, targets.value, weights)
    _grad_parameters_band(tensors, targets, grad_logits)


def backward_band(tensors: Tensors, targets: Targets) -> None:
    """Fills the targets."""
    by_parts(tensors, targets, max(_stored_of(problem_of(tensors))), _fill)
