"""Depthwise convolutions: residual 3×3, large kernels, and large kernels trained with dilated branches beside them."""

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

import kernels
from kernels.backend import get_backend
from kernels.depthwise.eager import dense
from kernels.depthwise.op import normed_branches, residual_depthwise_conv2d
from kernels.dtypes import multiplies
from models.checks import flag, integer, one_of
from models.layers.basic import affine
from models.layers.fusion import as_built, convolves, trains
from models.layers.pointwise import in_16_bits_on_gpu, runs_triton
from models.layers.tracing import leaf


class ResidualDepthwiseConv2d(nn.Conv2d):
    """x + depthwise 3×3 convolution of x."""

    def __init__(self, channels: int) -> None:
        channels = integer("channels", channels)
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        if in_16_bits_on_gpu(input):
            return residual_depthwise_conv2d(input, self.weight, self.bias)
        return input + super().forward(input)

    def folded(self) -> nn.Module:
        """x + W∗x + b = (W + δ)∗x + b, where δ is 1 at the window's centre: a depthwise convolution."""
        if not as_built(self, ResidualDepthwiseConv2d):
            return self
        conv = DepthwiseConv2d(self.in_channels, 3)
        conv.weight, conv.bias = self.weight, self.bias
        conv.weight[:, :, 1, 1] += 1
        return conv


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with "same" padding, computed by ``kernels.depthwise_conv2d``.

    A dilated kernel is one of dilation 1 with zeros between its entries, and computed as such where PyTorch has no fast
    kernels for dilation: in 16 bits on a GPU, and beyond 3×3 everywhere.
    """

    def __init__(self, channels: int, kernel_size: int, bias: bool = True, dilation: int = 1) -> None:
        channels, kernel_size = integer("channels", channels), integer("kernel_size", kernel_size)
        padding = dilation * (kernel_size // 2)
        super().__init__(channels, channels, kernel_size, 1, padding, dilation, groups=channels, bias=bias)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        weight, dilation = self.weight, self.dilation[0]
        if dilation > 1:
            if get_backend() == "reference" or (weight.shape[-1] <= 3 and not in_16_bits_on_gpu(input)):
                return super().forward(input)
            weight = dense(weight, dilation)
        return kernels.depthwise_conv2d(input, weight, self.bias)


class DilatedReparamBlock(nn.Module):
    """BN(K×K depthwise of x) + Σ BN(dilated depthwise of x), one K×K kernel with bias once merged (arXiv 2311.15599).

    While batch norms use their running statistics every branch is linear, and the sum is one K×K convolution. It is
    computed as such, merged or not, as long as nobody replaced a branch. ``merge`` makes it permanent. In training, one
    operator computes all branches and their batch norms where Triton runs.

    Args:
        channels: C of the [B, C, H, W] input and output.
        kernel_size: K, one of 17, 15, 13, 7.
        merged: build the form that ``merge`` produces.
    """

    BRANCHES: ClassVar = {  # K -> (kernel size, dilation) of each parallel branch
        17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
        15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
        13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    }

    def __init__(self, channels: int, kernel_size: int, merged: bool = False) -> None:
        super().__init__()
        self.channels = channels = integer("channels", channels)
        self.kernel_size = one_of("kernel_size", kernel_size, sorted(self.BRANCHES))
        self.lk_origin = DepthwiseConv2d(channels, kernel_size, bias=flag("merged", merged))
        if merged:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for size, dilation in self.BRANCHES[kernel_size]:
            self.add_module(f"dil_conv_k{size}_{dilation}", DepthwiseConv2d(channels, size, False, dilation))
            self.add_module(f"dil_bn_k{size}_{dilation}", nn.BatchNorm2d(channels))

    @property
    def merged(self) -> bool:
        return not hasattr(self, "origin_bn")

    def branches(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolution and batch norm of every separate branch, the K×K one first; [] once merged."""
        if self.merged:
            return []
        names = [f"k{size}_{dilation}" for size, dilation in self.BRANCHES[self.kernel_size]]
        dilated = [(getattr(self, f"dil_conv_{name}"), getattr(self, f"dil_bn_{name}")) for name in names]
        return [(self.lk_origin, self.origin_bn), *dilated]

    def _convolves(self, device: torch.device | None) -> bool:
        """Whether every branch has the convolution that it was built with, on ``device``."""
        sizes, kinds, groups = ((self.kernel_size, 1), *self.BRANCHES[self.kernel_size]), DepthwiseConv2d, self.channels
        return all(
            conv.bias is None and convolves(conv, size, device, kinds=kinds, dilation=dilation, groups=groups)
            for (conv, _), (size, dilation) in zip(self.branches(), sizes, strict=True)
        )

    def merged_parameters(self, device: torch.device | None = None) -> tuple[Tensor, Tensor] | None:
        """Kernel [C, 1, K, K] and bias [C] of the one convolution that equals the sum of all branches.

        None if a branch uses batch statistics, or was replaced, wrapped or hooked. The branches are added one by one:
        stacking them would be faster, but would make their gradients views of one tensor.
        """
        parts = []
        for conv, norm in self.branches():
            normed = affine(norm, device)
            if normed is None:
                return None
            parts.append((conv, *normed))
        if not self._convolves(device):
            return None
        kernel, bias = torch.zeros_like(self.lk_origin.weight), torch.zeros_like(parts[0][2])
        for conv, scale, shift in parts:
            first = self.kernel_size // 2 - conv.padding[0]
            taps = slice(first, self.kernel_size - first, conv.dilation[0])
            kernel[:, :, taps, taps] += conv.weight * scale.view(-1, 1, 1, 1)
            bias = bias + shift
        return kernel, bias

    @torch.no_grad()
    def merge(self) -> None:
        """Replaces all branches by their sum, computed with the batch norms' running statistics.

        Raises:
            ValueError: a branch was replaced, wrapped, parametrised or hooked.
        """
        if self.merged:
            return
        parameters = copy.deepcopy(self).eval().merged_parameters()
        if parameters is None:
            raise ValueError(
                "a branch of this DilatedReparamBlock was replaced, wrapped or hooked: it cannot be merged"
            )
        merged = DepthwiseConv2d(self.channels, self.kernel_size)
        requires_grad = self.lk_origin.weight.requires_grad
        merged.weight, merged.bias = (nn.Parameter(tensor, requires_grad=requires_grad) for tensor in parameters)
        for name, _ in list(self.named_children()):
            delattr(self, name)
        self.lk_origin = merged.train(self.training)

    def merge_entries(self, state: dict[str, Tensor], prefix: str) -> None:
        """Replaces the entries of separate branches by those of the merged kernel, if ``state`` has them all."""
        separate = DilatedReparamBlock(self.channels, self.kernel_size).double()
        own = separate.state_dict()
        found = {name: state[prefix + name] for name in own if prefix + name in state}
        if found.keys() != own.keys() or any(found[name].shape != own[name].shape for name in own):
            return  # merged already, or not a file for this model: the loader decides
        separate.load_state_dict(found)
        separate.merge()
        for name in found:
            del state[prefix + name]
        state.update((prefix + name, tensor) for name, tensor in separate.state_dict().items())

    reparameterize = merge  # the name by which timm's ``reparameterize_model`` asks for it

    def folded(self) -> nn.Module:
        """The one convolution, unless a branch or the block was replaced, wrapped or hooked."""
        if not self.merged and self.merged_parameters() is None:
            return self
        self.merge()
        return self.lk_origin if as_built(self, DilatedReparamBlock) else self

    @leaf
    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.lk_origin(x)
        parameters = self.merged_parameters(x.device)
        if parameters is not None:
            return kernels.depthwise_conv2d(x, *parameters)
        out = self._by_one_operator(x)
        if out is None:
            out = torch.zeros((), dtype=x.dtype, device=x.device)
            for conv, norm in self.branches():
                out = out + norm(conv(x))
        return out

    def _by_one_operator(self, x: Tensor) -> Tensor | None:
        """The sum where every branch is a plain convolution with a batch norm in training, and Triton computes them."""
        if x.dim() != 4 or not runs_triton(x) or not multiplies(x.dtype):
            return None
        convs, norms = zip(*self.branches(), strict=True)
        if not all(trains(norm, x.device) for norm in norms) or len({(norm.eps, norm.momentum) for norm in norms}) > 1:
            return None
        if not self._convolves(x.device) or not x.numel() > self.channels == x.shape[1]:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = torch.stack([norm.weight for norm in norms]).to(dtype)
        shift = torch.stack([norm.bias for norm in norms]).to(dtype).sum(0)
        weights, dilations = [conv.weight for conv in convs], [conv.dilation[0] for conv in convs]
        out, (mean, variance) = normed_branches(x, weights, dilations, scale, shift, norms[0].eps)
        with torch.no_grad():
            number = x.numel() // self.channels
            for name, batch in (("running_mean", mean), ("running_var", variance * (number / (number - 1)))):
                running = [getattr(norm, name) for norm in norms]
                torch._foreach_lerp_(running, [row.to(running[0].dtype) for row in batch], norms[0].momentum)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)  # pyright: ignore[reportPrivateImportUsage]
        return out
