# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false

"""ContMix's backward pass where windows are shared: three kernels, none of which stores a logit.

    p = exp2(l − log2 Σ exp2),   dp = value @ gradᵀ,   δ = Σ_c grad · out,   ds = p ∘ (dp − δ)           all [S, P]

The first keeps one (head, image) and walks over windows and their positions: one exponential serves the gradients
of value, p @ grad, of projected keys, ds @ query, and of query, projectedᵀ @ ds. Value's comes as one part per window,
which a small kernel sums. Another sums ds over images in registers, for bias and rpb.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.contmix import eager
from kernels.contmix.backward_tables import fold
from kernels.contmix.configs import SHARED, Saved, Shared, inputs_heuristic, problem_of, tables_heuristic
from kernels.contmix.forward_shared import shared_arguments
from kernels.contmix.tiles import key_scale, load_biases, load_keys, load_pixels, rpb_base, store_pixels
from kernels.dtypes import at_least_float32
from kernels.launch import ceil_divide, launch
from kernels.products import LOG2_E, dot
from kernels.tuning import tunable
from kernels.views import View, at, view
from kernels.windows_triton import offsets, pixels_of_window


@triton.jit
def _positions(pixels, i_block, KERNEL: tl.constexpr, STEPS: tl.constexpr):
    """Positions of a window [S], which there are, and their rows and columns in the map."""
    o_position = i_block * STEPS + tl.arange(0, STEPS)
    m_position = o_position < KERNEL * KERNEL
    return o_position, m_position, pixels.start_h + o_position // KERNEL, pixels.start_w + o_position % KERNEL


@triton.jit
def _weights(b_query, b_shifted, keys, UPCAST: tl.constexpr):
    """p [S, P] of bias − log Σ exp [S, P], query [P, Dq] and keys [S, Dq]; 0 where the bias is -inf."""
    b_logits = b_shifted * (1 / key_scale(b_query.dtype))
    for half in tl.static_range(len(keys)):
        b_logits = dot(keys[half], tl.trans(b_query), b_logits, UPCAST)
    return tl.exp2(b_logits * (LOG2_E * key_scale(b_query.dtype)))


@triton.jit
def _grad_inputs_shared_kernel(
    query,  # [B, G, Dq, H, W]
    projected,  # [B, G, Dq, K²]
    bias,  # [K²]
    rpb,  # [G, 2K-1, 2K-1]
    value,  # [B, G, Dv, H, W]
    grad,  # [B, G, Dv, H, W]
    out,  # [B, G, Dv, H, W]
    statistics,  # [B, G, H, W]: log Σ_k exp
    delta,  # [B, G, H, W]: written
    previous,  # [B, G, Dq, H, W]: a gradient of query to add to, where ADD
    grad_query,  # [B, G, Dq, H, W]: written
    grad_projected,  # [B, G, Dq, K²]: written
    parts,  # [B, G, tiles · windows, K², Dv]: value's gradients, written; along the axes g, h, k, c
    sizes, tiles, windows,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    _batch, groups, height, width, _first, _last = sizes
    i_group, i_batch = (tl.program_id(0) % groups).to(tl.int64), (tl.program_id(0) // groups).to(tl.int64)
    query, projected, value = at(query, i_batch, i_group), at(projected, i_batch, i_group), at(value, i_batch, i_group)
    grad, out, statistics = at(grad, i_batch, i_group), at(out, i_batch, i_group), at(statistics, i_batch, i_group)
    delta, parts, previous = at(delta, i_batch, i_group), at(parts, i_batch, i_group), at(previous, i_batch, i_group)
    grad_query, grad_projected = at(grad_query, i_batch, i_group), at(grad_projected, i_batch, i_group)
    dtype: tl.constexpr = query.ptr.dtype.element_ty
    sums = ()
    for _ in tl.static_range(BLOCKS):
        sums = sums + (tl.zeros([STEPS, BLOCK_QUERY], ACCUMULATOR),)
    for i_place in tl.range(tiles * windows, disable_licm=True):
        pixels = pixels_of_window(i_place % tiles, i_place // tiles, height, width, KERNEL, KERNEL, PIXELS)
        o_base = i_group * rpb.g + rpb_base(rpb, pixels, KERNEL)
        # [P, Dq], [P, Dv], [P, Dv]; an output that is not there repeats one that is, but has no gradient
        b_query = load_pixels(query, offsets(query, pixels, OFFSET), pixels.mask | True, QUERY_CHANNELS, BLOCK_QUERY)
        b_grad = load_pixels(grad, offsets(grad, pixels, OFFSET), pixels.mask, CHANNELS, BLOCK_CHANNELS)
        b_out = load_pixels(out, offsets(out, pixels, OFFSET), pixels.mask, CHANNELS, BLOCK_CHANNELS)
        b_delta = tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), 1)
        tl.store(delta.ptr + offsets(delta, pixels, OFFSET), b_delta, mask=pixels.mask)
        b_statistics = tl.load(statistics.ptr + offsets(statistics, pixels, OFFSET))
        # [Dq, P]
        b_sum = tl.zeros([BLOCK_QUERY, PIXELS], ACCUMULATOR)
        new_sums = ()
        for i in tl.static_range(BLOCKS):
            o_position, m_position, o_row, o_column = _positions(pixels, i, KERNEL, STEPS)
            b_bias = load_biases(
                bias, rpb, o_base[None, :], o_position[:, None], m_position[:, None], KERNEL, ACCUMULATOR
            )
            keys = load_keys(projected, o_position, m_position, QUERY_CHANNELS, BLOCK_QUERY, dtype)
            o_value = o_row.to(OFFSET) * value.h + o_column.to(OFFSET) * value.w
            b_value = load_pixels(value, o_value, m_position, CHANNELS, BLOCK_CHANNELS)
            b_weight = _weights(b_query, b_bias - b_statistics[None, :], keys, UPCAST)
            b_products = dot(b_value, tl.trans(b_grad), tl.zeros([STEPS, PIXELS], ACCUMULATOR), UPCAST)
            b_part = dot(b_weight.to(dtype), b_grad, tl.zeros([STEPS, BLOCK_CHANNELS], ACCUMULATOR), UPCAST)
            store_pixels(parts, i_place * parts.h + o_position * parts.k, m_position, b_part, CHANNELS)
            b_grad_logits = (b_weight * (b_products - b_delta[None, :])).to(dtype)
            new_sums = new_sums + (dot(b_grad_logits, b_query, sums[i], UPCAST),)
            b_sum = dot(tl.trans(keys[0]), b_grad_logits, b_sum, UPCAST)
        sums = new_sums
        b_sum = tl.trans(b_sum) * key_scale(dtype)
        if ADD:
            b_sum += load_pixels(previous, offsets(previous, pixels, OFFSET), pixels.mask, QUERY_CHANNELS, BLOCK_QUERY)
        store_pixels(grad_query, offsets(grad_query, pixels, OFFSET), pixels.mask, b_sum, QUERY_CHANNELS)
    for i in tl.static_range(BLOCKS):
        o_position = i * STEPS + tl.arange(0, STEPS)
        m_position = o_position < KERNEL * KERNEL
        store_pixels(grad_projected, o_position * grad_projected.k, m_position, sums[i], QUERY_CHANNELS)


@triton.jit
def _grad_value_shared_kernel(
    parts,  # [B, G, tiles · windows, K², Dv]
    grad_value,  # [B, G, Dv, H, W]: written
    sizes, tiles, windows, blocks,
    KERNEL: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The parts of value's gradient that windows left, summed."""
    _batch, groups, height, width, _first, _last = sizes
    i_block, i_image = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    part, target = at(parts, i_image // groups, i_image % groups), at(grad_value, i_image // groups, i_image % groups)
    o_pixel = i_block * PIXELS + tl.arange(0, PIXELS)
    o_row, o_column = o_pixel // width, o_pixel % width
    b_sum = tl.zeros([PIXELS, BLOCK_CHANNELS], ACCUMULATOR)
    for i_place in tl.range(tiles * windows, disable_licm=True):
        o_kernel_h = o_row - i_place // tiles // (width - KERNEL + 1)
        o_kernel_w = o_column - i_place // tiles % (width - KERNEL + 1)
        m_window = (o_kernel_h >= 0) & (o_kernel_h < KERNEL) & (o_kernel_w >= 0) & (o_kernel_w < KERNEL)
        o_part = i_place * part.h + (o_kernel_h * KERNEL + o_kernel_w) * part.k
        b_sum += load_pixels(part, o_part, m_window & (o_row < height), CHANNELS, BLOCK_CHANNELS).to(ACCUMULATOR)
    o_target = o_row.to(OFFSET) * target.h + o_column.to(OFFSET) * target.w
    store_pixels(target, o_target, o_row < height, b_sum, CHANNELS)


@triton.jit
def _grad_tables_shared_kernel(
    query, projected, bias, rpb, value, grad, statistics, delta,  # as above
    partial,  # [chunks, G, H, W, S · BLOCKS]: sums of ds over a chunk of images, written
    totals,  # [chunks, G, tiles · windows, S · BLOCKS]: the same, over the outputs of a tile, written
    sizes, tiles, windows, images,
    KERNEL: tl.constexpr, QUERY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OFFSET: tl.constexpr, UPCAST: tl.constexpr, PIXELS: tl.constexpr, STEPS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_QUERY: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    batch, groups, height, width, _first, _last = sizes
    i_program = tl.program_id(0)
    i_block, i_place = i_program % BLOCKS, i_program // BLOCKS % (tiles * windows)
    i_rest = i_program // (BLOCKS * tiles * windows)
    i_group, i_chunk = (i_rest % groups).to(tl.int64), (i_rest // groups).to(tl.int64)
    pixels = pixels_of_window(i_place % tiles, i_place // tiles, height, width, KERNEL, KERNEL, PIXELS)
    o_position, m_position, o_row, o_column = _positions(pixels, i_block, KERNEL, STEPS)
    o_base = i_group * rpb.g + rpb_base(rpb, pixels, KERNEL)
    b_bias = load_biases(bias, rpb, o_base[None, :], o_position[:, None], m_position[:, None], KERNEL, ACCUMULATOR)
    o_value = o_row.to(OFFSET) * value.h + o_column.to(OFFSET) * value.w
    zero = tl.zeros([STEPS, PIXELS], ACCUMULATOR)
    b_sum = zero
    for i_image in range(i_chunk * images, tl.minimum((i_chunk + 1) * images, batch)):
        i_batch = tl.cast(i_image, tl.int64)
        keys = load_keys(
            at(projected, i_batch, i_group),
            o_position,
            m_position,
            QUERY_CHANNELS,
            BLOCK_QUERY,
            query.ptr.dtype.element_ty,
        )
        b_query = load_pixels(
            at(query, i_batch, i_group), offsets(query, pixels, OFFSET), pixels.mask | True, QUERY_CHANNELS, BLOCK_QUERY
        )
        b_grad = load_pixels(
            at(grad, i_batch, i_group), offsets(grad, pixels, OFFSET), pixels.mask, CHANNELS, BLOCK_CHANNELS
        )
        b_value = load_pixels(at(value, i_batch, i_group), o_value, m_position, CHANNELS, BLOCK_CHANNELS)
        b_stat = tl.load(at(statistics, i_batch, i_group).ptr + offsets(statistics, pixels, OFFSET))
        b_delta = tl.load(at(delta, i_batch, i_group).ptr + offsets(delta, pixels, OFFSET), mask=pixels.mask, other=0)
        b_weight = _weights(b_query, b_bias - b_stat[None, :], keys, UPCAST)
        b_sum += b_weight * (dot(b_value, tl.trans(b_grad), zero, UPCAST) - b_delta[None, :])
    p_partial = (
        partial.ptr
        + i_chunk * partial.b
        + i_group * partial.g
        + ((pixels.row * width + pixels.column) * partial.w)[None, :]
    )
    tl.store(p_partial + o_position[:, None], b_sum, mask=pixels.mask[None, :])
    p_totals = totals.ptr + i_chunk * totals.b + i_group * totals.g + i_place * totals.h
    tl.store(p_totals + o_position, tl.sum(b_sum, 1))


def reference_gradients(saved: Saved) -> tuple[Tensor, ...]:
    """Gradients of query, projected, bias, rpb and value of one kernel size."""
    query, projected, bias, rpb, value, grad, out, statistics = at_least_float32(*saved)
    sizes = [(rpb.shape[1] + 1) // 2]
    inputs = query, projected, bias, [rpb], value[:, None]
    found = eager.contmix_backward(grad[:, None], *inputs, out[:, None], statistics[:, None], sizes)
    return *found[:3], found[3][0], found[4][:, 0]


class Targets(NamedTuple):
    """The gradients that a kernel size's backward pass writes, and the gradient of query that it adds to."""

    query: Tensor  # [B, G, Dq, H, W]
    value: Tensor  # [B, G, Dv, H, W]
    projected: Tensor  # [B, G, Dq, K²]
    bias: Tensor  # [K²]
    rpb: Tensor  # [G, 2K-1, 2K-1]
    previous: Tensor | None


@tunable(
    SHARED,
    inputs_heuristic,
    problem=problem_of,
    reference=lambda saved, targets, _delta: _added(reference_gradients(saved), targets),
    name="contmix.shared.grad_inputs",
)
def grad_inputs_shared(saved: Saved, targets: Targets, delta: Tensor, *, config: Shared) -> tuple[Tensor, ...]:
    """Fills the targets but bias' and rpb's, and ``delta`` [B, G, H, W] = Σ_c grad · out."""
    arguments = shared_arguments(saved, config, saved.grad, saved.out, *targets[:3])
    batch, groups, channels, height, width = saved.value.shape
    places, positions = arguments["tiles"] * arguments["windows"], arguments["KERNEL"] ** 2
    if places == 1:
        # The one window is the map, and its part the gradient.
        parts = View(targets.value, *(targets.value.stride(axis) for axis in (0, 1, 2)), 0, 0, targets.value.stride(4))
    else:
        parts = view(saved.value.new_empty((batch, groups, places, positions, channels)), "b g h k c")
    arguments |= {
        "delta": view(delta, "b g h w"),
        "previous": view(targets.query if targets.previous is None else targets.previous, "b g c h w"),
        "grad_query": view(targets.query, "b g c h w"),
        "grad_projected": view(targets.projected, "b g c k"),
        "parts": parts,
        "ADD": targets.previous is not None,
    }
    # One program per (group, batch entry).
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_inputs_shared_kernel, (groups * batch,), delta.device, arguments, **options)
    if places > 1:
        blocks = ceil_divide(height * width, 64)
        kept = ("sizes", "tiles", "windows", "KERNEL", "CHANNELS", "ACCUMULATOR", "OFFSET", "BLOCK_CHANNELS")
        arguments = {name: arguments[name] for name in kept} | {
            "parts": parts,
            "grad_value": view(targets.value, "b g c h w"),
            "blocks": blocks,
            "PIXELS": 64,
        }
        # One program per (block of pixels, group, batch entry).
        grid = (blocks * groups * batch,)
        launch(_grad_value_shared_kernel, grid, delta.device, arguments, num_warps=4, num_stages=2)
    return targets.query, targets.value, targets.projected


@tunable(
    SHARED,
    tables_heuristic,
    problem=problem_of,
    reference=lambda saved, _delta, _bias, _rpb: reference_gradients(saved)[2:4],
    name="contmix.shared.grad_tables",
)
def grad_tables_shared(
    saved: Saved, delta: Tensor, bias: Tensor, rpb: Tensor, *, config: Shared
) -> tuple[Tensor, Tensor]:
    """Fills the gradients of ``bias`` [K²] and ``rpb`` [G, 2K-1, 2K-1]."""
    arguments = shared_arguments(saved, config, saved.grad)
    batch, groups, _, height, width = saved.value.shape
    places, positions = arguments["tiles"] * arguments["windows"], arguments["BLOCKS"] * config.steps
    chunks = ceil_divide(batch, config.images)
    partial = delta.new_empty((chunks, groups, height, width, positions))
    totals = delta.new_empty((chunks, groups, places, positions))
    del arguments["out"]
    arguments |= {
        "delta": view(delta, "b g h w"),
        "partial": view(partial, "b g h w k"),
        "totals": view(totals, "b g h k"),
        "images": config.images,
    }
    # One program per (block of window positions, tile, window, group, chunk of images).
    grid = (arguments["BLOCKS"] * places * groups * chunks,)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_tables_shared_kernel, grid, delta.device, arguments, **options)
    fold(partial, totals, bias, rpb, (arguments["KERNEL"], positions), (0, height - 1, height))
    return bias, rpb


def _added(gradients: tuple[Tensor, ...], targets: Targets) -> tuple[Tensor, ...]:
    query, projected, _bias, _rpb, value = gradients
    return query if targets.previous is None else query + targets.previous, value, projected
