"""Neighbourhood operators: windows that slide inward at the border, so that every output has K² true neighbours."""

from torch import Tensor

from kernels import reference
from kernels.aggregation.op import aggregate, aggregation_flops, correlate
from kernels.backend import get_backend, resolve
from kernels.checks import as_pair, check_shapes, check_tensors, check_window_fits, odd_pair
from kernels.layout import empty_like_layout, empty_softmax_outputs, settled
from kernels.neighborhood import eager
from kernels.registration import WINDOW, operator, spelled, window_of, without_autocast
from kernels.windows import Pair, Window


def kernel_first(tensor: Tensor, kernel_size: Pair) -> Tensor:
    """[B, heads, H, W, K²] seen as [B, heads, Kh, Kw, H, W]."""
    return settled(tensor).unflatten(-1, kernel_size).permute(0, 1, 4, 5, 2, 3)


def kernel_last(tensor: Tensor) -> Tensor:
    """[B, heads, Kh, Kw, H, W] seen as [B, heads, H, W, K²]."""
    return settled(tensor.permute(0, 1, 4, 5, 2, 3).flatten(4))


FEATURES, WEIGHTS = "B heads H W D", "B heads H W K²"


def _checked_window(
    kernel_size: int | Pair, dilation: int | Pair, rpb: Tensor | None = None, **tensors: tuple[Tensor, str]
) -> Window:
    """The window of the options, which must fit the map that the tensors of those shapes have."""
    (rows, columns), dilations = odd_pair("kernel_size", kernel_size), as_pair("dilation", dilation, 1)
    sizes = {"K²": rows * columns, "2Kh-1": 2 * rows - 1, "2Kw-1": 2 * columns - 1}
    sizes = check_shapes(sizes, **tensors, rpb=(rpb, "heads 2Kh-1 2Kw-1"))
    check_window_fits((rows, columns), dilations, sizes["H"], sizes["W"])
    return Window.neighborhood((rows, columns), dilations)


def na2d_av(attn: Tensor, value: Tensor, kernel_size: int | Pair, dilation: int | Pair = 1) -> Tensor:
    """out[b,h,i] = Σ_k attn[b,h,i,k] · value[b,h,nbr(i,k)], nbr(i,k) = start(i) + k·dilation  (clamped window)

    dvalue[j] = Σ_{(i,k) reaching j} attn[i,k] · dout[i];  dattn[i,k] = Σ_c dout[i,c] · value[nbr(i,k),c].

    Args:
        attn: [B, heads, H, W, K²], rows of the window first; used as it is (no softmax).
        value: [B, heads, H, W, D].
        kernel_size: odd window size K in positions; an int, or (rows, columns), as is dilation.
        dilation: pixels between window positions; kernel_size·dilation must not exceed the map.

    Returns:
        [B, heads, H, W, D].

    Raises:
        TypeError: an argument is not a floating tensor, the dtypes differ, or an option is not an int or pair of ints.
        ValueError: shapes, devices or options do not fit together.

    Source: arXiv 2204.07143, equation 3 (NATTEN's ``na2d_av``). Differentiable any number of times.
    """
    attn, value = check_tensors(attn=attn, value=value)
    window = _checked_window(kernel_size, dilation, value=(value, FEATURES), attn=(attn, WEIGHTS))
    backend = get_backend()
    if backend == "reference":
        return without_autocast(reference.na2d_av, attn, value, window.kernel_size, window.dilation)
    weight = kernel_first(attn, window.kernel_size)
    return aggregate(weight, value.movedim(4, 2), spelled(window), backend).movedim(2, 4)


def na2d_qk(
    query: Tensor, key: Tensor, kernel_size: int | Pair, dilation: int | Pair = 1, rpb: Tensor | None = None
) -> Tensor:
    """out[b,h,i,k] = Σ_c query[b,h,i,c] · key[b,h,nbr(i,k),c]  (+ rpb[h, (nbr(i,k) − i)/dilation + K − 1])

    dquery[i] = Σ_k dout[i,k] · key[nbr(i,k)];  dkey[j] = Σ_{(i,k) reaching j} dout[i,k] · query[i].

    Args:
        query, key: [B, heads, H, W, D]; no scale is applied.
        kernel_size: odd window size K in positions; an int, or (rows, columns), as is dilation.
        dilation: pixels between window positions; kernel_size·dilation must not exceed the map.
        rpb: relative position bias [heads, 2Kh − 1, 2Kw − 1], or None.

    Returns:
        [B, heads, H, W, K²], rows of the window first.

    Raises:
        TypeError: an argument is not a floating tensor, the dtypes differ, or an option is not an int or pair of ints.
        ValueError: shapes, devices or options do not fit together.

    Source: arXiv 2204.07143, equation 2 (NATTEN's ``na2d_qk``). Differentiable any number of times.
    """
    query, key, rpb = check_tensors(["rpb"], query=query, key=key, rpb=rpb)
    window = _checked_window(kernel_size, dilation, rpb, query=(query, FEATURES), key=(key, FEATURES))
    backend = get_backend()
    if backend == "reference":
        return without_autocast(reference.na2d_qk, query, key, window.kernel_size, window.dilation, rpb)
    logits = kernel_last(correlate(query.movedim(4, 2), key.movedim(4, 2), spelled(window), backend))
    return logits if rpb is None else logits + reference.rpb_logits(rpb, query.shape[2], query.shape[3], window)


