"""Convolutions with channels that a GPU's matrix units take: 1×1 as matrix products, any number of channels padded, and
those of images by a kernel of their own."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.backend import get_backend, resolve, transforming, under_autocast
from models.layers.tracing import leaf

HALVES = (torch.float16, torch.bfloat16)
# In 16 bits, the fast kernels of cuBLAS and cuDNN want rows of matrices to begin at multiples of 16 bytes. An H200 took
# three times as long for a product of 340 columns as for one of 344, and cuDNN pads maps in passes of its own.
MULTIPLE = 8


def padded(tensor: Tensor, *axes: int) -> Tensor:
    """With zeros behind, so that the sizes of these axes are multiples of MULTIPLE; as it is where they are already."""
    missing = {axis % tensor.ndim: -tensor.shape[axis] % MULTIPLE for axis in axes}
    if not any(missing.values()):
        return tensor
    return F.pad(tensor, [n for axis in reversed(range(tensor.ndim)) for n in (0, missing.get(axis, 0))])


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows·weightᵀ (+ bias) in 16 bits on a GPU: [N, C], [O, C] -> [N, O], where need be a part of a wider matrix."""
    bias = None if bias is None else padded(bias, 0)
    out = F.linear(padded(rows, 1), padded(weight, 0, 1), bias)
    return out if out.shape[1] == weight.shape[0] else out[:, : weight.shape[0]]


class PointwiseConv2d(nn.Conv2d):
    """out[b,o,i] = Σ_c weight[o,c] · x[b,c,i] (+ bias[o]): PyTorch's convolution in all but its ``forward``.

    PyTorch's convolution adds the bias in a second pass over the output, and copies slices of channels. This layer is a
    matrix product, which does neither, for 16-bit channels-last maps on a GPU. Otherwise it is PyTorch's convolution:
    also in float32, where convolutions may use tensor cores and matrix products by default may not.

    With ``relu``, which inference sets, ReLU follows: as a part of the product where that is one.
    """

    relu = False

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        if not (in_16_bits_on_gpu(input) and is_matrix(input)):
            out = super().forward(input)
            return F.relu(out) if self.relu else out
        pixels = input.permute(0, 2, 3, 1)
        rows, weight = pixels.reshape(-1, pixels.shape[3]), self.weight.flatten(1)
        if self.relu:
            out = activated(rows, weight, self.bias)
            out = F.relu(product(rows, weight, self.bias)) if out is None else out
        else:
            out = product(rows, weight, self.bias)
        return out.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


class PaddedConv2d(nn.Conv2d):
    """PyTorch's convolution in all but its ``forward``, which pads channels with zeros in 16 bits on a GPU.

    Images of few channels go through ``kernels.images`` there, which takes them as they are: with cuDNN the first
    convolutions of OverLoCK and VOLO took an H200 8 and 15 times as long as a copy of as many bytes.

    With ``relu``, which inference sets, ReLU follows.
    """

    relu = False

    @leaf
    def forward(self, input: Tensor) -> Tensor:
        out = self._of_images(input)
        if out is not None:
            return out
        if self.groups > 1 or input.ndim != 4 or not in_16_bits_on_gpu(input):
            out = super().forward(input)
        else:
            inputs = (1,) if self.in_channels > MULTIPLE else ()
            bias = None if self.bias is None else padded(self.bias, 0)
            out = self._conv_forward(padded(input, *inputs), padded(self.weight, 0, *inputs), bias)
            out = out[:, : self.out_channels]
        return F.relu(out) if self.relu else out

    def _of_images(self, x: Tensor) -> Tensor | None:
        """The result by the kernel for images; None where it does not run."""
        if x.ndim != 4 or self.in_channels > MULTIPLE or not runs_triton(x):
            return None
        dtype = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else self.weight.dtype
        if dtype not in HALVES or not (under_autocast(x) or x.dtype == dtype):
            return None
        stride, padding, size = self.stride[0], self.padding[0], self.kernel_size[0]
        options = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        if options != ((size,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), 1, "zeros"):
            return None
        from kernels.images import fits, image_conv2d

        if not fits(x, self.weight):
            return None
        bias = None if self.bias is None else self.bias.to(dtype)
        return image_conv2d(x.to(dtype), self.weight.to(dtype), bias, stride, padding, self.relu)


def activated(rows: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor | None:
    """ReLU(rows·weightᵀ + bias) by the matrix product's own kernel, or GELU by its formula with tanh.

    None where there is no such kernel: without a bias, with gradients, of several types.
    """
    if bias is None or not infers(rows, weight, bias):
        return None
    return torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=gelu)


def runs_triton(x: Tensor) -> bool:
    """Whether Triton's kernels compute with x here; not inside ``torch.func``'s transforms."""
    return resolve(get_backend(), x) == "triton"


def infers(*tensors: Tensor | None) -> bool:
    """Whether a kernel that has no derivative may take the tensors: nobody may ask for a gradient, nothing is cast."""
    given = [tensor for tensor in tensors if tensor is not None]
    if under_autocast(given[0]):
        return False
    for tensor in given:
        if tensor.dtype != given[0].dtype or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
    return True


def in_16_bits_on_gpu(x: Any) -> bool:
    """Whether x is multiplied in 16 bits on a GPU; not inside ``torch.func``, nor where ``torch.fx`` records calls."""
    if not isinstance(x, Tensor) or x.device.type != "cuda" or transforming():
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype in HALVES


def is_matrix(x: Tensor) -> bool:
    """Whether the pixels of x [B, C, H, W] are rows of one matrix: channels-last maps, and slices of their channels."""
    if x.ndim != 4:
        return False
    (images, channels, height, width), (image, channel, row, column) = x.shape, x.stride()
    # The stride of an axis of length 1 is arbitrary.
    column = column if width > 1 else row if height > 1 else image
    rows = height == 1 or row == width * column
    return channel == 1 and column >= channels and rows and (images == 1 or image == height * width * column)
