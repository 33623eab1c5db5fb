"""DilatedReparamBlock: the sum of its branches, in training, in evaluation and merged, whatever the branches are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.layers import DilatedReparamBlock
from tests.support import assert_close, random_tensor, randomise

TOLERANCE = 1e-12


def sum_of_branches(block: DilatedReparamBlock, x: torch.Tensor) -> torch.Tensor:
    outputs = [
        norm(F.conv2d(x, conv.weight, None, 1, conv.padding, conv.dilation, 3)) for conv, norm in block.branches()
    ]
    return torch.stack(outputs).sum(0)


@pytest.mark.parametrize("kernel_size", [7, 13, 15, 17])
def test_dilated_reparam_block(kernel_size):
    block = randomise(DilatedReparamBlock(3, kernel_size))
    x = random_tensor(2, 3, 20, 9, dtype=torch.float64, device="cpu").requires_grad_()
    assert_close(block(x), sum_of_branches(block, x), TOLERANCE, "training mode")

    block.eval()
    inputs = [x, *(part.weight for branch in block.branches() for part in branch)]
    expected, out = sum_of_branches(block, x), block(x)
    assert_close(out, expected, TOLERANCE, "evaluation mode")
    gradient = random_tensor(*x.shape, dtype=torch.float64, device="cpu")
    found, right = (torch.autograd.grad(y, inputs, gradient) for y in (out, expected))
    assert_close(found, right, 1e-11, "gradient")

    for time in ("merged", "merged twice"):
        block.merge()
        assert block.merged
        assert_close(block(x), expected, TOLERANCE, time)
    assert sorted(block.state_dict()) == ["lk_origin.bias", "lk_origin.weight"]


def test_dilated_reparam_block_adapts_single_batch_norms():
    """A batch norm left in training mode sees its branch, although the block as a whole is in evaluation mode."""
    block = randomise(DilatedReparamBlock(3, 7)).eval()
    block.dil_bn_k3_2.train()
    before = block.dil_bn_k3_2.running_mean.clone()
    block(random_tensor(2, 3, 9, 9, dtype=torch.float64, device="cpu"))
    assert not torch.equal(block.dil_bn_k3_2.running_mean, before)


def other_branches(kind: str) -> DilatedReparamBlock:
    """A block some of whose branches are not what was built, in evaluation mode."""
    block: Any = randomise(DilatedReparamBlock(4, 7)).eval()
    if kind == "eps":
        block.dil_bn_k5_1.eps, block.origin_bn.eps = 1e-2, 0.3
    elif kind == "fused":
        block.lk_origin, block.origin_bn = nn.utils.fuse_conv_bn_eval(block.lk_origin, block.origin_bn), nn.Identity()
        block.dil_conv_k3_2 = nn.utils.fuse_conv_bn_eval(block.dil_conv_k3_2, block.dil_bn_k3_2)
        block.dil_bn_k3_2 = nn.Identity()
    elif kind == "hook":
        block.dil_conv_k3_3.register_forward_hook(lambda module, inputs, out: 2 * out)
    else:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(block, name, nn.GroupNorm(2, 4) if kind == "group" else nn.BatchNorm2d(4, affine=False))
    return randomise(block).eval()


@pytest.mark.parametrize("kind", ["group", "not affine", "fused", "eps", "hook"])
def test_dilated_reparam_block_runs_branches_that_were_replaced(kind):
    block = other_branches(kind)
    x = random_tensor(2, 4, 9, 9, dtype=torch.float64, device="cpu")
    expected = torch.stack([norm(conv(x)) for conv, norm in block.branches()]).sum(0)
    assert_close(block(x), expected, TOLERANCE)
    folded: Any = block.folded()
    with torch.no_grad():
        assert_close(folded(x), expected, TOLERANCE)
    if kind in ("eps", "not affine"):
        block.merge()
        assert_close(block(x), expected, TOLERANCE)
    else:
        assert not block.merged
        with pytest.raises(ValueError, match=r"replaced, wrapped or hooked: it cannot be merged"):
            block.merge()
