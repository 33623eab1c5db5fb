"""Models compute in full float32 on a GPU too."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    """Convolutions there round their operands to TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
