"""Which implementation runs: Triton kernels, the portable eager path, or the plain definitions.

=============  =====================================================================================================
``auto``       Triton for tensors on a GPU that Triton supports, eager for all others (the default)
``triton``     the Triton kernels; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)
``eager``      portable PyTorch, lean in memory; runs on any device
``reference``  the definitions of ``kernels.reference``: the naive unfold path, differentiated by PyTorch
=============  =====================================================================================================

The environment variable DYNAMIC_KERNELS_BACKEND presets the choice and ``set_backend`` changes it for the process.
``use_backend`` holds for its own thread and coroutine only; a thread that is started inside the block begins with the
process's choice. An operator records the backend that its forward pass saw, and its backward pass, which runs on
threads of PyTorch's own, uses that one.
"""

import functools
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "eager", "reference")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


_of_process = os.environ.get("DYNAMIC_KERNELS_BACKEND") or "auto"
_of_block: ContextVar[str | None] = ContextVar("kernels.backend", default=None)
# What a ``use_backend`` block in a function that is being compiled selects: Dynamo does not trace context variables.
_of_trace: str | None = None
_this = sys.modules[__name__]


def __getattr__(name: str) -> str:
    """``selected``, an attribute that is computed: Dynamo guards on an attribute, not on a context variable."""
    if name == "selected":
        return _of_block.get() or _checked(_of_process, "DYNAMIC_KERNELS_BACKEND")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def transforming() -> bool:
    """Whether this runs inside one of ``torch.func``'s transforms (vmap, grad, jvp, ...) or under forward-mode AD."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _constant_to_dynamo(function: Any) -> Any:
    """What ``torch.compiler.assume_constant_result`` does, which imports Dynamo, for a second."""
    function._dynamo_marked_constant = True
    return function


# PyTorch 2.11 says yes in whatever Dynamo traces (pytorch/pytorch#176347): Dynamo asks this function instead.
@_constant_to_dynamo
def exporting() -> bool:
    """Whether ``torch.export`` records this."""
    return torch.compiler.is_exporting()  # pyright: ignore[reportPrivateImportUsage]


def get_backend() -> str:
    """The name of the backend in force: the selected one (``auto`` is reported as such), with two exceptions.

    Both are ``reference``, whatever was selected, because they need operators of PyTorch's own: while
    ``torch.onnx.export`` records a model, because ONNX runtimes lack those of this package; and inside ``torch.func``'s
    transforms and ``torch.autograd.forward_ad``, which do not look into operators registered from Python.

    ValueError where the environment variable is not the name of a backend. It is raised here and not at import, so that
    a command can report it in one line.
    """
    if transforming():
        return "reference"
    recording = exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if recording and torch.onnx.is_in_onnx_export():
        return "reference"
    return _of_trace or _this.selected


def set_backend(name: str) -> None:
    """Select the backend for the whole process, or inside a ``use_backend`` block for what is left of the block.

    ValueError for an unknown name.
    """
    global _of_process
    _checked(name, "backend")
    if _of_block.get() is None:
        _of_process = name
    else:
        _of_block.set(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select the backend inside a ``with`` block, for this thread and coroutine, and restore the previous one."""
    global _of_trace
    _checked(name, "backend")
    if torch.compiler.is_compiling():
        previous, _of_trace = _of_trace, name
        try:
            yield
        finally:
            _of_trace = previous
    else:
        outer = _of_block.get()
        _of_block.set(name)
        try:
            yield
        finally:
            _of_block.set(outer)


# At import and not when asked for: Dynamo does not trace the search for a module.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device. PyTorch raises an error for ``meta``, which has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def triton_installed() -> bool:
    return _TRITON_INSTALLED


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant_to_dynamo  # it would break the graph to ask for the capability
@functools.cache
def _gpu_supported(device: torch.device) -> bool:
    # Triton generates code for compute capability 8.0 and later; every ROCm device PyTorch supports is fine.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def is_hopper() -> bool:
    """Whether the GPU is one, with 227 KiB of shared memory for a program; taken for granted where there is none."""
    return not torch.cuda.is_available() or (torch.cuda.get_device_capability()[0] == 9 and not torch.version.hip)


def resolve(backend: str, *maps: Tensor) -> str:
    """``triton`` or ``eager`` for maps [..., H, W] of one device, from the backend that was asked for.

    ValueError where Triton was asked for and cannot run: it is not installed, or the device is a CPU and the
    interpreter is off; or where it would run and a map has more pixels than its kernels count.
    """
    device = maps[0].device
    if backend == "auto":
        on_gpu = maps[0].is_cuda and triton_installed() and _gpu_supported(device)
        backend = "triton" if on_gpu else "eager"
    elif backend == "triton":
        if not triton_installed():
            raise ValueError("backend 'triton' was selected, but the package triton is not installed")
        if not maps[0].is_cuda and not interpreting() and device.type != "meta":
            raise ValueError(
                f"backend 'triton' needs tensors on a GPU, got device {device}; "
                "set TRITON_INTERPRET=1 before starting Python to run the kernels in Triton's interpreter"
            )
    if backend == "triton" and not torch.compiler.is_compiling():  # compiled code asks again when it runs
        for tensor in maps:
            if math.prod(tensor.shape[-2:]) >= 2**31:
                raise ValueError(
                    f"a map of {tensor.shape[-2]}x{tensor.shape[-1]} pixels is too large: the Triton kernels count "
                    "at most 2^31 - 1 of them; the eager backend takes it"
                )
    return backend
