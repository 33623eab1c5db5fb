"""What every test compares with: the shared tolerances, one error measure, fresh inputs, official golden outputs."""

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kernels
from autotune.timing import relative_error as relative_error
from kernels import tolerances
from kernels.launch import Launch, watching_launches

ROOT, GOLDEN = Path(__file__).parents[1], Path(__file__).parent / "golden"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = tolerances.OUTPUT, tolerances.GRADIENT
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def assert_close(out: Any, expected: Any, tolerance: float, what: str = "output") -> None:
    """Compares tensors by ``relative_error``, and sequences of them one by one."""
    if not isinstance(expected, Tensor):
        assert len(out) == len(expected)
        for index, pair in enumerate(zip(out, expected, strict=True)):
            assert_close(*pair, tolerance, f"{what} {index}")
        return
    error = relative_error(out, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def equal_entries(a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]) -> bool:
    """Whether two modules or state dicts have the same names and the same bits."""
    a, b = (state.state_dict() if isinstance(state, nn.Module) else state for state in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every entry of the module is afterwards what it was."""
    before = copy.deepcopy(module.state_dict())
    yield
    assert equal_entries(module, before)


def random_tensor(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int | None = None, device: str = DEVICE
) -> Tensor:
    """Standard normal numbers, fresh in every call unless seeded, drawn in float64 and rounded to ``dtype``."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device=device, dtype=dtype)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def differentiated(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Outputs of the function on a backend, and gradients of the tensors for those gradients of the outputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    with kernels.use_backend(backend):
        out = function(*tensors)
    outs = list(out) if isinstance(out, tuple | list) else [out]
    return [*outs, *torch.autograd.grad(outs, tensors, grads)]


def trained(module: nn.Module, x: Tensor, grad: Tensor, backend: str = "auto") -> list[Tensor]:
    """Output of the module on a backend, and for that gradient of it those of x and of every parameter that has one."""
    leaves = [x.detach().requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    with kernels.use_backend(backend):
        out = module(leaves[0])
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@contextmanager
def watching() -> Iterator[list[Launch]]:
    """What is launched inside, in backward passes too: for a GPU's autograd has threads of its own."""
    launched: list[Launch] = []
    with torch.autograd.set_multithreading_enabled(False), watching_launches(lambda made, _: launched.append(made)):
        yield launched


def names_of(launched: Sequence[Launch]) -> Counter[str]:
    """How often each kernel was launched."""
    return Counter(made.kernel.__name__ for made in launched)


def randomise(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """The module with random numbers in every parameter and running statistic, so that every term matters."""
    module.to(dtype)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_()
    return module


class Hostile:
    """What a pickle may hold: unpickling it makes the folder ``path``."""

    def __init__(self, path: str | os.PathLike[str] = "was_run") -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def in_a_process(*command: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments and environment variables beside this package; "" takes a variable away."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
        env={name: value for name, value in environment.items() if value},
    )  # fmt: skip


@functools.cache
def official_state_dicts() -> dict[str, dict[str, list[int]]]:
    """Entry name -> shape of every official checkpoint, by variant."""
    return json.loads((GOLDEN / "state_dicts.json").read_text())


@functools.cache
def golden_fill():
    """The module that fills a model from its entry names alone (``fill_``) and makes the matching ``image``."""
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def triton_device() -> str:
    """Where the Triton kernels run here: the GPU, or the CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    return DEVICE
