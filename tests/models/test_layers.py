"""Each layer against its formula, in float64 where nothing forbids it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from models import layers
from models.layers import ContMix, DropPath, GlobalResponseNorm, Involution2d, OutlookAttention
from models.layers.pointwise import PaddedConv2d
from tests.support import (
    DEVICE,
    assert_close,
    channels_last,
    names_of,
    random_tensor,
    randomise,
    triton_device,
    watching,
)

TOLERANCE = 1e-12


def named(value: Any) -> str:
    """Of a row of a table: the layer that it is about."""
    return type(value).__name__ if isinstance(value, nn.Module) else ""


def assert_gradients(out: torch.Tensor, expected: torch.Tensor, inputs: Any) -> None:
    found, right = (torch.autograd.grad(y.sin().sum(), inputs) for y in (out, expected))
    assert_close(found, right, 1e-13)


def test_drop_path():
    layer, x = DropPath(0.25), torch.ones(2000, 2, 3)
    y = layer(x)
    dropped = (y == 0).flatten(1).all(1)
    assert torch.equal(y[~dropped], x[~dropped] / 0.75)
    assert 0.2 < dropped.float().mean() < 0.3
    assert layer.eval()(x) is x
    assert DropPath(0.0)(x) is x


def layer_norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


def squeeze_excite(layer: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = layer.proj[1], layer.proj[3]
    squeezed = F.gelu(x.mean((2, 3)) @ first.weight.flatten(1).t() + first.bias)
    return x * torch.sigmoid(squeezed @ second.weight.flatten(1).t() + second.bias)[..., None, None]


def residual(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x + F.conv2d(x, layer.weight, layer.bias, padding=1, groups=6)


def response_norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
    norm = x.square().sum((2, 3), keepdim=True).sqrt()
    return x * (layer.gamma * norm / (norm.mean(1, keepdim=True) + 1e-6) + 1) + layer.beta


@pytest.mark.parametrize(
    ("layer", "definition"),
    [
        (layers.LayerNorm2d(6, eps=1e-6), layer_norm),
        (layers.GELU2d(), lambda _, x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        (layers.LayerScale(6), lambda layer, x: F.conv2d(x, layer.weight, layer.bias, groups=6)),  # a 1×1 depthwise one
        (layers.SqueezeExcite(6), squeeze_excite),
        (layers.ResidualDepthwiseConv2d(6), residual),
        (GlobalResponseNorm(6), response_norm),
    ],
    ids=named,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_plain_layers(layer, definition, memory_format):
    """The output has the memory format of the input; that of a norm is channels-last whatever comes in."""
    x = random_tensor(2, 6, 4, 5, dtype=torch.float64, device="cpu").contiguous(memory_format=memory_format)
    out = randomise(layer)(x)
    assert_close(out, definition(layer, x), TOLERANCE)
    last = isinstance(layer, layers.LayerNorm2d)
    if not isinstance(layer, GlobalResponseNorm):
        assert out.is_contiguous(memory_format=torch.channels_last if last else memory_format)


def test_global_response_norm_in_16_bits_and_of_a_silent_channel():
    layer, x = randomise(GlobalResponseNorm(6), torch.bfloat16), random_tensor(2, 6, 4, 5, device="cpu").bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_close(out, response_norm(layer.double(), x.double()), 1e-2)
    silent = x.double().index_fill(1, torch.tensor([1]), 0).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(silent).sum(), silent)
    assert gradient.isfinite().all()


def test_pointwise_convolution_as_a_matrix_product(monkeypatch):
    layer = randomise(layers.PointwiseConv2d(6, 5)).to(DEVICE)
    whole = random_tensor(3, 8, 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    maps = [whole[:, :6], whole[:, 2:], whole[:1, :6], whole[:, :6, :1], whole[:, :6, :1, :1], whole[:, :6, :, :1]]
    expected = [F.conv2d(x, layer.weight, layer.bias) for x in maps]
    monkeypatch.setattr("models.layers.pointwise.in_16_bits_on_gpu", lambda _: True)
    assert_close([layer(x) for x in maps], expected, 1e-14)
    assert_gradients(layer(maps[0]), expected[0], list(layer.parameters()))
    layer.requires_grad_(False).relu = True
    assert_close([layer(x) for x in maps], [F.relu(out) for out in expected], 1e-14)
    x = maps[0].requires_grad_()
    assert_gradients(layer(x), F.relu(F.conv2d(x, layer.weight, layer.bias)), x)


@pytest.mark.parametrize("channels", [(3, 16), (16, 3), (11, 5), (8, 16)])
@pytest.mark.parametrize(("name", "options"), [("linear", {}), ("conv2d", {"kernel_size": 3, "padding": 1})])
def test_channels_are_padded_to_what_matrix_units_take(name, options, channels, monkeypatch):
    kind = PaddedConv2d if options else layers.PointwiseConv2d
    layer = randomise(kind(*channels, **options)).to(DEVICE)
    x = channels_last(random_tensor(2, channels[0], 7, 6, dtype=torch.float64)).requires_grad_()
    expected, function, seen = nn.Conv2d.forward(layer, x), getattr(F, name), []

    def watched(x, weight, *rest):
        seen.extend([x.shape[1], weight.shape[1], weight.shape[0]])
        return function(x, weight, *rest)

    monkeypatch.setattr("models.layers.pointwise.in_16_bits_on_gpu", lambda _: True)
    monkeypatch.setattr(F, name, watched)
    out = layer(x)
    assert_close(out, expected, 1e-14)
    assert_gradients(out, expected, [x, *layer.parameters()])
    image = bool(options) and channels[0] < 8
    assert [size % 8 for size in seen] == ([3, 3, 0] if image else [0, 0, 0])


@pytest.mark.parametrize("autocast", [False, True])
def test_convolution_of_images(autocast):
    """The kernel takes images of few channels, with ReLU where inference sets it; all else is PyTorch's convolution."""
    device = triton_device()
    x = channels_last(random_tensor(2, 3, 9, 8, dtype=torch.float32 if autocast else torch.float16)).to(device)
    plain = {"kernel_size": 3, "stride": 2, "padding": 1}
    others = ({"dilation": 2}, {"stride": (1, 2)}, {"kernel_size": (3, 1)}, {"padding": "same", "stride": 1})
    others += ({"padding_mode": "reflect"}, {"out_channels": 3, "groups": 3})
    for changed in ({}, {"bias": False}, *others):
        layer = randomise(PaddedConv2d(3, **{"out_channels": 6, **plain, **changed}), torch.float32).to(device)
        expected = nn.Conv2d.forward(layer, x.float())
        gradient = torch.autograd.grad(expected.sum(), layer.weight)
        layer = layer if autocast else layer.half()
        for layer.relu in (True, False):
            with kernels.use_backend("triton"), torch.autocast(device, torch.float16, autocast), watching() as launched:
                out = layer(x)
            assert_close(out, F.relu(expected) if layer.relu else expected, 1e-3)
            assert names_of(launched)["image_kernel"] == (changed not in others)
        assert_close(torch.autograd.grad(out.sum(), layer.weight), gradient, 1e-3)


