# pyright: reportArgumentType=false, reportOperatorIssue=false, reportInvalidTypeForm=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Triton's constexpr and the values inside a kernel are opaque to a type checker.
"""ContMix's gradients of query and value: no logits in memory, here neither.

With weights p[n,k], dp[n,k] = Σ_c grad[n,c] · value[nbr(n,k),c], δ[n] = Σ_c grad[n,c] · out[n,c] and
ds[n,k] = p[n,k] · (dp[n,k] − δ[n]), the logits' gradient, each gradient computes the weights it needs again from
log Σ_k exp, the one number a pixel that the forward pass leaves:

    grad_query    Σ_k ds[n,k] · projected[:,k]     a program per tile of outputs; it leaves δ for the parameters
    grad_value    Σ_(n,k) p[n,k] · grad[n,:]       a program per tile of inputs: over the windows that hold them where
                                                   windows are shared, else over the outputs that see them
    projected keys, bias, rpb                      ``triton_grad_parameters``

That costs Dq + Dv multiply-adds a logit and kernel, on tensor cores. Storing the logits and
ds would move 4·ΣK² elements a pixel; a kernel here reads Dq + 2·Dv and a few.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import interpreting
from kernels.contmix import eager
from kernels.contmix.triton_blocks import (
    TILE_WIDTH,
    banded,
    dot,
    grad_logits,
    load_pixels,
    logits_of_tile,
    outputs_of_tile,
    spans_of_tile,
    window_starts,
)
from kernels.contmix.triton_tiles import (
    CONFIGS,
    ONE_SIZE,
    Config,
    Problem,
    Saved,
    heuristic,
    tensor_arguments,
    tile_arguments,
)
from kernels.dtypes import at_least_float32
from kernels.launch import ceil_divide, launch
from kernels.tuning import tunable
from kernels.windows_triton import split_program, window_start

__all__ = ["backward_heuristic", "grad_query", "grad_value", "reference_gradients"]


def backward_heuristic(problem: Problem) -> Config:
    """The forward pass's choice; for own windows half its outputs: weights, values and gradients live at once."""
    config = heuristic(problem)
    if interpreting() or problem.shared:
        return config
    # Where products keep operands in registers, a deeper pipeline spares ptxas a spill on sm_80.
    smaller = replace(config, block_pixels=config.block_pixels // 2, num_stages=2 if problem.dtype.itemsize == 2 else 3)
    return smaller if smaller.valid(problem) else config


@triton.jit
def _grad_query_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    value_ptr,  # [B, G, Dv, H, W]
    statistics_ptr,  # [B, G, H, W]: log Σ_k exp
    grad_ptr,  # [B, G, Dv, H, W]
    out_ptr,  # [B, G, Dv, H, W]
    delta_ptr,  # [B, G, H, W]: written
    target_ptr,  # [B, G, Dq, H, W]: the gradient of query
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    value_stride_b, value_stride_g, value_stride_c, value_stride_h, value_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    out_stride_b, out_stride_g, out_stride_c, out_stride_h, out_stride_w,
    delta_stride_b, delta_stride_g, delta_stride_h, delta_stride_w,
    target_stride_b, target_stride_g, target_stride_c, target_stride_h, target_stride_w,
    groups, channels, query_channels, height, width, tiles, windows,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_tile, i_window, i_group, i_batch = split_program(tiles, windows, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_value = value_ptr + i_batch * value_stride_b + i_group * value_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g
    p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g
    p_out = out_ptr + i_batch * out_stride_b + i_group * out_stride_g
    p_delta = delta_ptr + i_batch * delta_stride_b + i_group * delta_stride_g
    p_target = target_ptr + i_batch * target_stride_b + i_group * target_stride_g

    o_query, o_channel = tl.arange(0, BLOCK_QUERY), tl.arange(0, BLOCK_CHANNELS)
    m_query, m_channel = o_query < query_channels, o_channel < channels
    o_row, o_column, m_output = outputs_of_tile(i_tile, i_window, height, width, SHARED, KERNEL, BLOCK_PIXELS)
    o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, SHARED, KERNEL)
    o_span_h, o_span_w = spans_of_tile(o_start_h, o_start_w, SHARED, BLOCK_PIXELS)
    # [Dq, P], [C, P], [C, P]
    b_query = load_pixels(
        p_query, o_query, m_query, o_row, o_column, m_output, query_stride_c, query_stride_h, query_stride_w, OFFSET
    )
    b_grad = load_pixels(
        p_grad, o_channel, m_channel, o_row, o_column, m_output, grad_stride_c, grad_stride_h, grad_stride_w, OFFSET
    )
    b_out = load_pixels(
        p_out, o_channel, m_channel, o_row, o_column, m_output, out_stride_c, out_stride_h, out_stride_w, OFFSET
    )
    o_row, o_column = o_row.to(OFFSET), o_column.to(OFFSET)
    b_statistics = tl.load(p_statistics + o_row * statistics_stride_h + o_column * statistics_stride_w)
    b_delta = tl.sum(b_grad.to(ACCUMULATOR) * b_out.to(ACCUMULATOR), axis=0)
    tl.store(p_delta + o_row * delta_stride_h + o_column * delta_stride_w, b_delta, mask=m_output)
    b_query = tl.trans(b_query)

    # [P, Dq]
    b_sum = tl.zeros([BLOCK_PIXELS, BLOCK_QUERY], ACCUMULATOR)
    for i_step in range(STEPS):
        b_grad_logits, b_projected = grad_logits(
            b_query, b_grad, b_statistics, b_delta, p_projected, bias_ptr, p_rpb, p_value,
            o_query, m_query, o_channel, m_channel, i_step, width,
            o_row, o_column, o_start_h, o_start_w, o_span_h, o_span_w,
            projected_stride_c, projected_stride_k, bias_stride_k, rpb_stride_h, rpb_stride_w,
            value_stride_c, value_stride_h, value_stride_w,
            SHARED, KERNEL, ACCUMULATOR, OFFSET, UPCAST,
            BLOCK_PIXELS, BLOCK_STEPS, BLOCK_SPAN, BLOCK_CHANNELS,
        )  # fmt: skip
        b_sum += dot(b_grad_logits.to(b_projected.dtype), tl.trans(b_projected), ACCUMULATOR, UPCAST)

    tl.store(
        p_target
        + (o_query.to(OFFSET) * target_stride_c)[:, None]
        + (o_row * target_stride_h + o_column * target_stride_w)[None, :],
        tl.trans(b_sum).to(target_ptr.dtype.element_ty),
        mask=m_query[:, None] & m_output[None, :],
    )


@triton.jit
def _outputs_seeing(o_input, length, KERNEL: tl.constexpr):
    """(first, last) of the outputs along an axis whose clamped windows hold ``o_input``."""
    first = tl.where(o_input < KERNEL, 0, o_input - KERNEL // 2)
    return first, tl.where(o_input >= length - KERNEL, length - 1, o_input + KERNEL // 2)


@triton.jit
def _grad_value_kernel(
    query_ptr,  # [B, G, Dq, H, W]
    projected_ptr,  # [B, G, Dq, K²]
    bias_ptr,  # [K²]
    rpb_ptr,  # [G, 2K-1, 2K-1]
    statistics_ptr,  # [B, G, H, W]
    grad_ptr,  # [B, G, Dv, H, W]
    target_ptr,  # [B, G, Dv, H, W]: the gradient of value
    query_stride_b, query_stride_g, query_stride_c, query_stride_h, query_stride_w,
    projected_stride_b, projected_stride_g, projected_stride_c, projected_stride_k,
    bias_stride_k,
    rpb_stride_g, rpb_stride_h, rpb_stride_w,
    statistics_stride_b, statistics_stride_g, statistics_stride_h, statistics_stride_w,
    grad_stride_b, grad_stride_g, grad_stride_c, grad_stride_h, grad_stride_w,
    target_stride_b, target_stride_g, target_stride_c, target_stride_h, target_stride_w,
    groups, channels, query_channels, height, width, tiles, windows, input_blocks,
    SHARED: tl.constexpr, KERNEL: tl.constexpr, STEPS: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_STEPS: tl.constexpr, BLOCK_SPAN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_QUERY: tl.constexpr,
):  # fmt: skip
    i_input, _i_one, i_group, i_batch = split_program(input_blocks, 1, groups)
    p_query = query_ptr + i_batch * query_stride_b + i_group * query_stride_g
    p_projected = projected_ptr + i_batch * projected_stride_b + i_group * projected_stride_g
    p_rpb = rpb_ptr + i_group * rpb_stride_g
    p_statistics = statistics_ptr + i_batch * statistics_stride_b + i_group * statistics_stride_g
    p_grad = grad_ptr + i_batch * grad_stride_b + i_group * grad_stride_g
    p_target = target_ptr + i_batch * target_stride_b + i_group * target_stride_g
    o_query, o_channel = tl.arange(0, BLOCK_QUERY), tl.arange(0, BLOCK_CHANNELS)
    m_query, m_channel = o_query < query_channels, o_channel < channels

    if SHARED:
        # Inputs in a row through the map, as many as a step of the other kernels has window positions: [S].
        o_input = i_input * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS)
        m_input = o_input < height * width
        o_input_h, o_input_w = o_input // width, o_input % width
        # [C, S]
        b_sum = tl.zeros([BLOCK_CHANNELS, BLOCK_STEPS], ACCUMULATOR)
        for i_place in range(tiles * windows):
            i_window = i_place // tiles
            o_row, o_column, m_output = outputs_of_tile(
                i_place % tiles, i_window, height, width, True, KERNEL, BLOCK_PIXELS
            )
            o_start_h, o_start_w = window_starts(o_row, o_column, i_window, height, width, True, KERNEL)
            # Where in this window the inputs are, if they are.
            o_kernel_h, o_kernel_w = o_input_h - o_start_h, o_input_w - o_start_w
            m_kernel = m_input & (o_kernel_h >= 0) & (o_kernel_h < KERNEL) & (o_kernel_w >= 0) & (o_kernel_w < KERNEL)
            b_query = load_pixels(
                p_query, o_query, m_query, o_row, o_column, m_output,
                query_stride_c, query_stride_h, query_stride_w, OFFSET,
            )  # fmt: skip
            # An output that is not there has no gradient, and so adds nothing.
            b_grad = load_pixels(
                p_grad, o_channel, m_channel, o_row, o_column, m_output,
                grad_stride_c, grad_stride_h, grad_stride_w, OFFSET,
            )  # fmt: skip
            o_statistics = o_row.to(OFFSET) * statistics_stride_h + o_column.to(OFFSET) * statistics_stride_w
            # [P, S]
            b_logits, _b_projected = logits_of_tile(
                tl.trans(b_query), p_projected, bias_ptr, p_rpb, o_query, m_query, o_row, o_column,
                o_start_h, o_start_w, o_kernel_h, o_kernel_w, m_kernel, projected_stride_c, projected_stride_k,
                bias_stride_k, rpb_stride_h, rpb_stride_w, KERNEL, ACCUMULATOR, UPCAST,
            )  # fmt: skip
            b_weight = tl.exp(b_logits - tl.load(p_statistics + o_statistics)[:, None])
            b_weight = tl.where(m_kernel[None, :], b_weight, 0.0)
            b_sum += dot(b_grad, b_weight.to(b_grad.dtype), ACCUMULATOR, UPCAST)
        o_target = o_input_h.to(OFFSET) * target_stride_h + o_input_w.to(OFFSET) * target_stride_w
        p_target += (o_channel.to(OFFSET) * target_stride_c)[:, None] + o_target[None, :]
        tl.store(p_target, b_sum.to(target_ptr.dtype.element_ty), mask=m_channel[:, None] & m_input[None, :])
    else:
        # R rows of I = 16 inputs. A step takes one row of outputs that see a row of inputs, O = 16 of them.
        ROWS: tl.constexpr = BLOCK_PIXELS // TILE_WIDTH
        tiles_w = tl.cdiv(width, TILE_WIDTH)
        i_column = i_input % tiles_w * TILE_WIDTH
        o_input_h = i_input // tiles_w * ROWS + tl.arange(0, ROWS)
        m_input_h = o_input_h < height
        o_input_h = tl.minimum(o_input_h, height - 1)
        o_first_h, o_last_h = _outputs_seeing(o_input_h, height, KERNEL)
        i_first_w, _i_last = _outputs_seeing(i_column, width, KERNEL)
        _i_first, i_last_w = _outputs_seeing(tl.minimum(i_column + TILE_WIDTH, width) - 1, width, KERNEL)
        columns = tl.cdiv(i_last_w - i_first_w + 1, TILE_WIDTH)
        o_kernel_w = tl.arange(0, BLOCK_STEPS)
        m_step = o_kernel_w < KERNEL
        # [R, I, C]
        b_sum = tl.zeros([ROWS, TILE_WIDTH, BLOCK_CHANNELS], ACCUMULATOR)
        for i_step in range((tl.max(o_last_h - o_first_h, axis=0) + 1) * columns):
            o_row = o_first_h + i_step // columns
            o_column = i_first_w + i_step % columns * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
            m_output = (m_input_h & (o_row <= o_last_h))[:, None] & (o_column <= i_last_w)[None, :]
            o_start_w = window_start(o_column, width, KERNEL, 1)
            o_position = (o_input_h - window_start(o_row, height, KERNEL, 1)) * KERNEL
            o_position = o_position[:, None] + o_kernel_w[None, :]
            m_position = (o_row <= o_last_h)[:, None] & m_step[None, :]
            # [R, O, Dq], [R, Dq, S], [R, S], [R, O, S]
            o_pixel = (o_row.to(OFFSET) * query_stride_h)[:, None] + (o_column.to(OFFSET) * query_stride_w)[None, :]
            p_block = p_query + o_pixel[:, :, None] + (o_query.to(OFFSET) * query_stride_c)[None, None, :]
            b_query = tl.load(p_block, mask=m_output[:, :, None] & m_query[None, None, :], other=0)
            p_block = p_projected + (o_query * projected_stride_c)[None, :, None]
            p_block += (o_position * projected_stride_k)[:, None, :]
            b_projected = tl.load(p_block, mask=m_position[:, None, :] & m_query[None, :, None], other=0)
            b_bias = tl.load(bias_ptr + o_position * bias_stride_k, mask=m_position, other=0).to(ACCUMULATOR)
            o_rpb_w = (o_start_w - o_column + KERNEL - 1)[:, None] + o_kernel_w[None, :]
            p_block = p_rpb + ((o_input_h - o_row + KERNEL - 1) * rpb_stride_h)[:, None, None]
            p_block += (o_rpb_w * rpb_stride_w)[None, :, :]
            m_logits = m_output[:, :, None] & m_step[None, None, :]
            b_rpb = tl.load(p_block, mask=m_logits, other=0).to(ACCUMULATOR)
            b_logits = dot(b_query, b_projected, ACCUMULATOR, UPCAST) + b_bias[:, None, :] + b_rpb
            o_pixel = o_row.to(OFFSET)[:, None] * statistics_stride_h
            o_pixel += o_column.to(OFFSET)[None, :] * statistics_stride_w
            b_statistics = tl.load(p_statistics + o_pixel, mask=m_output, other=0)
            b_weight = tl.where(m_logits, tl.exp(b_logits - b_statistics[:, :, None]), 0.0)
            # Every output's weights by input instead of by kernel column, [R, O, I].
            o_shift = tl.broadcast_to((o_start_w - i_column)[None, :], [ROWS, TILE_WIDTH])
            b_weight = tl.reshape(b_weight, [BLOCK_PIXELS, BLOCK_STEPS])
            b_weight = banded(b_weight, tl.reshape(o_shift, [BLOCK_PIXELS]), KERNEL, TILE_WIDTH)
            b_weight = tl.reshape(b_weight, [ROWS, TILE_WIDTH, TILE_WIDTH])
            # [R, O, C]
            o_pixel = (o_row.to(OFFSET) * grad_stride_h)[:, None] + (o_column.to(OFFSET) * grad_stride_w)[None, :]
            p_block = p_grad + o_pixel[:, :, None] + (o_channel.to(OFFSET) * grad_stride_c)[None, None, :]
            b_grad = tl.load(p_block, mask=m_output[:, :, None] & m_channel[None, None, :], other=0)
            b_sum += dot(tl.permute(b_weight.to(b_grad.dtype), [0, 2, 1]), b_grad, ACCUMULATOR, UPCAST)
        o_input_w = i_column + tl.arange(0, TILE_WIDTH)
        o_target = (o_input_h.to(OFFSET) * target_stride_h)[:, None] + (o_input_w.to(OFFSET) * target_stride_w)[None, :]
        m_target = m_input_h[:, None] & (o_input_w < width)[None, :]
        p_target += (o_channel.to(OFFSET) * target_stride_c)[None, None, :] + o_target[:, :, None]
        m_target = m_target[:, :, None] & m_channel[None, None, :]
        tl.store(p_target, b_sum.to(target_ptr.dtype.element_ty), mask=m_target)


def reference_gradients(saved: Saved) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The eager gradients of query, projected, bias, rpb and value for one kernel size, for the tuner."""
    grad, query, projected, bias, rpb, value, out, statistics = at_least_float32(*saved)
    sizes = [(rpb.shape[1] + 1) // 2]
    gradients = eager.contmix_backward(
        grad[:, None], query, projected, bias, rpb.flatten(1), value[:, None], out[:, None], statistics[:, None], sizes
    )
    return (*gradients[:3], gradients[3].view(rpb.shape), gradients[4][:, 0])


@tunable(
    CONFIGS,
    backward_heuristic,
    problem=lambda saved, *_: saved.problem(),
    reference=lambda saved, *_: reference_gradients(saved)[0],
    name="contmix.grad_query",
)
def grad_query(saved: Saved, target: Tensor, delta: Tensor, *, config: Config) -> Tensor:
    """Σ_k ds[n,k] · projected[:,k] for one kernel size: fills ``target`` [B,G,Dq,H,W] and ``delta`` [B,G,H,W]."""
    problem = saved.problem()
    arguments = tensor_arguments(ONE_SIZE, **saved.but(), delta=delta, target=target)
    arguments |= tile_arguments(problem, config, saved.query, saved.value, saved.grad, saved.out, target)
    batch, groups = target.shape[:2]
    # One program per (tile of outputs, window, group, batch entry).
    grid = (arguments["tiles"] * arguments["windows"] * groups * batch,)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_query_kernel, grid, target.device, arguments, **options)
    return target


@tunable(
    CONFIGS,
    backward_heuristic,
    problem=lambda saved, *_: saved.problem(),
    reference=lambda saved, *_: reference_gradients(saved)[4],
    name="contmix.grad_value",
)
def grad_value(saved: Saved, target: Tensor, *, config: Config) -> Tensor:
    """Σ over (n, k) with nbr(n,k) = j of p[n,k] · grad[n,:], for one kernel size: fills ``target`` [B,G,Dv,H,W]."""
    problem = saved.problem()
    batch, groups, _, height, width = target.shape
    arguments = tensor_arguments(ONE_SIZE, **saved.but("value", "out"), target=target)
    arguments |= tile_arguments(problem, config, saved.query, saved.value, saved.grad, target)
    # One program per (block of inputs, group, batch entry).
    blocks = ceil_divide(height * width, config.block_steps) if problem.shared else arguments["tiles"]
    arguments["input_blocks"] = blocks
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(_grad_value_kernel, (blocks * groups * batch,), target.device, arguments, **options)
    return target
