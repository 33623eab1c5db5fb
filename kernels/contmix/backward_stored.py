"""What follows from weights p and their logits' gradients ds in memory: gradients of value, of projected keys, and sums
of ds over what shares entries of bias and rpb."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix.arguments import Rows, Tensors, launch_on
from kernels.contmix.backward_tables import Sums
from kernels.contmix.configs import block, steps_of_own
from kernels.contmix.tiles import load_heads, load_pixels, store_heads, store_pixels
from kernels.launch import ceil_divide, next_power_of_2
from kernels.products import dot
from kernels.views import at, view
from kernels.windows_triton import window_start

# Where there are fewer programs, two for each of a GPU's processors, several share the rows, of which each has some.
LEAST_PROGRAMS, LEAST_ROWS = 264, 4


@triton.jit
def _grad_value_own_kernel(
    weights,  # [B, G, rows, K / ROWS, W, S]: p of some rows of outputs
    grad,  # [B, G, Dv, H, W]
    grad_value,  # [B, G, Dv, H, W]: written, or added to, where ADD
    sizes, tiles, head_blocks,
    KERNEL: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Inputs of a tile are adjacent in a row; a step takes adjacent outputs of a row that sees it."""
    _batch, groups, height, width, first_row, last_row = sizes
    i_program = tl.program_id(0)
    i_tile, i_head = i_program % tiles, i_program // tiles % head_blocks * HEADS
    i_batch = (i_program // (tiles * head_blocks)).to(tl.int64)
    tiles_w = tl.cdiv(width, INPUTS)
    row, i_column = i_tile // tiles_w, i_tile % tiles_w * INPUTS
    o_input = i_column + tl.arange(0, INPUTS)
    i_first, _ = _outputs_seeing(i_column, width, KERNEL)
    _, i_last = _outputs_seeing(tl.minimum(i_column + INPUTS, width) - 1, width, KERNEL)
    i_first_h, i_last_h = _outputs_seeing(row, height, KERNEL)
    i_first_h, i_last_h = tl.maximum(i_first_h, first_row), tl.minimum(i_last_h, last_row)
    o_head = i_head + tl.arange(0, HEADS)
    p_weights = (
        weights.ptr + i_batch * weights.b + tl.minimum(o_head, groups - 1).to(tl.int64)[:, None, None] * weights.g
    )
    grads = at(grad, i_batch, 0)
    # [G, I, Dv]
    b_sum = tl.zeros([HEADS, INPUTS, BLOCK_CHANNELS], ACCUMULATOR)
    ROWS_OF_STEP: tl.constexpr = OUTPUTS // COLUMNS
    for i_outputs in range(i_first, i_last + 1, COLUMNS):
        o_output = tl.arange(0, OUTPUTS)
        o_row, o_output = o_output // COLUMNS, i_outputs + o_output % COLUMNS
        # [O, I]: where in an output's window an input is, if it is
        o_kernel = o_input[None, :] - window_start(o_output, width, KERNEL, 1)[:, None]
        m_kernel = (o_kernel >= 0) & (o_kernel < KERNEL) & (o_input < width)[None, :] & (o_output <= i_last)[:, None]
        p_output = p_weights + (o_output[:, None] * weights.w + o_kernel)[None, :, :]
        for i_row in range(i_first_h, i_last_h + 1, ROWS_OF_STEP):
            o_step = i_row + o_row
            m_step = o_step <= i_last_h
            kernel_h = row - window_start(o_step, height, KERNEL, 1)
            o_weight = (o_step - first_row).to(OFFSET) * weights.h + (
                kernel_h // ROWS * weights.k + kernel_h % ROWS * KERNEL
            )
            b_weight = tl.load(
                p_output + o_weight[None, :, None], mask=(m_kernel & m_step[:, None])[None, :, :], other=0
            )
            o_grad, m_grad = o_step.to(OFFSET) * grad.h + o_output.to(OFFSET) * grad.w, m_step & (o_output <= i_last)
            b_grad = load_heads(grads, o_grad, m_grad, i_head, groups, CHANNELS, HEADS, BLOCK_CHANNELS)
            # What is not finite comes with weights that are NaN, to the inputs that it reaches and no others.
            b_grad = b_grad.to(ACCUMULATOR)
            b_grad = tl.where(b_grad * 0 == 0, b_grad, 0.0).to(b_weight.dtype)
            b_sum = dot(tl.permute(b_weight, [0, 2, 1]), tl.permute(b_grad, [1, 0, 2]), b_sum, UPCAST)
    b_sum = tl.permute(b_sum, [1, 0, 2])
    target, o_target = at(grad_value, i_batch, 0), row.to(OFFSET) * grad_value.h + o_input.to(OFFSET) * grad_value.w
    if ADD:
        b_sum += load_heads(target, o_target, o_input < width, i_head, groups, CHANNELS, HEADS, BLOCK_CHANNELS)
    store_heads(target, o_target, o_input < width, i_head, groups, b_sum, CHANNELS)


@triton.jit
def _outputs_seeing(o_input, length, KERNEL: tl.constexpr):
    """(first, last) of the outputs along an axis whose clamped windows hold ``o_input``."""
    first = tl.where(o_input < KERNEL, 0, o_input - KERNEL // 2)
    return first, tl.where(o_input >= length - KERNEL, length - 1, o_input + KERNEL // 2)


@triton.jit
def _grad_parameters_own_kernel(
    query,  # [B, G, Dq, H, W]
    grad_logits,  # [B, G, rows, K / ROWS, W, S]: ds of some rows of outputs
    grad_projected,  # [N, B, G, Dq, K²]: written, or added to, where ADD; N along the axis h
    sums,  # [N·B, G, classes of rows, K + 1, K / ROWS · S]: written; ds, summed over the outputs of a class of rows and
    # one of columns, and last over all columns
    sizes, count,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_QUERY: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A class of rows, or columns, is those whose windows lie alike around them: K // 2 from either border are each one
    of its own, and all between them a class. A program walks over one of N parts of the rows, ``count`` each, and over
    their inner columns in tiles."""
    HALF: tl.constexpr = KERNEL // 2
    INNER: tl.constexpr = COLUMNS - 2 * HALF
    batch, groups, height, width, first_row, last_row = sizes
    STORED: tl.constexpr = KERNEL // ROWS * STEPS
    BLOCKS: tl.constexpr = (STORED + POSITIONS - 1) // POSITIONS
    i_block, i_image = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    i_group, i_sum = (i_image % groups).to(tl.int64), (i_image // groups).to(tl.int64)
    i_batch, i_part = i_sum % batch, i_sum // batch
    queries, logits, sums = at(query, i_batch, i_group), at(grad_logits, i_batch, i_group), at(sums, i_sum, i_group)
    begin = first_row + i_part.to(tl.int32) * count
    end = tl.minimum(begin + count - 1, last_row)
    tiles = tl.cdiv(width - 2 * HALF, INNER)
    o_stored, o_slot = i_block * POSITIONS + tl.arange(0, POSITIONS), tl.arange(0, COLUMNS)
    m_stored = o_stored < STORED
    m_inner = (o_slot >= HALF) & (o_slot < COLUMNS - HALF)
    o_class = tl.where(o_slot < HALF, o_slot, o_slot - COLUMNS + KERNEL)
    first_class = first_row - window_start(first_row, height, KERNEL, 1)
    for i_class in range(first_class, last_row - window_start(last_row, height, KERNEL, 1) + 1):
        p_sums = sums.ptr + (i_class - first_class) * sums.h + o_stored
        begins, ends = begin - window_start(begin, height, KERNEL, 1), end - window_start(end, height, KERNEL, 1)
        if (i_class < begins) | (i_class > ends):
            for i in range(KERNEL + 1):
                tl.store(p_sums + i * sums.w, tl.zeros([POSITIONS], ACCUMULATOR), mask=m_stored)
    b_projected = tl.zeros([BLOCK_QUERY, POSITIONS], ACCUMULATOR)
    b_sum = tl.zeros([COLUMNS, POSITIONS], ACCUMULATOR)
    for i in range((end - begin + 1) * tiles):
        row, i_tile = begin + i // tiles, i % tiles
        # The columns at the borders come with the first tile.
        o_column = tl.where(m_inner, o_slot + i_tile * INNER, tl.where(o_slot < HALF, o_slot, o_slot + width - COLUMNS))
        m_column = tl.where(m_inner, o_column < width - HALF, i_tile == 0)
        o_logits = (row - first_row).to(OFFSET) * logits.h + o_column.to(OFFSET) * logits.w
        b_grad_logits = tl.load(
            logits.ptr + o_logits[:, None] + (o_stored // STEPS * logits.k + o_stored % STEPS)[None, :],
            mask=m_column[:, None] & m_stored[None, :],
            other=0,
        )
        o_query = row.to(OFFSET) * queries.h + o_column.to(OFFSET) * queries.w
        b_query = load_pixels(queries, o_query, m_column, QUERY_CHANNELS, BLOCK_QUERY)
        b_projected = dot(tl.trans(b_query), b_grad_logits, b_projected, UPCAST)
        b_sum += b_grad_logits.to(ACCUMULATOR)
        i_class = row - window_start(row, height, KERNEL, 1)
        i_next = row + 1 - window_start(row + 1, height, KERNEL, 1)
        if (i_tile == tiles - 1) & ((row == end) | (i_next != i_class)):
            p_sums = sums.ptr + (i_class - first_class) * sums.h + o_stored
            tl.store(
                p_sums[None, :] + o_class[:, None] * sums.w, b_sum, mask=(m_inner == 0)[:, None] & m_stored[None, :]
            )
            tl.store(p_sums + HALF * sums.w, tl.sum(tl.where(m_inner[:, None], b_sum, 0), 0), mask=m_stored)
            tl.store(p_sums + KERNEL * sums.w, tl.sum(b_sum, 0), mask=m_stored)
            b_sum = tl.zeros([COLUMNS, POSITIONS], ACCUMULATOR)
    o_position = o_stored // STEPS * ROWS * KERNEL + o_stored % STEPS
    m_position = m_stored & (o_stored % STEPS < ROWS * KERNEL)
    b_projected = tl.trans(b_projected)
    target = at(grad_projected, i_batch, i_group)
    o_target = i_part * target.h + o_position * target.k
    if ADD:
        b_projected += load_pixels(target, o_target, m_position, QUERY_CHANNELS, BLOCK_QUERY)
    store_pixels(target, o_target, m_position, b_projected, QUERY_CHANNELS)


def grad_value_own(tensors: Tensors, rows: Rows, grad_value: Tensor, add: bool) -> None:
    """Fills ``grad_value`` with what ``rows`` give, or adds it."""
    sizes, (kernel_rows, steps) = rows.sizes, steps_of_own(tensors.kernel_size)
    heads = min(2, next_power_of_2(sizes.groups))
    tiles, head_blocks = sizes.height * ceil_divide(sizes.width, 16), ceil_divide(sizes.groups, heads)
    # One program per (tile of inputs, block of heads, batch entry).
    launch_on(
        tensors, _grad_value_own_kernel, tiles * head_blocks * sizes.batch, weights=view(rows.weights, "b g h k w c"),
        grad_value=view(grad_value, "b g c h w"), sizes=sizes, tiles=tiles, head_blocks=head_blocks,
        INPUTS=16, OUTPUTS=64, COLUMNS=min(32, block(min(sizes.width, tensors.kernel_size + 15))), HEADS=heads,
        ROWS=kernel_rows, STEPS=steps, BLOCK_CHANNELS=block(tensors.value.shape[2]), ADD=add, num_warps=heads,
        num_stages=1,
    )  # fmt: skip


def grad_parameters_own(tensors: Tensors, rows: Rows, grad_projected: Tensor, add: bool) -> Sums:
    """Fills ``grad_projected`` with what ``rows`` give, or adds it; or leaves parts of it to be summed."""
    batch, groups, height, width, first_row, last_row = rows.sizes
    kernel_size, new_sums = tensors.kernel_size, tensors.statistics.new_empty
    kernel_rows, steps = steps_of_own(kernel_size)
    stored = kernel_size // kernel_rows * steps
    positions = min(64, next_power_of_2(stored))
    programs, count = ceil_divide(stored, positions) * groups * batch, last_row - first_row + 1
    several, parts = 1, None
    if not add and programs < LEAST_PROGRAMS and grad_projected.permute(3, 0, 1, 2).is_contiguous():
        count = max(LEAST_ROWS, ceil_divide(count, LEAST_PROGRAMS // programs))
        several = ceil_divide(last_row - first_row + 1, count)
    if several > 1:
        parts = new_sums((several, kernel_size**2, *tensors.query.shape[:3]))
    first, last = (_class_of(row, height, kernel_size) for row in (first_row, last_row))
    sums = new_sums((several * batch, groups, last - first + 1, kernel_size + 1, stored))
    columns = max(block(kernel_size), min(64 if tensors.value.dtype.itemsize == 2 else 32, block(width)))
    # One program per (block of window positions, group, batch entry, part of the rows).
    launch_on(
        tensors, _grad_parameters_own_kernel, programs * several, grad_logits=view(rows.grad_logits, "b g h k w c"),
        grad_projected=view(grad_projected, "b g c k") if parts is None else view(parts, "h k b g c"),
        sums=view(sums, "b g h w k"), sizes=rows.sizes, count=count,
        ROWS=kernel_rows, STEPS=steps, COLUMNS=columns, POSITIONS=positions, ADD=add, num_warps=max(1, columns // 16),
        num_stages=1,
    )  # fmt: skip
    # One row, or column, of a class is like a map of the window's size.
    step, of_map = (kernel_rows, steps), (first, last, kernel_size)
    return Sums(sums[:, :, :, :-1], sums[:, :, :, -1], step, of_map, kernel_size, parts)


def _class_of(row: int, height: int, kernel_size: int) -> int:
    """Where a row lies in its window, by which rpb tells it apart from others."""
    return row - min(max(row - kernel_size // 2, 0), height - kernel_size)
