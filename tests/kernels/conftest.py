"""Every test of the kernels runs them, on a GPU too; and the eager path on several threads."""

import pytest
import torch

from kernels import parallel
from kernels.depthwise import configs
from kernels.tuning.choose import forget


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    """No convolution counts as small: on a GPU PyTorch's would be given all that is tested here."""
    monkeypatch.setattr(configs, "SMALL", 0)
    configs.heuristic.cache_clear()
    forget()
    yield
    configs.heuristic.cache_clear()
    forget()


@pytest.fixture(params=[2, 5])
def threads(request, monkeypatch):
    """Every eager call, however small, is shared out among so many threads."""
    before = torch.get_num_threads()
    monkeypatch.setattr(parallel, "WORTH_A_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
