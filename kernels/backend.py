"""Which implementation runs: Triton kernels, the portable eager path, or the plain definitions.

=============  =====================================================================================================
``auto``       Triton for tensors on a GPU that Triton supports, eager for all others (the default)
``triton``     the Triton kernels; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)
``eager``      portable PyTorch, lean in memory; runs on any device
``reference``  the definitions of ``kernels.reference``: the naive unfold path, differentiated by PyTorch
=============  =====================================================================================================

The environment variable DYNAMIC_KERNELS_BACKEND presets the choice. It is one setting per process, not per thread:
a backward pass runs on threads of its own and must see what the forward pass saw.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["BACKENDS", "get_backend", "resolve", "set_backend", "transforming", "use_backend"]

BACKENDS = ("auto", "triton", "eager", "reference")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_selected = os.environ.get("DYNAMIC_KERNELS_BACKEND") or "auto"


def transforming() -> bool:
    """Whether this runs inside one of ``torch.func``'s transforms (vmap, grad, jvp, ...)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def get_backend() -> str:
    """The name of the backend in force: the selected one (``auto`` is reported as such), with two exceptions.

    Both are ``reference``, whatever was selected, because they need operators of PyTorch's own: while
    ``torch.onnx.export`` records a model, for no runtime of ONNX has those of this package; and inside ``torch.func``'s
    transforms (vmap, grad, jvp, ...), which do not look into operators registered from Python.

    ValueError where the environment variable names no backend: here and not at import, so that a command can say so in
    a line.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "reference"
    if transforming():
        return "reference"
    return _checked(_selected, "DYNAMIC_KERNELS_BACKEND")


def set_backend(name: str) -> None:
    """Select the backend for the whole process. ValueError for an unknown name."""
    global _selected
    _selected = _checked(name, "backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select the backend inside a ``with`` block, and restore the previous one after it."""
    previous = _selected
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _gpu_supported(device: torch.device) -> bool:
    # Triton generates code for compute capability 8.0 and later; every ROCm device PyTorch supports is fine.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def resolve(backend: str, tensor: Tensor) -> str:
    """``triton`` or ``eager`` for a tensor, from the backend that was asked for.

    ValueError where Triton was asked for and cannot run: it is not installed, or the tensor is on a CPU and the
    interpreter is off.
    """
    if backend == "auto":
        on_gpu = tensor.is_cuda and triton_installed() and _gpu_supported(tensor.device)
        return "triton" if on_gpu else "eager"
    if backend == "triton":
        if not triton_installed():
            raise ValueError("backend 'triton' was selected, but the package triton is not installed")
        if not tensor.is_cuda and not interpreting() and tensor.device.type != "meta":
            raise ValueError(
                f"backend 'triton' needs tensors on a GPU, got device {tensor.device}; "
                "set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
            )
    return backend
