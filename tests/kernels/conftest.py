"""Every test of the kernels runs them, on a GPU too."""

import pytest

from kernels.depthwise import configs
from kernels.tuning.choose import forget


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    """No convolution counts as small: on a GPU PyTorch's would be given all that is tested here."""
    monkeypatch.setattr(configs, "SMALL", 0)
    forget()
    yield
    forget()
