"""Involution: a convolution whose kernel belongs to the pixel and is shared by the channels of a group."""

from torch import Tensor

from kernels import reference
from kernels.aggregation.configs import in_one_piece, slides
from kernels.aggregation.op import aggregate, algebra
from kernels.backend import get_backend, resolve
from kernels.checks import LIMIT, as_int, as_pair, check_shapes, check_tensors
from kernels.dtypes import multiplies
from kernels.involution import generate
from kernels.layout import empty_like_layout, settled
from kernels.registration import WINDOW, operator, spelled, window_of, without_autocast
from kernels.windows import Pair, Window


def _checked_window(
    x: Tensor, kernel_size: Pair, stride: int | Pair, padding: int | Pair | None, dilation: int | Pair,
    **outputs: tuple[Tensor, str],
) -> Window:  # fmt: skip
    """The zero-padded window of the options, refused where it has no output, or others than a tensor of that shape has
    entries for, which may be because of an even kernel size."""
    strides, dilations = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
    if padding is None:
        paddings = ((kernel_size[0] - 1) * dilations[0] // 2, (kernel_size[1] - 1) * dilations[1] // 2)
    else:
        paddings = as_pair("padding", padding, 0)
    if max(x.shape[2] + 2 * paddings[0], x.shape[3] + 2 * paddings[1]) >= LIMIT:
        raise ValueError(f"padding must keep x of size {tuple(x.shape[2:])} below 2^31 pixels per side, got {paddings}")
    window = Window(kernel_size, strides, paddings, dilations)
    height, width = window.output_size(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise ValueError(
            f"a window of {kernel_size} (dilation {dilations}, padding {paddings}) does not fit x of size "
            f"{tuple(x.shape[2:])}: the output would be {height}x{width}"
        )
    try:
        check_shapes({"B": x.shape[0], "H'": height, "W'": width}, **outputs)
    except ValueError as error:
        if padding is not None or not any((k - 1) * d % 2 for k, d in zip(kernel_size, dilations, strict=True)):
            raise
        why = f"an even kernel size, here {kernel_size}, makes the map smaller where no padding is given"
        raise ValueError(f"{error}: {why}") from None
    return window


def _grouped(x: Tensor, groups: int) -> Tensor:
    """x [B, C, H, W] seen as [B, G, C/G, H, W]."""
    return settled(x).unflatten(1, (groups, x.shape[1] // groups))


def _options(window: Window) -> dict[str, Pair]:
    return {"stride": window.stride, "padding": window.padding, "dilation": window.dilation}


def involution2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
) -> Tensor:
    """out[b,c,i] = Σ_k weight[b, c // (C/G), k, i] · x[b, c, i·stride − padding + k·dilation]

    dx[b,c,j] = Σ_{(i,k) reaching j} weight[b,g,k,i] · dout[b,c,i];
    dweight[b,g,k,i] = Σ_{c in g} dout[b,c,i] · x[b,c,nbr(i,k)].

    Args:
        x: features [B, C, H, W]; positions outside it read 0.
        weight: dynamic kernels [B, G, Kh, Kw, H', W'], one per output pixel and group of C/G contiguous channels.
        stride: pixels between output positions; an int, or (rows, columns) here and below.
        padding: zeros before and after each axis; None means (K − 1)·dilation // 2.
        dilation: pixels between window positions.

    Returns:
        [B, C, H', W'] in the memory format of x, H' = (H + 2·padding − dilation·(K − 1) − 1) // stride + 1.

    Raises:
        TypeError: an argument is not a floating tensor, the dtypes differ, or an option is not an int or pair of ints.
        ValueError: shapes, devices or options do not fit together.

    Source: arXiv 2103.06255, equation 4. Differentiable any number of times.
    """
    x, weight = check_tensors(x=x, weight=weight)
    kernel = weight, "B G Kh Kw H' W'"
    check_shapes(x=(x, "B C H W"), weight=kernel)
    channels, groups, kernel_size = x.shape[1], weight.shape[1], (weight.shape[2], weight.shape[3])
    if channels % groups:
        raise ValueError(f"weight has {groups} groups, which must divide the {channels} channels of x")
    window = _checked_window(x, kernel_size, stride, padding, dilation, weight=kernel)
    backend = get_backend()
    if backend == "reference":
        return without_autocast(reference.involution2d, x, weight, **_options(window))
    out = aggregate(weight, _grouped(x, groups), spelled(window), backend)
    return settled(out.flatten(1, 2))


def involution2d_generate(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Pair,
    groups: int,
    stride: int | Pair = 1,
    padding: int | Pair | None = None,
    dilation: int | Pair = 1,
) -> Tensor:
    """kernel[b,g,k,i] = Σ_r weight[g·K² + k, r] · features[b,r,i] + bias[g·K² + k];  out = involution2d(x, kernel)

    The same numbers as a 1×1 convolution (the span convolution of arXiv 2103.06255, figure 2) followed by
    ``involution2d``, but the kernels [B, G, K, K, H', W'], in RedNet three times the size of x, are never stored: a
    Triton kernel generates those of its own pixels; the eager path and the backward pass hold a few MB at a time.

    Args:
        x: [B, C, H, W]; positions outside it read 0.
        features: what the kernels are computed from, [B, R, H', W'], one position per output pixel.
        weight: [Kh·Kw·groups, R], a group's window positions together, rows of the window first.
        bias: [Kh·Kw·groups] or None.
        kernel_size: an int, or (rows, columns) here and below.
        groups: kernels per pixel; C/groups contiguous channels share one.
        stride, padding, dilation: as in ``involution2d``.

    Returns:
        [B, C, H', W'] in the memory format of x. Differentiable once, in every tensor argument.

    Raises:
        TypeError: an argument is not a floating tensor, the dtypes differ, or an option is not an int or pair of ints.
        ValueError: shapes, devices or options do not fit together.
    """
    x, features, weight, bias = check_tensors(["bias"], x=x, features=features, weight=weight, bias=bias)
    kernel_sizes, groups = as_pair("kernel_size", kernel_size, 1), as_int("groups", groups, 1)
    outputs = features, "B R H' W'"
    sizes = check_shapes(x=(x, "B C H W"), features=outputs)
    if x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    window = _checked_window(x, kernel_sizes, stride, padding, dilation, features=outputs)
    sizes["Kh·Kw·G"] = kernel_sizes[0] * kernel_sizes[1] * groups
    check_shapes(sizes, weight=(weight, "Kh·Kw·G R"), bias=(bias, "Kh·Kw·G"))
    backend = get_backend()
    if backend == "reference":
        options = {"kernel_size": kernel_sizes, "groups": groups, **_options(window)}
        return without_autocast(reference.involution2d_generate, x, features, weight, bias, **options)
    out = _generate(_grouped(x, groups), features, weight, bias, spelled(window), backend)
    return settled(out.flatten(1, 2))


def _fused(backend: str, window: Window, *maps: Tensor) -> bool:
    """Whether one launch generates and uses the kernels."""
    triton = "eager" not in [resolve(backend, each) for each in maps]
    return triton and slides(window) and in_one_piece(window) and multiplies(maps[0].dtype)


def _flops(x, features, weight, *_) -> int:
    """R per entry of the kernels, and C/G for using it."""
    batch, number, height, width = features
    return 2 * batch * height * width * weight[0] * (number + x[2])


@operator(
    "involution_generate",
    f"(Tensor x, Tensor features, Tensor weight, Tensor? bias, {WINDOW}, str backend) -> Tensor",
    fake=lambda x, features, *_: empty_like_layout(x, (*x.shape[:3], *features.shape[2:])),
    flops=_flops,
)
def _generate(x, features, weight, bias, window, backend):
    window = window_of(window)
    if _fused(backend, window, x, features):
        from kernels.involution.forward import forward

        return forward(x, features, weight, bias, window)
    return generate.forward(x, features, weight, bias, window, algebra(backend, window, x))


@operator(
    "involution_generate_backward",
    f"(Tensor grad, Tensor x, Tensor features, Tensor weight, Tensor? bias, {WINDOW}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda _grad, x, features, weight, *_: (
        empty_like_layout(x),
        empty_like_layout(features),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    ),
    # Two products for each of the forward pass's; the kernels, generated again, are not counted.
    flops=lambda _grad, *forward: 2 * _flops(*forward),
)
def _generate_backward(grad, x, features, weight, bias, window, backend):
    """Gradients of x, features, weight and bias."""
    window = window_of(window)
    if _fused(backend, window, x, features):
        from kernels.involution.backward import backward

        return backward(grad, x, features, weight, bias, window)
    return generate.backward(grad, x, features, weight, bias, window, algebra(backend, window, x))


_generate.differentiable_once(_generate_backward, "involution2d_generate")
