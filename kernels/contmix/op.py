"""ContMix: every pixel mixes its neighbourhood with kernels generated from its affinity to the whole image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import get_backend, resolve
from kernels.checks import check_shapes, check_tensors, check_window_fits, odd_int
from kernels.contmix import eager
from kernels.dtypes import at_least_float32
from kernels.layout import empty_like_layout, empty_softmax_outputs
from kernels.registration import operator, without_autocast


def contmix2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rpb: Sequence[Tensor],
    *,
    kernel_sizes: Sequence[int],
) -> Tensor:
    """affinity[n,l] = Σ_c query[c,n] · key[c,l];  logits[n,:] = P @ affinity[n,:] + proj_bias, cut by kernel size;
    out[m,:,n] = Σ_k softmax_k(logits_m[n,:] + rpb_m)[k] · value[m,:,nbr_m(n,k)]   for every batch entry and group

    Both steps before the softmax are linear, so they are computed in the other order: keys projected once,
    projected[c,k] = Σ_l key[c,l] · proj_weight[k,l], then logits[n,k] = Σ_c query[c,n] · projected[c,k] + proj_bias[k].
    That needs no affinity tensor and Dq instead of Dq·L/ΣK² + L multiply-adds per logit (16 instead of 53 in OverLoCK).
    The logits are never stored whole: a kernel computes those of its own pixels (Triton, in 16 bits or where outputs
    share windows), or some megabytes live at a time.

    Args:
        query: [B, G, Dq, H, W]; no scale is applied.
        key: [B, G, Dq, L], the context: OverLoCK pools it to 7x7, so L = 49.
        value: [B, M, G, Dv, H, W], one set of channels per kernel size.
        proj_weight: [ΣK_m², L], rows of the first kernel size first; shared by all groups.
        proj_bias: [ΣK_m²].
        rpb: M relative position biases [G, 2K_m − 1, 2K_m − 1].
        kernel_sizes: M odd window sizes, none larger than the map.

    Returns:
        [B, M, G, Dv, H, W]. Differentiable once, in every tensor argument.

        A value that is not finite reaches the outputs that see it, and one in the output's gradient the gradients of
        what that output saw; in Triton's products of 16-bit numbers it may reach what lies next to these, too.

    Raises:
        TypeError: an argument is not a floating tensor, the dtypes differ, or rpb or kernel_sizes is not a sequence.
        ValueError: shapes, devices or sizes do not fit together.

    Source: arXiv 2502.20087, equations 1-3.
    """
    if not isinstance(kernel_sizes, (tuple, list)) or not kernel_sizes:
        raise TypeError(f"kernel_sizes must be a non-empty sequence of odd ints, got {kernel_sizes!r}")
    if not isinstance(rpb, (tuple, list)):
        raise TypeError(f"rpb must be a sequence of {len(kernel_sizes)} tensors, got {type(rpb).__name__}")
    if len(rpb) != len(kernel_sizes):
        raise ValueError(f"rpb must hold one tensor per kernel size ({len(kernel_sizes)}), got {len(rpb)}")
    sizes = [odd_int(f"kernel_sizes[{m}]", size) for m, size in enumerate(kernel_sizes)]
    tables = {f"rpb[{m}]": table for m, table in enumerate(rpb)}
    query, key, value, proj_weight, proj_bias, *biases = check_tensors(
        query=query, key=key, value=value, proj_weight=proj_weight, proj_bias=proj_bias, **tables
    )
    shapes = check_shapes(
        {"M": len(sizes), "ΣK²": sum(size**2 for size in sizes)},
        query=(query, "B G Dq H W"), key=(key, "B G Dq L"), value=(value, "B M G Dv H W"),
        proj_weight=(proj_weight, "ΣK² L"), proj_bias=(proj_bias, "ΣK²"),
    )  # fmt: skip
    for (name, table), size in zip(tables.items(), sizes, strict=True):
        check_shapes({"G": shapes["G"], "2K-1": 2 * size - 1}, **{name: (table, "G 2K-1 2K-1")})
        check_window_fits((size, size), (1, 1), shapes["H"], shapes["W"])
    backend = get_backend()
    if backend == "reference":
        inputs = query, key, value, proj_weight, proj_bias, biases
        return without_autocast(reference.contmix2d, *inputs, kernel_sizes=tuple(sizes))
    return _contmix(query, key, proj_weight, proj_bias, biases, value, sizes, backend)[0]


def _matrix(key: Tensor) -> Tensor:
    """[B·G·Dq, L]"""
    return key.flatten(0, 2)


def _projected(key: Tensor, proj_weight: Tensor) -> Tensor:
    """projected[c,k] = Σ_l key[c,l] · proj_weight[k,l], [B, G, Dq, ΣK²]: in float32 at least, for rounding between two
    linear steps would reach the logits; channels adjacent in memory, so that each window position is one read."""
    if key.device.type == "cuda" and torch.version.cuda and key.dtype.itemsize == 2:
        projected = torch.mm(proj_weight, _matrix(key).t(), out_dtype=torch.float32)
    else:
        wide_key, wide_weight = at_least_float32(key, proj_weight)
        projected = wide_weight @ _matrix(wide_key).t()
    return projected.view(proj_weight.shape[0], *key.shape[:3]).permute(1, 2, 3, 0)


def _on_triton(backend: str, value: Tensor) -> bool:
    """Whether Triton computes this, which is imported at the first use and not before."""
    return resolve(backend, value) == "triton" and value.numel() > 0


def _multiply_adds(times: tuple[int, int, int], query, key, proj_weight, _bias, _rpb, value, *_) -> int:
    """So many times the projections of keys, the products of query and key, and the sums of values."""
    batch, groups, query_channels, height, width = query
    projections, logits, sums = times
    per_pixel = logits * query_channels + sums * value[3]
    per_position = projections * key[3] * query_channels + height * width * per_pixel
    return batch * groups * proj_weight[0] * per_position


def _fake_outputs(_query, key, proj_weight, _bias, _rpb, value, *_):
    out, statistics = empty_softmax_outputs(value)
    projected = statistics.new_empty((proj_weight.shape[0], *key.shape[:3])).permute(1, 2, 3, 0)
    return out, statistics, projected


@operator(
    "contmix",
    "(Tensor query, Tensor key, Tensor proj_weight, Tensor bias, Tensor[] rpb, Tensor value, int[] kernel_sizes,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_outputs,
    flops=lambda *shapes: 2 * _multiply_adds((1, 1, 1), *shapes),
)
def _contmix(query, key, proj_weight, bias, rpb, value, kernel_sizes, backend):
    """The output; log Σ_k exp of every softmax [B, M, G, H, W] and projected keys [B, G, Dq, ΣK²], both in float32
    (float64 for float64)."""
    projected = _projected(key, proj_weight)
    if not _on_triton(backend, value):
        return *eager.contmix(query, projected, bias, rpb, value, kernel_sizes), projected
    from kernels.contmix import passes

    read_query, read_value = passes.as_read(query), passes.as_read(value)
    keys = passes.keys_as_read(projected, read_query.shape[2])
    out, statistics = passes.contmix(read_query, keys, bias, rpb, read_value, kernel_sizes)
    return passes.as_given(out, read_value, value), statistics, projected


def _fake_gradients(_grad, query, key, proj_weight, bias, rpb, value, *_):
    grad_query, grad_value = (empty_like_layout(t) for t in (query, value))
    grad_key, grad_weight, grad_bias, *grad_tables = (t.new_empty(t.shape) for t in (key, proj_weight, bias, *rpb))
    return grad_query, grad_key, grad_weight, grad_bias, grad_tables, grad_value


@operator(
    "contmix_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor proj_weight, Tensor bias, Tensor[] rpb, Tensor value,"
    " int[] kernel_sizes, str backend, Tensor out, Tensor statistics, Tensor projected)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor)",
    fake=_fake_gradients,
    # The logits again, and two products for each of the forward pass's.
    flops=lambda _grad, *shapes: 2 * _multiply_adds((2, 3, 2), *shapes),
)
def _contmix_backward(
    grad, query, key, proj_weight, bias, rpb, value, kernel_sizes, backend, out, statistics, projected
):  # fmt: skip
    """Gradients of query, key, proj_weight, bias, rpb and value."""
    if _on_triton(backend, value):
        from kernels.contmix import passes

        read_query, read_value = passes.as_read(query), passes.as_read(value)
        keys = passes.keys_as_read(projected, read_query.shape[2])
        grad_query, grad_projected, grad_bias, grad_value, *grad_rpb = passes.contmix_backward(
            passes.as_read(grad), read_query, keys, bias, rpb, read_value, passes.as_read(out), statistics, kernel_sizes
        )
        grad_query = passes.as_given(grad_query, read_query, query)
        grad_value = passes.as_given(grad_value, read_value, value)
        grad_projected = grad_projected[:, :, : query.shape[2]]
    else:
        grad_query, grad_projected, grad_bias, grad_rpb, grad_value = eager.contmix_backward(
            grad, query, projected, bias, rpb, value, out, statistics, kernel_sizes
        )
    grad_projected = grad_projected.permute(3, 0, 1, 2).flatten(1)  # [ΣK², B·G·Dq]
    wide_key, wide_weight = (tensor.to(grad_projected.dtype) for tensor in (key, proj_weight))
    grad_key = (grad_projected.t() @ wide_weight).to(key.dtype).view(key.shape)
    grad_weight = (grad_projected @ _matrix(wide_key)).to(key.dtype)
    return grad_query, grad_key, grad_weight, grad_bias, grad_rpb, grad_value


_contmix.differentiable_once(_contmix_backward, "contmix2d")
