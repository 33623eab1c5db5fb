"""RedNet beyond the rules for every family: its neck against its definition, and how a block begins."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels
from models.rednet import InvolutionFPN, rednet26
from tests.support import DEVICE, GRADIENT_TOLERANCE, assert_close, golden_fill, random_tensor


def pyramid_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Maps whose sides halve and round up from level to level."""
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

    found = []
    for backend in ("auto", "reference"):
        with kernels.use_backend(backend):
            loss = torch.cat([out.flatten() for out in neck(maps)]).square().sum()
        found.append(torch.autograd.grad(loss, [*maps, *neck.parameters()]))
    assert all(gradient.any() for gradient in found[1])
    assert_close(found[0], found[1], GRADIENT_TOLERANCE[torch.float64])


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


def test_a_fresh_block_is_its_shortcut():
    block = rednet26(num_classes=2).get_submodule("layer2.1").eval()
    x = random_tensor(1, 512, 7, 7, device="cpu").relu()
    assert torch.equal(block(x), x)
