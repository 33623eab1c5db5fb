"""DilatedReparamBlock: the sum of its branches, in training, in evaluation and merged, whatever the branches are."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import kernels
from kernels import tolerances
from models.layers import DilatedReparamBlock
from tests.support import DEVICE, assert_close, random_tensor, randomise, relative_error, trained, triton_device

TOLERANCE = 1e-12


def test_dilated_reparam_block_adapts_single_batch_norms():
    """A batch norm left in training mode sees its branch, although the block as a whole is in evaluation mode."""
    block = randomise(DilatedReparamBlock(3, 7)).eval()
    block.dil_bn_k3_2.train()
    before = block.dil_bn_k3_2.running_mean.clone()
    block(random_tensor(2, 3, 9, 9, dtype=torch.float64, device="cpu"))
    assert not torch.equal(block.dil_bn_k3_2.running_mean, before)


def branches(kind: str) -> DilatedReparamBlock:
    """A block, some of whose branches may not be what was built, in evaluation mode."""
    block: Any = randomise(DilatedReparamBlock(4, 7)).eval()
    if kind == "eps":
        block.dil_bn_k5_1.eps, block.origin_bn.eps = 1e-2, 0.3
    elif kind == "fused":
        block.lk_origin, block.origin_bn = nn.utils.fuse_conv_bn_eval(block.lk_origin, block.origin_bn), nn.Identity()
        block.dil_conv_k3_2 = nn.utils.fuse_conv_bn_eval(block.dil_conv_k3_2, block.dil_bn_k3_2)
        block.dil_bn_k3_2 = nn.Identity()
    elif kind == "hook":
        block.dil_conv_k3_3.register_forward_hook(lambda module, inputs, out: 2 * out)
    elif kind != "as built":
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(block, name, nn.GroupNorm(2, 4) if kind == "group" else nn.BatchNorm2d(4, affine=False))
    return randomise(block).eval()


@pytest.mark.parametrize("kind", ["as built", "group", "not affine", "fused", "eps", "hook"])
def test_branches_whatever_they_are(kind):
    """Their sum in evaluation, folded, and merged, which only convolutions and batch norms can be; and in training."""
    block = branches(kind)
    x = random_tensor(2, 4, 9, 9, dtype=torch.float64, device="cpu")
    expected = torch.stack([norm(conv(x)) for conv, norm in block.branches()]).sum(0)
    assert_close(block(x), expected, TOLERANCE)
    folded: Any = block.folded()
    with torch.no_grad():
        assert_close(folded(x), expected, TOLERANCE)
    if kind in ("as built", "eps", "not affine"):
        for _ in range(2):
            block.merge()
            assert_close(block(x), expected, TOLERANCE)
        assert sorted(block.state_dict()) == ["lk_origin.bias", "lk_origin.weight"]
        assert block.branches() == []
    else:
        assert not block.merged
        with pytest.raises(ValueError, match=r"replaced, wrapped or hooked: it cannot be merged"):
            block.merge()
    triton_device()
    block, x, gradient = branches(kind).train().to(DEVICE), x.to(DEVICE), random_tensor(*x.shape).double()
    expected = step(block, x, gradient, "reference")
    assert_close(step(block, x, gradient, "triton"), expected, 1e-10)


def step(block: Any, x: torch.Tensor, gradient: torch.Tensor, backend: str) -> list[torch.Tensor]:
    """Output, gradients and running statistics of a training step."""
    block = copy.deepcopy(block)
    return [*trained(block, x, gradient, backend), *(buffer.double() for buffer in block.buffers())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel_size", "shape", "channels_last"),
    [(7, (3, 6, 7, 7), True), (7, (2, 3, 5, 9), False), (13, (2, 5, 14, 14), True), (17, (5, 2, 20, 16), False)],
)
def test_training_in_one_operator(kernel_size, shape, channels_last, dtype):
    """Triton's, against the branches one by one in float64; the means are large beside the deviations."""
    if triton_device() != "cpu" and dtype == torch.float64:
        pytest.skip("Triton multiplies no float64 on a GPU")
    block = randomise(DilatedReparamBlock(shape[1], kernel_size)).to(DEVICE, dtype)
    x, gradient = (random_tensor(*shape) + 3).to(dtype), random_tensor(*shape, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found = step(block, x, gradient, "triton")
    expected = step(copy.deepcopy(block).double(), x.double(), gradient.double(), "reference")
    assert found[0].stride() == x.stride()
    for ours, exact in zip(found, expected, strict=True):
        assert relative_error(ours, exact) < 4 * tolerances.GRADIENT[dtype]
    if dtype == torch.float32:  # what types do not change
        assert all(map(torch.equal, found, step(block, x, gradient, "triton")))


def test_training_under_autocast_and_compiled():
    triton_device()
    block, x = DilatedReparamBlock(4, 7).to(DEVICE), random_tensor(2, 4, 7, 7)
    with kernels.use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        out = block(x)
        assert out.dtype == torch.bfloat16
        fresh = copy.deepcopy(block)
        compiled = torch.compile(fresh, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), block(x), 1e-6)
    assert_close(fresh.origin_bn.running_var, block.origin_bn.running_var, 1e-6)
    assert fresh.origin_bn.num_batches_tracked == 2