def na2d_softmax_av(
    logits: Tensor, value: Tensor, kernel_size: int | Pair, *, rpb: Tensor | None = None, dilation: int | Pair = 1
) -> Tensor:
    """p[i,k] = softmax_k(logits[b,h,i,k] + rpb[h, (nbr(i,k) − i)/d + K − 1]);  out[i] = Σ_k p[i,k] · value[nbr(i,k)]

    dlogits[i,k] = p[i,k] · (Σ_c dout[i,c] · value[nbr(i,k),c] − Σ_c dout[i,c] · out[i,c]);
    dvalue[j] = Σ_{(i,k) reaching j} p[i,k] · dout[i];  drpb sums dlogits over all (b, i, k) with that distance.
    p is never stored: the backward pass computes it again from one number per pixel and head, log Σ_k exp.

    Args:
        logits: [B, heads, H, W, K²], rows of the window first.
        value: [B, heads, H, W, D].
        kernel_size: odd window size K in positions; an int, or (rows, columns), as is dilation.
        rpb: relative position bias [heads, 2Kh − 1, 2Kw − 1], or None.
        dilation: pixels between window positions; kernel_size·dilation must not exceed the map.

    Returns:
        [B, heads, H, W, D]. The softmax runs in float32 (float64 for float64 logits). Differentiable once.

    Raises:
        TypeError: an argument is not a floating tensor, the dtypes differ, or an option is not an int or pair of ints.
        ValueError: shapes, devices or options do not fit together.

    Source: arXiv 2204.07143, equations 2-4; with ContMix's logits, arXiv 2502.20087, equation 3.
    """
    logits, value, rpb = check_tensors(["rpb"], logits=logits, value=value, rpb=rpb)
    window = _checked_window(kernel_size, dilation, rpb, value=(value, FEATURES), logits=(logits, WEIGHTS))
    backend = get_backend()
    if backend == "reference":
        options = {"rpb": rpb, "dilation": window.dilation}
        return without_autocast(reference.na2d_softmax_av, logits, value, window.kernel_size, **options)
    maps = kernel_first(logits, window.kernel_size), value.movedim(4, 2)
    return _softmax_aggregate(*maps, rpb, spelled(window), backend)[0].movedim(2, 4)


@operator(
    "softmax_aggregate",
    f"(Tensor logits, Tensor value, Tensor? rpb, {WINDOW}, str backend) -> (Tensor, Tensor)",
    fake=lambda _logits, value, *_: empty_softmax_outputs(value),
    flops=lambda logits, value, *_: aggregation_flops(value, logits),
)
def _softmax_aggregate(logits, value, rpb, window, backend):
    """The output, and log Σ_k exp(logits + rpb) [B, G, H, W] in float32 (float64 for float64)."""
    if resolve(backend, value) == "triton":
        from kernels.neighborhood.passes import softmax_aggregate as run
    else:
        run = eager.softmax_aggregate
    return run(logits, value, rpb, window_of(window))


@operator(
    "softmax_aggregate_backward",
    f"(Tensor grad, Tensor logits, Tensor value, Tensor? rpb, {WINDOW}, str backend, Tensor out, Tensor log_sum_exp)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda _grad, logits, value, rpb, *_: (
        empty_like_layout(logits),
        empty_like_layout(value),
        value.new_empty(0 if rpb is None else rpb.shape),
    ),
    # As for every backward of two factors: one correlate and one transpose.
    flops=lambda grad, logits, *_: 2 * aggregation_flops(grad, logits),
)
def _softmax_aggregate_backward(grad, logits, value, rpb, window, backend, out, log_sum_exp):
    """Gradients of logits, value and rpb; the last is empty where there is no rpb."""
    if resolve(backend, value) == "triton":
        from kernels.neighborhood.passes import softmax_aggregate_backward as run
    else:
        run = eager.softmax_aggregate_backward
    grad_logits, grad_value, grad_rpb = run(grad, logits, value, rpb, out, log_sum_exp, window_of(window))
    return grad_logits, grad_value, value.new_empty(0) if grad_rpb is None else grad_rpb


_softmax_aggregate.differentiable_once(_softmax_aggregate_backward, "na2d_softmax_av")
