"""Dynamic-kernel aggregations, forward and backward: convolution-like sums with weights computed from the input."""

from kernels import reference
from kernels.backend import get_backend, set_backend, use_backend
from kernels.contmix.op import contmix2d
from kernels.depthwise.op import depthwise_conv2d
from kernels.involution.op import involution2d, involution2d_generate
from kernels.neighborhood.op import na2d_av, na2d_qk, na2d_softmax_av
from kernels.outlook.op import outlook_attention2d

__version__ = "0.1.0"

__all__ = [
    "contmix2d",
    "depthwise_conv2d",
    "get_backend",
    "involution2d",
    "involution2d_generate",
    "na2d_av",
    "na2d_qk",
    "na2d_softmax_av",
    "outlook_attention2d",
    "reference",
    "set_backend",
    "use_backend",
]
