"""RedNet beyond the rules for every family: its module and its neck against their definitions, training."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels
from models.rednet import Involution2d, InvolutionFPN, rednet26
from tests.models.families import narrow
from tests.support import DEVICE, GRADIENT_TOLERANCE, assert_close, golden_fill, random_tensor

# ---- the neck


def pyramid_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Sizes that halve to the next integer above."""
    return [random_tensor(2, c, h, w, dtype=dtype) for c, h, w in ((8, 13, 18), (12, 7, 9), (20, 4, 5))]


def test_involution_fpn_follows_its_definition():
    neck: Any = InvolutionFPN((8, 12, 20), 16, num_outs=5, group_channels=4).double().eval().to(DEVICE)
    golden_fill().fill_(neck)
    maps = [x.requires_grad_() for x in pyramid_inputs(torch.float64)]
    outs = neck(maps)
    assert [tuple(out.shape) for out in outs] == [(2, 16, *size) for size in ((13, 18), (7, 9), (4, 5), (2, 3), (1, 2))]
    merged = None
    for level in (2, 1, 0):
        conv, involution = neck.lateral_convs[level], neck.fpn_convs[level]
        lateral = F.conv2d(maps[level], conv.weight, conv.bias)
        if merged is not None:  # pixel i looks at pixel ⌊i · coarse / fine⌋
            (h, w), (coarse_h, coarse_w) = lateral.shape[2:], merged.shape[2:]
            rows, columns = torch.arange(h) * coarse_h // h, torch.arange(w) * coarse_w // w
            lateral = lateral + merged[:, :, rows[:, None], columns]
        merged = lateral
        weight = involution.conv2(involution.conv1(merged)).unflatten(1, (4, 7, 7))
        assert_close(outs[level], kernels.reference.involution2d(merged, weight), 1e-12, f"level {level}")
    assert torch.equal(outs[3], outs[2][:, :, ::2, ::2])
    assert torch.equal(outs[4], outs[3][:, :, ::2, ::2])

    tensors = [*maps, *neck.parameters()]
    grads = torch.autograd.grad(torch.cat([out.flatten() for out in outs]).square().sum(), tensors)
    with kernels.use_backend("reference"):
        outs = neck(maps)
    expected = torch.autograd.grad(torch.cat([out.flatten() for out in outs]).square().sum(), tensors)
    for ours, other in zip(grads, expected, strict=True):
        assert other.norm() > 0
        assert_close(ours, other, GRADIENT_TOLERANCE[torch.float64])


@torch.no_grad()
def test_involution_fpn_stands_on_a_backbone():
    backbone = narrow("rednet", depths=(1, 1, 1, 1), features_only=True, out_indices=(1, 2, 3)).to(DEVICE)
    neck = InvolutionFPN([info["num_chs"] for info in backbone.feature_info[1:]]).eval().to(DEVICE)
    pyramid = neck(backbone(random_tensor(1, 3, 65, 96)))
    assert [tuple(out.shape) for out in pyramid] == [(1, 256, 9, 12), (1, 256, 5, 6), (1, 256, 3, 3)]


def test_bad_pyramids_are_named():
    for channels, options, message in (
        ((), {}, "in_channels must be positive"),
        ((8, 12), {"num_outs": 1}, "num_outs must be at least the number of maps, 2, got 1"),
        ((8, 12), {"out_channels": 24}, "group_channels must divide channels = 24"),
    ):
        with pytest.raises(ValueError, match=message):
            InvolutionFPN(channels, **options)
    with pytest.raises(ValueError, match=r"maps must be 2 of \[8, 12\] channels, got \[8, 12, 20\]"):
        InvolutionFPN((8, 12), 16).to(DEVICE)(pyramid_inputs(torch.float32))


# ---- the definition, at sizes the official code cannot run


def involution_by_definition(module: Involution2d, x: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel, for a batch of one."""
    _, channels, height, width = x.shape
    size, stride, dilation = module.kernel_size, module.stride, module.dilation
    rows, columns = -(-height // stride), -(-width // stride)
    pooled = torch.stack(
        [
            x[:, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].mean((2, 3))
            for i in range(rows)
            for j in range(columns)
        ],
        -1,
    ).view(1, channels, rows, columns)
    weight = module.conv2(module.conv1(pooled)).view(module.groups, size, size, rows, columns)
    out = torch.zeros(1, channels, rows, columns, dtype=x.dtype, device=x.device)
    for c in range(channels):
        for i in range(rows):
            for j in range(columns):
                for u in range(size):
                    for v in range(size):
                        y = i * stride + (u - size // 2) * dilation
                        z = j * stride + (v - size // 2) * dilation
                        if 0 <= y < height and 0 <= z < width:
                            out[0, c, i, j] += weight[c * module.groups // channels, u, v, i, j] * x[0, c, y, z]
    return out


@pytest.mark.parametrize(("stride", "dilation", "size"), [(1, 1, (5, 4)), (2, 1, (5, 7)), (3, 2, (7, 8))])
@torch.no_grad()
def test_involution_module_follows_its_definition(stride, dilation, size):
    module = Involution2d(8, 3, stride, dilation=dilation, group_channels=4, reduction=2).double().to(DEVICE)
    golden_fill().fill_(module.eval())
    x = random_tensor(1, 8, *size, dtype=torch.float64)
    assert_close(module(x), involution_by_definition(module, x), 1e-12)


def test_involution_module_differentiates():
    module = Involution2d(8, 3, 2, group_channels=4, reduction=2).double().to(DEVICE)
    x = random_tensor(2, 8, 5, 3, dtype=torch.float64).requires_grad_()
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


# ---- training


def test_a_fresh_block_is_its_shortcut():
    block = rednet26(num_classes=2).get_submodule("layer2.1").eval()
    x = random_tensor(1, 512, 7, 7, device="cpu").relu()
    assert torch.equal(block(x), x)
