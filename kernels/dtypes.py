"""Which types a kernel computes in, one rule for all operators."""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import interpreting
from kernels.launch import fits_int32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> Any:
    """The same as a kernel knows it."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the types of their sums: what a reference is computed from."""
    return [tensor.to(accumulator_dtype(tensor.dtype)) for tensor in tensors]


def precision(*tensors: Tensor) -> dict[str, Any]:
    """A kernel's types: ACCUMULATOR of its sums, by the first tensor, and OFFSET.

    Offsets have 64 bits only where 32 would overflow inside one batch entry and group of a tensor.
    """
    import triton.language as tl

    return {"ACCUMULATOR": accumulator(tensors[0].dtype), "OFFSET": tl.int32 if fits_int32(*tensors) else tl.int64}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether kernels may multiply matrices of that type: on a GPU Triton does not multiply float64."""
    return dtype != torch.float64 or interpreting()


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must convert operands of matrix products first: the interpreter's are wrong for bfloat16."""
    return interpreting() and dtype == torch.bfloat16