@pytest.mark.parametrize(("size", "dilation"), [(3, 2), (3, 4), (5, 2)])
def test_dilated_depthwise_convolution_as_a_dense_one(size, dilation, monkeypatch):
    layer = randomise(layers.DepthwiseConv2d(4, size, dilation=dilation)).to(DEVICE)
    x = random_tensor(2, 4, 9, 10, dtype=torch.float64).requires_grad_()
    expected = F.conv2d(x, layer.weight, layer.bias, padding=layer.padding, dilation=dilation, groups=4)
    monkeypatch.setattr("models.layers.depthwise.in_16_bits_on_gpu", lambda _: True)
    out = layer(x)
    assert_close(out, expected, 1e-14)
    assert_gradients(out, expected, [x, *layer.parameters()])


# ---- the three layers that compute kernels


def pooled(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The mean of every stride × stride pixels; at the border, of those that exist."""
    rows = [x[:, :, i : i + stride].split(stride, 3) for i in range(0, x.shape[2], stride)]
    return torch.stack([torch.stack([pixels.mean((2, 3)) for pixels in row], -1) for row in rows], -2)


def involution(layer: Involution2d, x: torch.Tensor) -> torch.Tensor:
    """By unfolding, as the official code's fallback."""
    size, dilation, summary = layer.kernel_size, layer.dilation, pooled(x, layer.stride)
    weight = layer.conv2(layer.conv1(summary)).unflatten(1, (layer.groups, 1, size**2))
    patches = F.unfold(x, size, dilation, size // 2 * dilation, layer.stride)
    patches = patches.unflatten(1, (layer.groups, -1, size**2)).unflatten(-1, summary.shape[2:])
    return (weight * patches).sum(3).flatten(1, 2)


def outlook(layer: OutlookAttention, x: torch.Tensor) -> torch.Tensor:
    """By unfolding and folding, as the official code."""
    taps, heads = layer.kernel_size**2, layer.num_heads
    window: Any = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.kernel_size // 2}
    logits = layer.attn(pooled(x.movedim(3, 1), layer.stride).flatten(2).mT).unflatten(-1, (heads, taps, taps))
    attention = (logits * (layer.dim // heads) ** -0.5).softmax(-1)  # [B, windows, heads, K², K²]
    value = F.unfold(layer.v(x).movedim(3, 1), **window).unflatten(1, (heads, -1, taps))
    mixed = torch.einsum("bwhts,bhcsw->bhctw", attention, value).flatten(1, 3)
    return layer.proj(F.fold(mixed, x.shape[1:3], **window).movedim(1, 3))


def contmix(layer: ContMix, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """By the definition of the operator, on maps that are enlarged where they are smaller than the kernel."""
    enlarged, bias = layer.mixing_size(x.shape[2], x.shape[3]), layer.weight_proj.bias
    assert bias is not None
    big, features = (F.interpolate(t, enlarged, mode="bilinear") for t in (x, features))
    query, key = layer.weight_query(features[:, : layer.channels]), layer.weight_key(features[:, layer.channels :])
    heads = (layer.num_heads, layer.channels // 2 // layer.num_heads)
    mixed = kernels.reference.contmix2d(
        query.unflatten(1, heads) * (layer.channels / layer.num_heads) ** -0.5,
        key.unflatten(1, heads).flatten(3),
        big.unflatten(1, (2, *heads)),
        layer.weight_proj.weight.flatten(1),
        bias,
        [layer.rpb1, layer.rpb2],
        kernel_sizes=layer.kernel_sizes,
    )
    return F.adaptive_avg_pool2d(mixed.flatten(1, 3), (x.shape[2], x.shape[3]))


def mixing(*size: int) -> list[tuple[int, ...]]:
    return [(2, 12, *size), (2, 17, *size)]


@pytest.mark.parametrize(
    ("layer", "definition", "shapes"),
    [
        (Involution2d(8, 3, group_channels=4, reduction=2), involution, [(1, 8, 5, 4)]),
        (Involution2d(8, 3, 2, group_channels=4, reduction=2), involution, [(1, 8, 5, 7)]),
        (Involution2d(8, 3, 3, dilation=2, group_channels=4, reduction=2), involution, [(1, 8, 7, 8)]),
        (OutlookAttention(8, 2), outlook, [(1, 5, 7, 8)]),
        (OutlookAttention(8, 2, stride=1), outlook, [(1, 4, 3, 8)]),
        (OutlookAttention(8, 2, kernel_size=5, stride=3), outlook, [(1, 7, 6, 8)]),
        *((ContMix(12, 5, 7, num_heads=2), contmix, mixing(*size)) for size in ((9, 8), (4, 7), (3, 3))),
    ],
    ids=named,
)
@torch.no_grad()
def test_dynamic_layers(layer, definition, shapes):
    layer = randomise(layer).to(DEVICE).eval()
    inputs = [random_tensor(*shape, dtype=torch.float64) for shape in shapes]
    assert_close(layer(*inputs), definition(layer, *inputs), 1e-11)


def test_contmix_mixing_size():
    for kernel_size in (5, 7, 13, 15, 17, 31):
        layer = ContMix(4, 1, kernel_size, num_heads=1)
        for short in range(1, kernel_size + 2):
            for long in range(short, 60):
                enlarged = kernel_size, max(kernel_size, int(kernel_size / short * long))
                expected = (short, long) if short >= kernel_size else enlarged
                assert layer.mixing_size(short, long) == layer.mixing_size(long, short)[::-1] == expected
    assert ContMix(4, 1, 15, num_heads=1).mixing_size(11, 11) == (15, 15)  # 15 / 11 · 11 < 15 in floating point


# ---- refusals


GOOD: dict[Any, dict[str, Any]] = {
    ContMix: {"channels": 16, "context_channels": 4, "kernel_size": 7, "num_heads": 2},
    Involution2d: {"channels": 16},
    OutlookAttention: {"dim": 16, "num_heads": 2},
    layers.DilatedReparamBlock: {"channels": 4},
}


@pytest.mark.parametrize(
    ("layer", "option", "value", "message"),
    [
        (ContMix, "num_heads", 3, "channels must be a multiple of .*= 6, got 16"),
        (ContMix, "num_heads", 0, "num_heads must be >= 1, got 0"),
        (ContMix, "kernel_size", 6, "kernel_size must be odd, got 6"),
        (ContMix, "context_channels", 0, "context_channels must be >= 1, got 0"),
        (Involution2d, "kernel_size", 4, "kernel_size must be odd, got 4"),
        (Involution2d, "kernel_size", -1, "kernel_size must be >= 1, got -1"),
        (Involution2d, "stride", 0, "stride must be >= 1, got 0"),
        (Involution2d, "dilation", 0, "dilation must be >= 1, got 0"),
        (Involution2d, "group_channels", 5, "group_channels must divide channels = 16, got 5"),
        (Involution2d, "reduction", 64, "reduction must divide channels = 16, got 64"),
        (OutlookAttention, "kernel_size", 4, "kernel_size must be odd, got 4"),
        (OutlookAttention, "stride", 4, "stride must lie in 1..kernel_size = 3"),
        (OutlookAttention, "num_heads", 3, "num_heads must divide dim = 16, got 3"),
        (layers.DilatedReparamBlock, "kernel_size", 9, "kernel_size must be one of .*got 9"),
    ],
)
def test_bad_options_are_named(layer, option, value, message):
    with pytest.raises(ValueError, match=message):
        layer(**{**GOOD[layer], option: value})


def test_bad_images_are_named():
    x, mixer = torch.zeros(2, 8, 16, 16), ContMix(8, 4, 7, num_heads=1)
    for call, message in (
        (lambda: Involution2d(16, group_channels=8)(x), r"x must have shape \[B, 16, H, W\], got \[2, 8, 16, 16\]"),
        (lambda: OutlookAttention(8, 2)(x), r"x must have shape \[B, H, W, 8\], got \[2, 8, 16, 16\]"),
        (lambda: mixer(x[:, :4], x), r"x must have shape \[B, 8, H, W\], got \[2, 4, 16, 16\]"),
        (lambda: mixer(x, x), r"features must have shape \[2, 12, 16, 16\].*got \[2, 8, 16, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
