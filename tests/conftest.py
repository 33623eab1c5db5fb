"""Picks GPU or interpreter before Triton is imported, and fills every new tensor with NaN."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from torch.utils._device import _device_constructors

from kernels.tuning.choose import forget
from tests.quick_interpreter import quicken

if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()

torch.backends.cudnn.allow_tf32 = False  # a float32 convolution keeps its digits, as on a CPU

# ``with torch.device("meta")`` recognises the constructors it redirects from a list made at its first use: make it now,
# before a test's poisoned torch.empty stands in for the real one.
_device_constructors()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """torch.empty and friends return NaN, so an element that nobody writes fails every comparison."""

    def poisoned(function):
        def wrapper(*args, **kwargs):
            out = function(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta:
                out.detach().fill_(float("nan"))
            return out

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def store_folders(tmp_path, monkeypatch):
    """The folders of the user's tuned configs and of those that ship; both are absent at first."""
    store, shipped = tmp_path / "store", tmp_path / "shipped"
    monkeypatch.setenv("DYNAMIC_KERNELS_STORE", str(store))
    for module in ("kernels.tuning.choose", "autotune.tunables", "autotune.show"):
        monkeypatch.setattr(f"{module}.shipped_folder", lambda: shipped)
    forget()
    yield store, shipped
    forget()
