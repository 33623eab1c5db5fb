"""A model that is measured in a moment."""

import pytest

from models import registry
from models.rednet import RedNet


def tiny_rednet(pretrained: bool = False, **options) -> RedNet:
    return RedNet((1, 1, 0, 0), **options)


@pytest.fixture(autouse=True)
def _tiny_rednet(monkeypatch):
    monkeypatch.setitem(registry.entry_points, "tiny_rednet", tiny_rednet)
